//! `get`: kubectl's columns.

use anyhow::{Context, Result};
use api::Kind;
use clap::Args;
use node::client::{ClientError, uri};
use serde_json::{Value, json};

use super::selector::Selector;
use super::{block_on, client};
use crate::cli::{ExitWith, Format, MeshArgs, exit};
use crate::output;

/// Lists objects.
#[derive(Args, Debug)]
pub(crate) struct GetArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// `KIND`, `KIND NAME…`, or `KIND/NAME…`; several kinds with commas; `all` for what runs.
    #[arg(required = true)]
    what: Vec<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// All namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// `key=value,key!=value,key in (a,b),key notin (a,b),key,!key`.
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// A column for each of these labels.
    #[arg(short = 'L', long, value_delimiter = ',', value_name = "KEY")]
    label_columns: Vec<String>,
    /// A column with all labels.
    #[arg(long)]
    show_labels: bool,
    /// How to print.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

/// What kubectl means by `all`, as far as a mesh has it.
const ALL: [Kind; 3] = [Kind::Pod, Kind::Service, Kind::Deployment];

/// Kinds, each with a name or none for all, as they were typed.
fn targets(what: &[String]) -> Result<Vec<(Kind, Option<&str>)>> {
    let kind = |word: &str| Kind::parse(word).with_context(|| format!("the mesh has no kind {word:?}"));
    let mut out = Vec::new();
    if what.iter().any(|word| word.contains('/')) {
        for word in what {
            let both = word.split_once('/').filter(|(_, name)| !name.is_empty());
            let (of, name) = both.with_context(|| format!("{word:?} is not KIND/NAME"))?;
            out.push((kind(of)?, Some(name)));
        }
        return Ok(out);
    }
    let Some((kinds, names)) = what.split_first() else { return Ok(out) };
    for word in kinds.split(',') {
        if word == "all" {
            out.extend(ALL.map(|kind| (kind, None)));
            continue;
        }
        let kind = kind(word)?;
        if names.is_empty() {
            out.push((kind, None));
        }
        out.extend(names.iter().map(|name| (kind, Some(name.as_str()))));
    }
    Ok(out)
}

