//! Metrics of a proxy.
//!
//! ```text
//!  worker 0: Recorder ──► Shard 0 ┐
//!  worker 1: Recorder ──► Shard 1 ├── scrape: Metrics::render()
//!  control : Recorder ──► Shard 2 ┘
//! ```
//!
//! A [`Recorder`] belongs to one thread and is the only writer of its shard. A request finds its
//! series by a key of pointers and small numbers; only the first request of a series renders
//! labels and takes the shard's lock.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::peer::Peer;
use crate::text;

/// Upper bounds of Istio's histograms, for milliseconds and bytes alike.
pub const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10000.0,
    30000.0,
    60000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Series one shard may hold; more are folded into one series whose labels are all `overflow`.
pub const SERIES_MAX: usize = 4096;

/// Who reports.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reporter {
    /// Outbound sidecar or gateway.
    Source,
    /// Inbound sidecar.
    Destination,
}

/// `request_protocol`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Protocol {
    /// HTTP of any version.
    Http,
    /// gRPC.
    Grpc,
    /// The messages of a gRPC stream. They are counted while it is open, so that labels which only its end
    /// tells are left out: the protocol, the answer's codes and flags, and the transport's security.
    ///
    /// *Source*: Istio's `istio_stats`, which reports them with what it knows of the peers.
    GrpcMessages,
    /// A connection.
    Tcp,
}

/// `connection_security_policy`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Security {
    /// Destination side, mutual TLS.
    MutualTls,
    /// Destination side, anything else.
    None,
    /// Source side.
    Unknown,
}

/// The service a request was for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Destination {
    /// Full host, or `unknown`.
    pub service: Box<str>,
    /// Short name, or the name of a fixed cluster.
    pub name: Box<str>,
    /// Namespace, or `unknown`.
    pub namespace: Box<str>,
}

/// Everything that tells one series from another.
///
/// The `Arc`s are compared by address in the first lookup and by content in the second, so a
/// caller should hold on to one `Arc` for each peer and service it knows.
#[derive(Clone, Debug)]
pub struct SeriesKey {
    /// Who reports.
    pub reporter: Reporter,
    /// HTTP, gRPC or TCP.
    pub protocol: Protocol,
    /// Transport security.
    pub security: Security,
    /// Who called.
    pub source: Arc<Peer>,
    /// Who was called.
    pub destination: Arc<Peer>,
    /// The service.
    pub service: Arc<Destination>,
    /// HTTP status; 0 when none was sent; for finished requests only.
    pub response_code: u16,
    /// gRPC status, for gRPC only.
    pub grpc_status: Option<u32>,
    /// Envoy's flags joined by `,`; `-` for none.
    pub flags: Flags,
}

/// Response flags as metrics show them.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Flags {
    /// None or one, from the table of causes.
    One(&'static str),
    /// Several, joined.
    Many(Box<str>),
}

impl Flags {
    /// The label's value.
    pub fn as_str(&self) -> &str {
        match self {
            Self::One(flag) => flag,
            Self::Many(flags) => flags,
        }
    }
}

struct FastKey(SeriesKey);

/// The words of a key that are compared.
type KeyParts<'a> = (usize, usize, usize, u16, Option<u32>, &'a str, (Reporter, Protocol, Security));

impl FastKey {
    fn parts(&self) -> KeyParts<'_> {
        let key = &self.0;
        (
            Arc::as_ptr(&key.source) as usize,
            Arc::as_ptr(&key.destination) as usize,
            Arc::as_ptr(&key.service) as usize,
            key.response_code,
            key.grpc_status,
            key.flags.as_str(),
            (key.reporter, key.protocol, key.security),
        )
    }
}

impl PartialEq for FastKey {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for FastKey {}

impl Hash for FastKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let (source, destination, service, code, ..) = self.parts();
        (source ^ destination.rotate_left(17) ^ service.rotate_left(31) ^ usize::from(code)).hash(state);
    }
}

/// A hasher for keys that are addresses already: one multiplication.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    fn write_usize(&mut self, value: usize) {
        self.0 = (value as u64 ^ self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    }
}

type FastMap = HashMap<FastKey, Arc<Series>, std::hash::BuildHasherDefault<AddressHasher>>;

