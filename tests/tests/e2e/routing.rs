//! Routes by content, weights, faults.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use testkit::{Client, Mesh, Response, eventually};

use crate::apps::{TRAFFIC, virtual_service};
use crate::rollouts::under_load;
use crate::stats::assert_share;

/// `v1` of `reviews-v1-…`, the pod that answered.
fn version(answer: &Response) -> String {
    let pod = answer.json()["podname"].as_str().unwrap_or_default().to_owned();
    pod.split('-').nth(1).map_or_else(|| format!("{} {}", answer.status, answer.body), str::to_owned)
}

fn reviews(subset: &str, weight: u32) -> String {
    format!("{{destination: {{host: reviews.bookinfo.svc.cluster.local, subset: {subset}}}, weight: {weight}}}")
}

#[test]
fn all_requests_go_to_v1_but_jasons_to_v2() {
    let mesh = TRAFFIC.turn();
    let by_hand = format!(
        "  - match: [{{headers: {{end-user: {{exact: jason}}}}}}]\n    route: [{}]\n  - route: [{}]",
        reviews("v2", 100),
        reviews("v1", 100)
    );
    let _routes = mesh.with(&virtual_service("subsets", &by_hand));
    let tally = mesh.tally("subsets.shop.test", "/reviews/0", 30, version);
    assert_eq!(tally.get("v1"), Some(&30), "{tally:?}");
    for _ in 0..10 {
        assert_eq!(version(&mesh.get("subsets.shop.test", "/reviews/0", &[("end-user", "jason")])), "v2");
    }
}

#[test]
fn the_same_rules_hold_between_sidecars() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: bookinfo}
spec:
  hosts: [reviews]
  http:
  - match: [{headers: {end-user: {exact: jason}}}]
    route: [{destination: {host: reviews, subset: v2}}]
  - route: [{destination: {host: reviews, subset: v3}}]
",
    );
    let url = "http://reviews.bookinfo:9080/reviews/0";
    for _ in 0..4 {
        assert_eq!(version(&mesh.curl("shop/curl", &[url])), "v3");
        assert_eq!(version(&mesh.curl("shop/curl", &["-H", "end-user: jason", url])), "v2");
    }
}

#[test]
fn without_rules_every_version_answers() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "everyone",
        "  - route: [{destination: {host: reviews.bookinfo.svc.cluster.local, port: {number: 9080}}}]",
    ));
    let tally = mesh.tally("everyone.shop.test", "/reviews/0", 60, version);
    assert_eq!(tally.keys().map(String::as_str).collect::<Vec<_>>(), ["v1", "v2", "v3"], "{tally:?}");
}

