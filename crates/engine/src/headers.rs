//! Header edits of routes, and Envoy's formatters inside their values.
//!
//! A value such as `%REQ(x-user)%, via %PROTOCOL%` is compiled once into a [`Template`]. One that
//! yields nothing adds nothing, unless asked to keep empty values.
//!
//! *Source*: Envoy, "Custom request/response headers" and "Access logging: command operators".
//! Within one level, removals come first; values are computed before any edit of the level.

use std::fmt::Write as _;

use envoy_types::pb::envoy::config::core::v3 as core;
use serde_json::Value;
use smallvec::SmallVec;
use types::{Fields, RequestHead, ResponseHead};

use crate::exchange::StreamInfo;
use crate::facts::{ConnFacts, Now};
use crate::unsupported::{Unsupported, Within as _, each};

/// What formatters may read.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The connection.
    pub conn: &'a ConnFacts,
    /// The request so far.
    pub info: &'a StreamInfo,
    /// The moment.
    pub now: Now,
}

impl<'a> Context<'a> {
    /// From its parts.
    pub fn new(conn: &'a ConnFacts, info: &'a StreamInfo, now: Now) -> Self {
        Self { conn, info, now }
    }
}

/// A text with commands in `%…%`; `%%` is a percent sign. `T` is what a command means.
#[derive(Clone, PartialEq, Debug)]
pub struct Template<T> {
    parts: Vec<Part<T>>,
}

#[derive(Clone, PartialEq, Debug)]
enum Part<T> {
    Literal(Box<str>),
    Command { means: T, bytes_max: Option<usize> },
}

impl<T> Template<T> {
    /// Parses `text`; `command` gives a command its meaning from its name and what stands in
    /// brackets.
    pub fn parse(
        text: &str,
        command: impl Fn(&str, Option<&str>) -> Result<T, Unsupported>,
    ) -> Result<Self, Unsupported> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('%') {
            literal.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let (found, after) = Found::read(rest)
                .ok_or_else(|| Unsupported::new("", format!("{text:?} has a % that begins no command")))?;
            if !literal.is_empty() {
                parts.push(Part::Literal(std::mem::take(&mut literal).into()));
            }
            parts.push(Part::Command { means: command(found.name, found.argument)?, bytes_max: found.bytes_max });
            rest = after;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal.into()));
        }
        Ok(Self { parts })
    }

    /// The text, if it has no command.
    pub fn literal(&self) -> Option<&str> {
        match &self.parts[..] {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// Appends the text to `out`. `write` appends a command's value and says whether there is one;
    /// `missing` stands for one that is not there.
    pub fn render(&self, out: &mut Vec<u8>, missing: &[u8], mut write: impl FnMut(&T, &mut Vec<u8>) -> bool) {
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.extend_from_slice(text.as_bytes()),
                Part::Command { means, bytes_max } => {
                    let start = out.len();
                    if !write(means, out) {
                        out.truncate(start);
                        out.extend_from_slice(missing);
                    }
                    if let Some(most) = bytes_max {
                        out.truncate(out.len().min(start + most));
                    }
                }
            }
        }
    }
}

struct Found<'a> {
    name: &'a str,
    argument: Option<&'a str>,
    bytes_max: Option<usize>,
}

impl<'a> Found<'a> {
    /// `NAME`, `NAME(argument)` or `NAME(argument):length`, and what follows the closing `%`.
    fn read(text: &'a str) -> Option<(Self, &'a str)> {
        let end = text.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))?;
        let (name, rest) = text.split_at(end);
        if name.is_empty() {
            return None;
        }
        let (argument, rest) = match rest.strip_prefix('(') {
            None => (None, rest),
            Some(inner) => {
                // Times may hold `)`: the argument ends at the bracket that a `%` or `:` follows.
                let close = inner
                    .match_indices(')')
                    .map(|(at, _)| at)
                    .find(|at| matches!(inner.as_bytes().get(at + 1), Some(b'%' | b':')))?;
                (Some(&inner[..close]), &inner[close + 1..])
            }
        };
        let (bytes_max, rest) = match rest.strip_prefix(':') {
            None => (None, rest),
            Some(rest) => {
                let end = rest.find('%')?;
                (Some(rest[..end].parse().ok()?), &rest[end..])
            }
        };
        Some((Self { name, argument, bytes_max }, rest.strip_prefix('%')?))
    }
}

