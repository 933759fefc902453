//! Security policies by namespace and selector, and the mTLS mode that holds for a workload.
//!
//! *Source*: `docs/parity.md`, Security 7.1, 8.7, 9.

use std::collections::BTreeMap;

use api::security::{AuthorizationPolicy, MtlsMode, PeerAuthentication, RequestAuthentication};
use types::{Finding, Labels, ObjectRef, Severity};

use crate::config::Config;

/// Objects of one kind by namespace, oldest first.
#[derive(PartialEq, Debug)]
pub struct ByNamespace<T> {
    by_namespace: BTreeMap<Box<str>, Vec<Config<T>>>,
}

impl<T> Default for ByNamespace<T> {
    fn default() -> Self {
        Self { by_namespace: BTreeMap::new() }
    }
}

impl<T> ByNamespace<T> {
    /// Indexes `configs` (any order).
    pub fn build(configs: Vec<Config<T>>) -> Self {
        let mut by_namespace: BTreeMap<Box<str>, Vec<Config<T>>> = BTreeMap::new();
        for config in configs {
            by_namespace.entry(config.object.namespace.clone()).or_default().push(config);
        }
        for list in by_namespace.values_mut() {
            list.sort_by(|a, b| a.age.cmp(&b.age));
        }
        Self { by_namespace }
    }

    /// Namespaces that have any, in order.
    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.by_namespace.keys().map(|namespace| &**namespace)
    }

    /// Those of one namespace, oldest first.
    pub fn of(&self, namespace: &str) -> &[Config<T>] {
        self.by_namespace.get(namespace).map_or(&[], Vec::as_slice)
    }

    /// All, by namespace, oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Config<T>> {
        self.by_namespace.values().flatten()
    }
}

/// Something with a `selector`.
pub trait Selects {
    /// Its labels; `None` or empty selects every workload.
    fn selector(&self) -> Option<&BTreeMap<String, String>>;
}

impl Selects for PeerAuthentication {
    fn selector(&self) -> Option<&BTreeMap<String, String>> {
        self.selector.as_ref().map(|selector| &selector.match_labels)
    }
}

impl Selects for RequestAuthentication {
    fn selector(&self) -> Option<&BTreeMap<String, String>> {
        self.selector.as_ref().map(|selector| &selector.match_labels)
    }
}

impl Selects for AuthorizationPolicy {
    fn selector(&self) -> Option<&BTreeMap<String, String>> {
        self.selector.as_ref().map(|selector| &selector.match_labels)
    }
}

impl Selects for api::telemetry::Telemetry {
    fn selector(&self) -> Option<&BTreeMap<String, String>> {
        self.selector.as_ref().map(|selector| &selector.match_labels)
    }
}

fn selects<T: Selects>(config: &Config<T>, labels: &Labels) -> bool {
    config.spec.selector().is_none_or(|pairs| pairs.iter().all(|(key, value)| labels.get(key) == Some(value)))
}

fn has_selector<T: Selects>(config: &Config<T>) -> bool {
    config.spec.selector().is_some_and(|pairs| !pairs.is_empty())
}

impl<T: Selects> ByNamespace<T> {
    /// Those that hold for a workload: of the root namespace, then of its own, whose selector (if
    /// any) matches; each oldest first. `targetRef` is not looked at.
    pub fn matching<'a>(
        &'a self,
        root_namespace: &str,
        namespace: &str,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a Config<T>> {
        let root = self.of(root_namespace);
        let own = if namespace == root_namespace { &[][..] } else { self.of(namespace) };
        root.iter().chain(own).filter(move |config| selects(config, labels))
    }
}

/// What a workload accepts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MtlsPolicy {
    /// On ports without their own mode. Never `Unset`.
    pub mode: MtlsMode,
    /// By workload port. Never `Unset`.
    pub ports: BTreeMap<u16, MtlsMode>,
    /// The objects that decided, mesh first.
    pub from: Vec<ObjectRef>,
}

impl MtlsPolicy {
    /// The mode of one workload port.
    pub fn port(&self, port: u16) -> MtlsMode {
        self.ports.get(&port).copied().unwrap_or(self.mode)
    }
}

/// The policy of a workload: port over workload over namespace over mesh; `UNSET` inherits;
/// PERMISSIVE when nothing is said. The oldest wins at each level.
pub(crate) fn mtls_policy(
    index: &ByNamespace<PeerAuthentication>,
    root_namespace: &str,
    namespace: &str,
    labels: &Labels,
) -> MtlsPolicy {
    let mut policy = namespace_mtls(index, root_namespace, namespace);
    // Policies with a selector hold in their own namespace only; in the root namespace they do not
    // compose as workload policies (PA-2).
    if namespace == root_namespace {
        return policy;
    }
    let workload = index.of(namespace).iter().find(|config| has_selector(config) && selects(config, labels));
    if let Some(config) = workload {
        policy.from.push(config.object.clone());
        if let Some(mode) = set_mode(config.spec.mtls.as_ref()) {
            policy.mode = mode;
        }
        for (port, entry) in &config.spec.port_level_mtls {
            let mode = if entry.mode == MtlsMode::Unset { policy.mode } else { entry.mode };
            policy.ports.insert(*port, mode);
        }
    }
    policy
}

