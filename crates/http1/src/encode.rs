//! Writing heads and bodies.

use bytes::{BufMut, BytesMut};
use types::{Fields, RequestHead, ResponseHead};

use crate::rules::{is_authority, is_forbidden_trailer, is_hop_by_hop, is_target, is_token, is_value};
use crate::{Framing, UnsafeHead};

/// Writes a request head in origin form (authority form for `CONNECT`).
///
/// Framing fields are written from `framing`, never copied; hop-by-hop fields are left out; an
/// upgrade is written from `head.protocol()`.
///
/// *Errors*: nothing is written when a byte of the head is not allowed in HTTP/1 (property 4), nor for an upgrade
/// by `CONNECT`, which HTTP/1 does not know.
pub fn encode_request(out: &mut BytesMut, head: &RequestHead, framing: Framing) -> Result<(), UnsafeHead> {
    let connect = head.method() == "CONNECT" && head.protocol().is_none();
    let before = out.len();
    check_request(head, connect)?;
    let protocol = head.protocol();
    out.reserve(head.fields.bytes() + head.fields.len() * 4 + head.path().len() + head.authority().len() + 128);
    out.put_slice(head.method().as_bytes());
    out.put_u8(b' ');
    out.put_slice(if connect { head.authority() } else { head.path() });
    out.put_slice(b" HTTP/1.1\r\nhost: ");
    out.put_slice(head.authority());
    out.put_slice(b"\r\n");
    // the authority has been written as the one Host; a response may have a field of that name
    put_fields(out, &head.fields, |name| name == "host").inspect_err(|_| out.truncate(before))?;
    if let Some(protocol) = protocol {
        out.put_slice(b"connection: upgrade\r\nupgrade: ");
        out.put_slice(protocol);
        out.put_slice(b"\r\n");
    }
    put_framing(out, framing);
    out.put_slice(b"\r\n");
    Ok(())
}

fn check_request(head: &RequestHead, connect: bool) -> Result<(), UnsafeHead> {
    if !is_token(head.method().as_bytes()) || (head.method() == "CONNECT" && !connect) {
        return Err(UnsafeHead::Method);
    }
    let path = head.path();
    let path_fits = is_target(path) && (path[0] == b'/' || (path == b"*" && head.method() == "OPTIONS"));
    if !connect && !path_fits {
        return Err(UnsafeHead::Path);
    }
    if !is_authority(head.authority()) {
        return Err(UnsafeHead::Authority);
    }
    if head.protocol().is_some_and(|protocol| !is_value(protocol) || protocol.is_empty()) {
        return Err(UnsafeHead::Field("upgrade".into()));
    }
    Ok(())
}

/// Writes the fields, without those that belong to the framing or this hop, and those that are `written` already.
///
/// *Errors*: a field that may not be written; those before it are.
fn put_fields(out: &mut BytesMut, fields: &Fields, written: impl Fn(&str) -> bool) -> Result<(), UnsafeHead> {
    for (name, value) in fields.iter() {
        if !is_token(name.as_bytes()) || !is_value(value) {
            return Err(UnsafeHead::Field(name.to_owned()));
        }
        if name == "content-length" || is_hop_by_hop(name) || written(name) {
            continue;
        }
        out.put_slice(name.as_bytes());
        out.put_slice(b": ");
        out.put_slice(value);
        out.put_slice(b"\r\n");
    }
    Ok(())
}

fn put_framing(out: &mut BytesMut, framing: Framing) {
    match framing {
        Framing::Chunked => out.put_slice(b"transfer-encoding: chunked\r\n"),
        Framing::Length(n) => {
            out.put_slice(b"content-length: ");
            put_decimal(out, n);
            out.put_slice(b"\r\n");
        }
        Framing::None | Framing::UntilClose | Framing::Tunnel => {}
    }
}

fn put_decimal(out: &mut BytesMut, mut n: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(n % 10).unwrap_or(0);
        n /= 10;
        if n == 0 {
            break;
        }
    }
    out.put_slice(&digits[at..]);
}

