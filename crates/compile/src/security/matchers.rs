//! The small matchers that policies are made of.
//!
//! Source: `docs/parity.md`, Security 8.3 to 8.5; Envoy `type.matcher.v3`. Envoy's `safe_regex` matches whole
//! strings, so no pattern here is anchored.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::{CidrRange, TypedExtensionConfig};
use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::{PathSegment, path_segment};
use envoy_types::pb::envoy::r#type::matcher::v3::{
    ListMatcher, MetadataMatcher, OrMatcher, PathMatcher, RegexMatcher, StringMatcher, ValueMatcher, list_matcher,
    path_matcher, string_matcher, value_matcher,
};
use envoy_types::pb::google::protobuf::UInt32Value;
use envoy_types::util::pack_any;
use ipnet::IpNet;

/// The filter under whose name the verified payload of a token is found.
pub(crate) const JWT_FILTER: &str = "envoy.filters.http.jwt_authn";
/// The key of the verified payload there.
pub(crate) const JWT_PAYLOAD: &str = "payload";

/// `text` as a pattern that matches nothing but `text`.
pub(crate) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\\' | '.' | '+' | '*' | '?' | '(' | ')' | '|' | '[' | ']' | '{' | '}' | '^' | '$') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Equal.
pub(crate) fn exact(text: &str) -> StringMatcher {
    pattern(string_matcher::MatchPattern::Exact(text.to_owned()))
}

/// Starts with.
pub(crate) fn prefix(text: &str) -> StringMatcher {
    pattern(string_matcher::MatchPattern::Prefix(text.to_owned()))
}

/// Ends with.
pub(crate) fn suffix(text: &str) -> StringMatcher {
    pattern(string_matcher::MatchPattern::Suffix(text.to_owned()))
}

/// The whole string matches the pattern.
pub(crate) fn regex(text: &str) -> StringMatcher {
    let matcher = RegexMatcher { regex: text.to_owned(), engine_type: None };
    pattern(string_matcher::MatchPattern::SafeRegex(matcher))
}

fn pattern(pattern: string_matcher::MatchPattern) -> StringMatcher {
    StringMatcher { ignore_case: false, match_pattern: Some(pattern) }
}

/// A value of a policy: `*` (anything but nothing), `*x`, `x*`, or `x`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wild<'a> {
    /// `*`
    Any,
    /// `*x`
    Suffix(&'a str),
    /// `x*`
    Prefix(&'a str),
    /// `x`; a `*` in the middle is literal.
    Exact(&'a str),
}

impl<'a> Wild<'a> {
    /// Reads a value. A leading `*` wins over a trailing one, as in Istio.
    pub(crate) fn parse(text: &'a str) -> Self {
        if text == "*" {
            return Self::Any;
        }
        if let Some(rest) = text.strip_prefix('*') {
            return Self::Suffix(rest);
        }
        if let Some(rest) = text.strip_suffix('*') {
            return Self::Prefix(rest);
        }
        Self::Exact(text)
    }

    /// As a matcher.
    pub(crate) fn matcher(self) -> StringMatcher {
        match self {
            Self::Any => regex(".+"),
            Self::Suffix(text) => suffix(text),
            Self::Prefix(text) => prefix(text),
            Self::Exact(text) => exact(text),
        }
    }
}

/// A header holds the value; `*` asks for presence only.
pub(crate) fn header(name: &str, value: &str) -> HeaderMatcher {
    let specifier = match Wild::parse(value) {
        Wild::Any => HeaderMatchSpecifier::PresentMatch(true),
        other => HeaderMatchSpecifier::StringMatch(other.matcher()),
    };
    header_matcher(name, specifier)
}

fn header_matcher(name: &str, specifier: HeaderMatchSpecifier) -> HeaderMatcher {
    HeaderMatcher {
        name: name.to_owned(),
        invert_match: false,
        treat_missing_header_as_empty: false,
        header_match_specifier: Some(specifier),
    }
}

/// How far a host may differ from what was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HostScope {
    /// Istio's match: case aside, the authority as sent, port included.
    AsWritten,
    /// Also with any port and with a trailing dot: for matches that refuse, or that are asked
    /// about (property 10).
    AnyPort,
}

/// `:authority` is the host.
pub(crate) fn host(value: &str, scope: HostScope) -> HeaderMatcher {
    let wild = Wild::parse(value);
    let matcher = match (wild, scope) {
        (Wild::Any, _) => return header_matcher(":authority", HeaderMatchSpecifier::PresentMatch(true)),
        (Wild::Exact(host), HostScope::AnyPort) => regex(&wide_host("", host)),
        (Wild::Suffix(host), HostScope::AnyPort) => regex(&wide_host(".*", host)),
        (Wild::Prefix(_), _) | (_, HostScope::AsWritten) => StringMatcher { ignore_case: true, ..wild.matcher() },
    };
    header_matcher(":authority", HeaderMatchSpecifier::StringMatch(matcher))
}

/// A port that was written stays; without one, any will do.
fn wide_host(lead: &str, host: &str) -> String {
    let written_port = host
        .rsplit_once(':')
        .filter(|(name, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':'));
    match written_port {
        Some((name, port)) => format!("(?i){lead}{}\\.?:{port}", quote(name.trim_end_matches('.'))),
        None => format!("(?i){lead}{}\\.?(:[0-9]*)?", quote(host.trim_end_matches('.'))),
    }
}

/// Why a value cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum InvalidValue {
    /// Neither address nor block.
    #[error("{0:?} is neither an IP address nor a CIDR block")]
    Cidr(String),
    /// Not a port.
    #[error("{0:?} is not a port (0 to 65535)")]
    Port(String),
    /// A template outside its grammar.
    #[error(
        "{0:?} is not a path template: `{{*}}` and `{{**}}` stand for whole segments, `{{**}}` comes last, no other `*`, `{{` or `}}`"
    )]
    Template(String),
    /// Nothing between the quotes.
    #[error("an empty value matches nothing")]
    Empty,
    /// A service account outside its grammar.
    #[error("{0:?} is neither `account` nor `namespace/account`")]
    ServiceAccount(String),
    /// A slash in a trust domain.
    #[error("{0:?} is not a trust domain")]
    TrustDomain(String),
    /// An unknown condition.
    #[error("{0:?} is not a condition key")]
    Key(String),
    /// A condition known to Istio that cannot be judged here.
    #[error("condition {0:?} is not yet effective")]
    NotYet(String),
    /// A condition without values.
    #[error("condition {0:?} has neither values nor notValues")]
    NoValues(String),
    /// A token's attribute asked for before tokens are looked at.
    #[error("{0} is not known when a CUSTOM rule is judged")]
    TooEarly(&'static str),
}

