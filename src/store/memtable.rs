//! The newest state, in memory: what was applied since the last flush.
//!
//! RocksDB has memtables of its own, but they are sorted, and keeping a sorted table of random keys in
//! order was the largest part of a write: 39 % of a node's thread with 256 clients. Nobody needs the
//! order before the rows go to disk. So applied rows stand in a hash table here; once it is full it is
//! frozen, sorted, written to a data file and given to RocksDB ([`super::flush`]), which never sees
//! the rows before. They are not in the write-ahead log either: the log entries that they came from
//! are, and openraft applies those again after a crash.
//!
//! | table | who changes it |
//! | --- | --- |
//! | active | apply, a round at a time |
//! | frozen | nobody: it is on its way to disk, and still read |
//! | flushed | nobody: it is on disk, and kept for a while, because it is read faster here |
//!
//! A round's rows and the head that goes with them (last applied id, revision, membership, ring)
//! become visible under one lock, and a table is frozen together with the head and the machine
//! ([`super::machine`]) of that moment. So whatever reaches the disk is the state after some entry,
//! whole.
//!
//! There may be several flushed tables: one that is flushed before it is full, for a snapshot or a handoff,
//! leaves older ones in memory, as long as they are few and small enough ([`Layers::kept`]).
//!
//! What leaves the tables goes on to a cache of single rows ([`cache`]), which holds what is read from disk, too.
//!
//! Memory: the active table, the frozen one and all flushed ones together hold up to
//! `storage.memtable_bytes` each, plus one round, and as much again while flushed ones go on to the cache; when the
//! active one is full while the frozen one is not on disk yet, apply waits. The cache holds `storage.row_cache_bytes`.

mod cache;
mod place;
mod table;

use std::io;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::handoff::Position;
use crate::types::Revision;

use super::machine::Side;
use super::meta;
use super::snapshot::Head;

use cache::Forgotten;
pub(super) use cache::RowCache;
pub use cache::RowCacheStats;
pub(super) use table::Row;
use table::{RowTable, touch_rows};

/// What a change costs beside its bytes.
const CHANGE_OVERHEAD_BYTES: usize = 64;

/// How many flushed tables are kept: a read that finds nothing in memory looks into all of them.
const FLUSHED_MAX: usize = 4;

/// What a round does to a key's row.
#[derive(Debug, Clone)]
pub(super) enum Update<'a> {
    /// A client's put of a small value. The record is made where it will stand.
    Put {
        revision: Revision,
        value: &'a [u8],
    },
    /// A record as it is stored.
    Record(Bytes),
    Delete,
}

/// Rows by key, newest only, and what else came in the same time.
#[derive(Default)]
pub(super) struct Rows {
    table: RowTable,
    /// The change log's part of the same time, without gaps.
    changes: Vec<(Position, Bytes)>,
    change_bytes: usize,
    /// The index of the last entry that was applied before the table was begun; 0 before the first.
    since: u64,
}

/// A table that does not change any more, with everything else of the state as of its end.
pub(super) struct Frozen {
    pub(super) rows: Arc<Rows>,
    pub(super) head: Head,
    pub(super) side: Side,
}

/// The tables and the head. See the module.
pub(super) struct Memtables {
    layers: RwLock<Layers>,
    cache: RowCache,
    /// Woken when a frozen table is on disk, or never will be.
    room: Notify,
    bytes_max: usize,
}

pub(super) struct Layers {
    active: Rows,
    frozen: Option<Arc<Frozen>>,
    /// The newest first.
    flushed: Vec<Arc<Rows>>,
    head: Head,
    /// Whether `head` or rows changed since the last freeze.
    changed: bool,
}

/// Rows of a state that is none any more.
#[must_use = "it is to be dropped where nobody waits"]
pub(super) struct Replaced {
    _layers: Layers,
    _cached: Forgotten,
}

