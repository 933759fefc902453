//! Listener 15006: what a sidecar accepts, by mTLS mode and declared protocol.
//!
//! Source: `docs/parity.md`, Security 7.1, 7.2; Traffic 1.6. The table of chains is
//! [`chains_of`]; everything else fills its rows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::networking as net;
use api::security::MtlsMode;
use envoy_types::pb::envoy::config::core::v3::{Metadata, TrafficDirection};
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter, ListenerFilterChainMatchPredicate,
    listener_filter_chain_match_predicate as predicate,
};
use envoy_types::pb::envoy::config::route::v3::{
    Decorator, RetryPolicy, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, route, route_action,
    route_match,
};
use envoy_types::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use mesh::{EndpointAddress, Protocol, Provenance, Service};

use super::{Place, PolicyFilters, tls};
use crate::context::Context;
use crate::filter::{self, Direction, Http, Routes, TcpOptions, TcpTarget};
use crate::wire;

const HTTP_INSPECTOR: &str = "envoy.filters.listener.http_inspector";
const ORIGINAL_DST: &str = "envoy.filters.listener.original_dst";

/// Mesh TLS of any kind.
const MESH_ANY: &[&str] = &["istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2"];
/// Mesh TLS that carries HTTP.
const MESH_HTTP: &[&str] = &["istio-http/1.0", "istio-http/1.1", "istio-h2"];
/// Mesh TLS that carries bytes.
const MESH_TCP: &[&str] = &["istio-peer-exchange", "istio"];
/// Plaintext HTTP, as the inspector names it.
const PLAIN_HTTP: &[&str] = &["http/1.1", "h2c"];

/// A port of the workload that something declares.
#[derive(Clone, Debug)]
pub(crate) struct InboundPort {
    /// The port dialled: a service's target port, or an ingress listener's.
    pub(crate) number: u16,
    /// Of the first service port that leads here.
    pub(crate) protocol: Protocol,
    /// Services that lead here, oldest first, each with its port. Empty for an ingress listener
    /// that no service leads to.
    pub(crate) services: Vec<(Arc<Service>, u16)>,
    /// Set for an ingress listener of a Sidecar object.
    pub(crate) ingress: Option<Ingress>,
}

/// An ingress listener of a Sidecar object.
#[derive(Clone, Debug)]
pub(crate) struct Ingress {
    /// Where it is said.
    pub(crate) from: Provenance,
    /// What it says.
    pub(crate) listener: net::IstioIngressListener,
}

impl InboundPort {
    /// `inbound|<port>||`
    pub(crate) fn cluster(&self) -> String {
        format!("inbound|{}||", self.number)
    }
}

/// The declared ports of the proxy's workload, ascending. A Sidecar with ingress listeners
/// replaces those of the services.
pub(crate) fn ports(context: &Context<'_>) -> Vec<InboundPort> {
    let mut ports = service_ports(context);
    let Some(sidecar) = context.scope.sidecar.as_ref().filter(|sidecar| !sidecar.spec.ingress.is_empty()) else {
        return ports.into_values().collect();
    };
    let mut out = BTreeMap::new();
    for (index, listener) in sidecar.spec.ingress.iter().enumerate() {
        let Some(port) = listener.port.as_ref().filter(|port| port.number != 0) else { continue };
        let services = ports.remove(&port.number).map(|found| found.services).unwrap_or_default();
        out.entry(port.number).or_insert(InboundPort {
            number: port.number,
            protocol: Protocol::parse(&port.protocol).unwrap_or(Protocol::Auto),
            services,
            ingress: Some(Ingress {
                from: Provenance::new(&sidecar.object, format!("spec.ingress[{index}]")),
                listener: listener.clone(),
            }),
        });
    }
    out.into_values().collect()
}

fn service_ports(context: &Context<'_>) -> BTreeMap<u16, InboundPort> {
    let view = context.view;
    let workload = context.snapshot.workload(&view.namespace, &view.name);
    let mut out: BTreeMap<u16, InboundPort> = BTreeMap::new();
    for service in context.snapshot.services() {
        let selects = *service.namespace == *view.namespace
            && service.selector.as_ref().is_some_and(|selector| !selector.is_empty() && selector.matches(&view.labels));
        let endpoints = context.snapshot.endpoints(&service.key());
        for port in &service.ports {
            if port.protocol == Protocol::Udp {
                continue;
            }
            let target =
                if selects { declared_target(&port.target, workload.map(|workload| &**workload)) } else { None };
            // Without a selector the endpoints say which workloads are meant.
            let target = target.or_else(|| {
                let own = endpoints.port(port.number).iter().find(|endpoint| match &endpoint.address {
                    EndpointAddress::Ip(ip) => view.ips.contains(ip),
                    EndpointAddress::Name(_) | EndpointAddress::Unix(_) => false,
                });
                own.map(|endpoint| endpoint.port)
            });
            let Some(number) = target.filter(|number| *number != 0) else { continue };
            out.entry(number)
                .or_insert_with(|| InboundPort { number, protocol: port.protocol, services: Vec::new(), ingress: None })
                .services
                .push((Arc::clone(service), port.number));
        }
    }
    out
}

