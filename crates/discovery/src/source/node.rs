//! Objects from the local node: `GET /watch` over its Unix socket, one JSON event a line.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::watch::{Event, EventKind, LINE_BYTES_MAX};
use api::{Change, ConfigSet};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::Instant;
use types::{Finding, ObjectRef};

use super::{Admitted, FindingsByObject, Publisher};

const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

pub(super) async fn run(socket: PathBuf, publisher: Publisher) {
    let mut mirror = Mirror::default();
    let mut pause = PAUSE_FIRST;
    loop {
        let started = Instant::now();
        tokio::select! {
            ended = watch(&socket, &mut mirror, &publisher) => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "the node's watch ended; the mesh stays as it was");
                }
            }
            () = publisher.closed() => return,
        }
        pause = if started.elapsed() > PAUSE_MAX { PAUSE_FIRST } else { (pause * 2).min(PAUSE_MAX) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = publisher.closed() => return,
        }
    }
}

type WatchError = Box<dyn std::error::Error + Send + Sync>;

async fn watch(socket: &Path, mirror: &mut Mirror, publisher: &Publisher) -> Result<(), WatchError> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = http::Request::get("/watch").header(http::header::HOST, "node").body(Empty::<Bytes>::new())?;
    let events = async {
        let response = sender.send_request(request).await?;
        if !response.status().is_success() {
            return Err(format!("the node answered {}", response.status()).into());
        }
        let mut body = response.into_body();
        let mut lines = Lines::default();
        mirror.restart();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            let mut changed = false;
            lines.push(&data, |line| {
                changed |= mirror.apply(Event::parse(line)?);
                Ok(())
            })?;
            if changed {
                publisher.send_replace(Some(Arc::new(mirror.admitted())));
            }
        }
        Ok::<(), WatchError>(())
    };
    tokio::select! {
        ended = events => ended,
        ended = connection => Ok(ended?),
    }
}

/// Cuts a stream into lines.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, data: &[u8], mut each: impl FnMut(&str) -> Result<(), WatchError>) -> Result<(), WatchError> {
        let mut data = data;
        while let Some(end) = data.iter().position(|byte| *byte == b'\n') {
            let (line, after) = data.split_at(end);
            data = &after[1..];
            self.rest.extend_from_slice(line);
            let line = std::mem::take(&mut self.rest);
            let text = std::str::from_utf8(&line)?.trim();
            if !text.is_empty() {
                each(text)?;
            }
        }
        self.rest.extend_from_slice(data);
        if self.rest.len() > LINE_BYTES_MAX { Err("a line of the watch is too long".into()) } else { Ok(()) }
    }
}

/// What the node told.
#[derive(Debug, Default)]
struct Mirror {
    configs: ConfigSet,
    findings: FindingsByObject,
    version: u64,
    /// Objects of this stream before it is synced; afterwards `None`.
    arriving: Option<BTreeSet<ObjectRef>>,
}

impl Mirror {
    fn restart(&mut self) {
        self.arriving = Some(BTreeSet::new());
    }

    /// Takes an event; true when there is something to publish.
    fn apply(&mut self, event: Event) -> bool {
        // A node may say with `SYNCED` how far it is: deletions leave no object to tell.
        let version = event.object.as_deref().map_or(0, resource_version);
        if event.kind == EventKind::Synced {
            self.version = self.version.max(version);
            // What the node has no more is gone, whatever this stream missed.
            if let Some(present) = self.arriving.take() {
                let gone: Vec<ObjectRef> = self
                    .configs
                    .iter()
                    .map(|object| object.reference())
                    .chain(self.findings.0.keys().cloned())
                    .filter(|reference| !present.contains(reference))
                    .collect();
                for reference in gone {
                    self.delete(reference);
                }
            }
            return true;
        }
        let Some(value) = event.object else { return false };
        // Every change counts one up; a deleted object comes in its last state, with its old count.
        let is_old = event.kind == EventKind::Deleted && version <= self.version;
        self.version = if is_old { self.version + 1 } else { self.version.max(version) };
        match event.kind {
            EventKind::Added | EventKind::Modified => {
                let (object, findings) = api::from_json(&value);
                let reference = object.as_ref().map(api::Object::reference).or_else(|| reference(&value));
                let Some(reference) = reference else { return false };
                if let Some(present) = &mut self.arriving {
                    present.insert(reference.clone());
                }
                self.findings.set(reference, findings);
                if let Some(object) = object {
                    self.configs.apply(&Change::Upsert(Arc::new(object)));
                }
            }
            EventKind::Deleted => {
                if let Some(reference) = reference(&value) {
                    if let Some(present) = &mut self.arriving {
                        present.remove(&reference);
                    }
                    self.delete(reference);
                }
            }
            EventKind::Synced => {}
        }
        self.arriving.is_none()
    }

    fn delete(&mut self, reference: ObjectRef) {
        self.configs.apply(&Change::Delete(reference.clone()));
        self.findings.set(reference, Vec::<Finding>::new());
    }

    fn admitted(&self) -> Admitted {
        Admitted { configs: self.configs.clone(), findings: self.findings.all(), version: self.version }
    }
}

fn resource_version(value: &Value) -> u64 {
    let text = value.pointer("/metadata/resourceVersion").and_then(Value::as_str);
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn reference(value: &Value) -> Option<ObjectRef> {
    let text = |path: &str| value.pointer(path).and_then(Value::as_str);
    Some(ObjectRef::new(text("/kind")?, text("/metadata/namespace").unwrap_or_default(), text("/metadata/name")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(kind: EventKind, name: &str, version: u32, port: u32) -> Event {
        let object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "shop", "resourceVersion": version.to_string()},
            "spec": {"ports": [{"name": "http", "port": port}]},
        });
        Event::new(kind, Arc::new(object))
    }

    fn names(mirror: &Mirror) -> Vec<String> {
        mirror.configs.iter().map(|object| object.meta.name.to_string()).collect()
    }

    #[test]
    fn a_new_stream_replaces_what_was_known() {
        let mut mirror = Mirror::default();
        mirror.restart();
        assert!(!mirror.apply(event(EventKind::Added, "a", 1, 80)));
        assert!(!mirror.apply(event(EventKind::Added, "b", 2, 80)));
        assert!(mirror.apply(Event::synced()));
        assert!(mirror.apply(event(EventKind::Modified, "b", 5, 81)));
        assert_eq!(mirror.version, 5);
        mirror.restart();
        assert!(!mirror.apply(event(EventKind::Added, "b", 5, 81)));
        assert_eq!(names(&mirror), ["a", "b"], "until the new stream is synced, the old state stays");
        assert!(mirror.apply(Event::synced()));
        assert_eq!(names(&mirror), ["b"]);
        assert!(mirror.apply(event(EventKind::Deleted, "b", 5, 81)));
        assert!(names(&mirror).is_empty());
        assert_eq!(mirror.version, 6, "a deletion is a change, although it comes with the old count");
    }

    #[test]
    fn lines_are_cut_wherever_they_break() {
        let mut lines = Lines::default();
        let mut got = Vec::new();
        for part in ["{\"a\"", ":1}\n{\"b\":", "2}\n\n", "{}"] {
            lines
                .push(part.as_bytes(), |line| {
                    got.push(line.to_owned());
                    Ok(())
                })
                .unwrap();
        }
        assert_eq!(got, ["{\"a\":1}", "{\"b\":2}"]);
    }
}
