//! Make before break: what has been received becomes what is published once all it needs is there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use engine::RuntimeConfig;
use engine::assembly::{self, Kind, Tables, There, Wanted};
use engine::cluster::{Discovery, DnsSpec, EndpointSet};
use engine::config::{Name, Table};
use engine::lower::{Raw, resolved_endpoints};
use tokio::sync::mpsc;
use types::wellknown::type_urls;
use workers::secrets::SecretStore;

use super::Origin;
use crate::file_secrets::is_of_files;

/// The last good version of everything.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) tables: Tables,
    /// EDS names that have been answered, be it with nothing.
    answered: BTreeSet<Name>,
    /// Endpoints and route tables that come again when the control plane is asked for them again.
    asked: BTreeSet<(&'static str, Name)>,
    /// Endpoints of names, by cluster.
    resolved: BTreeMap<Name, Arc<EndpointSet>>,
    dirty: bool,
    /// What does not serve yet, and since when it waits.
    waiting: BTreeMap<(Kind, Name), Duration>,
}

/// How long a resource waits for what it needs; then it serves without (Envoy's `initial_fetch_timeout`).
const WAIT_MAX: Duration = Duration::from_secs(15);

impl Received {
    /// Takes the outcome of lowering.
    pub(crate) fn take(&mut self, tables: Tables, url: &'static str, raws: &[Raw], removed: &[Name], origin: Origin) {
        self.tables = tables;
        self.dirty = true;
        let names = || raws.iter().map(|raw| &raw.name);
        if url == type_urls::ENDPOINT {
            self.answered.extend(names().chain(removed).cloned());
        }
        if origin == Origin::Plane && matches!(url, type_urls::ENDPOINT | type_urls::ROUTE) {
            self.asked.extend(names().map(|name| (url, Name::clone(name))));
        }
    }

    /// Forgets what the control plane answered for names that are not `wanted` any more; it comes again with the
    /// names. What serves still has it. Answers names by type.
    pub(crate) fn forget(&mut self, wanted: &Wanted) -> BTreeMap<&'static str, Vec<Name>> {
        fn is_absent(sorted: &[Name], name: &str) -> bool {
            sorted.binary_search_by(|gone| (**gone).cmp(name)).is_err()
        }
        let mut gone: BTreeMap<&'static str, Vec<Name>> = BTreeMap::new();
        self.answered.retain(|name| wanted.endpoints.contains(name));
        self.asked.retain(|(url, name)| {
            let names = if *url == type_urls::ENDPOINT { &wanted.endpoints } else { &wanted.routes };
            let stays = names.contains(name);
            if !stays {
                gone.entry(*url).or_default().push(Name::clone(name));
            }
            stays
        });
        if let Some(names) = gone.get(type_urls::ENDPOINT) {
            Arc::make_mut(&mut self.tables.endpoints).retain(|name, _| is_absent(names, name));
        }
        if let Some(names) = gone.get(type_urls::ROUTE) {
            Arc::make_mut(&mut self.tables.routes).retain(|name, _| is_absent(names, name));
        }
        gone
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

