//! The decisions of `docs/parity.md`, Security 8, and that doubt never lets anybody in.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::r#type::matcher::v3 as m;
use envoy_types::pb::google::protobuf::UInt32Value;
use pb::permission::Rule;
use pb::principal::Identifier;
use proptest::prelude::*;
use serde_json::json;
use types::SpiffeId;

use super::*;
use crate::facts::{PeerCertificate, TlsFacts};

fn text(pattern: m::string_matcher::MatchPattern) -> m::StringMatcher {
    m::StringMatcher { ignore_case: false, match_pattern: Some(pattern) }
}

fn exact(value: &str) -> m::StringMatcher {
    text(m::string_matcher::MatchPattern::Exact(value.into()))
}

fn regex(value: &str) -> m::StringMatcher {
    text(m::string_matcher::MatchPattern::SafeRegex(m::RegexMatcher { regex: value.into(), engine_type: None }))
}

fn perm(rule: Rule) -> pb::Permission {
    pb::Permission { rule: Some(rule) }
}

fn id(identifier: Identifier) -> pb::Principal {
    pb::Principal { identifier: Some(identifier) }
}

fn on_header(name: &str, matcher: m::StringMatcher) -> Rule {
    Rule::Header(route::HeaderMatcher {
        name: name.into(),
        header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::StringMatch(matcher)),
        ..Default::default()
    })
}

fn path(matcher: m::StringMatcher) -> Rule {
    Rule::UrlPath(m::PathMatcher { rule: Some(m::path_matcher::Rule::Path(matcher)) })
}

fn not(rule: Rule) -> Rule {
    Rule::NotRule(Box::new(perm(rule)))
}

fn not_id(identifier: Identifier) -> Identifier {
    Identifier::NotId(Box::new(id(identifier)))
}

fn peer(matcher: m::StringMatcher) -> Identifier {
    Identifier::Authenticated(pb::principal::Authenticated { principal_name: Some(matcher) })
}

fn range(address: &str, length: u32) -> CidrRange {
    CidrRange { address_prefix: address.into(), prefix_len: Some(UInt32Value { value: length }) }
}

fn rules(action: pb::rbac::Action, policies: &[(&str, Rule, Identifier)]) -> Rules {
    let policies = policies
        .iter()
        .map(|(name, rule, identifier)| {
            let policy = pb::Policy {
                permissions: vec![perm(rule.clone())],
                principals: vec![id(identifier.clone())],
                ..Default::default()
            };
            ((*name).to_owned(), policy)
        })
        .collect::<HashMap<_, _>>();
    Rules::lower(&pb::Rbac { action: action as i32, policies, audit_logging_options: None }).unwrap()
}

fn allow(rule: Rule, identifier: Identifier) -> Rules {
    rules(pb::rbac::Action::Allow, &[("p", rule, identifier)])
}

fn deny(rule: Rule, identifier: Identifier) -> Rules {
    rules(pb::rbac::Action::Deny, &[("p", rule, identifier)])
}

fn plaintext() -> ConnFacts {
    ConnFacts::plaintext("virtualInbound", "10.0.0.9:9080".parse().unwrap(), "10.1.2.3:5555".parse().unwrap())
}

fn mtls(identity: &str) -> ConnFacts {
    let certificate = PeerCertificate { identity: SpiffeId::parse(identity).ok(), ..Default::default() };
    ConnFacts { tls: Some(Arc::new(TlsFacts { peer: Some(certificate), ..Default::default() })), ..plaintext() }
}

/// Asks about a request.
fn check(rules: &Rules, conn: &ConnFacts, head: &RequestHead, expect: bool) {
    let metadata = Metadata::new();
    let subject = Subject::request(conn, head, conn.peer_ip(), &metadata);
    assert_eq!(rules.decide(&subject).allowed, expect, "{rules:?}\n{head:?}");
}

fn get(path: &str) -> RequestHead {
    RequestHead::new("GET", "shop.example.com", path)
}

