//! The control side: one thread that turns resources into configurations and owns all that is not
//! a connection.
//!
//! ```text
//!  xDS event ─► lower (own thread) ─► received ─► warm ─► publish ─► sockets, workers ─► answer
//!  identity  ─► secrets
//!  signal, admin ─► drain ─► end
//! ```
//!
//! *Received* is the last good version of every resource; *published* is what workers run, as
//! [`engine::assembly`] chooses it (make before break). An update is answered when every worker runs
//! the generation it led to.

mod files;
pub(crate) mod lowering;
pub(crate) mod secret;
mod warming;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use engine::RuntimeConfig;
use engine::config::{Name, NodeFacts};
use engine::lower::Raw;
use identity::agent::Identities;
use identity::workload::WorkloadIdentity;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use types::wellknown::type_urls;
use xds::client::{Dialed, Event, Handle, Names, Rejected, Update};

use crate::dns::NameTable;
use crate::file_secrets::{FileSecrets, IdentityFiles, is_of_files};
use crate::options::{Options, Role, StaticResources, Termination};
use crate::proxy::{Proxy, RunError, State};
use lowering::{Lowered, Lowering};
use warming::Received;
use workers::Shared;
use workers::listeners::{Listeners, Workers};
use workers::worker::{self, DrainScope, WorkerHandle};

/// What others ask of the control side.
pub(crate) enum Request {
    /// A graceful end.
    Terminate,
    /// End at once.
    Quit,
    /// Drain without ending (`/drain_listeners`, `/drain`).
    Drain(DrainScope, Listening),
    /// `/healthcheck/fail` and `/healthcheck/ok`.
    Health(bool),
    /// What workers run, and what has been received.
    Inspect(oneshot::Sender<Inspection>),
}

/// What becomes of listening sockets when their connections drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listening {
    /// They go on.
    Stays,
    /// They close at once.
    Ends,
    /// They close when the drain time is over.
    EndsLater,
}

/// Where a resource comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Origin {
    /// The bootstrap. Nobody else replaces or removes what is of there.
    Bootstrap,
    /// A watched file.
    File,
    /// The control plane.
    Plane,
}

