#![expect(clippy::needless_pass_by_value, reason = "cases read better without borrows")]

use super::*;
use crate::security::render;
use serde_json::json;

fn policy_text(rule: &serde_json::Value, verdict: Verdict, transport: Transport, domains: &[&str]) -> String {
    let rule: Rule = serde_json::from_value(rule.clone()).unwrap();
    let trust_domains: Vec<String> = domains.iter().map(|domain| (*domain).to_owned()).collect();
    let scope = Scope { namespace: "shop", trust_domains: &trust_domains };
    let compiled = compile(&rule, verdict, transport, scope);
    let text = compiled.policy.as_ref().map_or_else(|| "nothing".to_owned(), render::policy);
    if compiled.problems.is_empty() { text } else { format!("{text} !") }
}

/// One rule, four ways: ALLOW and DENY, over HTTP and TCP. `=` repeats the line above.
fn check(rule: serde_json::Value, allow: &str, deny: &str, allow_tcp: &str, deny_tcp: &str) {
    let domains = ["cluster.local"];
    let mut above = String::new();
    for (verdict, transport, expect) in [
        (Verdict::Grants, Transport::Http, allow),
        (Verdict::Refuses, Transport::Http, deny),
        (Verdict::Grants, Transport::Tcp, allow_tcp),
        (Verdict::Refuses, Transport::Tcp, deny_tcp),
    ] {
        if expect != "=" {
            expect.clone_into(&mut above);
        }
        assert_eq!(policy_text(&rule, verdict, transport, &domains), above, "{verdict:?} {transport:?} {rule}");
    }
}

/// A rule that means the same in ALLOW and DENY, and for TCP.
fn check_l4(rule: serde_json::Value, expect: &str) {
    check(rule, expect, "=", "=", "=");
}

/// A rule over an attribute of HTTP alone.
fn check_http(rule: serde_json::Value, expect: &str) {
    check(rule, expect, "=", "nothing", "any <- any");
}

fn source(source: serde_json::Value) -> serde_json::Value {
    json!({"from": [{"source": source}]})
}

fn operation(operation: serde_json::Value) -> serde_json::Value {
    json!({"to": [{"operation": operation}]})
}

fn when(key: &str, values: &[&str]) -> serde_json::Value {
    json!({"when": [{"key": key, "values": values}]})
}

fn when_not(key: &str, values: &[&str]) -> serde_json::Value {
    json!({"when": [{"key": key, "notValues": values}]})
}

// `docs/parity.md`, Security 8.2

#[test]
fn an_empty_rule_matches_everything() {
    check_l4(json!({}), "any <- any");
    assert_eq!(render::policy(&nothing()), "not(any) <- not(any)");
}

#[test]
fn values_or_fields_and_entries_or() {
    check_l4(
        json!({
            "from": [
                {"source": {"ipBlocks": ["10.0.0.0/8", "192.0.2.1"], "namespaces": ["a"]}},
                {"source": {"notIpBlocks": ["10.0.0.1"]}},
            ],
            "to": [{"operation": {"ports": ["80", "81"]}}, {"operation": {"notPorts": ["82", "83"]}}],
            "when": [{"key": "destination.ip", "values": ["10.0.0.9"]}, {"key": "source.ip", "notValues": ["10.0.0.2"]}],
        }),
        "and(or(port=80, port=81), to=10.0.0.9/32) | and(not(or(port=82, port=83)), to=10.0.0.9/32) <- \
         and(peer~spiffe://[^/]+/ns/a/sa/[^/]+, or(ip=10.0.0.0/8, ip=192.0.2.1/32), not(ip=10.0.0.2/32)) | \
         and(not(ip=10.0.0.1/32), not(ip=10.0.0.2/32))",
    );
}

