//! One connection with one request through one proxy, with one seed, put into words.

use std::sync::Arc;

use engine::chain::{FilterChain, Listener, NoFilterChain, Terminal, select_chain};
use engine::cluster::{Cluster, Endpoint, Health};
use engine::exchange::{Attempt, AuthorizeAnswer, Question, Start, UpstreamProtocol};
use engine::facts::{PeerCertificate, TlsFacts, Transport};
use engine::fault::Fault;
use engine::matcher::Metadata;
use engine::record::{Provenance, Record, Stage};
use engine::route::{Override, Overrides, RouteTable, Target};
use engine::stream::{Stream, StreamStart, StreamStep};
use engine::{Answer, ConnFacts, Exchange, Now, Step};
use types::{Cause, ClusterName, RequestHead, ResponseHead, SpiffeId, Version};

use crate::reasons::{self, Found};
use crate::report::{Decision, End, EndKind, Lost};
use crate::world::{OUTSIDE, Proxy, World};

/// A connection that reaches a proxy.
#[derive(Clone)]
pub(crate) struct Arrival {
    /// As the inspectors see it, before any handshake.
    pub(crate) facts: ConnFacts,
    /// Who a TLS client is, if it has a mesh identity.
    pub(crate) identity: Option<SpiffeId>,
    /// The request, if it can be read here (after a handshake of this proxy).
    pub(crate) head: Option<RequestHead>,
}

/// What a proxy does with it.
pub(crate) struct Run {
    pub(crate) decisions: Vec<Decision>,
    pub(crate) next: Next,
    /// Equal for runs that differ in nothing but the endpoint.
    pub(crate) key: String,
    /// The share that weights and percentages give it, of 100.
    pub(crate) by_weight: Option<f64>,
    /// Another seed may go another way.
    pub(crate) is_random: bool,
}

/// What follows.
pub(crate) enum Next {
    Forward { attempt: Box<Attempt>, head: Option<RequestHead> },
    End(End),
}

/// The secret with a workload's own certificate.
const WORKLOAD_CERT: &str = "default";
/// Steps of one request; more is a loop.
const STEPS_MAX: usize = 32;

/// Runs it.
pub(crate) fn run(
    world: &World<'_>,
    proxy: &Proxy,
    listener: &Listener,
    arrival: &Arrival,
    (now, seed): (Now, u64),
) -> Run {
    let mut record = Record::default();
    let mut decisions = vec![Decision {
        stage: "listener",
        outcome: listener.name.to_string(),
        detail: String::new(),
        because: reasons::because(&listener.provenance),
        lost: Vec::new(),
    }];
    let chain = match select_chain(listener, &arrival.facts, &mut record) {
        Ok(chain) => chain,
        Err(NoFilterChain) => {
            let how = if arrival.facts.transport == Transport::Tls { "TLS" } else { "plaintext" };
            decisions.push(Decision {
                stage: "chain",
                outcome: "none".to_owned(),
                detail: format!("no filter chain takes a {how} connection to port {}", arrival.facts.local.port()),
                ..Decision::default()
            });
            let text = format!("the proxy of {} closes the connection", proxy.name());
            return ended(decisions, End::cause(EndKind::Closed, Cause::NoFilterChain, text));
        }
    };
    decisions.push(Decision {
        stage: "chain",
        outcome: if chain.name.is_empty() { "unnamed".to_owned() } else { chain.name.to_string() },
        detail: chain_kind(&chain),
        because: reasons::because(&chain.provenance),
        lost: Vec::new(),
    });
    let facts = match handshake(proxy, &chain, arrival) {
        Ok(facts) => Arc::new(facts),
        Err(why) => {
            let text = format!("the proxy of {} closes the connection: {why}", proxy.name());
            return ended(decisions, End::cause(EndKind::Closed, Cause::DownstreamTlsFailed, text));
        }
    };
    let mut writer = Writer { world, proxy, chain: &chain, now, decisions, record: Record::default() };
    match (&chain.terminal, arrival.head.as_ref().filter(|_| facts.transport == Transport::Raw || facts.tls.is_some()))
    {
        (Terminal::Tcp(_), _) => stream(&mut writer, &facts, arrival, seed),
        (Terminal::Http(_), Some(head)) => exchange(&mut writer, &facts, head, seed),
        (Terminal::Http(_), None) => {
            let text = format!("the proxy of {} expects HTTP and gets other bytes", proxy.name());
            ended(writer.decisions, End::cause(EndKind::Closed, Cause::BadRequest, text))
        }
    }
}

