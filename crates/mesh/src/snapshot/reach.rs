//! Which proxies a change can matter to.
//!
//! Compared are the snapshots, not the objects: what changed without changing the mesh (a status, a
//! Deployment, a pod that no service picks) reaches nobody. When in doubt, everyone is reached: that
//! costs work, the opposite would cost truth.
//!
//! The commonest change, endpoints that come, go or change their health, only concerns the clusters
//! of their service. Where a proxy learns of endpoints in another way, it is reached as a whole:
//! those of headless services and of DNS are listeners, names, or clusters that may not be there;
//! a proxy's own addresses are ports that it serves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use api::networking as net;
use types::NamespacedName;

use super::MeshSnapshot;
use crate::config::Config;
use crate::policy::ByNamespace;
use crate::service::{EndpointAddress, EndpointSet, Resolution, Service, ServiceKey};
use crate::virtual_service::{MESH_GATEWAY, VirtualService};

/// The proxies that may have to be told something else than before.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Reach {
    everyone: bool,
    routers: bool,
    namespaces: BTreeSet<Box<str>>,
    routers_of: BTreeSet<Box<str>>,
    workloads: BTreeSet<NamespacedName>,
    addresses: BTreeSet<IpAddr>,
    clusters_of: BTreeSet<ServiceKey>,
}

/// What tells whether a proxy is reached.
#[derive(Clone, Copy, Debug)]
pub struct Reached<'a> {
    /// It stands at the edge.
    pub is_router: bool,
    /// Its pod's namespace.
    pub namespace: &'a str,
    /// Its pod's name.
    pub name: &'a str,
    /// Its addresses.
    pub ips: &'a [IpAddr],
}

impl Reach {
    /// Every proxy.
    pub fn everyone() -> Self {
        Self { everyone: true, ..Self::default() }
    }

    /// Whether that is every proxy.
    pub fn is_everyone(&self) -> bool {
        self.everyone
    }

    /// Whether a proxy is among them, so that all it is told has to be compiled again.
    pub fn includes(&self, proxy: Reached<'_>) -> bool {
        self.everyone
            || self.namespaces.contains(proxy.namespace)
            || (proxy.is_router && (self.routers || self.routers_of.contains(proxy.namespace)))
            || proxy.ips.iter().any(|ip| self.addresses.contains(ip))
            || (!self.workloads.is_empty()
                && self.workloads.contains(&NamespacedName::new(proxy.namespace, proxy.name)))
    }

    /// Services whose clusters may have changed for those that are not included: for them, nothing
    /// else did.
    pub fn clusters_of(&self) -> &BTreeSet<ServiceKey> {
        &self.clusters_of
    }
}

impl MeshSnapshot {
    /// Whom the step from `before` to this snapshot reaches.
    pub fn reach_since(&self, before: &Self) -> Reach {
        let global = self.mesh_config != before.mesh_config
            || self.namespaces != before.namespaces
            || self.aliases != before.aliases
            || self.key_sets != before.key_sets
            || !same_list(&self.services, &before.services)
            || self.destination_rules != before.destination_rules
            // Their ports decide who is spoken to in plaintext.
            || self.peer_authentications != before.peer_authentications;
        if global || routes_in_the_mesh(self) != routes_in_the_mesh(before) {
            return Reach::everyone();
        }
        let mut reach = Reach {
            routers: self.gateways != before.gateways || self.virtual_services.all() != before.virtual_services.all(),
            ..Reach::default()
        };
        self.endpoints_since(before, &mut reach);
        let root = self.root_namespace();
        scoped(&self.sidecars, &before.sidecars, root, &mut reach);
        scoped(&self.request_authentications, &before.request_authentications, root, &mut reach);
        scoped(&self.authorization_policies, &before.authorization_policies, root, &mut reach);
        scoped(&self.telemetries, &before.telemetries, root, &mut reach);
        // A pod's ports are its own proxy's; what others see of it are endpoints.
        reach.workloads.extend(different(&self.workloads, &before.workloads).cloned());
        for key in different(&self.secrets, &before.secrets) {
            // Gateways name Secrets of their namespace, and so do rules for selected workloads.
            let is_sidecars = self
                .destination_rules
                .all()
                .any(|rule| rule.workload_selector.is_some() && rule.namespace == key.namespace);
            let reached = if is_sidecars { &mut reach.namespaces } else { &mut reach.routers_of };
            reached.insert(key.namespace.clone());
        }
        reach
    }

