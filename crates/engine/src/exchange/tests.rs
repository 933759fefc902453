use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::rbac::v3 as rbac_pb;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3 as cors_pb;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as fault_pb;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as rbac_http;
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use proto::any::pack;
use types::{Cause, RequestHead, ResponseHead};

use super::*;
use crate::config::NodeFacts;
use crate::record::Stage;
use crate::testing::*;

mod filters;
mod hashing;
mod replies;

fn header(name: &str, value: &str, append: bool) -> core::HeaderValueOption {
    core::HeaderValueOption {
        header: Some(core::HeaderValue { key: name.to_owned(), value: value.to_owned(), ..Default::default() }),
        append_action: i32::from(!append) * 2,
        ..Default::default()
    }
}

fn retries(on: &str, retries: u32) -> route::RetryPolicy {
    route::RetryPolicy {
        retry_on: on.to_owned(),
        num_retries: number(retries),
        retry_host_predicate: vec![route::retry_policy::RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
            config_type: Some(route::retry_policy::retry_host_predicate::ConfigType::TypedConfig(pack(
                &PreviousHostsPredicate::default(),
            ))),
        }],
        host_selection_retry_max_attempts: 5,
        ..Default::default()
    }
}

#[test]
fn a_request_goes_through() {
    let world = Http::simple().build();
    let mut call = world.start(get("example.com", "/x?y=1"));
    let attempt = call.attempt();
    assert_eq!(&*attempt.cluster.name, "a");
    assert_eq!(attempt.picked.host.address.to_string(), "10.0.0.1:8001");
    assert_eq!(attempt.protocol, UpstreamProtocol::Http1);
    assert_eq!((attempt.shared.requests.get(), attempt.picked.host.requests.get()), (1, 1));
    assert_eq!(call.head.fields.get("x-forwarded-proto"), Some(&b"http"[..]));
    assert_eq!(call.head.fields.get("x-request-id").map(<[u8]>::len), Some(36));
    assert!(!call.head.fields.contains("x-forwarded-for"));
    call.pass(Duration::from_millis(12));
    let response = call.upstream(ResponseHead::new(200));
    assert!(matches!(call.step(), Step::Respond));
    assert_eq!(response.fields.get("server"), Some(&b"envoy"[..]));
    assert_eq!(response.fields.get("date"), Some(&b"Tue, 14 Nov 2023 22:13:20 GMT"[..]));
    assert_eq!(response.fields.get("x-envoy-upstream-service-time"), Some(&b"12"[..]));
    assert_eq!(call.exchange.info().details.as_str(), "via_upstream");
    assert_eq!(call.flags(), "-");
    let shared = Arc::clone(&attempt.shared);
    drop(attempt);
    assert_eq!(shared.requests.get(), 0, "places are given back");
    assert_eq!(call.record.outcome(Stage::Route), Some("to-a"));
    assert_eq!(call.record.outcome(Stage::Cluster), Some("a"));
}

#[test]
fn refused_before_anything() {
    let check = |head: RequestHead, cause: Cause, status: u16| {
        let world = Http::simple().build();
        let mut call = world.start(head);
        let reply = call.reply();
        assert_eq!((reply.cause, reply.head.status), (cause, status));
        assert!(!reply.head.fields.contains("x-envoy-upstream-service-time"));
        assert_eq!(reply.head.fields.get("server"), Some(&b"envoy"[..]));
    };
    let mut old = get("a", "/");
    old.version = types::Version::Http10;
    check(old, Cause::UpgradeRequired, 426);
    check(get("", "/"), Cause::MissingHost, 400);
    check(RequestHead::new("CONNECT", "a:443", ""), Cause::UpgradeRefused, 403);
    let mut upgrade = get("a", "/");
    upgrade.set_protocol(Some(b"weird"));
    check(upgrade, Cause::UpgradeRefused, 403);
}

#[test]
fn routes_by_host_and_path() {
    let hosts = vec![
        host(&["a.com", "a"], vec![to("/one", "a"), to("/", "b")]),
        host(&["*.com"], vec![to("/", "c")]),
        host(&["none"], vec![to("/only", "a")]),
    ];
    let clusters = ["a", "b", "c"].map(|name| cluster(name, &[80])).to_vec();
    let world = Http::new(hosts, clusters).build();
    let check = |authority: &str, path: &str, expect: &str| {
        let mut call = world.start(get(authority, path));
        let found = match call.step() {
            Step::Forward(attempt) => attempt.cluster.name.to_string(),
            Step::Reply(reply) => format!("{} {}", reply.head.status, call.exchange.info().details.as_str()),
            other => panic!("{other:?}"),
        };
        assert_eq!(found, expect, "{authority} {path}");
    };
    check("a.com", "/one/x", "a");
    check("A.com:9999", "/two", "b");
    check("b.com", "/one", "c");
    check("none", "/only?x", "a");
    check("none", "/other", "404 route_not_found");
    check("unknown", "/", "404 route_not_found");
}

#[test]
fn a_missing_cluster_and_an_empty_one() {
    let hosts = vec![host(&["*"], vec![to("/gone", "gone"), to("/", "empty")])];
    let world = Http::new(hosts, vec![cluster("empty", &[])]).build();
    let mut call = world.start(get("a", "/gone"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body, call.flags().as_str()), (503, &b""[..], "NC"));
    let mut call = world.start(get("a", "/"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body, call.flags().as_str()), (503, &b"no healthy upstream"[..], "UH"));
}

#[test]
fn weights_draw_by_seed() {
    let weight = |name: &str, weight: u32| route::weighted_cluster::ClusterWeight {
        name: name.to_owned(),
        weight: number(weight),
        ..Default::default()
    };
    let weighted = with(to("/", "x"), |action| {
        let clusters = vec![weight("a", 90), weight("b", 10), weight("c", 0)];
        action.cluster_specifier =
            Some(route::route_action::ClusterSpecifier::WeightedClusters(route::WeightedCluster {
                clusters,
                ..Default::default()
            }));
    });
    let clusters = ["a", "b", "c"].map(|name| cluster(name, &[80])).to_vec();
    let world = Http::new(vec![host(&["*"], vec![weighted])], clusters).build();
    let mut counts = std::collections::BTreeMap::new();
    for seed in 0..10_000 {
        let mut call = world.start_seeded(get("a", "/"), seed, true);
        *counts.entry(call.attempt().cluster.name.to_string()).or_insert(0) += 1;
    }
    assert!((8850..=9150).contains(&counts["a"]) && (850..=1150).contains(&counts["b"]), "{counts:?}");
    assert!(!counts.contains_key("c"));
}

