//! A connection from accept to its chain's terminal filter, in phases:
//! original destination, inspectors, the listener that it is handed to and its inspectors, filter chain,
//! TLS, HTTP or bytes.

use std::cell::Cell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use engine::chain::{Direction, FilterChain, Listener, ListenerFilters, Terminal, listener_for};
use engine::facts::{ConnFacts, Transport};
use engine::record::NoRecord;
use engine::select_chain;
use socket2::SockRef;
use telemetry::metrics::{Counter, Gauge};
use tokio::net::TcpStream;
use tokio_rustls::LazyConfigAcceptor;
use types::Cause;

use crate::detect::{self, Seen};
use crate::io::{Io, Socket};
use crate::worker::{ConnState, Worker};

/// A connection as the control side hands it over.
pub(crate) struct Accepted {
    pub(crate) stream: std::net::TcpStream,
    pub(crate) listener: Arc<str>,
    pub(crate) peer: SocketAddr,
    /// The configuration's port, where the socket was inherited and has another: policies, inspectors
    /// and logs know this one only.
    pub(crate) stands_for: Option<u16>,
}

/// A connection that has found its chain.
pub(crate) struct Conn {
    pub(crate) facts: Arc<ConnFacts>,
    pub(crate) chain: Arc<FilterChain>,
    pub(crate) state: Rc<ConnState>,
    pub(crate) id: u64,
    /// What ended an HTTP/2 connection under its streams, once something did.
    pub(crate) broken: Cell<Option<Cause>>,
}

impl Conn {
    /// Whether it should end after what is in flight.
    pub(crate) fn is_draining(&self) -> bool {
        self.state.is_told_to_leave()
    }
}

/// Counts a connection for as long as it lives.
struct Counted<'a>(&'a Worker);

impl<'a> Counted<'a> {
    fn new(worker: &'a Worker) -> Self {
        worker.recorder.count(Counter::DownstreamConnections);
        worker.recorder.gauge(Gauge::DownstreamActive, 1);
        Self(worker)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.recorder.gauge(Gauge::DownstreamActive, -1);
    }
}

/// Serves one accepted connection to its end.
pub(crate) async fn serve(worker: &Rc<Worker>, accepted: Accepted) {
    let _counted = Counted::new(worker);
    let peer = accepted.peer;
    let stream = match prepare(accepted.stream) {
        Ok(stream) => stream,
        Err(error) => return tracing::debug!(%error, %peer, "an accepted connection is unusable"),
    };
    let config = worker.config();
    let Some(listener) = config.listeners.get(&accepted.listener) else { return };
    let Ok(local) = stream.local_addr() else { return };
    let mut local = canonical(local);
    if let Some(port) = accepted.stands_for {
        local.set_port(port);
    }
    let original = if listener.filters.original_dst || listener.use_original_dst {
        original_destination(&stream, local)
    } else {
        None
    };
    let mut facts = ConnFacts::plaintext(&listener.name, original.unwrap_or(local), canonical(peer));
    facts.original_destination = original.filter(|original| *original != local);
    if let Some(keepalive) = listener.keepalive
        && let Err(error) = crate::dial::set_keepalive(&stream, keepalive)
    {
        tracing::debug!(%error, "no TCP keep-alive");
    }
    let mut socket = Socket::tcp(stream);
    let is_gateway = worker.shared.is_gateway;
    if !inspect(&mut socket, &listener.filters, &mut facts, is_gateway).await {
        return;
    }
    // A redirect or a preamble says where the client wanted to go: the listener there decides, if there is one.
    let is_restored = original.is_some() || facts.local != local;
    let other = if listener.use_original_dst && is_restored { listener_for(&config, facts.local) } else { None };
    if let Some(other) = other {
        facts.listener = other.name.clone();
        if !inspect(&mut socket, &other.filters, &mut facts, is_gateway).await {
            return;
        }
    }
    let listener = other.unwrap_or(listener);
    serve_detected(worker, listener, socket, facts).await;
}

fn prepare(stream: std::net::TcpStream) -> std::io::Result<TcpStream> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    TcpStream::from_std(stream)
}

/// IPv4 in IPv6 form is IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Where the client wanted to go before the connection was redirected.
fn original_destination(stream: &TcpStream, local: SocketAddr) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let original = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    original.ok().and_then(|address| address.as_socket()).map(canonical)
}

/// How long inspectors look where the listener sets no time (0 s is "for ever"), from the first byte on.
const SNIFF_MAX: Duration = Duration::from_secs(15);
/// How long a client of a sidecar may be silent there: as long as an idle connection of bytes.
const SILENCE_MAX: Duration = Duration::from_hours(1);