#[test]
fn nothing_and_everything() {
    let conn = plaintext();
    let nobody = Rules::lower(&pb::Rbac::default()).unwrap();
    check(&nobody, &conn, &get("/"), false);
    let empty_spec = allow(not(Rule::Any(true)), not_id(Identifier::Any(true)));
    check(&empty_spec, &conn, &get("/"), false);
    check(&allow(Rule::Any(true), Identifier::Any(true)), &conn, &get("/"), true);
    check(&deny(Rule::Any(true), Identifier::Any(true)), &conn, &get("/"), false);
    let no_deny = rules(pb::rbac::Action::Deny, &[]);
    check(&no_deny, &conn, &get("/"), true);
    let log = rules(pb::rbac::Action::Log, &[("p", Rule::Any(true), Identifier::Any(true))]);
    check(&log, &conn, &get("/"), true);
}

#[test]
fn the_verdict_names_the_first_policy_by_name() {
    let deny = rules(
        pb::rbac::Action::Deny,
        &[
            ("ns[b]-policy[two]-rule[0]", Rule::Any(true), Identifier::Any(true)),
            ("ns[a]-policy[one x]-rule[0]", Rule::Any(true), Identifier::Any(true)),
        ],
    );
    let (conn, head, metadata) = (plaintext(), get("/"), Metadata::new());
    let verdict = deny.decide(&Subject::request(&conn, &head, conn.peer_ip(), &metadata));
    assert_eq!(verdict.policy, Some("ns[a]-policy[one x]-rule[0]"));
    assert_eq!(verdict.details(), "ns[a]-policy[one_x]-rule[0]");
    let nobody = Rules::lower(&pb::Rbac::default()).unwrap();
    assert_eq!(nobody.decide(&Subject::request(&conn, &head, conn.peer_ip(), &metadata)).details(), "none");
}

#[test]
fn principals_are_mesh_identities_only() {
    let shop = mtls("spiffe://cluster.local/ns/shop/sa/web");
    let other = mtls("spiffe://cluster.local/ns/shop2/sa/web");
    let named = allow(Rule::Any(true), peer(exact("spiffe://cluster.local/ns/shop/sa/web")));
    check(&named, &shop, &get("/"), true);
    check(&named, &other, &get("/"), false);
    check(&named, &plaintext(), &get("/"), false);
    let namespace = allow(Rule::Any(true), peer(regex(".*/ns/shop/.*")));
    check(&namespace, &shop, &get("/"), true);
    check(&namespace, &other, &get("/"), false);
    let account = allow(Rule::Any(true), peer(regex("spiffe://.+/ns/shop/(.+/|)sa/web(/.+)?")));
    check(&account, &shop, &get("/"), true);
    check(&account, &other, &get("/"), false);
    // A certificate that is no mesh identity, whatever its other names say.
    let mut stranger = mtls("x");
    stranger.tls = Some(Arc::new(TlsFacts {
        peer: Some(PeerCertificate {
            identity: None,
            uri_sans: vec!["spiffe://cluster.local/ns/shop/sa/web/extra".into()],
            dns_sans: vec!["spiffe://cluster.local/ns/shop/sa/web".into()],
            subject: "CN=spiffe://cluster.local/ns/shop/sa/web".into(),
            ..Default::default()
        }),
        ..Default::default()
    }));
    check(&named, &stranger, &get("/"), false);
    let anybody = Identifier::Authenticated(pb::principal::Authenticated { principal_name: None });
    check(&allow(Rule::Any(true), anybody.clone()), &stranger, &get("/"), false);
    check(&allow(Rule::Any(true), anybody.clone()), &shop, &get("/"), true);
    check(&allow(Rule::Any(true), anybody), &plaintext(), &get("/"), false);
}

#[test]
fn a_negation_holds_for_the_absent() {
    // ALLOW notNamespaces admits plaintext; DENY notPrincipals * demands mutual TLS.
    check(&allow(Rule::Any(true), not_id(peer(regex(".*/ns/x/.*")))), &plaintext(), &get("/"), true);
    let must_be_mtls = deny(Rule::Any(true), not_id(peer(regex(".+"))));
    check(&must_be_mtls, &plaintext(), &get("/"), false);
    check(&must_be_mtls, &mtls("spiffe://td/ns/a/sa/b"), &get("/"), true);
}

