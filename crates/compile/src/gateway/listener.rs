//! Listeners of gateways.
//!
//! Source: `docs/parity.md`, Traffic 4.2 to 4.4.

use std::collections::BTreeSet;

use api::networking::{ServerTlsMode, TlsMatchAttributes};
use envoy_types::pb::envoy::config::core::v3::{Metadata, TrafficDirection};
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, FilterChainMatch, Listener};
use mesh::{Protocol, VirtualService, host};

use super::servers::{OpenPort, OpenServer, Serving, finding, is_server_name};
use super::tls;
use crate::context::Context;
use crate::filter::{self, Direction, Http, Routes, TcpOptions, TcpTarget};
use crate::security::{PolicyFilters, tls as mesh_tls};
use crate::wire;

/// A client that opens a connection and says nothing, or stalls in a handshake, is let go.
const HANDSHAKE_SECONDS: u64 = 15;

/// The listener of one port; `None` when no server of it leads anywhere.
pub(crate) fn build(context: &Context<'_>, port: &OpenPort, policies: &PolicyFilters) -> Option<Listener> {
    let mut chains = Vec::new();
    let mut has_tls = false;
    if let Some(server) = port.servers.iter().find(|server| server.serving == Serving::Http) {
        let grpc_web = port.servers.iter().any(|server| server.protocol == Protocol::GrpcWeb);
        chains.push(chain(Vec::new(), vec![manager(context, port, &server.table, grpc_web, policies)]));
    }
    // Servers that end TLS come first, then those that pass it on.
    for server in &port.servers {
        let Some(settings) = &server.tls else { continue };
        let filters = match server.serving {
            Serving::Https => {
                let grpc_web = server.protocol == Protocol::GrpcWeb;
                vec![manager(context, port, &server.table, grpc_web, policies)]
            }
            Serving::TlsTerminated => match tcp_filters(context, server, policies) {
                Some(filters) => filters,
                None => continue,
            },
            Serving::Http | Serving::Passthrough | Serving::Tcp => continue,
        };
        has_tls = true;
        chains.push(FilterChain {
            transport_socket: Some(mesh_tls::socket(tls::context(context, server, settings))),
            ..chain(server.server_names(), filters)
        });
    }
    let mut taken: BTreeSet<String> = chains
        .iter()
        .flat_map(|chain| chain.filter_chain_match.iter().flat_map(|of| of.server_names.iter().cloned()))
        .collect();
    for server in port.servers.iter().filter(|server| server.serving == Serving::Passthrough) {
        let passed = passthrough_chains(context, server, policies, &mut taken);
        has_tls |= !passed.is_empty();
        chains.extend(passed);
    }
    for server in port.servers.iter().filter(|server| server.serving == Serving::Tcp) {
        chains.extend(tcp_filters(context, server, policies).map(|filters| chain(Vec::new(), filters)));
    }
    if chains.is_empty() {
        return None;
    }
    Some(Listener {
        name: port.name(),
        address: Some(wire::socket_address(&port.bind, port.number)),
        filter_chains: chains,
        listener_filters: has_tls.then(|| filter::tls_inspector(None)).into_iter().collect(),
        traffic_direction: TrafficDirection::Outbound.into(),
        access_log: context.telemetry.listener_logs(),
        max_connections_to_accept_per_socket_event: wire::uint(1),
        ..Listener::default()
    })
}

fn chain(server_names: Vec<String>, filters: Vec<Filter>) -> FilterChain {
    FilterChain {
        filter_chain_match: (!server_names.is_empty())
            .then(|| FilterChainMatch { server_names, ..FilterChainMatch::default() }),
        filters,
        transport_socket_connect_timeout: wire::seconds(HANDSHAKE_SECONDS),
        ..FilterChain::default()
    }
}

fn manager(
    context: &Context<'_>,
    port: &OpenPort,
    table: &str,
    has_grpc_web: bool,
    policies: &PolicyFilters,
) -> Filter {
    filter::connection_manager(
        context,
        Http {
            direction: Direction::Gateway,
            stat_prefix: format!("outbound_{};", port.name()),
            routes: Routes::Rds(table.to_owned()),
            policies: policies.http.clone(),
            has_grpc_web,
        },
    )
}

/// VirtualServices that may route for a server, with the hosts both agree on; narrower wins.
pub(crate) fn bound(
    context: &Context<'_>,
    server: &OpenServer,
) -> Vec<(std::sync::Arc<VirtualService>, Vec<Box<str>>)> {
    let services = context.snapshot.virtual_services_for_gateway(&context.view.namespace, &server.gateway_key());
    let mut out = Vec::new();
    for service in services {
        let mut hosts: Vec<Box<str>> = Vec::new();
        for mine in &service.hosts {
            for theirs in server.hosts.iter().filter(|host| host.admits(&service.object.namespace)) {
                if let Some(both) = host::intersection(mine, &theirs.name)
                    && !hosts.iter().any(|seen| **seen == *both)
                {
                    hosts.push(both.into());
                }
            }
        }
        if !hosts.is_empty() {
            out.push((service, hosts));
        }
    }
    out
}

