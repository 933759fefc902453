//! Makes pods: the one thread of the manager that moves between namespaces.
//!
//! Every call starts and ends at home (the switch's network, the manager's mounts, host name and
//! pid namespace), so that whatever fails half-way leaves the next call unharmed. A pod keeps two
//! descriptors (network, host name); each container has mounts and a pid namespace of its own,
//! which live as long as its processes.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use capture::{Network, Services, Switch};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};
use types::wellknown::env as variables;

use crate::manager::{Entry, Programs};
use crate::mounts::{self, PodFiles};
use crate::net::Names;
use crate::spawn;
use crate::spec::{ContainerPlan, PassedFd, PodId, PodNetwork, PodPlan, SELF_EXE, Signal};
use crate::starter::Config;
use crate::wire::{Call, Facts, Refusal};

pub(crate) const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The namespaces the builder returns to.
struct Home {
    net: OwnedFd,
    mnt: OwnedFd,
    uts: OwnedFd,
    pid: OwnedFd,
}

struct Pod {
    net: OwnedFd,
    uts: OwnedFd,
    files: PodFiles,
    containers: BTreeMap<String, Running>,
}

struct Running {
    pid: Pid,
    pidfd: OwnedFd,
}

/// State of the builder thread.
pub(crate) struct Builder {
    config: Config,
    facts: Facts,
    switch: Switch,
    services: Services,
    programs: Arc<Programs>,
    names: Arc<Names>,
    home: Home,
    pods: HashMap<PodId, Pod>,
}

impl Builder {
    /// Must run on the thread that will use it.
    pub(crate) fn new(
        config: Config,
        facts: Facts,
        switch: Switch,
        services: Services,
        programs: Arc<Programs>,
        names: Arc<Names>,
    ) -> Result<Self, Refusal> {
        // Root and working directory become the thread's own: a condition for changing mounts.
        unshare(UnshareFlags::FS).map_err(Refusal::step("leaving the process's working directory"))?;
        let home =
            Home { net: namespace("net")?, mnt: namespace("mnt")?, uts: namespace("uts")?, pid: namespace("pid")? };
        Ok(Self { config, facts, switch, services, programs, names, home, pods: HashMap::new() })
    }

