use envoy_types::pb::envoy::config::cluster::v3 as wire;
use prost::Message as _;

use serde_json::{Value, json};

use super::*;

fn raw(name: &str, connect_seconds: i64) -> Raw {
    let cluster = wire::Cluster {
        name: name.to_owned(),
        connect_timeout: Some(envoy_types::pb::google::protobuf::Duration { seconds: connect_seconds, nanos: 0 }),
        ..wire::Cluster::default()
    };
    let type_url = types::wellknown::type_urls::CLUSTER.to_owned();
    Raw { name: name.into(), body: Any { type_url, value: cluster.encode_to_vec() } }
}

#[test]
fn what_is_removed_and_comes_again_is_there() {
    let (first, rejected) = apply_clusters(&Table::default(), &[raw("same", 1), raw("other", 1), raw("gone", 1)], &[]);
    assert_eq!(rejected, []);
    let removed = ["same", "other", "gone"].map(Name::from);
    let (next, rejected) = apply_clusters(&first, &[raw("same", 1), raw("other", 2)], &removed);
    assert_eq!(rejected, []);
    assert!(Arc::ptr_eq(next.get("same").unwrap(), first.get("same").unwrap()), "unchanged is the same");
    assert!(!Arc::ptr_eq(next.get("other").unwrap(), first.get("other").unwrap()));
    assert!(next.get("gone").is_none());
}

#[test]
fn the_last_of_two_namesakes_stays() {
    let (first, _) = apply_clusters(&Table::default(), &[raw("a", 1)], &[]);
    let (next, _) = apply_clusters(&first, &[raw("a", 2), raw("a", 1)], &[]);
    assert!(Arc::ptr_eq(next.get("a").unwrap(), first.get("a").unwrap()));
}

/// Merges `more` into `base`, field by field.
fn with(mut base: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().into_iter().flatten() {
        match base.get_mut(key) {
            Some(known) if known.is_object() && value.is_object() => *known = with(known.take(), value),
            _ => base[key] = value.clone(),
        }
    }
    base
}

fn typed(kind: &str, config: &Value) -> Value {
    json!({ "name": "x", "typed_config": with(json!({ "@type": format!("type.googleapis.com/{kind}") }), config) })
}

const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";
const HCM: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const GRPC_STATS: &str = "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig";
const ZIPKIN: &str = "envoy.config.trace.v3.ZipkinConfig";

/// A listener of one connection manager; `more` is merged into it.
fn manager(more: &Value) -> Value {
    let base = json!({ "stat_prefix": "x", "route_config": {}, "http_filters": [typed(ROUTER, &json!({}))] });
    listener(&json!({ "filter_chains": [{ "filters": [typed(HCM, &with(base, more))] }] }))
}

fn listener(more: &Value) -> Value {
    let address = json!({ "socket_address": { "address": "127.0.0.1", "port_value": 1 } });
    let tcp =
        typed("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", &json!({ "stat_prefix": "x", "cluster": "x" }));
    with(json!({ "name": "x", "address": address, "filter_chains": [{ "filters": [tcp] }] }), more)
}

/// A connection manager whose spans go to Zipkin as `more` says.
fn zipkin(more: &Value) -> Value {
    let base =
        json!({ "collector_cluster": "c", "collector_endpoint": "/", "collector_endpoint_version": "HTTP_JSON" });
    manager(&json!({ "tracing": { "provider": typed(ZIPKIN, &with(base, more)) } }))
}

/// A listener of a TCP proxy and this network filter.
fn network(kind: &str, config: &Value) -> Value {
    let filter = typed(kind, &with(json!({ "stat_prefix": "x" }), config));
    let mut listener = listener(&json!({}));
    listener["filter_chains"][0]["filters"].as_array_mut().unwrap().insert(0, filter);
    listener
}

fn mongo(more: &Value) -> Value {
    network("envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy", more)
}

fn network_policy(more: &Value) -> Value {
    network("envoy.extensions.filters.network.rbac.v3.RBAC", more)
}

/// A listener of one HTTP filter before the router.
fn http_filter(kind: &str, config: &Value) -> Value {
    manager(&json!({ "http_filters": [typed(kind, config), typed(ROUTER, &json!({}))] }))
}

/// Tokens of an issuer whose keys `source` gives.
fn tokens(source: Value) -> Value {
    let issuer = with(json!({ "issuer": "me" }), &source);
    http_filter(
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        &json!({ "providers": { "origins-0": issuer } }),
    )
}

