//! Memory of a proxy that does nothing, and of connections that do nothing.

use std::time::Duration;

use anyhow::{Context, Result};
use bytes::BytesMut;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpStream;

use crate::cases::{Bench, Case};
use crate::contestant::Kind;
use crate::{load, process};

/// Connections that are opened, served once, and left alone.
pub(crate) const CONNECTIONS: usize = 1000;
/// What was freed is given back meanwhile: descriptors of messages some seconds after their last use.
const SETTLE: Duration = Duration::from_secs(8);

/// One proxy's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Ready, never asked anything.
    pub(crate) idle_mib: f64,
    /// Each connection above that.
    pub(crate) connection_kib: f64,
}

/// Descriptors for [`CONNECTIONS`], for this program and those it starts.
pub(crate) fn raise_descriptor_limit() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).context("more descriptors")
}

/// Measures a fresh gateway.
pub(crate) fn measure(bench: &Bench<'_>, kind: Kind) -> Result<Memory> {
    let stage = bench.stage(Case::Gateway, kind)?;
    let pid = stage.pid().context("a gateway is one proxy")?;
    std::thread::sleep(SETTLE);
    let idle = process::pss_kib(pid)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (before, after) = runtime.block_on(async {
        let mut held = Vec::new();
        let mut read = BytesMut::with_capacity(16 * 1024);
        let open = async |held: &mut Vec<TcpStream>, read: &mut BytesMut, count: usize| -> Result<()> {
            for _ in 0..count {
                let mut stream = TcpStream::connect(stage.entry()).await?;
                load::call(&mut stream, read).await?;
                held.push(stream);
            }
            Ok(())
        };
        // what the first requests bring along belongs to no connection
        open(&mut held, &mut read, 50).await?;
        tokio::time::sleep(SETTLE).await;
        let before = process::pss_kib(pid)?;
        open(&mut held, &mut read, CONNECTIONS).await?;
        tokio::time::sleep(SETTLE).await;
        anyhow::Ok((before, process::pss_kib(pid)?))
    })?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let memory = Memory {
        idle_mib: idle as f64 / 1024.0,
        connection_kib: after.saturating_sub(before) as f64 / CONNECTIONS as f64,
    };
    Ok(memory)
}
