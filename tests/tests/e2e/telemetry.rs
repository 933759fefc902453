//! Metrics and access logs.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::json;
use testkit::token::Issuer;
use testkit::{Client, Mesh, Puppet, eventually};

use crate::apps::{COLLECTOR, TRAFFIC, virtual_service, workload};

const GATEWAY: &str = "istio-system/istio-ingressgateway";

type Labels = BTreeMap<String, String>;
/// Samples by name and labels.
type Series = BTreeMap<(String, Labels), f64>;

/// The samples of a page in Prometheus' text format.
fn samples(text: &str) -> Vec<(String, Labels, f64)> {
    let parse = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) =
            series.split_once('{').map_or((series, ""), |(name, rest)| (name, rest.trim_end_matches('}')));
        // No value of these tests holds a quote; flags hold commas.
        let pairs =
            labels.split_inclusive("\",").map(|pair| pair.trim_end_matches(',')).filter(|pair| !pair.is_empty());
        let labels = pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or_else(|| panic!("no label: {line}"));
            (name.to_owned(), value.trim_matches('"').to_owned())
        });
        Some((name.to_owned(), labels.collect(), value.parse().ok()?))
    };
    text.lines().filter(|line| !line.starts_with('#')).filter_map(parse).collect()
}

fn metrics(mesh: &Mesh, whence: &str) -> String {
    mesh.curl(whence, &["http://127.0.0.1:15090/stats/prometheus"]).body
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// What every series of a call from `curl` to `app` in `shop` says, but for the protocol's own.
fn common(app: &str, version: &str, service: &str) -> Labels {
    let workload = if version == "v1" { app.to_owned() } else { format!("{app}-{version}") };
    let principal = format!("spiffe://cluster.local/ns/shop/sa/{app}");
    labels(&[
        ("source_workload", "curl"),
        ("source_canonical_service", "curl"),
        ("source_canonical_revision", "v1"),
        ("source_workload_namespace", "shop"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/curl"),
        ("source_app", "curl"),
        ("source_version", "v1"),
        ("source_cluster", "Kubernetes"),
        ("destination_workload", workload.as_str()),
        ("destination_workload_namespace", "shop"),
        ("destination_principal", principal.as_str()),
        ("destination_app", app),
        ("destination_version", version),
        ("destination_service", service),
        ("destination_canonical_service", app),
        ("destination_canonical_revision", version),
        ("destination_service_name", service.split('.').next().unwrap()),
        ("destination_service_namespace", "shop"),
        ("destination_cluster", "Kubernetes"),
        ("response_flags", "-"),
    ])
}

#[test]
fn both_ends_count_the_same_requests_with_the_same_labels() {
    let mesh = TRAFFIC.turn();
    let wanted = |reporter: &str, security: &str| {
        let mut all = common("httpbin", "v1", "httpbin.shop.svc.cluster.local");
        all.extend(labels(&[
            ("reporter", reporter),
            ("request_protocol", "http"),
            ("response_code", "202"),
            ("grpc_response_status", ""),
            ("connection_security_policy", security),
        ]));
        all
    };
    let ends = [("shop/curl", "source", "unknown"), ("shop/httpbin", "destination", "mutual_tls")];
    let histograms =
        ["istio_request_duration_milliseconds", "istio_request_bytes", "istio_response_bytes"].map(|name| {
            [("count", ""), ("bucket", "+Inf"), ("sum", "")].map(|(suffix, le)| (format!("{name}_{suffix}"), le))
        });
    // Other tests of this mesh count too: what has grown is ours.
    let read = || {
        ends.map(|(whence, reporter, _)| {
            let all = samples(&metrics(&mesh, whence));
            let is_ours = |of: &&(String, Labels, f64)| {
                let of_code = of.1.get("response_code").is_some_and(|code| code == "202");
                of_code && of.1.get("reporter").is_some_and(|by| by == reporter)
            };
            let ours = all.iter().filter(is_ours).cloned();
            ours.map(|(name, labels, value)| ((name, labels), value)).collect::<Series>()
        })
    };
    let before = read();
    let url = "http://httpbin:8000/status/202?[1-100]";
    mesh.exec("shop/curl", &["curl", "-s", "-o", "/dev/null", url]);
    eventually("a hundred requests in one series at either end", || {
        for ((now, before), (whence, reporter, security)) in read().iter().zip(&before).zip(ends) {
            let grown: Vec<_> = now
                .iter()
                .filter(|((name, _), _)| name == "istio_requests_total")
                .map(|(series, value)| (&series.1, value - before.get(series).unwrap_or(&0.0)))
                .filter(|(_, grown)| *grown > 0.0)
                .collect();
            if grown != [(&wanted(reporter, security), 100.0)] {
                return Err(format!("{whence}: {grown:#?}"));
            }
            let all = |of: &Series, (name, le): &(String, &str)| -> f64 {
                let fits = |of: &(String, Labels)| of.0 == *name && of.1.get("le").map_or("", String::as_str) == *le;
                of.iter().filter(|(series, _)| fits(series)).map(|(_, value)| value).sum()
            };
            for [count, bucket, total] in &histograms {
                let [count, bucket, grown] = [count, bucket, total].map(|name| all(now, name) - all(before, name));
                if (count, bucket, grown > 0.0) != (100.0, 100.0, true) {
                    return Err(format!("{whence} {}: {count} in all, {bucket} in +Inf, sum {grown}", total.0));
                }
            }
        }
        Ok(())
    });
}

#[test]
fn both_ends_count_the_same_connections_and_bytes() {
    let mesh = TRAFFIC.turn();
    let _only_v1 = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: echo, namespace: shop}
spec: {host: echo, subsets: [{name: v1, labels: {version: v1}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: shop}
spec: {hosts: [echo], tcp: [{route: [{destination: {host: echo, subset: v1}}]}]}
",
    );
    let ends = [("shop/curl", "source", "unknown"), ("shop/echo", "destination", "mutual_tls")];
    let wanted: Vec<Labels> = ends
        .iter()
        .map(|(_, reporter, security)| {
            let mut all = common("echo", "v1", "echo.shop.svc.cluster.local");
            all.extend(labels(&[
                ("reporter", reporter),
                ("request_protocol", "tcp"),
                ("connection_security_policy", security),
            ]));
            all
        })
        .collect();
    let names = ["connections_opened", "connections_closed", "received_bytes", "sent_bytes"];
    let read = |at: usize| -> Vec<f64> {
        let all = samples(&metrics(&mesh, ends[at].0));
        let of = |name: &str| {
            let name = format!("istio_tcp_{name}_total");
            all.iter().filter(|of| of.0 == name && of.1 == wanted[at]).map(|of| of.2).sum()
        };
        names.iter().map(|name| of(name)).collect()
    };
    let before = [read(0), read(1)];
    // "hi\n" goes there, "one hi\n" comes back.
    let script = "for i in 1 2 3; do exec 3<>/dev/tcp/echo/9000; echo hi >&3; read -r -t 10 line <&3; exec 3>&-; done";
    assert!(mesh.exec("shop/curl", &["bash", "-c", script]).status.success());
    for (at, (whence, ..)) in ends.iter().enumerate() {
        eventually("three connections", || {
            let grown: Vec<f64> = read(at).iter().zip(&before[at]).map(|(now, then)| now - then).collect();
            if grown == [3.0, 3.0, 9.0, 21.0] {
                Ok(())
            } else {
                let page = metrics(&mesh, whence);
                let lines: Vec<_> = page.lines().filter(|line| line.starts_with("istio_tcp_")).collect();
                Err(format!("{whence}: {grown:?} of {names:?}, wanted {:?}, in\n{}", wanted[at], lines.join("\n")))
            }
        });
    }
}

#[test]
fn metrics_are_in_prometheus_form_on_every_port() {
    let mesh = TRAFFIC.turn();
    mesh.curl("shop/curl", &["http://httpbin:8000/get"]);
    eventually("a request that is counted", || match metrics(&mesh, "shop/curl") {
        page if page.contains("istio_requests_total{") => Ok(()),
        page => Err(page),
    });
    for port in ["15000/stats/prometheus", "15020/stats/prometheus", "15090/stats/prometheus"] {
        let page = mesh.curl("shop/curl", &[&format!("http://127.0.0.1:{port}")]).body;
        assert!(page.contains("istio_requests_total{"), "{port}: {page}");
        assert!(!page.contains("{}"), "{port}: a metric without labels has no braces");
        let mut series = BTreeMap::new();
        for line in page.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{port}: {line}"));
            assert!(value.parse::<f64>().is_ok(), "{port}: {line}");
            assert_eq!(series.insert(name.to_owned(), value.to_owned()), None, "{port}: twice: {name}");
        }
        let types: Vec<&str> = page.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        let once: std::collections::BTreeSet<_> = types.iter().collect();
        assert_eq!(types.len(), once.len(), "{port}: a type is declared once");
    }
}

/// One row of [`causes_are_told_by_flag_and_details`].
struct Case {
    /// Path, below `/why`.
    path: &'static str,
    /// Client's headers.
    headers: &'static [(&'static str, &'static str)],
    method: &'static str,
    /// Whose log.
    whence: &'static str,
    /// Status, flags and beginning of the details.
    line: &'static str,
}

const fn case(path: &'static str, line: &'static str) -> Case {
    Case { path, headers: &[], method: "GET", whence: GATEWAY, line }
}

const CASES: &[Case] = &[
    case("nothing", "404 NR route_not_found "),
    case("subset", "503 NC cluster_not_found "),
    case("direct", "200 - direct_response "),
    case("redirect", "301 - direct_response "),
    case("empty", "503 UH no_healthy_upstream "),
    case("slow", "504 UT response_timeout "),
    case("try", "504 URX,UT upstream_per_try_timeout "),
    case("abort", "418 FI fault_filter_abort "),
    case("delay", "200 DI via_upstream "),
    case("closes", "503 UC upstream_reset_before_response_started{connection_termination} "),
    case("truncated", "200 UC "),
    case("tls", "503 UF upstream_reset_before_response_started{"),
    case("denied", "403 - rbac_access_denied_matched_policy[ns[istio-system]-policy[why]-rule[0]] "),
    Case { headers: &[("authorization", "Bearer x.y.z")], ..case("token", "401 - jwt_authn_access_denied{Jwt_") },
    Case {
        headers: &[("origin", "https://a.example"), ("access-control-request-method", "GET")],
        method: "OPTIONS",
        ..case("cors", "200 - ")
    },
    Case { headers: &[("connection", "upgrade"), ("upgrade", "other")], ..case("upgrade", "403 - upgrade_failed ") },
    Case {
        whence: "shop/dead",
        ..case("refused", "503 URX,UF upstream_reset_before_response_started{remote_connection_failure")
    },
    Case { whence: "shop/noise", ..case("garbage", "502 UPE upstream_reset_before_response_started{protocol_error") },
];

fn why() -> String {
    let to = |host: &str, port: u16| format!("route: [{{destination: {{host: {host}, port: {{number: {port}}}}}}}]");
    let httpbin = |path: &str| format!("rewrite: {{uri: {path}}}\n    {}", to("httpbin", 8000));
    let once = "retries: {attempts: 0}\n    ";
    let puppet = "puppet.plain.svc.cluster.local";
    let rows = [
        ("subset", "route: [{destination: {host: httpbin, subset: none}}]".to_owned()),
        ("direct", "directResponse: {status: 200, body: {string: direct}}".to_owned()),
        ("redirect", "redirect: {uri: /elsewhere}".to_owned()),
        ("empty", to("empty", 80)),
        ("slow", format!("timeout: 0.4s\n    {once}{}", httpbin("/delay/9"))),
        (
            "try",
            format!(
                "retries: {{attempts: 1, perTryTimeout: 0.3s, retryOn: gateway-error}}\n    {}",
                httpbin("/delay/9")
            ),
        ),
        (
            "abort",
            format!("fault: {{abort: {{httpStatus: 418, percentage: {{value: 100}}}}}}\n    {}", httpbin("/get")),
        ),
        (
            "delay",
            format!("fault: {{delay: {{fixedDelay: 0.1s, percentage: {{value: 100}}}}}}\n    {}", httpbin("/get")),
        ),
        ("closes", format!("{once}{}", to(puppet, 8000))),
        ("truncated", format!("{once}{}", to(puppet, 8000))),
        ("tls", format!("{once}{}", to(puppet, 8002))),
        ("denied", httpbin("/get")),
        ("token", httpbin("/get")),
        (
            "cors",
            format!(
                "corsPolicy: {{allowOrigins: [{{exact: \"https://a.example\"}}], allowMethods: [GET]}}\n    {}",
                httpbin("/get")
            ),
        ),
        ("upgrade", httpbin("/get")),
        ("refused", format!("{once}{}", to("dead", 80))),
        ("garbage", format!("{once}{}", to("garbage", 80))),
    ];
    let http = rows.iter().map(|(path, rest)| format!("  - match: [{{uri: {{prefix: /why/{path}}}}}]\n    {rest}\n"));
    let service = |name: &str, selector: &str, port: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {selector}, ports: [{port}]}}\n"
        )
    };
    [
        virtual_service("why", &http.collect::<String>()),
        service("empty", "{app: nobody}", "{name: http, port: 80}"),
        service("dead", "{deployment: dead}", "{name: http, port: 80}"),
        // No server of HTTP, behind a proxy that is told it is one.
        workload("shop", "noise", "v1", "docker.io/istio/tcp-echo-server:1.3", Some(9000), "\"9000\", \"noise\""),
        service("garbage", "{app: noise}", "{name: http, port: 80, targetPort: 9000}"),
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: puppet, namespace: istio-system}
spec:
  host: puppet.plain.svc.cluster.local
  exportTo: [.]
  trafficPolicy: {portLevelSettings: [{port: {number: 8002}, tls: {mode: ISTIO_MUTUAL}}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: why, namespace: istio-system}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules: [{to: [{operation: {paths: [/why/denied]}}]}]
"
        .to_owned(),
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
            "metadata": {"name": "why", "namespace": "istio-system"},
            "spec": {
                "selector": {"matchLabels": {"istio": "ingressgateway"}},
                "jwtRules": [{"issuer": "https://issuer.example", "jwks": Issuer::new("one").jwks()}],
            },
        })
        .to_string(),
    ]
    .join("\n---\n")
}

