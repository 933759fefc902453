//! What is measured: each case is a few proxies in a row and a load.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::backend::Backend;
use crate::bootstrap::{self, Place as Spot, Upstream};
use crate::contestant::{Kind, Programs, Proxy};
use crate::load::{Load, Running};
use crate::machine::{Cores, Place, free_address};
use crate::pki::Identity;
use crate::process;

/// A path that requests take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Case {
    /// One gateway, HTTP/1.1, answers of 1 KiB.
    Gateway,
    /// Two sidecars with mutual TLS between them, HTTP/1.1, answers of 1 KiB.
    Mesh,
    /// One gateway, unary gRPC, 100 bytes there, 1 KiB back.
    Grpc,
    /// As `grpc`, two workers and two connections: do both work?
    TwoWorkers,
}

impl Case {
    pub(crate) const ALL: [Self; 4] = [Self::Gateway, Self::Mesh, Self::Grpc, Self::TwoWorkers];

    /// Name in tables.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Gateway => "gateway hop, HTTP/1.1, 1 KiB",
            Self::Mesh => "two sidecars, mTLS, HTTP/1.1, 1 KiB",
            Self::Grpc => "gateway hop, unary gRPC, 1 KiB",
            Self::TwoWorkers => "unary gRPC, 2 workers, 2 connections",
        }
    }

    /// CPU per request as a share of Envoy's that we aim at.
    pub(crate) fn aim(self) -> Option<f64> {
        match self {
            Self::Gateway => Some(0.45),
            Self::Mesh => Some(0.30),
            Self::Grpc => Some(0.60),
            Self::TwoWorkers => None,
        }
    }

    fn load(self) -> Load {
        match self {
            Self::Gateway | Self::Mesh => Load::Http1 { connections: 32 },
            Self::Grpc => Load::Grpc { connections: 4, streams: 8 },
            Self::TwoWorkers => Load::Grpc { connections: 2, streams: 16 },
        }
    }

    fn workers(self) -> u32 {
        if self == Self::TwoWorkers { 2 } else { 1 }
    }

    fn place(self) -> Place {
        if self == Self::TwoWorkers { Place::Anywhere } else { Place::Proxies }
    }
}

/// What every case is made with.
pub(crate) struct Bench<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) cores: &'a Cores,
    pub(crate) backend: &'a Backend,
    pub(crate) identities: &'a [Identity; 2],
    pub(crate) folder: &'a Path,
}

/// The proxies of one case, ready.
pub(crate) struct Stage {
    proxies: Vec<Proxy>,
    entry: SocketAddr,
    case: Case,
}

/// One round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Of all proxies of the path together.
    pub(crate) cpu_us: f64,
    pub(crate) per_second: f64,
    /// Share of the busiest thread in all that the proxies computed.
    pub(crate) busiest: f64,
}

impl Bench<'_> {
    fn write(&self, name: &str, text: &str) -> Result<std::path::PathBuf> {
        let path = self.folder.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// Starts the proxies of `case`.
    pub(crate) fn stage(&self, case: Case, kind: Kind) -> Result<Stage> {
        let name = |part: &str| format!("{kind:?}-{case:?}-{part}.json").to_lowercase();
        let logs = ["a", "b"].map(|part| self.folder.join(name(part)).with_extension("access"));
        let spot = |upstream, log| -> Result<Spot<'_>> {
            Ok(Spot { listen: free_address()?, admin: free_address()?, upstream, log, filters: kind.filters() })
        };
        let start = |part: &str, text: &str, spot: &Spot<'_>| -> Result<Proxy> {
            let file = self.write(&name(part), text)?;
            let place = (self.cores, case.place());
            Proxy::start(self.programs, kind, (file.as_path(), spot.admin), case.workers(), place)
        };
        let (proxies, entry) = match case {
            Case::Gateway | Case::Grpc | Case::TwoWorkers => {
                let (upstream, protocol) = match case {
                    Case::Gateway => (self.backend.http1, Upstream::Http1),
                    _ => (self.backend.grpc, Upstream::Http2),
                };
                let spot = spot(upstream, logs[0].as_path())?;
                (vec![start("a", &bootstrap::gateway(&spot, protocol), &spot)?], spot.listen)
            }
            Case::Mesh => {
                let [client, server] = self.identities;
                let inbound = spot(self.backend.http1, logs[1].as_path())?;
                let outbound = spot(inbound.listen, logs[0].as_path())?;
                let proxies = vec![
                    start("b", &bootstrap::inbound(&inbound, server), &inbound)?,
                    start("a", &bootstrap::outbound(&outbound, client, server), &outbound)?,
                ];
                (proxies, outbound.listen)
            }
        };
        Ok(Stage { proxies, entry, case })
    }

    /// One round of load over `time`.
    pub(crate) fn round(&self, stage: &Stage, time: Duration) -> Result<Sample> {
        let load = Running::start(stage.case.load(), stage.entry, None, self.cores)?;
        load.warm(1000)?;
        let (begun, done, before) = (Instant::now(), load.done(), stage.threads()?);
        std::thread::sleep(time);
        let (took, requests, after) = (begun.elapsed(), load.done() - done, stage.threads()?);
        load.stop()?;
        let spent: Vec<f64> = after
            .iter()
            .zip(&before)
            .flat_map(|(after, before)| {
                after.iter().map(|(tid, (_, time))| {
                    time.saturating_sub(before.get(tid).map_or(Duration::ZERO, |(_, time)| *time)).as_secs_f64()
                })
            })
            .collect();
        let cpu: f64 = spent.iter().sum();
        #[expect(clippy::cast_precision_loss, reason = "requests of a few seconds")]
        let requests = requests as f64;
        Ok(Sample {
            cpu_us: cpu * 1e6 / requests,
            per_second: requests / took.as_secs_f64(),
            busiest: spent.iter().copied().fold(0.0, f64::max) / cpu,
        })
    }
}

type Threads = std::collections::BTreeMap<u32, (String, Duration)>;

impl Stage {
    pub(crate) fn entry(&self) -> SocketAddr {
        self.entry
    }

    /// The first proxy.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.proxies.first().map(Proxy::pid)
    }

    fn threads(&self) -> Result<Vec<Threads>> {
        self.proxies.iter().map(|proxy| process::threads(proxy.pid())).collect()
    }
}
