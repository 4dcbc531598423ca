//! Rows that are on disk, by key: what was written or read lately and is in no memtable any more.
//!
//! A look-up in RocksDB asks filters and indexes of several files and reads a block of some thirty rows, which
//! usually has to be decompressed: many times what a row in memory costs. RocksDB's own cache keeps such blocks,
//! of which most rows are never asked for. So single rows are kept here.
//!
//! # Invariant
//! A row here is the one that RocksDB has, or a memtable hides it. Rows on disk change by flushes alone, and so:
//! 1. Before a flushed table leaves memory, its rows take the place of older ones here ([`RowCache::supersede`]).
//!    Until it has left, it hides whatever is here. Tables leave in the order in which they were filled.
//! 2. Who found a row in RocksDB may be late: meanwhile a table with a newer row may have been filled, flushed
//!    and forgotten. So a row is kept only if no table has begun to leave since its key was [`Missed`] here, which
//!    is before RocksDB was asked.
//! 3. When another state takes the place of this one, all rows go ([`RowCache::clear`]), for late ones, too.
//!
//! That a key has no row is not kept: a filter tells it as well, and to ask for what is not there would push
//! out what is.
//!
//! # Memory
//! Rows stand one behind the other in pieces, under a table of places, as in [`super::table`]. Once pieces and
//! table take what they may, the oldest piece makes room: of its rows, those that were read since the last time
//! move up to its front, and the rest is free (CLOCK, a piece at a time). Rows of tables that leave come in while
//! there is unused memory, and push out nothing: what is written is not always read. The table grows by doubling; where
//! that takes more than there is, some pieces go for it.
//!
//! ```text
//! row = key_bytes:u16, record_bytes:u16, read:u8, key, record, unused        little-endian
//! ```
//!
//! A row begins at a multiple of [`UNIT_BYTES`]. One that no place points to was replaced or deleted. Rows of
//! more than [`ROW_BYTES_MAX`] stay away: a block holds few of them, and copying them costs more than finding them.
//!
//! There are several shards, so that nobody waits long for a table that grows, and one lock for all of them: the
//! rows of several keys are waited for together ([`RowCache::touch`]), as in [`super::table`], and a processor does
//! not begin to load what stands behind another lock before it has that.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use hashbrown::HashTable;

use super::place::{self, UNIT_BYTES};
use super::table::{Row, RowTable, touch_rows};

const PIECE_BYTES: usize = 64 << 10;

type Place = place::Place<{ PIECE_BYTES / UNIT_BYTES }>;

/// The size of a block of a data file; and a piece has at most a sixteenth of it unused at its end.
const ROW_BYTES_MAX: usize = 4 << 10;

const HEAD_BYTES: usize = 5;

/// Where in a row it says whether it was read.
const READ: usize = 4;

/// What a shard has at least, if there are several: a table of so many rows grows, and pieces go for it, within a
/// millisecond or two even if rows are tiny.
const SHARD_BYTES: usize = 2 << 20;

/// How much of a piece may be rows that were read when it makes room: it makes some in any case.
const KEPT_BYTES_MAX: usize = PIECE_BYTES / 4 * 3;

/// See the module.
pub(in crate::store) struct RowCache {
    shards: Mutex<Shards>,
    hasher: ahash::RandomState,
    /// How often tables began to leave memory, or all rows went.
    generation: AtomicU64,
}

struct Shards {
    /// A power of two of them, or none: then nothing is kept.
    all: Box<[Shard]>,
    hits: u64,
    misses: u64,
}

/// Rows that nobody finds any more. Giving their memory back takes its time with so many.
#[must_use = "it is to be dropped where nobody waits"]
pub(super) struct Forgotten {
    _shards: Box<[Shard]>,
}

/// That a key's row was not here, at some moment.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct Missed {
    hash: u64,
    generation: u64,
}

/// What a cache has done, and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowCacheStats {
    /// Rows that were looked for and found.
    pub hits: u64,
    /// Rows that were looked for and not found.
    pub misses: u64,
    /// Bytes of memory.
    pub bytes: usize,
}

#[derive(Default)]
struct Shard {
    places: HashTable<Place>,
    pieces: Vec<Vec<u8>>,
    /// The piece that is written to; the next one is the oldest.
    current: usize,
    bytes_max: usize,
}

