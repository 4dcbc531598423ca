//! The clients at work: fill the store, warm up, measure.
//!
//! **A closed loop.** Each client sends its next operation when it has the answer to the last one. That
//! is how most programs call a store, and it finds the most that so many callers can get. It also means
//! that a store which stalls is asked less while it stalls ("coordinated omission"): the percentiles are
//! those of the operations that were made, not of those that would have arrived at a steady rate. Judge
//! stalls by `max`, and compare runs with the same number of clients only.
//!
//! The phases follow one another: all clients end one before any begins the next, so that no operation
//! of the warm-up is counted. What is measured begins with the first operation and ends with the answer
//! to the last; operations that are in flight when the time is over are waited for and counted.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cpu;
use super::distribution::{Chooser, Distribution};
use super::mix::{Generator, Keyspace, Operation, Workload, key_of};
use super::progress::Progress;
use super::store::{Session, Store, execute};
use super::tally::{Failure, Tally};

/// What a client does after a failure, so that a store that is down is not asked as fast as a loop can
/// turn. Short next to any election.
const FAILURE_PAUSE: Duration = Duration::from_millis(10);

/// How often the filling tries one key: a little longer than an election, with the pauses between.
const LOAD_ATTEMPTS_MAX: u32 = 10;

/// The first pause between two such attempts; each further one is twice as long, 5 s in all.
const LOAD_PAUSE: Duration = Duration::from_millis(10);

/// How many clients fill the store at least: loading is not measured, so the more the faster, up to
/// what one store is sure to take at once.
const LOAD_CLIENTS_MIN: usize = 128;

/// How long operations in flight may take after Ctrl-C; then they are given up and said to be so.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// Values are slices of random bytes that are this much longer than a value: enough that neighbouring
/// values are not alike, so that no compression of blocks gains from the generator.
const VALUE_POOL_SPARE_BYTES: usize = 1 << 20;

/// What to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The mix.
    pub workload: Workload,
    /// How its keys are spread.
    pub distribution: Distribution,
    /// How many clients work at once.
    pub clients: usize,
    /// How many keys there are at first.
    pub keys: u64,
    /// The size of each value.
    pub value_bytes: usize,
    /// Writes all keys first.
    pub load: bool,
    /// Not measured.
    pub warmup: Duration,
    /// When the measured part ends.
    pub end: End,
    /// Of all that is random.
    pub seed: u64,
    /// Whose CPU time is measured.
    pub cpu_of: Vec<u32>,
}

/// When a phase ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// After this time no operation is begun any more.
    After(Duration),
    /// So many operations are made.
    Operations(u64),
}

impl End {
    /// Whether it is over before anything was done.
    pub fn is_at_once(self) -> bool {
        match self {
            Self::After(time) => time.is_zero(),
            Self::Operations(count) => count == 0,
        }
    }
}

/// What came out.
#[derive(Debug)]
pub struct Measured {
    /// All clients' counts.
    pub tally: Tally,
    /// From the first operation to the last answer.
    pub elapsed: Duration,
    /// CPU seconds of the processes in [`Plan::cpu_of`]; nothing when one of them has ended.
    pub server_cpu_s: Option<f64>,
    /// CPU seconds of this process.
    pub client_cpu_s: f64,
    /// Somebody pressed Ctrl-C: it is less than was asked for.
    pub interrupted: bool,
    /// Operations that were given up then, and not counted.
    pub abandoned: u64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The store could not be filled or connected to.
    #[error("{what}: {failure}")]
    Store {
        /// Doing what.
        what: String,
        /// The last failure.
        failure: Failure,
    },
    /// A process to watch cannot be watched.
    #[error("{0}")]
    Cpu(#[from] io::Error),
    /// Ctrl-C before there was anything to report.
    #[error("interrupted before anything was measured")]
    Interrupted,
}

/// What the clients of a phase share.
#[derive(Debug, Default)]
pub struct Gauge {
    begun: AtomicU64,
    answered: AtomicU64,
    failed: AtomicU64,
    stopped: AtomicBool,
}

impl Gauge {
    /// Operations that were answered.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Operations that failed.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Takes the turn for one more operation, if there is one.
    fn begin(&self, end: Limit) -> bool {
        let in_time = match end {
            Limit::At(deadline) => Instant::now() < deadline,
            Limit::Operations(count) => self.begun.fetch_add(1, Ordering::Relaxed) < count,
        };
        in_time && !self.stopped.load(Ordering::Relaxed)
    }

