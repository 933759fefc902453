//! Every filter and extension that is built: a case, compared with Envoy.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use testkit::token::Issuer;
use testkit::{Client, eventually};

use crate::admin::{counts, some};
use crate::backend::{self, Backend};
use crate::standalone::{Pair, Standalone, refused};

const TYPES: &str = "type.googleapis.com/";

/// A typed extension: `kind` without the prefix.
pub(crate) fn typed(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("{TYPES}{kind}").into();
    json!({ "name": name, "typed_config": config })
}

pub(crate) fn router() -> Value {
    typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({}))
}

/// An HTTP connection manager; `more` is merged in.
pub(crate) fn hcm(filters: &[Value], routes: &Value, more: &Value) -> Value {
    let mut all = filters.to_vec();
    all.push(router());
    let mut config = json!({
        "stat_prefix": "in",
        "http_filters": all,
        "route_config": { "name": "inline", "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": routes }] },
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    typed(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        config,
    )
}

/// A listener with one chain, on any port.
pub(crate) fn listener(name: &str, filters: &[Value]) -> Value {
    json!({ "name": name, "address": address("127.0.0.1:0".parse().unwrap()), "filter_chains": [{ "filters": filters }] })
}

pub(crate) fn address(at: SocketAddr) -> Value {
    json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } })
}

pub(crate) fn cluster(name: &str, at: &[SocketAddr]) -> Value {
    let endpoints: Vec<Value> = at.iter().map(|at| json!({ "endpoint": { "address": address(*at) } })).collect();
    json!({
        "name": name, "type": "STATIC", "connect_timeout": "2s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] },
    })
}