#[test]
fn direct_response_redirect_and_their_headers() {
    let mut direct = to("/direct", "x");
    direct.action = Some(route::route::Action::DirectResponse(route::DirectResponseAction {
        status: 418,
        body: Some(core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineString("teapot".to_owned())),
            ..Default::default()
        }),
        ..Default::default()
    }));
    direct.response_headers_to_add = vec![header("x-note", "here", false)];
    let mut redirect = to("/old", "x");
    redirect.action = Some(route::route::Action::Redirect(route::RedirectAction {
        path_rewrite_specifier: Some(route::redirect_action::PathRewriteSpecifier::PrefixRewrite("/new".to_owned())),
        ..Default::default()
    }));
    redirect.response_headers_to_add = vec![header("x-note", "here", false)];
    let world = Http::new(vec![host(&["*"], vec![direct, redirect])], vec![]).build();
    let mut call = world.start(get("a", "/direct"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (418, &b"teapot"[..]));
    assert_eq!(reply.head.fields.get("content-length"), Some(&b"6"[..]));
    assert_eq!(reply.head.fields.get("x-note"), Some(&b"here"[..]));
    assert_eq!(reply.head.fields.get("location"), None);
    assert_eq!(call.exchange.info().details.as_str(), "direct_response");
    let mut call = world.start(RequestHead::new("HEAD", "a", "/direct"));
    assert!(call.reply().body.is_empty());
    let mut call = world.start(get("a:8080", "/old/x?q=1"));
    let reply = call.reply();
    assert_eq!(reply.head.status, 301);
    assert_eq!(reply.head.fields.get("location"), Some(&b"http://a:8080/new/x?q=1"[..]));
    assert_eq!(reply.head.fields.get("x-note"), Some(&b"here"[..]));
}

#[test]
fn redirects() {
    use crate::route::{PathMatch, Redirect, RedirectPath};
    let check = |redirect: Redirect, https: bool, authority: &str, path: &str, expect: &str| {
        let mut head = get(authority, path);
        head.scheme = if https { types::Scheme::Https } else { types::Scheme::Http };
        let to = reply::location(&redirect, &PathMatch::Prefix((*b"/a").into()), &head);
        assert_eq!(String::from_utf8(to).unwrap(), expect);
    };
    let base = || Redirect {
        status: 301,
        scheme: None,
        host: "".into(),
        port: 0,
        path: RedirectPath::Keep,
        strip_query: false,
    };
    check(Redirect { path: RedirectPath::Path("/b".into()), ..base() }, false, "h", "/a?x=1", "http://h/b?x=1");
    check(Redirect { path: RedirectPath::Path("/b?y".into()), ..base() }, false, "h", "/a?x=1", "http://h/b?y");
    check(Redirect { host: "o.com".into(), ..base() }, false, "h:81", "/a", "http://o.com/a");
    check(Redirect { scheme: Some("https".into()), ..base() }, false, "h:80", "/a", "https://h/a");
    check(Redirect { scheme: Some("https".into()), ..base() }, false, "h:8080", "/a", "https://h:8080/a");
    check(Redirect { scheme: Some("http".into()), ..base() }, false, "h:80", "/a", "http://h:80/a");
    check(Redirect { port: 8443, ..base() }, true, "h", "/a", "https://h:8443/a");
    check(Redirect { port: 443, ..base() }, true, "h:9", "/a", "https://h/a");
    check(Redirect { strip_query: true, ..base() }, false, "h", "/a?x", "http://h/a");
    check(Redirect { path: RedirectPath::Path(".evil".into()), ..base() }, false, "h", "/a?x", "http://h/.evil?x");
    check(Redirect { path: RedirectPath::Path("?y".into()), ..base() }, false, "h", "/a?x", "http://h/?y");
    check(Redirect { path: RedirectPath::Prefix("b".into()), ..base() }, false, "h", "/a/c", "http://h/b/c");
}

#[test]
fn https_redirect_by_virtual_host() {
    let mut all = host(&["*"], vec![to("/", "a")]);
    all.require_tls = 2;
    let world = Http::new(vec![all], vec![cluster("a", &[80])]).build();
    let mut call = world.start(get("a.com:80", "/x?y"));
    let reply = call.reply();
    assert_eq!((reply.cause, reply.head.status), (Cause::HttpsRedirect, 301));
    assert_eq!(reply.head.fields.get("location"), Some(&b"https://a.com/x?y"[..]));
    let mut behind = get("a.com", "/");
    behind.fields.push("x-forwarded-proto", b"https");
    assert!(matches!(world.start(behind).step(), Step::Forward(_)), "the proxy in front is trusted here");
}

#[test]
fn rewrites_keep_the_original() {
    let rewrite = with(to("/foo", "a"), |action| {
        action.prefix_rewrite = "/bar".to_owned();
        action.host_rewrite_specifier =
            Some(route::route_action::HostRewriteSpecifier::HostRewriteLiteral("inner".to_owned()));
    });
    let world = Http::new(vec![host(&["*"], vec![rewrite])], vec![cluster("a", &[80])]).build();
    let mut call = world.start(get("outer", "/foo/x?q"));
    call.attempt();
    assert_eq!((call.head.path(), call.head.authority()), (&b"/bar/x?q"[..], &b"inner"[..]));
    assert_eq!(call.head.fields.get("x-envoy-original-path"), Some(&b"/foo/x?q"[..]));
    assert_eq!(call.head.fields.get("x-envoy-original-host"), Some(&b"outer"[..]));
}

#[test]
fn edits_run_from_specific_to_general() {
    let mut one = to("/", "a");
    one.request_headers_to_add = vec![header("x-a", "route", true)];
    one.request_headers_to_remove = vec!["x-gone".to_owned()];
    let mut hosts = host(&["*"], vec![one]);
    hosts.request_headers_to_add = vec![header("x-a", "host", true)];
    hosts.include_request_attempt_count = true;
    let mut http = Http::new(vec![hosts], vec![cluster("a", &[80])]);
    http.table.request_headers_to_add = vec![header("x-a", "table", true)];
    let world = http.build();
    let mut head = get("a", "/");
    head.fields.push("x-gone", b"1");
    let mut call = world.start(head);
    call.attempt();
    assert_eq!(&*call.head.fields.joined("x-a").unwrap(), b"route,host,table");
    assert!(!call.head.fields.contains("x-gone"));
    assert_eq!(call.head.fields.get("x-envoy-attempt-count"), Some(&b"1"[..]));
}

#[test]
fn control_headers_of_strangers_are_removed() {
    let mut http = Http::simple();
    http.hcm.use_remote_address = yes();
    let world = http.build();
    let mut head = get("a", "/");
    for name in [
        "x-envoy-retry-on",
        "x-envoy-max-retries",
        "x-envoy-upstream-rq-timeout-ms",
        "x-envoy-decorator-operation",
        "x-envoy-internal",
        "x-envoy-original-path",
        "x-forwarded-client-cert",
    ] {
        head.fields.push(name, b"evil");
    }
    head.fields.push("x-request-id", b"mine");
    head.fields.push("x-forwarded-proto", b"https");
    head.fields.push("x-forwarded-for", b"1.1.1.1");
    let mut call = world.start(head);
    call.attempt();
    let evil = call.head.fields.iter().any(|(_, value)| value == b"evil");
    assert!(!evil, "{:?}", call.head);
    assert_ne!(call.head.fields.get("x-request-id"), Some(&b"mine"[..]));
    assert_eq!(call.head.fields.get("x-forwarded-proto"), Some(&b"http"[..]));
    assert_eq!(call.head.fields.get("x-forwarded-for"), Some(&b"1.1.1.1,192.0.2.7"[..]));
    assert_eq!(call.head.fields.get("x-envoy-external-address"), Some(&b"192.0.2.7"[..]));
    assert_eq!(call.exchange.info().client_address.unwrap().ip().to_string(), "192.0.2.7");
}

