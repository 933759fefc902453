//! Listeners and filter chains, and the choice of a chain for a connection.
//!
//! *Source*: Envoy's `FilterChainMatch`: destination port, destination address, server name,
//! transport protocol, application protocols, directly connected source address, source type,
//! source address, source port; at each step the most specific value that fits decides, and there
//! is no way back to a less specific one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::access_log::AccessLog;
use crate::config::{Name, RuntimeConfig};
use crate::facts::{ConnFacts, Transport};
use crate::hcm::{Filter, FilterKind, Hcm, RouteSource};
use crate::matcher::Cidr;
use crate::record::{Provenance, Recorder, Stage, note};
use crate::stream::{NetworkFilter, TcpProxy};
use crate::tls::{DownstreamTls, Keepalive};

/// Which way a listener's traffic goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Direction {
    /// Not said.
    #[default]
    Unspecified,
    /// Towards the local workload.
    Inbound,
    /// From the local workload.
    Outbound,
}

/// One listener.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub name: Name,
    /// Where it listens.
    pub address: SocketAddr,
    /// Further addresses.
    pub additional_addresses: Vec<SocketAddr>,
    /// Whether there is a socket; if not, connections are handed over by original destination.
    pub bind_to_port: bool,
    /// Connections are handed to the listener of their original destination, if there is one.
    pub use_original_dst: bool,
    /// The socket may take addresses that are not ours (TPROXY).
    pub transparent: bool,
    /// What is looked at before a chain is chosen.
    pub filters: ListenerFilters,
    /// Traffic direction.
    pub direction: Direction,
    /// Chains in order.
    pub chains: Vec<Arc<FilterChain>>,
    /// Taken when no chain matches.
    pub default_chain: Option<Arc<FilterChain>>,
    /// Logs of connections that reach no chain.
    pub access_log: Vec<Arc<AccessLog>>,
    /// Bytes buffered a connection.
    pub buffer_max: u32,
    /// TCP keep-alive of accepted sockets; `None`: off.
    pub keepalive: Option<Keepalive>,
    /// The objects that made it.
    pub provenance: Arc<Provenance>,
    /// Tells one version from another.
    pub fingerprint: u64,
}

/// What is looked at before a chain is chosen.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ListenerFilters {
    /// Recover the original destination.
    pub original_dst: bool,
    /// Expect a PROXY protocol preamble.
    pub proxy_protocol: Option<ProxyProtocolIn>,
    /// Look for a ClientHello.
    pub tls_inspector: Option<Inspector>,
    /// Look for HTTP.
    pub http_inspector: Option<Inspector>,
    /// How long to wait for the bytes; `None`: for ever.
    pub timeout: Option<Duration>,
    /// On expiry the connection goes on with what is known; else it is closed.
    pub continue_on_timeout: bool,
}

/// PROXY protocol from clients.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProxyProtocolIn {
    /// Connections without a preamble are taken too.
    pub optional: bool,
}

/// An inspector and where it is switched off.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Inspector {
    /// It does not run where this holds.
    pub disabled: Option<PortPredicate>,
}

impl Inspector {
    /// Whether it looks at connections to `port`.
    pub fn runs_on(&self, port: u16) -> bool {
        !self.disabled.as_ref().is_some_and(|predicate| predicate.matches(port))
    }
}

/// A predicate over the destination port.
#[derive(Clone, PartialEq, Debug)]
pub enum PortPredicate {
    /// Always.
    Any,
    /// From (included) to (excluded).
    Range(u32, u32),
    /// One of them.
    Or(Vec<PortPredicate>),
    /// All of them.
    And(Vec<PortPredicate>),
    /// Not.
    Not(Box<PortPredicate>),
}

impl PortPredicate {
    /// Whether it holds for `port`.
    pub fn matches(&self, port: u16) -> bool {
        match self {
            Self::Any => true,
            Self::Range(from, to) => (*from..*to).contains(&u32::from(port)),
            Self::Or(list) => list.iter().any(|predicate| predicate.matches(port)),
            Self::And(list) => list.iter().all(|predicate| predicate.matches(port)),
            Self::Not(predicate) => !predicate.matches(port),
        }
    }
}