/// A look at the control side's state.
pub(crate) struct Inspection {
    pub(crate) config: Arc<RuntimeConfig>,
    pub(crate) raw: Arc<lowering::RawTables>,
    pub(crate) bound: Vec<(String, SocketAddr)>,
    /// Connections that are open.
    pub(crate) live: usize,
    pub(crate) versions: Vec<(&'static str, String)>,
}

/// The control side.
pub(crate) struct Control {
    shared: Arc<Shared>,
    role: Role,
    termination: Termination,
    workers: Vec<WorkerHandle>,
    dispatch: Workers,
    listeners: Listeners,
    lowering: Lowering,
    received: Received,
    published: Arc<RuntimeConfig>,
    generation: u64,
    state: watch::Sender<State>,
    bound: watch::Sender<Arc<Vec<(String, SocketAddr)>>>,
    names: Arc<arc_swap::ArcSwap<NameTable>>,
    xds: Option<Handle>,
    raw: lowering::RawTables,
    versions: std::collections::BTreeMap<&'static str, String>,
    /// Types that the control plane is asked for as a whole, and those of which a first update has been applied.
    subscriptions: Vec<&'static str>,
    first: BTreeSet<&'static str>,
    /// Names of the bootstrap's own resources, by type.
    fixed: BTreeSet<(&'static str, Name)>,
    /// The workload has a certificate of its own.
    has_identity: bool,
    started: Instant,
    resolved: mpsc::UnboundedSender<warming::Resolved>,
    resolvers: warming::Resolvers,
    files: files::Files,
    file_secrets: FileSecrets,
    secret_files: secret::OfFiles,
    /// Names of the secrets that the control plane gave.
    plane_secrets: BTreeSet<Name>,
    identity_files: Option<IdentityFiles>,
    /// When listeners of drained connections close.
    stop_at: Option<(Instant, DrainScope)>,
    trim: Option<fn()>,
    /// When what the last configuration took on its way in can be given back.
    trim_at: Option<Instant>,
}

/// Resources in an order in which nothing refers to what is not there yet, with what their type is called.
fn by_type(resources: StaticResources) -> [(&'static str, &'static str, Vec<Raw>); 5] {
    let StaticResources { listeners, clusters, endpoints, routes, secrets } = resources;
    [
        (type_urls::SECRET, "secret", secrets),
        (type_urls::CLUSTER, "cluster", clusters),
        (type_urls::ENDPOINT, "endpoints", endpoints),
        (type_urls::ROUTE, "route table", routes),
        (type_urls::LISTENER, "listener", listeners),
    ]
}

/// Lowers resources of a bootstrap, for nobody's use.
pub(crate) fn check(resources: &StaticResources) -> Result<(), RunError> {
    for (url, kind, raws) in by_type(resources.clone()) {
        let first = match url {
            type_urls::SECRET => {
                let nowhere = workers::secrets::Secrets::default();
                let bad =
                    secret::apply(&nowhere, &mut secret::OfFiles::default(), &raws, &[], |_| false).into_iter().next();
                bad.map(|bad| (bad.name, bad.reason))
            }
            _ => {
                let rejected = lowering::lower_one(url, engine::assembly::Tables::default(), &raws, &[]).rejected;
                rejected.into_iter().next().map(|bad| (bad.name.to_string(), bad.reason))
            }
        };
        if let Some((name, reason)) = first {
            return Err(RunError::Bootstrap { kind, name, reason });
        }
    }
    Ok(())
}

/// Events for the loop.
enum Input {
    Xds(Event),
    Identity(Arc<WorkloadIdentity>),
    Asked(Request),
    Resolved(warming::Resolved),
    Signal,
    Tick,
}

/// Warming and ejection sweeps look again so often.
const TICK: Duration = Duration::from_millis(500);
/// Configuration that has not changed for so long is taken to stay for now.
const SETTLED: Duration = Duration::from_secs(5);

impl Control {
    /// Starts everything.
    pub(crate) async fn start(options: Options, shared: Arc<Shared>) -> Result<Proxy, RunError> {
        let concurrency = match options.concurrency {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let workers = (0..concurrency)
            .map(|index| worker::start(index, Arc::clone(&shared)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| RunError::Start("a worker", error))?;
        let dispatch = Workers::new(&workers);
        let (requests, asked) = mpsc::unbounded_channel();
        let (state, watching) = watch::channel(State::default());
        let (bound, addresses) = watch::channel(Arc::default());
        let (resolved, resolutions) = mpsc::unbounded_channel();
        let node = node_facts(&options);
        let published = RuntimeConfig { node: Arc::new(node), ..RuntimeConfig::default() };
        let names = Arc::new(arc_swap::ArcSwap::from_pointee(NameTable::default()));
        let mut control = Self {
            role: options.role,
            termination: options.termination,
            listeners: Listeners::new(dispatch.clone(), options.inherited),
            dispatch,
            workers,
            lowering: Lowering::start().map_err(|error| RunError::Start("the lowering thread", error))?,
            received: Received::default(),
            published: Arc::new(published),
            generation: 0,
            state,
            bound,
            names: Arc::clone(&names),
            xds: None,
            raw: lowering::RawTables::default(),
            versions: std::collections::BTreeMap::new(),
            subscriptions: if options.xds.is_some() { options.subscriptions } else { Vec::new() },
            first: BTreeSet::new(),
            fixed: BTreeSet::new(),
            has_identity: options.ca.is_some() || options.identity_files.is_some(),
            started: Instant::now(),
            resolved,
            resolvers: warming::Resolvers::default(),
            files: files::Files::new(options.files),
            file_secrets: FileSecrets::default(),
            secret_files: secret::OfFiles::default(),
            plane_secrets: BTreeSet::new(),
            identity_files: options.identity_files.map(IdentityFiles::new),
            stop_at: None,
            trim: options.trim,
            trim_at: Some(Instant::now() + SETTLED),
            shared: Arc::clone(&shared),
        };
        // Here a bad one is the end.
        if let Some(Err(reason)) = control.look_at_identity() {
            return Err(RunError::Identity(reason));
        }
        let services = crate::admin::start(
            &options.addresses,
            &crate::admin::Context {
                shared: Arc::clone(&shared),
                requests: requests.clone(),
                state: watching.clone(),
                names,
                node: options.node.clone(),
                concurrency,
                started: Instant::now(),
                app_metrics: options.app_metrics.clone(),
                dns_upstream: options.dns_upstream.clone(),
                log_levels: options.log_levels.clone(),
                stats_tags: telemetry::text::labels(
                    options.stats_tags.iter().map(|(name, value)| (name.as_str(), value.as_str())),
                ),
            },
        )
        .await?;
        control.load(options.resources).await?;
        control.look_at_files().await;
        let mut identities = None;
        let mut agent = None;
        if let Some(ca) = options.ca {
            let (made, receiver) = identity::agent::Agent::new(options.renewal.asking(ca));
            agent = Some(tokio::spawn(made.run()));
            identities = Some(receiver);
        }
        let mut events = None;
        let mut driver = None;
        if let Some(plane) = options.xds {
            let (handle, receiver, run) =
                connect(plane, options.node, options.state_of_the_world, &control.subscriptions, identities.clone());
            control.xds = Some(handle);
            control.subscribe();
            driver = Some(tokio::spawn(run.run()));
            events = Some(receiver);
        }
        control.check_configured();
        let exporter = Some(tokio::spawn(workers::tracing_spans::export(Arc::clone(&shared))));
        let take_signals = options.take_signals;
        let task = tokio::spawn(async move {
            control.run(events, identities, asked, resolutions, take_signals).await;
            // the agent and the stream end with the proxy
            for task in [agent, driver, exporter].into_iter().flatten() {
                task.abort();
            }
        });
        Ok(Proxy::new(requests, watching, addresses, task, services))
    }

    /// Takes the resources of a bootstrap; here a refused one is the end.
    async fn load(&mut self, resources: StaticResources) -> Result<(), RunError> {
        let mut any = false;
        for (url, kind, raws) in by_type(resources) {
            if raws.is_empty() {
                continue;
            }
            any = true;
            let names: Vec<Name> = raws.iter().map(|raw| Name::clone(&raw.name)).collect();
            let rejected = self.apply(url, raws, Vec::new(), Origin::Bootstrap).await;
            self.raw.mark_static(url, &names);
            self.fixed.extend(names.into_iter().map(|name| (url, name)));
            if let Some(bad) = rejected.into_iter().next() {
                return Err(RunError::Bootstrap { kind, name: bad.name, reason: bad.reason });
            }
        }
        if any {
            let failed = self.publish().await;
            if let Some(bad) = failed.into_iter().next() {
                return Err(RunError::Bootstrap { kind: "listener", name: bad.name, reason: bad.reason });
            }
        }
        Ok(())
    }

    async fn run(
        mut self,
        mut events: Option<mpsc::Receiver<Event>>,
        mut identities: Option<Identities>,
        mut asked: mpsc::UnboundedReceiver<Request>,
        mut resolutions: mpsc::UnboundedReceiver<warming::Resolved>,
        take_signals: bool,
    ) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut signals = if take_signals { Signals::new() } else { Signals::default() };
        let mut ending: Option<Ending> = None;
        loop {
            // requests and signals before configuration: an end must not wait behind a flood of updates
            let input = tokio::select! {
                biased;
                () = signals.any() => Input::Signal,
                Some(request) = asked.recv() => Input::Asked(request),
                identity = next_identity(&mut identities) => Input::Identity(identity),
                event = next_event(&mut events) => Input::Xds(event),
                Some(resolved) = resolutions.recv() => Input::Resolved(resolved),
                _ = tick.tick() => Input::Tick,
            };
            match input {
                Input::Xds(Event::Update(update)) => self.update(update).await,
                Input::Xds(Event::Connected) => tracing::info!("connected to the control plane"),
                Input::Xds(Event::Disconnected { reason, attempt, retry_in }) => {
                    tracing::info!(reason, attempt, ?retry_in, "no control plane; the configuration at hand stays");
                }
                Input::Identity(identity) => {
                    self.shared.secrets.set_identity(&identity);
                    self.publish_logged().await;
                }
                Input::Resolved(resolved) => {
                    if self.received.take_resolved(resolved) {
                        self.publish_logged().await;
                    }
                }
                Input::Asked(Request::Quit) => break,
                Input::Asked(Request::Terminate) | Input::Signal if ending.is_some() => break,
                Input::Asked(Request::Terminate) | Input::Signal => {
                    ending = Some(self.begin_end());
                }
                Input::Asked(Request::Drain(scope, listening)) => {
                    self.drain(scope);
                    match listening {
                        Listening::Stays => {}
                        Listening::Ends => self.stop_listening(scope),
                        Listening::EndsLater => self.stop_at = Some((Instant::now() + self.shared.drain_time, scope)),
                    }
                }
                Input::Asked(Request::Health(ok)) => {
                    self.state.send_modify(|state| state.failed = !ok);
                    self.shared.is_leaving.store(!ok, Ordering::Relaxed);
                }
                Input::Asked(Request::Inspect(answer)) => {
                    // who asked may be gone
                    drop(answer.send(self.inspect()));
                }
                Input::Tick => self.tick().await,
            }
            if let Some(ending) = &mut ending
                && ending.is_over(Instant::now(), self.dispatch.live(), self.dispatch.accepted())
            {
                break;
            }
        }
        self.end();
    }

    /// Applies what changed in watched files.
    async fn look_at_files(&mut self) {
        let changes = self.files.look();
        if changes.is_empty() {
            return;
        }
        for (url, raws, removed) in changes {
            for bad in self.apply(url, raws, removed, Origin::File).await {
                tracing::warn!(
                    kind = type_urls::short(url),
                    name = bad.name,
                    reason = bad.reason,
                    "resource of a file refused; its last good version stays"
                );
            }
        }
        self.subscribe();
        self.publish_logged().await;
    }

    /// Follows the files that received or published resources name as secrets, and forgets the others.
    fn follow_secrets(&mut self) {
        let gone = self.file_secrets.follow(self.received.file_secrets(&self.published));
        if !gone.is_empty() {
            self.shared.secrets.change(|store| store.retain(|name, _| !gone.contains(name)));
        }
    }

    /// Forgets the control plane's secrets that neither received nor published resources name. It does not tell of their
    /// end, since it is not asked for them any more; it gives them again when they are named again.
    fn forget_secrets(&mut self) {
        if self.plane_secrets.is_empty() {
            return;
        }
        let named = self.received.secrets(&self.published);
        let gone: BTreeSet<Name> = self.plane_secrets.difference(&named).cloned().collect();
        if gone.is_empty() {
            return;
        }
        self.plane_secrets.retain(|name| !gone.contains(name));
        self.secret_files.forget(&gone);
        self.shared.secrets.change(|store| store.retain(|name, _| !gone.contains(name)));
    }

    fn look_at_secrets(&mut self) {
        let mut changed = self.file_secrets.look();
        changed.extend(self.secret_files.look());
        if !changed.is_empty() {
            self.shared.secrets.change(|store| store.extend(changed));
        }
    }

    /// Takes the workload's certificate from its files, if they have another one.
    fn look_at_identity(&mut self) -> Option<Result<(), String>> {
        let read = self.identity_files.as_mut()?.look()?;
        Some(read.map(|identity| self.shared.secrets.set_identity(&Arc::new(identity))))
    }

    /// Gives memory back that configuration took on its way in, once none has come for a while.
    fn give_back(&mut self) {
        let rests = proto::json::rest();
        let settled = self.trim_at.take_if(|at| *at <= Instant::now()).is_some();
        if (rests || settled)
            && let Some(trim) = self.trim
        {
            trim();
        }
    }

    async fn tick(&mut self) {
        self.give_back();
        if !self.files.is_empty() {
            self.look_at_files().await;
        }
        if !self.file_secrets.is_empty() || !self.secret_files.is_empty() {
            self.look_at_secrets();
        }
        if let Some(Err(reason)) = self.look_at_identity() {
            tracing::warn!(reason, "the workload's certificate in files cannot be used; what was there before stays");
        }
        if self.received.is_warming() {
            self.publish_logged().await;
        }
        if let Some((at, scope)) = self.stop_at
            && Instant::now() >= at
        {
            self.stop_listening(scope);
        }
        self.shared.hosts.sweep(&self.published, Instant::now().into_std());
    }

    /// Applies an update and answers it.
    async fn update(&mut self, update: Update) {
        let url = update.type_url().to_owned();
        let Some(known) = known_type(&url) else {
            if let Some(handle) = &self.xds {
                handle.answer(&update.id, &[]);
            }
            return;
        };
        tracing::debug!(
            kind = type_urls::short(&url),
            added = update.added.len(),
            removed = update.removed.len(),
            "update"
        );
        self.versions.insert(known, update.version.clone());
        let raws = update.added.into_iter().map(|(name, _, body)| Raw { name: name.into(), body }).collect();
        let removed = update.removed.into_iter().map(Name::from).collect();
        let mut rejected = self.apply(known, raws, removed, Origin::Plane).await;
        self.first.insert(known);
        // before anybody waits for it
        self.subscribe();
        let failed = self.publish().await;
        if known == type_urls::LISTENER {
            rejected.extend(failed);
        }
        for bad in &rejected {
            tracing::warn!(
                kind = type_urls::short(known),
                name = bad.name,
                reason = bad.reason,
                "resource refused; its last good version stays"
            );
        }
        if let Some(handle) = &self.xds {
            handle.answer(&update.id, &rejected);
        }
        self.check_configured();
    }

    /// Asks the control plane for what the received resources refer to, and nobody else gives.
    fn subscribe(&mut self) {
        let Some(handle) = &self.xds else { return };
        let wanted = self.received.tables.wanted();
        for (url, names) in self.received.forget(&wanted) {
            self.raw.forget(url, &names);
        }
        let of_plane = |url: &'static str, names: BTreeSet<Name>| {
            let names = names
                .into_iter()
                .filter(|name| !self.fixed.contains(&(url, Name::clone(name))) && !self.files.names(url, name));
            names.map(|name| name.to_string()).collect::<BTreeSet<String>>()
        };
        let mut secrets = of_plane(type_urls::SECRET, wanted.secrets);
        secrets.retain(|name| !(is_of_files(name) || self.has_identity && secret::is_own(name)));
        handle.subscribe(type_urls::ENDPOINT, Names::Only(of_plane(type_urls::ENDPOINT, wanted.endpoints)));
        handle.subscribe(type_urls::ROUTE, Names::Only(of_plane(type_urls::ROUTE, wanted.routes)));
        handle.subscribe(type_urls::SECRET, Names::Only(secrets));
    }

