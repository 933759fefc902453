//! The bootstrap of an Envoy beside the agent.

use std::net::SocketAddr;
use std::path::Path;

use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use proto::json::to_json;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use types::wellknown::marks;

use super::Places;
use crate::options::Options;

const SOL_SOCKET: u32 = 1;
const SO_MARK: u32 = 36;

/// The whole document. Clusters `xds-grpc` and `sds-grpc` are what resources of the control plane
/// refer to; `initial_fetch_timeout` 0 keeps an Envoy without configuration from being ready.
pub(super) fn document(options: &Options, admin: SocketAddr, places: &Places) -> Value {
    let mut document = json!({
        "node": node(options),
        "admin": { "address": address(admin) },
        "dynamic_resources": {
            "ads_config": {
                "api_type": if options.state_of_the_world { "GRPC" } else { "DELTA_GRPC" },
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "xds-grpc" } }],
            },
            "cds_config": from_ads(),
            "lds_config": from_ads(),
        },
        // As Istio documents it: a fragment is cut off, not refused, and a failed connection says why.
        "layered_runtime": { "layers": [{ "name": "istio", "static_layer": {
            "envoy.reloadable_features.http_reject_path_with_fragment": false,
            "envoy.reloadable_features.hide_transport_failure_reason_in_response_body": false,
        } }] },
        "static_resources": {
            "clusters": [socket("xds-grpc", &places.xds), socket("sds-grpc", &places.sds)],
        },
    });
    if may_mark() {
        document["cluster_manager"] = json!({ "upstream_bind_config": { "socket_options": [{
            "description": "out of the pod's redirect rules",
            "level": SOL_SOCKET, "name": SO_MARK, "int_value": marks::PROXY, "state": "STATE_PREBIND",
        }] } });
    }
    if let Some(metrics) = options.addresses.metrics {
        let resources = &mut document["static_resources"];
        resources["listeners"] = json!([metrics_listener(metrics)]);
        if let Some(clusters) = resources["clusters"].as_array_mut() {
            clusters.push(cluster("prometheus_stats", &address(admin), false));
        }
    }
    document
}

/// Our node without what an Envoy says for itself: program, version, extensions.
fn node(options: &Options) -> Value {
    let mut node = options.node.clone();
    node.user_agent_name.clear();
    node.user_agent_version_type = None;
    node.extensions.clear();
    let any = Any { type_url: "type.googleapis.com/envoy.config.core.v3.Node".into(), value: node.encode_to_vec() };
    let mut node = to_json(&any);
    if let Value::Object(fields) = &mut node {
        fields.remove("@type");
    }
    node
}

fn from_ads() -> Value {
    json!({ "ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s" })
}

fn address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } })
}

/// gRPC over a socket of the agent's.
fn socket(name: &str, path: &Path) -> Value {
    cluster(name, &json!({ "pipe": { "path": path } }), true)
}

fn cluster(name: &str, address: &Value, http2: bool) -> Value {
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address } }] }],
        },
    });
    if http2 {
        cluster["typed_extension_protocol_options"] = json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": { "http2_protocol_options": {} },
        } });
    }
    cluster
}

/// `/stats/prometheus` of the admin interface, for the world.
fn metrics_listener(at: SocketAddr) -> Value {
    json!({
        "name": "prometheus",
        "address": address(at),
        "filter_chains": [{ "filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "stats",
                "route_config": { "virtual_hosts": [{
                    "name": "metrics",
                    "domains": ["*"],
                    "routes": [{ "match": { "path": "/stats/prometheus" }, "route": { "cluster": "prometheus_stats" } }],
                }] },
                "http_filters": [{
                    "name": "envoy.filters.http.router",
                    "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
                }],
            },
        }] }],
    })
}

/// Whether sockets may be marked here. Without the right nothing is captured either.
fn may_mark() -> bool {
    Socket::new(Domain::IPV4, Type::STREAM, None).and_then(|socket| socket.set_mark(marks::PROXY)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use crate::options::Role;

    #[test]
    fn an_envoy_speaks_for_itself_and_waits_for_its_configuration() {
        let variables: BTreeMap<String, String> = [
            ("POD_NAME", "a-1"),
            ("POD_NAMESPACE", "shop"),
            ("INSTANCE_IP", "10.77.0.5"),
            ("ISTIO_DELTA_XDS", "false"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let options = Options::from_environment(Role::Sidecar, &variables, |_| None).unwrap();
        let document = document(&options, "127.0.0.1:15000".parse().unwrap(), &Places::default());
        assert_eq!(document["node"]["id"], "sidecar~10.77.0.5~a-1.shop~shop.svc.cluster.local");
        assert_eq!(document["node"]["metadata"]["NAMESPACE"], "shop");
        // What we can is not what it can.
        assert!(document["node"].get("extensions").is_none() && document["node"].get("user_agent_name").is_none());
        assert_eq!(document["dynamic_resources"]["ads_config"]["api_type"], "GRPC");
        assert_eq!(document["dynamic_resources"]["lds_config"]["initial_fetch_timeout"], "0s");
        let names = ["xds-grpc", "sds-grpc", "prometheus_stats"];
        let clusters = document["static_resources"]["clusters"].as_array().unwrap();
        assert_eq!(clusters.iter().map(|cluster| cluster["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
    }
}
