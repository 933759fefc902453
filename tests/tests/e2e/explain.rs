//! `lateen explain` of the running mesh: it says what then happens.

use serde_json::Value;
use testkit::{Mesh, Response, eventually};

use crate::apps::{SECURITY, TRAFFIC, virtual_service};

const GATEWAY: &str = "istio-system/istio-ingressgateway";

/// `explain -o json`, and as text: the two say the same.
#[track_caller]
fn explain(mesh: &Mesh, from: &[&str], url: &str, headers: &[(&str, &str)]) -> Value {
    let headers: Vec<String> = headers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let mut args = vec!["explain", "--from"];
    args.extend(from);
    for header in &headers {
        args.extend(["-H", header.as_str()]);
    }
    args.extend(["GET", url]);
    let text = mesh.must(&args, "");
    args.extend(["-o", "json"]);
    let told: Value = serde_json::from_str(&mesh.must(&args, "")).unwrap();
    for path in told["paths"].as_array().unwrap() {
        assert!(text.contains(path["end"]["text"].as_str().unwrap()), "{text}");
    }
    // Asked for itself, every proxy answers, and none is behind.
    assert_eq!(told["notes"], serde_json::json!([]), "{text}");
    assert_eq!(decisions(&told).filter(|decision| decision["stage"] == "state").count(), 0, "{text}");
    told
}

/// Every decision, in order of the way.
fn decisions(told: &Value) -> impl Iterator<Item = &Value> {
    told["paths"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|path| path["hops"].as_array().into_iter().flatten())
        .flat_map(|hop| hop["decisions"].as_array().into_iter().flatten())
}

/// The outcome of the first decision of a stage.
fn outcome<'a>(told: &'a Value, stage: &str) -> &'a str {
    decisions(told)
        .find(|decision| decision["stage"] == stage)
        .and_then(|decision| decision["outcome"].as_str())
        .unwrap_or("")
}

/// The objects behind the decisions of a stage, with field and place.
fn because(told: &Value, stage: &str) -> Vec<String> {
    decisions(told)
        .filter(|decision| decision["stage"] == stage)
        .flat_map(|decision| decision["because"].as_array().into_iter().flatten())
        .map(|because| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let object = &because["object"];
            format!(
                "{} {}/{} {}",
                text(&object["kind"]),
                text(&object["namespace"]),
                text(&object["name"]),
                text(&because["field"])
            )
        })
        .collect()
}

/// Asks explain, then sends the request through the gateway: status, flag, cluster and endpoint of
/// the access log are what was told.
#[track_caller]
fn check(mesh: &Mesh, host: &str, path: &str, headers: &[(&str, &str)]) -> (Value, Response) {
    let told = explain(mesh, &["gateway"], &format!("http://{host}{path}"), headers);
    let [way] = &told["paths"].as_array().unwrap()[..] else { panic!("one way: {told:#}") };
    let lines = || -> Vec<String> {
        let log = mesh.logs(GATEWAY, "istio-proxy");
        log.lines().filter(|line| line.contains(path)).map(str::to_owned).collect()
    };
    let before = lines().len();
    let answer = mesh.get(host, path, headers);
    let line = eventually("the access log", || match lines() {
        lines if lines.len() > before => Ok(lines[lines.len() - 1].clone()),
        lines => Err(lines.join("\n")),
    });
    if let Some(status) = way["end"]["status"].as_u64() {
        assert_eq!(u64::from(answer.status), status, "{told:#}\n{line}");
        let flag = way["end"]["flag"].as_str().unwrap_or("-");
        let details = way["end"]["details"].as_str().unwrap_or_default();
        assert!(line.contains(&format!(" {status} {flag} {details} ")), "{told:#}\n{line}");
    } else {
        assert_eq!(way["end"]["kind"], "delivered", "{told:#}");
        assert!(line.contains(" via_upstream "), "{line}");
    }
    for stage in ["cluster", "endpoint"] {
        let outcome = outcome(&told, stage);
        assert!(line.contains(outcome), "{stage} {outcome}\n{line}");
    }
    (told, answer)
}

