//! `lateen up` and `lateen demo`: a whole mesh on this machine.
//!
//! ```text
//!  StateDir ─► Store ─► socket (commands, control plane)
//!               │  ▲
//!  files ───────┘  └── Controller ─► PodRuntime ─► istiod, gateways, applications
//! ```

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use node::controller::{Controller, ControllerOptions, Outputs};
use node::env::ImageProgram;
use node::files::{Files, Source};
use node::logs::Logs;
use node::server::{Api, Machine, Reviewed};
use node::state::StateDir;
use node::store::{Action, Store};
use node::token::{TokenReview, Tokens};
use node::{HostListener, PodRuntime, RuntimeEvent, RuntimeOptions, StartError};
use serde_json::{Value, json};
use tokio::sync::watch;
use types::{Finding, NamespacedName, Severity};

use crate::cli::{ExitWith, MeshArgs, exit};
use crate::{commands, output, roles};

const SYSTEM: &str = include_str!("manifests/system.yaml");
const DEMO: &str = include_str!("manifests/demo.yaml");

/// Seconds that proxies have to run what they were sent, once every pod is ready.
const SYNC_MAX: u64 = 10;

/// The kernel's limit for the path of a socket, less what `istiod/debug.sock` is longer than ours.
const SOCKET_PATH_MAX: usize = 97;

/// Seconds that the control plane has to read what findings are asked for.
const FINDINGS_MAX: u64 = 2;

/// A mesh at rest is looked at this often: certificates expire without any change.
const FINDINGS_AT_REST: Duration = Duration::from_secs(10);

/// A mesh in motion is looked at this often for new findings.
const FINDINGS_EVERY: Duration = Duration::from_millis(300);

/// How long what could not be saved rests before it is tried again.
const SAVED_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How pods get their network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Capture {
    /// Whatever works here.
    Auto,
    /// Linux namespaces, or a refusal that says what is missing.
    Namespace,
}

/// Options of `up` and `demo`.
#[derive(Args, Debug, Clone)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// File, folder, or `-`; followed for changes.
    #[arg(short = 'f', long = "filename", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Where the ingress gateway takes HTTP; port 0 picks a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    ingress_http: SocketAddr,
    /// Where the ingress gateway takes HTTPS; port 0 picks a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8443")]
    ingress_https: SocketAddr,
    /// How pods get their network.
    #[arg(long, value_enum, default_value = "auto")]
    capture: Capture,
    /// A program of this machine that plays an image.
    #[arg(long = "image", value_name = "IMAGE=COMMAND")]
    images: Vec<String>,
    /// Return when the mesh is ready; it goes on until `lateen down`.
    #[arg(long)]
    detach: bool,
    /// Seconds until everything must be ready.
    #[arg(long, default_value = "60", value_parser = crate::cli::seconds)]
    timeout: u64,
}

/// Starts a mesh with the sample application.
pub(crate) fn demo(args: &UpArgs) -> Result<()> {
    if args.detach {
        return detach(args, "demo");
    }
    let credential = demo_credential()?;
    let sources = vec![
        Source::Text("demo.yaml".into(), DEMO.into()),
        Source::Text("demo-credential.yaml".into(), credential.into()),
    ];
    start(args, sources, true)
}

/// Starts a mesh from the user's manifests.
pub(crate) fn up(args: &UpArgs) -> Result<()> {
    if args.detach {
        return detach(args, "up");
    }
    start(args, Vec::new(), false)
}

/// A certificate for `*.localhost`, made for this run.
fn demo_credential() -> Result<String> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "*.localhost".to_owned()])?;
    let indented = |pem: &str| pem.lines().map(|line| format!("    {line}\n")).collect::<String>();
    Ok(format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: demo-credential, namespace: istio-system}}\ntype: kubernetes.io/tls\nstringData:\n  tls.crt: |\n{}  tls.key: |\n{}",
        indented(&made.cert.pem()),
        indented(&made.signing_key.serialize_pem()),
    ))
}