fn render_labels(key: &SeriesKey) -> String {
    let mut code = [0u8; 5];
    let code = {
        use std::io::Write;
        let mut cursor = &mut code[..];
        _ = write!(cursor, "{}", key.response_code);
        let left = cursor.len();
        std::str::from_utf8(&code[..5 - left]).unwrap_or_default().to_owned()
    };
    let grpc = key.grpc_status.map(|status| status.to_string()).unwrap_or_default();
    let (source, destination, service) = (&key.source, &key.destination, &key.service);
    let reporter = match key.reporter {
        Reporter::Source => "source",
        Reporter::Destination => "destination",
    };
    let protocol = match key.protocol {
        Protocol::Http => "http",
        Protocol::Grpc | Protocol::GrpcMessages => "grpc",
        Protocol::Tcp => "tcp",
    };
    let security = match key.security {
        Security::MutualTls => "mutual_tls",
        Security::None => "none",
        Security::Unknown => "unknown",
    };
    let mut pairs: Vec<(&str, &str)> = vec![
        ("reporter", reporter),
        ("source_workload", &source.workload),
        ("source_canonical_service", &source.canonical_service),
        ("source_canonical_revision", &source.canonical_revision),
        ("source_workload_namespace", &source.namespace),
        ("source_principal", &source.principal),
        ("source_app", &source.app),
        ("source_version", &source.version),
        ("source_cluster", &source.cluster),
        ("destination_workload", &destination.workload),
        ("destination_workload_namespace", &destination.namespace),
        ("destination_principal", &destination.principal),
        ("destination_app", &destination.app),
        ("destination_version", &destination.version),
        ("destination_service", &service.service),
        ("destination_canonical_service", &destination.canonical_service),
        ("destination_canonical_revision", &destination.canonical_revision),
        ("destination_service_name", &service.name),
        ("destination_service_namespace", &service.namespace),
        ("destination_cluster", &destination.cluster),
    ];
    if key.protocol == Protocol::GrpcMessages {
        return text::labels(pairs);
    }
    pairs.push(("request_protocol", protocol));
    if key.protocol != Protocol::Tcp {
        pairs.push(("response_code", &code));
        pairs.push(("grpc_response_status", &grpc));
    }
    pairs.push(("response_flags", key.flags.as_str()));
    pairs.push(("connection_security_policy", security));
    text::labels(pairs)
}

/// A histogram with one writer.
#[derive(Default, Debug)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS.len() + 1],
    /// Thousandths of the unit.
    sum_milli: AtomicU64,
}

fn bump(cell: &AtomicU64, by: u64) {
    // One writer: a load and a store are enough, and cheaper than a locked add.
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl Histogram {
    fn record(&self, value: f64) {
        let at = BUCKETS.partition_point(|bound| *bound < value);
        bump(&self.buckets[at], 1);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "durations and sizes are positive and far below the range"
        )]
        bump(&self.sum_milli, (value * 1000.0) as u64);
    }
}

/// One series: all of Istio's metrics that share its labels.
#[derive(Default, Debug)]
pub struct Series {
    labels: String,
    requests: AtomicU64,
    duration_ms: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
    request_messages: AtomicU64,
    response_messages: AtomicU64,
    opened: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

/// A finished request.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestSample {
    /// First request byte to last response byte.
    pub duration: Duration,
    /// Bytes from downstream, heads included.
    pub request_bytes: u64,
    /// Bytes to downstream, heads included.
    pub response_bytes: u64,
}

impl Series {
    /// Records one finished request.
    pub fn request(&self, sample: &RequestSample) {
        bump(&self.requests, 1);
        self.duration_ms.record(sample.duration.as_secs_f64() * 1000.0);
        #[expect(clippy::cast_precision_loss, reason = "bytes beyond 2^53 are not measured exactly")]
        {
            self.request_bytes.record(sample.request_bytes as f64);
            self.response_bytes.record(sample.response_bytes as f64);
        }
    }

    /// gRPC messages since the last call, from downstream and to it.
    pub fn messages(&self, request: u64, response: u64) {
        bump(&self.request_messages, request);
        bump(&self.response_messages, response);
    }

    /// A TCP connection was opened.
    pub fn opened(&self) {
        bump(&self.opened, 1);
    }

    /// A TCP connection was closed.
    pub fn closed(&self) {
        bump(&self.closed, 1);
    }

