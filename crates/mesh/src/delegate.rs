//! A root entry and a delegate's entry made into one.
//!
//! *Source*: `docs/parity.md`, Traffic 2.7.

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

#[cfg(test)]
mod tests {
    use super::*;

    const TO: &str = "route: [{destination: {host: d}}]";

    /// Reads an entry as YAML; [`TO`] is where it leads unless it says so.
    fn entry(yaml: &str) -> HttpRoute {
        let says = ["route:", "redirect:", "delegate:"].iter().any(|action| yaml.contains(action));
        let to = if says { String::new() } else { format!(", {TO}") };
        let text = format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v, namespace: shop}}\nspec: {{hosts: [h], gateways: [a, b], http: [{{{yaml}{to}}}]}}\n"
        );
        let documents = api::parse_documents("case.yaml", &text);
        assert!(documents.refused.is_empty(), "{yaml}: {:?}", documents.findings);
        let object = documents.one_after_another().next().unwrap();
        let api::Spec::VirtualService(spec) = &object.spec else { panic!("a VirtualService") };
        spec.http[0].clone()
    }

    fn matches(root: &str, delegate: &str) -> Option<Vec<HttpMatchRequest>> {
        merge(&entry(&format!("match: [{root}]")), entry(&format!("match: [{delegate}]"))).map(|merged| merged.matches)
    }

    #[track_caller]
    fn fits(root: &str, delegate: &str, expect: &str) {
        assert_eq!(matches(root, delegate), Some(entry(&format!("match: [{expect}]")).matches), "{root} | {delegate}");
    }

    #[track_caller]
    fn conflicts(root: &str, delegate: &str) {
        assert_eq!(matches(root, delegate), None, "{root} | {delegate}");
    }

    #[test]
    fn texts_narrow_or_conflict() {
        fits("{uri: {prefix: /a}}", "{}", "{uri: {prefix: /a}}");
        fits("{}", "{uri: {regex: /a.*}}", "{uri: {regex: /a.*}}");
        fits("{uri: {prefix: /a}}", "{uri: {prefix: /a/b}}", "{uri: {prefix: /a/b}}");
        fits("{uri: {prefix: /a}}", "{uri: {exact: /a/b}}", "{uri: {exact: /a/b}}");
        fits("{method: {exact: GET}}", "{method: {exact: GET}}", "{method: {exact: GET}}");
        conflicts("{uri: {prefix: /a}}", "{uri: {prefix: /b}}");
        conflicts("{uri: {exact: /a}}", "{uri: {prefix: /a}}");
        conflicts("{uri: {exact: /a}}", "{uri: {exact: /b}}");
        conflicts("{uri: {regex: /a}}", "{uri: {exact: /a}}");
        conflicts("{uri: {prefix: /a}}", "{uri: {regex: /a}}");
        conflicts("{scheme: {exact: http}}", "{scheme: {exact: https}}");
        conflicts("{authority: {exact: a}}", "{authority: {exact: b}}");
    }

    #[test]
    fn maps_are_united_and_shared_keys_compared() {
        for map in ["headers", "withoutHeaders", "queryParams"] {
            fits(
                &format!("{{{map}: {{a: {{exact: '1'}}, b: {{prefix: x}}}}}}"),
                &format!("{{{map}: {{b: {{exact: xy}}, c: {{exact: '2'}}}}}}"),
                &format!("{{{map}: {{a: {{exact: '1'}}, b: {{exact: xy}}, c: {{exact: '2'}}}}}}"),
            );
            conflicts(&format!("{{{map}: {{a: {{exact: '1'}}}}}}"), &format!("{{{map}: {{a: {{exact: '2'}}}}}}"));
        }
    }

    #[test]
    fn where_a_request_comes_from_and_which_port() {
        conflicts("{uri: {prefix: /a}, ignoreUriCase: true}", "{uri: {prefix: /a}}");
        fits("{port: 80}", "{uri: {exact: /a}}", "{port: 80, uri: {exact: /a}}");
        conflicts("{port: 80}", "{port: 81}");
        fits("{sourceNamespace: a}", "{sourceNamespace: a}", "{sourceNamespace: a}");
        conflicts("{sourceNamespace: a}", "{uri: {exact: /a}}");
        fits("{sourceLabels: {a: b}}", "{sourceLabels: {c: d}}", "{sourceLabels: {a: b, c: d}}");
        conflicts("{sourceLabels: {a: b}}", "{sourceLabels: {a: c}}");
        fits("{gateways: [a, b]}", "{gateways: [b]}", "{gateways: [b]}");
        conflicts("{gateways: [a]}", "{gateways: [b]}");
        fits("{name: r, statPrefix: s}", "{name: d}", "{name: r-d, statPrefix: s}");
    }

    #[test]
    fn every_match_of_a_delegate_needs_one_of_the_roots() {
        let root = "{uri: {prefix: /a}}, {uri: {prefix: /b}}";
        fits(root, "{uri: {prefix: /a/x}}", "{uri: {prefix: /a/x}}");
        fits(
            root,
            "{method: {exact: GET}}",
            "{uri: {prefix: /a}, method: {exact: GET}}, {uri: {prefix: /b}, method: {exact: GET}}",
        );
        conflicts(root, "{uri: {prefix: /a/x}}, {uri: {prefix: /c}}");
    }

    #[test]
    fn a_delegates_own_settings_win_and_the_rest_is_the_roots() {
        let settings = |n: u32| {
            format!(
                "name: r{n}, timeout: {n}s, retries: {{attempts: {n}}}, rewrite: {{uri: /{n}}}, \
                 fault: {{abort: {{httpStatus: 50{n}, percentage: {{value: 1}}}}}}, mirror: {{host: m{n}}}, \
                 mirrorPercentage: {{value: {n}}}, corsPolicy: {{maxAge: {n}s}}, headers: {{request: {{set: {{a: 'v{n}'}}}}}}"
            )
        };
        let merged = |root: &str, delegate: &str| {
            merge(&entry(&format!("{root}, delegate: {{name: d}}")), entry(delegate)).unwrap()
        };
        let whole = entry(&settings(2));
        let own = merged(&settings(1), &settings(2));
        assert_eq!(own, HttpRoute { name: "r1-r2".into(), ..whole.clone() }, "all its own");
        let inherited = merged(&settings(2), TO);
        assert_eq!(inherited, HttpRoute { name: "r2".into(), ..whole }, "all inherited");
        // Headers are one setting.
        let headers = merged("headers: {request: {set: {a: b}}}", "headers: {response: {set: {c: d}}}");
        assert_eq!(headers.headers, entry("headers: {response: {set: {c: d}}}").headers);
        // Where requests go is the delegate's to say.
        assert_eq!(merge(&entry("redirect: {uri: /x}"), entry(TO)).unwrap().redirect, None);
    }
}
