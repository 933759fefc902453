//! Netlink messages by hand: an encoder of attributes, a socket, and the kernel's answer to each.
//!
//! Only what links, addresses, routes and nf_tables need. Attribute numbers stand beside their use
//! and are those of the kernel's `linux/if_link.h`, `linux/rtnetlink.h` and
//! `linux/netfilter/nf_tables.h`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, sockopt};

/// `NLM_F_REQUEST`
const REQUEST: u16 = 1;
/// `NLM_F_ACK`
pub(crate) const ACK: u16 = 4;
/// `NLM_F_EXCL`
pub(crate) const EXCL: u16 = 0x200;
/// `NLM_F_REPLACE`: on routes; the same bit as `NLM_F_ROOT`.
pub(crate) const REPLACE: u16 = 0x100;
/// `NLM_F_CREATE`
pub(crate) const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`
pub(crate) const APPEND: u16 = 0x800;
/// `NLMSG_ERROR`: also the acknowledgement, with error 0.
const ERROR: u16 = 2;
/// `NLA_F_NESTED`
const NESTED: u16 = 0x8000;

/// How long the kernel may take to acknowledge; it answers synchronously, so this only guards.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// One message, or several in one write.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    bytes: Vec<u8>,
    start: usize,
    sequence: u32,
}

impl Messages {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Opens a message; `header` is the family's fixed part.
    pub(crate) fn message(&mut self, kind: u16, flags: u16, header: &[u8]) -> &mut Self {
        self.close();
        self.sequence += 1;
        self.start = self.bytes.len();
        self.bytes.extend_from_slice(&0_u32.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&0_u32.to_ne_bytes());
        self.raw(header);
        self
    }

    /// Bytes without attribute header (fixed parts inside attributes).
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).expect("attributes of ours are far below 64 KiB");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.raw(value)
    }

    /// A NUL-terminated string.
    pub(crate) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// A number as rtnetlink wants it.
    pub(crate) fn native(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// A number as nf_tables wants it.
    pub(crate) fn big(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let length = u16::try_from(self.bytes.len() - start).expect("nested attributes of ours are below 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// Length so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn sequence(&self) -> u32 {
        self.sequence
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    fn close(&mut self) {
        if self.bytes.len() > self.start {
            let length = u32::try_from(self.bytes.len() - self.start).expect("messages of ours are below 4 GiB");
            self.bytes[self.start..self.start + 4].copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn finish(&mut self) -> &[u8] {
        self.close();
        &self.bytes
    }
}

/// A netlink socket; it belongs to the network namespace of the thread that made it.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    /// Links, addresses, routes.
    pub(crate) fn route() -> Result<Self, Errno> {
        // NETLINK_ROUTE is protocol 0.
        Self::open(None)
    }

    /// nf_tables.
    pub(crate) fn netfilter() -> Result<Self, Errno> {
        Self::open(Some(netlink::NETFILTER))
    }

    fn open(protocol: Option<rustix::net::Protocol>) -> Result<Self, Errno> {
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        // Room for a whole batch of rules; the kernel caps it, and batches are cut accordingly.
        sockopt::set_socket_send_buffer_size(&socket, 1 << 20)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self(socket))
    }

    /// Sends and awaits the acknowledgement of the message numbered `last`; the first error wins.
    /// The message `last` must ask for [`ACK`].
    pub(crate) fn commit(&self, messages: &mut Messages, last: u32) -> Result<(), Errno> {
        let bytes = messages.finish();
        retry(|| rustix::net::send(self.0.as_fd(), bytes, SendFlags::empty()))?;
        let mut first_error = None;
        let mut buffer = vec![0_u8; 32 * 1024];
        loop {
            let (got, _) = retry(|| rustix::net::recv(self.0.as_fd(), &mut buffer[..], RecvFlags::empty()))?;
            for (sequence, error) in answers(&buffer[..got]) {
                if error != 0 && first_error.is_none() {
                    first_error = Some(Errno::from_raw_os_error(-error));
                }
                // A batch whose head is refused (sequence 1) is not answered further.
                if sequence == last || (error != 0 && sequence <= 1) {
                    return first_error.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Sends one message that asks for [`ACK`].
    pub(crate) fn one(&self, messages: &mut Messages) -> Result<(), Errno> {
        let last = messages.sequence();
        self.commit(messages, last)
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Sequence and error number (0 = done, else negative) of each acknowledgement in a datagram.
fn answers(datagram: &[u8]) -> Vec<(u32, i32)> {
    let word = |at: usize| -> Option<[u8; 4]> { datagram.get(at..at + 4)?.try_into().ok() };
    let mut found = Vec::new();
    let mut at = 0;
    while let (Some(length), Some(kind), Some(sequence)) = (word(at), word(at + 4), word(at + 8)) {
        let length = u32::from_ne_bytes(length) as usize;
        if u16::from_ne_bytes([kind[0], kind[1]]) == ERROR
            && let Some(error) = word(at + 16)
        {
            found.push((u32::from_ne_bytes(sequence), i32::from_ne_bytes(error)));
        }
        at += length.max(16).next_multiple_of(4);
    }
    found
}

/// Turns an error of the system into the number it carries.
pub(crate) fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let mut messages = Messages::new();
        messages.message(16, ACK, &[9; 3]).nest(18, |inner| {
            inner.text(1, "veth");
        });
        let bytes = messages.finish();
        assert_eq!(bytes.len(), 16 + 4 + 4 + 4 + 8, "header, padded fixed part, nest, attribute, padded text");
        assert_eq!(u32::from_ne_bytes(bytes[..4].try_into().unwrap()), 36);
        assert_eq!(u16::from_ne_bytes(bytes[20..22].try_into().unwrap()), 16, "the nest counts its padding");
        assert_eq!(u16::from_ne_bytes(bytes[24..26].try_into().unwrap()), 9, "the text does not");
    }

    #[test]
    fn each_answer_is_read() {
        let mut datagram = Vec::new();
        for (sequence, error) in [(3_u32, -17_i32), (4, 0)] {
            datagram.extend(36_u32.to_ne_bytes());
            datagram.extend(ERROR.to_ne_bytes());
            datagram.extend([0; 2]);
            datagram.extend(sequence.to_ne_bytes());
            datagram.extend([0; 4]);
            datagram.extend(error.to_ne_bytes());
            datagram.extend([0; 16]);
        }
        assert_eq!(answers(&datagram), [(3, -17), (4, 0)]);
        assert_eq!(answers(&datagram[..20]), [(3, -17)], "a cut datagram ends the list");
    }
}
