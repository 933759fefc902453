//! VirtualServices with names expanded and delegates merged.
//!
//! *Source*: `docs/parity.md`, Traffic 1.8 (names), 2.1 (which one applies), 2.7 (delegation).

use std::collections::BTreeMap;
use std::sync::Arc;

use api::networking as net;
use types::{Finding, ObjectRef, Severity};

use crate::config::{Config, Provenance};
use crate::delegate;
use crate::host;
use crate::service::Age;
use crate::visibility::Visibility;

/// The reserved gateway name that means sidecars.
pub const MESH_GATEWAY: &str = "mesh";

/// One HTTP entry, ready to translate.
#[derive(Clone, PartialEq, Debug)]
pub struct HttpEntry {
    /// The entry with fully qualified hosts; a delegate's with its root's settings merged in.
    pub route: net::HttpRoute,
    /// What said so: the entry, and for a delegated one the delegate's entry too.
    pub from: Vec<Provenance>,
}

/// A VirtualService as routing uses it.
#[derive(Clone, PartialEq, Debug)]
pub struct VirtualService {
    /// Kind, namespace, name.
    pub object: ObjectRef,
    /// For conflicts.
    pub age: Age,
    /// Fully qualified, lower case; may be wildcards or addresses. In the order written.
    pub hosts: Vec<Box<str>>,
    /// `mesh`, or `namespace/name`. Never empty.
    pub gateways: Vec<Box<str>>,
    /// Who sees it.
    pub visibility: Visibility,
    /// HTTP entries in order.
    pub http: Vec<HttpEntry>,
    /// TLS entries in order, hosts fully qualified.
    pub tls: Vec<net::TlsRoute>,
    /// TCP entries in order, hosts fully qualified.
    pub tcp: Vec<net::TcpRoute>,
}

impl VirtualService {
    /// Whether it binds to `gateway` (`mesh` or `namespace/name`).
    pub fn binds_to(&self, gateway: &str) -> bool {
        self.gateways.iter().any(|name| &**name == gateway)
    }

    /// The narrowest of its hosts that covers `host`.
    pub fn best_host_for(&self, host: &str) -> Option<&str> {
        self.hosts
            .iter()
            .map(|mine| &**mine)
            .filter(|mine| host::covers(mine, host))
            .max_by_key(|mine| host::specificity(mine))
    }

    /// Every destination host it names, in order, with repetitions.
    pub fn destinations(&self) -> impl Iterator<Item = &net::Destination> {
        let http = self.http.iter().flat_map(|entry| {
            let route = &entry.route;
            route
                .route
                .iter()
                .map(|weighted| &weighted.destination)
                .chain(route.mirror.iter())
                .chain(route.mirrors.iter().map(|mirror| &mirror.destination))
        });
        let tcp = self.tcp.iter().flat_map(|entry| entry.route.iter());
        let tls = self.tls.iter().flat_map(|entry| entry.route.iter());
        http.chain(tcp.chain(tls).map(|weighted| &weighted.destination))
    }
}

/// All VirtualServices of a snapshot, oldest first.
#[derive(Debug, Default)]
pub struct VirtualServiceIndex {
    all: Vec<Arc<VirtualService>>,
}

impl VirtualServiceIndex {
    /// Indexes `configs` (any order).
    pub fn build(
        configs: &[Config<net::VirtualService>],
        settings: &NameSettings<'_>,
        findings: &mut Vec<Finding>,
    ) -> Self {
        let by_key: BTreeMap<_, _> = configs.iter().map(|config| (config.key(), config)).collect();
        let mut used_delegates = std::collections::BTreeSet::new();
        let mut all: Vec<_> = configs
            .iter()
            .filter(|config| !config.spec.hosts.is_empty())
            .map(|config| Arc::new(Self::one(config, &by_key, settings, &mut used_delegates, findings)))
            .collect();
        for config in configs.iter().filter(|config| config.spec.hosts.is_empty()) {
            if !used_delegates.contains(&config.key()) {
                findings.push(Finding {
                    code: "LAT0201".into(),
                    severity: Severity::Warning,
                    object: Some(config.object.clone()),
                    field: "spec.hosts".into(),
                    position: None,
                    message: "has no hosts and no other VirtualService delegates to it, so it changes nothing".into(),
                    hint: "give it hosts, or name it in `delegate` of another VirtualService".into(),
                });
            }
        }
        all.sort_by(|a, b| a.age.cmp(&b.age));
        Self { all }
    }

