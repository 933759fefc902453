//! Real Envoys as sidecars and gateways under our control plane, among Lateen's own proxies.
//!
//! Three pods and three gateways: `delta` and `world` are Envoys on one protocol each, `lateen` is
//! ours. Whatever is asked of one is asked of all.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use testkit::token::Issuer;
use testkit::{Applied, Client, Mesh, Puppet, Response, Shared, Turn, eventually};

use crate::standalone::envoy;

static ENVOYS: Shared = Shared::new("envoys", manifests);

pub(crate) const PODS: [&str; 3] = ["delta", "world", "lateen"];
const ENVOY_PODS: [&str; 2] = ["delta", "world"];
const HOST: &str = "all.foo.test";

fn manifests() -> String {
    let mesh = json!({
        "apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator",
        "metadata": {"name": "mesh", "namespace": "istio-system"},
        "spec": {"meshConfig": {
            "accessLogFile": "/dev/stdout",
            // A test waits until what was replaced has drained ([`settled`]).
            "defaultConfig": {"binaryPath": envoy(), "drainDuration": "1s"},
            "extensionProviders": [{"name": "judge", "envoyExtAuthzHttp": {
                "service": "judge.legacy.svc.cluster.local", "port": 8000, "pathPrefix": "/ask",
                "includeRequestHeadersInCheck": ["x-judge"],
                "headersToUpstreamOnAllow": ["x-user"],
                "headersToDownstreamOnDeny": ["www-authenticate"],
            }}, {"name": "spans", "zipkin": {"service": "judge.legacy.svc.cluster.local", "port": 8000}}],
        }},
    });
    let mut all = vec![mesh.to_string()];
    for (name, injection) in [("foo", "enabled"), ("legacy", "disabled")] {
        all.push(format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {{istio-injection: {injection}}}}}}}"
        ));
    }
    for name in PODS {
        all.push(workload("foo", name, "sidecar"));
        all.push(workload("istio-system", &format!("gateway-{name}"), "gateway"));
    }
    all.push(workload("legacy", "curl", "none"));
    all.push(service("legacy", "plain", "curl", HTTP));
    all.push(judge());
    all.push(service("legacy", "judge", "judge", "{name: http, port: 8000}"));
    for name in PODS {
        all.push(service("foo", name, name, &[HTTP, TCP, GRPC].join(", ")));
        all.push(service(
            "istio-system",
            &format!("gateway-{name}"),
            &format!("gateway-{name}"),
            "{name: http, port: 80, targetPort: 8080}, {name: https, port: 443, targetPort: 8443}, {name: tcp, port: 9001}",
        ));
    }
    all.push(format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: all, namespace: foo}}\nspec: {{selector: {{role: server}}, ports: [{HTTP}, {TCP}]}}"
    ));
    all.push(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: all, namespace: foo}
spec: {host: all, subsets: [{name: delta, labels: {app: delta}}, {name: world, labels: {app: world}}, {name: lateen, labels: {app: lateen}}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: gateway, namespace: foo}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [\"*.foo.test\"]}]
"
        .to_owned(),
    );
    all.join("\n---\n")
}

pub(crate) const HTTP: &str = "{name: http, port: 8000, targetPort: 80}";
const TCP: &str = "{name: tcp, port: 9000}";
const GRPC: &str = "{name: grpc, port: 7070}";

