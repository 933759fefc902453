//! Cases made into one configuration, and everybody who says what becomes of a request: `explain`,
//! a Lateen proxy and an Envoy, all three with the very same resources.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use compile::{Capabilities, ProxyKind, View};
use engine::Now;
use explain::{Call, Caller, EndKind, Explainer, Explanation, Running};
use mesh::MeshSnapshot;
use serde_json::{Value, json};
use testkit::token::Issuer;
use testkit::{Client, Client2, Response, TlsServer, eventually};
use types::NamespacedName;
use types::wellknown::type_urls;

use crate::random::{Case, HALF, POOLS, Random, Request, Tokens};

/// Addresses of the backends; all listen on the same port.
const BACKENDS: [(&str, Ipv4Addr); 3] =
    [("v1", Ipv4Addr::new(127, 0, 0, 2)), ("v2", Ipv4Addr::new(127, 0, 0, 3)), ("other", Ipv4Addr::new(127, 0, 0, 4))];
/// Of the authorizer, on that port too.
const AUTHORIZER: (&str, Ipv4Addr) = ("authorizer", Ipv4Addr::new(127, 0, 0, 5));
/// Of a backend that speaks TLS, on that port too.
const SECURE: (&str, Ipv4Addr) = ("secure", Ipv4Addr::new(127, 0, 0, 6));
/// How the names of those headers begin in which it tells what the TLS client said.
pub(crate) const OF_TLS: &str = "x-tls-";

/// Of a pod where nobody listens.
const DEAD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 99);

const GATEWAY: &str = "istio-ingressgateway";

/// What all cases share: backends, issuers, settings of the mesh, a folder.
pub(crate) struct Bed {
    backend_port: u16,
    /// `pathNormalization`
    paths: &'static str,
    /// Settings of a filter that edits heads, in front of the router; `None`: there is none.
    mutation: Option<Value>,
    issuers: [Issuer; 2],
    /// The servers' certificates by the class of their hosts.
    certificates: [(&'static str, rcgen::CertifiedKey<rcgen::KeyPair>); 2],
    dir: tempfile::TempDir,
}

/// Where the gateway listens: for each of its two servers. Both proxies have the same ports, which
/// policies may name, at addresses of their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    /// Of the server with port 80.
    pub(crate) first: u16,
    /// Of the server with port 81.
    pub(crate) second: u16,
    /// Of the servers with port 443, which speak TLS.
    pub(crate) third: u16,
}

/// For what is only looked at.
pub(crate) const SOME_PORTS: Ports = Ports { first: 8080, second: 8081, third: 8443 };

impl Ports {
    fn free() -> Self {
        let one = || {
            eventually("a port that both proxies can have", || {
                let port = free_port(address("lateen"));
                TcpListener::bind((address("envoy"), port)).map(|_| port).map_err(|error| error.to_string())
            })
        };
        Self { first: one(), second: one(), third: one() }
    }

    fn of(self, server: u16) -> u16 {
        match server {
            443 => self.third,
            81 => self.second,
            _ => self.first,
        }
    }
}

/// A proxy's address, in all likelihood its own: nobody takes a port between choosing and listening.
fn address(proxy: &str) -> Ipv4Addr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, if proxy == "envoy" { 78 } else { 77 }, high, low.clamp(1, 254))
}

/// Cases with their hosts, compiled.
pub(crate) struct Compiled {
    snapshot: MeshSnapshot,
    ports: Ports,
    /// With the addresses of the objects.
    clusters: Vec<Value>,
    listeners: Vec<Value>,
}

/// One backend for ever: answers with what it got.
fn backend(name: &'static str, listener: TcpListener) {
    let tls = (name == SECURE.0).then(|| TlsServer::new("secure.shop", &["http/1.1"]));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let tls = tls.clone();
            std::thread::spawn(move || serve(name, tls.as_ref(), stream));
        }
    });
}

fn serve(name: &str, tls: Option<&TlsServer>, stream: TcpStream) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let Some(tls) = tls else { return answer(name, &[], stream) };
    let stream = tls.accept(stream).ok()?;
    let alpn = String::from_utf8_lossy(stream.conn.alpn_protocol().unwrap_or_default()).into_owned();
    let sni = stream.conn.server_name().unwrap_or_default().to_owned();
    answer(name, &[(format!("{OF_TLS}sni"), sni), (format!("{OF_TLS}alpn"), alpn)], stream)
}

