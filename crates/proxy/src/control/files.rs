//! Files of resources: read at the start, and again whenever one is replaced.
//!
//! A file that cannot be read or does not fit keeps what it gave before; the reason is logged.

use std::collections::BTreeMap;
use std::path::PathBuf;

use engine::config::Name;
use engine::lower::Raw;
use types::wellknown::type_urls;

use crate::bootstrap::read_file;
use crate::file_secrets::{Stamp, stamp};

/// What changed, by type, in an order in which nothing refers to what is not there yet.
pub(crate) type Changes = Vec<(&'static str, Vec<Raw>, Vec<Name>)>;

/// The files that are watched.
#[derive(Default)]
pub(crate) struct Files {
    known: BTreeMap<PathBuf, Known>,
}

#[derive(Default)]
struct Known {
    stamp: Option<Stamp>,
    gave: BTreeMap<(&'static str, Name), Raw>,
}

const ORDER: [&str; 5] =
    [type_urls::SECRET, type_urls::CLUSTER, type_urls::ENDPOINT, type_urls::ROUTE, type_urls::LISTENER];

impl Files {
    pub(crate) fn new(paths: Vec<PathBuf>) -> Self {
        Self { known: paths.into_iter().map(|path| (path, Known::default())).collect() }
    }

    /// Whether there is any.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Looks at every file; says what changed since the last look.
    pub(crate) fn look(&mut self) -> Changes {
        let mut changed: BTreeMap<&'static str, (Vec<Raw>, Vec<Name>)> = BTreeMap::new();
        let mut todo: Vec<PathBuf> = self.known.keys().cloned().collect();
        while let Some(path) = todo.pop() {
            let known = self.known.entry(path.clone()).or_default();
            let now = stamp(&path);
            if now.is_none() || now == known.stamp {
                continue;
            }
            known.stamp = now;
            let text = std::fs::read_to_string(&path).map_err(|error| error.to_string());
            let (resources, more) = match text.and_then(|text| read_file(&text).map_err(|error| error.to_string())) {
                Ok(read) => read,
                Err(reason) => {
                    tracing::warn!(path = %path.display(), reason, "a file of resources is refused; what it gave before stays");
                    continue;
                }
            };
            let mut gone = std::mem::take(&mut known.gave);
            for (url, raw) in resources {
                let key = (url, Name::clone(&raw.name));
                if gone.remove(&key).as_ref() != Some(&raw) {
                    changed.entry(url).or_default().0.push(raw.clone());
                }
                known.gave.insert(key, raw);
            }
            for (url, name) in gone.into_keys() {
                changed.entry(url).or_default().1.push(name);
            }
            todo.extend(more.into_iter().filter(|path| !self.known.contains_key(path)));
        }
        ORDER.into_iter().filter_map(|url| changed.remove(url).map(|(raws, removed)| (url, raws, removed))).collect()
    }
}
