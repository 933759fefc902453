//! Deployments become running pods: start, probes, endpoints, rollout, scale, crash, volumes, end.
//!
//! The binary plays every part (see the test `pods`): the node's hidden roles, the program in the
//! pods, and the tests.

#![expect(clippy::unwrap_used, reason = "a test without the usual harness; elsewhere tests may unwrap")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use api::{ConfigSet, Kind, k8s};
use node::controller::{Controller, ControllerOptions, Outputs};
use node::logs::Logs;
use node::store::{Mode, Origin, Store};
use node::token::{TokenReview, Tokens};
use node::{PodRuntime, RuntimeOptions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use types::NamespacedName;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(code) = node::internal_main(arguments.clone()) {
        return code;
    }
    let words: Vec<String> = arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    match words.first().map(String::as_str) {
        Some("serve") => serve(words.get(1).map_or(8080, |port| port.parse().unwrap())),
        Some("fail") => return ExitCode::from(3),
        Some("--list") => println!("controllers: test"),
        _ => {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(tests());
        }
    }
    ExitCode::SUCCESS
}

/// The application: tells who it is and what it was given; drains on SIGTERM as a good one does.
fn serve(port: u16) {
    let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
    println!("serving as {}", std::env::var("POD_NAME").unwrap_or_default());
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut buffer = [0; 1024];
        let length = stream.read(&mut buffer).unwrap_or(0);
        let head = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let path = head.split(' ').nth(1).unwrap_or("/").to_owned();
        let body = match path.as_str() {
            "/token" => std::fs::read_to_string("/var/run/secrets/tokens/istio-token").unwrap_or_default(),
            "/config" => std::fs::read_to_string("/etc/config/greeting").unwrap_or_default(),
            _ => ["POD_NAME", "POD_IP", "GREETING", "VERSION"]
                .map(|name| std::env::var(name).unwrap_or_default())
                .join(","),
        };
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
        drop(stream.write_all(answer.as_bytes()));
    }
}

/// Makes the next worker that waits for proxies panic.
static FAIL_ONCE: AtomicBool = AtomicBool::new(false);

const OBJECTS: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: shop}
data: {greeting: hello}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata:
      labels: {app: web}
      annotations: {lateen.dev/command: lateen serve 8080}
    spec:
      serviceAccountName: web
      terminationGracePeriodSeconds: 2
      containers:
      - name: web
        image: example/web:1
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}
        env:
        - {name: VERSION, value: "1"}
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: GREETING, valueFrom: {configMapKeyRef: {name: settings, key: greeting}}}
        volumeMounts:
        - {name: config, mountPath: /etc/config}
        - {name: token, mountPath: /var/run/secrets/tokens}
      volumes:
      - {name: config, configMap: {name: settings}}
      - {name: token, projected: {sources: [{serviceAccountToken: {audience: istio-ca, path: istio-token}}]}}
---
apiVersion: v1
kind: Pod
metadata: {name: crash, namespace: shop, annotations: {lateen.dev/command: lateen fail}}
spec: {containers: [{name: c, image: x}]}
---
apiVersion: v1
kind: Pod
metadata: {name: nobody, namespace: shop}
spec: {containers: [{name: c, image: example/unknown}]}
---
apiVersion: v1
kind: Pod
metadata: {name: waits, namespace: shop, annotations: {lateen.dev/command: lateen serve 8080}}
spec: {containers: [{name: c, image: x, env: [{name: GREETING, valueFrom: {secretKeyRef: {name: later, key: k}}}]}]}
"#;

struct Mesh {
    store: Arc<Store>,
    runtime: PodRuntime,
    logs: Arc<Logs>,
    tokens: Arc<Tokens>,
    controller: Controller,
}

impl Mesh {
    fn apply(&self, text: &str) {
        let read = api::parse_documents("test.yaml", text);
        assert!(!read.has_errors(), "{:?}", read.findings);
        let documents = read.objects.into_iter().map(|o| ((*o.object.raw).clone(), Origin::Api)).collect();
        for outcome in self.store.apply(documents, Mode::Apply, false).unwrap() {
            assert!(outcome.findings.is_empty(), "{outcome:?}");
        }
    }

    /// Waits for something to become true of the objects.
    async fn until(&self, what: &str, test: impl Fn(&ConfigSet) -> bool) {
        let mut version = self.store.version();
        let waited = tokio::time::timeout(Duration::from_secs(90), async {
            while !test(&self.store.objects()) {
                version.changed().await.unwrap();
            }
        });
        if waited.await.is_err() {
            let pods: Vec<String> = self
                .store
                .objects()
                .all::<k8s::Pod>()
                .map(|(o, p)| format!("{} {:?}", o.meta.name, p.status))
                .collect();
            panic!("never: {what}\n{}", pods.join("\n"));
        }
        println!("ok: {what}");
    }

