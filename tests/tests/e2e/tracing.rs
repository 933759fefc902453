//! Traces: one for each request, through the gateway and every sidecar, at a Zipkin collector.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{Applied, Client, Mesh, Puppet, eventually};

use crate::apps::{COLLECTOR, TRAFFIC, virtual_service};
use crate::stats::assert_share;

/// Sends this share of requests to the collector.
fn sampling(mesh: &Mesh, percent: f64) -> Applied<'_> {
    mesh.with(&format!(
        "
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: tracing, namespace: istio-system}}
spec: {{tracing: [{{providers: [{{name: zipkin}}], randomSamplingPercentage: {percent}}}]}}
"
    ))
}

/// All spans that the collector was sent.
fn spans(puppet: &Puppet<'_>) -> Vec<Value> {
    let posts = puppet.seen().into_iter().filter(|request| request["path"] == "/api/v2/spans");
    let batches = posts.map(|request| {
        assert_eq!(
            (&request["method"], &request["headers"]["content-type"]),
            (&json!("POST"), &json!(["application/json"]))
        );
        let batch: Vec<Value> = serde_json::from_str(request["body"].as_str().unwrap()).expect("a JSON array");
        batch
    });
    batches.flatten().collect()
}

fn of_request(puppet: &Puppet<'_>, request_id: &str) -> Vec<Value> {
    let all = spans(puppet);
    traces_with(&all, "guid:x-request-id", request_id)
}

/// All spans of the traces in which some span has this tag.
fn traces_with(all: &[Value], tag: &str, value: &str) -> Vec<Value> {
    let ids: BTreeSet<&str> =
        all.iter().filter(|span| span["tags"][tag] == value).filter_map(|span| span["traceId"].as_str()).collect();
    let is_of_one = |span: &&Value| span["traceId"].as_str().is_some_and(|id| ids.contains(id));
    all.iter().filter(is_of_one).cloned().collect()
}

/// A trace as text: one span a line, children indented below their parent, in the order of names.
fn tree(spans: &[Value]) -> String {
    fn below(parent: Option<&str>, spans: &[Value], depth: usize, out: &mut String) {
        let is_child = |span: &&Value| span["parentId"].as_str() == parent;
        let mut children: Vec<&Value> = spans.iter().filter(is_child).collect();
        let key = |span: &Value| format!("{} {} {}", span["localEndpoint"]["serviceName"], span["kind"], span["name"]);
        children.sort_by_key(|span| key(span));
        for span in children {
            out.push_str(&format!("{}{}\n", "  ".repeat(depth), key(span).replace('"', "")));
            below(span["id"].as_str(), spans, depth + 1, out);
        }
    }
    let ids: BTreeSet<&str> = spans.iter().filter_map(|span| span["id"].as_str()).collect();
    assert_eq!(ids.len(), spans.len(), "every span has its own id");
    let mut out = String::new();
    // A parent outside of the mesh is as good as none.
    let known: Vec<Value> = spans
        .iter()
        .map(|span| {
            let mut span = span.clone();
            if span["parentId"].as_str().is_some_and(|parent| !ids.contains(parent)) {
                span["parentId"] = Value::Null;
            }
            span
        })
        .collect();
    below(None, &known, 0, &mut out);
    out
}