    /// Whether the received version of a resource is not the published one.
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
            type_urls::ROUTE => differ(&self.tables.routes, &published.routes, name),
            _ => false,
        }
    }

    /// Whether something received is not published yet.
    pub(crate) fn is_warming(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the next call of [`Self::warm`] looks at anything.
    pub(crate) fn is_due(&self) -> bool {
        self.dirty || self.is_warming()
    }

    /// Secrets that received resources name, and those that published ones do.
    pub(crate) fn secrets(&self, published: &RuntimeConfig) -> BTreeSet<Name> {
        let mut names = self.tables.wanted().secrets;
        names.extend(Tables::from(published).wanted().secrets);
        names
    }

    /// Those of [`Self::secrets`] that are in files.
    pub(crate) fn file_secrets(&self, published: &RuntimeConfig) -> BTreeSet<Name> {
        let mut names = self.secrets(published);
        names.retain(|name| is_of_files(name));
        names
    }

    /// The next configuration, if it differs from the published one. `now` is the time since the start.
    pub(crate) fn warm(
        &mut self,
        published: &RuntimeConfig,
        secrets: &SecretStore,
        now: Duration,
    ) -> Option<RuntimeConfig> {
        if !self.is_due() {
            return None;
        }
        self.dirty = false;
        let clusters = &self.tables.clusters;
        self.resolved.retain(|name, _| clusters.get(name).is_some());
        let mut newest = self.tables.clone();
        for (name, set) in &self.resolved {
            if newest.clusters.get(name).is_some_and(|cluster| matches!(cluster.discovery, Discovery::Dns(_))) {
                Arc::make_mut(&mut newest.endpoints).insert(Name::clone(name), Arc::clone(set));
            }
        }
        let serving = Tables::from(published);
        let next = assembly::next(&newest, &serving, &AtHand { received: self, secrets, now });
        let before = std::mem::take(&mut self.waiting);
        let waits = |key: (Kind, Name)| {
            let since = before.get(&key).copied().unwrap_or(now);
            (key, since)
        };
        self.waiting = next.waiting.into_iter().map(waits).collect();
        let Tables { listeners, routes, clusters, endpoints } = next.tables;
        let same = same_table(&clusters, &serving.clusters)
            && same_table(&listeners, &serving.listeners)
            && same_table(&routes, &serving.routes)
            && same_table(&endpoints, &serving.endpoints);
        (!same).then(|| RuntimeConfig {
            generation: 0,
            listeners,
            routes,
            clusters,
            endpoints,
            node: Arc::clone(&published.node),
        })
    }
}

/// What is there at one moment.
struct AtHand<'a> {
    received: &'a Received,
    secrets: &'a SecretStore,
    now: Duration,
}

