//! Measures Lateen against a real Envoy in the same run: both run the very same bootstrap files, in
//! alternating rounds, with load and backend on another core.
//!
//! CPU per request is what is compared: it is counted by the kernel for the proxies' threads alone,
//! so that what else the machine does disturbs it little. `cargo xtask bench` is the one command;
//! `cargo xtask counts` holds instructions and allocations to `baseline.json`.

mod backend;
mod bootstrap;
mod cases;
mod contestant;
mod counts;
mod demo;
mod load;
mod machine;
mod memory;
mod pki;
mod process;
mod report;
mod subject;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::backend::Backend;
use crate::cases::{Bench, Case};
use crate::contestant::{Kind, Programs};
use crate::machine::{Cores, Place};
use crate::report::Results;

#[global_allocator]
static ALLOCATOR: subject::Counting = subject::Counting;

#[derive(Parser)]
#[command(about = "Lateen beside Envoy")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Instructions and allocations per request, held to the baseline.
    Counts {
        /// Make what is measured the new baseline.
        #[arg(long)]
        write: bool,
    },
    /// What runs under callgrind.
    #[command(hide = true)]
    Subject {
        /// The bootstrap file.
        #[arg(long)]
        file: PathBuf,
        #[command(subcommand)]
        what: Subject,
    },
}

#[derive(Subcommand)]
enum Subject {
    Exchange { requests: u64 },
    Proxy,
}

#[derive(Args)]
struct RunArgs {
    /// Rounds of each case.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of load in a round.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Only these cases; none with `--skip-speed`.
    #[arg(long, value_enum)]
    only: Vec<Case>,
    /// No load at all.
    #[arg(long)]
    skip_speed: bool,
    /// Neither memory nor counts nor the demo.
    #[arg(long)]
    speed_only: bool,
    /// Write `bench/RESULTS.md`.
    #[arg(long)]
    write: bool,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Counts { write }) => counts::run(write),
        Some(Command::Subject { file, what: Subject::Exchange { requests } }) => subject::exchange(&file, requests),
        Some(Command::Subject { file, what: Subject::Proxy }) => subject::proxy(&file),
        None => run(&cli.run),
    }
}

fn run(args: &RunArgs) -> Result<()> {
    if cfg!(debug_assertions) {
        bail!("figures of a debug build mean nothing: `cargo xtask bench`, or `cargo run --release -p bench`");
    }
    let programs = Programs::find()?;
    let cores = Cores::own()?;
    if cores.count() < 2 {
        bail!("two cores are needed: one for the proxies, one for load and backend");
    }
    memory::raise_descriptor_limit()?;
    cores.bind(Place::Load)?;
    let backend = Backend::start(&cores)?;
    let identities = pki::identities(["productpage", "reviews"])?;
    let folder = tempfile::tempdir()?;
    let bench =
        Bench { programs: &programs, cores: &cores, backend: &backend, identities: &identities, folder: folder.path() };
    let loads = machine::load();
    let mut results = Results::default();
    if !args.skip_speed {
        for (at, case) in Case::ALL.into_iter().enumerate() {
            if args.only.is_empty() || args.only.contains(&case) {
                results.speed.insert(at, speed(&bench, case, args).with_context(|| case.title())?);
            }
        }
    }
    if !args.speed_only {
        for _ in 0..3 {
            let [lateen, envoy] = [Kind::Lateen, Kind::Envoy].map(|kind| memory::measure(&bench, kind));
            results.memory.push([lateen?, envoy?]);
        }
        results.counts = counts::figures()?;
        cores.bind(Place::Anywhere)?;
        results.demo = Some(demo::measure(folder.path())?);
    }
    let text = format!("{}{}", head(&programs, &cores, args, &loads), results.markdown());
    print!("{text}");
    if let Some(demo) = &results.demo {
        for (mib, command) in &demo.largest {
            println!("{mib:>7.1} MiB  {command}");
        }
    }
    if args.write {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("RESULTS.md");
        std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}

/// All one after the other; who comes first changes from round to round.
fn speed(bench: &Bench<'_>, case: Case, args: &RunArgs) -> Result<report::Rounds> {
    let stages = Kind::ALL.map(|kind| bench.stage(case, kind));
    let [lateen, envoy, istio] = stages;
    let stages = [lateen?, envoy?, istio?];
    let time = Duration::from_secs_f64(args.seconds);
    let mut rounds = Vec::new();
    for round in 0..args.rounds {
        let mut samples = [None; 3];
        for turn in 0..stages.len() {
            let at = (round + turn) % stages.len();
            samples[at] = Some(bench.round(&stages[at], time)?);
        }
        let [Some(lateen), Some(envoy), Some(istio)] = samples else { bail!("every turn gives a sample") };
        let [ratio, ratio_istio] = [lateen, istio].map(|sample| sample.cpu_us / envoy.cpu_us);
        eprintln!(
            "{:<36} {:>6.1} {:>6.1} µs  {ratio:.2}   {:>6.1} µs  {ratio_istio:.2}",
            case.title(),
            lateen.cpu_us,
            envoy.cpu_us,
            istio.cpu_us,
        );
        rounds.push([lateen, envoy, istio]);
    }
    Ok(rounds)
}

fn head(programs: &Programs, cores: &Cores, args: &RunArgs, load: &str) -> String {
    format!(
        "# Figures\n\n\
         Written by `cargo xtask bench --write`. Median and, in brackets, the least and the most of {rounds} rounds of \
         {seconds} s, Lateen and Envoy in turns on the same core, load and backend on another one; ratios are of \
         neighbouring rounds. CPU is user and system time of all threads of the proxies on the path, by the kernel's \
         count.\n\n\
         Both run the same files (`bench/src/bootstrap.rs`): tokens of an issuer, authorization policies, gRPC statistics, fault, \
         CORS, router with the product's retry policy, limits and ejection, Istio's access-log line to a file, request \
         ids and trace sampling at 1 %. The load brings no tokens. \"With Istio's filters\" is Lateen alone, with metadata exchange, ALPN override and Istio's metrics on \
         top, against the same Envoy. Closed loop, keep-alive, 32 requests at once.\n\n\
         | | |\n|---|---|\n\
         | machine | {processor}, {cores} cores, Linux {kernel} |\n\
         | load average, before and after | {load} and {after} |\n\
         | Lateen | {lateen}, release profile |\n\
         | Envoy | {envoy} |\n\n",
        rounds = args.rounds,
        seconds = args.seconds,
        processor = machine::processor(),
        cores = cores.count(),
        kernel = machine::kernel(),
        after = machine::load(),
        lateen = programs.version(Kind::Lateen),
        envoy = programs.version(Kind::Envoy),
    )
}
