//! The grammar's small pieces: tokens, values, authorities, fields that end at each hop.

use types::Fields;

/// Whether `bytes` is a token (RFC 9110, section 5.6.2).
#[inline]
pub fn is_token(bytes: &[u8]) -> bool {
    // without a way out in the middle: heads are almost always good
    !bytes.is_empty() && bytes.iter().fold(true, |good, b| good & is_token_byte(*b))
}

/// Whether `byte` may stand in a token.
#[inline]
pub fn is_token_byte(byte: u8) -> bool {
    TOKEN[usize::from(byte)]
}

/// Letters, digits and `others`: every byte of every head is asked about more than once.
const fn alphanumeric_and(others: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut byte: u8 = 0;
    while byte < 128 {
        table[byte as usize] = byte.is_ascii_alphanumeric();
        byte += 1;
    }
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = true;
        at += 1;
    }
    table
}

static TOKEN: [bool; 256] = alphanumeric_and(b"!#$%&'*+-.^_`|~");
/// Unreserved bytes, sub-delimiters but the comma, percent.
static REGISTERED_NAME: [bool; 256] = alphanumeric_and(b"-._~%!$&'()*+;=");

/// Whether `bytes` may be a field's value: no control byte but tab.
#[inline]
#[expect(clippy::needless_bitwise_bool, reason = "without a branch, many bytes are looked at at a time")]
pub fn is_value(bytes: &[u8]) -> bool {
    !bytes.iter().fold(false, |bad, b| bad | ((*b < 0x20) & (*b != b'\t')) | (*b == 0x7f))
}

/// Whether `bytes` may be a request target: visible ASCII only.
pub fn is_target(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().fold(true, |good, b| good & (0x21..=0x7e).contains(b))
}

/// Whether `bytes` is `host` or `host:port`; no user information, never empty.
///
/// *Source*: RFC 3986, section 3.2; the registered name is held to the bytes hosts use
/// (unreserved, sub-delimiters, percent), an IPv6 address stands in brackets.
pub fn is_authority(bytes: &[u8]) -> bool {
    let (host, port) = if bytes.first() == Some(&b'[') {
        let Some(end) = bytes.iter().position(|b| *b == b']') else { return false };
        let inside = &bytes[1..end];
        if inside.is_empty() || !inside.iter().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.' | b'%')) {
            return false;
        }
        match bytes.get(end + 1) {
            None => (inside, None),
            Some(b':') => (inside, Some(&bytes[end + 2..])),
            Some(_) => return false,
        }
    } else {
        match bytes.iter().position(|b| *b == b':') {
            None => (bytes, None),
            Some(at) => {
                let host = &bytes[..at];
                if !is_registered_name(host) {
                    return false;
                }
                (host, Some(&bytes[at + 1..]))
            }
        }
    };
    let host_fits = !host.is_empty() && (bytes[0] == b'[' || is_registered_name(host));
    host_fits && port.is_none_or(|port| port.len() <= 5 && port.iter().all(u8::is_ascii_digit))
}

fn is_registered_name(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| REGISTERED_NAME[usize::from(*b)])
}

/// Whether a comma-separated list holds `token`, ignoring case.
pub fn list_has(value: &[u8], token: &str) -> bool {
    tokens(value).any(|item| item.eq_ignore_ascii_case(token.as_bytes()))
}

/// The items of a comma-separated list, trimmed, empty ones left out.
pub fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|item| !item.is_empty())
}

/// Fields that concern one connection only and are never forwarded.
pub fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade" | "http2-settings"
    )
}

/// Whether a client may take `name` out of a request by naming it in `Connection` (property 7).
///
/// Fields that carry trust, routing or framing stay: whoever added them upstream of us relies on
/// them arriving.
fn may_be_nominated(name: &[u8]) -> bool {
    let starts =
        |prefix: &str| name.len() >= prefix.len() && name[..prefix.len()].eq_ignore_ascii_case(prefix.as_bytes());
    let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
    let protected = starts("x-")
        || starts("content-")
        || starts("grpc-")
        || [
            "host",
            "authorization",
            "cookie",
            "forwarded",
            "b3",
            "traceparent",
            "tracestate",
            "baggage",
            "te",
            "expect",
        ]
        .iter()
        .any(|other| is(other))
        || ["origin", "accept", "date", "via", "max-forwards", "cache-control", "end-user"]
            .iter()
            .any(|other| is(other));
    !protected && !is("close") && !is("keep-alive") && !is("upgrade")
}

/// Removes what ends at this hop: hop-by-hop fields, the fields `Connection` names (but for
/// protected ones), and `te` unless it says exactly `trailers`.
pub fn strip_hop_by_hop(fields: &mut Fields) {
    let mut nominated: Vec<u8> = Vec::new();
    let mut strip = false;
    for (name, value) in fields.iter() {
        if name == "connection" {
            strip = true;
            for item in tokens(value).filter(|item| may_be_nominated(item)) {
                nominated.extend_from_slice(item);
                nominated.push(b',');
            }
        } else if name == "te" {
            strip |= !value.eq_ignore_ascii_case(b"trailers");
        } else {
            strip |= is_hop_by_hop(name);
        }
    }
    if !strip {
        return;
    }
    fields.retain(|name, value| {
        if name == "te" {
            return value.eq_ignore_ascii_case(b"trailers");
        }
        !is_hop_by_hop(name) && (nominated.is_empty() || !list_has(&nominated, name))
    });
}

/// Whether a field may not stand in trailers: framing, routing, credentials, hop-by-hop
/// (property 5; RFC 9110, section 6.5.1).
pub fn is_forbidden_trailer(name: &str) -> bool {
    is_hop_by_hop(name)
        || name.starts_with("x-forwarded-")
        || name.starts_with("x-envoy-")
        || name.starts_with("content-")
        || matches!(
            name,
            "host"
                | "te"
                | "trailer"
                | "expect"
                | "authorization"
                | "proxy-authorization"
                | "cookie"
                | "set-cookie"
                | "forwarded"
                | "location"
                | "range"
                | "max-forwards"
                | "cache-control"
                | "x-request-id"
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities() {
        for good in ["a", "a.b:80", "127.0.0.1:1", "[::1]", "[::1]:443", "a_b", "xn--x", "a:"] {
            assert!(is_authority(good.as_bytes()), "{good}");
        }
        for bad in [
            "", ":80", "a b", "a@b", "u:p@b", "a/b", "a?b", "a#b", "a,b", "a:b", "[::1", "[]", "[::1]x", "a:123456",
            "a\\b", "\u{e9}",
        ] {
            assert!(!is_authority(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn connection_strips_what_it_may() {
        let mut fields = Fields::new();
        for (name, value) in [
            ("connection", "keep-alive, Foo, X-Forwarded-For, authorization"),
            ("foo", "1"),
            ("x-forwarded-for", "1.2.3.4"),
            ("authorization", "Bearer x"),
            ("keep-alive", "1"),
            ("te", "gzip"),
            ("bar", "2"),
        ] {
            fields.push(name, value.as_bytes());
        }
        strip_hop_by_hop(&mut fields);
        let names: Vec<_> = fields.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["x-forwarded-for", "authorization", "bar"]);
    }

    #[test]
    fn trailers_only_te_survives() {
        let mut fields = Fields::new();
        fields.push("te", b"trailers");
        strip_hop_by_hop(&mut fields);
        assert!(fields.contains("te"));
    }
}
