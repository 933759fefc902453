//! `security.istio.io`: the specs of Istio's security kinds, as written.
//!
//! Source: `docs/parity.md`, Security 7 to 9.

#![expect(missing_docs, reason = "a field is named and means what Istio's API reference says")]

use std::collections::BTreeMap;

use crate::networking::LabelSelector;
use crate::scalar::Duration;

records! {
    /// `PeerAuthentication`: which transport a workload's ports accept.
    pub struct PeerAuthentication {
        pub selector: Option<LabelSelector>,
        pub mtls: Option<MutualTls>,
        /// Keys are the workload's ports, not the service's.
        pub port_level_mtls: BTreeMap<u16, MutualTls>,
    }

    /// `mtls`
    pub struct MutualTls {
        pub mode: MtlsMode,
    }

    /// `RequestAuthentication`: which tokens a workload accepts.
    pub struct RequestAuthentication {
        pub selector: Option<LabelSelector>,
        /// Older, single form of `target_refs`.
        pub target_ref: Option<TargetRef>,
        pub target_refs: Vec<TargetRef>,
        pub jwt_rules: Vec<JwtRule>,
    }

    /// What a policy attaches to.
    pub struct TargetRef {
        pub group: String,
        pub kind: String,
        pub name: String,
        pub namespace: String,
    }

    /// One issuer.
    pub struct JwtRule {
        pub issuer: String,
        pub audiences: Vec<String>,
        pub jwks_uri: String,
        pub jwks: String,
        pub from_headers: Vec<JwtHeader>,
        pub from_params: Vec<String>,
        pub from_cookies: Vec<String>,
        pub output_payload_to_header: String,
        pub forward_original_token: bool,
        pub output_claim_to_headers: Vec<ClaimToHeader>,
        pub timeout: Option<Duration>,
        pub space_delimited_claims: Vec<String>,
    }

    /// A header that may hold a token.
    pub struct JwtHeader {
        pub name: String,
        pub prefix: String,
    }

    /// A claim copied into a header.
    pub struct ClaimToHeader {
        pub header: String,
        pub claim: String,
    }

    /// `AuthorizationPolicy`: who may do what.
    pub struct AuthorizationPolicy {
        pub selector: Option<LabelSelector>,
        /// Older, single form of `target_refs`.
        pub target_ref: Option<TargetRef>,
        pub target_refs: Vec<TargetRef>,
        /// Any of them. Absent: allow nothing. `[{}]`: match everything.
        pub rules: Vec<Rule>,
        pub action: Action,
        pub provider: Option<ExtensionProviderRef>,
    }

    /// `provider` of a CUSTOM policy.
    pub struct ExtensionProviderRef {
        pub name: String,
    }

    /// `from` AND `to` AND `when`; an empty list does not restrict.
    pub struct Rule {
        pub from: Vec<From>,
        pub to: Vec<To>,
        pub when: Vec<Condition>,
    }

    /// One entry of `from`.
    pub struct From {
        pub source: Option<Source>,
    }

    /// One entry of `to`.
    pub struct To {
        pub operation: Option<Operation>,
    }

    /// Who asks. Different fields AND, values of a field OR.
    pub struct Source {
        pub principals: Vec<String>,
        pub not_principals: Vec<String>,
        pub request_principals: Vec<String>,
        pub not_request_principals: Vec<String>,
        pub namespaces: Vec<String>,
        pub not_namespaces: Vec<String>,
        pub ip_blocks: Vec<String>,
        pub not_ip_blocks: Vec<String>,
        pub remote_ip_blocks: Vec<String>,
        pub not_remote_ip_blocks: Vec<String>,
        pub service_accounts: Vec<String>,
        pub not_service_accounts: Vec<String>,
        pub trust_domains: Vec<String>,
        pub not_trust_domains: Vec<String>,
    }

    /// What is asked. Different fields AND, values of a field OR.
    pub struct Operation {
        pub hosts: Vec<String>,
        pub not_hosts: Vec<String>,
        pub ports: Vec<String>,
        pub not_ports: Vec<String>,
        pub methods: Vec<String>,
        pub not_methods: Vec<String>,
        pub paths: Vec<String>,
        pub not_paths: Vec<String>,
    }

    /// A further attribute.
    pub struct Condition {
        pub key: String,
        pub values: Vec<String>,
        pub not_values: Vec<String>,
    }
}

words! {
    /// `mtls.mode`
    pub enum MtlsMode {
        /// Inherits.
        #[default]
        Unset = "UNSET",
        Disable = "DISABLE",
        Permissive = "PERMISSIVE",
        Strict = "STRICT",
    }

    /// `action`
    pub enum Action {
        #[default]
        Allow = "ALLOW",
        Deny = "DENY",
        Audit = "AUDIT",
        Custom = "CUSTOM",
    }
}
