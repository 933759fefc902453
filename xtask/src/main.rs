//! Chores of the tree: `cargo xtask <check|tidy|parity|proto|bench|counts|fuzz>`.

mod bench;
mod fuzz;
mod parity;
mod proto;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Chores of the tree")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// What CI asks beside the tests: format, tidy, parity, clippy, documentation.
    Check,
    /// Who may depend on whom, and what pure crates may name.
    Tidy,
    /// Every behaviour row of docs/parity.md names a test that exists, or says "not yet".
    Parity,
    /// Writes what is generated from protocol sources: Rust code, and the descriptor set.
    Proto {
        /// Only say whether the descriptor set is what its sources give.
        #[arg(long)]
        check: bool,
    },
    /// Measures against a real Envoy; figures go to standard output.
    Bench {
        /// Passed on to the bench program.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Instructions and allocations per request against the committed baseline; needs valgrind.
    Counts {
        /// Make what is measured the new baseline.
        #[arg(long)]
        write: bool,
    },
    /// The fuzz targets under libFuzzer, steered by coverage; needs a C++ compiler. What it learns stays in fuzz/corpus.
    Fuzz {
        /// How long each target runs.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
        /// Only these; all without.
        targets: Vec<String>,
    },
}

/// The tree's top folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let status =
        Command::new(program).args(args).current_dir(root()).status().with_context(|| format!("running {program}"))?;
    if !status.success() {
        bail!("{program} {} failed", args.join(" "));
    }
    Ok(())
}

/// Every link of the documentation leads somewhere, private items' too.
fn documentation() -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["doc", "--workspace", "--no-deps", "--document-private-items"]).current_dir(root());
    cargo.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links");
    if !cargo.status().context("running cargo doc")?.success() {
        bail!("cargo doc failed");
    }
    Ok(())
}

fn main() -> Result<()> {
    match Args::parse().chore {
        Chore::Check => {
            run("cargo", &["fmt", "--all", "--check"])?;
            tidy::check(&root())?;
            parity::check(&root())?;
            let all = ["--workspace", "--all-targets", "--all-features"];
            run("cargo", &[&["clippy"][..], &all, &["--", "-D", "warnings"]].concat())?;
            documentation()
        }
        Chore::Tidy => tidy::check(&root()),
        Chore::Parity => parity::check(&root()),
        Chore::Proto { check } => proto::run(&root(), check),
        Chore::Bench { args } => bench::speed(&args),
        Chore::Counts { write } => bench::counts(write),
        Chore::Fuzz { seconds, targets } => fuzz::run(&root(), seconds, &targets),
    }
}