/// `10.0.0.0/8`, `10.0.0.1`, `2001:db8::/32`.
pub(crate) fn cidr(text: &str) -> Result<CidrRange, InvalidValue> {
    let bad = || InvalidValue::Cidr(text.to_owned());
    let net = match text.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => IpNet::from(text.parse::<IpAddr>().map_err(|_| bad())?),
    };
    Ok(CidrRange {
        address_prefix: net.trunc().addr().to_string(),
        prefix_len: Some(UInt32Value { value: u32::from(net.prefix_len()) }),
    })
}

/// A port as text.
pub(crate) fn port(text: &str) -> Result<u32, InvalidValue> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<u16>() {
        Ok(port) if digits => Ok(u32::from(port)),
        _ => Err(InvalidValue::Port(text.to_owned())),
    }
}

/// What a path value is.
pub(crate) enum Path {
    /// Matched as a string, without query and fragment.
    Text(PathMatcher),
    /// Matched segment by segment.
    Template(TypedExtensionConfig),
}

/// A value of `paths`.
pub(crate) fn path(text: &str) -> Result<Path, InvalidValue> {
    if text.contains("{*}") || text.contains("{**}") {
        return template(text).map(Path::Template);
    }
    let rule = path_matcher::Rule::Path(Wild::parse(text).matcher());
    Ok(Path::Text(PathMatcher { rule: Some(rule) }))
}

/// Istio's template in Envoy's form: `{*}` is `*`, `{**}` is `**`.
fn template(text: &str) -> Result<TypedExtensionConfig, InvalidValue> {
    let bad = || InvalidValue::Template(text.to_owned());
    let rest = text.strip_prefix('/').ok_or_else(bad)?;
    let mut seen_rest = false;
    let mut segments = rest.split('/').peekable();
    while let Some(segment) = segments.next() {
        // Envoy refuses a whole listener for a template of other characters.
        let is_literal = segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&b));
        let is_last = segments.peek().is_none();
        let is_operator = match segment {
            "{*}" => true,
            "{**}" => {
                if seen_rest {
                    return Err(bad());
                }
                seen_rest = true;
                continue;
            }
            "" if !is_last => return Err(bad()),
            _ if !is_literal => return Err(bad()),
            _ => false,
        };
        if is_operator && seen_rest {
            return Err(bad());
        }
    }
    let config = UriTemplateMatchConfig { path_template: text.replace("{**}", "**").replace("{*}", "*") };
    Ok(TypedExtensionConfig { name: "uri-template".to_owned(), typed_config: Some(pack_any(config)) })
}

/// A value found in a filter's metadata.
pub(crate) fn metadata(filter: &str, path: &[&str], value: ValueMatcher) -> MetadataMatcher {
    MetadataMatcher {
        filter: filter.to_owned(),
        path: path
            .iter()
            .map(|key| PathSegment { segment: Some(path_segment::Segment::Key((*key).to_owned())) })
            .collect(),
        value: Some(value),
        invert: false,
    }
}

