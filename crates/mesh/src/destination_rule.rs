//! DestinationRules: merged per host, and found by the three-level search.
//!
//! *Source*: `docs/parity.md`, Traffic 3.1 and 3.2.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::networking as net;
use types::{Finding, Labels, ObjectRef, Selector, Severity};

use crate::config::Config;
use crate::host;
use crate::service::Age;
use crate::virtual_service::NameSettings;
use crate::visibility::Visibility;

/// One or several rules of one namespace for one host, as clients use them.
#[derive(Clone, PartialEq, Debug)]
pub struct DestinationRule {
    /// Fully qualified; may be a wildcard.
    pub host: Box<str>,
    /// The rules' namespace.
    pub namespace: Box<str>,
    /// The rules it is made of, oldest first. Never empty.
    pub from: Vec<ObjectRef>,
    /// Of the oldest.
    pub age: Age,
    /// Who sees it, outside its own namespace.
    pub visibility: Visibility,
    /// Only for these clients of its own namespace.
    pub workload_selector: Option<Selector>,
    /// The oldest policy at top level.
    pub traffic_policy: Option<Arc<net::TrafficPolicy>>,
    /// United by name, first definition wins.
    pub subsets: Vec<Subset>,
}

/// A subset and who defined it.
#[derive(Clone, PartialEq, Debug)]
pub struct Subset {
    /// Its definition.
    pub spec: net::Subset,
    /// The rule that defined it.
    pub from: ObjectRef,
}

impl DestinationRule {
    /// The subset of that name.
    pub fn subset(&self, name: &str) -> Option<&Subset> {
        self.subsets.iter().find(|subset| subset.spec.name == name)
    }

    /// The object that shows as its provenance: the oldest.
    pub fn object(&self) -> &ObjectRef {
        &self.from[0]
    }

    /// What holds for a port, and for a subset of it: the layers of `docs/parity.md`, Traffic 3.2 flattened.
    pub fn policy_for(
        &self,
        mesh: Option<&api::mesh_config::DefaultTrafficPolicy>,
        port: u16,
        subset: Option<&str>,
    ) -> EffectivePolicy {
        let subset = subset.and_then(|name| self.subset(name)).and_then(|subset| subset.spec.traffic_policy.as_ref());
        EffectivePolicy::layered(mesh, self.traffic_policy.as_deref(), subset, port)
    }
}

/// The blocks that hold for one cluster.
#[derive(Clone, Default, Debug, PartialEq)]
pub struct EffectivePolicy {
    /// `loadBalancer`
    pub load_balancer: Option<net::LoadBalancerSettings>,
    /// `connectionPool`
    pub connection_pool: Option<net::ConnectionPoolSettings>,
    /// `outlierDetection`
    pub outlier_detection: Option<net::OutlierDetection>,
    /// `tls`
    pub tls: Option<net::ClientTlsSettings>,
    /// `tunnel`
    pub tunnel: Option<net::TunnelSettings>,
    /// `proxyProtocol`
    pub proxy_protocol: Option<net::ProxyProtocol>,
    /// `retryBudget`
    pub retry_budget: Option<net::RetryBudget>,
}

impl EffectivePolicy {
    /// Layers the mesh's default, a rule's top level and a subset's policy for `port`.
    pub fn layered(
        mesh: Option<&api::mesh_config::DefaultTrafficPolicy>,
        top: Option<&net::TrafficPolicy>,
        subset: Option<&net::TrafficPolicy>,
        port: u16,
    ) -> Self {
        let mut policy = Self::default();
        if let Some(top) = top {
            match port_level(top, port) {
                Some(entry) => policy.set_port_level(entry),
                None => policy.overlay(top),
            }
        }
        if let Some(mesh) = mesh {
            if policy.connection_pool.is_none() {
                policy.connection_pool.clone_from(&mesh.connection_pool);
            }
            if policy.outlier_detection.is_none() {
                policy.outlier_detection.clone_from(&mesh.outlier_detection);
            }
        }
        if let Some(subset) = subset {
            policy.overlay(subset);
            if let Some(entry) = port_level(subset, port) {
                policy.set_port_level(entry);
            }
        }
        policy
    }

