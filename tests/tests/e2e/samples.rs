//! Istio's own samples, applied as its pages say, unmodified: the files below hold the same objects,
//! images and ports as those of Istio's release.

use std::time::{Duration, Instant};

use testkit::mesh::run_lateen;
use testkit::{Mesh, Shared, eventually};

static SAMPLES: Shared = Shared::new("samples", || crate::apps::namespace("default", true));

/// A file of the folder beside this one.
fn file(name: &str) -> String {
    format!("{}/tests/e2e/samples/{name}.yaml", env!("CARGO_MANIFEST_DIR"))
}

/// `apply -f` of samples, `delete -f` when dropped.
struct Applied<'a> {
    mesh: &'a Mesh,
    names: Vec<&'static str>,
}

fn apply<'a>(mesh: &'a Mesh, names: &[&'static str]) -> Applied<'a> {
    for name in names {
        mesh.must(&["apply", "-f", &file(name)], "");
    }
    let applied = Applied { mesh, names: names.to_vec() };
    mesh.must(&["rollout", "status", "--timeout", "120"], "");
    mesh.synced();
    applied
}

impl Drop for Applied<'_> {
    fn drop(&mut self) {
        for name in self.names.iter().rev() {
            _ = self.mesh.command(&["delete", "--ignore-not-found", "-f", &file(name)], "");
        }
    }
}

/// Every pod of the sample has its proxy.
fn all_have_proxies(mesh: &Mesh, count: usize) {
    // Those of the test before may be on their way out.
    eventually("as many pods, each with its proxy", || {
        let pods = mesh.must(&["get", "pods"], "");
        let ready = pods.lines().filter(|line| line.contains("2/2") && line.contains("Running")).count();
        if ready == count { Ok(()) } else { Err(pods) }
    });
}

#[test]
fn nothing_in_them_is_warned_about() {
    let folder = format!("{}/tests/e2e/samples", env!("CARGO_MANIFEST_DIR"));
    let output = run_lateen(&["validate", "-f", &folder], "");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let grave: Vec<&str> = said.lines().filter(|line| !line.starts_with("info:")).collect();
    assert!(grave.is_empty(), "{grave:#?}");
}

#[test]
fn bookinfo_with_its_gateway_subsets_and_faults() {
    let mesh = SAMPLES.turn();
    let _app = apply(&mesh, &["bookinfo", "bookinfo-gateway", "destination-rule-all"]);
    all_have_proxies(&mesh, 6);
    let page = mesh.get("any.host", "/productpage", &[]);
    assert_eq!(page.status, 200, "{page:?}");
    assert_eq!(mesh.get("any.host", "/not-routed", &[]).status, 404);
    let reviews = || mesh.get("any.host", "/api/v1/products/0/reviews", &[]).json()["podname"].to_string();
    let seen = eventually("all three versions", || {
        let seen: std::collections::BTreeSet<String> = (0..12).map(|_| reviews()[..11].to_owned()).collect();
        if seen.len() == 3 { Ok(seen) } else { Err(format!("{seen:?}")) }
    });
    assert!(seen.iter().all(|name| name.starts_with("\"reviews-v")), "{seen:?}");

    let _all_v1 = apply(&mesh, &["virtual-service-all-v1"]);
    assert!((0..10).all(|_| reviews().starts_with("\"reviews-v1")));
    let of = |user: &str| {
        let call = ["-H", &format!("end-user: {user}"), "http://reviews:9080/reviews/0"];
        let answer = mesh.curl("default/productpage-v1", &call);
        (answer.status, answer.json()["podname"].to_string(), answer.body)
    };
    mesh.must(&["apply", "-f", &file("virtual-service-reviews-test-v2")], "");
    mesh.synced();
    assert!(of("jason").1.starts_with("\"reviews-v2"));
    assert!(of("other").1.starts_with("\"reviews-v1"));

    mesh.must(&["apply", "-f", &file("virtual-service-ratings-test-abort")], "");
    mesh.synced();
    assert!(of("jason").2.contains("Ratings service is currently unavailable"), "{}", of("jason").2);
    mesh.must(&["apply", "-f", &file("virtual-service-ratings-test-delay")], "");
    mesh.synced();
    // The delay is longer than reviews waits: the sample's own defect, which the page shows.
    let ratings = |user: &str| {
        let call = ["-H", &format!("end-user: {user}"), "http://ratings:9080/ratings/0"];
        let began = Instant::now();
        let answer = mesh.curl("default/productpage-v1", &call);
        assert_eq!(answer.status, 200, "{user}: {answer:?}");
        began.elapsed()
    };
    let late = ratings("jason");
    assert!(late >= Duration::from_secs(7), "the fault of seven seconds: {late:?}");
    // A machine may be slow once, the fault is there each time.
    let prompt = (0..5).map(|_| ratings("kate")).min().unwrap_or_default();
    assert!(prompt < Duration::from_secs(5), "no fault for anybody else: {prompt:?}");
    mesh.must(&["apply", "-f", &file("virtual-service-reviews-50-v3")], "");
    mesh.synced();
    eventually("both halves", || {
        let seen: std::collections::BTreeSet<String> = (0..20).map(|_| reviews()[..11].to_owned()).collect();
        let wanted = ["\"reviews-v1".to_owned(), "\"reviews-v3".to_owned()];
        if seen.iter().eq(wanted.iter()) { Ok(()) } else { Err(format!("{seen:?}")) }
    });
}