pub(crate) fn get(args: &GetArgs) -> Result<()> {
    let targets = targets(&args.what)?;
    let selector = args.selector.as_deref().unwrap_or_default().parse::<Selector>()?;
    let client = client(&args.mesh)?;
    let mut found: Vec<(Kind, Value)> = Vec::new();
    let mut missing = false;
    for &(kind, name) in &targets {
        let namespace = if kind.is_namespaced() { args.namespace.as_str() } else { "_" };
        let uri = match name {
            Some(name) => uri(&["objects", kind.name(), namespace, name], &[]),
            None if args.all_namespaces || !kind.is_namespaced() => uri(&["objects", kind.name()], &[]),
            None => uri(&["objects", kind.name()], &[("namespace", namespace)]),
        };
        match block_on(async { Ok(client.get::<Value>(&uri).await) })? {
            Ok(object) if name.is_some() => found.push((kind, object)),
            Ok(list) => {
                let objects = list["items"].as_array().into_iter().flatten();
                found.extend(objects.filter(|object| selector.fits(object)).map(|object| (kind, object.clone())));
            }
            // The others are shown all the same.
            Err(ClientError::Refused { status: 404, message, .. }) if name.is_some() => {
                output::error(&message);
                missing = true;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let is_single = targets.len() == 1 && targets[0].1.is_some();
    if !(missing && found.is_empty()) {
        print(args, is_single, found);
    }
    if missing { Err(ExitWith { code: exit::ERROR, message: String::new() }.into()) } else { Ok(()) }
}

fn print(args: &GetArgs, single: bool, found: Vec<(Kind, Value)>) {
    match args.output {
        Format::Json | Format::Yaml => {
            let mut objects: Vec<Value> = found.into_iter().map(|(_, object)| object).collect();
            let value = if single && objects.len() == 1 {
                objects.remove(0)
            } else {
                json!({ "apiVersion": "v1", "kind": "List", "items": objects })
            };
            if args.output == Format::Json { output::json(&value) } else { output::yaml(&value) }
        }
        Format::Name => {
            for (kind, object) in &found {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                output::line(&format!("{}/{name}", super::resource(*kind)));
            }
        }
        Format::Table | Format::Wide => {
            if found.is_empty() {
                let place =
                    if args.all_namespaces { String::new() } else { format!(" in {} namespace", args.namespace) };
                output::note(&format!("No resources found{place}."));
                return;
            }
            let mut kinds: Vec<Kind> = found.iter().map(|(kind, _)| *kind).collect();
            kinds.dedup();
            for (index, kind) in kinds.iter().enumerate() {
                if index > 0 {
                    output::line("");
                }
                let objects: Vec<&Value> =
                    found.iter().filter(|(at, _)| at == kind).map(|(_, object)| object).collect();
                table(args, *kind, &objects, kinds.len() > 1);
            }
        }
    }
}

/// Kubernetes' short form of an age.
fn age(object: &Value) -> String {
    let Some(created) =
        object["metadata"]["creationTimestamp"].as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok())
    else {
        return "<unknown>".to_owned();
    };
    let seconds = (jiff::Timestamp::now().as_second() - created.as_second()).max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// A list as kubectl shows it in a column of a custom resource: JSON.
fn listed(list: &Value) -> String {
    if list.is_array() { list.to_string() } else { String::new() }
}

/// Values with commas; `<none>` when there are none.
fn joined(values: impl Iterator<Item = String>) -> String {
    or_none(values.collect::<Vec<_>>().join(","))
}

fn labels(map: &Value) -> String {
    joined(map.as_object().into_iter().flatten().map(|(key, value)| format!("{key}={}", text(value))))
}

fn template_containers<'a>(object: &'a Value, field: &'a str) -> String {
    let containers = object["spec"]["template"]["spec"]["containers"].as_array().into_iter().flatten();
    joined(containers.map(|container| text(&container[field])))
}

/// The first three endpoints, as kubectl shows them.
fn endpoints(slice: &Value) -> String {
    let all = slice["endpoints"].as_array().into_iter().flatten();
    let all: Vec<String> =
        all.flat_map(|endpoint| endpoint["addresses"].as_array().into_iter().flatten()).map(text).collect();
    match all.as_slice() {
        [] => "<unset>".to_owned(),
        [first @ .., _] if all.len() > 3 => {
            format!("{} + {} more...", first[..3].join(","), all.len() - 3)
        }
        few => few.join(","),
    }
}

type Cell = fn(&Value) -> String;

fn or_none(value: String) -> String {
    if value.is_empty() { "<none>".to_owned() } else { value }
}

/// Statuses of the containers that run as long as their pod: the main ones, and init containers with
/// `restartPolicy: Always`; and how many of these there are to be.
pub(crate) fn lasting(pod: &Value) -> (Vec<&Value>, usize) {
    let list = |of: &str, name: &str| pod[of][name].as_array().map_or(&[][..], Vec::as_slice);
    let sidecars = list("spec", "initContainers").iter().filter(|container| container["restartPolicy"] == "Always");
    let sidecars: Vec<&Value> = sidecars.map(|container| &container["name"]).collect();
    let of_init = list("status", "initContainerStatuses").iter().filter(|status| sidecars.contains(&&status["name"]));
    let statuses = list("status", "containerStatuses").iter().chain(of_init).collect();
    (statuses, list("spec", "containers").len() + sidecars.len())
}

fn pod_ready(pod: &Value) -> String {
    let (statuses, all) = lasting(pod);
    format!("{}/{all}", statuses.iter().filter(|status| status["ready"] == true).count())
}

/// One word for where a pod is, as kubectl finds it.
pub(crate) fn pod_status(pod: &Value) -> String {
    if !pod["metadata"]["deletionTimestamp"].is_null() {
        return "Terminating".to_owned();
    }
    let statuses = |list: &str| pod["status"][list].as_array().map_or(&[][..], Vec::as_slice);
    let init = statuses("initContainerStatuses");
    let ended = |status: &Value| status["state"]["terminated"]["exitCode"].as_i64();
    let conditions = pod["status"]["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    let is_initialized = conditions.iter().any(|one| one["type"] == "Initialized" && one["status"] == "True");
    // A sidecar that ended after the main containers has kept nothing from starting.
    if !is_initialized
        && let Some(failed) = init.iter().find(|status| ended(status).is_some_and(|code| code != 0))
        && pod["status"]["phase"] == "Failed"
    {
        return format!("Init:{}", failed["state"]["terminated"]["reason"].as_str().unwrap_or("Error"));
    }
    let (lasting, _) = lasting(pod);
    let is_through = |status: &&Value| {
        let has_started = status["started"] == true && lasting.iter().any(|one| one["name"] == status["name"]);
        ended(status) == Some(0) || has_started
    };
    let done = init.iter().filter(is_through).count();
    if done < init.len() && pod["status"]["phase"] == "Pending" {
        let reason = init[done]["state"]["waiting"]["reason"].as_str().filter(|reason| *reason != "ContainerCreating");
        return reason.map_or_else(|| format!("Init:{done}/{}", init.len()), |reason| format!("Init:{reason}"));
    }
    let main = statuses("containerStatuses");
    let reason = |state: &str| main.iter().find_map(|status| status["state"][state]["reason"].as_str());
    let has_ended = main.iter().all(|status| status["state"].get("terminated").is_some());
    let reason = reason("waiting").or_else(|| if has_ended { reason("terminated") } else { None });
    reason.map_or_else(|| pod["status"]["phase"].as_str().unwrap_or("Pending").to_owned(), str::to_owned)
}

fn restarts(pod: &Value) -> String {
    let (statuses, _) = lasting(pod);
    statuses.iter().filter_map(|status| status["restartCount"].as_u64()).sum::<u64>().to_string()
}

fn ports(service: &Value) -> String {
    let render = |port: &Value| format!("{}/{}", text(&port["port"]), port["protocol"].as_str().unwrap_or("TCP"));
    service["spec"]["ports"].as_array().into_iter().flatten().map(render).collect::<Vec<_>>().join(",")
}

/// Columns of a kind: heading, cell, whether only `-o wide` shows it.
fn columns(kind: Kind) -> Vec<(&'static str, Cell, bool)> {
    match kind {
        Kind::Pod => vec![
            ("READY", pod_ready, false),
            ("STATUS", pod_status, false),
            ("RESTARTS", restarts, false),
            ("AGE", age, false),
            ("IP", |pod| or_none(text(&pod["status"]["podIP"])), true),
            ("NODE", |pod| or_none(text(&pod["spec"]["nodeName"])), true),
            ("NOMINATED NODE", |_| "<none>".to_owned(), true),
            ("READINESS GATES", |_| "<none>".to_owned(), true),
        ],
        Kind::Deployment => vec![
            (
                "READY",
                |it| {
                    format!(
                        "{}/{}",
                        it["status"]["readyReplicas"].as_u64().unwrap_or(0),
                        it["spec"]["replicas"].as_u64().unwrap_or(1)
                    )
                },
                false,
            ),
            ("UP-TO-DATE", |it| it["status"]["updatedReplicas"].as_u64().unwrap_or(0).to_string(), false),
            ("AVAILABLE", |it| it["status"]["availableReplicas"].as_u64().unwrap_or(0).to_string(), false),
            ("AGE", age, false),
            ("CONTAINERS", |it| template_containers(it, "name"), true),
            ("IMAGES", |it| template_containers(it, "image"), true),
            ("SELECTOR", |it| labels(&it["spec"]["selector"]["matchLabels"]), true),
        ],
        Kind::ReplicaSet => vec![
            ("DESIRED", |it| it["spec"]["replicas"].as_u64().unwrap_or(1).to_string(), false),
            ("CURRENT", |it| it["status"]["replicas"].as_u64().unwrap_or(0).to_string(), false),
            ("READY", |it| it["status"]["readyReplicas"].as_u64().unwrap_or(0).to_string(), false),
            ("AGE", age, false),
            ("CONTAINERS", |it| template_containers(it, "name"), true),
            ("IMAGES", |it| template_containers(it, "image"), true),
            ("SELECTOR", |it| labels(&it["spec"]["selector"]["matchLabels"]), true),
        ],
        Kind::EndpointSlice => vec![
            ("ADDRESSTYPE", |it| text(&it["addressType"]), false),
            (
                "PORTS",
                |it| {
                    let ports = it["ports"].as_array().into_iter().flatten().map(|port| text(&port["port"]));
                    let ports = ports.collect::<Vec<_>>().join(",");
                    if ports.is_empty() { "<unset>".to_owned() } else { ports }
                },
                false,
            ),
            ("ENDPOINTS", endpoints, false),
            ("AGE", age, false),
        ],
        Kind::ServiceAccount => {
            vec![("SECRETS", |it| it["secrets"].as_array().map_or(0, Vec::len).to_string(), false), ("AGE", age, false)]
        }
        Kind::Service => vec![
            ("TYPE", |it| it["spec"]["type"].as_str().unwrap_or("ClusterIP").to_owned(), false),
            ("CLUSTER-IP", |it| or_none(text(&it["spec"]["clusterIP"])), false),
            ("EXTERNAL-IP", |_| "<none>".to_owned(), false),
            ("PORT(S)", ports, false),
            ("AGE", age, false),
            ("SELECTOR", |it| labels(&it["spec"]["selector"]), true),
        ],
        Kind::Namespace => vec![("STATUS", |_| "Active".to_owned(), false), ("AGE", age, false)],
        Kind::ConfigMap => vec![
            ("DATA", |it| it["data"].as_object().map_or(0, serde_json::Map::len).to_string(), false),
            ("AGE", age, false),
        ],
        Kind::Secret => vec![
            ("TYPE", |it| it["type"].as_str().unwrap_or("Opaque").to_owned(), false),
            ("DATA", |it| it["data"].as_object().map_or(0, serde_json::Map::len).to_string(), false),
            ("AGE", age, false),
        ],
        Kind::VirtualService => vec![
            ("GATEWAYS", |it| listed(&it["spec"]["gateways"]), false),
            ("HOSTS", |it| listed(&it["spec"]["hosts"]), false),
            ("AGE", age, false),
        ],
        Kind::WorkloadEntry => vec![("AGE", age, false), ("ADDRESS", |it| text(&it["spec"]["address"]), false)],
        Kind::DestinationRule => vec![("HOST", |it| text(&it["spec"]["host"]), false), ("AGE", age, false)],
        Kind::ServiceEntry => vec![
            ("HOSTS", |it| listed(&it["spec"]["hosts"]), false),
            ("LOCATION", |it| text(&it["spec"]["location"]), false),
            ("RESOLUTION", |it| text(&it["spec"]["resolution"]), false),
            ("AGE", age, false),
        ],
        Kind::PeerAuthentication => vec![("MODE", |it| text(&it["spec"]["mtls"]["mode"]), false), ("AGE", age, false)],
        Kind::AuthorizationPolicy => vec![("ACTION", |it| text(&it["spec"]["action"]), false), ("AGE", age, false)],
        _ => vec![("AGE", age, false)],
    }
}

/// One kind's table; `with_kind`: there are others, so each name says its kind.
fn table(args: &GetArgs, kind: Kind, objects: &[&Value], with_kind: bool) {
    let with_namespace = args.all_namespaces && kind.is_namespaced();
    let is_shown = |(_, _, only_wide): &(_, _, bool)| args.output == Format::Wide || !only_wide;
    let columns: Vec<_> = columns(kind).into_iter().filter(is_shown).collect();
    let mut head: Vec<String> = if with_namespace { vec!["NAMESPACE".to_owned()] } else { Vec::new() };
    head.push("NAME".to_owned());
    head.extend(columns.iter().map(|(name, ..)| (*name).to_owned()));
    // As kubectl: what follows the last slash.
    head.extend(args.label_columns.iter().map(|key| key.rsplit('/').next().unwrap_or(key).to_uppercase()));
    if args.show_labels {
        head.push("LABELS".to_owned());
    }
    let rows: Vec<Vec<String>> = objects
        .iter()
        .map(|object| {
            let mut row = if with_namespace { vec![text(&object["metadata"]["namespace"])] } else { Vec::new() };
            let name = text(&object["metadata"]["name"]);
            row.push(if with_kind { format!("{}/{name}", super::resource(kind)) } else { name });
            row.extend(columns.iter().map(|(_, cell, _)| cell(object)));
            row.extend(args.label_columns.iter().map(|key| text(&object["metadata"]["labels"][key.as_str()])));
            if args.show_labels {
                row.push(labels(&object["metadata"]["labels"]));
            }
            row
        })
        .collect();
    output::table(&head.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed() {
        let check = |words: &[&str], expect: &[(Kind, Option<&str>)]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            assert_eq!(targets(&words).unwrap(), expect, "{words:?}");
        };
        check(&["po,svc"], &[(Kind::Pod, None), (Kind::Service, None)]);
        check(&["pods", "a", "b"], &[(Kind::Pod, Some("a")), (Kind::Pod, Some("b"))]);
        check(&["deploy/a", "svc/b"], &[(Kind::Deployment, Some("a")), (Kind::Service, Some("b"))]);
        check(&["all"], &ALL.map(|kind| (kind, None)));
        assert!(targets(&["deploy/a".to_owned(), "b".to_owned()]).is_err());
        assert!(targets(&["pods/".to_owned()]).unwrap_err().to_string().contains("KIND/NAME"));
        assert!(targets(&["gizmos".to_owned()]).unwrap_err().to_string().contains("gizmos"));
    }

    #[test]
    fn lists_as_kubectl_shows_them() {
        let route = json!({ "spec": { "gateways": ["a"], "hosts": ["*", "x.y"] } });
        let cells: Vec<String> =
            columns(Kind::VirtualService).iter().take(2).map(|(_, cell, _)| cell(&route)).collect();
        assert_eq!(cells, ["[\"a\"]", "[\"*\",\"x.y\"]"]);
        let slice = |count: u8| {
            let all: Vec<Value> = (0..count).map(|last| json!({ "addresses": [format!("10.0.0.{last}")] })).collect();
            endpoints(&json!({ "endpoints": all }))
        };
        assert_eq!(slice(0), "<unset>");
        assert_eq!(slice(3), "10.0.0.0,10.0.0.1,10.0.0.2");
        assert_eq!(slice(5), "10.0.0.0,10.0.0.1,10.0.0.2 + 2 more...");
    }

    #[test]
    fn a_pod_as_kubectl_shows_it() {
        let pod = json!({
            "spec": { "containers": [{}, {}] },
            "status": { "phase": "Running", "containerStatuses": [{ "ready": true, "restartCount": 1 }, { "ready": false, "restartCount": 2, "state": { "waiting": { "reason": "CrashLoopBackOff" } } }] },
        });
        assert_eq!(
            (pod_ready(&pod), pod_status(&pod), restarts(&pod)),
            ("1/2".into(), "CrashLoopBackOff".into(), "3".into())
        );
        let status = |status: Value| pod_status(&json!({ "status": status }));
        let ended =
            |code: u8, reason: &str| json!({ "state": { "terminated": { "exitCode": code, "reason": reason } } });
        let waits = json!({ "state": { "waiting": { "reason": "PodInitializing" } } });
        let running = json!({ "state": { "running": {} } });
        assert_eq!(status(json!({ "phase": "Succeeded", "containerStatuses": [ended(0, "Completed")] })), "Completed");
        assert_eq!(status(json!({ "phase": "Failed", "containerStatuses": [ended(1, "Error")] })), "Error");
        assert_eq!(status(json!({ "phase": "Running", "containerStatuses": [ended(1, "Error"), running] })), "Running");
        let sidecar = |initialized: &str| {
            json!({
                "phase": "Failed",
                "conditions": [{ "type": "Initialized", "status": initialized }],
                "initContainerStatuses": [ended(143, "Error")],
                "containerStatuses": [ended(1, "Error")],
            })
        };
        assert_eq!((status(sidecar("True")), status(sidecar("False"))), ("Error".into(), "Init:Error".into()));
        let init = json!([ended(0, "Completed"), running]);
        let main = json!([waits]);
        let starting = json!({ "phase": "Pending", "initContainerStatuses": init, "containerStatuses": main });
        assert_eq!(status(starting), "Init:1/2");
    }
}