#[test]
fn internal_callers_steer_time_outs_and_retries() {
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::InternalAddressConfig;
    let range = |prefix: &str| core::CidrRange { address_prefix: prefix.to_owned(), prefix_len: number(24) };
    for (inside, expect) in [(true, 3), (false, 1)] {
        let mut http = Http::simple();
        http.hcm.use_remote_address = yes();
        let ranges = vec![range(if inside { "192.0.2.0" } else { "10.9.9.0" })];
        http.hcm.internal_address_config = Some(InternalAddressConfig { cidr_ranges: ranges, ..Default::default() });
        let world = http.build();
        let mut head = get("a", "/");
        for (name, value) in [
            ("x-envoy-upstream-rq-timeout-ms", "1500"),
            ("x-envoy-upstream-rq-per-try-timeout-ms", "700"),
            ("x-envoy-retry-on", "5xx"),
            ("x-envoy-max-retries", "2"),
        ] {
            head.fields.push(name, value.as_bytes());
        }
        let mut call = world.start(head);
        let attempt = call.attempt();
        assert_eq!(attempt.per_try_timeout, inside.then_some(Duration::from_millis(700)));
        let left: Vec<_> = call.head.fields.iter().map(|(name, _)| name).filter(|name| STEERS.contains(name)).collect();
        assert_eq!(left, [""; 0], "they end here");
        let expected = call.head.fields.get_str("x-envoy-expected-rq-timeout-ms");
        assert_eq!(expected, inside.then_some("700"));
        drop(attempt);
        let mut attempts = 1;
        loop {
            call.upstream(ResponseHead::new(500));
            match call.step() {
                Step::Wait(wait) => {
                    call.pass(wait);
                    call.elapsed();
                    drop(call.attempt());
                    attempts += 1;
                }
                _ => break,
            }
        }
        assert_eq!(attempts, expect);
    }
}

const STEERS: [&str; 4] = [
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-retry-on",
    "x-envoy-max-retries",
];

#[test]
fn trusted_hops_count_from_the_right() {
    let mut http = Http::simple();
    http.hcm.use_remote_address = yes();
    http.hcm.xff_num_trusted_hops = 1;
    let world = http.build();
    let mut head = get("a", "/");
    head.fields.push("x-forwarded-for", b"1.1.1.1, 2.2.2.2");
    head.fields.push("x-forwarded-proto", b"https");
    let call = world.start(head);
    assert_eq!(call.exchange.info().client_address.unwrap().ip().to_string(), "2.2.2.2");
    assert_eq!(call.head.fields.get("x-forwarded-proto"), Some(&b"https"[..]));
}

#[test]
fn client_certificates_are_told_by_us_alone() {
    use crate::facts::{PeerCertificate, TlsFacts};
    let mut http = Http::simple();
    http.hcm.forward_client_cert_details = 2;
    http.hcm.set_current_client_cert_details =
        Some(envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::SetCurrentClientCertDetails {
            subject: yes(),
            uri: true,
            dns: true,
            ..Default::default()
        });
    let mut world = http.build();
    let mut head = get("a", "/");
    head.fields.push("x-forwarded-client-cert", b"By=x");
    let call = world.start(head.clone());
    assert!(!call.head.fields.contains("x-forwarded-client-cert"), "plaintext proves nothing");
    drop(call);
    let mut conn = (*world.conn).clone();
    conn.tls = Some(Arc::new(TlsFacts {
        local_uri_san: Some("spiffe://td/ns/b/sa/b".into()),
        peer: Some(PeerCertificate {
            uri_sans: vec!["spiffe://td/ns/a/sa/a".into()],
            sha256: "abcd".into(),
            ..Default::default()
        }),
        ..Default::default()
    }));
    world.conn = Arc::new(conn);
    let call = world.start(head);
    let expect = "By=x,By=spiffe://td/ns/b/sa/b;Hash=abcd;Subject=\"\";URI=spiffe://td/ns/a/sa/a";
    assert_eq!(call.head.fields.get_str("x-forwarded-client-cert"), Some(expect));
    assert_eq!(call.head.fields.get("x-forwarded-proto"), Some(&b"https"[..]));
}

