//! The local mesh's machine: a small node with pods, a network, DNS and service addresses.
//!
//! Two halves. The *runtime* ([`PodRuntime`]) makes pods out of Linux namespaces for whoever asks;
//! the objects half (store, controllers, injection, tokens) decides which pods there are.
//!
//! What flows in: requests for pods and containers ([`spec`]), names and service addresses. What
//! flows out: addresses, ends of containers ([`RuntimeEvent`]), their output. Processes:
//!
//! ```text
//! lateen up            host namespaces: host listeners, host sockets, output of containers
//!   └ starter          makes user, network, mount, pid namespaces; waits
//!      └ manager       pid 1 of the mesh, in the switch: bridge, rules, DNS, relay
//!         ├ init ─ program      one pair a container; own pid and mount namespace, the pod's network
//!         └ …
//! ```
//!
//! **Invariants.**
//! - Nothing outlives the process that holds the [`PodRuntime`]: no process, namespace, link, rule,
//!   and no file but the folder it was given. This holds for `kill -9`.
//! - No file is made on the machine; the network of the machine is not touched.
//! - An application's program holds no capability: it can neither change rules nor set marks.
//! - No program but our own binary is needed.
//!
//! Start reading at [`PodRuntime`], then `manager` and `builder`.

mod builder;
pub mod client;
pub mod controller;
pub mod env;
mod etc;
pub mod exec;
pub mod files;
mod host_sockets;
pub mod inject;
mod listening;
pub mod logs;
mod manager;
mod mounts;
mod net;
mod probe;
pub mod runtime;
pub mod server;
mod spawn;
pub mod spec;
mod starter;
pub mod state;
pub mod store;
pub mod token;
pub mod volume;
mod wire;

use std::ffi::OsString;
use std::process::ExitCode;

pub use exec::ExecTarget;
pub use runtime::{
    Output, OutputSink, Pod, PodRuntime, RunResult, RuntimeError, RuntimeEvent, RuntimeOptions, StartError,
};
pub use spec::{
    ContainerRequest, DnsPolicy, HostListener, Mount, Name, PodId, PodNetwork, PodRequest, Rights, SELF_EXE,
    ServiceAddress, ServicePort, Signal, Stream, Volume, VolumeFile, VolumeSource,
};
pub use wire::Facts;

/// Address of the switch: the control plane listens here.
pub const SWITCH_IP: std::net::Ipv4Addr = capture::Network::LOCAL.switch;

/// Takes over when the binary was started by ourselves in a hidden role.
///
/// The binary calls it first thing in `main`, before any thread is started, with its arguments
/// without the program name. `Some` is the process's exit code.
pub fn internal_main(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.into_iter();
    let role = arguments.next()?;
    let role = role.to_str()?;
    if role == exec::EXEC {
        return Some(exec::exec_main(arguments));
    }
    if role == probe::ASK {
        let question = arguments.next().and_then(|argument| argument.into_string().ok()).unwrap_or_default();
        return Some(probe::probe_main(&question));
    }
    if ![starter::STARTER, starter::MANAGER, starter::PROBE].contains(&role) {
        return None;
    }
    let argument = arguments.next().and_then(|argument| argument.into_string().ok()).unwrap_or_default();
    Some(match role {
        starter::STARTER => starter::starter_main(&argument),
        starter::MANAGER => manager::manager_main(&argument),
        _ => starter::probe_main(&argument),
    })
}

/// Most descriptors that a process needs; a limit without end would make programs that close them all slow.
const DESCRIPTORS_WANTED: u64 = 1 << 20;

/// Lets the process, and those that it starts, have as many descriptors as its hard limit allows, up to a
/// million: those who start programs leave a low soft limit for the sake of `select`.
pub fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(DESCRIPTORS_WANTED).min(DESCRIPTORS_WANTED);
    if current.is_some_and(|current| current < wanted) {
        // Up to the hard limit it is anybody's right.
        tolerate(setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum }));
    }
}

/// How many descriptors the process may have.
fn descriptors_max() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX)
}

/// For steps whose failure changes nothing for us; each call says why.
fn tolerate<T, E>(_result: Result<T, E>) {}
