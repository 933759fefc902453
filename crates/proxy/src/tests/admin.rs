//! Envoy's admin interface, asked over its port.

use std::sync::{Arc, Mutex};

use engine::chain::Direction;
use tokio::net::TcpStream;

use super::bed;
use crate::options::LogLevels;

async fn ask(running: &bed::Running, method: &str, path: &str) -> String {
    let request = format!("{method} {path} HTTP/1.0\r\n\r\n");
    bed::talk(running.admin(), request.as_bytes(), |_| false).await
}

/// Levels of two components.
struct Levels(Mutex<[(&'static str, &'static str); 2]>);

impl LogLevels for Levels {
    fn list(&self) -> Vec<(&'static str, &'static str)> {
        self.0.lock().unwrap().to_vec()
    }

    fn set(&self, component: Option<&str>, level: &str) -> Result<(), String> {
        let level = ["info", "debug"].into_iter().find(|known| *known == level).ok_or_else(|| level.to_owned())?;
        for (name, own) in &mut *self.0.lock().unwrap() {
            if component.is_none_or(|component| component == *name) {
                *own = level;
            }
        }
        Ok(())
    }
}

#[tokio::test]
async fn levels_are_set_and_listed_over_the_port() {
    let running = bed::start_by(Vec::new(), Vec::new(), |options| {
        options.log_levels = Some(Arc::new(Levels(Mutex::new([("proxy", "info"), ("xds", "info")]))));
    })
    .await;
    for (path, lines) in [
        ("/logging", ["  proxy: info", "  xds: info"]),
        ("/logging?xds=debug", ["  proxy: info", "  xds: debug"]),
        ("/logging?level=debug", ["  proxy: debug", "  xds: debug"]),
        ("/logging?paths=proxy:info,xds:info", ["  proxy: info", "  xds: info"]),
    ] {
        let answer = ask(&running, "POST", path).await;
        assert!(answer.contains(" 200 OK\r\n"), "{path}: {answer}");
        let listed: Vec<&str> = answer.lines().filter(|line| line.starts_with("  ")).collect();
        assert_eq!(listed, lines, "{path}");
    }
    assert!(ask(&running, "POST", "/logging?level=loud").await.contains(" 400 "));
    assert!(ask(&running, "GET", "/logging").await.contains(" 405 "));
    // Envoy would set counters to zero; ours are for adding up only.
    assert!(ask(&running, "POST", "/reset_counters").await.contains(" 404 "));
    running.end().await;
}

/// A gateway with a listener for each direction.
async fn both_directions() -> bed::Running {
    let up = bed::echo_heads().await;
    let listener = |name: &str, direction: Direction| {
        let manager = bed::manager(vec![bed::to_cluster("/", "up")]);
        let mut listener = bed::listener(name, bed::http_filter(&manager));
        listener.traffic_direction = if direction == Direction::Inbound { 1 } else { 2 };
        listener
    };
    let listeners = vec![listener("in", Direction::Inbound), listener("out", Direction::Outbound)];
    bed::start(listeners, vec![bed::cluster("up", up, false)]).await
}

/// Returns when nobody listens there any more.
async fn closed(at: std::net::SocketAddr) {
    let closing = async { while TcpStream::connect(at).await.is_ok() {} };
    tokio::time::timeout(bed::PATIENCE, closing).await.expect("it closes");
}

#[tokio::test]
async fn listeners_drain_by_direction_and_at_once() {
    let running = both_directions().await;
    let (inbound, outbound) = (running.at("in"), running.at("out"));
    assert!(ask(&running, "POST", "/drain_listeners?inboundonly").await.contains(" 200 "));
    closed(inbound).await;
    let answer = bed::talk(outbound, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(ask(&running, "POST", "/drain_listeners").await.contains(" 200 "));
    closed(outbound).await;
    running.end().await;
}

#[tokio::test]
async fn every_name_is_filtered_and_carries_the_tags() {
    let up = bed::echo_heads().await;
    let manager = bed::manager(vec![bed::to_cluster("/", "up")]);
    let listeners = vec![bed::listener("in", bed::http_filter(&manager))];
    let running = bed::start_by(listeners, vec![bed::cluster("up", up, false)], |options| {
        options.stats_tags = vec![("region".into(), "here".into())];
    })
    .await;
    let answer =
        bed::talk(running.at("in"), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let lines = |answer: String| -> Vec<String> {
        answer.split_once("\r\n\r\n").unwrap().1.lines().map(str::to_owned).collect()
    };
    assert_eq!(
        lines(ask(&running, "GET", "/stats?filter=%5Ecluster%5C.up%5C.upstream_(rq|cx)_total$").await),
        ["cluster.up.upstream_cx_total: 1", "cluster.up.upstream_rq_total: 1"]
    );
    assert_eq!(
        lines(ask(&running, "GET", "/stats?format=prometheus&filter=cluster.up.upstream_rq_2xx").await),
        [
            "# TYPE envoy_cluster_upstream_rq_xx counter",
            "envoy_cluster_upstream_rq_xx{region=\"here\",envoy_response_code_class=\"2\",envoy_cluster_name=\"up\"} 1"
        ]
    );
    assert_eq!(lines(ask(&running, "GET", "/stats?filter=server.live").await), ["server.live: 1"]);
    let all = lines(ask(&running, "GET", "/stats/prometheus").await);
    let samples: Vec<_> = all.iter().filter(|line| !line.starts_with('#')).collect();
    assert!(samples.iter().all(|line| line.contains("{region=\"here\"")), "{samples:#?}");
    assert!(ask(&running, "GET", "/stats?filter=(").await.contains(" 400 "));
    running.end().await;
}
