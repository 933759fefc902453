//! From the caller to whoever answers, proxy by proxy.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use engine::chain::{Listener, listener_for};
use engine::exchange::Attempt;
use engine::facts::Transport;
use engine::tls::SanKind;
use engine::{ConnFacts, Now};
use mesh::{EndpointAddress, Health, MeshSnapshot, Resolution, Service, ServiceAddress, Workload};
use types::wellknown::type_urls;
use types::{Cause, NamespacedName, RequestHead, Version};

use crate::call::{Call, Caller, is_router};
use crate::reasons;
use crate::report::{Decision, End, EndKind, Explanation, Hop, Path, Request, Side};
use crate::run::{Arrival, Next, Run, run};
use crate::running::Running;
use crate::world::{CLIENT, OUTSIDE, Proxy, Source, World};

/// Draws made where something is random and its shares are not known.
const DRAWS: u32 = 1000;
/// Draws made to meet everything whose share is known.
const DRAWS_MAX: u32 = 10_000;
/// Proxies on one way; more is a loop.
const HOPS_MAX: usize = 6;

/// Where `call` would go in the mesh of `snapshot`, and why.
///
/// *Shape*: at least one path; shares add up to 100, most frequent first.
pub fn explain(snapshot: &MeshSnapshot, call: &Call) -> Explanation {
    Explainer::of_objects(snapshot).explain(call)
}

/// [`explain`], with each proxy on the way as it runs now: its own configuration, be it older than
/// the objects, and its own view of hosts.
///
/// *Source*: `ask` gives the proxy of a pod, once for each pod on the way. Where it cannot, the
/// objects stand for it, and a note says so. Names and addresses are the snapshot's.
pub fn explain_running(
    snapshot: &MeshSnapshot,
    call: &Call,
    ask: &dyn Fn(&NamespacedName) -> Result<Running, String>,
) -> Explanation {
    Explainer::of_mesh(snapshot, ask).explain(call)
}

/// Explains several calls in one mesh; each proxy is made once.
pub struct Explainer<'a> {
    world: World<'a>,
}

impl<'a> Explainer<'a> {
    /// With proxies as the objects make them; see [`explain`].
    pub fn of_objects(snapshot: &'a MeshSnapshot) -> Self {
        Self { world: World::new(snapshot, Source::Objects) }
    }

    /// With proxies as they run; see [`explain_running`].
    pub fn of_mesh(snapshot: &'a MeshSnapshot, ask: &'a dyn Fn(&NamespacedName) -> Result<Running, String>) -> Self {
        Self { world: World::new(snapshot, Source::Mesh(ask)) }
    }

    /// Where `call` would go. Notes and findings are those of all calls so far.
    pub fn explain(&self, call: &Call) -> Explanation {
        let world = &self.world;
        let mut paths = Walk { world, snapshot: world.snapshot, now: call.now }.start(call);
        paths.sort_by(|a, b| b.percent.total_cmp(&a.percent));
        let (notes, findings) = world.remarks();
        let from = match &call.from {
            Caller::Workload(key) => key.to_string(),
            Caller::Outside(key) => format!("outside, at {key}"),
        };
        let target = &call.target;
        let line = if &*target.scheme == "tcp" {
            format!("{from}: tcp://{}", target.authority())
        } else {
            format!("{from}: {} {}://{}{}", call.method, target.scheme, target.authority(), target.path)
        };
        Explanation { call: line, notes, paths, findings }
    }
}

struct Walk<'a> {
    world: &'a World<'a>,
    snapshot: &'a MeshSnapshot,
    now: Now,
}

/// A path of one hop less, or of none.
fn only(end: End) -> Vec<Path> {
    vec![Path { percent: 100.0, is_exact: true, hops: Vec::new(), end }]
}

fn has_proxy(workload: &Workload) -> bool {
    workload.is_tls_capable
}

