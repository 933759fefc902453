//! Small configurations for the unit tests of this crate, built from messages.
#![expect(clippy::unnecessary_wraps, reason = "fields of messages are optional")]

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3 as cluster;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration, UInt32Value};
use proto::any::pack;
use types::{RequestHead, ResponseHead};

use crate::assembly::Assembly;
use crate::chain::FilterChain;
use crate::config::{NodeFacts, RuntimeConfig};
use crate::exchange::{Answer, Attempt, Env, Exchange, Failure, LocalReply, Start, Step};
use crate::facts::{ConnFacts, Now};
use crate::lower::Raw;
use crate::record::Record;
use crate::shared::SharedTable;
use crate::worker::Worker;

pub(crate) fn secs(seconds: i64) -> Option<ProtoDuration> {
    Some(ProtoDuration { seconds, nanos: 0 })
}

pub(crate) fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

pub(crate) fn yes() -> Option<envoy_types::pb::google::protobuf::BoolValue> {
    Some(envoy_types::pb::google::protobuf::BoolValue { value: true })
}

pub(crate) fn address(ip: &str, port: u32) -> core::Address {
    let socket = core::SocketAddress {
        address: ip.to_owned(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port)),
        ..Default::default()
    };
    core::Address { address: Some(core::address::Address::SocketAddress(socket)) }
}

/// A static cluster with one endpoint for each port on 10.0.0.1.
pub(crate) fn cluster(name: &str, ports: &[u32]) -> cluster::Cluster {
    let endpoints = ports.iter().map(|port| endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(endpoint::Endpoint {
            address: Some(address("10.0.0.1", *port)),
            ..Default::default()
        })),
        ..Default::default()
    });
    cluster::Cluster {
        name: name.to_owned(),
        load_assignment: Some(endpoint::ClusterLoadAssignment {
            cluster_name: name.to_owned(),
            endpoints: vec![endpoint::LocalityLbEndpoints { lb_endpoints: endpoints.collect(), ..Default::default() }],
            ..Default::default()
        }),
        common_lb_config: Some(cluster::cluster::CommonLbConfig {
            healthy_panic_threshold: Some(envoy_types::pb::envoy::r#type::v3::Percent { value: 0.0 }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A route of a prefix to a cluster, without time-out.
pub(crate) fn to(prefix: &str, cluster: &str) -> route::Route {
    route::Route {
        name: format!("to-{cluster}"),
        r#match: Some(route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::Prefix(prefix.to_owned())),
            ..Default::default()
        }),
        action: Some(route::route::Action::Route(action(cluster))),
        ..Default::default()
    }
}

pub(crate) fn action(cluster: &str) -> route::RouteAction {
    route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: secs(0),
        ..Default::default()
    }
}

/// The route with its action edited.
pub(crate) fn with(mut of: route::Route, edit: impl FnOnce(&mut route::RouteAction)) -> route::Route {
    if let Some(route::route::Action::Route(action)) = &mut of.action {
        edit(action);
    }
    of
}

pub(crate) fn host(domains: &[&str], routes: Vec<route::Route>) -> route::VirtualHost {
    route::VirtualHost {
        name: domains[0].to_owned(),
        domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
        routes,
        ..Default::default()
    }
}

pub(crate) fn http_filter(name: &str, config: Any) -> hcm::HttpFilter {
    hcm::HttpFilter {
        name: name.to_owned(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

pub(crate) fn filter_of(any: Any) -> listener::Filter {
    listener::Filter { config_type: Some(listener::filter::ConfigType::TypedConfig(any)), ..Default::default() }
}

/// One HTTP listener with these virtual hosts in place.
pub(crate) struct Http {
    pub(crate) hcm: hcm::HttpConnectionManager,
    pub(crate) table: route::RouteConfiguration,
    pub(crate) filters: Vec<hcm::HttpFilter>,
    pub(crate) clusters: Vec<cluster::Cluster>,
    pub(crate) node: NodeFacts,
}

impl Http {
    pub(crate) fn new(hosts: Vec<route::VirtualHost>, clusters: Vec<cluster::Cluster>) -> Self {
        Self {
            hcm: hcm::HttpConnectionManager { stat_prefix: "test".to_owned(), ..Default::default() },
            table: route::RouteConfiguration {
                name: "table".to_owned(),
                virtual_hosts: hosts,
                ignore_port_in_host_matching: true,
                ..Default::default()
            },
            filters: Vec::new(),
            clusters,
            node: NodeFacts::default(),
        }
    }

    /// The usual one: every host to cluster `a` with one endpoint.
    pub(crate) fn simple() -> Self {
        Self::new(vec![host(&["*"], vec![to("/", "a")])], vec![cluster("a", &[8001])])
    }

    pub(crate) fn filter(mut self, name: &str, config: Any) -> Self {
        self.filters.push(http_filter(name, config));
        self
    }

    pub(crate) fn build(self) -> World {
        let (listener, clusters, node) = self.resources();
        World::new(&[listener], &clusters, node)
    }

    /// Why the listener is refused.
    pub(crate) fn refused(self) -> String {
        let (listener, _, node) = self.resources();
        let raw = Raw { name: "listener".into(), body: pack(&listener) };
        let rejected = Assembly::new(node).apply_listeners(&[raw], &[]);
        rejected.into_iter().next().expect("it is refused").reason
    }

    fn resources(mut self) -> (listener::Listener, Vec<cluster::Cluster>, NodeFacts) {
        self.filters.push(http_filter("envoy.filters.http.router", pack(&Router::default())));
        self.hcm.http_filters = self.filters;
        self.hcm.route_specifier = Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(self.table));
        let listener = listener::Listener {
            name: "listener".to_owned(),
            address: Some(address("0.0.0.0", 80)),
            filter_chains: vec![listener::FilterChain {
                filters: vec![filter_of(pack(&self.hcm))],
                ..Default::default()
            }],
            ..Default::default()
        };
        (listener, self.clusters, self.node)
    }
}

/// A worker over a configuration, with a clock that stands still.
pub(crate) struct World {
    pub(crate) config: Rc<RuntimeConfig>,
    pub(crate) worker: Worker,
    pub(crate) now: Now,
    pub(crate) conn: Arc<ConnFacts>,
}

impl World {
    pub(crate) fn new(listeners: &[listener::Listener], clusters: &[cluster::Cluster], node: NodeFacts) -> Self {
        let mut assembly = Assembly::new(node);
        let raw = |name: &str, body: Any| Raw { name: name.into(), body };
        let listeners: Vec<_> = listeners.iter().map(|listener| raw(&listener.name, pack(listener))).collect();
        let clusters: Vec<_> = clusters.iter().map(|cluster| raw(&cluster.name, pack(cluster))).collect();
        assert_eq!(assembly.apply_clusters(&clusters, &[]), []);
        assert_eq!(assembly.apply_listeners(&listeners, &[]), []);
        let config = Rc::new(assembly.publish());
        let mono = Instant::now();
        Self {
            config,
            worker: Worker::new(Arc::new(SharedTable::new(mono))),
            now: Now { mono, wall_nanos: 1_700_000_000_000_000_000 },
            conn: Arc::new(ConnFacts::plaintext(
                "listener",
                "10.0.0.9:80".parse().unwrap(),
                "192.0.2.7:1234".parse().unwrap(),
            )),
        }
    }

    pub(crate) fn env(&self) -> Env<'_> {
        Env { config: &self.config, worker: &self.worker, now: self.now }
    }

    pub(crate) fn chain(&self) -> Arc<FilterChain> {
        let (_, listener) = self.config.listeners.iter().next().unwrap();
        Arc::clone(listener.all_chains().next().unwrap())
    }

    /// Starts a request that is complete at once.
    pub(crate) fn start(&self, head: RequestHead) -> Call<'_> {
        self.start_seeded(head, 1, true)
    }

    pub(crate) fn start_seeded(&self, mut head: RequestHead, seed: u64, ended: bool) -> Call<'_> {
        let mut record = Record::default();
        let chain = self.chain();
        let start = Start { chain: &chain, conn: &self.conn, ended, seed, recorder: &mut record };
        let (exchange, step) = Exchange::start(&self.env(), start, &mut head);
        Call { world: self, exchange, head, record, step: Some(step), now: self.now }
    }
}

