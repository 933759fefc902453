//! Connections to upstreams: what they speak, how many, how long they live.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};

use serde_json::{Value, json};
use testkit::{Client, Client2, Mesh, Puppet, eventually};

use crate::apps::{COLLECTOR, TRAFFIC, puppet};
use crate::destinations::address;

const CLIENT: &str = "shop/curl";

/// A rule with this connection pool, in the client's namespace.
fn pool(host: &str, settings: &str) -> String {
    let name = host.split('.').next().unwrap_or(host);
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: pool-{name}, namespace: shop}}\nspec: {{host: {host}, trafficPolicy: {{connectionPool: {{{settings}}}}}}}\n"
    )
}

/// Another Service of pods that have one.
fn service(namespace: &str, name: &str, app: &str, port: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{selector: {{app: {app}}}, ports: [{port}]}}\n"
    )
}

/// A line of a proxy's log that says all of this.
#[track_caller]
fn logged(mesh: &Mesh, whence: &str, words: &[&str]) {
    eventually(&format!("a line with {words:?}"), || {
        let log = mesh.logs(whence, "istio-proxy");
        if log.lines().any(|line| words.iter().all(|word| line.contains(word))) { Ok(()) } else { Err(log) }
    });
}

/// What is under way in a proxy towards a cluster.
fn state(mesh: &Mesh, whence: &str, cluster: &str) -> Value {
    mesh.curl(whence, &["http://127.0.0.1:15000/lateen/state"]).json()["clusters"][cluster].clone()
}

#[test]
fn connections_speak_what_the_rule_says_or_what_the_client_does() {
    let mesh = TRAFFIC.turn();
    let mut number = 0;
    // The server's proxy tells what came to it.
    let mut check = |is_http2: bool, expect: &str| {
        number += 1;
        let path = format!("/get?speaks={number}");
        let tunnel = mesh.dial(CLIENT, "httpbin.shop", 8000);
        let answer = if is_http2 {
            Client2::over(tunnel).unwrap().send("GET", "httpbin.shop:8000", &path, &[])
        } else {
            Client::over(tunnel).send("GET", "httpbin.shop:8000", &path, &[])
        };
        assert_eq!(answer.unwrap().status, 200);
        logged(&mesh, "shop/httpbin", &[&format!("\"GET {path} {expect}\"")]);
    };
    check(false, "HTTP/1.1");
    check(true, "HTTP/1.1");
    let _rule = mesh.with(&pool("httpbin", "http: {h2UpgradePolicy: UPGRADE}"));
    check(false, "HTTP/2");
    mesh.apply(&pool("httpbin", "http: {useClientProtocol: true}"));
    check(false, "HTTP/1.1");
    check(true, "HTTP/2");
}

#[test]
fn a_websocket_passes_between_proxies_over_either_protocol() {
    const SERVER: &str = "shop/puppet";
    let mesh = TRAFFIC.turn();
    let _server = mesh.with(&puppet("shop"));
    eventually("the server to answer", || {
        let answer = mesh.curl(CLIENT, &["http://puppet.shop:8000/"]);
        if answer.status == 200 { Ok(()) } else { Err(format!("{answer:?}")) }
    });
    let upgrade = json!({"upgrade": "websocket", "connection": "upgrade"});
    Puppet::new(&mesh, SERVER).answers(&json!([{ "path": "/ws", "status": 101, "headers": upgrade, "echoes": true }]));
    let talk = |number: u32, expect: &str| {
        let path = format!("/ws?{number}");
        let mut stream = mesh.dial(CLIENT, "puppet.shop", 8000);
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: puppet.shop:8000\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 101 ") && answer.contains("upgrade: websocket\r\n"), "{answer}");
        stream.write_all(b"said").unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"said");
        drop(stream);
        logged(&mesh, SERVER, &[&format!("\"GET {path} {expect}\" 101")]);
    };
    talk(1, "HTTP/1.1");
    let _rule = mesh.with(&pool("puppet.shop.svc.cluster.local", "http: {h2UpgradePolicy: UPGRADE}"));
    talk(2, "HTTP/2");
}

