//! Which host a hash leads to.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::config::route::v3::route_action::hash_policy as hash;

use super::*;

fn by(policy: hash::PolicySpecifier) -> route::route_action::HashPolicy {
    route::route_action::HashPolicy { policy_specifier: Some(policy), ..Default::default() }
}

fn ring(name: &str, ports: &[u32]) -> cluster_pb::Cluster {
    cluster_pb::Cluster { lb_policy: cluster_pb::cluster::LbPolicy::RingHash.into(), ..cluster(name, ports) }
}

#[test]
fn a_hash_picks_within_the_cluster_that_the_weights_chose() {
    let weighted = with(to("/", "a"), |action| {
        let share = |name: &str, weight| route::weighted_cluster::ClusterWeight {
            name: name.to_owned(),
            weight: number(weight),
            ..Default::default()
        };
        action.cluster_specifier =
            Some(route::route_action::ClusterSpecifier::WeightedClusters(route::WeightedCluster {
                clusters: vec![share("a", 70), share("b", 30)],
                ..Default::default()
            }));
        let header = hash::Header { header_name: "x-user".to_owned(), ..Default::default() };
        action.hash_policy = vec![by(hash::PolicySpecifier::Header(header))];
    });
    let clusters = vec![ring("a", &[1, 2, 3, 4]), ring("b", &[5, 6, 7, 8])];
    let world = Http::new(vec![host(&["*"], vec![weighted])], clusters).build();
    let mut hosts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut drawn: BTreeMap<String, u32> = BTreeMap::new();
    for seed in 0..1000 {
        let mut head = get("a", "/");
        head.fields.push("x-user", b"jason");
        let attempt = world.start_seeded(head, seed, true).attempt();
        let name = attempt.cluster.name.to_string();
        *drawn.entry(name.clone()).or_default() += 1;
        hosts.entry(name).or_default().insert(attempt.picked.host.address.to_string());
    }
    assert!((640..=760).contains(&drawn["a"]), "the weights, not the hash: {drawn:?}");
    assert!(hosts.values().all(|hosts| hosts.len() == 1), "one user, one host of each: {hosts:?}");
}

#[test]
fn the_clients_address_and_a_query_parameter_stick() {
    let hashed = |policy: hash::PolicySpecifier| {
        let one = with(to("/", "a"), |action| action.hash_policy = vec![by(policy)]);
        Http::new(vec![host(&["*"], vec![one])], vec![ring("a", &[1, 2, 3, 4, 5])]).build()
    };
    let picks = |world: &World, path: &str| -> BTreeSet<String> {
        let pick = |seed| world.start_seeded(get("a", path), seed, true).attempt().picked.host.address.to_string();
        (0..50).map(pick).collect()
    };

    let mut world = hashed(hash::PolicySpecifier::ConnectionProperties(hash::ConnectionProperties { source_ip: true }));
    let mut all = BTreeSet::new();
    for client in 1..40_u8 {
        let mut conn = (*world.conn).clone();
        // Its port does not count.
        conn.peer = ([192, 0, 2, client], 1000 + u16::from(client)).into();
        world.conn = Arc::new(conn);
        let first = picks(&world, "/");
        assert_eq!(first.len(), 1, "{client}: {first:?}");
        all.extend(first);
    }
    assert!(all.len() > 2, "clients differ: {all:?}");

    let name = "user".to_owned();
    let world = hashed(hash::PolicySpecifier::QueryParameter(hash::QueryParameter { name }));
    let users: BTreeSet<String> = (0..40).flat_map(|user| picks(&world, &format!("/?x={user}&user=jason"))).collect();
    assert_eq!(users.len(), 1, "only that parameter counts: {users:?}");
    let users: BTreeSet<String> = (0..40).flat_map(|user| picks(&world, &format!("/?user={user}"))).collect();
    assert!(users.len() > 2, "{users:?}");
    assert!(picks(&world, "/?other=1").len() > 2, "without it, chance decides");
}