#[test]
fn what_is_told_of_a_call_from_outside_happens() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&format!(
        "{}\n---\n{}",
        virtual_service(
            "told",
            "  - name: jason\n    match: [{headers: {end-user: {exact: jason}}}]\n    fault: {abort: {httpStatus: 418, percentage: {value: 100}}}\n    route: [{destination: {host: httpbin, port: {number: 8000}}}]
  - name: nobody\n    match: [{uri: {prefix: /nobody}}]\n    route: [{destination: {host: httpbin, subset: v9, port: {number: 8000}}}]
  - name: rest\n    rewrite: {uri: /anything/rest/}\n    route: [{destination: {host: httpbin, port: {number: 8000}}}]"
        ),
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: httpbin, namespace: shop}
spec: {host: httpbin, subsets: [{name: v9, labels: {version: v9}}]}
"
    ));
    let (told, answer) = check(&mesh, "told.shop.test", "/told/one", &[("end-user", "jason")]);
    assert_eq!((answer.status, outcome(&told, "route")), (418, "jason"));
    assert_eq!(because(&told, "route"), ["VirtualService shop/told spec.http[0]"]);

    let (told, answer) = check(&mesh, "told.shop.test", "/told/two", &[("end-user", "other")]);
    assert_eq!((answer.status, outcome(&told, "route")), (200, "rest"), "{answer:?}");
    let route = decisions(&told).find(|decision| decision["stage"] == "route").unwrap();
    assert!(route["lost"][0]["why"].as_str().unwrap().contains("end-user"), "{route:#}");
    let hops = told["paths"][0]["hops"].as_array().unwrap();
    let sides: Vec<&str> = hops.iter().filter_map(|hop| hop["side"].as_str()).collect();
    assert_eq!(sides, ["gateway", "inbound"], "{told:#}");
    assert_eq!(hops[0]["request"]["path"], "/anything/rest/told/two");
    assert!(answer.body.contains("/anything/rest"), "{}", answer.body);

    let (_, answer) = check(&mesh, "told.shop.test", "/nobody/three", &[]);
    assert_eq!(answer.status, 503);
    let (told, answer) = check(&mesh, "unknown.shop.test", "/told/four", &[]);
    assert_eq!((answer.status, outcome(&told, "host")), (404, "none"));
}

#[test]
fn what_is_told_of_a_call_from_a_pod_happens() {
    let mesh = TRAFFIC.turn();
    let told = explain(&mesh, &["deploy/curl", "-n", "shop"], "http://httpbin:8000/get", &[]);
    let hops = told["paths"][0]["hops"].as_array().unwrap();
    let sides: Vec<&str> = hops.iter().filter_map(|hop| hop["side"].as_str()).collect();
    assert_eq!(sides, ["outbound", "inbound"], "{told:#}");
    assert_eq!((outcome(&told, "transport"), outcome(&told, "mtls")), ("mutual TLS", "PERMISSIVE"));
    assert_eq!(told["paths"][0]["end"]["kind"], "delivered");
    // What was written in a file has its place there.
    let cluster = decisions(&told).find(|decision| decision["stage"] == "cluster").unwrap();
    let position = &cluster["because"][0]["position"];
    assert_eq!(position["file"], mesh.file().display().to_string(), "{cluster:#}");
    let text = std::fs::read_to_string(mesh.file()).unwrap();
    let line = usize::try_from(position["line"].as_u64().unwrap()).unwrap();
    let document = text.lines().skip(line - 1).take(4).collect::<Vec<_>>().join("\n");
    assert!(document.contains("name: httpbin, namespace: shop"), "{document}");
    assert_eq!(mesh.curl("shop/curl", &["http://httpbin:8000/get"]).status, 200);
}

/// What is written at the end of the mesh's file until this is dropped.
struct Written<'a> {
    mesh: &'a Mesh,
    before: String,
}

impl<'a> Written<'a> {
    fn new(mesh: &'a Mesh, more: &str) -> Self {
        let before = std::fs::read_to_string(mesh.file()).unwrap();
        std::fs::write(mesh.file(), format!("{before}\n---\n{more}")).unwrap();
        Self { mesh, before }
    }
}

impl Drop for Written<'_> {
    fn drop(&mut self) {
        std::fs::write(self.mesh.file(), &self.before).expect("the file was there");
    }
}

const PLACED: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: placed, namespace: shop}
spec:
  hosts: [httpbin]
  http:
  - name: other
    match: [{uri: {prefix: /anything/other}}]
    directResponse: {status: 201}
  - name: placed
    route: [{destination: {host: httpbin, subset: placed}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: placed, namespace: shop}
spec:
  host: httpbin
  subsets:
  - name: placed
    labels: {version: v1}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: placed, namespace: shop}
spec:
  selector: {matchLabels: {app: httpbin}}
  rules:
  - to: [{operation: {methods: [HEAD]}}]
  - to: [{operation: {paths: [/anything/placed]}}]
";

