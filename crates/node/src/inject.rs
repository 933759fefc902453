//! Which pods get a proxy, and what that changes in them.
//!
//! *Source*: Istio, "Installing the Sidecar" and "Sidecar Injection".

use std::collections::BTreeMap;

use api::{ConfigSet, Kind, Object, k8s};
use serde_json::{Map, Value, json};
use types::NamespacedName;
use types::wellknown::{self, annotations, labels};

/// Name of the proxy's container.
pub const PROXY: &str = "istio-proxy";

pub use api::injection::{Candidate, wants_proxy};

/// What injection needs to know of the mesh.
#[derive(Clone, Debug)]
pub struct Mesh {
    /// `meshConfig.trustDomain`
    pub trust_domain: String,
    /// `meshConfig.defaultConfig` as JSON, for `PROXY_CONFIG`.
    pub proxy_config: Value,
    /// `meshConfig.enablePrometheusMerge`
    pub merges_metrics: bool,
}

impl Mesh {
    /// The settings as they are now.
    pub fn of(objects: &ConfigSet) -> Self {
        let settings = objects.mesh_config();
        let trust_domain = settings.map(|(_, config)| config.trust_domain()).unwrap_or_default().to_string();
        let written = |name: &str| settings.and_then(|(object, _)| object.raw["spec"]["meshConfig"].get(name));
        Self {
            trust_domain,
            proxy_config: written("defaultConfig").cloned().unwrap_or_else(|| json!({})),
            merges_metrics: written("enablePrometheusMerge") != Some(&Value::Bool(false)),
        }
    }
}

/// Who owns the pod: a Deployment's name, or the pod's own.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// `Deployment` or `Pod`
    pub kind: &'a str,
    /// Its name.
    pub name: &'a str,
}

impl<'a> Workload<'a> {
    /// The owner of `pod`.
    pub fn of(pod: &'a Object) -> Self {
        match deployment_of(pod) {
            Some(name) => Self { kind: "Deployment", name },
            None => Self { kind: "Pod", name: &pod.meta.name },
        }
    }
}

/// The deployment behind a pod's ReplicaSet: its name without the template's hash.
pub fn deployment_of(pod: &Object) -> Option<&str> {
    let replica_set = pod.meta.owners.iter().find(|owner| owner.kind == "ReplicaSet")?;
    let hash = pod.meta.labels.get(labels::POD_TEMPLATE_HASH)?;
    replica_set.name.strip_suffix(hash.as_str())?.strip_suffix('-')
}

/// The document of a pod that is about to be made, with its proxy if it is to have one: what Istio's
/// webhook answers on `CREATE`, and on nothing else.
pub fn admitted(pod: &Object, objects: &ConfigSet) -> Value {
    let mut document = (*pod.raw).clone();
    let Some(typed) = pod.typed::<k8s::Pod>() else { return document };
    let none = BTreeMap::new();
    let namespace = objects.find(Kind::Namespace, &NamespacedName::new("", &pod.meta.namespace));
    let candidate = Candidate {
        namespace: &pod.meta.namespace,
        namespace_labels: namespace.map_or(&none, |namespace| &namespace.meta.labels),
        labels: &pod.meta.labels,
        annotations: &pod.meta.annotations,
        host_network: typed.spec.host_network,
        by_default: objects.injects_by_default(),
    };
    if wants_proxy(&candidate) {
        inject(&mut document, Workload::of(pod), &Mesh::of(objects));
    }
    document
}

