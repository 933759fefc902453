//! A traffic policy on a cluster: balancing, pools, outliers, protocols.
//!
//! *Source*: `docs/parity.md`, Traffic 3.3 to 3.5.

use api::networking as net;
use envoy_types::pb::envoy::config::cluster::v3::{
    CircuitBreakers, Cluster, OutlierDetection, UpstreamConnectionOptions, circuit_breakers, cluster,
};
use envoy_types::pb::envoy::config::common::matcher::v3::{HttpHeadersMatch, MatchPredicate, match_predicate};
use envoy_types::pb::envoy::config::core::v3::{
    Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions as CommonOptions, KeepaliveSettings,
    RoutingPriority, RuntimeDouble,
};
use envoy_types::pb::envoy::config::route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::{HttpProtocolOptions, http_protocol_options as http};
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::UInt64Value;
use mesh::Protocol;

use super::{Outbound, client_protocol, keep_alive};
use crate::context::Context;
use crate::locality;
use crate::security::matchers;
use crate::wire::{self, boolean, uint};

/// A limit that nothing reaches.
const UNLIMITED: u32 = u32::MAX;

fn limit(value: u32) -> u32 {
    if value == 0 { UNLIMITED } else { value }
}

/// One threshold with all four limits.
pub(super) fn circuit_breakers(
    pool: Option<&net::ConnectionPoolSettings>,
    budget: Option<&net::RetryBudget>,
) -> CircuitBreakers {
    let tcp = pool.and_then(|pool| pool.tcp.as_ref());
    let http = pool.and_then(|pool| pool.http.as_ref());
    let of_http = |pick: fn(&net::HttpPoolSettings) -> u32| uint(limit(http.map_or(0, pick)));
    CircuitBreakers {
        thresholds: vec![circuit_breakers::Thresholds {
            priority: RoutingPriority::Default.into(),
            max_connections: uint(limit(tcp.map_or(0, |tcp| tcp.max_connections))),
            max_pending_requests: of_http(|http| http.http1_max_pending_requests),
            max_requests: of_http(|http| http.http2_max_requests),
            max_retries: of_http(|http| http.max_retries),
            retry_budget: budget.map(|budget| circuit_breakers::thresholds::RetryBudget {
                budget_percent: Some(Percent { value: budget.percent.unwrap_or(20.0) }),
                min_retry_concurrency: uint(if budget.min_retry_concurrency == 0 {
                    3
                } else {
                    budget.min_retry_concurrency
                }),
                budget_interval: budget.budget_interval.and_then(|of| wire::duration(of.0)),
            }),
            ..circuit_breakers::Thresholds::default()
        }],
        ..CircuitBreakers::default()
    }
}

/// Pool, outliers and balancing of an outbound cluster.
pub(super) fn apply(context: &Context<'_>, of: &Outbound<'_>, cluster: &mut Cluster, balances: bool) {
    let policy = &of.policy;
    if let Some(mesh_keepalive) = &context.snapshot.mesh_config().tcp_keepalive {
        set_keep_alive(cluster, mesh_keepalive);
    }
    if policy.connection_pool.is_some() || policy.retry_budget.is_some() {
        let empty = net::ConnectionPoolSettings::default();
        let pool = policy.connection_pool.as_ref().unwrap_or(&empty);
        apply_pool(pool, policy.retry_budget.as_ref(), cluster);
    }
    if let Some(settings) = &policy.outlier_detection {
        cluster.outlier_detection = Some(outliers(settings));
        if settings.min_health_percent > 0
            && let Some(common) = &mut cluster.common_lb_config
        {
            common.healthy_panic_threshold = Some(Percent { value: f64::from(settings.min_health_percent) });
        }
    }
    if balances {
        balance(policy.load_balancer.as_ref(), cluster);
        if locality::weighs_localities(context, of)
            && let Some(common) = &mut cluster.common_lb_config
        {
            common.locality_config_specifier =
                Some(cluster::common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(
                    cluster::common_lb_config::LocalityWeightedLbConfig {},
                ));
        }
    }
}