    /// Lowers resources of one type into the received tables.
    async fn apply(
        &mut self,
        url: &'static str,
        mut raws: Vec<Raw>,
        mut removed: Vec<Name>,
        origin: Origin,
    ) -> Vec<Rejected> {
        if origin != Origin::Bootstrap {
            // As in Envoy, what is in the bootstrap stays as it is, without a word to who sends it.
            let is_fixed = |name: &Name| self.fixed.contains(&(url, Name::clone(name)));
            raws.retain(|raw| !is_fixed(&raw.name));
            removed.retain(|name| !is_fixed(name));
        }
        let rejected = match url {
            type_urls::SECRET => {
                let is_own = |name: &str| self.has_identity && secret::is_own(name);
                // Envoy does not follow the files of its bootstrap's own secrets.
                let mut fixed = secret::OfFiles::default();
                let of_files = if origin == Origin::Bootstrap { &mut fixed } else { &mut self.secret_files };
                let rejected = secret::apply(&self.shared.secrets, of_files, &raws, &removed, is_own);
                for raw in raws.iter().filter(|raw| !rejected.iter().any(|bad| *bad.name == *raw.name)) {
                    if origin == Origin::Plane {
                        self.plane_secrets.insert(Name::clone(&raw.name));
                    } else {
                        self.plane_secrets.remove(&raw.name);
                    }
                }
                for name in &removed {
                    self.plane_secrets.remove(name);
                }
                rejected
            }
            type_urls::NAME_TABLE => {
                match raws.first().map(|raw| NameTable::parse(&raw.body)) {
                    Some(Ok(table)) => self.names.store(Arc::new(table)),
                    Some(Err(reason)) => return vec![Rejected { name: raws[0].name.to_string(), reason }],
                    None => {}
                }
                Vec::new()
            }
            _ => {
                let lowered =
                    self.lowering.lower(url, self.received.tables.clone(), raws.clone(), removed.clone()).await;
                let Lowered { tables, rejected } = lowered;
                self.received.take(tables, url, &raws, &removed, origin);
                rejected.into_iter().map(|bad| Rejected { name: bad.name.to_string(), reason: bad.reason }).collect()
            }
        };
        self.raw.note(url, raws, &removed, &rejected);
        rejected
    }

