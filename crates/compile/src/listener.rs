//! Outbound listeners of a sidecar: which addresses and ports are served, and how.
//!
//! [`plan`] decides which listeners there are and who owns them; this module writes them.
//! Listener 15006 is `security::inbound`, listeners of gateways are `gateway::listener`.
//!
//! *Source*: `docs/parity.md`, Traffic 1.3.

mod plan;
mod tcp;

use envoy_types::pb::envoy::config::core::v3::{CidrRange, TrafficDirection};
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, FilterChainMatch, Listener};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use ipnet::IpNet;

use crate::context::Context;
use crate::filter::{self, Direction, Http, Routes, TcpOptions, TcpTarget};
use crate::names;
use crate::route::table::{self, Sources, Table, unknown_cluster};
use crate::view::Interception;
use crate::wire::{self, boolean, seconds, uint, zero};

use plan::{Binding, Plan, Planned};
use tcp::TcpChain;

/// The listeners of a sidecar towards others, and the tables they name.
pub(crate) struct Outbound {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) routes: Vec<RouteConfiguration>,
}

/// Everything outbound: by name, `virtualOutbound` last.
pub(crate) fn outbound(context: &Context<'_>) -> Outbound {
    let plan = Plan::of(context);
    let mut out = Outbound { listeners: Vec::new(), routes: Vec::new() };
    for planned in plan.listeners.values() {
        out.listeners.push(write(context, planned));
        if let Some(http) = &planned.http {
            let scope = &context.scope.egress[planned.egress];
            let sources = Sources { services: &scope.services, virtual_services: &scope.virtual_services };
            let kind = match &http.private {
                Some((service, port)) => Table::Private(service, port),
                None => Table::Shared(planned.port),
            };
            if !out.routes.iter().any(|known| known.name == http.table) {
                out.routes.push(table::build(context, http.table.clone(), &kind, &sources));
            }
        }
    }
    out.listeners.sort_by(|a, b| a.name.cmp(&b.name));
    if context.view.interception != Interception::None {
        out.listeners.push(virtual_outbound(context));
    }
    out.routes.sort_by(|a, b| a.name.cmp(&b.name));
    out
}

/// The listener that gets all captured connections and hands them to the others by original
/// destination; what none of them takes stays here.
fn virtual_outbound(context: &Context<'_>) -> Listener {
    let port = context.snapshot.mesh_config().proxy_listen_port();
    Listener {
        name: "virtualOutbound".into(),
        address: Some(wire::socket_address("0.0.0.0", port)),
        filter_chains: vec![
            FilterChain {
                name: "virtualOutbound-blackhole".into(),
                filter_chain_match: Some(FilterChainMatch {
                    destination_port: uint(u32::from(port)),
                    ..FilterChainMatch::default()
                }),
                filters: filter::black_hole(context, Direction::Outbound),
                ..FilterChain::default()
            },
            to_the_unknown(context, "virtualOutbound-catchall-tcp"),
        ],
        use_original_dst: boolean(true),
        traffic_direction: TrafficDirection::Outbound.into(),
        access_log: context.telemetry.listener_logs(),
        max_connections_to_accept_per_socket_event: uint(1),
        ..Listener::default()
    }
}