/// Answers with what comes, and with `told`, for as long as the peer keeps the connection.
fn answer(name: &str, told: &[(String, String)], stream: impl Read + Write) -> Option<()> {
    let mut input = BufReader::new(stream);
    loop {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if input.read_line(&mut line).ok()? == 0 {
                return None;
            }
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let mut words = lines[0].split(' ');
        let (method, path) = (words.next()?, words.next()?);
        let headers: Vec<(String, String)> = lines[1..]
            .iter()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .chain(told.iter().cloned())
            .collect();
        let of = |name: &str| headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str());
        let length = of("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        std::io::copy(&mut (&mut input).take(length), &mut std::io::sink()).ok()?;
        if of("x-reply-reset").is_some() {
            return None;
        }
        if name == AUTHORIZER.0 {
            input.get_mut().write_all(verdict(method, path, &headers)?.as_bytes()).ok()?;
            continue;
        }
        let status = of("x-reply-status").unwrap_or("200");
        let body =
            json!({ "echo": true, "backend": name, "method": method, "path": path, "headers": headers }).to_string();
        let sent = if method == "HEAD" { "" } else { &body };
        let length = body.len();
        // In one piece: what comes in several waits for the peer's acknowledgement of the first.
        let answer = format!(
            "HTTP/1.1 {status} X\r\nx-backend: {name}\r\nx-a: answer\r\ncontent-length: {length}\r\n\r\n{sent}"
        );
        input.get_mut().write_all(answer.as_bytes()).ok()?;
    }
}

/// What the authorizer answers: the status that `x-ext` names, with what it was asked in headers;
/// `None` breaks off. Without `x-ext`, a mere yes.
fn verdict(method: &str, path: &str, headers: &[(String, String)]) -> Option<String> {
    let all = |name: &str| -> Vec<&str> {
        headers.iter().filter(|(have, _)| have == name).map(|(_, value)| value.as_str()).collect()
    };
    let asked = format!("{method} {path} {} {}", all("host").join(","), all("x-a").join(","));
    match all("x-ext")[..] {
        [] => Some("HTTP/1.1 200 X\r\ncontent-length: 0\r\n\r\n".to_owned()),
        ["break"] => None,
        [status, ..] => Some(format!(
            "HTTP/1.1 {status} X\r\nx-granted: {asked}\r\nx-a: asked\r\nx-note: {asked}\r\nx-why: {asked}\r\ncontent-length: 7\r\n\r\nbecause"
        )),
    }
}

fn pod(name: &str, labels: &str, ip: Ipv4Addr) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}\nspec: {{containers: [{{name: a, image: a}}]}}\nstatus: {{phase: Running, podIP: {ip}, conditions: [{{type: Ready, status: 'True'}}]}}\n"
    )
}

impl Bed {
    /// Settings of the mesh follow the seed.
    pub(crate) fn new(seed: u64) -> Self {
        // A port that is free on all of them.
        let port = eventually("a port for the backends", || {
            let first = TcpListener::bind((BACKENDS[0].1, 0)).map_err(|error| error.to_string())?;
            let port = first.local_addr().map_err(|error| error.to_string())?.port();
            let mut listeners = vec![first];
            let all = BACKENDS.iter().chain([&AUTHORIZER, &SECURE]);
            for (_, ip) in all.clone().skip(1) {
                listeners.push(TcpListener::bind((*ip, port)).map_err(|error| error.to_string())?);
            }
            for ((name, _), listener) in all.zip(listeners) {
                backend(name, listener);
            }
            Ok(port)
        });
        let paths = ["NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"];
        Self {
            backend_port: port,
            paths: paths[usize::try_from(seed % 4).unwrap()],
            mutation: seed.is_multiple_of(2).then(|| crate::random::mutation(&mut Random::new(seed))),
            issuers: [Issuer::new("a"), Issuer::new("b")],
            certificates: ["open", "allow"]
                .map(|class| (class, rcgen::generate_simple_self_signed([format!("*.{class}.test")]).unwrap())),
            dir: tempfile::Builder::new().prefix("lt-").tempdir().unwrap(),
        }
    }

    pub(crate) fn tokens(&self) -> Tokens {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let [a, b] = &self.issuers;
        let claims = |issuer: &str, subject: &str, more: Value| {
            let mut claims = json!({ "iss": issuer, "sub": subject, "iat": now - 60, "exp": now + 3600 });
            for (name, value) in more.as_object().unwrap() {
                claims[name] = value.clone();
            }
            claims
        };
        let mut list = vec![
            ("good", a.sign(&claims("issuer-a", "me", json!({ "group": "dev" })))),
            (
                "good",
                a.sign(&claims("issuer-a", "you", json!({ "group": ["ops", "dev"], "nested": { "key": "deep" } }))),
            ),
            (
                "good",
                b.sign(&claims(
                    "issuer-b",
                    "me",
                    json!({ "aud": "shop", "group": "dev", "nested": { "key": ["x", "deep"] } }),
                )),
            ),
            ("expired", a.sign(&claims("issuer-a", "me", json!({ "exp": now - 3600 })))),
            ("early", a.sign(&claims("issuer-a", "me", json!({ "nbf": now + 3600 })))),
            ("audience", b.sign(&claims("issuer-b", "me", json!({ "aud": "else" })))),
            ("key", b.sign(&claims("issuer-a", "me", json!({})))),
            ("issuer", a.sign(&claims("nobody", "me", json!({})))),
        ];
        let broken = list[0].1.replace('.', "!");
        list.push(("form", broken));
        Tokens(list)
    }

