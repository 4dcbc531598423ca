//! Clients that write and read while the ring changes, and notice whatever must not happen.
//!
//! Each task has keys that nobody else writes, so it knows what each of its reads must find, and all
//! tasks share counters, which they raise by compare and set. What would show:
//!
//! | fault | by |
//! | --- | --- |
//! | a lost write, a stale read | a task's read of its own key; another task's key that only grows |
//! | a write done twice | a delete that says there was nothing; a create that says there was something; a counter above the number of acknowledged increments |
//! | an acknowledged write that did not happen | a counter below it |
//! | an error to the caller | any error but a failed condition of a counter |

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::types::{Condition, Consistency};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::cluster::splitmix;
use super::eventually_by_progress;

/// Tasks that share a client.
const TASKS_PER_CLIENT: usize = 4;

/// How to load.
pub struct LoadOptions {
    pub tasks: usize,
    /// Keys of each task.
    pub keys: usize,
    /// Keys that all tasks raise.
    pub counters: usize,
    /// The deadline of each operation.
    pub timeout: Duration,
    pub seed: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { tasks: 8, keys: 40, counters: 12, timeout: Duration::from_secs(10), seed: 1 }
    }
}

/// The tasks. They end with its drop.
pub struct RingLoad {
    runtime: Runtime,
    tasks: Vec<JoinHandle<Result<Vec<Option<u64>>, String>>>,
    shared: Arc<Shared>,
}

struct Shared {
    options: LoadOptions,
    stop: AtomicBool,
    failed: AtomicBool,
    operations: AtomicU64,
    longest_ms: AtomicU64,
    /// What was acknowledged last of each key that only grows, by task.
    acknowledged: Vec<Vec<AtomicU64>>,
    /// Acknowledged increments of each counter.
    increments: Vec<AtomicU64>,
}

/// What there must be in the end.
pub struct Outcome {
    pub expected: BTreeMap<String, Option<String>>,
    pub operations: u64,
    /// The longest that a caller waited.
    pub longest: Duration,
}

impl RingLoad {
    /// Starts it, and waits until each task has written each of its keys.
    pub fn start(endpoints: Vec<Vec<String>>, options: LoadOptions) -> Self {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
        let grown = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let shared = Arc::new(Shared {
            acknowledged: (0..options.tasks).map(|_| grown(options.keys)).collect(),
            increments: grown(options.counters),
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            operations: AtomicU64::new(0),
            longest_ms: AtomicU64::new(0),
            options,
        });
        let mut tasks = Vec::new();
        for first in (0..shared.options.tasks).step_by(TASKS_PER_CLIENT) {
            let client = runtime.block_on(KVClient::from_endpoints(endpoints.clone())).unwrap();
            let client = client.with_timeout(shared.options.timeout);
            let last = shared.options.tasks.min(first + TASKS_PER_CLIENT);
            tasks.extend((first..last).map(|number| {
                let shared = Arc::clone(&shared);
                let random = splitmix(shared.options.seed ^ (number as u64) << 32);
                let task =
                    Task { client: client.clone(), number, random, shared, held: Vec::new() };
                runtime.spawn(task.run())
            }));
        }
        let load = Self { runtime, tasks, shared };
        let first = (load.shared.options.tasks * load.shared.options.keys) as u64;
        load.await_more("of the first writes", first);
        load
    }

    /// Waits until so many operations more were done, for as long as any are.
    pub fn await_more(&self, what: &str, count: u64) {
        let operations = || self.shared.operations.load(Ordering::SeqCst);
        let goal = operations() + count;
        eventually_by_progress(&format!("{count} operations {what}"), operations, || {
            (operations() >= goal || self.has_failed()).then_some(())
        });
    }

    /// Whether a task has found something wrong; [`Self::stop`] says what.
    pub fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::SeqCst)
    }

    /// Ends it. Panics, with the seed, if any task found something wrong.
    pub fn stop(mut self) -> Outcome {
        self.shared.stop.store(true, Ordering::SeqCst);
        let seed = self.shared.options.seed;
        let (mut expected, mut wrong) = (BTreeMap::new(), Vec::new());
        for (number, task) in std::mem::take(&mut self.tasks).into_iter().enumerate() {
            match self.runtime.block_on(task).expect("tasks do not panic") {
                Ok(held) => expected.extend(
                    held.into_iter()
                        .enumerate()
                        .map(|(n, value)| (key(number, n), value.map(|value| value.to_string()))),
                ),
                Err(error) => wrong.push(format!("task {number}: {error}")),
            }
        }
        assert!(wrong.is_empty(), "seed {seed}: {}", wrong.join("\n"));
        for (n, increments) in self.shared.increments.iter().enumerate() {
            let value = increments.load(Ordering::SeqCst);
            expected.insert(counter(n), (value > 0).then(|| value.to_string()));
        }
        Outcome {
            expected,
            operations: self.shared.operations.load(Ordering::SeqCst),
            longest: Duration::from_millis(self.shared.longest_ms.load(Ordering::SeqCst)),
        }
    }
}

impl Drop for RingLoad {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

fn key(task: usize, n: usize) -> String {
    format!("t{task}-{n:04}")
}

fn counter(n: usize) -> String {
    format!("counter-{n}")
}

/// Keys that are never deleted, so that their values only grow.
fn only_grows(n: usize) -> bool {
    n.is_multiple_of(2)
}

struct Task {
    client: KVClient,
    number: usize,
    random: u64,
    shared: Arc<Shared>,
    /// What its own keys hold.
    held: Vec<Option<u64>>,
}

impl Task {
    async fn run(mut self) -> Result<Vec<Option<u64>>, String> {
        let shared = Arc::clone(&self.shared);
        let result = self.work().await;
        shared.failed.fetch_or(result.is_err(), Ordering::SeqCst);
        // One that failed ends them all: what it saw is what matters.
        shared.stop.fetch_or(result.is_err(), Ordering::SeqCst);
        result.map(|()| self.held)
    }

