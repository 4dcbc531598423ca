//! The way of applied state to disk: a frozen memtable becomes a data file.
//!
//! A flush fsyncs the write-ahead log first, so that the state on disk never runs ahead of the log on
//! the same disk; then it writes the rows, sorted, with head and machine of their moment among them, into
//! a file, and hands the file to RocksDB. RocksDB fsyncs it and its manifest before it is readable, and
//! puts it above all older files. A crash before that leaves a file that nobody knows; it is written
//! anew. A crash after it has lost nothing.
//!
//! When another state is about to take this one's place, a flush that waits or writes gives way ([`Flushes::exclude`]):
//! its rows would be thrown away with the rest, and until they were written, Raft could neither vote nor append. They
//! stay in memory, and the flush begins again once that is over, with what is there then.
//!
//! So the last applied id on disk is always the one that the rows on disk belong to, and entries after
//! it must stay in the log. They do: openraft purges what a snapshot covers, and making a snapshot
//! begins with a flush.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::handoff::Position;

use super::engine::Fill;
use super::machine::{CHUNKED, stored_chunks};
use super::memtable::Frozen;
use super::meta;
use super::reader::StateShared;

/// The file on its way, beside the database.
pub(super) const FILE_NAME: &str = "flush.sst";

/// With this many files that reads must look into one by one, a flush gives compaction time: where
/// RocksDB would begin to slow all writers down, which it is told not to for this family.
const LEVEL0_FILES_MAX: u64 = 20;

/// For so long at most: more files make reads slower, and nothing wrong. Memory is bounded all the same, because
/// apply waits while a full table has no room.
const LEVEL0_WAIT_MAX: Duration = Duration::from_secs(10);
const LEVEL0_POLL: Duration = Duration::from_millis(20);

/// Makes one flush at a time.
pub(super) struct Flushes {
    one: Mutex<Trimmed>,
    /// Held by who excludes flushes. A flush that has given way waits here, or it would be back before the other's
    /// turn.
    excluding: Mutex<()>,
    /// Whether the flush that runs is in somebody's way.
    gives_way: AtomicBool,
    file: PathBuf,
}

/// While this is held, no flush runs and no file changes the data family.
pub(super) struct NoFlush<'a> {
    trimmed: MutexGuard<'a, Trimmed>,
    _excluding: MutexGuard<'a, ()>,
}

/// What became of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flushed {
    Written,
    /// Nothing was; the rows are in memory as before.
    GaveWay,
}

/// Up to where the change log on disk has been deleted since the data family became the active one.
#[derive(Default)]
pub(super) struct Trimmed(Position);

impl Flushes {
    pub(super) fn new(file: PathBuf) -> Self {
        let gives_way = AtomicBool::new(false);
        Self { one: Mutex::default(), excluding: Mutex::default(), gives_way, file }
    }

    /// Keeps flushes away. One that runs gives way, so this takes no longer than to put a finished file in its place.
    pub(super) fn exclude(&self) -> NoFlush<'_> {
        let excluding = self.excluding.lock().expect(NO_PANIC);
        self.gives_way.store(true, Ordering::Release);
        let trimmed = self.one.lock().expect(NO_PANIC);
        self.gives_way.store(false, Ordering::Release);
        NoFlush { trimmed, _excluding: excluding }
    }

    /// A flush's turn, behind whoever excludes flushes.
    fn turn(&self) -> MutexGuard<'_, Trimmed> {
        drop(self.excluding.lock().expect(NO_PANIC));
        self.one.lock().expect(NO_PANIC)
    }

    fn gives_way(&self) -> bool {
        self.gives_way.load(Ordering::Acquire)
    }
}

impl NoFlush<'_> {
    /// Another data family becomes the active one; nothing is known of the change log in it.
    pub(super) fn forget(&mut self) {
        *self.trimmed = Trimmed::default();
    }
}

const NO_PANIC: &str = "no code panics while it holds this lock";

impl StateShared {
    /// Freezes the active memtable if it is full and there is no frozen one; true if it did.
    pub(super) fn freeze_if_full(&self) -> bool {
        self.memtables.is_due() && self.freeze().is_some()
    }

    /// Rows, head and machine of one moment: no round is applied while the machine is held.
    fn freeze(&self) -> Option<Arc<Frozen>> {
        let machine = self.machine();
        self.memtables.freeze(|| machine.side())
    }

