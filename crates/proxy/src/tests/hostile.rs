//! Hostile HTTP/1 clients: nothing ambiguous passes, nothing is held for ever, nothing grows.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::bed;

/// Would be a request of its own, if its bytes were ever taken for one.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test]
async fn a_head_in_doubt_is_refused_and_what_follows_is_no_request() {
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: {}\r\n\r\n", "y".repeat(70_000));
    let fields = (0..101).fold(String::new(), |all, n| format!("{all}c{n}: 1\r\n"));
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    let post = |fields: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
    let get = |fields: &str| format!("GET / HTTP/1.1\r\n{fields}\r\n\r\n");
    let line = |line: &str| format!("{line}\r\nHost: a\r\n\r\n");
    let mut cases: Vec<(String, &str)> = vec![(long, "431"), (many, "431")];
    for fields in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
        "Content-Length: 3\r\nContent-Length: 3",
        "Content-Length: 3\r\nContent-Length: 4",
        "Content-Length: 3, 3",
        "Content-Length: +3",
        "Content-Length: -3",
        "Content-Length: 0x3",
        "Content-Length: 3 4",
        "Content-Length:",
        "Content-Length: 18446744073709551619",
        "Content-Length : 3",
        "Content-Length\t: 3",
        "Content-Length: 3\r\n ",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: chunked\x0b",
        "Transfer-Encoding:",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\r\n : chunked",
    ] {
        cases.push((post(fields), "400"));
    }
    for fields in [
        "X: 1",
        "Host: a\r\nHost: a",
        "Host: a\r\nHost: b",
        "Host: a b",
        "Host: a/b",
        "Host: u@a",
        "Host: a,b",
        "Host: ",
        "Host: a\r\nX: a\r\n b",
        "Host: a\r\nX: a\r\n\tb",
        " Host: a\r\nHost: a",
        "Host: a\r\nX: a\rb",
        "Host: a\r\nX: a\nY: b",
        "Host: a\r\nX: a\0b",
        "Host: a\r\nX\0: b",
        "Host: a\r\n: b",
        "Host: a\r\nX Y: b",
        "Host: a\r\nX(: b",
        "Host: a\r\nno colon",
        "Host: a\r\nX: \x7f",
        "Host: a\r\nX: \x01",
    ] {
        cases.push((get(fields), "400"));
    }
    for start in [
        "GET  / HTTP/1.1",
        "GET /  HTTP/1.1",
        "GET\t/ HTTP/1.1",
        " GET / HTTP/1.1",
        "GET / HTTP/1.1 ",
        "GET / http/1.1",
        "GET / HTTP/1.2",
        "GET / HTTP/2.0",
        "GET / HTTP/01.1",
        "GET /",
        "GET",
        "G\0T / HTTP/1.1",
        "G(T / HTTP/1.1",
        "GET a HTTP/1.1",
        "GET * HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET /\u{e9} HTTP/1.1",
        "GET /\x01 HTTP/1.1",
        "GET ftp://a/ HTTP/1.1",
        "GET http:///x HTTP/1.1",
        "GET http://u:p@a/ HTTP/1.1",
        "CONNECT / HTTP/1.1",
        "CONNECT http://a/ HTTP/1.1",
    ] {
        cases.push((line(start), "400"));
    }
    for (bytes, status) in cases {
        let answer = bed::talk(running.at("in"), (bytes.clone() + SMUGGLED).as_bytes(), |_| false).await;
        let shown = &bytes[..bytes.len().min(120)];
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{shown:?}: {answer:?}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{shown:?}: {answer:?}");
        assert!(answer.contains("connection: close\r\n"), "{shown:?}: {answer:?}");
    }
    assert_eq!(seen.text(), [""; 0], "nothing went upstream");
    running.end().await;
}