#[test]
fn the_first_rule_that_matches_wins() {
    let mesh = TRAFFIC.turn();
    let says = |text: &str| format!("    directResponse: {{status: 200, body: {{string: {text}}}}}\n");
    let rules: String = [
        ("headers: {x-exact: {exact: a}}", "exact"),
        ("headers: {x-prefix: {prefix: ab}}", "prefix"),
        ("headers: {x-regex: {regex: \"a+b\"}}", "regex"),
        ("uri: {exact: /one}", "path"),
        ("uri: {prefix: /two}", "path-prefix"),
        ("uri: {regex: \"/three/[0-9]+\"}", "path-regex"),
        ("uri: {exact: /FOUR}, ignoreUriCase: true", "path-any-case"),
        ("uri: {prefix: /FIVE}, ignoreUriCase: true", "path-prefix-any-case"),
        ("scheme: {exact: http}, uri: {exact: /scheme}", "scheme"),
        ("scheme: {exact: https}, uri: {exact: /secure}", "secure"),
        ("method: {exact: DELETE}", "method"),
        ("method: {prefix: PA}", "method-prefix"),
        ("method: {regex: \"PUT|POST\"}, uri: {exact: /write}", "method-regex"),
        ("queryParams: {q: {exact: yes}}", "query"),
        ("queryParams: {p: {prefix: \"ab\"}}", "query-prefix"),
        ("queryParams: {r: {regex: \"[0-9]+\"}}", "query-regex"),
        ("queryParams: {present: {}}", "query-present"),
        ("headers: {x-present: {}}", "present"),
        ("authority: {prefix: \"MATCHES.\"}, uri: {prefix: /host}", "authority-is-case-sensitive"),
        ("authority: {prefix: \"matches.\"}, uri: {prefix: /host}", "authority"),
        ("headers: {x-both: {exact: a}}, uri: {prefix: /both}", "both"),
        ("withoutHeaders: {x-needed: {}}, uri: {prefix: /without}", "without"),
    ]
    .iter()
    .map(|(rule, text)| format!("  - match: [{{{}}}]\n{}", rule.replace("exact: yes", "exact: \"yes\""), says(text)))
    .collect();
    // The same at the gateway and between sidecars, where a service without pods has the name.
    let routes = virtual_service("matches", &format!("{rules}  - name: rest\n{}", says("default")))
        .replace("hosts: [matches.shop.test]", "hosts: [matches.shop.test, matches]")
        .replace("gateways: [gateway]", "gateways: [gateway, mesh]");
    let service = crate::apps::service("shop", "matches", "{name: http, port: 80}");
    let _routes = mesh.with(&format!("{routes}\n---\n{service}"));
    let between = RefCell::new(Client::over(mesh.dial("shop/curl", "matches.shop", 80)));
    let check = |method: &str, path: &str, headers: &[(&str, &str)], expect: &str| {
        let answer = mesh.send(method, "matches.shop.test", path, headers);
        assert_eq!(answer.body, expect, "{method} {path} {headers:?}: {answer:?}");
        let answer = between.borrow_mut().send(method, "matches.shop", path, headers).unwrap();
        assert_eq!(answer.body, expect, "between sidecars: {method} {path} {headers:?}: {answer:?}");
    };
    check("GET", "/", &[("x-exact", "a")], "exact");
    check("GET", "/", &[("x-exact", "ab")], "default");
    check("GET", "/", &[("x-prefix", "abc")], "prefix");
    check("GET", "/", &[("x-regex", "aab")], "regex");
    check("GET", "/", &[("x-regex", "aabc")], "default");
    check("GET", "/one", &[("x-exact", "a")], "exact");
    check("GET", "/one?a=b", &[], "path");
    check("GET", "/one/more", &[], "default");
    check("GET", "/two/more", &[], "path-prefix");
    check("GET", "/three/33", &[], "path-regex");
    check("GET", "/three/33x", &[], "default");
    check("GET", "/four", &[], "path-any-case");
    check("GET", "/fivefold", &[], "path-prefix-any-case");
    check("GET", "/scheme", &[], "scheme");
    check("GET", "/secure", &[], "default");
    check("DELETE", "/", &[], "method");
    check("PATCH", "/", &[], "method-prefix");
    check("PUT", "/write", &[], "method-regex");
    check("POST", "/write", &[], "method-regex");
    check("GET", "/write", &[], "default");
    check("GET", "/?q=yes", &[], "query");
    check("GET", "/?q=yess", &[], "default");
    check("GET", "/?a=1&p=abc", &[], "query-prefix");
    check("GET", "/?p=ba", &[], "default");
    check("GET", "/?r=42", &[], "query-regex");
    check("GET", "/?r=42x", &[], "default");
    check("GET", "/?present=", &[], "query-present");
    check("GET", "/", &[("x-present", "")], "present");
    check("GET", "/host", &[], "authority");
    check("GET", "/three/33?q=yes", &[], "path-regex");
    check("GET", "/both", &[("x-both", "a")], "both");
    check("GET", "/both", &[], "default");
    check("GET", "/without", &[], "without");
    check("GET", "/without", &[("x-needed", "a")], "default");
}

