//! Two callers and many called workloads, all with sidecars, and everybody who says what becomes of a call:
//! `explain`, Lateen's sidecars and Envoy's, all three with the very same resources.
//!
//! ```text
//!  test ─ PROXY preamble ─► sidecar of a or b ═ mTLS ═► sidecar of v1 or v2 ─► backend
//!  test (as plain) ─────────────────────────────────────────────▲
//! ```
//!
//! The sidecars run without the kernel's redirection, on loopback addresses. In place of it, and for both kinds of
//! proxy in the same way,
//!
//! - `virtualOutbound` gets a port of its caller's address and reads the original destination from a PROXY preamble,
//!   which both hand to the other listeners, and dial in `PassthroughCluster`, as they do with a redirect's;
//! - `virtualInbound` listens on every port of its pod's address, so that the pods can be dialled as they are;
//! - clusters that would dial the original destination there (`inbound|…`) dial the backend of the pod;
//! - listener and clusters of each called pod get its name, since one process is the sidecar of all of them;
//! - secrets are static: a certificate of the test's own authority for each service account;
//! - Envoy's pods have addresses in a network of their own, and nothing else differs.
//!
//! `explain` reads the resources as they were before. Its own hop from a sidecar to the next is checked with that.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use compile::{Capabilities, View};
use engine::Now;
use explain::{Call, Caller, Explainer, Explanation, Running};
use mesh::MeshSnapshot;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType};
use serde_json::{Value, json};
use testkit::{Client, PATIENCE, Response, TlsClient, TlsServer, eventually};
use types::NamespacedName;
use types::wellknown::type_urls;

use crate::bed::{Process, free_port, of_type, with_endpoints, with_routes};

use super::random::{Case, Http, PORTS, Request, Tls};

/// Pods of each namespace that is called, and where their applications are.
const BACKENDS: [(&str, Ipv4Addr); 2] = [("v1", Ipv4Addr::new(127, 0, 0, 2)), ("v2", Ipv4Addr::new(127, 0, 0, 3))];
/// Who has a sidecar and calls: name, namespace, more labels.
const CALLERS: [(&str, &str, &str); 2] = [("a", "ca", ", tier: front"), ("b", "cb", "")];
/// Services with addresses of their own.
const SERVICES: [&str; 3] = ["server", "other", "unnamed"];
/// The namespace that tells that all that came before is logged.
const MARKER: usize = 255;
/// The source port of the first call; the others follow.
const FIRST_PORT: usize = 20_000;

