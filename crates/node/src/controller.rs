//! Turns admitted objects into running pods: what Kubernetes' controllers and kubelet do.
//!
//! ```text
//! Deployment ─ deployment ─▶ Pod ─ pod (one worker each) ─▶ PodRuntime
//!                             └── endpoints ─▶ EndpointSlice, cluster DNS, service addresses
//! ```
//!
//! Level-triggered: each round looks at all objects and does what is missing, so a lost event costs
//! nothing. The controller writes pods, slices and statuses into the store and nothing else.

mod deployment;
mod endpoints;
mod pod;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use api::{Kind, k8s};
use types::{Finding, NamespacedName};

use crate::env::ImageProgram;
use crate::exec::ExecTarget;
use crate::listening;
use crate::logs::Logs;
use crate::runtime::{Output, OutputSink, PodRuntime, RuntimeEvent};
use crate::spec::PodId;
use crate::store::Store;
use crate::token::Tokens;

pub use api::k8s::NODE_NAME;

/// The ConfigMap with the mesh's root certificate, in every namespace.
pub const ROOT_CERT_MAP: &str = "istio-ca-root-cert";
/// A round follows a change after this long, so that a burst of changes costs one round.
const SETTLE: Duration = Duration::from_millis(5);

/// What the controller works with.
#[derive(Clone)]
pub struct ControllerOptions {
    /// The objects.
    pub store: Arc<Store>,
    /// The machine.
    pub runtime: PodRuntime,
    /// Where output goes; its sink was given to the runtime.
    pub outputs: Arc<Outputs>,
    /// Mints tokens for pods.
    pub tokens: Arc<Tokens>,
    /// `--image`
    pub images: Vec<ImageProgram>,
    /// The mesh's root certificate (PEM) once the control plane has it; pods with a proxy wait for it.
    pub root_cert: watch::Receiver<Option<String>>,
    /// How long a pod that is going away keeps serving after it left the endpoints, so that every
    /// client has heard of it.
    pub drain_lead: Duration,
    /// Then it also waits, for a while, until this says that everybody has heard of what changed
    /// up to a version of the store.
    pub settled: Option<Settled>,
}

/// Resolves when all proxies run the objects as they were at a version of the store.
pub type Settled = Arc<dyn Fn(u64) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

impl std::fmt::Debug for ControllerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControllerOptions").field("images", &self.images).finish_non_exhaustive()
    }
}

/// Routes what containers write to the logs of their pods.
#[derive(Default)]
pub struct Outputs {
    pods: Mutex<HashMap<PodId, NamespacedName>>,
    logs: Arc<Logs>,
}

impl std::fmt::Debug for Outputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Outputs")
    }
}

impl Outputs {
    /// Output goes to `logs`.
    pub fn new(logs: Arc<Logs>) -> Arc<Self> {
        Arc::new(Self { pods: Mutex::default(), logs })
    }

    /// The sink for [`crate::RuntimeOptions::output`].
    pub fn sink(self: &Arc<Self>) -> OutputSink {
        let outputs = Arc::clone(self);
        Arc::new(move |output: Output<'_>| {
            let pods = outputs.pods.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(name) = pods.get(&output.pod) {
                outputs.logs.append(&Logs::key(&name.namespace, &name.name, output.container), output.bytes);
            }
        })
    }

    fn set(&self, pod: PodId, name: Option<&NamespacedName>) {
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        match name {
            Some(name) => drop(pods.insert(pod, name.clone())),
            None => {
                if let Some(name) = pods.remove(&pod) {
                    self.logs.forget(&name.namespace, &name.name);
                }
            }
        }
    }
}

/// What workers share.
struct Shared {
    options: ControllerOptions,
    /// Where each pod's worker hears of ended containers, and which runtime pod it has.
    running: Mutex<BTreeMap<NamespacedName, Running>>,
    findings: Mutex<BTreeMap<NamespacedName, Finding>>,
    stopping: watch::Receiver<bool>,
}

struct Running {
    uid: Box<str>,
    id: Option<PodId>,
    exits: mpsc::UnboundedSender<(String, i32)>,
}

impl Shared {
    fn running(&self) -> std::sync::MutexGuard<'_, BTreeMap<NamespacedName, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_finding(&self, key: &NamespacedName, finding: Option<Finding>) {
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        match finding {
            Some(finding) => drop(findings.insert(key.clone(), finding)),
            None => drop(findings.remove(key)),
        }
    }
}

/// An address that something in a pod listens at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listening {
    /// What for: `inbound`, `readiness`, …; the port's name for an application's.
    pub role: String,
    /// Whose network it is in.
    pub pod: NamespacedName,
    /// Where.
    pub address: SocketAddr,
}

/// The running controller.
pub struct Controller {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Controller")
    }
}

impl Controller {
    /// Starts working. `events` are the runtime's. Must be called within a tokio runtime.
    pub fn start(options: ControllerOptions, events: mpsc::Receiver<RuntimeEvent>) -> Self {
        let (stop, stopping) = watch::channel(false);
        let shared = Arc::new(Shared { options, running: Mutex::default(), findings: Mutex::default(), stopping });
        let task = tokio::spawn(run(Arc::clone(&shared), events));
        Self { shared, stop, task: Mutex::new(Some(task)) }
    }

    /// How to enter a container.
    pub fn exec_target(&self, namespace: &str, pod: &str, container: &str) -> Result<ExecTarget, String> {
        let key = NamespacedName::new(namespace, pod);
        let id = self.shared.running().get(&key).and_then(|running| running.id);
        let id = id.ok_or_else(|| format!("pod {key} does not run"))?;
        self.shared.options.runtime.exec_target(id, container).map_err(|error| error.to_string())
    }

