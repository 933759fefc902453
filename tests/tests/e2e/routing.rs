//! Routes by content, weights, faults.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use testkit::{Client, Response};

use crate::apps::{TRAFFIC, virtual_service};

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
        ("method: {exact: DELETE}", "method"),
        ("queryParams: {q: {exact: yes}}", "query"),
        ("headers: {x-both: {exact: a}}, uri: {prefix: /both}", "both"),
        ("withoutHeaders: {x-needed: {}}, uri: {prefix: /without}", "without"),
    ]
    .iter()
    .map(|(rule, text)| format!("  - match: [{{{}}}]\n{}", rule.replace("exact: yes", "exact: \"yes\""), says(text)))
    .collect();
    let _routes = mesh.with(&virtual_service("matches", &format!("{rules}  - name: rest\n{}", says("default"))));
    let check = |method: &str, path: &str, headers: &[(&str, &str)], expect: &str| {
        let answer = mesh.send(method, "matches.shop.test", path, headers);
        assert_eq!(answer.body, expect, "{method} {path} {headers:?}: {answer:?}");
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
    check("DELETE", "/", &[], "method");
    check("GET", "/?q=yes", &[], "query");
    check("GET", "/?q=yess", &[], "default");
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

fn weights(v1: u32, v2: u32) -> String {
    virtual_service("weights", &format!("  - route: [{}, {}]", reviews("v1", v1), reviews("v2", v2)))
}

#[test]
fn weights_shift_under_load_without_a_failed_request() {
    let mesh = TRAFFIC.turn();
    let host = "weights.shop.test";
    let _routes = mesh.with(&weights(90, 10));
    let tally = mesh.tally(host, "/reviews/0", 400, version);
    let second = tally.get("v2").copied().unwrap_or(0);
    // 40 ± six standard deviations.
    assert!((5..=76).contains(&second) && tally.len() == 2, "90/10: {tally:?}");

    let done = AtomicBool::new(false);
    let served = std::thread::scope(|scope| {
        let load = || {
            let mut client = Client::plain(mesh.http).unwrap();
            let mut served = 0;
            while !done.load(Ordering::Relaxed) {
                let answer = client.send("GET", host, "/reviews/0", &[]).unwrap();
                assert_eq!(answer.status, 200, "{answer:?}");
                served += 1;
            }
            served
        };
        let loads = [scope.spawn(load), scope.spawn(load)];
        for step in [weights(50, 50), weights(20, 80), weights(0, 100)] {
            mesh.apply(&step);
        }
        let after = mesh.tally(host, "/reviews/0", 50, version);
        done.store(true, Ordering::Relaxed);
        assert_eq!(after.get("v2"), Some(&50), "0/100: {after:?}");
        loads.into_iter().map(|load| load.join().unwrap()).sum::<usize>()
    });
    assert!(served > 20, "the load was on: {served}");
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
    let timed = |path: &str, headers: &[(&str, &str)]| {
        let began = Instant::now();
        (mesh.get("faults.shop.test", path, headers), began.elapsed())
    };
    let (aborted, _) = timed("/", &[("end-user", "jason")]);
    assert_eq!((aborted.status, aborted.body.as_str()), (500, "fault filter abort"), "{aborted:?}");
    assert_eq!(timed("/get", &[("end-user", "kate")]).0.status, 200);
    let (late, took) = timed("/delay-me", &[("end-user", "jason")]);
    assert!(late.status == 200 && took >= Duration::from_secs(2), "{took:?} {late:?}");
    let (prompt, took) = timed("/delay-me", &[]);
    assert!(prompt.status == 200 && took < Duration::from_secs(2), "{took:?} {prompt:?}");
    let tally = mesh.tally("faults.shop.test", "/half", 200, |answer| answer.status.to_string());
    assert!(tally.len() == 2 && tally.get("418").is_some_and(|hit| (58..=142).contains(hit)), "{tally:?}");
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
    let took = began.elapsed();
    assert!((Duration::from_secs(5)..Duration::from_secs(9)).contains(&took), "two tries of three seconds: {took:?}");
}
