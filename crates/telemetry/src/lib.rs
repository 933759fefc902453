//! Every metric, span and log field of the data plane, declared once; recorders and encoders for them.
//!
//! Workers record into their own shard (single-writer atomics, no lock on the request path); a
//! scrape reads all shards and writes Prometheus' classic text format. Log lines and spans leave a
//! worker in bounded batches; what does not fit is dropped and counted, never waited for.
//!
//! **Invariants.** No network: an encoder gives bytes, the proxy sends them. Nothing here blocks a
//! worker. Every map that a peer can fill has a limit and a counter at the limit.
//!
//! Start reading at [`metrics`] (proxy), [`registry`] (control plane), [`trace`], [`log`].
//!
//! *Source*: Istio's standard metrics and labels; Zipkin API v2; W3C Trace Context; B3 propagation.

pub mod log;
pub mod metrics;
pub mod peer;
pub mod registry;
pub mod text;
pub mod trace;
pub mod zipkin;
