//! Key sets of token issuers that somebody fetched: an input of the snapshot, so that compiling asks
//! nobody.
//!
//! *Source*: `docs/parity.md`, Security 9.1.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::security::JwtRule;

/// Where the keys of a rule come from when it does not hold them itself.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum KeySource {
    /// `jwksUri`
    Uri(Box<str>),
    /// OpenID discovery below the issuer.
    Issuer(Box<str>),
}

impl KeySource {
    /// The source of a rule; `None` when its keys are inline, or when it names no source.
    pub fn of(rule: &JwtRule) -> Option<Self> {
        if !rule.jwks.is_empty() {
            return None;
        }
        if !rule.jwks_uri.is_empty() {
            return Some(Self::Uri(rule.jwks_uri.as_str().into()));
        }
        (!rule.issuer.is_empty()).then(|| Self::Issuer(rule.issuer.as_str().into()))
    }
}

/// A key set as JSON, or why there is none.
pub type Fetched = Result<Arc<str>, Arc<str>>;

/// What was fetched so far. A source that is not there is still being asked.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct KeySets(BTreeMap<KeySource, Fetched>);

impl KeySets {
    /// What is known of a source.
    pub fn get(&self, source: &KeySource) -> Option<&Fetched> {
        self.0.get(source)
    }

    /// Replaces what is known of a source.
    pub fn set(&mut self, source: KeySource, fetched: Fetched) {
        self.0.insert(source, fetched);
    }

    /// Forgets the sources that `is_wanted` does not name.
    pub fn retain(&mut self, is_wanted: impl Fn(&KeySource) -> bool) {
        self.0.retain(|source, _| is_wanted(source));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources() {
        let rule = |issuer: &str, uri: &str, jwks: &str| JwtRule {
            issuer: issuer.into(),
            jwks_uri: uri.into(),
            jwks: jwks.into(),
            ..JwtRule::default()
        };
        assert_eq!(KeySource::of(&rule("i", "u", "{}")), None, "inline wins over both");
        assert_eq!(KeySource::of(&rule("i", "u", "")), Some(KeySource::Uri("u".into())));
        assert_eq!(KeySource::of(&rule("i", "", "")), Some(KeySource::Issuer("i".into())));
        assert_eq!(KeySource::of(&rule("", "", "")), None);
    }
}
