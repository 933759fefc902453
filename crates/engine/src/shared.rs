//! State of clusters and hosts that all workers of a proxy share, surviving generations.
//!
//! Istio's limits count per proxy, not per core, so these are relaxed atomics. The table itself is
//! locked only when a worker meets a cluster or host for the first time, never per request.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::cluster::{Address, EndpointSet};
use crate::config::{Name, NameHasher, RuntimeConfig};

/// A count of things under way.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU32);

impl Gauge {
    /// How many.
    pub fn get(&self) -> u32 {
        self.0.load(Relaxed)
    }

    /// One more, if fewer than `max` are under way. The check and the step are one.
    pub fn try_enter(&self, max: u32) -> bool {
        self.0.fetch_update(Relaxed, Relaxed, |now| (now < max).then_some(now + 1)).is_ok()
    }

    /// One more.
    pub fn enter(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// One less.
    pub fn leave(&self) {
        let before = self.0.fetch_sub(1, Relaxed);
        debug_assert!(before > 0, "left more often than entered");
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    /// One more.
    pub fn count(&self) {
        self.add(1);
    }

    /// `by` more.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Relaxed);
    }

    /// How many.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What a cluster has been through since it was met.
///
/// *Source*: Envoy, cluster statistics: `upstream_cx_total`, `upstream_rq_total`, and so on.
#[derive(Debug, Default)]
pub struct ClusterTallies {
    /// Connections begun.
    pub connections: Tally,
    /// Of them, those that could not be made.
    pub connect_failures: Tally,
    /// Requests sent on a connection; each try is one.
    pub requests: Tally,
    /// Tries after the first.
    pub retries: Tally,
    /// Tries that the limit of retries did not allow.
    pub retry_overflows: Tally,
    /// Requests that were answered by their time-out.
    pub timeouts: Tally,
    /// Requests that found no place to wait in.
    pub overflows: Tally,
    /// Answers that clients got, by the first digit of their status, from 1 to 5.
    pub classes: [Tally; 5],
}

impl ClusterTallies {
    /// A client was answered, by the upstream or in its place.
    pub fn answered(&self, status: u16) {
        if let Some(class) = usize::from(status / 100).checked_sub(1).and_then(|at| self.classes.get(at)) {
            class.count();
        }
    }
}

/// What calls of gRPC came to: of one method, or of all that are not told apart.
///
/// *Source*: Envoy, `grpc_stats`.
#[derive(Debug, Default)]
pub struct GrpcTally {
    /// By `grpc-status`; the last one is of numbers that nobody gave a name.
    pub statuses: [Tally; 18],
    /// Messages from clients.
    pub request_messages: Tally,
    /// Messages to clients.
    pub response_messages: Tally,
}

impl GrpcTally {
    /// A call has ended.
    pub fn ended(&self, status: Option<u32>, request_messages: u64, response_messages: u64) {
        if let Some(status) = status {
            let last = self.statuses.len() - 1;
            self.statuses[usize::try_from(status).map_or(last, |status| status.min(last))].count();
        }
        self.request_messages.add(request_messages);
        self.response_messages.add(response_messages);
    }
}

/// Service and method of a call.
pub type GrpcMethod = (Box<str>, Box<str>);

/// Methods of one cluster that are told apart; clients name them.
pub const GRPC_METHODS_MAX: usize = 256;

/// gRPC's tallies of one cluster.
#[derive(Debug, Default)]
pub struct GrpcTallies {
    all: OnceLock<Box<GrpcTally>>,
    methods: Mutex<BTreeMap<GrpcMethod, Arc<GrpcTally>>>,
}

impl GrpcTallies {
    /// Of calls that are not told apart.
    pub fn all(&self) -> &GrpcTally {
        self.all.get_or_init(Box::default)
    }

    /// The same, if there was such a call.
    pub fn met(&self) -> Option<&GrpcTally> {
        self.all.get().map(|all| &**all)
    }

    /// Of one method, made when it is met; `None` beyond [`GRPC_METHODS_MAX`].
    ///
    /// *Cost*: a lock; to be asked once for each method and worker.
    pub fn method(&self, service: &str, method: &str) -> Option<Arc<GrpcTally>> {
        let mut methods = self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (Box::from(service), Box::from(method));
        if let Some(found) = methods.get(&key) {
            return Some(Arc::clone(found));
        }
        if methods.len() >= GRPC_METHODS_MAX {
            return None;
        }
        let made = Arc::<GrpcTally>::default();
        methods.insert(key, Arc::clone(&made));
        Some(made)
    }

    /// The methods met so far.
    pub fn methods(&self) -> Vec<(GrpcMethod, Arc<GrpcTally>)> {
        let methods = self.methods.lock().unwrap_or_else(PoisonError::into_inner);
        methods.iter().map(|(key, tally)| (key.clone(), Arc::clone(tally))).collect()
    }
}

/// One endpoint of a cluster, as this proxy knows it from experience.
#[derive(Debug)]
pub struct SharedHost {
    /// Where it is.
    pub address: Address,
    /// Connections open.
    pub connections: Gauge,
    /// Requests (or byte streams) under way.
    pub requests: Gauge,
    /// Answers of 5xx in a row.
    pub consecutive_5xx: AtomicU32,
    /// Answers of 502, 503, 504 in a row.
    pub consecutive_gateway: AtomicU32,
    /// Connect failures, resets and time-outs in a row.
    pub consecutive_local: AtomicU32,
    /// How often in a row it was ejected; falls by one at each sweep it is not.
    pub ejections: AtomicU32,
    /// Whether it is ejected now.
    pub ejected: AtomicBool,
    /// When it was ejected last, nanoseconds since the table's epoch.
    pub ejected_at: AtomicU64,
    /// When it was first seen, nanoseconds since the table's epoch (slow start).
    pub since: u64,
}

impl SharedHost {
    /// A host nobody has talked to.
    pub fn new(address: Address, since: u64) -> Self {
        Self {
            address,
            connections: Gauge::default(),
            requests: Gauge::default(),
            consecutive_5xx: AtomicU32::new(0),
            consecutive_gateway: AtomicU32::new(0),
            consecutive_local: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            ejected: AtomicBool::new(false),
            ejected_at: AtomicU64::new(0),
            since,
        }
    }

    /// Whether outlier detection keeps it out.
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Relaxed)
    }
}

