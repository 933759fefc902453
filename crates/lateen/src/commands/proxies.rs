//! `wait`, `proxy-status`, `version`.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use node::client::ClientError;
use serde_json::{Value, json};
use types::Finding;

use super::block_on;
use crate::cli::{ExitWith, Format, MeshArgs, exit};
use crate::output;

/// The control plane has so long to tell its version.
const REMOTE_MAX: Duration = Duration::from_secs(3);

/// Waits.
#[derive(Args, Debug)]
pub(crate) struct WaitArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// What for; only `synced`.
    #[arg(long = "for", value_name = "WHAT", default_value = "synced")]
    what: String,
    /// Seconds.
    #[arg(long, default_value = "60", value_parser = crate::cli::seconds)]
    timeout: u64,
}

/// Waits until every proxy runs the objects as they are now. `Err` with the laggards else.
pub(crate) async fn synced(mesh: &MeshArgs, seconds: u64) -> Result<()> {
    let objects = super::client(mesh)?;
    let status: Value = objects.get("/status").await?;
    let version = status["resourceVersion"].as_u64().unwrap_or(0);
    synced_at(mesh, version, seconds).await
}

/// Waits until every proxy runs the objects as they were at a version.
pub(crate) async fn synced_at(mesh: &MeshArgs, version: u64, seconds: u64) -> Result<()> {
    let plane = super::plane(mesh)?;
    let path = format!("/debug/synced?resourceVersion={version}&timeout={seconds}");
    // It keeps the time itself, unless it hangs.
    let Ok(answer) = tokio::time::timeout(Duration::from_secs(seconds + 1), plane.get::<Value>(&path)).await else {
        bail!("the control plane does not answer within {seconds} s");
    };
    match answer {
        Ok(_) => Ok(()),
        Err(ClientError::Refused { status: 504, body, .. }) => {
            let laggards = body["laggards"].as_array().into_iter().flatten().map(|laggard| {
                laggard.as_str().map_or_else(|| laggard["proxy"].as_str().unwrap_or("?").to_owned(), str::to_owned)
            });
            let laggards: Vec<String> = laggards.collect();
            match laggards.as_slice() {
                [] => bail!("the control plane has not read every object after {seconds} s"),
                some => bail!("not synced after {seconds} s; still behind: {}", some.join(", ")),
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// What the control plane finds wrong with the objects together, as it last read them. What an
/// object's own text tells is left out: it was said, with its place, when the text was read.
pub(crate) async fn mesh_findings(mesh: &MeshArgs) -> Result<Vec<Finding>> {
    use api::codes;
    const OF_TEXT: [&str; 6] =
        [codes::SYNTAX, codes::UNKNOWN_KIND, codes::NOT_EFFECTIVE, codes::UNKNOWN_FIELD, codes::SCHEMA, codes::DUBIOUS];
    let plane = super::plane(mesh)?;
    let answer: Value = plane.get("/debug/findings").await?;
    let mut findings: Vec<Finding> = serde_json::from_value(answer["findings"].clone())?;
    findings.retain(|finding| !OF_TEXT.contains(&&*finding.code));
    Ok(findings)
}

pub(crate) fn wait(args: &WaitArgs) -> Result<()> {
    if args.what != "synced" {
        return Err(ExitWith {
            code: exit::USAGE,
            message: format!("--for {:?}: only synced can be waited for", args.what),
        }
        .into());
    }
    block_on(synced(&args.mesh, args.timeout))?;
    output::line("every proxy runs what was applied");
    Ok(())
}

/// What proxies were sent.
#[derive(Args, Debug)]
pub(crate) struct ProxyStatusArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// `table`, `json`, `yaml`.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub(crate) fn proxy_status(args: &ProxyStatusArgs) -> Result<()> {
    let plane = super::plane(&args.mesh)?;
    let proxies: Value = block_on(async { Ok(plane.get("/debug/syncz").await?) })?;
    match args.output {
        Format::Json => output::json(&proxies),
        Format::Yaml => output::yaml(&proxies),
        Format::Table | Format::Wide | Format::Name => {
            let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            let rows: Vec<Vec<String>> = proxies
                .as_array()
                .into_iter()
                .flatten()
                .map(|proxy| {
                    let types: Vec<&str> = proxy["resources"]
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(url, _)| types::wellknown::type_urls::short(url))
                        .collect();
                    vec![
                        text(&proxy["proxy"]),
                        text(&proxy["cluster_id"]),
                        "istiod".to_owned(),
                        text(&proxy["istio_version"]),
                        format!("{} ({})", types.len(), types.join(",")),
                    ]
                })
                .collect();
            output::table(&["NAME", "CLUSTER", "ISTIOD", "VERSION", "SUBSCRIBED TYPES"], &rows);
        }
    }
    Ok(())
}

/// Versions.
#[derive(Args, Debug)]
pub(crate) struct VersionArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// Ask the running mesh too.
    #[arg(long, default_value = "true", action = clap::ArgAction::Set)]
    remote: bool,
    /// `table`, `json`, `yaml`.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub(crate) fn version(args: &VersionArgs) -> Result<()> {
    let mut answer = json!({ "clientVersion": env!("CARGO_PKG_VERSION") });
    if args.remote {
        let plane = super::plane(&args.mesh)?;
        let ask = async { Ok((plane.get("/version").await?, plane.get("/debug/syncz").await?)) };
        // Whoever asks for versions may do so because something hangs.
        let asked: Result<(Value, Value)> = block_on(async { tokio::time::timeout(REMOTE_MAX, ask).await? });
        if let Ok((version, proxies)) = asked {
            answer["controlPlaneVersion"] = version["version"].clone();
            let row = |proxy: &Value| json!({ "ID": proxy["proxy"], "IstioVersion": proxy["istio_version"] });
            answer["dataPlaneVersion"] = proxies.as_array().into_iter().flatten().map(row).collect();
        }
    }
    match args.output {
        Format::Json => output::json(&answer),
        Format::Yaml => output::yaml(&answer),
        Format::Table | Format::Wide | Format::Name => {
            output::line(&format!("client version: {}", env!("CARGO_PKG_VERSION")));
            if let Some(version) = answer["controlPlaneVersion"].as_str() {
                output::line(&format!("control plane version: {version}"));
                output::line(&format!("data plane version: {}", of_proxies(&answer["dataPlaneVersion"])));
            }
        }
    }
    Ok(())
}

/// `VERSION (n proxies)` of each version that proxies run, as istioctl says it.
fn of_proxies(proxies: &Value) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for proxy in proxies.as_array().into_iter().flatten() {
        let version = proxy["IstioVersion"].as_str().filter(|version| !version.is_empty()).unwrap_or("unknown");
        *counts.entry(version).or_default() += 1;
    }
    if counts.is_empty() {
        return "none".to_owned();
    }
    counts.iter().map(|(version, count)| format!("{version} ({count} proxies)")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_plane_has_the_versions_of_its_proxies() {
        let of = |versions: &[&str]| {
            of_proxies(&versions.iter().map(|version| json!({ "ID": "a.b", "IstioVersion": version })).collect())
        };
        assert_eq!(of(&[]), "none");
        assert_eq!(
            of(&["1.31.0", "1.30.1", "1.31.0", ""]),
            "1.30.1 (1 proxies), 1.31.0 (2 proxies), unknown (1 proxies)"
        );
    }
}
