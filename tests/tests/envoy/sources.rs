//! Where configuration comes from: watched files, and a control plane.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use testkit::{Client, eventually};

use crate::backend::Backend;
use crate::filters::{address, bootstrap, cluster, hcm, listener, typed};
use crate::standalone::{Pair, Standalone};

/// Replaces a file as watchers expect: by a rename.
pub(crate) fn put(dir: &Path, name: &str, resources: &[Value]) {
    let text =
        json!({ "version_info": "1", "resources": resources }).to_string().replace("@DIR@", dir.to_str().unwrap());
    let fresh = dir.join(format!(".{name}.new"));
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(&fresh, dir.join(name)).unwrap();
}

pub(crate) fn with_type(kind: &str, mut resource: Value) -> Value {
    resource["@type"] = format!("type.googleapis.com/{kind}").into();
    resource
}

pub(crate) fn file(name: &str) -> Value {
    json!({ "resource_api_version": "V3", "path_config_source": { "path": format!("@DIR@/{name}") } })
}

const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const LISTENER: &str = "envoy.config.listener.v3.Listener";
const ROUTES: &str = "envoy.config.route.v3.RouteConfiguration";
const ENDPOINTS: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";
pub(crate) const SECRET: &str = "envoy.extensions.transport_sockets.tls.v3.Secret";

fn listeners() -> Vec<Value> {
    let more = json!({ "rds": { "route_config_name": "routes", "config_source": file("rds.yaml") } });
    let mut manager = hcm(&[], &json!([]), &more);
    manager["typed_config"].as_object_mut().unwrap().remove("route_config");
    let mut secure = listener("secure", std::slice::from_ref(&manager));
    secure["filter_chains"][0]["transport_socket"] = json!({ "name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": { "tls_certificate_sds_secret_configs": [{ "name": "pair", "sds_config": file("sds.yaml") }] } } });
    vec![with_type(LISTENER, listener("http", &[manager])), with_type(LISTENER, secure)]
}

fn clusters() -> Vec<Value> {
    vec![with_type(
        CLUSTER,
        json!({ "name": "eds", "type": "EDS", "connect_timeout": "1s", "eds_cluster_config": { "eds_config": file("eds.yaml") } }),
    )]
}

fn endpoints(at: SocketAddr) -> Vec<Value> {
    vec![with_type(
        ENDPOINTS,
        json!({ "cluster_name": "eds", "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(at) } }] }] }),
    )]
}

fn routes(prefix: &str) -> Vec<Value> {
    vec![with_type(
        ROUTES,
        json!({ "name": "routes", "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [
        { "match": { "prefix": prefix }, "route": { "cluster": "eds" } }] }] }),
    )]
}

fn secret(pair: &rcgen::CertifiedKey<rcgen::KeyPair>) -> Vec<Value> {
    vec![with_type(
        SECRET,
        json!({ "name": "pair", "tls_certificate": {
        "certificate_chain": { "inline_string": pair.cert.pem() }, "private_key": { "inline_string": pair.signing_key.serialize_pem() } } }),
    )]
}

