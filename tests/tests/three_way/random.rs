//! Random cases: a host, the objects that say what becomes of its requests, and one request each.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A stream of draws from one seed (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    /// True in so many of a hundred.
    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    pub(crate) fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }

    pub(crate) fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = 1 + self.below(most);
        (0..count).map(|_| make(self)).collect()
    }
}

/// A request. Its host is the case's, with what `suffix` adds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The gateway's port: 80, 81, or 443 for TLS.
    pub(crate) port: u16,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) host_suffix: String,
    /// The host in capitals.
    pub(crate) is_shouting: bool,
    pub(crate) headers: Vec<(String, String)>,
    /// HTTP/2 with prior knowledge.
    pub(crate) is_http2: bool,
}

/// What one host does with one request. `@HOST@` and `@NAME@` in the objects are the case's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Case {
    /// `open`; or `allow` where nothing passes that no ALLOW policy lets in.
    pub(crate) class: String,
    pub(crate) objects: Vec<Value>,
    pub(crate) request: Request,
}

/// Tokens that requests may carry, by what is special about them.
pub(crate) struct Tokens(pub(crate) Vec<(&'static str, String)>);

impl Tokens {
    /// A text with the tokens' numbers in their place: another run has others.
    pub(crate) fn hide(&self, text: String) -> String {
        let numbered = self.0.iter().enumerate();
        numbered.fold(text, |text, (number, (_, token))| text.replace(token, &format!("@TOKEN{number}@")))
    }

    /// A text with tokens in place of their numbers.
    pub(crate) fn show(&self, text: String) -> String {
        let numbered = self.0.iter().enumerate();
        numbered.fold(text, |text, (number, (_, token))| text.replace(&format!("@TOKEN{number}@"), token))
    }
}

const PATHS: [&str; 26] = [
    "/",
    "/a",
    "/a/",
    "/a/b",
    "/ab",
    "/A",
    "/a/b/c",
    "/x.y",
    "/b",
    "/a%20b",
    "/a//b",
    "/a/../b",
    "/status/200",
    "/a;p=1",
    "/a%2Fb",
    "/a%2fb/",
    "/./a",
    "/a/./b/",
    "/%61",
    "/a%5Cb",
    "/a\\b",
    "/a/%2e%2e/b",
    "//a",
    "/a/..%2Fb",
    "/a#b",
    "/a%zz",
];
const HEADERS: [&str; 4] = ["x-a", "x-b", "end-user", "cookie"];
const VALUES: [&str; 7] = ["1", "12", "a", "A", "jason", "k=v; z", "a b"];
const QUERIES: [&str; 8] = ["", "q=1", "q=", "q", "q=12&r=a", "r=a&q=1", "Q=1", "q=1&q=2"];
const METHODS: [&str; 8] = ["GET", "GET", "GET", "POST", "POST", "PUT", "OPTIONS", "HEAD"];
/// What a caller sends who wants to steer the proxies, pretends to be one, or came through one.
const OF_PROXIES: [(&str, &[&str]); 30] = [
    ("x-envoy-retry-on", &["5xx", "retriable-4xx"]),
    ("x-envoy-max-retries", &["3"]),
    ("x-envoy-upstream-rq-timeout-ms", &["60000"]),
    ("x-envoy-expected-rq-timeout-ms", &["7"]),
    ("x-envoy-decorator-operation", &["mine"]),
    ("x-envoy-original-path", &["/x"]),
    ("x-envoy-original-host", &["x"]),
    ("x-envoy-internal", &["true"]),
    ("x-envoy-external-address", &["10.0.0.1"]),
    ("x-envoy-attempt-count", &["7"]),
    ("x-envoy-force-trace", &["1"]),
    ("x-client-trace-id", &["1"]),
    ("x-envoy-downstream-service-cluster", &["x"]),
    ("x-envoy-downstream-service-node", &["x"]),
    ("x-envoy-upstream-alt-stat-name", &["x"]),
    ("x-envoy-hedge-on-per-try-timeout", &["true"]),
    ("x-envoy-peer-metadata-id", &["x"]),
    ("x-envoy-peer-metadata", &["eA=="]),
    ("x-forwarded-proto", &["http", "https", "ftp"]),
    ("x-forwarded-host", &["x"]),
    ("x-forwarded-port", &["1"]),
    ("x-forwarded-client-cert", &["By=spiffe://x/y"]),
    ("x-b3-traceid", &["463ac35c9f6413ad48485a3953bb6124"]),
    ("x-b3-sampled", &["0", "1"]),
    ("b3", &["0"]),
    ("traceparent", &["00-463ac35c9f6413ad48485a3953bb6124-a2fb4a1d1a96d312-01"]),
    ("te", &["trailers", "gzip"]),
    ("connection", &["keep-alive", "close"]),
    ("keep-alive", &["timeout=5"]),
    ("proxy-connection", &["keep-alive"]),
];
/// What the authorizer is to answer, if it is asked; `explain` takes a mere yes for granted.
pub(crate) const ASKED: &str = "x-ext";
/// Services of several endpoints, where a key of the request chooses; see the base.
pub(crate) const POOLS: [&str; 4] = ["pool-header", "pool-query", "pool-source", "pool-maglev"];

/// A service of two endpoints, one of which takes no connections.
pub(crate) const HALF: &str = "half-dead";

pub(crate) fn string_match(random: &mut Random, exact: &str) -> Value {
    match random.below(3) {
        0 => json!({ "exact": exact }),
        1 => json!({ "prefix": &exact[..exact.len().min(1 + random.below(3))] }),
        _ => {
            json!({ "regex": random.pick(&[".*", "a.*", "[0-9]+", "1", "a|b", "(ja|b)son", "/a(/.*)?", "/[a-z]/?b?", "^a$", "[aA]", ".+"]) })
        }
    }
}

fn http_match(random: &mut Random) -> Value {
    let mut out = Map::new();
    if random.percent(60) {
        let path = random.pick(&PATHS);
        let uri = match random.below(5) {
            0 | 1 => json!({ "exact": path }),
            2 | 3 => json!({ "prefix": path }),
            _ => json!({ "regex": random.pick(&["/a.*", "/[a-z]", "/a/(b|c)", ".*", "/(a|b)(/.*)?", "/a/b/?", "/A"]) }),
        };
        out.insert("uri".into(), uri);
        if random.percent(15) {
            out.insert("ignoreUriCase".into(), true.into());
        }
    }
    if random.percent(20) {
        let method = random.pick(&["GET", "POST", "PUT", "get"]);
        out.insert("method".into(), string_match(random, method));
    }
    if random.percent(35) {
        let headers = random.some(2, |random| {
            let name = random.pick(&HEADERS);
            let value = random.pick(&VALUES);
            let condition = if random.percent(20) { json!({}) } else { string_match(random, value) };
            (name.to_owned(), condition)
        });
        out.insert("headers".into(), headers.into_iter().collect::<Map<_, _>>().into());
    }
    if random.percent(20) {
        let name = random.pick(&HEADERS);
        let value = random.pick(&VALUES);
        let condition = if random.percent(30) { json!({}) } else { string_match(random, value) };
        out.insert("withoutHeaders".into(), json!({ name: condition }));
    }
    if random.percent(25) {
        let name = random.pick(&["q", "r", "Q"]);
        let value = random.pick(&["1", "12", "a", "2"]);
        out.insert("queryParams".into(), json!({ name: string_match(random, value) }));
    }
    if random.percent(8) {
        out.insert("port".into(), json!(random.pick(&["80", "81"]).parse::<u16>().unwrap()));
    }
    if random.percent(8) {
        let authority = if random.percent(50) { json!({ "exact": "@HOST@" }) } else { json!({ "prefix": "c" }) };
        out.insert("authority".into(), authority);
    }
    if random.percent(5) {
        out.insert("scheme".into(), json!({ "exact": random.pick(&["http", "https"]) }));
    }
    if out.is_empty() {
        out.insert("uri".into(), json!({ "prefix": "/" }));
    }
    out.into()
}

fn destination(random: &mut Random) -> Value {
    match random.below(16) {
        15 => json!({ "host": random.pick(&["secure", "secure-named"]) }),
        12 | 13 => json!({ "host": random.pick(&POOLS) }),
        // Nobody listens there.
        14 => json!({ "host": "dead" }),
        0..=3 => json!({ "host": "echo", "subset": "v1" }),
        4..=6 => json!({ "host": "echo", "subset": "v2" }),
        7..=9 => json!({ "host": "other" }),
        // Nobody has these labels.
        10 => json!({ "host": "echo", "subset": "v9" }),
        // No rule has this subset, or nobody this name.
        _ if random.percent(50) => json!({ "host": "echo", "subset": "none" }),
        _ => json!({ "host": "nobody" }),
    }
}

/// Names that edits set.
const EDITED: [&str; 10] =
    ["x-a", "x-b", "x-new", "X-Mixed", "x-backend", "x-c", "content-type", "location", "end-user", "cookie"];
/// Tells how many tries were made.
const TRIES: &str = "%UPSTREAM_REQUEST_ATTEMPT_COUNT%";
/// Values that edits set.
const EDITS: [&str; 21] = [
    "1",
    "new",
    "%REQ(x-a)%",
    "100%%",
    "a,b",
    "%PROTOCOL%",
    "",
    "%REQ(:path)% %REQ(:method)%",
    "%REQ(x-none?x-a)%",
    "%REQ(x-a):1%",
    "%REQ(x-none)%",
    "%ROUTE_NAME%",
    "%RESP(x-a)%",
    "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "%DOWNSTREAM_LOCAL_PORT%",
    "%UPSTREAM_CLUSTER%",
    "%RESPONSE_CODE%",
    "%RESPONSE_CODE_DETAILS%",
    "%RESPONSE_FLAGS%",
    TRIES,
    "a %REQ(x-a)% b",
];

fn header_edits(random: &mut Random) -> Value {
    let mut edits = Map::new();
    for direction in ["request", "response"] {
        if random.percent(60) {
            let mut edit = Map::new();
            let name = random.pick(&EDITED);
            let value = random.pick(&EDITS);
            if random.percent(40) {
                edit.insert("set".into(), json!({ name: value }));
            }
            if random.percent(40) {
                edit.insert("add".into(), json!({ random.pick(&EDITED): random.pick(&EDITS) }));
            }
            if edit.is_empty() || random.percent(20) {
                let gone = random.pick(&["x-a", "x-b", "cookie", "x-backend", "end-user", "content-type", "location"]);
                edit.insert("remove".into(), json!([gone]));
            }
            edits.insert(direction.into(), edit.into());
        }
    }
    edits.into()
}

fn rewrite(random: &mut Random) -> Value {
    match random.below(5) {
        0 => json!({ "uri": random.pick(&["/", "/new", "/new/", "/a", "/n?x=1"]) }),
        1 => json!({ "authority": "other.host" }),
        2 => json!({ "uri": "/new", "authority": "other.host:81" }),
        3 => json!({ "uriRegexRewrite": { "match": "^/([a-z])/(.*)$", "rewrite": "/\\2/\\1" } }),
        _ => json!({ "uriRegexRewrite": { "match": "b", "rewrite": "<\\0>" } }),
    }
}

fn redirect(random: &mut Random) -> Value {
    let mut out = Map::new();
    if random.percent(60) {
        out.insert("uri".into(), json!(random.pick(&["/new", "/", "/new?x=1", "%PREFIX()%/z", "http://full.host/p"])));
    }
    if random.percent(50) {
        out.insert("authority".into(), json!(random.pick(&["other.host", "other.host:8443"])));
    }
    if random.percent(30) {
        out.insert("scheme".into(), json!(random.pick(&["https", "http"])));
    }
    match random.below(5) {
        0 => _ = out.insert("port".into(), json!(8443)),
        1 => _ = out.insert("derivePort".into(), json!(random.pick(&["FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"]))),
        _ => {}
    }
    if random.percent(50) {
        out.insert("redirectCode".into(), json!(([301, 302, 303, 307, 308][random.below(5)])));
    }
    if out.is_empty() {
        out.insert("uri".into(), "/new".into());
    }
    out.into()
}

fn cors(random: &mut Random) -> Value {
    let origins = random.some(2, |random| match random.below(4) {
        0 => json!({ "exact": "https://a.test" }),
        1 => json!({ "prefix": "https://a" }),
        2 => json!({ "regex": "https://[a-z]+\\.test" }),
        _ => json!({ "exact": "*" }),
    });
    let mut out = json!({ "allowOrigins": origins });
    if random.percent(50) {
        out["allowMethods"] = json!(["GET", "PUT"]);
    }
    if random.percent(50) {
        out["allowHeaders"] = json!(["x-a", "x-b"]);
    }
    if random.percent(30) {
        out["exposeHeaders"] = json!(["x-backend"]);
    }
    if random.percent(40) {
        out["maxAge"] = "60s".into();
    }
    if random.percent(40) {
        out["allowCredentials"] = random.percent(50).into();
    }
    match random.below(10) {
        0 => out["unmatchedPreflights"] = "FORWARD".into(),
        // Alone: to an origin that is not allowed, Envoy tells the methods and headers all the same,
        // where the behaviour reference has an answer without any.
        1 => out = json!({ "allowOrigins": out["allowOrigins"], "unmatchedPreflights": "IGNORE" }),
        _ => {}
    }
    out
}

fn rule(random: &mut Random) -> Value {
    let mut out = Map::new();
    if random.percent(75) {
        out.insert("match".into(), random.some(2, http_match).into());
    }
    match random.below(20) {
        0..=2 => {
            out.insert("redirect".into(), redirect(random));
            return out.into();
        }
        3 | 4 => {
            let mut direct = json!({ "status": ([200, 204, 404, 503][random.below(4)]) });
            // An answer that may have no body has none here; Envoy sends it in HTTP/2.
            if random.percent(60) && direct["status"] != 204 {
                direct["body"] = json!({ "string": "so it is" });
            }
            out.insert("directResponse".into(), direct);
            if random.percent(30) {
                out.insert("headers".into(), json!({ "response": { "set": { "x-direct": "1" } } }));
            }
            return out.into();
        }
        _ => {}
    }
    out.insert("route".into(), json!([{ "destination": destination(random) }]));
    if random.percent(20) {
        out["route"][0]["headers"] = header_edits(random);
    }
    if random.percent(15) {
        // One that is never drawn.
        out["route"][0]["weight"] = 100.into();
        let never = json!({ "destination": destination(random), "weight": 0, "headers": header_edits(random) });
        let list = out["route"].as_array_mut().expect("it was made one");
        list.insert(random.below(2), never);
    }
    if random.percent(10) {
        out.insert("mirror".into(), destination(random));
    }
    if random.percent(25) {
        out.insert("rewrite".into(), rewrite(random));
    }
    if random.percent(25) {
        out.insert("headers".into(), header_edits(random));
    }
    if random.percent(15) {
        out.insert("corsPolicy".into(), cors(random));
    }
    if random.percent(15) {
        let status = [400, 429, 503, 555][random.below(4)];
        let percentage = [0, 100][random.below(2)];
        let mut fault = json!({ "abort": { "percentage": { "value": percentage } } });
        if random.percent(80) {
            fault["abort"]["httpStatus"] = status.into();
        } else {
            fault["abort"]["grpcStatus"] = random.pick(&["NOT_FOUND", "UNAVAILABLE"]).into();
        }
        if random.percent(20) {
            fault["delay"] = json!({ "fixedDelay": "0.002s", "percentage": { "value": 100 } });
        }
        out.insert("fault".into(), fault);
    }
    if random.percent(15) {
        let on = random.pick(&[
            "5xx",
            "gateway-error",
            "503",
            "reset",
            "retriable-4xx",
            "429,5xx",
            "connect-failure",
            "retriable-status-codes,404",
        ]);
        out.insert("retries".into(), json!({ "attempts": random.below(3), "retryOn": on }));
    }
    if random.percent(4) {
        // The try after one at the dead endpoint goes to the other one.
        out["route"] = json!([{ "destination": { "host": HALF } }]);
        // How many tries it took is chance.
        if out.get("headers").is_some_and(|edits| edits.to_string().contains(TRIES)) {
            out.remove("headers");
        }
        out.insert("retries".into(), json!({ "attempts": 6, "retryOn": "connect-failure" }));
    }
    if random.percent(10) {
        out.insert("timeout".into(), "5s".into());
    }
    if random.percent(10) {
        out.insert("name".into(), random.pick(&["named", "x"]).into());
    }
    out.into()
}

fn virtual_service(rules: Vec<Value>) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": { "name": "@NAME@", "namespace": "shop" },
        "spec": { "hosts": ["@HOST@"], "gateways": ["gateway"], "http": rules },
    })
}

