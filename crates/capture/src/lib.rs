//! Links, addresses, routes and redirect rules, made over netlink: the kernel's side of capture.
//!
//! Nothing flows through this room at run time. Callers put a thread into the network namespace
//! they mean and call; every function acts on *the calling thread's* network namespace, and objects
//! that hold a socket keep acting on the one they were made in.
//!
//! **Invariants.** No program is run (`ip`, `nft`, `iptables` are not needed), no namespace is made
//! or entered here except in the probe's child process, and nothing outside of the current
//! namespace changes. Each batch of rules is taken whole or not at all. A failure says which step,
//! why, and what to do ([`CaptureError`]).
//!
//! Start reading at [`Redirect`] (a pod's rules), [`Switch`] and [`Services`] (the mesh's), [`probe`].

mod error;
mod link;
mod netlink;
mod nft;
pub mod probe;
mod rules;
mod services;

pub use error::{CaptureError, Step};
pub use link::{Extras, Network, Switch, join};
pub use rules::{Inbound, Redirect};
pub use services::{Protocol, ServiceAddress, ServicePort, Services};
