//! Connections to upstreams: pools of one worker, and how a connection is made.
//!
//! A pool is all that may be shared: cluster, address, TLS context (identity, trust, names, ALPN),
//! server name, protocol, source address, PROXY preamble. Counts and
//! limits are the proxy's ([`engine::shared`]), connections are the worker's.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use engine::RuntimeConfig;
use engine::cluster::{Address, Cluster, UpstreamHttp};
use engine::config::{Name, NameHasher};
use engine::exchange::{Attempt, Failure, UpstreamProtocol};
use engine::facts::ConnFacts;
use engine::shared::{ClusterHeld, Resource, SharedHost};
use rustls::ClientConfig;
use tokio::sync::Notify;
use tokio::time::Instant;
use types::{Cause, RequestHead};

use crate::codec::flood::{Guarded, PeerSettings};
use crate::codec::h1::H1Client;
use crate::codec::h2::{H2Settings, client_builder};
use crate::codec::{Broken, Up};
use crate::dial;
use crate::worker::Worker;

/// What may share a connection.
struct Key {
    cluster: Name,
    address: Address,
    /// Compared by address: contexts are cached, so the same settings and secrets are the same one.
    tls: Option<Arc<ClientConfig>>,
    sni: Option<Arc<str>>,
    protocol: UpstreamProtocol,
    bind: Option<IpAddr>,
    /// Of the PROXY preamble; such connections serve one client's connection only.
    preamble: Option<(SocketAddr, SocketAddr)>,
}

impl Key {
    fn hash(&self) -> u64 {
        use std::hash::BuildHasher;
        let mut state = NameHasher.build_hasher();
        self.cluster.hash(&mut state);
        self.address.hash(&mut state);
        self.tls.as_ref().map(|tls| Arc::as_ptr(tls) as usize).hash(&mut state);
        self.sni.hash(&mut state);
        self.preamble.hash(&mut state);
        state.finish()
    }

    /// Whether it differs from `other` in nothing but the TLS context.
    fn same_but_tls(&self, other: &Self) -> bool {
        self.cluster == other.cluster
            && self.address == other.address
            && self.sni == other.sni
            && self.protocol == other.protocol
            && self.bind == other.bind
            && self.preamble == other.preamble
    }

    fn same(&self, other: &Self) -> bool {
        let tls = match (&self.tls, &other.tls) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        tls && self.same_but_tls(other)
    }
}

/// Counts of one open connection, for as long as it is open.
pub(crate) struct Open {
    _cluster: ClusterHeld,
    host: Arc<SharedHost>,
    pool: Option<Rc<Pool>>,
}

impl Open {
    pub(crate) fn new(attempt: &Attempt, place: ClusterHeld) -> Self {
        let host = Arc::clone(&attempt.picked.host);
        host.connections.enter();
        attempt.shared.tallies.connections.count();
        Self { _cluster: place, host, pool: None }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.host.connections.leave();
        if let Some(pool) = &self.pool {
            pool.open.set(pool.open.get() - 1);
            pool.released.notify_one();
        }
    }
}

/// Where a connection goes, for logs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Endpoints {
    pub(crate) local: Option<SocketAddr>,
}

/// An HTTP/1 connection that is not in use.
struct Idle {
    connection: Box<H1Client>,
    kept: Kept,
}

/// What belongs to an HTTP/1 connection beside its codec.
struct Kept {
    /// Counts until the connection is dropped.
    _open: Open,
    endpoints: Endpoints,
    born: Instant,
    used: Instant,
    requests: u32,
}

/// A shared HTTP/2 connection.
struct H2Conn {
    sender: h2::client::SendRequest<Bytes>,
    closed: Rc<Cell<bool>>,
    settings: Rc<PeerSettings>,
    active: Cell<u32>,
    requests: Cell<u32>,
    born: Instant,
    used: Cell<Instant>,
    endpoints: Endpoints,
    _open: Open,
}

