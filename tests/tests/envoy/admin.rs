//! The admin interface, page by page, compared in shape.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use testkit::{Client, eventually};

use crate::backend::Backend;
use crate::filters::{bootstrap, cluster, hcm, listener, to_echo};
use crate::standalone::{Pair, Standalone, command};

fn pair() -> Pair {
    let echo = Backend::echo("echo");
    let pair = Pair::start(&bootstrap(
        &[listener("http", &[hcm(&[], &to_echo(), &serde_json::json!({}))])],
        &[cluster("echo", &[echo.address])],
    ));
    assert_eq!(pair.get("http", "a", "/", &[]).status, 200);
    pair
}

/// Where something stands in a document: `a.b[].c`. What says no more than its absence would may be absent.
fn paths(value: &Value, at: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                paths(value, &format!("{at}.{key}"), into);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| paths(item, &format!("{at}[]"), into)),
        Value::Null | Value::Bool(false) => {}
        Value::String(text) if matches!(text.as_str(), "" | "0") => {}
        Value::Number(number) if number.as_u64() == Some(0) => {}
        _ => drop(into.insert(at.to_owned())),
    }
}

fn shape(value: &Value) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    paths(value, "", &mut all);
    all
}

#[test]
fn pages_have_the_same_shape() {
    let pair = pair();
    let [theirs, ours] = pair.both();
    for (page, wanted) in [
        (
            "/clusters?format=json",
            &[
                "name",
                "host_statuses",
                "address",
                "port_value",
                "stats",
                "health_status",
                "weight",
                "observability_name",
            ][..],
        ),
        ("/listeners?format=json", &["name", "local_address", "port_value"]),
        ("/config_dump", &["bootstrap", "static_listeners", "static_clusters", "static_route_configs", "last_updated"]),
        (
            "/server_info",
            &["version", "state", "node", "id", "uptime_current_epoch", "command_line_options", "concurrency"],
        ),
    ] {
        let [theirs, ours] = [theirs, ours].map(|proxy| shape(&proxy.json(page)));
        for word in wanted {
            let has =
                |shape: &BTreeSet<String>| shape.iter().any(|path| path.split(['.', '[']).any(|part| part == *word));
            assert!(has(&theirs), "{page}: Envoy has no {word}: {theirs:#?}");
            assert!(has(&ours), "{page}: Lateen has no {word}: {ours:#?}");
        }
        // What we show is where Envoy would show it. (It tells the node's names as flags only where these say them.)
        let odd: Vec<_> =
            ours.difference(&theirs).filter(|path| !path.contains("lateen") && !path.contains(".service_")).collect();
        assert!(odd.is_empty(), "{page}: {odd:#?}");
    }
    let resource = "/config_dump?resource=static_listeners";
    let names = [theirs, ours].map(|proxy| proxy.json(resource)["configs"][0]["listener"]["name"].clone());
    assert_eq!(names[1], names[0]);
    for proxy in [theirs, ours] {
        let clusters = proxy.page("/clusters");
        for key in [
            "cx_active::",
            "rq_active::",
            "health_flags::healthy",
            "weight::1",
            "priority::0",
            "default_priority::max_connections::1024",
        ] {
            assert!(
                clusters.lines().any(|line| line.starts_with("echo::") && line.contains(key)),
                "{}: {key}: {clusters}",
                proxy.kind
            );
        }
        assert!(proxy.page("/listeners").starts_with(&format!("http::{}", proxy.listener("http"))), "{}", proxy.kind);
        let metrics = proxy.page("/stats?format=prometheus");
        assert!(metrics.contains("# TYPE envoy_server_live gauge\nenvoy_server_live"), "{}: {metrics}", proxy.kind);
        assert_eq!(
            proxy.page("/stats/prometheus").lines().filter(|line| line.starts_with("# TYPE envoy_server_live")).count(),
            1
        );
        assert_eq!(proxy.page("/stats?filter=server.live"), "server.live: 1\n", "{}", proxy.kind);
        assert_eq!(proxy.page("/ready"), "LIVE\n");
        assert_eq!(proxy.ask("GET", "/nobody").unwrap().status, 404);
        for posted in ["/quitquitquit", "/drain_listeners", "/healthcheck/fail", "/logging"] {
            assert_eq!(proxy.ask("GET", posted).unwrap().status, 405, "{}: {posted}", proxy.kind);
        }
    }
}

