//! The connected proxies: what each should have, and where each stands.
//!
//! A proxy that waits for a push waits once, however many changes come meanwhile; one worker
//! compiles, and what it publishes replaces what the proxy has not been sent yet. So there is at
//! most one push waiting and one running per proxy, and a slow proxy holds up nobody.
//!
//! What is compiled is in proportion to the change: nothing for a proxy that no change since its
//! last push concerns; the clusters of some services where only their endpoints changed; else all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use compile::{ProxyKind, View};
use mesh::{Reach, Reached, ServiceKey};
use serde::Serialize;
use telemetry::registry::Registry;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use types::wellknown::type_urls;
use types::{Finding, SpiffeId};
use xds::ResourceSet;
use xds::client::Protocol;
use xds::server::{Answered, Observer, Outgoing, Progress};

use crate::compiler::{Compiled, Compiler, Told};
use crate::mesh_state::{Mesh, f64_of};
use crate::pool::Pool;

/// Longest wait for a moment of the wall clock.
const LOOK_EVERY: Duration = Duration::from_mins(1);

/// One connected stream.
struct Proxy {
    node_id: Box<str>,
    istio_version: Box<str>,
    view: Arc<View>,
    /// Who it is; `None` on plaintext, where no secrets go.
    id: Option<SpiffeId>,
    protocol: Protocol,
    connected: jiff::Timestamp,
    resources: watch::Sender<Option<Arc<ResourceSet>>>,
    /// Its pod was in the mesh once.
    was_workload: bool,
    /// The last push that may tell it anything else than the one before.
    affected_by: u64,
    findings: Arc<Findings>,
    /// When its secrets are to be judged again: one of them expires, or becomes valid.
    judged_until: Option<SystemTime>,
    progress: Progress,
    types: BTreeMap<Box<str>, TypeState>,
}

/// What is wrong for one proxy.
#[derive(Clone, Debug, Default)]
struct Findings {
    /// With no single resource.
    general: Vec<Finding>,
    /// With a resource, by type and name.
    of_resources: BTreeMap<(Box<str>, Box<str>), Finding>,
}

impl Findings {
    fn all(&self) -> impl Iterator<Item = &Finding> {
        self.general.iter().chain(self.of_resources.values())
    }

    fn set(&mut self, type_url: &str, name: &str, finding: Option<Finding>) {
        let key = (type_url.into(), name.into());
        match finding {
            Some(finding) => drop(self.of_resources.insert(key, finding)),
            None => drop(self.of_resources.remove(&key)),
        }
    }
}

/// What a proxy was sent and answered, of one type.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TypeState {
    /// Nonce of the last response.
    pub sent: Box<str>,
    /// Nonce of the last one it accepted.
    pub acked: Box<str>,
    /// When it was sent.
    pub sent_time: String,
    /// Why it refused the last response; empty when it did not.
    pub last_error: Box<str>,
}

/// A proxy on status pages.
#[derive(Clone, Debug)]
pub struct ProxyStatus {
    /// `<pod>.<namespace>`
    pub name: String,
    /// The whole node id.
    pub node_id: Box<str>,
    /// What it is for.
    pub kind: ProxyKind,
    /// Its cluster.
    pub cluster_id: Box<str>,
    /// The version it says it is.
    pub istio_version: Box<str>,
    /// Who it proved to be.
    pub id: Option<SpiffeId>,
    /// The protocol it speaks.
    pub protocol: Protocol,
    /// Since when.
    pub connected: jiff::Timestamp,
    /// Where it stands.
    pub progress: Progress,
    /// Per type.
    pub types: BTreeMap<Box<str>, TypeState>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    proxies: BTreeMap<u64, Proxy>,
    waiting: VecDeque<(u64, Instant)>,
    queued: BTreeSet<u64>,
    /// Services whose clusters changed, by the last such push, since one that affected everybody.
    clusters_of: BTreeMap<ServiceKey, u64>,
}

/// All connected proxies.
pub struct Fleet {
    inner: Mutex<Inner>,
    wake: Notify,
    /// Counts every change of any status.
    changes: watch::Sender<u64>,
    metrics: Registry,
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fleet").finish_non_exhaustive()
    }
}

