//! Copies of a request for another cluster; their answers are dropped.
//!
//! A mirror never holds the request back: one that cannot keep up is given up. It gets the whole request or is seen to
//! break off, never a part that looks whole.

use std::future::poll_fn;
use std::rc::Rc;
use std::time::Duration;

use engine::exchange::Mirror;
use tokio::sync::mpsc;
use types::ResponseHead;

use crate::accept::Conn;
use crate::codec::relay::Upload;
use crate::codec::{Broken, Frame};
use crate::upstream::{self, Running};
use crate::worker::Worker;

/// Frames a mirror may be behind.
const BEHIND_MAX: usize = 64;
/// A mirror without a time-out of its own.
const WAIT_MAX: Duration = Duration::from_mins(1);

/// What goes to a mirror. Where nothing comes any more and the end did not come, the request has broken off.
enum Piece {
    Frame(Frame),
    End,
}

/// The mirrors of one request that still take its body.
#[derive(Default)]
pub(crate) struct Mirrors {
    bodies: Vec<mpsc::Sender<Piece>>,
}

impl Mirrors {
    /// Starts them with what was pulled of the body before; the rest follows by [`Self::frame`] and [`Self::end`].
    pub(crate) fn start(&mut self, worker: &Rc<Worker>, conn: &Rc<Conn>, mirrors: Vec<Mirror>, upload: &Upload) {
        if mirrors.is_empty() {
            return;
        }
        let Some(begun) = upload.pulled() else {
            tracing::debug!("a request is not mirrored: what came of it before is not kept");
            return;
        };
        let is_whole = upload.is_source_done();
        for mirror in mirrors {
            // a place is left for the end
            let (sender, rest) = mpsc::channel(BEHIND_MAX + 1);
            let body = Body { begun: begun.to_vec(), is_whole, rest };
            if !is_whole {
                self.bodies.push(sender);
            }
            let (on, conn) = (Rc::clone(worker), Rc::clone(conn));
            worker.spawn(async move {
                let timeout = mirror.timeout.unwrap_or(WAIT_MAX);
                match tokio::time::timeout(timeout, send(&on, &conn, mirror, body)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "a mirrored request failed"),
                    Err(_) => tracing::debug!("a mirrored request took too long"),
                }
            });
        }
    }

    /// Copies a frame; who is too far behind is given up.
    pub(crate) fn frame(&mut self, frame: &Frame) {
        if !self.bodies.is_empty() {
            self.bodies.retain(|body| body.capacity() > 1 && body.try_send(Piece::Frame(frame.clone())).is_ok());
        }
    }

    /// The request is whole.
    pub(crate) fn end(&mut self) {
        for body in self.bodies.drain(..) {
            // there is room, or nobody is there any more
            drop(body.try_send(Piece::End));
        }
    }
}

/// The body of one mirror.
struct Body {
    begun: Vec<Frame>,
    /// What has begun is all of it.
    is_whole: bool,
    rest: mpsc::Receiver<Piece>,
}

async fn send(worker: &Rc<Worker>, conn: &Rc<Conn>, mirror: Mirror, body: Body) -> Result<(), Broken> {
    let leased = upstream::lease(worker, &mirror.attempt, &conn.facts).await.map_err(|_| Broken::Closed)?;
    if mirror.head.protocol().is_some() && !leased.takes_upgrades() {
        return Err(Broken::Unwritable);
    }
    let mut running = leased.start(&mirror.head, body.is_whole && body.begun.is_empty())?;
    match copy(&mut running, body).await {
        // nobody is there to speak in a tunnel
        Ok(()) if !mirror.head.asks_for_tunnel() => running.finish(),
        Ok(()) => running.cancel(),
        Err(broken) => {
            running.cancel();
            return Err(broken);
        }
    }
    Ok(())
}

/// Sends the body and takes the answer in.
async fn copy(running: &mut Running, mut body: Body) -> Result<(), Broken> {
    for frame in body.begun {
        pass(running, frame).await?;
    }
    while !body.is_whole {
        match body.rest.recv().await {
            Some(Piece::Frame(frame)) => pass(running, frame).await?,
            Some(Piece::End) => body.is_whole = true,
            None => return Err(Broken::Closed),
        }
    }
    running.up.send_end(None)?;
    poll_fn(|cx| running.up.poll_flush(cx)).await?;
    let mut head = ResponseHead::default();
    while poll_fn(|cx| running.up.poll_head(cx, &mut head)).await? {}
    if head.status == 101 {
        return Ok(());
    }
    while !running.up.is_finished() {
        match poll_fn(|cx| running.up.poll_frame(cx)).await? {
            Some(Frame::Data(data)) => running.up.consumed(data.len()),
            Some(Frame::Trailers(_)) => {}
            None => break,
        }
    }
    Ok(())
}

async fn pass(running: &mut Running, frame: Frame) -> Result<(), Broken> {
    match frame {
        Frame::Data(data) => running.up.send_data(data)?,
        Frame::Trailers(trailers) => running.up.send_end(Some(&trailers))?,
    }
    poll_fn(|cx| running.up.poll_flush(cx)).await
}
