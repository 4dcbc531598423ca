//! Staging: the receiver's side of a snapshot.
//!
//! Chunks go into a column family of their own, apart from the live data and outside the write-ahead
//! log; nothing of it is served. When all have arrived and count and digest agree, the family is
//! flushed and fsynced, and becomes a [`StagedSnapshot`] that the state machine can switch to. There
//! is one staging at a time: a transfer of another snapshot replaces it. It does not survive a
//! restart; the transfer then starts again. One that nobody goes on with is given up after a while: a new
//! leader may have no need of it, and it is as large as the state.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rocksdb::WriteBatch;

use crate::types::SnapshotMeta;

use super::engine::CF_DATA_PREFIX;
use super::machine::Machine;
use super::meta::{self, corrupt};
use super::reader::StateShared;
use super::snapshot::{Body, Cursor, Head, SnapshotData, decode_chunk};

/// A staging of which nothing was heard for this long is given up: longer than a sender keeps the image for a
/// follower that is away.
pub(super) const ABANDONED_AFTER: Duration = Duration::from_secs(600);

/// Where a transfer stands on the receiving side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagingPosition {
    /// The number of the chunk that is expected next; counts from 0.
    pub next_seq: u64,
    /// Where that chunk starts: for [`super::snapshot::SnapshotImage::read_chunk`].
    pub cursor: Bytes,
    /// Whether the last chunk has arrived.
    pub complete: bool,
}

/// Takes in snapshots. Clones share the one staging. All methods block on the disk.
#[derive(Clone)]
pub struct SnapshotStager {
    shared: Arc<StateShared>,
    staging: Arc<Mutex<Option<Staging>>>,
    /// The number of the next staging's column family.
    next_family: Arc<AtomicU64>,
}

struct Staging {
    id: u64,
    family: FamilyGuard,
    head: Option<Head>,
    cursor: Cursor,
    next_seq: u64,
    complete: bool,
    /// When its sender was heard of last.
    heard_at: Instant,
}

impl Staging {
    fn is_abandoned(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard_at) >= ABANDONED_AFTER
    }

    fn position(&self) -> StagingPosition {
        StagingPosition {
            next_seq: self.next_seq,
            cursor: self.cursor.encode(),
            complete: self.complete,
        }
    }
}

/// A column family that goes with its owner, unless it was kept.
struct FamilyGuard {
    shared: Arc<StateShared>,
    name: String,
    kept: AtomicBool,
}

impl Drop for FamilyGuard {
    fn drop(&mut self) {
        if self.kept.load(Ordering::Acquire) {
            return;
        }
        if let Err(error) = self.shared.engine.drop_family(&self.name) {
            tracing::warn!(family = %self.name, %error, "cannot drop a staging family");
        }
    }
}

/// A snapshot that arrived whole, was verified and is on disk. Dropping the last clone of one that
/// was not installed removes it.
#[derive(Clone)]
pub struct StagedSnapshot(Arc<Staged>);

struct Staged {
    family: FamilyGuard,
    head: Head,
}

impl fmt::Debug for StagedSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StagedSnapshot(up to {:?})", self.0.head.applied())
    }
}

impl StagedSnapshot {
    /// What it must have been announced as.
    pub fn meta(&self) -> SnapshotMeta {
        self.0.head.meta()
    }

    pub(super) fn head(&self) -> &Head {
        &self.0.head
    }

    pub(super) fn family(&self) -> &str {
        &self.0.family.name
    }

    /// The family has become the live one.
    pub(super) fn keep(&self) {
        self.0.family.kept.store(true, Ordering::Release);
    }
}

impl SnapshotStager {
    pub(super) fn new(shared: Arc<StateShared>) -> Self {
        let active = shared.view().data.clone();
        let number = active.strip_prefix(CF_DATA_PREFIX).and_then(|n| n.parse::<u64>().ok());
        let next_family = Arc::new(AtomicU64::new(number.map_or(1, |n| n + 1)));
        Self { shared, staging: Arc::default(), next_family }
    }

    /// Starts taking in snapshot `id`, or tells where its interrupted transfer goes on. A staging of
    /// another snapshot is given up.
    pub fn begin(&self, id: u64) -> io::Result<StagingPosition> {
        let mut slot = self.lock();
        if let Some(staging) = slot.as_mut().filter(|staging| staging.id == id) {
            staging.heard_at = Instant::now();
            return Ok(staging.position());
        }
        *slot = None;
        let number = self.next_family.fetch_add(1, Ordering::Relaxed);
        let name = format!("{CF_DATA_PREFIX}{number}");
        self.shared.engine.create_family(&name)?;
        let family =
            FamilyGuard { shared: self.shared.clone(), name, kept: AtomicBool::new(false) };
        let staging = Staging {
            id,
            family,
            head: None,
            cursor: Cursor::default(),
            next_seq: 0,
            complete: false,
            heard_at: Instant::now(),
        };
        let position = staging.position();
        *slot = Some(staging);
        Ok(position)
    }

