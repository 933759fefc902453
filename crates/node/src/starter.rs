//! Starting the mesh's machine: a short chain of our own binary.
//!
//! ```text
//! lateen up ─► starter (makes namespaces, then waits) ─► manager (pid 1 of the mesh)
//! ```
//!
//! The starter must be single-threaded, and the first child after `unshare(NEWPID)` becomes pid 1:
//! hence two processes. The starter outlives everything else: it removes the files that must not
//! outlive the mesh, also when its parent was killed.
//!
//! Both are `/proc/self/exe` with a hidden first argument, see
//! [`crate::internal_main`]. Standard input of both is the socket to the parent, standard output the
//! client end of its host-socket service.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use capture::{CaptureError, Step};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::host_sockets;
use crate::runtime::{RuntimeOptions, StartError};
use crate::spec::SELF_EXE;
use crate::wire::{Report, Sender};

/// Hidden first arguments of the binary.
pub(crate) const STARTER: &str = "node-starter";
/// See [`STARTER`].
pub(crate) const MANAGER: &str = "node-manager";
/// See [`STARTER`].
pub(crate) const PROBE: &str = "node-probe";

/// A mesh whose parent was killed is gone within some 50 ms; one that is not is stuck in the kernel.
const REMAINS_MAX: Duration = Duration::from_secs(10);

/// What starter and manager are told, as one argument.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) mesh: String,
    pub(crate) run_dir: PathBuf,
    pub(crate) run_files: Vec<PathBuf>,
    pub(crate) unfinished: Vec<PathBuf>,
    pub(crate) hidden: Vec<PathBuf>,
    pub(crate) user_namespace: bool,
}

/// A starter that runs.
pub(crate) struct Started {
    /// Frames to and from the manager.
    pub(crate) control: OwnedFd,
    /// Turns true when starter and manager are gone.
    pub(crate) down: watch::Receiver<bool>,
}

/// Root with the rights of an administrator needs no user namespace; everybody else gets one.
pub(crate) fn needs_user_namespace() -> bool {
    use rustix::thread::CapabilitySet;
    let wanted = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW | CapabilitySet::SETPCAP;
    let effective = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    !(rustix::process::geteuid().is_root() && effective.contains(wanted))
}

/// Starts the chain. Needs a tokio runtime for the host-socket service.
pub(crate) fn start(options: &RuntimeOptions) -> io::Result<Started> {
    let (control, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let (server, client) = host_sockets::pair()?;
    host_sockets::serve(server)?;
    let config = Config {
        mesh: options.mesh.clone(),
        run_dir: options.run_dir.clone(),
        run_files: options.run_files.clone(),
        unfinished: options.unfinished.clone(),
        hidden: options.hidden.clone(),
        user_namespace: needs_user_namespace(),
    };
    let argument = serde_json::to_string(&config)?;
    let (spawned_to, spawned) = std::sync::mpsc::channel();
    let (down_to, down) = watch::channel(false);
    std::thread::Builder::new().name("mesh-starter".into()).spawn(move || {
        let child = internal(STARTER).arg(argument).stdin(theirs).stdout(client).spawn();
        match child {
            Ok(mut child) => {
                // The receiver waits right below.
                drop(spawned_to.send(Ok(())));
                drop(child.wait());
                // Done already, unless the starter was killed.
                clean(&config);
            }
            Err(error) => drop(spawned_to.send(Err(error))),
        }
        // Nobody listens any more when the runtime is gone.
        crate::tolerate(down_to.send(true));
    })?;
    spawned.recv().map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))??;
    Ok(Started { control, down })
}

/// Tries in a child process whether packets flow as pods need it.
pub(crate) fn probe() -> impl Future<Output = Result<(), StartError>> {
    let user_namespace = needs_user_namespace();
    let run = move || {
        let argument = if user_namespace { "user" } else { "root" };
        let output = internal(PROBE).arg(argument).stdin(Stdio::null()).output().map_err(StartError::Spawn)?;
        if output.status.success() {
            return Ok(());
        }
        match serde_json::from_slice::<CaptureError>(&output.stdout) {
            Ok(error) => Err(StartError::Capture(error)),
            Err(_) => Err(StartError::Silent),
        }
    };
    let running = tokio::task::spawn_blocking(run);
    async move { running.await.unwrap_or(Err(StartError::Silent)) }
}

