//! What a workload requires of those who talk to it: mutual TLS, tokens, policies.
//!
//! [`filters`] gives the filters of authentication and authorization, for sidecars (inbound) and
//! gateways alike; [`inbound`] the chains of listener 15006; [`tls`] the TLS contexts.
//!
//! **Invariants.** A security object that cannot be understood fails closed: see [`rule`] and
//! [`jwt`]. Output does not depend on hash order: see [`wire`].

use api::mesh_config::MeshConfig;
use api::security::{AuthorizationPolicy, JwtRule, RequestAuthentication};
use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use mesh::{Config, Fetched, KeySource};
use types::Finding;

use crate::context::Context;

pub(crate) mod authz;
pub(crate) mod ext_authz;
pub(crate) mod inbound;
pub(crate) mod jwt;
pub(crate) mod matchers;
#[cfg(test)]
pub(crate) mod render;
pub(crate) mod rule;
pub(crate) mod tls;
pub(crate) mod wire;

/// Where filters are placed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// Inbound at a sidecar.
    Sidecar,
    /// At a gateway, where routing may depend on claims.
    Gateway,
}

/// What filters need to know of the mesh beyond policies.
pub(crate) trait Lookup {
    /// The fully qualified host of `host` or `namespace/host`, if a service of that name has the port.
    fn host_with_port(&self, service: &str, port: u16) -> Option<String>;
    /// What was fetched of the keys of a rule that does not hold them; `None` while they are asked for.
    fn key_set(&self, rule: &JwtRule) -> Option<&Fetched>;
}

/// All that the policy filters of one workload depend on.
pub(crate) struct PolicyFacts<'a> {
    pub(crate) place: Place,
    pub(crate) mesh_config: &'a MeshConfig,
    /// The mesh's trust domain, then its aliases.
    pub(crate) trust_domains: Vec<String>,
    /// Those that hold for the workload.
    pub(crate) authorization: Vec<&'a Config<AuthorizationPolicy>>,
    /// Those that hold for the workload.
    pub(crate) authentication: Vec<&'a Config<RequestAuthentication>>,
    pub(crate) services: &'a dyn Lookup,
    /// The proxy can ask authorizers that speak gRPC.
    pub(crate) asks_over_grpc: bool,
}

/// The filters, in the order in which they run.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct PolicyFilters {
    /// For HTTP connection managers.
    pub(crate) http: Vec<HttpFilter>,
    /// For chains that relay bytes.
    pub(crate) tcp: Vec<Filter>,
    /// What does not work as written.
    pub(crate) findings: Vec<Finding>,
}

/// Compiles the policies of a workload.
pub(crate) fn filters(facts: &PolicyFacts<'_>) -> PolicyFilters {
    let mut out = PolicyFilters::default();
    authz::append_custom(facts, &mut out);
    jwt::append(facts, &mut out);
    authz::append(facts, &mut out);
    out
}

/// The filters of the proxy's own workload. Policies with `targetRef` are for waypoints and
/// Gateway API gateways, never for these.
pub(crate) fn policy_filters(context: &Context<'_>, place: Place) -> PolicyFilters {
    let (snapshot, view) = (context.snapshot, context.view);
    let root = snapshot.root_namespace();
    filters(&PolicyFacts {
        place,
        mesh_config: snapshot.mesh_config(),
        trust_domains: context.trust_domains.clone(),
        authorization: snapshot
            .authorization_policies()
            .matching(root, &view.namespace, &view.labels)
            .filter(|policy| policy.spec.target_ref.is_none() && policy.spec.target_refs.is_empty())
            .collect(),
        authentication: snapshot
            .request_authentications()
            .matching(root, &view.namespace, &view.labels)
            .filter(|policy| policy.spec.target_ref.is_none() && policy.spec.target_refs.is_empty())
            .collect(),
        services: context,
        asks_over_grpc: view.capabilities.has_grpc_authorizers,
    })
}

impl Lookup for Context<'_> {
    fn host_with_port(&self, service: &str, port: u16) -> Option<String> {
        let (namespace, host) = match service.split_once('/') {
            Some((namespace, host)) => (Some(namespace), host),
            None => (None, service),
        };
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let found = self.service(&host)?;
        let fits = namespace.is_none_or(|namespace| *found.namespace == *namespace) && found.port(port).is_some();
        fits.then(|| found.host.to_string())
    }

    fn key_set(&self, rule: &JwtRule) -> Option<&Fetched> {
        self.snapshot.key_sets().get(&KeySource::of(rule)?)
    }
}

#[cfg(test)]
mod policy_tests;
#[cfg(test)]
pub(crate) mod test_mesh;
