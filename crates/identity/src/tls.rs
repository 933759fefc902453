//! TLS configurations: mesh TLS by SPIFFE ID, and TLS of gateways and origination.
//!
//! A configuration is made for one filter chain or cluster and one version of its certificates;
//! who needs it at a ClientHello takes the current one. Sessions are not resumed where the client
//! has a certificate; else a server's sessions live in that configuration alone, so that nothing
//! carries over to another listener, trust bundle or client-authentication mode (property 19).
//! rustls has no renegotiation, no compression, and no early data unless asked for.

mod verify;

use std::sync::{Arc, OnceLock};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CipherSuite, ClientConfig, NamedGroup, ServerConfig, SignatureScheme, SupportedCipherSuite,
    SupportedProtocolVersion,
};
use thiserror::Error;

pub use verify::{NameForm, SanKind, SanMatch, SanRule, Verify};

use crate::workload::{KeyAndChain, TrustRoots, WorkloadIdentity};

/// The only crypto provider: aws-lc-rs, post-quantum key exchange preferred.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(aws_lc_rs::default_provider()))
}

/// A TLS version. Nothing older exists here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum TlsVersion {
    /// TLS 1.2
    V1_2,
    /// TLS 1.3
    V1_3,
}

/// What both sides can bound.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Bounds {
    /// The oldest version.
    pub min: TlsVersion,
    /// The newest version.
    pub max: TlsVersion,
    /// TLS 1.2 suites by OpenSSL's names, in order; empty: the provider's. Names that rustls lacks
    /// (static RSA, CBC) are left out, and a list of nothing else is an error.
    pub cipher_suites: Vec<String>,
    /// Key exchange groups by OpenSSL's names, in order; empty: the provider's.
    pub curves: Vec<String>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { min: TlsVersion::V1_2, max: TlsVersion::V1_3, cipher_suites: Vec::new(), curves: Vec::new() }
    }
}

/// Whether a server wants a client certificate.
#[derive(Clone, Debug, Default)]
pub enum ClientAuth {
    /// Never asks.
    #[default]
    None,
    /// Asks; without one the client is anonymous, and one that is given must be good.
    Optional(Verify),
    /// Refuses the handshake without a good one.
    Required(Verify),
}

/// A server's side.
#[derive(Clone, Debug, Default)]
pub struct ServerTls {
    /// Certificates to choose from by the client's signature algorithms; at least one.
    pub certificates: Vec<KeyAndChain>,
    /// Whether clients show one.
    pub client_auth: ClientAuth,
    /// Protocols, best first.
    pub alpn: Vec<Vec<u8>>,
    /// Versions, suites, groups.
    pub bounds: Bounds,
}

impl ServerTls {
    /// Mesh TLS of an inbound chain: our certificate, and a client's from the same roots with one
    /// of `sans`.
    pub fn mesh(identity: &WorkloadIdentity, sans: Vec<SanMatch>, alpn: Vec<Vec<u8>>) -> Self {
        Self {
            certificates: vec![identity.keys.clone()],
            client_auth: ClientAuth::Required(Verify::mesh(Arc::clone(&identity.roots), sans)),
            alpn,
            bounds: Bounds::default(),
        }
    }