/// Limits and the connect timeout.
pub(super) fn apply_pool(pool: &net::ConnectionPoolSettings, budget: Option<&net::RetryBudget>, cluster: &mut Cluster) {
    cluster.circuit_breakers = Some(circuit_breakers(Some(pool), budget));
    let Some(tcp) = &pool.tcp else {
        return;
    };
    if let Some(timeout) = tcp.connect_timeout {
        cluster.connect_timeout = wire::duration(timeout.0);
    }
    if let Some(settings) = &tcp.tcp_keepalive {
        set_keep_alive(cluster, settings);
    }
}

/// What is set replaces what the mesh said, field by field.
fn set_keep_alive(cluster: &mut Cluster, settings: &net::TcpKeepalive) {
    let new = keep_alive(settings);
    let options = cluster.upstream_connection_options.get_or_insert_with(UpstreamConnectionOptions::default);
    let base = options.tcp_keepalive.take().unwrap_or_default();
    options.tcp_keepalive = Some(envoy_types::pb::envoy::config::core::v3::TcpKeepalive {
        keepalive_probes: new.keepalive_probes.or(base.keepalive_probes),
        keepalive_time: new.keepalive_time.or(base.keepalive_time),
        keepalive_interval: new.keepalive_interval.or(base.keepalive_interval),
    });
}

fn outliers(settings: &net::OutlierDetection) -> OutlierDetection {
    let mut of = OutlierDetection {
        // Statistics over all hosts never eject.
        enforcing_success_rate: uint(0),
        interval: settings.interval.and_then(|d| wire::duration(d.0)),
        base_ejection_time: settings.base_ejection_time.and_then(|d| wire::duration(d.0)),
        max_ejection_percent: settings
            .max_ejection_percent
            .and_then(|percent| u32::try_from(percent).ok())
            .filter(|percent| *percent > 0)
            .and_then(uint),
        // The share alone would keep the only bad one of a few pods in.
        always_eject_one_host: boolean(true),
        ..OutlierDetection::default()
    };
    let count_5xx =
        settings.consecutive_5xx_errors.or_else(|| settings.consecutive_errors.and_then(|n| u32::try_from(n).ok()));
    if let Some(count) = count_5xx {
        of.consecutive_5xx = uint(if count > 0 { count } else { 5 });
        // 0 switches this counter off.
        of.enforcing_consecutive_5xx = uint(if count > 0 { 100 } else { 0 });
        if count == 0 {
            of.consecutive_5xx = uint(0);
        }
    }
    if let Some(count) = settings.consecutive_gateway_errors {
        of.consecutive_gateway_failure = uint(count);
        of.enforcing_consecutive_gateway_failure = uint(if count > 0 { 100 } else { 0 });
    }
    if settings.split_external_local_origin_errors {
        of.split_external_local_origin_errors = true;
        if let Some(count) = settings.consecutive_local_origin_failures {
            of.consecutive_local_origin_failure = uint(count);
            of.enforcing_consecutive_local_origin_failure = uint(if count > 0 { 100 } else { 0 });
        }
        of.enforcing_local_origin_success_rate = uint(0);
    }
    of
}

