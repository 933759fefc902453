//! The control plane: objects in, configuration and certificates out.
//!
//! ```text
//!  Source (files, node) ─► ConfigSet ─► MeshSnapshot ─► compile, per proxy ─► ADS
//!                                        │   ▲                       ▲
//!                             issuers    ▼   │ key sets              │
//!                                        jwks                        │
//!  CA (certificates) ◄── authn (certificate, token) ──── admission ──┘
//! ```
//!
//! [`run`] takes bound listeners and works until it is told to stop. Proxies keep what they have
//! while it is away, and get only differences when it is back.
//!
//! **Invariants.** Nothing is pushed before the source was read whole. A caller is who its
//! certificate or token says, never who its node id says (properties 28, 29). Secrets go only over
//! TLS, to the namespace they are in. A panic while compiling for one proxy is that proxy's alone.
//! What a subscriber can fill is bounded. The CA's key stays in its directory.
//!
//! Start reading at [`run`], then [`fleet`], [`ads`], [`ca`].

pub mod ads;
pub mod authn;
pub mod ca;
pub mod compiler;
pub mod debug;
pub mod fleet;
pub mod jwks;
pub mod listen;
pub mod mesh_state;
mod pool;
mod secrets;
pub mod source;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use identity::tls::{ClientAuth, InvalidTls, SanMatch, ServerConfigs, ServerTls, Verify};
use proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use telemetry::registry::Registry;
use thiserror::Error;
use tokio::sync::watch;
use tokio::task::JoinSet;
use types::TrustDomain;
use types::wellknown;

use crate::authn::{Authn, TokenAuthenticator};
use crate::ca::service::CertificateService;
use crate::ca::{Ca, Lifetimes};
use crate::compiler::{Compiler, MeshCompiler};
use crate::listen::{Protocols, Security};

/// How a control plane runs.
pub struct Options {
    /// Where objects come from.
    pub source: source::Source,
    /// Configuration and certificates over TLS (15012).
    pub secure: Vec<TcpListener>,
    /// Configuration without secrets for anybody (15010). Empty unless wanted.
    pub plaintext: Vec<TcpListener>,
    /// Metrics and debug pages (15014).
    pub monitoring: Vec<TcpListener>,
    /// Debug pages for the owner, on a Unix socket that is made here.
    pub debug_socket: Option<PathBuf>,
    /// Where the CA's key is kept, or plugged in.
    pub ca_dir: PathBuf,
    /// Whose identities are signed.
    pub trust_domain: TrustDomain,
    /// Lifetimes of workload certificates.
    pub lifetimes: Lifetimes,
    /// How often the CA's directory is looked into. A root that ends and files that change are seen after so
    /// long (`CITADEL_SELF_SIGNED_ROOT_CERT_CHECK_INTERVAL`).
    pub root_check: Duration,
    /// The time by which roots get successors and take over.
    pub root_clock: Clock,
    /// Our cluster, as `clusterid` must name it.
    pub cluster_id: String,
    /// Namespace of the control plane; its certificate is for `istiod.<namespace>.svc`.
    pub namespace: String,
    /// More DNS names for the control plane's certificate.
    pub serving_names: Vec<String>,
    /// Who checks tokens.
    pub tokens: Vec<Arc<dyn TokenAuthenticator>>,
    /// The root bundle is written here, for bootstrapping.
    pub root_cert_out: Option<PathBuf>,
    /// How changes are gathered.
    pub debounce: mesh_state::Debounce,
    /// How keys of token issuers are fetched.
    pub jwks: jwks::Settings,
    /// What compiles; usually [`MeshCompiler`].
    pub compiler: Arc<dyn Compiler>,
    /// Metrics are counted here.
    pub metrics: Registry,
}

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("source", &self.source).field("ca_dir", &self.ca_dir).finish_non_exhaustive()
    }
}

