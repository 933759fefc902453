//! Make before break: what has been received becomes what is published once all it needs is there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use engine::RuntimeConfig;
use engine::cluster::{Cluster, Discovery, DnsSpec, EndpointSet};
use engine::config::{Name, Table};
use engine::lower::{Raw, resolved_endpoints};
use tokio::sync::mpsc;
use types::wellknown::type_urls;

use super::lowering::Tables;
use crate::file_secrets::is_of_files;

/// The last good version of everything.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) tables: Tables,
    /// EDS names that have been answered, be it with nothing.
    answered: BTreeSet<Name>,
    /// Endpoints of names, by cluster.
    resolved: BTreeMap<Name, Arc<EndpointSet>>,
    dirty: bool,
    warming: bool,
    warming_since: Option<Duration>,
}

/// Names the received resources refer to.
#[derive(Default)]
pub(crate) struct Wanted {
    pub(crate) endpoints: BTreeSet<String>,
    pub(crate) routes: BTreeSet<String>,
    /// Of the control plane.
    pub(crate) secrets: BTreeSet<String>,
}

/// What an absent endpoint or route table may hold up; then its user is published without it
/// (Envoy's `initial_fetch_timeout`).
const WAIT_MAX: Duration = Duration::from_secs(15);

impl Received {
    /// Takes the outcome of lowering.
    pub(crate) fn take(&mut self, tables: Tables, url: &str, raws: &[Raw], removed: &[Name]) {
        self.tables = tables;
        self.dirty = true;
        if url == type_urls::ENDPOINT {
            self.answered.extend(raws.iter().map(|raw| Name::clone(&raw.name)));
            self.answered.extend(removed.iter().cloned());
        }
    }

    /// Takes a resolver's answer; says whether it changes anything.
    pub(crate) fn take_resolved(&mut self, resolved: Resolved) -> bool {
        let same = self.resolved.get(&resolved.cluster).is_some_and(|old| **old == *resolved.endpoints);
        if !same {
            self.resolved.insert(resolved.cluster, resolved.endpoints);
            self.dirty = true;
        }
        !same
    }

    /// Whether the received version of a cluster or listener is not the published one.
    pub(crate) fn waits(&self, published: &RuntimeConfig, url: &str, name: &str) -> bool {
        fn differ<T>(received: &Table<T>, published: &Table<T>, name: &str) -> bool {
            match (received.get(name), published.get(name)) {
                (Some(received), Some(published)) => !Arc::ptr_eq(received, published),
                (received, published) => received.is_some() != published.is_some(),
            }
        }
        match url {
            type_urls::CLUSTER => differ(&self.tables.clusters, &published.clusters, name),
            type_urls::LISTENER => differ(&self.tables.listeners, &published.listeners, name),
            _ => false,
        }
    }

    /// Whether something received is not published yet.
    pub(crate) fn is_warming(&self) -> bool {
        self.warming
    }

    /// Names to subscribe to.
    pub(crate) fn wanted(&self) -> Wanted {
        let mut wanted = Wanted::default();
        let mut secret = |name: &Name| {
            if name.starts_with("kubernetes://") || name.starts_with("configmap://") {
                wanted.secrets.insert(name.to_string());
            }
        };
        for (_, cluster) in self.tables.clusters.iter() {
            let needs = cluster.needs();
            needs.secrets.iter().for_each(&mut secret);
            if let Some(name) = needs.endpoints {
                wanted.endpoints.insert(name.to_string());
            }
        }
        for (_, listener) in self.tables.listeners.iter() {
            listener.secrets().iter().for_each(&mut secret);
            wanted.routes.extend(listener.route_tables().iter().map(ToString::to_string));
        }
        wanted
    }

    /// Secrets in files that received resources name, and those that published ones do.
    pub(crate) fn file_secrets(&self, published: &RuntimeConfig) -> BTreeSet<Name> {
        let mut names: BTreeSet<Name> = BTreeSet::new();
        for clusters in [&self.tables.clusters, &published.clusters] {
            names.extend(clusters.iter().flat_map(|(_, cluster)| cluster.needs().secrets));
        }
        for listeners in [&self.tables.listeners, &published.listeners] {
            names.extend(listeners.iter().flat_map(|(_, listener)| listener.secrets()));
        }
        names.retain(|name| is_of_files(name));
        names
    }