    async fn publish_logged(&mut self) {
        for bad in self.publish().await {
            tracing::warn!(name = bad.name, reason = bad.reason, "a listener cannot listen");
        }
        self.check_configured();
    }

    /// Publishes what is warm, if anything changed, and waits until every worker runs it.
    async fn publish(&mut self) -> Vec<Rejected> {
        let waited = self.started.elapsed();
        self.resolvers.sync(&self.received, &self.resolved);
        if self.received.is_due() {
            // Handshakes find what the next configuration names, and until every worker has left it what the old one does.
            self.follow_secrets();
            self.look_at_secrets();
        }
        let warm = self.received.warm(&self.published, &self.shared.secrets.load(), waited);
        let Some(mut next) = warm else {
            // what came may be what serves, and what was named may have gone before it served
            self.raw.published(|url, name| self.received.waits(&self.published, url, name));
            self.forget_secrets();
            return Vec::new();
        };
        self.generation += 1;
        next.generation = self.generation;
        let next = Arc::new(next);
        let failed = self.listeners.sync(&next);
        self.bound.send_replace(Arc::new(self.listeners.addresses()));
        let mut running = Vec::with_capacity(self.workers.len());
        for worker in &self.workers {
            running.push(worker.configure(Arc::clone(&next)));
        }
        for waiting in running {
            if waiting.await.is_err() {
                tracing::error!("a worker has ended");
            }
        }
        // the old tables are dropped here, not on a worker
        self.published = next;
        self.trim_at = Some(Instant::now() + SETTLED);
        if !self.file_secrets.is_empty() {
            self.follow_secrets();
        }
        self.forget_secrets();
        self.raw.published(|url, name| self.received.waits(&self.published, url, name));
        self.shared.published.store(Arc::clone(&self.published));
        self.shared.hosts.reconcile(&self.published);
        let generation = self.generation;
        self.state.send_modify(|state| state.generation = generation);
        failed
            .into_iter()
            .map(|(name, address, error)| Rejected {
                name: name.to_string(),
                reason: format!("cannot listen on {address}: {error}"),
            })
            .collect()
    }

