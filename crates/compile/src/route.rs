//! Routes: VirtualServices translated, and the tables of a sidecar.
//!
//! [`http::routes`] serves sidecars and gateways alike; [`table`] makes what a sidecar asks for by
//! RDS.
//!
//! *Source*: `docs/parity.md`, Traffic 1.4, 1.5, 2.

pub(crate) mod http;
mod matching;
mod retry;
pub(crate) mod table;

use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3::{
    Decorator, Route, RouteAction, RouteMatch, route, route_action, route_match,
};

use crate::context::Context;
use crate::wire::{self, zero};

pub(crate) use http::destination_cluster;
pub(crate) use retry::default_policy;

/// A match of everything.
pub(crate) fn match_all() -> RouteMatch {
    RouteMatch { path_specifier: Some(route_match::PathSpecifier::Prefix("/".into())), ..RouteMatch::default() }
}

/// An action towards one cluster, with both time-outs set.
#[expect(deprecated, reason = "Istio sets the limit of gRPC's own time-out with this field")]
pub(crate) fn action(timeout: Option<Duration>) -> RouteAction {
    let of = timeout.map_or_else(zero, wire::duration);
    RouteAction { timeout: of, max_grpc_timeout: of, ..RouteAction::default() }
}

/// The route of a service that no VirtualService routes.
pub(crate) fn default_route(
    context: &Context<'_>,
    cluster: &str,
    operation: String,
    hash: Vec<route_action::HashPolicy>,
) -> Route {
    let mut to = action(None);
    to.cluster_specifier = Some(route_action::ClusterSpecifier::Cluster(cluster.to_owned()));
    to.retry_policy = default_policy(context.snapshot.mesh_config());
    to.hash_policy = hash;
    Route {
        name: "default".into(),
        r#match: Some(match_all()),
        action: Some(route::Action::Route(to)),
        decorator: Some(Decorator { operation, propagate: None }),
        ..Route::default()
    }
}