    fn count(&self, done: bool) {
        let counter = if done { &self.answered } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone, Copy)]
enum Limit {
    At(Instant),
    Operations(u64),
}

/// Random bytes to make values of.
#[derive(Debug, Clone)]
struct Values {
    pool: Bytes,
    value_bytes: usize,
}

impl Values {
    fn new(value_bytes: usize, seed: u64) -> Self {
        let mut pool = vec![0; value_bytes + VALUE_POOL_SPARE_BYTES];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut pool);
        Self { pool: pool.into(), value_bytes }
    }

    /// The value at any place below [`VALUE_POOL_SPARE_BYTES`].
    fn at(&self, place: usize) -> Bytes {
        self.pool.slice(place..place + self.value_bytes)
    }
}

/// One client of the load.
struct Client<S> {
    session: S,
    generator: Generator,
    keys: Arc<Keyspace>,
    values: Values,
    /// Shared with who reports, so that the counts of a client that never comes back are not lost.
    tally: Arc<Mutex<Tally>>,
}

impl<S: Session> Client<S> {
    async fn work(mut self, limit: Limit, gauge: Arc<Gauge>) -> Self {
        while gauge.begin(limit) {
            let operation = self.generator.next();
            let value = self.values.at(self.generator.random_below(VALUE_POOL_SPARE_BYTES));
            let begun = Instant::now();
            let result = execute(&mut self.session, operation, value).await;
            let took = begun.elapsed();
            let keys_read = match operation {
                Operation::Read(_) | Operation::ReadModifyWrite(_) => 1,
                Operation::MultiGet { count, .. } => count,
                Operation::Insert(_) | Operation::Update(_) => 0,
            };
            if let Operation::Insert(number) = operation {
                self.keys.inserted(number);
            }
            gauge.count(result.is_ok());
            lock(&self.tally).record(operation.kind(), keys_read, &result, took);
            if result.is_err() {
                tokio::time::sleep(FAILURE_PAUSE).await;
            }
        }
        self
    }
}

fn lock(tally: &Mutex<Tally>) -> std::sync::MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Carries the plan out. `stop` ends it early with what was measured so far.
pub async fn run<S: Store>(
    store: &S,
    plan: &Plan,
    stop: &CancellationToken,
) -> Result<Measured, RunError> {
    // Before the work: a wrong process id should not cost ten seconds.
    cpu::seconds_of(&plan.cpu_of)?;
    let values = Values::new(plan.value_bytes, plan.seed);
    if plan.load {
        load(store, plan, &values, stop).await?;
    }
    let clients = clients(store, plan, &values).await?;
    let tallies: Vec<_> = clients.iter().map(|client| client.tally.clone()).collect();
    let warmup = phase("warming up", clients, End::After(plan.warmup), stop).await;
    if stop.is_cancelled() {
        return Err(RunError::Interrupted);
    }
    for tally in &tallies {
        *lock(tally) = Tally::default();
    }
    let (own, theirs) = (cpu::seconds_of(&[std::process::id()])?, cpu::seconds_of(&plan.cpu_of)?);
    let ended = phase("measuring", warmup.clients, plan.end, stop).await;
    let client_cpu_s = cpu::seconds_of(&[std::process::id()])? - own;
    let server_cpu_s = cpu::seconds_of(&plan.cpu_of).ok().map(|now| now - theirs);
    let mut tally = Tally::default();
    for counts in &tallies {
        tally.merge(&lock(counts));
    }
    let (elapsed, abandoned) = (ended.elapsed, ended.abandoned);
    let interrupted = stop.is_cancelled();
    Ok(Measured { tally, elapsed, server_cpu_s, client_cpu_s, interrupted, abandoned })
}

