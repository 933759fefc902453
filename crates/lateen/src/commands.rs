//! Commands that talk to a running mesh, or need none.

mod explain;
mod get;
mod manifests;
mod pods;
mod proxies;
mod proxy_config;
mod selector;

use std::future::Future;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use node::client::Client;
use serde_json::Value;

use crate::cli::{ExitWith, Format, MeshArgs, exit};
use crate::output;

pub(crate) use explain::{ExplainArgs, explain};
pub(crate) use get::{GetArgs, get, lasting, pod_status};
pub(crate) use manifests::{ApplyArgs, DeleteArgs, ValidateArgs, apply, delete, errors, validate};
pub(crate) use pods::{ExecArgs, LabelArgs, LogsArgs, RolloutCommand, ScaleArgs, exec, label, logs, rollout, scale};
pub(crate) use proxies::{
    ProxyStatusArgs, VersionArgs, WaitArgs, mesh_findings, proxy_status, synced, synced_at, version, wait,
};
pub(crate) use proxy_config::{AdminGetArgs, ProxyConfigArgs, admin_get, proxy_config};

/// Where a mesh keeps everything.
pub(crate) fn state_dir(mesh: &MeshArgs) -> Result<PathBuf> {
    if let Some(dir) = &mesh.state_dir {
        return std::path::absolute(dir).with_context(|| format!("--state-dir {}", dir.display()));
    }
    let base = meshes_dir().context("neither XDG_STATE_HOME nor HOME is set; give --state-dir DIR")?;
    Ok(base.join(&mesh.name))
}

/// Where all of a user's meshes keep everything, but for those that were told otherwise.
pub(crate) fn meshes_dir() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")))?;
    std::path::absolute(base.join("lateen")).ok()
}

/// The socket of a mesh's objects.
pub(crate) fn api_socket(mesh: &MeshArgs) -> Result<PathBuf> {
    Ok(state_dir(mesh)?.join("api.sock"))
}

/// The socket of a mesh's control plane.
pub(crate) fn debug_socket(mesh: &MeshArgs) -> Result<PathBuf> {
    Ok(state_dir(mesh)?.join("istiod").join("debug.sock"))
}

fn client(mesh: &MeshArgs) -> Result<Client> {
    Ok(Client::new(&api_socket(mesh)?))
}

/// A client of a mesh's control plane.
fn plane(mesh: &MeshArgs) -> Result<Client> {
    Ok(Client::of_control_plane(&debug_socket(mesh)?, &api_socket(mesh)?))
}

fn block_on<T>(task: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(task)
}

/// All of standard input.
pub(crate) fn read_stdin() -> Result<String> {
    node::files::read_text(std::io::stdin()).context("cannot read standard input")
}

/// A kind as kubectl prints it before a name: `pod`, `deployment.apps`.
fn resource(kind: api::Kind) -> String {
    let (name, group) = (kind.name().to_lowercase(), kind.info().group);
    if group.is_empty() { name } else { format!("{name}.{group}") }
}

/// [`resource`] of a kind by its name.
fn resource_named(kind: &str) -> String {
    api::Kind::parse(kind).map_or_else(|| kind.to_lowercase(), resource)
}

/// The name in `KIND/NAME`, `KIND NAME` or `NAME`, where only deployments can be meant; none for a
/// kind alone.
fn deployment_named(words: &[String]) -> Result<Option<&str>> {
    let of = |kind: &str| match api::Kind::parse(kind) {
        Some(api::Kind::Deployment) => Ok(()),
        _ => Err(ExitWith { code: exit::USAGE, message: format!("{kind:?}: only deployments can do that") }),
    };
    match words {
        [] => Ok(None),
        [word] => match word.split_once('/') {
            Some((kind, name)) => of(kind).map(|()| Some(name).filter(|name| !name.is_empty())),
            None if of(word).is_ok() => Ok(None),
            None => Ok(Some(word.as_str())),
        },
        [kind, name] => of(kind).map(|()| Some(name.as_str())),
        _ => Err(ExitWith { code: exit::USAGE, message: "give one deployment: deploy/NAME".into() }),
    }
    .map_err(Into::into)
}

/// Splits `kind/name`, or takes a pod's name.
fn target(text: &str) -> Result<(&str, &str)> {
    match text.split_once('/').unwrap_or(("pod", text)) {
        (kind, "") => Err(ExitWith { code: exit::USAGE, message: format!("{kind}: which one? give KIND/NAME") }.into()),
        both => Ok(both),
    }
}

/// Stops a mesh.
#[derive(Args, Debug)]
pub(crate) struct DownArgs {
    #[command(flatten)]
    mesh: MeshArgs,
}

pub(crate) fn down(args: &DownArgs) -> Result<()> {
    let client = client(&args.mesh)?;
    let lock = state_dir(&args.mesh)?.join("lock");
    block_on(async {
        client.post::<Value>("/shutdown", Vec::new()).await?;
        Ok(())
    })?;
    // The lock is free when the process is gone, whatever way it went.
    if let Ok(file) = std::fs::File::open(&lock) {
        _ = rustix::fs::flock(&file, rustix::fs::FlockOperation::LockShared);
    }
    output::line(&format!("mesh {} is down", args.mesh.name));
    Ok(())
}

/// What runs.
#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// `table`, `json`, `yaml`.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub(crate) fn status(args: &StatusArgs) -> Result<()> {
    let client = client(&args.mesh)?;
    let status: Value = block_on(async { Ok(client.get("/status").await?) })?;
    match args.output {
        Format::Json => output::json(&status),
        Format::Yaml => output::yaml(&status),
        Format::Table | Format::Wide | Format::Name => print_status(&status),
    }
    Ok(())
}

/// The table of a status.
pub(crate) fn print_status(status: &Value) {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let rows: Vec<Vec<String>> = status["pods"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|pod| {
            ["namespace", "name", "ready", "status", "address", "version"].iter().map(|key| text(&pod[*key])).collect()
        })
        .collect();
    output::table(&["NAMESPACE", "NAME", "READY", "STATUS", "ADDRESS", "VERSION"], &rows);
    if let Some(addresses) = status["addresses"].as_object() {
        output::line("");
        for (role, address) in addresses {
            output::line(&format!("{role:<14} {}", text(address)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deployment_as_it_is_typed() {
        let named = |text: &str| {
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            deployment_named(&words).map(|name| name.map(str::to_owned)).map_err(|error| error.to_string())
        };
        for text in ["deploy/a", "deployment a", "deployments.apps/a", "a"] {
            assert_eq!(named(text), Ok(Some("a".to_owned())), "{text}");
        }
        assert_eq!((named(""), named("deployment")), (Ok(None), Ok(None)));
        assert!(named("pod/a").unwrap_err().contains("pod") && named("deploy a b").is_err());
    }
}
