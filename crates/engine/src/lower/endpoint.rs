//! Endpoints.

use std::net::{IpAddr, SocketAddr};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use types::Locality;

use super::common::{json, metadata_text, nothing_left, port, socket_address};
use crate::cluster::{Address, DnsHost, DnsLocality, DnsSpec, Endpoint, EndpointSet, Health, LocalityEndpoints};
use crate::config::Name;
use crate::unsupported::{Unsupported, Within, unpack};

const TRANSPORT_MATCH: &str = "envoy.transport_socket_match";

pub(super) fn lower_any(any: &Any) -> Result<(Name, EndpointSet), Unsupported> {
    let assignment: pb::ClusterLoadAssignment = unpack(any, "")?;
    let name = Name::from(assignment.cluster_name.as_str());
    if name.is_empty() {
        return Err(Unsupported::missing("cluster_name"));
    }
    Ok((name, lower(assignment)?))
}

fn overprovisioning(assignment: &mut pb::ClusterLoadAssignment) -> Result<u32, Unsupported> {
    let Some(mut policy) = assignment.policy.take() else { return Ok(140) };
    let factor = policy.overprovisioning_factor.take().map_or(140, |value| value.value);
    nothing_left(&policy).within("policy")?;
    Ok(factor)
}

/// Endpoints with addresses.
pub(super) fn lower(mut assignment: pb::ClusterLoadAssignment) -> Result<EndpointSet, Unsupported> {
    assignment.cluster_name.clear();
    let overprovisioning = overprovisioning(&mut assignment)?;
    let mut localities = Vec::with_capacity(assignment.endpoints.len());
    for (index, locality) in std::mem::take(&mut assignment.endpoints).into_iter().enumerate() {
        localities.push(lower_locality(locality).within_item("endpoints", index)?);
    }
    nothing_left(&assignment)?;
    Ok(EndpointSet { localities, overprovisioning })
}

struct Place {
    locality: Locality,
    priority: u32,
    weight: u32,
    endpoints: Vec<pb::LbEndpoint>,
}

fn place(mut proto: pb::LocalityLbEndpoints) -> Result<Place, Unsupported> {
    let locality = proto.locality.take().unwrap_or_default();
    let place = Place {
        locality: Locality {
            region: locality.region.into(),
            zone: locality.zone.into(),
            sub_zone: locality.sub_zone.into(),
        },
        priority: std::mem::take(&mut proto.priority),
        weight: proto.load_balancing_weight.take().map_or(0, |weight| weight.value),
        endpoints: std::mem::take(&mut proto.lb_endpoints),
    };
    if place.priority > 127 {
        return Err(Unsupported::new("priority", "must not be above 127"));
    }
    proto.metadata = None;
    nothing_left(&proto)?;
    Ok(place)
}

fn lower_locality(proto: pb::LocalityLbEndpoints) -> Result<LocalityEndpoints, Unsupported> {
    let place = place(proto)?;
    let mut endpoints = Vec::with_capacity(place.endpoints.len());
    for (index, endpoint) in place.endpoints.into_iter().enumerate() {
        let lowered = lower_endpoint(endpoint, |address| match &address.address {
            Some(core::address::Address::Pipe(pipe)) => Ok(Address::Unix(pipe.path.as_str().into())),
            _ => socket_address(address).map(Address::Ip),
        });
        endpoints.push(lowered.within_item("lb_endpoints", index)?);
    }
    Ok(LocalityEndpoints { locality: place.locality, priority: place.priority, weight: place.weight, endpoints })
}

