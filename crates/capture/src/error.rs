//! Why pods cannot have namespaces here: the step that failed, the missing right, how to get it.

use std::fmt;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A step of making pods, in the order they are tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Step {
    /// `unshare(CLONE_NEWUSER)`.
    UserNamespace,
    /// Writing `/proc/self/setgroups`.
    SetGroups,
    /// Writing `/proc/self/uid_map` or `gid_map`.
    IdMap,
    /// `unshare(CLONE_NEWNET)`.
    NetNamespace,
    /// `unshare` of mount, pid, host name and IPC.
    OtherNamespaces,
    /// Making `/` private.
    PrivateMounts,
    /// Raising ambient capabilities.
    Capabilities,
    /// Starting one of our own processes.
    Spawn,
    /// Opening a netlink socket.
    Netlink,
    /// `lo` up.
    Loopback,
    /// The bridge.
    Bridge,
    /// The pair of interfaces of a pod.
    Veth,
    /// An address.
    Address,
    /// A route.
    Route,
    /// The nf_tables batch.
    Rules,
    /// A connection over loopback that the rules should redirect.
    RedirectedConnect,
    /// `SO_ORIGINAL_DST` of that connection.
    OriginalDestination,
    /// `SO_MARK`.
    Mark,
    /// A connection over the bridge.
    BridgeConnect,
    /// A program started with ambient capabilities, and its `SO_MARK`.
    ExecCapabilities,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UserNamespace => "making a user namespace",
            Self::SetGroups => "writing /proc/self/setgroups in a new user namespace",
            Self::IdMap => "mapping the user into a new user namespace",
            Self::NetNamespace => "making a network namespace",
            Self::OtherNamespaces => "making mount, pid, host name and IPC namespaces",
            Self::PrivateMounts => "making the mounts private",
            Self::Capabilities => "raising ambient capabilities",
            Self::Spawn => "starting the pod manager",
            Self::Netlink => "opening a netlink socket",
            Self::Loopback => "bringing the loopback interface up",
            Self::Bridge => "making a bridge",
            Self::Veth => "making a pod's pair of interfaces",
            Self::Address => "giving an interface its address",
            Self::Route => "adding a route",
            Self::Rules => "loading nf_tables rules",
            Self::RedirectedConnect => "connecting through the redirect rules",
            Self::OriginalDestination => "reading SO_ORIGINAL_DST",
            Self::Mark => "setting SO_MARK",
            Self::BridgeConnect => "connecting from pod to pod",
            Self::ExecCapabilities => "handing capabilities to a program",
        })
    }
}

/// Pods cannot have namespaces of their own on this machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{step} failed ({}): {reason}; {remedy}", self.errno_name())]
pub struct CaptureError {
    /// What was being done.
    pub step: Step,
    /// The system's error number; 0 = the answer was wrong rather than refused.
    pub errno: i32,
    /// The missing right or part.
    pub reason: String,
    /// How to get it.
    pub remedy: String,
}

impl CaptureError {
    /// Names the reason for a failed step from what the machine says about itself.
    pub fn explain(step: Step, errno: Errno) -> Self {
        diagnose(step, errno, &KernelFacts::read())
    }

    /// A step that the kernel did, with another result than it should have.
    pub fn wrong(step: Step, reason: impl Into<String>) -> Self {
        Self {
            step,
            errno: 0,
            reason: reason.into(),
            remedy: "another program's firewall rules in new namespaces, or a kernel without full nf_tables support, do this"
                .into(),
        }
    }

    fn errno_name(&self) -> String {
        if self.errno == 0 { "wrong answer".into() } else { std::io::Error::from_raw_os_error(self.errno).to_string() }
    }
}

/// What can name a reason: read only after something failed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct KernelFacts {
    linux: bool,
    max_user_namespaces: Option<u64>,
    max_net_namespaces: Option<u64>,
    unprivileged_userns_clone: Option<u64>,
    apparmor_restricts_userns: bool,
    seccomp_filter: bool,
    root: bool,
}

