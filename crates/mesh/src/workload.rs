//! Pods and WorkloadEntries as workloads.

use std::collections::BTreeMap;
use std::net::IpAddr;

use api::k8s;
use api::networking as net;
use types::labels::{canonical_name, canonical_revision};
use types::wellknown::labels;
use types::{Labels, Locality};

use crate::service::Workload;

/// `istio-locality` (parts joined by `.` or `/`), else the topology labels.
pub fn locality_of(of: &Labels) -> Locality {
    if let Some(text) = of.get(labels::LOCALITY) {
        return if text.contains('/') { Locality::parse(text) } else { Locality::parse(&text.replace('.', "/")) };
    }
    let part = |key: &str| of.get(key).map(|value| Box::from(value.as_str())).unwrap_or_default();
    Locality { region: part(labels::REGION), zone: part(labels::ZONE), sub_zone: part(labels::SUB_ZONE) }
}

/// The name of what a pod belongs to: its Deployment, another owner, or itself.
pub(crate) fn workload_name<'a>(meta: &'a api::Metadata, pod_labels: &'a Labels) -> &'a str {
    let hash = pod_labels.get(labels::POD_TEMPLATE_HASH).map(String::as_str);
    let without_hash = |name: &'a str| -> &'a str {
        hash.and_then(|hash| name.strip_suffix(hash)).and_then(|rest| rest.strip_suffix('-')).unwrap_or(name)
    };
    if let Some(owner) = meta.owners.iter().find(|owner| owner.controller).or_else(|| meta.owners.first()) {
        return if owner.kind == "ReplicaSet" { without_hash(&owner.name) } else { &owner.name };
    }
    // `<deployment>-<hash>-<random>`
    match (hash, meta.name.rsplit_once('-')) {
        (Some(hash), Some((head, _))) if head.ends_with(hash) => without_hash(head),
        _ => &meta.name,
    }
}

/// A pod as a workload; `None` while it has no address or after it has ended.
pub(crate) fn of_pod(meta: &api::Metadata, pod: &k8s::Pod) -> Option<Workload> {
    if matches!(pod.status.phase.as_str(), "Succeeded" | "Failed") {
        return None;
    }
    let mut ips: Vec<IpAddr> = Vec::new();
    let texts = std::iter::once(pod.status.pod_ip.as_str()).chain(pod.status.pod_ips.iter().map(|ip| ip.ip.as_str()));
    for text in texts {
        if let Ok(ip) = text.parse()
            && !ips.contains(&ip)
        {
            ips.push(ip);
        }
    }
    if ips.is_empty() {
        return None;
    }
    let name = workload_name(meta, &meta.labels);
    let mut ports = BTreeMap::new();
    for port in pod.spec.containers.iter().chain(&pod.spec.init_containers).flat_map(|container| &container.ports) {
        if !port.name.is_empty() {
            ports.entry(Box::from(port.name.as_str())).or_insert(port.container_port);
        }
    }
    Some(Workload {
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        ips,
        labels: meta.labels.clone(),
        service_account: pod.spec.account().into(),
        workload_name: name.into(),
        canonical_name: canonical_name(&meta.labels, name).into(),
        canonical_revision: endpoint_revision(&meta.labels),
        locality: locality_of(&meta.labels),
        node: pod.spec.node_name.as_str().into(),
        ports,
        is_tls_capable: meta.labels.get(labels::TLS_MODE).is_some_and(|mode| mode == "istio"),
        is_ready: pod.status.is_ready(),
        hostname: if pod.spec.hostname.is_empty() { meta.name.clone() } else { pod.spec.hostname.as_str().into() },
    })
}

/// The revision as endpoints carry it: `latest` counts as none.
fn endpoint_revision(of: &Labels) -> Box<str> {
    match canonical_revision(of) {
        "latest" => "".into(),
        revision => revision.into(),
    }
}

/// A WorkloadEntry, or an endpoint of a ServiceEntry, as a workload.
pub(crate) fn of_entry(name: &str, namespace: &str, entry: &net::WorkloadEntry, extra_labels: &Labels) -> Workload {
    let mut labels = extra_labels.clone();
    labels.extend(entry.labels.iter().map(|(key, value)| (key.clone(), value.clone())));
    let locality = if entry.locality.is_empty() { locality_of(&labels) } else { Locality::parse(&entry.locality) };
    let is_tls_capable = match labels.get(labels::TLS_MODE) {
        Some(mode) => mode == "istio",
        None => !entry.service_account.is_empty(),
    };
    Workload {
        name: name.into(),
        namespace: namespace.into(),
        ips: entry.address.parse().into_iter().collect(),
        service_account: entry.service_account.as_str().into(),
        workload_name: name.into(),
        canonical_name: canonical_name(&labels, name).into(),
        canonical_revision: endpoint_revision(&labels),
        locality,
        node: "".into(),
        ports: entry.ports.iter().map(|(name, port)| (Box::from(name.as_str()), *port)).collect(),
        is_tls_capable,
        is_ready: true,
        hostname: "".into(),
        labels,
    }
}