impl H2Conn {
    fn takes_more(&self, http: &UpstreamHttp, now: Instant) -> bool {
        let streams = self.sender.current_max_send_streams();
        let limit = http.concurrent_streams_max.map_or(usize::MAX, |max| max as usize).min(streams.max(1));
        !self.closed.get() && (self.active.get() as usize) < limit && !worn(http, self.born, self.requests.get(), now)
    }
}

/// Whether a connection has served as long, or as often, as it may.
fn worn(http: &UpstreamHttp, born: Instant, requests: u32, now: Instant) -> bool {
    http.requests_per_connection_max.is_some_and(|max| requests >= max)
        || http.connection_duration_max.is_some_and(|max| now.duration_since(born) >= max)
}

/// A connection being made that several requests wait for.
#[derive(Default)]
struct Connecting {
    done: Notify,
    failure: RefCell<Option<Failure>>,
}

struct Pool {
    key: Key,
    /// As the last attempt had it: its settings hold for connections that are there already, too.
    cluster: RefCell<Arc<Cluster>>,
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Rc<H2Conn>>>,
    connecting: RefCell<Option<Rc<Connecting>>>,
    open: Cell<u32>,
    released: Notify,
    /// Another TLS context (of a renewed certificate, as a rule) has taken its place: what comes back is closed,
    /// since nobody would ask for it again while it counts against the cluster's limit.
    is_superseded: Cell<bool>,
}

impl Pool {
    /// Lets go of what nobody uses, now and later.
    fn supersede(&self) {
        self.is_superseded.set(true);
        // dropped when nothing is borrowed any more
        let idle = self.idle.take();
        self.shared.borrow_mut().retain(|conn| conn.active.get() > 0);
        drop(idle);
    }

    /// Whether a connection is of no further use once nothing is under way on it.
    fn is_done_with(&self, born: Instant, requests: u32, now: Instant) -> bool {
        self.is_superseded.get() || worn(&self.cluster.borrow().http, born, requests, now)
    }
}

/// How long a connection with a PROXY preamble is kept: only one connection of one client could use it.
const PREAMBLE_IDLE: Duration = Duration::from_secs(15);

/// All pools of a worker.
#[derive(Default)]
pub(crate) struct Pools {
    by_hash: RefCell<HashMap<u64, Vec<Rc<Pool>>, NameHasher>>,
}

impl Pools {
    fn pool(&self, key: Key, cluster: &Arc<Cluster>) -> Rc<Pool> {
        let mut pools = self.by_hash.borrow_mut();
        let list = pools.entry(key.hash()).or_default();
        if let Some(found) = list.iter().find(|pool| pool.key.same(&key)) {
            if !Arc::ptr_eq(&found.cluster.borrow(), cluster) {
                found.cluster.replace(Arc::clone(cluster));
            }
            found.is_superseded.set(false);
            return Rc::clone(found);
        }
        let pool = Rc::new(Pool {
            key,
            cluster: RefCell::new(Arc::clone(cluster)),
            idle: RefCell::default(),
            shared: RefCell::default(),
            connecting: RefCell::default(),
            open: Cell::new(0),
            released: Notify::new(),
            is_superseded: Cell::new(false),
        });
        list.push(Rc::clone(&pool));
        if pool.key.tls.is_some() {
            let before = pools.values().flatten();
            for old in before.filter(|old| !Rc::ptr_eq(old, &pool) && old.key.same_but_tls(&pool.key)) {
                old.supersede();
            }
        }
        pool
    }

