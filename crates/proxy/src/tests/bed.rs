//! A proxy, a backend, and configurations for them.

use std::net::SocketAddr;
use std::time::Duration;

use engine::lower::Raw;
use envoy_types::pb::envoy::config::cluster::v3 as cluster;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as upstream;
use envoy_types::pb::google::protobuf::Any;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::options::{Options, Role, StaticResources};
use crate::proxy::Proxy;

/// How long anything may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Where nobody listens: a port that is given to nobody who asks for any.
pub(crate) const NOBODY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(127, 77, 0, 1)), 1);

/// Packs a message.
pub(crate) fn any<M: Message + prost::Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

fn url(name: &str) -> String {
    format!("type.googleapis.com/{name}")
}

fn pack<M: Message>(name: &str, message: &M) -> Any {
    Any { type_url: url(name), value: message.encode_to_vec() }
}

pub(crate) fn address(at: SocketAddr) -> core::Address {
    core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: at.ip().to_string(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(at.port().into())),
            ..Default::default()
        })),
    }
}

/// A static cluster of one endpoint.
pub(crate) fn cluster(name: &str, at: SocketAddr, http2: bool) -> cluster::Cluster {
    let mut made = cluster::Cluster {
        name: name.into(),
        connect_timeout: Some(envoy_types::pb::google::protobuf::Duration { seconds: 2, nanos: 0 }),
        load_assignment: Some(endpoint::ClusterLoadAssignment {
            cluster_name: name.into(),
            endpoints: vec![endpoint::LocalityLbEndpoints {
                lb_endpoints: vec![endpoint::LbEndpoint {
                    host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(endpoint::Endpoint {
                        address: Some(address(at)),
                        ..Default::default()
                    })),
                    ..Default::default()
                }],
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    if http2 {
        set_http_options(&mut made, core::HttpProtocolOptions::default(), Some(core::Http2ProtocolOptions::default()));
    }
    made
}

/// A static cluster of one endpoint with these HTTP settings; HTTP/2 where it has some of those.
pub(crate) fn cluster_with(
    name: &str,
    at: SocketAddr,
    common: core::HttpProtocolOptions,
    http2: Option<core::Http2ProtocolOptions>,
) -> cluster::Cluster {
    let mut made = cluster(name, at, false);
    set_http_options(&mut made, common, http2);
    made
}

fn set_http_options(
    cluster: &mut cluster::Cluster,
    common: core::HttpProtocolOptions,
    http2: Option<core::Http2ProtocolOptions>,
) {
    use options::explicit_http_config::ProtocolConfig;
    use upstream::http_protocol_options as options;
    let protocol = match http2 {
        Some(http2) => ProtocolConfig::Http2ProtocolOptions(http2),
        None => ProtocolConfig::HttpProtocolOptions(core::Http1ProtocolOptions::default()),
    };
    let explicit = options::ExplicitHttpConfig { protocol_config: Some(protocol) };
    let options = upstream::HttpProtocolOptions {
        common_http_protocol_options: Some(common),
        upstream_protocol_options: Some(options::UpstreamProtocolOptions::ExplicitHttpConfig(explicit)),
        ..Default::default()
    };
    let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    cluster.typed_extension_protocol_options.insert(name.into(), pack(name, &options));
}

/// A route on a prefix to a cluster.
pub(crate) fn to_cluster(prefix: &str, cluster: &str) -> route::Route {
    route::Route {
        r#match: Some(route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::Prefix(prefix.into())),
            ..Default::default()
        }),
        action: Some(route::route::Action::Route(route::RouteAction {
            cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(cluster.into())),
            ..Default::default()
        })),
        ..Default::default()
    }
}

/// A connection manager with these routes for every host.
pub(crate) fn manager(routes: Vec<route::Route>) -> hcm::HttpConnectionManager {
    hcm::HttpConnectionManager {
        stat_prefix: "test".into(),
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(route::RouteConfiguration {
            name: "routes".into(),
            virtual_hosts: vec![route::VirtualHost {
                name: "all".into(),
                domains: vec!["*".into()],
                routes,
                ..Default::default()
            }],
            ..Default::default()
        })),
        http_filters: vec![hcm::HttpFilter {
            name: "envoy.filters.http.router".into(),
            config_type: Some(hcm::http_filter::ConfigType::TypedConfig(pack(
                "envoy.extensions.filters.http.router.v3.Router",
                &Router::default(),
            ))),
            ..Default::default()
        }],
        upgrade_configs: vec![hcm::http_connection_manager::UpgradeConfig {
            upgrade_type: "websocket".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// A listener on a free port with one chain that ends in `filter`.
pub(crate) fn listener(name: &str, filter: listener::Filter) -> listener::Listener {
    listener::Listener {
        name: name.into(),
        address: Some(address(([127, 0, 0, 1], 0).into())),
        filter_chains: vec![listener::FilterChain { filters: vec![filter], ..Default::default() }],
        ..Default::default()
    }
}

pub(crate) fn http_filter(manager: &hcm::HttpConnectionManager) -> listener::Filter {
    let name = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    listener::Filter {
        name: "envoy.filters.network.http_connection_manager".into(),
        config_type: Some(listener::filter::ConfigType::TypedConfig(pack(name, manager))),
    }
}

pub(crate) fn tcp_filter(cluster: &str) -> listener::Filter {
    tcp_filter_with(cluster, |_| {})
}

/// A TCP proxy with further settings.
pub(crate) fn tcp_filter_with(cluster: &str, edit: impl FnOnce(&mut tcp_proxy::TcpProxy)) -> listener::Filter {
    let mut proxy = tcp_proxy::TcpProxy {
        stat_prefix: "tcp".into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster(cluster.into())),
        ..Default::default()
    };
    edit(&mut proxy);
    listener::Filter {
        name: "envoy.filters.network.tcp_proxy".into(),
        config_type: Some(listener::filter::ConfigType::TypedConfig(pack(
            "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            &proxy,
        ))),
    }
}

pub(crate) fn raw<M: Message + prost::Name>(name: &str, message: &M) -> Raw {
    Raw { name: name.into(), body: any(message) }
}

/// Starts a proxy with these resources; gives it and its listeners' addresses by name.
pub(crate) async fn start(listeners: Vec<listener::Listener>, clusters: Vec<cluster::Cluster>) -> Running {
    start_draining(listeners, clusters, Duration::from_secs(2)).await
}

/// A gateway that takes so long to end at most.
pub(crate) async fn start_with(up: SocketAddr, drain: Duration) -> Running {
    let manager = manager(vec![to_cluster("/", "up")]);
    Box::pin(start_draining(vec![listener("in", http_filter(&manager))], vec![cluster("up", up, false)], drain)).await
}

async fn start_draining(
    listeners: Vec<listener::Listener>,
    clusters: Vec<cluster::Cluster>,
    drain: Duration,
) -> Running {
    start_by(listeners, clusters, |options| options.termination.drain = drain).await
}

/// Starts a proxy with these resources, and options as `edit` leaves them.
pub(crate) async fn start_by(
    listeners: Vec<listener::Listener>,
    clusters: Vec<cluster::Cluster>,
    edit: impl FnOnce(&mut Options),
) -> Running {
    let mut options = Options::new(Role::Standalone, core::Node { id: "test".into(), ..Default::default() });
    options.addresses.admin = Some(([127, 0, 0, 1], 0).into());
    options.resources = StaticResources {
        listeners: listeners.iter().map(|l| raw(&l.name, l)).collect(),
        clusters: clusters.iter().map(|c| raw(&c.name, c)).collect(),
        ..StaticResources::default()
    };
    edit(&mut options);
    let proxy = Box::pin(Proxy::start(options)).await.unwrap();
    proxy.ready().await;
    Running { proxy }
}

pub(crate) struct Running {
    pub(crate) proxy: Proxy,
}

impl Running {
    pub(crate) fn at(&self, listener: &str) -> SocketAddr {
        self.proxy.listeners().into_iter().find(|(name, _)| name == listener).expect("it listens").1
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.proxy.services().iter().find(|(name, _)| *name == "admin").expect("it listens").1
    }

    pub(crate) async fn end(self) {
        self.proxy.quit();
        self.proxy.ended().await;
    }
}

/// Sends bytes and reads until the peer closes, or until `enough` holds.
pub(crate) async fn talk(at: SocketAddr, bytes: &[u8], enough: impl Fn(&str) -> bool) -> String {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let reading = async {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(n) => answer.extend_from_slice(&buffer[..n]),
            }
            if enough(&String::from_utf8_lossy(&answer)) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

/// Waits until `progress` stands still: while the only worker served a hundred other requests, it did
/// not change.
pub(crate) async fn stands_still(at: SocketAddr, progress: impl Fn() -> usize) -> usize {
    let mut before = progress();
    loop {
        for _ in 0..100 {
            let answer = talk(at, b"GET /marker HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", |_| false).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
        let now = progress();
        if now == before {
            return now;
        }
        before = now;
    }
}

/// A server that answers each connection with `serve`.
pub(crate) async fn server<F, R>(serve: F) -> SocketAddr
where
    F: Fn(TcpStream) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    at
}

/// An HTTP/1 server that answers with the head it got, and with `Content-Length`.
pub(crate) async fn echo_heads() -> SocketAddr {
    server(|mut stream| async move {
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") else {
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => return,
                    Ok(n) => seen.extend_from_slice(&buffer[..n]),
                }
                continue;
            };
            let head: Vec<u8> = seen.drain(..end + 4).collect();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX-Up: 1\r\n\r\n", head.len());
            if stream.write_all(answer.as_bytes()).await.is_err() || stream.write_all(&head).await.is_err() {
                return;
            }
        }
    })
    .await
}

/// What a recording server was sent.
#[derive(Clone, Default)]
pub(crate) struct Seen(tokio::sync::watch::Sender<Vec<Vec<u8>>>);

fn texts(all: &[Vec<u8>]) -> Vec<String> {
    all.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
}

impl Seen {
    /// All bytes, connection by connection.
    pub(crate) fn text(&self) -> Vec<String> {
        texts(&self.0.borrow())
    }

    /// Returns once what was sent fits.
    pub(crate) async fn until(&self, fits: impl Fn(&[String]) -> bool) {
        let mut all = self.0.subscribe();
        let waited = tokio::time::timeout(PATIENCE, all.wait_for(|all| fits(&texts(all)))).await;
        let waited = waited.is_ok();
        assert!(waited, "{:?}", self.text());
    }
}

/// A server that notes what it is sent and answers each connection's `enough` bytes with `answer`.
pub(crate) async fn recorder(enough: &'static str, answer: &'static [u8]) -> (SocketAddr, Seen) {
    let seen = Seen::default();
    let notes = seen.clone();
    let at = server(move |mut stream| {
        let notes = notes.clone();
        async move {
            let mut mine = 0;
            notes.0.send_modify(|all| {
                mine = all.len();
                all.push(Vec::new());
            });
            let mut buffer = vec![0; 16 * 1024];
            let mut from = 0;
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                let mut answers = 0;
                notes.0.send_modify(|all| {
                    all[mine].extend_from_slice(&buffer[..n]);
                    answers = all[mine][from..].windows(enough.len()).filter(|w| *w == enough.as_bytes()).count();
                    if answers > 0 {
                        from = all[mine].len();
                    }
                });
                for _ in 0..answers {
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            }
        }
    })
    .await;
    (at, seen)
}

/// A gateway whose connection manager and listener are edited, before an HTTP/1 or HTTP/2 upstream.
pub(crate) async fn edited(
    up: SocketAddr,
    http2: bool,
    edit: impl FnOnce(&mut hcm::HttpConnectionManager, &mut cluster::Cluster),
) -> Running {
    let mut manager = manager(vec![to_cluster("/", "up")]);
    let mut cluster = cluster("up", up, http2);
    edit(&mut manager, &mut cluster);
    Box::pin(start(vec![listener("in", http_filter(&manager))], vec![cluster])).await
}

/// So many milliseconds.
#[expect(clippy::unnecessary_wraps, reason = "the field that takes it may be absent")]
pub(crate) fn milliseconds(n: i32) -> Option<envoy_types::pb::google::protobuf::Duration> {
    Some(envoy_types::pb::google::protobuf::Duration { seconds: (n / 1000).into(), nanos: n % 1000 * 1_000_000 })
}

/// Whether the peer closes, or resets, the connection; what came before is dropped.
pub(crate) async fn is_closed(stream: &mut TcpStream) -> bool {
    let reading = async {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(1..) = stream.read(&mut buffer).await {}
    };
    tokio::time::timeout(PATIENCE, reading).await.is_ok()
}
