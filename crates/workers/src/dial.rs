//! Making one connection: socket, mark, source address, PROXY preamble, TLS.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use engine::exchange::{Attempt, Failure};
use engine::facts::ConnFacts;
use engine::tls::{Keepalive, ProxyProtocol};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::{Domain, Protocol, SockRef, Socket as RawSocket, TcpKeepalive, Type};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use types::Cause;
use types::wellknown::marks;

use crate::io::Socket;
use crate::worker::Worker;

/// Connects to the endpoint of `attempt` and sends the PROXY preamble, if one is configured.
pub(super) async fn tcp(worker: &Rc<Worker>, attempt: &Attempt, conn: &ConnFacts) -> Result<Socket, Failure> {
    let Some(address) = attempt.picked.host.address.ip() else {
        return Err(failed("delayed connect error: Unix sockets are not supported"));
    };
    let cluster = &attempt.cluster;
    let to_app =
        cluster.bind.is_some() || cluster.name.starts_with("inbound|") || &*cluster.name == "InboundPassthroughCluster";
    let mark = if to_app { marks::PROXY_TO_APP } else { marks::PROXY };
    let how = How { mark, bind: cluster.bind, keepalive: cluster.keepalive };
    let stream = worker.shared.dialer.connect(address, &how).await.map_err(|error| failed(&describe(&error)))?;
    let mut socket = Socket::tcp(stream);
    if let Some(version) = attempt.transport.proxy_protocol {
        let preamble = preamble(version, conn.peer, conn.local);
        socket.write_all(&preamble).await.map_err(|error| failed(&describe(&error)))?;
    }
    Ok(socket)
}

fn failed(detail: &str) -> Failure {
    Failure { cause: Cause::ConnectFailed, detail: detail.into(), request_sent: false }
}

/// Envoy's words: the system's, without Rust's number.
fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    let words = text.split(" (os error").next().unwrap_or(&text);
    format!("delayed connect error: {words}")
}

/// How a socket is made.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// The socket's mark, by which redirect rules let it pass.
    pub mark: u32,
    /// The source address.
    pub bind: Option<IpAddr>,
    /// TCP keep-alive.
    pub keepalive: Option<Keepalive>,
}

/// Where sockets come from: this network namespace, or the host's for destinations outside the pods.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    host: Option<Arc<crate::host_sockets::HostSockets>>,
}

impl Dialer {
    pub(crate) fn new(host: Option<Arc<crate::host_sockets::HostSockets>>) -> Self {
        Self { host }
    }

    /// Connects.
    pub async fn connect(&self, address: SocketAddr, how: &How) -> io::Result<TcpStream> {
        if let Some(host) = &self.host
            && how.bind.is_none()
            && host.is_outside(address.ip())
        {
            let socket = host.take(address).await?;
            let stream = TcpSocket::from_std_stream(socket).connect(address).await?;
            stream.set_nodelay(true)?;
            if let Some(keepalive) = how.keepalive {
                set_keepalive(&stream, keepalive)?;
            }
            return Ok(stream);
        }
        let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = RawSocket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
        // without the right (nothing is captured then) the mark means nothing
        if let Err(error) = socket.set_mark(how.mark) {
            tracing::trace!(%error, "no socket mark");
        }
        socket.set_tcp_nodelay(true)?;
        if let Some(source) = how.bind.filter(|source| source.is_ipv4() == address.is_ipv4()) {
            bind_source(&socket, source)?;
        }
        if let Some(keepalive) = how.keepalive {
            set_keepalive(&socket, keepalive)?;
        }
        TcpSocket::from_std_stream(socket.into()).connect(address).await
    }
}

