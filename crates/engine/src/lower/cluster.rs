//! Clusters.
#![expect(deprecated, reason = "istiod writes the older fields")]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::common::matcher::v3::{MatchPredicate, match_predicate};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::extensions::clusters::dynamic_forward_proxy::v3 as dynamic;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as upstreams;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration, Struct, UInt32Value};

use super::common::{config_source, fingerprint, json, metadata_text, nothing_left, provenance};
use super::{endpoint, tls};
use crate::cluster::{
    Balancing, Cluster, Discovery, DnsFamily, DnsSpec, HttpChoice, Limits, LocalityPolicy, RetryBudget, ServiceRef,
    SlowStart, TransportSocket, UpstreamHttp,
};
use crate::config::Name;
use crate::tls::Keepalive;
use crate::unsupported::{Unsupported, Within, duration, unpack};

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

pub(super) fn lower(any: &Any) -> Result<(Name, Cluster), Unsupported> {
    let mut proto: pb::Cluster = unpack(any, "")?;
    let name = Name::from(std::mem::take(&mut proto.name).as_str());
    if name.is_empty() {
        return Err(Unsupported::missing("name"));
    }
    let shown_name = match std::mem::take(&mut proto.alt_stat_name) {
        none if none.is_empty() => name.clone(),
        shown => Name::from(shown.as_str()),
    };
    let (discovery, inline_endpoints) = discovery(&mut proto, &name)?;
    let metadata = proto.metadata.take();
    let (mut http, failures) = http_options(&mut proto)?;
    let transports = transports(&mut proto, &mut http)?;
    let balancing = balancing(&mut proto, &discovery)?;
    let locality = common_lb(proto.common_lb_config.take()).within("common_lb_config")?;
    let limits = limits(proto.circuit_breakers.take()).within("circuit_breakers")?;
    let outlier = proto.outlier_detection.take();
    let outlier = outlier.as_ref().map(crate::outlier::Policy::lower).transpose().within("outlier_detection")?;
    let connect_timeout =
        optional_duration(proto.connect_timeout.take(), "connect_timeout")?.unwrap_or(Duration::from_secs(5));
    let bind = bind(proto.upstream_bind_config.take()).within("upstream_bind_config")?;
    let keepalive = connection_options(proto.upstream_connection_options.take())?;
    let metadata_exchange = upstream_filters(std::mem::take(&mut proto.filters))?;
    let buffer_max = proto.per_connection_buffer_limit_bytes.take().map_or(1 << 20, |value| value.value);
    harmless(&mut proto);
    nothing_left(&proto)?;
    let cluster = Cluster {
        shown_name,
        discovery,
        inline_endpoints,
        connect_timeout,
        balancing,
        locality,
        limits,
        outlier: outlier.map(|policy| Arc::new(crate::outlier::Policy { failures, ..policy })),
        transports,
        http,
        bind,
        keepalive,
        buffer_max,
        metadata_exchange,
        keep_alpn: metadata_text(metadata.as_ref(), "istio", "alpn_override") == Some("false"),
        external: istio_value(metadata.as_ref(), "external") == Some(&Kind::BoolValue(true)),
        services: services(metadata.as_ref()),
        subset: metadata_text(metadata.as_ref(), "istio", "subset").unwrap_or_default().into(),
        provenance: provenance(metadata.as_ref()),
        fingerprint: fingerprint(any),
        name: name.clone(),
    };
    Ok((name, cluster))
}

/// Takes what the documented list of harmless fields names.
fn harmless(proto: &mut pb::Cluster) {
    proto.stats_matcher = None;
    proto.track_cluster_stats = None;
    proto.cleanup_interval = None;
    proto.ignore_health_on_host_removal = false;
    proto.close_connections_on_host_health_failure = false;
    proto.typed_dns_resolver_config = None;
    proto.dns_refresh_rate = None;
    proto.dns_jitter = None;
    proto.respect_dns_ttl = false;
    proto.dns_lookup_family = 0;
    proto.wait_for_warm_on_init = None;
}

pub(super) fn optional_duration(proto: Option<ProtoDuration>, path: &str) -> Result<Option<Duration>, Unsupported> {
    proto.as_ref().map(|value| duration(value, path)).transpose()
}

type Found = (Discovery, Option<Arc<crate::cluster::EndpointSet>>);