/// Istio's metrics, the settings written as `google.protobuf.Struct` or as themselves.
fn metrics(config: &Value, as_struct: bool) -> Value {
    let kind = "stats.PluginConfig";
    if !as_struct {
        return http_filter(kind, config);
    }
    let typed = json!({ "type_url": format!("type.googleapis.com/{kind}"), "value": config });
    http_filter("udpa.type.v1.TypedStruct", &typed)
}

fn inspector(kind: &str, more: &Value) -> Value {
    let kind = format!("envoy.extensions.filters.listener.{kind}");
    listener(&json!({ "listener_filters": [typed(&kind, more)] }))
}

fn access_log(format: &Value) -> Value {
    let log = typed(
        "envoy.extensions.access_loggers.file.v3.FileAccessLog",
        &json!({ "path": "/a", "log_format": with(json!({ "text_format_source": { "inline_string": "a" } }), format) }),
    );
    manager(&json!({ "access_log": [log] }))
}

fn rds(source: &Value) -> Value {
    let mut listener = manager(&json!({ "rds": { "route_config_name": "r", "config_source": source } }));
    let config = &mut listener["filter_chains"][0]["filters"][0]["typed_config"];
    config.as_object_mut().unwrap().remove("route_config");
    listener
}

fn request_id(more: &Value) -> Value {
    let extension = typed("envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig", more);
    manager(&json!({ "request_id_extension": { "typed_config": extension["typed_config"] } }))
}

fn eds(source: &Value) -> Value {
    json!({ "name": "x", "type": "EDS", "eds_cluster_config": { "eds_config": source } })
}

/// Why a listener, or else a cluster, is refused.
fn refusal(json: &Value) -> Option<String> {
    let is_listener = json.get("address").is_some();
    let (kind, type_url) = if is_listener {
        ("envoy.config.listener.v3.Listener", types::wellknown::type_urls::LISTENER)
    } else {
        ("envoy.config.cluster.v3.Cluster", types::wellknown::type_urls::CLUSTER)
    };
    let value = proto::json::from_json(kind, json.clone()).unwrap();
    let raw = [Raw { name: "x".into(), body: Any { type_url: type_url.to_owned(), value } }];
    let rejected = if is_listener {
        apply_listeners(&Table::default(), &raw, &[]).1
    } else {
        apply_clusters(&Table::default(), &raw, &[]).1
    };
    rejected.into_iter().next().map(|bad| bad.reason)
}

