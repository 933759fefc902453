//! Why the mesh answered, closed or marked, told by flag and details in its log: every cause at least once.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use testkit::token::Issuer;
use testkit::{Client, Client2, Mesh, Puppet, Silent, eventually};
use types::Cause;

use crate::apps::{COLLECTOR, TRAFFIC, virtual_service, workload};
use crate::hostile::{ANY, Proxy, ask};

const GATEWAY: &str = "istio-system/istio-ingressgateway";

/// Who shows what is not one of [`CASES`].
const SHOWN: &[(Cause, fn())] = &[
    (Cause::HttpsRedirect, crate::gateway::http_is_redirected_to_https),
    (Cause::NoFilterChain, connections_that_no_chain_takes_are_logged),
    (Cause::RetryLimitExceeded, causes_are_told_by_flag_and_details),
    (Cause::UpstreamOverflow, crate::resilience::limits_are_counted_per_proxy_whatever_its_workers),
    (
        Cause::RbacDeniedConnection,
        crate::authorization::rules_of_http_narrow_permissions_and_widen_denials_on_connections,
    ),
    (Cause::ExtAuthzDenied, crate::authorization::an_authorizer_says_no_in_its_own_words),
    (Cause::ExtAuthzError, crate::authorization::an_authorizer_that_fails_fails_closed_or_when_told_open),
    (Cause::PayloadTooLarge, crate::authorization::an_authorizer_reads_the_body_up_to_its_limit),
    (Cause::HeadersTooLarge, broken_requests_are_told_by_flag_and_details),
    (Cause::BadRequest, broken_requests_are_told_by_flag_and_details),
    (Cause::MissingHost, broken_requests_are_told_by_flag_and_details),
    (Cause::UpgradeRequired, broken_requests_are_told_by_flag_and_details),
    (Cause::DownstreamGone, broken_requests_are_told_by_flag_and_details),
    (Cause::DownstreamReset, a_cancelled_call_is_told_as_its_clients_reset),
    (Cause::LocalReset, a_proxy_tells_whom_it_waited_for_and_what_it_refused),
    (Cause::ConnectTimeout, a_proxy_tells_whom_it_waited_for_and_what_it_refused),
    (Cause::DnsFailed, a_proxy_tells_whom_it_waited_for_and_what_it_refused),
    (Cause::ConfigRefused, a_proxy_tells_whom_it_waited_for_and_what_it_refused),
    (Cause::StreamIdleTimeout, a_proxy_tells_whom_it_waited_for_and_what_it_refused),
    (Cause::MaxStreamDuration, a_proxy_tells_whom_it_waited_for_and_what_it_refused),
    (Cause::RequestReceiveTimeout, a_proxy_tells_whom_it_waited_for_and_what_it_refused),
    (Cause::RequestHeaderTimeout, a_proxy_tells_whom_it_waited_for_and_what_it_refused),
    (Cause::DownstreamTlsFailed, connections_that_clients_break_are_told),
    (Cause::DownstreamFlood, connections_that_clients_break_are_told),
    (Cause::BadStream, connections_that_clients_break_are_told),
    (Cause::JwtMissing, refused_tokens_are_told),
    (Cause::JwtBadFormat, refused_tokens_are_told),
    (Cause::JwtMalformed, refused_tokens_are_told),
    (Cause::JwtBadAlgorithm, refused_tokens_are_told),
    (Cause::JwtBadSignature, refused_tokens_are_told),
    (Cause::JwtExpired, refused_tokens_are_told),
    (Cause::JwtNotYetValid, refused_tokens_are_told),
    (Cause::JwtUnknownIssuer, refused_tokens_are_told),
    (Cause::JwtWrongAudience, refused_tokens_are_told),
    (Cause::JwtNoKey, refused_tokens_are_told),
    (Cause::JwksUnavailable, refused_tokens_are_told),
    (Cause::JwtTooMany, refused_tokens_are_told),
];

/// What nobody can bring about from outside.
const HIDDEN: &[(Cause, &str)] = &[(Cause::Internal, "a bug, contained")];