/// The fields of a line in Istio's text format: quoted ones are one field.
fn fields(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let (field, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_once(' ').map_or((rest, ""), |(field, after)| (field, after)),
        };
        out.push(field.to_owned());
        rest = after.trim_start();
    }
    out
}

#[track_caller]
fn logged(mesh: &Mesh, whence: &str, path: &str, what: &str) -> String {
    eventually(&format!("the line {what:?} of {path:?}"), || {
        let log = mesh.logs(whence, "istio-proxy");
        let line = log.lines().rfind(|line| line.contains(path)).unwrap_or_default().to_owned();
        if line.contains(what) { Ok(line) } else { Err(format!("{line:?} in {whence}")) }
    })
}

#[test]
fn causes_are_told_by_flag_and_details() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    puppet.answers(&json!([{"path": "/why/closes", "closes": true}, {"path": "/why/truncated", "truncates": true, "body": "half"}]));
    let _objects = mesh.with(&why());
    mesh.must(&["rollout", "status", "deploy/noise", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    for case in CASES {
        let path = format!("/why/{}", case.path);
        // What breaks off in the middle is no answer to the client.
        let answer = Client::plain(mesh.http).unwrap().send(case.method, "why.shop.test", &path, case.headers);
        if case.path == "truncated" {
            assert!(answer.is_err(), "a truncated answer is not made a whole one: {answer:?}");
        }
        let line = logged(&mesh, case.whence, &format!(" {path} "), case.line);
        let fields = fields(&line);
        assert_eq!(fields.len(), 22, "{line}");
        assert_eq!(fields[1], format!("{} {path} HTTP/1.1", case.method), "{line}");
        assert!(line.contains(&format!("HTTP/1.1\" {}", case.line)), "{path}: {line}");
    }
}

#[test]
fn broken_requests_are_told_by_flag_and_details() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("raw", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let huge = format!("GET /raw/huge HTTP/1.1\r\nhost: raw.shop.test\r\nx: {}\r\n\r\n", "x".repeat(100_000));
    for (name, request, expect, line) in [
        ("huge", huge.as_str(), 431, "431 DPE http1.headers_too_large "),
        ("colon", "GET /raw/colon HTTP/1.1\r\nhost: raw.shop.test\r\nbad header\r\n\r\n", 400, "400 DPE http1."),
        ("hostless", "GET /raw/hostless HTTP/1.1\r\n\r\n", 400, "400 "),
        ("old", "GET /raw/old HTTP/1.0\r\nhost: raw.shop.test\r\n\r\n", 426, "426 - low_version "),
    ] {
        let answer = Client::plain(mesh.http).unwrap().raw(request.as_bytes(), false);
        assert_eq!(answer.map(|answer| answer.status).ok(), Some(expect), "{name}");
        eventually(name, || {
            let log = mesh.logs(GATEWAY, "istio-proxy");
            let last: Vec<&str> = log.lines().rev().take(3).collect();
            if last.iter().any(|have| have.contains(&format!("\" {line}"))) { Ok(()) } else { Err(format!("{last:?}")) }
        });
    }
    // A client that goes away before the answer.
    let mut stream = TcpStream::connect(mesh.http).unwrap();
    stream.write_all(b"GET /delay/9?gone HTTP/1.1\r\nhost: raw.shop.test\r\n\r\n").unwrap();
    eventually("the request upstream", || {
        let state = mesh.curl(GATEWAY, &["http://127.0.0.1:15000/lateen/state"]).json();
        let httpbin = &state["clusters"]["outbound|8000||httpbin.shop.svc.cluster.local"];
        if httpbin["requests"] == 1 { Ok(()) } else { Err(state.to_string()) }
    });
    drop(stream);
    logged(&mesh, GATEWAY, "/delay/9?gone", " 0 DC downstream_remote_disconnect ");
}

#[test]
fn connections_that_no_chain_takes_are_logged() {
    let mesh = TRAFFIC.turn();
    let _strict = mesh.with(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n",
    );
    let refused = mesh.curl("plain/curl", &["http://httpbin.shop:8000/get"]);
    assert_eq!(refused.status, 0, "{refused:?}");
    logged(&mesh, "shop/httpbin", "filter_chain_not_found", " 0 NR filter_chain_not_found ");
    assert_eq!(mesh.curl("shop/curl", &["http://httpbin.shop:8000/get"]).status, 200);
}

/// What a client writes never begins a line of its own.
#[test]
fn log_lines_cannot_be_forged() {
    let mesh = TRAFFIC.turn();
    let mut stream = TcpStream::connect(mesh.http).unwrap();
    let agent = b"x\t[2026-01-01T00:00:00.000Z]";
    let request =
        [b"GET /forged HTTP/1.1\r\nhost: nobody.test\r\nconnection: close\r\nuser-agent: ", &agent[..], b"\r\n\r\n"]
            .concat();
    stream.write_all(&request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 404"), "{}", String::from_utf8_lossy(&answer));
    let line = logged(&mesh, GATEWAY, " /forged ", "404 NR");
    // A tab is what a header may hold; a line's end is not.
    assert!(!line.chars().any(|c| c.is_control() && c != '\t'), "{line:?}");
}