/// A command that header values may hold.
#[derive(Clone, PartialEq, Debug)]
pub enum Operator {
    /// A request header, else another one.
    Req(Box<str>, Option<Box<str>>),
    /// A response header, else another one.
    Resp(Box<str>, Option<Box<str>>),
    /// Dynamic metadata by filter and path.
    Metadata(Box<str>, Vec<Box<str>>),
    /// One that has no argument.
    Plain(Plain),
}

macro_rules! plain {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)*) => {
        /// A command without argument.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Plain { $($(#[doc = $doc])+ $name,)* }

        impl Plain {
            /// By Envoy's name.
            pub fn parse(name: &str) -> Option<Self> {
                Some(match name { $($text => Self::$name,)* _ => return None })
            }
        }
    };
}

plain! {
    /// HTTP version of the request.
    Protocol = "PROTOCOL",
    /// The client's address and port.
    RemoteAddress = "DOWNSTREAM_REMOTE_ADDRESS",
    /// The client's address.
    RemoteIp = "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT",
    /// The client's port.
    RemotePort = "DOWNSTREAM_REMOTE_PORT",
    /// The peer's address and port.
    DirectAddress = "DOWNSTREAM_DIRECT_REMOTE_ADDRESS",
    /// The peer's address.
    DirectIp = "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT",
    /// Our address and port.
    LocalAddress = "DOWNSTREAM_LOCAL_ADDRESS",
    /// Our address.
    LocalIp = "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT",
    /// Our port.
    LocalPort = "DOWNSTREAM_LOCAL_PORT",
    /// Server name of the handshake.
    ServerName = "REQUESTED_SERVER_NAME",
    /// URI SANs of the peer.
    PeerUriSan = "DOWNSTREAM_PEER_URI_SAN",
    /// Subject of the peer.
    PeerSubject = "DOWNSTREAM_PEER_SUBJECT",
    /// Digest of the peer's certificate.
    PeerFingerprint = "DOWNSTREAM_PEER_FINGERPRINT_256",
    /// URI SANs of our own certificate.
    LocalUriSan = "DOWNSTREAM_LOCAL_URI_SAN",
    /// TLS version.
    TlsVersion = "DOWNSTREAM_TLS_VERSION",
    /// Cipher suite.
    TlsCipher = "DOWNSTREAM_TLS_CIPHER",
    /// Name of the route.
    RouteName = "ROUTE_NAME",
    /// The endpoint.
    UpstreamHost = "UPSTREAM_HOST",
    /// The endpoint's address and port.
    UpstreamAddress = "UPSTREAM_REMOTE_ADDRESS",
    /// The cluster.
    UpstreamCluster = "UPSTREAM_CLUSTER",
    /// The cluster's own name.
    UpstreamClusterRaw = "UPSTREAM_CLUSTER_RAW",
    /// Attempts made.
    AttemptCount = "UPSTREAM_REQUEST_ATTEMPT_COUNT",
    /// Status of the response.
    ResponseCode = "RESPONSE_CODE",
    /// Why that status.
    ResponseCodeDetails = "RESPONSE_CODE_DETAILS",
    /// Response flags.
    ResponseFlags = "RESPONSE_FLAGS",
    /// When, in UTC, to the millisecond.
    StartTime = "START_TIME",
}

impl Operator {
    /// Gives a command its meaning.
    pub fn parse(name: &str, argument: Option<&str>) -> Result<Self, Unsupported> {
        let not_built = || Unsupported::new("", format!("the formatter %{name}% is not supported"));
        let header = |argument: Option<&str>| {
            let text = argument.filter(|text| !text.is_empty()).ok_or_else(not_built)?;
            let (first, second) = text.split_once('?').map_or((text, None), |(first, second)| (first, Some(second)));
            Ok((first.to_ascii_lowercase().into(), second.map(|second| second.to_ascii_lowercase().into())))
        };
        match (name, argument) {
            ("REQ", argument) => header(argument).map(|(first, second)| Self::Req(first, second)),
            ("RESP", argument) => header(argument).map(|(first, second)| Self::Resp(first, second)),
            ("DYNAMIC_METADATA", Some(text)) => {
                let mut parts = text.split(':').map(Into::into);
                let filter = parts.next().ok_or_else(not_built)?;
                let path: Vec<_> = parts.collect();
                if path.is_empty() { Err(not_built()) } else { Ok(Self::Metadata(filter, path)) }
            }
            (name, None) => Plain::parse(name).map(Self::Plain).ok_or_else(not_built),
            _ => Err(not_built()),
        }
    }