#[test]
fn every_cause_has_a_test_that_shows_it() {
    let shown = SHOWN.iter().map(|(cause, _)| *cause);
    let all = CASES.iter().map(|case| case.cause).chain(shown).chain(HIDDEN.iter().map(|(cause, _)| *cause));
    let shown: BTreeSet<Cause> = all.collect();
    let missing: Vec<_> = Cause::ALL.iter().filter(|cause| !shown.contains(cause)).collect();
    assert!(missing.is_empty(), "no log test: {missing:?}");
}

/// One row of [`causes_are_told_by_flag_and_details`].
struct Case {
    cause: Cause,
    /// Path, below `/why`.
    path: &'static str,
    /// Client's headers.
    headers: &'static [(&'static str, &'static str)],
    method: &'static str,
    /// Whose log.
    whence: &'static str,
    /// Status, flags and beginning of the details.
    line: &'static str,
}

const fn case(cause: Cause, path: &'static str, line: &'static str) -> Case {
    Case { cause, path, headers: &[], method: "GET", whence: GATEWAY, line }
}

const CASES: &[Case] = &[
    case(Cause::NoRoute, "nothing", "404 NR route_not_found "),
    case(Cause::ClusterNotFound, "subset", "503 NC cluster_not_found "),
    case(Cause::DirectResponse, "direct", "200 - direct_response "),
    case(Cause::Redirect, "redirect", "301 - direct_response "),
    case(Cause::NoHealthyUpstream, "empty", "503 UH no_healthy_upstream "),
    case(Cause::RequestTimeout, "slow", "504 UT response_timeout "),
    case(Cause::PerTryTimeout, "try", "504 URX,UT upstream_per_try_timeout "),
    case(Cause::FaultAbort, "abort", "418 FI fault_filter_abort "),
    case(Cause::FaultDelay, "delay", "200 DI via_upstream "),
    case(Cause::UpstreamClosed, "closes", "503 UC upstream_reset_before_response_started{connection_termination} "),
    case(Cause::UpstreamClosedMidResponse, "truncated", "200 UC upstream_reset_after_response_started"),
    case(Cause::UpstreamTlsFailed, "tls", "503 UF upstream_reset_before_response_started{"),
    case(Cause::RbacDenied, "denied", "403 - rbac_access_denied_matched_policy[ns[istio-system]-policy[why]-rule[0]] "),
    case(Cause::BadPath, "bad%00", "400 - path_normalization_failed "),
    Case {
        headers: &[("authorization", "Bearer x.y.z")],
        ..case(Cause::JwtMalformed, "token", "401 - jwt_authn_access_denied{Jwt_")
    },
    Case {
        headers: &[("origin", "https://a.example"), ("access-control-request-method", "GET")],
        method: "OPTIONS",
        ..case(Cause::CorsPreflight, "cors", "200 - cors_response ")
    },
    Case {
        headers: &[("connection", "upgrade"), ("upgrade", "other")],
        ..case(Cause::UpgradeRefused, "upgrade", "403 - upgrade_failed ")
    },
    Case {
        whence: "shop/dead",
        ..case(
            Cause::ConnectFailed,
            "refused",
            "503 URX,UF upstream_reset_before_response_started{remote_connection_failure",
        )
    },
    Case {
        whence: "shop/noise",
        ..case(Cause::UpstreamProtocolError, "garbage", "502 UPE upstream_reset_before_response_started{protocol_error")
    },
    Case {
        whence: "shop/grpc",
        headers: &[("x-echo-reset", "early")],
        ..case(Cause::UpstreamReset, "reset/early", "UR upstream_reset_before_response_started{remote_reset} ")
    },
    Case {
        whence: "shop/grpc",
        headers: &[("x-echo-reset", "refused")],
        ..case(
            Cause::UpstreamRefusedStream,
            "reset/refused",
            "UR upstream_reset_before_response_started{remote_refused_stream_reset} ",
        )
    },
    Case {
        whence: "shop/grpc",
        headers: &[("x-echo-reset", "late")],
        ..case(Cause::UpstreamResetMidResponse, "reset/late", "200 UR upstream_reset_after_response_started")
    },
];