    fn base(&self, ports: Ports) -> String {
        let Ports { first, second, third } = ports;
        let paths = self.paths;
        let mut all = format!(
            r#"
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {{name: mesh, namespace: istio-system}}
spec:
  meshConfig:
    accessLogFile: /dev/stdout
    enableAutoMtls: false
    pathNormalization: {{normalization: {paths}}}
    extensionProviders:
    - {{name: ask, envoyExtAuthzHttp: {{service: authorizer.shop.svc.cluster.local, port: 80, pathPrefix: /ask, includeRequestHeadersInCheck: [x-ext, x-a], headersToUpstreamOnAllow: [x-granted, x-a], headersToDownstreamOnAllow: [x-note], headersToDownstreamOnDeny: [x-why, x-a]}}}}
    - {{name: ask-open, envoyExtAuthzHttp: {{service: authorizer.shop.svc.cluster.local, port: 80, failOpen: true, statusOnError: "503", includeRequestHeadersInCheck: [x-ext]}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: {GATEWAY}, namespace: istio-system}}
spec: {{clusterIP: 10.96.0.1, selector: {{istio: ingressgateway}}, ports: [{{name: http2, port: 80, targetPort: {first}}}, {{name: more, port: 81, targetPort: {second}}}, {{name: https, port: 443, targetPort: {third}}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {GATEWAY}, namespace: istio-system, labels: {{istio: ingressgateway, app: {GATEWAY}}}}}
spec: {{containers: [{{name: istio-proxy, image: auto}}]}}
status: {{phase: Running, podIP: 10.1.0.1, conditions: [{{type: Ready, status: 'True'}}]}}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: gateway, namespace: shop}}
spec:
  selector: {{istio: ingressgateway}}
  servers:
  - {{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ["*.test"]}}
  - {{port: {{number: 81, name: http-more, protocol: HTTP}}, hosts: ["*.test"]}}
  - {{port: {{number: 443, name: https-open, protocol: HTTPS}}, hosts: ["*.open.test"], tls: {{mode: SIMPLE, credentialName: open}}}}
  - {{port: {{number: 443, name: https-allow, protocol: HTTPS}}, hosts: ["*.allow.test"], tls: {{mode: SIMPLE, credentialName: allow}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: echo, namespace: shop}}
spec:
  host: echo
  subsets: [{{name: v1, labels: {{version: v1}}}}, {{name: v2, labels: {{version: v2}}}}, {{name: v9, labels: {{version: v9}}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: others, namespace: istio-system}}
spec:
  selector: {{matchLabels: {{istio: ingressgateway}}}}
  rules: [{{to: [{{operation: {{notHosts: ["*.allow.test"]}}}}]}}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens, namespace: istio-system}}
spec:
  selector: {{matchLabels: {{istio: ingressgateway}}}}
  jwtRules:
  - issuer: issuer-a
    jwks: '{}'
    fromHeaders: [{{name: authorization, prefix: "Bearer "}}, {{name: x-jwt, prefix: "Token "}}]
    fromParams: [token]
  - {{issuer: issuer-b, jwks: '{}', audiences: [shop], forwardOriginalToken: true, outputPayloadToHeader: x-payload, outputClaimToHeaders: [{{header: x-claim-group, claim: group}}, {{header: x-claim-deep, claim: nested.key}}]}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: secure, namespace: shop}}
spec: {{host: secure, trafficPolicy: {{tls: {{mode: SIMPLE, insecureSkipVerify: true}}}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: secure-named, namespace: shop}}
spec: {{host: secure-named, trafficPolicy: {{tls: {{mode: SIMPLE, insecureSkipVerify: true, sni: named.test}}}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: pool-header, namespace: shop}}
spec: {{host: pool-header, trafficPolicy: {{loadBalancer: {{consistentHash: {{httpHeaderName: x-a}}}}}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: pool-query, namespace: shop}}
spec: {{host: pool-query, trafficPolicy: {{loadBalancer: {{consistentHash: {{httpQueryParameterName: q}}}}}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: pool-source, namespace: shop}}
spec: {{host: pool-source, trafficPolicy: {{loadBalancer: {{consistentHash: {{useSourceIp: true}}}}}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: pool-maglev, namespace: shop}}
spec: {{host: pool-maglev, trafficPolicy: {{loadBalancer: {{consistentHash: {{httpHeaderName: x-a, maglev: {{}}}}}}}}}}
"#,
            self.issuers[0].jwks(),
            self.issuers[1].jwks(),
        );
        let port = self.backend_port;
        let services = [
            ("echo", "app: echo"),
            ("other", "app: other"),
            ("dead", "app: dead"),
            ("authorizer", "app: authorizer"),
            ("secure", "app: secure"),
            ("secure-named", "app: secure"),
            (HALF, "half: 'yes'"),
        ];
        let services = services.into_iter().chain(POOLS.map(|pool| (pool, "pool: all")));
        for (number, (service, selector)) in services.enumerate() {
            all.push_str(&format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {service}, namespace: shop}}\nspec: {{clusterIP: 10.96.1.{}, selector: {{{selector}}}, ports: [{{name: http, port: 80, targetPort: {port}}}]}}\n",
                number + 1,
            ));
        }
        for (name, ip) in BACKENDS {
            let app = if name == "other" { "other, half: 'yes'" } else { "echo" };
            all.push_str(&pod(name, &format!("app: {app}, version: {name}, pool: all"), ip));
        }
        for (class, made) in &self.certificates {
            let secret = json!({
                "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
                "metadata": { "name": class, "namespace": "istio-system" },
                "stringData": { "tls.crt": made.cert.pem(), "tls.key": made.signing_key.serialize_pem() },
            });
            all.push_str(&format!("---\n{secret}\n"));
        }
        all.push_str(&pod(AUTHORIZER.0, "app: authorizer", AUTHORIZER.1));
        all.push_str(&pod(SECURE.0, "app: secure", SECURE.1));
        all.push_str(&pod("dead", "app: dead, half: 'yes'", DEAD));
        all
    }

    /// SDS made static.
    fn with_certificates(&self, value: &mut Value) {
        match value {
            Value::Object(fields) => {
                if let Some(named) = fields.remove("tls_certificate_sds_secret_configs") {
                    let name = named[0]["name"].as_str().unwrap_or_default();
                    let found = self.certificates.iter().find(|(class, _)| name.ends_with(class));
                    let (_, made) = found.unwrap_or_else(|| panic!("no certificate for {name}"));
                    let inline = json!([{
                        "certificate_chain": { "inline_string": made.cert.pem() },
                        "private_key": { "inline_string": made.signing_key.serialize_pem() },
                    }]);
                    fields.insert("tls_certificates".into(), inline);
                }
                fields.values_mut().for_each(|value| self.with_certificates(value));
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.with_certificates(item)),
            _ => {}
        }
    }

    /// Certificates that clients trust, by how hosts end.
    fn roots(&self) -> BTreeMap<String, Vec<u8>> {
        self.certificates.iter().map(|(class, made)| (format!(".{class}.test"), made.cert.der().to_vec())).collect()
    }

    /// Whether the API server would take the objects of a case.
    pub(crate) fn is_valid(case: &Case) -> bool {
        !api::parse_documents("case.yaml", &text(case, "c0.open.test", "c0", SOME_PORTS)).has_errors()
    }

    /// Compiles cases, each with its host; those with equal objects may share one.
    pub(crate) fn compile(&self, cases: &[(String, &Case)]) -> Compiled {
        let ports = Ports::free();
        let mut yaml = self.base(ports);
        let mut seen = BTreeSet::new();
        for (host, case) in cases {
            if seen.insert(host) {
                yaml.push_str("\n---\n");
                yaml.push_str(&text(case, host, host.split('.').next().unwrap(), ports));
            }
        }
        let documents = api::parse_documents("cases.yaml", &yaml);
        assert!(!documents.has_errors(), "{:#?}", documents.findings);
        let objects = api::ConfigSet::new(documents.objects.into_iter().map(|parsed| parsed.object));
        let (snapshot, _) = MeshSnapshot::next(None, &objects);
        let gateway = snapshot.workload("istio-system", GATEWAY).expect("it is in the base");
        let view = View {
            kind: ProxyKind::Router,
            labels: gateway.labels.clone(),
            capabilities: Capabilities::NONE,
            ..View::sidecar("istio-system", GATEWAY, gateway.ips[0])
        };
        let packed = compile::compile(&snapshot, &view).packed();
        let of = |url: &str| of_type(&packed, url);
        let (endpoints, routes) = (of(type_urls::ENDPOINT), of(type_urls::ROUTE));
        let mut clusters: Vec<Value> = of(type_urls::CLUSTER).into_values().collect();
        clusters.iter_mut().for_each(|cluster| with_endpoints(cluster, &endpoints));
        let mut listeners: Vec<Value> = of(type_urls::LISTENER).into_values().collect();
        listeners.iter_mut().for_each(|listener| with_routes(listener, &routes));
        listeners.iter_mut().for_each(|listener| self.with_certificates(listener));
        if let Some(mutation) = &self.mutation {
            listeners.iter_mut().for_each(|listener| with_mutation(listener, mutation));
        }
        Compiled { snapshot, ports, clusters, listeners }
    }
}

/// The documents of a case.
pub(crate) fn text(case: &Case, host: &str, name: &str, ports: Ports) -> String {
    let documents: Vec<String> = case.objects.iter().map(ToString::to_string).collect();
    let text = documents.join("\n---\n").replace("@HOST@", host).replace("@NAME@", name);
    text.replace("@PORT@", &ports.first.to_string())
}

/// The resources of one type by name.
pub(crate) fn of_type(resources: &[compile::Resource], url: &str) -> BTreeMap<String, Value> {
    let resources = resources.iter().filter(|resource| resource.type_url == url);
    resources.map(|resource| (resource.name.clone(), plain(&resource.any))).collect()
}

fn plain(any: &proto::any::Any) -> Value {
    let mut value = proto::json::to_json(any);
    if let Value::Object(fields) = &mut value {
        fields.remove("@type");
    }
    value
}

/// EDS made static.
pub(crate) fn with_endpoints(cluster: &mut Value, endpoints: &BTreeMap<String, Value>) {
    let Value::Object(fields) = cluster else { return };
    let Some(eds) = fields.remove("eds_cluster_config") else { return };
    let name = eds["service_name"].as_str().filter(|name| !name.is_empty()).map(str::to_owned);
    let name = name.unwrap_or_else(|| fields["name"].as_str().unwrap_or_default().to_owned());
    fields.insert("type".into(), "STATIC".into());
    let none = || json!({ "cluster_name": name });
    fields.insert("load_assignment".into(), endpoints.get(&name).cloned().unwrap_or_else(none));
}

/// RDS made static.
pub(crate) fn with_routes(value: &mut Value, routes: &BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) => {
            if let Some(rds) = fields.remove("rds") {
                let name = rds["route_config_name"].as_str().unwrap_or_default();
                fields.insert("route_config".into(), routes[name].clone());
            }
            fields.values_mut().for_each(|value| with_routes(value, routes));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| with_routes(item, routes)),
        _ => {}
    }
}

/// One more filter in front of each router, which Istio's objects cannot ask for.
fn with_mutation(value: &mut Value, mutation: &Value) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::Array(filters)) = fields.get_mut("http_filters") {
                let last = filters.len().saturating_sub(1);
                filters.insert(last, json!({ "name": "edits", "typed_config": mutation }));
            }
            fields.values_mut().for_each(|value| with_mutation(value, mutation));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| with_mutation(item, mutation)),
        _ => {}
    }
}

