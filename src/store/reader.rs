//! The read side of the state machine: what a node answers reads from.
//!
//! A read looks at the ring and at the data in one moment: both are replaced only under the write
//! lock of [`View`], so a key that moves away can never be read as "absent" in between.
//!
//! It looks into the memtables first, then into the cache of rows, then into RocksDB. Between the looks rows may
//! move from the first to the others, never back, so whatever was there is found, or something newer.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use bytes::Bytes;
use rocksdb::{Direction, IteratorMode};
use tokio::sync::watch;

use crate::handoff::RingState;
use crate::metrics::COUNTED_KEYS_MAX;
use crate::ring::RingTable;
use crate::types::{ClusterId, LogId, Record, Revision};

use super::engine::{CF_LOG, Engine, to_io};
use super::flush::Flushes;
use super::image::NewestImage;
use super::machine::{CHUNKED, Machine, stored_chunks};
use super::memtable::{Memtables, Row, RowCacheStats};
use super::meta::{self, Progress};

/// Up to this many bytes of data, and [`COUNTED_KEYS_MAX`] keys by RocksDB's estimate,
/// [`StateReader::key_count`] counts: that takes milliseconds. Above, it takes the estimate.
const COUNT_BYTES_MAX: u64 = 32 << 20;

/// An estimate that is too low by more than this factor is noticed while counting, and counting ends.
const ESTIMATE_FACTOR_MAX: u64 = 10;

/// What the state machine and its readers share.
pub(super) struct StateShared {
    pub(super) engine: Arc<Engine>,
    pub(super) cluster: ClusterId,
    machine: Mutex<Machine>,
    pub(super) memtables: Memtables,
    pub(super) flushes: Flushes,
    /// The current one of [`super::image::Images`].
    pub(super) image: Mutex<NewestImage>,
    log_bytes_max: u64,
    view: RwLock<View>,
    revision: AtomicU64,
    log_time_ms: AtomicU64,
    applied: Mutex<Option<LogId>>,
}

/// What must be seen together.
#[derive(Clone)]
pub(super) struct View {
    /// The active data column family.
    pub(super) data: String,
    /// As of the last step of a change: its tallies and positions are those of then.
    pub(super) ring: Arc<RingState>,
}

impl StateShared {
    pub(super) fn new(
        engine: Arc<Engine>,
        cluster: ClusterId,
        machine: Mutex<Machine>,
        memtables: Memtables,
        flushes: Flushes,
        log_bytes_max: u64,
        view: View,
    ) -> Self {
        let progress = memtables.read().head().progress;
        let log_time_ms = machine.lock().map_or(0, |machine| machine.dedupe.log_time_ms());
        Self {
            engine,
            cluster,
            machine,
            memtables,
            flushes,
            image: Mutex::default(),
            log_bytes_max,
            view: RwLock::new(view),
            revision: AtomicU64::new(progress.revision),
            log_time_ms: AtomicU64::new(log_time_ms),
            applied: Mutex::new(progress.last_applied),
        }
    }

    /// The machine; [`super::machine`] says in which order locks are taken.
    pub(super) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().expect("no code panics while it holds this lock")
    }

    pub(super) fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().expect("no code panics while it holds this lock")
    }

    /// Held while ring or data family change, together with the rows that belong to the change.
    pub(super) fn view_mut(&self) -> RwLockWriteGuard<'_, View> {
        self.view.write().expect("no code panics while it holds this lock")
    }

    /// A key's newest row, from memory or disk.
    pub(super) fn row(&self, data: &str, key: &[u8]) -> io::Result<Option<Bytes>> {
        if let Some(row) = self.memtables.read().get(key) {
            return Ok(row.to_bytes());
        }
        let cache = self.memtables.cache();
        let missed = match cache.get(key, Bytes::copy_from_slice) {
            Ok(row) => return Ok(Some(row)),
            Err(missed) => missed,
        };
        let mut stored = Vec::new();
        meta::record_key(key, &mut stored);
        let found = self.engine.db().get_cf(&self.engine.family(data)?, &stored).map_err(to_io)?;
        if let Some(row) = &found {
            cache.put(missed, key, row);
        }
        Ok(found.map(Bytes::from))
    }

    /// Whether the newest image is on its way to a follower. Until that has it, the log after it should
    /// stay: or the follower would have to begin again with a newer one as soon as it is there.
    fn is_image_being_sent(&self) -> bool {
        let image = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        image.is_being_sent(Instant::now())
    }

    /// Whether newer images wait for the newest one, which is on its way to a follower. Not once the log has
    /// become too long for that.
    pub(super) fn puts_off_images(&self) -> bool {
        // Without knowing, an image is the safe choice: it costs a follower time, and no disk.
        self.is_image_being_sent() && self.log_size().is_ok_and(|log| log.bytes <= log.bytes_max)
    }

    pub(super) fn log_size(&self) -> io::Result<LogSize> {
        let number = |property| self.engine.number(CF_LOG, property);
        let bytes =
            number("rocksdb.estimate-live-data-size")? + number("rocksdb.cur-size-all-mem-tables")?;
        let mut bytes_max = self.log_bytes_max;
        if self.is_image_being_sent() {
            // Up to there the log costs less than to send the state once more.
            bytes_max = bytes_max.max(self.disk_bytes()?);
        }
        Ok(LogSize { bytes, bytes_max })
    }

    /// Bytes of the live data's files on disk.
    fn disk_bytes(&self) -> io::Result<u64> {
        self.engine.number(&self.view().data, "rocksdb.total-sst-files-size")
    }

    /// Tells readers what they can read by now. Comes after it is readable and before it is answered.
    pub(super) fn publish(&self, progress: &Progress, log_time_ms: u64) {
        self.revision.store(progress.revision, Ordering::Release);
        self.log_time_ms.store(log_time_ms, Ordering::Release);
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = progress.last_applied;
    }
}

