//! The `lateen` binary: roles of the mesh and commands of its users.
//!
//! Only this crate knows clap, standard output and exit codes. The hidden roles of the node come
//! first, before any thread exists.

mod cli;
mod commands;
mod log;
mod memory;
mod output;
mod roles;
mod up;

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = node::internal_main(std::env::args_os().skip(1)) {
        return code;
    }
    cli::run()
}
