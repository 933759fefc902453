//! Which route a request takes, and what it is answered there.

use super::*;

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
    assert_eq!(reply.head.fields.get("location"), Some(&b"https://a.com:80/x?y"[..]));
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