impl Compiled {
    /// The file that both proxies get, but for the addresses.
    fn bootstrap(&self, address: Ipv4Addr, admin_port: u16) -> Value {
        let mut listeners = self.listeners.clone();
        for listener in &mut listeners {
            listener["address"]["socket_address"]["address"] = json!(address.to_string());
        }
        assert_eq!(listeners.len(), 3, "the gateway has three ports");
        json!({
            "node": { "id": format!("router~127.0.0.1~{GATEWAY}.istio-system~istio-system.svc.cluster.local"), "cluster": GATEWAY },
            "admin": { "address": { "socket_address": { "address": address.to_string(), "port_value": admin_port } } },
            // As in Istio's bootstrap: a fragment is cut off, not refused.
            "layered_runtime": { "layers": [{ "name": "istio", "static_layer": {
                "envoy.reloadable_features.http_reject_path_with_fragment": false,
            } }] },
            "static_resources": { "listeners": listeners, "clusters": self.clusters },
        })
    }

    /// What `explain` says, for each case.
    pub(crate) fn explained(&self, cases: &[(String, &Case)]) -> Vec<Explanation> {
        let entries =
            |list: &[Value], field: &str| -> Vec<Value> { list.iter().map(|one| json!({ field: one })).collect() };
        let dump = json!({ "configs": [
            { "static_clusters": entries(&self.clusters, "cluster") },
            { "static_listeners": entries(&self.listeners, "listener") },
        ] });
        let running = Running::read(&dump, &Value::Null, &Value::Null).unwrap();
        let ask = |_: &NamespacedName| Ok(running.clone());
        let explainer = Explainer::of_mesh(&self.snapshot, &ask);
        let explained = cases.iter().map(|(host, case)| {
            let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
            let now = Now { mono: Instant::now(), wall_nanos: u64::try_from(wall).unwrap() };
            let Request { method, path, headers, port, .. } = &case.request;
            let headers: Vec<String> = all_headers(host, &case.request, headers)
                .into_iter()
                .map(|(name, value)| format!("{name}: {value}"))
                .collect();
            let scheme = if *port == 443 { "https" } else { "http" };
            let from = Caller::Outside(NamespacedName::new("istio-system", GATEWAY));
            let mut call =
                Call::parse(from, method, &format!("{scheme}://{host}:{port}{path}"), &headers, now).unwrap();
            call.client = Some(Ipv4Addr::LOCALHOST.into());
            call.is_http2 = case.request.is_http2;
            explainer.explain(&call)
        });
        let explained: Vec<Explanation> = explained.collect();
        assert_eq!(explained.first().map(|one| one.findings.clone()).unwrap_or_default(), [], "nothing is refused");
        explained
    }
}

