//! AuthorizationPolicy.

use std::io::Write as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{Applied, Mesh, Puppet, Response, eventually};

use crate::apps::{PUPPET, SECURITY};

const HTTPBIN: &str = "http://httpbin.foo:8000";
const DENIED: (u16, &str) = (403, "RBAC: access denied");

fn policy(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: foo}}\nspec:\n  selector: {{matchLabels: {{app: httpbin}}}}\n{spec}\n"
    )
}

fn ask(mesh: &Mesh, whence: &str, args: &[&str], path: &str) -> (u16, String) {
    let url = format!("{HTTPBIN}{path}");
    let mut all = args.to_vec();
    all.push("--path-as-is");
    all.push(&url);
    let answer = mesh.curl(whence, &all);
    (answer.status, answer.body)
}

#[track_caller]
fn check(mesh: &Mesh, whence: &str, args: &[&str], path: &str, is_allowed: bool) {
    let (status, body) = ask(mesh, whence, args, path);
    if is_allowed {
        assert_eq!(status, 200, "{whence} {args:?} {path}: {body}");
    } else {
        assert_eq!((status, body.as_str()), DENIED, "{whence} {args:?} {path}");
    }
}

#[test]
fn a_path_is_denied_from_outside_and_allowed_inside() {
    let mesh = SECURITY.turn();
    let _policy = mesh.with(&policy(
        "outside",
        "  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/istio-system/sa/istio-ingressgateway-service-account]}}]
    to: [{operation: {paths: [/headers]}}]",
    ));
    let outside = mesh.get("httpbin.foo.test", "/headers", &[]);
    assert_eq!((outside.status, outside.body.as_str()), DENIED);
    assert_eq!(mesh.get("httpbin.foo.test", "/get", &[]).status, 200);
    check(&mesh, "foo/curl", &[], "/headers", true);
}

