//! One HTTP/1 connection: buffers around the codec of `http1`.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http1::{
    BodyEncoder, Decoded, Framing, InvalidMessage, Limits, RequestDecoder, RequestKind, RequestMeta, ResponseDecoder,
    ResponseMeta,
};
use tokio::io::AsyncWrite;
use types::{Fields, RequestHead, ResponseHead, Version};

use super::{Broken, Frame, HELD_MAX};
use crate::io::Io;

/// Data from this size on is written from where it lies; less is copied behind the head.
const COPY_MAX: usize = 4 * 1024;
/// First read of a message.
const READ_MIN: usize = 4 * 1024;
/// Reads grow up to this.
const READ_MAX: usize = 64 * 1024;

/// A socket with what was read and not yet decoded, and what was encoded and not yet written.
#[derive(Debug)]
pub(crate) struct Wire {
    io: Io,
    read: BytesMut,
    read_size: usize,
    /// The last read said that there is nothing more; TLS holds no plaintext back then.
    drained: bool,
    eof: bool,
    queue: VecDeque<Bytes>,
    tail: BytesMut,
    queued: usize,
    /// Our half is closed once the queue is written.
    shut: bool,
}

impl Wire {
    pub(crate) fn new(io: Io) -> Self {
        Self {
            io,
            read: BytesMut::new(),
            read_size: READ_MIN,
            drained: false,
            eof: false,
            queue: VecDeque::new(),
            tail: BytesMut::new(),
            queued: 0,
            shut: false,
        }
    }

    /// Reads once. 0 is the end of input. An idle connection holds no buffer while it waits.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.eof {
            return Poll::Ready(Ok(0));
        }
        if self.drained && self.read.capacity() == 0 {
            ready!(self.io.poll_readable(cx));
        }
        self.read.reserve(self.read_size);
        let room = self.read.capacity() - self.read.len();
        let polled = self.io.poll_read_buf(cx, &mut self.read);
        self.drained = polled.is_pending();
        match polled {
            Poll::Pending => {
                if self.read.is_empty() {
                    self.read = BytesMut::new();
                }
                Poll::Pending
            }
            Poll::Ready(Ok(n)) => {
                self.eof = n == 0;
                self.read_size = if n == room { (self.read_size * 2).min(READ_MAX) } else { self.read_size };
                Poll::Ready(Ok(n))
            }
            Poll::Ready(Err(error)) => {
                self.eof = true;
                Poll::Ready(Err(error))
            }
        }
    }

    /// Between messages: what is not needed while idle is given back.
    fn rest(&mut self) {
        if self.read.is_empty() {
            self.read = BytesMut::new();
        }
        if self.tail.is_empty() {
            self.tail = BytesMut::new();
        }
        self.read_size = READ_MIN;
    }

    fn push(&mut self, data: Bytes) {
        self.queued += data.len();
        if data.len() < COPY_MAX {
            self.tail.extend_from_slice(&data);
        } else {
            if !self.tail.is_empty() {
                self.queue.push_back(self.tail.split().freeze());
            }
            self.queue.push_back(data);
        }
    }

    fn buffered(&self) -> usize {
        self.queued
    }

    /// Counts what a codec wrote behind `before` bytes of the tail.
    fn wrote(&mut self, before: usize) {
        self.queued += self.tail.len() - before;
    }

    /// Writes all that is queued.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.queued > 0 {
            let n = if self.queue.is_empty() {
                ready!(Pin::new(&mut self.io).poll_write(cx, &self.tail))?
            } else {
                let mut slices = [IoSlice::new(&[]); 16];
                let mut used = 0;
                for bytes in self.queue.iter().take(15) {
                    slices[used] = IoSlice::new(bytes);
                    used += 1;
                }
                if self.queue.len() < 16 && !self.tail.is_empty() {
                    slices[used] = IoSlice::new(&self.tail);
                    used += 1;
                }
                ready!(Pin::new(&mut self.io).poll_write_vectored(cx, &slices[..used]))?
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written(n);
        }
        if self.shut {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            self.shut = false;
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn written(&mut self, mut n: usize) {
        self.queued -= n;
        while n > 0 {
            let Some(first) = self.queue.front_mut() else {
                self.tail.advance(n);
                if self.tail.is_empty() {
                    self.tail.clear();
                }
                return;
            };
            if first.len() > n {
                first.advance(n);
                return;
            }
            n -= first.len();
            self.queue.pop_front();
        }
    }

    /// Closes our half, after what is queued.
    pub(crate) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    /// Reads and forgets up to `limit` bytes, until the peer closes: so that it can read our last
    /// answer before the close turns into a reset.
    pub(crate) fn poll_linger(&mut self, cx: &mut Context<'_>, limit: &mut usize) -> Poll<()> {
        loop {
            self.read.clear();
            match ready!(self.poll_fill(cx)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(n) => *limit = limit.saturating_sub(n),
            }
            if *limit == 0 {
                return Poll::Ready(());
            }
        }
    }

    /// Waits until the peer is gone; bytes that come meanwhile are kept, up to a bound.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.read.len() >= READ_MAX {
                return Poll::Pending;
            }
            match ready!(self.poll_fill(cx)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
    }
}

