//! Pods, rollouts, metrics, logs.

use std::sync::atomic::{AtomicBool, Ordering};

use testkit::{Client, Mesh, eventually};

use crate::apps::{TRAFFIC, virtual_service, workload};

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
fn a_pods_label_is_over_its_namespaces() {
    let mesh = TRAFFIC.turn();
    let with_label = |namespace: &str, name: &str, inject: bool| {
        workload(namespace, name, "v1", "curlimages/curl", None, "")
            .replace("version: v1}", &format!("version: v1, sidecar.istio.io/inject: \"{inject}\"}}"))
    };
    let _pods =
        mesh.with(&format!("{}\n---\n{}", with_label("shop", "without", false), with_label("plain", "with", true)));
    eventually("pods by their own label", || {
        let pods = mesh.must(&["get", "pods", "-A"], "");
        let has = |name: &str, ready: &str| {
            pods.lines().any(|line| line.contains(&format!(" {name}-")) && line.contains(ready))
        };
        // The second one's namespace opts out, which a pod's label does not overrule.
        if has("without", "1/1") && has("with", "1/1") { Ok(()) } else { Err(pods) }
    });
}

/// Keeps two connections busy until `during` is done; every request must be answered with 200.
fn under_load(mesh: &Mesh, host: &str, path: &str, during: impl FnOnce()) -> usize {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = || {
            let mut client = Client::plain(mesh.http).unwrap();
            let mut served = 0;
            while !done.load(Ordering::Relaxed) {
                let answer = client.send("GET", host, path, &[]).unwrap();
                if answer.status != 200 {
                    let line = eventually("the access log", || {
                        let log = mesh.logs("istio-system/istio-ingressgateway", "istio-proxy");
                        let code = format!(" {} ", answer.status);
                        log.lines().rfind(|line| line.contains(&code)).map(str::to_owned).ok_or(log.clone())
                    });
                    let pods = mesh.must(&["get", "pods", "-A", "-o", "wide"], "");
                    let upstream = line.split('"').filter_map(|part| part.split_once(':')).map(|(ip, _)| ip.to_owned());
                    let upstreams: Vec<String> = upstream.collect();
                    for row in pods.lines().filter(|row| upstreams.iter().any(|ip| row.contains(&format!(" {ip} ")))) {
                        let words: Vec<&str> = row.split_whitespace().collect();
                        for container in ["istio-proxy", "app"] {
                            let args = ["logs", words[1], "-n", words[0], "-c", container, "--tail", "6"];
                            eprintln!("{args:?}:\n{}", mesh.must(&args, ""));
                        }
                    }
                    let log = mesh.logs("istio-system/istio-ingressgateway", "istio-proxy");
                    let local =
                        line.split("svc.cluster.local ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or("?");
                    let same = log.lines().filter(|line| line.contains(local)).collect::<Vec<_>>();
                    eprintln!("same connection: {} {:#?}", same.len(), &same[same.len().saturating_sub(4)..]);
                    let at = log.lines().position(|have| have == line).unwrap_or(0);
                    eprintln!("before: {:#?}", log.lines().skip(at.saturating_sub(8)).take(12).collect::<Vec<_>>());
                    panic!("after {served}: {answer:?}\n{line}\n{pods}");
                }
                served += 1;
            }
            served
        };
        let loads = [scope.spawn(load), scope.spawn(load)];
        // Also when `during` fails, or the loads would go on for ever.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(during));
        done.store(true, Ordering::Relaxed);
        let served = loads.into_iter().map(|load| load.join().unwrap()).sum();
        if let Err(failure) = result {
            std::panic::resume_unwind(failure);
        }
        served
    })
}

#[test]
fn a_rolling_restart_and_scaling_lose_no_request() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("rolling", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let served = under_load(&mesh, "rolling.shop.test", "/get", || {
        mesh.must(&["scale", "deploy/httpbin", "--replicas", "2", "-n", "shop"], "");
        mesh.must(&["rollout", "status", "deploy/httpbin", "-n", "shop", "--timeout", "60"], "");
        mesh.must(&["rollout", "restart", "deploy/httpbin", "-n", "shop"], "");
        mesh.must(&["rollout", "status", "deploy/httpbin", "-n", "shop", "--timeout", "60"], "");
        mesh.must(&["scale", "deploy/httpbin", "--replicas", "1", "-n", "shop"], "");
        mesh.must(&["rollout", "status", "deploy/httpbin", "-n", "shop", "--timeout", "60"], "");
    });
    assert!(served > 50, "the load was on: {served}");
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
    under_load(&mesh, host, "/", || {
        mesh.must(&["rollout", "restart", "deploy/istiod", "-n", "istio-system"], "");
        mesh.must(&["rollout", "status", "deploy/istiod", "-n", "istio-system", "--timeout", "60"], "");
    });
    mesh.must(&["apply", "-f", "-"], &httpbin("/status/202"));
    eventually("a change after the restart", || match mesh.get(host, "/", &[]).status {
        202 => Ok(()),
        other => Err(other.to_string()),
    });
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
    find("shop/httpbin", "inbound|80||");
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
