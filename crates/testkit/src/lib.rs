//! Whole meshes for tests, and the clients that talk to them.
//!
//! [`Mesh`] runs the real `lateen` binary as a child, on free ports of the loopback and in a folder
//! of its own, and takes everything down when the test process ends, however it ends.
//!
//! **Invariants.** Nothing here waits for a fixed time: [`eventually`] looks again until what is
//! asked for holds, or fails at its deadline with what was seen last. Nothing leaves the loopback.

pub mod grpc;
pub mod http;
pub mod http2;
pub mod mesh;
pub mod puppet;
pub mod silent;
pub mod tls;
pub mod token;
pub mod tunnel;

pub use http::{Client, Response};
pub use http2::{Client2, Stream2};
pub use mesh::{Applied, Mesh, Setup, Shared, Turn, lateen, run_lateen};
pub use puppet::Puppet;
pub use silent::Silent;
pub use tls::{TlsClient, TlsServer};
pub use tunnel::Tunnel;

use std::time::{Duration, Instant};

/// How long [`eventually`] looks.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Looks until `look` gives a value, and fails with the last answer else.
#[track_caller]
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(value) => return value,
            Err(seen) => assert!(Instant::now() < deadline, "{what}: still not after {PATIENCE:?}; last seen: {seen}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
