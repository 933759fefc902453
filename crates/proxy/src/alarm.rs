//! One timer for all deadlines of a task, one after the other.
//!
//! Nearly every deadline is met: a request waits a millisecond under a time-out of seconds. So the
//! timer is not moved when the deadline moves away; it rings at the earliest moment anybody asked
//! for, and is set anew only then. A connection that serves a thousand requests a second arms its
//! timer once in a while, not twice a request.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep, sleep_until};

/// A timer that is made when somebody first waits.
#[derive(Default)]
pub(crate) struct Alarm(Option<Pin<Box<Sleep>>>);

impl Alarm {
    /// Ready once `at` has passed. The waiting task is woken then, or earlier, never later.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, at: Instant) -> Poll<()> {
        let sleep = match &mut self.0 {
            Some(sleep) => {
                if sleep.deadline() > at {
                    sleep.as_mut().reset(at);
                }
                sleep
            }
            none => none.insert(Box::pin(sleep_until(at))),
        };
        loop {
            ready!(sleep.as_mut().poll(cx));
            if sleep.deadline() >= at || Instant::now() >= at {
                return Poll::Ready(());
            }
            // it rang for an earlier deadline that was met
            sleep.as_mut().reset(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn deadlines_are_kept_in_any_order() {
        let start = Instant::now();
        let mut alarm = Alarm::default();
        for seconds in [3, 10, 10, 11, 20] {
            let at = start + Duration::from_secs(seconds);
            poll_fn(|cx| alarm.poll(cx, at)).await;
            assert_eq!(start.elapsed().as_secs(), seconds);
        }
        // what was waited for and given up does not ring for what comes after it
        for (given_up, waited_for) in [(21, 30), (50, 40)] {
            let [early, late] = [given_up, waited_for].map(|seconds| start + Duration::from_secs(seconds));
            let looked = poll_fn(|cx| Poll::Ready(alarm.poll(cx, early).is_ready())).await;
            assert!(!looked);
            poll_fn(|cx| alarm.poll(cx, late)).await;
            assert_eq!(start.elapsed().as_secs(), waited_for);
        }
    }
}
