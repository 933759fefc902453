//! The state machine.

use std::time::{Duration, Instant};

use types::{Cause, Fields, RequestHead};

use super::{Answer, Env, Start, Step, StreamInfo};
use crate::record::Recorder;
use crate::shared::{ClusterHeld, Held, SharedHost};

/// Places an attempt holds in the limits.
#[derive(Debug, Default)]
pub(crate) struct HeldPlaces {
    pub(crate) request: Option<ClusterHeld>,
    pub(crate) retry: Option<ClusterHeld>,
    pub(crate) host: Option<Held<SharedHost>>,
}

/// One request.
#[derive(Debug)]
pub struct Exchange {
    info: StreamInfo,
}

impl Exchange {
    /// Starts a request; `head` is as the codec read it and is edited in place.
    pub fn start(env: &Env<'_>, start: Start<'_>, head: &mut RequestHead) -> (Self, Step) {
        let _ = (env, start, head);
        unreachable!("being written")
    }

    /// Goes on with what came of the last step; `head` is the same as before.
    pub fn resume(
        &mut self,
        env: &Env<'_>,
        answer: Answer<'_>,
        head: &mut RequestHead,
        recorder: &mut dyn Recorder,
    ) -> Step {
        let _ = (env, answer, head, recorder);
        unreachable!("being written")
    }

    /// The request's body has ended: time-outs of the route begin.
    pub fn request_complete(&mut self, now: Instant) {
        let _ = now;
    }

    /// Says whether the retry buffer still holds the whole body; `true` until said otherwise.
    pub fn set_replayable(&mut self, replayable: bool) {
        let _ = replayable;
    }

    /// When [`Answer::Elapsed`] is due at the latest, whatever else happens.
    pub fn deadline(&self) -> Option<Instant> {
        None
    }

    /// How long nothing may move on the stream; then [`Answer::Idle`] is due.
    pub fn idle_timeout(&self) -> Option<Duration> {
        None
    }

    /// The response's body has ended well, with these trailers.
    pub fn response_ended(&mut self, env: &Env<'_>, trailers: Option<&mut Fields>) {
        let _ = (env, trailers);
    }

    /// The response broke off after its head, or the client went away: marks the cause.
    pub fn broke(&mut self, env: &Env<'_>, cause: Cause) {
        let _ = env;
        self.info.causes.push(cause);
    }

    /// What is known so far.
    pub fn info(&self) -> &StreamInfo {
        &self.info
    }
}
