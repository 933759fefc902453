//! Filters in their order: policies, faults, CORS.

use envoy_types::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};

use super::*;

/// Lets one origin in.
fn cors() -> cors_pb::CorsPolicy {
    cors_pb::CorsPolicy {
        allow_origin_string_match: vec![StringMatcher {
            match_pattern: Some(MatchPattern::Exact("https://good".to_owned())),
            ..Default::default()
        }],
        allow_methods: "GET".to_owned(),
        ..Default::default()
    }
}

fn preflight() -> RequestHead {
    let mut head = RequestHead::new("OPTIONS", "a", "/");
    head.fields.push("origin", b"https://good");
    head.fields.push("access-control-request-method", b"GET");
    head
}

#[test]
fn a_preflight_is_judged_by_policies_before_it_is_answered() {
    let answer = |action: i32| {
        let mut one = to("/", "a");
        one.typed_per_filter_config.insert("cors".to_owned(), pack(&cors()));
        let rbac = rbac_http::Rbac { rules: Some(all_of(action)), ..Default::default() };
        let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])])
            .filter("rbac", pack(&rbac))
            .filter("cors", pack(&cors_pb::Cors::default()))
            .build();
        let reply = world.start(preflight()).reply();
        (reply.head.status, reply.cause, reply.head.fields.contains("access-control-allow-origin"))
    };
    assert_eq!(answer(0), (200, Cause::CorsPreflight, true), "allowed");
    assert_eq!(answer(1), (403, Cause::RbacDenied, false), "denied");
}

#[test]
fn a_preflight_can_be_aborted_by_a_fault() {
    let mut one = to("/", "a");
    one.typed_per_filter_config.insert("cors".to_owned(), pack(&cors()));
    one.typed_per_filter_config.insert("fault".to_owned(), pack(&abort(503)));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])])
        .filter("fault", pack(&fault_pb::HttpFault::default()))
        .filter("cors", pack(&cors_pb::Cors::default()))
        .build();
    assert_eq!(world.start(preflight()).reply().cause, Cause::FaultAbort);
}

fn abort(status: u32) -> fault_pb::HttpFault {
    fault_pb::HttpFault {
        abort: Some(fault_pb::FaultAbort {
            percentage: Some(FractionalPercent { numerator: 100, denominator: 0 }),
            error_type: Some(fault_pb::fault_abort::ErrorType::HttpStatus(status)),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[test]
fn an_abort_is_not_tried_again_and_ejects_nobody() {
    let mut watched = cluster("a", &[1]);
    watched.outlier_detection = Some(cluster_pb::OutlierDetection {
        consecutive_5xx: number(1),
        enforcing_success_rate: number(0),
        ..Default::default()
    });
    let mut aborted = with(to("/aborted", "a"), |action| action.retry_policy = Some(retries("5xx,gateway-error", 5)));
    aborted.typed_per_filter_config.insert("fault".to_owned(), pack(&abort(503)));
    let world = Http::new(vec![host(&["*"], vec![aborted, to("/", "a")])], vec![watched])
        .filter("fault", pack(&fault_pb::HttpFault::default()))
        .build();
    for seed in 0..10 {
        let mut call = world.start_seeded(get("a", "/aborted"), seed, true);
        // The first step is the answer: nothing was tried.
        assert_eq!((call.reply().head.status, call.flags().as_str()), (503, "FI"));
    }
    assert_eq!(world.worker.shared().clusters().iter().map(|cluster| cluster.ejected.get()).sum::<u32>(), 0);
    drop(world.start(get("a", "/")).attempt());
}

#[test]
fn a_denial_carries_the_headers_of_its_route() {
    let mut one = to("/", "a");
    one.response_headers_to_add = vec![header("x-route", "1", false)];
    let deny = rbac_http::Rbac { rules: Some(all_of(1)), ..Default::default() };
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).filter("rbac", pack(&deny)).build();
    let reply = world.start(get("a", "/")).reply();
    assert_eq!((reply.head.status, reply.head.fields.get_str("x-route")), (403, Some("1")));
}

fn all_of(action: i32) -> rbac_pb::Rbac {
    let policy = rbac_pb::Policy {
        permissions: vec![rbac_pb::Permission { rule: Some(rbac_pb::permission::Rule::Any(true)) }],
        principals: vec![rbac_pb::Principal { identifier: Some(rbac_pb::principal::Identifier::Any(true)) }],
        ..Default::default()
    };
    rbac_pb::Rbac { action, policies: [("ns[a]-policy[p]-rule[0]".to_owned(), policy)].into(), ..Default::default() }
}

#[test]
fn policy_denies_before_faults() {
    let fault = fault_pb::HttpFault {
        abort: Some(fault_pb::FaultAbort {
            percentage: Some(FractionalPercent { numerator: 100, denominator: 0 }),
            error_type: Some(fault_pb::fault_abort::ErrorType::HttpStatus(418)),
            ..Default::default()
        }),
        ..Default::default()
    };
    let deny = rbac_http::Rbac { rules: Some(all_of(1)), ..Default::default() };
    let with_fault = || {
        let mut one = to("/", "a");
        one.typed_per_filter_config.insert("fault".to_owned(), pack(&fault));
        Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])])
    };
    let world = with_fault().filter("rbac", pack(&deny)).filter("fault", pack(&fault_pb::HttpFault::default())).build();
    let mut call = world.start(get("a", "/"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (403, &b"RBAC: access denied"[..]));
    assert_eq!(call.exchange.info().details.as_str(), "rbac_access_denied_matched_policy[ns[a]-policy[p]-rule[0]]");
    assert_eq!(call.flags(), "-");
    let world = with_fault().filter("fault", pack(&fault_pb::HttpFault::default())).build();
    let mut call = world.start(get("a", "/"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body, reply.cause), (418, &b"fault filter abort"[..], Cause::FaultAbort));
    assert_eq!((call.flags().as_str(), call.exchange.info().details.as_str()), ("FI", "fault_filter_abort"));
}