#[test]
fn what_becomes_of_xfcc() {
    use crate::facts::{PeerCertificate, TlsFacts};
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::SetCurrentClientCertDetails;
    let check = |mode: i32, mutual: bool, expect: Option<&str>| {
        let mut http = Http::simple();
        http.hcm.forward_client_cert_details = mode;
        http.hcm.set_current_client_cert_details =
            Some(SetCurrentClientCertDetails { cert: true, chain: true, uri: true, ..Default::default() });
        let mut world = http.build();
        if mutual {
            let mut conn = (*world.conn).clone();
            conn.tls = Some(Arc::new(TlsFacts {
                peer: Some(PeerCertificate {
                    uri_sans: vec!["u".into()],
                    sha256: "h".into(),
                    url_encoded_pem: "leaf".into(),
                    url_encoded_chain: "leafroot".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }));
            world.conn = Arc::new(conn);
        }
        let mut head = get("a", "/");
        head.fields.push("x-forwarded-client-cert", b"Hash=1");
        let call = world.start(head);
        assert_eq!(call.head.fields.get_str("x-forwarded-client-cert"), expect, "{mode} {mutual}");
    };
    let ours = "Hash=h;Cert=\"leaf\";Chain=\"leafroot\";URI=u";
    let both = format!("Hash=1,{ours}");
    for (mode, plain, mutual) in [
        (0, None, None),
        (1, None, Some("Hash=1")),
        (2, None, Some(both.as_str())),
        (3, None, Some(ours)),
        (4, Some("Hash=1"), Some("Hash=1")),
    ] {
        check(mode, false, plain);
        check(mode, true, mutual);
    }
}

#[test]
fn what_is_not_built_is_refused_by_name_and_path() {
    use envoy_types::pb::envoy::extensions::filters::http::{lua, ratelimit};
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
    let check = |edit: &dyn Fn(&mut Http), words: &[&str]| {
        let mut http = Http::simple();
        edit(&mut http);
        let refused = http.refused();
        for word in words {
            assert!(refused.contains(word), "{word}: {refused}");
        }
    };
    let filter = |name: &'static str, any: envoy_types::pb::google::protobuf::Any| {
        move |http: &mut Http| http.filters.push(http_filter(name, any.clone()))
    };
    let limit = pack(&ratelimit::v3::RateLimit { domain: "d".to_owned(), ..Default::default() });
    check(
        &filter("limits", limit),
        &[
            "filter_chains[0]",
            "http_filters[0] \"limits\"",
            "envoy.extensions.filters.http.ratelimit.v3.RateLimit is not supported",
        ],
    );
    let script = pack(&lua::v3::Lua::default());
    check(&filter("script", script.clone()), &["http_filters[0] \"script\"", "lua.v3.Lua is not supported"]);
    // optional or not: nothing is skipped
    check(
        &move |http| {
            http.filters.push(hcm::HttpFilter { is_optional: true, ..http_filter("script", script.clone()) });
        },
        &["lua.v3.Lua is not supported"],
    );
    check(&|http| http.hcm.codec_type = 3, &["codec_type is not supported"]);
    check(&|http| http.hcm.represent_ipv4_remote_address_as_ipv4_mapped_ipv6 = true, &["represent_ipv4"]);
    check(
        &|http| {
            http.hcm.http_protocol_options = Some(core::Http1ProtocolOptions {
                header_key_format: Some(core::http1_protocol_options::HeaderKeyFormat::default()),
                ..Default::default()
            });
        },
        &["http_protocol_options.header_key_format is not supported"],
    );
    check(
        &|http| {
            let limit = route::RateLimit::default();
            http.table.virtual_hosts[0].rate_limits.push(limit);
        },
        &["route_config.virtual_hosts[0].rate_limits is not supported"],
    );
    check(
        &|http| {
            let setting = pack(&ratelimit::v3::RateLimitPerRoute::default());
            http.table.virtual_hosts[0].routes[0].typed_per_filter_config.insert("limits".to_owned(), setting);
        },
        &["virtual_hosts[0].routes[0].typed_per_filter_config[\"limits\"]", "RateLimitPerRoute is not supported"],
    );
}

#[test]
fn failures_are_retried_elsewhere_and_said_so() {
    let one = with(to("/", "a"), |action| action.retry_policy = Some(retries("connect-failure,refused-stream", 2)));
    let mut hosts = host(&["*"], vec![one]);
    hosts.include_request_attempt_count = true;
    let world = Http::new(vec![hosts], vec![cluster("a", &[1, 2, 3])]).build();
    let mut call = world.start(get("a", "/"));
    let mut seen = Vec::new();
    for number in 1..=3 {
        let attempt = call.attempt();
        assert_eq!(attempt.number, number);
        assert_eq!(call.head.fields.get_str("x-envoy-attempt-count"), Some(number.to_string().as_str()));
        assert_eq!(attempt.replay_bytes_max > 0, number < 3);
        seen.push(attempt.picked.host.address.to_string());
        drop(attempt);
        let detail = "delayed connect error: Connection refused";
        call.fail(Failure { cause: Cause::ConnectFailed, detail: detail.into(), request_sent: false });
        if number < 3 {
            let wait = call.wait();
            assert!(wait < Duration::from_millis(25 << number), "{wait:?}");
            call.pass(wait);
            call.elapsed();
        }
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3, "every host once");
    let reply = call.reply();
    assert_eq!(reply.head.status, 503);
    assert_eq!(
        std::str::from_utf8(&reply.body).unwrap(),
        "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: remote \
         connection failure"
    );
    assert!(call.exchange.info().details.as_str().contains("Connection_refused"), "the log has the reason");
    assert_eq!(call.flags(), "URX,UF");
    assert_eq!(call.exchange.info().attempts, 3);
}

#[test]
fn an_unreplayable_body_is_not_retried() {
    let one = with(to("/", "a"), |action| action.retry_policy = Some(retries("5xx", 2)));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    call.exchange.set_replayable(false);
    let response = call.upstream(ResponseHead::new(503));
    assert!(matches!(call.step(), Step::Respond));
    assert_eq!(response.status, 503);
}

#[test]
fn responses_are_retried_by_status() {
    let one = with(to("/", "a"), |action| action.retry_policy = Some(retries("5xx", 1)));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
    let mut call = world.start(get("a", "/"));
    let first = call.attempt().picked.host.address.clone();
    call.upstream(ResponseHead::new(500));
    let wait = call.wait();
    call.pass(wait);
    call.elapsed();
    assert_ne!(call.attempt().picked.host.address, first);
    call.upstream(ResponseHead::new(500));
    assert!(matches!(call.step(), Step::Respond));
    assert_eq!(call.flags(), "URX");
}

#[test]
fn no_policy_no_retry() {
    let world = Http::simple().build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    call.fail(Failure { cause: Cause::UpstreamClosed, detail: "".into(), request_sent: true });
    let reply = call.reply();
    assert_eq!(
        &*reply.body,
        b"upstream connect error or disconnect/reset before headers. reset reason: connection termination"
    );
    assert_eq!(call.flags(), "UC");
    let details = call.exchange.info().details.as_str().to_owned();
    assert_eq!(details, "upstream_reset_before_response_started{connection_termination}");
}

#[test]
fn every_failure_has_its_flag_and_words() {
    let check = |cause: Cause, flag: &str, status: u16, reason: &str| {
        let world = Http::simple().build();
        let mut call = world.start(get("a", "/"));
        drop(call.attempt());
        call.fail(Failure { cause, detail: "".into(), request_sent: true });
        let reply = call.reply();
        assert_eq!((call.flags().as_str(), reply.head.status), (flag, status), "{cause:?}");
        assert!(reply.body.ends_with(reason.as_bytes()), "{:?}", reply.body);
    };
    check(Cause::ConnectFailed, "UF", 503, "remote connection failure");
    check(Cause::ConnectTimeout, "UF", 503, "connection timeout");
    check(Cause::UpstreamTlsFailed, "UF", 503, "remote connection failure");
    check(Cause::UpstreamReset, "UR", 503, "remote reset");
    check(Cause::UpstreamRefusedStream, "UR", 503, "remote refused stream reset");
    check(Cause::UpstreamProtocolError, "UPE", 502, "protocol error");
    check(Cause::LocalReset, "LR", 503, "local reset");
    check(Cause::UpstreamOverflow, "UO", 503, "overflow");
}

#[test]
fn the_route_time_out_begins_with_the_end_of_the_request() {
    let one = with(to("/", "a"), |action| action.timeout = secs(2));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
    let mut call = world.start_seeded(get("a", "/"), 1, false);
    drop(call.attempt());
    assert_eq!(call.head.fields.get("x-envoy-expected-rq-timeout-ms"), Some(&b"2000"[..]));
    assert_eq!(call.exchange.deadline(), None, "the request is still coming");
    call.pass(Duration::from_secs(5));
    call.exchange.request_complete(call.now.mono);
    assert_eq!(call.exchange.deadline(), Some(call.now.mono + Duration::from_secs(2)));
    call.pass(Duration::from_secs(1));
    call.elapsed();
    assert_eq!(call.wait(), Duration::from_secs(1), "too early: wait on");
    call.pass(Duration::from_secs(1));
    call.elapsed();
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (504, &b"upstream request timeout"[..]));
    assert_eq!((call.flags().as_str(), call.exchange.info().details.as_str()), ("UT", "response_timeout"));
}

#[test]
fn a_retry_tells_what_time_is_left() {
    let one = with(to("/", "a"), |action| {
        action.timeout = secs(2);
        action.retry_policy = Some(retries("5xx", 1));
    });
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    let told = |call: &Call<'_>| {
        let text = call.head.fields.get_str("x-envoy-expected-rq-timeout-ms").map(str::to_owned);
        text.and_then(|text| text.parse::<u64>().ok()).map(Duration::from_millis)
    };
    assert_eq!(told(&call), Some(Duration::from_secs(2)));
    call.pass(Duration::from_millis(500));
    call.upstream(ResponseHead::new(503));
    let wait = call.wait();
    call.pass(wait);
    call.elapsed();
    drop(call.attempt());
    let left = Duration::from_millis(1500).saturating_sub(wait);
    assert!(told(&call).is_some_and(|told| told <= left && left.abs_diff(told) < Duration::from_millis(1)), "{left:?}");
}

#[test]
fn a_response_that_takes_too_long_is_cut() {
    let one = with(to("/", "a"), |action| action.timeout = secs(1));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    let mut head = ResponseHead::new(200);
    call.answer(Answer::Upstream { head: &mut head, ended: false });
    assert!(matches!(call.step(), Step::Respond));
    call.pass(Duration::from_secs(1));
    call.elapsed();
    assert!(matches!(call.step(), Step::Abort(Cause::RequestTimeout)));
}

