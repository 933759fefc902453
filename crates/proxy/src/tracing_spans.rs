//! Spans of requests.

use std::rc::Rc;
use std::sync::Arc;

use engine::chain::FilterChain;
use engine::exchange::StreamInfo;
use engine::hcm::Hcm;
use types::RequestHead;

use crate::accept::Conn;
use crate::record::{Counts, Ended};
use crate::upstream::Endpoints;
use crate::worker::Worker;

/// Finished spans on their way to their collectors.
#[derive(Default)]
pub(crate) struct Spans {}

/// A request's span while it runs.
#[derive(Default)]
pub(crate) struct RequestTrace {}

impl RequestTrace {
    pub(crate) fn start(_: &Rc<Worker>, _: &Conn, _: &Arc<FilterChain>, _: &mut RequestHead, _: u64) -> Self {
        Self {}
    }

    pub(crate) fn attempt(&mut self, _: &mut RequestHead, _: u32, _: &Worker) {}

    #[expect(clippy::too_many_arguments, reason = "all that is known of a request, once")]
    pub(crate) fn finish(
        self,
        _: &Rc<Worker>,
        _: &Conn,
        _: &Hcm,
        _: &RequestHead,
        _: u16,
        _: &StreamInfo,
        _: &Ended,
        _: &Endpoints,
        _: &Counts,
    ) {
    }
}
