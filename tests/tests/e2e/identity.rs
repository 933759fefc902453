//! Mutual TLS and who is seen.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

use testkit::puppet::{ClientHello, client_hello};
use testkit::{Client, Mesh, Puppet, eventually};

use crate::apps::{PUPPET, SECURITY, service, workload};

const HTTPBIN: &str = "http://httpbin.foo:8000";

fn peer_authentication(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn status(mesh: &Mesh, whence: &str) -> u16 {
    mesh.curl(whence, &[&format!("{HTTPBIN}/get")]).status
}

#[test]
fn sidecars_speak_mutual_tls_by_themselves_and_pods_without_proxy_are_served() {
    let mesh = SECURITY.turn();
    let seen = mesh.curl("bar/curl", &[&format!("{HTTPBIN}/headers")]);
    assert_eq!(seen.status, 200, "{seen:?}");
    let xfcc = seen.json()["headers"]["x-forwarded-client-cert"][0].as_str().unwrap_or_default().to_owned();
    assert!(xfcc.contains("By=spiffe://cluster.local/ns/foo/sa/httpbin"), "{xfcc}");
    assert!(xfcc.contains("URI=spiffe://cluster.local/ns/bar/sa/curl"), "{xfcc}");
    let plain = mesh.curl("legacy/curl", &[&format!("{HTTPBIN}/headers")]);
    assert_eq!(plain.status, 200, "{plain:?}");
    assert!(!plain.body.contains("x-forwarded-client-cert"), "{plain:?}");
    let out = mesh.curl("foo/curl", &["http://httpbin.legacy:8000/headers"]);
    assert!(out.status == 200 && !out.body.contains("x-forwarded-client-cert"), "to a pod without proxy: {out:?}");
}

#[test]
fn no_pod_ends_or_drains_the_proxy_of_another() {
    let mesh = SECURITY.turn();
    let pods = mesh.must(&["get", "pods", "-n", "foo", "-l", "app=httpbin", "-o", "json"], "");
    let before: serde_json::Value = serde_json::from_str(&pods).unwrap();
    let address = before["items"][0]["status"]["podIP"].as_str().unwrap();
    for whence in ["legacy/curl", "bar/curl"] {
        for page in ["quitquitquit", "drain"] {
            let answer = mesh.curl(whence, &["-X", "POST", &format!("http://{address}:15020/{page}")]);
            assert_eq!(answer.status, 403, "{page} from {whence}: {answer:?}");
        }
        assert_eq!(mesh.curl(whence, &[&format!("http://{address}:15020/healthz/ready")]).status, 200);
    }
    // The pod's own programs may, and are told so by another mistake.
    assert_eq!(mesh.curl("foo/httpbin", &["http://127.0.0.1:15020/quitquitquit"]).status, 405);
}

#[test]
fn a_client_cannot_forge_who_it_is() {
    let mesh = SECURITY.turn();
    let forged = "x-forwarded-client-cert: By=spiffe://x;URI=spiffe://cluster.local/ns/foo/sa/admin";
    for whence in ["bar/curl", "legacy/curl"] {
        let seen = mesh.curl(whence, &["-H", forged, &format!("{HTTPBIN}/headers")]);
        assert!(seen.status == 200 && !seen.body.contains("sa/admin"), "{whence}: {seen:?}");
    }
}

#[test]
fn strict_refuses_plaintext_and_permissive_takes_it() {
    let mesh = SECURITY.turn();
    {
        let _strict = mesh.with(&peer_authentication("foo", "default", "{mtls: {mode: STRICT}}"));
        assert_eq!(status(&mesh, "legacy/curl"), 0, "plaintext is cut off");
        assert_eq!(status(&mesh, "bar/curl"), 200);
        let answer = mesh.get("httpbin.foo.test", "/get", &[]);
        assert_eq!(answer.status, 200, "the gateway has an identity: {answer:?}");
    }
    assert_eq!(status(&mesh, "legacy/curl"), 200, "back to PERMISSIVE");
}

#[test]
fn probes_reach_an_application_whose_proxy_is_strict() {
    let mesh = SECURITY.turn();
    let strict = peer_authentication("foo", "default", "{mtls: {mode: STRICT}}");
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: probed, namespace: foo, labels: {app: probed}}
spec:
  containers:
  - name: app
    image: docker.io/kong/httpbin
    readinessProbe: {httpGet: {path: /status/204, port: 80}, periodSeconds: 1}
";
    let _objects = mesh.with(&format!("{strict}---{pod}"));
    eventually("the pod to be ready", || {
        let row = mesh.must(&["get", "pod/probed", "-n", "foo"], "");
        if row.contains("2/2") { Ok(()) } else { Err(row) }
    });
}

