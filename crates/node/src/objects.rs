//! The objects of the local mesh: store, files, socket.
//!
//! Written by the lead engineer now: `objects/{store,files,state,server,client}.rs`. The engineer
//! "api" writes `controller/`, `inject.rs`, `env.rs`, `volume.rs`, `token.rs`, `probe.rs` beside
//! this file, on top of [`store::Store`] (see its public functions) and `PodRuntime`.
