//! How long an operation may take, and how long it pauses between attempts.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;

/// The first pause. Well below an election, so that a leader that is just being elected is found
/// soon; long enough for a handoff's pause to end within a few attempts.
const PAUSE_FIRST: Duration = Duration::from_millis(20);

/// The longest pause. Keeps thousands of waiting callers at a few attempts a second each. Shorter than the
/// second that `Retry-After` asks for: it is slept to its end, also when a new leader is there sooner.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Less time than this is not halved any more: an election would not be waited for.
const HALVED_MIN: Duration = Duration::from_secs(2);

/// When an operation began and when it must be over. One budget covers all attempts of an operation,
/// on whatever node or cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    started: Instant,
    deadline: Instant,
}

impl Budget {
    /// A budget that starts now.
    pub(crate) fn new(timeout: Duration) -> Self {
        let started = Instant::now();
        // A timeout beyond the clock's range means "practically for ever".
        let year = Duration::from_secs(365 * 24 * 3600);
        Self { started, deadline: started + timeout.min(year) }
    }

    /// What one of two clusters gets that may serve a call: half of what is left, or all of it once that is little.
    pub(crate) fn half(self) -> Self {
        let now = Instant::now();
        match self.left_at(now) {
            left if left < HALVED_MIN => self,
            left => Self { deadline: now + left / 2, ..self },
        }
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) fn left(&self) -> Duration {
        self.left_at(Instant::now())
    }

    pub(crate) fn left_at(&self, now: Instant) -> Duration {
        self.deadline.saturating_duration_since(now)
    }
}

/// The pauses of a call.
pub(crate) fn call_backoff() -> Backoff {
    Backoff::new(PAUSE_FIRST, PAUSE_MAX)
}
