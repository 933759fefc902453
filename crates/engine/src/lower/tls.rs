//! Transport sockets.
#![expect(deprecated, reason = "an older field that changes nothing")]

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3 as proxy_protocol;
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3 as raw_buffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::google::protobuf::Any;

use super::common::{fingerprint, nothing_left};
use crate::matcher::StringMatcher;
use crate::tls::{
    CertificateSource, DownstreamTls, ProxyProtocol, RootSource, SanKind, SanMatcher, SecretSettings, Source,
    TlsParams, TlsVersion, UpstreamTls, Validation,
};
use crate::unsupported::{Unsupported, Within, each, type_name, unpack};

fn is<M: prost::Name>(any: &Any) -> bool {
    type_name(&any.type_url) == M::full_name()
}

fn typed(socket: &core::TransportSocket) -> Result<&Any, Unsupported> {
    match &socket.config_type {
        Some(core::transport_socket::ConfigType::TypedConfig(any)) => Ok(any),
        None => Err(Unsupported::missing("typed_config")),
    }
}

/// The socket of a filter chain; `None` is plaintext.
pub(super) fn downstream(socket: &core::TransportSocket) -> Result<Option<Arc<DownstreamTls>>, Unsupported> {
    if socket.config_type.is_none() && socket.name == "envoy.transport_sockets.raw_buffer" {
        return Ok(None);
    }
    let any = typed(socket)?;
    if is::<raw_buffer::RawBuffer>(any) {
        return Ok(None);
    }
    let mut context: pb::DownstreamTlsContext = unpack(any, "typed_config")?;
    let common = context.common_tls_context.take().ok_or_else(|| Unsupported::missing("common_tls_context"))?;
    let mut parts = common_parts(common).within("common_tls_context")?;
    if parts.certificates.is_empty() {
        return Err(Unsupported::missing("common_tls_context.tls_certificate_sds_secret_configs"));
    }
    let require_client_certificate = context.require_client_certificate.take().is_some_and(|value| value.value);
    if require_client_certificate && parts.validation.as_ref().is_none_or(|validation| validation.roots.is_none()) {
        return Err(Unsupported::new("require_client_certificate", "needs a validation context with roots"));
    }
    // Stricter or neutral on our side: sessions are never resumed across settings (property 19),
    // the client's suite order is the library's choice, staples are optional.
    context.disable_stateful_session_resumption = false;
    context.session_timeout = None;
    context.prefer_client_ciphers = false;
    context.full_scan_certs_on_sni_mismatch = None;
    context.ocsp_staple_policy = 0;
    if matches!(
        context.session_ticket_keys_type,
        Some(pb::downstream_tls_context::SessionTicketKeysType::DisableStatelessSessionResumption(_))
    ) {
        context.session_ticket_keys_type = None;
    }
    if context.require_sni.take().is_some_and(|value| value.value) {
        return Err(Unsupported::not_built("require_sni"));
    }
    nothing_left(&context)?;
    Ok(Some(Arc::new(DownstreamTls {
        params: parts.params,
        alpn: parts.alpn,
        certificates: parts.certificates,
        validation: parts.validation.take(),
        require_client_certificate,
        fingerprint: fingerprint(any),
    })))
}

/// The socket of a cluster.
pub(super) struct Upstream {
    pub(super) tls: Option<Arc<UpstreamTls>>,
    pub(super) proxy_protocol: Option<ProxyProtocol>,
    pub(super) auto_host_sni: bool,
}

/// Lowers the socket of a cluster.
pub(super) fn upstream(socket: &core::TransportSocket) -> Result<Upstream, Unsupported> {
    let plain = Upstream { tls: None, proxy_protocol: None, auto_host_sni: false };
    if socket.config_type.is_none() && socket.name == "envoy.transport_sockets.raw_buffer" {
        return Ok(plain);
    }
    let any = typed(socket)?;
    if is::<raw_buffer::RawBuffer>(any) {
        return Ok(plain);
    }
    if is::<proxy_protocol::ProxyProtocolUpstreamTransport>(any) {
        let mut wrapper: proxy_protocol::ProxyProtocolUpstreamTransport = unpack(any, "typed_config")?;
        let inner = wrapper.transport_socket.take().ok_or_else(|| Unsupported::missing("transport_socket"))?;
        let mut config = wrapper.config.take().unwrap_or_default();
        let version = match core::proxy_protocol_config::Version::try_from(std::mem::take(&mut config.version)) {
            Ok(core::proxy_protocol_config::Version::V1) => ProxyProtocol::V1,
            Ok(core::proxy_protocol_config::Version::V2) => ProxyProtocol::V2,
            Err(_) => return Err(Unsupported::new("config.version", "is not known")),
        };
        nothing_left(&config).within("config")?;
        nothing_left(&wrapper)?;
        let inner = upstream(&inner).within("transport_socket")?;
        if inner.proxy_protocol.is_some() {
            return Err(Unsupported::new("transport_socket", "must not be PROXY protocol again"));
        }
        return Ok(Upstream { proxy_protocol: Some(version), ..inner });
    }
    let mut context: pb::UpstreamTlsContext = unpack(any, "typed_config")?;
    let common = context.common_tls_context.take().unwrap_or_default();
    let mut parts = common_parts(common).within("common_tls_context")?;
    if parts.certificates.len() > 1 {
        return Err(Unsupported::new("common_tls_context.tls_certificates", "holds more than one certificate"));
    }
    let sni = std::mem::take(&mut context.sni);
    let auto_host_sni = std::mem::take(&mut context.auto_host_sni);
    context.max_session_keys = None;
    context.enforce_rsa_key_usage = None;
    nothing_left(&context)?;
    let tls = UpstreamTls {
        params: parts.params,
        alpn: parts.alpn,
        certificate: parts.certificates.pop(),
        validation: parts.validation.unwrap_or_default(),
        sni: sni.into(),
        fingerprint: fingerprint(any),
    };
    Ok(Upstream { tls: Some(Arc::new(tls)), proxy_protocol: None, auto_host_sni })
}

