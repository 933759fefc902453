//! From a snapshot and a proxy's facts to its resources.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::mem;
use std::sync::{Mutex, PoisonError};

use compile::{Capabilities, Resources, View};
use envoy_types::pb::google::protobuf::Any;
use explain::Refusal;
use mesh::{MeshSnapshot, ServiceKey};
use types::Finding;

/// What one proxy should have, and what is wrong with it.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Messages.
    pub resources: Vec<Told>,
    /// What is wrong with no single resource.
    pub findings: Vec<Finding>,
}

/// One resource.
#[derive(Clone, Debug)]
pub struct Told {
    /// Its name.
    pub name: String,
    /// The message.
    pub any: Any,
    /// What is wrong with it.
    pub finding: Option<Finding>,
}

/// Compiles. A seam: tests have small compilers of their own.
///
/// Pure; may take long, and is called where blocking is allowed.
pub trait Compiler: Send + Sync + 'static {
    /// All that a proxy should have.
    fn compile(&self, snapshot: &MeshSnapshot, view: &View) -> Compiled;

    /// Of all that, the clusters of these services with their endpoints, without findings about no
    /// single resource; as [`compile::clusters_of`].
    fn clusters_of(&self, snapshot: &MeshSnapshot, view: &View, services: &BTreeSet<ServiceKey>) -> Compiled;
}

/// The compiler of this mesh.
#[derive(Debug, Default)]
pub struct MeshCompiler {
    /// Says what our own proxies would refuse, before it is pushed.
    verdicts: Option<Verdicts>,
}

impl MeshCompiler {
    /// The compiler that also says what Lateen's own proxies would refuse.
    pub fn vetted() -> Self {
        Self { verdicts: Some(Verdicts::default()) }
    }
}

impl Compiler for MeshCompiler {
    fn compile(&self, snapshot: &MeshSnapshot, view: &View) -> Compiled {
        self.judged(compile::compile(snapshot, view), view)
    }

    fn clusters_of(&self, snapshot: &MeshSnapshot, view: &View, services: &BTreeSet<ServiceKey>) -> Compiled {
        self.judged(compile::clusters_of(snapshot, view, services), view)
    }
}

impl MeshCompiler {
    fn judged(&self, compiled: Resources, view: &View) -> Compiled {
        // Another Envoy may well take what ours refuses.
        let verdicts = self.verdicts.as_ref().filter(|_| view.capabilities == Capabilities::ALL);
        let resources = compiled.packed().into_iter().map(|resource| Told {
            finding: verdicts.and_then(|of| of.of(&resource)).map(|refusal| explain::refused(view, &refusal)),
            name: resource.name,
            any: resource.any,
        });
        Compiled { resources: resources.collect(), findings: compiled.findings }
    }
}

/// Verdicts of one generation; two are kept. Far above what 10 000 services make.
const VERDICTS_MAX: usize = 1 << 18;

/// What the engine said about resources, by content: most are the same for many proxies, and from
/// push to push.
///
/// *Cost*: a hash of the bytes for what is known, lowering for what is new.
struct Verdicts {
    hasher: RandomState,
    known: Mutex<Generations>,
    limit: usize,
}

/// What was asked for since the last turn, and before. An entry that two turns passed over is gone.
#[derive(Default)]
struct Generations {
    young: HashMap<u64, Option<Refusal>>,
    old: HashMap<u64, Option<Refusal>>,
}

impl Default for Verdicts {
    fn default() -> Self {
        Self { hasher: RandomState::new(), known: Mutex::default(), limit: VERDICTS_MAX }
    }
}

impl fmt::Debug for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verdicts").finish_non_exhaustive()
    }
}

/// A resource without a verdict.
struct Unknown;

impl Verdicts {
    fn of(&self, resource: &compile::Resource) -> Option<Refusal> {
        let key = self.hasher.hash_one((resource.type_url, &resource.name, &resource.any.value));
        if let Ok(known) = self.known(key) {
            return known;
        }
        // Not under the lock: it takes long, and may panic.
        let verdict = explain::refusal(resource);
        self.remember(key, verdict.clone());
        verdict
    }

    /// *Errors*: nobody has judged it yet, or long ago.
    fn known(&self, key: u64) -> Result<Option<Refusal>, Unknown> {
        let found = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            match known.young.get(&key) {
                Some(found) => return Ok(found.clone()),
                None => known.old.get(&key).cloned().ok_or(Unknown)?,
            }
        };
        self.remember(key, found.clone());
        Ok(found)
    }

    fn remember(&self, key: u64, verdict: Option<Refusal>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.young.len() >= self.limit {
            known.old = mem::take(&mut known.young);
        }
        known.young.insert(key, verdict);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::wellknown::type_urls;

    fn resource(name: &str, value: &[u8]) -> compile::Resource {
        let any = Any { type_url: type_urls::CLUSTER.to_owned(), value: value.to_vec() };
        compile::Resource { type_url: type_urls::CLUSTER, name: name.to_owned(), any }
    }

    #[test]
    fn a_cached_verdict_is_the_engines() {
        let verdicts = Verdicts { limit: 3, ..Verdicts::default() };
        let good = [10, 1, b'a'];
        for round in 0..4_u8 {
            for number in 0..5_u8 {
                let bad = resource("bad", &[0xff, number]);
                assert_eq!(verdicts.of(&bad), explain::refusal(&bad), "round {round}");
                assert!(verdicts.of(&bad).is_some());
                let fine = resource("a", &good);
                assert_eq!(verdicts.of(&fine), explain::refusal(&fine));
            }
            let known = verdicts.known.lock().unwrap();
            assert!(known.young.len() <= 3 && known.old.len() <= 3, "bounded");
        }
    }

    #[test]
    fn names_and_types_are_part_of_the_content() {
        let verdicts = Verdicts::default();
        assert_eq!(verdicts.of(&resource("one", &[0xff])).map(|refusal| refusal.name), Some("one".into()));
        assert_eq!(verdicts.of(&resource("two", &[0xff])).map(|refusal| refusal.name), Some("two".into()));
    }
}
