//! The benches: built as they are shipped to a clone's owner (release), then run.

use anyhow::Result;

use crate::run;

/// Measures against a real Envoy.
pub(crate) fn speed(args: &[String]) -> Result<()> {
    build()?;
    program(args.iter().map(String::as_str))
}

/// Instructions and allocations per request, held to `bench/baseline.json`.
pub(crate) fn counts(write: bool) -> Result<()> {
    build()?;
    program(["counts"].into_iter().chain(write.then_some("--write")))
}

/// The bench finds the product beside itself, so both are built the same way.
fn build() -> Result<()> {
    run("cargo", &["build", "--release", "--package", "lateen", "--package", "bench"])
}

fn program<'a>(args: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut all = vec!["run", "--release", "--package", "bench", "--"];
    all.extend(args);
    run("cargo", &all)
}