#[test]
fn every_stage_is_told_and_what_decides_has_its_place() {
    let mesh = TRAFFIC.turn();
    let written = Written::new(&mesh, PLACED);
    let url = "http://httpbin:8000/anything/placed";
    let from = ["deploy/curl", "-n", "shop"];
    eventually("what was written", || {
        mesh.synced();
        match mesh.curl("shop/curl", &["http://httpbin:8000/anything/other"]).status {
            201 => Ok(()),
            other => Err(other.to_string()),
        }
    });
    mesh.synced();
    let told = explain(&mesh, &from, url, &[]);
    let hops = told["paths"][0]["hops"].as_array().unwrap();
    let stages = |hop: &Value| -> Vec<String> {
        let all = hop["decisions"].as_array().into_iter().flatten();
        all.map(|decision| decision["stage"].as_str().unwrap_or_default().to_owned()).collect()
    };
    for (hop, wanted) in hops.iter().zip([
        &["listener", "chain", "routes", "host", "route", "cluster", "endpoint", "transport"][..],
        &["listener", "chain", "mtls", "route", "policy", "cluster"],
    ]) {
        let stages = stages(hop);
        assert!(wanted.iter().all(|stage| stages.iter().any(|have| have == stage)), "{wanted:?} in {stages:?}");
        let listener = stages.iter().position(|stage| stage == "listener");
        assert_eq!(listener.and_then(|at| stages.get(at + 1)).map(String::as_str), Some("chain"), "{hop:#}");
    }
    let of_stage = |hop: usize, stage: &str| {
        let all = hops[hop]["decisions"].as_array().into_iter().flatten();
        all.filter(|decision| decision["stage"] == stage).cloned().collect::<Vec<_>>()
    };
    // The listener of the port, and the one that connections to the pod come in by.
    let listener = |hop: usize| of_stage(hop, "listener")[0]["outcome"].as_str().unwrap_or_default().to_owned();
    assert!(listener(0).contains("8000"), "{}", listener(0));
    assert_eq!(listener(1), "virtualInbound");
    for hop in [0, 1] {
        let chain = &of_stage(hop, "chain")[0];
        assert!(chain["outcome"].as_str().is_some_and(|chain| !chain.is_empty()), "{chain:#}");
    }
    assert_eq!(mesh.curl("shop/curl", &[url]).status, 200);

    let text = std::fs::read_to_string(mesh.file()).unwrap();
    for (hop, stage, kind, field, here) in [
        (0, "route", "VirtualService", "spec.http[1]", "- name: placed"),
        (0, "cluster", "DestinationRule", "", "kind: DestinationRule"),
        (1, "policy", "AuthorizationPolicy", "spec.rules[1]", "- to: [{operation: {paths: [/anything/placed]}}]"),
    ] {
        let decisions = of_stage(hop, stage);
        let mut all = decisions.iter().flat_map(|decision| decision["because"].as_array().into_iter().flatten());
        let is_it = |because: &&Value| {
            let object = &because["object"];
            object["kind"] == kind && object["name"] == "placed" && object["namespace"] == "shop"
        };
        let because = all.find(is_it).unwrap_or_else(|| panic!("{kind} in {decisions:#?}"));
        assert!(because["field"].as_str().unwrap_or_default().starts_with(field), "{because:#}");
        let position = &because["position"];
        assert_eq!(position["file"], mesh.file().display().to_string(), "{because:#}");
        let line = usize::try_from(position["line"].as_u64().unwrap()).unwrap();
        // The line itself, or the object's first ones.
        let near = text.lines().skip(line - 1).take(3).collect::<Vec<_>>().join("\n");
        assert!(near.contains(here), "{stage}: line {line} is {near:?}, wanted {here:?}");
    }
    // What is denied names the policy's place in words, too.
    let denied = explain(&mesh, &from, "http://httpbin:8000/anything/denied", &[]);
    assert_eq!(denied["paths"][0]["end"]["status"], 403, "{denied:#}");
    assert_eq!(mesh.curl("shop/curl", &["http://httpbin:8000/anything/denied"]).status, 403);
    let said = mesh.must(&["explain", "--from", "deploy/curl", "-n", "shop", "GET", url], "");
    let places = said.matches(&format!("({}:", mesh.file().display())).count();
    assert!(places >= 3, "{said}");
    drop(written);
    eventually("what was taken back", || {
        match mesh.curl("shop/curl", &["http://httpbin:8000/anything/other"]).status {
            200 => Ok(()),
            other => Err(other.to_string()),
        }
    });
    mesh.synced();
}

