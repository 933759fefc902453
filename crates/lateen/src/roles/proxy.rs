//! `lateen proxy`: the data plane and its agent.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use proxy::{Options, Role};
use types::wellknown::env;

use crate::log::Levels;
use crate::memory;

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
    #[arg(required_unless_present_any = ["config_path", "config_yaml"], conflicts_with_all = ["config_path", "config_yaml"])]
    role: Option<ProxyRole>,
    /// Runs an Envoy v3 bootstrap, YAML or JSON.
    #[arg(short = 'c', long = "config-path", value_name = "FILE")]
    config_path: Option<std::path::PathBuf>,
    /// The bootstrap itself, in place of a file.
    #[arg(long = "config-yaml", value_name = "YAML", conflicts_with = "config_path")]
    config_yaml: Option<String>,
    /// Node id of a bootstrap.
    #[arg(long = "service-node")]
    service_node: Option<String>,
    /// Node cluster of a bootstrap.
    #[arg(long = "service-cluster")]
    service_cluster: Option<String>,
    /// Gradual drains, in seconds.
    #[arg(long = "drain-time-s")]
    drain_time_s: Option<u64>,
    /// A file that is told where the admin interface listens.
    #[arg(long = "admin-address-path", value_name = "FILE")]
    admin_address_path: Option<std::path::PathBuf>,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "skip-deprecated-logs", hide = true)]
    skip_deprecated_logs: bool,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "base-id", hide = true)]
    base_id: Option<u32>,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "use-dynamic-base-id", hide = true)]
    use_dynamic_base_id: bool,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "parent-shutdown-time-s", hide = true)]
    parent_shutdown_time_s: Option<u64>,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "drain-strategy", hide = true)]
    drain_strategy: Option<String>,
    /// Level of the proxy's own log: trace, debug, info, warning, error, critical, off.
    #[arg(short = 'l', long = "log-level", value_name = "LEVEL")]
    log_level: Option<String>,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "component-log-level", hide = true)]
    component_log_level: Option<String>,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "log-format", hide = true)]
    log_format: Option<String>,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "log-path", hide = true)]
    log_path: Option<String>,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "disable-hot-restart", hide = true)]
    disable_hot_restart: bool,
    /// Accepted for compatibility with Envoy.
    #[arg(long = "cpuset-threads", hide = true)]
    cpuset_threads: bool,
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
    /// Accepted for compatibility.
    #[arg(long = "proxyLogLevel", hide = true)]
    proxy_log_level: Option<String>,
    /// Accepted for compatibility.
    #[arg(long = "proxyComponentLogLevel", hide = true)]
    proxy_component_log_level: Option<String>,
    /// Accepted for compatibility.
    #[arg(long = "log_output_level", hide = true)]
    log_output_level: Option<String>,
}

impl ProxyArgs {
    /// The level that was asked for.
    pub(crate) fn log_level(&self) -> &str {
        self.log_level.as_deref().unwrap_or("warn")
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
    let bootstrap = match (&args.config_path, &args.config_yaml) {
        (Some(path), _) => {
            Some(std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?)
        }
        (None, text) => text.clone(),
    };
    if let Some(text) = bootstrap {
        let flags = proxy::bootstrap::Flags {
            concurrency: args.concurrency,
            service_node: args.service_node,
            service_cluster: args.service_cluster,
            drain_seconds: args.drain_time_s,
            admin_address_path: args.admin_address_path,
        };
        let name = args.config_path.map_or_else(|| "--config-yaml".to_owned(), |path| path.display().to_string());
        let mut options = proxy::bootstrap::options(&text, &flags).with_context(|| format!("bootstrap {name}"))?;
        options.log_levels = Some(levels);
        options.trim = Some(memory::trim);
        // reading the bootstrap took most of the memory this thread will ever need
        memory::trim();
        proxy::run(options)?;
        return Ok(());
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
