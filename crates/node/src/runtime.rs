//! The parent half of the node: asks the pod manager for pods and hears what becomes of them.
//!
//! ```text
//! lateen up ── PodRuntime ──(frames, descriptors)── pod manager ── containers
//!     │  host listeners, host sockets, container output      │ switch: bridge, rules, DNS, relay
//! ```
//!
//! Everything dies with the process that holds the [`PodRuntime`]: the starter has a death signal,
//! the manager ends when the socket to its parent closes, and a pid namespace ends with its first
//! process. There is nothing to clean up afterwards.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};

use crate::exec::ExecTarget;
use crate::spec::{
    ContainerPlan, ContainerRequest, HostListener, Name, PassedFd, PodId, PodNetwork, PodPlan, PodRequest,
    ServiceAddress, Signal, Stream, VolumeFile,
};
use crate::wire::{self, Call, Facts, Numbered, Refusal, Report};
use crate::{etc, host_sockets, starter};

/// Events wait here until the controller takes them; the manager's reports wait behind them.
const EVENTS_MAX: usize = 1024;
/// One read of a container's output.
const OUTPUT_CHUNK: usize = 16 * 1024;
/// The kernel answers at once; a manager this late is stuck.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// What a running container, or a program run in one, wrote.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// Whose.
    pub pod: PodId,
    /// Which container.
    pub container: &'a str,
    /// Which stream.
    pub stream: Stream,
    /// Raw bytes as read, not cut at lines.
    pub bytes: &'a [u8],
}

/// Takes output as it comes, on a task of the runtime: must return quickly.
pub type OutputSink = Arc<dyn Fn(Output<'_>) + Send + Sync>;

/// How to start a [`PodRuntime`].
#[derive(Clone)]
pub struct RuntimeOptions {
    /// Name of the mesh; the bridge is named after it.
    pub mesh: String,
    /// A folder of the user that nobody else uses: a mount point. Made, and removed in the end.
    pub run_dir: PathBuf,
    /// Files that must not outlive the mesh, whatever way it ends (sockets). Their absence is fine.
    pub run_files: Vec<PathBuf>,
    /// Files that our process leaves half written when it is killed. Removed then, and only then.
    pub unfinished: Vec<PathBuf>,
    /// Ports of the machine for gateways.
    pub host_listeners: Vec<HostListener>,
    /// Folders of the machine that containers must not see (state with keys). Shown empty.
    pub hidden: Vec<PathBuf>,
    /// Where the output of containers goes.
    pub output: OutputSink,
}

impl std::fmt::Debug for RuntimeOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RuntimeOptions")
            .field("mesh", &self.mesh)
            .field("run_dir", &self.run_dir)
            .finish_non_exhaustive()
    }
}

/// What happened in the mesh's machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RuntimeEvent {
    /// A container's first process ended, and with it all it had started.
    Exited {
        /// Whose.
        pod: PodId,
        /// Which container.
        container: String,
        /// Exit code; 128 + signal number when a signal ended it.
        code: i32,
    },
    /// The manager is gone and all pods with it; nothing works any more.
    Down,
}

