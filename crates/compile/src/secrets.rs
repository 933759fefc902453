//! Secrets that gateway servers and DestinationRules name, from the Secrets of the proxy's own namespace.
//!
//! Source: `docs/parity.md`, Traffic 3.6, 4.3 "Certificates", Security TLSO-2, property 29: a secret goes
//! only to the namespace it is of. Whether a certificate, its key and roots are any good is judged where there
//! are a clock and cryptography.

use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret,
};
use types::{Finding, ObjectRef, Severity};

use crate::context::Context;

/// A secret that some object names.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Wanted {
    /// `kubernetes://name`
    pub(crate) resource: String,
    /// Roots, else a certificate with its key.
    pub(crate) is_ca: bool,
    /// Who names it.
    pub(crate) object: ObjectRef,
    /// Where.
    pub(crate) field: Box<str>,
}

/// Secrets by name; of each that is not there or not usable, a finding about who names it.
pub(crate) fn answers(context: &Context<'_>) -> Vec<Secret> {
    let wanted = context.take_wanted();
    let mut out: Vec<Secret> = wanted.iter().filter_map(|wanted| answer(context, wanted)).collect();
    // Several may name one secret; the answer is the same.
    out.dedup_by(|a, b| a.name == b.name);
    out
}

fn answer(context: &Context<'_>, wanted: &Wanted) -> Option<Secret> {
    match find(context, wanted) {
        Ok(kind) => Some(Secret { name: wanted.resource.clone(), r#type: Some(kind) }),
        Err(what) => {
            context.find(Finding {
                code: "LAT0407".into(),
                severity: Severity::Error,
                object: Some(wanted.object.clone()),
                field: wanted.field.clone(),
                position: None,
                message: format!("{what}; handshakes that need it fail").into(),
                hint: format!("create the Secret in namespace {}, where the proxy runs", context.view.namespace).into(),
            });
            None
        }
    }
}

fn find(context: &Context<'_>, wanted: &Wanted) -> Result<secret::Type, String> {
    let own = &*context.view.namespace;
    let Some(("kubernetes" | "kubernetes-gateway", path)) = wanted.resource.split_once("://") else {
        return Err(format!("{:?} is not a credential that can be read", wanted.resource));
    };
    let name = match path.split_once('/') {
        None => path,
        Some((namespace, name)) if namespace == own => name,
        Some((namespace, _)) => {
            return Err(format!("Secret {path} is of namespace {namespace}, and the proxy runs in {own}"));
        }
    };
    if !wanted.is_ca {
        let object = context.snapshot.secret(own, name).ok_or_else(|| format!("there is no Secret {own}/{name}"))?;
        let (certificate, key) = [("cert", "key"), ("tls.crt", "tls.key")]
            .iter()
            .find_map(|(certificate, key)| Some((object.spec.value(certificate)?, object.spec.value(key)?)))
            .ok_or_else(|| format!("Secret {own}/{name} has neither tls.crt and tls.key nor cert and key"))?;
        return Ok(secret::Type::TlsCertificate(TlsCertificate {
            certificate_chain: Some(inline(certificate)),
            private_key: Some(inline(key)),
            ..TlsCertificate::default()
        }));
    }
    // The CA stands in a Secret of its own, or beside the certificate.
    let beside = name.strip_suffix("-cacert");
    let found = [Some(name), beside].into_iter().flatten().find_map(|name| {
        let spec = &context.snapshot.secret(own, name)?.spec;
        let roots = spec.value("cacert").or_else(|| spec.value("ca.crt"))?;
        Some((name, roots, spec.value("crl").or_else(|| spec.value("ca.crl"))))
    });
    let (name, roots, revoked) = found.ok_or_else(|| match beside {
        Some(beside) => format!("neither Secret {own}/{name} nor {own}/{beside} has cacert or ca.crt"),
        None => format!("there is no Secret {own}/{name} with cacert or ca.crt"),
    })?;
    if let Some(revoked) = revoked {
        check_crl(revoked).map_err(|()| format!("the revocation list of Secret {own}/{name} is not PEM"))?;
    }
    Ok(secret::Type::ValidationContext(CertificateValidationContext {
        trusted_ca: Some(inline(roots)),
        crl: revoked.map(inline),
        ..CertificateValidationContext::default()
    }))
}

fn inline(bytes: &[u8]) -> DataSource {
    DataSource { specifier: Some(data_source::Specifier::InlineBytes(bytes.to_vec())), ..DataSource::default() }
}

/// Whether some PEM block of a revocation list begins and ends.
fn check_crl(bytes: &[u8]) -> Result<(), ()> {
    let text = std::str::from_utf8(bytes).map_err(|_| ())?;
    let mut blocks = text.split("-----BEGIN ").skip(1).filter_map(|rest| rest.split_once("-----"));
    let (label, body) = blocks.find(|(label, _)| label.ends_with("CRL")).ok_or(())?;
    if body.contains(&format!("-----END {label}-----")) { Ok(()) } else { Err(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_blocks() {
        let block = |label: &str| format!("text\n-----BEGIN {label}-----\nAA==\n-----END {label}-----\n");
        assert!(check_crl(block("X509 CRL").as_bytes()).is_ok());
        assert!(check_crl((block("CERTIFICATE") + &block("X509 CRL")).as_bytes()).is_ok());
        for bad in [String::new(), "AA==".into(), "-----BEGIN X509 CRL-----\nAA==".into(), block("PUBLIC KEY")] {
            assert!(check_crl(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