#[tokio::test]
async fn a_body_in_doubt_is_cut_upstream_and_what_follows_is_no_request() {
    let (up, seen) = bed::recorder("0\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let extension = format!("5;{}\r\nhello\r\n", "x".repeat(5000));
    let trailers = (0..101).fold("0\r\n".to_owned(), |all, n| format!("{all}c{n}: 1\r\n"));
    let mut tried = 0;
    for chunks in [
        "g\r\nhello\r\n",
        "-5\r\nhello\r\n",
        "+5\r\nhello\r\n",
        "0x5\r\nhello\r\n",
        " 5\r\nhello\r\n",
        "5 \r\nhello\r\n",
        "5\nhello\r\n",
        "5\r\nhello\n",
        "5\r\nhelloXX",
        "5\r\nhello world\r\n",
        "00000000000000005\r\nhello\r\n",
        "ffffffffffffffff\r\nhello\r\n",
        "5;a=\nhello\r\n",
        "5;a\rb\r\nhello\r\n",
        "5;a\0\r\nhello\r\n",
        "\r\n5\r\nhello\r\n",
        &extension,
        "0\r\nno colon\r\n\r\n",
        "0\r\nX : a\r\n\r\n",
        "0\r\nX: a\r\n b\r\n\r\n",
        "0\r\nX: a\nY: b\r\n\r\n",
        "0\r\nX: \0\r\n\r\n",
        "0\r\n\n",
        &(trailers + "\r\n"),
    ] {
        tried += 1;
        let bytes =
            format!("POST /{tried} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}{SMUGGLED}");
        let answer = bed::talk(running.at("in"), bytes.as_bytes(), |_| false).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{chunks:?}: {answer:?}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{chunks:?}: {answer:?}");
    }
    for sent in seen.text() {
        assert!(!sent.contains("smuggled"), "{sent:?}");
        assert!(!sent.contains("\r\n0\r\n"), "a body that broke off must not look whole: {sent:?}");
    }
    running.end().await;
}

#[tokio::test]
async fn trailers_never_become_headers() {
    let (up, seen) = bed::recorder("x-ok: 1\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let bytes =
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\nhi\r\n0\r\n\
        Content-Length: 5\r\nTransfer-Encoding: chunked\r\nHost: evil\r\nX-Forwarded-For: 1.2.3.4\r\n\
        Authorization: x\r\nConnection: x-ok\r\nX-Envoy-Retry-On: 5xx\r\nX-Ok: 1\r\n\r\n";
    let answer = bed::talk(running.at("in"), bytes, |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let sent = seen.text().concat();
    let (_, trailers) = sent.split_once("2\r\nhi\r\n").unwrap();
    assert_eq!(trailers, "0\r\nx-ok: 1\r\n\r\n");
    running.end().await;
}

#[tokio::test]
async fn what_a_client_names_in_connection_takes_nothing_that_the_mesh_relies_on() {
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let bytes = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, x-request-id, authorization, mine, keep-alive\r\n\
        Keep-Alive: 5\r\nProxy-Connection: keep-alive\r\nAuthorization: Bearer t\r\nMine: 1\r\nTE: gzip\r\n\r\n";
    let answer = bed::talk(running.at("in"), bytes, |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let sent = seen.text().concat();
    assert!(sent.contains("authorization: Bearer t\r\n") && sent.contains("x-request-id: "), "{sent}");
    for gone in ["mine:", "keep-alive", "connection:", "te:"] {
        assert!(!sent.contains(gone), "{gone}: {sent}");
    }
    running.end().await;
}

#[tokio::test]
async fn an_upgrade_with_a_body_is_an_ordinary_request() {
    let (up, seen) = bed::recorder("\r\n\r\nhello", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let bytes = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nhello";
    let answer = bed::talk(running.at("in"), bytes, |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let sent = seen.text().concat();
    assert!(!sent.contains("upgrade") && sent.ends_with("\r\n\r\nhello"), "{sent}");
    running.end().await;
}

#[tokio::test]
async fn an_upgrade_that_nobody_configured_opens_no_tunnel() {
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |manager, _| manager.upgrade_configs.clear()).await;
    for head in [
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
    ] {
        let answer = bed::talk(running.at("in"), format!("{head}tunnelled bytes\r\n\r\n").as_bytes(), |_| false).await;
        assert!(answer.starts_with("HTTP/1.1 403 ") || answer.starts_with("HTTP/1.1 404 "), "{head}: {answer}");
    }
    assert!(!seen.text().concat().contains("tunnelled"));
    running.end().await;
}

/// Sends bytes, then nothing; gives what came until the connection was closed.
async fn stall(at: std::net::SocketAddr, bytes: &[u8]) -> String {
    Box::pin(bed::talk(at, bytes, |_| false)).await
}

#[tokio::test]
async fn whoever_dawdles_is_let_go() {
    let (up, seen) = bed::recorder("never", b"").await;
    let running = bed::edited(up, false, |manager, _| {
        // long enough for what is on time on a busy machine
        manager.request_headers_timeout = bed::milliseconds(600);
        manager.stream_idle_timeout = bed::milliseconds(2000);
        manager.common_http_protocol_options = Some(envoy_types::pb::envoy::config::core::v3::HttpProtocolOptions {
            idle_timeout: bed::milliseconds(1500),
            ..Default::default()
        });
    })
    .await;
    let at = running.at("in");
    // silence, a head, a head of HTTP/2, a preface without anything after it
    assert_eq!(stall(at, b"").await, "");
    assert!(stall(at, b"GET / HTTP/1.1\r\nHost: a\r\nX: ").await.starts_with("HTTP/1.1 408 "));
    assert!(stall(at, b"G").await.starts_with("HTTP/1.1 408 "));
    stall(at, b"PRI * HT").await;
    stall(at, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    stall(at, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    // a body, and an upstream that says nothing
    let slow = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf";
    assert!(stall(at, slow).await.starts_with("HTTP/1.1 408 "));
    assert!(stall(at, b"GET /quiet HTTP/1.1\r\nHost: a\r\n\r\n").await.starts_with("HTTP/1.1 504 "));
    seen.until(|all| all.iter().filter(|sent| sent.ends_with("half")).count() == 1).await;
    running.end().await;
}

#[tokio::test]
async fn a_request_must_be_whole_in_time_however_lively_it_is() {
    let (up, seen) = bed::recorder("never", b"").await;
    let running = bed::edited(up, false, |manager, _| manager.request_timeout = bed::milliseconds(300)).await;
    let mut stream = TcpStream::connect(running.at("in")).await.unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
    let (mut read, mut write) = stream.split();
    let mut answer = Vec::new();
    // a crumb after the other, each passed on before the next: never idle, never whole
    let crumbs = async {
        let mut passed = 0;
        while write.write_all(b"1\r\nx\r\n").await.is_ok() {
            passed += 1;
            seen.until(|all| all.concat().matches("\r\nx\r\n").count() >= passed).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = crumbs => {}
        read = tokio::time::timeout(bed::PATIENCE, read.read_to_end(&mut answer)) => drop(read.expect("an end")),
    }
    assert!(answer.starts_with(b"HTTP/1.1 408 "), "{:?}", String::from_utf8_lossy(&answer));
    running.end().await;
}

#[tokio::test]
async fn requests_are_not_read_on_while_answers_are_not() {
    let (up, _) = bed::recorder("\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let mut stream = TcpStream::connect(running.at("in")).await.unwrap();
    let sent = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&sent);
    let writing = tokio::spawn(async move {
        let piece = "GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(1000);
        while let Ok(n) = stream.write(piece.as_bytes()).await {
            let all = count.fetch_add(n, Ordering::Relaxed) + n;
            assert!(all < 256 * 1024 * 1024, "read without end");
        }
    });
    // writing comes to a halt, for what the kernel and we hold is bounded, and the others are served
    assert!(bed::stands_still(running.at("in"), || sent.load(Ordering::Relaxed)).await > 0);
    assert!(!writing.is_finished(), "nothing is lost");
    writing.abort();
    running.end().await;
}

#[tokio::test]
async fn names_with_underscores_are_treated_as_configured() {
    use envoy_types::pb::envoy::config::core::v3::HttpProtocolOptions;
    for (action, status, passes) in [(0, "200", true), (1, "400", false), (2, "200", false)] {
        let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
        let running = bed::edited(up, false, |manager, _| {
            manager.common_http_protocol_options =
                Some(HttpProtocolOptions { headers_with_underscores_action: action, ..Default::default() });
        })
        .await;
        let bytes = b"GET / HTTP/1.1\r\nHost: a\r\nx_y: 1\r\nConnection: close\r\n\r\n";
        let answer = bed::talk(running.at("in"), bytes, |_| false).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{action}: {answer}");
        assert_eq!(seen.text().concat().contains("x_y"), passes, "{action}");
        running.end().await;
    }
}

#[tokio::test]
async fn idle_connections_do_not_hold_a_stop() {
    let (up, _) = bed::recorder("\r\n\r\n", OK).await;
    let running = bed::start_with(up, Duration::from_mins(10)).await;
    let mut kept = TcpStream::connect(running.at("in")).await.unwrap();
    kept.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut answer = vec![0; 16 * 1024];
    assert!(kept.read(&mut answer).await.unwrap() > 0);
    let mut fresh = TcpStream::connect(running.at("in")).await.unwrap();
    fresh.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    assert!(fresh.read(&mut answer).await.unwrap() > 0);
    running.proxy.stop();
    // one that still has something to ask is answered, and told to leave, if it asks in time
    loop {
        let asked = fresh.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let Ok(n @ 1..) = fresh.read(&mut answer).await else { break };
        let text = String::from_utf8_lossy(&answer[..n]);
        assert!(asked.is_ok() && text.starts_with("HTTP/1.1 200 "), "{text}");
        if text.contains("connection: close\r\n") {
            break;
        }
    }
    assert!(bed::is_closed(&mut fresh).await && bed::is_closed(&mut kept).await);
    tokio::time::timeout(bed::PATIENCE, running.proxy.ended()).await.expect("long before its ten minutes");
}