/// Why no mesh can be started here.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The kernel does not give pods what they need.
    #[error("pods cannot have networks of their own here")]
    Capture(#[from] capture::CaptureError),
    /// A host port cannot be listened on.
    #[error(
        "cannot listen on {address} for the gateway's port {port}; choose another address (port 0 picks a free one)"
    )]
    HostPort {
        /// The address asked for.
        address: SocketAddr,
        /// The gateway's port.
        port: u16,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// One of our own processes could not be started.
    #[error("cannot start the pod manager")]
    Spawn(#[source] io::Error),
    /// It ended or stayed silent.
    #[error("the pod manager ended before it was ready")]
    Silent,
}

/// Why something about a pod was not done.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The manager is gone.
    #[error("the mesh is down")]
    Down,
    /// No pod of this id (any more).
    #[error("{0} does not exist")]
    NoSuchPod(PodId),
    /// The container does not run.
    #[error("container {0:?} does not run")]
    NoSuchContainer(String),
    /// The program could not be executed.
    #[error("cannot run {program:?}: {source}")]
    Program {
        /// The program asked for.
        program: String,
        /// Usually "not found" or "permission denied".
        source: io::Error,
    },
    /// A request that makes no sense, with the reason.
    #[error("{0}")]
    Invalid(String),
    /// A step of building the pod failed.
    #[error("{step}: {source}")]
    Step {
        /// What was being done.
        step: String,
        /// What the system said.
        source: io::Error,
    },
    /// Capture rules or links failed.
    #[error(transparent)]
    Capture(#[from] capture::CaptureError),
    /// A local descriptor or socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A made pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    /// Names it in every call.
    pub id: PodId,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its second address, when the kernel gives IPv6.
    pub ip6: Option<Ipv6Addr>,
}

/// Result of a program run inside a container.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunResult {
    /// Exit code, `None` = ran out of time and was killed.
    pub code: Option<i32>,
    /// What it wrote to both streams, at most 64 KiB.
    pub output: Vec<u8>,
}

/// The mesh's machine. Clones share it; it ends with [`PodRuntime::shutdown`], with the last clone, or with the process.
#[derive(Clone)]
pub struct PodRuntime {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for PodRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PodRuntime").field("facts", &self.shared.facts).finish_non_exhaustive()
    }
}

struct Shared {
    sender: Arc<wire::Sender>,
    facts: Facts,
    state: Arc<Mutex<State>>,
    next: AtomicU64,
    listeners: Vec<(HostListener, TcpListener)>,
    output: OutputSink,
    down: watch::Receiver<bool>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.sender.close();
    }
}

type Answer = (Result<(), Refusal>, Vec<OwnedFd>);

#[derive(Default)]
struct State {
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    pods: HashMap<PodId, PodState>,
    /// What each started program is, by serial number.
    programs: HashMap<u64, Program>,
    last_ip: u32,
    down: bool,
}

struct PodState {
    ip: Ipv4Addr,
    network: PodNetwork,
    containers: BTreeMap<String, Running>,
}

#[derive(Clone)]
struct Running {
    serial: u64,
    host_pid: u32,
    env: BTreeMap<String, String>,
    cwd: Option<PathBuf>,
}

enum Program {
    Container(PodId, String),
    Run(oneshot::Sender<i32>),
}

impl PodRuntime {
    /// Starts the mesh's machine: host listeners, namespaces, switch, DNS, relay. Takes some 30 ms.
    ///
    /// Must be called within a tokio runtime. The receiver gets every event in order; a controller
    /// that stops reading it eventually stalls the runtime.
    pub async fn start(options: RuntimeOptions) -> Result<(Self, mpsc::Receiver<RuntimeEvent>), StartError> {
        // Before the ports: an earlier mesh that was killed may still hold them for a moment.
        starter::prepare(&options.run_dir).map_err(StartError::Spawn)?;
        let mut listeners = Vec::new();
        for listener in &options.host_listeners {
            let bound = bind_host(*listener).inspect_err(|_| crate::tolerate(std::fs::remove_dir(&options.run_dir)))?;
            listeners.push((*listener, bound));
        }
        let probe = starter::probe();
        let mut started = starter::start(&options).map_err(StartError::Spawn)?;
        let (ready_to, ready) = oneshot::channel();
        let (events_to, events) = mpsc::channel(EVENTS_MAX);
        let sender = Arc::new(wire::Sender::new(started.control.try_clone().map_err(StartError::Spawn)?));
        let state = Arc::new(Mutex::new(State { last_ip: FIRST_POD_IP, ..State::default() }));
        let reader = Reader { state: Arc::clone(&state), ready: Some(ready_to), events: events_to };
        std::thread::Builder::new()
            .name("pod-reports".into())
            .spawn(move || reader.run(&started.control))
            .map_err(StartError::Spawn)?;
        let ready = async {
            match tokio::time::timeout(READY_TIMEOUT, ready).await {
                Ok(Ok(Ok(facts))) => Ok(facts),
                Ok(Ok(Err(refused))) => Err(StartError::Capture(refused)),
                Ok(Err(_)) | Err(_) => Err(StartError::Silent),
            }
        };
        // The manager says which step failed; the probe finds what only shows when packets flow.
        let outcome = match tokio::join!(ready, probe) {
            (Ok(facts), Ok(())) => Ok(facts),
            (Err(error), Ok(())) => Err(error),
            (Err(error @ StartError::Capture(_)), Err(_)) => Err(error),
            (_, Err(error)) => Err(error),
        };
        let facts = match outcome {
            Ok(facts) => facts,
            Err(error) => {
                sender.close();
                // Nothing may be left when the refusal is printed.
                drop(started.down.wait_for(|down| *down).await.map(|_| ()));
                return Err(error);
            }
        };
        let shared = Shared {
            sender,
            facts,
            state,
            next: AtomicU64::new(1),
            listeners,
            output: options.output,
            down: started.down,
        };
        Ok((Self { shared: Arc::new(shared) }, events))
    }

