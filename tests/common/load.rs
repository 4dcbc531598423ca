//! Concurrent writers, and the check that what they were promised is there.
//!
//! Every writer has keys of its own and overwrites them one request at a time, so that for each key
//! the promise is simple: it holds the value that was acknowledged last, at the revision that the
//! acknowledgement named - or one whose outcome stayed unknown, which may take effect at any later
//! moment, because it may still lie in the buffers of a node that was paused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::line::{Line, Lost};
use super::{Answer, PATIENCE};

/// Numbers the values, so that no two writes of a test process write the same.
static VALUES: AtomicU64 = AtomicU64::new(0);

/// How the writers work.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    pub writers: usize,
    /// Keys of each writer; it goes round.
    pub keys: u64,
    pub value_bytes: usize,
    /// Before the name of every key.
    pub prefix: String,
    /// Of one request.
    pub timeout: Duration,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            writers: 4,
            keys: 100,
            value_bytes: 100,
            prefix: "k".into(),
            timeout: Duration::from_secs(5),
        }
    }
}

/// What is known about one key.
#[derive(Debug, Clone, Default)]
pub struct Promise {
    /// The value and the revision of the last acknowledged write.
    pub acknowledged: Option<(String, u64)>,
    /// Values of writes whose outcome is not known.
    pub unknown: BTreeSet<String>,
}

/// What is known about all keys.
#[derive(Debug, Clone, Default)]
pub struct Promises {
    pub keys: BTreeMap<String, Promise>,
    /// How many writes were acknowledged.
    pub acknowledged: u64,
    /// How many ended with an unknown outcome.
    pub unknown: u64,
}

/// Running writers.
pub struct Load {
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<()>>,
}

struct Shared {
    options: LoadOptions,
    /// Where to write; a writer that gets no further goes to the next.
    targets: Vec<String>,
    stop: AtomicBool,
    acknowledged: AtomicU64,
    promises: Mutex<Promises>,
}

impl Load {
    /// Starts the writers.
    pub fn start(targets: Vec<String>, options: LoadOptions) -> Self {
        Self::resume(targets, options, Promises::default())
    }

    /// Starts writers that go on after others with the same options.
    pub fn resume(targets: Vec<String>, options: LoadOptions, promises: Promises) -> Self {
        let shared = Arc::new(Shared {
            targets,
            stop: AtomicBool::new(false),
            acknowledged: AtomicU64::new(promises.acknowledged),
            promises: Mutex::new(promises),
            options,
        });
        let writers = (0..shared.options.writers)
            .map(|writer| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || shared.write_on(writer))
            })
            .collect();
        Self { shared, writers }
    }

    /// How many writes were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits until so many writes more are acknowledged, for as long as any are.
    #[track_caller]
    pub fn await_more(&self, what: &str, count: u64) {
        let goal = self.acknowledged() + count;
        super::eventually_by_progress(
            &format!("{count} writes more are acknowledged: {what}"),
            || self.acknowledged(),
            || (self.acknowledged() >= goal).then_some(()),
        );
    }

    /// Stops the writers and returns what they were promised.
    pub fn stop(mut self) -> Promises {
        self.shared.stop.store(true, Ordering::SeqCst);
        for writer in std::mem::take(&mut self.writers) {
            writer.join().expect("a writer does not panic");
        }
        self.shared.promises.lock().unwrap().clone()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

impl Shared {
    fn write_on(&self, writer: usize) {
        let mut target = writer;
        let mut line = self.line(target);
        for turn in 0.. {
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let key = format!("{}-{writer}-{}", self.options.prefix, turn % self.options.keys);
            let number = VALUES.fetch_add(1, Ordering::SeqCst);
            let value = padded(&format!("{writer}:{number}:"), self.options.value_bytes);
            let answer = line.request("PUT", &format!("/v1/kv/{key}"), &[], value.as_bytes());
            if !self.note(&key, value, answer) {
                // A moment for an election; the next node may know more.
                std::thread::sleep(Duration::from_millis(5));
                target += 1;
                line = self.line(target);
            }
        }
    }

    fn line(&self, target: usize) -> Line {
        Line::new(&self.targets[target % self.targets.len()], self.options.timeout)
    }

    /// Records what an answer means; whether it was an acknowledgement.
    fn note(&self, key: &str, value: String, answer: Result<Answer, Lost>) -> bool {
        let verdict = verdict(&answer);
        let mut promises = self.promises.lock().unwrap();
        match verdict {
            Verdict::Acknowledged(revision) => {
                promises.acknowledged += 1;
                promises.keys.entry(key.to_owned()).or_default().acknowledged =
                    Some((value, revision));
                self.acknowledged.fetch_add(1, Ordering::SeqCst);
                true
            }
            Verdict::Unknown => {
                promises.unknown += 1;
                promises.keys.entry(key.to_owned()).or_default().unknown.insert(value);
                false
            }
            Verdict::NotApplied => false,
        }
    }
}

/// What a write's answer promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Acknowledged(u64),
    NotApplied,
    Unknown,
}

