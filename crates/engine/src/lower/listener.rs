//! Listeners and filter chains.

use envoy_types::pb::google::protobuf::Any;

use crate::chain::Listener;
use crate::config::Name;
use crate::unsupported::Unsupported;

pub(super) fn lower(_: &Any) -> Result<(Name, Listener), Unsupported> {
    Err(Unsupported::not_built("listener"))
}