fn ended(decisions: Vec<Decision>, end: End) -> Run {
    Run { decisions, next: Next::End(end), key: String::new(), by_weight: None, is_random: false }
}

fn chain_kind(chain: &FilterChain) -> String {
    let what = match &chain.terminal {
        Terminal::Http(_) => "HTTP",
        Terminal::Tcp(_) => "TCP",
    };
    match &chain.tls {
        Some(tls) if tls.require_client_certificate => format!("{what} over mutual TLS"),
        Some(_) => format!("{what} over TLS"),
        None => what.to_owned(),
    }
}

/// The facts after the handshake that the chain asks for.
fn handshake(proxy: &Proxy, chain: &FilterChain, arrival: &Arrival) -> Result<ConnFacts, String> {
    let mut facts = arrival.facts.clone();
    let Some(tls) = &chain.tls else { return Ok(facts) };
    if facts.transport != Transport::Tls {
        return Err("TLS is wanted and plaintext comes".to_owned());
    }
    let mut secrets = Vec::new();
    tls.secrets(&mut secrets);
    if let Some(missing) = proxy.missing_secret(&secrets) {
        return Err(format!("it does not have the secret {missing}"));
    }
    let asked = tls.validation.is_some();
    let peer = arrival.identity.clone().filter(|_| asked).map(|identity| PeerCertificate {
        uri_sans: vec![identity.to_string().into()],
        identity: Some(identity),
        ..PeerCertificate::default()
    });
    if tls.require_client_certificate && peer.is_none() {
        return Err("a client certificate is wanted and none comes".to_owned());
    }
    let alpn = tls.alpn.iter().find(|ours| facts.protocols.contains(ours)).cloned();
    let is_own = secrets.iter().any(|name| &**name == WORKLOAD_CERT);
    let local_uri_san = proxy.identity.as_ref().filter(|_| is_own).map(|identity| identity.to_string().into());
    facts.tls = Some(Arc::new(TlsFacts { alpn, version: "TLSv1.3", cipher: "", local_uri_san, peer }));
    Ok(facts)
}

struct Writer<'a> {
    world: &'a World<'a>,
    proxy: &'a Proxy,
    chain: &'a Arc<FilterChain>,
    now: Now,
    decisions: Vec<Decision>,
    record: Record,
}

fn stream(writer: &mut Writer<'_>, facts: &Arc<ConnFacts>, arrival: &Arrival, seed: u64) -> Run {
    let proxy = writer.proxy;
    let env = proxy.env(writer.now);
    let start = StreamStart { chain: writer.chain, conn: facts, seed, recorder: &mut writer.record };
    let (_, step) = Stream::start(&env, start);
    let Terminal::Tcp(tcp) = &writer.chain.terminal else { unreachable!("the caller looked") };
    let total: u64 = tcp.clusters.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let chosen = writer.record.outcome(Stage::Cluster).map(str::to_owned);
    let weight = tcp.clusters.iter().find(|(name, _)| Some(&**name) == chosen.as_deref()).map(|(_, weight)| *weight);
    let is_random = tcp.clusters.iter().filter(|(_, weight)| *weight > 0).count() > 1;
    let by_weight = weight.filter(|_| is_random).and_then(|weight| percent(weight, total));
    writer.translate(None);
    let next = match step {
        StreamStep::Connect(made) => {
            writer.transport(&made.attempt);
            // TLS that this proxy ended leaves the plain request; else the bytes go on as they are.
            let head = arrival.head.clone().filter(|_| facts.tls.is_some() || facts.transport == Transport::Raw);
            Next::Forward { attempt: Box::new(made.attempt), head }
        }
        StreamStep::Close(cause) => {
            let text = format!("the proxy of {} closes the connection", proxy.name());
            let mut end = End::cause(EndKind::Closed, cause, text);
            end.status = None;
            if let Some(details) = writer.record.outcome(Stage::Filter).and(writer.denied()) {
                end.details = details;
            }
            Next::End(end)
        }
        StreamStep::Ask(_) | StreamStep::Relay { .. } => Next::End(End::cause(
            EndKind::Closed,
            Cause::Internal,
            "an authorizer would be asked for the connection".to_owned(),
        )),
    };
    writer.finish(next, by_weight, is_random)
}

