//! `explain`: where a call would go, and why.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use api::{ConfigSet, Positions};
use clap::Args;
use engine::Now;
use explain::{Call, Caller, Running};
use mesh::MeshSnapshot;
use node::client::Client;
use serde::Deserialize;
use serde_json::Value;
use types::wellknown::ports;
use types::{NamespacedName, ObjectRef, Severity};

use super::manifests::read_inputs;
use super::proxy_config::{ask, proxy_of};
use super::{block_on, client};
use crate::cli::{ExitWith, Format, MeshArgs, exit};
use crate::output;

/// Says where a call would go, proxy by proxy, and which objects make it so.
#[derive(Args, Debug)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// Manifests to explain without a mesh: file, folder, or `-`. Else the running mesh, proxy by proxy.
    #[arg(short = 'f', long = "filename", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Who calls: `deploy/NAME`, POD, or `gateway` for a client outside.
    #[arg(long, value_name = "WHO")]
    from: String,
    /// Namespace of the caller.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// `name: value`; may be repeated.
    #[arg(short = 'H', long = "header", value_name = "HEADER")]
    headers: Vec<String>,
    /// Host that the request names, where it is not the URL's.
    #[arg(long)]
    host: Option<String>,
    /// Address of a client outside.
    #[arg(long, value_name = "ADDRESS")]
    client_ip: Option<IpAddr>,
    /// The caller speaks HTTP/2 (with prior knowledge).
    #[arg(long)]
    http2: bool,
    /// `json` for programs.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// `[METHOD] URL`; `tcp://HOST:PORT` for bytes.
    #[arg(required = true, num_args = 1..=2, value_names = ["METHOD", "URL"])]
    call: Vec<String>,
}

/// The objects to look at, and where they were written.
struct Objects {
    configs: ConfigSet,
    positions: Vec<(ObjectRef, Positions)>,
}

pub(crate) fn explain(args: &ExplainArgs) -> Result<()> {
    let (method, url) = match args.call.as_slice() {
        [word] if !word.is_empty() && word.bytes().all(|b| b.is_ascii_uppercase()) => {
            return Err(ExitWith { code: exit::USAGE, message: format!("{word} what? give {word} URL") }.into());
        }
        [url] => ("GET", url),
        [method, url] => (method.as_str(), url),
        _ => bail!("give [METHOD] URL"),
    };
    let is_offline = !args.files.is_empty();
    let objects = if is_offline { from_files(&args.files)? } else { from_mesh(&args.mesh)? };
    let assumed = if is_offline {
        explain::assume(&objects.configs)
    } else {
        explain::Assumed { configs: objects.configs.clone(), notes: Vec::new() }
    };
    let (snapshot, _) = MeshSnapshot::next(None, &assumed.configs);
    let usage = |error: explain::InvalidCall| ExitWith { code: exit::USAGE, message: error.to_string() };
    let from = Caller::find(&snapshot, &args.namespace, &args.from).map_err(usage)?;
    let mut headers = args.headers.clone();
    headers.extend(args.host.as_ref().map(|host| format!("host: {host}")));
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = Now { mono: Instant::now(), wall_nanos: u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX) };
    let mut call = Call::parse(from, method, url, &headers, now).map_err(usage)?;
    call.is_http2 = args.http2;
    call.client = args.client_ip;

    let mut explanation = if is_offline {
        explain::explain(&snapshot, &call)
    } else {
        let client = client(&args.mesh)?;
        if matches!(call.from, Caller::Outside(_)) {
            inside_port(&mut call, &block_on(async { Ok(client.get("/status").await?) })?);
        }
        let ask = |pod: &NamespacedName| running(&client, pod).map_err(|error| format!("{error:#}"));
        explain::explain_running(&snapshot, &call, &ask)
    };
    explanation.notes.splice(0..0, assumed.notes);
    explanation.locate(&|object, field| {
        let (_, positions) = objects.positions.iter().find(|(known, _)| known == object)?;
        Some(positions.at(field))
    });
    match args.output {
        Format::Json => output::json(&serde_json::to_value(&explanation)?),
        Format::Yaml => output::yaml(&serde_json::to_value(&explanation)?),
        Format::Table | Format::Wide | Format::Name => output::line(explanation.to_string().trim_end()),
    }
    Ok(())
}

