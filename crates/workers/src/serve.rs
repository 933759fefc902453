//! HTTP connections: requests one after the other, or streams side by side.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use engine::exchange::{Details, StreamInfo};
use engine::hcm::{Codec, Hcm, ServerHeader};
use engine::record::NoRecord;
use telemetry::metrics::Counter;
use tokio::time::Instant;
use types::head::is_grpc_content_type;
use types::{Cause, GrpcCode, RequestHead, ResponseHead, Version};

use crate::accept::Conn;
use crate::alarm::Alarm;
use crate::codec::flood::Guarded;
use crate::codec::h1::H1Server;
use crate::codec::h2::{BadRequest, H2Down, H2Settings, read_request, server_builder};
use crate::codec::{Broken, Down};
use crate::detect::{self, Seen};
use crate::exchange;
use crate::io::Io;
use crate::worker::Worker;

/// Serves a connection of a chain that ends in HTTP.
pub(crate) async fn http(worker: &Rc<Worker>, conn: Rc<Conn>, hcm: &Hcm, mut io: Io) {
    let _connected = Connected::new(&conn);
    let mut info = StreamInfo::default();
    let admitted = engine::stream::admit(&conn.chain, &conn.facts, &mut info, &mut NoRecord);
    worker.recorder.add(Counter::RbacAllowed, info.allowed.into());
    if let Err(cause) = admitted {
        worker.recorder.count(Counter::RbacDenied);
        worker.telemetry.connection_closed(worker, &conn, &info, cause);
        return;
    }
    let http2 = match hcm.codec {
        Codec::Http1 => false,
        Codec::Http2 => true,
        Codec::Auto => match is_http2(&conn, hcm, &mut io).await {
            Some(http2) => http2,
            None => return,
        },
    };
    // pinned where it is made: moved, it would take its room twice in every connection's task
    let mut serving = std::pin::pin!(async {
        if http2 {
            Box::pin(serve_h2(worker, &conn, hcm, io)).await;
        } else {
            serve_h1(worker, &conn, hcm, io).await;
        }
    });
    let Some(max) = hcm.timeouts.connection_duration_max else {
        return serving.await;
    };
    // the drain state ends it gracefully; what is left after that is cut
    if tokio::time::timeout(max, serving.as_mut()).await.is_err() {
        conn.state.drain();
        if tokio::time::timeout(hcm.timeouts.drain.max(Duration::from_secs(1)), serving).await.is_err() {
            tracing::debug!("a connection beyond its longest life was cut");
        }
    }
}

/// Counts a connection for as long as it lives.
struct Connected(Rc<Conn>);

impl Connected {
    fn new(conn: &Rc<Conn>) -> Self {
        if let Some(manager) = &conn.state.manager {
            manager.connected();
        }
        Self(Rc::clone(conn))
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        if let Some(manager) = &self.0.state.manager {
            manager.disconnected();
        }
    }
}

