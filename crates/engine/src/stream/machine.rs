//! The state machine.

use types::Cause;

use super::{StreamAnswer, StreamStart, StreamStep};
use crate::chain::FilterChain;
use crate::exchange::{Env, StreamInfo};
use crate::facts::ConnFacts;
use crate::record::Recorder;

/// One connection of bytes.
#[derive(Debug)]
pub struct Stream {
    info: StreamInfo,
}

impl Stream {
    /// Starts a connection.
    pub fn start(env: &Env<'_>, start: StreamStart<'_>) -> (Self, StreamStep) {
        let _ = (env, start);
        unreachable!("being written")
    }

    /// Goes on with what came of the last step.
    pub fn resume(&mut self, env: &Env<'_>, answer: StreamAnswer, recorder: &mut dyn Recorder) -> StreamStep {
        let _ = (env, answer, recorder);
        unreachable!("being written")
    }

    /// Marks why it ended.
    pub fn broke(&mut self, cause: Cause) {
        self.info.causes.push(cause);
    }

    /// What is known so far.
    pub fn info(&self) -> &StreamInfo {
        &self.info
    }
}

pub(super) fn admit(
    env: &Env<'_>,
    chain: &FilterChain,
    conn: &ConnFacts,
    info: &mut StreamInfo,
    recorder: &mut dyn Recorder,
) -> Result<(), Cause> {
    let _ = (env, chain, conn, info, recorder);
    Ok(())
}
