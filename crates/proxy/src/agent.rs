//! The agent of a foreign data plane: an Envoy in place of our workers.
//!
//! ```text
//!  CA ◄──── certificates ──── agent ──► SDS socket ──► Envoy ◄──► traffic
//!  control plane ◄──── xDS ── agent ◄── XDS socket ─── Envoy
//!  application ── DNS ──────► agent                     │ admin
//!  kubelet ── readiness, metrics ──► agent ◄────────────┘
//! ```
//!
//! `binaryPath` of the mesh's `defaultConfig` or of a pod's `proxy.istio.io/config` chooses the
//! program. It gets a bootstrap and two sockets; keys, tokens and names stay with the agent, so
//! that any Envoy of its own build runs unchanged. Where the workload's certificate is mounted, its
//! files are in place of the CA. The agent lives as long as its Envoy: when one ends, so does the
//! other, and the pod starts both anew.
//!
//! *Source*: Istio's agent: places, ports, drain before the end.

mod bootstrap;
mod secrets;
mod status;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::SecretDiscoveryServiceServer;
use envoy_types::pb::google::protobuf::Any;
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::process::{Child, Command};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use types::wellknown::ports;
use xds::relay::Relay;
use xds::server::Ads;

use crate::control::Signals;
use crate::dns::NameTable;
use crate::options::{Options, Role};
use crate::proxy::RunError;

/// Where the agent and its Envoy meet.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// Serves the workload's certificate and roots.
    pub(crate) sds: PathBuf,
    /// Leads to the control plane.
    pub(crate) xds: PathBuf,
    /// The Envoy's bootstrap.
    pub(crate) bootstrap: PathBuf,
}

impl Default for Places {
    /// Istio's, under `/`.
    fn default() -> Self {
        Self {
            sds: "/var/run/secrets/workload-spiffe-uds/socket".into(),
            xds: "/etc/istio/proxy/XDS".into(),
            bootstrap: "/etc/istio/proxy/envoy-rev.json".into(),
        }
    }
}

/// Why an agent ended, other than by a signal.
#[derive(Debug, Error)]
pub enum AgentError {
    /// It could not start.
    #[error(transparent)]
    Start(#[from] RunError),
    /// There is no control plane to be an agent for.
    #[error("an agent needs a control plane")]
    NoPlane,
    /// The workload has no identity.
    #[error("an agent needs a CA, or the workload's certificate in files")]
    NoIdentity,
    /// A socket or file of the agent's cannot be made.
    #[error("cannot make {path}")]
    Place {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The program does not start.
    #[error("cannot run {program} (binaryPath of the proxy's configuration)")]
    Program {
        /// Which.
        program: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The program ended by itself.
    #[error("{program} ended: {status}")]
    Ended {
        /// Which.
        program: PathBuf,
        /// How.
        status: ExitStatus,
    },
}

/// Runs `program` as the data plane until a signal comes and it has drained. Blocks.
///
/// *Errors*: it does not start, or ends by itself.
pub fn run(options: Options, program: &Path) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| RunError::Start("the agent's runtime", error))?;
    runtime.block_on(Box::pin(supervise(options, program, &Places::default())))
}

async fn supervise(mut options: Options, program: &Path, places: &Places) -> Result<(), AgentError> {
    let Some(plane) = options.xds.take() else { return Err(AgentError::NoPlane) };
    let shared = crate::proxy::shared(&mut options)?;
    // Whatever runs here ends with the set.
    let mut tasks = JoinSet::new();
    // As with our own data plane, the control plane is shown what its CA issued, and nothing that others provide.
    let (identities, shown) = match (options.identity_files.take(), options.ca.take()) {
        (Some(paths), _) => (secrets::of_files(paths, &mut tasks).map_err(RunError::Identity)?, None),
        (None, Some(ca)) => {
            let (agent, identities) = identity::agent::Agent::new(options.renewal.asking(ca));
            tasks.spawn(agent.run());
            (identities.clone(), Some(identities))
        }
        (None, None) => return Err(AgentError::NoIdentity),
    };

    let service = SecretDiscoveryServiceServer::new(Ads::new(secrets::follow(identities.clone(), &mut tasks), "agent"));
    tasks.spawn(serve(bind(&places.sds)?, Routes::new(service)));
    let (relay, names) = Relay::new(crate::control::dialer(plane, shown));
    tasks.spawn(serve(bind(&places.xds)?, Routes::new(AggregatedDiscoveryServiceServer::new(relay))));
    if let Some(address) = options.addresses.dns {
        let table = Arc::new(ArcSwap::from_pointee(NameTable::default()));
        tasks.spawn(take_names(names, Arc::clone(&table)));
        let failed = |source| RunError::Listen { address, what: "dns", source };
        crate::dns::serve(address, table, options.dns_upstream.clone(), Arc::clone(&shared)).await.map_err(failed)?;
    }
    let admin = options.addresses.admin.unwrap_or(SocketAddr::from(([127, 0, 0, 1], ports::PROXY_ADMIN)));
    let (asks_end, mut end_asked) = mpsc::channel(1);
    for (what, address) in [("readiness", options.addresses.readiness), ("merged", options.addresses.merged)] {
        let Some(address) = address else { continue };
        let failed = |source| RunError::Listen { address, what, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let context = status::Context {
            admin,
            app_metrics: options.app_metrics.clone(),
            end: asks_end.clone(),
            role: options.role,
            identities: identities.clone(),
        };
        tasks.spawn(status::serve(listener, context));
    }
    for (port, socket) in options.inherited.drain(..) {
        let failed = |error| RunError::Start("an inherited listener", error);
        let listener = std::net::TcpListener::from(socket);
        listener.set_nonblocking(true).map_err(failed)?;
        tasks.spawn(carry(TcpListener::from_std(listener).map_err(failed)?, port));
    }

    let text = bootstrap::document(&options, admin, places).to_string();
    std::fs::write(&places.bootstrap, text)
        .map_err(|source| AgentError::Place { path: places.bootstrap.clone(), source })?;
    let mut envoy = start(program, &options, &places.bootstrap)?;
    let mut signals = if options.take_signals { Signals::new() } else { Signals::default() };
    let ended = |status| AgentError::Ended { program: program.to_owned(), status };
    let lost = |source| AgentError::Program { program: program.to_owned(), source };
    // A dead Envoy is dead, whatever else comes.
    tokio::select! {
        biased;
        status = envoy.wait() => return Err(ended(status.map_err(lost)?)),
        () = signals.any() => {}
        _ = end_asked.recv() => {}
    }
    tracing::info!("draining before the end");
    // A second signal, or the Envoy's own end, makes it short.
    tokio::select! {
        () = drain(admin, &options) => {}
        () = signals.any() => {}
        _ = envoy.wait() => {}
    }
    stop(envoy).await;
    Ok(())
}

/// Makes a socket that only our own user may open.
fn bind(path: &Path) -> Result<UnixListener, AgentError> {
    let make = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        // Of an earlier run of this container.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    make().map_err(|source| AgentError::Place { path: path.to_owned(), source })
}

async fn serve(listener: UnixListener, routes: Routes) {
    let incoming = UnixListenerStream::new(listener);
    if let Err(error) = tonic::transport::Server::builder().add_routes(routes).serve_with_incoming(incoming).await {
        tracing::error!(error = %identity::agent::describe(&error), "a socket of the agent is not served any more");
    }
}

/// Names that the control plane sent, for the application's DNS.
async fn take_names(mut names: watch::Receiver<Option<Any>>, table: Arc<ArcSwap<NameTable>>) {
    while names.changed().await.is_ok() {
        match names.borrow_and_update().as_ref().map(NameTable::parse) {
            Some(Ok(parsed)) => table.store(Arc::new(parsed)),
            Some(Err(reason)) => tracing::warn!(reason, "the name table is not readable; the last one stays"),
            None => {}
        }
    }
}

/// Connections of one listener of the machine's at the same time; more wait in the kernel.
const CARRIED_MAX: usize = 1024;

/// Carries connections from a listener of the machine's network to the Envoy's own, which cannot
/// inherit it. The Envoy sees them come from the pod itself.
async fn carry(listener: TcpListener, port: u16) {
    let slots = Arc::new(Semaphore::new(CARRIED_MAX));
    let mut carried = JoinSet::new();
    loop {
        while carried.try_join_next().is_some() {}
        // The semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let mut outside = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, port, "cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        carried.spawn(async move {
            let carrying = async {
                let mut inside = TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, port)).await?;
                outside.set_nodelay(true)?;
                inside.set_nodelay(true)?;
                tokio::io::copy_bidirectional(&mut outside, &mut inside).await
            };
            if let Err(error) = carrying.await {
                tracing::debug!(%error, port, "a carried connection ended");
            }
            drop(slot);
        });
    }
}