    /// Makes the configuration.
    pub fn build(&self) -> Result<ServerConfigs, InvalidTls> {
        let (provider, versions) = self.bounds.resolve()?;
        if self.certificates.is_empty() {
            return Err(InvalidTls::NoCertificate);
        }
        let is_spoken = |suite: &&SupportedCipherSuite| versions.contains(&suite.version());
        let resolver = Certificates {
            keys: self.certificates.iter().map(|keys| Arc::clone(keys.certified())).collect(),
            suites: provider.cipher_suites.iter().filter(is_spoken).copied().collect(),
        };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(InvalidTls::Rustls)?;
        let builder = match &self.client_auth {
            ClientAuth::None => builder.with_no_client_auth(),
            ClientAuth::Optional(verify) => builder.with_client_cert_verifier(verify.for_clients(&provider, false)?),
            ClientAuth::Required(verify) => builder.with_client_cert_verifier(verify.for_clients(&provider, true)?),
        };
        let mut config = builder.with_cert_resolver(Arc::new(resolver));
        if !matches!(self.client_auth, ClientAuth::None) {
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        let plain = Arc::new(config.clone());
        config.alpn_protocols.clone_from(&self.alpn);
        Ok(ServerConfigs { offered: Arc::new(config), plain })
    }
}

/// A server's configuration, for clients that share a protocol with it and for those that do not.
#[derive(Clone, Debug)]
pub struct ServerConfigs {
    offered: Arc<ServerConfig>,
    plain: Arc<ServerConfig>,
}

impl ServerConfigs {
    /// The configuration for a client that offers `alpn`. Without a common protocol the handshake
    /// goes on without one, as Envoy's does, where rustls would refuse it.
    pub fn for_alpn<'a>(&self, alpn: impl IntoIterator<Item = &'a [u8]>) -> &Arc<ServerConfig> {
        let mut any = false;
        let common = alpn.into_iter().any(|offer| {
            any = true;
            self.offered.alpn_protocols.iter().any(|ours| ours == offer)
        });
        if any && !common { &self.plain } else { &self.offered }
    }

    /// The configuration for a ClientHello.
    pub fn for_hello(&self, hello: &ClientHello<'_>) -> &Arc<ServerConfig> {
        self.for_alpn(hello.alpn().into_iter().flatten())
    }

    /// The configuration that insists on a common protocol where the client offers any.
    pub fn strict(&self) -> &Arc<ServerConfig> {
        &self.offered
    }
}

/// A client's side.
#[derive(Clone, Debug)]
pub struct ClientTls {
    /// What we show when asked; `None`: nothing.
    pub certificate: Option<KeyAndChain>,
    /// How the server is checked; `None`: not at all (`insecureSkipVerify`).
    pub verify: Option<Verify>,
    /// Protocols, best first.
    pub alpn: Vec<Vec<u8>>,
    /// Versions, suites, groups.
    pub bounds: Bounds,
    /// Whether the server name is sent.
    pub send_server_name: bool,
}

impl ClientTls {
    /// Mesh TLS to a server with one of `sans` (empty: any identity of the roots).
    pub fn mesh(identity: &WorkloadIdentity, sans: Vec<SanMatch>, alpn: Vec<Vec<u8>>) -> Self {
        Self {
            certificate: Some(identity.keys.clone()),
            verify: Some(Verify::mesh(Arc::clone(&identity.roots), sans)),
            alpn,
            bounds: Bounds::default(),
            send_server_name: true,
        }
    }

    /// TLS to a server that is known by its DNS name or address.
    pub fn named(roots: Arc<TrustRoots>, alpn: Vec<Vec<u8>>) -> Self {
        Self {
            certificate: None,
            verify: Some(Verify {
                roots,
                form: NameForm::ServerName,
                sans: Vec::new(),
                spki_pins: Vec::new(),
                certificate_pins: Vec::new(),
            }),
            alpn,
            bounds: Bounds::default(),
            send_server_name: true,
        }
    }

