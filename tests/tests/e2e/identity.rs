//! Mutual TLS and who is seen.

use testkit::Mesh;

use crate::apps::SECURITY;

const HTTPBIN: &str = "http://httpbin.foo:8000";

fn peer_authentication(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn status(mesh: &Mesh, whence: &str) -> u16 {
    mesh.curl(whence, &[&format!("{HTTPBIN}/get")]).status
}

#[test]
fn sidecars_speak_mutual_tls_by_themselves_and_pods_without_proxy_are_served() {
    let mesh = SECURITY.turn();
    let seen = mesh.curl("bar/curl", &[&format!("{HTTPBIN}/headers")]);
    assert_eq!(seen.status, 200, "{seen:?}");
    let xfcc = seen.json()["headers"]["x-forwarded-client-cert"][0].as_str().unwrap_or_default().to_owned();
    assert!(xfcc.contains("By=spiffe://cluster.local/ns/foo/sa/httpbin"), "{xfcc}");
    assert!(xfcc.contains("URI=spiffe://cluster.local/ns/bar/sa/curl"), "{xfcc}");
    let plain = mesh.curl("legacy/curl", &[&format!("{HTTPBIN}/headers")]);
    assert_eq!(plain.status, 200, "{plain:?}");
    assert!(!plain.body.contains("x-forwarded-client-cert"), "{plain:?}");
    let out = mesh.curl("foo/curl", &["http://httpbin.legacy:8000/headers"]);
    assert!(out.status == 200 && !out.body.contains("x-forwarded-client-cert"), "to a pod without proxy: {out:?}");
}

#[test]
fn a_client_cannot_forge_who_it_is() {
    let mesh = SECURITY.turn();
    let forged = "x-forwarded-client-cert: By=spiffe://x;URI=spiffe://cluster.local/ns/foo/sa/admin";
    for whence in ["bar/curl", "legacy/curl"] {
        let seen = mesh.curl(whence, &["-H", forged, &format!("{HTTPBIN}/headers")]);
        assert!(seen.status == 200 && !seen.body.contains("sa/admin"), "{whence}: {seen:?}");
    }
}

#[test]
fn strict_refuses_plaintext_and_permissive_takes_it() {
    let mesh = SECURITY.turn();
    {
        let _strict = mesh.with(&peer_authentication("foo", "default", "{mtls: {mode: STRICT}}"));
        assert_eq!(status(&mesh, "legacy/curl"), 0, "plaintext is cut off");
        assert_eq!(status(&mesh, "bar/curl"), 200);
        let answer = mesh.get("httpbin.foo.test", "/get", &[]);
        if answer.status != 200 {
            eprintln!(
                "{}",
                mesh.logs("foo/httpbin", "istio-proxy").lines().rev().take(6).collect::<Vec<_>>().join("\n")
            );
            eprintln!(
                "{}",
                mesh.logs("istio-system/istio-ingressgateway", "istio-proxy")
                    .lines()
                    .rev()
                    .take(3)
                    .collect::<Vec<_>>()
                    .join("\n")
            );
            eprintln!("{}", mesh.must(&["get", "authorizationpolicies", "-A"], ""));
        }
        assert_eq!(answer.status, 200, "the gateway has an identity: {answer:?}");
    }
    assert_eq!(status(&mesh, "legacy/curl"), 200, "back to PERMISSIVE");
}

#[test]
fn the_mode_of_a_workload_and_port_is_over_the_namespaces_and_the_meshs() {
    let mesh = SECURITY.turn();
    let _mesh_wide = mesh.with(&peer_authentication("istio-system", "default", "{mtls: {mode: STRICT}}"));
    assert_eq!(status(&mesh, "legacy/curl"), 0, "STRICT in the mesh");
    let _namespace = mesh.with(&peer_authentication("foo", "default", "{mtls: {mode: PERMISSIVE}}"));
    assert_eq!(status(&mesh, "legacy/curl"), 200, "PERMISSIVE in the namespace");
    let workload =
        "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {80: {mode: STRICT}}}";
    let _port = mesh.with(&peer_authentication("foo", "httpbin", workload));
    assert_eq!(status(&mesh, "legacy/curl"), 0, "STRICT at the port");
    assert_eq!(status(&mesh, "foo/curl"), 200);
}

#[test]
fn disabled_mutual_tls_is_plaintext_on_the_wire() {
    let mesh = SECURITY.turn();
    let _disabled = mesh.with(&peer_authentication("foo", "default", "{mtls: {mode: DISABLE}}"));
    let seen = mesh.curl("bar/curl", &[&format!("{HTTPBIN}/headers")]);
    assert!(seen.status == 200 && !seen.body.contains("x-forwarded-client-cert"), "{seen:?}");
}