fn discovery(proto: &mut pb::Cluster, name: &Name) -> Result<Found, Unsupported> {
    use pb::cluster::{ClusterDiscoveryType, DiscoveryType};
    let kind = proto.cluster_discovery_type.take();
    let assignment = proto.load_assignment.take();
    let eds = proto.eds_cluster_config.take();
    let kind = match kind {
        None => DiscoveryType::Static,
        Some(ClusterDiscoveryType::Type(kind)) => {
            DiscoveryType::try_from(kind).map_err(|_| Unsupported::new("type", "is not known"))?
        }
        Some(ClusterDiscoveryType::ClusterType(custom)) => return custom_discovery(&custom).within("cluster_type"),
    };
    if eds.is_some() && kind != DiscoveryType::Eds {
        return Err(Unsupported::new("eds_cluster_config", "is for type EDS only"));
    }
    if assignment.is_some() && matches!(kind, DiscoveryType::Eds | DiscoveryType::OriginalDst) {
        return Err(Unsupported::new("load_assignment", "is not for this type"));
    }
    match kind {
        DiscoveryType::Static => {
            let set = assignment.map(endpoint::lower).transpose().within("load_assignment")?;
            Ok((Discovery::Static, Some(Arc::new(set.unwrap_or_default()))))
        }
        DiscoveryType::Eds => {
            let config = eds.ok_or_else(|| Unsupported::missing("eds_cluster_config"))?;
            let source = config.eds_config.as_ref();
            source.map_or(Ok(()), config_source).within("eds_cluster_config.eds_config")?;
            let service =
                if config.service_name.is_empty() { name.clone() } else { Name::from(config.service_name.as_str()) };
            Ok((Discovery::Eds { service }, None))
        }
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => {
            let template =
                assignment.map(endpoint::lower_names).transpose().within("load_assignment")?.unwrap_or_default();
            let logical = kind == DiscoveryType::LogicalDns;
            if logical && template.iter().map(|place| place.hosts.len()).sum::<usize>() != 1 {
                return Err(Unsupported::new("load_assignment", "must hold one endpoint for LOGICAL_DNS"));
            }
            let refresh = optional_duration(proto.dns_refresh_rate.take(), "dns_refresh_rate")?;
            let spec = DnsSpec {
                logical,
                refresh: refresh.unwrap_or(Duration::from_secs(5)),
                family: family(std::mem::take(&mut proto.dns_lookup_family))?,
                template,
            };
            Ok((Discovery::Dns(Arc::new(spec)), None))
        }
        DiscoveryType::OriginalDst => {
            let port_override = match proto.lb_config.take() {
                None => None,
                Some(pb::cluster::LbConfig::OriginalDstLbConfig(mut config)) => {
                    let port = config.upstream_port_override.take().map(|port| port.value);
                    nothing_left(&config).within("original_dst_lb_config")?;
                    port.map(u16::try_from)
                        .transpose()
                        .map_err(|_| Unsupported::new("original_dst_lb_config.upstream_port_override", "is no port"))?
                }
                Some(_) => return Err(Unsupported::new("lb_config", "is not for type ORIGINAL_DST")),
            };
            Ok((Discovery::OriginalDst { port_override }, None))
        }
    }
}

fn custom_discovery(custom: &pb::cluster::CustomClusterType) -> Result<Found, Unsupported> {
    let any = custom.typed_config.as_ref().ok_or_else(|| Unsupported::missing("typed_config"))?;
    let config: dynamic::ClusterConfig = unpack(any, "typed_config")?;
    match config.cluster_implementation_specifier {
        Some(dynamic::cluster_config::ClusterImplementationSpecifier::DnsCacheConfig(cache)) => {
            let family = family(cache.dns_lookup_family).within("typed_config.dns_cache_config")?;
            Ok((Discovery::DynamicForward { family }, None))
        }
        _ => Err(Unsupported::not_built("typed_config.sub_clusters_config")),
    }
}

fn family(value: i32) -> Result<DnsFamily, Unsupported> {
    use pb::cluster::DnsLookupFamily as Family;
    Ok(match Family::try_from(value) {
        Ok(Family::Auto) => DnsFamily::V6Preferred,
        Ok(Family::V4Only) => DnsFamily::V4Only,
        Ok(Family::V6Only) => DnsFamily::V6Only,
        Ok(Family::V4Preferred) => DnsFamily::V4Preferred,
        Ok(Family::All) => DnsFamily::All,
        Err(_) => return Err(Unsupported::new("dns_lookup_family", "is not known")),
    })
}