#[test]
fn both_signs_of_a_field_hold_together() {
    check_http(
        operation(json!({"paths": ["/a*"], "notPaths": ["/a/b"], "methods": ["GET"], "notMethods": ["PUT"]})),
        "and(:method=GET, not(:method=PUT), path=/a*, not(path=/a/b)) <- any",
    );
}

// `docs/parity.md`, Security 8.3

#[test]
fn principals() {
    for (value, expect) in [
        ("cluster.local/ns/shop/sa/a", "any <- peer=spiffe://cluster.local/ns/shop/sa/a"),
        ("spiffe-td/*", "any <- peer=spiffe://spiffe-td/*"),
        ("*/sa/evil", "any <- peer~spiffe://.*/sa/evil"),
        ("*/ns/evil/sa/*", "any <- peer~spiffe://.*/ns/evil/sa/\\*"),
        ("*", "any <- peer~spiffe://.+"),
    ] {
        check_l4(source(json!({"principals": [value]})), expect);
        check_l4(when("source.principal", &[value]), expect);
    }
    check_l4(source(json!({"notPrincipals": ["*"]})), "any <- not(peer~spiffe://.+)");
}

#[test]
fn namespaces_and_accounts_are_compared_by_position() {
    check_l4(source(json!({"namespaces": ["a.b"]})), "any <- peer~spiffe://[^/]+/ns/a\\.b/sa/[^/]+");
    check_l4(source(json!({"namespaces": ["team-*"]})), "any <- peer~spiffe://[^/]+/ns/team-[^/]*/sa/[^/]+");
    check_l4(source(json!({"notNamespaces": ["x"]})), "any <- not(peer~spiffe://[^/]+/ns/x/sa/[^/]+)");
    check_l4(when("source.namespace", &["x"]), "any <- peer~spiffe://[^/]+/ns/x/sa/[^/]+");
    check_l4(
        source(json!({"serviceAccounts": ["reviews", "legacy/http.bin"]})),
        "any <- or(peer~spiffe://[^/]+/ns/shop/sa/reviews, peer~spiffe://[^/]+/ns/legacy/sa/http\\.bin)",
    );
    check_l4(when("source.serviceAccount", &["legacy/a"]), "any <- peer~spiffe://[^/]+/ns/legacy/sa/a");
    for bad in ["a/b/c", "*", "a*", "/a", "a/"] {
        check(source(json!({"serviceAccounts": [bad]})), "nothing !", "any <- any !", "nothing !", "any <- any !");
    }
}

#[test]
fn trust_domains() {
    check_l4(source(json!({"trustDomains": ["td"]})), "any <- peer=spiffe://td/*");
    check_l4(source(json!({"trustDomains": ["td*"]})), "any <- peer=spiffe://td*");
    check_l4(source(json!({"trustDomains": ["*td"]})), "any <- peer~spiffe://[^/]*td/.*");
    check_l4(source(json!({"notTrustDomains": ["*"]})), "any <- not(peer~spiffe://.+)");
    check_l4(when("source.trustDomain", &["td"]), "any <- peer=spiffe://td/*");
    check(source(json!({"trustDomains": ["a/b"]})), "nothing !", "any <- any !", "nothing !", "any <- any !");
}

#[test]
fn request_principals_split_at_the_last_slash() {
    for (value, expect) in [
        ("https://id/sub", "any <- and(iss=https://id, sub=sub)"),
        ("https://id/*", "any <- and(iss=https://id, sub~.+)"),
        ("https://id/su*", "any <- and(iss=https://id, sub=su*)"),
        ("*/sub", "any <- and(iss~.+, sub=sub)"),
        ("*.org/sub", "any <- and(iss=*.org, sub=sub)"),
        ("*", "any <- and(iss~.+, sub~.+)"),
        ("*ub", "any <- and(iss~.+, sub=*ub)"),
        ("http*", "any <- and(iss=http*, sub~.+)"),
        ("sub", "any <- and(iss=, sub=sub)"),
    ] {
        check_http(source(json!({"requestPrincipals": [value]})), expect);
        check_http(when("request.auth.principal", &[value]), expect);
    }
    check_http(source(json!({"notRequestPrincipals": ["*"]})), "any <- not(and(iss~.+, sub~.+))");
    check_http(source(json!({"requestPrincipals": ["a/b", "c/d"]})), "any <- or(and(iss=a, sub=b), and(iss=c, sub=d))");
}