pub(crate) fn bootstrap(listeners: &[Value], clusters: &[Value]) -> String {
    json!({
        "node": { "id": "me", "cluster": "us" },
        "admin": { "address": address("127.0.0.1:0".parse().unwrap()) },
        // Where Istio sets Envoy otherwise than Envoy's defaults, Lateen does as Istio documents.
        "layered_runtime": { "layers": [{ "name": "istio", "static_layer": {
            "envoy.reloadable_features.http_reject_path_with_fragment": false,
        } }] },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
    .to_string()
}

/// Everything to the cluster `echo`.
pub(crate) fn to_echo() -> Value {
    json!([{ "match": { "prefix": "/" }, "route": { "cluster": "echo" } }])
}

/// A pair with one HTTP listener `http` before an echo.
fn pair(filters: &[Value], routes: &Value, more: &Value) -> Pair {
    let echo = Backend::echo("echo");
    Pair::start(&bootstrap(&[listener("http", &[hcm(filters, routes, more)])], &[cluster("echo", &[echo.address])]))
}

#[test]
fn routes_match_and_act_the_same_way() {
    let (echo, other) = (Backend::echo("echo"), Backend::echo("other"));
    let to = |cluster: &str| json!({ "cluster": cluster });
    let template = |pattern: &str| {
        json!({ "path_match_policy": typed("envoy.path.match.uri_template.uri_template_matcher",
            "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig", json!({ "path_template": pattern })) })
    };
    let header = |name: &str, matcher: Value| {
        let mut of = json!({ "name": name });
        for (key, value) in matcher.as_object().unwrap() {
            of[key] = value.clone();
        }
        json!({ "prefix": "/headers", "headers": [of] })
    };
    let routes = json!([
        { "match": { "path": "/exact" }, "route": to("other") },
        { "match": { "path": "/EXACT", "case_sensitive": false }, "route": to("other") },
        { "match": { "path_separated_prefix": "/a/b" }, "route": { "cluster": "echo", "prefix_rewrite": "/c" } },
        { "match": { "safe_regex": { "regex": "/num/[0-9]+" } },
          "route": { "cluster": "echo", "regex_rewrite": { "pattern": { "regex": "/num/([0-9]+)" }, "substitution": "/n/\\1/x" } } },
        { "match": template("/tpl/{year=*}/{rest=**}"), "route": to("other") },
        { "match": header("x-present", json!({ "present_match": true })), "route": to("other") },
        { "match": header("x-exact", json!({ "string_match": { "exact": "Ab", "ignore_case": true } })), "route": to("other") },
        { "match": header("x-range", json!({ "range_match": { "start": "10", "end": "20" } })), "route": to("other") },
        { "match": header("x-not", json!({ "string_match": { "prefix": "no" }, "invert_match": true, "treat_missing_header_as_empty": false })), "route": to("other") },
        { "match": { "prefix": "/q", "query_parameters": [{ "name": "a", "string_match": { "suffix": "z" } }, { "name": "b", "present_match": true }] }, "route": to("other") },
        { "match": { "prefix": "/half", "runtime_fraction": { "default_value": { "numerator": 0 } } }, "route": to("other") },
        { "match": { "prefix": "/redirect/scheme" }, "redirect": { "https_redirect": true, "response_code": "PERMANENT_REDIRECT" } },
        { "match": { "prefix": "/redirect/host" }, "redirect": { "host_redirect": "other.example", "port_redirect": 8443, "prefix_rewrite": "/to", "strip_query": true } },
        { "match": { "prefix": "/made" }, "direct_response": { "status": 201 } },
        { "match": { "prefix": "/moved" }, "direct_response": { "status": 308 } },
        { "match": { "prefix": "/elsewhere" }, "direct_response": { "status": 302 },
          "response_headers_to_add": [{ "header": { "key": "location", "value": "/there" }, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD" }] },
        { "match": { "prefix": "/direct" }, "direct_response": { "status": 299, "body": { "inline_string": "hello" } },
          "response_headers_to_add": [{ "header": { "key": "x-direct", "value": "%REQ(:PATH)%" } }] },
        { "match": { "prefix": "/edit" }, "route": { "cluster": "echo", "host_rewrite_literal": "new.example" },
          "request_headers_to_add": [
            { "header": { "key": "x-appended", "value": "two" }, "append_action": "APPEND_IF_EXISTS_OR_ADD" },
            { "header": { "key": "x-set", "value": "%REQ(X-IN?X-OTHER)%-%PROTOCOL%" }, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD" },
            { "header": { "key": "x-absent", "value": "added" }, "append_action": "ADD_IF_ABSENT" } ],
          "request_headers_to_remove": ["x-gone"],
          "response_headers_to_add": [{ "header": { "key": "x-by", "value": "again" }, "append_action": "APPEND_IF_EXISTS_OR_ADD" }],
          "response_headers_to_remove": ["content-type"] },
        { "match": { "prefix": "/never" }, "route": to("nobody") },
        { "match": { "prefix": "/unknown" }, "route": { "cluster_header": "x-cluster" } },
        { "match": { "prefix": "/weighted" }, "route": { "weighted_clusters": { "clusters": [
            { "name": "echo", "weight": 0 }, { "name": "other", "weight": 10, "response_headers_to_add": [{ "header": { "key": "x-weighted", "value": "yes" } }] }] } } },
        { "match": { "prefix": "/" }, "route": to("echo") },
    ]);
    let mut manager = hcm(
        &[],
        &routes,
        &json!({ "normalize_path": true, "merge_slashes": true, "path_with_escaped_slashes_action": "UNESCAPE_AND_REDIRECT" }),
    );
    manager["typed_config"]["route_config"]["validate_clusters"] = false.into();
    let clusters = [cluster("echo", &[echo.address]), cluster("other", &[other.address]), cluster("nobody", &[])];
    let pair = Pair::start(&bootstrap(&[listener("http", &[manager])], &clusters));
    let by = |path: &str, headers: &[(&str, &str)]| {
        let answer = pair.get("http", "a.example", path, headers);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let body = answer.json();
        format!("{} {} {}", answer.status, text(&body["by"]), text(&body["path"])).trim_end().to_owned()
    };
    for (path, expect) in [
        ("/exact", "200 other /exact"),
        ("/exactly", "200 echo /exactly"),
        ("/eXact", "200 other /eXact"),
        ("/a/b", "200 echo /c"),
        ("/a/b/d?x=y", "200 echo /c/d?x=y"),
        ("/a/bc", "200 echo /a/bc"),
        ("/num/12", "200 echo /n/12/x"),
        ("/num/12?q=1", "200 echo /n/12/x?q=1"),
        ("/num/1a", "200 echo /num/1a"),
        ("/tpl/1999/a/b", "200 other /tpl/1999/a/b"),
        ("/tpl/1999/a/b?c=d", "200 other /tpl/1999/a/b?c=d"),
        ("/tpl/1999", "200 echo /tpl/1999"),
        ("/q?a=xyz&b", "200 other /q?a=xyz&b"),
        ("/q?a=xyz", "200 echo /q?a=xyz"),
        ("/half", "200 echo /half"),
        ("/x/../exact", "200 other /exact"),
        ("//exact", "200 other /exact"),
        ("/x/%2e%2e/exact", "200 other /exact"),
        ("/never", "503"),
        ("/weighted", "200 other /weighted"),
    ] {
        assert_eq!(by(path, &[]), expect, "{path}");
    }
    for (name, value, expect) in [
        ("x-present", "1", "other"),
        ("x-exact", "aB", "other"),
        ("x-exact", "aBc", "echo"),
        ("x-range", "10", "other"),
        ("x-range", "20", "echo"),
        ("x-range", "x", "echo"),
        ("x-not", "yes", "other"),
        ("x-not", "not", "echo"),
    ] {
        assert_eq!(by("/headers", &[(name, value)]), format!("200 {expect} /headers"), "{name}: {value}");
    }
    for path in [
        "/redirect/scheme?a=b",
        "/redirect/host/x?a=b",
        "/direct/x",
        "/made/a?b=c",
        "/moved",
        "/elsewhere",
        "/a%2fb",
        "/a%5cb/c",
    ] {
        pair.get("http", "a.example:8080", path, &[]);
    }
    pair.get(
        "http",
        "a.example",
        "/edit",
        &[("x-in", "in"), ("x-gone", "1"), ("x-appended", "one"), ("x-absent", "there")],
    );
    pair.get("http", "a.example", "/edit", &[]);
    assert_eq!(by("/unknown", &[("x-cluster", "other")]), "200 other /unknown");
    assert_eq!(by("/unknown", &[("x-cluster", "none")]), "503");
    assert_eq!(by("/unknown", &[]), "503");
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"] {
        assert_eq!(pair.send("http", method, "a.example", "/m", &[]).status, 200);
    }
}

#[test]
fn what_is_no_good_request_is_answered_the_same_way() {
    let pair = pair(&[], &to_echo(), &json!({}));
    for (what, request, is_ours_to_close) in [
        ("no host", "GET / HTTP/1.1\r\n\r\n", false),
        ("HTTP/1.0", "GET / HTTP/1.0\r\nhost: a\r\n\r\n", false),
        ("two lengths", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", true),
        (
            "length and chunks",
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            true,
        ),
        ("nonsense", "hello\r\n\r\n", true),
        ("bad header", "GET / HTTP/1.1\r\nhost: a\r\nb c: d\r\n\r\n", true),
    ] {
        let statuses = pair.both().map(|proxy| {
            let answer =
                Client::plain(proxy.listener("http")).and_then(|mut client| client.raw(request.as_bytes(), false));
            answer.map_or(0, |answer| answer.status)
        });
        // A connection that is closed says as much as a 400.
        let same = |status: u16| if is_ours_to_close && status == 0 { 400 } else { status };
        assert_eq!(same(statuses[1]), same(statuses[0]), "{what}");
    }
}

fn rbac(rules: &Value) -> Value {
    typed("envoy.filters.http.rbac", "envoy.extensions.filters.http.rbac.v3.RBAC", json!({ "rules": rules }))
}

#[test]
fn rbac_decides_the_same_way() {
    let any = json!([{ "any": true }]);
    let rules = json!({
        "action": "DENY",
        "policies": {
            "paths": { "permissions": [{ "url_path": { "path": { "prefix": "/private" } } }], "principals": any },
            "headers": { "permissions": [{ "and_rules": { "rules": [
                { "header": { "name": ":method", "string_match": { "exact": "POST" } } },
                { "not_rule": { "header": { "name": "x-ok", "present_match": true } } }] } }], "principals": any },
            "ips": { "permissions": [{ "any": true }], "principals": [{ "remote_ip": { "address_prefix": "10.0.0.0", "prefix_len": 8 } }] },
            "direct": { "permissions": [{ "url_path": { "path": { "exact": "/me" } } }], "principals": [{ "direct_remote_ip": { "address_prefix": "127.0.0.1", "prefix_len": 32 } }] },
        },
    });
    let more = json!({ "use_remote_address": false, "xff_num_trusted_hops": 0 });
    let pair = pair(&[rbac(&rules)], &to_echo(), &more);
    let status =
        |method: &str, path: &str, headers: &[(&str, &str)]| pair.send("http", method, "a", path, headers).status;
    assert_eq!(status("GET", "/public", &[]), 200);
    assert_eq!(status("GET", "/private/x", &[]), 403);
    assert_eq!(status("GET", "/private?x", &[]), 403);
    assert_eq!(status("POST", "/public", &[]), 403);
    assert_eq!(status("POST", "/public", &[("x-ok", "")]), 200);
    assert_eq!(status("GET", "/public", &[("x-forwarded-for", "10.1.1.1")]), 403);
    assert_eq!(status("GET", "/public", &[("x-forwarded-for", "11.1.1.1")]), 200);
    assert_eq!(status("GET", "/me", &[("x-forwarded-for", "11.1.1.1")]), 403);
}

#[test]
fn rbac_judges_server_names_and_in_the_shadow_the_same_way() {
    let any = json!([{ "any": true }]);
    let policy = |name: &str, permission: Value| json!({ "action": "DENY", "policies": { name: { "permissions": [permission], "principals": any } } });
    let filter = typed(
        "envoy.filters.http.rbac",
        "envoy.extensions.filters.http.rbac.v3.RBAC",
        json!({
            "rules": policy("names", json!({ "requested_server_name": { "exact": "a.example" } })),
            "shadow_rules": policy("private", json!({ "url_path": { "path": { "prefix": "/private" } } })),
        }),
    );
    let of = |key: &str| format!("%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_{key})%");
    let routes = json!([{ "match": { "prefix": "/" }, "direct_response": { "status": 200 },
        "response_headers_to_add": [
            { "header": { "key": "x-shadow", "value": of("engine_result") } },
            { "header": { "key": "x-policy", "value": of("effective_policy_id") } },
        ] }]);
    let names = ["a.example", "b.example"].map(str::to_owned);
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let (chain, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let certificate =
        json!({ "certificate_chain": { "inline_string": chain }, "private_key": { "inline_string": key } });
    let mut secure = listener("secure", &[hcm(&[filter], &routes, &json!({}))]);
    secure["filter_chains"][0]["transport_socket"] = typed(
        "envoy.transport_sockets.tls",
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        json!({ "common_tls_context": { "tls_certificates": [certificate] } }),
    );
    secure["listener_filters"] = json!([typed(
        "envoy.filters.listener.tls_inspector",
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
        json!({})
    )]);
    let pair = Pair::start(&bootstrap(&[secure], &[]));
    for (name, path, status, shadow) in [
        ("a.example", "/", 403, None),
        ("b.example", "/", 200, Some("allowed")),
        ("b.example", "/private", 200, Some("denied")),
    ] {
        for proxy in pair.both() {
            let mut client = Client::tls(proxy.listener("secure"), name, made.cert.der()).unwrap();
            let answer = client.send("GET", name, path, &[]).unwrap();
            assert_eq!(answer.status, status, "{} {name}{path}: {answer:?}", proxy.kind);
            if let Some(shadow) = shadow {
                assert_eq!(answer.header("x-shadow"), Some(shadow), "{} {name}{path}", proxy.kind);
            }
            if shadow == Some("denied") {
                assert_eq!(answer.header("x-policy"), Some("private"), "{}", proxy.kind);
            }
        }
    }
}

#[test]
fn tokens_are_checked_the_same_way() {
    let issuer = Issuer::new("one");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let provider = json!({
        "issuer": "https://issuer.example", "audiences": ["shop"], "forward": true,
        "local_jwks": { "inline_string": issuer.jwks() },
        "from_headers": [{ "name": "authorization", "value_prefix": "Bearer " }, { "name": "x-token" }],
        "from_params": ["token"],
        "claim_to_headers": [{ "header_name": "x-sub", "claim_name": "sub" }],
        "forward_payload_header": "x-payload",
    });
    let jwt = typed(
        "envoy.filters.http.jwt_authn",
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        json!({
            "providers": { "one": provider },
            "rules": [
                { "match": { "prefix": "/open" }, "requires": { "requires_any": { "requirements": [{ "provider_name": "one" }, { "allow_missing": {} }] } } },
                { "match": { "prefix": "/free" } },
                { "match": { "prefix": "/" }, "requires": { "provider_name": "one" } },
            ],
        }),
    );
    let pair = pair(&[jwt], &to_echo(), &json!({}));
    let claims = json!({ "iss": "https://issuer.example", "sub": "ada", "aud": ["x", "shop"], "exp": now + 3600 });
    let changed = |name: &str, value: Value| {
        let mut claims = claims.clone();
        claims[name] = value;
        issuer.sign(&claims)
    };
    let ask = |path: &str, token: &str| {
        let bearer = format!("Bearer {token}");
        let headers: &[(&str, &str)] = if token.is_empty() { &[] } else { &[("authorization", &bearer)] };
        let answer = pair.get("http", "a", path, headers);
        (answer.status, if answer.status == 200 { String::new() } else { answer.body })
    };
    let good = issuer.sign(&claims);
    assert_eq!(ask("/x", &good).0, 200);
    assert_eq!(ask("/x", "").0, 401);
    assert_eq!(ask("/open", "").0, 200);
    assert_eq!(ask("/free", "nonsense").0, 200);
    for (what, token) in [
        ("expired", changed("exp", json!(now - 3600))),
        ("early", changed("nbf", json!(now + 3600))),
        ("issuer", changed("iss", json!("https://other.example"))),
        ("audience", changed("aud", json!("else"))),
        ("key", Issuer::new("one").sign(&claims)),
        ("unknown key", Issuer::new("two").sign(&claims)),
        ("two parts", "a.b".to_owned()),
        ("no base64", "a.b.c".to_owned()),
    ] {
        for path in ["/x", "/open"] {
            assert!(matches!(ask(path, &token).0, 401 | 403), "{what}");
        }
    }
    assert_eq!(pair.get("http", "a", &format!("/x?token={good}"), &[]).status, 200);
    assert_eq!(pair.get("http", "a", "/x", &[("x-token", &good)]).status, 200);
    assert_eq!(
        pair.get("http", "a", "/x", &[("x-token", &good), ("x-sub", "forged"), ("x-payload", "forged")]).status,
        200
    );
}

#[test]
fn a_service_is_asked_for_permission_the_same_way() {
    let judge = Backend::start(|seen| match seen.headers.get("x-verdict").map(String::as_str) {
        Some("no") => (403, vec![("x-why", "because".into()), ("x-secret", "s".into())], "denied by judge".into()),
        Some("login") => (302, vec![("location", "https://login.example".into())], String::new()),
        Some("broken") => (500, vec![], String::new()),
        _ => (200, vec![("x-user", "ada".into()), ("x-other", "o".into())], String::new()),
    });
    let echo = Backend::echo("echo");
    let authz = |allow: bool| {
        typed(
            "envoy.filters.http.ext_authz",
            "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
            json!({
                "failure_mode_allow": allow,
                "status_on_error": { "code": "ServiceUnavailable" },
                "allowed_headers": { "patterns": [{ "exact": "x-verdict" }] },
                "http_service": {
                    "server_uri": { "uri": "http://judge", "cluster": "judge", "timeout": "5s" },
                    "path_prefix": "/check",
                    "authorization_request": { "headers_to_add": [{ "key": "x-asked-by", "value": "proxy" }] },
                    "authorization_response": {
                        "allowed_upstream_headers": { "patterns": [{ "exact": "x-user" }] },
                        "allowed_client_headers": { "patterns": [{ "exact": "x-why" }] },
                    },
                },
            }),
        )
    };
    let gone = backend::nobody();
    let off = json!([
        { "match": { "prefix": "/off" }, "route": { "cluster": "echo" }, "typed_per_filter_config": { "envoy.filters.http.ext_authz":
            { "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute", "disabled": true } } },
        { "match": { "prefix": "/" }, "route": { "cluster": "echo" } },
    ]);
    let start = |judge: SocketAddr| {
        Pair::start(&bootstrap(
            &[
                listener("closed", &[hcm(&[authz(false)], &off, &json!({}))]),
                listener("open", &[hcm(&[authz(true)], &off, &json!({}))]),
            ],
            &[cluster("echo", &[echo.address]), cluster("judge", &[judge])],
        ))
    };
    let pair = start(judge.address);
    for name in ["closed", "open"] {
        let ask = |path: &str, verdict: &str| {
            pair.get(name, "a.example", path, &[("x-verdict", verdict), ("x-user", "forged")])
        };
        let yes = ask("/x?a=b", "yes");
        assert_eq!((yes.status, yes.json()["headers"]["x-user"].as_str()), (200, Some("ada")), "{yes:?}");
        let no = ask("/x", "no");
        assert_eq!(
            (no.status, no.body.as_str(), no.header("x-why")),
            (403, "denied by judge", Some("because")),
            "{no:?}"
        );
        assert_eq!(ask("/x", "login").status, 302);
        assert_eq!(ask("/x", "broken").status, if name == "open" { 200 } else { 503 });
        assert_eq!(ask("/off", "no").status, 200);
    }
    // What the service was asked.
    let asked: Vec<_> = judge
        .seen()
        .into_iter()
        .map(|mut seen| {
            // Envoy's own client adds `x-envoy-internal` and its time limit; nobody asked for them.
            seen.headers.retain(|name, _| {
                !name.starts_with("x-request-id")
                    && !name.contains("trace")
                    && !name.starts_with("x-b3")
                    && !name.starts_with("x-envoy-")
            });
            (seen.method, seen.path, seen.headers)
        })
        .collect();
    for (position, question) in asked.iter().enumerate() {
        let same = asked.iter().filter(|other| *other == question).count();
        assert!(same % 2 == 0, "question {position} was asked in two ways: {question:?} in {asked:#?}");
    }
    let pair = start(gone);
    assert_eq!(pair.get("closed", "a", "/x", &[]).status, 503);
    assert_eq!(pair.get("open", "a", "/x", &[]).status, 200);
}

#[test]
fn faults_are_injected_the_same_way() {
    let fault =
        |config: Value| typed("envoy.filters.http.fault", "envoy.extensions.filters.http.fault.v3.HTTPFault", config);
    let of_route = |config: Value| {
        let mut config = config;
        config["@type"] = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault".into();
        json!({ "envoy.filters.http.fault": config })
    };
    let all = json!({ "numerator": 100 });
    let routes = json!([
        { "match": { "prefix": "/abort" }, "route": { "cluster": "echo" }, "typed_per_filter_config": of_route(json!({ "abort": { "http_status": 555, "percentage": all } })) },
        { "match": { "prefix": "/grpc" }, "route": { "cluster": "echo" }, "typed_per_filter_config": of_route(json!({ "abort": { "grpc_status": 14, "percentage": all } })) },
        { "match": { "prefix": "/never" }, "route": { "cluster": "echo" }, "typed_per_filter_config": of_route(json!({ "abort": { "http_status": 555, "percentage": { "numerator": 0 } } })) },
        { "match": { "prefix": "/delay" }, "route": { "cluster": "echo" }, "typed_per_filter_config": of_route(json!({ "delay": { "fixed_delay": "0.4s", "percentage": all } })) },
        { "match": { "prefix": "/both" }, "route": { "cluster": "echo" }, "typed_per_filter_config": of_route(json!({ "delay": { "fixed_delay": "0.2s", "percentage": all }, "abort": { "http_status": 418, "percentage": all } })) },
        { "match": { "prefix": "/jason" }, "route": { "cluster": "echo" }, "typed_per_filter_config": of_route(json!({ "headers": [{ "name": "end-user", "string_match": { "exact": "jason" } }], "abort": { "http_status": 500, "percentage": all } })) },
        { "match": { "prefix": "/" }, "route": { "cluster": "echo" } },
    ]);
    let pair = pair(&[fault(json!({}))], &routes, &json!({}));
    let ask = |path: &str, headers: &[(&str, &str)]| pair.get("http", "a", path, headers);
    assert_eq!(ask("/", &[]).status, 200);
    let aborted = ask("/abort", &[]);
    assert_eq!((aborted.status, aborted.body.as_str()), (555, "fault filter abort"));
    ask("/grpc", &[]);
    ask("/grpc", &[("content-type", "application/grpc")]);
    assert_eq!(ask("/never", &[]).status, 200);
    assert_eq!((ask("/jason", &[]).status, ask("/jason", &[("end-user", "jason")]).status), (200, 500));
    for (path, status, least) in [("/delay", 200, 400), ("/both", 418, 200)] {
        let since = Instant::now();
        assert_eq!(ask(path, &[]).status, status);
        // Two answers, each late.
        assert!(since.elapsed() >= Duration::from_millis(2 * least), "{path}");
    }
}

#[test]
fn origins_are_allowed_the_same_way() {
    let cors = typed("envoy.filters.http.cors", "envoy.extensions.filters.http.cors.v3.Cors", json!({}));
    let policy = json!({ "envoy.filters.http.cors": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": [{ "exact": "https://a.example" }, { "safe_regex": { "regex": "https://[a-z]+\\.b\\.example" } }],
        "allow_methods": "GET, PUT", "allow_headers": "x-a, x-b", "expose_headers": "x-c", "max_age": "600", "allow_credentials": true,
    } });
    let routes = json!([
        { "match": { "prefix": "/cors" }, "route": { "cluster": "echo" }, "typed_per_filter_config": policy },
        { "match": { "prefix": "/" }, "route": { "cluster": "echo" } },
    ]);
    let pair = pair(&[cors], &routes, &json!({}));
    for origin in ["https://a.example", "https://x.b.example", "https://x.y.b.example", "http://a.example", ""] {
        let origin: &[(&str, &str)] = if origin.is_empty() { &[] } else { &[("origin", origin)] };
        for path in ["/cors", "/none"] {
            pair.get("http", "a", path, origin);
            pair.send("http", "OPTIONS", "a", path, origin);
            let mut preflight = origin.to_vec();
            preflight.push(("access-control-request-method", "PUT"));
            pair.send("http", "OPTIONS", "a", path, &preflight);
        }
    }
    let preflight = [("origin", "https://a.example"), ("access-control-request-method", "PUT")];
    let answer = pair.send("http", "OPTIONS", "a", "/cors", &preflight);
    assert_eq!(
        (answer.status, answer.header("access-control-allow-origin")),
        (200, Some("https://a.example")),
        "{answer:?}"
    );
    assert_eq!(answer.header("access-control-allow-methods"), Some("GET, PUT"));
}

#[test]
fn grpc_statistics_leave_requests_alone() {
    let stats = typed(
        "envoy.filters.http.grpc_stats",
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
        json!({ "emit_filter_state": true, "stats_for_all_methods": false }),
    );
    let pair = pair(&[stats], &to_echo(), &json!({}));
    let answer = pair.send(
        "http",
        "POST",
        "a",
        "/some.Service/Method",
        &[("content-type", "application/grpc"), ("te", "trailers")],
    );
    assert_eq!(answer.status, 200, "{answer:?}");
}

#[test]
fn grpc_calls_are_counted_the_same_way() {
    let listed = json!({ "services": [{ "name": "some.Service", "method_names": ["Good"] }] });
    for settings in [
        json!({ "stats_for_all_methods": false }),
        json!({ "stats_for_all_methods": true }),
        json!({ "stats_for_all_methods": true, "replace_dots_in_grpc_service_name": true }),
        json!({ "individual_method_stats_allowlist": listed }),
    ] {
        let backend = Backend::start(|seen| {
            let status = if seen.path.ends_with("/Good") { "0" } else { "5" };
            (200, vec![("content-type", "application/grpc".into()), ("grpc-status", status.into())], String::new())
        });
        let stats = typed(
            "envoy.filters.http.grpc_stats",
            "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
            settings.clone(),
        );
        let pair = Pair::start(&bootstrap(
            &[listener("http", &[hcm(&[stats], &to_echo(), &json!({}))])],
            &[cluster("echo", &[backend.address])],
        ));
        for (path, messages) in [
            ("/some.Service/Good", 2),
            ("/some.Service/Good", 1),
            ("/some.Service/Bad", 1),
            ("/other.Service/Good", 1),
            ("/odd", 1),
        ] {
            let head = format!(
                "POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\nte: trailers\r\ncontent-length: {}\r\n\r\n",
                messages * 5
            );
            // Messages without content: five zeros each.
            let request = [head.into_bytes(), vec![0; messages * 5]].concat();
            for proxy in pair.both() {
                let answer = Client::plain(proxy.listener("http")).and_then(|mut client| client.raw(&request, false));
                assert_eq!(answer.unwrap().status, 200, "{} {path}", proxy.kind);
            }
        }
        eventually("the same counts", || {
            let [theirs, ours] =
                pair.both().map(|proxy| some(counts(proxy, |name| name.starts_with("envoy_cluster_grpc_"))));
            let is_same = ours == theirs && !ours.is_empty();
            if is_same { Ok(()) } else { Err(format!("{settings}: Lateen: {ours:#?}\nEnvoy: {theirs:#?}")) }
        });
    }
}

/// Why a request is traced is written into its id, or not.
#[test]
fn request_ids_tell_of_traces_the_same_way() {
    const GIVEN: &str = "01234567-89ab-4cde-8f01-23456789abcd";
    for (pack, decide, share) in [(true, true, 100), (false, true, 100), (true, false, 100), (true, true, 0)] {
        let backend = Backend::start(|_| (200, vec![], String::new()));
        let more = json!({
            "request_id_extension": { "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": pack, "use_request_id_for_trace_sampling": decide } },
            "tracing": { "random_sampling": { "value": share } },
        });
        let pair = Pair::start(&bootstrap(
            &[listener("http", &[hcm(&[], &to_echo(), &more)])],
            &[cluster("echo", &[backend.address])],
        ));
        pair.get("http", "a", "/", &[("x-request-id", GIVEN)]);
        let ids: Vec<String> = backend.seen().iter().map(|seen| seen.headers["x-request-id"].clone()).collect();
        assert_eq!(ids[1], ids[0], "pack {pack}, decide {decide}, share {share}: Lateen (left) and Envoy (right)");
        let is_marked = pack && decide && share == 100;
        assert_eq!(ids[1] != GIVEN, is_marked, "pack {pack}, decide {decide}, share {share}: {ids:?}");
    }
}

#[test]
fn request_ids_are_kept_and_made_the_same_way() {
    const GIVEN: &str = "01234567-89ab-4cde-8f01-23456789abcd";
    let id = |config: Value| {
        json!({ "request_id_extension": { "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
        "pack_trace_reason": config["pack_trace_reason"], "use_request_id_for_trace_sampling": config["use_request_id_for_trace_sampling"] } },
        "preserve_external_request_id": config["preserve"], "use_remote_address": config["edge"] })
    };
    for (preserve, edge) in [(false, false), (false, true), (true, true)] {
        // Of a client on the loopback an edge Envoy tells its own address, we that of the client.
        let backend = Backend::start(|_| (200, vec![], String::new()));
        let more = id(
            json!({ "pack_trace_reason": false, "use_request_id_for_trace_sampling": true, "preserve": preserve, "edge": edge }),
        );
        let pair = Pair::start(&bootstrap(
            &[listener("http", &[hcm(&[], &to_echo(), &more)])],
            &[cluster("echo", &[backend.address])],
        ));
        pair.get("http", "a", "/with", &[("x-request-id", GIVEN)]);
        pair.get("http", "a", "/without", &[]);
        let kept: Vec<bool> = backend
            .seen()
            .iter()
            .filter(|seen| seen.path == "/with")
            .map(|seen| seen.headers["x-request-id"] == GIVEN)
            .collect();
        assert_eq!(kept[0], kept[1], "preserve {preserve}, edge {edge}: {:?}", backend.seen());
        for seen in backend.seen().iter().filter(|seen| seen.path == "/without") {
            let made = &seen.headers["x-request-id"];
            assert!(made.len() == 36 && made.as_bytes()[14] == b'4', "{made}");
        }
    }
}

#[test]
fn access_logs_say_the_same() {
    let log = |file: &str, format: Value| {
        json!({ "access_log": [typed("envoy.access_loggers.file", "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            json!({ "path": format!("@DIR@/{file}"), "log_format": format }))] })
    };
    let text = "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% \"%CONNECTION_TERMINATION_DETAILS%\" %BYTES_RECEIVED% %BYTES_SENT% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(:AUTHORITY)%\" %UPSTREAM_CLUSTER% %ROUTE_NAME% %RESP(X-BY)% %UPSTREAM_TRANSPORT_FAILURE_REASON% %REQ(X-LONG):3% %REQUESTED_SERVER_NAME%\n";
    let structure = json!({ "method": "%REQ(:METHOD)%", "code": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%", "absent": "%REQ(X-NONE)%", "sent": "%BYTES_SENT%", "mixed": "a %REQ(:METHOD)% b" });
    let routes = json!([
        { "match": { "prefix": "/gone" }, "route": { "cluster": "gone" }, "name": "to-gone" },
        { "match": { "prefix": "/direct" }, "direct_response": { "status": 404 } },
        { "match": { "prefix": "/to" }, "route": { "cluster": "echo", "prefix_rewrite": "/" }, "name": "named" },
    ]);
    let echo = Backend::echo("echo");
    let gone = backend::nobody();
    let format = json!({ "text_format_source": { "inline_string": text } });
    let pair = Pair::start(&bootstrap(
        &[
            listener("text", &[hcm(&[], &routes, &log("text.log", format))]),
            listener("json", &[hcm(&[], &routes, &log("json.log", json!({ "json_format": structure })))]),
        ],
        &[cluster("echo", &[echo.address]), cluster("gone", &[gone])],
    ));
    let asked = ["/to/x?y", "/gone", "/direct", "/none"];
    for name in ["text", "json"] {
        for path in asked {
            let headers = [("user-agent", "tester"), ("x-long", "abcdef"), ("x-forwarded-for", "1.2.3.4")];
            pair.get(name, "a.example", path, &headers);
            pair.send(name, "POST", "a.example", path, &headers);
        }
        let lines = pair.both().map(|proxy| {
            eventually("the log", || {
                let text = std::fs::read_to_string(proxy.dir.path().join(format!("{name}.log"))).unwrap_or_default();
                let lines: Vec<String> = text.lines().map(str::to_owned).collect();
                if lines.len() == 2 * asked.len() { Ok(lines) } else { Err(text) }
            })
        });
        for (theirs, ours) in lines[0].iter().zip(&lines[1]) {
            if name == "json" {
                let [theirs, ours] = [theirs, ours].map(|line| serde_json::from_str::<Value>(line).unwrap());
                assert_eq!(ours, theirs);
            } else {
                assert_eq!(ours, theirs);
            }
        }
    }
}

/// The spans of requests with these trace ids, as a collector gets them from one proxy, without what
/// differs by nature; parents that are among them are named by their kind.
fn spans_of(kind: &'static str, listeners: &[Value], calls: &[(&str, String)], spans: usize) -> Vec<Vec<Value>> {
    let collector = Backend::start(|_| (202, vec![], String::new()));
    let echo = Backend::echo("echo");
    let clusters = [cluster("echo", &[echo.address]), cluster("collector", &[collector.address])];
    let proxy = Standalone::start(kind, &bootstrap(listeners, &clusters), |_| {});
    for (listener, trace) in calls {
        let context = [
            ("x-b3-traceid", trace.as_str()),
            ("x-b3-spanid", "a2fb4a1d1a96d312"),
            ("x-b3-sampled", "1"),
            ("x-from", "test"),
            ("user-agent", "tester"),
            ("x-request-id", "01234567-89ab-4cde-8f01-23456789abcd"),
        ];
        let mut client = Client::plain(proxy.listener(listener)).unwrap();
        let answer = client.send("GET", "a.example", "/traced?a=b", &context).unwrap();
        assert_eq!(answer.status, 200, "{kind} {listener}: {answer:?}");
        // What the application is told.
        let told = &answer.json()["headers"];
        assert_eq!(told["x-b3-sampled"], "1", "{kind} {listener}: {told}");
    }
    let all = eventually("all spans", || {
        let all: Vec<Value> = collector
            .seen()
            .iter()
            .flat_map(|seen| serde_json::from_str::<Vec<Value>>(&seen.body).unwrap_or_default())
            .collect();
        if all.len() >= spans { Ok(all) } else { Err(format!("{kind}: {all:?}")) }
    });
    let of_trace = |trace: &String| {
        let mine: Vec<Value> = all.iter().filter(|span| span["traceId"] == trace.as_str()).cloned().collect();
        let mut shown: Vec<Value> = mine.iter().map(|span| comparable_span(span.clone(), &mine)).collect();
        shown.sort_by_key(|span| span["kind"].to_string());
        shown
    };
    calls.iter().map(|(_, trace)| of_trace(trace)).collect()
}

fn comparable_span(mut span: Value, all: &[Value]) -> Value {
    let parent = all.iter().find(|other| other["id"] == span["parentId"]);
    if let Some(parent) = parent {
        span["parentId"] = parent["kind"].clone();
    }
    // The caller's own, which both of its ends have where they share it.
    span["sharesId"] = (span["id"] == "a2fb4a1d1a96d312").into();
    for volatile in ["id", "timestamp", "duration", "localEndpoint", "annotations"] {
        span.as_object_mut().unwrap().remove(volatile);
    }
    for volatile in [
        "peer.address",
        "guid:x-request-id",
        "request_size",
        "response_size",
        "node_id",
        "upstream_address",
        "upstream_cluster.name",
        "zone",
        "component",
        "http.url",
    ] {
        span["tags"].as_object_mut().unwrap().remove(volatile);
    }
    span
}

#[test]
fn spans_are_reported_the_same_way() {
    let tracing = |spawn: bool, shared: bool| {
        json!({ "tracing": {
            "random_sampling": { "value": 100 },
            "spawn_upstream_span": spawn,
            "custom_tags": [{ "tag": "fixed", "literal": { "value": "yes" } }, { "tag": "from", "request_header": { "name": "x-from", "default_value": "nobody" } }],
            "provider": typed("envoy.tracers.zipkin", "envoy.config.trace.v3.ZipkinConfig", json!({
                "collector_cluster": "collector", "collector_endpoint": "/api/v2/spans", "collector_endpoint_version": "HTTP_JSON",
                "trace_id_128bit": true, "shared_span_context": shared })),
        } })
    };
    let (mut listeners, mut calls) = (Vec::new(), Vec::new());
    // Each with the kinds of its spans.
    let cases = [
        ("UNSPECIFIED", false, false, &["SERVER"][..]),
        ("INBOUND", false, false, &["SERVER"]),
        ("OUTBOUND", false, false, &["CLIENT"]),
        ("UNSPECIFIED", true, false, &["CLIENT", "SERVER"]),
        ("INBOUND", true, false, &["CLIENT", "SERVER"]),
        ("OUTBOUND", true, false, &["CLIENT", "SERVER"]),
        ("INBOUND", false, true, &["SERVER"]),
        ("OUTBOUND", false, true, &["CLIENT"]),
        ("INBOUND", true, true, &["CLIENT", "SERVER"]),
    ];
    let names = cases.map(|(direction, spawn, shared, _)| format!("{direction}-{spawn}-{shared}"));
    for (at, (name, (direction, spawn, shared, _))) in names.iter().zip(&cases).enumerate() {
        let mut one = listener(name, &[hcm(&[], &to_echo(), &tracing(*spawn, *shared))]);
        one["traffic_direction"] = (*direction).into();
        listeners.push(one);
        calls.push((name.as_str(), format!("463ac35c9f6413ad48485a3953bb612{at}")));
    }
    let spans = cases.iter().map(|(.., kinds)| kinds.len()).sum();
    let [theirs, ours] = ["envoy", "lateen"].map(|kind| spans_of(kind, &listeners, &calls, spans));
    for ((name, (.., kinds)), (theirs, ours)) in names.iter().zip(&cases).zip(theirs.iter().zip(&ours)) {
        assert_eq!(ours, theirs, "{name}: Lateen (left) and Envoy (right)");
        let have: Vec<_> = ours.iter().map(|span| span["kind"].as_str().unwrap_or_default()).collect();
        assert_eq!(have, *kinds, "{name}");
        let tags = &ours.last().unwrap()["tags"];
        assert_eq!((tags["fixed"].as_str(), tags["from"].as_str()), (Some("yes"), Some("test")), "{name}");
    }
}

fn tcp_proxy(config: Value) -> Value {
    let mut config = config;
    config["stat_prefix"] = "tcp".into();
    typed("envoy.filters.network.tcp_proxy", "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", config)
}

/// Sends a line over TCP; the first line that comes back, empty at a closed connection.
fn line(at: SocketAddr, words: &str) -> String {
    let Ok(stream) = TcpStream::connect(at) else { return String::new() };
    stream.set_read_timeout(Some(testkit::PATIENCE)).unwrap();
    let mut answer = String::new();
    // A connection that was cut is as empty as one that was closed.
    _ = (&stream).write_all(format!("{words}\n").as_bytes());
    _ = BufReader::new(&stream).read_line(&mut answer);
    answer.trim().to_owned()
}

#[test]
fn bytes_are_proxied_the_same_way() {
    let network_rbac = |cidr: &str| {
        typed(
            "envoy.filters.network.rbac",
            "envoy.extensions.filters.network.rbac.v3.RBAC",
            json!({
                "stat_prefix": "rbac",
                "rules": { "action": "DENY", "policies": { "ips": { "permissions": [{ "any": true }],
                    "principals": [{ "direct_remote_ip": { "address_prefix": cidr, "prefix_len": 32 } }] } } },
            }),
        )
    };
    let weighted = json!({ "weighted_clusters": { "clusters": [{ "name": "one", "weight": 1 }, { "name": "two", "weight": 999_999 }] } });
    let gone = backend::nobody();
    let pair = Pair::start(&bootstrap(
        &[
            listener("plain", &[tcp_proxy(json!({ "cluster": "one" }))]),
            listener("weighted", &[tcp_proxy(weighted)]),
            listener("gone", &[tcp_proxy(json!({ "cluster": "gone" }))]),
            listener("empty", &[tcp_proxy(json!({ "cluster": "empty" }))]),
            listener("denied", &[network_rbac("127.0.0.1"), tcp_proxy(json!({ "cluster": "one" }))]),
            listener("allowed", &[network_rbac("127.0.0.2"), tcp_proxy(json!({ "cluster": "one" }))]),
        ],
        &[
            cluster("one", &[backend::tcp("one")]),
            cluster("two", &[backend::tcp("two")]),
            cluster("gone", &[gone]),
            cluster("empty", &[]),
        ],
    ));
    for (name, expect) in [
        ("plain", "one hi"),
        ("weighted", "two hi"),
        ("gone", ""),
        ("empty", ""),
        ("denied", ""),
        ("allowed", "one hi"),
    ] {
        for proxy in pair.both() {
            assert_eq!(line(proxy.listener(name), "hi"), expect, "{name} of {}", proxy.kind);
        }
    }
}

/// A self-signed certificate for `name`, as a TLS context of a server, and its DER.
fn server_tls(name: &str, alpn: &[&str]) -> (Value, Vec<u8>, String) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let context = json!({ "name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": { "alpn_protocols": alpn, "tls_certificates": [{
            "certificate_chain": { "inline_string": made.cert.pem() }, "private_key": { "inline_string": made.signing_key.serialize_pem() } }] } } });
    (context, made.cert.der().to_vec(), made.cert.pem())
}

fn client_tls(root: &str, name: &str) -> Value {
    json!({ "name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": name,
        "common_tls_context": { "validation_context": {
            "trusted_ca": { "inline_string": root },
            "match_typed_subject_alt_names": [{ "san_type": "DNS", "matcher": { "exact": name } }] } } } })
}

fn direct(body: &str) -> Value {
    hcm(
        &[],
        &json!([{ "match": { "prefix": "/" }, "direct_response": { "status": 200, "body": { "inline_string": body } } }]),
        &json!({}),
    )
}

fn inspector(name: &str, kind: &str) -> Value {
    typed(
        &format!("envoy.filters.listener.{name}"),
        &format!("envoy.extensions.filters.listener.{name}.v3.{kind}"),
        json!({}),
    )
}

#[test]
fn chains_are_chosen_by_what_inspectors_see() {
    let (tls_a, root_a, _) = server_tls("a.example", &[]);
    let (tls_b, root_b, _) = server_tls("x.b.example", &["http/1.1"]);
    let mut chains = listener("chains", &[]);
    chains["listener_filters"] = json!([
        inspector("original_dst", "OriginalDst"),
        inspector("tls_inspector", "TlsInspector"),
        inspector("http_inspector", "HttpInspector")
    ]);
    chains["filter_chains"] = json!([
        { "filter_chain_match": { "server_names": ["a.example"], "transport_protocol": "tls" }, "filters": [direct("a")], "transport_socket": tls_a },
        { "filter_chain_match": { "server_names": ["*.b.example"], "transport_protocol": "tls" }, "filters": [direct("b")], "transport_socket": tls_b },
        { "filter_chain_match": { "transport_protocol": "raw_buffer", "application_protocols": ["http/1.1", "http/1.0"] }, "filters": [direct("http")],
          "transport_socket": { "name": "envoy.transport_sockets.raw_buffer", "typed_config": { "@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" } } },
        { "filter_chain_match": { "transport_protocol": "raw_buffer" }, "filters": [tcp_proxy(json!({ "cluster": "tcp" }))] },
    ]);
    chains["listener_filters_timeout"] = "30s".into();
    chains["continue_on_listener_filters_timeout"] = true.into();
    let pair = Pair::start(&bootstrap(&[chains], &[cluster("tcp", &[backend::tcp("tcp")])]));
    for proxy in pair.both() {
        let at = proxy.listener("chains");
        let tls = |name: &str, root: &[u8]| {
            Client::tls(at, name, root)
                .and_then(|mut client| client.send("GET", name, "/", &[]))
                .map(|answer| answer.body)
        };
        assert_eq!(tls("a.example", &root_a).unwrap(), "a", "{}", proxy.kind);
        assert_eq!(tls("x.b.example", &root_b).unwrap(), "b", "{}", proxy.kind);
        assert!(tls("c.example", &root_a).is_err(), "{}: no chain for the name", proxy.kind);
        assert!(tls("a.example", &root_b).is_err(), "{}: another certificate", proxy.kind);
        assert_eq!(Client::plain(at).unwrap().send("GET", "x", "/", &[]).unwrap().body, "http", "{}", proxy.kind);
        assert_eq!(line(at, "\u{1}not http"), "tcp \u{1}not http", "{}", proxy.kind);
    }
}

#[test]
fn sockets_towards_upstreams_are_chosen_by_endpoint() {
    sockets_by_endpoint(&["h2", "http/1.1"]);
}

#[test]
fn a_server_without_alpn_looks_for_the_preface() {
    sockets_by_endpoint(&[]);
}

/// A cluster of HTTP/2 with an endpoint behind TLS, whose server takes `alpn`, and one in the clear:
/// either proxy as the client of either.
fn sockets_by_endpoint(alpn: &[&str]) {
    let (inner, _, root) = server_tls("inner.example", alpn);
    let echo = Backend::echo("echo");
    let mut secure = listener("secure", &[hcm(&[], &to_echo(), &json!({}))]);
    secure["filter_chains"][0]["transport_socket"] = inner;
    let clear = listener("clear", &[hcm(&[], &to_echo(), &json!({}))]);
    let serving = bootstrap(&[secure, clear], &[cluster("echo", &[echo.address])]);
    let http2 = json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": { "http2_protocol_options": {} } } });
    let routes = json!([
        { "match": { "prefix": "/wrong" }, "route": { "cluster": "wrong" } },
        { "match": { "prefix": "/" }, "route": { "cluster": "mixed" } },
    ]);
    for server in ["envoy", "lateen"] {
        let server = Standalone::start(server, &serving, |_| {});
        let (tls, plain) = (server.listener("secure"), server.listener("clear"));
        let mut mixed = cluster("mixed", &[tls, plain]);
        mixed["transport_socket_matches"] = json!([
            { "name": "tls", "match": { "tlsMode": "istio" }, "transport_socket": client_tls(&root, "inner.example") },
            { "name": "raw", "match": {}, "transport_socket": { "name": "envoy.transport_sockets.raw_buffer",
                "typed_config": { "@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" } } },
        ]);
        mixed["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["metadata"] =
            json!({ "filter_metadata": { "envoy.transport_socket_match": { "tlsMode": "istio" } } });
        mixed["typed_extension_protocol_options"] = http2.clone();
        let mut wrong = cluster("wrong", &[tls]);
        wrong["transport_socket"] = client_tls(&root, "else.example");
        let text = bootstrap(&[listener("http", &[hcm(&[], &routes, &json!({}))])], &[mixed, wrong]);
        for client in ["envoy", "lateen"] {
            let proxy = Standalone::start(client, &text, |_| {});
            let mut client = Client::plain(proxy.listener("http")).unwrap();
            let who = format!("{} to {}", proxy.kind, server.kind);
            for _ in 0..4 {
                let answer = client.send("GET", "a", "/x", &[]).unwrap();
                assert_eq!(answer.status, 200, "{who}: {answer:?}");
            }
            let wrong = client.send("GET", "a", "/wrong", &[]).unwrap();
            assert_eq!(wrong.status, 503, "{who}: another name than the certificate's: {wrong:?}");
        }
    }
}

#[test]
fn retries_avoid_hosts_that_failed_before() {
    let (good, bad) = (Backend::echo("good"), Backend::start(|_| (503, vec![], "bad".into())));
    let retry = json!({ "cluster": "both", "retry_policy": {
        "retry_on": "5xx", "num_retries": 1, "host_selection_retry_max_attempts": 40,
        "retry_host_predicate": [typed("envoy.retry_host_predicates.previous_hosts", "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate", json!({}))],
    } });
    let routes = json!([
        { "match": { "prefix": "/once" }, "route": { "cluster": "bad" } },
        { "match": { "prefix": "/" }, "route": retry },
    ]);
    let mut both = cluster("both", &[good.address, bad.address]);
    both["lb_policy"] = "RANDOM".into();
    let pair = Pair::start(&bootstrap(
        &[listener("http", &[hcm(&[], &routes, &json!({}))])],
        &[both, cluster("bad", &[bad.address])],
    ));
    assert_eq!(pair.get("http", "a", "/once", &[]).status, 503);
    for _ in 0..20 {
        assert_eq!(pair.get("http", "a", "/", &[]).status, 200);
    }
    assert!(bad.seen().len() > 4, "the bad one was tried: {}", bad.seen().len());
}

#[test]
fn timeouts_are_the_same() {
    let slow = Backend::start(|seen| {
        if seen.path.starts_with("/slow") {
            // Never answered.
            loop {
                std::thread::park();
            }
        }
        (200, vec![], "done".into())
    });
    let routes = json!([
        { "match": { "prefix": "/slow/timeout" }, "route": { "cluster": "slow", "timeout": "0.3s" } },
        { "match": { "prefix": "/slow/tries" }, "route": { "cluster": "slow", "timeout": "30s", "retry_policy": { "retry_on": "reset,5xx", "num_retries": 1, "per_try_timeout": "1s" } } },
        { "match": { "prefix": "/" }, "route": { "cluster": "slow" } },
    ]);
    let pair = Pair::start(&bootstrap(
        &[listener("http", &[hcm(&[], &routes, &json!({}))])],
        &[cluster("slow", &[slow.address])],
    ));
    assert_eq!(pair.get("http", "a", "/fast", &[]).status, 200);
    let late = pair.get("http", "a", "/slow/timeout", &[]);
    assert_eq!((late.status, late.body.as_str()), (504, "upstream request timeout"));
    assert_eq!(pair.get("http", "a", "/slow/tries", &[]).status, 504);
    eventually("two tries of each", || match slow.seen().iter().filter(|seen| seen.path == "/slow/tries").count() {
        4 => Ok(()),
        other => Err(other.to_string()),
    });
}

#[test]
fn what_is_not_built_is_refused_by_name_and_path() {
    let echo = cluster("echo", &[SocketAddr::from(([127, 0, 0, 1], 1))]);
    let http = |filters: &[Value]| {
        bootstrap(&[listener("http", &[hcm(filters, &to_echo(), &json!({}))])], std::slice::from_ref(&echo))
    };
    let check = |text: &str, words: &[&str]| {
        let said = refused("lateen", text);
        for word in words {
            assert!(said.contains(word), "{word:?} is not in {said}");
        }
    };
    check(
        &http(&[typed("envoy.filters.http.lua", "envoy.extensions.filters.http.lua.v3.Lua", json!({}))]),
        &[
            "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.http_filters[0]",
            "envoy.filters.http.lua",
            "envoy.extensions.filters.http.lua.v3.Lua",
        ],
    );
    check(
        &http(&[json!({ "name": "nobody", "typed_config": { "@type": "type.googleapis.com/nobody.knows.This" } })]),
        &["http_filters[0]", "\"nobody\"", "nobody.knows.This"],
    );
    check(
        &bootstrap(
            &[listener(
                "tcp",
                &[typed(
                    "envoy.filters.network.redis_proxy",
                    "envoy.extensions.filters.network.redis_proxy.v3.RedisProxy",
                    json!({}),
                )],
            )],
            &[],
        ),
        &["redis_proxy"],
    );
    let original = json!({ "name": "original", "type": "ORIGINAL_DST", "connect_timeout": "1s", "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": { "use_http_header": true } });
    check(&bootstrap(&[], &[original]), &["original", "original_dst_lb_config.use_http_header"]);
    let mut odd = echo.clone();
    odd["lb_policy"] = "NOBODY".into();
    check(&bootstrap(&[], &[odd]), &["static_resources.clusters[0]", "NOBODY"]);
    let mut misspelt = echo.clone();
    misspelt["conect_timeout"] = "1s".into();
    check(&bootstrap(&[], &[misspelt]), &["static_resources.clusters[0]", "conect_timeout"]);
    check(&json!({ "hds_config": {} }).to_string(), &["hds_config"]);
    check("- a", &["bootstrap"]);
}
