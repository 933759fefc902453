//! Where configuration comes from: watched files, and a control plane.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};
use testkit::{Client, eventually};

use crate::backend::Backend;
use crate::filters::{address, cluster, hcm, listener};
use crate::standalone::{Pair, Standalone};

/// Replaces a file as watchers expect: by a rename.
fn put(dir: &Path, name: &str, resources: &[Value]) {
    let text =
        json!({ "version_info": "1", "resources": resources }).to_string().replace("@DIR@", dir.to_str().unwrap());
    let fresh = dir.join(format!(".{name}.new"));
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(&fresh, dir.join(name)).unwrap();
}

fn with_type(kind: &str, mut resource: Value) -> Value {
    resource["@type"] = format!("type.googleapis.com/{kind}").into();
    resource
}

fn file(name: &str) -> Value {
    json!({ "resource_api_version": "V3", "path_config_source": { "path": format!("@DIR@/{name}") } })
}

const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const LISTENER: &str = "envoy.config.listener.v3.Listener";
const ROUTES: &str = "envoy.config.route.v3.RouteConfiguration";
const ENDPOINTS: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";
const SECRET: &str = "envoy.extensions.transport_sockets.tls.v3.Secret";

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
    }
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
