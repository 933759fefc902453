//! Policies as short text, for tests: `and`/`or` of one part are shown as the part.

use envoy_types::pb::envoy::config::core::v3::{CidrRange, TypedExtensionConfig};
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal, permission, principal};
use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::pb::envoy::r#type::matcher::v3::{
    MetadataMatcher, PathMatcher, StringMatcher, ValueMatcher, list_matcher, metadata_matcher, path_matcher,
    string_matcher, value_matcher,
};
use prost::Message as _;

/// `permissions <- principals`, alternatives joined by ` | `.
pub(crate) fn policy(policy: &Policy) -> String {
    let permissions: Vec<_> = policy.permissions.iter().map(permission).collect();
    let principals: Vec<_> = policy.principals.iter().map(principal).collect();
    format!("{} <- {}", permissions.join(" | "), principals.join(" | "))
}

fn set(word: &str, parts: &[String]) -> String {
    if let [only] = parts { only.clone() } else { format!("{word}({})", parts.join(", ")) }
}

pub(crate) fn permission(permission: &Permission) -> String {
    use permission::Rule;
    match permission.rule.as_ref().unwrap() {
        Rule::AndRules(all) => set("and", &all.rules.iter().map(self::permission).collect::<Vec<_>>()),
        Rule::OrRules(any) => set("or", &any.rules.iter().map(self::permission).collect::<Vec<_>>()),
        Rule::NotRule(not) => format!("not({})", self::permission(not)),
        Rule::Any(_) => "any".to_owned(),
        Rule::Header(header) => self::header(header),
        Rule::UrlPath(path) => self::path(path),
        Rule::UriTemplate(template) => self::template(template),
        Rule::DestinationPort(port) => format!("port={port}"),
        Rule::DestinationIp(range) => format!("to={}", cidr(range)),
        Rule::RequestedServerName(name) => format!("sni{}", string(name)),
        other => panic!("not rendered: {other:?}"),
    }
}

#[expect(deprecated, reason = "Istio sends the older field")]
pub(crate) fn principal(principal: &Principal) -> String {
    use principal::Identifier;
    match principal.identifier.as_ref().unwrap() {
        Identifier::AndIds(all) => set("and", &all.ids.iter().map(self::principal).collect::<Vec<_>>()),
        Identifier::OrIds(any) => set("or", &any.ids.iter().map(self::principal).collect::<Vec<_>>()),
        Identifier::NotId(not) => format!("not({})", self::principal(not)),
        Identifier::Any(_) => "any".to_owned(),
        Identifier::Authenticated(peer) => format!("peer{}", string(peer.principal_name.as_ref().unwrap())),
        Identifier::Header(header) => self::header(header),
        Identifier::DirectRemoteIp(range) => format!("ip={}", cidr(range)),
        Identifier::RemoteIp(range) => format!("remote={}", cidr(range)),
        Identifier::Metadata(metadata) => self::metadata(metadata),
        other => panic!("not rendered: {other:?}"),
    }
}

fn header(header: &HeaderMatcher) -> String {
    match header.header_match_specifier.as_ref().unwrap() {
        HeaderMatchSpecifier::PresentMatch(true) => format!("{}?", header.name),
        HeaderMatchSpecifier::StringMatch(matcher) => format!("{}{}", header.name, string(matcher)),
        other => panic!("not rendered: {other:?}"),
    }
}

fn path(path: &PathMatcher) -> String {
    let Some(path_matcher::Rule::Path(matcher)) = &path.rule else { panic!("no path") };
    format!("path{}", string(matcher))
}

fn template(template: &TypedExtensionConfig) -> String {
    let value = &template.typed_config.as_ref().unwrap().value;
    format!("template={}", UriTemplateMatchConfig::decode(value.as_slice()).unwrap().path_template)
}

fn cidr(range: &CidrRange) -> String {
    format!("{}/{}", range.address_prefix, range.prefix_len.unwrap().value)
}

fn metadata(matcher: &MetadataMatcher) -> String {
    let path: Vec<_> = matcher
        .path
        .iter()
        .map(|segment| {
            let metadata_matcher::path_segment::Segment::Key(key) = segment.segment.as_ref().unwrap();
            key.as_str()
        })
        .collect();
    let path = path.strip_prefix(&["payload"]).unwrap_or(&path);
    format!("{}{}", path.join("."), value(matcher.value.as_ref().unwrap()))
}

fn value(matcher: &ValueMatcher) -> String {
    use value_matcher::MatchPattern;
    match matcher.match_pattern.as_ref().unwrap() {
        MatchPattern::StringMatch(matcher) => string(matcher),
        MatchPattern::OrMatch(or) => {
            // `[=x]`: a string, or a list that holds it.
            let [list, single] = or.value_matchers.as_slice() else { panic!("two forms") };
            let Some(MatchPattern::ListMatch(list)) = &list.match_pattern else { panic!("a list first") };
            let Some(list_matcher::MatchPattern::OneOf(element)) = &list.match_pattern else { panic!("one of") };
            assert_eq!(value(element), value(single));
            format!("[{}]", value(single))
        }
        other => panic!("not rendered: {other:?}"),
    }
}

pub(crate) fn string(matcher: &StringMatcher) -> String {
    let case = if matcher.ignore_case { "/i" } else { "" };
    match matcher.match_pattern.as_ref().unwrap() {
        string_matcher::MatchPattern::Exact(text) => format!("={text}{case}"),
        string_matcher::MatchPattern::Prefix(text) => format!("={text}*{case}"),
        string_matcher::MatchPattern::Suffix(text) => format!("=*{text}{case}"),
        string_matcher::MatchPattern::SafeRegex(regex) => format!("~{}{case}", regex.regex),
        other => panic!("not rendered: {other:?}"),
    }
}
