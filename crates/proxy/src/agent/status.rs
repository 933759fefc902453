//! Readiness and merged metrics of an Envoy, by its admin interface.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use identity::agent::Identities;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::admin::{METRICS_TYPE, Page, accept, expiry, page, refusal, scrape, text};
use crate::options::Role;
use workers::secrets::{ROOTS, WORKLOAD};

/// What the pages answer from.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) admin: SocketAddr,
    pub(super) app_metrics: Option<(u16, String)>,
    /// Told when somebody asks for the end.
    pub(super) end: mpsc::Sender<()>,
    pub(super) role: Role,
    pub(super) identities: Identities,
}

/// An answer of the admin interface is not longer.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Nor does it take longer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Connections at the same time.
const CONNECTIONS_MAX: usize = 64;

/// Serves `/healthz/ready`, `/stats/prometheus`, `/drain` and `/quitquitquit`, for ever.
pub(super) async fn serve(listener: TcpListener, context: Context) {
    accept(listener, CONNECTIONS_MAX, move |peer, request| {
        let context = context.clone();
        async move { answer(&context, peer, &request).await }
    })
    .await;
}

async fn answer(context: &Context, peer: SocketAddr, request: &Request<Incoming>) -> Page {
    let post = request.method() == Method::POST;
    let path = request.uri().path();
    if matches!(path, "/drain" | "/quitquitquit")
        && let Some(refused) = refusal(peer, post)
    {
        return refused;
    }
    match path {
        "/healthz/ready" => match ask(context.admin, Method::GET, "/ready").await {
            Ok((StatusCode::OK, _)) => text(StatusCode::OK, ""),
            Ok((_, words)) => text(StatusCode::SERVICE_UNAVAILABLE, words),
            Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, error),
        },
        "/stats/prometheus" | "/metrics" => {
            let Ok((StatusCode::OK, own)) = ask(context.admin, Method::GET, "/stats/prometheus").await else {
                return text(StatusCode::SERVICE_UNAVAILABLE, "");
            };
            let mut all = String::from_utf8_lossy(&own).into_owned();
            let identity = context.identities.borrow().clone();
            if let Some(identity) = identity {
                let roots = identity.roots.not_after().map(|end| (ROOTS.to_owned(), end));
                expiry(&mut all, roots.into_iter().chain([(WORKLOAD.to_owned(), identity.not_after())]).collect());
            }
            if let Some((port, path)) = &context.app_metrics {
                all.push_str(&scrape(*port, path).await);
            }
            page(StatusCode::OK, METRICS_TYPE, all)
        }
        "/drain" => match ask(context.admin, Method::POST, drain_path(context.role)).await {
            Ok((status, words)) => text(status, words),
            Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, error),
        },
        "/quitquitquit" => {
            // One wish is enough.
            _ = context.end.try_send(());
            text(StatusCode::OK, "OK\n")
        }
        _ => text(StatusCode::NOT_FOUND, ""),
    }
}

/// What makes an Envoy of this role drain.
pub(super) fn drain_path(role: Role) -> &'static str {
    if super::drains_inbound_only(role) { "/drain_listeners?inboundonly&graceful" } else { "/drain_listeners?graceful" }
}

/// Open connections of clients, the agent's own apart; `None` if the Envoy does not say.
pub(super) async fn connections(admin: SocketAddr) -> Option<u64> {
    let (_, stats) = ask(admin, Method::GET, "/stats?filter=listener.*downstream_cx_active").await.ok()?;
    let stats = String::from_utf8_lossy(&stats).into_owned();
    let of_traffic = |line: &&str| !line.starts_with("listener.admin.") && !line.contains(".worker_");
    let value = |line: &str| line.rsplit_once(": ").and_then(|(_, value)| value.parse::<u64>().ok());
    Some(stats.lines().filter(of_traffic).filter_map(value).sum())
}

/// One request to the admin interface.
///
/// *Errors*: why there is no answer, for people.
pub(super) async fn ask(admin: SocketAddr, method: Method, path: &str) -> Result<(StatusCode, Bytes), String> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "agent")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let asking = async {
        let stream = TcpStream::connect(admin).await.map_err(|error| error.to_string())?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
        };
        // The connection ends when the exchange lets its sender go.
        let (answer, _) = tokio::join!(exchange, connection);
        answer
    };
    tokio::time::timeout(ANSWER_MAX, asking).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
}
