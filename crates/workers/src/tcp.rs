//! Connections of bytes: performs the steps of the engine's stream, then relays.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use engine::exchange::Failure;
use engine::record::NoRecord;
use engine::shared::Resource;
use engine::stream::{NetworkFilter, Stream, StreamAnswer, StreamStart, StreamStep, TcpAttempt};
use telemetry::metrics::{Counter, Series};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::{Duration, Instant};
use types::Cause;

use crate::accept::Conn;
use crate::exchange::ask;
use crate::io::Io;
use crate::metadata_exchange::{Front, Strip, header};
use crate::record::{Counts, Ended};
use crate::upstream::{self, Endpoints, Open};
use crate::worker::Worker;

/// Serves a connection of a chain that ends in TCP.
pub(crate) async fn serve(worker: &Rc<Worker>, conn: &Conn, mut down: Io) {
    let started = worker.now();
    let config = worker.config();
    let start = StreamStart { chain: &conn.chain, conn: &conn.facts, seed: worker.seed(), recorder: &mut NoRecord };
    let (mut stream, mut step) = Stream::start(&worker.env(&config), start);
    let mut upstream: Option<(Io, Endpoints, Open)> = None;
    let mut moved = Moved::default();
    // the attempt holds its places in the limits while the bytes flow
    let mut attempt_held: Option<Box<TcpAttempt>> = None;
    let mut allowed = 0;
    let mut is_denied = false;
    loop {
        let newly = stream.info().allowed.saturating_sub(std::mem::replace(&mut allowed, stream.info().allowed));
        worker.recorder.add(Counter::RbacAllowed, newly.into());
        let answer = match step {
            StreamStep::Ask(question) => StreamAnswer::Authorized(ask::authorize(worker, conn, *question).await),
            StreamStep::Connect(attempt) => {
                let answer = match connect(worker, conn, &attempt).await {
                    Ok(made) => {
                        upstream = Some(made);
                        StreamAnswer::Connected
                    }
                    Err(failure) => StreamAnswer::Failed(failure.cause, failure.detail),
                };
                attempt_held = Some(attempt);
                answer
            }
            StreamStep::Relay { idle_timeout, duration_max } => {
                let Some((up, ..)) = &mut upstream else { break };
                let limits = RelayLimits { idle: idle_timeout, until: duration_max.map(|max| Instant::now() + max) };
                let ways = directions(worker, conn, up, attempt_held.as_deref());
                let mut meter = Meter::new(worker, conn, &mut stream);
                let ending = relay(conn, (&mut down, up), ways, &limits, &mut meter).await;
                moved = meter.close();
                if let Some(cause) = ending {
                    stream.broke(cause);
                }
                break;
            }
            StreamStep::Close(cause) => {
                is_denied = cause == Cause::RbacDeniedConnection;
                if is_denied {
                    worker.recorder.count(Counter::RbacDenied);
                }
                let series = worker.telemetry.tcp_series(worker, conn, stream.info());
                series.opened();
                series.closed();
                break;
            }
        };
        let config = worker.config();
        step = stream.resume(&worker.env(&config), answer, &mut NoRecord);
    }
    drop(attempt_held);
    let endpoints = upstream.as_ref().map(|(_, endpoints, _)| endpoints.clone()).unwrap_or_default();
    let ended = Ended { start: started, end: worker.now(), sent: None, head: None };
    let counts = Counts { request_bytes: moved.received, response_bytes: moved.sent, ..Counts::default() };
    if let engine::chain::Terminal::Tcp(tcp) = &conn.chain.terminal {
        let line = crate::access::Line {
            facts: &conn.facts,
            chain: &conn.chain.name,
            head: None,
            response: None,
            trailers: None,
            info: stream.info(),
            counts: &counts,
            ended: &ended,
            upstream: &endpoints,
            connection_id: conn.id,
            downstream_failure: "",
        };
        crate::access::write(&worker.telemetry, &tcp.access_log, &line);
    }
    if is_denied {
        Box::pin(end(down)).await;
    }
}

/// How long, and for how many bytes, a client is listened to whose connection was denied.
const LINGER_MAX: (Duration, u64) = (Duration::from_secs(1), 64 * 1024);