/// How the pod's port takes a call: `None` refused, else whether it came over mutual TLS.
fn taken(mesh: &Mesh, whence: &str) -> Option<bool> {
    let seen = mesh.curl(whence, &[&format!("{HTTPBIN}/headers")]);
    (seen.status == 200).then(|| seen.body.contains("x-forwarded-client-cert"))
}

#[test]
fn the_innermost_peer_authentication_that_says_something_holds() {
    let mesh = SECURITY.turn();
    // modes of mesh, namespace, workload, port; what plaintext and meshed callers meet
    for (modes, plaintext, meshed) in [
        (["STRICT", "", "", ""], None, Some(true)),
        (["PERMISSIVE", "", "", ""], Some(false), Some(true)),
        (["DISABLE", "", "", ""], Some(false), Some(false)),
        (["STRICT", "PERMISSIVE", "", ""], Some(false), Some(true)),
        (["STRICT", "DISABLE", "", ""], Some(false), Some(false)),
        (["DISABLE", "STRICT", "", ""], None, Some(true)),
        (["STRICT", "UNSET", "", ""], None, Some(true)),
        (["PERMISSIVE", "STRICT", "PERMISSIVE", ""], Some(false), Some(true)),
        (["PERMISSIVE", "PERMISSIVE", "STRICT", ""], None, Some(true)),
        (["STRICT", "STRICT", "DISABLE", ""], Some(false), Some(false)),
        (["PERMISSIVE", "STRICT", "UNSET", "UNSET"], None, Some(true)),
        (["STRICT", "STRICT", "STRICT", "PERMISSIVE"], Some(false), Some(true)),
        (["STRICT", "STRICT", "STRICT", "DISABLE"], Some(false), Some(false)),
        (["PERMISSIVE", "PERMISSIVE", "DISABLE", "STRICT"], None, Some(true)),
        // Where all of a namespace is DISABLE, clients speak no TLS to its services, whatever a port
        // says: istiod's `BestEffortInferServiceMTLSMode` looks at mesh and namespace only.
        (["DISABLE", "DISABLE", "DISABLE", "STRICT"], None, None),
    ] {
        let [mesh_wide, namespace, of_workload, port] = modes;
        let mut objects =
            vec![peer_authentication("istio-system", "default", &format!("{{mtls: {{mode: {mesh_wide}}}}}"))];
        if !namespace.is_empty() {
            objects.push(peer_authentication("foo", "default", &format!("{{mtls: {{mode: {namespace}}}}}")));
        }
        if !of_workload.is_empty() {
            let ports =
                if port.is_empty() { String::new() } else { format!(", portLevelMtls: {{80: {{mode: {port}}}}}") };
            let spec = format!("{{selector: {{matchLabels: {{app: httpbin}}}}, mtls: {{mode: {of_workload}}}{ports}}}");
            objects.push(peer_authentication("foo", "httpbin", &spec));
        }
        let _objects = mesh.with(&objects.join("---\n"));
        assert_eq!(taken(&mesh, "legacy/curl"), plaintext, "plaintext: {modes:?}");
        assert_eq!(taken(&mesh, "bar/curl"), meshed, "meshed: {modes:?}");
    }
}