    /// What the kernel gave.
    pub fn facts(&self) -> Facts {
        self.shared.facts
    }

    /// Where the machine listens for the gateway's `port`; tells the port that 0 picked.
    pub fn host_address(&self, port: u16) -> Option<SocketAddr> {
        let (_, socket) = self.shared.listeners.iter().find(|(listener, _)| listener.port == port)?;
        socket.local_addr().ok()
    }

    /// Makes a pod's sandbox: its address is known from here on, containers are started next.
    pub async fn create_pod(&self, request: PodRequest) -> Result<Pod, RuntimeError> {
        let pod = PodId(self.number());
        let network = capture::Network::LOCAL;
        let (ip, ip6) = match request.network {
            PodNetwork::Own => {
                let ip = self.state().reserve(pod)?;
                let [.., high, low] = ip.octets();
                let mut ip6 = network.switch6.segments();
                ip6[7] = u16::from_be_bytes([high, low]);
                (ip, Ipv6Addr::from(ip6))
            }
            PodNetwork::Switch => {
                let entry = PodState { ip: network.switch, network: PodNetwork::Switch, containers: BTreeMap::new() };
                self.state().pods.insert(pod, entry);
                (network.switch, network.switch6)
            }
        };
        let ip6_known = self.shared.facts.ipv6.then_some(ip6);
        let plan = PodPlan {
            pod,
            hostname: etc::hostname(&request),
            network: request.network,
            ip,
            ip6,
            etc: etc::files(&request, ip, ip6_known),
            redirect: request.redirect,
            volumes: request.volumes,
        };
        if let Err(error) = self.call(Call::CreatePod(Box::new(plan)), &[]).await {
            self.state().pods.remove(&pod);
            return Err(error);
        }
        Ok(Pod { id: pod, ip, ip6: ip6_known })
    }

