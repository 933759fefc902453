//! What a certificate says about its holder.

use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use types::SpiffeId;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate, X509Name};

use crate::pem;

/// The facts of a verified peer certificate, as policies, logs and `x-forwarded-client-cert` need
/// them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerFacts {
    /// The workload identity: the only URI SAN, when it is a well-formed SPIFFE ID.
    pub id: Option<SpiffeId>,
    /// All URI SANs, in order.
    pub uris: Vec<String>,
    /// All DNS SANs, in order.
    pub dns_names: Vec<String>,
    /// All IP SANs, in order.
    pub ips: Vec<std::net::IpAddr>,
    /// All e-mail SANs, in order.
    pub emails: Vec<String>,
    /// The subject as RFC 2253 writes it; empty for workloads.
    pub subject: String,
    /// The issuer, likewise.
    pub issuer: String,
    /// SHA-256 of the DER, lower-case hexadecimal.
    pub sha256: String,
    /// The serial number, lower-case hexadecimal.
    pub serial: String,
    /// SHA-256 of the public key (SubjectPublicKeyInfo), as pins name it.
    pub spki_sha256: [u8; 32],
    /// Valid from.
    pub not_before: SystemTime,
    /// Valid until.
    pub not_after: SystemTime,
    /// The certificate itself.
    pub certificate: CertificateDer<'static>,
}

/// Why a certificate cannot be read.
#[derive(Debug, Error)]
pub enum InvalidCertificate {
    /// Not X.509.
    #[error("is not an X.509 certificate")]
    Encoding,
    /// A subject alternative name breaks its grammar.
    #[error("has a malformed subject alternative name")]
    AlternativeName,
}

impl PeerFacts {
    /// Reads the leaf of a chain that TLS verified.
    pub fn read(leaf: &CertificateDer<'_>) -> Result<Self, InvalidCertificate> {
        let (rest, parsed) = X509Certificate::from_der(leaf).map_err(|_| InvalidCertificate::Encoding)?;
        if !rest.is_empty() {
            return Err(InvalidCertificate::Encoding);
        }
        let mut facts = Self {
            id: None,
            uris: Vec::new(),
            dns_names: Vec::new(),
            ips: Vec::new(),
            emails: Vec::new(),
            subject: rfc2253(parsed.subject()),
            issuer: rfc2253(parsed.issuer()),
            sha256: pem::hex(digest::digest(&digest::SHA256, leaf).as_ref()),
            serial: pem::hex(parsed.raw_serial()),
            spki_sha256: sha256(parsed.public_key().raw),
            not_before: time(parsed.validity().not_before.timestamp()),
            not_after: time(parsed.validity().not_after.timestamp()),
            certificate: leaf.clone().into_owned(),
        };
        let names = parsed.subject_alternative_name().map_err(|_| InvalidCertificate::AlternativeName)?;
        for name in names.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::URI(uri) => facts.uris.push((*uri).to_owned()),
                GeneralName::DNSName(dns) => facts.dns_names.push((*dns).to_owned()),
                GeneralName::RFC822Name(email) => facts.emails.push((*email).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    if let Ok(v4) = <[u8; 4]>::try_from(*bytes) {
                        facts.ips.push(v4.into());
                    } else if let Ok(v6) = <[u8; 16]>::try_from(*bytes) {
                        facts.ips.push(v6.into());
                    } else {
                        return Err(InvalidCertificate::AlternativeName);
                    }
                }
                GeneralName::Invalid(..) => return Err(InvalidCertificate::AlternativeName),
                _ => {}
            }
        }
        // Two URIs are no identity: which one would count? (property 17)
        if let [only] = facts.uris.as_slice() {
            facts.id = SpiffeId::parse(only).ok();
        }
        Ok(facts)
    }

    /// The certificate as URL-encoded PEM, as `x-forwarded-client-cert` carries it.
    pub fn url_encoded_pem(&self) -> String {
        pem::url_encode(&pem::encode(&self.certificate))
    }

    /// Whether the certificate is valid at `now`.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    sum
}