#[test]
fn of_two_policies_of_a_namespace_the_older_one_holds() {
    let mesh = SECURITY.turn();
    let _older = mesh.with(&peer_authentication("foo", "zzz", "{mtls: {mode: STRICT}}"));
    // Ages are told in seconds; of two of one second the name decides.
    let second = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let made = second();
    eventually("the next second", || if second() > made { Ok(()) } else { Err(String::new()) });
    let _younger = mesh.with(&peer_authentication("foo", "aaa", "{mtls: {mode: PERMISSIVE}}"));
    assert_eq!(taken(&mesh, "legacy/curl"), None);
}

#[test]
fn strict_ports_refuse_bytes_and_tls_without_a_certificate() {
    let mesh = SECURITY.turn();
    let echo = |whence: &str| {
        let script = "exec 3<>/dev/tcp/echo.foo/9000; echo hi >&3; read -r -t 5 line <&3; echo \"$line\"";
        String::from_utf8_lossy(&mesh.exec(whence, &["bash", "-c", script]).stdout).trim().to_owned()
    };
    let tls = || mesh.curl("legacy/curl", &["-k", "https://httpbin.foo:8000/get"]).status;
    assert_eq!((echo("legacy/curl").as_str(), echo("bar/curl").as_str()), ("one hi", "one hi"));
    assert_eq!(tls(), 0, "an HTTP port takes no TLS but the mesh's, also in PERMISSIVE");
    let _strict = mesh.with(&peer_authentication("foo", "default", "{mtls: {mode: STRICT}}"));
    assert_eq!((echo("legacy/curl").as_str(), echo("bar/curl").as_str()), ("", "one hi"));
    assert_eq!(tls(), 0, "TLS without a certificate of the mesh is no mutual TLS");
    let _policy = mesh.with(&peer_authentication(
        "foo",
        "echo",
        "{selector: {matchLabels: {app: echo}}, portLevelMtls: {9000: {mode: PERMISSIVE}}}",
    ));
    assert_eq!(echo("legacy/curl"), "one hi", "the port's own mode");
    assert_eq!(taken(&mesh, "legacy/curl"), None, "the other workload's stays");
}

/// What a server sees of a sidecar's TLS: the protocols that say what is inside, and the name that
/// says which service is meant.
#[test]
fn sidecars_offer_istios_protocols_and_names() {
    let mesh = SECURITY.turn();
    let puppet = Puppet::new(&mesh, PUPPET);
    let _tls = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: raw, namespace: bar}
spec: {host: puppet.legacy.svc.cluster.local, exportTo: [.], trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}
",
    );
    // The server only reads, so that no call succeeds.
    let curl = |args: &[&str]| mesh.curl("bar/curl", &[&["--max-time", "3"][..], args].concat());
    let call = |port: u16| match port {
        8001 => {
            let script = "exec 3<>/dev/tcp/puppet.legacy/8001; echo hi >&3; read -r -t 2 <&3";
            drop(mesh.exec("bar/curl", &["bash", "-c", script]));
        }
        8002 => drop(curl(&["http://puppet.legacy:8002/"])),
        _ => drop(curl(&[
            "--http2-prior-knowledge",
            "-H",
            "content-type: application/grpc",
            "http://puppet.legacy:8003/a.B/C",
        ])),
    };
    let hello = |port: u16, alpn: &[&str]| ClientHello {
        server_name: Some(format!("outbound_.{port}_._.puppet.legacy.svc.cluster.local")),
        alpn: alpn.iter().map(|name| (*name).to_owned()).collect(),
    };
    for (port, alpn) in [
        (8002, &["istio-http/1.1", "istio", "http/1.1"][..]),
        (8003, &["istio-h2", "istio", "h2"]),
        (8001, &["istio-peer-exchange", "istio"]),
    ] {
        let expected = hello(port, alpn);
        // A caller without patience on a slow machine may have left too early.
        eventually("the hello", || {
            call(port);
            let seen: Vec<ClientHello> = puppet.raw().iter().filter_map(|bytes| client_hello(bytes)).collect();
            if seen.contains(&expected) { Ok(()) } else { Err(format!("{expected:?} in {seen:#?}")) }
        });
    }
}

