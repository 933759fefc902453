//! A whole mesh as a child process.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::Value;

use crate::http::{Client, Response};
use crate::tunnel::Tunnel;

/// Runs its arguments until standard input ends, which it does when the test process does; then
/// stops the mesh as Ctrl-C would and removes its folder.
const KEEPER: &str = r#"dir=$1; shift; "$@" </dev/null >"$dir/up.log" 2>&1 & pid=$!
read -r _; kill -TERM $pid 2>/dev/null; wait $pid; rm -rf "$dir""#;

/// Seconds until a mesh must be ready.
const START_MAX: Duration = Duration::from_secs(180);

/// The `lateen` binary of this build.
pub fn lateen() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| programs().join("lateen"))
}

/// The program of [`Puppet`](crate::Puppet).
pub fn puppet() -> PathBuf {
    programs().join("puppet")
}

/// The folder of this build's programs: `LATEEN_PROGRAMS`, or built on first use, so that `cargo test` of one
/// package is enough. Built as `cargo test --workspace` builds them, which then has nothing left to do:
/// another selection of packages would have other features, and all libraries be built again.
fn programs() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(folder) = std::env::var_os("LATEEN_PROGRAMS") {
            return folder.into();
        }
        let test = std::env::current_exe().expect("a running program has a path");
        // target/debug/deps/test-0123 → target/debug
        let profile = test.parent().and_then(Path::parent).expect("tests run from target/PROFILE/deps");
        let target = profile.parent().expect("a profile is a folder of target");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["test", "--quiet", "--workspace", "--no-run", "--target-dir"]).arg(target);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        let built = cargo.output().expect("cargo starts");
        assert!(built.status.success(), "lateen does not build:\n{}", String::from_utf8_lossy(&built.stderr));
        profile.to_owned()
    })
}

/// Runs `lateen` with these arguments and this standard input.
pub fn run_lateen(args: &[&str], input: &str) -> Output {
    run(Command::new(lateen()).args(args), input)
}

/// Runs a command with this standard input.
pub fn run(command: &mut Command, input: &str) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("lateen starts");
    // A command that does not read its input may be gone already.
    _ = child.stdin.take().expect("it was piped").write_all(input.as_bytes());
    child.wait_with_output().expect("its output is piped")
}

/// Who plays the ordinary user when root runs the tests: nobody.
const ORDINARY_USER: u32 = 65534;

/// A mesh that is to be started.
#[derive(Clone, Debug)]
pub struct Setup {
    name: String,
    command: &'static str,
    manifests: String,
    args: Vec<String>,
    is_ordinary: bool,
    descriptors_max: Option<u32>,
}

impl Setup {
    /// `lateen up` of these manifests.
    pub fn up(name: &str, manifests: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        Self {
            name,
            command: "up",
            manifests: manifests.to_owned(),
            args: Vec::new(),
            is_ordinary: false,
            descriptors_max: None,
        }
    }

    /// `lateen demo`.
    pub fn demo(name: &str) -> Self {
        Self { command: "demo", ..Self::up(name, "") }
    }

    /// With these further arguments.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// As a user without any right, also when root runs the tests.
    #[must_use]
    pub fn as_ordinary_user(mut self) -> Self {
        self.is_ordinary = true;
        self
    }

    /// None of its processes may have more descriptors than that.
    #[must_use]
    pub fn descriptors_max(mut self, most: u32) -> Self {
        self.descriptors_max = Some(most);
        self
    }

    /// Starts it and waits until every pod is ready and every proxy synced.
    pub fn start(self) -> Mesh {
        Mesh::start(self)
    }
}

/// Whether root runs the tests.
pub fn is_root() -> bool {
    // Our own entry in /proc belongs to our user.
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").expect("Linux has /proc")) == 0
}

