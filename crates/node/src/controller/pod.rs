//! One pod, from sandbox to end: what a kubelet does for it.
//!
//! ```text
//! waiting for what it needs ─▶ sandbox ─▶ init containers ─▶ containers ⟲ probes, restarts
//!                                                               │ deleted
//!                              gone ◀─ kill ◀─ grace ◀─ TERM ◀─ proxy drains ◀─ left the endpoints
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use api::k8s::{self, Container, LifecycleHandler, Probe};
use api::{ConfigSet, Kind, Object};
use types::wellknown::annotations;
use types::{Finding, NamespacedName, Severity};

use super::{NODE_NAME, Shared};
use crate::env::{PodFacts, environment, program};
use crate::inject::PROXY;
use crate::probe::{self, Failure, Target};
use crate::runtime::{PodRuntime, RuntimeError};
use crate::spec::{
    ContainerRequest, DnsPolicy, PodId, PodNetwork, PodRequest, Rights, SELF_EXE, Signal, Volume, VolumeFile,
    VolumeSource,
};
use crate::store::now;
use crate::volume::{Contents, UnfilledVolume, each_volume, has_token, mounts, token_renewal, volumes};

/// [`crate::SWITCH_IP`] as text.
const HOST_IP: &str = "10.77.0.1";
/// A container that ran this long starts with a clean slate.
const BACKOFF_RESET: Duration = Duration::from_mins(10);
const BACKOFF_FIRST: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_mins(5);
/// A young container's readiness is looked at this often, so that a mesh starts fast.
const EAGER: Duration = Duration::from_millis(100);
const EAGER_FOR: Duration = Duration::from_secs(10);
/// A failed sandbox is tried again after this long.
const SANDBOX_RETRY: Duration = Duration::from_secs(2);
/// A `postStart` that takes longer has failed; Kubernetes sets no limit, but shows nothing either.
const POST_START_MAX: Duration = Duration::from_mins(2);
/// How long the end of a pod waits for proxies that have not heard of it.
const SETTLED_MAX: Duration = Duration::from_secs(3);
/// The proxy drains 5 s (`terminationDrainDuration`) and needs a moment more.
const PROXY_DRAIN: Duration = Duration::from_secs(7);
/// Tokens that could not be renewed are tried again after this long.
const RENEWAL_RETRY: Duration = Duration::from_secs(10);
/// What a pod has that names no grace period.
const GRACE: Duration = Duration::from_secs(30);
/// A longer grace period is as good as none that ends.
const GRACE_MAX: Duration = Duration::from_hours(24 * 365);
/// What a container has between TERM and KILL where all of its grace period is over before.
const GRACE_AFTER_HOOK: Duration = Duration::from_secs(2);

/// Runs the pod until it is gone; returns its name.
pub(super) async fn run(
    shared: Arc<Shared>,
    key: NamespacedName,
    uid: Box<str>,
    exits: mpsc::UnboundedReceiver<(String, i32)>,
) -> NamespacedName {
    let mut worker = Worker {
        shared,
        key: key.clone(),
        uid,
        exits,
        id: None,
        ip: String::new(),
        slots: Vec::new(),
        started: now(),
        ready_since: (false, now()),
        volumes: BTreeMap::new(),
        message: None,
    };
    let work = async {
        worker.live().await;
        worker.end().await;
    };
    // Whatever goes wrong in here concerns this pod only, and its name must become free again.
    if AssertUnwindSafe(work).catch_unwind().await.is_err() {
        tracing::error!(pod = %key, "the pod's worker failed; the pod is made anew");
        worker.abandon().await;
    }
    key
}

struct Worker {
    shared: Arc<Shared>,
    key: NamespacedName,
    uid: Box<str>,
    exits: mpsc::UnboundedReceiver<(String, i32)>,
    id: Option<PodId>,
    ip: String,
    slots: Vec<Slot>,
    started: String,
    ready_since: (bool, String),
    /// What volumes hold, to see changes.
    volumes: BTreeMap<String, Vec<VolumeFile>>,
    /// Why the pod cannot be made.
    message: Option<(String, String)>,
}

/// What a container is to its pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    /// Runs to its end before those listed after it start.
    Init,
    /// An init container with `restartPolicy: Always`: those listed after it wait until it has started. It runs
    /// as long as the main ones do.
    Sidecar,
    Main,
}

/// One container.
struct Slot {
    container: Container,
    role: Role,
    state: State,
    restarts: u32,
    backoff: Duration,
    last: Option<Ended>,
    is_ready: bool,
    /// The startup probe succeeded, or there is none.
    is_started: bool,
    /// It has been started once, whatever became of it.
    was_started: bool,
    hook: Hook,
    probes: [Check; 3],
    /// Asked to end: killed at this time.
    kill_at: Option<Instant>,
}

#[derive(Clone)]
enum State {
    /// Not running; starts at this time, if it may.
    Waiting {
        reason: String,
        message: String,
        until: Option<Instant>,
    },
    Running {
        since: Instant,
        at: String,
    },
    Ended(Ended),
}

#[derive(Clone)]
struct Ended {
    code: i32,
    started: String,
    finished: String,
}

/// Progress of `lifecycle.postStart`. The containers listed after this one wait for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hook {
    Due,
    Running,
    /// Or there is none.
    Done,
}

/// Progress of one probe.
#[derive(Clone)]
struct Check {
    next: Option<Instant>,
    is_asking: bool,
    successes: u32,
    failures: u32,
    /// When a failure was counted last.
    counted: Option<Instant>,
}

const STARTUP: usize = 0;
const READINESS: usize = 1;
const LIVENESS: usize = 2;
/// Not a probe, but answered like one.
const POST_START: usize = 3;
/// See [`POST_START`].
const PRE_STOP: usize = 4;
/// How Istio's injected proxy says, as its `postStart`, that the application is to wait for it.
const WAIT_FOR_PROXY: [&str; 2] = ["pilot-agent", "wait"];

/// The answer to a probe, or the end of a hook.
struct Answer {
    slot: usize,
    /// How often the container had started again when it was asked: the next one has nothing to do with it.
    restarts: u32,
    which: usize,
    outcome: Result<(), Failure>,
}

