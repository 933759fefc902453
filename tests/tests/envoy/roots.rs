//! The mesh's root is replaced by another one, with another key, while proxies of both kinds talk.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::json;
use testkit::{Mesh, eventually};

use crate::mesh::{HTTP, object, service, workload};
use crate::standalone::envoy;

const PROXIES: [&str; 3] = ["foo/delta", "foo/lateen", "istio-system/istio-ingressgateway"];
/// As it stands in certificates, in the clear.
const NAME: &[u8] = b"the root that comes";

/// All certificates live for twenty seconds, and each request is a handshake of its own.
fn manifests() -> String {
    let mesh = json!({
        "apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator",
        "metadata": {"name": "mesh", "namespace": "istio-system"},
        "spec": {"meshConfig": {"defaultConfig": {"binaryPath": envoy(), "proxyMetadata": {"SECRET_TTL": "20s"}}}},
    });
    let mut all = vec![
        mesh.to_string(),
        "{apiVersion: v1, kind: Namespace, metadata: {name: foo, labels: {istio-injection: enabled}}}".to_owned(),
        object("security.istio.io", "PeerAuthentication", "strict", "{mtls: {mode: STRICT}}"),
        object(
            "networking.istio.io",
            "Gateway",
            "gateway",
            "{selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [\"*.foo.test\"]}]}",
        ),
    ];
    for name in ["delta", "lateen"] {
        all.push(workload("foo", name, "sidecar"));
        all.push(service("foo", name, name, HTTP));
        let fresh =
            format!("{{host: {name}, trafficPolicy: {{connectionPool: {{http: {{maxRequestsPerConnection: 1}}}}}}}}");
        all.push(object("networking.istio.io", "DestinationRule", name, &fresh));
        let route = format!(
            "{{hosts: [{name}.foo.test], gateways: [gateway], http: [{{route: [{{destination: {{host: {name}, port: {{number: 8000}}}}}}]}}]}}"
        );
        all.push(object("networking.istio.io", "VirtualService", name, &route));
    }
    all.join("\n---\n")
}

fn new_root() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, String::from_utf8_lossy(NAME).into_owned());
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// What an operator does: the new signer, and both roots.
fn plug_in(mesh: &Mesh, root: &CertifiedIssuer<'static, KeyPair>) {
    let dir = mesh.state_dir().join("istiod/ca");
    let old = std::fs::read_to_string(dir.join("self-signed/ca-cert.pem")).unwrap();
    for (name, text) in [
        ("root-cert.pem", old + &root.pem()),
        ("cert-chain.pem", root.pem()),
        ("ca-key.pem", root.key().serialize_pem()),
        ("ca-cert.pem", root.pem()),
    ] {
        std::fs::write(dir.join(name), text).unwrap();
    }
}

/// Whether what the proxy shows was signed by the new root.
fn is_renewed(mesh: &Mesh, proxy: &str) -> bool {
    let chain = mesh.certificates(proxy, "default");
    let leaf = chain.first().unwrap_or_else(|| panic!("{proxy} has a certificate"));
    leaf.windows(NAME.len()).any(|bytes| bytes == NAME)
}

/// Asks again and again until `end` exists; the status of each answer.
fn asked(mesh: &Mesh, from: &str, url: &str, end: &Path) -> Vec<String> {
    let script = "until [ -e \"$1\" ]; do curl -s -o /dev/null --max-time 30 -w '%{http_code}\\n' \"$0\"; done";
    let output = mesh.exec(from, &["bash", "-c", script, url, end.to_str().unwrap()]);
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn another_root_is_passed_on_and_takes_over_under_load_without_a_failed_request() {
    let mesh = Mesh::up("roots", &manifests());
    for proxy in PROXIES {
        assert_eq!(mesh.certificates(proxy, "ROOTCA").len(), 1, "{proxy}");
        assert!(!is_renewed(&mesh, proxy), "{proxy}");
    }
    let folder = tempfile::tempdir().unwrap();
    let end = folder.path().join("end");
    std::thread::scope(|scope| {
        let ways = [("foo/delta", "http://lateen:8000/status/200"), ("foo/lateen", "http://delta:8000/status/200")];
        let load = ways.map(|(from, url)| {
            let (mesh, end) = (&mesh, &end);
            (from, scope.spawn(move || asked(mesh, from, url, end)))
        });
        let outside = scope.spawn(|| {
            let mut count = 0;
            while !end.exists() {
                for name in ["delta", "lateen"] {
                    let answer = mesh.get(&format!("{name}.foo.test"), "/status/200", &[]);
                    assert_eq!(answer.status, 200, "from outside to {name}: {answer:?}");
                    count += 1;
                }
            }
            count
        });
        let rotation = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            plug_in(&mesh, &new_root());
            eventually("every proxy's certificate to be the new root's", || {
                let renewed = PROXIES.map(|proxy| is_renewed(&mesh, proxy));
                // Nobody shows what somebody could not know: the new root reached all before it signed.
                if renewed.contains(&true) {
                    for proxy in PROXIES {
                        assert_eq!(mesh.certificates(proxy, "ROOTCA").len(), 2, "{proxy} trusts both");
                    }
                }
                if renewed == [true; 3] { Ok(()) } else { Err(format!("{renewed:?} of {PROXIES:?}")) }
            });
        }));
        std::fs::write(&end, "").unwrap();
        for (from, load) in load {
            let answers = load.join().unwrap();
            let failed: Vec<&String> = answers.iter().filter(|answer| *answer != "200").collect();
            assert!(failed.is_empty() && answers.len() > 20, "{from}: {failed:?} of {}", answers.len());
        }
        assert!(outside.join().unwrap() > 20);
        rotation.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}
