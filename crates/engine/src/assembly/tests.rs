use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3::{
    HttpUri, TransportSocket, TypedExtensionConfig, http_uri, transport_socket,
};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as ext_authz;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::google::protobuf::Any;
use proto::any::pack;

use super::*;
use crate::testing::{address, cluster, filter_of, host, http_filter, to};

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
    assert_eq!(assembly.newest.wanted().endpoints, BTreeSet::from(["a".into()]));
    assert_eq!(assembly.next().waiting, BTreeSet::from([(Kind::Cluster, "a".into())]));
    assert_eq!(names(&assembly.publish().clusters), ["b"]);
    let assignment = ClusterLoadAssignment { cluster_name: "a".to_owned(), ..Default::default() };
    assert_eq!(assembly.apply_endpoints(&[raw("a", &assignment)], &[]), []);
    let config = assembly.publish();
    assert_eq!((names(&config.clusters), config.generation), (vec!["a", "b"], 2));
    assert!(assembly.next().waiting.is_empty());
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
    assert!(assembly.publish().listeners.is_empty());
    assembly.apply_routes(&[table("one")], &[]);
    let first = assembly.publish();
    assert_eq!(first.listeners.len(), 1);
    assembly.apply_listeners(&[raw("l", &of("two"))], &[]);
    let second = assembly.publish();
    assert_eq!(second.listeners.get("l").unwrap().route_tables(), ["one".into()], "the old one serves");
    assembly.apply_routes(&[table("two")], &[]);
    let third = assembly.publish();
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
    let config = assembly.publish();
    assert_eq!(names(&config.clusters), ["a", "b"]);
    let set = config.endpoints_of(config.clusters.get("a").unwrap()).unwrap();
    assert_eq!(set.iter().next().unwrap().address.ip().unwrap().port(), 1);
    assembly.apply_clusters(&[], &["b".into()]);
    assert_eq!(names(&assembly.publish().clusters), ["a"]);
}

/// What is there, and what has waited long enough.
#[derive(Default)]
struct Facts {
    secrets: BTreeSet<&'static str>,
    endpoints: BTreeSet<&'static str>,
    waited: BTreeSet<(Kind, &'static str)>,
}

impl There for Facts {
    fn has_secret(&self, name: &str) -> bool {
        self.secrets.contains(name)
    }

    fn has_endpoints(&self, service: &str) -> bool {
        self.endpoints.contains(service)
    }

    fn is_resolved(&self, _: &str) -> bool {
        false
    }

    fn gives_up(&self, kind: Kind, name: &Name) -> bool {
        self.waited.contains(&(kind, &**name))
    }
}

/// What is received, and what serves.
#[derive(Default)]
struct Side {
    newest: Tables,
    serving: Tables,
    facts: Facts,
}

impl Side {
    fn clusters(&mut self, update: &[cluster_pb::Cluster], removed: &[&str]) {
        let update: Vec<Raw> = update.iter().map(|cluster| raw(&cluster.name, cluster)).collect();
        let removed: Vec<Name> = removed.iter().map(|name| (*name).into()).collect();
        let (next, rejected) = lower::apply_clusters(&self.newest.clusters, &update, &removed);
        assert_eq!(rejected, []);
        self.newest.clusters = Arc::new(next);
    }

    /// The route table `table`, all to this cluster.
    fn routes(&mut self, cluster: &str) {
        let hosts = vec![host(&["*"], vec![to("/", cluster)])];
        let body = RouteConfiguration { name: "table".to_owned(), virtual_hosts: hosts, ..Default::default() };
        let (next, rejected) = lower::apply_routes(&self.newest.routes, &[raw("table", &body)], &[]);
        assert_eq!(rejected, []);
        self.newest.routes = Arc::new(next);
    }

    fn listener(&mut self, listener: &listener::Listener) {
        let (next, rejected) = lower::apply_listeners(&self.newest.listeners, &[raw("l", listener)], &[]);
        assert_eq!(rejected, []);
        self.newest.listeners = Arc::new(next);
    }

    /// Serves what comes next; what waits.
    fn publish(&mut self) -> String {
        let next = next(&self.newest, &self.serving, &self.facts);
        self.serving = next.tables;
        let waiting: Vec<String> = next.waiting.iter().map(|(kind, name)| format!("{kind:?} {name}")).collect();
        waiting.join(", ")
    }

