//! Time-outs, retries, ejected pods, limits, and the flags that tell of them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{Client, Client2, Mesh, Puppet, Response, eventually};

use crate::apps::{COLLECTOR, TRAFFIC, service, virtual_service, workload};
use crate::stats::assert_share;

const GATEWAY: &str = "istio-system/istio-ingressgateway";

/// The line of a request in a proxy's log, once one says all of this. Others may have asked for the same path.
#[track_caller]
fn line(mesh: &Mesh, whence: &str, path: &str, words: &[&str]) -> String {
    eventually(&format!("a line of {path} with {words:?}"), || {
        let log = mesh.logs(whence, "istio-proxy");
        let of_path: Vec<&str> = log.lines().filter(|line| line.contains(path)).collect();
        let found = of_path.iter().rfind(|line| words.iter().all(|word| line.contains(word)));
        found.map(|line| (*line).to_owned()).ok_or_else(|| of_path.join("\n"))
    })
}

/// How often the server's own proxy saw the path, once that is as often as expected.
#[track_caller]
fn tries(mesh: &Mesh, path: &str, expect: usize) {
    eventually("the server's log", || {
        let log = mesh.logs("shop/httpbin", "istio-proxy");
        match log.lines().filter(|line| line.contains(path)).count() {
            count if count == expect => Ok(()),
            other => Err(format!("{other} tries")),
        }
    });
}

#[test]
fn a_time_out_answers_504() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "slow",
        "  - timeout: 0.5s\n    route: [{destination: {host: httpbin, port: {number: 8000}}}]",
    ));
    let began = Instant::now();
    let answer = mesh.get("slow.shop.test", "/delay/5", &[]);
    assert_eq!((answer.status, answer.body.as_str()), (504, "upstream request timeout"), "{answer:?}");
    assert!(began.elapsed() >= Duration::from_millis(500), "{:?}", began.elapsed());
    line(&mesh, GATEWAY, "/delay/5", &[" 504 UT ", "response_timeout"]);
}

#[test]
fn retries_go_on_until_they_are_used_up() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "retries",
        "  - retries: {attempts: 2, retryOn: 5xx, perTryTimeout: 20s}\n    route: [{destination: {host: httpbin, port: {number: 8000}}}]",
    ));
    assert_eq!(mesh.get("retries.shop.test", "/status/503?used-up", &[]).status, 503);
    line(&mesh, GATEWAY, "/status/503?used-up", &[" 503 URX "]);
    tries(&mesh, "/status/503?used-up", 3);
}

#[test]
fn a_failing_pod_is_ejected() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "flaky",
        "  - retries: {attempts: 0}\n    route: [{destination: {host: flaky, port: {number: 80}}}]",
    ));
    let before = mesh.tally("flaky.shop.test", "/get", 60, |answer| answer.status.to_string());
    assert_share("a dead pod takes its turn", before.get("503").copied().unwrap_or(0), 60, 0.5);
    let _rule = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: flaky, namespace: shop}
spec:
  host: flaky
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 2, interval: 1s, baseEjectionTime: 600s, maxEjectionPercent: 100}
",
    );
    let after = mesh.tally("flaky.shop.test", "/get", 60, |answer| answer.status.to_string());
    assert_eq!(after.get("503"), Some(&2), "ejected after two: {after:?}");
}

#[test]
fn more_pending_requests_than_allowed_overflow() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    // A cluster of its own, lest spans take its only connection.
    let objects = "
apiVersion: v1
kind: Service
metadata: {name: narrow, namespace: plain}
spec: {selector: {app: puppet}, ports: [{name: http, port: 8010, targetPort: 8000}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: narrow, namespace: plain}
spec:
  host: narrow
  trafficPolicy:
    connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1, maxRequestsPerConnection: 1}}
