//! HTTP/2 streams over the `h2` crate, and heads between its types and ours.

use std::sync::LazyLock;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http1::rules::{is_authority, is_forbidden_trailer, is_hop_by_hop, is_target, is_token, is_value};
use types::{Fields, RequestHead, ResponseHead, Scheme, Version};

use super::{Broken, Frame};

/// What we offer and bear on HTTP/2 connections (properties 21 and 23).
#[derive(Clone, Copy, Debug)]
pub(crate) struct H2Settings {
    /// Streams a peer may open at once.
    pub(crate) streams_max: u32,
    /// Window of one stream: what may be held of it.
    pub(crate) stream_window: u32,
    /// Window of the connection.
    pub(crate) connection_window: u32,
    /// Bytes of a decompressed head.
    pub(crate) head_bytes_max: u32,
}

impl Default for H2Settings {
    fn default() -> Self {
        Self { streams_max: 1024, stream_window: 64 * 1024, connection_window: 1024 * 1024, head_bytes_max: 60 * 1024 }
    }
}

/// Bookkeeping for DATA frames of a connection that nobody has taken yet: about 32 000 frames of a byte.
/// Their windows count payload only, of which a frame of a byte has the least.
const FRAMES_HELD_BYTES: usize = 8 * 1024 * 1024;

/// A server's builder.
pub(crate) fn server_builder(settings: &H2Settings) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(settings.streams_max)
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_header_list_size(settings.head_bytes_max)
        .max_send_buffer_size(super::HELD_MAX)
        .data_frame_budget(FRAMES_HELD_BYTES)
        .max_concurrent_reset_streams(50)
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(Some(1024));
    builder
}

/// A client's builder.
pub(crate) fn client_builder(settings: &H2Settings) -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_header_list_size(settings.head_bytes_max)
        .max_send_buffer_size(super::HELD_MAX)
        .data_frame_budget(FRAMES_HELD_BYTES)
        .max_concurrent_reset_streams(50);
    builder
}

/// The receiving half of a stream.
#[derive(Debug)]
struct Receiving {
    stream: RecvStream,
    data_done: bool,
    done: bool,
}

impl Receiving {
    fn new(stream: RecvStream) -> Self {
        let done = stream.is_end_stream();
        Self { stream, data_done: done, done }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, Broken>> {
        if self.done {
            return Poll::Ready(Ok(None));
        }
        while !self.data_done {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {
                    if self.stream.is_end_stream() {
                        self.done = true;
                        return Poll::Ready(Ok(None));
                    }
                }
                Some(Ok(data)) => {
                    self.done = self.stream.is_end_stream();
                    return Poll::Ready(Ok(Some(Frame::Data(data))));
                }
                Some(Err(error)) => {
                    self.done = true;
                    return Poll::Ready(Err(error.into()));
                }
                None => self.data_done = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx))?;
        self.done = true;
        let fields = trailers.map(|map| fields_from(&map, |name| !is_forbidden_trailer(name)));
        Poll::Ready(Ok(fields.filter(|fields| !fields.is_empty()).map(Frame::Trailers)))
    }

    fn consumed(&mut self, n: usize) {
        // an error here means the stream is gone, which the next read tells
        if self.stream.flow_control().release_capacity(n).is_err() {
            self.data_done = true;
        }
    }
}

/// How a stream is to end.
#[derive(Debug, Default)]
enum End {
    #[default]
    NotYet,
    Plain,
    Trailers(Fields),
}

/// The sending half of a stream.
#[derive(Debug)]
struct Sending {
    stream: SendStream<Bytes>,
    pending: Bytes,
    end: End,
    ended: bool,
}

impl Sending {
    fn new(stream: SendStream<Bytes>, ended: bool) -> Self {
        Self { stream, pending: Bytes::new(), end: End::NotYet, ended }
    }

    fn push(&mut self, data: Bytes) -> Result<(), Broken> {
        debug_assert!(self.pending.is_empty() && matches!(self.end, End::NotYet), "drained before more is pushed");
        self.pending = data;
        self.stream.reserve_capacity(self.pending.len());
        self.step()
    }

    fn finish(&mut self, trailers: Option<&Fields>) -> Result<(), Broken> {
        if self.ended || !matches!(self.end, End::NotYet) {
            return Ok(());
        }
        self.end = trailers.cloned().map_or(End::Plain, End::Trailers);
        self.step()
    }