fn slow_start(config: Option<pb::cluster::SlowStartConfig>) -> Result<Option<SlowStart>, Unsupported> {
    let Some(mut config) = config else { return Ok(None) };
    let window = optional_duration(config.slow_start_window.take(), "slow_start_window")?.unwrap_or_default();
    let aggression = config.aggression.take().map_or(1.0, |value| value.default_value);
    let min_weight = config.min_weight_percent.take().map_or(0.1, |value| value.value / 100.0);
    nothing_left(&config)?;
    Ok((!window.is_zero()).then_some(SlowStart { window, aggression, min_weight }))
}

fn balancing(proto: &mut pb::Cluster, discovery: &Discovery) -> Result<Balancing, Unsupported> {
    use pb::cluster::{LbConfig, LbPolicy};
    let policy = LbPolicy::try_from(std::mem::take(&mut proto.lb_policy))
        .map_err(|_| Unsupported::new("lb_policy", "is not known"))?;
    let config = proto.lb_config.take();
    if matches!(discovery, Discovery::OriginalDst { .. } | Discovery::DynamicForward { .. }) {
        return match policy {
            LbPolicy::ClusterProvided if config.is_none() => Ok(Balancing::ClusterProvided),
            _ => Err(Unsupported::new("lb_policy", "must be CLUSTER_PROVIDED for this type of cluster")),
        };
    }
    match (policy, config) {
        (LbPolicy::RoundRobin, None) => Ok(Balancing::RoundRobin(None)),
        (LbPolicy::RoundRobin, Some(LbConfig::RoundRobinLbConfig(mut config))) => {
            let slow = slow_start(config.slow_start_config.take()).within("round_robin_lb_config.slow_start_config")?;
            nothing_left(&config).within("round_robin_lb_config")?;
            Ok(Balancing::RoundRobin(slow))
        }
        (LbPolicy::LeastRequest, config) => {
            let mut config = match config {
                None => pb::cluster::LeastRequestLbConfig::default(),
                Some(LbConfig::LeastRequestLbConfig(config)) => config,
                Some(_) => return Err(Unsupported::new("lb_config", "is not for LEAST_REQUEST")),
            };
            let choices = config.choice_count.take().map_or(2, |value| value.value);
            let active_request_bias = config.active_request_bias.take().map_or(1.0, |value| value.default_value);
            let slow_start =
                slow_start(config.slow_start_config.take()).within("least_request_lb_config.slow_start_config")?;
            nothing_left(&config).within("least_request_lb_config")?;
            if choices < 2 {
                return Err(Unsupported::new("least_request_lb_config.choice_count", "must be at least 2"));
            }
            Ok(Balancing::LeastRequest { choices, active_request_bias, slow_start })
        }
        (LbPolicy::Random, None) => Ok(Balancing::Random),
        (LbPolicy::RingHash, config) => {
            let mut config = match config {
                None => pb::cluster::RingHashLbConfig::default(),
                Some(LbConfig::RingHashLbConfig(config)) => config,
                Some(_) => return Err(Unsupported::new("lb_config", "is not for RING_HASH")),
            };
            let minimum = config.minimum_ring_size.take().map_or(1024, |value| value.value);
            let maximum = config.maximum_ring_size.take().map_or(8 << 20, |value| value.value);
            nothing_left(&config).within("ring_hash_lb_config")?;
            if minimum > maximum || maximum > 8 << 20 {
                return Err(Unsupported::new("ring_hash_lb_config.minimum_ring_size", "is above the maximum"));
            }
            Ok(Balancing::RingHash { minimum, maximum })
        }
        (LbPolicy::Maglev, config) => {
            let mut config = match config {
                None => pb::cluster::MaglevLbConfig::default(),
                Some(LbConfig::MaglevLbConfig(config)) => config,
                Some(_) => return Err(Unsupported::new("lb_config", "is not for MAGLEV")),
            };
            let table_size = config.table_size.take().map_or(65_537, |value| value.value);
            nothing_left(&config).within("maglev_lb_config")?;
            if table_size > 5_000_011 || !is_prime(table_size) {
                return Err(Unsupported::new("maglev_lb_config.table_size", "must be a prime of at most 5000011"));
            }
            Ok(Balancing::Maglev { table_size })
        }
        (_, Some(_)) => Err(Unsupported::new("lb_config", "does not fit lb_policy")),
        (LbPolicy::ClusterProvided, None) => Err(Unsupported::new("lb_policy", "CLUSTER_PROVIDED needs ORIGINAL_DST")),
        (LbPolicy::LoadBalancingPolicyConfig, None) => Err(Unsupported::not_built("load_balancing_policy")),
    }
}

