//! Route tables.

use envoy_types::pb::google::protobuf::Any;

use crate::config::Name;
use crate::route::RouteTable;
use crate::unsupported::Unsupported;

pub(super) fn lower_any(_: &Any) -> Result<(Name, RouteTable), Unsupported> {
    Err(Unsupported::not_built("route table"))
}
