//! The proxy as a whole: what everybody shares, start and stop.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::shared::SharedTable;
use telemetry::log::LineSink;
use telemetry::metrics::Metrics;
use telemetry::peer::Peer;
use thiserror::Error;
use tokio::sync::{mpsc, watch};

use crate::control::{Control, Request};
use crate::host_sockets::HostSockets;
use crate::options::{Options, Role};
use crate::secrets::Secrets;
use crate::upstream::dial::Dialer;

/// What workers and the control side share. Immutable, or atomics.
pub(crate) struct Shared {
    pub(crate) secrets: Secrets,
    pub(crate) metrics: Metrics,
    pub(crate) hosts: Arc<SharedTable>,
    pub(crate) dialer: Dialer,
    pub(crate) own_peer: Arc<Peer>,
    pub(crate) sinks: Arc<Sinks>,
    pub(crate) is_gateway: bool,
    /// Run from a bootstrap: nothing is known of a mesh.
    pub(crate) is_standalone: bool,
    pub(crate) drain_time: Duration,
    pub(crate) log_flush_interval: Duration,
    pub(crate) connection_ids: AtomicU64,
    pub(crate) spans: crate::tracing_spans::Spans,
    pub(crate) service_name: Arc<str>,
    /// What workers run, for those who are not workers.
    pub(crate) published: Arc<arc_swap::ArcSwap<engine::RuntimeConfig>>,
}

impl Shared {
    /// What is shared from the start; takes the way out of the options.
    pub(crate) fn new(options: &mut Options) -> Result<Arc<Self>, RunError> {
        let host = match options.host_sockets.take() {
            None => None,
            Some((fd, ranges)) => {
                let host = HostSockets::new(fd, &ranges).map_err(|error| RunError::Start("the way out", error))?;
                Some(Arc::new(host))
            }
        };
        let metadata = options.node.metadata.clone().unwrap_or_default();
        let own_peer = Arc::new(crate::record::own_peer(&metadata));
        let is_standalone = options.role == Role::Standalone;
        let service_name = if is_standalone {
            options.node.cluster.as_str().into()
        } else {
            format!("{}.{}", own_peer.canonical_service, own_peer.namespace).into()
        };
        Ok(Arc::new(Self {
            secrets: Secrets::new(),
            metrics: Metrics::new(),
            hosts: Arc::new(SharedTable::new(Instant::now())),
            dialer: Dialer::new(host),
            own_peer,
            sinks: Arc::default(),
            is_gateway: options.role == Role::Router,
            is_standalone,
            drain_time: options.drain_time,
            log_flush_interval: options.log_flush_interval,
            connection_ids: AtomicU64::new(1),
            spans: crate::tracing_spans::Spans::default(),
            service_name,
            published: Arc::default(),
        }))
    }

    /// Addresses of a host, by the system's resolver (which asks the proxy's DNS where captured).
    pub(crate) async fn resolve(&self, host: &str) -> Option<Vec<IpAddr>> {
        let found = tokio::net::lookup_host((host, 0)).await.ok()?;
        let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
        (!addresses.is_empty()).then_some(addresses)
    }
}

/// Files that log lines go to, each opened once.
#[derive(Default)]
pub(crate) struct Sinks {
    open: Mutex<HashMap<String, LineSink>>,
}

impl Sinks {
    /// The sink of `path`; `None` if it cannot be opened, which is logged.
    pub(crate) fn open(&self, path: &str) -> Option<LineSink> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = open.get(path) {
            return Some(sink.clone());
        }
        match LineSink::open(Path::new(path)) {
            Ok(sink) => {
                open.insert(path.to_owned(), sink.clone());
                Some(sink)
            }
            Err(error) => {
                tracing::warn!(%error, path, "the access log cannot be opened");
                None
            }
        }
    }

    /// Lines dropped so far.
    pub(crate) fn dropped(&self) -> u64 {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        #[expect(clippy::iter_over_hash_type, reason = "a sum")]
        let sum = {
            let mut sum = 0;
            for sink in open.values() {
                sum += sink.dropped();
            }
            sum
        };
        sum
    }
}

