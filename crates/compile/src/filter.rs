//! Network and HTTP filters, and the connection manager around them.
//!
//! *Source*: `docs/parity.md`, Traffic 8.3 ("order of work in one proxy").

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::core::v3::Http2ProtocolOptions;
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, ListenerFilter, ListenerFilterChainMatchPredicate, filter, listener_filter,
};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::Cors;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::HttpFault;
use envoy_types::pb::envoy::extensions::filters::http::grpc_stats::v3::{
    FilterConfig as GrpcStats, filter_config::PerMethodStatSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::http::grpc_web::v3::GrpcWeb;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, Rds, RequestIdExtension, http_connection_manager as hcm, http_filter,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy};
use envoy_types::pb::envoy::extensions::request_id::uuid::v3::UuidRequestIdConfig;
use envoy_types::pb::google::protobuf::Any;

use crate::context::Context;
use crate::telemetry;
use crate::wire::{self, boolean, fields, list, object, pack, text, uint, zero};

/// How long a client of a gateway may take for the head of a request.
const GATEWAY_HEADERS_SECONDS: u64 = 60;
/// How long a stream through a gateway may be silent. As long as an idle connection is kept.
const GATEWAY_STREAM_IDLE_SECONDS: u64 = 3600;

/// Which way traffic passes the proxy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// From the local workload.
    Outbound,
    /// To the local workload.
    Inbound,
    /// Through a router.
    Gateway,
}

/// Where a connection manager finds its routes.
pub(crate) enum Routes {
    /// By name, over the stream.
    Rds(String),
    /// Here.
    Inline(Box<RouteConfiguration>),
}

/// What makes one connection manager different from another.
pub(crate) struct Http {
    pub(crate) direction: Direction,
    /// As Istio writes it, with its `;`.
    pub(crate) stat_prefix: String,
    pub(crate) routes: Routes,
    /// Authentication and authorization, in order.
    pub(crate) policies: Vec<HttpFilter>,
    /// Browser gRPC is translated.
    pub(crate) has_grpc_web: bool,
}

/// A network filter by its full name.
pub(crate) fn network(name: &str, config: Any) -> Filter {
    Filter { name: name.to_owned(), config_type: Some(filter::ConfigType::TypedConfig(config)) }
}

/// An HTTP filter by its full name.
pub(crate) fn http(name: &str, config: Any) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(http_filter::ConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    }
}

/// `istio.metadata_exchange` for bytes; nothing for clients without it.
pub(crate) fn metadata_exchange(context: &Context<'_>) -> Option<Any> {
    context.view.capabilities.has_metadata_exchange.then(|| {
        wire::typed_struct(
            "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange",
            fields(vec![
                (
                    "enable_discovery",
                    envoy_types::pb::google::protobuf::Value {
                        kind: Some(envoy_types::pb::google::protobuf::value::Kind::BoolValue(true)),
                    },
                ),
                ("protocol", text("istio-peer-exchange")),
            ]),
        )
    })
}

/// `istio.metadata_exchange` as a network filter; none for clients without it.
pub(crate) fn metadata_exchange_filter(context: &Context<'_>) -> Option<Filter> {
    metadata_exchange(context).map(|config| network("istio.metadata_exchange", config))
}

fn stats_config(direction: Direction) -> Any {
    let config = proto::filters::stats::PluginConfig {
        disable_host_header_fallback: direction != Direction::Outbound,
        ..Default::default()
    };
    pack(&config)
}

/// `istio.stats` as a network filter; none for clients without it.
pub(crate) fn stats_filter(context: &Context<'_>, direction: Direction) -> Option<Filter> {
    context.view.capabilities.has_stats.then(|| network("istio.stats", stats_config(direction)))
}

/// Where a TCP proxy leads.
#[derive(Clone)]
pub(crate) enum TcpTarget {
    /// One cluster.
    Cluster(String),
    /// Several, by weight.
    Weighted(Vec<(String, u32)>),
}

/// Sees TLS and the name asked for.
pub(crate) fn tls_inspector(filter_disabled: Option<ListenerFilterChainMatchPredicate>) -> ListenerFilter {
    let config = pack(&TlsInspector { initial_read_buffer_size: uint(512), ..TlsInspector::default() });
    listener_filter("envoy.filters.listener.tls_inspector", config, filter_disabled)
}

/// A listener filter by its full name.
pub(crate) fn listener_filter(
    name: &str,
    config: Any,
    filter_disabled: Option<ListenerFilterChainMatchPredicate>,
) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        filter_disabled,
        config_type: Some(listener_filter::ConfigType::TypedConfig(config)),
    }
}

/// What a TCP proxy takes from a DestinationRule.
#[derive(Default)]
pub(crate) struct TcpOptions {
    pub(crate) idle_timeout: Option<std::time::Duration>,
    pub(crate) max_connection_duration: Option<std::time::Duration>,
    pub(crate) hashes_source_ip: bool,
}

