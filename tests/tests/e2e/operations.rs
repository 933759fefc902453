//! Pods, control plane, metrics, logs.

use testkit::{Client, eventually};

use crate::apps::{TRAFFIC, virtual_service};
use crate::rollouts::under_load;

#[test]
fn pods_get_a_proxy_by_namespace_label_and_pods_without_one_are_reached_both_ways() {
    let mesh = TRAFFIC.turn();
    let pods = mesh.must(&["get", "pods", "-A"], "");
    let ready = |namespace: &str, prefix: &str| {
        let row = pods
            .lines()
            .find(|line| line.starts_with(namespace) && line.contains(&format!(" {prefix}-")))
            .unwrap_or_default();
        row.split_whitespace().nth(2).unwrap_or_default().to_owned()
    };
    assert_eq!(ready("shop", "curl"), "2/2", "{pods}");
    assert_eq!(ready("plain", "curl"), "1/1", "{pods}");
    assert_eq!(mesh.curl("plain/curl", &["http://httpbin.shop:8000/get"]).status, 200);
    assert_eq!(mesh.curl("shop/curl", &["http://httpbin.plain:8000/get"]).status, 200);
    assert_eq!(mesh.curl("plain/curl", &["http://httpbin:8000/get"]).status, 200, "no mesh at all");
}

#[test]
fn a_crashed_control_plane_leaves_traffic_flowing_and_comes_back() {
    let mesh = TRAFFIC.turn();
    let host = "crash.shop.test";
    let httpbin = |path: &str| {
        virtual_service(
            "crash",
            &format!(
                "  - rewrite: {{uri: {path}}}\n    route: [{{destination: {{host: httpbin, port: {{number: 8000}}}}}}]"
            ),
        )
    };
    let _route = mesh.with(&httpbin("/get"));
    let load = |client: &mut Client| client.send("GET", host, "/", &[]);
    under_load(
        &mesh,
        2,
        || Client::plain(mesh.http),
        load,
        || {
            // An orderly end, then two without a word.
            mesh.must(&["rollout", "restart", "deploy/istiod", "-n", "istio-system"], "");
            mesh.must(&["rollout", "status", "deploy/istiod", "-n", "istio-system", "--timeout", "120"], "");
            for _ in 0..2 {
                // the one that was asked to end has ended
                let killed = eventually("one control plane", || {
                    let running = mesh.processes(" discovery");
                    if running.len() == 1 { Ok(running) } else { Err(format!("{running:?}")) }
                });
                let ids: Vec<String> = killed.iter().map(ToString::to_string).collect();
                assert!(std::process::Command::new("kill").arg("-KILL").args(&ids).status().unwrap().success());
                eventually("another control plane", || {
                    let now = mesh.processes(" discovery");
                    if now.is_empty() || now.iter().any(|pid| killed.contains(pid)) {
                        return Err(format!("{killed:?}, {now:?}"));
                    }
                    let status = mesh.status();
                    if status["ready"] == true { Ok(()) } else { Err(status.to_string()) }
                });
            }
        },
    );
    mesh.must(&["apply", "-f", "-"], &httpbin("/status/202"));
    eventually("a change after the restart", || match mesh.get(host, "/", &[]).status {
        202 => Ok(()),
        other => Err(other.to_string()),
    });
    // Its CA goes on: a pod that starts now is trusted by those that were there.
    let before = mesh.certificates("shop/httpbin", "ROOTCA");
    mesh.must(&["rollout", "restart", "deploy/httpbin", "-n", "shop"], "");
    mesh.must(&["rollout", "status", "deploy/httpbin", "-n", "shop", "--timeout", "120"], "");
    assert_eq!(mesh.certificates("shop/httpbin", "ROOTCA"), before);
    assert_eq!(mesh.curl("shop/curl", &["http://httpbin:8000/get"]).status, 200);
}

