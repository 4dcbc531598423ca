//! A digest of the applied state, by which replicas can be compared.
//!
//! Replicas that have applied the same entries hold the same records with the same revisions, the same
//! ring, and remember the same writes that happen at most once. The digest covers all of these, so two
//! digests of the same applied entry that differ tell of a broken disk or a bug. What may lie about
//! differently is left out: the change log, which is trimmed when there is time, and answers of attempts
//! that are copied, which the destination's own count covers.

use std::io;

use rocksdb::{IteratorMode, ReadOptions};
use xxhash_rust::xxh3::Xxh3Default;

use crate::types::LogId;

use super::engine::to_io;
use super::meta;
use super::reader::StateReader;

/// After so many rows it is looked whether anybody still waits: some milliseconds, if they are large.
const WANTED_EVERY: usize = 1024;

/// What a replica's state comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateDigest {
    /// The last entry that it contains; `None`: not even one.
    pub applied: Option<LogId>,
    /// How many keys have a row, with those that are staged or to be deleted.
    pub rows: u64,
    /// A 64-bit hash of everything that replicas must agree on.
    pub hash: u64,
}

impl StateReader {
    /// Reads the whole state, as of one moment, from disk: seconds for a gigabyte. Blocks, and holds up
    /// nobody else. Gives up soon after it is not `wanted` any more, so that a store can be closed.
    ///
    /// # Errors
    /// The state cannot be written to disk, or not be read; or it was given up.
    pub fn digest(&self, wanted: impl Fn() -> bool) -> io::Result<StateDigest> {
        self.shared.flush()?;
        let engine = &self.shared.engine;
        let data = self.shared.view().data.clone();
        let family = engine.family(&data)?;
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        let (mut hasher, mut applied, mut rows) = (Xxh3Default::new(), None, 0);
        let items = engine.db().iterator_cf_opt(&family, options, IteratorMode::Start);
        for (looks, item) in items.enumerate() {
            let (stored, row) = item.map_err(to_io)?;
            if looks.is_multiple_of(WANTED_EVERY) && !wanted() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let is_record = stored.starts_with(meta::RECORDS);
            if *stored == *meta::KEY_HEAD {
                applied = meta::decode_head(&row)?.applied();
            } else if is_record || stored.starts_with(meta::DEDUPE) || *stored == *meta::KEY_RING {
                for part in [&stored, &row] {
                    hasher.update(&(part.len() as u64).to_be_bytes());
                    hasher.update(part);
                }
                rows += u64::from(is_record);
            }
        }
        Ok(StateDigest { applied, rows, hash: hasher.digest() })
    }
}
