//! What a gateway opens: Gateway servers as listeners and route tables.
//!
//! Source: `docs/parity.md`, Traffic 4, Security 12. [`servers`] decides which servers hold
//! and which share a listener, [`listener`] builds listeners, [`tables`] their route tables.
//!
//! **Invariants.** A server that cannot be opened closes no other one. A missing secret leaves its
//! chain in place, so that nothing else takes its name.

use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;

use crate::context::Context;

pub(crate) mod listener;
pub(crate) mod servers;
pub(crate) mod tables;
pub(crate) mod tls;

/// All that servers become.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Compiled {
    /// By address and port.
    pub(crate) listeners: Vec<Listener>,
    /// By name.
    pub(crate) routes: Vec<RouteConfiguration>,
}

/// Compiles the servers of the gateway that the proxy is.
pub(crate) fn compile(context: &Context<'_>) -> Compiled {
    let opened = servers::opened(context);
    let mut out = Compiled::default();
    let policies = crate::security::policy_filters(context, crate::security::Place::Gateway);
    for port in &opened {
        out.listeners.extend(listener::build(context, port, &policies));
        out.routes.extend(tables::build(context, port));
    }
    context.find_all(policies.findings);
    out.routes.sort_by(|a, b| a.name.cmp(&b.name));
    out
}

#[cfg(test)]
mod tests;
