//! Packing messages into `google.protobuf.Any` and out of it.

pub use envoy_types::pb::google::protobuf::Any;
use prost::{DecodeError, Name};

pub use types::wellknown::type_urls;

/// Wraps a message, with its type URL.
pub fn pack<M: Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

/// Unwraps a message of exactly the expected type.
///
/// *Errors*: another type URL, or bytes that do not decode.
pub fn unpack<M: Name + Default>(any: &Any) -> Result<M, UnpackError> {
    if any.type_url != M::type_url() {
        return Err(UnpackError::Type { expected: M::type_url(), found: any.type_url.clone() });
    }
    M::decode(any.value.as_slice()).map_err(|source| UnpackError::Decode { type_url: any.type_url.clone(), source })
}

/// Why an `Any` does not hold what was expected.
#[derive(Debug, Clone, PartialEq)]
pub enum UnpackError {
    /// It holds something else.
    Type {
        /// What was wanted.
        expected: String,
        /// What it says it holds.
        found: String,
    },
    /// Its bytes are damaged.
    Decode {
        /// What it says it holds.
        type_url: String,
        /// Why.
        source: DecodeError,
    },
}

impl std::fmt::Display for UnpackError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Type { expected, found } => write!(f, "expected {expected}, found {found:?}"),
            Self::Decode { type_url, .. } => write!(f, "{type_url} does not decode"),
        }
    }
}

impl std::error::Error for UnpackError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Type { .. } => None,
            Self::Decode { source, .. } => Some(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nds::NameTable;

    #[test]
    fn type_urls_are_those_on_the_wire() {
        assert_eq!(NameTable::type_url(), type_urls::NAME_TABLE);
        assert_eq!(crate::filters::stats::PluginConfig::type_url(), "type.googleapis.com/stats.PluginConfig");
        assert_eq!(
            crate::filters::metadata_exchange::MetadataExchange::type_url(),
            "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange"
        );
        assert_eq!(
            crate::filters::peer_metadata::Config::type_url(),
            "type.googleapis.com/io.istio.http.peer_metadata.Config"
        );
        assert_eq!(envoy_types::pb::envoy::config::cluster::v3::Cluster::type_url(), type_urls::CLUSTER);
        assert_eq!(
            envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret::type_url(),
            type_urls::SECRET
        );
    }

    #[test]
    fn what_is_packed_comes_out() {
        let table = NameTable {
            table: [("a".to_owned(), crate::nds::name_table::NameInfo::default())].into(),
            name_info: None,
        };
        let any = pack(&table);
        assert_eq!(unpack::<NameTable>(&any).unwrap(), table);
        assert!(unpack::<crate::filters::stats::PluginConfig>(&any).is_err());
        let damaged = Any { value: vec![0xff], ..any };
        assert!(matches!(unpack::<NameTable>(&damaged), Err(UnpackError::Decode { .. })));
    }
}