    pub(crate) fn write(&self, heads: Heads<'_>, context: &Context<'_>, out: &mut Vec<u8>) -> bool {
        let bytes = |value: Option<&[u8]>, out: &mut Vec<u8>| {
            out.extend_from_slice(value.unwrap_or_default());
            value.is_some_and(|value| !value.is_empty())
        };
        match self {
            Self::Req(first, second) => {
                let value =
                    heads.request.first(first).or_else(|| second.as_ref().and_then(|name| heads.request.first(name)));
                bytes(value, out)
            }
            Self::Resp(first, second) => {
                let Some(response) = heads.response else { return false };
                if &**first == ":status" {
                    return bytes(Some(response.status.to_string().as_bytes()), out);
                }
                let fields = &response.fields;
                bytes(fields.get(first).or_else(|| second.as_ref().and_then(|name| fields.get(name))), out)
            }
            Self::Metadata(filter, path) => match context.info.metadata.at(filter, path) {
                None | Some(Value::Null) => false,
                Some(Value::String(text)) => bytes(Some(text.as_bytes()), out),
                Some(other) => bytes(Some(other.to_string().as_bytes()), out),
            },
            Self::Plain(plain) => {
                let mut text = String::new();
                plain.write(heads, context, &mut text);
                bytes(Some(text.as_bytes()), out)
            }
        }
    }
}

/// The heads that formatters may read.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    pub(crate) request: &'a RequestHead,
    pub(crate) response: Option<&'a ResponseHead>,
}

impl Plain {
    /// Appends the value, or nothing.
    fn write(self, heads: Heads<'_>, context: &Context<'_>, out: &mut String) {
        let Context { conn, info, now } = context;
        let peer = conn.peer_certificate();
        let tls = conn.tls.as_deref();
        let client = info.client_address.unwrap_or(conn.peer);
        let mut put = |value: &dyn std::fmt::Display| {
            // Writing to a string cannot fail.
            let written = write!(out, "{value}");
            debug_assert!(written.is_ok());
        };
        match self {
            Self::Protocol => put(&heads.request.version.as_str()),
            Self::RemoteAddress => put(&client),
            Self::RemoteIp => put(&client.ip()),
            Self::RemotePort => put(&client.port()),
            Self::DirectAddress => put(&conn.direct_peer),
            Self::DirectIp => put(&conn.direct_peer.ip()),
            Self::LocalAddress => put(&conn.local),
            Self::LocalIp => put(&conn.local.ip()),
            Self::LocalPort => put(&conn.local.port()),
            Self::ServerName => put(&conn.server_name.as_deref().unwrap_or_default()),
            Self::PeerUriSan => put(&peer.map(|peer| peer.uri_sans.join(",")).unwrap_or_default()),
            Self::PeerSubject => put(&peer.map(|peer| &*peer.subject).unwrap_or_default()),
            Self::PeerFingerprint => put(&peer.map(|peer| &*peer.sha256).unwrap_or_default()),
            Self::LocalUriSan => put(&tls.and_then(|tls| tls.local_uri_san.as_deref()).unwrap_or_default()),
            Self::TlsVersion => put(&tls.map(|tls| tls.version).unwrap_or_default()),
            Self::TlsCipher => put(&tls.map(|tls| tls.cipher).unwrap_or_default()),
            Self::RouteName => put(&info.route_name.as_deref().unwrap_or_default()),
            Self::UpstreamHost | Self::UpstreamAddress => {
                if let Some(picked) = &info.picked {
                    put(&picked.host.address);
                }
            }
            Self::UpstreamCluster => {
                put(&info.cluster.as_ref().map(|cluster| &*cluster.shown_name).unwrap_or_default());
            }
            Self::UpstreamClusterRaw => {
                put(&info.cluster.as_ref().map(|cluster| &*cluster.name).unwrap_or_default());
            }
            Self::AttemptCount => put(&info.attempts),
            // As Envoy has it: an answer of our own has no status yet when it is edited.
            Self::ResponseCode => {
                let upstream = heads.response.filter(|_| info.details.as_str() == "via_upstream");
                put(&upstream.map_or(0, |response| response.status));
            }
            Self::ResponseCodeDetails => put(&info.details.as_str()),
            Self::ResponseFlags => {
                let flags: Vec<_> =
                    info.causes.iter().map(|cause| cause.surface().flag).filter(|flag| *flag != "-").collect();
                put(&if flags.is_empty() { "-".to_owned() } else { flags.join(",") });
            }
            Self::StartTime => put(&utc(*now)),
        }
    }
}

