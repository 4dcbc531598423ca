//! The load, and what it finds: tasks that write and read keys of their own and know what must be there.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use distrib_kv_store::kvclient::{ClientError, KVClient};
use tokio::task::JoinSet;

/// The size of every value, in bytes.
pub const VALUE_BYTES: usize = 100;

/// Tasks that write all keys before the load and read them after it: so many that each request that a
/// client sends carries hundreds of operations.
const FILLERS: u32 = 1024;

/// How many things that went wrong are described. All are counted.
const TOLD_MAX: u64 = 10;

/// The name of a key.
pub fn key(number: u32) -> String {
    format!("user:{number:08}")
}

/// The value of a key after so many writes.
fn value(version: u32) -> String {
    format!("{version:0VALUE_BYTES$}")
}

/// What happened so far.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    done: u64,
    lost: u64,
    stale: u64,
    errors: u64,
}

impl Counts {
    /// Operations that were answered.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Whether nothing went wrong.
    pub fn is_clean(&self) -> bool {
        self.lost + self.stale + self.errors == 0
    }

    /// What happened between the other and this one.
    pub fn since(&self, other: &Self) -> Self {
        Self {
            done: self.done - other.done,
            lost: self.lost - other.lost,
            stale: self.stale - other.stale,
            errors: self.errors - other.errors,
        }
    }

    /// Adds what went wrong elsewhere.
    pub fn add(&mut self, other: &Self) {
        self.lost += other.lost;
        self.stale += other.stale;
        self.errors += other.errors;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} / {} / {}", self.lost, self.stale, self.errors)
    }
}

/// What tasks add to.
#[derive(Default)]
struct Tally {
    stop: AtomicBool,
    done: AtomicU64,
    lost: AtomicU64,
    stale: AtomicU64,
    errors: AtomicU64,
    told: AtomicU64,
    longest_us: AtomicU64,
}

impl Tally {
    fn tell(&self, counter: &AtomicU64, what: impl FnOnce() -> String) {
        counter.fetch_add(1, Relaxed);
        if self.told.fetch_add(1, Relaxed) < TOLD_MAX {
            eprintln!("{}", what());
        }
    }

    fn check(&self, number: u32, known: Known, found: Result<Option<Bytes>, ClientError>) {
        let key = key(number);
        let found = match found {
            Ok(found) => found,
            Err(error) => return self.tell(&self.errors, || format!("reading {key}: {error}")),
        };
        let Some(found) = found else {
            return self.tell(&self.lost, || format!("{key} is gone; it was at {known:?}"));
        };
        let found = str::from_utf8(&found).ok().and_then(|text| text.parse::<u32>().ok());
        if !found.is_some_and(|found| known.allows(found)) {
            self.tell(&self.stale, || format!("{key} is at {found:?}; it was at {known:?}"));
        }
    }
}

/// How often a key has been written: acknowledged, and tried.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    acknowledged: u32,
    tried: u32,
}

impl Known {
    fn allows(self, found: u32) -> bool {
        (self.acknowledged..=self.tried).contains(&found)
    }
}

/// Writes every key.
pub async fn fill(client: &KVClient, keys: u32) {
    // Patient: a thousand tasks at once are for throughput and not for anybody's deadline.
    let client = client.clone().with_timeout(Duration::from_secs(60));
    let mut tasks = JoinSet::new();
    for task in 0..FILLERS {
        let client = client.clone();
        tasks.spawn(async move {
            for number in (task..keys).step_by(FILLERS as usize) {
                client.write(key(number), value(0)).await.expect("a write succeeds");
            }
        });
    }
    tasks.join_all().await;
}

/// Tasks at work.
pub struct Load {
    tally: Arc<Tally>,
    tasks: Mutex<JoinSet<(u32, Vec<Known>)>>,
    stride: u32,
}

impl Load {
    /// Starts them; each has its own share of the keys.
    pub fn start(client: &KVClient, keys: u32, tasks: u32) -> Self {
        assert!(keys >= tasks, "every task needs a key");
        let tally = Arc::new(Tally::default());
        let mut set = JoinSet::new();
        for task in 0..tasks {
            let share = (task..keys).step_by(tasks as usize).count();
            let known = vec![Known::default(); share];
            set.spawn(run(client.clone(), Arc::clone(&tally), task, tasks, known));
        }
        Self { tally, tasks: Mutex::new(set), stride: tasks }
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        let Tally { done, lost, stale, errors, .. } = &*self.tally;
        let [done, lost, stale, errors] = [done, lost, stale, errors].map(|c| c.load(Relaxed));
        Counts { done, lost, stale, errors }
    }

    /// The longest operation since this was asked last.
    pub fn take_longest(&self) -> Duration {
        Duration::from_micros(self.tally.longest_us.swap(0, Relaxed))
    }

    /// Ends the load and reads every key, with a client that knows nothing yet; what was wrong then.
    pub async fn stop_and_verify(&self, nodes_file: &Path) -> Counts {
        self.tally.stop.store(true, Relaxed);
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let mut all = Vec::new();
        for (task, known) in tasks.join_all().await {
            let numbered = (task..).step_by(self.stride as usize).zip(known);
            all.extend(numbered);
        }
        let before = self.counts();
        let client = KVClient::new(nodes_file).await.expect("the clusters answer");
        let client = client.with_timeout(Duration::from_secs(60));
        let all = Arc::new(all);
        let mut readers = JoinSet::new();
        for reader in 0..FILLERS as usize {
            let (client, all, tally) = (client.clone(), Arc::clone(&all), Arc::clone(&self.tally));
            readers.spawn(async move {
                for (number, known) in all.iter().skip(reader).step_by(FILLERS as usize) {
                    tally.check(*number, *known, client.consistent_read(key(*number)).await);
                }
            });
        }
        readers.join_all().await;
        let seen: HashSet<u32> = all.iter().map(|(number, _)| *number).collect();
        assert_eq!(seen.len(), all.len(), "every key belongs to one task");
        self.counts().since(&before)
    }
}

/// One task: a write or a read of one of its keys after the other, until it is told to stop.
async fn run(
    client: KVClient,
    tally: Arc<Tally>,
    task: u32,
    stride: u32,
    mut known: Vec<Known>,
) -> (u32, Vec<Known>) {
    while !tally.stop.load(Relaxed) {
        let place = rand::random_range(0..known.len());
        let number = task + place as u32 * stride;
        let known = &mut known[place];
        let begun = Instant::now();
        if rand::random() {
            known.tried += 1;
            match client.write(key(number), value(known.tried)).await {
                Ok(_) => known.acknowledged = known.tried,
                Err(error) => {
                    tally.tell(&tally.errors, || format!("writing {}: {error}", key(number)))
                }
            }
        } else {
            let found = client.consistent_read(key(number)).await;
            tally.check(number, *known, found);
        }
        let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        tally.longest_us.fetch_max(took, Relaxed);
        tally.done.fetch_add(1, Relaxed);
    }
    (task, known)
}