fn why() -> String {
    let to = |host: &str, port: u16| format!("route: [{{destination: {{host: {host}, port: {{number: {port}}}}}}}]");
    let httpbin = |path: &str| format!("rewrite: {{uri: {path}}}\n    {}", to("httpbin", 8000));
    let once = "retries: {attempts: 0}\n    ";
    let puppet = "puppet.plain.svc.cluster.local";
    let rows = [
        ("subset", "route: [{destination: {host: httpbin, subset: none}}]".to_owned()),
        ("direct", "directResponse: {status: 200, body: {string: direct}}".to_owned()),
        ("redirect", "redirect: {uri: /elsewhere}".to_owned()),
        ("empty", to("empty", 80)),
        ("slow", format!("timeout: 0.4s\n    {once}{}", httpbin("/delay/9"))),
        (
            "try",
            format!(
                "retries: {{attempts: 1, perTryTimeout: 0.3s, retryOn: gateway-error}}\n    {}",
                httpbin("/delay/9")
            ),
        ),
        (
            "abort",
            format!("fault: {{abort: {{httpStatus: 418, percentage: {{value: 100}}}}}}\n    {}", httpbin("/get")),
        ),
        (
            "delay",
            format!("fault: {{delay: {{fixedDelay: 0.1s, percentage: {{value: 100}}}}}}\n    {}", httpbin("/get")),
        ),
        ("closes", format!("{once}{}", to(puppet, 8000))),
        ("truncated", format!("{once}{}", to(puppet, 8000))),
        ("tls", format!("{once}{}", to(puppet, 8002))),
        ("denied", httpbin("/get")),
        ("token", httpbin("/get")),
        (
            "cors",
            format!(
                "corsPolicy: {{allowOrigins: [{{exact: \"https://a.example\"}}], allowMethods: [GET]}}\n    {}",
                httpbin("/get")
            ),
        ),
        ("upgrade", httpbin("/get")),
        ("refused", format!("{once}{}", to("dead", 80))),
        ("garbage", format!("{once}{}", to("garbage", 80))),
        ("reset", format!("{once}{}", to("grpc", 7070))),
        ("bad", httpbin("/get")),
    ];
    let http = rows.iter().map(|(path, rest)| format!("  - match: [{{uri: {{prefix: /why/{path}}}}}]\n    {rest}\n"));
    let service = |name: &str, selector: &str, port: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {selector}, ports: [{port}]}}\n"
        )
    };
    [
        virtual_service("why", &http.collect::<String>()),
        service("empty", "{app: nobody}", "{name: http, port: 80}"),
        service("dead", "{deployment: dead}", "{name: http, port: 80}"),
        // No server of HTTP, behind a proxy that is told it is one.
        workload("shop", "noise", "v1", "docker.io/istio/tcp-echo-server:1.3", Some(9000), "\"9000\", \"noise\""),
        service("garbage", "{app: noise}", "{name: http, port: 80, targetPort: 9000}"),
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: puppet, namespace: istio-system}
spec:
  host: puppet.plain.svc.cluster.local
  exportTo: [.]
  trafficPolicy: {portLevelSettings: [{port: {number: 8002}, tls: {mode: ISTIO_MUTUAL}}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: why, namespace: istio-system}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules: [{to: [{operation: {paths: [/why/denied]}}]}]
"
        .to_owned(),
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
            "metadata": {"name": "why", "namespace": "istio-system"},
            "spec": {
                "selector": {"matchLabels": {"istio": "ingressgateway"}},
                "jwtRules": [{"issuer": "https://issuer.example", "jwks": Issuer::new("one").jwks()}],
            },
        })
        .to_string(),
    ]
    .join("\n---\n")
}

/// The fields of a line in Istio's text format: quoted ones are one field.
fn fields(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let (field, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_once(' ').map_or((rest, ""), |(field, after)| (field, after)),
        };
        out.push(field.to_owned());
        rest = after.trim_start();
    }
    out
}

#[track_caller]
pub(crate) fn logged(mesh: &Mesh, whence: &str, path: &str, what: &str) -> String {
    eventually(&format!("the line {what:?} of {path:?}"), || {
        let log = mesh.logs(whence, "istio-proxy");
        let line = log.lines().rfind(|line| line.contains(path)).unwrap_or_default().to_owned();
        if line.contains(what) { Ok(line) } else { Err(format!("{line:?} in {whence}")) }
    })
}

