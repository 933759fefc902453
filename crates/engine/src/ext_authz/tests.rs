//! Both services, yes and no, and what an authorizer must not reach.

use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::r#type::matcher::v3 as m;
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::rpc;
use serde_json::json;

use super::*;
use crate::exchange::StreamInfo;
use crate::facts::{ConnFacts, Now, PeerCertificate, TlsFacts};

#[expect(clippy::unnecessary_wraps, reason = "as the messages hold it")]
fn patterns(exact: &[&str], prefix: &[&str]) -> Option<m::ListStringMatcher> {
    use m::string_matcher::MatchPattern as P;
    let exact = exact.iter().map(|text| P::Exact((*text).into()));
    let patterns = exact
        .chain(prefix.iter().map(|text| P::Prefix((*text).into())))
        .map(|pattern| m::StringMatcher { ignore_case: true, match_pattern: Some(pattern) })
        .collect();
    Some(m::ListStringMatcher { patterns })
}

/// What Istio makes of an `envoyExtAuthzHttp` provider.
fn http() -> pb::ExtAuthz {
    pb::ExtAuthz {
        services: Some(pb::ext_authz::Services::HttpService(pb::HttpService {
            server_uri: Some(core::HttpUri {
                uri: "http://authz.shop.svc.cluster.local".into(),
                timeout: Some(envoy_types::pb::google::protobuf::Duration { seconds: 2, nanos: 0 }),
                http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("outbound|8000||authz".into())),
            }),
            path_prefix: "/check".into(),
            authorization_request: Some(pb::AuthorizationRequest {
                headers_to_add: vec![core::HeaderValue {
                    key: "x-from".into(),
                    value: "mesh".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            authorization_response: Some(pb::AuthorizationResponse {
                allowed_upstream_headers: patterns(&["x-user", "content-length"], &["x-auth-"]),
                allowed_client_headers_on_success: patterns(&["x-allowed-by"], &[]),
                ..Default::default()
            }),
            ..Default::default()
        })),
        allowed_headers: patterns(&["cookie"], &["x-ext-"]),
        status_on_error: Some(HttpStatus { code: 503 }),
        ..Default::default()
    }
}

fn grpc() -> pb::ExtAuthz {
    pb::ExtAuthz {
        services: Some(pb::ext_authz::Services::GrpcService(core::GrpcService {
            target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(core::grpc_service::EnvoyGrpc {
                cluster_name: "outbound|9000||authz".into(),
                authority: "authz".into(),
                ..Default::default()
            })),
            timeout: Some(envoy_types::pb::google::protobuf::Duration { seconds: 600, nanos: 0 }),
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn conn() -> ConnFacts {
    let mut conn = ConnFacts::plaintext("l", "10.0.0.9:9080".parse().unwrap(), "10.1.2.3:5555".parse().unwrap());
    let peer = PeerCertificate { uri_sans: vec!["spiffe://td/ns/a/sa/b".into()], ..Default::default() };
    conn.tls = Some(Arc::new(TlsFacts { peer: Some(peer), ..Default::default() }));
    conn
}

fn request() -> RequestHead {
    let mut head = RequestHead::new("PUT", "shop:80", "/api/x?y=1");
    for (name, value) in [
        ("authorization", "Bearer t"),
        ("cookie", "a=1"),
        ("x-ext-a", "1"),
        ("x-ext-a", "2"),
        ("x-other", "no"),
        ("x-from", "mallory"),
        ("content-length", "4"),
        ("connection", "x-ext-a"),
        ("x-request-id", "id-1"),
    ] {
        head.fields.push(name, value.as_bytes());
    }
    head
}

fn check(filter: &ExtAuthz, head: &RequestHead, body: Option<&[u8]>) -> Check {
    let (conn, info) = (conn(), StreamInfo::default());
    let now = Now { mono: Instant::now(), wall_nanos: 1_700_000_000_000_000_005 };
    let context = Context::new(&conn, &info, now);
    filter.check(&Input { head, context, body, partial: true, by_route: None })
}

fn fields(fields: &Fields) -> Vec<String> {
    fields.iter().map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value))).collect()
}

#[test]
fn an_http_authorizer_sees_what_is_listed() {
    let filter = ExtAuthz::lower(&http()).unwrap();
    assert_eq!((&*filter.cluster, filter.timeout), ("outbound|8000||authz", Some(Duration::from_secs(2))));
    let asked = check(&filter, &request(), None);
    assert_eq!(
        (asked.head.method(), asked.head.authority(), asked.head.path(), asked.grpc),
        ("PUT", &b"shop:80"[..], &b"/check/api/x?y=1"[..], false)
    );
    let want =
        ["authorization: Bearer t", "cookie: a=1", "x-ext-a: 1", "x-ext-a: 2", "x-from: mesh", "content-length: 0"];
    assert_eq!(fields(&asked.head.fields), want);
    let with_body = check(&filter, &request(), Some(b"abcd"));
    assert_eq!(with_body.head.fields.get("content-length"), Some(&b"4"[..]));
    assert_eq!(with_body.head.fields.get("x-envoy-auth-partial-body"), Some(&b"true"[..]));
    assert_eq!(&with_body.body[..], b"abcd");
}

fn response(status: u16, headers: &[(&str, &str)]) -> ResponseHead {
    let mut head = ResponseHead::new(status);
    for (name, value) in headers {
        head.fields.push(name, value.as_bytes());
    }
    head
}

#[test]
fn a_yes_over_http() {
    let filter = ExtAuthz::lower(&http()).unwrap();
    let answer = response(
        200,
        &[
            ("x-user", "alice"),
            ("x-auth-a", "1"),
            ("x-auth-a", "2"),
            ("x-secret", "s"),
            ("content-length", "0"),
            ("x-allowed-by", "me"),
            ("x-envoy-auth-headers-to-remove", "cookie, Host"),
        ],
    );
    let Verdict::Allow(allowance) = filter.answer(&answer, &Bytes::new(), None) else { panic!("no") };
    let mut head = RequestHead::new("GET", "h", "/");
    for (name, value) in [("x-user", "mallory"), ("x-user", "x"), ("cookie", "a"), ("content-length", "9")] {
        head.fields.push(name, value.as_bytes());
    }
    allowance.apply(&mut head);
    assert_eq!(fields(&head.fields), ["x-user: alice", "content-length: 9", "x-auth-a: 1", "x-auth-a: 2"]);
    let mut back = ResponseHead::new(200);
    allowance.apply_response(&mut back);
    assert_eq!(fields(&back.fields), ["x-allowed-by: me"]);
}

#[test]
fn a_no_over_http() {
    let answer = response(302, &[("location", "/login"), ("set-cookie", "a"), ("content-length", "5"), ("x-b", "1")]);
    let body = Bytes::from_static(b"login");
    let denied = |proto: &pb::ExtAuthz| match ExtAuthz::lower(proto).unwrap().answer(&answer, &body, None) {
        Verdict::Deny(denial) => (denial.status, fields(&denial.headers).join("; "), denial.body.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!(denied(&http()), (302, "location: /login; set-cookie: a; x-b: 1".to_owned(), body.clone()));
    let mut listed = http();
    let Some(pb::ext_authz::Services::HttpService(service)) = &mut listed.services else { unreachable!() };
    service.authorization_response.as_mut().unwrap().allowed_client_headers = patterns(&["x-b"], &[]);
    assert_eq!(denied(&listed), (302, "location: /login; x-b: 1".to_owned(), body.clone()));
    // Only 200 is a yes, and a failure is neither.
    let filter = ExtAuthz::lower(&http()).unwrap();
    assert!(matches!(filter.answer(&response(204, &[]), &body, None), Verdict::Deny(_)));
    assert_eq!(filter.answer(&response(500, &[]), &body, None), Verdict::Error);
    assert_eq!(filter.on_error(), OnError::Deny(503));
    let open = ExtAuthz::lower(&pb::ExtAuthz { failure_mode_allow: true, ..http() }).unwrap();
    assert_eq!(open.on_error(), OnError::Allow(false));
    assert_eq!(ExtAuthz::lower(&grpc()).unwrap().on_error(), OnError::Deny(403));
}

#[test]
fn a_grpc_authorizer_sees_everything() {
    let filter = ExtAuthz::lower(&grpc()).unwrap();
    let asked = check(&filter, &request(), Some(b"abcd"));
    assert_eq!((asked.head.path(), asked.head.authority(), asked.grpc), (CHECK.as_bytes(), &b"authz"[..], true));
    assert_eq!(asked.head.fields.get("content-type"), Some(&b"application/grpc"[..]));
    assert_eq!(asked.body[0], 0);
    let attributes = auth::CheckRequest::decode(&asked.body[5..]).unwrap().attributes.unwrap();
    assert_eq!(attributes.source.unwrap().principal, "spiffe://td/ns/a/sa/b");
    let http = attributes.request.unwrap().http.unwrap();
    assert_eq!((&*http.method, &*http.path, &*http.host, http.size), ("PUT", "/api/x?y=1", "shop:80", 4));
    assert_eq!((&*http.id, &*http.body), ("id-1", "abcd"));
    assert_eq!(http.headers["x-ext-a"], "1,2");
    assert_eq!(http.headers[":path"], "/api/x?y=1");
}

fn framed(message: &auth::CheckResponse) -> Bytes {
    let message = message.encode_to_vec();
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend(message);
    body.into()
}

#[expect(clippy::unnecessary_wraps, reason = "as the messages hold it")]
fn status(code: i32) -> Option<rpc::Status> {
    Some(rpc::Status { code, ..Default::default() })
}

fn header(name: &str, value: &str) -> core::HeaderValueOption {
    core::HeaderValueOption {
        header: Some(core::HeaderValue { key: name.into(), value: value.into(), ..Default::default() }),
        ..Default::default()
    }
}

fn grpc_answer(message: &auth::CheckResponse) -> Verdict {
    let mut trailers = Fields::new();
    trailers.push("grpc-status", b"0");
    ExtAuthz::lower(&grpc()).unwrap().answer(&response(200, &[]), &framed(message), Some(&trailers))
}

#[test]
fn answers_over_grpc() {
    use auth::check_response::HttpResponse as R;
    let ok = auth::OkHttpResponse {
        headers: vec![header("X-User", "alice"), header(":path", "/evil"), header("host", "evil")],
        headers_to_remove: vec!["cookie".into(), ":method".into()],
        query_parameters_to_set: vec![core::QueryParameter { key: "y".into(), value: "2&3".into() }],
        ..Default::default()
    };
    let yes = auth::CheckResponse { status: status(0), http_response: Some(R::OkResponse(ok)), ..Default::default() };
    let Verdict::Allow(allowance) = grpc_answer(&yes) else { panic!("no") };
    let mut head = request();
    allowance.apply(&mut head);
    assert_eq!((head.path(), head.authority()), (&b"/api/x?y=2%263"[..], &b"shop:80"[..]));
    assert_eq!(head.fields.get("x-user"), Some(&b"alice"[..]));
    assert!(!head.fields.contains("cookie"));

    let denied = auth::DeniedHttpResponse {
        status: Some(HttpStatus { code: 401 }),
        headers: vec![header("www-authenticate", "Basic"), header("content-length", "99")],
        body: "no".into(),
    };
    let no = auth::CheckResponse {
        status: status(7),
        http_response: Some(R::DeniedResponse(denied.clone())),
        ..Default::default()
    };
    let Verdict::Deny(denial) = grpc_answer(&no) else { panic!("yes") };
    assert_eq!(
        (denial.status, fields(&denial.headers).join(";"), &denial.body[..]),
        (401, "www-authenticate: Basic".into(), &b"no"[..])
    );

    let bare = auth::CheckResponse { status: status(7), ..Default::default() };
    assert!(matches!(grpc_answer(&bare), Verdict::Deny(denial) if denial.status == 403));
    assert!(matches!(grpc_answer(&auth::CheckResponse { status: status(0), ..Default::default() }), Verdict::Allow(_)));
    // Without a status nothing is allowed; a contradiction is an error.
    assert!(matches!(grpc_answer(&auth::CheckResponse::default()), Verdict::Deny(_)));
    let contradiction = auth::CheckResponse { http_response: Some(R::DeniedResponse(denied)), ..yes };
    assert_eq!(grpc_answer(&contradiction), Verdict::Error);
}

#[test]
fn a_broken_grpc_answer_is_an_error() {
    let filter = ExtAuthz::lower(&grpc()).unwrap();
    let good = framed(&auth::CheckResponse { status: status(0), ..Default::default() });
    let check = |head: &ResponseHead, body: &Bytes, status: Option<&[u8]>| {
        let mut trailers = Fields::new();
        if let Some(status) = status {
            trailers.push("grpc-status", status);
        }
        filter.answer(head, body, Some(&trailers))
    };
    let ok = response(200, &[]);
    assert!(matches!(check(&ok, &good, Some(b"0")), Verdict::Allow(_)));
    assert_eq!(check(&ok, &good, Some(b"14")), Verdict::Error);
    assert_eq!(check(&ok, &good, None), Verdict::Error);
    assert_eq!(check(&response(503, &[]), &good, Some(b"0")), Verdict::Error);
    assert_eq!(check(&ok, &good.slice(..good.len() - 1), Some(b"0")), Verdict::Error);
    assert_eq!(check(&ok, &Bytes::from_static(b"\x01\0\0\0\0"), Some(b"0")), Verdict::Error);
    assert_eq!(check(&ok, &Bytes::new(), Some(b"0")), Verdict::Error);
}

#[test]
fn only_matched_requests_are_asked_about() {
    use m::metadata_matcher::{PathSegment, path_segment::Segment};
    let filter = ExtAuthz::lower(&pb::ExtAuthz {
        filter_enabled_metadata: Some(m::MetadataMatcher {
            filter: "envoy.filters.http.rbac".into(),
            path: vec![PathSegment {
                segment: Some(Segment::Key("istio_ext_authz_shadow_effective_policy_id".into())),
            }],
            value: Some(m::ValueMatcher {
                match_pattern: Some(m::value_matcher::MatchPattern::StringMatch(m::StringMatcher {
                    ignore_case: false,
                    match_pattern: Some(m::string_matcher::MatchPattern::Prefix("istio-ext-authz-p".into())),
                })),
            }),
            invert: false,
        }),
        ..http()
    })
    .unwrap();
    let mut metadata = Metadata::new();
    assert!(!filter.wants(&metadata, None));
    let id = Arc::new(json!("istio-ext-authz-p-ns[a]-policy[b]-rule[0]"));
    metadata.set("envoy.filters.http.rbac", "istio_ext_authz_shadow_effective_policy_id", id);
    assert!(filter.wants(&metadata, None));
    assert!(!filter.wants(&metadata, Some(&PerRoute::Disabled)));
}

#[test]
fn refused() {
    let refused = |proto: pb::ExtAuthz| ExtAuthz::lower(&proto).unwrap_err().path;
    assert_eq!(refused(pb::ExtAuthz::default()), "services");
    let no = envoy_types::pb::google::protobuf::BoolValue { value: false };
    for (field, proto) in [
        ("shadow_mode", pb::ExtAuthz { shadow_mode: true, ..http() }),
        ("validate_mutations", pb::ExtAuthz { validate_mutations: true, ..http() }),
        ("filter_metadata", pb::ExtAuthz { filter_metadata: Some(Struct::default()), ..http() }),
        ("enforce_response_header_limits", pb::ExtAuthz { enforce_response_header_limits: true, ..grpc() }),
        ("enable_dynamic_metadata_ingestion", pb::ExtAuthz { enable_dynamic_metadata_ingestion: Some(no), ..grpc() }),
    ] {
        assert_eq!(refused(proto), field);
    }
    let taken = Some(envoy_types::pb::google::protobuf::BoolValue { value: true });
    assert!(ExtAuthz::lower(&pb::ExtAuthz { enable_dynamic_metadata_ingestion: taken, ..grpc() }).is_ok());
    let none = pb::BufferSettings::default();
    assert_eq!(
        refused(pb::ExtAuthz { with_request_body: Some(none), ..http() }),
        "with_request_body.max_request_bytes"
    );
}
