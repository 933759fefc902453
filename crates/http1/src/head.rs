//! Heads: finding their end, reading them, and telling how the body is framed.

use std::mem::MaybeUninit;

use types::{RequestHead, ResponseHead, Scheme, Version};

use crate::rules::{is_authority, is_target, list_has, strip_hop_by_hop, tokens};
use crate::{Framing, InvalidMessage, Limits, RequestKind};

/// Fields the tokeniser has room for; one more than [`Limits::fields_max`] may ever allow.
const FIELDS_ROOM: usize = 256;

/// Finds the end of a head in a buffer that grows, looking at each byte once.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadScanner {
    position: usize,
    line_start: usize,
}

impl HeadScanner {
    /// Looks at the bytes that came since the last call. `Some(n)`: the head is `buf[..n]`.
    ///
    /// *Errors*: a line that ends in a bare LF, or a head beyond its limit, is known before the
    /// rest has arrived.
    pub fn scan(&mut self, buf: &[u8], limits: &Limits) -> Result<Option<usize>, InvalidMessage> {
        while let Some(found) = memchr::memchr(b'\n', &buf[self.position..]) {
            let lf = self.position + found;
            // first what a reader of smaller pieces would have seen first
            if lf > limits.head_bytes_max {
                return Err(InvalidMessage::HeadTooLarge);
            }
            if lf == 0 || buf[lf - 1] != b'\r' {
                return Err(InvalidMessage::LineEnd);
            }
            self.position = lf + 1;
            if lf - self.line_start == 1 {
                return Ok(Some(lf + 1));
            }
            self.line_start = lf + 1;
        }
        self.position = buf.len();
        if buf.len() > limits.head_bytes_max { Err(InvalidMessage::HeadTooLarge) } else { Ok(None) }
    }
}

/// What a request's head says beside its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestMeta {
    /// How the body is framed; never [`Framing::UntilClose`] or [`Framing::Tunnel`].
    pub framing: Framing,
    /// Whether the client wants to go on with this connection.
    pub keep_alive: bool,
    /// What decides the framing of the response.
    pub kind: RequestKind,
    /// `Expect: 100-continue`.
    pub expects_continue: bool,
}

/// What a response's head says beside its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseMeta {
    /// How the body is framed.
    pub framing: Framing,
    /// Whether the connection may carry another request when the body has ended.
    pub keep_alive: bool,
    /// 1xx but not 101: the response is still to come.
    pub interim: bool,
}

fn tokeniser_error(error: httparse::Error) -> InvalidMessage {
    match error {
        httparse::Error::HeaderName | httparse::Error::HeaderValue => InvalidMessage::Field,
        httparse::Error::NewLine => InvalidMessage::LineEnd,
        httparse::Error::Version => InvalidMessage::Version,
        httparse::Error::TooManyHeaders => InvalidMessage::TooManyFields,
        httparse::Error::Token | httparse::Error::Status => InvalidMessage::StartLine,
    }
}

/// How often CR occurs.
#[expect(clippy::naive_bytecount, reason = "heads are short, and the compiler makes vectors of it")]
pub(crate) fn count_cr(bytes: &[u8]) -> usize {
    bytes.iter().filter(|b| **b == b'\r').count()
}

fn room() -> [MaybeUninit<httparse::Header<'static>>; FIELDS_ROOM] {
    [const { MaybeUninit::uninit() }; FIELDS_ROOM]
}

/// Length fields of a head, each seen at most once.
#[derive(Default)]
struct LengthFields {
    length: Option<u64>,
    chunked: bool,
}

impl LengthFields {
    /// Takes note of a field; anything doubtful is an error (property 1).
    fn note(&mut self, name: &[u8], value: &[u8]) -> Result<(), InvalidMessage> {
        if name.eq_ignore_ascii_case(b"content-length") {
            if self.length.is_some() {
                return Err(InvalidMessage::ContentLength);
            }
            self.length = Some(parse_length(value)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(InvalidMessage::TransferEncoding);
            }
            self.chunked = true;
        }
        if self.chunked && self.length.is_some() { Err(InvalidMessage::AmbiguousLength) } else { Ok(()) }
    }
}

/// `1*DIGIT` that fits; no sign, no list, no space.
fn parse_length(value: &[u8]) -> Result<u64, InvalidMessage> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(InvalidMessage::ContentLength);
    }
    Ok(value.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')))
}

/// Connection options of a head.
#[derive(Default)]
struct ConnectionOptions {
    close: bool,
    keep_alive: bool,
    upgrade: bool,
}

impl ConnectionOptions {
    fn note(&mut self, name: &[u8], value: &[u8]) {
        if name.eq_ignore_ascii_case(b"connection") {
            self.close |= list_has(value, "close");
            self.keep_alive |= list_has(value, "keep-alive");
            self.upgrade |= list_has(value, "upgrade");
        }
    }

