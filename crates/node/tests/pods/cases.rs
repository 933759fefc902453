//! The tests, one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use capture::{Protocol, Redirect};
use node::{
    ContainerRequest, DnsPolicy, HostListener, Mount, Name, Output, Pod, PodId, PodRequest, PodRuntime, Rights,
    RuntimeError, RuntimeEvent, RuntimeOptions, SELF_EXE, ServiceAddress, ServicePort, Signal, Volume, VolumeFile,
    VolumeSource,
};
use tokio::sync::mpsc;

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// What each container wrote.
type Written = Arc<Mutex<BTreeMap<(PodId, String), Vec<u8>>>>;

type Case = (&'static str, fn(&tokio::runtime::Runtime));

const CASES: &[Case] = &[
    ("reach", |rt| rt.block_on(pods_reach_each_other())),
    ("capture", |rt| rt.block_on(connections_are_captured())),
    ("services", |rt| rt.block_on(service_addresses())),
    ("names", |rt| rt.block_on(names())),
    ("mounts", |rt| rt.block_on(mounts())),
    ("life", |rt| rt.block_on(programs_start_and_end())),
    ("host", |rt| rt.block_on(the_machine_is_reached())),
    ("exec", |rt| rt.block_on(exec_enters())),
    ("speed", |rt| rt.block_on(twelve_pods())),
    ("kill", |_| killed_parents_leave_nothing()),
];

pub(crate) fn run(filter: Option<&str>) -> bool {
    let who = if rustix::process::geteuid().is_root() { "root" } else { "user" };
    let mut good = true;
    for (name, case) in CASES.iter().filter(|(name, _)| filter.is_none_or(|filter| name.contains(filter))) {
        let began = Instant::now();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case(&runtime)));
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {who}/{name} ... {word} ({} ms)", began.elapsed().as_millis());
        good &= outcome.is_ok();
    }
    good
}

/// A mesh of one test.
struct Mesh {
    runtime: PodRuntime,
    events: mpsc::Receiver<RuntimeEvent>,
    output: Written,
    written: Arc<tokio::sync::Notify>,
    dir: tempfile::TempDir,
}

