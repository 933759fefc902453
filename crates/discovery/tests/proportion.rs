//! What is compiled is in proportion to the change, and gives what compiling everything does.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use api::{Change, ConfigSet, Object};
use compile::{ProxyKind, View};
use discovery::compiler::{Compiled, Compiler, MeshCompiler};
use discovery::fleet::{self, Fleet, Member};
use discovery::mesh_state::Mesh;
use mesh::{MeshSnapshot, Reach, ServiceKey};
use proptest::prelude::*;
use telemetry::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use types::{Finding, SpiffeId};
use xds::ResourceSet;
use xds::client::Protocol;

/// Writes down what it is asked for: pod, and hosts; none for everything.
#[derive(Default)]
struct Noting {
    real: MeshCompiler,
    asked: Mutex<Vec<(String, Vec<String>)>>,
}

impl Compiler for Noting {
    fn compile(&self, snapshot: &MeshSnapshot, view: &View) -> Compiled {
        self.asked.lock().unwrap().push((view.name.to_string(), Vec::new()));
        self.real.compile(snapshot, view)
    }

    fn clusters_of(&self, snapshot: &MeshSnapshot, view: &View, services: &BTreeSet<ServiceKey>) -> Compiled {
        let hosts = services.iter().map(|key| key.host.to_string()).collect();
        self.asked.lock().unwrap().push((view.name.to_string(), hosts));
        self.real.clusters_of(snapshot, view, services)
    }
}

type Resources = watch::Receiver<Option<Arc<ResourceSet>>>;

/// A control plane without its edges.
struct Plane {
    fleet: Arc<Fleet>,
    compiler: Arc<Noting>,
    meshes: watch::Sender<Option<Arc<Mesh>>>,
    worker: JoinHandle<()>,
    proxies: Vec<(Resources, Member)>,
}

impl Plane {
    fn start(views: &[View]) -> Self {
        let fleet = Arc::new(Fleet::new(Registry::new()));
        let compiler = Arc::new(Noting { real: MeshCompiler::vetted(), ..Noting::default() });
        let (meshes, receiver) = watch::channel(None);
        let worker = tokio::spawn(fleet::run(Arc::clone(&fleet), receiver, Arc::clone(&compiler) as Arc<dyn Compiler>));
        let mut plane = Self { fleet, compiler, meshes, worker, proxies: Vec::new() };
        views.iter().for_each(|view| plane.join(view));
        plane
    }

    fn join(&mut self, view: &View) {
        let id = SpiffeId::parse(&format!("spiffe://cluster.local/ns/{}/sa/a", view.namespace)).unwrap();
        self.proxies.push(self.fleet.join(view.clone(), &view.name, "1", Some(id), Protocol::Delta));
    }

    /// Publishes what `set` gives; the fleet may be given more before it comes to it.
    fn publish(&self, set: &ConfigSet) {
        let previous = self.meshes.borrow().clone();
        let (snapshot, _) = MeshSnapshot::next(previous.as_deref().map(|mesh| &mesh.snapshot), set);
        let reach =
            previous.as_deref().map_or_else(Reach::everyone, |previous| snapshot.reach_since(&previous.snapshot));
        let push = previous.map_or(0, |previous| previous.push) + 1;
        self.fleet.affect(push, &reach);
        let mesh = Mesh { snapshot, push, label: "x".into(), version: push, findings: Vec::new() };
        self.meshes.send_replace(Some(Arc::new(mesh)));
        self.fleet.enqueue_all();
    }

    /// Waits until every proxy has the newest push.
    async fn settle(&mut self) {
        let push = self.meshes.borrow().as_ref().map_or(0, |mesh| mesh.push);
        for (resources, _) in &mut self.proxies {
            let is_new = |set: &Option<Arc<ResourceSet>>| set.as_ref().is_some_and(|set| set.generation == push);
            resources.wait_for(is_new).await.unwrap();
        }
    }

    /// What each proxy has.
    fn told(&self) -> Vec<BTreeMap<(String, String), Vec<u8>>> {
        let of = |set: &ResourceSet| {
            let all = set.tables().flat_map(|(type_url, table)| table.values().map(move |of| (type_url, of)));
            all.map(|(url, of)| ((url.to_owned(), of.name.to_string()), of.any.value.clone())).collect()
        };
        self.proxies.iter().map(|(resources, _)| of(resources.borrow().as_ref().unwrap())).collect()
    }

    fn findings(&self) -> BTreeSet<String> {
        self.fleet.findings().iter().map(Finding::to_string).collect()
    }

    fn asked(&self) -> Vec<(String, Vec<String>)> {
        std::mem::take(&mut self.compiler.asked.lock().unwrap())
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.worker.abort();
    }
}

fn vocabulary() -> Vec<Arc<Object>> {
    let text = include_str!("../../compile/tests/vocabulary.yaml");
    api::parse_documents("vocabulary.yaml", text).one_after_another().map(Arc::new).collect()
}

