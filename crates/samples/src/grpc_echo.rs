//! A gRPC service with every kind of call, and switches to make it late or fail.
//!
//! | method (of any service) | answer |
//! |---|---|
//! | `Collect` | one message with the bytes of all messages of the request (client stream) |
//! | `Repeat` | the first message, `x-echo-repeat` times (server stream) |
//! | `Fail` | trailers only, status `x-echo-status` (7 without it) |
//! | `Begun` | one message: how many calls have arrived, this one among them |
//! | `Cancelled` | one message: how many calls were given up by their clients |
//! | `Check` of `grpc.health.v1.Health` | serving, for the server as a whole; status 5 for a service by name |
//! | any other | each byte of the request as it arrives (unary and both streams) |
//!
//! Request headers: `x-echo-delay-ms` waits before the response head, `x-echo-status` is the
//! status in the trailers, `x-echo-trailer` comes back as a trailer. `x-echo-reset` resets the stream
//! instead of an answer: `refused` as one that was not looked at, `early` before the response head,
//! `late` after it. `x-echo-forward: HOST:PORT` has another server answer, see [`forward`]. The
//! response's `x-echo-host` is the pod's name, `x-echo-protocol` the protocol the request came over.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::rc::Rc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use crate::http_app::{DRAIN, listen};
use crate::plain::{hostname, until_told_to_stop};
use crate::{Options, SampleError};

mod forward;

/// Largest request `Collect` keeps.
const BODY_MAX: usize = 1024 * 1024;
/// Most messages `Repeat` sends.
const REPEAT_MAX: u32 = 100_000;
const HEALTH: &str = "/grpc.health.v1.Health/Check";
/// `HealthCheckResponse {status: SERVING}`
const SERVING: [u8; 2] = [0x08, 1];
/// How long after its response head a stream is reset that is to be reset late.
const LATE: Duration = Duration::from_millis(100);
/// Longest wait.
const DELAY_MAX: Duration = Duration::from_mins(1);

/// Serves on `--port`, 7070 by default, until told to stop; then finishes what is in flight.
pub(crate) async fn serve(options: &Options) -> Result<(), SampleError> {
    let listener = listen(if options.port == 0 { 7070 } else { options.port }).await?;
    tokio::task::LocalSet::new().run_until(accept(listener)).await;
    Ok(())
}

async fn accept(listener: tokio::net::TcpListener) {
    let (stop, stopping) = watch::channel(false);
    let (alive, mut ended) = mpsc::channel::<Infallible>(1);
    let calls: Rc<Calls> = Rc::default();
    let told = until_told_to_stop();
    tokio::pin!(told);
    loop {
        let stream = tokio::select! {
            () = &mut told => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Out of descriptors: let others finish first.
                Err(_) => { tokio::time::sleep(crate::ACCEPT_AGAIN).await; continue }
            },
        };
        let (stopping, alive, calls) = (stopping.clone(), alive.clone(), Rc::clone(&calls));
        tokio::task::spawn_local(async move {
            connection(stream, stopping, &alive, &calls).await;
        });
    }
    drop((listener, alive));
    _ = stop.send(true);
    _ = tokio::time::timeout(DRAIN, ended.recv()).await;
}

/// Serves one HTTP/2 connection; `alive` is held as long as a call is under way.
pub(crate) async fn connection(
    stream: TcpStream,
    mut stopping: watch::Receiver<bool>,
    alive: &mpsc::Sender<Infallible>,
    calls: &Rc<Calls>,
) {
    _ = stream.set_nodelay(true);
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    let mut leaving = false;
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            _ = stopping.wait_for(|stop| *stop), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
                continue;
            }
        };
        let Some(Ok((request, respond))) = accepted else { return };
        let (alive, calls) = (alive.clone(), Rc::clone(calls));
        tokio::task::spawn_local(async move {
            calls.begun.set(calls.begun.get() + 1);
            if let Err(Gone) = call(request, respond, &calls).await {
                calls.cancelled.set(calls.cancelled.get() + 1);
            }
            drop(alive);
        });
    }
}

/// How many calls there were.
#[derive(Default)]
pub(crate) struct Calls {
    begun: Cell<u64>,
    /// Given up by their clients.
    cancelled: Cell<u64>,
}

/// The client gave the call up, or its connection broke.
struct Gone;

impl From<h2::Error> for Gone {
    fn from(_: h2::Error) -> Self {
        Self
    }
}

