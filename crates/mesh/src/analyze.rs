//! What is odd about objects together, and what became of each.
//!
//! *Source*: Istio's analysis messages where they exist (`IST…`), ours otherwise (`LAT…`).

mod gateways;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::networking as net;
use api::security::Action;
use types::{Effect, Finding, Labels, ObjectRef, Severity};

use crate::config::Config;
use crate::host;
use crate::policy::{self, ByNamespace, Selects};
use crate::service::Service;
use crate::snapshot::MeshSnapshot;
use crate::virtual_service::{MESH_GATEWAY, VirtualService};
use crate::visibility::Visibility;

/// A referenced object does not exist.
const REFERENCED_NOT_FOUND: &str = "IST0101";
/// Two VirtualServices claim one host in the mesh.
const CONFLICTING_MESH_HOSTS: &str = "IST0109";
/// Two Sidecars select one workload.
const CONFLICTING_SIDECARS: &str = "IST0110";
/// Two Sidecars without selector in one namespace.
const SEVERAL_SIDECARS: &str = "IST0111";
/// A destination without a port, where it decides.
const PORT_NEEDED: &str = "IST0112";
/// A selector selects no workload.
const NO_WORKLOADS: &str = "IST0127";
/// An entry that is never reached.
const UNREACHABLE_RULE: &str = "IST0130";
/// A match that an earlier one takes.
const INEFFECTIVE_MATCH: &str = "IST0131";
/// A subset that no pod is in.
const EMPTY_SUBSET: &str = "IST0173";
/// A rule for a host that nothing declares.
const UNKNOWN_RULE_HOST: &str = "IST0174";
/// One host and port with two protocols.
const CONFLICTING_PROTOCOLS: &str = "IST0177";
/// Another namespace's calls to another namespace's service are routed.
const FOREIGN_HOST: &str = "LAT0250";

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
    foreign_hosts(snapshot, findings);
    gateways::analyze(snapshot, findings);
    for vs in snapshot.virtual_services().all() {
        shadowed_entries(vs, findings);
        destinations_exist(snapshot, vs, findings);
    }
    rules_have_hosts(snapshot, findings);
    subsets_have_pods(snapshot, findings);
    entries_agree(snapshot, findings);
    providers_exist(snapshot, findings);
    policies_have_workloads(snapshot, snapshot.peer_authentications(), findings);
    policies_have_workloads(snapshot, snapshot.request_authentications(), findings);
    policies_have_workloads(snapshot, snapshot.authorization_policies(), findings);
}

/// Entries after one that matches everything, and matches that an earlier entry has too.
fn shadowed_entries(vs: &VirtualService, findings: &mut Vec<Finding>) {
    let mut catch_all: Option<usize> = None;
    for (index, entry) in vs.http.iter().enumerate() {
        let Some(source) = entry.from.first() else {
            continue;
        };
        if let Some(first) = catch_all {
            let winner = &vs.http[first].from[0].field;
            // What one object shows by itself was said when it was read; delegates meet only here.
            if entry.from.len() == 1 && vs.http[first].from.len() == 1 {
                continue;
            }
            findings.push(finding(
                UNREACHABLE_RULE,
                Severity::Warning,
                &vs.object,
                source.field.clone(),
                format!("{winner} matches every request, so this entry is never reached"),
                "move the entry without conditions to the end",
            ));
            continue;
        }
        for (at, request) in entry.route.matches.iter().enumerate() {
            let same = |of: &net::HttpMatchRequest| conditions(of) == conditions(request);
            let Some(earlier) = vs.http[..index].iter().find(|other| other.route.matches.iter().any(same)) else {
                continue;
            };
            findings.push(finding(
                INEFFECTIVE_MATCH,
                Severity::Info,
                &vs.object,
                format!("{}.match[{at}]", source.field),
                format!("{} has the same match and comes first", earlier.from[0].field),
                "remove one of the two",
            ));
        }
        if entry.route.matches_everything() {
            catch_all = Some(index);
        }
    }
}

