//! TLS contexts of gateway servers.
//!
//! Source: `docs/parity.md`, Traffic 4.3, Security 12. Deviation from Istio, settled in
//! `docs/parity.md`, Security MTLS-4: ISTIO_MUTUAL asks for an identity of the mesh's trust domains here too.

use api::networking::{ServerTlsMode, ServerTlsSettings, TlsProtocol};
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, TlsParameters,
    common_tls_context, tls_parameters,
};

use super::servers::{self, OpenServer, Serving};
use crate::context::Context;
use crate::secrets::Wanted;
use crate::security::{matchers, tls};
use crate::wire;

/// The context of a server whose TLS ends here. Wants the secrets it names.
pub(crate) fn context(
    context: &Context<'_>,
    server: &OpenServer,
    settings: &ServerTlsSettings,
) -> DownstreamTlsContext {
    let is_http = server.serving == Serving::Https;
    if settings.mode == ServerTlsMode::IstioMutual {
        return downstream(
            CommonTlsContext {
                tls_certificate_sds_secret_configs: vec![tls::agent_secret(tls::WORKLOAD_CERT)],
                validation_context_type: Some(tls::mesh_peers(&context.trust_domains)),
                alpn_protocols: tls::strings(if is_http {
                    tls::ALPN_HTTP
                } else {
                    tls::alpn_of_bytes(context.view.capabilities)
                }),
                ..CommonTlsContext::default()
            },
            true,
        );
    }
    let names = credentials(settings);
    let certificates: Vec<SdsSecretConfig> = match names.as_slice() {
        [] => file_certificates(settings),
        names => names.iter().map(|name| named(context, name, false, server)).collect(),
    };
    let asks = matches!(settings.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual);
    let validation = asks.then(|| validation(context, settings, &names, server)).flatten();
    if asks && validation.is_none() {
        let what = "client certificates cannot be verified without a CA: handshakes fail";
        context.find(servers::finding(
            server,
            "tls",
            "LAT0405",
            what,
            "set credentialName, caCertCredentialName or caCertificates",
        ));
    }
    downstream(
        CommonTlsContext {
            tls_params: parameters(context, server, settings),
            tls_certificate_sds_secret_configs: certificates,
            // Without roots nobody can be verified, so a context is named that nobody answers.
            validation_context_type: match (asks, validation) {
                (true, None) => Some(tls::validation(Vec::new(), tls::control_plane_secret("invalid://ca"))),
                (_, validation) => validation,
            },
            alpn_protocols: if is_http { tls::strings(tls::ALPN_HTTP) } else { Vec::new() },
            ..CommonTlsContext::default()
        },
        settings.mode == ServerTlsMode::Mutual,
    )
}

fn downstream(common: CommonTlsContext, requires_client_certificate: bool) -> DownstreamTlsContext {
    DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: wire::boolean(requires_client_certificate),
        ..DownstreamTlsContext::default()
    }
}

/// `credentialNames`, or the single `credentialName`. Two at most (RSA and ECDSA).
fn credentials(settings: &ServerTlsSettings) -> Vec<&str> {
    if !settings.credential_names.is_empty() {
        return settings.credential_names.iter().map(String::as_str).take(2).collect();
    }
    if settings.credential_name.is_empty() { Vec::new() } else { vec![&settings.credential_name] }
}

/// A secret by credential name: Istio's URI forms stay, bare names are Secrets.
fn named(context: &Context<'_>, name: &str, is_ca: bool, server: &OpenServer) -> SdsSecretConfig {
    if name == "builtin://" {
        return tls::agent_secret(if is_ca { tls::WORKLOAD_ROOT } else { tls::WORKLOAD_CERT });
    }
    let resource = if name.contains("://") { name.to_owned() } else { format!("kubernetes://{name}") };
    context.want(Wanted {
        resource: resource.clone(),
        is_ca,
        object: server.gateway.clone(),
        field: format!("{}.tls", server.field).into(),
    });
    tls::control_plane_secret(&resource)
}

