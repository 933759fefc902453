//! Metrics and access logs.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use testkit::{Client2, Mesh, eventually};

use crate::apps::{TRAFFIC, virtual_service};
use crate::causes::{leave, logged};

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

#[test]
fn messages_of_a_grpc_stream_are_counted_while_it_is_open() {
    let mesh = TRAFFIC.turn();
    let ends = [("shop/curl", "source", "unknown"), ("shop/grpc", "destination", "mutual_tls")];
    let counted = || {
        ends.map(|(whence, reporter, security)| {
            let mut stream = common("grpc", "v1", "grpc.shop.svc.cluster.local");
            stream.extend(labels(&[("reporter", reporter)]));
            let mut call = stream.clone();
            call.extend(labels(&[
                ("request_protocol", "grpc"),
                ("response_code", "200"),
                ("grpc_response_status", "9"),
                ("connection_security_policy", security),
            ]));
            // What only the end of a call tells is no label of its messages.
            stream.remove("response_flags");
            let all = samples(&metrics(&mesh, whence));
            let of = |name: &str, wanted: &Labels| -> f64 {
                all.iter().filter(|of| of.0 == name && of.1 == *wanted).map(|of| of.2).sum()
            };
            let names = ["istio_request_messages_total", "istio_response_messages_total"];
            let [request, response] = names.map(|name| of(name, &stream));
            [request, response, of("istio_requests_total", &call)]
        })
    };
    let before = counted();
    let grown = |what: &str, wanted: [f64; 3]| {
        eventually(what, || {
            let now = counted();
            let grown: Vec<[f64; 3]> =
                now.iter().zip(&before).map(|(now, then)| [0, 1, 2].map(|at| now[at] - then[at])).collect();
            if grown == [wanted; 2] { Ok(()) } else { Err(format!("{grown:?}")) }
        });
    };
    let client = Client2::over(mesh.dial("shop/curl", "grpc", 7070)).unwrap();
    let mut call = client.call("grpc:7070", "/echo.Echo/Chat", &[("x-echo-status", "9")]).unwrap();
    for said in 1..=3 {
        call.say(b"a message").unwrap();
        call.hear().unwrap();
        grown("the messages of an open stream", [f64::from(said), f64::from(said), 0.0]);
    }
    call.end().unwrap();
    assert_eq!(call.hear().unwrap(), None);
    grown("the call that has ended", [3.0, 3.0, 1.0]);
}

/// The sum of a metric's series that have all these labels.
fn sum(mesh: &Mesh, whence: &str, name: &str, wanted: &[(&str, &str)]) -> f64 {
    let has = |all: &Labels| wanted.iter().all(|(name, value)| all.get(*name).is_some_and(|have| have == value));
    samples(&metrics(mesh, whence)).iter().filter(|of| of.0 == name && has(&of.1)).map(|of| of.2).sum()
}

/// Does something, after which exactly one more request is counted at `whence` under these labels.
#[track_caller]
fn counts_one(mesh: &Mesh, whence: &str, wanted: &[(&str, &str)], act: impl FnOnce()) {
    let count = || sum(mesh, whence, "istio_requests_total", wanted);
    let before = count();
    act();
    eventually(&format!("one more at {whence}"), || {
        if (count() - before - 1.0).abs() < f64::EPSILON {
            return Ok(());
        }
        let page = metrics(mesh, whence);
        let lines: Vec<_> = page.lines().filter(|line| line.starts_with("istio_requests_total{")).collect();
        Err(format!("{wanted:?} in\n{}", lines.join("\n")))
    });
}