pub(crate) fn strings(random: &mut Random, from: &[&str]) -> Value {
    let mut list: Vec<String> = random.some(2, |random| random.pick(from).to_owned());
    list.dedup();
    list.into()
}

/// A rule of an AuthorizationPolicy for the case's host.
fn policy_rule(random: &mut Random) -> Value {
    let mut operation = Map::from_iter([("hosts".to_owned(), json!(["@HOST@"]))]);
    if random.percent(40) {
        let key = random.pick(&["paths", "notPaths"]);
        operation
            .insert(key.into(), strings(random, &["/a", "/a/*", "*/b", "*", "/status/{*}", "/{*}/b", "/a/{**}", "/b"]));
    }
    if random.percent(30) {
        let key = random.pick(&["methods", "notMethods"]);
        operation.insert(key.into(), strings(random, &["GET", "POST", "PU*", "*"]));
    }
    if random.percent(15) {
        let key = random.pick(&["ports", "notPorts"]);
        operation.insert(key.into(), strings(random, &["@PORT@", "80"]));
    }
    let mut out = json!({ "to": [{ "operation": operation }] });
    if random.percent(50) {
        let mut source = Map::new();
        match random.below(6) {
            5 => _ = source.insert("notRemoteIpBlocks".into(), strings(random, &["10.0.0.0/8", "192.0.2.1"])),
            0 => _ = source.insert("ipBlocks".into(), strings(random, &["127.0.0.1", "127.0.0.0/8", "10.0.0.0/8"])),
            1 => _ = source.insert("notIpBlocks".into(), strings(random, &["127.0.0.1", "10.0.0.0/8"])),
            2 => {
                _ = source
                    .insert("remoteIpBlocks".into(), strings(random, &["127.0.0.0/8", "10.0.0.0/8", "192.0.2.1"]));
            }
            3 => {
                _ = source.insert(
                    "requestPrincipals".into(),
                    strings(random, &["*", "issuer-a/me", "issuer-a/*", "*/you", "issuer-b/me"]),
                );
            }
            _ => _ = source.insert("notRequestPrincipals".into(), strings(random, &["*", "issuer-a/me"])),
        }
        out["from"] = json!([{ "source": source }]);
    }
    if random.percent(50) {
        let conditions = random.some(2, |random| {
            let values = random.pick(&["values", "notValues"]);
            match random.below(9) {
                6 => json!({ "key": "remote.ip", values: strings(random, &["127.0.0.1", "10.0.0.0/8", "192.0.2.1"]) }),
                7 => json!({ "key": "destination.port", values: strings(random, &["@PORT@", "80"]) }),
                8 => json!({ "key": "request.auth.principal", values: strings(random, &["issuer-a/*", "*", "*/me"]) }),
                0 => json!({ "key": "request.headers[x-a]", values: strings(random, &["1", "1*", "*2", "*", "a"]) }),
                1 => json!({ "key": "request.headers[end-user]", values: strings(random, &["jason", "*"]) }),
                2 => json!({ "key": "source.ip", values: strings(random, &["127.0.0.1", "10.0.0.0/8"]) }),
                3 => {
                    json!({ "key": "request.auth.claims[group]", values: strings(random, &["dev", "d*", "ops", "*"]) })
                }
                4 => json!({ "key": "request.auth.claims[nested][key]", values: strings(random, &["deep", "x"]) }),
                _ => json!({ "key": "request.auth.audiences", values: strings(random, &["shop", "s*"]) }),
            }
        });
        out["when"] = conditions.into();
    }
    out
}

