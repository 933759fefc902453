//! External authorizers of CUSTOM policies.
//!
//! Source: `docs/parity.md`, Security 8.10. The filter runs only on what the shadow rules before it
//! have marked.

use api::mesh_config::{ExtAuthzBody, ExtAuthzGrpc, ExtAuthzHttp};
use envoy_types::pb::envoy::config::core::v3::{ApiVersion, GrpcService, HeaderValue, HttpUri, grpc_service, http_uri};
use envoy_types::pb::envoy::config::listener::v3::Filter;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::{
    AuthorizationRequest, AuthorizationResponse, BufferSettings, ExtAuthz, HttpService, ext_authz,
};
use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3 as network;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;
use envoy_types::pb::envoy::r#type::matcher::v3::{ListStringMatcher, MetadataMatcher, StringMatcher};
use envoy_types::pb::envoy::r#type::v3::{HttpStatus, StatusCode};
use envoy_types::pb::google::protobuf::Duration;
use envoy_types::util::pack_any;
use thiserror::Error;

use super::PolicyFacts;
use super::authz::{http_filter, network_filter};
use super::matchers::{self, Wild};

const DEFAULT_TIMEOUT: std::time::Duration = std::time::Duration::from_mins(10);
const HTTP_NAME: &str = "envoy.filters.http.ext_authz";
const NETWORK_NAME: &str = "envoy.filters.network.ext_authz";

/// The filters that ask a provider.
pub(crate) struct Provider {
    pub(crate) http: HttpFilter,
    /// Only authorizers that speak gRPC are asked about connections.
    pub(crate) network: Option<Filter>,
}

/// Why a provider cannot be asked.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub(crate) enum InvalidProvider {
    #[error("meshConfig has no extension provider {0:?}, so what the policy matches is refused")]
    Unknown(String),
    #[error("extension provider {0:?} is not an external authorizer, so what the policy matches is refused")]
    Kind(String),
    #[error(
        "extension provider {provider:?}: no service {service:?} with port {port}, so what the policy matches is refused"
    )]
    Service { provider: String, service: String, port: u16 },
    #[error("extension provider {provider:?}: {field} {value:?} is invalid, so what the policy matches is refused")]
    Field { provider: String, field: &'static str, value: String },
    #[error("this proxy cannot ask extension provider {0:?}, which speaks gRPC, so what the policy matches is refused")]
    Grpc(String),
    #[error("CUSTOM policies of one workload name different providers, so what they match is refused")]
    Several,
}

impl InvalidProvider {
    /// What to do about it.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Unknown(_) | Self::Kind(_) => {
                "add it to meshConfig.extensionProviders with envoyExtAuthzHttp or envoyExtAuthzGrpc"
            }
            Self::Service { .. } => "name a host and port that the mesh knows",
            Self::Field { .. } => "correct the provider in meshConfig.extensionProviders",
            Self::Grpc(_) => "use envoyExtAuthzHttp",
            Self::Several => "use one provider for the workload",
        }
    }
}

/// What the names of a provider's rules start with.
pub(crate) fn marker(provider: &str) -> String {
    format!("istio-ext-authz-{provider}")
}

/// The filters of the named provider.
pub(crate) fn provider(name: &str, facts: &PolicyFacts<'_>) -> Result<Provider, InvalidProvider> {
    let provider =
        facts.mesh_config.extension_provider(name).ok_or_else(|| InvalidProvider::Unknown(name.to_owned()))?;
    match (&provider.envoy_ext_authz_http, &provider.envoy_ext_authz_grpc) {
        (Some(http), None) => over_http(name, http, facts),
        (None, Some(_)) if !facts.asks_over_grpc => Err(InvalidProvider::Grpc(name.to_owned())),
        (None, Some(grpc)) => over_grpc(name, grpc, facts),
        _ => Err(InvalidProvider::Kind(name.to_owned())),
    }
}

fn over_http(name: &str, settings: &ExtAuthzHttp, facts: &PolicyFacts<'_>) -> Result<Provider, InvalidProvider> {
    let host = service(name, &settings.service, settings.port, facts)?;
    if !settings.path_prefix.is_empty() && !settings.path_prefix.starts_with('/') {
        return Err(invalid(name, "pathPrefix", &settings.path_prefix));
    }
    let asked = if settings.include_request_headers_in_check.is_empty() {
        &settings.include_headers_in_check
    } else {
        &settings.include_request_headers_in_check
    };
    let added = settings.include_additional_headers_in_check.iter();
    let headers_to_add: Vec<_> = added
        .map(|(key, value)| HeaderValue { key: key.clone(), value: value.clone(), ..HeaderValue::default() })
        .collect();
    #[expect(deprecated, reason = "the deprecated field must be given a value to build the message")]
    let request = AuthorizationRequest { allowed_headers: None, headers_to_add };
    let to_upstream = header_list(name, "headersToUpstreamOnAllow", &settings.headers_to_upstream_on_allow)?;
    let on_deny = header_list(name, "headersToDownstreamOnDeny", &settings.headers_to_downstream_on_deny)?;
    let on_allow = header_list(name, "headersToDownstreamOnAllow", &settings.headers_to_downstream_on_allow)?;
    let response = AuthorizationResponse {
        allowed_upstream_headers: to_upstream,
        allowed_client_headers: on_deny,
        allowed_client_headers_on_success: on_allow,
        ..AuthorizationResponse::default()
    };
    let service = HttpService {
        server_uri: Some(HttpUri {
            uri: format!("http://{host}"),
            timeout: Some(duration(settings.timeout)),
            http_upstream_type: Some(http_uri::HttpUpstreamType::Cluster(cluster(settings.port, &host))),
        }),
        path_prefix: settings.path_prefix.clone(),
        authorization_request: (!request.headers_to_add.is_empty()).then_some(request),
        authorization_response: (response != AuthorizationResponse::default()).then_some(response),
        ..HttpService::default()
    };
    let filter = ExtAuthz {
        services: Some(ext_authz::Services::HttpService(service)),
        allowed_headers: header_list(name, "includeRequestHeadersInCheck", asked)?,
        clear_route_cache: settings.clear_route_cache == Some(true),
        ..common(name, settings.fail_open, &settings.status_on_error, settings.include_request_body_in_check.as_ref())?
    };
    Ok(Provider { http: http_filter(HTTP_NAME, pack_any(filter)), network: None })
}