impl<'a> Update<'a> {
    /// A client's put. A large value is copied here, and not once the rows are locked.
    pub(super) fn put(revision: Revision, value: &'a [u8]) -> Self {
        if value.len() <= table::NEAR_BYTES_MAX {
            return Self::Put { revision, value };
        }
        Self::Record(meta::encode_record(revision, value).into())
    }

    /// How long the record is; `None` if there is none.
    fn record_bytes(&self) -> Option<usize> {
        match self {
            Self::Put { value, .. } => Some(meta::RECORD_HEAD_BYTES + value.len()),
            Self::Record(record) => Some(record.len()),
            Self::Delete => None,
        }
    }

    /// Writes the record, which is as long as `place`, if there is one.
    fn write(&self, place: &mut [u8]) {
        match self {
            Self::Put { revision, value } => {
                let (head, rest) = place.split_at_mut(meta::RECORD_HEAD_BYTES);
                head.copy_from_slice(&meta::record_head(*revision));
                rest.copy_from_slice(value);
            }
            Self::Record(record) => place.copy_from_slice(record),
            Self::Delete => {}
        }
    }

    pub(super) fn is_delete(&self) -> bool {
        matches!(self, Self::Delete)
    }

    /// The record, if there is one.
    pub(super) fn to_bytes(&self) -> Option<Bytes> {
        match self {
            Self::Put { revision, value } => Some(meta::encode_record(*revision, value).into()),
            Self::Record(record) => Some(record.clone()),
            Self::Delete => None,
        }
    }
}

impl Rows {
    fn bytes(&self) -> usize {
        self.table.bytes() + self.change_bytes
    }

    fn log(&mut self, position: Position, change: Bytes) {
        self.change_bytes += change.len() + CHANGE_OVERHEAD_BYTES;
        self.changes.push((position, change));
    }

    fn change(&self, position: Position) -> Option<&Bytes> {
        let found = self.changes.binary_search_by_key(&position, |(position, _)| *position).ok()?;
        Some(&self.changes[found].1)
    }

    /// The changes at and after this position.
    pub(super) fn changes_from(&self, start: Position) -> &[(Position, Bytes)] {
        &self.changes[self.changes.partition_point(|(position, _)| *position < start)..]
    }

    pub(super) fn sorted(&self) -> Vec<(&[u8], Option<&[u8]>)> {
        let rows = self.table.iter();
        let mut sorted: Vec<_> = rows.map(|(key, row)| (key, row.record())).collect();
        sorted.sort_unstable_by_key(|(key, _)| *key);
        sorted
    }
}

