//! Bytes, HTTP/2 and gRPC.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use testkit::{Client2, Mesh, eventually, grpc};

use crate::apps::{TRAFFIC, virtual_service};
use crate::stats::assert_share;

/// Says `hi` to the echo of the address and reads a line.
fn echo(mesh: &Mesh, whence: &str, host: &str, port: u16) -> String {
    echoes(mesh, whence, host, port, 1).pop_first().map_or_else(String::new, |(line, _)| line)
}

/// How often each line comes back from as many connections, one after the other.
fn echoes(mesh: &Mesh, whence: &str, host: &str, port: u16, count: usize) -> BTreeMap<String, usize> {
    let script = format!(
        "for _ in {{1..{count}}}; do exec 3<>/dev/tcp/{host}/{port}; echo hi >&3; read -r -t 10 line <&3; echo \"$line\"; exec 3>&-; done"
    );
    let output = mesh.exec(whence, &["bash", "-c", &script]);
    let mut out = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        *out.entry(line.to_owned()).or_default() += 1;
    }
    out
}

fn echo_route(v1: u32, v2: u32) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: echo, namespace: shop}}
spec: {{host: echo, subsets: [{{name: v1, labels: {{version: v1}}}}, {{name: v2, labels: {{version: v2}}}}]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: echo, namespace: shop}}
spec:
  hosts: [echo]
  tcp:
  - match: [{{port: 9000}}]
    route: [{{destination: {{host: echo, subset: v1}}, weight: {v1}}}, {{destination: {{host: echo, subset: v2}}, weight: {v2}}}]
"
    )
}

#[test]
fn bytes_are_routed_by_weight() {
    let mesh = TRAFFIC.turn();
    let _objects = mesh.with(&echo_route(100, 0));
    assert_eq!(echoes(&mesh, "shop/curl", "echo", 9000, 10), [("one hi".to_owned(), 10)].into());
    mesh.apply(&echo_route(0, 100));
    assert_eq!(echoes(&mesh, "shop/curl", "echo", 9000, 10), [("two hi".to_owned(), 10)].into());
    mesh.apply(&echo_route(80, 20));
    let seen = echoes(&mesh, "shop/curl", "echo", 9000, 300);
    assert_eq!(seen.values().sum::<usize>(), 300, "{seen:?}");
    assert_share("80/20", seen.get("two hi").copied().unwrap_or(0), 300, 0.2);
}

#[test]
fn connections_of_a_client_stick_to_a_pod_by_its_address() {
    let mesh = TRAFFIC.turn();
    let _rule = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: echo, namespace: shop}
spec: {host: echo, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true}}}}
",
    );
    let seen = echoes(&mesh, "shop/curl", "echo", 9000, 20);
    assert!(seen.values().eq([&20]) && !seen.contains_key(""), "{seen:?}");
}