struct Parts {
    params: TlsParams,
    alpn: Vec<Box<str>>,
    certificates: Vec<CertificateSource>,
    validation: Option<Validation>,
}

fn common_parts(mut common: pb::CommonTlsContext) -> Result<Parts, Unsupported> {
    use pb::common_tls_context::ValidationContextType as Kind;
    let params = common.tls_params.take().map(params).transpose().within("tls_params")?.unwrap_or_default();
    let alpn = std::mem::take(&mut common.alpn_protocols).into_iter().map(Into::into).collect();
    let mut certificates = Vec::new();
    for (index, config) in std::mem::take(&mut common.tls_certificate_sds_secret_configs).into_iter().enumerate() {
        let name = secret_name(config).within_item("tls_certificate_sds_secret_configs", index)?;
        certificates.push(CertificateSource::Secret(name));
    }
    for (index, certificate) in std::mem::take(&mut common.tls_certificates).into_iter().enumerate() {
        let (chain, key) = key_pair(certificate).within_item("tls_certificates", index)?;
        certificates.push(CertificateSource::Static { chain, key });
    }
    let validation = match common.validation_context_type.take() {
        None => None,
        Some(Kind::ValidationContext(context)) => Some(validation(context).within("validation_context")?),
        Some(Kind::ValidationContextSdsSecretConfig(config)) => {
            let name = secret_name(config).within("validation_context_sds_secret_config")?;
            Some(Validation { roots: Some(RootSource::Secret(name)), ..Validation::default() })
        }
        Some(Kind::CombinedValidationContext(mut combined)) => {
            let mut lowered = match combined.default_validation_context.take() {
                Some(context) => {
                    validation(context).within("combined_validation_context.default_validation_context")?
                }
                None => Validation::default(),
            };
            if let Some(config) = combined.validation_context_sds_secret_config.take() {
                let path = "combined_validation_context.validation_context_sds_secret_config";
                lowered.roots = Some(RootSource::Secret(secret_name(config).within(path)?));
            }
            nothing_left(&combined).within("combined_validation_context")?;
            Some(lowered)
        }
        Some(_) => return Err(Unsupported::not_built("validation_context_certificate_provider")),
    };
    nothing_left(&common)?;
    if let Some(validation) = &validation {
        needs_roots(validation).within("validation_context")?;
    }
    Ok(Parts { params, alpn, certificates, validation })
}

/// Without roots nothing is verified: whoever names conditions beside must not believe that they hold. (Envoy refuses
/// the first two as well; it verifies pins alone.)
fn needs_roots(validation: &Validation) -> Result<(), Unsupported> {
    if validation.roots.is_some() {
        return Ok(());
    }
    if !validation.san_matchers.is_empty() {
        return Err(Unsupported::new("match_typed_subject_alt_names", "needs trusted_ca"));
    }
    if validation.crl.is_some() {
        return Err(Unsupported::new("crl", "needs trusted_ca"));
    }
    if !validation.hashes.is_empty() || !validation.spki.is_empty() {
        return Err(Unsupported::not_built("verify_certificate_hash or verify_certificate_spki without trusted_ca"));
    }
    Ok(())
}

/// A secret of the discovery service, or of a bootstrap.
pub fn secret(any: &Any) -> Result<SecretSettings, Unsupported> {
    use pb::secret::Type;
    let message: pb::Secret = unpack(any, "")?;
    match message.r#type {
        Some(Type::TlsCertificate(pair)) => {
            let (chain, key) = key_pair(pair).within("tls_certificate")?;
            Ok(SecretSettings::Certificate { chain, key })
        }
        Some(Type::ValidationContext(context)) => {
            let validation = validation(context).within("validation_context")?;
            if validation.roots.is_none() {
                return Err(Unsupported::missing("validation_context.trusted_ca"));
            }
            Ok(SecretSettings::Validation(validation))
        }
        Some(Type::SessionTicketKeys(_)) => Err(Unsupported::not_built("session_ticket_keys")),
        Some(Type::GenericSecret(_)) => Err(Unsupported::not_built("generic_secret")),
        None => Err(Unsupported::missing("tls_certificate")),
    }
}