fn all_headers(host: &str, request: &Request, more: &[(String, String)]) -> Vec<(String, String)> {
    let host = if request.is_shouting { host.to_ascii_uppercase() } else { host.to_owned() };
    let mut all = vec![("host".to_owned(), format!("{host}{}", request.host_suffix))];
    all.extend_from_slice(more);
    all
}

/// A proxy with a configuration.
pub(crate) struct Live {
    name: &'static str,
    process: Process,
    ports: Ports,
    /// Certificates to trust, by how hosts end.
    roots: BTreeMap<String, Vec<u8>>,
    /// By server.
    clients: BTreeMap<u16, Client>,
    /// By server.
    clients2: BTreeMap<u16, Client2>,
}

/// What came of a request, as its client, its backend and the access log tell.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) status: u16,
    /// Sorted; without what differs by nature.
    pub(crate) headers: Vec<(String, String)>,
    /// Of an answer that is no backend's.
    pub(crate) body: Option<String>,
    /// What the backend got, unless it answered without a body.
    pub(crate) upstream: Option<Upstream>,
    pub(crate) log: LogLine,
}

/// A request as a backend got it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Upstream {
    pub(crate) method: String,
    pub(crate) authority: String,
    pub(crate) path: String,
    /// Sorted; without what differs by nature.
    pub(crate) headers: Vec<(String, String)>,
}