/// A pod with all servers, of which the proxy is what its name says.
pub(crate) fn workload(namespace: &str, name: &str, template: &str) -> String {
    let proxy = if name.ends_with("lateen") {
        json!({"binaryPath": ""})
    } else if name.ends_with("world") {
        json!({"proxyMetadata": {"ISTIO_DELTA_XDS": "false"}})
    } else {
        json!({})
    };
    let mut labels = json!({"app": name});
    let mut annotations = json!({"proxy.istio.io/config": proxy.to_string()});
    let containers = if template == "gateway" {
        labels["istio"] = "ingressgateway".into();
        annotations["inject.istio.io/templates"] = "gateway".into();
        annotations["sidecar.istio.io/inject"] = "true".into();
        labels["sidecar.istio.io/inject"] = "true".into();
        json!([{"name": "istio-proxy", "image": "auto"}])
    } else {
        labels["role"] = if template == "sidecar" { "server".into() } else { "client".into() };
        let ready = |port: u16| json!({"tcpSocket": {"port": port}, "periodSeconds": 1});
        json!([
            {"name": "app", "image": "docker.io/kong/httpbin", "ports": [{"containerPort": 80}], "readinessProbe": ready(80)},
            {"name": "echo", "image": "docker.io/istio/tcp-echo-server:1.3", "args": ["9000", name], "ports": [{"containerPort": 9000}], "readinessProbe": ready(9000)},
            {"name": "grpc", "image": "lateen/grpc-echo", "ports": [{"containerPort": 7070}], "readinessProbe": ready(7070)},
        ])
    };
    let account =
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}});
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": labels, "annotations": annotations},
                "spec": {"serviceAccountName": name, "containers": containers},
            },
        },
    });
    format!("{account}\n---\n{deployment}")
}

/// An authorizer that says what it is told to.
fn judge() -> String {
    let command = format!("{} {}", testkit::mesh::puppet().display(), testkit::puppet::PORT);
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "judge", "namespace": "legacy"},
        "spec": {
            "selector": {"matchLabels": {"app": "judge"}},
            "template": {
                "metadata": {"labels": {"app": "judge"}, "annotations": {"lateen.dev/command": command}},
                "spec": {"containers": [{
                    "name": "app", "image": "lateen/puppet", "ports": [{"containerPort": testkit::puppet::PORT}],
                    "readinessProbe": {"tcpSocket": {"port": testkit::puppet::PORT}, "periodSeconds": 1},
                }]},
            },
        },
    })
    .to_string()
}

pub(crate) fn service(namespace: &str, name: &str, app: &str, ports: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{selector: {{app: {app}}}, ports: [{ports}]}}"
    )
}

pub(crate) fn object(group: &str, kind: &str, name: &str, spec: &str) -> String {
    format!("apiVersion: {group}/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: foo}}\nspec: {spec}\n")
}

pub(crate) fn security(kind: &str, spec: &str) -> String {
    object("security.istio.io", kind, &kind.to_lowercase(), spec)
}

/// A VirtualService for `all`, in the mesh and at the gateways.
fn route(http: &str) -> String {
    routed_at("mesh, gateway", http)
}

fn routed_at(gateways: &str, http: &str) -> String {
    let hosts = format!("hosts: [all, {HOST}], gateways: [{gateways}]");
    object("networking.istio.io", "VirtualService", "all", &format!("{{{hosts}, http: {http}}}"))
}

/// The mesh, as its manifests say: what the test before had applied is gone.
pub(crate) fn turn() -> Turn<'static> {
    let mesh = ENVOYS.turn();
    settled(&mesh);
    mesh
}

/// Applies what the test needs; nobody may have refused it.
pub(crate) fn with<'a>(mesh: &'a Mesh, manifests: &str) -> Applied<'a> {
    let applied = mesh.with(manifests);
    nothing_is_refused(mesh);
    settled(mesh);
    applied
}

/// Waits until every Envoy serves with the configuration that it has acknowledged, and with no other.
///
/// An Envoy acknowledges a listener before it has warmed, and lets connections of the one before live on,
/// with its policies, until they have drained: so it is with Istio. Both show in its gauges, which change
/// on the thread that acknowledges, so that nothing lies between.
fn settled(mesh: &Mesh) {
    for whence in envoys() {
        eventually("what was replaced has drained", || {
            let stats = admin(mesh, &whence, "/stats?filter=listener_manager.total|cluster_manager.warming");
            let wanted = ["total_listeners_warming", "total_listeners_draining", "total_filter_chains_draining"];
            let quiet = wanted.iter().all(|name| stats.contains(&format!("listener_manager.{name}: 0")));
            if quiet && stats.contains("cluster_manager.warming_clusters: 0") { Ok(()) } else { Err(stats) }
        });
    }
}

