//! Which proxies a change can matter to.
//!
//! Compared are the snapshots, not the objects: what changed without changing the mesh (a status, a
//! Deployment, a pod that no service picks) reaches nobody. When in doubt, everyone is reached: that
//! costs work, the opposite would cost truth.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::networking as net;

use super::MeshSnapshot;
use crate::config::Config;
use crate::policy::ByNamespace;
use crate::virtual_service::{MESH_GATEWAY, VirtualService};

/// The proxies that may have to be told something else than before.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Reach {
    everyone: bool,
    routers: bool,
    namespaces: BTreeSet<Box<str>>,
    routers_of: BTreeSet<Box<str>>,
}

impl Reach {
    /// Every proxy.
    pub fn everyone() -> Self {
        Self { everyone: true, ..Self::default() }
    }

    /// Whether a proxy of `namespace` is among them.
    pub fn includes(&self, is_router: bool, namespace: &str) -> bool {
        self.everyone
            || self.namespaces.contains(namespace)
            || (is_router && (self.routers || self.routers_of.contains(namespace)))
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
            || self.endpoints != before.endpoints
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
        let root = self.root_namespace();
        scoped(&self.sidecars, &before.sidecars, root, &mut reach);
        scoped(&self.request_authentications, &before.request_authentications, root, &mut reach);
        scoped(&self.authorization_policies, &before.authorization_policies, root, &mut reach);
        scoped(&self.telemetries, &before.telemetries, root, &mut reach);
        // A pod's ports are its own proxy's; what others see of it are endpoints.
        let changed = different(&self.workloads, &before.workloads);
        reach.namespaces.extend(changed.map(|key| key.namespace.clone()));
        reach.routers_of.extend(different(&self.secrets, &before.secrets).map(|key| key.namespace.clone()));
        reach
    }
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
