//! The bootstrap files that both proxies run: what Istio's control plane sends, as static resources.
//!
//! The filters are those that `compile` emits for an Envoy without Istio's own ones: tokens of an
//! issuer (asked for, not brought), authorization policies, gRPC statistics, fault, CORS, router;
//! Istio's access-log line; the product's retry policy on every route; limits of connections and
//! requests, ejection of failing hosts; sampling of traces at 1 % without a collector.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};

use crate::pki::Identity;

/// Istio's default line.
const LOG_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
\"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% \
%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

/// ALPNs of HTTP between two sidecars.
const MESH_HTTP: [&str; 3] = ["istio-http/1.0", "istio-http/1.1", "istio-h2"];

/// Which way a connection manager looks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Gateway,
    Outbound,
    Inbound,
}

/// Which filters a connection manager has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Filters {
    /// Those that both proxies know.
    Common,
    /// Istio's metadata exchange, ALPN and statistics too: what a sidecar of Lateen's really runs.
    Istio,
}

/// What an upstream speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Upstream {
    Http1,
    Http2,
}

/// One proxy's place: where it listens, where its admin interface is, where it sends requests, and
/// where its access log goes.
pub(crate) struct Place<'a> {
    pub(crate) listen: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) upstream: SocketAddr,
    pub(crate) log: &'a Path,
    pub(crate) filters: Filters,
}

fn typed(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/{kind}").into();
    json!({ "name": name, "typed_config": config })
}

fn address(of: SocketAddr) -> Value {
    json!({ "socket_address": { "address": of.ip().to_string(), "port_value": of.port() } })
}

/// An issuer whose tokens are verified where a request brings one; those of the load bring none.
fn tokens() -> Value {
    // the key of the example in RFC 7517, A.1
    let keys = json!({ "keys": [{ "kty": "EC", "crv": "P-256", "kid": "1", "alg": "ES256", "use": "sig",
        "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM" }] });
    let issuer = "https://issuer.bench.test";
    let requirements = json!([{ "provider_name": "origins-0" }, { "allow_missing": {} }]);
    let config = json!({
        "providers": { "origins-0": {
            "issuer": issuer, "payload_in_metadata": issuer, "local_jwks": { "inline_string": keys.to_string() },
        } },
        "rules": [{ "match": { "prefix": "/" }, "requires": { "requires_any": { "requirements": requirements } } }],
    });
    typed("envoy.filters.http.jwt_authn", "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", config)
}

/// Policies that have to be looked at and let the load pass: a DENY by path, an ALLOW by method and
/// path; inbound also by principal.
fn policies(direction: Direction) -> Vec<Value> {
    let header = |name: &str, value: &str| json!({ "header": { "name": name, "string_match": { "exact": value } } });
    let path = |prefix: &str| json!({ "url_path": { "path": { "prefix": prefix } } });
    let and = |rules: Vec<Value>| json!({ "and_rules": { "rules": rules } });
    let principal = if direction == Direction::Inbound {
        json!({ "authenticated": { "principal_name": { "prefix": "spiffe://cluster.local/ns/default/" } } })
    } else {
        json!({ "any": true })
    };
    let deny = json!({ "rules": { "action": "DENY", "policies": { "ns[default]-policy[no-admin]-rule[0]": {
        "permissions": [and(vec![path("/admin")])],
        "principals": [{ "and_ids": { "ids": [{ "any": true }] } }],
    } } } });
    let methods = json!({ "or_rules": { "rules": [header(":method", "GET"), header(":method", "POST")] } });
    let allow = json!({ "rules": { "action": "ALLOW", "policies": { "ns[default]-policy[callers]-rule[0]": {
        "permissions": [and(vec![methods, json!({ "or_rules": { "rules": [path("/api/"), path("/bench.")] } })])],
        "principals": [{ "and_ids": { "ids": [principal] } }],
    } } } });
    let rbac = |name: &str, config| typed(name, "envoy.extensions.filters.http.rbac.v3.RBAC", config);
    vec![rbac("envoy.filters.http.rbac", deny), rbac("envoy.filters.http.rbac.allow", allow)]
}

