//! `logs`, `exec`, `rollout`, `scale`, `label`.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use node::client::{Client, uri};
use serde_json::{Value, json};

use super::selector::Selector;
use super::{block_on, client, deployment_named, target};
use crate::cli::{ExitWith, MeshArgs, exit};
use crate::output;

/// The pod that `pod`, `pod/NAME` or `deploy/NAME` means.
pub(crate) async fn find_pod(client: &Client, namespace: &str, what: &str) -> Result<Value> {
    let (kind, name) = target(what)?;
    let kind = api::Kind::parse(kind).with_context(|| format!("{what:?}: give POD or deploy/NAME"))?;
    if kind == api::Kind::Pod {
        return Ok(client.get(&uri(&["objects", "Pod", namespace, name], &[])).await?);
    }
    if kind != api::Kind::Deployment {
        bail!("{what:?}: give POD or deploy/NAME");
    }
    // Whether there is one: what is missing is said.
    client.get::<Value>(&uri(&["objects", "Deployment", namespace, name], &[])).await?;
    let pods: Value = client.get(&uri(&["objects", "Pod"], &[("namespace", namespace)])).await?;
    // Its own, not all that its selector fits, which may be another's.
    let fits = |pod: &&Value| {
        let (object, _) = api::from_json(pod);
        object.is_some_and(|object| node::inject::deployment_of(&object) == Some(name))
    };
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
    /// Only the last lines; all with -1.
    #[arg(long, default_value = "-1", allow_negative_numbers = true)]
    tail: i64,
}

pub(crate) fn logs(args: &LogsArgs) -> Result<()> {
    let client = client(&args.mesh)?;
    block_on(async {
        let pod = find_pod(&client, &args.namespace, &args.pod).await?;
        let container = container_of(&pod, args.container.as_deref());
        if let Some(why) = waits_for(&pod, container) {
            output::note(&format!("container {container} waits to start: {why}"));
        }
        let (follow, tail) = (args.follow.to_string(), args.tail.to_string());
        let parameters = [("follow", follow.as_str()), ("tail", tail.as_str())];
        // All lines when it is negative.
        let parameters = &parameters[..if args.tail < 0 { 1 } else { 2 }];
        let uri = uri(&["logs", &args.namespace, name_of(&pod), container], parameters);
        let mut lines = client.lines(&uri).await?;
        while let Some(line) = lines.next().await {
            output::raw(format!("{line}\n").as_bytes());
        }
        Ok(())
    })
}

/// Why a container does not run, if it waits: there may be no log to say so.
fn waits_for(pod: &Value, container: &str) -> Option<String> {
    let statuses = ["containerStatuses", "initContainerStatuses"].map(|list| pod["status"][list].as_array());
    let status = statuses.into_iter().flatten().flatten().find(|status| status["name"] == container)?;
    let waiting = status["state"].get("waiting")?;
    let text = |key: &str| waiting[key].as_str().filter(|text| !text.is_empty());
    Some([text("reason"), text("message")].into_iter().flatten().collect::<Vec<_>>().join(": "))
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
        let uri = uri(&["exec", &args.namespace, name_of(&pod), container], &[]);
        Ok(client.get::<node::ExecTarget>(&uri).await?)
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
    /// `deploy/NAME` or `deploy NAME`; every deployment of the namespace when left out.
    deployment: Vec<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// How long to wait.
    #[arg(long, default_value = "300", value_parser = crate::cli::seconds)]
    timeout: u64,
}

async fn deployments(client: &Client, args: &RolloutArgs) -> Result<Vec<String>> {
    if let Some(name) = deployment_named(&args.deployment)? {
        return Ok(vec![name.to_owned()]);
    }
    let list: Value = client.get(&uri(&["objects", "Deployment"], &[("namespace", &args.namespace)])).await?;
    let names: Vec<String> =
        list["items"].as_array().into_iter().flatten().map(|one| name_of(one).to_owned()).collect();
    if names.is_empty() {
        output::note(&format!("No resources found in {} namespace.", args.namespace));
    }
    Ok(names)
}

