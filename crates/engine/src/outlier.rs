//! Outlier detection. (First form: refused until its owner replaces it.)

use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3::OutlierDetection;

use crate::shared::{SharedCluster, SharedHost};
use crate::unsupported::Unsupported;

/// When hosts are ejected.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy;

/// What came of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A response with this status (gRPC mapped to HTTP).
    Status(u16),
    /// Connect failure or reset.
    Local,
    /// Time-out.
    Timeout,
}

impl Policy {
    /// Lowers the settings.
    pub fn lower(_: &OutlierDetection) -> Result<Self, Unsupported> {
        Err(Unsupported::not_built(""))
    }
}

/// Counts an event, and ejects the host if it is one too many.
pub fn mark(_: &Policy, _: &Arc<SharedCluster>, _: &Arc<SharedHost>, _: Event, _hosts: usize, _now: Instant) {}

/// Ends ejections whose time has passed; returns when to come again at the latest.
pub fn sweep(_: &Policy, _: &SharedCluster, _: Instant) -> Duration {
    Duration::from_secs(10)
}