/// Columns of the access log.
const COLUMNS: [(&str, &str); 15] = [
    ("", "L"),
    ("", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("", "%REQ(USER-AGENT)%"),
    ("code", "%RESPONSE_CODE%"),
    ("flags", "%RESPONSE_FLAGS%"),
    ("details", "%RESPONSE_CODE_DETAILS%"),
    ("termination", "%CONNECTION_TERMINATION_DETAILS%"),
    ("upstream host", "%UPSTREAM_HOST%"),
    ("cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("route", "%ROUTE_NAME%"),
    ("server name", "%REQUESTED_SERVER_NAME%"),
    ("peer", "%DOWNSTREAM_PEER_URI_SAN%"),
    ("local address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("chain", "%FILTER_CHAIN_NAME%"),
];

/// The networks of services, of Lateen's pods and of Envoy's, in all likelihood this process's own. Ports are free in
/// both of the latter.
fn network(kind: &str) -> u8 {
    let own = u8::try_from(std::process::id() % 79).unwrap();
    match kind {
        "service" => 1 + own,
        "lateen" => 80 + own,
        _ => 160 + own,
    }
}

/// An address: of a caller (0), or in the namespace with this number.
fn address(kind: &str, namespace: usize, number: usize) -> Ipv4Addr {
    let byte = |number: usize| u8::try_from(number).unwrap();
    Ipv4Addr::new(127, network(kind), byte(namespace), byte(number))
}

fn number_of<'a>(names: impl IntoIterator<Item = &'a str>, name: &str) -> usize {
    1 + names.into_iter().position(|have| have == name).unwrap_or_else(|| panic!("nobody is {name}"))
}

fn caller_address(kind: &str, name: &str) -> Ipv4Addr {
    address(kind, 0, number_of(CALLERS.iter().map(|caller| caller.0), name))
}

fn pod_address(kind: &str, namespace: usize, pod: &str) -> Ipv4Addr {
    address(kind, namespace, number_of(BACKENDS.iter().map(|backend| backend.0), pod))
}

/// A Service's ClusterIP: nobody listens there, and what is passed through to it stays on this machine.
fn service_address(namespace: usize, service: &str) -> Ipv4Addr {
    address("service", namespace, number_of(SERVICES, service))
}

/// Ports of the called pods by what they are for.
#[derive(Clone, Debug)]
struct Ports(BTreeMap<&'static str, u16>);

impl Ports {
    fn some() -> Self {
        Self(PORTS.iter().zip(8080..).map(|(name, port)| (*name, port)).collect())
    }

    fn of(&self, name: &str) -> u16 {
        self.0.get(name).copied().unwrap_or_else(|| panic!("no port is for {name}"))
    }

    /// A text with numbers in place of names.
    fn show(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, (name, port)| text.replace(&format!("@{name}@"), &port.to_string()))
    }
}

/// What all cases share: backends, an authority, settings of the mesh, a folder.
pub(crate) struct Bed {
    seed: u64,
    ports: Ports,
    authority: CertifiedIssuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

/// Without redirection by the kernel, Envoy must not find an original destination by itself: where a firewall follows
/// connections, it finds the address that was dialled.
fn assert_no_tracking() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let found = socket2::SockRef::from(&server).original_dst_v4();
    assert!(found.is_err(), "this network follows connections on loopback (conntrack): run in a network of its own");
}

/// The documents of a case.
fn text(case: &Case, namespace: usize, ports: &Ports) -> String {
    let documents: Vec<String> = case.objects.iter().map(ToString::to_string).collect();
    ports.show(&documents.join("\n---\n").replace("@NS@", &format!("c{namespace}")))
}

/// The objects of a case as a person reads them.
pub(crate) fn shown(case: &Case) -> String {
    text(case, 1, &Ports::some())
}

fn pod(namespace: &str, name: &str, labels: &str, ip: Ipv4Addr, has_sidecar: bool) -> String {
    let tls = if has_sidecar { ", security.istio.io/tlsMode: istio" } else { "" };
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}{tls}}}}}\nspec: {{serviceAccountName: {name}, containers: [{{name: a, image: a}}]}}\nstatus: {{phase: Running, podIP: {ip}, conditions: [{{type: Ready, status: 'True'}}]}}\n"
    )
}

fn service(namespace: usize, name: &str, version: &str, ports: &str) -> String {
    let address =
        if SERVICES.contains(&name) { service_address(namespace, name).to_string() } else { "None".to_owned() };
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: c{namespace}}}\nspec: {{clusterIP: {address}, selector: {{version: {version}}}, ports: [{ports}]}}\n"
    )
}

/// Pods and services of a namespace that is called.
fn called(namespace: usize) -> String {
    let ports = "{name: http, port: 80, targetPort: @http@}, {name: tcp, port: 9000, targetPort: @tcp@}, {name: tls, port: 8443, targetPort: @tls@}";
    let mut all: String = BACKENDS
        .iter()
        .map(|(name, _)| {
            let ip = pod_address("lateen", namespace, name);
            pod(&format!("c{namespace}"), name, &format!("app: server, version: {name}"), ip, true)
        })
        .collect();
    all.push_str(&service(namespace, "server", "v1", ports));
    all.push_str(&service(namespace, "other", "v2", ports));
    all.push_str(&service(namespace, "unnamed", "v1", "{port: 7000, targetPort: @auto@}"));
    all.push_str(&service(namespace, "headless", "v1", "{name: tcp-own, port: @tcp@}"));
    all
}

