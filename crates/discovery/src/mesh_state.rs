//! From admitted objects to snapshots: gathers changes for a moment, then rebuilds once.

use std::sync::Arc;
use std::time::Duration;

use mesh::{KeySets, MeshSnapshot, Reach};
use telemetry::registry::Registry;
use tokio::sync::watch;
use tokio::time::Instant;
use types::Finding;

use crate::fleet::Fleet;
use crate::source::Admitted;

/// The mesh as it is pushed.
#[derive(Debug)]
pub struct Mesh {
    /// Indexed objects.
    pub snapshot: MeshSnapshot,
    /// Counts snapshots of this process, from 1.
    pub push: u64,
    /// What responses carry: time and push number.
    pub label: Box<str>,
    /// The newest change of the source that is in it.
    pub version: u64,
    /// About single objects and about objects together.
    pub findings: Vec<Finding>,
}

/// How changes are gathered (`PILOT_DEBOUNCE_AFTER`, `PILOT_DEBOUNCE_MAX`).
#[derive(Clone, Copy, Debug)]
pub struct Debounce {
    /// Quiet time that ends gathering.
    pub quiet: Duration,
    /// Gathering ends after so long in any case.
    pub max: Duration,
}

impl Default for Debounce {
    fn default() -> Self {
        Self { quiet: Duration::from_millis(20), max: Duration::from_secs(1) }
    }
}

/// What snapshots are built from.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Objects.
    pub source: watch::Receiver<Option<Arc<Admitted>>>,
    /// Keys of token issuers, as far as they were fetched.
    pub key_sets: watch::Receiver<Arc<KeySets>>,
}

impl Inputs {
    /// Waits for a change of either; tells which, or `None` when the source is gone.
    async fn changed(&mut self) -> Option<&'static str> {
        tokio::select! {
            changed = self.source.changed() => changed.ok().map(|()| "config"),
            Ok(()) = self.key_sets.changed() => Some("jwks"),
        }
    }
}

/// Rebuilds until the source is gone. Until the source was read whole, there is no mesh, and no
/// proxy is sent anything: an empty push would break what runs.
pub async fn run(
    mut inputs: Inputs,
    meshes: watch::Sender<Option<Arc<Mesh>>>,
    fleet: Arc<Fleet>,
    debounce: Debounce,
    metrics: Registry,
) {
    let mut push = 0;
    while let Some(trigger) = inputs.changed().await {
        let begun = Instant::now();
        while begun.elapsed() < debounce.max {
            match tokio::time::timeout(debounce.quiet, inputs.changed()).await {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        metrics.observe("pilot_debounce_time", &[], begun.elapsed().as_secs_f64());
        let Some(admitted) = inputs.source.borrow_and_update().clone() else { continue };
        let key_sets = Arc::clone(&inputs.key_sets.borrow_and_update());
        push += 1;
        let previous = meshes.borrow().clone();
        let before_mesh = previous.clone();
        let configs = admitted.configs.clone();
        let started = Instant::now();
        let built = tokio::task::spawn_blocking(move || {
            let previous = before_mesh.as_deref().map(|mesh| &mesh.snapshot);
            let (snapshot, findings) = MeshSnapshot::next(previous, &configs);
            (snapshot.with_key_sets(key_sets), findings)
        });
        let Ok((snapshot, together)) = built.await else {
            tracing::error!(push, "the snapshot could not be built; the last one stays");
            metrics.count("pilot_total_xds_internal_errors", &[]);
            continue;
        };
        let mut findings = admitted.findings.clone();
        findings.extend(together);
        let label = format!("{:.0}/{push}", jiff::Timestamp::now()).into();
        metrics.observe("pilot_pushcontext_init_seconds", &[], started.elapsed().as_secs_f64());
        metrics.count("pilot_push_triggers", &[("type", trigger)]);
        metrics.set("pilot_services", &[], f64_of(snapshot.services().len()));
        tracing::info!(push, version = admitted.version, findings = findings.len(), "snapshot built");
        // Before the mesh is seen: a proxy that is compiled in between must not count as done.
        let reach = previous.map_or_else(Reach::everyone, |previous| snapshot.reach_since(&previous.snapshot));
        fleet.affect(push, &reach);
        meshes.send_replace(Some(Arc::new(Mesh { snapshot, push, label, version: admitted.version, findings })));
        fleet.enqueue_all();
    }
}

pub(crate) fn f64_of(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
