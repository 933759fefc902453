//! What the switch answers itself: cluster DNS, and the relay for pods without a proxy.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capture::Network;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::host_sockets::{HostSockets, Kind};

pub(crate) use dns::Names;
use dns::Transport;

mod dns;

/// Relayed connections at a time; more wait in the queue of the listener.
const RELAYED_MAX: usize = 4096;
/// DNS questions under way at a time, and connections that bring some; more of the ones are dropped, as any
/// server does, and asked again; more of the others wait.
const QUESTIONS_MAX: usize = 1024;
/// What one pod may have of any of these: the others keep their share.
const SHARE_OF_A_POD: usize = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A resolver of the machine that has not answered by then is passed over.
const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that asks nothing for so long ends.
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
        let room = Room::below(crate::descriptors_max());
        let server = Arc::new(Server { host: Arc::new(host), names, upstreams, room });
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
    host: Arc<HostSockets>,
    names: Arc<Names>,
    upstreams: Vec<SocketAddr>,
    room: Room,
}

/// What may be under way at a time. All of it together leaves half of the process's descriptors to what the
/// mesh itself is made of: pods, programs, their output.
struct Room {
    relayed: Arc<Share>,
    connections: Arc<Share>,
    questions: Arc<Share>,
}

impl Room {
    /// Where the process may have so many descriptors.
    fn below(descriptors: usize) -> Self {
        // A relayed connection has two descriptors, and so has one that asks a question of the machine's resolver.
        let share = |most: usize, part: usize| Arc::new(Share::new(most.min(descriptors / part)));
        Self {
            relayed: share(RELAYED_MAX, 8),
            connections: share(QUESTIONS_MAX, 16),
            questions: share(QUESTIONS_MAX, 8),
        }
    }
}

/// One kind of it: how much of it there may be, and how much each pod has.
struct Share {
    all: Arc<Semaphore>,
    of_one_max: usize,
    /// Those that have some; no more entries than `all` has permits.
    of_each: Mutex<HashMap<IpAddr, usize>>,
}

/// A place that was taken; dropped, it is free again.
struct Place {
    share: Arc<Share>,
    whose: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl Share {
    fn new(all: usize) -> Self {
        let all = all.max(1);
        let of_one_max = (all / SHARE_OF_A_POD).max(1);
        Self { all: Arc::new(Semaphore::new(all)), of_one_max, of_each: Mutex::default() }
    }

    /// A place for `whose`; `None` when that pod has its share.
    fn place(self: &Arc<Self>, permit: OwnedSemaphorePermit, whose: IpAddr) -> Option<Place> {
        let mut of_each = self.of_each.lock().unwrap_or_else(PoisonError::into_inner);
        let has = of_each.entry(whose).or_default();
        if *has >= self.of_one_max {
            return None;
        }
        *has += 1;
        Some(Place { share: Arc::clone(self), whose, _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut of_each = self.share.of_each.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(has) = of_each.get_mut(&self.whose) {
            *has -= 1;
            if *has == 0 {
                of_each.remove(&self.whose);
            }
        }
    }
}

/// Accepts while there is room. A pod that has its share already is refused; the others wait for no pod.
async fn accept_loop<F: Future<Output = ()> + Send + 'static>(
    listener: std::net::TcpListener,
    share: &Arc<Share>,
    serve: impl Fn(TcpStream) -> F,
) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    loop {
        let Ok(permit) = Arc::clone(&share.all).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, from)) => match share.place(permit, from.ip()) {
                Some(place) => {
                    let served = serve(client);
                    tokio::spawn(async move {
                        served.await;
                        drop(place);
                    });
                }
                None => refuse(&client),
            },
            // Out of descriptors: let some go.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// The client was accepted before we knew: a reset is the nearest to a refusal.
fn refuse(client: &TcpStream) {
    // Without it the client sees an end in order, which is as good as there is then.
    crate::tolerate(socket2::SockRef::from(client).set_linger(Some(Duration::ZERO)));
}

async fn relay_loop(server: &Arc<Server>, listener: std::net::TcpListener) {
    let serve = |client| {
        let server = Arc::clone(server);
        // A broken connection is the business of its two ends.
        async move { drop(relay(&server, client).await) }
    };
    accept_loop(listener, &server.room.relayed, serve).await;
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
            refuse(&client);
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
    let share = &server.room.questions;
    let mut buffer = vec![0; 4096];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let question = &buffer[..length];
        match dns::answer(question, &server.names, Transport::Udp) {
            dns::Outcome::Answer(bytes) => drop(socket.send_to(&bytes, from).await),
            dns::Outcome::Drop => {}
            outcome => {
                let Ok(permit) = Arc::clone(&share.all).try_acquire_owned() else { continue };
                let Some(place) = share.place(permit, from.ip()) else { continue };
                let (server, socket, question) = (Arc::clone(server), Arc::clone(&socket), question.to_vec());
                tokio::spawn(async move {
                    if let Some(answer) = find_out(&server, &question, outcome, Transport::Udp).await {
                        // The asker asks again when it gets lost.
                        drop(socket.send_to(&answer, from).await);
                    }
                    drop(place);
                });
            }
        }
    }
}

