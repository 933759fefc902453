//! Floods on HTTP/2 connections: frames that carry nothing are paid for, and whoever has nothing
//! left is cut off (property 21).
//!
//! The `h2` crate bounds what it holds of a peer (heads, CONTINUATION frames, streams that were
//! reset before anybody took them), but it takes any number of PING, SETTINGS, PRIORITY,
//! WINDOW_UPDATE, RST_STREAM and empty DATA frames, each of which costs us time and some of which
//! cost memory. So every byte passes a [`Guarded`], which looks at frame headers only:
//!
//! ```text
//!  peer ──► PING, SETTINGS, PRIORITY, WINDOW_UPDATE, ──► credit - 1 ──► 0: the connection fails
//!           RST_STREAM, CONTINUATION, empty DATA, …
//!  peer ◄── RST_STREAM ◄─────────────────────────────── credit - 1   (a stream that was refused)
//!  peer ◄── HEADERS, DATA ◄──────────────────────────── credit + 10  (an honest peer answers
//!  time ──► credit + 100 a second                                     what it gets with few frames)
//! ```
//!
//! A stream that is reset after its response began has paid for its reset; one reset before that
//! has not, which is the "rapid reset" attack; nor has one that we refuse, because the peer opens more
//! streams than it may.
//!
//! *Source*: RFC 9113, section 10.5; Envoy's `max_inbound_window_update_frames_per_data_frame_sent`
//! (10) and `premature_reset_total_stream_count` for the proportions.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::io::Io;

/// Frames for nothing that a connection may bring at once.
const CREDIT_MAX: u32 = 1000;
/// What a frame of ours that answers something pays.
const EARNED: u32 = 10;
/// How long until one more is allowed.
const REFILL: Duration = Duration::from_millis(10);
/// `PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n`, which is no frame.
const PREFACE: usize = 24;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const END_STREAM: u8 = 1;
const PADDED: u8 = 8;
/// Most of a frame that may be padding, with its own length.
const PADDING_MAX: u32 = 256;

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FrameHead {
    length: u32,
    kind: u8,
    flags: u8,
}

impl FrameHead {
    /// Whether the peer gives us work for nothing.
    fn is_empty_work(self) -> bool {
        match self.kind {
            HEADERS => false,
            // padding is nothing too, unless it cannot be the most of it
            DATA => {
                (self.flags & PADDED != 0 && self.length <= 2 * PADDING_MAX)
                    || (self.length == 0 && self.flags & END_STREAM == 0)
            }
            _ => true,
        }
    }
}

/// Finds frame headers in a stream of bytes.
#[derive(Debug)]
struct Frames {
    /// Bytes until the next header.
    skip: usize,
    header: [u8; 9],
    have: usize,
    found: u64,
}

impl Frames {
    fn after(skip: usize) -> Self {
        Self { skip, header: [0; 9], have: 0, found: 0 }
    }

    /// Whether the first frame has passed whole.
    fn has_passed_one(&self) -> bool {
        self.found > 1 || (self.found == 1 && self.skip == 0)
    }

    fn take(&mut self, mut bytes: &[u8], mut found: impl FnMut(FrameHead)) {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let n = (9 - self.have).min(bytes.len());
            self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
            self.have += n;
            bytes = &bytes[n..];
            if self.have == 9 {
                self.have = 0;
                self.found += 1;
                let [a, b, c, kind, flags, ..] = self.header;
                let length = u32::from_be_bytes([0, a, b, c]);
                self.skip = length as usize;
                found(FrameHead { length, kind, flags });
            }
        }
    }
}

/// What a peer may still bring for nothing.
#[derive(Debug)]
struct Credit {
    left: u32,
    refilled: Instant,
}

impl Credit {
    /// `false`: nothing is left.
    fn spend(&mut self, now: impl FnOnce() -> Instant) -> bool {
        if self.left == 0 {
            let now = now();
            let since = now.duration_since(self.refilled);
            let refill = u32::try_from(since.as_millis() / REFILL.as_millis()).unwrap_or(u32::MAX);
            if refill > 0 {
                self.refilled = now;
                self.left = refill.min(CREDIT_MAX);
            }
        }
        let some = self.left > 0;
        self.left = self.left.saturating_sub(1);
        some
    }

    fn earn(&mut self) {
        self.left = (self.left + EARNED).min(CREDIT_MAX);
    }
}

/// Whether a peer's first SETTINGS are in: what it can do is not known before.
#[derive(Debug, Default)]
pub(crate) struct PeerSettings {
    are_in: Cell<bool>,
    came: Notify,
}

impl PeerSettings {
    /// They are in, or will never be.
    pub(crate) fn done(&self) {
        self.are_in.set(true);
        self.came.notify_waiters();
    }

    /// Returns once they are in, or the connection has ended.
    pub(crate) async fn wait(&self) {
        loop {
            let coming = self.came.notified();
            if self.are_in.get() {
                return;
            }
            coming.await;
        }
    }
}