    /// Starts a container, also again after it ended. Its end comes as [`RuntimeEvent::Exited`].
    pub async fn start_container(&self, pod: PodId, request: ContainerRequest) -> Result<(), RuntimeError> {
        let (stdout, stdout_to) = pipe()?;
        let (stderr, stderr_to) = pipe()?;
        let mut pass = Vec::new();
        let mut passed: Vec<OwnedFd> = vec![stdout_to, stderr_to];
        for &port in &request.listeners {
            let Some((_, socket)) = self.shared.listeners.iter().find(|(listener, _)| listener.port == port) else {
                return Err(RuntimeError::Invalid(format!("there is no host listener for port {port}")));
            };
            pass.push(PassedFd::Listener(port));
            passed.push(socket.as_fd().try_clone_to_owned()?);
        }
        if request.host_sockets {
            let (server, client) = host_sockets::pair()?;
            pass.push(PassedFd::HostSockets);
            passed.push(client);
            host_sockets::serve(server)?;
        }
        let serial = self.number();
        let running = Running { serial, host_pid: 0, env: request.env.clone(), cwd: request.cwd.clone() };
        let name = request.name.clone();
        {
            let mut state = self.state();
            let state = &mut *state;
            let entry = state.pods.get_mut(&pod).ok_or(RuntimeError::NoSuchPod(pod))?;
            if entry.containers.contains_key(&name) {
                return Err(RuntimeError::Invalid(format!("container {name:?} runs already")));
            }
            entry.containers.insert(name.clone(), running);
            state.programs.insert(serial, Program::Container(pod, name.clone()));
        }
        let plan = ContainerPlan { pod, serial, request, inside: None, pass };
        let fds: Vec<_> = passed.iter().map(AsFd::as_fd).collect();
        let answer = self.call(Call::Start(Box::new(plan)), &fds).await;
        drop(fds);
        drop(passed);
        let (error, is_left) = match answer.map(|fds| host_pid(&fds)) {
            Ok(Ok(host_pid)) => {
                if let Some(running) = self.state().container(pod, &name, serial) {
                    running.host_pid = host_pid;
                }
                self.follow(pod, &name, Stream::Stdout, stdout)?;
                return self.follow(pod, &name, Stream::Stderr, stderr);
            }
            Ok(Err(error)) => (error, true),
            Err(error) => (error, false),
        };
        // First, so that no end is reported of what has not started.
        self.forget(pod, &name, serial);
        if is_left {
            // It runs, but nobody could tell which process it is: it must not stay beside the next try.
            drop(self.signal(pod, &name, Signal::Kill).await);
        }
        Err(error)
    }

    fn forget(&self, pod: PodId, container: &str, serial: u64) {
        let mut state = self.state();
        state.programs.remove(&serial);
        if let Some(entry) = state.pods.get_mut(&pod) {
            entry.containers.remove(container);
        }
    }

    /// Sends a signal to a container's first process; [`Signal::Kill`] ends all of the container.
    pub async fn signal(&self, pod: PodId, container: &str, signal: Signal) -> Result<(), RuntimeError> {
        self.call(Call::Signal { pod, container: container.into(), signal }, &[]).await.map(drop)
    }

    /// Kills what runs in a pod and removes it. Exits of its containers are not reported any more.
    pub async fn delete_pod(&self, pod: PodId) -> Result<(), RuntimeError> {
        {
            let mut state = self.state();
            state.pods.remove(&pod).ok_or(RuntimeError::NoSuchPod(pod))?;
            state.programs.retain(|_, program| !matches!(program, Program::Container(whose, _) if *whose == pod));
        }
        self.call(Call::DeletePod { pod }, &[]).await.map(drop)
    }

    /// Replaces the files of a volume as one: readers see all old or all new.
    pub async fn update_volume(&self, pod: PodId, volume: &str, files: Vec<VolumeFile>) -> Result<(), RuntimeError> {
        self.call(Call::UpdateVolume { pod, volume: volume.into(), files }, &[]).await.map(drop)
    }

