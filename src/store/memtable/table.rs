//! Rows by key, in few large pieces of memory.
//!
//! Applying a write is mostly waiting for memory: many more rows than fit into a cache, in no order. So
//! a key and its record stand side by side, a new record takes the place of the old one where it has
//! room, and the table above them holds eight bytes for a row, which a cache does hold. Nothing is
//! allocated or freed for a single row, and a table that goes gives back a few pieces. And the rows of
//! several writes are waited for together ([`RowTable::put_all`]).
//!
//! ```text
//! row = key_bytes:u32, room:u32, record_bytes:u32, key, record, unused        little-endian
//!       room counts record and unused; record_bytes is DELETED or LARGE where there is no record,
//!       and then what stands in its place is nothing, or its number:u32 among the large ones
//! ```
//!
//! Rows begin at multiples of [`UNIT_BYTES`] and lie within one piece. A row that outgrows its room is
//! written anew elsewhere, with twice the room. What it leaves behind is never used again, and counts as
//! the table's; a key that keeps changing its size leaves less than four times its largest record, and its
//! own bytes ten times at most. Records beyond [`NEAR_BYTES_MAX`] leave nothing.

use bytes::Bytes;
use hashbrown::HashTable;

use super::Update;
use super::place::{self, UNIT_BYTES};

/// Larger records are allocated one by one: copying them whenever they are read would cost more.
pub(super) const NEAR_BYTES_MAX: usize = 2 << 10;

/// What is allocated at once. Small against a table, large against nearly all rows.
const PIECE_BYTES: usize = 256 << 10;

const UNITS: usize = PIECE_BYTES / UNIT_BYTES;

type Place = place::Place<UNITS>;

const HEAD_BYTES: usize = 12;

/// How many rows are waited for together: more than a processor has loads under way, few enough that the first
/// is still in the cache when the last one is there.
const CHUNK_ROWS: usize = 32;

/// What a cache loads at once, on all that this runs on.
const CACHE_LINE_BYTES: usize = 64;

/// There is no record: the key was deleted.
const DELETED: u32 = u32::MAX;

/// The record is one of the large ones.
const LARGE: u32 = u32::MAX - 1;

/// What a row costs in the table of places, which is half full to full: an estimate.
const PLACE_COST_BYTES: usize = 16;

/// Rows by key, newest only.
#[derive(Default)]
pub(super) struct RowTable {
    places: HashTable<Place>,
    hasher: ahash::RandomState,
    pieces: Vec<Vec<u8>>,
    large: Vec<Bytes>,
    /// Numbers of `large` that are not in use.
    large_free: Vec<u32>,
    large_bytes: usize,
    records: u64,
}

/// A row as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Row<'a> {
    Near(&'a [u8]),
    Large(&'a Bytes),
    /// The key was deleted.
    Deleted,
}

impl<'a> Row<'a> {
    /// The record, unless the key was deleted.
    pub(in crate::store) fn record(self) -> Option<&'a [u8]> {
        match self {
            Self::Near(record) => Some(record),
            Self::Large(record) => Some(record),
            Self::Deleted => None,
        }
    }

    /// The record beyond the table's life; copied, if it is small.
    pub(in crate::store) fn to_bytes(self) -> Option<Bytes> {
        match self {
            Self::Near(record) => Some(Bytes::copy_from_slice(record)),
            Self::Large(record) => Some(record.clone()),
            Self::Deleted => None,
        }
    }
}

/// A row's head and where its key begins.
struct Head {
    key_bytes: usize,
    room: usize,
    record_bytes: u32,
}

impl RowTable {
    pub(super) fn with_capacity(rows: usize) -> Self {
        Self { places: HashTable::with_capacity(rows), ..Self::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// How many of the rows are records.
    pub(super) fn records(&self) -> u64 {
        self.records
    }

    /// Bytes of memory, about.
    pub(super) fn bytes(&self) -> usize {
        let full = self.pieces.len().saturating_sub(1) * PIECE_BYTES;
        let last = self.pieces.last().map_or(0, Vec::len);
        full + last + self.large_bytes + self.len() * PLACE_COST_BYTES
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<Row<'_>> {
        Some(self.row(self.find(self.hash(key), key)?).1)
    }

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.find(self.hash(key), key).is_some()
    }

    /// What is likely to be the key's row, for [`touch_rows`].
    pub(super) fn likely_row_of(&self, key: &[u8]) -> Option<&[u8]> {
        self.likely_row(self.hash(key))
    }

    /// All rows, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], Row<'_>)> {
        self.places.iter().map(|place| self.row(*place))
    }

