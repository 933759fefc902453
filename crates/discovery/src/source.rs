//! Where objects come from: files, or the local node.
//!
//! A source publishes everything it admits as one [`api::ConfigSet`]; who reads it compares with
//! what it had. While a source is away, what it published last stays.

pub mod files;
pub mod node;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use api::ConfigSet;
use tokio::sync::watch;
use types::{Finding, ObjectRef};

/// Which source.
#[derive(Clone, Debug)]
pub enum Source {
    /// Files and folders of YAML, watched.
    Files(Vec<PathBuf>),
    /// The local node's watch, over its Unix socket.
    Node(PathBuf),
}

/// What a source has admitted.
#[derive(Clone, Debug, Default)]
pub struct Admitted {
    /// The objects.
    pub configs: ConfigSet,
    /// What is wrong with single objects, refused ones included.
    pub findings: Vec<Finding>,
    /// The newest change included: the store's `resourceVersion`, or a count of readings.
    pub version: u64,
}

/// The sending end; `None` until everything was read once.
pub type Publisher = watch::Sender<Option<Arc<Admitted>>>;

/// Runs a source until nobody listens. *Cancel safety*: may be dropped.
pub async fn run(source: Source, publisher: Publisher) {
    match source {
        Source::Files(paths) => files::run(paths, publisher).await,
        Source::Node(socket) => node::run(socket, publisher).await,
    }
}

/// Findings by object, in the order of objects.
#[derive(Clone, Debug, Default)]
struct FindingsByObject(BTreeMap<ObjectRef, Vec<Finding>>);

impl FindingsByObject {
    fn set(&mut self, object: ObjectRef, findings: Vec<Finding>) {
        if findings.is_empty() {
            self.0.remove(&object);
        } else {
            self.0.insert(object, findings);
        }
    }

    fn all(&self) -> Vec<Finding> {
        self.0.values().flatten().cloned().collect()
    }
}