impl RowCache {
    pub(super) fn new(bytes_max: usize) -> Self {
        let count = match bytes_max {
            0 => 0,
            _ => 1 << (bytes_max / SHARD_BYTES).max(1).ilog2(),
        };
        let shard = |_| Shard { bytes_max: bytes_max / count, ..Shard::default() };
        let all = (0..count).map(shard).collect();
        let shards = Mutex::new(Shards { all, hits: 0, misses: 0 });
        Self { shards, hasher: ahash::RandomState::new(), generation: AtomicU64::new(0) }
    }

    /// What `found` makes of the key's record, if that is here. It is called under the lock.
    pub(in crate::store) fn get<T>(
        &self,
        key: &[u8],
        found: impl FnOnce(&[u8]) -> T,
    ) -> Result<T, Missed> {
        let hash = self.hasher.hash_one(key);
        let mut shards = self.lock();
        let record = shards.of(hash).and_then(|shard| shard.get(place::half(hash), key)).map(found);
        if let Some(found) = record {
            shards.hits += 1;
            return Ok(found);
        }
        shards.misses += 1;
        Err(Missed { hash, generation: self.generation.load(Ordering::Acquire) })
    }

    /// Loads the rows of keys that are about to be looked for.
    pub(super) fn touch(&self, keys: &[&[u8]]) {
        let shards = self.lock();
        touch_rows(keys.iter().filter_map(|key| shards.likely_row(self.hasher.hash_one(key))));
    }

    /// Keeps the record that RocksDB was then found to have, unless it may be an old one.
    pub(in crate::store) fn put(&self, missed: Missed, key: &[u8], record: &[u8]) {
        let Some(bytes) = row_bytes(key, record) else { return };
        let mut shards = self.lock();
        // Under the lock: a table that begins to leave after this look takes the lock after this row.
        if self.generation.load(Ordering::Acquire) != missed.generation {
            return;
        }
        let Some(shard) = shards.of(missed.hash) else { return };
        let hash = place::half(missed.hash);
        if shard.find(hash, key).is_none() {
            shard.make_room(bytes, &self.hasher);
            shard.append(hash, key, record);
            shard.shrink(&self.hasher);
        }
    }

    /// A table is about to leave memory, whose rows are on disk. Takes a while with many rows, and gives up when it is
    /// to `hurry`: false then, and the caller has to [`Self::clear`] everything instead.
    #[must_use]
    pub(super) fn supersede(&self, rows: &RowTable, hurry: impl Fn() -> bool) -> bool {
        self.generation.fetch_add(1, Ordering::AcqRel);
        for chunk in rows.chunks() {
            if hurry() {
                return false;
            }
            let hash = |(key, row)| (self.hasher.hash_one(key), key, row);
            let chunk: Vec<_> = chunk.into_iter().map(hash).collect();
            let mut shards = self.lock();
            touch_rows(chunk.iter().filter_map(|(hash, ..)| shards.likely_row(*hash)));
            for (hash, key, row) in chunk {
                let Some(shard) = shards.of(hash) else { return true };
                shard.supersede(place::half(hash), key, row, &self.hasher);
            }
        }
        true
    }

    /// Forgets all rows.
    pub(super) fn clear(&self) -> Forgotten {
        let mut shards = self.lock();
        self.generation.fetch_add(1, Ordering::AcqRel);
        let fresh = |old: &Shard| Shard { bytes_max: old.bytes_max, ..Shard::default() };
        let fresh = shards.all.iter().map(fresh).collect();
        Forgotten { _shards: std::mem::replace(&mut shards.all, fresh) }
    }

    /// Forgets all rows, and keeps none from now on.
    pub(in crate::store) fn end(&self) {
        let mut shards = self.lock();
        let all = std::mem::take(&mut shards.all);
        drop(shards);
        drop(all);
    }

    pub(in crate::store) fn stats(&self) -> RowCacheStats {
        let shards = self.lock();
        let bytes = shards.all.iter().map(Shard::bytes).sum();
        RowCacheStats { hits: shards.hits, misses: shards.misses, bytes }
    }

    fn lock(&self) -> MutexGuard<'_, Shards> {
        self.shards.lock().expect("no code panics while it holds this lock")
    }
}

impl Shards {
    /// The shard by the half of the hash that places do not show.
    fn of(&mut self, hash: u64) -> Option<&mut Shard> {
        let last = self.all.len().checked_sub(1)?;
        self.all.get_mut(hash as usize & last)
    }

    /// A row that is likely to be the one with this hash; its key is not looked at.
    fn likely_row(&self, hash: u64) -> Option<&[u8]> {
        let last = self.all.len().checked_sub(1)?;
        let shard = &self.all[hash as usize & last];
        let hash = place::half(hash);
        let same_hash = |place: &Place| place.hash == hash;
        let place = shard.places.find(Place::spread(hash), same_hash)?;
        Some(&shard.pieces[place.piece()][place.offset()..])
    }
}