impl Mesh {
    async fn start(listeners: &[HostListener]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        std::fs::write(dir.path().join("socket"), "").unwrap();
        std::fs::write(dir.path().join("state/key"), "secret").unwrap();
        let output: Written = Arc::default();
        let written = Arc::new(tokio::sync::Notify::new());
        let (sink, bell) = (Arc::clone(&output), Arc::clone(&written));
        let options = RuntimeOptions {
            mesh: "podtest".into(),
            run_dir: dir.path().join("run"),
            run_files: vec![dir.path().join("socket")],
            unfinished: Vec::new(),
            host_listeners: listeners.to_vec(),
            hidden: vec![dir.path().join("state")],
            output: Arc::new(move |Output { pod, container, bytes, .. }: Output<'_>| {
                sink.lock().unwrap().entry((pod, container.into())).or_default().extend_from_slice(bytes);
                bell.notify_waiters();
                bell.notify_one();
            }),
        };
        let (runtime, events) = match PodRuntime::start(options).await {
            Ok(started) => started,
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string)),
        };
        Self { runtime, events, output, written, dir }
    }

    async fn pod(&self, name: &str, redirect: Option<Redirect>) -> Pod {
        let request = PodRequest { namespace: "shop".into(), name: name.into(), redirect, ..PodRequest::default() };
        self.runtime.create_pod(request).await.unwrap()
    }

    async fn run(&self, pod: &Pod, name: &str, words: &[&str]) {
        self.run_with(pod, name, words, |_| {}).await;
    }

    async fn run_with(&self, pod: &Pod, name: &str, words: &[&str], edit: impl FnOnce(&mut ContainerRequest)) {
        let mut request = container(name, words);
        edit(&mut request);
        self.runtime.start_container(pod.id, request).await.unwrap();
        self.await_output(pod, name, "ing").await;
    }

    async fn await_output(&self, pod: &Pod, name: &str, text: &str) {
        tokio::time::timeout(PATIENCE, async {
            loop {
                let told = self.written.notified();
                if self.said(pod, name).contains(text) {
                    return;
                }
                told.await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{name} never said {text:?}, but {:?}", self.said(pod, name)));
    }

    fn said(&self, pod: &Pod, name: &str) -> String {
        let output = self.output.lock().unwrap();
        output.get(&(pod.id, name.into())).map(|bytes| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default()
    }

    /// Runs a role beside a container and returns what it printed.
    async fn ask(&self, pod: &Pod, name: &str, words: &[&str]) -> String {
        let argv = [SELF_EXE].iter().chain(words).map(ToString::to_string).collect();
        let result = self.runtime.run_in_container(pod.id, name, argv, PATIENCE).await.unwrap();
        String::from_utf8_lossy(&result.output).into_owned()
    }

    async fn exit_of(&mut self, container: &str) -> i32 {
        loop {
            match tokio::time::timeout(PATIENCE, self.events.recv()).await.unwrap() {
                Some(RuntimeEvent::Exited { container: ended, code, .. }) if ended == container => return code,
                Some(RuntimeEvent::Exited { .. }) => {}
                other => panic!("{other:?} instead of the end of {container}"),
            }
        }
    }
}

fn container(name: &str, words: &[&str]) -> ContainerRequest {
    let argv = [SELF_EXE].iter().chain(words).map(ToString::to_string).collect();
    ContainerRequest { name: name.into(), argv, ..ContainerRequest::default() }
}

fn service(ip: [u8; 4], port: u16, endpoints: &[(Ipv4Addr, u16)]) -> ServiceAddress {
    let endpoints = endpoints.iter().map(|&(ip, port)| SocketAddr::from((ip, port))).collect();
    ServiceAddress { ip: ip.into(), ports: vec![ServicePort { port, protocol: Protocol::Tcp, endpoints }] }
}

async fn pods_reach_each_other() {
    let mesh = Mesh::start(&[]).await;
    let (a, b) = (mesh.pod("a", None).await, mesh.pod("b", None).await);
    assert_ne!(a.ip, b.ip);
    mesh.run(&a, "app", &["wait"]).await;
    // Port 80 without a capability.
    mesh.run(&b, "app", &["serve", "0.0.0.0:80", "b"]).await;
    let said = mesh.ask(&a, "app", &["dial", &format!("{}:80", b.ip)]).await;
    assert_eq!(said, format!("b peer={} local={}:80\n", a.ip, b.ip), "the source address is the pod's");
    if let Some(ip6) = b.ip6 {
        let began = Instant::now();
        mesh.run(&b, "app6", &["serve", "[::]:81", "b6"]).await;
        let said = mesh.ask(&a, "app", &["dial", &format!("[{ip6}]:81")]).await;
        assert_eq!(said, format!("b6 peer={} local=[{ip6}]:81\n", a.ip6.unwrap()));
        println!("  IPv6 in {} ms", began.elapsed().as_millis());
    }
    // From the machine's side, as probes do it.
    let mut stream = mesh.runtime.dial(SocketAddr::from((b.ip, 80))).await.unwrap();
    let mut text = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.unwrap();
    assert_eq!(text, format!("b peer={} local={}:80\n", node::SWITCH_IP, b.ip));
    // The other way: a listener in the switch, served by this process.
    let listener = mesh.runtime.switch_listener(SocketAddr::from((node::SWITCH_IP, 15012))).await.unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let serve = async {
        let (mut client, peer) = listener.accept().await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut client, format!("control plane to {}", peer.ip()).as_bytes())
            .await
            .unwrap();
    };
    let (said, ()) = tokio::join!(mesh.ask(&a, "app", &["dial", "10.77.0.1:15012"]), serve);
    assert_eq!(said, format!("control plane to {}", a.ip));
    // A program of the switch reaches pods.
    let control = PodRequest { name: "istiod".into(), network: node::PodNetwork::Switch, ..PodRequest::default() };
    let control = mesh.runtime.create_pod(control).await.unwrap();
    assert_eq!(control.ip, node::SWITCH_IP);
    mesh.run(&control, "discovery", &["serve", "10.77.0.1:15010", "discovery"]).await;
    assert!(mesh.ask(&a, "app", &["dial", "10.77.0.1:15010"]).await.starts_with("discovery peer="));
    assert!(mesh.ask(&control, "discovery", &["dial", &format!("{}:80", b.ip)]).await.starts_with("b peer=10.77.0.1 "));
    mesh.runtime.shutdown().await;
    assert!(matches!(mesh.runtime.create_pod(PodRequest::default()).await, Err(RuntimeError::Down)));
}

async fn connections_are_captured() {
    let mesh = Mesh::start(&[]).await;
    let excluded =
        Redirect { exclude_inbound_ports: vec![9000], exclude_outbound_ports: vec![9001], ..Redirect::default() };
    let (a, b) = (mesh.pod("a", Some(excluded)).await, mesh.pod("b", Some(Redirect::default())).await);
    let proxy = |request: &mut ContainerRequest| request.rights = Rights::Proxy;
    mesh.run(&b, "app", &["serve", "0.0.0.0:9080", "b"]).await;
    mesh.run_with(&b, "proxy", &["fake-proxy"], proxy).await;
    mesh.run(&a, "app", &["wait"]).await;
    mesh.run(&a, "direct", &["serve", "0.0.0.0:9000", "direct"]).await;
    mesh.run_with(&a, "proxy", &["fake-proxy"], |request| {
        proxy(request);
        request.env.insert("UPSTREAM".into(), format!("{}:9080", b.ip));
    })
    .await;
    // App A to a service address: proxy A sees that address, proxy B its own pod's, app B its port.
    let said = mesh.ask(&a, "app", &["dial", "10.96.0.50:80"]).await;
    let expect = format!(
        "outbound 10.96.0.50:80\ninbound {b}:9080 peer={a}\nb peer=127.0.0.6 local={b}:9080\n",
        a = a.ip,
        b = b.ip
    );
    assert_eq!(said, expect);
    // Excluded ports pass the proxies by.
    let said = mesh.ask(&b, "proxy", &["dial", &format!("{}:9000", a.ip)]).await;
    assert!(
        said.starts_with(&format!("outbound {}:9000", a.ip)),
        "programs run beside a proxy are not the proxy: {said}"
    );
    let plain = mesh.pod("plain", None).await;
    mesh.run(&plain, "app", &["serve", "0.0.0.0:9001", "plain"]).await;
    assert!(mesh.ask(&plain, "app", &["dial", &format!("{}:9000", a.ip)]).await.starts_with("direct peer="));
    assert!(mesh.ask(&a, "app", &["dial", &format!("{}:9001", plain.ip)]).await.starts_with("plain peer="));
    assert!(mesh.ask(&plain, "app", &["dial", &format!("{}:9080", b.ip)]).await.starts_with("inbound "));
    // An application holds nothing that could undo this.
    let said = mesh.ask(&a, "app", &["capabilities"]).await;
    for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(said.contains(&format!("{set}: 0000000000000000")), "{said}");
    }
    let said = mesh.ask(&a, "app", &["dial-marked", &format!("{}:9080", b.ip)]).await;
    assert!(said.contains("Operation not permitted"), "{said}");
}

async fn service_addresses() {
    let mesh = Mesh::start(&[]).await;
    let a = mesh.pod("a", None).await;
    let (one, two) = (mesh.pod("one", None).await, mesh.pod("two", None).await);
    mesh.run(&a, "app", &["wait"]).await;
    mesh.run(&one, "app", &["serve", "0.0.0.0:9080", "one"]).await;
    mesh.run(&two, "app", &["serve", "0.0.0.0:9080", "two"]).await;
    let both = [(one.ip, 9080), (two.ip, 9080)];
    mesh.runtime
        .set_services(vec![
            service([10, 96, 1, 1], 80, &both),
            service([10, 96, 1, 2], 80, &[]),
            service([10, 96, 1, 3], 80, &both[..1]),
        ])
        .await
        .unwrap();
    let mut seen = BTreeSet::new();
    for _ in 0..24 {
        let said = mesh.ask(&a, "app", &["dial", "10.96.1.1:80"]).await;
        assert!(said.contains(&format!("peer={}", a.ip)), "the source stays: {said}");
        seen.insert(said[..3].to_owned());
    }
    assert_eq!(seen, BTreeSet::from(["one".into(), "two".into()]), "both endpoints get some of 24");
    // Refused, not lost: no endpoints, no such port, no such service.
    for to in ["10.96.1.2:80", "10.96.1.1:81", "10.96.9.9:80"] {
        let said = mesh.ask(&a, "app", &["dial", to]).await;
        assert!(said.contains("Connection refused"), "{to}: {said}");
    }
    // A pod that calls itself by the service.
    assert!(mesh.ask(&one, "app", &["dial", "10.96.1.3:80"]).await.starts_with("one peer=10.77.0.1 "));
    // From the machine's side.
    let mut stream = mesh.runtime.dial("10.96.1.3:80".parse().unwrap()).await.unwrap();
    let mut text = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.unwrap();
    assert!(text.starts_with("one "), "{text}");
    // Endpoints change; services go.
    mesh.runtime.set_services(vec![service([10, 96, 1, 1], 80, &both[1..])]).await.unwrap();
    for _ in 0..8 {
        assert!(mesh.ask(&a, "app", &["dial", "10.96.1.1:80"]).await.starts_with("two "));
    }
    assert!(mesh.ask(&a, "app", &["dial", "10.96.1.3:80"]).await.contains("Connection refused"));
    // Many at once, in more than one batch.
    let many: Vec<_> = (0..1500_u16)
        .map(|i| service([10, 97, u8::try_from(i / 250).unwrap(), u8::try_from(i % 250).unwrap()], 80, &both))
        .collect();
    let began = Instant::now();
    mesh.runtime.set_services(many).await.unwrap();
    println!("  1500 services in {} ms", began.elapsed().as_millis());
    assert!(mesh.ask(&a, "app", &["dial", "10.97.5.249:80"]).await.contains("peer="));
}

async fn names() {
    let mesh = Mesh::start(&[]).await;
    let a = mesh.pod("a", None).await;
    mesh.run(&a, "app", &["wait"]).await;
    let names = BTreeMap::from([
        ("reviews.shop.svc.cluster.local".to_owned(), Name::Addresses(vec!["10.96.3.3".parse().unwrap()])),
        ("ratings.other.svc.cluster.local".to_owned(), Name::Addresses(vec!["10.96.3.4".parse().unwrap()])),
    ]);
    mesh.runtime.set_names(names).await.unwrap();
    for name in ["reviews", "reviews.shop", "reviews.shop.svc", "reviews.shop.svc.cluster.local", "REVIEWS"] {
        assert_eq!(mesh.ask(&a, "app", &["resolve", name]).await, "10.96.3.3\n", "{name}");
    }
    assert_eq!(mesh.ask(&a, "app", &["resolve", "ratings.other"]).await, "10.96.3.4\n");
    let said = mesh.ask(&a, "app", &["resolve", "ratings.shop.svc.cluster.local"]).await;
    assert!(said.contains("lookup") || said.contains("not known"), "{said}");
    // Its own name, from /etc/hosts.
    assert!(mesh.ask(&a, "app", &["resolve", "a"]).await.contains(&a.ip.to_string()));
    mesh.runtime
        .set_names(BTreeMap::from([(
            "reviews.shop.svc.cluster.local".to_owned(),
            Name::Addresses(vec!["10.96.3.9".parse().unwrap()]),
        )]))
        .await
        .unwrap();
    assert_eq!(mesh.ask(&a, "app", &["resolve", "reviews"]).await, "10.96.3.9\n");
    // A pod may choose other servers.
    let dns = DnsPolicy::Custom {
        nameservers: vec!["10.96.0.10".parse().unwrap()],
        searches: vec!["other.svc.cluster.local".into()],
        options: vec!["ndots:1".into()],
    };
    let b = PodRequest { name: "b".into(), namespace: "shop".into(), dns, ..PodRequest::default() };
    let b = mesh.runtime.create_pod(b).await.unwrap();
    mesh.run(&b, "app", &["wait"]).await;
    assert!(!mesh.ask(&b, "app", &["resolve", "reviews"]).await.contains("10.96"));
}

async fn mounts() {
    let mesh = Mesh::start(&[]).await;
    let file =
        |path: &str, text: &str| VolumeFile { path: path.into(), mode: 0o644, contents: text.as_bytes().to_vec() };
    let files = |name: &str, files: Vec<VolumeFile>| Volume { name: name.into(), source: VolumeSource::Files(files) };
    let host = mesh.dir.path().join("host");
    std::fs::create_dir(&host).unwrap();
    std::fs::write(host.join("note"), "from the machine").unwrap();
    let request = PodRequest {
        namespace: "shop".into(),
        name: "a".into(),
        hostname: "web-0".into(),
        volumes: vec![
            files("token", vec![file("token", "t1"), file("namespace", "shop")]),
            files("config", vec![file("a.conf", "A1"), file("b.conf", "B1")]),
            Volume { name: "scratch".into(), source: VolumeSource::Empty },
            Volume { name: "host".into(), source: VolumeSource::Host(host) },
        ],
        ..PodRequest::default()
    };
    let a = mesh.runtime.create_pod(request).await.unwrap();
    let mount = |volume: &str, path: &str, sub_path: Option<&str>, read_only| Mount {
        volume: volume.into(),
        path: PathBuf::from(path),
        sub_path: sub_path.map(ToOwned::to_owned),
        read_only,
    };
    let mounts = vec![
        mount("token", "/var/run/secrets/kubernetes.io/serviceaccount", None, true),
        mount("token", "/etc/istio/tokens", None, true),
        mount("config", "/lateen-test-config/deep", None, true),
        mount("config", "/usr/share/lateen-test/a.conf", Some("a.conf"), true),
        mount("scratch", "/lateen-test-scratch", None, false),
        mount("host", "/opt/lateen-test/host", None, true),
    ];
    mesh.run_with(&a, "app", &["wait"], |request| request.mounts = mounts.clone()).await;
    mesh.run_with(&a, "other", &["wait"], |request| request.mounts = vec![mounts[4].clone()]).await;
    let shell = |container: &'static str, script: String| {
        let runtime = mesh.runtime.clone();
        async move {
            let argv = vec!["/bin/sh".into(), "-c".into(), script];
            let result = runtime.run_in_container(a.id, container, argv, PATIENCE).await.unwrap();
            String::from_utf8_lossy(&result.output).into_owned()
        }
    };
    let cat = |path: &str| shell("app", format!("cat {path} 2>&1"));
    assert_eq!(cat("/var/run/secrets/kubernetes.io/serviceaccount/token").await, "t1");
    assert_eq!(cat("/etc/istio/tokens/namespace").await, "shop");
    assert_eq!(cat("/lateen-test-config/deep/b.conf").await, "B1");
    assert_eq!(cat("/usr/share/lateen-test/a.conf").await, "A1");
    assert_eq!(cat("/opt/lateen-test/host/note").await, "from the machine");
    assert_eq!(cat("/etc/hostname").await, "web-0\n");
    assert!(cat("/etc/resolv.conf").await.contains("nameserver 10.96.0.10"));
    // What was there is there still.
    assert!(shell("app", "ls /usr/share /bin/sh /etc/passwd /dev/null; id -u".into()).await.contains("/etc/passwd"));
    assert_eq!(
        shell("app", "ls /usr/share | wc -l".into()).await.trim().parse::<usize>().unwrap(),
        std::fs::read_dir("/usr/share").unwrap().count() + 1
    );
    // Shared within the pod, kept from the machine; read-only where asked.
    assert_eq!(shell("app", "echo hello > /lateen-test-scratch/x; cat /lateen-test-scratch/x".into()).await, "hello\n");
    assert_eq!(shell("other", "cat /lateen-test-scratch/x".into()).await, "hello\n");
    assert!(!Path::new("/lateen-test-scratch").exists() && !Path::new("/etc/istio/tokens").exists());
    for path in ["/lateen-test-config/deep/new", "/opt/lateen-test/host/new", "/etc/istio/tokens/token"] {
        let said = shell("app", format!("(echo x > {path}) 2>&1")).await;
        assert!(said.to_lowercase().contains("read-only"), "{path}: {said}");
    }
    // Over the folder below which the mesh keeps all volumes, as an emptyDir at /tmp may be.
    let over = [mount("scratch", mesh.dir.path().to_str().unwrap(), None, false), mounts[1].clone(), mounts[2].clone()];
    mesh.run_with(&a, "over", &["wait"], |request| request.mounts = over.to_vec()).await;
    let script = "cat /etc/istio/tokens/token /lateen-test-config/deep/a.conf; ls";
    assert_eq!(shell("over", format!("{script} {}", mesh.dir.path().display())).await, "t1A1x\n");
    // Keys of the mesh are out of sight.
    let state = mesh.dir.path().join("state");
    assert_eq!(shell("app", format!("ls {}", state.display())).await, "");
    assert_eq!(shell("app", format!("ls {}", mesh.dir.path().join("run").display())).await, "");
    assert!(state.join("key").exists());
    // What the pod mounts there is seen all the same, and nothing else.
    let here = mount("config", state.to_str().unwrap(), None, true);
    mesh.run_with(&a, "at", &["wait"], |request| request.mounts = vec![here]).await;
    let script = format!("echo $(ls {0}); cat {0}/a.conf", state.display());
    assert_eq!(shell("at", script).await, "a.conf b.conf\nA1");
    // Updates show in whole volumes, not in subPath mounts.
    mesh.runtime.update_volume(a.id, "config", vec![file("a.conf", "A2"), file("c.conf", "C2")]).await.unwrap();
    assert_eq!(cat("/lateen-test-config/deep/a.conf").await, "A2");
    assert_eq!(shell("app", "ls /lateen-test-config/deep".into()).await, "a.conf\nc.conf\n");
    assert_eq!(cat("/usr/share/lateen-test/a.conf").await, "A1");
    // Only its own processes show.
    if mesh.runtime.facts().own_proc {
        assert!(shell("app", "ls -d /proc/[0-9]* | wc -l".into()).await.trim().parse::<usize>().unwrap() < 8);
    }
    let wrong = ContainerRequest { mounts: vec![mount("none", "/x", None, true)], ..container("wrong", &["wait"]) };
    let error = mesh.runtime.start_container(a.id, wrong).await.unwrap_err();
    assert!(error.to_string().contains("\"none\""), "{error}");
    // A failed start leaves the manager fit.
    assert_eq!(cat("/etc/istio/tokens/namespace").await, "shop");
}