#[test]
fn per_try_time_outs() {
    let check = |on: &str, expect_retry: bool| {
        let one = with(to("/", "a"), |action| {
            let mut policy = retries(on, 1);
            policy.per_try_timeout = secs(1);
            action.retry_policy = Some(policy);
        });
        let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
        let mut call = world.start(get("a", "/"));
        assert_eq!(call.attempt().per_try_timeout, Some(Duration::from_secs(1)));
        call.pass(Duration::from_secs(1));
        call.elapsed();
        if expect_retry {
            let wait = call.wait();
            call.pass(wait);
            call.elapsed();
            drop(call.attempt());
            call.pass(Duration::from_secs(1));
            call.elapsed();
        }
        let reply = call.reply();
        assert_eq!((reply.head.status, reply.cause), (504, Cause::PerTryTimeout));
        assert_eq!(call.flags(), if expect_retry { "URX,UT" } else { "UT" });
    };
    check("connect-failure,refused-stream", false);
    check("5xx", true);
}

#[test]
fn an_attempt_on_which_nothing_moves_is_tried_again() {
    let one = with(to("/", "a"), |action| {
        let mut policy = retries("5xx", 1);
        policy.per_try_idle_timeout = secs(1);
        action.retry_policy = Some(policy);
    });
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
    let mut call = world.start(get("a", "/"));
    let first = call.attempt().picked.host.address.clone();
    assert_eq!(call.exchange.idle_timeout(), Some(Duration::from_secs(1)));
    call.pass(Duration::from_secs(1));
    call.answer(Answer::Idle);
    let wait = call.wait();
    call.pass(wait);
    call.elapsed();
    assert_ne!(call.attempt().picked.host.address, first);
    call.pass(Duration::from_secs(1));
    call.answer(Answer::Idle);
    let reply = call.reply();
    assert_eq!((reply.head.status, call.flags().as_str()), (504, "URX,UT"));
    assert_eq!(call.exchange.info().details.as_str(), "upstream_per_try_idle_timeout");
}

#[test]
fn a_request_must_be_whole_in_time() {
    let mut http = Http::simple();
    http.hcm.request_timeout = secs(3);
    let world = http.build();
    let mut call = world.start_seeded(get("a", "/"), 1, false);
    drop(call.attempt());
    assert_eq!(call.exchange.deadline(), Some(call.now.mono + Duration::from_secs(3)));
    call.pass(Duration::from_secs(3));
    call.elapsed();
    let reply = call.reply();
    assert_eq!((reply.head.status, reply.cause), (408, Cause::RequestReceiveTimeout));
    // once it is whole, the limit is over
    let mut call = world.start_seeded(get("a", "/"), 1, false);
    drop(call.attempt());
    call.exchange.request_complete(call.now.mono);
    assert_eq!(call.exchange.deadline(), None);
}

#[test]
fn a_client_that_breaks_the_protocol_is_told_in_its_own_form() {
    let world = Http::simple().build();
    for grpc in [false, true] {
        let mut head = get("a", "/");
        if grpc {
            head.fields.push("content-type", b"application/grpc");
        }
        let mut call = world.start_seeded(head, 1, false);
        drop(call.attempt());
        let env = world.env();
        let Step::Reply(reply) =
            call.exchange.refuse(&env, Cause::BadRequest, &call.head, &mut crate::record::NoRecord)
        else {
            panic!("no reply");
        };
        assert_eq!(reply.head.status, if grpc { 200 } else { 400 });
        assert_eq!(reply.head.fields.get_str("grpc-status"), grpc.then_some("13"));
        assert!(reply.close);
    }
}

#[test]
fn names_with_underscores() {
    use envoy_types::pb::envoy::config::core::v3::HttpProtocolOptions;
    let world = |action: i32| {
        let mut http = Http::simple();
        http.hcm.common_http_protocol_options =
            Some(HttpProtocolOptions { headers_with_underscores_action: action, ..Default::default() });
        http.build()
    };
    let mut head = get("a", "/");
    head.fields.push("x_y", b"1");
    assert!(world(0).start(head.clone()).head.fields.contains("x_y"));
    assert_eq!(world(1).start(head.clone()).reply().head.status, 400);
    assert!(!world(2).start(head).head.fields.contains("x_y"));
}

#[test]
fn header_mutations_of_every_level_run_in_order() {
    use envoy_types::pb::envoy::config::common::mutation_rules::v3 as rules;
    use envoy_types::pb::envoy::extensions::filters::http::header_mutation::v3 as mutation;
    let add = |value: &str| mutation::Mutations {
        request_mutations: vec![rules::HeaderMutation {
            action: Some(rules::header_mutation::Action::Append(header("x", value, true))),
        }],
        response_mutations: vec![rules::HeaderMutation {
            action: Some(rules::header_mutation::Action::Append(header("y", value, true))),
        }],
        ..Default::default()
    };
    let per_route = |value: &str| pack(&mutation::HeaderMutationPerRoute { mutations: Some(add(value)) });
    for (wins, expect) in [(false, ["own", "route", "host", "table"]), (true, ["own", "table", "host", "route"])] {
        let mut one = to("/", "a");
        one.typed_per_filter_config.insert("mutation".to_owned(), per_route("route"));
        let mut hosts = host(&["*"], vec![one]);
        hosts.typed_per_filter_config.insert("mutation".to_owned(), per_route("host"));
        let mut http = Http::new(vec![hosts], vec![cluster("a", &[1])]);
        http.table.typed_per_filter_config.insert("mutation".to_owned(), per_route("table"));
        let own = mutation::HeaderMutation { mutations: Some(add("own")), most_specific_header_mutations_wins: wins };
        let world = http.filter("mutation", pack(&own)).build();
        let mut call = world.start(get("a", "/"));
        drop(call.attempt());
        let seen: Vec<_> = call.head.fields.get_all("x").collect();
        assert_eq!(seen, expect.map(str::as_bytes));
        let response = call.upstream(ResponseHead::new(200));
        assert_eq!(response.fields.get_all("y").collect::<Vec<_>>(), expect.map(str::as_bytes));
    }
}

#[test]
fn grpc_deadlines_and_replies() {
    let grpc = |timeout: &str| {
        let mut head = RequestHead::new("POST", "a", "/p.S/M");
        head.fields.push("content-type", b"application/grpc");
        if !timeout.is_empty() {
            head.fields.push("grpc-timeout", timeout.as_bytes());
        }
        head
    };
    let check = |max: Option<i64>, timeout: &str, expect: Option<u64>| {
        let one = with(to("/", "a"), |action| {
            action.timeout = max.and_then(secs);
            #[expect(deprecated, reason = "what istiod writes")]
            {
                action.max_grpc_timeout = max.and_then(secs);
            }
        });
        let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
        let mut call = world.start(grpc(timeout));
        drop(call.attempt());
        let left = call.exchange.deadline().map(|at| at.saturating_duration_since(call.now.mono).as_secs());
        assert_eq!(left, expect, "{max:?} {timeout}");
    };
    check(Some(0), "", None);
    check(Some(0), "7S", Some(7));
    check(Some(3), "7S", Some(3));
    check(Some(3), "1S", Some(1));
    check(Some(3), "", Some(3));
    let world = Http::new(vec![host(&["*"], vec![to("/", "empty")])], vec![cluster("empty", &[])]).build();
    let mut call = world.start(grpc(""));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (200, &b""[..]));
    assert_eq!(reply.head.fields.get("grpc-status"), Some(&b"14"[..]));
    assert_eq!(reply.head.fields.get("grpc-message"), Some(&b"no healthy upstream"[..]));
    assert_eq!(call.flags(), "UH");
}

