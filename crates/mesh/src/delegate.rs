//! A root entry and a delegate's entry made into one.
//!
//! *Source*: `traffic.md` 2.7.

use std::collections::BTreeMap;

use api::networking::{HttpMatchRequest, HttpRoute};
use api::scalar::StringMatch;

/// The delegate's entry under the root's: `None` if one of its matches is compatible with no match
/// of the root, which drops the whole entry.
pub(crate) fn merge(root: &HttpRoute, delegate: HttpRoute) -> Option<HttpRoute> {
    let matches = merge_matches(&root.matches, &delegate.matches)?;
    Some(HttpRoute {
        name: join(&root.name, &delegate.name),
        matches,
        delegate: None,
        rewrite: delegate.rewrite.or_else(|| root.rewrite.clone()),
        direct_response: delegate.direct_response.or_else(|| root.direct_response.clone()),
        timeout: delegate.timeout.or(root.timeout),
        retries: delegate.retries.or_else(|| root.retries.clone()),
        fault: delegate.fault.or_else(|| root.fault.clone()),
        mirror: delegate.mirror.or_else(|| root.mirror.clone()),
        mirrors: if delegate.mirrors.is_empty() { root.mirrors.clone() } else { delegate.mirrors },
        mirror_percent: delegate.mirror_percent.or(root.mirror_percent),
        mirror_percentage: delegate.mirror_percentage.or(root.mirror_percentage),
        cors_policy: delegate.cors_policy.or_else(|| root.cors_policy.clone()),
        headers: delegate.headers.or_else(|| root.headers.clone()),
        // The delegate's only.
        route: delegate.route,
        redirect: delegate.redirect,
    })
}

fn join(root: &str, delegate: &str) -> String {
    match (root, delegate) {
        ("", name) | (name, "") => name.to_owned(),
        (root, delegate) => format!("{root}-{delegate}"),
    }
}

fn merge_matches(root: &[HttpMatchRequest], delegate: &[HttpMatchRequest]) -> Option<Vec<HttpMatchRequest>> {
    if root.is_empty() {
        return Some(delegate.to_vec());
    }
    if delegate.is_empty() {
        return Some(root.to_vec());
    }
    let mut merged = Vec::new();
    for inner in delegate {
        let before = merged.len();
        merged.extend(root.iter().filter_map(|outer| merge_match(outer, inner)));
        if merged.len() == before {
            return None;
        }
    }
    Some(merged)
}

fn merge_match(root: &HttpMatchRequest, delegate: &HttpMatchRequest) -> Option<HttpMatchRequest> {
    let conflicts = root.ignore_uri_case != delegate.ignore_uri_case
        || (root.port != 0 && delegate.port != 0 && root.port != delegate.port)
        || (!root.source_namespace.is_empty() && root.source_namespace != delegate.source_namespace)
        || root
            .source_labels
            .iter()
            .any(|(key, value)| delegate.source_labels.get(key).is_some_and(|other| other != value))
        || !delegate.gateways.iter().all(|gateway| root.gateways.is_empty() || root.gateways.contains(gateway));
    if conflicts {
        return None;
    }
    let mut source_labels = root.source_labels.clone();
    source_labels.extend(delegate.source_labels.clone());
    Some(HttpMatchRequest {
        name: join(&root.name, &delegate.name),
        uri: merge_string(root.uri.as_ref(), delegate.uri.as_ref())?,
        scheme: merge_string(root.scheme.as_ref(), delegate.scheme.as_ref())?,
        method: merge_string(root.method.as_ref(), delegate.method.as_ref())?,
        authority: merge_string(root.authority.as_ref(), delegate.authority.as_ref())?,
        headers: merge_map(&root.headers, &delegate.headers)?,
        without_headers: merge_map(&root.without_headers, &delegate.without_headers)?,
        query_params: merge_map(&root.query_params, &delegate.query_params)?,
        port: if delegate.port != 0 { delegate.port } else { root.port },
        source_labels,
        gateways: if delegate.gateways.is_empty() { root.gateways.clone() } else { delegate.gateways.clone() },
        ignore_uri_case: delegate.ignore_uri_case,
        source_namespace: if delegate.source_namespace.is_empty() {
            root.source_namespace.clone()
        } else {
            delegate.source_namespace.clone()
        },
        stat_prefix: if delegate.stat_prefix.is_empty() {
            root.stat_prefix.clone()
        } else {
            delegate.stat_prefix.clone()
        },
    })
}

/// Outer `None`: they conflict.
#[expect(clippy::option_option, reason = "the outer option is the conflict, the inner one an absent match")]
fn merge_string(root: Option<&StringMatch>, delegate: Option<&StringMatch>) -> Option<Option<StringMatch>> {
    let (Some(outer), Some(inner)) = (root, delegate) else {
        return Some(delegate.or(root).cloned());
    };
    let fits = match (outer, inner) {
        (StringMatch::Exact(outer), StringMatch::Exact(inner)) => outer == inner,
        (StringMatch::Prefix(outer), StringMatch::Exact(inner) | StringMatch::Prefix(inner)) => {
            inner.starts_with(outer.as_str())
        }
        _ => false,
    };
    fits.then(|| Some(inner.clone()))
}

fn merge_map(
    root: &BTreeMap<String, StringMatch>,
    delegate: &BTreeMap<String, StringMatch>,
) -> Option<BTreeMap<String, StringMatch>> {
    let mut merged = root.clone();
    for (key, inner) in delegate {
        let value = merge_string(root.get(key), Some(inner))?.unwrap_or_else(|| inner.clone());
        merged.insert(key.clone(), value);
    }
    Some(merged)
}
