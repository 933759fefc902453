//! TLS whose certificates are files of the proxies' machine: sidecars begin it and gateways end it, of either kind.

use std::path::Path;

use testkit::{Mesh, eventually};

use crate::mesh::{PODS, object, turn, with};

const HOST: &str = "files.foo.test";

/// A certificate for `host` that signed itself, with its key.
fn pair(host: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// Replaces a file as a whole.
fn put(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join("new"), text).unwrap();
    std::fs::rename(folder.join("new"), folder.join(name)).unwrap();
}

/// A gateway's server and, for each gateway, a rule of its callers.
fn objects(folder: &Path) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    let server = format!(
        "mode: MUTUAL, serverCertificate: {}, privateKey: {}, caCertificates: {}",
        at("server.pem"),
        at("server.key"),
        at("client.pem")
    );
    let client = format!(
        "mode: MUTUAL, clientCertificate: {}, privateKey: {}, caCertificates: {}, sni: {HOST}, subjectAltNames: [{HOST}]",
        at("client.pem"),
        at("client.key"),
        at("known.pem")
    );
    let group = "networking.istio.io";
    let mut all = vec![
        object(
            group,
            "Gateway",
            "files",
            &format!(
                "{{selector: {{istio: ingressgateway}}, servers: [{{port: {{number: 443, name: https-files, protocol: HTTPS}}, hosts: [{HOST}], tls: {{{server}}}}}]}}"
            ),
        ),
        object(
            group,
            "VirtualService",
            "files",
            &format!(
                "{{hosts: [{HOST}], gateways: [files], http: [{{route: [{{destination: {{host: lateen, port: {{number: 8000}}}}}}]}}]}}"
            ),
        ),
    ];
    for gateway in PODS {
        let host = format!("gateway-{gateway}.istio-system.svc.cluster.local");
        let rule = format!("{{host: {host}, trafficPolicy: {{tls: {{{client}}}}}}}");
        all.push(object(group, "DestinationRule", &format!("gateway-{gateway}"), &rule));
    }
    all.join("---\n")
}

/// Every sidecar asks every gateway until the answers are as expected.
fn become_known(mesh: &Mesh, what: &str, expect: bool) {
    for from in PODS {
        for gateway in PODS {
            eventually(what, || {
                let url = format!("http://gateway-{gateway}.istio-system:443/status/204");
                let answer = mesh.curl(&format!("foo/{from}"), &["-H", &format!("host: {HOST}"), &url]);
                let is_known = answer.status == 204;
                if is_known == expect { Ok(()) } else { Err(format!("{from} to {gateway}: {answer:?}")) }
            });
        }
    }
}

#[test]
fn certificates_in_files_are_read_and_followed() {
    let mesh = turn();
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| put(folder.path(), name, text);
    let (server, client, next) = (pair(HOST), pair("caller.example"), pair(HOST));
    for (name, text) in [
        ("server.pem", &server.0),
        ("server.key", &server.1),
        ("known.pem", &server.0),
        ("client.pem", &client.0),
        ("client.key", &client.1),
    ] {
        put(name, text);
    }
    let _objects = with(&mesh, &objects(folder.path()));
    become_known(&mesh, "files of the start", true);
    put("known.pem", &next.0);
    become_known(&mesh, "callers who know another server", false);
    put("server.pem", &next.0);
    put("server.key", &next.1);
    become_known(&mesh, "the server that they know", true);
}