fn policy(random: &mut Random, action: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": format!("@NAME@-{}", action.to_lowercase()), "namespace": "istio-system" },
        "spec": {
            "selector": { "matchLabels": { "istio": "ingressgateway" } },
            "action": action, "rules": random.some(2, policy_rule),
        },
    })
}

/// A policy that asks an authorizer: one that fails closed, or one that fails open.
fn ask(random: &mut Random) -> Value {
    let mut operation = Map::from_iter([("hosts".to_owned(), json!(["@HOST@"]))]);
    if random.percent(40) {
        let key = random.pick(&["paths", "notPaths"]);
        operation.insert(key.into(), strings(random, &["/a", "/a/*", "*/b", "/b", "/{*}/b"]));
    }
    if random.percent(20) {
        let key = random.pick(&["methods", "notMethods"]);
        operation.insert(key.into(), strings(random, &["GET", "POST"]));
    }
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "@NAME@-ask", "namespace": "istio-system" },
        "spec": {
            "selector": { "matchLabels": { "istio": "ingressgateway" } },
            "action": "CUSTOM", "provider": { "name": random.pick(&["ask", "ask-open"]) },
            "rules": [{ "to": [{ "operation": operation }] }],
        },
    })
}

/// Settings of Envoy's filter that edits heads.
pub(crate) fn mutation(random: &mut Random) -> Value {
    let mut edits = |removed: &str| -> Vec<Value> {
        let actions = ["APPEND_IF_EXISTS_OR_ADD", "ADD_IF_ABSENT", "OVERWRITE_IF_EXISTS_OR_ADD", "OVERWRITE_IF_EXISTS"];
        let mut list = random.some(3, |random| {
            let value = Some(random.pick(&EDITS)).filter(|value| *value != TRIES).unwrap_or("%PROTOCOL%");
            let header = json!({ "key": random.pick(&["x-b", "x-c", "x-filter", "end-user"]), "value": value });
            json!({ "append": { "header": header, "append_action": random.pick(&actions) } })
        });
        list.push(json!({ "remove": removed }));
        list
    };
    json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
        "mutations": { "request_mutations": edits("x-gone"), "response_mutations": edits("x-note") },
    })
}