fn lower_endpoint(
    mut proto: pb::LbEndpoint,
    address_of: impl FnOnce(&core::Address) -> Result<Address, Unsupported>,
) -> Result<Endpoint, Unsupported> {
    let Some(pb::lb_endpoint::HostIdentifier::Endpoint(mut endpoint)) = proto.host_identifier.take() else {
        return Err(Unsupported::missing("endpoint"));
    };
    let address = endpoint.address.take().ok_or_else(|| Unsupported::missing("endpoint.address"))?;
    let address = address_of(&address).within("endpoint.address")?;
    let hostname = std::mem::take(&mut endpoint.hostname);
    // Active health checks are not built; a cluster that asks for them is refused, so their
    // per-endpoint settings change nothing.
    endpoint.health_check_config = None;
    nothing_left(&endpoint).within("endpoint")?;
    let metadata = proto.metadata.take();
    let workload = metadata_text(metadata.as_ref(), "istio", "workload").unwrap_or_default().into();
    let mut transport_match: Vec<_> = metadata
        .as_ref()
        .and_then(|metadata| metadata.filter_metadata.get(TRANSPORT_MATCH))
        .map(|fields| fields.fields.iter().map(|(key, value)| (key.as_str().into(), json(value))).collect())
        .unwrap_or_default();
    transport_match.sort_by(|a: &(Box<str>, _), b| a.0.cmp(&b.0));
    let health = match core::HealthStatus::try_from(std::mem::take(&mut proto.health_status)) {
        Ok(core::HealthStatus::Unknown | core::HealthStatus::Healthy) => Health::Healthy,
        Ok(core::HealthStatus::Degraded) => Health::Degraded,
        Ok(core::HealthStatus::Unhealthy | core::HealthStatus::Draining | core::HealthStatus::Timeout) => {
            Health::Unhealthy
        }
        Err(_) => return Err(Unsupported::new("health_status", "is not known")),
    };
    let weight = proto.load_balancing_weight.take().map_or(1, |weight| weight.value);
    if weight == 0 {
        return Err(Unsupported::new("load_balancing_weight", "must be at least 1"));
    }
    nothing_left(&proto)?;
    Ok(Endpoint { address, health, weight, hostname: hostname.into(), transport_match, workload })
}

/// Names to resolve, for clusters of type `STRICT_DNS` and `LOGICAL_DNS`.
pub(super) fn lower_names(mut assignment: pb::ClusterLoadAssignment) -> Result<Vec<DnsLocality>, Unsupported> {
    assignment.cluster_name.clear();
    // Envoy's default; a cluster of names with another one is refused below.
    let factor = overprovisioning(&mut assignment)?;
    if factor != 140 {
        return Err(Unsupported::not_built("policy.overprovisioning_factor"));
    }
    let mut localities = Vec::new();
    for (index, locality) in std::mem::take(&mut assignment.endpoints).into_iter().enumerate() {
        localities.push(lower_name_locality(locality).within_item("endpoints", index)?);
    }
    nothing_left(&assignment)?;
    Ok(localities)
}

fn lower_name_locality(proto: pb::LocalityLbEndpoints) -> Result<DnsLocality, Unsupported> {
    let place = place(proto)?;
    let mut hosts = Vec::with_capacity(place.endpoints.len());
    for (index, endpoint) in place.endpoints.into_iter().enumerate() {
        let mut name = String::new();
        let mut to = 0;
        let endpoint = lower_endpoint(endpoint, |address| {
            let socket = super::common::tcp_address(address)?;
            name.clone_from(&socket.address);
            to = port(socket)?;
            if name.is_empty() {
                return Err(Unsupported::missing("socket_address.address"));
            }
            Ok(Address::Ip(SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), to)))
        })
        .within_item("lb_endpoints", index)?;
        hosts.push(DnsHost { name: name.into(), port: to, endpoint });
    }
    Ok(DnsLocality { locality: place.locality, priority: place.priority, weight: place.weight, hosts })
}

/// The endpoints of a cluster of names, once `answers(name)` are known; a name that is an address
/// needs no answer.
///
/// *Shape*: a logical cluster has one endpoint, the first answer of its first name.
pub fn resolved_endpoints(spec: &DnsSpec, mut answers: impl FnMut(&str) -> Vec<IpAddr>) -> EndpointSet {
    let localities = spec.template.iter().map(|place| {
        let mut endpoints = Vec::new();
        for host in &place.hosts {
            let addresses = host.name.parse::<IpAddr>().map_or_else(|_| answers(&host.name), |ip| vec![ip]);
            let count = if spec.logical { 1 } else { usize::MAX };
            endpoints.extend(addresses.into_iter().take(count).map(|ip| Endpoint {
                address: Address::Ip(SocketAddr::new(ip, host.port)),
                // Host rewrites see the configured name.
                hostname: if host.endpoint.hostname.is_empty() {
                    host.name.clone()
                } else {
                    host.endpoint.hostname.clone()
                },
                ..host.endpoint.clone()
            }));
        }
        endpoints.dedup_by(|a, b| a.address == b.address);
        LocalityEndpoints {
            locality: place.locality.clone(),
            priority: place.priority,
            weight: place.weight,
            endpoints,
        }
    });
    EndpointSet { localities: localities.collect(), overprovisioning: 140 }
}