#[test]
fn causes_are_told_by_flag_and_details() {
    let mesh = TRAFFIC.turn();
    let puppet = Puppet::new(&mesh, COLLECTOR);
    puppet.answers(&json!([{"path": "/why/closes", "closes": true}, {"path": "/why/truncated", "truncates": true, "body": "half"}]));
    let _objects = mesh.with(&why());
    mesh.must(&["rollout", "status", "deploy/noise", "-n", "shop", "--timeout", "120"], "");
    mesh.synced();
    for case in CASES {
        let path = format!("/why/{}", case.path);
        // What breaks off in the middle is no answer to the client.
        let answer = Client::plain(mesh.http).unwrap().send(case.method, "why.shop.test", &path, case.headers);
        if case.cause == Cause::UpstreamClosedMidResponse {
            assert!(answer.is_err(), "a truncated answer is not made a whole one: {answer:?}");
        }
        let line = logged(&mesh, case.whence, &format!(" {path} "), case.line);
        let fields = fields(&line);
        assert_eq!(fields.len(), 22, "{line}");
        assert!(fields[1].starts_with(&format!("{} {path} HTTP/", case.method)), "{line}");
        let surface = case.cause.surface();
        assert!(fields[3].split(',').any(|flag| flag == surface.flag), "{:?}: {line}", case.cause);
        assert!(fields[4].starts_with(surface.details), "{:?}: {line}", case.cause);
    }
}

/// Asks httpbin through the gateway, and goes away once it has been asked.
#[track_caller]
pub(crate) fn leave(mesh: &Mesh, host: &str, path: &str) {
    let mut stream = TcpStream::connect(mesh.http).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes()).unwrap();
    eventually("the request upstream", || {
        let state = mesh.curl(GATEWAY, &["http://127.0.0.1:15000/lateen/state"]).json();
        let httpbin = &state["clusters"]["outbound|8000||httpbin.shop.svc.cluster.local"];
        if httpbin["requests"] == 1 { Ok(()) } else { Err(state.to_string()) }
    });
}

#[test]
fn broken_requests_are_told_by_flag_and_details() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("raw", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let huge = format!("GET /raw/huge HTTP/1.1\r\nhost: raw.shop.test\r\nx: {}\r\n\r\n", "x".repeat(100_000));
    for (name, request, expect, line) in [
        ("huge", huge.as_str(), 431, "431 DPE http1.headers_too_large "),
        ("colon", "GET /raw/colon HTTP/1.1\r\nhost: raw.shop.test\r\nbad header\r\n\r\n", 400, "400 DPE http1."),
        ("hostless", "GET /raw/hostless HTTP/1.1\r\n\r\n", 400, "400 "),
        ("old", "GET /raw/old HTTP/1.0\r\nhost: raw.shop.test\r\n\r\n", 426, "426 - low_version "),
    ] {
        let answer = Client::plain(mesh.http).unwrap().raw(request.as_bytes(), false);
        assert_eq!(answer.map(|answer| answer.status).ok(), Some(expect), "{name}");
        eventually(name, || {
            let log = mesh.logs(GATEWAY, "istio-proxy");
            let last: Vec<&str> = log.lines().rev().take(3).collect();
            if last.iter().any(|have| have.contains(&format!("\" {line}"))) { Ok(()) } else { Err(format!("{last:?}")) }
        });
    }
    leave(&mesh, "raw.shop.test", "/delay/9?gone");
    logged(&mesh, GATEWAY, "/delay/9?gone", " 0 DC downstream_remote_disconnect ");
}

#[test]
fn connections_that_no_chain_takes_are_logged() {
    let mesh = TRAFFIC.turn();
    let _strict = mesh.with(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n",
    );
    let refused = mesh.curl("plain/curl", &["http://httpbin.shop:8000/get"]);
    assert_eq!(refused.status, 0, "{refused:?}");
    logged(&mesh, "shop/httpbin", "filter_chain_not_found", " 0 NR filter_chain_not_found ");
    assert_eq!(mesh.curl("shop/curl", &["http://httpbin.shop:8000/get"]).status, 200);
}

