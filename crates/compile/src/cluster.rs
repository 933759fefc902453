//! Clusters: services and subsets, the local workload's ports, and the fixed ones.
//!
//! *Source*: `docs/parity.md`, Traffic 3.2 to 3.6.

mod policy;
mod tls;

use std::sync::Arc;

use api::networking as net;
use envoy_types::pb::envoy::config::cluster::v3::{Cluster, Filter, cluster};
use envoy_types::pb::envoy::config::core::v3::{
    BindConfig, Http1ProtocolOptions, Http2ProtocolOptions, SocketAddress, TypedExtensionConfig, socket_address,
};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::extensions::clusters::dynamic_forward_proxy::v3::ClusterConfig as DynamicForwardProxy;
use envoy_types::pb::envoy::extensions::common::dynamic_forward_proxy::v3::DnsCacheConfig;
use envoy_types::pb::envoy::extensions::network::dns_resolver::cares::v3::CaresDnsResolverConfig;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::{HttpProtocolOptions, http_protocol_options as http};
use envoy_types::pb::google::protobuf::Duration;
use mesh::{DestinationRule, EffectivePolicy, Provenance, Resolution, Service, ServicePort, Subset};

use crate::context::Context;
use crate::endpoint;
use crate::names;
use crate::security::inbound::InboundPort;
use crate::view::Interception;
use crate::wire::{self, list, object, pack, seconds, text};

pub(crate) use tls::TlsChoice;

/// The key under which clusters hold their HTTP settings.
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// One outbound cluster: the inputs that decide everything about it.
pub(crate) struct Outbound<'a> {
    pub(crate) service: &'a Arc<Service>,
    pub(crate) port: &'a ServicePort,
    pub(crate) subset: Option<&'a Subset>,
    pub(crate) rule: Option<&'a DestinationRule>,
    pub(crate) policy: EffectivePolicy,
}

impl<'a> Outbound<'a> {
    pub(crate) fn new(
        context: &Context<'_>,
        service: &'a Arc<Service>,
        port: &'a ServicePort,
        rule: Option<&'a DestinationRule>,
        subset: Option<&'a Subset>,
    ) -> Self {
        let mesh = context.snapshot.mesh_config().default_traffic_policy.as_ref();
        let policy = match rule {
            Some(rule) => rule.policy_for(mesh, port.number, subset.map(|subset| subset.spec.name.as_str())),
            None => EffectivePolicy::layered(mesh, None, None, port.number),
        };
        Self { service, port, subset, rule, policy }
    }

    pub(crate) fn subset_name(&self) -> &str {
        self.subset.map_or("", |subset| &subset.spec.name)
    }

    pub(crate) fn name(&self) -> String {
        names::cluster(self.port.number, self.subset_name(), &self.service.host)
    }

    /// How endpoints are found, after `simple: PASSTHROUGH` and at a router.
    pub(crate) fn resolution(&self, context: &Context<'_>) -> Resolution {
        let simple = self.policy.load_balancer.as_ref().and_then(|lb| lb.simple);
        match self.service.resolution {
            // A router has no original destination: it balances over the known endpoints.
            Resolution::Original if !context.is_sidecar() => Resolution::Endpoints,
            Resolution::Endpoints if simple == Some(net::SimpleLb::Passthrough) && context.is_sidecar() => {
                Resolution::Original
            }
            other => other,
        }
    }
}

/// Every outbound cluster of the proxy, with those whose endpoints are sent apart.
pub(crate) fn outbound(context: &Context<'_>) -> (Vec<Cluster>, Vec<ClusterLoadAssignment>) {
    let mut clusters = Vec::new();
    let mut endpoints = Vec::new();
    for service in &context.scope.services {
        let rule = context.rule(service).map(|rule| &**rule);
        for port in &service.ports {
            let subsets = rule.map(|rule| rule.subsets.as_slice()).unwrap_or_default();
            for subset in std::iter::once(None).chain(subsets.iter().map(Some)) {
                // A dynamic host has one cluster only: its endpoints come from the request.
                if subset.is_some() && service.resolution == Resolution::DynamicDns {
                    continue;
                }
                let of = Outbound::new(context, service, port, rule, subset);
                let Some(cluster) = outbound_cluster(context, &of) else {
                    continue;
                };
                if of.resolution(context) == Resolution::Endpoints {
                    endpoints.push(endpoint::assignment(context, &of));
                }
                clusters.push(cluster);
            }
        }
    }
    (clusters, endpoints)
}

