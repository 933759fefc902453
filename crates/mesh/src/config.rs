//! One admitted object with its typed spec, as the indexes hold it.

use std::sync::Arc;

use types::{Labels, NamespacedName, ObjectRef};

use crate::service::Age;

/// An object's identity and its spec.
#[derive(Debug)]
pub struct Config<T> {
    /// Kind, namespace and name.
    pub object: ObjectRef,
    /// For conflicts and order.
    pub age: Age,
    /// Its labels.
    pub labels: Labels,
    /// Its annotations.
    pub annotations: Labels,
    /// What it says, as written.
    pub spec: Arc<T>,
}

impl<T> Clone for Config<T> {
    fn clone(&self) -> Self {
        Self {
            object: self.object.clone(),
            age: self.age.clone(),
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            spec: Arc::clone(&self.spec),
        }
    }
}

impl<T> Config<T> {
    /// Pairs an object's metadata with its typed spec.
    pub fn new(meta: &api::Metadata, kind: &str, spec: &Arc<T>) -> Self {
        Self {
            object: ObjectRef::new(kind, &meta.namespace, &meta.name),
            age: Age { created: meta.created, name: meta.name.clone(), namespace: meta.namespace.clone() },
            labels: meta.labels.clone(),
            annotations: meta.annotations.clone(),
            spec: Arc::clone(spec),
        }
    }

    /// `namespace/name`
    pub fn key(&self) -> NamespacedName {
        NamespacedName::new(&self.object.namespace, &self.object.name)
    }

    /// The object's namespace.
    pub fn namespace(&self) -> &str {
        &self.object.namespace
    }

    /// The object's name.
    pub fn name(&self) -> &str {
        &self.object.name
    }
}

/// Where a piece of compiled configuration was said: an object and a field of it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Provenance {
    /// The object.
    pub object: ObjectRef,
    /// `spec.http[0]`; empty for the whole object.
    pub field: Box<str>,
}

impl Provenance {
    /// A field of an object.
    pub fn new(object: &ObjectRef, field: impl Into<Box<str>>) -> Self {
        Self { object: object.clone(), field: field.into() }
    }
}