    /// Runs a program inside a container and waits for it (exec probes, lifecycle hooks).
    pub async fn run_in_container(
        &self,
        pod: PodId,
        container: &str,
        argv: Vec<String>,
        limit: Duration,
    ) -> Result<RunResult, RuntimeError> {
        let running = self.running(pod, container)?;
        let (output, output_to) = pipe()?;
        let serial = self.number();
        let (exited_to, exited) = oneshot::channel();
        self.state().programs.insert(serial, Program::Run(exited_to));
        let request = ContainerRequest {
            name: format!("exec-{serial}"),
            argv,
            env: running.env,
            cwd: running.cwd,
            ..ContainerRequest::default()
        };
        let name = request.name.clone();
        let plan = ContainerPlan { pod, serial, request, inside: Some(container.into()), pass: Vec::new() };
        let answer = self.call(Call::Start(Box::new(plan)), &[output_to.as_fd(), output_to.as_fd()]).await;
        drop(output_to);
        if let Err(error) = answer {
            self.state().programs.remove(&serial);
            return Err(error);
        }
        let mut reader = tokio::net::unix::pipe::Receiver::from_owned_fd(output)?;
        let mut collected = Vec::new();
        let mut exited = exited;
        let finished = tokio::time::timeout(limit, async {
            // read while it runs, or one that says much would wait for a reader
            let code = tokio::select! {
                code = &mut exited => code.ok(),
                () = collect(&mut reader, &mut collected) => (&mut exited).await.ok(),
            };
            // What it left behind may hold the pipe open; what it wrote itself is there already.
            drop(tokio::time::timeout(Duration::from_millis(50), collect(&mut reader, &mut collected)).await);
            code
        })
        .await;
        if let Ok(code) = finished {
            return Ok(RunResult { code, output: collected });
        }
        // It may have ended just now; then there is nothing to kill.
        drop(self.signal(pod, &name, Signal::Kill).await);
        Ok(RunResult { code: None, output: collected })
    }

    /// What `lateen exec` needs to run a program beside a container; see [`crate::exec`].
    pub fn exec_target(&self, pod: PodId, container: &str) -> Result<ExecTarget, RuntimeError> {
        let running = self.running(pod, container)?;
        Ok(ExecTarget {
            pid: running.host_pid,
            user_namespace: self.shared.facts.user_namespace,
            env: running.env,
            cwd: running.cwd,
        })
    }

    /// The process id of a container's first process as the machine sees it.
    pub fn host_pid(&self, pod: PodId, container: &str) -> Result<u32, RuntimeError> {
        self.running(pod, container).map(|running| running.host_pid)
    }

    /// A process in the pod's network, as the machine numbers it; none before a container runs.
    pub(crate) fn network_pid(&self, pod: PodId) -> Option<u32> {
        let state = self.state();
        let containers = &state.pods.get(&pod)?.containers;
        containers.values().map(|running| running.host_pid).find(|pid| *pid != 0)
    }

    /// Connects from the switch to an address of the mesh (a pod, a service).
    pub async fn dial(&self, to: SocketAddr) -> Result<TcpStream, RuntimeError> {
        let fds = self.call(Call::Sockets { v6: to.is_ipv6(), count: 1 }, &[]).await?;
        let socket = fds.into_iter().next().ok_or_else(no_room)?;
        Ok(TcpSocket::from_std_stream(socket.into()).connect(to).await?)
    }

    /// Binds a listener in the switch, to be served by this process.
    pub async fn switch_listener(&self, address: SocketAddr) -> Result<TcpListener, RuntimeError> {
        let fds = self.call(Call::Listen { address }, &[]).await?;
        fds.into_iter().next().map(TcpListener::from).ok_or_else(no_room)
    }

    /// Replaces the names of cluster DNS: full names, lower case, no trailing dot; `*.` as first label matches any.
    pub async fn set_names(&self, names: BTreeMap<String, Name>) -> Result<(), RuntimeError> {
        self.call(Call::SetNames(names), &[]).await.map(drop)
    }

    /// Replaces the service addresses; connections made before are not touched.
    pub async fn set_services(&self, services: Vec<ServiceAddress>) -> Result<(), RuntimeError> {
        self.call(Call::SetServices(services), &[]).await.map(drop)
    }

    /// Ends every pod and waits until nothing of them is left.
    pub async fn shutdown(&self) {
        // Down already is as good as done; closing the socket ends it too.
        drop(self.call(Call::Shutdown, &[]).await);
        self.shared.sender.close();
        let mut down = self.shared.down.clone();
        drop(down.wait_for(|down| *down).await.map(|_| ()));
    }