fn declared_target(target: &mesh::TargetPort, workload: Option<&mesh::Workload>) -> Option<u16> {
    match (target, workload) {
        (target, Some(workload)) => mesh::target_number(target, workload),
        (mesh::TargetPort::Number(number), None) => Some(*number),
        (mesh::TargetPort::Name(_), None) => None,
    }
}

/// How bytes of one port are told apart, with which transport, and served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ChainRow {
    /// `tls` or `raw_buffer`.
    transport: &'static str,
    /// Application protocols; empty takes any.
    alpn: &'static [&'static str],
    /// Requests are served, else bytes are relayed.
    is_http: bool,
    /// TLS ends here, with a certificate asked of the peer.
    is_mutual: bool,
}

const fn row(transport: &'static str, alpn: &'static [&'static str], is_http: bool, is_mutual: bool) -> ChainRow {
    ChainRow { transport, alpn, is_http, is_mutual }
}

/// What a port speaks, as far as accepting goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    Http,
    Tcp,
    Auto,
}

impl Class {
    fn of(protocol: Protocol) -> Self {
        if protocol.is_http() {
            Self::Http
        } else if protocol.is_auto() {
            Self::Auto
        } else {
            Self::Tcp
        }
    }
}

/// The chains of one port, in order. A mode that is not known is STRICT.
pub(crate) fn chains_of(mode: MtlsMode, class: Class) -> Vec<ChainRow> {
    const TLS: &str = "tls";
    const RAW: &str = "raw_buffer";
    match (mode, class) {
        (MtlsMode::Permissive, Class::Http) => vec![row(TLS, MESH_ANY, true, true), row(RAW, &[], true, false)],
        (MtlsMode::Permissive, Class::Tcp) => {
            vec![row(TLS, MESH_ANY, false, true), row(TLS, &[], false, false), row(RAW, &[], false, false)]
        }
        (MtlsMode::Permissive, Class::Auto) => vec![
            row(TLS, MESH_HTTP, true, true),
            row(RAW, PLAIN_HTTP, true, false),
            row(TLS, MESH_TCP, false, true),
            row(RAW, &[], false, false),
            row(TLS, &[], false, false),
        ],
        (MtlsMode::Disable, Class::Http) => vec![row(RAW, &[], true, false)],
        (MtlsMode::Disable, Class::Tcp) => vec![row(RAW, &[], false, false)],
        (MtlsMode::Disable, Class::Auto) => vec![row(RAW, PLAIN_HTTP, true, false), row(RAW, &[], false, false)],
        (MtlsMode::Strict | MtlsMode::Unset, Class::Http) => vec![row(TLS, &[], true, true)],
        (MtlsMode::Strict | MtlsMode::Unset, Class::Tcp) => vec![row(TLS, &[], false, true)],
        (MtlsMode::Strict | MtlsMode::Unset, Class::Auto) => {
            vec![row(TLS, MESH_HTTP, true, true), row(TLS, &[], false, true)]
        }
    }
}

/// Where the traffic of one port goes, and under which names.
struct Target {
    /// `None`: every port without chains of its own.
    port: Option<u16>,
    class: Class,
    mode: MtlsMode,
    http_name: String,
    tcp_name: String,
    stat_prefix: String,
    cluster: String,
    virtual_host: String,
    operation: String,
    is_grpc: bool,
    metadata: Option<Metadata>,
}

impl Target {
    /// Traffic to a port that nothing declares.
    fn passthrough(port: Option<u16>, mode: MtlsMode) -> Self {
        let cluster = "InboundPassthroughCluster".to_owned();
        Self {
            port,
            class: Class::Auto,
            mode,
            http_name: "virtualInbound-catchall-http".to_owned(),
            tcp_name: "virtualInbound".to_owned(),
            stat_prefix: format!("{cluster};"),
            cluster,
            virtual_host: "inbound|http|0".to_owned(),
            operation: ":0/*".to_owned(),
            is_grpc: false,
            metadata: None,
        }
    }