fn write(context: &Context<'_>, of: &Planned) -> Listener {
    let is_captured = of.binding == Binding::Captured;
    let mut listener = Listener {
        name: format!("{}_{}", of.address, of.port),
        address: Some(wire::socket_address(&of.address, of.port)),
        listener_filters_timeout: wire::duration(context.snapshot.mesh_config().protocol_detection_timeout())
            .or_else(zero),
        continue_on_listener_filters_timeout: true,
        traffic_direction: TrafficDirection::Outbound.into(),
        bind_to_port: if is_captured { boolean(false) } else { None },
        max_connections_to_accept_per_socket_event: if is_captured { None } else { uint(1) },
        ..Listener::default()
    };
    if !is_captured {
        listener.access_log = context.telemetry.listener_logs();
    }
    // A listener that applications dial on purpose speaks what it says.
    let sniffs = is_captured;
    let mut needs_tls = false;
    if let Some(http) = &of.http {
        let manager = filter::connection_manager(
            context,
            Http {
                direction: Direction::Outbound,
                stat_prefix: format!("outbound_{}_{};", of.address, of.port),
                routes: Routes::Rds(http.table.clone()),
                policies: Vec::new(),
                has_grpc_web: http.has_grpc_web,
            },
        );
        listener.filter_chains.push(FilterChain {
            filter_chain_match: sniffs.then(|| FilterChainMatch {
                transport_protocol: "raw_buffer".into(),
                application_protocols: vec!["http/1.1".into(), "h2c".into()],
                ..FilterChainMatch::default()
            }),
            filters: vec![manager],
            transport_socket_connect_timeout: seconds(15),
            ..FilterChain::default()
        });
        if sniffs {
            listener.listener_filters.push(filter::listener_filter(
                "envoy.filters.listener.http_inspector",
                wire::pack(&HttpInspector::default()),
                None,
            ));
        }
    }
    for chain in &of.tcp {
        needs_tls |= !chain.server_names.is_empty();
        let written = tcp_chain(context, chain);
        if chain.is_catch_all() && (of.http.is_some() || of.is_wildcard) {
            listener.default_filter_chain = Some(FilterChain { filter_chain_match: None, ..written });
        } else {
            listener.filter_chains.push(written);
        }
    }
    if needs_tls {
        listener.listener_filters.insert(0, filter::tls_inspector(None));
    }
    // A listener without any other chain needs no second way out.
    if of.is_wildcard && listener.filter_chains.is_empty() {
        listener.filter_chains.extend(listener.default_filter_chain.take());
    }
    if of.is_wildcard && is_captured && listener.default_filter_chain.is_none() && has_matches(&listener) {
        listener.default_filter_chain = Some(pass_through(context));
    }
    listener
}

fn has_matches(listener: &Listener) -> bool {
    listener.filter_chains.iter().all(|chain| chain.filter_chain_match.is_some())
}

/// What a shared listener does with connections that are for none of its services.
fn pass_through(context: &Context<'_>) -> FilterChain {
    FilterChain {
        filter_chain_match: Some(FilterChainMatch::default()),
        ..to_the_unknown(context, "PassthroughFilterChain")
    }
}

/// Bytes to whatever the mesh does not know, or to nowhere, as the outbound policy has it.
fn to_the_unknown(context: &Context<'_>, name: &str) -> FilterChain {
    let cluster = unknown_cluster(context);
    let target = TcpTarget::Cluster(cluster.clone());
    FilterChain {
        name: name.into(),
        filters: filter::tcp(context, Direction::Outbound, &cluster, target, &TcpOptions::default()),
        ..FilterChain::default()
    }
}

fn tcp_chain(context: &Context<'_>, of: &TcpChain) -> FilterChain {
    let is_plain = of.server_names.is_empty() && of.ranges.is_empty();
    let mut filters = Vec::new();
    filters.extend(filter::tcp(context, Direction::Outbound, &of.stat_prefix, of.target.clone(), &of.options));
    if of.is_mongo && context.view.capabilities.has_stats {
        let mongo = envoy_types::pb::envoy::extensions::filters::network::mongo_proxy::v3::MongoProxy {
            stat_prefix: of.stat_prefix.clone(),
            ..Default::default()
        };
        let before_proxy = filters.len().saturating_sub(1);
        filters.insert(before_proxy, filter::network("envoy.filters.network.mongo_proxy", wire::pack(&mongo)));
    }
    FilterChain {
        filter_chain_match: (!is_plain).then(|| FilterChainMatch {
            server_names: of.server_names.clone(),
            prefix_ranges: of.ranges.iter().map(cidr).collect(),
            ..FilterChainMatch::default()
        }),
        filters,
        metadata: wire::provenance_metadata(&of.from),
        transport_socket_connect_timeout: seconds(15),
        ..FilterChain::default()
    }
}

fn cidr(of: &IpNet) -> CidrRange {
    CidrRange { address_prefix: of.network().to_string(), prefix_len: uint(u32::from(of.prefix_len())) }
}

/// The cluster of a service's port.
fn service_cluster(service: &mesh::Service, port: u16) -> String {
    names::cluster(port, "", &service.host)
}