/// A workload whose certificates live for sixteen seconds, and so are renewed every eight.
fn short_lived(name: &str, image: &str, port: Option<u16>) -> String {
    let config = "{proxyMetadata: {SECRET_TTL: 16s}}";
    workload("foo", name, "v1", image, port, "")
        .replace("version: v1}", &format!("version: v1}}, annotations: {{proxy.istio.io/config: \"{config}\"}}"))
}

/// A gateway whose certificates are [`short_lived`], too.
const DOOR: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: door, namespace: foo}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: door, namespace: foo}
spec:
  selector: {matchLabels: {istio: door}}
  template:
    metadata:
      labels: {istio: door}
      annotations: {inject.istio.io/templates: gateway, proxy.istio.io/config: \"{proxyMetadata: {SECRET_TTL: 16s}}\"}
    spec:
      serviceAccountName: door
      containers: [{name: istio-proxy, image: auto}]
---
apiVersion: v1
kind: Service
metadata: {name: door, namespace: foo}
spec: {selector: {istio: door}, ports: [{name: http, port: 8080}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: door, namespace: foo}
spec:
  selector: {istio: door}
  servers: [{port: {number: 8080, name: http, protocol: HTTP}, hosts: [rotating.foo.test]}]
";

fn serial(mesh: &Mesh, deployment: &str) -> String {
    let table = mesh.must(&["proxy-config", "secret", &format!("deploy/{deployment}"), "-n", "foo"], "");
    let row = table.lines().find(|line| line.starts_with("default")).unwrap_or_default();
    assert!(!row.is_empty(), "{table}");
    row.to_owned()
}

#[test]
fn certificates_rotate_under_load_without_a_failed_request_or_a_reset_stream() {
    let mesh = SECURITY.turn();
    let _objects = mesh.with(
        &[
            short_lived("rotating", "docker.io/kong/httpbin", Some(80)),
            short_lived("streaming", "lateen/grpc-echo", Some(7070)),
            short_lived("caller", "curlimages/curl", None),
            short_lived("echoing", "docker.io/istio/tcp-echo-server:1.3", Some(9000)).replace(
                "image: \"docker.io/istio/tcp-echo-server:1.3\"",
                "image: \"docker.io/istio/tcp-echo-server:1.3\", args: [\"9000\", \"echo\"]",
            ),
            service("foo", "echoing", "{name: tcp, port: 9000}"),
            DOOR.to_owned(),
            service("foo", "rotating", "{name: http, port: 8000, targetPort: 80}"),
            service("foo", "fresh", "{name: http, port: 8000, targetPort: 80}")
                .replace("{app: fresh}, ports", "{app: rotating}, ports"),
            service("foo", "streaming", "{name: grpc, port: 7070}"),
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: fresh, namespace: foo}
spec: {host: fresh, trafficPolicy: {connectionPool: {http: {maxRequestsPerConnection: 1}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: rotating, namespace: foo}
spec:
  hosts: [rotating.foo.test]
  gateways: [gateway, door]
  http: [{route: [{destination: {host: rotating, port: {number: 8000}}}]}]
"
            .to_owned(),
        ]
        .join("---\n"),
    );
    let names = ["rotating", "streaming", "caller", "echoing", "door"];
    for name in names {
        mesh.must(&["rollout", "status", &format!("deploy/{name}"), "-n", "foo", "--timeout", "120"], "");
    }
    mesh.synced();
    // One connection of bytes, used after each new certificate of anybody.
    let mut bytes = mesh.dial("foo/caller", "echoing", 9000);
    let mut say = move || {
        bytes.write_all(b"on\n").unwrap();
        let mut line = [0; 8];
        bytes.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"echo on\n");
    };
    let rotations = || {
        say();
        let mut seen: Vec<BTreeSet<String>> = vec![BTreeSet::new(); names.len()];
        while seen.iter().any(|serials| serials.len() < 3) {
            eventually("the next certificate", || {
                let known: usize = seen.iter().map(BTreeSet::len).sum();
                for (name, serials) in names.iter().zip(&mut seen) {
                    serials.insert(serial(&mesh, name));
                }
                let now = seen.iter().map(BTreeSet::len).sum::<usize>();
                if now > known { Ok(()) } else { Err(format!("{seen:?}")) }
            });
            say();
        }
    };
    // Paced for longer than two rotations take: one connection of the application each.
    let paced = |whence: &str, address: &str, host: &str| {
        let (url, host) = (format!("http://{address}/get?[1-260]"), format!("host: {host}"));
        let write = "%{http_code} %{num_connects}\n";
        mesh.exec(whence, &["curl", "-s", "--rate", "10/s", "-o", "/dev/null", "-w", write, "-H", &host, &url])
    };
    let all_served = |what: &str, output: &std::process::Output| {
        let text = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<&str> = text.lines().collect();
        let failed: Vec<_> = lines.iter().filter(|line| !line.starts_with("200 ")).collect();
        assert!(lines.len() == 260 && failed.is_empty(), "{what}: {failed:?} of {}", lines.len());
        let connects = lines.iter().filter(|line| line.ends_with(" 1")).count();
        assert_eq!(connects, 1, "{what}: the application's connection stays");
    };
    let stream = "(for i in {1..26}; do printf '\\0\\0\\0\\0\\5hello'; sleep 1; done) | curl -sv --http2-prior-knowledge -H 'content-type: application/grpc' -H 'te: trailers' -X POST -T - http://streaming:7070/echo.Echo/Stream 2>&1 | tr -d '\\0'";
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let kept = scope.spawn(|| paced("foo/caller", "rotating:8000", "rotating:8000"));
        let fresh = scope.spawn(|| paced("foo/caller", "fresh:8000", "fresh:8000"));
        let door = scope.spawn(|| paced("legacy/curl", "door.foo:8080", "rotating.foo.test"));
        let streamed = scope.spawn(|| mesh.exec("foo/caller", &["bash", "-c", stream]));
        let outside = scope.spawn(|| {
            let mut client = Client::plain(mesh.http).unwrap();
            while !done.load(Ordering::Relaxed) {
                let answer = client.send("GET", "rotating.foo.test", "/get", &[]).unwrap();
                assert_eq!(answer.status, 200, "from outside: {answer:?}");
            }
        });
        let rotated = std::panic::catch_unwind(std::panic::AssertUnwindSafe(rotations));
        let outputs = [kept.join().unwrap(), fresh.join().unwrap(), door.join().unwrap()];
        done.store(true, Ordering::Relaxed);
        let streamed = streamed.join().unwrap();
        outside.join().unwrap();
        rotated.unwrap();
        all_served("kept connections", &outputs[0]);
        all_served("fresh connections", &outputs[1]);
        all_served("through a gateway", &outputs[2]);
        let text = String::from_utf8_lossy(&streamed.stdout);
        assert!(text.contains("< grpc-status: 0"), "{text}");
        assert_eq!(text.matches("hello").count(), 26, "{text}");
    });
}