/// Deployments whose proxy is an Envoy.
fn envoys() -> Vec<String> {
    let of = |name: &&str| [format!("foo/{name}"), format!("istio-system/gateway-{name}")];
    ENVOY_PODS.iter().flat_map(of).collect()
}

/// Neither an Envoy nor the control plane knows of a refusal, and the Envoys run what was sent.
#[track_caller]
fn nothing_is_refused(mesh: &Mesh) {
    let proxies: Vec<Value> = serde_json::from_str(&mesh.must(&["proxy-status", "-o", "json"], "")).unwrap();
    let names: BTreeSet<String> =
        proxies.iter().map(|proxy| proxy["proxy"].as_str().unwrap_or_default().to_owned()).collect();
    for name in ENVOY_PODS {
        assert!(
            names.iter().any(|have| have.starts_with(&format!("{name}-"))
                && have.rsplit_once('.').is_some_and(|(_, home)| home == "foo")),
            "{names:?}"
        );
        assert!(names.iter().any(|have| have.starts_with(&format!("gateway-{name}-"))), "{names:?}");
    }
    for proxy in &proxies {
        assert_eq!(proxy["refused"], json!([]), "{proxy:#}");
    }
    for whence in envoys() {
        let stats = admin(mesh, &whence, "/stats?filter=update_rejected|update_failure|listener_create_failure");
        let refused: Vec<&str> =
            stats.lines().filter(|line| !line.ends_with(": 0") && line.contains("rejected")).collect();
        assert!(stats.contains("cluster_manager.cds.update_rejected: 0"), "{whence}: {stats}");
        assert!(stats.contains("listener_manager.lds.update_rejected: 0"), "{whence}: {stats}");
        assert!(refused.is_empty(), "{whence}: {refused:?}");
    }
}

pub(crate) fn admin(mesh: &Mesh, whence: &str, path: &str) -> String {
    let (namespace, name) = whence.split_once('/').unwrap();
    let url = format!("http://127.0.0.1:15000{path}");
    let args =
        ["exec", &format!("deploy/{name}"), "-n", namespace, "-c", "istio-proxy", "--", "curl", "-s", "-g", &url];
    mesh.must(&args, "")
}

/// `GET` from a pod.
pub(crate) fn get(mesh: &Mesh, from: &str, url: &str, args: &[&str]) -> Response {
    let mut all = args.to_vec();
    all.push(url);
    mesh.curl(&format!("foo/{from}"), &all)
}

/// The same request from every pod; the answers must be the same.
#[track_caller]
pub(crate) fn from_all(mesh: &Mesh, url: &str, args: &[&str]) -> Response {
    let answers = PODS.map(|from| answer(get(mesh, from, url, args)));
    agreed(&format!("{url} {args:?}"), PODS.map(str::to_owned).into_iter().zip(answers).collect())
}

/// The same request at every gateway; the answers must be the same.
#[track_caller]
fn at_all(mesh: &Mesh, host: &str, path: &str, args: &[&str]) -> Response {
    let header = format!("host: {host}");
    let answers = PODS.map(|gateway| {
        let url = format!("http://gateway-{gateway}.istio-system{path}");
        let mut all = vec!["-H", &header, "--path-as-is"];
        all.extend(args);
        all.push(&url);
        (format!("gateway-{gateway}"), answer(mesh.curl("legacy/curl", &all)))
    });
    agreed(&format!("{host}{path} {args:?}"), answers.into())
}

/// An answer without what differs by nature.
fn answer(mut answer: Response) -> Response {
    let volatile =
        ["date", "x-envoy-upstream-service-time", "x-request-id", "server", "transfer-encoding", "content-length"];
    answer.headers.retain(|(name, _)| !volatile.contains(&name.as_str()));
    answer.headers.sort();
    answer
}

#[track_caller]
fn agreed(what: &str, answers: Vec<(String, Response)>) -> Response {
    let shown = |answer: &Response| {
        (answer.status, answer.headers.clone(), if answer.status == 200 { String::new() } else { answer.body.clone() })
    };
    let (first, expect) = answers.last().cloned().unwrap();
    for (who, have) in &answers {
        assert_eq!(shown(have), shown(&expect), "{what}: {who} (left) and {first} (right)");
    }
    expect
}

