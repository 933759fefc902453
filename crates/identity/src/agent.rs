//! Keeps a workload's certificate fresh.
//!
//! ```text
//!            key + CSR, CreateCertificate                    half of the lifetime
//!  (start) ───────────────────────────────► current identity ────────────────────► again
//!     ▲                  │ failure                               │ failure
//!     └── growing pause ─┘                                       └─ keep it, growing pause
//! ```
//!
//! Each certificate has a new key (Istio's agent does the same). A failed renewal keeps the old
//! certificate. What comes back is checked before it is used: the key is ours, the leaf has one
//! SPIFFE ID, the chain leads to the root that came with it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
use proto::ca::IstioCertificateRequest;
use proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256,
    RsaKeySize,
};
use rustls::pki_types::PrivateKeyDer;
use thiserror::Error;
use tokio::sync::watch;

use crate::channel::{ConnectError, ControlPlane};
use crate::pem::{self, InvalidPem};
use crate::workload::{InvalidIdentity, KeyAndChain, TrustRoots, WorkloadIdentity};

/// What kind of key a certificate is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KeyKind {
    /// ECDSA over P-256. Handshakes cost a fraction of RSA's, so this is our default.
    #[default]
    EcdsaP256,
    /// ECDSA over P-384.
    EcdsaP384,
    /// RSA with 2048 bits, Istio's default.
    Rsa2048,
}

/// How an agent asks and when it renews.
#[derive(Clone, Debug)]
pub struct Options {
    /// The CA.
    pub ca: ControlPlane,
    /// Wanted lifetime (`SECRET_TTL`).
    pub ttl: Duration,
    /// Share of the lifetime that is left when renewal starts (`SECRET_GRACE_PERIOD_RATIO`).
    pub grace_ratio: f64,
    /// Spread of that share, either way (`SECRET_GRACE_PERIOD_RATIO_JITTER`).
    pub grace_jitter: f64,
    /// The key.
    pub key: KeyKind,
    /// Hints for the CA: `WorkloadName`, `WorkloadIP`, `ClusterID`.
    pub hints: Vec<(String, String)>,
}

impl Options {
    /// Istio's defaults: a day, renewed at half.
    pub fn new(ca: ControlPlane) -> Self {
        Self {
            ca,
            ttl: Duration::from_hours(24),
            grace_ratio: 0.5,
            grace_jitter: 0.01,
            key: KeyKind::default(),
            hints: Vec::new(),
        }
    }
}

/// The current identity; `None` until the first certificate came.
pub type Identities = watch::Receiver<Option<Arc<WorkloadIdentity>>>;

