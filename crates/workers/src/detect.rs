//! What a connection's first bytes are: TLS, HTTP, or neither. Pure.
//!
//! *Source*: Envoy's tls_inspector and http_inspector; RFC 8446, section 4.1.2; RFC 6066, section
//! 3; RFC 7301.

/// What the bytes so far say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen<T> {
    /// Too few bytes to tell.
    NeedMore,
    /// It is that.
    Yes(T),
    /// It is something else.
    No,
}

/// What a ClientHello asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Lower case, without trailing dot.
    pub(crate) server_name: Option<Box<str>>,
    /// In the client's order.
    pub(crate) alpn: Vec<Box<str>>,
}

/// A ClientHello is never longer.
const HELLO_MAX: usize = 16 * 1024;
/// Nor in more records: each byte in one of its own would be read again and again.
const RECORDS_MAX: usize = 1024;
/// A request line is never longer; more is not HTTP.
const REQUEST_LINE_MAX: usize = 64 * 1024;

/// Looks for a ClientHello, however many records and segments it takes.
pub(crate) fn tls(bytes: &[u8]) -> Seen<Hello> {
    let mut handshake = Vec::new();
    let mut rest = bytes;
    for _ in 0..RECORDS_MAX {
        // type 22 (handshake), version 3.x, length
        let Some(header) = rest.first_chunk::<5>() else {
            let fits = rest.first().is_none_or(|b| *b == 22) && rest.get(1).is_none_or(|b| *b == 3);
            return if fits { Seen::NeedMore } else { Seen::No };
        };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != 22 || header[1] != 3 || header[2] > 4 || length == 0 || length > HELLO_MAX {
            return Seen::No;
        }
        let body = &rest[5..];
        handshake.extend_from_slice(&body[..length.min(body.len())]);
        if handshake.first().is_some_and(|kind| *kind != 1) {
            return Seen::No;
        }
        if let Some(head) = handshake.first_chunk::<4>() {
            let wanted = usize::from(head[1]) << 16 | usize::from(head[2]) << 8 | usize::from(head[3]);
            if wanted > HELLO_MAX {
                return Seen::No;
            }
            if handshake.len() >= wanted + 4 {
                return hello(&handshake[4..wanted + 4]).map_or(Seen::No, Seen::Yes);
            }
        }
        if body.len() < length {
            return Seen::NeedMore;
        }
        rest = &body[length..];
    }
    Seen::No
}

/// Takes `n` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (front, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(front)
}

/// Takes a vector with a length of `width` bytes.
fn vector<'a>(bytes: &mut &'a [u8], width: usize) -> Option<&'a [u8]> {
    let length = take(bytes, width)?.iter().fold(0, |sum, b| sum << 8 | usize::from(*b));
    take(bytes, length)
}

fn hello(mut bytes: &[u8]) -> Option<Hello> {
    let mut hello = Hello::default();
    take(&mut bytes, 2 + 32)?;
    vector(&mut bytes, 1)?;
    vector(&mut bytes, 2)?;
    vector(&mut bytes, 1)?;
    if bytes.is_empty() {
        return Some(hello);
    }
    let mut extensions = vector(&mut bytes, 2)?;
    while !extensions.is_empty() {
        let kind = take(&mut extensions, 2)?;
        let mut body = vector(&mut extensions, 2)?;
        match kind {
            [0, 0] => {
                let mut names = vector(&mut body, 2)?;
                while !names.is_empty() {
                    let kind = take(&mut names, 1)?;
                    let name = vector(&mut names, 2)?;
                    if kind == [0] && hello.server_name.is_none() {
                        let name = std::str::from_utf8(name).ok()?.to_ascii_lowercase();
                        let name = name.strip_suffix('.').unwrap_or(&name);
                        hello.server_name = (!name.is_empty()).then(|| name.into());
                    }
                }
            }
            [0, 16] => {
                let mut list = vector(&mut body, 2)?;
                while !list.is_empty() {
                    hello.alpn.push(String::from_utf8_lossy(vector(&mut list, 1)?).into());
                }
            }
            _ => {}
        }
    }
    Some(hello)
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Methods a request line may begin with.
const METHODS: &[&str] = &[
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "HEAD",
    "OPTIONS",
    "PATCH",
    "CONNECT",
    "TRACE",
    "PROPFIND",
    "PROPPATCH",
    "MKCOL",
    "COPY",
    "MOVE",
    "LOCK",
    "UNLOCK",
    "SEARCH",
    "BIND",
    "REBIND",
    "UNBIND",
    "ACL",
    "REPORT",
    "MKACTIVITY",
    "CHECKOUT",
    "MERGE",
    "M-SEARCH",
    "NOTIFY",
    "SUBSCRIBE",
    "UNSUBSCRIBE",
    "PURGE",
    "MKCALENDAR",
    "LINK",
    "UNLINK",
    "SOURCE",
];

/// Looks for HTTP: `h2c`, `http/1.1` or `http/1.0`.
pub(crate) fn http(bytes: &[u8]) -> Seen<&'static str> {
    match http2(bytes) {
        Seen::Yes(()) => return Seen::Yes("h2c"),
        Seen::NeedMore => return Seen::NeedMore,
        Seen::No => {}
    }
    let method_end = bytes.iter().position(|b| *b == b' ');
    let method = &bytes[..method_end.unwrap_or(bytes.len())];
    let known = METHODS.iter().any(|known| match method_end {
        Some(_) => known.as_bytes() == method,
        None => known.as_bytes().starts_with(method),
    });
    if !known {
        return Seen::No;
    }
    let Some(end) = bytes.iter().position(|b| *b == b'\n') else {
        let plain = bytes.iter().all(|b| (0x20..0x7f).contains(b) || *b == b'\r' || *b >= 0x80);
        return if plain && bytes.len() <= REQUEST_LINE_MAX { Seen::NeedMore } else { Seen::No };
    };
    let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
    if line.ends_with(b" HTTP/1.1") {
        Seen::Yes("http/1.1")
    } else if line.ends_with(b" HTTP/1.0") {
        Seen::Yes("http/1.0")
    } else {
        Seen::No
    }
}

