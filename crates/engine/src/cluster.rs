//! Clusters and endpoints, as the runtime holds them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use types::Locality;

use crate::config::Name;
use crate::record::Provenance;
use crate::tls::{Keepalive, ProxyProtocol, UpstreamTls};

/// Where a cluster's endpoints come from.
#[derive(Clone, PartialEq, Debug)]
pub enum Discovery {
    /// Received under this name.
    Eds {
        /// What to subscribe to.
        service: Name,
    },
    /// Carried by the cluster.
    Static,
    /// Names to resolve: every answer is an endpoint (`Strict`) or the first one (`Logical`).
    Dns(Arc<DnsSpec>),
    /// The connection's original destination.
    OriginalDst {
        /// Replaces the port.
        port_override: Option<u16>,
    },
    /// The request's host, resolved when it comes.
    DynamicForward {
        /// Which of its addresses count.
        family: DnsFamily,
    },
}

/// Names to resolve.
#[derive(Clone, PartialEq, Debug)]
pub struct DnsSpec {
    /// Only the first answer counts, for new connections.
    pub logical: bool,
    /// How often.
    pub refresh: Duration,
    /// Which families.
    pub family: DnsFamily,
    /// Where names stand in place of addresses: the endpoints as configured.
    pub template: Vec<DnsLocality>,
}

/// Which addresses to ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DnsFamily {
    /// IPv4 only.
    V4Only,
    /// IPv6 only.
    V6Only,
    /// IPv6, else IPv4.
    V6Preferred,
    /// IPv4, else IPv6.
    V4Preferred,
    /// Both.
    All,
}

impl DnsFamily {
    /// What of a name's addresses counts, in order.
    pub fn choose(self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let of = |v4: bool| addresses.iter().copied().filter(|ip| ip.is_ipv4() == v4).collect::<Vec<_>>();
        let first_of = |one: Vec<IpAddr>, other: bool| if one.is_empty() { of(other) } else { one };
        match self {
            Self::V4Only => of(true),
            Self::V6Only => of(false),
            Self::V4Preferred => first_of(of(true), false),
            Self::V6Preferred => first_of(of(false), true),
            Self::All => addresses.to_vec(),
        }
    }
}

/// A locality of names.
#[derive(Clone, PartialEq, Debug)]
pub struct DnsLocality {
    /// Its place.
    pub locality: Locality,
    /// 0 first.
    pub priority: u32,
    /// Weight among localities of the priority.
    pub weight: u32,
    /// Names (or addresses) and ports.
    pub hosts: Vec<DnsHost>,
}

/// A name to resolve.
#[derive(Clone, PartialEq, Debug)]
pub struct DnsHost {
    /// Name or address.
    pub name: Box<str>,
    /// Port.
    pub port: u16,
    /// What each answer becomes, address aside.
    pub endpoint: Endpoint,
}

/// Whether an endpoint may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Health {
    /// Yes, as far as the control plane knows.
    #[default]
    Healthy,
    /// If there is no healthy one.
    Degraded,
    /// No.
    Unhealthy,
}

/// Where an endpoint listens.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Address {
    /// TCP.
    Ip(SocketAddr),
    /// A Unix socket.
    Unix(Box<str>),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => f.write_str(path),
        }
    }
}