fn percent(weight: u32, total: u64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "weights are small")]
    (total > 0).then(|| f64::from(weight) * 100.0 / total as f64)
}

fn exchange(writer: &mut Writer<'_>, facts: &Arc<ConnFacts>, sent: &RequestHead, seed: u64) -> Run {
    let (proxy, world) = (writer.proxy, writer.world);
    let mut now = writer.now;
    let mut head = sent.clone();
    let mut info = engine::exchange::StreamInfo::default();
    if let Err(cause) = engine::stream::admit(writer.chain, facts, &mut info, &mut writer.record) {
        writer.translate(None);
        let mut end =
            End::cause(EndKind::Closed, cause, format!("the proxy of {} closes the connection", proxy.name()));
        info.termination.as_str().clone_into(&mut end.details);
        return writer.finish(Next::End(end), None, false);
    }
    let start = Start { chain: writer.chain, conn: facts, ended: true, seed, recorder: &mut writer.record };
    let (mut exchange, mut step) = Exchange::start(&proxy.env(now), start, &mut head);
    for _ in 0..STEPS_MAX {
        let answer = match &step {
            Step::Wait(time) => {
                now = now.after(*time);
                Answer::Elapsed
            }
            Step::Ask(Question::Authorize(question)) => {
                world.note(format!("the authorizer behind {} is assumed to allow", question.attempt.cluster.name));
                // A gRPC answer is one empty message: status OK.
                let body = if question.grpc { vec![0_u8; 5].into() } else { Vec::new().into() };
                Answer::Authorized(Ok(AuthorizeAnswer { head: ResponseHead::new(200), body, trailers: None }))
            }
            Step::Ask(Question::Body(_)) => Answer::Body { bytes: Vec::new().into(), complete: true },
            Step::Ask(Question::Resolve { host }) => {
                world.note(format!("{host} is outside of the mesh: {OUTSIDE} stands for its address"));
                Answer::Resolved(Ok(vec![OUTSIDE]))
            }
            Step::Forward(_) | Step::Reply(_) | Step::Respond | Step::Abort(_) => break,
        };
        step = exchange.resume(&proxy.env(now), answer, &mut head, &mut writer.record);
    }
    let choice = writer.translate(Some((sent, &exchange.info().metadata)));
    let next = match step {
        Step::Forward(attempt) if writer.limits(&attempt.cluster).is_some() => {
            let text = format!("the proxy of {} answers 503", proxy.name());
            Next::End(End::cause(EndKind::Answered, Cause::UpstreamOverflow, text))
        }
        Step::Forward(attempt) => {
            writer.transport(&attempt);
            head.version = match attempt.protocol {
                UpstreamProtocol::Http2 => Version::Http2,
                UpstreamProtocol::Http1 | UpstreamProtocol::Auto => Version::Http11,
            };
            Next::Forward { attempt, head: Some(head) }
        }
        Step::Reply(reply) => {
            let status = reply.head.status;
            let to = reply.head.fields.get_str("location").map(|to| format!(" to {to}")).unwrap_or_default();
            let text = format!("the proxy of {} answers {status}{to}", proxy.name());
            let mut end = End::cause(EndKind::Answered, reply.cause, text);
            end.status = Some(status);
            let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
            end.headers = reply.head.fields.iter().map(|(name, value)| (name.to_owned(), text(value))).collect();
            exchange.info().details.as_str().clone_into(&mut end.details);
            end.flag = engine::access_log::flags(exchange.info());
            Next::End(end)
        }
        Step::Wait(_) | Step::Ask(_) | Step::Respond | Step::Abort(_) => {
            Next::End(End::cause(EndKind::Closed, Cause::Internal, "the exchange does not come to an end".to_owned()))
        }
    };
    writer.finish(next, choice.by_weight, choice.is_random)
}

