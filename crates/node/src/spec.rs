//! What a pod is made of, as the controller asks for it and as it crosses to the pod manager.
//!
//! These are values without behaviour: the parent half ([`crate::runtime`]) fills in addresses and
//! descriptors, the manager half builds from them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A program path that stands for the running binary itself, whatever its name or place, also
/// after the file was replaced on disk. Use it as `argv[0]` for proxies and sample programs.
pub const SELF_EXE: &str = "/proc/self/exe";

/// One pod of one runtime; never reused while the runtime lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PodId(pub u64);

impl fmt::Display for PodId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pod#{}", self.0)
    }
}

/// Where a pod's sockets live.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum PodNetwork {
    /// A network namespace of its own, with its own address.
    #[default]
    Own,
    /// The mesh's switch, at [`crate::SWITCH_IP`]: the control plane lives here.
    Switch,
}

/// What is written into `/etc/resolv.conf`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum DnsPolicy {
    /// Cluster DNS, the three search domains of the pod's namespace, `ndots:5`.
    #[default]
    ClusterFirst,
    /// The machine's own file. Its name servers are usually out of reach of a pod.
    Host,
    /// Exactly these.
    Custom {
        /// `nameserver` lines.
        nameservers: Vec<IpAddr>,
        /// `search` domains.
        searches: Vec<String>,
        /// `options`, such as `ndots:2`.
        options: Vec<String>,
    },
}

/// Asks for a pod's sandbox: namespaces, address, name, volumes, capture rules. Containers follow.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PodRequest {
    /// Kubernetes namespace: search domains of `ClusterFirst`.
    pub namespace: String,
    /// Pod name, for messages.
    pub name: String,
    /// Host name inside; empty = `name`. Cut to 63 bytes as Kubernetes does.
    pub hostname: String,
    /// `spec.subdomain`: makes `hostname.subdomain.namespace.svc.cluster.local` the pod's full name.
    pub subdomain: Option<String>,
    /// Own network or the switch.
    pub network: PodNetwork,
    /// Name servers.
    pub dns: DnsPolicy,
    /// `spec.hostAliases`: further lines of `/etc/hosts`.
    pub host_aliases: Vec<(IpAddr, Vec<String>)>,
    /// Redirect rules; `None` = nothing is captured (a pod without proxy, a gateway).
    pub redirect: Option<capture::Redirect>,
    /// Volumes that containers may mount.
    pub volumes: Vec<Volume>,
}

/// A named volume of a pod. It lives as long as the pod, in memory unless it is a host path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Volume {
    /// Name that mounts refer to.
    pub name: String,
    /// What is in it.
    pub source: VolumeSource,
}

/// Content of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum VolumeSource {
    /// ConfigMap, Secret, projected, token: files that can be replaced as one
    /// ([`crate::PodRuntime::update_volume`]).
    Files(Vec<VolumeFile>),
    /// `emptyDir`.
    Empty,
    /// A path of the machine; it must exist.
    Host(PathBuf),
}

/// One file of a [`VolumeSource::Files`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeFile {
    /// Path below the volume, no leading slash, no `..`.
    pub path: String,
    /// Permission bits, e.g. `0o644`.
    pub mode: u32,
    /// Content.
    #[serde(with = "base64_bytes")]
    pub contents: Vec<u8>,
}

/// A volume seen at a path of one container.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mount {
    /// Name of the pod's volume.
    pub volume: String,
    /// Absolute path in the container. It need not exist on the machine.
    pub path: PathBuf,
    /// `subPath`: one file or folder of the volume. Such a mount does not follow updates.
    pub sub_path: Option<String>,
    /// Writes are refused.
    pub read_only: bool,
}

/// Which capabilities a container's processes hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Rights {
    /// None: neither rules nor marks can be touched.
    #[default]
    App,
    /// `NET_ADMIN`, `NET_RAW`, `NET_BIND_SERVICE`: may set the socket marks that pass the rules.
    Proxy,
}

/// Asks for one container (one supervised program) of a pod.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ContainerRequest {
    /// Name, unique among the pod's running containers.
    pub name: String,
    /// Program and arguments. The program is looked up in the `PATH` of `env`; [`SELF_EXE`] is this binary.
    pub argv: Vec<String>,
    /// The whole environment, nothing is inherited. Without `PATH` a usual one is added.
    pub env: BTreeMap<String, String>,
    /// Working directory; `None` = `/`.
    pub cwd: Option<PathBuf>,
    /// Volumes to see.
    pub mounts: Vec<Mount>,
    /// Capabilities.
    pub rights: Rights,
    /// Host listeners to inherit, by [`HostListener::port`]; see [`types::wellknown::env::LISTEN_FDS`].
    pub listeners: Vec<u16>,
    /// Whether to pass a service for host sockets; see [`types::wellknown::env::HOST_SOCKETS`].
    pub host_sockets: bool,
}

/// A port of the machine that a gateway pod serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostListener {
    /// The pod-side port it stands for (8080, 8443): the port in the gateway's xDS listener.
    pub port: u16,
    /// Where to listen on the machine; port 0 picks a free one.
    pub address: std::net::SocketAddr,
}

/// What cluster DNS says of a name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Name {
    /// Its addresses.
    Addresses(Vec<IpAddr>),
    /// Another full name that stands for it, of the mesh or of the world (`ExternalName`).
    Alias(String),
}

/// A service address to translate, see [`crate::PodRuntime::set_services`].
pub use capture::{Protocol, ServiceAddress, ServicePort};

/// Which of a container's streams.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A signal to a container's first process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Signal {
    /// Ask it to end.
    Term,
    /// `SIGINT`.
    Int,
    /// `SIGHUP`.
    Hup,
    /// `SIGQUIT`.
    Quit,
    /// `SIGUSR1`.
    Usr1,
    /// `SIGUSR2`.
    Usr2,
    /// End it and all it has started, at once.
    Kill,
}

/// What the parent settled for a pod before it asks the manager.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct PodPlan {
    pub(crate) pod: PodId,
    /// Cut to 63 bytes.
    pub(crate) hostname: String,
    pub(crate) network: PodNetwork,
    pub(crate) ip: Ipv4Addr,
    pub(crate) ip6: Ipv6Addr,
    pub(crate) redirect: Option<capture::Redirect>,
    pub(crate) volumes: Vec<Volume>,
    /// Files of `/etc`: name, content.
    pub(crate) etc: Vec<(String, String)>,
}

/// What the parent settled for a container. Descriptors travel beside it: stdin? no; stdout, stderr,
/// then one for each entry of `pass`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ContainerPlan {
    pub(crate) pod: PodId,
    /// Distinguishes restarts of one name.
    pub(crate) serial: u64,
    pub(crate) request: ContainerRequest,
    /// `Some`: run inside this running container instead of making a new one.
    pub(crate) inside: Option<String>,
    /// What each passed descriptor is for.
    pub(crate) pass: Vec<PassedFd>,
}

/// Use of a passed descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum PassedFd {
    /// A host listener, standing for this port.
    Listener(u16),
    /// The client end of a host-socket service.
    HostSockets,
}

/// Bytes as base64 text, so that messages stay JSON.
mod base64_bytes {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        STANDARD.decode(text).map_err(serde::de::Error::custom)
    }
}