/// A match without what does not decide: its names.
fn conditions(of: &net::HttpMatchRequest) -> net::HttpMatchRequest {
    net::HttpMatchRequest { name: String::new(), stat_prefix: String::new(), ..of.clone() }
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
    match destination.port.as_ref().filter(|port| port.number != 0) {
        Some(port) if service.port(port.number).is_none() => findings.push(finding(
            REFERENCED_NOT_FOUND,
            Severity::Error,
            object,
            format!("{field}.port"),
            format!("{} has no port {}; such requests get 503 (NC)", service.object, port.number),
            "name one of its ports",
        )),
        Some(_) => {}
        None => port_is_plain(snapshot, vs, object, field, service, findings),
    }
    if destination.subset.is_empty() {
        return;
    }
    let labels = Labels::new();
    let client = if vs.binds_to(MESH_GATEWAY) { &*vs.object.namespace } else { &*service.namespace };
    let rule = snapshot
        .destination_rule(client, &labels, service)
        .or_else(|| snapshot.destination_rule(&service.namespace, &labels, service));
    if rule.is_none_or(|rule| rule.subset(&destination.subset).is_none()) {
        findings.push(finding(
            REFERENCED_NOT_FOUND,
            Severity::Error,
            object,
            format!("{field}.subset"),
            format!(
                "no DestinationRule defines subset {} of host {}; such requests get 503 (NC)",
                destination.subset, service.host
            ),
            "add the subset to the host's DestinationRule",
        ));
    }
}

/// Without a port, a sidecar takes the port that the client dialled, and a gateway the service's
/// only one, else its server's. Where that is none of the service's, requests get 503 (NC).
fn port_is_plain(
    snapshot: &MeshSnapshot,
    vs: &VirtualService,
    object: &ObjectRef,
    field: &str,
    service: &Service,
    findings: &mut Vec<Finding>,
) {
    let mut missing = BTreeSet::new();
    if vs.binds_to(MESH_GATEWAY) {
        let dialled = vs.hosts.iter().filter_map(|host| find_service(snapshot, &vs.object.namespace, host));
        missing.extend(dialled.flat_map(|service| &service.ports).map(|port| port.number));
    }
    if service.ports.len() != 1 {
        let bound = snapshot.gateways().iter().filter(|gateway| vs.binds_to(&gateway.key().to_string()));
        let servers = bound.flat_map(|gateway| &gateway.spec.servers);
        missing.extend(servers.filter_map(|server| server.port.as_ref()).map(|port| port.number));
    }
    missing.retain(|number| service.port(*number).is_none());
    if missing.is_empty() {
        return;
    }
    let numbers: Vec<String> = missing.iter().map(ToString::to_string).collect();
    findings.push(finding(
        PORT_NEEDED,
        Severity::Warning,
        object,
        format!("{field}.port"),
        format!(
            "without a port, requests to port {} go to that port of {}, which it does not have: they get 503 (NC)",
            numbers.join(" or "),
            service.host
        ),
        "write the destination's port",
    ));
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

/// Whoever may write a VirtualService anywhere may route everybody's calls to any service, as in Istio; here it is
/// said at least. Routing the calls of one's own namespace is nobody else's matter, and the root namespace is the
/// mesh's own.
///
/// *Source*: `docs/parity.md`, Security 14, class 27.
fn foreign_hosts(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    for vs in snapshot.virtual_services().all() {
        let home = &*vs.object.namespace;
        let reaches_others = match &vs.visibility {
            Visibility::Public => true,
            Visibility::Namespaces(names) => names.iter().any(|name| &**name != home),
        };
        if !vs.binds_to(MESH_GATEWAY) || home == snapshot.root_namespace() || !reaches_others {
            continue;
        }
        for (index, claimed) in vs.hosts.iter().enumerate() {
            let candidates =
                if host::is_wildcard(claimed) { snapshot.services() } else { snapshot.services_of_host(claimed) };
            let mut owners = candidates.iter().filter(|service| host::covers(claimed, &service.host));
            let Some(owner) = owners.clone().next() else { continue };
            if owners.any(|service| &*service.namespace == home) {
                continue;
            }
            findings.push(finding(
                FOREIGN_HOST,
                Severity::Warning,
                &vs.object,
                format!("spec.hosts[{index}]"),
                format!(
                    "routes the calls of other namespaces to {}, which is of namespace {}",
                    owner.host, owner.namespace
                ),
                "put it into the service's namespace, or write `exportTo: [.]` for the calls of its own namespace only",
            ));
        }
    }
}

fn visibilities_meet(a: &VirtualService, b: &VirtualService) -> bool {
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
        let code = if pairs.is_empty() { SEVERAL_SIDECARS } else { CONFLICTING_SIDECARS };
        let key = (config.object.namespace.clone(), pairs);
        match seen.get(&key) {
            Some(winner) => findings.push(finding(
                code,
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
                UNKNOWN_RULE_HOST,
                Severity::Warning,
                object,
                "spec.host",
                format!("no Service or ServiceEntry declares host {}, so this changes nothing", rule.host),
                "a short name means a service of the rule's own namespace; write the full name for others",
            ));
        }
    }
}