fn header<'a>(seen: &'a Value, name: &str) -> &'a str {
    seen["headers"][name][0].as_str().unwrap_or_default()
}

#[test]
fn every_pair_speaks_mutual_tls_with_the_right_principals() {
    let mesh = turn();
    nothing_is_refused(&mesh);
    for from in PODS {
        for to in PODS.into_iter().filter(|to| *to != from) {
            let seen = get(&mesh, from, &format!("http://{to}:8000/headers"), &[]);
            assert_eq!(seen.status, 200, "{from} to {to}: {seen:?}");
            let body = seen.json();
            let xfcc = header(&body, "x-forwarded-client-cert");
            assert!(xfcc.contains(&format!("By=spiffe://cluster.local/ns/foo/sa/{to}")), "{from} to {to}: {xfcc}");
            assert!(xfcc.contains(&format!("URI=spiffe://cluster.local/ns/foo/sa/{from}")), "{from} to {to}: {xfcc}");
        }
        let plain = get(&mesh, from, "http://plain.legacy:8000/headers", &[]);
        assert!(plain.status == 200 && !plain.body.contains("x-forwarded-client-cert"), "{from}: {plain:?}");
    }
}

#[test]
fn every_mode_of_mutual_tls_holds_on_every_pair() {
    let mesh = turn();
    let status = |from: &str, to: &str| mesh.curl(from, &[&format!("http://{to}.foo:8000/get")]).status;
    {
        let _strict = with(&mesh, &security("PeerAuthentication", "{mtls: {mode: STRICT}}"));
        for to in PODS {
            assert_eq!(status("legacy/curl", to), 0, "plaintext to {to} is cut off");
            for from in PODS.into_iter().filter(|from| *from != to) {
                assert_eq!(status(&format!("foo/{from}"), to), 200, "{from} to {to}");
            }
        }
    }
    {
        let _disabled = with(&mesh, &security("PeerAuthentication", "{mtls: {mode: DISABLE}}"));
        for (from, to) in [("delta", "lateen"), ("lateen", "delta"), ("world", "delta")] {
            let seen = get(&mesh, from, &format!("http://{to}:8000/headers"), &[]);
            assert!(seen.status == 200 && !seen.body.contains("x-forwarded-client-cert"), "{from} to {to}: {seen:?}");
        }
    }
    for to in PODS {
        assert_eq!(status("legacy/curl", to), 200, "PERMISSIVE again: {to}");
    }
}

#[test]
fn policies_see_the_same_principals() {
    let mesh = turn();
    let by = |source: &str| {
        security("AuthorizationPolicy", &format!("{{action: DENY, rules: [{{from: [{{source: {source}}}]}}]}}"))
    };
    for denied in PODS {
        let _policy = with(&mesh, &by(&format!("{{principals: [cluster.local/ns/foo/sa/{denied}]}}")));
        for from in PODS {
            for to in PODS.into_iter().filter(|to| *to != from) {
                let seen = get(&mesh, from, &format!("http://{to}:8000/get"), &[]);
                let expect = if from == denied { 403 } else { 200 };
                assert_eq!(seen.status, expect, "{from} to {to} while {denied} is denied: {}", seen.body);
                let bytes = echo(&mesh, from, to, 9000);
                assert_eq!(bytes, if from == denied { String::new() } else { format!("{to} hi") }, "{from} to {to}");
            }
        }
    }
    let rules = "{rules: [{to: [{operation: {methods: [GET], paths: [/status/*]}}], when: [{key: 'request.headers[x-a]', values: [b]}]}]}";
    let _allow = with(&mesh, &security("AuthorizationPolicy", rules));
    for to in PODS {
        for (args, path, expect) in [
            (&["-H", "x-a: b"][..], "/status/202", 202),
            (&[], "/status/202", 403),
            (&["-H", "x-a: b"], "/get", 403),
            (&["-H", "x-a: b"], "/get/../status/202", 202),
            (&["-H", "x-a: b", "-X", "POST"], "/status/202", 403),
        ] {
            let mut all = args.to_vec();
            let url = format!("http://{to}.foo:8000{path}");
            all.extend(["--path-as-is", &url]);
            let seen = mesh.curl("legacy/curl", &all);
            assert_eq!(seen.status, expect, "{to}: {args:?} {path}: {seen:?}");
        }
    }
}

