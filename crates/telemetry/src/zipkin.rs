//! Spans in Zipkin's JSON, version 2.
//!
//! *Source*: Zipkin API v2, `POST /api/v2/spans`.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

/// Which end of a call a span describes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpanKind {
    /// The caller's.
    Client,
    /// The called one's.
    Server,
}

/// A finished span.
#[derive(Clone, Debug)]
pub struct Span {
    /// Trace.
    pub trace_id: u128,
    /// This span.
    pub id: u64,
    /// Its parent; `None` at the root.
    pub parent_id: Option<u64>,
    /// Client or server.
    pub kind: SpanKind,
    /// A server's side of a span that its client began.
    pub shared: bool,
    /// Operation: `host:port/*`.
    pub name: Box<str>,
    /// Start, microseconds since 1970.
    pub timestamp_us: u64,
    /// Length, microseconds, at least 1.
    pub duration_us: u64,
    /// `<canonical or app>.<namespace>`.
    pub service_name: Arc<str>,
    /// Address of the proxy.
    pub local: Option<SocketAddr>,
    /// Tags in order.
    pub tags: Vec<(Cow<'static, str>, Box<str>)>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonSpan<'a> {
    trace_id: String,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_id: Option<String>,
    name: &'a str,
    kind: &'static str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    shared: bool,
    timestamp: u64,
    duration: u64,
    local_endpoint: Endpoint<'a>,
    #[serde(serialize_with = "as_map")]
    tags: &'a [(Cow<'static, str>, Box<str>)],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint<'a> {
    service_name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ipv4: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ipv6: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

fn as_map<S: serde::Serializer>(tags: &&[(Cow<'static, str>, Box<str>)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(tags.iter().map(|(name, value)| (name, value)))
}

/// Encodes a batch as one JSON array.
///
/// *Shape*: trace ids have 32 digits, or 16 when `short_ids` and the upper half is zero.
pub fn encode(spans: &[Span], short_ids: bool) -> Vec<u8> {
    let json: Vec<JsonSpan<'_>> = spans
        .iter()
        .map(|span| JsonSpan {
            trace_id: if short_ids && span.trace_id >> 64 == 0 {
                format!("{:016x}", span.trace_id)
            } else {
                format!("{:032x}", span.trace_id)
            },
            id: format!("{:016x}", span.id),
            parent_id: span.parent_id.map(|id| format!("{id:016x}")),
            name: &span.name,
            kind: match span.kind {
                SpanKind::Client => "CLIENT",
                SpanKind::Server => "SERVER",
            },
            shared: span.shared,
            timestamp: span.timestamp_us,
            duration: span.duration_us.max(1),
            local_endpoint: Endpoint {
                service_name: &span.service_name,
                ipv4: span.local.map(|at| at.ip()).filter(IpAddr::is_ipv4).map(|ip| ip.to_string()),
                ipv6: span.local.map(|at| at.ip()).filter(IpAddr::is_ipv6).map(|ip| ip.to_string()),
                port: span.local.map(|at| at.port()).filter(|port| *port != 0),
            },
            tags: &span.tags,
        })
        .collect();
    serde_json::to_vec(&json).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_span() {
        let span = Span {
            trace_id: 1,
            id: 2,
            parent_id: Some(3),
            kind: SpanKind::Server,
            shared: false,
            name: "reviews:9080/*".into(),
            timestamp_us: 10,
            duration_us: 0,
            service_name: "reviews.shop".into(),
            local: Some("10.0.0.1:9080".parse().unwrap()),
            tags: vec![("http.method".into(), "GET".into())],
        };
        let text = String::from_utf8(encode(&[span], false)).unwrap();
        assert_eq!(
            text,
            r#"[{"traceId":"00000000000000000000000000000001","id":"0000000000000002","parentId":"0000000000000003","name":"reviews:9080/*","kind":"SERVER","timestamp":10,"duration":1,"localEndpoint":{"serviceName":"reviews.shop","ipv4":"10.0.0.1","port":9080},"tags":{"http.method":"GET"}}]"#
        );
    }
}
