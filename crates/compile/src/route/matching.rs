//! Matches of an HTTP entry: those decided now, and those that the proxy decides per request.
//!
//! *Source*: `docs/parity.md`, Traffic 2.2.

use std::collections::BTreeMap;

use api::networking::HttpMatchRequest;
use api::scalar::StringMatch;
use envoy_types::pb::envoy::config::route::v3::{
    HeaderMatcher, QueryParameterMatcher, RouteMatch, header_matcher::HeaderMatchSpecifier, query_parameter_matcher,
    route_match,
};
use envoy_types::pb::envoy::r#type::matcher::v3::{
    MetadataMatcher, RegexMatcher, StringMatcher, ValueMatcher, value_matcher,
};
use types::Labels;

use crate::security::matchers;
use crate::wire::boolean;

/// Claims of a token, in place of a header's name.
const CLAIMS: &str = "@request.auth.claims";

/// Who asks, as far as known when compiling.
pub(crate) struct Source<'a> {
    pub(crate) labels: &'a Labels,
    pub(crate) namespace: &'a str,
    /// `mesh`, or the gateway objects (`namespace/name`) in effect.
    pub(crate) gateways: &'a [&'a str],
    /// Of the table.
    pub(crate) port: u16,
}

/// Whether an entry's match can hold for this proxy and table.
pub(super) fn fits_source(entry: &HttpMatchRequest, top_gateways_fit: bool, source: &Source<'_>) -> bool {
    if entry.port != 0 && entry.port != source.port {
        return false;
    }
    if !entry.gateways.is_empty() {
        // Istio ignores the client's labels and namespace then.
        return entry.gateways.iter().any(|gateway| source.gateways.contains(&gateway.as_str()));
    }
    top_gateways_fit
        && entry.source_labels.iter().all(|(key, value)| source.labels.get(key) == Some(value))
        && (entry.source_namespace.is_empty() || entry.source_namespace == source.namespace)
}

/// Whether nothing is asked of a request.
pub(super) fn is_catch_all(of: &RouteMatch) -> bool {
    let any_path = match &of.path_specifier {
        Some(route_match::PathSpecifier::Prefix(prefix)) => prefix == "/" || prefix.is_empty(),
        Some(route_match::PathSpecifier::SafeRegex(regex)) => regex.regex == "*" || regex.regex == ".*",
        _ => false,
    };
    any_path && of.headers.is_empty() && of.query_parameters.is_empty() && of.dynamic_metadata.is_empty()
}

/// What the proxy matches.
pub(super) fn route_match(entry: &HttpMatchRequest) -> RouteMatch {
    let mut out = RouteMatch {
        path_specifier: Some(path(entry.uri.as_ref())),
        case_sensitive: boolean(!entry.ignore_uri_case),
        query_parameters: entry.query_params.iter().map(|(name, value)| query(name, value)).collect(),
        ..RouteMatch::default()
    };
    // One order for both maps, by name.
    let mut named: BTreeMap<&str, Vec<(&StringMatch, bool)>> = BTreeMap::new();
    for (name, value) in &entry.headers {
        named.entry(name).or_default().push((value, false));
    }
    for (name, value) in &entry.without_headers {
        named.entry(name).or_default().push((value, true));
    }
    for (name, values) in named {
        for (value, inverted) in values {
            match claim_path(name) {
                Some(path) => out.dynamic_metadata.push(claim(&path, value, inverted)),
                None => out.headers.push(header(name, value, inverted)),
            }
        }
    }
    for (name, value) in [(":method", &entry.method), (":authority", &entry.authority), (":scheme", &entry.scheme)] {
        if let Some(value) = value {
            out.headers.push(header(name, value, false));
        }
    }
    out
}

fn path(uri: Option<&StringMatch>) -> route_match::PathSpecifier {
    match uri {
        None | Some(StringMatch::Present) => route_match::PathSpecifier::Prefix("/".into()),
        Some(StringMatch::Exact(path)) => route_match::PathSpecifier::Path(path.clone()),
        Some(StringMatch::Prefix(prefix)) => route_match::PathSpecifier::Prefix(prefix.clone()),
        Some(StringMatch::Regex(regex)) => {
            route_match::PathSpecifier::SafeRegex(RegexMatcher { regex: regex.clone(), ..RegexMatcher::default() })
        }
    }
}