/// What is random about the route that was chosen.
#[derive(Default)]
struct Chance {
    by_weight: Option<f64>,
    is_random: bool,
}

impl Chance {
    /// Something else is drawn, independently, with this share of 100.
    fn take(&mut self, share: Option<f64>) {
        self.by_weight = self.by_weight.zip(share).map(|(all, share)| all * share / 100.0);
    }
}

impl Writer<'_> {
    fn denied(&self) -> Option<String> {
        let decision = self.record.decisions.iter().rev().find(|decision| decision.stage == Stage::Filter)?;
        decision
            .outcome
            .ends_with(": denied")
            .then(|| format!("{}[{}]", Cause::RbacDeniedConnection.surface().details, decision.detail))
    }

    /// Writes the record down. `request` is the request as it came, and what filters found out.
    fn translate(&mut self, request: Option<(&RequestHead, &Metadata)>) -> Chance {
        let decisions = std::mem::take(&mut self.record.decisions);
        let last = |stage: Stage| decisions.iter().rposition(|decision| decision.stage == stage);
        let provenance = |stage: Stage| last(stage).and_then(|at| decisions[at].provenance.clone());
        let (host, route) = (provenance(Stage::VirtualHost), provenance(Stage::Route));
        let table = reasons::table(&self.proxy.config, self.chain);
        let found = table.zip(host.as_ref()).and_then(|(table, host)| Found::of(table, host, route.as_ref()));
        let again = decisions.iter().filter(|decision| decision.stage == Stage::Route).count() > 1;
        for (at, decision) in decisions.iter().enumerate() {
            let superseded = matches!(decision.stage, Stage::RouteTable | Stage::VirtualHost | Stage::Route)
                && last(decision.stage) != Some(at);
            if superseded {
                continue;
            }
            let made = match decision.stage {
                // Said elsewhere, with more to say.
                Stage::Listener | Stage::Chain | Stage::Transport | Stage::Reply => continue,
                Stage::RouteTable => simple("routes", decision),
                Stage::VirtualHost => virtual_host(decision, table.map(Arc::as_ref)),
                Stage::Route => chosen_route(decision, found.as_ref(), request, again),
                Stage::Filter => self.filter(&decision.outcome, &decision.detail, decision.provenance.as_ref()),
                Stage::Cluster => self.cluster(decision, found.as_ref()),
                Stage::Host => self.endpoint(decision),
                Stage::Mirror => simple("mirror", decision),
                Stage::Retry => simple("retry", decision),
            };
            self.decisions.push(made);
        }
        let chance = found.zip(request).map(|(found, (head, _))| chance(&found, &decisions, head));
        self.record.decisions = decisions;
        chance.unwrap_or_default()
    }

    fn filter(&self, outcome: &str, detail: &str, provenance: Option<&Arc<Provenance>>) -> Decision {
        let (name, verdict) = outcome.split_once(": ").unwrap_or((outcome, ""));
        let workload = &self.proxy.workload;
        let snapshot = self.world.snapshot;
        let root = snapshot.root_namespace();
        let mut made = Decision { outcome: verdict.to_owned(), detail: detail.to_owned(), ..Decision::default() };
        if name.contains("rbac") {
            made.stage = "policy";
            made.because = reasons::policy(detail).into_iter().collect();
            if !made.because.is_empty() {
                made.detail.clear();
            } else if verdict == "denied" && detail == "none" {
                "no ALLOW policy has a rule that matches".clone_into(&mut made.detail);
                let allow = snapshot
                    .authorization_policies()
                    .matching(root, &workload.namespace, &workload.labels)
                    .filter(|config| config.spec.action == api::security::Action::Allow);
                made.lost = allow
                    .map(|config| Lost {
                        what: config.object.to_string(),
                        why: "no rule matches".to_owned(),
                        because: vec![reasons::whole(&config.object)],
                    })
                    .collect();
            }
        } else if name.contains("jwt") {
            made.stage = "token";
            made.because = snapshot
                .request_authentications()
                .matching(root, &workload.namespace, &workload.labels)
                .map(|config| reasons::whole(&config.object))
                .collect();
        } else if name.contains("fault") {
            made.stage = "fault";
            made.outcome = std::mem::take(&mut made.detail);
            made.because = provenance.map(|provenance| reasons::because(provenance)).unwrap_or_default();
        } else if name.contains("authz") {
            made.stage = "authorize";
        } else {
            made.stage = "filter";
            outcome.clone_into(&mut made.outcome);
        }
        made
    }

    fn cluster(&self, decision: &engine::record::Decision, found: Option<&Found<'_>>) -> Decision {
        let mut made = simple("cluster", decision);
        if let Some(Target::Weighted { clusters, total }) =
            found.and_then(Found::forward).map(|forward| &forward.target)
        {
            let weight = clusters.iter().find(|cluster| *cluster.name == *made.outcome).map(|cluster| cluster.weight);
            if let Some(weight) = weight {
                made.detail = format!("weight {weight} of {total}");
            }
            let others = clusters.iter().filter(|cluster| *cluster.name != *made.outcome);
            made.lost = others
                .map(|cluster| Lost {
                    what: cluster.name.to_string(),
                    why: format!("weight {} of {total}", cluster.weight),
                    because: Vec::new(),
                })
                .collect();
        }
        if self.proxy.config.clusters.get(&made.outcome).is_none() {
            "no such cluster".clone_into(&mut made.detail);
            made.lost = self.siblings(&made.outcome);
        } else if made.because.is_empty()
            && let Some(cluster) = self.proxy.config.clusters.get(&made.outcome)
        {
            made.because = reasons::because(&cluster.provenance);
        }
        made
    }

    /// Clusters of the same host.
    fn siblings(&self, name: &str) -> Vec<Lost> {
        let host_of = |name: &str| match name.parse() {
            Ok(ClusterName::Outbound { host, .. }) => Some(host),
            _ => None,
        };
        let Some(wanted) = host_of(name) else { return Vec::new() };
        let clusters = self.proxy.config.clusters.iter();
        let mut same: Vec<Lost> = clusters
            .filter(|(name, _)| host_of(name).as_ref() == Some(&wanted))
            .map(|(name, cluster)| Lost {
                what: name.to_string(),
                why: "it is there, but the route asks for another".to_owned(),
                because: reasons::because(&cluster.provenance),
            })
            .collect();
        same.sort_by(|a, b| a.what.cmp(&b.what));
        same
    }

    fn endpoint(&self, decision: &engine::record::Decision) -> Decision {
        let mut made = simple("endpoint", decision);
        let mut parts = decision.detail.split(';');
        made.detail = match (self.pod_at(&made.outcome), parts.next(), parts.next()) {
            (Some(pod), _, _) => pod,
            (None, Some(name), Some(namespace)) if !name.is_empty() => format!("{namespace}/{name}"),
            _ => String::new(),
        };
        let Some(cluster) = self.record_cluster() else { return made };
        let count = self.proxy.config.endpoints_of(cluster).map_or(1, |set| set.len());
        if count > 1 {
            made.detail = format!("{}, one of {count}", made.detail);
        }
        made.lost = self.unusable(cluster);
        made
    }

    fn pod_at(&self, address: &str) -> Option<String> {
        let at = address.parse::<std::net::SocketAddr>().ok()?;
        Some(self.world.snapshot.workload_by_ip(at.ip())?.key().to_string())
    }

    /// Endpoints that are not picked while others can be.
    fn unusable(&self, cluster: &Cluster) -> Vec<Lost> {
        let Some(set) = self.proxy.config.endpoints_of(cluster) else { return Vec::new() };
        let known = self.proxy.worker.shared().cluster(&cluster.name).hosts();
        let why = |endpoint: &Endpoint| {
            let host = known.iter().find(|host| host.address == endpoint.address);
            match endpoint.health {
                _ if host.is_some_and(|host| host.is_ejected()) => Some("ejected by outlier detection"),
                Health::Unhealthy => Some("not ready"),
                Health::Degraded => Some("draining or degraded"),
                Health::Healthy => None,
            }
        };
        let lost = |endpoint: &Endpoint| {
            let at = endpoint.address.to_string();
            let pod = self.pod_at(&at).map(|pod| format!(" ({pod})")).unwrap_or_default();
            why(endpoint).map(|why| Lost { what: format!("{at}{pod}"), why: why.to_owned(), because: Vec::new() })
        };
        set.localities.iter().flat_map(|locality| &locality.endpoints).filter_map(lost).collect()
    }

    /// What is under way at a cluster, where the proxy was asked and something is; and whether one
    /// more is too many.
    fn limits(&mut self, cluster: &Cluster) -> Option<Cause> {
        let shared = self.proxy.worker.shared().cluster(&cluster.name);
        let (limits, pending) = (&cluster.limits, self.proxy.pending(&cluster.name));
        let (connections, requests) = (shared.connections.get(), self.proxy.requests(&cluster.name));
        if connections + requests + pending == 0 {
            return None;
        }
        let of = |what: &str, now: u32, most: u32| match most {
            u32::MAX => format!("{now} {what}"),
            most => format!("{now} of {most} {what}"),
        };
        let parts = [
            of("connections", connections, limits.connections_max),
            of("requests", requests, limits.requests_max),
            of("waiting", pending, limits.pending_max),
        ];
        let waits = connections >= limits.connections_max && requests >= connections;
        let overflows = waits && pending >= limits.pending_max;
        let detail = match (overflows, waits) {
            (true, _) => "every connection is busy and no more requests may wait",
            (false, true) => "every connection is busy: the request waits for one",
            (false, false) => "",
        };
        self.decisions.push(Decision {
            stage: "limits",
            outcome: parts.join(", "),
            detail: detail.to_owned(),
            because: reasons::because(&cluster.provenance),
            lost: Vec::new(),
        });
        overflows.then_some(Cause::UpstreamOverflow)
    }

    fn record_cluster(&self) -> Option<&Arc<Cluster>> {
        let decision = self.decisions.iter().rev().find(|decision| decision.stage == "cluster")?;
        self.proxy.config.clusters.get(&decision.outcome)
    }

    /// How the bytes travel.
    fn transport(&mut self, attempt: &Attempt) {
        let version = match attempt.protocol {
            UpstreamProtocol::Http1 => "HTTP/1.1",
            UpstreamProtocol::Http2 => "HTTP/2",
            UpstreamProtocol::Auto => "HTTP/2 or HTTP/1.1",
        };
        let is_tcp = matches!(self.chain.terminal, Terminal::Tcp(_));
        let mut parts = Vec::new();
        if !is_tcp {
            parts.push(version.to_owned());
        }
        let outcome = match &attempt.transport.tls {
            None => "plaintext",
            Some(tls) => {
                if let Some(sni) = &attempt.sni {
                    parts.push(format!("SNI {sni}"));
                }
                let alpn = attempt.alpn.list(&attempt.transport);
                if !alpn.is_empty() {
                    parts.push(format!("ALPN {}", alpn.join(",")));
                }
                if tls.certificate.is_some() { "mutual TLS" } else { "TLS" }
            }
        };
        self.decisions.push(Decision {
            stage: "transport",
            outcome: outcome.to_owned(),
            detail: parts.join(", "),
            because: Vec::new(),
            lost: Vec::new(),
        });
    }

    fn finish(&mut self, next: Next, by_weight: Option<f64>, is_random: bool) -> Run {
        let decisions = std::mem::take(&mut self.decisions);
        let mut key = String::new();
        for decision in &decisions {
            if decision.stage != "endpoint" {
                key.push_str(decision.stage);
                key.push_str(&decision.outcome);
                key.push('\n');
            }
        }
        if let Next::End(end) = &next {
            key.push_str(&end.text);
        }
        Run { decisions, next, key, by_weight, is_random }
    }
}

