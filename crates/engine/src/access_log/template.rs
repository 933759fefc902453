//! Text with command operators.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::Value;
use types::Fields;

use super::{LogRecord, flags};
use crate::cluster::Address;
use crate::digits::{put_ip, put_number};
use crate::unsupported::Unsupported;
use crate::worker::civil;

/// A compiled text with operators.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text(Box<str>),
    Operator(Operator, Option<usize>),
}

/// How a moment is written.
#[derive(Debug, Clone, PartialEq)]
enum TimeFormat {
    /// `2016-12-15T16:07:14.321Z`
    Iso,
    /// `strftime`, with `%3f`, `%6f`, `%9f`, `%s` for parts of it.
    Strftime(Box<str>),
}

/// Which side of an address.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Both,
    Ip,
    Port,
}

#[derive(Debug, Clone, PartialEq)]
enum Operator {
    StartTime(TimeFormat),
    Request(Box<str>, Option<Box<str>>),
    Response(Box<str>, Option<Box<str>>),
    Trailer(Box<str>, Option<Box<str>>),
    Protocol,
    UpstreamProtocol,
    ResponseCode,
    ResponseFlags,
    ResponseCodeDetails,
    TerminationDetails,
    TransportFailure,
    DownstreamTransportFailure,
    BytesReceived,
    BytesSent,
    Duration,
    RequestDuration,
    ResponseDuration,
    ResponseTxDuration,
    UpstreamHost(Side),
    UpstreamCluster,
    UpstreamClusterRaw,
    UpstreamLocal(Side),
    DownstreamLocal(Side),
    DownstreamRemote(Side),
    DownstreamDirect(Side),
    ServerName,
    RouteName,
    VirtualHostName,
    AttemptCount,
    ConnectionId,
    GrpcStatus,
    PeerUriSan,
    PeerDnsSan,
    PeerSubject,
    PeerFingerprint,
    LocalUriSan,
    TlsVersion,
    TlsCipher,
    FilterChainName,
    Metadata(Box<str>, Vec<Box<str>>),
    /// Known to Envoy, never known here.
    Absent,
}

/// A value of an operator.
enum Found<'a> {
    Nothing,
    Number(u64),
    Bytes(std::borrow::Cow<'a, [u8]>),
    Address(SocketAddr),
    Ip(IpAddr),
    Time(&'a TimeFormat, u64),
    Json(Value),
}

impl Found<'_> {
    /// Appends the text; without allocation for all that stands in Istio's default line.
    fn write(&self, absent: &[u8], out: &mut Vec<u8>) {
        match self {
            Self::Nothing => out.extend_from_slice(absent),
            Self::Number(number) => put_number(out, *number),
            Self::Bytes(bytes) => out.extend_from_slice(bytes),
            Self::Ip(ip) => put_ip(out, *ip),
            Self::Address(SocketAddr::V4(address)) => {
                put_ip(out, IpAddr::V4(*address.ip()));
                out.push(b':');
                put_number(out, address.port().into());
            }
            // Writing to memory cannot fail.
            Self::Address(SocketAddr::V6(address)) => _ = write!(out, "{address}"),
            Self::Time(TimeFormat::Iso, nanos) => put_iso(out, *nanos),
            Self::Time(TimeFormat::Strftime(format), nanos) => {
                out.extend_from_slice(strftime(format, *nanos).as_bytes());
            }
            Self::Json(Value::String(text)) => out.extend_from_slice(text.as_bytes()),
            Self::Json(value) => _ = write!(out, "{value}"),
        }
    }
}

/// `width` digits, with zeros in front.
fn put_padded<const WIDTH: usize>(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [b'0'; WIDTH];
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
    }
    out.extend_from_slice(&digits);
}