/// Fields by which Envoy 1.40 would behave as we do not.
#[test]
fn what_is_not_built_is_refused_by_its_path() {
    let rest = json!({ "api_config_source": { "api_type": "REST", "cluster_names": ["c"], "refresh_delay": "1s" } });
    let other = json!({ "api_config_source": { "api_type": "GRPC", "grpc_services": [{ "envoy_grpc": { "cluster_name": "c" } }] } });
    let header = json!({ "header": { "key": "a", "value": "b" } });
    let service = |more: &Value| {
        zipkin(
            &json!({ "collector_service": with(json!({ "http_uri": { "uri": "http://a/", "cluster": "c", "timeout": "1s" } }), more) }),
        )
    };
    for (resource, path) in [
        (rds(&rest), "rds.config_source.api_config_source is not supported"),
        (rds(&other), "rds.config_source.api_config_source"),
        (rds(&json!({ "path_config_source": { "path": "/a" } })), "rds.config_source.path_config_source"),
        (rds(&json!({ "self": {} })), "rds.config_source.self"),
        (eds(&rest), "eds_cluster_config.eds_config.api_config_source"),
        (eds(&other), "eds_cluster_config.eds_config.api_config_source"),
        (eds(&json!({ "path": "/a" })), "eds_cluster_config.eds_config.path"),
        (zipkin(&json!({ "split_spans_for_request": true })), "tracing.provider.typed_config.split_spans_for_request"),
        (
            zipkin(&json!({ "collector_endpoint_version": "HTTP_PROTO" })),
            "typed_config.collector_endpoint_version HTTP_PROTO",
        ),
        (
            zipkin(&json!({ "collector_endpoint_version": "DEPRECATED_AND_UNAVAILABLE_DO_NOT_USE" })),
            "typed_config.collector_endpoint_version",
        ),
        (zipkin(&json!({ "timestamp_trace_ids": true })), "typed_config.timestamp_trace_ids"),
        (
            service(&json!({ "request_headers_to_add": [header] })),
            "typed_config.collector_service.request_headers_to_add",
        ),
        (
            manager(&json!({ "http_filters": [typed(ROUTER, &json!({ "start_child_span": true }))] })),
            "http_filters[0] \"x\".start_child_span",
        ),
        (
            manager(&json!({ "access_log_options": { "flush_access_log_on_new_request": true } })),
            "access_log_options.flush_access_log_on_new_request",
        ),
        (
            manager(&json!({ "stream_error_on_invalid_http_message": true })),
            "typed_config.stream_error_on_invalid_http_message",
        ),
        (
            inspector("tls_inspector.v3.TlsInspector", &json!({ "enable_ja3_fingerprinting": true })),
            "listener_filters[0].typed_config.enable_ja3_fingerprinting",
        ),
        (
            inspector(
                "tls_inspector.v3.TlsInspector",
                &json!({ "close_connection_on_client_hello_parsing_errors": true }),
            ),
            "listener_filters[0].typed_config.close_connection_on_client_hello_parsing_errors",
        ),
        (
            http_filter(GRPC_STATS, &json!({ "enable_upstream_stats": true })),
            "http_filters[0] \"x\".enable_upstream_stats",
        ),
        (mongo(&json!({ "emit_dynamic_metadata": true })), "filters[0].typed_config.emit_dynamic_metadata"),
        (mongo(&json!({ "access_log": "/a" })), "filters[0].typed_config.access_log"),
        (
            mongo(&json!({ "delay": { "fixed_delay": "1s", "percentage": { "numerator": 100 } } })),
            "filters[0].typed_config.delay",
        ),
        (
            listener(&json!({ "filter_chains": [{ "filters": [typed(
                "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                &json!({ "stat_prefix": "x", "cluster": "x", "tunneling_config": { "hostname": "a:1" } }),
            )] }] })),
            "filters[0].typed_config.tunneling_config",
        ),
        (
            network_policy(&json!({ "enforcement_type": "CONTINUOUS" })),
            "filters[0].typed_config.enforcement_type CONTINUOUS is not supported",
        ),
        (
            tokens(
                json!({ "remote_jwks": { "http_uri": { "uri": "https://id/keys", "cluster": "c", "timeout": "1s" } } }),
            ),
            "http_filters[0] \"x\".providers[origins-0].remote_jwks is not supported",
        ),
        (
            http_filter(
                "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
                &json!({
                    "grpc_service": { "envoy_grpc": { "cluster_name": "c" } },
                    "enable_dynamic_metadata_ingestion": false,
                }),
            ),
            "http_filters[0] \"x\".enable_dynamic_metadata_ingestion is not supported",
        ),
        (metrics(&json!({ "reporter": "SERVER_GATEWAY" }), false), "http_filters[0] \"x\".reporter"),
        (metrics(&json!({ "reporter": "SERVER_GATEWAY" }), true), "http_filters[0] \"x\".reporter"),
        (
            access_log(&json!({ "formatters": [typed("envoy.extensions.filters.http.router.v3.Router", &json!({}))] })),
            "access_log[0].typed_config.log_format.formatters[0]",
        ),
    ] {
        let said = refusal(&resource).unwrap_or_else(|| panic!("taken: {resource}"));
        assert!(said.contains(path), "{path}: {said}");
    }
}

/// What Istio's control plane sends, or what says what we do anyway.
#[test]
fn what_istio_sends_is_taken() {
    let ads = json!({ "ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3" });
    for resource in [
        rds(&ads),
        rds(&json!({})),
        eds(&ads),
        zipkin(&json!({ "shared_span_context": false, "trace_id_128bit": true })),
        zipkin(
            &json!({ "collector_service": { "http_uri": { "uri": "http://a:1/b", "cluster": "c", "timeout": "5s" } } }),
        ),
        request_id(&json!({ "use_request_id_for_trace_sampling": true })),
        request_id(&json!({ "pack_trace_reason": false, "use_request_id_for_trace_sampling": false })),
        manager(&json!({ "access_log_options": {}, "stream_error_on_invalid_http_message": false })),
        inspector(
            "tls_inspector.v3.TlsInspector",
            &json!({ "initial_read_buffer_size": 512, "enable_ja3_fingerprinting": false }),
        ),
        inspector("http_inspector.v3.HttpInspector", &json!({})),
        inspector("original_dst.v3.OriginalDst", &json!({})),
        mongo(&json!({ "commands": ["find"] })),
        network_policy(&json!({ "enforcement_type": "ONE_TIME_ON_FIRST_BYTE" })),
        tokens(json!({ "local_jwks": { "inline_string": "{}" } })),
        metrics(&json!({ "metrics": [{ "name": "requests_total", "drop": true }] }), false),
        metrics(&json!({ "metrics": [{ "name": "requests_total", "drop": true }] }), true),
        manager(&json!({ "proxy_100_continue": true })),
        json!({ "name": "x", "type": "STRICT_DNS", "dns_jitter": "1s", "respect_dns_ttl": true }),
    ] {
        assert_eq!(refusal(&resource), None, "{resource}");
    }
}
