//! What a request or connection leaves behind: metrics, a log line, spans. Written once, on every
//! way out.

mod peers;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use engine::access_log::AccessLog;
use engine::chain::{Direction, FilterChain, Listener, Terminal};
use engine::config::Name;
use engine::exchange::{Details, StreamInfo};
use engine::facts::{ConnFacts, Now};
use engine::hcm::{GrpcStats, Hcm};
use engine::shared::{GRPC_METHODS_MAX, GrpcTally, SharedCluster};
use telemetry::log::LineSink;
use telemetry::metrics::{Counter, Destination, Flags, Protocol, Reporter, RequestSample, Security, Series, SeriesKey};
use telemetry::peer::Peer;
use types::{Cause, Fields, RequestHead, ResponseHead, Version};

use crate::accept::Conn;
use crate::shared::Shared;
use crate::tracing_spans::{Finishing, RequestTrace};
use crate::upstream::Endpoints;
use crate::worker::Worker;
use peers::Peers;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The response was passed on whole.
    Complete,
    /// It was not.
    Broken,
}

/// Bytes and messages of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
    pub(crate) request_messages: u64,
    pub(crate) response_messages: u64,
    pub(crate) grpc_status: Option<u32>,
}

/// One worker's recorders.
pub(crate) struct Telemetry {
    pub(crate) peers: Peers,
    services: RefCell<Services>,
    methods: RefCell<Methods>,
    logs: RefCell<HashMap<Box<str>, Batch>>,
    sinks: Arc<crate::shared::Sinks>,
    secrets: crate::secrets::Secrets,
}

/// Methods of gRPC that this worker has met, by cluster and path.
#[derive(Default)]
struct Methods {
    by_cluster: HashMap<Name, ClusterMethods>,
}

struct ClusterMethods {
    /// Not kept alive: a cluster that is gone is forgotten.
    shared: Weak<SharedCluster>,
    by_path: HashMap<Box<str>, Arc<GrpcTally>>,
    /// No more are told apart: nobody needs to ask again.
    is_full: bool,
}

/// Longer paths are not kept: clients choose them.
const METHOD_PATH_MAX: usize = 256;

impl Methods {
    fn of(&mut self, shared: &Arc<SharedCluster>, dots: bool, call: (&str, &str, &str)) -> Option<Arc<GrpcTally>> {
        let (path, service, method) = call;
        if !self
            .by_cluster
            .get(&shared.name)
            .is_some_and(|known| std::ptr::eq(known.shared.as_ptr(), Arc::as_ptr(shared)))
        {
            // those of clusters that are gone go with them
            self.by_cluster.retain(|_, known| known.shared.strong_count() > 0);
            let new = ClusterMethods { shared: Arc::downgrade(shared), by_path: HashMap::new(), is_full: false };
            self.by_cluster.insert(Name::clone(&shared.name), new);
        }
        let known = self.by_cluster.get_mut(&shared.name)?;
        if let Some(found) = known.by_path.get(path) {
            return Some(Arc::clone(found));
        }
        if known.is_full || known.by_path.len() >= GRPC_METHODS_MAX || path.len() > METHOD_PATH_MAX {
            return None;
        }
        let made = if dots {
            shared.grpc.method(&service.replace('.', "_"), method)
        } else {
            shared.grpc.method(service, method)
        };
        match &made {
            Some(tally) => drop(known.by_path.insert(path.into(), Arc::clone(tally))),
            None => known.is_full = true,
        }
        made
    }
}

/// Services by host; a host has more than one entry only where names differ.
#[derive(Default)]
struct Services {
    by_host: HashMap<Box<str>, Vec<Arc<Destination>>>,
    count: usize,
}

struct Batch {
    sink: LineSink,
    lines: Vec<u8>,
}

/// A batch is handed over at this size, or at the next tick.
const BATCH_BYTES: usize = 16 * 1024;
/// Services and hosts remembered for labels.
const SERVICES_MAX: usize = 4096;

impl Telemetry {
    pub(crate) fn new(shared: &Shared) -> Self {
        Self {
            peers: Peers::new(Arc::clone(&shared.own_peer)),
            services: RefCell::default(),
            methods: RefCell::default(),
            logs: RefCell::default(),
            sinks: Arc::clone(&shared.sinks),
            secrets: shared.secrets.clone(),
        }
    }

    /// Hands all batches over.
    pub(crate) fn flush(&self) {
        #[expect(clippy::iter_over_hash_type, reason = "each file is by itself")]
        for batch in self.logs.borrow_mut().values_mut() {
            batch.sink.write(std::mem::take(&mut batch.lines));
        }
    }

