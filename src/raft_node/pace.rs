//! How long an operation may take, and how long it pauses between attempts.

use std::time::Duration;

use tokio::time::Instant;

/// The first pause. Well below an election, so that a leader that is just being elected is found
/// soon; long enough for a handoff's pause to end within a few attempts.
const PAUSE_FIRST: Duration = Duration::from_millis(20);

/// The longest pause. Keeps thousands of waiting callers at a few attempts a second each. Shorter than the
/// second that `Retry-After` asks for: it is slept to its end, also when a new leader is there sooner.
const PAUSE_MAX: Duration = Duration::from_millis(500);

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

/// Pauses that double up to a bound, each with jitter, so that callers that failed together do not
/// come back together.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: PAUSE_FIRST }
    }

    /// The pause to make now: between a half and the whole of the current bound.
    pub(crate) fn pause(&mut self) -> Duration {
        let bound = self.next;
        self.next = (bound * 2).min(PAUSE_MAX);
        rand::random_range(bound / 2..=bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_never_vanish() {
        let mut backoff = Backoff::new();
        let mut total = Duration::ZERO;
        for _ in 0..100 {
            let pause = backoff.pause();
            assert!(pause >= PAUSE_FIRST / 2 && pause <= PAUSE_MAX, "{pause:?}");
            total += pause;
        }
        assert!(total > 90 * (PAUSE_MAX / 2), "{total:?}");
    }
}
