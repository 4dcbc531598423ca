//! One key under watch: no linearizable read may be older than what was acknowledged before it began.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::line::Line;
use super::load::{Verdict, verdict};

/// The kinds of linearizable read, by their headers.
const KINDS: [&[(&str, &str)]; 2] = [&[], &[("Kv-Read", "follower")]];

/// A writer and readers of one key, on all nodes. Ends with its drop.
pub struct Watch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    targets: Vec<String>,
    timeout: Duration,
    /// The highest revision that was acknowledged.
    acknowledged: AtomicU64,
    reads: AtomicU64,
    stop: AtomicBool,
}

impl Watch {
    pub fn start(targets: Vec<String>, timeout: Duration) -> Self {
        let shared = Arc::new(Shared {
            targets,
            timeout,
            acknowledged: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let mut threads = Vec::new();
        let writer = Arc::clone(&shared);
        threads.push(std::thread::spawn(move || writer.write_on()));
        for target in 0..shared.targets.len() {
            for headers in KINDS {
                let reader = Arc::clone(&shared);
                threads.push(std::thread::spawn(move || reader.read_on(target, headers)));
            }
        }
        Self { shared, threads }
    }

    /// How many reads found something so far.
    pub fn reads(&self) -> u64 {
        self.shared.reads.load(Ordering::SeqCst)
    }

    /// Ends it; panics if a read was too old. Returns how many reads found something.
    pub fn stop(mut self) -> u64 {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in std::mem::take(&mut self.threads) {
            thread.join().expect("no read is older than what was acknowledged before it");
        }
        self.shared.reads.load(Ordering::SeqCst)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

impl Shared {
    fn write_on(&self) {
        let mut target = 0;
        let mut line = Line::new(&self.targets[0], self.timeout);
        while !self.stop.load(Ordering::SeqCst) {
            let answer = line.request("PUT", "/v1/kv/watched", &[], b"tick");
            match verdict(&answer) {
                Verdict::Acknowledged(revision) => {
                    self.acknowledged.fetch_max(revision, Ordering::SeqCst);
                }
                _ => {
                    target = (target + 1) % self.targets.len();
                    line = Line::new(&self.targets[target], self.timeout);
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }

    fn read_on(&self, target: usize, headers: &[(&str, &str)]) {
        let address = &self.targets[target];
        let mut line = Line::new(address, self.timeout);
        while !self.stop.load(Ordering::SeqCst) {
            let before = self.acknowledged.load(Ordering::SeqCst);
            let Ok(answer) = line.request("GET", "/v1/kv/watched", headers, b"") else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            let found = match answer.status {
                200 => answer.header("etag").and_then(|tag| tag.trim_matches('"').parse().ok()),
                404 => Some(0),
                _ => continue,
            };
            let found: u64 = found.expect("an answer has the record's revision");
            assert!(
                found >= before,
                "{address} {headers:?}: revision {before} was acknowledged before the read, which found {found}"
            );
            self.reads.fetch_add(1, Ordering::SeqCst);
        }
    }
}