    /// The cluster that requests reach.
    fn leads_to(&self) -> Option<&Name> {
        let named = self.serving.routes.get("table")?.clusters().next()?;
        self.serving.clusters.get(named).map(|cluster| &cluster.name)
    }
}

#[test]
fn a_route_leads_to_its_old_cluster_until_the_new_one_serves() {
    let mut side = Side::default();
    side.facts.endpoints.insert("old");
    side.clusters(&[eds("old")], &[]);
    side.routes("old");
    side.listener(&listener_with(&manager_of("table")));
    assert_eq!(side.publish(), "");
    assert_eq!(side.leads_to().map(|name| &**name), Some("old"));
    // The old one is even gone, and so are its endpoints.
    side.clusters(&[eds("new")], &["old"]);
    side.routes("new");
    assert_eq!(side.publish(), "Cluster new, Routes table");
    assert_eq!(side.leads_to().map(|name| &**name), Some("old"));
    side.facts.endpoints.insert("new");
    assert_eq!(side.publish(), "");
    assert_eq!(side.leads_to().map(|name| &**name), Some("new"));
    assert_eq!(names(&side.serving.clusters), ["new"]);
}

#[test]
fn who_has_waited_long_enough_serves_without() {
    let mut side = Side::default();
    side.clusters(&[eds("a")], &[]);
    side.routes("a");
    side.listener(&listener_with(&manager_of("table")));
    assert_eq!(side.publish(), "Cluster a, Routes table, Listener l");
    assert!(side.serving.listeners.is_empty());
    // Its routes are there, and it would be a hole without.
    side.facts.waited.insert((Kind::Listener, "l"));
    side.publish();
    assert_eq!((side.serving.listeners.len(), side.serving.routes.len()), (1, 1));
    side.facts.waited.insert((Kind::Cluster, "a"));
    assert_eq!(side.publish(), "");
    assert_eq!(side.leads_to().map(|name| &**name), Some("a"));
    // That serves: nobody waits for it again.
    side.facts.waited.clear();
    assert_eq!(side.publish(), "");
}

#[test]
fn a_listener_that_names_clusters_itself_waits_for_them() {
    let mut side = Side::default();
    let proxy = TcpProxy {
        stat_prefix: "x".to_owned(),
        cluster_specifier: Some(tcp_proxy::ClusterSpecifier::Cluster("a".to_owned())),
        ..Default::default()
    };
    let chain = listener::FilterChain { filters: vec![filter_of(pack(&proxy))], ..Default::default() };
    let base = listener_with(&manager_of("table"));
    side.clusters(&[eds("a")], &[]);
    side.listener(&listener::Listener { filter_chains: vec![chain], ..base });
    assert_eq!(side.publish(), "Cluster a, Routes l, Listener l");
    side.facts.endpoints.insert("a");
    assert_eq!(side.publish(), "");
}

#[test]
fn a_listener_waits_for_its_authorizer_and_the_old_one_keeps_its_own() {
    let asking = |cluster: &str| {
        let service = ext_authz::HttpService {
            server_uri: Some(HttpUri {
                http_upstream_type: Some(http_uri::HttpUpstreamType::Cluster(cluster.to_owned())),
                ..Default::default()
            }),
            ..Default::default()
        };
        let filter = ext_authz::ExtAuthz {
            services: Some(ext_authz::ext_authz::Services::HttpService(service)),
            ..Default::default()
        };
        let mut manager = manager_of("table");
        manager.http_filters.insert(0, http_filter("authz", pack(&filter)));
        listener_with(&manager)
    };
    let mut side = Side::default();
    side.facts.endpoints.insert("old");
    side.clusters(&[cluster("up", &[1]), eds("old")], &[]);
    side.routes("up");
    side.listener(&asking("old"));
    assert_eq!(side.publish(), "");
    side.clusters(&[eds("new")], &["old"]);
    side.listener(&asking("new"));
    assert_eq!(side.publish(), "Cluster new, Routes l, Listener l");
    assert_eq!(names(&side.serving.clusters), ["up", "old"]);
    side.facts.endpoints.insert("new");
    assert_eq!(side.publish(), "");
    assert_eq!(names(&side.serving.clusters), ["up", "new"]);
}

#[test]
fn listeners_and_clusters_wait_for_secrets_that_what_serves_does_not_lack() {
    let secret = |name: &str| tls::SdsSecretConfig { name: name.to_owned(), ..Default::default() };
    let socket = |context: Any| TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(context)),
    };
    let common = |name: &str| {
        Some(tls::CommonTlsContext { tls_certificate_sds_secret_configs: vec![secret(name)], ..Default::default() })
    };
    let with = |name: &str, port: u32| {
        let mut made = listener_with(&manager_of("table"));
        made.address = Some(address("0.0.0.0", port));
        let context = tls::DownstreamTlsContext { common_tls_context: common(name), ..Default::default() };
        made.filter_chains[0].transport_socket = Some(socket(pack(&context)));
        made
    };
    let upstream = |name: &str, port: u32| {
        let context = tls::UpstreamTlsContext { common_tls_context: common(name), ..Default::default() };
        cluster_pb::Cluster { transport_socket: Some(socket(pack(&context))), ..cluster("a", &[port]) }
    };
    let serves = |side: &Side| {
        let port = side.serving.listeners.get("l").map(|listener| listener.address.port());
        (port, side.serving.clusters.get("a").map(|cluster| cluster.needs().secrets))
    };
    let mut side = Side::default();
    side.clusters(&[upstream("one", 1)], &[]);
    side.routes("none");
    side.listener(&with("one", 1));
    assert_eq!(side.publish(), "Cluster a, Listener l");
    side.facts.secrets.insert("one");
    assert_eq!(side.publish(), "");
    side.clusters(&[upstream("two", 2)], &[]);
    side.listener(&with("two", 2));
    assert_eq!(side.publish(), "Cluster a, Listener l");
    assert_eq!(serves(&side), (Some(1), Some(vec!["one".into()])));
    side.facts.waited = BTreeSet::from([(Kind::Cluster, "a"), (Kind::Listener, "l")]);
    assert_eq!(side.publish(), "");
    assert_eq!(serves(&side), (Some(2), Some(vec!["two".into()])));
    // It serves without; a newer version that lacks the same has nothing to wait for.
    side.facts.waited.clear();
    side.listener(&with("two", 3));
    assert_eq!(side.publish(), "");
    assert_eq!(serves(&side).0, Some(3));
}