#[test]
fn streams_end_at_their_limits() {
    let one = with(to("/", "a"), |action| {
        action.max_stream_duration =
            Some(route::route_action::MaxStreamDuration { max_stream_duration: secs(3), ..Default::default() });
        action.idle_timeout = secs(9);
    });
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
    // Who is waited for: the client, or the upstream that has the whole request.
    for (is_whole, status) in [(false, 408), (true, 504)] {
        let mut call = world.start_seeded(get("a", "/"), 1, is_whole);
        drop(call.attempt());
        if is_whole {
            let now = call.now.mono;
            call.exchange.request_complete(now);
        }
        assert_eq!(call.exchange.idle_timeout(), Some(Duration::from_secs(9)));
        call.pass(Duration::from_secs(3));
        call.elapsed();
        let reply = call.reply();
        assert_eq!((reply.head.status, &*reply.body), (status, &b"downstream duration timeout"[..]));
        assert_eq!(call.flags(), "DT");
        let mut call = world.start_seeded(get("a", "/"), 1, is_whole);
        drop(call.attempt());
        if is_whole {
            let now = call.now.mono;
            call.exchange.request_complete(now);
        }
        call.answer(Answer::Idle);
        let reply = call.reply();
        let told = (reply.head.status, &*reply.body, reply.cause);
        assert_eq!(told, (status, &b"stream timeout"[..], Cause::StreamIdleTimeout));
    }
}

#[test]
fn circuit_breakers() {
    let mut tight = cluster("a", &[1]);
    tight.circuit_breakers = Some(cluster_pb::CircuitBreakers {
        thresholds: vec![cluster_pb::circuit_breakers::Thresholds {
            max_requests: number(1),
            max_retries: number(1),
            ..Default::default()
        }],
        ..Default::default()
    });
    let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![tight]).build();
    let mut first = world.start(get("a", "/"));
    let held = first.attempt();
    let mut second = world.start(get("a", "/"));
    let reply = second.reply();
    assert_eq!((reply.head.status, second.flags().as_str()), (503, "UO"));
    assert_eq!(reply.head.fields.get("x-envoy-overloaded"), Some(&b"true"[..]));
    assert!(reply.body.ends_with(b"reset reason: overflow"));
    drop(held);
    assert!(matches!(world.start(get("a", "/")).step(), Step::Forward(_)));
}

#[test]
fn outliers_are_left_out_and_come_back() {
    let mut watched = cluster("a", &[1, 2]);
    watched.outlier_detection = Some(cluster_pb::OutlierDetection {
        consecutive_5xx: number(2),
        enforcing_consecutive_5xx: number(100),
        enforcing_success_rate: number(0),
        max_ejection_percent: number(50),
        base_ejection_time: secs(30),
        ..Default::default()
    });
    let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![watched]).build();
    let mut bad = None;
    for seed in 0..40 {
        let mut call = world.start_seeded(get("a", "/"), seed, true);
        let address = call.attempt().picked.host.address.to_string();
        let is_bad = *bad.get_or_insert_with(|| address.clone()) == address;
        call.upstream(ResponseHead::new(if is_bad { 500 } else { 200 }));
        if seed > 30 {
            assert!(!is_bad, "ejected long ago");
        }
    }
    let shared = world.worker.shared();
    assert!(shared.clusters()[0].ejected.get() == 1);
    shared.sweep(&world.config, world.now.mono + Duration::from_secs(31));
    assert!(shared.clusters()[0].ejected.get() == 0);
}

#[test]
fn a_full_pool_ejects_nobody() {
    let mut watched = cluster("a", &[1]);
    watched.outlier_detection = Some(cluster_pb::OutlierDetection {
        consecutive_5xx: number(1),
        enforcing_success_rate: number(0),
        ..Default::default()
    });
    let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![watched]).build();
    let mut call = world.start(get("a", "/"));
    call.fail(Failure::unsent(Cause::UpstreamOverflow));
    assert_eq!(call.reply().head.status, 503);
    assert_eq!(world.worker.shared().clusters()[0].ejected.get(), 0);
    let mut call = world.start(get("a", "/"));
    call.fail(Failure::unsent(Cause::ConnectFailed));
    assert_eq!(world.worker.shared().clusters()[0].ejected.get(), 1);
}

fn all_of(action: i32) -> rbac_pb::Rbac {
    let policy = rbac_pb::Policy {
        permissions: vec![rbac_pb::Permission { rule: Some(rbac_pb::permission::Rule::Any(true)) }],
        principals: vec![rbac_pb::Principal { identifier: Some(rbac_pb::principal::Identifier::Any(true)) }],
        ..Default::default()
    };
    rbac_pb::Rbac { action, policies: [("ns[a]-policy[p]-rule[0]".to_owned(), policy)].into(), ..Default::default() }
}

#[test]
fn policy_denies_before_faults() {
    let fault = fault_pb::HttpFault {
        abort: Some(fault_pb::FaultAbort {
            percentage: Some(FractionalPercent { numerator: 100, denominator: 0 }),
            error_type: Some(fault_pb::fault_abort::ErrorType::HttpStatus(418)),
            ..Default::default()
        }),
        ..Default::default()
    };
    let deny = rbac_http::Rbac { rules: Some(all_of(1)), ..Default::default() };
    let with_fault = || {
        let mut one = to("/", "a");
        one.typed_per_filter_config.insert("fault".to_owned(), pack(&fault));
        Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])])
    };
    let world = with_fault().filter("rbac", pack(&deny)).filter("fault", pack(&fault_pb::HttpFault::default())).build();
    let mut call = world.start(get("a", "/"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (403, &b"RBAC: access denied"[..]));
    assert_eq!(call.exchange.info().details.as_str(), "rbac_access_denied_matched_policy[ns[a]-policy[p]-rule[0]]");
    assert_eq!(call.flags(), "-");
    let world = with_fault().filter("fault", pack(&fault_pb::HttpFault::default())).build();
    let mut call = world.start(get("a", "/"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body, reply.cause), (418, &b"fault filter abort"[..], Cause::FaultAbort));
    assert_eq!((call.flags().as_str(), call.exchange.info().details.as_str()), ("FI", "fault_filter_abort"));
}

#[test]
fn a_delay_comes_before_the_time_out() {
    let fault = fault_pb::HttpFault {
        delay: Some(envoy_types::pb::envoy::extensions::filters::common::fault::v3::FaultDelay {
            percentage: Some(FractionalPercent { numerator: 100, denominator: 0 }),
            fault_delay_secifier: Some(
                envoy_types::pb::envoy::extensions::filters::common::fault::v3::fault_delay::FaultDelaySecifier::FixedDelay(
                    secs(7).unwrap(),
                ),
            ),
        }),
        ..Default::default()
    };
    let mut one = with(to("/", "a"), |action| action.timeout = secs(1));
    one.typed_per_filter_config.insert("fault".to_owned(), pack(&fault));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])])
        .filter("fault", pack(&fault_pb::HttpFault::default()))
        .build();
    let mut call = world.start(get("a", "/"));
    assert_eq!(call.wait(), Duration::from_secs(7));
    call.pass(Duration::from_secs(7));
    call.elapsed();
    drop(call.attempt());
    assert_eq!(call.flags(), "DI");
}