#[test]
fn every_kind_of_resource_follows_its_file() {
    let (one, two) = (Backend::echo("one"), Backend::echo("two"));
    let make = || rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    let (old, new) = (make(), make());
    let bootstrap = json!({
        "node": { "id": "me", "cluster": "us" },
        "admin": { "address": address("127.0.0.1:0".parse().unwrap()) },
        "dynamic_resources": { "lds_config": file("lds.yaml"), "cds_config": file("cds.yaml") },
    });
    let pair = Pair::with_files(&bootstrap.to_string(), |dir| {
        put(dir, "lds.yaml", &listeners());
        put(dir, "cds.yaml", &clusters());
        put(dir, "eds.yaml", &endpoints(one.address));
        put(dir, "rds.yaml", &routes("/"));
        put(dir, "sds.yaml", &secret(&old));
    });
    for proxy in pair.both() {
        let dir = proxy.dir.path();
        let get = |path: &str| {
            let mut client = Client::plain(proxy.listener("http")).map_err(|error| error.to_string())?;
            let answer = client.send("GET", "a.example", path, &[]).map_err(|error| error.to_string())?;
            Ok::<_, String>((answer.status, answer.json()["by"].as_str().unwrap_or_default().to_owned()))
        };
        let soon = |what: &str, path: &str, expect: (u16, &str)| {
            eventually(&format!("{}: {what}", proxy.kind), || {
                let (status, by) = get(path)?;
                if (status, by.as_str()) == expect { Ok(()) } else { Err(format!("{status} {by}\n{}", proxy.log())) }
            });
        };
        soon("the first state", "/x", (200, "one"));
        let tls = |root: &[u8]| {
            Client::tls(proxy.listener("secure"), "a.example", root).map(|_| ()).map_err(|error| error.to_string())
        };
        eventually("the first certificate", || tls(old.cert.der()));
        put(dir, "eds.yaml", &endpoints(two.address));
        soon("another endpoint", "/x", (200, "two"));
        put(dir, "rds.yaml", &routes("/only"));
        soon("another route", "/x", (404, ""));
        soon("another route", "/only/x", (200, "two"));
        put(dir, "sds.yaml", &secret(&new));
        eventually(&format!("{}: another certificate", proxy.kind), || tls(new.cert.der()));
        assert!(tls(old.cert.der()).is_err(), "{}", proxy.kind);
        // What is no good leaves what is there.
        let broken = json!({ "name": "routes", "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [
            { "match": { "safe_regex": { "regex": "(" } }, "route": { "cluster": "eds" } }] }] });
        put(dir, "rds.yaml", &[with_type(ROUTES, broken)]);
        std::fs::write(dir.join(".broken"), "{").unwrap();
        std::fs::rename(dir.join(".broken"), dir.join("eds.yaml")).unwrap();
        let mut all = clusters();
        all.push(with_type(CLUSTER, cluster("more", &[one.address])));
        put(dir, "cds.yaml", &all);
        eventually(&format!("{}: one more cluster", proxy.kind), || {
            let page = proxy.page("/clusters");
            if page.contains("more::") { Ok(()) } else { Err(page) }
        });
        assert_eq!(get("/only/x").unwrap(), (200, "two".to_owned()), "{}", proxy.kind);
        put(dir, "lds.yaml", &listeners()[..1]);
        eventually(&format!("{}: one listener less", proxy.kind), || {
            let page = proxy.page("/listeners");
            if page.contains("secure::") { Err(page) } else { Ok(()) }
        });
        assert_eq!(get("/only/x").unwrap().0, 200, "{}", proxy.kind);
        // What is named stays, though its file has nothing any more; clusters and listeners are gone with theirs.
        for name in ["eds.yaml", "rds.yaml", "sds.yaml"] {
            put(dir, name, &[]);
        }
        put(dir, "cds.yaml", &clusters());
        eventually(&format!("{}: one cluster less", proxy.kind), || {
            let page = proxy.page("/clusters");
            if page.contains("more::") { Err(page) } else { Ok(()) }
        });
        assert_eq!(get("/only/x").unwrap(), (200, "two".to_owned()), "{}", proxy.kind);
        // Envoy takes a mistyped file as one without resources.
        if proxy.kind == "lateen" {
            std::fs::write(dir.join(".mistyped"), "version_info: '2'\nresource: []\n").unwrap();
            std::fs::rename(dir.join(".mistyped"), dir.join("lds.yaml")).unwrap();
            eventually(
                "it is told",
                || if proxy.log().contains("DiscoveryResponse") { Ok(()) } else { Err(proxy.log()) },
            );
            assert_eq!(get("/only/x").unwrap().0, 200);
        }
        put(dir, "lds.yaml", &[]);
        eventually(&format!("{}: no listener", proxy.kind), || {
            let page = proxy.page("/listeners");
            if page.contains("http::") { Err(page) } else { Ok(()) }
        });
    }
}

