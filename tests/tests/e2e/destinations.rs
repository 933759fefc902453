//! Where a pod's calls go: by name, by address, to pods with and without proxies, to hosts outside.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;

use serde_json::Value;
use testkit::{Client2, Mesh, Puppet, eventually};

use crate::apps::{COLLECTOR, TRAFFIC, service, virtual_service, workload};

/// An address that nobody has.
const NOWHERE: &str = "203.0.113.1";

const CLIENT: &str = "shop/curl";

/// The address of a deployment's only pod.
pub(crate) fn address(mesh: &Mesh, namespace: &str, deployment: &str) -> String {
    let selector = format!("deployment={deployment}");
    let pods: Value =
        serde_json::from_str(&mesh.must(&["get", "pods", "-n", namespace, "-l", &selector, "-o", "json"], ""))
            .expect("the list is JSON");
    pods["items"][0]["status"]["podIP"].as_str().unwrap_or_else(|| panic!("{pods}")).to_owned()
}

/// A line of a proxy's log that says all of this.
#[track_caller]
fn logged(mesh: &Mesh, whence: &str, words: &[&str]) -> String {
    eventually(&format!("a line with {words:?}"), || {
        let log = mesh.logs(whence, "istio-proxy");
        let found = log.lines().rfind(|line| words.iter().all(|word| line.contains(word)));
        found.map(str::to_owned).ok_or(log)
    })
}

#[test]
fn a_host_is_routed_whatever_address_is_dialled_and_a_pods_own_address_passes_through() {
    let mesh = TRAFFIC.turn();
    let _rules = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: httpbin, namespace: shop}
spec:
  hosts: [httpbin]
  http:
  - match: [{uri: {prefix: /teapot}}]
    directResponse: {status: 418}
  - route: [{destination: {host: httpbin}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: made-up, namespace: shop}
spec: {hosts: [made.up.example], http: [{route: [{destination: {host: httpbin, port: {number: 8000}}}]}]}
",
    );
    let by_host = |host: &str, port: u16, path: &str| {
        mesh.curl(CLIENT, &["-H", &format!("host: {host}"), &format!("http://{NOWHERE}:{port}{path}")])
    };
    assert_eq!(by_host("httpbin.shop", 8000, "/get?by-host").status, 200);
    logged(&mesh, CLIENT, &["/get?by-host", "outbound|8000||httpbin.shop.svc.cluster.local"]);
    assert_eq!(by_host("httpbin.shop", 8000, "/teapot").status, 418, "its rules hold");
    // A host that is no service is one on port 80.
    assert_eq!(by_host("made.up.example", 80, "/get?made-up").status, 200);
    logged(&mesh, CLIENT, &["/get?made-up", "outbound|8000||httpbin.shop.svc.cluster.local"]);

    // The pod itself: no rules of its Service, no TLS of the mesh.
    let httpbin = address(&mesh, "shop", "httpbin");
    let direct = mesh.curl(CLIENT, &[&format!("http://{httpbin}/headers?direct")]);
    assert!(direct.status == 200 && !direct.body.contains("x-forwarded-client-cert"), "{direct:?}");
    logged(&mesh, CLIENT, &["/headers?direct", "PassthroughCluster"]);
    assert_eq!(mesh.curl(CLIENT, &[&format!("http://{httpbin}/teapot")]).status, 404, "the application's own answer");
    // What passes through keeps its version: this server speaks HTTP/2 only.
    let grpc = address(&mesh, "shop", "grpc");
    let client = Client2::over(mesh.dial(CLIENT, &grpc, 7070)).unwrap();
    let answer = client.unary(&format!("{grpc}:7070"), "/echo.Echo/Direct", &[], b"hello").unwrap();
    assert_eq!(answer.trailer("grpc-status"), Some("0"), "{answer:?}");
    logged(&mesh, CLIENT, &["/echo.Echo/Direct", "HTTP/2", "PassthroughCluster"]);
}

#[test]
fn a_pod_that_calls_its_own_service_passes_its_own_proxy_twice() {
    let mesh = TRAFFIC.turn();
    assert_eq!(mesh.curl("shop/httpbin", &["http://httpbin.shop:8000/get?own"]).status, 200);
    logged(&mesh, "shop/httpbin", &["/get?own", "outbound|8000||httpbin.shop.svc.cluster.local"]);
    logged(&mesh, "shop/httpbin", &["/get?own", "inbound|80||"]);
}

/// How often each kind of pod answers, told by whether it was called in TLS of the mesh.
fn kinds(mesh: &Mesh, url: &str, count: usize) -> BTreeMap<&'static str, usize> {
    let mut out = BTreeMap::new();
    for _ in 0..count {
        let answer = mesh.curl(CLIENT, &[url]);
        assert_eq!(answer.status, 200, "{answer:?}");
        let kind = if answer.body.contains("x-forwarded-client-cert") { "tls" } else { "plaintext" };
        *out.entry(kind).or_default() += 1;
    }
    out
}