/// `2026-11-25T04:05:06.789Z`
fn utc(now: Now) -> String {
    let seconds = now.wall_seconds();
    let (year, month, day) = crate::worker::civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let milliseconds = now.wall_nanos / 1_000_000 % 1000;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

/// Edits of one level.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderEdits {
    add: Vec<Addition>,
    remove: Vec<Box<str>>,
}

/// A field to add, and how.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Addition {
    name: Box<str>,
    value: Template<Operator>,
    action: Action,
    keep_empty: bool,
}

/// What an addition does to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Append,
    AddIfAbsent,
    Overwrite,
    OverwriteIfExists,
}

/// The name, lower case; the fields that steer the request itself cannot be edited.
pub(crate) fn field_name(text: &str) -> Result<Box<str>, Unsupported> {
    if text.is_empty() || text.starts_with(':') || text.eq_ignore_ascii_case("host") {
        return Err(Unsupported::new("", format!("{text:?} cannot be edited")));
    }
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if !text.bytes().all(is_token) {
        return Err(Unsupported::new("", format!("{text:?} is not a header name")));
    }
    Ok(text.to_ascii_lowercase().into())
}

fn addition(proto: &core::HeaderValueOption) -> Result<Addition, Unsupported> {
    use core::header_value_option::HeaderAppendAction;
    let header = proto.header.as_ref().ok_or_else(|| Unsupported::missing("header"))?;
    let text = if header.raw_value.is_empty() {
        &*header.value
    } else {
        std::str::from_utf8(&header.raw_value).map_err(|_| Unsupported::new("header.raw_value", "is not UTF-8"))?
    };
    if text.contains(['\r', '\n', '\0']) {
        return Err(Unsupported::new("header.value", "holds a line break or NUL"));
    }
    let action = match HeaderAppendAction::try_from(proto.append_action) {
        Ok(HeaderAppendAction::AppendIfExistsOrAdd) => append(proto),
        Ok(HeaderAppendAction::AddIfAbsent) => Action::AddIfAbsent,
        Ok(HeaderAppendAction::OverwriteIfExistsOrAdd) => Action::Overwrite,
        Ok(HeaderAppendAction::OverwriteIfExists) => Action::OverwriteIfExists,
        Err(_) => return Err(Unsupported::new("append_action", "is unknown")),
    };
    Ok(Addition {
        name: field_name(&header.key).within("header.key")?,
        value: Template::parse(text.trim_matches([' ', '\t']), Operator::parse).within("header.value")?,
        action,
        keep_empty: proto.keep_empty_value,
    })
}

#[expect(deprecated, reason = "the older field still says the same")]
fn append(proto: &core::HeaderValueOption) -> Action {
    if proto.append.as_ref().is_some_and(|append| !append.value) { Action::Overwrite } else { Action::Append }
}

impl HeaderEdits {
    /// Lowers additions and removals.
    pub fn lower(add: &[core::HeaderValueOption], remove: &[String]) -> Result<Self, Unsupported> {
        Ok(Self { add: each(add, "", addition)?, remove: each(remove, "remove", |text| field_name(text))? })
    }

    /// Whether nothing is edited.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }

    /// Edits a request.
    pub fn apply_request(&self, head: &mut RequestHead, context: &Context<'_>) {
        if self.is_empty() {
            return;
        }
        for name in &self.remove {
            head.fields.remove(name);
        }
        let values = self.values(Heads { request: head, response: None }, context);
        self.add_all(&values, &mut head.fields);
    }

    /// Edits a response.
    pub fn apply_response(&self, head: &mut ResponseHead, request: &RequestHead, context: &Context<'_>) {
        if self.is_empty() {
            return;
        }
        for name in &self.remove {
            head.fields.remove(name);
        }
        let values = self.values(Heads { request, response: Some(head) }, context);
        self.add_all(&values, &mut head.fields);
    }

    /// One value an addition; `None` for a literal.
    fn values(&self, heads: Heads<'_>, context: &Context<'_>) -> SmallVec<[Option<Vec<u8>>; 4]> {
        self.add.iter().map(|addition| addition.rendered(heads, context)).collect()
    }