    /// TCP bytes since the last call: `sent` towards downstream, `received` from it.
    pub fn bytes(&self, sent: u64, received: u64) {
        bump(&self.sent, sent);
        bump(&self.received, received);
    }
}

/// What connection managers of one `stat_prefix` have served, on one thread, which is the only writer.
///
/// *Source*: Envoy, HTTP connection manager statistics.
#[derive(Default, Debug)]
pub struct Manager {
    prefix: Box<str>,
    connections: AtomicU64,
    connections_ended: AtomicU64,
    requests: AtomicU64,
    requests_ended: AtomicU64,
    /// By the first digit of the status, from 1 to 5.
    classes: [AtomicU64; 5],
}

impl Manager {
    /// A connection has begun.
    pub fn connected(&self) {
        bump(&self.connections, 1);
    }

    /// A connection has ended.
    pub fn disconnected(&self) {
        bump(&self.connections_ended, 1);
    }

    /// A request has begun.
    pub fn begun(&self) {
        bump(&self.requests, 1);
    }

    /// A request has ended; with 0 where no answer was begun.
    pub fn ended(&self, status: u16) {
        bump(&self.requests_ended, 1);
        if let Some(class) = usize::from(status / 100).checked_sub(1).and_then(|at| self.classes.get(at)) {
            bump(class, 1);
        }
    }
}

/// Sums of all threads.
#[derive(Default)]
struct ManagerTotals {
    connections: u64,
    connections_active: u64,
    requests: u64,
    requests_active: u64,
    classes: [u64; 5],
}

impl ManagerTotals {
    fn add(&mut self, one: &Manager) {
        let load = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        // ends first: what has ended has begun
        let (connections_ended, requests_ended) = (load(&one.connections_ended), load(&one.requests_ended));
        let (connections, requests) = (load(&one.connections), load(&one.requests));
        self.connections += connections;
        self.connections_active += connections.saturating_sub(connections_ended);
        self.requests += requests;
        self.requests_active += requests.saturating_sub(requests_ended);
        for (total, class) in self.classes.iter_mut().zip(&one.classes) {
            *total += load(class);
        }
    }
}

/// Label of a connection manager's metrics.
const MANAGER_LABEL: &str = "envoy_http_conn_manager_prefix";

fn render_managers(out: &mut String, all: &BTreeMap<Box<str>, ManagerTotals>) {
    type Read = fn(&ManagerTotals) -> u64;
    let families: [(&str, &str, Read); 5] = [
        ("envoy_http_downstream_cx_total", "counter", |of| of.connections),
        ("envoy_http_downstream_cx_active", "gauge", |of| of.connections_active),
        ("envoy_http_downstream_rq_total", "counter", |of| of.requests),
        ("envoy_http_downstream_rq_active", "gauge", |of| of.requests_active),
        ("envoy_http_downstream_rq_completed", "counter", |of| of.classes.iter().sum()),
    ];
    for (name, kind, read) in families {
        text::type_line(out, name, kind);
        for (prefix, totals) in all {
            text::sample(out, name, &text::labels([(MANAGER_LABEL, &**prefix)]), read(totals));
        }
    }
    text::classes(
        out,
        "envoy_http_downstream_rq_xx",
        all.iter().map(|(prefix, totals)| ((MANAGER_LABEL, &**prefix), totals.classes)),
    );
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)*) => {
        /// Counters without labels, each declared once.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Counter { $($(#[doc = $doc])+ $variant,)* }
        impl Counter {
            const ALL: &'static [Counter] = &[$(Counter::$variant,)*];
            /// Name in the exposition.
            pub const fn name(self) -> &'static str { match self { $(Self::$variant => $name,)* } }
        }
    };
}

