//! httpbin: shows a request to its sender.

use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::{Map, Value, json};

use crate::http_app::{self, Answer, Call, decode, html, json as json_answer, text};
use crate::{Options, SampleError};

/// Longest `/delay`.
const DELAY_MAX: f64 = 60.0;
/// Largest `/bytes`.
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// Serves on `--port`, 80 by default.
pub(crate) async fn serve(options: &Options) -> Result<(), SampleError> {
    http_app::serve(if options.port == 0 { 80 } else { options.port }, app).await
}

fn headers_of(call: &Call) -> Value {
    let mut out = Map::new();
    for name in call.headers().keys() {
        let values: Vec<Value> =
            call.headers().get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into()).collect();
        out.insert(name.to_string(), Value::Array(values));
    }
    Value::Object(out)
}

fn origin(call: &Call) -> String {
    call.headers()
        .get("x-forwarded-for")
        .map_or_else(String::new, |value| String::from_utf8_lossy(value.as_bytes()).into())
}

fn arguments(call: &Call) -> Value {
    let mut out = Map::new();
    for pair in call.uri().query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let list = out.entry(decode(name)).or_insert_with(|| json!([]));
        if let Value::Array(list) = list {
            list.push(decode(value).into());
        }
    }
    Value::Object(out)
}

fn whole(call: &Call) -> Value {
    let host = call.headers().get("host").and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    let data = String::from_utf8_lossy(call.body());
    json!({
        "method": call.method().as_str(),
        "url": format!("http://{host}{}", call.uri()),
        "args": arguments(call),
        "headers": headers_of(call),
        "origin": origin(call),
        "data": data,
        "json": serde_json::from_str::<Value>(&data).unwrap_or(Value::Null),
        "hostname": crate::plain::hostname(),
    })
}

/// Every page.
pub(crate) async fn app(call: Call) -> Answer {
    let path = call.uri().path().to_owned();
    let mut parts = path.trim_start_matches('/').splitn(2, '/');
    let (page, rest) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    match page {
        "" => html(
            "<!doctype html><title>httpbin</title><h1>httpbin</h1><p>Try /get, /headers, /status/418, /delay/1.</p>",
        ),
        "get" | "post" | "put" | "delete" | "patch" => {
            if call.method().as_str().eq_ignore_ascii_case(page)
                || (page == "get" && call.method() == http::Method::HEAD)
            {
                json_answer(StatusCode::OK, &whole(&call))
            } else {
                text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
            }
        }
        "anything" => json_answer(StatusCode::OK, &whole(&call)),
        "headers" => json_answer(StatusCode::OK, &json!({ "headers": headers_of(&call) })),
        "ip" => json_answer(StatusCode::OK, &json!({ "origin": origin(&call) })),
        "user-agent" => {
            let agent =
                call.headers().get("user-agent").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
            json_answer(StatusCode::OK, &json!({ "user-agent": agent }))
        }
        "hostname" => json_answer(StatusCode::OK, &json!({ "hostname": crate::plain::hostname() })),
        "status" => match rest.parse().ok().and_then(|code: u16| StatusCode::from_u16(code).ok()) {
            Some(code) if code.as_u16() >= 200 => text(code, ""),
            _ => text(StatusCode::BAD_REQUEST, "invalid status code\n"),
        },
        "delay" => match rest.trim_end_matches('s').parse::<f64>() {
            Ok(seconds) if (0.0..=DELAY_MAX).contains(&seconds) => {
                tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
                json_answer(StatusCode::OK, &whole(&call))
            }
            _ => text(StatusCode::BAD_REQUEST, "invalid delay\n"),
        },
        "bytes" => match rest.parse::<usize>() {
            Ok(count) if count <= BYTES_MAX => text(StatusCode::OK, vec![b'x'; count]),
            _ => text(StatusCode::BAD_REQUEST, "invalid size\n"),
        },
        "response-headers" => response_headers(&call),
        "json" => json_answer(StatusCode::OK, &json!({ "slideshow": { "title": "Sample Slide Show" } })),
        "html" => html("<!doctype html><title>httpbin</title><h1>Herman Melville - Moby-Dick</h1>"),
        _ => text(StatusCode::NOT_FOUND, "not found\n"),
    }
}

fn response_headers(call: &Call) -> Answer {
    let mut answer = json_answer(StatusCode::OK, &arguments(call));
    for pair in call.uri().query().unwrap_or_default().split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(decode(name)), HeaderValue::try_from(decode(value))) {
            answer.headers_mut().append(name, value);
        }
    }
    answer
}
