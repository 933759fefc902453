//! What a request or connection leaves behind: metrics, a log line, spans. Written once, on every
//! way out.

mod peers;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use engine::chain::{Direction, FilterChain, Listener, Terminal};
use engine::config::Name;
use engine::exchange::StreamInfo;
use engine::facts::{ConnFacts, Now};
use engine::hcm::GrpcStats;
use engine::shared::{GRPC_METHODS_MAX, GrpcTally, SharedCluster};
use telemetry::log::LineSink;
use telemetry::metrics::{Counter, Destination, Flags, Protocol, Reporter, RequestSample, Security, Series, SeriesKey};
use telemetry::peer::Peer;
use types::{Cause, Fields, RequestHead, ResponseHead, Version};

use crate::accept::Conn;
use crate::proxy::Shared;
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
    sinks: Arc<crate::proxy::Sinks>,
    secrets: crate::secrets::Secrets,
}

/// Methods of gRPC that this worker has met, by cluster and path.
#[derive(Default)]
struct Methods {
    by_cluster: HashMap<Name, ClusterMethods>,
}

struct ClusterMethods {
    shared: Arc<SharedCluster>,
    by_path: HashMap<Box<str>, Arc<GrpcTally>>,
    /// No more are told apart: nobody needs to ask again.
    is_full: bool,
}

/// Longer paths are not kept: clients choose them.
const METHOD_PATH_MAX: usize = 256;

