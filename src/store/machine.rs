//! What the state machine knows beside rows and head: what applying an entry decides by, and changes.
//!
//! One mutex in [`super::reader::StateShared`] owns it. A round of entries is applied under that lock
//! from its first entry to the moment when its rows and head are visible, and a memtable is frozen
//! under it, too ([`super::flush`]): so what goes to disk is all three as of the same entry. An error
//! in the middle of a round makes the storage fail, and nothing of the machine reaches the disk any
//! more.
//!
//! Locks are taken in this order, each held while the next is taken or not: one flush at a time
//! ([`super::flush::Flushes`]), the machine, the view of ring and data family, the memtables.

use std::io;

use bytes::Bytes;
use rocksdb::{Direction, IteratorMode};

use super::dedupe::{Decoder, Dedupe};
use super::engine::{Cf, Db, to_io};
use super::meta::{self, corrupt};
use super::snapshot::Head;

/// Stored rows that belong to the machine: in order, before the head.
pub(super) type SideRows = Vec<(Vec<u8>, Bytes)>;

#[derive(Debug, Default)]
pub(super) struct Machine {
    /// Writes that happen at most once, and log time.
    pub(super) dedupe: Dedupe,
}

impl Machine {
    /// The machine as it lies in a data family beside this head.
    ///
    /// # Errors
    /// What lies there is not whole.
    pub(super) fn load(db: &Db, family: &Cf<'_>, head: &Head) -> io::Result<Self> {
        let mut decoder = Decoder::default();
        let mut expected = 0;
        for item in db.iterator_cf(family, IteratorMode::From(meta::DEDUPE, Direction::Forward)) {
            let (stored, chunk) = item.map_err(to_io)?;
            if !stored.starts_with(meta::DEDUPE) {
                break;
            }
            if *stored != *meta::dedupe_key(expected) {
                return Err(corrupt("the table of answers", "a chunk is missing, or one too many"));
            }
            decoder.chunk(chunk.into_vec().into())?;
            expected += 1;
        }
        if expected == 0 && head.applied().is_none() {
            return Ok(Self::default());
        }
        Ok(Self { dedupe: decoder.finish()? })
    }

    /// The machine as it is stored.
    pub(super) fn side_rows(&self) -> SideRows {
        (0..).map(meta::dedupe_key).zip(self.dedupe.encode()).collect()
    }
}

/// How many rows of the machine lie in a data family, whatever they hold.
pub(super) fn stored_side_rows(db: &Db, family: &Cf<'_>) -> io::Result<u32> {
    // The last one tells: they are numbered.
    let end = meta::dedupe_key(u32::MAX);
    match db.iterator_cf(family, IteratorMode::From(&end, Direction::Reverse)).next().transpose() {
        Ok(Some((stored, _))) if stored.starts_with(meta::DEDUPE) => {
            Ok(meta::dedupe_number(&stored)? + 1)
        }
        Ok(_) => Ok(0),
        Err(error) => Err(to_io(error)),
    }
}