/// One of Istio's own, wrapped as Istio wraps it.
fn istio(name: &str, kind: &str, value: Value) -> Value {
    let wrapped = json!({ "type_url": format!("type.googleapis.com/{kind}"), "value": value });
    typed(name, "udpa.type.v1.TypedStruct", wrapped)
}

fn metadata_exchange(direction: Direction) -> Value {
    let headers = json!([{ "istio_headers": {} }]);
    let config = match direction {
        Direction::Inbound => json!({ "downstream_discovery": headers, "downstream_propagation": headers }),
        _ => json!({ "upstream_discovery": headers, "upstream_propagation": headers }),
    };
    istio("istio.metadata_exchange", "io.istio.http.peer_metadata.Config", config)
}

fn alpn() -> Value {
    let of = |protocol: &str, alpn: [&str; 3]| json!({ "upstream_protocol": protocol, "alpn_override": alpn });
    let overrides = json!({ "alpn_override": [
        of("HTTP10", ["istio-http/1.0", "istio", "http/1.0"]),
        of("HTTP11", ["istio-http/1.1", "istio", "http/1.1"]),
        of("HTTP2", ["istio-h2", "istio", "h2"]),
    ] });
    istio("istio.alpn", "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig", overrides)
}

fn http_filters(direction: Direction, of: Filters) -> Vec<Value> {
    let own = of == Filters::Istio;
    let mut filters = Vec::new();
    if own {
        filters.push(metadata_exchange(direction));
    }
    if direction != Direction::Outbound {
        filters.push(tokens());
    }
    filters.extend(policies(direction));
    filters.push(typed(
        "envoy.filters.http.grpc_stats",
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
        json!({ "emit_filter_state": true, "stats_for_all_methods": false }),
    ));
    if own && direction != Direction::Inbound {
        filters.push(alpn());
    }
    filters.extend([
        typed("envoy.filters.http.fault", "envoy.extensions.filters.http.fault.v3.HTTPFault", json!({})),
        typed("envoy.filters.http.cors", "envoy.extensions.filters.http.cors.v3.Cors", json!({})),
    ]);
    if own {
        filters.push(istio("istio.stats", "stats.PluginConfig", json!({})));
    }
    filters.push(typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({})));
    filters
}

/// Other hosts and other paths stand before the one that is called.
fn routes(direction: Direction, cluster: &str) -> Value {
    let to = |name: &str, matched: Value| {
        let mut route = json!({ "cluster": cluster, "timeout": "0s" });
        if direction == Direction::Inbound {
            route["max_stream_duration"] = json!({ "max_stream_duration": "0s", "grpc_timeout_header_max": "0s" });
        } else {
            route["max_grpc_timeout"] = "0s".into();
            route["retry_policy"] = json!({
                "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
                "num_retries": 2,
                "retry_host_predicate": [typed(
                    "envoy.retry_host_predicates.previous_hosts",
                    "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
                    json!({}),
                )],
                "host_selection_retry_max_attempts": "5",
            });
        }
        json!({
            "name": name, "match": matched, "route": route,
            "decorator": { "operation": "reviews.default.svc.cluster.local:9080/*" },
        })
    };
    if direction == Direction::Inbound {
        return json!({ "name": "inbound|9080||", "validate_clusters": false, "virtual_hosts": [{
            "name": "inbound|http|9080", "domains": ["*"], "routes": [to("default", json!({ "prefix": "/" }))],
        }] });
    }
    let other = |host: &str| {
        json!({ "name": format!("{host}:9080"), "domains": [host, format!("{host}:9080")], "include_request_attempt_count": true,
            "routes": [to("default", json!({ "prefix": "/" }))] })
    };
    let jason = json!({ "prefix": "/", "headers": [{ "name": "end-user", "string_match": { "exact": "jason" } }] });
    json!({ "name": "9080", "validate_clusters": false, "virtual_hosts": [
        other("details.default.svc.cluster.local"),
        other("ratings.default.svc.cluster.local"),
        { "name": "reviews.default.svc.cluster.local:9080",
          "domains": ["reviews.default.svc.cluster.local", "reviews", "reviews.default", "*.bench.test"],
          "include_request_attempt_count": true,
          "routes": [
              to("jason", jason),
              to("health", json!({ "path": "/health" })),
              to("api", json!({ "prefix": "/" })),
          ] },
    ] })
}

