//! `logs`, `exec`, `rollout`, `scale`, `label`.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use node::client::Client;
use serde_json::{Value, json};

use super::{block_on, client, target};
use crate::cli::{ExitWith, MeshArgs};
use crate::output;

/// The pod that `pod`, `pod/NAME` or `deploy/NAME` means.
pub(crate) async fn find_pod(client: &Client, namespace: &str, what: &str) -> Result<Value> {
    let (kind, name) = target(what);
    let kind = api::Kind::parse(kind).with_context(|| format!("{what:?}: give POD or deploy/NAME"))?;
    if kind == api::Kind::Pod {
        return Ok(client.get(&format!("/objects/Pod/{namespace}/{name}")).await?);
    }
    if kind != api::Kind::Deployment {
        bail!("{what:?}: give POD or deploy/NAME");
    }
    let deployment: Value = client.get(&format!("/objects/Deployment/{namespace}/{name}")).await?;
    let wanted = deployment["spec"]["selector"]["matchLabels"].as_object().cloned().unwrap_or_default();
    let pods: Value = client.get(&format!("/objects/Pod?namespace={namespace}")).await?;
    let fits = |pod: &&Value| wanted.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value);
    let alive = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["phase"] == "Running";
    let mut pods = pods["items"].as_array().into_iter().flatten().filter(fits).filter(alive);
    pods.next().cloned().with_context(|| format!("deployment {namespace}/{name} has no running pod"))
}

fn container_of<'a>(pod: &'a Value, wanted: Option<&'a str>) -> &'a str {
    let default = pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
    let first = || {
        let names = pod["spec"]["containers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|container| container["name"].as_str());
        names.into_iter().find(|name| *name != "istio-proxy").unwrap_or("istio-proxy")
    };
    wanted.or(default).unwrap_or_else(first)
}

fn name_of(pod: &Value) -> &str {
    pod["metadata"]["name"].as_str().unwrap_or_default()
}

/// Output of a container.
#[derive(Args, Debug)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// `POD` or `deploy/NAME`.
    pod: String,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Container; the application's first one by default.
    #[arg(short, long)]
    container: Option<String>,
    /// Go on.
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines.
    #[arg(long)]
    tail: Option<usize>,
}

pub(crate) fn logs(args: &LogsArgs) -> Result<()> {
    let client = client(&args.mesh)?;
    block_on(async {
        let pod = find_pod(&client, &args.namespace, &args.pod).await?;
        let container = container_of(&pod, args.container.as_deref());
        let tail = args.tail.map(|tail| format!("&tail={tail}")).unwrap_or_default();
        let uri = format!("/logs/{}/{}/{container}?follow={}{tail}", args.namespace, name_of(&pod), args.follow);
        let mut lines = client.lines(&uri).await?;
        while let Some(line) = lines.next().await {
            output::raw(format!("{line}\n").as_bytes());
        }
        Ok(())
    })
}

/// Runs a program inside a pod.
#[derive(Args, Debug)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// `POD` or `deploy/NAME`.
    pod: String,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Container; the application's first one by default.
    #[arg(short, long)]
    container: Option<String>,
    /// Accepted for compatibility: the terminal is the caller's own.
    #[arg(short = 'i', long, hide = true)]
    stdin: bool,
    /// Accepted for compatibility.
    #[arg(short = 't', long, hide = true)]
    tty: bool,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

pub(crate) fn exec(args: &ExecArgs) -> Result<()> {
    let client = client(&args.mesh)?;
    let target = block_on(async {
        let pod = find_pod(&client, &args.namespace, &args.pod).await?;
        let container = container_of(&pod, args.container.as_deref());
        Ok(client.get::<node::ExecTarget>(&format!("/exec/{}/{}/{container}", args.namespace, name_of(&pod))).await?)
    })?;
    let status = node::exec::command(&target, &args.command)?.status().context("cannot enter the pod")?;
    match status.code() {
        Some(0) => Ok(()),
        code => {
            Err(ExitWith { code: code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1), message: String::new() }
                .into())
        }
    }
}

/// What to do with a rollout.
#[derive(Subcommand, Debug)]
pub(crate) enum RolloutCommand {
    /// Replace all pods, a few at a time.
    Restart(RolloutArgs),
    /// Wait until a rollout is through.
    Status(RolloutArgs),
}

/// Which deployment.
#[derive(Args, Debug)]
pub(crate) struct RolloutArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// `deploy/NAME`; every deployment of the namespace when left out.
    deployment: Option<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// How long to wait.
    #[arg(long, default_value = "300")]
    timeout: u64,
}

async fn deployments(client: &Client, args: &RolloutArgs) -> Result<Vec<String>> {
    if let Some(what) = &args.deployment {
        return Ok(vec![what.split_once('/').map_or(what.as_str(), |(_, name)| name).to_owned()]);
    }
    let list: Value = client.get(&format!("/objects/Deployment?namespace={}", args.namespace)).await?;
    Ok(list["items"].as_array().into_iter().flatten().map(|one| name_of(one).to_owned()).collect())
}

pub(crate) fn rollout(command: &RolloutCommand) -> Result<()> {
    match command {
        RolloutCommand::Restart(args) => {
            let client = client(&args.mesh)?;
            block_on(async {
                for name in deployments(&client, args).await? {
                    let stamp = jiff::Timestamp::now().to_string();
                    let patch = json!({ "spec": { "template": { "metadata": { "annotations": { types::wellknown::annotations::RESTARTED_AT: stamp } } } } });
                    let uri = format!("/objects/Deployment/{}/{name}/merge", args.namespace);
                    client.post::<Value>(&uri, patch.to_string().into_bytes()).await?;
                    output::line(&format!("deployment.apps/{name} restarted"));
                }
                Ok(())
            })
        }
        RolloutCommand::Status(args) => {
            let client = client(&args.mesh)?;
            block_on(async {
                for name in deployments(&client, args).await? {
                    wait_for_rollout(&client, &args.namespace, &name, Duration::from_secs(args.timeout)).await?;
                    output::line(&format!("deployment \"{name}\" successfully rolled out"));
                }
                Ok(())
            })
        }
    }
}