";
    let to_narrow = "  - retries: {attempts: 0}
    route: [{destination: {host: narrow.plain.svc.cluster.local, port: {number: 8010}}}]";
    let _objects = mesh.with(&format!("{}\n---\n{objects}", virtual_service("pool", to_narrow)));
    puppet.answers(&json!([{"path": "/hold", "hangs": true}]));
    let ask = || {
        let mut stream = std::net::TcpStream::connect(mesh.http).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(b"GET /hold HTTP/1.1\r\nhost: pool.shop.test\r\n\r\n").unwrap();
        stream
    };
    let arrived = || puppet.seen().iter().filter(|request| request["path"] == "/hold").count();

    // A request whose connection is still being opened is pending too: each is where it belongs before the next.
    let served = ask();
    eventually("the first to arrive", || if arrived() == 1 { Ok(()) } else { Err(format!("{:?}", puppet.seen())) });
    let waiting = ask();
    eventually("the second to wait", || {
        let state = mesh.curl(GATEWAY, &["http://127.0.0.1:15000/lateen/state"]).json();
        let narrow = &state["clusters"]["outbound|8010||narrow.plain.svc.cluster.local"];
        if (&narrow["requests"], &narrow["pending"]) == (&json!(2), &json!(1)) {
            Ok(())
        } else {
            Err(state.to_string())
        }
    });
    for _ in 0..4 {
        assert_eq!(mesh.get("pool.shop.test", "/hold", &[]).status, 503);
    }
    eventually("the overflow in the log", || {
        let log = mesh.logs(GATEWAY, "istio-proxy");
        match log.lines().filter(|line| line.contains("\"GET /hold ") && line.contains(" 503 UO ")).count() {
            4 => Ok(()),
            _ => Err(log),
        }
    });
    assert_eq!(arrived(), 1, "nobody passed the one that waits");
    puppet.answers(&json!([]));
    drop(served);
    assert_eq!(Client::over(waiting).raw(b"", false).unwrap().status, 200, "the place is free");
}

/// `maxRetries: 1`: while one request is being repeated, the failures of others are passed on as they are.
#[test]
fn a_retry_over_the_limit_leaves_the_answer_that_was_to_be_repeated() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let objects = "
apiVersion: v1
kind: Service
metadata: {name: stubborn, namespace: plain}
spec: {selector: {app: puppet}, ports: [{name: http, port: 8012, targetPort: 8000}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: stubborn, namespace: plain}
spec: {host: stubborn, trafficPolicy: {connectionPool: {http: {maxRetries: 1}}}}
";
    let rule = "  - retries: {attempts: 15, retryOn: 5xx, perTryTimeout: 4s}
    route: [{destination: {host: stubborn.plain.svc.cluster.local, port: {number: 8012}}}]";
    let _objects = mesh.with(&format!("{}\n---\n{objects}", virtual_service("stubborn", rule)));
    puppet.answers(&json!([{"path": "/held", "hangs": true}, {"path": "/boom", "status": 500, "body": "boom"}]));
    let tries = |path: &str| puppet.seen().iter().filter(|request| request["path"] == path).count();
    let mut held = std::net::TcpStream::connect(mesh.http).unwrap();
    held.write_all(b"GET /held HTTP/1.1\r\nhost: stubborn.shop.test\r\n\r\n").unwrap();
    eventually("the second try", || if tries("/held") >= 2 { Ok(()) } else { Err(format!("{:?}", puppet.seen())) });
    for _ in 0..3 {
        let answer = mesh.get("stubborn.shop.test", "/boom", &[]);
        assert_eq!((answer.status, answer.body.as_str(), answer.header("x-envoy-overloaded")), (500, "boom", None));
    }
    assert_eq!(tries("/boom"), 3, "each once");
    line(&mesh, GATEWAY, "/boom", &[" 500 UO ", "via_upstream"]);
    drop(held);
    eventually("the place of the client that left", || {
        let state = mesh.curl(GATEWAY, &["http://127.0.0.1:15000/lateen/state"]).json();
        let retries = &state["clusters"]["outbound|8012||stubborn.plain.svc.cluster.local"]["retries"];
        if retries.as_u64().unwrap_or(0) == 0 { Ok(()) } else { Err(state.to_string()) }
    });
    assert_eq!(mesh.get("stubborn.shop.test", "/boom", &[]).status, 500);
    line(&mesh, GATEWAY, "/boom", &[" 500 URX ", "via_upstream"]);
}

