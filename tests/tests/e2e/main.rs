//! Real meshes of real processes, steered with Istio's YAML.
//!
//! Two meshes run, [`apps::TRAFFIC`] and [`apps::SECURITY`]; the tests of one take turns, and each
//! takes back what it applied. They need what `lateen up` needs: Linux namespaces, and `curl` and
//! `bash` on the machine, which the tests run inside pods.

mod apps;
mod authorization;
mod bad_input;
mod gateway;
mod hostile;
mod identity;
mod injection;
mod operations;
mod resilience;
mod rollouts;
mod routing;
mod sniffing;
mod stats;
mod streams;
mod tokens;