/// One cluster, as this proxy knows it from experience.
#[derive(Debug)]
pub struct SharedCluster {
    /// Its name.
    pub name: Name,
    /// Connections open.
    pub connections: Gauge,
    /// Requests waiting for a connection.
    pub pending: Gauge,
    /// Requests under way.
    pub requests: Gauge,
    /// Retries under way.
    pub retries: Gauge,
    /// Hosts ejected now.
    pub ejected: Gauge,
    /// What it has been through.
    pub tallies: ClusterTallies,
    /// What calls of gRPC came to, where that is counted.
    pub grpc: GrpcTallies,
    /// Counts up whenever a host is ejected or comes back, so that pickers look again.
    pub health_version: AtomicU64,
    epoch: Instant,
    hosts: Mutex<HashMap<Address, Arc<SharedHost>, NameHasher>>,
}

/// Hosts kept by address; original-destination clusters grow with the addresses clients dial.
const HOSTS_MAX: usize = 65_536;

impl SharedCluster {
    fn new(name: Name, epoch: Instant) -> Self {
        Self {
            name,
            connections: Gauge::default(),
            pending: Gauge::default(),
            requests: Gauge::default(),
            retries: Gauge::default(),
            ejected: Gauge::default(),
            tallies: ClusterTallies::default(),
            grpc: GrpcTallies::default(),
            health_version: AtomicU64::new(0),
            epoch,
            hosts: Mutex::default(),
        }
    }