type Answers = JoinSet<Answer>;

impl Slot {
    fn new(container: &Container, role: Role) -> Self {
        let idle = Check { next: None, is_asking: false, successes: 0, failures: 0, counted: None };
        Self {
            container: container.clone(),
            role,
            state: State::Waiting {
                reason: "ContainerCreating".into(),
                message: String::new(),
                until: Some(Instant::now()),
            },
            restarts: 0,
            backoff: Duration::ZERO,
            last: None,
            is_ready: false,
            is_started: false,
            was_started: false,
            hook: Hook::Done,
            probes: [idle.clone(), idle.clone(), idle],
            kill_at: None,
        }
    }

    fn probe(&self, which: usize) -> Option<&Probe> {
        let probes = [&self.container.startup_probe, &self.container.readiness_probe, &self.container.liveness_probe];
        probes.get(which).and_then(|probe| probe.as_ref())
    }

    fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// Whether those listed after it need not wait for it any more.
    fn is_through(&self) -> bool {
        match self.role {
            Role::Init => matches!(&self.state, State::Ended(ended) if ended.code == 0),
            Role::Sidecar => self.was_started,
            Role::Main => true,
        }
    }

    fn post_start(&self) -> Option<&LifecycleHandler> {
        self.container.lifecycle.as_ref()?.post_start.as_ref()
    }

    /// Whether `postStart` asks for nothing but that the container has started.
    fn waits_until_started(&self) -> bool {
        self.post_start().and_then(|hook| hook.exec.as_ref()).is_some_and(|exec| exec.command == WAIT_FOR_PROXY)
    }

    /// Whether containers listed after this one have to wait.
    fn holds_others(&self) -> bool {
        let is_through = self.is_running() && self.hook == Hook::Done;
        self.post_start().is_some() && !is_through && !matches!(self.state, State::Ended(_))
    }

    /// Readiness and the first looks of the probes of a container that has just started.
    fn begin(&mut self, now_at: Instant) {
        self.state = State::Running { since: now_at, at: now() };
        self.is_started = self.container.startup_probe.is_none();
        self.was_started |= self.is_started;
        self.is_ready = self.is_started && self.container.readiness_probe.is_none();
        self.kill_at = None;
        self.hook = if self.post_start().is_none() { Hook::Done } else { Hook::Due };
        for which in [STARTUP, READINESS, LIVENESS] {
            let delay = self.probe(which).map(|probe| Duration::from_secs(u64::from(probe.initial_delay_seconds)));
            let mut first = delay.map(|delay| now_at + delay);
            if which == LIVENESS && delay == Some(Duration::ZERO) {
                first = self.probe(which).map(|probe| now_at + period(probe));
            }
            self.probes[which] = Check { next: first, is_asking: false, successes: 0, failures: 0, counted: None };
        }
    }

    /// Takes the end of the container's process; `again`: whether it is to run again.
    fn ended(&mut self, code: i32, again: bool) {
        let (started, ran) = match &self.state {
            State::Running { since, at } => (at.clone(), since.elapsed()),
            _ => (now(), Duration::ZERO),
        };
        let ended = Ended { code, started, finished: now() };
        self.is_ready = false;
        self.is_started = false;
        self.kill_at = None;
        self.last = Some(ended.clone());
        if !again {
            self.state = State::Ended(ended);
            return;
        }
        if ran >= BACKOFF_RESET {
            self.backoff = Duration::ZERO;
        }
        let wait = self.backoff;
        self.backoff = if wait.is_zero() { BACKOFF_FIRST } else { (wait * 2).min(BACKOFF_MAX) };
        let reason = if wait.is_zero() { "ContainerCreating" } else { "CrashLoopBackOff" };
        let message = if wait.is_zero() {
            String::new()
        } else {
            format!("back-off {}s restarting failed container", wait.as_secs())
        };
        self.state = State::Waiting { reason: reason.to_owned(), message, until: Some(Instant::now() + wait) };
        self.restarts += 1;
    }

    /// When something is due next.
    fn due(&self) -> Option<Instant> {
        let start = match &self.state {
            State::Waiting { until, .. } => *until,
            State::Running { .. } => {
                self.probes.iter().filter(|check| !check.is_asking).filter_map(|check| check.next).min()
            }
            State::Ended(_) => None,
        };
        [start, self.kill_at].into_iter().flatten().min()
    }
}

fn period(probe: &Probe) -> Duration {
    Duration::from_secs(u64::from(if probe.period_seconds == 0 { 10 } else { probe.period_seconds }))
}

/// The time between TERM and KILL.
fn grace(seconds: Option<u64>) -> Duration {
    seconds.map_or(GRACE, Duration::from_secs).min(GRACE_MAX)
}

fn threshold(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}

impl Worker {
    /// The pod as it is now; `None` once it is gone or is another of the same name.
    fn current(&self) -> Option<(ConfigSet, Arc<Object>, Arc<k8s::Pod>)> {
        let objects = self.shared.options.store.objects();
        let (object, pod) = objects.get::<k8s::Pod>(&self.key.namespace, &self.key.name)?;
        let (object, pod) = (Arc::clone(object), Arc::clone(pod));
        (object.meta.uid == self.uid).then_some((objects, object, pod))
    }

    fn wanted(&self) -> Option<(ConfigSet, Arc<Object>, Arc<k8s::Pod>)> {
        self.current().filter(|(_, object, _)| !object.meta.deleted)
    }