/// `2016-12-15T16:07:14.321Z`
fn put_iso(out: &mut Vec<u8>, nanos: u64) {
    let seconds = nanos / 1_000_000_000;
    let (year, month, day) = civil(seconds / 86_400);
    put_padded::<4>(out, year);
    out.push(b'-');
    put_padded::<2>(out, month);
    out.push(b'-');
    put_padded::<2>(out, day);
    for (mark, part) in [(b'T', seconds / 3600 % 24), (b':', seconds / 60 % 60), (b':', seconds % 60)] {
        out.push(mark);
        put_padded::<2>(out, part);
    }
    out.push(b'.');
    put_padded::<3>(out, nanos / 1_000_000 % 1000);
    out.push(b'Z');
}

fn text(value: impl Into<String>) -> Found<'static> {
    Found::Bytes(value.into().into_bytes().into())
}

fn known(value: &str) -> Found<'_> {
    if value.is_empty() { Found::Nothing } else { Found::Bytes(value.as_bytes().into()) }
}

impl Template {
    /// Compiles a text; `%%` is a percent sign.
    ///
    /// *Errors*: an operator that is not known.
    pub fn compile(source: &str) -> Result<Self, Unsupported> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = source;
        while let Some(at) = rest.find('%') {
            literal.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let end = operator_end(rest).ok_or_else(|| Unsupported::new("", format!("%{rest} is not ended by %")))?;
            let (operator, length) = operator(&rest[..end])?;
            rest = &rest[end + 1..];
            if !literal.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut literal).into()));
            }
            parts.push(Part::Operator(operator, length));
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Text(literal.into()));
        }
        Ok(Self { parts })
    }

    /// Whether it holds no operator.
    pub fn is_literal(&self) -> bool {
        self.parts.iter().all(|part| matches!(part, Part::Text(_)))
    }

    /// Appends the text; `-` for what is not known.
    pub fn text(&self, record: &LogRecord<'_>, out: &mut Vec<u8>) {
        self.text_with(record, b"-", out);
    }

    /// Appends the text; `absent` for what is not known.
    pub fn text_with(&self, record: &LogRecord<'_>, absent: &[u8], out: &mut Vec<u8>) {
        for part in &self.parts {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Operator(operator, length) => {
                    let start = out.len();
                    operator.find(record).write(absent, out);
                    if let Some(length) = length {
                        out.truncate(out.len().min(start + length));
                    }
                }
            }
        }
    }

    /// The value in a JSON line: a lone operator keeps its type, anything else is text.
    pub fn json(&self, record: &LogRecord<'_>) -> Value {
        if let [Part::Operator(operator, length)] = &self.parts[..] {
            let cut = |text: &str| match length {
                Some(length) => text.chars().take(*length).collect(),
                None => text.to_owned(),
            };
            return match operator.find(record) {
                Found::Nothing => Value::Null,
                Found::Number(number) => number.into(),
                Found::Json(value) => value,
                found => {
                    let mut bytes = Vec::new();
                    found.write(b"", &mut bytes);
                    cut(&String::from_utf8_lossy(&bytes)).into()
                }
            };
        }
        let mut bytes = Vec::new();
        self.text(record, &mut bytes);
        String::from_utf8_lossy(&bytes).into_owned().into()
    }
}

