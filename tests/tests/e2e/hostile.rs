//! A real `lateen proxy` under hostile clients: it lives, and gives back what they took.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use testkit::eventually;

use crate::apps::{TRAFFIC, virtual_service};

/// A proxy on a bootstrap.
pub(crate) struct Proxy {
    child: Child,
    /// Where it writes its admin address.
    _dir: tempfile::TempDir,
    /// Where its listener `http` is.
    pub(crate) http: SocketAddr,
    pub(crate) admin: SocketAddr,
}

/// As an Envoy address.
fn address(at: SocketAddr) -> String {
    format!("{{ socket_address: {{ address: {}, port_value: {} }} }}", at.ip(), at.port())
}

/// A free port of the loopback.
pub(crate) const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Answers every request of every connection with `ok`.
fn upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let Ok(mut write) = stream.try_clone() else { return };
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    if line.is_empty() && write.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").is_err() {
                        return;
                    }
                }
            });
        }
    });
    at
}

/// One request; `None` if nothing comes back.
pub(crate) fn ask(at: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(at).ok()?;
    stream.set_read_timeout(Some(testkit::PATIENCE)).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    (!answer.is_empty()).then_some(answer)
}

impl Proxy {
    /// Starts one that may open so many descriptors, with an upstream in this process.
    fn start(descriptors: u32) -> Self {
        let manager =
            "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
        let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
        let bootstrap = format!(
            r#"
admin: {{ address: {} }}
static_resources:
  listeners:
  - name: http
    address: {}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": {manager}
          stat_prefix: x
          request_headers_timeout: 2s
          route_config: {{ virtual_hosts: [{{ name: a, domains: ["*"], routes: [{{ match: {{ prefix: "/" }}, route: {{ cluster: up }} }}] }}] }}
          http_filters: [{{ name: r, typed_config: {{ "@type": {router} }} }}]
  clusters:
  - name: up
    connect_timeout: 5s
    load_assignment: {{ cluster_name: up, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {} }} }}] }}] }}
