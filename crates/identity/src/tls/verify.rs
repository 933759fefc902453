//! Checking a peer's certificate: chain first, then names, then pins.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme};

use super::InvalidTls;
use crate::peer::PeerFacts;
use crate::workload::TrustRoots;

/// Which names of a certificate a rule looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SanKind {
    /// URIs.
    Uri,
    /// DNS names; an exact rule also matches a certificate's `*.` name, for one label.
    Dns,
    /// IP addresses.
    Ip,
    /// E-mail addresses.
    Email,
    /// Any of them (Istio's `subjectAltNames`).
    Any,
}

/// How a name is compared.
#[derive(Clone)]
pub enum SanRule {
    /// Equal.
    Exact(String),
    /// Starts so.
    Prefix(String),
    /// Ends so.
    Suffix(String),
    /// Holds this.
    Contains(String),
    /// A test of the caller's (regular expressions).
    Test(Arc<dyn Fn(&str) -> bool + Send + Sync>),
}

impl fmt::Debug for SanRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => write!(f, "={text}"),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Contains(text) => write!(f, "*{text}*"),
            Self::Test(_) => f.write_str("test"),
        }
    }
}

/// A rule over the names of a certificate.
#[derive(Clone, Debug)]
pub struct SanMatch {
    /// Which names.
    pub kind: SanKind,
    /// How.
    pub rule: SanRule,
}

impl SanMatch {
    /// A URI that is equal.
    pub fn uri(exact: impl Into<String>) -> Self {
        Self { kind: SanKind::Uri, rule: SanRule::Exact(exact.into()) }
    }

    /// A URI that starts so (`spiffe://<trust domain>/`).
    pub fn uri_prefix(prefix: impl Into<String>) -> Self {
        Self { kind: SanKind::Uri, rule: SanRule::Prefix(prefix.into()) }
    }

    fn matches(&self, facts: &PeerFacts) -> bool {
        let in_list = |list: &[String]| list.iter().any(|name| self.rule.matches(name));
        let uri = || in_list(&facts.uris);
        let dns = || facts.dns_names.iter().any(|name| self.rule.matches_dns(name));
        let ip = || facts.ips.iter().any(|ip| self.rule.matches(&ip.to_string()));
        let email = || in_list(&facts.emails);
        match self.kind {
            SanKind::Uri => uri(),
            SanKind::Dns => dns(),
            SanKind::Ip => ip(),
            SanKind::Email => email(),
            SanKind::Any => uri() || dns() || ip() || email(),
        }
    }
}

impl SanRule {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(text) => name == text,
            Self::Prefix(text) => name.starts_with(text.as_str()),
            Self::Suffix(text) => name.ends_with(text.as_str()),
            Self::Contains(text) => name.contains(text.as_str()),
            Self::Test(test) => test(name),
        }
    }

    /// DNS names have no case, and `*.` in a certificate stands for exactly one label.
    fn matches_dns(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        let Self::Exact(text) = self else { return self.matches(&name) };
        let text = text.to_ascii_lowercase();
        if name == text {
            return true;
        }
        let (Some(parent), Some((label, rest))) = (name.strip_prefix("*."), text.split_once('.')) else {
            return false;
        };
        !label.is_empty() && rest == parent
    }
}

/// What kind of names count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NameForm {
    /// The leaf must carry exactly one URI and it must be a SPIFFE ID; nothing else identifies.
    Spiffe,
    /// Any chain of the roots, as far as the rules allow.
    Chain,
    /// The leaf must be for the server name of the connection (servers only).
    ServerName,
}

/// How a peer's certificate is checked: by its roots, its names and its pins. All that is given must hold, and of the
/// two kinds of pins one.
#[derive(Clone, Debug)]
pub struct Verify {
    /// Where a chain must end.
    pub roots: Arc<TrustRoots>,
    /// What kind of names count.
    pub form: NameForm,
    /// At least one of these matches; empty: no rule.
    pub sans: Vec<SanMatch>,
    /// SHA-256 of public keys.
    pub spki_pins: Vec<[u8; 32]>,
    /// SHA-256 of leaves, lower-case hexadecimal.
    pub certificate_pins: Vec<String>,
}

impl Verify {
    /// Mesh TLS: one SPIFFE ID from the roots, matching one of `sans`.
    pub fn mesh(roots: Arc<TrustRoots>, sans: Vec<SanMatch>) -> Self {
        Self { roots, form: NameForm::Spiffe, sans, spki_pins: Vec::new(), certificate_pins: Vec::new() }
    }

