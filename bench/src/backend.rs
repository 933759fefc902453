//! What the proxies forward to: answers of 1 KiB over HTTP/1.1, and unary gRPC.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::HeaderMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::load::{find_head_end, grpc_message};
use crate::machine::{Cores, Place};

/// Bytes of a response's body or message.
pub(crate) const BODY_BYTES: usize = 1024;

/// Two servers on a thread of their own, which lives as long as this program.
pub(crate) struct Backend {
    pub(crate) http1: SocketAddr,
    pub(crate) grpc: SocketAddr,
}

impl Backend {
    /// Starts both.
    pub(crate) fn start(cores: &Cores) -> Result<Self> {
        let (tell, told) = oneshot::channel();
        let cores = cores.clone();
        std::thread::Builder::new().name("backend".into()).spawn(move || -> Result<()> {
            cores.bind(Place::Load)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let http1 = TcpListener::bind("127.0.0.1:0").await?;
                let grpc = TcpListener::bind("127.0.0.1:0").await?;
                let backend = Self { http1: http1.local_addr()?, grpc: grpc.local_addr()? };
                if tell.send(backend).is_err() {
                    return anyhow::Ok(());
                }
                tokio::join!(serve_http1(http1), serve_grpc(grpc));
                anyhow::Ok(())
            })
        })?;
        told.blocking_recv().context("the backend did not start")
    }
}

async fn serve_http1(listener: TcpListener) {
    let mut response = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\nserver: bench\r\ncontent-length: {BODY_BYTES}\r\n\r\n"
    )
    .into_bytes();
    response.resize(response.len() + BODY_BYTES, b'x');
    let response: &'static [u8] = response.leak();
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            // the proxy closes when it likes
            drop(answer_http1(stream, response).await);
        });
    }
}

async fn answer_http1(mut stream: TcpStream, response: &'static [u8]) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut read = Vec::with_capacity(8 * 1024);
    loop {
        while find_head_end(&read).is_none() {
            if stream.read_buf(&mut read).await? == 0 {
                return Ok(());
            }
        }
        // requests of the load have no body, and one is under way at a time
        read.clear();
        stream.write_all(response).await?;
    }
}

async fn serve_grpc(listener: TcpListener) {
    let message = grpc_message(BODY_BYTES);
    while let Ok((stream, _)) = listener.accept().await {
        let message = message.clone();
        tokio::spawn(async move {
            drop(stream.set_nodelay(true));
            let Ok(mut connection) = h2::server::handshake(stream).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                let message = message.clone();
                tokio::spawn(async move { drop(answer_grpc(request.into_body(), respond, message).await) });
            }
        });
    }
}

async fn answer_grpc(
    mut body: h2::RecvStream,
    mut respond: h2::server::SendResponse<Bytes>,
    message: Bytes,
) -> Result<()> {
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
    }
    let head = http::Response::builder().header("content-type", "application/grpc").body(())?;
    let mut stream = respond.send_response(head, false)?;
    stream.send_data(message, false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    stream.send_trailers(trailers)?;
    Ok(())
}