async fn dns_tcp_loop(server: &Arc<Server>, listener: std::net::TcpListener) {
    let serve = |client| {
        let server = Arc::clone(server);
        async move { drop(dns_tcp(&server, client).await) }
    };
    accept_loop(listener, &server.room.connections, serve).await;
}

/// *Source*: RFC 7766 section 6.2.3: a server ends connections that are idle.
async fn dns_tcp(server: &Server, mut client: TcpStream) -> io::Result<()> {
    loop {
        let question = tokio::time::timeout(TCP_DNS_IDLE, read_message(&mut client)).await??;
        let outcome = dns::answer(&question, &server.names, Transport::Tcp);
        let Some(answer) = find_out(server, &question, outcome, Transport::Tcp).await else { return Ok(()) };
        tokio::time::timeout(TCP_DNS_IDLE, write_message(&mut client, &answer)).await??;
    }
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream.write_all(&[&length.to_be_bytes()[..], message].concat()).await
}

/// The answer to `question`, of which the table says `outcome`; `None`: it is none.
async fn find_out(server: &Server, question: &[u8], outcome: dns::Outcome, transport: Transport) -> Option<Vec<u8>> {
    match outcome {
        dns::Outcome::Answer(bytes) => Some(bytes),
        dns::Outcome::Ask => Some(ask(server, question, transport).await),
        dns::Outcome::Follow(alias) => {
            // Whole, whoever asked: it is made anew for the asker.
            let target = ask(server, &alias.question, Transport::Tcp).await;
            Some(dns::followed(question, &alias, &target, transport))
        }
        dns::Outcome::Drop => None,
    }
}

/// Forwards a question to the machine's resolvers in turn; for an asker over TCP, who has no other way to ask,
/// over TCP where an answer is too long for a packet.
///
/// Without any the name does not exist as far as the mesh can tell; with none answering it is a
/// failure of the server, which clients may retry.
async fn ask(server: &Server, question: &[u8], transport: Transport) -> Vec<u8> {
    for &upstream in &server.upstreams {
        let asked = tokio::time::timeout(UPSTREAM_TIMEOUT, ask_by_packet(server, upstream, question)).await;
        let Ok(Ok(answer)) = asked else { continue };
        if transport == Transport::Tcp && dns::is_truncated(&answer) {
            let whole = tokio::time::timeout(UPSTREAM_TIMEOUT, ask_by_stream(server, upstream, question)).await;
            // A part is more than nothing.
            return whole.ok().and_then(Result::ok).unwrap_or(answer);
        }
        return answer;
    }
    dns::error(question, if server.upstreams.is_empty() { dns::Rcode::NameError } else { dns::Rcode::ServerFailure })
}

async fn ask_by_packet(server: &Server, upstream: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let socket = server.host.one(Kind::Udp, upstream.is_ipv6()).await?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(upstream).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // Connected, so it comes from whom we asked; the number must be ours too.
        if is_answer(&buffer[..length], question) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_by_stream(server: &Server, upstream: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let socket = server.host.one(Kind::Tcp, upstream.is_ipv6()).await?;
    let mut stream = TcpSocket::from_std_stream(socket.into()).connect(upstream).await?;
    write_message(&mut stream, question).await?;
    let answer = read_message(&mut stream).await?;
    if is_answer(&answer, question) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn is_answer(message: &[u8], question: &[u8]) -> bool {
    message.len() >= 12 && message[..2] == question[..2]
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
    fn pods_leave_half_of_the_descriptors_and_a_share_to_each_other() {
        for limit in [0, 16, 256, 1024, 1 << 20] {
            let room = Room::below(limit);
            let (relayed, connections) =
                (room.relayed.all.available_permits(), room.connections.all.available_permits());
            let all = 2 * relayed + 2 * connections + room.questions.all.available_permits();
            assert!(all <= limit / 2 || limit < 32, "{limit}: {all}");
            assert!(relayed >= 1 && connections >= 1, "{limit}");
        }
        let share = Arc::new(Share::new(8));
        let place = |last: u8| {
            let permit = Arc::clone(&share.all).try_acquire_owned().unwrap();
            share.place(permit, IpAddr::from([10, 77, 0, last]))
        };
        let of_one: Vec<Option<Place>> = (0..4).map(|_| place(9)).collect();
        let has: Vec<bool> = of_one.iter().map(Option::is_some).collect();
        assert_eq!(has, [true, true, false, false]);
        assert!(place(10).is_some(), "another has its own share");
        drop(of_one);
        assert!(place(9).is_some(), "and the first one its own again");
        assert_eq!((share.all.available_permits(), share.of_each.lock().unwrap().len()), (8, 0));
    }

    #[test]
    fn the_machines_name_servers_are_read() {
        let text = "# comment\nsearch example.org\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver nonsense\nnameserver 9.9.9.9\n";
        let found: Vec<String> = nameservers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.53:53", "[fe80::1]:53", "9.9.9.9:53"]);
    }
}