fn time(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A distinguished name, last part first. *Source*: RFC 2253 section 2, as Envoy prints subjects.
fn rfc2253(name: &X509Name<'_>) -> String {
    let parts: Vec<_> = name.iter_rdn().collect();
    let mut text = String::new();
    for rdn in parts.into_iter().rev() {
        if !text.is_empty() {
            text.push(',');
        }
        for (index, attribute) in rdn.iter().enumerate() {
            if index > 0 {
                text.push('+');
            }
            let key = match attribute.attr_type().to_id_string().as_str() {
                "2.5.4.3" => "CN".to_owned(),
                "2.5.4.6" => "C".to_owned(),
                "2.5.4.7" => "L".to_owned(),
                "2.5.4.8" => "ST".to_owned(),
                "2.5.4.9" => "STREET".to_owned(),
                "2.5.4.10" => "O".to_owned(),
                "2.5.4.11" => "OU".to_owned(),
                "0.9.2342.19200300.100.1.25" => "DC".to_owned(),
                "0.9.2342.19200300.100.1.1" => "UID".to_owned(),
                "1.2.840.113549.1.9.1" => "emailAddress".to_owned(),
                other => other.to_owned(),
            };
            text.push_str(&key);
            text.push('=');
            match attribute.as_str() {
                Ok(value) => escape(&mut text, value),
                Err(_) => {
                    text.push('#');
                    text.push_str(&pem::hex(attribute.as_slice()));
                }
            }
        }
    }
    text
}

fn escape(text: &mut String, value: &str) {
    let last = value.chars().count().saturating_sub(1);
    for (index, character) in value.chars().enumerate() {
        let edge_space = character == ' ' && (index == 0 || index == last);
        if edge_space
            || matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';')
            || (index == 0 && character == '#')
        {
            text.push('\\');
            text.push(character);
        } else if character.is_control() {
            let mut buffer = [0; 4];
            for byte in character.encode_utf8(&mut buffer).bytes() {
                text.push('\\');
                text.push_str(&pem::hex(&[byte]).to_ascii_uppercase());
            }
        } else {
            text.push(character);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn facts(names: &[SanType], subject: &[(DnType, &str)]) -> PeerFacts {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.to_vec();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in subject {
            params.distinguished_name.push(kind.clone(), *value);
        }
        let key = KeyPair::generate().unwrap();
        PeerFacts::read(params.self_signed(&key).unwrap().der()).unwrap()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn one_uri_is_the_identity() {
        let id = "spiffe://cluster.local/ns/shop/sa/reviews";
        let cases: &[(&[SanType], Option<&str>)] = &[
            (&[uri(id)], Some(id)),
            (&[uri(id), SanType::DnsName("a.b".try_into().unwrap())], Some(id)),
            (&[uri(id), uri("spiffe://cluster.local/ns/shop/sa/other")], None),
            (&[uri(id), uri(id)], None),
            (&[uri("https://cluster.local/ns/shop/sa/reviews")], None),
            (&[uri("spiffe://cluster.local/ns/shop/sa/reviews/more")], None),
            (&[SanType::DnsName("reviews.shop".try_into().unwrap())], None),
        ];
        for (names, expect) in cases {
            assert_eq!(facts(names, &[]).id.map(|id| id.to_string()).as_deref(), *expect, "{names:?}");
        }
    }

    #[test]
    fn subjects_are_written_backwards_and_escaped() {
        let facts = facts(&[], &[(DnType::OrganizationName, "A, Inc."), (DnType::CommonName, "#x+y ")]);
        assert_eq!(facts.subject, "CN=\\#x\\+y\\ ,O=A\\, Inc.");
        assert_eq!(facts.sha256.len(), 64);
        assert!(facts.url_encoded_pem().starts_with("-----BEGIN%20CERTIFICATE-----%0A"));
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        assert!(PeerFacts::read(&CertificateDer::from(vec![1, 2, 3])).is_err());
    }
}