impl Walk<'_> {
    fn start(&self, call: &Call) -> Vec<Path> {
        let (Caller::Workload(key) | Caller::Outside(key)) = &call.from;
        let Some(workload) = self.snapshot.workload(&key.namespace, &key.name) else {
            return only(End::good(EndKind::Closed, format!("there is no pod {key} with an address")));
        };
        if matches!(call.from, Caller::Outside(_)) {
            return self.outside(workload, call);
        }
        let dest = self.resolve(workload, call);
        if has_proxy(workload) {
            return self.outbound(workload, &dest, call);
        }
        let from = SocketAddr::new(workload.ips.first().copied().unwrap_or(CLIENT.ip()), CLIENT.port());
        let (address, named) = match dest {
            Dialled::Service { service, port, address } => match self.ready_endpoint(&service, port) {
                Some(found) => found,
                None => {
                    let text = format!("nothing listens behind {address}: the Service has no ready endpoint");
                    return only(End::good(EndKind::Closed, text));
                }
            },
            Dialled::Address(address) => (address, String::new()),
        };
        let hop = Hop {
            proxy: key.to_string(),
            side: Side::Unproxied,
            decisions: vec![Decision {
                stage: "endpoint",
                outcome: address.to_string(),
                detail: named,
                ..Decision::default()
            }],
            request: call.head().as_ref().map(Request::of),
        };
        let arrival =
            Arrival { facts: client_facts("", address, from, call, (true, true)), identity: None, head: call.head() };
        let rest = self.arrive(address, arrival, 1);
        prefixed(&hop, rest, 100.0, true)
    }

    fn outside(&self, workload: &Arc<Workload>, call: &Call) -> Vec<Path> {
        let proxy = self.world.proxy(workload, self.now);
        let mut services = self.snapshot.services().iter().filter(|service| {
            service.namespace == workload.namespace
                && service.selector.as_ref().is_some_and(|selector| selector.matches(&workload.labels))
        });
        let port = services
            .find_map(|service| mesh::target_number(&service.port(call.target.port)?.target, workload))
            .unwrap_or(call.target.port);
        let address = SocketAddr::new(proxy.ip(), port);
        let Some(listener) = listener_for(&proxy.config, address).cloned() else {
            let ports: Vec<String> = proxy.config.listeners.iter().map(|(_, l)| l.address.port().to_string()).collect();
            let ports = if ports.is_empty() { "none".to_owned() } else { ports.join(", ") };
            let text = format!("the gateway {} does not listen on port {port}; it listens on: {ports}", proxy.name());
            // Nobody answers: no proxy has a flag or a log line for it.
            return only(End::good(EndKind::Closed, text));
        };
        let client = SocketAddr::new(call.client.unwrap_or(CLIENT.ip()), CLIENT.port());
        let facts = client_facts(&listener.name, address, client, call, looks(&listener, port));
        let arrival = Arrival { facts, identity: None, head: call.head() };
        self.hop(Side::Gateway, &proxy, &listener, &arrival, &[], 0)
    }

    fn outbound(&self, workload: &Arc<Workload>, dest: &Dialled, call: &Call) -> Vec<Path> {
        let proxy = self.world.proxy(workload, self.now);
        let dest = match dest {
            Dialled::Service { address, .. } | Dialled::Address(address) => *address,
        };
        let named = |name: &str| proxy.config.listeners.get(name).cloned();
        let Some(listener) = listener_for(&proxy.config, dest).cloned().or_else(|| named("virtualOutbound")) else {
            return only(End::good(EndKind::Closed, format!("the proxy of {} has no listener", proxy.name())));
        };
        let from = SocketAddr::new(proxy.ip(), CLIENT.port());
        let mut facts = client_facts(&listener.name, dest, from, call, looks(&listener, dest.port()));
        facts.original_destination = Some(dest);
        // TLS of the application's own hides the request from the proxy.
        let head = if call.target.is_http() { call.head() } else { None };
        self.hop(Side::Outbound, &proxy, &listener, &Arrival { facts, identity: None, head }, &[], 0)
    }

    /// One proxy: every way it may go, and what follows each.
    fn hop(
        &self,
        side: Side,
        proxy: &Rc<Proxy>,
        listener: &Arc<Listener>,
        arrival: &Arrival,
        first: &[Decision],
        depth: usize,
    ) -> Vec<Path> {
        let mut groups: Vec<(u32, Run)> = Vec::new();
        let known = |groups: &[(u32, Run)]| -> Option<f64> { groups.iter().map(|(_, run)| run.by_weight).sum() };
        let is_whole = |groups: &[(u32, Run)]| known(groups).is_some_and(|sum| (sum - 100.0).abs() < 1e-6);
        for draw in 0..DRAWS_MAX {
            let made = run(self.world, proxy, listener, arrival, (self.now, u64::from(draw) + 1));
            let random = made.is_random;
            match groups.iter_mut().find(|(_, known)| known.key == made.key) {
                Some((count, _)) => *count += 1,
                None => groups.push((1, made)),
            }
            let is_enough = if draw >= DRAWS { known(&groups).is_none() } else { !random && groups.len() == 1 };
            if is_enough || (random && is_whole(&groups)) {
                break;
            }
        }
        let drawn: u32 = groups.iter().map(|(count, _)| count).sum();
        let by_weight = is_whole(&groups);
        let is_single = groups.len() == 1;
        let mut paths = Vec::new();
        for (count, made) in groups {
            let counted = f64::from(count) * 100.0 / f64::from(drawn);
            let percent = made.by_weight.filter(|_| by_weight).unwrap_or(counted);
            let mut decisions = self.state(proxy, &made.decisions);
            decisions.extend_from_slice(first);
            decisions.extend(made.decisions);
            let request = match &made.next {
                Next::Forward { head: Some(head), .. } => Some(Request::of(head)),
                _ => None,
            };
            let hop = Hop { proxy: proxy.name(), side, decisions, request };
            let rest = match made.next {
                Next::End(end) => only(end),
                Next::Forward { attempt, head } => self.forwarded(side, proxy, &attempt, head, arrival, depth),
            };
            paths.extend(prefixed(&hop, rest, percent, by_weight || is_single));
        }
        paths
    }

    /// What is not as it should be with a running proxy, as far as it matters for these decisions.
    fn state(&self, proxy: &Proxy, decisions: &[Decision]) -> Vec<Decision> {
        let mut made = Vec::new();
        let mut say = |outcome: &str, detail: String| {
            made.push(Decision { stage: "state", outcome: outcome.to_owned(), detail, ..Decision::default() });
        };
        if proxy.is_draining() {
            say("draining", "it finishes what it has and takes no new connections".to_owned());
        }
        let used: Vec<(&'static str, String)> = decisions
            .iter()
            .flat_map(|decision| {
                let name = || decision.outcome.clone();
                match decision.stage {
                    "listener" => vec![(type_urls::LISTENER, name())],
                    "routes" => vec![(type_urls::ROUTE, name())],
                    "cluster" => {
                        let known = proxy.config.clusters.get(&decision.outcome);
                        let endpoints = known.and_then(|cluster| cluster.endpoints_key()).map(ToString::to_string);
                        [(type_urls::CLUSTER, name())]
                            .into_iter()
                            .chain(endpoints.map(|key| (type_urls::ENDPOINT, key)))
                            .collect()
                    }
                    _ => Vec::new(),
                }
            })
            .collect();
        let behind = self.world.behind(proxy, &used);
        if !behind.is_empty() {
            say("behind", format!("it does not run what the objects say: {}", behind.join(", ")));
        }
        made
    }

    /// What becomes of an attempt.
    fn forwarded(
        &self,
        side: Side,
        proxy: &Rc<Proxy>,
        attempt: &Attempt,
        head: Option<RequestHead>,
        arrival: &Arrival,
        depth: usize,
    ) -> Vec<Path> {
        let host = &attempt.picked.host.address;
        let Some(address) = host.ip() else {
            return only(End::good(EndKind::Left, format!("it goes to the socket {host}")));
        };
        if side == Side::Inbound && (attempt.cluster.name.starts_with("inbound|") || address.ip() == proxy.ip()) {
            let text = format!("the application in {} gets it on port {}", proxy.name(), address.port());
            return only(End::good(EndKind::Delivered, text));
        }
        if depth >= HOPS_MAX {
            return only(End::good(EndKind::Left, format!("more than {HOPS_MAX} proxies on the way: a loop")));
        }
        let from = SocketAddr::new(proxy.ip(), CLIENT.port());
        let mut facts = ConnFacts::plaintext("", address, from);
        let mut identity = None;
        match &attempt.transport.tls {
            Some(tls) => {
                let mut secrets = Vec::new();
                tls.secrets(&mut secrets);
                if let Some(missing) = proxy.missing_secret(&secrets) {
                    let text = format!("the proxy of {} does not have the secret {missing}", proxy.name());
                    return only(End::cause(EndKind::Closed, Cause::UpstreamTlsFailed, text));
                }
                facts.transport = Transport::Tls;
                facts.server_name = attempt.sni.as_deref().map(Into::into);
                facts.protocols = attempt.alpn.list(&attempt.transport).to_vec();
                identity = proxy.identity.clone().filter(|_| tls.certificate.is_some());
                let target = self.snapshot.workload_by_ip(address.ip());
                if let Some(why) = target.and_then(|target| self.refuses_server(attempt, target)) {
                    let text = format!("the proxy of {} gives the handshake up: {why}", proxy.name());
                    return only(End::cause(EndKind::Closed, Cause::UpstreamTlsFailed, text));
                }
            }
            // Bytes that are TLS of the client's own stay so.
            None if head.is_none() && arrival.facts.tls.is_none() => {
                facts.transport = arrival.facts.transport;
                facts.server_name.clone_from(&arrival.facts.server_name);
                facts.protocols.clone_from(&arrival.facts.protocols);
            }
            None => {}
        }
        if let (Some(head), None) = (&head, &attempt.transport.tls) {
            facts.protocols = vec![if head.version == Version::Http2 { "h2c" } else { "http/1.1" }.into()];
        }
        let had_request = head.is_some();
        let mut paths = self.arrive(address, Arrival { facts, identity, head }, depth + 1);
        for path in &mut paths {
            if path.hops.len() <= 1 {
                seen_by_caller(&mut path.end, had_request);
            }
        }
        paths
    }

    /// Why the caller does not trust who answers at an endpoint.
    fn refuses_server(&self, attempt: &Attempt, target: &Workload) -> Option<String> {
        let tls = attempt.transport.tls.as_ref()?;
        let matchers = &tls.validation.san_matchers;
        let identity = self.world.identity(target)?.to_string();
        let fits = matchers
            .iter()
            .any(|san| matches!(san.kind, SanKind::Uri | SanKind::Any) && san.matcher.matches(identity.as_bytes()));
        let is_mesh = tls.certificate.is_some() && has_proxy(target);
        (is_mesh && !matchers.is_empty() && !fits)
            .then(|| format!("{} is {identity}, which is none of the names that are accepted", target.key()))
    }

    /// A connection reaches an address.
    fn arrive(&self, address: SocketAddr, mut arrival: Arrival, depth: usize) -> Vec<Path> {
        let Some(workload) = self.snapshot.workload_by_ip(address.ip()).cloned() else {
            return only(End::good(EndKind::Left, format!("it leaves the mesh to {address}")));
        };
        let is_gateway = is_router(self.snapshot, &workload);
        if !is_gateway && !has_proxy(&workload) {
            if arrival.identity.is_some() {
                let text = format!("{} has no proxy and does not understand mesh TLS", workload.key());
                return only(End::cause(EndKind::Closed, Cause::UpstreamTlsFailed, text));
            }
            let text =
                format!("the application in {} gets it on port {}; it has no proxy", workload.key(), address.port());
            return only(End::good(EndKind::Delivered, text));
        }
        let proxy = self.world.proxy(&workload, self.now);
        if is_gateway {
            let Some(listener) = listener_for(&proxy.config, address).cloned() else {
                let text = format!("the gateway {} does not listen on port {}", proxy.name(), address.port());
                return only(End::cause(EndKind::Closed, Cause::ConnectFailed, text));
            };
            arrival.facts.listener = Arc::clone(&listener.name);
            return self.hop(Side::Gateway, &proxy, &listener, &arrival, &[], depth);
        }
        let Some(listener) = proxy.config.listeners.get("virtualInbound").cloned() else {
            return only(End::good(EndKind::Closed, format!("the proxy of {} has no inbound listener", proxy.name())));
        };
        arrival.facts.listener = Arc::clone(&listener.name);
        arrival.facts.original_destination = Some(address);
        inspect(&listener, address.port(), &mut arrival);
        let first = [self.mtls(&workload, address.port(), &arrival)];
        self.hop(Side::Inbound, &proxy, &listener, &arrival, &first, depth)
    }

    fn mtls(&self, workload: &Workload, port: u16, arrival: &Arrival) -> Decision {
        let policy = self.snapshot.mtls_policy(&workload.namespace, &workload.labels);
        let detail = match (&arrival.identity, arrival.facts.transport) {
            (Some(identity), _) => format!("the caller is {identity}"),
            (None, Transport::Tls) => "the caller brings TLS of its own".to_owned(),
            (None, Transport::Raw) => "the caller comes in plaintext".to_owned(),
        };
        Decision {
            stage: "mtls",
            outcome: format!("{:?}", policy.port(port)).to_uppercase(),
            detail,
            because: policy.from.iter().map(reasons::whole).collect(),
            lost: Vec::new(),
        }
    }

    // --- names ---

    fn resolve(&self, workload: &Workload, call: &Call) -> Dialled {
        let target = &call.target;
        if let Ok(ip) = target.host.parse::<IpAddr>() {
            let service =
                self.snapshot.services().iter().find(|service| service.addresses.contains(&ServiceAddress::Ip(ip)));
            return match service {
                Some(service) => Dialled::Service {
                    service: Arc::clone(service),
                    port: target.port,
                    address: SocketAddr::new(ip, target.port),
                },
                None => Dialled::Address(SocketAddr::new(ip, target.port)),
            };
        }
        let Some(service) = self.service(&workload.namespace, &target.host) else {
            self.world.note(format!("{} is no host of the mesh: {OUTSIDE} stands for its address", target.host));
            return Dialled::Address(SocketAddr::new(OUTSIDE, target.port));
        };
        if service.port(target.port).is_none() {
            let ports: Vec<String> = service.ports.iter().map(|port| port.number.to_string()).collect();
            self.world.note(format!("{} has no port {}; it has {}", service.object, target.port, ports.join(", ")));
        }
        let ip = service.addresses_for(has_proxy(workload)).iter().find_map(|address| match address {
            ServiceAddress::Ip(ip) => Some(*ip),
            ServiceAddress::Range(range) => range.hosts().next(),
        });
        let dialled = |ip| Dialled::Service {
            service: Arc::clone(&service),
            port: target.port,
            address: SocketAddr::new(ip, target.port),
        };
        if let Some(ip) = ip {
            return dialled(ip);
        }
        if service.is_headless || service.resolution == Resolution::Original {
            if let Some((address, _)) = self.ready_endpoint(&service, target.port) {
                return dialled(address.ip());
            }
            self.world
                .note(format!("{} has no address and no ready endpoint: {OUTSIDE} stands for one", service.object));
        } else {
            self.world.note(format!("{} has no address of its own: {OUTSIDE} stands for one", service.object));
        }
        dialled(OUTSIDE)
    }

    /// The service that a name means to a pod of `namespace`, by the search list of its resolver.
    fn service(&self, namespace: &str, host: &str) -> Option<Arc<Service>> {
        let domain = self.snapshot.domain();
        let host = host.trim_end_matches('.');
        let names = [
            format!("{host}.{namespace}.svc.{domain}"),
            format!("{host}.svc.{domain}"),
            format!("{host}.{domain}"),
            host.to_owned(),
        ];
        names.iter().find_map(|name| {
            let target = self.snapshot.resolve_alias(name);
            self.snapshot.services_of_host(target).first().cloned()
        })
    }

    fn ready_endpoint(&self, service: &Service, port: u16) -> Option<(SocketAddr, String)> {
        let set = self.snapshot.endpoints(&service.key());
        let found = set.port(port).iter().find(|endpoint| endpoint.health != Health::NotReady)?;
        let EndpointAddress::Ip(ip) = &found.address else { return None };
        let name = found.workload.as_ref().map(|workload| workload.key().to_string()).unwrap_or_default();
        Some((SocketAddr::new(*ip, found.port), name))
    }
}

