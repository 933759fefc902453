//! One connection of bytes, as a state machine without I/O.
//!
//! ```text
//!   start ──► Ask ──Authorized──┐
//!     │                         ▼
//!     ├──────────────────► Connect ──Connected──► Relay ──► (end)
//!     │                      ▲  └──Failed──► Connect (again, as often as allowed)
//!     └──► Close             └───────────────────┘
//! ```

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use types::Cause;

use crate::access_log::AccessLog;
use crate::chain::FilterChain;
use crate::config::Name;
use crate::exchange::{Attempt, AuthorizeAnswer, AuthorizeQuestion, StreamInfo};
use crate::facts::ConnFacts;
use crate::record::Recorder;

mod machine;

#[cfg(test)]
mod tests;

pub use machine::Stream;

/// A network filter before the last one: a closed list.
#[derive(Debug)]
pub enum NetworkFilter {
    /// Peers exchange who they are when ALPN says so.
    MetadataExchange {
        /// ALPN protocol that tells.
        protocol: Box<str>,
    },
    /// Istio's metrics.
    Stats(crate::hcm::Stats),
    /// Policy for connections.
    Rbac(Box<crate::authz::Rbac>),
    /// MongoDB statistics (bytes pass).
    MongoProxy,
}

/// Relays bytes.
#[derive(Debug)]
pub struct TcpProxy {
    /// Prefix of its metrics.
    pub stat_prefix: Box<str>,
    /// Clusters with weights; one for a plain cluster.
    pub clusters: Vec<(Name, u32)>,
    /// Both directions silent for so long; `None`: never.
    pub idle_timeout: Option<Duration>,
    /// Connects tried.
    pub connect_attempts_max: u32,
    /// A connection's whole life.
    pub connection_duration_max: Option<Duration>,
    /// The peer's address is the hash key.
    pub hash_source_ip: bool,
    /// Logs.
    pub access_log: Vec<Arc<AccessLog>>,
}

/// What is to be done next.
#[derive(Debug)]
pub enum StreamStep {
    /// Ask an authorizer.
    Ask(Box<AuthorizeQuestion>),
    /// Connect there; resume with `Connected` or `Failed`.
    Connect(Box<TcpAttempt>),
    /// Relay bytes both ways.
    Relay {
        /// Both directions silent for so long; `None`: never.
        idle_timeout: Option<Duration>,
        /// In all; `None`: no limit.
        duration_max: Option<Duration>,
    },
    /// Close without a byte.
    Close(Cause),
}

/// One try to connect.
#[derive(Debug)]
pub struct TcpAttempt {
    /// Where to, with its counters, transport and ALPN.
    pub attempt: Attempt,
    /// Peers exchange metadata on this connection when ALPN agrees on `istio-peer-exchange`.
    pub metadata_exchange: bool,
}

/// What came of a step.
#[derive(Debug)]
pub enum StreamAnswer {
    /// Connected, TLS included.
    Connected,
    /// Not connected: cause and transport failure reason.
    Failed(Cause, Box<str>),
    /// The authorizer's answer.
    Authorized(Result<AuthorizeAnswer, Cause>),
    /// Addresses of a name.
    Resolved(Result<Vec<IpAddr>, Cause>),
}

/// What a stream is started with.
pub struct StreamStart<'a> {
    /// The chain; it must end in TCP.
    pub chain: &'a Arc<FilterChain>,
    /// The connection.
    pub conn: &'a Arc<ConnFacts>,
    /// Every draw comes from it.
    pub seed: u64,
    /// Listens to decisions.
    pub recorder: &'a mut dyn Recorder,
}

/// Network filters of an HTTP chain decide before the first request: whether the connection may go
/// on. `Err` closes it.
pub fn admit(
    chain: &FilterChain,
    conn: &ConnFacts,
    info: &mut StreamInfo,
    recorder: &mut dyn Recorder,
) -> Result<(), Cause> {
    machine::admit(chain, conn, info, recorder)
}