impl Outcome {
    /// Whether the endpoint was drawn: it is one of several, and what went on had no key for it, or
    /// nobody tells.
    pub(crate) fn is_drawn(&self) -> bool {
        if self.log.cluster.contains(HALF) {
            return true;
        }
        let upstream = self.upstream.as_ref();
        match POOLS.iter().find(|pool| self.log.cluster.contains(*pool)) {
            None | Some(&"pool-source") => false,
            Some(&"pool-query") => {
                let query = upstream.and_then(|upstream| upstream.path.split_once('?')).map_or("", |(_, query)| query);
                !query.split('&').any(|pair| pair.split('=').next() == Some("q"))
            }
            Some(_) => !upstream.is_some_and(|upstream| upstream.headers.iter().any(|(name, _)| name == "x-a")),
        }
    }

    /// The outcome without what tells of the endpoint.
    pub(crate) fn somewhere(mut self) -> Self {
        self.log.upstream_host.clear();
        self.headers.retain(|(name, _)| name != "x-backend");
        // Which of two was tried first tells how many tries it took.
        if self.log.cluster.contains(HALF) { self.once() } else { self }
    }

    /// The outcome without what tells of the number of tries.
    pub(crate) fn once(mut self) -> Self {
        if let Some(upstream) = &mut self.upstream {
            upstream.headers.retain(|(name, _)| {
                !matches!(&**name, "x-envoy-attempt-count" | "x-envoy-expected-rq-timeout-ms" | "grpc-timeout")
            });
        }
        let texts = self.headers.iter_mut().map(|(_, value)| value).chain(&mut self.body);
        texts.for_each(|text| *text = text.replace("retried and the latest ", ""));
        self
    }
}

/// Some columns of Istio's access log.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LogLine {
    pub(crate) code: String,
    pub(crate) flags: String,
    pub(crate) details: String,
    pub(crate) forwarded_for: String,
    pub(crate) authority: String,
    pub(crate) upstream_host: String,
    pub(crate) cluster: String,
    pub(crate) route: String,
}

impl LogLine {
    /// Every column with its name.
    pub(crate) fn columns(&self) -> [(&'static str, &str); 8] {
        [
            ("code", &self.code),
            ("flags", &self.flags),
            ("details", &self.details),
            ("forwarded for", &self.forwarded_for),
            ("authority", &self.authority),
            ("upstream host", &self.upstream_host),
            ("cluster", &self.cluster),
            ("route", &self.route),
        ]
    }
}

/// A port that nobody listens on, and that no other test of this process was given.
pub(crate) fn free_port(address: Ipv4Addr) -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = TcpListener::bind((address, 0)).unwrap().local_addr().unwrap().port();
        if GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

/// A proxy that runs.
pub(crate) struct Process {
    child: Child,
    /// What it writes to standard output: its access log.
    pub(crate) log: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Process {
    /// Starts one and waits until it is ready: Lateen, or the Envoy of this path. `name` is that of its files in `dir`.
    pub(crate) fn start(name: &str, envoy: Option<&Path>, bootstrap: &Value, dir: &Path) -> Self {
        let file = dir.join(format!("{name}.json"));
        std::fs::write(&file, bootstrap.to_string()).unwrap();
        let (log, said) = (dir.join(format!("{name}.log")), dir.join(format!("{name}.err")));
        let mut command = match envoy {
            None => {
                let mut command = Command::new(testkit::mesh::lateen());
                command.arg("proxy");
                command
            }
            Some(program) => {
                let mut command = Command::new(program);
                command.args(["--disable-hot-restart", "-l", "warning", "--file-flush-interval-msec", "50"]);
                command
            }
        };
        command.args(["--concurrency", "1", "-c"]).arg(&file).stdin(Stdio::null());
        command.stdout(std::fs::File::create(&log).unwrap()).stderr(std::fs::File::create(&said).unwrap());
        let mut process = Self { child: command.spawn().unwrap(), log };
        let admin = &bootstrap["admin"]["address"]["socket_address"];
        let admin: SocketAddr =
            format!("{}:{}", admin["address"].as_str().unwrap(), admin["port_value"]).parse().unwrap();
        eventually(name, || {
            if let Ok(Some(status)) = process.child.try_wait() {
                panic!("{name} ends with {status}:\n{}", std::fs::read_to_string(&said).unwrap());
            }
            let answer = Client::plain(admin).and_then(|mut client| client.send("GET", "x", "/ready", &[]));
            match answer {
                Ok(answer) if answer.status == 200 => Ok(()),
                other => Err(format!("{other:?}\n{}", std::fs::read_to_string(&said).unwrap())),
            }
        });
        process
    }
}

impl Live {
    fn start(name: &'static str, envoy: Option<&Path>, compiled: &Compiled, bed: &Bed) -> Self {
        let address = address(name);
        let bootstrap = compiled.bootstrap(address, free_port(address));
        Self {
            name,
            process: Process::start(name, envoy, &bootstrap, bed.dir.path()),
            ports: compiled.ports,
            roots: bed.roots(),
            clients: BTreeMap::new(),
            clients2: BTreeMap::new(),
        }
    }

