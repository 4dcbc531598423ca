//! What one client counts, and how counts become figures.
//!
//! Latencies go into HdrHistograms: bounded memory for any number of operations, and every percentile
//! right to a thousandth of its value. Only answered operations have a latency: the time until an error
//! says how patient the client is, not how fast the store is. Errors are counted by their codes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use distrib_kv_store::network::error::Outcome;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::mix::Kind;

/// Percentiles are right to a part in 10^3, which is finer than any two runs agree.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Latencies above an hour count as an hour: it bounds the histograms' memory, and no client waits
/// that long.
const LATENCY_US_MAX: u128 = 3_600_000_000;

/// How an operation was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// As asked.
    Done,
    /// There was nothing under a key that was read.
    Absent,
    /// Another client was faster than a read-modify-write, which changed nothing.
    ConditionFailed,
}

/// An operation that was not answered as it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Failure {
    /// The code that the server gave, or one of the client's for when it gave none. From a bounded set
    /// of words, as failures are counted by it.
    pub code: Cow<'static, str>,
    /// For a person.
    pub message: String,
    /// Whether it may have taken effect.
    pub outcome: Outcome,
}

impl Failure {
    /// A failure with one of the client's own codes.
    pub fn new(
        code: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
        outcome: Outcome,
    ) -> Self {
        Self { code: code.into(), message: message.into(), outcome }
    }

    /// Nothing happened.
    pub fn not_applied(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(code, message, Outcome::NotApplied)
    }
}

/// All that is counted. Merging and summing up do not depend on the order.
#[derive(Debug, Default)]
pub struct Tally {
    latencies: BTreeMap<Kind, Latencies>,
    outcomes: Outcomes,
    errors_by_code: BTreeMap<String, u64>,
    keys_read: u64,
}

/// How operations ended. The sum of all is the number of operations.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcomes {
    /// Answered as asked.
    pub done: u64,
    /// Answered, but a key that was read did not exist.
    pub absent: u64,
    /// Read-modify-writes that lost a race and changed nothing.
    pub condition_failed: u64,
    /// Errors that left no trace.
    pub not_applied: u64,
    /// Errors in spite of which the operation took effect.
    pub applied: u64,
    /// Errors that leave open whether it took effect.
    pub unknown: u64,
}

impl Outcomes {
    /// All that were answered.
    pub fn answered(&self) -> u64 {
        self.done + self.absent + self.condition_failed
    }

    /// All that were not.
    pub fn failed(&self) -> u64 {
        self.not_applied + self.applied + self.unknown
    }

    fn add(&mut self, other: &Self) {
        self.done += other.done;
        self.absent += other.absent;
        self.condition_failed += other.condition_failed;
        self.not_applied += other.not_applied;
        self.applied += other.applied;
        self.unknown += other.unknown;
    }
}

/// In microseconds.
#[derive(Debug, Clone)]
struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        let histogram = Histogram::new(SIGNIFICANT_DIGITS);
        // Grows with what is recorded: a few KiB for each client, where the whole range takes 100.
        Self(histogram.expect("three digits are within what a histogram can do"))
    }
}

/// Percentiles of latencies, in microseconds; all 0 when there are none.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// The mean.
    pub mean: f64,
    /// Half are at most this.
    pub p50: u64,
    /// 90 % are.
    pub p90: u64,
    /// 99 % are.
    pub p99: u64,
    /// 99.9 % are.
    pub p99_9: u64,
    /// All are.
    pub max: u64,
}

impl From<&Latencies> for Percentiles {
    fn from(latencies: &Latencies) -> Self {
        let histogram = &latencies.0;
        Self {
            mean: (histogram.mean() * 10.0).round() / 10.0,
            p50: histogram.value_at_quantile(0.5),
            p90: histogram.value_at_quantile(0.9),
            p99: histogram.value_at_quantile(0.99),
            p99_9: histogram.value_at_quantile(0.999),
            max: histogram.max(),
        }
    }
}

/// Figures of one kind of operation, or of all.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// How many were answered.
    pub answered: u64,
    /// How long that took, in microseconds.
    pub latency_us: Percentiles,
}

impl Tally {
    /// Counts one operation that read `keys_read` keys and took this long.
    pub fn record(
        &mut self,
        kind: Kind,
        keys_read: u64,
        result: &Result<Answered, Failure>,
        took: Duration,
    ) {
        match result {
            Ok(answered) => {
                match answered {
                    Answered::Done => self.outcomes.done += 1,
                    Answered::Absent => self.outcomes.absent += 1,
                    Answered::ConditionFailed => self.outcomes.condition_failed += 1,
                }
                self.keys_read += keys_read;
                let us = took.as_micros().clamp(1, LATENCY_US_MAX) as u64;
                let latencies = &mut self.latencies.entry(kind).or_default().0;
                latencies.record(us).expect("it grows up to the largest latency");
            }
            Err(failure) => {
                match failure.outcome {
                    Outcome::NotApplied => self.outcomes.not_applied += 1,
                    Outcome::Applied => self.outcomes.applied += 1,
                    Outcome::Unknown => self.outcomes.unknown += 1,
                }
                *self.errors_by_code.entry(failure.code.clone().into_owned()).or_default() += 1;
            }
        }
    }

