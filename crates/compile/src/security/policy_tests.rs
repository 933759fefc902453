//! Whole policies of a workload, as their filters.

use super::*;
use crate::view::ProxyKind;

fn filters_of(place: Place, yaml: &str) -> PolicyFilters {
    filters_for(place, yaml, true)
}

fn filters_for(place: Place, yaml: &str, asks_over_grpc: bool) -> PolicyFilters {
    let snapshot = test_mesh::snapshot(yaml);
    let kind = if place == Place::Gateway { ProxyKind::Router } else { ProxyKind::Sidecar };
    let mut view = test_mesh::view(kind, "shop", &["app=a"]);
    view.capabilities.has_grpc_authorizers = asks_over_grpc;
    policy_filters(&Context::new(&snapshot, &view), place)
}

fn check(yaml: &str, http: &[&str], tcp: &[&str]) {
    let filters = filters_of(Place::Sidecar, yaml);
    assert_eq!(test_mesh::http_filters(&filters.http), http, "{yaml}");
    assert_eq!(test_mesh::tcp_filters(&filters.tcp), tcp, "{yaml}");
}

fn policy(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn tokens(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

const KEYS: &str = r#"{"keys":[{"kty":"RSA","kid":"k1","alg":"RS256","e":"AQAB","n":"3QbXrZS5"}]}"#;

// `docs/parity.md`, Security 8.2, AP-1

#[test]
fn empty_policies() {
    check("", &[], &[]);
    check(
        &policy("nothing", "shop", "{}"),
        &["ALLOW ns[shop]-policy[nothing]-rule[0]: not(any) <- not(any)"],
        &["ALLOW ns[shop]-policy[nothing]-rule[0]: not(any) <- not(any)"],
    );
    let all = "ns[shop]-policy[all]-rule[0]: any <- any";
    check(&policy("all", "shop", "{rules: [{}]}"), &[&format!("ALLOW {all}")], &[&format!("ALLOW {all}")]);
    check(&policy("all", "shop", "{action: DENY, rules: [{}]}"), &[&format!("DENY {all}")], &[&format!("DENY {all}")]);
    check(&policy("seen", "shop", "{action: AUDIT, rules: [{}]}"), &[], &[]);
}

#[test]
fn deny_comes_before_allow_and_all_policies_of_an_action_stand_together() {
    let yaml = policy("b", "shop", "{rules: [{to: [{operation: {ports: ['1']}}]}]}")
        + &policy(
            "a",
            "istio-system",
            "{rules: [{to: [{operation: {ports: ['2']}}]}, {to: [{operation: {ports: ['3']}}]}]}",
        )
        + &policy("c", "shop", "{action: DENY, rules: [{to: [{operation: {ports: ['4']}}]}]}")
        + &policy("other", "elsewhere", "{action: DENY, rules: [{}]}")
        + &policy("unlike", "shop", "{selector: {matchLabels: {app: b}}, action: DENY, rules: [{}]}");
    let expect = [
        "DENY ns[shop]-policy[c]-rule[0]: port=4 <- any",
        "ALLOW ns[istio-system]-policy[a]-rule[0]: port=2 <- any",
        "ALLOW ns[istio-system]-policy[a]-rule[1]: port=3 <- any",
        "ALLOW ns[shop]-policy[b]-rule[0]: port=1 <- any",
    ];
    check(&yaml, &expect, &expect);
}

#[test]
fn on_tcp_http_rules_vanish_or_widen() {
    check(
        &policy("a", "shop", "{rules: [{to: [{operation: {methods: [GET]}}]}]}"),
        &["ALLOW ns[shop]-policy[a]-rule[0]: :method=GET <- any"],
        &["ALLOW nothing"],
    );
    check(
        &policy("d", "shop", "{action: DENY, rules: [{to: [{operation: {paths: [/admin]}}]}]}"),
        &["DENY ns[shop]-policy[d]-rule[0]: path=/admin <- any"],
        &["DENY ns[shop]-policy[d]-rule[0]: any <- any"],
    );
}

#[test]
fn dry_run_stands_in_the_shadow() {
    let tried = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: try, namespace: shop, annotations: {istio.io/dry-run: 'true'}}\nspec: {action: DENY, rules: [{from: [{source: {notPrincipals: ['*']}}]}]}\n";
    let rule = "DENY ns[shop]-policy[try]-rule[0]: any <- not(peer~spiffe://.+)";
    let shadow = format!("[istio_dry_run_deny_] {rule}");
    check(tried, &[&shadow], &[&shadow]);
    let enforced = "DENY ns[shop]-policy[d]-rule[0]: port=1 <- any";
    let both =
        format!("{tried}{}", policy("d", "shop", "{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}"));
    check(&both, &[enforced, &shadow], &[enforced, &shadow]);
    let allow = tried.replace("action: DENY", "action: ALLOW");
    let rule = "[istio_dry_run_allow_] ALLOW ns[shop]-policy[try]-rule[0]: any <- not(peer~spiffe://.+)";
    check(&allow, &[rule], &[rule]);
}

// `docs/parity.md`, Security 8.10

const MESH: &str = r"
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec:
  meshConfig:
    extensionProviders:
    - name: ask-http
      envoyExtAuthzHttp: {service: authz.shop.svc.cluster.local, port: '8000', pathPrefix: /check}
    - name: ask-grpc
      envoyExtAuthzGrpc: {service: shop/authz.shop.svc.cluster.local, port: 9191, failOpen: true}
    - name: nowhere
      envoyExtAuthzGrpc: {service: gone.shop.svc.cluster.local, port: 9191}
    - name: no-port
      envoyExtAuthzGrpc: {service: authz.shop.svc.cluster.local, port: 1}
    - name: not-an-authorizer
      envoyFileAccessLog: {path: /dev/stdout}
---
apiVersion: v1
kind: Service
metadata: {name: authz, namespace: shop}
spec:
  clusterIP: 10.96.1.90
  selector: {app: authz}
  ports: [{name: http, port: 8000}, {name: grpc, port: 9191}]
";

fn custom(provider: &str) -> String {
    let spec = format!(
        "{{action: CUSTOM, provider: {{name: {provider}}}, rules: [{{to: [{{operation: {{paths: ['/api/*']}}}}]}}]}}"
    );
    format!("{MESH}{}", policy("c", "shop", &spec))
}

#[test]
fn custom_asks_its_provider_about_what_it_marks() {
    check(
        &custom("ask-http"),
        &[
            "[istio_ext_authz_] DENY istio-ext-authz-ask-http-ns[shop]-policy[c]-rule[0]: path=/api/* <- any",
            "ask http://authz.shop.svc.cluster.local /check open=false",
        ],
        &[],
    );
    check(
        &custom("ask-grpc"),
        &[
            "[istio_ext_authz_] DENY istio-ext-authz-ask-grpc-ns[shop]-policy[c]-rule[0]: path=/api/* <- any",
            "ask grpc open=true",
        ],
        &["[istio_ext_authz_] DENY istio-ext-authz-ask-grpc-ns[shop]-policy[c]-rule[0]: any <- any", "ask grpc"],
    );
}

#[test]
fn a_provider_that_cannot_be_asked_refuses() {
    for provider in ["unknown", "nowhere", "no-port", "not-an-authorizer"] {
        let name = format!("istio-ext-authz-{provider}-ns[shop]-policy[c]-rule[0]-deny-due-to-bad-CUSTOM-action");
        check(
            &custom(provider),
            &[&format!("DENY {name}: path=/api/* <- any")],
            &[&format!("DENY {name}: any <- any")],
        );
        let findings = filters_of(Place::Sidecar, &custom(provider)).findings;
        assert!(
            findings.iter().any(|finding| &*finding.code == "LAT0301" && &*finding.field == "spec.provider"),
            "{provider}"
        );
    }
    let no_grpc = filters_for(Place::Sidecar, &custom("ask-grpc"), false);
    let name = "istio-ext-authz-ask-grpc-ns[shop]-policy[c]-rule[0]-deny-due-to-bad-CUSTOM-action";
    assert_eq!(test_mesh::http_filters(&no_grpc.http), [format!("DENY {name}: path=/api/* <- any")]);
    let two = custom("ask-http")
        + &policy(
            "e",
            "shop",
            "{action: CUSTOM, provider: {name: ask-grpc}, rules: [{to: [{operation: {ports: ['1']}}]}]}",
        );
    check(
        &two,
        &[
            "DENY istio-ext-authz-ask-grpc-ns[shop]-policy[e]-rule[0]-deny-due-to-bad-CUSTOM-action: port=1 <- any",
            "DENY istio-ext-authz-ask-http-ns[shop]-policy[c]-rule[0]-deny-due-to-bad-CUSTOM-action: path=/api/* <- any",
        ],
        &[
            "DENY istio-ext-authz-ask-grpc-ns[shop]-policy[e]-rule[0]-deny-due-to-bad-CUSTOM-action: port=1 <- any",
            "DENY istio-ext-authz-ask-http-ns[shop]-policy[c]-rule[0]-deny-due-to-bad-CUSTOM-action: any <- any",
        ],
    );
}

#[test]
fn the_order_is_custom_tokens_deny_allow() {
    let yaml = custom("ask-http")
        + &policy("d", "shop", "{action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}")
        + &policy("a", "shop", "{rules: [{}]}")
        + &tokens("t", &format!("{{jwtRules: [{{issuer: i, jwks: '{KEYS}'}}]}}"));
    let filters = filters_of(Place::Sidecar, &yaml);
    let names: Vec<_> = filters.http.iter().map(|filter| filter.name.rsplit('.').next().unwrap()).collect();
    assert_eq!(names, ["rbac", "ext_authz", "jwt_authn", "rbac", "rbac"]);
}

// `docs/parity.md`, Security 9

#[test]
fn one_issuer() {
    let spec = format!(
        "{{jwtRules: [{{issuer: 'https://id', audiences: [shop], jwks: '{KEYS}', forwardOriginalToken: true, outputClaimToHeaders: [{{header: x-user, claim: sub}}]}}]}}"
    );
    check(
        &tokens("t", &spec),
        &[
            &format!("origins-0: iss=https://id keys={KEYS} aud=shop sub->x-user forward"),
            "requires any(origins-0, none)",
        ],
        &[],
    );
    let gateway = filters_of(Place::Gateway, &tokens("t", &spec));
    assert!(test_mesh::http_filters(&gateway.http)[0].ends_with(" forward reroute"));
}

#[test]
fn several_issuers_are_merged_and_sorted() {
    let yaml = tokens(
        "b",
        &format!(
            "{{jwtRules: [{{issuer: iss-z, jwks: '{KEYS}', fromHeaders: [{{name: x-jwt, prefix: 'Token '}}], fromParams: [token], fromCookies: [session], outputPayloadToHeader: x-payload}}]}}"
        ),
    ) + &tokens(
        "a",
        &format!("{{selector: {{matchLabels: {{app: a}}}}, jwtRules: [{{issuer: iss-y, jwks: '{KEYS}'}}]}}"),
    ) + &tokens(
        "c",
        &format!("{{selector: {{matchLabels: {{app: b}}}}, jwtRules: [{{issuer: iss-x, jwks: '{KEYS}'}}]}}"),
    );
    check(
        &yaml,
        &[
            &format!("origins-0: iss=iss-y keys={KEYS}"),
            &format!(
                "origins-1: iss=iss-z keys={KEYS} header=x-jwt:Token  param=token cookie=session payload->x-payload"
            ),
            "requires any(origins-0, origins-1, all(any(origins-0, none), any(origins-1, none)))",
            &format!("origins-0: iss=iss-y keys={KEYS} forward"),
            &format!("origins-1: iss=iss-z keys={KEYS} header=x-jwt:Token  param=token cookie=session forward"),
            "requires none",
        ],
        &[],
    );
    // Two key sets of one issuer: one of them must fit.
    let twice = tokens("a", &format!("{{jwtRules: [{{issuer: iss-y, jwks: '{KEYS}'}}]}}"))
        + &tokens("b", &format!("{{jwtRules: [{{issuer: iss-y, jwks: '{KEYS}', audiences: [b]}}]}}"));
    let filters = filters_of(Place::Sidecar, &twice);
    assert_eq!(
        test_mesh::http_filters(&filters.http)[2],
        "requires any(origins-0, origins-1, all(any(origins-0, none), any(origins-1, none)))"
    );
}

#[test]
fn keys_that_cannot_be_used_refuse_tokens() {
    for rule in ["jwksUri: 'https://id/keys'", "audiences: [a]"] {
        let yaml = tokens("t", &format!("{{jwtRules: [{{issuer: 'https://id', {rule}}}]}}"));
        let filters = filters_of(Place::Sidecar, &yaml);
        let lines = test_mesh::http_filters(&filters.http);
        assert!(lines[0].contains("no-key-of-this-issuer"), "{lines:?}");
        assert_eq!(lines[1], "requires any(origins-0, none)");
        assert_eq!(&*filters.findings[0].code, "LAT0302");
    }
}

#[test]
fn fetched_keys_are_handed_on_and_failures_told() {
    let source = KeySource::Uri("https://id/keys".into());
    let with = |fetched: Fetched| {
        let mut key_sets = mesh::KeySets::default();
        key_sets.set(source.clone(), fetched);
        let yaml = tokens("t", "{jwtRules: [{issuer: 'https://id', jwksUri: 'https://id/keys'}]}");
        let snapshot = test_mesh::snapshot(&yaml).with_key_sets(std::sync::Arc::new(key_sets));
        let view = test_mesh::view(ProxyKind::Sidecar, "shop", &["app=a"]);
        policy_filters(&Context::new(&snapshot, &view), Place::Sidecar)
    };
    let good = with(Ok(KEYS.into()));
    assert_eq!(test_mesh::http_filters(&good.http)[0], format!("origins-0: iss=https://id keys={KEYS}"));
    assert!(good.findings.is_empty(), "{:?}", good.findings);
    for (fetched, reason) in
        [(Ok("{}".into()), "not a JSON Web Key Set"), (Err("it answers 404".into()), "it answers 404")]
    {
        let bad = with(fetched);
        assert!(test_mesh::http_filters(&bad.http)[0].contains("no-key-of-this-issuer"));
        assert!(bad.findings[0].message.contains(reason), "{:?}", bad.findings);
    }
}

#[test]
fn output_is_the_same_every_time() {
    let yaml =
        custom("ask-http") + &(0..9).map(|i| policy(&format!("p{i}"), "shop", "{rules: [{}]}")).collect::<String>();
    let once = filters_of(Place::Sidecar, &yaml);
    for _ in 0..5 {
        assert_eq!(filters_of(Place::Sidecar, &yaml).http, once.http);
    }
}
