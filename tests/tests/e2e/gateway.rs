//! The ingress gateway: hosts, TLS, redirects.

use testkit::{Client, eventually};

use crate::apps::{TRAFFIC, virtual_service};
use crate::rollouts::under_load;

#[test]
fn a_host_reaches_the_mail_catcher_and_an_unknown_host_is_404() {
    let mesh = TRAFFIC.turn();
    let mails = mesh.get("maildev.localhost", "/email", &[]);
    assert_eq!(mails.status, 200, "{mails:?}");
    assert!(mails.json().is_array(), "{mails:?}");
    let port = mesh.get("maildev.localhost:8080", "/email", &[]);
    assert_eq!(port.status, 200, "a port in Host does not matter: {port:?}");
    let unknown = mesh.get("nobody.example", "/email", &[]);
    assert_eq!((unknown.status, unknown.body.as_str()), (404, ""), "{unknown:?}");
}

struct Pair {
    root: Vec<u8>,
    secret: String,
}

fn pair(host: &str) -> Pair {
    pair_of(&[host])
}

fn pair_of(hosts: &[&str]) -> Pair {
    let names: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let secret = serde_json::json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "shop-credential", "namespace": "istio-system"},
        "stringData": {"tls.crt": made.cert.pem(), "tls.key": made.signing_key.serialize_pem()},
    });
    Pair { root: made.cert.der().to_vec(), secret: secret.to_string() }
}

#[test]
fn tls_ends_at_the_gateway_and_its_secret_is_replaced_without_a_drop() {
    let mesh = TRAFFIC.turn();
    let host = "tls.shop.test";
    let old = pair(host);
    let _secret = mesh.with(&old.secret);
    let _gateway = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: tls, namespace: shop}
spec:
  selector: {istio: ingressgateway}
  servers:
  - {port: {number: 443, name: https, protocol: HTTPS}, hosts: [tls.shop.test], tls: {mode: SIMPLE, credentialName: shop-credential}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: tls, namespace: shop}
spec:
  hosts: [tls.shop.test]
  gateways: [tls]
  http: [{route: [{destination: {host: httpbin, port: {number: 8000}}}]}]
",
    );
    let open = |root: &[u8]| Client::tls(mesh.https, host, root);
    let mut kept = eventually("TLS at the gateway", || open(&old.root).map_err(|error| error.to_string()));
    let seen = kept.send("GET", host, "/headers", &[]).unwrap();
    assert_eq!(seen.status, 200, "{seen:?}");
    assert_eq!(seen.json()["headers"]["x-forwarded-proto"][0], "https", "{seen:?}");

    // Old connections go on and new ones are opened while the certificate is replaced.
    let new = pair(host);
    let send = |client: &mut Client| client.send("GET", host, "/status/200", &[]);
    let reopen = |(): &mut ()| open(&old.root).or_else(|_| open(&new.root)).and_then(|mut client| send(&mut client));
    let served = under_load(
        &mesh,
        1,
        || open(&old.root),
        send,
        || {
            under_load(
                &mesh,
                1,
                || Ok(()),
                reopen,
                || {
                    mesh.apply(&new.secret);
                    eventually("the new certificate", || {
                        open(&new.root).map(|_| ()).map_err(|error| error.to_string())
                    });
                },
            );
        },
    );
    assert!(served > 5, "the load was on: {served}");
    assert!(open(&old.root).is_err(), "the old certificate is gone");
    assert_eq!(kept.send("GET", host, "/status/200", &[]).unwrap().status, 200, "the old connection goes on");
    assert!(Client::tls(mesh.https, "other.shop.test", &new.root).is_err(), "no chain for another server name");
}