fn over_grpc(name: &str, settings: &ExtAuthzGrpc, facts: &PolicyFacts<'_>) -> Result<Provider, InvalidProvider> {
    let host = service(name, &settings.service, settings.port, facts)?;
    let service = GrpcService {
        timeout: Some(duration(settings.timeout)),
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(grpc_service::EnvoyGrpc {
            cluster_name: cluster(settings.port, &host),
            authority: host,
            ..grpc_service::EnvoyGrpc::default()
        })),
        ..GrpcService::default()
    };
    let filter = ExtAuthz {
        services: Some(ext_authz::Services::GrpcService(service.clone())),
        clear_route_cache: settings.clear_route_cache == Some(true),
        ..common(name, settings.fail_open, &settings.status_on_error, settings.include_request_body_in_check.as_ref())?
    };
    let network = network::ExtAuthz {
        stat_prefix: "tcp.".to_owned(),
        grpc_service: Some(service),
        failure_mode_allow: settings.fail_open,
        transport_api_version: ApiVersion::V3.into(),
        filter_enabled_metadata: Some(marked_by("envoy.filters.network.rbac", name)),
        ..network::ExtAuthz::default()
    };
    Ok(Provider {
        http: http_filter(HTTP_NAME, pack_any(filter)),
        network: Some(network_filter(NETWORK_NAME, pack_any(network))),
    })
}

fn common(
    name: &str,
    fail_open: bool,
    status_on_error: &str,
    body: Option<&ExtAuthzBody>,
) -> Result<ExtAuthz, InvalidProvider> {
    let status = match status_on_error {
        "" => None,
        text => {
            let code = text.parse::<i32>().ok().and_then(|code| StatusCode::try_from(code).ok());
            let code = code.filter(|code| *code != StatusCode::Empty);
            Some(code.ok_or_else(|| invalid(name, "statusOnError", text))?)
        }
    };
    Ok(ExtAuthz {
        transport_api_version: ApiVersion::V3.into(),
        failure_mode_allow: fail_open,
        with_request_body: body.map(|body| BufferSettings {
            max_request_bytes: body.max_request_bytes,
            allow_partial_message: body.allow_partial_message,
            pack_as_bytes: body.pack_as_bytes,
        }),
        status_on_error: status.map(|code| HttpStatus { code: code.into() }),
        filter_enabled_metadata: Some(marked_by("envoy.filters.http.rbac", name)),
        ..ExtAuthz::default()
    })
}

/// Only what the shadow rules of `rbac` have marked for this provider.
fn marked_by(rbac: &str, provider: &str) -> MetadataMatcher {
    let value = matchers::string_value(matchers::prefix(&marker(provider)));
    matchers::metadata(rbac, &["istio_ext_authz_shadow_effective_policy_id"], value)
}

/// The fully qualified host of `host` or `namespace/host`.
fn service(provider: &str, service: &str, port: u16, facts: &PolicyFacts<'_>) -> Result<String, InvalidProvider> {
    facts.services.host_with_port(service, port).filter(|_| port != 0).ok_or_else(|| InvalidProvider::Service {
        provider: provider.to_owned(),
        service: service.to_owned(),
        port,
    })
}

fn cluster(port: u16, host: &str) -> String {
    format!("outbound|{port}||{host}")
}

fn duration(timeout: Option<api::scalar::Duration>) -> Duration {
    let timeout = timeout.map_or(DEFAULT_TIMEOUT, |timeout| timeout.0);
    Duration {
        seconds: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(timeout.subsec_nanos()).unwrap_or(0),
    }
}

fn header_list(
    provider: &str,
    field: &'static str,
    names: &[String],
) -> Result<Option<ListStringMatcher>, InvalidProvider> {
    let mut patterns = Vec::new();
    for name in names {
        let wild = Wild::parse(name);
        if wild == Wild::Any || name.is_empty() {
            return Err(invalid(provider, field, name));
        }
        patterns.push(StringMatcher { ignore_case: true, ..wild.matcher() });
    }
    Ok((!patterns.is_empty()).then_some(ListStringMatcher { patterns }))
}

fn invalid(provider: &str, field: &'static str, value: &str) -> InvalidProvider {
    InvalidProvider::Field { provider: provider.to_owned(), field, value: value.to_owned() }
}
