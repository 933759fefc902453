//! The load: a closed loop, each request sent when the answer before it is in.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::machine::{Cores, Place};

/// What is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Load {
    /// GETs over so many HTTP/1.1 connections, one at a time on each.
    Http1 { connections: usize },
    /// Unary calls over so many HTTP/2 connections, so many at once on each.
    Grpc { connections: usize, streams: usize },
}

/// Heads as a browser or a small client sends them.
const REQUEST: &[u8] = b"GET /api/v1/reviews/42?page=1 HTTP/1.1\r\nhost: reviews.bench.test\r\n\
user-agent: bench/1.0\r\naccept: application/json\r\naccept-language: en\r\ncookie: session=0123456789abcdef\r\n\r\n";

/// Bytes of a gRPC request's message.
const MESSAGE_BYTES: usize = 100;

/// Load under way.
pub(crate) struct Running {
    state: Arc<State>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct State {
    stop: AtomicBool,
    done: AtomicU64,
    /// Requests after which the load ends by itself; 0: none.
    limit: AtomicU64,
    begun: AtomicU64,
}

impl State {
    /// Whether another request may be sent.
    fn next(&self) -> bool {
        if self.stop.load(Relaxed) {
            return false;
        }
        let limit = self.limit.load(Relaxed);
        limit == 0 || self.begun.fetch_add(1, Relaxed) < limit
    }
}

impl Running {
    /// Starts `load` against `to`; for ever, or `limit` requests.
    pub(crate) fn start(load: Load, to: SocketAddr, limit: Option<u64>, cores: &Cores) -> Result<Self> {
        let state = Arc::new(State { limit: limit.unwrap_or(0).into(), ..State::default() });
        let (own, cores) = (Arc::clone(&state), cores.clone());
        let thread = std::thread::Builder::new().name("load".into()).spawn(move || -> Result<()> {
            cores.bind(Place::Load)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(run(load, to, own))
        })?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Answers so far.
    pub(crate) fn done(&self) -> u64 {
        self.state.done.load(Relaxed)
    }

    /// Waits until some requests were answered: connections are made, pools are filled.
    pub(crate) fn warm(&self, requests: u64) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(60);
        while self.done() < requests {
            if self.thread.as_ref().is_some_and(JoinHandle::is_finished) || Instant::now() >= until {
                bail!("the load does not get through: {} answers", self.done());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until a limited load is through.
    pub(crate) fn join(mut self) -> Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => bail!("the load panicked"),
        }
    }

    /// Ends it; any request that failed is an error.
    pub(crate) fn stop(self) -> Result<()> {
        self.state.stop.store(true, Relaxed);
        self.join()
    }
}

async fn run(load: Load, to: SocketAddr, state: Arc<State>) -> Result<()> {
    let mut tasks = tokio::task::JoinSet::new();
    match load {
        Load::Http1 { connections } => {
            for _ in 0..connections {
                tasks.spawn(http1(to, Arc::clone(&state)));
            }
        }
        Load::Grpc { connections, streams } => {
            for _ in 0..connections {
                let stream = TcpStream::connect(to).await?;
                stream.set_nodelay(true)?;
                let (sender, connection) = h2::client::handshake(stream).await?;
                tokio::spawn(connection);
                for _ in 0..streams {
                    tasks.spawn(grpc(sender.clone(), Arc::clone(&state)));
                }
            }
        }
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

async fn http1(to: SocketAddr, state: Arc<State>) -> Result<()> {
    let mut stream = TcpStream::connect(to).await.context("connecting to the proxy")?;
    stream.set_nodelay(true)?;
    let mut read = BytesMut::with_capacity(16 * 1024);
    while state.next() {
        call(&mut stream, &mut read).await?;
        state.done.fetch_add(1, Relaxed);
    }
    Ok(())
}

/// One request and its answer.
pub(crate) async fn call(stream: &mut TcpStream, read: &mut BytesMut) -> Result<()> {
    stream.write_all(REQUEST).await?;
    read.clear();
    loop {
        ensure!(stream.read_buf(read).await? > 0, "the proxy closed a connection");
        let Some(head) = find_head_end(read) else { continue };
        let length = content_length(&read[..head]).context("a response without content-length")?;
        if read.len() >= head + length {
            ensure!(read.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&read[..head]));
            return Ok(());
        }
    }
}

/// Where the body begins.
pub(crate) fn find_head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

fn content_length(head: &[u8]) -> Option<usize> {
    let mut lines = head.split(|byte| *byte == b'\n');
    let value = lines.find_map(|line| {
        let (name, value) = line.split_at_checked(15)?;
        name.eq_ignore_ascii_case(b"content-length:").then_some(value)
    })?;
    std::str::from_utf8(value).ok()?.trim().parse().ok()
}

/// A message of `size` bytes with its prefix.
pub(crate) fn grpc_message(size: usize) -> Bytes {
    let mut message = BytesMut::with_capacity(size + 5);
    message.put_u8(0);
    message.put_u32(u32::try_from(size).unwrap_or(u32::MAX));
    message.put_bytes(b'x', size);
    message.freeze()
}

async fn grpc(mut sender: h2::client::SendRequest<Bytes>, state: Arc<State>) -> Result<()> {
    let message = grpc_message(MESSAGE_BYTES);
    while state.next() {
        let request = http::Request::post("http://reviews.bench.test/bench.Reviews/Get")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("user-agent", "grpc-bench/1.0")
            .body(())?;
        std::future::poll_fn(|cx| sender.poll_ready(cx)).await?;
        let (response, mut stream) = sender.send_request(request, false)?;
        stream.send_data(message.clone(), true)?;
        let (head, mut body) = response.await?.into_parts();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
        }
        let trailers = body.trailers().await?;
        let status = trailers.as_ref().unwrap_or(&head.headers).get("grpc-status");
        ensure!(status.is_some_and(|status| status == "0"), "a call failed: {head:?} {trailers:?}");
        state.done.fetch_add(1, Relaxed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_measured_by_its_head() {
        let response = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nserver: a\r\n\r\n";
        assert_eq!(find_head_end(response), Some(response.len()));
        assert_eq!(content_length(response), Some(12));
        assert_eq!(content_length(b"HTTP/1.1 200 OK\r\n\r\n"), None);
    }
}
