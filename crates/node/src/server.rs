//! The mesh's local socket: HTTP/1.1 over a Unix socket that only its owner may use.
//!
//! | request | answer |
//! |---|---|
//! | `GET /status` | [`Machine::status`] |
//! | `GET /objects/KIND[?namespace=N]` | `{"kind":…,"items":[…]}` |
//! | `GET /objects/KIND/NAMESPACE/NAME` | the object; `_` stands for no namespace |
//! | `POST /objects[?dryRun=true][&file=NAME][&namespace=N]` | body YAML or JSON; a [`Report`]; `namespace` is for objects that name none |
//! | `POST /objects/delete` | body a list of [`Named`]; for each, `null` or why it is [`Kept`] |
//! | `POST /objects/KIND/NAMESPACE/NAME/merge` | body a JSON merge patch; the object |
//! | `GET /watch` | [`api::watch`] events, a line each |
//! | `GET /files` | `{"objects":[{"object":…,"file":…}]}`: objects that follow a file |
//! | `GET /findings` | findings of the files, as they stand |
//! | `POST /tokenreview` | `{"token","audience"}` → `{"authenticated",…}` |
//! | `GET /logs/NAMESPACE/POD/CONTAINER[?tail=N][&follow=true]` | bytes |
//! | `GET /exec/NAMESPACE/POD/CONTAINER` | [`Machine::exec`] |
//! | `POST /shutdown` | the mesh goes down after the answer |
//!
//! Names and values are escaped as [`crate::client::uri`] does it.
//!
//! *Errors*: 4xx with `{"error":"…"}`.

use std::borrow::Cow;
use std::convert::Infallible;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use api::watch::{Event, EventKind};
use api::{ConfigSet, Kind, Object, ReadOptions, parse_documents_with};
use base64::Engine as _;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{broadcast, mpsc};
use types::{Finding, NamespacedName, ObjectRef, Severity};

use crate::client::unescape;
use crate::logs::Logs;
use crate::store::{Action, Mode, Origin, Store, StoreEvent, is_permanent};

/// Largest request body.
const BODY_MAX: usize = 32 * 1024 * 1024;
/// Of objects that name none.
const DEFAULT_NAMESPACE: &str = "default";
/// Connections at a time.
const CONNECTIONS_MAX: usize = 256;

/// What became of one object.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ObjectOutcome {
    /// Which object.
    pub object: ObjectRef,
    /// `created`, `configured`, `unchanged`, `deleted`, `refused`.
    pub action: String,
}

/// Everything a request did and said.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Objects, in the order they were written.
    pub outcomes: Vec<ObjectOutcome>,
    /// What there is to say; errors mean the object's last version stays.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether something was refused.
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Error)
    }
}

/// An object that is to go, by a word for its kind.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Named {
    /// Name, plural, or short name of a kind.
    pub kind: String,
    /// Without meaning for kinds that are in none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Why an object that was to go did not.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    /// For a person.
    pub message: String,
    /// It was not there.
    pub is_missing: bool,
}

fn word(action: Action) -> String {
    let word = match action {
        Action::Created => "created",
        Action::Configured => "configured",
        Action::Unchanged => "unchanged",
        Action::Deleted => "deleted",
        Action::Refused => "refused",
    };
    word.to_owned()
}

/// Who a token belongs to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reviewed {
    /// Namespace of the pod.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its name.
    pub pod: String,
}

/// What the socket asks of the running mesh beyond its objects.
pub trait Machine: Send + Sync + 'static {
    /// Whom `token` belongs to, when it is valid for `audience` and its pod still exists.
    fn review(&self, token: &str, audience: &str) -> Option<Reviewed>;
    /// What runs: roles, pods, addresses.
    fn status(&self) -> Value;
    /// How to enter a container: a JSON value that [`crate::exec`] understands.
    fn exec(&self, namespace: &str, pod: &str, container: &str) -> Result<Value, String>;
    /// Findings of the files and of the mesh, as they stand.
    fn findings(&self) -> Vec<Finding>;
    /// Called after objects were applied or deleted through the socket.
    fn changed(&self);
    /// Ends the mesh.
    fn shutdown(&self);
}

/// What a connection needs.
#[derive(Clone)]
pub struct Api {
    /// The objects.
    pub store: Arc<Store>,
    /// Output of containers.
    pub logs: Arc<Logs>,
    /// The rest.
    pub machine: Arc<dyn Machine>,
}