impl Methods {
    fn of(&mut self, shared: &Arc<SharedCluster>, dots: bool, call: (&str, &str, &str)) -> Option<Arc<GrpcTally>> {
        let (path, service, method) = call;
        if !self.by_cluster.get(&shared.name).is_some_and(|known| Arc::ptr_eq(&known.shared, shared)) {
            // those of clusters that are gone go with them
            self.by_cluster.retain(|_, known| Arc::strong_count(&known.shared) > 1);
            let new = ClusterMethods { shared: Arc::clone(shared), by_path: HashMap::new(), is_full: false };
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

    /// A connection that reached no chain, or failed in its handshake.
    pub(crate) fn connection_refused(&self, worker: &Worker, listener: &Listener, facts: &ConnFacts, cause: Cause) {
        let mut info = StreamInfo::default();
        info.causes.push(cause);
        info.details = engine::exchange::Details::Static(cause.surface().details);
        crate::access::connection(
            self,
            worker,
            &listener.access_log,
            facts,
            &info,
            &Ended::now(worker),
            &Endpoints::default(),
        );
    }

    /// A connection of a chain that was closed before it carried anything.
    pub(crate) fn connection_closed(&self, worker: &Worker, conn: &Conn, info: &StreamInfo, cause: Cause) {
        let mut marked = StreamInfo { details: info.details.clone(), ..StreamInfo::default() };
        marked.causes.clone_from(&info.causes);
        if !marked.causes.contains(&cause) {
            marked.causes.push(cause);
        }
        let logs = match &conn.chain.terminal {
            Terminal::Http(hcm) => &hcm.access_log,
            Terminal::Tcp(tcp) => &tcp.access_log,
        };
        crate::access::connection(self, worker, logs, &conn.facts, &marked, &Ended::now(worker), &Endpoints::default());
    }

    /// Bytes that never became a request.
    pub(crate) fn malformed(&self, worker: &Worker, conn: &Conn, cause: Cause, status: u16) {
        let mut info = StreamInfo::default();
        info.causes.push(cause);
        info.details = engine::exchange::Details::Static(cause.surface().details);
        let response = ResponseHead::new(status);
        let head = RequestHead::default();
        let ended = Ended::now(worker);
        if let Terminal::Http(hcm) = &conn.chain.terminal {
            let line = crate::access::Line {
                facts: &conn.facts,
                head: Some(&head),
                response: Some(&response),
                trailers: None,
                info: &info,
                counts: &Counts::default(),
                ended: &ended,
                upstream: &Endpoints::default(),
                connection_id: conn.id,
            };
            crate::access::write(self, &hcm.access_log, &line);
        }
        let key = SeriesKey {
            reporter: reporter(conn),
            protocol: Protocol::Http,
            security: security(conn),
            source: self.source(conn, &info),
            destination: self.destination(conn, &info),
            service: self.service("unknown", "unknown", "unknown"),
            response_code: status,
            grpc_status: None,
            flags: flags(&info),
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

    /// The service a request or connection was for.
    fn service_of(&self, conn: &Conn, info: &StreamInfo, host: &str) -> Arc<Destination> {
        let own = || self.peers.own();
        if let Some(service) = info.cluster.as_ref().and_then(|cluster| cluster.services.first()) {
            return self.service(&service.host, &service.name, &service.namespace);
        }
        let cluster = info.cluster.as_ref().map(|cluster| &*cluster.name).or(info.cluster_name.as_deref());
        let fallback = if host.is_empty() { "unknown" } else { host };
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
                _ => self.service(fallback, &own().canonical_service, &own().namespace),
            },
            None if reporter(conn) == Reporter::Destination => {
                self.service(fallback, &own().canonical_service, &own().namespace)
            }
            None => self.service(fallback, "unknown", "unknown"),
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
        let config = worker.config();
        let live = worker.engine.live(&config, cluster, worker.now().mono);
        let ended = |tally: &GrpcTally| {
            tally.ended(counts.grpc_status, counts.request_messages, counts.response_messages);
        };
        if !stats.tells_apart(service, method) {
            return ended(live.shared.grpc.all());
        }
        let mut methods = self.methods.borrow_mut();
        match methods.of(&live.shared, stats.replaces_dots, (path, service, method)) {
            Some(tally) => ended(&tally),
            None => {
                worker.recorder.count(Counter::GrpcMethodsOverflow);
                ended(live.shared.grpc.all());
            }
        }
    }

    /// The series of a connection of bytes.
    pub(crate) fn tcp_series(&self, worker: &Worker, conn: &Conn, info: &StreamInfo) -> Arc<Series> {
        worker.recorder.series(SeriesKey {
            reporter: reporter(conn),
            protocol: Protocol::Tcp,
            security: security(conn),
            source: self.source(conn, info),
            destination: self.destination(conn, info),
            service: self.service_of(conn, info, ""),
            response_code: 0,
            grpc_status: None,
            flags: flags(info),
        })
    }
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

    fn now(worker: &Worker) -> Self {
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
    tracing: RequestTrace,
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

    /// Writes metrics, log line and spans.
    #[expect(clippy::too_many_arguments, reason = "all that is known of a request, once")]
    pub(crate) fn write(
        self,
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
        let Terminal::Http(hcm) = &self.chain.terminal else { return };
        let status = if self.status == 0 { 0 } else { response.status };
        if hcm.stats().is_some() {
            let protocol = if info.is_grpc { Protocol::Grpc } else { Protocol::Http };
            let key = SeriesKey {
                reporter: reporter(conn),
                protocol,
                security: security(conn),
                source: telemetry.source(conn, info),
                destination: telemetry.destination(conn, info),
                service: telemetry.service_of(conn, info, head.authority_str()),
                response_code: status,
                grpc_status: counts.grpc_status.filter(|_| protocol == Protocol::Grpc),
                flags: flags(info),
            };
            let head_bytes = |fields: &Fields| (fields.bytes() + fields.len() * 4) as u64;
            worker.recorder.series(key).request(&RequestSample {
                duration: end.mono.saturating_duration_since(self.start.mono),
                request_bytes: counts.request_bytes
                    + head_bytes(&head.fields)
                    + (head.path().len() + head.authority().len() + 16) as u64,
                response_bytes: counts.response_bytes + head_bytes(&response.fields) + 16,
                request_messages: counts.request_messages,
                response_messages: counts.response_messages,
            });
        }
        if let Some(manager) = &conn.state.manager {
            manager.ended(status);
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
                head: Some(head),
                response: Some(if status == 0 { &silent } else { response }),
                trailers,
                info,
                counts,
                ended: &ended,
                upstream: &self.upstream,
                connection_id: conn.id,
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
