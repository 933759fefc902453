//! Services, their ports, and the endpoints behind them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use types::{Labels, Locality, NamespacedName, ObjectRef, Selector};

use crate::protocol::Protocol;
use crate::visibility::Visibility;

/// When an object was made. Conflicts go to the older one: creation, then name, then namespace.
///
/// *Source*: `docs/parity.md`, Traffic 1.3, "ordering for conflicts".
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Age {
    /// Larger is younger.
    pub created: i64,
    /// The object's name.
    pub name: Box<str>,
    /// The object's namespace.
    pub namespace: Box<str>,
}

/// Where a service is known from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Registry {
    /// A Kubernetes Service.
    Kubernetes,
    /// A ServiceEntry.
    External,
}

/// How a client finds the endpoint to dial.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Resolution {
    /// From the endpoints that the control plane sends.
    Endpoints,
    /// From all answers of DNS.
    Dns,
    /// From the first answer of DNS.
    DnsRoundRobin,
    /// The address that the client dialled (headless Services; ServiceEntry `NONE`).
    Original,
    /// From DNS, by the request's own host.
    DynamicDns,
}

/// The port of the workload behind a service's port.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// The name of a container's port.
    Name(Box<str>),
}

/// One port of a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// As clients dial it.
    pub number: u16,
    /// As written; may be empty.
    pub name: Box<str>,
    /// What it speaks.
    pub protocol: Protocol,
    /// Where it leads.
    pub target: TargetPort,
}

/// One address under which clients dial a service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ServiceAddress {
    /// One IP.
    Ip(IpAddr),
    /// A range.
    Range(IpNet),
}

impl fmt::Display for ServiceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Range(net) => net.fmt(f),
        }
    }
}

/// `trafficDistribution`
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TrafficDistribution {
    /// `PreferClose`, `PreferSameZone`
    SameZone,
    /// `PreferSameNode`
    SameNode,
}

/// A destination that the mesh knows, whoever declared it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Fully qualified, lower case; may be a wildcard for ServiceEntries.
    pub host: Box<str>,
    /// The Service's name; a ServiceEntry's host.
    pub name: Box<str>,
    /// The object's namespace.
    pub namespace: Box<str>,
    /// The object that declared it.
    pub object: ObjectRef,
    /// For conflicts.
    pub age: Age,
    /// Where it is known from.
    pub registry: Registry,
    /// Outside the mesh (ServiceEntry `MESH_EXTERNAL`).
    pub is_external: bool,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// A Kubernetes Service without a cluster IP.
    pub is_headless: bool,
    /// Addresses that clients dial, as declared. Empty for headless and address-less ones.
    pub addresses: Vec<ServiceAddress>,
    /// Address given by the mesh to a ServiceEntry without one; only proxies that answer DNS use it.
    pub auto_address: Option<IpAddr>,
    /// TCP ports and UDP ones, as declared; numbers are unique.
    pub ports: Vec<ServicePort>,
    /// The object's labels.
    pub labels: Labels,
    /// The object's annotations.
    pub annotations: Labels,
    /// Pods (or WorkloadEntries) it selects; `None` selects nothing.
    pub selector: Option<Selector>,
    /// Who sees it.
    pub visibility: Visibility,
    /// Extra names in server certificates.
    pub subject_alt_names: Vec<String>,
    /// Hosts of ExternalName Services that lead here, sorted.
    pub aliases: Vec<Box<str>>,
    /// Preference for near endpoints.
    pub traffic_distribution: Option<TrafficDistribution>,
    /// Endpoints count as ready always.
    pub publishes_not_ready: bool,
    /// Only endpoints of the client's node.
    pub is_internal_traffic_local: bool,
}

impl Service {
    /// The port with this number.
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.number == number)
    }

    /// Its key: the same host may be declared in several namespaces.
    pub fn key(&self) -> ServiceKey {
        ServiceKey { host: self.host.clone(), namespace: self.namespace.clone() }
    }

    /// The addresses that a proxy uses; automatic ones only if it answers the application's DNS.
    pub fn addresses_for(&self, captures_dns: bool) -> Vec<ServiceAddress> {
        match self.auto_address {
            Some(ip) if captures_dns && self.addresses.is_empty() => vec![ServiceAddress::Ip(ip)],
            _ => self.addresses.clone(),
        }
    }
}

