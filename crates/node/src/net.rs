//! What the switch answers itself: cluster DNS, and the relay for pods without a proxy.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use capture::Network;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use crate::host_sockets::{HostSockets, Kind};

pub(crate) use dns::Names;

mod dns;

/// Relayed connections at a time; more wait in the queue of the listener.
const RELAYED_MAX: usize = 4096;
/// DNS questions under way at a time; more are dropped, as any server does, and asked again.
const QUESTIONS_MAX: usize = 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A resolver of the machine that has not answered by then is passed over.
const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(2);
const TCP_DNS_IDLE: Duration = Duration::from_secs(10);

/// The sockets, bound before the rules that point at them exist.
pub(crate) struct Listening {
    relay: std::net::TcpListener,
    relay6: Option<std::net::TcpListener>,
    dns: std::net::UdpSocket,
    dns_tcp: std::net::TcpListener,
}

impl Listening {
    pub(crate) fn bind(network: &Network, ipv6: bool) -> io::Result<Self> {
        let relay = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let port = relay.local_addr()?.port();
        let relay6 = if ipv6 { listen6(port).ok() } else { None };
        let dns = std::net::UdpSocket::bind((network.dns, 53))?;
        let dns_tcp = std::net::TcpListener::bind((network.dns, 53))?;
        relay.set_nonblocking(true)?;
        dns.set_nonblocking(true)?;
        dns_tcp.set_nonblocking(true)?;
        Ok(Self { relay, relay6, dns, dns_tcp })
    }

    pub(crate) fn relay_port(&self) -> u16 {
        self.relay.local_addr().map_or(0, |address| address.port())
    }
}

fn listen6(port: u16) -> io::Result<std::net::TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
    socket.set_only_v6(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// The machine's name servers, as its `/etc/resolv.conf` names them.
pub(crate) fn host_resolvers() -> Vec<SocketAddr> {
    nameservers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

fn nameservers(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then_some(())?;
            let address: IpAddr = words.next()?.split('%').next()?.parse().ok()?;
            Some(SocketAddr::new(address, 53))
        })
        .take(3)
        .collect()
}

/// Serves until the process ends.
pub(crate) fn run(listening: Listening, sockets: OwnedFd, names: Arc<Names>, upstreams: Vec<SocketAddr>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    runtime.block_on(async move {
        let Ok(host) = HostSockets::new(sockets) else { return };
        let server = Arc::new(Server { host, names, upstreams });
        let Listening { relay, relay6, dns, dns_tcp } = listening;
        let relay6 = async {
            match relay6 {
                Some(relay6) => relay_loop(&server, relay6).await,
                None => std::future::pending().await,
            }
        };
        // Each of them ends only when its socket cannot be used, which needs a broken kernel.
        tokio::join!(relay_loop(&server, relay), relay6, dns_udp_loop(&server, dns), dns_tcp_loop(&server, dns_tcp));
    });
}

struct Server {
    host: HostSockets,
    names: Arc<Names>,
    upstreams: Vec<SocketAddr>,
}

async fn relay_loop(server: &Arc<Server>, listener: std::net::TcpListener) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let room = Arc::new(Semaphore::new(RELAYED_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let server = Arc::clone(server);
                tokio::spawn(async move {
                    // A broken connection is the business of its two ends.
                    drop(relay(&server, client).await);
                    drop(permit);
                });
            }
            // Out of descriptors: let some go.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn relay(server: &Server, mut client: TcpStream) -> io::Result<()> {
    let outcome = async {
        let reference = socket2::SockRef::from(&client);
        let original =
            if client.local_addr()?.is_ipv4() { reference.original_dst_v4() } else { reference.original_dst_v6() };
        let to = original?.as_socket().ok_or(io::ErrorKind::InvalidInput)?;
        let to = destination(to).ok_or(io::ErrorKind::ConnectionRefused)?;
        let socket = server.host.one(Kind::Tcp, to.is_ipv6()).await?;
        let socket = TcpSocket::from_std_stream(socket.into());
        tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(to)).await.map_err(io::Error::from)?
    }
    .await;
    match outcome {
        Ok(mut upstream) => {
            tokio::io::copy_bidirectional(&mut client, &mut upstream).await?;
            Ok(())
        }
        Err(error) => {
            // The client was accepted before we knew: a reset is the nearest to a refusal.
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
            Err(error)
        }
    }
}

