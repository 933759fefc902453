//! Sockets of the machine's network, asked for one by one ([`types::wellknown::env::HOST_SOCKETS`]).
//!
//! A pod's own network has no way out, so connections to destinations outside the mesh are made
//! on sockets that the node hands over. One thread asks; workers wait for their answer only.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::time::Duration;

use ipnet::IpNet;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg,
};
use tokio::sync::oneshot;

const VERSION: u8 = 1;
const TCP: u8 = 1;
const UDP: u8 = 2;
/// The node answers at once or is gone.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Requests that may wait for the asking thread.
const WAITING_MAX: usize = 1024;

struct Ask {
    kind: u8,
    v6: bool,
    answer: oneshot::Sender<io::Result<OwnedFd>>,
}

/// The way to the machine's network.
pub struct HostSockets {
    asks: mpsc::SyncSender<Ask>,
    inside: Vec<IpNet>,
}

impl fmt::Debug for HostSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostSockets").field("inside", &self.inside).finish_non_exhaustive()
    }
}

impl HostSockets {
    /// Uses an inherited socket; `ranges` (comma-separated CIDRs) are inside the mesh.
    pub fn new(service: OwnedFd, ranges: &str) -> io::Result<Self> {
        let service = socket2::Socket::from(service);
        service.set_nonblocking(false)?;
        service.set_read_timeout(Some(ANSWER_MAX))?;
        service.set_cloexec(true)?;
        let (asks, inbox) = mpsc::sync_channel::<Ask>(WAITING_MAX);
        std::thread::Builder::new().name("host-sockets".into()).spawn(move || {
            while let Ok(ask) = inbox.recv() {
                // whoever asked may have gone; the socket is closed then
                drop(ask.answer.send(fetch(&service, ask.kind, ask.v6)));
            }
        })?;
        Ok(Self { asks, inside: networks(ranges) })
    }

    /// Whether an address is beyond the pods' network.
    pub(crate) fn is_outside(&self, address: IpAddr) -> bool {
        let local = address.is_loopback() || address.is_unspecified();
        !local && !self.inside.iter().any(|network| network.contains(&address))
    }

    /// A socket to connect to `address`.
    pub(crate) async fn take(&self, address: SocketAddr) -> io::Result<TcpStream> {
        self.ask(TCP, address.is_ipv6()).await.map(TcpStream::from)
    }

    /// A datagram socket for `address`.
    pub(crate) async fn take_udp(&self, address: SocketAddr) -> io::Result<std::net::UdpSocket> {
        self.ask(UDP, address.is_ipv6()).await.map(std::net::UdpSocket::from)
    }

    async fn ask(&self, kind: u8, v6: bool) -> io::Result<OwnedFd> {
        let (answer, answered) = oneshot::channel();
        let busy =
            |_| io::Error::new(io::ErrorKind::WouldBlock, "too many connections to the outside wait for a socket");
        self.asks.try_send(Ask { kind, v6, answer }).map_err(busy)?;
        answered.await.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the node's socket service is gone"))?
    }
}

/// CIDRs between commas.
fn networks(ranges: &str) -> Vec<IpNet> {
    ranges.split(',').filter_map(|range| range.trim().parse().ok()).collect()
}

fn fetch(service: &socket2::Socket, kind: u8, v6: bool) -> io::Result<OwnedFd> {
    let request = [VERSION, kind, if v6 { 6 } else { 4 }, 1];
    sendmsg(service.as_fd(), &[IoSlice::new(&request)], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut status = [0];
    let got = recvmsg(service.as_fd(), &mut [IoSliceMut::new(&mut status)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let socket = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match (got.bytes, status[0], socket) {
        (0, ..) => Err(io::ErrorKind::UnexpectedEof.into()),
        (_, 0, Some(socket)) => Ok(socket),
        (_, errno, _) => Err(io::Error::from_raw_os_error(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let inside = networks("10.77.0.0/16, 10.96.0.0/12,fd77::/64");
        let check = |address: &str| inside.iter().any(|network| network.contains(&address.parse::<IpAddr>().unwrap()));
        assert!(check("10.77.3.4") && check("10.97.0.1") && check("fd77::9"));
        assert!(!check("10.78.0.1") && !check("1.1.1.1") && !check("fd78::9"));
    }
}
