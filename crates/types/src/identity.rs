//! SPIFFE identities.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A trust domain: lower-case letters, digits, `.`, `-`, `_`; never empty, at most 255 bytes.
///
/// *Source*: SPIFFE ID specification, section 2.1.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(Box<str>);

impl TrustDomain {
    /// Parses a trust domain.
    pub fn parse(text: &str) -> Result<Self, InvalidSpiffeId> {
        let fits = !text.is_empty()
            && text.len() <= 255
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'));
        if fits { Ok(Self(text.into())) } else { Err(InvalidSpiffeId::TrustDomain(text.to_owned())) }
    }

    /// The domain as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    fn default() -> Self {
        Self(crate::wellknown::DEFAULT_TRUST_DOMAIN.into())
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = InvalidSpiffeId;
    fn try_from(text: String) -> Result<Self, InvalidSpiffeId> {
        Self::parse(&text)
    }
}

impl From<TrustDomain> for String {
    fn from(domain: TrustDomain) -> Self {
        domain.0.into()
    }
}

/// Istio's identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.
///
/// *Source*: SPIFFE ID specification; Istio's fixed path of five parts. Nothing else is an
/// identity (property 17).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    /// Who vouches.
    pub trust_domain: TrustDomain,
    /// The workload's namespace.
    pub namespace: Box<str>,
    /// The workload's service account.
    pub service_account: Box<str>,
}

/// Why a text is not a workload identity.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidSpiffeId {
    /// Not `spiffe://…`.
    #[error("{0:?} is not a spiffe:// URI")]
    Scheme(String),
    /// The trust domain breaks its grammar.
    #[error("{0:?} is not a trust domain")]
    TrustDomain(String),
    /// The path is not `/ns/<namespace>/sa/<account>`.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<account>")]
    Path(String),
}

fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

impl SpiffeId {
    /// Builds an identity from checked parts.
    pub fn new(trust_domain: TrustDomain, namespace: &str, service_account: &str) -> Result<Self, InvalidSpiffeId> {
        if !is_segment(namespace) || !is_segment(service_account) {
            return Err(InvalidSpiffeId::Path(format!("/ns/{namespace}/sa/{service_account}")));
        }
        Ok(Self { trust_domain, namespace: namespace.into(), service_account: service_account.into() })
    }

    /// Parses the URI, literally and by position.
    pub fn parse(text: &str) -> Result<Self, InvalidSpiffeId> {
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| InvalidSpiffeId::Scheme(text.to_owned()))?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| InvalidSpiffeId::Path(text.to_owned()))?;
        let trust_domain = TrustDomain::parse(domain)?;
        let mut parts = path.split('/');
        let (Some("ns"), Some(namespace), Some("sa"), Some(account), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidSpiffeId::Path(text.to_owned()));
        };
        Self::new(trust_domain, namespace, account).map_err(|_| InvalidSpiffeId::Path(text.to_owned()))
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;
    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        Self::parse(text)
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = InvalidSpiffeId;
    fn try_from(text: String) -> Result<Self, InvalidSpiffeId> {
        Self::parse(&text)
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let text = "spiffe://cluster.local/ns/shop/sa/default";
        assert_eq!(SpiffeId::parse(text).unwrap().to_string(), text);
    }

    #[test]
    fn what_is_not_an_identity() {
        for bad in [
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/a/sa",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/b/ns/a",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://x/ns/../sa/b",
            "spiffe://x/ns/a%2Fb/sa/b",
            "SPIFFE://x/ns/a/sa/b",
            "https://x/ns/a/sa/b",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad}");
        }
    }
}
