//! Counters and gauges for `GET /metrics`, in Prometheus' text format.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::metrics::{NodeMetrics, NodeState};
use crate::store::RowCacheStats;

/// What a client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(missing_docs)] // The names say it all.
pub enum Operation {
    Put,
    Delete,
    Get,
    GetStale,
}

const OPERATIONS: [Operation; 4] =
    [Operation::Put, Operation::Delete, Operation::Get, Operation::GetStale];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabel {
    operation: Operation,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabel {
    operation: Operation,
    code: &'static str,
}

type GaugeU64 = Gauge<u64, AtomicU64>;

/// A node's metrics. Recording is lock-free or nearly so.
pub struct Telemetry {
    registry: Registry,
    /// By operation, in the order of [`OPERATIONS`]: looked up once, not with every operation.
    seconds: [Histogram; OPERATIONS.len()],
    failures: Family<FailureLabel, Counter>,
    term: GaugeU64,
    leader: GaugeU64,
    last_log: GaugeU64,
    last_applied: GaugeU64,
    revision: GaugeU64,
    keys: GaugeU64,
    epoch: GaugeU64,
    data_bytes: GaugeU64,
    row_cache_hits: Counter,
    row_cache_misses: Counter,
    row_cache_bytes: GaugeU64,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::new()
    }
}

impl Telemetry {
    /// All counters at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("kv");
        // 50 us to 13 s: a cached read up to the request deadline.
        let histogram = || Histogram::new(exponential_buckets(50e-6, 2.0, 18));
        let seconds: Family<OperationLabel, Histogram> =
            Family::new_with_constructor(histogram as fn() -> Histogram);
        registry.register_with_unit(
            "operation_duration",
            "How long client operations took",
            Unit::Seconds,
            seconds.clone(),
        );
        let seconds =
            OPERATIONS.map(|operation| seconds.get_or_create_owned(&OperationLabel { operation }));
        let failures = Family::default();
        registry.register("operation_failures", "Failed operations", failures.clone());
        let mut gauge = |name: &str, help: &str| {
            let gauge = GaugeU64::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let term = gauge("raft_term", "The node's term");
        let leader = gauge("raft_is_leader", "1 on the node that leads");
        let last_log = gauge("raft_last_log_index", "Index of the last log entry");
        let last_applied = gauge("raft_last_applied_index", "Index of the last applied entry");
        let revision = gauge("revision", "The state machine's revision");
        let keys = gauge("keys", "Number of keys; an estimate when there are many");
        let epoch = gauge("ring_epoch", "Epoch of the ring; 0 for none");
        let data_bytes = gauge("data_file_bytes", "Size of the data files on disk");
        let row_cache_bytes = gauge("row_cache_bytes", "Memory of the cache of rows");
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let row_cache_hits =
            counter("row_cache_hits", "Rows that no memtable had and the cache had");
        let row_cache_misses =
            counter("row_cache_misses", "Rows that neither memtables nor the cache had");
        Self {
            seconds,
            failures,
            term,
            leader,
            last_log,
            last_applied,
            revision,
            keys,
            epoch,
            data_bytes,
            row_cache_hits,
            row_cache_misses,
            row_cache_bytes,
            registry,
        }
    }

    /// Records one finished operation; `failure` is the error's code.
    pub fn record(&self, operation: Operation, took: Duration, failure: Option<&'static str>) {
        self.seconds[operation as usize].observe(took.as_secs_f64());
        if let Some(code) = failure {
            self.failures.get_or_create(&FailureLabel { operation, code }).inc();
        }
    }

    /// The whole text, with the gauges as of now.
    pub fn text(&self, metrics: &NodeMetrics, data_bytes: u64, rows: RowCacheStats) -> String {
        self.term.set(metrics.term);
        self.leader.set((metrics.state == NodeState::Leader).into());
        self.last_log.set(metrics.last_log.unwrap_or(0));
        self.last_applied.set(metrics.last_applied.unwrap_or(0));
        self.revision.set(metrics.revision.unwrap_or(0));
        self.keys.set(metrics.keys.unwrap_or(0));
        self.epoch.set(metrics.epoch.unwrap_or(0));
        self.data_bytes.set(data_bytes);
        self.row_cache_hits.inner().store(rows.hits, Ordering::Relaxed);
        self.row_cache_misses.inner().store(rows.misses, Ordering::Relaxed);
        self.row_cache_bytes.set(rows.bytes as u64);
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a String cannot fail");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_lie_where_they_are_looked_for() {
        for (place, operation) in OPERATIONS.into_iter().enumerate() {
            assert_eq!(operation as usize, place);
        }
    }
}