#[test]
fn a_cancelled_call_is_told_as_its_clients_reset() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("cancel", "  - route: [{destination: {host: grpc, port: {number: 7070}}}]"));
    let client = Client2::plain(mesh.http).unwrap();
    let mut call = client.call("cancel.shop.test", "/echo.Echo/Cancelled-in-the-log", &[]).unwrap();
    call.say(b"begun").unwrap();
    call.hear().unwrap();
    call.cancel();
    let surface = Cause::DownstreamReset.surface();
    let what = format!(" 200 {} {} ", surface.flag, surface.details);
    logged(&mesh, GATEWAY, "/echo.Echo/Cancelled-in-the-log", &what);
}

/// A proxy of a file: what takes settings that Istio's API does not have.
struct Alone {
    proxy: Proxy,
    dir: tempfile::TempDir,
    issuer: Issuer,
    _silent: [Silent; 2],
}

impl Alone {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let issuer = Issuer::new("one");
        let silent = [Silent::listening(), Silent::full()];
        let certificate = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let bootstrap = json!({
            "admin": {"address": of(ANY)},
            "static_resources": {
                "listeners": [
                    {"name": "http", "address": of(ANY), "filter_chains": [{"filters": [manager(dir.path(), &issuer)]}]},
                    {
                        "name": "tls", "address": of(ANY),
                        "access_log": [log(&dir.path().join("tls.log"), "%RESPONSE_FLAGS% %DOWNSTREAM_TRANSPORT_FAILURE_REASON%")],
                        "filter_chains": [{
                            "filters": [manager(dir.path(), &issuer)],
                            "transport_socket": {"name": "tls", "typed_config": {
                                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                                "common_tls_context": {"tls_certificates": [{
                                    "certificate_chain": {"inline_string": certificate.cert.pem()},
                                    "private_key": {"inline_string": certificate.signing_key.serialize_pem()},
                                }]},
                            }},
                        }],
                    },
                ],
                "clusters": [
                    cluster("silent", silent[0].address),
                    cluster("full", silent[1].address),
                    http2("http2", bare_http2()),
                    {
                        "name": "anywhere", "lb_policy": "CLUSTER_PROVIDED",
                        "cluster_type": {"name": "envoy.clusters.dynamic_forward_proxy", "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig",
                            "dns_cache_config": {"name": "names"},
                        }},
                    },
                ],
            },
        });
        Self { proxy: Proxy::run(1024, &bootstrap.to_string()), dir, issuer, _silent: silent }
    }

    fn log(&self, file: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(file)).unwrap_or_default()
    }

    /// The log has a line that begins with `path`, if that is known, and tells of the cause.
    #[track_caller]
    fn tells(&self, cause: Cause, path: &str, code: u16) {
        let surface = cause.surface();
        let line = format!(" {code} {} {}", surface.flag, surface.details);
        eventually(&format!("{path}{line}"), || {
            let log = self.log("log");
            if log.lines().any(|have| have.starts_with(path) && have.contains(&line)) { Ok(()) } else { Err(log) }
        });
    }

    /// A connection that says these bytes.
    fn say(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.proxy.http).unwrap();
        stream.set_read_timeout(Some(testkit::PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    /// The status of the answer to these bytes.
    #[track_caller]
    fn answer(&self, request: &str) -> u16 {
        let mut stream = self.say(request.as_bytes());
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("{request}: {error}"));
        std::str::from_utf8(&answer[9..]).unwrap().parse().unwrap()
    }
}

fn of(at: SocketAddr) -> Value {
    json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}})
}

fn cluster(name: &str, at: SocketAddr) -> Value {
    json!({
        "name": name, "connect_timeout": "0.3s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": of(at)}}]}]},
    })
}

/// A server of HTTP/2 that says so, and that it can do nothing special.
fn bare_http2() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut open = Vec::new();
        for mut stream in listener.incoming().flatten() {
            if stream.write_all(&frame(4, 0, 0, &[])).is_ok() {
                open.push(stream);
            }
        }
    });
    address
}

fn http2(name: &str, at: SocketAddr) -> Value {
    let options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let mut made = cluster(name, at);
    made["typed_extension_protocol_options"][options] = json!({
        "@type": format!("type.googleapis.com/{options}"),
        "explicit_http_config": {"http2_protocol_options": {}},
    });
    made
}

fn log(path: &Path, format: &str) -> Value {
    json!({"name": "log", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
        "path": path, "log_format": {"text_format_source": {"inline_string": format!("{format}\n")}},
    }})
}