/// A certificate is replaced in its own files; the file of the secret that names them stays as it is.
#[test]
fn files_that_a_secret_names_are_followed() {
    let make = || rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    let (old, new) = (make(), make());
    let mut secure = listeners().remove(1);
    secure.as_object_mut().unwrap().remove("@type");
    secure["filter_chains"][0]["filters"] = json!([hcm(&[], &json!([]), &json!({}))]);
    let replace = |dir: &Path, pair: &rcgen::CertifiedKey<rcgen::KeyPair>| {
        for (name, text) in [("chain.pem", pair.cert.pem()), ("key.pem", pair.signing_key.serialize_pem())] {
            std::fs::write(dir.join(".new"), text).unwrap();
            std::fs::rename(dir.join(".new"), dir.join(name)).unwrap();
        }
    };
    let path = |name: &str| json!({ "filename": format!("@DIR@/{name}") });
    let named = json!({ "name": "pair", "tls_certificate": { "certificate_chain": path("chain.pem"), "private_key": path("key.pem") } });
    let pair = Pair::with_files(&bootstrap(&[secure], &[]), |dir| {
        replace(dir, &old);
        put(dir, "sds.yaml", &[with_type(SECRET, named.clone())]);
    });
    for proxy in pair.both() {
        let tls = |root: &[u8]| {
            Client::tls(proxy.listener("secure"), "a.example", root).map(|_| ()).map_err(|error| error.to_string())
        };
        eventually(&format!("{}: the first certificate", proxy.kind), || tls(old.cert.der()));
        replace(proxy.dir.path(), &new);
        eventually(&format!("{}: another certificate", proxy.kind), || tls(new.cert.der()));
        assert!(tls(old.cert.der()).is_err(), "{}", proxy.kind);
    }
}

/// A control plane over a folder of objects.
struct Plane {
    child: Child,
    dir: tempfile::TempDir,
    plaintext: SocketAddr,
    monitoring: SocketAddr,
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Plane {
    fn start(objects: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("objects")).unwrap();
        let out = dir.path().join("addresses");
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(testkit::mesh::lateen());
        command.args(["discovery", "-f"]).arg(dir.path().join("objects"));
        command.arg("--ca-dir").arg(dir.path().join("ca")).arg("--addresses-out").arg(&out);
        for role in ["--listen", "--plaintext", "--monitoring"] {
            command.args([role, "127.0.0.1:0"]);
        }
        put_text(&dir.path().join("objects"), objects);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut plane = Self { child, dir, plaintext: nowhere, monitoring: nowhere };
        let addresses: Value = eventually("the control plane's addresses", || {
            let text = std::fs::read_to_string(&out).map_err(|error| format!("{error}: {}", plane.log()))?;
            serde_json::from_str(&text).map_err(|error| error.to_string())
        });
        let of = |role: &str| addresses[role][0].as_str().unwrap().parse().unwrap();
        (plane.plaintext, plane.monitoring) = (of("plaintext"), of("monitoring"));
        plane
    }

    fn put(&self, objects: &str) {
        put_text(&self.dir.path().join("objects"), objects);
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// What it knows of each proxy that is connected.
    fn proxies(&self) -> Value {
        Client::plain(self.monitoring).unwrap().send("GET", "x", "/debug/syncz", &[]).unwrap().json()
    }
}

/// Replaces the objects as watchers expect: by a rename.
fn put_text(dir: &Path, objects: &str) {
    std::fs::write(dir.join(".new"), objects).unwrap();
    std::fs::rename(dir.join(".new"), dir.join("objects.yaml")).unwrap();
}

/// A gateway that listens on this port, for a service at `backend`.
fn edge(port: u16, backend: SocketAddr, path: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: edge, namespace: foo}}
spec: {{selector: {{app: edge}}, servers: [{{port: {{number: {port}, name: http, protocol: HTTP}}, bind: 127.78.0.1, hosts: ['*']}}]}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: back, namespace: foo}}
spec:
  hosts: [back.test]
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: [{{address: {}, ports: {{http: {}}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: edge, namespace: foo}}
spec: {{hosts: ['*'], gateways: [edge], http: [{{match: [{{uri: {{prefix: {path}}}}}], route: [{{destination: {{host: back.test}}}}]}}]}}
",
        backend.ip(),
        backend.port(),
    )
}