    /// Block by block: what is present replaces.
    fn overlay(&mut self, other: &net::TrafficPolicy) {
        fn replace<T: Clone>(mine: &mut Option<T>, theirs: Option<&T>) {
            if let Some(theirs) = theirs {
                *mine = Some(theirs.clone());
            }
        }
        replace(&mut self.load_balancer, other.load_balancer.as_ref());
        replace(&mut self.connection_pool, other.connection_pool.as_ref());
        replace(&mut self.outlier_detection, other.outlier_detection.as_ref());
        replace(&mut self.tls, other.tls.as_ref());
        replace(&mut self.tunnel, other.tunnel.as_ref());
        replace(&mut self.proxy_protocol, other.proxy_protocol.as_ref());
        replace(&mut self.retry_budget, other.retry_budget.as_ref());
    }

    /// A port's entry sets its four blocks, absent ones too.
    fn set_port_level(&mut self, entry: &net::PortTrafficPolicy) {
        self.load_balancer.clone_from(&entry.load_balancer);
        self.connection_pool.clone_from(&entry.connection_pool);
        self.outlier_detection.clone_from(&entry.outlier_detection);
        self.tls.clone_from(&entry.tls);
    }
}

fn port_level(policy: &net::TrafficPolicy, port: u16) -> Option<&net::PortTrafficPolicy> {
    policy.port_level_settings.iter().find(|entry| entry.port.as_ref().is_some_and(|selector| selector.number == port))
}

/// All rules of a snapshot.
#[derive(PartialEq, Debug, Default)]
pub struct DestinationRuleIndex {
    by_namespace: BTreeMap<Box<str>, Vec<Arc<DestinationRule>>>,
}

impl DestinationRuleIndex {
    /// Merges and indexes `configs` (any order).
    pub fn build(
        configs: &[Config<net::DestinationRule>],
        settings: &NameSettings<'_>,
        findings: &mut Vec<Finding>,
    ) -> Self {
        let mut sorted: Vec<_> = configs.iter().collect();
        sorted.sort_by(|a, b| a.age.cmp(&b.age));
        let mut by_namespace: BTreeMap<Box<str>, Vec<DestinationRule>> = BTreeMap::new();
        for config in sorted {
            let rule = single(config, settings);
            let rules = by_namespace.entry(rule.namespace.clone()).or_default();
            let same = rules.iter_mut().find(|other| {
                other.host == rule.host
                    && other.visibility == rule.visibility
                    && other.workload_selector == rule.workload_selector
            });
            match same {
                Some(older) => absorb(older, rule, findings),
                None => rules.push(rule),
            }
        }
        Self {
            by_namespace: by_namespace
                .into_iter()
                .map(|(namespace, rules)| (namespace, rules.into_iter().map(Arc::new).collect()))
                .collect(),
        }
    }

    /// Every merged rule, by namespace, oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Arc<DestinationRule>> {
        self.by_namespace.values().flatten()
    }

    /// The rule that a client uses for a service: client's namespace, then the service's, then
    /// the root namespace; the first level with a match wins alone.
    pub fn lookup(
        &self,
        client: &RuleClient<'_>,
        service_host: &str,
        service_namespace: &str,
    ) -> Option<&Arc<DestinationRule>> {
        if client.namespace != client.root_namespace {
            if let Some(rule) = self.best(client.namespace, service_host, |rule| {
                rule.workload_selector.as_ref().is_none_or(|selector| selector.matches(client.labels))
            }) {
                return Some(rule);
            }
        } else if let Some(rule) = self.best(client.root_namespace, service_host, |rule| {
            rule.visibility.is_private_to(client.root_namespace)
                && rule.workload_selector.as_ref().is_none_or(|selector| selector.matches(client.labels))
        }) {
            return Some(rule);
        }
        let exported = |rule: &DestinationRule| {
            rule.visibility.is_visible_to(client.namespace)
                && rule
                    .workload_selector
                    .as_ref()
                    .is_none_or(|selector| *rule.namespace == *client.namespace && selector.matches(client.labels))
        };
        self.best(service_namespace, service_host, exported)
            .or_else(|| self.best(client.root_namespace, service_host, exported))
    }

    fn best(
        &self,
        namespace: &str,
        host: &str,
        fits: impl Fn(&DestinationRule) -> bool,
    ) -> Option<&Arc<DestinationRule>> {
        self.by_namespace
            .get(namespace)?
            .iter()
            .filter(|rule| host::covers(&rule.host, host) && fits(rule))
            // Rules are oldest first: `rev` makes `max_by_key`, which takes the last, take the oldest.
            .rev()
            .max_by_key(|rule| (host::specificity(&rule.host), rule.workload_selector.is_some()))
    }
}