impl Address {
    /// The TCP address.
    pub fn ip(&self) -> Option<SocketAddr> {
        match self {
            Self::Ip(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

/// One endpoint.
#[derive(Clone, PartialEq, Debug)]
pub struct Endpoint {
    /// Where.
    pub address: Address,
    /// Usable?
    pub health: Health,
    /// Weight within its locality, at least 1.
    pub weight: u32,
    /// Its name, for host rewrites; empty for none.
    pub hostname: Box<str>,
    /// Chooses the transport socket (`envoy.transport_socket_match`), key and value.
    pub transport_match: Vec<(Box<str>, Value)>,
    /// `istio.workload`: `name;namespace;canonical name;revision;cluster`; empty if absent.
    pub workload: Box<str>,
}

/// Endpoints of one place and priority.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct LocalityEndpoints {
    /// Where they are.
    pub locality: Locality,
    /// 0 first.
    pub priority: u32,
    /// Weight among the localities of the priority; 0 gets nothing under locality weighting.
    pub weight: u32,
    /// In the order received.
    pub endpoints: Vec<Endpoint>,
}

/// All endpoints of a cluster.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct EndpointSet {
    /// By locality, in the order received.
    pub localities: Vec<LocalityEndpoints>,
    /// In percent; 140 unless set.
    pub overprovisioning: u32,
}

impl EndpointSet {
    /// How many endpoints.
    pub fn len(&self) -> usize {
        self.localities.iter().map(|locality| locality.endpoints.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every endpoint.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.localities.iter().flat_map(|locality| &locality.endpoints)
    }
}

/// How bytes travel to an endpoint.
#[derive(Clone, Debug)]
pub struct TransportSocket {
    /// `tlsMode-istio`, …; empty for the only one.
    pub name: Box<str>,
    /// All of these must be in the endpoint's `transport_match`; empty fits every endpoint.
    pub matches: Vec<(Box<str>, Value)>,
    /// `None`: plaintext.
    pub tls: Option<Arc<UpstreamTls>>,
    /// Sent before anything else.
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// Which HTTP version goes upstream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HttpChoice {
    /// HTTP/1.1
    Http1,
    /// HTTP/2 (prior knowledge without TLS)
    Http2,
    /// What the client spoke.
    Downstream,
    /// What ALPN agrees on: HTTP/2 offered first.
    Auto,
}

/// How a host is chosen.
#[derive(Clone, PartialEq, Debug)]
pub enum Balancing {
    /// In turn, by weight.
    RoundRobin(Option<SlowStart>),
    /// The less busy of `choices` random ones.
    LeastRequest {
        /// How many are compared.
        choices: u32,
        /// Exponent of the active requests when weights differ.
        active_request_bias: f64,
        /// Warm-up.
        slow_start: Option<SlowStart>,
    },
    /// At random, by weight.
    Random,
    /// By hash on a ring.
    RingHash {
        /// At least so many points.
        minimum: u64,
        /// At most so many points.
        maximum: u64,
    },
    /// By hash in a table.
    Maglev {
        /// Prime.
        table_size: u64,
    },
    /// The cluster's own way (original destination).
    ClusterProvided,
}

/// Warm-up of new endpoints.
#[derive(Clone, PartialEq, Debug)]
pub struct SlowStart {
    /// How long.
    pub window: Duration,
    /// Exponent is one over this.
    pub aggression: f64,
    /// The least share, 0 to 1.
    pub min_weight: f64,
}

/// How priorities and localities share traffic.
#[derive(Clone, PartialEq, Debug)]
pub struct LocalityPolicy {
    /// Localities share by weight.
    pub weighted: bool,
    /// Below this percentage of healthy hosts, health is ignored; 0: never.
    pub panic_threshold: f64,
}

/// Limits of a cluster. `u32::MAX` is Istio's "none".
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Limits {
    /// Connections.
    pub connections_max: u32,
    /// Requests waiting for one.
    pub pending_max: u32,
    /// Requests at once.
    pub requests_max: u32,
    /// Retries at once.
    pub retries_max: u32,
    /// Replaces `retries_max`.
    pub retry_budget: Option<RetryBudget>,
}

impl Default for Limits {
    /// Envoy's defaults when a cluster has no `circuit_breakers`.
    fn default() -> Self {
        Self { connections_max: 1024, pending_max: 1024, requests_max: 1024, retries_max: 3, retry_budget: None }
    }
}

/// Retries in proportion to the requests under way.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RetryBudget {
    /// Percent of active and pending requests.
    pub percent: f64,
    /// Always allowed.
    pub min_concurrency: u32,
}

/// HTTP settings of a cluster.
#[derive(Clone, PartialEq, Debug)]
pub struct UpstreamHttp {
    /// Which version.
    pub choice: HttpChoice,
    /// Server name from the request's host.
    pub auto_sni: bool,
    /// The certificate must be for the request's host.
    pub auto_san_validation: bool,
    /// Idle connections are closed; `None`: never.
    pub idle_timeout: Option<Duration>,
    /// Connections are not used longer.
    pub connection_duration_max: Option<Duration>,
    /// Requests per connection.
    pub requests_per_connection_max: Option<u32>,
    /// Streams per HTTP/2 connection.
    pub concurrent_streams_max: Option<u32>,
    /// Windows of HTTP/2.
    pub stream_window: Option<u32>,
    /// Windows of HTTP/2.
    pub connection_window: Option<u32>,
    /// PING interval and time-out of HTTP/2.
    pub keepalive: Option<(Duration, Duration)>,
}

impl Default for UpstreamHttp {
    fn default() -> Self {
        Self {
            choice: HttpChoice::Http1,
            auto_sni: false,
            auto_san_validation: false,
            idle_timeout: Some(Duration::from_hours(1)),
            connection_duration_max: None,
            requests_per_connection_max: None,
            concurrent_streams_max: None,
            stream_window: None,
            connection_window: None,
            keepalive: None,
        }
    }
}

/// A service the cluster stands for, from `filter_metadata["istio"].services`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServiceRef {
    /// Fully qualified.
    pub host: Box<str>,
    /// Name of the service.
    pub name: Box<str>,
    /// Its namespace.
    pub namespace: Box<str>,
}

/// One cluster.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Its name.
    pub name: Name,
    /// What `%UPSTREAM_CLUSTER%` shows: `alt_stat_name`, else the name.
    pub shown_name: Name,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// Endpoints of a static cluster.
    pub inline_endpoints: Option<Arc<EndpointSet>>,
    /// Until connected, TLS included.
    pub connect_timeout: Duration,
    /// How a host is chosen.
    pub balancing: Balancing,
    /// Between priorities and localities.
    pub locality: LocalityPolicy,
    /// Limits.
    pub limits: Limits,
    /// When hosts are ejected; `None`: never.
    pub outlier: Option<Arc<crate::outlier::Policy>>,
    /// The first whose match fits the endpoint is used.
    pub transports: Vec<Arc<TransportSocket>>,
    /// HTTP settings.
    pub http: UpstreamHttp,
    /// Source address of connections (127.0.0.6 inbound).
    pub bind: Option<IpAddr>,
    /// TCP keep-alive; `None`: off.
    pub keepalive: Option<Keepalive>,
    /// Bytes buffered a connection; also bounds the retry buffer.
    pub buffer_max: u32,
    /// Upstream filter `istio.metadata_exchange`: TCP peers exchange metadata.
    pub metadata_exchange: bool,
    /// `istio.alpn` must leave the ALPN list alone.
    pub keep_alpn: bool,
    /// Outside the mesh.
    pub external: bool,
    /// Services it stands for.
    pub services: Vec<ServiceRef>,
    /// `filter_metadata["istio"].subset`.
    pub subset: Box<str>,
    /// The objects that made it.
    pub provenance: Arc<Provenance>,
    /// Tells one version from another.
    pub fingerprint: u64,
}

