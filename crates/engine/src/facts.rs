//! What is known about a connection before anything is decided on it.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use types::SpiffeId;

/// The moment of a decision: the proxy takes both from its clocks, tests make them up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Now {
    /// For durations.
    pub mono: Instant,
    /// Nanoseconds since the Unix epoch, for tokens, dates and logs.
    pub wall_nanos: u64,
}

impl Now {
    /// Whole seconds since the Unix epoch.
    pub fn wall_seconds(self) -> u64 {
        self.wall_nanos / 1_000_000_000
    }

    /// This moment, later by `by`.
    pub fn after(self, by: Duration) -> Self {
        let nanos = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        Self { mono: self.mono + by, wall_nanos: self.wall_nanos.saturating_add(nanos) }
    }
}

/// What the first bytes of a connection are, as Envoy's `transport_protocol` says it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Transport {
    /// `raw_buffer`: no TLS, or nobody looked.
    #[default]
    Raw,
    /// `tls`: a ClientHello came first.
    Tls,
}

impl Transport {
    /// Envoy's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw_buffer",
            Self::Tls => "tls",
        }
    }
}

/// Everything that choosing a filter chain, matching a policy and writing a log may read about a
/// connection. Filled in stages: addresses at accept, server name and protocols after the
/// inspectors, [`TlsFacts`] after the handshake.
#[derive(Clone, PartialEq, Debug)]
pub struct ConnFacts {
    /// Name of the listener that decides (after the hand-over by original destination).
    pub listener: Arc<str>,
    /// The local address: the original destination where it was recovered, else where the
    /// connection was accepted.
    pub local: SocketAddr,
    /// The original destination, when it was recovered (from a redirect or a PROXY preamble) and differs
    /// from the accepting address.
    pub original_destination: Option<SocketAddr>,
    /// The peer, after PROXY protocol where that is configured.
    pub peer: SocketAddr,
    /// The peer of the socket itself.
    pub direct_peer: SocketAddr,
    /// What the TLS inspector saw.
    pub transport: Transport,
    /// Server name of the ClientHello, lower case, without trailing dot.
    pub server_name: Option<Box<str>>,
    /// Protocols: the ClientHello's ALPN list, else what the HTTP inspector saw
    /// (`http/1.0`, `http/1.1` or `h2c`); empty when nobody looked or nothing was recognised.
    pub protocols: Vec<Box<str>>,
    /// Filled after a finished handshake.
    pub tls: Option<Arc<TlsFacts>>,
}

impl ConnFacts {
    /// A plaintext connection from `peer` to `local` on `listener`, nothing else known.
    pub fn plaintext(listener: &str, local: SocketAddr, peer: SocketAddr) -> Self {
        Self {
            listener: listener.into(),
            local,
            original_destination: None,
            peer,
            direct_peer: peer,
            transport: Transport::Raw,
            server_name: None,
            protocols: Vec::new(),
            tls: None,
        }
    }

    /// The authenticated peer as text, if it is a mesh identity. *Cost*: none where the certificate has one URI, as mesh certificates do.
    pub fn peer_identity_text(&self) -> Option<Cow<'_, str>> {
        let peer = self.peer_certificate()?;
        let identity = peer.identity.as_ref()?;
        Some(match &peer.uri_sans[..] {
            // identities are read literally: the only URI is the identity's text
            [only] => {
                debug_assert_eq!(**only, identity.to_string(), "an identity is one of its certificate's URIs");
                Cow::Borrowed(&**only)
            }
            _ => Cow::Owned(identity.to_string()),
        })
    }

    /// The peer's certificate, if one was presented and verified.
    pub fn peer_certificate(&self) -> Option<&PeerCertificate> {
        self.tls.as_ref()?.peer.as_ref()
    }

    /// Address of the peer.
    pub fn peer_ip(&self) -> IpAddr {
        self.peer.ip()
    }
}

/// What a finished TLS handshake says.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct TlsFacts {
    /// The protocol both sides agreed on.
    pub alpn: Option<Box<str>>,
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite's name.
    pub cipher: &'static str,
    /// First URI SAN of our own certificate (`By` of XFCC).
    pub local_uri_san: Option<Box<str>>,
    /// The verified client certificate.
    pub peer: Option<PeerCertificate>,
}

/// A verified peer certificate, as far as policies and headers need it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct PeerCertificate {
    /// The mesh identity; `None` for other certificates a gateway accepts.
    pub identity: Option<SpiffeId>,
    /// URI SANs in order.
    pub uri_sans: Vec<Box<str>>,
    /// DNS SANs in order.
    pub dns_sans: Vec<Box<str>>,
    /// Subject in RFC 2253 form.
    pub subject: Box<str>,
    /// SHA-256 of the DER, lower-case hex.
    pub sha256: Box<str>,
    /// The certificate as URL-encoded PEM (`Cert` of XFCC); empty unless somebody asked for it.
    pub url_encoded_pem: Box<str>,
    /// It and what stood behind it, likewise (`Chain` of XFCC); empty unless somebody asked for it.
    pub url_encoded_chain: Box<str>,
}