/// Why a certificate was not issued.
#[derive(Debug, Error)]
pub enum IssueError {
    /// No key or request could be made.
    #[error("cannot make a key or certificate request")]
    Request(#[source] rcgen::Error),
    /// The CA cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The CA refused.
    #[error("the CA refused: {code}: {message}")]
    Refused {
        /// gRPC's code.
        code: tonic::Code,
        /// The CA's words.
        message: String,
    },
    /// Leaf and root at least must come back.
    #[error("the CA sent {0} certificates, a leaf and a root at least are needed")]
    Chain(usize),
    /// What came back is unreadable.
    #[error("the CA's answer {0}")]
    Pem(InvalidPem),
    /// What came back does not fit.
    #[error("the CA's answer is unusable")]
    Unusable(#[source] InvalidIdentity),
    /// The chain does not lead to the root that came with it.
    #[error("the chain does not lead to the root that came with it")]
    Untrusted(#[source] rustls::Error),
}

/// Runs the renewal. Made by [`Agent::new`], run by [`Agent::run`].
#[derive(Debug)]
pub struct Agent {
    options: Options,
    identities: watch::Sender<Option<Arc<WorkloadIdentity>>>,
    errors: watch::Sender<Option<Arc<IssueError>>>,
}

/// First and longest pause between attempts.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// One call takes no longer.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

impl Agent {
    /// An agent and what it publishes.
    pub fn new(options: Options) -> (Self, Identities) {
        let (identities, receiver) = watch::channel(None);
        let (errors, _) = watch::channel(None);
        (Self { options, identities, errors }, receiver)
    }

    /// The last failure; `None` after a success.
    pub fn errors(&self) -> watch::Receiver<Option<Arc<IssueError>>> {
        self.errors.subscribe()
    }

    /// Issues and renews until every receiver of identities is gone. *Cancel safety*: dropping
    /// the future stops renewal; the identity published last stays.
    pub async fn run(self) {
        let mut generation = 1;
        let mut failures = 0_u32;
        loop {
            let current = self.identities.borrow().clone();
            let wait = match issue(&self.options, current.as_deref(), generation).await {
                Ok(identity) => {
                    tracing::info!(id = %identity.id, serial = identity.facts.serial, "certificate issued");
                    failures = 0;
                    generation += 1;
                    self.errors.send_replace(None);
                    let wait = renewal(&self.options, SystemTime::now(), identity.not_after());
                    self.identities.send_replace(Some(Arc::new(identity)));
                    wait
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    let pause = PAUSE_FIRST.saturating_mul(1 << failures.min(16).saturating_sub(1)).min(PAUSE_MAX);
                    let pause = pause.mul_f64(0.5 + 0.5 * draw());
                    tracing::warn!(error = %describe(&error), ?pause, "no certificate was issued; what is at hand stays, and another try follows");
                    self.errors.send_replace(Some(Arc::new(error)));
                    pause
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.identities.closed() => return,
            }
        }
    }
}

/// An error with its causes, on one line.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let words = inner.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = inner.source();
    }
    text
}

/// Asks for one certificate.
pub async fn issue(
    options: &Options,
    current: Option<&WorkloadIdentity>,
    generation: u64,
) -> Result<WorkloadIdentity, IssueError> {
    let key = generate(options.key).map_err(IssueError::Request)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&key).and_then(|csr| csr.pem()).map_err(IssueError::Request)?;
    let channel = options.ca.connect(current).await?;
    let mut request = tonic::Request::new(IstioCertificateRequest {
        csr,
        validity_duration: i64::try_from(options.ttl.as_secs()).unwrap_or(i64::MAX),
        metadata: hints(&options.hints),
    });
    *request.metadata_mut() = options.ca.metadata()?;
    request.set_timeout(CALL_TIMEOUT);
    let mut client = IstioCertificateServiceClient::new(channel);
    let response = client
        .create_certificate(request)
        .await
        .map_err(|status| IssueError::Refused { code: status.code(), message: status.message().to_owned() })?;
    accept(&response.into_inner().cert_chain, key, generation)
}

/// Checks what the CA sent: leaf, intermediates, and roots in the last element.
fn accept(answer: &[String], key: KeyPair, generation: u64) -> Result<WorkloadIdentity, IssueError> {
    let [chain @ .., roots] = answer else { return Err(IssueError::Chain(0)) };
    if chain.is_empty() {
        return Err(IssueError::Chain(answer.len()));
    }
    let chain = pem::certificates(chain.concat().as_bytes()).map_err(IssueError::Pem)?;
    let roots = TrustRoots::from_pem(roots.as_bytes()).map_err(IssueError::Unusable)?;
    let keys = KeyAndChain::new(chain, PrivateKeyDer::from(key)).map_err(IssueError::Unusable)?;
    let identity = WorkloadIdentity::new(keys, Arc::new(roots), generation).map_err(IssueError::Unusable)?;
    identity.verify_own_chain(SystemTime::now()).map_err(IssueError::Untrusted)?;
    Ok(identity)
}

fn generate(kind: KeyKind) -> Result<KeyPair, rcgen::Error> {
    match kind {
        KeyKind::EcdsaP256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256),
        KeyKind::EcdsaP384 => KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384),
        KeyKind::Rsa2048 => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048),
    }
}

