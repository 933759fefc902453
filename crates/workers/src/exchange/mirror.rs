//! Copies of a request for another cluster; their answers are dropped.
//!
//! A mirror never holds the request back: one that cannot keep up is given up.

use std::future::poll_fn;
use std::rc::Rc;
use std::time::Duration;

use engine::exchange::Mirror;
use tokio::sync::mpsc;
use types::ResponseHead;

use crate::accept::Conn;
use crate::codec::{Broken, Frame};
use crate::upstream;
use crate::worker::Worker;

/// Frames a mirror may be behind.
const BEHIND_MAX: usize = 64;
/// A mirror without a time-out of its own.
const WAIT_MAX: Duration = Duration::from_mins(1);

/// The mirrors of one request.
#[derive(Default)]
pub(crate) struct Mirrors {
    bodies: Vec<mpsc::Sender<Frame>>,
}

impl Mirrors {
    /// Starts them; the body follows by [`Self::frame`], unless there is none.
    pub(crate) fn start(&mut self, worker: &Rc<Worker>, conn: &Rc<Conn>, mirrors: Vec<Mirror>, ended: bool) {
        for mirror in mirrors {
            let (sender, body) = mpsc::channel(BEHIND_MAX);
            if !ended {
                self.bodies.push(sender);
            }
            let (on, conn) = (Rc::clone(worker), Rc::clone(conn));
            worker.spawn(async move {
                let timeout = mirror.timeout.unwrap_or(WAIT_MAX);
                match tokio::time::timeout(timeout, send(&on, &conn, mirror, body, ended)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "a mirrored request failed"),
                    Err(_) => tracing::debug!("a mirrored request took too long"),
                }
            });
        }
    }

    /// Copies a frame; who is too far behind is dropped.
    pub(crate) fn frame(&mut self, frame: &Frame) {
        if !self.bodies.is_empty() {
            self.bodies.retain(|body| body.try_send(frame.clone()).is_ok());
        }
    }
}

async fn send(
    worker: &Rc<Worker>,
    conn: &Rc<Conn>,
    mirror: Mirror,
    mut body: mpsc::Receiver<Frame>,
    ended: bool,
) -> Result<(), Broken> {
    let leased = upstream::lease(worker, &mirror.attempt, &conn.facts).await.map_err(|_| Broken::Closed)?;
    let mut running = leased.start(&mirror.head, ended)?;
    while let Some(frame) = body.recv().await {
        match frame {
            Frame::Data(data) => running.up.send_data(data)?,
            Frame::Trailers(trailers) => running.up.send_end(Some(&trailers))?,
        }
        poll_fn(|cx| running.up.poll_flush(cx)).await?;
    }
    running.up.send_end(None)?;
    poll_fn(|cx| running.up.poll_flush(cx)).await?;
    let mut head = ResponseHead::default();
    while poll_fn(|cx| running.up.poll_head(cx, &mut head)).await? {}
    while !running.up.is_finished() {
        match poll_fn(|cx| running.up.poll_frame(cx)).await? {
            Some(Frame::Data(data)) => running.up.consumed(data.len()),
            Some(Frame::Trailers(_)) => {}
            None => break,
        }
    }
    running.finish();
    Ok(())
}