/// A frame, or the end; `Pending` when more bytes are needed.
fn body_step(decoded: Decoded) -> Poll<Option<Frame>> {
    match decoded {
        Decoded::NeedMore => Poll::Pending,
        Decoded::Data(data) => Poll::Ready(Some(Frame::Data(data))),
        Decoded::End(Some(trailers)) => Poll::Ready(Some(Frame::Trailers(trailers))),
        Decoded::End(None) => Poll::Ready(None),
    }
}

/// The server's side: a client talks to us.
#[derive(Debug)]
pub(crate) struct H1Server {
    pub(crate) wire: Wire,
    decoder: RequestDecoder,
    encoder: BodyEncoder,
    kind: RequestKind,
    version: Version,
    /// What the client wants; cleared when we decide to close.
    pub(crate) keep_alive: bool,
    head_sent: bool,
    tunnel: bool,
    aborted: bool,
}

impl H1Server {
    pub(crate) fn new(io: Io, limits: Limits) -> Self {
        Self {
            wire: Wire::new(io),
            decoder: RequestDecoder::new(limits),
            encoder: BodyEncoder::new(Framing::None),
            kind: RequestKind::Plain,
            version: Version::Http11,
            keep_alive: true,
            head_sent: false,
            tunnel: false,
            aborted: false,
        }
    }

    /// The response cannot be finished: the connection ends. Where only its close would tell the
    /// end of the body, it ends as a failure: in a reset, and without TLS's farewell.
    pub(crate) fn abort(&mut self) {
        self.keep_alive = false;
        let close_is_end = matches!(self.encoder.framing(), Framing::UntilClose | Framing::Tunnel);
        self.aborted = self.head_sent && !self.encoder.is_ended() && close_is_end;
        if self.aborted {
            self.wire.io.end_in_reset();
        }
    }

    /// Whether the connection must not end in an orderly close.
    pub(crate) fn was_aborted(&self) -> bool {
        self.aborted
    }

    /// Whether nothing of a next request has arrived.
    pub(crate) fn is_quiet(&self) -> bool {
        self.wire.read.is_empty()
    }

