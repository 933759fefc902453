//! Random cases: a namespace with two workloads, the objects that say who may reach them and how, and one call each.
//!
//! `@NS@` in objects and calls is the namespace of the case. `@http@`, `@tcp@`, `@auto@`, `@tls@` and `@none@` are
//! the ports of its pods; services lead to all but the last.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::random::{Random, string_match, strings};
use crate::shrink::{Shrinks, with_less, without_objects};

use super::bed::Bed;

/// A call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// `a` or `b`, who have a sidecar, or `plain`.
    pub(crate) from: String,
    /// A service's name and port; or `v1` or `v2`, a pod, and what its port is for.
    pub(crate) to: (String, String),
    /// TLS of the client's own.
    pub(crate) tls: Option<Tls>,
    /// A request; else a line of bytes.
    pub(crate) http: Option<Http>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Tls {
    /// Empty: the client asks for an address, and says no name.
    pub(crate) server_name: String,
    pub(crate) alpn: Vec<String>,
    /// Whose mesh certificate the client shows: `a` or `b`.
    pub(crate) identity: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Http {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) host: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Request {
    /// Whether a pod is called by its address.
    pub(crate) fn is_direct(&self) -> bool {
        is_pod(&self.to.0)
    }
}

fn is_pod(name: &str) -> bool {
    matches!(name, "v1" | "v2")
}

/// What a namespace does with one call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Case {
    pub(crate) objects: Vec<Value>,
    pub(crate) request: Request,
}

impl Shrinks for Case {
    const CANDIDATES_MAX: usize = 60;

    fn candidates(&self) -> Vec<Self> {
        let objects = without_objects(&self.objects, 0).into_iter().chain(with_less(&self.objects, |_| true));
        let mut out: Vec<Self> = objects.map(|objects| Self { objects, ..self.clone() }).collect();
        let mut simpler = Vec::new();
        if let Some(http) = &self.request.http {
            for at in 0..http.headers.len() {
                let mut less = http.clone();
                less.headers.remove(at);
                simpler.push(less);
            }
            let plain = Http { method: "GET".to_owned(), path: "/".to_owned(), ..http.clone() };
            simpler.push(Http { path: http.path.clone(), ..plain.clone() });
            simpler.push(Http { method: http.method.clone(), ..plain });
        }
        let request = &self.request;
        let simpler = simpler.into_iter().filter(|http| Some(http) != request.http.as_ref());
        out.extend(
            simpler.map(|http| Self { request: Request { http: Some(http), ..request.clone() }, ..self.clone() }),
        );
        out.retain(Bed::is_valid);
        out
    }
}

const MODES: [&str; 6] = ["STRICT", "STRICT", "PERMISSIVE", "PERMISSIVE", "DISABLE", "UNSET"];
/// Ports of pods.
pub(super) const PORTS: [&str; 5] = ["http", "tcp", "auto", "tls", "none"];
const PATHS: [&str; 6] = ["/", "/a", "/a/b", "/b", "/A", "/a%2Fb"];

fn object(kind: &str, name: &str, spec: Value) -> Value {
    let group = match kind {
        "VirtualService" | "DestinationRule" => "networking",
        _ => "security",
    };
    json!({
        "apiVersion": format!("{group}.istio.io/v1"), "kind": kind,
        "metadata": { "name": name, "namespace": "@NS@" }, "spec": spec,
    })
}

fn selector(random: &mut Random) -> Value {
    match random.below(3) {
        0 => json!({ "matchLabels": { "app": "server" } }),
        1 => json!({ "matchLabels": { "version": "v1" } }),
        _ => json!({ "matchLabels": { "version": "v2" } }),
    }
}

fn peer_authentications(random: &mut Random, out: &mut Vec<Value>) {
    if random.percent(35) {
        let mode = random.pick(&MODES);
        out.push(object("PeerAuthentication", "default", json!({ "mtls": { "mode": mode } })));
    }
    if random.percent(45) {
        let mut spec = json!({ "selector": selector(random) });
        if random.percent(70) {
            spec["mtls"] = json!({ "mode": random.pick(&MODES) });
        }
        if random.percent(60) {
            let ports =
                random.some(3, |random| (format!("@{}@", random.pick(&PORTS)), json!({ "mode": random.pick(&MODES) })));
            spec["portLevelMtls"] = ports.into_iter().collect::<Map<_, _>>().into();
        }
        out.push(object("PeerAuthentication", "some", spec));
    }
}