    /// Closes what has been idle too long, belongs to a cluster that is gone or was closed by the other side;
    /// forgets empty pools.
    pub(crate) fn sweep(&self, config: &RuntimeConfig, now: Instant) {
        let mut gone = Vec::new();
        #[expect(clippy::iter_over_hash_type, reason = "each pool is looked at by itself")]
        for list in self.by_hash.borrow_mut().values_mut() {
            for pool in list.iter() {
                let current = config.clusters.get(&pool.key.cluster);
                if let Some(current) = current
                    && !Arc::ptr_eq(&pool.cluster.borrow(), current)
                {
                    pool.cluster.replace(Arc::clone(current));
                }
                let cluster = Arc::clone(&pool.cluster.borrow());
                let http = &cluster.http;
                let preamble_max = pool.key.preamble.map(|_| PREAMBLE_IDLE);
                let idle_max = http.idle_timeout.into_iter().chain(preamble_max).min();
                let stale =
                    |used: Instant| current.is_none() || idle_max.is_some_and(|max| now.duration_since(used) >= max);
                let (drop, keep) = pool.idle.take().into_iter().partition(|idle: &Idle| {
                    stale(idle.kept.used) || worn(http, idle.kept.born, idle.kept.requests, now)
                });
                let keep: Vec<Idle> = keep;
                let (mut keep, mut dead): (Vec<Idle>, Vec<Idle>) = (keep, drop);
                // a peer that closed is let go now, so that descriptors come back
                let mut at = 0;
                while at < keep.len() {
                    if keep[at].connection.is_fresh() { at += 1 } else { dead.push(keep.swap_remove(at)) }
                }
                *pool.idle.borrow_mut() = keep;
                gone.extend(dead);
                pool.shared.borrow_mut().retain(|conn| {
                    let is_done = stale(conn.used.get()) || worn(http, conn.born, conn.requests.get(), now);
                    !conn.closed.get() && (!is_done || conn.active.get() > 0)
                });
            }
            list.retain(|pool| pool.open.get() > 0 || pool.connecting.borrow().is_some() || Rc::strong_count(pool) > 1);
        }
        drop(gone);
        self.by_hash.borrow_mut().retain(|_, list| !list.is_empty());
    }
}

/// A connection for one request.
pub(crate) struct Leased {
    kind: LeasedKind,
    pool: Rc<Pool>,
    /// Both ends of it.
    pub(crate) endpoints: Endpoints,
}

enum LeasedKind {
    H1(Box<H1Client>, Kept),
    H2(Streaming, Box<h2::client::SendRequest<Bytes>>),
}

/// One stream of a shared connection, counted from when its place is taken. The last one of a connection that
/// takes no more lets it go.
struct Streaming {
    conn: Rc<H2Conn>,
    pool: Rc<Pool>,
}

impl Streaming {
    fn on(conn: Rc<H2Conn>, pool: &Rc<Pool>) -> Self {
        conn.active.set(conn.active.get() + 1);
        conn.requests.set(conn.requests.get().saturating_add(1));
        Self { conn, pool: Rc::clone(pool) }
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        let (conn, now) = (&self.conn, Instant::now());
        conn.active.set(conn.active.get() - 1);
        conn.used.set(now);
        if conn.active.get() == 0 && self.pool.is_done_with(conn.born, conn.requests.get(), now) {
            self.pool.shared.borrow_mut().retain(|other| !Rc::ptr_eq(other, conn));
        }
    }
}

/// A request under way on a connection.
pub(crate) struct Running {
    /// The message.
    pub(crate) up: Up,
    back: Back,
    pool: Rc<Pool>,
}

enum Back {
    H1(Kept),
    H2(#[expect(dead_code, reason = "counts the stream until dropped")] Streaming),
}

impl Leased {
    /// Whether it speaks HTTP/2.
    pub(crate) fn is_http2(&self) -> bool {
        matches!(self.kind, LeasedKind::H2(..))
    }

    /// Waits until the peer has said what it can do.
    async fn settled(&self, connect_timeout: Duration) -> Result<(), Failure> {
        let LeasedKind::H2(streaming, _) = &self.kind else { return Ok(()) };
        let settling = tokio::time::timeout(connect_timeout, streaming.conn.settings.wait()).await;
        settling.map_err(|_| Failure::unsent(Cause::ConnectTimeout))?;
        if streaming.conn.closed.get() { Err(Failure::unsent(Cause::UpstreamClosed)) } else { Ok(()) }
    }

