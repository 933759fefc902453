//! Messages between the parent (`lateen up`) and the pod manager: JSON frames over a Unix stream,
//! descriptors beside them.
//!
//! A frame is eight bytes (length, number of descriptors; little-endian) and a JSON body; the
//! descriptors ride on the eight bytes. Both sides are the same binary, so there is no version.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::spec::{ContainerPlan, Name, PodId, PodPlan, Signal, VolumeFile};

/// A frame larger than this is refused: a ConfigMap or Secret holds at most 1 MiB, base64 adds a third.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// The kernel passes at most 253 descriptors a message.
const FDS_MAX: usize = 128;

/// Parent to manager.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Call {
    CreatePod(Box<PodPlan>),
    Start(Box<ContainerPlan>),
    Signal {
        pod: PodId,
        container: String,
        signal: Signal,
    },
    DeletePod {
        pod: PodId,
    },
    UpdateVolume {
        pod: PodId,
        volume: String,
        files: Vec<VolumeFile>,
    },
    /// Fresh, unconnected sockets of the switch.
    Sockets {
        v6: bool,
        count: usize,
    },
    /// A listening socket of the switch.
    Listen {
        address: SocketAddr,
    },
    SetNames(BTreeMap<String, Name>),
    SetServices(Vec<capture::ServiceAddress>),
    Shutdown,
}

/// Parent to manager, numbered.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Numbered {
    pub(crate) id: u64,
    pub(crate) call: Call,
}

/// Manager to parent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The switch stands.
    Ready(Facts),
    /// Nothing was made; the mesh cannot start.
    Failed(capture::CaptureError),
    /// Answer to the call of this number.
    Reply { id: u64, result: Result<(), Refusal> },
    /// A container's (or exec's) first process ended. 128 + signal when it was killed by one.
    Exited { pod: PodId, serial: u64, code: i32 },
}

/// What the manager found the kernel to give.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// Pods live in a user namespace (an ordinary user started the mesh).
    pub user_namespace: bool,
    /// Pods have an IPv6 address too.
    pub ipv6: bool,
    /// `/proc` shows a container's own processes only.
    pub own_proc: bool,
    /// Low ports are open to containers by sysctl; otherwise they get the capability to bind them.
    pub low_ports_by_sysctl: bool,
}

/// Why the manager refused a call.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Refusal {
    NoSuchPod,
    NoSuchContainer(String),
    /// The program could not be started.
    Program {
        program: String,
        errno: i32,
    },
    /// A step of the building failed.
    Step {
        step: String,
        errno: i32,
    },
    Capture(capture::CaptureError),
}

impl Refusal {
    pub(crate) fn step(step: impl Into<String>) -> impl FnOnce(Errno) -> Self {
        let step = step.into();
        move |errno| Self::Step { step, errno: errno.raw_os_error() }
    }

    pub(crate) fn io(step: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let step = step.into();
        move |error| Self::Step { step, errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

/// The writing side, shared by threads.
pub(crate) struct Sender {
    socket: Mutex<OwnedFd>,
}

impl Sender {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket: Mutex::new(socket) }
    }

    /// Sends one frame; blocks while the other side is behind.
    pub(crate) fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let body = serde_json::to_vec(message)?;
        let length = u32::try_from(body.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        debug_assert!(fds.len() <= FDS_MAX, "a caller passed too many descriptors");
        let count = u32::try_from(fds.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut head = [0_u8; 8];
        head[..4].copy_from_slice(&length.to_le_bytes());
        head[4..].copy_from_slice(&count.to_le_bytes());
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        send_all(socket.as_fd(), &head, fds)?;
        send_all(socket.as_fd(), &body, &[])
    }

    /// Ends the conversation for both directions and every holder of the socket.
    pub(crate) fn close(&self) {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        // It fails only when the other side is gone already.
        crate::tolerate(rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both));
    }
}

fn send_all(socket: BorrowedFd<'_>, mut bytes: &[u8], mut fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                bytes = &bytes[sent..];
                fds = &[];
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// What came beside a frame: all the descriptors that were sent, or why there are none.
pub(crate) type Passed = Result<Vec<OwnedFd>, Errno>;

/// Reads one frame. `Ok(None)` = the other side closed.
///
/// A frame whose descriptors found no room in this process comes without them: it is for its receiver to
/// refuse, while the conversation goes on.
pub(crate) fn receive<M: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(M, Passed)>> {
    let mut head = [0_u8; 8];
    let mut passed = Ok(Vec::new());
    if !receive_all(socket, &mut head, &mut passed)? {
        return Ok(None);
    }
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let count = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
    if length > FRAME_BYTES_MAX || passed.as_ref().is_ok_and(|fds| fds.len() != count) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length];
    if !receive_all(socket, &mut body, &mut Ok(Vec::new()))? && length > 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&body)?, passed)))
}

/// Fills `bytes`; false when the stream ended first.
fn receive_all(socket: BorrowedFd<'_>, bytes: &mut [u8], passed: &mut Passed) -> io::Result<bool> {
    let mut filled = 0;
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    while filled < bytes.len() {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes[filled..])];
        match rustix::net::recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => {
                for message in ancillary.drain() {
                    if let (RecvAncillaryMessage::ScmRights(more), Ok(fds)) = (message, &mut *passed) {
                        fds.extend(more);
                    }
                }
                if got.bytes == 0 {
                    return Ok(false);
                }
                if got.flags.contains(ReturnFlags::CTRUNC) {
                    // Those that did come are closed.
                    *passed = Err(Errno::MFILE);
                }
                filled += got.bytes;
            }
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn a_frame_whose_descriptors_find_no_room_comes_without_them() {
        const MANY: usize = FDS_MAX + 64;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let many = [ours.as_fd(); MANY];
        let mut head = [1, 0, 0, 0, 0, 0, 0, 0];
        head[4..].copy_from_slice(&u32::try_from(MANY).unwrap().to_le_bytes());
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        rustix::net::sendmsg(&ours, &[IoSlice::new(&head)], &mut ancillary, SendFlags::empty()).unwrap();
        rustix::io::write(&ours, b"7").unwrap();
        let sender = Sender::new(ours.try_clone().unwrap());
        sender.send(&8, &[ours.as_fd()]).unwrap();
        let next =
            || receive::<u32>(theirs.as_fd()).unwrap().map(|(message, passed)| (message, passed.map(|fds| fds.len())));
        assert_eq!(next(), Some((7, Err(Errno::MFILE))));
        assert_eq!(next(), Some((8, Ok(1))), "the conversation goes on");
        drop((sender, ours));
        assert_eq!(next(), None);
    }
}