    fn number(&self) -> u64 {
        self.shared.next.fetch_add(1, Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    fn running(&self, pod: PodId, container: &str) -> Result<Running, RuntimeError> {
        let state = self.state();
        let entry = state.pods.get(&pod).ok_or(RuntimeError::NoSuchPod(pod))?;
        match entry.containers.get(container) {
            Some(running) if running.host_pid != 0 => Ok(running.clone()),
            _ => Err(RuntimeError::NoSuchContainer(container.into())),
        }
    }

    async fn call(&self, call: Call, fds: &[BorrowedFd<'_>]) -> Result<Vec<OwnedFd>, RuntimeError> {
        let pod = match &call {
            Call::CreatePod(plan) => Some(plan.pod),
            Call::Start(plan) => Some(plan.pod),
            Call::Signal { pod, .. } | Call::DeletePod { pod } | Call::UpdateVolume { pod, .. } => Some(*pod),
            _ => None,
        };
        let id = self.number();
        let (answer_to, answer) = oneshot::channel();
        {
            let mut state = self.state();
            if state.down {
                return Err(RuntimeError::Down);
            }
            state.waiting.insert(id, answer_to);
        }
        if self.shared.sender.send(&Numbered { id, call }, fds).is_err() {
            self.state().waiting.remove(&id);
            return Err(RuntimeError::Down);
        }
        match answer.await {
            Err(_) => Err(RuntimeError::Down),
            Ok((Ok(()), fds)) => Ok(fds),
            Ok((Err(refusal), _)) => Err(match refusal {
                Refusal::NoSuchPod => RuntimeError::NoSuchPod(pod.unwrap_or(PodId(0))),
                Refusal::NoSuchContainer(name) => RuntimeError::NoSuchContainer(name),
                Refusal::Program { program, errno } => {
                    RuntimeError::Program { program, source: io::Error::from_raw_os_error(errno) }
                }
                Refusal::Step { step, errno } => {
                    RuntimeError::Step { step, source: io::Error::from_raw_os_error(errno) }
                }
                Refusal::Capture(error) => error.into(),
            }),
        }
    }

    /// Hands a container's output on until it ends.
    fn follow(&self, pod: PodId, container: &str, stream: Stream, pipe: OwnedFd) -> Result<(), RuntimeError> {
        use tokio::io::AsyncReadExt as _;
        let mut reader = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe)?;
        let sink = Arc::clone(&self.shared.output);
        let container = container.to_owned();
        // Owner: ends by itself when the last writer of the pipe is gone, at the latest with the mesh.
        tokio::spawn(async move {
            let mut buffer = vec![0; OUTPUT_CHUNK];
            while let Ok(got @ 1..) = reader.read(&mut buffer).await {
                sink(Output { pod, container: &container, stream, bytes: &buffer[..got] });
            }
        });
        Ok(())
    }
}

/// Pod addresses below it are kept free for the switch.
const FIRST_POD_IP: u32 = 9;

impl State {
    /// The next free address, in turn, so that a freed one is not reused at once.
    fn reserve(&mut self, pod: PodId) -> Result<Ipv4Addr, RuntimeError> {
        let (net, length) = capture::Network::LOCAL.pods;
        let size = 1_u32 << (32 - u32::from(length));
        for _ in 0..size {
            self.last_ip += 1;
            if self.last_ip >= size - 1 {
                self.last_ip = FIRST_POD_IP + 1;
            }
            let ip = Ipv4Addr::from(u32::from(net) + self.last_ip);
            if !self.pods.values().any(|entry| entry.network == PodNetwork::Own && entry.ip == ip) {
                self.pods.insert(pod, PodState { ip, network: PodNetwork::Own, containers: BTreeMap::new() });
                return Ok(ip);
            }
        }
        Err(RuntimeError::Invalid("no pod address is free".into()))
    }

    fn container(&mut self, pod: PodId, name: &str, serial: u64) -> Option<&mut Running> {
        self.pods.get_mut(&pod)?.containers.get_mut(name).filter(|running| running.serial == serial)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the manager's reports on a thread of its own.
struct Reader {
    state: Arc<Mutex<State>>,
    ready: Option<oneshot::Sender<Result<Facts, capture::CaptureError>>>,
    events: mpsc::Sender<RuntimeEvent>,
}

impl Reader {
    fn run(mut self, control: &OwnedFd) {
        while let Ok(Some((report, passed))) = wire::receive::<Report>(control.as_fd()) {
            // Without the descriptors the answer still tells what was done; who needs them finds none.
            self.take(report, passed.unwrap_or_default());
        }
        let waiting = {
            let mut state = lock(&self.state);
            state.down = true;
            state.programs.clear();
            std::mem::take(&mut state.waiting)
        };
        drop(waiting);
        self.ready = None;
        self.emit(RuntimeEvent::Down);
    }

    fn take(&mut self, report: Report, fds: Vec<OwnedFd>) {
        match report {
            Report::Ready(facts) => self.settle(Ok(facts)),
            Report::Failed(error) => self.settle(Err(error)),
            Report::Reply { id, result } => {
                let waiting = lock(&self.state).waiting.remove(&id);
                if let Some(waiting) = waiting {
                    // The asker may have given up.
                    drop(waiting.send((result, fds)));
                }
            }
            Report::Exited { pod, serial, code } => {
                let program = {
                    let mut state = lock(&self.state);
                    let program = state.programs.remove(&serial);
                    if let Some(Program::Container(_, name)) = &program
                        && let Some(entry) = state.pods.get_mut(&pod)
                        && entry.containers.get(name).is_some_and(|running| running.serial == serial)
                    {
                        entry.containers.remove(name);
                    }
                    program
                };
                match program {
                    Some(Program::Container(pod, container)) => {
                        self.emit(RuntimeEvent::Exited { pod, container, code });
                    }
                    Some(Program::Run(waiting)) => drop(waiting.send(code)),
                    None => {}
                }
            }
        }
    }

    fn settle(&mut self, outcome: Result<Facts, capture::CaptureError>) {
        if let Some(ready) = self.ready.take() {
            drop(ready.send(outcome));
        }
    }

    fn emit(&self, event: RuntimeEvent) {
        // A controller that dropped the receiver does not want to know.
        drop(self.events.blocking_send(event));
    }
}

fn bind_host(listener: HostListener) -> Result<TcpListener, StartError> {
    let HostListener { port, address } = listener;
    let bind = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        Ok(TcpListener::from(socket))
    };
    bind().map_err(|source| StartError::HostPort { address, port, source })
}

/// A pipe whose reading end is for tokio.
fn pipe() -> Result<(OwnedFd, OwnedFd), RuntimeError> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from)?;
    rustix::io::ioctl_fionbio(&reader, true).map_err(io::Error::from)?;
    Ok((reader, writer))
}

async fn collect(reader: &mut tokio::net::unix::pipe::Receiver, into: &mut Vec<u8>) {
    use tokio::io::AsyncReadExt as _;
    const OUTPUT_MAX: usize = 64 * 1024;
    let mut buffer = vec![0; OUTPUT_CHUNK];
    while let Ok(got @ 1..) = reader.read(&mut buffer).await {
        let room = OUTPUT_MAX.saturating_sub(into.len());
        into.extend_from_slice(&buffer[..got.min(room)]);
    }
}

/// What the manager passed found no room in this process.
fn no_room() -> RuntimeError {
    io::Error::from_raw_os_error(libc::EMFILE).into()
}

/// The pid of a process as this namespace sees it, by the descriptor that the manager sent.
fn host_pid(fds: &[OwnedFd]) -> Result<u32, RuntimeError> {
    use std::os::fd::AsRawFd as _;
    let pidfd = fds.first().ok_or_else(no_room)?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i64>().ok());
    // -1: it ended meanwhile; its exit is on the way.
    Ok(pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0))
}