/// Our own binary in a hidden role, without the caller's environment.
fn internal(role: &str) -> Command {
    let mut command = Command::new(SELF_EXE);
    command.arg(role).env_clear().current_dir("/");
    if let Some(value) = std::env::var_os("RUST_BACKTRACE") {
        command.env("RUST_BACKTRACE", value);
    }
    command
}

/// The probe's process.
pub(crate) fn probe_main(argument: &str) -> ExitCode {
    match capture::probe::run(argument == "user") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard output is the pipe to the parent; when it is gone nobody wants the reason.
            drop(serde_json::to_writer(io::stdout(), &error));
            ExitCode::FAILURE
        }
    }
}

/// The starter's process.
pub(crate) fn starter_main(argument: &str) -> ExitCode {
    match make_namespaces(argument) {
        Ok(code) => code,
        Err(error) => {
            if let Ok(control) = io::stdin().as_fd().try_clone_to_owned() {
                // The parent may be gone; then there is nobody to tell.
                drop(Sender::new(control).send(&Report::Failed(error), &[]));
            }
            ExitCode::FAILURE
        }
    }
}

fn make_namespaces(argument: &str) -> Result<ExitCode, CaptureError> {
    let spawn_failed = |error: io::Error| {
        CaptureError::explain(Step::Spawn, rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))
    };
    let config: Config = serde_json::from_str(argument).map_err(|error| spawn_failed(error.into()))?;
    // Out of the terminal's reach: Ctrl-C is for the parent, which ends the mesh in good order.
    crate::tolerate(rustix::process::setsid());
    // Held until the very end: who comes next waits for it.
    let folder = File::open(&config.run_dir).map_err(spawn_failed)?;
    rustix::fs::flock(&folder, FlockOperation::LockExclusive).map_err(|errno| spawn_failed(errno.into()))?;
    capture::probe::enter_namespaces(config.user_namespace)?;
    let control = io::stdin().as_fd().try_clone_to_owned().map_err(spawn_failed)?;
    let sockets = io::stdout().as_fd().try_clone_to_owned().map_err(spawn_failed)?;
    let mut manager = internal(MANAGER).arg(argument).stdin(control).stdout(sockets).spawn().map_err(spawn_failed)?;
    let lives_on = wait_for_end(&manager).unwrap_or(true);
    if lives_on {
        // The parent is gone. The manager sees it too; this makes it certain.
        crate::tolerate(manager.kill());
    }
    let status = manager.wait().map_err(spawn_failed)?;
    crate::tolerate(rustix::mount::unmount(&config.run_dir, rustix::mount::UnmountFlags::DETACH));
    if lives_on {
        remove(&config.unfinished);
    }
    clean(&config);
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Waits until the parent or the manager is gone; whether it is the parent.
///
/// No death signal does this: what the mesh leaves in the file system is still to be removed then.
fn wait_for_end(manager: &Child) -> io::Result<bool> {
    let pid = i32::try_from(manager.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    let manager = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let stdin = io::stdin();
    loop {
        let mut ends = [PollFd::new(&manager, PollFlags::IN), PollFd::new(&stdin, PollFlags::RDHUP)];
        match rustix::event::poll(&mut ends, None) {
            Ok(_) if !ends[0].revents().is_empty() => return Ok(false),
            Ok(_) if !ends[1].revents().is_empty() => return Ok(true),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Removes what must not outlive the mesh.
fn clean(config: &Config) {
    remove(&config.run_files);
    crate::tolerate(std::fs::remove_dir(&config.run_dir));
}

fn remove(files: &[PathBuf]) {
    for file in files {
        // Gone already, or a folder that lost its rights meanwhile: nothing to be done either way.
        crate::tolerate(std::fs::remove_file(file));
    }
}

/// Makes the run folder, once all that an earlier mesh had in it is gone.
pub(crate) fn prepare(run_dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + REMAINS_MAX;
    loop {
        std::fs::create_dir_all(run_dir)?;
        let folder = File::open(run_dir)?;
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            // The one before may have removed the folder we hold.
            Ok(()) if run_dir.exists() => return Ok(()),
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Killed when the parent's spawning thread ends.
pub(crate) fn die_with_parent() {
    // Refused by no kernel; the socket to the parent ends us as well.
    crate::tolerate(rustix::process::set_parent_process_death_signal(Some(Signal::KILL)));
}
