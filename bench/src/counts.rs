//! Instructions and allocations per request: figures that do not depend on what else the machine does.
//!
//! A program runs twice with different numbers of requests; the difference belongs to the requests
//! alone. Instructions are callgrind's: user space, all threads.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::bootstrap::{self, Filters, Place as Spot, Upstream};
use crate::contestant::get;
use crate::load::{Load, Running};
use crate::machine::{Cores, free_address, processor};
use crate::pki;
use crate::subject::ALLOCATIONS_ARE;

/// Per request.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) instructions: f64,
    pub(crate) allocations: f64,
}

/// What was measured where; `bench/baseline.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Baseline {
    /// Other compilers make other code.
    rustc: String,
    /// Libraries choose their code by the processor.
    processor: String,
    pub(crate) per_request: BTreeMap<String, Counts>,
}

/// How far a figure may be from the baseline before somebody has to look.
const TOLERANCE: f64 = 0.03;

fn baseline_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("baseline.json")
}

/// Counts, prints, and holds the figures against the baseline, or writes a new one.
pub(crate) fn run(write: bool) -> Result<()> {
    let valgrind = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    valgrind.context("counts need valgrind, which is not installed")?;
    let now = Baseline { rustc: rustc()?, processor: processor(), per_request: measure()? };
    for (name, counts) in &now.per_request {
        println!(
            "{name:<12} {:>9.0} instructions, {:>5.1} allocations a request",
            counts.instructions, counts.allocations
        );
    }
    let file = baseline_file();
    if write {
        let text = serde_json::to_string_pretty(&now)? + "\n";
        return fs::write(&file, text).with_context(|| format!("writing {}", file.display()));
    }
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let then: Baseline = serde_json::from_str(&text).with_context(|| format!("in {}", file.display()))?;
    if (&then.rustc, &then.processor) != (&now.rustc, &now.processor) {
        println!("counts: not compared, the baseline is of {} on {}", then.rustc, then.processor);
        return Ok(());
    }
    let moved = differences(&then.per_request, &now.per_request);
    ensure!(
        moved.is_empty(),
        "more than {:.0} % from the baseline; if that is meant, `cargo xtask counts --write`:\n  {}",
        TOLERANCE * 100.0,
        moved.join("\n  ")
    );
    Ok(())
}

/// The figures alone; `None` without valgrind.
pub(crate) fn figures() -> Result<Option<BTreeMap<String, Counts>>> {
    if Command::new("valgrind").arg("--version").stdout(Stdio::null()).status().is_err() {
        return Ok(None);
    }
    measure().map(Some)
}

fn differences(then: &BTreeMap<String, Counts>, now: &BTreeMap<String, Counts>) -> Vec<String> {
    let mut moved = Vec::new();
    for (name, before) in then {
        let Some(after) = now.get(name) else {
            moved.push(format!("{name}: not measured"));
            continue;
        };
        for (what, before, after) in [
            ("instructions", before.instructions, after.instructions),
            ("allocations", before.allocations, after.allocations),
        ] {
            // half an allocation is noise of threads beside the request
            if (after - before).abs() > (before * TOLERANCE).max(0.5) {
                moved.push(format!("{name}: {what} {before:.1} -> {after:.1}"));
            }
        }
    }
    let new = now.keys().filter(|name| !then.contains_key(*name));
    moved.extend(new.map(|name| format!("{name}: not in the baseline")));
    moved
}

