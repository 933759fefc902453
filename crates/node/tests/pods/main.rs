//! Pods for real: namespaces, capture, DNS, service addresses, mounts, signals, death.
//!
//! One binary plays every part, because the runtime starts itself again: the hidden roles of the
//! node, the programs inside pods ([`roles`]), a mesh that gets killed, and the tests. As root every
//! test runs twice, the second time in a process of an ordinary user.

#![expect(clippy::unwrap_used, reason = "a test without the usual harness; elsewhere tests may unwrap")]

mod cases;
mod roles;

use std::process::{Command, ExitCode};

const ORDINARY_USER: u32 = 65534;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(code) = node::internal_main(arguments.clone()) {
        return code;
    }
    let words: Vec<String> = arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    if let Some((role, rest)) = words.split_first()
        && let Some(code) = roles::play(role, rest)
    {
        return code;
    }
    // The usual harness lists its tests for tools such as nextest.
    if words.iter().any(|word| word == "--list") {
        println!("pods: test");
        return ExitCode::SUCCESS;
    }
    let filter = words.iter().find(|word| !word.starts_with('-')).cloned();
    if !cases::run(filter.as_deref()) {
        return ExitCode::FAILURE;
    }
    if rustix::process::geteuid().is_root() { again_as_ordinary_user(&words) } else { ExitCode::SUCCESS }
}

fn again_as_ordinary_user(words: &[String]) -> ExitCode {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    // The folder of the build may be closed to others.
    let dir = tempfile::tempdir().expect("a scratch folder");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("open to all");
    let copy = dir.path().join("pods");
    std::fs::copy(std::env::current_exe().expect("our own path"), &copy).expect("a copy of the test");
    let status =
        Command::new(&copy).args(words).uid(ORDINARY_USER).gid(ORDINARY_USER).status().expect("the test starts");
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
