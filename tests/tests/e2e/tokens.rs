//! RequestAuthentication and what follows from claims.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use testkit::token::{Issuer, forge};
use testkit::{Mesh, Puppet, eventually};

use crate::apps::{PUPPET, SECURITY};

const ISSUER: &str = "https://issuer.example";

fn claims(change: impl FnOnce(&mut Value)) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut claims = json!({"iss": ISSUER, "sub": "ada", "aud": "shop", "iat": now, "exp": now + 3600});
    change(&mut claims);
    claims
}

fn authentication(namespace: &str, app: &str, issuer: &Issuer) -> String {
    let rule = json!({"issuer": ISSUER, "audiences": ["shop"], "jwks": issuer.jwks(), "forwardOriginalToken": true});
    authentications(namespace, app, &json!([rule]))
}

fn authentications(namespace: &str, app: &str, rules: &Value) -> String {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": {"name": "tokens", "namespace": namespace},
        "spec": {"selector": {"matchLabels": {"app": app}}, "jwtRules": rules},
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
fn neither_key_nor_algorithm_is_the_tokens_choice() {
    let mesh = SECURITY.turn();
    let issuer = Issuer::new("one");
    let _tokens = mesh.with(&authentication("foo", "httpbin", &issuer));
    let claims = claims(|_| ());
    assert_eq!(status(&mesh, "/get", Some(&issuer.sign(&claims))).0, 200, "the tokens below would be good");
    let check = |what: &str, token: &str| {
        let (status, body) = status(&mesh, "/get", Some(token));
        assert_eq!(status, 401, "{what}: {body}");
    };
    let (pem, point) = issuer.public_key();
    for head in [json!({"alg": "HS256", "kid": "one"}), json!({"alg": "HS256"}), json!({"alg": "ES256", "kid": "one"})]
    {
        for secret in [pem.as_bytes(), &point, issuer.jwks().as_bytes(), b""] {
            check("an HMAC by the public key", &forge(secret, &head, &claims));
        }
    }
    check("another algorithm than the key's", &issuer.sign_as(&json!({"alg": "RS256"}), &claims));
    check("an unknown algorithm", &issuer.sign_as(&json!({"alg": "es256"}), &claims));
    check("no algorithm", &issuer.sign_as(&json!({"alg": "none"}), &claims));
    let (_, unknown) = status(&mesh, "/get", Some(&issuer.sign_as(&json!({"kid": "two"}), &claims)));
    assert_eq!(unknown, "Jwks doesn't have key to match kid or alg from Jwt");
    // A thief's key that the token brings along or points at.
    let thief = Issuer::new("one");
    let brought: Value = serde_json::from_str(&thief.jwks()).unwrap();
    let url = "http://puppet.legacy:8000/keys";
    for head in [json!({"jwk": brought["keys"][0]}), json!({"jku": url}), json!({"x5u": url, "kid": "two"})] {
        check("a key in the header", &thief.sign_as(&head, &claims));
    }
    check("critical extensions", &issuer.sign_as(&json!({"crit": ["exp"]}), &claims));
    check("unknown critical extensions", &issuer.sign_as(&json!({"crit": ["b64"], "b64": false}), &claims));
    for (name, value) in [("exp", json!("4102444800")), ("nbf", json!([])), ("iss", json!([ISSUER])), ("aud", json!(7))]
    {
        let (status, body) = status(&mesh, "/get", Some(&issuer.sign(&self::claims(|claims| claims[name] = value))));
        assert!(status == 401 || (status == 403 && name == "aud"), "a wrong type of {name}: {status} {body}");
    }
}

#[test]
fn every_token_of_a_request_must_be_valid_and_issuers_stand_side_by_side() {
    let mesh = SECURITY.turn();
    let (first, second) = (Issuer::new("one"), Issuer::new("two"));
    let other = "https://second.example";
    let rules = json!([
        {"issuer": ISSUER, "jwks": first.jwks()},
        {"issuer": other, "jwks": second.jwks(), "fromHeaders": [{"name": "x-token", "prefix": "Token "}]},
    ]);
    let _tokens = mesh.with(&authentications("foo", "httpbin", &rules));
    let (one, two) = (first.sign(&claims(|_| ())), second.sign(&claims(|claims| claims["iss"] = json!(other))));
    let ask = |headers: &[(&str, String)], path: &str| {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        mesh.get("httpbin.foo.test", path, &headers).status
    };
    let (bearer, token) = (format!("Bearer {one}"), format!("Token {two}"));
    assert_eq!(ask(&[("authorization", bearer.clone())], "/get"), 200);
    assert_eq!(ask(&[("x-token", token.clone())], "/get"), 200);
    assert_eq!(ask(&[("authorization", bearer.clone()), ("x-token", token)], "/get"), 200, "both are good");
    assert_eq!(ask(&[("authorization", bearer.clone()), ("x-token", format!("Token {one}x"))], "/get"), 401);
    assert_eq!(ask(&[("authorization", bearer.clone())], "/get?access_token=abc"), 401, "a bad one beside a good one");
    let stranger = Issuer::new("one").sign(&claims(|claims| claims["iss"] = json!("https://third.example")));
    assert_eq!(ask(&[("authorization", format!("Bearer {stranger}"))], "/get"), 401);
    assert_eq!(ask(&[("authorization", bearer), ("authorization", format!("Bearer {stranger}"))], "/get"), 401);
    assert_eq!(ask(&[], "/get"), 200);
}

#[test]
fn applications_get_claims_from_verified_tokens_only() {
    let mesh = SECURITY.turn();
    let issuer = Issuer::new("one");
    let rule = json!({
        "issuer": ISSUER, "jwks": issuer.jwks(), "outputPayloadToHeader": "x-payload",
        "outputClaimToHeaders": [{"header": "x-sub", "claim": "sub"}, {"header": "x-team", "claim": "org.team"}],
    });
    let _tokens = mesh.with(&authentications("foo", "httpbin", &json!([rule])));
    let seen = |headers: &[(&str, &str)]| mesh.get("httpbin.foo.test", "/headers", headers).json()["headers"].clone();
    let bearer = format!("Bearer {}", issuer.sign(&claims(|claims| claims["org"] = json!({"team": "blue"}))));
    let forged = [("x-sub", "root"), ("x-team", "red"), ("x-payload", "e30"), ("authorization", bearer.as_str())];
    let with_token = seen(&forged);
    assert_eq!((&with_token["x-sub"], &with_token["x-team"]), (&json!(["ada"]), &json!(["blue"])), "{with_token}");
    assert!(with_token["x-payload"][0].as_str().is_some_and(|text| text.len() > 40), "{with_token}");
    assert!(with_token.get("authorization").is_none(), "forwardOriginalToken is false: {with_token}");
    let without = seen(&forged[..3]);
    for name in ["x-sub", "x-team", "x-payload"] {
        assert!(without.get(name).is_none(), "{name} of a client is no claim: {without}");
    }
}

#[test]
fn keys_are_fetched_by_the_control_plane_and_missing_ones_refuse_tokens_only() {
    let mesh = SECURITY.turn();
    let puppet = Puppet::new(&mesh, PUPPET);
    let issuer = Issuer::new("one");
    let token = issuer.sign(&claims(|_| ()));
    puppet.answers(&json!([{"path": "/keys", "status": 503}, {"path": "/id", "status": 404}]));
    let rule = json!({"issuer": ISSUER, "jwksUri": "http://puppet.legacy.svc.cluster.local:8000/keys"});
    let _tokens = mesh.with(&authentications("foo", "httpbin", &json!([rule])));
    assert_eq!(status(&mesh, "/get", Some(&token)).0, 401, "no keys, no tokens");
    assert_eq!(status(&mesh, "/get", None).0, 200, "requests without a token are left alone");
    let becomes = |token: &str, expect: u16| {
        eventually("the keys", || match status(&mesh, "/get", Some(token)) {
            (status, _) if status == expect => Ok(()),
            other => Err(format!("{other:?}")),
        });
    };
    puppet.answers(&json!([{"path": "/keys", "body": issuer.jwks()}]));
    becomes(&token, 200);
    assert_eq!(status(&mesh, "/get", Some(&issuer.sign_as(&json!({"kid": "x"}), &claims(|_| ())))).0, 401);
    assert_eq!(status(&mesh, "/get", Some(&Issuer::new("one").sign(&claims(|_| ())))).0, 401);
    // The issuer alone: OpenID discovery says where its keys are.
    let url = "http://puppet.legacy.svc.cluster.local:8000/id";
    let discovered = Issuer::new("three");
    let document = json!({"issuer": url, "jwks_uri": format!("{url}/certs")}).to_string();
    puppet.answers(&json!([
        {"path": "/id/.well-known/openid-configuration", "body": document},
        {"path": "/id/certs", "body": discovered.jwks()},
    ]));
    mesh.apply(&authentications("foo", "httpbin", &json!([{"issuer": url}])));
    becomes(&discovered.sign(&claims(|claims| claims["iss"] = json!(url))), 200);
    assert_eq!(status(&mesh, "/get", Some(&token)).0, 401, "the other issuer is not configured any more");
    // The control plane itself and the metadata services of clouds are no issuers.
    puppet.forget();
    for blocked in ["http://127.0.0.1:15014/metrics", "http://169.254.169.254/keys"] {
        mesh.apply(&authentications("foo", "httpbin", &json!([{"issuer": ISSUER, "jwksUri": blocked}])));
        assert_eq!(status(&mesh, "/get", Some(&token)).0, 401, "{blocked}");
    }
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
    assert_eq!(status(&mesh, "/get", Some(&token(json!("admin")))).0, 200);
    assert_eq!(status(&mesh, "/get", Some(&token(json!(["users"])))).0, 403);
    assert_eq!(status(&mesh, "/get", Some(&token(json!("admin users")))).0, 403, "one claim, not two");
    assert_eq!(status(&mesh, "/get", Some(&token(json!({"admin": true})))).0, 403);
    assert_eq!(status(&mesh, "/get", None).0, 403, "a token is demanded");
}

#[test]
fn policies_read_nested_claims_scopes_audiences_and_presenters() {
    let mesh = SECURITY.turn();
    let issuer = Issuer::new("one");
    let _tokens = mesh.with(&authentication("foo", "httpbin", &issuer));
    let policy = |when: &str| {
        format!(
            "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: claims, namespace: foo}}
spec:
  selector: {{matchLabels: {{app: httpbin}}}}
  rules: [{{when: [{when}]}}]
"
        )
    };
    let _policy = mesh.with(&policy("{key: \"request.auth.claims[org][team]\", values: [blue]}"));
    let ask = |change: &dyn Fn(&mut Value)| status(&mesh, "/get", Some(&issuer.sign(&claims(change)))).0;
    assert_eq!(ask(&|claims| claims["org"] = json!({"team": "blue"})), 200);
    assert_eq!(ask(&|claims| claims["org"] = json!({"team": ["red", "blue"]})), 200);
    assert_eq!(ask(&|claims| claims["org"] = json!({"team": "red"})), 403);
    assert_eq!(ask(&|claims| claims["org.team"] = json!("blue")), 403, "another claim of a similar name");
    mesh.apply(&policy("{key: \"request.auth.claims[scope]\", values: [write]}"));
    assert_eq!(ask(&|claims| claims["scope"] = json!("read write")), 200);
    assert_eq!(ask(&|claims| claims["scope"] = json!("read writer")), 403);
    mesh.apply(&policy("{key: request.auth.audiences, values: [shop]}, {key: request.auth.presenter, values: [app]}"));
    assert_eq!(ask(&|claims| claims["azp"] = json!("app")), 200);
    assert_eq!(ask(&|claims| claims["azp"] = json!("other")), 403);
    mesh.apply(&policy("{key: request.auth.principal, notValues: [\"https://issuer.example/eve\"]}"));
    assert_eq!(ask(&|_| ()), 200);
    assert_eq!(ask(&|claims| claims["sub"] = json!("eve")), 403);
}

#[test]
fn claims_of_words_are_split_where_a_rule_says_so() {
    let mesh = SECURITY.turn();
    let issuer = Issuer::new("one");
    let rule = |spaced: &[&str]| {
        let rule = json!({"issuer": ISSUER, "jwks": issuer.jwks(), "spaceDelimitedClaims": spaced});
        authentications("foo", "httpbin", &json!([rule]))
    };
    let policy = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: claims, namespace: foo}
spec:
  selector: {matchLabels: {app: httpbin}}
  rules: [{when: [{key: \"request.auth.claims[roles]\", values: [admin]}]}]
";
    let _objects = mesh.with(&format!("{}\n---\n{policy}", rule(&["roles"])));
    let ask = |roles: Value| status(&mesh, "/get", Some(&issuer.sign(&claims(|claims| claims["roles"] = roles)))).0;
    assert_eq!(ask(json!("user admin")), 200);
    assert_eq!(ask(json!(["user", "admin"])), 200);
    assert_eq!(ask(json!("user administrator")), 403);
    mesh.apply(&rule(&[]));
    assert_eq!((ask(json!("user admin")), ask(json!("admin"))), (403, 200), "one text, where nothing says otherwise");
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
  - match: [{headers: {\"@request.auth.claims[org][unit]\": {prefix: north}}}]
    directResponse: {status: 200, body: {string: north}}
  - match: [{headers: {\"@request.auth.claims.groups\": {exact: admin}}}]
    directResponse: {status: 200, body: {string: admin}}
  - match: [{headers: {\"@request.auth.claims.level\": {regex: \"[0-9]+\"}}, withoutHeaders: {\"@request.auth.claims.banned\": {exact: \"yes\"}}}]
    directResponse: {status: 200, body: {string: level}}
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
    let with = |name: &str, value: Value| ask(Some(issuer.sign(&claims(|claims| claims[name] = value))));
    assert_eq!(with("org", json!({"unit": "north-east"})), "north");
    assert_eq!(with("org", json!({"unit": "south"})), "none");
    assert_eq!(with("groups", json!(["users", "admin"])), "admin", "any element of a list");
    assert_eq!(with("groups", json!(["administrator"])), "none");
    assert_eq!(with("level", json!("12")), "level");
    assert_eq!(with("level", json!("12a")), "none");
    let banned = issuer.sign(&claims(|claims| {
        claims["level"] = json!("12");
        claims["banned"] = json!("yes");
    }));
    assert_eq!(ask(Some(banned)), "none");
    let thief = Issuer::new("one").sign(&claims(|claims| claims["group"] = json!("red")));
    assert!(!ask(Some(thief)).contains("red"), "an unverified claim is none");
    assert_eq!(ask(None), "none");
    let forged = mesh.get("claims.foo.test", "/", &[("@request.auth.claims.group", "red")]);
    assert!(forged.body != "red", "a header is no claim: {forged:?}");
}
