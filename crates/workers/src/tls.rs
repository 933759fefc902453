//! TLS contexts: built from a chain's or cluster's settings and the secrets of the moment, cached
//! per worker until either changes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use engine::config::NameHasher;
use engine::exchange::Attempt;
use engine::facts::{PeerCertificate, TlsFacts};
use engine::tls::{self as settings, CertificateSource, DownstreamTls, RootSource, UpstreamTls, Validation};
use identity::peer::PeerFacts;
use identity::tls::{
    Bounds, ClientAuth, ClientTls, NameForm, SanKind, SanMatch, SanRule, ServerConfigs, ServerTls, TlsVersion, Verify,
};
use identity::workload::{KeyAndChain, TrustRoots};
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use thiserror::Error;

use crate::secrets::{ROOTS, SecretStore, Secrets, Trust, Unreadable, read, revoking};

/// Why there is no TLS context.
#[derive(Debug, Error)]
pub(crate) enum NoContext {
    #[error("secret {0} is not there")]
    SecretMissing(String),
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error("TLS settings are not usable: {0}")]
    Settings(#[from] identity::tls::InvalidTls),
    #[error("a pin is not base64 of a SHA-256")]
    Pin,
}

/// Contexts of one worker.
#[derive(Debug)]
pub(crate) struct Contexts {
    secrets: Secrets,
    servers: RefCell<HashMap<u64, Server>>,
    /// By the settings' fingerprint; few for each.
    clients: RefCell<HashMap<u64, Vec<Client>, NameHasher>>,
}

/// What a context was built from; while these are the same, so is the context.
#[derive(Clone, Debug, Default)]
struct Parts {
    certificates: Vec<Arc<KeyAndChain>>,
    trusted: Option<Trusted>,
}

/// How a peer is verified.
#[derive(Clone, Debug)]
struct Trusted {
    /// As the secret or the settings give it.
    by: Arc<Trust>,
    /// Its roots, with the revocation lists of the settings.
    roots: Arc<TrustRoots>,
}

impl Parts {
    fn same(&self, other: &Self) -> bool {
        let trusted = match (&self.trusted, &other.trusted) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(&a.by, &b.by),
            _ => false,
        };
        trusted
            && self.certificates.len() == other.certificates.len()
            && self.certificates.iter().zip(&other.certificates).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

/// A context of a filter chain.
#[derive(Clone, Debug)]
struct Server {
    parts: Parts,
    configs: ServerConfigs,
    /// The first URI of the first certificate.
    own_uri: Option<Arc<str>>,
}

/// A context of an upstream's settings.
#[derive(Debug)]
struct Client {
    alpn: Box<[Box<str>]>,
    san: Option<Arc<str>>,
    named: bool,
    parts: Parts,
    /// Of the secrets that the parts were last looked up in.
    version: u64,
    config: Arc<ClientConfig>,
}

impl Client {
    /// Whether it is the one for `attempt`, as far as the attempt decides.
    fn fits(&self, attempt: &Attempt) -> bool {
        self.named == attempt.sni.is_some()
            && self.san == attempt.required_san
            && *self.alpn == *attempt.alpn.list(&attempt.transport)
    }
}

/// Contexts of one upstream's settings before they are forgotten: a client who may choose the name that a server
/// has to prove would make one for each.
const VARIANTS_MAX: usize = 64;

/// Contexts kept before all are forgotten (they are rebuilt on use).
const CACHED_MAX: usize = 4096;

impl Contexts {
    pub(crate) fn new(secrets: Secrets) -> Self {
        Self { secrets, servers: RefCell::default(), clients: RefCell::default() }
    }

    /// The context of a filter chain, with the certificates of now.
    pub(crate) fn server(&self, tls: &DownstreamTls) -> Result<ServerConfigs, NoContext> {
        let store = self.secrets.load();
        let cached = self.servers.borrow().get(&tls.fingerprint).cloned();
        let parts = Parts {
            certificates: tls
                .certificates
                .iter()
                .enumerate()
                .map(|(at, source)| {
                    certificate(&store, source, cached.as_ref().and_then(|server| server.parts.certificates.get(at)))
                })
                .collect::<Result<_, _>>()?,
            trusted: trusted(&store, tls.validation.as_ref(), cached.as_ref().map(|server| &server.parts))?,
        };
        if let Some(server) = cached
            && server.parts.same(&parts)
        {
            return Ok(server.configs);
        }
        let client_auth = match (&tls.validation, &parts.trusted) {
            (Some(validation), Some(trusted)) => {
                let verify = verify(validation, trusted, None)?;
                if tls.require_client_certificate { ClientAuth::Required(verify) } else { ClientAuth::Optional(verify) }
            }
            // a certificate is wanted and nothing can verify it: nobody gets in
            (_, None) if tls.require_client_certificate => {
                return Err(NoContext::SecretMissing("of the client roots".into()));
            }
            _ => ClientAuth::None,
        };
        let configs = ServerTls {
            certificates: parts.certificates.iter().map(|keys| KeyAndChain::clone(keys)).collect(),
            client_auth,
            alpn: tls.alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect(),
            bounds: bounds(&tls.params),
        }
        .build()?;
        let mut servers = self.servers.borrow_mut();
        if servers.len() >= CACHED_MAX {
            servers.clear();
        }
        let leaf = parts.certificates.first().and_then(|keys| keys.chain().first());
        let facts = leaf.and_then(|leaf| PeerFacts::read(leaf).ok());
        let own_uri = facts.and_then(|facts| facts.uris.into_iter().next()).map(Arc::from);
        servers.insert(tls.fingerprint, Server { parts, configs: configs.clone(), own_uri });
        Ok(configs)
    }