/// A connection as an application opens it; `looks` says whether TLS and HTTP are looked for.
fn client_facts(listener: &str, local: SocketAddr, peer: SocketAddr, call: &Call, looks: (bool, bool)) -> ConnFacts {
    let mut facts = ConnFacts::plaintext(listener, local, peer);
    match &*call.target.scheme {
        "https" if looks.0 => {
            facts.transport = Transport::Tls;
            facts.server_name = call.server_name().map(Into::into);
            facts.protocols = vec!["h2".into(), "http/1.1".into()];
        }
        "http" if looks.1 => facts.protocols = vec![if call.is_http2 { "h2c" } else { "http/1.1" }.into()],
        _ => {}
    }
    facts
}

/// What an application dials.
enum Dialled {
    Service { service: Arc<Service>, port: u16, address: SocketAddr },
    Address(SocketAddr),
}

fn looks(listener: &Listener, port: u16) -> (bool, bool) {
    let runs = |inspector: &Option<engine::chain::Inspector>| {
        inspector.as_ref().is_some_and(|inspector| inspector.runs_on(port))
    };
    (runs(&listener.filters.tls_inspector), runs(&listener.filters.http_inspector))
}

/// Leaves of an arrival what the listener's inspectors see on this port: TLS that nobody looks for is bytes.
fn inspect(listener: &Listener, port: u16, arrival: &mut Arrival) {
    let (tls, http) = looks(listener, port);
    let facts = &mut arrival.facts;
    if facts.transport == Transport::Tls && !tls {
        facts.transport = Transport::Raw;
        facts.server_name = None;
        facts.protocols.clear();
        arrival.head = None;
    } else if facts.transport == Transport::Raw && !http {
        facts.protocols.clear();
    }
}