#[test]
fn addresses() {
    check_l4(source(json!({"ipBlocks": ["10.1.2.3/8"]})), "any <- ip=10.0.0.0/8");
    check_l4(source(json!({"remoteIpBlocks": ["2001:db8::/32"]})), "any <- remote=2001:db8::/32");
    check_l4(source(json!({"notRemoteIpBlocks": ["1.2.3.4"]})), "any <- not(remote=1.2.3.4/32)");
    check_l4(when("remote.ip", &["1.2.3.4"]), "any <- remote=1.2.3.4/32");
    for field in ["ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks"] {
        check(source(json!({field: ["10.0.0.0/99"]})), "nothing !", "any <- any !", "nothing !", "any <- any !");
    }
}

// `docs/parity.md`, Security 8.4

#[test]
fn hosts_ignore_the_port_where_a_match_refuses() {
    let wide = "(?i)a\\.com\\.?(:[0-9]*)?";
    check(
        operation(json!({"hosts": ["A.com"]})),
        ":authority=A.com/i <- any",
        ":authority~(?i)A\\.com\\.?(:[0-9]*)? <- any",
        "nothing",
        "any <- any",
    );
    check(
        operation(json!({"notHosts": ["a.com"]})),
        &format!("not(:authority~{wide}) <- any"),
        "not(:authority=a.com/i) <- any",
        "nothing",
        "any <- any",
    );
    check(
        operation(json!({"hosts": ["*.a.com", "b.com:8080"]})),
        "or(:authority=*.a.com/i, :authority=b.com:8080/i) <- any",
        "or(:authority~(?i).*\\.a\\.com\\.?(:[0-9]*)?, :authority~(?i)b\\.com\\.?:8080) <- any",
        "nothing",
        "any <- any",
    );
    check_http(operation(json!({"hosts": ["a.com:*"]})), ":authority=a.com:*/i <- any");
    check_http(operation(json!({"hosts": ["*"]})), ":authority? <- any");
}

#[test]
fn ports_methods_paths() {
    check_l4(operation(json!({"ports": ["9080"]})), "port=9080 <- any");
    check_l4(operation(json!({"notPorts": ["9080"]})), "not(port=9080) <- any");
    for bad in ["http", "65536", "", "-1"] {
        check(operation(json!({"ports": [bad]})), "nothing !", "any <- any !", "nothing !", "any <- any !");
    }
    check_http(operation(json!({"methods": ["GET", "*", "PO*"]})), "or(:method=GET, :method?, :method=PO*) <- any");
    check_http(
        operation(json!({"paths": ["/a", "/b*", "*/c", "*"]})),
        "or(path=/a, path=/b*, path=*/c, path~.+) <- any",
    );
    check_http(
        operation(json!({"paths": ["/static/{*}/x", "/api/{**}"]})),
        "or(template=/static/*/x, template=/api/**) <- any",
    );
    check(operation(json!({"paths": ["/a/{**}/{*}"]})), "nothing !", "any <- any !", "nothing !", "any <- any !");
}

#[test]
fn empty_sources_and_operations_fail_closed() {
    for rule in [
        json!({"from": [{}]}),
        json!({"to": [{}]}),
        json!({"from": [{"source": {}}]}),
        json!({"to": [{"operation": {}}]}),
        json!({"to": [{"operation": {"methods": [""]}}]}),
    ] {
        check(rule, "nothing !", "any <- any !", "nothing !", "any <- any !");
    }
}

// `docs/parity.md`, Security 8.5

