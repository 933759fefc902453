//! The objects of the local mesh, and everybody's way to them.
//!
//! ```text
//!  files ─┐                        ┌─► watch ──► discovery, controllers
//!  socket ┼─► admission ─► Store ──┤
//!  controllers (Pods, slices) ─┘   └─► state file (what users admitted)
//! ```
//!
//! **Invariants.** Only the [`store::Store`] changes objects, and only through admission. What
//! users admitted survives `kill -9`; what controllers derived is derived again.

pub mod client;
pub mod files;
pub mod logs;
pub mod server;
pub mod state;
pub mod store;