impl Fleet {
    /// Nobody is connected.
    pub fn new(metrics: Registry) -> Self {
        Self { inner: Mutex::default(), wake: Notify::new(), changes: watch::channel(0).0, metrics }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Wakes whenever a status changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Adds a stream and asks for its first push. It leaves when the observer is dropped.
    pub fn join(
        self: &Arc<Self>,
        view: View,
        node_id: &str,
        istio_version: &str,
        id: Option<SpiffeId>,
        protocol: Protocol,
    ) -> (watch::Receiver<Option<Arc<ResourceSet>>>, Member) {
        let (sender, receiver) = watch::channel(None);
        let mut inner = self.inner();
        inner.next += 1;
        let number = inner.next;
        let proxy = Proxy {
            node_id: node_id.into(),
            istio_version: istio_version.into(),
            view: Arc::new(view),
            id,
            protocol,
            connected: jiff::Timestamp::now(),
            resources: sender,
            was_workload: false,
            affected_by: 0,
            findings: Arc::default(),
            judged_until: None,
            progress: Progress { generation: 0, settled: false, refused: Vec::new() },
            types: BTreeMap::new(),
        };
        inner.proxies.insert(number, proxy);
        self.metrics.set("pilot_xds", &[("version", env!("CARGO_PKG_VERSION"))], f64_of(inner.proxies.len()));
        inner.enqueue(number);
        drop(inner);
        self.wake.notify_one();
        self.changed();
        (receiver, Member { fleet: Arc::clone(self), number })
    }

    /// Says whom a push may tell something new. To be called before the mesh of that push is seen by
    /// [`run`]; the others are only moved on.
    pub fn affect(&self, push: u64, reach: &Reach) {
        let mut inner = self.inner();
        for proxy in inner.proxies.values_mut() {
            let view = &proxy.view;
            let is_router = view.kind == ProxyKind::Router;
            let reached = Reached { is_router, namespace: &view.namespace, name: &view.name, ips: &view.ips };
            if reach.includes(reached) {
                proxy.affected_by = push;
            }
        }
        // Who comes later is told everything anyway. So the list is never longer than the services
        // are many: when one goes, everybody is reached.
        if reach.is_everyone() {
            inner.clusters_of.clear();
        } else {
            inner.clusters_of.extend(reach.clusters_of().iter().map(|key| (key.clone(), push)));
        }
    }

    /// Asks for a push to everybody.
    pub fn enqueue_all(&self) {
        let mut inner = self.inner();
        let numbers: Vec<u64> = inner.proxies.keys().copied().collect();
        for number in numbers {
            inner.enqueue(number);
        }
        drop(inner);
        self.wake.notify_one();
        self.changed();
    }

    /// Everybody's status, in the order of names.
    pub fn status(&self) -> Vec<ProxyStatus> {
        let mut list: Vec<ProxyStatus> = self.inner().proxies.values().map(Proxy::status).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// What a proxy named `<pod>.<namespace>` should have.
    pub fn resources_of(&self, name: &str) -> Option<Arc<ResourceSet>> {
        let inner = self.inner();
        let proxy = inner.proxies.values().rev().find(|proxy| proxy.name() == name)?;
        proxy.resources.borrow().clone()
    }

    /// What is wrong for single proxies, each finding once.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings: Vec<Finding> = Vec::new();
        for finding in self.inner().proxies.values().flat_map(|proxy| proxy.findings.all()) {
            if !findings.contains(finding) {
                findings.push(finding.clone());
            }
        }
        findings
    }

    /// Names of those that do not run `mesh` yet, or refused a part of it. A stream may hang
    /// half-open for a while: nobody waits for one whose pod is gone, nor for an old one of a proxy
    /// that came back.
    pub fn laggards(&self, mesh: &Mesh) -> Vec<String> {
        let inner = self.inner();
        let is_gone = |proxy: &Proxy| {
            proxy.was_workload && mesh.snapshot.workload(&proxy.view.namespace, &proxy.view.name).is_none()
        };
        let newest: BTreeMap<_, _> = inner.proxies.values().map(|proxy| ((&proxy.node_id, &proxy.id), proxy)).collect();
        let late = newest.into_values().filter(|proxy| !proxy.is_synced(mesh.push) && !is_gone(proxy));
        late.map(Proxy::name).collect()
    }

    async fn next_waiting(&self) -> (u64, Instant) {
        loop {
            let notified = self.wake.notified();
            if let Some(first) = self.inner().dequeue() {
                return first;
            }
            notified.await;
        }
    }

    /// Ready when secrets of some proxy are to be judged again; asks for its push then.
    async fn until_judged_again(&self) {
        loop {
            let next = self.inner().proxies.values().filter_map(|proxy| proxy.judged_until).min();
            let Some(next) = next else { return std::future::pending().await };
            let left = next.duration_since(SystemTime::now()).unwrap_or_default();
            // The machine may sleep, and its clock be set: a look now and then.
            tokio::time::sleep(left.min(LOOK_EVERY)).await;
            let mut inner = self.inner();
            let now = SystemTime::now();
            let due: Vec<u64> =
                inner.proxies.iter().filter(|(_, proxy)| proxy.is_due(now)).map(|(number, _)| *number).collect();
            for number in &due {
                inner.enqueue(*number);
            }
            if !due.is_empty() {
                return;
            }
        }
    }

    fn job(&self, number: u64) -> Option<Job> {
        let inner = self.inner();
        let proxy = inner.proxies.get(&number)?;
        let is_due = proxy.is_due(SystemTime::now());
        let work = match proxy.resources.borrow().clone() {
            Some(before) if before.generation >= proxy.affected_by && !is_due => {
                let newer = inner.clusters_of.iter().filter(|(_, push)| **push > before.generation);
                Work::ClustersOf { services: newer.map(|(key, _)| key.clone()).collect(), before }
            }
            before => Work::All { before },
        };
        Some(Job {
            view: Arc::clone(&proxy.view),
            work,
            findings: Arc::clone(&proxy.findings),
            judged_until: proxy.judged_until,
            may_have_secrets: proxy.id.is_some(),
        })
    }

    fn move_on(&self, number: u64, resources: ResourceSet) {
        if let Some(proxy) = self.inner().proxies.get(&number) {
            proxy.resources.send_replace(Some(Arc::new(resources)));
        }
    }

    fn publish(&self, number: u64, built: Built) {
        let mut inner = self.inner();
        if let Some(proxy) = inner.proxies.get_mut(&number) {
            proxy.was_workload |= built.is_workload;
            proxy.findings = Arc::new(built.findings);
            proxy.judged_until = built.judged_until;
            proxy.resources.send_replace(Some(Arc::new(built.resources)));
        }
    }
}

struct Built {
    resources: ResourceSet,
    findings: Findings,
    judged_until: Option<SystemTime>,
    /// Its pod is in the mesh.
    is_workload: bool,
}

struct Job {
    view: Arc<View>,
    work: Work,
    /// Of the push before.
    findings: Arc<Findings>,
    /// Of its secrets, as they were judged then.
    judged_until: Option<SystemTime>,
    may_have_secrets: bool,
}

/// What is to be compiled, and what the proxy has.
enum Work {
    All {
        before: Option<Arc<ResourceSet>>,
    },
    /// Only these clusters may differ; perhaps none.
    ClustersOf {
        services: BTreeSet<ServiceKey>,
        before: Arc<ResourceSet>,
    },
}

impl Work {
    /// What the proxy has, if all that happened since does not concern it.
    fn unaffected(&self) -> Option<&ResourceSet> {
        match self {
            Self::ClustersOf { services, before } if services.is_empty() => Some(before),
            Self::ClustersOf { .. } | Self::All { .. } => None,
        }
    }