const TO_HTTPBIN: &str = "    route: [{destination: {host: httpbin, port: {number: 8000}}}]";

#[test]
fn a_try_that_takes_too_long_is_repeated_where_the_policy_says_so() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "tries",
        &format!(
            "  - match: [{{uri: {{prefix: /delay/11}}}}]
    retries: {{attempts: 2, retryOn: 5xx, perTryTimeout: 1s}}
{TO_HTTPBIN}
  - match: [{{uri: {{prefix: /delay/12}}}}]
    retries: {{attempts: 2, perTryTimeout: 1s}}
{TO_HTTPBIN}
  - match: [{{uri: {{prefix: /delay/13}}}}]
    timeout: 1.5s
    retries: {{attempts: 10, retryOn: 5xx, perTryTimeout: 1s}}
{TO_HTTPBIN}"
        ),
    ));
    // Three tries of a second: time enough for each to arrive.
    let began = Instant::now();
    let answer = mesh.get("tries.shop.test", "/delay/11", &[]);
    assert_eq!((answer.status, answer.body.as_str()), (504, "upstream request timeout"), "{answer:?}");
    assert!(began.elapsed() >= Duration::from_secs(3), "{:?}", began.elapsed());
    line(&mesh, GATEWAY, "/delay/11", &[" 504 URX,UT ", "upstream_per_try_timeout"]);
    tries(&mesh, "/delay/11", 3);
    // The default list does not name time-outs.
    assert_eq!(mesh.get("tries.shop.test", "/delay/12", &[]).status, 504);
    line(&mesh, GATEWAY, "/delay/12", &[" 504 UT ", "upstream_per_try_timeout"]);
    tries(&mesh, "/delay/12", 1);
    // The route's time-out is over all tries.
    let began = Instant::now();
    assert_eq!(mesh.get("tries.shop.test", "/delay/13", &[]).status, 504);
    assert!(began.elapsed() >= Duration::from_millis(1500), "{:?}", began.elapsed());
    line(&mesh, GATEWAY, "/delay/13", &[" 504 UT ", "response_timeout"]);
}

/// Takes turns, so that what a try meets does not hang on chance.
fn in_turns(namespace: &str, host: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {host}-turns, namespace: {namespace}}}\nspec: {{host: {host}, trafficPolicy: {{loadBalancer: {{simple: ROUND_ROBIN}}}}}}\n"
    )
}

#[test]
fn an_unreachable_pod_is_passed_over_by_default() {
    let mesh = TRAFFIC.turn();
    // Two pods without a proxy: one serves, the other one listens nowhere.
    let pod = |name: &str, image: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: plain, labels: {{app: pair}}}}\nspec: {{containers: [{{name: app, image: {image}{more}}}]}}\n"
        )
    };
    let objects = [
        pod("pair-good", "docker.io/kong/httpbin", ", readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}"),
        pod("pair-dead", "curlimages/curl", ""),
        service("plain", "pair", "{name: http, port: 80}"),
        in_turns("plain", "pair"),
        virtual_service(
            "passed",
            "  - route: [{destination: {host: pair.plain.svc.cluster.local, port: {number: 80}}}]",
        ),
    ];
    let _objects = mesh.with(&objects.join("---\n"));
    eventually("both are ready", || {
        let of_pair = ["get", "endpointslices", "-n", "plain", "-l", "kubernetes.io/service-name=pair", "-o", "json"];
        let slices = mesh.must(&of_pair, "");
        let list: Value = serde_json::from_str(&slices).unwrap_or_default();
        let endpoints = list["items"][0]["endpoints"].as_array().cloned().unwrap_or_default();
        let ready = endpoints.iter().filter(|endpoint| endpoint["conditions"]["ready"] == true).count();
        if ready == 2 { Ok(()) } else { Err(slices) }
    });
    mesh.synced();
    let tries = |answer: &Response| {
        let count = answer.json()["headers"]["x-envoy-attempt-count"].to_string();
        format!("{} {}", answer.status, count.trim_matches(['[', ']', '"']))
    };
    let tally = mesh.tally("passed.shop.test", "/get", 20, tries);
    // in turns: a request that begins at the dead one takes two turns, so that the next one may begin there again
    let served: usize = ["200 1", "200 2"].iter().filter_map(|kind| tally.get(*kind)).sum();
    assert_eq!(served, 20, "the next try finds the other one: {tally:?}");
    assert!(tally.contains_key("200 2"), "some began at the dead one: {tally:?}");
}

