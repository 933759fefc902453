use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::rbac::v3 as rbac;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use proto::any::pack;

use super::*;
use crate::config::NodeFacts;
use crate::record::NoRecord;
use crate::testing::{World, address, cluster, filter_of, number};

fn world(clusters: &[(&str, u32)], policy: Option<i32>, attempts: u32) -> World {
    let weighted = tcp::tcp_proxy::WeightedCluster {
        clusters: clusters
            .iter()
            .map(|(name, weight)| tcp::tcp_proxy::weighted_cluster::ClusterWeight {
                name: (*name).to_owned(),
                weight: *weight,
                ..Default::default()
            })
            .collect(),
    };
    let proxy = tcp::TcpProxy {
        stat_prefix: "t".to_owned(),
        max_connect_attempts: number(attempts),
        cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::WeightedClusters(weighted)),
        ..Default::default()
    };
    let policy = policy.map(|action| {
        let any = rbac::Policy {
            permissions: vec![rbac::Permission { rule: Some(rbac::permission::Rule::Any(true)) }],
            principals: vec![rbac::Principal { identifier: Some(rbac::principal::Identifier::Any(true)) }],
            ..Default::default()
        };
        let rules = rbac::Rbac { action, policies: [("p".to_owned(), any)].into(), ..Default::default() };
        let config = network_rbac::Rbac { rules: Some(rules), stat_prefix: "tcp.".to_owned(), ..Default::default() };
        filter_of(pack(&config))
    });
    let listener = listener::Listener {
        name: "l".to_owned(),
        address: Some(address("0.0.0.0", 9000)),
        filter_chains: vec![listener::FilterChain {
            filters: policy.into_iter().chain([filter_of(pack(&proxy))]).collect(),
            ..Default::default()
        }],
        ..Default::default()
    };
    World::new(&[listener], &[cluster("a", &[1, 2]), cluster("b", &[3])], NodeFacts::default())
}

fn start(world: &World, seed: u64) -> (Stream, StreamStep) {
    let chain = world.chain();
    let recorder = &mut NoRecord;
    Stream::start(&world.env(), StreamStart { chain: &chain, conn: &world.conn, seed, recorder })
}

#[test]
fn a_connection_is_relayed() {
    let world = world(&[("a", 1)], None, 1);
    let (mut stream, step) = start(&world, 1);
    let StreamStep::Connect(attempt) = step else { panic!("{step:?}") };
    assert_eq!(&*attempt.attempt.cluster.name, "a");
    let step = stream.resume(&world.env(), StreamAnswer::Connected, &mut NoRecord);
    let hour = Duration::from_hours(1);
    assert!(matches!(step, StreamStep::Relay { idle_timeout: Some(idle), duration_max: None } if idle == hour));
}

#[test]
fn weights_are_drawn_per_connection() {
    let world = world(&[("a", 3), ("b", 1)], None, 1);
    let drawn = (0..4000).filter(|seed| {
        let (_, step) = start(&world, *seed);
        matches!(step, StreamStep::Connect(attempt) if &*attempt.attempt.cluster.name == "b")
    });
    let drawn = drawn.count();
    assert!((900..1100).contains(&drawn), "{drawn}");
}

#[test]
fn connects_are_tried_elsewhere() {
    let world = world(&[("a", 1)], None, 2);
    let (mut stream, step) = start(&world, 1);
    let StreamStep::Connect(first) = step else { panic!("{step:?}") };
    let refused = || StreamAnswer::Failed(Cause::ConnectFailed, "refused".into());
    let StreamStep::Connect(second) = stream.resume(&world.env(), refused(), &mut NoRecord) else { panic!() };
    assert_ne!(first.attempt.picked.host.address, second.attempt.picked.host.address);
    let step = stream.resume(&world.env(), refused(), &mut NoRecord);
    assert!(matches!(step, StreamStep::Close(Cause::ConnectFailed)));
    assert_eq!(crate::access_log::flags(stream.info()).as_deref(), Some("UF,URX"));
}

#[test]
fn policy_and_missing_clusters_close() {
    let (stream, step) = start(&world(&[("a", 1)], Some(1), 1), 1);
    assert!(matches!(step, StreamStep::Close(Cause::RbacDeniedConnection)));
    assert_eq!(stream.info().termination.as_str(), "rbac_access_denied_matched_policy[p]");
    let (_, step) = start(&world(&[("a", 1)], Some(0), 1), 1);
    assert!(matches!(step, StreamStep::Connect(_)));
    let (_, step) = start(&world(&[("gone", 1)], None, 1), 1);
    assert!(matches!(step, StreamStep::Close(Cause::ClusterNotFound)));
}

#[test]
fn a_full_pool_is_not_tried_again() {
    let world = world(&[("a", 1)], None, 3);
    let (mut stream, step) = start(&world, 1);
    assert!(matches!(step, StreamStep::Connect(_)));
    let full = StreamAnswer::Failed(Cause::UpstreamOverflow, "".into());
    let step = stream.resume(&world.env(), full, &mut NoRecord);
    assert!(matches!(step, StreamStep::Close(Cause::UpstreamOverflow)));
    assert_eq!(crate::access_log::flags(stream.info()).as_deref(), Some("UO"));
}