/// What a row takes of a piece, unless it is too large.
fn row_bytes(key: &[u8], record: &[u8]) -> Option<usize> {
    let bytes = (HEAD_BYTES + key.len() + record.len()).next_multiple_of(UNIT_BYTES);
    (bytes <= ROW_BYTES_MAX).then_some(bytes)
}

/// A row's key and record, which lie behind each other.
struct Parts<'a> {
    key: &'a [u8],
    record: &'a [u8],
}

impl Parts<'_> {
    fn of(row: &[u8]) -> Parts<'_> {
        let number = |at: usize| usize::from(u16::from_le_bytes([row[at], row[at + 1]]));
        let (key, rest) = row[HEAD_BYTES..].split_at(number(0));
        Parts { key, record: &rest[..number(2)] }
    }

    fn bytes(&self) -> usize {
        (HEAD_BYTES + self.key.len() + self.record.len()).next_multiple_of(UNIT_BYTES)
    }
}

impl Shard {
    fn bytes(&self) -> usize {
        self.pieces.len() * PIECE_BYTES + self.places.allocation_size()
    }

    fn get(&mut self, hash: u32, key: &[u8]) -> Option<&[u8]> {
        let place = self.find(hash, key)?;
        let row = &mut self.pieces[place.piece()][place.offset()..];
        row[READ] = 1;
        Some(Parts::of(row).record)
    }

    fn find(&self, hash: u32, key: &[u8]) -> Option<Place> {
        let is_it = |place: &Place| place.hash == hash && self.parts(*place).key == key;
        self.places.find(Place::spread(hash), is_it).copied()
    }

    fn parts(&self, place: Place) -> Parts<'_> {
        Parts::of(&self.pieces[place.piece()][place.offset()..])
    }

    /// A newer row than the one that may be here.
    fn supersede(&mut self, hash: u32, key: &[u8], row: Row<'_>, hasher: &ahash::RandomState) {
        let record = row.record().and_then(|record| Some((record, row_bytes(key, record)?)));
        if let Some(place) = self.find(hash, key) {
            let old_bytes = self.parts(place).record.len();
            if let Some((record, _)) = record.filter(|(record, _)| record.len() == old_bytes) {
                let start = place.offset() + HEAD_BYTES + key.len();
                self.pieces[place.piece()][start..][..old_bytes].copy_from_slice(record);
                return;
            }
            self.remove(place);
        }
        let may_grow = || self.bytes() + self.places.allocation_size() <= self.bytes_max;
        if let Some((record, bytes)) = record
            && self.has_unused_memory()
            && (self.places.len() < self.places.capacity() || may_grow())
        {
            self.make_room(bytes, hasher);
            self.append(hash, key, record);
        }
    }

    fn remove(&mut self, place: Place) {
        let is_it = |found: &Place| found.unit == place.unit;
        if let Ok(found) = self.places.find_entry(Place::spread(place.hash), is_it) {
            found.remove();
        }
    }

    /// Whether there may be one more piece.
    fn has_unused_memory(&self) -> bool {
        self.pieces.is_empty() || self.bytes() + PIECE_BYTES <= self.bytes_max
    }

    /// Sees to it that the current piece has room for a row of so many bytes.
    fn make_room(&mut self, bytes: usize, hasher: &ahash::RandomState) {
        let room = self.pieces.get(self.current).map_or(0, |piece| PIECE_BYTES - piece.len());
        if room >= bytes {
            return;
        }
        if self.has_unused_memory() {
            self.pieces.push(Vec::with_capacity(PIECE_BYTES));
            self.current = self.pieces.len() - 1;
        } else {
            self.current = (self.current + 1) % self.pieces.len();
            self.tidy(self.current, KEPT_BYTES_MAX, hasher);
        }
    }

    /// Removes rows of a piece that were not read since this was done last, and those that do not fit into
    /// `kept_bytes_max`; the others move up.
    fn tidy(&mut self, number: usize, kept_bytes_max: usize, hasher: &ahash::RandomState) {
        let mut piece = std::mem::take(&mut self.pieces[number]);
        let (mut at, mut kept) = (0, 0);
        while at < piece.len() {
            let row = Parts::of(&piece[at..]);
            let (bytes, hash) = (row.bytes(), place::half(hasher.hash_one(row.key)));
            let here = unit(number, at);
            let is_it = |place: &Place| place.unit == here;
            if let Ok(mut found) = self.places.find_entry(Place::spread(hash), is_it) {
                if piece[at + READ] != 0 && kept + bytes <= kept_bytes_max {
                    piece.copy_within(at..at + bytes, kept);
                    piece[kept + READ] = 0;
                    found.get_mut().unit = unit(number, kept);
                    kept += bytes;
                } else {
                    found.remove();
                }
            }
            at += bytes;
        }
        piece.truncate(kept);
        self.pieces[number] = piece;
    }

    /// Appends a row to the current piece, which has room for it.
    fn append(&mut self, hash: u32, key: &[u8], record: &[u8]) {
        let number = self.current;
        let piece = &mut self.pieces[number];
        let unit = unit(number, piece.len());
        piece.extend_from_slice(&(key.len() as u16).to_le_bytes());
        piece.extend_from_slice(&(record.len() as u16).to_le_bytes());
        piece.push(0);
        piece.extend_from_slice(key);
        piece.extend_from_slice(record);
        piece.resize(piece.len().next_multiple_of(UNIT_BYTES), 0);
        let rehash = |place: &Place| Place::spread(place.hash);
        self.places.insert_unique(Place::spread(hash), Place { hash, unit }, rehash);
    }

    /// Gives pieces back for what the table of places has grown.
    fn shrink(&mut self, hasher: &ahash::RandomState) {
        while self.bytes() > self.bytes_max && self.pieces.len() > 1 {
            let last = self.pieces.len() - 1;
            self.tidy(last, 0, hasher);
            self.pieces.pop();
            if self.current == last {
                self.current = 0;
            }
        }
    }
}