fn balance(settings: Option<&net::LoadBalancerSettings>, cluster: &mut Cluster) {
    if let Some(hash) = settings.and_then(|lb| lb.consistent_hash.as_ref()) {
        if let Some(maglev) = &hash.maglev {
            cluster.lb_policy = cluster::LbPolicy::Maglev.into();
            cluster.lb_config = maglev.table_size.map(|size| {
                cluster::LbConfig::MaglevLbConfig(cluster::MaglevLbConfig {
                    table_size: Some(UInt64Value { value: size }),
                })
            });
        } else {
            let size = hash
                .ring_hash
                .as_ref()
                .and_then(|ring| ring.minimum_ring_size)
                .or(hash.minimum_ring_size)
                .unwrap_or(1024);
            cluster.lb_policy = cluster::LbPolicy::RingHash.into();
            cluster.lb_config = Some(cluster::LbConfig::RingHashLbConfig(cluster::RingHashLbConfig {
                minimum_ring_size: Some(UInt64Value { value: size }),
                ..cluster::RingHashLbConfig::default()
            }));
        }
        return;
    }
    let simple = settings.and_then(|lb| lb.simple).unwrap_or_default();
    let warmup = settings.and_then(slow_start);
    match simple {
        net::SimpleLb::Random => cluster.lb_policy = cluster::LbPolicy::Random.into(),
        net::SimpleLb::RoundRobin => {
            cluster.lb_policy = cluster::LbPolicy::RoundRobin.into();
            cluster.lb_config = warmup.map(|slow_start| {
                cluster::LbConfig::RoundRobinLbConfig(cluster::RoundRobinLbConfig {
                    slow_start_config: Some(slow_start),
                })
            });
        }
        net::SimpleLb::Unspecified
        | net::SimpleLb::LeastConn
        | net::SimpleLb::LeastRequest
        | net::SimpleLb::Passthrough => {
            cluster.lb_policy = cluster::LbPolicy::LeastRequest.into();
            cluster.lb_config = warmup.map(|slow_start| {
                cluster::LbConfig::LeastRequestLbConfig(cluster::LeastRequestLbConfig {
                    slow_start_config: Some(slow_start),
                    ..cluster::LeastRequestLbConfig::default()
                })
            });
        }
    }
}

fn slow_start(lb: &net::LoadBalancerSettings) -> Option<cluster::SlowStartConfig> {
    if let Some(warmup) = &lb.warmup {
        return Some(cluster::SlowStartConfig {
            slow_start_window: warmup.duration.and_then(|d| wire::duration(d.0)),
            aggression: warmup.aggression.map(|value| RuntimeDouble { default_value: value, runtime_key: "(".into() }),
            min_weight_percent: Some(Percent { value: warmup.minimum_percent.unwrap_or(10.0) }),
        });
    }
    let window = lb.warmup_duration_secs?;
    Some(cluster::SlowStartConfig {
        slow_start_window: wire::duration(window.0),
        ..cluster::SlowStartConfig::default()
    })
}

/// What upstream connections of an outbound cluster speak; `None`: HTTP/1.1 with nothing special.
pub(super) fn http_options(context: &Context<'_>, of: &Outbound<'_>) -> Option<HttpProtocolOptions> {
    let pool = of.policy.connection_pool.as_ref();
    let protocol = of.port.protocol;
    let http = pool.and_then(|pool| pool.http.as_ref());
    if of.service.resolution == mesh::Resolution::DynamicDns && !protocol.is_http2() {
        return common_only(pool);
    }
    let wanted = http.and_then(|http| http.h2_upgrade_policy).unwrap_or_default();
    let mesh_wanted = context.snapshot.mesh_config().h2_upgrade_policy.unwrap_or_default();
    let upgrades = protocol.is_http()
        && match wanted {
            net::H2UpgradePolicy::Default => mesh_wanted == net::H2UpgradePolicy::Upgrade,
            net::H2UpgradePolicy::DoNotUpgrade => false,
            net::H2UpgradePolicy::Upgrade => true,
        };
    let follows_client =
        http.is_some_and(|http| http.use_client_protocol) || (protocol.is_auto() && context.is_sidecar());
    let speaks_http2 = protocol.is_http2() || upgrades;
    let mut options = options(speaks_http2, follows_client && !speaks_http2, pool);
    let codes =
        of.policy.outlier_detection.as_ref().map(|outlier| outlier.outlier_detection_http_error_codes.as_slice());
    if let Some(codes) = codes.filter(|codes| !codes.is_empty()) {
        options
            .get_or_insert_with(|| HttpProtocolOptions {
                upstream_protocol_options: Some(explicit_http1()),
                ..HttpProtocolOptions::default()
            })
            .outlier_detection = Some(http::OutlierDetection { error_matcher: Some(any_status(codes)) });
    }
    options
}