/// `None` when DNS would have nothing to resolve.
fn outbound_cluster(context: &Context<'_>, of: &Outbound<'_>) -> Option<Cluster> {
    let name = of.name();
    let resolution = of.resolution(context);
    let mut cluster = base(context, &name);
    cluster.common_lb_config = Some(cluster::CommonLbConfig {
        healthy_panic_threshold: Some(envoy_types::pb::envoy::r#type::v3::Percent { value: 0.0 }),
        ..Default::default()
    });
    cluster.filters = upstream_filters(context);
    match resolution {
        Resolution::Endpoints => {
            set_type(&mut cluster, cluster::DiscoveryType::Eds);
            cluster.eds_cluster_config =
                Some(cluster::EdsClusterConfig { eds_config: Some(wire::ads()), service_name: name });
        }
        Resolution::Original => {
            set_type(&mut cluster, cluster::DiscoveryType::OriginalDst);
            cluster.lb_policy = cluster::LbPolicy::ClusterProvided.into();
        }
        Resolution::Dns | Resolution::DnsRoundRobin => {
            let assignment = endpoint::assignment(context, of);
            if assignment.endpoints.iter().all(|locality| locality.lb_endpoints.is_empty()) {
                return None;
            }
            let kind = if resolution == Resolution::Dns {
                cluster::DiscoveryType::StrictDns
            } else {
                cluster::DiscoveryType::LogicalDns
            };
            set_type(&mut cluster, kind);
            set_dns(context, &mut cluster);
            cluster.load_assignment = Some(assignment);
        }
        Resolution::DynamicDns => set_dynamic(&mut cluster, &of.service.host),
    }
    let balances = matches!(resolution, Resolution::Endpoints | Resolution::Dns | Resolution::DnsRoundRobin);
    policy::apply(context, of, &mut cluster, balances);
    let choice = tls::choose(context, of, resolution);
    let mut options = policy::http_options(context, of);
    tls::apply(context, of, &choice, &mut cluster, &mut options);
    if let Some(options) = options {
        cluster.typed_extension_protocol_options = wire::stable_map(vec![(HTTP_OPTIONS.to_owned(), pack(&options))]);
    }
    cluster.metadata = metadata(of, &choice);
    Some(cluster)
}

fn metadata(of: &Outbound<'_>, choice: &TlsChoice) -> Option<envoy_types::pb::envoy::config::core::v3::Metadata> {
    let service = of.service;
    let mut istio = Vec::new();
    if service.resolution != Resolution::DynamicDns {
        istio.push(("services", list(vec![service_value(service)])));
    }
    let mut from = Vec::new();
    if let Some(rule) = of.rule {
        let object = of.subset.map_or_else(|| rule.object(), |subset| &subset.from);
        istio.push(("config", text(wire::config_path(rule.object()))));
        from.extend(rule.from.iter().map(|object| Provenance::new(object, "")));
        if of.subset.is_some() && !rule.from.contains(object) {
            from.push(Provenance::new(object, ""));
        }
    }
    if let Some(subset) = of.subset {
        istio.push(("subset", text(subset.spec.name.clone())));
    }
    if service.is_external {
        istio.push(("external", wire_bool(true)));
    }
    if choice.is_origination() {
        istio.push(("alpn_override", text("false")));
    }
    from.push(Provenance::new(&service.object, ""));
    wire::metadata(vec![("istio", istio), ("lateen", wire::provenance(&from))])
}

/// `true` or `false` as a value.
pub(crate) fn wire_bool(value: bool) -> envoy_types::pb::google::protobuf::Value {
    envoy_types::pb::google::protobuf::Value {
        kind: Some(envoy_types::pb::google::protobuf::value::Kind::BoolValue(value)),
    }
}

fn service_value(service: &Service) -> envoy_types::pb::google::protobuf::Value {
    object(vec![
        ("host", text(&*service.host)),
        ("name", text(&*service.name)),
        ("namespace", text(&*service.namespace)),
    ])
}

fn set_type(cluster: &mut Cluster, kind: cluster::DiscoveryType) {
    cluster.cluster_discovery_type = Some(cluster::ClusterDiscoveryType::Type(kind.into()));
}

/// What every cluster has.
fn base(context: &Context<'_>, name: &str) -> Cluster {
    Cluster {
        name: name.to_owned(),
        alt_stat_name: format!("{name};"),
        connect_timeout: wire::duration(context.snapshot.mesh_config().connect_timeout()),
        circuit_breakers: Some(policy::circuit_breakers(None, None)),
        ..Cluster::default()
    }
}

fn upstream_filters(context: &Context<'_>) -> Vec<Filter> {
    crate::filter::metadata_exchange(context)
        .into_iter()
        .map(|config| Filter {
            name: "istio.metadata_exchange".into(),
            typed_config: Some(config),
            config_discovery: None,
        })
        .collect()
}

#[expect(deprecated, reason = "Istio sends these fields, and every Envoy reads them")]
fn set_dns(context: &Context<'_>, cluster: &mut Cluster) {
    cluster.dns_refresh_rate = wire::duration(context.snapshot.mesh_config().dns_refresh_rate());
    cluster.dns_jitter = Some(Duration { seconds: 0, nanos: 100_000_000 });
    cluster.respect_dns_ttl = true;
    cluster.dns_lookup_family = cluster::DnsLookupFamily::V4Only.into();
    cluster.typed_dns_resolver_config = Some(TypedExtensionConfig {
        name: "envoy.network.dns_resolver.cares".into(),
        typed_config: Some(pack(&CaresDnsResolverConfig {
            udp_max_queries: wire::uint(100),
            ..CaresDnsResolverConfig::default()
        })),
    });
}

fn set_dynamic(cluster: &mut Cluster, host: &str) {
    use envoy_types::pb::envoy::extensions::clusters::dynamic_forward_proxy::v3::cluster_config::ClusterImplementationSpecifier;
    let config = DynamicForwardProxy {
        cluster_implementation_specifier: Some(ClusterImplementationSpecifier::DnsCacheConfig(DnsCacheConfig {
            name: format!("{host}_dfp_dns_cache"),
            dns_lookup_family: cluster::DnsLookupFamily::V4Only.into(),
            ..DnsCacheConfig::default()
        })),
        ..DynamicForwardProxy::default()
    };
    cluster.cluster_discovery_type = Some(cluster::ClusterDiscoveryType::ClusterType(cluster::CustomClusterType {
        name: "envoy.clusters.dynamic_forward_proxy".into(),
        typed_config: Some(pack(&config)),
    }));
    cluster.lb_policy = cluster::LbPolicy::ClusterProvided.into();
    cluster.common_lb_config = None;
}

// --- fixed clusters ---

/// The clusters that do not depend on services.
pub(crate) fn fixed(context: &Context<'_>) -> Vec<Cluster> {
    let mut black_hole = Cluster {
        name: names::BLACK_HOLE.into(),
        alt_stat_name: format!("{};", names::BLACK_HOLE),
        connect_timeout: wire::duration(context.snapshot.mesh_config().connect_timeout()),
        ..Cluster::default()
    };
    set_type(&mut black_hole, cluster::DiscoveryType::Static);
    if !context.is_sidecar() {
        return vec![black_hole];
    }
    let mut outbound = passthrough(context, names::PASSTHROUGH);
    outbound.filters = upstream_filters(context);
    let mut all = vec![black_hole, outbound];
    if context.view.interception != Interception::None {
        let mut inbound = passthrough(context, names::INBOUND_PASSTHROUGH);
        // Both passthrough clusters count under one name.
        inbound.alt_stat_name = format!("{};", names::PASSTHROUGH);
        inbound.upstream_bind_config = Some(bind_to_passthrough_source());
        all.push(inbound);
    }
    all
}

fn passthrough(context: &Context<'_>, name: &str) -> Cluster {
    let mut cluster = base(context, name);
    set_type(&mut cluster, cluster::DiscoveryType::OriginalDst);
    cluster.lb_policy = cluster::LbPolicy::ClusterProvided.into();
    let options = HttpProtocolOptions {
        common_http_protocol_options: Some(envoy_types::pb::envoy::config::core::v3::HttpProtocolOptions {
            idle_timeout: seconds(300),
            ..Default::default()
        }),
        upstream_protocol_options: Some(client_protocol()),
        ..HttpProtocolOptions::default()
    };
    cluster.typed_extension_protocol_options = wire::stable_map(vec![(HTTP_OPTIONS.to_owned(), pack(&options))]);
    cluster
}

/// The client's protocol decides.
fn client_protocol() -> http::UpstreamProtocolOptions {
    http::UpstreamProtocolOptions::UseDownstreamProtocolConfig(http::UseDownstreamHttpConfig {
        http_protocol_options: Some(Http1ProtocolOptions::default()),
        http2_protocol_options: Some(Http2ProtocolOptions::default()),
        ..Default::default()
    })
}

/// Connections to the application come from an address that capture leaves alone.
fn bind_to_passthrough_source() -> BindConfig {
    BindConfig {
        source_address: Some(SocketAddress {
            address: "127.0.0.6".into(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(0)),
            ..SocketAddress::default()
        }),
        ..BindConfig::default()
    }
}

// --- inbound ---

/// One cluster per port of the local workload.
pub(crate) fn inbound(context: &Context<'_>, ports: &[InboundPort]) -> Vec<Cluster> {
    ports.iter().map(|port| inbound_cluster(context, port)).collect()
}

fn inbound_cluster(context: &Context<'_>, port: &InboundPort) -> Cluster {
    let name = port.cluster();
    let mut cluster = base(context, &name);
    cluster.common_lb_config = Some(cluster::CommonLbConfig::default());
    let listener = port.ingress.as_ref().map(|ingress| &ingress.listener);
    match endpoint_of(context, listener, port.number) {
        None => {
            set_type(&mut cluster, cluster::DiscoveryType::OriginalDst);
            cluster.lb_policy = cluster::LbPolicy::ClusterProvided.into();
            // Istio's "never": hosts of an inbound cluster are its own pod.
            cluster.cleanup_interval = Some(Duration { seconds: 9_223_372_035, nanos: 0 });
            cluster.upstream_bind_config = Some(bind_to_passthrough_source());
        }
        Some((address, number)) => {
            set_type(&mut cluster, cluster::DiscoveryType::Static);
            cluster.load_assignment = Some(endpoint::single(&name, &address, number));
            if !matches!(address.as_str(), "127.0.0.1" | "::1") && !address.starts_with('/') {
                cluster.upstream_bind_config = Some(bind_to_passthrough_source());
            }
        }
    }
    let service = port.services.first();
    // Subsets mean nothing here; only a policy does.
    let rule = service.and_then(|(service, _)| context.rule(service)).filter(|rule| rule.traffic_policy.is_some());
    let mut istio = Vec::new();
    let mut from: Vec<Provenance> = Vec::new();
    if !port.services.is_empty() {
        let mut services: Vec<&Arc<Service>> = Vec::new();
        for (service, _) in &port.services {
            if !services.iter().any(|known| known.key() == service.key()) {
                services.push(service);
            }
        }
        istio.push(("services", list(services.into_iter().map(|service| service_value(service)).collect())));
    }
    if let Some(rule) = rule {
        istio.push(("config", text(wire::config_path(rule.object()))));
        from.extend(rule.from.iter().map(|object| Provenance::new(object, "")));
    }
    from.extend(port.ingress.iter().map(|ingress| ingress.from.clone()));
    from.extend(port.services.iter().map(|(service, _)| Provenance::new(&service.object, "")));
    // The nearest wins: ingress entry, Sidecar, the rule's port, the rule.
    let of_sidecar = context.scope.sidecar.as_ref().and_then(|sidecar| sidecar.spec.inbound_connection_pool.clone());
    let of_rule = || {
        let number = service.map_or(port.number, |(_, number)| *number);
        rule?.policy_for(context.snapshot.mesh_config().default_traffic_policy.as_ref(), number, None).connection_pool
    };
    let pool = listener.and_then(|listener| listener.connection_pool.clone()).or(of_sidecar).or_else(of_rule);
    if let Some(pool) = &pool {
        policy::apply_pool(pool, None, &mut cluster);
    }
    if let Some(options) = policy::inbound_http_options(port.protocol, pool.as_ref()) {
        cluster.typed_extension_protocol_options = wire::stable_map(vec![(HTTP_OPTIONS.to_owned(), pack(&options))]);
    }
    cluster.metadata = wire::metadata(vec![("istio", istio), ("lateen", wire::provenance(&from))]);
    cluster
}

/// Where the application listens, if not where the client dialled: address (or socket path) and port.
fn endpoint_of(
    context: &Context<'_>,
    ingress: Option<&net::IstioIngressListener>,
    number: u16,
) -> Option<(String, u16)> {
    let written = ingress.map(|listener| listener.default_endpoint.as_str()).filter(|text| !text.is_empty());
    let Some(written) = written else {
        let is_local = context.snapshot.mesh_config().inbound_mode() == api::mesh_config::InboundMode::Localhost;
        return is_local.then(|| ("127.0.0.1".to_owned(), number));
    };
    if let Some(path) = written.strip_prefix("unix://") {
        return Some((path.to_owned(), 0));
    }
    let (host, port) = written.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = port.parse().ok()?;
    // The wildcard means the pod's own address.
    if matches!(host, "0.0.0.0" | "::" | "") {
        return Some((context.view.ips.first()?.to_string(), port));
    }
    Some((host.to_owned(), port))
}

/// A keep-alive setting; 0 is unset.
pub(crate) fn keep_alive(settings: &net::TcpKeepalive) -> envoy_types::pb::envoy::config::core::v3::TcpKeepalive {
    let secs = |of: Option<api::scalar::Duration>| {
        of.and_then(|of| u32::try_from(of.0.as_secs()).ok()).filter(|count| *count > 0).and_then(wire::uint)
    };
    envoy_types::pb::envoy::config::core::v3::TcpKeepalive {
        keepalive_probes: if settings.probes > 0 { wire::uint(settings.probes) } else { None },
        keepalive_time: secs(settings.time),
        keepalive_interval: secs(settings.interval),
    }
}

#[cfg(test)]
mod tests;
