//! The mesh's certificate authority.
//!
//! A certificate says who the *caller* is; nothing in the request but its public key counts
//! (property 28). [`store`] finds or makes the signing key, [`service`] speaks Istio's protocol.
//!
//! A CA is immutable. When its folder holds another bundle, [`Ca::successor`] makes the next one, so
//! that nobody is cut off on the way:
//!
//! ```text
//!            new roots in the folder                 every certificate that came without them has ended
//!  old signer ──────────────────────► old signer, ──────────────────────────────────────────► new signer,
//!  old roots                          all roots                                                all roots
//! ```
//!
//! A signer that all know already, because its key is the old one's or an older root vouches for it, does not wait.
//! What was issued before a restart is not known after it: the folder's signer then signs at once.

pub(crate) mod renewal;
pub mod service;
pub mod store;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use identity::{TrustRoots, WorkloadIdentity, pem, workload::KeyAndChain};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;
use types::{SpiffeId, TrustDomain};

/// Clock skew that peers may have.
const SKEW: Duration = Duration::from_mins(2);
/// Longest request text: an RSA 8192 request with many names stays below.
const CSR_BYTES_MAX: usize = 64 * 1024;

/// Lifetimes of workload certificates.
#[derive(Clone, Copy, Debug)]
pub struct Lifetimes {
    /// When the request names none (`DEFAULT_WORKLOAD_CERT_TTL`).
    pub default: Duration,
    /// More is an error (`MAX_WORKLOAD_CERT_TTL`).
    pub max: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self { default: Duration::from_hours(24), max: Duration::from_hours(90 * 24) }
    }
}

/// A signing certificate with its key.
struct Signer {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// The signing certificate and what lies between it and the root; empty when the root signs.
    intermediates: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl PartialEq for Signer {
    /// A certificate says everything about its key.
    fn eq(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.intermediates == other.intermediates
    }
}

/// Roots that were handed out with certificates, and when the last of these ends.
#[derive(Clone)]
struct HandedOut {
    roots: Arc<TrustRoots>,
    /// Seconds since 1970; zero before the first one.
    until: Arc<AtomicU64>,
}

impl HandedOut {
    fn new(roots: Arc<TrustRoots>) -> Self {
        Self { roots, until: Arc::default() }
    }

    fn issued(&self, not_after: SystemTime) {
        let seconds = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() + 1;
        self.until.fetch_max(seconds, Ordering::Relaxed);
    }

    fn until(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.until.load(Ordering::Relaxed))
    }
}

/// Who signs, for whom, and whom all trust.
pub struct Ca {
    signer: Arc<Signer>,
    now: HandedOut,
    /// What holders of living certificates may have in place of `now.roots`.
    before: Vec<HandedOut>,
    trust_domain: TrustDomain,
    lifetimes: Lifetimes,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

/// Why a certificate is not issued.
#[derive(Debug, Error)]
pub enum SignError {
    /// The request is not a PKCS#10 request in PEM, or its signature is wrong.
    #[error("certificate request is malformed: {0}")]
    Request(rcgen::Error),
    /// The request is too long.
    #[error("certificate request is longer than {CSR_BYTES_MAX} bytes")]
    TooLong,
    /// The key is too weak.
    #[error("the public key has {0} bits, RSA needs 2048 at least")]
    WeakKey(usize),
    /// More lifetime than allowed.
    #[error("requested lifetime {requested:?} is above the maximum {max:?}")]
    Lifetime {
        /// As asked.
        requested: Duration,
        /// As allowed.
        max: Duration,
    },
    /// The CA's own certificate ran out.
    #[error("the CA's certificate has expired")]
    Expired,
    /// Signing failed.
    #[error("cannot sign: {0}")]
    Sign(rcgen::Error),
    /// No random numbers.
    #[error("the system gives no random numbers")]
    Random,
    /// The result cannot be used.
    #[error("what was signed cannot be used")]
    Unusable(#[source] identity::workload::InvalidIdentity),
}

/// An issued chain.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, then intermediates, each one certificate in PEM.
    pub chain: Vec<String>,
    /// All roots in PEM.
    pub roots: String,
    /// End of life.
    pub not_after: SystemTime,
}

impl Ca {
    /// Whose identities it signs.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// What peers must trust.
    pub fn roots(&self) -> &Arc<TrustRoots> {
        &self.now.roots
    }

    /// When the signing certificate ends.
    pub fn not_after(&self) -> SystemTime {
        self.signer.not_after
    }

    /// Whether `other` signs with the same certificate.
    pub fn has_signer_of(&self, other: &Self) -> bool {
        self.signer == other.signer
    }

    /// The CA that takes this one's place while it serves, now that the folder holds `next`: all that is trusted
    /// must stay trusted, but for what has ended, and a signer whom not all know yet waits. `None` when nothing
    /// is to change yet.
    ///
    /// *Source*: `docs/parity.md`, Security CA-2, CA-3, ROT-2.
    pub fn successor(&self, next: Self, now: SystemTime) -> Result<Option<Self>, store::StoreError> {
        let (have, wanted) = (self.roots().certificates(), next.roots().certificates());
        if have.iter().any(|root| store::is_alive(root, now) && !wanted.contains(root)) {
            return Err(store::StoreError::CutsOff);
        }
        let is_same_roots = have == wanted;
        let mut before: Vec<HandedOut> = self.before.iter().filter(|roots| roots.until() > now).cloned().collect();
        let is_known = [&self.now].into_iter().chain(&before).all(|handed| next.is_known_to(&handed.roots, now));
        let signer = if is_known { next.signer } else { Arc::clone(&self.signer) };
        if is_same_roots && signer == self.signer {
            return Ok(None);
        }
        let handed_out = if is_same_roots {
            self.now.clone()
        } else {
            before.push(self.now.clone());
            next.now
        };
        let (trust_domain, lifetimes) = (next.trust_domain, next.lifetimes);
        Ok(Some(Self { signer, now: handed_out, before, trust_domain, lifetimes }))
    }