#[test]
fn hosts() {
    let by_host = |pattern: &str| on_header(":authority", exact(pattern));
    let host = |authority: &str| RequestHead::new("GET", authority, "/");
    let conn = plaintext();
    for (authority, allowed, denied) in [
        ("h", true, true),
        ("H", true, true),
        ("h.", true, true),
        ("h:8080", false, true),
        ("H.:8080", false, true),
        ("hh", false, false),
        ("h:80:80", false, false),
        ("", false, false),
    ] {
        check(&allow(by_host("h"), Identifier::Any(true)), &conn, &host(authority), allowed);
        check(&deny(by_host("h"), Identifier::Any(true)), &conn, &host(authority), !denied);
        // notHosts: the opposite, and a doubt goes the other way.
        check(&allow(not(by_host("h")), Identifier::Any(true)), &conn, &host(authority), !denied);
        check(&deny(not(by_host("h")), Identifier::Any(true)), &conn, &host(authority), allowed);
    }
    check(&allow(by_host("h:8080"), Identifier::Any(true)), &conn, &host("h.:8080"), true);
    check(&deny(by_host("[::1]"), Identifier::Any(true)), &conn, &host("[::1]:80"), false);
    check(&allow(by_host("[::1]:80"), Identifier::Any(true)), &conn, &host("[::1]:80"), true);
}

#[test]
fn paths_and_methods() {
    let conn = plaintext();
    let info = allow(path(text(m::string_matcher::MatchPattern::Prefix("/info".into()))), Identifier::Any(true));
    check(&info, &conn, &get("/info/x?y"), true);
    check(&info, &conn, &get("/other"), false);
    check(&info, &conn, &get("/Info"), false);
    let exact_path = deny(path(exact("/admin")), Identifier::Any(true));
    check(&exact_path, &conn, &get("/admin?x=1"), false);
    check(&exact_path, &conn, &get("/admin#x"), false);
    check(&exact_path, &conn, &get("/admin/"), true);
    let post = deny(on_header(":method", exact("POST")), Identifier::Any(true));
    check(&post, &conn, &RequestHead::new("POST", "h", "/"), false);
    check(&post, &conn, &RequestHead::new("post", "h", "/"), true);
}

#[test]
fn repeated_headers() {
    let conn = plaintext();
    let mut head = get("/");
    head.fields.push("x-role", b"user");
    head.fields.push("x-role", b"evil");
    let role = |value: &str| on_header("X-Role", exact(value));
    check(&deny(role("evil"), Identifier::Any(true)), &conn, &head, false);
    check(&allow(role("user"), Identifier::Any(true)), &conn, &head, false);
    check(&allow(not(role("evil")), Identifier::Any(true)), &conn, &head, false);
    check(&deny(not(role("user")), Identifier::Any(true)), &conn, &head, false);
}

#[test]
fn addresses_and_ports() {
    let conn = ConnFacts { direct_peer: "192.168.0.1:1".parse().unwrap(), ..plaintext() };
    let (head, metadata) = (get("/"), Metadata::new());
    let remote = "203.0.113.7".parse().unwrap();
    let ask = |rule: Rule, identifier: Identifier| {
        allow(rule, identifier).decide(&Subject::request(&conn, &head, remote, &metadata)).allowed
    };
    assert!(ask(Rule::Any(true), Identifier::DirectRemoteIp(range("192.168.0.0", 16))));
    assert!(!ask(Rule::Any(true), Identifier::DirectRemoteIp(range("10.0.0.0", 8))));
    assert!(ask(Rule::Any(true), Identifier::SourceIp(range("10.0.0.0", 8))));
    assert!(ask(Rule::Any(true), Identifier::RemoteIp(range("203.0.113.0", 24))));
    assert!(ask(Rule::DestinationPort(9080), Identifier::Any(true)));
    assert!(!ask(Rule::DestinationPort(80), Identifier::Any(true)));
    assert!(ask(Rule::DestinationIp(range("10.0.0.9", 32)), Identifier::Any(true)));
    let ports = |start, end| envoy_types::pb::envoy::r#type::v3::Int32Range { start, end };
    assert!(ask(Rule::DestinationPortRange(ports(9080, 9081)), Identifier::Any(true)));
    assert!(!ask(Rule::DestinationPortRange(ports(9081, 9090)), Identifier::Any(true)));
}