fn manager(dir: &Path, issuer: &Issuer) -> Value {
    let filter = |name: &str, config: Value| {
        let mut config = config;
        config["@type"] = json!(format!("type.googleapis.com/envoy.extensions.filters.http.{name}"));
        json!({"name": name, "typed_config": config})
    };
    let provider = |issuer: &str, keys: &str| {
        json!({
            "issuer": issuer, "audiences": ["shop"], "local_jwks": {"inline_string": keys},
            "from_headers": [{"name": "authorization", "value_prefix": "Bearer "}], "from_params": ["token"],
        })
    };
    let route = |prefix: &str, route: Value| json!({"match": {"prefix": prefix}, "route": route});
    json!({"name": "manager", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "x",
        "access_log": [log(&dir.join("log"), "%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%")],
        "request_headers_timeout": "0.3s",
        "request_timeout": "0.3s",
        "route_config": {"virtual_hosts": [{"name": "a", "domains": ["*"], "routes": [
            route("/idle", json!({"cluster": "silent", "timeout": "0s", "idle_timeout": "0.3s"})),
            route("/long", json!({"cluster": "silent", "timeout": "0s", "max_stream_duration": {"max_stream_duration": "0.3s"}})),
            route("/full", json!({"cluster": "full", "timeout": "0s"})),
            route("/anywhere", json!({"cluster": "anywhere", "timeout": "0s"})),
            route("/http2", json!({
                "cluster": "http2", "timeout": "0s", "upgrade_configs": [{"upgrade_type": "websocket"}],
            })),
            route("/", json!({"cluster": "silent", "timeout": "0s"})),
        ]}]},
        "http_filters": [
            filter("jwt_authn.v3.JwtAuthentication", json!({
                "providers": {
                    "good": provider("https://issuer.example", &issuer.jwks()),
                    "keyless": provider("https://keyless.example", "nonsense"),
                },
                "rules": [
                    {"match": {"prefix": "/token/"}, "requires": {"provider_name": "good"}},
                    {"match": {"prefix": "/keyless"}, "requires": {"provider_name": "keyless"}},
                ],
            })),
            filter("grpc_web.v3.GrpcWeb", json!({})),
            filter("router.v3.Router", json!({})),
        ],
    }})
}

#[test]
fn a_proxy_tells_whom_it_waited_for_and_what_it_refused() {
    let alone = Alone::start();
    let get = |path: &str, rest: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\n{rest}\r\n");
    // No name is so long, which is known without asking anybody.
    let nowhere = get("/anywhere", "").replace("host: a", &format!("host: {}.example", "a".repeat(64)));
    for (cause, path, request) in [
        (Cause::StreamIdleTimeout, "/idle", get("/idle", "")),
        (Cause::MaxStreamDuration, "/long", get("/long", "")),
        (Cause::ConnectTimeout, "/full", get("/full", "")),
        (Cause::DnsFailed, "/anywhere", nowhere),
        // This one cannot carry an upgrade.
        (Cause::LocalReset, "/http2", get("/http2", "connection: upgrade\r\nupgrade: websocket\r\n")),
        (Cause::ConfigRefused, "/web", get("/web", "content-type: application/grpc-web\r\n")),
        // Half a body, and half a head: of that, nothing is known.
        (Cause::RequestReceiveTimeout, "/body", get("/body", "content-length: 9\r\n") + "half"),
        (Cause::RequestHeaderTimeout, "", "GET /head HTTP/1.1\r\nho".to_owned()),
    ] {
        let code = alone.answer(&request);
        // Of these two, the request is whole: not the client is too slow.
        let is_whole = matches!(cause, Cause::StreamIdleTimeout | Cause::MaxStreamDuration);
        assert_eq!(code, if is_whole { 504 } else { cause.surface().status }, "{cause:?}");
        alone.tells(cause, path, code);
    }
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A request of an HTTP/2 client for `path`, on its first stream: connection's preface, settings, head.
fn first_request(path: &str) -> Vec<u8> {
    let length = u8::try_from(path.len()).unwrap();
    // :method GET, :scheme http, :path, :authority a
    let head = [&[0x82, 0x86, 0x04, length][..], path.as_bytes(), &[0x01, 1, b'a']].concat();
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[]), &frame(1, 5, 1, &head)].concat()
}

