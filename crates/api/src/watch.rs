//! The watch protocol of the local mesh: one JSON event a line.
//!
//! The node answers `GET /watch` with the present objects as `ADDED`, then `SYNCED` with the version
//! of the whole, then changes as they come, each with a version of its own, deletions too. A client that reconnects takes the objects up to `SYNCED` as the whole truth.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EventKind {
    /// The object is new to this stream.
    Added,
    /// The object changed.
    Modified,
    /// The object is gone; `object` is its last state.
    Deleted,
    /// All present objects were sent.
    Synced,
}

/// One line of the stream.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// What happened.
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// The object as JSON; for `SYNCED` no more than the version of the list, if that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<Arc<Value>>,
}

/// The longest line a client needs to accept.
pub const LINE_BYTES_MAX: usize = 8 * 1024 * 1024;

impl Event {
    /// An event about `object`.
    pub fn new(kind: EventKind, object: Arc<Value>) -> Self {
        Self { kind, object: Some(object) }
    }

    /// All present objects were sent, by a sender without versions.
    pub fn synced() -> Self {
        Self { kind: EventKind::Synced, object: None }
    }

    /// All present objects were sent, as they were at `version`: the last change may have been a
    /// deletion, which leaves no object to tell.
    pub fn synced_at(version: u64) -> Self {
        let object = serde_json::json!({"metadata": {"resourceVersion": version.to_string()}});
        Self { kind: EventKind::Synced, object: Some(Arc::new(object)) }
    }

    /// The event as one line, with its newline.
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("an event has string keys only");
        line.push('\n');
        line
    }

    /// Parses one line.
    pub fn parse(line: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_round_trip() {
        let event = Event::new(EventKind::Added, Arc::new(serde_json::json!({"kind": "Pod"})));
        assert_eq!(event.to_line(), "{\"type\":\"ADDED\",\"object\":{\"kind\":\"Pod\"}}\n");
        assert_eq!(Event::parse(event.to_line().trim()).unwrap(), event);
        assert_eq!(Event::parse("{\"type\":\"SYNCED\"}").unwrap(), Event::synced());
    }
}