#[test]
fn paths_are_rewritten_requests_redirected_headers_changed() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "changes",
        "  - match: [{uri: {prefix: /old/}}]
    rewrite: {uri: /anything/, authority: other.example}
    headers: {request: {set: {x-set: b}, add: {x-add: c}, remove: [x-gone]}, response: {set: {x-answer: d}, remove: [content-type]}}
    route: [{destination: {host: httpbin, port: {number: 8000}}}]
  - match: [{uri: {prefix: /moved}}]
    redirect: {uri: /new, authority: new.example, redirectCode: 302}",
    ));
    let answer = mesh.get("changes.shop.test", "/old/thing?q=1", &[("x-set", "a"), ("x-gone", "z")]);
    assert_eq!(answer.status, 200, "{answer:?}");
    let seen = answer.json();
    assert_eq!(seen["url"], "http://other.example/anything/thing?q=1", "{seen}");
    assert_eq!(seen["headers"]["x-set"], serde_json::json!(["b"]), "{seen}");
    assert_eq!(seen["headers"]["x-add"], serde_json::json!(["c"]), "{seen}");
    assert_eq!(seen["headers"]["x-gone"], serde_json::Value::Null, "{seen}");
    assert_eq!((answer.header("x-answer"), answer.header("content-type")), (Some("d"), None), "{answer:?}");
    let moved = mesh.get("changes.shop.test", "/moved/x", &[]);
    assert_eq!((moved.status, moved.header("location")), (302, Some("http://new.example/new")), "{moved:?}");
}

#[test]
fn rewrites_replace_what_was_matched() {
    let mesh = TRAFFIC.turn();
    let to = "    route: [{destination: {host: httpbin, port: {number: 8000}}}]\n";
    let rules: String = [
        ("exact: /exact", "{uri: /anything/whole}"),
        ("prefix: /prefix", "{uri: /anything/p}"),
        ("regex: \"/regex/.*\"", "{uri: /anything/r}"),
        ("prefix: /parts", r#"{uriRegexRewrite: {match: "^/parts/([^/]+)/(.*)$", rewrite: "/anything/\\2/\\1"}}"#),
        ("prefix: /host", "{uri: /anything, authority: other.example}"),
    ]
    .iter()
    .map(|(path, rewrite)| format!("  - match: [{{uri: {{{path}}}}}]\n    rewrite: {rewrite}\n{to}"))
    .collect();
    let _routes = mesh.with(&virtual_service("rewrites", &rules));
    let check = |path: &str, url: &str| {
        let answer = mesh.get("rewrites.shop.test", path, &[]);
        assert_eq!(answer.json()["url"], url, "{path}: {answer:?}");
        assert_eq!(answer.json()["headers"]["x-envoy-original-path"][0], path, "{path}: {answer:?}");
    };
    let host = "http://rewrites.shop.test";
    check("/exact?a=b", &format!("{host}/anything/whole?a=b"));
    check("/prefix/x?a=b", &format!("{host}/anything/p/x?a=b"));
    check("/regex/x?a=b", &format!("{host}/anything/r?a=b"));
    check("/parts/one/two?a=b", &format!("{host}/anything/two/one?a=b"));
    check("/host/x", "http://other.example/anything/x");
}

#[test]
fn redirects_say_where_to() {
    let mesh = TRAFFIC.turn();
    let rules: String = [
        ("exact: /whole", "uri: /new"),
        ("prefix: /code", "uri: /new, redirectCode: 308"),
        ("prefix: /scheme", "scheme: https"),
        ("prefix: /port", "authority: new.example, port: 8081"),
        ("prefix: /query", "uri: \"/new?b=c\""),
    ]
    .iter()
    .map(|(rule, to)| format!("  - match: [{{uri: {{{rule}}}}}]\n    redirect: {{{to}}}\n"))
    .collect();
    let _routes = mesh.with(&virtual_service("redirects", &rules));
    let check = |path: &str, status: u16, location: &str| {
        let answer = mesh.get("redirects.shop.test", path, &[]);
        assert_eq!((answer.status, answer.header("location")), (status, Some(location)), "{path}: {answer:?}");
    };
    check("/whole?a=b", 301, "http://redirects.shop.test/new?a=b");
    check("/code", 308, "http://redirects.shop.test/new");
    check("/scheme/x?a=b", 301, "https://redirects.shop.test/scheme/x?a=b");
    check("/port", 301, "http://new.example:8081/port");
    check("/query?a=b", 301, "http://redirects.shop.test/new?b=c");
}

#[test]
fn headers_of_a_destination_come_after_those_of_its_route() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "levels",
        "  - headers: {request: {set: {x-both: route, x-route: r}}, response: {add: {x-answer: route}}}
    route:
    - destination: {host: httpbin, port: {number: 8000}}
      headers: {request: {set: {x-both: destination}, add: {x-more: m}}, response: {add: {x-answer: destination}}}",
    ));
    let answer = mesh.get("levels.shop.test", "/headers", &[("x-more", "client")]);
    let seen = &answer.json()["headers"];
    assert_eq!(seen["x-both"], serde_json::json!(["destination"]), "{seen}");
    assert_eq!(seen["x-route"], serde_json::json!(["r"]), "{seen}");
    assert_eq!(seen["x-more"], serde_json::json!(["client", "m"]), "{seen}");
    let values: Vec<&str> =
        answer.headers.iter().filter(|(name, _)| name == "x-answer").map(|(_, value)| value.as_str()).collect();
    assert_eq!(values.len(), 2, "{answer:?}");
}