/// Ends a connection in order, as Envoy does: what the client had said and nobody read would make a reset of its end.
async fn end(mut down: Io) {
    let ending = async {
        if down.shutdown().await.is_ok() {
            tokio::io::copy(&mut down.take(LINGER_MAX.1), &mut tokio::io::sink()).await.ok();
        }
    };
    if tokio::time::timeout(LINGER_MAX.0, ending).await.is_err() {
        tracing::trace!("a denied client did not close in time");
    }
}

async fn connect(worker: &Rc<Worker>, conn: &Conn, tcp: &TcpAttempt) -> Result<(Io, Endpoints, Open), Failure> {
    let attempt = &tcp.attempt;
    let held = attempt.shared.try_hold(Resource::Connection, attempt.cluster.limits.connections_max);
    let Some(held) = held else {
        attempt.shared.tallies.overflows.count();
        return Err(Failure::unsent(Cause::UpstreamOverflow));
    };
    let open = Open::new(attempt, held);
    let tls = match &attempt.transport.tls {
        None => None,
        Some(tls) => Some(worker.tls.client(tls, attempt).map_err(|error| Failure {
            cause: Cause::UpstreamTlsFailed,
            detail: format!("TLS_error:{error}:TLS_error_end").into(),
            request_sent: false,
        })?),
    };
    let made = upstream::make(worker, attempt, &conn.facts, tls).await;
    let (io, endpoints, _) = made.inspect_err(|_| attempt.shared.tallies.connect_failures.count())?;
    Ok((io, endpoints, open))
}

/// Both directions, with metadata exchanged where ALPN agreed on it.
fn directions(worker: &Worker, conn: &Conn, up: &Io, attempt: Option<&TcpAttempt>) -> (OneWay, OneWay) {
    let wanted_below = conn.chain.filters.iter().find_map(|filter| match filter {
        NetworkFilter::MetadataExchange { protocol } => Some(&**protocol),
        _ => None,
    });
    let agreed_below = conn.facts.tls.as_ref().and_then(|tls| tls.alpn.as_deref());
    let below = wanted_below.is_some() && wanted_below == agreed_below;
    let above = attempt.is_some_and(|attempt| attempt.metadata_exchange) && up.alpn() == Some(b"istio-peer-exchange");
    let told = |told: bool| if told { OneWay::told(header(&worker.config().node)) } else { OneWay::default() };
    // each way carries our header to whom it leads, and sheds the one of whom it comes from
    let (mut there, mut back) = (told(above), told(below));
    there.strip = below.then(Strip::default);
    back.strip = above.then(Strip::default);
    (there, back)
}

/// Bytes that passed: `received` from downstream, `sent` to it.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Moved {
    received: u64,
    sent: u64,
}

/// Counts a connection, from when it is known who is at its ends: peers that agreed to tell have told,
/// or will not.
///
/// *Source*: Istio's `istio_stats`, which reports a connection once its peer is known or it has ended.
struct Meter<'a> {
    worker: &'a Worker,
    conn: &'a Conn,
    stream: &'a mut Stream,
    series: Option<Arc<Series>>,
    moved: Moved,
    counted: Moved,
}

impl<'a> Meter<'a> {
    fn new(worker: &'a Worker, conn: &'a Conn, stream: &'a mut Stream) -> Self {
        Self { worker, conn, stream, series: None, moved: Moved::default(), counted: Moved::default() }
    }

    /// Takes what has passed and was told. `false`: nothing has passed since.
    fn take(&mut self, there: &mut OneWay, back: &mut OneWay) -> bool {
        if let Some(metadata) = there.told.take() {
            self.stream.met_downstream(metadata);
        }
        if let Some(metadata) = back.told.take() {
            self.stream.met_upstream(metadata);
        }
        let now = Moved { received: there.passed(), sent: back.passed() };
        let has_moved = now != self.moved;
        self.moved = now;
        if there.strip.is_none() && back.strip.is_none() && (has_moved || self.series.is_none()) {
            self.count();
        }
        has_moved
    }

