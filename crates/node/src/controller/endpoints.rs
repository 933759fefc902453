//! Endpoint slices of services, cluster DNS and service addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use api::k8s::{self, IntOrString};
use api::{ConfigSet, Kind, Object};
use types::wellknown::{DEFAULT_DOMAIN_SUFFIX, HOST_NAME, labels};
use types::{NamespacedName, Selector};

use super::{NODE_NAME, report};
use crate::runtime::PodRuntime;
use crate::spec::{Name, ServiceAddress, ServicePort};
use crate::store::Store;

/// Marks slices of ours, as Kubernetes marks its own.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";

/// What the machine was told last.
#[derive(Debug, Default)]
pub(super) struct Published {
    names: BTreeMap<String, Name>,
    services: Vec<ServiceAddress>,
}

impl Published {
    /// Brings slices, names and service addresses to what pods and services say.
    pub(super) async fn reconcile(&mut self, store: &Store, runtime: &PodRuntime) {
        let wanted = slices(&store.objects());
        let keep: BTreeSet<String> = wanted.iter().map(name_of).collect();
        for slice in &wanted {
            report(store.put(slice));
        }
        let objects = store.objects();
        for (object, _) in objects.all::<k8s::EndpointSlice>() {
            let is_ours = object.meta.labels.get(MANAGED_BY).is_some_and(|by| by == MANAGER);
            if is_ours && !keep.contains(&object.key().to_string()) {
                // Ours is not saved, so nothing can fail.
                drop(store.delete(Kind::EndpointSlice, &object.key()));
            }
        }
        let objects = store.objects();
        let names = names(&objects);
        if names != self.names {
            match runtime.set_names(names.clone()).await {
                Ok(()) => self.names = names,
                Err(error) => tracing::warn!(%error, "cannot set the names of cluster DNS"),
            }
        }
        let services = services(&objects);
        if services != self.services {
            match runtime.set_services(services.clone()).await {
                Ok(()) => self.services = services,
                Err(error) => tracing::warn!(%error, "cannot set service addresses"),
            }
        }
    }
}

fn name_of(slice: &Value) -> String {
    let text = |key: &str| slice["metadata"][key].as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text("namespace"), text("name"))
}

/// The slices of all services with a selector: one for each set of pod ports.
fn slices(objects: &ConfigSet) -> Vec<Value> {
    let mut out = Vec::new();
    for (object, service) in objects.all::<k8s::Service>() {
        if service.spec.selector.is_empty() || service.spec.kind == "ExternalName" {
            continue;
        }
        let selector = Selector(service.spec.selector.clone());
        let mut groups: BTreeMap<Vec<u16>, Vec<Value>> = BTreeMap::new();
        for (pod, typed) in objects.in_namespace::<k8s::Pod>(&object.meta.namespace) {
            let has_ended = matches!(typed.status.phase.as_str(), "Succeeded" | "Failed");
            if typed.status.pod_ip.is_empty() || has_ended || pod.meta.deleted || !selector.matches(&pod.meta.labels) {
                continue;
            }
            let ports: Option<Vec<u16>> = service.spec.ports.iter().map(|port| pod_port(port, typed)).collect();
            let Some(ports) = ports else { continue };
            groups.entry(ports).or_default().push(endpoint(pod, typed, service));
        }
        if groups.is_empty() {
            // An empty slice says that there is nobody.
            groups.insert(service.spec.ports.iter().map(|port| port.port).collect(), Vec::new());
        }
        for (index, (ports, endpoints)) in groups.into_iter().enumerate() {
            out.push(slice(object, service, index, &ports, &endpoints));
        }
    }
    out
}

fn pod_port(port: &k8s::ServicePort, pod: &k8s::Pod) -> Option<u16> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::Name(name)) => {
            pod.spec.containers.iter().flat_map(|c| &c.ports).find(|p| p.name == *name).map(|p| p.container_port)
        }
    }
}

fn endpoint(pod: &Object, typed: &k8s::Pod, service: &k8s::Service) -> Value {
    let is_ready = typed.status.is_ready() || service.spec.publish_not_ready_addresses;
    let mut endpoint = json!({
        "addresses": [typed.status.pod_ip],
        "conditions": {"ready": is_ready, "serving": is_ready, "terminating": false},
        "nodeName": NODE_NAME,
        "targetRef": {"kind": "Pod", "namespace": &*pod.meta.namespace, "name": &*pod.meta.name, "uid": &*pod.meta.uid},
    });
    if !typed.spec.hostname.is_empty() {
        endpoint["hostname"] = typed.spec.hostname.clone().into();
    }
    endpoint
}

fn slice(object: &Object, service: &k8s::Service, index: usize, ports: &[u16], endpoints: &[Value]) -> Value {
    let ports: Vec<Value> = service
        .spec
        .ports
        .iter()
        .zip(ports)
        .map(|(port, number)| {
            let protocol = if port.protocol.is_empty() { "TCP" } else { &port.protocol };
            let mut out = json!({"name": port.name, "protocol": protocol, "port": number});
            if let Some(app) = &port.app_protocol {
                out["appProtocol"] = app.clone().into();
            }
            out
        })
        .collect();
    let mut own_labels = json!({});
    own_labels[labels::SERVICE_NAME] = (*object.meta.name).into();
    own_labels[MANAGED_BY] = MANAGER.into();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{}-{index}", object.meta.name), "namespace": &*object.meta.namespace, "labels": own_labels,
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": &*object.meta.name, "uid": &*object.meta.uid, "controller": true}]},
        "addressType": "IPv4", "endpoints": endpoints, "ports": ports,
    })
}

