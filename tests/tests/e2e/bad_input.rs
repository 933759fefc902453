//! What is wrong is said with file, line, object, field and remedy, and harms nothing.

use testkit::mesh::run_lateen;

use crate::apps::{TRAFFIC, virtual_service};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `validate` of these manifests must fail and say all of these words.
#[track_caller]
fn check(manifests: &str, words: &[&str]) {
    let output = run_lateen(&["validate", "-f", "-"], manifests);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(!output.status.success(), "{manifests}\nwas taken: {said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn every_mistake_names_object_line_and_field() {
    check("apiVersion: v1\nkind: [", &["2"]);
    let typo = virtual_service("typo", "  - rout: [{destination: {host: httpbin}}]");
    check(&typo, &["shop/typo", "rout", "route"]);
    check(
        &virtual_service("type", "  - timeout: [1]\n    route: [{destination: {host: a}}]"),
        &["shop/type", "timeout"],
    );
    check(
        &virtual_service("regex", "  - match: [{uri: {regex: \"(\"}}]\n    route: [{destination: {host: a}}]"),
        &["shop/regex", "regex"],
    );
    check(
        &virtual_service(
            "weights",
            "  - route: [{destination: {host: a}, weight: -1}, {destination: {host: b}, weight: 5}]",
        ),
        &["shop/weights", "weight"],
    );
    check(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: foo}\nspec: {action: REFUSE}\n",
        &["foo/bad", "action", "REFUSE"],
    );
}

#[test]
fn a_refused_object_leaves_the_running_mesh_unharmed() {
    let mesh = TRAFFIC.turn();
    let good = virtual_service("kept", "  - directResponse: {status: 200, body: {string: kept}}");
    let _route = mesh.with(&good);
    let refused = mesh.command(&["apply", "-f", "-"], &good.replace("status: 200", "status: many"));
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stdout) + &text(&refused.stderr);
    assert!(said.contains("shop/kept") && said.contains("status"), "{said}");
    assert_eq!(mesh.get("kept.shop.test", "/", &[]).body, "kept");
}

#[test]
fn wrong_commands_have_istioctls_exit_code() {
    assert_eq!(run_lateen(&["frobnicate"], "").status.code(), Some(64));
    assert_eq!(run_lateen(&["up"], "").status.code(), Some(64), "nothing to run");
    assert_eq!(run_lateen(&["wait", "--for=tea"], "").status.code(), Some(64));
}

#[test]
fn a_command_without_a_mesh_says_so() {
    let nowhere = std::env::temp_dir().join("lateen-no-such-mesh");
    let output = run_lateen(&["get", "pods", "--state-dir", nowhere.to_str().unwrap()], "");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("lateen up"), "the remedy: {said}");
}

#[test]
fn a_second_mesh_of_the_same_folder_says_who_runs() {
    let mesh = TRAFFIC.turn();
    let second =
        mesh.command(&["up", "-f", "-", "--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0"], "");
    let said = text(&second.stdout) + &text(&second.stderr);
    assert!(!second.status.success(), "{said}");
    assert!(said.contains("run"), "{said}");
    assert_eq!(mesh.get("maildev.localhost", "/email", &[]).status, 200);
}