/// A body that is either whole or a stream of chunks.
enum Out {
    Whole(Option<Bytes>),
    Stream(mpsc::Receiver<Bytes>),
}

impl Body for Out {
    type Data = Bytes;
    type Error = Infallible;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream(chunks) => chunks.poll_recv(cx).map(|chunk| chunk.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }
}

type Answer = Response<Out>;

fn whole(status: StatusCode, value: &impl Serialize) -> Answer {
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    let mut answer = Response::new(Out::Whole(Some(bytes.into())));
    *answer.status_mut() = status;
    answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    answer
}

fn failed(status: StatusCode, message: impl std::fmt::Display) -> Answer {
    whole(status, &json!({ "error": message.to_string() }))
}

/// Opens the socket, mode 0600. A socket file that nobody serves is replaced.
pub fn bind(path: &Path) -> std::io::Result<UnixListener> {
    if path.exists() && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// A failed accept is tried again after this long.
const ACCEPT_AGAIN: std::time::Duration = std::time::Duration::from_millis(20);

/// Serves the socket for ever.
pub async fn serve(listener: UnixListener, api: Api) {
    let owner = rustix::process::geteuid().as_raw();
    let slots = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: let some go.
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        // Root may always look; nobody else but the owner may.
        let allowed = stream.peer_cred().is_ok_and(|peer| peer.uid() == owner || peer.uid() == 0);
        if allowed {
            let api = api.clone();
            tokio::spawn(async move {
                connection(stream, api).await;
                drop(slot);
            });
        }
    }
}

async fn connection(stream: UnixStream, api: Api) {
    let service = service_fn(move |request: Request<Incoming>| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(answer(&api, request).await) }
    });
    if let Err(error) = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await
    {
        tracing::debug!(%error, "a client of the local socket went away");
    }
}

fn query(request: &Request<Incoming>, name: &str) -> Option<String> {
    let pairs = request.uri().query()?.split('&');
    let value =
        pairs.filter_map(|pair| pair.split_once('=')).find_map(|(key, value)| (key == name).then_some(value))?;
    unescape(value)
}

async fn answer(api: &Api, request: Request<Incoming>) -> Answer {
    let path = request.uri().path().to_owned();
    let Some(parts) = path.trim_matches('/').split('/').map(unescape).collect::<Option<Vec<String>>>() else {
        return failed(StatusCode::BAD_REQUEST, format!("{path} is not escaped as it must be"));
    };
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let method = request.method().clone();
    match (&method, parts.as_slice()) {
        (&Method::GET, ["status"]) => whole(StatusCode::OK, &api.machine.status()),
        (&Method::GET, ["findings"]) => whole(StatusCode::OK, &json!({ "findings": api.machine.findings() })),
        (&Method::GET, ["files"]) => files(api),
        (&Method::GET, ["watch"]) => watch(api),
        (&Method::GET, ["objects", kind]) => list(api, kind, query(&request, "namespace").as_deref()),
        (&Method::GET, ["objects", kind, namespace, name]) => with_key(kind, namespace, name, |kind, key| {
            let objects = api.store.objects();
            objects.find(kind, key).map_or_else(|| not_found(kind, key), |object| whole(StatusCode::OK, &shown(object)))
        }),
        (&Method::POST, ["objects"]) => apply(api, request).await,
        (&Method::POST, ["objects", "delete"]) => delete(api, request).await,
        (&Method::POST, ["objects", kind, namespace, name, "merge"]) => {
            merge(api, (kind, namespace, name), request).await
        }
        (&Method::POST, ["tokenreview"]) => review(api, request).await,
        (&Method::GET, ["logs", namespace, pod, container]) => {
            let tail = query(&request, "tail").and_then(|tail| tail.parse().ok());
            let key = Logs::key(namespace, pod, container);
            if has_container(api, namespace, pod, container) {
                api.logs.open(&key);
            }
            logs(api, &key, tail, query(&request, "follow").as_deref() == Some("true"))
        }
        (&Method::GET, ["exec", namespace, pod, container]) => match api.machine.exec(namespace, pod, container) {
            Ok(target) => whole(StatusCode::OK, &target),
            Err(message) => failed(StatusCode::NOT_FOUND, message),
        },
        (&Method::POST, ["shutdown"]) => {
            api.machine.shutdown();
            whole(StatusCode::OK, &json!({}))
        }
        _ => failed(StatusCode::NOT_FOUND, format!("{method} {path} is not a call of this socket")),
    }
}