    /// Reads the next head. `None`: the client closed between requests.
    pub(crate) fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        head: &mut RequestHead,
    ) -> Poll<Result<Option<RequestMeta>, Broken>> {
        loop {
            if !self.wire.read.is_empty()
                && let Some(meta) = self.decoder.decode_head(&mut self.wire.read, head)?
            {
                self.kind = meta.kind;
                self.version = head.version;
                self.keep_alive = meta.keep_alive;
                self.head_sent = false;
                self.encoder = BodyEncoder::new(Framing::None);
                return Poll::Ready(Ok(Some(meta)));
            }
            match ready!(self.wire.poll_fill(cx)) {
                Ok(0) if self.wire.read.is_empty() => return Poll::Ready(Ok(None)),
                Ok(0) | Err(_) => return Poll::Ready(Err(Broken::Closed)),
                Ok(_) => {}
            }
        }
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, Broken>> {
        loop {
            if self.tunnel {
                if !self.wire.read.is_empty() {
                    return Poll::Ready(Ok(Some(Frame::Data(self.wire.read.split().freeze()))));
                }
            } else if let Poll::Ready(frame) = body_step(self.decoder.decode_body(&mut self.wire.read)?) {
                return Poll::Ready(Ok(frame));
            }
            match ready!(self.wire.poll_fill(cx)) {
                Ok(0) if self.tunnel => return Poll::Ready(Ok(None)),
                Ok(0) | Err(_) => return Poll::Ready(Err(Broken::Closed)),
                Ok(_) => {}
            }
        }
    }

    /// Whether the request has been read whole.
    pub(crate) fn is_finished(&self) -> bool {
        !self.tunnel && self.decoder.body_done()
    }

    pub(crate) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.wire.poll_gone(cx)
    }

    /// An interim response; dropped for HTTP/1.0 clients.
    pub(crate) fn send_interim(&mut self, head: &ResponseHead) -> Result<(), Broken> {
        if self.version == Version::Http10 || self.head_sent {
            return Ok(());
        }
        let before = self.wire.tail.len();
        http1::encode_response(&mut self.wire.tail, head, Framing::None, true)?;
        self.wire.wrote(before);
        Ok(())
    }

    /// Writes the head; `end`: there is no body.
    pub(crate) fn send_head(&mut self, head: &ResponseHead, end: bool) -> Result<(), Broken> {
        let length = head.fields.get_str("content-length").and_then(|value| value.parse().ok());
        let tunnel = match self.kind {
            RequestKind::Upgrade => head.status == 101,
            RequestKind::Connect => (200..300).contains(&head.status),
            RequestKind::Head | RequestKind::Plain => false,
        };
        if head.status == 101 && !tunnel {
            return Err(Broken::Unwritable);
        }
        let framing = if tunnel {
            Framing::Tunnel
        } else if self.kind == RequestKind::Head || matches!(head.status, 204 | 304) {
            Framing::None
        } else if end {
            Framing::Length(0)
        } else if let Some(n) = length {
            Framing::Length(n)
        } else if self.version == Version::Http10 {
            Framing::UntilClose
        } else {
            Framing::Chunked
        };
        if matches!(framing, Framing::UntilClose | Framing::Tunnel) {
            self.keep_alive = false;
        }
        let before = self.wire.tail.len();
        http1::encode_response(&mut self.wire.tail, head, framing, self.keep_alive || tunnel)?;
        self.wire.wrote(before);
        self.tunnel = tunnel;
        self.encoder = BodyEncoder::new(framing);
        self.head_sent = true;
        Ok(())
    }

    pub(crate) fn head_sent(&self) -> bool {
        self.head_sent
    }

    pub(crate) fn send_data(&mut self, data: Bytes) -> Result<(), Broken> {
        send_data(&mut self.wire, &mut self.encoder, data)
    }

    pub(crate) fn send_end(&mut self, trailers: Option<&Fields>) -> Result<(), Broken> {
        if self.tunnel {
            self.wire.shut = true;
        }
        send_end(&mut self.wire, &mut self.encoder, trailers)
    }

    pub(crate) fn buffered(&self) -> usize {
        self.wire.buffered()
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.wire.poll_flush(cx).map_err(Broken::from)
    }

    /// Whether another request may follow on this connection.
    pub(crate) fn may_continue(&self) -> bool {
        self.keep_alive && self.head_sent && self.encoder.is_ended() && self.decoder.body_done() && !self.tunnel
    }

    /// Ready for the next request; idle memory is given back.
    pub(crate) fn rest(&mut self) {
        debug_assert!(self.may_continue(), "only a finished exchange rests");
        self.wire.rest();
    }
}

fn send_data(wire: &mut Wire, encoder: &mut BodyEncoder, data: Bytes) -> Result<(), Broken> {
    if data.is_empty() {
        return Ok(());
    }
    let before = wire.tail.len();
    if !encoder.before_data(&mut wire.tail, data.len()) {
        // a body where none may be (HEAD, 304) is dropped; one beyond its length is a fault
        return if encoder.framing() == Framing::None { Ok(()) } else { Err(Broken::Protocol) };
    }
    wire.wrote(before);
    wire.push(data);
    let before = wire.tail.len();
    encoder.after_data(&mut wire.tail);
    wire.wrote(before);
    Ok(())
}

fn send_end(wire: &mut Wire, encoder: &mut BodyEncoder, trailers: Option<&Fields>) -> Result<(), Broken> {
    if encoder.is_ended() {
        return Ok(());
    }
    let before = wire.tail.len();
    let whole = encoder.end(&mut wire.tail, trailers);
    wire.wrote(before);
    if whole { Ok(()) } else { Err(Broken::Protocol) }
}

/// The client's side: we talk to an upstream.
#[derive(Debug)]
pub(crate) struct H1Client {
    pub(crate) wire: Wire,
    decoder: ResponseDecoder,
    encoder: BodyEncoder,
    kind: RequestKind,
    keep_alive: bool,
    head_read: bool,
    tunnel: bool,
}