/// The name of a secret. Who answers (ADS, the agent) is the proxy's choice by name, so the config
/// source is not looked at.
fn secret_name(config: pb::SdsSecretConfig) -> Result<crate::config::Name, Unsupported> {
    if config.name.is_empty() {
        return Err(Unsupported::missing("name"));
    }
    Ok(config.name.into())
}

fn source(data: core::DataSource) -> Result<Source, Unsupported> {
    use core::data_source::Specifier;
    if data.watched_directory.is_some() {
        return Err(Unsupported::not_built("watched_directory"));
    }
    Ok(match data.specifier {
        Some(Specifier::InlineBytes(bytes)) => Source::Inline(bytes.into()),
        Some(Specifier::InlineString(text)) => Source::Inline(text.into_bytes().into()),
        Some(Specifier::Filename(path)) => Source::File(path.into()),
        Some(Specifier::EnvironmentVariable(name)) => Source::Environment(name.into()),
        None => return Err(Unsupported::missing("specifier")),
    })
}

/// A chain and its key.
fn key_pair(mut proto: pb::TlsCertificate) -> Result<(Source, Source), Unsupported> {
    let chain = proto.certificate_chain.take().ok_or_else(|| Unsupported::missing("certificate_chain"))?;
    let key = proto.private_key.take().ok_or_else(|| Unsupported::missing("private_key"))?;
    // Istio sends what the Secret has; nothing is stapled.
    proto.ocsp_staple = None;
    nothing_left(&proto)?;
    Ok((source(chain).within("certificate_chain")?, source(key).within("private_key")?))
}

fn params(mut proto: pb::TlsParameters) -> Result<TlsParams, Unsupported> {
    use pb::tls_parameters::TlsProtocol;
    let version = |value: i32, path: &str, auto: TlsVersion| match TlsProtocol::try_from(value) {
        Ok(TlsProtocol::TlsAuto) => Ok(auto),
        // Below 1.2 we never go (property 19): an older minimum means 1.2.
        Ok(TlsProtocol::TlSv10 | TlsProtocol::TlSv11) if path == "tls_minimum_protocol_version" => Ok(TlsVersion::V12),
        Ok(TlsProtocol::TlSv12) => Ok(TlsVersion::V12),
        Ok(TlsProtocol::TlSv13) => Ok(TlsVersion::V13),
        _ => Err(Unsupported::new(path, "asks for a TLS version below 1.2, which is never spoken")),
    };
    let min = version(
        std::mem::take(&mut proto.tls_minimum_protocol_version),
        "tls_minimum_protocol_version",
        TlsVersion::V12,
    )?;
    let max = version(
        std::mem::take(&mut proto.tls_maximum_protocol_version),
        "tls_maximum_protocol_version",
        TlsVersion::V13,
    )?;
    let cipher_suites = std::mem::take(&mut proto.cipher_suites).into_iter().map(Into::into).collect();
    let curves = std::mem::take(&mut proto.ecdh_curves).into_iter().map(Into::into).collect();
    nothing_left(&proto)?;
    Ok(TlsParams { min, max, cipher_suites, curves })
}

fn validation(mut proto: pb::CertificateValidationContext) -> Result<Validation, Unsupported> {
    let roots = match (proto.trusted_ca.take(), proto.system_root_certs.take()) {
        (Some(data), None) => Some(RootSource::Static(source(data).within("trusted_ca")?)),
        (None, Some(_)) => Some(RootSource::System),
        (None, None) => None,
        (Some(_), Some(_)) => return Err(Unsupported::new("system_root_certs", "excludes trusted_ca")),
    };
    let mut san_matchers = each(&std::mem::take(&mut proto.match_subject_alt_names), "match_subject_alt_names", |m| {
        Ok(SanMatcher { kind: SanKind::Any, matcher: StringMatcher::lower(m)? })
    })?;
    san_matchers.extend(each(
        &std::mem::take(&mut proto.match_typed_subject_alt_names),
        "match_typed_subject_alt_names",
        |m| {
            use pb::subject_alt_name_matcher::SanType;
            let kind = match SanType::try_from(m.san_type) {
                Ok(SanType::Dns) => SanKind::Dns,
                Ok(SanType::Uri) => SanKind::Uri,
                Ok(SanType::Email) => SanKind::Email,
                Ok(SanType::IpAddress) => SanKind::Ip,
                _ => return Err(Unsupported::not_built("san_type")),
            };
            let matcher = m.matcher.as_ref().ok_or_else(|| Unsupported::missing("matcher"))?;
            Ok(SanMatcher { kind, matcher: StringMatcher::lower(matcher).within("matcher")? })
        },
    )?);
    let hashes = std::mem::take(&mut proto.verify_certificate_hash)
        .into_iter()
        .map(|hash| hash.replace(':', "").to_ascii_lowercase().into())
        .collect();
    let spki = std::mem::take(&mut proto.verify_certificate_spki).into_iter().map(Into::into).collect();
    let crl = proto.crl.take().map(source).transpose().within("crl")?;
    proto.suppress_client_ca_list = false;
    nothing_left(&proto)?;
    Ok(Validation { roots, san_matchers, hashes, spki, crl })
}