    /// A cluster outside any table, for tests and explanations.
    pub fn detached(name: &str, epoch: Instant) -> Arc<Self> {
        Arc::new(Self::new(name.into(), epoch))
    }

    /// Nanoseconds since the epoch.
    pub fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX)
    }

    /// The host at `address`, made on first use. Hosts nobody uses give way at a limit.
    pub fn host(&self, address: &Address, now: Instant) -> Arc<SharedHost> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = hosts.get(address) {
            return Arc::clone(host);
        }
        if hosts.len() >= HOSTS_MAX {
            hosts.retain(|_, host| Arc::strong_count(host) > 1);
        }
        let host = Arc::new(SharedHost::new(address.clone(), self.nanos(now)));
        hosts.insert(address.clone(), Arc::clone(&host));
        host
    }

    /// All hosts, by address.
    pub fn hosts(&self) -> Vec<Arc<SharedHost>> {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        #[expect(clippy::iter_over_hash_type, reason = "sorted below")]
        let mut all = {
            let mut all = Vec::with_capacity(hosts.len());
            for host in hosts.values() {
                all.push(Arc::clone(host));
            }
            all
        };
        drop(hosts);
        all.sort_by(|a, b| a.address.cmp(&b.address));
        all
    }

    /// Ends every ejection: what ejected is no longer configured, so nothing else would.
    fn take_back(&self) {
        let mut changed = false;
        for host in self.hosts() {
            if host.ejected.swap(false, Relaxed) {
                self.ejected.leave();
                changed = true;
            }
            host.ejections.store(0, Relaxed);
        }
        if changed {
            self.health_version.fetch_add(1, Relaxed);
        }
    }

    /// Forgets hosts that are neither in `current` nor in use.
    fn keep_only(&self, current: Option<&EndpointSet>) {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|address, host| {
            let listed = current.is_some_and(|set| set.iter().any(|endpoint| endpoint.address == *address));
            let keep = listed || Arc::strong_count(host) > 1;
            if !keep && host.ejected.swap(false, Relaxed) {
                self.ejected.leave();
            }
            keep
        });
    }
}

/// All clusters of a proxy.
#[derive(Debug)]
pub struct SharedTable {
    epoch: Instant,
    clusters: Mutex<HashMap<Name, Arc<SharedCluster>, NameHasher>>,
}

impl SharedTable {
    /// An empty table; times inside are counted from `epoch`.
    pub fn new(epoch: Instant) -> Self {
        Self { epoch, clusters: Mutex::default() }
    }

    /// The cluster called `name`, made on first use.
    pub fn cluster(&self, name: &Name) -> Arc<SharedCluster> {
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        let made = clusters
            .entry(Name::clone(name))
            .or_insert_with(|| Arc::new(SharedCluster::new(Name::clone(name), self.epoch)));
        Arc::clone(made)
    }

