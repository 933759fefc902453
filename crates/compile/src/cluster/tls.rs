//! TLS towards upstreams: mesh mTLS found out per endpoint, explicit mesh mTLS, and TLS to others.
//!
//! *Source*: `docs/parity.md`, Traffic 3.6; Security 7.2 (MTLS-3, MTLS-5, MTLS-9, MTLS-10), 7.4.

use api::networking::{self as net, ClientTlsMode};
use api::security::MtlsMode;
use envoy_types::pb::envoy::config::cluster::v3::{Cluster, cluster};
use envoy_types::pb::envoy::config::core::v3::{
    ProxyProtocolConfig, TransportSocket, UpstreamHttpProtocolOptions, proxy_protocol_config,
};
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, SdsSecretConfig, TlsParameters, UpstreamTlsContext,
    common_tls_context, tls_parameters,
};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::{HttpProtocolOptions, http_protocol_options as http};
use mesh::Resolution;

use super::{Outbound, policy};
use crate::context::Context;
use crate::names;
use crate::secrets::Wanted;
use crate::security::{matchers, tls as server_tls};
use crate::wire::{self, fields, text};

/// What a cluster speaks to its endpoints.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum TlsChoice {
    /// Bytes as they are.
    Plain,
    /// Mesh mTLS to endpoints that say they can.
    Auto,
    /// Mesh mTLS to every endpoint.
    Mesh(Box<net::ClientTlsSettings>),
    /// TLS to a server outside the mesh.
    Origination(Box<net::ClientTlsSettings>),
}

impl TlsChoice {
    /// Whether the cluster starts TLS of its own, so that mesh ALPNs must not be offered.
    pub(crate) fn is_origination(&self) -> bool {
        matches!(self, Self::Origination(_))
    }
}

/// What holds for this cluster: the rule's `tls` always wins, else mesh mTLS where it can be.
pub(crate) fn choose(context: &Context<'_>, of: &Outbound<'_>, resolution: Resolution) -> TlsChoice {
    if let Some(tls) = &of.policy.tls {
        return match tls.mode {
            ClientTlsMode::Disable => TlsChoice::Plain,
            ClientTlsMode::IstioMutual => TlsChoice::Mesh(Box::new(tls.clone())),
            ClientTlsMode::Simple | ClientTlsMode::Mutual => TlsChoice::Origination(Box::new(tls.clone())),
        };
    }
    let is_off = !context.snapshot.mesh_config().enable_auto_mtls()
        || of.service.is_external
        || context.snapshot.namespace_mtls(&of.service.namespace).mode == MtlsMode::Disable;
    if is_off {
        return TlsChoice::Plain;
    }
    if resolution == Resolution::Original {
        // The endpoint is not known when the socket is chosen: all must be able.
        let endpoints = context.snapshot.endpoints(&of.service.key());
        let all = endpoints.port(of.port.number);
        let able = !all.is_empty() && all.iter().all(|endpoint| crate::endpoint::speaks_mesh_tls(context, endpoint));
        return if able { TlsChoice::Mesh(Box::default()) } else { TlsChoice::Plain };
    }
    TlsChoice::Auto
}

/// Writes the choice into the cluster.
pub(super) fn apply(
    context: &Context<'_>,
    of: &Outbound<'_>,
    choice: &TlsChoice,
    cluster: &mut Cluster,
    options: &mut Option<HttpProtocolOptions>,
) {
    let proxy_protocol = of.policy.proxy_protocol.as_ref();
    match choice {
        TlsChoice::Plain => {
            if proxy_protocol.is_some() {
                cluster.transport_socket = Some(wrap(proxy_protocol, raw()));
            }
        }
        TlsChoice::Mesh(settings) => {
            let socket = wire::transport_socket(
                "envoy.transport_sockets.tls",
                &mesh_context(context, of, Some(settings), options.as_ref()),
            );
            cluster.transport_socket = Some(wrap(proxy_protocol, socket));
        }
        TlsChoice::Auto => {
            let socket = wire::transport_socket(
                "envoy.transport_sockets.tls",
                &mesh_context(context, of, None, options.as_ref()),
            );
            cluster.transport_socket_matches = vec![
                cluster::TransportSocketMatch {
                    name: "tlsMode-istio".into(),
                    r#match: Some(fields(vec![("tlsMode", text("istio"))])),
                    transport_socket: Some(wrap(proxy_protocol, socket)),
                },
                cluster::TransportSocketMatch {
                    name: "tlsMode-disabled".into(),
                    r#match: Some(fields(vec![])),
                    transport_socket: Some(wrap(proxy_protocol, raw())),
                },
            ];
        }
        TlsChoice::Origination(settings) => {
            if let Some(tls) = originate(context, of, settings, options) {
                cluster.transport_socket =
                    Some(wrap(proxy_protocol, wire::transport_socket("envoy.transport_sockets.tls", &tls)));
            }
        }
    }
}