#[test]
fn preflights_and_origins() {
    let policy = cors_pb::CorsPolicy {
        allow_origin_string_match: vec![envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher {
            match_pattern: Some(envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern::Exact(
                "https://good".to_owned(),
            )),
            ..Default::default()
        }],
        allow_methods: "GET".to_owned(),
        forward_not_matching_preflights: yes(),
        ..Default::default()
    };
    let mut one = to("/", "a");
    one.typed_per_filter_config.insert("cors".to_owned(), pack(&policy));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])])
        .filter("cors", pack(&cors_pb::Cors::default()))
        .build();
    let request = |method: &str, origin: &str| {
        let mut head = RequestHead::new(method, "a", "/");
        head.fields.push("origin", origin.as_bytes());
        head.fields.push("access-control-request-method", b"GET");
        head
    };
    let mut call = world.start(request("OPTIONS", "https://good"));
    let reply = call.reply();
    assert_eq!((reply.head.status, reply.cause), (200, Cause::CorsPreflight));
    assert_eq!(reply.head.fields.get("access-control-allow-origin"), Some(&b"https://good"[..]));
    let mut call = world.start(request("OPTIONS", "https://evil"));
    drop(call.attempt());
    let mut call = world.start(request("GET", "https://good"));
    drop(call.attempt());
    let response = call.upstream(ResponseHead::new(200));
    assert_eq!(response.fields.get("access-control-allow-origin"), Some(&b"https://good"[..]));
}

#[test]
fn peers_exchange_who_they_are() {
    use proto::filters::peer_metadata as pm;
    let discovery = pm::config::DiscoveryMethod {
        method_specifier: Some(pm::config::discovery_method::MethodSpecifier::IstioHeaders(
            pm::config::IstioHeaders::default(),
        )),
    };
    let propagation = pm::config::PropagationMethod {
        method_specifier: Some(pm::config::propagation_method::MethodSpecifier::IstioHeaders(
            pm::config::IstioHeaders::default(),
        )),
    };
    let config = pm::Config {
        downstream_discovery: vec![discovery],
        downstream_propagation: vec![propagation],
        upstream_discovery: vec![discovery],
        upstream_propagation: vec![propagation],
        ..Default::default()
    };
    let mut http = Http::simple().filter("istio.metadata_exchange", pack(&config));
    http.node = NodeFacts { id: "me".into(), peer_metadata: "bWU=".into() };
    let world = http.build();
    let mut head = get("a", "/");
    head.fields.push("x-envoy-peer-metadata", b"client");
    head.fields.push("x-envoy-peer-metadata-id", b"client-id");
    let mut call = world.start(head);
    drop(call.attempt());
    assert_eq!(call.head.fields.get("x-envoy-peer-metadata"), Some(&b"bWU="[..]));
    let mut answer = ResponseHead::new(200);
    answer.fields.push("x-envoy-peer-metadata", b"server");
    let response = call.upstream(answer);
    assert_eq!(response.fields.get("x-envoy-peer-metadata"), Some(&b"bWU="[..]));
    assert_eq!(call.exchange.info().downstream_peer.as_deref(), Some(&b"client"[..]));
    assert_eq!(call.exchange.info().upstream_peer.as_deref(), Some(&b"server"[..]));
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    let response = call.upstream(ResponseHead::new(200));
    assert!(!response.fields.contains("x-envoy-peer-metadata"), "who does not ask is not told");
}

