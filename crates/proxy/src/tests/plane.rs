//! A proxy whose configuration comes from several sources, one of them a control plane.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use envoy_types::pb::google::protobuf::Any;
use futures_util::future::BoxFuture;
use identity::channel::{ControlPlane, PlainTcp};
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Status;
use types::wellknown::type_urls;
use xds::ResourceSet;
use xds::client::Protocol;
use xds::server::{Admitted, Ads, Answered, Authority, Caller, Observer, Outgoing, Progress, Session};

use super::bed;
use crate::options::Options;

/// What a proxy said: the names that it asks for, and what it accepted and refused, by type.
#[derive(Clone, Debug, Default)]
struct Said {
    names: Vec<String>,
    accepted: BTreeMap<String, usize>,
    refused: Vec<String>,
}

/// A control plane that gives everybody the same.
struct Plane {
    at: SocketAddr,
    sets: watch::Sender<Option<Arc<ResourceSet>>>,
    said: watch::Sender<Said>,
    generation: Mutex<u64>,
}

struct Everybody {
    sets: watch::Receiver<Option<Arc<ResourceSet>>>,
    said: watch::Sender<Said>,
}

impl Authority for Everybody {
    fn admit(&self, _: Caller, _: core::Node, _: Protocol) -> BoxFuture<'static, Result<Admitted, Status>> {
        let admitted = Admitted { resources: self.sets.clone(), observer: Box::new(Listening(self.said.clone())) };
        Box::pin(std::future::ready(Ok(admitted)))
    }
}

struct Listening(watch::Sender<Said>);

impl Observer for Listening {
    fn sent(&mut self, _: &Outgoing) {}

    fn answered(&mut self, answered: &Answered) {
        self.0.send_modify(|said| match &answered.refused {
            None => *said.accepted.entry(answered.type_url.to_string()).or_default() += 1,
            Some(reason) => said.refused.push(reason.to_string()),
        });
    }

    fn progressed(&mut self, _: &Progress) {}

    fn subscribed(&mut self, session: &Session) {
        self.0.send_modify(|said| said.names = session.names().map(str::to_owned).collect());
    }
}

impl Plane {
    async fn start() -> Self {
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = socket.local_addr().unwrap();
        let (sets, following) = watch::channel(None);
        let said = watch::Sender::new(Said::default());
        let ads = Ads::new(Arc::new(Everybody { sets: following, said: said.clone() }), "test");
        let service = AggregatedDiscoveryServiceServer::new(ads);
        let serving = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(serving.serve_with_incoming(TcpListenerStream::new(socket)));
        Self { at, sets, said, generation: Mutex::new(0) }
    }

    fn give(&self, resources: &[(&str, Any)]) {
        let mut generation = self.generation.lock().unwrap();
        *generation += 1;
        let mut set = ResourceSet::new(*generation, &generation.to_string());
        for (name, any) in resources {
            set.insert(name, any.clone());
        }
        self.sets.send_replace(Some(Arc::new(set)));
    }

    /// Where it is; a proxy that asks it for these types as a whole.
    fn of(&self, types: &[&'static str]) -> impl FnOnce(&mut Options) {
        let (address, types) = (self.at.to_string(), types.to_vec());
        move |options| {
            options.subscriptions = types;
            options.xds = Some(ControlPlane {
                server_name: "127.0.0.1".into(),
                address,
                roots: None,
                token: None,
                cluster_id: String::new(),
                tcp: Arc::new(PlainTcp),
            });
        }
    }

    /// Waits until the proxy has said so.
    async fn hears(&self, what: &str, test: impl FnMut(&Said) -> bool) {
        let mut said = self.said.subscribe();
        let waiting = tokio::time::timeout(bed::PATIENCE, said.wait_for(test)).await;
        assert!(waiting.is_ok(), "{what}: {:?}", self.said.borrow());
    }
}

fn certificate(secret: &str, of: &rcgen::CertifiedKey<rcgen::KeyPair>) -> Any {
    let inline = |text: String| {
        Some(core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineString(text)),
            ..Default::default()
        })
    };
    bed::any(&tls::Secret {
        name: secret.into(),
        r#type: Some(tls::secret::Type::TlsCertificate(tls::TlsCertificate {
            certificate_chain: inline(of.cert.pem()),
            private_key: inline(of.signing_key.serialize_pem()),
            ..Default::default()
        })),
    })
}

/// A listener with TLS, by the secret of this name.
fn secure(name: &str, secret: &str) -> listener::Listener {
    let manager = bed::manager(vec![bed::to_cluster("/", "up")]);
    let mut made = bed::listener(name, bed::http_filter(&manager));
    let named = tls::SdsSecretConfig { name: secret.into(), ..Default::default() };
    let common = tls::CommonTlsContext { tls_certificate_sds_secret_configs: vec![named], ..Default::default() };
    let context = tls::DownstreamTlsContext { common_tls_context: Some(common), ..Default::default() };
    made.filter_chains[0].transport_socket = Some(core::TransportSocket {
        name: "envoy.transport_sockets.tls".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(bed::any(&context))),
    });
    made
}