/// Starts ourselves in the background and waits until the mesh is ready.
fn detach(args: &UpArgs, command: &str) -> Result<()> {
    let state = commands::state_dir(&args.mesh)?;
    // The log of a mesh that runs already is its own.
    drop(StateDir::open(&state)?);
    let log_path = state.join("up.log");
    let cannot = || format!("cannot write {}", log_path.display());
    drop(std::fs::File::create(&log_path).with_context(cannot)?);
    let log = std::fs::File::options().append(true).open(&log_path).with_context(cannot)?;
    let words = std::env::args_os().skip(1).filter(|word| word != "--detach");
    let mut background = std::process::Command::new(node::SELF_EXE);
    background.args(words).stdin(std::process::Stdio::inherit()).stdout(log.try_clone()?).stderr(log);
    std::os::unix::process::CommandExt::process_group(&mut background, 0);
    let mut child = background.spawn().with_context(|| format!("cannot start {command} in the background"))?;
    let deadline = Instant::now() + Duration::from_secs(args.timeout + 5);
    let client = node::client::Client::new(&commands::api_socket(&args.mesh)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    loop {
        if let Some(status) = child.try_wait()? {
            let said = std::fs::read_to_string(&log_path).unwrap_or_default();
            let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::ERROR);
            output::note(said.trim_end());
            return Err(ExitWith { code, message: "the mesh did not start".into() }.into());
        }
        let status: Result<Value, _> = runtime.block_on(client.get("/status"));
        if let Ok(status) = status
            && status["pid"] == child.id()
            && status["settled"] == true
        {
            if let Err(error) = runtime.block_on(commands::synced(&args.mesh, SYNC_MAX)) {
                output::note(&format!("{error:#}"));
            }
            commands::print_status(&status);
            if status["ready"] == true {
                if command == "demo" {
                    invite(args, &status);
                }
                return Ok(());
            }
            let wrong: Value = runtime.block_on(client.get("/findings"))?;
            output::findings(&serde_json::from_value::<Vec<Finding>>(wrong["findings"].clone())?);
            let message = "the mesh runs, but not everything is ready; `lateen down` stops it".to_owned();
            return Err(ExitWith { code: exit::ERROR, message }.into());
        }
        if Instant::now() > deadline {
            bail!("the mesh is not ready after {} s; see {}", args.timeout, log_path.display());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn image_programs(images: &[String]) -> Result<Vec<ImageProgram>> {
    let parse = |text: &String| -> Result<ImageProgram> {
        let usage = || ExitWith { code: exit::USAGE, message: format!("--image {text:?} is not IMAGE=COMMAND") };
        let (image, command) = text.split_once('=').ok_or_else(usage)?;
        let wrong = |message| ExitWith { code: exit::USAGE, message: format!("--image {text:?}: {message}") };
        let argv = node::env::words(command).map_err(wrong)?;
        if image.is_empty() || argv.is_empty() {
            return Err(usage().into());
        }
        Ok(ImageProgram { image: image.to_owned(), argv })
    };
    images.iter().map(parse).collect()
}

/// What the local socket asks of us.
struct Mesh {
    name: String,
    store: Arc<Store>,
    tokens: Arc<Tokens>,
    files: Arc<Files>,
    runtime: PodRuntime,
    controller: OnceLock<Controller>,
    shutdown: watch::Sender<bool>,
}

impl Machine for Mesh {
    fn review(&self, token: &str, audience: &str) -> Option<Reviewed> {
        let review = TokenReview { token: token.to_owned(), audience: audience.to_owned() };
        let answer = self.tokens.review(&review, &self.store.objects(), jiff::Timestamp::now().as_second());
        answer.authenticated.then_some(Reviewed {
            namespace: answer.namespace,
            service_account: answer.service_account,
            pod: answer.pod,
        })
    }

    fn status(&self) -> Value {
        let pods = pods(&self.store);
        let ready = is_ready(&self.store, &pods);
        let address = |port: u16| self.runtime.host_address(port).map(|address| address.to_string());
        json!({
            "name": self.name,
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "ready": ready,
            "settled": ready || self.is_settled(&pods),
            "resourceVersion": *self.store.version().borrow(),
            "pods": pods,
            "addresses": { "ingress-http": address(8080), "ingress-https": address(8443) },
            "listening": self.listening(),
        })
    }

    fn exec(&self, namespace: &str, pod: &str, container: &str) -> Result<Value, String> {
        let controller = self.controller.get().ok_or("the mesh is starting")?;
        let target = controller.exec_target(namespace, pod, container)?;
        serde_json::to_value(target).map_err(|error| error.to_string())
    }

    fn findings(&self) -> Vec<Finding> {
        let mut all = self.files.findings();
        all.extend(self.controller.get().map(Controller::findings).unwrap_or_default());
        for finding in &mut all {
            self.files.place(finding);
        }
        all
    }

    fn changed(&self) {}

    fn shutdown(&self) {
        self.shutdown.send_replace(true);
    }
}

impl Mesh {
    /// Whether all that can be ready is: the pods that are not lack something that only the user has.
    fn is_settled(&self, pods: &[Value]) -> bool {
        let Some(controller) = self.controller.get() else { return false };
        let is_blamed = |pod: &Value| {
            let text = |key: &str| pod[key].as_str().unwrap_or_default();
            controller.is_blamed(&NamespacedName::new(text("namespace"), text("name")))
        };
        // Ready pods alone settle nothing: their deployment says a moment later that it is complete.
        let mut unready = pods.iter().filter(|pod| pod["is_ready"] != true).peekable();
        unready.peek().is_some() && has_all_pods(&self.store) && unready.all(is_blamed)
    }

    /// Every listening address with its role and pod: those of the machine first, then each pod's.
    fn listening(&self) -> Vec<Value> {
        let row = |role: &str, namespace: &str, pod: &str, address: SocketAddr| json!({ "role": role, "namespace": namespace, "pod": pod, "address": address.to_string() });
        let mut rows = Vec::new();
        let objects = self.store.objects();
        for pod in objects.of_kind(api::Kind::Pod) {
            let Some(ports) = pod.meta.annotations.get(types::wellknown::annotations::HOST_PORTS) else { continue };
            for port in ports.split(',').filter_map(|port| port.trim().parse::<u16>().ok()) {
                if let Some(address) = self.runtime.host_address(port) {
                    let role = if port == 8443 { "ingress-https" } else { "ingress-http" };
                    rows.push(row(role, &pod.meta.namespace, &pod.meta.name, address));
                }
            }
        }
        for one in self.controller.get().map(Controller::listening).unwrap_or_default() {
            rows.push(row(&one.role, &one.pod.namespace, &one.pod.name, one.address));
        }
        rows
    }
}

/// Whether every deployment has as many pods as it wants, ready or not.
fn has_all_pods(store: &Store) -> bool {
    let objects = store.objects();
    objects.of_kind(api::Kind::Deployment).all(|deployment| {
        let wanted = deployment.raw["spec"]["replicas"].as_u64().unwrap_or(1);
        deployment.raw["status"]["replicas"].as_u64().unwrap_or(0) >= wanted
    })
}

/// Whether there are pods, as many as wanted, and every one of them is ready.
fn is_ready(store: &Store, pods: &[Value]) -> bool {
    !pods.is_empty() && pods.iter().all(|pod| pod["is_ready"] == true) && is_complete(store)
}

/// Whether every deployment has as many ready pods as it wants.
fn is_complete(store: &Store) -> bool {
    let objects = store.objects();
    objects.of_kind(api::Kind::Deployment).all(|deployment| {
        let wanted = deployment.raw["spec"]["replicas"].as_u64().unwrap_or(1);
        deployment.raw["status"]["readyReplicas"].as_u64().unwrap_or(0) >= wanted
    })
}

fn pods(store: &Store) -> Vec<Value> {
    let objects = store.objects();
    let row = |pod: &Arc<api::Object>| {
        let raw = &pod.raw;
        let (statuses, all) = commands::lasting(raw);
        let ready = statuses.iter().filter(|status| status["ready"] == true).count();
        json!({
            "namespace": pod.meta.namespace,
            "name": pod.meta.name,
            "ready": format!("{ready}/{all}"),
            "is_ready": ready == all || raw["status"]["phase"] == "Succeeded",
            "status": commands::pod_status(raw),
            "address": raw["status"]["podIP"],
            "version": pod.meta.labels.get("version").map_or("-", String::as_str),
        })
    };
    objects.of_kind(api::Kind::Pod).map(row).collect()
}

fn system_manifests(state: &Path, trust_domain: &str) -> String {
    SYSTEM
        // A string of JSON is one of YAML, whatever is in it.
        .replace("@STATE@", &json!(state.display().to_string()).to_string())
        .replace("@SWITCH@", &node::SWITCH_IP.to_string())
        .replace("@TRUST_DOMAIN@", trust_domain)
}

fn start(args: &UpArgs, mut sources: Vec<Source>, is_demo: bool) -> Result<()> {
    let began = Instant::now();
    node::raise_descriptors();
    for path in &args.files {
        if path.as_os_str() == "-" {
            let text = commands::read_stdin()?;
            sources.push(Source::Text("-".into(), text.into()));
        } else {
            sources.push(Source::open(path).with_context(|| format!("cannot read {}", path.display()))?);
        }
    }
    if sources.is_empty() {
        return Err(ExitWith {
            code: exit::USAGE,
            message: "nothing to run: give -f PATH, or try `lateen demo`".into(),
        }
        .into());
    }
    let images = image_programs(&args.images)?;
    let state = commands::state_dir(&args.mesh)?;
    let socket = commands::api_socket(&args.mesh)?;
    if socket.as_os_str().len() > SOCKET_PATH_MAX {
        let message = format!(
            "the path {} is too long for a socket: {SOCKET_PATH_MAX} bytes; give a shorter --state-dir",
            socket.display()
        );
        return Err(ExitWith { code: exit::ERROR, message }.into());
    }
    let state_dir = StateDir::open(&state)?;
    let (store, findings) = Store::open(state_dir)?;
    output::findings(&findings);
    refuse_missing(&sources, &store)?;
    let store = Arc::new(store);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(args, &state, store, sources, images, is_demo, began))
}

/// A path that is not there is a slip, unless a mesh of it ran here before: that one goes on with what
/// it had.
fn refuse_missing(sources: &[Source], store: &Store) -> Result<()> {
    let known = store.of_files();
    let is_known = |path: &Path| known.iter().any(|(_, _, file)| Path::new(&**file).starts_with(path));
    for source in sources {
        if let Source::Path(path) = source
            && let Err(error) = path.metadata()
            && error.kind() == std::io::ErrorKind::NotFound
            && !is_known(path)
        {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
    }
    Ok(())
}

async fn run(
    args: &UpArgs,
    state: &Path,
    store: Arc<Store>,
    sources: Vec<Source>,
    images: Vec<ImageProgram>,
    is_demo: bool,
    began: Instant,
) -> Result<()> {
    let logs = Arc::new(Logs::new());
    let outputs = Outputs::new(Arc::clone(&logs));
    let run_dir = state.join("run");
    let plane_dir = state.join("istiod");
    std::fs::create_dir_all(&plane_dir).with_context(|| format!("cannot make {}", plane_dir.display()))?;
    let ca_dir = plane_dir.join("ca");
    discovery::ca::store::check(&ca_dir, SystemTime::now()).with_context(|| {
        format!("the mesh's CA cannot be used: put its files back, or remove {} for a new one", ca_dir.display())
    })?;
    let socket = commands::api_socket(&args.mesh)?;
    output::progress("making the mesh's network");
    let options = RuntimeOptions {
        mesh: args.mesh.name.clone(),
        run_dir,
        run_files: vec![socket.clone(), commands::debug_socket(&args.mesh)?],
        unfinished: vec![StateDir::unfinished(state)],
        host_listeners: vec![
            HostListener { port: 8080, address: args.ingress_http },
            HostListener { port: 8443, address: args.ingress_https },
        ],
        // Keys and sockets, also those of the user's other meshes: an application has the user's rights.
        hidden: std::iter::once(state.to_owned()).chain(commands::meshes_dir()).collect(),
        output: outputs.sink(),
    };
    let (pods, events) = PodRuntime::start(options).await.map_err(|error| {
        let flag = match &error {
            StartError::HostPort { port: 8443, .. } => Some("--ingress-https"),
            StartError::HostPort { .. } => Some("--ingress-http"),
            _ => None,
        };
        let error = anyhow::Error::new(error);
        match flag {
            Some(flag) => error.context(format!("{flag} cannot be served")),
            None => error,
        }
    })?;
    let files = Arc::new(Files::new(sources, Arc::clone(&store)));
    admit_system(&store, state)?;
    files.sync()?;
    output::progress("");
    let said = Said::of(&files.findings());
    output::findings(&files.findings());
    let grave = files.findings().iter().filter(|finding| finding.severity == Severity::Error).count();
    if grave > 0 {
        let errors = commands::errors(grave);
        output::note(&format!("{errors}; what is not admitted keeps its last good version, the rest runs"));
    }
    let tokens = Arc::new(Tokens::new());
    let (shutdown, mut stopping) = watch::channel(false);
    let mesh = Arc::new(Mesh {
        name: args.mesh.name.clone(),
        store: Arc::clone(&store),
        tokens: Arc::clone(&tokens),
        files: Arc::clone(&files),
        runtime: pods.clone(),
        controller: OnceLock::new(),
        shutdown,
    });
    let listener = node::server::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    let api = Api { store: Arc::clone(&store), logs, machine: Arc::clone(&mesh) as Arc<dyn Machine> };
    let serving = tokio::spawn(node::server::serve(listener, api));

    let root_file = plane_dir.join("root-cert.pem");
    // A root of an earlier run is not to be trusted before the control plane says so again.
    _ = std::fs::remove_file(&root_file);
    let (root_sender, root_cert) = watch::channel(None);
    let reading = tokio::spawn(follow_root(root_file, root_sender));
    let (events_out, controller_events) = tokio::sync::mpsc::channel(1024);
    let (down, mut is_down) = watch::channel(false);
    let forwarding = tokio::spawn(forward(events, events_out, down));
    let controller = Controller::start(
        ControllerOptions {
            store: Arc::clone(&store),
            runtime: pods.clone(),
            outputs,
            tokens,
            images,
            root_cert,
            drain_lead: Duration::from_millis(300),
            settled: Some(settled(&args.mesh)),
        },
        controller_events,
    );
    _ = mesh.controller.set(controller);

    let working = async {
        let is_ready = wait_ready(&mesh, Duration::from_secs(args.timeout)).await;
        if is_ready && let Err(error) = commands::synced(&args.mesh, SYNC_MAX).await {
            output::note(&format!("{error:#}"));
        }
        announce(args, &mesh, is_ready, is_demo, began);
        tokio::join!(follow_files(&files), follow_findings(args, &mesh, said));
    };
    let lost = tokio::select! {
        () = working => false,
        () = roles::told_to_stop() => false,
        _ = stopping.wait_for(|stop| *stop) => false,
        _ = is_down.wait_for(|down| *down) => true,
    };
    output::note("stopping");
    if let Some(controller) = mesh.controller.get() {
        _ = tokio::time::timeout(Duration::from_secs(35), controller.stop()).await;
    }
    pods.shutdown().await;
    for task in [serving, reading, forwarding] {
        task.abort();
    }
    if lost {
        bail!("the pod manager is gone, and all pods with it");
    }
    Ok(())
}

/// Asks the control plane, so that a pod that goes away serves until no proxy knows it any more.
fn settled(mesh: &MeshArgs) -> node::controller::Settled {
    let mesh = mesh.clone();
    Arc::new(move |version| {
        let mesh = mesh.clone();
        Box::pin(async move {
            // Without a control plane nobody hears of anything.
            _ = commands::synced_at(&mesh, version, 3).await;
        })
    })
}

fn admit_system(store: &Store, state: &Path) -> Result<()> {
    let trust_domain = types::wellknown::DEFAULT_TRUST_DOMAIN;
    let documents = api::parse_documents("system.yaml", &system_manifests(state, trust_domain));
    for parsed in documents.objects {
        // A user's object of the same name wins.
        if store.file_of(parsed.object.kind, &parsed.object.key()).is_none() {
            store.put(&parsed.object.raw).map_err(|findings| {
                anyhow::anyhow!("{}", findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
            })?;
        }
    }
    let errors: Vec<String> = documents
        .findings
        .iter()
        .filter(|finding| finding.severity == Severity::Error)
        .map(ToString::to_string)
        .collect();
    if !errors.is_empty() {
        bail!("{}", errors.join("; "));
    }
    Ok(())
}

async fn follow_root(path: PathBuf, to: watch::Sender<Option<String>>) {
    let mut every = tokio::time::interval(Duration::from_millis(20));
    let mut slow = false;
    loop {
        every.tick().await;
        if let Ok(text) = std::fs::read_to_string(&path)
            && to.borrow().as_deref() != Some(text.as_str())
        {
            to.send_replace(Some(text));
        }
        if !slow && to.borrow().is_some() {
            slow = true;
            every = tokio::time::interval(Duration::from_secs(1));
        }
    }
}

async fn forward(
    mut events: tokio::sync::mpsc::Receiver<RuntimeEvent>,
    to: tokio::sync::mpsc::Sender<RuntimeEvent>,
    down: watch::Sender<bool>,
) {
    while let Some(event) = events.recv().await {
        if event == RuntimeEvent::Down {
            down.send_replace(true);
        }
        if to.send(event).await.is_err() {
            return;
        }
    }
}

/// Waits for changes until everything is ready (`true`), or all that can be, or the time is up.
async fn wait_ready(mesh: &Mesh, patience: Duration) -> bool {
    let mut version = mesh.store.version();
    let ready = async {
        loop {
            let pods = pods(&mesh.store);
            if is_ready(&mesh.store, &pods) {
                return true;
            }
            if mesh.is_settled(&pods) {
                return false;
            }
            let count = pods.iter().filter(|pod| pod["is_ready"] == true).count();
            output::progress(&format!("{count} of {} pods are ready", pods.len()));
            if version.changed().await.is_err() {
                return false;
            }
        }
    };
    let is_ready = tokio::time::timeout(patience, ready).await.unwrap_or(false);
    output::progress("");
    is_ready
}

/// Applies what changes in the files, and says what became of it. What cannot be saved is tried again, and said
/// once. Ends never.
async fn follow_files(files: &Files) {
    let mut told = None;
    loop {
        match files.changed().await {
            Ok(outcomes) => {
                told = None;
                report_round(&outcomes);
            }
            Err(error) => {
                let error = error.to_string();
                if told.as_ref() != Some(&error) {
                    output::error(&error);
                    told = Some(error);
                }
                tokio::time::sleep(SAVED_AGAIN_AFTER).await;
            }
        }
    }
}

/// Says what is found wrong after each change, and what goes wrong without one. Ends never.
async fn follow_findings(args: &UpArgs, mesh: &Mesh, mut said: Said) {
    let (mut version, mut rounds) = (mesh.store.version(), mesh.files.rounds());
    loop {
        version.mark_unchanged();
        rounds.mark_unchanged();
        said.all_new(&args.mesh, mesh).await;
        tokio::select! {
            // A rollout is many changes.
            Ok(()) = version.changed() => tokio::time::sleep(FINDINGS_EVERY).await,
            Ok(()) = rounds.changed() => {}
            () = tokio::time::sleep(FINDINGS_AT_REST) => {}
        }
    }
}

/// Findings that were printed: each is said once, and again when it comes back.
struct Said(BTreeSet<String>);

impl Said {
    fn of(findings: &[Finding]) -> Self {
        Self(findings.iter().map(ToString::to_string).collect())
    }

    /// Prints what is new among the findings of files, pods and control plane.
    async fn all_new(&mut self, args: &MeshArgs, mesh: &Mesh) {
        let mut all = mesh.findings();
        // The control plane reads behind the store. Without one there is nothing more to say.
        let version = *mesh.store.version().borrow();
        if commands::synced_at(args, version, FINDINGS_MAX).await.is_ok()
            && let Ok(of_plane) = commands::mesh_findings(args).await
        {
            all.extend(of_plane);
        }
        for finding in &mut all {
            mesh.files.place(finding);
        }
        let now = Self::of(&all);
        let mut fresh: Vec<Finding> = Vec::new();
        for finding in all {
            if !self.0.contains(&finding.to_string()) && !fresh.contains(&finding) {
                fresh.push(finding);
            }
        }
        output::findings(&fresh);
        *self = now;
    }
}

fn report_round(outcomes: &[node::store::Outcome]) {
    for outcome in outcomes.iter().filter(|outcome| !matches!(outcome.action, Action::Unchanged | Action::Refused)) {
        if let Some(object) = &outcome.object {
            let word = match outcome.action {
                Action::Created => "created",
                Action::Deleted => "deleted",
                _ => "configured",
            };
            output::line(&format!("{}/{} {word}", object.kind.to_lowercase(), object.name));
        }
    }
}

fn announce(args: &UpArgs, mesh: &Mesh, is_ready: bool, is_demo: bool, began: Instant) {
    let status = mesh.status();
    output::line("");
    commands::print_status(&status);
    output::line("");
    if is_ready {
        output::line(&output::green(&format!("Ready after {:.1} s.", began.elapsed().as_secs_f64())));
    } else {
        output::error("not everything is ready; see STATUS above, what follows, and `lateen logs`");
    }
    if is_demo {
        invite(args, &status);
    }
    output::line("\nCtrl-C stops everything.");
}

/// Says where the demo's pages are and what to try.
fn invite(args: &UpArgs, status: &Value) {
    let http = status["addresses"]["ingress-http"].as_str().unwrap_or("-");
    let mails = http.rsplit(':').next().unwrap_or_default();
    output::line(&format!("\n  Open {} in a browser;", output::bold(&format!("http://{http}/productpage"))));
    output::line(&format!("  mail arrives at {}.\n", output::bold(&format!("http://maildev.localhost:{mails}/"))));
    output::line("Try next: (in another terminal)");
    for command in next_commands(&args.mesh, &program(), http) {
        output::line(&format!("  {command}"));
    }
    if in_path("curl").is_none() {
        output::line("  (the first and the third need curl, which is not installed here)");
    }
}

/// Five commands that show what a mesh does. Each can be pasted as it is.
fn next_commands(mesh: &MeshArgs, program: &str, http: &str) -> [String; 5] {
    let mut which = String::new();
    if mesh.name != "lateen" {
        which += &format!(" --name {}", mesh.name);
    }
    if let Some(dir) = &mesh.state_dir {
        which += &format!(" --state-dir {}", dir.display());
    }
    [
        format!("curl -s http://{http}/productpage | grep 'served by'   # again: three versions take turns"),
        format!("{program} get pods -A{which}"),
        format!("{program} exec deploy/productpage-v1 -n bookinfo{which} -- curl -s reviews:9080/reviews/0"),
        format!("{program} explain --from deploy/productpage-v1 -n bookinfo{which} GET http://reviews:9080/reviews/0"),
        format!("{program} explain --from gateway{which} GET http://{http}/nowhere"),
    ]
}

/// Where `PATH` finds a program.
fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|found| found.is_file())
}

/// How this program is called: by its name where `PATH` finds it, else by its path.
fn program() -> String {
    let Ok(own) = std::env::current_exe() else { return "lateen".to_owned() };
    if in_path("lateen").and_then(|found| found.canonicalize().ok()) == Some(own.clone()) {
        return "lateen".to_owned();
    }
    let here = std::env::current_dir().unwrap_or_default();
    match own.strip_prefix(&here) {
        Ok(inside) => Path::new(".").join(inside).display().to_string(),
        Err(_) => own.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_to_try_name_the_mesh_they_are_for() {
        let mesh = |name: &str, dir: Option<&str>| MeshArgs { name: name.into(), state_dir: dir.map(Into::into) };
        let said = next_commands(&mesh("lateen", None), "lateen", "127.0.0.1:8080");
        assert!(said[1].ends_with("lateen get pods -A") && said[0].contains("http://127.0.0.1:8080/productpage"));
        for command in &next_commands(&mesh("two", Some("/s")), "./lateen", "127.0.0.1:1")[1..] {
            assert!(command.starts_with("./lateen ") && command.contains(" --name two --state-dir /s"), "{command}");
        }
    }

    #[test]
    fn our_own_manifests_are_admitted() {
        let credential = demo_credential().unwrap();
        for (name, text) in [
            ("system", system_manifests(Path::new("/s \"x\\y"), "cluster.local")),
            ("demo", DEMO.to_owned()),
            ("credential", credential),
        ] {
            let documents = api::parse_documents(name, &text);
            assert!(documents.findings.is_empty(), "{:#?}", documents.findings);
            assert!(!documents.objects.is_empty());
        }
    }
}