#[test]
fn disabled_mutual_tls_is_plaintext_on_the_wire() {
    let mesh = SECURITY.turn();
    let _disabled = mesh.with(&peer_authentication("foo", "default", "{mtls: {mode: DISABLE}}"));
    let seen = mesh.curl("bar/curl", &[&format!("{HTTPBIN}/headers")]);
    assert!(seen.status == 200 && !seen.body.contains("x-forwarded-client-cert"), "{seen:?}");
}

#[test]
fn every_namespace_has_the_root_certificate_and_keeps_it() {
    let mesh = SECURITY.turn();
    let _namespace = mesh.with(&crate::apps::namespace("fresh", true));
    let root = || {
        let map = mesh.command(&["get", "configmap/istio-ca-root-cert", "-n", "fresh", "-o", "json"], "");
        let map: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap_or_default();
        map["data"]["root-cert.pem"].as_str().unwrap_or_default().to_owned()
    };
    let is_there = |what: &str| {
        eventually(what, || {
            let pem = root();
            if pem.contains("BEGIN CERTIFICATE") { Ok(pem) } else { Err(pem) }
        })
    };
    let first = is_there("the root of a new namespace");
    assert_eq!(testkit::http::der(&first), mesh.certificates("foo/httpbin", "ROOTCA"));
    let map = |data: &str| {
        format!(
            "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio-ca-root-cert, namespace: fresh}}, data: {data}}}"
        )
    };
    mesh.must(&["delete", "-f", "-"], &map("{}"));
    assert_eq!(is_there("what was deleted"), first);
    mesh.must(&["apply", "-f", "-"], &map("{root-cert.pem: mine}"));
    assert_eq!(is_there("what was changed"), first);
}