/// Reads the promise out of an answer. Panics on one that the contract does not know.
pub fn verdict(answer: &Result<Answer, Lost>) -> Verdict {
    match answer {
        Ok(answer) if answer.status == 200 => {
            Verdict::Acknowledged(answer.json()["revision"].as_u64().expect("a revision"))
        }
        Ok(answer) => match answer.json()["error"]["outcome"].as_str() {
            Some("not_applied") => Verdict::NotApplied,
            Some("unknown") => Verdict::Unknown,
            _ => panic!("an answer outside the contract: {} {}", answer.status, answer.text()),
        },
        Err(Lost::NotSent) => Verdict::NotApplied,
        Err(Lost::Maybe(_)) => Verdict::Unknown,
    }
}

impl Promises {
    /// Reads every key at `address` and checks that it holds what was promised. `query` and `headers`
    /// choose the kind of read.
    #[track_caller]
    pub fn check(&self, address: &str, query: &str, headers: &[(&str, &str)]) {
        let mut line = Line::new(address, PATIENCE);
        for (key, promise) in &self.keys {
            let path = format!("/v1/kv/{key}{query}");
            let answer = super::eventually(&format!("{path} is answered by {address}"), || {
                // While a leader is being found, a node may say that there is none.
                let answer = line.request("GET", &path, headers, b"").ok()?;
                matches!(answer.status, 200 | 404).then_some(answer)
            });
            promise.check(key, &answer);
        }
    }

    /// Every linearizable read through every one of these nodes finds what was promised.
    #[track_caller]
    pub fn check_all(&self, addresses: &[String]) {
        for address in addresses {
            self.check(address, "", &[]);
        }
    }
}

impl Promise {
    #[track_caller]
    fn check(&self, key: &str, answer: &Answer) {
        let found = (answer.status == 200).then(|| answer.text());
        let revision = answer.header("etag").map(str::to_owned);
        if let Some(text) = &found
            && self.unknown.contains(text)
        {
            return;
        }
        let (promised, at) = match &self.acknowledged {
            Some((value, at)) => (Some(value), Some(format!("\"{at}\""))),
            None => (None, None),
        };
        let short = |text: Option<&String>| text.map(|t| t.chars().take(20).collect::<String>());
        let seen = (short(found.as_ref()), revision);
        assert!(
            found.as_ref() == promised && seen.1 == at,
            "{key}: acknowledged {:?} at {at:?}, unknown {:?}, but found {seen:?}",
            short(promised),
            self.unknown.iter().map(|t| short(Some(t))).collect::<Vec<_>>(),
        );
    }
}

/// A text of so many bytes that no compression makes smaller.
fn padded(text: &str, bytes: usize) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-";
    let mut state = super::cluster::splitmix(text.len() as u64 ^ seed_of(text));
    let mut value = text.to_owned();
    while value.len() < bytes {
        state = super::cluster::splitmix(state);
        let letters = (0..10).map(|n| LETTERS[(state >> (6 * n)) as usize % 64] as char);
        value.extend(letters.take(bytes - value.len()));
    }
    value
}

fn seed_of(text: &str) -> u64 {
    text.bytes().fold(0, |seed, byte| super::cluster::splitmix(seed ^ u64::from(byte)))
}
