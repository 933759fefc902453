//! What a bootstrap says of the server itself, beside its resources.
//!
//! What Istio's bootstrap sets is taken, with a warning by name where it has no effect; what would let
//! traffic behave otherwise is refused.
//!
//! *Source*: Envoy 1.40, `envoy.config.bootstrap.v3`; Istio's `envoy_bootstrap.json`.
#![expect(deprecated, reason = "older fields are told apart from those that are not known")]

use std::net::SocketAddr;

use engine::lower::{nothing_left, socket_address};
use engine::unsupported::{Unsupported, Within, unpack};
use envoy_types::pb::envoy::config::accesslog::v3::{AccessLog, access_log};
use envoy_types::pb::envoy::config::bootstrap::v3::runtime_layer::LayerSpecifier;
use envoy_types::pb::envoy::config::bootstrap::v3::{Admin, ClusterManager, LayeredRuntime};
use envoy_types::pb::envoy::config::core::v3::address::Address;
use envoy_types::pb::envoy::config::overload::v3::{OverloadManager, ResourceMonitor, resource_monitor};
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::FileAccessLog;
use envoy_types::pb::envoy::extensions::resource_monitors::downstream_connections::v3::DownstreamConnectionsConfig;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value as StructValue};
use prost::Name as _;
use serde_json::Value;

/// Says that a field has no effect here.
fn without_effect(field: &str) {
    tracing::warn!(field, "a field of the bootstrap has no effect");
}

/// Where the admin interface listens; `None`: there is none.
pub(super) fn admin(mut proto: Admin) -> Result<Option<SocketAddr>, Unsupported> {
    let address = proto.address.take();
    if let Some(Address::SocketAddress(socket)) = address.as_ref().and_then(|address| address.address.as_ref())
        && socket.port_specifier.is_none()
    {
        return Err(Unsupported::missing("address.socket_address.port_value"));
    }
    let address = address.as_ref().map(socket_address).transpose().within("address")?;
    let logs = std::mem::take(&mut proto.access_log);
    let path = std::mem::take(&mut proto.access_log_path);
    if !logs.iter().all(is_to_nowhere) || !matches!(path.as_str(), "" | NOWHERE) {
        without_effect("admin.access_log");
    }
    proto.profile_path.clear();
    proto.ignore_global_conn_limit = false;
    nothing_left(&proto)?;
    Ok(address)
}

const NOWHERE: &str = "/dev/null";

fn is_to_nowhere(log: &AccessLog) -> bool {
    let Some(access_log::ConfigType::TypedConfig(any)) = &log.config_type else { return false };
    unpack::<FileAccessLog>(any, "").is_ok_and(|file| file.path == NOWHERE)
}

/// Flags that mean nothing here, or say what we do anyway. Others are not known.
fn takes_runtime(key: &str, value: &StructValue) -> bool {
    let is = |wanted: bool| match &value.kind {
        Some(Kind::BoolValue(value)) => *value == wanted,
        Some(Kind::StringValue(text)) => *text == wanted.to_string(),
        _ => false,
    };
    let number = match &value.kind {
        Some(Kind::NumberValue(number)) => Some(*number),
        Some(Kind::StringValue(text)) => text.parse().ok(),
        _ => None,
    };
    match key {
        "envoy.reloadable_features.http_reject_path_with_fragment" => is(false),
        // no limit; one would have to be kept
        "overload.global_downstream_max_connections" => number.is_some_and(|number| number >= f64::from(i32::MAX)),
        // our expressions have a bound of their own
        "re2.max_program_size.error_level"
        | "re2.max_program_size.warn_level"
        // memory, the order of work inside, and clients of Envoy's own
        | "envoy.reloadable_features.fixed_heap_use_allocated"
        | "envoy.reloadable_features.coalesce_lb_rebuilds_on_batch_update"
        | "envoy.reloadable_features.google_grpc_disable_tls_13" => true,
        // what is deprecated is taken or refused by its own name, whoever allows it
        key => key.starts_with("envoy.deprecated_features:") || key.starts_with("envoy.deprecated_features."),
    }
}

