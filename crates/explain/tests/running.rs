//! Proxies as they run: what a config dump and host state change of an explanation.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::time::Instant;

use compile::{ProxyKind, View};
use engine::Now;
use explain::{Call, Caller, Explanation, Running, explain_running};
use mesh::MeshSnapshot;
use serde_json::{Value, json};
use types::NamespacedName;
use types::wellknown::type_urls;

const MESH: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: curl, namespace: shop, labels: {app: curl, security.istio.io/tlsMode: istio}}
spec: {containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.1, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: v1, namespace: shop, labels: {app: reviews, version: v1, security.istio.io/tlsMode: istio}}
spec: {containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.2, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: v2, namespace: shop, labels: {app: reviews, version: v2, security.istio.io/tlsMode: istio}}
spec: {containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.3, conditions: [{type: Ready, status: 'True'}]}
";

const FAULT: &str = "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{fault: {abort: {httpStatus: 418, percentage: {value: 100}}}, route: [{destination: {host: reviews}}]}]}
";

const CLUSTER: &str = "outbound|9080||reviews.shop.svc.cluster.local";

fn snapshot(yaml: &str) -> MeshSnapshot {
    let documents = api::parse_documents("mesh.yaml", yaml);
    assert!(!documents.has_errors(), "{:#?}", documents.findings);
    let objects = documents.objects.into_iter().map(|parsed| parsed.object);
    MeshSnapshot::next(None, &api::ConfigSet::new(objects)).0
}

/// What the admin interface of a pod's proxy says when it runs what `snapshot` gives.
fn dump(snapshot: &MeshSnapshot, pod: &str) -> Value {
    let workload = snapshot.workload("shop", pod).unwrap();
    let view = View {
        kind: ProxyKind::Sidecar,
        labels: workload.labels.clone(),
        captures_dns: true,
        ..View::sidecar("shop", pod, workload.ips[0])
    };
    let packed = compile::compile(snapshot, &view).packed();
    let of = |url: &str, field: &str| -> Vec<Value> {
        let of_type = packed.iter().filter(|resource| resource.type_url == url);
        of_type.map(|resource| json!({ "name": resource.name, field: proto::json::to_json(&resource.any) })).collect()
    };
    let listeners: Vec<Value> = of(type_urls::LISTENER, "listener")
        .into_iter()
        .map(|entry| json!({ "name": entry["name"], "active_state": entry }))
        .collect();
    let labels: serde_json::Map<String, Value> =
        view.labels.iter().map(|(key, value)| ((**key).to_owned(), (**value).into())).collect();
    let extensions: Vec<Value> =
        ["istio.alpn", "istio.stats", "istio.metadata_exchange"].iter().map(|name| json!({ "name": name })).collect();
    json!({ "configs": [
        { "bootstrap": { "node": {
            "id": format!("sidecar~{}~{pod}.shop~shop.svc.cluster.local", view.ips[0]),
            "metadata": { "NAMESPACE": "shop", "NAME": pod, "LABELS": labels, "DNS_CAPTURE": "true" },
            "extensions": extensions,
        } } },
        { "dynamic_active_clusters": of(type_urls::CLUSTER, "cluster") },
        { "dynamic_listeners": listeners },
        { "dynamic_route_configs": of(type_urls::ROUTE, "route_config") },
        { "dynamic_endpoint_configs": of(type_urls::ENDPOINT, "endpoint_config") },
        { "dynamic_active_secrets": [{ "name": "default" }, { "name": "ROOTCA" }] },
    ] })
}

fn host(address: &str, ejected: bool, requests: u32) -> Value {
    json!({
        "address": { "socket_address": { "address": address, "port_value": 9080 } },
        "health_status": { "eds_health_status": "HEALTHY", "failed_outlier_check": ejected },
        "stats": [{ "name": "cx_active", "value": requests.to_string() }, { "name": "rq_active", "value": requests.to_string() }],
    })
}

/// A call of curl to reviews in the mesh of `newest`; `ask` is how its proxies are read.
fn explained(newest: &MeshSnapshot, ask: &dyn Fn(&str) -> Result<Running, String>) -> Explanation {
    let now = Now { mono: Instant::now(), wall_nanos: 1_735_689_600_000_000_000 };
    let from = Caller::Workload(NamespacedName::new("shop", "curl"));
    let call = Call::parse(from, "GET", "http://reviews:9080/", &[], now).unwrap();
    explain_running(newest, &call, &|pod| ask(&pod.name))
}

fn read(dump: &Value, clusters: &Value, state: &Value) -> Result<Running, String> {
    Running::read(dump, clusters, state).map_err(|error| error.to_string())
}

