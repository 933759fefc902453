//! Spans of requests: contexts read and written on the way, finished spans sent in batches.
//!
//! The engine decides whether a request is traced ([`StreamInfo::traced`]); here it gets a span of
//! this proxy, child of the caller's, and the upstream is told about it. Spans never hold a request
//! up: a full queue drops them, counted.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use engine::RuntimeConfig;
use engine::chain::Direction;
use engine::exchange::StreamInfo;
use engine::hcm::{Hcm, TagSource, TraceProvider, Tracing};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use telemetry::metrics::Counter;
use telemetry::trace::{Extracted, Propagation, TraceContext, extract, inject};
use telemetry::zipkin::{Span, SpanKind, encode};
use tokio::sync::mpsc;
use types::{RequestHead, Version, wellknown::marks};

use crate::accept::Conn;
use crate::dial::How;
use crate::record::{Counts, Ended, flags};
use crate::shared::Shared;
use crate::worker::Worker;

/// Spans that may wait for the exporter.
const WAITING_MAX: usize = 4096;
/// Spans of one call.
const BATCH_MAX: usize = 100;
/// A collector gets so long.
const CALL_MAX: Duration = Duration::from_secs(5);
/// A batch is not held longer.
const PATIENCE: Duration = Duration::from_millis(500);

/// Tags in order.
type Tags = Vec<(Cow<'static, str>, Box<str>)>;

/// A finished span and where it goes.
type Finished = (Arc<Tracing>, Span);

/// Finished spans on their way to their collectors.
#[derive(Debug)]
pub struct Spans {
    to: mpsc::Sender<Finished>,
    from: Mutex<Option<mpsc::Receiver<Finished>>>,
}

impl Default for Spans {
    fn default() -> Self {
        let (to, from) = mpsc::channel(WAITING_MAX);
        Self { to, from: Mutex::new(Some(from)) }
    }
}

impl Spans {
    /// The exporter's end; once.
    fn take(&self) -> Option<mpsc::Receiver<Finished>> {
        self.from.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A request's span while it runs.
#[derive(Default)]
pub(crate) struct RequestTrace {
    running: Option<Running>,
}

/// ```text
///  caller's span ──► our span ─────────────────────► upstream      sidecars
///  caller's span ──► our server span ──► client span ──► upstream      gateways
/// ```
struct Running {
    tracing: Arc<Tracing>,
    context: TraceContext,
    parent: Option<u64>,
    /// A gateway's call has a span of its own, and the upstream's is its child.
    upstream_span: Option<u64>,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).max(1)
}

impl RequestTrace {
    /// Continues the caller's trace, or begins one, and tells the upstream.
    ///
    /// Where nobody collects spans, the caller's context passes as it is.
    pub(crate) fn start(hcm: &Hcm, head: &mut RequestHead, info: &StreamInfo, seed: u64) -> Self {
        let Some(tracing) = &hcm.tracing else { return Self::default() };
        let Some(provider) = &tracing.provider else { return Self::default() };
        let long = !matches!(provider, TraceProvider::Zipkin { long_ids: false, .. });
        let own_id = mix(seed ^ 0x7370_616e);
        let fresh = || {
            let low = u128::from(mix(seed ^ 0x7472_6163));
            if long { u128::from(mix(seed ^ 0x6869_6768)) << 64 | low } else { low }
        };
        let shares = is_shared(hcm.direction, tracing);
        let (trace_id, span_id, parent, sampled) = match extract(&head.fields) {
            Extracted::Context(caller) => {
                let sampled = caller.sampled.unwrap_or(info.traced);
                if shares {
                    (caller.trace_id, caller.span_id, caller.parent_id, sampled)
                } else {
                    (caller.trace_id, own_id, Some(caller.span_id), sampled)
                }
            }
            Extracted::Decision(sampled) => (fresh(), own_id, None, sampled),
            Extracted::None => (fresh(), own_id, None, info.traced),
        };
        let context = TraceContext { trace_id, span_id, parent_id: parent, sampled: Some(sampled), debug: false };
        let propagation = match provider {
            TraceProvider::OpenTelemetry { .. } => Propagation::W3c,
            TraceProvider::Zipkin { w3c: true, .. } => Propagation::B3AndW3c,
            TraceProvider::Zipkin { .. } => Propagation::B3,
        };
        let upstream_span = tracing.spawn_upstream_span.then(|| mix(seed ^ 0x7570_7374));
        match upstream_span {
            Some(child) => inject(
                &mut head.fields,
                propagation,
                &TraceContext { span_id: child, parent_id: Some(span_id), ..context },
                Some(span_id),
            ),
            None => inject(&mut head.fields, propagation, &context, parent),
        }
        let running = sampled.then(|| Running { tracing: Arc::clone(tracing), context, parent, upstream_span });
        Self { running }
    }

    /// Sends the span off, or both of them.
    pub(crate) fn finish(self, worker: &Worker, conn: &Conn, line: &Finishing<'_>) {
        let Some(Running { tracing, context, parent, upstream_span }) = self.running else { return };
        // A call of the workload's own is a client's; where it has a span of its own, this one is the server's.
        let is_client = conn.state.direction == Direction::Outbound && upstream_span.is_none();
        let span = Span {
            trace_id: context.trace_id,
            id: context.span_id,
            parent_id: parent,
            kind: if is_client { SpanKind::Client } else { SpanKind::Server },
            shared: is_shared(conn.state.direction, &tracing),
            name: line.operation(),
            timestamp_us: line.ended.start.wall_nanos / 1000,
            duration_us: micros(line.ended.duration()),
            service_name: Arc::clone(&worker.shared.service_name),
            local: Some(conn.facts.local),
            tags: line.tags(worker, conn, &tracing),
        };
        if let (Some(id), Some(sent)) = (upstream_span, line.ended.sent) {
            let waited = sent.saturating_duration_since(line.ended.start.mono);
            let child = Span {
                id,
                parent_id: Some(context.span_id),
                kind: SpanKind::Client,
                shared: false,
                name: format!("router {} egress", line.cluster().unwrap_or("-")).into(),
                timestamp_us: span.timestamp_us + micros(waited),
                duration_us: micros(line.ended.duration().saturating_sub(waited)),
                service_name: Arc::clone(&span.service_name),
                tags: line.upstream_tags(&tracing),
                ..span
            };
            send_off(worker, &tracing, child);
        }
        send_off(worker, &tracing, span);
    }
}

/// Whether a call's span here is the server's side of the caller's own span.
///
/// *Source*: Envoy's Zipkin tracer, `shared_span_context`: of servers' spans only.
fn is_shared(direction: Direction, tracing: &Tracing) -> bool {
    let is_client = direction == Direction::Outbound && !tracing.spawn_upstream_span;
    !is_client && matches!(&tracing.provider, Some(TraceProvider::Zipkin { shared_spans: true, .. }))
}

/// At least one, since Zipkin takes 0 for unknown.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).max(1)
}

fn send_off(worker: &Worker, tracing: &Arc<Tracing>, span: Span) {
    match worker.shared.spans.to.try_send((Arc::clone(tracing), span)) {
        Ok(()) => worker.recorder.count(Counter::SpansSent),
        Err(_) => worker.recorder.count(Counter::SpansDropped),
    }
}

/// What a finished request tells its span.
pub(crate) struct Finishing<'a> {
    pub(crate) head: &'a RequestHead,
    pub(crate) status: u16,
    pub(crate) info: &'a StreamInfo,
    pub(crate) ended: &'a Ended,
    pub(crate) counts: &'a Counts,
    /// What the last attempt spoke.
    pub(crate) upstream_version: Version,
}