    /// Every TCP address that something listens at, by pod.
    pub fn listening(&self) -> Vec<Listening> {
        let pods: Vec<(NamespacedName, PodId)> =
            self.shared.running().iter().filter_map(|(key, running)| Some((key.clone(), running.id?))).collect();
        let objects = self.shared.options.store.objects();
        let of_pod = |(key, id): (NamespacedName, PodId)| {
            let pid = self.shared.options.runtime.network_pid(id)?;
            let (_, pod) = objects.get::<k8s::Pod>(&key.namespace, &key.name)?;
            let each = |address: SocketAddr| Listening {
                role: listening::role(address.port(), pod),
                pod: key.clone(),
                address,
            };
            Some(listening::addresses(pid).into_iter().map(each).collect::<Vec<_>>())
        };
        pods.into_iter().filter_map(of_pod).flatten().collect()
    }

    /// Why pods do not run, as far as their objects are to blame; once for all pods of an object.
    pub fn findings(&self) -> Vec<Finding> {
        let mut out: Vec<Finding> = Vec::new();
        for finding in self.shared.findings.lock().unwrap_or_else(PoisonError::into_inner).values() {
            if !out.contains(finding) {
                out.push(finding.clone());
            }
        }
        out
    }

    /// Whether a pod waits for something that its objects, or the machine's programs, lack.
    pub fn is_blamed(&self, pod: &NamespacedName) -> bool {
        self.shared.findings.lock().unwrap_or_else(PoisonError::into_inner).contains_key(pod)
    }

    /// Stops working; pods are left to the runtime's shutdown.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            // A panic in it was printed where it happened.
            drop(task.await);
        }
    }
}

async fn run(shared: Arc<Shared>, mut events: mpsc::Receiver<RuntimeEvent>) {
    let mut version = shared.options.store.version();
    let mut root_cert = shared.options.root_cert.clone();
    let mut stopping = shared.stopping.clone();
    let mut workers: JoinSet<NamespacedName> = JoinSet::new();
    let mut network = endpoints::Published::default();
    loop {
        version.borrow_and_update();
        root_cert.borrow_and_update();
        root_certificates(&shared);
        default_accounts(&shared.options.store);
        let due = deployment::reconcile(&shared.options.store).map(|left| Instant::now() + left);
        start_workers(&shared, &mut workers);
        network.reconcile(&shared.options.store, &shared.options.runtime).await;
        // Wait for something new; events of containers are handed on meanwhile.
        loop {
            // Order does not matter: each arm only wakes or hands on.
            tokio::select! {
                () = stopped(&mut stopping) => {
                    workers.shutdown().await;
                    return;
                }
                event = events.recv() => match event {
                    Some(RuntimeEvent::Exited { pod, container, code }) => hand_on(&shared, pod, container, code),
                    Some(RuntimeEvent::Down) | None => {
                        workers.shutdown().await;
                        return;
                    }
                },
                Some(ended) = workers.join_next() => {
                    if let Ok(key) = ended {
                        shared.running().remove(&key);
                    }
                    break;
                }
                changed = version.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    tokio::time::sleep(SETTLE).await;
                    break;
                }
                Ok(()) = root_cert.changed() => break,
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => break,
            }
        }
    }
}

/// Ready once the controller is to stop.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // A sender that is gone means stop, too.
    drop(stopping.wait_for(|stop| *stop).await.map(|_| ()));
}

fn hand_on(shared: &Shared, pod: PodId, container: String, code: i32) {
    let running = shared.running();
    if let Some(of) = running.values().find(|running| running.id == Some(pod)) {
        // A worker that is gone has removed its pod.
        drop(of.exits.send((container, code)));
    }
}

/// Every namespace has the root certificate, as Istio's control plane does it.
fn root_certificates(shared: &Shared) {
    let Some(pem) = shared.options.root_cert.borrow().clone() else { return };
    let store = &shared.options.store;
    let namespaces: Vec<Box<str>> =
        store.objects().all::<k8s::Namespace>().map(|(object, _)| object.meta.name.clone()).collect();
    for namespace in namespaces {
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": ROOT_CERT_MAP, "namespace": &*namespace, "labels": {"istio.io/config": "true"}},
            "data": {"root-cert.pem": pem}});
        report(store.put(&map));
    }
}

/// Every namespace has its default account, as Kubernetes' controller does it.
fn default_accounts(store: &Store) {
    let objects = store.objects();
    for (namespace, _) in objects.all::<k8s::Namespace>() {
        let key = NamespacedName::new(&namespace.meta.name, "default");
        if objects.find(Kind::ServiceAccount, &key).is_none() {
            let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": {"name": "default", "namespace": &*namespace.meta.name}});
            report(store.put(&account));
        }
    }
}

fn report<T>(result: Result<T, Vec<Finding>>) {
    if let Err(findings) = result {
        for finding in findings {
            tracing::error!(%finding, "an object of our own was refused");
        }
    }
}

fn start_workers(shared: &Arc<Shared>, workers: &mut JoinSet<NamespacedName>) {
    let objects = shared.options.store.objects();
    for (object, _) in objects.all::<k8s::Pod>() {
        let key = object.key();
        let mut running = shared.running();
        if running.contains_key(&key) {
            continue;
        }
        let (exits, exits_from) = mpsc::unbounded_channel();
        running.insert(key.clone(), Running { uid: object.meta.uid.clone(), id: None, exits });
        drop(running);
        workers.spawn(pod::run(Arc::clone(shared), key, object.meta.uid.clone(), exits_from));
    }
}
