//! The proxy's own services: readiness, metrics, merged metrics, and Envoy's admin interface.
//!
//! These listen apart from traffic, on the control thread, and answer while lowering works.

mod dump;
mod pages;

pub(crate) use pages::{expiry, scrape};

use std::convert::Infallible;
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

use crate::control::{Inspection, Listening, Request};
use crate::dns::NameTable;
use crate::options::{Addresses, LogLevels};
use crate::proxy::{RunError, Shared, State};
use crate::worker::DrainScope;

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
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Service {
    Admin,
    Readiness,
    Metrics,
    Merged,
}

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
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let context = context.clone();
        tokio::spawn(async move {
            let serve = service_fn(|request| {
                let context = context.clone();
                async move { Ok::<_, Infallible>(answer(service, &context, request).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(30))
                .serve_connection(TokioIo::new(stream), serve);
            if let Err(error) = connection.await {
                tracing::trace!(%error, "a connection to the proxy's own services ended");
            }
        });
    }
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

async fn answer(service: Service, context: &Context, request: HttpRequest<Incoming>) -> Page {
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
            "/quitquitquit" if post => ask(context, Request::Quit),
            "/drain" if post => ask(context, Request::Drain(DrainScope::Inbound, Listening::Stays)),
            "/quitquitquit" | "/drain" => text(StatusCode::METHOD_NOT_ALLOWED, ""),
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
    let posts = matches!(
        path,
        "/drain_listeners" | "/healthcheck/fail" | "/healthcheck/ok" | "/quitquitquit" | "/logging" | "/reset_counters"
    );
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
        "/stats" if parameter("format") != Some("prometheus") => {
            text(StatusCode::OK, pages::stats(context, parameter("filter")))
        }
        "/stats" | "/stats/prometheus" => page(StatusCode::OK, METRICS_TYPE, pages::metrics(context)),
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
        "/reset_counters" => text(StatusCode::OK, "OK\n"),
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
            match path {
                "/clusters" if as_json => json(pages::clusters_json(context, &inspection)),
                "/clusters" => text(StatusCode::OK, pages::clusters(context, &inspection)),
                "/listeners" if as_json => json(pages::listeners_json(&inspection)),
                "/listeners" => text(StatusCode::OK, pages::listeners(&inspection)),
                _ => match dump::config(context, &inspection, query.contains("include_eds"), parameter("resource")) {
                    Ok(dump) => json(dump),
                    Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error),
                },
            }
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
  /healthcheck/fail (POST), /healthcheck/ok (POST): readiness
  /lateen/state: requests and connections under way, by cluster
  /listeners: listening addresses (?format=json)
  /logging (POST): levels of the log (?level=LEVEL, ?paths=NAME:LEVEL,...)
  /memory: allocator statistics
  /quitquitquit (POST): end
  /ready: LIVE when ready
  /server_info: version and state
  /stats: counters (?format=prometheus, ?filter=TEXT)
  /stats/prometheus: the same as Prometheus text
";
