//! TLS settings of chains and clusters, as values. The proxy builds its contexts from them on first
//! use and resolves secrets by name at each handshake.

use std::time::Duration;

use crate::config::Name;
use crate::matcher::StringMatcher;

/// TLS versions we speak.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum TlsVersion {
    /// TLS 1.2
    V12,
    /// TLS 1.3
    V13,
}

/// Versions, suites and curves.
#[derive(Clone, PartialEq, Debug)]
pub struct TlsParams {
    /// At least this.
    pub min: TlsVersion,
    /// At most this.
    pub max: TlsVersion,
    /// Suites of TLS 1.2 by OpenSSL's names; empty: the default list.
    pub cipher_suites: Vec<Box<str>>,
    /// Groups by name; empty: the default list.
    pub curves: Vec<Box<str>>,
}

impl Default for TlsParams {
    fn default() -> Self {
        Self { min: TlsVersion::V12, max: TlsVersion::V13, cipher_suites: Vec::new(), curves: Vec::new() }
    }
}

/// Bytes that are given in place or in a file.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub enum Source {
    /// Here.
    Inline(Box<[u8]>),
    /// In a file of the proxy's machine.
    File(Box<str>),
    /// In an environment variable of the proxy.
    Environment(Box<str>),
}

/// Where a certificate and its key come from.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub enum CertificateSource {
    /// A secret by name: `default` (the workload's own), `kubernetes://…`, `file-cert:…`.
    Secret(Name),
    /// Given in place.
    Static {
        /// PEM chain.
        chain: Source,
        /// PEM key.
        key: Source,
    },
}

/// Where roots come from.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub enum RootSource {
    /// A secret by name: `ROOTCA`, `kubernetes://…-cacert`, `file-root:…`.
    Secret(Name),
    /// Given in place.
    Static(Source),
    /// The machine's.
    System,
}

/// What a secret of the discovery service says, before its bytes are read.
#[derive(Clone, Debug)]
pub enum SecretSettings {
    /// A certificate with its key.
    Certificate {
        /// PEM chain.
        chain: Source,
        /// PEM key.
        key: Source,
    },
    /// How peers are judged. Its roots are set, and are not a secret again.
    Validation(Validation),
}

impl SecretSettings {
    /// Files that it names.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let sources = match self {
            Self::Certificate { chain, key } => [Some(chain), Some(key)],
            Self::Validation(validation) => {
                let roots = match &validation.roots {
                    Some(RootSource::Static(source)) => Some(source),
                    Some(RootSource::Secret(_) | RootSource::System) | None => None,
                };
                [roots, validation.crl.as_ref()]
            }
        };
        sources.into_iter().flatten().filter_map(|source| match source {
            Source::File(path) => Some(&**path),
            Source::Inline(_) | Source::Environment(_) => None,
        })
    }
}

/// How the peer's certificate is judged.
#[derive(Clone, Debug, Default)]
pub struct Validation {
    /// The roots; `None`: the chain is not verified (`insecureSkipVerify`, no CA at all).
    pub roots: Option<RootSource>,
    /// Any of these must match a SAN; empty: no name check.
    pub san_matchers: Vec<SanMatcher>,
    /// SHA-256 of certificates, lower-case hex without colons. One of these or of `spki` must fit, if there is any.
    pub hashes: Vec<Box<str>>,
    /// Base64 of SHA-256 of public keys.
    pub spki: Vec<Box<str>>,
    /// Revocation lists of the roots' authorities.
    pub crl: Option<Source>,
}

/// A name a certificate must carry.
#[derive(Clone, Debug)]
pub struct SanMatcher {
    /// Which kind of SAN.
    pub kind: SanKind,
    /// What it must be.
    pub matcher: StringMatcher,
}

/// Kinds of subject alternative names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum SanKind {
    /// DNS, URI, e-mail or IP, whichever matches (the older field).
    Any,
    /// DNS
    Dns,
    /// URI
    Uri,
    /// E-mail
    Email,
    /// IP address
    Ip,
}

/// TLS towards clients.
#[derive(Clone, Debug)]
pub struct DownstreamTls {
    /// Versions and suites.
    pub params: TlsParams,
    /// Offered by us, most wanted first.
    pub alpn: Vec<Box<str>>,
    /// Certificates to choose from.
    pub certificates: Vec<CertificateSource>,
    /// How client certificates are judged; `None`: none is asked for.
    pub validation: Option<Validation>,
    /// A client without a certificate is refused.
    pub require_client_certificate: bool,
    /// Tells one setting from another, for caches of built contexts.
    pub fingerprint: u64,
}

/// TLS towards upstreams.
#[derive(Clone, Debug)]
pub struct UpstreamTls {
    /// Versions and suites.
    pub params: TlsParams,
    /// Offered by us.
    pub alpn: Vec<Box<str>>,
    /// Our certificate, if the server wants one.
    pub certificate: Option<CertificateSource>,
    /// How the server's certificate is judged.
    pub validation: Validation,
    /// Server name; empty: none, unless the cluster takes it from the request.
    pub sni: Box<str>,
    /// Tells one setting from another, for caches of built contexts and for pool keys.
    pub fingerprint: u64,
}

fn secrets<'a>(certificate: Option<&'a CertificateSource>, validation: Option<&'a Validation>, into: &mut Vec<Name>) {
    if let Some(CertificateSource::Secret(name)) = certificate {
        into.push(name.clone());
    }
    if let Some(Validation { roots: Some(RootSource::Secret(name)), .. }) = validation {
        into.push(name.clone());
    }
}

impl DownstreamTls {
    /// Names of the secrets this needs.
    pub fn secrets(&self, into: &mut Vec<Name>) {
        for certificate in &self.certificates {
            secrets(Some(certificate), None, into);
        }
        secrets(None, self.validation.as_ref(), into);
    }
}

impl UpstreamTls {
    /// Names of the secrets this needs.
    pub fn secrets(&self, into: &mut Vec<Name>) {
        secrets(self.certificate.as_ref(), Some(&self.validation), into);
    }
}

/// A PROXY protocol preamble to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum ProxyProtocol {
    /// Text.
    V1,
    /// Binary.
    V2,
}

/// TCP keep-alive; absent values are the system's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Keepalive {
    /// Probes before giving up.
    pub probes: Option<u32>,
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}