/// Whatever port of the machine leads to a gateway: its policies, like Istio's, know its own.
#[test]
fn policies_of_a_gateway_know_its_own_port() {
    let mesh = SECURITY.turn();
    let deny = |port: u16| {
        format!(
            "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: port, namespace: istio-system}}
spec:
  selector: {{matchLabels: {{istio: ingressgateway}}}}
  action: DENY
  rules: [{{to: [{{operation: {{ports: [\"{port}\"]}}}}]}}]
"
        )
    };
    let _policy = mesh.with(&deny(8080));
    let outside = mesh.get("httpbin.foo.test", "/get", &[]);
    assert_eq!((outside.status, outside.body.as_str()), DENIED);
    mesh.apply(&deny(mesh.http.port()));
    assert_eq!(mesh.get("httpbin.foo.test", "/get", &[]).status, 200);
}

#[test]
fn paths_are_normalised_before_policies_see_them() {
    let mesh = SECURITY.turn();
    let _policy = mesh.with(&policy("paths", "  action: DENY\n  rules: [{to: [{operation: {paths: [/headers]}}]}]"));
    check(&mesh, "foo/curl", &[], "/headers", false);
    check(&mesh, "foo/curl", &[], "/headers?a=b", false);
    check(&mesh, "foo/curl", &[], "/a/../headers", false);
    check(&mesh, "foo/curl", &[], "/./headers", false);
    check(&mesh, "foo/curl", &[], "/get", true);
}

#[test]
fn who_asks_how_and_with_what_decides() {
    let mesh = SECURITY.turn();
    let allow = |rule: &str| policy("allow", &format!("  action: ALLOW\n  rules:\n  - {rule}"));
    let _policy = mesh.with(&allow("from: [{source: {principals: [cluster.local/ns/bar/sa/curl]}}]"));
    check(&mesh, "bar/curl", &[], "/get", true);
    check(&mesh, "foo/curl", &[], "/get", false);
    check(&mesh, "legacy/curl", &[], "/get", false);

    mesh.apply(&allow("from: [{source: {namespaces: [foo]}}]"));
    check(&mesh, "foo/curl", &[], "/get", true);
    check(&mesh, "bar/curl", &[], "/get", false);

    mesh.apply(&allow("to: [{operation: {methods: [GET], paths: [/get, \"/status/*\"]}}]"));
    check(&mesh, "legacy/curl", &[], "/get", true);
    check(&mesh, "legacy/curl", &[], "/status/200", true);
    check(&mesh, "legacy/curl", &[], "/headers", false);
    check(&mesh, "legacy/curl", &["-X", "POST"], "/get", false);

    mesh.apply(&allow("when: [{key: \"request.headers[x-key]\", values: [\"open*\"]}]"));
    check(&mesh, "bar/curl", &["-H", "x-key: opensesame"], "/get", true);
    check(&mesh, "bar/curl", &["-H", "x-key: shut"], "/get", false);
    check(&mesh, "bar/curl", &[], "/get", false);

    mesh.apply(&allow("from: [{source: {ipBlocks: [10.0.0.0/8]}}]"));
    check(&mesh, "bar/curl", &[], "/get", true);
    mesh.apply(&allow("from: [{source: {ipBlocks: [192.0.2.0/24]}}]"));
    check(&mesh, "bar/curl", &[], "/get", false);
    mesh.apply(&allow("from: [{source: {notPrincipals: [cluster.local/ns/bar/sa/curl]}}]"));
    check(&mesh, "bar/curl", &[], "/get", false);
    check(&mesh, "foo/curl", &[], "/get", true);
}

#[test]
fn identities_hosts_ports_and_their_negations_decide() {
    let mesh = SECURITY.turn();
    let allow = |rule: &str| mesh.apply(&policy("allow", &format!("  action: ALLOW\n  rules:\n  - {rule}")));
    let _policy = mesh.with(&policy("allow", "  action: ALLOW\n  rules: [{}]"));
    // rule, then who gets through: bar's curl, foo's, one without identity
    for (rule, bar, foo, legacy) in [
        ("from: [{source: {serviceAccounts: [bar/curl]}}]", true, false, false),
        ("from: [{source: {serviceAccounts: [curl]}}]", false, true, false),
        ("from: [{source: {principals: [\"*/ns/bar/sa/curl\"]}}]", true, false, false),
        ("from: [{source: {principals: [\"cluster.local/ns/b*\"]}}]", true, false, false),
        ("from: [{source: {principals: [\"*\"]}}]", true, true, false),
        (
            "from: [{source: {principals: [cluster.local/ns/bar/sa/curl2, other.example/ns/bar/sa/curl]}}]",
            false,
            false,
            false,
        ),
        ("from: [{source: {namespaces: [ba]}}]", false, false, false),
        ("from: [{source: {namespaces: [\"ba*\"]}}]", true, false, false),
        ("from: [{source: {notNamespaces: [bar]}}]", false, true, true),
        ("from: [{source: {notServiceAccounts: [bar/curl]}}]", false, true, true),
        (
            "from: [{source: {namespaces: [foo, bar], notPrincipals: [cluster.local/ns/foo/sa/curl]}}]",
            true,
            false,
            false,
        ),
        ("from: [{source: {notIpBlocks: [10.0.0.0/8]}}]", false, false, false),
        ("from: [{source: {notRequestPrincipals: [\"*\"]}}]", true, true, true),
        ("to: [{operation: {ports: [\"80\"]}}]", true, true, true),
        ("to: [{operation: {ports: [\"8000\"]}}]", false, false, false),
        ("to: [{operation: {notPorts: [\"80\"]}}]", false, false, false),
        ("to: [{operation: {notMethods: [POST], notPaths: [/headers]}}]", true, true, true),
        ("to: [{operation: {notPaths: [\"/g*\"]}}]", false, false, false),
        ("to: [{operation: {hosts: [\"httpbin.foo:*\"]}}]", true, true, true),
        ("to: [{operation: {hosts: [httpbin.foo]}}]", false, false, false),
        ("to: [{operation: {notHosts: [\"httpbin.*\"]}}]", false, false, false),
        ("when: [{key: source.namespace, values: [bar]}]", true, false, false),
        ("when: [{key: source.principal, notValues: [cluster.local/ns/bar/sa/curl]}]", false, true, true),
        ("when: [{key: source.ip, values: [10.0.0.0/8]}, {key: destination.port, values: [\"80\"]}]", true, true, true),
        ("when: [{key: \"request.headers[x-none]\", notValues: [a]}]", true, true, true),
        (
            "when: [{key: \"request.headers[user-agent]\", values: [\"*\"], notValues: [\"curl/*\"]}]",
            false,
            false,
            false,
        ),
    ] {
        allow(rule);
        for (whence, is_allowed) in [("bar/curl", bar), ("foo/curl", foo), ("legacy/curl", legacy)] {
            let (status, body) = ask(&mesh, whence, &[], "/get");
            assert_eq!(status == 200, is_allowed, "{rule}: {whence}: {status} {body}");
        }
    }
}

#[test]
fn hosts_are_compared_without_case_and_denials_also_without_port() {
    let mesh = SECURITY.turn();
    let at = |host: &str| mesh.get(host, "/get", &[]).status;
    {
        let rule = "  action: ALLOW\n  rules: [{to: [{operation: {hosts: [httpbin.foo.test]}}]}]";
        let _allow = mesh.with(&policy("hosts", rule));
        assert_eq!((at("httpbin.foo.test"), at("HTTPBIN.foo.TEST"), at("httpbin.foo.test:8080")), (200, 200, 403));
    }
    let _deny =
        mesh.with(&policy("hosts", "  action: DENY\n  rules: [{to: [{operation: {hosts: [httpbin.foo.test]}}]}]"));
    assert_eq!((at("httpbin.foo.test"), at("HTTPBIN.foo.TEST"), at("httpbin.foo.test:8080")), (403, 403, 403));
    check(&mesh, "bar/curl", &[], "/get", true);
}

#[test]
fn path_templates_match_whole_segments() {
    let mesh = SECURITY.turn();
    let template =
        |template: &str| policy("paths", &format!("  rules: [{{to: [{{operation: {{paths: [\"{template}\"]}}}}]}}]"));
    let _policy = mesh.with(&template("/anything/{*}/c/{**}"));
    let table = |cases: &[(&str, bool)]| {
        for (path, is_allowed) in cases {
            check(&mesh, "bar/curl", &[], path, *is_allowed);
        }
    };
    table(&[
        ("/anything/b/c/", true),
        ("/anything/b/c/d/e", true),
        ("/anything/b/c/d?x=/y", true),
        ("/anything/b/c", false),
        ("/anything/b/x/c/d", false),
        ("/anything//c/d", false),
        ("/anything/b/C/d", false),
        ("/anything/b/c/../../x", false),
    ]);
    mesh.apply(&template("/anything/{**}/cart"));
    table(&[
        ("/anything/a/b/cart", true),
        ("/anything//cart", true),
        ("/anything/cart", false),
        ("/anything/a/cart/", false),
    ]);
}

/// Every way to write a path, and what policies and the application see of it.
#[test]
fn policies_and_applications_see_the_same_path() {
    let mesh = SECURITY.turn();
    let _policy = mesh.with(&policy(
        "paths",
        "  action: DENY\n  rules: [{to: [{operation: {paths: [/anything/secret, \"/anything/secret/*\"]}}]}]",
    ));
    for (sent, seen) in [
        ("/anything/secret", None),
        ("/anything/./secret", None),
        ("/anything/x/../secret", None),
        ("/anything/%73ecret", None),
        ("/anything/x/%2e%2e/secret", None),
        ("/anything\\secret", None),
        ("/anything/secret/%2e/x", None),
        ("/anything/secret?x=/../", None),
        ("/anything/a/../b", Some("/anything/b")),
        ("/anything/%61%7e%2d", Some("/anything/a~-")),
        ("/anything/SECRET", Some("/anything/SECRET")),
        ("/anything/secret2", Some("/anything/secret2")),
        ("/anything//secret", Some("/anything//secret")),
        ("/anything/%2573ecret", Some("/anything/%2573ecret")),
        ("/anything/secret;v=1", Some("/anything/secret;v=1")),
        ("/anything/b%20c", Some("/anything/b%20c")),
    ] {
        let (status, body) = ask(&mesh, "bar/curl", &[], sent);
        let Some(seen) = seen else {
            assert_eq!((status, body.as_str()), DENIED, "{sent}");
            continue;
        };
        let answer: Value = serde_json::from_str(&body).unwrap_or_default();
        let url = answer["url"].as_str().unwrap_or_default();
        assert!(status == 200 && url.ends_with(&format!("httpbin.foo:8000{seen}")), "{sent}: {status} {url} {body}");
    }
    for refused in ["/anything/%00", "/anything/../../secret"] {
        let (status, body) = ask(&mesh, "bar/curl", &[], refused);
        assert!(status == 400 || status == 404, "{refused}: {status} {body}");
    }
}

#[test]
fn a_rule_over_a_header_holds_for_every_occurrence() {
    let mesh = SECURITY.turn();
    let deny = "  action: DENY\n  rules: [{when: [{key: \"request.headers[x-role]\", values: [guest]}]}]";
    let _policy = mesh.with(&policy("header", deny));
    check(&mesh, "bar/curl", &["-H", "x-role: guest"], "/get", false);
    check(&mesh, "bar/curl", &["-H", "X-ROLE: guest"], "/get", false);
    check(&mesh, "bar/curl", &["-H", "x-role: admin", "-H", "x-role: guest"], "/get", false);
    check(&mesh, "bar/curl", &["-H", "x-role: guest", "-H", "x-role: admin"], "/get", false);
    check(&mesh, "bar/curl", &["-H", "x-role: admin"], "/get", true);
    mesh.apply(&policy("header", "  rules: [{when: [{key: \"request.headers[x-role]\", values: [admin]}]}]"));
    check(&mesh, "bar/curl", &["-H", "x-role: admin"], "/get", true);
    check(&mesh, "bar/curl", &["-H", "x-role: admin", "-H", "x-role: guest"], "/get", false);
}

#[test]
fn addresses_come_from_the_trusted_hop_only() {
    let mesh = SECURITY.turn();
    // The mesh says that one proxy in front of the gateway is trusted.
    let _policy = mesh.with(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: addresses, namespace: istio-system}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  rules: [{from: [{source: {remoteIpBlocks: [203.0.113.0/24]}}]}]
",
    );
    let at = |forwarded: &str| mesh.get("httpbin.foo.test", "/get", &[("x-forwarded-for", forwarded)]).status;
    assert_eq!(at("203.0.113.7"), 200);
    assert_eq!(at("198.51.100.1"), 403);
    assert_eq!(at("203.0.113.7, 198.51.100.1"), 403, "what stands left of the trusted hop is the client's own story");
    assert_eq!(at("198.51.100.1, 203.0.113.7"), 200);
    assert_eq!(at("203.0.113.7, nonsense"), 403);
    assert_eq!(mesh.get("httpbin.foo.test", "/get", &[]).status, 403);
}

#[test]
fn deny_is_before_allow_and_an_empty_policy_allows_nothing() {
    let mesh = SECURITY.turn();
    let _empty = mesh.with("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nothing, namespace: foo}\nspec: {}\n");
    check(&mesh, "foo/curl", &[], "/get", false);
    let _all = mesh.with(&policy("all", "  action: ALLOW\n  rules: [{}]"));
    check(&mesh, "foo/curl", &[], "/get", true);
    {
        let _audit = mesh.with(&policy("audit", "  action: AUDIT\n  rules: [{}]"));
        check(&mesh, "foo/curl", &[], "/get", true);
        let rehearsal = policy("rehearsal", "  action: DENY\n  rules: [{}]")
            .replace("namespace: foo}", "namespace: foo, annotations: {istio.io/dry-run: \"true\"}}");
        let _rehearsal = mesh.with(&rehearsal);
        check(&mesh, "foo/curl", &[], "/get", true);
    }
    let _deny = mesh.with(&policy("deny", "  action: DENY\n  rules: [{to: [{operation: {methods: [GET]}}]}]"));
    check(&mesh, "foo/curl", &[], "/get", false);
    check(&mesh, "foo/curl", &["-X", "PUT"], "/anything", true);
    mesh.apply(&policy("deny", "  action: DENY\n  rules: [{}]"));
    check(&mesh, "foo/curl", &["-X", "PUT"], "/anything", false);
    let refused = mesh.command(&["apply", "-f", "-"], &policy("ruleless", "  action: DENY"));
    assert!(!refused.status.success(), "a DENY without rules is not admitted");
}

#[test]
fn a_denied_answer_names_its_flag_and_policy_in_the_log() {
    let mesh = SECURITY.turn();
    let _policy = mesh.with(&policy("logged", "  action: DENY\n  rules: [{to: [{operation: {paths: [/uuid]}}]}]"));
    check(&mesh, "foo/curl", &[], "/uuid", false);
    eventually("the access log", || {
        let log = mesh.logs("foo/httpbin", "istio-proxy");
        let line = log.lines().rfind(|line| line.contains("/uuid")).unwrap_or_default().to_owned();
        let details = "rbac_access_denied_matched_policy[ns[foo]-policy[logged]-rule[0]]";
        if line.contains(" 403 ") && line.contains(details) { Ok(()) } else { Err(line) }
    });
}

#[test]
fn allowed_and_denied_requests_are_counted() {
    let mesh = SECURITY.turn();
    let _policy = mesh.with(&policy("counted", "  action: DENY\n  rules: [{to: [{operation: {paths: [/headers]}}]}]"));
    let counts = || {
        let metrics = mesh.curl("foo/httpbin", &["http://127.0.0.1:15090/stats/prometheus"]).body;
        ["envoy_http_rbac_allowed", "envoy_http_rbac_denied"].map(|name| {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{metrics}"));
            line.trim_start_matches("{}").trim().parse::<u64>().unwrap_or_else(|error| panic!("{line}: {error}"))
        })
    };
    let before = counts();
    for (path, count) in [("/get", 3), ("/headers", 2)] {
        for _ in 0..count {
            check(&mesh, "foo/curl", &[], path, path == "/get");
        }
    }
    let [allowed, denied] = counts();
    assert_eq!([allowed - before[0], denied - before[1]], [3, 2]);
}

fn echo(mesh: &Mesh, whence: &str) -> String {
    let script = "exec 3<>/dev/tcp/echo.foo/9000; echo hi >&3; read -r -t 5 line <&3; echo \"$line\"";
    String::from_utf8_lossy(&mesh.exec(whence, &["bash", "-c", script]).stdout).trim().to_owned()
}

#[test]
fn connections_are_allowed_by_principal() {
    let mesh = SECURITY.turn();
    assert_eq!(echo(&mesh, "foo/curl"), "one hi");
    let _policy = mesh.with(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: echo, namespace: foo}
spec:
  selector: {matchLabels: {app: echo}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/foo/sa/curl]}}]
    to: [{operation: {ports: [\"9000\"]}}]
",
    );
    assert_eq!(echo(&mesh, "foo/curl"), "one hi");
    assert_eq!(echo(&mesh, "bar/curl"), "");
}

#[test]
pub(crate) fn rules_of_http_narrow_permissions_and_widen_denials_on_connections() {
    let mesh = SECURITY.turn();
    let tcp = of_bytes;
    let _policy = mesh.with(&tcp("rules: [{to: [{operation: {methods: [GET]}}]}]"));
    assert_eq!(echo(&mesh, "foo/curl"), "", "an ALLOW by method allows no connection");
    mesh.apply(&tcp("rules: [{to: [{operation: {methods: [GET]}}]}, {from: [{source: {namespaces: [foo]}}]}]"));
    assert_eq!((echo(&mesh, "foo/curl").as_str(), echo(&mesh, "bar/curl").as_str()), ("one hi", ""));
    mesh.apply(&tcp("action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]"));
    assert_eq!(echo(&mesh, "foo/curl"), "", "a DENY by path denies every connection");
    mesh.apply(&tcp(
        "action: DENY, rules: [{from: [{source: {namespaces: [bar]}}], to: [{operation: {paths: [/x]}}]}]",
    ));
    assert_eq!((echo(&mesh, "foo/curl").as_str(), echo(&mesh, "bar/curl").as_str()), ("one hi", ""));
    mesh.apply(&tcp("action: DENY, rules: [{from: [{source: {notPrincipals: [\"*\"]}}]}]"));
    assert_eq!((echo(&mesh, "foo/curl").as_str(), echo(&mesh, "legacy/curl").as_str()), ("one hi", ""));
    eventually("the access log", || {
        let log = mesh.logs("foo/echo", "istio-proxy");
        let details = "rbac_access_denied_matched_policy[ns[foo]-policy[echo]-rule[0]]";
        if log.lines().any(|line| line.contains(details)) { Ok(()) } else { Err(log) }
    });
}

/// A policy of the echo, which speaks bytes.
fn of_bytes(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: echo, namespace: foo}}\nspec: {{selector: {{matchLabels: {{app: echo}}}}, {spec}}}\n"
    )
}

#[test]
fn connections_are_judged_by_address_and_port() {
    let mesh = SECURITY.turn();
    let pods = mesh.must(&["get", "pods", "-n", "bar", "-l", "app=curl", "-o", "json"], "");
    let pods: Value = serde_json::from_str(&pods).unwrap();
    let bar = pods["items"][0]["status"]["podIP"].as_str().unwrap_or_else(|| panic!("{pods:#}"));
    let _policy = mesh.with(&of_bytes("rules: [{}]"));
    // rule, then who gets through: bar's curl, legacy's, which has no proxy
    for (spec, of_bar, of_legacy) in [
        ("rules: [{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}]", true, true),
        ("rules: [{from: [{source: {ipBlocks: [192.0.2.0/24]}}]}]", false, false),
        ("rules: [{from: [{source: {ipBlocks: [\"@\"]}}]}]", true, false),
        ("rules: [{from: [{source: {notIpBlocks: [\"@\"]}}]}]", false, true),
        ("action: DENY, rules: [{from: [{source: {ipBlocks: [\"@/32\"]}}]}]", false, true),
        ("rules: [{when: [{key: source.ip, values: [\"@\"]}]}]", true, false),
        ("rules: [{when: [{key: source.ip, notValues: [\"@\"]}]}]", false, true),
        ("rules: [{to: [{operation: {ports: [\"9000\"]}}]}]", true, true),
        ("rules: [{to: [{operation: {notPorts: [\"9000\"]}}]}]", false, false),
        ("rules: [{to: [{operation: {notPorts: [\"9001\"]}}]}]", true, true),
        ("action: DENY, rules: [{to: [{operation: {notPorts: [\"9001\"]}}]}]", false, false),
        (
            "rules: [{when: [{key: destination.port, values: [\"9000\"]}, {key: source.ip, values: [\"@\"]}]}]",
            true,
            false,
        ),
    ] {
        mesh.apply(&of_bytes(&spec.replace('@', bar)));
        for (whence, is_allowed) in [("bar/curl", of_bar), ("legacy/curl", of_legacy)] {
            let line = if is_allowed { "one hi" } else { "" };
            assert_eq!(echo(&mesh, whence), line, "{spec}: {whence}");
        }
    }
}

/// What the authorizer was asked. One request of a hundred is traced by default, and the puppet takes spans, too.
fn checks(puppet: &Puppet<'_>) -> Vec<Value> {
    puppet.seen().into_iter().filter(|request| request["path"] != "/api/v2/spans").collect()
}

fn custom<'a>(mesh: &'a Mesh, provider: &str) -> Applied<'a> {
    let rules = "rules: [{to: [{operation: {paths: [/anything/asked, \"/anything/asked/*\"]}}]}]";
    mesh.with(&policy("custom", &format!("  action: CUSTOM\n  provider: {{name: {provider}}}\n  {rules}")))
}

/// Asks for a path that the authorizer is asked about, through the gateway.
fn asked(mesh: &Mesh, headers: &[(&str, &str)]) -> Response {
    mesh.get("httpbin.foo.test", "/anything/asked?a=b", headers)
}

#[test]
fn an_authorizer_is_asked_and_says_yes_with_headers() {
    let mesh = SECURITY.turn();
    let puppet = Puppet::new(&mesh, PUPPET);
    let _policy = custom(&mesh, "ask");
    let told = json!({"x-user": "ada", "x-checked": "yes", "x-other": "no"});
    puppet.answers(&json!([{"path": "/ask", "headers": told, "body": "ignored"}]));
    let sent = [("x-key", "k"), ("authorization", "Basic abc"), ("cookie", "c=1"), ("x-user", "eve")];
    let answer = asked(&mesh, &sent);
    assert_eq!(answer.status, 200, "{answer:?}");
    let app = answer.json()["headers"].clone();
    assert_eq!(app["x-user"], json!(["ada"]), "the authorizer's, not the client's: {app}");
    assert!(app.get("x-other").is_none() && app.get("x-checked").is_none(), "{app}");
    assert_eq!((answer.header("x-checked"), answer.header("x-other")), (Some("yes"), None), "{answer:?}");
    let seen = checks(&puppet);
    let [check] = &seen[..] else { panic!("asked once: {seen:?}") };
    assert_eq!((&check["method"], &check["path"]), (&json!("GET"), &json!("/ask/anything/asked?a=b")), "{check}");
    for (name, value) in
        [("host", "httpbin.foo.test"), ("x-key", "k"), ("authorization", "Basic abc"), ("x-from", "mesh")]
    {
        assert_eq!(check["headers"][name], json!([value]), "{check}");
    }
    assert!(check["headers"].get("cookie").is_none(), "{check}");
    // What the policy does not name goes unasked.
    assert_eq!(mesh.get("httpbin.foo.test", "/get", &[]).status, 200);
    assert_eq!(checks(&puppet).len(), 1);
    // What it added is seen by the policies after it.
    let _allow = mesh.with(&policy("user", "  rules: [{when: [{key: \"request.headers[x-user]\", values: [ada]}]}]"));
    assert_eq!(asked(&mesh, &[]).status, 200);
    assert_eq!(mesh.get("httpbin.foo.test", "/get", &[]).status, 403);
}

#[test]
fn an_authorizer_is_asked_at_the_gateway() {
    let mesh = SECURITY.turn();
    let puppet = Puppet::new(&mesh, PUPPET);
    let _policy = mesh.with(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: custom, namespace: istio-system}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: CUSTOM
  provider: {name: ask}
  rules: [{to: [{operation: {hosts: [httpbin.foo.test], paths: [/anything/asked]}}]}]
",
    );
    puppet.answers(&json!([{"path": "/ask", "headers": {"x-user": "ada", "x-checked": "yes"}}]));
    let answer = asked(&mesh, &[("x-key", "k"), ("x-user", "eve")]);
    assert_eq!((answer.status, answer.header("x-checked")), (200, Some("yes")), "{answer:?}");
    assert_eq!(answer.json()["headers"]["x-user"], json!(["ada"]), "{answer:?}");
    let seen = checks(&puppet);
    let [check] = &seen[..] else { panic!("asked once, by the gateway alone: {seen:?}") };
    assert_eq!((&check["path"], &check["headers"]["x-key"]), (&json!("/ask/anything/asked?a=b"), &json!(["k"])));
    puppet.answers(&json!([{"path": "/ask", "status": 401, "headers": {"x-reason": "late"}, "body": "go away"}]));
    let answer = asked(&mesh, &[]);
    assert_eq!((answer.status, answer.body.as_str(), answer.header("x-reason")), (401, "go away", Some("late")));
    assert_eq!(mesh.get("httpbin.foo.test", "/get", &[]).status, 200, "another path is not asked about");
    assert_eq!(ask(&mesh, "bar/curl", &[], "/anything/asked").0, 200, "inside nobody asks");
    assert_eq!(checks(&puppet).len(), 2);
    crate::causes::logged(
        &mesh,
        "istio-system/istio-ingressgateway",
        "/anything/asked?a=b",
        " 401 UAEX ext_authz_denied ",
    );
}

/// One worker: a request that waits for its authorizer holds nobody up.
#[test]
fn a_check_that_waits_leaves_the_worker_to_others() {
    let mesh = SECURITY.turn();
    let puppet = Puppet::new(&mesh, PUPPET);
    let single = crate::apps::workload("foo", "single", "v1", "docker.io/kong/httpbin", Some(80), "")
        .replace("version: v1}", "version: v1}, annotations: {proxy.istio.io/config: \"{concurrency: 1}\"}");
    let waits = "  action: CUSTOM\n  provider: {name: ask-body}\n  rules: [{to: [{operation: {paths: [\"/anything/waits*\"]}}]}]";
    let objects = [
        single,
        crate::apps::service("foo", "single", "{name: http, port: 8000, targetPort: 80}"),
        policy("waits", waits).replace("app: httpbin", "app: single"),
    ];
    let _objects = mesh.with(&objects.join("---\n"));
    mesh.must(&["rollout", "status", "deploy/single", "-n", "foo", "--timeout", "120"], "");
    mesh.synced();
    let info = mesh.curl("foo/single", &["http://127.0.0.1:15000/server_info"]).json();
    assert_eq!(info["command_line_options"]["concurrency"], 1, "{info}");
    puppet.answers(&json!([{"path": "/body", "hangs": true}]));
    // The authorizer has thirty seconds, after which a slow machine has shown nothing.
    for round in 1.. {
        let mut waiting = mesh.dial("bar/curl", "single.foo", 8000);
        let request = format!("GET /anything/waits{round} HTTP/1.1\r\nhost: single.foo\r\nconnection: close\r\n\r\n");
        waiting.write_all(request.as_bytes()).unwrap();
        eventually("the question", || match checks(&puppet).len() {
            asked if asked >= round => Ok(()),
            asked => Err(format!("{asked} of {round}")),
        });
        let served = mesh.curl("bar/curl", &[&format!("http://single.foo:8000/anything/other{round}?[1-20]")]);
        assert_eq!(served.body.matches("\"method\"").count(), 20, "{served:?}");
        let log = eventually("the log of what was served", || {
            let log = mesh.logs("foo/single", "istio-proxy");
            if log.contains(&format!("/anything/other{round}?20 ")) { Ok(log) } else { Err(log) }
        });
        if !log.contains(&format!("/anything/waits{round} ")) {
            return;
        }
        assert!(round < 3, "others were served only after the authorizer's time: {log}");
    }
}

#[test]
pub(crate) fn an_authorizer_says_no_in_its_own_words() {
    let mesh = SECURITY.turn();
    let puppet = Puppet::new(&mesh, PUPPET);
    let _policy = custom(&mesh, "ask");
    let told = json!({"x-reason": "late", "x-secret": "s"});
    for status in [401, 403, 418] {
        puppet.answers(&json!([{"path": "/ask", "status": status, "headers": told, "body": "go away"}]));
        let answer = asked(&mesh, &[]);
        assert_eq!((answer.status, answer.body.as_str()), (status, "go away"), "{answer:?}");
        assert_eq!((answer.header("x-reason"), answer.header("x-secret")), (Some("late"), None), "{answer:?}");
    }
    // Before tokens are looked at, and before a DENY.
    let _deny = mesh.with(&policy("deny", "  action: DENY\n  rules: [{}]"));
    assert_eq!(asked(&mesh, &[]).status, 418);
    puppet.answers(&json!([]));
    assert_eq!(asked(&mesh, &[]).body, DENIED.1);
    eventually("the access log", || {
        let log = mesh.logs("foo/httpbin", "istio-proxy");
        if log.contains(" 418 UAEX ext_authz_denied ") { Ok(()) } else { Err(log) }
    });
}

#[test]
pub(crate) fn an_authorizer_that_fails_fails_closed_or_when_told_open() {
    let mesh = SECURITY.turn();
    let puppet = Puppet::new(&mesh, PUPPET);
    for (provider, path, expect) in [("ask", "/ask", 403), ("ask-open", "/open", 200)] {
        let _policy = custom(&mesh, provider);
        for answer in [
            json!({"path": path, "closes": true}),
            json!({"path": path, "status": 500}),
            json!({"path": path, "status": 503, "body": "x"}),
            json!({"path": path, "hangs": true}),
        ] {
            puppet.answers(&json!([answer]));
            let began = Instant::now();
            let got = asked(&mesh, &[]);
            assert_eq!(got.status, expect, "{provider} {answer}: {got:?}");
            assert!(began.elapsed() < Duration::from_secs(60), "its timeout is four seconds: {:?}", began.elapsed());
        }
        puppet.answers(&json!([{"path": path, "status": 401}]));
        assert_eq!(asked(&mesh, &[]).status, 401, "a no is a no: {provider}");
    }
    eventually("the access log", || {
        let log = mesh.logs("foo/httpbin", "istio-proxy");
        if log.contains(" 403 UAEX ext_authz_error ") { Ok(()) } else { Err(log) }
    });
    // No pod at all.
    let scale = |replicas: &str| {
        mesh.must(&["scale", "deploy/puppet", "--replicas", replicas, "-n", "legacy"], "");
        mesh.must(&["rollout", "status", "deploy/puppet", "-n", "legacy", "--timeout", "120"], "");
        mesh.synced();
    };
    scale("0");
    let outcomes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        ["ask", "ask-open"].map(|provider| {
            let _policy = custom(&mesh, provider);
            asked(&mesh, &[]).status
        })
    }));
    scale("1");
    assert_eq!(outcomes.unwrap(), [403, 200], "nobody is there to ask");
    // A provider that nobody declared.
    let _policy = custom(&mesh, "nobody");
    let refused = asked(&mesh, &[]);
    assert_eq!((refused.status, refused.body.as_str()), DENIED);
    assert_eq!(mesh.get("httpbin.foo.test", "/get", &[]).status, 200, "only what the policy names");
}

