//! `lateen discovery`: the control plane.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use discovery::authn::TokenAuthenticator;
use discovery::authn::jwt::JwtKeys;
use discovery::authn::token_review::TokenReview;
use discovery::source::Source;
use ipnet::IpNet;
use types::TrustDomain;

/// Options of the control plane.
#[derive(Args, Debug)]
pub(crate) struct DiscoveryArgs {
    /// Files and folders of objects to watch.
    #[arg(short = 'f', long = "config", value_name = "PATH")]
    config: Vec<PathBuf>,
    /// Socket of the local mesh to watch in place of files.
    #[arg(long, value_name = "SOCKET", conflicts_with = "config")]
    node_socket: Option<PathBuf>,
    /// Where the CA's key is kept.
    #[arg(long, value_name = "DIR")]
    ca_dir: PathBuf,
    /// Configuration and certificates over TLS.
    #[arg(long = "listen", value_name = "ADDRESS", default_value = "127.0.0.1:15012")]
    secure: Vec<SocketAddr>,
    /// Configuration without secrets, in plaintext.
    #[arg(long, value_name = "ADDRESS")]
    plaintext: Vec<SocketAddr>,
    /// Metrics and debug pages.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15014")]
    monitoring: Vec<SocketAddr>,
    /// Debug pages for the owner, on a Unix socket.
    #[arg(long, value_name = "SOCKET")]
    debug_socket: Option<PathBuf>,
    /// The mesh's trust domain.
    #[arg(long, default_value = types::wellknown::DEFAULT_TRUST_DOMAIN)]
    trust_domain: String,
    /// Public keys (JWKS or PEM) of whoever signs service-account tokens.
    #[arg(long, value_name = "FILE")]
    token_keys: Option<PathBuf>,
    /// The root certificates are written here.
    #[arg(long, value_name = "FILE")]
    root_cert_out: Option<PathBuf>,
    /// More DNS names and addresses for the control plane's certificate.
    #[arg(long, value_name = "NAME")]
    serving_name: Vec<String>,
    /// Keys of token issuers are fetched again after so long.
    #[arg(long, value_name = "DURATION", env = "PILOT_JWT_PUB_KEY_REFRESH_INTERVAL", value_parser = duration)]
    jwks_refresh: Option<Duration>,
    /// More addresses that keys are never fetched from, comma-separated.
    #[arg(long, value_name = "CIDR", env = "BLOCKED_CIDRS_IN_JWKS_URIS", value_delimiter = ',')]
    jwks_blocked: Vec<IpNet>,
    /// The addresses that were bound are written here as JSON, for port 0.
    #[arg(long, value_name = "FILE")]
    addresses_out: Option<PathBuf>,
}

/// A duration as Istio writes it: `20m`, `1h30m`.
fn duration(text: &str) -> Result<Duration, String> {
    api::scalar::Duration::parse(text).map(|duration| duration.0)
}

fn bind(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>> {
    let bind_one = |address: &SocketAddr| {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    addresses.iter().map(bind_one).collect()
}

fn bound(listeners: &[TcpListener]) -> Vec<String> {
    listeners.iter().filter_map(|listener| listener.local_addr().ok()).map(|address| address.to_string()).collect()
}

/// Runs the control plane until SIGTERM or SIGINT.
pub(crate) fn run(args: DiscoveryArgs) -> Result<()> {
    let source = match args.node_socket.clone() {
        Some(socket) => Source::Node(socket),
        None if args.config.is_empty() => bail!("nothing to watch: give -f PATH or --node-socket SOCKET"),
        None => Source::Files(args.config),
    };
    let mut tokens: Vec<Arc<dyn TokenAuthenticator>> = Vec::new();
    if let Some(socket) = args.node_socket {
        tokens.push(Arc::new(TokenReview::new(socket)));
    }
    if let Some(path) = args.token_keys {
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        tokens.push(Arc::new(JwtKeys::parse(&text, None).with_context(|| path.display().to_string())?));
    }
    let mut options = discovery::Options::new(source, args.ca_dir);
    options.secure = bind(&args.secure)?;
    options.plaintext = bind(&args.plaintext)?;
    options.monitoring = bind(&args.monitoring)?;
    options.debug_socket = args.debug_socket;
    options.trust_domain = TrustDomain::parse(&args.trust_domain)?;
    options.serving_names = args.serving_name;
    options.tokens = tokens;
    options.root_cert_out = args.root_cert_out;
    options.jwks.refresh = args.jwks_refresh.unwrap_or(options.jwks.refresh);
    options.jwks.blocked.extend(args.jwks_blocked);
    if let Some(path) = args.addresses_out {
        let addresses = serde_json::json!({
            "secure": bound(&options.secure),
            "plaintext": bound(&options.plaintext),
            "monitoring": bound(&options.monitoring),
        });
        super::write_whole(&path, addresses.to_string().as_bytes())?;
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(4).enable_all().build()?;
    runtime.block_on(discovery::run(options, super::told_to_stop()))?;
    Ok(())
}
