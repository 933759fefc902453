//! Access logs.

use std::sync::Arc;

use envoy_types::pb::envoy::config::accesslog::v3 as pb;

use crate::access_log::AccessLog;
use crate::unsupported::Unsupported;

pub(super) fn lower(list: &[pb::AccessLog]) -> Result<Vec<Arc<AccessLog>>, Unsupported> {
    if list.is_empty() { Ok(Vec::new()) } else { Err(Unsupported::not_built("")) }
}
