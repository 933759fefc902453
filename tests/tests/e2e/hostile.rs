//! A real `lateen proxy` under hostile clients: it lives, and gives back what they took.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use testkit::eventually;

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
