//! Network filters and the filters that are both network and upstream filters.

use envoy_types::pb::google::protobuf::{Any, Struct};
use prost::Message;
use proto::filters::metadata_exchange::MetadataExchange;
use serde_json::Value;

use super::common::json_struct;
use crate::unsupported::{Unsupported, unpack};

/// A message that may come wrapped in a `TypedStruct` (Istio writes its own filters so).
pub(super) enum Typed<'a> {
    /// As itself.
    Message(&'a Any),
    /// Type and JSON.
    Json(String, Value),
}

/// The type's full name.
pub(super) fn type_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or(url)
}

/// Unwraps a `TypedStruct` if it is one.
pub(super) fn unwrap(any: &Any) -> Result<Typed<'_>, Unsupported> {
    if !matches!(type_name(&any.type_url), "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct") {
        return Ok(Typed::Message(any));
    }
    let typed = TypedStruct::decode(any.value.as_slice())
        .map_err(|error| Unsupported::new("typed_config", format!("cannot be decoded: {error}")))?;
    Ok(Typed::Json(type_name(&typed.type_url).to_owned(), json_struct(&typed.value.unwrap_or_default())))
}

/// `udpa.type.v1.TypedStruct` and `xds.type.v3.TypedStruct`, which are alike.
#[derive(Clone, PartialEq, Message)]
struct TypedStruct {
    /// Type of the message that the value stands for.
    #[prost(string, tag = "1")]
    type_url: String,
    /// The message as JSON.
    #[prost(message, optional, tag = "2")]
    value: Option<Struct>,
}

impl Typed<'_> {
    /// The full name of the inner type.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Message(any) => type_name(&any.type_url),
            Self::Json(name, _) => name,
        }
    }
}

/// The protocol of `istio.metadata_exchange`, if the message is one.
pub(super) fn metadata_exchange(any: &Any) -> Result<Option<Box<str>>, Unsupported> {
    let typed = unwrap(any)?;
    if typed.name() != "envoy.tcp.metadataexchange.config.MetadataExchange" {
        return Ok(None);
    }
    let protocol = match typed {
        Typed::Message(any) => unpack::<MetadataExchange>(any, "typed_config")?.protocol,
        Typed::Json(_, value) => value.get("protocol").and_then(Value::as_str).unwrap_or_default().to_owned(),
    };
    Ok(Some(protocol.into()))
}
