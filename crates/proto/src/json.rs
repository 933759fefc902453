//! Envoy's messages by reflection: canonical JSON in and out, as bootstraps and config dumps hold it.
//!
//! Read on first use, and given back when nobody has asked for a while ([`rest`]): tens of megabytes
//! that a proxy needs for its bootstrap or a dump, and for nothing else.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Any, Struct, Value as StructValue};
use prost::Message as _;
use prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use prost_reflect::prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto};
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, ReflectMessage as _, SerializeOptions, Value as Dynamic,
};
use serde_json::{Value, json};

static SET: &[u8] = include_bytes!("../descriptors/envoy.binpb");

/// The set, read, and when it was used last.
struct Loaded {
    pool: DescriptorPool,
    used: Instant,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// How long the set is kept after its last use.
const KEPT: Duration = Duration::from_secs(5);

fn pool() -> DescriptorPool {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let loaded = loaded.get_or_insert_with(|| {
        let mut pool = DescriptorPool::decode(SET).expect("the set is part of the program and tested");
        pool.add_file_descriptor_proto(typed_struct()).expect("it needs nothing but Struct and is tested");
        Loaded { pool, used: now }
    });
    loaded.used = now;
    loaded.pool.clone()
}

/// Gives the set back unless somebody used it a moment ago, and says whether it did; now and then, by
/// the control side.
pub fn rest() -> bool {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let rests = loaded.as_ref().is_some_and(|loaded| loaded.used.elapsed() >= KEPT);
    if rests {
        *loaded = None;
    }
    rests
}

/// Gives the set back at once: by who has read what it had to, on the thread that read it.
pub fn unload() {
    *LOADED.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// `udpa.type.v1.TypedStruct`, in which Istio wraps the settings of its own filters.
fn typed_struct() -> FileDescriptorProto {
    let field = |name: &str, number: i32, kind: Type, type_name: Option<&str>| FieldDescriptorProto {
        name: Some(name.into()),
        number: Some(number),
        r#type: Some(kind.into()),
        label: Some(Label::Optional.into()),
        type_name: type_name.map(Into::into),
        ..FieldDescriptorProto::default()
    };
    FileDescriptorProto {
        name: Some("udpa/type/v1/typed_struct.proto".into()),
        package: Some("udpa.type.v1".into()),
        syntax: Some("proto3".into()),
        dependency: vec!["google/protobuf/struct.proto".into()],
        message_type: vec![DescriptorProto {
            name: Some("TypedStruct".into()),
            field: vec![
                field("type_url", 1, Type::String, None),
                field("value", 2, Type::Message, Some(".google.protobuf.Struct")),
            ],
            ..DescriptorProto::default()
        }],
        ..FileDescriptorProto::default()
    }
}

/// Makes every `Any` of a type that is not known here one that is: a struct with its type and bytes.
/// One unknown filter then hides itself, not the whole listener.
fn tame(message: &mut DynamicMessage) {
    if message.descriptor().full_name() != "google.protobuf.Any" {
        for (_, value) in message.fields_mut() {
            tame_value(value);
        }
        return;
    }
    let Ok(any) = message.transcode_to::<Any>() else { return };
    let known = any.type_url.rsplit('/').next().and_then(|name| pool().get_message_by_name(name));
    let inner = known.and_then(|kind| DynamicMessage::decode(kind, any.value.as_slice()).ok());
    let tamed = match inner {
        Some(mut inner) => {
            tame(&mut inner);
            Any { type_url: any.type_url, value: inner.encode_to_vec() }
        }
        None => opaque(&any),
    };
    // `Any` has these two fields, so that this cannot fail.
    if message.transcode_from(&tamed).is_err() {
        message.clear_field_by_name("value");
    }
}

fn opaque(any: &Any) -> Any {
    let text = |text: String| StructValue { kind: Some(Kind::StringValue(text)) };
    let fields = [
        ("type_url".to_owned(), text(any.type_url.clone())),
        ("base64".to_owned(), text(base64::engine::general_purpose::STANDARD.encode(&any.value))),
    ];
    let value = Struct { fields: fields.into_iter().collect() }.encode_to_vec();
    Any { type_url: "type.googleapis.com/google.protobuf.Struct".into(), value }
}

fn tame_value(value: &mut Dynamic) {
    match value {
        Dynamic::Message(message) => tame(message),
        Dynamic::List(list) => list.iter_mut().for_each(tame_value),
        Dynamic::Map(map) =>
        {
            #[expect(clippy::iter_over_hash_type, reason = "each value is changed by itself")]
            for value in map.values_mut() {
                tame_value(value);
            }
        }
        _ => {}
    }
}

/// A message of type `name` from its JSON. Unknown fields are errors.
///
/// *Errors*: what does not fit, with its path as far as the decoder tells it.
pub fn from_json(name: &str, json: Value) -> Result<Vec<u8>, String> {
    let kind = pool().get_message_by_name(name).ok_or_else(|| format!("{name} is not a known message"))?;
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(kind, json, &options).map_err(|error| error.to_string())?;
    Ok(message.encode_to_vec())
}

/// A message inside another one whose type is not known here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownType {
    /// Where it stands, as the JSON spells it.
    pub path: String,
    /// The name of the extension that it configures, if it has one.
    pub extension: Option<String>,
    /// Its full name.
    pub kind: String,
}

/// The first message of an unknown type inside of `json`: what [`from_json`] stumbled over, where.
pub fn unknown_type(json: &Value) -> Option<UnknownType> {
    find_unknown(&pool(), String::new(), None, json)
}

fn find_unknown(pool: &DescriptorPool, path: String, extension: Option<&str>, json: &Value) -> Option<UnknownType> {
    match json {
        Value::Object(fields) => {
            if let Some(url) = fields.get("@type").and_then(Value::as_str) {
                let kind = url.rsplit('/').next().unwrap_or_default();
                if pool.get_message_by_name(kind).is_none() {
                    return Some(UnknownType { path, extension: extension.map(str::to_owned), kind: kind.to_owned() });
                }
            }
            let own = fields.get("name").and_then(Value::as_str);
            fields.iter().find_map(|(name, value)| {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                find_unknown(pool, path, own, value)
            })
        }
        Value::Array(items) => {
            let mut items = items.iter().enumerate();
            items.find_map(|(at, item)| find_unknown(pool, format!("{path}[{at}]"), extension, item))
        }
        _ => None,
    }
}

/// A message from JSON that says its type in `@type`, as `to_json` writes it.
///
/// *Errors*: no `@type`, an unknown one, or what does not fit.
pub fn any_from_json(mut json: Value) -> Result<Any, String> {
    let type_url = json
        .as_object_mut()
        .and_then(|fields| fields.remove("@type"))
        .and_then(|url| url.as_str().map(str::to_owned))
        .ok_or("there is no @type")?;
    let value = from_json(type_url.rsplit('/').next().unwrap_or_default(), json)?;
    Ok(Any { type_url, value })
}

/// A resource as JSON with `@type`; one of an unknown type keeps its bytes, in base64.
pub fn to_json(any: &Any) -> Value {
    let known = || {
        let name = any.type_url.rsplit('/').next()?;
        let kind = pool().get_message_by_name(name)?;
        let mut message = DynamicMessage::decode(kind, any.value.as_slice()).ok()?;
        let options = SerializeOptions::new().use_proto_field_name(true);
        let write =
            |message: &DynamicMessage| message.serialize_with_options(serde_json::value::Serializer, &options).ok();
        let mut value = match write(&message) {
            Some(value) => value,
            None => {
                tame(&mut message);
                write(&message)?
            }
        };
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
    fn what_is_not_known_hides_only_itself() {
        use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
        use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener};
        let struct_of = |key: &str| Struct {
            fields: [(key.to_owned(), StructValue { kind: Some(Kind::BoolValue(true)) })].into_iter().collect(),
        };
        // TypedStruct by hand: field 1 is the URL, field 2 the struct.
        let mut typed = vec![0x0a, 3];
        typed.extend_from_slice(b"a/b");
        let inner = struct_of("x").encode_to_vec();
        typed.extend_from_slice(&[0x12, u8::try_from(inner.len()).unwrap()]);
        typed.extend_from_slice(&inner);
        let filter = |type_url: &str, value: Vec<u8>| Filter {
            name: "f".into(),
            config_type: Some(ConfigType::TypedConfig(Any { type_url: type_url.into(), value })),
        };
        let listener = Listener {
            name: "l".into(),
            filter_chains: vec![FilterChain {
                filters: vec![
                    filter("type.googleapis.com/udpa.type.v1.TypedStruct", typed),
                    filter("type.googleapis.com/nobody.knows.This", vec![1]),
                ],
                ..FilterChain::default()
            }],
            ..Listener::default()
        };
        let any = Any { type_url: types::wellknown::type_urls::LISTENER.into(), value: listener.encode_to_vec() };
        let json = to_json(&any);
        let filters = &json["filter_chains"][0]["filters"];
        assert_eq!(filters[0]["typed_config"]["type_url"], "a/b");
        assert_eq!(filters[0]["typed_config"]["value"]["x"], true);
        assert_eq!(filters[1]["typed_config"]["value"]["type_url"], "type.googleapis.com/nobody.knows.This");
        assert_eq!(filters[1]["typed_config"]["value"]["base64"], "AQ==");
    }

    #[test]
    fn an_unknown_type_is_found_where_it_stands() {
        let find = |config: Value| {
            unknown_type(
                &json!({ "name": "l", "filter_chains": [{}, { "filters": [{ "name": "f", "typed_config": config }] }] }),
            )
        };
        let expect = UnknownType {
            path: "filter_chains[1].filters[0].typed_config".into(),
            extension: Some("f".into()),
            kind: "nobody.knows.This".into(),
        };
        assert_eq!(find(json!({ "@type": "type.googleapis.com/nobody.knows.This" })), Some(expect));
        assert_eq!(find(json!({ "@type": "type.googleapis.com/google.protobuf.Struct" })), None);
    }

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
