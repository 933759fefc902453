//! Frames from one side to the other, pulled and held back.

use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::{Broken, Down, Frame, HELD_MAX, Up};

/// Kept pieces are joined up to this size: a body in crumbs would cost far more than its bytes.
const CRUMBS: usize = 256;

/// Which side failed, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Down(Broken),
    Up(Broken),
}

/// Looks at frames as they pass.
pub(crate) trait Watch {
    /// A frame passes; trailers may be edited.
    fn frame(&mut self, frame: &mut Frame);
}

impl Watch for () {
    fn frame(&mut self, _: &mut Frame) {}
}

/// The request's way up, over one or more attempts.
///
/// What was pulled is kept for another attempt, up to a cap; beyond it the request can no longer
/// be sent again.
#[derive(Debug, Default)]
pub(crate) struct Upload {
    /// The end has been passed on to this attempt.
    pub(crate) ended: bool,
    /// Body bytes pulled from the client.
    pub(crate) bytes: u64,
    /// The end has been pulled from the client.
    source_done: bool,
    kept: Vec<Frame>,
    kept_bytes: usize,
    keep_max: usize,
    /// Frames of `kept` this attempt has had.
    cursor: usize,
    incomplete: bool,
    held: usize,
}

impl Upload {
    /// A request that has, or has not, ended with its head; up to `keep_max` bytes of its body
    /// are kept.
    pub(crate) fn new(ended: bool) -> Self {
        Self { ended, source_done: ended, ..Self::default() }
    }

    /// Bytes that may be kept from now on; only before the first frame.
    pub(crate) fn keep(&mut self, max: usize) {
        if self.bytes == 0 {
            self.keep_max = max;
        }
    }

    /// Whether every frame pulled is still there for another attempt.
    pub(crate) fn is_replayable(&self) -> bool {
        !self.incomplete
    }

    /// Whether the client's request has been pulled whole.
    pub(crate) fn is_source_done(&self) -> bool {
        self.source_done
    }

    /// What was pulled so far; `None`: it is not kept whole.
    pub(crate) fn pulled(&self) -> Option<&[Frame]> {
        (!self.incomplete).then_some(self.kept.as_slice())
    }

    /// From the start again, for another attempt.
    pub(crate) fn rewind(&mut self) {
        debug_assert!(self.is_replayable(), "a request that is not kept whole is not sent again");
        self.cursor = 0;
        self.ended = self.source_done && self.kept.is_empty();
    }

    /// Pulls what is buffered for somebody who needs the body first; up to `max` bytes.
    pub(crate) fn poll_buffer(
        &mut self,
        cx: &mut Context<'_>,
        down: &mut Down<'_>,
        max: usize,
        watch: &mut impl Watch,
    ) -> Poll<Result<(), Fault>> {
        self.keep_max = self.keep_max.max(max + HELD_MAX);
        while !self.source_done && self.kept_bytes < max {
            let pulled = ready!(self.pull(cx, down, watch))?;
            if let Some(Frame::Data(data)) = &pulled {
                down.consumed(data.len());
                self.held -= data.len();
            }
        }
        // whatever was pulled is sent from the start
        self.cursor = 0;
        self.ended = self.source_done && self.kept.is_empty();
        Poll::Ready(Ok(()))
    }

    /// What is kept, joined.
    pub(crate) fn kept(&self) -> Bytes {
        let mut pieces = self.kept.iter().filter_map(|frame| match frame {
            Frame::Data(data) => Some(data),
            Frame::Trailers(_) => None,
        });
        match (pieces.next(), pieces.next()) {
            (None, _) => Bytes::new(),
            (Some(only), None) => only.clone(),
            (Some(first), Some(second)) => {
                let mut all = first.to_vec();
                all.extend_from_slice(second);
                for piece in pieces {
                    all.extend_from_slice(piece);
                }
                all.into()
            }
        }
    }

    /// Pulls one frame from the client and keeps it if there is room.
    fn pull(
        &mut self,
        cx: &mut Context<'_>,
        down: &mut Down<'_>,
        watch: &mut impl Watch,
    ) -> Poll<Result<Option<Frame>, Fault>> {
        let mut frame = ready!(down.poll_frame(cx)).map_err(Fault::Down)?;
        if let Some(frame) = &mut frame {
            watch.frame(frame);
            let size = if let Frame::Data(data) = frame { data.len() } else { 0 };
            self.bytes += size as u64;
            self.held += size;
            if !self.incomplete && self.kept_bytes + size <= self.keep_max {
                self.keep_frame(frame);
                self.kept_bytes += size;
                self.cursor = self.kept.len();
            } else {
                self.incomplete = true;
                self.kept = Vec::new();
                self.cursor = 0;
            }
        }
        self.source_done = matches!(frame, None | Some(Frame::Trailers(_))) || down.is_finished();
        Poll::Ready(Ok(frame))
    }