    /// Does a call; the descriptors of the answer, if it has some.
    pub(crate) fn answer(&mut self, call: Call, fds: &[OwnedFd]) -> Result<Vec<OwnedFd>, Refusal> {
        match call {
            Call::CreatePod(plan) => self.create(*plan).map(|()| Vec::new()),
            Call::Start(plan) => self.start(&plan, fds).map(|pidfd| vec![pidfd]),
            Call::Signal { pod, container, signal } => self.signal(pod, &container, signal).map(|()| Vec::new()),
            Call::DeletePod { pod } => self.delete(pod).map(|()| Vec::new()),
            Call::UpdateVolume { pod, volume, files } => {
                let pod = self.pods.get_mut(&pod).ok_or(Refusal::NoSuchPod)?;
                pod.files.update(&volume, &files).map(|()| Vec::new())
            }
            Call::Sockets { v6, count } => (0..count)
                .map(|_| {
                    let domain = if v6 { socket2::Domain::IPV6 } else { socket2::Domain::IPV4 };
                    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)
                        .map_err(Refusal::io("making a socket"))?;
                    socket.set_nonblocking(true).map_err(Refusal::io("making a socket"))?;
                    Ok(OwnedFd::from(socket))
                })
                .collect(),
            Call::Listen { address } => {
                let failed = || Refusal::io(format!("listening on {address} in the switch"));
                let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)
                    .map_err(failed())?;
                socket.set_reuse_address(true).map_err(failed())?;
                socket.set_nonblocking(true).map_err(failed())?;
                socket.bind(&address.into()).map_err(failed())?;
                socket.listen(1024).map_err(failed())?;
                Ok(vec![socket.into()])
            }
            Call::SetNames(names) => {
                self.names.set(names);
                Ok(Vec::new())
            }
            Call::SetServices(services) => self.services.set(&services).map(|()| Vec::new()).map_err(Refusal::Capture),
            Call::Shutdown => Ok(Vec::new()),
        }
    }

    fn create(&mut self, plan: PodPlan) -> Result<(), Refusal> {
        let made = self.make_namespaces(&plan);
        self.go_home()?;
        let (net, uts) = made?;
        let dir = self.config.run_dir.join("pods").join(plan.pod.0.to_string());
        let files = PodFiles::create(dir, plan.volumes, plan.etc)?;
        self.pods.insert(plan.pod, Pod { net, uts, files, containers: BTreeMap::new() });
        Ok(())
    }

    fn make_namespaces(&self, plan: &PodPlan) -> Result<(OwnedFd, OwnedFd), Refusal> {
        let net = match plan.network {
            PodNetwork::Switch => self.home.net.try_clone().map_err(Refusal::io("keeping the switch's namespace"))?,
            PodNetwork::Own => {
                unshare(UnshareFlags::NEWNET).map_err(|errno| {
                    Refusal::Capture(capture::CaptureError::explain(capture::Step::NetNamespace, errno))
                })?;
                let net = namespace("net")?;
                self.switch.plug(&format!("port{}", plan.pod.0), net.as_fd()).map_err(Refusal::Capture)?;
                let ip6 = self.facts.ipv6.then_some(plan.ip6);
                capture::join(&Network::LOCAL, plan.ip, ip6).map_err(Refusal::Capture)?;
                if let Some(redirect) = &plan.redirect {
                    redirect.install().map_err(Refusal::Capture)?;
                }
                net
            }
        };
        unshare(UnshareFlags::NEWUTS).map_err(Refusal::step("making a host name of its own"))?;
        rustix::system::sethostname(plan.hostname.as_bytes())
            .map_err(Refusal::step(format!("setting the host name {:?}", plan.hostname)))?;
        Ok((net, namespace("uts")?))
    }

    fn start(&mut self, plan: &ContainerPlan, fds: &[OwnedFd]) -> Result<OwnedFd, Refusal> {
        let started = self.start_away(plan, fds);
        self.go_home()?;
        let (pid, pidfd) = started?;
        let answer = pidfd.try_clone().map_err(Refusal::io("keeping a process descriptor"))?;
        let pod = self.pods.get_mut(&plan.pod).ok_or(Refusal::NoSuchPod)?;
        // Programs run inside containers (probes) come and go; keep no descriptor of those that ended.
        pod.containers.retain(|_, running| !has_ended(&running.pidfd));
        pod.containers.insert(plan.request.name.clone(), Running { pid, pidfd });
        Ok(answer)
    }

    fn start_away(&mut self, plan: &ContainerPlan, fds: &[OwnedFd]) -> Result<(Pid, OwnedFd), Refusal> {
        let pod = self.pods.get_mut(&plan.pod).ok_or(Refusal::NoSuchPod)?;
        let programs = Arc::clone(&self.programs);
        let entry = if let Some(container) = &plan.inside {
            let running = pod.containers.get(container).ok_or_else(|| Refusal::NoSuchContainer(container.clone()))?;
            let all = ThreadNameSpaceType::NETWORK
                | ThreadNameSpaceType::MOUNT
                | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
                | ThreadNameSpaceType::PROCESS_ID;
            rustix::thread::move_into_thread_name_spaces(running.pidfd.as_fd(), all)
                .map_err(|_| Refusal::NoSuchContainer(container.clone()))?;
            spawn::Entry::Joins
        } else {
            enter(&pod.net, LinkNameSpaceType::Network)?;
            enter(&pod.uts, LinkNameSpaceType::HostNameAndNISDomainName)?;
            unshare(UnshareFlags::NEWNS).map_err(Refusal::step("making a mount namespace"))?;
            mounts::make_private()?;
            let mut hidden = self.config.hidden.clone();
            hidden.push(self.config.run_dir.clone());
            pod.files.mount(&plan.request.name, &plan.request.mounts, &hidden)?;
            unshare(UnshareFlags::NEWPID).map_err(Refusal::step("making a pid namespace"))?;
            spawn::Entry::First { own_proc: self.facts.own_proc }
        };
        let (mut command, inherit) = Self::command(plan, fds)?;
        let keep = spawn::capabilities(plan.request.rights, self.facts.low_ports_by_sysctl);
        spawn::prepare(&mut command, entry, keep, inherit);
        let mut known = programs.lock();
        let program = plan.request.argv.first().cloned().unwrap_or_default();
        let child = command.spawn().map_err(|error| not_started(program, &error))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Refusal::NoSuchPod)?;
        let pidfd =
            rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(Refusal::step("opening a process"))?;
        known.insert(pid.as_raw_nonzero().get(), Entry { pod: plan.pod, serial: plan.serial });
        Ok((pid, pidfd))
    }

    /// The program with its environment; and the descriptors it inherits.
    fn command(plan: &ContainerPlan, fds: &[OwnedFd]) -> Result<(Command, Vec<RawFd>), Refusal> {
        let invalid = |step: &str| Refusal::Step { step: step.into(), errno: libc::EINVAL };
        let request = &plan.request;
        let (program, arguments) =
            request.argv.split_first().ok_or_else(|| invalid("starting a container without a command"))?;
        let [stdout, stderr, passed @ ..] = fds else { return Err(invalid("starting a program without output")) };
        if passed.len() != plan.pass.len() {
            return Err(invalid("passing descriptors to a program"));
        }
        let mut command = Command::new(program);
        if program == SELF_EXE {
            command.arg0("lateen");
        }
        let copy = |fd: &OwnedFd| fd.try_clone().map(Stdio::from).map_err(Refusal::io("passing a descriptor"));
        command
            .args(arguments)
            .env_clear()
            .envs(&request.env)
            .stdin(Stdio::null())
            .stdout(copy(stdout)?)
            .stderr(copy(stderr)?);
        if !request.env.contains_key("PATH") {
            command.env("PATH", USUAL_PATH);
        }
        let cwd = request.cwd.as_deref().unwrap_or(Path::new("/"));
        if !cwd.is_dir() {
            return Err(Refusal::Step {
                step: format!("entering the working directory {}", cwd.display()),
                errno: libc::ENOENT,
            });
        }
        command.current_dir(cwd);
        let mut listeners = Vec::new();
        for (fd, usage) in passed.iter().zip(&plan.pass) {
            match usage {
                PassedFd::Listener(port) => listeners.push(format!("{port}={}", fd.as_raw_fd())),
                PassedFd::HostSockets => {
                    command.env(variables::HOST_SOCKETS, fd.as_raw_fd().to_string());
                    command.env(variables::MESH_RANGES, Network::LOCAL.ranges());
                }
            }
        }
        if !listeners.is_empty() {
            command.env(variables::LISTEN_FDS, listeners.join(","));
        }
        Ok((command, passed.iter().map(AsRawFd::as_raw_fd).collect()))
    }

    fn signal(&mut self, pod: PodId, container: &str, signal: Signal) -> Result<(), Refusal> {
        use rustix::process::Signal as Number;
        let pod = self.pods.get(&pod).ok_or(Refusal::NoSuchPod)?;
        let missing = || Refusal::NoSuchContainer(container.into());
        let running = pod.containers.get(container).ok_or_else(missing)?;
        let number = match signal {
            Signal::Term => Number::TERM,
            Signal::Int => Number::INT,
            Signal::Hup => Number::HUP,
            Signal::Quit => Number::QUIT,
            Signal::Usr1 => Number::USR1,
            Signal::Usr2 => Number::USR2,
            Signal::Kill => Number::KILL,
        };
        match rustix::process::pidfd_send_signal(running.pidfd.as_fd(), number) {
            Err(Errno::SRCH) => Err(missing()),
            other => other.map_err(Refusal::step(format!("signalling process {}", running.pid.as_raw_nonzero()))),
        }
    }

    fn delete(&mut self, pod: PodId) -> Result<(), Refusal> {
        let pod = self.pods.remove(&pod).ok_or(Refusal::NoSuchPod)?;
        for running in pod.containers.values() {
            // Ended already is as good. The first process of a pid namespace takes all others along.
            crate::tolerate(rustix::process::pidfd_send_signal(running.pidfd.as_fd(), rustix::process::Signal::KILL));
        }
        pod.files.remove();
        Ok(())
    }

    fn go_home(&self) -> Result<(), Refusal> {
        enter(&self.home.mnt, LinkNameSpaceType::Mount)?;
        enter(&self.home.net, LinkNameSpaceType::Network)?;
        enter(&self.home.uts, LinkNameSpaceType::HostNameAndNISDomainName)?;
        enter(&self.home.pid, LinkNameSpaceType::ProcessID)
    }
}

/// Why a program was not started: it cannot be run, or the machine lacks what one more takes.
fn not_started(program: String, error: &std::io::Error) -> Refusal {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    if matches!(errno, libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::ENOMEM) {
        Refusal::Step { step: "starting a program".into(), errno }
    } else {
        Refusal::Program { program, errno }
    }
}

/// The descriptor of a process becomes readable when it ends.
fn has_ended(process: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&at_once)).is_ok_and(|ready| ready > 0)
}

fn enter(namespace: &OwnedFd, kind: LinkNameSpaceType) -> Result<(), Refusal> {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind))
        .map_err(Refusal::step("entering a namespace"))
}

/// The calling thread's namespace, by a descriptor that keeps it alive.
fn namespace(kind: &str) -> Result<OwnedFd, Refusal> {
    File::open(format!("/proc/thread-self/ns/{kind}"))
        .map(OwnedFd::from)
        .map_err(Refusal::io(format!("opening the {kind} namespace")))
}

#[expect(unsafe_code, reason = "unshare has no safe form")]
fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: namespaces and the working directory only; descriptors and memory stay shared.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