/// One filter chain.
#[derive(Debug)]
pub struct FilterChain {
    /// Its name; may be empty.
    pub name: Name,
    /// When it is taken.
    pub matches: ChainMatch,
    /// `None`: plaintext.
    pub tls: Option<Arc<DownstreamTls>>,
    /// Until the TLS handshake is done; `None`: for ever.
    pub handshake_timeout: Option<Duration>,
    /// Network filters before the last one, in order.
    pub filters: Vec<NetworkFilter>,
    /// The last one.
    pub terminal: Terminal,
    /// The objects that made it.
    pub provenance: Arc<Provenance>,
    /// Same listener, name and match: the chain keeps its place across versions.
    pub key: u64,
    /// Tells one version from another; connections of a chain whose TLS or terminal kind changed drain.
    pub fingerprint: u64,
}

/// What a chain ends in.
#[derive(Clone, Debug)]
pub enum Terminal {
    /// HTTP.
    Http(Arc<Hcm>),
    /// Bytes.
    Tcp(Arc<TcpProxy>),
}

/// When a chain is taken. Empty lists fit everything.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ChainMatch {
    /// Destination port.
    pub destination_port: Option<u16>,
    /// Destination address.
    pub prefix_ranges: Vec<Cidr>,
    /// Lower case; `*.x` fits every name below `x`.
    pub server_names: Vec<Box<str>>,
    /// TLS or not.
    pub transport: Option<Transport>,
    /// Any of these must be offered.
    pub protocols: Vec<Box<str>>,
    /// Peer of the socket.
    pub direct_source_ranges: Vec<Cidr>,
    /// Where the peer is.
    pub source: SourceType,
    /// Peer.
    pub source_ranges: Vec<Cidr>,
    /// Peer's ports.
    pub source_ports: Vec<u16>,
}

/// Where a peer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SourceType {
    /// Anywhere.
    #[default]
    Any,
    /// This machine.
    Local,
    /// Elsewhere.
    External,
}

impl Listener {
    /// The chain with this key.
    pub fn chain_by_key(&self, key: u64) -> Option<&Arc<FilterChain>> {
        self.all_chains().find(|chain| chain.key == key)
    }

    /// Every chain, the default one last.
    pub fn all_chains(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.chains.iter().chain(&self.default_chain)
    }