    /// Keeps a frame that this attempt has; the last kept one it has had as well.
    fn keep_frame(&mut self, frame: &Frame) {
        if let (Some(Frame::Data(last)), Frame::Data(data)) = (self.kept.last_mut(), frame)
            && last.len() + data.len() <= CRUMBS
        {
            *last = [&last[..], &data[..]].concat().into();
            return;
        }
        self.kept.push(match frame {
            // a crumb must not keep the whole read buffer alive
            Frame::Data(data) if data.len() <= CRUMBS => Frame::Data(Bytes::copy_from_slice(data)),
            other => other.clone(),
        });
    }

    /// Moves the request on. Ready when it has been passed on whole.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        down: &mut Down<'_>,
        up: &mut Up,
        watch: &mut impl Watch,
    ) -> Poll<Result<(), Fault>> {
        loop {
            if self.ended {
                ready!(up.poll_flush(cx)).map_err(Fault::Up)?;
                self.taken(down);
                return Poll::Ready(Ok(()));
            }
            if up.buffered() >= HELD_MAX || (up.holds_one() && up.buffered() > 0) {
                ready!(up.poll_flush(cx)).map_err(Fault::Up)?;
                self.taken(down);
            }
            let frame = if let Some(kept) = self.kept.get(self.cursor) {
                self.cursor += 1;
                Some(kept.clone())
            } else if self.source_done {
                None
            } else {
                match self.pull(cx, down, watch) {
                    Poll::Ready(frame) => frame?,
                    Poll::Pending => {
                        ready!(up.poll_flush(cx)).map_err(Fault::Up)?;
                        self.taken(down);
                        return Poll::Pending;
                    }
                }
            };
            let last = self.source_done && (self.incomplete || self.cursor == self.kept.len());
            match frame {
                Some(Frame::Data(data)) => {
                    up.send_data(data).map_err(Fault::Up)?;
                    if last {
                        up.send_end(None).map_err(Fault::Up)?;
                    }
                }
                Some(Frame::Trailers(trailers)) => up.send_end(Some(&trailers)).map_err(Fault::Up)?,
                None => up.send_end(None).map_err(Fault::Up)?,
            }
            self.ended = last;
        }
    }

    fn taken(&mut self, down: &mut Down<'_>) {
        let held = std::mem::take(&mut self.held);
        if held > 0 {
            down.consumed(held);
        }
    }
}

/// The response's way down.
#[derive(Debug, Default)]
pub(crate) struct Download {
    /// The end has been passed on.
    pub(crate) ended: bool,
    /// Body bytes passed on.
    pub(crate) bytes: u64,
    held: usize,
}

impl Download {
    /// A response that has, or has not, ended with its head.
    pub(crate) fn new(ended: bool) -> Self {
        Self { ended, ..Self::default() }
    }
}

/// Moves the response's body on. Ready when it has been passed on whole.
pub(crate) fn poll_response(
    cx: &mut Context<'_>,
    flow: &mut Download,
    down: &mut Down<'_>,
    up: &mut Up,
    watch: &mut impl Watch,
) -> Poll<Result<(), Fault>> {
    loop {
        if flow.ended {
            ready!(down.poll_flush(cx)).map_err(Fault::Down)?;
            up.consumed(std::mem::take(&mut flow.held));
            return Poll::Ready(Ok(()));
        }
        if down.buffered() >= HELD_MAX || (down.holds_one() && down.buffered() > 0) {
            ready!(down.poll_flush(cx)).map_err(Fault::Down)?;
            up.consumed(std::mem::take(&mut flow.held));
        }
        match up.poll_frame(cx) {
            Poll::Pending => {
                ready!(down.poll_flush(cx)).map_err(Fault::Down)?;
                up.consumed(std::mem::take(&mut flow.held));
                return Poll::Pending;
            }
            Poll::Ready(Err(broken)) => return Poll::Ready(Err(Fault::Up(broken))),
            Poll::Ready(Ok(Some(mut frame))) => {
                watch.frame(&mut frame);
                match frame {
                    Frame::Data(data) => {
                        flow.held += data.len();
                        flow.bytes += data.len() as u64;
                        let finished = up.is_finished();
                        // more than was announced is the upstream's fault
                        down.send_data(data).map_err(Fault::Up)?;
                        if finished {
                            down.send_end(None).map_err(Fault::Up)?;
                            flow.ended = true;
                        }
                    }
                    Frame::Trailers(trailers) => {
                        down.send_end(Some(&trailers)).map_err(Fault::Up)?;
                        flow.ended = true;
                    }
                }
            }
            Poll::Ready(Ok(None)) => {
                down.send_end(None).map_err(Fault::Up)?;
                flow.ended = true;
            }
        }
    }
}
