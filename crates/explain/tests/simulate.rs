//! Calls and where they go: YAML in, text out. Each case is a small mesh and one call.
#![expect(clippy::needless_raw_string_hashes, reason = "expect-test writes them so")]
#![expect(clippy::unwrap_used, clippy::needless_pass_by_value, reason = "a test")]

use std::time::Instant;

use engine::Now;
use expect_test::{Expect, expect};
use explain::{Call, Caller, assume, explain};
use mesh::MeshSnapshot;

/// 2025-01-01, for tokens.
const WALL_NANOS: u64 = 1_735_689_600_000_000_000;

/// A namespace with sidecars: curl calls, reviews v1 and v2 answer; `legacy/old` has no sidecar.
const SHOP: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: legacy}
---
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec: {selector: {app: echo}, ports: [{name: tcp, port: 9000}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: curl, namespace: shop}
spec:
  selector: {matchLabels: {app: curl}}
  template:
    metadata: {labels: {app: curl}}
    spec: {serviceAccountName: curl, containers: [{name: curl, image: curl}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: old, namespace: legacy}
spec:
  selector: {matchLabels: {app: old}}
  template:
    metadata: {labels: {app: old}}
    spec: {containers: [{name: old, image: old}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: reviews-v1, namespace: shop}
spec:
  selector: {matchLabels: {app: reviews, version: v1}}
  template:
    metadata: {labels: {app: reviews, version: v1}}
    spec: {serviceAccountName: reviews, containers: [{name: reviews, image: reviews}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: reviews-v2, namespace: shop}
spec:
  selector: {matchLabels: {app: reviews, version: v2}}
  template:
    metadata: {labels: {app: reviews, version: v2}}
    spec: {serviceAccountName: reviews, containers: [{name: reviews, image: reviews}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: echo, namespace: shop}
spec:
  selector: {matchLabels: {app: echo}}
  template:
    metadata: {labels: {app: echo}}
    spec: {containers: [{name: echo, image: echo}]}
";

const SUBSETS: &str = r"
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: shop}
spec:
  host: reviews
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
";

/// Words of a call: caller, its namespace, method, URL, headers after `|`.
#[track_caller]
fn check(yaml: &str, call: &str, expect: Expect) {
    let documents = api::parse_documents("mesh.yaml", yaml);
    assert!(!documents.has_errors(), "{:#?}", documents.findings);
    let assumed = assume(&api::ConfigSet::new(documents.objects.iter().map(|parsed| parsed.object.clone())));
    let (snapshot, _) = MeshSnapshot::next(None, &assumed.configs);
    let mut parts = call.split('|').map(str::trim);
    let words: Vec<&str> = parts.next().unwrap().split_whitespace().collect();
    let [from, namespace, method, url] = words[..] else { panic!("caller namespace method url: {call}") };
    let headers: Vec<String> = parts.map(str::to_owned).collect();
    let now = Now { mono: Instant::now(), wall_nanos: WALL_NANOS };
    let from = Caller::find(&snapshot, namespace, from).unwrap();
    let call = Call::parse(from, method, url, &headers, now).unwrap();
    let mut explanation = explain(&snapshot, &call);
    explanation.locate(&|object, field| {
        let parsed = documents.objects.iter().find(|parsed| parsed.object.reference() == *object)?;
        Some(parsed.positions.at(field))
    });
    let shares: f64 = explanation.paths.iter().map(|path| path.percent).sum();
    assert!((shares - 100.0).abs() < 1e-6, "{shares}");
    expect.assert_eq(&explanation.to_string());
}

fn virtual_service(http: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: reviews, namespace: shop}}\nspec:\n  hosts: [reviews]\n  http:\n{http}"
    )
}

const JASON: &str =
    "  - {match: [{headers: {end-user: {exact: jason}}}], route: [{destination: {host: reviews, subset: v2}}]}
  - {route: [{destination: {host: reviews, subset: v1}}]}
";

#[test]
fn a_plain_call_is_mutual_tls() {
    check(
        SHOP,
        "deploy/curl shop GET http://reviews:9080/x",
        expect![[r#"
        shop/curl: GET http://reviews:9080/x
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      default  (2 retries)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           cluster    inbound|9080||
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2)
           transport  plaintext  (HTTP/1.1)
        => the application in shop/reviews-v2 gets it on port 9080
    "#]],
    );
}

#[test]
fn routing_by_header() {
    let yaml = format!("{SHOP}{SUBSETS}{}", virtual_service(JASON));
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/x | end-user: jason",
        expect![[r#"
        shop/curl: GET http://reviews:9080/x
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      unnamed  (2 retries)
                      because VirtualService shop/reviews spec.http[0] (mesh.yaml:79)
                      not reviews spec.http[1]: an earlier route fits [VirtualService shop/reviews spec.http[1] (mesh.yaml:80)]
           cluster    outbound|9080|v2|reviews.shop.svc.cluster.local
                      because DestinationRule shop/reviews (mesh.yaml:66)
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_.v2_.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           cluster    inbound|9080||
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2)
           transport  plaintext  (HTTP/1.1)
        => the application in shop/reviews-v2 gets it on port 9080
    "#]],
    );
    check(
        &yaml,
        "curl shop GET http://reviews:9080/x",
        expect![[r#"
        shop/curl: GET http://reviews:9080/x
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      unnamed  (2 retries)
                      because VirtualService shop/reviews spec.http[1] (mesh.yaml:80)
                      not reviews spec.http[0]: header end-user is absent, wanted "jason" [VirtualService shop/reviews spec.http[0] (mesh.yaml:79)]
           cluster    outbound|9080|v1|reviews.shop.svc.cluster.local
                      because DestinationRule shop/reviews (mesh.yaml:66)
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.4:9080  (shop/reviews-v1)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_.v1_.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v1 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           cluster    inbound|9080||
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.4:9080  (shop/reviews-v1)
           transport  plaintext  (HTTP/1.1)
        => the application in shop/reviews-v1 gets it on port 9080
    "#]],
    );
}

#[test]
fn weights_are_shares() {
    let http = "  - route:
    - {destination: {host: reviews, subset: v1}, weight: 90}
    - {destination: {host: reviews, subset: v2}, weight: 10}
";
    let yaml = format!("{SHOP}{SUBSETS}{}", virtual_service(http));
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/",
        expect![[r#"
        shop/curl: GET http://reviews:9080/
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      unnamed  (2 retries)
                      because VirtualService shop/reviews spec.http[0] (mesh.yaml:79)
        90%:
             cluster    outbound|9080|v1|reviews.shop.svc.cluster.local  (weight 90 of 100)
                        because DestinationRule shop/reviews (mesh.yaml:66)
                        because Service shop/reviews (mesh.yaml:10)
                        not outbound|9080|v2|reviews.shop.svc.cluster.local: weight 10 of 100
             endpoint   10.244.0.4:9080  (shop/reviews-v1)
             transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_.v1_.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
          2. shop/reviews-v1 inbound
             mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
             listener   virtualInbound
             chain      0.0.0.0_9080  (HTTP over mutual TLS)
             routes     inbound|9080||
             host       inbound|http|9080
             route      default  (2 retries)
             cluster    inbound|9080||
                        because Service shop/reviews (mesh.yaml:10)
             endpoint   10.244.0.4:9080  (shop/reviews-v1)
             transport  plaintext  (HTTP/1.1)
          => the application in shop/reviews-v1 gets it on port 9080
        10%:
             cluster    outbound|9080|v2|reviews.shop.svc.cluster.local  (weight 10 of 100)
                        because DestinationRule shop/reviews (mesh.yaml:66)
                        because Service shop/reviews (mesh.yaml:10)
                        not outbound|9080|v1|reviews.shop.svc.cluster.local: weight 90 of 100
             endpoint   10.244.0.5:9080  (shop/reviews-v2)
             transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_.v2_.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
          2. shop/reviews-v2 inbound
             mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
             listener   virtualInbound
             chain      0.0.0.0_9080  (HTTP over mutual TLS)
             routes     inbound|9080||
             host       inbound|http|9080
             route      default  (2 retries)
             cluster    inbound|9080||
                        because Service shop/reviews (mesh.yaml:10)
             endpoint   10.244.0.5:9080  (shop/reviews-v2)
             transport  plaintext  (HTTP/1.1)
          => the application in shop/reviews-v2 gets it on port 9080
    "#]],
    );
}

#[test]
fn a_missing_subset() {
    let yaml =
        format!("{SHOP}{SUBSETS}{}", virtual_service("  - route: [{destination: {host: reviews, subset: v3}}]\n"));
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/",
        expect![[r#"
        shop/curl: GET http://reviews:9080/
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      unnamed  (2 retries)
                      because VirtualService shop/reviews spec.http[0] (mesh.yaml:79)
           cluster    outbound|9080|v3|reviews.shop.svc.cluster.local  (no such cluster)
                      not outbound|9080|v1|reviews.shop.svc.cluster.local: it is there, but the route asks for another [DestinationRule shop/reviews (mesh.yaml:66)]
                      not outbound|9080|v2|reviews.shop.svc.cluster.local: it is there, but the route asks for another [DestinationRule shop/reviews (mesh.yaml:66)]
                      not outbound|9080||reviews.shop.svc.cluster.local: it is there, but the route asks for another [DestinationRule shop/reviews (mesh.yaml:66)]
        => the proxy of shop/curl answers 503 [NC] cluster_not_found
           remedy: define the subset in a DestinationRule, or fix the destination's host and port
    "#]],
    );
}

#[test]
fn faults_for_one_user() {
    let http = "  - match: [{headers: {end-user: {exact: jason}}}]
    fault: {delay: {fixedDelay: 7s, percentage: {value: 100}}}
    route: [{destination: {host: reviews}}]
  - match: [{headers: {end-user: {exact: martha}}}]
    fault: {abort: {httpStatus: 500, percentage: {value: 50}}}
    route: [{destination: {host: reviews}}]
  - route: [{destination: {host: reviews}}]
";
    let yaml = format!("{SHOP}{}", virtual_service(http));
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/ | end-user: jason",
        expect![[r#"
        shop/curl: GET http://reviews:9080/
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      unnamed  (2 retries)
                      because VirtualService shop/reviews spec.http[0] (mesh.yaml:71)
                      not reviews spec.http[1]: an earlier route fits [VirtualService shop/reviews spec.http[1] (mesh.yaml:74)]
                      not reviews spec.http[2]: an earlier route fits [VirtualService shop/reviews spec.http[2] (mesh.yaml:77)]
           fault      delay of 7s
                      because VirtualService shop/reviews spec.http[0] (mesh.yaml:71)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           cluster    inbound|9080||
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2)
           transport  plaintext  (HTTP/1.1)
        => the application in shop/reviews-v2 gets it on port 9080
    "#]],
    );
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/ | end-user: martha",
        expect![[r#"
            shop/curl: GET http://reviews:9080/
            1. shop/curl outbound
               listener   0.0.0.0_9080
               chain      unnamed  (HTTP)
               routes     9080
               host       reviews.shop.svc.cluster.local:9080
               route      unnamed  (2 retries)
                          because VirtualService shop/reviews spec.http[1] (mesh.yaml:74)
                          not reviews spec.http[0]: header end-user is "martha", wanted "jason" [VirtualService shop/reviews spec.http[0] (mesh.yaml:71)]
                          not reviews spec.http[2]: an earlier route fits [VirtualService shop/reviews spec.http[2] (mesh.yaml:77)]
            50%:
                 cluster    outbound|9080||reviews.shop.svc.cluster.local
                            because Service shop/reviews (mesh.yaml:10)
                 endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
                 transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
              2. shop/reviews-v2 inbound
                 mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
                 listener   virtualInbound
                 chain      0.0.0.0_9080  (HTTP over mutual TLS)
                 routes     inbound|9080||
                 host       inbound|http|9080
                 route      default  (2 retries)
                 cluster    inbound|9080||
                            because Service shop/reviews (mesh.yaml:10)
                 endpoint   10.244.0.5:9080  (shop/reviews-v2)
                 transport  plaintext  (HTTP/1.1)
              => the application in shop/reviews-v2 gets it on port 9080
            50%:
                 fault      abort with status 500
                            because VirtualService shop/reviews spec.http[1] (mesh.yaml:74)
              => the proxy of shop/curl answers 500 [FI] fault_filter_abort
                 remedy: this is configured: fault.abort
        "#]],
    );
}

const DENY: &str = r#"
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: shop}
spec:
  action: DENY
  selector: {matchLabels: {app: reviews}}
  rules: [{to: [{operation: {paths: ["/admin*"]}}]}]
"#;

#[test]
fn a_deny_policy_is_named() {
    let yaml = format!("{SHOP}{DENY}");
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/admin",
        expect![[r#"
        shop/curl: GET http://reviews:9080/admin
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      default  (2 retries)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           policy     denied
                      because AuthorizationPolicy shop/no-admin spec.rules[0] (mesh.yaml:72)
        => the proxy of shop/reviews-v2 answers 403 rbac_access_denied_matched_policy[ns[shop]-policy[no-admin]-rule[0]]
           remedy: see the AuthorizationPolicy named in the details; none: no ALLOW rule fits the request
    "#]],
    );
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/x",
        expect![[r#"
        shop/curl: GET http://reviews:9080/x
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      default  (2 retries)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           policy     allowed
           cluster    inbound|9080||
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2)
           transport  plaintext  (HTTP/1.1)
        => the application in shop/reviews-v2 gets it on port 9080
    "#]],
    );
}

#[test]
fn an_allow_policy_by_principal() {
    let yaml = format!(
        "{SHOP}---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: only-curl, namespace: shop}}\nspec:\n  selector: {{matchLabels: {{app: reviews}}}}\n  rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/curl]}}}}]}}]\n"
    );
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/x",
        expect![[r#"
        shop/curl: GET http://reviews:9080/x
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      default  (2 retries)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           policy     allowed
                      because AuthorizationPolicy shop/only-curl spec.rules[0] (mesh.yaml:70)
           cluster    inbound|9080||
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2)
           transport  plaintext  (HTTP/1.1)
        => the application in shop/reviews-v2 gets it on port 9080
    "#]],
    );
    check(
        &yaml,
        "deploy/old legacy GET http://reviews.shop:9080/x",
        expect![[r#"
        legacy/old: GET http://reviews.shop:9080/x
        1. legacy/old no proxy
           endpoint   10.244.0.4:9080  (shop/reviews-v1)
        2. shop/reviews-v1 inbound
           mtls       PERMISSIVE  (the caller comes in plaintext)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           policy     denied  (no ALLOW policy has a rule that matches)
                      not AuthorizationPolicy shop/only-curl: no rule matches [AuthorizationPolicy shop/only-curl (mesh.yaml:65)]
        => the proxy of shop/reviews-v1 answers 403 rbac_access_denied_matched_policy[none]
           remedy: see the AuthorizationPolicy named in the details; none: no ALLOW rule fits the request
    "#]],
    );
}

const STRICT: &str = r"
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
";

#[test]
fn strict_refuses_plaintext() {
    let yaml = format!("{SHOP}{STRICT}");
    check(
        &yaml,
        "deploy/old legacy GET http://reviews.shop:9080/x",
        expect![[r#"
        legacy/old: GET http://reviews.shop:9080/x
        1. legacy/old no proxy
           endpoint   10.244.0.4:9080  (shop/reviews-v1)
        2. shop/reviews-v1 inbound
           mtls       STRICT  (the caller comes in plaintext)
                      because PeerAuthentication shop/default (mesh.yaml:66)
           listener   virtualInbound
           chain      none  (no filter chain takes a plaintext connection to port 9080)
        => the proxy of shop/reviews-v1 closes the connection [NR] filter_chain_not_found
           remedy: plaintext to a STRICT port, or a server name no Gateway serves
    "#]],
    );
    let disabled = "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: plain, namespace: shop}\nspec: {host: reviews, trafficPolicy: {tls: {mode: DISABLE}}}\n";
    check(
        &format!("{yaml}{disabled}"),
        "deploy/curl shop GET http://reviews:9080/x",
        expect![[r#"
        shop/curl: GET http://reviews:9080/x
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      default  (2 retries)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because DestinationRule shop/plain (mesh.yaml:71)
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  plaintext  (HTTP/1.1)
        2. shop/reviews-v2 inbound
           mtls       STRICT  (the caller comes in plaintext)
                      because PeerAuthentication shop/default (mesh.yaml:66)
           listener   virtualInbound
           chain      none  (no filter chain takes a plaintext connection to port 9080)
        => the proxy of shop/reviews-v2 closes the connection; the caller gets 503 (UC) [NR] filter_chain_not_found
           remedy: plaintext to a STRICT port, or a server name no Gateway serves
    "#]],
    );
}

#[test]
fn a_token_is_missing() {
    let yaml = format!(
        "{SHOP}{}",
        r#"
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: issuer, namespace: shop}
spec:
  selector: {matchLabels: {app: reviews}}
  jwtRules:
  - issuer: testing@example.com
    jwks: '{"keys":[{"kty":"oct","kid":"a","k":"c2VjcmV0"}]}'
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: with-token, namespace: shop}
spec:
  selector: {matchLabels: {app: reviews}}
  rules: [{from: [{source: {requestPrincipals: ["*"]}}]}]
"#
    );
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/x",
        expect![[r#"
        shop/curl: GET http://reviews:9080/x
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      default  (2 retries)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           token      0 tokens accepted
                      because RequestAuthentication shop/issuer (mesh.yaml:66)
           policy     denied  (no ALLOW policy has a rule that matches)
                      not AuthorizationPolicy shop/with-token: no rule matches [AuthorizationPolicy shop/with-token (mesh.yaml:75)]
        => the proxy of shop/reviews-v2 answers 403 rbac_access_denied_matched_policy[none]
           remedy: see the AuthorizationPolicy named in the details; none: no ALLOW rule fits the request
    "#]],
    );
    check(
        &yaml,
        "deploy/curl shop GET http://reviews:9080/x | authorization: Bearer nonsense",
        expect![[r#"
        shop/curl: GET http://reviews:9080/x
        1. shop/curl outbound
           listener   0.0.0.0_9080
           chain      unnamed  (HTTP)
           routes     9080
           host       reviews.shop.svc.cluster.local:9080
           route      default  (2 retries)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           token      denied  (jwt_authn_access_denied{Jwt_is_not_in_the_form_of_Header.Payload.Signature_with_two_dots_and_3_sections})
                      because RequestAuthentication shop/issuer (mesh.yaml:66)
        => the proxy of shop/reviews-v2 answers 401 jwt_authn_access_denied{Jwt_is_not_in_the_form_of_Header.Payload.Signature_with_two_dots_and_3_sections}
           remedy: the token is malformed
    "#]],
    );
}

const GATEWAY: &str = r"
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: web, namespace: shop}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [shop.example.com]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [shop.example.com]
  gateways: [web]
  http:
  - match: [{uri: {prefix: /reviews}}]
    rewrite: {uri: /}
    timeout: 5s
    route: [{destination: {host: reviews, port: {number: 9080}}}]
";

#[test]
fn through_the_gateway() {
    let yaml = format!("{SHOP}{GATEWAY}");
    check(
        &yaml,
        "gateway shop GET http://shop.example.com/reviews/1",
        expect![[r#"
        outside, at istio-system/istio-ingressgateway: GET http://shop.example.com/reviews/1
        1. istio-system/istio-ingressgateway gateway
           listener   0.0.0.0_8080
           chain      unnamed  (HTTP)
           routes     http.8080
           host       shop.example.com:80
           route      unnamed  (timeout 5s, 2 retries, path rewritten to /)
                      because VirtualService shop/web spec.http[0] (mesh.yaml:80)
           cluster    outbound|9080||reviews.shop.svc.cluster.local
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2, one of 2)
           transport  mutual TLS  (HTTP/1.1, SNI outbound_.9080_._.reviews.shop.svc.cluster.local, ALPN istio-http/1.1,istio,http/1.1)
        2. shop/reviews-v2 inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/istio-system/sa/istio-ingressgateway-service-account)
           listener   virtualInbound
           chain      0.0.0.0_9080  (HTTP over mutual TLS)
           routes     inbound|9080||
           host       inbound|http|9080
           route      default  (2 retries)
           cluster    inbound|9080||
                      because Service shop/reviews (mesh.yaml:10)
           endpoint   10.244.0.5:9080  (shop/reviews-v2)
           transport  plaintext  (HTTP/1.1)
        => the application in shop/reviews-v2 gets it on port 9080
    "#]],
    );
    check(
        &yaml,
        "gateway shop GET http://shop.example.com/",
        expect![[r#"
        outside, at istio-system/istio-ingressgateway: GET http://shop.example.com/
        1. istio-system/istio-ingressgateway gateway
           listener   0.0.0.0_8080
           chain      unnamed  (HTTP)
           routes     http.8080
           host       shop.example.com:80
           route      none
                      not web spec.http[0]: path is "/", wanted prefix "/reviews" [VirtualService shop/web spec.http[0] (mesh.yaml:80)]
        => the proxy of istio-system/istio-ingressgateway answers 404 [NR] route_not_found
           remedy: add a VirtualService or Service for this host and path
    "#]],
    );
    check(
        &yaml,
        "deploy/istio-ingressgateway shop GET http://other.example.com/reviews",
        expect![[r#"
        outside, at istio-system/istio-ingressgateway: GET http://other.example.com/reviews
        1. istio-system/istio-ingressgateway gateway
           listener   0.0.0.0_8080
           chain      unnamed  (HTTP)
           routes     http.8080
           host       none  (nobody serves other.example.com)
                      not shop.example.com:80: serves shop.example.com
           route      none
        => the proxy of istio-system/istio-ingressgateway answers 404 [NR] route_not_found
           remedy: add a VirtualService or Service for this host and path
    "#]],
    );
    check(
        &yaml,
        "gateway shop GET http://shop.example.com:8443/",
        expect![[r#"
        outside, at istio-system/istio-ingressgateway: GET http://shop.example.com:8443/
        => the gateway istio-system/istio-ingressgateway does not listen on port 8443; it listens on: 8080
    "#]],
    );
}

#[test]
fn no_endpoint() {
    let yaml = format!(
        "{SHOP}---\napiVersion: v1\nkind: Service\nmetadata: {{name: empty, namespace: shop}}\nspec: {{selector: {{app: nobody}}, ports: [{{name: http, port: 80}}]}}\n"
    );
    check(
        &yaml,
        "deploy/curl shop GET http://empty/",
        expect![[r#"
        shop/curl: GET http://empty/
        1. shop/curl outbound
           listener   0.0.0.0_80
           chain      unnamed  (HTTP)
           routes     80
           host       empty.shop.svc.cluster.local:80
           route      default  (2 retries)
           cluster    outbound|80||empty.shop.svc.cluster.local
                      because Service shop/empty (mesh.yaml:65)
        => the proxy of shop/curl answers 503 [UH] no_healthy_upstream
           remedy: no ready endpoint: check the pods, the selector, outlier detection
    "#]],
    );
}

#[test]
fn bytes() {
    check(
        SHOP,
        "deploy/curl shop GET tcp://echo:9000",
        expect![[r#"
        shop/curl: tcp://echo:9000
        1. shop/curl outbound
           listener   10.96.0.1_9000
           chain      unnamed  (TCP)
           cluster    outbound|9000||echo.shop.svc.cluster.local
                      because Service shop/echo (mesh.yaml:15)
           endpoint   10.244.0.3:9000  (shop/echo)
           transport  mutual TLS  (SNI outbound_.9000_._.echo.shop.svc.cluster.local, ALPN istio-peer-exchange,istio)
        2. shop/echo inbound
           mtls       PERMISSIVE  (the caller is spiffe://cluster.local/ns/shop/sa/curl)
           listener   virtualInbound
           chain      0.0.0.0_9000  (TCP over mutual TLS)
           cluster    inbound|9000||
                      because Service shop/echo (mesh.yaml:15)
           endpoint   10.244.0.3:9000  (shop/echo)
           transport  plaintext
        => the application in shop/echo gets it on port 9000
    "#]],
    );
}

#[test]
fn out_of_the_mesh() {
    check(
        SHOP,
        "deploy/curl shop GET https://example.com/",
        expect![[r#"
        shop/curl: GET https://example.com/
        note: example.com is no host of the mesh: 203.0.113.10 stands for its address
        1. shop/curl outbound
           listener   virtualOutbound
           chain      virtualOutbound-catchall-tcp  (TCP)
           cluster    PassthroughCluster
           endpoint   203.0.113.10:443
           transport  plaintext
        => it leaves the mesh to 203.0.113.10:443
    "#]],
    );
    check(
        SHOP,
        "deploy/curl shop GET http://example.com/",
        expect![[r#"
        shop/curl: GET http://example.com/
        note: example.com is no host of the mesh: 203.0.113.10 stands for its address
        1. shop/curl outbound
           listener   virtualOutbound
           chain      virtualOutbound-catchall-tcp  (TCP)
           cluster    PassthroughCluster
           endpoint   203.0.113.10:80
           transport  plaintext
        => it leaves the mesh to 203.0.113.10:80
    "#]],
    );
}
