//! A workload's certificate, key and trust roots.

use std::cmp::Reverse;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::digest;
use rustls::RootCertStore;
use rustls::client::{VerifierBuilderError, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use thiserror::Error;
use types::SpiffeId;
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use crate::peer::{InvalidCertificate, PeerFacts};
use crate::pem::{self, InvalidPem};
use crate::tls::provider;

/// The certificates one trusts, and what they revoked.
pub struct TrustRoots {
    /// For rustls.
    pub(crate) store: Arc<RootCertStore>,
    /// Revocation lists, which can be read; empty: nothing is checked. Else each certificate of a chain must be on
    /// none of its issuer's, and a list of its issuer that is still valid must be there, as Envoy 1.40 wants it. The
    /// newest come first: rustls looks at the first one of an issuer alone.
    pub(crate) revoked: Vec<CertificateRevocationListDer<'static>>,
    certificates: Vec<CertificateDer<'static>>,
    digest: [u8; 32],
}

impl TrustRoots {
    /// Reads a PEM bundle; each certificate must be usable as a root.
    pub fn from_pem(text: &[u8]) -> Result<Self, InvalidIdentity> {
        let certificates = pem::certificates(text).map_err(InvalidIdentity::Roots)?;
        Self::new(certificates, Vec::new())
    }

    /// These roots, with the lists of a PEM text beside their own.
    pub fn revoking(&self, lists: &[u8]) -> Result<Self, InvalidIdentity> {
        let mut revoked = self.revoked.clone();
        revoked.extend(pem::revocation_lists(lists).map_err(InvalidIdentity::Revoked)?);
        Self::new(self.certificates.clone(), revoked)
    }

    /// From certificates and revocation lists. *Errors*: no certificate, one that is no root, an unreadable list.
    pub fn new(
        certificates: Vec<CertificateDer<'static>>,
        mut revoked: Vec<CertificateRevocationListDer<'static>>,
    ) -> Result<Self, InvalidIdentity> {
        revoked.sort_by_cached_key(|list| Reverse(issued_at(list)));
        let mut store = RootCertStore::empty();
        let mut context = digest::Context::new(&digest::SHA256);
        for certificate in &certificates {
            store.add(certificate.clone()).map_err(InvalidIdentity::Root)?;
            context.update(certificate);
        }
        for list in &revoked {
            context.update(list.as_ref());
        }
        if store.is_empty() {
            return Err(InvalidIdentity::Roots(InvalidPem::NoCertificate));
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(context.finish().as_ref());
        let store = Arc::new(store);
        if !revoked.is_empty() {
            // rustls reads lists when it makes a verifier: a bad one is known here, not at a handshake
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&store), Arc::clone(provider()))
                .with_crls(revoked.iter().cloned())
                .build()
                .map_err(InvalidIdentity::RevocationList)?;
        }
        Ok(Self { store, revoked, certificates, digest })
    }

    /// The roots of the operating system.
    ///
    /// *Errors*: none of the usual bundles exists.
    pub fn system() -> Result<Self, InvalidIdentity> {
        const BUNDLES: &[&str] = &[
            "/etc/ssl/certs/ca-certificates.crt",
            "/etc/pki/tls/certs/ca-bundle.crt",
            "/etc/ssl/ca-bundle.pem",
            "/etc/ssl/cert.pem",
        ];
        let text = BUNDLES.iter().find_map(|path| std::fs::read(path).ok());
        let text = text.ok_or(InvalidIdentity::Roots(InvalidPem::NoCertificate))?;
        let certificates = pem::certificates(&text).map_err(InvalidIdentity::Roots)?;
        // A bundle of the system may hold what rustls does not take; the rest counts.
        let usable =
            certificates.into_iter().filter(|certificate| RootCertStore::empty().add(certificate.clone()).is_ok());
        Self::new(usable.collect(), Vec::new())
    }

    /// The certificates, in the order given.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// When the last of them ends; `None` when none can be read.
    pub fn not_after(&self) -> Option<SystemTime> {
        let facts = self.certificates.iter().filter_map(|root| PeerFacts::read(root).ok());
        facts.map(|facts| facts.not_after).max()
    }

    /// As PEM text.
    pub fn to_pem(&self) -> String {
        pem::encode_all(&self.certificates)
    }
}

/// When a revocation list was issued, in seconds; `None`: it cannot be read.
fn issued_at(list: &CertificateRevocationListDer<'_>) -> Option<i64> {
    let (_, read) = CertificateRevocationList::from_der(list.as_ref()).ok()?;
    Some(read.last_update().timestamp())
}

impl PartialEq for TrustRoots {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for TrustRoots {}

impl fmt::Debug for TrustRoots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustRoots").field("certificates", &self.certificates.len()).finish_non_exhaustive()
    }
}

/// A private key with its certificate chain, leaf first. Immutable.
#[derive(Clone)]
pub struct KeyAndChain {
    certified: Arc<CertifiedKey>,
    key: Arc<PrivateKeyDer<'static>>,
}