    fn check_configured(&self) {
        let has_come = |url: &&'static str| *url == type_urls::NAME_TABLE || self.first.contains(url);
        if self.subscriptions.iter().all(has_come) && !self.received.is_warming() {
            self.configured();
        }
    }

    fn configured(&self) {
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.configured, true));
    }

    fn inspect(&self) -> Inspection {
        Inspection {
            config: Arc::clone(&self.published),
            raw: Arc::new(self.raw.clone()),
            bound: self.listeners.addresses(),
            live: self.dispatch.live(),
            versions: self.versions.iter().map(|(url, version)| (*url, version.clone())).collect(),
        }
    }

    /// Lets connections leave. As in Envoy, that alone leaves the proxy ready.
    fn drain(&self, scope: DrainScope) {
        for worker in &self.workers {
            worker.drain(scope);
        }
    }

    fn stop_listening(&mut self, scope: DrainScope) {
        self.stop_at = None;
        self.listeners.stop(scope, &self.published);
        self.bound.send_replace(Arc::new(self.listeners.addresses()));
    }

    fn begin_end(&mut self) -> Ending {
        let scope = if self.role == Role::Sidecar { DrainScope::Inbound } else { DrainScope::All };
        self.state.send_modify(|state| state.draining = true);
        self.drain(scope);
        let now = Instant::now();
        tracing::info!(?scope, connections = self.dispatch.live(), "draining before the end");
        match self.termination {
            Termination { exit_on_zero: true, minimum, .. } => {
                Ending { not_before: now + minimum, until: None, busy: (now, 0) }
            }
            Termination { drain, .. } => Ending { not_before: now + QUIET, until: Some(now + drain), busy: (now, 0) },
        }
    }