    /// Until the pod is to go.
    async fn live(&mut self) {
        let mut version = self.shared.options.store.version();
        while self.id.is_none() {
            version.borrow_and_update();
            let Some((objects, object, pod)) = self.wanted() else { return };
            if self.slots.is_empty() {
                let role = |c: &Container| if c.restart_policy == "Always" { Role::Sidecar } else { Role::Init };
                let init = pod.spec.init_containers.iter().map(|c| Slot::new(c, role(c)));
                self.slots = init.chain(pod.spec.containers.iter().map(|c| Slot::new(c, Role::Main))).collect();
            }
            match self.sandbox(&objects, &object, &pod).await {
                Ok(()) => {}
                Err((reason, message)) => {
                    self.message = Some((reason, message));
                    self.publish();
                    // Whatever it waits for may come, or a retry may help.
                    drop(tokio::time::timeout(SANDBOX_RETRY, version.changed()).await);
                }
            }
        }
        self.message = None;
        self.shared.set_finding(&self.key, None);
        let mut answers = Answers::new();
        let mut renewal_at = None;
        let mut filled = None;
        loop {
            let seen = *version.borrow_and_update();
            let Some((objects, object, pod)) = self.wanted() else { return };
            let now_at = Instant::now();
            let mut renewal = *renewal_at.get_or_insert_with(|| now_at + token_renewal(&pod));
            let renews = now_at >= renewal;
            // Probes wake us several times a second; they change no volume, and each filling mints tokens.
            if renews || filled != Some(seen) {
                let is_done = self.refresh_volumes(&objects, &object, &pod, renews).await;
                filled = Some(seen);
                if renews {
                    renewal = Instant::now() + if is_done { token_renewal(&pod) } else { RENEWAL_RETRY };
                    renewal_at = Some(renewal);
                }
            }
            self.end_sidecars(&pod, &mut answers).await;
            self.start_due(&objects, &object, &pod).await;
            self.ask_due(&mut answers);
            self.kill_due().await;
            self.publish();
            let due = self.slots.iter().filter(|slot| self.may_run(slot)).filter_map(Slot::due).min();
            let due = due.unwrap_or(renewal).min(renewal);
            // Order does not matter: every arm leads back to the same look at everything.
            tokio::select! {
                Some((container, code)) = self.exits.recv() => self.exited(&container, code, &pod.spec.restart_policy),
                Some(answer) = answers.join_next() => {
                    if let Ok(answer) = answer {
                        self.answered(answer, &pod, &mut answers).await;
                    }
                }
                changed = version.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(due) => {}
            }
        }
    }

    /// Init containers run one after the other; the rest waits for them, and for the `postStart` of
    /// those listed before. What runs already waits for nobody.
    fn may_run(&self, slot: &Slot) -> bool {
        if slot.role == Role::Sidecar && !slot.is_running() && self.is_over() {
            return false;
        }
        let blocking = self.slots.iter().find(|one| !one.is_through());
        if blocking.is_some_and(|first| first.container.name == slot.container.name) {
            return true;
        }
        match (blocking, slot.role) {
            (Some(_), Role::Sidecar) => slot.was_started,
            (Some(_), _) => slot.is_running(),
            (None, _) => {
                let mut before = self.slots.iter().take_while(|s| s.container.name != slot.container.name);
                slot.is_running() || !before.any(Slot::holds_others)
            }
        }
    }

    /// Whether an init container has failed for good.
    fn has_failed_early(&self) -> bool {
        self.slots.iter().any(|slot| matches!(&slot.state, State::Ended(_)) && !slot.is_through())
    }

    /// Whether the pod has come to its own end.
    fn is_over(&self) -> bool {
        let mut main = self.slots.iter().filter(|slot| slot.role == Role::Main);
        self.has_failed_early() || main.all(|slot| matches!(slot.state, State::Ended(_)))
    }

    /// Sidecars end with the containers that they are there for.
    async fn end_sidecars(&mut self, pod: &k8s::Pod, answers: &mut Answers) {
        if !self.is_over() {
            return;
        }
        for index in (0..self.slots.len()).rev() {
            let slot = &self.slots[index];
            if slot.role == Role::Sidecar && slot.is_running() && slot.kill_at.is_none() {
                self.end_container(index, grace(pod.spec.termination_grace_period_seconds), answers).await;
            }
        }
    }

    /// What is left of the pod after its worker failed.
    async fn abandon(&mut self) {
        if let Some(id) = self.id.take() {
            // It may have been deleted before the failure.
            drop(self.shared.options.runtime.delete_pod(id).await);
            self.shared.options.outputs.set(id, None);
        }
        // What failed once may fail again.
        tokio::time::sleep(SANDBOX_RETRY).await;
    }

    async fn sandbox(&mut self, objects: &ConfigSet, object: &Object, pod: &k8s::Pod) -> Result<(), (String, String)> {
        let facts = facts(object, pod, "");
        let from = self.contents(objects);
        let made = volumes(&facts, &from).map_err(|unfilled| {
            self.shared.set_finding(&self.key, unfilled_volume(objects, object, &unfilled));
            ("ContainerCreating".to_owned(), unfilled.missing.0)
        })?;
        for volume in &made {
            if let VolumeSource::Files(files) = &volume.source {
                self.volumes.insert(volume.name.clone(), files.clone());
            }
        }
        let is_switch = object.meta.annotations.get(annotations::NETWORK).is_some_and(|network| network == "switch");
        let has_sidecar =
            pod.spec.containers.iter().any(|c| is_proxy(c) && c.args.get(1).is_some_and(|role| role == "sidecar"));
        let request = PodRequest {
            namespace: self.key.namespace.to_string(),
            name: self.key.name.to_string(),
            hostname: pod.spec.hostname.clone(),
            subdomain: Some(pod.spec.subdomain.clone()).filter(|name| !name.is_empty()),
            network: if is_switch { PodNetwork::Switch } else { PodNetwork::Own },
            dns: if pod.spec.dns_policy == "Default" { DnsPolicy::Host } else { DnsPolicy::ClusterFirst },
            host_aliases: pod
                .spec
                .host_aliases
                .iter()
                .filter_map(|a| Some((a.ip.parse().ok()?, a.hostnames.clone())))
                .collect(),
            redirect: has_sidecar.then(|| redirect(&object.meta.annotations)),
            volumes: made,
        };
        let made = self.shared.options.runtime.create_pod(request).await;
        let made = made.map_err(|error| ("FailedCreatePodSandBox".to_owned(), error.to_string()))?;
        self.id = Some(made.id);
        self.ip = made.ip.to_string();
        self.shared.options.outputs.set(made.id, Some(&self.key));
        if let Some(running) = self.shared.running().get_mut(&self.key)
            && running.uid == self.uid
        {
            running.id = Some(made.id);
        }
        Ok(())
    }