/// Whether every replica is of the newest template, available, and no old one is left.
fn is_rolled_out(deployment: &Value) -> bool {
    let wanted = deployment["spec"]["replicas"].as_u64().unwrap_or(1);
    let status = &deployment["status"];
    let number = |key: &str| status[key].as_u64().unwrap_or(0);
    status["observedGeneration"].as_u64() >= deployment["metadata"]["generation"].as_u64()
        && number("updatedReplicas") == wanted
        && number("availableReplicas") >= wanted
        && number("replicas") == wanted
}

/// Follows the objects until the deployment has rolled out.
pub(crate) async fn wait_for_rollout(client: &Client, namespace: &str, name: &str, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    let mut events = client.lines("/watch").await?;
    let is_it = |object: &Value| {
        object["kind"] == "Deployment"
            && object["metadata"]["namespace"] == *namespace
            && object["metadata"]["name"] == *name
    };
    let mut last = Value::Null;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(line) = tokio::time::timeout(left, events.next()).await else {
            let status = &last["status"];
            bail!(
                "deployment {namespace}/{name} is not rolled out after {patience:?}: {} of {} available",
                status["availableReplicas"].as_u64().unwrap_or(0),
                last["spec"]["replicas"].as_u64().unwrap_or(1)
            );
        };
        let line = line.context("the mesh went away")?;
        let event: Value = serde_json::from_str(&line).unwrap_or_default();
        if event["type"] == "SYNCED" && last.is_null() {
            bail!("deployment {namespace}/{name} is not found");
        }
        if is_it(&event["object"]) {
            last = event["object"].clone();
            if is_rolled_out(&last) {
                return Ok(());
            }
        }
    }
}

/// Changes the number of replicas.
#[derive(Args, Debug)]
pub(crate) struct ScaleArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// `deploy/NAME`.
    deployment: String,
    /// How many.
    #[arg(long)]
    replicas: u32,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

pub(crate) fn scale(args: &ScaleArgs) -> Result<()> {
    let name = args.deployment.split_once('/').map_or(args.deployment.as_str(), |(_, name)| name);
    let client = client(&args.mesh)?;
    let patch = json!({ "spec": { "replicas": args.replicas } });
    let uri = format!("/objects/Deployment/{}/{name}/merge", args.namespace);
    block_on(async { Ok(client.post::<Value>(&uri, patch.to_string().into_bytes()).await?) })?;
    output::line(&format!("deployment.apps/{name} scaled"));
    Ok(())
}

/// Changes labels.
#[derive(Args, Debug)]
pub(crate) struct LabelArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// `KIND/NAME` or `KIND NAME`, then `key=value` to set or `key-` to remove.
    #[arg(required = true)]
    words: Vec<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Change labels that have another value.
    #[arg(long)]
    overwrite: bool,
}

pub(crate) fn label(args: &LabelArgs) -> Result<()> {
    let (kind, name, labels) = match args.words.as_slice() {
        [both, labels @ ..] if both.contains('/') => {
            let (kind, name) = target(both);
            (kind, name, labels)
        }
        [kind, name, labels @ ..] => (kind.as_str(), name.as_str(), labels),
        _ => bail!("give KIND NAME key=value"),
    };
    if labels.is_empty() {
        bail!("give at least one key=value to set, or key- to remove");
    }
    let mut patch = serde_json::Map::new();
    for label in labels {
        match (label.split_once('='), label.strip_suffix('-')) {
            (Some((key, value)), _) => patch.insert(key.to_owned(), json!(value)),
            (None, Some(key)) => patch.insert(key.to_owned(), Value::Null),
            (None, None) => bail!("{label:?} is neither key=value nor key-"),
        };
    }
    let parsed = api::Kind::parse(kind).with_context(|| format!("the mesh has no kind {kind:?}"))?;
    let namespace = if parsed.is_namespaced() { args.namespace.as_str() } else { "_" };
    let client = client(&args.mesh)?;
    let uri = format!("/objects/{}/{namespace}/{name}", parsed.name());
    let live: Value = block_on(async { Ok(client.get(&uri).await?) })?;
    let differs = |(key, value): &(&String, &Value)| {
        let has = &live["metadata"]["labels"][key.as_str()];
        !value.is_null() && !has.is_null() && has != *value
    };
    if !args.overwrite
        && let Some((key, _)) = patch.iter().find(differs)
    {
        bail!("label {key:?} has the value {} already; give --overwrite to change it", live["metadata"]["labels"][key]);
    }
    let body = json!({ "metadata": { "labels": patch } }).to_string().into_bytes();
    block_on(async { Ok(client.post::<Value>(&format!("{uri}/merge"), body).await?) })?;
    output::line(&format!("{}/{name} labeled", super::resource(parsed)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollout_is_through_when_nothing_old_is_left() {
        let mut deployment = json!({
            "metadata": { "generation": 2 }, "spec": { "replicas": 2 },
            "status": { "observedGeneration": 2, "updatedReplicas": 2, "availableReplicas": 2, "replicas": 3 },
        });
        assert!(!is_rolled_out(&deployment));
        deployment["status"]["replicas"] = json!(2);
        assert!(is_rolled_out(&deployment));
        deployment["metadata"]["generation"] = json!(3);
        assert!(!is_rolled_out(&deployment));
    }
}
