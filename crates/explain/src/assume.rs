//! What manifests alone do not have: pods with addresses, ClusterIPs, the gateways that a mesh brings.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use api::injection::{Candidate, wants_proxy};
use api::k8s::{Deployment, Namespace, Pod, Service};
use api::networking::Gateway;
use api::{Change, ConfigSet, Object};
use serde_json::{Value, json};
use types::Labels;
use types::wellknown::labels;

/// A set of objects with what had to be assumed.
#[derive(Clone, Debug, Default)]
pub struct Assumed {
    /// All objects, the assumed ones among them.
    pub configs: ConfigSet,
    /// What was assumed, in words.
    pub notes: Vec<String>,
}

/// Pods made of one Deployment, at most.
const REPLICAS_MAX: u32 = 16;

/// Fills in ready pods for Deployments without any, addresses for pods and Services without, and a
/// gateway for every Gateway that selects no pod, as the local mesh would run them.
pub fn assume(configs: &ConfigSet) -> Assumed {
    let mut maker = Maker { configs: configs.clone(), pods: 0, services: 0, notes: Vec::new() };
    maker.running_pods();
    maker.deployments();
    maker.gateways();
    maker.cluster_ips();
    Assumed { configs: maker.configs, notes: maker.notes }
}

struct Maker {
    configs: ConfigSet,
    pods: u16,
    services: u16,
    notes: Vec<String>,
}

/// An address of a range of 65 536, counted up, never its first.
fn address(base: [u8; 2], number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(base[0], base[1], high, low).to_string()
}

impl Maker {
    fn add(&mut self, value: &Value) {
        // A document made from admitted parts decodes; if it ever did not, it would be missing.
        if let (Some(object), _) = api::from_json(value) {
            self.configs.apply(&Change::Upsert(Arc::new(object)));
        }
    }

    fn status(&mut self) -> Value {
        self.pods += 1;
        let ip = address([10, 244], self.pods);
        json!({
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        })
    }

    fn is_injected(
        &self,
        namespace: &str,
        pod_labels: &Labels,
        annotations: &BTreeMap<String, String>,
        host_network: bool,
    ) -> bool {
        let found = self.configs.get::<Namespace>("", namespace).map(|(object, _)| object.meta.labels.clone());
        let namespace_labels = found.unwrap_or_default();
        let candidate = Candidate {
            namespace,
            namespace_labels: &namespace_labels,
            labels: pod_labels,
            annotations,
            host_network,
            by_default: self.configs.injects_by_default(),
        };
        wants_proxy(&candidate)
    }

    /// Pods written by hand run.
    fn running_pods(&mut self) {
        let waiting: Vec<Arc<Object>> = self
            .configs
            .all::<Pod>()
            .filter(|(_, pod)| pod.status.pod_ip.is_empty() && pod.status.pod_ips.is_empty())
            .map(|(object, _)| Arc::clone(object))
            .collect();
        for object in waiting {
            let Some(pod) = object.typed::<Pod>() else { continue };
            let mut value = (*object.raw).clone();
            if self.is_injected(
                &object.meta.namespace,
                &object.meta.labels,
                &object.meta.annotations,
                pod.spec.host_network,
            ) {
                value["metadata"]["labels"][labels::TLS_MODE] = "istio".into();
            }
            value["status"] = self.status();
            self.add(&value);
            self.notes.push(format!("assumed: pod {} runs and is ready", object.key()));
        }
    }

    fn deployments(&mut self) {
        let all: Vec<Arc<Object>> = self.configs.all::<Deployment>().map(|(object, _)| Arc::clone(object)).collect();
        let mut made = Vec::new();
        for object in all {
            let Some(deployment) = object.typed::<Deployment>() else { continue };
            let namespace = &*object.meta.namespace;
            let selector = &deployment.spec.selector;
            let has_pods =
                self.configs.in_namespace::<Pod>(namespace).any(|(pod, _)| selector.matches(&pod.meta.labels));
            let replicas = deployment.spec.replicas.unwrap_or(1).min(REPLICAS_MAX);
            if has_pods || replicas == 0 {
                continue;
            }
            let template = &deployment.spec.template;
            let is_injected = self.is_injected(
                namespace,
                &template.metadata.labels,
                &template.metadata.annotations,
                template.spec.host_network,
            );
            for index in 0..replicas {
                let name =
                    if replicas == 1 { object.meta.name.to_string() } else { format!("{}-{index}", object.meta.name) };
                let pod = self.pod(&object, &name, is_injected);
                self.add(&pod);
            }
            let count = if replicas == 1 { String::new() } else { format!(" ({replicas} pods)") };
            made.push(format!("{}{count}{}", object.key(), if is_injected { "" } else { " (no proxy)" }));
        }
        if !made.is_empty() {
            self.notes.push(format!("assumed: ready pods of {}", made.join(", ")));
        }
    }