    /// Whether who trusts `roots` takes what this CA signs.
    fn is_known_to(&self, roots: &Arc<TrustRoots>, now: SystemTime) -> bool {
        self.probe(roots, now).is_ok()
    }

    /// Signs the public key of `csr` for `id`, and nothing else of it. A lifetime of zero means the
    /// default; a longer life than the signer's is cut to it.
    pub fn sign(&self, csr: &str, id: &SpiffeId, lifetime: Duration, now: SystemTime) -> Result<Issued, SignError> {
        if csr.len() > CSR_BYTES_MAX {
            return Err(SignError::TooLong);
        }
        let request = CertificateSigningRequestParams::from_pem(csr).map_err(SignError::Request)?;
        check_strength(&request.public_key)?;
        let lifetime = if lifetime.is_zero() { self.lifetimes.default } else { lifetime };
        if lifetime > self.lifetimes.max {
            return Err(SignError::Lifetime { requested: lifetime, max: self.lifetimes.max });
        }
        let uri = id.to_string().try_into().map_err(SignError::Sign)?;
        let issued = self.issue(&request.public_key, vec![SanType::URI(uri)], now, lifetime)?;
        self.now.issued(issued.not_after);
        Ok(issued)
    }

    /// Makes a certificate and key for the control plane's own servers.
    pub fn serve(&self, dns_names: &[String], now: SystemTime, lifetime: Duration) -> Result<KeyAndChain, SignError> {
        let key = KeyPair::generate().map_err(SignError::Sign)?;
        let names: Result<Vec<SanType>, rcgen::Error> =
            dns_names.iter().map(|name| Ok(SanType::DnsName(name.as_str().try_into()?))).collect();
        let issued = self.issue(&key, names.map_err(SignError::Sign)?, now, lifetime)?;
        let chain = pem::certificates(issued.chain.concat().as_bytes())
            .map_err(identity::workload::InvalidIdentity::Chain)
            .map_err(SignError::Unusable)?;
        KeyAndChain::new(chain, PrivateKeyDer::from(key)).map_err(SignError::Unusable)
    }

    fn issue(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<Issued, SignError> {
        let signer = &self.signer;
        if now >= signer.not_after {
            return Err(SignError::Expired);
        }
        let not_after = (now + lifetime).min(signer.not_after);
        let mut params = CertificateParams::default();
        // The subject stays empty, so that the names are marked critical (RFC 5280, 4.2.1.6).
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = (now - SKEW).into();
        params.not_after = not_after.into();
        params.serial_number = Some(serial()?);
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(key, &signer.issuer).map_err(SignError::Sign)?;
        let mut chain = vec![pem::encode(leaf.der())];
        chain.extend(signer.intermediates.iter().map(pem::encode));
        Ok(Issued { chain, roots: self.roots().to_pem(), not_after })
    }

    /// Signs a throw-away certificate and verifies it as a peer with these roots would: key, certificate,
    /// chain and roots belong together.
    fn probe(&self, roots: &Arc<TrustRoots>, now: SystemTime) -> Result<(), store::StoreError> {
        let wrong = |error: &dyn std::error::Error| store::StoreError::Inconsistent(identity::agent::describe(error));
        let id = SpiffeId::new(self.trust_domain.clone(), "probe", "probe").map_err(|error| wrong(&error))?;
        let key = KeyPair::generate().map_err(|error| wrong(&error))?;
        let uri = id.to_string().try_into().map_err(|error: rcgen::Error| wrong(&error))?;
        let issued =
            self.issue(&key, vec![SanType::URI(uri)], now, Duration::from_hours(1)).map_err(|error| wrong(&error))?;
        let chain = pem::certificates(issued.chain.concat().as_bytes()).map_err(|error| wrong(&error))?;
        let keys = KeyAndChain::new(chain, PrivateKeyDer::from(key)).map_err(|error| wrong(&error))?;
        let identity = WorkloadIdentity::new(keys, Arc::clone(roots), 0).map_err(|error| wrong(&error))?;
        identity.verify_own_chain(now).map_err(|error| wrong(&error))
    }
}

/// 128 random bits, positive (RFC 5280, 4.1.2.2).
fn serial() -> Result<SerialNumber, SignError> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| SignError::Random)?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn check_strength(key: &rcgen::PublicKey) -> Result<(), SignError> {
    let is_rsa = [&rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_RSA_SHA384, &rcgen::PKCS_RSA_SHA512].contains(&key.algorithm());
    // An RSA key in DER is a little longer than its modulus; 2048 bits need 270 bytes.
    let bits = key.der_bytes().len().saturating_sub(14) * 8;
    if is_rsa && bits < 2048 { Err(SignError::WeakKey(bits)) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