/// The unit at which a row begins.
fn unit(piece: usize, offset: usize) -> u32 {
    let unit = piece * (PIECE_BYTES / UNIT_BYTES) + offset / UNIT_BYTES;
    u32::try_from(unit).expect("a shard is smaller than 32 GiB")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::super::Update;
    use super::*;

    fn get(cache: &RowCache, key: &[u8]) -> Result<Vec<u8>, Missed> {
        cache.get(key, <[u8]>::to_vec)
    }

    /// As a reader does: what is not here comes from the disk.
    fn read(cache: &RowCache, disk: &HashMap<Vec<u8>, Vec<u8>>, key: &[u8]) {
        match get(cache, key) {
            Ok(record) => assert_eq!(Some(&record), disk.get(key), "{key:?}"),
            Err(missed) => {
                if let Some(record) = disk.get(key) {
                    cache.put(missed, key, record);
                }
            }
        }
    }

    /// A table with these rows leaves.
    fn supersede(cache: &RowCache, rows: &[(&[u8], Option<&[u8]>)]) {
        let mut table = RowTable::default();
        table.put_all(rows.iter().map(|(key, record)| match record {
            Some(record) => (*key, Update::Record(bytes::Bytes::copy_from_slice(record))),
            None => (*key, Update::Delete),
        }));
        assert!(cache.supersede(&table, || false));
    }

    /// Whatever is read, replaced, deleted and pushed out: what is here is what is on disk, in bounded memory.
    #[test]
    fn a_row_here_is_the_one_on_disk() {
        for bytes_max in [64 << 10, 300 << 10, 2 * SHARD_BYTES + 1] {
            let mut random = StdRng::seed_from_u64(bytes_max as u64);
            let cache = RowCache::new(bytes_max);
            let mut disk = HashMap::new();
            for step in 0..30_000_u32 {
                let number = random.random_range(0..5000_u32);
                let key = [&number.to_be_bytes()[..], &vec![b'k'; number as usize % 40]].concat();
                if random.random_ratio(1, 4) {
                    let most = [8, 100, 1000, 2 * ROW_BYTES_MAX][random.random_range(0..4)];
                    let record = vec![step as u8; random.random_range(0..=most)];
                    let record = Some(record).filter(|_| random.random_ratio(4, 5));
                    supersede(&cache, &[(&key, record.as_deref())]);
                    match record {
                        Some(record) => disk.insert(key, record),
                        None => disk.remove(&key),
                    };
                } else {
                    read(&cache, &disk, &key);
                }
                if step == 20_000 {
                    drop(cache.clear());
                    disk.clear();
                }
                let shards = cache.lock().all.len();
                // A shard always has one piece, and the table above it.
                let floor = shards * (PIECE_BYTES + (16 << 10));
                assert!(cache.stats().bytes <= bytes_max.max(floor), "{:?}", cache.stats());
            }
            let stats = cache.stats();
            assert!(stats.hits > 100 && stats.misses > 1000, "{stats:?}");
        }
    }

    /// A reader that found a row on disk, and comes back after a newer one has left memory, keeps nothing.
    #[test]
    fn a_late_reader_brings_no_old_row() {
        let cache = RowCache::new(1 << 20);
        let missed = get(&cache, b"k").unwrap_err();
        supersede(&cache, &[(b"k", None)]);
        cache.put(missed, b"k", b"old");
        let missed = get(&cache, b"k").unwrap_err();
        drop(cache.clear());
        cache.put(missed, b"k", b"of another state");
        let missed = get(&cache, b"k").unwrap_err();
        cache.put(missed, b"k", b"new");
        assert_eq!(get(&cache, b"k").unwrap(), b"new");
    }

    /// Rows that are read again stay while many others pass by, written or read once.
    #[test]
    fn what_is_read_again_stays() {
        let cache = RowCache::new(1 << 20);
        let record = [0; 200];
        let put = |key: &[u8]| {
            if let Err(missed) = get(&cache, key) {
                cache.put(missed, key, &record);
                return false;
            }
            true
        };
        let again = |n: u32| [b"again", &n.to_be_bytes()[..]].concat();
        let mut stayed = 0;
        for n in 0..50_000_u32 {
            put(&[b"once", &n.to_be_bytes()[..]].concat());
            stayed += u32::from(put(&again(n % 500)));
            let written = [b"written", &n.to_be_bytes()[..]].concat();
            supersede(&cache, &[(&written, Some(&record))]);
        }
        assert!(stayed > 49_000, "{stayed} of 50000");
    }

    /// Rows that are written come in as long as they push nothing out, however large they are; and replace what is
    /// here in any case.
    #[test]
    fn what_is_written_pushes_nothing_out() {
        for record_bytes in [1, 3, 10, 24, 50, 100, 150, 200] {
            let cache = RowCache::new(1 << 20);
            let keys: Vec<_> = (0..40_000_u32).map(u32::to_be_bytes).collect();
            let there = |key: &[u8; 4]| {
                let shards = cache.lock();
                let hash = cache.hasher.hash_one(&key[..]);
                shards.likely_row(hash).is_some_and(|row| Parts::of(row).key == key)
            };
            let mut kept = Vec::new();
            for keys in keys.chunks(1000) {
                let record = vec![1; record_bytes];
                let rows: Vec<_> = keys.iter().map(|key| (&key[..], Some(&record[..]))).collect();
                supersede(&cache, &rows);
                assert!(kept.iter().all(there), "{record_bytes}");
                kept.extend(keys.iter().filter(|key| there(key)));
            }
            let bytes = cache.stats().bytes;
            assert!((600 << 10..=1 << 20).contains(&bytes), "{bytes} with {record_bytes}");
            assert!(kept.len() < keys.len());
            let record = vec![2; record_bytes];
            let rows: Vec<_> = keys.iter().map(|key| (&key[..], Some(&record[..]))).collect();
            supersede(&cache, &rows);
            assert!(kept.iter().all(|key| get(&cache, key).unwrap() == record));
        }
    }

    /// A table with very many rows does not hold up who is in a hurry.
    #[test]
    fn who_is_in_a_hurry_is_told_to_clear() {
        let cache = RowCache::new(1 << 20);
        supersede(&cache, &[(b"k", Some(b"old"))]);
        let missed = get(&cache, b"none").unwrap_err();
        let mut rows = RowTable::default();
        rows.put_all([(&b"k"[..], Update::Delete)]);
        assert!(!cache.supersede(&rows, || true));
        drop(cache.clear());
        cache.put(missed, b"none", b"late");
        assert!(get(&cache, b"k").is_err() && get(&cache, b"none").is_err());
        supersede(&cache, &[(b"k", Some(b"new"))]);
        assert_eq!(get(&cache, b"k").unwrap(), b"new");
        cache.end();
        assert!(get(&cache, b"k").is_err());
        assert_eq!(cache.stats().bytes, 0);
    }

    /// Without memory nothing is kept, and nothing fails.
    #[test]
    fn no_cache_misses_all() {
        let cache = RowCache::new(0);
        let missed = get(&cache, b"k").unwrap_err();
        cache.put(missed, b"k", b"record");
        supersede(&cache, &[(b"k", Some(b"record"))]);
        drop(cache.clear());
        assert!(get(&cache, b"k").is_err());
        assert_eq!(cache.stats(), RowCacheStats { hits: 0, misses: 2, bytes: 0 });
    }
}
