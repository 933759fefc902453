//! The proxy's decisions, without I/O: xDS in, chains, routes, policies, picks and replies out.
//!
//! Envoy's v3 resources are lowered into immutable tables ([`lower`], [`config`]); a connection
//! chooses its filter chain ([`chain::select_chain`]); a request runs through an
//! [`exchange::Exchange`], a connection of bytes through a [`stream::Stream`]. Both are state
//! machines over values: they return a step (ask, wait, forward, reply, respond) and are resumed
//! with its result. The proxy performs the steps, `explain` walks them, tests drive them; there is
//! no second implementation.
//!
//! **Invariants.** No I/O, clock, randomness or environment: `now` and a seed are arguments. A
//! resource is accepted or refused whole; what is not built is refused by name and path. The hot
//! path compiles no regex and formats no text unless asked to record.
//!
//! Start reading at [`config::RuntimeConfig`], [`exchange`] and [`facts::ConnFacts`].

pub mod access_log;
pub mod assembly;
pub mod authz;
pub mod balance;
pub mod cel;
pub mod chain;
pub mod cluster;
pub mod config;
pub mod cors;
mod digits;
pub mod draw;
pub mod exchange;
pub mod ext_authz;
pub mod facts;
pub mod fault;
pub mod hcm;
pub mod header_mutation;
pub mod headers;
pub mod jwt;
pub mod limit;
pub mod lower;
pub mod matcher;
pub mod outlier;
pub mod path;
pub mod record;
pub mod regex;
pub mod retry;
pub mod route;
pub mod shared;
pub mod stream;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod unsupported;
pub mod worker;

pub use chain::select_chain;
pub use config::RuntimeConfig;
pub use exchange::{Answer, Exchange, Step};
pub use facts::{ConnFacts, Now};
