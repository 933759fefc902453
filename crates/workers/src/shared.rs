//! What the workers and the control side share.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::shared::SharedTable;
use envoy_types::pb::envoy::config::core::v3::Node;
use telemetry::log::LineSink;
use telemetry::metrics::Metrics;
use telemetry::peer::Peer;

use crate::dial::Dialer;
use crate::host_sockets::HostSockets;
use crate::secrets::Secrets;

/// What [`Shared`] is made of.
#[derive(Debug)]
pub struct Settings<'a> {
    /// Who the proxy is.
    pub node: &'a Node,
    /// Whether it stands at the edge of the mesh.
    pub is_gateway: bool,
    /// Run from a bootstrap: nothing is known of a mesh.
    pub is_standalone: bool,
    /// How long connections have to end once told to.
    pub drain_time: Duration,
    /// How often lines of access logs are written.
    pub log_flush_interval: Duration,
    /// The way out of a pod's network; `None`: the proxy's own network leads everywhere.
    pub host_sockets: Option<HostSockets>,
}

/// What workers and the control side share. Immutable, or atomics.
pub struct Shared {
    /// Certificates, keys and roots.
    pub secrets: Secrets,
    /// Counters of all workers.
    pub metrics: Metrics,
    /// What is known of clusters and hosts from experience.
    pub hosts: Arc<SharedTable>,
    /// Opens connections.
    pub dialer: Dialer,
    pub(crate) own_peer: Arc<Peer>,
    /// Files of access logs.
    pub sinks: Arc<Sinks>,
    pub(crate) is_gateway: bool,
    /// Run from a bootstrap: nothing is known of a mesh.
    pub is_standalone: bool,
    /// How long connections have to end once told to.
    pub drain_time: Duration,
    /// The health check is failed: each HTTP connection is told to leave when it is used, for as long as this holds
    /// (Envoy's `/healthcheck/fail`).
    pub is_leaving: Arc<AtomicBool>,
    pub(crate) log_flush_interval: Duration,
    pub(crate) connection_ids: AtomicU64,
    /// Spans on their way to a collector.
    pub spans: crate::tracing_spans::Spans,
    pub(crate) service_name: Arc<str>,
    /// What workers run, for those who are not workers.
    pub published: Arc<arc_swap::ArcSwap<engine::RuntimeConfig>>,
}

impl Shared {
    /// What is shared from the start.
    pub fn new(settings: Settings<'_>) -> Arc<Self> {
        let Settings { node, is_gateway, is_standalone, drain_time, log_flush_interval, host_sockets } = settings;
        let metadata = node.metadata.clone().unwrap_or_default();
        let own_peer = Arc::new(crate::record::own_peer(&metadata));
        let service_name = if is_standalone {
            node.cluster.as_str().into()
        } else {
            format!("{}.{}", own_peer.canonical_service, own_peer.namespace).into()
        };
        Arc::new(Self {
            secrets: Secrets::default(),
            metrics: Metrics::new(),
            hosts: Arc::new(SharedTable::new(Instant::now())),
            dialer: Dialer::new(host_sockets.map(Arc::new)),
            own_peer,
            sinks: Arc::default(),
            is_gateway,
            is_standalone,
            drain_time,
            is_leaving: Arc::default(),
            log_flush_interval,
            connection_ids: AtomicU64::new(1),
            spans: crate::tracing_spans::Spans::default(),
            service_name,
            published: Arc::default(),
        })
    }

    /// Addresses of a host, by the system's resolver (which asks the proxy's DNS where captured).
    pub async fn resolve(&self, host: &str) -> Option<Vec<IpAddr>> {
        let found = tokio::net::lookup_host((host, 0)).await.ok()?;
        let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
        (!addresses.is_empty()).then_some(addresses)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// Files that log lines go to, each opened once.
#[derive(Default)]
pub struct Sinks {
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
    pub fn dropped(&self) -> u64 {
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