#[test]
fn a_host_that_is_ejected_is_told() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&format!(
        "{}\n---\n{}",
        virtual_service(
            "flaky",
            "  - retries: {attempts: 0}\n    route: [{destination: {host: flaky, port: {number: 80}}}]"
        ),
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: flaky, namespace: shop}
spec:
  host: flaky
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 2, interval: 1s, baseEjectionTime: 600s, maxEjectionPercent: 100}
",
    ));
    mesh.tally("flaky.shop.test", "/get", 60, |answer| answer.status.to_string());
    let (told, answer) = check(&mesh, "flaky.shop.test", "/get?mark=ejected", &[]);
    assert_eq!(answer.status, 200);
    let endpoint = decisions(&told).find(|decision| decision["stage"] == "endpoint").unwrap();
    let lost = endpoint["lost"].as_array().unwrap();
    assert_eq!(lost.len(), 1, "{endpoint:#}");
    assert!(lost[0]["what"].as_str().unwrap().contains("shop/dead"), "{endpoint:#}");
    assert_eq!(lost[0]["why"], "ejected by outlier detection");
}

#[test]
fn a_policy_that_denies_is_told() {
    let mesh = SECURITY.turn();
    let _policy = mesh.with(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-headers, namespace: foo}
spec:
  selector: {matchLabels: {app: httpbin}}
  action: DENY
  rules: [{to: [{operation: {paths: [/headers]}}]}]
",
    );
    let url = "http://httpbin.foo:8000/headers";
    let told = explain(&mesh, &["deploy/curl", "-n", "bar"], url, &[]);
    let end = &told["paths"][0]["end"];
    assert_eq!((end["status"].as_u64(), end["kind"].as_str()), (Some(403), Some("answered")), "{told:#}");
    assert_eq!(because(&told, "policy"), ["AuthorizationPolicy foo/no-headers spec.rules[0]"]);
    assert_eq!(mesh.curl("bar/curl", &[url]).status, 403);
    let details = end["details"].as_str().unwrap().to_owned();
    eventually("the access log", || {
        let log = mesh.logs("foo/httpbin", "istio-proxy");
        if log.lines().any(|line| line.contains(&details)) { Ok(()) } else { Err(log) }
    });
}

#[test]
fn plaintext_that_strict_refuses_is_told() {
    let mesh = SECURITY.turn();
    let url = "http://httpbin.foo:8000/get";
    let told = explain(&mesh, &["deploy/curl", "-n", "legacy"], url, &[]);
    assert_eq!(told["paths"][0]["end"]["kind"], "delivered");
    assert_eq!(mesh.curl("legacy/curl", &[url]).status, 200);
    let _strict = mesh.with(
        "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: foo}
spec: {mtls: {mode: STRICT}}
",
    );
    let told = explain(&mesh, &["deploy/curl", "-n", "legacy"], url, &[]);
    assert_eq!(outcome(&told, "mtls"), "STRICT");
    assert_eq!(because(&told, "mtls"), ["PeerAuthentication foo/default "]);
    assert_eq!(told["paths"][0]["end"]["kind"], "closed", "{told:#}");
    assert_eq!(mesh.curl("legacy/curl", &[url]).status, 0);
}

/// Stops the control plane until it is dropped.
struct Frozen(Vec<String>);

impl Frozen {
    fn new(mesh: &Mesh) -> Self {
        let plane: Vec<String> = mesh.processes(" discovery").iter().map(ToString::to_string).collect();
        assert!(!plane.is_empty(), "no control plane among {:?}", mesh.processes("lateen"));
        signal("-STOP", &plane);
        Self(plane)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal("-CONT", &self.0);
    }
}

fn signal(name: &str, processes: &[String]) {
    assert!(std::process::Command::new("kill").arg(name).args(processes).status().unwrap().success());
}

#[test]
fn a_proxy_that_is_behind_answers_by_what_it_has() {
    let mesh = TRAFFIC.turn();
    let routes = |status: u16| {
        virtual_service(
            "stale",
            &format!("  - directResponse: {{status: {status}}}\n    match: [{{uri: {{prefix: /}}}}]"),
        )
    };
    let _routes = mesh.with(&routes(201));
    let url = "http://stale.shop.test/";
    let args = ["explain", "--from", "gateway", url];
    {
        let _frozen = Frozen::new(&mesh);
        mesh.must(&["apply", "-f", "-", "--timeout", "1"], &routes(202));
        let told = mesh.must(&args, "");
        assert!(told.contains("state      behind") && told.contains("route table http."), "{told}");
        assert!(told.contains("answers 201"), "{told}");
        assert_eq!(mesh.get("stale.shop.test", "/", &[]).status, 201);
    }
    mesh.synced();
    let told = mesh.must(&args, "");
    assert!(told.contains("answers 202") && !told.contains("behind"), "{told}");
    assert_eq!(mesh.get("stale.shop.test", "/", &[]).status, 202);
}