    /// Hands over what the window takes.
    fn step(&mut self) -> Result<(), Broken> {
        while !self.pending.is_empty() {
            let n = self.stream.capacity().min(self.pending.len());
            if n == 0 {
                return Ok(());
            }
            let piece = self.pending.split_to(n);
            let last = self.pending.is_empty() && matches!(self.end, End::Plain);
            self.stream.send_data(piece, last)?;
            if last {
                self.ended = true;
                self.end = End::NotYet;
            }
        }
        match std::mem::take(&mut self.end) {
            End::Plain => {
                self.stream.send_data(Bytes::new(), true)?;
                self.ended = true;
            }
            End::Trailers(trailers) => {
                self.stream.send_trailers(map_from(&trailers, is_forbidden_trailer)?)?;
                self.ended = true;
            }
            End::NotYet => {}
        }
        Ok(())
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !self.pending.is_empty() {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => self.step()?,
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                None => return Poll::Ready(Err(Broken::Reset)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// One request of an HTTP/2 client.
#[derive(Debug)]
pub(crate) struct H2Down {
    respond: SendResponse<Bytes>,
    receiving: Receiving,
    sending: Option<Sending>,
    head_request: bool,
    reset: bool,
    cancelled: bool,
}

impl H2Down {
    pub(crate) fn new(respond: SendResponse<Bytes>, body: RecvStream, head_request: bool) -> Self {
        Self { respond, receiving: Receiving::new(body), sending: None, head_request, reset: false, cancelled: false }
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, Broken>> {
        let frame = ready!(self.receiving.poll_frame(cx));
        self.cancelled |= matches!(frame, Err(Broken::Reset));
        Poll::Ready(frame)
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.receiving.done
    }

    /// Whether the client reset the stream; else its connection is gone.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    pub(crate) fn consumed(&mut self, n: usize) {
        self.receiving.consumed(n);
    }

    pub(crate) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let reset = match &mut self.sending {
            None => ready!(self.respond.poll_reset(cx)),
            Some(sending) if sending.ended => return Poll::Pending,
            Some(sending) => ready!(sending.stream.poll_reset(cx)),
        };
        self.cancelled |= reset.is_ok();
        Poll::Ready(())
    }

    pub(crate) fn send_interim(&mut self, head: &ResponseHead) -> Result<(), Broken> {
        if self.sending.is_some() {
            return Ok(());
        }
        self.respond.send_informational(response_to(head)?)?;
        Ok(())
    }

    /// Sends the head; a 101 becomes the 200 that opens the tunnel of an extended CONNECT.
    pub(crate) fn send_head(&mut self, head: &ResponseHead, end: bool) -> Result<(), Broken> {
        let end = end || self.head_request || matches!(head.status, 204 | 304);
        let stream = self.respond.send_response(response_to(head)?, end)?;
        self.sending = Some(Sending::new(stream, end));
        Ok(())
    }

    pub(crate) fn head_sent(&self) -> bool {
        self.sending.is_some()
    }

    pub(crate) fn send_data(&mut self, data: Bytes) -> Result<(), Broken> {
        match &mut self.sending {
            Some(sending) if sending.ended => Ok(()),
            Some(sending) => sending.push(data),
            None => Err(Broken::Protocol),
        }
    }

    pub(crate) fn send_end(&mut self, trailers: Option<&Fields>) -> Result<(), Broken> {
        self.sending.as_mut().map_or(Err(Broken::Protocol), |sending| sending.finish(trailers))
    }

    pub(crate) fn buffered(&self) -> usize {
        self.sending.as_ref().map_or(0, |sending| sending.pending.len())
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let flushed = ready!(self.sending.as_mut().map_or(Poll::Ready(Ok(())), |sending| sending.poll_drain(cx)));
        self.cancelled |= flushed == Err(Broken::Reset);
        Poll::Ready(flushed)
    }

    /// Ends the stream so that the client sees that it is not complete.
    pub(crate) fn reset(&mut self, reason: Reason) {
        if !self.reset {
            self.reset = true;
            match &mut self.sending {
                Some(sending) => sending.stream.send_reset(reason),
                None => self.respond.send_reset(reason),
            }
        }
    }
}

/// One request to an HTTP/2 upstream.
#[derive(Debug)]
pub(crate) struct H2Up {
    response: ResponseFuture,
    receiving: Option<Receiving>,
    sending: Sending,
    /// What the request asks to switch to.
    protocol: Option<Box<[u8]>>,
}

impl H2Up {
    /// A stream that was opened with `head`; `end`: there is no body.
    pub(crate) fn new(response: ResponseFuture, stream: SendStream<Bytes>, head: &RequestHead, end: bool) -> Self {
        let protocol = head.protocol().map(Box::from);
        Self { response, receiving: None, sending: Sending::new(stream, end), protocol }
    }

    /// Reads a head; `true` with it: it is an interim one. A 200 that agrees to an upgrade is read as a 101.
    pub(crate) fn poll_head(&mut self, cx: &mut Context<'_>, head: &mut ResponseHead) -> Poll<Result<bool, Broken>> {
        if let Poll::Ready(Some(interim)) = self.response.poll_informational(cx) {
            read_response(&interim?.into_parts().0, head)?;
            return Poll::Ready(Ok(true));
        }
        let (parts, body) = ready!(std::pin::Pin::new(&mut self.response).poll(cx))?.into_parts();
        self.receiving = Some(Receiving::new(body));
        read_response(&parts, head)?;
        if let Some(protocol) = self.protocol.as_deref().filter(|_| head.status == 200) {
            head.status = 101;
            head.fields.push("upgrade", protocol);
        }
        Poll::Ready(Ok(false))
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, Broken>> {
        self.receiving.as_mut().map_or(Poll::Ready(Err(Broken::Protocol)), |receiving| receiving.poll_frame(cx))
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.receiving.as_ref().is_some_and(|receiving| receiving.done)
    }

    pub(crate) fn consumed(&mut self, n: usize) {
        if let Some(receiving) = &mut self.receiving {
            receiving.consumed(n);
        }
    }

    pub(crate) fn send_data(&mut self, data: Bytes) -> Result<(), Broken> {
        self.sending.push(data)
    }

    pub(crate) fn send_end(&mut self, trailers: Option<&Fields>) -> Result<(), Broken> {
        self.sending.finish(trailers)
    }

    pub(crate) fn buffered(&self) -> usize {
        self.sending.pending.len()
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.sending.poll_drain(cx)
    }

    pub(crate) fn reset(&mut self, reason: Reason) {
        self.sending.stream.send_reset(reason);
    }

    /// Whether both halves have ended, so that nothing has to be cancelled.
    pub(crate) fn is_over(&self) -> bool {
        self.sending.ended && self.is_finished()
    }
}

fn fields_from(map: &HeaderMap, keep: impl Fn(&str) -> bool) -> Fields {
    let bytes: usize = map.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let mut fields = Fields::with_capacity(map.len() + 8, bytes + 512);
    for (name, value) in map {
        if keep(name.as_str()) {
            fields.push(name.as_str(), value.as_bytes());
        }
    }
    fields
}

/// Fields as a map, without those that are `written` already.
fn map_from(fields: &Fields, written: impl Fn(&str) -> bool) -> Result<HeaderMap, Broken> {
    let mut map = HeaderMap::with_capacity(fields.len());
    // one copy for all values, each a part of it
    let buffer = Bytes::copy_from_slice(fields.buffer());
    for (name, value) in fields.spans() {
        if is_hop_by_hop(name) || written(name) {
            continue;
        }
        let name = match known_name(name) {
            Some(known) => known,
            None => HeaderName::from_bytes(name.as_bytes()).map_err(|_| Broken::Unwritable)?,
        };
        let value = HeaderValue::from_maybe_shared(buffer.slice(value)).map_err(|_| Broken::Unwritable)?;
        map.append(name, value);
    }
    Ok(map)
}

/// Names of the mesh that the `http` crate does not know, and would copy each time.
fn known_name(name: &str) -> Option<HeaderName> {
    macro_rules! known {
        ($($text:literal)*) => {
            match name {
                $($text => Some(const { HeaderName::from_static($text) }),)*
                _ => None,
            }
        };
    }
    known! {
        "x-request-id" "x-forwarded-proto" "x-forwarded-for" "x-forwarded-client-cert"
        "x-envoy-attempt-count" "x-envoy-internal" "x-envoy-external-address" "x-envoy-upstream-service-time"
        "x-envoy-expected-rq-timeout-ms" "x-envoy-decorator-operation" "x-envoy-peer-metadata"
        "x-envoy-peer-metadata-id" "x-b3-traceid" "x-b3-spanid" "x-b3-parentspanid" "x-b3-sampled" "traceparent"
        "tracestate" "grpc-status" "grpc-message" "grpc-timeout" "grpc-encoding" "grpc-accept-encoding"
    }
}

/// Why an HTTP/2 request is refused before anything looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadRequest {
    NoAuthority,
    Malformed,
    TooManyFields,
}

/// Reads a request head; the grammar is HTTP/1's, so that it can be written either way
/// (property 4). Cookies are joined (RFC 9113, section 8.2.3). An extended CONNECT is read as HTTP/1's upgrade, a `GET`
/// that names its protocol: so whoever looks at it, routes and policies, sees the same request over either protocol.
pub(crate) fn read_request(
    parts: &http::request::Parts,
    fields_max: usize,
    head: &mut RequestHead,
) -> Result<(), BadRequest> {
    head.clear();
    head.version = Version::Http2;
    if parts.headers.len() > fields_max {
        return Err(BadRequest::TooManyFields);
    }
    let hosts = parts.headers.get_all("host");
    let mut hosts = hosts.iter();
    let host = hosts.next();
    if hosts.next().is_some() || parts.headers.get_all("content-length").iter().count() > 1 {
        return Err(BadRequest::Malformed);
    }
    head.fields = fields_from(&parts.headers, |name| name != "host" && name != "cookie");
    let mut cookies: Vec<u8> = Vec::new();
    for cookie in parts.headers.get_all("cookie") {
        if !cookies.is_empty() {
            cookies.extend_from_slice(b"; ");
        }
        cookies.extend_from_slice(cookie.as_bytes());
    }
    if !cookies.is_empty() {
        head.fields.push("cookie", &cookies);
    }
    if head.fields.iter().any(|(name, value)| !is_token(name.as_bytes()) || !is_value(value)) {
        return Err(BadRequest::Malformed);
    }
    let authority = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    let Some(authority) = authority.or_else(|| host.map(HeaderValue::as_bytes)).filter(|bytes| !bytes.is_empty())
    else {
        return Err(BadRequest::NoAuthority);
    };
    if !is_authority(authority) {
        return Err(BadRequest::Malformed);
    }
    if let Some(host) = host
        && !host.as_bytes().eq_ignore_ascii_case(authority)
    {
        return Err(BadRequest::Malformed);
    }
    let protocol = parts.extensions.get::<h2::ext::Protocol>().map(|protocol| protocol.as_str().as_bytes());
    if protocol.is_some_and(|protocol| parts.method != http::Method::CONNECT || !is_token(protocol)) {
        return Err(BadRequest::Malformed);
    }
    head.set_method(if protocol.is_some() { "GET" } else { parts.method.as_str() });
    head.set_protocol(protocol);
    if protocol.is_some() {
        // what follows is no body
        head.fields.remove("content-length");
    }
    head.set_authority(authority);
    head.scheme = match parts.uri.scheme_str() {
        Some(scheme) if scheme.eq_ignore_ascii_case("https") => Scheme::Https,
        _ => Scheme::Http,
    };
    if parts.method == http::Method::CONNECT && protocol.is_none() {
        return Ok(());
    }
    let path = parts.uri.path_and_query().map_or("", PathAndQuery::as_str).as_bytes();
    if !is_target(path) || (path[0] != b'/' && !(path == b"*" && parts.method == http::Method::OPTIONS)) {
        return Err(BadRequest::Malformed);
    }
    head.set_path(path);
    Ok(())
}

/// A request head for an HTTP/2 upstream; an upgrade is written as extended CONNECT.
///
/// *Errors*: [`Broken::Unwritable`] where the `http` crate does not take the authority, and for an upgrade by another
/// method than GET, which extended CONNECT has no word for: the peer would judge another request than we did.
pub(crate) fn request_to(head: &RequestHead) -> Result<http::Request<()>, Broken> {
    if head.protocol().is_some() && head.method() != "GET" {
        return Err(Broken::Unwritable);
    }
    let mut request = http::Request::new(());
    *request.version_mut() = http::Version::HTTP_2;
    // the authority stands for it
    *request.headers_mut() = map_from(&head.fields, |name| name == "host")?;
    let mut uri = http::uri::Parts::default();
    uri.authority = Some(http::uri::Authority::try_from(head.authority()).map_err(|_| Broken::Unwritable)?);
    let connect = head.method() == "CONNECT" && head.protocol().is_none();
    if !connect {
        uri.scheme = Some(match head.scheme {
            Scheme::Http => http::uri::Scheme::HTTP,
            Scheme::Https => http::uri::Scheme::HTTPS,
        });
        uri.path_and_query = Some(path_to(head.path())?);
    }
    *request.uri_mut() = http::Uri::from_parts(uri).map_err(|_| Broken::Unwritable)?;
    *request.method_mut() = http::Method::from_bytes(head.method().as_bytes()).map_err(|_| Broken::Unwritable)?;
    if let Some(protocol) = head.protocol() {
        *request.method_mut() = http::Method::CONNECT;
        request.headers_mut().remove(http::header::CONTENT_LENGTH);
        let protocol = std::str::from_utf8(protocol).map_err(|_| Broken::Unwritable)?;
        request.extensions_mut().insert(h2::ext::Protocol::from(protocol));
    }
    Ok(request)
}

/// What the `http` crate takes, byte by byte: in a path, and in a query.
static PLAIN: LazyLock<[[bool; 256]; 2]> = LazyLock::new(|| {
    let is_plain = |byte: u8, in_query: bool| {
        let alone: &[u8] = if in_query { &[b'/', b'?', byte] } else { &[b'/', byte] };
        PathAndQuery::try_from(alone).is_ok()
    };
    [false, true].map(|in_query| std::array::from_fn(|byte| u8::try_from(byte).is_ok_and(|b| is_plain(b, in_query))))
});

/// A path with its query. Bytes that HTTP/1 takes and the `http` crate does not (`"`, `<` and `>` in a query) are escaped,
/// as whoever wrote the URL should have done (RFC 3986, section 2.1).
fn path_to(path: &[u8]) -> Result<PathAndQuery, Broken> {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    if let Ok(path) = PathAndQuery::try_from(path) {
        return Ok(path);
    }
    let mut escaped = Vec::with_capacity(path.len() + 32);
    let mut in_query = false;
    for &byte in path {
        in_query |= byte == b'?';
        if PLAIN[usize::from(in_query)][usize::from(byte)] {
            escaped.push(byte);
        } else {
            escaped.extend([b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
    PathAndQuery::try_from(escaped.as_slice()).map_err(|_| Broken::Unwritable)
}

fn read_response(parts: &http::response::Parts, head: &mut ResponseHead) -> Result<(), Broken> {
    head.version = Version::Http2;
    head.status = parts.status.as_u16();
    head.fields = fields_from(&parts.headers, |_| true);
    let lengths = parts.headers.get_all("content-length").iter().count();
    // there is no 101 in HTTP/2 (RFC 9113, section 8.6)
    let fits = head.status != 101
        && lengths <= 1
        && !head.fields.iter().any(|(name, value)| !is_token(name.as_bytes()) || !is_value(value));
    if fits { Ok(()) } else { Err(Broken::Protocol) }
}

fn response_to(head: &ResponseHead) -> Result<http::Response<()>, Broken> {
    let mut response = http::Response::new(());
    *response.version_mut() = http::Version::HTTP_2;
    // an upgrade that was agreed to (RFC 8441, section 5); `upgrade` itself ends at this hop
    let agreed = head.status == 101;
    let status = if agreed { 200 } else { head.status };
    *response.status_mut() = http::StatusCode::from_u16(status).map_err(|_| Broken::Unwritable)?;
    *response.headers_mut() = map_from(&head.fields, |name| agreed && name == "content-length")?;
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_http_crate_refuses_in_a_path_is_escaped_and_nothing_else() {
        let check = |path: &str, expect: &str| assert_eq!(path_to(path.as_bytes()).unwrap().as_str(), expect);
        check("/x?filter={\"a\":1}", "/x?filter={%22a%22:1}");
        check("/x?a=<b>&c=?/%3C", "/x?a=%3Cb%3E&c=?/%3C");
        check("/a<b?c=|^`\\{}", "/a%3Cb?c=|^`\\{}");
        check("*", "*");
        // every byte of a target can be written
        let all: Vec<u8> = (0x21..=0x7e).filter(|byte| *byte != b'#').collect();
        let all = [&b"/"[..], &all, b"?", &all].concat();
        let written = path_to(&all).unwrap();
        assert!(written.as_str().contains("?!%22$"), "{written}");
    }

    #[test]
    fn only_a_get_is_upgraded_by_connect() {
        let request = |method: &str| {
            let mut head = RequestHead::new(method, "a", "/x");
            head.set_protocol(Some(b"websocket"));
            request_to(&head).map(|request| request.method().as_str().to_owned())
        };
        assert_eq!(request("GET").unwrap(), "CONNECT");
        for method in ["POST", "HEAD", "CONNECT"] {
            assert!(matches!(request(method), Err(Broken::Unwritable)), "{method}");
        }
    }
}
