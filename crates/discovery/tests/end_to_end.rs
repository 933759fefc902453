//! A whole control plane on loopback, and clients as proxies are.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use compile::View;
use discovery::authn::jwt::JwtKeys;
use discovery::ca::Lifetimes;
use discovery::ca::store::load_or_create;
use discovery::compiler::{Compiled, Compiler, MeshCompiler, Told};
use discovery::source::Source as Objects;
use discovery::{Options, run};
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::{Any, Struct, Value, value::Kind};
use identity::agent::{self, Agent, IssueError};
use identity::channel::{ControlPlane, PlainTcp, Source};
use identity::tls::{ClientTls, SanMatch, ServerTls};
use identity::{PeerFacts, TrustRoots, WorkloadIdentity};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mesh::{MeshSnapshot, ServiceKey};
use rustls::pki_types::ServerName;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use types::TrustDomain;
use types::wellknown::type_urls;
use xds::client::{self, Dialed, Event, Handle, Names, Protocol, Update};

const WAIT: Duration = Duration::from_secs(90);

/// Who mints tokens.
struct Minter {
    key: rcgen::KeyPair,
}

impl Minter {
    fn new() -> Self {
        Self { key: rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap() }
    }

    fn keys(&self) -> JwtKeys {
        JwtKeys::parse(&self.key.public_key_pem(), None).unwrap()
    }

    fn claims(&self, claims: &Json) -> String {
        let key = EncodingKey::from_ec_pem(self.key.serialize_pem().as_bytes()).unwrap();
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &key).unwrap()
    }

    fn token(&self, namespace: &str, account: &str, pod: &str) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        self.claims(&json!({
            "aud": ["istio-ca"], "exp": now + 600, "nbf": now - 5,
            "sub": format!("system:serviceaccount:{namespace}:{account}"),
            "kubernetes.io": {"namespace": namespace, "pod": {"name": pod, "uid": "1"}},
        }))
    }
}

/// Gives every proxy what is set here: clusters by name, and a secret.
#[derive(Default)]
struct Toy {
    clusters: Mutex<Vec<String>>,
}

impl Compiler for Toy {
    fn compile(&self, _: &MeshSnapshot, _: &View) -> Compiled {
        let named = |type_url: &str, name: &str| {
            let mut value = vec![10, u8::try_from(name.len()).unwrap()];
            value.extend_from_slice(name.as_bytes());
            Told { name: name.to_owned(), any: Any { type_url: type_url.to_owned(), value }, finding: None }
        };
        let clusters = self.clusters.lock().unwrap().clone();
        let mut resources: Vec<_> = clusters.iter().map(|name| named(type_urls::CLUSTER, name)).collect();
        resources.push(named(type_urls::SECRET, "kubernetes://web"));
        Compiled { resources, findings: Vec::new() }
    }

    fn clusters_of(&self, snapshot: &MeshSnapshot, view: &View, _: &BTreeSet<ServiceKey>) -> Compiled {
        self.compile(snapshot, view)
    }
}

struct Plane {
    secure: SocketAddr,
    plaintext: SocketAddr,
    monitoring: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
    roots: std::path::PathBuf,
    objects: std::path::PathBuf,
}

impl Plane {
    async fn start(dir: &Path, minter: &Minter, compiler: Arc<dyn Compiler>, secure: Option<SocketAddr>) -> Self {
        Self::start_with(dir, minter, compiler, secure, |_| {}).await
    }

