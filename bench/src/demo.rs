//! The demo at rest: time to the first answer through a proxy, memory of all processes together,
//! share of a core while nobody asks anything. And how soon a saved file is what the gateway does.

use std::ffi::OsStr;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
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
    /// From the end of writing a file to the first answer by it: median of [`SAVES`].
    pub(crate) saved_live: Duration,
}

/// How often a file is saved.
const SAVES: u32 = 9;
/// Nothing here takes longer unless it fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Quiet time before and while the rest is measured.
const REST: Duration = Duration::from_secs(10);

/// Whatever happens, the mesh ends with this.
struct Mesh {
    child: Child,
    log: PathBuf,
}

impl Mesh {
    fn start(program: &Path, state: &Path, log: &Path, words: &[&OsStr]) -> Result<Self> {
        let output = File::create(log)?;
        let child = Command::new(program)
            .args(words)
            .args(["--name", "bench", "--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0"])
            .arg("--state-dir")
            .arg(state)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Where its gateway is, once that answers a path with 200.
    fn until_answers(&mut self, program: &Path, state: &Path, path: &str) -> Result<SocketAddr> {
        let begun = Instant::now();
        loop {
            if self.child.try_wait()?.is_some() || begun.elapsed() > PATIENCE {
                let said = std::fs::read_to_string(&self.log).unwrap_or_default();
                bail!("the mesh does not answer; it said:\n{said}");
            }
            let mut status = Command::new(program);
            status.args(["status", "-o", "json", "--name", "bench", "--state-dir"]).arg(state);
            let status = status.stdin(Stdio::null()).stderr(Stdio::null()).output()?;
            if let Some(to) = ingress(&status.stdout)
                && get(to, path).is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
            {
                return Ok(to);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // asked to end, so that it takes its pods with it
        if let Some(pid) = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(0))
            && kill_process(pid, Signal::TERM).is_ok()
        {
            drop(self.child.wait());
        }
    }
}

/// Runs the demo once in `folder`.
pub(crate) fn measure(folder: &Path) -> Result<Demo> {
    let program = lateen()?;
    let state = folder.join("demo");
    let begun = Instant::now();
    let mut running = Mesh::start(&program, &state, &folder.join("demo.log"), &["demo".as_ref()])?;
    running.until_answers(&program, &state, "/productpage")?;
    let first_answer = begun.elapsed();
    std::thread::sleep(REST);
    let pids = process::tree(running.child.id());
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
    drop(running);
    let saved_live = saved_live(folder, &program)?;
    Ok(Demo { first_answer, processes, pss_mib, largest, idle_percent: idle * 100.0, saved_live })
}

/// Runs a mesh of a file that is saved again and again.
fn saved_live(folder: &Path, program: &Path) -> Result<Duration> {
    let (state, file) = (folder.join("live"), folder.join("live.yaml"));
    let save = |n: u32| {
        let answer = format!("{{status: 200, body: {{string: \"number {n};\"}}}}");
        let gateway = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: g, namespace: default}\n\
             spec: {selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}\n";
        let route = format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v, namespace: default}}\n\
             spec: {{hosts: ['*'], gateways: [g], http: [{{directResponse: {answer}}}]}}\n"
        );
        std::fs::write(&file, format!("{gateway}---\n{route}")).context("saving a manifest")
    };
    save(0)?;
    let mut running =
        Mesh::start(program, &state, &folder.join("live.log"), &["up".as_ref(), "-f".as_ref(), file.as_ref()])?;
    let to = running.until_answers(program, &state, "/")?;
    let mut took = Vec::new();
    for n in 1..=SAVES {
        std::thread::sleep(Duration::from_secs(1));
        save(n)?;
        let saved = Instant::now();
        while !get(to, "/").is_ok_and(|answer| answer.ends_with(&format!("number {n};"))) {
            ensure!(saved.elapsed() < PATIENCE, "what was saved does not become live");
            std::thread::sleep(Duration::from_millis(1));
        }
        took.push(saved.elapsed());
    }
    took.sort_unstable();
    Ok(took[took.len() / 2])
}

/// Where the ingress gateway listens for HTTP, by `status -o json`.
fn ingress(status: &[u8]) -> Option<SocketAddr> {
    let status: Value = serde_json::from_slice(status).ok()?;
    status.pointer("/addresses/ingress-http")?.as_str()?.parse().ok()
}
