//! Endpoints of clusters.
//!
//! *Source*: `docs/parity.md`, Traffic 1.7.

use std::collections::BTreeMap;

use api::networking::ClientTlsMode;
use api::security::MtlsMode;
use envoy_types::pb::envoy::config::core::v3::{Address, HealthStatus, Locality as WireLocality, Pipe, address};
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint as WireEndpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint,
};
use mesh::{Endpoint, EndpointAddress, Health};
use types::Locality;

use crate::cluster::Outbound;
use crate::context::Context;
use crate::locality;
use crate::wire::{self, text, uint};

/// The endpoints of one cluster, by locality; `{cluster_name}` only when there are none.
pub(crate) fn assignment(context: &Context<'_>, of: &Outbound<'_>) -> ClusterLoadAssignment {
    let set = context.snapshot.endpoints(&of.service.key());
    let leaves_out_unhealthy =
        of.policy.outlier_detection.as_ref().is_some_and(|outlier| outlier.min_health_percent > 0);
    let chosen: Vec<&Endpoint> = set
        .port(of.port.number)
        .iter()
        .filter(|endpoint| !(leaves_out_unhealthy && endpoint.health == Health::NotReady))
        .filter(|endpoint| {
            let pairs = of.subset.map(|subset| &subset.spec.labels);
            pairs.is_none_or(|pairs| pairs.iter().all(|(key, value)| endpoint.labels.get(key) == Some(value)))
        })
        .filter(|endpoint| {
            !of.service.is_internal_traffic_local
                || endpoint.workload.as_ref().is_some_and(|workload| workload.node == context.view.node)
        })
        .collect();
    let mut by_locality: BTreeMap<&Locality, Vec<&Endpoint>> = BTreeMap::new();
    for endpoint in chosen {
        by_locality.entry(&endpoint.locality).or_default().push(endpoint);
    }
    let groups = locality::arrange(context, of, by_locality);
    ClusterLoadAssignment {
        cluster_name: of.name(),
        endpoints: groups
            .into_iter()
            .map(|group| LocalityLbEndpoints {
                locality: Some(wire_locality(&group.locality)),
                load_balancing_weight: uint(group.weight),
                priority: group.priority,
                lb_endpoints: group.endpoints.into_iter().map(|endpoint| lb_endpoint(context, of, endpoint)).collect(),
                ..LocalityLbEndpoints::default()
            })
            .collect(),
        ..ClusterLoadAssignment::default()
    }
}

fn wire_locality(of: &Locality) -> WireLocality {
    WireLocality { region: of.region.to_string(), zone: of.zone.to_string(), sub_zone: of.sub_zone.to_string() }
}

/// Whether mesh mTLS reaches an endpoint: it can, and its port does not refuse it.
pub(crate) fn speaks_mesh_tls(context: &Context<'_>, endpoint: &Endpoint) -> bool {
    let Some(workload) = &endpoint.workload else {
        return false;
    };
    workload.is_tls_capable
        && context.snapshot.mtls_policy(&workload.namespace, &workload.labels).port(endpoint.port) != MtlsMode::Disable
}

fn lb_endpoint(context: &Context<'_>, of: &Outbound<'_>, endpoint: &Endpoint) -> LbEndpoint {
    let workload = match &endpoint.workload {
        Some(workload) => format!(
            "{};{};{};{};{}",
            workload.workload_name,
            workload.namespace,
            workload.canonical_name,
            workload.canonical_revision,
            context.view.cluster_id
        ),
        None => format!(";;;;{}", context.view.cluster_id),
    };
    let rule_allows = of.policy.tls.as_ref().is_none_or(|tls| tls.mode == ClientTlsMode::IstioMutual);
    let mut socket_match = Vec::new();
    if rule_allows && speaks_mesh_tls(context, endpoint) {
        socket_match.push(("tlsMode", text("istio")));
    }
    let health = match endpoint.health {
        Health::Ready => HealthStatus::Healthy,
        Health::NotReady => HealthStatus::Unhealthy,
        Health::Unchecked => HealthStatus::Unknown,
    };
    LbEndpoint {
        host_identifier: Some(lb_endpoint::HostIdentifier::Endpoint(WireEndpoint {
            address: Some(address(endpoint)),
            ..WireEndpoint::default()
        })),
        health_status: health.into(),
        metadata: wire::metadata(vec![
            ("envoy.transport_socket_match", socket_match),
            ("istio", vec![("workload", text(workload))]),
        ]),
        load_balancing_weight: uint(endpoint.weight),
    }
}

fn address(endpoint: &Endpoint) -> Address {
    match &endpoint.address {
        EndpointAddress::Unix(path) => {
            Address { address: Some(address::Address::Pipe(Pipe { path: path.to_string(), ..Pipe::default() })) }
        }
        other => wire::socket_address(&other.to_string(), endpoint.port),
    }
}

/// An assignment of one address.
pub(crate) fn single(name: &str, host: &str, port: u16) -> ClusterLoadAssignment {
    let address = match host.strip_prefix('/') {
        Some(_) => Address { address: Some(address::Address::Pipe(Pipe { path: host.to_owned(), ..Pipe::default() })) },
        None => wire::socket_address(host, port),
    };
    let endpoint = LbEndpoint {
        host_identifier: Some(lb_endpoint::HostIdentifier::Endpoint(WireEndpoint {
            address: Some(address),
            ..WireEndpoint::default()
        })),
        ..LbEndpoint::default()
    };
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..LocalityLbEndpoints::default() }],
        ..ClusterLoadAssignment::default()
    }
}