/// A host that nobody serves: whom the table does serve.
fn virtual_host(decision: &engine::record::Decision, table: Option<&RouteTable>) -> Decision {
    let mut made = Decision { detail: String::new(), ..simple("host", decision) };
    if made.outcome == "none" {
        made.detail = format!("nobody serves {}", decision.detail);
        let hosts = table.map(|table| &*table.virtual_hosts).unwrap_or_default();
        made.lost = hosts
            .iter()
            .map(|host| Lost {
                what: host.name.to_string(),
                why: format!("serves {}", host.domains.join(", ")),
                because: reasons::because(&host.provenance),
            })
            .collect();
    }
    made
}

fn chosen_route(
    decision: &engine::record::Decision,
    found: Option<&Found<'_>>,
    request: Option<(&RequestHead, &Metadata)>,
    again: bool,
) -> Decision {
    let mut made = simple("route", decision);
    made.detail = found.and_then(Found::forward).map(reasons::settings).unwrap_or_default();
    if made.outcome.is_empty() {
        "unnamed".clone_into(&mut made.outcome);
    }
    if again {
        made.detail = [made.detail.as_str(), "chosen anew after a filter ran"]
            .into_iter()
            .filter(|text| !text.is_empty())
            .collect::<Vec<_>>()
            .join(", ");
    }
    if let (Some(found), Some((head, metadata))) = (found, request) {
        made.lost = found.lost(head, metadata);
    }
    made
}

