//! Host names and namespaced names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A host name: lower case, no port, no trailing dot, never empty, no wildcard.
///
/// *Source*: RFC 1123 section 2.1; Istio additionally allows `_` in ServiceEntry hosts.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hostname(Box<str>);

/// Why a text is not a host name or pattern.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidHost {
    /// Nothing was written.
    #[error("host is empty")]
    Empty,
    /// Longer than a DNS name may be.
    #[error("host {0:?} is longer than 253 characters")]
    TooLong(String),
    /// A label is empty, longer than 63, or holds a character DNS does not allow.
    #[error("host {host:?} has the invalid label {label:?}")]
    Label {
        /// The whole text.
        host: String,
        /// The label at fault.
        label: String,
    },
    /// `*` anywhere but as the whole first label.
    #[error("host {0:?} may hold `*` only as its whole first label")]
    Wildcard(String),
}

fn check_labels(whole: &str, labels: &str) -> Result<(), InvalidHost> {
    for label in labels.split('.') {
        let fits = !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-');
        if !fits {
            return Err(InvalidHost::Label { host: whole.to_owned(), label: label.to_owned() });
        }
    }
    Ok(())
}

impl Hostname {
    /// Parses `text`, lowering its case and dropping one trailing dot.
    pub fn parse(text: &str) -> Result<Self, InvalidHost> {
        let trimmed = text.strip_suffix('.').unwrap_or(text);
        if trimmed.is_empty() {
            return Err(InvalidHost::Empty);
        }
        if trimmed.len() > 253 {
            return Err(InvalidHost::TooLong(text.to_owned()));
        }
        if trimmed.contains('*') {
            return Err(InvalidHost::Wildcard(text.to_owned()));
        }
        check_labels(text, trimmed)?;
        Ok(Self(trimmed.to_ascii_lowercase().into()))
    }

    /// The name of a Kubernetes service: `name.namespace.svc.domain`.
    pub fn of_service(name: &str, namespace: &str, domain: &str) -> Self {
        Self(format!("{name}.{namespace}.svc.{domain}").to_ascii_lowercase().into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl FromStr for Hostname {
    type Err = InvalidHost;
    fn from_str(text: &str) -> Result<Self, InvalidHost> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Hostname {
    type Error = InvalidHost;
    fn try_from(text: String) -> Result<Self, InvalidHost> {
        Self::parse(&text)
    }
}

impl From<Hostname> for String {
    fn from(host: Hostname) -> Self {
        host.0.into()
    }
}

impl AsRef<str> for Hostname {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// A host as Istio's `hosts:` allow it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostPattern {
    /// One host.
    Exact(Hostname),
    /// Every host below one; kept with the dot (`*.example.com` holds `.example.com`), so that
    /// `badexample.com` cannot match.
    Suffix(Box<str>),
    /// `*`
    Any,
}

impl HostPattern {
    /// Parses `host`, `*.suffix` or `*`.
    pub fn parse(text: &str) -> Result<Self, InvalidHost> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let Some(rest) = text.strip_prefix('*') else {
            return Hostname::parse(text).map(Self::Exact);
        };
        let Some(labels) = rest.strip_prefix('.') else {
            return Err(InvalidHost::Wildcard(text.to_owned()));
        };
        let parsed = Hostname::parse(labels)?;
        Ok(Self::Suffix(format!(".{parsed}").into()))
    }

    /// Whether every host that `other` matches is matched by `self`.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) => true,
            (Self::Suffix(mine), Self::Suffix(theirs)) => theirs.ends_with(&**mine),
            (Self::Suffix(mine), Self::Exact(host)) => {
                host.as_str().len() > mine.len() && host.as_str().ends_with(&**mine)
            }
            (Self::Exact(mine), Self::Exact(theirs)) => mine == theirs,
            (Self::Exact(_) | Self::Suffix(_), _) => false,
        }
    }

    /// Whether some host is matched by both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// Whether `host` is matched.
    pub fn matches(&self, host: &Hostname) -> bool {
        match self {
            Self::Any => true,
            Self::Suffix(suffix) => host.0.len() > suffix.len() && host.0.ends_with(&**suffix),
            Self::Exact(mine) => mine == host,
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(host) => f.write_str(&host.0),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
            Self::Any => f.write_str("*"),
        }
    }
}

impl fmt::Debug for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

/// `namespace/name`. Ordered by namespace, then name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct NamespacedName {
    /// The namespace; empty for objects without one.
    pub namespace: Box<str>,
    /// The name.
    pub name: Box<str>,
}

impl NamespacedName {
    /// Both parts, as given.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suffix_needs_its_dot() {
        let pattern = HostPattern::parse("*.Example.com").unwrap();
        assert!(pattern.matches(&Hostname::parse("a.example.com").unwrap()));
        assert!(!pattern.matches(&Hostname::parse("badexample.com").unwrap()));
        assert!(!pattern.matches(&Hostname::parse("example.com").unwrap()));
    }

    #[test]
    fn cover_is_a_partial_order() {
        let any = HostPattern::Any;
        let wide = HostPattern::parse("*.com").unwrap();
        let narrow = HostPattern::parse("*.a.com").unwrap();
        let exact = HostPattern::parse("x.a.com").unwrap();
        assert!(any.covers(&wide) && wide.covers(&narrow) && narrow.covers(&exact));
        assert!(!narrow.covers(&wide) && !exact.covers(&narrow));
        assert!(wide.overlaps(&exact));
    }

    #[test]
    fn bad_hosts_are_refused() {
        for bad in ["", ".", "a..b", "-a.b", "a.*.b", "*a.b", "a b", "a/b"] {
            assert!(HostPattern::parse(bad).is_err(), "{bad:?}");
        }
    }
}