    fn contents<'a>(&'a self, objects: &'a ConfigSet) -> Contents<'a> {
        Contents { objects, tokens: &self.shared.options.tokens, now: jiff::Timestamp::now().as_second() }
    }

    /// Files of ConfigMaps, Secrets and the downward API follow their objects; tokens are renewed. Whether all
    /// of it was done.
    async fn refresh_volumes(&mut self, objects: &ConfigSet, object: &Object, pod: &k8s::Pod, renew: bool) -> bool {
        let Some(id) = self.id else { return false };
        let facts = facts(object, pod, &self.ip);
        let mut is_done = true;
        let mut made: Vec<Volume> = Vec::new();
        for volume in each_volume(&facts, &self.contents(objects)) {
            match volume {
                Ok(volume) => made.push(volume),
                // What was removed stays as it was, as with a kubelet. A token beside it must not run out.
                Err(unfilled) => is_done &= !has_token(pod, &unfilled.volume),
            }
        }
        for volume in made {
            let VolumeSource::Files(files) = volume.source else { continue };
            let Some(before) = self.volumes.get(&volume.name) else { continue };
            if *before == files || (!renew && differ_in_tokens_only(before, &files)) {
                continue;
            }
            match self.shared.options.runtime.update_volume(id, &volume.name, files.clone()).await {
                Ok(()) => drop(self.volumes.insert(volume.name, files)),
                Err(error) => {
                    is_done = false;
                    tracing::warn!(%error, pod = %self.key, volume = volume.name, "cannot refresh a volume");
                }
            }
        }
        is_done
    }