fn is_prime(n: u64) -> bool {
    n > 1 && (2..=n.isqrt()).all(|d| !n.is_multiple_of(d))
}

fn common_lb(proto: Option<pb::cluster::CommonLbConfig>) -> Result<LocalityPolicy, Unsupported> {
    use pb::cluster::common_lb_config::LocalityConfigSpecifier as Specifier;
    let Some(mut proto) = proto else { return Ok(LocalityPolicy { weighted: false, panic_threshold: 50.0 }) };
    let panic_threshold = proto.healthy_panic_threshold.take().map_or(50.0, |percent| percent.value);
    let weighted = match proto.locality_config_specifier.take() {
        None => false,
        Some(Specifier::LocalityWeightedLbConfig(_)) => true,
        Some(Specifier::ZoneAwareLbConfig(_)) => return Err(Unsupported::not_built("zone_aware_lb_config")),
    };
    proto.update_merge_window = None;
    // Pools are dropped with their hosts.
    proto.close_connections_on_host_set_change = false;
    nothing_left(&proto)?;
    Ok(LocalityPolicy { weighted, panic_threshold })
}

fn limits(proto: Option<pb::CircuitBreakers>) -> Result<Limits, Unsupported> {
    let Some(mut proto) = proto else { return Ok(Limits::default()) };
    let mut limits = Limits::default();
    for (index, threshold) in std::mem::take(&mut proto.thresholds).into_iter().enumerate() {
        limits = thresholds(threshold).within_item("thresholds", index)?;
    }
    nothing_left(&proto)?;
    Ok(limits)
}

fn thresholds(mut proto: pb::circuit_breakers::Thresholds) -> Result<Limits, Unsupported> {
    let value = |field: Option<UInt32Value>, default| field.map_or(default, |value| value.value);
    let default = Limits::default();
    let retry_budget = proto.retry_budget.take().map(|budget| RetryBudget {
        percent: budget.budget_percent.map_or(20.0, |percent| percent.value),
        min_concurrency: value(budget.min_retry_concurrency, 3),
    });
    let limits = Limits {
        connections_max: value(proto.max_connections.take(), default.connections_max),
        pending_max: value(proto.max_pending_requests.take(), default.pending_max),
        requests_max: value(proto.max_requests.take(), default.requests_max),
        retries_max: value(proto.max_retries.take(), default.retries_max),
        retry_budget,
    };
    proto.track_remaining = false;
    // One pool a worker and key.
    proto.max_connection_pools = None;
    nothing_left(&proto)?;
    Ok(limits)
}