    /// Adds whole lines for a file.
    pub(crate) fn log(&self, path: &str, write: impl FnOnce(&mut Vec<u8>)) {
        let mut logs = self.logs.borrow_mut();
        if !logs.contains_key(path) {
            let Some(sink) = self.sinks.open(path) else { return };
            logs.insert(path.into(), Batch { sink, lines: Vec::new() });
        }
        let Some(batch) = logs.get_mut(path) else { return };
        write(&mut batch.lines);
        if batch.lines.len() >= BATCH_BYTES {
            batch.sink.write(std::mem::take(&mut batch.lines));
        }
    }

    fn service(&self, host: &str, name: &str, namespace: &str) -> Arc<Destination> {
        let mut services = self.services.borrow_mut();
        let same = |known: &&Arc<Destination>| *known.name == *name && *known.namespace == *namespace;
        if let Some(found) = services.by_host.get(host).and_then(|known| known.iter().find(same)) {
            return Arc::clone(found);
        }
        if services.count >= SERVICES_MAX {
            *services = Services::default();
        }
        services.count += 1;
        let made = Arc::new(Destination { service: host.into(), name: name.into(), namespace: namespace.into() });
        services.by_host.entry(host.into()).or_default().push(Arc::clone(&made));
        made
    }

    /// A connection that reached no chain.
    pub(crate) fn connection_refused(&self, worker: &Worker, listener: &Listener, facts: &ConnFacts, cause: Cause) {
        let mut info = StreamInfo::default();
        info.causes.push(cause);
        info.details = Details::Static(cause.surface().details);
        crate::access::connection(self, worker, &listener.access_log, (facts, ""), &info);
    }

    /// A connection of a chain that was closed before it carried anything.
    pub(crate) fn connection_closed(&self, worker: &Worker, conn: &Conn, info: &StreamInfo, cause: Cause) {
        let mut marked = StreamInfo {
            details: info.details.clone(),
            termination: info.termination.clone(),
            ..StreamInfo::default()
        };
        marked.causes.clone_from(&info.causes);
        if !marked.causes.contains(&cause) {
            marked.causes.push(cause);
        }
        crate::access::connection(self, worker, logs_of(&conn.chain), (&conn.facts, &conn.chain.name), &marked);
    }

    /// A connection whose handshake failed, in the words of its listener's log and, as one that was closed before it
    /// carried anything, of its chain's. The flag is `-`, as Envoy's is; the details tell why.
    pub(crate) fn handshake_failed(
        &self,
        worker: &Worker,
        listener: &Listener,
        chain: &FilterChain,
        facts: &ConnFacts,
        reason: &str,
    ) {
        let cause = Cause::DownstreamTlsFailed;
        let reason = one_word(reason);
        let mut info = StreamInfo::default();
        info.causes.push(cause);
        info.details = Details::Owned(format!("{}{{{reason}}}", cause.surface().details).into());
        let (counts, ended, upstream) = (Counts::default(), Ended::now(worker), Endpoints::default());
        let line = crate::access::Line {
            facts,
            chain: &chain.name,
            head: None,
            response: None,
            trailers: None,
            info: &info,
            counts: &counts,
            ended: &ended,
            upstream: &upstream,
            connection_id: worker.next_connection_id(),
            downstream_failure: &reason,
        };
        for logs in [&listener.access_log[..], logs_of(chain)] {
            crate::access::write(self, logs, &line);
        }
    }

    /// Bytes that never became a request.
    pub(crate) fn malformed(&self, worker: &Worker, conn: &Conn, cause: Cause, status: u16) {
        let mut info = StreamInfo::default();
        info.causes.push(cause);
        info.details = Details::Static(cause.surface().details);
        let response = ResponseHead::new(status);
        let head = RequestHead::default();
        let ended = Ended::now(worker);
        if let Terminal::Http(hcm) = &conn.chain.terminal {
            let line = crate::access::Line {
                facts: &conn.facts,
                chain: &conn.chain.name,
                head: Some(&head),
                response: Some(&response),
                trailers: None,
                info: &info,
                counts: &Counts::default(),
                ended: &ended,
                upstream: &Endpoints::default(),
                connection_id: conn.id,
                downstream_failure: "",
            };
            crate::access::write(self, &hcm.access_log, &line);
        }
        let key = SeriesKey {
            service: self.service("unknown", "unknown", "unknown"),
            response_code: status,
            ..self.key(Protocol::Http, conn, &info, "")
        };
        worker.recorder.series(key).request(&RequestSample { duration: Duration::ZERO, ..RequestSample::default() });
        if let Some(manager) = &conn.state.manager {
            manager.begun();
            manager.ended(status);
        }
    }

