//! The machine a run is made on: what it is, which core does what, what else it does.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where threads may run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// The first core of ours: the proxies.
    Proxies,
    /// The last one: load and backend.
    Load,
    /// Any.
    Anywhere,
}

/// Cores of this process, as it was started.
#[derive(Clone)]
pub(crate) struct Cores(CpuSet);

impl Cores {
    /// Asks the kernel.
    pub(crate) fn own() -> Result<Self> {
        Ok(Self(sched_getaffinity(None).context("which cores this process may use")?))
    }

    /// How many.
    pub(crate) fn count(&self) -> u32 {
        self.0.count()
    }

    /// Binds the calling thread, and what it starts from now on.
    pub(crate) fn bind(&self, place: Place) -> Result<()> {
        let mut all = (0..CpuSet::MAX_CPU).filter(|cpu| self.0.is_set(*cpu));
        let only = match place {
            Place::Proxies => all.next(),
            Place::Load => all.next_back(),
            Place::Anywhere => None,
        };
        let mut set = self.0;
        if let Some(only) = only {
            set = CpuSet::new();
            set.set(only);
        }
        sched_setaffinity(None, &set).context("binding a thread to its core")
    }
}

/// A loopback address nobody listens on. Both proxies take whole addresses from their files, so the
/// port is chosen here.
pub(crate) fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a free port")?;
    Ok(listener.local_addr()?)
}

/// The processor as `/proc/cpuinfo` names it.
pub(crate) fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| "unknown".to_owned(), |(_, model)| model.to_owned())
}

/// The kernel's release.
pub(crate) fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Runnable tasks over the last minute, all programs together.
pub(crate) fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}
