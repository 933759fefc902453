//! What the connection manager does to heads before and after everything else.
//!
//! *Source*: Envoy's HTTP connection manager, "HTTP header sanitizing" and "HTTP header
//! manipulation"; property 13: trust-bearing headers come from the proxy alone.

use std::net::{IpAddr, SocketAddr};

use types::{Cause, Fields, RequestHead, ResponseHead, Scheme, Version};

use super::StreamInfo;
use crate::digits::{put_ip, set_number};
use crate::draw::Draw;
use crate::facts::ConnFacts;
use crate::hcm::{EscapedSlashes, ForwardClientCert, Hcm, RequestIds, ServerHeader, StripPort, Tracing, Underscores};

/// Control headers that only internal callers may send.
const INTERNAL_ONLY: &[&str] = &[
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-ip-tags",
    "x-envoy-original-url",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-internal",
];

/// What the head says about the caller.
pub(super) struct Caller {
    /// The trusted address of the client.
    pub(super) address: SocketAddr,
    /// It is inside the configured internal ranges.
    pub(super) internal: bool,
}

/// A redirect or refusal that normalisation itself asks for.
pub(super) enum Refused {
    /// Answer with this cause.
    Reply(Cause),
    /// Send the client to the unescaped path.
    Redirect,
}

/// Host and path: exactly once, before anything looks at them (property 9).
pub(super) fn target(hcm: &Hcm, conn: &ConnFacts, head: &mut RequestHead) -> Result<(), Refused> {
    if head.version == Version::Http10 && !hcm.settings.accept_http10 {
        return Err(Refused::Reply(Cause::UpgradeRequired));
    }
    if head.authority().is_empty() {
        if head.version == Version::Http10 && !hcm.settings.default_host_http10.is_empty() {
            let host = hcm.settings.default_host_http10.clone();
            head.set_authority(host.as_bytes());
        } else {
            return Err(Refused::Reply(Cause::MissingHost));
        }
    }
    let stripped = match hcm.strip_port {
        StripPort::Keep => None,
        StripPort::Any => Some(crate::route::without_port(head.authority())),
        StripPort::Matching => {
            let host = head.authority();
            let bare = crate::route::without_port(host);
            let port = host.get(bare.len() + 1..).and_then(|port| std::str::from_utf8(port).ok());
            (port.and_then(|port| port.parse().ok()) == Some(conn.local.port())).then_some(bare)
        }
    };
    if let Some(host) = stripped.filter(|host| host.len() < head.authority().len()) {
        let host = host.to_vec();
        head.set_authority(&host);
    }
    if hcm.strip_trailing_dot && head.authority().ends_with(b".") {
        let host = head.authority()[..head.authority().len() - 1].to_vec();
        head.set_authority(&host);
    }
    if head.method() == "CONNECT" || head.path() == b"*" {
        return Ok(());
    }
    let settings = crate::path::Settings {
        normalize: hcm.normalize_path,
        merge_slashes: hcm.merge_slashes,
        escaped_slashes: hcm.escaped_slashes,
    };
    match crate::path::normalize(head.path(), settings) {
        crate::path::Normalized::Same => Ok(()),
        crate::path::Normalized::Changed(path) => {
            head.set_path(&path);
            Ok(())
        }
        crate::path::Normalized::Redirect(path) => {
            head.set_path(&path);
            debug_assert!(hcm.escaped_slashes == EscapedSlashes::UnescapeAndRedirect);
            Err(Refused::Redirect)
        }
        crate::path::Normalized::Refused => Err(Refused::Reply(Cause::BadPath)),
    }
}

/// Names with `_`, which some applications read as `-`.
///
/// *Source*: Envoy `headers_with_underscores_action`.
pub(super) fn underscores(hcm: &Hcm, head: &mut RequestHead) -> Result<(), Refused> {
    match hcm.settings.underscores {
        Underscores::Allow => Ok(()),
        Underscores::Reject if head.fields.iter().any(|(name, _)| name.contains('_')) => {
            Err(Refused::Reply(Cause::BadRequest))
        }
        Underscores::Reject => Ok(()),
        Underscores::Drop => {
            head.fields.retain(|name, _| !name.contains('_'));
            Ok(())
        }
    }
}