fn with_key(kind: &str, namespace: &str, name: &str, then: impl FnOnce(Kind, &NamespacedName) -> Answer) -> Answer {
    let Some(kind) = Kind::parse(kind) else {
        return failed(StatusCode::NOT_FOUND, no_kind(kind));
    };
    let namespace = if namespace == "_" { "" } else { namespace };
    then(kind, &NamespacedName::new(namespace, name))
}

fn no_kind(kind: &str) -> String {
    format!("the mesh has no kind {kind:?}")
}

fn not_found(kind: Kind, key: &NamespacedName) -> Answer {
    failed(StatusCode::NOT_FOUND, format!("{} {key} is not found", kind.name()))
}

fn list(api: &Api, kind: &str, namespace: Option<&str>) -> Answer {
    let Some(kind) = Kind::parse(kind) else {
        return failed(StatusCode::NOT_FOUND, no_kind(kind));
    };
    let objects = api.store.objects();
    let wanted = |object: &&Arc<Object>| namespace.is_none_or(|namespace| &*object.meta.namespace == namespace);
    let items: Vec<Cow<'_, Value>> = objects.of_kind(kind).filter(wanted).map(|object| shown(object)).collect();
    whole(StatusCode::OK, &json!({ "kind": kind.name(), "items": items }))
}

/// An object as it is given back: the text of a Secret is among its data, in base64.
///
/// *Source*: Kubernetes: `stringData` can only be written.
fn shown(object: &Object) -> Cow<'_, Value> {
    let Some(text) = object.raw.get("stringData").filter(|_| object.kind == Kind::Secret) else {
        return Cow::Borrowed(&*object.raw);
    };
    let mut secret = (*object.raw).clone();
    for (key, value) in text.as_object().into_iter().flatten() {
        let bytes = value.as_str().unwrap_or_default();
        secret["data"][key.as_str()] = base64::engine::general_purpose::STANDARD.encode(bytes).into();
    }
    if let Some(secret) = secret.as_object_mut() {
        secret.remove("stringData");
    }
    Cow::Owned(secret)
}

/// Paths are absolute where they are paths at all: who asks may stand elsewhere.
fn files(api: &Api) -> Answer {
    let absolute = |file: &str| match std::path::absolute(file) {
        Ok(path) if Path::new(file).exists() => path.display().to_string(),
        _ => file.to_owned(),
    };
    let of_files = api.store.of_files();
    let objects: Vec<Value> = of_files
        .iter()
        .map(|(kind, key, file)| {
            let object = ObjectRef::new(kind.name(), &key.namespace, &key.name);
            json!({ "object": object, "file": absolute(file) })
        })
        .collect();
    whole(StatusCode::OK, &json!({ "objects": objects }))
}

/// All that are named go as one change, whatever becomes of the others.
async fn delete(api: &Api, request: Request<Incoming>) -> Answer {
    let bytes = match body(request).await {
        Ok(bytes) => bytes,
        Err(answer) => return answer,
    };
    let named: Vec<Named> = match serde_json::from_slice(&bytes) {
        Ok(named) => named,
        Err(error) => return failed(StatusCode::BAD_REQUEST, format!("the body: {error}")),
    };
    let objects = api.store.objects();
    let found: Vec<Result<(Kind, NamespacedName), Kept>> = named.iter().map(|named| found(&objects, named)).collect();
    let wanted: Vec<(Kind, NamespacedName)> = found.iter().flatten().cloned().collect();
    match api.store.delete_all(&wanted) {
        Ok(()) => {
            api.machine.changed();
            let kept: Vec<Option<Kept>> = found.into_iter().map(Result::err).collect();
            whole(StatusCode::OK, &kept)
        }
        Err(error) => failed(StatusCode::INSUFFICIENT_STORAGE, error),
    }
}

fn found(objects: &ConfigSet, named: &Named) -> Result<(Kind, NamespacedName), Kept> {
    let missing = |message: String| Kept { message, is_missing: true };
    let kind = Kind::parse(&named.kind).ok_or_else(|| missing(no_kind(&named.kind)))?;
    let key = NamespacedName::new(if kind.is_namespaced() { &named.namespace } else { "" }, &named.name);
    if objects.find(kind, &key).is_none() {
        return Err(missing(format!("{} {key} is not found", kind.name())));
    }
    if is_permanent(kind, &key.name) {
        return Err(Kept { message: format!("namespace {:?} may not be deleted", key.name), is_missing: false });
    }
    Ok((kind, key))
}