    /// Whether it can carry HTTP/1's upgrade, or an extended CONNECT; known for an attempt that wants one.
    pub(crate) fn takes_upgrades(&self) -> bool {
        match &self.kind {
            LeasedKind::H1(..) => true,
            LeasedKind::H2(_, sender) => sender.is_extended_connect_protocol_enabled(),
        }
    }

    /// Sends the head.
    pub(crate) fn start(self, head: &RequestHead, end: bool) -> Result<Running, Broken> {
        match self.kind {
            LeasedKind::H1(connection, kept) => {
                Ok(Running { up: Up::start_h1(connection, head, end)?, back: Back::H1(kept), pool: self.pool })
            }
            LeasedKind::H2(streaming, mut sender) => {
                let up = Up::start_h2(&mut sender, head, end)?;
                Ok(Running { up, back: Back::H2(streaming), pool: self.pool })
            }
        }
    }
}

impl Running {
    /// The response has ended: the connection goes back, if it may carry another request.
    pub(crate) fn finish(self) {
        let (Up::H1(mut connection), Back::H1(mut kept)) = (self.up, self.back) else { return };
        let now = Instant::now();
        kept.requests = kept.requests.saturating_add(1);
        kept.used = now;
        if connection.is_reusable() && !self.pool.is_done_with(kept.born, kept.requests, now) {
            connection.rest();
            self.pool.idle.borrow_mut().push(Idle { connection, kept });
            self.pool.released.notify_one();
        }
    }

    /// Gives it up.
    pub(crate) fn cancel(self) {
        self.up.cancel();
    }
}

/// How often a worker looks whether another one has given a connection's place back.
const PLACE_RETRY: Duration = Duration::from_millis(5);

/// Takes a connection for `attempt`: one of the pool, or a new one.
///
/// *Cancel safety*: dropping the future gives every place back; requests waiting for the same new
/// connection make one themselves.
pub(crate) async fn lease(worker: &Rc<Worker>, attempt: &Attempt, conn: &ConnFacts) -> Result<Leased, Failure> {
    let leased = find(worker, attempt, conn).await?;
    if attempt.upgrade {
        Box::pin(leased.settled(attempt.cluster.connect_timeout)).await?;
    }
    Ok(leased)
}

async fn find(worker: &Rc<Worker>, attempt: &Attempt, conn: &ConnFacts) -> Result<Leased, Failure> {
    let tls = match &attempt.transport.tls {
        None => None,
        Some(tls) => Some(worker.tls.client(tls, attempt).map_err(|error| Failure {
            cause: Cause::UpstreamTlsFailed,
            detail: format!("TLS_error:{error}:TLS_error_end").into(),
            request_sent: false,
        })?),
    };
    let key = Key {
        cluster: Name::clone(&attempt.cluster.name),
        address: attempt.picked.host.address.clone(),
        tls: tls.clone(),
        sni: attempt.sni.clone(),
        protocol: attempt.protocol,
        bind: attempt.cluster.bind,
        preamble: attempt.transport.proxy_protocol.map(|_| (conn.peer, conn.local)),
    };
    let http = &attempt.cluster.http;
    let pool = worker.pools.pool(key, &attempt.cluster);
    // one place for the whole wait: who waits already does not lose it to who comes later
    let mut pending = None;
    loop {
        if attempt.protocol != UpstreamProtocol::Http1
            && let Some(leased) = lease_shared(&pool, http).await
        {
            return Ok(leased);
        }
        if attempt.protocol != UpstreamProtocol::Http2
            && let Some(leased) = lease_idle(&pool, http)
        {
            return Ok(leased);
        }
        let limits = &attempt.cluster.limits;
        if pending.is_none() {
            pending = attempt.shared.try_hold(Resource::Pending, limits.pending_max);
        }
        if pending.is_none() {
            attempt.shared.tallies.overflows.count();
            return Err(Failure::unsent(Cause::UpstreamOverflow));
        }
        if attempt.protocol != UpstreamProtocol::Http1 {
            let waiting = pool.connecting.borrow().clone();
            if let Some(connecting) = waiting {
                connecting.done.notified().await;
                if let Some(failure) = &*connecting.failure.borrow() {
                    return Err(failure.clone());
                }
                continue;
            }
        }
        let held = match attempt.shared.try_hold(Resource::Connection, limits.connections_max) {
            Some(held) => held,
            // a worker without a connection may open one above the limit, as Envoy's may
            None if pool.open.get() == 0 => attempt.shared.hold(Resource::Connection),
            None => {
                // a place comes back here, or in another worker, which cannot tell us
                tokio::select! {
                    () = pool.released.notified() => {}
                    () = tokio::time::sleep(PLACE_RETRY) => {}
                }
                continue;
            }
        };
        return connect(worker, attempt, conn, &pool, tls, held).await;
    }
}

async fn lease_shared(pool: &Rc<Pool>, http: &UpstreamHttp) -> Option<Leased> {
    loop {
        let now = Instant::now();
        let found = pool.shared.borrow().iter().find(|conn| conn.takes_more(http, now)).cloned();
        let streaming = Streaming::on(found?, pool);
        let mut sender = streaming.conn.sender.clone();
        match poll_fn(|cx| sender.poll_ready(cx)).await {
            Ok(()) => {
                let endpoints = streaming.conn.endpoints.clone();
                let kind = LeasedKind::H2(streaming, Box::new(sender));
                return Some(Leased { kind, pool: Rc::clone(pool), endpoints });
            }
            // it is leaving or gone: no new stream on it
            Err(_) => {
                streaming.conn.closed.set(true);
                pool.shared.borrow_mut().retain(|other| !Rc::ptr_eq(other, &streaming.conn));
            }
        }
    }
}

fn lease_idle(pool: &Rc<Pool>, http: &UpstreamHttp) -> Option<Leased> {
    let now = Instant::now();
    loop {
        let mut idle = pool.idle.borrow_mut().pop()?;
        let stale = http.idle_timeout.is_some_and(|max| now.duration_since(idle.kept.used) >= max);
        if !stale && !worn(http, idle.kept.born, idle.kept.requests, now) && idle.connection.is_fresh() {
            let endpoints = idle.kept.endpoints.clone();
            return Some(Leased { kind: LeasedKind::H1(idle.connection, idle.kept), pool: Rc::clone(pool), endpoints });
        }
    }
}

/// Tells those who wait for a connection, on every way out.
struct Announce<'a> {
    pool: &'a Rc<Pool>,
    connecting: Option<Rc<Connecting>>,
}