/// `may_repeat`: headers in several lines.
fn request(random: &mut Random, tokens: &Tokens, wants_token: bool, may_repeat: bool) -> Request {
    let mut path = random.pick(&PATHS).to_owned();
    let query = random.pick(&QUERIES);
    if !query.is_empty() {
        path = format!("{path}?{query}");
    }
    let mut headers: Vec<(String, String)> = Vec::new();
    for name in HEADERS {
        if random.percent(35) {
            headers.push((name.to_owned(), random.pick(&VALUES).to_owned()));
            if random.percent(10) && may_repeat {
                headers.push((name.to_owned(), random.pick(&VALUES).to_owned()));
            }
        }
    }
    let mut method = random.pick(&METHODS).to_owned();
    if random.percent(20) {
        headers.push((
            "origin".into(),
            random.pick(&["https://a.test", "https://b.test", "http://a.test", "null"]).to_owned(),
        ));
        if random.percent(50) {
            method = "OPTIONS".into();
            headers.push(("access-control-request-method".into(), random.pick(&["GET", "DELETE"]).to_owned()));
        }
    }
    if random.percent(10) {
        headers.push(("x-reply-status".into(), random.pick(&["503", "500", "404", "429", "200", "302"]).to_owned()));
    }
    if random.percent(3) {
        headers.push(("x-reply-reset".into(), "1".into()));
    }
    if random.percent(10) {
        let kind = random.pick(&["application/grpc", "application/grpc+proto", "application/json", "text/plain"]);
        headers.push(("content-type".into(), kind.to_owned()));
    }
    while random.percent(25) {
        let (name, values) = OF_PROXIES[random.below(OF_PROXIES.len())];
        headers.push((name.to_owned(), random.pick(values).to_owned()));
    }
    if random.percent(8) {
        headers.push(("x-forwarded-for".into(), random.pick(&["10.1.1.1", "192.0.2.1, 10.2.2.2"]).to_owned()));
    }
    if random.percent(if wants_token { 75 } else { 5 }) {
        let (_, token) = &tokens.0[random.below(tokens.0.len())];
        match random.below(10) {
            0 => headers.push(("x-jwt".into(), format!("Token {token}"))),
            1 => headers.push(("authorization".into(), format!("Basic {token}"))),
            2 => path = format!("{path}{}token={token}", if query.is_empty() { '?' } else { '&' }),
            _ => headers.push(("authorization".into(), format!("Bearer {token}"))),
        }
    }
    let host_suffix = match random.below(12) {
        0 => ":80",
        1 => ":8080",
        _ => "",
    };
    let port = match random.below(20) {
        0..=15 => 80,
        16 | 17 => 81,
        _ => 443,
    };
    let is_http2 = port != 443 && random.percent(20) && is_legal_in_http2(&path, &headers);
    Request { port, method, path, host_suffix: host_suffix.into(), is_shouting: random.percent(5), headers, is_http2 }
}