#[test]
fn server_names_ignore_case() {
    let conn = ConnFacts { server_name: Some("a.example.com".into()), ..plaintext() };
    check(&allow(Rule::RequestedServerName(exact("A.Example.com")), Identifier::Any(true)), &conn, &get("/"), true);
    check(&allow(Rule::RequestedServerName(exact("x")), Identifier::Any(true)), &plaintext(), &get("/"), false);
}

#[test]
fn claims_come_from_metadata_only() {
    let claim = |key: &str, matcher| {
        Identifier::Metadata(m::MetadataMatcher {
            filter: "envoy.filters.http.jwt_authn".into(),
            path: ["payload", key]
                .map(|key| m::metadata_matcher::PathSegment {
                    segment: Some(m::metadata_matcher::path_segment::Segment::Key(key.into())),
                })
                .to_vec(),
            value: Some(m::ValueMatcher { match_pattern: Some(m::value_matcher::MatchPattern::StringMatch(matcher)) }),
            invert: false,
        })
    };
    let conn = plaintext();
    let mut head = get("/");
    head.fields.push("iss", b"me");
    let mut metadata = Metadata::new();
    let readers = allow(Rule::Any(true), claim("iss", exact("me")));
    let no_token = deny(Rule::Any(true), not_id(claim("iss", regex(".+"))));
    let reads = |metadata: &Metadata| readers.decide(&Subject::request(&conn, &head, conn.peer_ip(), metadata)).allowed;
    assert!(!reads(&metadata));
    assert!(!no_token.decide(&Subject::request(&conn, &head, conn.peer_ip(), &metadata)).allowed);
    metadata.set("envoy.filters.http.jwt_authn", "payload", Arc::new(json!({"iss": "me"})));
    assert!(reads(&metadata));
    assert!(no_token.decide(&Subject::request(&conn, &head, conn.peer_ip(), &metadata)).allowed);
}

#[test]
fn http_attributes_on_a_bare_connection_fail_closed() {
    let (conn, metadata) = (plaintext(), Metadata::new());
    for rule in [path(exact("/x")), on_header("x", exact("y")), on_header(":authority", exact("h"))] {
        for rule in [rule.clone(), not(rule)] {
            for (rules, expect) in [
                (allow(rule.clone(), Identifier::Any(true)), false),
                (deny(rule.clone(), Identifier::Any(true)), false),
            ] {
                let verdict = rules.decide(&Subject::connection(&conn, &metadata));
                assert_eq!(verdict.allowed, expect, "{rules:?}");
            }
        }
    }
    check(&allow(Rule::DestinationPort(9080), Identifier::Any(true)), &conn, &get("/"), true);
}

#[test]
fn shadow_rules_are_only_recorded() {
    let proto = |action: pb::rbac::Action| pb::Rbac {
        action: action as i32,
        policies: HashMap::from([(
            "istio-ext-authz-p-ns[a]-policy[b]-rule[0]".to_owned(),
            pb::Policy {
                permissions: vec![perm(Rule::Any(true))],
                principals: vec![id(Identifier::Any(true))],
                ..Default::default()
            },
        )]),
        audit_logging_options: None,
    };
    let filter = Rbac::lower(&http::Rbac {
        shadow_rules: Some(proto(pb::rbac::Action::Deny)),
        shadow_rules_stat_prefix: "istio_ext_authz_".into(),
        ..Default::default()
    })
    .unwrap();
    let (conn, head, mut metadata) = (plaintext(), get("/"), Metadata::new());
    let outcome = filter.evaluate(&Subject::request(&conn, &head, conn.peer_ip(), &metadata));
    assert_eq!(outcome.denied(), None);
    assert!(!outcome.shadow.unwrap().allowed);
    filter.record_shadow(&outcome, &mut metadata);
    let id = metadata.get(METADATA, "istio_ext_authz_shadow_effective_policy_id");
    assert_eq!(id, Some(&json!("istio-ext-authz-p-ns[a]-policy[b]-rule[0]")));
    assert_eq!(metadata.get(METADATA, "istio_ext_authz_shadow_engine_result"), Some(&json!("denied")));
}

