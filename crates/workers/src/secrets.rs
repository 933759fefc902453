//! Secrets by name: the workload's own, and those received.
//!
//! The control side replaces the whole store; workers look names up at each handshake, so that a
//! renewed certificate counts for the next one (`design.md`, decision 4).

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use engine::config::Name;
use identity::workload::{KeyAndChain, TrustRoots, WorkloadIdentity};

/// The SDS name of the workload's own certificate.
pub const WORKLOAD: &str = "default";
/// The SDS name of the mesh's roots.
pub const ROOTS: &str = "ROOTCA";

/// One secret.
#[derive(Clone, Debug)]
pub enum Secret {
    /// A key with its chain.
    Certificate(Arc<KeyAndChain>),
    /// Roots to verify against.
    Roots(Arc<TrustRoots>),
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
    /// The key and chain of this name.
    pub fn certificate(&self, name: &str) -> Option<&Arc<KeyAndChain>> {
        match self.by_name.get(name)? {
            Secret::Certificate(keys) => Some(keys),
            Secret::Roots(_) => None,
        }
    }

    /// The roots of this name.
    pub fn roots(&self, name: &str) -> Option<&Arc<TrustRoots>> {
        match self.by_name.get(name)? {
            Secret::Roots(roots) => Some(roots),
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
        next.by_name.insert(ROOTS.into(), Secret::Roots(Arc::clone(&identity.roots)));
        next.workload = Some(Arc::clone(identity));
        self.0.store(Arc::new(next));
    }
}