    fn count(&mut self) -> &Series {
        let Self { worker, conn, stream, series, moved, counted } = self;
        let series = series.get_or_insert_with(|| {
            let series = worker.telemetry.tcp_series(worker, conn, stream.info());
            series.opened();
            series
        });
        series.bytes(moved.sent - counted.sent, moved.received - counted.received);
        *counted = *moved;
        series
    }

    /// The connection has ended.
    fn close(mut self) -> Moved {
        self.count().closed();
        self.moved
    }
}

struct RelayLimits {
    idle: Option<Duration>,
    until: Option<Instant>,
}

/// What is held of one direction.
const BUFFER: usize = 32 * 1024;

/// One direction: read, write, then close the other half.
#[derive(Default)]
struct OneWay {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    read_done: bool,
    done: bool,
    dirty: bool,
    passed: u64,
    /// Bytes of the buffer that are not the stream's own: our metadata.
    own: u64,
    /// The peer's metadata is taken off the front.
    strip: Option<Strip>,
    /// What was taken off, until somebody asks.
    told: Option<Box<[u8]>>,
}

impl OneWay {
    /// A direction that begins with our metadata.
    fn told(header: Vec<u8>) -> Self {
        Self { end: header.len(), own: header.len() as u64, buffer: header, ..Self::default() }
    }

    /// Bytes of the stream itself that passed.
    fn passed(&self) -> u64 {
        self.passed.saturating_sub(self.own)
    }
}

/// Why a direction broke off.
enum Broken {
    /// Where it comes from failed.
    From(std::io::Error),
    /// Where it leads failed.
    To(std::io::Error),
}

impl OneWay {
    /// Moves what can be moved. Ready when the other half has been closed.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut Io, to: &mut Io) -> Poll<Result<(), Broken>> {
        loop {
            if self.done {
                return Poll::Ready(Ok(()));
            }
            while self.start < self.end {
                let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer[self.start..self.end]));
                let n = written.map_err(Broken::To)?;
                if n == 0 {
                    return Poll::Ready(Err(Broken::To(std::io::ErrorKind::WriteZero.into())));
                }
                self.start += n;
                self.passed += n as u64;
                self.dirty = true;
            }
            if self.read_done {
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(Broken::To)?;
                self.done = true;
                self.buffer = Vec::new();
                continue;
            }
            if self.buffer.is_empty() {
                // an idle connection holds no buffer
                if self.dirty {
                    ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(Broken::To)?;
                    self.dirty = false;
                }
            }
            if self.buffer.len() < BUFFER {
                self.buffer.resize(BUFFER, 0);
            }
            let mut read = ReadBuf::new(&mut self.buffer);
            match Pin::new(&mut *from).poll_read(cx, &mut read) {
                Poll::Pending => {
                    // TLS may hold what the socket did not take: until it has, every wake-up tries again
                    if self.dirty {
                        ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(Broken::To)?;
                        self.dirty = false;
                    }
                    self.buffer = Vec::new();
                    return Poll::Pending;
                }
                Poll::Ready(read_to) => {
                    read_to.map_err(Broken::From)?;
                    self.start = 0;
                    self.end = read.filled().len();
                    self.read_done = self.end == 0;
                    self.take_metadata();
                }
            }
        }
    }
}

impl OneWay {
    /// Replaces what was just read by what follows the peer's metadata.
    fn take_metadata(&mut self) {
        let Some(strip) = &mut self.strip else { return };
        let front = if self.read_done { Some(strip.end()) } else { strip.take(&self.buffer[..self.end]) };
        self.buffer.clear();
        if let Some(Front { metadata, rest }) = front {
            (self.strip, self.told, self.buffer) = (None, metadata, rest);
        }
        self.end = self.buffer.len();
    }
}

/// Whether the other end broke a connection off.
fn was_reset(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionReset
}