/// Everything comes from a control plane; with TLS, this name must be that of its certificate.
fn from_plane(api_type: &str, at: SocketAddr, tls: Option<(&str, &str)>) -> String {
    let mut plane = cluster("plane", &[at]);
    let http2 = json!({ "explicit_http_config": { "http2_protocol_options": {} } });
    let options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    plane["typed_extension_protocol_options"] = json!({ options: typed("", options, http2)["typed_config"] });
    if let Some((name, root)) = tls {
        let kind = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
        let context = json!({ "sni": name, "common_tls_context": {
            "alpn_protocols": ["h2"],
            "validation_context": { "trusted_ca": { "inline_string": root } },
        } });
        plane["transport_socket"] = typed("envoy.transport_sockets.tls", kind, context);
    }
    let ads = json!({ "ads": {}, "resource_api_version": "V3" });
    json!({
        "node": {
            "id": "router~127.0.0.1~edge.foo~foo.svc.cluster.local", "cluster": "edge.foo",
            "metadata": { "NAMESPACE": "foo", "LABELS": { "app": "edge" } },
        },
        "admin": { "address": address("127.0.0.1:0".parse().unwrap()) },
        "dynamic_resources": {
            "ads_config": {
                "api_type": api_type, "transport_api_version": "V3", "set_node_on_first_message_only": true,
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "plane" } }],
            },
            "lds_config": ads, "cds_config": ads,
        },
        "static_resources": { "clusters": [plane] },
    })
    .to_string()
}

/// TLS in front of a control plane that speaks none.
fn in_tls(plane: SocketAddr, pair: &rcgen::CertifiedKey<rcgen::KeyPair>) -> Standalone {
    let relay = typed(
        "envoy.filters.network.tcp_proxy",
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        json!({ "stat_prefix": "plane", "cluster": "plane" }),
    );
    let mut front = listener("front", &[relay]);
    front["filter_chains"][0]["transport_socket"] = typed(
        "envoy.transport_sockets.tls",
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        json!({ "common_tls_context": { "alpn_protocols": ["h2"], "tls_certificates": [{
            "certificate_chain": { "inline_string": pair.cert.pem() }, "private_key": { "inline_string": pair.signing_key.serialize_pem() },
        }] } }),
    );
    Standalone::start("envoy", &bootstrap(&[front], &[cluster("plane", &[plane])]), |_| {})
}

/// Each type comes from where the bootstrap says, and nothing else is asked for.
#[test]
fn listeners_of_a_file_lead_to_clusters_of_a_control_plane() {
    let back = Backend::echo("back");
    let port = TcpListener::bind("127.78.0.1:0").unwrap().local_addr().unwrap().port();
    let plane = Plane::start(&edge(port, back.address, "/"));
    let to_back = json!([{ "match": { "prefix": "/" }, "route": { "cluster": "outbound|80||back.test" } }]);
    let own = with_type(LISTENER, listener("own", &[hcm(&[], &to_back, &json!({}))]));
    for kind in ["envoy", "lateen"] {
        let mut bootstrap: Value = serde_json::from_str(&from_plane("GRPC", plane.plaintext, None)).unwrap();
        bootstrap["dynamic_resources"]["lds_config"] = file("lds.yaml");
        let proxy =
            Standalone::start(kind, &bootstrap.to_string(), |dir| put(dir, "lds.yaml", std::slice::from_ref(&own)));
        eventually(&format!("{kind}: the cluster"), || {
            let ask = || Client::plain(proxy.listener("own"))?.send("GET", "a.test", "/", &[]);
            let answer = ask().map_err(|error| error.to_string())?;
            if answer.status == 200 { Ok(()) } else { Err(format!("{answer:?}\n{}", proxy.log())) }
        });
        let page = proxy.page("/listeners");
        assert!(!page.contains(&format!(":{port}")), "{kind}: {page}");
    }
}