#[test]
fn connections_carry_so_many_requests_and_idle_ones_are_closed() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let objects = [
        service("plain", "always", "puppet", "{name: http, port: 8020, targetPort: 8000}"),
        service("plain", "twice", "puppet", "{name: http, port: 8021, targetPort: 8000}"),
        service("plain", "brief", "puppet", "{name: http, port: 8022, targetPort: 8000}"),
        pool("twice.plain.svc.cluster.local", "http: {maxRequestsPerConnection: 2}"),
        pool("brief.plain.svc.cluster.local", "http: {idleTimeout: 1s}"),
    ];
    let _objects = mesh.with(&objects.join("---\n"));
    let ask = |host: &str, port: u16, count: usize| {
        let mut client = Client::over(mesh.dial(CLIENT, &format!("{host}.plain"), port));
        for _ in 0..count {
            let answer = client.send("GET", &format!("{host}.plain:{port}"), &format!("/{host}"), &[]);
            assert_eq!(answer.unwrap().status, 200);
        }
        let of_host = format!("/{host}");
        let seen = puppet.seen();
        seen.iter().filter(|seen| seen["path"] == of_host).map(|seen| seen["connection"].clone()).collect::<Vec<_>>()
    };
    let kept = ask("always", 8020, 4);
    assert!(kept.iter().all(|connection| *connection == kept[0]), "kept: {kept:?}");
    let twice = ask("twice", 8021, 4);
    assert!(twice[0] == twice[1] && twice[1] != twice[2] && twice[2] == twice[3], "two each: {twice:?}");
    let of = |host: &str, port: u16| state(&mesh, CLIENT, &format!("outbound|{port}||{host}.plain.svc.cluster.local"));
    // Later Null has to mean a cluster at rest, and not a name that no cluster has.
    let open = of("always", 8020);
    assert!(open["connections"].as_u64() > Some(0), "one is kept: {open}");
    let closed = |host: &str, port: u16| {
        eventually("the idle connection to be closed", || match of(host, port) {
            Value::Null => Ok(()),
            open => Err(open.to_string()),
        });
    };
    let first = ask("brief", 8022, 1);
    closed("brief", 8022);
    let second = ask("brief", 8022, 1);
    assert!(second.len() == 2 && second[0] == first[0] && second[1] != first[0], "a new one: {second:?}");
    // A rule that comes later holds for the connection that is there already.
    let _later = mesh.with(&pool("always.plain.svc.cluster.local", "http: {idleTimeout: 1s}"));
    assert_eq!(ask("always", 8020, 1).len(), 5);
    closed("always", 8020);
}

/// Our ends of a pod's established connections towards this port.
fn established(mesh: &Mesh, whence: &str, port: u16) -> BTreeSet<String> {
    sockets(mesh, whence, port).into_iter().filter(|line| line[3] == "01").map(|line| line[1].clone()).collect()
}

#[test]
fn connections_to_a_service_that_is_gone_are_closed() {
    let mesh = TRAFFIC.turn();
    let service = mesh.with(&service("plain", "passing", "httpbin", "{name: http, port: 8030, targetPort: 80}"));
    let before = established(&mesh, CLIENT, 80);
    assert_eq!(mesh.curl(CLIENT, &["http://passing.plain:8030/get"]).status, 200);
    let kept: Vec<String> = established(&mesh, CLIENT, 80).difference(&before).cloned().collect();
    assert!(!kept.is_empty(), "one is kept for the next request");
    drop(service);
    eventually("they are closed", || {
        let open = established(&mesh, CLIENT, 80);
        if kept.iter().any(|end| open.contains(end)) { Err(format!("{open:?}")) } else { Ok(()) }
    });
}

/// Reads until the other side closes.
fn until_closed(mut tunnel: testkit::Tunnel) -> String {
    let mut all = String::new();
    tunnel.read_to_string(&mut all).unwrap();
    all
}

/// The kernel's lines of a pod's sockets towards this port: number, local end, remote end, state (1: established),
/// queues, timer (2: keep-alive), …
fn sockets(mesh: &Mesh, whence: &str, port: u16) -> Vec<Vec<String>> {
    let table = String::from_utf8(mesh.exec(whence, &["cat", "/proc/net/tcp"]).stdout).unwrap();
    let to_port = format!(":{port:04X}");
    let lines = table.lines().map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    lines.filter(|line| line.len() > 5 && line[2].ends_with(&to_port)).collect()
}