impl Drop for Announce<'_> {
    fn drop(&mut self) {
        if let Some(connecting) = &self.connecting {
            self.pool.connecting.take();
            connecting.done.notify_waiters();
        }
    }
}

async fn connect(
    worker: &Rc<Worker>,
    attempt: &Attempt,
    conn: &ConnFacts,
    pool: &Rc<Pool>,
    tls: Option<Arc<ClientConfig>>,
    held: ClusterHeld,
) -> Result<Leased, Failure> {
    let connecting = (attempt.protocol != UpstreamProtocol::Http1).then(Rc::<Connecting>::default);
    pool.connecting.borrow_mut().clone_from(&connecting);
    let announce = Announce { pool, connecting };
    let mut open = Open::new(attempt, held);
    pool.open.set(pool.open.get() + 1);
    open.pool = Some(Rc::clone(pool));
    let made = make(worker, attempt, conn, tls).await;
    let (io, endpoints, alpn_http2) = match made {
        Ok(made) => made,
        Err(failure) => {
            attempt.shared.tallies.connect_failures.count();
            if let Some(connecting) = &announce.connecting {
                connecting.failure.replace(Some(failure.clone()));
            }
            return Err(failure);
        }
    };
    let now = Instant::now();
    let http2 = match attempt.protocol {
        UpstreamProtocol::Http1 => false,
        UpstreamProtocol::Http2 => true,
        UpstreamProtocol::Auto => alpn_http2,
    };
    if !http2 {
        let limits = http1::Limits { head_bytes_max: 64 * 1024, ..http1::Limits::default() };
        let kept = Kept { _open: open, endpoints: endpoints.clone(), born: now, used: now, requests: 0 };
        let kind = LeasedKind::H1(Box::new(H1Client::new(io, limits)), kept);
        return Ok(Leased { kind, pool: Rc::clone(pool), endpoints });
    }
    let http = &attempt.cluster.http;
    let defaults = H2Settings::default();
    let settings = H2Settings {
        stream_window: http.stream_window.map_or(defaults.stream_window, |window| window.min(1024 * 1024)),
        connection_window: http
            .connection_window
            .map_or(defaults.connection_window, |window| window.min(16 * 1024 * 1024)),
        ..defaults
    };
    let failed = || Failure::unsent(Cause::UpstreamProtocolError);
    let (io, peer_settings) = Guarded::client(io);
    let handshake = Box::pin(client_builder(&settings).handshake::<_, Bytes>(io));
    let (sender, mut connection) = handshake.await.map_err(|_| failed())?;
    let pings = http.keepalive.and_then(|(interval, timeout)| {
        let pings = connection.ping_pong()?;
        Some(Box::pin(unanswered(pings, interval, timeout)))
    });
    let closed = Rc::new(Cell::new(false));
    let (flag, settings) = (Rc::clone(&closed), Rc::clone(&peer_settings));
    worker.spawn(async move {
        // a peer that is silent for too long is gone: its streams end with the connection
        let ended = match pings {
            None => connection.await,
            Some(pings) => tokio::select! {
                ended = connection => ended,
                () = pings => Err(h2::Reason::CANCEL.into()),
            },
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "upstream HTTP/2 connection ended");
        }
        flag.set(true);
        settings.done();
    });
    let conn = Rc::new(H2Conn {
        sender: sender.clone(),
        closed,
        settings: peer_settings,
        active: Cell::new(0),
        requests: Cell::new(0),
        born: now,
        used: Cell::new(now),
        endpoints: endpoints.clone(),
        _open: open,
    });
    pool.shared.borrow_mut().push(Rc::clone(&conn));
    let streaming = Streaming::on(conn, pool);
    let mut sender = Box::new(sender);
    poll_fn(|cx| sender.poll_ready(cx)).await.map_err(|_| Failure::unsent(Cause::UpstreamClosed))?;
    drop(announce);
    Ok(Leased { kind: LeasedKind::H2(streaming, sender), pool: Rc::clone(pool), endpoints })
}