fn hints(hints: &[(String, String)]) -> Option<Struct> {
    let text = |text: &String| Value { kind: Some(Kind::StringValue(text.clone())) };
    let fields: HashMap<_, _> = hints.iter().map(|(name, value)| (name.clone(), text(value))).collect();
    (!fields.is_empty()).then_some(Struct { fields })
}

/// How long until renewal: at the grace share of the lifetime from now, spread a little. (The
/// certificate itself begins earlier, to allow for skew.)
fn renewal(options: &Options, issued: SystemTime, not_after: SystemTime) -> Duration {
    let lifetime = not_after.duration_since(issued).unwrap_or_default();
    let spread = options.grace_jitter * (2.0 * draw() - 1.0);
    let ratio = (options.grace_ratio + spread).clamp(0.0, 1.0);
    let left = not_after.duration_since(SystemTime::now()).unwrap_or_default();
    left.saturating_sub(lifetime.mul_f64(ratio)).max(Duration::from_millis(100))
}

/// A number in `[0, 1)`.
fn draw() -> f64 {
    let mut bytes = [0_u8; 4];
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) => f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0),
        Err(_) => 0.5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::PlainTcp;

    fn options() -> Options {
        Options::new(ControlPlane {
            address: "127.0.0.1:1".to_owned(),
            server_name: "istiod.istio-system.svc".to_owned(),
            roots: None,
            token: None,
            cluster_id: "Kubernetes".to_owned(),
            tcp: Arc::new(PlainTcp),
        })
    }

    #[test]
    fn renewal_is_at_half_of_the_life() {
        let now = SystemTime::now();
        let day = Duration::from_hours(24);
        let wait = renewal(&options(), now, now + day).as_secs_f64() / day.as_secs_f64();
        assert!((0.48..0.52).contains(&wait), "{wait}");
        assert!(renewal(&options(), now - day, now) <= Duration::from_millis(100));
    }

    #[test]
    fn an_answer_of_one_certificate_is_refused() {
        for answer in [vec![], vec![String::new()]] {
            let key = generate(KeyKind::EcdsaP256).unwrap();
            assert!(matches!(accept(&answer, key, 1), Err(IssueError::Chain(_))));
        }
    }

    #[test]
    fn a_certificate_for_another_key_is_refused() {
        let root_key = KeyPair::generate().unwrap();
        let mut root = CertificateParams::default();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = rcgen::CertifiedIssuer::self_signed(root, root_key).unwrap();
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![rcgen::SanType::URI("spiffe://cluster.local/ns/a/sa/b".try_into().unwrap())];
        let ours = KeyPair::generate().unwrap();
        let signed = |key: &KeyPair| vec![leaf.signed_by(key, &root).unwrap().pem(), root.pem()];
        let theirs = signed(&KeyPair::generate().unwrap());
        let good = signed(&ours);
        assert!(matches!(
            accept(&theirs, KeyPair::generate().unwrap(), 1),
            Err(IssueError::Unusable(InvalidIdentity::Mismatch))
        ));
        let identity = accept(&good, ours, 1).unwrap();
        assert_eq!(identity.id.to_string(), "spiffe://cluster.local/ns/a/sa/b");
    }

    #[test]
    fn a_chain_to_another_root_is_refused() {
        let make_root = || {
            let mut root = CertificateParams::default();
            root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            rcgen::CertifiedIssuer::self_signed(root, KeyPair::generate().unwrap()).unwrap()
        };
        let (root, other) = (make_root(), make_root());
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![rcgen::SanType::URI("spiffe://cluster.local/ns/a/sa/b".try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let answer = vec![leaf.signed_by(&key, &root).unwrap().pem(), other.pem()];
        assert!(matches!(accept(&answer, key, 1), Err(IssueError::Untrusted(_))));
    }
}