    async fn start_with(
        dir: &Path,
        minter: &Minter,
        compiler: Arc<dyn Compiler>,
        secure: Option<SocketAddr>,
        change: impl FnOnce(&mut Options),
    ) -> Self {
        let bind = |address: SocketAddr| TcpListener::bind(address).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let (secure, plaintext, monitoring) = (bind(secure.unwrap_or(any)), bind(any), bind(any));
        let objects = dir.join("objects");
        std::fs::create_dir_all(&objects).unwrap();
        let mut options = Options::new(Objects::Files(vec![objects.clone()]), dir.join("ca"));
        let roots = dir.join("root-cert.pem");
        options.root_cert_out = Some(roots.clone());
        options.tokens = vec![Arc::new(minter.keys())];
        options.compiler = compiler;
        let addresses = [&secure, &plaintext, &monitoring].map(|listener| listener.local_addr().unwrap());
        options.secure = vec![secure];
        options.plaintext = vec![plaintext];
        options.monitoring = vec![monitoring];
        change(&mut options);
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            run(options, async {
                stopped.await.ok();
            })
            .await
            .unwrap();
        });
        let plane = Self {
            secure: addresses[0],
            plaintext: addresses[1],
            monitoring: addresses[2],
            stop: Some(stop),
            task: Some(task),
            roots,
            objects,
        };
        // Listeners are bound before the call, so this waits only for the answer.
        plane.get("/version").await;
        plane
    }

    async fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.task.take().unwrap().await.unwrap();
    }

    fn client(&self, token: Option<String>) -> ControlPlane {
        ControlPlane {
            address: self.secure.to_string(),
            server_name: "istiod.istio-system.svc".to_owned(),
            roots: Some(Source::File(self.roots.clone())),
            token: token.map(|token| Source::Text(token.into())),
            cluster_id: "Kubernetes".to_owned(),
            tcp: Arc::new(PlainTcp),
        }
    }

    async fn identity(&self, token: String) -> Result<WorkloadIdentity, IssueError> {
        agent::issue(&agent::Options::new(self.client(Some(token))), None, 1).await
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.monitoring).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        (status, body.to_owned())
    }
}

fn node(id: &str, metadata: &[(&str, &str)]) -> Node {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let fields = metadata.iter().map(|(key, value)| ((*key).to_owned(), text(value))).collect();
    Node { id: id.to_owned(), metadata: Some(Struct { fields }), ..Node::default() }
}

const REVIEWS: &str = "sidecar~10.1.1.1~reviews-1.shop~shop.svc.cluster.local";

const BOTH: [&str; 2] = [type_urls::CLUSTER, type_urls::LISTENER];

struct Proxy {
    handle: Handle,
    events: mpsc::Receiver<Event>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A proxy that shows its certificate, or a token alone.
    fn connect(
        plane: ControlPlane,
        identity: Option<WorkloadIdentity>,
        node: Node,
        protocol: Protocol,
        types: &[&str],
    ) -> Self {
        let subscriptions = types.iter().map(|url| {
            let names = if *url == type_urls::SECRET { Names::only(["kubernetes://web"]) } else { Names::All };
            ((*url).to_owned(), names)
        });
        let options = client::Options {
            node,
            protocol,
            subscriptions: subscriptions.collect(),
            backoff: client::Backoff { initial: Duration::from_millis(20), max: Duration::from_millis(100) },
        };
        let identity = identity.map(Arc::new);
        let (handle, events, driver) = client::new(options, move || -> client::Dialing {
            let (plane, identity) = (plane.clone(), identity.clone());
            Box::pin(async move {
                let channel = plane.connect(identity.as_deref()).await?;
                Ok(Dialed { channel, metadata: plane.metadata()? })
            })
        });
        Self { handle, events, task: tokio::spawn(driver.run()) }
    }

    async fn event(&mut self) -> Event {
        tokio::time::timeout(WAIT, self.events.recv()).await.expect("an event in time").expect("a running driver")
    }

    /// The next update; reconnects are passed over.
    async fn update(&mut self) -> Update {
        loop {
            if let Event::Update(update) = self.event().await {
                return update;
            }
        }
    }

    /// Accepts everything, for ever.
    async fn accept(&mut self) {
        loop {
            let update = self.update().await;
            self.handle.answer(&update.id, &[]);
        }
    }

    async fn refusal(&mut self) -> String {
        loop {
            match self.event().await {
                Event::Disconnected { reason, .. } => return reason,
                Event::Connected => {}
                Event::Update(update) => panic!("was served: {update:?}"),
            }
        }
    }