    /// The clusters met so far, by name.
    pub fn clusters(&self) -> Vec<Arc<SharedCluster>> {
        let clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        #[expect(clippy::iter_over_hash_type, reason = "sorted below")]
        let mut all = {
            let mut all = Vec::with_capacity(clusters.len());
            for cluster in clusters.values() {
                all.push(Arc::clone(cluster));
            }
            all
        };
        drop(clusters);
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Forgets what `config` no longer has and nobody uses. For the control thread, after a publication.
    pub fn reconcile(&self, config: &RuntimeConfig) {
        for shared in self.clusters() {
            let cluster = config.clusters.get(&shared.name);
            if cluster.is_none_or(|cluster| cluster.outlier.is_none()) {
                shared.take_back();
            }
            let set = cluster.and_then(|cluster| config.endpoints_of(cluster));
            shared.keep_only(set.map(Arc::as_ref));
        }
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        clusters.retain(|name, shared| config.clusters.get(name).is_some() || Arc::strong_count(shared) > 1);
    }

    /// Ends ejections whose time has passed, for every cluster with outlier detection. For the
    /// control thread; returns when to come again at the latest.
    pub fn sweep(&self, config: &RuntimeConfig, now: Instant) -> Duration {
        let mut next = Duration::from_secs(10);
        for shared in self.clusters() {
            let Some(policy) = config.clusters.get(&shared.name).and_then(|cluster| cluster.outlier.as_ref()) else {
                continue;
            };
            next = next.min(crate::outlier::sweep(policy, &shared, now));
        }
        next
    }
}

/// Holds one place of a gauge for as long as it lives.
#[derive(Debug)]
pub struct Held<T: Gauged>(Arc<T>);

/// Something with a gauge that [`Held`] leaves.
pub trait Gauged {
    /// The gauge.
    fn gauge(&self) -> &Gauge;
}

impl Gauged for SharedHost {
    fn gauge(&self) -> &Gauge {
        &self.requests
    }
}

impl<T: Gauged> Held<T> {
    /// Enters without a limit.
    pub fn enter(of: &Arc<T>) -> Self {
        of.gauge().enter();
        Self(Arc::clone(of))
    }
}

impl<T: Gauged> Drop for Held<T> {
    fn drop(&mut self) {
        self.0.gauge().leave();
    }
}

/// Which of a cluster's gauges a [`ClusterHeld`] holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resource {
    /// An open connection.
    Connection,
    /// A request waiting for a connection.
    Pending,
    /// A request under way.
    Request,
    /// A retry under way.
    Retry,
}

/// Holds one place of a cluster's gauge for as long as it lives.
#[derive(Debug)]
pub struct ClusterHeld {
    cluster: Arc<SharedCluster>,
    resource: Resource,
}

impl SharedCluster {
    fn gauge_of(&self, resource: Resource) -> &Gauge {
        match resource {
            Resource::Connection => &self.connections,
            Resource::Pending => &self.pending,
            Resource::Request => &self.requests,
            Resource::Retry => &self.retries,
        }
    }

    /// Takes a place if fewer than `max` are taken; `None` is an open circuit breaker.
    pub fn try_hold(self: &Arc<Self>, resource: Resource, max: u32) -> Option<ClusterHeld> {
        self.gauge_of(resource).try_enter(max).then(|| ClusterHeld { cluster: Arc::clone(self), resource })
    }

    /// Takes a place whatever the limit (a worker without a connection may open one above it).
    pub fn hold(self: &Arc<Self>, resource: Resource) -> ClusterHeld {
        self.gauge_of(resource).enter();
        ClusterHeld { cluster: Arc::clone(self), resource }
    }
}

