//! Limits of retries and of ejection, and where a redirect to TLS leads: compared with Envoy.

use serde_json::{Value, json};
use testkit::{Client, eventually};

use crate::backend::{self, Backend};
use crate::filters::{bootstrap, cluster, hcm, listener, to_echo};
use crate::standalone::{Pair, Standalone};

#[test]
fn what_a_retry_was_to_replace_is_answered_where_a_limit_refuses_it() {
    let boom = Backend::start(|_| (500, Vec::new(), "boom".to_owned()));
    let limited = |name: &str, thresholds: Value| {
        let at = if name == "gone" { backend::nobody() } else { boom.address };
        let mut made = cluster(name, &[at]);
        made["circuit_breakers"] = json!({ "thresholds": [thresholds] });
        made
    };
    let none = json!({ "max_retries": 0 });
    let budget = json!({ "retry_budget": { "budget_percent": { "value": 0 }, "min_retry_concurrency": 0 } });
    // The clusters, with the flags of their answers, and how often the application is asked by each proxy.
    let cases = [
        ("none", none.clone(), 500, "UO", 1),
        ("budget", budget, 500, "UO", 1),
        ("one", json!({ "max_retries": 1 }), 500, "URX", 3),
        ("gone", none, 503, "UO,UF", 0),
    ];
    let route = |name: &str| {
        json!({
            "match": { "prefix": format!("/{name}") },
            "route": { "cluster": name, "retry_policy": {
                "retry_on": "5xx", "num_retries": 2, "retry_back_off": { "base_interval": "0.001s" },
            } },
            "response_headers_to_add": [{ "header": { "key": "x-flags", "value": "%RESPONSE_FLAGS%" } }],
        })
    };
    let routes: Vec<_> = cases.iter().map(|(name, ..)| route(name)).collect();
    let clusters: Vec<_> = cases.iter().map(|(name, thresholds, ..)| limited(name, thresholds.clone())).collect();
    let pair = Pair::start(&bootstrap(&[listener("http", &[hcm(&[], &json!(routes), &json!({}))])], &clusters));
    for (name, _, status, flags, tries) in cases {
        let path = format!("/{name}");
        let answer = pair.get("http", "a", &path, &[]);
        assert_eq!((answer.status, answer.header("x-flags")), (status, Some(flags)), "{name}: {answer:?}");
        if status == 500 {
            assert_eq!(answer.body, "boom", "{name}");
        }
        assert_eq!(boom.seen().iter().filter(|seen| seen.path == path).count(), 2 * tries, "{name}");
        for proxy in pair.both() {
            let refused = proxy.page("/stats?format=prometheus");
            let of_cluster = format!("envoy_cluster_upstream_rq_retry_overflow{{envoy_cluster_name=\"{name}\"}} ");
            let count = refused.lines().find_map(|line| line.strip_prefix(&of_cluster));
            assert_eq!(count, Some(if flags.starts_with("UO") { "1" } else { "0" }), "{name}: {}", proxy.kind);
        }
    }
}

/// Answers of 500 among so many requests.
fn failures(proxy: &Standalone, path: &str, requests: usize) -> usize {
    let mut client = Client::plain(proxy.listener("http")).unwrap();
    let ask = |_| client.send("GET", "a", path, &[]).unwrap().status;
    (0..requests).map(ask).filter(|status| *status == 500).count()
}

#[test]
fn hosts_are_ejected_up_to_a_share_and_one_more_where_that_is_asked() {
    let good = [Backend::echo("good"), Backend::echo("better")];
    let bad = Backend::start(|_| (500, Vec::new(), String::new()));
    let [one, two] = good.each_ref().map(|backend| backend.address);
    // The share in percent, whether one goes whatever it is, and whether the bad one goes.
    let cases =
        [(10, None, false), (10, Some(false), false), (10, Some(true), true), (33, None, false), (34, None, true)];
    let (mut clusters, mut routes) = (Vec::new(), Vec::new());
    for (at, (share, always, _)) in cases.iter().enumerate() {
        let name = format!("case-{at}");
        let mut made = cluster(&name, &[one, two, bad.address]);
        made["outlier_detection"] = json!({
            "consecutive_5xx": 1, "interval": "300s", "base_ejection_time": "600s", "max_ejection_time": "600s",
            "enforcing_success_rate": 0, "max_ejection_percent": share, "always_eject_one_host": always,
        });
        made["common_lb_config"] = json!({ "healthy_panic_threshold": { "value": 0 } });
        clusters.push(made);
        routes.push(json!({ "match": { "prefix": format!("/{name}") }, "route": { "cluster": name } }));
    }
    let pair = Pair::start(&bootstrap(&[listener("http", &[hcm(&[], &json!(routes), &json!({}))])], &clusters));
    for (at, case) in cases.iter().enumerate() {
        let path = format!("/case-{at}");
        for proxy in pair.both() {
            if case.2 {
                assert!(failures(proxy, &path, 3) > 0, "{} {case:?}: asked once", proxy.kind);
                eventually(&format!("{} to eject: {case:?}", proxy.kind), || match failures(proxy, &path, 6) {
                    0 => Ok(()),
                    some => Err(format!("{some} failures")),
                });
            } else {
                assert_eq!(failures(proxy, &path, 30), 10, "{} {case:?}: in turn", proxy.kind);
            }
        }
    }
}

#[test]
fn whoever_must_come_over_tls_is_sent_to_the_host_and_port_it_named() {
    let echo = Backend::echo("echo");
    let mut manager = hcm(&[], &to_echo(), &json!({}));
    manager["typed_config"]["route_config"]["virtual_hosts"][0]["require_tls"] = "ALL".into();
    let pair = Pair::start(&bootstrap(&[listener("http", &[manager])], &[cluster("echo", &[echo.address])]));
    for host in ["a.example", "a.example:8080", "a.example:80", "a.example:443", "[::1]:8080"] {
        let answer = pair.get("http", host, "/x?y=1", &[]);
        let to = format!("https://{host}/x?y=1");
        assert_eq!((answer.status, answer.header("location")), (301, Some(&*to)), "{answer:?}");
    }
}

#[test]
fn names_are_resolved_to_the_family_that_is_asked_for() {
    let echo = Backend::echo("echo");
    let endpoint = json!({ "endpoint": { "address": {
        "socket_address": { "address": "localhost", "port_value": echo.address.port() } } } });
    let by_name = json!({
        "name": "echo", "type": "STRICT_DNS", "connect_timeout": "2s", "dns_lookup_family": "V4_ONLY",
        "respect_dns_ttl": true, "dns_jitter": "1s",
        "load_assignment": { "cluster_name": "echo", "endpoints": [{ "lb_endpoints": [endpoint] }] },
    });
    let pair = Pair::start(&bootstrap(&[listener("http", &[hcm(&[], &to_echo(), &json!({}))])], &[by_name]));
    assert_eq!(pair.get("http", "a", "/x", &[]).status, 200);
    for proxy in pair.both() {
        let page = proxy.page("/stats?format=prometheus");
        let line = "envoy_cluster_membership_total{envoy_cluster_name=\"echo\"} 1";
        assert!(page.lines().any(|found| found == line), "{}: {page}", proxy.kind);
    }
}
