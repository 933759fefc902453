//! The small ones: sleep, helloworld, tcp-echo.

use std::rc::Rc;

use http::StatusCode;
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
                    tokio::time::sleep(crate::ACCEPT_AGAIN).await;
                }
            }
        });
    }
    local.run_until(until_told_to_stop()).await;
    Ok(())
}

/// Bytes of a request that the log shows.
const SHOWN_MAX: usize = 64;

pub(crate) async fn echo(mut stream: TcpStream, prefix: Rc<str>) {
    let mut buf = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buf).await {
        crate::say(&format!("request: {}", buf[..read.min(SHOWN_MAX)].escape_ascii()));
        let mut out = Vec::with_capacity(prefix.len() + 1 + read);
        out.extend_from_slice(prefix.as_bytes());
        out.push(b' ');
        out.extend_from_slice(&buf[..read]);
        if stream.write_all(&out).await.is_err() {
            return;
        }
    }
}