/// Filters of a server that relays bytes: where the first fitting `tcp` route leads.
fn tcp_filters(context: &Context<'_>, server: &OpenServer, policies: &PolicyFilters) -> Option<Vec<Filter>> {
    let key = server.gateway_key();
    for (service, _) in bound(context, server) {
        for route in &service.tcp {
            let fits = route.matches.is_empty()
                || route.matches.iter().any(|of| {
                    (of.port == 0 || of.port == server.number) && (of.gateways.is_empty() || of.gateways.contains(&key))
                });
            if fits {
                return Some(relay(context, server, &service, &route.route, policies));
            }
        }
    }
    let hint = "bind a VirtualService with a tcp route to the gateway";
    context.find(finding(
        server,
        "port",
        "LAT0408",
        "no VirtualService leads anywhere, so this server is not opened",
        hint,
    ));
    None
}

fn relay(
    context: &Context<'_>,
    server: &OpenServer,
    service: &VirtualService,
    destinations: &[api::networking::RouteDestination],
    policies: &PolicyFilters,
) -> Vec<Filter> {
    let is_mesh = server.tls.as_ref().is_some_and(|tls| tls.mode == ServerTlsMode::IstioMutual);
    let mut filters: Vec<Filter> = policies.tcp.clone();
    if is_mesh {
        filters.extend(filter::metadata_exchange_filter(context));
    }
    let (target, stat_prefix) = tcp_target(context, server, service, destinations);
    filters.extend(filter::tcp(context, Direction::Gateway, &stat_prefix, target, &TcpOptions::default()));
    filters
}

fn tcp_target(
    context: &Context<'_>,
    server: &OpenServer,
    service: &VirtualService,
    destinations: &[api::networking::RouteDestination],
) -> (TcpTarget, String) {
    let weighted: Vec<(String, u32)> = destinations
        .iter()
        .filter(|of| of.weight > 0 || destinations.len() == 1)
        .map(|of| {
            let name = destination_cluster(context, &of.destination, server.number);
            (name, u32::try_from(of.weight).unwrap_or(0))
        })
        .collect();
    match weighted.as_slice() {
        [] => (TcpTarget::Cluster(crate::names::BLACK_HOLE.to_owned()), crate::names::BLACK_HOLE.to_owned()),
        [(name, _)] => (TcpTarget::Cluster(name.clone()), name.clone()),
        _ => (TcpTarget::Weighted(weighted), format!("{}.{}", service.object.name, service.object.namespace)),
    }
}

/// The cluster of a destination; without a port, of the service's only port, else of the server's.
fn destination_cluster(context: &Context<'_>, destination: &api::networking::Destination, server_port: u16) -> String {
    let host = context.snapshot.resolve_alias(&destination.host);
    let named = destination.port.as_ref().map(|port| port.number).filter(|number| *number != 0);
    let port = named.unwrap_or_else(|| match context.scope.service(host) {
        Some(service) if service.ports.len() == 1 => service.ports[0].number,
        _ => server_port,
    });
    crate::names::cluster(port, &destination.subset, host)
}

/// One chain for each `tls` match, chosen by the server name that clients send.
fn passthrough_chains(
    context: &Context<'_>,
    server: &OpenServer,
    policies: &PolicyFilters,
    taken: &mut BTreeSet<String>,
) -> Vec<FilterChain> {
    let key = server.gateway_key();
    let mut chains = Vec::new();
    for (service, _) in bound(context, server) {
        for (index, route) in service.tls.iter().enumerate() {
            for of in &route.matches {
                let fits = (of.port == 0 || of.port == server.number)
                    && (of.gateways.is_empty() || of.gateways.contains(&key));
                if !fits {
                    continue;
                }
                let mut names = Vec::new();
                let mut is_any = false;
                for name in server_names(server, &service, of) {
                    if !taken.insert(name.clone()) {
                        let field = format!("spec.tls[{index}].match");
                        let message = format!("another route of the port already takes server name {name:?}");
                        context.warn("LAT0409", &service.object, &field, message, "route each server name once a port");
                    } else if name == "*" {
                        is_any = true;
                    } else {
                        names.push(name);
                    }
                }
                if names.is_empty() && !is_any {
                    continue;
                }
                let from = mesh::Provenance::new(&service.object, format!("spec.tls[{index}]"));
                let metadata: Option<Metadata> = wire::provenance_metadata(&[from]);
                chains.push(FilterChain {
                    metadata,
                    ..chain(
                        if is_any { Vec::new() } else { names },
                        relay(context, server, &service, &route.route, policies),
                    )
                });
            }
        }
    }
    if chains.is_empty() {
        let hint = "bind a VirtualService with a tls route to the gateway";
        context.find(finding(
            server,
            "port",
            "LAT0408",
            "no VirtualService leads anywhere, so this server is not opened",
            hint,
        ));
    }
    chains
}

/// The server names of a match that the server's hosts admit; narrower wins.
fn server_names(server: &OpenServer, service: &VirtualService, of: &TlsMatchAttributes) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for sni in &of.sni_hosts {
        for theirs in server.hosts.iter().filter(|host| host.admits(&service.object.namespace)) {
            if let Some(both) = host::intersection(sni, &theirs.name)
                && is_server_name(both)
                && !names.iter().any(|seen| seen == both)
            {
                names.push(both.to_owned());
            }
        }
    }
    names
}
