//! Messages over HTTP/1 and HTTP/2, in one form.
//!
//! A message is a head, then frames that are *pulled*: nothing is read from a side before the
//! other side has taken what was read before, but for [`HELD_MAX`] bytes in each direction
//! (property 23). HTTP/2 windows are released by [`Down::consumed`] and [`Up::consumed`], after
//! the other side took the bytes.
//!
//! [`Down`] is a request being served, [`Up`] is the attempt made for it; both may speak either
//! protocol. `relay` moves frames between them.

pub(crate) mod down;
pub(crate) mod flood;
pub(crate) mod h1;
pub(crate) mod h2;
pub(crate) mod relay;
pub(crate) mod up;

use bytes::Bytes;
use thiserror::Error;
use types::Fields;

pub(crate) use down::Down;
pub(crate) use up::Up;

/// Bytes of a body held in one direction between the two sides.
pub(crate) const HELD_MAX: usize = 64 * 1024;

/// A piece of a body.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Frame {
    /// Never empty.
    Data(Bytes),
    /// The last frame.
    Trailers(Fields),
}

/// Why one side of an exchange cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum Broken {
    /// The peer closed the connection, or it failed.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer reset the stream.
    #[error("the peer reset the stream")]
    Reset,
    /// The peer refused the stream before it did anything with it.
    #[error("the peer refused the stream")]
    Refused,
    /// The peer broke the protocol.
    #[error("the peer broke the protocol")]
    Protocol,
    /// The peer broke HTTP/1.
    #[error("not a valid HTTP/1 message")]
    Message(http1::InvalidMessage),
    /// We cannot write this head for this protocol without changing its meaning.
    #[error("the head cannot be written")]
    Unwritable,
}

impl From<http1::InvalidMessage> for Broken {
    fn from(error: http1::InvalidMessage) -> Self {
        match error {
            http1::InvalidMessage::Truncated => Self::Closed,
            other => Self::Message(other),
        }
    }
}

impl From<std::io::Error> for Broken {
    fn from(_: std::io::Error) -> Self {
        Self::Closed
    }
}

impl From<http1::UnsafeHead> for Broken {
    fn from(_: http1::UnsafeHead) -> Self {
        Self::Unwritable
    }
}

impl From<::h2::Error> for Broken {
    fn from(error: ::h2::Error) -> Self {
        match error.reason() {
            Some(::h2::Reason::REFUSED_STREAM) => Self::Refused,
            Some(::h2::Reason::NO_ERROR) if error.is_go_away() => Self::Refused,
            _ if error.is_io() => Self::Closed,
            _ if error.is_go_away() && error.is_remote() => Self::Closed,
            Some(_) if error.is_reset() && error.is_remote() => Self::Reset,
            Some(_) => Self::Protocol,
            None => Self::Closed,
        }
    }
}
