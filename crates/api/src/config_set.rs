//! All admitted objects at one moment.

use std::collections::BTreeMap;
use std::sync::Arc;

use types::{NamespacedName, ObjectRef};

use crate::kind::Kind;
use crate::mesh_config::MeshConfig;
use crate::object::{Object, Typed};
use crate::operator::IstioOperator;

/// One change of a set.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The object is new, or replaces its namesake.
    Upsert(Arc<Object>),
    /// The object is gone.
    Delete(ObjectRef),
}

impl Change {
    /// Which object.
    pub fn reference(&self) -> ObjectRef {
        match self {
            Self::Upsert(object) => object.reference(),
            Self::Delete(reference) => reference.clone(),
        }
    }
}

type OfKind = BTreeMap<NamespacedName, Arc<Object>>;

/// Objects by kind, namespace and name; iteration is in that order.
///
/// *Cost*: a clone shares everything; a change copies the list of one kind if it is shared.
#[derive(Clone, Default, Debug, PartialEq)]
pub struct ConfigSet {
    kinds: BTreeMap<Kind, Arc<OfKind>>,
}

impl ConfigSet {
    /// A set of `objects`; of two namesakes the later one stays.
    pub fn new(objects: impl IntoIterator<Item = Object>) -> Self {
        let mut set = Self::default();
        for object in objects {
            set.apply(&Change::Upsert(Arc::new(object)));
        }
        set
    }

    /// Applies a change. Returns what was there before.
    pub fn apply(&mut self, change: &Change) -> Option<Arc<Object>> {
        match change {
            Change::Upsert(object) => {
                let of_kind = self.kinds.entry(object.kind).or_default();
                Arc::make_mut(of_kind).insert(object.key(), Arc::clone(object))
            }
            Change::Delete(reference) => {
                let mut before = None;
                // Two groups may share a name of a kind (`Gateway`); a reference means ours, the first.
                for (kind, of_kind) in &mut self.kinds {
                    let key = NamespacedName { namespace: reference.namespace.clone(), name: reference.name.clone() };
                    if kind.name() == &*reference.kind && of_kind.contains_key(&key) {
                        before = Arc::make_mut(of_kind).remove(&key);
                        break;
                    }
                }
                self.kinds.retain(|_, of_kind| !of_kind.is_empty());
                before
            }
        }
    }

    /// The object of that kind and name.
    pub fn find(&self, kind: Kind, key: &NamespacedName) -> Option<&Arc<Object>> {
        self.kinds.get(&kind)?.get(key)
    }

    /// The object of that kind and name, with its typed part.
    pub fn get<T: Typed>(&self, namespace: &str, name: &str) -> Option<(&Arc<Object>, &Arc<T>)> {
        let object = self.find(T::KIND, &NamespacedName::new(namespace, name))?;
        Some((object, object.typed::<T>()?))
    }

    /// Objects of `T`'s kind with their typed parts, by namespace and name.
    pub fn all<T: Typed>(&self) -> impl Iterator<Item = (&Arc<Object>, &Arc<T>)> {
        self.of_kind(T::KIND).filter_map(|object| Some((object, object.typed::<T>()?)))
    }

    /// Objects of `T`'s kind in `namespace`, by name.
    pub fn in_namespace<'a, T: Typed>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a Arc<Object>, &'a Arc<T>)> {
        let from = NamespacedName::new(namespace, "");
        let range = self.kinds.get(&T::KIND).map(|of_kind| of_kind.range(from..));
        range
            .into_iter()
            .flatten()
            .take_while(move |(key, _)| &*key.namespace == namespace)
            .filter_map(|(_, object)| Some((object, object.typed::<T>()?)))
    }

    /// Objects of `kind`, by namespace and name.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Arc<Object>> {
        self.kinds.get(&kind).into_iter().flat_map(|of_kind| of_kind.values())
    }

    /// All objects, by kind, namespace and name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.kinds.values().flat_map(|of_kind| of_kind.values())
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.kinds.values().map(|of_kind| of_kind.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Whether pods get a proxy in namespaces that say nothing about it: what the oldest IstioOperator
    /// that has `values` says.
    pub fn injects_by_default(&self) -> bool {
        let with_values = self.all::<IstioOperator>().filter(|(_, operator)| operator.values.is_some());
        with_values.min_by_key(|(object, _)| object.age()).is_some_and(|(_, operator)| operator.injects_by_default())
    }

    /// `meshConfig` of the oldest IstioOperator that has one.
    pub fn mesh_config(&self) -> Option<(&Arc<Object>, &MeshConfig)> {
        self.all::<IstioOperator>()
            .filter_map(|(object, operator)| Some((object, operator.mesh_config.as_ref()?)))
            .min_by_key(|(object, _)| object.age())
    }
}
