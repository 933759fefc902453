//! The mesh at one moment: what users admitted, typed, completed, indexed and shared.
//!
//! [`MeshSnapshot::next`] takes the admitted objects ([`api::ConfigSet`]) and gives an immutable
//! snapshot and findings about objects *together* (conflicts, references that lead nowhere, what is
//! shadowed by whom); single objects were checked at admission by `api`. `compile` reads the
//! snapshot with the facts of one proxy; nothing flows back.
//!
//! **Invariants.** Pure: no I/O, clock, randomness, environment. No Envoy message appears here.
//! Every order is fixed by creation, name and namespace, never by a hash. A snapshot is never
//! changed; what is equal to the previous snapshot is the same `Arc`.
//!
//! Start reading at [`MeshSnapshot`], then [`Service`], [`VirtualService`], [`DestinationRule`] and
//! [`Scope`].
//!
//! *Source*: Istio's traffic management reference (protocol selection, exportTo, Sidecar,
//! DestinationRule lookup) and security reference (PeerAuthentication precedence).

mod analyze;
mod collect;
pub mod config;
mod delegate;
mod destination_rule;
pub mod host;
mod key_sets;
mod policy;
mod protocol;
mod registry;
mod scope;
mod service;
mod snapshot;
mod virtual_service;
mod visibility;
mod workload;

pub use config::{Config, Provenance};
pub use destination_rule::{DestinationRule, DestinationRuleIndex, EffectivePolicy, RuleClient, Subset};
pub use key_sets::{Fetched, KeySets, KeySource};
pub use policy::{ByNamespace, MtlsPolicy, Selects};
pub use protocol::Protocol;
pub use registry::target_number;
pub use scope::{EgressScope, Scope};
pub use service::{
    Age, Endpoint, EndpointAddress, EndpointSet, Health, Registry, Resolution, Service, ServiceAddress, ServiceKey,
    ServicePort, TargetPort, TrafficDistribution, Workload,
};
pub use snapshot::{MeshSnapshot, Namespace, Reach, Reached};
pub use virtual_service::{HttpEntry, MESH_GATEWAY, VirtualService, VirtualServiceIndex, gateway_key};
pub use visibility::Visibility;
pub use workload::locality_of;