/// The words that run `lateen`; as a user without any right, who also gets `dir`, when root asks for
/// that.
pub fn program(dir: &Path, as_ordinary_user: bool) -> Vec<PathBuf> {
    if !(as_ordinary_user && is_root()) {
        return vec![lateen().to_owned()];
    }
    std::os::unix::fs::chown(dir, Some(ORDINARY_USER), Some(ORDINARY_USER)).expect("root gives folders away");
    // The folder of the build may be closed to others.
    let own = dir.join("lateen");
    if !own.exists() && std::fs::hard_link(lateen(), &own).is_err() {
        std::fs::copy(lateen(), &own).expect("a copy of lateen");
    }
    let user = ORDINARY_USER.to_string();
    let words = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--bounding-set", "-all"];
    let mut program: Vec<PathBuf> = words.iter().map(PathBuf::from).collect();
    program.extend(["--inh-caps".into(), "-all".into(), own]);
    program
}

/// A running mesh.
#[derive(Debug)]
pub struct Mesh {
    dir: PathBuf,
    program: Vec<PathBuf>,
    keeper: Child,
    /// Where the ingress gateway takes HTTP.
    pub http: SocketAddr,
    /// Where it takes HTTPS.
    pub https: SocketAddr,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        _ = self.keeper.wait();
    }
}

impl Mesh {
    /// Starts a mesh with these manifests and waits until every pod is ready and every proxy synced.
    pub fn up(name: &str, manifests: &str) -> Self {
        Setup::up(name, manifests).start()
    }

    fn start(setup: Setup) -> Self {
        let dir = tempfile::Builder::new().prefix("lt-").tempdir().expect("a folder for the mesh").keep();
        let file = dir.join("mesh.yaml");
        std::fs::write(&file, &setup.manifests).expect("its folder takes files");
        let program = program(&dir, setup.is_ordinary);
        let mut keeper = Command::new("sh");
        keeper.args(["-c", KEEPER, "sh"]).arg(&dir);
        if let Some(most) = setup.descriptors_max {
            keeper.args(["sh", "-c", r#"ulimit -n "$0" && exec "$@""#, &most.to_string()]);
        }
        keeper.args(&program).args([setup.command, "--name", &setup.name]);
        keeper.arg("--state-dir").arg(dir.join("s"));
        keeper.args(["--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0"]);
        if setup.command == "up" {
            keeper.arg("-f").arg(&file);
        }
        keeper.args(&setup.args).stdin(Stdio::piped());
        let keeper = keeper.spawn().expect("sh starts");
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut mesh = Self { dir, program, keeper, http: nowhere, https: nowhere };
        let status = mesh.wait_ready();
        let address = |role: &str| {
            let text = status["addresses"][role].as_str().unwrap_or_default();
            text.parse().unwrap_or_else(|_| panic!("status has no address of {role}: {status}"))
        };
        (mesh.http, mesh.https) = (address("ingress-http"), address("ingress-https"));
        mesh.synced();
        mesh
    }

    fn wait_ready(&mut self) -> Value {
        let deadline = Instant::now() + START_MAX;
        loop {
            let status: Value =
                serde_json::from_slice(&self.command(&["status", "-o", "json"], "").stdout).unwrap_or_default();
            if status["ready"] == true {
                return status;
            }
            let said = self.said();
            // `up` says what the kernel refuses and how to get it.
            assert!(!said.contains("error:") || Instant::now() < deadline, "the mesh did not start:\n{said}");
            assert!(Instant::now() < deadline, "the mesh is not ready after {START_MAX:?}: {status}\n{said}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Processes of the mesh whose command line contains `word`.
    pub fn processes(&self, word: &str) -> Vec<u32> {
        let mut parents: BTreeMap<u32, u32> = BTreeMap::new();
        for entry in std::fs::read_dir("/proc").expect("Linux has /proc").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // After the name, which may contain anything: state, parent.
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
            parents.extend(parent.map(|parent| (pid, parent)));
        }
        let is_ours = |pid: u32| {
            std::iter::successors(Some(pid), |pid| parents.get(pid).copied()).any(|pid| pid == self.keeper.id())
        };
        let says = |pid: u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).replace('\0', " ").contains(word)
        };
        parents.keys().copied().filter(|pid| is_ours(*pid) && says(*pid)).collect()
    }

    /// What `lateen up` wrote so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.dir.join("up.log")).unwrap_or_default()
    }

    /// The file that `up` follows.
    pub fn file(&self) -> PathBuf {
        self.dir.join("mesh.yaml")
    }

    /// The mesh's state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("s")
    }