impl Bed {
    /// Settings of the mesh follow the seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        Self {
            seed,
            ports: Ports(PORTS.into_iter().map(|name| (name, port_with_backends())).collect()),
            authority: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap(),
            dir: tempfile::Builder::new().prefix("lt-").tempdir().unwrap(),
        }
    }

    /// The mesh without its cases.
    fn base(&self) -> String {
        let format: Vec<&str> = COLUMNS.iter().map(|(_, column)| *column).collect();
        let format = format.join("\\t");
        let is_auto = !self.seed.is_multiple_of(5);
        let policy = if self.seed.is_multiple_of(3) { "REGISTRY_ONLY" } else { "ALLOW_ANY" };
        let mut all = format!(
            r#"
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {{name: mesh, namespace: istio-system}}
spec:
  meshConfig:
    accessLogFile: /dev/stdout
    accessLogFormat: "{format}\n"
    enableAutoMtls: {is_auto}
    outboundTrafficPolicy: {{mode: {policy}}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: open, namespace: c{MARKER}}}
spec: {{mtls: {{mode: PERMISSIVE}}}}
"#
        );
        if self.seed % 4 == 2 {
            all.push_str("---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n");
        }
        for (name, namespace, labels) in CALLERS {
            all.push_str(&pod(namespace, name, &format!("app: {name}{labels}"), caller_address("lateen", name), true));
        }
        all.push_str(&pod("legacy", "plain", "app: plain", Ipv4Addr::LOCALHOST, false));
        all.push_str(&called(MARKER));
        all
    }

    /// Whether the API server would take the objects of a case.
    pub(crate) fn is_valid(case: &Case) -> bool {
        !api::parse_documents("case.yaml", &text(case, 1, &Ports::some())).has_errors()
    }

    /// Compiles cases, each with the number of its namespace; those with equal objects may share one.
    pub(crate) fn compile(&self, cases: &[(usize, &Case)]) -> Compiled {
        let mut yaml = self.base();
        let mut seen = BTreeSet::new();
        for (namespace, case) in cases {
            if seen.insert(*namespace) {
                yaml.push_str(&called(*namespace));
                if !case.objects.is_empty() {
                    yaml.push_str(&format!("---\n{}\n", text(case, *namespace, &self.ports)));
                }
            }
        }
        let documents = api::parse_documents("cases.yaml", &self.ports.show(&yaml));
        assert!(!documents.has_errors(), "{:#?}", documents.findings);
        let objects = api::ConfigSet::new(documents.objects.into_iter().map(|parsed| parsed.object));
        let (snapshot, _) = MeshSnapshot::next(None, &objects);
        let with_sidecar = || snapshot.workloads().values().filter(|workload| &*workload.namespace != "legacy");
        let proxies = with_sidecar().map(|workload| (workload.key().to_string(), Resources::of(&snapshot, workload)));
        let proxies = proxies.collect();
        let identity = |workload: &mesh::Workload| self.identity(&workload.namespace, &workload.service_account);
        let identities = with_sidecar().map(|workload| (workload.key().to_string(), identity(workload))).collect();
        Compiled { ports: self.ports.clone(), proxies, identities, snapshot }
    }

    /// A certificate of the mesh, with its key, in PEM.
    fn identity(&self, namespace: &str, account: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let id = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.use_authority_key_identifier_extension = true;
        (params.signed_by(&key, &self.authority).unwrap().pem(), key.serialize_pem())
    }
}

/// One port on which the application of every pod listens, and which is free on the pods' addresses.
fn port_with_backends() -> u16 {
    eventually("a port that all pods can have", || {
        let port = free_port(BACKENDS[0].1);
        let bind = |ip: Ipv4Addr| TcpListener::bind((ip, port)).map_err(|error| error.to_string());
        for kind in ["lateen", "envoy"] {
            for (name, _) in BACKENDS {
                drop(bind(pod_address(kind, 1, name))?);
            }
        }
        let listeners = BACKENDS.iter().map(|(name, ip)| bind(*ip).map(|listener| (*name, listener)));
        for (name, listener) in listeners.collect::<Result<Vec<_>, _>>()? {
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    std::thread::spawn(move || application(name, port, stream));
                }
            });
        }
        Ok(port)
    })
}

/// Takes TLS or none, HTTP or a line of bytes, and answers with what it got.
fn application(name: &str, port: u16, stream: TcpStream) -> Option<()> {
    static TLS: OnceLock<TlsServer> = OnceLock::new();
    stream.set_nodelay(true).ok()?;
    let mut first = [0];
    // A handshake begins with 22.
    if stream.peek(&mut first).ok()? == 0 || first[0] != 22 {
        return answers(name, port, &Value::Null, stream);
    }
    let stream = TLS.get_or_init(|| TlsServer::new("server.test", &["http/1.1"])).accept(stream).ok()?;
    let alpn = String::from_utf8_lossy(stream.conn.alpn_protocol().unwrap_or_default()).into_owned();
    let tls = json!({ "server name": stream.conn.server_name().unwrap_or_default(), "alpn": alpn });
    answers(name, port, &tls, stream)
}

