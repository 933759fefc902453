//! How a mesh starts and ends: who may, what is left, what stays.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use testkit::mesh::{is_root, lateen, program, run, run_lateen};
use testkit::{Client, Mesh, Setup, eventually};

use crate::apps::{namespace, service, workload};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One application without proxy: all that a test of the machine needs.
fn small() -> String {
    namespace("plain", false) + "---\n" + &workload("plain", "curl", "v1", "curlimages/curl", None, "")
}

/// Two applications with proxies, the second one behind the gateway.
fn meshed(body: &str) -> String {
    let all = [
        namespace("shop", true),
        workload("shop", "curl", "v1", "curlimages/curl", None, ""),
        workload("shop", "httpbin", "v1", "docker.io/kong/httpbin", Some(80), ""),
        service("shop", "httpbin", "{name: http, port: 8000, targetPort: 80}"),
        format!(
            "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: gateway, namespace: shop}}
spec:
  selector: {{istio: ingressgateway}}
  servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: [\"*\"]}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: all, namespace: shop}}
spec:
  hosts: [\"*\"]
  gateways: [gateway]
  http:
  - match: [{{uri: {{exact: /name}}}}]
    directResponse: {{status: 200, body: {{string: {body}}}}}
  - route: [{{destination: {{host: httpbin, port: {{number: 8000}}}}}}]
"
        ),
    ];
    all.join("\n---\n")
}

/// Who runs a mesh.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum User {
    /// Who runs the tests.
    Own,
    /// One without any right, also when root runs the tests.
    Ordinary,
}

/// `lateen up` as a child of the test, in a folder of its own.
struct Up {
    child: Child,
    dir: tempfile::TempDir,
    /// The words that run `lateen`.
    program: Vec<PathBuf>,
}

impl Drop for Up {
    fn drop(&mut self) {
        // Ended already is as good.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Up {
    fn start(user: User, manifests: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("lt-").tempdir().unwrap();
        Self::start_in(dir, user, manifests)
    }

    fn start_in(dir: tempfile::TempDir, user: User, manifests: &str) -> Self {
        Self::start_with(dir, user, "-", manifests)
    }

    /// With `-f FROM`, a file of the folder or `-`, where `input` comes.
    fn start_with(dir: tempfile::TempDir, user: User, from: &str, input: &str) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(dir.path().join("up.log")).unwrap();
        let program = program(dir.path(), user == User::Ordinary);
        let mut child = Command::new(&program[0])
            .args(&program[1..])
            .args(["up", "--name", "life", "--state-dir", "s", "-f", from])
            .args(["--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0"])
            .current_dir(&dir)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let up = Self { child, dir, program };
        eventually("the mesh is ready", || {
            let status: Value =
                serde_json::from_slice(&up.command(&["status", "-o", "json"], "").stdout).unwrap_or_default();
            if status["ready"] == true { Ok(()) } else { Err(format!("{status}\n{}", up.said())) }
        });
        up
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("up.log")).unwrap_or_default()
    }

    fn command(&self, args: &[&str], input: &str) -> Output {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).args(args).arg("--state-dir").arg(self.dir.path().join("s"));
        run(&mut command, input)
    }

    /// The same folder again, with what was left in it.
    fn restart(&mut self, user: User, manifests: &str) {
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        *self = Self::start_in(dir, user, manifests);
    }

    fn must(&self, args: &[&str], input: &str) -> String {
        let output = self.command(args, input);
        assert!(output.status.success(), "{args:?}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    fn signal(&self, signal: &str) {
        signal_process(self.child.id(), signal);
    }
}

fn signal_process(pid: u32, signal: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill {signal} {pid}")]).status().unwrap();
    assert!(status.success(), "kill {signal} {pid}");
}

fn pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Parent and whether it lives; zombies hold nothing.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit_once(')')?.1.split_whitespace();
    let state = words.next()?;
    (!matches!(state, "Z" | "X")).then_some(())?;
    words.next()?.parse().ok()
}

