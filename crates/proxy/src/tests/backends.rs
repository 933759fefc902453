//! Hostile upstreams: their answers are held to the rules of requests, each reaches the one request
//! it is for, and nothing they say early, late or too long reaches another.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::bed;

/// Reads up to the end of a head.
async fn head(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        seen.push(stream.read_u8().await.ok()?);
    }
    Some(seen)
}

/// A server whose `n`-th connection (from 0) answers each head with `answers[n]`, and counts.
async fn scripted(answers: &'static [&'static str]) -> (SocketAddr, Arc<AtomicUsize>) {
    let connections = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&connections);
    let at = bed::server(move |mut stream| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        async move {
            let answer = answers.get(n).or(answers.last()).expect("an answer");
            while head(&mut stream).await.is_some() {
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    (at, connections)
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const LAST: &str = "GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
const FINE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine";

#[tokio::test]
async fn malformed_heads_are_a_502_and_end_their_connection() {
    let big = format!("HTTP/1.1 200 OK\r\nX: {}\r\nContent-Length: 0\r\n\r\n", "y".repeat(100_000));
    let many =
        (0..101).fold("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n".to_owned(), |all, n| format!("{all}h{n}: 1\r\n"));
    let cases: [&str; 31] = [
        "HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 -20 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n",
        "http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "ICY 200 OK\r\nContent-Length: 0\r\n\r\n",
        " HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        "HTTP/1.1 200 O\rK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 0, 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: +0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\0\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX Y: a\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 103 Early\r\nContent-Length: 5\r\n\r\nhello",
        Box::leak(big.into_boxed_str()),
        Box::leak((many + "\r\n").into_boxed_str()),
    ];
    for bytes in cases {
        let (up, connections) = scripted(Box::leak(Box::new([bytes, FINE]))).await;
        let running = bed::edited(up, false, |_, _| {}).await;
        let answer = bed::talk(running.at("in"), format!("{GET}{LAST}").as_bytes(), |_| false).await;
        let shown = &bytes[..bytes.len().min(100)];
        assert!(answer.starts_with("HTTP/1.1 502 "), "{shown:?}: {answer}");
        assert!(answer.ends_with("fine"), "{shown:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 2, "{shown:?}: {answer}");
        assert_eq!(connections.load(Ordering::SeqCst), 2, "{shown:?}");
        running.end().await;
    }
}

#[tokio::test]
async fn bytes_after_an_answer_reach_nobody() {
    for bytes in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokEVIL",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL",
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\nEVIL",
        "HTTP/1.1 204 No Content\r\n\r\nEVIL",
    ] {
        let (up, connections) = scripted(Box::leak(Box::new([bytes, FINE]))).await;
        let running = bed::edited(up, false, |_, _| {}).await;
        let answer = bed::talk(running.at("in"), format!("{GET}{LAST}").as_bytes(), |_| false).await;
        assert!(!answer.contains("EVIL") && answer.ends_with("fine"), "{bytes:?}: {answer}");
        assert_eq!(connections.load(Ordering::SeqCst), 2, "{bytes:?}");
        running.end().await;
    }
    // the answer to HEAD has no body, whatever is sent
    let (up, _) = scripted(&["HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL", FINE]).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let head = "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n";
    let answer = bed::talk(running.at("in"), format!("{head}{LAST}").as_bytes(), |_| false).await;
    assert!(
        answer.contains("content-length: 4\r\n") && !answer.contains("EVIL") && answer.ends_with("fine"),
        "{answer}"
    );
    running.end().await;
}

#[tokio::test]
async fn an_idle_connection_that_speaks_unasked_is_not_used_again() {
    let speaks = Arc::new(tokio::sync::Notify::new());
    let spoken = Arc::new(tokio::sync::Notify::new());
    let connections = Arc::<AtomicUsize>::default();
    let (count, speak, said) = (Arc::clone(&connections), Arc::clone(&speaks), Arc::clone(&spoken));
    let up = bed::server(move |mut stream| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        let (speak, said) = (Arc::clone(&speak), Arc::clone(&said));
        async move {
            if n == 0 {
                head(&mut stream).await.expect("a request");
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst").await.unwrap();
                speak.notified().await;
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL").await.unwrap();
                said.notify_one();
            }
            while head(&mut stream).await.is_some() {
                if stream.write_all(FINE.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let first = bed::talk(running.at("in"), GET.as_bytes(), |text| text.ends_with("first")).await;
    assert!(first.ends_with("first"), "{first}");
    speaks.notify_one();
    spoken.notified().await;
    // it is in the kernel's buffer by now: the proxy looks before it sends
    let second = bed::talk(running.at("in"), LAST.as_bytes(), |_| false).await;
    assert!(second.ends_with("fine"), "{second}");
    assert_eq!(connections.load(Ordering::SeqCst), 2);
    running.end().await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_or_breaks_its_grammar_does_not_look_whole() {
    for (bytes, cut) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "content-length: 10\r\n"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "transfer-encoding: chunked\r\n"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nxyz\r\n", "transfer-encoding: chunked\r\n"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\nbad trailer\r\n\r\n", "chunked\r\n"),
    ] {
        let up = bed::server(move |mut stream| async move {
            if head(&mut stream).await.is_some() {
                drop(stream.write_all(bytes.as_bytes()).await);
            }
        })
        .await;
        let running = bed::edited(up, false, |manager, _| {
            manager.http_protocol_options = Some(envoy_types::pb::envoy::config::core::v3::Http1ProtocolOptions {
                accept_http_10: true,
                ..Default::default()
            });
        })
        .await;
        let answer = bed::talk(running.at("in"), format!("{GET}{LAST}").as_bytes(), |_| false).await;
        assert!(answer.contains(cut) && answer.contains("half"), "{bytes:?}: {answer}");
        assert!(!answer.contains("\r\n0\r\n"), "{bytes:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "nothing follows: {bytes:?}: {answer}");
        // for a client of HTTP/1.0 only a reset tells
        let mut old = TcpStream::connect(running.at("in")).await.unwrap();
        old.write_all(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n").await.unwrap();
        let mut all = Vec::new();
        let ended = old.read_to_end(&mut all).await;
        let whole = ended.is_ok() && !String::from_utf8_lossy(&all).contains("content-length: 10");
        assert!(!whole, "{bytes:?}: {:?}", String::from_utf8_lossy(&all));
        running.end().await;
    }
}

#[tokio::test]
async fn an_answer_before_the_request_is_whole_ends_both_connections() {
    let (up, connections) = scripted(&["HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig", FINE]).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let mut stream = TcpStream::connect(running.at("in")).await.unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nhalf").await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.ends_with("big"), "{answer}");
    let next = bed::talk(running.at("in"), LAST.as_bytes(), |_| false).await;
    assert!(next.ends_with("fine"), "{next}");
    assert_eq!(connections.load(Ordering::SeqCst), 2);
    running.end().await;
}

#[tokio::test]
async fn interim_answers_have_an_end() {
    let up = bed::server(|mut stream| async move {
        if head(&mut stream).await.is_some() {
            while stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.is_ok() {}
        }
    })
    .await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let answer = bed::talk(running.at("in"), LAST.as_bytes(), |_| false).await;
    assert!(answer.contains("HTTP/1.1 502 "), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn whether_a_body_is_wanted_is_asked_of_the_backend() {
    let asks = "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    // One that wants it says so; nobody else does.
    let up = bed::server(|mut stream| async move {
        let Some(head) = head(&mut stream).await else { return };
        assert!(String::from_utf8_lossy(&head).contains("expect: 100-continue\r\n"), "{head:?}");
        drop(stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await);
        let mut body = [0; 4];
        if stream.read_exact(&mut body).await.is_ok() {
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{}", String::from_utf8_lossy(&body));
            drop(stream.write_all(answer.as_bytes()).await);
        }
    })
    .await;
    let running = bed::edited(up, false, |manager, _| manager.proxy_100_continue = true).await;
    let mut client = TcpStream::connect(running.at("in")).await.unwrap();
    client.write_all(asks.as_bytes()).await.unwrap();
    assert_eq!(head(&mut client).await.unwrap(), b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"body").await.unwrap();
    let answer = String::from_utf8(head(&mut client).await.unwrap()).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let mut body = [0; 4];
    client.read_exact(&mut body).await.unwrap();
    assert_eq!(&body, b"body");
    running.end().await;

    // One that does not answers, and the client keeps its body.
    let (up, _) = scripted(&["HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n"]).await;
    let running = bed::edited(up, false, |manager, _| manager.proxy_100_continue = true).await;
    let answer = bed::talk(running.at("in"), asks.as_bytes(), |text| text.ends_with("\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn an_upgrade_that_the_backend_refuses_opens_no_tunnel() {
    let (up, _) = scripted(&["HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"]).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let bytes =
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\0\0tunnelled\0\r\n\r\n";
    let answer = bed::talk(running.at("in"), bytes, |_| false).await;
    // what the client sent too early is the next request, and a bad one
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("HTTP/1.1 400 "), "{answer}");
    running.end().await;
}

/// An HTTP/2 server that answers every request with `frames` for its stream.
async fn raw_h2(frames: fn(u32) -> Vec<u8>) -> SocketAddr {
    bed::server(move |mut stream| async move {
        let mut preface = [0; 24];
        if stream.read_exact(&mut preface).await.is_err() {
            return;
        }
        drop(stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await);
        loop {
            let mut header = [0; 9];
            if stream.read_exact(&mut header).await.is_err() {
                return;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
            if stream.read_exact(&mut payload).await.is_err() {
                return;
            }
            if header[3] == 1 {
                let id = u32::from_be_bytes([header[5], header[6], header[7], header[8]]);
                drop(stream.write_all(&frames(id)).await);
            }
        }
    })
    .await
}

#[tokio::test]
async fn an_upgrade_that_an_upstream_cannot_carry_ejects_nobody() {
    use super::hostile_h2::{frame, literal};
    use envoy_types::pb::envoy::config::cluster::v3 as cluster;
    use envoy_types::pb::google::protobuf::UInt32Value;
    let number = |value| Some(UInt32Value { value });
    let up = raw_h2(|id| frame(1, 5, id, &literal(":status", "200"))).await;
    let running = bed::edited(up, true, |_, made| {
        made.outlier_detection = Some(cluster::OutlierDetection {
            consecutive_5xx: number(1),
            enforcing_success_rate: number(0),
            max_ejection_percent: number(100),
            ..Default::default()
        });
        made.common_lb_config = Some(cluster::cluster::CommonLbConfig {
            healthy_panic_threshold: Some(envoy_types::pb::envoy::r#type::v3::Percent { value: 0.0 }),
            ..Default::default()
        });
    })
    .await;
    let upgrade = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    let refused = bed::talk(running.at("in"), upgrade, |text| text.ends_with("local reset")).await;
    assert!(refused.starts_with("HTTP/1.1 503 ") && refused.ends_with("local reset"), "{refused}");
    let answer = bed::talk(running.at("in"), LAST.as_bytes(), |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "the host serves on: {answer}");
    running.end().await;
}

#[tokio::test]
async fn what_http1_cannot_say_does_not_come_from_an_http2_upstream() {
    use super::hostile_h2::{frame, literal};
    let cases: [(&str, fn(u32) -> Vec<u8>); 7] = [
        ("a line break in a value", |id| {
            frame(1, 5, id, &[literal(":status", "200"), literal("x", "a\r\nevil: 1")].concat())
        }),
        ("a space in a name", |id| frame(1, 5, id, &[literal(":status", "200"), literal("x y", "a")].concat())),
        ("a capital in a name", |id| frame(1, 5, id, &[literal(":status", "200"), literal("X", "a")].concat())),
        ("101", |id| frame(1, 5, id, &literal(":status", "101"))),
        ("no status", |id| frame(1, 5, id, &literal("x", "a"))),
        ("two lengths", |id| {
            let fields = [literal(":status", "200"), literal("content-length", "0"), literal("content-length", "0")];
            frame(1, 5, id, &fields.concat())
        }),
        ("connection fields", |id| {
            frame(1, 5, id, &[literal(":status", "200"), literal("transfer-encoding", "chunked")].concat())
        }),
    ];
    for (what, frames) in cases {
        let running = bed::edited(raw_h2(frames).await, true, |_, _| {}).await;
        let answer = bed::talk(running.at("in"), LAST.as_bytes(), |_| false).await;
        assert!(answer.starts_with("HTTP/1.1 50"), "{what}: {answer}");
        assert!(!answer.contains("evil"), "{what}: {answer}");
        running.end().await;
    }
}