    async fn names(&mut self) -> (BTreeSet<String>, Vec<String>) {
        let mut update = self.update().await;
        self.handle.answer(&update.id, &[]);
        // The toys have no listeners, and say so once.
        while update.type_url() == type_urls::LISTENER {
            update = self.update().await;
            self.handle.answer(&update.id, &[]);
        }
        (update.added.into_iter().map(|(name, ..)| name).collect(), update.removed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn write_service(plane: &Plane, name: &str) {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\nspec:\n  clusterIP: 10.96.0.9\n  ports:\n  - name: http\n    port: 80\n"
    );
    std::fs::write(plane.objects.join(format!("{name}.yaml")), text).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_gets_its_certificate_and_its_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let plane = Plane::start(dir.path(), &minter, Arc::new(MeshCompiler::default()), None).await;
    write_service(&plane, "ratings");
    let token = minter.token("shop", "reviews", "reviews-1");
    let identity = plane.identity(token).await.unwrap();
    assert_eq!(identity.id.to_string(), "spiffe://cluster.local/ns/shop/sa/reviews");
    // From here on the certificate alone must do.
    for protocol in [Protocol::Delta, Protocol::StateOfTheWorld] {
        let node = node(REVIEWS, &[("NAMESPACE", "shop"), ("SERVICE_ACCOUNT", "reviews")]);
        let mut proxy = Proxy::connect(plane.client(None), Some(identity.clone()), node, protocol, &BOTH);
        let mut names = proxy.names().await.0;
        while !names.contains("outbound|80||ratings.shop.svc.cluster.local") {
            names.extend(proxy.names().await.0);
        }
        assert!(names.contains("BlackHoleCluster"), "{names:?}");
        let (status, body) = tokio::select! {
            answer = plane.get("/debug/synced?timeout=90") => answer,
            () = proxy.accept() => unreachable!("it has no end"),
        };
        assert_eq!((status, serde_json::from_str::<Json>(&body).unwrap()["laggards"].clone()), (200, json!([])));
        let (_, body) = plane.get("/debug/syncz").await;
        let entry = serde_json::from_str::<Json>(&body).unwrap()[0].clone();
        assert_eq!(entry["proxy"], "reviews-1.shop");
        assert_eq!(entry["cluster_sent"], entry["cluster_acked"]);
        assert_eq!(entry["principal"], "spiffe://cluster.local/ns/shop/sa/reviews");
        let (_, dump) = plane.get("/debug/config_dump?proxyID=reviews-1.shop").await;
        let dump: Json = serde_json::from_str(&dump).unwrap();
        let clusters = dump["resources"][type_urls::CLUSTER].as_array().unwrap();
        let names: Vec<&Json> = clusters.iter().map(|cluster| &cluster["message"]["name"]).collect();
        assert!(names.contains(&&json!("outbound|80||ratings.shop.svc.cluster.local")), "{names:?}");
    }
    let (_, metrics) = plane.get("/metrics").await;
    assert!(metrics.contains("citadel_server_success_cert_issuance_count 1"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_each_kind_are_certified() {
    use agent::KeyKind;
    use rustls::SignatureScheme as Scheme;
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let plane = Plane::start(dir.path(), &minter, Arc::new(Toy::default()), None).await;
    assert_eq!(KeyKind::default(), KeyKind::EcdsaP256);
    for (key, signs) in [
        (KeyKind::EcdsaP256, Scheme::ECDSA_NISTP256_SHA256),
        (KeyKind::EcdsaP384, Scheme::ECDSA_NISTP384_SHA384),
        (KeyKind::Rsa2048, Scheme::RSA_PSS_SHA256),
    ] {
        let token = minter.token("shop", "reviews", "reviews-1");
        let options = agent::Options { key, ..agent::Options::new(plane.client(Some(token))) };
        let identity = agent::issue(&options, None, 1).await.unwrap();
        identity.verify_own_chain(SystemTime::now()).unwrap();
        let certified = identity.keys.certified();
        assert!(certified.key.choose_scheme(&[signs]).is_some(), "{key:?}");
        certified.keys_match().unwrap();
    }
}

/// Repeats every byte on every connection, each under the identity of its beginning.
async fn serve(listener: tokio::net::TcpListener, identities: agent::Identities) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let identity = identities.borrow().clone().unwrap();
        let tls = ServerTls::mesh(&identity, vec![SanMatch::uri_prefix("spiffe://cluster.local/")], Vec::new());
        let tls = TlsAcceptor::from(Arc::clone(tls.build().unwrap().strict()));
        tokio::spawn(async move {
            // What fails here fails at the client, who counts.
            let Ok(mut stream) = tls.accept(stream).await else { return };
            let mut byte = [0];
            while stream.read_exact(&mut byte).await.is_ok() && stream.write_all(&byte).await.is_ok() {}
        });
    }
}

type Connection = tokio_rustls::client::TlsStream<TcpStream>;

/// A connection on which a byte went there and back: only then are both sides content.
async fn connect(to: SocketAddr, identity: &WorkloadIdentity) -> std::io::Result<Connection> {
    let tls = ClientTls::mesh(identity, vec![SanMatch::uri_prefix("spiffe://cluster.local/")], Vec::new());
    let name = ServerName::try_from("outbound_.80_._.reviews.shop.svc.cluster.local").unwrap();
    let stream = TcpStream::connect(to).await?;
    let mut stream = TlsConnector::from(tls.build().unwrap()).connect(name, stream).await?;
    ask(&mut stream).await?;
    Ok(stream)
}

async fn ask(stream: &mut Connection) -> std::io::Result<()> {
    stream.write_all(b"x").await?;
    stream.flush().await?;
    stream.read_exact(&mut [0]).await.map(|_| ())
}

/// Two control planes over one folder, and two workloads that talk all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_roots_successor_takes_over_at_its_time_and_no_connection_fails() {
    let dir = tempfile::tempdir().unwrap();
    let (minter, now, day) = (Minter::new(), SystemTime::now(), Duration::from_hours(24));
    // By now four fifths of its ten years are over; by the control planes' clock not yet.
    let made = now - (3650 * 4 / 5 + 1) * day;
    load_or_create(&dir.path().join("ca"), &TrustDomain::default(), Lifetimes::default(), made).unwrap();
    let is_due = Arc::new(AtomicBool::new(false));
    let start = || {
        let is_due = Arc::clone(&is_due);
        let clock = move || if is_due.load(Ordering::Relaxed) { now } else { now - 30 * day };
        Plane::start_with(dir.path(), &minter, Arc::new(Toy::default()), None, |options| {
            options.root_check = Duration::from_millis(20);
            options.root_clock = Arc::new(clock);
        })
    };
    let (plane, other) = (start().await, start().await);

    let workload = |plane: &Plane, account: &str| {
        let mut options = agent::Options::new(plane.client(Some(minter.token("shop", account, account))));
        // Renewed after some ten seconds, with a lifetime that outlasts a machine that is busy.
        options.ttl = Duration::from_secs(120);
        options.grace_ratio = 0.92;
        let (agent, identities) = Agent::new(options);
        (tokio::spawn(agent.run()), identities)
    };
    let (serving, mut server) = workload(&plane, "reviews");
    let (calling, mut client) = workload(&other, "productpage");
    let until = async |identities: &mut agent::Identities, roots: usize| {
        let has = |identity: &Option<Arc<WorkloadIdentity>>| {
            identity.as_ref().is_some_and(|identity| identity.roots.certificates().len() == roots)
        };
        let found = tokio::time::timeout(WAIT, identities.wait_for(has)).await.expect("in time").unwrap();
        Arc::clone(found.as_ref().unwrap())
    };
    let before = [until(&mut server, 1).await, until(&mut client, 1).await];
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answering = tokio::spawn(serve(listener, server.clone()));
    let done = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn({
        let (done, client) = (Arc::clone(&done), client.clone());
        async move {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                let identity = client.borrow().clone().unwrap();
                connect(address, &identity).await?;
                count += 1;
            }
            Ok::<u32, std::io::Error>(count)
        }
    });
    let stale = plane.identity(minter.token("shop", "ratings", "ratings-1")).await.unwrap();
    let mut kept = connect(address, &stale).await.unwrap();

    is_due.store(true, Ordering::Relaxed);
    let after = [until(&mut server, 2).await, until(&mut client, 2).await];
    let roots = after[0].roots.certificates();
    assert_eq!(after[1].roots.certificates(), roots, "one successor, of whichever control plane");
    assert_eq!(roots[1], before[0].roots.certificates()[0]);
    for (before, after) in before.iter().zip(&after) {
        assert_ne!(before.facts.serial, after.facts.serial);
        let successor = Arc::new(TrustRoots::new(vec![roots[0].clone()], Vec::new()).unwrap());
        let alone = WorkloadIdentity::new(after.keys.clone(), successor, 1).unwrap();
        alone.verify_own_chain(SystemTime::now()).expect("the successor stands for what is new");
    }
    // Whoever has not heard of it yet is not cut off, in the middle of a connection or at the start of one.
    ask(&mut kept).await.unwrap();
    connect(address, &stale).await.unwrap();
    let (_, metrics) = plane.get("/metrics").await;
    let expires = |identity: &WorkloadIdentity| {
        let root = PeerFacts::read(&identity.roots.certificates()[0]).unwrap();
        root.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64()
    };
    for name in ["citadel_server_root_cert_expiry_timestamp", "citadel_server_cert_chain_expiry_timestamp"] {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).expect(name).trim();
        assert!((line.parse::<f64>().unwrap() - expires(&after[0])).abs() < 1.0, "{name}: {line}");
    }
    let left = metrics.lines().find_map(|line| line.strip_prefix("citadel_server_root_cert_expiry_seconds")).unwrap();
    assert!(left.trim().parse::<f64>().unwrap() > (3649 * day).as_secs_f64(), "{left}");

