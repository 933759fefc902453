//! Make before break: what was received becomes what serves once all it needs is there.
//!
//! The control side of a proxy (and `explain`) feeds an [`Assembly`] with resources as they come
//! and publishes from it. A new version of a cluster serves once its endpoints and secrets are in,
//! a listener once its route tables and secrets are in; until then its last version stays.

use std::sync::Arc;

use crate::chain::Listener;
use crate::cluster::{Cluster, Discovery, DnsSpec, EndpointSet};
use crate::config::{Name, NodeFacts, RuntimeConfig, Table};
use crate::lower::{self, Raw, Rejected};
use crate::route::RouteTable;

/// Which secrets are there. The proxy answers from its store; a secret the agent provides itself
/// is there when it is.
pub trait Secrets {
    /// Whether `name` can be used.
    fn has(&self, name: &str) -> bool;
    /// Whether waiting for `name` is pointless: the control plane has answered without it. What
    /// needs it then serves anyway (only its handshakes fail).
    fn is_missing(&self, name: &str) -> bool {
        let _ = name;
        false
    }
}

/// Every secret is there: for `explain` and tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllSecrets;

impl Secrets for AllSecrets {
    fn has(&self, _: &str) -> bool {
        true
    }
}

/// Names to subscribe to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// EDS.
    pub endpoints: Vec<Name>,
    /// RDS.
    pub routes: Vec<Name>,
    /// SDS.
    pub secrets: Vec<Name>,
}

/// What was received and what serves.
#[derive(Clone, Debug, Default)]
pub struct Assembly {
    listeners: Table<Listener>,
    clusters: Table<Cluster>,
    routes: Table<RouteTable>,
    endpoints: Table<EndpointSet>,
    serving: RuntimeConfig,
}

impl Assembly {
    /// Nothing received yet.
    pub fn new(node: NodeFacts) -> Self {
        Self { serving: RuntimeConfig { node: Arc::new(node), ..RuntimeConfig::default() }, ..Self::default() }
    }

    /// Takes listeners (LDS). For state of the world, `removed` holds the names that are gone.
    pub fn apply_listeners(&mut self, update: &[Raw], removed: &[Name]) -> Vec<Rejected> {
        let (next, rejected) = lower::apply_listeners(&self.listeners, update, removed);
        self.listeners = next;
        rejected
    }

    /// Takes clusters (CDS).
    pub fn apply_clusters(&mut self, update: &[Raw], removed: &[Name]) -> Vec<Rejected> {
        let (next, rejected) = lower::apply_clusters(&self.clusters, update, removed);
        self.clusters = next;
        rejected
    }

    /// Takes route tables (RDS).
    pub fn apply_routes(&mut self, update: &[Raw], removed: &[Name]) -> Vec<Rejected> {
        let (next, rejected) = lower::apply_routes(&self.routes, update, removed);
        self.routes = next;
        rejected
    }

    /// Takes endpoints (EDS).
    pub fn apply_endpoints(&mut self, update: &[Raw], removed: &[Name]) -> Vec<Rejected> {
        let (next, rejected) = lower::apply_endpoints(&self.endpoints, update, removed);
        self.endpoints = next;
        rejected
    }

    /// Takes the endpoints of a cluster of names, resolved by the proxy
    /// ([`lower::resolved_endpoints`] makes them).
    pub fn apply_resolved(&mut self, cluster: &Name, endpoints: EndpointSet) {
        self.endpoints.insert(Name::clone(cluster), Arc::new(endpoints));
    }

    /// Clusters whose names the proxy must resolve.
    pub fn names_to_resolve(&self) -> impl Iterator<Item = (&Name, &Arc<DnsSpec>)> {
        self.clusters.iter().filter_map(|(name, cluster)| match &cluster.discovery {
            Discovery::Dns(spec) => Some((name, spec)),
            _ => None,
        })
    }

    /// What the received resources refer to, sorted.
    pub fn wanted(&self) -> Wanted {
        let mut wanted = Wanted::default();
        for (_, cluster) in self.clusters.iter() {
            let needs = cluster.needs();
            wanted.endpoints.extend(needs.endpoints);
            wanted.secrets.extend(needs.secrets);
        }
        for (_, listener) in self.listeners.iter() {
            wanted.routes.extend(listener.route_tables());
            wanted.secrets.extend(listener.secrets());
        }
        for list in [&mut wanted.endpoints, &mut wanted.routes, &mut wanted.secrets] {
            list.sort();
            list.dedup();
        }
        wanted
    }

    /// Whether something received waits for something else.
    pub fn is_warming(&self, secrets: &dyn Secrets) -> bool {
        self.clusters.iter().any(|(_, cluster)| !self.cluster_ready(cluster, secrets))
            || self.listeners.iter().any(|(_, listener)| !self.listener_ready(listener, secrets))
    }

    fn cluster_ready(&self, cluster: &Cluster, secrets: &dyn Secrets) -> bool {
        let needs = cluster.needs();
        let endpoints = needs.endpoints.is_none_or(|name| self.endpoints.get(&name).is_some());
        let resolved = !needs.dns || self.endpoints.get(&cluster.name).is_some();
        endpoints && resolved && needs.secrets.iter().all(|name| secrets.has(name) || secrets.is_missing(name))
    }

    fn listener_ready(&self, listener: &Listener, secrets: &dyn Secrets) -> bool {
        listener.route_tables().iter().all(|name| self.routes.get(name).is_some())
            && listener.secrets().iter().all(|name| secrets.has(name) || secrets.is_missing(name))
    }

    /// The next configuration: every resource in its newest version that is ready, else in the one
    /// that served. Endpoints and route tables that nothing refers to any more are dropped.
    pub fn publish(&mut self, secrets: &dyn Secrets) -> RuntimeConfig {
        let clusters: Table<Cluster> = self
            .clusters
            .iter()
            .filter_map(|(name, newest)| {
                let serving = self.serving.clusters.get(name);
                let chosen = if self.cluster_ready(newest, secrets) { Some(newest) } else { serving };
                chosen.map(|cluster| (Name::clone(name), Arc::clone(cluster)))
            })
            .collect();
        let listeners: Table<Listener> = self
            .listeners
            .iter()
            .filter_map(|(name, newest)| {
                let serving = self.serving.listeners.get(name);
                let chosen = if self.listener_ready(newest, secrets) { Some(newest) } else { serving };
                chosen.map(|listener| (Name::clone(name), Arc::clone(listener)))
            })
            .collect();
        self.serving = RuntimeConfig {
            generation: self.serving.generation + 1,
            listeners: Arc::new(listeners),
            routes: Arc::new(self.routes.clone()),
            clusters: Arc::new(clusters),
            endpoints: Arc::new(self.endpoints.clone()),
            node: Arc::clone(&self.serving.node),
        };
        self.serving.clone()
    }

    /// What serves now.
    pub fn serving(&self) -> &RuntimeConfig {
        &self.serving
    }
}

#[cfg(test)]
mod tests;
