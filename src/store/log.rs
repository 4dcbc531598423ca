//! The Raft log and the vote, as openraft's `RaftLogStorage`.
//!
//! The log is `(purged, last]`: consecutive indexes, without holes. openraft starts it at 0, and so does
//! a check when the store is opened; only the store itself does not insist where an empty one begins.
//! Its newest part is also in memory ([`super::tail`]). All writes come from openraft's core task, one after
//! the other, and go into RocksDB in that order; what must be durable before it is acknowledged waits at the
//! flusher.
//!
//! - `append` returns when the entries are readable and calls back when they are on disk.
//! - `save_vote` returns when the vote is on disk and the marker vouches for it. Before that it waits for the end of
//!   a lease that this node gave to an earlier leader ([`super::promise`]), and openraft's core task with it: a
//!   vote counts nowhere, for this node or another, before this returns.
//! - `truncate_after` lowers the marker first: it must never claim entries that are about to go.
//! - Both tell readers before they delete, and readers look on the disk for what they were told before that: whoever
//!   finds less then must not take it for a loss. If deleting fails, that is final anyway.
//! - `purge` records the purged id in the batch that deletes, and deletes from the last purged index
//!   on, so that it never walks over the graves of earlier purges. Where a snapshot has outrun the log, all of it
//!   goes, also entries of a later leader than the snapshot's last: then the marker is lowered first, too.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures_util::{Stream, stream};
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{LogIdOptionExt, OptionalSend};
use rocksdb::{Direction, IteratorMode, ReadOptions, WriteBatch};

use crate::codec;
use crate::types::{Entry, LogId, TypeConfig, Vote};

use super::StoreOptions;
use super::engine::{CF_LOG, CF_META, Engine, to_io};
use super::flusher::FlushHandle;
use super::marker::Marker;
use super::meta::{self, corrupt};
use super::promise::Promise;
use super::tail::Tail;

/// How much of the log one step of an apply reads: bounds its memory while a node catches up.
const APPLY_READ_BYTES_MAX: usize = 8 << 20;

/// The log. Clones share it; openraft writes through one and reads through others.
#[derive(Clone)]
pub struct LogStore {
    engine: Arc<Engine>,
    flusher: FlushHandle,
    marker: Arc<Marker>,
    /// How much one replication message may carry.
    read_bytes_max: usize,
    promise: Promise,
    shared: Arc<Mutex<Ends>>,
}

/// What is known of the log without reading it. Held for short, never across an await.
struct Ends {
    vote: Option<Vote>,
    purged: Option<LogId>,
    /// The index of the first entry, or of the next one while there is none.
    first: u64,
    last: Option<LogId>,
    tail: Tail,
    /// How many times entries were taken away.
    cuts: u64,
}

/// What a reader has been told is in the log.
struct Span {
    start: u64,
    end: u64,
    /// As they were then: once there are more of them, it may not be there any longer.
    cuts: u64,
}

impl LogStore {
    pub(super) fn open(
        engine: Arc<Engine>,
        flusher: FlushHandle,
        marker: Arc<Marker>,
        options: &StoreOptions,
    ) -> io::Result<Self> {
        let db = engine.db();
        let meta_family = engine.family(CF_META)?;
        let vote = db.get_cf(&meta_family, meta::KEY_VOTE).map_err(to_io)?;
        let vote = vote.map(|bytes| meta::decode_vote(&bytes)).transpose()?;
        let purged = db.get_cf(&meta_family, meta::KEY_PURGED).map_err(to_io)?;
        let purged =
            purged.map(|bytes| meta::decode_log_id("the purged id", &bytes)).transpose()?;
        let last = last_entry(&engine)?.or(purged);
        check_first_entry(&engine, purged)?;
        if last < purged {
            return Err(corrupt("the log", "it ends before what was purged from it"));
        }
        let tail = Tail::new(options.storage.log_tail_bytes);
        let first = purged.next_index();
        let promise = Promise::new(vote);
        let shared = Arc::new(Mutex::new(Ends { vote, purged, first, last, tail, cuts: 0 }));
        drop(meta_family);
        let read_bytes_max = options.raft.append_bytes_max;
        Ok(Self { engine, flusher, marker, read_bytes_max, promise, shared })
    }

