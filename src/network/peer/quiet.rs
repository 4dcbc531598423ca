//! A bound on log lines that strangers can cause.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The time over which lines are counted.
const WINDOW: Duration = Duration::from_secs(60);

/// Lines in one window: enough to see what goes on, too few to fill a disk (about 15,000 a day).
const LINES_PER_WINDOW: u32 = 10;

/// Admits a bounded number of log lines a minute and counts the others.
#[derive(Debug, Default)]
pub(in crate::network) struct Quiet {
    window: Mutex<Option<Window>>,
}

#[derive(Debug)]
struct Window {
    start: Instant,
    lines: u32,
    suppressed: u64,
}

impl Quiet {
    /// Whether a line may be logged now, and how many were suppressed since the last that was.
    pub(in crate::network) fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut slot = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let window = slot.get_or_insert(Window { start: now, lines: 0, suppressed: 0 });
        if now.duration_since(window.start) >= WINDOW {
            window.start = now;
            window.lines = 0;
        }
        if window.lines == LINES_PER_WINDOW {
            window.suppressed += 1;
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many lines are asked for, a window has its number, and the next one says how many
    /// were left out.
    #[test]
    fn lines_are_bounded_and_counted() {
        let quiet = Quiet::default();
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| quiet.admit_at(start).is_some()).count();
        assert_eq!(admitted, LINES_PER_WINDOW as usize);
        assert_eq!(quiet.admit_at(start + WINDOW), Some(1000 - u64::from(LINES_PER_WINDOW)));
        assert_eq!(quiet.admit_at(start + WINDOW), Some(0));
    }
}
