//! Gateways, and VirtualServices bound to them.

use std::collections::{BTreeMap, BTreeSet};

use api::networking as net;
use types::{Finding, Labels, Severity};

use super::{REFERENCED_NOT_FOUND, finding};
use crate::config::Config;
use crate::host;
use crate::service::{TargetPort, Workload};
use crate::snapshot::MeshSnapshot;
use crate::virtual_service::{MESH_GATEWAY, VirtualService};

/// A host of a VirtualService is none of the Gateway's.
const HOST_NOT_IN_GATEWAY: &str = "IST0132";
/// One certificate under several servers: clients that reuse a connection get 404.
const DUPLICATE_CERTIFICATE: &str = "IST0138";
/// Routing by claims where no token is read.
const CLAIMS_WITHOUT_TOKENS: &str = "IST0149";
/// A server's port that no Service of the gateway has.
const PORT_NOT_ON_SERVICE: &str = "IST0162";
/// How a header match names a claim.
const CLAIM_PREFIX: &str = "@request.auth.claims";

pub(super) fn analyze(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    let by_key: BTreeMap<String, &Config<net::Gateway>> =
        snapshot.gateways().iter().map(|config| (config.key().to_string(), config)).collect();
    for vs in snapshot.virtual_services().all() {
        gateways_exist(vs, &by_key, findings);
        hosts_are_served(vs, &by_key, findings);
        claims_are_read(snapshot, vs, &by_key, findings);
    }
    duplicate_certificates(snapshot, findings);
    if snapshot.workloads().is_empty() {
        return;
    }
    for gateway in snapshot.gateways() {
        let pods: Vec<&Workload> = selected(snapshot, gateway).collect();
        if pods.is_empty() {
            findings.push(finding(
                REFERENCED_NOT_FOUND,
                Severity::Error,
                &gateway.object,
                "spec.selector",
                "no pod carries the selector's labels, so no proxy opens these servers".into(),
                "use the labels of a gateway's pods, such as istio: ingressgateway",
            ));
        } else {
            ports_are_on_services(snapshot, gateway, &pods, findings);
        }
    }
}