    /// Reads the last `bytes_max` bytes of the log once, and a little more. A torn tail of an older
    /// write-ahead log file, followed by a newer file, can leave what neither end of the log shows: a hole,
    /// or, where a cut was lost with that tail, entries of an older leader behind those of a newer one.
    pub(super) fn check_end(&self, bytes_max: u64) -> io::Result<()> {
        let (purged, first, end) = {
            let ends = self.lock();
            (ends.purged, ends.first, ends.last.next_index())
        };
        let family = self.engine.family(CF_LOG)?;
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(first.to_be_bytes());
        options.fill_cache(false);
        let mut after: Option<LogId> = None;
        let mut bytes = 0;
        for item in self.engine.db().iterator_cf_opt(&family, options, IteratorMode::End) {
            let (key, value) = item.map_err(to_io)?;
            bytes += value.len() as u64;
            let entry = decode_entry(&key, value)?;
            if let Some(after) = &after {
                check_neighbours(&entry.log_id, after)?;
            }
            after = Some(entry.log_id);
            if bytes >= bytes_max {
                return Ok(());
            }
        }
        let earliest = after.map_or(end, |id| id.index);
        if earliest > first {
            return Err(corrupt("the log", format_args!("entry {} is missing", earliest - 1)));
        }
        match (purged, after) {
            (Some(purged), Some(after)) => check_neighbours(&purged, &after),
            _ => Ok(()),
        }
    }

    /// The last entry that was purged.
    pub(super) fn last_purged(&self) -> Option<LogId> {
        self.lock().purged
    }

    /// The last entry's id, or what was last purged.
    pub(super) fn last_log_id(&self) -> Option<LogId> {
        self.lock().last
    }

    pub(super) fn vote(&self) -> Option<Vote> {
        self.lock().vote
    }

    pub(super) fn promise(&self) -> Promise {
        self.promise.clone()
    }

    /// The state has run ahead of the log: a snapshot was installed, and the node stopped before the log was purged.
    /// What is left of the log goes; its entries lie before the snapshot's end, whoever's they are. openraft
    /// does that only where they are of no later leader than the snapshot's end.
    ///
    /// For a start: no append may be waiting for the flusher.
    pub(super) fn catch_up_with(&self, applied: LogId) -> io::Result<()> {
        if !self.is_outrun_by(&applied) {
            return Ok(());
        }
        self.marker.lower_durable(Some(applied))?;
        self.delete_up_to(applied)
    }

    /// Whether the log ends before this entry of a snapshot. By index: what it ends with may be of a later leader,
    /// whose entries nobody committed.
    fn is_outrun_by(&self, log_id: &LogId) -> bool {
        self.lock().last.next_index() <= log_id.index
    }

    /// Call after the marker was lowered, where the log ends before.
    fn delete_up_to(&self, log_id: LogId) -> io::Result<()> {
        let first = self.lock().purged.next_index();
        if log_id.index < first {
            return Ok(());
        }
        let mut batch = WriteBatch::default();
        batch.put_cf(&self.engine.family(CF_META)?, meta::KEY_PURGED, meta::encode_log_id(&log_id));
        let (from, to) = (first.to_be_bytes(), (log_id.index + 1).to_be_bytes());
        batch.delete_range_cf(&self.engine.family(CF_LOG)?, from, to);
        let outran = {
            let mut ends = self.lock();
            ends.cuts += 1;
            ends.tail.purge(log_id.index);
            ends.purged = Some(log_id);
            ends.first = log_id.index + 1;
            // A snapshot may reach beyond the log's end: then the log is empty and ends there.
            let outran = ends.last.next_index() <= log_id.index;
            if outran {
                ends.last = Some(log_id);
            }
            outran
        };
        self.engine.write(batch)?;
        if outran {
            self.promise.log_was_cut(Some(&log_id));
        }
        Ok(())
    }

