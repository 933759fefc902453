//! What is odd about objects together, and what became of each.
//!
//! *Source*: Istio's analysis messages where they exist (`IST…`), ours otherwise (`LAT…`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::networking as net;
use types::{Effect, Finding, Labels, ObjectRef, Severity};

use crate::host;
use crate::policy::{self, ByNamespace, Selects};
use crate::service::Service;
use crate::snapshot::MeshSnapshot;
use crate::virtual_service::{MESH_GATEWAY, VirtualService};

/// A referenced object does not exist.
const REFERENCED_NOT_FOUND: &str = "IST0101";
/// Two VirtualServices claim one host in the mesh.
const CONFLICTING_MESH_HOSTS: &str = "IST0109";
/// Two Sidecars select one workload.
const CONFLICTING_SIDECARS: &str = "IST0110";
/// A destination's port is not one of the service's.
const UNKNOWN_PORT: &str = "IST0112";
/// A selector selects no workload.
const NO_WORKLOADS: &str = "IST0127";
/// Weights of a route.
const SHADOWED_ROUTE: &str = "IST0130";

fn finding(
    code: &str,
    severity: Severity,
    object: &ObjectRef,
    field: impl Into<Box<str>>,
    message: String,
    hint: &str,
) -> Finding {
    Finding {
        code: code.into(),
        severity,
        object: Some(object.clone()),
        field: field.into(),
        position: None,
        message: message.into(),
        hint: hint.into(),
    }
}

/// Appends findings about the whole snapshot.
pub(crate) fn analyze(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    policy::peer_conflicts(snapshot.peer_authentications(), snapshot.root_namespace(), findings);
    sidecar_conflicts(snapshot, findings);
    mesh_host_conflicts(snapshot, findings);
    for vs in snapshot.virtual_services().all() {
        gateways_exist(snapshot, vs, findings);
        shadowed_entries(vs, findings);
        destinations_exist(snapshot, vs, findings);
    }
    rules_have_hosts(snapshot, findings);
    gateways_have_workloads(snapshot, findings);
    policies_have_workloads(snapshot, snapshot.peer_authentications(), findings);
    policies_have_workloads(snapshot, snapshot.request_authentications(), findings);
    policies_have_workloads(snapshot, snapshot.authorization_policies(), findings);
}