fn of_service<'a>(
    objects: &'a ConfigSet,
    key: &'a NamespacedName,
) -> impl Iterator<Item = &'a k8s::EndpointSlice> + 'a {
    objects
        .in_namespace::<k8s::EndpointSlice>(&key.namespace)
        .filter(move |(object, _)| object.meta.labels.get(labels::SERVICE_NAME).is_some_and(|name| **name == *key.name))
        .map(|(_, slice)| &**slice)
}

fn is_ready(endpoint: &k8s::Endpoint) -> bool {
    endpoint.conditions.ready != Some(false)
}

/// Full names of services, of pods of headless services, and of the machine.
fn names(objects: &ConfigSet) -> BTreeMap<String, Name> {
    let mut out: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    let mut aliases: Vec<(String, Name)> = Vec::new();
    out.insert(HOST_NAME.to_owned(), vec![capture::Network::LOCAL.host.into()]);
    for (object, service) in objects.all::<k8s::Service>() {
        let key = object.key();
        let full = format!("{}.{}.svc.{DEFAULT_DOMAIN_SUFFIX}", key.name, key.namespace);
        if service.spec.kind == "ExternalName" {
            let target = service.spec.external_name.trim_end_matches('.').to_ascii_lowercase();
            aliases.push((full, Name::Alias(target)));
            continue;
        }
        if !service.spec.is_headless() {
            let addresses = service.spec.addresses().into_iter().filter_map(|ip| ip.parse().ok()).collect();
            out.insert(full, addresses);
            continue;
        }
        let mut all = Vec::new();
        for slice in of_service(objects, &key) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| is_ready(endpoint)) {
                let addresses: Vec<IpAddr> = endpoint.addresses.iter().filter_map(|ip| ip.parse().ok()).collect();
                if !endpoint.hostname.is_empty() {
                    out.entry(format!("{}.{full}", endpoint.hostname)).or_default().extend(&addresses);
                }
                all.extend(addresses);
            }
        }
        out.insert(full, all);
    }
    out.into_iter().map(|(name, addresses)| (name, Name::Addresses(addresses))).chain(aliases).collect()
}

/// Service addresses with the ready endpoints behind each port.
fn services(objects: &ConfigSet) -> Vec<ServiceAddress> {
    let mut out = Vec::new();
    for (object, service) in objects.all::<k8s::Service>() {
        let key = object.key();
        for ip in service.spec.addresses().into_iter().filter_map(|ip| ip.parse::<IpAddr>().ok()) {
            let ports = service.spec.ports.iter().filter_map(|port| {
                let protocol = match port.protocol.as_str() {
                    "" | "TCP" => capture::Protocol::Tcp,
                    "UDP" => capture::Protocol::Udp,
                    _ => return None,
                };
                let mut endpoints = Vec::new();
                for slice in of_service(objects, &key) {
                    let Some(target) = slice.ports.iter().find(|target| target.name == port.name) else { continue };
                    let ready = slice.endpoints.iter().filter(|endpoint| is_ready(endpoint)).flat_map(|e| &e.addresses);
                    let same_family =
                        ready.filter_map(|a| a.parse::<IpAddr>().ok()).filter(|a| a.is_ipv4() == ip.is_ipv4());
                    endpoints.extend(same_family.map(|address| SocketAddr::new(address, target.port)));
                }
                Some(ServicePort { port: port.port, protocol, endpoints })
            });
            out.push(ServiceAddress { ip, ports: ports.collect() });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, ip: &str, ready: bool, port_name: &str, port: u16) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "uid": name, "labels": {"app": "web"}},
            "spec": {"hostname": name, "containers": [{"name": "c", "image": "i", "ports": [{"name": port_name, "containerPort": port}]}]},
            "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}})
    }

    fn set(list: &[Value]) -> ConfigSet {
        ConfigSet::new(list.iter().map(|value| {
            let (object, findings) = api::from_json(value);
            object.unwrap_or_else(|| panic!("{findings:?}"))
        }))
    }

    #[test]
    fn slices_names_and_addresses() {
        let service = |name: &str, ip: &str| {
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
                "spec": {"clusterIP": ip, "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "web"}]}})
        };
        let mut deleted = pod("d", "10.77.0.13", true, "web", 8080);
        deleted["metadata"]["deletionTimestamp"] = "2026-11-25T03:47:00Z".into();
        let mut list = vec![
            service("web", "10.96.1.1"),
            service("pods", "None"),
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "far", "namespace": "shop"},
                "spec": {"type": "ExternalName", "externalName": "API.example.org"}}),
            pod("a", "10.77.0.10", true, "web", 8080),
            pod("b", "10.77.0.11", false, "web", 8080),
            pod("c", "10.77.0.12", true, "web", 9090),
            deleted,
            pod("e", "10.77.0.14", true, "other", 1),
        ];
        let made = slices(&set(&list));
        assert_eq!(made.len(), 4, "two sets of ports for each service");
        list.extend(made);
        let objects = set(&list);
        let services = services(&objects);
        assert_eq!(services.len(), 1);
        assert_eq!(
            services[0].ports[0].endpoints,
            ["10.77.0.10:8080".parse().unwrap(), "10.77.0.12:9090".parse().unwrap()]
        );
        let names = names(&objects);
        let addresses = |of: &[&str]| Name::Addresses(of.iter().map(|ip| ip.parse().unwrap()).collect());
        assert_eq!(names["web.shop.svc.cluster.local"], addresses(&["10.96.1.1"]));
        assert_eq!(names["pods.shop.svc.cluster.local"], addresses(&["10.77.0.10", "10.77.0.12"]));
        assert!(names.contains_key("a.pods.shop.svc.cluster.local"));
        assert_eq!(names["host.lateen.internal"], addresses(&["10.77.0.2"]));
        assert_eq!(names["far.shop.svc.cluster.local"], Name::Alias("api.example.org".into()));
    }
}