    /// Who a filter chain with a context says it is: the URI of its certificate.
    pub(crate) fn own_uri(&self, tls: &DownstreamTls) -> Option<Box<str>> {
        self.servers.borrow().get(&tls.fingerprint)?.own_uri.as_deref().map(Box::from)
    }

    /// The context of an attempt, with the certificates of now. It is the same `Arc` while nothing
    /// it depends on has changed, so that pools may compare it.
    pub(crate) fn client(&self, tls: &UpstreamTls, attempt: &Attempt) -> Result<Arc<ClientConfig>, NoContext> {
        let store = self.secrets.load();
        let mut clients = self.clients.borrow_mut();
        let mut cached =
            clients.get_mut(&tls.fingerprint).and_then(|all| all.iter_mut().find(|client| client.fits(attempt)));
        if let Some(client) = &cached
            && client.version == store.version
        {
            return Ok(Arc::clone(&client.config));
        }
        let before = cached.as_ref().map(|client| &client.parts);
        let own = tls
            .certificate
            .as_ref()
            .map(|source| certificate(&store, source, before.and_then(|parts| parts.certificates.first())))
            .transpose()?;
        let parts =
            Parts { certificates: own.into_iter().collect(), trusted: trusted(&store, Some(&tls.validation), before)? };
        if let Some(client) = &mut cached
            && client.parts.same(&parts)
        {
            client.version = store.version;
            return Ok(Arc::clone(&client.config));
        }
        let alpn = attempt.alpn.list(&attempt.transport);
        let named = attempt.sni.is_some();
        let config = ClientTls {
            certificate: parts.certificates.first().map(|keys| KeyAndChain::clone(keys)),
            verify: match &parts.trusted {
                Some(trusted) => Some(verify(&tls.validation, trusted, attempt.required_san.as_deref())?),
                None => None,
            },
            alpn: alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect(),
            bounds: bounds(&tls.params),
            send_server_name: named,
        }
        .build()?;
        let san = attempt.required_san.clone();
        let built =
            Client { alpn: alpn.into(), san, named, parts, version: store.version, config: Arc::clone(&config) };
        match cached {
            Some(old) => *old = built,
            None => {
                if clients.values().map(Vec::len).sum::<usize>() >= CACHED_MAX {
                    clients.clear();
                }
                let variants = clients.entry(tls.fingerprint).or_default();
                if variants.len() >= VARIANTS_MAX {
                    variants.clear();
                }
                variants.push(built);
            }
        }
        Ok(config)
    }
}

/// A certificate by its source; static ones are read once (`before` is the one in use).
fn certificate(
    store: &SecretStore,
    source: &CertificateSource,
    before: Option<&Arc<KeyAndChain>>,
) -> Result<Arc<KeyAndChain>, NoContext> {
    match source {
        CertificateSource::Secret(name) => {
            store.certificate(name).cloned().ok_or_else(|| NoContext::SecretMissing(name.to_string()))
        }
        CertificateSource::Static { chain, key } => match before {
            Some(before) => Ok(Arc::clone(before)),
            None => {
                let made = KeyAndChain::from_pem(&read(chain)?, &read(key)?).map_err(Unreadable::Unusable)?;
                Ok(Arc::new(made))
            }
        },
    }
}

/// How a peer is verified; what settings give is read once (`before` is the one in use), what a secret gives again
/// with each version of it.
fn trusted(
    store: &SecretStore,
    validation: Option<&Validation>,
    before: Option<&Parts>,
) -> Result<Option<Trusted>, NoContext> {
    let Some(validation) = validation else { return Ok(None) };
    let Some(source) = &validation.roots else { return Ok(None) };
    let before = before.and_then(|parts| parts.trusted.as_ref());
    let by = match (source, before) {
        (RootSource::Secret(name), _) => {
            let found = store.trust(name).ok_or_else(|| NoContext::SecretMissing(name.to_string()))?;
            if let Some(before) = before
                && Arc::ptr_eq(&before.by, found)
            {
                return Ok(Some(before.clone()));
            }
            Arc::clone(found)
        }
        (RootSource::Static(_) | RootSource::System, Some(before)) => return Ok(Some(before.clone())),
        (RootSource::Static(source), None) => {
            let roots = TrustRoots::from_pem(&read(source)?).map_err(Unreadable::Unusable)?;
            Arc::new(Trust::from(Arc::new(roots)))
        }
        (RootSource::System, None) => {
            Arc::new(Trust::from(Arc::new(TrustRoots::system().map_err(Unreadable::Unusable)?)))
        }
    };
    let roots = revoking(Arc::clone(&by.roots), validation.crl.as_ref())?;
    Ok(Some(Trusted { by, roots }))
}

/// Mesh roots vouch for SPIFFE IDs and nothing else (property 17); other roots for any chain.
fn verify(validation: &Validation, trusted: &Trusted, required: Option<&str>) -> Result<Verify, NoContext> {
    let mesh = matches!(&validation.roots, Some(RootSource::Secret(name)) if &**name == ROOTS);
    // Envoy merges a secret's context into the one that stands beside it: lists follow each other.
    let both = [validation, &trusted.by.rules];
    let mut sans: Vec<SanMatch> = both.iter().flat_map(|rules| &rules.san_matchers).map(san).collect();
    if let (Some(required), true) = (required, sans.is_empty()) {
        sans.push(SanMatch { kind: SanKind::Any, rule: SanRule::Exact(required.to_owned()) });
        sans.push(SanMatch { kind: SanKind::Dns, rule: SanRule::Exact(required.to_owned()) });
    }
    Ok(Verify {
        roots: Arc::clone(&trusted.roots),
        form: if mesh { NameForm::Spiffe } else { NameForm::Chain },
        sans,
        spki_pins: both.iter().flat_map(|rules| &rules.spki).map(|pin| spki(pin)).collect::<Result<_, _>>()?,
        certificate_pins: both.iter().flat_map(|rules| &rules.hashes).map(ToString::to_string).collect(),
    })
}

fn spki(pin: &str) -> Result<[u8; 32], NoContext> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(pin).map_err(|_| NoContext::Pin)?;
    bytes.try_into().map_err(|_| NoContext::Pin)
}