#[test]
fn flags_mean_the_same() {
    let text = bootstrap(&[], &[]);
    let flags = [
        "--service-node",
        "flagged",
        "--service-cluster",
        "of-flags",
        "--service-zone",
        "here",
        "--stats-tag",
        "region:north",
        "--drain-strategy",
        "immediate",
        "--file-flush-interval-msec",
        "50",
        "--allow-unknown-static-fields",
        "--base-id-path",
        "@DIR@/base",
        "--log-path",
        "@DIR@/own.log",
        "--config-yaml",
        "static_resources: { clusters: [{ name: merged, type: STATIC, connect_timeout: 1s, load_assignment: { cluster_name: merged } }] }",
    ];
    for kind in ["envoy", "lateen"] {
        let proxy = Standalone::with_flags(kind, &text, &flags, |_| {});
        let info = proxy.json("/server_info");
        for (path, value) in [
            ("/node/id", "flagged"),
            ("/node/cluster", "of-flags"),
            ("/node/locality/zone", "here"),
            ("/command_line_options/service_node", "flagged"),
            ("/command_line_options/service_cluster", "of-flags"),
            ("/command_line_options/service_zone", "here"),
            ("/command_line_options/drain_time", "1s"),
        ] {
            assert_eq!(info.pointer(path).and_then(Value::as_str), Some(value), "{kind}: {path}: {info:#}");
        }
        let metrics = proxy.page("/stats?format=prometheus&filter=server.live");
        assert!(metrics.contains("envoy_server_live{region=\"north\"} 1"), "{kind}: {metrics}");
        assert!(proxy.page("/clusters").contains("merged::"), "{kind}");
        // Without hot restarts Envoy has no base id to tell.
        let base = std::fs::read_to_string(proxy.dir.path().join("base"));
        assert!(kind == "envoy" || base.is_ok_and(|base| base == "0"), "{kind}");
        assert!(proxy.dir.path().join("own.log").exists(), "{kind}");
    }
}

#[test]
fn a_bootstrap_is_checked_without_running_it() {
    let echo = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
    let good =
        bootstrap(&[listener("http", &[hcm(&[], &to_echo(), &serde_json::json!({}))])], &[cluster("echo", &[echo])]);
    let mut bad: Value = serde_json::from_str(&good).unwrap();
    bad["static_resources"]["clusters"][0]["connect_timeout"] = "never".into();
    let dir = tempfile::tempdir().unwrap();
    for (name, text, is_good) in [("good", good, true), ("bad", bad.to_string(), false)] {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        for kind in ["envoy", "lateen"] {
            let output = command(kind).args(["--mode", "validate", "-c"]).arg(&file).output().unwrap();
            let said =
                [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
            assert_eq!(output.status.success(), is_good, "{kind} {name}: {said}");
            let wanted = if is_good {
                format!("configuration '{}' OK", file.display())
            } else {
                "static_resources.clusters[0]".to_owned()
            };
            assert!(said.contains(&wanted) || kind == "envoy" && !is_good, "{kind} {name}: {said}");
        }
    }
}

/// A metric: its name, with its labels in order.
type Metric = (String, BTreeSet<String>);

/// What a proxy counts by metrics of these names; of connection managers, by that of `in` only.
pub(crate) fn counts(proxy: &Standalone, is_wanted: impl Fn(&str) -> bool) -> BTreeMap<Metric, u64> {
    let page = proxy.page("/stats?format=prometheus");
    let samples = page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = series.split_once('{')?;
        let labels: BTreeSet<String> = labels.trim_end_matches('}').split(',').map(str::to_owned).collect();
        let is_other = labels
            .iter()
            .any(|label| label.starts_with("envoy_http_conn_manager_prefix=") && !label.ends_with("\"in\""));
        (is_wanted(name) && !is_other).then(|| Some(((name.to_owned(), labels), value.parse().ok()?)))?
    });
    samples.collect()
}