async fn programs_start_and_end() {
    let mut mesh = Mesh::start(&[]).await;
    let a = mesh.pod("a", None).await;
    mesh.runtime.start_container(a.id, container("seven", &["exit", "7"])).await.unwrap();
    assert_eq!(mesh.exit_of("seven").await, 7);
    // Restarted in place; SIGTERM reaches a program that has no handler for it.
    for signal in [Signal::Term, Signal::Kill] {
        mesh.run(&a, "app", &["wait"]).await;
        mesh.runtime.signal(a.id, "app", signal).await.unwrap();
        assert_eq!(mesh.exit_of("app").await, if signal == Signal::Term { 143 } else { 137 });
    }
    let again = mesh.runtime.signal(a.id, "app", Signal::Term).await;
    assert!(matches!(again, Err(RuntimeError::NoSuchContainer(_))), "{again:?}");
    // What a container leaves behind ends with it.
    mesh.runtime.start_container(a.id, container("orphans", &["orphans"])).await.unwrap();
    mesh.await_output(&a, "orphans", "left").await;
    let began = Instant::now();
    // A program's words show a moment after its start is reported.
    while processes("orphan").len() < 2 {
        assert!(began.elapsed() < PATIENCE, "the orphan runs");
        tokio::task::yield_now().await;
    }
    mesh.runtime.signal(a.id, "orphans", Signal::Term).await.unwrap();
    assert_eq!(mesh.exit_of("orphans").await, 143);
    await_no_process("orphan");
    let missing = ContainerRequest { argv: vec!["no-such-program".into()], ..container("missing", &[]) };
    match mesh.runtime.start_container(a.id, missing).await {
        Err(RuntimeError::Program { program, source }) => {
            assert_eq!((program.as_str(), source.kind()), ("no-such-program", std::io::ErrorKind::NotFound));
        }
        other => panic!("{other:?}"),
    }
    let lost = ContainerRequest { cwd: Some("/no/such/folder".into()), ..container("lost", &["wait"]) };
    assert!(mesh.runtime.start_container(a.id, lost).await.unwrap_err().to_string().contains("/no/such/folder"));
    // Found by the PATH of its own environment; output of both streams arrives.
    let shell = ContainerRequest {
        argv: vec!["sh".into(), "-c".into(), "echo out; echo $GREETING >&2; exit 3".into()],
        ..container("sh", &[])
    };
    let shell = ContainerRequest { env: BTreeMap::from([("GREETING".into(), "hello".into())]), ..shell };
    mesh.runtime.start_container(a.id, shell).await.unwrap();
    assert_eq!(mesh.exit_of("sh").await, 3);
    mesh.await_output(&a, "sh", "hello").await;
    // Time limits of probes.
    mesh.run(&a, "app", &["wait"]).await;
    let argv = vec![SELF_EXE.into(), "wait".into()];
    let result = mesh.runtime.run_in_container(a.id, "app", argv, Duration::from_millis(200)).await.unwrap();
    assert_eq!(result.code, None);
    let argv = vec![SELF_EXE.into(), "exit".into(), "4".into()];
    let result = mesh.runtime.run_in_container(a.id, "app", argv, PATIENCE).await.unwrap();
    assert_eq!(result.code, Some(4));
    // A deleted pod takes its programs along and answers to nothing.
    mesh.runtime.start_container(a.id, container("marked", &["wait", "deleted-pod"])).await.unwrap();
    mesh.await_output(&a, "marked", "ing").await;
    mesh.runtime.delete_pod(a.id).await.unwrap();
    await_no_process("deleted-pod");
    assert!(matches!(mesh.runtime.signal(a.id, "app", Signal::Term).await, Err(RuntimeError::NoSuchPod(_))));
    assert!(matches!(mesh.runtime.delete_pod(a.id).await, Err(RuntimeError::NoSuchPod(_))));
    let b = mesh.pod("b", None).await;
    assert_ne!(b.ip, a.ip, "a freed address rests");
}