pub(crate) fn rollout(command: &RolloutCommand) -> Result<()> {
    match command {
        RolloutCommand::Restart(args) => {
            let client = client(&args.mesh)?;
            block_on(async {
                for name in deployments(&client, args).await? {
                    let stamp = jiff::Timestamp::now().to_string();
                    let patch = json!({ "spec": { "template": { "metadata": { "annotations": { types::wellknown::annotations::RESTARTED_AT: stamp } } } } });
                    let uri = uri(&["objects", "Deployment", &args.namespace, &name, "merge"], &[]);
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
    /// `deploy/NAME` or `deploy NAME`.
    #[arg(required = true)]
    deployment: Vec<String>,
    /// How many.
    #[arg(long)]
    replicas: u32,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

pub(crate) fn scale(args: &ScaleArgs) -> Result<()> {
    let nameless = || ExitWith { code: exit::USAGE, message: "which one? give deploy/NAME".into() };
    let name = deployment_named(&args.deployment)?.ok_or_else(nameless)?;
    let client = client(&args.mesh)?;
    let patch = json!({ "spec": { "replicas": args.replicas } });
    let uri = uri(&["objects", "Deployment", &args.namespace, name, "merge"], &[]);
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
    /// Those of the kind that have such labels, in place of a name.
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// All of the kind in the namespace, in place of a name.
    #[arg(long)]
    all: bool,
    /// Change labels that have another value.
    #[arg(long)]
    overwrite: bool,
}

/// What to do with labels: a value to set, or none to remove.
type Changes = Vec<(String, Option<String>)>;

fn changes(words: &[String]) -> Result<Changes> {
    let usage = |message: String| anyhow::Error::from(ExitWith { code: exit::USAGE, message });
    if words.is_empty() {
        return Err(usage("give at least one key=value to set, or key- to remove".to_owned()));
    }
    let parse = |word: &String| match (word.split_once('='), word.strip_suffix('-')) {
        (Some((key, value)), _) => Ok((key.to_owned(), Some(value.to_owned()))),
        (None, Some(key)) => Ok((key.to_owned(), None)),
        (None, None) => Err(usage(format!("{word:?} is neither key=value nor key-"))),
    };
    words.iter().map(parse).collect()
}

/// kubectl's word for what `changes` do to `labels`.
///
/// *Errors*: a label has another value already, and that is not to be changed.
fn outcome(labels: &Value, changes: &Changes, overwrite: bool) -> Result<&'static str> {
    let has = |key: &String| labels[key.as_str()].as_str();
    for (key, value) in changes {
        if let (Some(has), Some(wanted)) = (has(key), value)
            && has != wanted
            && !overwrite
        {
            bail!("label {key:?} has the value {has:?} already; give --overwrite to change it");
        }
    }
    Ok(if changes.iter().all(|(key, value)| has(key) == value.as_deref()) {
        "not labeled"
    } else if changes.iter().all(|(_, value)| value.is_none()) {
        "unlabeled"
    } else {
        "labeled"
    })
}

pub(crate) fn label(args: &LabelArgs) -> Result<()> {
    let is_group = args.all || args.selector.is_some();
    let (kind, name, words) = match args.words.as_slice() {
        [kind, words @ ..] if is_group => (kind.as_str(), None, words),
        [both, words @ ..] if both.contains('/') => {
            let (kind, name) = target(both)?;
            (kind, Some(name), words)
        }
        [kind, name, words @ ..] => (kind.as_str(), Some(name.as_str()), words),
        _ => return Err(ExitWith { code: exit::USAGE, message: "give KIND NAME key=value".into() }.into()),
    };
    let changes = changes(words)?;
    let selector = args.selector.as_deref().unwrap_or_default().parse::<Selector>()?;
    let kind = api::Kind::parse(kind).with_context(|| format!("the mesh has no kind {kind:?}"))?;
    let namespace = if kind.is_namespaced() { args.namespace.as_str() } else { "_" };
    let client = client(&args.mesh)?;
    let found: Vec<Value> = block_on(async {
        if let Some(name) = name {
            return Ok(vec![client.get::<Value>(&uri(&["objects", kind.name(), namespace, name], &[])).await?]);
        }
        let within = [("namespace", namespace)];
        let within = if kind.is_namespaced() { &within[..] } else { &[] };
        let list: Value = client.get(&uri(&["objects", kind.name()], within)).await?;
        Ok(list["items"].as_array().into_iter().flatten().filter(|object| selector.fits(object)).cloned().collect())
    })?;
    if found.is_empty() {
        let place = if kind.is_namespaced() { format!(" in {namespace} namespace") } else { String::new() };
        output::note(&format!("No resources found{place}."));
    }
    let set = changes.iter().map(|(key, value)| (key.clone(), json!(value))).collect::<serde_json::Map<_, _>>();
    let body = json!({ "metadata": { "labels": set } }).to_string().into_bytes();
    for object in &found {
        let name = name_of(object);
        let word = outcome(&object["metadata"]["labels"], &changes, args.overwrite)?;
        if word != "not labeled" {
            let uri = uri(&["objects", kind.name(), namespace, name, "merge"], &[]);
            block_on(async { Ok(client.post::<Value>(&uri, body.clone()).await?) })?;
        }
        output::line(&format!("{}/{name} {word}", super::resource(kind)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_change_as_kubectl_says_it() {
        let labels = json!({ "a": "1" });
        let check = |words: &str, overwrite: bool| {
            let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
            outcome(&labels, &changes(&words).unwrap(), overwrite).map_err(|error| error.to_string())
        };
        assert_eq!(check("b=2", false), Ok("labeled"));
        assert_eq!(check("a=1", false), Ok("not labeled"));
        assert_eq!(check("b-", false), Ok("not labeled"));
        assert_eq!(check("a-", false), Ok("unlabeled"));
        assert_eq!(check("a- b=2", false), Ok("labeled"));
        assert_eq!(check("a=2", true), Ok("labeled"));
        assert!(check("a=2", false).unwrap_err().contains("--overwrite"));
        assert!(changes(&[]).is_err() && changes(&["a".to_owned()]).is_err());
    }

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