/// Adds the proxy to a pod document. A pod that has one already is left as it is.
pub fn inject(pod: &mut Value, workload: Workload<'_>, mesh: &Mesh) {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
    let has_status = pod["metadata"]["annotations"].get(annotations::STATUS).is_some();
    if has_status {
        return;
    }
    let templates =
        pod["metadata"]["annotations"].get(annotations::TEMPLATES).and_then(Value::as_str).unwrap_or("sidecar");
    let is_gateway = templates.split(',').any(|template| template.trim() == "gateway");
    let containers = pod["spec"]["containers"].as_array().cloned().unwrap_or_default();
    let apps: Vec<&str> = containers.iter().filter_map(|c| c["name"].as_str()).filter(|name| *name != PROXY).collect();
    let ports: Vec<Value> = containers
        .iter()
        .filter(|c| c["name"] != PROXY)
        .flat_map(|c| c["ports"].as_array().cloned().unwrap_or_default())
        .collect();

    let config = proxy_config(&pod["metadata"]["annotations"], mesh);
    let holds = !is_gateway && config["holdApplicationUntilProxyStarts"] == true;
    let mut fields = Map::new();
    let mut env = environment(&workload, mesh, &config, &apps, &ports, is_gateway, &namespace);
    let merged = merged_metrics(&pod["metadata"]["annotations"], mesh);
    if let Some(of_app) = merged.as_ref().filter(|of_app| !of_app.is_empty()) {
        let of_app = serde_json::to_string(of_app).unwrap_or_default();
        env.push(json!({"name": "ISTIO_PROMETHEUS_ANNOTATIONS", "value": of_app}));
    }
    let role = if is_gateway { "router" } else { "sidecar" };
    fields.insert("name".to_owned(), PROXY.into());
    fields.insert("image".to_owned(), "auto".into());
    fields.insert(
        "args".to_owned(),
        json!(["proxy", role, "--domain", format!("{namespace}.svc.{}", wellknown::DEFAULT_DOMAIN_SUFFIX)]),
    );
    fields.insert(
        "ports".to_owned(),
        json!([{"containerPort": wellknown::ports::PROXY_METRICS, "name": "http-envoy-prom", "protocol": "TCP"}]),
    );
    fields.insert("env".to_owned(), Value::Array(env));
    let ready = |more: Value| {
        let mut probe =
            json!({"httpGet": {"path": "/healthz/ready", "port": wellknown::ports::READINESS}, "timeoutSeconds": 3});
        if let (Some(probe), Value::Object(more)) = (probe.as_object_mut(), more) {
            probe.extend(more);
        }
        probe
    };
    fields.insert("startupProbe".to_owned(), ready(json!({"periodSeconds": 1, "failureThreshold": 600})));
    fields.insert("readinessProbe".to_owned(), ready(json!({"periodSeconds": 15, "failureThreshold": 4})));
    fields.insert(
        "volumeMounts".to_owned(),
        json!([
            {"name": "istio-token", "mountPath": "/var/run/secrets/tokens"},
            {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio"},
            {"name": "istio-podinfo", "mountPath": "/etc/istio/pod"},
            {"name": "istio-envoy", "mountPath": "/etc/istio/proxy"},
            {"name": "istio-data", "mountPath": "/var/lib/istio/data"},
            {"name": "workload-socket", "mountPath": "/var/run/secrets/workload-spiffe-uds"},
        ]),
    );
    if holds {
        // As Istio writes it; the node knows what it means.
        fields.insert("lifecycle".to_owned(), json!({"postStart": {"exec": {"command": ["pilot-agent", "wait"]}}}));
    }
    if let Some(own) = containers.iter().find(|container| container["name"] == PROXY) {
        let own = json!({ "containers": [own] }).to_string();
        set_default(&mut pod["metadata"]["annotations"], OVERRIDES, &own);
    }
    overlay(pod, fields, if holds { Place::First } else { Place::Last });

    let volumes = json!([
        {"name": "istio-envoy", "emptyDir": {"medium": "Memory"}},
        {"name": "istio-data", "emptyDir": {}},
        {"name": "workload-socket", "emptyDir": {}},
        {"name": "istio-podinfo", "downwardAPI": {"items": [
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
            {"path": "annotations", "fieldRef": {"fieldPath": "metadata.annotations"}},
        ]}},
        {"name": "istio-token", "projected": {"sources": [{"serviceAccountToken":
            {"audience": wellknown::TOKEN_AUDIENCE, "expirationSeconds": 43200, "path": "istio-token"}}]}},
        {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}},
    ]);
    let names: Vec<Value> = volumes.as_array().into_iter().flatten().map(|v| v["name"].clone()).collect();
    push_all(&mut pod["spec"]["volumes"], volumes);

    mark(pod, workload, &names, is_gateway);
    if merged.is_some() {
        let annotations = &mut pod["metadata"]["annotations"];
        annotations[SCRAPE] = "true".into();
        annotations[SCRAPE_PORT] = wellknown::ports::MERGED_METRICS.to_string().into();
        annotations[SCRAPE_PATH] = "/stats/prometheus".into();
    }
}

