//! Chains of a sidecar that relay bytes: a service's own, and those of TCP and TLS routes.
//!
//! *Source*: `docs/parity.md`, Traffic 2.8.

use std::sync::Arc;

use api::networking as net;
use ipnet::IpNet;
use mesh::{EgressScope, MESH_GATEWAY, Protocol, Provenance, Service, ServicePort, VirtualService, host};

use super::service_cluster;
use crate::cluster::Outbound;
use crate::context::Context;
use crate::filter::{TcpOptions, TcpTarget};
use crate::route::{destination_cluster, http};

/// One chain.
pub(super) struct TcpChain {
    /// SNIs; empty takes any.
    pub(super) server_names: Vec<String>,
    /// Destinations; empty takes any.
    pub(super) ranges: Vec<IpNet>,
    pub(super) target: TcpTarget,
    pub(super) stat_prefix: String,
    pub(super) options: TcpOptions,
    pub(super) from: Vec<Provenance>,
    pub(super) is_mongo: bool,
}

impl TcpChain {
    /// Whether it takes every connection.
    pub(super) fn is_catch_all(&self) -> bool {
        self.server_names.is_empty() && self.ranges.is_empty()
    }
}

/// The chains of one service port. `ranges` are the service's own address ranges; `has_address`
/// tells that the listener is the service's own.
pub(super) fn chains(
    context: &Context<'_>,
    scope: &EgressScope,
    service: &Arc<Service>,
    port: &ServicePort,
    ranges: &[IpNet],
    has_address: bool,
) -> Vec<TcpChain> {
    let routed = routing(&scope.virtual_services, &service.host);
    if port.protocol.is_tls() {
        let mut out = routed.map(|vs| tls_routes(context, vs, port, ranges)).unwrap_or_default();
        if out.is_empty() {
            // Without an address of its own the SNI tells which service is meant.
            let server_names = if has_address || !ranges.is_empty() || *service.host == *"*" {
                Vec::new()
            } else {
                vec![service.host.to_string()]
            };
            out.push(TcpChain { server_names, ..own(context, service, port, ranges) });
        }
        return out;
    }
    let mut out = Vec::new();
    let mut is_complete = false;
    if let Some(vs) = routed {
        is_complete = tcp_routes(context, vs, port, ranges, &mut out);
    }
    if !is_complete {
        out.push(own(context, service, port, ranges));
    }
    out
}

/// The VirtualService with TCP or TLS routes for a host: the narrowest, then the oldest.
fn routing<'a>(virtual_services: &'a [Arc<VirtualService>], service_host: &str) -> Option<&'a Arc<VirtualService>> {
    virtual_services
        .iter()
        .filter(|vs| (!vs.tcp.is_empty() || !vs.tls.is_empty()) && vs.best_host_for(service_host).is_some())
        .rev()
        .max_by_key(|vs| vs.best_host_for(service_host).map(host::specificity))
}

/// The chain to the service itself.
fn own(context: &Context<'_>, service: &Arc<Service>, port: &ServicePort, ranges: &[IpNet]) -> TcpChain {
    let cluster = service_cluster(service, port.number);
    TcpChain {
        server_names: Vec::new(),
        ranges: ranges.to_vec(),
        stat_prefix: cluster.clone(),
        target: TcpTarget::Cluster(cluster),
        options: options(context, service, port, ""),
        from: Vec::new(),
        is_mongo: port.protocol == Protocol::Mongo,
    }
}

/// What the client's DestinationRule says about bytes towards a service.
fn options(context: &Context<'_>, service: &Arc<Service>, port: &ServicePort, subset: &str) -> TcpOptions {
    let rule = context.rule(service).map(|rule| &**rule);
    let subset = rule.and_then(|rule| rule.subset(subset));
    let policy = Outbound::new(context, service, port, rule, subset).policy;
    let tcp = policy.connection_pool.as_ref().and_then(|pool| pool.tcp.as_ref());
    TcpOptions {
        idle_timeout: tcp.and_then(|tcp| tcp.idle_timeout).map(|timeout| timeout.0),
        max_connection_duration: tcp.and_then(|tcp| tcp.max_connection_duration).map(|duration| duration.0),
        hashes_source_ip: http::hashes_source_ip(&policy),
    }
}

struct Fits<'a> {
    port: u16,
    source_labels: &'a std::collections::BTreeMap<String, String>,
    source_namespace: &'a str,
    gateways: &'a [String],
}

/// Whether a match can hold for this proxy; here all conditions must.
fn fits(context: &Context<'_>, vs: &VirtualService, of: &Fits<'_>, port: u16) -> bool {
    let view = context.view;
    let gateways_fit = if of.gateways.is_empty() {
        vs.binds_to(MESH_GATEWAY)
    } else {
        of.gateways.iter().any(|gateway| gateway == MESH_GATEWAY)
    };
    gateways_fit
        && (of.port == 0 || of.port == port)
        && of.source_labels.iter().all(|(key, value)| view.labels.get(key) == Some(value))
        && (of.source_namespace.is_empty() || *of.source_namespace == *view.namespace)
}