#[test]
fn a_delay_comes_before_the_time_out() {
    let fault = fault_pb::HttpFault {
        delay: Some(envoy_types::pb::envoy::extensions::filters::common::fault::v3::FaultDelay {
            percentage: Some(FractionalPercent { numerator: 100, denominator: 0 }),
            fault_delay_secifier: Some(
                envoy_types::pb::envoy::extensions::filters::common::fault::v3::fault_delay::FaultDelaySecifier::FixedDelay(
                    secs(7).unwrap(),
                ),
            ),
        }),
        ..Default::default()
    };
    let mut one = with(to("/", "a"), |action| action.timeout = secs(1));
    one.typed_per_filter_config.insert("fault".to_owned(), pack(&fault));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])])
        .filter("fault", pack(&fault_pb::HttpFault::default()))
        .build();
    let mut call = world.start(get("a", "/"));
    assert_eq!(call.wait(), Duration::from_secs(7));
    call.pass(Duration::from_secs(7));
    call.elapsed();
    drop(call.attempt());
    assert_eq!(call.flags(), "DI");
}

#[test]
fn preflights_and_origins() {
    let policy = cors_pb::CorsPolicy {
        allow_origin_string_match: vec![StringMatcher {
            match_pattern: Some(MatchPattern::Exact("https://good".to_owned())),
            ..Default::default()
        }],
        allow_methods: "GET".to_owned(),
        forward_not_matching_preflights: yes(),
        ..Default::default()
    };
    let mut one = to("/", "a");
    one.typed_per_filter_config.insert("cors".to_owned(), pack(&policy));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])])
        .filter("cors", pack(&cors_pb::Cors::default()))
        .build();
    let request = |method: &str, origin: &str| {
        let mut head = RequestHead::new(method, "a", "/");
        head.fields.push("origin", origin.as_bytes());
        head.fields.push("access-control-request-method", b"GET");
        head
    };
    let mut call = world.start(request("OPTIONS", "https://good"));
    let reply = call.reply();
    assert_eq!((reply.head.status, reply.cause), (200, Cause::CorsPreflight));
    assert_eq!(reply.head.fields.get("access-control-allow-origin"), Some(&b"https://good"[..]));
    let mut call = world.start(request("OPTIONS", "https://evil"));
    drop(call.attempt());
    let mut call = world.start(request("GET", "https://good"));
    drop(call.attempt());
    let response = call.upstream(ResponseHead::new(200));
    assert_eq!(response.fields.get("access-control-allow-origin"), Some(&b"https://good"[..]));
}
