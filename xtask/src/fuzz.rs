//! libFuzzer on the targets of `crates/fuzzing`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What libFuzzer needs to see its way through the code. Unlike a sanitizer it needs no nightly toolchain.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";

const TARGETS: [&str; 3] = ["http1", "lower", "yaml"];

/// Builds the targets and runs each for so many seconds. A fault ends it; its input is left in `fuzz/artifacts`.
pub(crate) fn run(root: &Path, seconds: u32, only: &[String]) -> Result<()> {
    if let Some(unknown) = only.iter().find(|name| !TARGETS.contains(&name.as_str())) {
        bail!("there is no target {unknown:?}, only {}", TARGETS.join(", "));
    }
    let folder = root.join("fuzz");
    cargo(root, &["run", "--quiet", "--package", "fuzzing", "--", "--write-seeds", "fuzz/corpus"], None)?;
    let host = std::env::consts::ARCH.to_owned() + "-unknown-linux-gnu";
    // With a target named, build scripts and macros are built without coverage.
    cargo(&folder, &["build", "--quiet", "--release", "--target", &host, "--target-dir", "target"], Some(COVERAGE))?;
    for name in TARGETS.iter().filter(|name| only.is_empty() || only.iter().any(|one| one == **name)) {
        let artifacts = folder.join("artifacts").join(name);
        std::fs::create_dir_all(&artifacts)?;
        let program = folder.join("target").join(&host).join("release").join(name);
        let status = Command::new(&program)
            .arg(folder.join("corpus").join(name))
            .args([&format!("-max_total_time={seconds}"), "-timeout=25", "-rss_limit_mb=4096", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .status()
            .with_context(|| format!("running {}", program.display()))?;
        if !status.success() {
            bail!("{name} has a fault; its input is in {}", artifacts.display());
        }
    }
    Ok(())
}

fn cargo(folder: &Path, args: &[&str], flags: Option<&str>) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(args).current_dir(folder);
    if let Some(flags) = flags {
        command.env("RUSTFLAGS", flags).env_remove("CARGO_TARGET_DIR");
    }
    if !command.status().context("running cargo")?.success() {
        bail!("cargo {} failed", args.join(" "));
    }
    Ok(())
}