impl Finishing<'_> {
    fn operation(&self) -> Box<str> {
        match &self.info.operation {
            Some(operation) => operation.as_ref().into(),
            None => self.head.authority_str().into(),
        }
    }

    fn cluster(&self) -> Option<&str> {
        self.info.cluster.as_ref().map(|cluster| &*cluster.name).or(self.info.cluster_name.as_deref())
    }

    fn upstream_address(&self) -> Option<Box<str>> {
        self.info.picked.as_ref().map(|picked| picked.host.address.to_string().into())
    }

    /// What both ends of a call are told of its outcome.
    fn outcome(&self, tags: &mut Tags) {
        tags.push(("http.status_code".into(), self.status.to_string().into()));
        tags.push(("response_flags".into(), flags(self.info).as_str().into()));
        if let Some(cluster) = self.cluster() {
            tags.push(("upstream_cluster".into(), cluster.into()));
            tags.push(("upstream_cluster.name".into(), cluster.into()));
        }
        if let Some(address) = self.upstream_address() {
            tags.push(("upstream_address".into(), address));
        }
        if let Some(status) = self.counts.grpc_status.filter(|_| self.info.is_grpc) {
            tags.push(("grpc.status_code".into(), status.to_string().into()));
        }
        if self.status >= 500 || self.status == 0 {
            tags.push(("error".into(), "true".into()));
        }
    }

    /// Of a gateway's call: *Source*: Envoy's router, upstream span.
    fn upstream_tags(&self, tracing: &Tracing) -> Tags {
        let mut tags: Tags =
            vec![("component".into(), "proxy".into()), ("http.protocol".into(), self.upstream_version.as_str().into())];
        if let Some(address) = self.upstream_address() {
            tags.push(("peer.address".into(), address));
        }
        self.outcome(&mut tags);
        self.custom(tracing, &mut tags);
        tags
    }

    /// What the configuration adds.
    fn custom(&self, tracing: &Tracing, tags: &mut Tags) {
        for (name, source) in &tracing.tags {
            let value = match source {
                TagSource::Literal(text) => text.to_string(),
                TagSource::Environment(variable, other) => {
                    std::env::var(&**variable).unwrap_or_else(|_| other.to_string())
                }
                TagSource::Header(field, other) => self.header(field).unwrap_or_else(|| other.to_string()),
                TagSource::Metadata(filter, path, other) => match self.info.metadata.at(filter, path) {
                    Some(serde_json::Value::String(text)) => text.clone(),
                    Some(value) => value.to_string(),
                    None => other.to_string(),
                },
            };
            tags.push((name.to_string().into(), value.into()));
        }
    }

    fn header(&self, name: &str) -> Option<String> {
        self.head.header(name).map(|value| String::from_utf8_lossy(&value).into_owned())
    }

    /// *Source*: Envoy's `HttpTracerUtility`.
    fn tags(&self, worker: &Worker, conn: &Conn, tracing: &Tracing) -> Tags {
        let path = String::from_utf8_lossy(self.head.path());
        let path: String = path.chars().take(tracing.path_tag_max as usize).collect();
        let mut url = String::new();
        _ = write!(url, "{}://{}{path}", self.head.scheme.as_str(), self.head.authority_str());
        let mut tags: Tags = vec![
            ("component".into(), "proxy".into()),
            ("node_id".into(), worker.config().node.id.clone()),
            ("guid:x-request-id".into(), self.header("x-request-id").unwrap_or_default().into()),
            ("http.url".into(), url.into()),
            ("http.method".into(), self.head.method().into()),
            (
                "downstream_cluster".into(),
                self.header("x-envoy-downstream-service-cluster").unwrap_or_else(|| "-".into()).into(),
            ),
            ("user_agent".into(), self.header("user-agent").unwrap_or_else(|| "-".into()).into()),
            ("http.protocol".into(), self.head.version.as_str().into()),
            ("peer.address".into(), conn.facts.peer.ip().to_string().into()),
            ("request_size".into(), self.counts.request_bytes.to_string().into()),
            ("response_size".into(), self.counts.response_bytes.to_string().into()),
        ];
        self.outcome(&mut tags);
        let own = &worker.shared.own_peer;
        for (name, value) in [
            ("istio.canonical_service", &own.canonical_service),
            ("istio.canonical_revision", &own.canonical_revision),
            ("istio.namespace", &own.namespace),
        ] {
            if !worker.shared.is_standalone && !tracing.tags.iter().any(|(tag, _)| &**tag == name) {
                tags.push((name.into(), value.clone()));
            }
        }
        self.custom(tracing, &mut tags);
        tags
    }
}

