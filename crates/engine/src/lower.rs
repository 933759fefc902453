//! From Envoy's v3 resources to the runtime's tables.
//!
//! Every message is taken apart; what is left must be its default, or the resource is refused with
//! the field's name. A resource is accepted or refused whole; a refused one keeps its last value.
//!
//! **Harmless**, hence taken without effect: statistics settings (`stats_matcher`,
//! `track_cluster_stats`), socket tuning (`tcp_backlog_size`, `enable_reuse_port`,
//! `max_connections_to_accept_per_socket_event`, `connection_balance_config`), `decorator.propagate`,
//! resolver tuning (`typed_dns_resolver_config`, and `dns_jitter` and `respect_dns_ttl`: the system's resolver tells no
//! time to live), `cleanup_interval`, `drain_type`, `proxy_100_continue` (a 100 of the application is passed on anyhow),
//! overrides of Istio's metrics (`stats.PluginConfig.metrics`),
//! `ignore_health_on_host_removal`, `delayed_close_timeout` and `drain_timeout_jitter` (how a connection that has
//! ended is let go), `ocsp_staple` and its policy (nothing is stapled), and `validate_clusters` (a missing cluster is found per request).

use std::sync::Arc;

use envoy_types::pb::google::protobuf::Any;

use crate::chain::Listener;
use crate::cluster::{Cluster, EndpointSet};
use crate::config::{Name, Table};
use crate::route::RouteTable;
use crate::unsupported::Unsupported;

mod access_log;
mod cluster;
mod common;
mod endpoint;
mod hcm;
mod listener;
mod network;
mod route;
mod tls;

#[cfg(test)]
mod tests;

pub(crate) use common::json_struct;
pub use common::{config_source, nothing_left, socket_address};
pub use endpoint::resolved_endpoints;
pub use tls::secret;

/// A resource as received.
#[derive(Clone, Debug, PartialEq)]
pub struct Raw {
    /// Its name.
    pub name: Name,
    /// The message.
    pub body: Any,
}

/// A resource that was refused; its last good version, if any, stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its name.
    pub name: Name,
    /// Field and reason, for the NACK.
    pub reason: String,
}

fn apply<T>(
    prev: &Table<T>,
    update: &[Raw],
    removed: &[Name],
    lower: impl Fn(&Any) -> Result<(Name, T), Unsupported>,
    same: impl Fn(&T, &Any) -> bool,
) -> (Table<T>, Vec<Rejected>) {
    let mut next = prev.clone();
    let mut rejected = Vec::new();
    for name in removed {
        next.remove(name);
    }
    for raw in update {
        if let Some(old) = prev.get(&raw.name).filter(|old| same(old, &raw.body)) {
            // It may be among what is removed: gone and here again is here.
            next.insert(raw.name.clone(), Arc::clone(old));
            continue;
        }
        match lower(&raw.body) {
            Ok((name, _)) if !raw.name.is_empty() && name != raw.name => rejected
                .push(Rejected { name: raw.name.clone(), reason: format!("the resource is called {name:?} inside") }),
            Ok((name, value)) => next.insert(name, Arc::new(value)),
            Err(bad) => rejected.push(Rejected { name: raw.name.clone(), reason: bad.to_string() }),
        }
    }
    (next, rejected)
}

/// The next table of listeners, and what was refused.
pub fn apply_listeners(prev: &Table<Listener>, update: &[Raw], removed: &[Name]) -> (Table<Listener>, Vec<Rejected>) {
    apply(prev, update, removed, listener::lower, |old, any| old.fingerprint == common::fingerprint(any))
}

/// The next table of clusters, and what was refused.
pub fn apply_clusters(prev: &Table<Cluster>, update: &[Raw], removed: &[Name]) -> (Table<Cluster>, Vec<Rejected>) {
    apply(prev, update, removed, cluster::lower, |old, any| old.fingerprint == common::fingerprint(any))
}

/// The next table of route tables, and what was refused.
pub fn apply_routes(prev: &Table<RouteTable>, update: &[Raw], removed: &[Name]) -> (Table<RouteTable>, Vec<Rejected>) {
    apply(prev, update, removed, route::lower_any, |old, any| old.fingerprint == common::fingerprint(any))
}

/// The next table of endpoints, and what was refused.
pub fn apply_endpoints(
    prev: &Table<EndpointSet>,
    update: &[Raw],
    removed: &[Name],
) -> (Table<EndpointSet>, Vec<Rejected>) {
    apply(prev, update, removed, endpoint::lower_any, |_, _| false)
}
