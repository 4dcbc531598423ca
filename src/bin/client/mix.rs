//! What the clients of a load do: a mix of operations, drawn one after the other.
//!
//! The mixes A to F are YCSB's core workloads. One differs: E asks for short scans, which this store
//! does not have on purpose (a ring spreads neighbouring keys). Its place takes a multi-get of the 1
//! to 100 keys that the scan would have returned.
//!
//! Pure but for [`Keyspace`], which the clients share: it hands out the numbers of new keys. A client's
//! stream of operations depends on the seed and its own number only, apart from those.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::distribution::{Chooser, Distribution};

/// The longest multi-get, as YCSB's longest scan.
const MULTI_GET_KEYS_MAX: u64 = 100;

/// A named mix of operations.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// Only updates.
    Write,
    /// Only reads.
    Read,
    /// Half reads, half updates.
    Mixed,
    /// YCSB A, a session store: half reads, half updates, zipfian.
    A,
    /// YCSB B, photo tags: 95 % reads, 5 % updates, zipfian.
    B,
    /// YCSB C, a cache: only reads, zipfian.
    C,
    /// YCSB D, status updates: 95 % reads of the newest keys, 5 % inserts.
    D,
    /// YCSB E, threads of messages: 95 % multi-gets of 1 to 100 keys instead of scans, 5 % inserts.
    E,
    /// YCSB F, a user database: half reads, half read-modify-writes (If-Match), zipfian.
    F,
}

/// A kind of operation.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Gets a key.
    Read,
    /// Replaces the value of a key.
    Update,
    /// Writes a key that did not exist.
    Insert,
    /// Gets neighbouring keys.
    MultiGet,
    /// Gets a key and replaces the value, if nobody else did meanwhile.
    ReadModifyWrite,
}

impl Workload {
    /// The kinds with their shares in percent, which add up to 100.
    pub fn shares(self) -> &'static [(Kind, u32)] {
        match self {
            Self::Write => &[(Kind::Update, 100)],
            Self::Read | Self::C => &[(Kind::Read, 100)],
            Self::Mixed | Self::A => &[(Kind::Read, 50), (Kind::Update, 50)],
            Self::B => &[(Kind::Read, 95), (Kind::Update, 5)],
            Self::D => &[(Kind::Read, 95), (Kind::Insert, 5)],
            Self::E => &[(Kind::MultiGet, 95), (Kind::Insert, 5)],
            Self::F => &[(Kind::Read, 50), (Kind::ReadModifyWrite, 50)],
        }
    }

    /// How its keys are spread unless something else is asked for.
    pub fn distribution(self) -> Distribution {
        match self {
            Self::Write | Self::Read | Self::Mixed => Distribution::Uniform,
            Self::D => Distribution::Latest,
            Self::A | Self::B | Self::C | Self::E | Self::F => Distribution::Zipfian,
        }
    }
}

/// One operation on keys by their numbers, see [`key_of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Gets the key.
    Read(u64),
    /// Replaces the value.
    Update(u64),
    /// Writes this new key.
    Insert(u64),
    /// Gets `count` keys from `first` on.
    MultiGet {
        /// The first key.
        first: u64,
        /// How many; all of them exist, unless inserts failed.
        count: u64,
    },
    /// Gets the key and replaces the value if the revision is still the same.
    ReadModifyWrite(u64),
}

impl Operation {
    /// Its kind.
    pub fn kind(self) -> Kind {
        match self {
            Self::Read(_) => Kind::Read,
            Self::Update(_) => Kind::Update,
            Self::Insert(_) => Kind::Insert,
            Self::MultiGet { .. } => Kind::MultiGet,
            Self::ReadModifyWrite(_) => Kind::ReadModifyWrite,
        }
    }
}

/// The name of a key. 16 bytes, none of which needs an escape in a URL.
pub fn key_of(number: u64) -> String {
    format!("user{number:012}")
}

/// How many keys there are. Grows by inserts.
#[derive(Debug)]
pub struct Keyspace {
    next: AtomicU64,
    /// Below this all inserts have ended.
    ended: AtomicU64,
    /// Inserts at and above `ended` that have ended too, while an earlier one has not: at most as
    /// many as there are clients.
    out_of_turn: Mutex<BTreeSet<u64>>,
}

impl Keyspace {
    /// Keys 0 to `keys - 1` exist.
    pub fn new(keys: u64) -> Self {
        let (next, ended) = (AtomicU64::new(keys), AtomicU64::new(keys));
        Self { next, ended, out_of_turn: Mutex::default() }
    }

    /// How many keys, from 0, reads may ask for.
    pub fn readable(&self) -> u64 {
        self.ended.load(Ordering::Acquire)
    }