fn answers(name: &str, port: u16, tls: &Value, stream: impl Read + Write) -> Option<()> {
    let mut input = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if input.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let words: Vec<&str> = line.trim_end().split(' ').collect();
        let mut told = json!({ "backend": name, "port": port, "tls": tls });
        let [method, path, "HTTP/1.1"] = words[..] else {
            told["line"] = line.trim_end().into();
            input.get_mut().write_all(format!("{told}\n").as_bytes()).ok()?;
            continue;
        };
        let mut headers: Vec<(String, String)> = Vec::new();
        loop {
            let mut line = String::new();
            input.read_line(&mut line).ok()?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        (told["method"], told["path"], told["headers"]) = (method.into(), path.into(), json!(headers));
        let body = told.to_string();
        let answer = format!("HTTP/1.1 200 X\r\nx-backend: {name}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        input.get_mut().write_all(answer.as_bytes()).ok()?;
    }
}

/// What one sidecar is told, with endpoints and routes in their places.
struct Resources {
    clusters: Vec<Value>,
    listeners: Vec<Value>,
}

impl Resources {
    fn of(snapshot: &MeshSnapshot, workload: &mesh::Workload) -> Self {
        let view = View {
            labels: workload.labels.clone(),
            service_account: workload.service_account.clone(),
            workload_name: workload.workload_name.clone(),
            capabilities: Capabilities::NONE,
            ..View::sidecar(&workload.namespace, &workload.name, workload.ips[0])
        };
        let packed = compile::compile(snapshot, &view).packed();
        let (endpoints, routes) = (of_type(&packed, type_urls::ENDPOINT), of_type(&packed, type_urls::ROUTE));
        let mut clusters: Vec<Value> = of_type(&packed, type_urls::CLUSTER).into_values().collect();
        clusters.iter_mut().for_each(|cluster| with_endpoints(cluster, &endpoints));
        let mut listeners: Vec<Value> = of_type(&packed, type_urls::LISTENER).into_values().collect();
        listeners.iter_mut().for_each(|listener| with_routes(listener, &routes));
        // Whoever calls is not called, and the other way round.
        let is_caller = CALLERS.iter().any(|(_, namespace, _)| **namespace == *workload.namespace);
        clusters.retain(|cluster| cluster["name"] == "BlackHoleCluster" || is_inbound(&cluster["name"]) != is_caller);
        listeners.retain(|listener| (listener["name"] == "virtualInbound") != is_caller);
        Self { clusters, listeners }
    }
}

/// Cases, compiled.
pub(crate) struct Compiled {
    ports: Ports,
    snapshot: MeshSnapshot,
    /// By namespace and name of the pod.
    proxies: BTreeMap<String, Resources>,
    /// Certificate and key of each pod.
    identities: BTreeMap<String, (String, String)>,
}

/// Secrets by the agent made static ones, the workload's own under `own`.
fn with_static_secrets(value: &mut Value, own: &str) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields.iter_mut() {
                match &**name {
                    "tls_certificate_sds_secret_configs" => *field = json!([{ "name": own }]),
                    "validation_context_sds_secret_config" => *field = json!({ "name": "ROOTCA" }),
                    _ => with_static_secrets(field, own),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| with_static_secrets(item, own)),
        _ => {}
    }
}

fn is_inbound(name: &Value) -> bool {
    let name = name.as_str().unwrap_or_default();
    (name.starts_with("inbound|") && name.ends_with("||")) || name == "InboundPassthroughCluster"
}

/// Names of inbound clusters with the pod's behind them.
fn with_pod(value: &mut Value, pod: &str) {
    if is_inbound(value) {
        *value = format!("{}@{pod}", value.as_str().unwrap_or_default()).into();
    }
    match value {
        Value::Object(fields) => fields.values_mut().for_each(|value| with_pod(value, pod)),
        Value::Array(items) => items.iter_mut().for_each(|item| with_pod(item, pod)),
        _ => {}
    }
}

fn socket_address(ip: Ipv4Addr, port: u16) -> Value {
    json!({ "socket_address": { "address": ip.to_string(), "port_value": port } })
}

