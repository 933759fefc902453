//! The proxy's own services: readiness, metrics, merged metrics, and Envoy's admin interface.
//!
//! These listen apart from traffic, on the control thread, and answer while lowering works. Whoever reaches
//! the pod reaches all of them but the admin interface, so what ends or drains the proxy is for its own
//! machine only, and connections are bounded.

mod clusters;
mod dump;
mod pages;

pub(crate) use pages::{expiry, scrape};

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::config::core::v3::Node;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request as HttpRequest, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};

use crate::control::{Inspection, Listening, Request};
use crate::dns::NameTable;
use crate::options::{Addresses, LogLevels};
use crate::proxy::{RunError, State};
use workers::Shared;
use workers::worker::DrainScope;

/// What the services answer from.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) shared: Arc<Shared>,
    pub(crate) requests: mpsc::UnboundedSender<Request>,
    pub(crate) state: watch::Receiver<State>,
    pub(crate) names: Arc<ArcSwap<NameTable>>,
    pub(crate) node: Node,
    /// Workers.
    pub(crate) concurrency: usize,
    pub(crate) started: tokio::time::Instant,
    pub(crate) app_metrics: Option<(u16, String)>,
    pub(crate) dns_upstream: Vec<SocketAddr>,
    pub(crate) log_levels: Option<Arc<dyn LogLevels>>,
    /// Labels of every metric, as the text format has them.
    pub(crate) stats_tags: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Service {
    Admin,
    Readiness,
    Metrics,
    Merged,
}

/// Connections of one service at the same time.
const CONNECTIONS_MAX: usize = 256;
/// Time for a request's head, and between two requests of a connection.
const HEAD_MAX: Duration = Duration::from_secs(30);

pub(crate) type Page = Response<Full<Bytes>>;

