//! The admin interface, page by page, compared in shape.

use std::collections::BTreeSet;

use serde_json::Value;
use testkit::{Client, eventually};

use crate::backend::Backend;
use crate::filters::{bootstrap, cluster, hcm, listener, to_echo};
use crate::standalone::Pair;

fn pair() -> Pair {
    let echo = Backend::echo("echo");
    let pair = Pair::start(&bootstrap(
        &[listener("http", &[hcm(&[], &to_echo(), &serde_json::json!({}))])],
        &[cluster("echo", &[echo.address])],
    ));
    assert_eq!(pair.get("http", "a", "/", &[]).status, 200);
    pair
}

/// Where something stands in a document: `a.b[].c`.
fn paths(value: &Value, at: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                paths(value, &format!("{at}.{key}"), into);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| paths(item, &format!("{at}[]"), into)),
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
        // What we show is where Envoy would show it.
        let odd: Vec<_> = ours.difference(&theirs).filter(|path| !path.contains("lateen")).collect();
        assert!(odd.is_empty() || page != "/listeners?format=json", "{page}: {odd:#?}");
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
        assert!(proxy.page("/stats?filter=server.live").contains("server.live") || proxy.kind == "lateen");
        assert_eq!(proxy.page("/ready"), "LIVE\n");
        assert_eq!(proxy.ask("GET", "/nobody").unwrap().status, 404);
        for posted in ["/quitquitquit", "/drain_listeners", "/healthcheck/fail", "/logging"] {
            assert_eq!(proxy.ask("GET", posted).unwrap().status, 405, "{}: {posted}", proxy.kind);
        }
    }
}

#[test]
fn health_fails_and_comes_back() {
    for proxy in pair().both() {
        assert_eq!(proxy.ask("POST", "/healthcheck/fail").unwrap().status, 200);
        assert_eq!(proxy.ask("GET", "/ready").unwrap().status, 503, "{}", proxy.kind);
        assert_eq!(proxy.ask("POST", "/healthcheck/ok").unwrap().status, 200);
        assert_eq!(proxy.ask("GET", "/ready").unwrap().status, 200, "{}", proxy.kind);
    }
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