impl Dialer {
    /// A datagram socket to ask `server` with.
    pub async fn udp(&self, server: SocketAddr, how: &How) -> io::Result<tokio::net::UdpSocket> {
        if let Some(host) = &self.host
            && host.is_outside(server.ip())
        {
            let socket = host.take_udp(server).await?;
            socket.set_nonblocking(true)?;
            return tokio::net::UdpSocket::from_std(socket);
        }
        let domain = if server.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = RawSocket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
        if let Err(error) = socket.set_mark(how.mark) {
            tracing::trace!(%error, "no socket mark");
        }
        let any: IpAddr = if server.is_ipv4() { [0, 0, 0, 0].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
        socket.bind(&SocketAddr::new(any, 0).into())?;
        tokio::net::UdpSocket::from_std(socket.into())
    }
}

/// The source address; the kernel chooses a port.
fn bind_source(socket: &RawSocket, source: IpAddr) -> io::Result<()> {
    match socket.bind(&SocketAddr::new(source, 0).into()) {
        // ::6 is usually not an address of the pod; Istio's proxy goes on without it there too
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && source.is_ipv6() => Ok(()),
        other => other,
    }
}

/// Sets TCP keep-alive.
pub(crate) fn set_keepalive<'s>(socket: impl Into<SockRef<'s>>, keepalive: Keepalive) -> io::Result<()> {
    let mut params = TcpKeepalive::new();
    if let Some(time) = keepalive.time {
        params = params.with_time(time);
    }
    if let Some(interval) = keepalive.interval {
        params = params.with_interval(interval);
    }
    if let Some(probes) = keepalive.probes {
        params = params.with_retries(probes);
    }
    socket.into().set_tcp_keepalive(&params)
}

/// *Source*: the PROXY protocol, versions 1 and 2.
fn preamble(version: ProxyProtocol, peer: SocketAddr, local: SocketAddr) -> Vec<u8> {
    match version {
        ProxyProtocol::V1 => {
            let family = if peer.is_ipv4() { "TCP4" } else { "TCP6" };
            format!("PROXY {family} {} {} {} {}\r\n", peer.ip(), local.ip(), peer.port(), local.port()).into_bytes()
        }
        ProxyProtocol::V2 => {
            let mut out = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
            match (peer.ip(), local.ip()) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    out.extend([0x11, 0, 12]);
                    out.extend(from.octets());
                    out.extend(to.octets());
                }
                (from, to) => {
                    let wide = |ip: IpAddr| match ip {
                        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                        IpAddr::V6(ip) => ip.octets(),
                    };
                    out.extend([0x21, 0, 36]);
                    out.extend(wide(from));
                    out.extend(wide(to));
                }
            }
            out.extend(peer.port().to_be_bytes());
            out.extend(local.port().to_be_bytes());
            out
        }
    }
}

/// Shakes hands; says whether HTTP/2 was agreed on.
pub(super) async fn tls(
    socket: Socket,
    config: Arc<ClientConfig>,
    attempt: &Attempt,
) -> Result<(tokio_rustls::client::TlsStream<Socket>, bool), Failure> {
    let by_address = || attempt.picked.host.address.ip().map(|address| ServerName::from(address.ip()));
    let name = match &attempt.sni {
        Some(sni) => ServerName::try_from(sni.to_string()).ok().or_else(by_address),
        None => by_address(),
    };
    let refused =
        |detail: String| Failure { cause: Cause::UpstreamTlsFailed, detail: detail.into(), request_sent: false };
    let Some(name) = name else { return Err(refused("TLS_error:no server name:TLS_error_end".into())) };
    let stream = TlsConnector::from(config).connect(name, socket).await.map_err(|error| refused(tls_reason(&error)))?;
    let http2 = matches!(stream.get_ref().1.alpn_protocol(), Some(b"h2" | b"istio-h2"));
    Ok((stream, http2))
}

/// A handshake's failure in the form Envoy's users search for.
pub(crate) fn tls_reason(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(reason)) => {
            format!(
                "TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:TLS_error_end ({reason})"
            )
        }
        Some(other) => format!("TLS_error:|{other}:TLS_error_end"),
        None => {
            format!("TLS_error:|{}:TLS_error_end", error.to_string().split(" (os error").next().unwrap_or_default())
        }
    }
}
