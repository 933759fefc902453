//! Key pairs that gateways are sent: readable, of one another, and valid now.
//!
//! Compiling has neither clock nor cryptography, so it is looked at here. A bad pair is a finding and
//! is not sent: the proxy keeps the last good one, if it has one (property 26).

use std::time::SystemTime;

use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{Secret, secret};
use envoy_types::pb::google::protobuf::Any;
use identity::agent::describe;
use identity::workload::{KeyAndChain, TrustRoots};
use prost::Message;
use types::{Finding, ObjectRef, Severity};

/// What is wrong with a secret that a proxy of `namespace` would be sent; `None` for good ones.
pub(crate) fn check(name: &str, any: &Any, namespace: &str, now: SystemTime) -> Option<Finding> {
    let secret = Secret::decode(any.value.as_slice()).ok()?;
    let message = match secret.r#type? {
        secret::Type::TlsCertificate(pair) => {
            let (chain, key) = (inline(pair.certificate_chain.as_ref())?, inline(pair.private_key.as_ref())?);
            match KeyAndChain::from_pem(chain, key).and_then(|pair| pair.facts()) {
                Err(error) => describe(&error),
                Ok(facts) if now < facts.not_before => "the certificate is not valid yet".to_owned(),
                Ok(facts) if now > facts.not_after => "the certificate has expired".to_owned(),
                Ok(_) => return None,
            }
        }
        secret::Type::ValidationContext(context) => {
            describe(&TrustRoots::from_pem(inline(context.trusted_ca.as_ref())?).err()?)
        }
        secret::Type::SessionTicketKeys(_) | secret::Type::GenericSecret(_) => return None,
    };
    let object = name.rsplit('/').next().unwrap_or(name);
    Some(Finding {
        code: "LAT0501".into(),
        severity: Severity::Error,
        object: Some(ObjectRef::new("Secret", namespace, object)),
        field: "data".into(),
        position: None,
        message: format!("{message}; gateways keep what they had, or refuse handshakes").into(),
        hint: "put a certificate and its key into the Secret".into(),
    })
}

fn inline(source: Option<&DataSource>) -> Option<&[u8]> {
    match source?.specifier.as_ref()? {
        data_source::Specifier::InlineBytes(bytes) => Some(bytes),
        data_source::Specifier::InlineString(text) => Some(text.as_bytes()),
        data_source::Specifier::Filename(_) | data_source::Specifier::EnvironmentVariable(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, TlsCertificate,
    };

    use super::*;

    fn bytes(of: &str) -> DataSource {
        let specifier = Some(data_source::Specifier::InlineBytes(of.as_bytes().to_vec()));
        DataSource { specifier, ..DataSource::default() }
    }

    fn pair() -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec!["a.example.com".to_owned()]).unwrap();
        (parameters.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn found(kind: secret::Type, now: SystemTime) -> Option<String> {
        let secret = Secret { name: "kubernetes://web".into(), r#type: Some(kind) };
        let any = Any { type_url: String::new(), value: secret.encode_to_vec() };
        check("kubernetes://web", &any, "edge", now).map(|finding| {
            assert_eq!(finding.object.unwrap().to_string(), "Secret edge/web");
            finding.message.into()
        })
    }

    fn of_pair(chain: &str, key: &str, now: SystemTime) -> Option<String> {
        let pair = TlsCertificate {
            certificate_chain: Some(bytes(chain)),
            private_key: Some(bytes(key)),
            ..TlsCertificate::default()
        };
        found(secret::Type::TlsCertificate(pair), now)
    }

    #[test]
    fn pairs() {
        let now = SystemTime::now();
        let ((chain, key), (_, other)) = (pair(), pair());
        assert_eq!(of_pair(&chain, &key, now), None);
        assert!(of_pair(&chain, &other, now).unwrap().contains("does not belong"));
        assert!(of_pair("no PEM", &key, now).is_some());
        assert!(of_pair(&chain, "no PEM", now).is_some());
        let far = now + Duration::from_hours(5000 * 365 * 24);
        assert!(of_pair(&chain, &key, far).unwrap().contains("has expired"));
        assert!(
            of_pair(&chain, &key, SystemTime::UNIX_EPOCH - Duration::from_hours(1))
                .is_none_or(|text| text.contains("not valid yet"))
        );
    }

    #[test]
    fn roots() {
        let now = SystemTime::now();
        let of = |text: &str| CertificateValidationContext { trusted_ca: Some(bytes(text)), ..Default::default() };
        assert_eq!(found(secret::Type::ValidationContext(of(&pair().0)), now), None);
        assert!(found(secret::Type::ValidationContext(of("no PEM")), now).is_some());
    }
}