#[test]
fn requests_are_routed_the_same_way() {
    let mesh = turn();
    let destination =
        |subset: &str| format!("{{destination: {{host: all, subset: {subset}, port: {{number: 8000}}}}}}");
    let to = |subset: &str| format!("route: [{}]", destination(subset));
    let http = format!(
        "[{{match: [{{headers: {{end-user: {{exact: jason}}}}}}], {}}},
          {{match: [{{uri: {{prefix: /old/}}}}], rewrite: {{uri: /anything/}}, headers: {{request: {{set: {{x-set: a}}, remove: [x-gone]}}, response: {{add: {{x-added: b}}}}}}, {}}},
          {{match: [{{uri: {{regex: '/status/4[0-9]+'}}, method: {{exact: GET}}}}], {}}},
          {{match: [{{queryParams: {{q: {{prefix: a}}}}}}], redirect: {{uri: /there, authority: other.example, redirectCode: 302}}}},
          {{match: [{{uri: {{exact: /direct}}}}], directResponse: {{status: 418, body: {{string: teapot}}}}}},
          {{match: [{{uri: {{exact: /abort}}}}], fault: {{abort: {{percentage: {{value: 100}}, httpStatus: 555}}}}, {}}},
          {{{}}}]",
        to("world"), to("lateen"), to("delta"), to("delta"), to("lateen"),
    );
    let _route = with(&mesh, &route(&http));
    let ask = |path: &str, args: &[&str]| {
        let inside = from_all(&mesh, &format!("http://all:8000{path}"), args);
        let outside = at_all(&mesh, HOST, path, args);
        assert_eq!((inside.status, inside.header("x-added")), (outside.status, outside.header("x-added")), "{path}");
        inside
    };
    assert_eq!(ask("/get", &[]).status, 200);
    assert_eq!(ask("/get", &["-H", "end-user: jason"]).status, 200);
    let rewritten = ask("/old/x", &["-H", "x-gone: 1"]);
    assert_eq!((rewritten.status, rewritten.header("x-added")), (200, Some("b")));
    let seen = rewritten.json();
    assert!(seen["url"].as_str().unwrap_or_default().ends_with("/anything/x"), "{seen}");
    assert_eq!((header(&seen, "x-set"), header(&seen, "x-gone")), ("a", ""), "{seen}");
    assert_eq!(ask("/status/418", &[]).status, 418);
    assert_eq!(ask("/status/418", &["-X", "POST"]).status, 418);
    let moved = ask("/get?q=abc", &[]);
    assert_eq!((moved.status, moved.header("location")), (302, Some("http://other.example/there?q=abc")), "{moved:?}");
    let direct = ask("/direct", &[]);
    assert_eq!((direct.status, direct.body.as_str()), (418, "teapot"));
    let aborted = ask("/abort", &[]);
    assert_eq!((aborted.status, aborted.body.as_str()), (555, "fault filter abort"));
    let unknown = at_all(&mesh, "nobody.example", "/get", &[]);
    assert_eq!((unknown.status, unknown.body.as_str()), (404, ""));
    // By name: who answers.
    for from in PODS {
        for (args, expect) in [(&[][..], "lateen"), (&["-H", "end-user: jason"], "world")] {
            let seen = get(&mesh, from, "http://all:8000/headers", args).json();
            let xfcc = header(&seen, "x-forwarded-client-cert").to_owned();
            // A pod that calls itself does so in the clear.
            if from != expect {
                assert!(xfcc.contains(&format!("By=spiffe://cluster.local/ns/foo/sa/{expect}")), "{from}: {xfcc}");
            }
        }
    }
}

