//! The demo at rest: time to the first answer through a proxy, memory of all processes together,
//! share of a core while nobody asks anything.

use std::fs::File;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::contestant::{get, lateen};
use crate::process;

/// What was measured.
#[derive(Clone, Debug)]
pub(crate) struct Demo {
    pub(crate) first_answer: Duration,
    pub(crate) processes: usize,
    pub(crate) pss_mib: f64,
    /// PSS of the largest processes, with their command.
    pub(crate) largest: Vec<(f64, String)>,
    pub(crate) idle_percent: f64,
}

/// Quiet time before and while the rest is measured.
const REST: Duration = Duration::from_secs(10);

/// Whatever happens, the mesh ends with this.
struct Mesh(Child);

impl Drop for Mesh {
    fn drop(&mut self) {
        // asked to end, so that it takes its pods with it
        if let Some(pid) = Pid::from_raw(i32::try_from(self.0.id()).unwrap_or(0))
            && kill_process(pid, Signal::TERM).is_ok()
        {
            drop(self.0.wait());
        }
    }
}

/// Runs the demo once in `folder`.
pub(crate) fn measure(folder: &std::path::Path) -> Result<Demo> {
    let program = lateen()?;
    let state = folder.join("demo");
    let output = File::create(folder.join("demo.log"))?;
    let mesh = |command: &str| {
        let mut child = Command::new(&program);
        child.arg(command).args(["--name", "bench"]).arg("--state-dir").arg(&state).stdin(Stdio::null());
        child
    };
    let begun = Instant::now();
    let child = mesh("demo")
        .args(["--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0"])
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let mut running = Mesh(child);
    let first_answer = loop {
        if running.0.try_wait()?.is_some() || begun.elapsed() > Duration::from_secs(120) {
            let said = std::fs::read_to_string(folder.join("demo.log")).unwrap_or_default();
            bail!("the demo does not answer; it said:\n{said}");
        }
        let status = mesh("status").args(["-o", "json"]).stderr(Stdio::null()).output()?;
        let answers = ingress(&status.stdout)
            .and_then(|to| get(to, "/productpage").ok())
            .is_some_and(|answer| answer.starts_with("HTTP/1.1 200"));
        if answers {
            break begun.elapsed();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    std::thread::sleep(REST);
    let pids = process::tree(running.0.id());
    let cpu = || -> Duration { pids.iter().filter_map(|pid| process::cpu(*pid).ok()).sum() };
    let (from, before) = (Instant::now(), cpu());
    std::thread::sleep(REST);
    let idle = cpu().saturating_sub(before).as_secs_f64() / from.elapsed().as_secs_f64();
    let mut largest = Vec::new();
    for pid in &pids {
        let Ok(kib) = process::pss_kib(*pid) else { continue };
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<String> =
            command.split(|byte| *byte == 0).skip(1).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        largest.push((kib as f64 / 1024.0, words.join(" ").trim().chars().take(60).collect::<String>()));
    }
    let (processes, pss_mib) = (largest.len(), largest.iter().map(|(mib, _)| mib).sum());
    largest.sort_by(|a, b| b.0.total_cmp(&a.0));
    largest.truncate(12);
    Ok(Demo { first_answer, processes, pss_mib, largest, idle_percent: idle * 100.0 })
}

/// Where the ingress gateway listens for HTTP, by `status -o json`.
fn ingress(status: &[u8]) -> Option<SocketAddr> {
    let status: Value = serde_json::from_slice(status).ok()?;
    status.pointer("/addresses/ingress-http")?.as_str()?.parse().ok()
}