fn gateways_exist(snapshot: &MeshSnapshot, vs: &VirtualService, findings: &mut Vec<Finding>) {
    for (index, gateway) in vs.gateways.iter().enumerate() {
        if &**gateway == MESH_GATEWAY {
            continue;
        }
        let exists =
            snapshot.gateways().iter().any(|config| format!("{}/{}", config.namespace(), config.name()) == **gateway);
        if !exists {
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

/// Entries after one that matches everything.
fn shadowed_entries(vs: &VirtualService, findings: &mut Vec<Finding>) {
    let mut catch_all: Option<usize> = None;
    for (index, entry) in vs.http.iter().enumerate() {
        let Some(source) = entry.from.first() else {
            continue;
        };
        if let Some(first) = catch_all {
            let winner = &vs.http[first].from[0].field;
            findings.push(finding(
                SHADOWED_ROUTE,
                Severity::Warning,
                &vs.object,
                source.field.clone(),
                format!("{winner} matches every request, so this entry is never reached"),
                "move the entry without conditions to the end",
            ));
            continue;
        }
        if matches_everything(&entry.route) {
            catch_all = Some(index);
        }
    }
}

/// Whether an entry matches every request of every proxy.
fn matches_everything(route: &net::HttpRoute) -> bool {
    route.matches.is_empty()
        || route.matches.iter().any(|m| {
            let any_path = match &m.uri {
                None | Some(api::scalar::StringMatch::Present) => true,
                Some(api::scalar::StringMatch::Prefix(prefix)) => prefix == "/" || prefix.is_empty(),
                Some(_) => false,
            };
            any_path
                && m.scheme.is_none()
                && m.method.is_none()
                && m.authority.is_none()
                && m.headers.is_empty()
                && m.without_headers.is_empty()
                && m.query_params.is_empty()
                && m.port == 0
                && m.source_labels.is_empty()
                && m.source_namespace.is_empty()
                && m.gateways.is_empty()
        })
}

fn destinations_exist(snapshot: &MeshSnapshot, vs: &VirtualService, findings: &mut Vec<Finding>) {
    for entry in &vs.http {
        let Some(source) = entry.from.last() else {
            continue;
        };
        let mut check = |path: String, destination: &net::Destination| {
            destination_exists(
                snapshot,
                vs,
                &source.object,
                &format!("{}.{path}", source.field),
                destination,
                findings,
            );
        };
        for (index, weighted) in entry.route.route.iter().enumerate() {
            check(format!("route[{index}].destination"), &weighted.destination);
        }
        if let Some(mirror) = &entry.route.mirror {
            check("mirror".into(), mirror);
        }
        for (index, mirror) in entry.route.mirrors.iter().enumerate() {
            check(format!("mirrors[{index}].destination"), &mirror.destination);
        }
    }
    for (index, route) in vs.tcp.iter().enumerate() {
        for (at, weighted) in route.route.iter().enumerate() {
            let field = format!("spec.tcp[{index}].route[{at}].destination");
            destination_exists(snapshot, vs, &vs.object, &field, &weighted.destination, findings);
        }
    }
    for (index, route) in vs.tls.iter().enumerate() {
        for (at, weighted) in route.route.iter().enumerate() {
            let field = format!("spec.tls[{index}].route[{at}].destination");
            destination_exists(snapshot, vs, &vs.object, &field, &weighted.destination, findings);
        }
    }
}

fn destination_exists(
    snapshot: &MeshSnapshot,
    vs: &VirtualService,
    object: &ObjectRef,
    field: &str,
    destination: &net::Destination,
    findings: &mut Vec<Finding>,
) {
    let host = snapshot.resolve_alias(&destination.host);
    let service = find_service(snapshot, &vs.object.namespace, host);
    let Some(service) = service else {
        let dotted = destination.host.matches('.').count() == 1;
        findings.push(finding(
            REFERENCED_NOT_FOUND,
            Severity::Error,
            object,
            format!("{field}.host"),
            format!("no Service or ServiceEntry declares host {}; such requests get 503 (NC)", destination.host),
            if dotted {
                "a host with a dot is taken literally: write the full name, such as name.namespace.svc.cluster.local"
            } else {
                "correct the host, or declare it with a ServiceEntry"
            },
        ));
        return;
    };
    if let Some(port) = destination.port.as_ref().filter(|port| port.number != 0)
        && service.port(port.number).is_none()
    {
        findings.push(finding(
            UNKNOWN_PORT,
            Severity::Error,
            object,
            format!("{field}.port"),
            format!("{} has no port {}; such requests get 503 (NC)", service.object, port.number),
            "name one of its ports",
        ));
    }
    if destination.subset.is_empty() {
        return;
    }
    let labels = Labels::new();
    let client = if vs.binds_to(MESH_GATEWAY) { &*vs.object.namespace } else { &*service.namespace };
    let rule = snapshot
        .destination_rule(client, &labels, service)
        .or_else(|| snapshot.destination_rule(&service.namespace, &labels, service));
    match rule {
        Some(rule) if rule.subset(&destination.subset).is_some() => {
            let subset = rule.subset(&destination.subset);
            let pairs = subset.map(|subset| &subset.spec.labels);
            let endpoints = snapshot.endpoints(&service.key());
            let some =
                endpoints.by_port.values().flatten().any(|endpoint| {
                    pairs.is_none_or(|pairs| pairs.iter().all(|(k, v)| endpoint.labels.get(k) == Some(v)))
                });
            if !some && !endpoints.by_port.is_empty() {
                findings.push(finding(
                    "LAT0206",
                    Severity::Warning,
                    object,
                    format!("{field}.subset"),
                    format!(
                        "no endpoint of {} carries the labels of subset {}; such requests get 503 (UH)",
                        service.host, destination.subset
                    ),
                    "correct the subset's labels, or start such a workload",
                ));
            }
        }
        _ => findings.push(finding(
            REFERENCED_NOT_FOUND,
            Severity::Error,
            object,
            format!("{field}.subset"),
            format!(
                "no DestinationRule defines subset {} of host {}; such requests get 503 (NC)",
                destination.subset, service.host
            ),
            "add the subset to the host's DestinationRule",
        )),
    }
}

fn find_service<'a>(snapshot: &'a MeshSnapshot, namespace: &str, host: &str) -> Option<&'a Arc<Service>> {
    let exact = snapshot.services_of_host(host);
    exact.iter().find(|service| service.visibility.is_visible_to(namespace)).or_else(|| exact.first()).or_else(|| {
        snapshot.services().iter().find(|service| host::is_wildcard(&service.host) && host::covers(&service.host, host))
    })
}

/// In the mesh the oldest VirtualService of a host wins whole.
fn mesh_host_conflicts(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    let mut winners: BTreeMap<&str, Vec<&Arc<VirtualService>>> = BTreeMap::new();
    for vs in snapshot.virtual_services().all() {
        if !vs.binds_to(MESH_GATEWAY) {
            continue;
        }
        for (index, claimed) in vs.hosts.iter().enumerate() {
            let owners = winners.entry(claimed).or_default();
            // Who sees one and not the other has no conflict.
            let winner = owners.iter().find(|owner| visibilities_meet(owner, vs));
            match winner {
                Some(winner) => findings.push(finding(
                    CONFLICTING_MESH_HOSTS,
                    Severity::Error,
                    &vs.object,
                    format!("spec.hosts[{index}]"),
                    format!("{} is older and routes host {claimed} in the mesh, so nothing of this object applies to it there", winner.object),
                    "put all routes of a host into one VirtualService, or use `delegate`",
                )),
                None => owners.push(vs),
            }
        }
    }
}

fn visibilities_meet(a: &VirtualService, b: &VirtualService) -> bool {
    use crate::visibility::Visibility;
    match (&a.visibility, &b.visibility) {
        (Visibility::Public, Visibility::Public) => true,
        (Visibility::Public, Visibility::Namespaces(names)) | (Visibility::Namespaces(names), Visibility::Public) => {
            !names.is_empty()
        }
        (Visibility::Namespaces(a), Visibility::Namespaces(b)) => a.intersection(b).next().is_some(),
    }
}

fn sidecar_conflicts(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    let mut seen: BTreeMap<(Box<str>, BTreeMap<String, String>), ObjectRef> = BTreeMap::new();
    for config in snapshot.sidecars().all() {
        let pairs = config.spec.workload_selector.as_ref().map(|selector| selector.labels.clone()).unwrap_or_default();
        let key = (config.object.namespace.clone(), pairs);
        match seen.get(&key) {
            Some(winner) => findings.push(finding(
                CONFLICTING_SIDECARS,
                Severity::Error,
                &config.object,
                "spec.workloadSelector",
                format!("{winner} is older and selects the same workloads, so this one changes nothing"),
                "keep one of the two; Sidecars are not merged",
            )),
            None => {
                seen.insert(key, config.object.clone());
            }
        }
    }
}

fn rules_have_hosts(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    for rule in snapshot.destination_rules().all() {
        let known = snapshot
            .services()
            .iter()
            .any(|service| host::covers(&rule.host, &service.host) || host::covers(&service.host, &rule.host));
        if known {
            continue;
        }
        for object in &rule.from {
            findings.push(finding(
                REFERENCED_NOT_FOUND,
                Severity::Error,
                object,
                "spec.host",
                format!("no Service or ServiceEntry declares host {}, so this changes nothing", rule.host),
                "a short name means a service of the rule's own namespace; write the full name for others",
            ));
        }
    }
}

fn gateways_have_workloads(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    if snapshot.workloads().is_empty() {
        return;
    }
    for gateway in snapshot.gateways() {
        let selected = snapshot
            .workloads()
            .values()
            .any(|workload| gateway.spec.selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value)));
        if !selected {
            findings.push(finding(
                REFERENCED_NOT_FOUND,
                Severity::Error,
                &gateway.object,
                "spec.selector",
                "no pod carries the selector's labels, so no proxy opens these servers".into(),
                "use the labels of a gateway's pods, such as istio: ingressgateway",
            ));
        }
    }
}