/// ALPN tells, or the inspector told, or the preface does. `None`: the client is gone.
async fn is_http2(conn: &Conn, hcm: &Hcm, io: &mut Io) -> Option<bool> {
    let told = match &conn.facts.tls {
        Some(tls) => tls.alpn.as_deref().map(|alpn| matches!(alpn, "h2" | "istio-h2")),
        None => match conn.facts.protocols.as_slice() {
            [only] => Some(&**only == "h2c"),
            _ => None,
        },
    };
    if told.is_some() {
        return told;
    }
    // the preface and little more: a silent client shall not cost a buffer
    let mut seen = bytes::BytesMut::with_capacity(32);
    let idle = hcm.timeouts.idle.map(|idle| Instant::now() + idle);
    // bytes that are here count, whoever wants to leave
    let first = tokio::select! {
        biased;
        read = poll_fn(|cx| io.poll_read_buf(cx, &mut seen)) => read,
        () = leaves(conn) => return None,
        () = sleep_until(idle) => return None,
    };
    if !matches!(first, Ok(1..)) {
        return None;
    }
    let reading = async {
        loop {
            match detect::http2(&seen) {
                Seen::Yes(()) => return Some(true),
                Seen::No => return Some(false),
                Seen::NeedMore => {}
            }
            seen.reserve(1);
            match poll_fn(|cx| io.poll_read_buf(cx, &mut seen)).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    };
    let result = tokio::time::timeout(head_timeout(hcm), reading).await.unwrap_or(None);
    io.unread(seen.freeze());
    result
}

/// What came instead of, or with, the next head.
enum Next {
    Head,
    /// Nothing more is to be read: the client closed, or has been idle too long, or we drain.
    Over,
    Bad(http1::InvalidMessage),
    TooSlow,
}

/// An HTTP/1 client that dawdles over a head is let go after this, where the chain names no time.
const HEAD_MAX: Duration = Duration::from_mins(1);

/// Memory of a head that a connection keeps between two requests.
const HEAD_KEPT_MAX: usize = 8 * 1024;

/// How long a client may take over a head, once its first byte is here.
fn head_timeout(hcm: &Hcm) -> Duration {
    hcm.timeouts.request_headers.unwrap_or(HEAD_MAX)
}

/// A leaving connection waits so long for a request that is on its way; then it closes.
const LEAVE_AFTER: Duration = Duration::from_secs(1);

/// Returns when a connection with nothing under way should end: some time after it began to drain.
async fn leaves(conn: &Conn) {
    poll_fn(|cx| conn.state.poll_draining(cx)).await;
    tokio::time::sleep(LEAVE_AFTER).await;
}

async fn serve_h1(worker: &Rc<Worker>, conn: &Rc<Conn>, hcm: &Hcm, io: Io) {
    let limits = http1::Limits {
        head_bytes_max: hcm.settings.header_bytes_max as usize,
        fields_max: hcm.settings.headers_max as usize,
        ..http1::Limits::default()
    };
    let mut server = H1Server::new(io, limits);
    let mut head = RequestHead::default();
    let mut served: u32 = 0;
    let mut alarm = Alarm::default();
    loop {
        match next_head(conn, hcm, &mut server, &mut head, &mut alarm).await {
            Next::Over => break,
            Next::Bad(error) => {
                worker.recorder.count(Counter::DownstreamProtocolErrors);
                tracing::debug!(peer = %conn.facts.peer, %error, "refused a malformed request");
                refuse(worker, conn, &mut server, hcm, error.cause());
                break;
            }
            Next::TooSlow => {
                refuse(worker, conn, &mut server, hcm, Cause::RequestHeaderTimeout);
                break;
            }
            Next::Head => {}
        }
        if head.version == Version::Http10 {
            if !hcm.settings.accept_http10 {
                refuse(worker, conn, &mut server, hcm, Cause::UpgradeRequired);
                break;
            }
            if head.authority().is_empty() {
                if hcm.settings.default_host_http10.is_empty() {
                    refuse(worker, conn, &mut server, hcm, Cause::MissingHost);
                    break;
                }
                head.set_authority(hcm.settings.default_host_http10.as_bytes());
            }
        }
        served = served.saturating_add(1);
        let last = hcm.settings.requests_per_connection_max.is_some_and(|max| served >= max);
        if last {
            server.keep_alive = false;
        }
        head.scheme = if conn.facts.tls.is_some() { types::Scheme::Https } else { types::Scheme::Http };
        exchange::serve(worker, conn, Down::H1(&mut server), &mut head, &mut alarm).await;
        if !server.may_continue() {
            break;
        }
        server.rest();
        // what a usual head needs is kept for the next one, what a large one took is not
        if head.fields.held() > HEAD_KEPT_MAX {
            head = RequestHead::default();
        }
    }
    close(&mut server).await;
}

/// What waiting for a head came to.
enum Awaited {
    Read(Result<Option<http1::RequestMeta>, Broken>),
    /// Its first bytes are here.
    Begun,
    Elapsed,
}

async fn next_head(conn: &Conn, hcm: &Hcm, server: &mut H1Server, head: &mut RequestHead, alarm: &mut Alarm) -> Next {
    let started = Instant::now();
    let head_timeout = head_timeout(hcm);
    let mut first_byte: Option<Instant> = (!server.is_quiet()).then_some(started);
    loop {
        let until = match first_byte {
            Some(at) => Some(at + head_timeout),
            None => hcm.timeouts.idle.map(|idle| started + idle),
        };
        // a request that is here is served, even when it came at the last moment
        let quiet = first_byte.is_none();
        let reading = poll_fn(|cx| {
            match server.poll_head(cx, head) {
                Poll::Ready(read) => Poll::Ready(Awaited::Read(read)),
                // the head's time begins with its first byte
                Poll::Pending if first_byte.is_none() && !server.is_quiet() => Poll::Ready(Awaited::Begun),
                Poll::Pending => match until {
                    Some(until) => alarm.poll(cx, until).map(|()| Awaited::Elapsed),
                    None => Poll::Pending,
                },
            }
        });
        let read = tokio::select! {
            biased;
            read = reading => read,
            () = leaves(conn), if quiet => return Next::Over,
        };
        match read {
            Awaited::Begun => first_byte = Some(Instant::now()),
            Awaited::Elapsed => return if first_byte.is_some() { Next::TooSlow } else { Next::Over },
            Awaited::Read(Ok(Some(_))) => return Next::Head,
            Awaited::Read(Ok(None)) => return Next::Over,
            Awaited::Read(Err(Broken::Message(error))) => return Next::Bad(error),
            Awaited::Read(Err(_)) => return Next::Over,
        }
    }
}

async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Answers what never became a request, and records it.
fn refuse(worker: &Rc<Worker>, conn: &Rc<Conn>, server: &mut H1Server, hcm: &Hcm, cause: Cause) {
    let surface = cause.surface();
    let mut head = ResponseHead::new(surface.status);
    if !surface.body.is_empty() {
        head.fields.push("content-type", b"text/plain");
        head.fields.push("content-length", surface.body.len().to_string().as_bytes());
    }
    let now = worker.now();
    worker.with_date(now.wall_seconds(), |date| head.fields.push("date", date.as_bytes()));
    if !matches!(hcm.server_header, ServerHeader::PassThrough) {
        head.fields.push("server", hcm.server_name.as_bytes());
    }
    server.keep_alive = false;
    let mut down = Down::H1(server);
    let body = Bytes::from_static(surface.body.as_bytes());
    let written =
        down.send_head(&head, body.is_empty()).and_then(|()| down.send_data(body)).and_then(|()| down.send_end(None));
    if let Err(error) = written {
        tracing::debug!(%error, "a refusal could not be written");
    }
    worker.telemetry.malformed(worker, conn, cause, surface.status);
}

/// How long a closing connection may take to read our last bytes.
const LINGER_MAX: Duration = Duration::from_secs(1);

/// Writes what is queued, closes our half, and reads on for a moment: a close with unread bytes
/// would be a reset, and the client would lose the answer.
async fn close(server: &mut H1Server) {
    // an orderly close would tell the client that a broken response is whole
    if server.was_aborted() {
        return;
    }
    let mut limit = 256 * 1024;
    let closing = async {
        if poll_fn(|cx| server.wire.poll_shutdown(cx)).await.is_ok() {
            poll_fn(|cx| server.wire.poll_linger(cx, &mut limit)).await;
        }
    };
    if tokio::time::timeout(LINGER_MAX, closing).await.is_err() {
        tracing::trace!("a client did not close in time");
    }
}

async fn serve_h2(worker: &Rc<Worker>, conn: &Rc<Conn>, hcm: &Hcm, io: Io) {
    let defaults = H2Settings::default();
    let settings = H2Settings {
        streams_max: hcm.settings.concurrent_streams_max,
        // what may be held of a stream is ours to bound, whatever the configuration offers (property 23)
        stream_window: hcm.settings.stream_window.min(256 * 1024).max(defaults.stream_window),
        connection_window: hcm.settings.connection_window.min(4 * 1024 * 1024).max(defaults.connection_window),
        head_bytes_max: hcm.settings.header_bytes_max,
    };
    let mut builder = server_builder(&settings);
    if hcm.settings.extended_connect {
        builder.enable_connect_protocol();
    }
    let (io, flooded) = Guarded::server(io);
    let handshake = builder.handshake::<_, Bytes>(io);
    let Ok(Ok(mut connection)) = tokio::time::timeout(head_timeout(hcm), handshake).await else {
        return;
    };
    let mut draining = false;
    let mut drain_until: Option<Instant> = None;
    let mut is_cut = false;
    let mut idle_since = Instant::now();
    let mut served: u32 = 0;
    let active: Rc<Cell<u32>> = Rc::default();
    loop {
        if conn.is_draining() && !draining {
            draining = true;
            connection.graceful_shutdown();
        }
        // A proxy that is only said to be unwell stays, and so do the streams that run.
        if conn.state.is_draining() && drain_until.is_none() && !is_cut {
            drain_until = Some(Instant::now() + hcm.timeouts.drain.max(worker.shared.drain_time));
        }
        let idle_until = hcm.timeouts.idle.filter(|_| !draining).map(|idle| idle_since + idle);
        let quiet = active.get() == 0;
        if !quiet {
            idle_since = Instant::now();
        }
        let until = drain_until.or(if quiet {
            idle_until
        } else {
            idle_until.map(|_| Instant::now() + Duration::from_secs(5))
        });
        // accepting drives all streams of the connection, so it is looked at first
        let accepted = tokio::select! {
            biased;
            accepted = poll_fn(|cx| connection.poll_accept(cx)) => accepted,
            () = poll_fn(|cx| conn.state.poll_draining(cx)), if !conn.state.is_draining() => continue,
            () = sleep_until(until) => {
                if drain_until.is_some() {
                    connection.abrupt_shutdown(h2::Reason::NO_ERROR);
                    drain_until = None;
                    is_cut = true;
                    draining = true;
                } else if quiet {
                    connection.graceful_shutdown();
                    draining = true;
                    drain_until = Some(Instant::now() + LINGER_MAX);
                }
                continue;
            }
        };
        let (request, respond) = match accepted {
            None => return,
            Some(Ok(accepted)) => accepted,
            Some(Err(error)) => {
                tracing::debug!(peer = %conn.facts.peer, %error, "HTTP/2 connection ended");
                let calmed = error.is_library() && error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM);
                if flooded.get() || calmed {
                    worker.recorder.count(Counter::DownstreamFloods);
                    broke(worker, conn, Cause::DownstreamFlood, active.get());
                } else if error.is_library() {
                    worker.recorder.count(Counter::DownstreamProtocolErrors);
                    broke(worker, conn, Cause::BadStream, active.get());
                }
                return;
            }
        };
        idle_since = Instant::now();
        served = served.saturating_add(1);
        if hcm.settings.requests_per_connection_max.is_some_and(|max| served >= max) {
            conn.state.drain();
        }
        let on = Rc::clone(worker);
        let stream_conn = Rc::clone(conn);
        let fields_max = hcm.settings.headers_max as usize;
        let stream = Stream::new(&active);
        worker.spawn(async move {
            let _stream = stream;
            let (parts, body) = request.into_parts();
            let mut head = RequestHead::default();
            let head_request = parts.method == http::Method::HEAD;
            let mut down = H2Down::new(respond, body, head_request);
            match read_request(&parts, fields_max, &mut head) {
                Ok(()) => {
                    head.scheme =
                        if stream_conn.facts.tls.is_some() { types::Scheme::Https } else { types::Scheme::Http };
                    let down = Down::H2(Box::new(down));
                    exchange::serve(&on, &stream_conn, down, &mut head, &mut Alarm::default()).await;
                }
                Err(bad) => {
                    on.recorder.count(Counter::DownstreamProtocolErrors);
                    let cause = match bad {
                        BadRequest::NoAuthority => Cause::MissingHost,
                        BadRequest::Malformed => Cause::BadStream,
                        BadRequest::TooManyFields => Cause::HeadersTooLarge,
                    };
                    let status = cause.surface().status;
                    if down.send_head(&refusal(status, &parts), true).is_err() {
                        down.reset(h2::Reason::PROTOCOL_ERROR);
                    }
                    on.telemetry.malformed(&on, &stream_conn, cause, status);
                }
            }
        });
    }
}

/// A client's frames ended the connection: the streams under way tell so in their lines; where there is none, the
/// connection has a line of its own.
fn broke(worker: &Worker, conn: &Conn, cause: Cause, streams: u32) {
    conn.broken.set(Some(cause));
    if streams == 0 {
        let info = StreamInfo { details: Details::Static(cause.surface().details), ..StreamInfo::default() };
        worker.telemetry.connection_closed(worker, conn, &info, cause);
    }
}

/// The answer to a request that never became one, in the caller's form.
fn refusal(status: u16, parts: &http::request::Parts) -> ResponseHead {
    let is_grpc = parts.headers.get("content-type").is_some_and(|kind| is_grpc_content_type(kind.as_bytes()));
    if !is_grpc {
        return ResponseHead::new(status);
    }
    let mut head = ResponseHead::new(200);
    head.fields.push("content-type", b"application/grpc");
    head.fields.push("grpc-status", GrpcCode::from_http(status).0.to_string().as_bytes());
    head
}

/// One stream under way, counted.
struct Stream(Rc<Cell<u32>>);

impl Stream {
    fn new(active: &Rc<Cell<u32>>) -> Self {
        active.set(active.get() + 1);
        Self(Rc::clone(active))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