#[test]
fn bytes_between_proxies_are_mutual_tls_on_the_wire() {
    let mesh = TRAFFIC.turn();
    // A pod without a proxy that says it has one: it sees what a proxy would, and logs it.
    let tap = crate::apps::workload("shop", "tap", "v1", "docker.io/istio/tcp-echo-server:1.3", Some(9000), "\"9000\"")
        .replace("version: v1}", "version: v1, sidecar.istio.io/inject: \"false\", security.istio.io/tlsMode: istio}");
    let _tap = mesh.with(&format!("{tap}\n---\n{}", crate::apps::service("shop", "tap", "{name: tcp, port: 9000}")));
    mesh.must(&["rollout", "status", "deploy/tap", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    let log = eventually("the tap's log", || {
        // Its endpoint may have to become ready first.
        echo(&mesh, "shop/curl", "tap", 9000);
        let log = mesh.logs("shop/tap", "app");
        if log.contains("request:") { Ok(log) } else { Err(log) }
    });
    assert!(log.contains("request: \\x16\\x03\\x01"), "a ClientHello: {log}");
    assert!(!log.contains("request: hi"), "nothing in the clear: {log}");

    // And the real one knows whom it talks to.
    assert!(echo(&mesh, "shop/curl", "echo", 9000).ends_with(" hi"));
    let metrics = |pod: &str| mesh.curl(pod, &["http://127.0.0.1:15090/stats/prometheus"]).body;
    eventually("the connection in the server's metrics", || {
        let wanted = [
            "istio_tcp_connections_opened_total{reporter=\"destination\"",
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/curl\"",
            "destination_principal=\"spiffe://cluster.local/ns/shop/sa/echo\"",
            "connection_security_policy=\"mutual_tls\"",
        ];
        let all = metrics("shop/echo") + &metrics("shop/echo-v2");
        let found = all.lines().any(|line| wanted.iter().all(|part| line.contains(part)));
        let near: Vec<&str> = all.lines().filter(|line| line.starts_with("istio_tcp_connections_opened")).collect();
        if found { Ok(()) } else { Err(near.join("\n")) }
    });
}

/// A client of the gRPC echo, and the host it calls.
type Way<'a> = (&'a str, Box<dyn Fn() -> Client2 + 'a>, &'a str);

/// Through the gateway and the server's sidecar; through two sidecars; through the gateway's TLS
/// is `gateway.rs`'s.
fn both_ways(mesh: &Mesh) -> [Way<'_>; 2] {
    [
        ("gateway", Box::new(|| Client2::plain(mesh.http).unwrap()), "grpc.shop.test"),
        ("sidecars", Box::new(|| Client2::over(mesh.dial("shop/curl", "grpc", 7070)).unwrap()), "grpc:7070"),
    ]
}

fn grpc_route() -> String {
    virtual_service("grpc", "  - route: [{destination: {host: grpc, port: {number: 7070}}}]")
}

#[test]
fn unary_calls_pass_with_their_trailers() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&grpc_route());
    for (way, open, host) in both_ways(&mesh) {
        grpc::unary(way, &open(), host);
    }
}

#[test]
fn client_streams_pass_message_by_message() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&grpc_route());
    for (way, open, host) in both_ways(&mesh) {
        grpc::client_stream(way, &open(), host);
    }
}

#[test]
fn server_streams_pass_message_by_message() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&grpc_route());
    for (way, open, host) in both_ways(&mesh) {
        grpc::server_stream(way, &open(), host);
        grpc::early_server_stream(way, &open(), host);
    }
}

#[test]
fn both_streams_are_open_at_once() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&grpc_route());
    for (way, open, host) in both_ways(&mesh) {
        grpc::both_streams(way, &open(), host);
    }
}