/// Sends finished spans to their collectors, for ever; the second call of a proxy has nothing to send.
pub async fn export(shared: Arc<Shared>) {
    let Some(mut spans) = shared.spans.take() else { return };
    let (config, recorder) = (Arc::clone(&shared.published), shared.metrics.recorder());
    while let Some((tracing, first)) = spans.recv().await {
        let mut batch = vec![first];
        let until = tokio::time::Instant::now() + PATIENCE;
        let mut next = None;
        while batch.len() < BATCH_MAX {
            match tokio::time::timeout_at(until, spans.recv()).await {
                Ok(Some((other, span))) if Arc::ptr_eq(&other, &tracing) || other.provider == tracing.provider => {
                    batch.push(span);
                }
                Ok(Some(other)) => {
                    next = Some(other);
                    break;
                }
                Ok(None) | Err(_) => break,
            }
        }
        for (tracing, batch) in
            std::iter::once((tracing, batch)).chain(next.map(|(tracing, span)| (tracing, vec![span])))
        {
            let now = config.load_full();
            let sending = send(&shared, &now, &tracing, &batch);
            let sent =
                tokio::time::timeout(CALL_MAX, sending).await.unwrap_or_else(|_| Err("it takes too long".into()));
            if let Err(reason) = sent {
                recorder.add(Counter::SpansDropped, batch.len() as u64);
                tracing::debug!(reason, "spans were not taken by their collector");
            }
        }
    }
}

async fn send(shared: &Shared, config: &RuntimeConfig, tracing: &Tracing, spans: &[Span]) -> Result<(), String> {
    let Some(TraceProvider::Zipkin { cluster, host, path, long_ids, .. }) = &tracing.provider else {
        return Err("only Zipkin is built".into());
    };
    let found = config.clusters.get(cluster).ok_or("the collector's cluster is unknown")?;
    let set = config.endpoints_of(found).ok_or("the collector has no endpoint")?;
    let endpoint = set
        .iter()
        .find(|endpoint| endpoint.health == engine::cluster::Health::Healthy)
        .ok_or("the collector has no endpoint")?;
    if found.transport_for(Some(endpoint)).is_some_and(|transport| transport.tls.is_some()) {
        return Err("a collector behind TLS is not built".into());
    }
    let address = endpoint.address.ip().ok_or("the collector has no TCP address")?;
    let how = How { mark: marks::PROXY, bind: None, keepalive: None };
    let stream = shared.dialer.connect(address, &how).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let body = Full::new(Bytes::from(encode(spans, !long_ids)));
    let request = hyper::Request::post(&**path)
        .header("host", &**host)
        .header("content-type", "application/json")
        .body(body)
        .map_err(|error| error.to_string())?;
    let calling = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        response.into_body().collect().await.map_err(|error| error.to_string())?;
        if status.is_success() { Ok(()) } else { Err(format!("it answers {status}")) }
    };
    // the connection moves the call along; it never ends first unless it failed
    tokio::select! {
        biased;
        answered = calling => answered,
        ended = connection => Err(ended.err().map_or_else(|| "it closed".to_owned(), |error| error.to_string())),
    }
}
