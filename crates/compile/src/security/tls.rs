//! TLS contexts of servers, and where their secrets come from.
//!
//! Source: `docs/parity.md`, Security 7.2 (MTLS-3 to MTLS-6), 12. Workload keys never cross ADS:
//! `default` and `ROOTCA` come from the proxy's own agent.

use api::mesh_config::TlsConfig;
use api::networking::TlsProtocol;
use envoy_types::pb::envoy::config::core::v3::{
    AggregatedConfigSource, ApiConfigSource, ApiVersion, ConfigSource, GrpcService, TransportSocket, api_config_source,
    config_source, grpc_service, transport_socket,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, TlsParameters,
    common_tls_context, tls_parameters,
};
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::google::protobuf::{BoolValue, Duration};
use envoy_types::util::pack_any;

use super::matchers;
use crate::view::Capabilities;

/// The secret with the workload's own certificate.
pub(crate) const WORKLOAD_CERT: &str = "default";
/// The secret with the roots of the mesh.
pub(crate) const WORKLOAD_ROOT: &str = "ROOTCA";
/// The cluster under which a proxy reaches its agent's secrets.
const AGENT_CLUSTER: &str = "sds-grpc";

/// ALPN of a chain that serves HTTP.
pub(crate) const ALPN_HTTP: &[&str] = &["h2", "http/1.1"];
/// ALPN of a chain that relays bytes of the mesh.
const ALPN_TCP: &[&str] = &["istio-peer-exchange", "h2", "http/1.1"];
/// The same of a server that would take a peer's metadata for bytes of the application.
const ALPN_TCP_PLAIN: &[&str] = &["istio", "h2", "http/1.1"];

/// ALPN of a chain that relays bytes of the mesh, by what the server can do.
pub(crate) fn alpn_of_bytes(capabilities: Capabilities) -> &'static [&'static str] {
    if capabilities.has_metadata_exchange { ALPN_TCP } else { ALPN_TCP_PLAIN }
}

/// Suites of mesh TLS 1.2, best first; the last two are for old peers.
const MESH_SUITES: &[&str] = &[
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-GCM-SHA256",
];

/// A secret answered by the proxy's own agent.
pub(crate) fn agent_secret(name: &str) -> SdsSecretConfig {
    let service = GrpcService {
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(grpc_service::EnvoyGrpc {
            cluster_name: AGENT_CLUSTER.to_owned(),
            ..grpc_service::EnvoyGrpc::default()
        })),
        ..GrpcService::default()
    };
    let source = ApiConfigSource {
        api_type: api_config_source::ApiType::Grpc.into(),
        transport_api_version: ApiVersion::V3.into(),
        grpc_services: vec![service],
        set_node_on_first_message_only: true,
        ..ApiConfigSource::default()
    };
    SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(ConfigSource {
            initial_fetch_timeout: Some(Duration::default()),
            resource_api_version: ApiVersion::V3.into(),
            config_source_specifier: Some(config_source::ConfigSourceSpecifier::ApiConfigSource(source)),
            ..ConfigSource::default()
        }),
    }
}

/// A secret that the control plane sends.
pub(crate) fn control_plane_secret(name: &str) -> SdsSecretConfig {
    SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(ConfigSource {
            resource_api_version: ApiVersion::V3.into(),
            config_source_specifier: Some(config_source::ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
            ..ConfigSource::default()
        }),
    }
}

/// Peers of the mesh: a certificate of its roots for an identity of one of its trust domains.
pub(crate) fn mesh_peers(trust_domains: &[String]) -> common_tls_context::ValidationContextType {
    let names = trust_domains.iter().map(|domain| matchers::prefix(&format!("spiffe://{domain}/"))).collect();
    validation(names, agent_secret(WORKLOAD_ROOT))
}

/// Peers with a certificate of `roots` and, if `names` are given, one of those as SAN.
pub(crate) fn validation(
    names: Vec<StringMatcher>,
    roots: SdsSecretConfig,
) -> common_tls_context::ValidationContextType {
    #[expect(deprecated, reason = "Istio sends the older field, and older proxies read only that one")]
    let context =
        CertificateValidationContext { match_subject_alt_names: names, ..CertificateValidationContext::default() };
    combined(context, roots)
}

/// A validation context whose roots are a secret.
pub(crate) fn combined(
    context: CertificateValidationContext,
    roots: SdsSecretConfig,
) -> common_tls_context::ValidationContextType {
    #[expect(deprecated, reason = "the deprecated fields must be given values to build the message")]
    let combined = common_tls_context::CombinedCertificateValidationContext {
        default_validation_context: Some(context),
        validation_context_sds_secret_config: Some(roots),
        validation_context_certificate_provider: None,
        validation_context_certificate_provider_instance: None,
    };
    common_tls_context::ValidationContextType::CombinedValidationContext(combined)
}

/// What a sidecar asks of mesh peers.
pub(crate) fn mesh_server(
    trust_domains: &[String],
    settings: Option<&TlsConfig>,
    alpn: &[&str],
) -> DownstreamTlsContext {
    let minimum = match settings.map(|settings| settings.min_protocol_version) {
        Some(TlsProtocol::V1_3) => tls_parameters::TlsProtocol::TlSv13,
        _ => tls_parameters::TlsProtocol::TlSv12,
    };
    let suites = match settings {
        Some(settings) if !settings.cipher_suites.is_empty() => settings.cipher_suites.clone(),
        _ => strings(MESH_SUITES),
    };
    DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_params: Some(TlsParameters {
                tls_minimum_protocol_version: minimum.into(),
                tls_maximum_protocol_version: tls_parameters::TlsProtocol::TlSv13.into(),
                cipher_suites: suites,
                ..TlsParameters::default()
            }),
            tls_certificate_sds_secret_configs: vec![agent_secret(WORKLOAD_CERT)],
            validation_context_type: Some(mesh_peers(trust_domains)),
            alpn_protocols: strings(alpn),
            ..CommonTlsContext::default()
        }),
        require_client_certificate: Some(BoolValue { value: true }),
        ..DownstreamTlsContext::default()
    }
}

/// The context as a chain's transport socket.
pub(crate) fn socket(context: DownstreamTlsContext) -> TransportSocket {
    TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(pack_any(context))),
    }
}

/// Owned strings.
pub(crate) fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}