/// Clusters come from the control plane, which gives a listener as well: nobody asked.
#[tokio::test]
async fn a_proxy_is_ready_without_what_it_does_not_ask_for() {
    let plane = Plane::start().await;
    let manager = bed::manager(vec![bed::to_cluster("/", "up")]);
    let own = bed::listener("own", bed::http_filter(&manager));
    let up = bed::echo_heads().await;
    let theirs = bed::listener("theirs", bed::http_filter(&manager));
    plane.give(&[("up", bed::any(&bed::cluster("up", up, false))), ("theirs", bed::any(&theirs))]);
    let running = bed::start_by(vec![own], Vec::new(), plane.of(&[type_urls::CLUSTER])).await;
    assert_eq!(running.proxy.listeners().len(), 1);
    let answer =
        bed::talk(running.at("own"), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    running.end().await;
}

/// Names that only a mesh keeps for itself are as good as others where there is none.
#[tokio::test]
async fn secrets_are_asked_for_by_any_name_and_every_version_is_taken() {
    let plane = Plane::start().await;
    let make = || rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    let up = bed::any(&bed::cluster("up", bed::NOBODY, false));
    let listeners = ["default", "server_cert"].map(|secret| secure(secret, secret));
    let give = |of: &rcgen::CertifiedKey<rcgen::KeyPair>| {
        let mut all = vec![("up", up.clone())];
        all.extend(listeners.iter().map(|listener| (listener.name.as_str(), bed::any(listener))));
        all.extend(["default", "server_cert"].map(|name| (name, certificate(name, of))));
        plane.give(&all);
    };
    give(&make());
    let running = bed::start_by(Vec::new(), Vec::new(), plane.of(&[type_urls::CLUSTER, type_urls::LISTENER])).await;
    assert_eq!(running.proxy.listeners().len(), 2, "they are there with their secrets");
    let accepted = |said: &Said| said.accepted.get(type_urls::SECRET).copied().unwrap_or(0);
    plane.hears("the first version", |said| accepted(said) > 0).await;
    let before = accepted(&plane.said.borrow());
    give(&make());
    plane.hears("the second version", |said| accepted(said) > before).await;
    assert_eq!(plane.said.borrow().refused, [""; 0]);
    running.end().await;
}

/// What was named once and is named again waits for what the control plane has of that name now.
#[tokio::test]
async fn a_secret_that_nobody_names_is_forgotten() {
    let plane = Plane::start().await;
    let key = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    let up = ("up", bed::any(&bed::cluster("up", bed::NOBODY, false)));
    let [stays, goes] = ["stays", "goes"].map(|name| (name, bed::any(&secure(name, name))));
    let [kept, gone] = ["stays", "goes"].map(|name| (name, certificate(name, &key)));
    plane.give(&[up.clone(), stays.clone(), goes.clone(), kept.clone(), gone]);
    let running = bed::start_by(Vec::new(), Vec::new(), plane.of(&[type_urls::CLUSTER, type_urls::LISTENER])).await;
    assert_eq!(running.proxy.listeners().len(), 2, "they are there with their secrets");
    let accepted = |said: &Said| said.accepted.get(type_urls::LISTENER).copied().unwrap_or(0);
    plane.hears("the first version", |said| accepted(said) > 0).await;
    let before = accepted(&plane.said.borrow());
    plane.give(&[up.clone(), stays.clone(), kept.clone()]);
    plane.hears("that one goes", |said| accepted(said) > before).await;
    assert_eq!(running.proxy.listeners().len(), 1);
    let before = accepted(&plane.said.borrow());
    plane.give(&[up, stays, goes, kept]);
    plane.hears("that it is back", |said| accepted(said) > before).await;
    assert_eq!(running.proxy.listeners().len(), 1, "it waits for its key");
    assert_eq!(plane.said.borrow().refused, [""; 0]);
    running.end().await;
}

/// The bootstrap's own stay as they are, whoever sends others of their names or takes those away.
#[tokio::test]
async fn nobody_replaces_what_is_of_the_bootstrap() {
    let plane = Plane::start().await;
    let up = bed::echo_heads().await;
    let manager = bed::manager(vec![bed::to_cluster("/", "up")]);
    let own = bed::listener("own", bed::http_filter(&manager));
    let (elsewhere, nobody) = (secure("own", "none"), bed::cluster("up", bed::NOBODY, false));
    let more = ("more", bed::any(&bed::cluster("more", bed::NOBODY, false)));
    plane.give(&[("up", bed::any(&nobody)), ("own", bed::any(&elsewhere)), more.clone()]);
    let statics = vec![bed::cluster("up", up, false)];
    let running = bed::start_by(vec![own], statics, plane.of(&[type_urls::CLUSTER, type_urls::LISTENER])).await;
    let serves = async || {
        let answer =
            bed::talk(running.at("own"), b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", |_| false).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    };
    serves().await;
    plane.give(&[more]);
    let accepted = |said: &Said, url: &str| said.accepted.get(url).copied().unwrap_or(0);
    let both = [type_urls::CLUSTER, type_urls::LISTENER];
    plane.hears("what is gone", |said| both.iter().all(|url| accepted(said, url) >= 2)).await;
    serves().await;
    assert_eq!(plane.said.borrow().refused, [""; 0]);
    running.end().await;
}