/// Where a connection to `to` leads on the machine; `None`: nowhere.
fn destination(to: SocketAddr) -> Option<SocketAddr> {
    if to.ip() == Network::LOCAL.host {
        return Some((Ipv4Addr::LOCALHOST, to.port()).into());
    }
    // Somebody dialled the relay's own port: nothing to relay to.
    let is_inside = Network::LOCAL.contains(to.ip()) || to.ip().is_loopback() || to.ip().is_unspecified();
    (!is_inside).then_some(to)
}

async fn dns_udp_loop(server: &Arc<Server>, socket: std::net::UdpSocket) {
    let Ok(socket) = UdpSocket::from_std(socket) else { return };
    let socket = Arc::new(socket);
    let room = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let mut buffer = vec![0; 4096];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let question = &buffer[..length];
        match dns::answer(question, &server.names, true) {
            dns::Outcome::Answer(bytes) => drop(socket.send_to(&bytes, from).await),
            dns::Outcome::Drop => {}
            dns::Outcome::Ask => {
                let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
                let (server, socket, question) = (Arc::clone(server), Arc::clone(&socket), question.to_vec());
                tokio::spawn(async move {
                    let answer = ask(&server, &question).await;
                    // The asker asks again when it gets lost.
                    drop(socket.send_to(&answer, from).await);
                    drop(permit);
                });
            }
        }
    }
}

async fn dns_tcp_loop(server: &Arc<Server>, listener: std::net::TcpListener) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let room = Arc::new(Semaphore::new(QUESTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let Ok((client, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let server = Arc::clone(server);
        tokio::spawn(async move {
            drop(tokio::time::timeout(TCP_DNS_IDLE, dns_tcp(&server, client)).await);
            drop(permit);
        });
    }
}

async fn dns_tcp(server: &Server, mut client: TcpStream) -> io::Result<()> {
    loop {
        let length = client.read_u16().await?;
        let mut question = vec![0; length.into()];
        client.read_exact(&mut question).await?;
        let answer = match dns::answer(&question, &server.names, false) {
            dns::Outcome::Answer(bytes) => bytes,
            dns::Outcome::Ask => ask(server, &question).await,
            dns::Outcome::Drop => return Ok(()),
        };
        let length = u16::try_from(answer.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        client.write_all(&[&length.to_be_bytes()[..], &answer].concat()).await?;
    }
}

/// Forwards a question to the machine's resolvers in turn.
///
/// Without any the name does not exist as far as the mesh can tell; with none answering it is a
/// failure of the server, which clients may retry.
async fn ask(server: &Server, question: &[u8]) -> Vec<u8> {
    for &upstream in &server.upstreams {
        let asked = tokio::time::timeout(UPSTREAM_TIMEOUT, ask_one(server, upstream, question)).await;
        if let Ok(Ok(answer)) = asked {
            return answer;
        }
    }
    dns::error(question, if server.upstreams.is_empty() { dns::Rcode::NameError } else { dns::Rcode::ServerFailure })
}

async fn ask_one(server: &Server, upstream: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let socket = server.host.one(Kind::Udp, upstream.is_ipv6()).await?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(upstream).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // Connected, so it comes from whom we asked; the number must be ours too.
        if length >= 12 && buffer[..2] == question[..2] {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relay_leads_out_and_to_the_machines_loopback_by_its_own_address_only() {
        let to = |text: &str| destination(text.parse().unwrap()).map(|to| to.to_string());
        assert_eq!(to("10.77.0.2:8000").as_deref(), Some("127.0.0.1:8000"));
        assert_eq!(to("192.0.2.1:80").as_deref(), Some("192.0.2.1:80"));
        for inside in ["127.0.0.1:80", "10.77.0.1:80", "10.77.0.9:80", "10.96.0.1:80", "0.0.0.0:80", "[::1]:80"] {
            assert_eq!(to(inside), None, "{inside}");
        }
    }

    #[test]
    fn the_machines_name_servers_are_read() {
        let text = "# comment\nsearch example.org\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver nonsense\nnameserver 9.9.9.9\n";
        let found: Vec<String> = nameservers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.53:53", "[fe80::1]:53", "9.9.9.9:53"]);
    }
}
