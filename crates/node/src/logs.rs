//! The last output of every container, in memory, for `lateen logs`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;

/// Bytes kept of one container, across restarts.
const KEPT_MAX: usize = 256 * 1024;
/// Containers whose output is kept.
const CONTAINERS_MAX: usize = 2000;

struct Ring {
    bytes: VecDeque<u8>,
    follow: broadcast::Sender<Vec<u8>>,
}

/// Output by `namespace/pod/container`.
#[derive(Default)]
pub struct Logs {
    rings: Mutex<BTreeMap<String, Ring>>,
}

impl Logs {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Ring>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key of a container.
    pub fn key(namespace: &str, pod: &str, container: &str) -> String {
        format!("{namespace}/{pod}/{container}")
    }

    /// Makes a container known that has written nothing yet, so that it can be followed.
    pub fn open(&self, key: &str) {
        Self::ring(&mut self.lock(), key);
    }

    fn ring<'a>(rings: &'a mut BTreeMap<String, Ring>, key: &str) -> &'a mut Ring {
        if !rings.contains_key(key) && rings.len() >= CONTAINERS_MAX {
            rings.pop_first();
        }
        rings.entry(key.to_owned()).or_insert_with(|| Ring { bytes: VecDeque::new(), follow: broadcast::channel(64).0 })
    }

    /// Keeps what a container wrote; the oldest bytes go.
    pub fn append(&self, key: &str, bytes: &[u8]) {
        let mut rings = self.lock();
        let ring = Self::ring(&mut rings, key);
        ring.bytes.extend(bytes);
        let over = ring.bytes.len().saturating_sub(KEPT_MAX);
        ring.bytes.drain(..over);
        _ = ring.follow.send(bytes.to_vec());
    }

    /// The last `lines` lines (all that is kept when `None`), and what follows. `None` when the
    /// container never wrote anything.
    pub fn read(&self, key: &str, lines: Option<usize>) -> Option<(Vec<u8>, broadcast::Receiver<Vec<u8>>)> {
        let rings = self.lock();
        let ring = rings.get(key)?;
        let bytes: Vec<u8> = ring.bytes.iter().copied().collect();
        let from = lines.map_or(0, |lines| {
            let body = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
            let mut ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
            if lines == 0 { bytes.len() } else { ends.nth(lines - 1).map_or(0, |(at, _)| at + 1) }
        });
        Some((bytes[from..].to_vec(), ring.follow.subscribe()))
    }

    /// Forgets a pod's containers.
    pub fn forget(&self, namespace: &str, pod: &str) {
        let prefix = Self::key(namespace, pod, "");
        self.lock().retain(|key, _| !key.starts_with(&prefix));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails() {
        let logs = Logs::new();
        logs.append("a/b/c", b"1\n2\n3\n");
        let tail = |lines| String::from_utf8(logs.read("a/b/c", lines).unwrap().0).unwrap();
        assert_eq!(
            (tail(None), tail(Some(2)), tail(Some(9)), tail(Some(0))),
            ("1\n2\n3\n".into(), "2\n3\n".into(), "1\n2\n3\n".into(), String::new())
        );
        logs.append("a/b/c", &vec![b'x'; KEPT_MAX]);
        assert_eq!(tail(None).len(), KEPT_MAX);
        logs.open("a/b/d");
        assert_eq!(logs.read("a/b/d", None).unwrap().0, b"", "known, and silent");
        logs.forget("a", "b");
        assert!(logs.read("a/b/c", None).is_none());
    }
}
