//! RequestAuthentication and what follows from claims.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use testkit::Mesh;
use testkit::token::Issuer;

use crate::apps::SECURITY;

const ISSUER: &str = "https://issuer.example";

fn claims(change: impl FnOnce(&mut Value)) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut claims = json!({"iss": ISSUER, "sub": "ada", "aud": "shop", "iat": now, "exp": now + 3600});
    change(&mut claims);
    claims
}

fn authentication(namespace: &str, app: &str, issuer: &Issuer) -> String {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": {"name": "tokens", "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": {"app": app}},
            "jwtRules": [{"issuer": ISSUER, "audiences": ["shop"], "jwks": issuer.jwks(), "forwardOriginalToken": true}],
        },
    })
    .to_string()
}

fn status(mesh: &Mesh, path: &str, token: Option<&str>) -> (u16, String) {
    let bearer = token.map(|token| format!("Bearer {token}"));
    let headers: Vec<(&str, &str)> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
    let answer = mesh.get("httpbin.foo.test", path, &headers);
    (answer.status, answer.body)
}

#[test]
fn tokens_must_be_valid_and_may_be_missing() {
    let mesh = SECURITY.turn();
    let issuer = Issuer::new("one");
    let _tokens = mesh.with(&authentication("foo", "httpbin", &issuer));
    let now = claims(|_| ())["iat"].as_u64().unwrap();
    let good = issuer.sign(&claims(|_| ()));
    assert_eq!(status(&mesh, "/get", Some(&good)).0, 200);
    assert_eq!(status(&mesh, "/get", None).0, 200, "no token is no failure");
    let check = |what: &str, token: &str, expect: &str| {
        let (status, body) = status(&mesh, "/get", Some(token));
        assert_eq!((status, body.as_str()), (401, expect), "{what}");
    };
    check("expired", &issuer.sign(&claims(|claims| claims["exp"] = json!(now - 3600))), "Jwt is expired");
    check("early", &issuer.sign(&claims(|claims| claims["nbf"] = json!(now + 3600))), "Jwt not yet valid");
    check(
        "issuer",
        &issuer.sign(&claims(|claims| claims["iss"] = json!("https://other.example"))),
        "Jwt issuer is not configured",
    );
    check("key", &Issuer::new("one").sign(&claims(|_| ())), "Jwt verification fails");
    check("nonsense", "abc", "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections");
    let (status, body) = status(&mesh, "/get", Some(&issuer.sign(&claims(|claims| claims["aud"] = json!("bank")))));
    assert_eq!((status, body.as_str()), (403, "Audiences in Jwt are not allowed"));
    let mut parts = good.split('.');
    let (_, payload) = (parts.next(), parts.next().unwrap());
    // {"alg":"none"}
    check_unsigned(&mesh, &format!("eyJhbGciOiJub25lIn0.{payload}."));
}

fn check_unsigned(mesh: &Mesh, token: &str) {
    assert_eq!(status(mesh, "/get", Some(token)).0, 401, "an unsigned token is no token");
}

#[test]
fn a_policy_can_demand_a_token_and_a_claim() {
    let mesh = SECURITY.turn();
    let issuer = Issuer::new("one");
    let _tokens = mesh.with(&authentication("foo", "httpbin", &issuer));
    let _policy = mesh.with(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: claims, namespace: foo}
spec:
  selector: {matchLabels: {app: httpbin}}
  action: ALLOW
  rules:
  - from: [{source: {requestPrincipals: [\"https://issuer.example/ada\"]}}]
    when: [{key: \"request.auth.claims[groups]\", values: [admin]}]
",
    );
    let token = |groups: Value| issuer.sign(&claims(|claims| claims["groups"] = groups));
    assert_eq!(status(&mesh, "/get", Some(&token(json!(["users", "admin"])))).0, 200);
    assert_eq!(status(&mesh, "/get", Some(&token(json!(["users"])))).0, 403);
    assert_eq!(status(&mesh, "/get", None).0, 403, "a token is demanded");
}

#[test]
fn the_gateway_routes_by_claims() {
    let mesh = SECURITY.turn();
    let issuer = Issuer::new("one");
    let _tokens = mesh.with(&authentication("istio-system", "istio-ingressgateway", &issuer));
    let _routes = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: claims, namespace: foo}
spec:
  hosts: [claims.foo.test]
  gateways: [gateway]
  http:
  - match: [{headers: {\"@request.auth.claims.group\": {exact: red}}}]
    directResponse: {status: 200, body: {string: red}}
  - match: [{headers: {\"@request.auth.claims.org.team\": {exact: blue}}}]
    directResponse: {status: 200, body: {string: blue}}
  - directResponse: {status: 200, body: {string: none}}
",
    );
    let ask = |token: Option<String>| {
        let bearer = token.map(|token| format!("Bearer {token}"));
        let headers: Vec<(&str, &str)> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
        mesh.get("claims.foo.test", "/", &headers).body
    };
    assert_eq!(ask(Some(issuer.sign(&claims(|claims| claims["group"] = json!("red"))))), "red");
    assert_eq!(ask(Some(issuer.sign(&claims(|claims| claims["org"] = json!({"team": "blue"}))))), "blue");
    assert_eq!(ask(None), "none");
    let forged = mesh.get("claims.foo.test", "/", &[("@request.auth.claims.group", "red")]);
    assert!(forged.body != "red", "a header is no claim: {forged:?}");
}
