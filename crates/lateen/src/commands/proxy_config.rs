//! `proxy-config`: what a proxy runs, in istioctl's columns.

mod columns;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use node::client::{Client, uri};
use serde_json::Value;
use types::wellknown::ports;

use super::pods::find_pod;
use super::{block_on, client};
use crate::cli::{ExitWith, Format, MeshArgs, exit};
use crate::output;
use columns::{Filter, Table};

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Clusters.
    #[value(alias = "clusters", alias = "c")]
    Cluster,
    /// Listeners and their filter chains.
    #[value(alias = "listeners", alias = "l")]
    Listener,
    /// Route tables.
    #[value(alias = "routes", alias = "r")]
    Route,
    /// Endpoints with their health.
    #[value(alias = "endpoints", alias = "ep")]
    Endpoint,
    /// Certificates.
    #[value(alias = "secrets", alias = "s")]
    Secret,
    /// All of these.
    All,
}

const SECTIONS: [Section; 5] =
    [Section::Cluster, Section::Listener, Section::Route, Section::Endpoint, Section::Secret];

/// Shows what a proxy runs.
#[derive(Args, Debug)]
pub(crate) struct ProxyConfigArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// Which part.
    section: Section,
    /// `POD[.NAMESPACE]` or `deploy/NAME[.NAMESPACE]`.
    pod: Option<String>,
    /// Namespace of the pod.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// A saved `/config_dump?include_eds` in place of a running proxy; `-` for standard input.
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Port of the proxy's admin interface.
    #[arg(long, default_value_t = ports::PROXY_ADMIN)]
    proxy_admin_port: u16,
    /// Only clusters of this host.
    #[arg(long)]
    fqdn: Option<String>,
    /// Only this port.
    #[arg(long)]
    port: Option<u16>,
    /// Only clusters of this subset.
    #[arg(long)]
    subset: Option<String>,
    /// Only clusters of this direction: `inbound` or `outbound`.
    #[arg(long)]
    direction: Option<String>,
    /// Only listeners or endpoints at this address.
    #[arg(long)]
    address: Option<String>,
    /// Only endpoints of this cluster.
    #[arg(long)]
    cluster: Option<String>,
    /// Only endpoints of this health: `healthy`, `unhealthy`, `degraded`.
    #[arg(long)]
    status: Option<String>,
    /// Only the route table of this name (`--name` is the mesh's).
    #[arg(long, value_name = "NAME")]
    table: Option<String>,
    /// `json` or `yaml` for the messages themselves.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

pub(crate) fn proxy_config(args: &ProxyConfigArgs) -> Result<()> {
    let (dump, health) = read(args)?;
    let filter = Filter {
        fqdn: args.fqdn.clone(),
        port: args.port,
        subset: args.subset.clone(),
        direction: args.direction.clone(),
        address: args.address.clone(),
        cluster: args.cluster.clone(),
        status: args.status.clone(),
        table: args.table.clone(),
    };
    let sections = if args.section == Section::All { &SECTIONS[..] } else { std::slice::from_ref(&args.section) };
    if matches!(args.output, Format::Json | Format::Yaml) {
        let value =
            if args.section == Section::All { dump } else { messages(args.section, &dump, health.as_ref(), &filter) };
        if args.output == Format::Json {
            output::json(&value);
        } else {
            output::yaml(&value);
        }
        return Ok(());
    }
    for (at, section) in sections.iter().enumerate() {
        if at > 0 {
            output::line("");
        }
        let Table { head, rows } = table(*section, &dump, health.as_ref(), &filter);
        output::table(&head, &rows);
    }
    Ok(())
}

fn table(section: Section, dump: &Value, health: Option<&Value>, filter: &Filter) -> Table {
    match section {
        Section::Cluster => columns::clusters(dump, filter),
        Section::Listener => columns::listeners(dump, filter),
        Section::Route => columns::routes(dump, filter),
        Section::Endpoint | Section::All => columns::endpoints(dump, health, filter),
        Section::Secret => columns::secrets(dump, std::time::SystemTime::now()),
    }
}

fn messages(section: Section, dump: &Value, health: Option<&Value>, filter: &Filter) -> Value {
    match (section, health) {
        (Section::Cluster, _) => columns::resources(dump, "cluster", filter),
        (Section::Listener, _) => columns::resources(dump, "listener", filter),
        (Section::Route, _) => columns::resources(dump, "route_config", filter),
        (Section::Endpoint | Section::All, Some(health)) => columns::statuses(health, filter),
        (Section::Endpoint | Section::All, None) => columns::assignments(dump, filter),
        (Section::Secret, _) => columns::resources(dump, "secret", filter),
    }
}