    fn end(mut self) {
        self.listeners.close(|_| true);
        for worker in &self.workers {
            worker.stop();
        }
        for worker in self.workers {
            if worker.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
    }
}

/// A draining proxy without a connection for so long is not asked for any more: a client that has
/// not heard of its end would have come back by now.
const QUIET: Duration = Duration::from_secs(1);

/// When a draining proxy ends.
struct Ending {
    not_before: Instant,
    /// Whatever is left then is cut; `None`: the end waits for the last connection.
    until: Option<Instant>,
    /// When a connection was seen last, and how many had been accepted then.
    busy: (Instant, usize),
}

impl Ending {
    fn is_over(&mut self, now: Instant, live: usize, accepted: usize) -> bool {
        if live > 0 || accepted != self.busy.1 {
            self.busy = (now, accepted);
        }
        self.until.is_some_and(|until| now >= until) || now >= self.not_before.max(self.busy.0 + QUIET)
    }
}

async fn next_event(events: &mut Option<mpsc::Receiver<Event>>) -> Event {
    if let Some(receiver) = events {
        if let Some(event) = receiver.recv().await {
            return event;
        }
        *events = None;
    }
    std::future::pending().await
}

async fn next_identity(identities: &mut Option<Identities>) -> Arc<WorkloadIdentity> {
    if let Some(receiver) = identities {
        while receiver.changed().await.is_ok() {
            if let Some(identity) = receiver.borrow_and_update().clone() {
                return identity;
            }
        }
        *identities = None;
    }
    std::future::pending().await
}

/// SIGTERM and SIGINT.
#[derive(Default)]
pub(crate) struct Signals {
    term: Option<tokio::signal::unix::Signal>,
    int: Option<tokio::signal::unix::Signal>,
}

impl Signals {
    pub(crate) fn new() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = |kind| match signal(kind) {
            Ok(signal) => Some(signal),
            Err(error) => {
                tracing::warn!(%error, "signals are not heard");
                None
            }
        };
        Self { term: listen(SignalKind::terminate()), int: listen(SignalKind::interrupt()) }
    }

