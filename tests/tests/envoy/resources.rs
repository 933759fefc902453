//! What routes, policies and load settings become for an Envoy, all at once: nothing of it is refused, and each has
//! its effect from, at or through every proxy.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use testkit::token::Issuer;
use testkit::{Mesh, Puppet, eventually};

use crate::mesh::{PODS, admin, echo_from, from_all, get, object, security, turn, with};

const NETWORKING: &str = "networking.istio.io";
/// A host that is an endpoint of a ServiceEntry.
const STATIC: &str = "static.foo.test";
const JUDGE: &str = "judge.legacy.svc.cluster.local";
/// How late a fault makes an answer.
const DELAY: Duration = Duration::from_secs(1);

/// The addresses of a deployment's pods.
fn pod_address(mesh: &Mesh, namespace: &str, app: &str) -> String {
    let pods: Value = serde_json::from_str(&mesh.must(&["get", "pods", "-n", namespace, "-o", "json"], "")).unwrap();
    let items = pods["items"].as_array().unwrap_or_else(|| panic!("{pods:#}"));
    let found = items.iter().find(|pod| pod["metadata"]["labels"]["app"] == app);
    found.and_then(|pod| pod["status"]["podIP"].as_str()).unwrap_or_else(|| panic!("{pods:#}")).to_owned()
}

/// Endpoints that an object names, with every setting of a pool and of ejection.
fn endpoints(judge: &str) -> Vec<String> {
    let entry = format!(
        "{{hosts: [{STATIC}], ports: [{{number: 8000, name: http, protocol: HTTP}}], resolution: STATIC, endpoints: [{{address: {judge}}}]}}"
    );
    let rule = format!(
        "{{host: {STATIC}, trafficPolicy: {{
            outlierDetection: {{consecutive5xxErrors: 3, interval: 300s, baseEjectionTime: 600s, maxEjectionPercent: 100}},
            connectionPool: {{
                tcp: {{maxConnections: 77, connectTimeout: 3s, maxConnectionDuration: 900s, tcpKeepalive: {{time: 600s, interval: 60s, probes: 3}}}},
                http: {{http1MaxPendingRequests: 78, http2MaxRequests: 79, maxRetries: 6, idleTimeout: 30s, maxRequestsPerConnection: 1}}
            }}}}}}"
    );
    vec![object(NETWORKING, "ServiceEntry", "static", &entry), object(NETWORKING, "DestinationRule", "static", &rule)]
}

/// Time-outs, tries and a delay on the way to the judge.
fn patience() -> String {
    let to = format!("route: [{{destination: {{host: {JUDGE}, port: {{number: 8000}}}}}}]");
    let delay = DELAY.as_secs();
    let rules = format!(
        "[{{match: [{{uri: {{exact: /slow}}}}], timeout: 3s, retries: {{attempts: 0}}, {to}}},
          {{match: [{{uri: {{exact: /flaky}}}}], retries: {{attempts: 2, retryOn: 5xx}}, {to}}},
          {{match: [{{uri: {{exact: /stuck}}}}], timeout: 60s, retries: {{attempts: 1, perTryTimeout: 2s, retryOn: gateway-error}}, {to}}},
          {{match: [{{uri: {{exact: /late}}}}], fault: {{delay: {{fixedDelay: {delay}s, percentage: {{value: 100}}}}}}, {to}}},
          {{{to}}}]"
    );
    object(NETWORKING, "VirtualService", "judge", &format!("{{hosts: [{JUDGE}], http: {rules}}}"))
}

/// Spans of every request, logs of failures.
fn telemetry() -> String {
    let spec = "{tracing: [{providers: [{name: spans}], randomSamplingPercentage: 100, customTags: {who: {literal: {value: me}}}}],
        accessLogging: [{filter: {expression: 'response.code >= 400'}}],
        metrics: [{providers: [{name: prometheus}], overrides: [{match: {metric: REQUEST_COUNT}, tagOverrides: {request_host: {value: request.host}}}]}]}";
    object("telemetry.istio.io", "Telemetry", "all", spec)
}

/// Services whose ports have no name, or that have no address.
fn services() -> Vec<String> {
    let service = |name: &str, spec: &str| {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: foo}}\nspec: {spec}\n")
    };
    vec![
        service("unnamed", "{selector: {app: lateen}, ports: [{port: 8002, targetPort: 80}]}"),
        service("unnamed-bytes", "{selector: {app: lateen}, ports: [{port: 9002, targetPort: 9000}]}"),
        service("headless", "{clusterIP: None, selector: {app: lateen}, ports: [{name: tcp, port: 9000}]}"),
    ]
}