#[test]
fn conditions() {
    check_http(when("request.headers[X-Tier]", &["free", "*"]), "any <- or(x-tier=free, x-tier?)");
    check_http(when_not("request.headers[x]", &["a*"]), "any <- not(x=a*)");
    check_http(when("request.auth.audiences", &["shop"]), "any <- aud[=shop]");
    check_http(when("request.auth.presenter", &["me"]), "any <- azp[=me]");
    check_http(when("request.auth.claims[groups]", &["a", "b*"]), "any <- or(groups[=a], groups[=b*])");
    check_http(when("request.auth.claims[org][name]", &["x"]), "any <- org.name[=x]");
    check_http(when_not("request.auth.claims[iss]", &["x"]), "any <- not(iss[=x])");
    check_l4(when("source.ip", &["10.0.0.0/8"]), "any <- ip=10.0.0.0/8");
    check_l4(when("destination.ip", &["10.0.0.0/8"]), "to=10.0.0.0/8 <- any");
    check_l4(when("destination.port", &["80"]), "port=80 <- any");
    check_l4(when_not("connection.sni", &["*.bad.example.com"]), "not(sni=*.bad.example.com) <- any");
    check_l4(when("connection.sni", &["a.com"]), "sni=a.com <- any");
    for rule in [
        when("destination.labels[a]", &["x"]),
        when("request.headers", &["x"]),
        when("request.headers[]", &["x"]),
        when("request.headers[a][b]", &["x"]),
        when("request.headers[a b]", &["x"]),
        when("request.auth.claims[a", &["x"]),
        when("experimental.envoy.filters.network.mysql_proxy[db.table]", &["[x]"]),
        when("source.ip", &[]),
    ] {
        check(rule, "nothing !", "any <- any !", "nothing !", "any <- any !");
    }
}

// `docs/parity.md`, Security 8.6

#[test]
fn attributes_of_http_on_tcp() {
    check(
        json!({
            "to": [{"operation": {"methods": ["POST"], "ports": ["9000"]}}],
            "when": [{"key": "destination.port", "values": ["9100"]}],
        }),
        "and(:method=POST, port=9000, port=9100) <- any",
        "=",
        "nothing",
        "and(port=9000, port=9100) <- any",
    );
    check(
        source(json!({"notRequestPrincipals": ["*"], "remoteIpBlocks": ["203.0.113.0/24"]})),
        "any <- and(not(and(iss~.+, sub~.+)), remote=203.0.113.0/24)",
        "=",
        "nothing",
        "any <- remote=203.0.113.0/24",
    );
}

// `docs/parity.md`, Security 8.8

#[test]
fn trust_domain_aliases() {
    let check = |rule: serde_json::Value, expect: &str| {
        assert_eq!(policy_text(&rule, Verdict::Grants, Transport::Http, &["new-td", "old-td"]), expect, "{rule}");
    };
    let both = "any <- or(peer=spiffe://new-td/ns/a/sa/b, peer=spiffe://old-td/ns/a/sa/b)";
    for domain in ["new-td", "old-td", "cluster.local"] {
        check(source(json!({"principals": [format!("{domain}/ns/a/sa/b")]})), both);
    }
    check(source(json!({"principals": ["*-td/ns/a/sa/b"]})), "any <- peer~spiffe://.*-td/ns/a/sa/b");
    check(
        source(json!({"principals": ["*w-td/ns/a/sa/b"]})),
        "any <- or(peer~spiffe://.*w-td/ns/a/sa/b, peer=spiffe://old-td/ns/a/sa/b)",
    );
    check(source(json!({"principals": ["*/ns/a/sa/b"]})), "any <- peer~spiffe://.*/ns/a/sa/b");
    check(source(json!({"principals": ["other/ns/a/sa/b"]})), "any <- peer=spiffe://other/ns/a/sa/b");
    check(source(json!({"principals": ["cluster.local/*"]})), "any <- peer=spiffe://cluster.local/*");
    check(source(json!({"trustDomains": ["old-td"]})), "any <- or(peer=spiffe://new-td/*, peer=spiffe://old-td/*)");
    check(source(json!({"trustDomains": ["x"]})), "any <- peer=spiffe://x/*");
}

