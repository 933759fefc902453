//! Who a workload is: its certificate, its peers' certificates, and TLS that tells them apart.
//!
//! [`agent`] keeps a workload's key and certificate fresh by asking the mesh's CA; [`tls`] makes
//! TLS configurations from it, or from a gateway's own certificates; [`peer`] reads the facts of a
//! peer's certificate; [`channel`] connects to the control plane over TLS of ours.
//!
//! **Invariants.** A peer's identity is the only URI SAN of its leaf, and only if that is a
//! well-formed SPIFFE ID (property 17); a mesh handshake checks chain and SAN, never a DNS name. A
//! TLS session is never resumed where a client certificate matters (property 19). A private key
//! never leaves the process that made it, is not written anywhere, and is not in `Debug` output.
//! One crypto provider, passed explicitly.
//!
//! Start reading at [`workload`], then [`tls`].
//!
//! Source: SPIFFE X.509-SVID; Istio's certificate service and agent; RFC 5280, RFC 8446.

pub mod agent;
pub mod channel;
pub mod peer;
pub mod pem;
pub mod tls;
pub mod workload;

pub use peer::PeerFacts;
pub use workload::{TrustRoots, WorkloadIdentity};
