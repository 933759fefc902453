//! Limits of a cluster, and hosts that are left out.

use super::*;

#[test]
fn circuit_breakers() {
    let mut tight = cluster("a", &[1]);
    tight.circuit_breakers = Some(cluster_pb::CircuitBreakers {
        thresholds: vec![cluster_pb::circuit_breakers::Thresholds {
            max_requests: number(1),
            max_retries: number(1),
            ..Default::default()
        }],
        ..Default::default()
    });
    let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![tight]).build();
    let mut first = world.start(get("a", "/"));
    let held = first.attempt();
    let mut second = world.start(get("a", "/"));
    let reply = second.reply();
    assert_eq!((reply.head.status, second.flags().as_str()), (503, "UO"));
    assert_eq!(reply.head.fields.get("x-envoy-overloaded"), Some(&b"true"[..]));
    assert!(reply.body.ends_with(b"reset reason: overflow"));
    drop(held);
    assert!(matches!(world.start(get("a", "/")).step(), Step::Forward(_)));
}

#[test]
fn outliers_are_left_out_and_come_back() {
    let mut watched = cluster("a", &[1, 2]);
    watched.outlier_detection = Some(cluster_pb::OutlierDetection {
        consecutive_5xx: number(2),
        enforcing_consecutive_5xx: number(100),
        enforcing_success_rate: number(0),
        max_ejection_percent: number(50),
        base_ejection_time: secs(30),
        ..Default::default()
    });
    let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![watched]).build();
    let mut bad = None;
    for seed in 0..40 {
        let mut call = world.start_seeded(get("a", "/"), seed, true);
        let address = call.attempt().picked.host.address.to_string();
        let is_bad = *bad.get_or_insert_with(|| address.clone()) == address;
        call.upstream(ResponseHead::new(if is_bad { 500 } else { 200 }));
        if seed > 30 {
            assert!(!is_bad, "ejected long ago");
        }
    }
    let shared = world.worker.shared();
    assert!(shared.clusters()[0].ejected.get() == 1);
    shared.sweep(&world.config, world.now.mono + Duration::from_secs(31));
    assert!(shared.clusters()[0].ejected.get() == 0);
}

#[test]
fn a_retry_that_the_limit_refuses_leaves_the_answer_it_was_to_replace() {
    let one = with(to("/", "a"), |action| action.retry_policy = Some(retries("5xx", 2)));
    let mut tight = cluster("a", &[1]);
    tight.circuit_breakers = Some(cluster_pb::CircuitBreakers {
        thresholds: vec![cluster_pb::circuit_breakers::Thresholds { max_retries: number(1), ..Default::default() }],
        ..Default::default()
    });
    let world = Http::new(vec![host(&["*"], vec![one])], vec![tight]).build();
    let retries = || world.worker.shared().clusters()[0].retries.get();
    let mut first = world.start(get("a", "/"));
    drop(first.attempt());
    first.upstream(ResponseHead::new(500));
    let wait = first.wait();
    assert_eq!(retries(), 1, "from the moment it is planned");
    let refused = |what: &str| {
        let mut other = world.start(get("a", "/"));
        drop(other.attempt());
        let answer = other.upstream(ResponseHead::new(500));
        assert!(matches!(other.step(), Step::Respond), "{what}");
        assert_eq!((answer.status, other.flags().as_str()), (500, "UO"), "{what}");
        assert_eq!((other.exchange.info().attempts, other.exchange.info().details.as_str()), (1, "via_upstream"));
    };
    refused("while the other waits");
    first.pass(wait);
    first.elapsed();
    drop(first.attempt());
    refused("while the other tries again");
    first.upstream(ResponseHead::new(500));
    let wait = first.wait();
    assert_eq!(retries(), 1, "its second retry has the place of the first");
    first.pass(wait);
    first.elapsed();
    drop(first.attempt());
    first.upstream(ResponseHead::new(200));
    assert_eq!((retries(), first.flags().as_str()), (0, "-"), "given back with the answer");
    let mut gone = world.start(get("a", "/"));
    drop(gone.attempt());
    gone.upstream(ResponseHead::new(500));
    gone.wait();
    assert_eq!(retries(), 1);
    drop(gone);
    assert_eq!(retries(), 0, "given back by a client that left");
    assert_eq!(world.worker.shared().clusters()[0].tallies.retry_overflows.get(), 2);
}

/// A cluster of one host that so many failures in a row eject.
fn watched(failures: u32) -> cluster_pb::Cluster {
    let mut watched = cluster("a", &[1]);
    watched.outlier_detection = Some(cluster_pb::OutlierDetection {
        consecutive_5xx: number(failures),
        enforcing_success_rate: number(0),
        max_ejection_percent: number(100),
        ..Default::default()
    });
    watched
}

#[test]
fn a_time_that_ends_between_two_tries_is_nobodys_failure() {
    let one = with(to("/", "a"), |action| {
        action.timeout = secs(1);
        action.retry_policy = Some(retries("5xx", 2));
    });
    let world = Http::new(vec![host(&["*"], vec![one])], vec![watched(2)]).build();
    let ejected = || world.worker.shared().clusters()[0].ejected.get();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    call.upstream(ResponseHead::new(500));
    call.wait();
    call.pass(Duration::from_secs(1));
    call.elapsed();
    assert_eq!((call.reply().head.status, ejected()), (504, 0));
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    call.pass(Duration::from_secs(1));
    call.elapsed();
    assert_eq!((call.reply().head.status, ejected()), (504, 1), "one that ends a try is the host's");
}

#[test]
fn failures_of_our_own_eject_nobody() {
    let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![watched(1)]).build();
    // A full pool; a request that cannot be written to this upstream.
    for own in [Cause::UpstreamOverflow, Cause::LocalReset] {
        let mut call = world.start(get("a", "/"));
        call.fail(Failure::unsent(own));
        assert_eq!(call.reply().head.status, 503);
        assert_eq!(world.worker.shared().clusters()[0].ejected.get(), 0, "{own:?}");
    }
    let mut call = world.start(get("a", "/"));
    call.fail(Failure::unsent(Cause::ConnectFailed));
    assert_eq!(world.worker.shared().clusters()[0].ejected.get(), 1);
}

#[test]
fn mirrors_are_copies_with_limits_of_their_own() {
    let one = with(to("/", "a"), |action| {
        action.request_mirror_policies = vec![route::route_action::RequestMirrorPolicy {
            cluster: "b".to_owned(),
            disable_shadow_host_suffix_append: true,
            ..Default::default()
        }];
    });
    let clusters = vec![cluster("a", &[1]), cluster("b", &[2])];
    let world = Http::new(vec![host(&["*"], vec![one])], clusters).build();
    let mut call = world.start(get("h", "/"));
    let attempt = call.attempt();
    assert_eq!(attempt.mirrors.len(), 1);
    assert_eq!(&*attempt.mirrors[0].attempt.cluster.name, "b");
    assert_eq!(attempt.mirrors[0].head.authority(), b"h");
}