/// Values that Envoy's runtime would read: they change what fractions and features of the configuration mean.
pub(super) fn layered_runtime(proto: LayeredRuntime) -> Result<(), Unsupported> {
    for (index, layer) in proto.layers.into_iter().enumerate() {
        let refused = match layer.layer_specifier {
            Some(LayerSpecifier::StaticLayer(values)) => static_layer("", &values).within("static_layer"),
            // empty until somebody sets a value by the admin interface, which we do not let them
            Some(LayerSpecifier::AdminLayer(_)) => Ok(()),
            Some(LayerSpecifier::DiskLayer(_)) => Err(Unsupported::not_built("disk_layer")),
            Some(LayerSpecifier::RtdsLayer(_)) => Err(Unsupported::not_built("rtds_layer")),
            None => Err(Unsupported::missing("layer_specifier")),
        };
        refused.within_item("layers", index)?;
    }
    Ok(())
}

/// A layer's values; a struct inside is a prefix of what is in it.
fn static_layer(prefix: &str, values: &Struct) -> Result<(), Unsupported> {
    let mut all: Vec<_> = values.fields.iter().collect();
    all.sort_by_key(|(key, _)| *key);
    for (key, value) in all {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match &value.kind {
            Some(Kind::StructValue(inner)) => static_layer(&key, inner)?,
            _ if takes_runtime(&key, value) => {}
            _ => return Err(Unsupported::not_built(key)),
        }
    }
    Ok(())
}

/// Monitors alone do nothing; what they would set off, and the one that limits by itself, is not built.
pub(super) fn overload_manager(mut proto: OverloadManager) -> Result<(), Unsupported> {
    proto.refresh_interval = None;
    for (index, monitor) in std::mem::take(&mut proto.resource_monitors).into_iter().enumerate() {
        resource_monitor(&monitor).within_item("resource_monitors", index)?;
    }
    nothing_left(&proto)
}

fn resource_monitor(proto: &ResourceMonitor) -> Result<(), Unsupported> {
    let Some(resource_monitor::ConfigType::TypedConfig(any)) = &proto.config_type else { return Ok(()) };
    if any.type_url != DownstreamConnectionsConfig::type_url() {
        return Ok(());
    }
    let config: DownstreamConnectionsConfig = unpack(any, "typed_config")?;
    if config.max_active_downstream_connections < i64::from(i32::MAX) {
        return Err(Unsupported::not_built("typed_config.max_active_downstream_connections"));
    }
    Ok(())
}

pub(super) fn cluster_manager(mut proto: ClusterManager) -> Result<(), Unsupported> {
    if proto.outlier_detection.take().is_some() {
        without_effect("cluster_manager.outlier_detection");
    }
    proto.enable_deferred_cluster_creation = false;
    nothing_left(&proto)
}

/// *Errors*: another prefix than the one of all names that we know.
pub(super) fn header_prefix(json: &Value) -> Result<(), Unsupported> {
    match json.as_str() {
        Some("" | "x-envoy") => Ok(()),
        _ => Err(Unsupported::not_built("header_prefix")),
    }
}

/// *Errors*: another interface than Envoy's default.
pub(super) fn socket_interface(json: &Value) -> Result<(), Unsupported> {
    match json.as_str() {
        Some("" | "envoy.extensions.network.socket_interface.default_socket_interface") => Ok(()),
        _ => Err(Unsupported::not_built("default_socket_interface")),
    }
}

/// Extensions that Istio's bootstrap names: where one is used, the use is refused by its own name.
const EXTENSIONS: [&str; 2] = ["envoy.bootstrap.internal_listener", "metadata_discovery"];

pub(super) fn extensions(json: &Value) -> Result<(), Unsupported> {
    for (index, extension) in json.as_array().into_iter().flatten().enumerate() {
        let name = extension.get("name").and_then(Value::as_str).unwrap_or_default();
        if !EXTENSIONS.contains(&name) {
            return Err(Unsupported::not_built(format!("bootstrap_extensions[{index}] {name:?}")));
        }
        without_effect(&format!("bootstrap_extensions[{index}] {name:?}"));
    }
    Ok(())
}

/// *Errors*: none; spans go where a connection manager's own provider says.
#[expect(clippy::unnecessary_wraps, reason = "one of a table of checks")]
pub(super) fn tracing(_: &Value) -> Result<(), Unsupported> {
    without_effect("tracing");
    Ok(())
}
