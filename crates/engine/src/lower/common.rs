//! What several kinds of resources share.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::{Any, Struct, Value as ProtoValue, value::Kind};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::record::Provenance;
use crate::unsupported::Unsupported;

/// Tells one version of a resource from another.
pub(super) fn fingerprint(any: &Any) -> u64 {
    xxhash_rust::xxh64::xxh64(&any.value, 0)
}

/// Refuses a message of which a field is still set after everything known was taken.
///
/// *Errors*: the first such field.
pub fn nothing_left<M: Default + PartialEq + std::fmt::Debug>(rest: &M) -> Result<(), Unsupported> {
    let default = M::default();
    if *rest == default {
        return Ok(());
    }
    Err(Unsupported::not_built(first_difference(&format!("{rest:#?}"), &format!("{default:#?}"))))
}

/// The first top-level field in which two pretty debug texts of one struct differ.
fn first_difference(left: &str, right: &str) -> String {
    fn fields(text: &str) -> Vec<(&str, Vec<&str>)> {
        let mut all: Vec<(&str, Vec<&str>)> = Vec::new();
        for line in text.lines() {
            let name = line.strip_prefix("    ").filter(|rest| !rest.starts_with([' ', '}', ']', ')']));
            match (name.and_then(|rest| rest.split_once(':')), all.last_mut()) {
                (Some((name, value)), _) => all.push((name, vec![value])),
                (None, Some((_, lines))) => lines.push(line),
                (None, None) => {}
            }
        }
        all
    }
    let (left, right) = (fields(left), fields(right));
    let differing = left.iter().zip(&right).find(|(a, b)| a != b);
    differing.map_or("some field", |((name, _), _)| name.trim_start_matches("r#")).to_owned()
}

/// `google.protobuf.Value` as JSON.
pub(crate) fn json(value: &ProtoValue) -> Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(b)) => Value::Bool(*b),
        Some(Kind::NumberValue(n)) => serde_json::Number::from_f64(*n).map_or(Value::Null, Value::Number),
        Some(Kind::StringValue(s)) => Value::String(s.clone()),
        Some(Kind::ListValue(list)) => Value::Array(list.values.iter().map(json).collect()),
        Some(Kind::StructValue(fields)) => json_struct(fields),
    }
}

/// `google.protobuf.Struct` as JSON, keys sorted.
pub(crate) fn json_struct(fields: &Struct) -> Value {
    let mut keys: Vec<_> = fields.fields.iter().collect();
    keys.sort_by_key(|(key, _)| *key);
    Value::Object(keys.into_iter().map(|(key, value)| (key.clone(), json(value))).collect())
}

/// A text inside `filter_metadata`.
pub(super) fn metadata_text<'a>(metadata: Option<&'a core::Metadata>, filter: &str, key: &str) -> Option<&'a str> {
    match &metadata?.filter_metadata.get(filter)?.fields.get(key)?.kind {
        Some(Kind::StringValue(text)) => Some(text),
        _ => None,
    }
}

/// The objects a resource's metadata names.
pub(super) fn provenance(metadata: Option<&core::Metadata>) -> Arc<Provenance> {
    let istio_config = metadata_text(metadata, "istio", "config").unwrap_or_default().into();
    let lateen = metadata
        .and_then(|metadata| metadata.filter_metadata.get("lateen"))
        .map(|fields| json_struct(fields).to_string())
        .unwrap_or_default();
    Arc::new(Provenance { istio_config, lateen: lateen.into() })
}

/// Where resources come from, if that is the stream that everything comes by: nobody asks another one, and who
/// waits for it would wait for ever. (What files give comes as if by the stream.)
///
/// *Errors*: another source.
pub fn config_source(proto: &core::ConfigSource) -> Result<(), Unsupported> {
    use core::config_source::ConfigSourceSpecifier as Source;
    match &proto.config_source_specifier {
        None | Some(Source::Ads(_)) => {}
        #[expect(deprecated, reason = "the older way to name a file")]
        Some(Source::Path(_)) => return Err(Unsupported::not_built("path")),
        Some(Source::PathConfigSource(_)) => return Err(Unsupported::not_built("path_config_source")),
        Some(Source::ApiConfigSource(_)) => return Err(Unsupported::not_built("api_config_source")),
        Some(Source::Self_(_)) => return Err(Unsupported::not_built("self")),
    }
    if !proto.authorities.is_empty() {
        return Err(Unsupported::not_built("authorities"));
    }
    Ok(())
}

/// An IP address with a numeric port.
pub fn socket_address(address: &core::Address) -> Result<SocketAddr, Unsupported> {
    let socket = tcp_address(address)?;
    let ip: IpAddr = socket.address.parse().map_err(|_| {
        Unsupported::new("socket_address.address", format!("{:?} is not an IP address", socket.address))
    })?;
    Ok(SocketAddr::new(ip, port(socket)?))
}

/// The TCP form of an address.
pub(super) fn tcp_address(address: &core::Address) -> Result<&core::SocketAddress, Unsupported> {
    match &address.address {
        Some(core::address::Address::SocketAddress(socket)) if socket.protocol == 0 => Ok(socket),
        Some(core::address::Address::SocketAddress(_)) => Err(Unsupported::not_built("socket_address.protocol")),
        Some(core::address::Address::Pipe(_)) => Err(Unsupported::not_built("pipe")),
        Some(core::address::Address::EnvoyInternalAddress(_)) => Err(Unsupported::not_built("envoy_internal_address")),
        None => Err(Unsupported::missing("address")),
    }
}

/// The numeric port.
pub(super) fn port(socket: &core::SocketAddress) -> Result<u16, Unsupported> {
    match &socket.port_specifier {
        Some(core::socket_address::PortSpecifier::PortValue(port)) => {
            u16::try_from(*port).map_err(|_| Unsupported::new("port_value", format!("{port} is not a port")))
        }
        Some(core::socket_address::PortSpecifier::NamedPort(_)) => Err(Unsupported::not_built("named_port")),
        None => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_left_is_named() {
        let bind = core::BindConfig { validate_network_namespaces: true, ..Default::default() };
        assert_eq!(nothing_left(&bind).unwrap_err().path, "validate_network_namespaces");
        let keepalive = core::KeepaliveSettings {
            interval_jitter: Some(envoy_types::pb::envoy::r#type::v3::Percent { value: 1.0 }),
            ..Default::default()
        };
        assert_eq!(nothing_left(&keepalive).unwrap_err().path, "interval_jitter");
        assert!(nothing_left(&core::BindConfig::default()).is_ok());
    }
}