impl There for AtHand<'_> {
    fn has_secret(&self, name: &str) -> bool {
        self.secrets.has(name)
    }

    fn has_endpoints(&self, service: &str) -> bool {
        self.received.tables.endpoints.get(service).is_some() || self.received.answered.contains(service)
    }

    fn is_resolved(&self, cluster: &str) -> bool {
        self.received.resolved.contains_key(cluster)
    }

    fn gives_up(&self, kind: Kind, name: &Name) -> bool {
        let since = self.received.waiting.get(&(kind, Name::clone(name)));
        since.is_some_and(|since| self.now.saturating_sub(*since) >= WAIT_MAX)
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
    use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
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

    /// A store with these secrets.
    fn having(names: &[&str]) -> workers::secrets::Secrets {
        let certificate = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap().cert.pem();
        let roots = Arc::new(identity::workload::TrustRoots::from_pem(certificate.as_bytes()).unwrap());
        let trust = Arc::new(workers::secrets::Trust::from(roots));
        let secrets = workers::secrets::Secrets::default();
        secrets.change(|store| {
            store
                .extend(names.iter().map(|name| ((*name).into(), workers::secrets::Secret::Roots(Arc::clone(&trust)))));
        });
        secrets
    }

    #[test]
    fn a_secret_in_files_is_followed_until_nothing_published_names_it() {
        fn check(received: &Received, published: &RuntimeConfig, expect: &[&str]) {
            let names = received.file_secrets(published);
            assert_eq!(names.iter().map(|name| &**name).collect::<Vec<&str>>(), expect);
        }
        let mut received = Received::default();
        let secrets = having(&["file-root:/first", "file-root:/second", "ROOTCA"]);
        let secrets = secrets.load();
        let published = RuntimeConfig::default();
        check(&received, &published, &[]);
        let take = |received: &mut Received, roots: &str| {
            received.take(trusting(roots), type_urls::CLUSTER, &[], &[], Origin::Plane);
        };
        take(&mut received, "file-root:/first");
        check(&received, &published, &["file-root:/first"]);
        let published = received.warm(&published, &secrets, Duration::ZERO).unwrap();
        take(&mut received, "file-root:/second");
        check(&received, &published, &["file-root:/first", "file-root:/second"]);
        let published = received.warm(&published, &secrets, Duration::ZERO).unwrap();
        check(&received, &published, &["file-root:/second"]);
        take(&mut received, "ROOTCA");
        let published = received.warm(&published, &secrets, Duration::ZERO).unwrap();
        check(&received, &published, &[]);
    }

    #[test]
    fn a_resource_waits_for_its_own_time() {
        let mut received = Received::default();
        let (published, none) = (RuntimeConfig::default(), having(&[]));
        let none = none.load();
        let at = Duration::from_secs;
        let warm = |received: &mut Received, seconds| received.warm(&published, &none, at(seconds)).is_some();
        received.take(trusting("a"), type_urls::CLUSTER, &[], &[], Origin::Plane);
        assert!(!warm(&mut received, 100) && received.is_warming());
        assert!(!warm(&mut received, 114), "not yet");
        // Another version that lacks something goes on waiting: whoever changes often serves, too.
        received.take(trusting("b"), type_urls::CLUSTER, &[], &[], Origin::Plane);
        assert!(!warm(&mut received, 114));
        assert!(warm(&mut received, 115) && !received.is_warming());
        received.take(trusting("c"), type_urls::CLUSTER, &[], &[], Origin::Plane);
        assert!(!warm(&mut received, 200), "its time begins again");
    }

    /// A cluster that comes back after it was removed waits for its endpoints again.
    #[test]
    fn what_nobody_names_is_forgotten_and_asked_for_again() {
        fn eds(name: &str) -> cluster::Cluster {
            cluster::Cluster {
                name: name.into(),
                cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(3)),
                eds_cluster_config: Some(cluster::cluster::EdsClusterConfig::default()),
                ..Default::default()
            }
        }
        let assignment = |name: &str| {
            bed::raw(name, &endpoint::ClusterLoadAssignment { cluster_name: name.into(), ..Default::default() })
        };
        let mut received = Received::default();
        let secrets = having(&[]);
        let secrets = secrets.load();
        let mut published = RuntimeConfig::default();
        let mut apply = |received: &mut Received, url, raws: &[Raw], removed: &[Name], origin| {
            let lowered = super::super::lowering::lower_one(url, received.tables.clone(), raws, removed);
            assert_eq!(lowered.rejected, []);
            received.take(lowered.tables, url, raws, removed, origin);
            let wanted = received.tables.wanted();
            let forgotten = received.forget(&wanted);
            if let Some(next) = received.warm(&published, &secrets, Duration::ZERO) {
                published = next;
            }
            let serves: Vec<String> = published.clusters.iter().map(|(name, _)| name.to_string()).collect();
            (serves.join(" "), forgotten)
        };
        let nothing = BTreeMap::new();
        let both = ["a", "b"].map(|name| bed::raw(name, &eds(name)));
        assert_eq!(
            apply(&mut received, type_urls::CLUSTER, &both, &[], Origin::Plane),
            (String::new(), nothing.clone())
        );
        let of_plane = [assignment("a")];
        assert_eq!(
            apply(&mut received, type_urls::ENDPOINT, &of_plane, &[], Origin::Plane),
            ("a".into(), nothing.clone())
        );
        let of_file = [assignment("b")];
        assert_eq!(
            apply(&mut received, type_urls::ENDPOINT, &of_file, &[], Origin::File),
            ("a b".into(), nothing.clone())
        );
        let names: [Name; 2] = ["a".into(), "b".into()];
        let forgotten = BTreeMap::from([(type_urls::ENDPOINT, vec!["a".into()])]);
        assert_eq!(apply(&mut received, type_urls::CLUSTER, &[], &names, Origin::Plane), (String::new(), forgotten));
        // A file says nothing twice.
        assert_eq!(apply(&mut received, type_urls::CLUSTER, &both, &[], Origin::Plane), ("b".into(), nothing.clone()));
        assert_eq!(apply(&mut received, type_urls::ENDPOINT, &of_plane, &[], Origin::Plane).0, "a b");
    }
}
