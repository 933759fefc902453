//! One connection with one request through one proxy, with one seed, put into words.

use std::sync::Arc;

use engine::chain::{FilterChain, Listener, NoFilterChain, Terminal, select_chain};
use engine::cluster::Cluster;
use engine::exchange::{Attempt, AuthorizeAnswer, Question, Start, UpstreamProtocol};
use engine::facts::{PeerCertificate, TlsFacts, Transport};
use engine::matcher::Metadata;
use engine::record::{Provenance, Record, Stage};
use engine::route::{Override, RouteTable, Target};
use engine::stream::{Stream, StreamStart, StreamStep};
use engine::{Answer, ConnFacts, Exchange, Step};
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
    /// The share that weights give it, in percent.
    pub(crate) by_weight: Option<f64>,
    /// Another seed may go another way.
    pub(crate) is_random: bool,
}

/// What follows.
pub(crate) enum Next {
    Forward { attempt: Box<Attempt>, head: Option<RequestHead> },
    End(End),
}

/// Steps of one request; more is a loop.
const STEPS_MAX: usize = 32;

/// Runs it.
pub(crate) fn run(world: &World<'_>, proxy: &Proxy, listener: &Listener, arrival: &Arrival, seed: u64) -> Run {
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
    let facts = match handshake(&chain, arrival) {
        Ok(facts) => Arc::new(facts),
        Err(why) => {
            let text = format!("the proxy of {} closes the connection: {why}", proxy.name());
            return ended(decisions, End::cause(EndKind::Closed, Cause::DownstreamTlsFailed, text));
        }
    };
    let mut writer = Writer { world, proxy, chain: &chain, decisions, record: Record::default() };
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
fn handshake(chain: &FilterChain, arrival: &Arrival) -> Result<ConnFacts, String> {
    let mut facts = arrival.facts.clone();
    let Some(tls) = &chain.tls else { return Ok(facts) };
    if facts.transport != Transport::Tls {
        return Err("TLS is wanted and plaintext comes".to_owned());
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
    facts.tls = Some(Arc::new(TlsFacts { alpn, version: "TLSv1.3", cipher: "", local_uri_san: None, peer }));
    Ok(facts)
}

struct Writer<'a> {
    world: &'a World<'a>,
    proxy: &'a Proxy,
    chain: &'a Arc<FilterChain>,
    decisions: Vec<Decision>,
    record: Record,
}

fn stream(writer: &mut Writer<'_>, facts: &Arc<ConnFacts>, arrival: &Arrival, seed: u64) -> Run {
    let proxy = writer.proxy;
    let env = proxy.env(writer.world.now);
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
    let mut now = world.now;
    let mut head = sent.clone();
    let mut info = engine::exchange::StreamInfo::default();
    if let Err(cause) = engine::stream::admit(&proxy.env(now), writer.chain, facts, &mut info, &mut writer.record) {
        writer.translate(None);
        let mut end =
            End::cause(EndKind::Closed, cause, format!("the proxy of {} closes the connection", proxy.name()));
        info.details.as_str().clone_into(&mut end.details);
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
            Step::Ask(Question::Resolve { host, .. }) => {
                world.note(format!("{host} is outside of the mesh: {OUTSIDE} stands for its address"));
                Answer::Resolved(Ok(vec![OUTSIDE]))
            }
            Step::Forward(_) | Step::Reply(_) | Step::Respond | Step::Abort(_) => break,
        };
        step = exchange.resume(&proxy.env(now), answer, &mut head, &mut writer.record);
    }
    let choice = writer.translate(Some((sent, &exchange.info().metadata)));
    let next = match step {
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
        let cluster = last(Stage::Cluster).map(|at| decisions[at].outcome.clone());
        self.record.decisions = decisions;
        found.map(|found| chance(&found, cluster.as_deref())).unwrap_or_default()
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
        let at = made.outcome.parse::<std::net::SocketAddr>().ok();
        let workload = at.and_then(|at| self.world.snapshot.workload_by_ip(at.ip()));
        made.detail = match (workload, parts.next(), parts.next()) {
            (Some(workload), _, _) => workload.key().to_string(),
            (None, Some(name), Some(namespace)) if !name.is_empty() => format!("{namespace}/{name}"),
            _ => String::new(),
        };
        let cluster = self.record_cluster();
        let count = cluster.and_then(|cluster| self.proxy.config.endpoints_of(cluster)).map_or(1, |set| set.len());
        if count > 1 {
            made.detail = format!("{}, one of {count}", made.detail);
        }
        made
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

fn chance(found: &Found<'_>, cluster: Option<&str>) -> Chance {
    let mut chance = Chance::default();
    if let Some(forward) = found.forward()
        && let Target::Weighted { clusters, total } = &forward.target
    {
        chance.is_random = clusters.iter().filter(|cluster| cluster.weight > 0).count() > 1;
        let chosen = clusters.iter().find(|one| Some(&*one.name) == cluster);
        chance.by_weight = chosen.filter(|_| chance.is_random).and_then(|chosen| percent(chosen.weight, *total));
    }
    let host = found.host;
    let fault = |overrides: &engine::route::Overrides| {
        overrides.0.iter().any(|(_, setting)| matches!(setting, Override::Fault(_)))
    };
    let by_route = found.route.is_some_and(|route| fault(&host.routes[route].overrides));
    let by_share = host.routes.iter().any(|route| route.matches.fraction.is_some());
    chance.is_random |= by_route || by_share || fault(&host.overrides);
    chance
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
