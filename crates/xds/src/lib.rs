//! The xDS transport, both ends: state machines without I/O, and their glue to gRPC.
//!
//! [`client`] keeps an aggregated stream (ADS) to a control plane open, delta or state of the
//! world, and hands resources over; the consumer answers ack or nack once its workers run them.
//! [`server`] keeps one [`server::Session`] a stream: it compares what a proxy should
//! have ([`ResourceSet`]) with what it was sent, and says what to send next. [`relay`] passes a
//! foreign proxy's stream on.
//!
//! **Invariants.** What a resource means is unknown here, except its name. At most one response a
//! type is unanswered. Both protocols bring a client to the same resources (a property test holds
//! them to it). A slow peer delays itself only. What is equal in content has an equal version, in
//! whatever order its maps were written.
//!
//! Start reading at [`resources`], then [`server::session`] and [`client::state`].
//!
//! Source: xDS REST and gRPC protocol (envoyproxy.io), Istio's ADS as recorded from istiod.

pub mod canonical;
pub mod client;
pub mod relay;
pub mod resources;
pub mod server;

pub use resources::{Resource, ResourceSet};