    async fn start_due(&mut self, objects: &ConfigSet, object: &Object, pod: &k8s::Pod) {
        let Some(id) = self.id else { return };
        let at = Instant::now();
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            let is_due = matches!(&slot.state, State::Waiting { until: Some(until), .. } if *until <= at);
            if !is_due || !self.may_run(slot) {
                continue;
            }
            let outcome = match self.request(&self.slots[index].container, objects, object, pod) {
                Ok(request) => {
                    self.shared.options.runtime.start_container(id, request).await.map_err(|error| match error {
                        RuntimeError::Program { .. } => Trouble {
                            reason: "StartError",
                            message: error.to_string(),
                            at: Some(("command", MISSING_PROGRAM.to_owned())),
                        },
                        _ => Trouble { reason: "RunContainerError", message: error.to_string(), at: None },
                    })
                }
                Err(trouble) => Err(trouble),
            };
            match outcome {
                Ok(()) => self.slots[index].begin(Instant::now()),
                Err(trouble) => {
                    let finding = blame(objects, object, &self.slots[index].container, &trouble);
                    let is_users = finding.is_some();
                    if is_users {
                        self.shared.set_finding(&self.key, finding);
                    }
                    let (reason, message) = (trouble.reason.to_owned(), trouble.message);
                    let slot = &mut self.slots[index];
                    slot.backoff =
                        if slot.backoff.is_zero() { BACKOFF_FIRST } else { (slot.backoff * 2).min(BACKOFF_MAX) };
                    // What is missing is looked for soon: the file may be edited any moment.
                    let wait = if is_users { SANDBOX_RETRY } else { slot.backoff };
                    slot.state = State::Waiting { reason, message, until: Some(Instant::now() + wait) };
                }
            }
        }
        if self.slots.iter().all(|slot| slot.is_running() || matches!(slot.state, State::Ended(_))) {
            self.shared.set_finding(&self.key, None);
        }
    }

    fn request(
        &self,
        container: &Container,
        objects: &ConfigSet,
        object: &Object,
        pod: &k8s::Pod,
    ) -> Result<ContainerRequest, Trouble> {
        let facts = facts(object, pod, &self.ip);
        let env = environment(container, &facts, objects).map_err(|missing| Trouble {
            reason: "CreateContainerConfigError",
            message: missing.0,
            at: Some(("env", "apply what is missing, or mark the reference optional".to_owned())),
        })?;
        let apps = pod.spec.containers.iter().filter(|c| c.name != PROXY).count();
        let argv =
            program(container, &object.meta.annotations, apps, &self.shared.options.images, &env).map_err(|error| {
                Trouble { reason: "ErrImageNeverPull", message: error.message, at: Some(("image", error.hint)) }
            })?;
        // Rights come with our own program in the proxy's role, never with a name alone.
        let is_proxy = is_proxy(container) && argv.first().is_some_and(|first| first == SELF_EXE);
        let listeners = object.meta.annotations.get(annotations::HOST_PORTS).filter(|_| is_proxy);
        Ok(ContainerRequest {
            name: container.name.clone(),
            argv,
            env,
            cwd: Some(container.working_dir.clone()).filter(|dir| !dir.is_empty()).map(Into::into),
            mounts: mounts(container, &facts),
            rights: if is_proxy { Rights::Proxy } else { Rights::App },
            listeners: listeners.map(|list| ports(list)).unwrap_or_default(),
            host_sockets: is_proxy || object.meta.annotations.contains_key(annotations::NETWORK),
        })
    }

    fn exited(&mut self, container: &str, code: i32, policy: &str) {
        let is_over = self.is_over();
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.container.name == container) else { return };
        let again = match (slot.role, policy) {
            (Role::Init, _) => code != 0 && policy != "Never",
            (Role::Sidecar, _) => !is_over,
            (Role::Main, "Never") => false,
            (Role::Main, "OnFailure") => code != 0,
            (Role::Main, _) => true,
        };
        slot.ended(code, again);
    }

    fn ask_due(&mut self, answers: &mut Answers) {
        let (Some(id), Ok(ip)) = (self.id, self.ip.parse::<IpAddr>()) else { return };
        let at = Instant::now();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if !slot.is_running() {
                continue;
            }
            let restarts = slot.restarts;
            if slot.hook == Hook::Due && slot.waits_until_started() {
                if slot.is_started {
                    slot.hook = Hook::Done;
                }
            } else if slot.hook == Hook::Due {
                slot.hook = Hook::Running;
                let (runtime, container) = (self.shared.options.runtime.clone(), slot.container.clone());
                let Some(hook) = slot.post_start().cloned() else { continue };
                answers.spawn(async move {
                    let target = Target { pod: id, ip, container: &container, from_switch: false };
                    let outcome = run_hook(&hook, target, POST_START_MAX, &runtime).await;
                    Answer { slot: index, restarts, which: POST_START, outcome }
                });
            }
            for which in [STARTUP, READINESS, LIVENESS] {
                let may_ask = if which == STARTUP { !slot.is_started } else { slot.is_started };
                let is_due = slot.probes[which].next.is_some_and(|next| next <= at) && !slot.probes[which].is_asking;
                let Some(probe) = slot.probe(which).cloned().filter(|_| is_due) else { continue };
                if !may_ask {
                    // asked for the last time, or not before the container has started, which sets the time
                    slot.probes[which].next = None;
                    continue;
                }
                slot.probes[which].is_asking = true;
                let runtime = self.shared.options.runtime.clone();
                let container = slot.container.clone();
                answers.spawn(async move {
                    let from_switch = container.name == PROXY;
                    let target = Target { pod: id, ip, container: &container, from_switch };
                    let outcome = probe::ask(&probe, target, &runtime).await;
                    Answer { slot: index, restarts, which, outcome }
                });
            }
        }
    }

    async fn answered(&mut self, answer: Answer, pod: &k8s::Pod, answers: &mut Answers) {
        let Answer { slot: index, restarts, which, outcome } = answer;
        let at = Instant::now();
        let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.restarts == restarts) else { return };
        let State::Running { since, .. } = slot.state else { return };
        match which {
            POST_START => return self.hooked(index, outcome).await,
            PRE_STOP => return self.left(index, outcome).await,
            _ => {}
        }
        let Some(probe) = slot.probe(which).cloned() else { return };
        let is_young = since.elapsed() < EAGER_FOR;
        let check = &mut slot.probes[which];
        check.is_asking = false;
        if let Err(Failure::Unasked(message)) = &outcome {
            tracing::debug!(pod = %self.key, container = slot.container.name, message, "cannot ask");
            check.next = Some(at + period(&probe));
            return;
        }
        let mut failed = false;
        if outcome.is_ok() {
            check.failures = 0;
            check.successes += 1;
            check.next = Some(at + period(&probe));
        } else {
            check.successes = 0;
            // Early looks are extra: only one failure a period counts.
            if check.counted.is_none_or(|counted| counted + period(&probe) <= at + EAGER) {
                check.failures += 1;
                check.counted = Some(at);
            }
            failed = check.failures >= threshold(probe.failure_threshold, 3);
            let is_eager = is_young && which != LIVENESS && !slot.is_ready;
            check.next = Some(at + if is_eager { EAGER } else { period(&probe) });
        }
        let enough = check.successes >= threshold(probe.success_threshold, 1);
        match which {
            STARTUP if enough => {
                slot.is_started = true;
                slot.was_started = true;
                slot.is_ready = slot.container.readiness_probe.is_none();
                for later in [READINESS, LIVENESS] {
                    if slot.probe(later).is_some() {
                        slot.probes[later].next = Some(at);
                    }
                }
            }
            READINESS if enough => slot.is_ready = true,
            READINESS if failed => slot.is_ready = false,
            STARTUP | LIVENESS if failed && slot.kill_at.is_none() => {
                let message = outcome.err().map(|failure| failure.to_string()).unwrap_or_default();
                tracing::info!(pod = %self.key, container = slot.container.name, message, "restarted: its probe failed");
                let seconds = probe.termination_grace_period_seconds.or(pod.spec.termination_grace_period_seconds);
                self.end_container(index, grace(seconds), answers).await;
            }
            _ => {}
        }
    }

    /// A container whose `postStart` fails is ended and starts again, as on Kubernetes.
    async fn hooked(&mut self, index: usize, outcome: Result<(), Failure>) {
        let slot = &mut self.slots[index];
        match outcome {
            Ok(()) => slot.hook = Hook::Done,
            Err(error) => {
                tracing::warn!(pod = %self.key, container = slot.container.name, %error, "postStart failed");
                let name = slot.container.name.clone();
                self.signal(&name, Signal::Kill).await;
            }
        }
    }

    /// Ends a container while its pod stays, as a kubelet does: `preStop` within the grace period, then TERM,
    /// and KILL when that is over.
    async fn end_container(&mut self, index: usize, grace: Duration, answers: &mut Answers) {
        let slot = &mut self.slots[index];
        let kill_at = Instant::now() + grace;
        slot.kill_at = Some(kill_at);
        let hook = slot.container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.clone());
        if let (Some(hook), Some(id), Ok(ip), false) = (hook, self.id, self.ip.parse(), grace.is_zero()) {
            slot.kill_at = Some(kill_at + GRACE_AFTER_HOOK);
            let (runtime, container) = (self.shared.options.runtime.clone(), slot.container.clone());
            let restarts = slot.restarts;
            answers.spawn(async move {
                let target = Target { pod: id, ip, container: &container, from_switch: false };
                let run = tokio::time::timeout(grace, run_hook(&hook, target, grace, &runtime)).await;
                let outcome = run.unwrap_or_else(|_| Err(late()));
                Answer { slot: index, restarts, which: PRE_STOP, outcome }
            });
            return;
        }
        let name = slot.container.name.clone();
        self.signal(&name, Signal::Term).await;
    }

    /// The `preStop` of a container that is to end is through.
    async fn left(&mut self, index: usize, outcome: Result<(), Failure>) {
        let slot = &mut self.slots[index];
        if let Err(error) = outcome {
            // As on Kubernetes, the container ends all the same.
            tracing::warn!(pod = %self.key, container = slot.container.name, %error, "preStop failed");
        }
        // What was added for the time after the hook counts only if the hook left less of the grace period.
        let of_grace = slot.kill_at.and_then(|kill_at| kill_at.checked_sub(GRACE_AFTER_HOOK));
        slot.kill_at = of_grace.max(Some(Instant::now() + GRACE_AFTER_HOOK));
        let name = slot.container.name.clone();
        self.signal(&name, Signal::Term).await;
    }

    async fn kill_due(&mut self) {
        let at = Instant::now();
        let due: Vec<String> = self
            .slots
            .iter_mut()
            .filter(|slot| slot.kill_at.is_some_and(|kill| kill <= at))
            .map(|slot| {
                slot.kill_at = None;
                slot.container.name.clone()
            })
            .collect();
        for name in due {
            self.signal(&name, Signal::Kill).await;
        }
    }

    async fn signal(&self, container: &str, signal: Signal) {
        if let Some(id) = self.id {
            // It may have ended just now; then there is nobody to tell.
            drop(self.shared.options.runtime.signal(id, container, signal).await);
        }
    }

    /// Ends the pod as Kubernetes does, the proxy last to take and first to hear.
    async fn end(&mut self) {
        if let Some(id) = self.id {
            let pod = self.current().map(|(_, _, pod)| pod);
            let grace = grace(pod.as_ref().and_then(|pod| pod.spec.termination_grace_period_seconds));
            let deadline = Instant::now() + grace;
            self.publish();
            if self.slots.iter().any(Slot::is_running) && pod.is_some() && !grace.is_zero() {
                self.wait_until((Instant::now() + self.shared.options.drain_lead).min(deadline), |_| false).await;
                // At the end of the mesh nobody is left to hear of it.
                if let Some(settled) = &self.shared.options.settled
                    && !*self.shared.stopping.borrow()
                {
                    let version = *self.shared.options.store.version().borrow();
                    // Who has not heard by then never will.
                    _ = tokio::time::timeout(SETTLED_MAX, settled(version)).await;
                }
                self.pre_stop(id, deadline).await;
                let has_proxy = self.slots.iter().any(|slot| is_proxy(&slot.container) && slot.is_running());
                if has_proxy {
                    self.signal(PROXY, Signal::Term).await;
                    let drained = (Instant::now() + PROXY_DRAIN).min(deadline);
                    self.wait_until(drained, |slot| is_proxy(&slot.container)).await;
                }
                // A `preStop` or the proxy may have taken all of it.
                let deadline = deadline.max(Instant::now() + GRACE_AFTER_HOOK);
                if self.slots.iter().any(|slot| slot.role == Role::Sidecar && slot.is_running()) {
                    self.terminate(&[Role::Main]).await;
                    self.wait_until(deadline, |slot| slot.role == Role::Main).await;
                }
                self.terminate(&[Role::Main, Role::Sidecar, Role::Init]).await;
                self.wait_until(deadline, |_| true).await;
            }
            // Kills what is left.
            if let Err(error) = self.shared.options.runtime.delete_pod(id).await {
                tracing::debug!(%error, pod = %self.key, "the pod was gone already");
            }
            self.shared.options.outputs.set(id, None);
        }
        self.shared.set_finding(&self.key, None);
        if self.current().is_some() {
            self.shared.options.store.remove_pod(&self.key);
        }
    }

    /// Asks the running containers of these roles to end, the last listed first.
    async fn terminate(&self, roles: &[Role]) {
        for slot in self.slots.iter().rev().filter(|slot| slot.is_running() && roles.contains(&slot.role)) {
            self.signal(&slot.container.name, Signal::Term).await;
        }
    }

    async fn pre_stop(&mut self, id: PodId, deadline: Instant) {
        for slot in self.slots.iter().filter(|slot| slot.is_running()) {
            let Some(hook) = slot.container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref()) else {
                continue;
            };
            let Ok(ip) = self.ip.parse() else { continue };
            let left = deadline.saturating_duration_since(Instant::now());
            let target = Target { pod: id, ip, container: &slot.container, from_switch: false };
            let run = run_hook(hook, target, left, &self.shared.options.runtime);
            let run = tokio::time::timeout_at(deadline, run).await;
            if let Err(error) = run.unwrap_or_else(|_| Err(late())) {
                // As on Kubernetes, the container ends all the same.
                tracing::warn!(pod = %self.key, container = slot.container.name, %error, "preStop failed");
            }
        }
    }

    /// Waits until all containers that `which` picks have ended, or until `deadline`.
    async fn wait_until(&mut self, deadline: Instant, which: fn(&Slot) -> bool) {
        loop {
            let picked: Vec<&Slot> = self.slots.iter().filter(|slot| which(slot)).collect();
            if !picked.is_empty() && picked.iter().all(|slot| !slot.is_running()) {
                return;
            }
            match tokio::time::timeout_at(deadline, self.exits.recv()).await {
                Ok(Some((container, code))) => {
                    if let Some(slot) = self.slots.iter_mut().find(|slot| slot.container.name == container) {
                        slot.ended(code, false);
                    }
                    self.publish();
                }
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Writes the pod's status, if it changed.
    fn publish(&mut self) {
        let is_ready = self.id.is_some()
            && self.slots.iter().filter(|slot| slot.role != Role::Init).all(|slot| slot.is_running() && slot.is_ready)
            && self.slots.iter().all(|slot| self.may_run(slot));
        if self.ready_since.0 != is_ready {
            self.ready_since = (is_ready, now());
        }
        let status = self.status(is_ready);
        // Looking costs less than a change that changes nothing.
        if self.current().is_some_and(|(_, object, _)| object.raw["status"] == status) {
            return;
        }
        let patched = self.shared.options.store.patch(Kind::Pod, &self.key, |document| {
            if document["metadata"]["uid"] == *self.uid {
                document["status"] = status;
            }
        });
        match patched {
            Ok(Some(outcome)) if !outcome.findings.is_empty() => {
                tracing::error!(pod = %self.key, finding = %outcome.findings[0], "a status of our own was refused");
            }
            Ok(_) => {}
            Err(error) => tracing::error!(%error, pod = %self.key, "cannot save a status"),
        }
    }

    fn status(&self, is_ready: bool) -> Value {
        let word = |yes: bool| if yes { "True" } else { "False" };
        let initialized = self.slots.iter().all(Slot::is_through);
        let main: Vec<&Slot> = self.slots.iter().filter(|slot| slot.role == Role::Main).collect();
        let has_ended = !main.is_empty() && main.iter().all(|slot| matches!(slot.state, State::Ended(_)));
        let phase = if self.has_failed_early() {
            "Failed"
        } else if has_ended {
            if main.iter().all(|slot| matches!(&slot.state, State::Ended(ended) if ended.code == 0)) {
                "Succeeded"
            } else {
                "Failed"
            }
        } else if main.iter().any(|slot| slot.is_running() || slot.restarts > 0) {
            "Running"
        } else {
            "Pending"
        };
        let since = self.ready_since.1.as_str();
        let condition = |kind: &str, yes: bool, since: &str| json!({"type": kind, "status": word(yes), "lastTransitionTime": since});
        let containers = |is_init: bool| -> Value {
            let of_list = self.slots.iter().filter(|slot| (slot.role != Role::Main) == is_init);
            of_list.map(|slot| self.container_status(slot)).collect()
        };
        let mut status = json!({
            "phase": phase,
            "startTime": self.started,
            "hostIP": HOST_IP,
            "conditions": [
                condition("PodScheduled", true, &self.started),
                condition("Initialized", initialized, &self.started),
                condition("ContainersReady", is_ready, since),
                condition("Ready", is_ready, since),
            ],
            "containerStatuses": containers(false),
        });
        if self.slots.iter().any(|slot| slot.role != Role::Main) {
            status["initContainerStatuses"] = containers(true);
        }
        if !self.ip.is_empty() {
            status["podIP"] = self.ip.clone().into();
            status["podIPs"] = json!([{"ip": self.ip}]);
        }
        if let Some((_, message)) = &self.message {
            status["message"] = message.clone().into();
        }
        status
    }

    fn container_status(&self, slot: &Slot) -> Value {
        let ended = |ended: &Ended| {
            let reason = if ended.code == 0 { "Completed" } else { "Error" };
            json!({"terminated": {"exitCode": ended.code, "reason": reason, "startedAt": ended.started, "finishedAt": ended.finished}})
        };
        let state = match (&slot.state, &self.message) {
            (State::Waiting { .. }, Some((reason, message))) => {
                json!({"waiting": {"reason": reason, "message": message}})
            }
            (State::Waiting { .. }, None) if !self.may_run(slot) => json!({"waiting": {"reason": "PodInitializing"}}),
            (State::Waiting { reason, message, .. }, None) => {
                json!({"waiting": {"reason": reason, "message": message}})
            }
            (State::Running { at, .. }, _) => json!({"running": {"startedAt": at}}),
            (State::Ended(of), _) => ended(of),
        };
        let mut status = json!({
            "name": slot.container.name, "image": slot.container.image, "ready": slot.is_ready, "started": slot.is_started && slot.is_running(),
            "restartCount": slot.restarts, "state": state,
        });
        if slot.restarts > 0
            && let Some(last) = &slot.last
        {
            status["lastState"] = ended(last);
        }
        status
    }
}

/// Why a container does not start.
struct Trouble {
    /// As Kubernetes calls it.
    reason: &'static str,
    message: String,
    /// The container's field that is to blame, and what to do; none when the machine is.
    at: Option<(&'static str, String)>,
}

const MISSING_PROGRAM: &str = "install the program, or name another one; programs of containers are this machine's";

/// The object that the user wrote for a pod, and where the pod's `spec` is in it.
fn written<'a>(objects: &'a ConfigSet, pod: &'a Object) -> (&'a Object, &'static str) {
    let deployment = crate::inject::deployment_of(pod)
        .and_then(|name| objects.get::<k8s::Deployment>(&pod.meta.namespace, name).map(|(object, _)| object));
    deployment.map_or((pod, "spec"), |deployment| (&**deployment, "spec.template.spec"))
}

/// Nothing to say about volumes that the user did not write: the mesh's own come by themselves.
fn unfilled_volume(objects: &ConfigSet, pod: &Object, unfilled: &UnfilledVolume) -> Option<Finding> {
    let (object, spec) = written(objects, pod);
    let volumes = object.raw.pointer(&format!("/{}/volumes", spec.replace('.', "/")))?.as_array()?;
    let at = volumes.iter().position(|volume| volume["name"] == *unfilled.volume)?;
    if volumes[at]["configMap"]["name"] == super::ROOT_CERT_MAP {
        return None;
    }
    Some(Finding {
        code: "LAT0010".into(),
        severity: Severity::Error,
        object: Some(object.reference()),
        field: format!("{spec}.volumes[{at}]").into(),
        position: None,
        message: unfilled.missing.0.clone().into(),
        hint: "apply it, or mark the reference optional; the pod waits for it".into(),
    })
}

/// Why a container cannot start, as a finding about the object that the user wrote, if that is to
/// blame.
fn blame(objects: &ConfigSet, pod: &Object, container: &Container, trouble: &Trouble) -> Option<Finding> {
    let (field, hint) = trouble.at.as_ref()?;
    let (object, spec) = written(objects, pod);
    let pointer = format!("/{}", spec.replace('.', "/"));
    let place = ["containers", "initContainers"].iter().find_map(|list| {
        let all = object.raw.pointer(&pointer)?.get(list)?.as_array()?;
        // A pod of its own carries the proxy, which may stand first; the user's file does not.
        let of_file = |one: &&Value| object.kind != Kind::Pod || one["name"] != PROXY || container.name == PROXY;
        let at = all.iter().filter(of_file).position(|one| one["name"] == *container.name)?;
        Some(format!("{spec}.{list}[{at}].{field}"))
    });
    Some(Finding {
        code: "LAT0010".into(),
        severity: Severity::Error,
        object: Some(object.reference()),
        field: place.unwrap_or_default().into(),
        position: None,
        message: trouble.message.as_str().into(),
        hint: hint.as_str().into(),
    })
}

/// Runs a container's `postStart` or `preStop`. What it asks or runs takes no longer than `limit`; a time that it
/// says itself is its own.
async fn run_hook(
    hook: &LifecycleHandler,
    target: Target<'_>,
    limit: Duration,
    runtime: &PodRuntime,
) -> Result<(), Failure> {
    if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(sleep.seconds)).await;
        return Ok(());
    }
    let question = Probe {
        exec: hook.exec.clone(),
        http_get: hook.http_get.clone(),
        tcp_socket: hook.tcp_socket.clone(),
        timeout_seconds: u32::try_from(limit.as_secs()).unwrap_or(u32::MAX),
        ..Probe::default()
    };
    probe::ask(&question, target, runtime).await
}