    /// Adds what another client counted.
    pub fn merge(&mut self, other: &Self) {
        for (kind, latencies) in &other.latencies {
            let own = &mut self.latencies.entry(*kind).or_default().0;
            own.add(&latencies.0).expect("both grow as needed");
        }
        self.outcomes.add(&other.outcomes);
        for (code, count) in &other.errors_by_code {
            *self.errors_by_code.entry(code.clone()).or_default() += count;
        }
        self.keys_read += other.keys_read;
    }

    /// How the operations ended.
    pub fn outcomes(&self) -> &Outcomes {
        &self.outcomes
    }

    /// Failures by code.
    pub fn errors_by_code(&self) -> &BTreeMap<String, u64> {
        &self.errors_by_code
    }

    /// How many keys were read, of which multi-gets read several.
    pub fn keys_read(&self) -> u64 {
        self.keys_read
    }

    /// Figures of all kinds together.
    pub fn overall(&self) -> Answers {
        let mut all = Latencies::default();
        for latencies in self.latencies.values() {
            all.0.add(&latencies.0).expect("both grow as needed");
        }
        Answers { answered: self.outcomes.answered(), latency_us: Percentiles::from(&all) }
    }

    /// Figures of each kind that occurred.
    pub fn by_kind(&self) -> BTreeMap<Kind, Answers> {
        let answers = self.latencies.iter().map(|(kind, latencies)| {
            let (answered, latency_us) = (latencies.0.len(), Percentiles::from(latencies));
            (*kind, Answers { answered, latency_us })
        });
        answers.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(code: &'static str, outcome: Outcome) -> Result<Answered, Failure> {
        Err(Failure { code: code.into(), message: String::new(), outcome })
    }

    /// Percentiles of 1, 2, ... 1000 ms are those numbers, to a thousandth.
    #[test]
    fn percentiles_are_right() {
        let mut tally = Tally::default();
        for ms in 1..=1_000 {
            tally.record(Kind::Read, 1, &Ok(Answered::Done), Duration::from_millis(ms));
        }
        let latency = tally.overall().latency_us;
        let close = |found: u64, expected: u64| {
            assert!(found.abs_diff(expected) <= expected / 1_000 + 1, "{found} for {expected}");
        };
        close(latency.p50, 500_000);
        close(latency.p90, 900_000);
        close(latency.p99, 990_000);
        close(latency.p99_9, 999_000);
        close(latency.max, 1_000_000);
        assert!((latency.mean - 500_500.0).abs() < 1_000.0, "{}", latency.mean);
    }

    /// Merged or counted together: the same figures, and every operation counted exactly once.
    #[test]
    fn merging_changes_nothing() {
        let results = [
            Ok(Answered::Done),
            Ok(Answered::Absent),
            Ok(Answered::ConditionFailed),
            failure("NO_LEADER", Outcome::NotApplied),
            failure("TIMEOUT", Outcome::Unknown),
            failure("TIMEOUT", Outcome::Applied),
        ];
        let (mut whole, mut parts) = (Tally::default(), [Tally::default(), Tally::default()]);
        for turn in 0..120_u64 {
            let result = &results[turn as usize % results.len()];
            let kind = if turn % 5 == 0 { Kind::Update } else { Kind::Read };
            let took = Duration::from_micros(turn * turn);
            whole.record(kind, 1, result, took);
            parts[turn as usize % 2].record(kind, 1, result, took);
        }
        let [mut merged, other] = parts;
        merged.merge(&other);
        assert_eq!(merged.overall(), whole.overall());
        assert_eq!(merged.by_kind(), whole.by_kind());
        assert_eq!(merged.outcomes(), whole.outcomes());
        assert_eq!(merged.errors_by_code(), whole.errors_by_code());
        assert_eq!(merged.outcomes().answered() + merged.outcomes().failed(), 120);
        assert_eq!(merged.by_kind().values().map(|kind| kind.answered).sum::<u64>(), 60);
        assert_eq!(merged.errors_by_code()["TIMEOUT"], 40);
        assert_eq!(merged.keys_read(), 60);
    }

    /// A latency that no histogram was meant for is counted, not a panic.
    #[test]
    fn any_latency_is_counted() {
        let mut tally = Tally::default();
        for took in [Duration::ZERO, Duration::MAX] {
            tally.record(Kind::Update, 0, &Ok(Answered::Done), took);
        }
        assert_eq!(tally.overall().answered, 2);
    }
}