#[test]
fn connections_that_clients_break_are_told() {
    let alone = Alone::start();
    let flood = frame(6, 0, 0, &[0; 8]).repeat(3000);
    // A head belongs to no connection as a whole.
    let broken = frame(1, 5, 0, &[0x82]);
    for (cause, name, bytes) in [(Cause::DownstreamFlood, "flood", flood), (Cause::BadStream, "broken", broken)] {
        // The stream that is under way tells.
        let path = format!("/{name}");
        let mut stream = alone.say(&first_request(&path));
        eventually("the request upstream", || {
            let page = ask(alone.proxy.admin, "/stats/prometheus").unwrap_or_default();
            let active = "envoy_http_downstream_rq_active{envoy_http_conn_manager_prefix=\"x\"} 1\n";
            if page.contains(active) { Ok(()) } else { Err(page) }
        });
        // It may be closed before all is written.
        drop(stream.write_all(&bytes));
        alone.tells(cause, &path, 0);
        // Where there is none, the connection has a line of its own.
        let mut stream = alone.say(&first_request("/x")[..24 + 9]);
        drop(stream.write_all(&bytes));
        alone.tells(cause, "- ", 0);
    }
    let mut stream = TcpStream::connect(alone.proxy.listener("tls")).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    alone.tells(Cause::DownstreamTlsFailed, "", 0);
    eventually("the reason in the listener's log", || match alone.log("tls.log") {
        log if log.starts_with("- received_corrupt_message") => Ok(()),
        log => Err(log),
    });
}

#[test]
fn refused_tokens_are_told() {
    let alone = Alone::start();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let claims = |name: &str, value: Value| {
        let mut claims = json!({"iss": "https://issuer.example", "aud": "shop", "exp": now + 3600});
        claims[name] = value;
        claims
    };
    let good = claims("sub", json!("ada"));
    let sign = |claims: &Value| alone.issuer.sign(claims);
    let expired = sign(&claims("exp", json!(now - 3600)));
    for (cause, path, token) in [
        (Cause::JwtMissing, "/token/missing".to_owned(), None),
        (Cause::JwtBadFormat, "/token/format".to_owned(), Some("abc".to_owned())),
        (Cause::JwtMalformed, "/token/malformed".to_owned(), Some("eA.e30.AA".to_owned())),
        (Cause::JwtBadAlgorithm, "/token/alg".to_owned(), Some(alone.issuer.sign_as(&json!({"alg": "none"}), &good))),
        (Cause::JwtBadSignature, "/token/signature".to_owned(), Some(Issuer::new("one").sign(&good))),
        (Cause::JwtExpired, "/token/expired".to_owned(), Some(expired.clone())),
        (Cause::JwtNotYetValid, "/token/early".to_owned(), Some(sign(&claims("nbf", json!(now + 3600))))),
        (
            Cause::JwtUnknownIssuer,
            "/token/issuer".to_owned(),
            Some(sign(&claims("iss", json!("https://other.example")))),
        ),
        (Cause::JwtWrongAudience, "/token/audience".to_owned(), Some(sign(&claims("aud", json!("bank"))))),
        (Cause::JwtNoKey, "/token/key".to_owned(), Some(alone.issuer.sign_as(&json!({"kid": "two"}), &good))),
        (Cause::JwtTooMany, format!("/token/many?token={expired}"), Some(sign(&good))),
        (Cause::JwksUnavailable, "/keyless".to_owned(), Some(sign(&claims("iss", json!("https://keyless.example"))))),
    ] {
        let bearer = token.map_or_else(String::new, |token| format!("authorization: Bearer {token}\r\n"));
        let code = alone.answer(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n{bearer}\r\n"));
        assert_eq!(code, cause.surface().status, "{cause:?}");
        alone.tells(cause, &path, code);
        // Of these two, other words say more.
        if !matches!(cause, Cause::JwtTooMany | Cause::JwksUnavailable) {
            let text = cause.surface().body.replace(' ', "_");
            assert!(
                alone.log("log").contains(&format!("{path} {code} - jwt_authn_access_denied{{{text}}}")),
                "{cause:?}"
            );
        }
    }
}