    /// Names of route tables that must be there before it serves.
    pub fn route_tables(&self) -> Vec<Name> {
        let mut names: Vec<Name> = self
            .all_chains()
            .filter_map(|chain| match &chain.terminal {
                Terminal::Http(hcm) => hcm.rds_name().cloned(),
                Terminal::Tcp(_) => None,
            })
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Names of the clusters that its connections and requests go to and that its authorizers are in, as often as they
    /// are named; those of received route tables aside.
    pub fn clusters(&self) -> impl Iterator<Item = &Name> {
        self.all_chains().flat_map(|chain| {
            let (tcp, table) = match &chain.terminal {
                Terminal::Tcp(tcp) => (&tcp.clusters[..], None),
                Terminal::Http(hcm) => match &hcm.routes {
                    RouteSource::Inline(table) => (&[][..], Some(table)),
                    RouteSource::Rds(_) => (&[][..], None),
                },
            };
            let filters: &[Filter] = match &chain.terminal {
                Terminal::Tcp(_) => &[],
                Terminal::Http(hcm) => &hcm.filters,
            };
            let asked = filters.iter().filter_map(|filter| match &filter.kind {
                FilterKind::ExtAuthz(authz) => Some(&authz.cluster),
                _ => None,
            });
            let named = table.into_iter().flat_map(|table| table.clusters());
            tcp.iter().map(|(name, _)| name).chain(named).chain(asked)
        })
    }

    /// Names of secrets that its chains use.
    pub fn secrets(&self) -> Vec<Name> {
        let mut names = Vec::new();
        for tls in self.all_chains().filter_map(|chain| chain.tls.as_ref()) {
            tls.secrets(&mut names);
        }
        names.sort();
        names.dedup();
        names
    }
}

/// Finds the listener for a connection with an original destination, as Envoy hands over: the one
/// at exactly that address, else the one at the wildcard address with that port.
pub fn listener_for(config: &RuntimeConfig, destination: SocketAddr) -> Option<&Arc<Listener>> {
    let fits = |listener: &Listener, wanted: SocketAddr| {
        !listener.use_original_dst && (listener.address == wanted || listener.additional_addresses.contains(&wanted))
    };
    let find = |wanted: SocketAddr| config.listeners.iter().map(|(_, listener)| listener).find(|l| fits(l, wanted));
    let any: IpAddr = match destination {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    find(destination).or_else(|| find(SocketAddr::new(any, destination.port())))
}

/// How well one value fits: higher is more specific; `None` does not fit.
type Fit = Option<u32>;

/// No filter chain matched: the connection is closed with [`types::Cause::NoFilterChain`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoFilterChain;

/// Chooses the chain of `listener` for a connection.
///
/// *Errors*: no chain fits and there is no default chain; the cause is `NoFilterChain`.
/// *Cost*: one pass over the chains per criterion; no allocation for up to 32 chains.
pub fn select_chain(
    listener: &Listener,
    conn: &ConnFacts,
    recorder: &mut dyn Recorder,
) -> Result<Arc<FilterChain>, NoFilterChain> {
    let chosen = narrow(&listener.chains, conn).or(listener.default_chain.as_ref());
    note(recorder, Stage::Chain, chosen.map(|chain| &chain.provenance), || match chosen {
        Some(chain) => (chain.name.to_string(), String::new()),
        None => ("none".to_owned(), "no filter chain fits the connection".to_owned()),
    });
    chosen.cloned().ok_or(NoFilterChain)
}

fn narrow<'a>(chains: &'a [Arc<FilterChain>], conn: &ConnFacts) -> Option<&'a Arc<FilterChain>> {
    let criteria: [&dyn Fn(&ChainMatch) -> Fit; 9] = [
        &|m| exact_or_any(m.destination_port.as_ref(), &conn.local.port()),
        &|m| longest(&m.prefix_ranges, conn.local.ip()),
        &|m| server_name(&m.server_names, conn.server_name.as_deref()),
        &|m| exact_or_any(m.transport.as_ref(), &conn.transport),
        &|m| protocols(&m.protocols, &conn.protocols),
        &|m| longest(&m.direct_source_ranges, conn.direct_peer.ip()),
        &|m| source_type(m.source, conn),
        &|m| longest(&m.source_ranges, conn.peer.ip()),
        &|m| one_of(&m.source_ports, conn.peer.port()),
    ];
    let mut left: smallvec::SmallVec<[&'a Arc<FilterChain>; 32]> = chains.iter().collect();
    for fit in criteria {
        let best = left.iter().filter_map(|chain| fit(&chain.matches)).max()?;
        left.retain(|chain| fit(&chain.matches) == Some(best));
    }
    // Two chains with the same match are refused when the listener is lowered.
    left.first().copied()
}

fn exact_or_any<T: PartialEq>(wanted: Option<&T>, found: &T) -> Fit {
    match wanted {
        None => Some(0),
        Some(wanted) => (wanted == found).then_some(1),
    }
}

fn longest(ranges: &[Cidr], address: IpAddr) -> Fit {
    if ranges.is_empty() {
        return Some(0);
    }
    ranges.iter().filter(|range| range.contains(address)).map(|range| u32::from(range.prefix_len()) + 1).max()
}

fn server_name(names: &[Box<str>], found: Option<&str>) -> Fit {
    if names.is_empty() {
        return Some(0);
    }
    let found = found?;
    names.iter().filter_map(|name| server_name_fit(name, found)).max()
}

fn server_name_fit(name: &str, found: &str) -> Fit {
    match name.strip_prefix('*') {
        None => (name == found).then_some(u32::MAX),
        Some("") => Some(0),
        Some(suffix) => {
            let fits = found.len() > suffix.len() && found.ends_with(suffix);
            fits.then(|| u32::try_from(suffix.len()).unwrap_or(u32::MAX - 1))
        }
    }
}

fn protocols(wanted: &[Box<str>], offered: &[Box<str>]) -> Fit {
    if wanted.is_empty() {
        return Some(0);
    }
    // The client's order decides between chains: its first protocol that some chain takes.
    offered
        .iter()
        .position(|protocol| wanted.contains(protocol))
        .map(|at| u32::MAX - u32::try_from(at).unwrap_or(u32::MAX - 1))
}

fn source_type(wanted: SourceType, conn: &ConnFacts) -> Fit {
    let local = conn.peer.ip().is_loopback() || conn.peer.ip() == conn.local.ip();
    match wanted {
        SourceType::Any => Some(0),
        SourceType::Local => local.then_some(1),
        SourceType::External => (!local).then_some(1),
    }
}

fn one_of(wanted: &[u16], found: u16) -> Fit {
    if wanted.is_empty() { Some(0) } else { wanted.contains(&found).then_some(1) }
}

#[cfg(test)]
mod tests;
