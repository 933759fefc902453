//! What the binary answers without a mesh. Being this package's integration test, it also makes
//! `cargo test` build the binary that the end-to-end tests run, with the features of a test build.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

fn lateen(args: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lateen"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that does not read its input may be gone already.
    _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

#[test]
fn the_version_is_the_packages() {
    let output = lateen(&["version", "-o", "json"], "");
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&format!("\"clientVersion\": \"{}\"", env!("CARGO_PKG_VERSION"))), "{text}");
}

#[test]
fn what_is_no_command_ends_with_istioctls_code_for_usage() {
    assert_eq!(lateen(&["frobnicate"], "").status.code(), Some(64));
    assert_eq!(lateen(&["get"], "").status.code(), Some(64));
    assert_eq!(lateen(&["--help"], "").status.code(), Some(0));
}

#[test]
fn manifests_are_checked_without_a_mesh() {
    let manifest = |weight: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: a, namespace: b}}\n\
             spec:\n  hosts: [a.test]\n  http:\n  - route:\n    - destination: {{host: a}}\n      weight: {weight}\n"
        )
    };
    let good = lateen(&["validate", "-f", "-"], &manifest("100"));
    assert_eq!(good.status.code(), Some(0), "{}", String::from_utf8_lossy(&good.stderr));
    let bad = lateen(&["validate", "-f", "-"], &manifest("many"));
    assert_ne!(bad.status.code(), Some(0));
    let said = String::from_utf8_lossy(&bad.stdout).into_owned() + &String::from_utf8_lossy(&bad.stderr);
    assert!(said.contains("weight") && said.contains("b/a"), "{said}");
}