async fn the_machine_is_reached() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = PodRuntime::start(RuntimeOptions {
        mesh: "taken".into(),
        run_dir: std::env::temp_dir().join(format!("lateen-taken-{}", std::process::id())),
        run_files: Vec::new(),
        unfinished: Vec::new(),
        host_listeners: vec![HostListener { port: 8080, address: taken.local_addr().unwrap() }],
        hidden: Vec::new(),
        output: Arc::new(|_| {}),
    })
    .await;
    let said = refused.unwrap_err().to_string();
    assert!(said.contains(&taken.local_addr().unwrap().to_string()) && said.contains("8080"), "{said}");

    let mesh = Mesh::start(&[HostListener { port: 8080, address: "127.0.0.1:0".parse().unwrap() }]).await;
    let gateway = mesh.pod("gateway", None).await;
    mesh.run_with(&gateway, "proxy", &["serve-inherited", "8080"], |request| {
        request.rights = Rights::Proxy;
        request.listeners = vec![8080];
        request.host_sockets = true;
    })
    .await;
    let address = mesh.runtime.host_address(8080).unwrap();
    let read = |address: SocketAddr| {
        let mut text = String::new();
        std::net::TcpStream::connect(address).unwrap().read_to_string(&mut text).unwrap();
        text
    };
    assert!(tokio::task::spawn_blocking(move || read(address)).await.unwrap().starts_with("gateway peer=127.0.0.1 "));
    assert_eq!(mesh.runtime.host_address(8443), None);

    // A proxy connects a socket of the machine to a service on the machine's loopback.
    let to = taken.local_addr().unwrap().to_string();
    let world = std::thread::spawn(move || {
        let (mut client, _) = taken.accept().unwrap();
        client.write_all(b"the world").unwrap();
        taken
    });
    let pod = mesh.pod("proxied", Some(Redirect::default())).await;
    let dial =
        ContainerRequest { rights: Rights::Proxy, host_sockets: true, ..container("proxy", &["dial-host", &to]) };
    mesh.runtime.start_container(pod.id, dial).await.unwrap();
    mesh.await_output(&pod, "proxy", "the world").await;
    world.join().unwrap();

    // A plain pod: relayed. The machine's loopback has an address of its own in the mesh.
    let plain = mesh.pod("plain", None).await;
    mesh.run(&plain, "app", &["wait"]).await;
    let local = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("{}:{}", capture::Network::LOCAL.host, local.local_addr().unwrap().port());
    let serving = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut client, peer) = local.accept().unwrap();
            write!(client, "the machine to {}", peer.ip()).unwrap();
        }
    });
    assert_eq!(mesh.ask(&plain, "app", &["dial", &to]).await, "the machine to 127.0.0.1");
    let marked = ContainerRequest { rights: Rights::Proxy, ..container("marked", &["dial-marked", &to]) };
    mesh.runtime.start_container(pod.id, marked).await.unwrap();
    mesh.await_output(&pod, "marked", "the machine to 127.0.0.1").await;
    serving.join().unwrap();

    // The world. Needs an address of the machine that is not loopback.
    if let Some(own) = own_address() {
        let world = TcpListener::bind((own, 0)).unwrap();
        let to = world.local_addr().unwrap();
        let serving = std::thread::spawn(move || {
            let (mut client, peer) = world.accept().unwrap();
            write!(client, "the world to {}", peer.ip()).unwrap();
        });
        assert_eq!(mesh.ask(&plain, "app", &["dial", &to.to_string()]).await, format!("the world to {own}"));
        serving.join().unwrap();
        // Nobody listens: a reset soon, not silence.
        let said = mesh.ask(&plain, "app", &["dial", &format!("{own}:1")]).await;
        assert!(said.is_empty() || said.contains("reset"), "{said}");
    } else {
        println!("  (no address beside loopback: the relay was not tried)");
    }
}