fn bootstrap(id: &str, at: Ipv4Addr, parts: (Vec<Value>, Vec<Value>), secrets: Vec<Value>) -> Value {
    let (listeners, clusters) = parts;
    json!({
        "node": { "id": format!("sidecar~{at}~{id}~local"), "cluster": id },
        "admin": { "address": socket_address(at, free_port(at)) },
        "layered_runtime": { "layers": [{ "name": "istio", "static_layer": {
            "envoy.reloadable_features.http_reject_path_with_fragment": false,
        } }] },
        "static_resources": { "listeners": listeners, "clusters": clusters, "secrets": secrets },
    })
}

impl Compiled {
    /// A caller's sidecar; it takes calls on this port.
    fn of_caller(&self, (name, namespace, _): (&str, &str, &str), port: u16, secrets: Vec<Value>) -> Value {
        let own = &self.proxies[&format!("{namespace}/{name}")];
        let at = caller_address("lateen", name);
        let listeners = own.listeners.iter().cloned().map(|mut listener| {
            if listener["name"] == "virtualOutbound" {
                listener["address"] = socket_address(at, port);
                listener["listener_filters"] = json!([{
                    "name": "envoy.filters.listener.proxy_protocol",
                    "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol" },
                }]);
            }
            with_static_secrets(&mut listener, "default");
            listener
        });
        let clusters = own.clusters.iter().cloned().map(|mut cluster| {
            with_static_secrets(&mut cluster, "default");
            cluster
        });
        bootstrap(&format!("{name}.{namespace}"), at, (listeners.collect(), clusters.collect()), secrets)
    }

    /// The sidecar of all called pods.
    fn of_called(&self, secrets: Vec<Value>) -> Value {
        let (mut listeners, mut clusters) = (Vec::new(), BTreeMap::new());
        for (key, own) in &self.proxies {
            let (namespace, name) = key.split_once('/').unwrap();
            let Some((_, backend)) = BACKENDS.iter().find(|(backend, _)| *backend == name) else { continue };
            let ip = pod_address("lateen", namespace[1..].parse().unwrap(), name);
            for cluster in &own.clusters {
                let mut cluster = cluster.clone();
                let cluster_name = cluster["name"].as_str().unwrap().to_owned();
                if cluster["type"] == "ORIGINAL_DST" {
                    let port =
                        cluster_name.split('|').nth(1).map_or(self.ports.of("none"), |port| port.parse().unwrap());
                    let endpoint = json!({ "endpoint": { "address": socket_address(*backend, port) } });
                    cluster["type"] = "STATIC".into();
                    cluster["load_assignment"] =
                        json!({ "cluster_name": cluster_name, "endpoints": [{ "lb_endpoints": [endpoint] }] });
                    for field in ["lb_policy", "cleanup_interval", "original_dst_lb_config"] {
                        cluster.as_object_mut().unwrap().remove(field);
                    }
                }
                with_pod(&mut cluster, key);
                clusters.insert(cluster["name"].as_str().unwrap().to_owned(), cluster);
            }
            let inbound = own.listeners.iter().find(|listener| listener["name"] == "virtualInbound");
            let mut listener = inbound.expect("every sidecar has it").clone();
            listener["name"] = format!("virtualInbound@{key}").into();
            let mut addresses = self.ports.0.values().map(|port| socket_address(ip, *port));
            listener["address"] = addresses.next().unwrap();
            listener["additional_addresses"] = addresses.map(|address| json!({ "address": address })).collect();
            with_pod(&mut listener, key);
            with_static_secrets(&mut listener, key);
            listeners.push(listener);
        }
        let at = address("lateen", 0, 100);
        bootstrap("called.c", at, (listeners, clusters.into_values().collect()), secrets)
    }

    /// What `explain` says, for each case it can know.
    pub(crate) fn explained(&self, cases: &[(usize, &Case)]) -> Vec<Option<Explanation>> {
        let ask = |name: &NamespacedName| {
            let own = &self.proxies[&name.to_string()];
            let entries =
                |list: &[Value], field: &str| -> Vec<Value> { list.iter().map(|one| json!({ field: one })).collect() };
            let dump = json!({ "configs": [
                { "static_clusters": entries(&own.clusters, "cluster") },
                { "static_listeners": entries(&own.listeners, "listener") },
                { "static_secrets": [{ "name": "default" }, { "name": "ROOTCA" }] },
            ] });
            Ok(Running::read(&dump, &Value::Null, &Value::Null).unwrap())
        };
        let explainer = Explainer::of_mesh(&self.snapshot, &ask);
        let explained = cases.iter().map(|(namespace, case)| {
            let explanation = explainer.explain(&self.call(*namespace, &case.request)?);
            assert_eq!(explanation.findings, [], "nothing is refused");
            Some(explanation)
        });
        explained.collect()
    }

    /// The call as `explain` takes it; `None` for TLS as no application speaks it.
    fn call(&self, namespace: usize, request: &Request) -> Option<Call> {
        if request.tls.as_ref().is_some_and(|tls| tls.identity.is_some() || tls.alpn != ["h2", "http/1.1"]) {
            return None;
        }
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let now = Now { mono: Instant::now(), wall_nanos: u64::try_from(wall).unwrap() };
        let caller = CALLERS.iter().find(|(name, ..)| *name == request.from);
        let from = NamespacedName::new(caller.map_or("legacy", |caller| caller.1), &request.from);
        let to = destination("lateen", namespace, request, &self.ports);
        let host = if request.is_direct() {
            to.ip().to_string()
        } else {
            format!("{}.c{namespace}.svc.cluster.local", request.to.0)
        };
        let (scheme, http) = match (&request.tls, &request.http) {
            (Some(_), _) => ("https", None),
            (None, Some(http)) => ("http", Some(http)),
            (None, None) => ("tcp", None),
        };
        let headers: Vec<String> = http.map(|http| headers(namespace, http)).unwrap_or_default();
        let (method, path) = http.map_or(("GET", "/"), |http| (&*http.method, &*http.path));
        let url = format!("{scheme}://{host}:{}{path}", to.port());
        Some(Call::parse(Caller::Workload(from), method, &url, &headers, now).unwrap())
    }
}