fn selects(gateway: &Config<net::Gateway>, labels: &Labels) -> bool {
    gateway.spec.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn selected<'a>(snapshot: &'a MeshSnapshot, gateway: &'a Config<net::Gateway>) -> impl Iterator<Item = &'a Workload> {
    snapshot.workloads().values().map(|workload| &**workload).filter(|workload| selects(gateway, &workload.labels))
}

fn gateways_exist(vs: &VirtualService, by_key: &BTreeMap<String, &Config<net::Gateway>>, findings: &mut Vec<Finding>) {
    for (index, gateway) in vs.gateways.iter().enumerate() {
        if &**gateway != MESH_GATEWAY && !by_key.contains_key(&**gateway) {
            findings.push(finding(
                REFERENCED_NOT_FOUND,
                Severity::Error,
                &vs.object,
                format!("spec.gateways[{index}]"),
                format!("there is no Gateway {gateway}"),
                "create it, or write namespace/name of an existing one",
            ));
        }
    }
}

/// A host that no server takes is never reached through the gateway. Hosts of a VirtualService that
/// is also bound to the mesh may be meant for sidecars.
fn hosts_are_served(
    vs: &VirtualService,
    by_key: &BTreeMap<String, &Config<net::Gateway>>,
    findings: &mut Vec<Finding>,
) {
    if vs.binds_to(MESH_GATEWAY) {
        return;
    }
    let gateways: Vec<_> = vs.gateways.iter().filter_map(|key| by_key.get(&**key)).collect();
    if gateways.is_empty() {
        return;
    }
    let takes = |gateway: &Config<net::Gateway>, name: &str| {
        gateway.spec.servers.iter().flat_map(|server| &server.hosts).any(|written| {
            let (namespace, served) = written.split_once('/').unwrap_or(("*", written));
            let admits = match namespace {
                "*" => true,
                "." => *gateway.namespace() == *vs.object.namespace,
                namespace => *namespace == *vs.object.namespace,
            };
            admits && host::overlaps(&served.to_ascii_lowercase(), name)
        })
    };
    for (index, name) in vs.hosts.iter().enumerate() {
        if !gateways.iter().any(|gateway| takes(gateway, name)) {
            findings.push(finding(
                HOST_NOT_IN_GATEWAY,
                Severity::Warning,
                &vs.object,
                format!("spec.hosts[{index}]"),
                format!("no server of {} takes host {name} from this namespace", vs.gateways.join(", ")),
                "add the host to a server's `hosts`, or correct it",
            ));
        }
    }
}

fn claims_are_read(
    snapshot: &MeshSnapshot,
    vs: &VirtualService,
    by_key: &BTreeMap<String, &Config<net::Gateway>>,
    findings: &mut Vec<Finding>,
) {
    let is_claim = |name: &String| name.to_ascii_lowercase().starts_with(CLAIM_PREFIX);
    let first = vs.http.iter().find(|entry| {
        entry.route.matches.iter().any(|of| of.headers.keys().chain(of.without_headers.keys()).any(is_claim))
    });
    let Some(source) = first.and_then(|entry| entry.from.first()) else { return };
    for key in &vs.gateways {
        let Some(gateway) = by_key.get(&**key) else { continue };
        let unread = selected(snapshot, gateway).find(|pod| {
            let root = snapshot.root_namespace();
            snapshot.request_authentications().matching(root, &pod.namespace, &pod.labels).next().is_none()
        });
        if let Some(pod) = unread {
            findings.push(finding(
                CLAIMS_WITHOUT_TOKENS,
                Severity::Error,
                &source.object,
                source.field.clone(),
                format!("it routes by claims, but no RequestAuthentication holds for the gateway's pod {}", pod.key()),
                "add a RequestAuthentication that selects the gateway's pods, in their namespace",
            ));
        }
    }
}

/// An HTTP/2 client may reuse a connection for every host of its certificate, and each server has
/// routes of its own.
fn duplicate_certificates(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    let mut first: BTreeMap<(&BTreeMap<String, String>, u16, &str), (&Config<net::Gateway>, usize)> = BTreeMap::new();
    for gateway in snapshot.gateways() {
        for (index, server) in gateway.spec.servers.iter().enumerate() {
            let credential = server.tls.as_ref().map_or("", |tls| &tls.credential_name);
            let port = server.port.as_ref().map_or(0, |port| port.number);
            if credential.is_empty() {
                continue;
            }
            let Some((other, at)) = first.get(&(&gateway.spec.selector, port, credential)) else {
                first.insert((&gateway.spec.selector, port, credential), (gateway, index));
                continue;
            };
            findings.push(finding(
                DUPLICATE_CERTIFICATE,
                Severity::Warning,
                &gateway.object,
                format!("spec.servers[{index}].tls.credentialName"),
                format!(
                    "{} spec.servers[{at}] uses {credential} too: a client that reuses its connection for a host of the other server gets 404",
                    other.object
                ),
                "serve all hosts of one certificate in one server, or give each server a certificate for its own hosts",
            ));
        }
    }
}

fn ports_are_on_services(
    snapshot: &MeshSnapshot,
    gateway: &Config<net::Gateway>,
    pods: &[&Workload],
    findings: &mut Vec<Finding>,
) {
    let mut known = BTreeSet::new();
    for pod in pods {
        let services = snapshot.services().iter().filter(|service| {
            service.namespace == pod.namespace
                && service.selector.as_ref().is_some_and(|selector| selector.matches(&pod.labels))
        });
        for port in services.flat_map(|service| &service.ports) {
            known.insert(port.number);
            if let TargetPort::Number(target) = port.target {
                known.insert(target);
            }
        }
    }
    if known.is_empty() {
        return;
    }
    for (index, server) in gateway.spec.servers.iter().enumerate() {
        let number = server.port.as_ref().map_or(0, |port| port.number);
        if number != 0 && !known.contains(&number) {
            findings.push(finding(
                PORT_NOT_ON_SERVICE,
                Severity::Warning,
                &gateway.object,
                format!("spec.servers[{index}].port.number"),
                format!("no Service of the gateway's pods has port {number}, so nobody reaches it through one"),
                "add the port to the gateway's Service, or use one of its ports",
            ));
        }
    }
}
