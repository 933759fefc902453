//! Being this package's integration test, it makes `cargo test` build the puppet.

use std::process::Command;

#[test]
fn a_puppet_without_a_part_says_which_there_are() {
    let output = Command::new(env!("CARGO_BIN_EXE_puppet")).output().unwrap();
    assert!(!output.status.success());
    assert!(!output.stderr.is_empty());
}