#[test]
fn clusters_and_connection_managers_are_counted_the_same_way() {
    const NAMES: [&str; 15] = [
        "envoy_cluster_upstream_cx_total",
        "envoy_cluster_upstream_cx_active",
        "envoy_cluster_upstream_cx_connect_fail",
        "envoy_cluster_upstream_rq_total",
        "envoy_cluster_upstream_rq_active",
        "envoy_cluster_upstream_rq_xx",
        "envoy_cluster_upstream_rq_retry",
        "envoy_cluster_upstream_rq_timeout",
        "envoy_cluster_membership_total",
        "envoy_cluster_membership_healthy",
        "envoy_http_downstream_cx_total",
        "envoy_http_downstream_cx_active",
        "envoy_http_downstream_rq_total",
        "envoy_http_downstream_rq_xx",
        "envoy_http_downstream_rq_active",
    ];
    let flaky = Backend::start(|seen| match seen.path.as_str() {
        "/late" => loop {
            std::thread::park();
        },
        "/retried" => (503, vec![], String::new()),
        "/none" => (404, vec![], String::new()),
        _ => (200, vec![], "fine".into()),
    });
    let retry = serde_json::json!({ "retry_on": "5xx", "num_retries": 1 });
    let routes = serde_json::json!([
        { "match": { "path": "/gone" }, "route": { "cluster": "gone" } },
        { "match": { "path": "/empty" }, "route": { "cluster": "empty" } },
        { "match": { "path": "/direct" }, "direct_response": { "status": 403 } },
        { "match": { "path": "/retried" }, "route": { "cluster": "echo", "retry_policy": retry } },
        { "match": { "path": "/late" }, "route": { "cluster": "echo", "timeout": "0.2s" } },
        { "match": { "prefix": "/" }, "route": { "cluster": "echo" } },
    ]);
    let clusters = [
        cluster("echo", &[flaky.address]),
        cluster("gone", &[crate::backend::nobody()]),
        cluster("idle", &[flaky.address]),
        cluster("empty", &[]),
    ];
    let pair = Pair::start(&bootstrap(&[listener("http", &[hcm(&[], &routes, &serde_json::json!({}))])], &clusters));
    for path in ["/", "/a", "/none", "/retried", "/gone", "/empty", "/direct", "/late", "/a"] {
        pair.get("http", "a", path, &[]);
    }
    eventually("the same counts", || {
        let [theirs, ours] = pair.both().map(|proxy| counts(proxy, |name| NAMES.contains(&name)));
        // Where a metric says nothing yet, it need not be there.
        let (theirs, ours) = (some(theirs), some(ours));
        if ours == theirs { Ok(()) } else { Err(format!("Lateen: {ours:#?}\nEnvoy: {theirs:#?}")) }
    });
    let [theirs, ours] = pair.both().map(|proxy| proxy.page("/stats?filter=%5Ecluster.echo.upstream_rq_(total|4xx)$"));
    assert_eq!(ours.lines().collect::<BTreeSet<_>>(), theirs.lines().collect::<BTreeSet<_>>());
    assert!(ours.contains("cluster.echo.upstream_rq_4xx: 1"), "{ours}");
}

pub(crate) fn some(counts: BTreeMap<Metric, u64>) -> BTreeMap<Metric, u64> {
    counts.into_iter().filter(|(_, count)| *count > 0).collect()
}

#[test]
fn health_fails_and_comes_back() {
    for proxy in pair().both() {
        let at = proxy.listener("http");
        let leaves = |client: &mut Client| {
            let answer = client.send("GET", "a", "/", &[]).unwrap();
            assert_eq!(answer.status, 200, "{}: {answer:?}", proxy.kind);
            answer.header("connection") == Some("close")
        };
        let mut old = Client::plain(at).unwrap();
        assert!(!leaves(&mut old), "{}", proxy.kind);
        assert_eq!(proxy.ask("POST", "/healthcheck/fail").unwrap().status, 200);
        let ready = proxy.ask("GET", "/ready").unwrap();
        assert_eq!((ready.status, ready.body.as_str()), (503, "DRAINING\n"), "{}", proxy.kind);
        assert_eq!(proxy.page("/stats?filter=server.live"), "server.live: 0\n", "{}", proxy.kind);
        assert!(leaves(&mut old) && leaves(&mut Client::plain(at).unwrap()), "{}", proxy.kind);
        assert_eq!(proxy.ask("POST", "/healthcheck/ok").unwrap().status, 200);
        assert_eq!(proxy.ask("GET", "/ready").unwrap().status, 200, "{}", proxy.kind);
        assert!(!leaves(&mut Client::plain(at).unwrap()), "{}", proxy.kind);
    }
}