    /// Whether there is a staging that nobody goes on with. Does not block.
    pub fn is_abandoned(&self, now: Instant) -> bool {
        // Whoever holds it goes on with it.
        let Ok(slot) = self.staging.try_lock() else { return false };
        slot.as_ref().is_some_and(|staging| staging.is_abandoned(now))
    }

    /// Removes the staging if nobody goes on with it. If its sender comes back after all, the transfer starts
    /// again.
    pub fn give_up_abandoned(&self, now: Instant) {
        let abandoned = self.lock().take_if(|staging| staging.is_abandoned(now));
        if let Some(staging) = abandoned {
            tracing::info!(
                chunks = staging.next_seq,
                "gave up a snapshot that nobody goes on sending"
            );
        }
    }

    /// Takes chunk `seq` of snapshot `id`. A repeat of an earlier chunk changes nothing and is
    /// answered with the present position.
    ///
    /// # Errors
    /// No staging of this snapshot, a chunk from beyond the position, a chunk that does not verify, or
    /// a failed write.
    pub fn write(&self, id: u64, seq: u64, chunk: Bytes) -> io::Result<StagingPosition> {
        let mut slot = self.lock();
        let staging = expect_staging(&mut slot, id)?;
        staging.heard_at = Instant::now();
        if seq < staging.next_seq {
            return Ok(staging.position());
        }
        if seq > staging.next_seq || staging.complete {
            let text = format!("chunk {seq} was sent, but {} is expected", staging.next_seq);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        match decode_chunk(&chunk)? {
            Body::Head(head) if staging.head.is_none() => {
                staging.head = Some(*head);
                staging.cursor.head_done = true;
            }
            Body::Rows(rows) if staging.head.is_some() => {
                self.write_rows(staging, &rows)?;
            }
            Body::End { count, digest } if staging.head.is_some() => {
                if (count, digest) != (staging.cursor.count, staging.cursor.digest) {
                    return Err(corrupt("a snapshot", "count or digest of its rows differ"));
                }
                staging.complete = true;
            }
            _ => return Err(corrupt("a snapshot", "its chunks are out of order")),
        }
        staging.next_seq += 1;
        Ok(staging.position())
    }

    /// Ends a transfer whose chunks have all arrived: what was staged is on disk when this returns.
    pub fn finish(&self, id: u64) -> io::Result<SnapshotData> {
        let mut slot = self.lock();
        if !expect_staging(&mut slot, id)?.complete {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "chunks are missing"));
        }
        let staging = slot.take().ok_or_else(|| no_staging(id))?;
        let head = staging.head.ok_or_else(|| corrupt("a snapshot", "it has no head"))?;
        let engine = &self.shared.engine;
        let mut batch = WriteBatch::default();
        let family = engine.family(&staging.family.name)?;
        batch.put_cf(&family, meta::KEY_HEAD, meta::encode_head(&head));
        engine.write_unlogged(batch)?;
        engine.flush_family(&staging.family.name)?;
        // What counts and digests cannot tell: whether the rows make sense together.
        Machine::load(engine.db(), &family, &head)?;
        Ok(SnapshotData::Staged(StagedSnapshot(Arc::new(Staged { family: staging.family, head }))))
    }

    fn write_rows(&self, staging: &mut Staging, rows: &[(Bytes, Bytes)]) -> io::Result<()> {
        let engine = &self.shared.engine;
        let mut batch = WriteBatch::default();
        let mut cursor = staging.cursor.clone();
        {
            let family = engine.family(&staging.family.name)?;
            for (stored, row) in rows {
                if *stored <= cursor.key {
                    return Err(corrupt("a snapshot", "its keys are not in order"));
                }
                meta::check_row(stored, row)?;
                batch.put_cf(&family, stored, row);
                cursor.pass(stored, row);
                cursor.key = stored.clone();
            }
        }
        engine.write_unlogged(batch)?;
        // The chunk's memory goes with it; only the last key is kept.
        cursor.key = Bytes::copy_from_slice(&cursor.key);
        staging.cursor = cursor;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Staging>> {
        self.staging.lock().expect("no code panics while it holds this lock")
    }
}

fn expect_staging(slot: &mut Option<Staging>, id: u64) -> io::Result<&mut Staging> {
    slot.as_mut().filter(|staging| staging.id == id).ok_or_else(|| no_staging(id))
}

fn no_staging(id: u64) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("no transfer of snapshot {id:x} is under way"))
}