fn client_tls(random: &mut Random) -> Value {
    match random.below(8) {
        0..=2 => json!({ "mode": "ISTIO_MUTUAL" }),
        3 | 4 => json!({ "mode": "DISABLE" }),
        5 => json!({ "mode": "SIMPLE", "insecureSkipVerify": true }),
        6 => json!({ "mode": "ISTIO_MUTUAL", "sni": "other.test" }),
        // Nobody here is that one.
        _ => json!({ "mode": "ISTIO_MUTUAL", "subjectAltNames": ["spiffe://cluster.local/ns/x/sa/y"] }),
    }
}

fn traffic_policy(random: &mut Random) -> Option<Value> {
    let mut policy = Map::new();
    if random.percent(40) {
        policy.insert("tls".into(), client_tls(random));
    }
    if random.percent(25) {
        let number: u16 = random.pick(&["80", "9000", "8443"]).parse().unwrap();
        let tls = client_tls(random);
        policy.insert("portLevelSettings".into(), json!([{ "port": { "number": number }, "tls": tls }]));
    }
    (!policy.is_empty()).then(|| policy.into())
}

fn destination_rules(random: &mut Random, out: &mut Vec<Value>) {
    if random.percent(70) {
        let mut subset = json!({ "name": "v1", "labels": { "version": "v1" } });
        if random.percent(30) {
            subset["trafficPolicy"] = json!({ "tls": client_tls(random) });
        }
        let mut spec =
            json!({ "host": "server", "subsets": [subset, { "name": "v9", "labels": { "version": "v9" } }] });
        if let Some(policy) = traffic_policy(random) {
            spec["trafficPolicy"] = policy;
        }
        out.push(object("DestinationRule", "server", spec));
    }
    for host in ["other", "unnamed", "headless"] {
        if random.percent(15) {
            let spec = json!({ "host": host, "trafficPolicy": { "tls": client_tls(random) } });
            out.push(object("DestinationRule", host, spec));
        }
    }
}

fn destination(random: &mut Random) -> Value {
    match random.below(10) {
        0..=3 => json!({ "host": "server", "subset": "v1" }),
        4..=6 => json!({ "host": "other" }),
        7 => json!({ "host": "server" }),
        // Nobody has these labels.
        8 => json!({ "host": "server", "subset": "v9" }),
        _ => json!({ "host": "nobody" }),
    }
}

fn source(random: &mut Random, condition: &mut Map<String, Value>) {
    match random.below(3) {
        0 => _ = condition.insert("sourceLabels".into(), json!({ "app": random.pick(&["a", "b"]) })),
        1 => _ = condition.insert("sourceNamespace".into(), random.pick(&["ca", "cb"]).into()),
        _ => _ = condition.insert("sourceLabels".into(), json!({ "app": "a", "tier": "front" })),
    }
}

fn http_rule(random: &mut Random) -> Value {
    let mut out = json!({});
    if random.percent(75) {
        out["match"] = random
            .some(2, |random| {
                let mut condition = Map::new();
                if random.percent(50) {
                    source(random, &mut condition);
                }
                if random.percent(50) {
                    let path = random.pick(&PATHS);
                    condition.insert("uri".into(), string_match(random, path));
                }
                if random.percent(25) {
                    condition.insert("headers".into(), json!({ "x-a": string_match(random, "1") }));
                }
                if random.percent(15) {
                    condition.insert("gateways".into(), json!([random.pick(&["mesh", "gateway"])]));
                }
                if random.percent(15) || condition.is_empty() {
                    condition.insert("port".into(), 80.into());
                }
                condition
            })
            .into();
    }
    match random.below(8) {
        0 => out["directResponse"] = json!({ "status": 200, "body": { "string": "so it is" } }),
        1 => out["redirect"] = json!({ "uri": "/new" }),
        _ => out["route"] = json!([{ "destination": destination(random) }]),
    }
    if out["route"].is_array() && random.percent(15) {
        out["fault"] = json!({ "abort": { "httpStatus": 555, "percentage": { "value": 100 } } });
    }
    if out["route"].is_array() && random.percent(20) {
        out["rewrite"] = json!({ "uri": "/new" });
    }
    out
}

fn tcp_rule(random: &mut Random) -> Value {
    let mut out = json!({ "route": [{ "destination": destination(random) }] });
    if random.percent(70) {
        let mut condition = Map::new();
        if random.percent(50) {
            source(random, &mut condition);
        }
        if random.percent(60) || condition.is_empty() {
            let port: u16 = random.pick(&["9000", "7000", "80"]).parse().unwrap();
            condition.insert("port".into(), port.into());
        }
        if random.percent(15) {
            condition.insert("destinationSubnets".into(), json!([random.pick(&["127.0.0.0/8", "10.1.0.0/16"])]));
        }
        out["match"] = json!([condition]);
    }
    out
}