fn san(matcher: &settings::SanMatcher) -> SanMatch {
    let rule = matcher.matcher.clone();
    SanMatch {
        kind: match matcher.kind {
            settings::SanKind::Any => SanKind::Any,
            settings::SanKind::Dns => SanKind::Dns,
            settings::SanKind::Uri => SanKind::Uri,
            settings::SanKind::Email => SanKind::Email,
            settings::SanKind::Ip => SanKind::Ip,
        },
        rule: SanRule::Test(Arc::new(move |name| rule.matches(name.as_bytes()))),
    }
}

fn bounds(params: &settings::TlsParams) -> Bounds {
    let version = |version| match version {
        settings::TlsVersion::V12 => TlsVersion::V1_2,
        settings::TlsVersion::V13 => TlsVersion::V1_3,
    };
    Bounds {
        min: version(params.min),
        max: version(params.max),
        cipher_suites: params.cipher_suites.iter().map(ToString::to_string).collect(),
        curves: params.curves.iter().map(ToString::to_string).collect(),
    }
}

/// What a finished handshake says, for policies, headers and logs. `chain`: somebody wants the
/// peer's whole chain.
pub(crate) fn facts(
    connection: &rustls::CommonState,
    peer: Option<&[CertificateDer<'static>]>,
    local_uri_san: Option<Box<str>>,
    chain: bool,
) -> TlsFacts {
    let alpn = connection.alpn_protocol().map(|alpn| String::from_utf8_lossy(alpn).into());
    let version = match connection.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2",
        _ => "TLSv1.3",
    };
    let cipher = connection.negotiated_cipher_suite().map_or("", |suite| suite.suite().as_str().unwrap_or(""));
    let shown = peer.filter(|_| chain).unwrap_or_default();
    let url_encoded_chain: String =
        shown.iter().filter_map(|der| PeerFacts::read(der).ok()).map(|facts| facts.url_encoded_pem()).collect();
    let peer = peer.and_then(<[_]>::first).and_then(|leaf| PeerFacts::read(leaf).ok()).map(|facts| PeerCertificate {
        url_encoded_pem: facts.url_encoded_pem().into(),
        url_encoded_chain: url_encoded_chain.into(),
        identity: facts.id,
        uri_sans: facts.uris.into_iter().map(Into::into).collect(),
        dns_sans: facts.dns_names.into_iter().map(Into::into).collect(),
        subject: facts.subject.into(),
        sha256: facts.sha256.into(),
    });
    TlsFacts { alpn, version, cipher, local_uri_san, peer }
}
