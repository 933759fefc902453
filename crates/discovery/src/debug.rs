//! Metrics and debug pages (port 15014, and a Unix socket for the owner).
//!
//! | path | what |
//! |---|---|
//! | `/metrics`, `/version`, `/ready` | open to all |
//! | `/debug/syncz` | per proxy and type: what was sent, acked, refused (Istio's form, plus `generation`, `settled`) |
//! | `/debug/synced?resourceVersion=&timeout=` | waits until every proxy runs that version; 504 and the laggards else |
//! | `/debug/findings` | everything wrong with objects |
//! | `/debug/config_dump?proxyID=pod.namespace` | what a proxy should have: names, versions, messages as JSON; secrets by name only |
//!
//! Debug pages are for callers on this machine (loopback, or the socket); everybody else gets 403
//! (property 29).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::get;
use compile::ProxyKind;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use telemetry::registry::Registry;
use tokio::sync::watch;
use types::wellknown::type_urls;
use xds::ResourceSet;

use crate::fleet::{Fleet, ProxyStatus};
use crate::listen::Connection;
use crate::mesh_state::Mesh;

/// What pages show.
#[derive(Clone)]
pub struct Pages {
    /// Proxies.
    pub fleet: Arc<Fleet>,
    /// The mesh.
    pub meshes: watch::Receiver<Option<Arc<Mesh>>>,
    /// Metrics.
    pub metrics: Registry,
}

/// Gives back, now and then, what writing a dump took.
pub(crate) async fn rest() {
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        proto::json::rest();
    }
}

/// All pages.
pub fn router(pages: Pages) -> axum::Router {
    let debug = axum::Router::new()
        .route("/debug/syncz", get(syncz))
        .route("/debug/synced", get(synced))
        .route("/debug/findings", get(findings))
        .route("/debug/config_dump", get(config_dump))
        .layer(middleware::from_fn(only_local));
    axum::Router::new()
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .route("/ready", get(ready))
        .merge(debug)
        .with_state(pages)
}

async fn only_local(request: Request, next: Next) -> Response {
    let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
    let is_local = match connection.peer {
        Some(peer) => peer.ip().to_canonical().is_loopback(),
        // The Unix socket: whoever may open it owns this process.
        None => connection.is_secure,
    };
    if is_local {
        next.run(request).await
    } else {
        (StatusCode::FORBIDDEN, "debug pages are open to this machine only\n").into_response()
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let mut text = String::new();
    pages.metrics.render(&mut text);
    ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "product": "lateen"}))
}