fn rustc() -> Result<String> {
    let output = Command::new("rustc").arg("--version").output().context("asking rustc for its version")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn measure() -> Result<BTreeMap<String, Counts>> {
    let folder = tempfile::tempdir()?;
    let cores = Cores::own()?;
    let backend = Backend::start(&cores)?;
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let file = folder.path().join(name).with_extension("json");
        fs::write(&file, text)?;
        Ok(file)
    };
    let logs = ["client", "server"].map(|name| folder.path().join(name).with_extension("access"));
    let spot = |upstream, log| -> Result<Spot<'_>> {
        Ok(Spot { listen: free_address()?, admin: free_address()?, upstream, log, filters: Filters::Common })
    };
    let gateway = spot(backend.http1, logs[0].as_path())?;
    let gateway_file = write("gateway", &bootstrap::gateway(&gateway, Upstream::Http1))?;
    let [client, server] = pki::identities(["productpage", "reviews"])?;
    let inbound = spot(backend.http1, logs[1].as_path())?;
    let outbound = spot(inbound.listen, logs[0].as_path())?;
    let inbound_file = write("inbound", &bootstrap::inbound(&inbound, &server))?;
    let outbound_file = write("outbound", &bootstrap::outbound(&outbound, &client, &server))?;

    let exchange = |requests: u64| Subject::start(&["exchange", &requests.to_string()], &gateway_file)?.end();
    // the first is called, the others stand behind it
    let path = |proxies: &[(&Spot<'_>, &Path)], requests: u64| -> Result<Total> {
        let subjects = proxies.iter().map(|(_, file)| Subject::start(&["proxy"], file)).collect::<Result<Vec<_>>>()?;
        for (spot, _) in proxies {
            wait_ready(spot.admin)?;
        }
        Running::start(Load::Http1 { connections: 1 }, proxies[0].0.listen, Some(requests), &cores)?.join()?;
        for (spot, _) in proxies {
            quit(spot.admin)?;
        }
        subjects.into_iter().map(Subject::end).sum()
    };
    let gateway = |requests| path(&[(&gateway, &gateway_file)], requests);
    let mesh = |requests| path(&[(&outbound, &outbound_file), (&inbound, &inbound_file)], requests);
    Ok(BTreeMap::from([
        ("exchange".to_owned(), per_request(exchange, [1000, 6000])?),
        ("gateway".to_owned(), per_request(gateway, [500, 2500])?),
        ("two sidecars".to_owned(), per_request(mesh, [500, 2500])?),
    ]))
}

fn wait_ready(admin: std::net::SocketAddr) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(120);
    while !get(admin, "/ready").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
        ensure!(Instant::now() < until, "the proxy under valgrind does not become ready");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn quit(admin: std::net::SocketAddr) -> Result<()> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(admin)?;
    write!(stream, "POST /quitquitquit HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")?;
    // it may be gone before it has answered
    drop(stream.read_to_end(&mut Vec::new()));
    Ok(())
}

#[derive(Clone, Copy, Default)]
struct Total {
    instructions: f64,
    allocations: f64,
}

impl std::iter::Sum for Total {
    fn sum<I: Iterator<Item = Self>>(each: I) -> Self {
        each.fold(Self::default(), |all, one| Self {
            instructions: all.instructions + one.instructions,
            allocations: all.allocations + one.allocations,
        })
    }
}

fn per_request(run: impl Fn(u64) -> Result<Total>, [few, many]: [u64; 2]) -> Result<Counts> {
    let (less, more) = (run(few)?, run(many)?);
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    let requests = (many - few) as f64;
    let each = |less: f64, more: f64| (more - less) / requests;
    Ok(Counts {
        instructions: each(less.instructions, more.instructions),
        allocations: each(less.allocations, more.allocations),
    })
}

/// This program again, under callgrind.
struct Subject {
    child: Option<Child>,
    counts: PathBuf,
}

impl Subject {
    fn start(what: &[&str], file: &Path) -> Result<Self> {
        let counts = file.with_extension("callgrind");
        let own = std::env::current_exe()?;
        let child = Command::new("valgrind")
            .args(["--quiet", "--tool=callgrind"])
            .arg(format!("--callgrind-out-file={}", counts.display()))
            .arg(own)
            .arg("subject")
            .arg("--file")
            .arg(file)
            .args(what)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting valgrind")?;
        Ok(Self { child: Some(child), counts })
    }

    fn end(mut self) -> Result<Total> {
        let child = self.child.take().context("a subject ends once")?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("the subject under valgrind failed: {} {said}", output.status);
        }
        let allocations = said.lines().find_map(|line| line.strip_prefix(ALLOCATIONS_ARE));
        let text = fs::read_to_string(&self.counts)?;
        let instructions = text.lines().find_map(|line| {
            line.strip_prefix("totals: ").or_else(|| line.strip_prefix("summary: "))?.split(' ').next()
        });
        Ok(Total {
            instructions: instructions.context("callgrind wrote no totals")?.parse()?,
            allocations: allocations.context("the subject told no allocations")?.parse()?,
        })
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child
            && child.kill().is_ok()
        {
            drop(child.wait());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_percent_is_the_limit() {
        let of = |instructions, allocations| BTreeMap::from([("a".to_owned(), Counts { instructions, allocations })]);
        assert!(differences(&of(1000.0, 10.0), &of(1029.0, 10.4)).is_empty());
        assert_eq!(differences(&of(1000.0, 10.0), &of(1031.0, 10.0)), ["a: instructions 1000.0 -> 1031.0"]);
        assert_eq!(differences(&of(1000.0, 10.0), &of(960.0, 11.0)).len(), 2);
        assert_eq!(differences(&of(1000.0, 10.0), &BTreeMap::new()), ["a: not measured"]);
    }
}