    fn one(
        config: &Config<net::VirtualService>,
        by_key: &BTreeMap<types::NamespacedName, &Config<net::VirtualService>>,
        settings: &NameSettings<'_>,
        used_delegates: &mut std::collections::BTreeSet<types::NamespacedName>,
        findings: &mut Vec<Finding>,
    ) -> VirtualService {
        let namespace = config.namespace();
        let spec = &*config.spec;
        let mut http = Vec::new();
        for (index, route) in spec.http.iter().enumerate() {
            let root = expand_http(route, namespace, settings);
            let field = format!("spec.http[{index}]");
            let Some(target) = &route.delegate else {
                http.push(HttpEntry { route: root, from: vec![Provenance::new(&config.object, field)] });
                continue;
            };
            let target_namespace = if target.namespace.is_empty() { namespace } else { &target.namespace };
            let key = types::NamespacedName::new(target_namespace, &target.name);
            let delegate = by_key.get(&key).filter(|delegate| {
                delegate.spec.hosts.is_empty()
                    && settings.visibility(&delegate.spec.export_to, target_namespace).is_visible_to(namespace)
            });
            let Some(delegate) = delegate else {
                findings.push(Finding {
                    code: "LAT0202".into(),
                    severity: Severity::Error,
                    object: Some(config.object.clone()),
                    field: format!("{field}.delegate").into(),
                    position: None,
                    message: format!("there is no VirtualService {key} without hosts that is exported to namespace {namespace}; the entry is left out").into(),
                    hint: "create it without `hosts`, or correct name and namespace".into(),
                });
                continue;
            };
            used_delegates.insert(key);
            for (inner_index, inner) in delegate.spec.http.iter().enumerate() {
                let inner_field = format!("spec.http[{inner_index}]");
                // One level only: a delegate's own delegation is not followed.
                if inner.delegate.is_some() {
                    continue;
                }
                let inner = expand_http(inner, delegate.namespace(), settings);
                match delegate::merge(&root, inner) {
                    Some(route) => http.push(HttpEntry {
                        route,
                        from: vec![
                            Provenance::new(&config.object, field.clone()),
                            Provenance::new(&delegate.object, inner_field),
                        ],
                    }),
                    None => findings.push(Finding {
                        code: "LAT0203".into(),
                        severity: Severity::Warning,
                        object: Some(delegate.object.clone()),
                        field: format!("{inner_field}.match").into(),
                        position: None,
                        message: format!(
                            "cannot hold together with the match of {} {field}, so the entry is left out there",
                            config.object
                        )
                        .into(),
                        hint: "a delegate's match must narrow its root's match".into(),
                    }),
                }
            }
        }
        let tls = spec.tls.iter().map(|route| expand_tls(route, namespace, settings)).collect();
        let tcp = spec.tcp.iter().map(|route| expand_tcp(route, namespace, settings)).collect();
        VirtualService {
            object: config.object.clone(),
            age: config.age.clone(),
            hosts: spec.hosts.iter().map(|host| host::expand(host, namespace, settings.domain)).collect(),
            gateways: if spec.gateways.is_empty() {
                vec![MESH_GATEWAY.into()]
            } else {
                spec.gateways.iter().map(|name| gateway_key(name, namespace)).collect()
            },
            visibility: settings.visibility(&spec.export_to, namespace),
            http,
            tls,
            tcp,
        }
    }

    /// All of them, oldest first.
    pub fn all(&self) -> &[Arc<VirtualService>] {
        &self.all
    }

    /// Those that sidecars of `namespace` may see, oldest first.
    pub fn for_mesh<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<VirtualService>> {
        self.all.iter().filter(move |vs| {
            vs.visibility.is_visible_to(namespace) && vs.gateways.iter().any(|g| &**g == MESH_GATEWAY)
                || Self::has_mesh_match(vs, namespace)
        })
    }