/// Whether a client's library would send it.
fn is_legal_in_http2(path: &str, headers: &[(String, String)]) -> bool {
    let of_http1 = ["connection", "keep-alive", "proxy-connection", "te"];
    !path.contains(['#', '\\']) && !headers.iter().any(|(name, _)| of_http1.contains(&name.as_str()))
}

/// A host with its objects, and `requests` cases that differ in the request only.
pub(crate) fn cases(random: &mut Random, tokens: &Tokens, requests: usize) -> Vec<Case> {
    let mut rules = random.some(3, rule);
    if random.percent(75) {
        // What nobody else takes.
        rules.push(json!({ "route": [{ "destination": { "host": "echo", "subset": "v1" } }] }));
    }
    let kind = random.below(10);
    let (mut class, mut wants_token) = ("open", false);
    let mut policies = Vec::new();
    match kind {
        0 | 1 => {
            wants_token = random.percent(40);
            policies.push(policy(random, "DENY"));
        }
        2 | 3 => {
            class = "allow";
            wants_token = random.percent(50);
            policies.push(policy(random, "ALLOW"));
            if random.percent(30) {
                policies.push(policy(random, "DENY"));
            }
        }
        4 => {
            // Routing by claim.
            wants_token = true;
            let claim = random.pick(&[
                "@request.auth.claims.group",
                "@request.auth.claims.nested.key",
                "@request.auth.claims[group]",
            ]);
            let value = random.pick(&["dev", "deep", "d"]);
            let condition = string_match(random, value);
            rules.insert(
                0,
                json!({
                    "match": [{ "headers": { claim: condition } }],
                    "route": [{ "destination": { "host": "other" } }],
                }),
            );
        }
        5 => {
            policies.push(ask(random));
            if random.percent(30) {
                policies.push(policy(random, "DENY"));
            }
        }
        _ => {}
    }
    let mut objects = vec![virtual_service(rules)];
    objects.append(&mut policies);
    let is_asked = kind == 5;
    // A policy holds for every line of a header and for all of them joined, so that neither form hides
    // a value from it (property 11); Envoy's looks at each line by itself.
    let may_repeat = !objects.iter().any(|object| object.to_string().contains("request.headers["));
    let mut made = || {
        let mut request = request(random, tokens, wants_token, may_repeat);
        if is_asked && random.percent(70) {
            let said = random.pick(&["200", "200", "403", "401", "302", "500", "break"]);
            request.headers.push((ASKED.to_owned(), said.to_owned()));
        }
        Case { class: class.to_owned(), objects: objects.clone(), request }
    };
    (0..requests).map(|_| made()).collect()
}

/// A host whose requests go here or there by chance.
pub(crate) fn by_chance(random: &mut Random) -> Case {
    let weights = [[90, 10], [50, 50], [1, 99], [33, 67], [100, 0]][random.below(5)];
    let mut rule = json!({ "route": [
        { "destination": { "host": "echo", "subset": "v1" }, "weight": weights[0] },
        { "destination": { "host": "echo", "subset": "v2" }, "weight": weights[1] },
    ] });
    if random.percent(60) {
        let percentage = [1.0, 25.0, 50.0, 0.5, 99.0][random.below(5)];
        rule["fault"] = json!({ "abort": { "httpStatus": 418, "percentage": { "value": percentage } } });
    }
    Case {
        class: "open".to_owned(),
        objects: vec![virtual_service(vec![rule])],
        request: Request {
            port: 80,
            method: "GET".into(),
            path: "/".into(),
            host_suffix: String::new(),
            is_shouting: false,
            headers: Vec::new(),
            is_http2: false,
        },
    }
}
