//! Secrets by name: the workload's own, and those received.
//!
//! The control side replaces the whole store; workers look names up at each handshake, so that a
//! renewed certificate counts for the next one.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use engine::config::Name;
use engine::tls::{RootSource, SecretSettings, Source, Validation};
use identity::workload::{InvalidIdentity, KeyAndChain, TrustRoots, WorkloadIdentity};
use thiserror::Error;

/// The SDS name of the workload's own certificate.
pub const WORKLOAD: &str = "default";
/// The SDS name of the mesh's roots.
pub const ROOTS: &str = "ROOTCA";

/// One secret.
#[derive(Clone, Debug)]
pub enum Secret {
    /// A key with its chain.
    Certificate(Arc<KeyAndChain>),
    /// How peers are verified.
    Roots(Arc<Trust>),
}

/// How peers are verified.
#[derive(Debug)]
pub struct Trust {
    /// Whom certificates must come from, and what these revoked.
    pub roots: Arc<TrustRoots>,
    /// Names and pins, beside those of the settings that name the secret. (What it says of roots is in `roots`.)
    pub rules: Validation,
}

impl From<Arc<TrustRoots>> for Trust {
    /// Anybody of these roots.
    fn from(roots: Arc<TrustRoots>) -> Self {
        Self { roots, rules: Validation::default() }
    }
}

/// Why the bytes of a certificate, a key, roots or revocation lists cannot be had or used.
#[derive(Debug, Error)]
pub enum Unreadable {
    /// A file.
    #[error("{0} cannot be read")]
    File(String, #[source] std::io::Error),
    /// An environment variable.
    #[error("${0} is not set")]
    Environment(String),
    /// Not what they should be.
    #[error("certificate, key, roots or revocation list are not usable: {0}")]
    Unusable(#[from] InvalidIdentity),
}

impl Secret {
    /// Reads what a secret's settings name.
    pub fn read(settings: SecretSettings) -> Result<Self, Unreadable> {
        Ok(match settings {
            SecretSettings::Certificate { chain, key } => {
                Self::Certificate(Arc::new(KeyAndChain::from_pem(&read(&chain)?, &read(&key)?)?))
            }
            SecretSettings::Validation(rules) => {
                let roots = match &rules.roots {
                    Some(RootSource::Static(source)) => TrustRoots::from_pem(&read(source)?)?,
                    // settings of a secret name no other, and are not without any
                    Some(RootSource::System | RootSource::Secret(_)) | None => TrustRoots::system()?,
                };
                let roots = revoking(Arc::new(roots), rules.crl.as_ref())?;
                Self::Roots(Arc::new(Trust { roots, rules }))
            }
        })
    }
}

/// Roots with the revocation lists of settings.
pub(crate) fn revoking(roots: Arc<TrustRoots>, crl: Option<&Source>) -> Result<Arc<TrustRoots>, Unreadable> {
    match crl {
        None => Ok(roots),
        Some(crl) => Ok(Arc::new(roots.revoking(&read(crl)?)?)),
    }
}

/// The bytes of a source.
pub(crate) fn read(source: &Source) -> Result<Vec<u8>, Unreadable> {
    match source {
        Source::Inline(bytes) => Ok(bytes.to_vec()),
        Source::File(path) => std::fs::read(&**path).map_err(|error| Unreadable::File(path.to_string(), error)),
        Source::Environment(name) => {
            std::env::var(&**name).map(String::into_bytes).map_err(|_| Unreadable::Environment(name.to_string()))
        }
    }
}

/// All secrets of one moment.
#[derive(Clone, Debug, Default)]
pub struct SecretStore {
    by_name: HashMap<Name, Secret>,
    /// Another one after each change.
    pub version: u64,
    /// Trust domain-bearing URI of the workload, for XFCC's `By`.
    pub workload: Option<Arc<WorkloadIdentity>>,
}

impl SecretStore {
    /// Whether there is one of this name.
    pub fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The key and chain of this name.
    pub fn certificate(&self, name: &str) -> Option<&Arc<KeyAndChain>> {
        match self.by_name.get(name)? {
            Secret::Certificate(keys) => Some(keys),
            Secret::Roots(_) => None,
        }
    }

    /// How peers are verified by the secret of this name.
    pub fn trust(&self, name: &str) -> Option<&Arc<Trust>> {
        match self.by_name.get(name)? {
            Secret::Roots(trust) => Some(trust),
            Secret::Certificate(_) => None,
        }
    }

    /// Names with their secrets, sorted.
    pub fn sorted(&self) -> Vec<(&Name, &Secret)> {
        #[expect(clippy::iter_over_hash_type, reason = "sorted below")]
        let mut all = {
            let mut all = Vec::with_capacity(self.by_name.len());
            for (name, secret) in &self.by_name {
                all.push((name, secret));
            }
            all
        };
        all.sort_by_key(|(name, _)| Name::clone(name));
        all
    }
}

/// The store that everybody shares.
#[derive(Clone, Default)]
pub struct Secrets(Arc<ArcSwap<SecretStore>>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Secrets").field(&self.0.load().by_name.len()).finish()
    }
}

impl Secrets {
    /// What there is now.
    pub fn load(&self) -> arc_swap::Guard<Arc<SecretStore>> {
        self.0.load()
    }

    fn next(&self) -> SecretStore {
        let mut next = SecretStore::clone(&self.0.load());
        next.version += 1;
        next
    }

    /// Adds, replaces and removes. The control thread is the only writer.
    pub fn change(&self, edit: impl FnOnce(&mut HashMap<Name, Secret>)) {
        let mut next = self.next();
        edit(&mut next.by_name);
        self.0.store(Arc::new(next));
    }

    /// Takes a new identity of the workload under its SDS names.
    pub fn set_identity(&self, identity: &Arc<WorkloadIdentity>) {
        let mut next = self.next();
        next.by_name.insert(WORKLOAD.into(), Secret::Certificate(Arc::new(identity.keys.clone())));
        next.by_name.insert(ROOTS.into(), Secret::Roots(Arc::new(Trust::from(Arc::clone(&identity.roots)))));
        next.workload = Some(Arc::clone(identity));
        self.0.store(Arc::new(next));
    }
}
