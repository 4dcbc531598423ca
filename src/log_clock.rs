//! The clock by which a leader stamps entries: log time, as [`crate::store`]'s table of answers counts it.
//!
//! Log time decides when an answer or a client is forgotten, so a jump of it would forget what somebody
//! still waits for, and a write could happen twice. No wall clock is asked, then: a leader goes on from
//! what its state machine has applied and adds the time that has passed by its own monotonic clock. Log
//! time never runs faster than time; it stands still while a cluster has no leader or nobody writes to a
//! new one, and whatever is forgotten by it is only forgotten later.

use tokio::time::Instant;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LogClock {
    /// A log time, and when it was.
    base: Option<(u64, Instant)>,
}

impl LogClock {
    /// The stamp of an entry that is proposed now, in milliseconds, when the state machine's log time is
    /// `applied_ms`. Never lower than it.
    pub(crate) fn stamp(&mut self, applied_ms: u64, now: Instant) -> u64 {
        let passed = |at: Instant| {
            u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX)
        };
        if let Some((base_ms, at)) = self.base {
            let stamp = base_ms.saturating_add(passed(at));
            if stamp >= applied_ms {
                return stamp;
            }
        }
        // The first one, or another leader's clock is ahead: by less than the time in which it led.
        self.base = Some((applied_ms, now));
        applied_ms
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Whoever leads, log time goes on from where it was, and never by more than has passed.
    #[test]
    fn log_time_passes_like_time() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let (mut one, mut other) = (LogClock::default(), LogClock::default());
        assert_eq!(one.stamp(0, after(0)), 0);
        assert_eq!(one.stamp(0, after(1500)), 1500);
        assert_eq!(other.stamp(1500, after(9000)), 1500, "nobody led meanwhile");
        assert_eq!(other.stamp(1500, after(9100)), 1600);
        assert_eq!(one.stamp(1600, after(9200)), 9200, "real time at most");
        assert_eq!(other.stamp(9200, after(9200)), 9200);
        assert_eq!(other.stamp(9200, after(9201)), 9201);
        assert_eq!(one.stamp(20_000, after(9300)), 20_000, "an entry of the log counts");
    }
}
