//! The driver. Being an integration test, it makes `cargo test` build the program.

use std::process::Command;

#[test]
fn every_target_holds_on_its_seeds() {
    let output = Command::new(env!("CARGO_BIN_EXE_fuzzing")).args(["--seconds", "0"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    for target in fuzzing::TARGETS {
        assert!(said.lines().any(|line| line.starts_with(&format!("{}: ", target.name))), "{}: {said}", target.name);
    }
}
