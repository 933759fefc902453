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
fn a_full_pool_ejects_nobody() {
    let mut watched = cluster("a", &[1]);
    watched.outlier_detection = Some(cluster_pb::OutlierDetection {
        consecutive_5xx: number(1),
        enforcing_success_rate: number(0),
        ..Default::default()
    });
    let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![watched]).build();
    let mut call = world.start(get("a", "/"));
    call.fail(Failure::unsent(Cause::UpstreamOverflow));
    assert_eq!(call.reply().head.status, 503);
    assert_eq!(world.worker.shared().clusters()[0].ejected.get(), 0);
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