/// The Raft log's size on disk and in memtables, with what a purge has not removed yet.
#[derive(Debug, Clone, Copy)]
pub struct LogSize {
    /// In bytes.
    pub bytes: u64,
    /// Above this it is to be cut: `storage.log_bytes_max`, or the size of the state while that is being sent
    /// to a follower, if it is larger.
    pub bytes_max: u64,
}

/// What a read found.
#[derive(Debug, Clone)]
pub enum Lookup {
    /// The key's record.
    Found(Record),
    /// The cluster owns the key, and it has no record.
    Absent,
    /// By this ring state the cluster does not serve the key.
    NotHere(Arc<RingState>),
}

/// Keys that are looked up without letting others have a turn. Each may take a block from the disk, and
/// Raft's heartbeats and votes may wait on the same thread.
const LOOKUPS_AT_ONCE: usize = 64;

/// How much values may still take that are answered together.
struct ValueRoom {
    taken: usize,
    bytes_max: usize,
    /// Whether a value had no room.
    is_full: bool,
}

impl ValueRoom {
    fn new(bytes_max: usize) -> Self {
        Self { taken: 0, bytes_max, is_full: false }
    }

    /// Whether there is room for a value of so many bytes, which it then has.
    fn take(&mut self, bytes: usize) -> bool {
        if self.taken > 0 && self.taken.saturating_add(bytes) > self.bytes_max {
            self.is_full = true;
            return false;
        }
        self.taken += bytes;
        true
    }
}

/// A handle for reading applied state. Cheap to clone; reads may block on the disk for a block.
#[derive(Clone)]
pub struct StateReader {
    pub(super) shared: Arc<StateShared>,
}

impl StateReader {
    /// Looks a key up, checking in the same moment that this cluster owns it.
    pub fn get(&self, key: &[u8]) -> io::Result<Lookup> {
        let mut found = Vec::with_capacity(1);
        self.get_some(&[key], &mut ValueRoom::new(usize::MAX), &mut found)?;
        Ok(found.pop().expect("the first key is always looked up"))
    }

    /// Looks keys up as if one after the other. Stops, with fewer answers than keys, before the values take more
    /// than `bytes_max`; the first has room in any case. Lets others have a turn now and then; nothing is
    /// lost when it is cancelled.
    pub async fn get_many(&self, keys: &[&[u8]], bytes_max: usize) -> io::Result<Vec<Lookup>> {
        let mut room = ValueRoom::new(bytes_max);
        let mut found = Vec::with_capacity(keys.len());
        for some in keys.chunks(LOOKUPS_AT_ONCE) {
            if !found.is_empty() {
                tokio::task::yield_now().await;
            }
            if some.len() > 1 {
                self.shared.memtables.touch(some);
            }
            self.get_some(some, &mut room, &mut found)?;
            if room.is_full {
                break;
            }
        }
        Ok(found)
    }