#[test]
pub(crate) fn an_authorizer_reads_the_body_up_to_its_limit() {
    let mesh = SECURITY.turn();
    let puppet = Puppet::new(&mesh, PUPPET);
    let _policy = custom(&mesh, "ask-body");
    let post = |args: &[&str]| {
        let mut all = args.to_vec();
        all.extend(["-X", "POST", "http://httpbin.foo:8000/anything/asked"]);
        mesh.curl("bar/curl", &all)
    };
    for chunked in [&[][..], &["-H", "transfer-encoding: chunked"]] {
        puppet.forget();
        let fits = post(&[chunked, &["-d", "sixteen bytes ok"][..]].concat());
        assert_eq!((fits.status, fits.json()["data"].as_str()), (200, Some("sixteen bytes ok")), "{fits:?}");
        assert_eq!(checks(&puppet)[0]["body"], "sixteen bytes ok");
        puppet.forget();
        let large = post(&[chunked, &["-d", "seventeen bytes !"][..]].concat());
        assert_eq!(large.status, 413, "{large:?}");
        assert_eq!(checks(&puppet).len(), 0, "a body that is cut is not judged");
    }
    crate::causes::logged(&mesh, "foo/httpbin", "\"POST /anything/asked ", " 413 - request_payload_too_large ");
    puppet.answers(&json!([{"path": "/body", "closes": true}]));
    assert_eq!(post(&["-d", "x"]).status, 503, "statusOnError");
}
