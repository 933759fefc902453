//! Small builders of messages that everything here needs.
//!
//! prost gives map fields hash maps, whose bytes would differ from run to run. [`stable_map`] makes
//! small ones whose order is that of their keys; larger ones are written by messages of our own
//! (`security::wire`, [`NameTable`]).

#![expect(clippy::unnecessary_wraps, reason = "messages hold wrapped values in options, and so do the builders")]

use std::collections::{BTreeMap, HashMap};
use std::time::Duration as StdDuration;

use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, Metadata, SocketAddress, TransportSocket, address,
    config_source, socket_address, transport_socket,
};
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration, ListValue, Struct, UInt32Value, Value, value::Kind};
use mesh::Provenance;
use prost::{Message, Name};
pub(crate) use proto::any::pack;
use types::ObjectRef;

/// `google.protobuf.BoolValue`
pub(crate) fn boolean(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

/// `google.protobuf.UInt32Value`
pub(crate) fn uint(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

/// `google.protobuf.Duration`
pub(crate) fn duration(of: StdDuration) -> Option<Duration> {
    Some(Duration {
        seconds: i64::try_from(of.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(of.subsec_nanos()).unwrap_or_default(),
    })
}

/// `0s`, present.
pub(crate) fn zero() -> Option<Duration> {
    Some(Duration { seconds: 0, nanos: 0 })
}

/// Whole seconds.
pub(crate) fn seconds(count: u64) -> Option<Duration> {
    duration(StdDuration::from_secs(count))
}

/// A map that iterates in the order of its keys, so that its bytes are always the same.
///
/// Each new `HashMap` hashes differently; one is taken whose order happens to be right, and clones
/// keep it. That is quick for the handful of entries that metadata has.
pub(crate) fn stable_map<V: Clone>(entries: Vec<(String, V)>) -> HashMap<String, V> {
    debug_assert!(entries.len() <= 6, "a larger map needs a message of its own");
    let mut sorted = entries;
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    for _ in 0..100_000 {
        let map: HashMap<String, V> = sorted.iter().cloned().collect();
        if map.keys().eq(sorted.iter().map(|(key, _)| key)) {
            return map;
        }
    }
    sorted.into_iter().collect()
}

/// A text value.
pub(crate) fn text(of: impl Into<String>) -> Value {
    Value { kind: Some(Kind::StringValue(of.into())) }
}

/// A list value.
pub(crate) fn list(values: Vec<Value>) -> Value {
    Value { kind: Some(Kind::ListValue(ListValue { values })) }
}

/// A struct with few fields.
pub(crate) fn fields(entries: Vec<(&str, Value)>) -> Struct {
    Struct { fields: stable_map(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()) }
}

/// A struct as a value.
pub(crate) fn object(entries: Vec<(&str, Value)>) -> Value {
    Value { kind: Some(Kind::StructValue(fields(entries))) }
}

/// Filter metadata with few filters, each with few fields. Filters without fields are left out.
pub(crate) fn metadata(entries: Vec<(&str, Vec<(&str, Value)>)>) -> Option<Metadata> {
    let filters: Vec<_> = entries
        .into_iter()
        .filter(|(_, of)| !of.is_empty())
        .map(|(filter, of)| (filter.to_owned(), fields(of)))
        .collect();
    if filters.is_empty() {
        return None;
    }
    Some(Metadata { filter_metadata: stable_map(filters), ..Metadata::default() })
}

/// The path under which Istio's tools know an object.
pub(crate) fn config_path(of: &ObjectRef) -> String {
    let kind = match &*of.kind {
        "VirtualService" => "virtual-service",
        "DestinationRule" => "destination-rule",
        "Sidecar" => "sidecar",
        "ServiceEntry" => "service-entry",
        "Gateway" => "gateway",
        other => other,
    };
    format!("/apis/networking.istio.io/v1/namespaces/{}/{kind}/{}", of.namespace, of.name)
}

/// The full list of what said something, for `filter_metadata.lateen`: `objects`, each as
/// `Kind namespace/name field`.
pub(crate) fn provenance(of: &[Provenance]) -> Vec<(&'static str, Value)> {
    if of.is_empty() {
        return Vec::new();
    }
    let texts = of.iter().map(|source| {
        let object = &source.object;
        if source.field.is_empty() { text(object.to_string()) } else { text(format!("{object} {}", source.field)) }
    });
    vec![("objects", list(texts.collect()))]
}

/// Metadata of a route or chain that objects decided: the first one for Istio's tools, all for ours.
pub(crate) fn provenance_metadata(of: &[Provenance]) -> Option<Metadata> {
    let first = of.first()?;
    metadata(vec![("istio", vec![("config", text(config_path(&first.object)))]), ("lateen", provenance(of))])
}

/// Configuration that comes over the same stream.
pub(crate) fn ads() -> ConfigSource {
    ConfigSource {
        initial_fetch_timeout: zero(),
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(config_source::ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    }
}

/// `address:port`
pub(crate) fn socket_address(host: &str, port: u16) -> Address {
    Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: host.to_owned(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(u32::from(port))),
            ..SocketAddress::default()
        })),
    }
}