    fn persists(&self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.keep_alive)
    }
}

/// Reads one complete request head, `buf[..n]` of [`HeadScanner::scan`], into `head`.
///
/// Afterwards `head.fields` holds no `host` (it is the authority; the absolute form wins) and no
/// hop-by-hop field; an upgrade is in `head.protocol()`.
pub fn parse_request(buf: &[u8], limits: &Limits, head: &mut RequestHead) -> Result<RequestMeta, InvalidMessage> {
    head.clear();
    let mut room = room();
    let mut request = httparse::Request::new(&mut []);
    match httparse::ParserConfig::default().parse_request_with_uninit_headers(&mut request, buf, &mut room) {
        Ok(httparse::Status::Complete(n)) if n == buf.len() => {}
        Ok(_) => return Err(InvalidMessage::StartLine),
        Err(error) => return Err(tokeniser_error(error)),
    }
    let lines = request.headers.len() + 2;
    if count_cr(buf) != lines {
        return Err(InvalidMessage::LineEnd);
    }
    if request.headers.len() > limits.fields_max {
        return Err(InvalidMessage::TooManyFields);
    }
    head.version = match request.version {
        Some(1) => Version::Http11,
        Some(0) => Version::Http10,
        _ => return Err(InvalidMessage::Version),
    };
    head.scheme = Scheme::Http;
    head.fields.reserve(request.headers.len() + 8, buf.len() + 512);
    let method = request.method.ok_or(InvalidMessage::StartLine)?;
    let target = request.path.ok_or(InvalidMessage::StartLine)?.as_bytes();
    // exactly one space between the parts: what the tokeniser skipped would be missing here
    if buf.len() < method.len() + target.len() + 2
        || &buf[..method.len()] != method.as_bytes()
        || &buf[method.len() + 1..method.len() + 1 + target.len()] != target
        || !buf[method.len() + target.len() + 2..].starts_with(b"HTTP/1.")
    {
        return Err(InvalidMessage::StartLine);
    }
    head.set_method(method);

    let mut lengths = LengthFields::default();
    let mut options = ConnectionOptions::default();
    let mut host: Option<&[u8]> = None;
    let mut protocol: Option<&[u8]> = None;
    let mut expects_continue = false;
    for field in &*request.headers {
        let name = field.name.as_bytes();
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => {
                if host.replace(field.value).is_some() {
                    return Err(InvalidMessage::Host);
                }
                continue;
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                protocol = Some(field.value);
                continue;
            }
            6 if name.eq_ignore_ascii_case(b"expect") => {
                expects_continue = field.value.eq_ignore_ascii_case(b"100-continue");
            }
            10 => options.note(name, field.value),
            14 | 17 => lengths.note(name, field.value)?,
            _ => {}
        }
        head.fields.push_any_case(field.name, field.value);
    }
    set_target(head, target, host)?;
    strip_hop_by_hop(&mut head.fields);

    let framing = match (lengths.chunked, lengths.length) {
        (true, _) if head.version == Version::Http10 => return Err(InvalidMessage::TransferEncoding),
        (true, _) => Framing::Chunked,
        (false, Some(n)) => Framing::Length(n),
        (false, None) => Framing::None,
    };
    if method == "CONNECT" && framing != Framing::None {
        return Err(InvalidMessage::UnexpectedBody);
    }
    // an upgrade beside a body is not taken either: a tunnel begins where the head ends; CONNECT asks for one already
    let upgrade = options.upgrade && head.version == Version::Http11 && framing.is_empty() && method != "CONNECT";
    // h2c is never taken (prior knowledge only): the request is served as it stands
    let protocol = protocol.filter(|value| upgrade && !tokens(value).all(|item| item.eq_ignore_ascii_case(b"h2c")));
    head.set_protocol(protocol);
    Ok(RequestMeta {
        framing,
        keep_alive: options.persists(head.version),
        kind: RequestKind::of(method, protocol.is_some()),
        expects_continue,
    })
}

