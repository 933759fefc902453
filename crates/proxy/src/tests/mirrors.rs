//! Copies of requests: whole, or seen to break off.

use std::net::SocketAddr;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as ext_authz;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::google::protobuf::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::bed;

/// What a server read on its only connection.
#[derive(Clone, Default)]
struct Heard {
    bytes: Vec<u8>,
    /// The connection has ended.
    ended: bool,
}

impl Heard {
    fn body(&self) -> &[u8] {
        let head = self.bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a head came");
        &self.bytes[head + 4..]
    }
}

/// A server that reads, once `gate` is open if there is one, and never answers.
async fn listener(gate: Option<watch::Receiver<bool>>) -> (SocketAddr, watch::Receiver<Heard>) {
    let (notes, heard) = watch::channel(Heard::default());
    let at = bed::server(move |mut stream| {
        let (notes, gate) = (notes.clone(), gate.clone());
        async move {
            if let Some(mut gate) = gate {
                drop(gate.wait_for(|open| *open).await);
            }
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                notes.send_modify(|heard| heard.bytes.extend_from_slice(&buffer[..n]));
            }
            notes.send_modify(|heard| heard.ended = true);
        }
    })
    .await;
    (at, heard)
}

async fn until(heard: &mut watch::Receiver<Heard>, fits: impl FnMut(&Heard) -> bool) -> Heard {
    tokio::time::timeout(bed::PATIENCE, heard.wait_for(fits)).await.expect("it comes").expect("it is told").clone()
}