    /// Overwrites, and then adds, whatever their order; what is there counts as it was before.
    ///
    /// *Source*: Envoy `HeaderParser::evaluateHeaders`.
    fn add_all(&self, values: &[Option<Vec<u8>>], fields: &mut Fields) {
        let all = || self.add.iter().zip(values);
        let wanted: SmallVec<[bool; 4]> = all().map(|(addition, _)| addition.is_wanted(fields)).collect();
        for overwrites in [true, false] {
            let of_pass = all()
                .zip(&wanted)
                .filter(|((addition, _), wanted)| **wanted && addition.action.overwrites() == overwrites);
            for ((addition, value), _) in of_pass {
                addition.write(value.as_deref(), fields);
            }
        }
    }
}

impl Action {
    fn overwrites(self) -> bool {
        matches!(self, Self::Overwrite | Self::OverwriteIfExists)
    }
}

impl Addition {
    pub(crate) fn lower(proto: &core::HeaderValueOption) -> Result<Self, Unsupported> {
        addition(proto)
    }

    /// The value; `None` if it is a literal.
    pub(crate) fn rendered(&self, heads: Heads<'_>, context: &Context<'_>) -> Option<Vec<u8>> {
        if self.value.literal().is_some() {
            return None;
        }
        let mut value = Vec::new();
        self.value.render(&mut value, b"", |operator, out| operator.write(heads, context, out));
        Some(value)
    }

    /// Adds the field with what [`Self::rendered`] gave, if it is to be.
    pub(crate) fn put(&self, value: Option<&[u8]>, fields: &mut Fields) {
        if self.is_wanted(fields) {
            self.write(value, fields);
        }
    }

    /// Whether what is there lets it be added.
    fn is_wanted(&self, fields: &Fields) -> bool {
        match self.action {
            Action::Append | Action::Overwrite => true,
            Action::AddIfAbsent => !fields.contains(&self.name),
            Action::OverwriteIfExists => fields.contains(&self.name),
        }
    }