/// A `preStop` that the grace period was too short for.
fn late() -> Failure {
    Failure::Unwell("the grace period is over".to_owned())
}

fn facts<'a>(object: &'a Object, pod: &'a k8s::Pod, ip: &'a str) -> PodFacts<'a> {
    PodFacts { object, pod, ip, host_ip: HOST_IP, node_name: NODE_NAME }
}

/// Whether the container is the mesh's proxy, by name and program.
fn is_proxy(container: &Container) -> bool {
    container.name == PROXY
        && container.command.is_empty()
        && container.args.first().is_some_and(|word| word == "proxy")
}

/// A token differs each time it is minted; nothing else of these files does.
fn differ_in_tokens_only(before: &[VolumeFile], after: &[VolumeFile]) -> bool {
    let is_token =
        |file: &VolumeFile| file.contents.starts_with(b"eyJ") && file.contents.split(|b| *b == b'.').count() == 3;
    before.len() == after.len()
        && before
            .iter()
            .zip(after)
            .all(|(a, b)| a == b || (a.path == b.path && a.mode == b.mode && is_token(a) && is_token(b)))
}

/// Ports of an annotation: a list with commas.
fn ports(list: &str) -> Vec<u16> {
    list.split(',').filter_map(|port| port.trim().parse().ok()).collect()
}

