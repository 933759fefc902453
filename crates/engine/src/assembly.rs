//! Make before break: what was received becomes what serves once all it needs is there.
//!
//! [`next`] is the rule. A new version of a cluster serves once its endpoints and secrets are in, a route table once
//! the clusters that it names serve, a listener once its route tables, its secrets and the clusters that it names are
//! in; until then their last versions stay, with all that these name. What nobody waits for any longer serves without.
//!
//! The control side of a proxy feeds it with resources as they come, and with a clock. An [`Assembly`] is for those
//! who have all resources at hand (`explain`, fuzzing): nothing waits there for what is not among them for ever.
//!
//! *Source*: `docs/properties.md`, 26.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::chain::Listener;
use crate::cluster::{Cluster, Discovery, DnsSpec, EndpointSet};
use crate::config::{Name, NodeFacts, RuntimeConfig, Table};
use crate::lower::{self, Raw, Rejected};
use crate::route::RouteTable;

/// Resources by kind and name.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// Listeners.
    pub listeners: Arc<Table<Listener>>,
    /// Route tables.
    pub routes: Arc<Table<RouteTable>>,
    /// Clusters.
    pub clusters: Arc<Table<Cluster>>,
    /// Endpoints, by the key that [`Cluster::endpoints_key`] gives.
    pub endpoints: Arc<Table<EndpointSet>>,
}

impl From<&RuntimeConfig> for Tables {
    fn from(config: &RuntimeConfig) -> Self {
        Self {
            listeners: Arc::clone(&config.listeners),
            routes: Arc::clone(&config.routes),
            clusters: Arc::clone(&config.clusters),
            endpoints: Arc::clone(&config.endpoints),
        }
    }
}

impl Tables {
    /// What listeners and clusters refer to.
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
        wanted
    }
}

/// Names that resources refer to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// EDS.
    pub endpoints: BTreeSet<Name>,
    /// RDS.
    pub routes: BTreeSet<Name>,
    /// SDS.
    pub secrets: BTreeSet<Name>,
}

/// What may wait.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// A cluster.
    Cluster,
    /// A route table, or what stands in its place in a listener.
    Routes,
    /// A listener.
    Listener,
}

/// What is there beside resources.
pub trait There {
    /// Whether a secret of this name can be used.
    fn has_secret(&self, name: &str) -> bool;
    /// Whether the endpoints of this name were answered, be it with nothing.
    fn has_endpoints(&self, service: &str) -> bool;
    /// Whether the names of this cluster were resolved, be it to nothing.
    fn is_resolved(&self, cluster: &str) -> bool;
    /// Asked of each resource that has to wait: whether it has waited long enough and serves as it is.
    fn gives_up(&self, kind: Kind, name: &Name) -> bool;
}

/// What serves next.
#[derive(Debug, Default)]
pub struct Next {
    /// It.
    pub tables: Tables,
    /// What was received and does not serve yet.
    pub waiting: BTreeSet<(Kind, Name)>,
}

