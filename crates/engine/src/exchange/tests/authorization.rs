//! An authorizer elsewhere, asked over HTTP.

use super::*;

fn authorizer(
    edit: impl FnOnce(&mut envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ExtAuthz),
) -> Http {
    use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
    let mut config = pb::ExtAuthz {
        transport_api_version: 2,
        services: Some(pb::ext_authz::Services::HttpService(pb::HttpService {
            server_uri: Some(core::HttpUri {
                uri: "http://authz".to_owned(),
                timeout: secs(5),
                http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster("authz".to_owned())),
            }),
            ..Default::default()
        })),
        ..Default::default()
    };
    edit(&mut config);
    let hosts = vec![host(&["*"], vec![to("/", "a")])];
    Http::new(hosts, vec![cluster("a", &[1]), cluster("authz", &[2])]).filter("authz", pack(&config))
}

fn asked(call: &mut Call<'_>) -> Box<AuthorizeQuestion> {
    match call.step() {
        Step::Ask(Question::Authorize(question)) => question,
        other => panic!("nobody was asked: {other:?}"),
    }
}

#[test]
fn an_authorizer_is_asked_and_obeyed() {
    let world = authorizer(|_| ()).build();
    let answer = |status: u16| {
        let mut call = world.start(get("a", "/x"));
        let question = asked(&mut call);
        assert_eq!(question.attempt.picked.host.address.to_string(), "10.0.0.1:2");
        assert_eq!((question.timeout, question.grpc), (Some(Duration::from_secs(5)), false));
        let head = ResponseHead::new(status);
        call.answer(Answer::Authorized(Ok(AuthorizeAnswer { head, body: "no".into(), trailers: None })));
        (call.step(), call.flags())
    };
    assert!(matches!(answer(200).0, Step::Forward(_)));
    let (step, flags) = answer(401);
    let Step::Reply(reply) = step else { panic!("{step:?}") };
    assert_eq!((reply.head.status, &*reply.body, flags.as_str()), (401, &b"no"[..], "UAEX"));
    let (step, _) = answer(503);
    assert!(matches!(step, Step::Reply(reply) if reply.cause == Cause::ExtAuthzError && reply.head.status == 403));
}

#[test]
fn an_authorizer_that_cannot_be_asked() {
    let check = |allow: bool| {
        let world = authorizer(|config| config.failure_mode_allow = allow).build();
        let mut call = world.start(get("a", "/"));
        drop(asked(&mut call));
        call.answer(Answer::Authorized(Err(Cause::ConnectFailed)));
        match call.step() {
            Step::Forward(_) => "passes".to_owned(),
            Step::Reply(reply) => format!("{} {}", reply.head.status, call.exchange.info().details.as_str()),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(check(false), "403 ext_authz_error");
    assert_eq!(check(true), "passes");
}

#[test]
fn an_authorizer_that_wants_the_body() {
    use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::BufferSettings;
    let world = authorizer(|config| {
        config.with_request_body = Some(BufferSettings { max_request_bytes: 4, ..Default::default() });
    })
    .build();
    let mut call = world.start_seeded(RequestHead::new("POST", "a", "/"), 1, false);
    assert!(matches!(call.step(), Step::Ask(Question::Body(BodyWanted { bytes_max: 4, partial: false }))));
    call.answer(Answer::Body { bytes: "1234".into(), complete: true });
    assert_eq!(&*asked(&mut call).body, b"1234");
    let mut call = world.start_seeded(RequestHead::new("POST", "a", "/"), 1, false);
    call.step();
    call.answer(Answer::Body { bytes: "1234".into(), complete: false });
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (413, &b"Payload Too Large"[..]));
}