fn subnets(texts: &[String]) -> Vec<IpNet> {
    texts
        .iter()
        .filter_map(|text| {
            text.parse::<IpNet>().ok().or_else(|| text.parse::<std::net::IpAddr>().ok().map(IpNet::from))
        })
        .collect()
}

fn tls_routes(context: &Context<'_>, vs: &Arc<VirtualService>, port: &ServicePort, ranges: &[IpNet]) -> Vec<TcpChain> {
    let mut out: Vec<TcpChain> = Vec::new();
    for (index, route) in vs.tls.iter().enumerate() {
        for entry in &route.matches {
            let conditions = Fits {
                port: entry.port,
                source_labels: &entry.source_labels,
                source_namespace: &entry.source_namespace,
                gateways: &entry.gateways,
            };
            if !fits(context, vs, &conditions, port.number) {
                continue;
            }
            let own = subnets(&entry.destination_subnets);
            let chain_ranges = if own.is_empty() { ranges.to_vec() } else { own };
            let mut server_names = entry.sni_hosts.clone();
            // Each SNI once: the first match wins.
            server_names.retain(|name| {
                !out.iter().any(|chain| chain.ranges == chain_ranges && chain.server_names.contains(name))
            });
            if server_names.is_empty() {
                continue;
            }
            let field = format!("spec.tls[{index}]");
            out.push(TcpChain { server_names, ranges: chain_ranges, ..routed(context, vs, &route.route, port, field) });
        }
    }
    out
}

/// Appends the chains of TCP routes; tells whether the last of them takes every connection.
fn tcp_routes(
    context: &Context<'_>,
    vs: &Arc<VirtualService>,
    port: &ServicePort,
    ranges: &[IpNet],
    out: &mut Vec<TcpChain>,
) -> bool {
    for (index, route) in vs.tcp.iter().enumerate() {
        let field = format!("spec.tcp[{index}]");
        if route.matches.is_empty() {
            if !vs.binds_to(MESH_GATEWAY) {
                continue;
            }
            out.push(TcpChain { ranges: ranges.to_vec(), ..routed(context, vs, &route.route, port, field) });
            return true;
        }
        let mut narrowed = Vec::new();
        for entry in &route.matches {
            let conditions = Fits {
                port: entry.port,
                source_labels: &entry.source_labels,
                source_namespace: &entry.source_namespace,
                gateways: &entry.gateways,
            };
            if !fits(context, vs, &conditions, port.number) {
                continue;
            }
            if entry.destination_subnets.is_empty() {
                out.push(TcpChain { ranges: ranges.to_vec(), ..routed(context, vs, &route.route, port, field) });
                return true;
            }
            narrowed.extend(subnets(&entry.destination_subnets));
        }
        if !narrowed.is_empty() {
            let covers_all = narrowed == ranges;
            out.push(TcpChain { ranges: narrowed, ..routed(context, vs, &route.route, port, field) });
            if covers_all {
                return true;
            }
        }
    }
    false
}

/// The chain of a route's destinations.
fn routed(
    context: &Context<'_>,
    vs: &Arc<VirtualService>,
    destinations: &[net::RouteDestination],
    port: &ServicePort,
    field: String,
) -> TcpChain {
    let several = destinations.len() > 1;
    let live: Vec<_> = destinations.iter().filter(|weighted| !several || weighted.weight != 0).collect();
    let (target, stat_prefix) = match live.as_slice() {
        [only] => {
            let cluster = destination_cluster(context, &only.destination, port.number);
            (TcpTarget::Cluster(cluster.clone()), cluster)
        }
        all => {
            let clusters = all
                .iter()
                .map(|weighted| {
                    let name = destination_cluster(context, &weighted.destination, port.number);
                    (name, u32::try_from(weighted.weight).unwrap_or_default())
                })
                .collect();
            (TcpTarget::Weighted(clusters), format!("{}.{}", vs.object.name, vs.object.namespace))
        }
    };
    // The first destination's rule speaks for all.
    let first = live.first().and_then(|weighted| {
        let destination = &weighted.destination;
        let service = context.service(&destination.host)?;
        let number = destination.port.as_ref().map_or(port.number, |port| port.number);
        Some(options(context, service, service.port(number)?, &destination.subset))
    });
    TcpChain {
        server_names: Vec::new(),
        ranges: Vec::new(),
        target,
        stat_prefix,
        options: first.unwrap_or_default(),
        from: vec![Provenance::new(&vs.object, field)],
        is_mongo: port.protocol == Protocol::Mongo,
    }
}