/// Writes a response head. `keep_alive: false` adds `connection: close`.
///
/// `framing` is how the body will be written; with [`Framing::None`] a `content-length` of the
/// head is kept (an answer to `HEAD`, or 304). A 101 writes its upgrade.
pub fn encode_response(
    out: &mut BytesMut,
    head: &ResponseHead,
    framing: Framing,
    keep_alive: bool,
) -> Result<(), UnsafeHead> {
    let before = out.len();
    out.reserve(head.fields.bytes() + head.fields.len() * 4 + 96);
    out.put_slice(b"HTTP/1.1 ");
    put_decimal(out, u64::from(head.status.clamp(100, 999)));
    out.put_u8(b' ');
    out.put_slice(reason_phrase(head.status).as_bytes());
    out.put_slice(b"\r\n");
    put_fields(out, &head.fields, |_| false).inspect_err(|_| out.truncate(before))?;
    let upgrade = head.fields.get("upgrade").filter(|_| head.status == 101);
    if let Some(protocol) = upgrade {
        out.put_slice(b"connection: upgrade\r\nupgrade: ");
        out.put_slice(protocol);
        out.put_slice(b"\r\n");
    } else if !keep_alive && head.status >= 200 {
        out.put_slice(b"connection: close\r\n");
    }
    match (framing, head.fields.get("content-length")) {
        (Framing::None, Some(length))
            if !matches!(head.status, 100..=199 | 204) && length.iter().all(u8::is_ascii_digit) =>
        {
            out.put_slice(b"content-length: ");
            out.put_slice(length);
            out.put_slice(b"\r\n");
        }
        (framing, _) => put_framing(out, framing),
    }
    out.put_slice(b"\r\n");
    Ok(())
}

/// Writes a body in the framing its head announced.
#[derive(Debug)]
pub struct BodyEncoder {
    framing: Framing,
    left: u64,
    ended: bool,
}

impl BodyEncoder {
    /// An encoder for a body framed so.
    pub fn new(framing: Framing) -> Self {
        let left = if let Framing::Length(n) = framing { n } else { 0 };
        Self { framing, left, ended: false }
    }

    /// How the body is framed.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Writes what goes before `n` bytes of data; call [`Self::after_data`] after them.
    /// `false`: the body may not be that long, and nothing may be written.
    #[must_use]
    pub fn before_data(&mut self, out: &mut BytesMut, n: usize) -> bool {
        debug_assert!(n > 0, "an empty chunk would end the body");
        match self.framing {
            Framing::None => false,
            Framing::Length(_) => match self.left.checked_sub(n as u64) {
                Some(left) => {
                    self.left = left;
                    true
                }
                None => false,
            },
            Framing::Chunked => {
                put_hex(out, n);
                out.put_slice(b"\r\n");
                true
            }
            Framing::UntilClose | Framing::Tunnel => true,
        }
    }

    /// Writes what goes after data.
    pub fn after_data(&mut self, out: &mut BytesMut) {
        if self.framing == Framing::Chunked {
            out.put_slice(b"\r\n");
        }
    }

    /// Ends the body. `false`: fewer bytes came than were announced; the connection must be cut,
    /// so that the peer sees the truncation (property 2). Trailers need chunks, else they are dropped.
    #[must_use]
    pub fn end(&mut self, out: &mut BytesMut, trailers: Option<&Fields>) -> bool {
        self.ended = true;
        if self.framing == Framing::Chunked {
            out.put_slice(b"0\r\n");
            for (name, value) in trailers.into_iter().flat_map(Fields::iter) {
                if is_token(name.as_bytes()) && is_value(value) && !is_forbidden_trailer(name) {
                    out.put_slice(name.as_bytes());
                    out.put_slice(b": ");
                    out.put_slice(value);
                    out.put_slice(b"\r\n");
                }
            }
            out.put_slice(b"\r\n");
        }
        self.left == 0
    }

    /// Whether [`Self::end`] was called.
    pub fn is_ended(&self) -> bool {
        self.ended
    }
}

fn put_hex(out: &mut BytesMut, n: usize) {
    let mut started = false;
    for shift in (0..usize::BITS / 4).rev() {
        let digit = (n >> (shift * 4)) & 15;
        started |= digit != 0 || shift == 0;
        if started {
            out.put_u8(b"0123456789abcdef"[digit]);
        }
    }
}

/// The usual words for a status; empty when there are none.
pub fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        103 => "Early Hints",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        203 => "Non-Authoritative Information",
        204 => "No Content",
        205 => "Reset Content",
        206 => "Partial Content",
        207 => "Multi-Status",
        300 => "Multiple Choices",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Payload Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        418 => "I'm a teapot",
        421 => "Misdirected Request",
        422 => "Unprocessable Entity",
        425 => "Too Early",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        511 => "Network Authentication Required",
        _ => "",
    }
}
