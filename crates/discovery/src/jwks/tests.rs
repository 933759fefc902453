//! The keeper against a small issuer on this machine.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;

use super::*;

/// An issuer: paths and the answers they get, whole.
struct Issuer {
    address: SocketAddr,
    pages: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Issuer {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let issuer = Self { address: listener.local_addr().unwrap(), pages: Arc::default() };
        let pages = Arc::clone(&issuer.pages);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read > 0) {
                    head.push(byte[0]);
                }
                let head = String::from_utf8_lossy(&head);
                let path = head.split(' ').nth(1).unwrap_or_default();
                let missing = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned();
                let page = pages.lock().unwrap().get(path).cloned().unwrap_or(missing);
                stream.write_all(page.as_bytes()).unwrap_or_default();
            }
        });
        issuer
    }

    fn page(&self, path: &str, body: &str) {
        let page = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        self.pages.lock().unwrap().insert(path.to_owned(), page);
    }

    fn redirect(&self, path: &str, to: &str) {
        let page = format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n");
        self.pages.lock().unwrap().insert(path.to_owned(), page);
    }

    fn without(&self, path: &str) {
        self.pages.lock().unwrap().remove(path);
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

fn keys(id: &str) -> String {
    format!(r#"{{"keys":[{{"e":"AQAB","kid":"{id}","kty":"RSA","n":"AQAB"}}]}}"#)
}

fn mesh(rules: &[String]) -> Arc<Mesh> {
    let rules = rules.join(", ");
    let yaml = format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: t, namespace: shop}}\nspec: {{jwtRules: [{rules}]}}\n"
    );
    let objects = api::parse_documents("test.yaml", &yaml).objects.into_iter().map(|parsed| parsed.object);
    let (snapshot, findings) = mesh::MeshSnapshot::next(None, &api::ConfigSet::new(objects));
    Arc::new(Mesh { snapshot, push: 1, label: "1".into(), version: 1, findings })
}

struct Running {
    meshes: watch::Sender<Option<Arc<Mesh>>>,
    key_sets: watch::Receiver<Arc<KeySets>>,
    metrics: Registry,
    _keeper: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(refresh: Duration) -> Self {
        let (meshes, seen) = watch::channel(None);
        let (sender, key_sets) = watch::channel(Arc::default());
        let settings =
            Settings { refresh, pause_max: Duration::from_millis(20), blocked: Vec::new(), ..Settings::default() };
        let metrics = Registry::new();
        let keeper = tokio::spawn(run(seen, sender, settings, metrics.clone()));
        Self { meshes, key_sets, metrics, _keeper: keeper }
    }

    fn want(&self, rules: &[String]) {
        self.meshes.send_replace(Some(mesh(rules)));
    }

    async fn until(&mut self, holds: impl Fn(&KeySets) -> bool) {
        let waiting = tokio::time::timeout(Duration::from_secs(90), self.key_sets.wait_for(|sets| holds(sets)));
        let in_time = waiting.await.map(drop);
        assert!(in_time.is_ok(), "not in time: {:?}", self.key_sets.borrow());
    }
}

fn has(sets: &KeySets, source: &KeySource, expect: &str) -> bool {
    matches!(sets.get(source), Some(Ok(keys)) if **keys == *expect)
}

fn fails(sets: &KeySets, source: &KeySource, why: &str) -> bool {
    matches!(sets.get(source), Some(Err(reason)) if reason.contains(why))
}

#[tokio::test]
async fn keys_come_are_refreshed_and_are_kept_when_the_issuer_is_away() {
    let issuer = Issuer::start();
    let uri = issuer.url("/keys");
    let source = KeySource::Uri(uri.as_str().into());
    let mut running = Running::start(Duration::from_millis(20));
    running.want(&[format!("{{issuer: i, jwksUri: '{uri}'}}")]);
    running.until(|sets| fails(sets, &source, "404")).await;
    issuer.page("/keys", &keys("one"));
    running.until(|sets| has(sets, &source, &keys("one"))).await;
    issuer.page("/keys", &keys("two"));
    running.until(|sets| has(sets, &source, &keys("two"))).await;
    // Something that is no key set, then nothing at all: what is at hand stays. A second source
    // tells when both were asked again.
    issuer.page("/keys", "{\"keys\": []}");
    issuer.page("/other", &keys("three"));
    let other = issuer.url("/other");
    let second = KeySource::Uri(other.as_str().into());
    let both = [format!("{{issuer: i, jwksUri: '{uri}'}}"), format!("{{issuer: j, jwksUri: '{other}'}}")];
    running.want(&both);
    running.until(|sets| has(sets, &second, &keys("three"))).await;
    issuer.without("/keys");
    issuer.page("/other", &keys("four"));
    running.until(|sets| has(sets, &second, &keys("four"))).await;
    assert!(has(&running.key_sets.borrow(), &source, &keys("two")));
    let mut metrics = String::new();
    running.metrics.render(&mut metrics);
    for name in ["pilot_jwks_resolver_network_fetch_success_total ", "pilot_jwks_resolver_network_fetch_fail_total "] {
        assert!(metrics.contains(name), "{metrics}");
    }
    // What nobody names is forgotten.
    running.want(&both[1..]);
    running.until(|sets| sets.get(&source).is_none()).await;
}

#[tokio::test]
async fn an_issuer_is_discovered_also_behind_a_redirect() {
    let issuer = Issuer::start();
    issuer.redirect("/.well-known/openid-configuration", "/elsewhere");
    issuer.page("/elsewhere", &format!("{{\"jwks_uri\": \"{}\"}}", issuer.url("/keys")));
    issuer.page("/keys", &keys("one"));
    let mut running = Running::start(Duration::from_mins(1));
    let source = KeySource::Issuer(issuer.url("/").into());
    running.want(&[format!("{{issuer: '{}'}}", issuer.url("/"))]);
    running.until(|sets| has(sets, &source, &keys("one"))).await;
}

#[tokio::test]
async fn broken_issuers_give_no_keys() {
    let issuer = Issuer::start();
    issuer.page("/text", "hello");
    issuer.page("/object", "{}");
    issuer.redirect("/loop", "/loop");
    issuer.redirect("/file", "file:///etc/passwd");
    issuer.page("/no/.well-known/openid-configuration", "{\"issuer\": \"x\"}");
    issuer.pages.lock().unwrap().insert("/huge".into(), "HTTP/1.1 200 OK\r\n\r\n".to_owned() + &" ".repeat(2 << 20));
    issuer.pages.lock().unwrap().insert("/half".into(), "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".into());
    let mut running = Running::start(Duration::from_mins(1));
    let cases = [
        ("/text", "not JSON"),
        ("/object", "not a JSON Web Key Set"),
        ("/loop", "redirects"),
        ("/file", "where it may not"),
        ("/huge", "too long"),
        ("/half", ""),
        ("/missing", "404"),
    ];
    let mut rules: Vec<String> =
        cases.iter().map(|(path, _)| format!("{{issuer: 'x{path}', jwksUri: '{}'}}", issuer.url(path))).collect();
    rules.push(format!("{{issuer: '{}'}}", issuer.url("/no")));
    running.want(&rules);
    for (path, why) in cases {
        let source = KeySource::Uri(issuer.url(path).into());
        running.until(|sets| fails(sets, &source, why)).await;
    }
    let undiscovered = KeySource::Issuer(issuer.url("/no").into());
    running.until(|sets| fails(sets, &undiscovered, "jwks_uri")).await;
}
