//! CPU time of processes, as the kernel accounts for it.
//!
//! From `/proc/PID/stat`: user and system time of all threads, ended ones included, in clock ticks
//! (usually 10 ms, which a measurement of a second or more can ignore).

use std::io;

use serde::{Deserialize, Serialize};

/// The place of `utime` in `/proc/PID/stat` among the fields after the command's name.
const UTIME_FIELD: usize = 11;

/// CPU seconds that these processes have used so far, all together.
pub fn seconds_of(pids: &[u32]) -> io::Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let named = |error| io::Error::other(format!("cannot read {path}: {error}"));
        let text = std::fs::read_to_string(&path).map_err(named)?;
        ticks += ticks_in(&text).ok_or_else(|| io::Error::other(format!("{path} is garbled")))?;
    }
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The name in parentheses may hold anything, also spaces and parentheses: the last one ends it.
fn ticks_in(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_ascii_whitespace().skip(UTIME_FIELD);
    let (user, system): (u64, u64) = (times.next()?.parse().ok()?, times.next()?.parse().ok()?);
    Some(user + system)
}

/// CPU time that was used for the measured operations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CpuUse {
    /// Of all the processes together.
    pub seconds: f64,
    /// Divided by the operations that were answered; nothing when none was.
    pub us_per_operation: Option<f64>,
}

impl CpuUse {
    /// Spreads what was used over the operations.
    pub fn new(seconds: f64, answered: u64) -> Self {
        let us_per_operation = (answered > 0).then(|| seconds * 1e6 / answered as f64);
        Self { seconds, us_per_operation }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_times_are_found_behind_any_name() {
        let stat = "12 (a b) (c) R 1 2 3 0 -1 4194560 10 0 0 0 17 4 0 0 20 0 1 0 5 6 7";
        assert_eq!(ticks_in(stat), Some(21));
        assert_eq!(ticks_in("12 (x) R 1 2"), None);
        assert_eq!(ticks_in(""), None);
    }

    /// Work shows up: a busy process's time grows, within a deadline.
    #[test]
    fn work_costs_time() {
        let own = [std::process::id()];
        let (before, begun) = (seconds_of(&own).unwrap(), Instant::now());
        while seconds_of(&own).unwrap() <= before {
            assert!(begun.elapsed() < Duration::from_secs(30), "no time was accounted for");
        }
    }

    #[test]
    fn a_process_that_is_gone_is_named() {
        let error = seconds_of(&[u32::MAX]).unwrap_err();
        assert!(error.to_string().contains("4294967295"), "{error}");
    }

    #[test]
    fn cpu_is_spread_over_operations() {
        assert_eq!(CpuUse::new(1.5, 1_000).us_per_operation, Some(1_500.0));
        assert_eq!(CpuUse::new(1.5, 0).us_per_operation, None);
    }
}