    fn before(&self) -> Option<&Arc<ResourceSet>> {
        match self {
            Self::All { before } => before.as_ref(),
            Self::ClustersOf { before, .. } => Some(before),
        }
    }
}

impl Inner {
    fn enqueue(&mut self, number: u64) {
        if self.queued.insert(number) {
            self.waiting.push_back((number, Instant::now()));
        }
    }

    fn dequeue(&mut self) -> Option<(u64, Instant)> {
        let first = self.waiting.pop_front()?;
        self.queued.remove(&first.0);
        Some(first)
    }
}

impl Proxy {
    fn is_due(&self, now: SystemTime) -> bool {
        self.judged_until.is_some_and(|until| until < now)
    }

    fn name(&self) -> String {
        format!("{}.{}", self.view.name, self.view.namespace)
    }

    /// An Envoy asks for listeners only when its clusters are warm: before that it is not there yet.
    fn is_synced(&self, push: u64) -> bool {
        let asked = |type_url: &str| self.types.contains_key(type_url);
        asked(type_urls::CLUSTER)
            && asked(type_urls::LISTENER)
            && self.progress.settled
            && self.progress.refused.is_empty()
            && self.progress.generation >= push
    }

    fn status(&self) -> ProxyStatus {
        ProxyStatus {
            name: self.name(),
            node_id: self.node_id.clone(),
            kind: self.view.kind,
            cluster_id: self.view.cluster_id.clone(),
            istio_version: self.istio_version.clone(),
            id: self.id.clone(),
            protocol: self.protocol,
            connected: self.connected,
            progress: self.progress.clone(),
            types: self.types.clone(),
        }
    }
}

/// A stream's place in the fleet; leaving is dropping it.
#[derive(Debug)]
pub struct Member {
    fleet: Arc<Fleet>,
    number: u64,
}

impl Member {
    fn update(&self, change: impl FnOnce(&mut Proxy) -> bool) {
        let changed = self.fleet.inner().proxies.get_mut(&self.number).is_some_and(change);
        if changed {
            self.fleet.changed();
        }
    }
}

impl Observer for Member {
    fn sent(&mut self, outgoing: &Outgoing) {
        let short = type_urls::short(&outgoing.type_url).to_ascii_lowercase();
        self.fleet.metrics.count("pilot_xds_pushes", &[("type", &short)]);
        let bytes: usize = outgoing.resources.iter().map(|resource| resource.any.value.len()).sum();
        self.fleet.metrics.set("pilot_xds_config_size_bytes", &[("type", &outgoing.type_url)], f64_of(bytes));
        self.update(|proxy| {
            let state = proxy.types.entry(outgoing.type_url.clone()).or_default();
            state.sent.clone_from(&outgoing.nonce);
            state.sent_time = jiff::Timestamp::now().to_string();
            true
        });
    }

