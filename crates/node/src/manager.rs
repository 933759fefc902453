//! The pod manager: first process of the mesh, living in the switch's network namespace.
//!
//! Threads: this one reads calls; `builder` makes pods and programs (it alone changes namespaces);
//! `reaper` collects ended processes; `net` answers DNS and relays. When the parent's socket closes
//! the process ends, and with it, being first of its pid namespace, everything else.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use capture::{CaptureError, Network, Services, Step, Switch};
use rustix::process::{WaitId, WaitIdOptions, WaitOptions, WaitStatus};

use crate::builder::Builder;
use crate::net::{self, Names};
use crate::spec::PodId;
use crate::starter::{Config, die_with_parent};
use crate::wire::{self, Call, Facts, Numbered, Passed, Refusal, Report, Sender};
use crate::{mounts, spawn};

/// Programs that run, by the pid the manager sees.
///
/// Starting holds the lock from before the fork until the entry is made, and reaping takes it, so
/// no end is reported before its start and no failed start loses its process to the reaper.
#[derive(Default)]
pub(crate) struct Programs(Mutex<HashMap<i32, Entry>>);

/// What a pid stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) pod: PodId,
    pub(crate) serial: u64,
}

impl Programs {
    pub(crate) fn lock(&self) -> MutexGuard<'_, HashMap<i32, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The manager's process.
pub(crate) fn manager_main(argument: &str) -> ExitCode {
    die_with_parent();
    crate::raise_descriptors();
    let Ok(control) = io::stdin().as_fd().try_clone_to_owned() else { return ExitCode::FAILURE };
    let Ok(sockets) = io::stdout().as_fd().try_clone_to_owned() else { return ExitCode::FAILURE };
    let Ok(sending) = control.try_clone() else { return ExitCode::FAILURE };
    let sender = Arc::new(Sender::new(sending));
    match serve(argument, &control, sockets, &sender) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a parent there is nobody to tell.
            drop(sender.send(&Report::Failed(error), &[]));
            ExitCode::FAILURE
        }
    }
}

fn serve(argument: &str, control: &OwnedFd, sockets: OwnedFd, sender: &Arc<Sender>) -> Result<(), CaptureError> {
    let spawn_failed = |error: io::Error| {
        CaptureError::explain(Step::Spawn, rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))
    };
    let config: Config = serde_json::from_str(argument).map_err(|error| spawn_failed(error.into()))?;
    let own_proc = spawn::mount_proc().is_ok();
    let upstreams = net::host_resolvers();
    mounts::mount_scratch(&config.run_dir).map_err(refused_early)?;
    let network = Network::LOCAL;
    let switch = Switch::create(&bridge_name(&config.mesh), network)?;
    let listening = net::Listening::bind(&network, switch.extras().ipv6).map_err(spawn_failed)?;
    let services = Services::install(&network, listening.relay_port())?;
    let extras = switch.extras();
    let facts = Facts {
        user_namespace: config.user_namespace,
        ipv6: extras.ipv6,
        own_proc,
        low_ports_by_sysctl: extras.low_ports,
    };

    let names = Arc::new(Names::default());
    let programs = Arc::new(Programs::default());
    let (calls_to, calls) = mpsc::channel();
    // Owners of these threads: the process. They end with it.
    let net_names = Arc::clone(&names);
    thread("net", move || net::run(listening, sockets, net_names, upstreams)).map_err(spawn_failed)?;
    let (reaper_sender, reaper_programs) = (Arc::clone(sender), Arc::clone(&programs));
    thread("reaper", move || reap(&reaper_sender, &reaper_programs)).map_err(spawn_failed)?;
    let builder_sender = Arc::clone(sender);
    let (built_to, built) = mpsc::channel();
    thread("builder", move || match Builder::new(config, facts, switch, services, programs, names) {
        Ok(builder) => {
            drop(built_to.send(Ok(())));
            build(builder, &calls, &builder_sender);
        }
        Err(refusal) => drop(built_to.send(Err(refusal))),
    })
    .map_err(spawn_failed)?;
    built.recv().unwrap_or(Ok(())).map_err(refused_early)?;
    if sender.send(&Report::Ready(facts), &[]).is_err() {
        return Ok(());
    }
    while let Ok(Some((call, passed))) = wire::receive::<Numbered>(control.as_fd()) {
        if matches!(call.call, Call::Shutdown) || calls_to.send((call, passed)).is_err() {
            break;
        }
    }
    Ok(())
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(body).map(drop)
}

/// A refusal before there are pods concerns the machine.
fn refused_early(refusal: Refusal) -> CaptureError {
    match refusal {
        Refusal::Capture(error) => error,
        Refusal::Step { step, errno } => {
            let error = CaptureError::explain(Step::OtherNamespaces, rustix::io::Errno::from_raw_os_error(errno));
            CaptureError { reason: format!("{step}: {}", error.reason), ..error }
        }
        _ => CaptureError::wrong(Step::Spawn, "the pod manager could not start its builder"),
    }
}

/// At most 15 bytes; the name shows in the kernel's log with every pod.
fn bridge_name(mesh: &str) -> String {
    let mesh: String = mesh.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    if mesh.is_empty() { "lateen".into() } else { format!("lateen-{mesh}") }
}

fn build(mut builder: Builder, calls: &mpsc::Receiver<(Numbered, Passed)>, sender: &Sender) {
    for (Numbered { id, call }, passed) in calls {
        let answer = passed.map_err(Refusal::step("receiving descriptors")).and_then(|fds| builder.answer(call, &fds));
        let (result, fds) = match answer {
            Ok(fds) => (Ok(()), fds),
            Err(refusal) => (Err(refusal), Vec::new()),
        };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let is_sent = sender.send(&Report::Reply { id, result }, &fds).is_ok();
        // Where only the descriptors found no way, the answer still tells what was done; who needs them finds none.
        let is_sent = is_sent || (!fds.is_empty() && sender.send(&Report::Reply { id, result: Ok(()) }, &[]).is_ok());
        if !is_sent {
            return;
        }
    }
}

/// Collects ended children, orphans of pods among them, and reports the programs.
fn reap(sender: &Sender, programs: &Programs) {
    loop {
        // Only look: the process stays until the lock is held, see `Programs`.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        match rustix::process::waitid(WaitId::All, look) {
            Ok(Some(_)) => {}
            Ok(None) | Err(rustix::io::Errno::INTR) => continue,
            // No children: wait for one to appear. It happens between pods only.
            Err(_) => {
                std::thread::sleep(std::time::Duration::from_millis(5));
                continue;
            }
        }
        let ended = {
            let mut programs = programs.lock();
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    programs.remove(&pid.as_raw_nonzero().get()).map(|entry| (entry, code(status)))
                }
                _ => None,
            }
        };
        if let Some((Entry { pod, serial }, code)) = ended
            && sender.send(&Report::Exited { pod, serial, code }, &[]).is_err()
        {
            return;
        }
    }
}

fn code(status: WaitStatus) -> i32 {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(-1)
}