/// Requests to a subset without pods get 503 (UH). Before a service has any endpoint nothing is said.
fn subsets_have_pods(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    for rule in snapshot.destination_rules().all() {
        let services: Vec<_> =
            snapshot.services().iter().filter(|service| host::covers(&rule.host, &service.host)).collect();
        let sets: Vec<_> = services.iter().map(|service| snapshot.endpoints(&service.key())).collect();
        if sets.iter().all(|set| set.by_port.values().all(Vec::is_empty)) {
            continue;
        }
        for subset in &rule.subsets {
            let labels = &subset.spec.labels;
            let has_pods = sets
                .iter()
                .flat_map(|set| set.by_port.values().flatten())
                .any(|endpoint| labels.iter().all(|(key, value)| endpoint.labels.get(key) == Some(value)));
            if !has_pods {
                findings.push(finding(
                    EMPTY_SUBSET,
                    Severity::Error,
                    &subset.from,
                    "spec.subsets",
                    format!(
                        "no endpoint of {} carries the labels of subset {}; requests to it get 503 (UH)",
                        rule.host, subset.spec.name
                    ),
                    "correct the subset's labels, or start such a workload",
                ));
            }
        }
    }
}

/// Two declarations of one host must mean the same protocol on a port; the older is served.
fn entries_agree(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    let mut first: BTreeMap<(&str, u16), &Arc<Service>> = BTreeMap::new();
    for service in snapshot.services() {
        for port in &service.ports {
            let older = *first.entry((&*service.host, port.number)).or_insert(service);
            let theirs = older.port(port.number).map(|port| port.protocol);
            if older.object != service.object && theirs.is_some_and(|theirs| theirs != port.protocol) {
                findings.push(finding(
                    CONFLICTING_PROTOCOLS,
                    Severity::Warning,
                    &service.object,
                    "spec.ports",
                    format!(
                        "{} is older and declares port {} of {} as another protocol",
                        older.object, port.number, service.host
                    ),
                    "use one protocol for a host and port",
                ));
            }
        }
    }
}

/// A CUSTOM policy whose provider is unknown refuses what it matches.
fn providers_exist(snapshot: &MeshSnapshot, findings: &mut Vec<Finding>) {
    for policy in snapshot.authorization_policies().all() {
        let Some(name) = policy.spec.provider.as_ref().map(|provider| provider.name.as_str()) else { continue };
        if policy.spec.action == Action::Custom && snapshot.mesh_config().extension_provider(name).is_none() {
            findings.push(finding(
                REFERENCED_NOT_FOUND,
                Severity::Error,
                &policy.object,
                PROVIDER_FIELD,
                format!("there is no extension provider {name}, so what the policy matches is refused"),
                "add it to meshConfig.extensionProviders",
            ));
        }
    }
}