/// In by the gateway's TLS, to an application that passes each call on to another one: the gateway, three
/// sidecars and two programs of one call.
#[test]
fn a_call_passes_through_gateway_sidecars_and_applications() {
    let mesh = TRAFFIC.turn();
    let host = "chain.shop.test";
    let pair = crate::gateway::pair(host);
    let front = [
        crate::apps::workload("shop", "front", "v1", "lateen/grpc-echo", Some(7070), ""),
        crate::apps::service("shop", "front", "{name: grpc, port: 7070}"),
        pair.secret.clone(),
        crate::gateway::https("chain")
            .replace("{host: httpbin, port: {number: 8000}}", "{host: front, port: {number: 7070}}"),
    ];
    let _objects = mesh.with(&front.join("\n---\n"));
    mesh.must(&["rollout", "status", "deploy/front", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    let client = eventually("HTTP/2 over TLS at the gateway", || {
        Client2::tls(mesh.https, host, &pair.root).map_err(|error| error.to_string())
    });
    let client = client.with_header("x-echo-forward", "grpc:7070");
    let answer = client.unary(host, "/echo.Echo/Unary", &[("user-agent", "chained")], b"hello").unwrap();
    let [via, by] = ["x-echo-via", "x-echo-host"].map(|name| answer.header(name).unwrap_or_default());
    assert!(via.starts_with("front-") && by.starts_with("grpc-"), "{answer:?}");
    let way = "gateway, front, grpc";
    grpc::unary(way, &client, host);
    grpc::client_stream(way, &client, host);
    grpc::server_stream(way, &client, host);
    grpc::both_streams(way, &client, host);
    grpc::cancellation(way, &client, host);
    // Every hop was one of HTTP/2, and those between proxies of mutual TLS.
    for (whence, cluster) in [
        ("istio-system/istio-ingressgateway", "outbound|7070||front.shop.svc.cluster.local"),
        ("shop/front", "inbound|7070||"),
        ("shop/front", "outbound|7070||grpc.shop.svc.cluster.local"),
        ("shop/grpc", "inbound|7070||"),
    ] {
        eventually(&format!("the call in {whence}'s log"), || {
            let log = mesh.logs(whence, "istio-proxy");
            let is_ours = |line: &&str| line.contains("\"chained\"") && line.contains(cluster);
            let line = log.lines().find(is_ours).ok_or("no line of it")?;
            let begin = "\"POST /echo.Echo/Unary HTTP/2\" 200 - via_upstream ";
            if line.contains(begin) { Ok(()) } else { Err(line.to_owned()) }
        });
    }
    for (whence, reporter, source) in
        [("shop/front", "destination", "istio-ingressgateway"), ("shop/grpc", "destination", "front")]
    {
        let page = mesh.curl(whence, &["http://127.0.0.1:15090/stats/prometheus"]).body;
        let wanted = [
            format!("reporter=\"{reporter}\",source_workload=\"{source}\""),
            "request_protocol=\"grpc\"".to_owned(),
            "connection_security_policy=\"mutual_tls\"".to_owned(),
        ];
        let counted = page.lines().any(|line| wanted.iter().all(|part| line.contains(part)));
        assert!(counted, "{whence}: {wanted:?} in {page}");
    }
}

/// A stream that is open when the gateway's certificate is replaced goes on, over the connection it began on.
#[test]
fn a_stream_outlives_the_gateways_certificate() {
    let mesh = TRAFFIC.turn();
    let host = "lasting.shop.test";
    let (old, new) = (crate::gateway::pair(host), crate::gateway::pair(host));
    let _secret = mesh.with(&old.secret);
    let _gateway = mesh.with(
        &crate::gateway::https("lasting")
            .replace("{host: httpbin, port: {number: 8000}}", "{host: grpc, port: {number: 7070}}"),
    );
    let open = |root: &[u8]| Client2::tls(mesh.https, host, root).map_err(|error| error.to_string());
    let client = eventually("HTTP/2 over TLS at the gateway", || open(&old.root));
    let mut call = client.call(host, "/echo.Echo/Chat", &[]).unwrap();
    let mut turn = |text: &str| {
        call.say(text.as_bytes()).unwrap();
        assert_eq!(call.hear().unwrap().as_deref(), Some(text.as_bytes()));
    };
    turn("before");
    mesh.apply(&new.secret);
    let fresh = eventually("the new certificate", || open(&new.root));
    assert!(open(&old.root).is_err(), "the old one is gone");
    turn("after");
    // New streams of the old connection are served, too, as those of a new one are.
    grpc::unary("the old connection", &client, host);
    grpc::unary("a new connection", &fresh, host);
    turn("last");
    call.end().unwrap();
    assert_eq!(call.hear().unwrap(), None);
    assert_eq!(call.trailers().unwrap(), [("grpc-status".to_owned(), "0".to_owned())]);
}

#[test]
fn many_streams_share_a_connection() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&grpc_route());
    for (way, open, host) in both_ways(&mesh) {
        let client = open();
        let mut calls: Vec<_> = (0..30).map(|_| client.call(host, "/echo.Echo/Chat", &[]).unwrap()).collect();
        for (index, call) in calls.iter_mut().enumerate() {
            call.say(format!("{way} {index}").as_bytes()).unwrap();
        }
        for (index, call) in calls.iter_mut().enumerate().rev() {
            assert_eq!(call.hear().unwrap().as_deref(), Some(format!("{way} {index}").as_bytes()));
        }
    }
}