    pub(crate) fn lateen(compiled: &Compiled, bed: &Bed) -> Self {
        Self::start("lateen", None, compiled, bed)
    }

    pub(crate) fn envoy(program: &Path, compiled: &Compiled, bed: &Bed) -> Self {
        Self::start("envoy", Some(program), compiled, bed)
    }

    /// What comes back; a status of 0 is a connection, or a stream, that ends without an answer. Where nobody listens
    /// there is none to end: the test fails.
    fn send(&mut self, host: &str, request: &Request, agent: &str) -> Response {
        let none = Response { status: 0, headers: Vec::new(), body: String::new(), trailers: Vec::new() };
        let answer = if request.is_http2 { self.send2(host, request, agent) } else { self.send1(host, request, agent) };
        match answer {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                panic!("{} does not listen on the port of server {}: {error}", self.name, request.port)
            }
            answer => answer.unwrap_or(none),
        }
    }

    fn at(&self, server: u16) -> SocketAddr {
        SocketAddr::from((address(self.name), self.ports.of(server)))
    }

    fn send2(&mut self, host: &str, request: &Request, agent: &str) -> std::io::Result<Response> {
        let all = all_headers(host, request, &request.headers);
        let mut headers: Vec<(&str, &str)> =
            all[1..].iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        headers.push(("user-agent", agent));
        let ask = |client: &Client2| client.send(&request.method, &all[0].1, &request.path, &headers);
        // A kept connection may have been closed after its last answer.
        if let Some(Ok(answer)) = self.clients2.get(&request.port).map(ask) {
            return Ok(answer);
        }
        let client = Client2::plain(self.at(request.port))?;
        let answer = ask(&client);
        self.clients2.insert(request.port, client);
        answer
    }

    fn send1(&mut self, host: &str, request: &Request, agent: &str) -> std::io::Result<Response> {
        let mut bytes = format!("{} {} HTTP/1.1\r\n", request.method, request.path);
        for (name, value) in all_headers(host, request, &request.headers) {
            bytes.push_str(&format!("{name}: {value}\r\n"));
        }
        bytes.push_str(&format!("user-agent: {agent}\r\n"));
        if matches!(&*request.method, "POST" | "PUT") {
            bytes.push_str("content-length: 0\r\n");
        }
        bytes.push_str("\r\n");
        let is_head = request.method == "HEAD";
        if request.port == 443 {
            let root = self.roots.iter().find(|(end, _)| host.ends_with(end.as_str()));
            let root = root.map(|(_, root)| root.as_slice()).unwrap_or_default();
            return Client::tls(self.at(request.port), host, root)?.raw(bytes.as_bytes(), is_head);
        }
        // A kept connection may have been closed after its last answer.
        if let Some(client) = self.clients.get_mut(&request.port)
            && let Ok(answer) = client.raw(bytes.as_bytes(), is_head)
        {
            return Ok(answer);
        }
        let mut client = Client::plain(self.at(request.port))?;
        let answer = client.raw(bytes.as_bytes(), is_head);
        self.clients.insert(request.port, client);
        answer
    }

    /// The statuses and backends of the same request many times over, counted.
    pub(crate) fn count(&mut self, host: &str, request: &Request, times: u32) -> BTreeMap<String, u32> {
        let mut out = BTreeMap::new();
        for _ in 0..times {
            let answer = self.send(host, request, "count");
            let what = answer.json()["backend"].as_str().map_or_else(|| answer.status.to_string(), str::to_owned);
            *out.entry(what).or_default() += 1;
        }
        out
    }

    /// Sends every request and puts together what came of each.
    pub(crate) fn outcomes(&mut self, cases: &[(String, &Case)]) -> Vec<Outcome> {
        let answers: Vec<Response> = cases
            .iter()
            .enumerate()
            .map(|(at, (host, case))| self.send(host, &case.request, &format!("case-{at}-")))
            .collect();
        let mut lines: BTreeMap<usize, LogLine> = BTreeMap::new();
        eventually("the access log", || {
            let text = std::fs::read_to_string(&self.process.log).map_err(|error| error.to_string())?;
            lines = text.lines().filter_map(log_line).collect();
            let answered = answers.iter().filter(|answer| answer.status != 0).count();
            if lines.len() >= answered {
                Ok(())
            } else {
                Err(format!("{}: {} lines of {answered}", self.name, lines.len()))
            }
        });
        let outcome = |(at, answer): (usize, Response)| Outcome::of(answer, lines.remove(&at).unwrap_or_default());
        answers.into_iter().enumerate().map(outcome).collect()
    }
}

/// Number of the case, and its line.
fn log_line(line: &str) -> Option<(usize, LogLine)> {
    let mut words = Vec::new();
    let mut rest = line.split_once("] ")?.1;
    while !rest.is_empty() {
        let (word, more) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => rest.split_once(' ').unwrap_or((rest, "")),
        };
        words.push(word.to_owned());
        rest = more.trim_start();
    }
    let word = |at: usize| words.get(at).cloned().unwrap_or_default();
    let number = word(11).strip_prefix("case-")?.strip_suffix('-')?.parse().ok()?;
    let line = LogLine {
        code: word(1),
        flags: word(2),
        details: word(3),
        forwarded_for: told_by_clients(&word(10)),
        authority: word(13),
        upstream_host: word(14),
        cluster: word(15),
        route: word(20),
    };
    Some((number, line))
}