fn says(heard: &Heard, text: &str) -> bool {
    heard.bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// A gateway that copies all requests for `up` to `copy`.
async fn mirrored(
    up: SocketAddr,
    copy: SocketAddr,
    others: Vec<(&str, SocketAddr)>,
    edit: impl FnOnce(&mut hcm::HttpConnectionManager),
) -> bed::Running {
    let mut to_up = bed::to_cluster("/", "up");
    if let Some(route::route::Action::Route(action)) = &mut to_up.action {
        action.request_mirror_policies =
            vec![route::route_action::RequestMirrorPolicy { cluster: "copy".into(), ..Default::default() }];
    }
    let mut manager = bed::manager(vec![to_up]);
    edit(&mut manager);
    let clusters = [("up", up), ("copy", copy)].into_iter().chain(others);
    let clusters = clusters.map(|(name, at)| bed::cluster(name, at, false)).collect();
    Box::pin(bed::start(vec![bed::listener("in", bed::http_filter(&manager))], clusters)).await
}

const CHUNKED: &str = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";

#[tokio::test]
async fn a_request_that_breaks_off_is_not_whole_for_its_mirror_either() {
    let (up, _) = listener(None).await;
    let (copy, mut heard) = listener(None).await;
    let running = mirrored(up, copy, Vec::new(), |_| {}).await;
    let mut client = TcpStream::connect(running.at("in")).await.unwrap();
    client.write_all(format!("{CHUNKED}5\r\nhello\r\n").as_bytes()).await.unwrap();
    until(&mut heard, |heard| says(heard, "hello")).await;
    drop(client);
    let whole = until(&mut heard, |heard| heard.ended).await;
    assert_eq!(String::from_utf8_lossy(whole.body()), "5\r\nhello\r\n");
    running.end().await;

    // the same over HTTP/2, where the client resets its stream
    let (copy, mut heard) = listener(None).await;
    let running = mirrored(up, copy, Vec::new(), |_| {}).await;
    let (sender, connection) =
        h2::client::handshake(TcpStream::connect(running.at("in")).await.unwrap()).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    let mut sender = sender.ready().await.unwrap();
    let (_response, mut body) = sender.send_request(http::Request::post("http://a/").body(()).unwrap(), false).unwrap();
    body.send_data(Bytes::from_static(b"hello"), false).unwrap();
    until(&mut heard, |heard| says(heard, "hello")).await;
    body.send_reset(h2::Reason::CANCEL);
    let whole = until(&mut heard, |heard| heard.ended).await;
    assert_eq!(String::from_utf8_lossy(whole.body()), "5\r\nhello\r\n");
    running.end().await;
}

#[tokio::test]
async fn a_mirror_has_the_end_before_the_answer_is_there() {
    let (open, gate) = watch::channel(false);
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
    let (copy, mut heard) = listener(None).await;
    let running = mirrored(up, copy, Vec::new(), |_| {}).await;
    let asking = tokio::spawn({
        let at = running.at("in");
        async move {
            bed::talk(at, format!("{CHUNKED}5\r\nhello\r\n0\r\n\r\n").as_bytes(), |text| text.ends_with("ok")).await
        }
    });
    let whole = until(&mut heard, |heard| heard.bytes.ends_with(b"0\r\n\r\n")).await;
    assert_eq!(String::from_utf8_lossy(whole.body()), "5\r\nhello\r\n0\r\n\r\n");
    open.send_replace(true);
    let answer = asking.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn a_mirror_too_far_behind_is_given_up_and_does_not_look_served() {
    const PIECE: usize = 1024 * 1024;
    const PIECES: usize = 64;
    let up = bed::server(|mut stream| async move {
        let mut buffer = vec![0; 64 * 1024];
        let mut read = 0;
        while read < PIECE * PIECES {
            match stream.read(&mut buffer).await {
                Ok(n @ 1..) => read += n,
                _ => return,
            }
        }
        drop(stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await);
        drop(stream.read(&mut buffer).await);
    })
    .await;
    // it reads nothing before the request has been served, which is more than the kernel and the queue hold
    let (open, gate) = watch::channel(false);
    let (copy, mut heard) = listener(Some(gate)).await;
    let running = mirrored(up, copy, Vec::new(), |_| {}).await;
    let mut client = TcpStream::connect(running.at("in")).await.unwrap();
    let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", PIECE * PIECES);
    client.write_all(head.as_bytes()).await.unwrap();
    let piece = vec![b'x'; PIECE];
    for _ in 0..PIECES {
        client.write_all(&piece).await.unwrap();
    }
    let mut answer = [0; 12];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    open.send_replace(true);
    let part = until(&mut heard, |heard| heard.ended).await;
    assert!(part.body().len() < PIECE * PIECES, "{} bytes came", part.body().len());
    running.end().await;
}

/// An authorizer that is asked with up to `max` bytes of the body.
fn asks_with_body(manager: &mut hcm::HttpConnectionManager, max: u32) {
    let service = ext_authz::HttpService {
        server_uri: Some(core::HttpUri {
            uri: "http://judge".into(),
            timeout: Some(Duration { seconds: 60, nanos: 0 }),
            http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("judge".into())),
        }),
        ..Default::default()
    };
    let filter = ext_authz::ExtAuthz {
        services: Some(ext_authz::ext_authz::Services::HttpService(service)),
        with_request_body: Some(ext_authz::BufferSettings {
            max_request_bytes: max,
            allow_partial_message: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    manager.http_filters.insert(
        0,
        hcm::HttpFilter {
            name: "envoy.filters.http.ext_authz".into(),
            config_type: Some(hcm::http_filter::ConfigType::TypedConfig(bed::any(&filter))),
            ..Default::default()
        },
    );
}

#[tokio::test]
async fn a_mirror_gets_what_an_authorizer_was_asked_with() {
    let judge = bed::echo_heads().await;
    for (sent, expect) in [
        ("Content-Length: 5\r\n\r\nhello", "hello"),
        ("Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n"),
        // longer than what the authorizer sees
        ("Content-Length: 26\r\n\r\nabcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyz"),
    ] {
        let (up, mut reached) = listener(None).await;
        let (copy, mut heard) = listener(None).await;
        let running = mirrored(up, copy, vec![("judge", judge)], |manager| asks_with_body(manager, 10)).await;
        let mut client = TcpStream::connect(running.at("in")).await.unwrap();
        client.write_all(format!("POST / HTTP/1.1\r\nHost: a\r\n{sent}").as_bytes()).await.unwrap();
        until(&mut reached, |heard| heard.bytes.ends_with(expect.as_bytes())).await;
        let whole = until(&mut heard, |heard| heard.bytes.ends_with(expect.as_bytes())).await;
        assert_eq!(String::from_utf8_lossy(whole.body()), expect, "{sent:?}");
        drop(client);
        running.end().await;
    }
}