/// Opens all services; gives their names and addresses.
pub(crate) async fn start(
    addresses: &Addresses,
    context: &Context,
) -> Result<Vec<(&'static str, SocketAddr)>, RunError> {
    let mut opened = Vec::new();
    for (what, service, address) in [
        ("admin", Service::Admin, addresses.admin),
        ("readiness", Service::Readiness, addresses.readiness),
        ("metrics", Service::Metrics, addresses.metrics),
        ("merged", Service::Merged, addresses.merged),
    ] {
        let Some(address) = address else { continue };
        let failed = |source| RunError::Listen { address, what, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        opened.push((what, listener.local_addr().map_err(failed)?));
        tokio::spawn(serve(listener, service, context.clone()));
    }
    if let Some(address) = addresses.dns {
        let failed = |source| RunError::Listen { address, what: "dns", source };
        let (names, upstream) = (Arc::clone(&context.names), context.dns_upstream.clone());
        let bound = crate::dns::serve(address, names, upstream, Arc::clone(&context.shared)).await.map_err(failed)?;
        opened.push(("dns", bound));
    }
    Ok(opened)
}

async fn serve(listener: TcpListener, service: Service, context: Context) {
    accept(listener, CONNECTIONS_MAX, move |peer, request| {
        let context = context.clone();
        async move { answer(service, &context, peer, request).await }
    })
    .await;
}

/// Serves a listener for ever, at most so many connections at a time: the oldest makes room for one more,
/// so that whoever only holds connections keeps nobody from asking.
pub(crate) async fn accept<F, A>(listener: TcpListener, connections_max: usize, answer: F)
where
    F: Fn(SocketAddr, HttpRequest<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Page> + Send + 'static,
{
    // Connections end with the set, and so with this future.
    let mut connections = JoinSet::new();
    let mut by_age = VecDeque::new();
    loop {
        while connections.try_join_next().is_some() {}
        if by_age.len() >= connections_max {
            by_age.retain(|connection: &AbortHandle| !connection.is_finished());
        }
        if by_age.len() >= connections_max
            && let Some(oldest) = by_age.pop_front()
        {
            oldest.abort();
        }
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let answer = answer.clone();
        by_age.push_back(connections.spawn(async move {
            let serve = service_fn(move |request| {
                let answer = answer(peer, request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_MAX)
                .serve_connection(TokioIo::new(stream), serve);
            if let Err(error) = connection.await {
                tracing::trace!(%error, "a connection to the proxy's own services ended");
            }
        }));
    }
}

/// Whether a change of the proxy's life may be asked for from there.
///
/// *Source*: Istio's agent, port 15020: `/quitquitquit` and `/drain`, loopback only, else 403; POST
/// only, else 405.
pub(crate) fn refusal(peer: SocketAddr, post: bool) -> Option<Page> {
    if !peer.ip().to_canonical().is_loopback() {
        return Some(text(StatusCode::FORBIDDEN, "only requests from localhost are allowed\n"));
    }
    (!post).then(|| text(StatusCode::METHOD_NOT_ALLOWED, ""))
}

pub(crate) fn page(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Page {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", http::HeaderValue::from_static(kind));
    response.headers_mut().insert("cache-control", http::HeaderValue::from_static("no-cache, max-age=0"));
    response
}

pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Page {
    page(status, "text/plain; charset=UTF-8", body)
}

fn json(body: impl Into<Bytes>) -> Page {
    page(StatusCode::OK, "application/json", body)
}

pub(crate) const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

async fn answer(service: Service, context: &Context, peer: SocketAddr, request: HttpRequest<Incoming>) -> Page {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let post = request.method() == Method::POST;
    match service {
        Service::Readiness => match path.as_str() {
            "/healthz/ready" => ready(context),
            _ => text(StatusCode::NOT_FOUND, ""),
        },
        Service::Metrics => match path.as_str() {
            "/stats/prometheus" | "/metrics" => page(StatusCode::OK, METRICS_TYPE, pages::metrics(context)),
            _ => text(StatusCode::NOT_FOUND, ""),
        },
        Service::Merged => match path.as_str() {
            "/stats/prometheus" | "/metrics" => {
                let mut all = pages::metrics(context);
                if let Some((port, path)) = &context.app_metrics {
                    all.push_str(&scrape(*port, path).await);
                }
                page(StatusCode::OK, METRICS_TYPE, all)
            }
            "/healthz/ready" => ready(context),
            "/quitquitquit" | "/drain" => match refusal(peer, post) {
                Some(refused) => refused,
                None if path == "/drain" => ask(context, Request::Drain(DrainScope::Inbound, Listening::Stays)),
                None => ask(context, Request::Quit),
            },
            _ => text(StatusCode::NOT_FOUND, ""),
        },
        Service::Admin => admin(context, &path, &query, post).await,
    }
}

fn ready(context: &Context) -> Page {
    let state = *context.state.borrow();
    if state.is_ready() { text(StatusCode::OK, "") } else { text(StatusCode::SERVICE_UNAVAILABLE, "") }
}

fn ask(context: &Context, request: Request) -> Page {
    match context.requests.send(request) {
        Ok(()) => text(StatusCode::OK, "OK\n"),
        Err(_) => text(StatusCode::SERVICE_UNAVAILABLE, "ending\n"),
    }
}

async fn inspect(context: &Context) -> Option<Inspection> {
    let (answer, waiting) = oneshot::channel();
    context.requests.send(Request::Inspect(answer)).ok()?;
    waiting.await.ok()
}

async fn admin(context: &Context, path: &str, query: &str, post: bool) -> Page {
    let parameter = |name: &str| {
        query.split('&').find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name).map(|(_, value)| value))
    };
    let posts =
        matches!(path, "/drain_listeners" | "/healthcheck/fail" | "/healthcheck/ok" | "/quitquitquit" | "/logging");
    if posts && !post {
        return text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed: use POST\n");
    }
    match path {
        "/ready" => {
            let state = *context.state.borrow();
            let words = match state {
                state if state.is_ready() => return text(StatusCode::OK, "LIVE\n"),
                State { configured: false, .. } => "PRE_INITIALIZING\n",
                _ => "DRAINING\n",
            };
            text(StatusCode::SERVICE_UNAVAILABLE, words)
        }
        "/stats" | "/stats/prometheus" => {
            let filter = match parameter("filter").map(pages::Filter::new).transpose() {
                Ok(filter) => filter,
                Err(reason) => return text(StatusCode::BAD_REQUEST, format!("invalid regex: {reason}\n")),
            };
            if path == "/stats" && parameter("format") != Some("prometheus") {
                return text(StatusCode::OK, pages::stats(context, filter.as_ref()));
            }
            page(StatusCode::OK, METRICS_TYPE, pages::filtered(context, filter.as_ref()))
        }
        "/drain_listeners" => {
            let has = |word: &str| query.split('&').any(|parameter| parameter.split('=').next() == Some(word));
            let scope = if has("inboundonly") { DrainScope::Inbound } else { DrainScope::All };
            let listening = match (has("graceful"), has("skip_exit")) {
                (_, true) => Listening::Stays,
                (true, false) => Listening::EndsLater,
                (false, false) => Listening::Ends,
            };
            ask(context, Request::Drain(scope, listening))
        }
        "/healthcheck/fail" => ask(context, Request::Health(false)),
        "/healthcheck/ok" => ask(context, Request::Health(true)),
        "/quitquitquit" => ask(context, Request::Quit),
        "/logging" => logging(context, query),
        "/server_info" => json(pages::server_info(context)),
        "/memory" => json(pages::memory()),
        "/certs" => json(pages::certs(context)),
        "/lateen/state" => json(pages::state(context)),
        "/config_dump" | "/clusters" | "/listeners" => {
            let Some(inspection) = inspect(context).await else {
                return text(StatusCode::SERVICE_UNAVAILABLE, "ending\n");
            };
            let as_json = parameter("format") == Some("json");
            let (context, path, query) = (context.clone(), path.to_owned(), query.to_owned());
            let resource = parameter("resource").map(str::to_owned);
            // All of a large mesh takes its time, and this thread answers readiness and the control plane.
            let made = tokio::task::spawn_blocking(move || match path.as_str() {
                "/clusters" if as_json => json(pages::clusters_json(&context, &inspection)),
                "/clusters" => text(StatusCode::OK, pages::clusters(&context, &inspection)),
                "/listeners" if as_json => json(pages::listeners_json(&inspection)),
                "/listeners" => text(StatusCode::OK, pages::listeners(&inspection)),
                _ => match dump::config(&context, &inspection, query.contains("include_eds"), resource.as_deref()) {
                    Ok(dump) => json(dump),
                    Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error),
                },
            });
            made.await.unwrap_or_else(|_| text(StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made\n"))
        }
        "/" | "/help" => text(StatusCode::OK, HELP),
        _ => text(StatusCode::NOT_FOUND, format!("invalid path: {path}\n{HELP}")),
    }
}

/// Sets levels and lists them: `level=LEVEL` for all, `paths=NAME:LEVEL,…` or `NAME=LEVEL` for some.
fn logging(context: &Context, query: &str) -> Page {
    let Some(levels) = &context.log_levels else {
        return text(StatusCode::SERVICE_UNAVAILABLE, "the log of this process is somebody else's\n");
    };
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    for (key, value) in pairs {
        let set = match key {
            "level" => levels.set(None, value),
            "paths" => value.split(',').try_for_each(|one| match one.split_once(':') {
                Some((name, level)) => levels.set(Some(name), level),
                None => Err(format!("{one:?} is not NAME:LEVEL")),
            }),
            name => levels.set(Some(name), value),
        };
        if let Err(reason) = set {
            return text(StatusCode::BAD_REQUEST, format!("error: {reason}\n"));
        }
    }
    let mut lines = String::from("active loggers:\n");
    for (name, level) in levels.list() {
        for part in ["  ", name, ": ", level, "\n"] {
            lines.push_str(part);
        }
    }
    text(StatusCode::OK, lines)
}

const HELP: &str = "admin commands are:
  /certs: certificates in use
  /clusters: upstream cluster status (?format=json)
  /config_dump: current configuration (?include_eds, ?resource=NAME)
  /drain_listeners (POST): connections leave and listeners close (?inboundonly, ?graceful, ?skip_exit)
  /healthcheck/fail (POST), /healthcheck/ok (POST): readiness, and whether connections are to leave
  /lateen/state: requests and connections under way, by cluster
  /listeners: listening addresses (?format=json)
  /logging (POST): levels of the log (?level=LEVEL, ?paths=NAME:LEVEL,...)
  /memory: allocator statistics
  /quitquitquit (POST): end
  /ready: LIVE when ready
  /server_info: version and state
  /stats: counters (?format=prometheus, ?filter=REGEX)
  /stats/prometheus: the same as Prometheus text
";

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_holds_connections_keeps_nobody_from_asking() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let serving = tokio::spawn(accept(listener, 2, |_, _| async { text(StatusCode::OK, "hello") }));
        let mut held = Vec::new();
        for _ in 0..5 {
            held.push(tokio::net::TcpStream::connect(at).await.unwrap());
        }
        let mut asking = tokio::net::TcpStream::connect(at).await.unwrap();
        asking.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        asking.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("hello"), "{answer}");
        // The first one was let go to make room.
        assert_eq!(held[0].read(&mut [0]).await.unwrap_or(0), 0);
        serving.abort();
    }

    #[test]
    fn only_the_pod_itself_ends_its_proxy() {
        let status = |peer: &str, post| refusal(peer.parse().unwrap(), post).map(|page| page.status().as_u16());
        assert_eq!(status("127.0.0.1:9", true), None);
        assert_eq!(status("[::1]:9", true), None);
        assert_eq!(status("[::ffff:127.0.0.6]:9", true), None);
        assert_eq!(status("127.0.0.1:9", false), Some(405));
        for peer in ["10.77.0.10:9", "[fd77::a]:9", "[::ffff:10.77.0.10]:9"] {
            assert_eq!((status(peer, true), status(peer, false)), (Some(403), Some(403)), "{peer}");
        }
    }
}