/// A process with all that it has started.
fn family(of: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = pids().filter_map(|pid| Some((pid, parent_of(pid)?))).collect();
    let mut found = vec![of];
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    found
}

/// The namespaces of processes, as the kernel names them.
fn namespaces(of: impl Iterator<Item = u32>) -> BTreeSet<PathBuf> {
    let kinds = ["net", "mnt", "pid", "uts", "ipc", "user"];
    of.flat_map(|pid| kinds.map(|kind| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")))).flatten().collect()
}

fn links() -> BTreeSet<PathBuf> {
    std::fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// What is in a folder, by path below it.
fn tree(dir: &Path) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    let mut left = vec![dir.to_owned()];
    while let Some(at) = left.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            let name = entry.path().strip_prefix(dir).unwrap().display().to_string();
            out.insert(if kind.is_socket() { format!("socket {name}") } else { name });
            if kind.is_dir() {
                left.push(entry.path());
            }
        }
    }
    out
}

/// What was there while the mesh ran.
struct Traces {
    family: Vec<u32>,
    namespaces: BTreeSet<PathBuf>,
    links: BTreeSet<PathBuf>,
}

impl Traces {
    fn of(pid: u32, links: BTreeSet<PathBuf>) -> Self {
        let family = family(pid);
        let own = namespaces(std::iter::once(std::process::id()));
        let namespaces: BTreeSet<PathBuf> = namespaces(family.iter().copied()).difference(&own).cloned().collect();
        assert!(family.len() > 6 && namespaces.len() > 10, "{family:?} {namespaces:?}");
        Self { family, namespaces, links }
    }

    /// Nothing runs, no namespace is held by anybody, the machine's links are what they were, and the
    /// state folder holds state only.
    fn are_gone(&self, state: &Path) {
        eventually("every process is gone", || {
            let left: Vec<u32> = self.family.iter().copied().filter(|pid| parent_of(*pid).is_some()).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        });
        // A dead process shows its pid namespace until whoever inherited it looks; and the kernel takes
        // a moment to end what was started after `of`.
        eventually("no namespace lives on", || {
            let alive = pids().filter(|pid| parent_of(*pid).is_some());
            let left: Vec<_> = namespaces(alive).intersection(&self.namespaces).cloned().collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        });
        eventually("the machine's links are as before", || {
            if links() == self.links { Ok(()) } else { Err(format!("{:?}, not {:?}", links(), self.links)) }
        });
        eventually("only state is left", || {
            let left = tree(state);
            let is_state = |name: &String| {
                ["lock", "objects.json", "up.log", "istiod", "istiod/root-cert.pem"].contains(&name.as_str())
                    || name.starts_with("istiod/ca")
            };
            if left.iter().all(is_state) { Ok(()) } else { Err(format!("{left:?}")) }
        });
    }
}

#[test]
fn a_mesh_that_is_told_to_end_leaves_nothing() {
    for (user, signal) in [(User::Own, "-INT"), (User::Own, "-TERM"), (User::Ordinary, "-INT")] {
        let links = links();
        let mut up = Up::start(user, &small());
        let traces = Traces::of(up.child.id(), links);
        up.signal(signal);
        let status = up.child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{user:?} {signal}: {}", up.said());
        traces.are_gone(&up.dir.path().join("s"));
    }
}

#[test]
fn a_mesh_that_is_killed_leaves_nothing_but_its_objects() {
    killed(User::Own);
}

#[test]
fn an_ordinary_users_mesh_that_is_killed_leaves_nothing_but_its_objects() {
    killed(User::Ordinary);
}