#[test]
fn weights_split_the_same_way() {
    let mesh = turn();
    let split = |delta: u32, lateen: u32| {
        route(&format!(
            "[{{route: [{{destination: {{host: all, subset: delta, port: {{number: 8000}}}}, weight: {delta}}}, {{destination: {{host: all, subset: lateen, port: {{number: 8000}}}}, weight: {lateen}}}]}}]"
        ))
    };
    let _route = with(&mesh, &split(0, 100));
    let count = 200;
    let script = format!(
        "for i in $(seq {count}); do echo http://gateway-GATEWAY.istio-system/headers; done | xargs curl -s -H 'host: {HOST}'"
    );
    let tally = |gateway: &str| {
        let output = mesh.exec("legacy/curl", &["bash", "-c", &script.replace("GATEWAY", gateway)]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let of = |name: &str| text.matches(&format!("By=spiffe://cluster.local/ns/foo/sa/{name}")).count();
        (of("delta"), of("lateen"))
    };
    for gateway in PODS {
        assert_eq!(tally(gateway), (0, count), "{gateway}");
    }
    mesh.apply(&split(30, 70));
    nothing_is_refused(&mesh);
    for gateway in PODS {
        let (delta, lateen) = tally(gateway);
        assert_eq!(delta + lateen, count, "{gateway}");
        // Six standard deviations.
        assert!((21..=99).contains(&delta), "{gateway}: {delta} of {count}");
    }
}

/// Says `hi` to the echo of a service and reads a line.
fn echo(mesh: &Mesh, from: &str, host: &str, port: u16) -> String {
    echo_from(mesh, &format!("foo/{from}"), host, port)
}

/// The same from any pod.
pub(crate) fn echo_from(mesh: &Mesh, whence: &str, host: &str, port: u16) -> String {
    let script = format!("exec 3<>/dev/tcp/{host}/{port}; echo hi >&3; read -r -t 10 line <&3; echo \"$line\"");
    let output = mesh.exec(whence, &["bash", "-c", &script]);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn bytes_are_routed_by_weight() {
    let mesh = turn();
    let tcp = |subset: &str| {
        object(
            "networking.istio.io",
            "VirtualService",
            "all",
            &format!(
                "{{hosts: [all], tcp: [{{match: [{{port: 9000}}], route: [{{destination: {{host: all, subset: {subset}}}}}]}}]}}"
            ),
        )
    };
    for to in PODS {
        let _route = with(&mesh, &tcp(to));
        for from in PODS {
            assert_eq!(echo(&mesh, from, "all", 9000), format!("{to} hi"), "from {from}");
        }
    }
}

#[test]
fn gateways_end_tls_and_redirect_the_same_way() {
    let mesh = turn();
    let pair = rcgen::generate_simple_self_signed(["tls.foo.test".to_owned()]).unwrap();
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "credential", "namespace": "istio-system"},
        "stringData": {"tls.crt": pair.cert.pem(), "tls.key": pair.signing_key.serialize_pem()},
    });
    let _secret = with(&mesh, &secret.to_string());
    let gateway = "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: tls, namespace: foo}
spec:
  selector: {istio: ingressgateway}
  servers:
  - {port: {number: 443, name: https, protocol: HTTPS}, hosts: [tls.foo.test], tls: {mode: SIMPLE, credentialName: credential}}
  - {port: {number: 80, name: http, protocol: HTTP}, hosts: [redirect.example], tls: {httpsRedirect: true}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: tls, namespace: foo}
spec: {hosts: [tls.foo.test], gateways: [tls], http: [{route: [{destination: {host: lateen, port: {number: 8000}}}]}]}
";
    let _gateway = with(&mesh, gateway);
    let moved = at_all(&mesh, "redirect.example", "/a?b=c", &[]);
    assert_eq!((moved.status, moved.header("location")), (301, Some("https://redirect.example/a?b=c")));
    let script =
        "exec curl -sk --max-time 10 --connect-to ::gateway-GATEWAY.istio-system:443 https://tls.foo.test/headers";
    for gateway in PODS {
        let seen = eventually("TLS at the gateway", || {
            let output = mesh.exec("legacy/curl", &["bash", "-c", &script.replace("GATEWAY", gateway)]);
            serde_json::from_slice::<Value>(&output.stdout).map_err(|_| format!("{gateway}: {output:?}"))
        });
        assert_eq!(header(&seen, "x-forwarded-proto"), "https", "{gateway}: {seen}");
        let id = format!("URI=spiffe://cluster.local/ns/istio-system/sa/gateway-{gateway}");
        assert!(header(&seen, "x-forwarded-client-cert").contains(&id), "{seen}");
    }
    // The mesh's own ingress gateway is an Envoy too, and the machine reaches it.
    let mut client = eventually("TLS from the machine", || {
        Client::tls(mesh.https, "tls.foo.test", pair.cert.der()).map_err(|error| error.to_string())
    });
    assert_eq!(client.send("GET", "tls.foo.test", "/status/202", &[]).unwrap().status, 202);
    nothing_is_refused(&mesh);
}