    /// The next configuration, if it differs from the published one. `now` is the time since the start.
    pub(crate) fn warm(&mut self, published: &RuntimeConfig, now: Duration) -> Option<RuntimeConfig> {
        if !self.dirty && !self.warming {
            return None;
        }
        let since = *self.warming_since.get_or_insert(now);
        let patience = now.saturating_sub(since) < WAIT_MAX;
        self.dirty = false;
        self.warming = false;
        let mut endpoints = Table::clone(&self.tables.endpoints);
        for (name, set) in &self.resolved {
            if self.tables.clusters.get(name).is_some_and(|cluster| matches!(cluster.discovery, Discovery::Dns(_))) {
                endpoints.insert(Name::clone(name), Arc::clone(set));
            }
        }
        let mut clusters = Table::default();
        for (name, cluster) in self.tables.clusters.iter() {
            let warm = !patience || self.is_warm(name, cluster);
            self.warming |= !warm;
            match (warm, published.clusters.get(name)) {
                (true, _) => clusters.insert(Name::clone(name), Arc::clone(cluster)),
                (false, Some(old)) => clusters.insert(Name::clone(name), Arc::clone(old)),
                (false, None) => {}
            }
        }
        let mut routes = Table::clone(&self.tables.routes);
        let mut listeners = Table::default();
        for (name, listener) in self.tables.listeners.iter() {
            let warm = !patience || listener.route_tables().iter().all(|table| self.tables.routes.get(table).is_some());
            self.warming |= !warm;
            match (warm, published.listeners.get(name)) {
                (true, _) => listeners.insert(Name::clone(name), Arc::clone(listener)),
                (false, Some(old)) => {
                    // what the old one uses stays with it
                    for table in old.route_tables() {
                        if let (None, Some(kept)) = (routes.get(&table), published.routes.get(&table)) {
                            routes.insert(table, Arc::clone(kept));
                        }
                    }
                    listeners.insert(Name::clone(name), Arc::clone(old));
                }
                (false, None) => {}
            }
        }
        if !self.warming {
            self.warming_since = None;
        }
        let same = same_table(&clusters, &published.clusters)
            && same_table(&listeners, &published.listeners)
            && same_table(&routes, &published.routes)
            && same_table(&endpoints, &published.endpoints);
        (!same).then(|| RuntimeConfig {
            generation: 0,
            listeners: Arc::new(listeners),
            routes: Arc::new(routes),
            clusters: Arc::new(clusters),
            endpoints: Arc::new(endpoints),
            node: Arc::clone(&published.node),
        })
    }

    fn is_warm(&self, name: &Name, cluster: &Cluster) -> bool {
        let needs = cluster.needs();
        let endpoints = needs
            .endpoints
            .is_none_or(|service| self.tables.endpoints.get(&service).is_some() || self.answered.contains(&service));
        endpoints && (!needs.dns || self.resolved.contains_key(name))
    }
}

fn same_table<T>(a: &Table<T>, b: &Table<T>) -> bool {
    a.len() == b.len() && a.iter().all(|(name, value)| b.get(name).is_some_and(|other| Arc::ptr_eq(value, other)))
}

/// A resolver's answer for one cluster.
pub(crate) struct Resolved {
    cluster: Name,
    endpoints: Arc<EndpointSet>,
}

/// Tasks that keep names of clusters resolved.
#[derive(Default)]
pub(crate) struct Resolvers {
    running: BTreeMap<Name, (u64, Task)>,
}