    /// Call after the marker was lowered.
    fn delete_after(&self, last: Option<LogId>) -> io::Result<()> {
        {
            let mut ends = self.lock();
            ends.cuts += 1;
            ends.tail.truncate_after(last.map(|id| id.index));
            ends.last = last;
        }
        let mut batch = WriteBatch::default();
        let from = last.next_index().to_be_bytes();
        batch.delete_range_cf(&self.engine.family(CF_LOG)?, from, u64::MAX.to_be_bytes());
        self.engine.write(batch)?;
        self.promise.log_was_cut(last.as_ref());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Ends> {
        self.shared.lock().expect("no code panics while it holds this lock")
    }

    /// The entries of `start..end` that the log has: about `bytes_max` bytes of them at most, but at least
    /// one entry if there is one.
    fn read(&self, start: u64, end: u64, bytes_max: usize) -> io::Result<Vec<Entry>> {
        self.engine.check()?;
        let span = {
            let ends = self.lock();
            let (start, end) = (start.max(ends.first), end.min(ends.last.next_index()));
            if start >= end {
                return Ok(Vec::new());
            }
            if let Some(entries) = ends.tail.read(start, end, bytes_max) {
                return Ok(entries);
            }
            Span { start, end, cuts: ends.cuts }
        };
        self.read_from_disk(&span, bytes_max)
    }

    fn read_from_disk(&self, span: &Span, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let family = self.engine.family(CF_LOG)?;
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(span.end.to_be_bytes());
        let from = span.start.to_be_bytes();
        let mode = IteratorMode::From(&from, Direction::Forward);
        let mut bytes_left = bytes_max;
        let mut entries: Vec<Entry> = Vec::new();
        for item in self.engine.db().iterator_cf_opt(&family, options, mode) {
            let (key, value) = item.map_err(to_io)?;
            if value.len() > bytes_left && !entries.is_empty() {
                break;
            }
            bytes_left = bytes_left.saturating_sub(value.len());
            let entry = decode_entry(&key, value)?;
            if let Some(before) = entries.last() {
                check_neighbours(&before.log_id, &entry.log_id)?;
            }
            entries.push(entry);
        }
        // It was there, unless it was taken away meanwhile.
        let is_there = entries.first().is_some_and(|entry| entry.index() == span.start);
        if !is_there && self.lock().cuts == span.cuts {
            return Err(corrupt("the log", format_args!("entry {} is missing", span.start)));
        }
        Ok(entries)
    }
}

/// Whether one entry can follow the other: the next index, and of no older leader.
fn check_neighbours(before: &LogId, after: &LogId) -> io::Result<()> {
    if before.index + 1 == after.index && before.leader_id <= after.leader_id {
        return Ok(());
    }
    Err(corrupt("the log", format_args!("entry {after} follows {before}")))
}

fn decode_entry(key: &[u8], value: Box<[u8]>) -> io::Result<Entry> {
    let index = decode_index(key)?;
    let what = || format!("log entry {index}");
    let entry = codec::decode_entry(Bytes::from(value)).map_err(|e| corrupt(&what(), e))?;
    if entry.index() != index {
        return Err(corrupt(&what(), format_args!("it says it is entry {}", entry.index())));
    }
    Ok(entry)
}

fn decode_index(key: &[u8]) -> io::Result<u64> {
    let bytes = key.try_into().map_err(|_| corrupt("a log key", "it is not 8 bytes long"))?;
    Ok(u64::from_be_bytes(bytes))
}

fn last_entry(engine: &Engine) -> io::Result<Option<LogId>> {
    let family = engine.family(CF_LOG)?;
    let last = engine.db().iterator_cf(&family, IteratorMode::End).next();
    let Some((key, value)) = last.transpose().map_err(to_io)? else { return Ok(None) };
    Ok(Some(decode_entry(&key, value)?.log_id))
}

fn check_first_entry(engine: &Engine, purged: Option<LogId>) -> io::Result<()> {
    let family = engine.family(CF_LOG)?;
    let first = engine.db().iterator_cf(&family, IteratorMode::Start).next();
    let Some((key, _)) = first.transpose().map_err(to_io)? else { return Ok(()) };
    let (first, expected) = (decode_index(&key)?, purged.next_index());
    if first != expected {
        let why = format!("its first entry is {first}, but {expected} was expected");
        return Err(corrupt("the log", why));
    }
    Ok(())
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let (start, end) = bounds(&range);
        self.read(start, end, usize::MAX)
    }