"#,
            address(ANY),
            address(ANY),
            address(upstream()),
        );
        Self::run(descriptors, &bootstrap)
    }

    /// Runs a bootstrap whose admin and listeners take free ports, and waits until it is ready.
    pub(crate) fn run(descriptors: u32, bootstrap: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let admin_path = dir.path().join("admin");
        let child = Command::new("bash")
            .arg("-c")
            .arg(format!(
                "ulimit -n {descriptors}; exec \"$0\" proxy --concurrency 1 --config-yaml \"$1\" --admin-address-path \"$2\""
            ))
            .arg(testkit::lateen())
            .arg(bootstrap)
            .arg(&admin_path)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("bash starts");
        let mut proxy = Self { child, _dir: dir, http: ANY, admin: ANY };
        proxy.admin = eventually("the admin address", || {
            let text = std::fs::read_to_string(&admin_path).map_err(|error| error.to_string())?;
            text.trim().parse().map_err(|_| text)
        });
        eventually("the proxy is ready", || match ask(proxy.admin, "/ready") {
            Some(answer) if answer.contains("LIVE") => Ok(()),
            other => Err(format!("{other:?}")),
        });
        proxy.http = proxy.listener("http");
        proxy
    }

    /// Where a listener is.
    pub(crate) fn listener(&self, name: &str) -> SocketAddr {
        eventually("the listener", || {
            let page = ask(self.admin, "/listeners").unwrap_or_default();
            let at = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("::")?.trim().parse().ok());
            at.ok_or(page)
        })
    }

    fn is_well(&self) {
        eventually("a request passes", || match ask(self.http, "/") {
            Some(answer) if answer.starts_with("HTTP/1.1 200 ") => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("it runs").count()
    }

    fn resident_kib(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a size");
        line.split_whitespace().nth(1).and_then(|size| size.parse().ok()).expect("a number")
    }

    /// Clock ticks of work so far.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        let after_name = stat.rsplit_once(") ").expect("a name").1;
        let field = |at: usize| after_name.split(' ').nth(at).and_then(|text| text.parse::<u64>().ok()).expect("ticks");
        field(11) + field(12)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // it may have ended, which the test has told
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn connections_give_back_what_they_took() {
    let proxy = Proxy::start(4096);
    proxy.is_well();
    let (descriptors, memory) = (proxy.descriptors(), proxy.resident_kib());
    let mut held: Vec<TcpStream> = Vec::new();
    for n in 0..300 {
        let mut stream = TcpStream::connect(proxy.http).expect("it is taken");
        let bytes: &[u8] = match n % 5 {
            0 => b"",
            1 => b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
            2 => b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf",
            3 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
            _ => b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        };
        stream.write_all(bytes).expect("it is taken");
        held.push(stream);
    }
    eventually("all are there", || {
        let now = proxy.descriptors();
        if now >= descriptors + 180 { Ok(()) } else { Err(format!("{now} descriptors")) }
    });
    // others are served meanwhile
    proxy.is_well();
    let grown = proxy.resident_kib().saturating_sub(memory);
    assert!(grown < 50 * 1024, "{grown} KiB for three hundred connections");
    for stream in &held {
        // some have been closed from the other side
        drop(stream.shutdown(Shutdown::Both));
    }
    drop(held);
    eventually("descriptors come back", || {
        let now = proxy.descriptors();
        // the upstream's idle connections stay in the pool for their time
        if now <= descriptors + 120 { Ok(()) } else { Err(format!("{now} descriptors, {descriptors} before")) }
    });
    proxy.is_well();
}

#[test]
fn a_proxy_out_of_descriptors_lives_on() {
    let proxy = Proxy::start(80);
    proxy.is_well();
    let held: Vec<TcpStream> = (0..200).filter_map(|_| TcpStream::connect(proxy.http).ok()).collect();
    assert!(held.len() > 100, "the kernel takes them, the proxy cannot");
    eventually("none is left", || {
        let now = proxy.descriptors();
        if now >= 79 { Ok(()) } else { Err(format!("{now} descriptors")) }
    });
    // it waits instead of spinning: far from a whole core, over a time in which nothing answers
    let before = proxy.ticks();
    let began = Instant::now();
    let mut silent = &held[held.len() - 1];
    silent.set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
    let answer = silent.read(&mut [0]);
    assert!(answer.is_err(), "nobody took this connection: {answer:?}");
    let worked = proxy.ticks() - before;
    let most = u64::try_from(began.elapsed().as_millis() / 20).expect("a short time");
    assert!(worked < most, "{worked} ticks of 10 ms, where half of the time would be {most}");
    drop(held);
    proxy.is_well();
}

#[test]
fn garbage_on_every_listener_of_the_proxy() {
    let proxy = Proxy::start(1024);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..400 {
        let at = if round % 4 == 0 { proxy.admin } else { proxy.http };
        let mut bytes: Vec<u8> = Vec::new();
        for _ in 0..(round * 7) % 3000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            bytes.extend(&random.to_le_bytes()[..1]);
        }
        if round % 3 == 0 {
            bytes.splice(0..0, *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        }
        bytes.extend(b"\r\n\r\n");
        let Ok(mut stream) = TcpStream::connect(at) else { continue };
        // it may be closed before all is written, and says what it likes
        drop(stream.write_all(&bytes));
        drop(stream.shutdown(Shutdown::Write));
        let mut answer = Vec::new();
        drop(stream.set_read_timeout(Some(Duration::from_secs(5))));
        drop(stream.read_to_end(&mut answer));
        let text = String::from_utf8_lossy(&answer);
        assert!(!text.starts_with("HTTP/1.1 2"), "{round}: {text}");
    }
    proxy.is_well();
    let stats = ask(proxy.admin, "/stats").expect("the admin interface answers");
    let panics = stats.lines().find(|line| line.contains("panic")).expect("a counter of panics");
    assert!(panics.ends_with(": 0"), "{panics}");
}

/// Throws bytes at each address of its arguments, all at once: noise, a hello that is none, HTTP/2 that goes mad,
/// a smuggled request, a head without end, a client that only waits; and datagrams of noise at names' servers.
const THROW: &str = r#"
for at in "$@"; do for kind in noise tls h2 smuggled endless silent; do (
  exec 3<>"/dev/tcp/${at%:*}/${at##*:}" || exit 0
  echo met
  case $kind in
    noise) head -c 30000 /dev/urandom;;
    tls) printf '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03'; head -c 600 /dev/urandom;;
    h2) printf 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'; head -c 5000 /dev/urandom;;
    smuggled) printf 'POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n';;
    endless) printf 'GET / HTTP/1.1\r\nHost: a\r\n'; yes 'X-More: of this' | head -c 300000;;
  esac >&3
  timeout 3 cat <&3 >/dev/null
) 2>/dev/null & done; done
for server in 127.0.0.1/15053 10.96.0.10/53; do (for size in 1 11 12 40 600; do head -c $size /dev/urandom >/dev/udp/$server; done) 2>/dev/null & done
wait"#;