fn killed(user: User) {
    let before = links();
    let mut up = Up::start(user, &small());
    let kept = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kept, namespace: plain}\ndata: {k: v}\n";
    up.must(&["apply", "-f", "-"], kept);
    up.must(&["scale", "deploy/curl", "-n", "plain", "--replicas", "2"], "");
    let traces = Traces::of(up.child.id(), before);
    let unfinished = up.dir.path().join("s/objects.json.new");
    // As if it had been killed while it saved: it stands still, or it might make this its state.
    up.signal("-STOP");
    eventually("every thread stands still", || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", up.child.id())).unwrap();
        let state = |thread: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next())
        };
        let states: Vec<_> = threads.map(state).collect();
        if states.iter().all(|state| *state == Some(Some('T'))) { Ok(()) } else { Err(format!("{states:?}")) }
    });
    std::fs::write(&unfinished, "half").unwrap();
    up.signal("-KILL");
    up.child.wait().unwrap();
    traces.are_gone(&up.dir.path().join("s"));

    // The same folder again, at once: what was applied is there, and the file's object as it was left.
    up.restart(user, &small());
    assert_eq!(up.must(&["get", "configmap", "kept", "-n", "plain", "-o", "name"], ""), "configmap/kept\n");
    assert!(up.must(&["get", "deploy", "-n", "plain"], "").contains("2/2"));
    assert!(up.must(&["get", "serviceaccounts", "-n", "plain"], "").contains("default "));

    // The same when only the starter or the manager dies: the parent says so and goes, too.
    for victim in ["node-starter", "node-manager"] {
        let traces = Traces::of(up.child.id(), links());
        let is_victim = |pid: &&u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == victim.as_bytes())
        };
        signal_process(*traces.family.iter().find(is_victim).expect("it runs"), "-KILL");
        let status = up.child.wait().unwrap();
        assert_eq!(status.code(), Some(1), "{victim}");
        assert!(up.said().contains("the pod manager is gone"), "{}", up.said());
        traces.are_gone(&up.dir.path().join("s"));
        up.restart(user, &small());
    }
}

#[test]
fn a_file_that_is_broken_when_the_mesh_comes_back_has_its_last_good_version() {
    let dir = tempfile::Builder::new().prefix("lt-").tempdir().unwrap();
    let file = dir.path().join("mesh.yaml");
    let config = |mode: &str| {
        small()
            + &format!(
                "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: plain}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
            )
    };
    std::fs::write(&file, config("STRICT")).unwrap();
    let mut up = Up::start_with(dir, User::Own, "mesh.yaml", "");
    let mode = |up: &Up| {
        let text = up.must(&["get", "peerauthentication", "default", "-n", "plain", "-o", "json"], "");
        serde_json::from_str::<Value>(&text).unwrap()["spec"]["mtls"]["mode"].clone()
    };
    std::fs::write(&file, config("STRICKT")).unwrap();
    let refused = |up: &Up, times: usize| {
        eventually("the refusal", || {
            let said = up.said();
            let count = said.lines().filter(|line| line.contains("mesh.yaml") && line.contains("STRICKT")).count();
            if count >= times { Ok(()) } else { Err(format!("{count}: {said}")) }
        });
    };
    refused(&up, 1);
    assert_eq!(mode(&up), "STRICT");
    let traces = Traces::of(up.child.id(), links());
    up.signal("-KILL");
    up.child.wait().unwrap();
    traces.are_gone(&up.dir.path().join("s"));

    let before = up.said().lines().filter(|line| line.contains("STRICKT")).count();
    let dir = std::mem::replace(&mut up.dir, tempfile::tempdir().unwrap());
    let up = Up::start_with(dir, User::Own, "mesh.yaml", "");
    refused(&up, before + 1);
    assert_eq!(mode(&up), "STRICT", "what was good stays, also across a restart");
    std::fs::write(&file, config("PERMISSIVE")).unwrap();
    eventually("the mended file", || match mode(&up) {
        mended if mended == "PERMISSIVE" => Ok(()),
        other => Err(other.to_string()),
    });
}