/// Matches answers of these statuses.
fn any_status(codes: &[u32]) -> MatchPredicate {
    let one = |code: &u32| MatchPredicate {
        rule: Some(match_predicate::Rule::HttpResponseHeadersMatch(HttpHeadersMatch {
            headers: vec![HeaderMatcher {
                name: ":status".into(),
                header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(matchers::exact(&code.to_string()))),
                ..HeaderMatcher::default()
            }],
        })),
    };
    match codes {
        [code] => one(code),
        codes => MatchPredicate {
            rule: Some(match_predicate::Rule::OrMatch(match_predicate::MatchSet {
                rules: codes.iter().map(one).collect(),
            })),
        },
    }
}

fn common_only(pool: Option<&net::ConnectionPoolSettings>) -> Option<HttpProtocolOptions> {
    options(false, false, pool)
}

/// The same for the local workload: HTTP/2 where declared, the client's protocol where found out.
pub(super) fn inbound_http_options(
    protocol: Protocol,
    pool: Option<&net::ConnectionPoolSettings>,
) -> Option<HttpProtocolOptions> {
    options(protocol.is_http2(), protocol.is_auto(), pool)
}

fn options(
    speaks_http2: bool,
    follows_client: bool,
    pool: Option<&net::ConnectionPoolSettings>,
) -> Option<HttpProtocolOptions> {
    let http = pool.and_then(|pool| pool.http.as_ref());
    let common = pool.and_then(common_options);
    if !speaks_http2 && !follows_client && common.is_none() {
        return None;
    }
    let upstream = if speaks_http2 {
        explicit(http::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(http2(http)))
    } else if follows_client {
        client_protocol()
    } else {
        explicit_http1()
    };
    Some(HttpProtocolOptions {
        common_http_protocol_options: common,
        upstream_protocol_options: Some(upstream),
        ..HttpProtocolOptions::default()
    })
}

fn explicit(config: http::explicit_http_config::ProtocolConfig) -> http::UpstreamProtocolOptions {
    http::UpstreamProtocolOptions::ExplicitHttpConfig(http::ExplicitHttpConfig { protocol_config: Some(config) })
}

/// HTTP/1.1, said explicitly.
pub(super) fn explicit_http1() -> http::UpstreamProtocolOptions {
    explicit(http::explicit_http_config::ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default()))
}

fn http2(http: Option<&net::HttpPoolSettings>) -> Http2ProtocolOptions {
    let streams = http.map_or(0, |http| http.max_concurrent_streams);
    let keepalive = http.and_then(|http| http.http2_keep_alive.as_ref());
    Http2ProtocolOptions {
        max_concurrent_streams: if streams > 0 { uint(streams) } else { None },
        connection_keepalive: keepalive.map(|of| KeepaliveSettings {
            interval: of.interval.and_then(|d| wire::duration(d.0)),
            timeout: of.timeout.and_then(|d| wire::duration(d.0)),
            ..KeepaliveSettings::default()
        }),
        ..Http2ProtocolOptions::default()
    }
}

fn common_options(pool: &net::ConnectionPoolSettings) -> Option<CommonOptions> {
    let http = pool.http.as_ref();
    let tcp = pool.tcp.as_ref();
    let idle = http.and_then(|http| http.idle_timeout).or_else(|| tcp.and_then(|tcp| tcp.idle_timeout));
    let duration = tcp.and_then(|tcp| tcp.max_connection_duration);
    let requests = http.map_or(0, |http| http.max_requests_per_connection);
    let streams = http.map_or(0, |http| http.max_concurrent_streams);
    if idle.is_none() && duration.is_none() && requests == 0 && streams == 0 {
        return None;
    }
    Some(CommonOptions {
        idle_timeout: idle.and_then(|d| wire::duration(d.0)),
        max_connection_duration: duration.and_then(|d| wire::duration(d.0)),
        max_requests_per_connection: if requests > 0 { uint(requests) } else { None },
        ..CommonOptions::default()
    })
}
