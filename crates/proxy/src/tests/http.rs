//! HTTP over the wire.

use std::future::poll_fn;
use std::net::SocketAddr;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::bed;

async fn gateway(up: SocketAddr, http2: bool) -> bed::Running {
    let manager = bed::manager(vec![bed::to_cluster("/", "up")]);
    bed::start(vec![bed::listener("in", bed::http_filter(&manager))], vec![bed::cluster("up", up, http2)]).await
}

#[tokio::test]
async fn a_request_passes_and_the_connection_is_kept() {
    let running = gateway(bed::echo_heads().await, false).await;
    let two = b"GET /one HTTP/1.1\r\nHost: a.example\r\nX-Mine: 7\r\n\r\nGET /two HTTP/1.1\r\nHost: a.example\r\n\r\n";
    let answer = bed::talk(running.at("in"), two, |text| text.contains("GET /two") && text.ends_with("\r\n\r\n")).await;
    assert_eq!(answer.matches("HTTP/1.1 200 OK\r\n").count(), 2, "{answer}");
    assert!(answer.contains("GET /one HTTP/1.1\r\nhost: a.example\r\nx-mine: 7\r\n"), "{answer}");
    assert!(answer.contains("x-up: 1") && answer.contains("x-request-id: "), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn hostile_heads_get_an_error_and_a_close() {
    let running = gateway(bed::echo_heads().await, false).await;
    for (bytes, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "400"),
        ("GET / HTTP/1.1\nHost: a\n\n", "400"),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "400"),
        ("GET / HTTP/1.0\r\n\r\n", "426"),
        ("\x16\x03\x01\x02\r\n\r\n", "400"),
    ] {
        let answer = bed::talk(running.at("in"), bytes.as_bytes(), |_| false).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes:?}: {answer:?}");
        assert!(answer.contains("connection: close\r\n"), "{bytes:?}: {answer:?}");
    }
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "y".repeat(70_000));
    assert!(bed::talk(running.at("in"), long.as_bytes(), |_| false).await.starts_with("HTTP/1.1 431 "));
    running.end().await;
}