#[test]
fn hashes_stick() {
    let one = with(to("/", "a"), |action| {
        use route::route_action::hash_policy as hash;
        action.hash_policy = vec![route::route_action::HashPolicy {
            policy_specifier: Some(hash::PolicySpecifier::Header(hash::Header {
                header_name: "x-user".to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        }];
    });
    let mut ring = cluster("a", &[1, 2, 3, 4, 5]);
    ring.lb_policy = 2;
    let world = Http::new(vec![host(&["*"], vec![one])], vec![ring]).build();
    let pick = |user: &str, seed: u64| {
        let mut head = get("a", "/");
        head.fields.push("x-user", user.as_bytes());
        world.start_seeded(head, seed, true).attempt().picked.host.address.to_string()
    };
    for user in ["a", "b", "c", "d"] {
        let first = pick(user, 1);
        assert!((2..50).all(|seed| pick(user, seed) == first));
    }
    let hosts: BTreeSet<_> = (0..40).map(|user| pick(&user.to_string(), 1)).collect();
    assert!(hosts.len() > 2, "{hosts:?}");
}

#[test]
fn the_key_of_a_hash_is_what_goes_upstream() {
    use route::route_action::hash_policy as hash;
    let by = |specifier: hash::PolicySpecifier| {
        let mut one = with(to("/", "a"), |action| {
            action.hash_policy =
                vec![route::route_action::HashPolicy { policy_specifier: Some(specifier), ..Default::default() }];
        });
        one.request_headers_to_add = vec![header("x-user", "everybody", false)];
        let mut ring = cluster("a", &[1, 2, 3, 4, 5]);
        ring.lb_policy = 2;
        Http::new(vec![host(&["*"], vec![one])], vec![ring]).build()
    };
    let picks = |world: &World, name: &str| -> BTreeSet<String> {
        let pick = |number: u32| {
            let mut head = get("a", "/");
            head.fields.push(name, format!("10.0.0.{number}").as_bytes());
            world.start(head).attempt().picked.host.address.to_string()
        };
        (1..40).map(pick).collect()
    };
    let header = hash::PolicySpecifier::Header(hash::Header { header_name: "x-user".to_owned(), ..Default::default() });
    assert_eq!(picks(&by(header), "x-user").len(), 1, "the route writes the key");
    let properties = hash::ConnectionProperties { source_ip: true };
    let source = by(hash::PolicySpecifier::ConnectionProperties(properties));
    assert!(picks(&source, "x-forwarded-for").len() > 2, "the trusted address is the client's");
}

#[test]
fn a_cookie_is_made_for_the_hash() {
    let one = with(to("/", "a"), |action| {
        use route::route_action::hash_policy as hash;
        action.hash_policy = vec![route::route_action::HashPolicy {
            policy_specifier: Some(hash::PolicySpecifier::Cookie(hash::Cookie {
                name: "user".to_owned(),
                ttl: secs(0),
                path: "/p".to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        }];
    });
    let mut ring = cluster("a", &[1, 2, 3, 4, 5]);
    ring.lb_policy = 5;
    let world = Http::new(vec![host(&["*"], vec![one])], vec![ring]).build();
    let mut call = world.start(get("a", "/"));
    let first = call.attempt().picked.host.address.clone();
    let response = call.upstream(ResponseHead::new(200));
    let cookie = response.fields.get_str("set-cookie").unwrap().to_owned();
    assert!(cookie.starts_with("user=\"") && cookie.ends_with("; Path=/p; HttpOnly"), "{cookie}");
    let mut head = get("a", "/");
    head.fields.push("cookie", cookie.split(';').next().unwrap().as_bytes());
    let mut again = world.start_seeded(head, 99, true);
    assert_eq!(again.attempt().picked.host.address, first);
    assert!(!again.upstream(ResponseHead::new(200)).fields.contains("set-cookie"));
}