impl H1Client {
    pub(crate) fn new(io: Io, limits: Limits) -> Self {
        Self {
            wire: Wire::new(io),
            decoder: ResponseDecoder::new(limits),
            encoder: BodyEncoder::new(Framing::None),
            kind: RequestKind::Plain,
            keep_alive: true,
            head_read: false,
            tunnel: false,
        }
    }

    /// Whether an idle connection may still be used: nothing came, and it is not closed.
    pub(crate) fn is_fresh(&mut self) -> bool {
        if self.wire.eof || !self.wire.read.is_empty() {
            return false;
        }
        let mut cx = Context::from_waker(std::task::Waker::noop());
        matches!(self.wire.poll_fill(&mut cx), Poll::Pending)
    }

    /// Writes the head; `end`: there is no body.
    pub(crate) fn send_head(&mut self, head: &RequestHead, end: bool) -> Result<(), Broken> {
        self.kind = RequestKind::of(head.method(), head.protocol().is_some());
        let length = head.fields.get_str("content-length").and_then(|value| value.parse().ok());
        let framing = match (end, length) {
            (true, Some(0)) => Framing::Length(0),
            // Methods that usually have no body need not say so (RFC 9110, section 8.6).
            (true, _) if matches!(head.method(), "GET" | "HEAD" | "DELETE" | "CONNECT" | "TRACE") => Framing::None,
            (true, _) => Framing::Length(0),
            (false, Some(n)) => Framing::Length(n),
            (false, None) => Framing::Chunked,
        };
        let before = self.wire.tail.len();
        http1::encode_request(&mut self.wire.tail, head, framing)?;
        self.wire.wrote(before);
        self.encoder = BodyEncoder::new(framing);
        self.head_read = false;
        self.tunnel = false;
        Ok(())
    }

    pub(crate) fn send_data(&mut self, data: Bytes) -> Result<(), Broken> {
        if self.tunnel {
            self.wire.push(data);
            return Ok(());
        }
        send_data(&mut self.wire, &mut self.encoder, data)
    }

    pub(crate) fn send_end(&mut self, trailers: Option<&Fields>) -> Result<(), Broken> {
        if self.tunnel {
            self.wire.shut = true;
            return Ok(());
        }
        send_end(&mut self.wire, &mut self.encoder, trailers)
    }

    pub(crate) fn buffered(&self) -> usize {
        self.wire.buffered()
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.wire.poll_flush(cx).map_err(Broken::from)
    }

    /// Reads a head, perhaps an interim one.
    pub(crate) fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        head: &mut ResponseHead,
    ) -> Poll<Result<ResponseMeta, Broken>> {
        loop {
            if !self.wire.read.is_empty()
                && let Some(meta) = self.decoder.decode_head(&mut self.wire.read, self.kind, head)?
            {
                if !meta.interim {
                    self.keep_alive = meta.keep_alive;
                    self.head_read = true;
                    self.tunnel = meta.framing == Framing::Tunnel;
                }
                return Poll::Ready(Ok(meta));
            }
            match ready!(self.wire.poll_fill(cx)) {
                Ok(0) if !self.wire.read.is_empty() => return Poll::Ready(Err(InvalidMessage::StartLine.into())),
                Ok(0) | Err(_) => return Poll::Ready(Err(Broken::Closed)),
                Ok(_) => {}
            }
        }
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, Broken>> {
        loop {
            if let Poll::Ready(frame) = body_step(self.decoder.decode_body(&mut self.wire.read)?) {
                return Poll::Ready(Ok(frame));
            }
            match ready!(self.wire.poll_fill(cx)) {
                Ok(0) => {
                    self.keep_alive = false;
                    return Poll::Ready(self.decoder.end_of_input().map(|()| None).map_err(Broken::from));
                }
                Err(_) => return Poll::Ready(Err(Broken::Closed)),
                Ok(_) => {}
            }
        }
    }

    /// Whether the response has been read whole.
    pub(crate) fn is_finished(&self) -> bool {
        self.head_read && self.decoder.body_done()
    }

    /// Whether the connection may carry another request: both messages have ended, nothing is
    /// left over, and both sides want to go on (property 3).
    pub(crate) fn is_reusable(&self) -> bool {
        self.keep_alive
            && self.head_read
            && self.decoder.body_done()
            && self.encoder.is_ended()
            && !self.tunnel
            && self.wire.read.is_empty()
            && self.wire.queued == 0
            && !self.wire.eof
    }

    /// To the pool: idle memory is given back.
    pub(crate) fn rest(&mut self) {
        self.wire.rest();
    }
}

const _: () = assert!(HELD_MAX >= READ_MAX, "one read never exceeds what may be held");