/// The machine's address towards others, if it has one. Nothing is sent.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_loopback() && !own.is_unspecified()).then_some(own)
}

async fn exec_enters() {
    let mut mesh = Mesh::start(&[]).await;
    let a = mesh.pod("exec-me", Some(Redirect::default())).await;
    mesh.run_with(&a, "app", &["wait"], |request| {
        request.env.insert("COLOUR".into(), "blue".into());
        request.cwd = Some("/usr".into());
    })
    .await;
    let target = mesh.runtime.exec_target(a.id, "app").unwrap();
    let exec = |words: &[&str]| {
        let words: Vec<_> = words.iter().map(Into::into).collect();
        let output = node::exec::command(&target, &words).unwrap().output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let said = exec(&["sh", "-c", "uname -n; echo $COLOUR; pwd; cat /proc/self/status | grep CapEff; exit 5"]);
    assert_eq!(said, (Some(5), "exec-me\nblue\n/usr\nCapEff:\t0000000000000000\n".into()));
    assert_eq!(exec(&["sh", "-c", "kill -9 $$"]).0, Some(137));
    let (code, said) = exec(&["no-such-program"]);
    assert_eq!(code, Some(127), "{said}");
    assert!(said.contains("no-such-program"), "{said}");
    // In the pod's network.
    let (_, said) = exec(&["cat", "/proc/net/fib_trie"]);
    assert!(said.contains(&a.ip.to_string()), "{said}");
    mesh.runtime.signal(a.id, "app", Signal::Kill).await.unwrap();
    assert_eq!(mesh.exit_of("app").await, 137);
    let (code, _) = exec(&["true"]);
    assert_eq!(code, Some(126), "the container is gone");
}

async fn twelve_pods() {
    let began = Instant::now();
    let mesh = Mesh::start(&[]).await;
    let ready = began.elapsed();
    let began = Instant::now();
    let mut pods = Vec::new();
    for i in 0..12 {
        pods.push(mesh.pod(&format!("p{i}"), Some(Redirect::default())).await);
    }
    let made = began.elapsed();
    for pod in &pods {
        mesh.runtime.start_container(pod.id, container("app", &["wait"])).await.unwrap();
        let proxy = ContainerRequest { rights: Rights::Proxy, ..container("proxy", &["wait"]) };
        mesh.runtime.start_container(pod.id, proxy).await.unwrap();
    }
    let started = began.elapsed();
    let began = Instant::now();
    mesh.runtime.shutdown().await;
    println!(
        "  ready {} ms, 12 pods {} ms, with 24 programs {} ms, stop {} ms",
        ready.as_millis(),
        made.as_millis(),
        started.as_millis(),
        began.elapsed().as_millis()
    );
}

/// A mesh that another process kills.
pub(crate) fn hold(marker: &str) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let mesh = Mesh::start(&[]).await;
        for i in 0..3 {
            let pod = mesh.pod(&format!("p{i}"), Some(Redirect::default())).await;
            mesh.runtime.start_container(pod.id, container("app", &["orphans", marker])).await.unwrap();
            mesh.await_output(&pod, "app", "left").await;
            println!("{i}");
        }
        std::future::pending::<()>().await;
    });
    Ok(())
}