counters! {
    /// Connections accepted.
    DownstreamConnections = "envoy_listener_downstream_cx_total",
    /// Connections no filter chain matched.
    NoFilterChain = "envoy_listener_no_filter_chain_match",
    /// TLS handshakes that succeeded downstream.
    TlsHandshakes = "envoy_listener_ssl_handshake",
    /// TLS handshakes that failed downstream.
    TlsErrors = "envoy_listener_ssl_connection_error",
    /// Requests refused as malformed or oversized.
    DownstreamProtocolErrors = "envoy_http_downstream_cx_protocol_error",
    /// HTTP/2 connections ended for flooding.
    DownstreamFloods = "envoy_http2_outbound_flood",
    /// Requests denied by authorization policy.
    RbacDenied = "envoy_http_rbac_denied",
    /// Requests allowed by authorization policy.
    RbacAllowed = "envoy_http_rbac_allowed",
    /// Requests refused for their token.
    JwtDenied = "envoy_http_jwt_authn_denied",
    /// Calls of gRPC whose method did not fit among those that are told apart.
    GrpcMethodsOverflow = "lateen_grpc_methods_overflow_total",
    /// Log lines dropped because the writer was behind.
    LogDropped = "lateen_access_log_dropped_total",
    /// Spans dropped because the exporter was behind.
    SpansDropped = "lateen_spans_dropped_total",
    /// Spans handed to the exporter.
    SpansSent = "envoy_tracing_zipkin_spans_sent",
    /// Requests whose series did not fit.
    SeriesOverflow = "lateen_metrics_series_overflow_total",
    /// Tasks whose panic was contained.
    Panics = "lateen_panics_total",
    /// DNS queries answered by the proxy.
    DnsRequests = "istio_agent_dns_requests_total",
    /// DNS queries passed on.
    DnsUpstream = "istio_agent_dns_upstream_requests_total",
}

macro_rules! gauges {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)*) => {
        /// Gauges without labels, each declared once.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Gauge { $($(#[doc = $doc])+ $variant,)* }
        impl Gauge {
            const ALL: &'static [Gauge] = &[$(Gauge::$variant,)*];
            /// Name in the exposition.
            pub const fn name(self) -> &'static str { match self { $(Self::$variant => $name,)* } }
        }
    };
}

gauges! {
    /// Connections open downstream.
    DownstreamActive = "envoy_listener_downstream_cx_active",
}

/// What one thread writes.
struct Shard {
    series: Mutex<Vec<Arc<Series>>>,
    managers: Mutex<Vec<Arc<Manager>>>,
    counters: Vec<AtomicU64>,
    gauges: Vec<AtomicI64>,
}

/// All shards of one proxy.
#[derive(Default, Clone)]
pub struct Metrics {
    shards: Arc<Mutex<Vec<Arc<Shard>>>>,
}

impl Metrics {
    /// No shard yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a shard and its only writer.
    pub fn recorder(&self) -> Recorder {
        let shard = Arc::new(Shard {
            series: Mutex::new(Vec::new()),
            managers: Mutex::new(Vec::new()),
            counters: Counter::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
            gauges: Gauge::ALL.iter().map(|_| AtomicI64::new(0)).collect(),
        });
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&shard));
        Recorder { shard, fast: RefCell::default(), rendered: RefCell::default(), managers: RefCell::default() }
    }

    fn shards(&self) -> Vec<Arc<Shard>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The sum of one counter over all shards.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.shards().iter().map(|shard| shard.counters[counter as usize].load(Ordering::Relaxed)).sum()
    }

    /// The sum of one gauge over all shards.
    pub fn gauge(&self, gauge: Gauge) -> i64 {
        self.shards().iter().map(|shard| shard.gauges[gauge as usize].load(Ordering::Relaxed)).sum()
    }

    /// Writes everything in Prometheus' text format.
    pub fn render(&self, out: &mut String) {
        let shards = self.shards();
        let mut merged: BTreeMap<String, Totals> = BTreeMap::new();
        let mut managers: BTreeMap<Box<str>, ManagerTotals> = BTreeMap::new();
        for shard in &shards {
            for one in &*shard.managers.lock().unwrap_or_else(PoisonError::into_inner) {
                // Istio's names end so for its own tags, which take the end away
                managers.entry(one.prefix.trim_end_matches(';').into()).or_default().add(one);
            }
            let series = shard.series.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for one in series {
                merged.entry(one.labels.clone()).or_default().add(&one);
            }
        }
        render_totals(out, &merged);
        render_managers(out, &managers);
        for counter in Counter::ALL {
            text::type_line(out, counter.name(), "counter");
            text::sample(out, counter.name(), "", self.counter(*counter));
        }
        for gauge in Gauge::ALL {
            text::type_line(out, gauge.name(), "gauge");
            text::sample(out, gauge.name(), "", self.gauge(*gauge));
        }
    }
}

