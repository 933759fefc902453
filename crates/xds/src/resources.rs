//! What a proxy should have: named, versioned resources by type.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::google::protobuf::Any;
use prost::Message;
use types::wellknown::type_urls;

use crate::canonical;

/// One named resource. Equal content has an equal version.
#[derive(Clone, PartialEq, Debug)]
pub struct Resource {
    /// Unique within its type; empty for a type with a single resource (NDS).
    pub name: Box<str>,
    /// Of the content, the same across restarts.
    pub version: Box<str>,
    /// The message.
    pub any: Any,
}

/// Resources of one type by name.
pub type Table = BTreeMap<Box<str>, Arc<Resource>>;

/// Everything one proxy should have at one moment. Immutable once shared.
#[derive(Clone, Default, Debug)]
pub struct ResourceSet {
    /// Grows with every set that a proxy is given.
    pub generation: u64,
    /// What responses carry as `version_info` and `system_version_info`.
    pub version: Box<str>,
    tables: BTreeMap<Box<str>, Arc<Table>>,
}

impl ResourceSet {
    /// An empty set.
    pub fn new(generation: u64, version: &str) -> Self {
        Self { generation, version: version.into(), tables: BTreeMap::new() }
    }

    /// The same resources as a later set. *Cost*: of the types, not of the resources.
    #[must_use]
    pub fn renewed(&self, generation: u64, version: &str) -> Self {
        Self { generation, version: version.into(), tables: self.tables.clone() }
    }

    /// Adds a resource, replacing one of the same type and name.
    pub fn insert(&mut self, name: &str, any: Any) {
        let version = format!("{:016x}", canonical::hash(&any.value)).into();
        self.insert_shared(Arc::new(Resource { name: name.into(), version, any }));
    }

    /// Adds a resource whose version is known.
    pub fn insert_shared(&mut self, resource: Arc<Resource>) {
        if let Some(table) = self.tables.get_mut(resource.any.type_url.as_str()) {
            Arc::make_mut(table).insert(resource.name.clone(), resource);
        } else {
            let type_url = resource.any.type_url.as_str().into();
            self.tables.insert(type_url, Arc::new(Table::from([(resource.name.clone(), resource)])));
        }
    }

    /// Whether the resources of one type are the very same in `other`. Equal ones need not be.
    pub(crate) fn shares_table(&self, other: &Self, type_url: &str) -> bool {
        match (self.tables.get(type_url), other.tables.get(type_url)) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        }
    }

    /// The resources of one type.
    pub fn table(&self, type_url: &str) -> Option<&Table> {
        self.tables.get(type_url).map(|table| &**table)
    }

    /// One resource.
    pub fn get(&self, type_url: &str, name: &str) -> Option<&Arc<Resource>> {
        self.tables.get(type_url)?.get(name)
    }

    /// Types and their tables, by type URL.
    pub fn tables(&self) -> impl Iterator<Item = (&str, &Table)> {
        self.tables.iter().map(|(type_url, table)| (&**type_url, &**table))
    }
}

/// The resource that stands for "nothing known by this name", where a client would otherwise wait
/// for ever: an empty load assignment or route table. *Source*: what istiod answers.
pub(crate) fn placeholder(type_url: &str, name: &str) -> Option<Resource> {
    matches!(type_url, type_urls::ENDPOINT | type_urls::ROUTE).then(|| Resource {
        name: name.into(),
        version: "absent".into(),
        any: Any { type_url: type_url.to_owned(), value: Named { name: name.to_owned() }.encode_to_vec() },
    })
}

/// The name that a resource carries in itself, as state-of-the-world responses need it. All
/// resource types of Envoy keep it in field 1; others (NDS) have none and answer the empty name.
pub(crate) fn name_of(any: &Any) -> Result<String, prost::DecodeError> {
    match any.type_url.as_str() {
        type_urls::CLUSTER
        | type_urls::ENDPOINT
        | type_urls::LISTENER
        | type_urls::ROUTE
        | type_urls::SECRET
        | type_urls::EXTENSION_CONFIG => Named::decode(any.value.as_slice()).map(|named| named.name),
        _ => Ok(String::new()),
    }
}

/// Types whose state-of-the-world responses are complete: what is absent is removed, and which a
/// first request without names asks for as a whole.
pub(crate) fn is_whole(type_url: &str) -> bool {
    matches!(type_url, type_urls::CLUSTER | type_urls::LISTENER | type_urls::NAME_TABLE)
}

#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;

    #[test]
    fn placeholders_decode_as_the_real_thing() {
        let any = placeholder(type_urls::ENDPOINT, "outbound|80||a").unwrap().any;
        let empty = ClusterLoadAssignment::decode(any.value.as_slice()).unwrap();
        assert_eq!(empty, ClusterLoadAssignment { cluster_name: "outbound|80||a".to_owned(), ..Default::default() });
        assert_eq!(name_of(&any).unwrap(), "outbound|80||a");
        assert!(placeholder(type_urls::SECRET, "x").is_none());
    }

    #[test]
    fn a_later_set_shares_what_it_does_not_replace() {
        let any = |type_url: &str, text: &str| Any { type_url: type_url.to_owned(), value: text.as_bytes().to_vec() };
        let mut old = ResourceSet::new(1, "1");
        old.insert("a", any("t", "a"));
        old.insert("b", any("t", "b"));
        old.insert("c", any("u", "c"));
        let mut new = old.renewed(2, "2");
        new.insert("b", any("t", "changed"));
        assert_eq!((old.generation, new.generation), (1, 2));
        assert_eq!(old.get("t", "b").unwrap().any, any("t", "b"));
        assert_eq!(new.get("t", "b").unwrap().any, any("t", "changed"));
        assert!(Arc::ptr_eq(new.get("t", "a").unwrap(), old.get("t", "a").unwrap()));
        assert!(std::ptr::eq(new.table("u").unwrap(), old.table("u").unwrap()));
    }
}
