//! Key pairs that gateways are sent: readable, of one another, and valid now.
//!
//! Compiling has neither clock nor cryptography, so it is looked at here. A bad pair is a finding and
//! is not sent: the proxy keeps the last good one, if it has one (property 26).

use std::sync::Arc;
use std::time::SystemTime;

use api::k8s;
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{Secret, secret};
use envoy_types::pb::google::protobuf::Any;
use identity::agent::describe;
use identity::workload::{InvalidIdentity, KeyAndChain, TrustRoots};
use prost::Message;
use types::{Finding, ObjectRef, Severity};

/// What becomes of a secret.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    /// Why it is not sent.
    pub(crate) finding: Option<Finding>,
    /// When the answer will be another one, should nobody touch the secret.
    pub(crate) until: Option<SystemTime>,
}

/// What is wrong: with the certificate or with its key, what, and what to do.
struct Flaw {
    keys: [&'static str; 2],
    message: String,
    hint: &'static str,
}

const CERTIFICATE: [&str; 2] = ["cert", "tls.crt"];
const KEY: [&str; 2] = ["key", "tls.key"];
const ROOTS: [&str; 2] = ["cacert", "ca.crt"];
const REVOKED: [&str; 2] = ["crl", "ca.crl"];

/// Judges a secret that a proxy of `namespace` would be sent; `written` is the object it is made from.
pub(crate) fn check(
    name: &str,
    any: &Any,
    namespace: &str,
    written: impl FnOnce(&str) -> Option<Arc<k8s::Secret>>,
    now: SystemTime,
) -> Checked {
    let (flaw, until) = judge(any, now).unwrap_or_default();
    let finding = flaw.map(|flaw| {
        let object = name.rsplit('/').next().unwrap_or(name);
        let [generic, tls] = flaw.keys;
        // As `compile` picks them.
        let (map, key) = match written(object) {
            Some(secret) if secret.string_data.contains_key(generic) => ("stringData", generic),
            Some(secret) if secret.data.contains_key(generic) => ("data", generic),
            Some(secret) if secret.string_data.contains_key(tls) => ("stringData", tls),
            _ => ("data", tls),
        };
        Finding {
            code: "LAT0501".into(),
            severity: Severity::Error,
            object: Some(ObjectRef::new("Secret", namespace, object)),
            field: format!("{map}.{key}").into(),
            position: None,
            message: format!("{}; gateways keep what they had, or refuse handshakes", flaw.message).into(),
            hint: flaw.hint.into(),
        }
    });
    Checked { finding, until }
}

fn judge(any: &Any, now: SystemTime) -> Option<(Option<Flaw>, Option<SystemTime>)> {
    let secret = Secret::decode(any.value.as_slice()).ok()?;
    let flaw = |keys, message: String, hint| Some(Flaw { keys, message, hint });
    Some(match secret.r#type? {
        secret::Type::TlsCertificate(pair) => {
            let (chain, key) = (inline(pair.certificate_chain.as_ref())?, inline(pair.private_key.as_ref())?);
            match KeyAndChain::from_pem(chain, key).and_then(|pair| pair.facts()) {
                Err(error @ InvalidIdentity::Mismatch) => {
                    (flaw(KEY, describe(&error), "put in the key that the certificate was made for"), None)
                }
                Err(error @ InvalidIdentity::Key(_)) => {
                    (flaw(KEY, describe(&error), "put in the certificate's private key as PEM"), None)
                }
                Err(error) => {
                    (flaw(CERTIFICATE, describe(&error), "put in a certificate chain as PEM, leaf first"), None)
                }
                Ok(facts) if now < facts.not_before => {
                    let message = "the certificate is not valid yet".to_owned();
                    (
                        flaw(CERTIFICATE, message, "use one that is, or correct this machine's clock"),
                        Some(facts.not_before),
                    )
                }
                Ok(facts) if now > facts.not_after => (
                    flaw(CERTIFICATE, "the certificate has expired".to_owned(), "renew it and apply the Secret again"),
                    None,
                ),
                Ok(facts) => (None, Some(facts.not_after)),
            }
        }
        secret::Type::ValidationContext(context) => {
            match (TrustRoots::from_pem(inline(context.trusted_ca.as_ref())?), inline(context.crl.as_ref())) {
                (Err(error), _) => (flaw(ROOTS, describe(&error), "put in the CA's certificate as PEM"), None),
                (Ok(_), None) => (None, None),
                (Ok(roots), Some(lists)) => {
                    let error = roots.revoking(lists).err();
                    let hint = "put in the lists of the CA's as PEM";
                    (error.and_then(|error| flaw(REVOKED, describe(&error), hint)), None)
                }
            }
        }
        secret::Type::SessionTicketKeys(_) | secret::Type::GenericSecret(_) => return None,
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
        let finding = check("kubernetes://web", &any, "edge", |_| None, now).finding?;
        assert_eq!(finding.object.unwrap().to_string(), "Secret edge/web");
        Some(format!("{}: {}", finding.field, finding.message))
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
        assert!(of_pair(&chain, &other, now).unwrap().starts_with("data.tls.key: the private key does not belong"));
        assert!(of_pair("no PEM", &key, now).unwrap().starts_with("data.tls.crt: "));
        assert!(of_pair(&chain, "no PEM", now).unwrap().starts_with("data.tls.key: "));
        let far = now + Duration::from_hours(5000 * 365 * 24);
        assert!(of_pair(&chain, &key, far).unwrap().starts_with("data.tls.crt: the certificate has expired"));
        assert!(
            of_pair(&chain, &key, SystemTime::UNIX_EPOCH - Duration::from_hours(1))
                .is_none_or(|text| text.contains("not valid yet"))
        );
    }

    #[test]
    fn a_pair_is_looked_at_again_when_its_time_is_over() {
        let at = |seconds| rcgen::date_time_ymd(2030, 1, 1) + Duration::from_secs(seconds);
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_893_456_000);
        let signer = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec!["a.example.com".to_owned()]).unwrap();
        (parameters.not_before, parameters.not_after) = (at(0), at(100));
        let pair = TlsCertificate {
            certificate_chain: Some(bytes(&parameters.self_signed(&signer).unwrap().pem())),
            private_key: Some(bytes(&signer.serialize_pem())),
            ..TlsCertificate::default()
        };
        let secret = Secret { name: "x".into(), r#type: Some(secret::Type::TlsCertificate(pair)) };
        let any = Any { type_url: String::new(), value: secret.encode_to_vec() };
        let until = |now: SystemTime| check("kubernetes://web", &any, "edge", |_| None, now).until;
        let (early, good, late) =
            (start - Duration::from_secs(1), start + Duration::from_secs(50), start + Duration::from_secs(101));
        assert_eq!(
            (until(early), until(good), until(late)),
            (Some(start), Some(start + Duration::from_secs(100)), None)
        );
    }