const SCRAPE: &str = "prometheus.io/scrape";
const SCRAPE_PORT: &str = "prometheus.io/port";
const SCRAPE_PATH: &str = "prometheus.io/path";
const MERGE_METRICS: &str = "prometheus.istio.io/merge-metrics";
/// What the user wrote into the proxy's container.
const OVERRIDES: &str = "proxy.istio.io/overrides";

/// Where a pod says that its own metrics are; `None` when they are not served beside the proxy's.
///
/// *Source*: Istio, "Metrics merging".
fn merged_metrics(annotations: &Value, mesh: &Mesh) -> Option<BTreeMap<&'static str, String>> {
    let text = |name: &str| annotations.get(name).and_then(Value::as_str);
    let wants =
        text(SCRAPE) != Some("false") && text(MERGE_METRICS).map_or(mesh.merges_metrics, |word| word != "false");
    let fields = [("scrape", SCRAPE), ("port", SCRAPE_PORT), ("path", SCRAPE_PATH)];
    let own = fields.into_iter().filter_map(|(field, name)| Some((field, text(name)?.to_owned()))).collect();
    wants.then_some(own)
}

/// Labels and annotations of an injected pod.
fn mark(pod: &mut Value, workload: Workload<'_>, volumes: &[Value], is_gateway: bool) {
    let first_app = pod["spec"]["containers"]
        .as_array()
        .and_then(|list| list.iter().filter_map(|c| c["name"].as_str()).find(|name| *name != PROXY))
        .map(str::to_owned);
    let label = |key: &str| pod["metadata"]["labels"].get(key).and_then(Value::as_str).map(str::to_owned);
    let name = label(labels::CANONICAL_NAME)
        .or_else(|| label(labels::APP_KUBERNETES))
        .or_else(|| label(labels::APP))
        .unwrap_or_else(|| workload.name.to_owned());
    let revision = label(labels::CANONICAL_REVISION)
        .or_else(|| label(labels::VERSION_KUBERNETES))
        .or_else(|| label(labels::VERSION))
        .unwrap_or_else(|| "latest".to_owned());
    let meta = &mut pod["metadata"];
    set_default(&mut meta["labels"], labels::CANONICAL_NAME, &name);
    set_default(&mut meta["labels"], labels::CANONICAL_REVISION, &revision);
    if !is_gateway {
        set_default(&mut meta["labels"], labels::TLS_MODE, "istio");
    }
    let status = json!({"initContainers": null, "containers": [PROXY], "volumes": volumes, "imagePullSecrets": null, "revision": "default"});
    set_default(&mut meta["annotations"], annotations::STATUS, &status.to_string());
    set_default(&mut meta["annotations"], labels::REVISION, "default");
    if let Some(app) = first_app {
        set_default(&mut meta["annotations"], "kubectl.kubernetes.io/default-container", &app);
        set_default(&mut meta["annotations"], "kubectl.kubernetes.io/default-logs-container", &app);
    }
}

/// Where an injected container stands in the list: those after a container wait for its `postStart`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    First,
    Last,
}