fn manager(direction: Direction, cluster: &str, place: &Place<'_>) -> Value {
    let is_gateway = direction == Direction::Gateway;
    let percent = |value: u32| json!({ "value": value });
    let mut config = json!({
        "stat_prefix": match direction {
            Direction::Gateway => "outbound_0.0.0.0_8080",
            Direction::Outbound => "outbound_0.0.0.0_9080",
            Direction::Inbound => "inbound_0.0.0.0_9080",
        },
        "route_config": routes(direction, cluster),
        "http_filters": http_filters(direction, place.filters),
        "tracing": {
            "client_sampling": percent(100), "random_sampling": percent(1), "overall_sampling": percent(100),
        },
        "stream_idle_timeout": if is_gateway { "3600s" } else { "0s" },
        "access_log": [typed(
            "envoy.access_loggers.file",
            "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            json!({ "path": place.log, "log_format": { "text_format_source": { "inline_string": LOG_FORMAT } } }),
        )],
        "use_remote_address": is_gateway,
        "proxy_100_continue": true,
        "upgrade_configs": [{ "upgrade_type": "websocket" }],
        "normalize_path": true,
        "request_id_extension": { "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
            "use_request_id_for_trace_sampling": true,
        } },
    });
    match direction {
        Direction::Gateway => {
            config["server_name"] = "istio-envoy".into();
            config["request_headers_timeout"] = "60s".into();
            config["forward_client_cert_details"] = "SANITIZE_SET".into();
            config["set_current_client_cert_details"] =
                json!({ "subject": true, "cert": true, "dns": true, "uri": true });
        }
        Direction::Inbound => {
            config["server_name"] = "istio-envoy".into();
            config["forward_client_cert_details"] = "APPEND_FORWARD".into();
            config["set_current_client_cert_details"] = json!({ "subject": true, "dns": true, "uri": true });
        }
        Direction::Outbound => {}
    }
    typed(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        config,
    )
}

fn cluster(name: &str, upstream: SocketAddr, protocol: Upstream, transport: Option<Value>) -> Value {
    let options = match protocol {
        Upstream::Http1 => json!({ "explicit_http_config": { "http_protocol_options": {} } }),
        Upstream::Http2 => json!({ "explicit_http_config": { "http2_protocol_options": {} } }),
    };
    let many = 100_000;
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": { "thresholds": [{
            "max_connections": many, "max_pending_requests": many, "max_requests": many, "max_retries": many,
        }] },
        "outlier_detection": { "consecutive_5xx": 5, "enforcing_success_rate": 0, "interval": "10s", "base_ejection_time": "30s" },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions":
                typed("", "envoy.extensions.upstreams.http.v3.HttpProtocolOptions", options)["typed_config"],
        },
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [{
            "endpoint": { "address": address(upstream) },
        }] }] },
    });
    if let Some(transport) = transport {
        cluster["transport_socket"] = transport;
    }
    cluster
}

/// Certificate, trust and names of mutual TLS in the mesh.
fn common_tls(identity: &Identity, alpn: &[&str], peer: Option<&str>) -> Value {
    let mut validation = json!({ "trusted_ca": { "inline_string": identity.roots } });
    if let Some(peer) = peer {
        validation["match_typed_subject_alt_names"] = json!([{ "san_type": "URI", "matcher": { "exact": peer } }]);
    }
    json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": alpn,
        "tls_certificates": [{
            "certificate_chain": { "inline_string": identity.chain },
            "private_key": { "inline_string": identity.key },
        }],
        "validation_context": validation,
    })
}

