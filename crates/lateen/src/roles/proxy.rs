//! `lateen proxy`: the data plane and its agent.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueEnum};
use proxy::{Options, Role};
use types::wellknown::env;

use crate::log::{self, Levels};
use crate::{memory, output};

/// Which role a proxy plays.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ProxyRole {
    /// Beside an application.
    Sidecar,
    /// A gateway.
    Router,
}

/// Options of a proxy. Everything else comes from the environment, as Istio's injection sets it.
#[derive(Args, Debug)]
pub(crate) struct ProxyArgs {
    /// `sidecar` or `router`; not with `--config-path`.
    #[arg(required_unless_present_any = ["config_path", "config_yaml", "hot_restart_version"], conflicts_with_all = ["config_path", "config_yaml"])]
    role: Option<ProxyRole>,
    /// Runs an Envoy v3 bootstrap, YAML or JSON.
    #[arg(short = 'c', long = "config-path", value_name = "FILE")]
    config_path: Option<PathBuf>,
    /// The bootstrap itself; beside a file, what is merged into it.
    #[arg(long = "config-yaml", value_name = "YAML")]
    config_yaml: Option<String>,
    /// `serve`, or `validate`: check the bootstrap and end.
    #[arg(long, value_enum, default_value_t = Mode::Serve)]
    mode: Mode,
    /// Node id of a bootstrap.
    #[arg(long = "service-node")]
    service_node: Option<String>,
    /// Node cluster of a bootstrap.
    #[arg(long = "service-cluster")]
    service_cluster: Option<String>,
    /// Zone of a bootstrap's node.
    #[arg(long = "service-zone")]
    service_zone: Option<String>,
    /// Gradual drains, in seconds.
    #[arg(long = "drain-time-s")]
    drain_time_s: Option<u64>,
    /// A file that is told where the admin interface listens.
    #[arg(long = "admin-address-path", value_name = "FILE")]
    admin_address_path: Option<PathBuf>,
    /// A label of every metric, `name:value`.
    #[arg(long = "stats-tag", value_name = "TAG", value_parser = stats_tag)]
    stats_tags: Vec<(String, String)>,
    /// How often access logs are written, in milliseconds.
    #[arg(long = "file-flush-interval-msec")]
    file_flush_interval_msec: Option<u64>,
    /// Level of the proxy's own log: trace, debug, info, warning, error, critical, off.
    #[arg(short = 'l', long = "log-level", value_name = "LEVEL", value_parser = log_level)]
    log_level: Option<String>,
    /// Levels of its parts, `name:level,…`.
    #[arg(long = "component-log-level", value_name = "LEVELS")]
    component_log_level: Option<String>,
    /// A file for the proxy's own log.
    #[arg(long = "log-path", value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// A file that is told the base id, which means nothing else here.
    #[arg(long = "base-id-path", value_name = "FILE", hide = true)]
    base_id_path: Option<PathBuf>,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "base-id", default_value_t = 0, hide = true)]
    base_id: u32,
    /// Accepted for compatibility with Envoy: one address of the machine is as good as the other.
    #[arg(long = "local-address-ip-version", value_parser = ["v4", "v6"], hide = true)]
    local_address_ip_version: Option<String>,
    /// Accepted for compatibility with Envoy: clients are told at once.
    #[arg(long = "drain-strategy", value_parser = ["gradual", "immediate"], hide = true)]
    drain_strategy: Option<String>,
    /// Says that there is no hot restart.
    #[arg(long = "hot-restart-version", hide = true)]
    hot_restart_version: bool,
    /// Addresses of the proxy's own services, `name=address`: admin, readiness, metrics, merged, dns;
    /// `name=off` switches one off.
    #[arg(long = "address", value_name = "NAME=ADDRESS")]
    addresses: Vec<String>,
    /// Workers.
    #[arg(long)]
    concurrency: Option<usize>,
    /// DNS domain, as Istio's injection passes it.
    #[arg(long)]
    domain: Option<String>,
    /// Level, and levels of parts, as Istio's injection passes them: `warning,misc:error`.
    #[arg(long = "proxyLogLevel", hide = true)]
    proxy_log_level: Option<String>,
    /// Levels of parts, as Istio's injection passes them.
    #[arg(long = "proxyComponentLogLevel", hide = true)]
    proxy_component_log_level: Option<String>,
    #[command(flatten)]
    without_meaning: WithoutMeaning,
    /// Envoy passes over what follows `--`.
    #[arg(last = true, hide = true)]
    ignored: Vec<String>,
}