/// On how many of them the kernel runs a keep-alive timer.
fn kept_alive(mesh: &Mesh, whence: &str, port: u16) -> usize {
    sockets(mesh, whence, port).iter().filter(|line| line[5].starts_with("02:")).count()
}

#[test]
fn connections_of_bytes_end_by_idleness_and_age_and_are_kept_alive() {
    let mesh = TRAFFIC.turn();
    // The server's own proxy reads the rule too: its side of a connection ends no later.
    let objects = [
        service("shop", "idle", "echo", "{name: tcp, port: 9101, targetPort: 9000}"),
        service("shop", "aged", "echo", "{name: tcp, port: 9102, targetPort: 9000}"),
        service("shop", "alive", "echo", "{name: tcp, port: 9103, targetPort: 9000}"),
        pool("idle", "tcp: {idleTimeout: 2s}"),
        pool("aged", "tcp: {maxConnectionDuration: 2s}"),
        pool("alive", "tcp: {tcpKeepalive: {time: 600s}}"),
    ];
    let _objects = mesh.with(&objects.join("---\n"));
    until_closed(mesh.dial(CLIENT, "idle", 9101));
    until_closed(mesh.dial(CLIENT, "aged", 9102));
    logged(&mesh, CLIENT, &["outbound|9102||aged.shop", "\"- - -\" 0 DT "]);

    assert_eq!(kept_alive(&mesh, CLIENT, 9000), 0);
    let mut alive = mesh.dial(CLIENT, "alive", 9103);
    alive.write_all(b"hi\n").unwrap();
    eventually("the timer", || match kept_alive(&mesh, CLIENT, 9000) {
        0 => Err("none".to_owned()),
        _ => Ok(()),
    });
}

#[test]
fn a_server_is_told_of_the_client_before_anything_else() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let rule = |settings: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: told, namespace: shop}}\nspec: {{host: told.plain.svc.cluster.local, trafficPolicy: {{proxyProtocol: {settings}}}}}\n"
        )
    };
    let service = service("plain", "told", "puppet", "{name: tcp, port: 8040, targetPort: 8001}");
    let _objects = mesh.with(&format!("{service}---\n{}", rule("{}")));
    let told = |what: &str, preamble: &[u8]| {
        let mut tunnel = mesh.dial(CLIENT, "told.plain", 8040);
        tunnel.write_all(b"hi\n").unwrap();
        eventually(what, || {
            let seen = puppet.raw();
            if seen.iter().any(|bytes| bytes.starts_with(preamble)) { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    };
    let address = address(&mesh, "shop", "curl");
    told("version 1, unless it says otherwise", format!("PROXY TCP4 {address} ").as_bytes());
    mesh.apply(&rule("{version: V2}"));
    told("version 2", b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
}

#[test]
fn a_rules_pool_bounds_the_servers_own_proxy() {
    let mesh = TRAFFIC.turn();
    let _rule = mesh.with(&pool("httpbin", "http: {http2MaxRequests: 1}"));
    // A client without a proxy: nothing but the server's counts.
    let mut held = mesh.dial("plain/curl", "httpbin.shop", 8000);
    held.write_all(b"GET /delay/60 HTTP/1.1\r\nhost: httpbin.shop\r\n\r\n").unwrap();
    eventually("the request to be at the application", || {
        let inbound = state(&mesh, "shop/httpbin", "inbound|80||");
        if inbound["requests"] == json!(1) { Ok(()) } else { Err(inbound.to_string()) }
    });
    let refused = mesh.curl("plain/curl", &["http://httpbin.shop:8000/get?one-too-many"]);
    assert_eq!((refused.status, refused.header("x-envoy-overloaded")), (503, Some("true")), "{refused:?}");
    logged(&mesh, "shop/httpbin", &["/get?one-too-many", " 503 UO "]);
    drop(held);
    eventually("its place is free", || match mesh.curl("plain/curl", &["http://httpbin.shop:8000/get"]).status {
        200 => Ok(()),
        other => Err(other.to_string()),
    });
}