#[derive(Default)]
struct HistogramTotals {
    buckets: [u64; BUCKETS.len() + 1],
    sum_milli: u64,
}

impl HistogramTotals {
    fn add(&mut self, histogram: &Histogram) {
        for (total, bucket) in self.buckets.iter_mut().zip(&histogram.buckets) {
            *total += bucket.load(Ordering::Relaxed);
        }
        self.sum_milli += histogram.sum_milli.load(Ordering::Relaxed);
    }

    fn render(&self, out: &mut String, name: &str, labels: &str) {
        let mut count = 0;
        let bucket_name = format!("{name}_bucket");
        for (index, bucket) in self.buckets.iter().enumerate() {
            count += bucket;
            let bound = BUCKETS.get(index).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
            text::sample(out, &bucket_name, &format!("{labels},le=\"{bound}\""), count);
        }
        #[expect(clippy::cast_precision_loss, reason = "a sum is shown, not computed with")]
        text::sample(out, &format!("{name}_sum"), labels, self.sum_milli as f64 / 1000.0);
        text::sample(out, &format!("{name}_count"), labels, count);
    }
}

#[derive(Default)]
struct Totals {
    requests: u64,
    request_messages: u64,
    response_messages: u64,
    opened: u64,
    closed: u64,
    sent: u64,
    received: u64,
    duration: HistogramTotals,
    request_bytes: HistogramTotals,
    response_bytes: HistogramTotals,
}

impl Totals {
    fn add(&mut self, series: &Series) {
        let load = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        self.requests += load(&series.requests);
        self.request_messages += load(&series.request_messages);
        self.response_messages += load(&series.response_messages);
        self.opened += load(&series.opened);
        self.closed += load(&series.closed);
        self.sent += load(&series.sent);
        self.received += load(&series.received);
        self.duration.add(&series.duration_ms);
        self.request_bytes.add(&series.request_bytes);
        self.response_bytes.add(&series.response_bytes);
    }
}