/// The four forms of a target (RFC 9112, section 3.2) and the one Host (section 3.2.2, property 10).
fn set_target(head: &mut RequestHead, target: &[u8], host: Option<&[u8]>) -> Result<(), InvalidMessage> {
    if !is_target(target) {
        return Err(InvalidMessage::Target);
    }
    match host {
        None if head.version == Version::Http11 => return Err(InvalidMessage::HostMissing),
        Some(b"") => return Err(InvalidMessage::HostMissing),
        Some(host) if !is_authority(host) => return Err(InvalidMessage::Host),
        _ => {}
    }
    if head.method() == "CONNECT" {
        if !is_authority(target) {
            return Err(InvalidMessage::Target);
        }
        head.set_authority(target);
        return Ok(());
    }
    if target[0] == b'/' || (target == b"*" && head.method() == "OPTIONS") {
        head.set_authority(host.unwrap_or_default());
        head.set_path(target);
        return Ok(());
    }
    let has_scheme =
        |scheme: &str| target.len() > scheme.len() && target[..scheme.len()].eq_ignore_ascii_case(scheme.as_bytes());
    let rest = if has_scheme("http://") {
        &target[7..]
    } else if has_scheme("https://") {
        head.scheme = Scheme::Https;
        &target[8..]
    } else {
        return Err(InvalidMessage::Target);
    };
    let end = rest.iter().position(|b| matches!(b, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if !is_authority(authority) {
        return Err(InvalidMessage::Target);
    }
    head.set_authority(authority);
    match path.first() {
        Some(b'/') => head.set_path(path),
        _ => {
            let mut full = Vec::with_capacity(path.len() + 1);
            full.push(b'/');
            full.extend_from_slice(path);
            head.set_path(&full);
        }
    }
    Ok(())
}

/// Reads one complete response head into `head`; `kind` is the request it answers.
///
/// Afterwards `head.fields` holds no hop-by-hop field, except `upgrade` of a 101.
pub fn parse_response(
    buf: &[u8],
    limits: &Limits,
    kind: RequestKind,
    head: &mut ResponseHead,
) -> Result<ResponseMeta, InvalidMessage> {
    head.fields.clear();
    let mut room = room();
    let mut response = httparse::Response::new(&mut []);
    match httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, buf, &mut room) {
        Ok(httparse::Status::Complete(n)) if n == buf.len() => {}
        Ok(_) => return Err(InvalidMessage::StartLine),
        Err(error) => return Err(tokeniser_error(error)),
    }
    if count_cr(buf) != response.headers.len() + 2 {
        return Err(InvalidMessage::LineEnd);
    }
    if response.headers.len() > limits.fields_max {
        return Err(InvalidMessage::TooManyFields);
    }
    if !buf.starts_with(b"HTTP/1.") || buf.get(8) != Some(&b' ') || !matches!(buf.get(12), Some(b' ' | b'\r')) {
        return Err(InvalidMessage::StartLine);
    }
    head.version = match response.version {
        Some(1) => Version::Http11,
        Some(0) => Version::Http10,
        _ => return Err(InvalidMessage::Version),
    };
    head.status = response.code.ok_or(InvalidMessage::StartLine)?;
    if head.status < 100 {
        return Err(InvalidMessage::StartLine);
    }
    head.fields.reserve(response.headers.len() + 6, buf.len() + 256);
    let mut lengths = LengthFields::default();
    let mut options = ConnectionOptions::default();
    let mut protocol: Option<&[u8]> = None;
    for field in &*response.headers {
        let name = field.name.as_bytes();
        match name.len() {
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                protocol = Some(field.value);
                continue;
            }
            10 => options.note(name, field.value),
            14 | 17 => lengths.note(name, field.value)?,
            _ => {}
        }
        head.fields.push_any_case(field.name, field.value);
    }
    strip_hop_by_hop(&mut head.fields);
    let keep_alive = options.persists(head.version) && head.version == Version::Http11;
    let no_body = |keep_alive| ResponseMeta { framing: Framing::None, keep_alive, interim: false };
    match head.status {
        101 if kind == RequestKind::Upgrade && !lengths.chunked && lengths.length.unwrap_or(0) == 0 => {
            if let Some(protocol) = protocol {
                head.fields.push("upgrade", protocol);
            }
            return Ok(ResponseMeta { framing: Framing::Tunnel, keep_alive: false, interim: false });
        }
        101 => return Err(InvalidMessage::UnexpectedBody),
        100..=199 | 204 if lengths.chunked || lengths.length.unwrap_or(0) != 0 => {
            return Err(InvalidMessage::UnexpectedBody);
        }
        100..=199 => return Ok(ResponseMeta { interim: true, ..no_body(keep_alive) }),
        200..=299 if kind == RequestKind::Connect => {
            if lengths.chunked || lengths.length.unwrap_or(0) != 0 {
                return Err(InvalidMessage::UnexpectedBody);
            }
            return Ok(ResponseMeta { framing: Framing::Tunnel, keep_alive: false, interim: false });
        }
        204 | 304 => return Ok(no_body(keep_alive)),
        _ if kind == RequestKind::Head => return Ok(no_body(keep_alive)),
        _ => {}
    }
    Ok(match (lengths.chunked, lengths.length) {
        (true, _) if head.version == Version::Http10 => return Err(InvalidMessage::TransferEncoding),
        (true, _) => ResponseMeta { framing: Framing::Chunked, keep_alive, interim: false },
        (false, Some(n)) => ResponseMeta { framing: Framing::Length(n), keep_alive, interim: false },
        (false, None) => ResponseMeta { framing: Framing::UntilClose, keep_alive: false, interim: false },
    })
}