fn virtual_services(random: &mut Random, out: &mut Vec<Value>) {
    if random.percent(65) {
        let mut spec = json!({ "hosts": ["server"], "gateways": ["mesh"] });
        if random.percent(75) {
            let mut rules = random.some(2, http_rule);
            if random.percent(70) {
                rules.push(json!({ "route": [{ "destination": { "host": "server" } }] }));
            }
            spec["http"] = rules.into();
        }
        if random.percent(50) || spec["http"].is_null() {
            spec["tcp"] = random.some(2, tcp_rule).into();
        }
        if random.percent(35) {
            let name = random.pick(&["server.@NS@.svc.cluster.local", "other.test", "*.test"]);
            spec["hosts"] = json!(["server", name]);
            spec["tls"] = json!([{
                "match": [{ "port": 8443, "sniHosts": [name] }], "route": [{ "destination": destination(random) }],
            }]);
        }
        out.push(object("VirtualService", "server", spec));
    }
    if random.percent(20) {
        let spec = json!({ "hosts": ["unnamed"], "http": [http_rule(random)], "tcp": [tcp_rule(random)] });
        out.push(object("VirtualService", "unnamed", spec));
    }
}

fn source_of_policy(random: &mut Random) -> Value {
    let principals = ["cluster.local/ns/ca/sa/a", "cluster.local/ns/cb/sa/b", "*/sa/a", "cluster.local/ns/ca/*", "*"];
    let mut out = Map::new();
    match random.below(9) {
        0 | 1 => _ = out.insert("principals".into(), strings(random, &principals)),
        2 => _ = out.insert("notPrincipals".into(), strings(random, &principals)),
        3 | 4 => _ = out.insert("namespaces".into(), strings(random, &["ca", "c*", "cb", "legacy", "*"])),
        5 => _ = out.insert("notNamespaces".into(), strings(random, &["ca", "cb"])),
        6 => _ = out.insert("ipBlocks".into(), strings(random, &["127.0.0.0/8", "10.0.0.0/8"])),
        7 => _ = out.insert("notIpBlocks".into(), strings(random, &["127.0.0.0/8", "10.0.0.0/8"])),
        _ => _ = out.insert("serviceAccounts".into(), strings(random, &["ca/a", "cb/b"])),
    }
    out.into()
}

fn operation(random: &mut Random) -> Value {
    let mut out = Map::new();
    if random.percent(50) {
        let ports = ["@http@", "@tcp@", "@auto@", "@tls@", "@none@", "80"];
        let key = random.pick(&["ports", "ports", "notPorts"]);
        out.insert(key.into(), strings(random, &ports));
    }
    if random.percent(30) {
        let key = random.pick(&["paths", "notPaths"]);
        out.insert(key.into(), strings(random, &["/a", "/a/*", "*/b", "*", "/{*}/b"]));
    }
    if random.percent(20) {
        let key = random.pick(&["methods", "notMethods"]);
        out.insert(key.into(), strings(random, &["GET", "POST"]));
    }
    if random.percent(15) || out.is_empty() {
        let key = random.pick(&["hosts", "notHosts"]);
        out.insert(key.into(), strings(random, &["server.@NS@.svc.cluster.local", "server.*", "*"]));
    }
    out.into()
}

fn policy_rule(random: &mut Random) -> Value {
    let mut out = Map::new();
    if random.percent(65) {
        let from = random.some(2, |random| json!({ "source": source_of_policy(random) }));
        out.insert("from".into(), from.into());
    }
    if random.percent(55) {
        out.insert("to".into(), random.some(2, |random| json!({ "operation": operation(random) })).into());
    }
    if random.percent(30) || out.is_empty() {
        let values = random.pick(&["values", "notValues"]);
        let condition = match random.below(6) {
            0 => json!({ "key": "source.namespace", values: strings(random, &["ca", "cb"]) }),
            1 => json!({ "key": "source.principal", values: strings(random, &["cluster.local/ns/ca/sa/a", "*/b"]) }),
            2 => json!({ "key": "destination.port", values: strings(random, &["@http@", "@tcp@"]) }),
            3 => {
                json!({ "key": "connection.sni", values: strings(random, &["outbound_.80_._.*", "*.cluster.local", "*"]) })
            }
            4 => json!({ "key": "request.headers[x-a]", values: strings(random, &["1", "*"]) }),
            _ => json!({ "key": "source.ip", values: strings(random, &["127.0.0.0/8", "10.0.0.0/8"]) }),
        };
        out.insert("when".into(), json!([condition]));
    }
    out.into()
}