/// Looks for the preface of HTTP/2.
pub(crate) fn http2(bytes: &[u8]) -> Seen<()> {
    let n = bytes.len().min(PREFACE.len());
    if bytes[..n] != PREFACE[..n] {
        Seen::No
    } else if n == PREFACE.len() {
        Seen::Yes(())
    } else {
        Seen::NeedMore
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client_hello(name: &str, alpn: &[&str], padding: usize) -> Vec<u8> {
        fn with_length(width: usize, body: Vec<u8>) -> Vec<u8> {
            let mut out = body.len().to_be_bytes()[8 - width..].to_vec();
            out.extend(body);
            out
        }
        let mut names = vec![0];
        names.extend(with_length(2, name.as_bytes().to_vec()));
        let mut extensions = vec![0, 0];
        extensions.extend(with_length(2, with_length(2, names)));
        let list: Vec<u8> = alpn.iter().flat_map(|p| with_length(1, p.as_bytes().to_vec())).collect();
        extensions.extend([0, 16]);
        extensions.extend(with_length(2, with_length(2, list)));
        extensions.extend([0, 21]);
        extensions.extend(with_length(2, vec![0; padding]));
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0]);
        body.extend(with_length(2, vec![0x13, 1]));
        body.extend(with_length(1, vec![0]));
        body.extend(with_length(2, extensions));
        let mut message = vec![1];
        message.extend(with_length(3, body));
        message
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in message.chunks(size) {
            out.extend([22, 3, 1]);
            out.extend(u16::try_from(piece.len()).unwrap().to_be_bytes());
            out.extend(piece);
        }
        out
    }

    #[test]
    fn a_hello_in_any_number_of_pieces() {
        for size in [7, 300, 16_000] {
            let bytes = records(&client_hello("Shop.Example.", &["h2", "http/1.1"], 1500), size);
            for n in 0..bytes.len() {
                assert_eq!(tls(&bytes[..n]), Seen::NeedMore, "{n} of {}", bytes.len());
            }
            let Seen::Yes(hello) = tls(&bytes) else { panic!("not seen") };
            assert_eq!(hello.server_name.as_deref(), Some("shop.example"));
            assert_eq!(hello.alpn, ["h2".into(), "http/1.1".into()]);
        }
    }

    #[test]
    fn what_is_no_hello() {
        for bytes in
            [&b"GET / HTTP/1.1\r\n"[..], &[22, 2, 0], &[23, 3, 1, 0, 5], &[22, 3, 1, 0, 0], &[22, 3, 1, 0, 4, 2]]
        {
            assert_eq!(tls(bytes), Seen::No, "{bytes:?}");
        }
        let mut cut = records(&client_hello("a", &[], 0), 16_000);
        let n = cut.len();
        cut[n - 2] = 9;
        assert_eq!(tls(&cut), Seen::No);
    }

    #[test]
    fn request_lines() {
        for (bytes, expect) in [
            ("", Seen::NeedMore),
            ("G", Seen::NeedMore),
            ("GET /x HTTP/1.1", Seen::NeedMore),
            ("GET /x HTTP/1.1\r\n", Seen::Yes("http/1.1")),
            ("GET /x HTTP/1.0\r\nHost: a\r\n", Seen::Yes("http/1.0")),
            ("GET /x\r\n", Seen::No),
            ("GETX /", Seen::No),
            ("220 smtp.example ESMTP\r\n", Seen::No),
            ("PRI * HTT", Seen::NeedMore),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Seen::Yes("h2c")),
            ("PROPFIND / HTTP/1.1\r\n", Seen::Yes("http/1.1")),
            ("\u{1}\u{2}", Seen::No),
            ("GET \u{1}", Seen::No),
        ] {
            assert_eq!(http(bytes.as_bytes()), expect, "{bytes:?}");
        }
    }
}