    /// Looks keys up, all in the same view of ring and data family; a write may take effect between
    /// one key and the next. Stops before a value that has no `room`.
    fn get_some(
        &self,
        keys: &[&[u8]],
        room: &mut ValueRoom,
        found: &mut Vec<Lookup>,
    ) -> io::Result<()> {
        let engine = &self.shared.engine;
        engine.check()?;
        let view = self.shared.view();
        let family = engine.family(&view.data)?;
        let mut stored = Vec::new();
        let mut look_up = |key: &[u8]| -> io::Result<Lookup> {
            if !view.ring.serves(&self.shared.cluster, key) {
                return Ok(Lookup::NotHere(view.ring.clone()));
            }
            let lookup = |row: Row<'_>| -> io::Result<Lookup> {
                let Some(stored) = row.record() else { return Ok(Lookup::Absent) };
                let (revision, tag, value) = meta::decode_row(stored)?;
                if tag.is_some_and(|tag| !view.ring.is_live(tag, key)) {
                    return Ok(Lookup::Absent);
                }
                let value = match row {
                    Row::Large(record) => record.slice(value..),
                    _ => Bytes::copy_from_slice(&stored[value..]),
                };
                Ok(Lookup::Found(Record { revision, value }))
            };
            if let Some(row) = self.shared.memtables.read().get(key) {
                return lookup(row);
            }
            let cache = self.shared.memtables.cache();
            let missed = match cache.get(key, |row| lookup(Row::Near(row))) {
                Ok(found) => return found,
                Err(missed) => missed,
            };
            meta::record_key(key, &mut stored);
            let Some(row) = engine.db().get_pinned_cf(&family, &stored).map_err(to_io)? else {
                return Ok(Lookup::Absent);
            };
            let found = lookup(Row::Near(&row))?;
            cache.put(missed, key, &row);
            Ok(found)
        };
        for key in keys {
            let lookup = look_up(key)?;
            if let Lookup::Found(record) = &lookup
                && !room.take(record.value.len())
            {
                break;
            }
            found.push(lookup);
        }
        Ok(())
    }

    /// The ring that the cluster lives by; epoch 0 before the first one.
    pub fn ring(&self) -> Arc<RingTable> {
        self.shared.view().ring.ring.clone()
    }

    /// The ring and the change of it that is under way, as reads see them. For what steps of a change
    /// count meanwhile, see [`Self::ring_state`].
    pub fn ring_view(&self) -> Arc<RingState> {
        self.shared.view().ring.clone()
    }

    /// The state machine's revision counter.
    pub fn revision(&self) -> Revision {
        self.shared.revision.load(Ordering::Acquire)
    }

    /// Log time as applied here, in milliseconds.
    pub fn log_time_ms(&self) -> u64 {
        self.shared.log_time_ms.load(Ordering::Acquire)
    }

    /// The last entry whose changes a read that begins now will see. What this node answered as
    /// applied lies at or before it.
    pub fn last_applied(&self) -> Option<LogId> {
        *self.shared.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many keys there are: counted when they are few, RocksDB's estimate when they are many.
    pub fn key_count(&self) -> io::Result<u64> {
        let engine = &self.shared.engine;
        let view = self.shared.view();
        let property = |name| engine.number(&view.data, name);
        let on_disk = property("rocksdb.estimate-num-keys")?;
        let bytes = property("rocksdb.total-sst-files-size")?;
        let newer = self.shared.memtables.read();
        // Some of them may be on disk as well. The head and what goes with it are no keys.
        let family = engine.family(&view.data)?;
        let mut others = 2;
        for prefix in CHUNKED {
            others += u64::from(stored_chunks(engine.db(), &family, prefix)?);
        }
        let estimate = (on_disk + newer.unflushed_records()).saturating_sub(others);
        if estimate > COUNTED_KEYS_MAX || bytes > COUNT_BYTES_MAX {
            return Ok(estimate);
        }
        let there = newer.keys().filter(|(_, there)| *there).count() as u64;
        let mut count = there;
        let records = IteratorMode::From(meta::RECORDS, Direction::Forward);
        for item in engine.db().iterator_cf(&family, records) {
            let (stored, _) = item.map_err(to_io)?;
            count += u64::from(!newer.is_unflushed(meta::key_of(&stored)?));
            if count > ESTIMATE_FACTOR_MAX * COUNTED_KEYS_MAX {
                return Ok(count.max(estimate));
            }
        }
        Ok(count)
    }

    /// Bytes of the live data's files on disk; without the log, memtables and staged snapshots.
    pub fn disk_bytes(&self) -> io::Result<u64> {
        self.shared.disk_bytes()
    }

    /// What the cache of rows has done, and holds.
    pub fn row_cache(&self) -> RowCacheStats {
        self.shared.memtables.cache().stats()
    }

    /// `storage.log_bytes_max`.
    pub fn log_bytes_max(&self) -> u64 {
        self.shared.log_bytes_max
    }

    /// How large the Raft log is, and may be.
    pub fn log_size(&self) -> io::Result<LogSize> {
        self.shared.log_size()
    }

    /// Tells when storage has failed, and why.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.shared.engine.failure()
    }
}