fn raw() -> TransportSocket {
    wire::transport_socket("envoy.transport_sockets.raw_buffer", &RawBuffer {})
}

fn wrap(settings: Option<&net::ProxyProtocol>, inner: TransportSocket) -> TransportSocket {
    let Some(settings) = settings else {
        return inner;
    };
    let version = match settings.version.unwrap_or_default() {
        net::ProxyProtocolVersion::V1 => proxy_protocol_config::Version::V1,
        net::ProxyProtocolVersion::V2 => proxy_protocol_config::Version::V2,
    };
    let config = ProxyProtocolUpstreamTransport {
        config: Some(ProxyProtocolConfig { version: version.into(), ..ProxyProtocolConfig::default() }),
        transport_socket: Some(inner),
        ..ProxyProtocolUpstreamTransport::default()
    };
    wire::transport_socket("envoy.transport_sockets.upstream_proxy_protocol", &config)
}

fn params() -> TlsParameters {
    TlsParameters {
        tls_minimum_protocol_version: tls_parameters::TlsProtocol::TlSv12.into(),
        tls_maximum_protocol_version: tls_parameters::TlsProtocol::TlSv13.into(),
        ..TlsParameters::default()
    }
}

// --- mesh TLS ---

fn mesh_context(
    context: &Context<'_>,
    of: &Outbound<'_>,
    explicit: Option<&net::ClientTlsSettings>,
    options: Option<&HttpProtocolOptions>,
) -> UpstreamTlsContext {
    let names: Vec<String> = match explicit {
        Some(settings) if !settings.subject_alt_names.is_empty() => settings.subject_alt_names.clone(),
        _ => server_names(context, of),
    };
    let sni = match explicit {
        Some(settings) if !settings.sni.is_empty() => settings.sni.clone(),
        _ => names::sni(of.port.number, of.subset_name(), &of.service.host),
    };
    UpstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_params: Some(params()),
            tls_certificate_sds_secret_configs: vec![server_tls::agent_secret(server_tls::WORKLOAD_CERT)],
            validation_context_type: Some(server_tls::validation(
                names.iter().map(|name| matchers::exact(name)).collect(),
                server_tls::agent_secret(server_tls::WORKLOAD_ROOT),
            )),
            alpn_protocols: mesh_alpn(context, of, options),
            ..CommonTlsContext::default()
        }),
        sni,
        ..UpstreamTlsContext::default()
    }
}

/// Identities of the service's endpoints under each trust domain, and what a ServiceEntry adds.
/// Empty when none is known: then any identity of the mesh is accepted, as Istio does.
fn server_names(context: &Context<'_>, of: &Outbound<'_>) -> Vec<String> {
    let accounts = context.snapshot.endpoints(&of.service.key()).service_accounts();
    let mut names: Vec<String> = context
        .trust_domains
        .iter()
        .flat_map(|domain| {
            accounts.iter().map(move |(namespace, account)| format!("spiffe://{domain}/ns/{namespace}/sa/{account}"))
        })
        .chain(of.service.subject_alt_names.iter().cloned())
        .collect();
    names.sort();
    names.dedup();
    names
}

/// With `istio.alpn` the filter offers the private ALPN of each request. Without it the cluster
/// says what it can know; see [`crate::view::Capabilities`].
fn mesh_alpn(context: &Context<'_>, of: &Outbound<'_>, options: Option<&HttpProtocolOptions>) -> Vec<String> {
    let speaks_http2 = options.is_some_and(is_http2);
    let follows_client = options.is_some_and(|options| {
        matches!(options.upstream_protocol_options, Some(http::UpstreamProtocolOptions::UseDownstreamProtocolConfig(_)))
    });
    let capabilities = context.view.capabilities;
    let list: &[&str] = if capabilities.has_alpn && capabilities.has_metadata_exchange {
        if speaks_http2 { &["istio-peer-exchange", "istio", "h2"] } else { &["istio-peer-exchange", "istio"] }
    } else if of.port.protocol.is_http() && !follows_client {
        if speaks_http2 { &["istio-h2", "istio", "h2"] } else { &["istio-http/1.1", "istio", "http/1.1"] }
    } else {
        // No peer exchange: the server would wait for metadata that never comes.
        &["istio", "http/1.1"]
    };
    server_tls::strings(list)
}

fn is_http2(options: &HttpProtocolOptions) -> bool {
    use http::explicit_http_config::ProtocolConfig;
    matches!(
        &options.upstream_protocol_options,
        Some(http::UpstreamProtocolOptions::ExplicitHttpConfig(config))
            if matches!(config.protocol_config, Some(ProtocolConfig::Http2ProtocolOptions(_)))
    )
}

// --- TLS to others ---