/// A request under way.
pub(crate) struct Call<'a> {
    world: &'a World,
    pub(crate) exchange: Exchange,
    pub(crate) head: RequestHead,
    pub(crate) record: Record,
    step: Option<Step>,
    pub(crate) now: Now,
}

impl Call<'_> {
    pub(crate) fn step(&mut self) -> Step {
        self.step.take().expect("a step is taken once")
    }

    pub(crate) fn attempt(&mut self) -> Box<Attempt> {
        match self.step() {
            Step::Forward(attempt) => attempt,
            other => panic!("not forwarded: {other:?}"),
        }
    }

    pub(crate) fn reply(&mut self) -> LocalReply {
        match self.step() {
            Step::Reply(reply) => *reply,
            other => panic!("no reply: {other:?}"),
        }
    }

    pub(crate) fn wait(&mut self) -> Duration {
        match self.step() {
            Step::Wait(duration) => duration,
            other => panic!("no wait: {other:?}"),
        }
    }

    pub(crate) fn answer(&mut self, answer: Answer<'_>) {
        let env = Env { now: self.now, ..self.world.env() };
        self.step = Some(self.exchange.resume(&env, answer, &mut self.head, &mut self.record));
    }

    pub(crate) fn fail(&mut self, failure: Failure) {
        self.answer(Answer::Failed(failure));
    }

    /// The upstream answers with this head; gives what goes downstream.
    pub(crate) fn upstream(&mut self, mut head: ResponseHead) -> ResponseHead {
        let env = Env { now: self.now, ..self.world.env() };
        let answer = Answer::Upstream { head: &mut head, ended: true };
        self.step = Some(self.exchange.resume(&env, answer, &mut self.head, &mut self.record));
        head
    }

    pub(crate) fn pass(&mut self, by: Duration) {
        self.now = self.now.after(by);
    }

    pub(crate) fn elapsed(&mut self) {
        self.answer(Answer::Elapsed);
    }

    pub(crate) fn flags(&self) -> String {
        crate::access_log::flags(self.exchange.info()).unwrap_or_else(|| "-".to_owned())
    }
}

pub(crate) fn get(authority: &str, path: &str) -> RequestHead {
    RequestHead::new("GET", authority, path)
}