/// The proxy of a pod whose application is down answers 503, and 503 is not on the default list.
#[test]
fn an_application_that_is_down_behind_its_proxy_is_passed_over_where_the_policy_says_so() {
    let mesh = TRAFFIC.turn();
    let _turns = mesh.with(&in_turns("shop", "flaky"));
    for (policy, expect) in [("", &["200", "503"][..]), ("retries: {attempts: 2, retryOn: '503'}, ", &["200"][..])] {
        let rule = format!("  - {{{policy}route: [{{destination: {{host: flaky, port: {{number: 80}}}}}}]}}");
        let _routes = mesh.with(&virtual_service("down", &rule));
        let tally = mesh.tally("down.shop.test", "/get", 20, |answer| answer.status.to_string());
        assert_eq!(tally.keys().collect::<Vec<_>>(), expect, "{policy:?}: {tally:?}");
    }
}

#[test]
fn an_applications_own_503_is_not_tried_again_by_default() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service(
        "own",
        &format!("  - match: [{{uri: {{exact: /anything}}}}]\n    rewrite: {{uri: /status/503}}\n{TO_HTTPBIN}"),
    ));
    let answer = mesh.get("own.shop.test", "/anything", &[("user-agent", "own-503")]);
    assert_eq!(answer.status, 503);
    eventually("one try", || {
        let log = mesh.logs("shop/httpbin", "istio-proxy");
        match log.lines().filter(|line| line.contains("own-503")).count() {
            1 => Ok(()),
            other => Err(other.to_string()),
        }
    });
}

#[test]
fn failures_have_envoys_flags_and_bodies() {
    let mesh = TRAFFIC.turn();
    let route = |prefix: &str, host: &str, subset: &str| {
        format!(
            "  - match: [{{uri: {{prefix: {prefix}}}}}]\n    retries: {{attempts: 0}}\n    route: [{{destination: {{host: {host}, port: {{number: 80}}{subset}}}}}]\n"
        )
    };
    let rules = [
        route("/nobody", "nobody", ""),
        route("/dead", "dead", ""),
        route("/garbage", "garbage", ""),
        route("/missing", "flaky", ", subset: missing"),
        route("/empty", "flaky", ", subset: nobody"),
    ]
    .concat();
    let subset = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: flaky, namespace: shop}\nspec: {host: flaky, subsets: [{name: nobody, labels: {version: none}}]}\n";
    let services = [
        "apiVersion: v1\nkind: Service\nmetadata: {name: nobody, namespace: shop}\nspec: {selector: {app: nobody}, ports: [{name: http, port: 80}]}\n".to_owned(),
        "apiVersion: v1\nkind: Service\nmetadata: {name: dead, namespace: shop}\nspec: {selector: {deployment: dead}, ports: [{name: http, port: 80}]}\n".to_owned(),
        "apiVersion: v1\nkind: Service\nmetadata: {name: garbage, namespace: shop}\nspec: {selector: {app: echo, version: v1}, ports: [{name: http, port: 80, targetPort: 9000}]}\n".to_owned(),
    ];
    let rules = virtual_service("flags", &rules);
    let _objects = mesh.with(&format!("{}\n---\n{rules}\n---\n{subset}", services.join("---\n")));
    let check = |path: &str, status: u16, body: &str, logged: &str| {
        let answer = mesh.get("flags.shop.test", path, &[]);
        assert_eq!(answer.status, status, "{path}: {answer:?}");
        assert!(answer.body.starts_with(body) && (!body.is_empty() || answer.body.is_empty()), "{path}: {answer:?}");
        line(&mesh, GATEWAY, path, &[logged]);
    };
    check("/nobody/1", 503, "no healthy upstream", " 503 UH no_healthy_upstream ");
    check("/missing/1", 503, "", " 503 NC cluster_not_found ");
    check("/empty/1", 503, "no healthy upstream", " 503 UH no_healthy_upstream ");
    check("/elsewhere/1", 404, "", " 404 NR route_not_found ");
    check(
        "/garbage/1",
        502,
        "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
        " 502 UPE upstream_reset_before_response_started{protocol_error} ",
    );
    // Nobody listens behind the server's proxy: it is the one that fails.
    check("/dead/1", 503, "upstream connect error or disconnect/reset before headers.", " 503 - via_upstream ");
    line(&mesh, "shop/dead", "/dead/1", &["UF", "Connection_refused"]);
}

