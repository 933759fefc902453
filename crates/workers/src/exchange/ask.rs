//! Questions of an exchange: the external authorizer's verdict, a host's addresses.

use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use engine::exchange::{AuthorizeAnswer, AuthorizeQuestion};
use types::{Cause, Fields, ResponseHead};

use crate::accept::Conn;
use crate::codec::Frame;
use crate::upstream;
use crate::worker::Worker;

/// An authorizer's answer is no longer than this.
const ANSWER_MAX: usize = 256 * 1024;
/// An authorizer without a time-out of its own.
const WAIT_MAX: Duration = Duration::from_mins(10);

/// Calls the authorizer. Every failure is one cause: the filter decides whether that lets through.
pub(crate) async fn authorize(
    worker: &Rc<Worker>,
    conn: &Conn,
    question: AuthorizeQuestion,
) -> Result<AuthorizeAnswer, Cause> {
    let timeout = question.timeout.unwrap_or(WAIT_MAX);
    let calling = call(worker, conn, question);
    tokio::time::timeout(timeout, calling).await.unwrap_or(Err(Cause::ExtAuthzError))
}

async fn call(worker: &Rc<Worker>, conn: &Conn, question: AuthorizeQuestion) -> Result<AuthorizeAnswer, Cause> {
    let failed = |_| Cause::ExtAuthzError;
    let leased = upstream::lease(worker, &question.attempt, &conn.facts).await.map_err(|failure| {
        tracing::debug!(cause = failure.cause.name(), detail = &*failure.detail, "the authorizer cannot be reached");
        Cause::ExtAuthzError
    })?;
    let empty = question.body.is_empty();
    let mut running = leased.start(&question.head, empty).map_err(failed)?;
    if !empty {
        running.up.send_data(question.body).map_err(failed)?;
        running.up.send_end(None).map_err(failed)?;
    }
    poll_fn(|cx| running.up.poll_flush(cx)).await.map_err(failed)?;
    let mut head = ResponseHead::default();
    while poll_fn(|cx| running.up.poll_head(cx, &mut head)).await.map_err(failed)? {}
    let (body, trailers) = collect(&mut running).await?;
    running.finish();
    Ok(AuthorizeAnswer { head, body, trailers })
}

async fn collect(running: &mut upstream::Running) -> Result<(Bytes, Option<Fields>), Cause> {
    let mut body = BytesMut::new();
    let mut trailers = None;
    while !running.up.is_finished() {
        match poll_fn(|cx| running.up.poll_frame(cx)).await {
            Ok(Some(Frame::Data(data))) => {
                if body.len() + data.len() > ANSWER_MAX {
                    return Err(Cause::ExtAuthzError);
                }
                running.up.consumed(data.len());
                body.extend_from_slice(&data);
            }
            Ok(Some(Frame::Trailers(fields))) => trailers = Some(fields),
            Ok(None) => break,
            Err(_) => return Err(Cause::ExtAuthzError),
        }
    }
    Ok((body.freeze(), trailers))
}

/// Resolves a host for dynamic forwarding.
pub(crate) async fn resolve(worker: &Rc<Worker>, host: &str) -> Result<Vec<IpAddr>, Cause> {
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    worker.shared.resolve(host).await.ok_or(Cause::DnsFailed)
}