    fn declared(context: &Context<'_>, port: &InboundPort, mode: MtlsMode) -> Self {
        let address = match &port.ingress {
            None => "0.0.0.0".to_owned(),
            Some(ingress) if !ingress.listener.bind.is_empty() => ingress.listener.bind.clone(),
            Some(_) => context.view.ips.first().map_or_else(|| "0.0.0.0".to_owned(), ToString::to_string),
        };
        let name = format!("{address}_{}", port.number);
        let operation = match (port.services.first(), &port.ingress) {
            (Some((service, number)), _) => format!("{}:{number}/*", service.host),
            (None, Some(ingress)) => {
                let object = &ingress.from.object;
                format!("{}.{}:{}/*", object.name, object.namespace, port.number)
            }
            (None, None) => format!(":{}/*", port.number),
        };
        Self {
            port: Some(port.number),
            class: Class::of(port.protocol),
            mode,
            http_name: name.clone(),
            stat_prefix: format!("inbound_{name};"),
            tcp_name: name,
            cluster: port.cluster(),
            virtual_host: format!("inbound|http|{}", port.number),
            operation,
            is_grpc: port.protocol.is_grpc(),
            metadata: port
                .ingress
                .as_ref()
                .and_then(|ingress| wire::provenance_metadata(std::slice::from_ref(&ingress.from))),
        }
    }
}

/// `virtualInbound`.
pub(crate) fn listener(context: &Context<'_>) -> Listener {
    let policies = super::policy_filters(context, Place::Sidecar);
    let modes = context.snapshot.mtls_policy(&context.view.namespace, &context.view.labels);
    let listen_port = context.snapshot.mesh_config().proxy_inbound_listen_port();
    let declared = ports(context);
    let numbers: BTreeSet<u16> = declared.iter().map(|port| port.number).collect();

    let mut targets = vec![Target::passthrough(None, modes.mode)];
    let undeclared = modes.ports.iter().filter(|(port, _)| !numbers.contains(port));
    targets.extend(undeclared.map(|(port, mode)| Target::passthrough(Some(*port), *mode)));
    for port in &declared {
        targets.push(Target::declared(context, port, modes.port(port.number)));
    }

    let needs = Needs::of(&targets, listen_port);
    let mut filter_chains = vec![black_hole(context, listen_port)];
    for target in &targets {
        for row in chains_of(target.mode, target.class) {
            filter_chains.push(chain(context, target, row, &policies));
        }
        if target.port.is_none() && target.mode == MtlsMode::Disable && needs.has_tls {
            // The inspector runs for some other port, so TLS to this one shows as TLS: opaque bytes.
            filter_chains.push(chain(context, target, row("tls", &[], false, false), &policies));
        }
    }
    context.find_all(policies.findings);
    Listener {
        name: "virtualInbound".to_owned(),
        address: Some(wire::socket_address("0.0.0.0", listen_port)),
        filter_chains,
        listener_filters: needs.filters(),
        listener_filters_timeout: wire::duration(context.snapshot.mesh_config().protocol_detection_timeout()),
        continue_on_listener_filters_timeout: true,
        traffic_direction: TrafficDirection::Inbound.into(),
        access_log: context.telemetry.listener_logs(),
        max_connections_to_accept_per_socket_event: wire::uint(1),
        ..Listener::default()
    }
}

/// What dials the listener's own port gets nowhere, lest it dials itself for ever.
fn black_hole(context: &Context<'_>, listen_port: u16) -> FilterChain {
    let mut filters: Vec<Filter> = filter::metadata_exchange_filter(context).into_iter().collect();
    filters.extend(filter::black_hole(context, Direction::Inbound));
    FilterChain {
        name: "virtualInbound-blackhole".to_owned(),
        filter_chain_match: Some(FilterChainMatch {
            destination_port: wire::uint(u32::from(listen_port)),
            ..FilterChainMatch::default()
        }),
        filters,
        ..FilterChain::default()
    }
}