impl Cluster {
    /// Key of its endpoints in [`crate::RuntimeConfig::endpoints`]: the EDS name, or `dns:<name>`'s
    /// owner for resolved ones. `None` when it carries them or has none.
    pub fn endpoints_key(&self) -> Option<&str> {
        match &self.discovery {
            Discovery::Eds { service } => Some(service),
            Discovery::Dns(_) => Some(&self.name),
            Discovery::Static | Discovery::OriginalDst { .. } | Discovery::DynamicForward { .. } => None,
        }
    }

    /// What must be there before the cluster may serve.
    pub fn needs(&self) -> ClusterNeeds {
        let mut needs = ClusterNeeds { endpoints: None, dns: false, secrets: Vec::new() };
        match &self.discovery {
            Discovery::Eds { service } => needs.endpoints = Some(service.clone()),
            Discovery::Dns(_) => needs.dns = true,
            Discovery::Static | Discovery::OriginalDst { .. } | Discovery::DynamicForward { .. } => {}
        }
        for transport in &self.transports {
            if let Some(tls) = &transport.tls {
                tls.secrets(&mut needs.secrets);
            }
        }
        needs.secrets.sort();
        needs.secrets.dedup();
        needs
    }

    /// The transport socket for an endpoint: the first whose match fits.
    pub fn transport_for(&self, endpoint: Option<&Endpoint>) -> Option<&Arc<TransportSocket>> {
        self.transports.iter().find(|transport| {
            transport.matches.iter().all(|(key, value)| {
                endpoint.is_some_and(|endpoint| {
                    endpoint.transport_match.iter().any(|(name, found)| name == key && found == value)
                })
            })
        })
    }
}

/// What a cluster waits for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterNeeds {
    /// EDS name.
    pub endpoints: Option<Name>,
    /// A first answer of the resolver.
    pub dns: bool,
    /// Names of secrets.
    pub secrets: Vec<Name>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_the_families_asked_for() {
        let [four, six] = ["127.0.0.1", "::1"].map(|text| text.parse::<IpAddr>().unwrap());
        let check = |family: DnsFamily, found: &[IpAddr], chosen: &[IpAddr]| {
            assert_eq!(family.choose(found), chosen, "{family:?} of {found:?}");
        };
        check(DnsFamily::V4Only, &[six, four], &[four]);
        check(DnsFamily::V4Only, &[six], &[]);
        check(DnsFamily::V6Only, &[four, six], &[six]);
        check(DnsFamily::V4Preferred, &[six, four], &[four]);
        check(DnsFamily::V4Preferred, &[six], &[six]);
        check(DnsFamily::V6Preferred, &[four, six], &[six]);
        check(DnsFamily::V6Preferred, &[four], &[four]);
        check(DnsFamily::All, &[six, four], &[six, four]);
    }
}