fn weights(v1: u32, v2: u32) -> String {
    virtual_service("weights", &format!("  - route: [{}, {}]", reviews("v1", v1), reviews("v2", v2)))
}

#[test]
fn weights_shift_under_load_without_a_failed_request() {
    let mesh = TRAFFIC.turn();
    let host = "weights.shop.test";
    let _routes = mesh.with(&weights(90, 10));
    for (first, second, count) in [(90, 10, 800), (50, 50, 800), (0, 100, 100)] {
        mesh.apply(&weights(first, second));
        let tally = mesh.tally(host, "/reviews/0", count, version);
        assert_eq!(tally.values().sum::<usize>(), count);
        assert!(tally.keys().all(|version| version == "v1" || version == "v2"), "{tally:?}");
        let hits = tally.get("v2").copied().unwrap_or(0);
        assert_share(&format!("{first}/{second}"), hits, count, f64::from(second) / 100.0);
    }
    mesh.apply(&weights(90, 10));

    let load = |client: &mut Client| client.send("GET", host, "/reviews/0", &[]);
    let served = under_load(
        &mesh,
        2,
        || Client::plain(mesh.http),
        load,
        || {
            for (first, second) in [(50, 50), (20, 80), (80, 20), (0, 100)] {
                mesh.apply(&weights(first, second));
            }
            let after = mesh.tally(host, "/reviews/0", 50, version);
            assert_eq!(after.get("v2"), Some(&50), "0/100: {after:?}");
        },
    );
    assert!(served > 20, "the load was on: {served}");
}

/// Each time the route's old cluster goes in the same step in which its new one comes.
#[test]
fn a_new_subset_takes_over_under_load_without_a_failed_request() {
    let mesh = TRAFFIC.turn();
    let host = "subsets.shop.test";
    let step = |round: u32| {
        let rule = format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: subsets, namespace: shop}}
spec: {{host: httpbin.shop.svc.cluster.local, subsets: [{{name: round-{round}, labels: {{app: httpbin}}}}]}}
---"
        );
        let route =
            format!("  - route: [{{destination: {{host: httpbin, subset: round-{round}, port: {{number: 8000}}}}}}]");
        rule + &virtual_service("subsets", &route)
    };
    let _objects = mesh.with(&step(0));
    let served = under_load(
        &mesh,
        2,
        || Client::plain(mesh.http),
        |client| client.send("GET", host, "/status/200", &[]),
        || {
            for round in 1..=6 {
                mesh.apply(&step(round));
            }
        },
    );
    assert!(served > 20, "the load was on: {served}");
}