/// A selector that selects nobody protects nobody, which is seldom what was meant.
fn policies_have_workloads<T: Selects>(
    snapshot: &MeshSnapshot,
    policies: &ByNamespace<T>,
    findings: &mut Vec<Finding>,
) {
    if snapshot.workloads().is_empty() {
        return;
    }
    for policy in policies.all() {
        let Some(pairs) = policy.spec.selector().filter(|pairs| !pairs.is_empty()) else {
            continue;
        };
        let everywhere = policy.namespace() == snapshot.root_namespace();
        let selected = snapshot.workloads().values().any(|workload| {
            (everywhere || *workload.namespace == *policy.namespace())
                && pairs.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
        });
        if !selected {
            findings.push(finding(
                NO_WORKLOADS,
                Severity::Warning,
                &policy.object,
                "spec.selector",
                "no pod carries the selector's labels, so the policy holds for nobody".into(),
                "use the labels of the pods it is for",
            ));
        }
    }
}

/// What became of each object: the gravest finding about the whole of it decides.
pub(crate) fn effects(snapshot: &MeshSnapshot, findings: &[Finding]) -> BTreeMap<ObjectRef, Effect> {
    let mut effects = BTreeMap::new();
    let objects = snapshot
        .virtual_services()
        .all()
        .iter()
        .map(|vs| vs.object.clone())
        .chain(snapshot.destination_rules().all().flat_map(|rule| rule.from.iter().cloned()))
        .chain(snapshot.gateways().iter().map(|config| config.object.clone()))
        .chain(snapshot.sidecars().all().map(|config| config.object.clone()))
        .chain(snapshot.peer_authentications().all().map(|config| config.object.clone()))
        .chain(snapshot.request_authentications().all().map(|config| config.object.clone()))
        .chain(snapshot.authorization_policies().all().map(|config| config.object.clone()))
        .chain(snapshot.services().iter().map(|service| service.object.clone()));
    for object in objects.collect::<BTreeSet<_>>() {
        effects.insert(object, Effect::Effective);
    }
    for found in findings {
        let Some(object) = &found.object else {
            continue;
        };
        let Some(effect) = effects.get_mut(object) else {
            continue;
        };
        let whole = match &*found.code {
            CONFLICTING_SIDECARS | "LAT0220" | "LAT0221" | "LAT0201" => true,
            REFERENCED_NOT_FOUND => matches!(&*found.field, "spec.host" | "spec.selector"),
            _ => false,
        };
        if whole {
            *effect = Effect::Ignored { reason: found.message.clone(), by: None };
        } else if matches!(&*found.code, CONFLICTING_MESH_HOSTS | "IST0139") && *effect == Effect::Effective {
            *effect = Effect::PartlyShadowed { by: winner_of(snapshot, object, &found.field) };
        }
    }
    effects
}

