//! Snapshots: the format in which state travels to a follower that the log no longer reaches.
//!
//! A snapshot is a sequence of chunks, read from an image on the sender ([`super::image`]) and written
//! into a staging column family on the receiver ([`super::staging`]). Neither side ever holds more
//! than one chunk in memory.
//!
//! ```text
//! chunk    version u8 = 3, kind u8, body, crc32 u32 of everything before it
//! head     (kind 1, first)  as it is stored: applied, membership
//! rows     (kind 2, any number)  repeated: stored key u32 length and bytes, row u32 length and bytes
//! end      (kind 3, last)   number of rows u64, digest u64
//! ```
//!
//! Rows are everything in the data family but the head ([`meta`] lists it), under the keys that they
//! have there, in their order. The digest is the wrapping sum of a 64-bit hash of each row, so it
//! can be carried along without a second pass. A [`Cursor`] says where the next chunk starts; it
//! carries count and digest so far, so the sender needs no state for a transfer and the receiver can
//! let one go on after a lost connection, or with a repeat of what it did not get.
//!
//! Since the numbers in the end chunk come from the receiver's own cursor, they tell that this was not damaged
//! or mixed up on its way; that no row is missing follows from each chunk's checksum and from the cursor's key,
//! after which the sender goes on in the order of its rows.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use xxhash_rust::xxh3::Xxh3Default;

use crate::backoff::Backoff;
use crate::types::{LogId, StoredMembership, TypeConfig};

use super::image::Images;
pub use super::image::SnapshotImage;
use super::meta::{self, Progress, corrupt};
pub use super::staging::{SnapshotStager, StagedSnapshot, StagingPosition};

/// 2 carried records only, under their keys.
const VERSION: u8 = 3;
const KIND_HEAD: u8 = 1;
const KIND_ROWS: u8 = 2;
const KIND_END: u8 = 3;

/// What openraft hands around as "the snapshot".
#[derive(Debug, Clone)]
pub enum SnapshotData {
    /// What a sender has: a view of the state at one moment.
    Image(Arc<SnapshotImage>),
    /// What a receiver has: all chunks arrived, were verified and are on disk.
    Staged(StagedSnapshot),
}

impl SnapshotData {
    /// The staged form. An image is staged first, as if it had come over the network. Blocks.
    pub(super) fn into_staged(self, stager: &SnapshotStager) -> io::Result<StagedSnapshot> {
        let image = match self {
            Self::Staged(staged) => return Ok(staged),
            Self::Image(image) => image,
        };
        let mut position = stager.begin(image.id())?;
        while !position.complete {
            let chunk = image.read_chunk(&position.cursor, LOCAL_CHUNK_BYTES)?;
            position = stager.write(image.id(), position.next_seq, chunk.bytes)?;
        }
        match stager.finish(image.id())? {
            Self::Staged(staged) => Ok(staged),
            Self::Image(_) => Err(io::Error::other("staging ends in a staged snapshot")),
        }
    }
}

/// The pauses before an image that could not be made is tried again.
const RETRY_BACKOFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

/// Chunk size when no network is between image and staging.
const LOCAL_CHUNK_BYTES: usize = 1 << 20;

/// One chunk on its way.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// The chunk as it is sent: opaque, with its own checksum.
    pub bytes: Bytes,
    /// Whether it is the last one.
    pub last: bool,
}

/// How far into an image a chunk starts: chunks come in this order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    head_done: bool,
    key: Bytes,
}

impl Place {
    /// After this key, and all before it.
    #[cfg(test)]
    pub(crate) fn after(key: Bytes) -> Self {
        Self { head_done: true, key }
    }
}

/// The state machine's small values: what belongs to all of the data.
#[derive(Debug, Clone, Default)]
pub(super) struct Head {
    pub(super) progress: Progress,
    pub(super) membership: StoredMembership,
}

impl Head {
    pub(super) fn applied(&self) -> Option<LogId> {
        self.progress.last_applied
    }

    pub(super) fn meta(&self) -> crate::types::SnapshotMeta {
        crate::types::SnapshotMeta {
            last_log_id: self.applied(),
            last_membership: self.membership.clone(),
        }
    }
}

/// What a chunk holds.
pub(super) enum Body {
    Head(Box<Head>),
    Rows(Vec<(Bytes, Bytes)>),
    End { count: u64, digest: u64 },
}

/// Where a transfer stands. The empty encoding is the start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Cursor {
    pub(super) head_done: bool,
    pub(super) count: u64,
    pub(super) digest: u64,
    /// The last stored key so far; those are never empty, so empty means none.
    pub(super) key: Bytes,
}

impl Cursor {
    pub(super) fn encode(&self) -> Bytes {
        if !self.head_done {
            return Bytes::new();
        }
        let mut bytes = Vec::with_capacity(17 + self.key.len());
        bytes.put_u8(VERSION);
        bytes.put_u64(self.count);
        bytes.put_u64(self.digest);
        bytes.put_slice(&self.key);
        bytes.into()
    }

    pub(super) fn decode(mut bytes: &[u8]) -> io::Result<Self> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let short = |e| corrupt("a snapshot cursor", e);
        if bytes.try_get_u8().map_err(short)? != VERSION {
            return Err(corrupt("a snapshot cursor", "unknown version"));
        }
        let count = bytes.try_get_u64().map_err(short)?;
        let digest = bytes.try_get_u64().map_err(short)?;
        Ok(Self { head_done: true, count, digest, key: Bytes::copy_from_slice(bytes) })
    }

    pub(super) fn place(&self) -> Place {
        Place { head_done: self.head_done, key: self.key.clone() }
    }

    /// Counts a row in.
    pub(super) fn pass(&mut self, key: &[u8], row: &[u8]) {
        self.count += 1;
        self.digest = self.digest.wrapping_add(row_digest(key, row));
    }
}