/// What is done with a bootstrap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Mode {
    /// Runs it.
    Serve,
    /// Checks it.
    Validate,
}

/// Flags of Envoy and of Istio's agent that concern what is not here: hot restarts, core dumps, extensions that
/// are compiled in, tokens of others. They are taken, so that a command line need not be changed.
#[derive(Debug)]
struct WithoutMeaning;

impl WithoutMeaning {
    /// Flags that stand alone, or with `=true`.
    const SWITCHES: [&'static str; 21] = [
        // Envoy's
        "enable-core-dump",
        "cpuset-threads",
        "enable-mutex-tracing",
        "disable-hot-restart",
        "enable-fine-grain-logging",
        "log-format-escaped",
        "log-stacktrace-single-entry",
        "skip-deprecated-logs",
        "ignore-unknown-dynamic-fields",
        "reject-unknown-dynamic-fields",
        "allow-unknown-static-fields",
        "allow-unknown-fields",
        "skip-hot-restart-parent-stats",
        "skip-hot-restart-on-no-parent",
        "use-dynamic-base-id",
        "ignore_rest",
        // Istio's
        "log_as_json",
        "profiling",
        "disableInternalTelemetry",
        "controlPlaneBootstrap",
        "keepaliveWithoutStream",
    ];

    /// Flags with a value.
    const VALUES: [&'static str; 24] = [
        // Envoy's
        "log-format",
        "socket-mode",
        "socket-path",
        "disable-extensions",
        "parent-shutdown-time-s",
        "file-flush-min-size-kb",
        "restart-epoch",
        // Istio's
        "log_output_level",
        "log_caller",
        "log_stacktrace_level",
        "log_target",
        "log_rotate",
        "log_rotate_max_age",
        "log_rotate_max_backups",
        "log_rotate_max_size",
        "vklog",
        "meshConfig",
        "stsPort",
        "tokenManagerPlugin",
        "serviceCluster",
        "templateFile",
        "outlierLogPath",
        "keepaliveInterval",
        "keepaliveTimeout",
    ];
}

impl Args for WithoutMeaning {
    fn augment_args(command: Command) -> Command {
        let switch = |name: &'static str| {
            Arg::new(name).long(name).hide(true).action(ArgAction::Append).num_args(0..=1).require_equals(true)
        };
        let value = |name: &'static str| Arg::new(name).long(name).hide(true).action(ArgAction::Append);
        command.args(Self::SWITCHES.map(switch)).args(Self::VALUES.map(value))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for WithoutMeaning {
    fn from_arg_matches(_: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self)
    }

    fn update_from_arg_matches(&mut self, _: &ArgMatches) -> Result<(), clap::Error> {
        Ok(())
    }
}

/// *Source*: Envoy's `--stats-tag`: names of letters and digits, values without a dot.
fn stats_tag(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("a tag is `name:value`")?;
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(format!("{name:?} is not a name of letters and digits"));
    }
    if value.is_empty() || value.contains('.') {
        return Err(format!("{value:?} is not a value without dots"));
    }
    Ok((name.to_owned(), value.to_owned()))
}

fn log_level(text: &str) -> Result<String, String> {
    log::word(text).map(|_| text.to_owned()).ok_or_else(|| format!("{text:?} is not a level"))
}

impl ProxyArgs {
    /// Starts the log as it was asked for.
    pub(crate) fn start_log(&self) -> Result<Arc<Levels>> {
        // Istio's way to say it: a level, and parts with theirs.
        let (parts, levels): (Vec<_>, Vec<_>) = self
            .proxy_log_level
            .iter()
            .flat_map(|text| text.split(','))
            .filter(|part| !part.is_empty())
            .partition(|part| part.contains(':'));
        let level = self.log_level.as_deref().or(levels.last().copied()).unwrap_or("warn");
        let named = [&self.component_log_level, &self.proxy_component_log_level];
        let named = named.into_iter().flatten().flat_map(|text| text.split(',')).filter(|part| !part.is_empty());
        let mut components = Vec::new();
        for part in parts.into_iter().chain(named) {
            let (name, level) = part.split_once(':').with_context(|| format!("{part:?} is not NAME:LEVEL"))?;
            components.push((name, level));
        }
        log::start_with(&log::Settings { level, components, file: self.log_path.as_deref() })
    }
}