/// The client for whom a rule is looked up.
#[derive(Clone, Copy, Debug)]
pub struct RuleClient<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its labels, for `workloadSelector`.
    pub labels: &'a Labels,
    /// The mesh's root namespace.
    pub root_namespace: &'a str,
}

fn single(config: &Config<net::DestinationRule>, settings: &NameSettings<'_>) -> DestinationRule {
    let spec = &*config.spec;
    let selector = spec.workload_selector.as_ref().filter(|selector| !selector.match_labels.is_empty());
    DestinationRule {
        host: host::expand(&spec.host, config.namespace(), settings.domain),
        namespace: config.namespace().into(),
        from: vec![config.object.clone()],
        age: config.age.clone(),
        visibility: settings.visibility(&spec.export_to, config.namespace()),
        workload_selector: selector.map(|selector| Selector(selector.match_labels.clone())),
        traffic_policy: spec.traffic_policy.clone().map(Arc::new),
        subsets: spec
            .subsets
            .iter()
            .map(|subset| Subset { spec: subset.clone(), from: config.object.clone() })
            .collect(),
    }
}

fn absorb(older: &mut DestinationRule, younger: DestinationRule, findings: &mut Vec<Finding>) {
    let winner = older.object().clone();
    let loser = younger.object().clone();
    let mut shadowed = Vec::new();
    if younger.traffic_policy.is_some() {
        if older.traffic_policy.is_none() {
            older.traffic_policy = younger.traffic_policy;
        } else {
            shadowed.push("spec.trafficPolicy".to_owned());
        }
    }
    for (index, subset) in younger.subsets.into_iter().enumerate() {
        if older.subset(&subset.spec.name).is_some() {
            shadowed.push(format!("spec.subsets[{index}]"));
        } else {
            older.subsets.push(subset);
        }
    }
    older.from.push(loser.clone());
    for field in shadowed {
        findings.push(Finding {
            code: "LAT0240".into(),
            severity: Severity::Warning,
            object: Some(loser.clone()),
            field: field.into(),
            position: None,
            message: format!("{winner} is older and already says this for host {}", older.host).into(),
            hint: "keep one of the two".into(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balancer(simple: net::SimpleLb) -> net::LoadBalancerSettings {
        net::LoadBalancerSettings { simple: Some(simple), ..Default::default() }
    }

    #[test]
    fn a_port_entry_replaces_all_four_blocks_and_loses_the_rest() {
        let top = net::TrafficPolicy {
            load_balancer: Some(balancer(net::SimpleLb::Random)),
            outlier_detection: Some(net::OutlierDetection::default()),
            retry_budget: Some(net::RetryBudget::default()),
            port_level_settings: vec![net::PortTrafficPolicy {
                port: Some(net::PortSelector { number: 80 }),
                load_balancer: Some(balancer(net::SimpleLb::RoundRobin)),
                ..Default::default()
            }],
            ..Default::default()
        };
        let on_port = EffectivePolicy::layered(None, Some(&top), None, 80);
        assert_eq!(on_port.load_balancer, Some(balancer(net::SimpleLb::RoundRobin)));
        assert_eq!(on_port.outlier_detection, None);
        assert_eq!(on_port.retry_budget, None);
        let elsewhere = EffectivePolicy::layered(None, Some(&top), None, 81);
        assert_eq!(elsewhere.load_balancer, Some(balancer(net::SimpleLb::Random)));
        assert!(elsewhere.outlier_detection.is_some() && elsewhere.retry_budget.is_some());
    }

    #[test]
    fn the_mesh_default_fills_gaps_but_not_a_subset_port() {
        let mesh = api::mesh_config::DefaultTrafficPolicy {
            outlier_detection: Some(net::OutlierDetection::default()),
            ..Default::default()
        };
        let subset = net::TrafficPolicy {
            port_level_settings: vec![net::PortTrafficPolicy {
                port: Some(net::PortSelector { number: 80 }),
                ..Default::default()
            }],
            ..Default::default()
        };
        assert!(EffectivePolicy::layered(Some(&mesh), None, None, 80).outlier_detection.is_some());
        assert!(EffectivePolicy::layered(Some(&mesh), None, Some(&subset), 80).outlier_detection.is_none());
        assert!(EffectivePolicy::layered(Some(&mesh), None, Some(&subset), 81).outlier_detection.is_some());
    }

    fn config(name: &str, namespace: &str, created: i64, spec: net::DestinationRule) -> Config<net::DestinationRule> {
        Config {
            object: ObjectRef::new("DestinationRule", namespace, name),
            age: Age { created, name: name.into(), namespace: namespace.into() },
            labels: Labels::new(),
            annotations: Labels::new(),
            spec: Arc::new(spec),
        }
    }

    fn rule(host: &str, subset: &str, export_to: &[&str]) -> net::DestinationRule {
        net::DestinationRule {
            host: host.into(),
            subsets: vec![net::Subset { name: subset.into(), ..Default::default() }],
            export_to: export_to.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    const NAMES: NameSettings<'static> = NameSettings { domain: "cluster.local", default_export_to: &[] };

    fn found(index: &DestinationRuleIndex, client: &str) -> String {
        let labels = Labels::new();
        let client = RuleClient { namespace: client, labels: &labels, root_namespace: "istio-system" };
        index.lookup(&client, "reviews.shop.svc.cluster.local", "shop").map_or_else(
            || "-".to_owned(),
            |rule| rule.subsets.iter().map(|s| s.spec.name.clone()).collect::<Vec<_>>().join(","),
        )
    }

    #[test]
    fn three_levels_never_blend() {
        let index = DestinationRuleIndex::build(
            &[
                config("root", "istio-system", 1, rule("*.shop.svc.cluster.local", "root", &[])),
                config("service", "shop", 2, rule("reviews", "service", &[])),
                config("client", "other", 3, rule("reviews.shop.svc.cluster.local", "client", &["."])),
            ],
            &NAMES,
            &mut Vec::new(),
        );
        assert_eq!(found(&index, "other"), "client");
        assert_eq!(found(&index, "third"), "service");
        assert_eq!(found(&index, "shop"), "service");
        assert_eq!(found(&index, "istio-system"), "service");
    }

    #[test]
    fn a_private_rule_of_the_service_is_not_for_others() {
        let index = DestinationRuleIndex::build(
            &[config("a", "shop", 1, rule("reviews", "a", &["."]))],
            &NAMES,
            &mut Vec::new(),
        );
        assert_eq!(found(&index, "shop"), "a");
        assert_eq!(found(&index, "other"), "-");
    }

    #[test]
    fn rules_for_one_host_are_united_oldest_first() {
        let mut findings = Vec::new();
        let index = DestinationRuleIndex::build(
            &[
                config("young", "shop", 2, rule("reviews", "v2", &[])),
                config("old", "shop", 1, rule("reviews", "v1", &[])),
                config("dup", "shop", 3, rule("reviews", "v1", &[])),
                config("wild", "shop", 0, rule("*.shop.svc.cluster.local", "w", &[])),
            ],
            &NAMES,
            &mut findings,
        );
        assert_eq!(found(&index, "shop"), "v1,v2");
        assert_eq!(findings.len(), 1);
        assert_eq!(&*findings[0].field, "spec.subsets[0]");
    }
}
