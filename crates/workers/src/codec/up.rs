//! An attempt at an upstream, over either protocol.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use types::{Fields, RequestHead, ResponseHead};

use super::h1::H1Client;
use super::h2::{H2Up, request_to};
use super::{Broken, Frame};

/// The upstream side of one attempt.
#[derive(Debug)]
pub(crate) enum Up {
    /// The connection is ours until the response has ended.
    H1(Box<H1Client>),
    /// One stream of a shared connection.
    H2(Box<H2Up>),
}

macro_rules! both {
    ($self:expr, $side:ident => $body:expr) => {
        match $self {
            Up::H1($side) => $body,
            Up::H2($side) => $body,
        }
    };
}

impl Up {
    /// Sends `head` on an own connection.
    pub(crate) fn start_h1(mut connection: Box<H1Client>, head: &RequestHead, end: bool) -> Result<Self, Broken> {
        // nothing passes into a tunnel before the upstream has agreed to it (property 6)
        let end = end || head.asks_for_tunnel();
        connection.send_head(head, end)?;
        if end {
            connection.send_end(None)?;
        }
        Ok(Self::H1(connection))
    }

    /// Opens a stream; the sender must be ready. One that is to become a tunnel does not end with its head.
    pub(crate) fn start_h2(
        sender: &mut h2::client::SendRequest<Bytes>,
        head: &RequestHead,
        end: bool,
    ) -> Result<Self, Broken> {
        let end = end && !head.asks_for_tunnel();
        let (response, stream) = sender.send_request(request_to(head)?, end)?;
        Ok(Self::H2(Box::new(H2Up::new(response, stream, head, end))))
    }

    /// Pulls a response head. `true` with it: an interim one, another head follows.
    pub(crate) fn poll_head(&mut self, cx: &mut Context<'_>, head: &mut ResponseHead) -> Poll<Result<bool, Broken>> {
        match self {
            Self::H1(side) => Poll::Ready(Ok(ready!(side.poll_head(cx, head))?.interim)),
            Self::H2(side) => side.poll_head(cx, head),
        }
    }

    /// Pulls the next frame of the response; `None` at its end.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, Broken>> {
        both!(self, side => side.poll_frame(cx))
    }

    /// Whether the response has been pulled whole.
    pub(crate) fn is_finished(&self) -> bool {
        both!(self, side => side.is_finished())
    }

    /// `n` bytes that were pulled have been taken by the client.
    pub(crate) fn consumed(&mut self, n: usize) {
        if let Self::H2(side) = self {
            side.consumed(n);
        }
    }

    /// Sends a piece of the body.
    pub(crate) fn send_data(&mut self, data: Bytes) -> Result<(), Broken> {
        both!(self, side => side.send_data(data))
    }

    /// Ends the body.
    pub(crate) fn send_end(&mut self, trailers: Option<&Fields>) -> Result<(), Broken> {
        both!(self, side => side.send_end(trailers))
    }

    /// Bytes the upstream has not taken yet.
    pub(crate) fn buffered(&self) -> usize {
        both!(self, side => side.buffered())
    }

    /// Ready when the upstream has taken all.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        both!(self, side => side.poll_flush(cx))
    }

    /// Whether only whole drains may be followed by more data (HTTP/2 holds one piece).
    pub(crate) fn holds_one(&self) -> bool {
        matches!(self, Self::H2(_))
    }

    /// Gives the attempt up: the upstream sees the cancellation (properties 2 and 24). An HTTP/1
    /// connection is dropped with it.
    pub(crate) fn cancel(mut self) {
        if let Self::H2(side) = &mut self
            && !side.is_over()
        {
            side.reset(h2::Reason::CANCEL);
        }
    }
}