/// Relays until both directions have ended, one failed, or a limit is reached. Where one side is reset before
/// it has said all, the other one is too: an orderly end would say that it had.
///
/// *Source*: what Envoy 1.40 does and logs (`UR` for the upstream's reset, nothing for silence).
async fn relay(
    conn: &Conn,
    (down, up): (&mut Io, &mut Io),
    (mut there, mut back): (OneWay, OneWay),
    limits: &RelayLimits,
    meter: &mut Meter<'_>,
) -> Option<Cause> {
    let mut timer: Option<Pin<Box<tokio::time::Sleep>>> = None;
    let mut last = Instant::now();
    let mut drain_until: Option<Instant> = None;
    poll_fn(|cx| {
        if conn.state.poll_draining(cx).is_ready() {
            drain_until.get_or_insert_with(|| Instant::now() + conn.state.drain_time);
        }
        let to = there.poll(cx, down, up);
        let from = back.poll(cx, up, down);
        if meter.take(&mut there, &mut back) {
            last = Instant::now();
        }
        match (to, from) {
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(None),
            (Poll::Ready(Err(Broken::From(error))), _) | (_, Poll::Ready(Err(Broken::To(error)))) => {
                if was_reset(&error) && !there.done {
                    up.end_in_reset();
                }
                return Poll::Ready(None);
            }
            (Poll::Ready(Err(Broken::To(error))), _) | (_, Poll::Ready(Err(Broken::From(error)))) => {
                let is_cut = was_reset(&error) && !back.done;
                if is_cut {
                    down.end_in_reset();
                }
                return Poll::Ready(is_cut.then_some(Cause::UpstreamReset));
            }
            _ => {}
        }
        loop {
            let idle = limits.idle.map(|idle| last + idle);
            let Some(next) = idle.into_iter().chain(limits.until).chain(drain_until).min() else {
                return Poll::Pending;
            };
            let sleep = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next)));
            if sleep.deadline() != next {
                sleep.as_mut().reset(next);
            }
            ready!(sleep.as_mut().poll(cx));
            let now = Instant::now();
            if idle.is_some_and(|at| at <= now) {
                return Poll::Ready(None);
            }
            if limits.until.is_some_and(|at| at <= now) {
                return Poll::Ready(Some(Cause::MaxStreamDuration));
            }
            if drain_until.is_some_and(|at| at <= now) {
                return Poll::Ready(None);
            }
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use identity::tls::{Bounds, ClientAuth, ClientTls, ServerTls};
    use identity::workload::KeyAndChain;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;
    use crate::io::Socket;

    /// Both ends of TLS over a pipe that holds `room` bytes.
    async fn tls(room: usize) -> (Io, tokio_rustls::client::TlsStream<DuplexStream>) {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap().self_signed(&key).unwrap();
        let keys = KeyAndChain::from_pem(certificate.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap();
        let server = ServerTls {
            certificates: vec![keys],
            client_auth: ClientAuth::None,
            alpn: Vec::new(),
            bounds: Bounds::default(),
        };
        let client = ClientTls {
            certificate: None,
            verify: None,
            alpn: Vec::new(),
            bounds: Bounds::default(),
            send_server_name: false,
        };
        let server = server.build().unwrap();
        let none: [&[u8]; 0] = [];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(server.for_alpn(none)));
        let connector = tokio_rustls::TlsConnector::from(client.build().unwrap());
        let name = rustls::pki_types::ServerName::try_from("a").unwrap();
        let (near, far) = tokio::io::duplex(room);
        let (accepted, connected) = tokio::join!(acceptor.accept(Socket::pipe(near)), connector.connect(name, far));
        (Io::server_tls(accepted.unwrap()), connected.unwrap())
    }

    #[tokio::test]
    async fn what_tls_holds_back_goes_on_when_there_is_room() {
        const SENT: usize = 20_000;
        let (mut to, mut reader) = tls(1024).await;
        let (mut writer, from) = tokio::io::duplex(SENT);
        let mut from = Io::Plain(Socket::pipe(from));
        writer.write_all(&vec![7; SENT]).await.unwrap();
        let mut way = OneWay::default();
        let mut got = vec![0; SENT];
        let reading = tokio::time::timeout(Duration::from_secs(60), reader.read_exact(&mut got));
        tokio::select! {
            biased;
            _ = poll_fn(|cx| way.poll(cx, &mut from, &mut to)) => panic!("the writer has not ended"),
            read = reading => assert_eq!(read.expect("all of it arrives, though nothing follows").unwrap(), SENT),
        }
        assert!(got.iter().all(|byte| *byte == 7));
    }
}