#[test]
fn pods_with_and_without_a_proxy_are_served_side_by_side() {
    let mesh = TRAFFIC.turn();
    let pod = |name: &str, label: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: both{label}}}}}\nspec: {{containers: [{{name: app, image: docker.io/kong/httpbin, readinessProbe: {{tcpSocket: {{port: 80}}, periodSeconds: 1}}}}]}}\n"
        )
    };
    let rule = |tls: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: both, namespace: shop}}\nspec: {{host: both, trafficPolicy: {{loadBalancer: {{simple: ROUND_ROBIN}}{tls}}}}}\n"
        )
    };
    let objects = [
        pod("both-meshed", ""),
        pod("both-bare", ", sidecar.istio.io/inject: \"false\""),
        service("shop", "both", "{name: http, port: 80}"),
        rule(""),
    ];
    let _objects = mesh.with(&objects.join("---\n"));
    eventually("both are ready", || {
        let of_both = ["get", "endpointslices", "-n", "shop", "-l", "kubernetes.io/service-name=both", "-o", "json"];
        let slices = mesh.must(&of_both, "");
        if slices.matches("\"ready\": true").count() == 2 { Ok(()) } else { Err(slices) }
    });
    mesh.synced();
    let url = "http://both.shop/headers";
    let both = kinds(&mesh, url, 8);
    assert!(both.contains_key("plaintext") && both.contains_key("tls"), "each in its own way: {both:?}");
    mesh.apply(&rule(", tls: {mode: DISABLE}"));
    assert_eq!(kinds(&mesh, url, 4), [("plaintext", 4)].into(), "a rule always wins");
    // The one without a proxy cannot speak it, and is passed over.
    mesh.apply(&rule(", tls: {mode: ISTIO_MUTUAL}"));
    assert_eq!(kinds(&mesh, url, 4), [("tls", 4)].into(), "a rule always wins");
}

#[test]
fn mutual_tls_to_a_server_without_it_fails_and_says_so() {
    let mesh = TRAFFIC.turn();
    let _rules = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: httpbin-plain, namespace: shop}
spec: {host: httpbin.plain.svc.cluster.local, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: httpbin-plain, namespace: shop}
spec: {hosts: [httpbin.plain.svc.cluster.local], http: [{retries: {attempts: 0}, route: [{destination: {host: httpbin.plain.svc.cluster.local}}]}]}
",
    );
    let answer = mesh.curl(CLIENT, &["http://httpbin.plain:8000/get?mutual"]);
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.body.starts_with("upstream connect error or disconnect/reset before headers"), "{answer:?}");
    logged(&mesh, CLIENT, &["/get?mutual", " 503 UF ", "TLS_error"]);
}

#[test]
fn a_fixed_list_of_endpoints_outside_the_mesh_shares_the_load() {
    let mesh = TRAFFIC.turn();
    let (httpbin, puppet) = (address(&mesh, "plain", "httpbin"), address(&mesh, "plain", "puppet"));
    let _objects = mesh.with(&format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: fixed, namespace: shop}}
spec:
  hosts: [fixed.example.com]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}, {{number: 81, name: more, protocol: HTTP, targetPort: 80}}]
  endpoints: [{{address: {httpbin}}}, {{address: {puppet}, ports: {{http: 8000, more: 8000}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: fixed, namespace: shop}}
spec: {{host: fixed.example.com, trafficPolicy: {{loadBalancer: {{simple: ROUND_ROBIN}}}}}}
"
    ));
    // The puppet answers with nothing, httpbin with what it saw: in plaintext, as from outside.
    for port in [80, 81] {
        let mut seen = BTreeSet::new();
        for _ in 0..6 {
            let answer = mesh.curl(CLIENT, &[&format!("http://fixed.example.com:{port}/headers")]);
            assert_eq!(answer.status, 200, "{answer:?}");
            assert!(!answer.body.contains("x-forwarded-client-cert"), "{answer:?}");
            seen.insert(answer.body.contains("fixed.example.com"));
        }
        assert_eq!(seen.len(), 2, "port {port}: {seen:?}");
    }
}

#[test]
fn the_way_out_leads_through_the_egress_gateway() {
    let mesh = TRAFFIC.turn();
    let outside = address(&mesh, "plain", "httpbin");
    let _objects = mesh.with(&format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: out, namespace: shop}}
spec:
  hosts: [out.example.com]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: {outside}}}]
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: out, namespace: shop}}
spec:
  selector: {{istio: egressgateway}}
  servers: [{{port: {{number: 80, name: https, protocol: HTTPS}}, hosts: [out.example.com], tls: {{mode: ISTIO_MUTUAL}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: egress, namespace: shop}}
spec:
  host: istio-egressgateway.istio-system.svc.cluster.local
  subsets: [{{name: out, trafficPolicy: {{portLevelSettings: [{{port: {{number: 80}}, tls: {{mode: ISTIO_MUTUAL, sni: out.example.com}}}}]}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: out, namespace: shop}}
spec:
  hosts: [out.example.com]
  gateways: [mesh, out]
  http:
  - match: [{{gateways: [mesh]}}]
    route: [{{destination: {{host: istio-egressgateway.istio-system.svc.cluster.local, subset: out, port: {{number: 80}}}}}}]
  - match: [{{gateways: [out]}}]
    route: [{{destination: {{host: out.example.com, port: {{number: 80}}}}}}]
"
    ));
    let answer = mesh.curl(CLIENT, &["http://out.example.com/headers?out"]);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["headers"]["host"][0], "out.example.com", "{answer:?}");
    logged(&mesh, CLIENT, &["/headers?out", "outbound|80|out|istio-egressgateway.istio-system.svc.cluster.local"]);
    logged(&mesh, "istio-system/istio-egressgateway", &["/headers?out", "outbound|80||out.example.com"]);
}