    async fn get(&self, to: SocketAddr, path: &str) -> std::io::Result<String> {
        let mut stream = self.runtime.dial(to).await.map_err(std::io::Error::other)?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).ok_or_else(|| std::io::Error::other("no answer"))
    }
}

fn web(objects: &ConfigSet) -> Vec<(&str, &k8s::Pod, bool)> {
    let pods = objects
        .in_namespace::<k8s::Pod>("shop")
        .filter(|(o, _)| o.meta.labels.get("app").is_some_and(|app| app == "web"));
    pods.map(|(object, pod)| (&*object.meta.name, &**pod, object.meta.deleted)).collect()
}

fn ready_endpoints(objects: &ConfigSet) -> usize {
    let slices = objects.in_namespace::<k8s::EndpointSlice>("shop");
    slices.flat_map(|(_, slice)| &slice.endpoints).filter(|e| e.conditions.ready == Some(true)).count()
}

fn rolled_out(objects: &ConfigSet, replicas: u32) -> bool {
    let Some((object, deployment)) = objects.get::<k8s::Deployment>("shop", "web") else { return false };
    let Some(status) = &deployment.status else { return false };
    status.observed_generation == object.meta.generation
        && (status.replicas, status.updated_replicas, status.ready_replicas) == (replicas, replicas, replicas)
        && web(objects).len() == replicas as usize
}

async fn tests() {
    let folder = tempfile::tempdir().unwrap();
    let logs = Arc::new(Logs::new());
    let outputs = Outputs::new(Arc::clone(&logs));
    let options = RuntimeOptions {
        mesh: "controllers".into(),
        run_dir: folder.path().join("run"),
        run_files: Vec::new(),
        unfinished: Vec::new(),
        host_listeners: Vec::new(),
        hidden: Vec::new(),
        output: outputs.sink(),
    };
    let (runtime, events) = match PodRuntime::start(options).await {
        Ok(started) => started,
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string)),
    };
    let store = Arc::new(Store::in_memory());
    let tokens = Arc::new(Tokens::new());
    let (_root, root_cert) = tokio::sync::watch::channel(None);
    let controller = Controller::start(
        ControllerOptions {
            store: Arc::clone(&store),
            runtime: runtime.clone(),
            outputs,
            tokens: Arc::clone(&tokens),
            images: Vec::new(),
            root_cert,
            drain_lead: Duration::from_millis(300),
            settled: Some(Arc::new(|_| {
                Box::pin(async { assert!(!FAIL_ONCE.swap(false, Ordering::Relaxed), "a worker fails on purpose") })
            })),
        },
        events,
    );
    let mesh = Arc::new(Mesh { store, runtime, logs, tokens, controller });

    let begun = Instant::now();
    mesh.apply(OBJECTS);
    mesh.until("two pods are ready and in the slice", |o| rolled_out(o, 2) && ready_endpoints(o) == 2).await;
    println!("    after {:?}", begun.elapsed());
    facts(&mesh).await;
    trouble(&mesh).await;
    rollout_under_load(&mesh).await;
    a_worker_fails(&mesh).await;
    scale_and_end(&mesh).await;

    mesh.controller.stop().await;
    mesh.runtime.shutdown().await;
    println!("controllers: all good");
}

/// What a pod was given: variables, files, token, logs, exec.
async fn facts(mesh: &Mesh) {
    let objects = mesh.store.objects();
    let pods = web(&objects);
    let (name, pod, _) = pods[0];
    let address = SocketAddr::new(pod.status.pod_ip.parse().unwrap(), 8080);
    assert_eq!(mesh.get(address, "/").await.unwrap(), format!("{name},{},hello,1", pod.status.pod_ip));
    assert_eq!(mesh.get(address, "/config").await.unwrap(), "hello");
    let token = mesh.get(address, "/token").await.unwrap();
    let review = TokenReview { token, audience: "istio-ca".into() };
    let now = jiff::Timestamp::now().as_second();
    let reviewed = mesh.tokens.review(&review, &objects, now);
    assert!(reviewed.authenticated && reviewed.service_account == "web" && reviewed.pod == name, "{reviewed:?}");
    let log = mesh.logs.read(&Logs::key("shop", name, "web"), None).map(|(bytes, _)| String::from_utf8(bytes).unwrap());
    assert_eq!(log.as_deref(), Some(format!("serving as {name}\n").as_str()));
    assert!(mesh.controller.exec_target("shop", name, "web").is_ok());
    assert!(mesh.controller.exec_target("shop", "none", "web").is_err());

    mesh.apply(&OBJECTS.split("---").next().unwrap().replace("hello", "goodbye"));
    let deadline = Instant::now() + Duration::from_secs(60);
    while mesh.get(address, "/config").await.unwrap() != "goodbye" {
        assert!(Instant::now() < deadline, "the volume never followed its ConfigMap");
        tokio::task::yield_now().await;
    }
    println!("ok: variables, volumes, tokens, logs, exec");
}