#[test]
fn proxies_count_requests_with_istios_names_and_labels() {
    let mesh = TRAFFIC.turn();
    assert_eq!(mesh.curl("shop/curl", &["http://httpbin:8000/status/201"]).status, 201);
    let metrics = |whence: &str| mesh.curl(whence, &["http://127.0.0.1:15090/stats/prometheus"]).body;
    let check = |whence: &str, reporter: &str| {
        let wanted = [
            format!("reporter=\"{reporter}\""),
            "source_workload=\"curl\"".into(),
            "source_workload_namespace=\"shop\"".into(),
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/curl\"".into(),
            "source_app=\"curl\"".into(),
            "destination_workload=\"httpbin\"".into(),
            "destination_principal=\"spiffe://cluster.local/ns/shop/sa/httpbin\"".into(),
            "destination_service=\"httpbin.shop.svc.cluster.local\"".into(),
            "destination_service_name=\"httpbin\"".into(),
            "destination_service_namespace=\"shop\"".into(),
            "request_protocol=\"http\"".into(),
            "response_code=\"201\"".into(),
            "response_flags=\"-\"".into(),
        ];
        eventually("istio_requests_total", || {
            let text = metrics(whence);
            let line =
                |line: &&str| line.starts_with("istio_requests_total{") && line.contains("response_code=\"201\"");
            let found = text.lines().find(line).unwrap_or_default().to_owned();
            let missing: Vec<_> = wanted.iter().filter(|label| !found.contains(label.as_str())).collect();
            if missing.is_empty() { Ok(()) } else { Err(format!("{missing:?} not in {found:?}")) }
        });
        let text = metrics(whence);
        for name in
            ["istio_request_duration_milliseconds_bucket", "istio_request_bytes_sum", "istio_response_bytes_count"]
        {
            assert!(text.contains(name), "{whence} has no {name}");
        }
    };
    check("shop/curl", "source");
    check("shop/httpbin", "destination");
}

#[test]
fn the_access_log_has_istios_text_format() {
    let mesh = TRAFFIC.turn();
    assert_eq!(mesh.curl("shop/curl", &["-A", "tester/1", "http://httpbin:8000/anything/logged"]).status, 200);
    let find = |whence: &str, direction: &str| {
        eventually("the access log", || {
            let log = mesh.logs(whence, "istio-proxy");
            let line = log.lines().rfind(|line| line.contains("/anything/logged")).unwrap_or_default().to_owned();
            let wanted = [
                "\"GET /anything/logged HTTP/1.1\" 200 - via_upstream - \"-\" 0 ",
                "\"tester/1\"",
                "\"httpbin:8000\"",
                direction,
            ];
            if line.starts_with('[') && wanted.iter().all(|part| line.contains(part)) { Ok(()) } else { Err(line) }
        });
    };
    find("shop/curl", "outbound|8000||httpbin.shop.svc.cluster.local");
    // The application is called from an address that its proxy alone has.
    find("shop/httpbin", "inbound|80|| 127.0.0.6:");
}

#[test]
fn a_saved_file_is_live() {
    let mesh = TRAFFIC.turn();
    let before = std::fs::read_to_string(mesh.file()).unwrap();
    let route = virtual_service("saved", "  - directResponse: {status: 200, body: {string: saved}}");
    std::fs::write(mesh.file(), format!("{before}\n---\n{route}")).unwrap();
    eventually("what the file says", || {
        let answer = mesh.get("saved.shop.test", "/", &[]);
        if answer.body == "saved" { Ok(()) } else { Err(format!("{answer:?}")) }
    });
    // An edit that cannot be admitted leaves the last good version in place.
    let broken = route.replace("status: 200", "status: many");
    std::fs::write(mesh.file(), format!("{before}\n---\n{broken}")).unwrap();
    eventually("the refusal", || {
        let said = mesh.said();
        if said.contains("shop/saved") && said.contains("status") { Ok(()) } else { Err(said) }
    });
    assert_eq!(mesh.get("saved.shop.test", "/", &[]).body, "saved");
    std::fs::write(mesh.file(), before).unwrap();
    eventually("the rule to go", || match mesh.get("saved.shop.test", "/", &[]).status {
        404 => Ok(()),
        other => Err(other.to_string()),
    });
}
