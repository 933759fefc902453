//! What serves connections: one worker a core.
//!
//! ```text
//!  clients ──► listeners ──(worker with the fewest)──► accept ──► serve (HTTP) ──► exchange ──► upstream
//!                                                        └──────► tcp (bytes) ──────────────────┘
//! ```
//!
//! What flows in: connections, and a [`engine::RuntimeConfig`] at a time that the control side
//! publishes. What flows out: connections to upstreams, metrics, log lines, spans.
//!
//! **Invariants.** Decisions are the engine's; this crate performs steps. No lock is taken and no
//! thread is crossed on the way of a request. A worker's `Rc`s never leave it. What a peer can
//! fill is bounded. Nothing a peer sends ends the process: each connection's task is its own
//! panic boundary. Where configuration comes from is not known here.
//!
//! Start reading at [`worker`], then `accept`, `exchange`.

mod accept;
mod access;
mod alarm;
mod codec;
mod detect;
pub mod dial;
mod exchange;
pub mod host_sockets;
mod io;
pub mod listeners;
mod metadata_exchange;
mod proxy_protocol;
mod record;
pub mod secrets;
mod serve;
mod shared;
mod tcp;
mod tls;
pub mod tracing_spans;
mod upstream;
pub mod worker;

pub use shared::{Settings, Shared, Sinks};