/// A transport socket by its extension's name.
pub(crate) fn transport_socket<M: Name>(name: &str, config: &M) -> TransportSocket {
    TransportSocket {
        name: name.to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(pack(config))),
    }
}

/// `udpa.type.v1.TypedStruct`, in which Istio wraps settings of its own filters, with its fields in order.
#[derive(Clone, PartialEq, Message)]
struct TypedStruct {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Struct>,
}

/// Settings of a filter of Istio's own build as a typed struct.
pub(crate) fn typed_struct(type_url: &str, value: Struct) -> Any {
    Any {
        type_url: "type.googleapis.com/udpa.type.v1.TypedStruct".into(),
        value: TypedStruct { type_url: type_url.into(), value: Some(value) }.encode_to_vec(),
    }
}

/// `istio.networking.nds.v1.NameTable`, with its names in order.
#[derive(Clone, PartialEq, Message)]
pub struct NameTable {
    /// By fully qualified name.
    #[prost(btree_map = "string, message", tag = "1")]
    pub table: BTreeMap<String, proto::nds::name_table::NameInfo>,
}

impl NameTable {
    /// With Istio's type URL.
    pub fn pack(&self) -> Any {
        Any { type_url: types::wellknown::type_urls::NAME_TABLE.into(), value: self.encode_to_vec() }
    }
}

/// `envoy.extensions.access_loggers.file.v3.FileAccessLog`, with JSON keys in order.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct FileAccessLog {
    #[prost(string, tag = "1")]
    pub(crate) path: String,
    #[prost(message, optional, tag = "5")]
    pub(crate) log_format: Option<SubstitutionFormat>,
}

/// `envoy.config.core.v3.SubstitutionFormatString`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SubstitutionFormat {
    #[prost(message, optional, tag = "2")]
    pub(crate) json_format: Option<OrderedStruct>,
    #[prost(message, optional, tag = "5")]
    pub(crate) text_format_source: Option<envoy_types::pb::envoy::config::core::v3::DataSource>,
    #[prost(bool, tag = "3")]
    pub(crate) omit_empty_values: bool,
    #[prost(message, optional, tag = "7")]
    pub(crate) json_format_options: Option<envoy_types::pb::envoy::config::core::v3::JsonFormatOptions>,
}

/// `google.protobuf.Struct`, with fields in order.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct OrderedStruct {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(crate) fields: BTreeMap<String, Value>,
}

impl FileAccessLog {
    /// With Envoy's type URL.
    pub(crate) fn pack(&self) -> Any {
        Any {
            type_url: "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog".into(),
            value: self.encode_to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_maps_are_in_order_and_stay_so() {
        for _ in 0..20 {
            let map =
                stable_map(vec![("b".into(), 1), ("d".into(), 2), ("a".into(), 3), ("c".into(), 4), ("e".into(), 5)]);
            assert_eq!(map.keys().map(String::as_str).collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
            assert_eq!(map.clone().keys().map(String::as_str).collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
        }
    }
}