fn row_digest(key: &[u8], row: &[u8]) -> u64 {
    let mut hash = Xxh3Default::new();
    hash.update(&(key.len() as u64).to_be_bytes());
    hash.update(key);
    hash.update(row);
    hash.digest()
}

/// Collects a chunk.
pub(super) struct ChunkWriter(Vec<u8>);

impl ChunkWriter {
    fn new(kind: u8) -> Self {
        Self(vec![VERSION, kind])
    }

    pub(super) fn head(head: &Head) -> Bytes {
        let mut chunk = Self::new(KIND_HEAD);
        chunk.0.put_slice(&meta::encode_head(head));
        chunk.seal()
    }

    pub(super) fn end(cursor: &Cursor) -> Bytes {
        let mut chunk = Self::new(KIND_END);
        chunk.0.put_u64(cursor.count);
        chunk.0.put_u64(cursor.digest);
        chunk.seal()
    }

    pub(super) fn rows() -> Self {
        Self::new(KIND_ROWS)
    }

    pub(super) fn row(&mut self, key: &[u8], row: &[u8]) {
        meta::put_block(&mut self.0, key);
        meta::put_block(&mut self.0, row);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn seal(mut self) -> Bytes {
        let crc = crc32fast::hash(&self.0);
        self.0.put_u32(crc);
        self.0.into()
    }
}

/// Checks and decodes a chunk. Slices it, never copies, never allocates by an announced length.
pub(super) fn decode_chunk(chunk: &Bytes) -> io::Result<Body> {
    let bad = |why: &str| corrupt("a snapshot chunk", why);
    let Some((body, crc)) = chunk.split_last_chunk::<4>() else {
        return Err(bad("it is too short"));
    };
    if crc32fast::hash(body) != u32::from_be_bytes(*crc) {
        return Err(bad("its checksum does not match"));
    }
    let mut rest = chunk.slice(..body.len());
    if rest.len() < 2 || rest.get_u8() != VERSION {
        return Err(bad("unknown version"));
    }
    match rest.get_u8() {
        KIND_HEAD => Ok(Body::Head(Box::new(meta::decode_head(&rest)?))),
        KIND_ROWS => {
            let mut rows = Vec::new();
            while !rest.is_empty() {
                let mut block = || meta::take_block("a snapshot chunk", &mut rest);
                rows.push((block()?, block()?));
            }
            Ok(Body::Rows(rows))
        }
        KIND_END if rest.len() == 16 => {
            Ok(Body::End { count: rest.get_u64(), digest: rest.get_u64() })
        }
        _ => Err(bad("unknown kind or length")),
    }
}

/// Makes the image that a snapshot is. openraft runs it in a task of its own, beside applying, and begins no
/// other meanwhile.
pub struct SnapshotBuilder {
    /// The store may be closed while this waits to try again.
    images: Weak<Images>,
    /// Whether the image that it makes takes the place of one that is being sent.
    force: bool,
}

impl SnapshotBuilder {
    pub(super) fn new(images: &Arc<Images>, force: bool) -> Self {
        Self { images: Arc::downgrade(images), force }
    }
}

impl openraft::storage::RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    /// Tries until it succeeds: for openraft, a snapshot that cannot be made is the end of the node, and
    /// links that cannot be made or opened for a moment are no reason for that. A failed flush is.
    async fn build_snapshot(
        &mut self,
    ) -> io::Result<openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotData>> {
        let mut backoff = RETRY_BACKOFF;
        loop {
            let images = self.images.upgrade();
            let images = images.ok_or_else(|| io::Error::other("the store is closed"))?;
            let force = self.force;
            let built = super::state_machine::blocking(move || match images.build_newer(force) {
                Ok(snapshot) => Ok(Ok(snapshot)),
                Err(error) => images.check().map(|()| Err(error)),
            });
            match built.await? {
                Ok(snapshot) => return Ok(snapshot),
                Err(error) => tracing::warn!(%error, "cannot make a snapshot image; trying again"),
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_with_any_flipped_bit_is_refused() {
        let mut writer = ChunkWriter::rows();
        writer.row(b"key", b"row");
        let good = writer.seal();
        assert!(decode_chunk(&good).is_ok());
        for bit in 0..good.len() * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_chunk(&bad.into()).is_err(), "bit {bit}");
        }
        for length in 0..good.len() {
            assert!(decode_chunk(&good.slice(..length)).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_lying_length_with_a_good_checksum_is_refused() {
        let mut chunk = vec![VERSION, KIND_ROWS];
        chunk.put_u32(u32::MAX);
        let crc = crc32fast::hash(&chunk);
        chunk.put_u32(crc);
        assert!(decode_chunk(&chunk.into()).is_err());
    }

    /// A transfer that goes back would never end.
    #[test]
    fn places_are_in_the_order_of_chunks() {
        let after =
            |key| Cursor { head_done: true, key: Bytes::from_static(key), count: 1, digest: 9 };
        let cursors = [Cursor::default(), after(b""), after(b"a"), after(b"aa"), after(b"b")];
        assert!(cursors.iter().map(Cursor::place).is_sorted_by(|before, next| before < next));
    }

    #[test]
    fn cursors_come_back() {
        let mut cursor = Cursor { head_done: true, ..Cursor::default() };
        cursor.pass(b"k", b"r");
        cursor.key = Bytes::from_static(b"k");
        assert_eq!(Cursor::decode(&cursor.encode()).unwrap(), cursor);
        assert_eq!(Cursor::decode(&[]).unwrap(), Cursor::default());
        assert!(Cursor::decode(&[9]).is_err());
    }
}