#[test]
fn weights_hold_between_sidecars() {
    let mesh = TRAFFIC.turn();
    let shared = |v1: u32, v2: u32| {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: reviews, namespace: bookinfo}}
spec: {{hosts: [reviews], http: [{{route: [{}, {}]}}]}}
",
            reviews("v1", v1),
            reviews("v2", v2)
        )
    };
    let _routes = mesh.with(&shared(90, 10));
    let mut client = Client::over(mesh.dial("shop/curl", "reviews.bookinfo", 9080));
    for (v1, v2, count) in [(90, 10, 600), (50, 50, 400), (0, 100, 50)] {
        mesh.apply(&shared(v1, v2));
        let mut tally: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..count {
            let answer = client.send("GET", "reviews.bookinfo:9080", "/reviews/0", &[]).unwrap();
            *tally.entry(version(&answer)).or_default() += 1;
        }
        assert!(tally.keys().all(|version| version == "v1" || version == "v2"), "{tally:?}");
        let hits = tally.get("v2").copied().unwrap_or(0);
        assert_share(&format!("{v1}/{v2}"), hits, count, f64::from(v2) / 100.0);
    }
}

/// The gateway's log has a line of this path that says this.
#[track_caller]
fn logged(mesh: &Mesh, path: &str, what: &str) {
    eventually(&format!("{what:?} of {path}"), || {
        let log = mesh.logs("istio-system/istio-ingressgateway", "istio-proxy");
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(path)).collect();
        if lines.iter().any(|line| line.contains(what)) { Ok(()) } else { Err(lines.join("\n")) }
    });
}

#[test]
fn faults_hit_jason_alone() {
    let mesh = TRAFFIC.turn();
    let to_httpbin = "    route: [{destination: {host: httpbin, port: {number: 8000}}}]\n";
    let jason = "match: [{headers: {end-user: {exact: jason}}, uri: {prefix: ";
    let rules = format!(
        "  - {jason}/delay-me}}}}]\n    fault: {{delay: {{fixedDelay: 2s, percentage: {{value: 100}}}}}}\n    rewrite: {{uri: /get}}\n{to_httpbin}  - {jason}/}}}}]\n    fault: {{abort: {{httpStatus: 500, percentage: {{value: 100}}}}}}\n{to_httpbin}  - match: [{{uri: {{prefix: /half}}}}]\n    fault: {{abort: {{httpStatus: 418, percentage: {{value: 50}}}}}}\n    rewrite: {{uri: /get}}\n{to_httpbin}  - match: [{{uri: {{prefix: /delay-me}}}}]\n    rewrite: {{uri: /get}}\n{to_httpbin}  -{}",
        to_httpbin.trim_start_matches("   ")
    );
    let _routes = mesh.with(&virtual_service("faults", &rules));
    let get = |path: &str, headers: &[(&str, &str)]| mesh.get("faults.shop.test", path, headers);
    let aborted = get("/", &[("end-user", "jason")]);
    assert_eq!((aborted.status, aborted.body.as_str()), (500, "fault filter abort"), "{aborted:?}");
    assert_eq!(get("/get", &[("end-user", "kate")]).status, 200);
    let began = Instant::now();
    let late = get("/delay-me?late", &[("end-user", "jason")]);
    let took = began.elapsed();
    assert!(late.status == 200 && took >= Duration::from_secs(2), "{took:?} {late:?}");
    assert_eq!(get("/delay-me?prompt", &[]).status, 200);
    // The log tells apart who was slow: the fault, or the machine.
    logged(&mesh, "/delay-me?late", " 200 DI via_upstream ");
    logged(&mesh, "/delay-me?prompt", " 200 - via_upstream ");
    let tally = mesh.tally("faults.shop.test", "/half", 400, |answer| answer.status.to_string());
    assert_eq!(tally.values().sum::<usize>(), 400, "{tally:?}");
    assert_share("50 % aborted", tally.get("418").copied().unwrap_or(0), 400, 0.5);
}

