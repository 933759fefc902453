//! Certificates and keys as PEM text.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use thiserror::Error;

/// Why PEM text does not hold what was expected.
#[derive(Debug, Error)]
pub enum InvalidPem {
    /// No certificate in it.
    #[error("holds no certificate (expected -----BEGIN CERTIFICATE-----)")]
    NoCertificate,
    /// No revocation list in it.
    #[error("holds no revocation list (expected -----BEGIN X509 CRL-----)")]
    NoRevocationList,
    /// No private key in it.
    #[error("holds no private key (expected PKCS#8, PKCS#1 or SEC1 in PEM)")]
    NoKey,
    /// It breaks PEM's grammar.
    #[error("is not PEM: {0}")]
    Grammar(rustls::pki_types::pem::Error),
}

/// All certificates, in order; at least one.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, InvalidPem> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    let found = found.map_err(InvalidPem::Grammar)?;
    if found.is_empty() { Err(InvalidPem::NoCertificate) } else { Ok(found) }
}

/// The first private key.
pub fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, InvalidPem> {
    PrivateKeyDer::from_pem_slice(text).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => InvalidPem::NoKey,
        other => InvalidPem::Grammar(other),
    })
}

/// All revocation lists; at least one.
pub fn revocation_lists(text: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, InvalidPem> {
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(text).collect();
    let found = found.map_err(InvalidPem::Grammar)?;
    if found.is_empty() { Err(InvalidPem::NoRevocationList) } else { Ok(found) }
}

/// One certificate as PEM, ending in a newline.
pub fn encode(certificate: &CertificateDer<'_>) -> String {
    block("CERTIFICATE", certificate.as_ref())
}

/// A private key as PEM, ending in a newline. A secret: for those who may have it, never for logs.
pub fn encode_key(key: &PrivateKeyDer<'_>) -> String {
    let label = match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    block(label, key.secret_der())
}

fn block(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let mut text = String::with_capacity(body.len() + body.len() / 64 + 64);
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}

/// Several certificates as one PEM text.
pub fn encode_all(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(encode).collect()
}

/// PEM text as `x-forwarded-client-cert` carries it. *Source*: Envoy's `Cert` field.
pub fn url_encode(pem: &str) -> String {
    let mut text = String::with_capacity(pem.len() * 5 / 4);
    for character in pem.chars() {
        match character {
            '\n' => text.push_str("%0A"),
            ' ' => text.push_str("%20"),
            '+' => text.push_str("%2B"),
            '/' => text.push_str("%2F"),
            '=' => text.push_str("%3D"),
            other => text.push(other),
        }
    }
    text
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_round_trip() {
        let der = CertificateDer::from((0..200).collect::<Vec<u8>>());
        let text = encode_all(&[der.clone(), der.clone()]);
        assert_eq!(certificates(text.as_bytes()).unwrap(), [der.clone(), der]);
        assert!(text.lines().all(|line| line.len() <= 64));
    }

    #[test]
    fn keys_too() {
        for (label, key) in [
            ("PRIVATE KEY", PrivateKeyDer::Pkcs8(vec![1; 99].into())),
            ("EC PRIVATE KEY", PrivateKeyDer::Sec1(vec![2; 99].into())),
            ("RSA PRIVATE KEY", PrivateKeyDer::Pkcs1(vec![3; 99].into())),
        ] {
            let text = encode_key(&key);
            assert!(text.starts_with(&format!("-----BEGIN {label}-----\n")), "{text}");
            assert_eq!(private_key(text.as_bytes()).unwrap(), key);
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(matches!(certificates(b""), Err(InvalidPem::NoCertificate)));
        assert!(matches!(private_key(b"nothing"), Err(InvalidPem::NoKey)));
        assert!(matches!(revocation_lists(b"nothing"), Err(InvalidPem::NoRevocationList)));
        let damaged = b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
        assert!(matches!(certificates(damaged), Err(InvalidPem::Grammar(_))));
    }
}
