//! Local replies and redirects.
//!
//! *Source*: `docs/parity.md`, Traffic 8.2. One cause, one table.

use bytes::Bytes;
use types::{Cause, GrpcCode, RequestHead, ResponseHead, Version};

use super::LocalReply;
use crate::route::{PathMatch, Redirect, RedirectPath};

/// What a reply says beyond its cause's own row.
#[derive(Default)]
pub(super) struct Spec {
    /// In place of the row's status.
    pub(super) status: Option<u16>,
    /// In place of the row's body.
    pub(super) body: Option<Bytes>,
    /// In place of the code the status gives.
    pub(super) grpc: Option<GrpcCode>,
    /// Further headers.
    pub(super) headers: Vec<(&'static str, Vec<u8>)>,
    /// Further headers of somebody else's making; they win.
    pub(super) fields: Option<types::Fields>,
    /// Never turned into a gRPC reply (preflights, and where a path must be asked for anew).
    pub(super) plain: bool,
    /// The connection must be closed.
    pub(super) close: bool,
}

/// When the route's edits are made to a reply: before or after it gets headers of its own.
pub(super) enum Edits<'a> {
    /// Never.
    None,
    /// What the reply sets of its own wins.
    BeforeOwn(&'a dyn Fn(&mut ResponseHead)),
    /// The edits win.
    AfterOwn(&'a dyn Fn(&mut ResponseHead)),
}

/// The reply for a cause, before filters and connection manager edit it.
///
/// What tells of the body comes last: `text/plain` where nobody said otherwise, and no type at all
/// where there is no body.
///
/// *Source*: Envoy `Utility::prepareLocalReply`, checked against the program.
pub(super) fn build(cause: Cause, spec: Spec, request: &RequestHead, is_grpc: bool, edits: &Edits<'_>) -> LocalReply {
    let surface = cause.surface();
    let status = spec.status.unwrap_or(if surface.status == 0 { 503 } else { surface.status });
    let body = spec.body.unwrap_or(Bytes::from_static(surface.body.as_bytes()));
    let is_head = request.method() == "HEAD";
    let mut head = ResponseHead::new(status);
    let mut sent = Bytes::new();
    if let Edits::BeforeOwn(edit) = edits {
        edit(&mut head);
    }
    for (name, value) in &spec.headers {
        head.fields.set(name, value);
    }
    for (name, value) in spec.fields.iter().flat_map(types::Fields::iter) {
        // Framing is ours alone.
        if !matches!(name, "transfer-encoding" | "connection") {
            if name == "content-type" { head.fields.set(name, value) } else { head.fields.push(name, value) }
        }
    }
    if let Edits::AfterOwn(edit) = edits {
        edit(&mut head);
    }
    head.fields.remove("content-length");
    if is_grpc && !spec.plain {
        head.status = 200;
        head.fields.set("content-type", b"application/grpc");
        let code = spec.grpc.unwrap_or_else(|| match cause {
            Cause::MaxStreamDuration => cause.grpc_code(),
            _ => GrpcCode::from_http(status),
        });
        if !head.fields.contains("grpc-status") {
            head.fields.push("grpc-status", code.0.to_string().as_bytes());
        }
        if !body.is_empty() && !is_head {
            head.fields.push("grpc-message", grpc_message(&body).as_bytes());
        }
    } else {
        if !body.is_empty() {
            head.fields.push("content-length", body.len().to_string().as_bytes());
            if !head.fields.contains("content-type") {
                head.fields.push("content-type", b"text/plain");
            }
        } else {
            head.fields.remove("content-type");
            if status >= 200 && status != 204 && status != 304 {
                head.fields.push("content-length", b"0");
            }
        }
        if !is_head {
            sent = body;
        }
    }
    // Whoever says 400 doubts that the connection is still in step.
    let close = spec.close
        || status == 400
        || matches!(
            cause,
            Cause::HeadersTooLarge
                | Cause::UpgradeRequired
                | Cause::RequestReceiveTimeout
                | Cause::RequestHeaderTimeout
        );
    head.version = if request.version == Version::Http2 { Version::Http2 } else { Version::Http11 };
    LocalReply { cause, head, body: sent, close }
}

/// `grpc-message`: printable ASCII but `%` stands for itself, everything else in percent form.
fn grpc_message(body: &[u8]) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut text = String::with_capacity(body.len());
    for byte in body {
        match byte {
            b'%' => text.push_str("%25"),
            0x20..=0x7e => text.push(char::from(*byte)),
            _ => {
                text.push('%');
                for digit in [byte >> 4, byte & 15] {
                    text.push(char::from(HEX[usize::from(digit)]));
                }
            }
        }
    }
    text
}

/// The body of a failed attempt: the cause's row, and "retried" if there was a retry.
///
/// The transport's own reason is for logs only: it may tell of certificates and addresses.
/// *Source*: Envoy 1.38.1 and later.
pub(super) fn reset_body(cause: Cause, retried: bool) -> Bytes {
    match cause.reset_reason() {
        Some(reason) if retried => format!(
            "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: {reason}"
        )
        .into(),
        _ => Bytes::from_static(cause.surface().body.as_bytes()),
    }
}

/// Where a redirect sends the client.
///
/// *Source*: Envoy `RedirectAction`; a port that is the old scheme's default is dropped when the
/// scheme changes.
pub(super) fn location(redirect: &Redirect, matched: &PathMatch, head: &RequestHead) -> Vec<u8> {
    let scheme_now = head.scheme.as_str();
    let scheme = redirect.scheme.as_deref().unwrap_or(scheme_now);
    let mut to = Vec::with_capacity(64);
    to.extend_from_slice(scheme.as_bytes());
    to.extend_from_slice(b"://");
    let host = head.authority();
    let bare = crate::route::without_port(host);
    if redirect.host.is_empty() {
        let port = host.get(bare.len() + 1..);
        let default_port = match scheme_now {
            "https" => &b"443"[..],
            _ => b"80",
        };
        let drop = redirect.port != 0 || (scheme != scheme_now && port == Some(default_port));
        to.extend_from_slice(if drop { bare } else { host });
    } else {
        to.extend_from_slice(redirect.host.as_bytes());
    }
    let suppressed = matches!((scheme, redirect.port), ("http", 80) | ("https", 443));
    if redirect.port != 0 && !suppressed {
        to.extend_from_slice(format!(":{}", redirect.port).as_bytes());
    }
    let path = head.path_only();
    let query = if redirect.strip_query { None } else { head.query() };
    let mut own_query = false;
    let authority_end = to.len();
    match &redirect.path {
        RedirectPath::Keep => to.extend_from_slice(path),
        RedirectPath::Path(new) => {
            own_query = new.contains('?');
            to.extend_from_slice(new.as_bytes());
        }
        RedirectPath::Prefix(prefix) => {
            to.extend_from_slice(prefix.as_bytes());
            to.extend_from_slice(&path[matched.matched_len(path).min(path.len())..]);
        }
        RedirectPath::Regex(rewrite) => to.extend_from_slice(&rewrite.apply(path)),
    }
    // What follows must never become part of the host.
    if to.get(authority_end) != Some(&b'/') {
        to.insert(authority_end, b'/');
    }
    if let Some(query) = query.filter(|_| !own_query) {
        to.push(b'?');
        to.extend_from_slice(query);
    }
    to
}

/// Where an answer of ours that points somewhere points unless the route says otherwise: to what was asked for.
///
/// *Source*: Envoy 1.40, direct responses of 201 and 3xx.
pub(super) fn own_location(status: u16, head: &RequestHead) -> Option<Vec<u8>> {
    if status != 201 && !(300..400).contains(&status) {
        return None;
    }
    let scheme = head.scheme.as_str().as_bytes();
    Some([scheme, b"://", head.authority(), head.path()].concat())
}

/// Where `require_tls` sends the client: to the host it named, with the port.
///
/// *Source*: Envoy 1.40, checked against the program.
pub(super) fn https_location(head: &RequestHead) -> Vec<u8> {
    let mut to = b"https://".to_vec();
    to.extend_from_slice(head.authority());
    to.extend_from_slice(head.path());
    to
}
