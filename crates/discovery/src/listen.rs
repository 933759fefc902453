//! Accepting connections: TLS of ours, HTTP/2 by hyper, gRPC by tonic.
//!
//! A handshake and a first request have a time limit; each connection is a task of the accept loop
//! that made it and ends with it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use identity::PeerFacts;
use identity::tls::ServerConfigs;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::LazyConfigAcceptor;
use tower::ServiceExt as _;

/// What is known of a connection; attached to each of its requests.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    /// TLS of ours.
    pub is_secure: bool,
    /// The client's verified certificate.
    pub facts: Option<Arc<PeerFacts>>,
    /// Where from.
    pub peer: Option<SocketAddr>,
}

/// Open connections of one listener. More wait in the kernel.
const CONNECTIONS_MAX: usize = 20_000;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A proxy has one stream or two, and a certificate request now and then.
const STREAMS_MAX: u32 = 64;
const HEADER_BYTES_MAX: u32 = 64 * 1024;

/// How connections of a listener are secured.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not at all.
    Plaintext,
    /// By the newest of these.
    Tls(watch::Receiver<Arc<ServerConfigs>>),
}

/// Makes a tokio listener of a bound socket.
pub fn adopt(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Serves `router` until the future is dropped, with all its connections.
pub async fn serve(listener: TcpListener, security: Security, router: axum::Router, over: Protocols) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= CONNECTIONS_MAX {
            // Room comes when somebody leaves.
            drop(connections.join_next().await);
            continue;
        }
        match listener.accept().await {
            Ok((stream, peer)) => {
                connections.spawn(connection(stream, peer, security.clone(), router.clone(), over));
            }
            Err(error) => {
                // Out of descriptors, most likely: wait instead of spinning.
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Which HTTP versions a listener speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocols {
    /// gRPC: HTTP/2 only.
    Grpc,
    /// HTTP/1.1 only.
    Http1,
}

async fn connection(stream: TcpStream, peer: SocketAddr, security: Security, router: axum::Router, over: Protocols) {
    // A lost optimisation is no reason to refuse the connection.
    drop(stream.set_nodelay(true));
    let mut about = Connection { peer: Some(peer), ..Connection::default() };
    match security {
        Security::Plaintext => http(stream, about, router, over).await,
        Security::Tls(configs) => {
            let handshake = async {
                let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
                let config = Arc::clone(configs.borrow().for_hello(&start.client_hello()));
                start.into_stream(config).await
            };
            let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    tracing::debug!(%peer, %error, "handshake failed");
                    return;
                }
                Err(_) => {
                    tracing::debug!(%peer, "handshake timed out");
                    return;
                }
            };
            about.is_secure = true;
            let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            about.facts = leaf.and_then(|leaf| PeerFacts::read(leaf).ok()).map(Arc::new);
            // A connection gives no rights beyond the life of the certificate that opened it.
            let left =
                about.facts.as_ref().map(|facts| facts.not_after.duration_since(SystemTime::now()).unwrap_or_default());
            let served = http(stream, about, router, over);
            match left {
                Some(left) => drop(tokio::time::timeout(left, served).await),
                None => served.await,
            }
        }
    }
}

async fn http<S>(stream: S, about: Connection, router: axum::Router, over: Protocols)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let peer = about.peer;
    let service = hyper::service::service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(about.clone());
        router.clone().oneshot(request.map(axum::body::Body::new))
    });
    let io = TokioIo::new(stream);
    let ended = match over {
        Protocols::Grpc => {
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .max_concurrent_streams(STREAMS_MAX)
                .max_header_list_size(HEADER_BYTES_MAX)
                .keep_alive_interval(Duration::from_secs(10))
                .keep_alive_timeout(Duration::from_secs(10))
                .serve_connection(io, service)
                .await
        }
        Protocols::Http1 => {
            hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(io, service)
                .await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(?peer, %error, "connection ended");
    }
}

/// Serves HTTP/1.1 on a Unix socket until the future is dropped. Whoever may open it is trusted.
pub async fn serve_unix(listener: tokio::net::UnixListener, router: axum::Router) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let about = Connection { is_secure: true, ..Connection::default() };
                connections.spawn(http(stream, about, router.clone(), Protocols::Http1));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