/// Bytes: at a gateway, and by weight.
fn bytes() -> Vec<String> {
    let to =
        |subset: &str| format!("{{destination: {{host: all, subset: {subset}, port: {{number: 9000}}}}, weight: 50}}");
    let split = format!("[{{match: [{{port: 9000}}], route: [{}, {}]}}]", to("delta"), to("lateen"));
    let server = "{selector: {istio: ingressgateway}, servers: [{port: {number: 9001, name: tcp, protocol: TCP}, hosts: ['*']}]}";
    let through = "{hosts: ['*'], gateways: [bytes], tcp: [{match: [{port: 9001}], route: [{destination: {host: lateen, port: {number: 9000}}}]}]}";
    vec![
        object(NETWORKING, "VirtualService", "all", &format!("{{hosts: [all], tcp: {split}}}")),
        object(NETWORKING, "Gateway", "bytes", server),
        object(NETWORKING, "VirtualService", "bytes", through),
    ]
}

/// Who may connect, and whose tokens count.
fn policies(issuer: &Issuer) -> Vec<String> {
    let rules = json!({"jwtRules": [{"issuer": "https://issuer.example", "jwks": issuer.jwks()}]});
    let deny = "{action: DENY, rules: [{from: [{source: {notNamespaces: [foo, istio-system]}}], to: [{operation: {ports: ['9000']}}]}]}";
    vec![security("AuthorizationPolicy", deny), security("RequestAuthentication", &rules.to_string())]
}

#[test]
fn all_that_routes_policies_and_pools_can_say_is_taken_and_done() {
    let mesh = turn();
    let judge = Puppet::new(&mesh, "legacy/judge");
    let issuer = Issuer::new("one");
    let mut all = endpoints(&pod_address(&mesh, "legacy", "judge"));
    all.extend([patience(), telemetry()]);
    all.extend(services());
    all.extend(bytes());
    all.extend(policies(&issuer));
    // Nothing of it is refused.
    let _all = with(&mesh, &all.join("---\n"));
    pools_have_their_limits(&mesh, &judge);
    patience_ends(&mesh, &judge);
    spans_come(&mesh, &judge);
    tokens_and_policies_of_bytes_count(&mesh, &issuer);
    ports_without_a_name_are_looked_at(&mesh);
    bytes_go_where_they_are_sent(&mesh);
}

fn pools_have_their_limits(mesh: &Mesh, judge: &Puppet<'_>) {
    let name = format!("host: {STATIC}");
    let url = |path: &str| format!("http://all:8000{path}");
    judge.answers(&json!([{"path": "/broken", "status": 500}]));
    for from in PODS {
        judge.forget();
        let ask = |path: &str| get(mesh, from, &url(path), &["-H", &name]);
        eventually("the judge at an address", || match ask("/fine").status {
            200 => Ok(()),
            other => Err(format!("{from}: {other}")),
        });
        assert_eq!(ask("/fine").status, 200, "{from}");
        let seen = judge.seen();
        let connections: Vec<&Value> =
            seen.iter().filter(|one| one["path"] == "/fine").map(|one| &one["connection"]).collect();
        assert!(connections.len() >= 2 && connections[0] != connections[1], "{from}: each has a connection: {seen:?}");
        let clusters = admin(mesh, &format!("foo/{from}"), "/clusters");
        for limit in ["max_connections::77", "max_pending_requests::78", "max_requests::79", "max_retries::6"] {
            let line = format!("outbound|8000||{STATIC}::default_priority::{limit}");
            assert!(clusters.contains(&line), "{from}: no {line}\n{clusters}");
        }
        // Errors eject the only endpoint.
        let mut failed = 0;
        eventually("nobody is left", || match ask("/broken").status {
            500 => {
                failed += 1;
                Err(format!("{from}: {failed} failed"))
            }
            503 => Ok(()),
            other => panic!("{from}: {other}"),
        });
        assert!(failed >= 3, "{from}: {failed}");
    }
}