/// One certificate for two hosts of two servers: the handshake's name decides which one a connection
/// reaches, whatever its requests say.
#[test]
fn a_connection_reaches_only_the_hosts_of_its_server_name() {
    let mesh = TRAFFIC.turn();
    let pair = pair_of(&["first.sni.test", "second.sni.test"]);
    let _secret = mesh.with(&pair.secret);
    let server = |name: &str| {
        format!(
            "{{port: {{number: 443, name: https-{name}, protocol: HTTPS}}, hosts: [{name}.sni.test], tls: {{mode: SIMPLE, credentialName: shop-credential}}}}"
        )
    };
    let route = |name: &str| {
        format!(
            "---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: sni-{name}, namespace: shop}}
spec:
  hosts: [{name}.sni.test]
  gateways: [sni]
  http: [{{directResponse: {{status: 200, body: {{string: {name}}}}}}}]
"
        )
    };
    let gateway = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: sni, namespace: shop}\n";
    let servers = format!(
        "spec: {{selector: {{istio: ingressgateway}}, servers: [{}, {}]}}\n",
        server("first"),
        server("second")
    );
    let _objects = mesh.with(&[gateway, &servers, &route("first"), &route("second")].concat());
    for (name, other) in [("first", "second"), ("second", "first")] {
        let host = format!("{name}.sni.test");
        let mut client = eventually("TLS at the gateway", || {
            Client::tls(mesh.https, &host, &pair.root).map_err(|error| error.to_string())
        });
        assert_eq!(client.send("GET", &host, "/", &[]).unwrap().body, name);
        let strayed = client.send("GET", &format!("{other}.sni.test"), "/", &[]).unwrap();
        assert!(matches!(strayed.status, 404 | 421), "{strayed:?}");
    }
}

#[test]
fn http_is_redirected_to_https() {
    let mesh = TRAFFIC.turn();
    let _objects = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: redirect, namespace: shop}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http-redirect, protocol: HTTP}, hosts: [redirect.example], tls: {httpsRedirect: true}}]
",
    );
    let answer = mesh.get("redirect.example", "/a?b=c", &[]);
    assert_eq!((answer.status, answer.header("location")), (301, Some("https://redirect.example/a?b=c")), "{answer:?}");
}

#[test]
fn pods_reach_the_gateway_by_its_service() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("inside", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    for whence in ["plain/curl", "shop/curl"] {
        let url = "http://istio-ingressgateway.istio-system/status/202";
        let answer = mesh.curl(whence, &["-H", "host: inside.shop.test", url]);
        assert_eq!(
            (answer.status, answer.header("server")),
            (202, Some(if whence == "plain/curl" { "istio-envoy" } else { "envoy" })),
            "{whence}: {answer:?}"
        );
        assert_eq!(mesh.curl(whence, &["-H", "host: nobody.example", url]).status, 404, "{whence}");
    }
}

#[test]
fn ambiguous_and_broken_requests_are_refused() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("hostile", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let check = |what: &str, request: &str| {
        let mut client = Client::plain(mesh.http).unwrap();
        match client.raw(request.as_bytes(), false) {
            Ok(answer) => assert!((400..500).contains(&answer.status), "{what}: {answer:?}"),
            // Closed without an answer is as good.
            Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "{what}: no answer"),
        }
    };
    let host = "host: hostile.shop.test\r\n";
    check(
        "both lengths",
        &format!("POST /post HTTP/1.1\r\n{host}content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    );
    check("two lengths", &format!("POST /post HTTP/1.1\r\n{host}content-length: 4\r\ncontent-length: 5\r\n\r\nabcde"));
    check("odd coding", &format!("POST /post HTTP/1.1\r\n{host}transfer-encoding: xchunked\r\n\r\n0\r\n\r\n"));
    check("folded", &format!("GET /get HTTP/1.1\r\n{host}a: b\r\n c\r\n\r\n"));
    check("space before colon", &format!("GET /get HTTP/1.1\r\n{host}a : b\r\n\r\n"));
    check("no host", "GET /get HTTP/1.1\r\n\r\n");
    check("oversized", &format!("GET /get HTTP/1.1\r\n{host}a: {}\r\n\r\n", "x".repeat(100_000)));
    check("no HTTP", "\x16\x03\x01 hello\r\n\r\n");
    assert_eq!(mesh.get("hostile.shop.test", "/get", &[]).status, 200, "the gateway goes on");
}
