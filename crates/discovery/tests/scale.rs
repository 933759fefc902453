//! What a push costs: 1 000 services, 50 proxies. Prints figures; run it by name.
//!
//! `cargo test -p discovery --test scale -- --ignored --nocapture`

#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![expect(clippy::print_stdout, reason = "figures are what it is for")]

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use api::ConfigSet;
use compile::View;
use discovery::compiler::{Compiler, MeshCompiler};
use discovery::fleet::{self, Fleet};
use discovery::mesh_state::Mesh;
use mesh::{MeshSnapshot, Reach};
use telemetry::registry::Registry;
use tokio::sync::watch;
use xds::client::Protocol;

const SERVICES: usize = 1000;
const PROXIES: usize = 50;

fn objects(extra: &str) -> ConfigSet {
    let mut yaml = String::new();
    for index in 0..SERVICES {
        let (namespace, high, low) = (index % 20, index / 250, index % 250 + 1);
        write!(
            yaml,
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{index}, namespace: n{namespace}}}\nspec: {{clusterIP: 10.96.{high}.{low}, selector: {{app: s{index}}}, ports: [{{name: http, port: 8080}}]}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: s{index}-0, namespace: n{namespace}, labels: {{app: s{index}, security.istio.io/tlsMode: istio}}}}\nspec: {{serviceAccountName: s{index}, containers: [{{name: a, image: a}}]}}\nstatus: {{phase: Running, podIP: 10.1.{high}.{low}, conditions: [{{type: Ready, status: 'True'}}]}}\n---\n"
        )
        .unwrap();
    }
    yaml.push_str(extra);
    ConfigSet::new(api::parse_documents("mesh.yaml", &yaml).one_after_another())
}

fn view(index: usize) -> View {
    let (namespace, high, low) = (index % 20, index / 250, index % 250 + 1);
    let ip = IpAddr::from([10, 1, u8::try_from(high).unwrap(), u8::try_from(low).unwrap()]);
    let mut view = View::sidecar(&format!("n{namespace}"), &format!("s{index}-0"), ip);
    view.labels = [("app".to_owned(), format!("s{index}"))].into();
    view
}

fn resident_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures"]
async fn a_push_of_a_thousand_services_to_fifty_proxies() {
    let metrics = Registry::new();
    let fleet = Arc::new(Fleet::new(metrics.clone()));
    let mut members = Vec::new();
    for index in 0..PROXIES {
        members.push(fleet.join(view(index), &format!("node-{index}"), "1", None, Protocol::Delta));
    }
    let (sender, meshes) = watch::channel(None);
    let compiler: Arc<dyn Compiler> = Arc::new(MeshCompiler::vetted());
    let worker = tokio::spawn(fleet::run(Arc::clone(&fleet), meshes, compiler));
    let cases = [
        ("first push", String::new()),
        ("nothing changed", String::new()),
        ("one endpoint more", "apiVersion: v1\nkind: Pod\nmetadata: {name: more, namespace: n0, labels: {app: s0, security.istio.io/tlsMode: istio}}\nspec: {serviceAccountName: s0, containers: [{name: a, image: a}]}\nstatus: {phase: Running, podIP: 10.2.0.1, conditions: [{type: Ready, status: 'True'}]}\n".to_owned()),
        ("a policy of one namespace", "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: n0}\nspec: {}\n".to_owned()),
    ];
    let before = resident_mib();
    let mut previous: Option<Arc<Mesh>> = None;
    for (push, (what, extra)) in cases.into_iter().enumerate() {
        let set = objects(&extra);
        let started = Instant::now();
        let (snapshot, _) = MeshSnapshot::next(previous.as_ref().map(|mesh| &mesh.snapshot), &set);
        let indexed = started.elapsed();
        let started = Instant::now();
        let push = u64::try_from(push).unwrap() + 1;
        let reach = previous.as_ref().map_or_else(Reach::everyone, |previous| snapshot.reach_since(&previous.snapshot));
        let mesh = Arc::new(Mesh { snapshot, push, label: "x".into(), version: push, findings: Vec::new() });
        previous = Some(Arc::clone(&mesh));
        fleet.affect(push, &reach);
        sender.send_replace(Some(mesh));
        fleet.enqueue_all();
        for (resources, _) in &mut members {
            resources.wait_for(|set| set.as_ref().is_some_and(|set| set.generation == push)).await.unwrap();
        }
        println!(
            "{what:28} snapshot {:6.1} ms, push to {PROXIES} proxies {:8.1} ms, {} MiB more than before",
            indexed.as_secs_f64() * 1000.0,
            started.elapsed().as_secs_f64() * 1000.0,
            resident_mib().saturating_sub(before)
        );
    }
    worker.abort();
}