/// Bytes of an HTTP/2 connection, watched.
#[derive(Debug)]
pub(crate) struct Guarded {
    io: Io,
    incoming: Frames,
    outgoing: Frames,
    credit: Credit,
    /// We had to refuse more than the peer has paid for.
    is_overdrawn: bool,
    flooded: Rc<Cell<bool>>,
    /// Told once, by the peer's first frame.
    settings: Option<Rc<PeerSettings>>,
}

impl Guarded {
    /// The server's side of a connection; the flag tells that the client flooded it.
    pub(crate) fn server(io: Io) -> (Self, Rc<Cell<bool>>) {
        Self::new(io, PREFACE, 0)
    }

    /// The client's side, and word of the server's first SETTINGS, which are its first frame (RFC 9113, section 3.4).
    pub(crate) fn client(io: Io) -> (Self, Rc<PeerSettings>) {
        let settings = Rc::<PeerSettings>::default();
        (Self { settings: Some(Rc::clone(&settings)), ..Self::new(io, 0, PREFACE).0 }, settings)
    }

    fn new(io: Io, incoming: usize, outgoing: usize) -> (Self, Rc<Cell<bool>>) {
        let flooded = Rc::<Cell<bool>>::default();
        let made = Self {
            io,
            incoming: Frames::after(incoming),
            outgoing: Frames::after(outgoing),
            credit: Credit { left: CREDIT_MAX, refilled: Instant::now() },
            is_overdrawn: false,
            flooded: Rc::clone(&flooded),
            settings: None,
        };
        (made, flooded)
    }

    /// Looks at what was read. `false`: the peer has nothing left.
    fn received(&mut self, bytes: &[u8]) -> bool {
        let Self { incoming, credit, is_overdrawn, settings, .. } = self;
        let mut fits = !*is_overdrawn;
        incoming.take(bytes, |frame| fits &= !frame.is_empty_work() || credit.spend(Instant::now));
        // whoever waits runs after the connection's task, which reads them now
        if let Some(settings) = settings.take_if(|_| incoming.has_passed_one()) {
            settings.done();
        }
        fits
    }

    fn sent(&mut self, bytes: &[u8]) {
        let Self { outgoing, credit, is_overdrawn, .. } = self;
        outgoing.take(bytes, |frame| match frame.kind {
            // an answer, or a request, of ours
            DATA | HEADERS => credit.earn(),
            RST_STREAM => *is_overdrawn |= !credit.spend(Instant::now),
            _ => {}
        });
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        if self.received(&buf.filled()[before..]) {
            return Poll::Ready(Ok(()));
        }
        self.flooded.set(true);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "a flood of frames that carry nothing")))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.sent(&buf[..n]);
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        let mut left = n;
        for buf in bufs {
            let here = left.min(buf.len());
            self.sent(&buf[..here]);
            left -= here;
        }
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    #[test]
    fn frames_are_found_however_the_bytes_are_cut() {
        let bytes = [&[7; PREFACE][..], &frame(4, 0, b"123456"), &frame(0, 1, b""), &frame(6, 0, &[1; 8])].concat();
        let expect = [(6, 4, 0), (0, 0, 1), (8, 6, 0)];
        for size in 1..bytes.len() {
            let mut frames = Frames::after(PREFACE);
            let mut seen = Vec::new();
            let mut taken = 0;
            for piece in bytes.chunks(size) {
                frames.take(piece, |frame| seen.push((frame.length, frame.kind, frame.flags)));
                taken += piece.len();
                assert_eq!(frames.has_passed_one(), taken >= PREFACE + 9 + 6, "pieces of {size}, {taken} taken");
            }
            assert_eq!(seen, expect, "pieces of {size}");
        }
    }

    #[test]
    fn what_costs_and_what_earns() {
        let head = |kind, flags, length| FrameHead { length, kind, flags };
        for (frame, costs) in [
            (head(DATA, 0, 5), false),
            (head(DATA, 0, 0), true),
            (head(DATA, END_STREAM, 0), false),
            (head(DATA, PADDED, 200), true),
            (head(DATA, PADDED, 512), true),
            (head(DATA, PADDED, 513), false),
            (head(HEADERS, 0, 0), false),
            (head(2, 0, 5), true),
            (head(3, 0, 4), true),
            (head(4, 1, 0), true),
            (head(6, 0, 8), true),
            (head(8, 0, 4), true),
            (head(9, 0, 0), true),
            (head(99, 0, 4), true),
        ] {
            assert_eq!(frame.is_empty_work(), costs, "{frame:?}");
        }
    }

    #[test]
    fn credit_comes_back_with_time_and_with_answers() {
        let start = Instant::now();
        let mut credit = Credit { left: CREDIT_MAX, refilled: start };
        for _ in 0..CREDIT_MAX {
            assert!(credit.spend(|| start));
        }
        assert!(!credit.spend(|| start));
        assert!(credit.spend(|| start + REFILL));
        assert!(!credit.spend(|| start + REFILL));
        credit.earn();
        for _ in 0..EARNED {
            assert!(credit.spend(|| start + REFILL));
        }
        assert!(!credit.spend(|| start + REFILL));
        // never more than a burst, however long nothing came
        assert!(credit.spend(|| start + Duration::from_hours(1)));
        assert_eq!(credit.left, CREDIT_MAX - 1);
    }
}
