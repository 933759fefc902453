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
    resources.iter().filter_map(|resource| Some(refused(view, &refusal(resource)?))).collect()
}

/// What our proxy says against a resource. It does not depend on the proxy, so that it can be kept
/// by content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// `cluster`, `listener`, …
    pub kind: &'static str,
    /// The resource's name.
    pub name: Box<str>,
    /// Why, with the field.
    pub reason: Box<str>,
}

/// Why our proxy would refuse a resource; `None` when it takes it, or the type is not the engine's.
pub fn refusal(resource: &Resource) -> Option<Refusal> {
    let raw = [Raw { name: resource.name.as_str().into(), body: resource.any.clone() }];
    let (kind, rejected) = match resource.type_url {
        type_urls::CLUSTER => ("cluster", lower::apply_clusters(&Table::default(), &raw, &[]).1),
        type_urls::ENDPOINT => ("endpoints", lower::apply_endpoints(&Table::default(), &raw, &[]).1),
        type_urls::LISTENER => ("listener", lower::apply_listeners(&Table::default(), &raw, &[]).1),
        type_urls::ROUTE => ("route table", lower::apply_routes(&Table::default(), &raw, &[]).1),
        _ => return None,
    };
    rejected.first().map(|rejected| Refusal::new(kind, rejected))
}

impl Refusal {
    pub(crate) fn new(kind: &'static str, rejected: &Rejected) -> Self {
        Self { kind, name: (*rejected.name).into(), reason: rejected.reason.as_str().into() }
    }
}

/// The finding about one refused resource.
pub fn refused(view: &View, refusal: &Refusal) -> Finding {
    Finding {
        code: "LAT0601".into(),
        severity: Severity::Error,
        object: Some(ObjectRef::new("Pod", &view.namespace, &view.name)),
        field: "".into(),
        position: None,
        message: format!("its proxy refuses the {} {:?}: {}", refusal.kind, refusal.name, refusal.reason).into(),
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