async fn ready(State(pages): State<Pages>) -> Response {
    if pages.meshes.borrow().is_some() {
        (StatusCode::OK, "ready\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "objects are not read yet\n").into_response()
    }
}

async fn syncz(State(pages): State<Pages>) -> Json<Vec<Value>> {
    Json(pages.fleet.status().iter().map(syncz_entry).collect())
}

fn syncz_entry(proxy: &ProxyStatus) -> Value {
    let mut entry = Map::new();
    let mut put = |key: &str, value: Value| entry.insert(key.to_owned(), value);
    put("proxy", json!(proxy.name));
    put(
        "proxy_type",
        json!(match proxy.kind {
            ProxyKind::Sidecar => "sidecar",
            ProxyKind::Router => "router",
        }),
    );
    put("cluster_id", json!(proxy.cluster_id));
    put("istio_version", json!(proxy.istio_version));
    put("node_id", json!(proxy.node_id));
    put("principal", json!(proxy.id.as_ref().map(ToString::to_string)));
    put("connected", json!(proxy.connected.to_string()));
    put("delta", json!(proxy.protocol == xds::client::Protocol::Delta));
    for (type_url, name) in [
        (type_urls::CLUSTER, "cluster"),
        (type_urls::LISTENER, "listener"),
        (type_urls::ROUTE, "route"),
        (type_urls::ENDPOINT, "endpoint"),
        (type_urls::EXTENSION_CONFIG, "extensionconfig"),
    ] {
        if let Some(state) = proxy.types.get(type_url) {
            put(&format!("{name}_sent"), json!(state.sent));
            put(&format!("{name}_acked"), json!(state.acked));
        }
    }
    put("resources", json!(proxy.types));
    put("generation", json!(proxy.progress.generation));
    put("settled", json!(proxy.progress.settled));
    put("refused", json!(proxy.progress.refused));
    Value::Object(entry)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SyncedQuery {
    #[serde(default)]
    resource_version: u64,
    /// Seconds.
    #[serde(default)]
    timeout: f64,
}

async fn synced(State(pages): State<Pages>, Query(query): Query<SyncedQuery>) -> Response {
    const TIMEOUT_MAX: f64 = 600.0;
    let timeout = Duration::try_from_secs_f64(query.timeout.clamp(0.0, TIMEOUT_MAX)).unwrap_or_default();
    let deadline = tokio::time::Instant::now() + timeout;
    let mut changes = pages.fleet.changes();
    let mut meshes = pages.meshes.clone();
    loop {
        changes.mark_unchanged();
        let current = meshes.borrow_and_update().clone();
        let (push, version) = current.as_ref().map_or((0, 0), |mesh| (mesh.push, mesh.version));
        let laggards = current.as_ref().map(|mesh| pages.fleet.laggards(mesh)).unwrap_or_default();
        let is_synced = current.is_some() && version >= query.resource_version && laggards.is_empty();
        let body = Json(json!({
            "synced": is_synced, "generation": push, "resourceVersion": version, "laggards": laggards,
        }));
        if is_synced {
            return (StatusCode::OK, body).into_response();
        }
        tokio::select! {
            () = tokio::time::sleep_until(deadline) => return (StatusCode::GATEWAY_TIMEOUT, body).into_response(),
            Ok(()) = changes.changed() => {}
            Ok(()) = meshes.changed() => {}
        }
    }
}

async fn findings(State(pages): State<Pages>) -> Json<Value> {
    let mut all = pages.meshes.borrow().as_ref().map(|mesh| mesh.findings.clone()).unwrap_or_default();
    for finding in pages.fleet.findings() {
        if !all.contains(&finding) {
            all.push(finding);
        }
    }
    let effects: Vec<Value> = pages
        .meshes
        .borrow()
        .iter()
        .flat_map(|mesh| mesh.snapshot.effects())
        .map(|(object, effect)| json!({"object": object, "effect": effect}))
        .collect();
    Json(json!({"findings": all, "effects": effects}))
}

#[derive(Deserialize)]
struct DumpQuery {
    #[serde(rename = "proxyID", default)]
    proxy_id: String,
}

async fn config_dump(State(pages): State<Pages>, Query(query): Query<DumpQuery>) -> Response {
    let Some(set) = pages.fleet.resources_of(&query.proxy_id) else {
        let known: Vec<String> = pages.fleet.status().into_iter().map(|proxy| proxy.name).collect();
        let body = json!({"error": format!("no proxy {:?} is connected", query.proxy_id), "proxies": known});
        return (StatusCode::NOT_FOUND, Json(body)).into_response();
    };
    // Tens of megabytes of descriptors are read for it.
    let built = tokio::task::spawn_blocking(move || Json(dump(&set)).into_response()).await;
    built.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

fn dump(set: &ResourceSet) -> Value {
    let types: BTreeMap<&str, Vec<Value>> = set
        .tables()
        .map(|(type_url, table)| {
            let resources = table.values().map(|resource| {
                let mut entry = json!({"name": resource.name, "version": resource.version});
                if type_url != type_urls::SECRET {
                    entry["message"] = proto::json::to_json(&resource.any);
                }
                entry
            });
            (type_url, resources.collect())
        })
        .collect();
    json!({"generation": set.generation, "version": set.version, "resources": types})
}
