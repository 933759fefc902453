//! The words every other room shares: names, identities, message heads, causes, findings.
//!
//! Data flows nowhere here: these are values. A word lives in this crate when two rooms that may
//! not see each other need it (the planes meet on the wire only), or when it has exactly one
//! spelling that must not be written twice.
//!
//! **Invariants.** No I/O, clock, randomness or environment. No dependency on Envoy's messages,
//! Istio's YAML, tokio or any other room. Parsing happens at the edge: a value of one of these
//! types is valid.
//!
//! Start reading at [`ClusterName`], [`head`] and [`Cause`].

pub mod cause;
pub mod cluster_name;
pub mod finding;
pub mod head;
pub mod identity;
pub mod labels;
pub mod locality;
pub mod names;
pub mod wellknown;

pub use cluster_name::ClusterName;
pub use finding::{Effect, Finding, ObjectRef, Position, Severity};

pub use cause::{Cause, GrpcCode};
pub use head::{Fields, RequestHead, ResponseHead, Scheme, Version};
pub use identity::{SpiffeId, TrustDomain};
pub use labels::{Labels, Selector};
pub use locality::Locality;
pub use names::{HostPattern, Hostname, NamespacedName};