fn start(program: &Path, options: &Options, bootstrap: &Path) -> Result<Child, AgentError> {
    let mut command = Command::new(program);
    command.arg("-c").arg(bootstrap);
    command.arg("--drain-time-s").arg(options.drain_time.as_secs().to_string());
    // No second Envoy takes over from this one; without it no shared memory is needed.
    command.args(["--drain-strategy", "immediate", "--disable-hot-restart"]);
    command.args(["-l", "warning", "--component-log-level", "misc:error", "--skip-deprecated-logs"]);
    if options.concurrency > 0 {
        command.arg("--concurrency").arg(options.concurrency.to_string());
    }
    command.stdin(Stdio::null()).kill_on_drop(true);
    command.spawn().map_err(|source| AgentError::Program { program: program.to_owned(), source })
}

/// Lets connections leave, as long as [`crate::Termination`] says.
async fn drain(admin: SocketAddr, options: &Options) {
    if let Err(error) = status::ask(admin, Method::POST, status::drain_path(options.role)).await {
        tracing::warn!(error, "the Envoy does not drain");
    }
    let termination = options.termination;
    if !termination.exit_on_zero {
        tokio::time::sleep(termination.drain).await;
        return;
    }
    let not_before = Instant::now() + termination.minimum;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if Instant::now() >= not_before && status::connections(admin).await == Some(0) {
            return;
        }
    }
}

/// How long an Envoy that was told to end may take.
const END_MAX: Duration = Duration::from_secs(5);

async fn stop(mut envoy: Child) {
    let pid = envoy.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    // It may have ended already: then it has no id, or nobody has it.
    if pid.is_some_and(|pid| kill_process(pid, Signal::TERM).is_ok())
        && tokio::time::timeout(END_MAX, envoy.wait()).await.is_err()
    {
        tracing::warn!("the Envoy did not end in time");
    }
    // What is left is killed when its handle is dropped.
}

/// Whether listeners of this role drain on one side only.
fn drains_inbound_only(role: Role) -> bool {
    role == Role::Sidecar
}