    /// All rows, in no order, so many at a time that they are waited for together.
    pub(super) fn chunks(&self) -> impl Iterator<Item = Vec<(&[u8], Row<'_>)>> {
        let mut places = self.places.iter();
        std::iter::from_fn(move || {
            let chunk: Vec<_> = places.by_ref().take(CHUNK_ROWS).collect();
            touch_rows(chunk.iter().map(|place| &self.pieces[place.piece()][place.offset()..]));
            let rows: Vec<_> = chunk.into_iter().map(|place| self.row(*place)).collect();
            (!rows.is_empty()).then_some(rows)
        })
    }

    /// Puts rows, of one key after the other.
    ///
    /// First it looks where the next few are, which nothing depends on: so a processor goes on to the next
    /// before one has come from memory, and they come at the same time. Then it puts them.
    pub(super) fn put_all<'a>(
        &mut self,
        updates: impl IntoIterator<Item = (&'a [u8], Update<'a>)>,
    ) {
        let mut updates = updates.into_iter();
        let mut chunk = Vec::with_capacity(CHUNK_ROWS);
        loop {
            let next = updates.by_ref().take(CHUNK_ROWS);
            chunk.extend(next.map(|(key, update)| (self.hash(key), key, update)));
            if chunk.is_empty() {
                return;
            }
            // Without this, the compiler would see that nobody needs what was looked at.
            touch_rows(chunk.iter().filter_map(|(hash, ..)| self.likely_row(*hash)));
            for (hash, key, update) in chunk.drain(..) {
                self.put(hash, key, update);
            }
        }
    }

    /// A row that is likely to be the one with this hash; its key is not looked at.
    fn likely_row(&self, hash: u32) -> Option<&[u8]> {
        let same_hash = |place: &Place| place.hash == hash;
        let place = self.places.find(Place::spread(hash), same_hash)?;
        Some(&self.pieces[place.piece()][place.offset()..])
    }

    fn put(&mut self, hash: u32, key: &[u8], update: Update<'_>) {
        let is_record = !update.is_delete();
        if let Some(place) = self.find(hash, key) {
            let was_record = self.release(place);
            let old = self.head(place);
            if update.near_bytes() <= old.room {
                self.write_record(place, &old, update);
            } else {
                // Twice as much, so that one that grows step by step does not move at each.
                let room = update.near_bytes().max((2 * old.room).min(NEAR_BYTES_MAX));
                let unit = self.append(key, room, update);
                let slot = self.places.find_mut(Place::spread(hash), |at| at.unit == place.unit);
                slot.expect("it was found just now").unit = unit;
            }
            self.records -= u64::from(was_record);
        } else {
            let unit = self.append(key, update.near_bytes(), update);
            let rehash = |place: &Place| Place::spread(place.hash);
            self.places.insert_unique(Place::spread(hash), Place { hash, unit }, rehash);
        }
        self.records += u64::from(is_record);
    }

    fn hash(&self, key: &[u8]) -> u32 {
        place::half(self.hasher.hash_one(key))
    }

    fn find(&self, hash: u32, key: &[u8]) -> Option<Place> {
        let is_it = |place: &Place| place.hash == hash && self.key(*place) == key;
        self.places.find(Place::spread(hash), is_it).copied()
    }

    fn head(&self, place: Place) -> Head {
        let bytes = &self.pieces[place.piece()][place.offset()..];
        let number = |at: usize| {
            let bytes = bytes[at..at + 4].try_into();
            u32::from_le_bytes(bytes.expect("these are four bytes"))
        };
        Head { key_bytes: number(0) as usize, room: number(4) as usize, record_bytes: number(8) }
    }

    fn key(&self, place: Place) -> &[u8] {
        let start = place.offset() + HEAD_BYTES;
        &self.pieces[place.piece()][start..start + self.head(place).key_bytes]
    }

    fn row(&self, place: Place) -> (&[u8], Row<'_>) {
        let head = self.head(place);
        let bytes = &self.pieces[place.piece()][place.offset() + HEAD_BYTES..];
        let (key, rest) = bytes.split_at(head.key_bytes);
        let row = match head.record_bytes {
            DELETED => Row::Deleted,
            LARGE => Row::Large(&self.large[large_number(rest)]),
            record_bytes => Row::Near(&rest[..record_bytes as usize]),
        };
        (key, row)
    }

    /// Lets go of what a row holds outside its piece. True if it was a record.
    fn release(&mut self, place: Place) -> bool {
        let head = self.head(place);
        if head.record_bytes == LARGE {
            let start = place.offset() + HEAD_BYTES + head.key_bytes;
            let number = large_number(&self.pieces[place.piece()][start..]);
            self.large_bytes -= std::mem::take(&mut self.large[number]).len();
            self.large_free.push(number as u32);
        }
        head.record_bytes != DELETED
    }

    /// Writes a new row; the unit that it begins at.
    fn append(&mut self, key: &[u8], room: usize, update: Update<'_>) -> u32 {
        let bytes = (HEAD_BYTES + key.len() + room).next_multiple_of(UNIT_BYTES);
        let room = bytes - HEAD_BYTES - key.len();
        let fits = |piece: &Vec<u8>| piece.len() + bytes <= PIECE_BYTES;
        if !self.pieces.last().is_some_and(fits) {
            self.pieces.push(Vec::with_capacity(PIECE_BYTES.max(bytes)));
        }
        let number = self.pieces.len() - 1;
        let piece = &mut self.pieces[number];
        let unit = number * UNITS + piece.len() / UNIT_BYTES;
        let unit = u32::try_from(unit).expect("a memtable is smaller than 32 GiB");
        piece.extend_from_slice(&(key.len() as u32).to_le_bytes());
        piece.extend_from_slice(&(room as u32).to_le_bytes());
        piece.extend_from_slice(&DELETED.to_le_bytes());
        piece.extend_from_slice(key);
        piece.resize(piece.len() + room, 0);
        let head = Head { key_bytes: key.len(), room, record_bytes: DELETED };
        self.write_record(Place { hash: 0, unit }, &head, update);
        unit
    }

    /// Writes a record where there is room for it.
    fn write_record(&mut self, place: Place, head: &Head, update: Update<'_>) {
        let large = update.large().map(|record| self.keep_large(record));
        let row = &mut self.pieces[place.piece()][place.offset()..];
        let (row, record) = row.split_at_mut(HEAD_BYTES + head.key_bytes);
        let record_bytes = match (large, update.record_bytes()) {
            (Some(number), _) => {
                record[..4].copy_from_slice(&number.to_le_bytes());
                LARGE
            }
            (None, Some(bytes)) => {
                update.write(&mut record[..bytes]);
                bytes as u32
            }
            (None, None) => DELETED,
        };
        row[8..HEAD_BYTES].copy_from_slice(&record_bytes.to_le_bytes());
    }

    fn keep_large(&mut self, record: Bytes) -> u32 {
        self.large_bytes += record.len();
        if let Some(number) = self.large_free.pop() {
            self.large[number as usize] = record;
            return number;
        }
        self.large.push(record);
        self.large.len() as u32 - 1
    }
}