/// Where the operator's closing `%` is: the first one outside parentheses.
fn operator_end(rest: &str) -> Option<usize> {
    let mut depth = 0u32;
    for (at, byte) in rest.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'%' if depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

fn operator(source: &str) -> Result<(Operator, Option<usize>), Unsupported> {
    let unknown = || Unsupported::new("", format!("%{source}% is not supported"));
    let (name, argument, rest) = match source.find('(') {
        Some(open) => {
            let close = source.rfind(')').filter(|close| *close > open).ok_or_else(unknown)?;
            (&source[..open], Some(&source[open + 1..close]), &source[close + 1..])
        }
        None => source.find(':').map_or((source, None, ""), |at| (&source[..at], None, &source[at..])),
    };
    let length = match rest.strip_prefix(':') {
        Some(digits) => Some(digits.parse().map_err(|_| unknown())?),
        None if rest.is_empty() => None,
        None => return Err(unknown()),
    };
    let header = || -> Result<(Box<str>, Option<Box<str>>), Unsupported> {
        let (main, other) = match argument.ok_or_else(unknown)?.split_once('?') {
            Some((main, other)) => (main, Some(other)),
            None => (argument.unwrap_or_default(), None),
        };
        Ok((main.to_ascii_lowercase().into(), other.map(|other| other.to_ascii_lowercase().into())))
    };
    let operator = match name {
        "START_TIME" => Operator::StartTime(match argument {
            None | Some("") => TimeFormat::Iso,
            Some(format) => TimeFormat::Strftime(format.into()),
        }),
        "REQ" => header().map(|(main, other)| Operator::Request(main, other))?,
        "RESP" => header().map(|(main, other)| Operator::Response(main, other))?,
        "TRAILER" => header().map(|(main, other)| Operator::Trailer(main, other))?,
        "DYNAMIC_METADATA" => {
            let mut path = argument.ok_or_else(unknown)?.split(':').map(Box::from);
            Operator::Metadata(path.next().ok_or_else(unknown)?, path.collect())
        }
        // State that filters of others write; nobody writes it here.
        "FILTER_STATE" | "UPSTREAM_METADATA" | "UPSTREAM_FILTER_STATE" => Operator::Absent,
        _ if argument.is_some() => return Err(unknown()),
        "PROTOCOL" => Operator::Protocol,
        "UPSTREAM_PROTOCOL" => Operator::UpstreamProtocol,
        "RESPONSE_CODE" => Operator::ResponseCode,
        "RESPONSE_FLAGS" => Operator::ResponseFlags,
        "RESPONSE_CODE_DETAILS" => Operator::ResponseCodeDetails,
        "CONNECTION_TERMINATION_DETAILS" => Operator::TerminationDetails,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Operator::TransportFailure,
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => Operator::DownstreamTransportFailure,
        "BYTES_RECEIVED" => Operator::BytesReceived,
        "BYTES_SENT" => Operator::BytesSent,
        "DURATION" => Operator::Duration,
        "REQUEST_DURATION" => Operator::RequestDuration,
        "RESPONSE_DURATION" => Operator::ResponseDuration,
        "RESPONSE_TX_DURATION" => Operator::ResponseTxDuration,
        "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Operator::UpstreamHost(Side::Both),
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Operator::UpstreamHost(Side::Ip),
        "UPSTREAM_REMOTE_PORT" => Operator::UpstreamHost(Side::Port),
        "UPSTREAM_CLUSTER" => Operator::UpstreamCluster,
        "UPSTREAM_CLUSTER_RAW" => Operator::UpstreamClusterRaw,
        "UPSTREAM_LOCAL_ADDRESS" => Operator::UpstreamLocal(Side::Both),
        "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Operator::UpstreamLocal(Side::Ip),
        "UPSTREAM_LOCAL_PORT" => Operator::UpstreamLocal(Side::Port),
        "DOWNSTREAM_LOCAL_ADDRESS" => Operator::DownstreamLocal(Side::Both),
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Operator::DownstreamLocal(Side::Ip),
        "DOWNSTREAM_LOCAL_PORT" => Operator::DownstreamLocal(Side::Port),
        "DOWNSTREAM_REMOTE_ADDRESS" => Operator::DownstreamRemote(Side::Both),
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Operator::DownstreamRemote(Side::Ip),
        "DOWNSTREAM_REMOTE_PORT" => Operator::DownstreamRemote(Side::Port),
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Operator::DownstreamDirect(Side::Both),
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => Operator::DownstreamDirect(Side::Ip),
        "DOWNSTREAM_DIRECT_REMOTE_PORT" => Operator::DownstreamDirect(Side::Port),
        "REQUESTED_SERVER_NAME" => Operator::ServerName,
        "ROUTE_NAME" => Operator::RouteName,
        "VIRTUAL_HOST_NAME" => Operator::VirtualHostName,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Operator::AttemptCount,
        "CONNECTION_ID" => Operator::ConnectionId,
        "GRPC_STATUS" | "GRPC_STATUS_NUMBER" => Operator::GrpcStatus,
        "DOWNSTREAM_PEER_URI_SAN" => Operator::PeerUriSan,
        "DOWNSTREAM_PEER_DNS_SAN" => Operator::PeerDnsSan,
        "DOWNSTREAM_PEER_SUBJECT" => Operator::PeerSubject,
        "DOWNSTREAM_PEER_FINGERPRINT_256" => Operator::PeerFingerprint,
        "DOWNSTREAM_LOCAL_URI_SAN" => Operator::LocalUriSan,
        "DOWNSTREAM_TLS_VERSION" => Operator::TlsVersion,
        "DOWNSTREAM_TLS_CIPHER" => Operator::TlsCipher,
        "FILTER_CHAIN_NAME" => Operator::FilterChainName,
        "VIRTUAL_CLUSTER_NAME" | "HOSTNAME" | "TRACE_ID" => Operator::Absent,
        _ => return Err(unknown()),
    };
    Ok((operator, length))
}

fn millis(duration: Duration) -> Found<'static> {
    Found::Number(crate::digits::millis(duration))
}

