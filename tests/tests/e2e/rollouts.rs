//! Changes under load: pods come and go, certificates are replaced, and nobody notices.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use testkit::{Client, Client2, Mesh, Response, eventually};

use crate::apps::{TRAFFIC, virtual_service};
use crate::stats::assert_share;

/// Keeps `clients` connections busy until `during` is done. Every request must be answered with 200;
/// answers how often that was. A connection that was closed between two answers, as HTTP/1.1 allows
/// after `connection: close` and HTTP/2 after GOAWAY, is opened anew.
pub(crate) fn under_load<C>(
    mesh: &Mesh,
    clients: usize,
    open: impl Fn() -> io::Result<C> + Sync,
    send: impl Fn(&mut C) -> io::Result<Response> + Sync,
    during: impl FnOnce(),
) -> usize {
    let load = Load { stop: AtomicBool::new(false), served: AtomicUsize::new(0) };
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..clients).map(|_| scope.spawn(|| load.run(mesh, &open, &send))).collect();
        // Also when `during` fails, or the load would go on for ever.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually("the load to be on", || match load.served.load(Ordering::Relaxed) {
                few @ 0..5 => Err(few.to_string()),
                _ => Ok(()),
            });
            during();
        }));
        load.stop.store(true, Ordering::Relaxed);
        for run in runs {
            run.join().unwrap();
        }
        if let Err(failure) = result {
            std::panic::resume_unwind(failure);
        }
    });
    load.served.into_inner()
}

struct Load {
    stop: AtomicBool,
    served: AtomicUsize,
}

impl Load {
    fn run<C>(&self, mesh: &Mesh, open: &impl Fn() -> io::Result<C>, send: &impl Fn(&mut C) -> io::Result<Response>) {
        let mut client = open().unwrap();
        while !self.stop.load(Ordering::Relaxed) {
            match send(&mut client) {
                Ok(answer) if answer.status == 200 => {
                    self.served.fetch_add(1, Ordering::Relaxed);
                    if answer.header("connection") == Some("close") {
                        client = open().unwrap();
                    }
                }
                Ok(answer) => {
                    panic!("after {}: {answer:?}\n{}", self.served.load(Ordering::Relaxed), tell(mesh, &answer))
                }
                Err(error) => panic!("after {}: {error}\n{}", self.served.load(Ordering::Relaxed), all_logs(mesh)),
            }
        }
    }
}

/// What the logs say of a failed request.
fn tell(mesh: &Mesh, answer: &Response) -> String {
    let code = format!(" {} ", answer.status);
    let lines: Vec<String> = proxies(mesh)
        .into_iter()
        .flat_map(|(pod, log)| {
            let bad: Vec<String> =
                log.lines().filter(|line| line.contains(&code)).map(|line| format!("{pod}: {line}")).collect();
            bad.into_iter().rev().take(3)
        })
        .collect();
    format!("{}\n{}", lines.join("\n"), mesh.must(&["get", "pods", "-A", "-o", "wide"], ""))
}

fn all_logs(mesh: &Mesh) -> String {
    let tails = proxies(mesh).into_iter().map(|(pod, log)| {
        let tail: Vec<&str> = log.lines().rev().take(4).collect();
        format!("{pod}:\n{}", tail.join("\n"))
    });
    tails.collect::<Vec<_>>().join("\n")
}

/// The logs of the proxies that load passes.
fn proxies(mesh: &Mesh) -> Vec<(String, String)> {
    let pods = mesh.must(&["get", "pods", "-A"], "");
    let rows = pods.lines().filter(|row| row.starts_with("shop ") || row.contains(" istio-ingressgateway"));
    rows.map(|row| {
        let words: Vec<&str> = row.split_whitespace().collect();
        // A pod may be gone by now.
        let log = mesh.command(&["logs", words[1], "-n", words[0], "-c", "istio-proxy", "--tail", "200"], "");
        (words[1].to_owned(), String::from_utf8_lossy(&log.stdout).into_owned())
    })
    .collect()
}