/// `None` when a credential cannot be used here and traffic stays as it is, as in Istio.
fn originate(
    context: &Context<'_>,
    of: &Outbound<'_>,
    settings: &net::ClientTlsSettings,
    options: &mut Option<HttpProtocolOptions>,
) -> Option<UpstreamTlsContext> {
    let has_credential = !settings.credential_name.is_empty();
    let is_selected = of.rule.is_some_and(|rule| rule.workload_selector.is_some());
    let is_config_map = settings.credential_name.starts_with("configmap://");
    if has_credential && context.is_sidecar() && !is_selected && !is_config_map {
        if let Some(rule) = of.rule {
            context.warn(
                "LAT0310",
                rule.object(),
                "spec.trafficPolicy.tls.credentialName",
                format!(
                    "has no effect on sidecars without workloadSelector: traffic to {} is sent in plaintext",
                    of.service.host
                ),
                "add workloadSelector, or use files",
            );
        }
        return None;
    }
    let names: Vec<String> = if settings.subject_alt_names.is_empty() {
        of.service.subject_alt_names.clone()
    } else {
        settings.subject_alt_names.clone()
    };
    let skips = settings.insecure_skip_verify == Some(true);
    let validation = if skips {
        common_tls_context::ValidationContextType::ValidationContext(CertificateValidationContext::default())
    } else {
        server_tls::validation(names.iter().map(|name| matchers::exact(name)).collect(), roots(context, of, settings))
    };
    let mutual = settings.mode == ClientTlsMode::Mutual;
    let certificates = if mutual { client_certificate(context, of, settings) } else { Vec::new() };
    let speaks_http2 = options.as_ref().is_some_and(is_http2);
    let follows_client = options.as_ref().is_some_and(|options| {
        matches!(options.upstream_protocol_options, Some(http::UpstreamProtocolOptions::UseDownstreamProtocolConfig(_)))
    });
    let auto_sni = settings.sni.is_empty();
    let auto_san = auto_sni && names.is_empty() && !skips;
    if auto_sni {
        let options = options.get_or_insert_with(|| HttpProtocolOptions {
            upstream_protocol_options: Some(policy::explicit_http1()),
            ..HttpProtocolOptions::default()
        });
        options.upstream_http_protocol_options = Some(UpstreamHttpProtocolOptions {
            auto_sni: true,
            auto_san_validation: auto_san,
            ..UpstreamHttpProtocolOptions::default()
        });
    }
    let alpn: &[&str] = match (speaks_http2, follows_client) {
        (true, _) => &["h2"],
        (false, true) => &["h2", "http/1.1"],
        (false, false) => &[],
    };
    let mut tls_params = params();
    if let Some(defaults) = &context.snapshot.mesh_config().tls_defaults {
        tls_params.cipher_suites.clone_from(&defaults.cipher_suites);
        tls_params.ecdh_curves.clone_from(&defaults.ecdh_curves);
    }
    Some(UpstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_params: Some(tls_params),
            tls_certificate_sds_secret_configs: certificates,
            validation_context_type: Some(validation),
            alpn_protocols: server_tls::strings(alpn),
            ..CommonTlsContext::default()
        }),
        sni: settings.sni.clone(),
        ..UpstreamTlsContext::default()
    })
}

fn roots(context: &Context<'_>, of: &Outbound<'_>, settings: &net::ClientTlsSettings) -> SdsSecretConfig {
    if settings.credential_name.is_empty() {
        let path = if settings.ca_certificates.is_empty() { "system" } else { &settings.ca_certificates };
        return file_secret(&format!("file-root:{path}"));
    }
    let name = with_scheme(&settings.credential_name);
    let name = if name.starts_with("configmap://") { name } else { format!("{name}-cacert") };
    wanted(context, of, name, true)
}

fn client_certificate(
    context: &Context<'_>,
    of: &Outbound<'_>,
    settings: &net::ClientTlsSettings,
) -> Vec<SdsSecretConfig> {
    if settings.credential_name.is_empty() {
        return vec![file_secret(&format!("file-cert:{}~{}", settings.client_certificate, settings.private_key))];
    }
    vec![wanted(context, of, with_scheme(&settings.credential_name), false)]
}

/// A secret that the control plane sends along, and whose lack is told.
fn wanted(context: &Context<'_>, of: &Outbound<'_>, resource: String, is_ca: bool) -> SdsSecretConfig {
    let secret = server_tls::control_plane_secret(&resource);
    // The mesh's default policy has no object to blame.
    let object = of.rule.map_or_else(|| &of.service.object, |rule| rule.object()).clone();
    context.want(Wanted { resource, is_ca, object, field: "spec.trafficPolicy.tls.credentialName".into() });
    secret
}

/// Files of the pod are read by its own agent, which may take its time.
fn file_secret(name: &str) -> SdsSecretConfig {
    let mut secret = server_tls::agent_secret(name);
    if let Some(source) = &mut secret.sds_config {
        source.initial_fetch_timeout = None;
    }
    secret
}

fn with_scheme(credential: &str) -> String {
    if credential.contains("://") { credential.to_owned() } else { format!("kubernetes://{credential}") }
}
