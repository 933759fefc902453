//! What our proxy would refuse of what was compiled for it.

use compile::{Capabilities, Resource, Resources, View};
use engine::config::Table;
use engine::lower::{self, Raw, Rejected};
use types::wellknown::type_urls;
use types::{Finding, ObjectRef, Severity};

/// Lowers every resource; what the engine refuses is a finding that names resource and field.
///
/// Only for Lateen's own proxies: another Envoy may well take what ours refuses.
pub fn vet(view: &View, resources: &Resources) -> Vec<Finding> {
    vet_packed(view, &resources.packed())
}

/// [`vet`] for resources that were packed already.
pub fn vet_packed(view: &View, resources: &[Resource]) -> Vec<Finding> {
    if view.capabilities != Capabilities::ALL {
        return Vec::new();
    }
    let [mut clusters, mut endpoints, mut listeners, mut routes] = [const { Vec::new() }; 4];
    for resource in resources {
        let raw = Raw { name: resource.name.as_str().into(), body: resource.any.clone() };
        match resource.type_url {
            type_urls::CLUSTER => clusters.push(raw),
            type_urls::ENDPOINT => endpoints.push(raw),
            type_urls::LISTENER => listeners.push(raw),
            type_urls::ROUTE => routes.push(raw),
            _ => {}
        }
    }
    let mut findings = Vec::new();
    let mut report = |kind: &str, rejected: Vec<Rejected>| {
        findings.extend(rejected.into_iter().map(|rejected| refused(view, kind, &rejected)));
    };
    report("cluster", lower::apply_clusters(&Table::default(), &clusters, &[]).1);
    report("endpoints", lower::apply_endpoints(&Table::default(), &endpoints, &[]).1);
    report("listener", lower::apply_listeners(&Table::default(), &listeners, &[]).1);
    report("route table", lower::apply_routes(&Table::default(), &routes, &[]).1);
    findings
}

/// The finding about one refused resource.
pub(crate) fn refused(view: &View, kind: &str, rejected: &Rejected) -> Finding {
    Finding {
        code: "LAT0601".into(),
        severity: Severity::Error,
        object: Some(ObjectRef::new("Pod", &view.namespace, &view.name)),
        field: "".into(),
        position: None,
        message: format!("its proxy refuses the {kind} {:?}: {}", rejected.name, rejected.reason).into(),
        hint: "the proxy keeps the last version it took; change what the field comes from".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh::MeshSnapshot;

    #[test]
    fn what_the_engine_refuses_is_named() {
        let view = View::sidecar("shop", "a", "10.0.0.1".parse().unwrap());
        let mut resources = compile::compile(&MeshSnapshot::default(), &view).packed();
        assert_eq!(vet_packed(&view, &resources), []);
        for resource in &mut resources {
            if resource.type_url == type_urls::LISTENER && resource.name == "virtualInbound" {
                resource.any.value = vec![0xff];
            }
        }
        let findings = vet_packed(&view, &resources);
        let [finding] = &findings[..] else { panic!("{findings:?}") };
        assert!(finding.to_string().contains("its proxy refuses the listener \"virtualInbound\""), "{finding}");
        let other = View { capabilities: Capabilities::NONE, ..view };
        assert_eq!(vet_packed(&other, &resources), []);
    }
}
