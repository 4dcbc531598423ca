//! A timer for deadlines that move much more often than they pass.
//!
//! Setting a timer of Tokio's that is due before all others wakes its driver: a system call, and another
//! one to take note of it. Where a deadline a millisecond away is set for each message and withdrawn with
//! its answer, that is a good part of the message. So this one stays set when its deadline moves to a
//! later time, and looks again when it goes off. Between two users it waits in a [`Stock`], set as it is.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::runtime::{Handle, Id};
use tokio::time::{Instant, Sleep, sleep_until};

/// How many alarms a [`Stock`] keeps, some 100 KiB. Making one and setting it costs more than all the rest of
/// waiting for it.
const STOCK_MAX: usize = 1024;

/// A timer that is cheap to move to a later time.
pub struct Alarm {
    /// Whose clock drives it. After that runtime's end it panics when it is waited for.
    runtime: Id,
    sleep: Pin<Box<Sleep>>,
    /// When it goes off; `None` when it has.
    set: Option<Instant>,
}

impl Alarm {
    /// Set to nothing. Needs a Tokio runtime.
    pub fn new() -> Self {
        let sleep = Box::pin(sleep_until(Instant::now()));
        Self { runtime: Handle::current().id(), sleep, set: None }
    }

    /// Whether it is this runtime's, and so works for as long as the caller does. (Tokio may give an id out
    /// again; its ids come from a counter.)
    pub fn belongs_to(&self, runtime: Id) -> bool {
        self.runtime == runtime
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

/// Alarms that nobody uses at the moment.
#[derive(Default)]
pub struct Stock {
    idle: Mutex<VecDeque<Alarm>>,
}

impl Stock {
    /// The one that came back last, if there is one for this runtime, or a new one. `runtime` is the one that the
    /// caller runs on.
    pub fn lend(&self, runtime: Id) -> Lent<'_> {
        let mut idle = self.idle();
        let at = idle.iter().rposition(|alarm| alarm.belongs_to(runtime));
        let alarm = at.and_then(|at| idle.remove(at)).unwrap_or_else(Alarm::new);
        Lent { stock: self, alarm: Some(alarm) }
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<Alarm>> {
        // Nothing inside can be half done: a panic elsewhere is no reason to fail here.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Goes back to its stock when it is dropped.
pub struct Lent<'a> {
    stock: &'a Stock,
    /// There until it is dropped.
    alarm: Option<Alarm>,
}

impl Deref for Lent<'_> {
    type Target = Alarm;

    fn deref(&self) -> &Alarm {
        self.alarm.as_ref().expect("it has not been dropped")
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut Alarm {
        self.alarm.as_mut().expect("it has not been dropped")
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut idle = self.stock.idle();
        idle.extend(self.alarm.take());
        if idle.len() > STOCK_MAX {
            // Perhaps of a runtime that is no more.
            idle.pop_front();
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

    #[test]
    fn a_stock_lends_what_was_set_before_but_not_to_another_runtime() {
        let runtime =
            || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stock = Stock::default();
        for _ in 0..2 {
            runtime().block_on(async {
                let far = Instant::now() + FOR_EVER;
                let here = Handle::current().id();
                assert_eq!(stock.lend(here).set, None);
                assert!(stock.lend(here).until(far).now_or_never().is_none());
                let mut again = stock.lend(here);
                assert_eq!(again.set, Some(far));
                timeout(FOR_EVER / 60, again.until(Instant::now() + SOON)).await.expect("too late");
            });
        }
        assert_eq!(stock.idle().len(), 2);
        runtime().block_on(async {
            let here = Handle::current().id();
            let lent: Vec<_> = (0..2 * STOCK_MAX).map(|_| stock.lend(here)).collect();
            drop(lent);
        });
        assert_eq!(stock.idle().len(), STOCK_MAX);
    }
}
