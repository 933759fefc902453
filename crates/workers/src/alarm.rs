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

    #[tokio::test]
    async fn deadlines_are_kept_in_any_order() {
        let start = Instant::now();
        let mut alarm = Alarm::default();
        for millis in [3, 10, 10, 11, 20] {
            let at = start + Duration::from_millis(millis);
            poll_fn(|cx| alarm.poll(cx, at)).await;
            assert!(Instant::now() >= at, "{millis} ms");
        }
        // what was waited for and given up does not ring for what comes after it
        let start = Instant::now();
        for (given_up, waited_for) in [(3_600_000, 2), (1_800_000, 30)] {
            let [other, at] = [given_up, waited_for].map(|millis| start + Duration::from_millis(millis));
            let looked = poll_fn(|cx| Poll::Ready(alarm.poll(cx, other).is_ready())).await;
            assert!(!looked);
            poll_fn(|cx| alarm.poll(cx, at)).await;
            assert!(Instant::now() >= at && Instant::now() < other, "{waited_for} ms");
        }
    }
}