/// `name: value`, the host first.
fn headers(namespace: usize, http: &Http) -> Vec<String> {
    let host = http.host.replace("@NS@", &format!("c{namespace}"));
    let more = http.headers.iter().map(|(name, value)| format!("{name}: {value}"));
    std::iter::once(format!("host: {host}")).chain(more).collect()
}

/// Where a call is addressed to.
fn destination(kind: &str, namespace: usize, request: &Request, ports: &Ports) -> SocketAddr {
    let (name, port) = &request.to;
    let port = ports.0.get(port.trim_matches('@')).copied().unwrap_or_else(|| port.parse().unwrap());
    let ip = match &**name {
        "headless" => pod_address(kind, namespace, "v1"),
        pod if request.is_direct() => pod_address(kind, namespace, pod),
        service => service_address(namespace, service),
    };
    SocketAddr::from((ip, port))
}

/// The sidecars of one kind.
pub(crate) struct Live<'a> {
    kind: &'static str,
    compiled: &'a Compiled,
    /// Of `a` and of `b`, each with the port for calls.
    callers: Vec<(Process, u16)>,
    called: Process,
}

/// What one call came to, as the test and both logs tell.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    /// What came back.
    pub(crate) answer: Answer,
    /// The caller's sidecar.
    pub(crate) client: Option<Line>,
    /// The called pod's.
    pub(crate) server: Option<Line>,
}

/// What comes back.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Answer {
    /// Nothing: the connection ends.
    #[default]
    Nothing,
    /// An application's.
    Application(Value),
    /// Some proxy's: status, headers and body.
    Proxy(u16, Vec<(String, String)>, String),
    /// Bytes that are no application's.
    Bytes(String),
}

/// A line of an access log.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Line(Vec<String>);

impl Line {
    /// Every column that is compared.
    pub(crate) fn columns(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all = COLUMNS.iter().zip(&self.0).map(|((name, _), value)| (*name, value.as_str()));
        all.filter(|(name, _)| !name.is_empty())
    }

    /// One of them, with `-` for none.
    pub(crate) fn of(&self, name: &str) -> &str {
        self.columns().find(|(column, _)| *column == name).map_or("", |(_, value)| value)
    }
}