async fn call(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, calls: &Calls) -> Result<(), Gone> {
    let (head, mut body) = request.into_parts();
    let text = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    let number = |name: &str| text(name).and_then(|value| value.parse::<u32>().ok());
    let method = head.uri.path().rsplit('/').next().unwrap_or_default();
    if let Some(to) = text("x-echo-forward") {
        return forward::call(to, &head, body, respond).await;
    }
    let reset = text("x-echo-reset");
    if let Some(reason) = reset.and_then(|how| match how {
        "refused" => Some(Reason::REFUSED_STREAM),
        "early" => Some(Reason::INTERNAL_ERROR),
        _ => None,
    }) {
        respond.send_reset(reason);
        return Ok(());
    }

    if let Some(delay) = number("x-echo-delay-ms") {
        let delay = Duration::from_millis(delay.into()).min(DELAY_MAX);
        tokio::select! {
            _ = poll_fn(|cx| respond.poll_reset(cx)) => return Err(Gone),
            () = tokio::time::sleep(delay) => {}
        }
    }
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("application/grpc"));
    headers.insert("x-echo-protocol", HeaderValue::from_static("HTTP/2"));
    if let Ok(value) = HeaderValue::from_str(&hostname()) {
        headers.insert("x-echo-host", value);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(number("x-echo-status").unwrap_or(0)));
    if let Some(value) = head.headers.get("x-echo-trailer") {
        trailers.insert("x-echo-trailer", value.clone());
    }
    if method == "Fail" {
        headers.insert("grpc-status", HeaderValue::from(number("x-echo-status").unwrap_or(7)));
        headers.insert("grpc-message", HeaderValue::from_static("told to fail"));
        respond.send_response(response, true)?;
        return Ok(());
    }
    let mut out = respond.send_response(response, false)?;
    if reset == Some("late") {
        send(&mut out, message(b"half")).await?;
        // what is still queued when a stream is reset is never sent
        tokio::time::sleep(LATE).await;
        out.send_reset(Reason::INTERNAL_ERROR);
        return Ok(());
    }
    match method {
        "Check" if head.uri.path() == HEALTH => {
            let mut messages = Messages::default();
            let mut asked = None;
            while let Some(chunk) = chunk(&mut body, &mut out).await? {
                asked = asked.or(messages.take(&chunk).into_iter().next());
                if messages.unread.len() > BODY_MAX {
                    out.send_reset(Reason::REFUSED_STREAM);
                    return Ok(());
                }
            }
            if asked.is_none_or(|message| message.is_empty()) {
                send(&mut out, message(&SERVING)).await?;
            } else {
                trailers.insert("grpc-status", HeaderValue::from_static("5"));
            }
        }
        "Begun" => send(&mut out, message(calls.begun.get().to_string().as_bytes())).await?,
        "Cancelled" => send(&mut out, message(calls.cancelled.get().to_string().as_bytes())).await?,
        "Collect" => {
            let mut messages = Messages::default();
            let mut all = BytesMut::new();
            while let Some(chunk) = chunk(&mut body, &mut out).await? {
                for message in messages.take(&chunk) {
                    all.extend_from_slice(&message);
                }
                if all.len() + messages.unread.len() > BODY_MAX {
                    out.send_reset(Reason::REFUSED_STREAM);
                    return Ok(());
                }
            }
            send(&mut out, message(&all)).await?;
        }
        "Repeat" => {
            let mut messages = Messages::default();
            let mut first = None;
            while first.is_none() {
                let Some(chunk) = chunk(&mut body, &mut out).await? else { break };
                first = messages.take(&chunk).into_iter().next();
                if messages.unread.len() > BODY_MAX {
                    out.send_reset(Reason::REFUSED_STREAM);
                    return Ok(());
                }
            }
            let first = message(&first.unwrap_or_default());
            for _ in 0..number("x-echo-repeat").unwrap_or(3).min(REPEAT_MAX) {
                send(&mut out, first.clone()).await?;
            }
        }
        _ => {
            while let Some(chunk) = chunk(&mut body, &mut out).await? {
                send(&mut out, chunk).await?;
            }
        }
    }
    out.send_trailers(trailers)?;
    Ok(())
}

/// The next bytes of the request; an error when the client gives up.
async fn chunk(body: &mut RecvStream, out: &mut SendStream<Bytes>) -> Result<Option<Bytes>, Gone> {
    let chunk = tokio::select! {
        chunk = body.data() => chunk.transpose()?,
        _ = poll_fn(|cx| out.poll_reset(cx)) => return Err(Gone),
    };
    if let Some(chunk) = &chunk {
        body.flow_control().release_capacity(chunk.len())?;
    }
    Ok(chunk)
}

async fn send(out: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), Gone> {
    while !data.is_empty() {
        out.reserve_capacity(data.len());
        let room = poll_fn(|cx| out.poll_capacity(cx)).await.ok_or(Gone)??;
        out.send_data(data.split_to(room.min(data.len())), false)?;
    }
    Ok(())
}

/// A message in gRPC's frame: not compressed, length, bytes.
fn message(bytes: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(bytes.len() + 5);
    out.put_u8(0);
    out.put_u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    out.put_slice(bytes);
    out.freeze()
}

/// Takes messages out of a body, however it is cut.
#[derive(Default)]
struct Messages {
    unread: BytesMut,
}

impl Messages {
    fn take(&mut self, chunk: &[u8]) -> Vec<Bytes> {
        self.unread.extend_from_slice(chunk);
        let mut out = Vec::new();
        while let Some(header) = self.unread.first_chunk::<5>() {
            let end = 5 + u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            if self.unread.len() < end {
                break;
            }
            out.push(self.unread.split_to(end).freeze().slice(5..));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let body = [message(b"one"), message(b""), message(b"three")].concat();
        for size in 1..body.len() {
            let mut messages = Messages::default();
            let found: Vec<Bytes> = body.chunks(size).flat_map(|piece| messages.take(piece)).collect();
            assert_eq!(found, ["one", "", "three"], "pieces of {size}");
        }
    }
}