#[test]
fn tokens_and_claims_count_the_same_way() {
    let mesh = turn();
    let (issuer, other) = (Issuer::new("one"), Issuer::new("one"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let claims = json!({"iss": "https://issuer.example", "sub": "ada", "aud": "shop", "exp": now + 3600, "group": "admins", "nested": {"key": ["x", "y"]}});
    let changed = |name: &str, value: Value| {
        let mut claims = claims.clone();
        claims[name] = value;
        issuer.sign(&claims)
    };
    let rules = json!([{"issuer": "https://issuer.example", "audiences": ["shop"], "jwks": issuer.jwks(), "forwardOriginalToken": true}]);
    let authentication = json!({
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": {"name": "tokens", "namespace": "istio-system"},
        "spec": {"selector": {"matchLabels": {"istio": "ingressgateway"}}, "jwtRules": rules},
    });
    let _tokens = with(&mesh, &authentication.to_string());
    let http = "[{match: [{headers: {'@request.auth.claims.group': {exact: admins}}}], directResponse: {status: 210}},
        {match: [{headers: {'@request.auth.claims[nested][key]': {exact: 'y'}}}], directResponse: {status: 211}},
        {route: [{destination: {host: all, subset: lateen, port: {number: 8000}}}]}]";
    // Claims are matched at gateways only.
    let _route = with(&mesh, &routed_at("gateway", http));
    let ask = |token: Option<String>| {
        let bearer = token.map(|token| format!("authorization: Bearer {token}"));
        let args: Vec<&str> = bearer.iter().flat_map(|bearer| ["-H", bearer.as_str()]).collect();
        let answer = at_all(&mesh, HOST, "/status/200", &args);
        (answer.status, answer.body)
    };
    assert_eq!(ask(None).0, 200);
    assert_eq!(ask(Some(issuer.sign(&claims))).0, 210, "routed by claim");
    assert_eq!(ask(Some(changed("group", json!("others")))).0, 211, "routed by nested claim");
    assert_eq!(ask(Some(other.sign(&claims))), (401, "Jwt verification fails".into()));
    assert_eq!(ask(Some(changed("exp", json!(now - 3600)))), (401, "Jwt is expired".into()));
    assert_eq!(ask(Some(changed("nbf", json!(now + 3600)))), (401, "Jwt not yet valid".into()));
    assert_eq!(ask(Some(changed("aud", json!("else")))), (403, "Audiences in Jwt are not allowed".into()));
    assert_eq!(ask(Some("abc".into())).0, 401);
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "claims", "namespace": "istio-system"},
        "spec": {"selector": {"matchLabels": {"istio": "ingressgateway"}}, "action": "ALLOW",
            "rules": [{"from": [{"source": {"requestPrincipals": ["https://issuer.example/ada"]}}], "when": [{"key": "request.auth.claims[group]", "values": ["others"]}]}]},
    });
    let _policy = with(&mesh, &policy.to_string());
    assert_eq!(ask(None), (403, "RBAC: access denied".into()));
    assert_eq!(ask(Some(issuer.sign(&claims))).0, 403);
    assert_eq!(ask(Some(changed("group", json!("others")))).0, 211);
}