/// Hop-by-hop fields end here (property 7). `upgrade` keeps the two that an allowed upgrade needs.
pub(super) fn hop_by_hop(fields: &mut Fields, upgrade: bool) {
    fields.retain(|name, value| match name {
        "connection" | "upgrade" => upgrade,
        "keep-alive" | "proxy-connection" | "transfer-encoding" => false,
        "te" => value.eq_ignore_ascii_case(b"trailers"),
        _ => true,
    });
}

/// Headers of the request: whom to trust, who called, what others must not set.
pub(super) fn sanitize(
    hcm: &Hcm,
    internal_only: &[Box<str>],
    conn: &ConnFacts,
    head: &mut RequestHead,
    draw: Draw,
) -> Caller {
    let caller = forwarded_for(hcm, conn, head);
    let edge = hcm.use_remote_address && !caller.internal;
    forwarded_proto(hcm, conn, head);
    if hcm.append_x_forwarded_port && !head.fields.contains("x-forwarded-port") {
        set_number(&mut head.fields, "x-forwarded-port", conn.local.port().into());
    }
    if edge {
        for name in [
            "x-envoy-decorator-operation",
            "x-envoy-downstream-service-cluster",
            "x-envoy-downstream-service-node",
            "x-envoy-original-path",
            "x-envoy-original-host",
        ] {
            head.fields.remove(name);
        }
    }
    if caller.internal {
        head.fields.set("x-envoy-internal", b"true");
    } else {
        // One pass over the list instead of one for each name.
        head.fields.retain(|name, _| {
            let ours = name.starts_with("x-envoy-") && INTERNAL_ONLY.contains(&name);
            !(ours || internal_only.iter().any(|internal| **internal == *name))
        });
    }
    if edge {
        let mut text = Vec::with_capacity(16);
        put_ip(&mut text, caller.address.ip());
        head.fields.set("x-envoy-external-address", &text);
    }
    let fresh = edge && !hcm.preserve_external_request_id;
    if hcm.generate_request_id && (fresh || !head.fields.contains("x-request-id")) {
        head.fields.set("x-request-id", &uuid4(draw));
    }
    forwarded_client_cert(hcm, conn, head);
    caller
}

fn forwarded_for(hcm: &Hcm, conn: &ConnFacts, head: &mut RequestHead) -> Caller {
    let peer = conn.peer;
    let is_internal = |ip: IpAddr| hcm.internal_ranges.iter().any(|range| range.contains(ip));
    if !hcm.use_remote_address {
        // Behind another proxy: the last address is the one that proxy saw.
        let address = nth_from_right(&head.fields, hcm.xff_trusted_hops as usize);
        return Caller { address: address.map_or(peer, |ip| SocketAddr::new(ip, 0)), internal: false };
    }
    let single = !head.fields.contains("x-forwarded-for");
    let address = match hcm.xff_trusted_hops {
        0 => None,
        hops => nth_from_right(&head.fields, hops as usize - 1),
    };
    let address = address.map_or(peer, |ip| SocketAddr::new(ip, 0));
    if !hcm.skip_xff_append {
        let mut text = match head.fields.joined("x-forwarded-for") {
            Some(all) => {
                let mut all = all.into_owned();
                all.extend_from_slice(b",");
                all
            }
            None => Vec::with_capacity(16),
        };
        put_ip(&mut text, peer.ip().to_canonical());
        head.fields.set("x-forwarded-for", &text);
    }
    Caller { address, internal: single && is_internal(peer.ip()) }
}