#[test]
fn a_request_over_tls_says_its_protocol() {
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
    use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
    use envoy_types::pb::envoy::extensions::upstreams::http::v3::{
        HttpProtocolOptions, http_protocol_options as options,
    };
    let offered = |alpn: &[&str], upstream: options::UpstreamProtocolOptions| {
        let context = tls::UpstreamTlsContext {
            common_tls_context: Some(tls::CommonTlsContext {
                alpn_protocols: alpn.iter().map(|name| (*name).to_owned()).collect(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let http = HttpProtocolOptions { upstream_protocol_options: Some(upstream), ..Default::default() };
        let mut to_tls = cluster("a", &[8001]);
        to_tls.transport_socket = Some(core::TransportSocket {
            name: "tls".to_owned(),
            config_type: Some(core::transport_socket::ConfigType::TypedConfig(pack(&context))),
        });
        to_tls.typed_extension_protocol_options =
            [("envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned(), pack(&http))].into();
        let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![to_tls]).build();
        let mut call = world.start(get("a", "/"));
        let attempt = call.attempt();
        attempt.alpn.list(&attempt.transport).join(",")
    };
    let explicit = |config| {
        options::UpstreamProtocolOptions::ExplicitHttpConfig(options::ExplicitHttpConfig {
            protocol_config: Some(config),
        })
    };
    let http1 = || explicit(ProtocolConfig::HttpProtocolOptions(core::Http1ProtocolOptions::default()));
    let http2 = || explicit(ProtocolConfig::Http2ProtocolOptions(core::Http2ProtocolOptions::default()));
    let auto = options::UpstreamProtocolOptions::AutoConfig(options::AutoHttpConfig::default());
    assert_eq!(offered(&[], http1()), "http/1.1");
    assert_eq!(offered(&[], http2()), "h2");
    assert_eq!(offered(&[], auto), "h2,http/1.1");
    assert_eq!(offered(&["own"], http2()), "own");
}

#[test]
fn mirrors_are_copies_with_limits_of_their_own() {
    let one = with(to("/", "a"), |action| {
        action.request_mirror_policies = vec![route::route_action::RequestMirrorPolicy {
            cluster: "b".to_owned(),
            disable_shadow_host_suffix_append: true,
            ..Default::default()
        }];
    });
    let clusters = vec![cluster("a", &[1]), cluster("b", &[2])];
    let world = Http::new(vec![host(&["*"], vec![one])], clusters).build();
    let mut call = world.start(get("h", "/"));
    let attempt = call.attempt();
    assert_eq!(attempt.mirrors.len(), 1);
    assert_eq!(&*attempt.mirrors[0].attempt.cluster.name, "b");
    assert_eq!(attempt.mirrors[0].head.authority(), b"h");
}

#[test]
fn hashes_stick() {
    let one = with(to("/", "a"), |action| {
        use route::route_action::hash_policy as hash;
        action.hash_policy = vec![route::route_action::HashPolicy {
            policy_specifier: Some(hash::PolicySpecifier::Header(hash::Header {
                header_name: "x-user".to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        }];
    });
    let mut ring = cluster("a", &[1, 2, 3, 4, 5]);
    ring.lb_policy = 2;
    let world = Http::new(vec![host(&["*"], vec![one])], vec![ring]).build();
    let pick = |user: &str, seed: u64| {
        let mut head = get("a", "/");
        head.fields.push("x-user", user.as_bytes());
        world.start_seeded(head, seed, true).attempt().picked.host.address.to_string()
    };
    for user in ["a", "b", "c", "d"] {
        let first = pick(user, 1);
        assert!((2..50).all(|seed| pick(user, seed) == first));
    }
    let hosts: std::collections::BTreeSet<_> = (0..40).map(|user| pick(&user.to_string(), 1)).collect();
    assert!(hosts.len() > 2, "{hosts:?}");
}

#[test]
fn the_key_of_a_hash_is_what_goes_upstream() {
    use route::route_action::hash_policy as hash;
    let by = |specifier: hash::PolicySpecifier| {
        let mut one = with(to("/", "a"), |action| {
            action.hash_policy =
                vec![route::route_action::HashPolicy { policy_specifier: Some(specifier), ..Default::default() }];
        });
        one.request_headers_to_add = vec![header("x-user", "everybody", false)];
        let mut ring = cluster("a", &[1, 2, 3, 4, 5]);
        ring.lb_policy = 2;
        Http::new(vec![host(&["*"], vec![one])], vec![ring]).build()
    };
    let picks = |world: &World, name: &str| -> std::collections::BTreeSet<String> {
        let pick = |number: u32| {
            let mut head = get("a", "/");
            head.fields.push(name, format!("10.0.0.{number}").as_bytes());
            world.start(head).attempt().picked.host.address.to_string()
        };
        (1..40).map(pick).collect()
    };
    let header = hash::PolicySpecifier::Header(hash::Header { header_name: "x-user".to_owned(), ..Default::default() });
    assert_eq!(picks(&by(header), "x-user").len(), 1, "the route writes the key");
    let properties = hash::ConnectionProperties { source_ip: true };
    let source = by(hash::PolicySpecifier::ConnectionProperties(properties));
    assert!(picks(&source, "x-forwarded-for").len() > 2, "the trusted address is the client's");
}

#[test]
fn a_cookie_is_made_for_the_hash() {
    let one = with(to("/", "a"), |action| {
        use route::route_action::hash_policy as hash;
        action.hash_policy = vec![route::route_action::HashPolicy {
            policy_specifier: Some(hash::PolicySpecifier::Cookie(hash::Cookie {
                name: "user".to_owned(),
                ttl: secs(0),
                path: "/p".to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        }];
    });
    let mut ring = cluster("a", &[1, 2, 3, 4, 5]);
    ring.lb_policy = 5;
    let world = Http::new(vec![host(&["*"], vec![one])], vec![ring]).build();
    let mut call = world.start(get("a", "/"));
    let first = call.attempt().picked.host.address.clone();
    let response = call.upstream(ResponseHead::new(200));
    let cookie = response.fields.get_str("set-cookie").unwrap().to_owned();
    assert!(cookie.starts_with("user=\"") && cookie.ends_with("; Path=/p; HttpOnly"), "{cookie}");
    let mut head = get("a", "/");
    head.fields.push("cookie", cookie.split(';').next().unwrap().as_bytes());
    let mut again = world.start_seeded(head, 99, true);
    assert_eq!(again.attempt().picked.host.address, first);
    assert!(!again.upstream(ResponseHead::new(200)).fields.contains("set-cookie"));
}

#[test]
fn original_destinations() {
    let mut direct = cluster("a", &[]);
    direct.load_assignment = None;
    direct.lb_policy = 6;
    direct.cluster_discovery_type = Some(cluster_pb::cluster::ClusterDiscoveryType::Type(4));
    let mut world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![direct]).build();
    let mut call = world.start(get("a", "/"));
    assert_eq!(call.reply().cause, Cause::NoHealthyUpstream, "nothing was redirected");
    drop(call);
    let mut conn = (*world.conn).clone();
    conn.original_destination = Some("203.0.113.5:8080".parse().unwrap());
    world.conn = Arc::new(conn);
    let mut call = world.start(get("a", "/"));
    assert_eq!(call.attempt().picked.host.address.to_string(), "203.0.113.5:8080");
}

#[test]
fn answers_nobody_asked_for_do_no_harm() {
    let world = Http::simple().build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    call.answer(Answer::Resolved(Ok(vec![])));
    assert_eq!(call.reply().cause, Cause::Internal);
    call.elapsed();
    assert!(matches!(call.step(), Step::Abort(Cause::Internal)));
}

fn authorizer(
    edit: impl FnOnce(&mut envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ExtAuthz),
) -> Http {
    use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
    let mut config = pb::ExtAuthz {
        transport_api_version: 2,
        services: Some(pb::ext_authz::Services::HttpService(pb::HttpService {
            server_uri: Some(core::HttpUri {
                uri: "http://authz".to_owned(),
                timeout: secs(5),
                http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("authz".to_owned())),
            }),
            ..Default::default()
        })),
        ..Default::default()
    };
    edit(&mut config);
    let hosts = vec![host(&["*"], vec![to("/", "a")])];
    Http::new(hosts, vec![cluster("a", &[1]), cluster("authz", &[2])]).filter("authz", pack(&config))
}

fn asked(call: &mut Call<'_>) -> Box<AuthorizeQuestion> {
    match call.step() {
        Step::Ask(Question::Authorize(question)) => question,
        other => panic!("nobody was asked: {other:?}"),
    }
}

#[test]
fn an_authorizer_is_asked_and_obeyed() {
    let world = authorizer(|_| ()).build();
    let answer = |status: u16| {
        let mut call = world.start(get("a", "/x"));
        let question = asked(&mut call);
        assert_eq!(question.attempt.picked.host.address.to_string(), "10.0.0.1:2");
        assert_eq!((question.timeout, question.grpc), (Some(Duration::from_secs(5)), false));
        let head = ResponseHead::new(status);
        call.answer(Answer::Authorized(Ok(AuthorizeAnswer { head, body: "no".into(), trailers: None })));
        (call.step(), call.flags())
    };
    assert!(matches!(answer(200).0, Step::Forward(_)));
    let (step, flags) = answer(401);
    let Step::Reply(reply) = step else { panic!("{step:?}") };
    assert_eq!((reply.head.status, &*reply.body, flags.as_str()), (401, &b"no"[..], "UAEX"));
    let (step, _) = answer(503);
    assert!(matches!(step, Step::Reply(reply) if reply.cause == Cause::ExtAuthzError && reply.head.status == 403));
}

#[test]
fn an_authorizer_that_cannot_be_asked() {
    let check = |allow: bool| {
        let world = authorizer(|config| config.failure_mode_allow = allow).build();
        let mut call = world.start(get("a", "/"));
        drop(asked(&mut call));
        call.answer(Answer::Authorized(Err(Cause::ConnectFailed)));
        match call.step() {
            Step::Forward(_) => "passes".to_owned(),
            Step::Reply(reply) => format!("{} {}", reply.head.status, call.exchange.info().details.as_str()),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(check(false), "403 ext_authz_error");
    assert_eq!(check(true), "passes");
}

#[test]
fn an_authorizer_that_wants_the_body() {
    use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::BufferSettings;
    let world = authorizer(|config| {
        config.with_request_body = Some(BufferSettings { max_request_bytes: 4, ..Default::default() });
    })
    .build();
    let mut call = world.start_seeded(RequestHead::new("POST", "a", "/"), 1, false);
    assert!(matches!(call.step(), Step::Ask(Question::Body(BodyWanted { bytes_max: 4, partial: false }))));
    call.answer(Answer::Body { bytes: "1234".into(), complete: true });
    assert_eq!(&*asked(&mut call).body, b"1234");
    let mut call = world.start_seeded(RequestHead::new("POST", "a", "/"), 1, false);
    call.step();
    call.answer(Answer::Body { bytes: "1234".into(), complete: false });
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (413, &b"Payload Too Large"[..]));
}