#[test]
fn a_cancelled_call_is_cancelled_at_the_server() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&grpc_route());
    for (way, open, host) in both_ways(&mesh) {
        grpc::cancellation(way, &open(), host);
    }
}

#[test]
fn a_call_ends_at_its_deadline() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&grpc_route());
    for (way, open, host) in both_ways(&mesh) {
        let client = open();
        let began = Instant::now();
        let headers = [("x-echo-delay-ms", "20000"), ("grpc-timeout", "500m")];
        let answer = client.unary(host, "/echo.Echo/Unary", &headers, b"hello").unwrap();
        // 504 is told as UNAVAILABLE, DEADLINE_EXCEEDED where the stream's own limit ended it.
        assert!(matches!(answer.header("grpc-status"), Some("4" | "14")), "{way}: {answer:?}");
        let took = began.elapsed();
        assert!((Duration::from_millis(450)..Duration::from_secs(20)).contains(&took), "{way}: {took:?}");
    }
}

#[test]
fn answers_of_the_mesh_are_grpcs_own() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&virtual_service(
        "grpc",
        "  - match: [{uri: {prefix: /echo.Echo/Abort}}]
    fault: {abort: {grpcStatus: UNAVAILABLE, percentage: {value: 100}}}
    route: [{destination: {host: grpc, port: {number: 7070}}}]
  - match: [{uri: {prefix: /echo.Echo/}}]
    route: [{destination: {host: grpc, port: {number: 7070}}}]",
    ));
    let client = Client2::plain(mesh.http).unwrap();
    let check = |host: &str, method: &str, expect: (&str, &str)| {
        let answer = client.unary(host, method, &[], b"x").unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        let said = (answer.header("grpc-status").unwrap_or(""), answer.header("grpc-message").unwrap_or(""));
        assert_eq!(said, expect, "{host}{method}: {answer:?}");
    };
    check("grpc.shop.test", "/echo.Echo/Abort", ("14", "fault filter abort"));
    // No route is UNIMPLEMENTED, by host and by path.
    check("grpc.shop.test", "/other/Method", ("12", ""));
    check("nobody.example", "/echo.Echo/Unary", ("12", ""));
}

#[test]
fn an_http1_client_reaches_an_http2_server() {
    let mesh = TRAFFIC.turn();
    let _route = mesh.with(&grpc_route());
    let answer = mesh.get("grpc.shop.test", "/anything", &[]);
    assert_eq!((answer.status, answer.header("x-echo-protocol")), (200, Some("HTTP/2")), "{answer:?}");
    let answer = mesh.curl("shop/curl", &["--http1.1", "http://grpc:7070/anything"]);
    assert_eq!((answer.status, answer.header("x-echo-protocol")), (200, Some("HTTP/2")), "{answer:?}");
}

#[test]
fn an_http2_client_reaches_an_http1_server() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("down", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let big = "y".repeat(200_000);
    let through = Client2::plain(mesh.http).unwrap();
    let between = Client2::over(mesh.dial("shop/curl", "httpbin", 8000)).unwrap();
    for (client, host) in [(&through, "down.shop.test"), (&between, "httpbin:8000")] {
        let mut stream = client.open("POST", host, "/anything", &[("x-a", "b")], false).unwrap();
        stream.push(big.as_bytes()).unwrap();
        stream.end().unwrap();
        let answer = stream.rest().unwrap();
        let seen = answer.json();
        assert_eq!((answer.status, &seen["headers"]["x-a"][0]), (200, &"b".into()));
        assert_eq!(seen["data"].as_str().map(str::len), Some(big.len()), "{host}");
    }
}