impl Options {
    /// Defaults of Istio; listeners, and who checks tokens, are to be added.
    pub fn new(source: source::Source, ca_dir: impl Into<PathBuf>) -> Self {
        Self {
            source,
            secure: Vec::new(),
            plaintext: Vec::new(),
            monitoring: Vec::new(),
            debug_socket: None,
            ca_dir: ca_dir.into(),
            trust_domain: TrustDomain::default(),
            lifetimes: Lifetimes::default(),
            root_check: Duration::from_secs(10),
            root_clock: Arc::new(SystemTime::now),
            cluster_id: "Kubernetes".to_owned(),
            namespace: wellknown::DEFAULT_ROOT_NAMESPACE.to_owned(),
            serving_names: Vec::new(),
            tokens: Vec::new(),
            root_cert_out: None,
            debounce: mesh_state::Debounce::default(),
            jwks: jwks::Settings::default(),
            compiler: Arc::new(MeshCompiler::vetted()),
            metrics: Registry::new(),
        }
    }

    fn dns_names(&self) -> Vec<String> {
        let namespace = &self.namespace;
        let domain = wellknown::DEFAULT_DOMAIN_SUFFIX;
        let mut names = vec![
            format!("istiod.{namespace}.svc"),
            format!("istiod.{namespace}.svc.{domain}"),
            format!("istio-pilot.{namespace}.svc"),
        ];
        names.extend(self.serving_names.iter().cloned());
        names
    }
}