    /// `status -o json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        serde_json::from_str(&self.must(&["status", "-o", "json"], "")).expect("the status is JSON")
    }

    /// A command of `lateen` against this mesh, by the user who runs it, for tests that steer its streams.
    pub fn prepared(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).args(args).env("LATEEN_STATE_DIR", self.state_dir());
        command
    }

    /// Runs a command of `lateen` against this mesh.
    pub fn command(&self, args: &[&str], input: &str) -> Output {
        run(&mut self.prepared(args), input)
    }

    /// [`command`](Self::command) that must succeed; its standard output.
    #[track_caller]
    pub fn must(&self, args: &[&str], input: &str) -> String {
        let output = self.command(args, input);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "lateen {args:?}: {}\n{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    /// Waits until every proxy runs what was applied.
    #[track_caller]
    pub fn synced(&self) {
        self.must(&["wait", "--for=synced", "--timeout", "90"], "");
    }

    /// Applies manifests and waits until every proxy runs them.
    #[track_caller]
    pub fn apply(&self, manifests: &str) {
        self.must(&["apply", "-f", "-"], manifests);
        self.synced();
    }

    /// Applies manifests until the answer is dropped.
    #[track_caller]
    pub fn with(&self, manifests: &str) -> Applied<'_> {
        self.apply(manifests);
        Applied { mesh: self, manifests: manifests.to_owned() }
    }

    /// `GET` through the ingress gateway on a new connection.
    #[track_caller]
    pub fn get(&self, host: &str, path: &str, headers: &[(&str, &str)]) -> Response {
        self.send("GET", host, path, headers)
    }

    /// Any method through the ingress gateway on a new connection.
    #[track_caller]
    pub fn send(&self, method: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> Response {
        let answer = Client::plain(self.http).and_then(|mut client| client.send(method, host, path, headers));
        answer.unwrap_or_else(|error| panic!("{method} {host}{path}: {error}"))
    }

    /// How often each body (by `name`) comes back in `count` requests on one connection.
    #[track_caller]
    pub fn tally(
        &self,
        host: &str,
        path: &str,
        count: usize,
        name: impl Fn(&Response) -> String,
    ) -> BTreeMap<String, usize> {
        let mut client = Client::plain(self.http).expect("the gateway takes connections");
        let mut out = BTreeMap::new();
        for _ in 0..count {
            let answer = client.send("GET", host, path, &[]).expect("every request is answered");
            *out.entry(name(&answer)).or_default() += 1;
        }
        out
    }

    /// Runs a program in a deployment's pod: `namespace/deployment`.
    pub fn exec(&self, whence: &str, command: &[&str]) -> Output {
        let (namespace, deployment) = whence.split_once('/').expect("namespace/deployment");
        let target = format!("deploy/{deployment}");
        let mut args = vec!["exec", &target, "-n", namespace, "--"];
        args.extend(command);
        self.command(&args, "")
    }

    /// `curl` in a deployment's pod. Status 0 when no answer came.
    pub fn curl(&self, whence: &str, args: &[&str]) -> Response {
        let mut command = vec!["curl", "-s", "--max-time", "60", "-i", "-w", "\n%{http_code}"];
        command.extend(args);
        let output = self.exec(whence, &command);
        let text = String::from_utf8_lossy(&output.stdout).replace("\r\n", "\n");
        let (rest, code) = text.rsplit_once('\n').unwrap_or_else(|| {
            panic!("curl {args:?} in {whence}: {text}{}", String::from_utf8_lossy(&output.stderr));
        });
        let (head, body) = rest.split_once("\n\n").unwrap_or((rest, ""));
        let header =
            |line: &str| line.split_once(':').map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()));
        Response {
            status: code.parse().unwrap_or(0),
            headers: head.lines().filter_map(header).collect(),
            body: body.to_owned(),
            trailers: Vec::new(),
        }
    }

    /// A connection from a deployment's pod to `host:port`, as a program in there would open it.
    pub fn dial(&self, whence: &str, host: &str, port: u16) -> Tunnel {
        let (namespace, deployment) = whence.split_once('/').expect("namespace/deployment");
        let mut command = Command::new(lateen());
        command.args(["exec", &format!("deploy/{deployment}"), "-n", namespace, "--"]);
        command.env("LATEEN_STATE_DIR", self.dir.join("s"));
        Tunnel::open(command, host, port)
    }

    /// The certificates, in DER, of a secret that a deployment's proxy holds: `default` or `ROOTCA`.
    pub fn certificates(&self, whence: &str, secret: &str) -> Vec<Vec<u8>> {
        let (namespace, deployment) = whence.split_once('/').expect("namespace/deployment");
        let target = format!("deploy/{deployment}");
        let text = self.must(&["proxy-config", "secret", &target, "-n", namespace, "-o", "json"], "");
        let all: Value = serde_json::from_str(&text).expect("secrets are JSON");
        let found = all.as_array().into_iter().flatten().find(|one| one["name"] == secret);
        let places = ["/tls_certificate/certificate_chain/inline_bytes", "/validation_context/trusted_ca/inline_bytes"];
        let pem =
            found.and_then(|one| places.iter().find_map(|place| one.pointer(place)?.as_str())).unwrap_or_default();
        let pem = base64::engine::general_purpose::STANDARD.decode(pem).expect("bytes are base64");
        crate::http::der(&String::from_utf8_lossy(&pem))
    }

    /// The log of a container: `namespace/deployment`.
    pub fn logs(&self, whence: &str, container: &str) -> String {
        let (namespace, deployment) = whence.split_once('/').expect("namespace/deployment");
        self.must(&["logs", &format!("deploy/{deployment}"), "-n", namespace, "-c", container], "")
    }
}