async fn body(request: Request<Incoming>) -> Result<Bytes, Answer> {
    let collected = Limited::new(request.into_body(), BODY_MAX).collect().await;
    collected
        .map(http_body_util::Collected::to_bytes)
        .map_err(|error| failed(StatusCode::BAD_REQUEST, format!("the body: {error}")))
}

async fn apply(api: &Api, request: Request<Incoming>) -> Answer {
    let dry_run = query(&request, "dryRun").as_deref() == Some("true");
    let file = query(&request, "file").unwrap_or_else(|| "-".to_owned());
    let namespace = query(&request, "namespace").unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
    let bytes = match body(request).await {
        Ok(bytes) => bytes,
        Err(answer) => return answer,
    };
    let options = ReadOptions { default_namespace: &namespace, ..ReadOptions::default() };
    let documents = parse_documents_with(&file, &String::from_utf8_lossy(&bytes), options);
    let mut report = Report { outcomes: Vec::new(), findings: documents.findings };
    report.outcomes.extend(
        documents
            .refused
            .into_iter()
            .map(|refused| ObjectOutcome { object: refused.object, action: word(Action::Refused) }),
    );
    let values = documents.objects.iter().map(|parsed| ((*parsed.object.raw).clone(), Origin::Api)).collect();
    match api.store.apply(values, Mode::Apply, dry_run) {
        Ok(outcomes) => {
            for outcome in outcomes {
                // Warnings were said with their positions when the text was read.
                if outcome.action == Action::Refused {
                    report.findings.extend(outcome.findings);
                }
                if let Some(object) = outcome.object {
                    report.outcomes.push(ObjectOutcome { object, action: word(outcome.action) });
                }
            }
        }
        Err(error) => return failed(StatusCode::INSUFFICIENT_STORAGE, error),
    }
    if !dry_run {
        api.machine.changed();
    }
    whole(StatusCode::OK, &report)
}

