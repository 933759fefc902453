//! Hostile HTTP/2 clients: floods end their connection and nobody else's; nothing that HTTP/1
//! cannot say is translated.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::bed;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// One frame.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A field, literal, not indexed, not Huffman-coded.
pub(super) fn literal(name: &str, value: &str) -> Vec<u8> {
    fn text(text: &str) -> Vec<u8> {
        assert!(text.len() < 127);
        [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
    }
    [vec![0], text(name), text(value)].concat()
}

fn get(path: &str) -> Vec<u8> {
    [literal(":method", "GET"), literal(":scheme", "http"), literal(":authority", "a"), literal(":path", path)].concat()
}

async fn connect(at: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    stream
}

/// Writes pieces until the peer has closed; `false` if it took them all and stays.
async fn flood(at: SocketAddr, pieces: usize, mut piece: impl FnMut(u32) -> Vec<u8>) -> bool {
    let stream = connect(at).await;
    let (mut read, mut write) = stream.into_split();
    let closed = async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(1..) = read.read(&mut buffer).await {}
    };
    let writing = async {
        for n in 0..pieces {
            if write.write_all(&piece(u32::try_from(n).unwrap())).await.is_err() {
                // it is closed, which reading tells
                break;
            }
        }
        // held, so that it is the peer who closes
        std::future::pending::<()>().await;
    };
    let ending = async {
        tokio::select! {
            () = closed => {}
            () = writing => {}
        }
    };
    tokio::time::timeout(bed::PATIENCE, ending).await.is_ok()
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

async fn is_well(running: &bed::Running) {
    let bytes = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = Box::pin(bed::talk(running.at("in"), bytes, |_| false)).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn floods_end_their_connection_and_nobody_elses() {
    let (up, _) = bed::recorder("\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let at = running.at("in");
    // held open meanwhile: others feel nothing
    let mut other = TcpStream::connect(at).await.unwrap();
    other.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let open = |n: u32| if n == 0 { frame(1, 4, 1, &post()) } else { Vec::new() };
    assert!(flood(at, 100_000, |_| frame(6, 0, 0, &[7; 8])).await, "PING");
    assert!(flood(at, 100_000, |_| frame(6, 1, 0, &[7; 8])).await, "PING answers");
    assert!(flood(at, 100_000, |_| frame(4, 0, 0, &[])).await, "SETTINGS");
    assert!(flood(at, 100_000, |_| frame(4, 0, 0, &[0, 1, 0, 0, 16, 0])).await, "SETTINGS of the table");
    assert!(flood(at, 100_000, |n| frame(2, 0, n * 2 + 1, &[0, 0, 0, 0, 9])).await, "PRIORITY");
    assert!(flood(at, 100_000, |n| [open(n), frame(8, 0, 1, &[0, 0, 0, 1])].concat()).await, "WINDOW_UPDATE");
    assert!(flood(at, 100_000, |n| [open(n), frame(0, 0, 1, &[])].concat()).await, "empty DATA");
    assert!(flood(at, 100_000, |n| [open(n), frame(0, 8, 1, &[4, 0, 0, 0, 0])].concat()).await, "padding");
    assert!(flood(at, 100_000, |_| frame(99, 0, 0, &[])).await, "unknown frames");
    let reset = |n: u32| [frame(1, 5, n * 2 + 1, &get("/")), frame(3, 0, n * 2 + 1, &[0, 0, 0, 8])].concat();
    assert!(flood(at, 100_000, reset).await, "rapid reset");
    let head = |n: u32| if n == 0 { frame(1, 0, 1, &get("/")) } else { frame(9, 0, 1, &literal("x", "y")) };
    assert!(flood(at, 100_000, head).await, "CONTINUATION");
    let head = |n: u32| if n == 0 { frame(1, 0, 1, &get("/")) } else { frame(9, 0, 1, &[]) };
    assert!(flood(at, 100_000, head).await, "empty CONTINUATION");
    is_well(&running).await;
    let mut answer = vec![0; 1024];
    let n = other.read(&mut answer).await.unwrap();
    assert!(answer[..n].starts_with(b"HTTP/1.1 200 "));
    assert!(counted_a_flood(&running).await);
    running.end().await;
}

/// The head of a request with a body.
fn post() -> Vec<u8> {
    [literal(":method", "POST"), literal(":scheme", "http"), literal(":authority", "a"), literal(":path", "/")].concat()
}

/// Whether the proxy counts a flood. It does so once the connection is closed, which the client may see first.
async fn counted_a_flood(running: &bed::Running) -> bool {
    let counted = async {
        loop {
            let stats = Box::pin(bed::talk(running.admin(), b"GET /stats HTTP/1.0\r\n\r\n", |_| false)).await;
            if stats.lines().any(|line| line.contains("flood") && !line.ends_with(": 0")) {
                return;
            }
        }
    };
    tokio::time::timeout(bed::PATIENCE, counted).await.is_ok()
}

/// Windows count the bytes of a body, not what it costs to hold them one by one.
#[tokio::test]
async fn bodies_of_crumbs_for_a_stalled_upstream_end_their_connection() {
    // three streams, each within its window
    const EACH: u32 = 60_000;
    // it takes what fits the first window of its connection, and nothing more ever
    let up = bed::server(|mut stream| async move {
        drop(stream.write_all(&frame(4, 0, 0, &[])).await);
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(1..) = stream.read(&mut buffer).await {}
    })
    .await;
    let running = bed::edited(up, true, |_, _| {}).await;
    let crumb = |n: u32| {
        let stream = n / EACH * 2 + 1;
        let open = if n.is_multiple_of(EACH) { frame(1, 4, stream, &post()) } else { Vec::new() };
        [open, frame(0, 0, stream, b"x")].concat()
    };
    assert!(flood(running.at("in"), 3 * EACH as usize, crumb).await);
    assert!(counted_a_flood(&running).await);
    running.end().await;
}

#[tokio::test]
async fn streams_beyond_the_limit_end_their_connection() {
    let (up, seen) = bed::recorder("never", b"").await;
    let running = bed::edited(up, false, |manager, _| {
        manager.http2_protocol_options = Some(envoy_types::pb::envoy::config::core::v3::Http2ProtocolOptions {
            max_concurrent_streams: Some(envoy_types::pb::google::protobuf::UInt32Value { value: 10 }),
            ..Default::default()
        });
    })
    .await;
    assert!(flood(running.at("in"), 100_000, |n| frame(1, 4, n * 2 + 1, &post())).await);
    assert!(seen.text().len() <= 10, "{} requests went upstream", seen.text().len());
    assert!(counted_a_flood(&running).await);
    running.end().await;
}

/// What comes back for one request's frames: status lines of HEADERS are not decoded; the kinds of
/// frames on stream 1 are told.
async fn answer(at: SocketAddr, frames: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut stream = connect(at).await;
    stream.write_all(frames).await.unwrap();
    let mut seen = Vec::new();
    let reading = async {
        loop {
            let mut header = [0; 9];
            if stream.read_exact(&mut header).await.is_err() {
                return;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
            if stream.read_exact(&mut payload).await.is_err() {
                return;
            }
            let ends = header[3] == 3 || header[3] == 7 || (header[3] < 2 && header[4] & 1 != 0);
            if header[8] == 1 || header[3] == 7 {
                seen.push((header[3], payload));
            }
            if ends {
                return;
            }
        }
    };
    tokio::time::timeout(bed::PATIENCE, reading).await.expect("an end");
    seen
}

#[tokio::test]
async fn a_bomb_of_headers_is_refused() {
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    // one indexed field of 4 KiB, named a thousand times in as many bytes
    let mut value = vec![0x40, 1, b'x', 0x7f, 0xa1, 0x1e];
    value.extend(vec![b'y'; 4000]);
    let bomb = [get("/"), value, vec![0xbe; 1000]].concat();
    let got = answer(running.at("in"), &frame(1, 5, 1, &bomb)).await;
    assert!(!got.is_empty());
    // and a thousand cookies, which count one by one
    let cookies = [get("/"), literal("cookie", "a=1").repeat(1000)].concat();
    let got = answer(running.at("in"), &frame(1, 5, 1, &cookies)).await;
    assert!(!got.is_empty());
    assert_eq!(seen.text(), [""; 0], "nothing went upstream");
    is_well(&running).await;
    running.end().await;
}

#[tokio::test]
async fn what_http1_cannot_say_is_not_translated() {
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let with = |name: &str, value: &str| [get("/"), literal(name, value)].concat();
    let line = |method: &str, scheme: &str, authority: &str, path: &str| {
        [
            literal(":method", method),
            literal(":scheme", scheme),
            literal(":authority", authority),
            literal(":path", path),
        ]
        .concat()
    };
    for fields in [
        with("x", "a\r\nevil: 1"),
        with("x", "a\nevil: 1"),
        with("x", "a\0b"),
        with("x\r\nevil", "1"),
        with("x: y", "1"),
        with("x y", "1"),
        with("", "1"),
        with("X", "1"),
        with("connection", "close"),
        with("transfer-encoding", "chunked"),
        with("upgrade", "websocket"),
        with("keep-alive", "5"),
        with("proxy-connection", "x"),
        with("te", "gzip"),
        with("content-length", "+0"),
        with("content-length", "0, 0"),
        [with("content-length", "0"), literal("content-length", "0")].concat(),
        with("content-length", "5"),
        with(":path", "/two"),
        with(":evil", "1"),
        with(":status", "200"),
        [literal("x", "1"), get("/")].concat(),
        with("host", "b"),
        [with("host", "a"), literal("host", "a")].concat(),
        line("GE T", "http", "a", "/"),
        line("GET / HTTP/1.1\r\nevil: 1\r\n", "http", "a", "/"),
        line("", "http", "a", "/"),
        line("GET", "http", "a b", "/"),
        line("GET", "http", "a\r\nevil: 1", "/"),
        line("GET", "http", "u@a", "/"),
        line("GET", "http", "a/b", "/"),
        line("GET", "http", "", "/"),
        line("GET", "http", "a", ""),
        line("GET", "http", "a", "x"),
        line("GET", "http", "a", "/ HTTP/1.1\r\nevil: 1"),
        line("GET", "http", "a", "/a b"),
        line("GET", "http", "a", "/\0"),
        line("GET", "http", "a", "/\u{e9}"),
        line("GET", "http", "a", "*"),
        line("GET", "ht tp", "a", "/"),
        [literal(":method", "GET"), literal(":scheme", "http"), literal(":authority", "a")].concat(),
        [literal(":scheme", "http"), literal(":authority", "a"), literal(":path", "/")].concat(),
        [literal(":method", "CONNECT"), literal(":authority", "a:80"), literal(":path", "/")].concat(),
        // extended CONNECT that nobody configured
        [line("CONNECT", "http", "a", "/"), literal(":protocol", "evil")].concat(),
    ] {
        let got = answer(running.at("in"), &frame(1, 5, 1, &fields)).await;
        assert!(!got.is_empty(), "{:?}", String::from_utf8_lossy(&fields));
    }
    assert_eq!(seen.text(), [""; 0], "nothing went upstream");
    is_well(&running).await;
    running.end().await;
}

#[tokio::test]
async fn a_body_unlike_its_length_is_cut_and_trailers_are_filtered() {
    let (up, seen) = bed::recorder("0\r\n", OK).await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let post = |length: Option<&str>| {
        let mut fields = [
            literal(":method", "POST"),
            literal(":scheme", "http"),
            literal(":authority", "a"),
            literal(":path", "/p"),
        ]
        .concat();
        if let Some(length) = length {
            fields.extend(literal("content-length", length));
        }
        frame(1, 4, 1, &fields)
    };
    for (length, body) in [("10", "short"), ("3", "too long")] {
        let frames = [post(Some(length)), frame(0, 1, 1, body.as_bytes())].concat();
        let got = answer(running.at("in"), &frames).await;
        assert!(got.iter().any(|(kind, _)| *kind == 3), "the stream is reset: {got:?}");
    }
    for sent in seen.text() {
        let (head, body) = sent.split_once("\r\n\r\n").unwrap_or_default();
        let most = if head.contains("content-length: 3") { 3 } else { 9 };
        assert!(body.len() <= most, "{sent}");
    }
    let trailers =
        [literal("content-length", "5"), literal("host", "evil"), literal("x-forwarded-for", "1"), literal("ok", "1")];
    let frames = [post(None), frame(0, 0, 1, b"hi"), frame(1, 5, 1, &trailers.concat())].concat();
    let got = answer(running.at("in"), &frames).await;
    assert!(got.iter().any(|(kind, _)| *kind < 2), "{got:?}");
    let sent = seen.text().concat();
    assert!(sent.ends_with("2\r\nhi\r\n0\r\nok: 1\r\n\r\n"), "{sent}");
    running.end().await;
}

#[tokio::test]
async fn a_stalled_window_holds_the_upstream_back_and_times_out() {
    let big: &'static [u8] = Box::leak(
        [&b"HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n"[..], &vec![b'x'; 64 << 20]]
            .concat()
            .into_boxed_slice(),
    );
    let (up, _) = bed::recorder("\r\n\r\n", big).await;
    let running = bed::edited(up, false, |manager, _| manager.stream_idle_timeout = bed::milliseconds(500)).await;
    // no window at all
    let mut stream = connect(running.at("in")).await;
    stream.write_all(&frame(4, 0, 0, &[0, 4, 0, 0, 0, 0])).await.unwrap();
    stream.write_all(&frame(1, 5, 1, &get("/"))).await.unwrap();
    let mut reset = false;
    let reading = async {
        loop {
            let mut header = [0; 9];
            if stream.read_exact(&mut header).await.is_err() {
                return;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
            if stream.read_exact(&mut payload).await.is_err() {
                return;
            }
            assert!(header[3] != 0 || payload.is_empty(), "data without a window");
            if header[3] == 3 {
                reset = true;
                return;
            }
        }
    };
    tokio::time::timeout(bed::PATIENCE, reading).await.expect("the stream ends");
    assert!(reset);
    running.end().await;
}

#[tokio::test]
async fn grpc_callers_get_their_status_whatever_is_wrong() {
    let (up, _) = bed::recorder("never", b"").await;
    let running = bed::edited(up, false, |_, _| {}).await;
    let fields = [
        literal(":method", "POST"),
        literal(":scheme", "http"),
        literal(":authority", "a"),
        literal(":path", "/"),
        literal("content-type", "application/grpc"),
        literal("host", "b"),
    ];
    let got = answer(running.at("in"), &frame(1, 5, 1, &fields.concat())).await;
    let text = String::from_utf8_lossy(&got[0].1).into_owned();
    assert_eq!(got[0].0, 1, "{got:?}");
    // the status is one of the static table's (0x88 is 200), the code may be Huffman-coded
    assert_eq!(got[0].1[0], 0x88, "{text:?}");
    running.end().await;
}
