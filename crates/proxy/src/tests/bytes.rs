//! Connections of bytes.

use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::bed;

#[tokio::test]
async fn bytes_pass_both_ways_and_halves_close_apart() {
    let up = bed::server(|mut stream| async move {
        let mut all = Vec::new();
        if stream.read_to_end(&mut all).await.is_ok() {
            all.reverse();
            drop(stream.write_all(&all).await);
        }
    })
    .await;
    let running =
        bed::start(vec![bed::listener("in", bed::tcp_filter("up"))], vec![bed::cluster("up", up, false)]).await;
    let mut stream = tokio::net::TcpStream::connect(running.at("in")).await.unwrap();
    let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    stream.write_all(&sent).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).await.unwrap();
    back.reverse();
    assert!(back == sent);
    running.end().await;
}

#[tokio::test]
async fn a_server_may_speak_first() {
    let up = bed::server(|mut stream| async move {
        drop(stream.write_all(b"220 hello\r\n").await);
        let mut rest = Vec::new();
        drop(stream.read_to_end(&mut rest).await);
    })
    .await;
    let running =
        bed::start(vec![bed::listener("in", bed::tcp_filter("up"))], vec![bed::cluster("up", up, false)]).await;
    assert_eq!(Box::pin(bed::talk(running.at("in"), b"", |text| text.ends_with('\n'))).await, "220 hello\r\n");
    running.end().await;
}

/// A gateway whose byte proxy is edited.
async fn limited(up: std::net::SocketAddr, edit: impl FnOnce(&mut TcpProxy)) -> bed::Running {
    let filter = bed::tcp_filter_with("up", edit);
    bed::start(vec![bed::listener("in", filter)], vec![bed::cluster("up", up, false)]).await
}

async fn echo() -> std::net::SocketAddr {
    bed::server(|mut stream| async move {
        let (mut from, mut to) = stream.split();
        drop(tokio::io::copy(&mut from, &mut to).await);
    })
    .await
}

#[tokio::test]
async fn a_connection_ends_when_it_is_silent_or_old() {
    let limit = std::time::Duration::from_millis(300);
    let running = limited(echo().await, |proxy| proxy.idle_timeout = bed::milliseconds(300)).await;
    let began = tokio::time::Instant::now();
    let mut stream = tokio::net::TcpStream::connect(running.at("in")).await.unwrap();
    assert!(bed::is_closed(&mut stream).await, "nobody spoke");
    assert!(began.elapsed() >= limit, "{:?}", began.elapsed());
    running.end().await;

    // However lively it is.
    let old = |proxy: &mut TcpProxy| proxy.max_downstream_connection_duration = bed::milliseconds(300);
    let running = limited(echo().await, old).await;
    let began = tokio::time::Instant::now();
    let mut stream = tokio::net::TcpStream::connect(running.at("in")).await.unwrap();
    let talking = async {
        let mut back = [0];
        while stream.write_all(b"x").await.is_ok() && matches!(stream.read(&mut back).await, Ok(1)) {}
    };
    tokio::time::timeout(bed::PATIENCE, talking).await.expect("it has an end");
    assert!(began.elapsed() >= limit, "{:?}", began.elapsed());
    running.end().await;
}

/// Closes a connection in a reset.
fn reset(stream: tokio::net::TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(stream);
}

/// How a connection ends: `true` for a reset.
async fn ends_in_reset(stream: &mut tokio::net::TcpStream) -> bool {
    let mut buffer = [0; 1024];
    let ending = async {
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    };
    tokio::time::timeout(bed::PATIENCE, ending).await.expect("it ends")
}

#[tokio::test]
async fn a_reset_is_passed_on_and_never_looks_like_an_orderly_end() {
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let up = bed::server(move |mut stream| {
        let told = told.clone();
        async move {
            match stream.read_u8().await {
                Ok(b'r') => reset(stream),
                Ok(b'e') => drop(stream),
                _ => {
                    stream.write_all(b"y").await.unwrap();
                    told.send(ends_in_reset(&mut stream).await).unwrap();
                }
            }
        }
    })
    .await;
    let running = limited(up, |_| {}).await;
    let open = || tokio::net::TcpStream::connect(running.at("in"));
    for (first, is_reset) in [(b"r", true), (b"e", false)] {
        let mut client = open().await.unwrap();
        client.write_all(first).await.unwrap();
        assert_eq!(ends_in_reset(&mut client).await, is_reset, "from the server: {first:?}");
    }
    for is_reset in [true, false] {
        let mut client = open().await.unwrap();
        client.write_all(b"x").await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'y');
        if is_reset {
            reset(client);
        } else {
            drop(client);
        }
        let heard = tokio::time::timeout(bed::PATIENCE, heard.recv()).await.expect("the server hears of it");
        assert_eq!(heard, Some(is_reset), "from the client");
    }
    running.end().await;
}