const PROVIDER_FIELD: &str = "spec.provider.name";

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
        let is_whole = match &*found.code {
            CONFLICTING_SIDECARS | SEVERAL_SIDECARS | UNKNOWN_RULE_HOST | NO_WORKLOADS => true,
            "LAT0220" | "LAT0221" | "LAT0201" => true,
            REFERENCED_NOT_FOUND => &*found.field == "spec.selector",
            _ => false,
        };
        if &*found.code == REFERENCED_NOT_FOUND && &*found.field == PROVIDER_FIELD {
            *effect = Effect::FailsClosed { reason: found.message.clone() };
        } else if is_whole {
            *effect = Effect::Ignored { reason: found.message.clone(), by: winner_of(snapshot, object) };
        } else if matches!(&*found.code, CONFLICTING_MESH_HOSTS | "LAT0240")
            && *effect == Effect::Effective
            && let Some(by) = winner_of(snapshot, object)
        {
            *effect = Effect::PartlyShadowed { by };
        }
    }
    effects
}

/// The older object that says the same, if one does.
fn winner_of(snapshot: &MeshSnapshot, loser: &ObjectRef) -> Option<ObjectRef> {
    fn oldest<T>(all: &[Config<T>], loser: &ObjectRef, same: impl Fn(&T, &T) -> bool) -> Option<ObjectRef> {
        let mine = all.iter().find(|config| config.object == *loser)?;
        let winner = all.iter().find(|config| config.age < mine.age && same(&config.spec, &mine.spec))?;
        Some(winner.object.clone())
    }
    match &*loser.kind {
        "DestinationRule" => {
            let rule = snapshot.destination_rules().all().find(|rule| rule.from.contains(loser))?;
            Some(rule.object().clone()).filter(|winner| winner != loser)
        }
        "Sidecar" => {
            oldest(snapshot.sidecars().of(&loser.namespace), loser, |a, b| a.workload_selector == b.workload_selector)
        }
        "PeerAuthentication" => {
            oldest(snapshot.peer_authentications().of(&loser.namespace), loser, |a, b| a.selector() == b.selector())
        }
        _ => {
            let all = snapshot.virtual_services().all();
            let mine = all.iter().find(|vs| vs.object == *loser)?;
            let winner = all.iter().find(|vs| {
                vs.object != *loser && vs.age < mine.age && vs.hosts.iter().any(|host| mine.hosts.contains(host))
            })?;
            Some(winner.object.clone())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(yaml: &str) -> Vec<String> {
        let documents = api::parse_documents("test.yaml", yaml);
        let objects: Vec<_> = documents.objects.into_iter().map(|parsed| parsed.object).collect();
        let (_, findings) = MeshSnapshot::next(None, &api::ConfigSet::new(objects));
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

    #[test]
    fn routing_of_other_namespaces_calls_to_foreign_services_is_told() {
        let service = |namespace: &str| {
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: {namespace}}}\nspec: {{ports: [{{name: http, port: 80}}]}}\n"
            )
        };
        let routes = |namespace: &str, host: &str, rest: &str| {
            format!(
                "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: r, namespace: {namespace}}}\nspec: {{hosts: ['{host}'], http: [{{directResponse: {{status: 200}}}}]{rest}}}\n"
            )
        };
        let told = |namespace: &str, host: &str, rest: &str| {
            let all = codes(&(service("shop") + &service("other") + &routes(namespace, host, rest)));
            all.iter().any(|code| code.starts_with(FOREIGN_HOST))
        };
        let foreign = "a.shop.svc.cluster.local";
        for (namespace, host, rest, expect) in [
            ("other", foreign, "", true),
            ("other", "*.shop.svc.cluster.local", "", true),
            ("other", foreign, ", exportTo: [., shop]", true),
            // One's own service, among others or alone; one's own calls; a gateway's; the mesh's own namespace.
            ("other", "*.svc.cluster.local", "", false),
            ("other", "a", "", false),
            ("shop", foreign, "", false),
            ("other", foreign, ", exportTo: [.]", false),
            ("other", foreign, ", exportTo: ['~']", false),
            ("other", foreign, ", gateways: [gateway]", false),
            ("istio-system", foreign, "", false),
            ("other", "nobody.example", "", false),
        ] {
            assert_eq!(told(namespace, host, rest), expect, "{namespace} {host} {rest}");
        }
    }
}
