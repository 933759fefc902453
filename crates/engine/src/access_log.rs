//! Access logs: formats compiled once, lines made from what is known at the end.
//!
//! *Source*: Envoy, "Access logging": command operators, the dictionary form, filters; `-` (text)
//! or `null` (JSON) stands for what is not known.

use std::net::SocketAddr;
use std::time::Duration;

use types::{Fields, RequestHead, ResponseHead, Version};

use crate::exchange::StreamInfo;
use crate::facts::ConnFacts;

mod filter;
mod template;

pub use filter::{Comparison, LogFilter};
pub use template::Template;

/// Istio's default line.
pub const DEFAULT_TEXT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
    %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
    %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
    \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// Where log lines go, which, and what they say.
#[derive(Debug)]
pub struct AccessLog {
    /// File, `/dev/stdout` or `/dev/stderr`.
    pub path: Box<str>,
    /// What a line says.
    pub format: Format,
    /// Which requests and connections get one; `None`: all.
    pub filter: Option<LogFilter>,
}

/// What a line says.
#[derive(Debug)]
pub enum Format {
    /// Text with operators; its line end is part of it.
    Text(Template),
    /// A JSON object.
    Json(JsonFormat),
}

/// A JSON line.
#[derive(Debug)]
pub struct JsonFormat {
    /// Members, sorted by name.
    pub members: Vec<(Box<str>, JsonValue)>,
    /// Unknown values are left out.
    pub omit_empty: bool,
}

/// A value of a JSON line.
#[derive(Debug)]
pub enum JsonValue {
    /// Text with operators; a lone number operator gives a number.
    Template(Template),
    /// An object inside.
    Object(Vec<(Box<str>, JsonValue)>),
    /// As it stands.
    Fixed(serde_json::Value),
}

/// Everything a line may say about a request or connection.
#[derive(Clone, Copy, Debug)]
pub struct LogRecord<'a> {
    /// The connection.
    pub conn: &'a ConnFacts,
    /// Name of its filter chain; empty for none.
    pub chain: &'a str,
    /// The request, as it was sent upstream; `None` for streams of bytes.
    pub request: Option<&'a RequestHead>,
    /// The response, as it was sent downstream.
    pub response: Option<&'a ResponseHead>,
    /// Its trailers.
    pub trailers: Option<&'a Fields>,
    /// What the engine knows.
    pub info: &'a StreamInfo,
    /// Start, nanoseconds since the Unix epoch.
    pub start_nanos: u64,
    /// From start to end.
    pub duration: Duration,
    /// From start to the end of the request.
    pub request_duration: Option<Duration>,
    /// From start to the first byte of the upstream's response.
    pub response_duration: Option<Duration>,
    /// Body bytes from downstream.
    pub bytes_received: u64,
    /// Body bytes to downstream.
    pub bytes_sent: u64,
    /// Our end of the upstream connection.
    pub upstream_local: Option<SocketAddr>,
    /// HTTP version upstream.
    pub upstream_protocol: Option<Version>,
    /// Number of the connection in this process.
    pub connection_id: u64,
    /// `%DOWNSTREAM_TRANSPORT_FAILURE_REASON%`, of a connection whose handshake failed; empty for none.
    pub downstream_failure: &'a str,
}

impl AccessLog {
    /// Whether this request or connection gets a line.
    pub fn wants(&self, record: &LogRecord<'_>) -> bool {
        self.filter.as_ref().is_none_or(|filter| filter.holds(record))
    }

    /// Appends the line, with its end.
    pub fn write(&self, record: &LogRecord<'_>, out: &mut Vec<u8>) {
        match &self.format {
            Format::Text(template) => template.text(record, out),
            Format::Json(format) => {
                let object = format.object(&format.members, record);
                // Writing JSON to memory cannot fail.
                if serde_json::to_writer(&mut *out, &object).is_ok() {
                    out.push(b'\n');
                }
            }
        }
    }
}

impl JsonFormat {
    fn object(&self, members: &[(Box<str>, JsonValue)], record: &LogRecord<'_>) -> serde_json::Value {
        let mut map = serde_json::Map::new();
        for (name, value) in members {
            let value = match value {
                JsonValue::Template(template) => template.json(record),
                JsonValue::Object(members) => self.object(members, record),
                JsonValue::Fixed(value) => value.clone(),
            };
            if !(self.omit_empty && value.is_null()) {
                map.insert(name.to_string(), value);
            }
        }
        serde_json::Value::Object(map)
    }
}

/// The response flags of a request, comma-separated; `None` for none.
pub fn flags(info: &StreamInfo) -> Option<String> {
    let mut text = String::new();
    for flag in info.causes.iter().map(|cause| cause.surface().flag).filter(|flag| *flag != "-") {
        if !text.split(',').any(|seen| seen == flag) {
            if !text.is_empty() {
                text.push(',');
            }
            text.push_str(flag);
        }
    }
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests;