    fn has_mesh_match(vs: &VirtualService, namespace: &str) -> bool {
        // An entry's own `gateways` replaces the top level for that entry (`docs/parity.md`, Traffic 2.2).
        vs.visibility.is_visible_to(namespace)
            && !vs.binds_to(MESH_GATEWAY)
            && vs
                .http
                .iter()
                .any(|entry| entry.route.matches.iter().any(|m| m.gateways.iter().any(|g| g == MESH_GATEWAY)))
    }

    /// Those bound to `gateway` (`namespace/name`) that a gateway pod of `namespace` may see:
    /// private ones of the namespace, then those exported to it by name, then public ones; each
    /// oldest first.
    pub fn for_gateway(&self, namespace: &str, gateway: &str) -> Vec<Arc<VirtualService>> {
        let mut found: Vec<_> = self
            .all
            .iter()
            .filter(|vs| vs.binds_to(gateway) && vs.visibility.is_visible_to(namespace))
            .cloned()
            .collect();
        found.sort_by_key(|vs| match &vs.visibility {
            Visibility::Public => 2,
            private if private.is_private_to(namespace) && *vs.object.namespace == *namespace => 0,
            Visibility::Namespaces(_) => 1,
        });
        found
    }
}

/// What names and visibilities are completed with.
#[derive(Clone, Copy, Debug)]
pub struct NameSettings<'a> {
    /// DNS domain of services.
    pub domain: &'a str,
    /// `exportTo` of objects that have none.
    pub default_export_to: &'a [String],
}

impl NameSettings<'_> {
    /// The visibility of an object with this `exportTo`.
    pub fn visibility(&self, export_to: &[String], namespace: &str) -> Visibility {
        let default = Visibility::of_mesh(self.default_export_to, namespace);
        Visibility::parse(export_to.iter().map(String::as_str), namespace, &default)
    }
}

/// Completes a gateway's name: `mesh` stays, `gw` and `./gw` are of `namespace`.
pub fn gateway_key(name: &str, namespace: &str) -> Box<str> {
    match name.split_once('/') {
        Some((".", gateway)) => format!("{namespace}/{gateway}").into(),
        Some(_) => name.into(),
        None if name == MESH_GATEWAY => name.into(),
        None => format!("{namespace}/{name}").into(),
    }
}

fn expand_destination(destination: &mut net::Destination, namespace: &str, settings: &NameSettings<'_>) {
    destination.host = host::expand(&destination.host, namespace, settings.domain).into();
}

fn expand_gateways(gateways: &mut [String], namespace: &str) {
    for name in gateways {
        *name = gateway_key(name, namespace).into();
    }
}

fn expand_http(route: &net::HttpRoute, namespace: &str, settings: &NameSettings<'_>) -> net::HttpRoute {
    let mut route = route.clone();
    for weighted in &mut route.route {
        expand_destination(&mut weighted.destination, namespace, settings);
    }
    if let Some(mirror) = &mut route.mirror {
        expand_destination(mirror, namespace, settings);
    }
    for mirror in &mut route.mirrors {
        expand_destination(&mut mirror.destination, namespace, settings);
    }
    for entry in &mut route.matches {
        expand_gateways(&mut entry.gateways, namespace);
    }
    route
}

fn expand_tls(route: &net::TlsRoute, namespace: &str, settings: &NameSettings<'_>) -> net::TlsRoute {
    let mut route = route.clone();
    for weighted in &mut route.route {
        expand_destination(&mut weighted.destination, namespace, settings);
    }
    for entry in &mut route.matches {
        expand_gateways(&mut entry.gateways, namespace);
        for sni in &mut entry.sni_hosts {
            *sni = host::expand(sni, namespace, settings.domain).into();
        }
    }
    route
}

fn expand_tcp(route: &net::TcpRoute, namespace: &str, settings: &NameSettings<'_>) -> net::TcpRoute {
    let mut route = route.clone();
    for weighted in &mut route.route {
        expand_destination(&mut weighted.destination, namespace, settings);
    }
    for entry in &mut route.matches {
        expand_gateways(&mut entry.gateways, namespace);
    }
    route
}
