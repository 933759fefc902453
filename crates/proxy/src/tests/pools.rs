//! Connections to upstreams: how many, how long, and how it is noticed that one is dead.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::google::protobuf::UInt32Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};

use super::bed;
use super::hostile_h2::{frame, literal};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

/// Connections of a server: how many were made, and are open.
#[derive(Clone, Default)]
struct Connections(watch::Sender<(usize, usize)>);

impl Connections {
    /// Returns once so many were made and so many are open.
    async fn until(&self, made: usize, open: usize) {
        let mut counts = self.0.subscribe();
        let waited = tokio::time::timeout(bed::PATIENCE, counts.wait_for(|now| *now == (made, open))).await;
        assert!(waited.is_ok(), "made and open: {:?}, not {:?}", *self.0.borrow(), (made, open));
    }
}

/// An HTTP/2 server whose answers wait for a permit of `gate`.
async fn gated(gate: &Arc<Semaphore>) -> (SocketAddr, Connections) {
    let connections = Connections::default();
    let (counts, gate) = (connections.clone(), Arc::clone(gate));
    let at = bed::server(move |stream| {
        let (counts, gate) = (counts.clone(), Arc::clone(&gate));
        async move {
            counts.0.send_modify(|(made, open)| (*made, *open) = (*made + 1, *open + 1));
            if let Ok(mut connection) = h2::server::handshake(stream).await {
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    let gate = Arc::clone(&gate);
                    tokio::spawn(async move {
                        gate.acquire().await.unwrap().forget();
                        drop(respond.send_response(http::Response::new(()), true));
                    });
                }
            }
            counts.0.send_modify(|(_, open)| *open -= 1);
        }
    })
    .await;
    (at, connections)
}

/// A gateway whose only cluster has these HTTP settings; requests may take as long as they like.
async fn gateway(
    up: SocketAddr,
    common: core::HttpProtocolOptions,
    http2: Option<core::Http2ProtocolOptions>,
) -> bed::Running {
    let mut to_up = bed::to_cluster("/", "up");
    if let Some(route::route::Action::Route(action)) = &mut to_up.action {
        action.timeout = bed::milliseconds(0);
    }
    let manager = bed::manager(vec![to_up]);
    let cluster = bed::cluster_with("up", up, common, http2);
    Box::pin(bed::start(vec![bed::listener("in", bed::http_filter(&manager))], vec![cluster])).await
}

async fn ask(running: &bed::Running) {
    let answer = bed::talk(running.at("in"), REQUEST, |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[expect(clippy::unnecessary_wraps, reason = "the field that takes it may be absent")]
fn so_many(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

#[tokio::test]
async fn an_http2_connection_is_closed_after_its_last_request() {
    let (up, connections) = gated(&Arc::new(Semaphore::new(100))).await;
    let common = core::HttpProtocolOptions { max_requests_per_connection: so_many(2), ..Default::default() };
    let running = gateway(up, common, Some(core::Http2ProtocolOptions::default())).await;
    for (made, open) in [(1, 1), (1, 0), (2, 1), (2, 0), (3, 1)] {
        ask(&running).await;
        connections.until(made, open).await;
    }
    running.end().await;
}

#[tokio::test]
async fn idle_connections_end_after_their_time_and_old_ones_when_nobody_uses_them() {
    let settings = [
        core::HttpProtocolOptions { idle_timeout: bed::milliseconds(300), ..Default::default() },
        core::HttpProtocolOptions { max_connection_duration: bed::milliseconds(300), ..Default::default() },
    ];
    for common in settings {
        let (up, connections) = gated(&Arc::new(Semaphore::new(100))).await;
        let running = gateway(up, common, Some(core::Http2ProtocolOptions::default())).await;
        ask(&running).await;
        connections.until(1, 0).await;
        ask(&running).await;
        connections.until(2, 0).await;
        running.end().await;

        let (up, seen) = bed::recorder("\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        let running = gateway(up, common, None).await;
        ask(&running).await;
        let admin = running.admin();
        let idle = async {
            loop {
                let text =
                    bed::talk(admin, b"GET /clusters HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", |_| false);
                if text.await.contains("::cx_active::0") {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), idle).await.expect("the connection is closed");
        ask(&running).await;
        seen.until(|all| all.len() == 2).await;
        running.end().await;
    }
}

#[tokio::test]
async fn streams_beyond_the_limit_of_a_connection_get_another_one() {
    let gate = Arc::new(Semaphore::new(0));
    let (up, connections) = gated(&gate).await;
    let http2 = core::Http2ProtocolOptions { max_concurrent_streams: so_many(1), ..Default::default() };
    let running = gateway(up, core::HttpProtocolOptions::default(), Some(http2)).await;
    let at = running.at("in");
    let asked: Vec<_> = (0..3).map(|_| tokio::spawn(bed::talk(at, REQUEST, |_| false))).collect();
    connections.until(3, 3).await;
    gate.add_permits(3);
    for one in asked {
        let answer = one.await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    running.end().await;
}

/// An HTTP/2 server that answers `pings` PINGs, then the request it has, and then nothing more.
async fn pinged(pings: usize) -> SocketAddr {
    bed::server(move |mut stream| async move {
        let mut preface = [0; 24];
        if stream.read_exact(&mut preface).await.is_err() || stream.write_all(&frame(4, 0, 0, &[])).await.is_err() {
            return;
        }
        let (mut seen, mut asked) = (0, 0);
        loop {
            let mut header = [0; 9];
            if stream.read_exact(&mut header).await.is_err() {
                return;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
            if stream.read_exact(&mut payload).await.is_err() {
                return;
            }
            match header[3] {
                1 => asked = u32::from_be_bytes([header[5], header[6], header[7], header[8]]),
                6 if seen < pings => {
                    seen += 1;
                    drop(stream.write_all(&frame(6, 1, 0, &payload)).await);
                    if seen == pings {
                        drop(stream.write_all(&frame(1, 5, asked, &literal(":status", "200"))).await);
                    }
                }
                _ => {}
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_dead_http2_upstream_is_noticed_by_its_silence() {
    let asking = |interval: i32, timeout: i32| {
        let (interval, timeout) = (bed::milliseconds(interval), bed::milliseconds(timeout));
        let keepalive = core::KeepaliveSettings { interval, timeout, ..Default::default() };
        Some(core::Http2ProtocolOptions { connection_keepalive: Some(keepalive), ..Default::default() })
    };
    let dead = async {
        let running = gateway(pinged(0).await, core::HttpProtocolOptions::default(), asking(50, 3000)).await;
        let answer = bed::talk(running.at("in"), REQUEST, |_| false).await;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("connection termination"), "{answer}");
        running.end().await;
    };
    // One that answers PINGs may take as long as it likes over a request: here longer than silence may last, which is
    // long, so that a busy machine is no silent one.
    let slow = async {
        let running = gateway(pinged(11).await, core::HttpProtocolOptions::default(), asking(1000, 10_000)).await;
        ask(&running).await;
        running.end().await;
    };
    tokio::join!(Box::pin(dead), Box::pin(slow));
}