/// The older object that a conflict names.
fn winner_of(snapshot: &MeshSnapshot, loser: &ObjectRef, _field: &str) -> ObjectRef {
    if &*loser.kind == "DestinationRule" {
        let rule = snapshot.destination_rules().all().find(|rule| rule.from.contains(loser));
        return rule.map_or_else(|| loser.clone(), |rule| rule.object().clone());
    }
    let all = snapshot.virtual_services().all();
    let mine = all.iter().find(|vs| vs.object == *loser);
    let winner = mine.and_then(|mine| {
        all.iter().find(|vs| {
            vs.object != *loser && vs.age < mine.age && vs.hosts.iter().any(|host| mine.hosts.contains(host))
        })
    });
    winner.map_or_else(|| loser.clone(), |vs| vs.object.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(yaml: &str) -> Vec<String> {
        let documents = api::parse_documents("test.yaml", yaml);
        let objects: Vec<_> = documents.objects.into_iter().map(|parsed| parsed.object).collect();
        let (_, findings) = MeshSnapshot::next(None, &api::ConfigSet::new(objects), &[]);
        findings.iter().map(|finding| format!("{} {}", finding.code, finding.object.as_ref().unwrap())).collect()
    }

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: a-1, namespace: shop, labels: {app: a}}
spec: {containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}
";

    fn policy(kind: &str, namespace: &str, app: &str, rest: &str) -> String {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {{selector: {{matchLabels: {{app: {app}}}}}{rest}}}\n"
        )
    }

    #[test]
    fn policies_that_hold_for_nobody() {
        for (kind, rest) in [
            ("AuthorizationPolicy", ""),
            ("PeerAuthentication", ", mtls: {mode: STRICT}"),
            ("RequestAuthentication", ""),
        ] {
            assert_eq!(codes(&format!("{POD}{}", policy(kind, "shop", "a", rest))), Vec::<String>::new(), "{kind}");
            let expect = format!("IST0127 {kind} shop/p");
            assert_eq!(codes(&format!("{POD}{}", policy(kind, "shop", "b", rest))), std::slice::from_ref(&expect));
            // Before any pod is known nothing is said.
            assert_eq!(codes(&policy(kind, "shop", "b", rest)), Vec::<String>::new());
            assert_eq!(codes(&format!("{POD}{}", policy(kind, "other", "a", rest))), [expect.replace("shop", "other")]);
        }
        assert_eq!(
            codes(&format!("{POD}{}", policy("AuthorizationPolicy", "istio-system", "a", ""))),
            Vec::<String>::new()
        );
    }
}