fn transports(proto: &mut pb::Cluster, http: &mut UpstreamHttp) -> Result<Vec<Arc<TransportSocket>>, Unsupported> {
    let mut all = Vec::new();
    let mut push = |name: &str, matches: Option<&Struct>, lowered: tls::Upstream| {
        let mut matches: Vec<_> = matches
            .map(|fields| fields.fields.iter().map(|(key, value)| (key.as_str().into(), json(value))).collect())
            .unwrap_or_default();
        matches.sort_by(|a: &(Box<str>, _), b| a.0.cmp(&b.0));
        http.auto_sni |= lowered.auto_host_sni;
        all.push(Arc::new(TransportSocket {
            name: name.into(),
            matches,
            tls: lowered.tls,
            proxy_protocol: lowered.proxy_protocol,
        }));
    };
    for (index, entry) in std::mem::take(&mut proto.transport_socket_matches).into_iter().enumerate() {
        let socket = entry.transport_socket.as_ref().ok_or_else(|| Unsupported::missing("transport_socket"));
        let lowered = socket.and_then(tls::upstream).within_item("transport_socket_matches", index)?;
        push(&entry.name, entry.r#match.as_ref(), lowered);
    }
    let plain = tls::Upstream { tls: None, proxy_protocol: None, auto_host_sni: false };
    let last = proto.transport_socket.take();
    let lowered = last.as_ref().map(tls::upstream).transpose().within("transport_socket")?.unwrap_or(plain);
    push("", None, lowered);
    Ok(all)
}

/// The HTTP settings, and which statuses outlier detection takes for failures, if they are named.
type HttpOptions = (UpstreamHttp, Option<Box<[u16]>>);

fn http_options(proto: &mut pb::Cluster) -> Result<HttpOptions, Unsupported> {
    let mut http = UpstreamHttp::default();
    {
        if let Some(requests) = proto.max_requests_per_connection.take() {
            http.requests_per_connection_max = Some(requests.value);
        }
        if let Some(options) = proto.http2_protocol_options.take() {
            http.choice = HttpChoice::Http2;
            http2(&mut http, options).within("http2_protocol_options")?;
        }
    }
    let Some(any) = proto.typed_extension_protocol_options.remove(HTTP_OPTIONS) else { return Ok((http, None)) };
    let mut options: upstreams::HttpProtocolOptions = unpack(&any, "typed_extension_protocol_options")?;
    let matcher = options.outlier_detection.take().and_then(|outlier| outlier.error_matcher);
    let failures = matcher.as_ref().map(failures).transpose().within("outlier_detection.error_matcher");
    let failures = failures.within("typed_extension_protocol_options")?;
    typed_http_options(&mut http, options).within("typed_extension_protocol_options")?;
    Ok((http, failures))
}

/// The statuses that a matcher of answers names, one by one.
fn failures(matcher: &MatchPredicate) -> Result<Box<[u16]>, Unsupported> {
    let one = |matcher: &MatchPredicate| {
        let Some(match_predicate::Rule::HttpResponseHeadersMatch(found)) = &matcher.rule else { return None };
        let [header] = found.headers.as_slice() else { return None };
        let exact = match &header.header_match_specifier {
            Some(HeaderMatchSpecifier::StringMatch(text)) => match text.match_pattern.as_ref()? {
                MatchPattern::Exact(exact) => exact,
                _ => return None,
            },
            _ => return None,
        };
        (header.name == ":status" && !header.invert_match).then(|| exact.parse().ok())?
    };
    let all = match &matcher.rule {
        Some(match_predicate::Rule::OrMatch(set)) => set.rules.iter().map(one).collect(),
        _ => one(matcher).map(|status| Box::from([status])),
    };
    all.ok_or_else(|| Unsupported::new("rule", "must name values of :status, one or several"))
}

fn typed_http_options(http: &mut UpstreamHttp, mut options: upstreams::HttpProtocolOptions) -> Result<(), Unsupported> {
    use upstreams::http_protocol_options::{UpstreamProtocolOptions, explicit_http_config::ProtocolConfig};
    if let Some(mut common) = options.common_http_protocol_options.take() {
        if let Some(idle) = optional_duration(common.idle_timeout.take(), "idle_timeout")? {
            http.idle_timeout = (!idle.is_zero()).then_some(idle);
        }
        http.connection_duration_max =
            optional_duration(common.max_connection_duration.take(), "max_connection_duration")?;
        http.requests_per_connection_max = common.max_requests_per_connection.take().map(|value| value.value);
        nothing_left(&common).within("common_http_protocol_options")?;
    }
    if let Some(mut upstream) = options.upstream_http_protocol_options.take() {
        http.auto_sni = std::mem::take(&mut upstream.auto_sni);
        http.auto_san_validation = std::mem::take(&mut upstream.auto_san_validation);
        nothing_left(&upstream).within("upstream_http_protocol_options")?;
    }
    match options.upstream_protocol_options.take() {
        None => {}
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => match explicit.protocol_config {
            None => {}
            Some(ProtocolConfig::HttpProtocolOptions(options)) => {
                http.choice = HttpChoice::Http1;
                http1(options).within("explicit_http_config.http_protocol_options")?;
            }
            Some(ProtocolConfig::Http2ProtocolOptions(options)) => {
                http.choice = HttpChoice::Http2;
                http2(http, options).within("explicit_http_config.http2_protocol_options")?;
            }
            Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                return Err(Unsupported::not_built("explicit_http_config.http3_protocol_options"));
            }
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(mut config)) => {
            http.choice = HttpChoice::Downstream;
            if let Some(options) = config.http_protocol_options.take() {
                http1(options).within("use_downstream_protocol_config.http_protocol_options")?;
            }
            if let Some(options) = config.http2_protocol_options.take() {
                http2(http, options).within("use_downstream_protocol_config.http2_protocol_options")?;
            }
            nothing_left(&config).within("use_downstream_protocol_config")?;
        }
        Some(UpstreamProtocolOptions::AutoConfig(mut config)) => {
            http.choice = HttpChoice::Auto;
            if let Some(options) = config.http_protocol_options.take() {
                http1(options).within("auto_config.http_protocol_options")?;
            }
            if let Some(options) = config.http2_protocol_options.take() {
                http2(http, options).within("auto_config.http2_protocol_options")?;
            }
            nothing_left(&config).within("auto_config")?;
        }
    }
    nothing_left(&options)
}