#[tokio::test]
async fn a_body_that_breaks_its_grammar_never_becomes_a_request() {
    let running = gateway(bed::echo_heads().await, false).await;
    let bytes = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    let answer = bed::talk(running.at("in"), bytes, |_| false).await;
    assert!(!answer.contains("smuggled"), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn nobody_listening_upstream_is_a_503_with_envoys_words() {
    let running = gateway(bed::NOBODY, false).await;
    let answer =
        bed::talk(running.at("in"), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("reset reason: remote connection failure"), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn a_truncated_response_is_seen_as_truncated() {
    let up = bed::server(|mut stream| async move {
        let mut buffer = [0; 1024];
        drop(stream.read(&mut buffer).await);
        drop(stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n").await);
    })
    .await;
    let running = gateway(up, false).await;
    let answer = bed::talk(running.at("in"), b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", |_| false).await;
    assert!(answer.contains("hello") && !answer.contains("\r\n0\r\n"), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn a_malformed_response_is_a_502() {
    for bytes in [
        "HTTP/1.1 200 OK\nX: 1\n\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        "hello\r\n\r\n",
    ] {
        let up = bed::server(move |mut stream| async move {
            let mut buffer = [0; 1024];
            drop(stream.read(&mut buffer).await);
            drop(stream.write_all(bytes.as_bytes()).await);
        })
        .await;
        let running = gateway(up, false).await;
        let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let answer = bed::talk(running.at("in"), request, |_| false).await;
        assert!(answer.starts_with("HTTP/1.1 502 "), "{bytes:?}: {answer}");
        running.end().await;
    }
}

#[tokio::test]
async fn an_upgrade_becomes_a_tunnel_after_the_upstream_agrees() {
    let up = bed::server(|mut stream| async move {
        let mut seen = Vec::new();
        let mut buffer = [0; 1024];
        while !seen.ends_with(b"\r\n\r\n") {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(n) => seen.extend_from_slice(&buffer[..n]),
            }
        }
        assert!(String::from_utf8_lossy(&seen).contains("upgrade: websocket\r\n"));
        drop(
            stream
                .write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
                .await,
        );
        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
            if stream.write_all(&buffer[..n].to_ascii_uppercase()).await.is_err() {
                return;
            }
        }
    })
    .await;
    let running = gateway(up, false).await;
    let mut stream = TcpStream::connect(running.at("in")).await.unwrap();
    stream
        .write_all(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        .await
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: websocket\r\n"), "{head}");
    stream.write_all(b"ping").await.unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"PING");
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    running.end().await;
}

/// A gRPC-like server over plain HTTP/2: echoes the body, then sends trailers.
async fn echo_h2() -> SocketAddr {
    bed::server(|stream| async move {
        let Ok(mut connection) = h2::server::handshake(stream).await else { return };
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            tokio::spawn(async move {
                let path = request.uri().path_and_query().map_or("", http::uri::PathAndQuery::as_str).to_owned();
                let mut body = request.into_body();
                let response =
                    http::Response::builder().header("content-type", "application/grpc").header("x-path", path);
                let Ok(mut send) = respond.send_response(response.body(()).unwrap(), false) else { return };
                while let Some(Ok(data)) = body.data().await {
                    drop(body.flow_control().release_capacity(data.len()));
                    if send.send_data(data, false).is_err() {
                        return;
                    }
                }
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().unwrap());
                drop(send.send_trailers(trailers));
            });
        }
    })
    .await
}

async fn h2_client(at: SocketAddr) -> h2::client::SendRequest<Bytes> {
    let (sender, connection) = h2::client::handshake(TcpStream::connect(at).await.unwrap()).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    sender.ready().await.unwrap()
}

#[tokio::test]
async fn grpc_streams_both_ways_with_trailers() {
    let running = gateway(echo_h2().await, true).await;
    let mut client = h2_client(running.at("in")).await;
    let request = http::Request::post(format!("http://a.example/{}", "pkg.S/M"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut send) = client.send_request(request, false).unwrap();
    let response = response.await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers()["x-path"].to_str().unwrap()), (200, "/pkg.S/M"));
    let mut body = response.into_body();
    // one message after the other: nothing waits for the end
    for round in 0..20_u8 {
        let piece = Bytes::from(vec![round; 30_000]);
        send.reserve_capacity(piece.len());
        let mut left = piece.clone();
        while !left.is_empty() {
            let n = poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap().min(left.len());
            send.send_data(left.split_to(n), false).unwrap();
        }
        let mut back = Vec::new();
        while back.len() < piece.len() {
            let data = body.data().await.unwrap().unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            back.extend_from_slice(&data);
        }
        assert!(back == piece);
    }
    send.send_data(Bytes::new(), true).unwrap();
    assert!(body.data().await.is_none());
    let trailers = body.trailers().await.unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    running.end().await;
}

#[tokio::test]
async fn http2_and_http1_translate() {
    let running = gateway(bed::echo_heads().await, false).await;
    let mut client = h2_client(running.at("in")).await;
    let request =
        http::Request::get("http://a.example/x?y").header("cookie", "a=1").header("cookie", "b=2").body(()).unwrap();
    let (response, _) = client.send_request(request, true).unwrap();
    let mut body = response.await.unwrap().into_body();
    let mut text = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        text.extend_from_slice(&data);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.starts_with("GET /x?y HTTP/1.1\r\nhost: a.example\r\n") && text.contains("cookie: a=1; b=2\r\n"),
        "{text}"
    );
    running.end().await;

    let running = gateway(echo_h2().await, true).await;
    let request = b"POST /s/m HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc\r\nContent-Length: 5\r\n\r\nhello";
    let answer = bed::talk(running.at("in"), request, |text| text.contains("grpc-status: 0\r\n\r\n")).await;
    assert!(answer.contains("hello\r\n") && answer.contains("transfer-encoding: chunked"), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn what_http2_cannot_carry_is_escaped_in_queries_and_refused_in_hosts() {
    let running = gateway(echo_h2().await, true).await;
    let ask = async |target: &str, host: &str| {
        let request = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        bed::talk(running.at("in"), request.as_bytes(), |_| false).await
    };
    let answer = ask("/x?filter={\"a\":<1>}", "a").await;
    assert!(answer.contains("x-path: /x?filter={%22a%22:%3C1%3E}\r\n"), "{answer}");
    let answer = ask("/", "a%41").await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_upstream() {
    let (told, mut cancelled) = tokio::sync::mpsc::unbounded_channel();
    let up = bed::server(move |stream| {
        let told = told.clone();
        async move {
            let Ok(mut connection) = h2::server::handshake(stream).await else { return };
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let told = told.clone();
                tokio::spawn(async move {
                    told.send("begun").unwrap();
                    if poll_fn(|cx| respond.poll_reset(cx)).await.is_ok() {
                        told.send("cancelled").unwrap();
                    }
                });
            }
        }
    })
    .await;
    let running = gateway(up, true).await;
    let mut stream = TcpStream::connect(running.at("in")).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    assert_eq!(cancelled.recv().await, Some("begun"));
    drop(stream);
    assert_eq!(cancelled.recv().await, Some("cancelled"));
    running.end().await;
}

#[tokio::test]
async fn a_slow_reader_holds_the_upstream_back() {
    let (told, mut written) = tokio::sync::watch::channel(0_usize);
    let up = bed::server(move |mut stream| {
        let told = told.clone();
        async move {
            let mut buffer = [0; 1024];
            let n = stream.read(&mut buffer).await.unwrap_or(0);
            if buffer[..n].starts_with(b"GET /marker ") {
                drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await);
                return;
            }
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 268435456\r\n\r\n").await);
            let piece = vec![7; 65_536];
            for n in 1..=4096 {
                if stream.write_all(&piece).await.is_err() {
                    return;
                }
                told.send_replace(n * piece.len());
            }
        }
    })
    .await;
    let running = gateway(up, false).await;
    let mut stream = TcpStream::connect(running.at("in")).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    // what is written settles at what the kernel's buffers and ours hold, far below the whole
    drop(written.wait_for(|written| *written > 0).await);
    let held = bed::stands_still(running.at("in"), || *written.borrow()).await;
    assert!(held < 64 * 1024 * 1024, "{held}");
    drop(stream);
    running.end().await;
}

#[tokio::test]
async fn a_graceful_stop_finishes_what_is_under_way() {
    let (release, gate) = tokio::sync::watch::channel(false);
    let up = bed::server(move |mut stream| {
        let mut gate = gate.clone();
        async move {
            let mut buffer = [0; 1024];
            drop(stream.read(&mut buffer).await);
            drop(gate.wait_for(|open| *open).await);
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await);
            drop(stream.read(&mut buffer).await);
        }
    })
    .await;
    let running = gateway(up, false).await;
    let at = running.at("in");
    let asking = tokio::spawn(bed::talk(at, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", |_| false));
    // the request is counted before the stop
    loop {
        let stats = bed::talk(running.admin(), b"GET /stats HTTP/1.0\r\n\r\n", |_| false).await;
        if stats.contains(".downstream_rq_active: 1\n") {
            break;
        }
    }
    running.proxy.stop();
    release.send_replace(true);
    let answer = asking.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("ok"), "{answer}");
    running.proxy.ended().await;
}
