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