fn views() -> Vec<View> {
    let view = |kind, namespace: &str, name: &str, last: u8, label: (&str, &str)| View {
        kind,
        labels: [(label.0.to_owned(), label.1.to_owned())].into(),
        ..View::sidecar(namespace, name, [10, 1, 0, last].into())
    };
    vec![
        view(ProxyKind::Sidecar, "one", "a", 1, ("app", "a")),
        view(ProxyKind::Sidecar, "two", "b", 2, ("app", "b")),
        view(ProxyKind::Sidecar, "three", "stranger", 9, ("app", "stranger")),
        view(ProxyKind::Router, "one", "gateway", 4, ("istio", "gateway")),
    ]
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Steps of any length come at any time, and one proxy joins on the way. A plane that starts
    /// with the last objects compiles everything: what it gives is the truth.
    #[test]
    fn pushes_end_where_compiling_everything_does(
        at_first in prop::collection::vec(any::<bool>(), 64),
        steps in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), any::<bool>()), 1..16),
        joins in any::<prop::sample::Index>(),
    ) {
        runtime().block_on(async {
            let (words, views) = (vocabulary(), views());
            let mut set = ConfigSet::default();
            for (word, _) in words.iter().zip(at_first).filter(|(_, is_there)| *is_there) {
                set.apply(&Change::Upsert(Arc::clone(word)));
            }
            let (late, early) = views.split_last().unwrap();
            let mut plane = Plane::start(early);
            plane.publish(&set);
            let joins = joins.index(steps.len());
            for (at, (index, comes, settles)) in steps.into_iter().enumerate() {
                let word = index.get(&words);
                if comes {
                    set.apply(&Change::Upsert(Arc::clone(word)));
                } else {
                    set.apply(&Change::Delete(word.reference()));
                }
                if at == joins {
                    plane.join(late);
                }
                plane.publish(&set);
                if settles {
                    plane.settle().await;
                }
            }
            plane.settle().await;
            let mut fresh = Plane::start(&views);
            fresh.publish(&set);
            fresh.settle().await;
            prop_assert!(plane.told() == fresh.told());
            prop_assert_eq!(plane.findings(), fresh.findings());
            Ok(())
        })?;
    }
}

#[test]
fn an_endpoint_costs_the_clusters_of_its_service() {
    const MESH: &str = "
apiVersion: v1
kind: Service
metadata: {name: a, namespace: one}
spec: {clusterIP: 10.96.0.1, selector: {app: a}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: two}
spec: {clusterIP: 10.96.0.2, selector: {app: b}, ports: [{name: http, port: 80}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: narrow, namespace: three}
spec: {egress: [{hosts: ['two/*']}]}
";
    const POD: &str = "
---
apiVersion: v1
kind: Pod
metadata: {name: a9, namespace: one, labels: {app: a, security.istio.io/tlsMode: istio}}
spec: {serviceAccountName: a, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.99, conditions: [{type: Ready, status: 'True'}]}
";
    let set = |yaml: &str| ConfigSet::new(api::parse_documents("mesh.yaml", yaml).one_after_another());
    runtime().block_on(async {
        let mut plane = Plane::start(&views());
        plane.publish(&set(MESH));
        plane.settle().await;
        let all = |of: &[View]| of.iter().map(|view| (view.name.to_string(), vec![])).collect::<Vec<_>>();
        assert_eq!(plane.asked(), all(&views()));
        let cluster = "outbound|80||a.one.svc.cluster.local";
        let before = plane.told();
        plane.publish(&set(&format!("{MESH}{POD}")));
        plane.settle().await;
        let of_a = |name: &str| (name.to_owned(), vec!["a.one.svc.cluster.local".to_owned()]);
        assert_eq!(plane.asked(), ["a", "b", "stranger", "gateway"].map(of_a));
        for ((view, before), after) in views().iter().zip(before).zip(plane.told()) {
            let changed = after.iter().filter(|(key, value)| before.get(*key) != Some(*value));
            let changed: Vec<_> = changed.map(|((url, name), _)| (url.rsplit('.').next().unwrap(), &**name)).collect();
            let sees = *view.name != *"stranger";
            let expect = [("Cluster", cluster), ("ClusterLoadAssignment", cluster)];
            assert_eq!(changed, if sees { &expect[..] } else { &[] }, "{}", view.name);
        }
        // A second one of the same account: the cluster stays as it is.
        let before = plane.told();
        let second = POD.replace("a9", "a8").replace(".99", ".98");
        plane.publish(&set(&format!("{MESH}{POD}{second}")));
        plane.settle().await;
        let after = plane.told();
        let changed: Vec<_> = after[1].iter().filter(|(key, value)| before[1].get(*key) != Some(*value)).collect();
        assert_eq!(changed.len(), 1, "{changed:?}");
        // Nothing at all.
        plane.asked();
        plane.publish(&set(&format!("{MESH}{POD}{second}")));
        plane.settle().await;
        assert_eq!(plane.asked(), []);
    });
}