/// A string.
pub(crate) fn string_value(matcher: StringMatcher) -> ValueMatcher {
    ValueMatcher { match_pattern: Some(value_matcher::MatchPattern::StringMatch(matcher)) }
}

/// A string, or a list with it among its elements.
pub(crate) fn string_or_list_value(matcher: StringMatcher) -> ValueMatcher {
    let one_of = list_matcher::MatchPattern::OneOf(Box::new(string_value(matcher.clone())));
    let list = ValueMatcher {
        match_pattern: Some(value_matcher::MatchPattern::ListMatch(Box::new(ListMatcher {
            match_pattern: Some(one_of),
        }))),
    };
    let either = OrMatcher { value_matchers: vec![list, string_value(matcher)] };
    ValueMatcher { match_pattern: Some(value_matcher::MatchPattern::OrMatch(either)) }
}

/// A claim of the verified token, `claim[a][b]` given as its parts.
pub(crate) fn claim(parts: &[&str], matcher: StringMatcher) -> MetadataMatcher {
    let mut path = vec![JWT_PAYLOAD];
    path.extend_from_slice(parts);
    metadata(JWT_FILTER, &path, string_or_list_value(matcher))
}

/// One claim that is always a string (`iss`, `sub`).
pub(crate) fn string_claim(name: &str, matcher: StringMatcher) -> MetadataMatcher {
    metadata(JWT_FILTER, &[JWT_PAYLOAD, name], string_value(matcher))
}

/// `[a][b]` to its parts; `None` when brackets do not pair up, or one is empty.
pub(crate) fn bracketed(text: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let inner = rest.strip_prefix('[')?;
        let (part, after) = inner.split_once(']')?;
        if part.is_empty() || part.contains('[') {
            return None;
        }
        parts.push(part);
        rest = after;
    }
    (!parts.is_empty()).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards() {
        for (text, expect) in [
            ("*", Wild::Any),
            ("*x", Wild::Suffix("x")),
            ("x*", Wild::Prefix("x")),
            ("*x*", Wild::Suffix("x*")),
            ("a*b", Wild::Exact("a*b")),
        ] {
            assert_eq!(Wild::parse(text), expect, "{text}");
        }
    }

    #[test]
    fn templates() {
        for (text, expect) in [
            ("/allow/admin/{**}", Some("/allow/admin/**")),
            ("/store/{**}/cart", Some("/store/**/cart")),
            ("/foo/{*}/bar/{**}", Some("/foo/*/bar/**")),
            ("/{**}/a/{*}", None),
            ("/{**}/{**}", None),
            ("/a{*}", None),
            ("/a/*/{*}", None),
            ("/a/{b}/{*}", None),
            ("a/{*}", None),
            ("/a//{*}", None),
            ("/a b/{*}", None),
            ("/a?b/{*}", None),
            ("/\u{e4}/{*}", None),
            ("/a/{*}/", Some("/a/*/")),
            ("/a=%20'()!$&+,;:@~/{*}", Some("/a=%20'()!$&+,;:@~/*")),
        ] {
            let got = template(text).ok().and_then(|config| config.typed_config).map(|any| {
                use prost::Message as _;
                UriTemplateMatchConfig::decode(any.value.as_slice()).unwrap().path_template
            });
            assert_eq!(got.as_deref(), expect, "{text}");
        }
    }

    #[test]
    fn ports_and_blocks() {
        assert_eq!(port("0"), Ok(0));
        assert_eq!(port("65535"), Ok(65535));
        for bad in ["", "+80", "65536", "http", "-1", " 80"] {
            assert!(port(bad).is_err(), "{bad:?}");
        }
        let range = cidr("10.1.2.3/8").unwrap();
        assert_eq!((range.address_prefix.as_str(), range.prefix_len.unwrap().value), ("10.0.0.0", 8));
        assert_eq!(cidr("2001:db8::1").unwrap().prefix_len.unwrap().value, 128);
        assert!(cidr("10.0.0.0/33").is_err() && cidr("ten").is_err() && cidr("").is_err());
    }

    #[test]
    fn brackets() {
        assert_eq!(bracketed("[a][b]"), Some(vec!["a", "b"]));
        for bad in ["", "a", "[]", "[a", "[a]b", "[a]]", "[[a]]"] {
            assert_eq!(bracketed(bad), None, "{bad}");
        }
    }

    #[test]
    fn hosts_that_refuse_ignore_the_port() {
        let pattern = |host: &str| wide_host("", host);
        assert_eq!(pattern("a.com"), "(?i)a\\.com\\.?(:[0-9]*)?");
        assert_eq!(pattern("a.com:8080"), "(?i)a\\.com\\.?:8080");
        assert_eq!(pattern("a.com."), "(?i)a\\.com\\.?(:[0-9]*)?");
    }
}