/// `decisions` are the run's, `head` the request as it came.
fn chance(found: &Found<'_>, decisions: &[engine::record::Decision], head: &RequestHead) -> Chance {
    let mut chance = Chance { by_weight: Some(100.0), is_random: false };
    let cluster = decisions.iter().rev().find(|decision| decision.stage == Stage::Cluster);
    if let Some(Target::Weighted { clusters, total }) = found.forward().map(|forward| &forward.target)
        && clusters.iter().filter(|cluster| cluster.weight > 0).count() > 1
    {
        chance.is_random = true;
        // A request that is answered before has no cluster.
        if let Some(decision) = cluster {
            let chosen = clusters.iter().find(|one| *one.name == *decision.outcome);
            chance.take(chosen.and_then(|chosen| percent(chosen.weight, *total)));
        }
    }
    let host = found.host;
    let by_route = found.route.and_then(|route| fault(&host.routes[route].overrides));
    if let Some(fault) = by_route.or_else(|| fault(&host.overrides)) {
        let plans = fault.plans(head);
        chance.is_random |= plans.len() > 1;
        let recorded = decisions.iter().find(|one| one.stage == Stage::Filter && one.outcome.ends_with(": fault"));
        let met = recorded.map_or_else(|| "none".to_owned(), |decision| decision.detail.clone());
        chance.take(plans.iter().find(|(plan, _)| plan.to_string() == met).map(|(_, share)| share * 100.0));
    }
    if host.routes.iter().any(|route| route.matches.fraction.is_some()) {
        chance = Chance { by_weight: None, is_random: true };
    }
    chance
}

fn fault(overrides: &Overrides) -> Option<&Fault> {
    overrides.0.iter().find_map(|(_, setting)| match setting {
        Override::Fault(fault) => Some(&**fault),
        _ => None,
    })
}

fn simple(stage: &'static str, decision: &engine::record::Decision) -> Decision {
    Decision {
        stage,
        outcome: decision.outcome.clone(),
        detail: decision.detail.clone(),
        because: decision.provenance.as_ref().map(|provenance| reasons::because(provenance)).unwrap_or_default(),
        lost: Vec::new(),
    }
}
