//! What the HTTP samples share: a small server, a small client, forwarding of trace headers.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use crate::SampleError;

/// Largest body a sample reads.
const BODY_MAX: usize = 1024 * 1024;

/// Time a stopping sample gives what is in flight.
pub(crate) const DRAIN: Duration = Duration::from_secs(20);

/// An answer.
pub(crate) type Answer = Response<Full<Bytes>>;

/// A request with its body read.
pub(crate) type Call = Request<Bytes>;

/// Opens `port` on all addresses, IPv6 too where the machine has it.
pub(crate) async fn listen(port: u16) -> Result<TcpListener, SampleError> {
    if let Ok(listener) = TcpListener::bind(("::", port)).await {
        return Ok(listener);
    }
    TcpListener::bind(("0.0.0.0", port)).await.map_err(|source| SampleError::Listen { port, source })
}

/// What a sample does instead of, or before, answering.
///
/// A program in the sample's own pod sets it: `PUT http://127.0.0.1:PORT/-/fault?status=503&delay-ms=200`
/// (both optional), and `DELETE` of the same path takes it back. Others get the sample's own answer
/// for that path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fault {
    status: Option<StatusCode>,
    delay: Duration,
}

/// Where the switch is.
const FAULT_PATH: &str = "/-/fault";

/// Longest delay of a fault.
const FAULT_DELAY_MAX: Duration = Duration::from_mins(1);

impl Fault {
    /// The fault a call asks for; `None` when it is no such call.
    fn asked(call: &Call, peer: IpAddr) -> Option<Self> {
        // A proxy beside the sample connects from 127.0.0.6.
        let is_own_pod =
            matches!(peer.to_canonical(), IpAddr::V4(Ipv4Addr::LOCALHOST) | IpAddr::V6(Ipv6Addr::LOCALHOST));
        if !is_own_pod || call.uri().path() != FAULT_PATH {
            return None;
        }
        let query = call.uri().query().unwrap_or_default();
        let number = |name: &str| query_value(query, name).and_then(|value| value.parse::<u16>().ok());
        match *call.method() {
            http::Method::PUT => Some(Self {
                status: number("status").and_then(|code| StatusCode::from_u16(code).ok()),
                delay: Duration::from_millis(number("delay-ms").unwrap_or(0).into()).min(FAULT_DELAY_MAX),
            }),
            http::Method::DELETE => Some(Self::default()),
            _ => None,
        }
    }
}

/// Serves `app` on `port` until the process is told to stop, then finishes what is in flight.
pub(crate) async fn serve<F, A>(port: u16, app: F) -> Result<(), SampleError>
where
    F: Fn(Call) -> A + 'static,
    A: Future<Output = Answer> + 'static,
{
    let listener = listen(port).await?;
    let app = Rc::new(app);
    tokio::task::LocalSet::new().run_until(accept(listener, app)).await;
    Ok(())
}

async fn accept<F, A>(listener: TcpListener, app: Rc<F>)
where
    F: Fn(Call) -> A + 'static,
    A: Future<Output = Answer> + 'static,
{
    let (stop, stopping) = watch::channel(false);
    let (alive, mut ended) = mpsc::channel::<Infallible>(1);
    let fault: Rc<Cell<Fault>> = Rc::default();
    let told = crate::plain::until_told_to_stop();
    tokio::pin!(told);
    loop {
        let (stream, peer) = tokio::select! {
            () = &mut told => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                // Out of descriptors: let others finish first.
                Err(_) => { tokio::time::sleep(crate::ACCEPT_AGAIN).await; continue }
            },
        };
        let (app, stopping, alive) = (Rc::clone(&app), stopping.clone(), alive.clone());
        let fault = Rc::clone(&fault);
        tokio::task::spawn_local(async move {
            let app = |call: Call| switched(&*app, &fault, peer.ip(), call);
            connection(stream, app, stopping).await;
            drop(alive);
        });
    }
    drop((listener, alive));
    _ = stop.send(true);
    _ = tokio::time::timeout(DRAIN, ended.recv()).await;
}

async fn switched<F, A>(app: &F, fault: &Cell<Fault>, peer: IpAddr, call: Call) -> Answer
where
    F: Fn(Call) -> A,
    A: Future<Output = Answer>,
{
    if let Some(asked) = Fault::asked(&call, peer) {
        fault.set(asked);
        return text(StatusCode::OK, "");
    }
    let Fault { status, delay } = fault.get();
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    match status {
        Some(status) => text(status, "told to fail\n"),
        None => app(call).await,
    }
}

/// Serves one HTTP/1 connection.
pub(crate) async fn connection<F, A>(stream: TcpStream, app: F, mut stopping: watch::Receiver<bool>)
where
    F: Fn(Call) -> A,
    A: Future<Output = Answer>,
{
    _ = stream.set_nodelay(true);
    let app = &app;
    let service =
        service_fn(move |request: Request<Incoming>| async move { Ok::<_, Infallible>(answer(app, request).await) });
    let connection =
        hyper::server::conn::http1::Builder::new().half_close(true).serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopping.wait_for(|stop| *stop) => connection.as_mut().graceful_shutdown(),
    }
    _ = connection.await;
}

async fn answer<F, A>(app: &F, request: Request<Incoming>) -> Answer
where
    F: Fn(Call) -> A,
    A: Future<Output = Answer>,
{
    let (head, body) = request.into_parts();
    match Limited::new(body, BODY_MAX).collect().await {
        Ok(body) => app(Request::from_parts(head, body.to_bytes())).await,
        Err(_) => text(StatusCode::PAYLOAD_TOO_LARGE, "body too large or broken\n"),
    }
}

