//! What was typed.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::roles::discovery::DiscoveryArgs;
use crate::roles::proxy::ProxyArgs;
use crate::{commands, log, output, roles, up};

/// A service mesh that takes Istio's YAML, runs whole on one machine, and says why.
#[derive(Parser, Debug)]
#[command(name = "lateen", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Which mesh a command talks to.
#[derive(Args, Debug, Clone)]
pub(crate) struct MeshArgs {
    /// The mesh's name.
    #[arg(long, default_value = "lateen", env = "LATEEN_MESH", value_parser = mesh_name)]
    pub name: String,
    /// Folder of the mesh's state, socket and keys.
    #[arg(long, value_name = "DIR", env = "LATEEN_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
}

/// A mesh's name is that of a folder, too.
fn mesh_name(text: &str) -> Result<String, String> {
    let is_letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && text.len() <= 63 && text.chars().all(is_letter) {
        return Ok(text.to_owned());
    }
    Err("a mesh's name has at most 63 letters, digits, `-`, `_`, `.`, and begins with a letter or digit".to_owned())
}

/// Seconds: a number, or a duration as kubectl takes it (`90s`, `1m30s`). Parts of a second count as
/// a whole one, and nobody waits longer than a year.
pub(crate) fn seconds(text: &str) -> Result<u64, String> {
    const YEAR: u64 = 365 * 24 * 3600;
    let seconds = match text.parse::<u64>() {
        Ok(seconds) => seconds,
        Err(_) => {
            let duration = api::scalar::Duration::parse(text)?.0;
            duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
        }
    };
    Ok(seconds.min(YEAR))
}

/// How an answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// An aligned table.
    Table,
    /// The table with more columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// `kind/name` lines.
    Name,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Start a mesh with a sample application in it.
    Demo(up::UpArgs),
    /// Start a mesh from your manifests and follow them.
    Up(up::UpArgs),
    /// Stop a running mesh.
    Down(commands::DownArgs),
    /// What runs, and where.
    Status(commands::StatusArgs),
    /// Apply manifests to the running mesh.
    Apply(commands::ApplyArgs),
    /// Delete objects of the running mesh.
    Delete(commands::DeleteArgs),
    /// List objects.
    Get(commands::GetArgs),
    /// Wait until every proxy runs what was applied.
    Wait(commands::WaitArgs),
    /// Output of a container.
    Logs(commands::LogsArgs),
    /// Run a program inside a pod.
    Exec(commands::ExecArgs),
    /// Restart or follow a deployment.
    #[command(subcommand)]
    Rollout(commands::RolloutCommand),
    /// Change the number of replicas.
    Scale(commands::ScaleArgs),
    /// Change labels.
    Label(commands::LabelArgs),
    /// Check manifests without a mesh.
    Validate(commands::ValidateArgs),
    /// What each proxy was sent and runs.
    #[command(name = "proxy-status", visible_alias = "ps")]
    ProxyStatus(commands::ProxyStatusArgs),
    /// What a proxy runs: listeners, routes, clusters, endpoints, certificates.
    #[command(name = "proxy-config", visible_alias = "pc")]
    ProxyConfig(commands::ProxyConfigArgs),
    /// Where a call would go, and why.
    Explain(commands::ExplainArgs),
    /// What the admin interface of the proxy in this pod says.
    #[command(name = "admin-get", hide = true)]
    AdminGet(commands::AdminGetArgs),
    /// Versions.
    Version(commands::VersionArgs),
    /// Run the control plane.
    Discovery(DiscoveryArgs),
    /// Run a proxy.
    Proxy(ProxyArgs),
    /// Run a sample application.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Sample {
        /// Which.
        name: String,
        /// Its options.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// Exit codes of istioctl.
pub(crate) mod exit {
    /// Something failed.
    pub(crate) const ERROR: u8 = 1;
    /// The command line is wrong.
    pub(crate) const USAGE: u8 = 64;
    /// A file cannot be understood.
    pub(crate) const DATA: u8 = 65;
}

/// An answer that is no error of ours but must not exit with 0.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ExitWith {
    /// The code.
    pub code: u8,
    /// What to say; may be empty when it was said.
    pub message: String,
}

/// Parses the command line and runs it.
pub(crate) fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let is_answer = !error.use_stderr();
            _ = error.print();
            return if is_answer { ExitCode::SUCCESS } else { ExitCode::from(exit::USAGE) };
        }
    };
    let result = match cli.command {
        Command::Demo(args) => {
            log::start("warn");
            up::demo(&args)
        }
        Command::Up(args) => {
            log::start("warn");
            up::up(&args)
        }
        Command::Down(args) => commands::down(&args),
        Command::Status(args) => commands::status(&args),
        Command::Apply(args) => commands::apply(&args),
        Command::Delete(args) => commands::delete(&args),
        Command::Get(args) => commands::get(&args),
        Command::Wait(args) => commands::wait(&args),
        Command::Logs(args) => commands::logs(&args),
        Command::Exec(args) => commands::exec(&args),
        Command::Rollout(command) => commands::rollout(&command),
        Command::Scale(args) => commands::scale(&args),
        Command::Label(args) => commands::label(&args),
        Command::Validate(args) => commands::validate(&args),
        Command::ProxyStatus(args) => commands::proxy_status(&args),
        Command::ProxyConfig(args) => commands::proxy_config(&args),
        Command::Explain(args) => commands::explain(&args),
        Command::AdminGet(args) => commands::admin_get(&args),
        Command::Version(args) => commands::version(&args),
        Command::Discovery(args) => {
            log::start("info");
            roles::discovery::run(args)
        }
        Command::Proxy(args) => args.start_log().and_then(|levels| roles::proxy::run(args, levels)),
        Command::Sample { name, args } => samples::run(&name, &args).map_err(Into::into),
    };
    match result {
        Ok(()) if output::is_lost() => ExitCode::from(exit::ERROR),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref::<ExitWith>() {
            Some(exit) => {
                if !exit.message.is_empty() {
                    output::error(&exit.message);
                }
                ExitCode::from(exit.code)
            }
            None => {
                output::error(&format!("{error:#}"));
                ExitCode::from(exit::ERROR)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_meshes_stay_in_their_folder() {
        for good in ["lateen", "a", "My_mesh-2.0"] {
            assert_eq!(mesh_name(good).as_deref(), Ok(good));
        }
        for bad in ["", ".", "..", "../x", "/tmp/x", "a/b", "a b", "a\nb", "-x", "ü", &"a".repeat(64)] {
            assert!(mesh_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times_as_they_are_typed() {
        for (text, expect) in [
            ("60", 60),
            ("0", 0),
            ("5s", 5),
            ("1m30s", 90),
            ("1.5s", 2),
            ("100ms", 1),
            ("18446744073709551615", 31_536_000),
        ] {
            assert_eq!(seconds(text), Ok(expect), "{text}");
        }
        for bad in ["", "-1", "-5s", "x", "5 s"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
