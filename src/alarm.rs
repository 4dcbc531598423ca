//! A timer for deadlines that move much more often than they pass.
//!
//! Setting a timer of Tokio's that is due before all others wakes its driver: a system call, and another
//! one to take note of it. Where a deadline a millisecond away is set for each message and withdrawn with
//! its answer, that is a good part of the message. So this one stays set when its deadline moves to a
//! later time, and looks again when it goes off.

use std::pin::Pin;

use tokio::time::{Instant, Sleep, sleep_until};

/// A timer that is cheap to move to a later time.
pub struct Alarm {
    sleep: Pin<Box<Sleep>>,
    /// When it goes off; `None` when it has.
    set: Option<Instant>,
}

impl Alarm {
    /// Set to nothing. Needs a Tokio runtime.
    pub fn new() -> Self {
        Self { sleep: Box::pin(sleep_until(Instant::now())), set: None }
    }

    /// Resolves once `at` has passed, to the millisecond like all timers of Tokio's. Cancel safe; the next
    /// call may name another time.
    pub async fn until(&mut self, at: Instant) {
        loop {
            if self.set.is_none_or(|set| set > at) {
                self.sleep.as_mut().reset(at);
                self.set = Some(at);
            }
            self.sleep.as_mut().await;
            self.set = None;
            if Instant::now() >= at {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use futures_util::FutureExt;
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_millis(5);
    const FOR_EVER: Duration = Duration::from_secs(3600);

    /// Both directions, because each has its own mistake: going off too early, and never.
    #[tokio::test]
    async fn it_goes_off_when_the_latest_call_says() {
        let start = Instant::now();
        let mut alarm = Alarm::new();
        assert!(alarm.until(start + SOON).now_or_never().is_none());
        assert!(timeout(4 * SOON, alarm.until(start + FOR_EVER)).await.is_err(), "too early");
        timeout(FOR_EVER / 60, alarm.until(start + 6 * SOON)).await.expect("too late");
        assert!(start.elapsed() >= 6 * SOON);
        // What is past already goes off at once.
        timeout(FOR_EVER / 60, alarm.until(start)).await.expect("too late");
    }
}
