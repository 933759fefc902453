//! Circuit breakers: how much of each resource a cluster may take.
//!
//! The counters are [`crate::shared::SharedCluster`]'s: one count a proxy, whatever the number of
//! its workers. A place is held by a guard and given back on every way out.

use std::sync::Arc;

use crate::cluster::Limits;
use crate::retry::retries_allowed;
use crate::shared::{ClusterHeld, Resource, SharedCluster};

/// How many places of `resource` there are now.
pub fn places(limits: &Limits, shared: &SharedCluster, resource: Resource) -> u32 {
    match resource {
        Resource::Connection => limits.connections_max,
        Resource::Pending => limits.pending_max,
        Resource::Request => limits.requests_max,
        Resource::Retry => retries_allowed(limits, shared.requests.get().saturating_add(shared.pending.get())),
    }
}

/// Takes a place; `None` when the circuit breaker is open.
pub fn take(limits: &Limits, shared: &Arc<SharedCluster>, resource: Resource) -> Option<ClusterHeld> {
    shared.try_hold(resource, places(limits, shared, resource))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::cluster::RetryBudget;

    #[test]
    fn each_resource_has_its_own_limit() {
        let limits = Limits { connections_max: 1, pending_max: 2, requests_max: 3, retries_max: 0, retry_budget: None };
        let shared = SharedCluster::detached("c", Instant::now());
        for (resource, most) in
            [(Resource::Connection, 1), (Resource::Pending, 2), (Resource::Request, 3), (Resource::Retry, 0)]
        {
            let held: Vec<_> = std::iter::from_fn(|| take(&limits, &shared, resource)).take(10).collect();
            assert_eq!(held.len(), most, "{resource:?}");
            drop(held);
            assert_eq!(take(&limits, &shared, resource).is_some(), most > 0);
        }
    }

    #[test]
    fn a_budget_grows_with_the_load() {
        let budget = RetryBudget { percent: 50.0, min_concurrency: 1 };
        let limits = Limits { retry_budget: Some(budget), ..Limits::default() };
        let shared = SharedCluster::detached("c", Instant::now());
        let _first = take(&limits, &shared, Resource::Retry).unwrap();
        assert!(take(&limits, &shared, Resource::Retry).is_none());
        let _requests: Vec<_> = (0..4).map(|_| shared.hold(Resource::Request)).collect();
        assert!(take(&limits, &shared, Resource::Retry).is_some());
    }
}