#[test]
fn mirrors_have_shares_and_their_failures_harm_nobody() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let nobody = service("shop", "nobody", "{name: http, port: 80}");
    let rule = "
  - route: [{destination: {host: httpbin, port: {number: 8000}}}]
    mirrors:
    - {destination: {host: puppet.plain.svc.cluster.local, port: {number: 8000}}, percentage: {value: 30}}
    - {destination: {host: nobody, port: {number: 80}}}
    - {destination: {host: puppet.plain.svc.cluster.local, port: {number: 8000}, subset: missing}}";
    let _objects = mesh.with(&format!("{nobody}---\n{}", virtual_service("mirrored", rule)));
    let count = 400;
    let tally = mesh.tally("mirrored.shop.test", "/anything/mirrored", count, |answer| answer.status.to_string());
    assert_eq!(tally, [("200".to_owned(), count)].into());
    // A copy is under way before its original is answered.
    eventually("every copy to be answered", || {
        let state = mesh.curl(GATEWAY, &["http://127.0.0.1:15000/lateen/state"]).json();
        let copies = &state["clusters"]["outbound|8000||puppet.plain.svc.cluster.local"]["requests"];
        if copies.as_u64().unwrap_or(0) == 0 { Ok(()) } else { Err(copies.to_string()) }
    });
    let seen = puppet.seen();
    let copies = seen.iter().filter(|seen| seen["path"] == "/anything/mirrored");
    assert!(copies.clone().all(|seen| seen["headers"]["host"] == json!(["mirrored.shop.test"])), "the host is kept");
    assert_share("30 % mirrored", copies.count(), count, 0.3);
}

#[test]
fn a_pod_without_proxy_that_refuses_is_the_callers_failure() {
    let mesh = TRAFFIC.turn();
    // Nothing listens on this port of a pod that has no proxy to say so.
    let _service = mesh.with(
        "
apiVersion: v1
kind: Service
metadata: {name: refusing, namespace: plain}
spec: {selector: {app: curl}, ports: [{name: http, port: 80, targetPort: 8099}]}
",
    );
    let answer = mesh.curl("shop/curl", &["http://refusing.plain/refused"]);
    assert_eq!(answer.status, 503, "{answer:?}");
    let wanted = "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: remote connection failure";
    assert_eq!(answer.body, wanted);
    line(&mesh, "shop/curl", "/refused", &[" 503 URX,UF ", "delayed_connect_error:_Connection_refused"]);
}