#[test]
fn a_delay_and_an_abort_are_drawn_by_themselves() {
    let mesh = TRAFFIC.turn();
    let to_httpbin = "    route: [{destination: {host: httpbin, port: {number: 8000}}}]\n";
    let _routes = mesh.with(&virtual_service(
        "both",
        &format!(
            "  - match: [{{uri: {{prefix: /always}}}}]
    fault: {{delay: {{fixedDelay: 1s, percentage: {{value: 100}}}}, abort: {{httpStatus: 418, percentage: {{value: 100}}}}}}
{to_httpbin}  - match: [{{uri: {{prefix: /anything/sometimes}}}}]
    fault: {{delay: {{fixedDelay: 0.01s, percentage: {{value: 30}}}}, abort: {{httpStatus: 418, percentage: {{value: 40}}}}}}
{to_httpbin}  - match: [{{uri: {{prefix: /anything/unsaid}}}}]
    fault: {{delay: {{fixedDelay: 5s}}, abort: {{httpStatus: 418}}}}
{to_httpbin}"
        ),
    ));
    let began = Instant::now();
    let answer = mesh.get("both.shop.test", "/always", &[]);
    assert_eq!((answer.status, answer.body.as_str()), (418, "fault filter abort"), "{answer:?}");
    assert!(began.elapsed() >= Duration::from_secs(1), "first the delay: {:?}", began.elapsed());
    assert_eq!(mesh.get("both.shop.test", "/anything/unsaid", &[]).status, 200, "no percentage is none");
    logged(&mesh, "/anything/unsaid", " 200 - via_upstream ");

    let count = 500;
    let tally = mesh.tally("both.shop.test", "/anything/sometimes", count, |answer| answer.status.to_string());
    assert_share("40 % aborted", tally.get("418").copied().unwrap_or(0), count, 0.4);
    let lines = eventually("the access log", || {
        let log = mesh.logs("istio-system/istio-ingressgateway", "istio-proxy");
        let lines: Vec<String> =
            log.lines().filter(|line| line.contains("/anything/sometimes")).map(str::to_owned).collect();
        if lines.len() >= count { Ok(lines) } else { Err(lines.len().to_string()) }
    });
    let with = |flags: &str| lines.iter().filter(|line| line.contains(&format!(" {flags} "))).count();
    let (delayed, aborted, both) = (with("200 DI"), with("418 FI"), with("418 DI,FI"));
    assert_share("30 % delayed", delayed + both, count, 0.3);
    assert_share("40 % aborted", aborted + both, count, 0.4);
    assert_share("12 % both", both, count, 0.12);
}

#[test]
fn late_ratings_show_that_productpage_is_less_patient_than_reviews() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ratings, namespace: bookinfo}
spec:
  hosts: [ratings]
  http:
  - match: [{headers: {end-user: {exact: jason}}}]
    fault: {delay: {percentage: {value: 100}, fixedDelay: 7s}}
    route: [{destination: {host: ratings, subset: v1}}]
  - route: [{destination: {host: ratings, subset: v1}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: bookinfo}
spec:
  hosts: [reviews]
  http: [{route: [{destination: {host: reviews, subset: v2}}]}]
",
    );
    let page = "http://productpage.bookinfo:9080/api/v1/products/0/reviews";
    let kate = mesh.curl("shop/curl", &["-H", "end-user: kate", page]);
    assert!(kate.status == 200 && kate.body.contains("stars"), "{kate:?}");
    let began = Instant::now();
    let jason = mesh.curl("shop/curl", &["-H", "end-user: jason", page]);
    assert!(jason.body.contains("Sorry, product reviews are currently unavailable"), "{jason:?}");
    assert!(began.elapsed() >= Duration::from_secs(6), "two tries of three seconds: {:?}", began.elapsed());
}