/// Pods that cannot run say why, and run once they can.
async fn trouble(mesh: &Mesh) {
    let status = |objects: &ConfigSet, name: &str| {
        objects.get::<k8s::Pod>("shop", name).map(|(_, pod)| pod.status.clone()).unwrap_or_default()
    };
    let waiting = move |objects: &ConfigSet, name: &str| -> Option<String> {
        Some(status(objects, name).container_statuses.first()?.state.waiting.as_ref()?.reason.clone())
    };
    mesh.until("a crashing container backs off", |o| waiting(o, "crash").as_deref() == Some("CrashLoopBackOff")).await;
    let objects = mesh.store.objects();
    let crashed = status(&objects, "crash").container_statuses.remove(0);
    assert_eq!(crashed.last_state.terminated.map(|ended| ended.exit_code), Some(3));
    mesh.until("an image nobody plays is said", |o| waiting(o, "nobody").as_deref() == Some("ErrImageNeverPull")).await;
    assert!(mesh.controller.findings().iter().any(|f| f.hint.contains("--image example/unknown=PROGRAM")));
    mesh.until("a missing secret is said", |o| waiting(o, "waits").as_deref() == Some("CreateContainerConfigError"))
        .await;
    mesh.apply("apiVersion: v1\nkind: Secret\nmetadata: {name: later, namespace: shop}\nstringData: {k: v}\n");
    mesh.until("it runs once the secret is there", |o| status(o, "waits").is_ready()).await;
}

/// A rollout loses no request through the service's address.
async fn rollout_under_load(mesh: &Arc<Mesh>) {
    let objects = mesh.store.objects();
    let before: BTreeSet<String> = web(&objects).iter().map(|(name, ..)| (*name).to_owned()).collect();
    let ip: IpAddr = objects.get::<k8s::Service>("shop", "web").unwrap().1.spec.cluster_ip.parse().unwrap();
    let (stop, done, failed) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let load = {
        let (mesh, stop, done, failed) = (Arc::clone(mesh), Arc::clone(&stop), Arc::clone(&done), Arc::clone(&failed));
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                match mesh.get(SocketAddr::new(ip, 80), "/").await {
                    Ok(_) => done.fetch_add(1, Ordering::Relaxed),
                    Err(error) => {
                        println!("    failed: {error}");
                        failed.fetch_add(1, Ordering::Relaxed)
                    }
                };
            }
        })
    };
    let key = NamespacedName::new("shop", "web");
    mesh.store
        .patch(Kind::Deployment, &key, |d| {
            d["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = "2".into();
        })
        .unwrap();
    mesh.until("the rollout is through", |o| {
        rolled_out(o, 2) && web(o).iter().all(|(name, ..)| !before.contains(*name))
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    println!("    {} requests", done.load(Ordering::Relaxed));
    assert!(done.load(Ordering::Relaxed) > 10);
    assert_eq!(failed.load(Ordering::Relaxed), 0, "requests were lost");
}

/// A worker that panics takes its pod along and nothing else; the pod's name is free again.
async fn a_worker_fails(mesh: &Mesh) {
    let objects = mesh.store.objects();
    let key = NamespacedName::new("shop", web(&objects)[0].0);
    FAIL_ONCE.store(true, Ordering::Relaxed);
    mesh.store.delete(Kind::Pod, &key).unwrap();
    mesh.until("the pod is gone, another one takes its place", |o| {
        o.find(Kind::Pod, &key).is_none() && rolled_out(o, 2) && ready_endpoints(o) == 2
    })
    .await;
    assert!(!FAIL_ONCE.load(Ordering::Relaxed), "it did fail");
}

async fn scale_and_end(mesh: &Mesh) {
    let key = NamespacedName::new("shop", "web");
    mesh.store.patch(Kind::Deployment, &key, |d| d["spec"]["replicas"] = 3.into()).unwrap();
    mesh.until("scaled up", |o| rolled_out(o, 3) && ready_endpoints(o) == 3).await;
    mesh.store.patch(Kind::Deployment, &key, |d| d["spec"]["replicas"] = 1.into()).unwrap();
    mesh.until("scaled down", |o| rolled_out(o, 1) && ready_endpoints(o) == 1).await;
    mesh.store.delete(Kind::Namespace, &NamespacedName::new("", "shop")).unwrap();
    mesh.until("everything is gone with its namespace", |o| {
        o.all::<k8s::Pod>().count() == 0 && ready_endpoints(o) == 0
    })
    .await;
}