fn file_certificates(settings: &ServerTlsSettings) -> Vec<SdsSecretConfig> {
    let file = |certificate: &str, key: &str| tls::agent_secret(&format!("file-cert:{certificate}~{key}"));
    if settings.tls_certificates.is_empty() && settings.server_certificate.is_empty() {
        // Refused at admission. A context without any certificate would cost the whole listener.
        return vec![tls::control_plane_secret("invalid://certificate")];
    }
    if settings.tls_certificates.is_empty() {
        return vec![file(&settings.server_certificate, &settings.private_key)];
    }
    settings.tls_certificates.iter().take(2).map(|pair| file(&pair.server_certificate, &pair.private_key)).collect()
}

fn validation(
    context: &Context<'_>,
    settings: &ServerTlsSettings,
    names: &[&str],
    server: &OpenServer,
) -> Option<common_tls_context::ValidationContextType> {
    let roots = if !settings.ca_cert_credential_name.is_empty() {
        named(context, &settings.ca_cert_credential_name, true, server)
    } else if let Some(name) = names.first() {
        let name = if *name == "builtin://" { (*name).to_owned() } else { format!("{name}-cacert") };
        named(context, &name, true, server)
    } else if !settings.ca_certificates.is_empty() {
        tls::agent_secret(&format!("file-root:{}", settings.ca_certificates))
    } else {
        return None;
    };
    #[expect(deprecated, reason = "Istio sends the older field, and older proxies read only that one")]
    let checks = CertificateValidationContext {
        match_subject_alt_names: settings.subject_alt_names.iter().map(|name| matchers::exact(name)).collect(),
        verify_certificate_spki: settings.verify_certificate_spki.clone(),
        verify_certificate_hash: settings.verify_certificate_hash.clone(),
        crl: (!settings.ca_crl.is_empty()).then(|| DataSource {
            specifier: Some(data_source::Specifier::Filename(settings.ca_crl.clone())),
            ..DataSource::default()
        }),
        ..CertificateValidationContext::default()
    };
    Some(tls::combined(checks, roots))
}

/// The server's own versions and suites over `meshConfig.tlsDefaults`; `None` when nothing is said.
fn parameters(context: &Context<'_>, server: &OpenServer, settings: &ServerTlsSettings) -> Option<TlsParameters> {
    let defaults = context.snapshot.mesh_config().tls_defaults.as_ref();
    let version = |written: TlsProtocol, field: &str| match written {
        TlsProtocol::Auto => tls_parameters::TlsProtocol::TlsAuto,
        TlsProtocol::V1_2 => tls_parameters::TlsProtocol::TlSv12,
        TlsProtocol::V1_3 => tls_parameters::TlsProtocol::TlSv13,
        TlsProtocol::V1_0 | TlsProtocol::V1_1 => {
            let what = format!("{written} is not supported; TLS 1.2 is used");
            context.find(servers::finding(server, &format!("tls.{field}"), "LAT0406", &what, "use TLSV1_2 or TLSV1_3"));
            tls_parameters::TlsProtocol::TlSv12
        }
    };
    let minimum = match settings.min_protocol_version {
        TlsProtocol::Auto => defaults.map_or(TlsProtocol::Auto, |defaults| defaults.min_protocol_version),
        written => written,
    };
    let mut suites: Vec<String> = Vec::new();
    let written = if settings.cipher_suites.is_empty() {
        defaults.map_or(&[][..], |defaults| &defaults.cipher_suites)
    } else {
        &settings.cipher_suites
    };
    for suite in written {
        if !suites.contains(suite) {
            suites.push(suite.clone());
        }
    }
    let parameters = TlsParameters {
        tls_minimum_protocol_version: version(minimum, "minProtocolVersion").into(),
        tls_maximum_protocol_version: version(settings.max_protocol_version, "maxProtocolVersion").into(),
        cipher_suites: suites,
        ecdh_curves: defaults.map(|defaults| defaults.ecdh_curves.clone()).unwrap_or_default(),
        ..TlsParameters::default()
    };
    (parameters != TlsParameters::default()).then_some(parameters)
}
