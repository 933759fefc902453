//! The runtime configuration of a proxy: immutable tables, swapped whole.
//!
//! A control thread lowers resources into [`Table`]s of shared parts and publishes a new
//! [`RuntimeConfig`]; each worker keeps one clone of it behind an `Rc` (a clone costs five
//! reference counts, nothing is copied).

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use indexmap::IndexMap;

use crate::chain::{FilterChain, Listener};
use crate::cluster::{Cluster, EndpointSet};
use crate::route::RouteTable;

/// The name of a resource, shared.
pub type Name = Arc<str>;

/// A fast hasher for names that come from the control plane, which is trusted not to collide them.
#[derive(Clone, Copy, Default, Debug)]
pub struct NameHasher;

/// State of [`NameHasher`].
#[derive(Clone, Debug)]
pub struct NameState(u64);

impl Hasher for NameState {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut hash = self.0;
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            hash = (hash.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        for byte in rest {
            hash = (hash.rotate_left(5) ^ u64::from(*byte)).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        self.0 = hash;
    }
}

impl BuildHasher for NameHasher {
    type Hasher = NameState;
    fn build_hasher(&self) -> NameState {
        NameState(0x9e37_79b9_7f4a_7c15)
    }
}

/// A map from names with a hash that is cheap for names.
pub type NameMap<V> = IndexMap<Name, V, NameHasher>;

/// Resources of one kind by name.
///
/// *Shape*: names are unique; order is that of first arrival.
#[derive(Debug)]
pub struct Table<T> {
    map: NameMap<Arc<T>>,
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self { map: self.map.clone() }
    }
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { map: NameMap::default() }
    }
}

impl<T> Table<T> {
    /// The resource called `name`.
    pub fn get(&self, name: &str) -> Option<&Arc<T>> {
        self.map.get(name)
    }

    /// Every resource with its name.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Arc<T>)> {
        self.map.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Adds or replaces.
    pub fn insert(&mut self, name: Name, value: Arc<T>) {
        self.map.insert(name, value);
    }

    /// Takes out; says whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        self.map.shift_remove(name).is_some()
    }

    /// Keeps only what `keep` says.
    pub fn retain(&mut self, mut keep: impl FnMut(&str, &Arc<T>) -> bool) {
        self.map.retain(|name, value| keep(name, value));
    }
}

impl<T> FromIterator<(Name, Arc<T>)> for Table<T> {
    fn from_iter<I: IntoIterator<Item = (Name, Arc<T>)>>(iter: I) -> Self {
        Self { map: iter.into_iter().collect() }
    }
}

/// What the proxy says about itself to its peers and in its headers; from the bootstrap.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// `x-envoy-peer-metadata-id`: the node id.
    pub id: Box<str>,
    /// `x-envoy-peer-metadata`: base64 of the metadata as a `google.protobuf.Struct`.
    pub peer_metadata: Box<str>,
}

/// Everything the proxy decides with, of one generation.
///
/// *Cost*: a clone is five reference counts.
#[derive(Clone, Debug, Default)]
pub struct RuntimeConfig {
    /// Counts up with every publication.
    pub generation: u64,
    /// Listeners by name.
    pub listeners: Arc<Table<Listener>>,
    /// Route tables received by name (inline ones are inside their connection manager).
    pub routes: Arc<Table<RouteTable>>,
    /// Clusters by name.
    pub clusters: Arc<Table<Cluster>>,
    /// Endpoints by the key that [`Cluster::endpoints_key`] gives.
    pub endpoints: Arc<Table<EndpointSet>>,
    /// About this proxy.
    pub node: Arc<NodeFacts>,
}

impl RuntimeConfig {
    /// The endpoints of `cluster`: those received or resolved, else those it carries.
    pub fn endpoints_of<'a>(&'a self, cluster: &'a Cluster) -> Option<&'a Arc<EndpointSet>> {
        match cluster.endpoints_key() {
            Some(key) => self.endpoints.get(key),
            None => cluster.inline_endpoints.as_ref(),
        }
    }

    /// The chain of this generation that stands where `chain` stood: same listener, same name, same
    /// match. A new policy therefore meets the next request of an old connection. The chain itself
    /// if there is none (it is draining).
    pub fn current_chain(&self, listener: &str, chain: &Arc<FilterChain>) -> Arc<FilterChain> {
        let found = self.listeners.get(listener).and_then(|listener| listener.chain_by_key(chain.key));
        Arc::clone(found.unwrap_or(chain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_finds_by_name() {
        let mut table = Table::default();
        table.insert("outbound|80||a".into(), Arc::new(1));
        table.insert("outbound|80||b".into(), Arc::new(2));
        table.insert("outbound|80||a".into(), Arc::new(3));
        assert_eq!(table.get("outbound|80||a").map(|v| **v), Some(3));
        assert_eq!(table.len(), 2);
        assert!(table.remove("outbound|80||a") && !table.remove("outbound|80||a"));
    }

    #[test]
    fn equal_names_hash_alike_and_near_ones_apart() {
        let hash = |s: &str| NameHasher.hash_one(s);
        assert_eq!(hash("abc"), hash("abc"));
        assert_ne!(hash("outbound|80||a"), hash("outbound|80||b"));
        assert_ne!(hash("a"), hash("a\0"));
    }
}
