//! `lateen proxy`: the data plane and its agent.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use proxy::{Options, Role};
use types::wellknown::env;

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
    /// `sidecar` or `router`.
    role: ProxyRole,
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
pub(crate) fn run(args: ProxyArgs) -> Result<()> {
    let mut variables: BTreeMap<String, String> = std::env::vars().collect();
    if let Some(concurrency) = args.concurrency {
        variables.insert("ISTIO_META_CONCURRENCY".into(), concurrency.to_string());
    }
    let role = match args.role {
        ProxyRole::Sidecar => Role::Sidecar,
        ProxyRole::Router => Role::Router,
    };
    let mut options = Options::from_environment(role, &variables, |path| std::fs::read_to_string(path).ok())?;
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
    proxy::run(options)?;
    Ok(())
}
