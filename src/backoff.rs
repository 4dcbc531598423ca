//! Pauses after failures: each twice as long as the one before, up to a bound.

use std::time::Duration;

/// The pauses of one thing that is tried again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, next: first }
    }

    /// The pause after one more failure.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = self.max.min(2 * pause);
        pause
    }

    /// The same with jitter, between a half of it and the whole, so that those that failed together do not
    /// come back together.
    pub(crate) fn pause_with_jitter(&mut self) -> Duration {
        let bound = self.pause();
        rand::random_range(bound / 2..=bound)
    }

    /// It succeeded: the next pause is the first one again.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(20);
    const MAX: Duration = Duration::from_millis(500);

    /// They double, stay at the bound, and begin anew.
    #[test]
    fn pauses_double_up_to_their_bound() {
        let mut backoff = Backoff::new(FIRST, MAX);
        let pauses: Vec<_> = (0..7).map(|_| backoff.pause().as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 500, 500]);
        backoff.reset();
        assert_eq!(backoff.pause(), FIRST);
    }

    /// Jitter takes away a half at most, so nobody tries again without a pause.
    #[test]
    fn pauses_with_jitter_never_vanish() {
        let mut backoff = Backoff::new(FIRST, MAX);
        let mut total = Duration::ZERO;
        for _ in 0..100 {
            let pause = backoff.pause_with_jitter();
            assert!(pause >= FIRST / 2 && pause <= MAX, "{pause:?}");
            total += pause;
        }
        assert!(total > 90 * (MAX / 2), "{total:?}");
    }
}
