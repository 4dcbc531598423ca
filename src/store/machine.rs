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
//!
//! ```text
//! staged answers' chunk = version:u8 (1), one or more of
//!                         handoff's epoch:u64, from, to, place, answer     each a u32 length and bytes
//! ```

use std::collections::BTreeMap;
use std::io;

use bytes::{Buf, BufMut, Bytes};
use rocksdb::{Direction, IteratorMode};

use crate::handoff::{Handoff, Position, RingState};
use crate::types::ClusterId;

use super::dedupe::{Decoder, Dedupe, Travelling};
use super::engine::{Cf, Db, to_io};
use super::meta::{self, corrupt};
use super::snapshot::Head;

/// Stored rows that belong to the machine: in order, before the head.
pub(super) type SideRows = Vec<(Vec<u8>, Bytes)>;

/// What is numbered chunks, whose number may shrink.
pub(super) const CHUNKED: [&[u8]; 2] = [meta::DEDUPE, meta::STAGED];

/// A chunk of staged answers is closed once it holds this much, as those of the table of answers.
const CHUNK_BYTES: usize = 256 << 10;

const STAGED_VERSION: u8 = 1;

#[derive(Debug, Default)]
pub(super) struct Machine {
    /// Writes that happen at most once, and log time.
    pub(super) dedupe: Dedupe,
    /// The ring, the change under way, and this cluster's part in it.
    pub(super) ring: RingState,
    /// Answers that open attempts have staged.
    pub(super) staged: BTreeMap<Handoff, Travelling>,
}

/// The machine as it is stored.
#[derive(Debug, Default)]
pub(super) struct Side {
    pub(super) rows: SideRows,
    /// The changes before this position are of no use any more.
    pub(super) log_start: Position,
}

impl Machine {
    /// The machine as it lies in a data family beside this head.
    ///
    /// # Errors
    /// What lies there is not whole.
    pub(super) fn load(db: &Db, family: &Cf<'_>, head: &Head) -> io::Result<Self> {
        let mut decoder = Decoder::default();
        let answers = load_chunks(db, family, meta::DEDUPE)?;
        let ring = db.get_cf(family, meta::KEY_RING).map_err(to_io)?;
        if answers.is_empty() && ring.is_none() && head.applied().is_none() {
            return Ok(Self::default());
        }
        for chunk in answers {
            decoder.chunk(chunk)?;
        }
        let ring = ring.ok_or_else(|| corrupt("the ring", "it is missing"))?;
        let mut staged = BTreeMap::new();
        for chunk in load_chunks(db, family, meta::STAGED)? {
            decode_staged(chunk, &mut staged)?;
        }
        Ok(Self { dedupe: decoder.finish()?, ring: meta::decode_ring(&ring)?, staged })
    }

    /// The machine as it is stored.
    pub(super) fn side(&self) -> Side {
        let number = |prefix: &'static [u8]| (0..).map(move |n| meta::chunk_key(prefix, n));
        let mut rows: SideRows = number(meta::DEDUPE).zip(self.dedupe.encode()).collect();
        rows.extend(number(meta::STAGED).zip(encode_staged(&self.staged)));
        rows.push((meta::KEY_RING.to_vec(), meta::encode_ring(&self.ring).into()));
        Side { rows, log_start: self.ring.log_start() }
    }
}

fn load_chunks(db: &Db, family: &Cf<'_>, prefix: &[u8]) -> io::Result<Vec<Bytes>> {
    let mut chunks = Vec::new();
    for item in db.iterator_cf(family, IteratorMode::From(prefix, Direction::Forward)) {
        let (stored, chunk) = item.map_err(to_io)?;
        if !stored.starts_with(prefix) {
            break;
        }
        if meta::chunk_number(prefix, &stored)? as usize != chunks.len() {
            return Err(corrupt("the machine", "a chunk is missing, or one too many"));
        }
        chunks.push(chunk.into_vec().into());
    }
    Ok(chunks)
}

/// How many chunks lie under a prefix in a data family, whatever they hold.
pub(super) fn stored_chunks(db: &Db, family: &Cf<'_>, prefix: &[u8]) -> io::Result<u32> {
    // The last one tells: they are numbered.
    let end = meta::chunk_key(prefix, u32::MAX);
    match db.iterator_cf(family, IteratorMode::From(&end, Direction::Reverse)).next().transpose() {
        Ok(Some((stored, _))) if stored.starts_with(prefix) => {
            Ok(meta::chunk_number(prefix, &stored)? + 1)
        }
        Ok(_) => Ok(0),
        Err(error) => Err(to_io(error)),
    }
}

fn encode_staged(staged: &BTreeMap<Handoff, Travelling>) -> Vec<Bytes> {
    let (mut chunks, mut open) = (Vec::new(), Vec::new());
    for (handoff, answers) in staged {
        for (place, answer) in answers {
            if open.is_empty() {
                open.put_u8(STAGED_VERSION);
            }
            open.put_u64(handoff.epoch);
            meta::put_block(&mut open, handoff.from.as_str().as_bytes());
            meta::put_block(&mut open, handoff.to.as_str().as_bytes());
            meta::put_block(&mut open, place);
            meta::put_block(&mut open, answer);
            if open.len() >= CHUNK_BYTES {
                chunks.push(Bytes::from(std::mem::take(&mut open)));
            }
        }
    }
    chunks.extend((!open.is_empty()).then(|| Bytes::from(open)));
    chunks
}

fn decode_staged(mut chunk: Bytes, staged: &mut BTreeMap<Handoff, Travelling>) -> io::Result<()> {
    const WHAT: &str = "staged answers";
    if chunk.try_get_u8().ok() != Some(STAGED_VERSION) {
        return Err(corrupt(WHAT, "unknown version"));
    }
    let cluster = |chunk: &mut Bytes| -> io::Result<ClusterId> {
        let text = meta::take_block(WHAT, chunk)?;
        let text = std::str::from_utf8(&text).map_err(|e| corrupt(WHAT, e))?;
        text.parse().map_err(|e| corrupt(WHAT, e))
    };
    while !chunk.is_empty() {
        let epoch = chunk.try_get_u64().map_err(|e| corrupt(WHAT, e))?;
        let handoff = Handoff { epoch, from: cluster(&mut chunk)?, to: cluster(&mut chunk)? };
        let mut block = || -> io::Result<Bytes> {
            // Copied: a slice would keep the whole chunk alive.
            Ok(Bytes::copy_from_slice(&meta::take_block(WHAT, &mut chunk)?))
        };
        let (place, answer) = (block()?, block()?);
        staged.entry(handoff).or_default().insert(place, answer);
    }
    Ok(())
}
