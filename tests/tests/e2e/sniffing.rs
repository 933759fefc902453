//! Ports that do not say their protocol, and servers that speak first.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use testkit::{Client, Client2, Mesh, eventually};

use crate::apps::{DETECTION, TRAFFIC};

/// Sends bytes from a pod and reads until `enough`.
fn exchange(mesh: &Mesh, whence: &str, host: &str, port: u16, bytes: &[u8], enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut tunnel = mesh.dial(whence, host, port);
    tunnel.write_all(bytes).unwrap();
    tunnel.flush().unwrap();
    let mut seen = Vec::new();
    let mut buf = [0; 4096];
    while !enough(&seen) {
        match tunnel.read(&mut buf).unwrap() {
            0 => break,
            n => seen.extend_from_slice(&buf[..n]),
        }
    }
    seen
}

/// The last line about the service `any` in the log of the caller's proxy.
fn last_line(mesh: &Mesh, mark: &str) -> String {
    eventually("the access log", || {
        let log = mesh.logs("shop/curl", "istio-proxy");
        let found = log.lines().rfind(|line| line.contains("outbound|9000||any.shop") && line.contains(mark));
        found.map(str::to_owned).ok_or_else(|| log.lines().last().unwrap_or_default().to_owned())
    })
}

#[test]
fn an_unnamed_port_carries_http_of_both_versions_tls_and_bytes() {
    let mesh = TRAFFIC.turn();
    // HTTP/1.1 stays HTTP/1.1, and the Host header does not matter.
    let mut client = Client::over(mesh.dial("shop/curl", "any", 9000));
    for host in ["any:9000", "nonsense"] {
        let answer = client.send("GET", host, "/anything/sniffed", &[]).unwrap();
        assert_eq!((answer.status, &answer.json()["method"]), (200, &"GET".into()), "{answer:?}");
    }
    assert!(last_line(&mesh, "/anything/sniffed").contains("\"GET /anything/sniffed HTTP/1.1\" 200 - via_upstream"));

    // HTTP/2 stays HTTP/2.
    let client = Client2::over(mesh.dial("shop/curl", "any", 9000)).unwrap();
    let answer = client.unary("any:9000", "/echo.Echo/Sniffed", &[], b"hello").unwrap();
    assert_eq!((answer.header("x-echo-protocol"), answer.trailer("grpc-status")), (Some("HTTP/2"), Some("0")));
    assert!(last_line(&mesh, "/echo.Echo/Sniffed").contains("HTTP/2\" 200"), "as HTTP");

    // Other bytes pass as they are.
    let seen = exchange(&mesh, "shop/curl", "any", 9000, b"neither one\n", |seen| seen.ends_with(b"\n"));
    assert_eq!(seen, b"bytes neither one\n");
    let line = last_line(&mesh, "\"- - -\" 0 -");
    assert!(line.contains(" 18 "), "as bytes: {line}");

    // So does TLS that is not the mesh's own: the server gets the very ClientHello.
    let hello = client_hello();
    let seen = exchange(&mesh, "shop/curl", "any", 9000, &hello, |seen| seen.len() >= hello.len() + 6);
    assert_eq!(seen, [b"bytes ", &hello[..]].concat());

    // And so does the HTTP of old.
    let seen = exchange(&mesh, "shop/curl", "any", 9000, b"GET /get HTTP/1.0\r\n\r\n", |_| false);
    assert!(seen.starts_with(b"HTTP/1.0 200 OK\r\n"), "{}", String::from_utf8_lossy(&seen));
    eventually("its line as bytes", || {
        let log = mesh.logs("shop/curl", "istio-proxy");
        let is_it = |line: &str| line.contains("outbound|9000||any.shop") && line.contains("\"- - -\" 0 -");
        if log.lines().any(|line| is_it(line) && line.contains(" 21 ")) { Ok(()) } else { Err(log) }
    });
}

#[test]
fn an_unnamed_port_takes_the_same_without_a_proxy_at_the_caller() {
    let mesh = TRAFFIC.turn();
    let mut client = Client::over(mesh.dial("plain/curl", "any.shop", 9000));
    assert_eq!(client.send("GET", "any.shop:9000", "/get", &[]).unwrap().status, 200);
    let client = Client2::over(mesh.dial("plain/curl", "any.shop", 9000)).unwrap();
    assert_eq!(client.unary("any.shop", "/e.E/E", &[], b"x").unwrap().trailer("grpc-status"), Some("0"));
    let seen = exchange(&mesh, "plain/curl", "any.shop", 9000, b"raw\n", |seen| seen.ends_with(b"\n"));
    assert_eq!(seen, b"bytes raw\n");
    let hello = client_hello();
    let seen = exchange(&mesh, "plain/curl", "any.shop", 9000, &hello, |seen| seen.len() >= hello.len() + 6);
    assert_eq!(seen, [b"bytes ", &hello[..]].concat());
}

/// The first flight of a TLS client that no mesh would take for its own.
pub(crate) fn client_hello() -> Vec<u8> {
    let mut random = Vec::new();
    random.extend((0_u8..32).map(|at| at.wrapping_mul(7)));
    let name = b"shop.example";
    let short = |n: usize| u16::try_from(n).unwrap().to_be_bytes().to_vec();
    let with_length = |body: Vec<u8>| [short(body.len()), body].concat();
    let server_name = with_length([vec![0], with_length(name.to_vec())].concat());
    let versions = vec![2, 3, 4];
    let extensions = [vec![0, 0], with_length(server_name), vec![0, 43], with_length(versions)].concat();
    let body = [vec![3, 3], random, vec![0, 0, 2, 0x13, 1, 1, 0], with_length(extensions)].concat();
    let message = [vec![1, 0], short(body.len()), body].concat();
    [vec![22, 3, 1], with_length(message)].concat()
}