// `docs/parity.md`, Security 8.10

#[test]
fn a_custom_rule_over_what_is_not_known_yet_asks_about_everything() {
    for rule in [
        source(json!({"principals": ["*"]})),
        source(json!({"notNamespaces": ["a"]})),
        source(json!({"serviceAccounts": ["a"]})),
        source(json!({"trustDomains": ["a"]})),
        source(json!({"requestPrincipals": ["*"]})),
        when("request.auth.claims[a]", &["b"]),
        when("source.principal", &["b"]),
    ] {
        let got = policy_text(&rule, Verdict::Asks, Transport::Http, &["cluster.local"]);
        assert_eq!(got, "any <- any !", "{rule}");
    }
    let paths = operation(json!({"paths": ["/api/*"]}));
    assert_eq!(policy_text(&paths, Verdict::Asks, Transport::Http, &[]), "path=/api/* <- any");
}

mod fail_closed {
    //! No rule with a value that cannot be judged ever allows more.

    use super::*;
    use proptest::prelude::*;

    /// Field, and a value of it that cannot be judged.
    fn bad_field() -> impl Strategy<Value = (bool, &'static str, &'static str)> {
        prop_oneof![
            Just((true, "ipBlocks", "not an ip")),
            Just((true, "notIpBlocks", "10.0.0.0/33")),
            Just((true, "remoteIpBlocks", "")),
            Just((true, "notRemoteIpBlocks", "::/129")),
            Just((true, "serviceAccounts", "a/b/c")),
            Just((true, "trustDomains", "a/b")),
            Just((true, "notPrincipals", "")),
            Just((false, "ports", "http")),
            Just((false, "notPorts", "70000")),
            Just((false, "paths", "/{*}x")),
            Just((false, "notPaths", "/{**}/{**}")),
            Just((false, "methods", "")),
        ]
    }

    fn good_source() -> impl Strategy<Value = serde_json::Value> {
        prop_oneof![
            Just(json!({"principals": ["*"]})),
            Just(json!({"notNamespaces": ["a", "b*"]})),
            Just(json!({"requestPrincipals": ["a/b"]})),
            Just(json!({"ipBlocks": ["10.0.0.0/8"]})),
        ]
    }

    fn good_operation() -> impl Strategy<Value = serde_json::Value> {
        prop_oneof![
            Just(json!({"paths": ["/a*"], "notMethods": ["GET"]})),
            Just(json!({"ports": ["80"]})),
            Just(json!({"notHosts": ["a.com"]})),
        ]
    }

    proptest! {
        #[test]
        fn never_allows_more(
            mut sources in proptest::collection::vec(good_source(), 0..3),
            mut operations in proptest::collection::vec(good_operation(), 0..3),
            (in_source, field, value) in bad_field(),
            place in 0_usize..4,
        ) {
            let list = if in_source { &mut sources } else { &mut operations };
            list.insert(place.min(list.len()), json!({field: ["ok-or-not", value]}));
            let rule = json!({
                "from": sources.iter().map(|s| json!({"source": s})).collect::<Vec<_>>(),
                "to": operations.iter().map(|o| json!({"operation": o})).collect::<Vec<_>>(),
            });
            for transport in [Transport::Http, Transport::Tcp] {
                prop_assert_eq!(policy_text(&rule, Verdict::Grants, transport, &["cluster.local"]), "nothing !");
                for verdict in [Verdict::Refuses, Verdict::Asks] {
                    prop_assert_eq!(policy_text(&rule, verdict, transport, &["cluster.local"]), "any <- any !");
                }
            }
        }
    }
}