/// Identity of a service in a snapshot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceKey {
    /// Fully qualified host.
    pub host: Box<str>,
    /// Namespace of the declaring object.
    pub namespace: Box<str>,
}

/// What an endpoint is dialled by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum EndpointAddress {
    /// An IP.
    Ip(IpAddr),
    /// A DNS name.
    Name(Box<str>),
    /// A Unix socket.
    Unix(Box<str>),
}

impl fmt::Display for EndpointAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Name(name) | Self::Unix(name) => f.write_str(name),
        }
    }
}

/// Whether an endpoint takes traffic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Health {
    /// Takes traffic, and the platform says so.
    Ready,
    /// Sent as unhealthy, never picked.
    NotReady,
    /// Takes traffic; nobody checks (ServiceEntry).
    Unchecked,
}

/// The workload behind an endpoint, as far as known.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Workload {
    /// The pod's or WorkloadEntry's name.
    pub name: Box<str>,
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Its labels.
    pub labels: Labels,
    /// Its service account, empty when unknown.
    pub service_account: Box<str>,
    /// The Deployment (or other owner) it belongs to.
    pub workload_name: Box<str>,
    /// `service.istio.io/canonical-name`, or `app`, or the workload's name.
    pub canonical_name: Box<str>,
    /// `service.istio.io/canonical-revision`, or `version`; empty when unlabelled or `latest`.
    pub canonical_revision: Box<str>,
    /// Where it runs.
    pub locality: Locality,
    /// The node it runs on.
    pub node: Box<str>,
    /// Named container ports.
    pub ports: BTreeMap<Box<str>, u16>,
    /// It speaks mesh TLS (`security.istio.io/tlsMode: istio`).
    pub is_tls_capable: bool,
    /// The pod is ready.
    pub is_ready: bool,
    /// `hostname` of the pod, under a headless Service.
    pub hostname: Box<str>,
}

impl Workload {
    /// `namespace/name`.
    pub fn key(&self) -> NamespacedName {
        NamespacedName::new(&self.namespace, &self.name)
    }
}

/// One endpoint of one port of a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// What is dialled.
    pub address: EndpointAddress,
    /// The workload's port; 0 for Unix sockets.
    pub port: u16,
    /// Whether it takes traffic.
    pub health: Health,
    /// Never 0.
    pub weight: u32,
    /// Where it runs.
    pub locality: Locality,
    /// The workload's labels (for subsets), or the ServiceEntry endpoint's.
    pub labels: Labels,
    /// What runs there; `None` for bare addresses.
    pub workload: Option<Arc<Workload>>,
}

impl Endpoint {
    /// Whether it can speak mesh TLS.
    pub fn is_tls_capable(&self) -> bool {
        self.workload.as_ref().is_some_and(|workload| workload.is_tls_capable)
    }
}

/// All endpoints of a service by service port; ports without endpoints are absent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EndpointSet {
    /// Sorted by address within a port.
    pub by_port: BTreeMap<u16, Vec<Endpoint>>,
}

impl EndpointSet {
    /// The endpoints of one service port.
    pub fn port(&self, number: u16) -> &[Endpoint] {
        self.by_port.get(&number).map_or(&[], Vec::as_slice)
    }

    /// The distinct `(namespace, service account)` pairs behind it, sorted.
    pub fn service_accounts(&self) -> Vec<(Box<str>, Box<str>)> {
        let mut accounts: Vec<_> = self
            .by_port
            .values()
            .flatten()
            .filter_map(|endpoint| endpoint.workload.as_ref())
            .filter(|workload| !workload.service_account.is_empty())
            .map(|workload| (workload.namespace.clone(), workload.service_account.clone()))
            .collect();
        accounts.sort();
        accounts.dedup();
        accounts
    }
}
