//! An object: metadata, typed spec, and the JSON it came from.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use types::{Labels, NamespacedName, ObjectRef};

use crate::k8s::{self, OwnerReference};
use crate::kind::Kind;
use crate::{networking, operator, security, telemetry};

/// What every object has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// The object's name.
    pub name: Box<str>,
    /// Empty for kinds without namespaces, never otherwise.
    pub namespace: Box<str>,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Empty until a store admitted the object.
    pub uid: Box<str>,
    /// Counts changes of the spec, from 1; 0 until admitted.
    pub generation: u64,
    /// Counts all changes in a store; empty until admitted.
    pub resource_version: Box<str>,
    /// Creation in seconds since 1970; 0 when unknown. See [`Object::age`].
    pub created: i64,
    /// Set while the object is going away.
    pub deleted: bool,
    /// Who made it.
    pub owners: Vec<OwnerReference>,
}

macro_rules! specs {
    ($( $variant:ident($type:ty); )*) => {
        /// The typed part of an object: `spec` of Istio's kinds, everything but the metadata of
        /// Kubernetes' kinds.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Spec {
            $(
                #[doc = concat!("Of the kind `", stringify!($variant), "`.")]
                $variant(Arc<$type>),
            )*
            /// Of a kind that is known by name only.
            Recognised,
        }

        $(
            impl Typed for $type {
                const KIND: Kind = Kind::$variant;
                fn of(spec: &Spec) -> Option<&Arc<Self>> {
                    match spec { Spec::$variant(typed) => Some(typed), _ => None }
                }
            }
        )*

        /// Decodes the typed part of `kind`.
        pub(crate) fn decode_spec(kind: Kind, decode: &mut impl DecodeSpec) -> Option<Spec> {
            match kind {
                $( Kind::$variant => decode.decode::<$type>().map(|typed| Spec::$variant(Arc::new(typed))), )*
                _ => Some(Spec::Recognised),
            }
        }
    };
}

/// Decodes one type from wherever the decoder stands; `None` after reporting why not.
pub(crate) trait DecodeSpec {
    fn decode<T: serde::de::DeserializeOwned + Typed>(&mut self) -> Option<T>;
}

/// A type that is the spec of one kind.
pub trait Typed: Sized + 'static {
    /// The kind.
    const KIND: Kind;
    /// The typed part, if `spec` is of this kind.
    fn of(spec: &Spec) -> Option<&Arc<Self>>;
}

specs! {
    Namespace(k8s::Namespace);
    ServiceAccount(k8s::ServiceAccount);
    ConfigMap(k8s::ConfigMap);
    Secret(k8s::Secret);
    Service(k8s::Service);
    EndpointSlice(k8s::EndpointSlice);
    Deployment(k8s::Deployment);
    Pod(k8s::Pod);
    IstioOperator(operator::IstioOperator);
    Gateway(networking::Gateway);
    VirtualService(networking::VirtualService);
    DestinationRule(networking::DestinationRule);
    ServiceEntry(networking::ServiceEntry);
    WorkloadEntry(networking::WorkloadEntry);
    Sidecar(networking::Sidecar);
    PeerAuthentication(security::PeerAuthentication);
    RequestAuthentication(security::RequestAuthentication);
    AuthorizationPolicy(security::AuthorizationPolicy);
    Telemetry(telemetry::Telemetry);
}

/// An object as a user or a controller wrote it.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// The kind.
    pub kind: Kind,
    /// Name, namespace, labels, …
    pub meta: Metadata,
    /// The typed part.
    pub spec: Spec,
    /// The whole object as JSON, with its namespace filled in.
    pub raw: Arc<Value>,
}

impl Object {
    /// Kind, namespace and name.
    pub fn reference(&self) -> ObjectRef {
        ObjectRef::new(self.kind.name(), &self.meta.namespace, &self.meta.name)
    }

    /// Namespace and name.
    pub fn key(&self) -> NamespacedName {
        NamespacedName { namespace: self.meta.namespace.clone(), name: self.meta.name.clone() }
    }

    /// Orders objects as Istio does where the oldest wins: creation, then name, then namespace.
    pub fn age(&self) -> (i64, &str, &str) {
        (self.meta.created, &self.meta.name, &self.meta.namespace)
    }

    /// The typed part, if the object is of `T`'s kind.
    pub fn typed<T: Typed>(&self) -> Option<&Arc<T>> {
        T::of(&self.spec)
    }
}