/// A plain-text answer.
pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    typed(status, "text/plain; charset=utf-8", body)
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, body: &serde_json::Value) -> Answer {
    typed(status, "application/json", body.to_string())
}

/// An HTML answer.
pub(crate) fn html(body: impl Into<Bytes>) -> Answer {
    typed(StatusCode::OK, "text/html; charset=utf-8", body)
}

/// An answer of any type.
pub(crate) fn typed(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    answer
}

/// Escapes text for HTML.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

/// The headers an application must copy to what it calls, so that traces and identities carry on.
///
/// *Source*: Istio, distributed tracing, trace context propagation; bookinfo's own list.
pub(crate) fn forwarded(headers: &HeaderMap) -> HeaderMap {
    const NAMES: [&str; 16] = [
        "x-request-id",
        "x-ot-span-context",
        "x-datadog-trace-id",
        "x-datadog-parent-id",
        "x-datadog-sampling-priority",
        "traceparent",
        "tracestate",
        "baggage",
        "x-cloud-trace-context",
        "grpc-trace-bin",
        "x-b3-traceid",
        "x-b3-spanid",
        "x-b3-parentspanid",
        "x-b3-sampled",
        "x-b3-flags",
        "b3",
    ];
    let mut out = HeaderMap::new();
    for name in NAMES.iter().chain(&["sw8", "end-user", "user-agent", "cookie", "authorization", "jwt"]) {
        for value in headers.get_all(*name) {
            out.append(*name, value.clone());
        }
    }
    out
}

/// What came back from a call to another service.
pub(crate) struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Body.
    pub body: Bytes,
}

/// Why a call to another service gave nothing.
#[derive(Debug)]
pub(crate) enum CallFailed {
    /// The time-out passed.
    TimedOut,
    /// The connection or the exchange failed.
    Broken,
}

/// `GET http://host:port/path` on a connection of its own, within `within`.
pub(crate) async fn get(
    host: &str,
    port: u16,
    path: &str,
    headers: HeaderMap,
    within: Duration,
) -> Result<Reply, CallFailed> {
    tokio::time::timeout(within, exchange(host, port, path, headers)).await.unwrap_or(Err(CallFailed::TimedOut))
}

async fn exchange(host: &str, port: u16, path: &str, headers: HeaderMap) -> Result<Reply, CallFailed> {
    let broken = |_| CallFailed::Broken;
    let stream = TcpStream::connect((host, port)).await.map_err(|_| CallFailed::Broken)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let driver = tokio::task::spawn_local(connection);
    let mut request = Request::get(path).body(Full::new(Bytes::new())).map_err(|_| CallFailed::Broken)?;
    *request.headers_mut() = headers;
    let authority = http::HeaderValue::from_str(&format!("{host}:{port}")).map_err(|_| CallFailed::Broken)?;
    request.headers_mut().insert(http::header::HOST, authority);
    let response = sender.send_request(request).await.map_err(broken)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), BODY_MAX).collect().await.map_err(|_| CallFailed::Broken)?.to_bytes();
    driver.abort();
    Ok(Reply { status, body })
}

/// An environment variable, or `default` when unset or empty.
pub(crate) fn setting(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|value| !value.is_empty()).unwrap_or_else(|| default.to_owned())
}

/// Value of `name` in a query or form, percent-decoded.
pub(crate) fn query_value(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then(|| decode(value))
    })
}

/// Decodes `%41` and `+`.
pub(crate) fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            out.push(byte);
            at += 3;
        } else {
            out.push(if bytes[at] == b'+' { b' ' } else { bytes[at] });
            at += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_set_from_inside_the_pod_only() {
        let call = |method: &str, uri: &str| Request::builder().method(method).uri(uri).body(Bytes::new()).unwrap();
        let put = call("PUT", "/-/fault?status=503&delay-ms=20");
        let fault = Fault { status: Some(StatusCode::SERVICE_UNAVAILABLE), delay: Duration::from_millis(20) };
        assert_eq!(Fault::asked(&put, "127.0.0.1".parse().unwrap()), Some(fault));
        assert_eq!(Fault::asked(&put, "::ffff:127.0.0.1".parse().unwrap()), Some(fault));
        assert_eq!(Fault::asked(&put, "127.0.0.6".parse().unwrap()), None);
        assert_eq!(Fault::asked(&put, "10.0.0.1".parse().unwrap()), None);
        let own = "::1".parse().unwrap();
        assert_eq!(Fault::asked(&call("DELETE", "/-/fault"), own), Some(Fault::default()));
        assert_eq!(Fault::asked(&call("GET", "/-/fault"), own), None);
        assert_eq!(Fault::asked(&call("PUT", "/other"), own), None);
    }

    #[test]
    fn forms_are_decoded() {
        assert_eq!(query_value("a=1&username=j%61son+x", "username").as_deref(), Some("jason x"));
        assert_eq!(decode("%zz%4"), "%zz%4");
        assert_eq!(escape("<a href='x'>&"), "&lt;a href=&#39;x&#39;&gt;&amp;");
    }

    #[test]
    fn trace_headers_are_copied_and_others_not() {
        let mut headers = HeaderMap::new();
        headers.insert("x-b3-traceid", "1".parse().unwrap());
        headers.insert("end-user", "jason".parse().unwrap());
        headers.insert("accept", "x".parse().unwrap());
        let out = forwarded(&headers);
        assert!(out.contains_key("x-b3-traceid") && out.contains_key("end-user") && !out.contains_key("accept"));
    }
}
