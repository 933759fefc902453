//! A real Envoy beside ours: under our control plane, and from the same bootstrap.
//!
//! `LATEEN_ENVOY` names the Envoy; without it every test fails:
//! `cargo test -p tests --features envoy --test foreign`.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod admin;
mod backend;
mod files;
mod filters;
mod grpc;
mod limits;
mod mesh;
mod resources;
mod roots;
mod sources;
mod standalone;
mod trust;
