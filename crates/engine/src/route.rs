//! Route tables, as the runtime holds them, and the choice of a route.

use crate::config::Name;

/// One route table.
#[derive(Debug)]
pub struct RouteTable {
    /// Its name.
    pub name: Name,
    /// Tells one version from another.
    pub fingerprint: u64,
}