/// Two replicas, all replaced one after the other, and back to one.
fn roll(mesh: &Mesh, deployment: &str) {
    let target = format!("deploy/{deployment}");
    let done = || mesh.must(&["rollout", "status", &target, "-n", "shop", "--timeout", "120"], "");
    mesh.must(&["scale", &target, "--replicas", "2", "-n", "shop"], "");
    done();
    mesh.must(&["rollout", "restart", &target, "-n", "shop"], "");
    done();
    mesh.must(&["scale", &target, "--replicas", "1", "-n", "shop"], "");
    done();
}

#[test]
fn http1_through_the_gateway_survives_a_rolling_restart_and_scaling() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("rolling", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let send = |client: &mut Client| client.send("GET", "rolling.shop.test", "/get", &[]);
    let served = under_load(&mesh, 2, || Client::plain(mesh.http), send, || roll(&mesh, "httpbin"));
    assert!(served > 50, "the load was on: {served}");
}

#[test]
fn http2_through_the_gateway_survives_a_rolling_restart_and_scaling() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("rolling", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let send = |client: &mut Client2| client.send("GET", "rolling.shop.test", "/get", &[]);
    let served = under_load(&mesh, 2, || Client2::plain(mesh.http), send, || roll(&mesh, "httpbin"));
    assert!(served > 50, "the load was on: {served}");
}

#[test]
fn grpc_through_the_gateway_survives_a_rolling_restart_and_scaling() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("rolling", "  - route: [{destination: {host: grpc, port: {number: 7070}}}]"));
    let served = under_load(
        &mesh,
        2,
        || Client2::plain(mesh.http),
        |client| grpc(client, "rolling.shop.test"),
        || roll(&mesh, "grpc"),
    );
    assert!(served > 50, "the load was on: {served}");
}

/// A call whose failure, which gRPC tells in an answer of 200, is one.
fn grpc(client: &Client2, host: &str) -> io::Result<Response> {
    let mut answer = client.unary(host, "/echo.Echo/Unary", &[], b"hello")?;
    if answer.trailer("grpc-status") != Some("0") {
        answer.status = 503;
    }
    Ok(answer)
}

#[test]
fn http1_between_sidecars_survives_a_rolling_restart_and_scaling() {
    let mesh = TRAFFIC.turn();
    let open = || Ok(Client::over(mesh.dial("shop/curl", "httpbin", 8000)));
    let send = |client: &mut Client| client.send("GET", "httpbin:8000", "/get", &[]);
    let served = under_load(&mesh, 2, open, send, || roll(&mesh, "httpbin"));
    assert!(served > 50, "the load was on: {served}");
}

#[test]
fn http2_between_sidecars_survives_a_rolling_restart_and_scaling() {
    let mesh = TRAFFIC.turn();
    let open = || Client2::over(mesh.dial("shop/curl", "grpc", 7070));
    let served = under_load(&mesh, 2, open, |client| grpc(client, "grpc:7070"), || roll(&mesh, "grpc"));
    assert!(served > 50, "the load was on: {served}");
}

#[test]
fn two_replicas_share_the_requests() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("shared", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    mesh.must(&["scale", "deploy/httpbin", "--replicas", "2", "-n", "shop"], "");
    mesh.must(&["rollout", "status", "deploy/httpbin", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    let host = || mesh.get("shared.shop.test", "/hostname", &[]).body;
    let first = host();
    eventually("the other one", || if host() == first { Err(first.clone()) } else { Ok(()) });
    let tally: BTreeMap<String, usize> = mesh.tally("shared.shop.test", "/hostname", 60, |answer| answer.body.clone());
    mesh.must(&["scale", "deploy/httpbin", "--replicas", "1", "-n", "shop"], "");
    mesh.must(&["rollout", "status", "deploy/httpbin", "-n", "shop", "--timeout", "120"], "");
    assert_eq!(tally.len(), 2, "{tally:?}");
    assert_share("each has its half", *tally.values().next().unwrap(), 60, 0.5);
}