    #[test]
    fn fields_are_those_that_were_written() {
        let written = |text: &str| -> Arc<k8s::Secret> {
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            api::from_json(&value).0.unwrap().typed::<k8s::Secret>().unwrap().clone()
        };
        let secret = Secret {
            name: "x".into(),
            r#type: Some(secret::Type::ValidationContext(CertificateValidationContext {
                trusted_ca: Some(bytes("no PEM")),
                ..Default::default()
            })),
        };
        let any = Any { type_url: String::new(), value: secret.encode_to_vec() };
        for (map, key) in [("data", "cacert"), ("stringData", "ca.crt"), ("data", "ca.crt")] {
            let text = format!(
                r#"{{"apiVersion": "v1", "kind": "Secret", "metadata": {{"name": "web", "namespace": "edge"}}, "{map}": {{"{key}": "eA=="}}}}"#
            );
            let finding = check("kubernetes://web", &any, "edge", |_| Some(written(&text)), SystemTime::now()).finding;
            assert_eq!(&*finding.unwrap().field, format!("{map}.{key}"));
        }
    }

    #[test]
    fn roots() {
        let now = SystemTime::now();
        let of = |text: &str| CertificateValidationContext { trusted_ca: Some(bytes(text)), ..Default::default() };
        assert_eq!(found(secret::Type::ValidationContext(of(&pair().0)), now), None);
        assert!(found(secret::Type::ValidationContext(of("no PEM")), now).is_some());
        let none = "-----BEGIN X509 CRL-----\nAA==\n-----END X509 CRL-----\n";
        let revoking = CertificateValidationContext { crl: Some(bytes(none)), ..of(&pair().0) };
        let told = found(secret::Type::ValidationContext(revoking), now).unwrap();
        assert!(told.starts_with("data.ca.crl: a revocation list cannot be used"), "{told}");
    }
}