impl<'a> Live<'a> {
    /// Starts Lateen's, or those of the Envoy of this path.
    pub(crate) fn start(envoy: Option<&Path>, compiled: &'a Compiled, bed: &Bed) -> Self {
        let kind = if envoy.is_some() { "envoy" } else { "lateen" };
        if envoy.is_some() {
            assert_no_tracking();
        }
        let ca = json!({ "name": "ROOTCA", "validation_context": { "trusted_ca": { "inline_string": bed.authority.pem() } } });
        let secret = |name: &str, (chain, key): &(String, String)| {
            let pair =
                json!({ "certificate_chain": { "inline_string": chain }, "private_key": { "inline_string": key } });
            json!({ "name": name, "tls_certificate": pair })
        };
        // Nothing but the network differs between the two kinds.
        let of_kind = |bootstrap: &Value| -> Value {
            let network = |kind: &str| format!("\"127.{}.", network(kind));
            serde_json::from_str(&bootstrap.to_string().replace(&network("lateen"), &network(kind))).unwrap()
        };
        let start = |name: &str, bootstrap: &Value| {
            Process::start(&format!("{kind}-{name}"), envoy, &of_kind(bootstrap), bed.dir.path())
        };
        let callers = CALLERS.map(|caller| {
            let (name, namespace, _) = caller;
            let identity = &compiled.identities[&format!("{namespace}/{name}")];
            let secrets = vec![ca.clone(), secret("default", identity)];
            let port = free_port(caller_address(kind, name));
            (start(name, &compiled.of_caller(caller, port, secrets)), port)
        });
        let mut secrets = vec![ca];
        secrets.extend(compiled.identities.iter().map(|(key, identity)| secret(key, identity)));
        let called = start("called", &compiled.of_called(secrets));
        Self { kind, compiled, callers: callers.into(), called }
    }

    /// Makes every call and puts together what came of each.
    pub(crate) fn outcomes(&self, cases: &[(usize, &Case)]) -> Vec<Outcome> {
        let answers: Vec<(Answer, SocketAddr)> = cases
            .iter()
            .enumerate()
            .map(|(at, (namespace, case))| self.call(*namespace, at, &case.request, &format!("case-{at}-")))
            .collect();
        let logs = self.logs();
        let outcome = |(at, (answer, local)): (usize, (Answer, SocketAddr))| {
            let (namespace, Case { request, .. }) = cases[at];
            let source = format!(":{}", FIRST_PORT + at);
            let client = number_of(["a", "b", "plain"], &request.from) - 1;
            let client =
                logs[..2].get(client).and_then(|lines| lines.iter().rfind(|line| line.0[1].ends_with(&source)));
            let agent = format!("case-{at}-");
            // A connection of bytes has no name but its two ends.
            let dialled = || [local, destination("lateen", namespace, request, &self.compiled.ports)];
            let ends = client.map_or_else(
                || dialled().map(|end| end.to_string()),
                |line| [line.0[2].clone(), line.of("upstream host").to_owned()],
            );
            let relayed =
                |line: &&Line| line.0[3] == "-" && line.0[1] == ends[0] && line.of("local address") == ends[1];
            let server = logs[2].iter().rfind(|line| line.0[3] == agent).or_else(|| logs[2].iter().rfind(relayed));
            Outcome { answer, client: client.cloned(), server: server.cloned() }
        };
        answers.into_iter().enumerate().map(outcome).collect()
    }

