//! Lowering on its own thread, so that nothing else waits for it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc as blocking;

use engine::assembly::Tables;
use engine::config::Name;
use engine::lower::{self, Raw, Rejected};
use envoy_types::pb::google::protobuf::Any;
use tokio::sync::oneshot;
use types::wellknown::type_urls;

/// The next tables, and what was refused.
pub(crate) struct Lowered {
    pub(crate) tables: Tables,
    pub(crate) rejected: Vec<Rejected>,
}

struct Job {
    url: &'static str,
    tables: Tables,
    raws: Vec<Raw>,
    removed: Vec<Name>,
    done: oneshot::Sender<Lowered>,
}

/// The thread.
pub(crate) struct Lowering {
    jobs: blocking::Sender<Job>,
}

impl Lowering {
    pub(crate) fn start() -> io::Result<Self> {
        let (jobs, inbox) = blocking::channel::<Job>();
        std::thread::Builder::new().name("lowering".into()).spawn(move || {
            while let Ok(job) = inbox.recv() {
                let lowered = lower_one(job.url, job.tables, &job.raws, &job.removed);
                // the control side has ended: nobody wants it
                drop(job.done.send(lowered));
            }
        })?;
        Ok(Self { jobs })
    }

    /// Lowers resources of one type over `tables`.
    pub(crate) async fn lower(&self, url: &'static str, tables: Tables, raws: Vec<Raw>, removed: Vec<Name>) -> Lowered {
        let (done, waiting) = oneshot::channel();
        let names: Vec<Name> = raws.iter().map(|raw| Name::clone(&raw.name)).collect();
        let unchanged = tables.clone();
        let sent = self.jobs.send(Job { url, tables, raws, removed, done }).is_ok();
        match waiting.await {
            Ok(lowered) if sent => lowered,
            _ => Lowered {
                tables: unchanged,
                rejected: names
                    .into_iter()
                    .map(|name| Rejected { name, reason: "the lowering thread has ended".into() })
                    .collect(),
            },
        }
    }
}

/// Lowers on the thread that asks.
pub(super) fn lower_one(url: &str, mut tables: Tables, raws: &[Raw], removed: &[Name]) -> Lowered {
    // a panic in lowering refuses the update, and nothing else
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match url {
        type_urls::LISTENER => {
            let (table, rejected) = lower::apply_listeners(&tables.listeners, raws, removed);
            (Tables { listeners: Arc::new(table), ..tables.clone() }, rejected)
        }
        type_urls::CLUSTER => {
            let (table, rejected) = lower::apply_clusters(&tables.clusters, raws, removed);
            (Tables { clusters: Arc::new(table), ..tables.clone() }, rejected)
        }
        type_urls::ROUTE => {
            let (table, rejected) = lower::apply_routes(&tables.routes, raws, removed);
            (Tables { routes: Arc::new(table), ..tables.clone() }, rejected)
        }
        type_urls::ENDPOINT => {
            let (table, rejected) = lower::apply_endpoints(&tables.endpoints, raws, removed);
            (Tables { endpoints: Arc::new(table), ..tables.clone() }, rejected)
        }
        _ => (tables.clone(), Vec::new()),
    }));
    let rejected = match result {
        Ok((next, rejected)) => {
            tables = next;
            rejected
        }
        Err(_) => raws
            .iter()
            .map(|raw| Rejected { name: Name::clone(&raw.name), reason: "lowering it failed inside".into() })
            .collect(),
    };
    Lowered { tables, rejected }
}

/// Resources as received, for `/config_dump`. Keys are never kept.
#[derive(Clone, Debug, Default)]
pub(crate) struct RawTables {
    by_type: BTreeMap<&'static str, BTreeMap<Name, Kept>>,
    /// Versions that serve until the newest one is warm.
    replaced: BTreeMap<(&'static str, Name), Kept>,
}

/// One resource as received.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) body: Arc<Any>,
    pub(crate) updated_nanos: u64,
    /// Why its newest version was refused.
    pub(crate) error: Option<String>,
    /// It is part of the bootstrap.
    pub(crate) is_static: bool,
}

impl RawTables {
    /// Takes note of an update; secrets are not kept.
    pub(crate) fn note(
        &mut self,
        url: &'static str,
        raws: Vec<Raw>,
        removed: &[Name],
        rejected: &[xds::client::Rejected],
    ) {
        if url == type_urls::SECRET {
            return;
        }
        let table = self.by_type.entry(url).or_default();
        for name in removed {
            table.remove(name);
            self.replaced.remove(&(url, Name::clone(name)));
        }
        let now = workers::worker::wall_nanos();
        for raw in raws {
            let bad = rejected.iter().find(|bad| *bad.name == *raw.name);
            match bad {
                Some(bad) => {
                    if let Some(kept) = table.get_mut(&raw.name) {
                        kept.error = Some(bad.reason.clone());
                    }
                }
                None => {
                    let name = Name::clone(&raw.name);
                    let body = Arc::new(raw.body);
                    let kept = Kept { body, updated_nanos: now, error: None, is_static: false };
                    let before = table.insert(raw.name, kept);
                    if let Some(before) = before {
                        self.replaced.entry((url, name)).or_insert(before);
                    }
                }
            }
        }
    }

    /// Forgets these.
    pub(crate) fn forget(&mut self, url: &'static str, names: &[Name]) {
        if let Some(table) = self.by_type.get_mut(url) {
            for name in names {
                table.remove(name);
            }
        }
    }

    /// Takes note that these came with the bootstrap.
    pub(crate) fn mark_static(&mut self, url: &'static str, names: &[Name]) {
        let table = self.by_type.entry(url).or_default();
        for name in names {
            if let Some(kept) = table.get_mut(name) {
                kept.is_static = true;
            }
        }
    }

    /// Forgets the versions that do not serve any more.
    pub(crate) fn published(&mut self, is_warming: impl Fn(&str, &str) -> bool) {
        self.replaced.retain(|(url, name), _| is_warming(url, name));
    }

    /// The version that serves while the newest one is warming.
    pub(crate) fn replaced(&self, url: &'static str, name: &Name) -> Option<&Kept> {
        self.replaced.get(&(url, Name::clone(name)))
    }

    /// Resources of one type, by name.
    pub(crate) fn of(&self, url: &str) -> impl Iterator<Item = (&Name, &Kept)> {
        self.by_type.get(url).into_iter().flatten()
    }
}
