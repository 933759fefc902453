//! `lateen exec`: a program inside a container's namespaces, on the caller's own terminal.
//!
//! The command line gets an [`ExecTarget`] from the running mesh and runs [`command`]: our own binary
//! in a hidden role, which enters the namespaces while single-threaded, then starts the program and
//! waits. The kernel lets only the mesh's user do that.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{CapabilitySet, ThreadNameSpaceType};
use serde::{Deserialize, Serialize};

use crate::spawn;
use crate::spec::SELF_EXE;

/// Hidden first argument of the binary.
pub(crate) const EXEC: &str = "node-exec";

/// Where to run a program.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExecTarget {
    /// The container's first process, as the machine numbers it.
    pub pid: u32,
    /// Whether the mesh has a user namespace.
    pub user_namespace: bool,
    /// The container's environment.
    pub env: BTreeMap<String, String>,
    /// The container's working directory.
    pub cwd: Option<PathBuf>,
}

/// A command that runs `argv` in the container with the standard streams it is given.
///
/// Its exit code is the program's; 126 = cannot be run, 127 = not found, as shells say it, with a
/// line on standard error.
pub fn command(target: &ExecTarget, argv: &[OsString]) -> Result<Command, serde_json::Error> {
    let mut target = target.clone();
    for name in ["TERM", "COLORTERM", "LANG", "LC_ALL"] {
        if let (false, Ok(value)) = (target.env.contains_key(name), std::env::var(name)) {
            target.env.insert(name.into(), value);
        }
    }
    let mut command = Command::new(SELF_EXE);
    command.arg(EXEC).arg(serde_json::to_string(&target)?).args(argv);
    Ok(command)
}

/// The process of [`command`].
pub(crate) fn exec_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let target = arguments.next().and_then(|text| serde_json::from_str::<ExecTarget>(text.to_str()?).ok());
    let (Some(target), Some(program)) = (target, arguments.next()) else { return ExitCode::FAILURE };
    if let Err(errno) = enter(&target) {
        return complain(&format!("cannot enter the container: {}", std::io::Error::from(errno)), 126);
    }
    let mut command = Command::new(&program);
    command.args(arguments).env_clear().envs(&target.env);
    if !target.env.contains_key("PATH") {
        command.env("PATH", crate::builder::USUAL_PATH);
    }
    command.current_dir(target.cwd.as_deref().unwrap_or(Path::new("/")));
    spawn::prepare(&mut command, spawn::Entry::FromTerminal, CapabilitySet::empty(), Vec::new());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let code = if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
            return complain(&format!("cannot run {}: {error}", program.display()), code);
        }
    };
    // Keys of the terminal reach the program itself; whether it ends is its decision.
    leave_terminal_signals();
    match child.wait() {
        Ok(status) => {
            use std::os::unix::process::ExitStatusExt as _;
            let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
            ExitCode::from(u8::try_from(code).unwrap_or(1))
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn enter(target: &ExecTarget) -> Result<(), rustix::io::Errno> {
    let pid = i32::try_from(target.pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let mut kinds = ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::PROCESS_ID;
    if target.user_namespace {
        kinds |= ThreadNameSpaceType::USER;
    }
    rustix::thread::move_into_thread_name_spaces(process.as_fd(), kinds)
}

fn complain(text: &str, code: u8) -> ExitCode {
    use std::io::Write as _;
    // Nowhere else to say it.
    crate::tolerate(writeln!(std::io::stderr(), "lateen exec: {text}"));
    ExitCode::from(code)
}

#[expect(unsafe_code, reason = "ignoring a signal has no safe form")]
fn leave_terminal_signals() {
    for signal in [libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe {
            libc::signal(signal, libc::SIG_IGN);
        }
    }
}