    fn pod(&mut self, deployment: &Object, name: &str, is_injected: bool) -> Value {
        let template = &deployment.raw["spec"]["template"];
        let mut pod_labels = template["metadata"]["labels"].clone();
        if !pod_labels.is_object() {
            pod_labels = json!({});
        }
        if is_injected {
            pod_labels[labels::TLS_MODE] = "istio".into();
        }
        let mut metadata = json!({
            "name": name, "namespace": &*deployment.meta.namespace, "labels": pod_labels,
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": &*deployment.meta.name, "controller": true}],
        });
        if template["metadata"]["annotations"].is_object() {
            metadata["annotations"] = template["metadata"]["annotations"].clone();
        }
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
            "spec": template["spec"].clone(), "status": self.status(),
        })
    }

    fn gateways(&mut self) {
        let selectors: Vec<(String, BTreeMap<String, String>, Vec<u16>)> = self
            .configs
            .all::<Gateway>()
            .map(|(object, gateway)| {
                let ports = gateway.servers.iter().filter_map(|server| Some(server.port.as_ref()?.number)).collect();
                (
                    object.key().to_string(),
                    gateway.selector.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
                    ports,
                )
            })
            .collect();
        for (name, selector, ports) in selectors {
            let selects = |of: &Labels| selector.iter().all(|(key, value)| of.get(key) == Some(value));
            if selector.is_empty() || self.configs.all::<Pod>().any(|(pod, _)| selects(&pod.meta.labels)) {
                continue;
            }
            let value = selector.get("istio").or_else(|| selector.values().next());
            let gateway = format!("istio-{}", value.map_or("gateway", String::as_str).trim_start_matches("istio-"));
            let mut pod_labels = json!({ "app": gateway, labels::TLS_MODE: "istio" });
            for (key, value) in &selector {
                pod_labels[key] = value.as_str().into();
            }
            let pod = json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "name": gateway, "namespace": "istio-system", "labels": pod_labels,
                    "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": gateway, "controller": true}],
                },
                "spec": {
                    "serviceAccountName": format!("{gateway}-service-account"),
                    "containers": [{"name": "istio-proxy", "image": "auto"}],
                },
                "status": self.status(),
            });
            self.add(&pod);
            self.notes.push(format!("assumed: a gateway istio-system/{gateway}, which Gateway {name} selects"));
            if self.configs.get::<Service>("istio-system", &gateway).is_none() {
                let mut numbers: Vec<u16> = [80, 443].into_iter().chain(ports).collect();
                numbers.sort_unstable();
                numbers.dedup();
                let ports: Vec<Value> = numbers
                    .iter()
                    .map(|port| {
                        let target = match port {
                            80 => 8080,
                            443 => 8443,
                            other => *other,
                        };
                        let kind = match port {
                            80 => "http2",
                            443 => "https",
                            _ => "tcp",
                        };
                        json!({"name": format!("{kind}-{port}"), "port": port, "targetPort": target})
                    })
                    .collect();
                self.add(&json!({
                    "apiVersion": "v1", "kind": "Service",
                    "metadata": {"name": gateway, "namespace": "istio-system"},
                    "spec": {"selector": selector, "ports": ports},
                }));
            }
        }
    }

    fn cluster_ips(&mut self) {
        let waiting: Vec<Arc<Object>> = self
            .configs
            .all::<Service>()
            .filter(|(_, service)| {
                let spec = &service.spec;
                spec.kind != "ExternalName" && !spec.is_headless() && spec.addresses().is_empty()
            })
            .map(|(object, _)| Arc::clone(object))
            .collect();
        for object in waiting {
            self.services += 1;
            let mut value = (*object.raw).clone();
            value["spec"]["clusterIP"] = address([10, 96], self.services).into();
            self.add(&value);
        }
    }
}