/// The first address of a pod that is neither its loopback nor its link's.
fn ipv6(mesh: &Mesh, whence: &str) -> String {
    let output = mesh.exec(whence, &["cat", "/proc/net/if_inet6"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let digits =
        text.lines().map(|line| &line[..32]).find(|digits| !digits.starts_with("fe80") && !digits.starts_with("0000"));
    let digits = digits.unwrap_or_else(|| panic!("{whence}: {text}"));
    (0..8).map(|at| &digits[at * 4..at * 4 + 4]).collect::<Vec<_>>().join(":")
}

#[test]
fn ipv6_leads_not_around_the_proxy() {
    if !std::path::Path::new("/proc/net/if_inet6").exists() {
        return; // A kernel without IPv6 has no way around.
    }
    let mesh = SECURITY.turn();
    let guarded =
        crate::apps::puppet("foo").replace("name: puppet", "name: guarded").replace("app: puppet", "app: guarded");
    let _objects =
        mesh.with(&format!("{guarded}---\n{}", peer_authentication("foo", "default", "{mtls: {mode: STRICT}}")));
    mesh.must(&["rollout", "status", "deploy/guarded", "-n", "foo", "--timeout", "120"], "");
    let (open, guarded) = (Puppet::new(&mesh, PUPPET), Puppet::new(&mesh, "foo/guarded"));
    let ask = |whence: &str| {
        let url = format!("http://[{}]:{}/six", ipv6(&mesh, whence), testkit::puppet::PORT);
        mesh.curl("legacy/curl", &["-g", "--max-time", "10", &url]).status
    };
    assert_eq!((ask(PUPPET), open.seen().len()), (200, 1), "pods reach each other by IPv6");
    assert_eq!((ask("foo/guarded"), guarded.seen().len()), (0, 0), "STRICT holds for IPv6 too");
}

#[test]
fn proxies_tell_what_is_left_of_their_certificates() {
    let mesh = SECURITY.turn();
    let metrics = mesh.curl("foo/httpbin", &["http://127.0.0.1:15020/stats/prometheus"]).body;
    let left = |name: &str| {
        let start = format!("istio_agent_cert_expiry_seconds{{resource_name=\"{name}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
        line.unwrap_or_else(|| panic!("{name}: {metrics}")).parse::<f64>().unwrap()
    };
    let day = 86_400.0;
    assert!((day / 2.0 - 3600.0..=day).contains(&left("default")), "{}", left("default"));
    assert!((3640.0 * day..=3650.0 * day).contains(&left("ROOTCA")), "{}", left("ROOTCA"));
}

#[test]
fn mutual_tls_to_a_server_without_a_proxy_fails() {
    let mesh = SECURITY.turn();
    let _rule = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: outside, namespace: bar}
spec: {host: httpbin.legacy.svc.cluster.local, exportTo: [.], trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}
",
    );
    let path = "/get?mutual-tls-to-plaintext";
    let answer = mesh.curl("bar/curl", &[&format!("http://httpbin.legacy:8000{path}")]);
    assert_eq!(answer.status, 503, "{answer:?}");
    eventually("the flag in the log", || {
        let log = mesh.logs("bar/curl", "istio-proxy");
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(path)).collect();
        if lines.iter().any(|line| line.contains("\" 503 ") && line.contains("UF upstream_reset")) {
            Ok(())
        } else {
            Err(lines.join("\n"))
        }
    });
}
