use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use proto::any::pack;

use super::*;
use crate::testing::{address, cluster, filter_of, http_filter};

fn eds(name: &str) -> cluster_pb::Cluster {
    cluster_pb::Cluster {
        load_assignment: None,
        cluster_discovery_type: Some(cluster_pb::cluster::ClusterDiscoveryType::Type(3)),
        eds_cluster_config: Some(cluster_pb::cluster::EdsClusterConfig::default()),
        ..cluster(name, &[])
    }
}

fn raw<M: prost::Name>(name: &str, message: &M) -> Raw {
    Raw { name: name.into(), body: pack(message) }
}

fn names<T>(table: &Table<T>) -> Vec<&str> {
    table.iter().map(|(name, _)| &**name).collect()
}

#[test]
fn a_cluster_waits_for_its_endpoints() {
    let mut assembly = Assembly::default();
    assert_eq!(assembly.apply_clusters(&[raw("a", &eds("a")), raw("b", &cluster("b", &[1]))], &[]), []);
    assert_eq!(assembly.wanted().endpoints, ["a".into()]);
    assert!(assembly.is_warming(&AllSecrets));
    assert_eq!(names(&assembly.publish(&AllSecrets).clusters), ["b"]);
    let assignment = ClusterLoadAssignment { cluster_name: "a".to_owned(), ..Default::default() };
    assert_eq!(assembly.apply_endpoints(&[raw("a", &assignment)], &[]), []);
    let config = assembly.publish(&AllSecrets);
    assert_eq!((names(&config.clusters), config.generation), (vec!["a", "b"], 2));
    assert!(!assembly.is_warming(&AllSecrets));
}

fn manager_of(table: &str) -> hcm::HttpConnectionManager {
    hcm::HttpConnectionManager {
        http_filters: vec![http_filter("router", pack(&Router::default()))],
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
            route_config_name: table.to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn listener_with(manager: &hcm::HttpConnectionManager) -> listener::Listener {
    listener::Listener {
        name: "l".to_owned(),
        address: Some(address("0.0.0.0", 80)),
        filter_chains: vec![listener::FilterChain { filters: vec![filter_of(pack(manager))], ..Default::default() }],
        ..Default::default()
    }
}

#[test]
fn a_server_name_that_would_split_responses_is_refused() {
    for (name, expect) in [("a b/1.0", 0), ("a\r\nset-cookie: b", 1), ("a\0", 1), ("a\u{7f}", 1)] {
        let manager = hcm::HttpConnectionManager { server_name: name.to_owned(), ..manager_of("one") };
        let rejected = Assembly::default().apply_listeners(&[raw("l", &listener_with(&manager))], &[]);
        assert_eq!(rejected.len(), expect, "{name:?}");
        assert!(rejected.iter().all(|one| one.reason.contains("server_name holds")), "{rejected:?}");
    }
}

#[test]
fn a_listener_waits_for_its_routes_and_the_old_one_serves() {
    let of = |table: &str| listener_with(&manager_of(table));
    let table = |name: &str| raw(name, &RouteConfiguration { name: name.to_owned(), ..Default::default() });
    let mut assembly = Assembly::default();
    assembly.apply_listeners(&[raw("l", &of("one"))], &[]);
    assert!(assembly.publish(&AllSecrets).listeners.is_empty());
    assembly.apply_routes(&[table("one")], &[]);
    let first = assembly.publish(&AllSecrets);
    assert_eq!(first.listeners.len(), 1);
    assembly.apply_listeners(&[raw("l", &of("two"))], &[]);
    let second = assembly.publish(&AllSecrets);
    assert_eq!(second.listeners.get("l").unwrap().route_tables(), ["one".into()], "the old one serves");
    assembly.apply_routes(&[table("two")], &[]);
    let third = assembly.publish(&AllSecrets);
    assert_eq!(third.listeners.get("l").unwrap().route_tables(), ["two".into()]);
    let chain = first.listeners.get("l").unwrap().all_chains().next().unwrap().clone();
    let now = third.current_chain("l", &chain);
    assert!(!Arc::ptr_eq(&now, &chain), "an old connection meets the new policy");
}

#[test]
fn a_refused_resource_keeps_its_last_value() {
    let mut assembly = Assembly::default();
    assembly.apply_clusters(&[raw("a", &cluster("a", &[1]))], &[]);
    let bad = cluster_pb::Cluster { upstream_config: Some(TypedExtensionConfig::default()), ..cluster("a", &[2]) };
    let rejected = assembly.apply_clusters(&[raw("a", &bad), raw("b", &cluster("b", &[3]))], &[]);
    assert_eq!(rejected.len(), 1);
    assert_eq!(rejected[0].reason, "upstream_config is not supported");
    let config = assembly.publish(&AllSecrets);
    assert_eq!(names(&config.clusters), ["a", "b"]);
    let set = config.endpoints_of(config.clusters.get("a").unwrap()).unwrap();
    assert_eq!(set.iter().next().unwrap().address.ip().unwrap().port(), 1);
    assembly.apply_clusters(&[], &["b".into()]);
    assert_eq!(names(&assembly.publish(&AllSecrets).clusters), ["a"]);
}