    /// Whom changed endpoints reach, where the services are the same.
    fn endpoints_since(&self, before: &Self, reach: &mut Reach) {
        for service in &self.services {
            let key = service.key();
            let (now, then) = (self.endpoints.get(&key), before.endpoints.get(&key));
            let is_same = match (now, then) {
                (Some(now), Some(then)) => Arc::ptr_eq(now, then) || now == then,
                (now, then) => now.is_none() && then.is_none(),
            };
            if is_same {
                continue;
            }
            reach.everyone |= !concerns_only_clusters(service);
            let ports = |of: Option<&Arc<EndpointSet>>| of.map(|set| ports_by_address(set)).unwrap_or_default();
            let (now, then) = (ports(now), ports(then));
            reach.addresses.extend(different(&now, &then));
            reach.clusters_of.insert(key);
        }
    }
}

/// Whether endpoints show in the clusters of their service only, and whether these are there does
/// not depend on them.
fn concerns_only_clusters(service: &Service) -> bool {
    service.resolution == Resolution::Endpoints && !service.is_headless
}

/// Where the ports of a service lead, at each address.
fn ports_by_address(set: &EndpointSet) -> BTreeMap<IpAddr, Vec<(u16, u16)>> {
    let mut out: BTreeMap<IpAddr, Vec<(u16, u16)>> = BTreeMap::new();
    for (number, endpoints) in &set.by_port {
        for endpoint in endpoints {
            if let EndpointAddress::Ip(ip) = endpoint.address {
                out.entry(ip).or_default().push((*number, endpoint.port));
            }
        }
    }
    out
}

/// Routes that sidecars may use.
fn routes_in_the_mesh(of: &MeshSnapshot) -> Vec<&Arc<VirtualService>> {
    let is_in_mesh = |route: &net::HttpMatchRequest| route.gateways.iter().any(|gateway| gateway == MESH_GATEWAY);
    let concerns = |vs: &&Arc<VirtualService>| {
        vs.binds_to(MESH_GATEWAY) || vs.http.iter().any(|entry| entry.route.matches.iter().any(is_in_mesh))
    };
    of.virtual_services.all().iter().filter(concerns).collect()
}

/// Policies of a namespace reach its proxies; those of the root namespace reach all.
fn scoped<T: PartialEq>(after: &ByNamespace<T>, before: &ByNamespace<T>, root: &str, reach: &mut Reach) {
    for namespace in after.namespaces().chain(before.namespaces()) {
        if after.of(namespace) != before.of(namespace) {
            reach.everyone |= namespace == root;
            reach.namespaces.insert(namespace.into());
        }
    }
}

fn same_list<T: PartialEq>(a: &[Arc<T>], b: &[Arc<T>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b) || a == b)
}

/// Keys whose values are not the same on both sides.
fn different<'a, K: Ord, V: PartialEq>(a: &'a BTreeMap<K, V>, b: &'a BTreeMap<K, V>) -> impl Iterator<Item = &'a K> {
    let new_or_changed = a.iter().filter(|(key, value)| b.get(*key) != Some(*value)).map(|(key, _)| key);
    new_or_changed.chain(b.keys().filter(|key| !a.contains_key(*key)))
}

impl<T: PartialEq> PartialEq for Config<T> {
    /// What an object says; the same spec in memory needs no look.
    fn eq(&self, other: &Self) -> bool {
        self.object == other.object
            && self.age == other.age
            && self.labels == other.labels
            && self.annotations == other.annotations
            && (Arc::ptr_eq(&self.spec, &other.spec) || self.spec == other.spec)
    }
}