fn patience_ends(mesh: &Mesh, judge: &Puppet<'_>) {
    judge.answers(&json!([
        {"path": "/slow", "hangs": true}, {"path": "/stuck", "hangs": true}, {"path": "/flaky", "status": 503},
    ]));
    judge.forget();
    for (path, status, tries) in [("/slow", 504, 1), ("/stuck", 504, 2), ("/flaky", 503, 3)] {
        let answer = from_all(mesh, &format!("http://{JUDGE}:8000{path}"), &[]);
        assert_eq!(answer.status, status, "{path}: {answer:?}");
        eventually("the tries of all", || {
            let seen = judge.seen().iter().filter(|one| one["path"] == path).count();
            if seen == tries * PODS.len() { Ok(()) } else { Err(format!("{path}: {seen}")) }
        });
    }
    for from in PODS {
        let start = Instant::now();
        assert_eq!(get(mesh, from, &format!("http://{JUDGE}:8000/late"), &[]).status, 200, "{from}");
        assert!(start.elapsed() >= DELAY, "{from}: {:?}", start.elapsed());
    }
}

fn spans_come(mesh: &Mesh, judge: &Puppet<'_>) {
    judge.forget();
    for from in PODS {
        assert_eq!(get(mesh, from, &format!("http://{JUDGE}:8000/traced"), &[]).status, 200, "{from}");
    }
    eventually("spans of everybody", || {
        let seen = judge.seen();
        let spans: Vec<&Value> = seen.iter().filter(|one| one["path"] == "/api/v2/spans").collect();
        let told = |from: &&str| spans.iter().any(|one| one["body"].to_string().contains(&format!("{from}.foo")));
        let silent: Vec<&str> = PODS.into_iter().filter(|from| !told(from)).collect();
        if silent.is_empty() { Ok(()) } else { Err(format!("none of {silent:?} among {spans:?}")) }
    });
}

fn tokens_and_policies_of_bytes_count(mesh: &Mesh, issuer: &Issuer) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let good = issuer.sign(&json!({"iss": "https://issuer.example", "sub": "ada", "exp": now + 3600}));
    let bad = Issuer::new("one").sign(&json!({"iss": "https://issuer.example", "sub": "ada", "exp": now + 3600}));
    for to in PODS {
        let url = format!("http://{to}.foo:8000/get");
        for (token, expect) in [(Some(&good), 200), (Some(&bad), 401), (None, 200)] {
            let bearer = token.map(|token| format!("authorization: Bearer {token}"));
            let mut args: Vec<&str> = bearer.iter().flat_map(|bearer| ["-H", bearer.as_str()]).collect();
            args.push(&url);
            let seen = mesh.curl("legacy/curl", &args);
            assert_eq!(seen.status, expect, "{to}: {seen:?}");
        }
        assert_eq!(echo_from(mesh, "legacy/curl", &format!("{to}.foo"), 9000), "", "{to} does not know who that is");
        for from in PODS.into_iter().filter(|from| *from != to) {
            assert_eq!(echo_from(mesh, &format!("foo/{from}"), to, 9000), format!("{to} hi"), "{from}");
        }
    }
}

fn ports_without_a_name_are_looked_at(mesh: &Mesh) {
    for from in PODS.into_iter().filter(|from| *from != "lateen") {
        let whence = format!("foo/{from}");
        let seen = get(mesh, from, "http://unnamed:8002/headers", &[]);
        assert!(seen.status == 200 && seen.body.contains(&format!("/sa/{from}")), "{from}: {seen:?}");
        for (host, port) in [("unnamed-bytes", 9002), ("headless", 9000)] {
            assert_eq!(echo_from(mesh, &whence, host, port), "lateen hi", "{from}: {host}");
        }
    }
}

fn bytes_go_where_they_are_sent(mesh: &Mesh) {
    for gateway in PODS {
        let at = format!("gateway-{gateway}.istio-system");
        assert_eq!(echo_from(mesh, "legacy/curl", &at, 9001), "lateen hi", "{at}");
    }
    // One of two each time: that one never comes has a chance of two in 2^64.
    let script = "for i in $(seq 64); do exec 3<>/dev/tcp/all/9000; echo hi >&3; read -r -t 30 line <&3; echo \"$line\"; exec 3>&-; done";
    for from in PODS {
        let output = mesh.exec(&format!("foo/{from}"), &["bash", "-c", script]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let of = |name: &str| text.matches(&format!("{name} hi")).count();
        assert!(of("delta") > 0 && of("lateen") > 0 && of("delta") + of("lateen") == 64, "{from}: {text}");
    }
}