    /// Any certificate of the roots matching one of `sans` (a gateway's `MUTUAL`).
    pub fn chain(roots: Arc<TrustRoots>, sans: Vec<SanMatch>) -> Self {
        Self { roots, form: NameForm::Chain, sans, spki_pins: Vec::new(), certificate_pins: Vec::new() }
    }

    /// The rules beyond the chain; the reason of a refusal is for our own logs, the peer sees an alert.
    fn check(&self, leaf: &CertificateDer<'_>) -> Result<(), Error> {
        let facts = PeerFacts::read(leaf).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.form == NameForm::Spiffe && facts.id.is_none() {
            return Err(refuse(format!("certificate has no single SPIFFE URI, but {:?}", facts.uris)));
        }
        if !self.sans.is_empty() && !self.sans.iter().any(|san| san.matches(&facts)) {
            let names = [facts.uris.as_slice(), facts.dns_names.as_slice()].concat();
            return Err(refuse(format!("certificate names {names:?} match none of {:?}", self.sans)));
        }
        let has_pins = !self.spki_pins.is_empty() || !self.certificate_pins.is_empty();
        let is_pinned = self.spki_pins.contains(&facts.spki_sha256) || self.certificate_pins.contains(&facts.sha256);
        if has_pins && !is_pinned {
            return Err(refuse("neither the certificate nor its public key is one of the pinned ones".to_owned()));
        }
        Ok(())
    }

    pub(super) fn for_clients(
        &self,
        provider: &Arc<CryptoProvider>,
        mandatory: bool,
    ) -> Result<Arc<dyn ClientCertVerifier>, InvalidTls> {
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots.store), Arc::clone(provider))
            .with_crls(self.roots.revoked.iter().cloned())
            .enforce_revocation_expiration();
        let builder = if mandatory { builder } else { builder.allow_unauthenticated() };
        let chain = builder.build().map_err(InvalidTls::Verifier)?;
        Ok(Arc::new(ClientVerifier { chain, verify: self.clone() }))
    }

    pub(super) fn for_servers(
        &self,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ServerCertVerifier>, InvalidTls> {
        let revocation = if self.roots.revoked.is_empty() {
            None
        } else {
            let builder =
                WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots.store), Arc::clone(provider))
                    .with_crls(self.roots.revoked.iter().cloned())
                    .enforce_revocation_expiration();
            Some(builder.build().map_err(InvalidTls::Verifier)?)
        };
        Ok(Arc::new(ServerVerifier { verify: Some(self.clone()), revocation, provider: Arc::clone(provider) }))
    }

    /// Takes every server (`insecureSkipVerify`), but still checks that it holds its key.
    pub(super) fn nothing(provider: &Arc<CryptoProvider>) -> Arc<dyn ServerCertVerifier> {
        Arc::new(ServerVerifier { verify: None, revocation: None, provider: Arc::clone(provider) })
    }
}

fn refuse(reason: String) -> Error {
    tracing::debug!(reason, "peer certificate refused");
    let reason: Box<dyn std::error::Error + Send + Sync> = reason.into();
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::from(reason))))
}

#[derive(Debug)]
struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    verify: Verify,
}

impl ClientCertVerifier for ClientVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        self.verify.check(leaf)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[derive(Debug)]
struct ServerVerifier {
    /// `None`: everything is taken.
    verify: Option<Verify>,
    /// Only with revocation lists.
    revocation: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerVerifier {
    /// Chain, dates, usage and constraints, without names.
    fn verify_chain(
        &self,
        verify: &Verify,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &verify.roots.store, intermediates, now, algorithms)?;
        let Some(revocation) = &self.revocation else { return Ok(()) };
        // rustls offers revocation for servers only together with a name, which it checks last: a
        // name that no certificate has ends in exactly that error when all else holds.
        let nobody =
            ServerName::try_from("revocation.invalid").map_err(|_| Error::General("server name".to_owned()))?;
        match revocation.verify_server_cert(leaf, intermediates, &nobody, &[], now) {
            Ok(_)
            | Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(verify) = &self.verify else { return Ok(ServerCertVerified::assertion()) };
        self.verify_chain(verify, leaf, intermediates, now)?;
        if verify.form == NameForm::ServerName {
            verify_server_name(&ParsedCertificate::try_from(leaf)?, server_name)?;
        }
        verify.check(leaf)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, leaf, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