/// Puts the proxy's fields under a container of its name that the user wrote (whose fields win), or
/// adds the container.
fn overlay(pod: &mut Value, fields: Map<String, Value>, place: Place) {
    if !pod["spec"]["containers"].is_array() {
        pod["spec"]["containers"] = json!([]);
    }
    let Some(list) = pod["spec"]["containers"].as_array_mut() else { return };
    let Some(Value::Object(own)) = list.iter_mut().find(|c| c["name"] == PROXY) else {
        let at = if place == Place::First { 0 } else { list.len() };
        list.insert(at, Value::Object(fields));
        return;
    };
    for (key, value) in fields {
        match own.get_mut(&key) {
            Some(Value::Array(theirs)) if matches!(key.as_str(), "env" | "volumeMounts" | "ports") => {
                let added = value.as_array().cloned().unwrap_or_default();
                let named = |v: &Value| v["name"].as_str().map(str::to_owned);
                let fresh = added
                    .into_iter()
                    .filter(|new| !theirs.iter().any(|old| named(old) == named(new)))
                    .collect::<Vec<_>>();
                theirs.extend(fresh);
            }
            Some(_) => {}
            None => drop(own.insert(key, value)),
        }
    }
}

/// The mesh's proxy configuration with the pod's own over it.
///
/// *Source*: Istio's `proxy.istio.io/config`: fields replace, mappings are merged.
fn proxy_config(annotations: &Value, mesh: &Mesh) -> Value {
    let mut config = mesh.proxy_config.clone();
    let Some(text) = annotations.get(annotations::PROXY_CONFIG).and_then(Value::as_str) else { return config };
    match serde_saphyr::from_str::<Value>(text) {
        Ok(own @ Value::Object(_)) => merge(&mut config, own),
        Ok(_) | Err(_) => {
            tracing::warn!(
                annotation = annotations::PROXY_CONFIG,
                "not a YAML mapping; the mesh's configuration counts"
            );
        }
    }
    config
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// Variables of `proxyMetadata`, in place of ours of the same name.
fn add_metadata(env: &mut Vec<Value>, config: &Value) {
    for (name, value) in config["proxyMetadata"].as_object().into_iter().flatten() {
        // Numbers and switches are written without quotes as often as with.
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        env.retain(|variable| variable["name"] != name.as_str());
        env.push(json!({"name": name, "value": text}));
    }
}

fn environment(
    workload: &Workload<'_>,
    mesh: &Mesh,
    config: &Value,
    apps: &[&str],
    ports: &[Value],
    is_gateway: bool,
    namespace: &str,
) -> Vec<Value> {
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let value = |name: &str, value: String| json!({"name": name, "value": value});
    let address = format!("istiod.{}.svc:{}", wellknown::DEFAULT_ROOT_NAMESPACE, wellknown::ports::XDS);
    let group = if workload.kind == "Pod" { "v1" } else { "apps/v1" };
    let owner =
        format!("kubernetes://apis/{group}/namespaces/{namespace}/{}s/{}", workload.kind.to_lowercase(), workload.name);
    let mut env = vec![
        value("PILOT_CERT_PROVIDER", "istiod".to_owned()),
        value("CA_ADDR", address),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("INSTANCE_IP", "status.podIP"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        field("HOST_IP", "status.hostIP"),
        value("PROXY_CONFIG", config.to_string()),
        value("TRUST_DOMAIN", mesh.trust_domain.clone()),
        value("ISTIO_META_CLUSTER_ID", "Kubernetes".to_owned()),
        field("ISTIO_META_NODE_NAME", "spec.nodeName"),
        value("ISTIO_META_WORKLOAD_NAME", workload.name.to_owned()),
        value("ISTIO_META_OWNER", owner),
        value("ISTIO_META_MESH_ID", mesh.trust_domain.clone()),
    ];
    if !is_gateway {
        env.push(value("ISTIO_META_POD_PORTS", Value::Array(ports.to_vec()).to_string()));
        env.push(value("ISTIO_META_APP_CONTAINERS", apps.join(",")));
        env.push(value("ISTIO_META_INTERCEPTION_MODE", "REDIRECT".to_owned()));
        env.push(value("ISTIO_META_DNS_CAPTURE", "true".to_owned()));
        // A sidecar of one machine needs one worker unless told otherwise.
        let workers = config["concurrency"].as_u64().unwrap_or(1);
        env.push(value("ISTIO_META_CONCURRENCY", workers.to_string()));
    }
    add_metadata(&mut env, config);
    env
}

fn set_default(map: &mut Value, key: &str, value: &str) {
    if !map.is_object() {
        *map = json!({});
    }
    if let Some(map) = map.as_object_mut() {
        map.entry(key).or_insert_with(|| value.into());
    }
}

fn push_all(list: &mut Value, items: Value) {
    if !list.is_array() {
        *list = json!([]);
    }
    if let (Some(list), Value::Array(items)) = (list.as_array_mut(), items) {
        for item in items {
            if !list.iter().any(|old| old["name"] == item["name"]) {
                list.push(item);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::Labels;

    fn map(text: &str) -> Labels {
        text.split_whitespace()
            .filter_map(|pair| pair.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    #[test]
    fn the_matrix_of_labels() {
        const I: &str = "sidecar.istio.io/inject";
        let pods = [
            "",
            &format!("{I}=true"),
            &format!("{I}=false"),
            "istio.io/rev=canary",
            &format!("istio.io/rev=canary {I}=true"),
            &format!("istio.io/rev=canary {I}=false"),
        ];
        for (namespace, row) in [
            ("", "-D----"),
            // What follows the stroke is what holds for all that say nothing.
            ("|enableNamespacesByDefault", "DD----"),
            ("istio-injection=disabled|enableNamespacesByDefault", "------"),
            ("istio.io/rev=canary|enableNamespacesByDefault", "------"),
            ("istio-injection=enabled", "DD-DD-"),
            ("istio-injection=disabled", "------"),
            ("istio-injection=perhaps", "------"),
            ("istio.io/rev=canary", "------"),
            ("istio.io/rev=default", "DD-DD-"),
            ("istio-injection=enabled istio.io/rev=canary", "DD-DD-"),
            ("istio-injection=disabled istio.io/rev=canary", "------"),
        ] {
            let (namespace, setting) = namespace.split_once('|').unwrap_or((namespace, ""));
            let got: String = pods
                .iter()
                .map(|pod| {
                    let none = BTreeMap::new();
                    let of = Candidate {
                        namespace: "shop",
                        namespace_labels: &map(namespace),
                        labels: &map(pod),
                        annotations: &none,
                        host_network: false,
                        by_default: !setting.is_empty(),
                    };
                    if wants_proxy(&of) { 'D' } else { '-' }
                })
                .collect();
            assert_eq!(got, row, "{namespace} {setting}");
        }
    }

    #[test]
    fn the_second_gate() {
        let check = |namespace: &str, pod: &str, annotation: &str, host_network: bool| {
            let annotations = map(annotation);
            let (ns, labels) = (map("istio-injection=enabled"), map(pod));
            wants_proxy(&Candidate {
                namespace,
                namespace_labels: &ns,
                labels: &labels,
                annotations: &annotations,
                host_network,
                by_default: false,
            })
        };
        assert!(check("shop", "", "", false));
        assert!(!check("shop", "", "", true));
        assert!(!check("kube-system", "", "", false));
        assert!(!check("shop", "", "sidecar.istio.io/inject=false", false));
        assert!(check("shop", "sidecar.istio.io/inject=true", "sidecar.istio.io/inject=false", false));
        assert!(check("shop", "", "sidecar.istio.io/inject=no", false));
    }

    fn mesh() -> Mesh {
        Mesh { trust_domain: "cluster.local".into(), proxy_config: json!({}), merges_metrics: true }
    }

    #[test]
    fn what_injection_changes() {
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "namespace": "shop", "labels": {"app": "reviews", "version": "v2"}},
            "spec": {"containers": [{"name": "reviews", "image": "i", "ports": [{"containerPort": 9080}]}]}});
        let workload = Workload { kind: "Deployment", name: "reviews-v2" };
        inject(&mut pod, workload, &mesh());
        let once = pod.clone();
        inject(&mut pod, workload, &mesh());
        assert_eq!(pod, once, "a second pass changes nothing");
        assert_eq!(pod["metadata"]["labels"]["service.istio.io/canonical-name"], "reviews");
        assert_eq!(pod["metadata"]["labels"]["service.istio.io/canonical-revision"], "v2");
        assert_eq!(pod["metadata"]["labels"]["security.istio.io/tlsMode"], "istio");
        assert_eq!(pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"], "reviews");
        let proxy = &pod["spec"]["containers"][1];
        assert_eq!(proxy["args"][1], "sidecar");
        assert!(
            proxy["env"]
                .as_array()
                .unwrap()
                .iter()
                .any(|e| e["name"] == "ISTIO_META_POD_PORTS" && e["value"] == "[{\"containerPort\":9080}]")
        );
        let (object, findings) = api::from_json(&pod);
        assert!(object.is_some(), "{findings:?}");
    }

    #[test]
    fn a_pod_has_its_own_proxy_configuration() {
        let mesh = Mesh {
            trust_domain: "cluster.local".into(),
            proxy_config: json!({"binaryPath": "/a", "concurrency": 2, "proxyMetadata": {"A": "1", "B": "1"}}),
            merges_metrics: true,
        };
        let env_of = |annotation: &str| {
            let mut pod = json!({"metadata": {"name": "p", "namespace": "shop",
                "annotations": {"proxy.istio.io/config": annotation}}, "spec": {"containers": [{"name": "a"}]}});
            inject(&mut pod, Workload { kind: "Pod", name: "p" }, &mesh);
            let env = pod["spec"]["containers"][1]["env"].as_array().unwrap().clone();
            move |name: &str| {
                let mut of_name = env.iter().filter(|variable| variable["name"] == name);
                let found = of_name.next().map(|variable| variable["value"].as_str().unwrap().to_owned());
                assert!(of_name.next().is_none(), "{name} is there once");
                found.unwrap_or_default()
            }
        };
        let own = env_of("binaryPath: /b\nproxyMetadata: {B: '2', ISTIO_META_DNS_CAPTURE: false}");
        let config: Value = serde_json::from_str(&own("PROXY_CONFIG")).unwrap();
        assert_eq!((config["binaryPath"].as_str(), config["concurrency"].as_u64()), (Some("/b"), Some(2)));
        assert_eq!([own("A"), own("B"), own("ISTIO_META_DNS_CAPTURE")], ["1", "2", "false"]);
        assert_eq!(own("ISTIO_META_CONCURRENCY"), "2");
        let broken = env_of("[");
        let config: Value = serde_json::from_str(&broken("PROXY_CONFIG")).unwrap();
        assert_eq!(config["binaryPath"], "/a");
    }

    #[test]
    fn metrics_of_the_application_are_found_through_the_proxy() {
        let made = |annotations: Value, merges_metrics: bool| {
            let mut pod = json!({"metadata": {"name": "p", "namespace": "shop", "annotations": annotations},
                "spec": {"containers": [{"name": "a"}]}});
            inject(&mut pod, Workload { kind: "Pod", name: "p" }, &Mesh { merges_metrics, ..mesh() });
            let env = pod["spec"]["containers"][1]["env"].as_array().unwrap().clone();
            let own = env.iter().find(|variable| variable["name"] == "ISTIO_PROMETHEUS_ANNOTATIONS");
            let own = own.map(|variable| serde_json::from_str::<Value>(variable["value"].as_str().unwrap()).unwrap());
            let annotation = |name: &str| pod["metadata"]["annotations"][name].as_str().unwrap_or("-").to_owned();
            ([SCRAPE, SCRAPE_PORT, SCRAPE_PATH].map(annotation).join(" "), own)
        };
        let ours = "true 15020 /stats/prometheus".to_owned();
        assert_eq!(made(json!({}), true), (ours.clone(), None));
        let own = json!({SCRAPE: "true", SCRAPE_PORT: "9102", SCRAPE_PATH: "/m"});
        let told = json!({"scrape": "true", "port": "9102", "path": "/m"});
        assert_eq!(made(own.clone(), true), (ours.clone(), Some(told.clone())));
        assert_eq!(made(own, false), ("true 9102 /m".to_owned(), None));
        let asks = json!({SCRAPE: "true", SCRAPE_PORT: "9102", SCRAPE_PATH: "/m", MERGE_METRICS: "true"});
        assert_eq!(made(asks, false), (ours, Some(told)));
        assert_eq!(made(json!({SCRAPE: "false"}), true), ("false - -".to_owned(), None));
        assert_eq!(made(json!({MERGE_METRICS: "false"}), true), ("- - -".to_owned(), None));
    }

    #[test]
    fn an_application_that_waits_comes_after_its_proxy() {
        let inject_with = |annotation: &str, mesh: &Mesh| {
            let mut pod = json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "p", "namespace": "shop", "annotations": {"proxy.istio.io/config": annotation}},
                "spec": {"containers": [{"name": "app", "image": "i"}]}});
            inject(&mut pod, Workload { kind: "Pod", name: "p" }, mesh);
            let (object, findings) = api::from_json(&pod);
            assert!(object.is_some(), "{findings:?}");
            pod["spec"]["containers"].as_array().unwrap().clone()
        };
        let held = inject_with("concurrency: 2\nholdApplicationUntilProxyStarts: true\n", &mesh());
        assert_eq!(held[0]["name"], PROXY);
        assert_eq!(held[0]["lifecycle"]["postStart"]["exec"]["command"], json!(["pilot-agent", "wait"]));
        let env = |name: &str| held[0]["env"].as_array().unwrap().iter().find(|e| e["name"] == name).cloned().unwrap();
        assert_eq!(env("ISTIO_META_CONCURRENCY")["value"], "2");
        assert!(env("PROXY_CONFIG")["value"].as_str().unwrap().contains("\"concurrency\":2"));
        let all = Mesh { proxy_config: json!({"holdApplicationUntilProxyStarts": true}), ..mesh() };
        assert_eq!(inject_with("concurrency: 1", &all)[0]["name"], PROXY);
        assert_eq!(inject_with("holdApplicationUntilProxyStarts: false", &all)[1]["name"], PROXY);
    }

    #[test]
    fn a_gateway_is_the_users_container_filled_in() {
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "g", "namespace": "istio-system", "labels": {"istio": "ingressgateway"}, "annotations": {"inject.istio.io/templates": "gateway"}},
            "spec": {"containers": [{"name": "istio-proxy", "image": "auto", "env": [{"name": "MINE", "value": "1"}]}]}});
        inject(&mut pod, Workload { kind: "Deployment", name: "gw" }, &mesh());
        let list = pod["spec"]["containers"].as_array().unwrap();
        assert_eq!(list.len(), 1);
        assert_eq!(list[0]["args"][1], "router");
        assert_eq!(list[0]["env"][0]["name"], "MINE");
        assert!(list[0]["env"].as_array().unwrap().len() > 5);
        assert!(pod["metadata"]["labels"].get("security.istio.io/tlsMode").is_none());
        let kept: Value = serde_json::from_str(pod["metadata"]["annotations"][OVERRIDES].as_str().unwrap()).unwrap();
        assert_eq!(kept["containers"][0]["image"], "auto");
    }
}