#[test]
fn a_client_that_leaves_is_told_in_the_log() {
    let mesh = TRAFFIC.turn();
    let _routes = mesh.with(&virtual_service("leaving", &format!("  -{}", TO_HTTPBIN.trim_start_matches("   "))));
    let mut stream = std::net::TcpStream::connect(mesh.http).unwrap();
    stream.write_all(b"GET /delay/31 HTTP/1.1\r\nhost: leaving.shop.test\r\n\r\n").unwrap();
    let client = Client2::plain(mesh.http).unwrap();
    let call = client.open("GET", "leaving.shop.test", "/delay/32", &[], true).unwrap();
    // Both have arrived at the server when its proxy counts them.
    eventually("two requests under way", || {
        let text = mesh.curl("shop/httpbin", &["http://127.0.0.1:15000/stats/prometheus"]).body;
        let active = text.lines().filter(|line| line.starts_with("envoy_http_downstream_rq_active{"));
        let counts = active.filter_map(|line| line.rsplit(' ').next()?.parse::<u32>().ok());
        match counts.sum::<u32>() {
            2 => Ok(()),
            other => Err(format!("{other} under way")),
        }
    });
    drop(stream);
    call.cancel();
    // A closed connection, and one stream of a connection that stays.
    for (path, expect) in
        [("/delay/31", " 0 DC downstream_remote_disconnect "), ("/delay/32", " 0 DR http2.remote_reset ")]
    {
        line(&mesh, GATEWAY, path, &[expect]);
        // The server hears of it too.
        line(&mesh, "shop/httpbin", path, &[" 0 DC "]);
    }
    assert_eq!(client.send("GET", "leaving.shop.test", "/status/200", &[]).unwrap().status, 200);
}

#[test]
fn a_failing_reviews_pod_is_ejected_and_taken_back() {
    let mesh = TRAFFIC.turn();
    let rule = |base_ejection: &str| {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: opinions, namespace: bookinfo}}
spec:
  host: opinions
  trafficPolicy:
    outlierDetection: {{consecutive5xxErrors: 3, interval: 1s, baseEjectionTime: {base_ejection}, maxEjectionPercent: 100}}
"
        )
    };
    let _objects = mesh.with(&format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: opinions, namespace: bookinfo}}
spec: {{selector: {{app: reviews}}, ports: [{{name: http, port: 9080}}]}}
---
{}---
{}",
        rule("600s"),
        virtual_service(
            "opinions",
            "  - retries: {attempts: 0}\n    route: [{destination: {host: opinions.bookinfo.svc.cluster.local, port: {number: 9080}}}]"
        )
    ));
    let version = |answer: &Response| {
        let pod = answer.json()["podname"].as_str().unwrap_or_default().to_owned();
        pod.split('-').nth(1).map_or_else(|| answer.status.to_string(), str::to_owned)
    };
    let tally = || mesh.tally("opinions.shop.test", "/reviews/0", 60, version);
    let before = tally();
    assert_eq!(before.keys().collect::<Vec<_>>(), ["v1", "v2", "v3"], "{before:?}");

    let switch = |method: &str, query: &str| {
        let url = format!("http://127.0.0.1:9080/-/fault{query}");
        assert_eq!(mesh.curl("bookinfo/reviews-v3", &["-X", method, &url]).status, 200);
    };
    switch("PUT", "?status=500");
    let failing = tally();
    let ejected = tally();
    switch("DELETE", "");
    assert_eq!(failing.get("500"), Some(&3), "three failures in a row, then no more: {failing:?}");
    assert_eq!(ejected.keys().collect::<Vec<_>>(), ["v1", "v2"], "the others serve: {ejected:?}");
    // Its time is over at once where that is a second; ten minutes would be too long to watch.
    mesh.apply(&rule("1s"));
    eventually("the pod to be taken back", || {
        let after = tally();
        if after.contains_key("v3") { Ok(()) } else { Err(format!("{after:?}")) }
    });
}

/// A client with two workers in its proxy. Each test has its own: the pods of a deployment that was deleted take
/// a moment to end, and would be taken for those of the next one of its name.
fn busy(name: &str) -> String {
    let labels = format!("deployment: {name}, version: v1}}");
    workload("shop", name, "v1", "curlimages/curl", None, "")
        .replace(&labels, &format!("{labels}, annotations: {{proxy.istio.io/config: \"concurrency: 2\"}}"))
}