fn whole(place: &Place<'_>, name: &str, listener: Value, cluster: &Value) -> String {
    let mut listener = listener;
    listener["name"] = name.into();
    listener["address"] = address(place.listen);
    let file = json!({
        "node": {
            "id": format!("sidecar~10.1.1.1~{name}-5f7d8c9b6d-x2x4z.default~default.svc.cluster.local"),
            "cluster": "bench",
            "metadata": {
                "NAME": format!("{name}-5f7d8c9b6d-x2x4z"), "NAMESPACE": "default", "WORKLOAD_NAME": name,
                "CLUSTER_ID": "Kubernetes", "SERVICE_ACCOUNT": "bench",
                "LABELS": { "app": name, "version": "v1", "service.istio.io/canonical-name": name },
            },
        },
        "admin": { "address": address(place.admin) },
        "static_resources": { "listeners": [listener], "clusters": [cluster] },
    });
    file.to_string()
}

/// A gateway: plaintext in, plaintext out.
pub(crate) fn gateway(place: &Place<'_>, protocol: Upstream) -> String {
    let name = "outbound|9080||reviews.default.svc.cluster.local";
    let listener = json!({ "filter_chains": [{ "filters": [manager(Direction::Gateway, name, place)] }] });
    whole(place, "gateway", listener, &cluster(name, place.upstream, protocol, None))
}

/// The client's sidecar: plaintext in, mutual TLS out.
pub(crate) fn outbound(place: &Place<'_>, own: &Identity, peer: &Identity) -> String {
    let name = "outbound|9080||reviews.default.svc.cluster.local";
    let transport = typed(
        "envoy.transport_sockets.tls",
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        json!({
            "common_tls_context": common_tls(own, &["istio-http/1.1", "istio", "http/1.1"], Some(&peer.id)),
            "sni": "outbound_.9080_._.reviews.default.svc.cluster.local",
        }),
    );
    let listener = json!({ "filter_chains": [{ "filters": [manager(Direction::Outbound, name, place)] }] });
    whole(place, "outbound", listener, &cluster(name, place.upstream, Upstream::Http1, Some(transport)))
}

/// The server's sidecar, permissive: mutual TLS or plaintext in, told apart by the inspectors; plaintext out.
pub(crate) fn inbound(place: &Place<'_>, own: &Identity) -> String {
    let name = "inbound|9080||";
    let transport = typed(
        "envoy.transport_sockets.tls",
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        json!({
            "common_tls_context": common_tls(own, &["istio-h2", "istio-http/1.1", "istio-http/1.0"], None),
            "require_client_certificate": true,
        }),
    );
    let inspector = |kind: &str| {
        let message = if kind == "tls" { "TlsInspector" } else { "HttpInspector" };
        typed(
            &format!("envoy.filters.listener.{kind}_inspector"),
            &format!("envoy.extensions.filters.listener.{kind}_inspector.v3.{message}"),
            json!({}),
        )
    };
    let listener = json!({
        "traffic_direction": "INBOUND",
        "listener_filters": [inspector("tls"), inspector("http")],
        "listener_filters_timeout": "0s",
        "continue_on_listener_filters_timeout": true,
        "filter_chains": [
            {
                "name": "0.0.0.0_9080_tls",
                "filter_chain_match": { "transport_protocol": "tls", "application_protocols": MESH_HTTP },
                "transport_socket": transport,
                "filters": [manager(Direction::Inbound, name, place)],
            },
            {
                "name": "0.0.0.0_9080",
                "filter_chain_match": { "transport_protocol": "raw_buffer", "application_protocols": ["http/1.1", "h2c"] },
                "filters": [manager(Direction::Inbound, name, place)],
            },
        ],
    });
    whole(place, "inbound", listener, &cluster(name, place.upstream, Upstream::Http1, None))
}