/// All sockets of a folder and those in it.
fn sockets_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // What a running mesh replaces meanwhile is no socket.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(sockets_below(&entry.path())),
            Ok(kind) if kind.is_socket() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

#[test]
fn garbage_on_every_listener_of_a_mesh() {
    let mesh = TRAFFIC.turn();
    eventually("no pod of another test is ending", || {
        let pods = mesh.must(&["get", "pods", "-A", "-o", "json"], "");
        if pods.contains("deletionTimestamp") { Err(pods) } else { Ok(()) }
    });
    let status = mesh.status();
    let mut by_pod: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    let mut roles = BTreeSet::new();
    for row in status["listening"].as_array().expect("the status lists what listens") {
        let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
        let address: SocketAddr = text("address").parse().expect("an address");
        // what applications do with garbage is theirs to answer for; the machine's own doors come below
        if ["application", "http", "tcp", "ingress-http", "ingress-https"].contains(&&*text("role")) {
            continue;
        }
        roles.insert(text("role"));
        // seen from inside the pod, where what listens everywhere listens on loopback, too
        let inside =
            if address.ip().is_unspecified() { SocketAddr::from(([127, 0, 0, 1], address.port())) } else { address };
        by_pod.entry((text("namespace"), text("pod"))).or_default().insert(inside.to_string());
    }
    for role in [
        "xds",
        "control-plane-metrics",
        "inbound",
        "outbound",
        "merged-metrics",
        "readiness",
        "proxy-metrics",
        "proxy-admin",
    ] {
        assert!(roles.contains(role), "{role} is not among {roles:?}");
    }
    let sockets = sockets_below(&mesh.state_dir());
    for name in ["api.sock", "istiod/debug.sock"] {
        assert!(sockets.contains(&mesh.state_dir().join(name)), "{name} is not among {sockets:?}");
    }
    let planes = || [mesh.processes(" proxy"), mesh.processes(" discovery")];
    let before = planes();
    assert!(before.iter().all(|processes| !processes.is_empty()), "{before:?}");
    std::thread::scope(|scope| {
        let mesh = &mesh;
        for ((namespace, pod), addresses) in &by_pod {
            scope.spawn(move || {
                let mut command = vec!["exec", pod, "-n", namespace, "--", "bash", "-c", THROW, "throw"];
                command.extend(addresses.iter().map(String::as_str));
                let output = mesh.command(&command, "");
                let met = String::from_utf8_lossy(&output.stdout).lines().filter(|line| *line == "met").count();
                assert_eq!(
                    met,
                    6 * addresses.len(),
                    "{pod} {addresses:?}: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            });
        }
        // the machine's own doors: the gateway's ports from outside, and the sockets of the mesh
        scope.spawn(move || {
            for at in [mesh.http, mesh.https] {
                let script = format!("set -- {at}; {THROW}");
                assert!(
                    Command::new("bash").args(["-c", &script]).stdout(Stdio::null()).status().expect("bash").success()
                );
            }
        });
        for path in &sockets {
            let mut socket = UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            // it may be closed before all is written
            drop(socket.write_all(&vec![0xff; 30_000]));
            drop(socket.write_all(b"\r\n\r\n"));
        }
    });
    assert_eq!(planes(), before, "no process ended and none was started");
    for whence in ["shop/curl", "shop/httpbin", "istio-system/istio-ingressgateway"] {
        let stats = mesh.curl(whence, &["http://127.0.0.1:15000/stats"]);
        let panics = stats.body.lines().find(|line| line.contains("panic")).expect("a counter of panics");
        assert!(panics.ends_with(": 0"), "{whence}: {panics}");
    }
    // and all of it works: the control plane, names, the way between sidecars and through the gateway
    let _route =
        mesh.with(&virtual_service("after", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    assert_eq!(mesh.get("after.shop.test", "/get", &[]).status, 200);
    assert_eq!(mesh.curl("shop/curl", &["http://httpbin:8000/get"]).status, 200);
    assert_eq!(mesh.curl("plain/curl", &["http://httpbin.shop:8000/get"]).status, 200);
}