/// Manifests that are deleted when this is dropped.
#[derive(Debug)]
pub struct Applied<'a> {
    mesh: &'a Mesh,
    manifests: String,
}

impl Drop for Applied<'_> {
    fn drop(&mut self) {
        let deleted = self.mesh.command(&["delete", "-f", "-"], &self.manifests);
        if deleted.status.success() && !std::thread::panicking() {
            self.mesh.synced();
        }
    }
}

/// A mesh that the tests of one kind share, one at a time.
#[derive(Debug)]
pub struct Shared {
    name: &'static str,
    manifests: fn() -> String,
    mesh: OnceLock<Mesh>,
    turn: Mutex<()>,
}

/// A test's turn.
#[derive(Debug)]
pub struct Turn<'a> {
    mesh: &'a Mesh,
    _turn: MutexGuard<'a, ()>,
}

impl std::ops::Deref for Turn<'_> {
    type Target = Mesh;
    fn deref(&self) -> &Mesh {
        self.mesh
    }
}

impl Shared {
    /// Started when the first test asks.
    pub const fn new(name: &'static str, manifests: fn() -> String) -> Self {
        Self { name, manifests, mesh: OnceLock::new(), turn: Mutex::new(()) }
    }

    /// Waits for the other tests.
    pub fn turn(&self) -> Turn<'_> {
        // A test that failed leaves the mesh as usable as one that passed.
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        Turn { mesh: self.mesh.get_or_init(|| Mesh::up(self.name, &(self.manifests)())), _turn: turn }
    }
}