    fn answered(&mut self, answered: &Answered) {
        if let Some(reason) = &answered.refused {
            let name = match &*answered.type_url {
                type_urls::CLUSTER => "pilot_xds_cds_reject",
                type_urls::ENDPOINT => "pilot_xds_eds_reject",
                type_urls::LISTENER => "pilot_xds_lds_reject",
                type_urls::ROUTE => "pilot_xds_rds_reject",
                _ => "pilot_total_xds_internal_errors",
            };
            self.fleet.metrics.count(name, &[]);
            self.fleet.metrics.count("pilot_total_xds_rejects", &[]);
            tracing::warn!(type_url = %answered.type_url, %reason, "a proxy refused its configuration");
        }
        self.update(|proxy| {
            let state = proxy.types.entry(answered.type_url.clone()).or_default();
            if let Some(reason) = &answered.refused {
                state.last_error = reason.clone();
            } else {
                state.acked.clone_from(&answered.nonce);
                state.last_error = "".into();
            }
            true
        });
    }

    fn progressed(&mut self, progress: &Progress) {
        self.update(|proxy| {
            let changed = proxy.progress != *progress;
            proxy.progress = progress.clone();
            changed
        });
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut inner = self.fleet.inner();
        inner.proxies.remove(&self.number);
        self.fleet.metrics.set("pilot_xds", &[("version", env!("CARGO_PKG_VERSION"))], f64_of(inner.proxies.len()));
        drop(inner);
        self.fleet.changed();
    }
}

/// Compiles for whoever waits, one after the other, for ever. *Cancel safety*: may be dropped.
pub async fn run(fleet: Arc<Fleet>, meshes: watch::Receiver<Option<Arc<Mesh>>>, compiler: Arc<dyn Compiler>) {
    let pool = Arc::new(Mutex::new(Pool::default()));
    loop {
        let (number, since) = tokio::select! {
            // Either order is right: what is due is asked for, and waits like everybody.
            first = fleet.next_waiting() => first,
            () = fleet.until_judged_again() => continue,
        };
        // Without a mesh the proxy waits; the first snapshot asks for everybody again.
        let Some(mesh) = meshes.borrow().clone() else { continue };
        let Some(job) = fleet.job(number) else { continue };
        fleet.metrics.observe("pilot_proxy_queue_time", &[], since.elapsed().as_secs_f64());
        if let Some(same) = job.work.unaffected() {
            fleet.move_on(number, same.renewed(mesh.push, &mesh.label));
            continue;
        }
        let started = Instant::now();
        let (compiler, pool) = (Arc::clone(&compiler), Arc::clone(&pool));
        let compiled = tokio::task::spawn_blocking(move || {
            let compiled = match &job.work {
                Work::All { .. } => compiler.compile(&mesh.snapshot, &job.view),
                Work::ClustersOf { services, .. } => compiler.clusters_of(&mesh.snapshot, &job.view, services),
            };
            // Only this task takes it, one after the other.
            let mut pool = pool.lock().unwrap_or_else(PoisonError::into_inner);
            build(compiled, &mesh, &job, &mut pool)
        })
        .await;
        fleet.metrics.observe("pilot_xds_push_time", &[], started.elapsed().as_secs_f64());
        match compiled {
            Ok(built) => fleet.publish(number, built),
            Err(error) => {
                // A bug of ours must not take the others down: this proxy keeps what it has.
                tracing::error!(%error, proxy = number, "compiling failed; the proxy keeps what it has");
                fleet.metrics.count("pilot_total_xds_internal_errors", &[]);
            }
        }
    }
}

fn build(compiled: Compiled, mesh: &Mesh, job: &Job, pool: &mut Pool) -> Built {
    let now = SystemTime::now();
    let (mut set, mut findings, mut judged_until) = match &job.work {
        Work::All { .. } => (
            ResourceSet::new(mesh.push, &mesh.label),
            Findings { general: compiled.findings, of_resources: BTreeMap::new() },
            None,
        ),
        // Secrets are not among what changes.
        Work::ClustersOf { before, .. } => {
            (before.renewed(mesh.push, &mesh.label), Findings::clone(&job.findings), job.judged_until)
        }
    };
    for Told { name, any, finding } in compiled.resources {
        let is_secret = any.type_url == type_urls::SECRET;
        // Secrets go to nobody who did not prove who they are (property 29).
        if is_secret && !job.may_have_secrets {
            continue;
        }
        let before = job.work.before().and_then(|before| before.get(&any.type_url, &name));
        if is_secret {
            let namespace = &*job.view.namespace;
            let written = |object: &str| mesh.snapshot.secret(namespace, object).map(|secret| Arc::clone(&secret.spec));
            let judged = crate::secrets::check(&name, &any, namespace, written, now);
            judged_until = [judged_until, judged.until].into_iter().flatten().min();
            if let Some(bad) = judged.finding {
                // A bad key pair is not sent; the last good one stays.
                findings.set(&any.type_url, &name, Some(bad));
                if let Some(good) = before {
                    set.insert_shared(Arc::clone(good));
                }
                continue;
            }
        }
        findings.set(&any.type_url, &name, finding);
        let shared = pool.share(&name, any);
        // Equal content whose bytes differ (the order of a map) stays what the proxy has.
        let resource = before.filter(|old| old.version == shared.version).cloned().unwrap_or(shared);
        if set.get(&resource.any.type_url, &name).is_none_or(|had| !Arc::ptr_eq(had, &resource)) {
            set.insert_shared(resource);
        }
    }
    let is_workload = mesh.snapshot.workload(&job.view.namespace, &job.view.name).is_some();
    Built { resources: set, findings, judged_until, is_workload }
}
