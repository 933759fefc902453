//! AuthorizationPolicy.

use testkit::Mesh;

use crate::apps::SECURITY;

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
fn deny_is_before_allow_and_an_empty_policy_allows_nothing() {
    let mesh = SECURITY.turn();
    let _empty = mesh.with("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nothing, namespace: foo}\nspec: {}\n");
    check(&mesh, "foo/curl", &[], "/get", false);
    let _all = mesh.with(&policy("all", "  action: ALLOW\n  rules: [{}]"));
    check(&mesh, "foo/curl", &[], "/get", true);
    let _deny = mesh.with(&policy("deny", "  action: DENY\n  rules: [{to: [{operation: {methods: [GET]}}]}]"));
    check(&mesh, "foo/curl", &[], "/get", false);
}

#[test]
fn a_denied_answer_names_its_flag_and_policy_in_the_log() {
    let mesh = SECURITY.turn();
    let _policy = mesh.with(&policy("logged", "  action: DENY\n  rules: [{to: [{operation: {paths: [/uuid]}}]}]"));
    check(&mesh, "foo/curl", &[], "/uuid", false);
    testkit::eventually("the access log", || {
        let log = mesh.logs("foo/httpbin", "istio-proxy");
        let line = log.lines().rfind(|line| line.contains("/uuid")).unwrap_or_default().to_owned();
        let details = "rbac_access_denied_matched_policy[ns[foo]-policy[logged]-rule[0]]";
        if line.contains(" 403 ") && line.contains(details) { Ok(()) } else { Err(line) }
    });
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