impl Layers {
    /// The newest row of a key, if it is in memory.
    pub(super) fn get(&self, key: &[u8]) -> Option<Row<'_>> {
        let flushed = || self.flushed.iter().find_map(|rows| rows.table.get(key));
        let frozen = || self.frozen.as_ref()?.rows.table.get(key);
        self.active.table.get(key).or_else(frozen).or_else(flushed)
    }

    /// What is likely to be the key's row, if it is in memory.
    fn likely_row(&self, key: &[u8]) -> Option<&[u8]> {
        let flushed = || self.flushed.iter().find_map(|rows| rows.table.likely_row_of(key));
        let frozen = || self.frozen.as_ref()?.rows.table.likely_row_of(key);
        self.active.table.likely_row_of(key).or_else(frozen).or_else(flushed)
    }

    /// Whether a key changed since the last flush.
    pub(super) fn is_unflushed(&self, key: &[u8]) -> bool {
        let frozen = || self.frozen.as_ref().is_some_and(|frozen| frozen.rows.table.contains(key));
        self.active.table.contains(key) || frozen()
    }

    /// The change at this position, if it is in memory.
    pub(super) fn change(&self, position: Position) -> Option<&Bytes> {
        let frozen = self.frozen.as_ref().map(|frozen| &frozen.rows);
        let older = frozen.into_iter().chain(&self.flushed);
        self.active.change(position).or_else(|| older.into_iter().find_map(|r| r.change(position)))
    }

    /// The records of keys that changed since the last flush, newest only; `None` for deleted ones.
    pub(super) fn unflushed_rows(&self) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        self.unflushed_rows_before(u64::MAX)
    }

    /// Those of them in tables that may hold a row from before this entry was applied.
    pub(super) fn unflushed_rows_before(
        &self,
        index: u64,
    ) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        let active = Some(&self.active).filter(|rows| rows.since < index);
        let active = active.into_iter().flat_map(|rows| rows.table.iter());
        let frozen = self.frozen.as_ref().map(|frozen| &frozen.rows);
        let frozen = frozen.filter(|rows| rows.since < index);
        let frozen = frozen.into_iter().flat_map(|rows| rows.table.iter());
        let frozen = frozen.filter(|(key, _)| !self.active.table.contains(key));
        active.chain(frozen).map(|(key, row)| (key, row.record()))
    }

    /// How many records came since the last flush; those that changed once more while it runs count twice.
    pub(super) fn unflushed_records(&self) -> u64 {
        let frozen = self.frozen.as_ref().map_or(0, |frozen| frozen.rows.table.records());
        self.active.table.records() + frozen
    }

    /// All keys that changed since the last flush, once each, and whether they have a record.
    pub(super) fn keys(&self) -> impl Iterator<Item = (&[u8], bool)> {
        self.unflushed_rows().map(|(key, row)| (key, row.is_some()))
    }

    pub(super) fn head(&self) -> &Head {
        &self.head
    }

    /// Bytes of memory in all tables.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        let frozen = self.frozen.as_ref().map_or(0, |frozen| frozen.rows.bytes());
        self.active.bytes() + frozen + self.flushed.iter().map(|rows| rows.bytes()).sum::<usize>()
    }
}

impl Memtables {
    /// Tables of up to `bytes_max`, and a cache of up to `cache_bytes_max`.
    pub(super) fn new(head: Head, bytes_max: usize, cache_bytes_max: usize) -> Self {
        let layers = RwLock::new(Layers::new(head));
        Self { layers, cache: RowCache::new(cache_bytes_max), room: Notify::new(), bytes_max }
    }

    /// Rows on disk that no table has. Who looks here has looked into the tables first.
    pub(super) fn cache(&self) -> &RowCache {
        &self.cache
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read().expect("no code panics while it holds this lock")
    }

    /// Loads the rows of keys that are about to be looked for, in tables and cache: they come from memory at the same
    /// time instead of one after the other.
    pub(super) fn touch(&self, keys: &[&[u8]]) {
        let mut elsewhere = Vec::with_capacity(keys.len());
        let layers = self.read();
        touch_rows(keys.iter().filter_map(|key| {
            let row = layers.likely_row(key);
            if row.is_none() {
                elsewhere.push(*key);
            }
            row
        }));
        drop(layers);
        if !elsewhere.is_empty() {
            self.cache.touch(&elsewhere);
        }
    }