fn prefixed(hop: &Hop, rest: Vec<Path>, percent: f64, is_exact: bool) -> Vec<Path> {
    rest.into_iter()
        .map(|mut path| {
            path.hops.insert(0, hop.clone());
            path.percent = path.percent * percent / 100.0;
            path.is_exact &= is_exact;
            path
        })
        .collect()
}

/// A connection that the other side closes is an answer of the caller's proxy to the caller.
fn seen_by_caller(end: &mut End, had_request: bool) {
    let seen = match end.cause {
        Some(Cause::NoFilterChain | Cause::RbacDeniedConnection) if end.kind == EndKind::Closed => {
            Cause::UpstreamClosed
        }
        Some(Cause::DownstreamTlsFailed) => Cause::UpstreamTlsFailed,
        // A handshake that is answered in plaintext fails, too.
        Some(Cause::BadRequest) if end.kind == EndKind::Closed => Cause::UpstreamTlsFailed,
        Some(Cause::UpstreamTlsFailed | Cause::ConnectFailed) if end.kind == EndKind::Closed => {
            if had_request {
                end.text.push_str("; the caller gets 503");
            }
            return;
        }
        _ => return,
    };
    if had_request {
        let surface = seen.surface();
        end.status = Some(surface.status);
        end.text = format!("{}; the caller gets {} ({})", end.text, surface.status, surface.flag);
    }
}