/// `None`: present.
fn string(of: &StringMatch) -> Option<StringMatcher> {
    match of {
        StringMatch::Present => None,
        StringMatch::Exact(text) => Some(matchers::exact(text)),
        StringMatch::Prefix(text) => Some(matchers::prefix(text)),
        StringMatch::Regex(text) => Some(matchers::regex(text)),
    }
}

fn header(name: &str, value: &StringMatch, inverted: bool) -> HeaderMatcher {
    let specifier = string(value);
    HeaderMatcher {
        name: name.to_owned(),
        invert_match: inverted,
        // A missing header counts as empty, so "not 1" holds without it.
        treat_missing_header_as_empty: inverted && specifier.is_some(),
        header_match_specifier: Some(
            specifier.map_or(HeaderMatchSpecifier::PresentMatch(true), HeaderMatchSpecifier::StringMatch),
        ),
    }
}

fn query(name: &str, value: &StringMatch) -> QueryParameterMatcher {
    use query_parameter_matcher::QueryParameterMatchSpecifier;
    QueryParameterMatcher {
        name: name.to_owned(),
        query_parameter_match_specifier: Some(
            string(value)
                .map_or(QueryParameterMatchSpecifier::PresentMatch(true), QueryParameterMatchSpecifier::StringMatch),
        ),
    }
}

/// The path of a claim that a header's name stands for: `.a.b` by dots, or `[a][b]`.
pub(crate) fn claim_path(name: &str) -> Option<Vec<String>> {
    let head = name.get(..CLAIMS.len())?;
    if !head.eq_ignore_ascii_case(CLAIMS) {
        return None;
    }
    let rest = &name[CLAIMS.len()..];
    if let Some(dotted) = rest.strip_prefix('.') {
        return Some(dotted.split('.').map(str::to_owned).collect());
    }
    let parts = matchers::bracketed(rest)?;
    (!parts.is_empty()).then(|| parts.into_iter().map(str::to_owned).collect())
}

fn claim(path: &[String], value: &StringMatch, inverted: bool) -> MetadataMatcher {
    let path: Vec<&str> = std::iter::once("payload").chain(path.iter().map(String::as_str)).collect();
    let value = match string(value) {
        Some(matcher) => matchers::string_or_list_value(matcher),
        None => ValueMatcher { match_pattern: Some(value_matcher::MatchPattern::PresentMatch(true)) },
    };
    let mut matcher = matchers::metadata("envoy.filters.http.jwt_authn", &path, value);
    matcher.invert = inverted;
    matcher
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims() {
        for (name, expect) in [
            ("@request.auth.claims.a.b", Some(vec!["a", "b"])),
            ("@Request.Auth.Claims[a.x][b]", Some(vec!["a.x", "b"])),
            ("x-header", None),
            ("@request.auth.claims", None),
        ] {
            let expect: Option<Vec<String>> = expect.map(|parts| parts.into_iter().map(str::to_owned).collect());
            assert_eq!(claim_path(name), expect, "{name}");
        }
    }

    #[test]
    fn gateways_of_an_entry_replace_the_rest() {
        let labels = Labels::new();
        let source = Source { labels: &labels, namespace: "shop", gateways: &["mesh"], port: 80 };
        let mut entry =
            HttpMatchRequest { source_labels: [("app".to_owned(), "x".to_owned())].into(), ..Default::default() };
        assert!(!fits_source(&entry, true, &source));
        entry.gateways = vec!["mesh".into()];
        assert!(fits_source(&entry, false, &source));
        entry.gateways = vec!["a/b".into()];
        assert!(!fits_source(&entry, true, &source));
        let by_port = HttpMatchRequest { port: 81, ..Default::default() };
        assert!(!fits_source(&by_port, true, &source));
    }
}