/// Names whose values two runs cannot share.
const BY_NATURE: [&str; 5] = ["date", "x-request-id", "user-agent", "x-envoy-upstream-service-time", "server"];

/// Names of one hop's framing: an empty answer to HEAD is `content-length: 0` here and
/// `transfer-encoding: chunked` there.
const OF_FRAMING: [&str; 2] = ["content-length", "transfer-encoding"];

/// What came with a request of `x-forwarded-for`: the last address is the proxy's own addition, for
/// which Envoy writes the machine's address instead of a loopback address.
fn told_by_clients(forwarded_for: &str) -> String {
    forwarded_for.rsplit_once(',').map_or("", |(told, _)| told).to_owned()
}

pub(crate) fn comparable(headers: impl IntoIterator<Item = (String, String)>) -> Vec<(String, String)> {
    let is_kept = |name: &str| !BY_NATURE.contains(&name) && !OF_FRAMING.contains(&name);
    let mut kept: Vec<_> = headers.into_iter().filter(|(name, _)| is_kept(name)).collect();
    for (name, value) in &mut kept {
        match &**name {
            "x-forwarded-for" => *value = told_by_clients(value),
            // Envoy quotes a path as it is; a backslash in it is one of two here, as quoted text has it.
            "www-authenticate" => *value = value.replace("\\\\", "\\"),
            _ => {}
        }
    }
    // lines of one name keep their order
    kept.sort_by(|(one, _), (other, _)| one.cmp(other));
    kept
}

/// What is left of the time, as a later try tells it, is not the same twice.
fn with_time_left(mut headers: Vec<(String, String)>) -> Vec<(String, String)> {
    if headers.iter().any(|(name, value)| name == "x-envoy-attempt-count" && value != "1") {
        let of_time = |name: &str| matches!(name, "x-envoy-expected-rq-timeout-ms" | "grpc-timeout");
        headers.iter_mut().filter(|(name, _)| of_time(name)).for_each(|(_, value)| *value = "left".to_owned());
    }
    headers
}

impl Outcome {
    fn of(answer: Response, log: LogLine) -> Self {
        let echo = answer.json();
        let is_echo = echo["echo"] == true;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let upstream = is_echo.then(|| {
            let pairs = echo["headers"].as_array().into_iter().flatten();
            let headers: Vec<(String, String)> = pairs.map(|pair| (text(&pair[0]), text(&pair[1]))).collect();
            Upstream {
                method: text(&echo["method"]),
                path: text(&echo["path"]),
                authority: headers
                    .iter()
                    .find(|(name, _)| name == "host")
                    .map(|(_, host)| host.clone())
                    .unwrap_or_default(),
                headers: with_time_left(comparable(headers.into_iter().filter(|(name, _)| name != "host"))),
            }
        });
        Self {
            status: answer.status,
            headers: comparable(answer.headers),
            body: (!is_echo).then_some(answer.body),
            upstream,
            log,
        }
    }

    /// What an explanation says would come: the same fields, as far as it can know them.
    pub(crate) fn explained(explanation: &Explanation) -> Vec<Self> {
        let outcome = |path: &explain::Path| {
            let end = &path.end;
            let hop = path.hops.first();
            let decided = |stage: &str| {
                let decisions = hop.into_iter().flat_map(|hop| &hop.decisions);
                decisions
                    .filter(|decision| decision.stage == stage)
                    .map(|decision| decision.outcome.clone())
                    .next_back()
            };
            let is_delivered = end.kind == EndKind::Delivered;
            let log = LogLine {
                code: end.status.map(|status| status.to_string()).unwrap_or_default(),
                flags: end.flag.clone().unwrap_or_else(|| "-".to_owned()),
                details: end.details.clone(),
                upstream_host: decided("endpoint").filter(|_| is_delivered).unwrap_or_else(|| "-".to_owned()),
                cluster: decided("cluster").unwrap_or_else(|| "-".to_owned()),
                route: decided("route").filter(|name| name != "unnamed").unwrap_or_else(|| "-".to_owned()),
                ..LogLine::default()
            };
            let upstream = hop.and_then(|hop| hop.request.as_ref()).filter(|_| is_delivered).map(|request| Upstream {
                method: request.method.clone(),
                authority: request.authority.clone(),
                path: request.path.clone(),
                headers: comparable(request.headers.clone()),
            });
            Self {
                status: end.status.unwrap_or(0),
                headers: comparable(end.headers.clone()),
                body: None,
                upstream,
                log,
            }
        };
        explanation.paths.iter().map(outcome).collect()
    }
}