/// The `skip`-th address from the right of `x-forwarded-for`, over all its occurrences.
fn nth_from_right(fields: &Fields, skip: usize) -> Option<IpAddr> {
    let all = fields.joined("x-forwarded-for")?;
    let text = std::str::from_utf8(&all).ok()?;
    let entry = text.rsplit(',').map(str::trim).filter(|entry| !entry.is_empty()).nth(skip)?;
    entry.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

fn forwarded_proto(hcm: &Hcm, conn: &ConnFacts, head: &mut RequestHead) {
    let real = if conn.tls.is_some() { Scheme::Https } else { Scheme::Http };
    let given = match head.fields.get("x-forwarded-proto") {
        Some(value) if value.eq_ignore_ascii_case(b"http") => Some(Scheme::Http),
        Some(value) if value.eq_ignore_ascii_case(b"https") => Some(Scheme::Https),
        _ => None,
    };
    let distrusted = hcm.use_remote_address && hcm.xff_trusted_hops == 0;
    let scheme = match given {
        Some(given) if !distrusted => given,
        _ => {
            head.fields.set("x-forwarded-proto", real.as_str().as_bytes());
            real
        }
    };
    head.scheme = scheme;
}

/// Whether the caller used TLS, as far as it can be trusted: for `require_tls`.
pub(super) fn is_https(head: &RequestHead) -> bool {
    head.fields.get("x-forwarded-proto").is_some_and(|value| value.eq_ignore_ascii_case(b"https"))
}

fn forwarded_client_cert(hcm: &Hcm, conn: &ConnFacts, head: &mut RequestHead) {
    const XFCC: &str = "x-forwarded-client-cert";
    let mutual = conn.peer_certificate();
    match (hcm.forward_client_cert, mutual) {
        (ForwardClientCert::AlwaysForwardOnly, _) | (ForwardClientCert::ForwardOnly, Some(_)) => {}
        (ForwardClientCert::Sanitize, _)
        | (ForwardClientCert::ForwardOnly | ForwardClientCert::AppendForward | ForwardClientCert::SanitizeSet, None) => {
            head.fields.remove(XFCC);
        }
        (mode @ (ForwardClientCert::AppendForward | ForwardClientCert::SanitizeSet), Some(_)) => {
            let element = client_cert_element(hcm, conn);
            let mut value = Vec::new();
            if mode == ForwardClientCert::AppendForward
                && let Some(before) = head.fields.joined(XFCC)
            {
                value.extend_from_slice(&before);
                value.push(b',');
            }
            value.extend_from_slice(element.as_bytes());
            head.fields.set(XFCC, &value);
        }
    }
}

fn client_cert_element(hcm: &Hcm, conn: &ConnFacts) -> String {
    let parts = hcm.client_cert_parts;
    let mut text = String::new();
    let mut put = |key: &str, value: &str, quoted: bool| {
        if !text.is_empty() {
            text.push(';');
        }
        let quote = if quoted { "\"" } else { "" };
        for part in [key, "=", quote, value, quote] {
            text.push_str(part);
        }
    };
    let Some(tls) = &conn.tls else { return text };
    let Some(peer) = &tls.peer else { return text };
    if let Some(by) = &tls.local_uri_san {
        put("By", by, false);
    }
    put("Hash", &peer.sha256, false);
    if parts.cert && !peer.url_encoded_pem.is_empty() {
        put("Cert", &peer.url_encoded_pem, true);
    }
    if parts.chain && !peer.url_encoded_chain.is_empty() {
        put("Chain", &peer.url_encoded_chain, true);
    }
    if parts.subject {
        put("Subject", &peer.subject.replace('"', "\\\""), true);
    }
    if parts.uri {
        if peer.uri_sans.is_empty() {
            put("URI", "", false);
        }
        for uri in &peer.uri_sans {
            put("URI", uri, false);
        }
    }
    if parts.dns {
        for dns in &peer.dns_sans {
            put("DNS", dns, false);
        }
    }
    text
}

/// A random UUID, version 4, from the request's draws.
fn uuid4(draw: Draw) -> [u8; 36] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut bytes = [0u8; 16];
    bytes[..8].copy_from_slice(&draw.numbered("request_id", 0).to_be_bytes());
    bytes[8..].copy_from_slice(&draw.numbered("request_id", 1).to_be_bytes());
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = [b'-'; 36];
    let mut at = 0;
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = HEX[usize::from(byte >> 4)];
        text[at + 1] = HEX[usize::from(byte & 15)];
        at += 2;
    }
    text
}

