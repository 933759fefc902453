//! Access-log lines: the engine formats, the worker's batches carry them to their files.

use std::sync::Arc;

use engine::access_log::{AccessLog, LogRecord};
use engine::exchange::StreamInfo;
use engine::facts::ConnFacts;
use types::{Fields, RequestHead, ResponseHead};

use crate::record::{Counts, Ended, Telemetry};
use crate::upstream::Endpoints;
use crate::worker::Worker;

/// All that a line may say.
pub(crate) struct Line<'a> {
    pub(crate) facts: &'a ConnFacts,
    /// The filter chain's name; empty for none.
    pub(crate) chain: &'a str,
    pub(crate) head: Option<&'a RequestHead>,
    pub(crate) response: Option<&'a ResponseHead>,
    pub(crate) trailers: Option<&'a Fields>,
    pub(crate) info: &'a StreamInfo,
    pub(crate) counts: &'a Counts,
    pub(crate) ended: &'a Ended,
    pub(crate) upstream: &'a Endpoints,
    pub(crate) connection_id: u64,
    /// Why the client's TLS failed; empty for none.
    pub(crate) downstream_failure: &'a str,
}

/// Writes a line to each log.
pub(crate) fn write(telemetry: &Telemetry, logs: &[Arc<AccessLog>], line: &Line<'_>) {
    if logs.is_empty() {
        return;
    }
    let times = line.ended;
    let since = |at: Option<std::time::Instant>| at.map(|at| at.saturating_duration_since(times.start.mono));
    let record = LogRecord {
        conn: line.facts,
        chain: line.chain,
        request: line.head,
        response: line.response,
        trailers: line.trailers,
        info: line.info,
        start_nanos: times.start.wall_nanos,
        duration: times.end.mono.saturating_duration_since(times.start.mono),
        request_duration: since(times.sent),
        response_duration: since(times.head),
        bytes_received: line.counts.request_bytes,
        bytes_sent: line.counts.response_bytes,
        upstream_local: line.upstream.local,
        upstream_protocol: None,
        connection_id: line.connection_id,
        downstream_failure: line.downstream_failure,
    };
    for log in logs.iter().filter(|log| log.wants(&record)) {
        telemetry.log(&log.path, |out| log.write(&record, out));
    }
}

/// Writes the line of a connection that carried nothing; it may have reached a chain.
pub(crate) fn connection(
    telemetry: &Telemetry,
    worker: &Worker,
    logs: &[Arc<AccessLog>],
    (facts, chain): (&ConnFacts, &str),
    info: &StreamInfo,
) {
    let line = Line {
        facts,
        chain,
        head: None,
        response: None,
        trailers: None,
        info,
        counts: &Counts::default(),
        ended: &Ended::now(worker),
        upstream: &Endpoints::default(),
        connection_id: worker.next_connection_id(),
        downstream_failure: "",
    };
    write(telemetry, logs, &line);
}