    fn write(&self, value: Option<&[u8]>, fields: &mut Fields) {
        let literal = self.value.literal().unwrap_or_default().as_bytes();
        let value = value.unwrap_or(literal).trim_ascii();
        let illegal = value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0));
        if illegal || (value.is_empty() && !self.keep_empty) {
            return;
        }
        if self.action.overwrites() {
            fields.set(&self.name, value);
        } else {
            fields.push(&self.name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use serde_json::json;

    use super::*;
    use crate::exchange::Details;
    use crate::facts::{PeerCertificate, TlsFacts};

    fn option(name: &str, value: &str, action: i32) -> core::HeaderValueOption {
        core::HeaderValueOption {
            header: Some(core::HeaderValue { key: name.into(), value: value.into(), raw_value: Vec::new() }),
            append_action: action,
            ..core::HeaderValueOption::default()
        }
    }

    fn conn() -> ConnFacts {
        let mut conn = ConnFacts::plaintext("l", "10.0.0.9:80".parse().unwrap(), "10.1.2.3:5555".parse().unwrap());
        let peer = PeerCertificate { uri_sans: vec!["spiffe://td/ns/a/sa/b".into()], ..PeerCertificate::default() };
        conn.tls = Some(Arc::new(TlsFacts { peer: Some(peer), version: "TLSv1.3", ..TlsFacts::default() }));
        conn
    }

    fn edited(add: &[core::HeaderValueOption], remove: &[&str], before: &[(&str, &str)]) -> String {
        let remove: Vec<String> = remove.iter().map(|name| (*name).to_owned()).collect();
        let edits = HeaderEdits::lower(add, &remove).unwrap();
        let mut head = RequestHead::new("GET", "h:80", "/p");
        for (name, value) in before {
            head.fields.push(name, value.as_bytes());
        }
        let mut info = StreamInfo::default();
        info.metadata.set("jwt", "payload", Arc::new(json!({"sub": "me", "n": 1, "bad": "a\r\nb: c"})));
        let now = Now { mono: Instant::now(), wall_nanos: 1_700_000_000_123_000_000 };
        edits.apply_request(&mut head, &Context::new(&conn(), &info, now));
        let list: Vec<_> =
            head.fields.iter().map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value))).collect();
        list.join("; ")
    }

    #[test]
    fn actions() {
        let check = |action: i32, before: &[(&str, &str)], expect: &str| {
            assert_eq!(edited(&[option("X-A", "2", action)], &[], before), expect, "{action}");
        };
        check(0, &[], "x-a: 2");
        check(0, &[("x-a", "1")], "x-a: 1; x-a: 2");
        let several = [("x-b", "1"), ("x-b", "2")];
        let first = edited(&[option("x-a", "%REQ(x-b)%", 0)], &["x-b"], &several);
        assert_eq!(first, "", "what is removed is not there any more");
        let first = edited(&[option("x-a", "%REQ(x-b)%", 0)], &[], &several);
        assert_eq!(first, "x-b: 1; x-b: 2; x-a: 1", "a formatter sees the first occurrence");
        check(1, &[("x-a", "1")], "x-a: 1");
        check(1, &[], "x-a: 2");
        check(2, &[("x-a", "1"), ("x-a", "1")], "x-a: 2");
        check(2, &[], "x-a: 2");
        check(3, &[], "");
        check(3, &[("x-a", "1")], "x-a: 2");
    }

    #[test]
    fn what_overwrites_goes_before_what_adds() {
        let both = [option("a", "added", 0), option("a", "set", 2), option("a", "never", 1)];
        assert_eq!(edited(&both, &[], &[("a", "1")]), "a: set; a: added");
        assert_eq!(edited(&[option("a", "1", 0), option("a", "2", 1)], &[], &[]), "a: 1; a: 2", "as it was before");
    }

    #[test]
    fn removals_come_first() {
        assert_eq!(edited(&[option("a", "2", 0)], &["A"], &[("a", "1"), ("b", "1")]), "b: 1; a: 2");
    }

    #[test]
    fn formatters() {
        let check = |value: &str, expect: &str| {
            let got = edited(&[option("x", value, 2)], &[], &[("y", "why"), ("y", "not")]);
            assert_eq!(got.strip_prefix("y: why; y: not").unwrap().trim_start_matches("; "), expect, "{value}");
        };
        check("100%%", "x: 100%");
        check("%REQ(Y)%", "x: why");
        check("%REQ(z?y)%", "x: why");
        check("%REQ(y):3%!", "x: why!");
        check("%REQ(:authority)%%REQ(:path)%", "x: h:80/p");
        check("%REQ(absent)%", "");
        check("[%REQ(absent)%]", "x: []");
        check("%PROTOCOL%", "x: HTTP/1.1");
        check("%DOWNSTREAM_REMOTE_ADDRESS%", "x: 10.1.2.3:5555");
        check("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "x: 10.1.2.3");
        check("%DOWNSTREAM_LOCAL_PORT%", "x: 80");
        check("%DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_TLS_VERSION%", "x: spiffe://td/ns/a/sa/b TLSv1.3");
        check("%START_TIME%", "x: 2023-11-14T22:13:20.123Z");
        check("%DYNAMIC_METADATA(jwt:payload:sub)%", "x: me");
        check("%DYNAMIC_METADATA(jwt:payload:n)%", "x: 1");
        // A claim cannot break out of its header.
        check("%DYNAMIC_METADATA(jwt:payload:bad)%", "");
    }

    #[test]
    fn responses() {
        let edits = HeaderEdits::lower(&[option("x", "%RESP(a)% %RESPONSE_CODE% %REQ(:method)%", 0)], &[]).unwrap();
        let (request, conn) = (RequestHead::new("PUT", "h", "/"), conn());
        let edited = |details| {
            let info = StreamInfo { details: Details::Static(details), ..StreamInfo::default() };
            let mut head = ResponseHead::new(503);
            head.fields.push("a", b"1");
            let now = Now { mono: Instant::now(), wall_nanos: 0 };
            edits.apply_response(&mut head, &request, &Context::new(&conn, &info, now));
            head.fields.get_str("x").map(str::to_owned)
        };
        assert_eq!(edited("via_upstream").as_deref(), Some("1 503 PUT"));
        assert_eq!(edited("direct_response").as_deref(), Some("1 0 PUT"), "an answer of our own has no status yet");
    }

    #[test]
    fn refused() {
        for (name, value) in [
            (":path", "/x"),
            ("Host", "x"),
            ("", "x"),
            ("a b", "x"),
            ("x", "50%"),
            ("x", "%NOPE%"),
            ("x", "%REQ(a%"),
            ("x", "%HOSTNAME%"),
            ("x", "a\r\nb"),
        ] {
            assert!(HeaderEdits::lower(&[option(name, value, 0)], &[]).is_err(), "{name}: {value}");
        }
        assert!(HeaderEdits::lower(&[option("x", "y", 9)], &[]).is_err());
        assert!(HeaderEdits::lower(&[], &["host".to_owned()]).is_err());
    }
}