/// A call to an address of this machine is one to the gateway's port behind it; its host stays as it
/// was written.
fn inside_port(call: &mut Call, status: &Value) {
    for (name, port) in [("ingress-http", 8080), ("ingress-https", 8443)] {
        let Some(address) = status["addresses"][name].as_str().and_then(|text| text.parse::<SocketAddr>().ok()) else {
            continue;
        };
        if call.target.port == address.port() && is_here(&call.target.host) {
            if !call.headers.iter().any(|(name, _)| name == "host") {
                call.headers.push(("host".to_owned(), call.target.authority()));
            }
            call.target.port = port;
            return;
        }
    }
}

/// Whether a name stands for this machine.
fn is_here(host: &str) -> bool {
    host == "localhost" || host.ends_with(".localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The proxy of a pod, asked through its admin interface.
fn running(client: &Client, pod: &NamespacedName) -> Result<Running> {
    let target = block_on(proxy_of(client, &pod.namespace, &pod.name))?;
    let ask = |path: &str| ask(&target, path, ports::PROXY_ADMIN);
    let dump = ask("/config_dump?include_eds")?;
    Ok(Running::read(&dump, &ask("/clusters?format=json")?, &ask("/lateen/state")?)?)
}

fn from_files(files: &[PathBuf]) -> Result<Objects> {
    let mut objects = Vec::new();
    let mut positions = Vec::new();
    for (name, text) in read_inputs(files)? {
        let documents = api::parse_documents(&name, &text);
        // What is refused is not there, as in a mesh; the rest is explained.
        let grave: Vec<_> =
            documents.findings.into_iter().filter(|finding| finding.severity == Severity::Error).collect();
        output::findings(&grave);
        for parsed in documents.objects {
            positions.push((parsed.object.reference(), parsed.positions));
            objects.push(parsed.object);
        }
    }
    // Of two namesakes the later one holds.
    positions.reverse();
    Ok(Objects { configs: ConfigSet::new(objects), positions })
}

fn from_mesh(mesh: &MeshArgs) -> Result<Objects> {
    let client = client(mesh)?;
    let (lists, files): (Vec<Value>, Files) = block_on(async {
        let mut lists = Vec::new();
        let matters = |info: &&api::kind::KindInfo| {
            matches!(info.support, api::kind::Support::Effective) || info.kind == api::Kind::Telemetry
        };
        for info in api::kind::KINDS.iter().filter(matters) {
            lists.push(client.get::<Value>(&format!("/objects/{}", info.name)).await?);
        }
        Ok((lists, client.get("/files").await?))
    })?;
    let items = lists.iter().flat_map(|list| list["items"].as_array().into_iter().flatten());
    let objects = items.filter_map(|item| api::from_json(item).0);
    Ok(Objects { configs: ConfigSet::new(objects), positions: positions(files) })
}

/// Objects that follow a file.
#[derive(Deserialize)]
struct Files {
    objects: Vec<FromFile>,
}

#[derive(Deserialize)]
struct FromFile {
    object: ObjectRef,
    file: String,
}

/// Where objects stand in the files they follow. A file that cannot be read has no positions.
fn positions(files: Files) -> Vec<(ObjectRef, Positions)> {
    let mut by_file: BTreeMap<String, Vec<ObjectRef>> = BTreeMap::new();
    for FromFile { object, file } in files.objects {
        by_file.entry(file).or_default().push(object);
    }
    let mut found = Vec::new();
    for (file, objects) in by_file {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        let parsed = api::parse_documents(&file, &text).objects.into_iter();
        let known = parsed.map(|parsed| (parsed.object.reference(), parsed.positions));
        found.extend(known.filter(|(object, _)| objects.contains(object)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_machine_are_ports_of_the_gateway() {
        let status = serde_json::json!({ "addresses": { "ingress-http": "127.0.0.1:36471", "ingress-https": null } });
        let now = Now { mono: Instant::now(), wall_nanos: 0 };
        let check = |url: &str, headers: &[String], port: u16, host: Option<&str>| {
            let from = Caller::Outside(NamespacedName::new("istio-system", "gateway"));
            let mut call = Call::parse(from, "GET", url, headers, now).unwrap();
            inside_port(&mut call, &status);
            let said = call.headers.iter().find(|(name, _)| name == "host").map(|(_, host)| host.as_str());
            assert_eq!((call.target.port, said), (port, host), "{url}");
        };
        check("http://127.0.0.1:36471/x", &[], 8080, Some("127.0.0.1:36471"));
        check("http://shop.localhost:36471/x", &[], 8080, Some("shop.localhost:36471"));
        check("http://127.0.0.1:36471/x", &["Host: shop.test".to_owned()], 8080, Some("shop.test"));
        check("http://shop.test:36471/x", &[], 36471, None);
        check("http://127.0.0.1:8080/x", &[], 8080, None);
    }
}