    done.store(true, Ordering::Relaxed);
    let count = load.await.unwrap().expect("no connection fails");
    assert!(count > 10, "{count}");
    for task in [serving, calling] {
        task.abort();
    }
    answering.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_proves_nothing_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let plane = Plane::start(dir.path(), &minter, Arc::new(Toy::default()), None).await;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let subject = "system:serviceaccount:shop:reviews";
    let good = minter.token("shop", "reviews", "reviews-1");
    let (head, signature) = good.rsplit_once('.').unwrap();
    let bad: Vec<(&str, String)> = vec![
        ("of another minter", Minter::new().token("shop", "reviews", "reviews-1")),
        ("expired", minter.claims(&json!({"aud": "istio-ca", "exp": now - 60, "sub": subject}))),
        ("for later", minter.claims(&json!({"aud": "istio-ca", "exp": now + 600, "nbf": now + 300, "sub": subject}))),
        ("for the API", minter.claims(&json!({"aud": "https://kubernetes.default", "exp": now + 600, "sub": subject}))),
        ("for nobody", minter.claims(&json!({"exp": now + 600, "sub": subject}))),
        ("without end", minter.claims(&json!({"aud": "istio-ca", "sub": subject}))),
        ("of a person", minter.claims(&json!({"aud": "istio-ca", "exp": now + 600, "sub": "alice"}))),
        (
            "of a path",
            minter.claims(&json!({"aud": "istio-ca", "exp": now + 600, "sub": "system:serviceaccount:shop:../x"})),
        ),
        ("unsigned", format!("{head}.")),
        ("cut", format!("{head}.{}", &signature[..signature.len() - 4])),
        ("nonsense", "nonsense".to_owned()),
    ];
    for (what, token) in bad {
        match plane.identity(token.clone()).await {
            Err(IssueError::Refused { code: tonic::Code::Unauthenticated, message }) => {
                assert_eq!(message, "request authenticate failure", "{what}");
            }
            other => panic!("{what}: {other:?}"),
        }
        let node = node(REVIEWS, &[]);
        let mut proxy = Proxy::connect(plane.client(Some(token)), None, node, Protocol::Delta, &[type_urls::CLUSTER]);
        let reason = proxy.refusal().await;
        assert!(reason.contains("authentication failure"), "{what}: {reason}");
    }
    let mut proxy =
        Proxy::connect(plane.client(None), None, node(REVIEWS, &[]), Protocol::Delta, &[type_urls::CLUSTER]);
    assert!(proxy.refusal().await.contains("authentication failure"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_only_told_what_is_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let plane = Plane::start(dir.path(), &minter, Arc::new(Toy::default()), None).await;
    let token = minter.token("shop", "reviews", "reviews-1");
    let cases: &[(&str, &[(&str, &str)])] = &[
        ("sidecar~10.1.1.1~reviews-1.bank~bank.svc.cluster.local", &[]),
        (REVIEWS, &[("NAMESPACE", "bank")]),
        ("sidecar~10.1.1.1~reviews-1.bank~bank.svc.cluster.local", &[("NAMESPACE", "shop")]),
        (REVIEWS, &[("SERVICE_ACCOUNT", "ratings")]),
        ("sidecar~10.1.1.1~ratings-1.shop~shop.svc.cluster.local", &[]),
        ("router~10.1.1.1~gateway.istio-system~x", &[("NAME", "gateway"), ("NAMESPACE", "istio-system")]),
    ];
    for (id, metadata) in cases {
        let node = node(id, metadata);
        let mut proxy =
            Proxy::connect(plane.client(Some(token.clone())), None, node, Protocol::Delta, &[type_urls::CLUSTER]);
        let reason = proxy.refusal().await;
        assert!(reason.contains("authorization failed"), "{id} {metadata:?}: {reason}");
    }
    for id in ["", "sidecar", "a~b~c~d", "waypoint~1~x.shop~y"] {
        let node = node(id, &[]);
        let mut proxy =
            Proxy::connect(plane.client(Some(token.clone())), None, node, Protocol::Delta, &[type_urls::CLUSTER]);
        let reason = proxy.refusal().await;
        assert!(reason.contains("node"), "{id}: {reason}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_do_not_travel_in_plaintext() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let toy = Arc::new(Toy { clusters: Mutex::new(vec!["a".to_owned()]) });
    let plane = Plane::start(dir.path(), &minter, toy, None).await;
    let types = [type_urls::CLUSTER, type_urls::SECRET];
    let token = minter.token("shop", "reviews", "reviews-1");
    let mut proxy =
        Proxy::connect(plane.client(Some(token.clone())), None, node(REVIEWS, &[]), Protocol::Delta, &types);
    assert_eq!(proxy.names().await.0, set(&["a"]));
    assert_eq!(proxy.names().await.0, set(&["kubernetes://web"]));

    let mut open = plane.client(Some(token.clone()));
    open.address = plane.plaintext.to_string();
    open.roots = None;
    let mut proxy = Proxy::connect(open.clone(), None, node(REVIEWS, &[]), Protocol::Delta, &types);
    assert_eq!(proxy.names().await.0, set(&["a"]));
    proxy.handle.subscribe(type_urls::LISTENER, Names::All);
    assert_eq!(proxy.update().await.type_url(), type_urls::LISTENER, "a later answer comes, and no secret before it");
    // Certificates are not to be had there either, with whatever token.
    let refused = agent::issue(&agent::Options::new(open), None, 1).await;
    assert!(matches!(refused, Err(IssueError::Refused { code: tonic::Code::Unimplemented, .. })), "{refused:?}");
    // Nor does a plaintext client get anything from the secure port.
    let mut wrong = plane.client(Some(token));
    wrong.roots = None;
    assert!(agent::issue(&agent::Options::new(wrong), None, 1).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let toy = Arc::new(Toy { clusters: Mutex::new(vec!["a".to_owned(), "b".to_owned()]) });
    let mut plane = Plane::start(dir.path(), &minter, Arc::clone(&toy) as _, None).await;
    let identity = plane.identity(minter.token("shop", "reviews", "reviews-1")).await.unwrap();
    let mut proxy =
        Proxy::connect(plane.client(None), Some(identity.clone()), node(REVIEWS, &[]), Protocol::Delta, &BOTH);
    assert_eq!(proxy.names().await.0, set(&["a", "b"]));
    let synced = tokio::select! {
        answer = plane.get("/debug/synced?timeout=90") => answer,
        () = proxy.accept() => unreachable!("it has no end"),
    };
    assert_eq!(synced.0, 200);
    plane.stop().await;
    *toy.clusters.lock().unwrap() = vec!["b".to_owned(), "c".to_owned()];
    let _again = Plane::start(dir.path(), &minter, Arc::clone(&toy) as _, Some(plane.secure)).await;
    // The same roots, so that the certificate still counts; and only what is different.
    // What is new comes first; what is gone goes once the listeners are settled, which they may be already.
    let (new, mut gone) = proxy.names().await;
    assert_eq!(new, set(&["c"]));
    if gone.is_empty() {
        let (new, later) = proxy.names().await;
        assert_eq!(new, set(&[]));
        gone = later;
    }
    assert_eq!(gone, ["a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_reach_the_others_while_one_is_stuck() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let toy = Arc::new(Toy { clusters: Mutex::new(vec!["a".to_owned()]) });
    let plane = Plane::start(dir.path(), &minter, Arc::clone(&toy) as _, None).await;
    let connect = |pod: &str| {
        let node = node(&format!("sidecar~10.1.1.1~{pod}.shop~shop.svc.cluster.local"), &[]);
        let token = minter.token("shop", "reviews", pod);
        Proxy::connect(plane.client(Some(token)), None, node, Protocol::Delta, &BOTH)
    };
    let mut stuck = connect("stuck");
    let unanswered = stuck.update().await;
    let mut lively = connect("lively");
    assert_eq!(lively.names().await.0, set(&["a"]));
    for step in 0..3 {
        let name = format!("c{step}");
        toy.clusters.lock().unwrap().push(name.clone());
        write_service(&plane, &name);
        assert_eq!(lively.names().await.0, set(&[&name]));
    }
    let (status, body) = plane.get("/debug/synced?timeout=0.1").await;
    let body: Json = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &body["laggards"]), (504, &json!(["stuck.shop"])));
    // Once it answers, it gets everything at once.
    stuck.handle.answer(&unanswered.id, &[]);
    assert_eq!(stuck.names().await.0, set(&["c0", "c1", "c2"]));
    assert_eq!(plane.get("/debug/synced?timeout=90").await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let toy = Arc::new(Toy { clusters: Mutex::new(vec!["a".to_owned()]) });
    let plane = Plane::start(dir.path(), &minter, toy, None).await;
    let token = minter.token("shop", "reviews", "reviews-1");
    let mut proxy =
        Proxy::connect(plane.client(Some(token)), None, node(REVIEWS, &[]), Protocol::Delta, &[type_urls::CLUSTER]);
    let update = proxy.update().await;
    let rejected = client::Rejected { name: "a".to_owned(), reason: "no such policy".to_owned() };
    proxy.handle.answer(&update.id, &[rejected]);
    // A later answer proves that the refusal arrived.
    proxy.handle.subscribe(type_urls::LISTENER, Names::All);
    proxy.update().await;
    let (_, body) = plane.get("/debug/syncz").await;
    let entry = serde_json::from_str::<Json>(&body).unwrap()[0].clone();
    let state = &entry["resources"][type_urls::CLUSTER];
    assert_eq!((state["lastError"].as_str(), state["acked"].as_str()), (Some("\"a\": no such policy"), Some("")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_with_new_keys() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let plane = Plane::start(dir.path(), &minter, Arc::new(Toy::default()), None).await;
    let mut options = agent::Options::new(plane.client(Some(minter.token("shop", "reviews", "reviews-1"))));
    options.ttl = Duration::from_secs(8);
    let (agent, mut identities) = Agent::new(options);
    let running = tokio::spawn(agent.run());
    let mut seen: Vec<PeerFacts> = Vec::new();
    while seen.len() < 3 {
        tokio::time::timeout(WAIT, identities.changed()).await.unwrap().unwrap();
        let identity = identities.borrow_and_update().clone().unwrap();
        assert_eq!(identity.generation, seen.len() as u64 + 1);
        assert!(identity.facts.is_valid_at(SystemTime::now()), "renewed before the end");
        seen.push((*identity.facts).clone());
    }
    let keys: BTreeSet<_> = seen.iter().map(|facts| facts.spki_sha256).collect();
    let serials: BTreeSet<_> = seen.iter().map(|facts| facts.serial.clone()).collect();
    assert_eq!((keys.len(), serials.len()), (3, 3));
    running.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_renews_itself_and_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let plane = Plane::start(dir.path(), &minter, Arc::new(Toy::default()), None).await;
    let identity = plane.identity(minter.token("shop", "reviews", "reviews-1")).await.unwrap();
    let without_token = agent::Options::new(plane.client(None));
    let again = agent::issue(&without_token, Some(&identity), 2).await.unwrap();
    assert_eq!(again.id, identity.id);
    // Asking to be somebody else is refused, with all credentials in order.
    let mut impersonating = agent::Options::new(plane.client(None));
    let wanted = "spiffe://cluster.local/ns/bank/sa/vault".to_owned();
    impersonating.hints = vec![("ImpersonatedIdentity".to_owned(), wanted)];
    match agent::issue(&impersonating, Some(&identity), 2).await {
        Err(IssueError::Refused { code: tonic::Code::Unauthenticated, message }) => {
            assert_eq!(message, "request impersonation authentication failure");
        }
        other => panic!("{other:?}"),
    }
    // A lifetime above the maximum is an error, not a shorter life.
    let mut long = agent::Options::new(plane.client(None));
    long.ttl = Duration::from_hours(91 * 24);
    let refused = agent::issue(&long, Some(&identity), 2).await;
    assert!(matches!(refused, Err(IssueError::Refused { code: tonic::Code::InvalidArgument, .. })), "{refused:?}");
    // A certificate of another mesh opens nothing.
    let elsewhere = tempfile::tempdir().unwrap();
    let other = Plane::start(elsewhere.path(), &minter, Arc::new(Toy::default()), None).await;
    let foreign = other.identity(minter.token("shop", "reviews", "reviews-1")).await.unwrap();
    assert!(agent::issue(&without_token, Some(&foreign), 2).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_pod_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let minter = Minter::new();
    let toy = Arc::new(Toy { clusters: Mutex::new(vec!["a".to_owned()]) });
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: reviews-1, namespace: shop}\nspec: {containers: [{name: app, image: x}]}\nstatus: {phase: Running, podIP: 10.1.1.1}\n";
    // There before the first reading, so that its removal is the second.
    let file = dir.path().join("objects").join("pod.yaml");
    std::fs::create_dir_all(dir.path().join("objects")).unwrap();
    std::fs::write(&file, pod).unwrap();
    let plane = Plane::start(dir.path(), &minter, toy, None).await;
    let token = minter.token("shop", "reviews", "reviews-1");
    assert_eq!(plane.get("/debug/synced?resourceVersion=1&timeout=90").await.0, 200);
    // It never answers, as one whose namespace was taken away.
    let mut proxy = Proxy::connect(plane.client(Some(token)), None, node(REVIEWS, &[]), Protocol::Delta, &BOTH);
    proxy.update().await;
    let (status, body) = plane.get("/debug/synced?timeout=0.1").await;
    assert_eq!((status, body.contains("reviews-1.shop")), (504, true), "{body}");
    std::fs::remove_file(&file).unwrap();
    let (status, body) = plane.get("/debug/synced?resourceVersion=2&timeout=90").await;
    assert_eq!(status, 200, "{body}");
}
