//! How fast the background may go.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::handoff::LOG_CHANGES_MAX;

/// Credit for time in which nothing was copied.
const CREDIT_MAX: Duration = Duration::from_millis(100);

/// What is spent without waiting makes others wait no longer than this: copying goes on, slowly, however
/// much changes meanwhile.
const DEBT_MAX: Duration = Duration::from_secs(1);

/// The longest pause after a proposal. One that takes longer waits for other things than its own work.
const BREAK_MAX: Duration = Duration::from_secs(1);

/// The shortest one: even if proposals cost nothing, others get in between.
const BREAK_MIN: Duration = Duration::from_millis(1);

/// Bytes that may be copied, over time, shared by all who copy. A token bucket that counts in time: it
/// only knows when all that was spent is paid for.
pub(super) struct Budget {
    bytes_per_s: u64,
    paid_at: Mutex<Instant>,
}

impl Budget {
    /// 0 stands for no limit.
    pub(super) fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s, paid_at: Mutex::new(Instant::now()) }
    }

    /// Waits until what was spent is paid for. Cancel safe. How much will be spent then is not known
    /// before, so several who wait may go at once, and pay for it together.
    pub(super) async fn turn(&self) {
        loop {
            let wait = self.wait(Instant::now());
            if wait.is_zero() {
                return;
            }
            sleep(wait).await;
        }
    }

    /// Takes bytes, at once.
    pub(super) fn spend(&self, bytes: usize) {
        self.spend_at(bytes, Instant::now());
    }

    fn wait(&self, now: Instant) -> Duration {
        self.paid_at.lock().unwrap_or_else(PoisonError::into_inner).saturating_duration_since(now)
    }

    fn spend_at(&self, bytes: usize, now: Instant) {
        if self.bytes_per_s == 0 {
            return;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        let from = now.checked_sub(CREDIT_MAX).map_or(*paid_at, |credit| credit.max(*paid_at));
        *paid_at = (from + cost).min(now + DEBT_MAX);
    }
}

/// The pauses after pieces of work: so many times as long as the work, because those who wait for their
/// keys to move can wait, and those who read and write cannot.
///
/// A source that logs changes does not wait for ever, though: beyond [`LOG_CHANGES_MAX`] all that was copied
/// and counted is for nothing. So pauses become shorter as its log grows, and end when half of it is full.
#[derive(Debug, Clone, Copy)]
pub(super) struct Breaks {
    times: u32,
}

impl Breaks {
    pub(super) fn new(times: u32) -> Self {
        Self { times }
    }

    /// After work that took so long, for an attempt that has logged so many changes.
    pub(super) fn after(self, took: Duration, logged: u64) -> Duration {
        let left = 1.0 - 2.0 * logged as f64 / LOG_CHANGES_MAX as f64;
        let pause = f64::from(self.times) * left.max(0.0) * took.as_secs_f64();
        Duration::from_secs_f64(pause.min(BREAK_MAX.as_secs_f64())).max(BREAK_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Over a second, no more goes through than is allowed, but for the credit and the last piece.
    #[test]
    fn the_budget_holds_over_time() {
        let (budget, start) = (Budget::new(1_000_000), Instant::now() + CREDIT_MAX);
        let (mut now, mut spent) = (start, 0);
        while now < start + Duration::from_secs(1) {
            budget.spend_at(10_000, now);
            spent += 10_000;
            now += budget.wait(now);
        }
        assert!((1_000_000..=1_120_000).contains(&spent), "{spent}");
    }

    /// A debt is bounded, and no limit means none.
    #[test]
    fn debts_end() {
        let (budget, free) = (Budget::new(1), Budget::new(0));
        let now = Instant::now();
        budget.spend_at(1_000_000, now);
        assert_eq!(budget.wait(now), DEBT_MAX);
        free.spend_at(usize::MAX, now);
        assert_eq!(free.wait(Instant::now()), Duration::ZERO);
    }

    #[test]
    fn breaks_are_longer_than_the_work_and_bounded() {
        let breaks = Breaks::new(10);
        assert_eq!(breaks.after(Duration::ZERO, 0), BREAK_MIN);
        assert_eq!(breaks.after(Duration::from_millis(20), 0), Duration::from_millis(200));
        assert_eq!(breaks.after(Duration::from_secs(20), 0), BREAK_MAX);
        assert_eq!(Breaks::new(0).after(Duration::from_secs(20), 0), BREAK_MIN);
    }

    /// Who runs out of log hurries.
    #[test]
    fn breaks_end_before_the_log_is_full() {
        let after = |logged| Breaks::new(10).after(Duration::from_millis(20), logged);
        assert_eq!(after(LOG_CHANGES_MAX / 4), Duration::from_millis(100));
        for logged in [LOG_CHANGES_MAX / 2, LOG_CHANGES_MAX, u64::MAX] {
            assert_eq!(after(logged), BREAK_MIN);
        }
    }
}