    async fn work(&mut self) -> Result<(), String> {
        self.held = vec![None; self.shared.options.keys];
        for n in 0..self.held.len() {
            self.timed(n, Kind::Write).await?;
        }
        while !self.shared.stop.load(Ordering::SeqCst) {
            let n = self.below(self.held.len());
            let kind = match self.below(10) {
                0..=2 => Kind::Write,
                3 if only_grows(n) => Kind::Write,
                3 => Kind::DeleteOrCreate,
                4 => Kind::Increment,
                5..=7 => Kind::Read,
                _ => Kind::ReadOther,
            };
            self.timed(n, kind).await?;
        }
        Ok(())
    }

    fn below(&mut self, end: usize) -> usize {
        self.random = splitmix(self.random);
        (self.random % end as u64) as usize
    }

    async fn timed(&mut self, n: usize, kind: Kind) -> Result<(), String> {
        let began = Instant::now();
        let result = match kind {
            Kind::Write => self.write(n).await,
            Kind::DeleteOrCreate => self.delete_or_create(n).await,
            Kind::Increment => self.increment().await,
            Kind::Read => self.read(n).await,
            Kind::ReadOther => self.read_other(n).await,
        };
        let took = began.elapsed();
        self.shared.longest_ms.fetch_max(took.as_millis() as u64, Ordering::SeqCst);
        self.shared.operations.fetch_add(1, Ordering::SeqCst);
        result.map_err(|error| format!("{kind:?} after {} ms: {error}", took.as_millis()))
    }

    async fn write(&mut self, n: usize) -> Result<(), String> {
        let (key, value) = (key(self.number, n), self.next(n));
        self.client.write(&key, value.to_string()).await.map_err(|e| format!("{key}: {e}"))?;
        self.held[n] = Some(value);
        self.shared.acknowledged[self.number][n].store(value, Ordering::SeqCst);
        Ok(())
    }

    /// A value that this key never had.
    fn next(&self, n: usize) -> u64 {
        let before = self.shared.acknowledged[self.number][n].load(Ordering::SeqCst);
        before.max(self.held[n].unwrap_or(0)) + 1
    }

    async fn delete_or_create(&mut self, n: usize) -> Result<(), String> {
        let key = key(self.number, n);
        if self.held[n].is_none() {
            let value = self.next(n);
            let created = self.client.write_if(&key, value.to_string(), Condition::Absent).await;
            created.map_err(|error| format!("{key} does not exist: {error}"))?;
            self.held[n] = Some(value);
            self.shared.acknowledged[self.number][n].store(value, Ordering::SeqCst);
            return Ok(());
        }
        let deleted = self.client.delete(&key).await.map_err(|e| format!("{key}: {e}"))?;
        self.held[n] = None;
        deleted.deleted.then_some(()).ok_or_else(|| format!("{key} existed, and was not deleted"))
    }

    async fn increment(&mut self) -> Result<(), String> {
        let n = self.below(self.shared.options.counters);
        let (name, acknowledged) = (counter(n), &self.shared.increments[n]);
        let before = acknowledged.load(Ordering::SeqCst);
        let found = self.client.get(&name, Consistency::Linearizable).await;
        let found = found.map_err(|error| format!("{name}: {error}"))?;
        let (value, condition) = match &found {
            Some(record) => (number(&record.value)?, Condition::Revision(record.revision)),
            None => (0, Condition::Absent),
        };
        if value < before {
            return Err(format!("{name}: {before} increments were acknowledged, read {value}"));
        }
        match self.client.write_if(&name, (value + 1).to_string(), condition).await {
            Ok(_) => drop(acknowledged.fetch_add(1, Ordering::SeqCst)),
            Err(ClientError::ConditionFailed { .. }) => {}
            Err(error) => return Err(format!("{name}: {error}")),
        }
        Ok(())
    }

    async fn read(&mut self, n: usize) -> Result<(), String> {
        let key = key(self.number, n);
        let found = self.client.consistent_read(&key).await.map_err(|e| format!("{key}: {e}"))?;
        let found = found.map(|value| number(&value)).transpose()?;
        let held = self.held[n];
        (found == held)
            .then_some(())
            .ok_or_else(|| format!("{key}: wrote {held:?}, read {found:?}"))
    }

    async fn read_other(&mut self, n: usize) -> Result<(), String> {
        let (task, n) = (self.below(self.shared.options.tasks), n / 2 * 2);
        let key = key(task, n);
        let before = self.shared.acknowledged[task][n].load(Ordering::SeqCst);
        let found = self.client.consistent_read(&key).await.map_err(|e| format!("{key}: {e}"))?;
        let found = found.map_or(Ok(0), |value| number(&value))?;
        let stale =
            || format!("{key}: {before} was acknowledged before the read, which found {found}");
        (found >= before).then_some(()).ok_or_else(stale)
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Write,
    DeleteOrCreate,
    Increment,
    Read,
    ReadOther,
}

fn number(value: &[u8]) -> Result<u64, String> {
    let text = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    text.ok_or_else(|| format!("{value:?} was never written"))
}
