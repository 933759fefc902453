//! CORS. (First form: refused, until its owner replaces it.)

use envoy_types::pb::envoy::extensions::filters::http::cors::v3 as pb;
use types::{Fields, RequestHead};

use crate::unsupported::Unsupported;

/// Settings.
#[derive(Debug)]
pub struct CorsPolicy;

/// What the response to an allowed origin carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed;

impl Allowed {
    /// Adds the headers.
    pub fn apply(&self, _: &mut Fields) {}
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on; headers for the response if the origin is allowed.
    Pass(Option<Allowed>),
    /// Answer 200 with these headers.
    Preflight(Vec<(&'static str, Vec<u8>)>),
}

impl CorsPolicy {
    /// Lowers settings.
    pub fn lower(_: &pb::CorsPolicy) -> Result<Self, Unsupported> {
        Err(Unsupported::not_built(""))
    }

    /// Decides for a request.
    pub fn request(&self, _: &RequestHead) -> Verdict {
        Verdict::Pass(None)
    }
}