impl Drop for ClusterHeld {
    fn drop(&mut self) {
        self.cluster.gauge_of(self.resource).leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_apart_up_to_a_limit() {
        let grpc = GrpcTallies::default();
        assert!(grpc.met().is_none());
        for n in 0..GRPC_METHODS_MAX {
            grpc.method("a.B", &n.to_string()).unwrap().ended(Some(0), 1, 2);
        }
        assert!(grpc.method("a.B", "more").is_none());
        let known = grpc.method("a.B", "7").unwrap();
        known.ended(Some(99), 0, 1);
        known.ended(None, 0, 0);
        assert_eq!((known.statuses[0].get(), known.statuses[17].get()), (1, 1));
        assert_eq!((known.request_messages.get(), known.response_messages.get()), (1, 3));
        assert_eq!(grpc.methods().len(), GRPC_METHODS_MAX);
    }

    #[test]
    fn answers_are_counted_by_class() {
        let tallies = ClusterTallies::default();
        for status in [0, 99, 101, 200, 204, 404, 503, 599, 600, u16::MAX] {
            tallies.answered(status);
        }
        assert_eq!(tallies.classes.each_ref().map(Tally::get), [1, 2, 0, 1, 2]);
    }

    #[test]
    fn a_place_is_given_back() {
        let cluster = SharedCluster::detached("a", Instant::now());
        let first = cluster.try_hold(Resource::Request, 1).unwrap();
        assert!(cluster.try_hold(Resource::Request, 1).is_none());
        assert!(cluster.try_hold(Resource::Pending, 1).is_some());
        drop(first);
        assert!(cluster.try_hold(Resource::Request, 1).is_some());
    }

    /// Each entry is one step of one atomic, so no order of steps of several workers passes the limit.
    #[test]
    fn a_limit_holds_for_all_workers_together() {
        const MAX: u32 = 3;
        let cluster = SharedCluster::detached("a", Instant::now());
        let inside = AtomicU32::new(0);
        let entered = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5_000 {
                        let Some(held) = cluster.try_hold(Resource::Connection, MAX) else { continue };
                        assert!(inside.fetch_add(1, Relaxed) < MAX, "one above the limit");
                        entered.fetch_add(1, Relaxed);
                        std::thread::yield_now();
                        // counted out before the place is free for the next
                        inside.fetch_sub(1, Relaxed);
                        drop(held);
                    }
                });
            }
        });
        assert!(entered.load(Relaxed) >= MAX, "somebody came in");
        assert_eq!(cluster.connections.get(), 0, "every place came back");
    }

    #[test]
    fn what_no_longer_ejects_gives_its_hosts_back() {
        use crate::testing::{World, cluster};
        use envoy_types::pb::envoy::config::cluster::v3 as messages;

        let detects = |name: &str| messages::Cluster {
            outlier_detection: Some(messages::OutlierDetection {
                enforcing_success_rate: crate::testing::number(0),
                ..messages::OutlierDetection::default()
            }),
            ..cluster(name, &[80])
        };
        let before = World::new(&[], &[detects("changed"), detects("kept")], crate::config::NodeFacts::default());
        let after = World::new(&[], &[cluster("changed", &[80]), detects("kept")], crate::config::NodeFacts::default());
        let now = Instant::now();
        let table = SharedTable::new(now);
        let address = Address::Ip("10.0.0.1:80".parse().unwrap());
        let eject = |name: &str| {
            let cluster = table.cluster(&name.into());
            let host = cluster.host(&address, now);
            host.ejected.store(true, Relaxed);
            host.ejections.store(2, Relaxed);
            cluster.ejected.enter();
            (cluster, host)
        };
        let all = [eject("changed"), eject("kept")];
        table.reconcile(&before.config);
        assert!(all.iter().all(|(_, host)| host.is_ejected()), "the configuration still detects");
        table.reconcile(&after.config);
        let [(changed, back), (kept, out)] = &all;
        assert_eq!((back.is_ejected(), back.ejections.load(Relaxed), changed.ejected.get()), (false, 0, 0));
        assert_eq!((out.is_ejected(), out.ejections.load(Relaxed), kept.ejected.get()), (true, 2, 1));
        assert_eq!(changed.health_version.load(Relaxed), 1, "pickers look again");
        table.reconcile(&after.config);
        assert_eq!((changed.health_version.load(Relaxed), kept.health_version.load(Relaxed)), (1, 0));
    }

    #[test]
    fn hosts_survive_while_used_or_listed() {
        let now = Instant::now();
        let table = SharedTable::new(now);
        let cluster = table.cluster(&"a".into());
        let address = Address::Ip("127.0.0.1:80".parse().unwrap());
        let host = cluster.host(&address, now);
        assert!(Arc::ptr_eq(&host, &cluster.host(&address, now)));
        table.reconcile(&RuntimeConfig::default());
        assert_eq!(cluster.hosts().len(), 1, "in use");
        drop(host);
        table.reconcile(&RuntimeConfig::default());
        assert_eq!(cluster.hosts().len(), 0);
        drop(cluster);
        table.reconcile(&RuntimeConfig::default());
        assert!(table.clusters().is_empty());
    }
}
