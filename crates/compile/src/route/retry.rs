//! Retry policies.
//!
//! *Source*: `docs/parity.md`, Traffic 2.6.

use api::MeshConfig;
use api::networking::HttpRetry;
use envoy_types::pb::envoy::config::route::v3::{RetryPolicy, retry_policy};
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use envoy_types::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;

use crate::wire::{self, pack, uint};

/// What is retried unless a VirtualService or the mesh says otherwise: failures before the upstream
/// did anything, never an answer.
const RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";

fn product_default() -> RetryPolicy {
    RetryPolicy {
        retry_on: RETRY_ON.into(),
        num_retries: uint(2),
        retry_host_predicate: vec![previous_hosts()],
        host_selection_retry_max_attempts: 5,
        ..RetryPolicy::default()
    }
}

fn previous_hosts() -> retry_policy::RetryHostPredicate {
    retry_policy::RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".into(),
        config_type: Some(retry_policy::retry_host_predicate::ConfigType::TypedConfig(pack(
            &PreviousHostsPredicate {},
        ))),
    }
}

/// The policy of routes without their own: the mesh's, or the product's.
pub(crate) fn default_policy(mesh: &MeshConfig) -> Option<RetryPolicy> {
    match &mesh.default_http_retry_policy {
        Some(of) => convert(of),
        None => Some(product_default()),
    }
}

/// The policy of a route; `None` switches retries off.
pub(super) fn policy(own: Option<&HttpRetry>, mesh: &MeshConfig, hashes: bool) -> Option<RetryPolicy> {
    let mut policy = match own {
        Some(own) => convert(own)?,
        None => default_policy(mesh)?,
    };
    if hashes {
        // A hash decides the host; another one would not be the client's.
        policy.retry_host_predicate.clear();
    }
    Some(policy)
}

fn convert(of: &HttpRetry) -> Option<RetryPolicy> {
    let attempts = u32::try_from(of.attempts).ok().filter(|attempts| *attempts > 0)?;
    let mut policy = RetryPolicy { num_retries: uint(attempts), ..product_default() };
    if !of.retry_on.is_empty() {
        (policy.retry_on, policy.retriable_status_codes) = conditions(&of.retry_on);
    }
    policy.per_try_timeout = of.per_try_timeout.and_then(|timeout| wire::duration(timeout.0));
    if of.retry_ignore_previous_hosts == Some(false) {
        policy.retry_host_predicate.clear();
    }
    if of.retry_remote_localities == Some(true) {
        policy.retry_priority = Some(retry_policy::RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".into(),
            config_type: Some(retry_policy::retry_priority::ConfigType::TypedConfig(pack(&PreviousPrioritiesConfig {
                update_frequency: 2,
            }))),
        });
    }
    if let Some(backoff) = of.backoff {
        policy.retry_back_off =
            Some(retry_policy::RetryBackOff { base_interval: wire::duration(backoff.0), max_interval: None });
    }
    Some(policy)
}

/// Splits numbers off as status codes.
fn conditions(retry_on: &str) -> (String, Vec<u32>) {
    let mut words = Vec::new();
    let mut codes = Vec::new();
    for word in retry_on.split(',') {
        match word.parse::<u32>() {
            Ok(code) => codes.push(code),
            Err(_) => words.push(word),
        }
    }
    let mut joined = words.join(",");
    if !codes.is_empty() && !words.contains(&"retriable-status-codes") {
        joined.push_str(",retriable-status-codes");
    }
    (joined, codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_status_codes() {
        for (written, words, codes) in [
            ("5xx,503", "5xx,retriable-status-codes", &[503][..]),
            ("503", ",retriable-status-codes", &[503]),
            ("reset", "reset", &[]),
            ("503,retriable-status-codes,429", "retriable-status-codes", &[503, 429]),
        ] {
            assert_eq!(conditions(written), (words.to_owned(), codes.to_vec()), "{written}");
        }
    }

    #[test]
    fn no_attempts_is_off_and_predicates_can_be_dropped() {
        let mesh = MeshConfig::default();
        assert!(policy(Some(&HttpRetry::default()), &mesh, false).is_none());
        let own = HttpRetry { attempts: 3, ..HttpRetry::default() };
        assert_eq!(policy(Some(&own), &mesh, false).unwrap().retry_host_predicate.len(), 1);
        assert_eq!(policy(Some(&own), &mesh, true).unwrap().retry_host_predicate.len(), 0);
        assert_eq!(policy(None, &mesh, false).unwrap().num_retries, uint(2));
    }
}