    fn write(&self) -> RwLockWriteGuard<'_, Layers> {
        self.layers.write().expect("no code panics while it holds this lock")
    }

    /// Makes a round visible: its rows, and what it changes of the head.
    pub(super) fn apply<'a>(
        &self,
        updates: impl IntoIterator<Item = (&'a [u8], Update<'a>)>,
        changes: Vec<(Position, Bytes)>,
        change: impl FnOnce(&mut Head),
    ) {
        let mut layers = self.write();
        for (position, change) in changes {
            layers.active.log(position, change);
        }
        layers.active.table.put_all(updates);
        change(&mut layers.head);
        layers.changed = true;
    }

    /// Whether the active table is full, and may be frozen.
    pub(super) fn is_due(&self) -> bool {
        let layers = self.read();
        layers.active.bytes() >= self.bytes_max && layers.frozen.is_none()
    }

    /// The table that is to be flushed, if one is.
    pub(super) fn frozen(&self) -> Option<Arc<Frozen>> {
        self.read().frozen.clone()
    }

    /// Freezes the active table, however little it holds, unless nothing changed since the last time
    /// or there is a frozen one already. The caller holds the machine that `side` encodes, so no round
    /// and no other freeze comes between.
    pub(super) fn freeze(&self, side: impl FnOnce() -> Side) -> Option<Arc<Frozen>> {
        {
            let layers = self.read();
            if layers.frozen.is_some() || !layers.changed {
                return layers.frozen.clone();
            }
        }
        // Takes its time: outside the lock.
        let side = side();
        let mut layers = self.write();
        layers.freeze(side);
        layers.frozen.clone()
    }

    /// The frozen table's rows are in a data file that readers see. When older tables have to go for it, their rows go
    /// into the cache: that takes a while with many, unless the caller is to `hurry`, and then the cache is
    /// emptied. One at a time calls this, and never during [`Self::replace`].
    pub(super) fn thaw(&self, hurry: impl Fn() -> bool) {
        let (frozen, leaving) = self.write().thaw(self.bytes_max);
        self.room.notify_waiters();
        // Oldest first, so that the newest row of a key stays; and before readers look past the tables.
        let mut oldest_first = leaving.iter().rev();
        let superseded = oldest_first.all(|rows| self.cache.supersede(&rows.table, &hurry));
        let forgotten = (!superseded).then(|| self.cache.clear());
        let old = self.write().forget_leaving(self.bytes_max);
        // Takes its time with so many rows: outside the lock.
        drop((frozen, leaving, old, forgotten));
    }

    /// Wakes those who wait for room, because there will be none.
    pub(super) fn give_up(&self) {
        self.room.notify_waiters();
    }

    /// Forgets all rows: another state, which is on disk, takes the place of this one. Returns them, to be dropped
    /// where nobody waits.
    pub(super) fn replace(&self, head: Head) -> Replaced {
        let layers = std::mem::replace(&mut *self.write(), Layers::new(head));
        let cached = self.cache.clear();
        self.room.notify_waiters();
        Replaced { _layers: layers, _cached: cached }
    }

    /// Waits until another round may be applied.
    ///
    /// # Errors
    /// What `check` says: whether waiting makes sense at all.
    pub(super) async fn await_room(
        &self,
        mut check: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            // Before looking, so that no wake-up is missed.
            let woken = self.room.notified();
            check()?;
            let full = {
                let layers = self.read();
                layers.active.bytes() >= self.bytes_max && layers.frozen.is_some()
            };
            if !full {
                return Ok(());
            }
            woken.await;
        }
    }
}

impl Layers {
    fn new(head: Head) -> Self {
        let active = Rows { since: applied_index(&head), ..Rows::default() };
        Self { active, frozen: None, flushed: Vec::new(), head, changed: false }
    }

    /// How many flushed tables stay: the newest, and those that fit in beside it.
    fn kept(&self, bytes_max: usize) -> usize {
        let mut bytes = 0;
        let fit = |(number, rows): &(usize, &Arc<Rows>)| {
            bytes += rows.bytes();
            *number == 0 || bytes <= bytes_max
        };
        self.flushed.iter().take(FLUSHED_MAX).enumerate().take_while(fit).count()
    }

    /// The frozen table is on disk. Returns it, and the flushed ones that have to go for it, the newest first.
    fn thaw(&mut self, bytes_max: usize) -> (Option<Arc<Frozen>>, Vec<Arc<Rows>>) {
        let frozen = self.frozen.take();
        self.flushed.splice(0..0, frozen.as_ref().map(|frozen| frozen.rows.clone()));
        (frozen, self.flushed[self.kept(bytes_max)..].to_vec())
    }

    /// Readers look past those from now on.
    fn forget_leaving(&mut self, bytes_max: usize) -> Vec<Arc<Rows>> {
        let kept = self.kept(bytes_max);
        self.flushed.split_off(kept)
    }