/// Reads a server's greeting; answers it and how long it took from the connection on.
fn greeting(mesh: &Mesh, whence: &str, host: &str, port: u16) -> (String, Duration) {
    let script = format!(
        "exec 3<>/dev/tcp/{host}/{port}; began=${{EPOCHREALTIME/./}}; read -r line <&3; echo \"$((${{EPOCHREALTIME/./}} - began)) $line\""
    );
    let output = mesh.exec(whence, &["bash", "-c", &script]);
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let (took, line) = text.split_once(' ').unwrap_or_else(|| panic!("{output:?}"));
    (line.to_owned(), Duration::from_micros(took.parse().unwrap()))
}

#[test]
fn a_server_that_speaks_first_is_delayed_by_the_detection_time_at_most() {
    let mesh = TRAFFIC.turn();
    let _service = mesh.with(
        "
apiVersion: v1
kind: Service
metadata: {name: greeter, namespace: mail}
spec:
  selector: {app: maildev}
  ports: [{name: tcp-first, port: 2500, targetPort: 1025}, {name: whatever, port: 2501, targetPort: 1025}]
",
    );
    let (named, prompt) = greeting(&mesh, "shop/curl", "greeter.mail", 2500);
    assert_eq!(named, "220 maildev ESMTP");
    assert!(prompt < DETECTION, "a port that is TCP by name is not looked into: {prompt:?}");
    let (unnamed, late) = greeting(&mesh, "shop/curl", "greeter.mail", 2501);
    assert_eq!(unnamed, "220 maildev ESMTP");
    // One wait, not one at each proxy. The connection is there a moment before the proxy knows of it.
    let grain = Duration::from_millis(10);
    assert!(late + grain >= DETECTION && late < DETECTION * 2, "after the detection time: {late:?}");
}

#[test]
fn mail_goes_to_the_catcher_through_mutual_tls() {
    let mesh = TRAFFIC.turn();
    let _strict = mesh.with(
        "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: mail}
spec: {mtls: {mode: STRICT}}
",
    );
    let script = r"printf 'Subject: through the mesh\r\n\r\nhello\r\n' | curl -sS --max-time 20 smtp://maildev.mail:1025 --mail-from me@shop.test --mail-rcpt you@mail.test -T -";
    let sent = mesh.exec("shop/curl", &["bash", "-c", script]);
    assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    let mails = mesh.curl("shop/curl", &["http://maildev.mail/email"]).json();
    let found = mails.as_array().and_then(|all| all.iter().find(|mail| mail["subject"] == "through the mesh"));
    let mail = found.unwrap_or_else(|| panic!("{mails}"));
    assert_eq!((&mail["from"], &mail["to"][0]), (&"me@shop.test".into(), &"you@mail.test".into()));
    let refused = mesh.exec("plain/curl", &["bash", "-c", script]);
    assert!(!refused.status.success(), "plaintext is refused");
}

#[test]
fn the_catchers_page_is_reached_by_service_port_from_every_pod() {
    let mesh = TRAFFIC.turn();
    for whence in ["shop/curl", "plain/curl"] {
        for host in ["maildev.mail", "maildev.mail.svc.cluster.local"] {
            let answer = mesh.curl(whence, &[&format!("http://{host}/healthz")]);
            assert_eq!((answer.status, answer.body.as_str()), (200, "true"), "{whence} {host}: {answer:?}");
        }
    }
}

#[test]
fn headless_services_are_reached_by_pod_address() {
    let mesh = TRAFFIC.turn();
    let _services = mesh.with(
        "
apiVersion: v1
kind: Service
metadata: {name: httpbin-each, namespace: shop}
spec: {clusterIP: None, selector: {app: httpbin}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: echo-each, namespace: shop}
spec: {clusterIP: None, selector: {app: echo, version: v2}, ports: [{name: tcp, port: 9000}]}
---
apiVersion: v1
kind: Service
metadata: {name: any-each, namespace: shop}
spec: {clusterIP: None, selector: {app: any}, ports: [{name: whatever, port: 9000}]}
",
    );
    for whence in ["shop/curl", "plain/curl"] {
        // The names of a pod without proxy are the machine's to publish.
        for name in ["httpbin-each.shop", "echo-each.shop", "any-each.shop"] {
            eventually("the name", || {
                let found = mesh.exec(whence, &["getent", "ahostsv4", name]);
                if found.stdout.is_empty() { Err(format!("{whence}: {name}: {found:?}")) } else { Ok(()) }
            });
        }
        let answer = mesh.curl(whence, &["http://httpbin-each.shop/get"]);
        assert_eq!(answer.status, 200, "{whence}: {answer:?}");
        let seen = exchange(&mesh, whence, "echo-each.shop", 9000, b"hi\n", |seen| seen.ends_with(b"\n"));
        assert_eq!(String::from_utf8_lossy(&seen), "two hi\n", "{whence}");
        let mut client = Client::over(mesh.dial(whence, "any-each.shop", 9000));
        assert_eq!(client.send("GET", "any-each.shop:9000", "/get", &[]).unwrap().status, 200, "{whence}");
        let seen = exchange(&mesh, whence, "any-each.shop", 9000, b"hi\n", |seen| seen.ends_with(b"\n"));
        assert_eq!(String::from_utf8_lossy(&seen), "bytes hi\n", "{whence}");
    }
    // Between proxies it is mutual TLS all the same.
    let log = eventually("the server's log", || {
        let log = mesh.logs("shop/httpbin", "istio-proxy");
        if log.contains("httpbin-each.shop") { Ok(log) } else { Err(log) }
    });
    assert!(log.contains("inbound|80||"), "{log}");
}