/// Asks the peer for a sign of life every `interval`; ends when one does not come within `timeout`.
///
/// *Source*: Envoy `KeepaliveSettings`.
async fn unanswered(mut pings: h2::PingPong, interval: Duration, timeout: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        match tokio::time::timeout(timeout, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // it has ended by itself, which the connection tells
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// Dials, greets and shakes hands, all within the cluster's connect time-out.
pub(crate) async fn make(
    worker: &Rc<Worker>,
    attempt: &Attempt,
    conn: &ConnFacts,
    tls: Option<Arc<ClientConfig>>,
) -> Result<(crate::io::Io, Endpoints, bool), Failure> {
    // on the heap: a connection is rare, and its making would be the largest part of every request's task
    let making = Box::pin(async {
        let socket = dial::tcp(worker, attempt, conn).await?;
        let endpoints = Endpoints { local: socket.tcp_stream().and_then(|stream| stream.local_addr().ok()) };
        let Some(tls) = tls else { return Ok((crate::io::Io::Plain(socket), endpoints, false)) };
        let (stream, http2) = dial::tls(socket, tls, attempt).await?;
        Ok((crate::io::Io::ClientTls(Box::new(stream)), endpoints, http2))
    });
    match tokio::time::timeout(attempt.cluster.connect_timeout, making).await {
        Ok(made) => made,
        Err(_) => Err(Failure::unsent(Cause::ConnectTimeout)),
    }
}