    fn freeze(&mut self, side: Side) {
        // The next one will hold about as many rows: room for them now, not by moving them again and
        // again as it grows.
        let table = RowTable::with_capacity(self.active.table.len());
        let since = applied_index(&self.head);
        let rows = std::mem::replace(&mut self.active, Rows { table, since, ..Rows::default() });
        let (rows, head) = (Arc::new(rows), self.head.clone());
        self.frozen = Some(Arc::new(Frozen { rows, head, side }));
        self.changed = false;
    }
}

fn applied_index(head: &Head) -> u64 {
    head.applied().map_or(0, |id| id.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(bytes_max: usize) -> Memtables {
        Memtables::new(Head::default(), bytes_max, 0)
    }

    fn row(text: &'static str) -> (&'static [u8], Update<'static>) {
        (b"k", Update::Record(Bytes::from_static(text.as_bytes())))
    }

    /// A key's record in memory: `None` if nothing is known of it.
    fn get(tables: &Memtables, key: &[u8]) -> Option<Option<Bytes>> {
        tables.read().get(key).map(Row::to_bytes)
    }

    /// The active row hides the frozen one, also when it says "deleted".
    #[test]
    fn the_newest_row_counts() {
        let tables = tables(1);
        tables.apply([row("old")], Vec::new(), |_| ());
        assert!(tables.is_due() && tables.freeze(Side::default).is_some());
        assert_eq!(get(&tables, b"k"), Some(Some("old".into())));
        tables.apply([row("new")], Vec::new(), |_| ());
        assert_eq!(get(&tables, b"k"), Some(Some("new".into())));
        tables.apply([(&b"k"[..], Update::Delete)], Vec::new(), |_| ());
        assert_eq!(get(&tables, b"k"), Some(None));
        assert_eq!(tables.read().keys().collect::<Vec<_>>(), [(&b"k"[..], false)]);
        assert_eq!(get(&tables, b"other"), None);
        tables.thaw(|| false);
        assert_eq!(get(&tables, b"k"), Some(None));
        assert!(tables.is_due() && tables.freeze(Side::default).is_some());
        tables.thaw(|| false);
        assert_eq!(get(&tables, b"k"), Some(None), "kept for readers");
        assert!(!tables.read().is_unflushed(b"k"));
        assert_eq!(tables.read().keys().count(), 0);
    }

    /// Tables that are flushed early stay in memory beside older ones, as far as there is room for them.
    #[test]
    fn small_tables_leave_larger_ones_in_memory() {
        let each = {
            let one = tables(1);
            one.apply([row("v")], Vec::new(), |_| ());
            one.read().bytes()
        };
        let tables = tables(10 * each);
        let flush = |keys: std::ops::Range<u8>| {
            let keys: Vec<_> = keys.map(|n| [n]).collect();
            let updates = keys.iter().map(|key| (&key[..], row("v").1));
            tables.apply(updates, Vec::new(), |_| ());
            assert!(tables.freeze(Side::default).is_some());
            tables.thaw(|| false);
        };
        let there = |n: u8| tables.read().get(&[n]).is_some();
        flush(0..7);
        flush(7..9);
        assert!((0..9).all(there));
        flush(20..22);
        assert!(!there(0) && there(7) && there(20), "the oldest makes room");
        (30..40).for_each(|n| flush(n..n + 1));
        assert_eq!(tables.read().flushed.len(), FLUSHED_MAX);
        assert!(!there(35) && there(36) && there(39));
        flush(50..70);
        assert!(tables.read().flushed.len() == 1 && there(69), "the newest always stays");
    }

    /// When several tables leave at once, their newest row of a key goes on, also if that says "deleted", and
    /// readers find it at any moment.
    #[test]
    fn the_newest_of_the_rows_that_leave_goes_on() {
        for newest in [Some("newest"), Some("old"), Some("3"), None] {
            let tables = Memtables::new(Head::default(), 1 << 20, 1 << 20);
            let flush = |key: &[u8], value: Option<&str>, hook: &dyn Fn()| {
                let update = value.map_or(Update::Delete, |value| {
                    Update::Record(Bytes::copy_from_slice(value.as_bytes()))
                });
                tables.apply([(key, update)], Vec::new(), |_| ());
                assert!(tables.freeze(Side::default).is_some());
                tables.thaw(|| {
                    hook();
                    false
                });
            };
            let expected = newest.map(Bytes::from);
            for value in [Some("old"), Some("longer"), newest] {
                flush(b"k", value, &|| panic!("none has to leave"));
            }
            let looks = std::cell::Cell::new(0);
            flush(b"giant", Some(&"g".repeat(1 << 20)), &|| {
                looks.set(looks.get() + 1);
                assert_eq!(get(&tables, b"k"), Some(expected.clone()), "it has not left yet");
            });
            assert_eq!((looks.get(), tables.read().flushed.len()), (3, 1));
            assert_eq!(get(&tables, b"k"), None, "it has left");
            let cached = tables.cache().get(b"k", Bytes::copy_from_slice).ok();
            assert_eq!(cached, expected);
        }
    }

    /// Who is in a hurry finds no old row in the cache either.
    #[test]
    fn rows_that_leave_in_a_hurry_leave_nothing() {
        let tables = Memtables::new(Head::default(), 1, 1 << 20);
        let flush = |text: &'static str, key: &'static [u8], hurry: bool| {
            tables.apply([(key, row(text).1)], Vec::new(), |_| ());
            assert!(tables.freeze(Side::default).is_some());
            tables.thaw(|| hurry);
        };
        flush("old", b"k", false);
        flush("other", b"l", false);
        assert!(tables.cache().get(b"k", |row| row == b"old").unwrap_or_default());
        flush("new", b"k", false);
        flush("other", b"l", true);
        assert!(tables.cache().get(b"k", |_| ()).is_err());
        assert!(!tables.read().is_unflushed(b"k") && get(&tables, b"k").is_none());
    }

    /// Bytes follow replaced rows, so that a key that is written again and again fills nothing.
    #[test]
    fn bytes_are_those_of_the_newest_rows() {
        let tables = tables(usize::MAX);
        tables.apply([row("long value")], Vec::new(), |_| ());
        let once = tables.read().bytes();
        for _ in 0..1000 {
            tables.apply([row("long value"), row("v")], Vec::new(), |_| ());
        }
        assert_eq!(tables.read().bytes(), once);
    }

    /// Apply waits only while both tables are full, and not for ever when the disk has failed.
    #[tokio::test]
    async fn apply_waits_for_room() {
        let tables = tables(1);
        tables.apply([row("v")], Vec::new(), |_| ());
        tables.await_room(|| Ok(())).await.unwrap();
        assert!(tables.is_due() && tables.freeze(Side::default).is_some());
        tables.apply([row("v")], Vec::new(), |_| ());
        assert!(!tables.is_due(), "the frozen one is not on disk yet");
        let mut checks = 0;
        let waiting = tables.await_room(|| {
            checks += 1;
            if checks > 1 { Err(io::Error::other("failed")) } else { Ok(()) }
        });
        let (waited, ()) = tokio::join!(waiting, async { tables.give_up() });
        assert!(waited.is_err());
        tables.thaw(|| false);
        tables.await_room(|| Ok(())).await.unwrap();
    }

    /// Without changes there is nothing to flush; a new head alone is a change.
    #[test]
    fn what_is_on_disk_is_not_frozen_again() {
        let tables = tables(1);
        assert!(tables.freeze(Side::default).is_none());
        tables.apply(std::iter::empty(), Vec::new(), |_| ());
        assert!(tables.freeze(Side::default).is_some());
        tables.thaw(|| false);
        assert!(tables.freeze(Side::default).is_none());
    }
}