#[test]
fn a_proxy_of_the_newest_version_is_not_behind() {
    let mesh = snapshot(MESH);
    let told = explained(&mesh, &|pod| read(&dump(&mesh, pod), &Value::Null, &Value::Null));
    let text = told.to_string();
    assert!(!text.contains("   state "), "{text}");
    assert!(text.contains("gets it on port 9080") && text.contains("one of 2"), "{text}");
    assert_eq!((told.notes.len(), told.findings.len()), (0, 0), "{text}");
}

#[test]
fn a_stale_proxy_answers_by_its_own_configuration_and_is_behind() {
    let (old, new) = (snapshot(MESH), snapshot(&format!("{MESH}{FAULT}")));
    let stale = explained(&new, &|pod| read(&dump(&old, pod), &Value::Null, &Value::Null)).to_string();
    assert!(stale.contains("state      behind  (it does not run what the objects say: route table 9080)"), "{stale}");
    assert!(stale.contains("gets it on port 9080") && !stale.contains("418"), "{stale}");
    let fresh = explained(&new, &|pod| read(&dump(&new, pod), &Value::Null, &Value::Null)).to_string();
    assert!(fresh.contains("answers 418") && !fresh.contains("   state "), "{fresh}");
}

#[test]
fn why_a_version_was_refused_is_told() {
    let (old, new) = (snapshot(MESH), snapshot(&format!("{MESH}{FAULT}")));
    let ask = |pod: &str| {
        let mut dump = dump(&old, pod);
        for entry in dump["configs"][3]["dynamic_route_configs"].as_array_mut().unwrap() {
            entry["error_state"] = json!({ "details": "it is too long" });
        }
        read(&dump, &Value::Null, &Value::Null)
    };
    let told = explained(&new, &ask).to_string();
    assert!(told.contains("route table 9080 (it refused the newest version: it is too long)"), "{told}");
}

#[test]
fn ejected_hosts_are_left_out_and_named() {
    let mesh = snapshot(MESH);
    let clusters = json!({ "cluster_statuses": [
        { "name": CLUSTER, "host_statuses": [host("10.1.0.2", true, 0), host("10.1.0.3", false, 0)] },
    ] });
    let told = explained(&mesh, &|pod| read(&dump(&mesh, pod), &clusters, &Value::Null)).to_string();
    assert!(told.contains("not 10.1.0.2:9080 (shop/v1): ejected by outlier detection"), "{told}");
    assert!(told.contains("the application in shop/v2 gets it") && !told.contains("in shop/v1 gets"), "{told}");
}

#[test]
fn a_full_pool_overflows() {
    let rule = "
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: shop}
spec: {host: reviews, trafficPolicy: {connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}}}
";
    let mesh = snapshot(&format!("{MESH}{rule}"));
    let clusters = json!({ "cluster_statuses": [{ "name": CLUSTER, "host_statuses": [host("10.1.0.2", false, 1)] }] });
    let told = |pending: u32| {
        let state = json!({ "live": true, "clusters": { CLUSTER: { "pending": pending } } });
        explained(&mesh, &|pod| read(&dump(&mesh, pod), &clusters, &state)).to_string()
    };
    let waiting = told(0);
    assert!(waiting.contains("1 of 1 connections") && waiting.contains("the request waits for one"), "{waiting}");
    assert!(waiting.contains("DestinationRule shop/reviews"), "{waiting}");
    let full = told(1);
    assert!(full.contains("answers 503 [UO]"), "{full}");
}

#[test]
fn a_missing_secret_and_a_drain_are_told() {
    let mesh = snapshot(MESH);
    let ask = |pod: &str| {
        let mut dump = dump(&mesh, pod);
        if pod == "curl" {
            dump["configs"][5]["dynamic_active_secrets"] = json!([{ "name": "ROOTCA" }]);
        }
        read(&dump, &Value::Null, &json!({ "live": pod != "curl" }))
    };
    let told = explained(&mesh, &ask).to_string();
    assert!(told.contains("the proxy of shop/curl does not have the secret default"), "{told}");
    assert!(told.contains("state      draining"), "{told}");
}

#[test]
fn where_a_proxy_cannot_be_asked_the_objects_stand_for_it() {
    let mesh = snapshot(MESH);
    let told = explained(&mesh, &|pod| match pod {
        "curl" => Err("it is gone".to_owned()),
        pod => read(&dump(&mesh, pod), &Value::Null, &Value::Null),
    });
    assert!(told.notes[0].contains("the proxy of shop/curl cannot be asked (it is gone)"), "{:?}", told.notes);
    assert!(told.to_string().contains("gets it on port 9080"));
}

#[test]
fn what_is_no_dump_is_refused() {
    let broken = json!({ "configs": [{ "dynamic_active_clusters": [{ "cluster": { "name": "a", "typ": 1 } }] }] });
    let error = read(&broken, &Value::Null, &Value::Null).unwrap_err();
    assert!(error.contains("cluster \"a\"") && error.contains("typ"), "{error}");
    assert!(read(&json!({}), &Value::Null, &Value::Null).is_err());
}