    fn source(&self, conn: &Conn, info: &StreamInfo) -> Arc<Peer> {
        match reporter(conn) {
            // we proved who we are where the server had to
            Reporter::Source if peers::server_principal(info).is_empty() => self.peers.own(),
            Reporter::Source => {
                let store = self.secrets.load();
                let own = store.workload.as_ref().and_then(|identity| identity.facts.uris.first());
                self.peers.own_with_principal(own.map(|uri| &**uri))
            }
            Reporter::Destination => {
                self.peers.of_header(info.downstream_peer.as_deref(), conn.facts.peer_identity_text().as_deref())
            }
        }
    }

    fn destination(&self, conn: &Conn, info: &StreamInfo) -> Arc<Peer> {
        match reporter(conn) {
            Reporter::Destination => self.peers.own_with_principal(local_principal(&conn.facts)),
            Reporter::Source => self.peers.of_endpoint(info),
        }
    }

    /// The service a request or connection was for. `host` stands in for a service that nobody names, if it may:
    /// a client's word makes no series of a gateway or a server.
    ///
    /// *Source*: Istio, "Istio Standard Metrics" (`destination_service`); Istio's `istio_stats` for the names of the routes that stand for
    /// hosts which no service has.
    fn service_of(&self, conn: &Conn, info: &StreamInfo, host: &str) -> Arc<Destination> {
        let own = self.peers.own();
        let fallback = match host {
            "" if reporter(conn) == Reporter::Destination => &*own.canonical_service,
            "" => "unknown",
            host => host,
        };
        match info.route_name.as_deref() {
            Some("block_all") => return self.service(fallback, "BlackHoleCluster", "unknown"),
            Some("allow_any") => return self.service(fallback, "PassthroughCluster", "unknown"),
            _ => {}
        }
        if let Some(service) = info.cluster.as_ref().and_then(|cluster| cluster.services.first()) {
            return self.service(&service.host, &service.name, &service.namespace);
        }
        let cluster = info.cluster.as_ref().map(|cluster| &*cluster.name).or(info.cluster_name.as_deref());
        match cluster {
            Some(name @ ("PassthroughCluster" | "BlackHoleCluster" | "InboundPassthroughCluster")) => {
                self.service(fallback, name, "unknown")
            }
            Some(name) => match name.parse::<types::ClusterName>() {
                Ok(types::ClusterName::Outbound { host, .. }) => {
                    let host = host.to_string();
                    let mut parts = host.split('.');
                    let (short, namespace) = (parts.next().unwrap_or_default(), parts.next().unwrap_or("unknown"));
                    if host.ends_with(".svc.cluster.local") {
                        self.service(&host, short, namespace)
                    } else {
                        self.service(&host, &host, "unknown")
                    }
                }
                _ => self.service(fallback, &own.canonical_service, &own.namespace),
            },
            None if reporter(conn) == Reporter::Destination => self.service(fallback, fallback, &own.namespace),
            None => self.service(fallback, fallback, "unknown"),
        }
    }

    /// What tells series apart before anything is answered.
    fn key(&self, protocol: Protocol, conn: &Conn, info: &StreamInfo, host: &str) -> SeriesKey {
        SeriesKey {
            reporter: reporter(conn),
            protocol,
            security: security(conn),
            source: self.source(conn, info),
            destination: self.destination(conn, info),
            service: self.service_of(conn, info, host),
            response_code: 0,
            grpc_status: None,
            flags: flags(info),
        }
    }

    /// Counts a call of gRPC.
    fn count_grpc(&self, worker: &Worker, stats: &GrpcStats, head: &RequestHead, info: &StreamInfo, counts: &Counts) {
        let Some(cluster) = &info.cluster else { return };
        let sent = head.fields.get_str("x-envoy-original-path");
        let Some(path) = sent.or_else(|| std::str::from_utf8(head.path()).ok()) else { return };
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else { return };
        if service.is_empty() || method.is_empty() || method.contains('/') {
            return;
        }
        let shared = worker.engine.counters(&cluster.name);
        let ended = |tally: &GrpcTally| {
            tally.ended(counts.grpc_status, counts.request_messages, counts.response_messages);
        };
        if !stats.tells_apart(service, method) {
            return ended(shared.grpc.all());
        }
        let mut methods = self.methods.borrow_mut();
        match methods.of(&shared, stats.replaces_dots, (path, service, method)) {
            Some(tally) => ended(&tally),
            None => {
                worker.recorder.count(Counter::GrpcMethodsOverflow);
                ended(shared.grpc.all());
            }
        }
    }