#[test]
fn what_is_not_understood_is_refused() {
    let refused = |permission: pb::Permission, principal: pb::Principal, expect: &str| {
        let policy = pb::Policy { permissions: vec![permission], principals: vec![principal], ..Default::default() };
        let proto = pb::Rbac { policies: HashMap::from([("p".to_owned(), policy)]), ..Default::default() };
        assert_eq!(Rules::lower(&proto).unwrap_err().to_string(), expect);
    };
    let anybody = || id(Identifier::Any(true));
    refused(pb::Permission::default(), anybody(), "policies[p].permissions[0].rule must be set");
    refused(perm(Rule::Any(false)), anybody(), "policies[p].permissions[0].any must be true");
    refused(
        perm(Rule::Matcher(envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig::default())),
        anybody(),
        "policies[p].permissions[0].matcher is not supported",
    );
    refused(
        perm(Rule::Any(true)),
        id(not_id(Identifier::AndIds(pb::principal::Set { ids: vec![] }))),
        "policies[p].principals[0].not_id.and_ids.ids must be set",
    );
    let unknown = pb::Rbac { action: 9, ..Default::default() };
    assert!(Rules::lower(&unknown).is_err());
    let empty = pb::Rbac { policies: HashMap::from([("p".to_owned(), pb::Policy::default())]), ..Default::default() };
    assert!(Rules::lower(&empty).is_err());
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let leaf = prop_oneof![
        Just(Rule::Any(true)),
        "[ab]{1,2}".prop_map(|value| on_header("x", exact(&value))),
        "/[ab]{0,2}".prop_map(|value| path(exact(&value))),
        Just(on_header(":authority", exact("h"))),
        Just(Rule::DestinationPort(9080)),
    ];
    leaf.prop_recursive(4, 24, 3, |inner| {
        prop_oneof![
            inner.clone().prop_map(not),
            proptest::collection::vec(inner.clone(), 1..4)
                .prop_map(|rules| Rule::AndRules(pb::permission::Set { rules: rules.into_iter().map(perm).collect() })),
            proptest::collection::vec(inner, 1..4)
                .prop_map(|rules| Rule::OrRules(pb::permission::Set { rules: rules.into_iter().map(perm).collect() })),
        ]
    })
}

proptest! {
    /// Whatever the rule, an ALLOW never admits what the same DENY would not have caught: the
    /// strict reading is within the wide one, negations included.
    #[test]
    fn allow_is_within_deny(rule in any_rule(), values in proptest::collection::vec("[ab]{1,2}", 0..3), host in "h|h:1|H\\.|x", path in "/[ab]{0,2}", bare: bool) {
        let (conn, metadata) = (plaintext(), Metadata::new());
        let mut head = RequestHead::new("GET", &host, &path);
        for value in &values {
            head.fields.push("x", value.as_bytes());
        }
        let subject = if bare { Subject::connection(&conn, &metadata) } else { Subject::request(&conn, &head, conn.peer_ip(), &metadata) };
        let allowed = allow(rule.clone(), Identifier::Any(true)).decide(&subject).allowed;
        let denied = !deny(rule, Identifier::Any(true)).decide(&subject).allowed;
        prop_assert!(!allowed || denied);
    }

    /// The opposite of a rule never admits together with the rule.
    #[test]
    fn a_rule_and_its_opposite_exclude_each_other(rule in any_rule(), values in proptest::collection::vec("[ab]{1,2}", 0..3), host in "h|h:1|x") {
        let (conn, metadata) = (plaintext(), Metadata::new());
        let mut head = RequestHead::new("GET", &host, "/a");
        for value in &values {
            head.fields.push("x", value.as_bytes());
        }
        let subject = Subject::request(&conn, &head, conn.peer_ip(), &metadata);
        let yes = allow(rule.clone(), Identifier::Any(true)).decide(&subject).allowed;
        let no = allow(not(rule), Identifier::Any(true)).decide(&subject).allowed;
        prop_assert!(!(yes && no));
    }
}