/// Loads the beginnings of rows, which are most of small ones. First all of them are found, then all are loaded:
/// the less there is to do between two loads, the more of them a processor has under way.
pub(super) fn touch_rows<'a>(rows: impl Iterator<Item = &'a [u8]>) {
    let rows: Vec<_> = rows.collect();
    let touch = |row: &[u8]| {
        let at = |line: usize| row.get(line * CACHE_LINE_BYTES).copied().unwrap_or_default();
        at(0) ^ at(1) ^ at(2)
    };
    // Without this, the compiler would see that nobody needs what was looked at.
    std::hint::black_box(rows.into_iter().fold(0, |seen, row| seen ^ touch(row)));
}

fn large_number(bytes: &[u8]) -> usize {
    u32::from_le_bytes(bytes[..4].try_into().expect("these are four bytes")) as usize
}

impl Update<'_> {
    /// How much room it takes in a piece.
    fn near_bytes(&self) -> usize {
        match self.record_bytes() {
            Some(bytes) if bytes <= NEAR_BYTES_MAX => bytes.max(size_of::<u32>()),
            _ => size_of::<u32>(),
        }
    }

    /// The record, if it is allocated by itself.
    fn large(&self) -> Option<Bytes> {
        self.record_bytes().filter(|bytes| *bytes > NEAR_BYTES_MAX).and_then(|_| self.to_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn record(bytes: &[u8]) -> Update<'static> {
        Update::Record(Bytes::copy_from_slice(bytes))
    }

    fn put(table: &mut RowTable, key: &[u8], update: Update<'_>) {
        table.put_all([(key, update)]);
    }

    /// Whatever comes in whatever size and order, the table holds what a map would.
    #[test]
    fn the_table_is_a_map() {
        let mut random = StdRng::seed_from_u64(7);
        let (mut table, mut model) =
            (RowTable::default(), HashMap::<Vec<u8>, Option<Vec<u8>>>::new());
        for step in 0..30_000_u32 {
            let number = random.random_range(0..2000_u32);
            let key = vec![b'k'; 1 + number as usize % 50];
            let key = [&number.to_be_bytes()[..], &key].concat();
            if random.random_ratio(1, 5) {
                put(&mut table, &key, Update::Delete);
                model.insert(key, None);
                continue;
            }
            let most = [8, 200, NEAR_BYTES_MAX, 3 * NEAR_BYTES_MAX][random.random_range(0..4)];
            let value = vec![step as u8; random.random_range(0..=most)];
            put(&mut table, &key, record(&value));
            model.insert(key, Some(value));
        }
        let row = |key: &[u8]| table.get(key).map(|row| row.record().map(<[u8]>::to_vec));
        for (key, value) in &model {
            assert_eq!(row(key).as_ref(), Some(value));
            assert!(table.contains(key));
        }
        let all = table.iter().map(|(key, row)| (key.to_vec(), row.record().map(<[u8]>::to_vec)));
        assert_eq!(all.collect::<HashMap<_, _>>(), model);
        assert_eq!((table.len(), row(b"none")), (model.len(), None));
        assert_eq!(table.records(), model.values().flatten().count() as u64);
        let large = model.values().flatten().map(Vec::len).filter(|bytes| *bytes > NEAR_BYTES_MAX);
        assert_eq!(table.large_bytes, large.sum::<usize>());
        assert!(table.large.len() <= 2000, "numbers are used again");
    }

    /// A key that is written again and again, in whatever sizes, does not fill the memory.
    #[test]
    fn one_key_takes_a_bounded_place() {
        let mut table = RowTable::default();
        for round in 0..3 {
            for bytes in 0..NEAR_BYTES_MAX + 10 {
                put(&mut table, b"key", record(&vec![round; bytes]));
                put(&mut table, b"key", Update::Delete);
            }
        }
        assert!(table.bytes() < 5 * NEAR_BYTES_MAX, "{}", table.bytes());
        assert_eq!((table.len(), table.records()), (1, 0));
    }

    /// A row that no piece has room for gets one of its own, and others are not in its way.
    #[test]
    fn pieces_end_and_begin() {
        let mut table = RowTable::default();
        let giant = vec![b'g'; 2 * PIECE_BYTES];
        put(&mut table, b"before", record(b"1"));
        put(&mut table, &giant, record(b"2"));
        let values = (0..1000_u32).map(|n| (n.to_be_bytes(), vec![n as u8; 1000]));
        let values: Vec<_> = values.collect();
        table.put_all(values.iter().map(|(key, value)| (&key[..], record(value))));
        let value = |key: &[u8]| table.get(key).and_then(Row::record).map(<[u8]>::to_vec);
        assert_eq!((value(b"before"), value(&giant)), (Some(b"1".to_vec()), Some(b"2".to_vec())));
        for (key, expected) in &values {
            assert_eq!(value(key).as_ref(), Some(expected));
        }
        assert!(table.pieces.len() > 4);
    }
}
