//! Resources that several proxies have, each once in memory.
//!
//! Most clusters, endpoints and route tables are the same for every proxy of a namespace. Each
//! proxy's set holds them; the pool only knows them, so that what nobody has any more is gone.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Weak};

use envoy_types::pb::google::protobuf::Any;
use xds::Resource;

/// Every resource that some proxy has.
#[derive(Default)]
pub(crate) struct Pool {
    hasher: RandomState,
    known: HashMap<u64, Vec<Weak<Resource>>>,
    /// Entries that were left by the last sweep.
    swept: usize,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("known", &self.known.len()).finish_non_exhaustive()
    }
}

impl Pool {
    /// The one resource of this type, name and content.
    pub(crate) fn share(&mut self, name: &str, any: Any) -> Arc<Resource> {
        let key = self.hasher.hash_one((&any.type_url, name, &any.value));
        let same = |of: &Arc<Resource>| *of.name == *name && of.any == any;
        let held = self.known.get(&key).into_iter().flatten().filter_map(Weak::upgrade).find(same);
        if let Some(held) = held {
            return held;
        }
        self.sweep();
        let version = format!("{:016x}", xds::canonical::hash(&any.value)).into();
        let new = Arc::new(Resource { name: name.into(), version, any });
        self.known.entry(key).or_default().push(Arc::downgrade(&new));
        new
    }

    /// Forgets what nobody has, whenever the pool has doubled: a constant cost for each addition.
    fn sweep(&mut self) {
        const ALWAYS_KEPT: usize = 1024;
        if self.known.len() < 2 * self.swept.max(ALWAYS_KEPT) {
            return;
        }
        self.known.retain(|_, list| {
            list.retain(|of| of.strong_count() > 0);
            !list.is_empty()
        });
        self.swept = self.known.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, content: u32) -> Any {
        let mut value = vec![8];
        value.extend_from_slice(&content.to_le_bytes().map(|byte| byte & 0x7f));
        Any { type_url: type_url.to_owned(), value }
    }

    #[test]
    fn equal_ones_are_one() {
        let mut pool = Pool::default();
        let first = pool.share("a", any("t", 1));
        assert!(Arc::ptr_eq(&first, &pool.share("a", any("t", 1))));
        for other in [pool.share("b", any("t", 1)), pool.share("a", any("u", 1)), pool.share("a", any("t", 2))] {
            assert!(!Arc::ptr_eq(&first, &other));
        }
    }

    #[test]
    fn what_nobody_has_is_forgotten() {
        let mut pool = Pool::default();
        let kept = pool.share("kept", any("t", 0));
        for number in 0..10_000 {
            pool.share(&number.to_string(), any("t", number));
        }
        assert!(pool.known.len() <= 2048, "{}", pool.known.len());
        assert!(Arc::ptr_eq(&kept, &pool.share("kept", any("t", 0))));
    }
}