#[test]
fn httpbin_and_curl() {
    let mesh = SAMPLES.turn();
    let _apps = apply(&mesh, &["httpbin", "curl", "sleep", "httpbin-gateway"]);
    all_have_proxies(&mesh, 3);
    assert_eq!(mesh.get("any.host", "/headers", &[]).status, 200);
    assert_eq!(mesh.get("any.host", "/status/418", &[]).status, 418);
    for client in ["default/curl", "default/sleep"] {
        let answer = mesh.curl(client, &["http://httpbin.default:8000/headers"]);
        assert_eq!(answer.status, 200);
        assert!(answer.body.to_lowercase().contains("x-forwarded-client-cert"), "{}", answer.body);
    }
}

#[test]
fn helloworld() {
    let mesh = SAMPLES.turn();
    let _apps = apply(&mesh, &["helloworld", "helloworld-gateway"]);
    all_have_proxies(&mesh, 2);
    eventually("both versions", || {
        let said: String = (0..10).map(|_| mesh.get("any.host", "/hello", &[]).body).collect();
        if said.contains("Hello version: v1") && said.contains("Hello version: v2") { Ok(()) } else { Err(said) }
    });
    assert_eq!(mesh.get("any.host", "/other", &[]).status, 404);
}

#[test]
fn tcp_echo_through_the_gateways_tcp_port() {
    let mesh = SAMPLES.turn();
    let _apps = apply(&mesh, &["curl", "tcp-echo-services", "tcp-echo-all-v1"]);
    all_have_proxies(&mesh, 3);
    let echo = |to: &str| {
        let script = format!("exec 3<>/dev/tcp/{to} && echo world >&3 && head -n 1 <&3");
        String::from_utf8_lossy(&mesh.exec("default/curl", &["bash", "-c", &script]).stdout).into_owned()
    };
    let gateway = "istio-ingressgateway.istio-system/31400";
    assert!((0..10).all(|_| echo(gateway) == "one world\n"), "{:?}", echo(gateway));
    mesh.must(&["apply", "-f", &file("tcp-echo-20-v2")], "");
    mesh.synced();
    eventually("both versions", || {
        let said: String = (0..20).map(|_| echo(gateway)).collect();
        if said.contains("one world") && said.contains("two world") { Ok(()) } else { Err(said) }
    });
    assert!(echo("tcp-echo/9001").ends_with(" world\n"), "the second port");
}
