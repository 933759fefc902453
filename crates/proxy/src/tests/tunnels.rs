//! Upgrades, over HTTP/1 and over HTTP/2 (extended CONNECT, RFC 8441).

use std::net::SocketAddr;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::google::protobuf::BoolValue;
use h2::client::SendRequest;
use h2::ext::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::bed;

async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    String::from_utf8(head).ok()
}

/// An HTTP/1 server that agrees to every upgrade on `/ws` and echoes in capitals; all else is not found.
async fn capitals_h1() -> SocketAddr {
    bed::server(|mut stream| async move {
        loop {
            let Some(asked) = head(&mut stream).await else { return };
            if asked.starts_with("GET /ws HTTP/1.1\r\n") && asked.contains("upgrade: websocket\r\n") {
                break;
            }
            drop(stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await);
        }
        let agreed =
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-Up: h1\r\n\r\n";
        drop(stream.write_all(agreed).await);
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
            if stream.write_all(&buffer[..n].to_ascii_uppercase()).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// The same over HTTP/2, for extended CONNECT if it is said to be known.
async fn capitals_h2(knows_connect: bool) -> SocketAddr {
    bed::server(move |stream| async move {
        let mut builder = h2::server::Builder::new();
        if knows_connect {
            builder.enable_connect_protocol();
        }
        let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            tokio::spawn(async move {
                let protocol = request.extensions().get::<Protocol>().map(|protocol| protocol.as_str().to_owned());
                let fits = request.method() == http::Method::CONNECT
                    && protocol.as_deref() == Some("websocket")
                    && request.uri().path() == "/ws";
                if !fits {
                    drop(respond.send_response(http::Response::builder().status(404).body(()).unwrap(), true));
                    return;
                }
                let response = http::Response::builder().header("x-up", "h2").body(()).unwrap();
                let Ok(mut send) = respond.send_response(response, false) else { return };
                let mut body = request.into_body();
                while let Some(Ok(data)) = body.data().await {
                    drop(body.flow_control().release_capacity(data.len()));
                    if send.send_data(data.to_ascii_uppercase().into(), false).is_err() {
                        return;
                    }
                }
                drop(send.send_data(Bytes::new(), true));
            });
        }
    })
    .await
}

fn offers_tunnels(manager: &mut hcm::HttpConnectionManager) {
    manager.http2_protocol_options = Some(core::Http2ProtocolOptions { allow_connect: true, ..Default::default() });
}

/// An HTTP/2 client that knows what the server said it can do.
async fn client(at: SocketAddr) -> SendRequest<Bytes> {
    let (sender, connection) = h2::client::handshake(TcpStream::connect(at).await.unwrap()).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    let mut sender = sender.ready().await.unwrap();
    let (answer, _) = sender.send_request(http::Request::get("http://a/none").body(()).unwrap(), true).unwrap();
    answer.await.unwrap();
    sender.ready().await.unwrap()
}

fn connect(path: &str) -> http::Request<()> {
    http::Request::builder()
        .method(http::Method::CONNECT)
        .uri(format!("http://a{path}"))
        .extension(Protocol::from_static("websocket"))
        .body(())
        .unwrap()
}

const UPGRADE: &str = "Host: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";

/// A websocket of an HTTP/1 client echoes in capitals and ends when the client does.
async fn talks_over_h1(at: SocketAddr, up: &str) {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(format!("GET /ws HTTP/1.1\r\n{UPGRADE}").as_bytes()).await.unwrap();
    let head = head(&mut stream).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: websocket\r\n"), "{head}");
    assert!(head.contains("connection: upgrade\r\n") && head.contains(up), "{head}");
    for _ in 0..2 {
        stream.write_all(b"ping").await.unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"PING");
    }
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}

async fn talks_over_h2(at: SocketAddr, up: &str) {
    let mut client = client(at).await;
    assert!(client.is_extended_connect_protocol_enabled());
    let (response, mut send) = client.send_request(connect("/x/../ws"), false).unwrap();
    let response = response.await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers()["x-up"].to_str().unwrap()), (200, up));
    assert!(!response.headers().contains_key("upgrade") && !response.headers().contains_key("connection"));
    let mut body = response.into_body();
    for _ in 0..2 {
        send.send_data(Bytes::from_static(b"ping"), false).unwrap();
        let data = body.data().await.unwrap().unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        assert_eq!(data, "PING");
    }
    send.send_data(Bytes::new(), true).unwrap();
    // the end may come as a frame of its own
    while let Some(data) = body.data().await {
        assert!(data.unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_websocket_passes_over_either_protocol_on_either_side() {
    let ups = [("h1", capitals_h1().await, false), ("h2", capitals_h2(true).await, true)];
    for (name, up, http2) in ups {
        let running = bed::edited(up, http2, |manager, _| {
            offers_tunnels(manager);
            manager.normalize_path = Some(BoolValue { value: true });
        })
        .await;
        // first a connection to the upstream that is new, whose abilities are not known yet
        talks_over_h1(running.at("in"), &format!("x-up: {name}\r\n")).await;
        talks_over_h2(running.at("in"), name).await;
        running.end().await;
    }
}

#[tokio::test]
async fn an_upgrade_over_http2_meets_the_policies_of_its_path() {
    let denied = route::Route {
        action: Some(route::route::Action::DirectResponse(route::DirectResponseAction {
            status: 403,
            ..Default::default()
        })),
        ..bed::to_cluster("/admin", "up")
    };
    let mut manager = bed::manager(vec![denied, bed::to_cluster("/", "up")]);
    offers_tunnels(&mut manager);
    manager.normalize_path = Some(BoolValue { value: true });
    let (up, seen) = bed::recorder("\r\n\r\n", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await;
    let clusters = vec![bed::cluster("up", up, false)];
    let running = Box::pin(bed::start(vec![bed::listener("in", bed::http_filter(&manager))], clusters)).await;
    let mut client = client(running.at("in")).await;
    for (path, status) in [("/admin", 403), ("/x/../admin", 403), ("/ws/%2e%2e/admin/", 403), ("/none", 404)] {
        let (response, mut send) = client.send_request(connect(path), false).unwrap();
        // a tunnel that is not open carries nothing
        send.send_data(Bytes::from_static(b"early"), false).unwrap();
        assert_eq!(response.await.unwrap().status().as_u16(), status, "{path}");
        client = client.ready().await.unwrap();
    }
    let sent = seen.text().concat();
    assert!(sent.contains("GET /none HTTP/1.1\r\n") && !sent.contains("admin") && !sent.contains("early"), "{sent}");
    running.end().await;
}

#[tokio::test]
async fn an_http2_client_is_offered_upgrades_only_where_that_is_configured() {
    let running = bed::edited(capitals_h1().await, false, |_, _| {}).await;
    let mut client = client(running.at("in")).await;
    assert!(!client.is_extended_connect_protocol_enabled());
    // and one that asks all the same gets none
    if let Ok((response, _)) = client.send_request(connect("/ws"), false) {
        assert!(response.await.map_or(true, |response| response.status() != 200));
    }
    talks_over_h1(running.at("in"), "x-up: h1\r\n").await;
    running.end().await;
}

#[tokio::test]
async fn an_http2_upstream_without_extended_connect_gets_no_upgrade() {
    let running = bed::edited(capitals_h2(false).await, true, |_, _| {}).await;
    let answer = bed::talk(running.at("in"), format!("GET /ws HTTP/1.1\r\n{UPGRADE}").as_bytes(), |text| {
        text.ends_with("local reset")
    })
    .await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("reset reason: local reset"), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn an_http2_client_that_leaves_ends_the_tunnel() {
    let (told, mut ended) = tokio::sync::mpsc::unbounded_channel();
    let up = bed::server(move |mut stream| {
        let told = told.clone();
        async move {
            let agreed = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
            if head(&mut stream).await.is_none_or(|head| !head.starts_with("GET /ws ")) {
                drop(stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await);
                return;
            }
            drop(stream.write_all(agreed).await);
            if bed::is_closed(&mut stream).await {
                told.send("closed").unwrap();
            }
        }
    })
    .await;
    let running = bed::edited(up, false, |manager, _| offers_tunnels(manager)).await;
    let mut client = client(running.at("in")).await;
    let (response, mut send) = client.send_request(connect("/ws"), false).unwrap();
    assert_eq!(response.await.unwrap().status().as_u16(), 200);
    send.send_reset(h2::Reason::CANCEL);
    tokio::time::timeout(bed::PATIENCE, ended.recv()).await.unwrap().unwrap();
    running.end().await;
}