struct Task(tokio::task::JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Resolvers {
    /// Starts and stops resolvers so that each cluster of names has one.
    pub(crate) fn sync(&mut self, received: &Received, to: &mpsc::UnboundedSender<Resolved>) {
        let clusters = &received.tables.clusters;
        self.running.retain(|name, (fingerprint, _)| {
            clusters.get(name).is_some_and(|cluster| cluster.fingerprint == *fingerprint)
        });
        for (name, cluster) in clusters.iter() {
            if let Discovery::Dns(spec) = &cluster.discovery
                && !self.running.contains_key(name)
            {
                let task = tokio::spawn(resolve(Name::clone(name), Arc::clone(spec), to.clone()));
                self.running.insert(Name::clone(name), (cluster.fingerprint, Task(task)));
            }
        }
    }
}

async fn resolve(cluster: Name, spec: Arc<DnsSpec>, to: mpsc::UnboundedSender<Resolved>) {
    let mut known: BTreeMap<Box<str>, Vec<IpAddr>> = BTreeMap::new();
    loop {
        for host in spec.template.iter().flat_map(|locality| &locality.hosts) {
            if host.name.parse::<IpAddr>().is_ok() {
                continue;
            }
            match tokio::net::lookup_host((&*host.name, host.port)).await {
                Ok(found) => {
                    let mut addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
                    addresses.sort_unstable();
                    addresses.dedup();
                    known.insert(host.name.clone(), spec.family.choose(&addresses));
                }
                // the last answer stays
                Err(error) => tracing::debug!(%error, host = &*host.name, "a name does not resolve"),
            }
        }
        let endpoints = resolved_endpoints(&spec, |name| match name.parse() {
            Ok(address) => vec![address],
            Err(_) => known.get(name).cloned().unwrap_or_default(),
        });
        if to.send(Resolved { cluster: Name::clone(&cluster), endpoints: Arc::new(endpoints) }).is_err() {
            return;
        }
        tokio::time::sleep(spec.refresh.max(Duration::from_millis(100))).await;
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::cluster::v3 as cluster;
    use envoy_types::pb::envoy::config::core::v3 as core;
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;

    use super::*;
    use crate::tests::bed;

    /// Tables of one cluster, whose roots have this name.
    fn trusting(roots: &str) -> Tables {
        use tls::common_tls_context::ValidationContextType::ValidationContextSdsSecretConfig;
        let named = tls::SdsSecretConfig { name: roots.into(), ..Default::default() };
        let common = tls::CommonTlsContext {
            validation_context_type: Some(ValidationContextSdsSecretConfig(named)),
            ..Default::default()
        };
        let context = tls::UpstreamTlsContext { common_tls_context: Some(common), ..Default::default() };
        let socket = core::TransportSocket {
            name: "envoy.transport_sockets.tls".into(),
            config_type: Some(core::transport_socket::ConfigType::TypedConfig(bed::any(&context))),
        };
        let made = cluster::Cluster { transport_socket: Some(socket), ..bed::cluster("up", bed::NOBODY, false) };
        let (clusters, rejected) = engine::lower::apply_clusters(&Table::default(), &[bed::raw("up", &made)], &[]);
        assert_eq!(rejected, []);
        Tables { clusters: Arc::new(clusters), ..Tables::default() }
    }

    #[test]
    fn a_secret_in_files_is_followed_until_nothing_published_names_it() {
        fn check(received: &Received, published: &RuntimeConfig, expect: &[&str]) {
            let names = received.file_secrets(published);
            assert_eq!(names.iter().map(|name| &**name).collect::<Vec<&str>>(), expect);
        }
        let mut received = Received::default();
        let published = RuntimeConfig::default();
        check(&received, &published, &[]);
        received.take(trusting("file-root:/first"), type_urls::CLUSTER, &[], &[]);
        check(&received, &published, &["file-root:/first"]);
        let published = received.warm(&published, Duration::ZERO).unwrap();
        received.take(trusting("file-root:/second"), type_urls::CLUSTER, &[], &[]);
        check(&received, &published, &["file-root:/first", "file-root:/second"]);
        let published = received.warm(&published, Duration::ZERO).unwrap();
        check(&received, &published, &["file-root:/second"]);
        received.take(trusting("ROOTCA"), type_urls::CLUSTER, &[], &[]);
        let published = received.warm(&published, Duration::ZERO).unwrap();
        check(&received, &published, &[]);
    }
}