    pub(crate) async fn any(&mut self) {
        async fn one(signal: &mut Option<tokio::signal::unix::Signal>) {
            match signal {
                Some(signal) => {
                    if signal.recv().await.is_none() {
                        std::future::pending::<()>().await;
                    }
                }
                None => std::future::pending().await,
            }
        }
        // both mean the same
        tokio::select! {
            () = one(&mut self.term) => {}
            () = one(&mut self.int) => {}
        }
    }
}

/// The type, if we know what to do with it.
fn known_type(url: &str) -> Option<&'static str> {
    type_urls::PUSH_ORDER.into_iter().find(|known| *known == url && *known != type_urls::EXTENSION_CONFIG)
}

fn node_facts(options: &Options) -> NodeFacts {
    use base64::Engine as _;
    use prost::Message as _;
    let metadata = options.node.metadata.clone().unwrap_or_default();
    NodeFacts {
        id: options.node.id.clone().into(),
        peer_metadata: base64::engine::general_purpose::STANDARD.encode(peer_metadata(metadata).encode_to_vec()).into(),
    }
}

/// What peers are told about us.
fn peer_metadata(mut metadata: envoy_types::pb::google::protobuf::Struct) -> envoy_types::pb::google::protobuf::Struct {
    const TOLD: [&str; 8] =
        ["NAME", "NAMESPACE", "OWNER", "WORKLOAD_NAME", "MESH_ID", "CLUSTER_ID", "LABELS", "INSTANCE_IPS"];
    metadata.fields.retain(|name, _| TOLD.contains(&name.as_str()));
    metadata
}