/// The policy of a namespace without any workload's own.
pub(crate) fn namespace_mtls(
    index: &ByNamespace<PeerAuthentication>,
    root_namespace: &str,
    namespace: &str,
) -> MtlsPolicy {
    let mut policy = MtlsPolicy { mode: MtlsMode::Permissive, ports: BTreeMap::new(), from: Vec::new() };
    let levels = if namespace == root_namespace { vec![root_namespace] } else { vec![root_namespace, namespace] };
    for level in levels {
        let Some(config) = index.of(level).iter().find(|config| !has_selector(config)) else {
            continue;
        };
        if let Some(mode) = set_mode(config.spec.mtls.as_ref()) {
            policy.mode = mode;
            policy.from.push(config.object.clone());
        }
    }
    policy
}

fn set_mode(mtls: Option<&api::security::MutualTls>) -> Option<MtlsMode> {
    mtls.map(|mtls| mtls.mode).filter(|mode| *mode != MtlsMode::Unset)
}

/// Conflicts between PeerAuthentications: the younger of two at one level changes nothing.
pub(crate) fn peer_conflicts(
    index: &ByNamespace<PeerAuthentication>,
    root_namespace: &str,
    findings: &mut Vec<Finding>,
) {
    for (namespace, configs) in &index.by_namespace {
        let mut wide: Option<&Config<PeerAuthentication>> = None;
        let mut selected: Vec<&Config<PeerAuthentication>> = Vec::new();
        for config in configs {
            if !has_selector(config) {
                match wide {
                    None => wide = Some(config),
                    Some(winner) => findings.push(shadowed(config, winner)),
                }
                continue;
            }
            if **namespace == *root_namespace {
                findings.push(Finding {
                    code: "LAT0221".into(),
                    severity: Severity::Warning,
                    object: Some(config.object.clone()),
                    field: "spec.selector".into(),
                    position: None,
                    message: "a policy with a selector in the root namespace applies to no workload".into(),
                    hint: "move it into the workload's namespace".into(),
                });
                continue;
            }
            let pairs = config.spec.selector();
            match selected.iter().find(|other| other.spec.selector() == pairs) {
                Some(winner) => findings.push(shadowed(config, winner)),
                None => selected.push(config),
            }
        }
    }
}

fn shadowed(config: &Config<PeerAuthentication>, winner: &Config<PeerAuthentication>) -> Finding {
    Finding {
        code: "LAT0220".into(),
        severity: Severity::Warning,
        object: Some(config.object.clone()),
        field: "".into(),
        position: None,
        message: format!("{} is older and holds for the same workloads, so this one changes nothing", winner.object)
            .into(),
        hint: "keep one of the two".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::service::Age;

    fn peer(
        namespace: &str,
        name: &str,
        created: i64,
        selector: &[(&str, &str)],
        mode: MtlsMode,
        ports: &[(u16, MtlsMode)],
    ) -> Config<PeerAuthentication> {
        let labels: BTreeMap<String, String> =
            selector.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Config {
            object: ObjectRef::new("PeerAuthentication", namespace, name),
            age: Age { created, name: name.into(), namespace: namespace.into() },
            labels: Labels::new(),
            annotations: Labels::new(),
            spec: Arc::new(PeerAuthentication {
                selector: (!labels.is_empty()).then_some(api::networking::LabelSelector { match_labels: labels }),
                mtls: Some(api::security::MutualTls { mode }),
                port_level_mtls: ports
                    .iter()
                    .map(|(port, mode)| (*port, api::security::MutualTls { mode: *mode }))
                    .collect(),
            }),
        }
    }

    fn check(configs: Vec<Config<PeerAuthentication>>, namespace: &str, port: u16, expect: MtlsMode) {
        let index = ByNamespace::build(configs);
        let labels: Labels = [("app".to_owned(), "a".to_owned())].into();
        assert_eq!(mtls_policy(&index, "istio-system", namespace, &labels).port(port), expect);
    }

    #[test]
    fn most_specific_wins_and_unset_inherits() {
        use MtlsMode::{Disable, Permissive, Strict, Unset};
        let mesh = || peer("istio-system", "m", 1, &[], Strict, &[]);
        check(vec![], "shop", 80, Permissive);
        check(vec![mesh()], "shop", 80, Strict);
        check(vec![mesh(), peer("shop", "n", 2, &[], Permissive, &[])], "shop", 80, Permissive);
        check(vec![mesh(), peer("shop", "n", 2, &[], Unset, &[])], "shop", 80, Strict);
        let workload = || peer("shop", "w", 3, &[("app", "a")], Unset, &[(80, Disable), (81, Unset)]);
        check(vec![mesh(), workload()], "shop", 80, Disable);
        check(vec![mesh(), workload()], "shop", 81, Strict);
        check(vec![mesh(), workload()], "shop", 82, Strict);
        check(vec![mesh(), workload()], "other", 80, Strict);
    }

    #[test]
    fn the_oldest_wins_at_one_level() {
        use MtlsMode::{Disable, Strict};
        check(
            vec![peer("shop", "b", 2, &[], Strict, &[]), peer("shop", "a", 1, &[], Disable, &[])],
            "shop",
            80,
            Disable,
        );
    }

    #[test]
    fn a_selector_in_the_root_namespace_reaches_nobody() {
        use MtlsMode::{Permissive, Strict};
        let root = || peer("istio-system", "r", 1, &[("app", "a")], Strict, &[]);
        check(vec![root()], "shop", 80, Permissive);
        check(vec![root()], "istio-system", 80, Permissive);
    }
}