    /// Makes the configuration.
    pub fn build(&self) -> Result<Arc<ClientConfig>, InvalidTls> {
        let (provider, versions) = self.bounds.resolve()?;
        let verifier = match &self.verify {
            Some(verify) => verify.for_servers(&provider)?,
            None => Verify::nothing(&provider),
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(InvalidTls::Rustls)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.certificate {
            Some(keys) => builder.with_client_cert_resolver(Arc::new(OneCertificate(Arc::clone(keys.certified())))),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols.clone_from(&self.alpn);
        config.enable_sni = self.send_server_name;
        // A resumed session would skip the check of a certificate that may have expired since.
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// Why a TLS configuration cannot be made.
#[derive(Debug, Error)]
pub enum InvalidTls {
    /// A server without a certificate.
    #[error("a server needs a certificate")]
    NoCertificate,
    /// The oldest version is newer than the newest.
    #[error("the minimum version is above the maximum version")]
    Versions,
    /// No suite of the list exists here.
    #[error("none of the cipher suites {0:?} is supported")]
    CipherSuites(Vec<String>),
    /// No group of the list exists here.
    #[error("none of the curves {0:?} is supported")]
    Curves(Vec<String>),
    /// A revocation list cannot be used.
    #[error("revocation list or root bundle cannot be used")]
    Verifier(#[source] rustls::client::VerifierBuilderError),
    /// rustls refuses.
    #[error("TLS configuration is inconsistent")]
    Rustls(#[source] rustls::Error),
}

type Versions = Vec<&'static SupportedProtocolVersion>;

impl Bounds {
    fn resolve(&self) -> Result<(Arc<CryptoProvider>, Versions), InvalidTls> {
        let mut versions = Vec::new();
        if self.max >= TlsVersion::V1_3 {
            versions.push(&rustls::version::TLS13);
        }
        if self.min <= TlsVersion::V1_2 {
            versions.push(&rustls::version::TLS12);
        }
        if self.min > self.max {
            return Err(InvalidTls::Versions);
        }
        if self.cipher_suites.is_empty() && self.curves.is_empty() {
            return Ok((Arc::clone(provider()), versions));
        }
        let mut own = (**provider()).clone();
        if !self.cipher_suites.is_empty() {
            // The list rules TLS 1.2 only; TLS 1.3 has its own three.
            let old: Vec<SupportedCipherSuite> = self.cipher_suites.iter().filter_map(|name| suite(name)).collect();
            if old.is_empty() && self.max == TlsVersion::V1_2 {
                return Err(InvalidTls::CipherSuites(self.cipher_suites.clone()));
            }
            own.cipher_suites.retain(|suite| suite.tls13().is_some());
            own.cipher_suites.extend(old);
        }
        if !self.curves.is_empty() {
            own.kx_groups = self.curves.iter().filter_map(|name| group(name)).collect();
            if own.kx_groups.is_empty() {
                return Err(InvalidTls::Curves(self.curves.clone()));
            }
        }
        let has_old = own.cipher_suites.iter().any(|suite| suite.tls13().is_none());
        if !has_old {
            versions.retain(|version| version.version == rustls::ProtocolVersion::TLSv1_3);
        }
        Ok((Arc::new(own), versions))
    }
}

fn suite(openssl: &str) -> Option<SupportedCipherSuite> {
    let wanted = match openssl {
        "ECDHE-ECDSA-AES256-GCM-SHA384" => CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        "ECDHE-RSA-AES256-GCM-SHA384" => CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        "ECDHE-ECDSA-AES128-GCM-SHA256" => CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        "ECDHE-RSA-AES128-GCM-SHA256" => CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        "ECDHE-ECDSA-CHACHA20-POLY1305" => CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        "ECDHE-RSA-CHACHA20-POLY1305" => CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        _ => return None,
    };
    provider().cipher_suites.iter().copied().find(|suite| suite.suite() == wanted)
}

fn group(openssl: &str) -> Option<&'static dyn SupportedKxGroup> {
    let wanted = match openssl {
        "P-256" => NamedGroup::secp256r1,
        "P-384" => NamedGroup::secp384r1,
        "X25519" => NamedGroup::X25519,
        "X25519MLKEM768" => NamedGroup::X25519MLKEM768,
        _ => return None,
    };
    aws_lc_rs::ALL_KX_GROUPS.iter().copied().find(|group| group.name() == wanted)
}

/// Picks the first certificate whose key the client can check, with a suite that both sides have.
#[derive(Debug)]
struct Certificates {
    keys: Vec<Arc<CertifiedKey>>,
    /// Of the versions that are spoken.
    suites: Vec<SupportedCipherSuite>,
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let (schemes, offered) = (hello.signature_schemes(), hello.cipher_suites());
        let fits = |certified: &&Arc<CertifiedKey>| {
            let algorithm = certified.key.algorithm();
            let has_suite = |suite: &SupportedCipherSuite| {
                suite.usable_for_signature_algorithm(algorithm) && offered.contains(&suite.suite())
            };
            certified.key.choose_scheme(schemes).is_some() && self.suites.iter().any(has_suite)
        };
        self.keys.iter().find(fits).cloned()
    }
}

#[derive(Debug)]
struct OneCertificate(Arc<CertifiedKey>);

impl ResolvesClientCert for OneCertificate {
    fn resolve(&self, _roots: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.key.choose_scheme(schemes).is_some().then(|| Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