/// The stream to the control plane.
fn connect(
    plane: identity::channel::ControlPlane,
    node: envoy_types::pb::envoy::config::core::v3::Node,
    state_of_the_world: bool,
    types: &[&'static str],
    identities: Option<Identities>,
) -> (Handle, mpsc::Receiver<Event>, xds::client::Driver) {
    let options = xds::client::Options {
        node,
        protocol: if state_of_the_world {
            xds::client::Protocol::StateOfTheWorld
        } else {
            xds::client::Protocol::Delta
        },
        subscriptions: types.iter().map(|url| ((*url).to_owned(), Names::All)).collect(),
        ..xds::client::Options::default()
    };
    xds::client::new(options, dialer(plane, identities))
}

/// Makes connections to the control plane; waits for the first certificate where there is a CA.
pub(crate) fn dialer(
    plane: identity::channel::ControlPlane,
    identities: Option<Identities>,
) -> impl Fn() -> xds::client::Dialing + Send + Sync + 'static {
    move || -> xds::client::Dialing {
        let (plane, identities) = (plane.clone(), identities.clone());
        Box::pin(async move {
            let mut current = None;
            if let Some(mut identities) = identities {
                let waited = identities.wait_for(Option::is_some).await?;
                current.clone_from(&*waited);
            }
            let channel = plane.connect(current.as_deref()).await?;
            Ok(Dialed { channel, metadata: plane.metadata()? })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `EXIT_ON_ZERO_ACTIVE_CONNECTIONS`: the end waits for the last connection, but not less than its minimum.
    #[test]
    fn the_end_may_wait_for_the_last_connection() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut ending = Ending { not_before: at(5), until: None, busy: (start, 0) };
        assert!(!ending.is_over(at(4), 0, 0), "nobody is there, but somebody may come");
        assert!(ending.is_over(at(5), 0, 0));
        assert!(!ending.is_over(at(6), 1, 1) && !ending.is_over(at(600), 1, 1), "somebody is");
        assert!(!ending.is_over(at(600), 0, 2), "somebody came and went");
        assert!(ending.is_over(at(601), 0, 2));
        let mut bounded = Ending { not_before: at(1), until: Some(at(5)), busy: (start, 0) };
        assert!(!bounded.is_over(at(4), 1, 1));
        assert!(bounded.is_over(at(5), 1, 1), "without the setting, whatever is left is cut");
    }
}