/// `kill -9` of the parent, of the starter, of the manager, at several moments of the build.
fn killed_parents_leave_nothing() {
    for (round, (victim, after)) in
        [("hold", 3), ("hold", 1), ("node-starter", 3), ("node-manager", 3)].into_iter().enumerate()
    {
        let marker = format!("held-{}-{round}", std::process::id());
        let mut parent = Command::new("/proc/self/exe")
            .args(["hold", &marker])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines();
        for _ in 0..after {
            lines.next().unwrap().unwrap();
        }
        let pid = i32::try_from(parent.id()).unwrap();
        let family = descendants(pid);
        assert!(family.len() > 3, "{family:?}");
        let target = if victim == "hold" {
            pid
        } else {
            *family.iter().find(|&&pid| command_line(pid).iter().any(|word| word == victim)).expect("it runs")
        };
        rustix::process::kill_process(rustix::process::Pid::from_raw(target).unwrap(), rustix::process::Signal::KILL)
            .unwrap();
        let began = Instant::now();
        while family.iter().any(|&pid| alive(pid)) {
            assert!(
                began.elapsed() < PATIENCE,
                "{victim}: {:?} live on",
                family.iter().filter(|&&pid| alive(pid)).collect::<Vec<_>>()
            );
            std::thread::yield_now();
        }
        if victim != "hold" {
            parent.kill().unwrap();
        }
        parent.wait().unwrap();
        await_no_process(&marker);
    }
}

