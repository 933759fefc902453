//! The data plane: a control side and workers.
//!
//! ```text
//!            xDS, files ──► control ──lower (own thread)──► RuntimeConfig ──► workers (one per core)
//!  agent ─► secrets ─┘        │ owns listening sockets, admin, readiness, DNS       │
//!  clients ──────────────► accept ──(worker with the fewest)──────────────────────► serve
//! ```
//!
//! What flows in: configuration from the control plane or a bootstrap file, certificates from the
//! CA, connections. What flows out: connections to upstreams, metrics, log lines, spans.
//!
//! **Invariants.** Decisions are the engine's; this crate performs steps. No lock is taken and no
//! thread is crossed on the way of a request. A worker's `Rc`s never leave it. What a peer can
//! fill is bounded. Nothing a peer sends ends the process: each connection's task is its own
//! panic boundary. `api`, `mesh` and `compile` are not seen here: the planes meet on the wire.
//!
//! Start reading at [`run`], then `control`, `accept`, `exchange`.

mod accept;
mod access;
mod admin;
pub mod agent;
mod alarm;
pub mod bootstrap;
mod codec;
mod control;
mod detect;
mod dns;
mod exchange;
mod file_secrets;
mod host_sockets;
mod io;
mod listeners;
mod metadata_exchange;
mod options;
mod plane;
mod proxy;
mod proxy_protocol;
mod record;
mod secrets;
mod serve;
mod tcp;
#[cfg(test)]
mod tests;
mod tls;
mod tracing_spans;
mod upstream;
mod worker;

pub use options::{Addresses, InvalidOptions, LogLevels, Options, Role, Termination};
pub use proxy::{Proxy, RunError, check, run};