impl KernelFacts {
    fn read() -> Self {
        let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse().ok();
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self {
            linux: cfg!(target_os = "linux"),
            max_user_namespaces: number("/proc/sys/user/max_user_namespaces"),
            max_net_namespaces: number("/proc/sys/user/max_net_namespaces"),
            unprivileged_userns_clone: number("/proc/sys/kernel/unprivileged_userns_clone"),
            apparmor_restricts_userns: number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1),
            seccomp_filter: status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"])),
            root: rustix::process::geteuid().is_root(),
        }
    }
}

fn diagnose(step: Step, errno: Errno, facts: &KernelFacts) -> CaptureError {
    let (reason, remedy) = reason(step, errno, facts);
    CaptureError { step, errno: errno.raw_os_error(), reason, remedy }
}

const APPARMOR_REMEDY: &str = "load an AppArmor profile for this binary with `flags=(unconfined) { userns, }`, \
    or set the sysctl kernel.apparmor_restrict_unprivileged_userns to 0, or run as root";

fn reason(step: Step, errno: Errno, facts: &KernelFacts) -> (String, String) {
    let say = |reason: &str, remedy: &str| (reason.to_owned(), remedy.to_owned());
    match (step, errno) {
        _ if !facts.linux => say(
            "pods are Linux namespaces and this is not Linux",
            "run the local mesh on Linux, in a virtual machine if need be",
        ),
        (Step::UserNamespace, Errno::NOSPC) => (
            format!(
                "the limit of user namespaces (user.max_user_namespaces = {}) is used up",
                shown(facts.max_user_namespaces)
            ),
            "raise the sysctl user.max_user_namespaces, or run as root".into(),
        ),
        (Step::NetNamespace, Errno::NOSPC) => (
            format!(
                "the limit of network namespaces (user.max_net_namespaces = {}) is used up",
                shown(facts.max_net_namespaces)
            ),
            "raise the sysctl user.max_net_namespaces".into(),
        ),
        (Step::UserNamespace, Errno::PERM) if facts.unprivileged_userns_clone == Some(0) => say(
            "kernel.unprivileged_userns_clone is 0: ordinary users may not make user namespaces",
            "set the sysctl kernel.unprivileged_userns_clone to 1, or run as root",
        ),
        (Step::UserNamespace, Errno::PERM) if facts.seccomp_filter => say(
            "a seccomp filter of the container forbids user namespaces",
            "start the container with a seccomp profile that allows unshare (docker: --security-opt seccomp=unconfined), or with CAP_SYS_ADMIN and CAP_NET_ADMIN as root",
        ),
        (Step::UserNamespace, Errno::PERM) => say(
            "user namespaces are forbidden here, as they are inside a chroot",
            "run outside of the chroot, or as root with CAP_SYS_ADMIN",
        ),
        (Step::UserNamespace, Errno::ACCESS) => {
            say("a security module forbids user namespaces", "allow them in its policy for this binary, or run as root")
        }
        (Step::UserNamespace, Errno::INVAL) => {
            say("this kernel is built without user namespaces", "use a kernel with CONFIG_USER_NS, or run as root")
        }
        (
            Step::SetGroups
            | Step::IdMap
            | Step::PrivateMounts
            | Step::Capabilities
            | Step::Loopback
            | Step::Address
            | Step::Bridge,
            Errno::PERM | Errno::ACCESS,
        ) => {
            let why = if facts.apparmor_restricts_userns {
                "kernel.apparmor_restrict_unprivileged_userns is 1: the user namespace is made but gives no capabilities"
            } else {
                "a security module takes the capabilities of a new user namespace away"
            };
            say(why, APPARMOR_REMEDY)
        }
        (Step::NetNamespace | Step::OtherNamespaces, Errno::PERM) if facts.root => say(
            "this root lacks CAP_SYS_ADMIN, and user namespaces did not help",
            "give the container CAP_SYS_ADMIN and CAP_NET_ADMIN",
        ),
        (Step::NetNamespace | Step::OtherNamespaces, Errno::INVAL) => say(
            "this kernel is built without the namespaces pods need",
            "use a kernel with CONFIG_NET_NS, CONFIG_PID_NS, CONFIG_UTS_NS and CONFIG_IPC_NS",
        ),
        (Step::Bridge, Errno::OPNOTSUPP) => {
            say("this kernel has no bridge devices", "load the module: modprobe bridge")
        }
        (Step::Veth, Errno::OPNOTSUPP) => say("this kernel has no veth devices", "load the module: modprobe veth"),
        (Step::Rules | Step::Netlink, Errno::OPNOTSUPP | Errno::PROTONOSUPPORT | Errno::INVAL | Errno::NOENT) => say(
            "nf_tables, its nat chains or one of its expressions (redir, nat, numgen, reject) is missing",
            "load the modules: modprobe nf_tables nft_chain_nat nft_redir nft_numgen nft_reject_inet",
        ),
        (Step::Mark, Errno::PERM) => say(
            "sockets of a pod's proxy may not set marks",
            "use a kernel of at least 5.17, or one that keeps CAP_NET_ADMIN in user namespaces",
        ),
        (Step::ExecCapabilities, _) => say(
            "programs do not keep ambient capabilities",
            "mount the file system without a security module that strips them, or run as root",
        ),
        (Step::RedirectedConnect | Step::BridgeConnect, _) => say(
            "the connection did not arrive",
            "look for firewall rules that a system service loads into every new network namespace",
        ),
        (_, Errno::PERM | Errno::ACCESS) => {
            say("the kernel or a security module refused it", "run as root, or outside of the container")
        }
        _ => say("the kernel does not offer it", "use a newer kernel with namespaces, veth, bridge and nf_tables"),
    }
}

