//! Envoy's messages that hold maps, once more with maps in order.
//!
//! prost gives the generated messages hash maps, whose bytes differ from run to run; compiled output
//! must not. The field numbers are Envoy's, so a reader sees no difference.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::rbac::v3::Policy;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{JwtProvider, RequirementRule};
use envoy_types::pb::google::protobuf::Any;
use prost::Message;

/// `envoy.config.rbac.v3.RBAC`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Rules {
    /// 0 ALLOW, 1 DENY.
    #[prost(int32, tag = "1")]
    pub(crate) action: i32,
    #[prost(btree_map = "string, message", tag = "2")]
    pub(crate) policies: BTreeMap<String, Policy>,
}

/// `envoy.extensions.filters.http.rbac.v3.RBAC`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpRbac {
    #[prost(message, optional, tag = "1")]
    pub(crate) rules: Option<Rules>,
    #[prost(message, optional, tag = "2")]
    pub(crate) shadow_rules: Option<Rules>,
    #[prost(string, tag = "3")]
    pub(crate) shadow_rules_stat_prefix: String,
}

impl HttpRbac {
    /// With Envoy's type URL.
    pub(crate) fn pack(&self) -> Any {
        pack("envoy.extensions.filters.http.rbac.v3.RBAC", self)
    }
}

/// `envoy.extensions.filters.network.rbac.v3.RBAC`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct NetworkRbac {
    #[prost(message, optional, tag = "1")]
    pub(crate) rules: Option<Rules>,
    #[prost(message, optional, tag = "2")]
    pub(crate) shadow_rules: Option<Rules>,
    #[prost(string, tag = "3")]
    pub(crate) stat_prefix: String,
    #[prost(string, tag = "5")]
    pub(crate) shadow_rules_stat_prefix: String,
}

impl NetworkRbac {
    /// With Envoy's type URL.
    pub(crate) fn pack(&self) -> Any {
        pack("envoy.extensions.filters.network.rbac.v3.RBAC", self)
    }
}

/// `envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct JwtAuthentication {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(crate) providers: BTreeMap<String, JwtProvider>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) rules: Vec<RequirementRule>,
    #[prost(bool, tag = "4")]
    pub(crate) bypass_cors_preflight: bool,
}

impl JwtAuthentication {
    /// With Envoy's type URL.
    pub(crate) fn pack(&self) -> Any {
        pack("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", self)
    }
}

fn pack(name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::rbac::v3 as real;
    use envoy_types::pb::envoy::extensions::filters::{http, network};

    fn rules() -> Rules {
        Rules { action: 1, policies: (0..9).map(|i| (format!("p{i}"), Policy::default())).collect() }
    }

    #[test]
    fn envoy_reads_what_we_write() {
        let http = HttpRbac { rules: Some(rules()), shadow_rules: Some(rules()), shadow_rules_stat_prefix: "s".into() };
        let read = http::rbac::v3::Rbac::decode(http.pack().value.as_slice()).unwrap();
        assert_eq!(read.shadow_rules_stat_prefix, "s");
        let read: real::Rbac = read.rules.unwrap();
        assert_eq!((read.action, read.policies.len()), (1, 9));

        let tcp = NetworkRbac {
            rules: Some(rules()),
            shadow_rules: None,
            stat_prefix: "tcp.".into(),
            shadow_rules_stat_prefix: "s".into(),
        };
        let read = network::rbac::v3::Rbac::decode(tcp.pack().value.as_slice()).unwrap();
        assert_eq!((read.stat_prefix.as_str(), read.shadow_rules_stat_prefix.as_str()), ("tcp.", "s"));
        assert_eq!(read.rules.unwrap().policies.len(), 9);
        assert_eq!(tcp.pack(), tcp.pack());
    }

    #[test]
    fn envoy_reads_our_token_settings() {
        let ours = JwtAuthentication {
            providers: BTreeMap::from([("a".to_owned(), JwtProvider::default())]),
            rules: vec![RequirementRule::default()],
            bypass_cors_preflight: true,
        };
        let read = http::jwt_authn::v3::JwtAuthentication::decode(ours.pack().value.as_slice()).unwrap();
        assert!(read.bypass_cors_preflight && read.providers.contains_key("a") && read.rules.len() == 1);
    }
}