    /// The number of a new key, which must come back by [`Self::inserted`].
    fn claim(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// An insert has ended. A failed one too: nobody must wait for it for ever, and a read that finds
    /// nothing is counted as such.
    pub fn inserted(&self, number: u64) {
        let mut waiting = self.out_of_turn.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(number);
        let mut ended = self.ended.load(Ordering::Acquire);
        while waiting.remove(&ended) {
            ended += 1;
        }
        self.ended.store(ended, Ordering::Release);
    }
}

/// The stream of one client's operations.
#[derive(Debug)]
pub struct Generator {
    shares: &'static [(Kind, u32)],
    chooser: Chooser,
    keys: Arc<Keyspace>,
    rng: SmallRng,
}

impl Generator {
    /// The stream of the client with this number. Streams of different clients do not resemble each
    /// other.
    pub fn new(
        workload: Workload,
        chooser: Chooser,
        keys: Arc<Keyspace>,
        seed: u64,
        client: u64,
    ) -> Self {
        // Odd and large, so that seeds next to each other do not share clients' streams.
        let stream = seed.wrapping_add(client.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let rng = SmallRng::seed_from_u64(stream);
        Self { shares: workload.shares(), chooser, keys, rng }
    }

    /// What to do next.
    pub fn next(&mut self) -> Operation {
        match self.kind() {
            Kind::Read => Operation::Read(self.existing()),
            Kind::Update => Operation::Update(self.existing()),
            Kind::ReadModifyWrite => Operation::ReadModifyWrite(self.existing()),
            Kind::Insert => Operation::Insert(self.keys.claim()),
            Kind::MultiGet => {
                let first = self.existing();
                let there_are = self.keys.readable() - first;
                let count = self.rng.random_range(1..=MULTI_GET_KEYS_MAX).min(there_are);
                Operation::MultiGet { first, count }
            }
        }
    }

    fn existing(&mut self) -> u64 {
        self.chooser.draw(&mut self.rng, self.keys.readable())
    }

    /// A number for whatever else the client chooses, such as the bytes of a value.
    pub fn random_below(&mut self, end: usize) -> usize {
        self.rng.random_range(0..end)
    }

    fn kind(&mut self) -> Kind {
        let mut left = self.rng.random_range(0..100);
        for &(kind, percent) in self.shares {
            if left < percent {
                return kind;
            }
            left -= percent;
        }
        unreachable!("the shares {:?} add up to 100", self.shares)
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    const KEYS: u64 = 1_000;

    fn generator(workload: Workload, seed: u64, client: u64) -> Generator {
        let chooser = Chooser::new(workload.distribution(), KEYS);
        Generator::new(workload, chooser, Arc::new(Keyspace::new(KEYS)), seed, client)
    }

    #[test]
    fn shares_add_up() {
        for workload in Workload::value_variants() {
            let sum: u32 = workload.shares().iter().map(|&(_, percent)| percent).sum();
            assert_eq!(sum, 100, "{workload:?}");
        }
    }

    /// Each mix comes out as it is described, within five standard deviations; the seed is fixed.
    #[test]
    fn mixes_come_out_as_described() {
        const DRAWS: u32 = 20_000;
        for workload in Workload::value_variants() {
            let mut generator = generator(*workload, 3, 0);
            let kinds: Vec<Kind> = (0..DRAWS).map(|_| generator.next().kind()).collect();
            for &(kind, percent) in workload.shares() {
                let share = f64::from(percent) / 100.0;
                let count = kinds.iter().filter(|&&drawn| drawn == kind).count() as f64;
                let bound = 5.0 * (f64::from(DRAWS) * share * (1.0 - share)).sqrt() + 0.5;
                let expected = f64::from(DRAWS) * share;
                assert!((count - expected).abs() < bound, "{workload:?} {kind:?}: {count}");
            }
        }
    }

    /// The same seed and client: the same stream. Another of either: another stream.
    #[test]
    fn a_stream_depends_on_seed_and_client() {
        for workload in Workload::value_variants() {
            let stream = |seed, client| {
                let mut generator = generator(*workload, seed, client);
                (0..200).map(|_| generator.next()).collect::<Vec<_>>()
            };
            assert_eq!(stream(1, 0), stream(1, 0), "{workload:?}");
            assert_ne!(stream(1, 0), stream(1, 1), "{workload:?}");
            assert_ne!(stream(1, 0), stream(2, 0), "{workload:?}");
        }
    }

    /// Only keys that exist are asked for, and multi-gets have 1 to 100 of them.
    #[test]
    fn operations_stay_within_the_keys() {
        for workload in Workload::value_variants() {
            let mut generator = generator(*workload, 5, 1);
            for _ in 0..2_000 {
                let end = match generator.next() {
                    Operation::Read(key)
                    | Operation::Update(key)
                    | Operation::ReadModifyWrite(key) => key + 1,
                    Operation::MultiGet { first, count } => {
                        assert!((1..=MULTI_GET_KEYS_MAX).contains(&count));
                        first + count
                    }
                    // Never ended here, so never readable.
                    Operation::Insert(key) => {
                        assert!(key >= KEYS);
                        KEYS
                    }
                };
                assert!(end <= KEYS);
            }
        }
    }

    /// A new key can be read once all inserts before it have ended too, in whatever order they end.
    #[test]
    fn inserts_become_readable_in_order() {
        let keys = Keyspace::new(10);
        let claimed: Vec<u64> = (0..3).map(|_| keys.claim()).collect();
        assert_eq!(claimed, [10, 11, 12]);
        keys.inserted(12);
        assert_eq!(keys.readable(), 10);
        keys.inserted(10);
        assert_eq!(keys.readable(), 11);
        keys.inserted(11);
        assert_eq!(keys.readable(), 13);
    }

    #[test]
    fn keys_are_sixteen_plain_bytes() {
        assert_eq!(key_of(7), "user000000000007");
        assert_eq!(distrib_kv_store::key_path::encode(key_of(7).as_bytes()), key_of(7));
    }
}