fn shown(value: Option<u64>) -> String {
    value.map_or_else(|| "unknown".into(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_names_right_and_remedy() {
        let plain = KernelFacts { linux: true, ..KernelFacts::default() };
        let check = |step, errno, facts: &KernelFacts, reason: &str, remedy: &str| {
            let error = diagnose(step, errno, facts);
            assert!(error.reason.contains(reason), "{error}");
            assert!(error.remedy.contains(remedy), "{error}");
        };
        let limit = KernelFacts { max_user_namespaces: Some(0), ..plain };
        check(Step::UserNamespace, Errno::NOSPC, &limit, "user.max_user_namespaces = 0", "raise the sysctl");
        let debian = KernelFacts { unprivileged_userns_clone: Some(0), ..plain };
        check(Step::UserNamespace, Errno::PERM, &debian, "unprivileged_userns_clone", "to 1");
        let filter = KernelFacts { seccomp_filter: true, ..plain };
        check(Step::UserNamespace, Errno::PERM, &filter, "seccomp", "--security-opt");
        check(Step::UserNamespace, Errno::PERM, &plain, "chroot", "CAP_SYS_ADMIN");
        let ubuntu = KernelFacts { apparmor_restricts_userns: true, ..plain };
        for step in [Step::SetGroups, Step::IdMap, Step::PrivateMounts, Step::Loopback] {
            check(step, Errno::PERM, &ubuntu, "apparmor_restrict_unprivileged_userns", "userns,");
        }
        check(Step::Bridge, Errno::OPNOTSUPP, &plain, "bridge", "modprobe bridge");
        check(Step::Rules, Errno::OPNOTSUPP, &plain, "nf_tables", "modprobe nf_tables");
        check(Step::NetNamespace, Errno::NOSPC, &plain, "user.max_net_namespaces = unknown", "raise");
        check(Step::Rules, Errno::OPNOTSUPP, &KernelFacts::default(), "not Linux", "virtual machine");
    }
}