/// Chooses a version of each resource: the `newest`, or the one that was `serving`.
///
/// *Cost*: in proportion to listeners and clusters, and to routes while a cluster waits that never served.
pub fn next(newest: &Tables, serving: &Tables, there: &impl There) -> Next {
    let mut waiting = BTreeSet::new();
    let mut wait = |kind: Kind, name: &Name| {
        let waits = !there.gives_up(kind, name);
        if waits {
            waiting.insert((kind, Name::clone(name)));
        }
        waits
    };
    // What is used and is not the newest, and keeps what it names.
    let mut kept = Kept::default();

    let (mut clusters, mut cold) = (Table::default(), BTreeSet::new());
    for (name, cluster) in newest.clusters.iter() {
        let old = serving.clusters.get(name);
        let is_ready =
            old.is_some_and(|old| Arc::ptr_eq(old, cluster)) || is_warm(cluster, old.map(|old| &**old), there);
        match old {
            _ if is_ready || !wait(Kind::Cluster, name) => clusters.insert(Name::clone(name), Arc::clone(cluster)),
            Some(old) => {
                kept.endpoints.extend(old.endpoints_key().map(Name::from));
                clusters.insert(Name::clone(name), Arc::clone(old));
            }
            None => {
                cold.insert(Name::clone(name));
            }
        }
    }

    let mut routes = Table::default();
    for (name, table) in newest.routes.iter() {
        let old = serving.routes.get(name);
        let is_ready = old.is_some_and(|old| Arc::ptr_eq(old, table)) || !names_any(table.clusters(), &cold);
        match old {
            _ if is_ready || !wait(Kind::Routes, name) => routes.insert(Name::clone(name), Arc::clone(table)),
            Some(old) => {
                kept.clusters.extend(old.clusters().cloned());
                routes.insert(Name::clone(name), Arc::clone(old));
            }
            None => {}
        }
    }

    let mut listeners = Table::default();
    for (name, listener) in newest.listeners.iter() {
        let old = serving.listeners.get(name);
        let has_parts = || {
            let known = old.map(|old| old.secrets()).unwrap_or_default();
            listener.route_tables().iter().all(|table| routes.get(table).is_some())
                && listener.secrets().iter().all(|secret| there.has_secret(secret) || known.contains(secret))
        };
        let serves = old.is_some_and(|old| Arc::ptr_eq(old, listener));
        if serves || (has_parts() && !(names_any(listener.clusters(), &cold) && wait(Kind::Routes, name))) {
            listeners.insert(Name::clone(name), Arc::clone(listener));
        } else if !wait(Kind::Listener, name) {
            // not without routes that are there
            for table in listener.route_tables() {
                if let (None, Some(newest)) = (routes.get(&table), newest.routes.get(&table)) {
                    routes.insert(table, Arc::clone(newest));
                }
            }
            listeners.insert(Name::clone(name), Arc::clone(listener));
        } else if let Some(old) = old {
            kept.clusters.extend(old.clusters().cloned());
            for table in old.route_tables() {
                if let (None, Some(old)) = (routes.get(&table), serving.routes.get(&table)) {
                    kept.clusters.extend(old.clusters().cloned());
                    routes.insert(table, Arc::clone(old));
                }
            }
            listeners.insert(Name::clone(name), Arc::clone(old));
        }
    }

    for name in kept.clusters {
        if let (None, Some(old)) = (clusters.get(&name), serving.clusters.get(&name)) {
            kept.endpoints.extend(old.endpoints_key().map(Name::from));
            clusters.insert(name, Arc::clone(old));
        }
    }
    let mut endpoints = Arc::clone(&newest.endpoints);
    for name in kept.endpoints {
        if let (None, Some(old)) = (endpoints.get(&name), serving.endpoints.get(&name)) {
            Arc::make_mut(&mut endpoints).insert(name, Arc::clone(old));
        }
    }
    let tables =
        Tables { listeners: Arc::new(listeners), routes: Arc::new(routes), clusters: Arc::new(clusters), endpoints };
    Next { tables, waiting }
}

/// Names of what stays for the sake of something that is not the newest.
#[derive(Default)]
struct Kept {
    clusters: BTreeSet<Name>,
    endpoints: BTreeSet<Name>,
}

fn names_any<'a>(mut named: impl Iterator<Item = &'a Name>, cold: &BTreeSet<Name>) -> bool {
    !cold.is_empty() && named.any(|name| cold.contains(name))
}

/// Whether a cluster finds what it needs, or lacks no more than the version that serves.
fn is_warm(cluster: &Cluster, old: Option<&Cluster>, there: &impl There) -> bool {
    let needs = cluster.needs();
    let known = old.map(Cluster::needs);
    let knows = |secret: &Name| known.as_ref().is_some_and(|known| known.secrets.contains(secret));
    needs.endpoints.is_none_or(|service| there.has_endpoints(&service))
        && (!needs.dns || there.is_resolved(&cluster.name))
        && needs.secrets.iter().all(|secret| there.has_secret(secret) || knows(secret))
}

