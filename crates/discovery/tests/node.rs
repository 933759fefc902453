//! The control plane on top of a node: its watch, and its word on tokens.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::watch::{Event, EventKind};
use axum::Json;
use axum::body::Body;
use axum::routing::{get, post};
use discovery::authn::token_review::TokenReview;
use discovery::authn::{TokenAuthenticator as _, Unauthenticated};
use discovery::source::{self, Admitted, Source};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::BroadcastStream;

const WAIT: Duration = Duration::from_secs(90);

fn node(socket: &Path, present: Vec<Event>, changes: &broadcast::Sender<Event>) -> JoinHandle<()> {
    let changes = changes.clone();
    let watch = move || {
        let later = BroadcastStream::new(changes.subscribe()).filter_map(Result::ok);
        let events = tokio_stream::iter(present.clone()).chain(tokio_stream::once(Event::synced())).chain(later);
        let lines = events.map(|event| Ok::<_, std::io::Error>(event.to_line()));
        std::future::ready(Body::from_stream(lines))
    };
    let review = |Json(body): Json<Value>| async move {
        assert_eq!(body["audience"], "istio-ca");
        Json(match body["token"].as_str() {
            Some("good") => {
                json!({"authenticated": true, "namespace": "shop", "serviceAccount": "reviews", "pod": "reviews-1"})
            }
            Some("unbound") => json!({"authenticated": true, "namespace": "shop", "serviceAccount": "reviews"}),
            _ => json!({"authenticated": false, "error": "the pod is gone"}),
        })
    };
    let router = axum::Router::new().route("/watch", get(watch)).route("/tokenreview", post(review));
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(discovery::listen::serve_unix(listener, router))
}

fn service(kind: EventKind, name: &str, version: u32) -> Event {
    let object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "shop", "resourceVersion": version.to_string()},
        "spec": {"ports": [{"name": "http", "port": 80}]},
    });
    Event::new(kind, Arc::new(object))
}

async fn until(admitted: &mut watch::Receiver<Option<Arc<Admitted>>>, version: u64) -> Vec<String> {
    let reached = |value: &Option<Arc<Admitted>>| value.as_ref().is_some_and(|value| value.version >= version);
    let value = tokio::time::timeout(WAIT, admitted.wait_for(reached)).await.unwrap().unwrap().clone().unwrap();
    value.configs.iter().map(|object| object.meta.name.to_string()).collect()
}

#[tokio::test]
async fn the_watch_is_followed_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("node.sock");
    let (changes, _) = broadcast::channel(16);
    let (publisher, mut admitted) = watch::channel(None);
    // The source may be there first.
    let running = tokio::spawn(source::run(Source::Node(socket.clone()), publisher));
    let first = node(&socket, vec![service(EventKind::Added, "a", 1), service(EventKind::Added, "b", 2)], &changes);
    assert_eq!(until(&mut admitted, 2).await, ["a", "b"]);
    changes.send(service(EventKind::Added, "c", 3)).unwrap();
    assert_eq!(until(&mut admitted, 3).await, ["a", "b", "c"]);
    changes.send(service(EventKind::Deleted, "a", 4)).unwrap();
    assert_eq!(until(&mut admitted, 4).await, ["b", "c"]);
    // While the node is away, what was known stays.
    first.abort();
    assert!(first.await.is_err());
    std::fs::remove_file(&socket).unwrap();
    assert_eq!(until(&mut admitted, 0).await, ["b", "c"]);
    let _second = node(&socket, vec![service(EventKind::Added, "c", 3), service(EventKind::Added, "d", 7)], &changes);
    assert_eq!(until(&mut admitted, 7).await, ["c", "d"]);
    drop(admitted);
    tokio::time::timeout(WAIT, running).await.unwrap().unwrap();
}

#[tokio::test]
async fn tokens_are_reviewed_by_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("node.sock");
    let tokens = TokenReview::new(&socket);
    assert!(matches!(tokens.authenticate("good").await, Err(Unauthenticated::Unavailable(_))));
    let _node = node(&socket, Vec::new(), &broadcast::channel(1).0);
    let account = tokens.authenticate("good").await.unwrap();
    assert_eq!((&*account.namespace, &*account.name, account.pod.as_deref()), ("shop", "reviews", Some("reviews-1")));
    assert_eq!(tokens.authenticate("unbound").await.unwrap().pod, None);
    match tokens.authenticate("bad").await {
        Err(Unauthenticated::Token(reason)) => assert_eq!(reason, "the pod is gone"),
        other => panic!("{other:?}"),
    }
}
