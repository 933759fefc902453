//! What one worker keeps between requests: built balancers, caches. Never shared between threads.

use std::sync::Arc;

use crate::shared::SharedTable;

/// A worker's own state.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<SharedTable>,
}

impl Worker {
    /// The state of a new worker over the proxy's shared counters.
    pub fn new(shared: Arc<SharedTable>) -> Self {
        Self { shared }
    }

    /// The proxy's shared counters.
    pub fn shared(&self) -> &Arc<SharedTable> {
        &self.shared
    }
}