    /// The series of a connection of bytes.
    pub(crate) fn tcp_series(&self, worker: &Worker, conn: &Conn, info: &StreamInfo) -> Arc<Series> {
        worker.recorder.series(self.key(Protocol::Tcp, conn, info, ""))
    }
}

/// The logs of what a chain carries.
fn logs_of(chain: &FilterChain) -> &[Arc<AccessLog>] {
    match &chain.terminal {
        Terminal::Http(hcm) => &hcm.access_log,
        Terminal::Tcp(tcp) => &tcp.access_log,
    }
}

/// The longest reason that a line tells.
const REASON_MAX: usize = 200;

/// A reason as one word of a line, whatever a peer made of it.
fn one_word(reason: &str) -> String {
    let plain = |c: char| if c.is_control() || c.is_whitespace() || matches!(c, '"' | '{' | '}') { '_' } else { c };
    reason.chars().take(REASON_MAX).map(plain).collect()
}

/// The host that stands in for a service in metrics; empty where the chain's metrics may not take it.
fn fallback_host<'a>(hcm: &Hcm, head: &'a RequestHead) -> &'a str {
    if hcm.stats().is_some_and(|stats| stats.disable_host_header_fallback) { "" } else { head.authority_str() }
}

fn reporter(conn: &Conn) -> Reporter {
    if conn.state.direction == Direction::Inbound && !conn.state.is_gateway {
        Reporter::Destination
    } else {
        Reporter::Source
    }
}

fn security(conn: &Conn) -> Security {
    match reporter(conn) {
        Reporter::Source => Security::Unknown,
        Reporter::Destination if conn.facts.peer_certificate().is_some() => Security::MutualTls,
        Reporter::Destination => Security::None,
    }
}

/// Our own, when the connection proves it.
fn local_principal(facts: &ConnFacts) -> Option<&str> {
    let tls = facts.tls.as_ref()?;
    tls.peer.as_ref()?;
    tls.local_uri_san.as_deref()
}

/// Response flags of what marked a request.
pub(crate) fn flags(info: &StreamInfo) -> Flags {
    let mut marks = info.causes.iter().map(|cause| cause.surface().flag).filter(|flag| *flag != "-");
    match (marks.next(), marks.next()) {
        (None, _) => Flags::One("-"),
        (Some(one), None) => Flags::One(one),
        (Some(one), Some(two)) => {
            let mut all = vec![one];
            for mark in std::iter::once(two).chain(marks) {
                if !all.contains(&mark) {
                    all.push(mark);
                }
            }
            if all.len() == 1 { Flags::One(one) } else { Flags::Many(all.join(",").into()) }
        }
    }
}

/// The times of something that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) start: Now,
    pub(crate) end: Now,
    /// The request was on its way to the upstream.
    pub(crate) sent: Option<std::time::Instant>,
    /// The response head arrived.
    pub(crate) head: Option<std::time::Instant>,
}

impl Ended {
    /// From start to end.
    pub(crate) fn duration(&self) -> Duration {
        self.end.mono.saturating_duration_since(self.start.mono)
    }

    pub(crate) fn now(worker: &Worker) -> Self {
        let now = worker.now();
        Self { start: now, end: now, sent: None, head: None }
    }
}

/// One request's record while it runs.
pub(crate) struct RequestLog {
    start: Now,
    chain: Arc<FilterChain>,
    upstream: Endpoints,
    upstream_version: Version,
    sent: Option<std::time::Instant>,
    head: Option<std::time::Instant>,
    status: u16,
    ending: Option<Ending>,
    messages: Messages,
    tracing: RequestTrace,
}

/// gRPC messages of a request that its series has.
#[derive(Default)]
struct Messages {
    series: Option<Arc<Series>>,
    request: u64,
    response: u64,
}

impl RequestLog {
    /// Begins with what the engine knows after its first step.
    pub(crate) fn start(
        start: Now,
        chain: &Arc<FilterChain>,
        head: &mut RequestHead,
        info: &StreamInfo,
        seed: u64,
    ) -> Self {
        let tracing = match &chain.terminal {
            Terminal::Http(hcm) => RequestTrace::start(hcm, head, info, seed),
            Terminal::Tcp(_) => RequestTrace::default(),
        };
        Self {
            start,
            chain: Arc::clone(chain),
            upstream: Endpoints::default(),
            upstream_version: Version::default(),
            sent: None,
            head: None,
            status: 0,
            ending: None,
            messages: Messages::default(),
            tracing,
        }
    }

    /// The request goes to an upstream.
    pub(crate) fn sent(&mut self, upstream: &Endpoints, version: Version, now: std::time::Instant) {
        self.upstream = upstream.clone();
        self.upstream_version = version;
        self.sent = Some(now);
    }