impl KeyAndChain {
    /// Reads PEM text. *Errors*: unreadable, or the key is not that of the first certificate.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, InvalidIdentity> {
        let chain = pem::certificates(chain).map_err(InvalidIdentity::Chain)?;
        let key = pem::private_key(key).map_err(InvalidIdentity::Key)?;
        Self::new(chain, key)
    }

    /// Joins a chain and a key. *Errors*: the key cannot be used, or is another's.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, InvalidIdentity> {
        let provider: &CryptoProvider = provider();
        let certified = CertifiedKey::from_der(chain, key.clone_key(), provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => InvalidIdentity::Mismatch,
            other => InvalidIdentity::Unusable(other),
        })?;
        Ok(Self { certified: Arc::new(certified), key: Arc::new(key) })
    }

    /// The private key as PEM: for the proxy whose agent we are, never for logs.
    pub fn key_pem(&self) -> String {
        pem::encode_key(&self.key)
    }

    /// For rustls.
    pub fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// What the leaf says.
    pub fn facts(&self) -> Result<PeerFacts, InvalidIdentity> {
        let leaf = self.certified.end_entity_cert().map_err(InvalidIdentity::Unusable)?;
        PeerFacts::read(leaf).map_err(InvalidIdentity::Leaf)
    }
}

impl fmt::Debug for KeyAndChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyAndChain").field("certificates", &self.certified.cert.len()).finish_non_exhaustive()
    }
}

/// What a workload proves itself with, and whom it trusts. Immutable; renewal makes a new one.
#[derive(Clone, Debug)]
pub struct WorkloadIdentity {
    /// Who the workload is.
    pub id: SpiffeId,
    /// Key and chain: leaf, then intermediates, never the root.
    pub keys: KeyAndChain,
    /// The mesh's roots.
    pub roots: Arc<TrustRoots>,
    /// The leaf's facts.
    pub facts: Arc<PeerFacts>,
    /// Counts renewals of this process, from 1: a cheap key for what is derived.
    pub generation: u64,
}

impl WorkloadIdentity {
    /// Puts an identity together. *Errors*: the leaf has no single SPIFFE ID.
    pub fn new(keys: KeyAndChain, roots: Arc<TrustRoots>, generation: u64) -> Result<Self, InvalidIdentity> {
        let facts = keys.facts()?;
        let id = facts.id.clone().ok_or_else(|| InvalidIdentity::NoSpiffeId(facts.uris.clone()))?;
        Ok(Self { id, keys, roots, facts: Arc::new(facts), generation })
    }

    /// Reads PEM texts: chain, key, roots (files of a mounted identity).
    pub fn from_pem(chain: &[u8], key: &[u8], roots: &[u8]) -> Result<Self, InvalidIdentity> {
        Self::new(KeyAndChain::from_pem(chain, key)?, Arc::new(TrustRoots::from_pem(roots)?), 1)
    }

    /// Valid until.
    pub fn not_after(&self) -> SystemTime {
        self.facts.not_after
    }

    /// Whether a peer that trusts our roots would take our chain at `now`.
    pub fn verify_own_chain(&self, now: SystemTime) -> Result<(), rustls::Error> {
        let [leaf, intermediates @ ..] = self.keys.chain() else { return Ok(()) };
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &rustls::server::ParsedCertificate::try_from(leaf)?,
            &self.roots.store,
            intermediates,
            UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()),
            provider().signature_verification_algorithms.all,
        )
    }
}

/// Why certificate, key and roots do not make an identity.
#[derive(Debug, Error)]
pub enum InvalidIdentity {
    /// The chain is unreadable.
    #[error("certificate chain {0}")]
    Chain(InvalidPem),
    /// The key is unreadable.
    #[error("private key {0}")]
    Key(InvalidPem),
    /// The roots are unreadable.
    #[error("root bundle {0}")]
    Roots(InvalidPem),
    /// A certificate cannot be a root.
    #[error("a certificate of the root bundle cannot be used as a root")]
    Root(#[source] rustls::Error),
    /// The revocation lists are unreadable.
    #[error("revocation list {0}")]
    Revoked(InvalidPem),
    /// What a revocation list holds is none.
    #[error("a revocation list cannot be used")]
    RevocationList(#[source] VerifierBuilderError),
    /// The leaf is unreadable.
    #[error("leaf certificate {0}")]
    Leaf(InvalidCertificate),
    /// The key does not belong to the leaf.
    #[error("the private key does not belong to the certificate")]
    Mismatch,
    /// The crypto provider does not take the key or certificate.
    #[error("certificate or key cannot be used")]
    Unusable(#[source] rustls::Error),
    /// There is no single well-formed SPIFFE ID.
    #[error("the certificate has no single SPIFFE URI, but {0:?}")]
    NoSpiffeId(Vec<String>),
}