    /// For replicating. Nothing if `start` was purged: what follows would be sent as if it came there.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let entries = self.read(start, end, self.read_bytes_max)?;
        let starts_there = entries.first().is_some_and(|entry| entry.index() == start);
        Ok(if starts_there { entries } else { Vec::new() })
    }

    /// For applying: reads step by step, so that a node that catches up on a long log holds little of
    /// it in memory. What is to be applied cannot have been purged.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        let steps = stream::try_unfold((self.clone(), start), move |(log, next)| async move {
            if next >= end {
                return Ok::<_, io::Error>(None);
            }
            let entries = log.read(next, end, APPLY_READ_BYTES_MAX)?;
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
                return Ok(None);
            };
            if next != start && first.index() != next {
                return Err(corrupt("the log", format_args!("entry {next} is missing")));
            }
            let after = last.index() + 1;
            Ok(Some((stream::iter(entries.into_iter().map(Ok)), (log, after))))
        });
        futures_util::TryStreamExt::try_flatten(steps)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.vote())
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let ends = self.lock();
        Ok(LogState { last_purged_log_id: ends.purged, last_log_id: ends.last })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.promise.raise(vote.leader_id).await;
        let mut batch = WriteBatch::default();
        batch.put_cf(&self.engine.family(CF_META)?, meta::KEY_VOTE, meta::encode_vote(vote));
        self.engine.write(batch)?;
        self.flusher.barrier().await?;
        self.marker.raise_vote(vote).map_err(|e| self.engine.fail("writing the marker", &e))?;
        self.lock().vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut batch = WriteBatch::default();
        let mut appended = Vec::new();
        {
            let family = self.engine.family(CF_LOG)?;
            let mut record = Vec::new();
            for entry in entries {
                record.clear();
                if entry.get_membership().is_some() {
                    self.promise.membership_changes(entry.log_id);
                }
                codec::encode_entry(&entry, &mut record);
                batch.put_cf(&family, entry.index().to_be_bytes(), &record);
                appended.push((entry, record.len()));
            }
        }
        let Some(last) = appended.last().map(|(entry, _)| entry.log_id) else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        self.engine.write(batch)?;
        {
            let mut ends = self.lock();
            if ends.last <= ends.purged {
                ends.first = appended[0].0.index();
            }
            for (entry, bytes) in appended {
                ends.tail.push(entry, bytes);
            }
            ends.last = Some(last);
        }
        self.flusher.append(last, callback);
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        let last = {
            let ends = self.lock();
            let last = last_log_id.max(ends.purged);
            if last.next_index() >= ends.last.next_index() {
                return Ok(());
            }
            last
        };
        self.flusher.cut(last).await?;
        self.delete_after(last)
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        if self.is_outrun_by(&log_id) {
            self.flusher.cut(Some(log_id)).await?;
        }
        self.delete_up_to(log_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::EntryPayload;

    use crate::store::Store;
    use crate::store::tests::{log_id, options};

    /// A store that has nothing of its log in memory.
    fn open(dir: &std::path::Path) -> Store {
        let mut options = options(dir);
        options.storage.log_tail_bytes = 0;
        Store::open(&options).unwrap()
    }

    fn id(index: u64) -> LogId {
        log_id(1, index)
    }

    fn entry(index: u64) -> Entry {
        Entry { log_id: id(index), payload: EntryPayload::Blank }
    }

    /// Between being told and looking, also if what came in its place is not there for the reader yet.
    #[tokio::test(flavor = "multi_thread")]
    async fn entries_that_are_cut_off_before_a_reader_comes_to_them_are_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let mut log = store.log();
        log.append((0..=9).map(entry), IOFlushed::noop()).await.unwrap();
        let told = |log: &LogStore, start, end| Span { start, end, cuts: log.lock().cuts };
        let before = told(&log, 6, 10);
        assert_eq!(log.read_from_disk(&before, usize::MAX).unwrap().len(), 4);
        log.truncate_after(Some(id(5))).await.unwrap();
        assert_eq!(log.read_from_disk(&before, usize::MAX).unwrap(), Vec::new());
        let before = told(&log, 2, 6);
        log.purge(id(3)).await.unwrap();
        assert_eq!(log.read_from_disk(&before, usize::MAX).unwrap()[0].log_id, id(4));
        // What nobody took away is lost.
        assert!(log.read_from_disk(&told(&log, 6, 10), usize::MAX).is_err());
    }

    /// Else a reader could find them gone, and ask what was said of them before that is.
    #[tokio::test(flavor = "multi_thread")]
    async fn readers_are_told_before_entries_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let mut log = store.log();
        log.append((0..=9).map(entry), IOFlushed::noop()).await.unwrap();
        log.flusher.cut(Some(id(5))).await.unwrap();
        // Nothing goes any more: what is seen now was done before that was tried.
        log.engine.fail("write", &"as if the disk were full");
        assert!(log.delete_after(Some(id(5))).is_err() && log.lock().last == Some(id(5)));
        assert!(log.delete_up_to(id(3)).is_err() && log.lock().first == 4);
        assert_eq!(log.lock().cuts, 2);
        assert!(log.read(0, 10, usize::MAX).is_err(), "and nobody reads after that");
    }
}