/// RFC 7386.
fn merge_patch(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    if let Value::Object(map) = target {
        for (name, value) in patch {
            if value.is_null() {
                map.remove(name);
            } else {
                merge_patch(map.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
    }
}

async fn merge(api: &Api, (kind, namespace, name): (&str, &str, &str), request: Request<Incoming>) -> Answer {
    let patch = match body(request).await.map(|bytes| serde_json::from_slice::<Value>(&bytes)) {
        Ok(Ok(patch)) => patch,
        Ok(Err(error)) => return failed(StatusCode::BAD_REQUEST, format!("the patch is not JSON: {error}")),
        Err(answer) => return answer,
    };
    with_key(kind, namespace, name, |kind, key| match api.store.patch(kind, key, |raw| merge_patch(raw, &patch)) {
        Ok(None) => not_found(kind, key),
        Ok(Some(outcome)) if outcome.action == Action::Refused => {
            let said = outcome.findings.iter().find(|finding| finding.severity == Severity::Error);
            failed(StatusCode::UNPROCESSABLE_ENTITY, said.map_or_else(|| "refused".to_owned(), ToString::to_string))
        }
        Ok(Some(_)) => {
            api.machine.changed();
            let objects = api.store.objects();
            objects.find(kind, key).map_or_else(|| not_found(kind, key), |object| whole(StatusCode::OK, &*object.raw))
        }
        Err(error) => failed(StatusCode::INSUFFICIENT_STORAGE, error),
    })
}

#[derive(Deserialize)]
struct Review {
    token: String,
    audience: String,
}

async fn review(api: &Api, request: Request<Incoming>) -> Answer {
    let review: Review = match body(request).await.map(|bytes| serde_json::from_slice(&bytes)) {
        Ok(Ok(review)) => review,
        Ok(Err(_)) => return failed(StatusCode::BAD_REQUEST, "the review is not JSON of the form {token, audience}"),
        Err(answer) => return answer,
    };
    match api.machine.review(&review.token, &review.audience) {
        Some(who) => {
            let mut answer = json!(who);
            answer["authenticated"] = json!(true);
            whole(StatusCode::OK, &answer)
        }
        None => whole(StatusCode::OK, &json!({ "authenticated": false })),
    }
}

fn stream(feed: impl Future<Output = ()> + Send + 'static, chunks: mpsc::Receiver<Bytes>) -> Answer {
    tokio::spawn(feed);
    Response::new(Out::Stream(chunks))
}

/// Sends everything, then what changes. A client that falls too far behind is cut off: it comes
/// back and lists again.
fn watch(api: &Api) -> Answer {
    let subscription = api.store.subscribe();
    let mut events = subscription.events;
    let (to, chunks) = mpsc::channel(64);
    let feed = async move {
        for object in subscription.objects.iter() {
            let line = Event::new(EventKind::Added, Arc::clone(&object.raw)).to_line();
            if to.send(line.into()).await.is_err() {
                return;
            }
        }
        if to.send(Event::synced_at(subscription.version).to_line().into()).await.is_err() {
            return;
        }
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = to.closed() => return,
            };
            let Ok(event) = event else { return };
            if to.send(StoreEvent::to_wire(&event).to_line().into()).await.is_err() {
                return;
            }
        }
    };
    stream(feed, chunks)
}

/// Whether the pod's template names the container, which may have written nothing yet.
fn has_container(api: &Api, namespace: &str, pod: &str, container: &str) -> bool {
    let objects = api.store.objects();
    let is_it = |object: &&Arc<Object>| *object.meta.namespace == *namespace && *object.meta.name == *pod;
    let Some(pod) = objects.of_kind(Kind::Pod).find(is_it) else { return false };
    let lists = ["containers", "initContainers"].iter().filter_map(|list| pod.raw["spec"][*list].as_array());
    lists.flatten().any(|entry| entry["name"] == container)
}

fn logs(api: &Api, key: &str, tail: Option<usize>, follow: bool) -> Answer {
    let Some((kept, mut next)) = api.logs.read(key, tail) else {
        return failed(StatusCode::NOT_FOUND, format!("there is no container {key}, or its output is gone"));
    };
    let (to, chunks) = mpsc::channel(64);
    let feed = async move {
        if to.send(kept.into()).await.is_err() || !follow {
            return;
        }
        loop {
            let chunk = tokio::select! {
                chunk = next.recv() => chunk,
                () = to.closed() => return,
            };
            match chunk {
                Ok(bytes) => {
                    if to.send(bytes.into()).await.is_err() {
                        return;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    };
    stream(feed, chunks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Client;

    struct Nothing;

    impl Machine for Nothing {
        fn review(&self, token: &str, _: &str) -> Option<Reviewed> {
            (token == "good").then(|| Reviewed { namespace: "a".into(), service_account: "b".into(), pod: "c".into() })
        }
        fn status(&self) -> Value {
            json!({ "name": "t" })
        }
        fn exec(&self, _: &str, pod: &str, _: &str) -> Result<Value, String> {
            Err(format!("pod {pod} is not found"))
        }
        fn findings(&self) -> Vec<Finding> {
            Vec::new()
        }
        fn changed(&self) {}
        fn shutdown(&self) {}
    }

    fn start(folder: &Path) -> (Client, Api) {
        let path = folder.join("api.sock");
        let api = Api { store: Arc::new(Store::in_memory()), logs: Arc::new(Logs::new()), machine: Arc::new(Nothing) };
        tokio::spawn(serve(bind(&path).unwrap(), api.clone()));
        (Client::new(&path), api)
    }

    const TEXT: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {a: b}}\n";

    #[tokio::test]
    async fn objects_through_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let (client, _api) = start(folder.path());
        let report: Report = client.post("/objects?file=x.yaml", TEXT.as_bytes().to_vec()).await.unwrap();
        assert_eq!(report.outcomes[0].action, "created");
        let one: Value = client.get("/objects/ns/_/shop").await.unwrap();
        assert_eq!(one["metadata"]["name"], "shop");
        let patched: Value = client
            .post("/objects/Namespace/_/shop/merge", br#"{"metadata":{"labels":{"a":null,"c":"d"}}}"#.to_vec())
            .await
            .unwrap();
        assert_eq!(patched["metadata"]["labels"], json!({ "c": "d" }));
        let namespace = Named { kind: "namespace".to_owned(), namespace: String::new(), name: "shop".to_owned() };
        let kept: Vec<Option<Kept>> =
            client.post("/objects/delete", serde_json::to_vec(&[namespace]).unwrap()).await.unwrap();
        assert_eq!(kept, [None]);
        let error = client.get::<Value>("/objects/ns/_/shop").await.unwrap_err();
        assert!(error.to_string().contains("Namespace shop is not found"), "{error}");
        assert!(client.get::<Value>("/objects/nonsense").await.unwrap_err().to_string().contains("no kind"));
    }

    #[tokio::test]
    async fn secrets_are_given_back_as_data() {
        let folder = tempfile::tempdir().unwrap();
        let (client, _api) = start(folder.path());
        let text =
            "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {a: b2xk, c: Yw==}\nstringData: {a: new}\n";
        client.post::<Report>("/objects", text.as_bytes().to_vec()).await.unwrap();
        let list: Value = client.get("/objects/Secret").await.unwrap();
        let one: Value = client.get("/objects/Secret/default/s").await.unwrap();
        for secret in [&list["items"][0], &one] {
            assert_eq!(secret["data"], json!({ "a": "bmV3", "c": "Yw==" }));
            assert!(secret.get("stringData").is_none(), "{secret}");
        }
    }

    #[tokio::test]
    async fn odd_names_are_names_and_some_namespaces_stay() {
        let folder = tempfile::tempdir().unwrap();
        let (client, _api) = start(folder.path());
        let file = crate::client::uri(&["objects"], &[("file", "a b&ü#?%.yaml")]);
        let report: Report = client.post(&file, b"kind: [".to_vec()).await.unwrap();
        assert_eq!(&*report.findings[0].position.as_ref().unwrap().file, "a b&ü#?%.yaml");
        let odd = crate::client::uri(&["objects", "Pod", "no such", "a/b?c"], &[]);
        let error = client.get::<Value>(&odd).await.unwrap_err().to_string();
        assert!(error.contains("Pod no such/a/b?c is not found"), "{error}");
        client.post::<Report>("/objects", TEXT.replace("shop", "default").into_bytes()).await.unwrap();
        let named = ["default", "shop"].map(|name| Named {
            kind: "ns".to_owned(),
            namespace: String::new(),
            name: name.to_owned(),
        });
        let kept: Vec<Option<Kept>> =
            client.post("/objects/delete", serde_json::to_vec(&named).unwrap()).await.unwrap();
        let [Some(default), Some(shop)] = &kept[..] else { panic!("{kept:?}") };
        assert!(default.message.contains("may not be deleted") && !default.is_missing, "{default:?}");
        assert!(shop.message.contains("Namespace shop is not found") && shop.is_missing, "{shop:?}");
    }

    #[tokio::test]
    async fn tokens_are_reviewed() {
        let folder = tempfile::tempdir().unwrap();
        let (client, _api) = start(folder.path());
        let good: Value =
            client.post("/tokenreview", br#"{"token":"good","audience":"istio-ca"}"#.to_vec()).await.unwrap();
        assert_eq!((&good["authenticated"], &good["serviceAccount"]), (&json!(true), &json!("b")));
        let bad: Value = client.post("/tokenreview", br#"{"token":"x","audience":"istio-ca"}"#.to_vec()).await.unwrap();
        assert_eq!(bad, json!({ "authenticated": false }));
    }

    #[tokio::test]
    async fn a_watch_lists_then_follows() {
        let folder = tempfile::tempdir().unwrap();
        let (client, api) = start(folder.path());
        let object = api::parse_documents("t", TEXT).objects.remove(0).object;
        api.store.apply(vec![((*object.raw).clone(), Origin::Api)], Mode::Apply, false).unwrap();
        let mut lines = client.lines("/watch").await.unwrap();
        assert!(lines.next().await.unwrap().starts_with("{\"type\":\"ADDED\""));
        let version = *api.store.version().borrow();
        assert_eq!(
            lines.next().await.unwrap(),
            format!("{{\"type\":\"SYNCED\",\"object\":{{\"metadata\":{{\"resourceVersion\":\"{version}\"}}}}}}")
        );
        api.store.delete(Kind::Namespace, &NamespacedName::new("", "shop")).unwrap();
        assert!(lines.next().await.unwrap().starts_with("{\"type\":\"DELETED\""));
    }

    #[tokio::test]
    async fn logs_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (client, api) = start(folder.path());
        api.logs.append("a/b/c", b"one\n");
        let mut lines = client.lines("/logs/a/b/c?follow=true").await.unwrap();
        assert_eq!(lines.next().await.unwrap(), "one");
        api.logs.append("a/b/c", b"two\n");
        assert_eq!(lines.next().await.unwrap(), "two");
    }

    #[test]
    fn merge_patches() {
        let mut target = json!({ "a": { "b": 1, "c": 2 }, "d": [1] });
        merge_patch(&mut target, &json!({ "a": { "b": null, "e": { "f": 1 } }, "d": [2] }));
        assert_eq!(target, json!({ "a": { "c": 2, "e": { "f": 1 } }, "d": [2] }));
    }
}
