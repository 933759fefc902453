//! Sockets of the machine's network for those inside the mesh: passed, not relayed.
//!
//! A socket belongs for life to the network namespace it was made in, whoever holds it. The parent
//! makes them, proxies connect them. The protocol is the contract of
//! [`types::wellknown::env::HOST_SOCKETS`].

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

const VERSION: u8 = 1;
/// Most sockets one request may ask for.
const COUNT_MAX: u8 = 16;

/// Kind of a host socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Tcp = 1,
    Udp = 2,
}

/// Server and client end.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Answers the requests of one client on a task that ends when the client is gone.
pub(crate) fn serve(server: OwnedFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&server, true)?;
    let server = register(server)?;
    tokio::spawn(async move {
        let mut request = [0; 8];
        loop {
            let received = server
                .async_io(Interest::READABLE, |fd| Ok(rustix::net::recv(fd, &mut request, RecvFlags::empty())?.0))
                .await;
            let Ok(length @ 1..) = received else { return };
            let (status, sockets) = match make(&request[..length]) {
                Ok(sockets) => (0, sockets),
                Err(errno) => (u8::try_from(errno.raw_os_error()).unwrap_or(u8::MAX), Vec::new()),
            };
            let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
            if server.async_io(Interest::WRITABLE, |fd| answer(fd.as_fd(), status, &fds)).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

#[expect(unsafe_code, reason = "tokio has no packet sockets of its own")]
fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor for as long as it lives.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

fn make(request: &[u8]) -> Result<Vec<OwnedFd>, rustix::io::Errno> {
    use rustix::io::Errno;
    let &[VERSION, kind, family, count @ 1..=COUNT_MAX] = request else { return Err(Errno::INVAL) };
    let family = match family {
        4 => AddressFamily::INET,
        6 => AddressFamily::INET6,
        _ => return Err(Errno::AFNOSUPPORT),
    };
    let kind = match kind {
        1 => SocketType::STREAM,
        2 => SocketType::DGRAM,
        _ => return Err(Errno::SOCKTNOSUPPORT),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    (0..count).map(|_| rustix::net::socket_with(family, kind, flags, None)).collect()
}

fn answer(to: BorrowedFd<'_>, status: u8, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(COUNT_MAX as usize))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::net::sendmsg(to, &[IoSlice::new(&[status])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Asks for sockets; the pod manager's own relay and DNS use it, proxies have their own.
pub(crate) struct HostSockets {
    socket: Mutex<AsyncFd<OwnedFd>>,
}

impl HostSockets {
    /// Needs a tokio runtime.
    pub(crate) fn new(client: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&client, true)?;
        Ok(Self { socket: Mutex::new(register(client)?) })
    }

    /// One fresh socket. Cancel safe.
    pub(crate) async fn one(self: &Arc<Self>, kind: Kind, v6: bool) -> io::Result<OwnedFd> {
        let sockets = Arc::clone(self);
        // On a task of its own, to its end: an answer that nobody takes would be taken for the next one's.
        let asked = tokio::spawn(async move {
            let socket = sockets.socket.lock().await;
            let request = [VERSION, kind as u8, if v6 { 6 } else { 4 }, 1];
            socket.async_io(Interest::WRITABLE, |fd| Ok(rustix::net::send(fd, &request, SendFlags::NOSIGNAL)?)).await?;
            socket.async_io(Interest::READABLE, |fd| take(fd.as_fd())).await
        });
        asked.await.map_err(io::Error::other)?
    }
}

fn take(from: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(COUNT_MAX as usize))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut status = [0];
    let got = rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut status)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
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
    fn requests_are_checked() {
        let count =
            |request: &[u8]| make(request).map(|sockets| sockets.len()).map_err(rustix::io::Errno::raw_os_error);
        assert_eq!(count(&[1, 1, 4, 3]), Ok(3));
        assert_eq!(count(&[1, 2, 4, 1]), Ok(1));
        assert_eq!(count(&[2, 1, 4, 1]), Err(libc::EINVAL), "another version");
        assert_eq!(count(&[1, 1, 4, 0]), Err(libc::EINVAL), "none");
        assert_eq!(count(&[1, 1, 4, 17]), Err(libc::EINVAL), "too many");
        assert_eq!(count(&[1, 1, 5, 1]), Err(libc::EAFNOSUPPORT));
        assert_eq!(count(&[1, 9, 4, 1]), Err(libc::ESOCKTNOSUPPORT));
        assert_eq!(count(&[1, 1, 4]), Err(libc::EINVAL), "short");
    }

    #[tokio::test]
    async fn a_client_gets_sockets_and_errors() {
        let (server, client) = pair().unwrap();
        serve(server).unwrap();
        let client = Arc::new(HostSockets::new(client).unwrap());
        let socket = client.one(Kind::Tcp, false).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = tokio::net::TcpSocket::from_std_stream(socket.into());
        stream.connect(listener.local_addr().unwrap()).await.unwrap();
    }
}