/// Ends a detached mesh.
struct Down<'a>(&'a [&'a str]);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        run_lateen(&[&["down"][..], self.0].concat(), "");
    }
}

#[test]
fn a_detached_demo_says_what_to_try_and_it_works() {
    let dir = tempfile::Builder::new().prefix("lt-").tempdir().unwrap();
    let state = dir.path().join("s");
    let at = ["--name", "shown", "--state-dir", state.to_str().unwrap()];
    let before = links();
    let ports = ["--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0"];
    let _down = Down(&at);
    let demo = run_lateen(&[&["demo", "--detach"][..], &at, &ports].concat(), "");
    let said = text(&demo.stdout) + &text(&demo.stderr);
    assert!(demo.status.success(), "{said}");
    let status = run_lateen(&[&["status", "-o", "json"][..], &at].concat(), "");
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    let traces = Traces::of(u32::try_from(status["pid"].as_u64().unwrap()).unwrap(), before);

    let pods: Vec<Vec<&str>> = said
        .lines()
        .skip_while(|line| !line.starts_with("NAMESPACE"))
        .skip(1)
        .take_while(|line| !line.is_empty())
        .map(|line| line.split_whitespace().collect())
        .collect();
    let of = |prefix: &str| pods.iter().filter(|pod| pod[1].starts_with(prefix)).collect::<Vec<_>>();
    for (name, ready, version) in [
        ("productpage-v1-", "2/2", "v1"),
        ("details-v1-", "2/2", "v1"),
        ("ratings-v1-", "2/2", "v1"),
        ("reviews-v1-", "2/2", "v1"),
        ("reviews-v2-", "2/2", "v2"),
        ("reviews-v3-", "2/2", "v3"),
        ("maildev-", "2/2", "v1"),
        ("istiod-", "1/1", "-"),
        ("istio-ingressgateway-", "1/1", "-"),
        ("istio-egressgateway-", "1/1", "-"),
    ] {
        let found = of(name);
        assert_eq!(found.len(), 1, "{name}: {said}");
        assert_eq!((found[0][2], found[0][3], found[0][5]), (ready, "Running", version), "{name}: {said}");
    }
    let addresses: BTreeSet<&str> = pods.iter().map(|pod| pod[4]).collect();
    assert_eq!((pods.len(), addresses.len()), (10, 10), "each pod has an address of its own: {said}");

    let commands: Vec<&str> =
        said.lines().skip_while(|line| !line.starts_with("Try next")).skip(1).take(5).map(str::trim).collect();
    let outputs: Vec<String> = commands
        .iter()
        .map(|command| {
            let output = Command::new("sh").args(["-c", command]).output().unwrap();
            assert!(output.status.success(), "{command}: {}{}", text(&output.stdout), text(&output.stderr));
            text(&output.stdout)
        })
        .collect();
    for (output, word) in outputs.iter().zip(["served by", "productpage-v1-", "podname", "reviews", "404"]) {
        assert!(output.contains(word), "{word:?} is not in {output}; of {commands:?}");
    }
    // The gateway has a certificate; nobody signed it.
    let https = status["addresses"]["ingress-https"].as_str().unwrap();
    let page = Command::new("curl").args(["-sk", &format!("https://{https}/productpage")]).output().unwrap();
    assert!(text(&page.stdout).contains("served by"), "{page:?}");

    assert!(run_lateen(&[&["down"][..], &at].concat(), "").status.success());
    traces.are_gone(&state);
}

