//! The data plane's control side: what its workers run, and everything about a proxy that is no request.
//!
//! ```text
//!            xDS, files ──► control ──lower (own thread)──► RuntimeConfig ──► workers (one per core)
//!  agent ─► secrets ─┘        │ owns listening sockets, admin, readiness, DNS
//! ```
//!
//! What flows in: configuration from the control plane or a bootstrap file, certificates from the
//! CA. What flows out: configuration for the [`workers`], which serve the connections, and pages of
//! the admin interface.
//!
//! **Invariants.** What is refused changes nothing: the last good version of each resource stays.
//! Workers never wait for this side. What a peer can fill is bounded. `api`, `mesh` and `compile`
//! are not seen here: the planes meet on the wire.
//!
//! Start reading at [`run`], then `control`.

mod admin;
pub mod agent;
pub mod bootstrap;
mod control;
mod dns;
mod file_secrets;
mod options;
mod plane;
mod proxy;
#[cfg(test)]
mod tests;

pub use options::{Addresses, InvalidOptions, LogLevels, Options, Role, Termination};
pub use proxy::{Proxy, RunError, check, run};