/// The dump, and `/clusters` where a proxy runs.
fn read(args: &ProxyConfigArgs) -> Result<(Value, Option<Value>)> {
    if let Some(file) = &args.file {
        let text = if file.as_os_str() == "-" {
            super::read_stdin()?
        } else {
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?
        };
        let dump: Value = serde_json::from_str(&text)
            .map_err(|error| ExitWith { code: exit::DATA, message: format!("{}: {error}", file.display()) })?;
        if !dump["configs"].is_array() {
            let message = format!("{}: no `configs` in it; save what /config_dump?include_eds says", file.display());
            return Err(ExitWith { code: exit::DATA, message }.into());
        }
        return Ok((dump, None));
    }
    let Some(pod) = &args.pod else {
        let message = "which proxy? give POD[.NAMESPACE], deploy/NAME, or -f FILE".to_owned();
        return Err(ExitWith { code: exit::USAGE, message }.into());
    };
    let client = client(&args.mesh)?;
    let target = block_on(async {
        let found = match find_pod(&client, &args.namespace, pod).await {
            Ok(found) => found,
            Err(error) => match pod.rsplit_once('.') {
                Some((name, namespace)) => find_pod(&client, namespace, name).await?,
                None => return Err(error),
            },
        };
        let text = |key: &str| found["metadata"][key].as_str().unwrap_or_default().to_owned();
        proxy_of(&client, &text("namespace"), &text("name")).await
    })?;
    let ask = |path: &str| ask(&target, path, args.proxy_admin_port);
    Ok((ask("/config_dump?include_eds")?, Some(ask("/clusters?format=json")?)))
}

/// How to get into the proxy of a pod.
pub(super) async fn proxy_of(client: &Client, namespace: &str, name: &str) -> Result<node::ExecTarget> {
    let target = client.get::<node::ExecTarget>(&uri(&["exec", namespace, name, "istio-proxy"], &[])).await;
    target.with_context(|| format!("the proxy of pod {namespace}/{name}"))
}

/// Asks the admin interface of a proxy, from inside of its pod.
pub(super) fn ask(target: &node::ExecTarget, path: &str, port: u16) -> Result<Value> {
    let words = ["/proc/self/exe", "admin-get", path, &port.to_string()].map(Into::into);
    let done = node::exec::command(target, &words)?.output().context("cannot enter the pod")?;
    if !done.status.success() {
        bail!("the proxy's admin interface: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    serde_json::from_slice(&done.stdout).with_context(|| format!("{path} of the proxy's admin interface is not JSON"))
}

/// Prints what the admin interface of this machine's or pod's proxy says.
#[derive(Args, Debug)]
pub(crate) struct AdminGetArgs {
    /// Path and query.
    path: String,
    /// Port on loopback.
    #[arg(default_value_t = ports::PROXY_ADMIN)]
    port: u16,
}

/// The longest answer: a dump of ten thousand clusters fits.
const ANSWER_BYTES_MAX: u64 = 512 << 20;

pub(crate) fn admin_get(args: &AdminGetArgs) -> Result<()> {
    if !args.path.starts_with('/') || args.path.contains(|c: char| c.is_whitespace() || c.is_control()) {
        bail!("{:?} is not a path", args.path);
    }
    let at = (Ipv4Addr::LOCALHOST, args.port);
    let mut stream = TcpStream::connect(at).with_context(|| format!("nothing listens on 127.0.0.1:{}", args.port))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    // An Envoy takes nothing older.
    write!(stream, "GET {} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", args.path)?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).context("the answer breaks off")?;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").context("the answer is not HTTP")?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let status = head.split(' ').nth(1).unwrap_or_default();
    let mut body = answer.split_off(end + 4);
    let is_chunked = head.to_ascii_lowercase().contains("\r\ntransfer-encoding: chunked");
    if is_chunked {
        body = unchunked(&body).context("the answer breaks off")?;
    }
    if status != "200" {
        bail!("{} answers {status}: {}", args.path, String::from_utf8_lossy(&body).trim());
    }
    output::raw(&body);
    Ok(())
}

/// The pieces of a chunked body together; `None` when it is cut off, or is none.
fn unchunked(mut body: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(body.len());
    loop {
        let end = body.windows(2).position(|two| two == b"\r\n")?;
        let size = std::str::from_utf8(&body[..end]).ok()?.split(';').next()?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        body = &body[end + 2..];
        if size == 0 {
            return Some(out);
        }
        out.extend_from_slice(body.get(..size)?);
        body = body.get(size..)?.strip_prefix(b"\r\n")?;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn chunks_are_put_together_or_refused() {
        let whole = |text: &str| super::unchunked(text.as_bytes()).map(|body| String::from_utf8(body).unwrap());
        assert_eq!(whole("3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n").as_deref(), Some("abc0123456789"));
        assert_eq!(whole("0\r\n\r\n").as_deref(), Some(""));
        for bad in ["", "3", "3\r\nab", "3\r\nabc", "3\r\nabcd\r\n0\r\n", "x\r\n", "ffffffffffffffff\r\na"] {
            assert_eq!(whole(bad), None, "{bad:?}");
        }
    }
}