    /// One call; what came back, and from which address it went out.
    fn call(&self, namespace: usize, at: usize, request: &Request, agent: &str) -> (Answer, SocketAddr) {
        let to = destination(self.kind, namespace, request, &self.compiled.ports);
        let caller = CALLERS.iter().position(|(name, ..)| *name == request.from);
        let proxy = caller.map(|caller| (caller_address(self.kind, &request.from), self.callers[caller].1));
        let dialled = proxy.map_or(to, SocketAddr::from);
        let mut stream = TcpStream::connect(dialled)
            .unwrap_or_else(|error| panic!("{}: {request:?} to {dialled}: {error}", self.kind));
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let local = stream.local_addr().unwrap();
        let raw = stream.try_clone().unwrap();
        if let Some((from, _)) = proxy {
            let preamble = format!("PROXY TCP4 {from} {} {} {}\r\n", to.ip(), FIRST_PORT + at, to.port());
            stream.write_all(preamble.as_bytes()).unwrap();
        }
        let answer = match &request.tls {
            None => exchange(stream, namespace, request, agent),
            Some(tls) => {
                let name = tls.server_name.replace("@NS@", &format!("c{namespace}"));
                let name = if name.is_empty() { to.ip().to_string() } else { name };
                let client = self.tls_client(tls);
                client
                    .connect(stream, &name)
                    .map_or(Answer::Nothing, |stream| exchange(stream, namespace, request, agent))
            }
        };
        // At its end all proxies on the way have let go of the connection.
        raw.shutdown(Shutdown::Write).ok();
        match std::io::copy(&mut &raw, &mut std::io::sink()) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("{}: {request:?}: the connection does not end", self.kind)
            }
            _ => (answer, local),
        }
    }

    fn tls_client(&self, tls: &Tls) -> TlsClient {
        let alpn: Vec<&str> = tls.alpn.iter().map(String::as_str).collect();
        let identity = tls.identity.as_ref().map(|name| {
            let (name, namespace, _) = CALLERS[number_of(CALLERS.iter().map(|caller| caller.0), name) - 1];
            &self.compiled.identities[&format!("{namespace}/{name}")]
        });
        TlsClient::new(&alpn, identity.map(|(chain, key)| (chain.as_str(), key.as_str())))
    }

    /// The lines of the three logs, once they have all that came before.
    fn logs(&self) -> [Vec<Line>; 3] {
        // Twice: what ends while the first is under way is written before the second.
        for round in 0..2 {
            for (number, (name, ..)) in CALLERS.iter().enumerate() {
                let http =
                    Http { method: "GET".into(), path: "/".into(), host: "server.c255".into(), headers: Vec::new() };
                let to = ("server".to_owned(), "80".to_owned());
                let request = Request { from: (*name).to_owned(), to, tls: None, http: Some(http) };
                let at = 40_000 + 10 * round + number;
                let (answer, _) = self.call(MARKER, at, &request, &format!("marker-{round}-{name}"));
                assert!(matches!(answer, Answer::Application(_)), "{}: {answer:?}", self.kind);
            }
        }
        let mut processes = self.callers.iter().map(|(process, _)| process).chain([&self.called]).zip(["a", "b", "b"]);
        std::array::from_fn(|_| {
            let (process, last) = processes.next().expect("three processes");
            eventually("the access log", || {
                let text = std::fs::read_to_string(&process.log).map_err(|error| error.to_string())?;
                let network = |kind: &str| format!("127.{}.", network(kind));
                let text = text.replace(&network(self.kind), &network("lateen"));
                let lines: Vec<Line> = text.lines().filter_map(line).collect();
                let wanted = format!("marker-1-{last}");
                if lines.iter().any(|line| line.0[3] == wanted) {
                    Ok(lines)
                } else {
                    Err(format!("{}: {text}", self.kind))
                }
            })
        })
    }
}

/// Columns that every line has.
fn line(text: &str) -> Option<Line> {
    let columns: Vec<String> = text.split('\t').map(without_pod).collect();
    (columns.len() == COLUMNS.len() && columns[0] == "L").then_some(Line(columns))
}

/// What was written behind names is away again.
fn without_pod(text: &str) -> String {
    text.split_once('@').map_or(text, |(name, _)| name).to_owned()
}

fn exchange(stream: impl Read + Write + Send + 'static, namespace: usize, request: &Request, agent: &str) -> Answer {
    match &request.http {
        Some(http) => ask(stream, namespace, http, agent).map_or(Answer::Nothing, Answer::of),
        None => say(stream).map_or(Answer::Nothing, |line| match serde_json::from_str(&line) {
            Ok(told) => Answer::Application(told),
            Err(_) if line.is_empty() => Answer::Nothing,
            Err(_) => Answer::Bytes(line),
        }),
    }
}

fn ask(
    stream: impl Read + Write + Send + 'static,
    namespace: usize,
    http: &Http,
    agent: &str,
) -> std::io::Result<Response> {
    let mut bytes = format!("{} {} HTTP/1.1\r\n", http.method, http.path);
    for line in headers(namespace, http) {
        bytes.push_str(&format!("{line}\r\n"));
    }
    let length = if http.method == "POST" { "content-length: 0\r\n" } else { "" };
    bytes.push_str(&format!("user-agent: {agent}\r\n{length}\r\n"));
    Client::over(stream).raw(bytes.as_bytes(), false)
}

fn say(mut stream: impl Read + Write) -> std::io::Result<String> {
    stream.write_all(b"hello\n")?;
    stream.flush()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

impl Answer {
    fn of(response: Response) -> Self {
        match response.json() {
            told @ Value::Object(_) => Self::Application(told),
            _ => Self::Proxy(response.status, crate::bed::comparable(response.headers), response.body),
        }
    }
}
