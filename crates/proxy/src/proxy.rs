//! The proxy as a whole: start and stop.

use std::net::SocketAddr;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::{mpsc, watch};
use workers::host_sockets::HostSockets;
use workers::{Settings, Shared};

use crate::control::{Control, Request};
use crate::options::{Options, Role};

/// What all of the proxy shares; takes the way out of the options.
pub(crate) fn shared(options: &mut Options) -> Result<Arc<Shared>, RunError> {
    let host_sockets = match options.host_sockets.take() {
        None => None,
        Some((fd, ranges)) => {
            Some(HostSockets::new(fd, &ranges).map_err(|error| RunError::Start("the way out", error))?)
        }
    };
    Ok(Shared::new(Settings {
        node: &options.node,
        is_gateway: options.role == Role::Router,
        is_standalone: options.role == Role::Standalone,
        drain_time: options.drain_time,
        log_flush_interval: options.log_flush_interval,
        host_sockets,
    }))
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
    /// It is about to end.
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
        let shared = shared(&mut options)?;
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