/// Why a control plane cannot start or go on.
#[derive(Debug, Error)]
pub enum RunError {
    /// The CA.
    #[error("the CA cannot be used")]
    Ca(#[from] ca::store::StoreError),
    /// Our own certificate.
    #[error("the control plane's own certificate cannot be made")]
    Serve(#[from] ca::SignError),
    /// TLS.
    #[error("TLS cannot be set up")]
    Tls(#[from] InvalidTls),
    /// A listener.
    #[error("listener {0:?} cannot be used")]
    Listen(Option<SocketAddr>, #[source] io::Error),
    /// The debug socket.
    #[error("debug socket {}", .0.display())]
    Socket(PathBuf, #[source] io::Error),
    /// A part of us ended, which only a bug can do.
    #[error("the {0} ended unexpectedly")]
    Ended(&'static str),
}

/// Life of the control plane's own certificate; renewed at half.
const SERVING_LIFETIME: Duration = Duration::from_hours(90 * 24);
/// Largest message a subscriber may send: names of ten thousand services and more.
const REQUEST_BYTES_MAX: usize = 16 << 20;

/// Runs until `shutdown` is ready. Everything that was started ends with it.
///
/// Needs a multi-thread tokio runtime, since snapshots are built on its blocking threads.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    let now = (options.root_clock)();
    let ca = Arc::new(ca::store::load_or_create(&options.ca_dir, &options.trust_domain, options.lifetimes, now)?);
    if let Some(path) = &options.root_cert_out {
        ca::store::write_atomically(path, ca.roots().to_pem().as_bytes(), 0o644)?;
    }
    let names = options.dns_names();
    let (serving, tls) = watch::channel(Arc::new(serving_config(&ca, &names)?));
    let (newest_ca, cas) = watch::channel(Arc::clone(&ca));
    let authn = Arc::new(Authn::new(options.trust_domain.clone(), &options.cluster_id, options.tokens));
    let metrics = options.metrics;
    ca::renewal::count_roots(&metrics, &ca);
    let fleet = Arc::new(fleet::Fleet::new(metrics.clone()));
    let (publisher, admitted) = watch::channel(None);
    let (mesh_sender, meshes) = watch::channel(None);
    let (keys_sender, key_sets) = watch::channel(Arc::default());

    let mut tasks: JoinSet<&'static str> = JoinSet::new();
    let named = |name: &'static str, task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| async move {
        task.await;
        name
    };
    tasks.spawn(named("source", Box::pin(source::run(options.source, publisher))));
    let inputs = mesh_state::Inputs { source: admitted, key_sets };
    let rebuilding = mesh_state::run(inputs, mesh_sender, Arc::clone(&fleet), options.debounce, metrics.clone());
    tasks.spawn(named("snapshot builder", Box::pin(rebuilding)));
    let fetching = jwks::run(meshes.clone(), keys_sender, options.jwks, metrics.clone());
    tasks.spawn(named("key fetcher", Box::pin(fetching)));
    tasks.spawn(named("compiler", Box::pin(fleet::run(Arc::clone(&fleet), meshes.clone(), options.compiler))));
    tasks.spawn(named("certificate renewal", Box::pin(renew_serving(cas.clone(), names, serving))));
    let renewal = ca::renewal::CaRenewal {
        dir: options.ca_dir,
        root_cert_out: options.root_cert_out,
        every: options.root_check,
        clock: options.root_clock,
        newest: newest_ca,
        metrics: metrics.clone(),
    };
    tasks.spawn(named("root renewal", Box::pin(renewal.run())));
    tasks.spawn(named("config dumps", Box::pin(debug::rest())));

    let admission = Arc::new(ads::Admission::new(Arc::clone(&authn), Arc::clone(&fleet)));
    let ads = || {
        let service = xds::server::Ads::new(Arc::clone(&admission), "lateen-discovery");
        AggregatedDiscoveryServiceServer::new(service)
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(usize::MAX)
    };
    let certificates = IstioCertificateServiceServer::new(CertificateService::new(cas, authn, metrics.clone()))
        .max_decoding_message_size(1 << 20);
    let secure = tonic::service::Routes::new(ads()).add_service(certificates).prepare().into_axum_router();
    let plaintext = tonic::service::Routes::new(ads()).prepare().into_axum_router();
    let pages = debug::router(debug::Pages { fleet, meshes, metrics });

    let tls = Security::Tls(tls);
    let listeners = [
        (options.secure, tls, secure, Protocols::Grpc),
        (options.plaintext, Security::Plaintext, plaintext, Protocols::Grpc),
        (options.monitoring, Security::Plaintext, pages.clone(), Protocols::Http1),
    ];
    for (sockets, security, router, over) in listeners {
        for socket in sockets {
            let address = socket.local_addr().ok();
            let listener = listen::adopt(socket).map_err(|error| RunError::Listen(address, error))?;
            tasks.spawn(named("listener", Box::pin(listen::serve(listener, security.clone(), router.clone(), over))));
        }
    }
    if let Some(path) = options.debug_socket {
        let listener = bind_unix(&path).map_err(|error| RunError::Socket(path, error))?;
        tasks.spawn(named("debug socket", Box::pin(listen::serve_unix(listener, pages))));
    }
    let ended = tokio::select! {
        () = shutdown => Ok(()),
        Some(ended) = tasks.join_next() => Err(RunError::Ended(ended.unwrap_or("control plane"))),
    };
    // Listeners are closed when this returns, so that a successor can bind them.
    tasks.shutdown().await;
    ended
}

fn serving_config(ca: &Ca, names: &[String]) -> Result<ServerConfigs, RunError> {
    let keys = ca.serve(names, SystemTime::now(), SERVING_LIFETIME)?;
    let prefix = SanMatch::uri_prefix(format!("spiffe://{}/", ca.trust_domain()));
    let tls = ServerTls {
        certificates: vec![keys],
        client_auth: ClientAuth::Optional(Verify::mesh(Arc::clone(ca.roots()), vec![prefix])),
        alpn: vec![b"h2".to_vec()],
        ..ServerTls::default()
    };
    Ok(tls.build()?)
}

/// Renews the control plane's own certificate in time, and whenever the CA changed.
async fn renew_serving(
    mut cas: watch::Receiver<Arc<Ca>>,
    names: Vec<String>,
    serving: watch::Sender<Arc<ServerConfigs>>,
) {
    loop {
        let ca = Arc::clone(&cas.borrow_and_update());
        let left = ca.not_after().duration_since(SystemTime::now()).unwrap_or_default();
        let due = (SERVING_LIFETIME / 2).min(left / 2).max(Duration::from_mins(1));
        if let Ok(Err(_)) = tokio::time::timeout(due, cas.changed()).await {
            return; // Nobody looks after the CA any more.
        }
        let ca = Arc::clone(&cas.borrow_and_update());
        match serving_config(&ca, &names) {
            Ok(config) => drop(serving.send_replace(Arc::new(config))),
            Err(error) => tracing::error!(error = identity::agent::describe(&error), "own certificate not renewed"),
        }
    }
}

/// Binds a socket that only its owner may open, replacing one that a dead process left.
fn bind_unix(path: &PathBuf) -> io::Result<tokio::net::UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another control plane listens here"));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = tokio::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