#[test]
fn a_custom_provider_is_asked_the_same_way() {
    let mesh = turn();
    let judge = Puppet::new(&mesh, "legacy/judge");
    let policy = security(
        "AuthorizationPolicy",
        "{action: CUSTOM, provider: {name: judge}, rules: [{to: [{operation: {paths: [/headers, /status/*]}}]}]}",
    );
    let _policy = with(&mesh, &policy);
    let ask = |path: &str| {
        let answers = PODS.map(|to| {
            let url = format!("http://{to}.foo:8000{path}");
            (to.to_owned(), answer(mesh.curl("legacy/curl", &["-H", "x-judge: me", &url])))
        });
        agreed(path, answers.into())
    };
    judge.answers(&json!([{"path": "/ask", "headers": {"x-user": "ada", "x-other": "o"}}]));
    let seen = ask("/headers");
    assert_eq!((seen.status, header(&seen.json(), "x-user"), header(&seen.json(), "x-other")), (200, "ada", ""));
    let asked = judge.seen();
    assert_eq!(asked.len(), PODS.len(), "{asked:?}");
    for question in &asked {
        let said = (&question["method"], &question["path"], &question["headers"]["x-judge"]);
        assert_eq!(said, (&json!("GET"), &json!("/ask/headers"), &json!(["me"])), "{question}");
    }
    let challenge = "Bearer realm=\"judge\"";
    for status in [401, 403] {
        let told = json!({"www-authenticate": challenge, "x-secret": "s"});
        judge.answers(&json!([{"path": "/ask", "status": status, "headers": told, "body": "go away"}]));
        let denied = ask("/status/202");
        assert_eq!((denied.status, denied.body.as_str()), (status, "go away"), "{denied:?}");
        assert_eq!(
            (denied.header("www-authenticate"), denied.header("x-secret")),
            (Some(challenge), None),
            "{denied:?}"
        );
        assert_eq!(ask("/status/203").status, status);
        assert_eq!(ask("/get").status, 200, "what the policy does not name goes unasked");
    }
}

#[test]
fn a_changed_certificate_and_a_restart_reach_envoys_too() {
    let mesh = turn();
    let serial = |name: &str| {
        let page = admin(&mesh, &format!("foo/{name}"), "/certs");
        let page: Value = serde_json::from_str(&page).unwrap();
        let chain = page["certificates"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|one| one["cert_chain"].as_array().into_iter().flatten());
        chain.map(|one| one["serial_number"].as_str().unwrap_or_default().to_owned()).collect::<BTreeSet<_>>()
    };
    let before: BTreeMap<&str, BTreeSet<String>> = ENVOY_PODS.into_iter().map(|name| (name, serial(name))).collect();
    for name in ENVOY_PODS {
        assert!(!before[name].is_empty(), "{name} has a certificate");
        mesh.must(&["rollout", "restart", &format!("deploy/{name}"), "-n", "foo"], "");
        mesh.must(&["rollout", "status", &format!("deploy/{name}"), "-n", "foo", "--timeout", "90"], "");
    }
    mesh.synced();
    for name in ENVOY_PODS {
        assert!(serial(name).is_disjoint(&before[name]), "{name} has a new one");
        assert_eq!(get(&mesh, "lateen", &format!("http://{name}:8000/status/202"), &[]).status, 202);
    }
    nothing_is_refused(&mesh);
}

#[test]
fn the_agent_answers_for_its_envoy() {
    let mesh = turn();
    for (name, whence) in [("delta", "foo/delta"), ("world", "foo/world")] {
        let ready = mesh.curl(whence, &["http://127.0.0.1:15021/healthz/ready"]);
        assert_eq!(ready.status, 200, "{name}: {ready:?}");
        for port in [15020, 15090] {
            let metrics = mesh.curl(whence, &[&format!("http://127.0.0.1:{port}/stats/prometheus")]);
            assert!(
                metrics.body.contains("envoy_cluster_manager_cds_update_success"),
                "{name} {port}: {}",
                metrics.status
            );
        }
        // Names of the mesh, from the table that the agent keeps.
        let found = mesh.exec(whence, &["getent", "ahostsv4", "all.foo.svc.cluster.local"]);
        assert!(!found.stdout.is_empty(), "{name}: {found:?}");
    }
}
