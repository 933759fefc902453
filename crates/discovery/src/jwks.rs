//! Keys of token issuers: fetched here, handed to the snapshot, refreshed, withdrawn.
//!
//! ```text
//!  mesh ── sources ──► keeper ── due ──► fetch (discovery, redirects, bounds) ──► key sets ──► mesh
//!                        ▲                                    │
//!                        └── refresh, or a growing pause ─────┘
//! ```
//!
//! Proxies never fetch keys: what is here is inlined into their configuration. Until a first fetch
//! succeeds there are no keys, and tokens of that issuer are refused; when a later one fails, the
//! keys at hand stay. A source that no rule names any more is forgotten at once, so that its keys
//! are not used again unasked.
//!
//! **Invariants.** Nothing is asked but http and https; neither a name nor a redirect leads to a
//! blocked address (this machine, link-local, the metadata services of clouds); https never leads to
//! http. Bodies, redirects, time and the number of fetches at once are bounded.
//!
//! *Source*: `docs/parity.md`, Security 9.1; OpenID Connect Discovery 1.0, section 4.

mod fetch;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh::{KeySets, KeySource};
use telemetry::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::mesh_state::Mesh;
use fetch::{FetchError, Fetcher};

/// Fetches under way at once; more sources wait for their turn.
const FETCHES_MAX: usize = 16;
/// The first pause after a failure; each further one doubles it.
const PAUSE_FIRST: Duration = Duration::from_secs(1);

/// How keys are fetched.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Keys are fetched again after so long (`PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`).
    pub refresh: Duration,
    /// The longest pause after failures. They begin at one second, since a local issuer often starts
    /// beside us, and double; Istio begins at a minute.
    pub pause_max: Duration,
    /// Addresses that are never asked; `BLOCKED_CIDRS_IN_JWKS_URIS` adds to them.
    pub blocked: Vec<IpNet>,
    /// More root certificates for https, if the file is there.
    pub extra_roots: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        /// This machine (the control plane itself), link-local addresses with the metadata services
        /// of most clouds, and those that are elsewhere.
        const BLOCKED: &[&str] = &[
            "0.0.0.0/8",
            "127.0.0.0/8",
            "::/128",
            "::1/128",
            "169.254.0.0/16",
            "fe80::/10",
            "fd00:ec2::254/128",
            "100.100.100.200/32",
        ];
        Self {
            refresh: Duration::from_mins(20),
            pause_max: Duration::from_mins(60),
            blocked: BLOCKED.iter().filter_map(|net| net.parse().ok()).collect(),
            extra_roots: PathBuf::from("/cacerts/extra.pem"),
        }
    }
}

/// One source.
struct Entry {
    timeout: Duration,
    state: State,
    failures: u32,
}

/// ```text
///  Due(now) ──► Running ──► Due(refresh or pause)
/// ```
enum State {
    Due(Instant),
    Running,
}

struct Keeper {
    settings: Settings,
    fetcher: Arc<Fetcher>,
    entries: BTreeMap<KeySource, Entry>,
    fetches: JoinSet<(KeySource, Result<String, FetchError>)>,
    key_sets: watch::Sender<Arc<KeySets>>,
    metrics: Registry,
}

/// Fetches for the meshes that come, until nobody sends any. *Cancel safety*: may be dropped; what
/// was published last stays.
pub async fn run(
    mut meshes: watch::Receiver<Option<Arc<Mesh>>>,
    key_sets: watch::Sender<Arc<KeySets>>,
    settings: Settings,
    metrics: Registry,
) {
    let mut keeper = Keeper {
        fetcher: Arc::new(Fetcher::new(settings.blocked.clone(), settings.extra_roots.clone())),
        settings,
        entries: BTreeMap::new(),
        fetches: JoinSet::new(),
        key_sets,
        metrics,
    };
    loop {
        let due = keeper.start_due(Instant::now());
        tokio::select! {
            changed = meshes.changed() => {
                if changed.is_err() {
                    return;
                }
                let mesh = meshes.borrow_and_update().clone();
                if let Some(mesh) = mesh {
                    keeper.want(&mesh.snapshot.key_sources());
                }
            }
            Some(done) = keeper.fetches.join_next() => match done {
                Ok((source, result)) => keeper.fetched(source, result),
                Err(error) => tracing::error!(%error, "a fetch of keys ended early"),
            },
            () = sleep_until(due) => {}
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

impl Keeper {
    /// Takes the sources of a new mesh: new ones are due at once, others forgotten.
    fn want(&mut self, sources: &BTreeMap<KeySource, Duration>) {
        self.entries.retain(|source, _| sources.contains_key(source));
        for (source, timeout) in sources {
            let fresh = || Entry { timeout: *timeout, state: State::Due(Instant::now()), failures: 0 };
            self.entries.entry(source.clone()).or_insert_with(fresh).timeout = *timeout;
        }
        let mut known = KeySets::clone(&self.key_sets.borrow());
        known.retain(|source| sources.contains_key(source));
        self.publish(known);
    }

    /// Starts what is due; tells when the next one is.
    fn start_due(&mut self, now: Instant) -> Option<Instant> {
        let mut next = None;
        for (source, entry) in &mut self.entries {
            let State::Due(at) = entry.state else { continue };
            if at > now {
                next = Some(next.map_or(at, |next: Instant| next.min(at)));
            } else if self.fetches.len() < FETCHES_MAX {
                entry.state = State::Running;
                let (fetcher, source, timeout) = (Arc::clone(&self.fetcher), source.clone(), entry.timeout);
                self.fetches.spawn(async move {
                    let result = tokio::time::timeout(timeout, fetcher.key_set(&source)).await;
                    (source, result.unwrap_or(Err(FetchError::Slow(timeout))))
                });
            }
        }
        next
    }

    fn fetched(&mut self, source: KeySource, result: Result<String, FetchError>) {
        // Forgotten meanwhile; one that was wanted again meanwhile takes what came.
        let Some(entry) = self.entries.get_mut(&source) else { return };
        let mut known = KeySets::clone(&self.key_sets.borrow());
        match result {
            Ok(keys) => {
                self.metrics.count("pilot_jwks_resolver_network_fetch_success_total", &[]);
                entry.failures = 0;
                entry.state = State::Due(Instant::now() + self.settings.refresh);
                known.set(source, Ok(keys.into()));
            }
            Err(error) => {
                self.metrics.count("pilot_jwks_resolver_network_fetch_fail_total", &[]);
                let pause = PAUSE_FIRST.saturating_mul(1 << entry.failures.min(16)).min(self.settings.pause_max);
                entry.failures = entry.failures.saturating_add(1);
                entry.state = State::Due(Instant::now() + pause);
                let reason = identity::agent::describe(&error);
                tracing::warn!(?source, reason, ?pause, "keys of a token issuer were not fetched");
                if !known.get(&source).is_some_and(Result::is_ok) {
                    known.set(source, Err(reason.into()));
                }
            }
        }
        self.publish(known);
    }

    fn publish(&self, known: KeySets) {
        self.key_sets.send_if_modified(|now| {
            let is_new = **now != known;
            if is_new {
                *now = Arc::new(known);
            }
            is_new
        });
    }
}

#[cfg(test)]
mod tests;