/// Takes over an inherited descriptor.
#[expect(unsafe_code, reason = "descriptors are inherited by number: the node passes them so")]
fn adopt(number: &str) -> Result<OwnedFd> {
    let number: i32 = number.trim().parse().with_context(|| format!("{number:?} is not a descriptor"))?;
    if number <= 2 {
        bail!("descriptor {number} cannot be inherited");
    }
    // SAFETY: whoever set the variable opened the descriptor for us and nobody else uses the number;
    // this runs once, before anything else is opened by number.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
        .with_context(|| format!("descriptor {number} is not open"))?;
    Ok(fd)
}

/// Runs a proxy until it has drained.
pub(crate) fn run(args: ProxyArgs, levels: Arc<Levels>) -> Result<()> {
    if args.hot_restart_version {
        output::line("disabled");
        return Ok(());
    }
    if let Some(path) = &args.base_id_path {
        std::fs::write(path, args.base_id.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.config_path.is_some() || args.config_yaml.is_some() {
        return run_bootstrap(args, levels);
    }
    if args.mode == Mode::Validate {
        bail!("--mode validate needs a bootstrap to look at: --config-path or --config-yaml");
    }
    let mut variables: BTreeMap<String, String> = std::env::vars().collect();
    if let Some(concurrency) = args.concurrency {
        variables.insert("ISTIO_META_CONCURRENCY".into(), concurrency.to_string());
    }
    let role = match args.role {
        Some(ProxyRole::Router) => Role::Router,
        Some(ProxyRole::Sidecar) | None => Role::Sidecar,
    };
    let mut options = Options::from_environment(role, &variables, |path| std::fs::read_to_string(path).ok())?;
    options.log_levels = Some(levels);
    options.trim = Some(memory::trim);
    for setting in &args.addresses {
        let (name, address) =
            setting.split_once('=').with_context(|| format!("--address {setting:?} is not NAME=ADDRESS"))?;
        let address = match address {
            "off" => None,
            other => Some(other.parse().with_context(|| format!("--address {setting:?}: not an address"))?),
        };
        let addresses = &mut options.addresses;
        let slot = match name {
            "admin" => &mut addresses.admin,
            "readiness" => &mut addresses.readiness,
            "metrics" => &mut addresses.metrics,
            "merged" => &mut addresses.merged,
            "dns" => &mut addresses.dns,
            _ => bail!("--address {setting:?}: unknown name"),
        };
        *slot = address;
    }
    if let Some(list) = variables.get(env::LISTEN_FDS) {
        for pair in list.split(',').filter(|pair| !pair.is_empty()) {
            let (port, number) = pair.split_once('=').with_context(|| format!("{}: {list:?}", env::LISTEN_FDS))?;
            options.inherited.push((port.parse()?, adopt(number)?));
        }
    }
    if let Some(number) = variables.get(env::HOST_SOCKETS) {
        options.host_sockets = Some((adopt(number)?, variables.get(env::MESH_RANGES).cloned().unwrap_or_default()));
    }
    match options.binary.take() {
        Some(program) => proxy::agent::run(options, &program)?,
        None => proxy::run(options)?,
    }
    Ok(())
}

/// Runs an Envoy bootstrap, or checks it.
fn run_bootstrap(args: ProxyArgs, levels: Arc<Levels>) -> Result<()> {
    let (name, text, merged) = match (args.config_path, args.config_yaml) {
        (Some(path), merged) => {
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            (path.display().to_string(), text, merged)
        }
        (None, text) => ("--config-yaml".to_owned(), text.unwrap_or_default(), None),
    };
    let flags = proxy::bootstrap::Flags {
        merged,
        // As Envoy has it: no worker is one.
        concurrency: args.concurrency.map(|workers| workers.max(1)),
        service_node: args.service_node,
        service_cluster: args.service_cluster,
        service_zone: args.service_zone,
        drain_seconds: args.drain_time_s,
        admin_address_path: args.admin_address_path,
        stats_tags: args.stats_tags,
        log_flush_interval: args.file_flush_interval_msec.map(Duration::from_millis),
    };
    let mut options = proxy::bootstrap::options(&text, &flags).with_context(|| format!("bootstrap {name}"))?;
    if args.mode == Mode::Validate {
        proxy::check(&options)?;
        output::line(&format!("configuration '{name}' OK"));
        return Ok(());
    }
    options.log_levels = Some(levels);
    options.trim = Some(memory::trim);
    // reading the bootstrap took most of the memory this thread will ever need
    memory::trim();
    proxy::run(options)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser, Debug)]
    struct Line {
        #[command(flatten)]
        proxy: ProxyArgs,
    }

    fn parse(words: &[&str]) -> Result<ProxyArgs, String> {
        let line = Line::try_parse_from(std::iter::once("proxy").chain(words.iter().copied()));
        line.map(|line| line.proxy).map_err(|error| error.to_string())
    }

    /// Envoy 1.40's whole command line, by its `--help`.
    #[test]
    fn every_flag_of_envoy_is_taken() {
        for switch in [
            "--enable-core-dump",
            "--cpuset-threads",
            "--enable-mutex-tracing",
            "--disable-hot-restart",
            "--hot-restart-version",
            "--enable-fine-grain-logging",
            "--log-format-escaped",
            "--log-stacktrace-single-entry",
            "--skip-deprecated-logs",
            "--ignore-unknown-dynamic-fields",
            "--reject-unknown-dynamic-fields",
            "--allow-unknown-static-fields",
            "--allow-unknown-fields",
            "--skip-hot-restart-parent-stats",
            "--skip-hot-restart-on-no-parent",
            "--use-dynamic-base-id",
            "--ignore_rest",
            "--",
        ] {
            parse(&["-c", "file", switch]).unwrap();
        }
        for (flag, value) in [
            ("--stats-tag", "region:here"),
            ("--socket-mode", "600"),
            ("--socket-path", "@envoy"),
            ("--disable-extensions", "envoy.filters.http.lua"),
            ("--mode", "validate"),
            ("--parent-shutdown-time-s", "900"),
            ("--drain-strategy", "gradual"),
            ("--drain-time-s", "600"),
            ("--file-flush-min-size-kb", "64"),
            ("--file-flush-interval-msec", "10000"),
            ("--service-zone", "zone"),
            ("--service-node", "node"),
            ("--service-cluster", "cluster"),
            ("--restart-epoch", "0"),
            ("--log-path", "/dev/null"),
            ("--log-format", "[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] %v"),
            ("--component-log-level", "upstream:debug,config:trace"),
            ("--log-level", "critical"),
            ("-l", "off"),
            ("--local-address-ip-version", "v6"),
            ("--admin-address-path", "file"),
            ("--config-yaml", "{}"),
            ("--config-path", "file"),
            ("--concurrency", "2"),
            ("--base-id-path", "file"),
            ("--base-id", "7"),
        ] {
            let with = if flag == "--config-path" { vec![flag, value] } else { vec!["-c", "file", flag, value] };
            parse(&with).unwrap();
        }
    }

    #[test]
    fn command_lines_of_istio_are_taken() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for line in [
            "-c etc/istio/proxy/envoy-rev.json --drain-time-s 45 --drain-strategy immediate --local-address-ip-version v4 --file-flush-interval-msec 1000 --disable-hot-restart --allow-unknown-static-fields -l warning --component-log-level misc:error --skip-deprecated-logs --concurrency 2 --config-yaml {}",
            "sidecar --domain default.svc.cluster.local --proxyLogLevel=warning --proxyComponentLogLevel=misc:error --log_output_level=default:info",
            "router --domain istio-system.svc.cluster.local --proxyLogLevel=warning,misc:error --log_as_json --log_caller=all --stsPort 0 --meshConfig ./etc/istio/config/mesh --profiling=false --outlierLogPath=/tmp/log",
        ] {
            let line = words(line);
            parse(&line.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        }
    }

    #[test]
    fn what_is_no_value_is_refused() {
        for (line, words) in [
            (&["-c", "f", "--mode", "init"][..], "validate"),
            (&["-c", "f", "-l", "loud"], "loud"),
            (&["-c", "f", "--stats-tag", "a"], "name:value"),
            (&["-c", "f", "--stats-tag", "a:b.c"], "dots"),
            (&["-c", "f", "--drain-strategy", "never"], "gradual"),
            (&["-c", "f", "--local-address-ip-version", "v5"], "v4"),
            (&["-c", "f", "--nobody-knows"], "nobody-knows"),
            (&["sidecar", "-c", "f"], "cannot be used with"),
        ] {
            let said = parse(line).unwrap_err();
            assert!(said.contains(words), "{line:?}: {said}");
        }
    }
}