#[test]
fn a_detached_mesh_runs_until_down() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mesh.yaml"), small()).unwrap();
    let state = dir.path().join("s");
    let at = ["--name", "apart", "--state-dir", state.to_str().unwrap()];
    let file = dir.path().join("mesh.yaml");
    let before = links();
    let ports = ["--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0"];
    let up = run_lateen(&[&["up", "--detach", "-f", file.to_str().unwrap()][..], &at, &ports].concat(), "");
    let said = text(&up.stdout) + &text(&up.stderr);
    assert!(up.status.success(), "{said}");
    assert!(said.contains("NAMESPACE") && said.contains("curl-") && said.contains("ingress-http"), "{said}");
    let status = run_lateen(&[&["status", "-o", "json"][..], &at].concat(), "");
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    let pid = u32::try_from(status["pid"].as_u64().unwrap()).unwrap();
    let traces = Traces::of(pid, before);

    // A second one of the same name says who runs.
    let second = run_lateen(&[&["up", "-f", file.to_str().unwrap()][..], &at, &ports].concat(), "");
    let said = text(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("process {pid}")) && said.contains("lateen down"), "{said}");

    let down = run_lateen(&[&["down"][..], &at].concat(), "");
    assert!(down.status.success(), "{}", text(&down.stderr));
    traces.are_gone(&state);
    let again = run_lateen(&[&["down"][..], &at].concat(), "");
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("no mesh is running"), "{}", text(&again.stderr));
}

#[test]
fn two_meshes_run_side_by_side() {
    let (one, two) = (Mesh::up("one", &meshed("one")), Mesh::up("two", &meshed("two")));
    assert_ne!(one.http, two.http);
    for (mesh, name) in [(&one, "one"), (&two, "two")] {
        assert_eq!(mesh.get("x.test", "/name", &[]).body, name);
        assert_eq!(mesh.get("x.test", "/get", &[]).status, 200);
        assert_eq!(mesh.curl("shop/curl", &["http://httpbin:8000/get"]).status, 200);
    }
    drop(one);
    assert_eq!(two.curl("shop/curl", &["http://httpbin:8000/get"]).status, 200, "the other one's end is no matter");
}

#[test]
fn an_ordinary_user_needs_no_right() {
    let before = links();
    let mesh = Setup::up("user", &meshed("user")).args(&["--capture", "namespace"]).as_ordinary_user().start();
    let traces = Traces::of(u32::try_from(mesh.status()["pid"].as_u64().unwrap()).unwrap(), before);
    let pods = mesh.must(&["get", "pods", "-n", "shop"], "");
    assert_eq!(pods.matches("2/2").count(), 2, "{pods}");
    assert_eq!(mesh.get("x.test", "/name", &[]).body, "user");
    assert_eq!(mesh.get("x.test", "/get", &[]).status, 200);
    let answer = mesh.curl("shop/curl", &["http://httpbin:8000/headers"]);
    assert!(answer.body.to_lowercase().contains("x-forwarded-client-cert"), "mutual TLS: {answer:?}");
    let inside = mesh.exec("shop/curl", &["sh", "-c", "id -u; grep CapEff /proc/self/status"]);
    let inside = text(&inside.stdout);
    assert!(!is_root() || inside.starts_with("65534\n"), "{inside}");
    assert!(inside.ends_with("CapEff:\t0000000000000000\n"), "{inside}");
    mesh.must(&["rollout", "restart", "deploy/httpbin", "-n", "shop"], "");
    mesh.must(&["rollout", "status", "deploy/httpbin", "-n", "shop", "--timeout", "120"], "");
    assert!(mesh.logs("shop/httpbin", "istio-proxy").len() < 1 << 20);
    mesh.must(&["down"], "");
    traces.are_gone(&mesh.state_dir());
}

#[test]
fn the_demo_runs_for_an_ordinary_user() {
    let mesh = Setup::demo("demo").as_ordinary_user().start();
    let said = eventually("the announcement", || {
        let said = mesh.said();
        if said.contains("Ctrl-C") { Ok(said) } else { Err(said) }
    });
    for word in ["productpage-v1-", "2/2", "in a browser", "Try next:", "lateen exec deploy/productpage-v1"] {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
    let page = mesh.get("bookinfo.localhost", "/productpage", &[]);
    assert_eq!(page.status, 200, "{page:?}");
    assert!(page.body.contains("<html") && page.body.contains("served by"), "{}", page.body);
    assert_eq!(mesh.get("maildev.localhost", "/email", &[]).status, 200);
    assert_eq!(Client::plain(mesh.http).unwrap().send("GET", "x", "/productpage", &[]).unwrap().status, 200);
}

/// Runs a shell script in a user namespace of its own, as its root, where limits may be set.
fn in_user_namespace(script: &str) -> Output {
    Command::new("unshare").args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).output().unwrap()
}

