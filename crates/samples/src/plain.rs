//! The small ones: sleep, helloworld, tcp-echo, gRPC echo.

use std::rc::Rc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};

use crate::http_app::{listen, serve, setting, text};
use crate::{Options, SampleError};

/// Resolves at SIGTERM or SIGINT.
pub(crate) async fn until_told_to_stop() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// The pod's name.
pub(crate) fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| setting("HOSTNAME", "localhost"), |name| name.trim().to_owned())
}

/// `GET /hello`
pub(crate) async fn helloworld(options: &Options) -> Result<(), SampleError> {
    let line = format!("Hello version: {}, instance: {}\n", options.version, hostname());
    let port = if options.port == 0 { 5000 } else { options.port };
    serve(port, move |call| {
        let answer = match call.uri().path() {
            "/hello" => text(StatusCode::OK, line.clone()),
            "/health" => text(StatusCode::OK, "Helloworld is healthy\n"),
            _ => text(StatusCode::NOT_FOUND, "not found\n"),
        };
        std::future::ready(answer)
    })
    .await
}

/// Echoes each line behind a prefix: `tcp-echo 9000,9001 hello`.
pub(crate) async fn tcp_echo(options: &Options) -> Result<(), SampleError> {
    let ports = options.rest.first().map_or("9000", String::as_str);
    let prefix: Rc<str> = options.rest.get(1).map_or("hello", String::as_str).into();
    let mut listeners = Vec::new();
    for port in ports.split(',') {
        let port = port
            .trim()
            .parse()
            .map_err(|_| SampleError::Option { sample: "tcp-echo".into(), option: ports.to_owned() })?;
        listeners.push(listen(port).await?);
    }
    let local = tokio::task::LocalSet::new();
    for listener in listeners {
        let prefix = Rc::clone(&prefix);
        local.spawn_local(async move {
            loop {
                if let Ok((stream, _)) = listener.accept().await {
                    tokio::task::spawn_local(echo(stream, Rc::clone(&prefix)));
                } else {
                    tokio::task::yield_now().await;
                }
            }
        });
    }
    local.run_until(until_told_to_stop()).await;
    Ok(())
}

async fn echo(mut stream: TcpStream, prefix: Rc<str>) {
    let mut buf = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buf).await {
        let mut out = Vec::with_capacity(prefix.len() + 1 + read);
        out.extend_from_slice(prefix.as_bytes());
        out.push(b' ');
        out.extend_from_slice(&buf[..read]);
        if stream.write_all(&out).await.is_err() {
            return;
        }
    }
}

/// Any gRPC method: every byte of the request stream comes back as it arrives, then
/// `grpc-status: 0`. `/…/Fail` answers with trailers only, status 7.
pub(crate) async fn grpc_echo(options: &Options) -> Result<(), SampleError> {
    let listener = listen(if options.port == 0 { 7070 } else { options.port }).await?;
    let local = tokio::task::LocalSet::new();
    local.spawn_local(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => _ = tokio::task::spawn_local(grpc_connection(stream)),
                Err(_) => tokio::task::yield_now().await,
            }
        }
    });
    local.run_until(until_told_to_stop()).await;
    Ok(())
}

async fn grpc_connection(stream: TcpStream) {
    _ = stream.set_nodelay(true);
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((request, respond))) = connection.accept().await {
        tokio::task::spawn_local(grpc_call(request, respond));
    }
}

async fn grpc_call(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Option<()> {
    let mut response = Response::new(());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    if let Ok(value) = HeaderValue::from_str(&hostname()) {
        response.headers_mut().insert("x-echo-host", value);
    }
    if request.uri().path().ends_with("/Fail") {
        response.headers_mut().insert("grpc-status", HeaderValue::from_static("7"));
        response.headers_mut().insert("grpc-message", HeaderValue::from_static("told to fail"));
        respond.send_response(response, true).ok()?;
        return Some(());
    }
    let mut body = request.into_body();
    let mut out = respond.send_response(response, false).ok()?;
    while let Some(chunk) = body.data().await {
        let mut chunk = chunk.ok()?;
        body.flow_control().release_capacity(chunk.len()).ok()?;
        while !chunk.is_empty() {
            out.reserve_capacity(chunk.len());
            let room = std::future::poll_fn(|cx| out.poll_capacity(cx)).await?.ok()?;
            if room > 0 {
                out.send_data(chunk.split_to(room.min(chunk.len())), false).ok()?;
            }
        }
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    out.send_trailers(trailers).ok()
}