fn address(address: SocketAddr, side: Side) -> Found<'static> {
    match side {
        Side::Both => Found::Address(address),
        Side::Ip => Found::Ip(address.ip()),
        Side::Port => Found::Number(address.port().into()),
    }
}

/// Of several occurrences the first, as Envoy formats it.
fn header<'a>(get: impl Fn(&str) -> Option<&'a [u8]>, main: &str, other: Option<&str>) -> Found<'a> {
    get(main).or_else(|| get(other?)).map_or(Found::Nothing, |value| Found::Bytes(value.into()))
}

impl Operator {
    fn find<'a>(&'a self, record: &LogRecord<'a>) -> Found<'a> {
        let LogRecord { conn, info, .. } = *record;
        let fields = |fields: Option<&'a Fields>, main: &str, other: &Option<Box<str>>| match fields {
            Some(fields) => header(|name| fields.get(name), main, other.as_deref()),
            None => Found::Nothing,
        };
        let peer = conn.peer_certificate();
        match self {
            Self::StartTime(format) => Found::Time(format, record.start_nanos),
            Self::Request(main, other) => match record.request {
                Some(head) => header(|name| head.first(name), main, other.as_deref()),
                None => Found::Nothing,
            },
            Self::Response(main, _) if &**main == ":status" => Found::Number(status(record)),
            Self::Response(main, other) => fields(record.response.map(|head| &head.fields), main, other),
            Self::Trailer(main, other) => fields(record.trailers, main, other),
            Self::Protocol => record.request.map_or(Found::Nothing, |head| known(head.version.as_str())),
            Self::UpstreamProtocol => record.upstream_protocol.map_or(Found::Nothing, |v| known(v.as_str())),
            Self::ResponseCode => Found::Number(status(record)),
            // Never absent, in JSON neither.
            Self::ResponseFlags => flags(info).map_or_else(|| known("-"), text),
            Self::ResponseCodeDetails => known(info.details.as_str()),
            Self::TerminationDetails => known(info.termination.as_str()),
            // One word, as Envoy writes it: lines are split at spaces.
            Self::TransportFailure if info.transport_failure.is_empty() => Found::Nothing,
            Self::TransportFailure => text(info.transport_failure.replace(' ', "_")),
            Self::DownstreamTransportFailure => known(record.downstream_failure),
            Self::BytesReceived => Found::Number(record.bytes_received),
            Self::BytesSent => Found::Number(record.bytes_sent),
            Self::Duration => millis(record.duration),
            Self::RequestDuration => record.request_duration.map_or(Found::Nothing, millis),
            Self::ResponseDuration => record.response_duration.map_or(Found::Nothing, millis),
            Self::ResponseTxDuration => match record.response_duration {
                Some(first) => millis(record.duration.saturating_sub(first)),
                None => Found::Nothing,
            },
            Self::UpstreamHost(side) => match info.picked.as_ref().map(|picked| &picked.host.address) {
                Some(Address::Ip(at)) => address(*at, *side),
                Some(Address::Unix(path)) => text(path.to_string()),
                None => Found::Nothing,
            },
            // A name that no cluster has is none, as Envoy has it.
            Self::UpstreamCluster => info.cluster.as_ref().map_or(Found::Nothing, |cluster| known(&cluster.shown_name)),
            Self::UpstreamClusterRaw => info.cluster.as_ref().map_or(Found::Nothing, |cluster| known(&cluster.name)),
            Self::UpstreamLocal(side) => record.upstream_local.map_or(Found::Nothing, |at| address(at, *side)),
            Self::DownstreamLocal(side) => address(conn.local, *side),
            Self::DownstreamRemote(side) => address(info.client_address.unwrap_or(conn.peer), *side),
            Self::DownstreamDirect(side) => address(conn.direct_peer, *side),
            Self::ServerName => conn.server_name.as_deref().map_or(Found::Nothing, known),
            Self::RouteName => info.route_name.as_deref().map_or(Found::Nothing, known),
            Self::VirtualHostName => info.virtual_host.as_deref().map_or(Found::Nothing, known),
            Self::AttemptCount => Found::Number(info.attempts.into()),
            Self::ConnectionId => Found::Number(record.connection_id),
            Self::GrpcStatus => {
                let status = record.trailers.and_then(|trailers| trailers.get("grpc-status"));
                let status = status.or_else(|| record.response.and_then(|head| head.fields.get("grpc-status")));
                status.map_or(Found::Nothing, |status| Found::Bytes(status.into()))
            }
            Self::PeerUriSan => peer.map_or(Found::Nothing, |peer| known_list(&peer.uri_sans)),
            Self::PeerDnsSan => peer.map_or(Found::Nothing, |peer| known_list(&peer.dns_sans)),
            Self::PeerSubject => peer.map_or(Found::Nothing, |peer| known(&peer.subject)),
            Self::PeerFingerprint => peer.map_or(Found::Nothing, |peer| known(&peer.sha256)),
            Self::LocalUriSan => {
                conn.tls.as_ref().and_then(|tls| tls.local_uri_san.as_deref()).map_or(Found::Nothing, known)
            }
            Self::TlsVersion => conn.tls.as_ref().map_or(Found::Nothing, |tls| known(tls.version)),
            Self::TlsCipher => conn.tls.as_ref().map_or(Found::Nothing, |tls| known(tls.cipher)),
            Self::FilterChainName => known(record.chain),
            Self::Metadata(filter, path) => {
                info.metadata.at(filter, path).map_or(Found::Nothing, |value| Found::Json(value.clone()))
            }
            Self::Absent => Found::Nothing,
        }
    }
}

