//! Faults. (First form: only empty settings, until its owner replaces it.)

use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::http::fault::v3::HttpFault;
use types::{GrpcCode, RequestHead};

use crate::draw::Draw;
use crate::unsupported::Unsupported;

/// Settings.
#[derive(Debug, Default)]
pub struct Fault;

/// How to abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// With this status.
    Http(u16),
    /// With this gRPC code.
    Grpc(GrpcCode),
}

/// What is to be done to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// First wait so long.
    pub delay: Option<Duration>,
    /// Then abort.
    pub abort: Option<Abort>,
}

impl Fault {
    /// Lowers settings.
    pub fn lower(proto: &HttpFault) -> Result<Self, Unsupported> {
        if *proto == HttpFault::default() { Ok(Self) } else { Err(Unsupported::not_built("")) }
    }

    /// Decides for a request.
    pub fn decide(&self, _: &RequestHead, _: Draw) -> Plan {
        Plan::default()
    }
}
