//! A short run of the fuzz targets, on any toolchain: `fuzz [--seconds N] [--seed N] [TARGET…]`.
//! `fuzz --write-seeds FOLDER` writes the inputs to begin with to `FOLDER/TARGET/`, for libFuzzer.
//!
//! Inputs that show something new are kept and changed further. One that fails is written to
//! `target/fuzz/` and the run ends with status 1; `fuzz TARGET FILE…` runs files again.

use std::collections::HashSet;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use fuzzing::mutate::Random;
use fuzzing::{TARGETS, Target};

/// Inputs kept of one target.
const CORPUS_MAX: usize = 4096;

fn main() -> ExitCode {
    let mut seconds = 30;
    let mut seed = 1;
    let mut chosen: Vec<Target> = Vec::new();
    let mut files: Vec<String> = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse().ok());
        match argument.as_str() {
            "--seconds" => seconds = number().unwrap_or(seconds),
            "--seed" => seed = number().unwrap_or(seed),
            "--write-seeds" => return write_seeds(&arguments.next().unwrap_or_default()),
            name => match TARGETS.iter().find(|target| target.name == name) {
                Some(target) => chosen.push(*target),
                None => files.push(name.to_owned()),
            },
        }
    }
    if chosen.is_empty() {
        chosen = TARGETS.to_vec();
    }
    let budget = Duration::from_secs(seconds) / u32::try_from(chosen.len()).unwrap_or(1);
    let mut well = true;
    for target in chosen {
        well &= if files.is_empty() { fuzz(target, budget, seed) } else { again(target, &files) };
    }
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn write_seeds(folder: &str) -> ExitCode {
    for target in TARGETS {
        let own = Path::new(folder).join(target.name);
        let written = std::fs::create_dir_all(&own).and_then(|()| {
            let mut seeds = (target.seeds)().into_iter().enumerate();
            seeds.try_for_each(|(number, seed)| std::fs::write(own.join(format!("seed-{number}")), seed))
        });
        if let Err(error) = written {
            say(&format!("{}: {error}", own.display()));
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn say(text: &str) {
    // whoever reads may have gone
    drop(writeln!(std::io::stderr(), "{text}"));
}

fn again(target: Target, files: &[String]) -> bool {
    files.iter().all(|file| match std::fs::read(file) {
        Ok(input) => catch_unwind(|| (target.run)(&input)).is_ok(),
        Err(error) => {
            say(&format!("{file}: {error}"));
            false
        }
    })
}

/// `false`: an input failed.
fn fuzz(target: Target, budget: Duration, seed: u64) -> bool {
    let started = Instant::now();
    let mut random = Random::new(seed);
    let mut corpus = (target.seeds)();
    let mut seen = HashSet::new();
    let mut runs = 0_u64;
    for input in &corpus {
        match one(target, input) {
            Some(signature) => seen.insert(signature),
            None => return false,
        };
    }
    while started.elapsed() < budget {
        let at = random.below(corpus.len());
        let input = (target.mutate)(&corpus[at], &mut random);
        runs += 1;
        let Some(signature) = one(target, &input) else { return false };
        if seen.insert(signature) && corpus.len() < CORPUS_MAX {
            corpus.push(input);
        }
    }
    say(&format!("{}: {runs} runs, {} ways, {} inputs", target.name, seen.len(), corpus.len()));
    true
}

/// An input may take so long, twice in a row: once may be the machine's fault.
const SLOW: Duration = Duration::from_secs(10);

fn one(target: Target, input: &[u8]) -> Option<u64> {
    let timed = || {
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
        (result, began.elapsed() > SLOW)
    };
    let (result, slow) = timed();
    let slow = slow && timed().1;
    match result {
        Ok(signature) if !slow => Some(signature),
        _ => {
            let folder = Path::new("target/fuzz");
            let file = folder.join(format!(
                "{}-{:x}",
                target.name,
                input.len() ^ usize::from(input.first().copied().unwrap_or(0)) << 16
            ));
            let kept = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&file, input));
            say(&format!(
                "{}: {} on {} bytes, {kept:?} at {}",
                target.name,
                if slow { "slow" } else { "failed" },
                input.len(),
                file.display()
            ));
            None
        }
    }
}