fn status(record: &LogRecord<'_>) -> u64 {
    record.response.map_or(0, |head| head.status.into())
}

fn known_list(list: &[Box<str>]) -> Found<'static> {
    if list.is_empty() { Found::Nothing } else { text(list.join(",")) }
}

/// `strftime` of a Unix time, with what Envoy adds for parts of a second.
fn strftime(format: &str, nanos: u64) -> String {
    let seconds = nanos / 1_000_000_000;
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let fraction = nanos % 1_000_000_000;
    let mut out = String::with_capacity(32);
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let take = if rest.starts_with(|c: char| c.is_ascii_digit()) { 2 } else { 1 };
        let Some((directive, after)) = rest.split_at_checked(take.min(rest.len())) else { break };
        rest = after;
        let text = match directive {
            "Y" => format!("{year:04}"),
            "m" => format!("{month:02}"),
            "d" => format!("{day:02}"),
            "H" => format!("{hour:02}"),
            "M" => format!("{minute:02}"),
            "S" => format!("{second:02}"),
            "F" => format!("{year:04}-{month:02}-{day:02}"),
            "T" => format!("{hour:02}:{minute:02}:{second:02}"),
            "s" => seconds.to_string(),
            "z" => "+0000".to_owned(),
            "Z" => "UTC".to_owned(),
            "f" | "9f" => format!("{fraction:09}"),
            "3f" => format!("{:03}", fraction / 1_000_000),
            "6f" => format!("{:06}", fraction / 1000),
            "%" => "%".to_owned(),
            other => format!("%{other}"),
        };
        out.push_str(&text);
    }
    out.push_str(rest);
    out
}
