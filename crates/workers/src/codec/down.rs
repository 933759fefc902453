//! A request being served, over either protocol.

use std::task::{Context, Poll};

use bytes::Bytes;
use types::{Fields, ResponseHead};

use super::h1::H1Server;
use super::h2::H2Down;
use super::{Broken, Frame};

/// The downstream side of one exchange.
#[derive(Debug)]
pub(crate) enum Down<'c> {
    /// The connection is ours for the time of the exchange.
    H1(&'c mut H1Server),
    /// One stream of a connection that its own task drives.
    H2(Box<H2Down>),
}

macro_rules! both {
    ($self:expr, $side:ident => $body:expr) => {
        match $self {
            Down::H1($side) => $body,
            Down::H2($side) => $body,
        }
    };
}

impl Down<'_> {
    /// Pulls the next frame of the request; `None` at its end.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, Broken>> {
        both!(self, side => side.poll_frame(cx))
    }

    /// Whether the request has been pulled whole.
    pub(crate) fn is_finished(&self) -> bool {
        both!(self, side => side.is_finished())
    }

    /// `n` bytes that were pulled have been taken by the other side.
    pub(crate) fn consumed(&mut self, n: usize) {
        if let Self::H2(side) = self {
            side.consumed(n);
        }
    }

    /// Ready when the client has gone away.
    pub(crate) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        both!(self, side => side.poll_gone(cx))
    }

    /// Sends an interim head.
    pub(crate) fn send_interim(&mut self, head: &ResponseHead) -> Result<(), Broken> {
        both!(self, side => side.send_interim(head))
    }

    /// Sends the head; `end`: there is no body.
    pub(crate) fn send_head(&mut self, head: &ResponseHead, end: bool) -> Result<(), Broken> {
        both!(self, side => side.send_head(head, end))?;
        if end { self.send_end(None) } else { Ok(()) }
    }

    /// Whether the head has been sent.
    pub(crate) fn head_sent(&self) -> bool {
        both!(self, side => side.head_sent())
    }

    /// Sends a piece of the body.
    pub(crate) fn send_data(&mut self, data: Bytes) -> Result<(), Broken> {
        both!(self, side => side.send_data(data))
    }

    /// Ends the body.
    pub(crate) fn send_end(&mut self, trailers: Option<&Fields>) -> Result<(), Broken> {
        both!(self, side => side.send_end(trailers))
    }

    /// Bytes the peer has not taken yet.
    pub(crate) fn buffered(&self) -> usize {
        both!(self, side => side.buffered())
    }

    /// Ready when the peer has taken all.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        both!(self, side => side.poll_flush(cx))
    }

    /// Whether only whole drains may be followed by more data (HTTP/2 holds one piece).
    pub(crate) fn holds_one(&self) -> bool {
        matches!(self, Self::H2(_))
    }

    /// The connection carries no further request (HTTP/1); before the head is sent.
    pub(crate) fn close_after(&mut self) {
        if let Self::H1(side) = self {
            side.keep_alive = false;
        }
    }

    /// The answer is complete and the rest of the request is not wanted.
    pub(crate) fn stop_reading(&mut self) {
        match self {
            Self::H1(side) => side.keep_alive = false,
            // h2 sends RST_STREAM(NO_ERROR) itself once the stream is dropped, behind what is still
            // queued; asking for it now would throw the queued answer away (RFC 9113, section 8.1).
            Self::H2(_) => {}
        }
    }

    /// Ends the response so that the client sees that it is not complete (property 2).
    pub(crate) fn abort(&mut self, reason: h2::Reason) {
        match self {
            Self::H1(side) => side.abort(),
            Self::H2(side) => side.reset(reason),
        }
    }
}