/// Reads the first bytes as far as the listener's inspectors need them. `false`: the connection is over.
async fn inspect(socket: &mut Socket, filters: &ListenerFilters, facts: &mut ConnFacts, is_gateway: bool) -> bool {
    let port = facts.local.port();
    let tls = filters.tls_inspector.as_ref().is_some_and(|inspector| inspector.runs_on(port));
    let http = filters.http_inspector.as_ref().is_some_and(|inspector| inspector.runs_on(port));
    if !tls && !http && filters.proxy_protocol.is_none() {
        return true;
    }
    if filters.timeout.is_none() {
        let silence = if is_gateway { SNIFF_MAX } else { SILENCE_MAX };
        let speaks = poll_fn(|cx| socket.poll_readable(cx));
        if tokio::time::timeout(silence, speaks).await.is_err() {
            return false;
        }
    }
    let mut buffer = BytesMut::new();
    let looking = async {
        if let Some(expected) = &filters.proxy_protocol
            && !crate::proxy_protocol::read(socket, &mut buffer, expected.optional, facts).await
        {
            return false;
        }
        look(socket, &mut buffer, tls, http, facts).await
    };
    let timeout = filters.timeout.unwrap_or(SNIFF_MAX);
    let goes_on = tokio::time::timeout(timeout, looking).await.unwrap_or(filters.continue_on_timeout);
    if !buffer.is_empty() {
        socket.unread(buffer.freeze());
    }
    goes_on
}

async fn look(socket: &mut Socket, buffer: &mut BytesMut, tls: bool, http: bool, facts: &mut ConnFacts) -> bool {
    use tokio::io::AsyncReadExt as _;
    let mut may_be_tls = tls;
    loop {
        if !buffer.is_empty() {
            if may_be_tls {
                match detect::tls(buffer) {
                    Seen::Yes(hello) => {
                        facts.transport = Transport::Tls;
                        facts.server_name = hello.server_name;
                        facts.protocols = hello.alpn;
                        return true;
                    }
                    Seen::No => may_be_tls = false,
                    Seen::NeedMore => {}
                }
            }
            if !may_be_tls {
                if !http {
                    return true;
                }
                match detect::http(buffer) {
                    Seen::Yes(protocol) => {
                        facts.protocols = vec![protocol.into()];
                        return true;
                    }
                    Seen::No => return true,
                    Seen::NeedMore => {}
                }
            }
        }
        buffer.reserve(2048);
        match socket.read_buf(buffer).await {
            // a client that closes without a byte is nobody's concern
            Ok(0) => return !buffer.is_empty(),
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

async fn serve_detected(worker: &Rc<Worker>, listener: &Arc<Listener>, socket: Socket, mut facts: ConnFacts) {
    let Ok(chain) = select_chain(listener, &facts, &mut NoRecord) else {
        worker.recorder.count(Counter::NoFilterChain);
        worker.telemetry.connection_refused(worker, listener, &facts, Cause::NoFilterChain);
        return;
    };
    let io = match &chain.tls {
        None => Io::Plain(socket),
        Some(tls) => {
            let handshake = Box::pin(handshake(worker, socket, tls));
            let done = match chain.handshake_timeout {
                None => handshake.await,
                Some(timeout) => tokio::time::timeout(timeout, handshake)
                    .await
                    .unwrap_or_else(|_| Err("the handshake took too long".into())),
            };
            match done {
                Ok(stream) => {
                    worker.recorder.count(Counter::TlsHandshakes);
                    let (_, connection) = stream.get_ref();
                    let wants_chain = matches!(&chain.terminal, Terminal::Http(hcm) if hcm.client_cert_parts.chain);
                    let seen = crate::tls::facts(
                        connection,
                        connection.peer_certificates(),
                        worker.tls.own_uri(tls),
                        wants_chain,
                    );
                    facts.tls = Some(Arc::new(seen));
                    Io::server_tls(stream)
                }
                Err(reason) => {
                    worker.recorder.count(Counter::TlsErrors);
                    tracing::debug!(peer = %facts.peer, local = %facts.local, reason, "TLS handshake failed");
                    worker.telemetry.handshake_failed(worker, listener, &chain, &facts, &reason);
                    return;
                }
            }
        }
    };
    let direction = direction(worker, listener);
    let state = worker.register(&listener.name, direction, &chain);
    let (facts, id) = (Arc::new(facts), worker.next_connection_id());
    let conn = Conn { facts, chain: Arc::clone(&chain), state, id, broken: Cell::default() };
    match &chain.terminal {
        Terminal::Http(hcm) => crate::serve::http(worker, Rc::new(conn), hcm, io).await,
        Terminal::Tcp(_) => crate::tcp::serve(worker, &conn, io).await,
    }
}

/// Listeners that are reached by hand-over say their direction themselves.
fn direction(worker: &Worker, listener: &Listener) -> Direction {
    match listener.direction {
        Direction::Unspecified if worker.shared.is_gateway => Direction::Inbound,
        other => other,
    }
}

/// A handshake that never ends without a time-out of the chain's own.
const HANDSHAKE_MAX: Duration = Duration::from_mins(1);

async fn handshake(
    worker: &Rc<Worker>,
    socket: Socket,
    tls: &engine::tls::DownstreamTls,
) -> Result<tokio_rustls::server::TlsStream<Socket>, String> {
    let shaking = async {
        let acceptor = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), socket);
        let start = acceptor.await.map_err(|error| error.to_string())?;
        // secrets are resolved at each ClientHello, so a renewed certificate counts at once
        let configs = worker.tls.server(tls).map_err(|error| error.to_string())?;
        let config = Arc::clone(configs.for_hello(&start.client_hello()));
        start.into_stream(config).await.map_err(|error| error.to_string())
    };
    tokio::time::timeout(HANDSHAKE_MAX, shaking).await.unwrap_or_else(|_| Err("the handshake took too long".into()))
}
