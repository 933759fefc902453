//! Real meshes of real processes, steered with Istio's YAML.
//!
//! Four meshes are shared, [`apps::TRAFFIC`], [`apps::SECURITY`], [`apps::NODE`] and that of
//! `samples`; the tests of one take turns, and each takes back what it applied. Tests of starting and
//! ending (`node_life`) run small meshes of their own. They need what `lateen up` needs: Linux namespaces, and `curl` and
//! `bash` on the machine, which the tests run inside pods.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod apps;
mod authorization;
mod bad_input;
mod causes;
mod destinations;
mod explain;
mod gateway;
mod hostile;
mod identity;
mod injection;
mod node_commands;
mod node_life;
mod node_pods;
mod operations;
mod pools;
mod resilience;
mod rollouts;
mod routing;
mod samples;
mod sniffing;
mod stats;
mod streams;
mod telemetry;
mod tokens;
mod tracing;