/// `istio.stats` and the TCP proxy.
pub(crate) fn tcp(
    context: &Context<'_>,
    direction: Direction,
    stat_prefix: &str,
    target: TcpTarget,
    options: &TcpOptions,
) -> Vec<Filter> {
    let proxy = tcp_proxy(stat_prefix, target, options, context.telemetry.access_logs());
    stats_filter(context, direction)
        .into_iter()
        .chain([network("envoy.filters.network.tcp_proxy", pack(&proxy))])
        .collect()
}

/// The same without an access log, for chains that only close connections.
pub(crate) fn black_hole(context: &Context<'_>, direction: Direction) -> Vec<Filter> {
    let target = TcpTarget::Cluster("BlackHoleCluster".into());
    let proxy = tcp_proxy("BlackHoleCluster", target, &TcpOptions::default(), Vec::new());
    stats_filter(context, direction)
        .into_iter()
        .chain([network("envoy.filters.network.tcp_proxy", pack(&proxy))])
        .collect()
}

fn tcp_proxy(stat_prefix: &str, target: TcpTarget, options: &TcpOptions, access_log: Vec<AccessLog>) -> TcpProxy {
    use envoy_types::pb::envoy::r#type::v3::{HashPolicy, hash_policy};
    let specifier = match target {
        TcpTarget::Cluster(name) => tcp_proxy::ClusterSpecifier::Cluster(name),
        TcpTarget::Weighted(clusters) => tcp_proxy::ClusterSpecifier::WeightedClusters(tcp_proxy::WeightedCluster {
            clusters: clusters
                .into_iter()
                .map(|(name, weight)| tcp_proxy::weighted_cluster::ClusterWeight { name, weight, metadata_match: None })
                .collect(),
        }),
    };
    TcpProxy {
        stat_prefix: stat_prefix.to_owned(),
        cluster_specifier: Some(specifier),
        idle_timeout: options.idle_timeout.and_then(wire::duration),
        max_downstream_connection_duration: options.max_connection_duration.and_then(wire::duration),
        hash_policy: if options.hashes_source_ip {
            vec![HashPolicy {
                policy_specifier: Some(hash_policy::PolicySpecifier::SourceIp(hash_policy::SourceIp {})),
            }]
        } else {
            Vec::new()
        },
        access_log,
        ..TcpProxy::default()
    }
}

/// The HTTP filters of one connection manager, in the order in which they run.
fn http_filters(context: &Context<'_>, of: &Http) -> Vec<HttpFilter> {
    let capabilities = context.view.capabilities;
    let mut filters = Vec::new();
    if capabilities.has_peer_metadata {
        filters.push(http("istio.metadata_exchange", peer_metadata(of.direction)));
    }
    filters.extend(of.policies.iter().cloned());
    if of.has_grpc_web {
        filters.push(http("envoy.filters.http.grpc_web", pack(&GrpcWeb {})));
    }
    let grpc_stats = GrpcStats {
        emit_filter_state: true,
        per_method_stat_specifier: Some(PerMethodStatSpecifier::StatsForAllMethods(
            envoy_types::pb::google::protobuf::BoolValue { value: false },
        )),
        ..GrpcStats::default()
    };
    filters.push(http("envoy.filters.http.grpc_stats", pack(&grpc_stats)));
    if of.direction != Direction::Inbound && capabilities.has_alpn {
        filters.push(http("istio.alpn", pack(&alpn_override())));
    }
    filters.push(http("envoy.filters.http.fault", pack(&HttpFault::default())));
    filters.push(http("envoy.filters.http.cors", pack(&Cors {})));
    if capabilities.has_stats {
        filters.push(http("istio.stats", stats_config(of.direction)));
    }
    let router = Router {
        suppress_envoy_headers: context.proxy_headers().is_some_and(|headers| headers.envoy_debug_headers.disabled),
        ..Router::default()
    };
    filters.push(http("envoy.filters.http.router", pack(&router)));
    filters
}

fn peer_metadata(direction: Direction) -> Any {
    let headers = || object(vec![("istio_headers", object(vec![]))]);
    let discovery = list(vec![headers(), object(vec![("workload_discovery", object(vec![]))])]);
    let propagation = list(vec![headers()]);
    let (find, tell) = match direction {
        Direction::Inbound => ("downstream_discovery", "downstream_propagation"),
        Direction::Outbound | Direction::Gateway => ("upstream_discovery", "upstream_propagation"),
    };
    wire::typed_struct(
        "type.googleapis.com/io.istio.http.peer_metadata.Config",
        fields(vec![(find, discovery), (tell, propagation)]),
    )
}