#[test]
fn a_kernel_without_namespaces_is_named_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mesh.yaml"), small()).unwrap();
    let up = format!(
        "{} up --state-dir {dir}/s -f {dir}/mesh.yaml --ingress-http 127.0.0.1:0 --ingress-https 127.0.0.1:0",
        lateen().display(),
        dir = dir.path().display()
    );
    let check = |script: String, words: &[&str]| {
        let output = in_user_namespace(&script);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{script}: {said}");
        for word in words {
            assert!(said.contains(word), "{word:?} is not in {said}");
        }
        assert!(!tree(dir.path()).iter().any(|name| name.starts_with("socket")), "nothing is left");
    };
    check(
        format!("echo 0 > /proc/sys/user/max_net_namespaces; {up}"),
        &["making a network namespace", "user.max_net_namespaces = 0", "raise the sysctl"],
    );
    // Without capabilities it needs a user namespace, as an ordinary user does.
    check(
        format!("echo 0 > /proc/sys/user/max_user_namespaces; setpriv --bounding-set -all --inh-caps -all {up}"),
        &["making a user namespace", "user.max_user_namespaces = 0", "raise the sysctl"],
    );
}

/// A pod without proxy holds all connections to the DNS of the mesh that it can have: the mesh is made of the
/// same descriptors, and lives on.
#[test]
fn a_pod_that_takes_all_descriptors_it_can_get_ends_nothing() {
    let prober = "
apiVersion: v1
kind: Pod
metadata: {name: prober, namespace: plain, labels: {app: prober}}
spec:
  containers:
  - name: main
    image: local/shell
    command: [sleep, infinity]
    livenessProbe: {exec: {command: [sh, -c, 'echo >> /out/probes']}, periodSeconds: 1, timeoutSeconds: 60}
    volumeMounts: [{name: out, mountPath: /out}]
  volumes: [{name: out, emptyDir: {}}]
";
    let manifests = [
        namespace("plain", false),
        workload("plain", "curl", "v1", "curlimages/curl", None, ""),
        workload("plain", "httpbin", "v1", "docker.io/kong/httpbin", Some(80), ""),
        service("plain", "httpbin", "{name: http, port: 8000, targetPort: 80}"),
        prober.to_owned(),
    ];
    let mesh = Setup::up("descriptors", &manifests.join("\n---\n")).descriptors_max(256).start();
    let script = "for i in $(seq 300); do exec {held}<>/dev/tcp/10.96.0.10/53; done; echo held; read -r _";
    let mut holder = mesh
        .prepared(&["exec", "prober", "-n", "plain", "--", "bash", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "held\n");
    let probes = || {
        let lines = mesh.must(&["exec", "prober", "-n", "plain", "--", "wc", "-l", "/out/probes"], "");
        lines.split_whitespace().next().and_then(|count| count.parse::<u32>().ok()).unwrap_or_default()
    };
    let before = probes();
    eventually("probes go on", || if probes() >= before + 3 { Ok(()) } else { Err(before.to_string()) });
    assert_eq!(mesh.curl("plain/curl", &["http://httpbin:8000/get"]).status, 200);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let pods: Value = serde_json::from_str(&mesh.must(&["get", "pods", "-A", "-o", "json"], "")).unwrap();
    for pod in pods["items"].as_array().unwrap() {
        for status in pod["status"]["containerStatuses"].as_array().unwrap() {
            assert_eq!(status["restartCount"], 0, "{pod}");
        }
    }
}