    /// Writes the frozen table to disk, if there is one. Blocks.
    ///
    /// # Errors
    /// The storage has failed, now or before. Rows that could not be written stay in memory.
    pub(super) fn flush_frozen(&self) -> io::Result<()> {
        loop {
            let mut turn = self.flushes.turn();
            let Some(frozen) = self.memtables.frozen() else { return Ok(()) };
            if self.flush_table(&frozen, &mut turn)? == Flushed::Written {
                return Ok(());
            }
        }
    }

    /// Writes everything that was applied before this call to disk. Blocks.
    ///
    /// # Errors
    /// As [`Self::flush_frozen`].
    pub(super) fn flush(&self) -> io::Result<()> {
        loop {
            let mut turn = self.flushes.turn();
            if let Some(frozen) = self.memtables.frozen()
                && self.flush_table(&frozen, &mut turn)? == Flushed::GaveWay
            {
                continue;
            }
            let Some(frozen) = self.freeze() else { return Ok(()) };
            if self.flush_table(&frozen, &mut turn)? == Flushed::Written {
                return Ok(());
            }
        }
    }

    fn flush_table(&self, frozen: &Frozen, trimmed: &mut Trimmed) -> io::Result<Flushed> {
        match self.write_file(frozen, trimmed.0) {
            Ok(Flushed::Written) => {}
            Ok(Flushed::GaveWay) => return Ok(Flushed::GaveWay),
            Err(error) => {
                let error = self.engine.fail("flush", &error);
                self.memtables.give_up();
                return Err(error);
            }
        }
        trimmed.0 = frozen.side.log_start;
        self.memtables.thaw(|| self.flushes.gives_way());
        Ok(Flushed::Written)
    }

    fn write_file(&self, frozen: &Frozen, trimmed: Position) -> io::Result<Flushed> {
        self.await_compaction()?;
        if self.flushes.gives_way() {
            return Ok(Flushed::GaveWay);
        }
        self.engine.sync()?;
        let head = meta::encode_head(&frozen.head);
        let rows = frozen.rows.sorted();
        let mut key_bytes = Vec::new();
        let data = self.view().data.clone();
        let side = self.side_rows(&data, frozen)?;
        let log_start = frozen.side.log_start;
        let written = self.engine.add_file(&data, &self.flushes.file, |file| {
            if log_start > trimmed {
                file.delete_range(&meta::change_key(trimmed), &meta::change_key(log_start))?;
            }
            for (position, change) in frozen.rows.changes_from(log_start) {
                file.put(&meta::change_key(*position), change)?;
            }
            for (stored, row) in &side {
                match row {
                    Some(row) => file.put(stored, row)?,
                    None => file.delete(stored)?,
                }
            }
            file.put(meta::KEY_HEAD, &head)?;
            for (key, row) in &rows {
                if self.flushes.gives_way() {
                    return Ok(Fill::BrokenOff);
                }
                meta::record_key(key, &mut key_bytes);
                match row {
                    Some(record) => file.put(&key_bytes, record)?,
                    None => file.delete(&key_bytes)?,
                }
            }
            Ok(Fill::Done)
        });
        Ok(match written? {
            Fill::Done => Flushed::Written,
            Fill::BrokenOff => Flushed::GaveWay,
        })
    }

    /// The machine's rows in their order, with `None` where there was a chunk before and is none now.
    fn side_rows(
        &self,
        data: &str,
        frozen: &Frozen,
    ) -> io::Result<BTreeMap<Vec<u8>, Option<Bytes>>> {
        let family = self.engine.family(data)?;
        let mut rows = BTreeMap::new();
        for prefix in CHUNKED {
            for number in 0..stored_chunks(self.engine.db(), &family, prefix)? {
                rows.insert(meta::chunk_key(prefix, number), None);
            }
        }
        let now = frozen.side.rows.iter().map(|(key, row)| (key.clone(), Some(row.clone())));
        rows.extend(now);
        Ok(rows)
    }

    /// The brake on what adds files. RocksDB's own would hold up the Raft log as well. Ends early where the flush is
    /// to give way.
    fn await_compaction(&self) -> io::Result<()> {
        let data = self.view().data.clone();
        let deadline = Instant::now() + LEVEL0_WAIT_MAX;
        while Instant::now() < deadline && !self.flushes.gives_way() {
            self.engine.check()?;
            if self.engine.number(&data, "rocksdb.num-files-at-level0")? < LEVEL0_FILES_MAX {
                break;
            }
            std::thread::sleep(LEVEL0_POLL);
        }
        Ok(())
    }
}