fn alpn_override() -> proto::filters::alpn::FilterConfig {
    use proto::filters::alpn::filter_config::{AlpnOverride, Protocol};
    let of = |protocol: Protocol, list: [&str; 3]| AlpnOverride {
        upstream_protocol: protocol.into(),
        alpn_override: list.iter().map(ToString::to_string).collect(),
    };
    proto::filters::alpn::FilterConfig {
        alpn_override: vec![
            of(Protocol::Http10, ["istio-http/1.0", "istio", "http/1.0"]),
            of(Protocol::Http11, ["istio-http/1.1", "istio", "http/1.1"]),
            of(Protocol::Http2, ["istio-h2", "istio", "h2"]),
        ],
    }
}

/// The connection manager as a network filter.
pub(crate) fn connection_manager(context: &Context<'_>, of: Http) -> Filter {
    use api::mesh_config::Normalization;
    let http_filters = http_filters(context, &of);
    let normalization = context.snapshot.mesh_config().normalization();
    let is_gateway = of.direction == Direction::Gateway;
    let client_certs = match of.direction {
        Direction::Outbound => None,
        Direction::Inbound => Some((hcm::ForwardClientCertDetails::AppendForward, false)),
        Direction::Gateway => Some((context.gateway_client_cert_details(), true)),
    };
    let headers = context.proxy_headers();
    let own_name = headers.map(|headers| headers.server.value.as_str()).filter(|name| !name.is_empty());
    let server_name = own_name.unwrap_or(if of.direction == Direction::Outbound { "" } else { "istio-envoy" });
    let server_header = if headers.is_some_and(|headers| headers.server.disabled) {
        hcm::ServerHeaderTransformation::PassThrough
    } else {
        hcm::ServerHeaderTransformation::Overwrite
    };
    let manager = HttpConnectionManager {
        stat_prefix: of.stat_prefix,
        http_filters,
        tracing: Some(telemetry::tracing(context, of.direction)),
        http_protocol_options: http1_options(context, is_gateway),
        // A websocket comes over HTTP/2 where a proxy calls so; clients of gateways are offered none, as in Istio.
        http2_protocol_options: (of.direction == Direction::Inbound)
            .then(|| Http2ProtocolOptions { allow_connect: true, ..Default::default() }),
        server_name: server_name.to_owned(),
        server_header_transformation: server_header.into(),
        generate_request_id: headers.filter(|headers| headers.request_id.disabled).and_then(|_| boolean(false)),
        append_x_forwarded_port: headers.is_some_and(|headers| headers.x_forwarded_port.enabled),
        // Whatever a client from outside leaves hanging is let go; sidecars follow Istio's "never".
        stream_idle_timeout: if is_gateway { wire::seconds(GATEWAY_STREAM_IDLE_SECONDS) } else { zero() },
        request_headers_timeout: if is_gateway { wire::seconds(GATEWAY_HEADERS_SECONDS) } else { None },
        access_log: context.telemetry.access_logs(),
        use_remote_address: boolean(is_gateway),
        xff_num_trusted_hops: if is_gateway { context.trusted_proxies() } else { 0 },
        forward_client_cert_details: client_certs.map(|(details, _)| details.into()).unwrap_or_default(),
        set_current_client_cert_details: client_certs.map(|(_, cert)| hcm::SetCurrentClientCertDetails {
            subject: boolean(true),
            cert,
            chain: false,
            dns: true,
            uri: true,
            ..Default::default()
        }),
        proxy_100_continue: true,
        upgrade_configs: vec![hcm::UpgradeConfig { upgrade_type: "websocket".into(), ..Default::default() }],
        normalize_path: boolean(normalization != Normalization::None),
        merge_slashes: matches!(normalization, Normalization::MergeSlashes | Normalization::DecodeAndMergeSlashes),
        path_with_escaped_slashes_action: match normalization {
            Normalization::DecodeAndMergeSlashes => hcm::PathWithEscapedSlashesAction::UnescapeAndForward,
            _ => hcm::PathWithEscapedSlashesAction::KeepUnchanged,
        }
        .into(),
        request_id_extension: Some(RequestIdExtension {
            typed_config: Some(pack(&UuidRequestIdConfig {
                use_request_id_for_trace_sampling: boolean(true),
                ..UuidRequestIdConfig::default()
            })),
        }),
        route_specifier: Some(match of.routes {
            Routes::Rds(name) => {
                hcm::RouteSpecifier::Rds(Rds { config_source: Some(wire::ads()), route_config_name: name })
            }
            Routes::Inline(table) => hcm::RouteSpecifier::RouteConfig(*table),
        }),
        ..HttpConnectionManager::default()
    };
    network("envoy.filters.network.http_connection_manager", pack(&manager))
}

fn http1_options(
    context: &Context<'_>,
    is_gateway: bool,
) -> Option<envoy_types::pb::envoy::config::core::v3::Http1ProtocolOptions> {
    use envoy_types::pb::envoy::config::core::v3::Http1ProtocolOptions;
    if context.view.accepts_http10 {
        return Some(Http1ProtocolOptions { accept_http_10: true, ..Http1ProtocolOptions::default() });
    }
    is_gateway.then(Http1ProtocolOptions::default)
}