const BOOKS: &str = "istio-ingressgateway.istio-system SERVER productpage.bookinfo.svc.cluster.local:9080/*
  istio-ingressgateway.istio-system CLIENT router outbound|9080||productpage.bookinfo.svc.cluster.local egress
    productpage.bookinfo SERVER productpage.bookinfo.svc.cluster.local:9080/*
      productpage.bookinfo CLIENT details.bookinfo.svc.cluster.local:9080/*
        details.bookinfo SERVER details.bookinfo.svc.cluster.local:9080/*
      productpage.bookinfo CLIENT reviews.bookinfo.svc.cluster.local:9080/*
        reviews.bookinfo SERVER reviews.bookinfo.svc.cluster.local:9080/*
          reviews.bookinfo CLIENT ratings.bookinfo.svc.cluster.local:9080/*
            ratings.bookinfo SERVER ratings.bookinfo.svc.cluster.local:9080/*
";

#[test]
fn gateway_and_sidecars_make_one_trace_with_right_parents() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let _sampling = sampling(&mesh, 100.0);
    let books = virtual_service(
        "books",
        "  - route: [{destination: {host: productpage.bookinfo.svc.cluster.local, port: {number: 9080}}}]",
    );
    let reviews = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: traced, namespace: bookinfo}
spec: {hosts: [reviews], http: [{route: [{destination: {host: reviews, subset: v3}}]}]}
";
    let _routes = mesh.with(&format!("{books}\n---\n{reviews}"));
    let (trace, span) = ("80f198ee56343ba864fe8b2a57d3eff7", "e457b5a2e4d86bd1");
    let single = format!("{trace}-{span}-1");
    let parent = format!("00-{trace}-{span}-01");
    let starts: [(&str, Vec<(&str, &str)>); 4] = [
        ("00000000-0000-4000-8000-000000000001", vec![]),
        (
            "00000000-0000-4000-8000-000000000002",
            vec![("x-b3-traceid", trace), ("x-b3-spanid", span), ("x-b3-sampled", "1")],
        ),
        ("00000000-0000-4000-8000-000000000003", vec![("b3", single.as_str())]),
        ("00000000-0000-4000-8000-000000000004", vec![("traceparent", parent.as_str())]),
    ];
    for (agent, headers) in starts {
        puppet.forget();
        // The gateway makes its own request ids; the agent tells which trace is meant.
        let mut all = vec![("user-agent", agent)];
        all.extend(&headers);
        assert_eq!(mesh.get("books.shop.test", "/productpage", &all).status, 200);
        let found = eventually("the trace", || {
            let trace = traces_with(&spans(&puppet), "user_agent", agent);
            let drawn = tree(&trace);
            if drawn == BOOKS { Ok(trace) } else { Err(format!("{headers:?}\n{drawn}")) }
        });
        let root = found.iter().find(|of| {
            of["kind"] == "SERVER" && of["localEndpoint"]["serviceName"] == "istio-ingressgateway.istio-system"
        });
        let root = root.unwrap();
        let told = (root["traceId"].as_str().unwrap(), root["parentId"].as_str());
        if headers.is_empty() {
            assert!(told.0.len() == 32 && told.1.is_none(), "{root}");
        } else {
            assert_eq!(told, (trace, Some(span)), "the caller's trace goes on: {headers:?}");
        }
        check_tags(&found);
    }
}

fn check_tags(trace: &[Value]) {
    let ids: BTreeSet<&str> = trace.iter().filter_map(|span| span["tags"]["guid:x-request-id"].as_str()).collect();
    assert_eq!(ids.len(), 1, "one request id for the whole trace: {ids:?}");
    for span in trace {
        let tags = &span["tags"];
        assert!(
            span["duration"].as_u64() > Some(0) && span["timestamp"].as_u64() > Some(1_600_000_000_000_000),
            "{span}"
        );
        for (name, value) in [("component", "proxy"), ("http.status_code", "200"), ("response_flags", "-")] {
            assert_eq!(tags[name], value, "{span}");
        }
        assert!(tags["upstream_cluster"].is_string() && tags["upstream_address"].is_string(), "{span}");
        if tags.get("http.method").is_some() {
            for name in
                ["node_id", "http.url", "http.protocol", "peer.address", "istio.canonical_service", "istio.mesh_id"]
            {
                assert!(tags[name].as_str().is_some_and(|text| !text.is_empty()), "{name} of {span}");
            }
        }
        // A child neither starts before its parent nor outlives it by more than the clocks' grain.
        let parent = trace.iter().find(|parent| parent["id"] == span["parentId"]);
        if let Some(parent) = parent {
            let at = |span: &Value| (span["timestamp"].as_u64().unwrap(), span["duration"].as_u64().unwrap());
            assert!(at(span).0 + 1000 >= at(parent).0, "{span} starts before {parent}");
        }
    }
}

#[test]
fn the_request_id_decides_which_requests_are_traced() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let _route =
        mesh.with(&virtual_service("sampled", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let _sampling = sampling(&mesh, 25.0);
    let mut client = Client::plain(mesh.http).unwrap();
    let mut ask = |headers: &[(&str, &str)]| {
        let answer = client.send("GET", "sampled.shop.test", "/headers", headers).unwrap();
        let seen = answer.json()["headers"].clone();
        let text = |name: &str| seen[name][0].as_str().unwrap_or_default().to_owned();
        (text("x-request-id"), text("x-b3-sampled"), text("traceparent"))
    };
    let mut decided: BTreeMap<String, bool> = BTreeMap::new();
    for _ in 0..120 {
        let (id, sampled, traceparent) = ask(&[]);
        let expected = u32::from_str_radix(&id[..8], 16).unwrap() % 10_000 < 2_500;
        assert_eq!(&id[14..15], if expected { "9" } else { "4" }, "{id}");
        assert_eq!(sampled, if expected { "1" } else { "0" }, "{id}");
        assert!(traceparent.ends_with(if expected { "-01" } else { "-00" }), "{traceparent}");
        decided.insert(id, expected);
    }
    let share = decided.values().filter(|sampled| **sampled).count();
    assert_share("a quarter is sampled", share, 120, 0.25);
    // The caller's word counts more than chance, either way.
    let (forced, ..) = ask(&[("x-client-trace-id", "mine")]);
    assert_eq!(&forced[14..15], "b", "{forced}");
    assert_eq!(ask(&[("x-b3-sampled", "0")]).1, "0");
    assert_eq!(ask(&[("x-b3-sampled", "1")]).1, "1");
    let mut expected: BTreeSet<String> =
        decided.iter().filter(|(_, sampled)| **sampled).map(|(id, _)| id.clone()).collect();
    expected.insert(forced);
    eventually("the spans of the sampled requests", || {
        let all = spans(&puppet);
        let seen: BTreeSet<String> =
            all.iter().filter_map(|span| span["tags"]["guid:x-request-id"].as_str().map(str::to_owned)).collect();
        let stray: Vec<&String> = seen.iter().filter(|id| decided.get(*id) == Some(&false)).collect();
        assert!(stray.is_empty(), "not sampled, and yet there: {stray:?}");
        let missing: Vec<&String> = expected.difference(&seen).collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("{missing:?}")) }
    });
    // Gateway's server and client span, sidecar's server span.
    let one = expected.iter().next().unwrap();
    eventually("three spans of one request", || match of_request(&puppet, one).len() {
        3 => Ok(()),
        other => Err(other.to_string()),
    });
}

#[test]
fn a_collector_that_hangs_holds_no_request_up() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    let _route =
        mesh.with(&virtual_service("calm", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let _sampling = sampling(&mesh, 100.0);
    puppet.answers(&json!([{"path": "/api/v2/spans", "hangs": true}]));
    let mut client = Client::plain(mesh.http).unwrap();
    let began = Instant::now();
    for _ in 0..200 {
        assert_eq!(client.send("GET", "calm.shop.test", "/get", &[]).unwrap().status, 200);
    }
    // Each would wait for its spans' time-out, and that is no less than a second.
    assert!(began.elapsed() < Duration::from_secs(150), "{:?}", began.elapsed());
    eventually(
        "spans that nobody took",
        || {
            if spans(&puppet).is_empty() { Err("none sent".to_owned()) } else { Ok(()) }
        },
    );
}