/// What is asked for and changes nothing: connections go on, and so does the proxy.
#[test]
fn drains_leave_a_proxy_ready() {
    let pair = pair();
    for (query, listens) in [("?skip_exit", true), ("?graceful&skip_exit", true), ("", false)] {
        for proxy in pair.both() {
            let what = format!("{} {query}", proxy.kind);
            let at = proxy.listener("http");
            assert_eq!(proxy.ask("POST", &format!("/drain_listeners{query}")).unwrap().status, 200, "{what}");
            assert_eq!(proxy.page("/ready"), "LIVE\n", "{what}");
            assert_eq!(proxy.page("/stats?filter=server.live"), "server.live: 1\n", "{what}");
            if listens {
                assert_eq!(Client::plain(at).unwrap().send("GET", "a", "/", &[]).unwrap().status, 200, "{what}");
                continue;
            }
            eventually(&format!("{what}: it does not listen"), || match std::net::TcpStream::connect(at) {
                Ok(_) => Err("it does".to_owned()),
                Err(_) => Ok(()),
            });
        }
    }
}

/// The levels of the program's own log, by the names of its own parts.
#[test]
fn levels_of_the_programs_log_are_listed_and_set() {
    let text = bootstrap(&[listener("http", &[hcm(&[], &to_echo(), &serde_json::json!({}))])], &[]);
    let proxy = Standalone::start("lateen", &text, |_| {});
    let set = |query: &str| proxy.ask("POST", &format!("/logging{query}")).unwrap();
    let level = |page: &str, of: &str| {
        let line = page.lines().find_map(|line| line.trim().strip_prefix(of)?.strip_prefix(':')).map(str::trim);
        line.unwrap_or_else(|| panic!("no {of} in {page}")).to_owned()
    };
    let listed = set("");
    assert!(listed.status == 200 && listed.body.starts_with("active loggers:\n"), "{listed:?}");
    assert_eq!(level(&listed.body, "xds"), "warn", "as the flag says");
    let at = proxy.listener("http");
    let mistake = || Client::plain(at).unwrap().raw(b"no request\r\n\r\n", false).unwrap();
    let said = || proxy.log().matches("malformed request").count();
    mistake();
    assert_eq!(said(), 0);
    let one = set("?paths=workers:debug").body;
    assert_eq!((level(&one, "workers"), level(&one, "xds")), ("debug".into(), "warn".into()));
    mistake();
    eventually("a line of that level", || if said() == 1 { Ok(()) } else { Err(proxy.log()) });
    assert_eq!(level(&set("?level=info").body, "workers"), "info");
    assert_eq!((set("?level=loud").status, set("?nobody=info").status), (400, 400));
    mistake();
    assert_eq!(level(&set("?xds=debug").body, "xds"), "debug");
    assert_eq!(said(), 1);
}

#[test]
fn listeners_drain_on_request() {
    for proxy in pair().both() {
        let at = proxy.listener("http");
        let mut kept = Client::plain(at).unwrap();
        assert_eq!(kept.send("GET", "a", "/", &[]).unwrap().status, 200);
        assert_eq!(proxy.ask("POST", "/drain_listeners?graceful").unwrap().status, 200);
        eventually(&format!("{} to say that the connection ends", proxy.kind), || {
            match kept.send("GET", "a", "/", &[]) {
                Ok(answer) if answer.header("connection") != Some("close") => Err(format!("{answer:?}")),
                // Said in a header, or by closing it.
                Ok(_) | Err(_) => Ok(()),
            }
        });
        eventually(&format!("{} not to listen", proxy.kind), || {
            match Client::plain(at).and_then(|mut client| client.send("GET", "a", "/", &[])) {
                Ok(answer) => Err(format!("{answer:?}")),
                Err(_) => Ok(()),
            }
        });
    }
}

#[test]
fn a_proxy_that_is_told_to_quit_ends() {
    let Pair { envoy, lateen } = pair();
    for mut proxy in [envoy, lateen] {
        assert_eq!(proxy.ask("POST", "/quitquitquit").unwrap().status, 200);
        let ended = eventually("the end", || proxy.ended().ok_or_else(|| "it runs".to_owned()));
        assert!(ended.success(), "{}: {ended}", proxy.kind);
    }
}