    pub(crate) fn head_arrived(&mut self, now: std::time::Instant) {
        self.head = Some(now);
    }

    pub(crate) fn responding(&mut self, head: &ResponseHead) {
        self.status = head.status;
    }

    pub(crate) fn ended(&mut self, ending: Ending) {
        self.ending.get_or_insert(ending);
    }

    /// Counts the gRPC messages that have passed, once the peer is known: a client's metadata comes with the request,
    /// a server's with its answer.
    ///
    /// *Source*: Istio, "Istio Standard Metrics". Istio tells every five seconds what we tell at once.
    pub(crate) fn messages(
        &mut self,
        worker: &Worker,
        conn: &Conn,
        head: &RequestHead,
        info: &StreamInfo,
        (request, response): (u64, u64),
    ) {
        if reporter(conn) == Reporter::Destination || self.status != 0 {
            self.count_messages(worker, conn, head, info, (request, response));
        }
    }

    fn count_messages(
        &mut self,
        worker: &Worker,
        conn: &Conn,
        head: &RequestHead,
        info: &StreamInfo,
        (request, response): (u64, u64),
    ) {
        let Terminal::Http(hcm) = &self.chain.terminal else { return };
        let counted = &mut self.messages;
        if hcm.stats().is_none() || (request, response) == (counted.request, counted.response) {
            return;
        }
        let series = counted.series.get_or_insert_with(|| {
            let host = fallback_host(hcm, head);
            let key = worker.telemetry.key(Protocol::GrpcMessages, conn, info, host);
            worker.recorder.series(SeriesKey { security: Security::Unknown, flags: Flags::One("-"), ..key })
        });
        series.messages(request - counted.request, response - counted.response);
        (counted.request, counted.response) = (request, response);
    }

    /// Writes metrics, log line and spans.
    #[expect(clippy::too_many_arguments, reason = "all that is known of a request, once")]
    pub(crate) fn write(
        mut self,
        worker: &Rc<Worker>,
        conn: &Conn,
        head: &RequestHead,
        response: &ResponseHead,
        trailers: Option<&Fields>,
        info: &StreamInfo,
        counts: &Counts,
    ) {
        let telemetry = &worker.telemetry;
        let end = worker.now();
        if info.is_grpc {
            self.count_messages(worker, conn, head, info, (counts.request_messages, counts.response_messages));
        }
        let status = if self.status == 0 { 0 } else { response.status };
        // begun by its connection, whatever its chain has become
        if let Some(manager) = &conn.state.manager {
            manager.ended(status);
        }
        let Terminal::Http(hcm) = &self.chain.terminal else { return };
        if hcm.stats().is_some() {
            let protocol = if info.is_grpc { Protocol::Grpc } else { Protocol::Http };
            let key = SeriesKey {
                response_code: status,
                grpc_status: counts.grpc_status.filter(|_| info.is_grpc),
                ..telemetry.key(protocol, conn, info, fallback_host(hcm, head))
            };
            let head_bytes = |fields: &Fields| (fields.bytes() + fields.len() * 4) as u64;
            worker.recorder.series(key).request(&RequestSample {
                duration: end.mono.saturating_duration_since(self.start.mono),
                request_bytes: counts.request_bytes
                    + head_bytes(&head.fields)
                    + (head.path().len() + head.authority().len() + 16) as u64,
                response_bytes: counts.response_bytes + head_bytes(&response.fields) + 16,
            });
        }
        if info.is_grpc
            && let Some(stats) = hcm.grpc_stats()
        {
            telemetry.count_grpc(worker, stats, head, info, counts);
        }
        let ended = Ended { start: self.start, end, sent: self.sent, head: self.head };
        let silent = ResponseHead::default();
        if !hcm.access_log.is_empty() {
            let line = crate::access::Line {
                facts: &conn.facts,
                chain: &conn.chain.name,
                head: Some(head),
                response: Some(if status == 0 { &silent } else { response }),
                trailers,
                info,
                counts,
                ended: &ended,
                upstream: &self.upstream,
                connection_id: conn.id,
                downstream_failure: "",
            };
            crate::access::write(telemetry, &hcm.access_log, &line);
        }
        let upstream_version = self.upstream_version;
        self.tracing.finish(worker, conn, &Finishing { head, status, info, ended: &ended, counts, upstream_version });
    }
}

/// Ourselves as metrics name us, by our node metadata.
pub(crate) fn own_peer(metadata: &envoy_types::pb::google::protobuf::Struct) -> Peer {
    peers::from_struct(metadata, "")
}
