//! Envoy's messages by reflection: canonical JSON in and out.
//!
//! Read on first use: a proxy that nobody asks for a dump never pays for it.

use std::sync::OnceLock;

use base64::Engine as _;
use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, SerializeOptions};
use serde_json::{Value, json};

static SET: &[u8] = include_bytes!("../descriptors/envoy.binpb");

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| DescriptorPool::decode(SET).expect("the set is part of the program and tested"))
}

/// A message of type `name` from its JSON. Unknown fields are errors.
///
/// *Errors*: what does not fit, with its path as far as the decoder tells it.
pub(crate) fn from_json(name: &str, json: Value) -> Result<Vec<u8>, String> {
    let kind = pool().get_message_by_name(name).ok_or_else(|| format!("{name} is not a known message"))?;
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(kind, json, &options).map_err(|error| error.to_string())?;
    Ok(message.encode_to_vec())
}

/// A resource as JSON with `@type`; one of an unknown type keeps its bytes, in base64.
pub(crate) fn to_json(any: &Any) -> Value {
    let known = || {
        let name = any.type_url.rsplit('/').next()?;
        let kind = pool().get_message_by_name(name)?;
        let message = DynamicMessage::decode(kind, any.value.as_slice()).ok()?;
        let options = SerializeOptions::new().use_proto_field_name(true);
        let mut value = message.serialize_with_options(serde_json::value::Serializer, &options).ok()?;
        if let Value::Object(fields) = &mut value {
            fields.insert("@type".into(), any.type_url.clone().into());
        }
        Some(value)
    };
    known().unwrap_or_else(
        || json!({ "@type": any.type_url, "value": base64::engine::general_purpose::STANDARD.encode(&any.value) }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let json = json!({ "name": "a", "connect_timeout": "1.500s", "type": "STATIC" });
        let value = from_json("envoy.config.cluster.v3.Cluster", json).unwrap();
        let any = Any { type_url: types::wellknown::type_urls::CLUSTER.into(), value };
        let back = to_json(&any);
        assert_eq!(back["connect_timeout"], "1.500s");
        assert_eq!(back["@type"], types::wellknown::type_urls::CLUSTER);
        assert!(from_json("envoy.config.cluster.v3.Cluster", json!({ "nam": "a" })).unwrap_err().contains("nam"));
    }
}