/// What is captured, by the pod's annotations (`traffic.sidecar.istio.io/*`).
fn redirect(annotations: &BTreeMap<String, String>) -> capture::Redirect {
    let get = |name: &str| annotations.get(&format!("traffic.sidecar.istio.io/{name}")).map(String::as_str);
    let ranges = |list: &str| -> Vec<(IpAddr, u8)> {
        let parse = |range: &str| {
            let (address, length) = range.trim().split_once('/')?;
            Some((address.parse().ok()?, length.parse().ok()?))
        };
        list.split(',').filter_map(parse).collect()
    };
    let inbound = match get("includeInboundPorts") {
        None | Some("*") => capture::Inbound::All,
        Some(list) => capture::Inbound::Only(ports(list)),
    };
    capture::Redirect {
        inbound,
        exclude_inbound_ports: get("excludeInboundPorts").map(ports).unwrap_or_default(),
        exclude_outbound_ports: get("excludeOutboundPorts").map(ports).unwrap_or_default(),
        include_outbound_ranges: get("includeOutboundIPRanges")
            .filter(|list| *list != "*")
            .map(ranges)
            .unwrap_or_default(),
        exclude_outbound_ranges: get("excludeOutboundIPRanges").map(ranges).unwrap_or_default(),
        include_outbound_ports: get("includeOutboundPorts").map(ports).unwrap_or_default(),
        dns: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_address_is_the_switch() {
        assert_eq!(HOST_IP, crate::SWITCH_IP.to_string());
    }

    #[test]
    fn annotations_say_what_is_captured() {
        let of = |pairs: &[(&str, &str)]| {
            redirect(&pairs.iter().map(|(k, v)| (format!("traffic.sidecar.istio.io/{k}"), (*v).to_owned())).collect())
        };
        assert_eq!(of(&[]), capture::Redirect::default());
        let made = of(&[
            ("excludeOutboundPorts", "3306, 6379"),
            ("includeInboundPorts", "8080"),
            ("excludeOutboundIPRanges", "10.1.0.0/16"),
        ]);
        assert_eq!(made.exclude_outbound_ports, [3306, 6379]);
        assert_eq!(made.inbound, capture::Inbound::Only(vec![8080]));
        assert_eq!(made.exclude_outbound_ranges, [("10.1.0.0".parse().unwrap(), 16)]);
        assert_eq!(of(&[("includeInboundPorts", "")]).inbound, capture::Inbound::Only(vec![]));
    }

    #[test]
    fn a_container_that_keeps_failing_waits_longer_each_time() {
        let container = Container { name: "c".into(), ..Container::default() };
        let mut slot = Slot::new(&container, Role::Main);
        for seconds in [0, 10, 20, 40, 80, 160, 300, 300] {
            slot.begin(Instant::now());
            let wait = Duration::from_secs(seconds);
            let earliest = Instant::now() + wait;
            slot.ended(1, true);
            let State::Waiting { until: Some(until), .. } = slot.state else { panic!("not waiting") };
            assert!((earliest..=Instant::now() + wait).contains(&until), "{seconds} s");
        }
        slot.state = State::Running { since: Instant::now().checked_sub(BACKOFF_RESET).unwrap(), at: now() };
        slot.ended(1, true);
        assert!(matches!(&slot.state, State::Waiting { until: Some(until), .. } if *until <= Instant::now()));
        slot.begin(Instant::now());
        slot.ended(0, false);
        assert!(matches!(&slot.state, State::Ended(ended) if ended.code == 0));
        assert_eq!(slot.restarts, 9);
    }

    #[test]
    fn a_grace_period_ends_however_long_it_is() {
        assert_eq!(grace(None), Duration::from_secs(30));
        assert_eq!(grace(Some(0)), Duration::ZERO);
        for seconds in [i64::MAX.unsigned_abs(), u64::MAX] {
            assert!(Instant::now().checked_add(grace(Some(seconds))).is_some(), "{seconds}");
        }
    }

    #[test]
    fn a_fresh_token_alone_is_no_change() {
        let file = |path: &str, text: &str| VolumeFile { path: path.into(), mode: 0o644, contents: text.into() };
        assert!(differ_in_tokens_only(&[file("t", "eyJa.b.c")], &[file("t", "eyJx.y.z")]));
        assert!(!differ_in_tokens_only(&[file("t", "old")], &[file("t", "new")]));
        assert!(!differ_in_tokens_only(&[], &[file("t", "eyJx.y.z")]));
    }
}