fn policies(random: &mut Random, out: &mut Vec<Value>) {
    let actions: &[&str] = match random.below(10) {
        0..=2 => &["DENY"],
        3..=5 => &["ALLOW"],
        6 => &["ALLOW", "DENY"],
        7 => &["AUDIT", "ALLOW"],
        _ => &[],
    };
    for action in actions {
        let mut spec = json!({ "action": action, "rules": random.some(2, policy_rule) });
        if random.percent(40) {
            spec["selector"] = selector(random);
        }
        if *action == "ALLOW" && random.percent(8) {
            // Nothing passes.
            spec = json!({});
        }
        out.push(object("AuthorizationPolicy", &action.to_lowercase(), spec));
    }
}

fn own_tls(random: &mut Random, from: &str, to: &(String, String)) -> Tls {
    let by_hand = from == "plain" && random.percent(70);
    let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let server_name = if is_pod(&to.0) && !by_hand {
        String::new()
    } else if by_hand {
        random.pick(&["", "outbound_.80_._.server.@NS@.svc.cluster.local", "other.test"]).to_owned()
    } else {
        format!("{}.@NS@.svc.cluster.local", to.0)
    };
    if !by_hand {
        return Tls { server_name, alpn: list(&["h2", "http/1.1"]), identity: None };
    }
    let alpn: &[&str] = match random.below(6) {
        0 => &["istio-http/1.1"],
        1 => &["istio"],
        2 => &["istio-peer-exchange", "istio"],
        3 => &["istio-h2", "istio-http/1.1"],
        4 => &["http/1.1"],
        _ => &[],
    };
    let identity = if random.percent(75) { Some(random.pick(&["a", "b"]).to_owned()) } else { None };
    Tls { server_name, alpn: list(alpn), identity }
}

fn request(random: &mut Random) -> Request {
    let from = random.pick(&["a", "a", "b", "b", "plain"]);
    let to = if from == "plain" || random.percent(20) {
        (random.pick(&["v1", "v1", "v2"]), random.pick(&PORTS))
    } else {
        match random.below(10) {
            0..=3 => ("server", "80"),
            4 | 5 => ("server", "9000"),
            6 => ("server", "8443"),
            7 => ("other", random.pick(&["80", "9000", "8443"])),
            8 => ("unnamed", "7000"),
            _ => ("headless", "@tcp@"),
        }
    };
    let to = (to.0.to_owned(), to.1.to_owned());
    let wants_tls = match &*to.1 {
        "8443" | "tls" => 80,
        _ => 12,
    };
    let wants_http = match &*to.1 {
        "80" | "http" => 92,
        "9000" | "tcp" => 25,
        _ => 50,
    };
    let tls = if random.percent(wants_tls) { Some(own_tls(random, from, &to)) } else { None };
    let http = random.percent(wants_http).then(|| http(random, &to.0));
    Request { from: from.to_owned(), to, tls, http }
}

fn http(random: &mut Random, service: &str) -> Http {
    let service = if is_pod(service) { "server" } else { service };
    let host = match random.below(12) {
        0 => "nobody.test".to_owned(),
        1..=3 => format!("{service}.@NS@"),
        4 => format!("{service}.@NS@:80"),
        _ => format!("{service}.@NS@.svc.cluster.local"),
    };
    let mut headers = Vec::new();
    if random.percent(40) {
        headers.push(("x-a".to_owned(), random.pick(&["1", "12", "2"]).to_owned()));
    }
    // Who says so himself.
    if random.percent(12) {
        let said = "By=spiffe://cluster.local/ns/x/sa/y;URI=spiffe://cluster.local/ns/ca/sa/a";
        headers.push(("x-forwarded-client-cert".to_owned(), said.to_owned()));
    }
    if random.percent(8) {
        headers.push(("x-forwarded-for".to_owned(), "192.0.2.1".to_owned()));
    }
    let method = random.pick(&["GET", "GET", "GET", "POST"]).to_owned();
    Http { method, path: random.pick(&PATHS).to_owned(), host, headers }
}

/// A namespace with its objects, and `requests` cases that differ in the call only.
pub(crate) fn cases(random: &mut Random, requests: usize) -> Vec<Case> {
    let mut objects = Vec::new();
    peer_authentications(random, &mut objects);
    destination_rules(random, &mut objects);
    virtual_services(random, &mut objects);
    policies(random, &mut objects);
    (0..requests).map(|_| Case { objects: objects.clone(), request: request(random) }).collect()
}