fn command_line(pid: i32) -> Vec<String> {
    let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    text.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// Zombies count as gone: they hold nothing, and who reaps them is not ours.
fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

fn all_pids() -> Vec<i32> {
    std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// All processes below `of`, nearest first. Numbers begin anew when they have run out, so they do not tell who
/// was there before.
fn descendants(of: i32) -> Vec<i32> {
    let parents: BTreeMap<i32, i32> = all_pids()
        .into_iter()
        .filter_map(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?))
        })
        .collect();
    let depth = |pid: i32| {
        let (mut at, mut depth) = (pid, 1);
        while let Some(&parent) = parents.get(&at) {
            if parent == of {
                return Some(depth);
            }
            (at, depth) = (parent, depth + 1);
        }
        None
    };
    let mut below: Vec<(u32, i32)> = parents.keys().filter_map(|&pid| Some((depth(pid)?, pid))).collect();
    below.sort_unstable();
    below.into_iter().map(|(_, pid)| pid).collect()
}

fn processes(marker: &str) -> Vec<i32> {
    all_pids()
        .into_iter()
        .filter(|&pid| alive(pid) && command_line(pid).iter().any(|word| word.contains(marker)))
        .collect()
}

fn await_no_process(marker: &str) {
    let began = Instant::now();
    loop {
        let left = processes(marker);
        if left.is_empty() {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{marker}: {left:?} live on");
        std::thread::yield_now();
    }
}