async fn clients<S: Store>(
    store: &S,
    plan: &Plan,
    values: &Values,
) -> Result<Vec<Client<S::Session>>, RunError> {
    let keys = Arc::new(Keyspace::new(plan.keys));
    let chooser = Chooser::new(plan.distribution, plan.keys);
    let mut clients = Vec::with_capacity(plan.clients);
    for number in 0..plan.clients {
        let session = store.session(number).await.map_err(cannot("connect"))?;
        let client = number as u64;
        let generator = Generator::new(plan.workload, chooser, keys.clone(), plan.seed, client);
        let (keys, values, tally) = (keys.clone(), values.clone(), Arc::default());
        clients.push(Client { session, generator, keys, values, tally });
    }
    Ok(clients)
}

fn cannot(what: &str) -> impl FnOnce(Failure) -> RunError {
    let what = format!("cannot {what}");
    move |failure| RunError::Store { what, failure }
}

struct Ended<S> {
    clients: Vec<Client<S>>,
    elapsed: Duration,
    abandoned: u64,
}

/// Lets all clients work until `end` or `stop`.
async fn phase<S: Session>(
    name: &'static str,
    clients: Vec<Client<S>>,
    end: End,
    stop: &CancellationToken,
) -> Ended<S> {
    let gauge = Arc::new(Gauge::default());
    let begun = Instant::now();
    let (limit, of) = match end {
        End::After(time) => (Limit::At(begun + time), None),
        End::Operations(count) => (Limit::Operations(count), Some(count)),
    };
    let progress = Progress::start(name, of, gauge.clone());
    let mut tasks = JoinSet::new();
    for client in clients {
        tasks.spawn(client.work(limit, gauge.clone()));
    }
    let mut ended = Vec::with_capacity(tasks.len());
    let stopped = async {
        stop.cancelled().await;
        gauge.stopped.store(true, Ordering::Relaxed);
        tokio::time::sleep(STOP_GRACE).await;
    };
    tokio::pin!(stopped);
    loop {
        tokio::select! {
            joined = tasks.join_next() => match joined {
                Some(client) => ended.push(client.expect("no client panics or is aborted")),
                None => break,
            },
            () = &mut stopped => break,
        }
    }
    let elapsed = begun.elapsed();
    progress.stop().await;
    // Dropped with the set, these never report; their counts are read from outside.
    Ended { clients: ended, elapsed, abandoned: tasks.len() as u64 }
}

/// Writes every key once, in no order.
async fn load<S: Store>(
    store: &S,
    plan: &Plan,
    values: &Values,
    stop: &CancellationToken,
) -> Result<(), RunError> {
    let gauge = Arc::new(Gauge::default());
    let progress = Progress::start("loading", Some(plan.keys), gauge.clone());
    let mut tasks = JoinSet::new();
    for number in 0..plan.clients.max(LOAD_CLIENTS_MIN) {
        let session = store.session(number).await.map_err(cannot("connect"))?;
        tasks.spawn(write_share(session, gauge.clone(), plan.keys, values.clone()));
    }
    let all = async {
        while let Some(written) = tasks.join_next().await {
            written.expect("no writer panics or is aborted")?;
        }
        Ok(())
    };
    let result = tokio::select! {
        result = all => result,
        () = stop.cancelled() => Err(RunError::Interrupted),
    };
    progress.stop().await;
    result
}

/// Writes keys, one after the other, until all are written or one cannot be.
async fn write_share<S: Session>(
    mut session: S,
    gauge: Arc<Gauge>,
    keys: u64,
    values: Values,
) -> Result<(), RunError> {
    loop {
        let number = gauge.begun.fetch_add(1, Ordering::Relaxed);
        if number >= keys {
            return Ok(());
        }
        let key = key_of(number);
        // Any place will do, as long as neighbouring keys have different ones.
        let place = (number as usize).wrapping_mul(0x9e37_79b1) % VALUE_POOL_SPARE_BYTES;
        let mut attempt = 1;
        // Writing the same value again is harmless, whatever became of the first.
        while let Err(failure) = session.put(&key, values.at(place)).await {
            gauge.count(false);
            if attempt == LOAD_ATTEMPTS_MAX {
                return Err(cannot(&format!("write {key}"))(failure));
            }
            tokio::time::sleep(LOAD_PAUSE * 2_u32.pow(attempt - 1)).await;
            attempt += 1;
        }
        gauge.count(true);
    }
}