#[test]
fn tls_passes_the_egress_gateway_as_it_is() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let outside = address(&mesh, "plain", "puppet");
    let _objects = mesh.with(&format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: sealed, namespace: shop}}
spec:
  hosts: [shop.example]
  resolution: STATIC
  ports: [{{number: 443, name: tls, protocol: TLS, targetPort: 8001}}]
  endpoints: [{{address: {outside}}}]
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: sealed, namespace: shop}}
spec:
  selector: {{istio: egressgateway}}
  servers: [{{port: {{number: 443, name: tls, protocol: TLS}}, hosts: [shop.example], tls: {{mode: PASSTHROUGH}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: sealed, namespace: shop}}
spec:
  hosts: [shop.example]
  gateways: [mesh, sealed]
  tls:
  - match: [{{gateways: [mesh], port: 443, sniHosts: [shop.example]}}]
    route: [{{destination: {{host: istio-egressgateway.istio-system.svc.cluster.local, port: {{number: 443}}}}}}]
  - match: [{{gateways: [sealed], port: 443, sniHosts: [shop.example]}}]
    route: [{{destination: {{host: shop.example, port: {{number: 443}}}}}}]
"
    ));
    let hello = crate::sniffing::client_hello();
    let mut tunnel = mesh.dial(CLIENT, "shop.example", 443);
    tunnel.write_all(&hello).unwrap();
    eventually("the ClientHello outside", || {
        let seen = puppet.raw();
        if seen.contains(&hello) { Ok(()) } else { Err(format!("{} others", seen.len())) }
    });
    drop(tunnel);
    logged(&mesh, CLIENT, &["outbound|443||istio-egressgateway.istio-system.svc.cluster.local"]);
    logged(&mesh, "istio-system/istio-egressgateway", &["outbound|443||shop.example"]);
}

#[test]
fn a_pod_may_ask_its_proxy_for_fewer_headers() {
    let mesh = TRAFFIC.turn();
    let config = "proxy.istio.io/config: \"{proxyHeaders: {server: {disabled: true}, requestId: {disabled: true}, attemptCount: {disabled: true}, envoyDebugHeaders: {disabled: true}}}\"";
    let labels = "deployment: terse, version: v1}";
    let terse = workload("shop", "terse", "v1", "curlimages/curl", None, "")
        .replace(labels, &format!("{labels}, annotations: {{{config}}}"));
    let _pod = mesh.with(&terse);
    mesh.must(&["rollout", "status", "deploy/terse", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    // A server without a proxy tells what left the client's.
    let url = "http://httpbin.plain:8000/response-headers?server=mine";
    let seen = "http://httpbin.plain:8000/headers";
    for (whence, server, is_usual) in [(CLIENT, "envoy", true), ("shop/terse", "mine", false)] {
        let answer = mesh.curl(whence, &[url]);
        assert_eq!(answer.header("server"), Some(server), "{whence}: {answer:?}");
        assert_eq!(answer.header("x-envoy-upstream-service-time").is_some(), is_usual, "{whence}: {answer:?}");
        let request = mesh.curl(whence, &[seen]);
        for name in ["x-request-id", "x-envoy-attempt-count"] {
            assert_eq!(request.body.contains(name), is_usual, "{whence}: {name}: {request:?}");
        }
    }
}

#[test]
fn a_user_sticks_to_a_pod_by_a_parameter() {
    let mesh = TRAFFIC.turn();
    let objects = "
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: bookinfo}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: sticky, namespace: bookinfo}
spec: {host: sticky, trafficPolicy: {loadBalancer: {consistentHash: {httpQueryParameterName: user}}}}
---
";
    let route = "  - route: [{destination: {host: sticky.bookinfo.svc.cluster.local, port: {number: 9080}}}]";
    let _objects = mesh.with(&format!("{objects}{}", virtual_service("sticky", route)));
    let pods = |user: &str| {
        let path = format!("/reviews/0?user={user}");
        mesh.tally("sticky.shop.test", &path, 8, |answer| {
            answer.json()["podname"].as_str().unwrap_or_default().to_owned()
        })
    };
    let mut all = BTreeMap::new();
    for user in ["jason", "kate", "ann", "bob", "eve", "tom", "sue", "max"] {
        let pods = pods(user);
        assert_eq!(pods.values().collect::<Vec<_>>(), [&8], "{user}: {pods:?}");
        all.extend(pods);
    }
    assert!(all.len() > 1 && !all.contains_key(""), "users differ: {all:?}");
}
