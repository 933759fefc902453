//! The puppet: a server in a pod that does what a test tells it (`src/bin/puppet.rs`).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use crate::Mesh;

/// Its port for HTTP.
pub const PORT: u16 = 8000;
/// Its port that only reads.
pub const RAW_PORT: u16 = 8001;

/// A puppet in a mesh.
#[derive(Clone, Copy, Debug)]
pub struct Puppet<'a> {
    mesh: &'a Mesh,
    whence: &'a str,
}

impl<'a> Puppet<'a> {
    /// The one in the deployment `namespace/name`, with no answers and nothing seen.
    #[track_caller]
    pub fn new(mesh: &'a Mesh, whence: &'a str) -> Self {
        let puppet = Self { mesh, whence };
        puppet.answers(&Value::Array(Vec::new()));
        puppet.forget();
        puppet
    }

    #[track_caller]
    fn ask(&self, method: &str, page: &str, body: &str) -> String {
        let url = format!("http://localhost:{PORT}/_/{page}");
        let output = self.mesh.exec(self.whence, &["curl", "-sS", "-f", "-X", method, "-d", body, &url]);
        assert!(output.status.success(), "{method} {page}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What it answers from now on: `[{"path", "status", "headers", "body", "hangs", "closes", "truncates",
    /// "echoes"}]`.
    #[track_caller]
    pub fn answers(&self, answers: &Value) {
        self.ask("PUT", "answers", &answers.to_string());
    }

    /// The requests that came: `[{"method", "path", "headers": {name: […]}, "body", "connection"}]`; connections
    /// are numbered.
    #[track_caller]
    pub fn seen(&self) -> Vec<Value> {
        serde_json::from_str(&self.ask("GET", "seen", "")).expect("the puppet writes JSON")
    }

    /// Forgets the requests that came.
    #[track_caller]
    pub fn forget(&self) {
        self.ask("DELETE", "seen", "");
    }

    /// The first bytes of the connections to [`RAW_PORT`].
    #[track_caller]
    pub fn raw(&self) -> Vec<Vec<u8>> {
        let list: Vec<String> = serde_json::from_str(&self.ask("GET", "raw", "")).expect("the puppet writes JSON");
        list.iter().map(|text| BASE64.decode(text).expect("the puppet writes base64")).collect()
    }
}

/// What a client says first in TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientHello {
    /// The server's name.
    pub server_name: Option<String>,
    /// Protocols, best first.
    pub alpn: Vec<String>,
}

/// Reads a ClientHello; `None` when the bytes are none.
pub fn client_hello(mut bytes: &[u8]) -> Option<ClientHello> {
    let mut acceptor = rustls::server::Acceptor::default();
    acceptor.read_tls(&mut bytes).ok()?;
    let accepted = acceptor.accept().ok()??;
    let hello = accepted.client_hello();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(ClientHello {
        server_name: hello.server_name().map(str::to_owned),
        alpn: hello.alpn().into_iter().flatten().map(text).collect(),
    })
}
