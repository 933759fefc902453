//! Time-outs, retries, ejected pods, limits.

use std::time::{Duration, Instant};

use testkit::eventually;

use crate::apps::{TRAFFIC, virtual_service};

const GATEWAY: &str = "istio-system/istio-ingressgateway";

/// The gateway's log line of a request, once it is written.
fn line(mesh: &testkit::Mesh, path: &str) -> String {
    eventually("the access log", || {
        let log = mesh.logs(GATEWAY, "istio-proxy");
        log.lines().rfind(|line| line.contains(path)).map(str::to_owned).ok_or_else(|| "no line".to_owned())
    })
}

#[test]
fn a_time_out_answers_504() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "slow",
        "  - timeout: 0.5s\n    route: [{destination: {host: httpbin, port: {number: 8000}}}]",
    ));
    let began = Instant::now();
    let answer = mesh.get("slow.shop.test", "/delay/5", &[]);
    assert_eq!((answer.status, answer.body.as_str()), (504, "upstream request timeout"), "{answer:?}");
    let took = began.elapsed();
    assert!((Duration::from_millis(500)..Duration::from_secs(4)).contains(&took), "{took:?}");
    let line = line(&mesh, "/delay/5");
    assert!(line.contains(" 504 UT ") && line.contains("response_timeout"), "{line}");
}

#[test]
fn retries_go_on_until_they_are_used_up() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "retries",
        "  - retries: {attempts: 2, retryOn: 5xx, perTryTimeout: 2s}\n    route: [{destination: {host: httpbin, port: {number: 8000}}}]",
    ));
    assert_eq!(mesh.get("retries.shop.test", "/status/503", &[("x-mark", "retries")]).status, 503);
    let line = line(&mesh, "/status/503");
    assert!(line.contains(" 503 URX "), "{line}");
    eventually("one try and two retries", || {
        let log = mesh.logs("shop/httpbin", "istio-proxy");
        match log.lines().filter(|line| line.contains("/status/503")).count() {
            3 => Ok(()),
            other => Err(other.to_string()),
        }
    });
}

#[test]
fn a_failing_pod_is_ejected() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "flaky",
        "  - retries: {attempts: 0}\n    route: [{destination: {host: flaky, port: {number: 80}}}]",
    ));
    let before = mesh.tally("flaky.shop.test", "/get", 20, |answer| answer.status.to_string());
    assert!(before.get("503").is_some_and(|failed| (5..=15).contains(failed)), "a dead pod takes its turn: {before:?}");
    let _rule = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: flaky, namespace: shop}
spec:
  host: flaky
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 2, interval: 1s, baseEjectionTime: 60s, maxEjectionPercent: 100}
",
    );
    let after = mesh.tally("flaky.shop.test", "/get", 60, |answer| answer.status.to_string());
    assert_eq!(after.get("503"), Some(&2), "ejected after two: {after:?}");
}

#[test]
fn more_pending_requests_than_allowed_overflow() {
    let mesh = TRAFFIC.turn();
    let _objects = mesh.with(&format!(
        "{}\n---\n{}",
        virtual_service(
            "pool",
            "  - retries: {attempts: 0}\n    route: [{destination: {host: httpbin, port: {number: 8000}}}]"
        ),
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: httpbin, namespace: shop}
spec:
  host: httpbin
  trafficPolicy:
    connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1, maxRequestsPerConnection: 1}}
"
    ));
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..6).map(|_| scope.spawn(|| mesh.get("pool.shop.test", "/delay/1", &[]))).collect();
        calls.into_iter().map(|call| call.join().unwrap().status).collect()
    });
    let count = |status| statuses.iter().filter(|have| **have == status).count();
    assert_eq!((count(200), count(503)), (2, 4), "one served, one waits, four overflow: {statuses:?}");
    let log = mesh.logs(GATEWAY, "istio-proxy");
    assert!(log.lines().any(|line| line.contains("/delay/1") && line.contains(" 503 UO ")), "{log}");
}