#[test]
fn the_gateway_reports_as_a_source_with_flags_and_a_client_that_left_has_no_code() {
    let mesh = TRAFFIC.turn();
    let to = |host: &str, port: u16| format!("route: [{{destination: {{host: {host}, port: {{number: {port}}}}}}}]");
    let _objects = mesh.with(&format!(
        "{}\n---\n{}",
        virtual_service(
            "counted",
            &format!("  - match: [{{uri: {{prefix: /empty}}}}]\n    {}\n  - {}", to("nobody", 80), to("httpbin", 8000))
        ),
        crate::apps::service("shop", "nobody", "{name: http, port: 80}"),
    ));
    let whole = |service: &'static str, code: &'static str, flags: &'static str| {
        [
            ("reporter", "source"),
            ("source_workload", "istio-ingressgateway"),
            ("source_workload_namespace", "istio-system"),
            ("destination_service", service),
            ("response_code", code),
            ("response_flags", flags),
            ("connection_security_policy", "unknown"),
        ]
    };
    let httpbin = "httpbin.shop.svc.cluster.local";
    let get = |path: &str| drop(mesh.get("counted.shop.test", path, &[]));
    let served =
        [&whole(httpbin, "203", "-")[..], &[("destination_workload", "httpbin"), ("destination_app", "httpbin")]];
    counts_one(&mesh, GATEWAY, &served.concat(), || get("/status/203"));
    counts_one(&mesh, GATEWAY, &whole("nobody.shop.svc.cluster.local", "503", "UH"), || get("/empty"));
    counts_one(&mesh, GATEWAY, &whole(httpbin, "0", "DC"), || leave(&mesh, "counted.shop.test", "/delay/9?left"));
    // A host that a client made up is no label.
    let unknown = [("reporter", "source"), ("destination_service", "unknown"), ("response_code", "404")];
    counts_one(&mesh, GATEWAY, &unknown, || drop(mesh.get("made-up.example", "/", &[])));
    assert!(!metrics(&mesh, GATEWAY).contains("made-up"));
    // Its own calls are known at the other end, by their certificate.
    let there = [
        ("reporter", "destination"),
        ("source_workload", "istio-ingressgateway"),
        ("source_principal", "spiffe://cluster.local/ns/istio-system/sa/istio-ingressgateway-service-account"),
        ("response_code", "204"),
        ("connection_security_policy", "mutual_tls"),
    ];
    counts_one(&mesh, "shop/httpbin", &there, || get("/status/204"));
}

#[test]
fn a_caller_without_a_proxy_is_unknown() {
    let mesh = TRAFFIC.turn();
    let wanted = [
        ("reporter", "destination"),
        ("source_workload", "unknown"),
        ("source_workload_namespace", "unknown"),
        ("source_principal", "unknown"),
        ("source_app", "unknown"),
        ("source_canonical_service", "unknown"),
        ("destination_service", "httpbin.shop.svc.cluster.local"),
        ("response_code", "206"),
        ("connection_security_policy", "none"),
    ];
    counts_one(&mesh, "shop/httpbin", &wanted, || {
        drop(mesh.curl("plain/curl", &["http://httpbin.shop:8000/status/206"]));
    });
}

/// The address of a deployment's only pod.
fn address(mesh: &Mesh, namespace: &str, app: &str) -> String {
    let pods = mesh.must(&["get", "pods", "-n", namespace, "-l", &format!("app={app}"), "-o", "json"], "");
    let pods: serde_json::Value = serde_json::from_str(&pods).unwrap();
    pods["items"][0]["status"]["podIP"].as_str().unwrap_or_else(|| panic!("{pods:#}")).to_owned()
}

#[test]
fn what_no_service_takes_is_counted_under_the_name_of_its_way() {
    let mesh = TRAFFIC.turn();
    let at = address(&mesh, "plain", "httpbin");
    let passed = [
        ("reporter", "source"),
        ("destination_service", "elsewhere.example"),
        ("destination_service_name", "PassthroughCluster"),
        ("destination_service_namespace", "unknown"),
    ];
    let call = || mesh.curl("shop/curl", &["-H", "host: elsewhere.example", &format!("http://{at}/status/200")]);
    counts_one(&mesh, "shop/curl", &passed, || assert_eq!(call().status, 200));
    {
        let _closed = mesh.with(
            "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: closed, namespace: shop}
spec:
  workloadSelector: {labels: {app: curl}}
  outboundTrafficPolicy: {mode: REGISTRY_ONLY}
",
        );
        let refused = [
            ("reporter", "source"),
            ("destination_service", "elsewhere.example"),
            ("destination_service_name", "BlackHoleCluster"),
            ("destination_service_namespace", "unknown"),
            ("response_code", "502"),
        ];
        counts_one(&mesh, "shop/curl", &refused, || assert_eq!(call().status, 502));
    }
    // A port that no service declares, of a pod with a proxy.
    let puppet =
        crate::apps::puppet("shop").replace("name: puppet", "name: inner").replace("app: puppet", "app: inner");
    let undeclared =
        puppet.split("---").filter(|part| !part.contains("kind: Service\n")).collect::<Vec<_>>().join("---");
    let _undeclared = mesh.with(&undeclared);
    mesh.must(&["rollout", "status", "deploy/inner", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    let at = address(&mesh, "shop", "inner");
    let wanted = [
        ("reporter", "destination"),
        ("destination_service", "inner"),
        ("destination_service_name", "InboundPassthroughCluster"),
    ];
    counts_one(&mesh, "shop/inner", &wanted, || {
        let answer = mesh.curl("plain/curl", &["-H", "host: made-up.example", &format!("http://{at}:8000/")]);
        assert_eq!(answer.status, 200, "{answer:?}");
    });
    assert!(!metrics(&mesh, "shop/inner").contains("made-up"), "a client's word is no label at a server");
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