/// Whether a request falls into `percent` of all, decided by its id, so that every proxy on the way
/// decides alike.
///
/// *Source*: Envoy's UUID extension: the first eight hex digits, modulo 10 000.
fn sampled_by_id(id: &[u8], percent: f64) -> bool {
    let digits = id.get(..8).and_then(|digits| std::str::from_utf8(digits).ok());
    let value = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
    value.is_some_and(|value| f64::from(value % 10_000) < percent * 100.0)
}

/// Whether the request is traced. The reason is kept in the request id's 15th digit, as Envoy does,
/// so that every proxy on the way decides alike.
///
/// *Source*: Envoy, "x-request-id": `4` not traced, `9` sampled, `a` forced, `b` by the client.
pub(super) fn trace_decision(tracing: &Tracing, ids: RequestIds, head: &mut RequestHead, draw: Draw) -> bool {
    const AT: usize = 14;
    if !ids.decide_traces {
        return true;
    }
    let Some(id) = head.fields.get("x-request-id") else { return false };
    if id.len() != 36 {
        return false;
    }
    let mut id = id.to_vec();
    let share = |percent: f64, name: &str| crate::retry::percent_holds(percent, draw.named(name));
    if id[AT] == b'4' {
        let reason = if head.fields.contains("x-client-trace-id") && share(tracing.client_sampling, "trace_client") {
            b'b'
        } else if head.fields.contains("x-envoy-force-trace") {
            b'a'
        } else if sampled_by_id(&id, tracing.random_sampling) {
            b'9'
        } else {
            b'4'
        };
        if reason != b'4' && share(tracing.overall_sampling, "trace_overall") {
            id[AT] = reason;
            if ids.pack_trace_reason {
                head.fields.set("x-request-id", &id);
            }
        }
    }
    matches!(id[AT], b'9' | b'a' | b'b')
}

/// Headers of a response on its way out: hop-by-hop fields, `server`, `date`, request id.
pub(super) fn response(
    hcm: &Hcm,
    request: &RequestHead,
    head: &mut ResponseHead,
    info: &StreamInfo,
    date: &[u8; 29],
    upgrade: bool,
) {
    hop_by_hop(&mut head.fields, upgrade);
    match hcm.server_header {
        ServerHeader::Overwrite => head.fields.set("server", hcm.server_name.as_bytes()),
        ServerHeader::AppendIfAbsent if !head.fields.contains("server") => {
            head.fields.push("server", hcm.server_name.as_bytes());
        }
        ServerHeader::AppendIfAbsent | ServerHeader::PassThrough => {}
    }
    if !head.fields.contains("date") {
        head.fields.push("date", date);
    }
    if hcm.request_id_in_response
        && let Some(id) = request.fields.get("x-request-id")
    {
        head.fields.set("x-request-id", id);
    }
    if hcm.tracing.is_some() {
        match hcm.direction {
            crate::chain::Direction::Outbound => {
                head.fields.remove("x-envoy-decorator-operation");
            }
            _ => {
                if let Some(operation) = info.operation.as_deref().filter(|_| !info.operation_from_peer) {
                    head.fields.set("x-envoy-decorator-operation", operation.as_bytes());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_is_a_share_of_the_ids() {
        let hits =
            |percent| (0..100_000_u32).filter(|n| sampled_by_id(format!("{n:08x}-").as_bytes(), percent)).count();
        assert_eq!((hits(25.0), hits(0.01), hits(0.0), hits(100.0)), (25_000, 10, 0, 100_000));
        assert!(!sampled_by_id(b"zzzzzzzz-", 100.0));
    }
}