fn chain(context: &Context<'_>, target: &Target, row: ChainRow, policies: &PolicyFilters) -> FilterChain {
    let mut filters: Vec<Filter> = filter::metadata_exchange_filter(context).into_iter().collect();
    if row.is_http {
        filters.push(filter::connection_manager(
            context,
            Http {
                direction: Direction::Inbound,
                stat_prefix: target.stat_prefix.clone(),
                routes: Routes::Inline(Box::new(table(target))),
                policies: policies.http.clone(),
                has_grpc_web: false,
            },
        ));
    } else {
        filters.extend(policies.tcp.iter().cloned());
        let cluster = TcpTarget::Cluster(target.cluster.clone());
        filters.extend(filter::tcp(context, Direction::Inbound, &target.cluster, cluster, &TcpOptions::default()));
    }
    let alpn = if row.is_http { tls::ALPN_HTTP } else { tls::alpn_of_bytes(context.view.capabilities) };
    let settings = context.snapshot.mesh_config().mesh_mtls.as_ref();
    FilterChain {
        name: if row.is_http { target.http_name.clone() } else { target.tcp_name.clone() },
        filter_chain_match: Some(FilterChainMatch {
            destination_port: target.port.and_then(|port| wire::uint(u32::from(port))),
            transport_protocol: row.transport.to_owned(),
            application_protocols: tls::strings(row.alpn),
            ..FilterChainMatch::default()
        }),
        filters,
        transport_socket: row.is_mutual.then(|| tls::socket(tls::mesh_server(&context.trust_domains, settings, alpn))),
        metadata: target.metadata.clone(),
        ..FilterChain::default()
    }
}

/// The one route of a port.
fn table(target: &Target) -> RouteConfiguration {
    let retries = RetryPolicy {
        retry_on: "reset-before-request".to_owned(),
        num_retries: wire::uint(2),
        ..RetryPolicy::default()
    };
    let action = RouteAction {
        cluster_specifier: Some(route_action::ClusterSpecifier::Cluster(target.cluster.clone())),
        timeout: wire::zero(),
        retry_policy: (!target.is_grpc).then_some(retries),
        max_stream_duration: Some(route_action::MaxStreamDuration {
            max_stream_duration: wire::zero(),
            grpc_timeout_header_max: wire::zero(),
            ..route_action::MaxStreamDuration::default()
        }),
        ..RouteAction::default()
    };
    let route = Route {
        name: "default".to_owned(),
        r#match: Some(RouteMatch {
            path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        decorator: Some(Decorator { operation: target.operation.clone(), propagate: None }),
        action: Some(route::Action::Route(action)),
        ..Route::default()
    };
    RouteConfiguration {
        name: target.cluster.clone(),
        virtual_hosts: vec![VirtualHost {
            name: target.virtual_host.clone(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            ..VirtualHost::default()
        }],
        validate_clusters: wire::boolean(false),
        ..RouteConfiguration::default()
    }
}

/// Which inspectors some chain needs, and the ports that do not need them.
struct Needs {
    has_tls: bool,
    has_http: bool,
    without_tls: BTreeSet<u16>,
    without_http: BTreeSet<u16>,
}

impl Needs {
    fn of(targets: &[Target], listen_port: u16) -> Self {
        let mut needs = Self {
            has_tls: false,
            has_http: false,
            without_tls: BTreeSet::from([listen_port]),
            without_http: BTreeSet::from([listen_port]),
        };
        for target in targets {
            let rows = chains_of(target.mode, target.class);
            let tls = rows.iter().any(|row| row.transport == "tls");
            let http = rows.iter().any(|row| row.alpn == PLAIN_HTTP);
            needs.has_tls |= tls;
            needs.has_http |= http;
            if let Some(port) = target.port {
                if !tls {
                    needs.without_tls.insert(port);
                }
                if !http {
                    needs.without_http.insert(port);
                }
            }
        }
        needs
    }

    fn filters(&self) -> Vec<ListenerFilter> {
        let mut filters = vec![filter::listener_filter(ORIGINAL_DST, wire::pack(&OriginalDst::default()), None)];
        if self.has_tls {
            filters.push(filter::tls_inspector(off_for(&self.without_tls)));
        }
        if self.has_http {
            filters.push(filter::listener_filter(
                HTTP_INSPECTOR,
                wire::pack(&HttpInspector::default()),
                off_for(&self.without_http),
            ));
        }
        filters
    }
}

fn off_for(ports: &BTreeSet<u16>) -> Option<ListenerFilterChainMatchPredicate> {
    let rule = |rule| ListenerFilterChainMatchPredicate { rule: Some(rule) };
    let mut rules: Vec<_> = ports
        .iter()
        .map(|port| {
            let start = i32::from(*port);
            rule(predicate::Rule::DestinationPortRange(Int32Range { start, end: start + 1 }))
        })
        .collect();
    if rules.len() > 1 { Some(rule(predicate::Rule::OrMatch(predicate::MatchSet { rules }))) } else { rules.pop() }
}

#[cfg(test)]
#[path = "inbound_tests.rs"]
mod tests;