#[test]
pub(crate) fn limits_are_counted_per_proxy_whatever_its_workers() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let objects = "
apiVersion: v1
kind: Service
metadata: {name: limited, namespace: plain}
spec: {selector: {app: puppet}, ports: [{name: http, port: 8011, targetPort: 8000}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: limited, namespace: plain}
spec: {host: limited, trafficPolicy: {connectionPool: {http: {http2MaxRequests: 3}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: limited, namespace: shop}
spec: {hosts: [limited.plain.svc.cluster.local], http: [{retries: {attempts: 0}, route: [{destination: {host: limited.plain.svc.cluster.local}}]}]}
";
    let _objects = mesh.with(&format!("{}\n---\n{objects}", busy("busy-http")));
    mesh.must(&["rollout", "status", "deploy/busy-http", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    puppet.answers(&json!([{"path": "/held", "hangs": true}]));
    let arrived = || puppet.seen().iter().filter(|request| request["path"] == "/held").count();
    let ask = || {
        let mut tunnel = mesh.dial("shop/busy-http", "limited.plain", 8011);
        tunnel.write_all(b"GET /held HTTP/1.1\r\nhost: limited.plain:8011\r\n\r\n").unwrap();
        tunnel
    };
    // One after the other, and none ends: the workers take connections in turn.
    let held: Vec<_> = (1..=3)
        .map(|number| {
            let tunnel = ask();
            eventually(
                "the request to arrive",
                || if arrived() == number { Ok(()) } else { Err(arrived().to_string()) },
            );
            tunnel
        })
        .collect();
    let refused: Vec<u16> = (0..5).map(|_| Client::over(ask()).raw(b"", false).unwrap().status).collect();
    assert_eq!(refused, [503; 5], "three for both workers together");
    assert_eq!(arrived(), 3);
    drop(held);
    eventually("the overflow in the log", || {
        let log = mesh.logs("shop/busy-http", "istio-proxy");
        let overflow = " 503 UO upstream_reset_before_response_started{overflow} ";
        if log.lines().filter(|line| line.contains(overflow)).count() == 5 { Ok(()) } else { Err(log) }
    });
}

#[test]
fn connections_of_bytes_are_limited_per_proxy_whatever_its_workers() {
    let mesh = TRAFFIC.turn();
    let limits = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: echo, namespace: shop}
spec: {host: echo, trafficPolicy: {connectionPool: {tcp: {maxConnections: 2}}}}
";
    let _objects = mesh.with(&format!("{}\n---\n{limits}", busy("busy-bytes")));
    mesh.must(&["rollout", "status", "deploy/busy-bytes", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    let open = || {
        let mut tunnel = mesh.dial("shop/busy-bytes", "echo", 9000);
        // A connection over the limit may be closed before this is written.
        _ = tunnel.write_all(b"hi\n");
        let mut line = String::new();
        let mut tunnel = BufReader::new(tunnel);
        tunnel.read_line(&mut line).unwrap();
        (tunnel, line)
    };
    // Kept open all at once; the workers take them in turn.
    let kept: Vec<_> = (0..5).map(|_| open()).collect();
    let served = kept.iter().filter(|(_, line)| line.ends_with(" hi\n")).count();
    assert_eq!(served, 2, "{:?}", kept.iter().map(|(_, line)| line).collect::<Vec<_>>());
    let refused = eventually("the log", || {
        let log = mesh.logs("shop/busy-bytes", "istio-proxy");
        match log.lines().filter(|line| line.contains(" UO ")).count() {
            3 => Ok(log),
            other => Err(format!("{other}: {log}")),
        }
    });
    assert!(refused.contains("\"- - -\" 0 UO"), "{refused}");
    drop(kept);
    eventually("a place", || match open().1 {
        line if line.ends_with(" hi\n") => Ok(()),
        line => Err(line),
    });
}