/// What was received and what serves.
#[derive(Clone, Debug, Default)]
pub struct Assembly {
    newest: Tables,
    serving: RuntimeConfig,
}

/// The resources at hand are all there are; secrets are not looked at.
struct AtHand<'a>(&'a Tables);

impl There for AtHand<'_> {
    fn has_secret(&self, _: &str) -> bool {
        true
    }

    fn has_endpoints(&self, service: &str) -> bool {
        self.0.endpoints.get(service).is_some()
    }

    fn is_resolved(&self, cluster: &str) -> bool {
        self.0.endpoints.get(cluster).is_some()
    }

    /// What leads to a cluster without endpoints is told as such.
    fn gives_up(&self, kind: Kind, _: &Name) -> bool {
        kind == Kind::Routes
    }
}

impl Assembly {
    /// Nothing received yet.
    pub fn new(node: NodeFacts) -> Self {
        Self { serving: RuntimeConfig { node: Arc::new(node), ..RuntimeConfig::default() }, ..Self::default() }
    }

    /// Takes listeners (LDS). For state of the world, `removed` holds the names that are gone.
    pub fn apply_listeners(&mut self, update: &[Raw], removed: &[Name]) -> Vec<Rejected> {
        let (next, rejected) = lower::apply_listeners(&self.newest.listeners, update, removed);
        self.newest.listeners = Arc::new(next);
        rejected
    }

    /// Takes clusters (CDS).
    pub fn apply_clusters(&mut self, update: &[Raw], removed: &[Name]) -> Vec<Rejected> {
        let (next, rejected) = lower::apply_clusters(&self.newest.clusters, update, removed);
        self.newest.clusters = Arc::new(next);
        rejected
    }

    /// Takes route tables (RDS).
    pub fn apply_routes(&mut self, update: &[Raw], removed: &[Name]) -> Vec<Rejected> {
        let (next, rejected) = lower::apply_routes(&self.newest.routes, update, removed);
        self.newest.routes = Arc::new(next);
        rejected
    }

    /// Takes endpoints (EDS).
    pub fn apply_endpoints(&mut self, update: &[Raw], removed: &[Name]) -> Vec<Rejected> {
        let (next, rejected) = lower::apply_endpoints(&self.newest.endpoints, update, removed);
        self.newest.endpoints = Arc::new(next);
        rejected
    }

    /// Takes the endpoints of a cluster of names, resolved by the proxy
    /// ([`lower::resolved_endpoints`] makes them).
    pub fn apply_resolved(&mut self, cluster: &Name, endpoints: EndpointSet) {
        Arc::make_mut(&mut self.newest.endpoints).insert(Name::clone(cluster), Arc::new(endpoints));
    }

    /// Clusters whose names the proxy must resolve.
    pub fn names_to_resolve(&self) -> impl Iterator<Item = (&Name, &Arc<DnsSpec>)> {
        self.newest.clusters.iter().filter_map(|(name, cluster)| match &cluster.discovery {
            Discovery::Dns(spec) => Some((name, spec)),
            _ => None,
        })
    }

    fn next(&self) -> Next {
        next(&self.newest, &Tables::from(&self.serving), &AtHand(&self.newest))
    }

    /// The next configuration.
    pub fn publish(&mut self) -> RuntimeConfig {
        let Tables { listeners, routes, clusters, endpoints } = self.next().tables;
        self.serving = RuntimeConfig {
            generation: self.serving.generation + 1,
            listeners,
            routes,
            clusters,
            endpoints,
            node: Arc::clone(&self.serving.node),
        };
        self.serving.clone()
    }
}

#[cfg(test)]
mod tests;