fn render_totals(out: &mut String, merged: &BTreeMap<String, Totals>) {
    type Read = fn(&Totals) -> u64;
    type Applies<'a> = &'a dyn Fn(&Totals) -> bool;
    type HistogramOf = fn(&Totals) -> &HistogramTotals;
    let http = |totals: &Totals| totals.requests > 0;
    let grpc = |totals: &Totals| totals.request_messages + totals.response_messages > 0;
    let tcp = |totals: &Totals| totals.opened + totals.closed > 0;
    let counters: [(&str, Applies<'_>, Read); 7] = [
        ("istio_requests_total", &http, |t| t.requests),
        ("istio_request_messages_total", &grpc, |t| t.request_messages),
        ("istio_response_messages_total", &grpc, |t| t.response_messages),
        ("istio_tcp_connections_opened_total", &tcp, |t| t.opened),
        ("istio_tcp_connections_closed_total", &tcp, |t| t.closed),
        ("istio_tcp_sent_bytes_total", &tcp, |t| t.sent),
        ("istio_tcp_received_bytes_total", &tcp, |t| t.received),
    ];
    for (name, applies, read) in counters {
        text::type_line(out, name, "counter");
        for (labels, totals) in merged.iter().filter(|(_, totals)| applies(totals)) {
            text::sample(out, name, labels, read(totals));
        }
    }
    let histograms: [(&str, HistogramOf); 3] = [
        ("istio_request_duration_milliseconds", |t| &t.duration),
        ("istio_request_bytes", |t| &t.request_bytes),
        ("istio_response_bytes", |t| &t.response_bytes),
    ];
    for (name, of) in histograms {
        text::type_line(out, name, "histogram");
        for (labels, totals) in merged.iter().filter(|(_, totals)| http(totals)) {
            of(totals).render(out, name, labels);
        }
    }
}

/// Prefixes that are told apart; names of configurations, which come and go.
const MANAGERS_MAX: usize = 1024;
/// What stands for the others.
const OVERFLOW: &str = "overflow";

/// Entries of the pointer-keyed cache before it is emptied.
const FAST_MAX: usize = 2048;

/// The only writer of one shard. Lives on one thread.
pub struct Recorder {
    shard: Arc<Shard>,
    fast: RefCell<FastMap>,
    rendered: RefCell<HashMap<String, Arc<Series>>>,
    managers: RefCell<HashMap<Box<str>, Arc<Manager>>>,
}

impl Recorder {
    /// The series of `key`. Hold it for the life of a connection, or ask again each request.
    ///
    /// *Cost*: one hash of a few words when the series was seen before; else a rendering and a lock.
    pub fn series(&self, key: SeriesKey) -> Arc<Series> {
        let key = FastKey(key);
        if let Some(found) = self.fast.borrow().get(&key) {
            return Arc::clone(found);
        }
        let series = self.by_labels(render_labels(&key.0));
        let mut fast = self.fast.borrow_mut();
        if fast.len() >= FAST_MAX {
            fast.clear();
        }
        fast.insert(key, Arc::clone(&series));
        series
    }

    fn by_labels(&self, labels: String) -> Arc<Series> {
        let mut rendered = self.rendered.borrow_mut();
        if let Some(found) = rendered.get(&labels) {
            return Arc::clone(found);
        }
        let labels = if rendered.len() >= SERIES_MAX {
            self.count(Counter::SeriesOverflow);
            let overflow = "overflow=\"true\"".to_owned();
            if let Some(found) = rendered.get(&overflow) {
                return Arc::clone(found);
            }
            overflow
        } else {
            labels
        };
        let series = Arc::new(Series { labels: labels.clone(), ..Series::default() });
        self.shard.series.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&series));
        rendered.insert(labels, Arc::clone(&series));
        series
    }

    /// The counts of connection managers of this `stat_prefix`. Hold them for the life of a connection.
    pub fn manager(&self, prefix: &str) -> Arc<Manager> {
        let mut managers = self.managers.borrow_mut();
        if let Some(found) = managers.get(prefix) {
            return Arc::clone(found);
        }
        let prefix = if managers.len() < MANAGERS_MAX {
            prefix
        } else {
            self.count(Counter::SeriesOverflow);
            OVERFLOW
        };
        if let Some(found) = managers.get(prefix) {
            return Arc::clone(found);
        }
        let made = Arc::new(Manager { prefix: prefix.into(), ..Manager::default() });
        self.shard.managers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&made));
        managers.insert(prefix.into(), Arc::clone(&made));
        made
    }

    /// Adds one.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    /// Adds `by`.
    pub fn add(&self, counter: Counter, by: u64) {
        bump(&self.shard.counters[counter as usize], by);
    }

    /// Moves a gauge by `by`.
    pub fn gauge(&self, gauge: Gauge, by: i64) {
        let cell = &self.shard.gauges[gauge as usize];
        cell.store(cell.load(Ordering::Relaxed) + by, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(code: u16, source: &Arc<Peer>) -> SeriesKey {
        SeriesKey {
            reporter: Reporter::Source,
            protocol: Protocol::Http,
            security: Security::Unknown,
            source: Arc::clone(source),
            destination: Peer::unknown(),
            service: Arc::new(Destination { service: "a.b".into(), name: "a".into(), namespace: "b".into() }),
            response_code: code,
            grpc_status: None,
            flags: Flags::One("-"),
        }
    }

    #[test]
    fn shards_are_summed_by_labels() {
        let metrics = Metrics::new();
        let (one, two) = (metrics.recorder(), metrics.recorder());
        let peer = Peer::unknown();
        let sample = RequestSample { duration: Duration::from_millis(7), request_bytes: 10, response_bytes: 20 };
        one.series(key(200, &peer)).request(&sample);
        one.series(key(200, &Peer::unknown())).request(&sample);
        two.series(key(200, &peer)).request(&sample);
        two.series(key(503, &peer)).request(&sample);
        let mut out = String::new();
        metrics.render(&mut out);
        let lines: Vec<_> = out.lines().filter(|line| line.starts_with("istio_requests_total{")).collect();
        assert_eq!(lines.len(), 2, "{out}");
        assert!(lines[0].contains("response_code=\"200\"") && lines[0].ends_with("} 3"), "{}", lines[0]);
        assert!(lines[1].ends_with("} 1"));
        assert!(out.contains("le=\"5\"} 0") && out.contains("le=\"10\"} 3"));
    }

    #[test]
    fn the_fast_key_tells_codes_apart() {
        let metrics = Metrics::new();
        let recorder = metrics.recorder();
        let peer = Peer::unknown();
        let a = key(200, &peer);
        let mut b = a.clone();
        b.flags = Flags::One("UF");
        assert!(!Arc::ptr_eq(&recorder.series(a.clone()), &recorder.series(b)));
        assert!(Arc::ptr_eq(&recorder.series(a.clone()), &recorder.series(a)));
    }

    #[test]
    fn too_many_series_fold_into_one() {
        let metrics = Metrics::new();
        let recorder = metrics.recorder();
        let peer = Peer::unknown();
        for code in 0..u16::try_from(SERIES_MAX).unwrap() + 10 {
            recorder.series(key(code, &peer));
        }
        assert_eq!(metrics.counter(Counter::SeriesOverflow), 10);
    }

    #[test]
    fn managers_are_summed_by_prefix() {
        let metrics = Metrics::new();
        let (one, two) = (metrics.recorder(), metrics.recorder());
        for (recorder, statuses) in [(&one, &[200, 204, 503][..]), (&two, &[200, 0])] {
            let manager = recorder.manager("in");
            manager.connected();
            statuses.iter().for_each(|_| manager.begun());
            statuses.iter().for_each(|status| manager.ended(*status));
        }
        one.manager("in").begun();
        two.manager("in").disconnected();
        two.manager("out").connected();
        let mut out = String::new();
        metrics.render(&mut out);
        for line in [
            "envoy_http_downstream_cx_total{envoy_http_conn_manager_prefix=\"in\"} 2",
            "envoy_http_downstream_cx_active{envoy_http_conn_manager_prefix=\"in\"} 1",
            "envoy_http_downstream_cx_active{envoy_http_conn_manager_prefix=\"out\"} 1",
            "envoy_http_downstream_rq_total{envoy_http_conn_manager_prefix=\"in\"} 6",
            "envoy_http_downstream_rq_active{envoy_http_conn_manager_prefix=\"in\"} 1",
            "envoy_http_downstream_rq_xx{envoy_response_code_class=\"2\",envoy_http_conn_manager_prefix=\"in\"} 3",
            "envoy_http_downstream_rq_xx{envoy_response_code_class=\"5\",envoy_http_conn_manager_prefix=\"in\"} 1",
        ] {
            assert!(out.lines().any(|have| have == line), "{line}: {out}");
        }
        assert_eq!(out.matches("# TYPE envoy_http_downstream_rq_xx counter").count(), 1);
    }

    #[test]
    fn too_many_managers_fold_into_one() {
        let metrics = Metrics::new();
        let recorder = metrics.recorder();
        for n in 0..MANAGERS_MAX + 10 {
            recorder.manager(&n.to_string()).begun();
        }
        let mut out = String::new();
        metrics.render(&mut out);
        assert!(out.contains("envoy_http_downstream_rq_total{envoy_http_conn_manager_prefix=\"overflow\"} 10\n"));
    }

    #[test]
    fn tcp_has_no_response_code() {
        let metrics = Metrics::new();
        let recorder = metrics.recorder();
        let mut tcp = key(0, &Peer::unknown());
        tcp.protocol = Protocol::Tcp;
        let series = recorder.series(tcp);
        series.opened();
        series.bytes(5, 6);
        let mut out = String::new();
        metrics.render(&mut out);
        let line = out.lines().find(|line| line.starts_with("istio_tcp_sent_bytes_total{")).unwrap();
        assert!(!line.contains("response_code") && line.ends_with(" 5"), "{line}");
    }

    #[test]
    fn messages_have_no_labels_that_only_an_end_tells() {
        let metrics = Metrics::new();
        let recorder = metrics.recorder();
        let key = SeriesKey { protocol: Protocol::GrpcMessages, ..key(0, &Peer::unknown()) };
        let series = recorder.series(key);
        series.messages(2, 0);
        series.messages(1, 5);
        let mut out = String::new();
        metrics.render(&mut out);
        for (name, count) in [("istio_request_messages_total{", " 3"), ("istio_response_messages_total{", " 5")] {
            let line = out.lines().find(|line| line.starts_with(name)).unwrap();
            assert!(line.ends_with(&format!("destination_cluster=\"unknown\"}}{count}")), "{line}");
        }
        assert!(!out.contains("istio_requests_total{"), "no request has ended: {out}");
    }
}