/// Why a proxy does not run.
#[derive(Debug, Error)]
pub enum RunError {
    /// A thread or runtime cannot be made.
    #[error("cannot start {0}")]
    Start(&'static str, #[source] std::io::Error),
    /// One of the proxy's own services cannot listen.
    #[error("cannot listen on {address} for {what}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// For what.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A resource of the bootstrap is refused.
    #[error("bootstrap {kind} {name:?}: {reason}")]
    Bootstrap {
        /// `listener`, `cluster`, …
        kind: &'static str,
        /// Its name.
        name: String,
        /// Field and reason.
        reason: String,
    },
    /// Identity files are not usable.
    #[error("identity files are not usable: {0}")]
    Identity(String),
}

/// What is known of the proxy's state, for readiness and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// The first full configuration runs.
    pub(crate) configured: bool,
    /// It takes no new work gladly.
    pub(crate) draining: bool,
    /// An operator failed the health check.
    pub(crate) failed: bool,
    /// The generation all workers run.
    pub(crate) generation: u64,
}

impl State {
    pub(crate) fn is_ready(self) -> bool {
        self.configured && !self.draining && !self.failed
    }
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    requests: mpsc::UnboundedSender<Request>,
    state: watch::Receiver<State>,
    bound: watch::Receiver<Arc<Vec<(String, SocketAddr)>>>,
    control: tokio::task::JoinHandle<()>,
    services: Arc<Vec<(&'static str, SocketAddr)>>,
}

impl Proxy {
    /// Starts on the current tokio runtime (which may have one thread); workers get their own.
    ///
    /// *Errors*: a service cannot listen, or a resource of the bootstrap is refused.
    pub async fn start(mut options: Options) -> Result<Self, RunError> {
        let shared = Shared::new(&mut options)?;
        let told = options.admin_address_path.take();
        let proxy = Box::pin(Control::start(options, shared)).await?;
        if let Some(path) = told
            && let Some((_, address)) = proxy.services().iter().find(|(name, _)| *name == "admin")
        {
            std::fs::write(&path, address.to_string())
                .map_err(|error| RunError::Start("the admin address file", error))?;
        }
        Ok(proxy)
    }

    pub(crate) fn new(
        requests: mpsc::UnboundedSender<Request>,
        state: watch::Receiver<State>,
        bound: watch::Receiver<Arc<Vec<(String, SocketAddr)>>>,
        control: tokio::task::JoinHandle<()>,
        services: Vec<(&'static str, SocketAddr)>,
    ) -> Self {
        Self { requests, state, bound, control, services: Arc::new(services) }
    }

    /// Returns when the proxy is ready, or has ended.
    pub async fn ready(&self) {
        let mut state = self.state.clone();
        // an error means that the control side has ended: there is nothing to wait for
        drop(state.wait_for(|state| state.is_ready()).await);
    }

    /// Listeners that have a socket, by name, with the address it really has.
    pub fn listeners(&self) -> Vec<(String, SocketAddr)> {
        self.bound.borrow().as_ref().clone()
    }

    /// The proxy's own services: `admin`, `readiness`, `metrics`, `merged`, `dns`.
    pub fn services(&self) -> &[(&'static str, SocketAddr)] {
        &self.services
    }

    /// Begins a graceful end, as SIGTERM does.
    pub fn stop(&self) {
        // one that has ended needs no telling
        drop(self.requests.send(Request::Terminate));
    }

    /// Ends at once.
    pub fn quit(&self) {
        // likewise
        drop(self.requests.send(Request::Quit));
    }

    /// Returns when the proxy has ended.
    pub async fn ended(self) {
        if self.control.await.is_err() {
            tracing::error!("the control side panicked");
        }
    }
}

/// Checks the resources that a proxy would be started with: what [`run`] would refuse of them, nothing opened.
pub fn check(options: &Options) -> Result<(), RunError> {
    crate::control::check(&options.resources)
}

/// Runs a proxy until it is told to end. Blocks.
pub fn run(options: Options) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build()
        .map_err(|error| RunError::Start("the control runtime", error))?;
    runtime.block_on(async {
        let proxy = Proxy::start(options).await?;
        proxy.ended().await;
        Ok(())
    })
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}