fn http1(mut options: core::Http1ProtocolOptions) -> Result<(), Unsupported> {
    // Trailers of HTTP/1 are passed on as they are.
    options.enable_trailers = false;
    nothing_left(&options)
}

fn http2(http: &mut UpstreamHttp, mut options: core::Http2ProtocolOptions) -> Result<(), Unsupported> {
    http.concurrent_streams_max = options.max_concurrent_streams.take().map(|value| value.value);
    http.stream_window = options.initial_stream_window_size.take().map(|value| value.value);
    http.connection_window = options.initial_connection_window_size.take().map(|value| value.value);
    if let Some(mut keepalive) = options.connection_keepalive.take() {
        let interval = optional_duration(keepalive.interval.take(), "connection_keepalive.interval")?;
        let timeout = optional_duration(keepalive.timeout.take(), "connection_keepalive.timeout")?;
        keepalive.interval_jitter = None;
        nothing_left(&keepalive).within("connection_keepalive")?;
        // An interval of zero sends none.
        http.keepalive = interval.filter(|interval| !interval.is_zero()).zip(timeout);
    }
    options.override_stream_error_on_invalid_http_message = None;
    nothing_left(&options)
}

fn bind(proto: Option<core::BindConfig>) -> Result<Option<IpAddr>, Unsupported> {
    let Some(mut proto) = proto else { return Ok(None) };
    let address = match proto.source_address.take() {
        None => None,
        Some(source) => Some(source.address.parse().map_err(|_| {
            Unsupported::new("source_address.address", format!("{:?} is not an address", source.address))
        })?),
    };
    // The IPv6 twin of 127.0.0.6 is derived by the proxy from the family of the destination.
    proto.extra_source_addresses.clear();
    proto.additional_source_addresses.clear();
    nothing_left(&proto)?;
    Ok(address)
}

fn connection_options(proto: Option<pb::UpstreamConnectionOptions>) -> Result<Option<Keepalive>, Unsupported> {
    let Some(mut proto) = proto else { return Ok(None) };
    let keepalive = proto.tcp_keepalive.take().map(|keepalive| keepalive_of(&keepalive));
    proto.set_local_interface_name_on_upstream_connections = false;
    nothing_left(&proto).within("upstream_connection_options")?;
    Ok(keepalive)
}

pub(super) fn keepalive_of(proto: &core::TcpKeepalive) -> Keepalive {
    let seconds = |value: Option<UInt32Value>| value.map(|value| Duration::from_secs(value.value.into()));
    Keepalive {
        probes: proto.keepalive_probes.as_ref().map(|value| value.value),
        time: seconds(proto.keepalive_time),
        interval: seconds(proto.keepalive_interval),
    }
}

/// Whether `istio.metadata_exchange` is among the upstream filters; nothing else may be.
fn upstream_filters(filters: Vec<pb::Filter>) -> Result<bool, Unsupported> {
    let mut found = false;
    for (index, filter) in filters.into_iter().enumerate() {
        let any = filter.typed_config.as_ref().ok_or_else(|| Unsupported::missing("typed_config"));
        let name = any.and_then(super::network::metadata_exchange).within_item("filters", index)?;
        found |= name.is_some();
        if name.is_none() {
            return Err(Unsupported::not_built(format!("filters[{index}] {:?}", filter.name)));
        }
    }
    Ok(found)
}

fn istio_value<'a>(metadata: Option<&'a core::Metadata>, key: &str) -> Option<&'a Kind> {
    metadata?.filter_metadata.get("istio")?.fields.get(key)?.kind.as_ref()
}

fn services(metadata: Option<&core::Metadata>) -> Vec<ServiceRef> {
    let Some(Kind::ListValue(list)) = istio_value(metadata, "services") else { return Vec::new() };
    let mut all = Vec::new();
    for value in &list.values {
        if let Some(Kind::StructValue(fields)) = &value.kind {
            let text = |key: &str| match fields.fields.get(key).and_then(|value| value.kind.as_ref()) {
                Some(Kind::StringValue(text)) => text.as_str().into(),
                _ => "".into(),
            };
            all.push(ServiceRef { host: text("host"), name: text("name"), namespace: text("namespace") });
        }
    }
    all
}