#[test]
fn a_bootstrap_that_names_a_control_plane_follows_it() {
    const NAME: &str = "plane.test";
    let (one, two) = (Backend::echo("one"), Backend::echo("two"));
    let port = TcpListener::bind("127.78.0.1:0").unwrap().local_addr().unwrap().port();
    let plane = Plane::start(&edge(port, one.address, "/"));
    let pair = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    let root = pair.cert.pem();
    let front = in_tls(plane.plaintext, &pair);
    let secure = front.listener("front");
    for (kind, api_type, is_secure) in [
        ("envoy", "GRPC", false),
        ("lateen", "GRPC", false),
        ("lateen", "DELTA_GRPC", false),
        ("envoy", "DELTA_GRPC", true),
        ("lateen", "GRPC", true),
        ("lateen", "DELTA_GRPC", true),
    ] {
        let what = format!("{kind}, {api_type}, {}", if is_secure { "TLS" } else { "plaintext" });
        plane.put(&edge(port, one.address, "/"));
        let (at, tls) = if is_secure { (secure, Some((NAME, root.as_str()))) } else { (plane.plaintext, None) };
        let proxy = Standalone::start(kind, &from_plane(api_type, at, tls), |_| {});
        let soon = |path: &str, expect: (u16, &str)| {
            eventually(&format!("{what}: {expect:?}"), || {
                let ask = || Client::plain(SocketAddr::from(([127, 78, 0, 1], port)))?.send("GET", "a.test", path, &[]);
                let answer = ask().map_err(|error| format!("{error}\n{}", proxy.log()))?;
                let by = answer.json()["by"].as_str().unwrap_or_default().to_owned();
                if (answer.status, by.as_str()) == expect { Ok(()) } else { Err(format!("{answer:?}")) }
            });
        };
        soon("/x", (200, "one"));
        // Other endpoints, then other routes, then another listener.
        plane.put(&edge(port, two.address, "/"));
        soon("/x", (200, "two"));
        plane.put(&edge(port, two.address, "/only"));
        soon("/x", (404, ""));
        soon("/only/x", (200, "two"));
        let proxies = plane.proxies();
        let [known] = proxies.as_array().map_or(&[][..], Vec::as_slice) else { panic!("{what}: {proxies:#}") };
        assert_eq!(known["refused"], json!([]), "{what}: {known:#}");
        let dump = proxy.page("/config_dump");
        assert!(dump.contains("dynamic_listeners") && dump.contains("outbound|80||back.test"), "{what}: {dump}");
        plane.put(&edge(port, two.address, "/").replace("app: edge", "app: other"));
        eventually(&format!("{what}: no listener is left"), || {
            let page = proxy.page("/listeners");
            if page.contains(&format!(":{port}")) { Err(page) } else { Ok(()) }
        });
        drop(proxy);
        eventually(&format!("{what}: it is gone"), || {
            let proxies = plane.proxies();
            if proxies == json!([]) { Ok(()) } else { Err(proxies.to_string()) }
        });
    }
    // Whoever is not the plane by its certificate tells nothing.
    let other = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap().cert.pem();
    for (name, root) in [(NAME, other.as_str()), ("else.test", root.as_str())] {
        plane.put(&edge(port, one.address, "/"));
        let before = broken_handshakes(&front);
        let proxy = Standalone::spawn("lateen", &from_plane("DELTA_GRPC", secure, Some((name, root))), &[], |_| {});
        eventually("the handshake is given up", || {
            let now = broken_handshakes(&front);
            if now > before { Ok(()) } else { Err(format!("{now}, as before\n{}", proxy.log())) }
        });
        assert_eq!((plane.proxies(), proxy.ask("GET", "/ready").unwrap().status), (json!([]), 503), "{name}");
    }
}

/// How many clients of an Envoy gave a handshake up.
fn broken_handshakes(front: &Standalone) -> u64 {
    let page = front.page("/stats?filter=ssl.connection_error");
    page.lines().filter_map(|line| line.rsplit_once(": ")?.1.parse::<u64>().ok()).sum()
}

#[test]
fn flags_stand_over_the_bootstrap() {
    let bootstrap = json!({ "admin": { "address": address("127.0.0.1:0".parse().unwrap()) }, "node": { "id": "me", "cluster": "us" } });
    for kind in ["envoy", "lateen"] {
        let proxy = Standalone::start(kind, &bootstrap.to_string(), |_| {});
        let info = proxy.json("/server_info");
        assert_eq!(info["node"]["id"], "me", "{kind}");
        assert_eq!(info["command_line_options"]["concurrency"], 1, "{kind}: {info:#}");
    }
}
