//! What the column families `meta` and `data-N` hold under which key, and how.
//!
//! | family | key | value |
//! | --- | --- | --- |
//! | meta | `identity` | version (u8), node id (u64), cluster id (rest) |
//! | meta | `vote` | the vote, a record of [`crate::codec`] with its own version |
//! | meta | `purged` | log id of the last purged entry, likewise |
//! | meta | `data` | version (u8), name of the active data column family |
//! | data | `c` and a position (u64) | a change of a key that moves: version (u8), key (u32 length, bytes), place of an answer or nothing |
//! | data | `d` and a number (u32) | what is remembered of writes that happen at most once: a chunk of [`super::dedupe`], with its own version |
//! | data | `f` and a number (u32) | answers that handoffs have staged: a chunk of [`super::machine`] |
//! | data | `g` | ring, change and handoffs: version (u8), JSON of [`crate::handoff::RingState`] |
//! | data | `h` | the head: version (u8), then applied and membership, each a u32 length and bytes |
//! | data | `k` and a key | the key's record |
//!
//! Integers are big-endian. The parts of the head are: applied: version (u8), revision (u64), log id of
//! the last applied entry (or nothing); membership: that of the last applied membership entry. All of it lies among the data because it
//! reaches the disk in one file or not at all. Chunks are numbered from 0, and there is at least one
//! wherever an entry has been applied.

use std::io;

use bytes::{Buf, BufMut, Bytes};

use crate::codec;
use crate::handoff::{Position, RingState, Tag};
use crate::types::{ClusterId, LogId, NodeId, Revision, StoredMembership, Vote};

use super::snapshot::Head;

pub(super) const KEY_IDENTITY: &[u8] = b"identity";
pub(super) const KEY_VOTE: &[u8] = b"vote";
pub(super) const KEY_PURGED: &[u8] = b"purged";
pub(super) const KEY_DATA: &[u8] = b"data";
/// What the keys of the change log begin with.
pub(super) const CHANGES: &[u8] = b"c";
/// What the keys of the chunks begin with that hold staged answers.
pub(super) const STAGED: &[u8] = b"f";
/// The key of ring, change and handoffs.
pub(super) const KEY_RING: &[u8] = b"g";
/// What the keys of the chunks begin with that [`super::dedupe`] encodes itself in.
pub(super) const DEDUPE: &[u8] = b"d";
/// The head's key in a data family: before all records.
pub(super) const KEY_HEAD: &[u8] = b"h";
/// What the keys of records begin with in a data family.
pub(super) const RECORDS: &[u8] = b"k";

/// The version of all of these formats. 1 kept the head in the meta family, 2 had no chunks beside it, 3
/// had the ring in it.
const VERSION: u8 = 4;

/// An error for stored bytes that do not decode.
pub(super) fn corrupt(what: &str, why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} is corrupt: {why}"))
}

/// The bytes after a version byte that this program knows.
fn versioned<'a>(what: &str, bytes: &'a [u8]) -> io::Result<&'a [u8]> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => Ok(rest),
        Some((version, _)) => Err(corrupt(what, format_args!("unknown version {version}"))),
        None => Err(corrupt(what, "empty")),
    }
}

fn start() -> Vec<u8> {
    vec![VERSION]
}

pub(super) fn encode_identity(id: NodeId, cluster: &ClusterId) -> Vec<u8> {
    let mut bytes = start();
    bytes.put_u64(id);
    bytes.put_slice(cluster.as_str().as_bytes());
    bytes
}

pub(super) fn decode_identity(bytes: &[u8]) -> io::Result<(NodeId, ClusterId)> {
    let mut rest = versioned("identity", bytes)?;
    let id = rest.try_get_u64().map_err(|e| corrupt("identity", e))?;
    let text = std::str::from_utf8(rest).map_err(|e| corrupt("identity", e))?;
    Ok((id, text.parse().map_err(|e| corrupt("identity", e))?))
}

pub(super) fn encode_vote(vote: &Vote) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode_vote(vote, &mut bytes);
    bytes
}

pub(super) fn decode_vote(bytes: &[u8]) -> io::Result<Vote> {
    codec::decode_vote(bytes).map_err(|e| corrupt("the vote", e))
}

pub(super) fn encode_log_id(id: &LogId) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode_log_id(id, &mut bytes);
    bytes
}

pub(super) fn decode_log_id(what: &str, bytes: &[u8]) -> io::Result<LogId> {
    codec::decode_log_id(bytes).map_err(|e| corrupt(what, e))
}

/// How far the state machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Progress {
    pub(super) revision: Revision,
    pub(super) last_applied: Option<LogId>,
}

pub(super) fn encode_progress(progress: &Progress) -> Vec<u8> {
    let mut bytes = start();
    bytes.put_u64(progress.revision);
    if let Some(id) = &progress.last_applied {
        codec::encode_log_id(id, &mut bytes);
    }
    bytes
}

pub(super) fn decode_progress(bytes: &[u8]) -> io::Result<Progress> {
    let mut rest = versioned("applied", bytes)?;
    let revision = rest.try_get_u64().map_err(|e| corrupt("applied", e))?;
    let last_applied = match rest {
        [] => None,
        record => Some(decode_log_id("applied", record)?),
    };
    Ok(Progress { revision, last_applied })
}

pub(super) fn encode_membership(membership: &StoredMembership) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode_membership(membership, &mut bytes);
    bytes
}

pub(super) fn decode_membership(bytes: &[u8]) -> io::Result<StoredMembership> {
    codec::decode_membership(bytes).map_err(|e| corrupt("the membership", e))
}

pub(super) fn encode_ring(ring: &RingState) -> Vec<u8> {
    let mut bytes = start();
    let json = serde_json::to_vec(ring).expect("a ring state has text keys and finite numbers");
    bytes.extend_from_slice(&json);
    bytes
}

pub(super) fn decode_ring(bytes: &[u8]) -> io::Result<RingState> {
    serde_json::from_slice(versioned("the ring", bytes)?).map_err(|e| corrupt("the ring", e))
}

pub(super) fn encode_data_family(name: &str) -> Vec<u8> {
    let mut bytes = start();
    bytes.extend_from_slice(name.as_bytes());
    bytes
}

pub(super) fn decode_data_family(bytes: &[u8]) -> io::Result<String> {
    let name = versioned("data family", bytes)?;
    String::from_utf8(name.to_vec()).map_err(|e| corrupt("data family", e))
}

/// The head as it is stored, and as it travels at the beginning of a snapshot.
pub(super) fn encode_head(head: &Head) -> Vec<u8> {
    let mut bytes = start();
    put_block(&mut bytes, &encode_progress(&head.progress));
    put_block(&mut bytes, &encode_membership(&head.membership));
    bytes
}

pub(super) fn decode_head(bytes: &[u8]) -> io::Result<Head> {
    let mut rest = Bytes::copy_from_slice(versioned("the head", bytes)?);
    let progress = decode_progress(&take_block("the head", &mut rest)?)?;
    let membership = decode_membership(&take_block("the head", &mut rest)?)?;
    if !rest.is_empty() {
        return Err(corrupt("the head", "bytes follow its end"));
    }
    Ok(Head { progress, membership })
}

pub(super) fn put_block(bytes: &mut Vec<u8>, block: &[u8]) {
    let length = u32::try_from(block.len()).expect("keys and records are far below 4 GiB");
    bytes.put_u32(length);
    bytes.put_slice(block);
}

/// Takes a block off the front. Slices it, never copies, never allocates by an announced length.
pub(super) fn take_block(what: &str, rest: &mut Bytes) -> io::Result<Bytes> {
    let length = rest.try_get_u32().map_err(|e| corrupt(what, e))? as usize;
    if length > rest.len() {
        return Err(corrupt(what, "a length reaches beyond its end"));
    }
    Ok(rest.split_to(length))
}

/// Where a key's record lies in a data family. Takes the buffer, so that many keys need only one.
pub(super) fn record_key(key: &[u8], stored: &mut Vec<u8>) {
    stored.clear();
    stored.extend_from_slice(RECORDS);
    stored.extend_from_slice(key);
}

/// The key of a record that lies there.
pub(super) fn key_of(stored: &[u8]) -> io::Result<&[u8]> {
    stored.strip_prefix(RECORDS).ok_or_else(|| corrupt("the data", "a key is not a record's"))
}

/// Where chunk `number` lies in a data family, of those under this prefix.
pub(super) fn chunk_key(prefix: &[u8], number: u32) -> Vec<u8> {
    [prefix, &number.to_be_bytes()].concat()
}

/// The number of the chunk that lies there.
pub(super) fn chunk_number(prefix: &[u8], stored: &[u8]) -> io::Result<u32> {
    let number = stored.strip_prefix(prefix).and_then(|number| number.try_into().ok());
    let number = number.ok_or_else(|| corrupt("the data", "a key is not a chunk's"))?;
    Ok(u32::from_be_bytes(number))
}

/// Where the change at this position lies in a data family.
pub(super) fn change_key(position: Position) -> Vec<u8> {
    [CHANGES, &position.to_be_bytes()].concat()
}

/// Checks a row that comes from another node, as far as it tells by itself. Chunks are checked
/// together, when all are there.
pub(super) fn check_row(stored: &[u8], row: &[u8]) -> io::Result<()> {
    for prefix in [DEDUPE, STAGED] {
        if stored.starts_with(prefix) {
            return chunk_number(prefix, stored).map(drop);
        }
    }
    if stored == KEY_RING {
        return decode_ring(row).map(drop);
    }
    if stored.starts_with(CHANGES) {
        return decode_change(row).map(drop);
    }
    if key_of(stored)?.is_empty() {
        return Err(corrupt("the data", "a key is empty"));
    }
    decode_row(row).map(drop)
}

// --- Records of the data column family -------------------------------------------------------------

/// The version of a record: `version u8, flags u8, revision u64, tag if flag 1, value`; a tag is
/// `epoch u64, attempt u64`.
const RECORD_VERSION: u8 = 1;
/// What a handoff staged. Another flag will announce an expiry time between tag and value.
const FLAG_STAGED: u8 = 1;
pub(super) const RECORD_HEAD_BYTES: usize = 10;
const TAG_BYTES: usize = 16;

/// What stands before the value in a record that no handoff staged.
pub(super) fn record_head(revision: Revision) -> [u8; RECORD_HEAD_BYTES] {
    let mut head = [0; RECORD_HEAD_BYTES];
    head[0] = RECORD_VERSION;
    head[2..].copy_from_slice(&revision.to_be_bytes());
    head
}

pub(super) fn encode_record(revision: Revision, value: &[u8]) -> Vec<u8> {
    [&record_head(revision), value].concat()
}

/// Revision and tag of a stored record, and where its value begins, without copying that.
pub(super) fn decode_row(bytes: &[u8]) -> io::Result<(Revision, Option<Tag>, usize)> {
    let bad = || corrupt("a record", "unknown version, flags or length");
    let [RECORD_VERSION, flags @ (0 | FLAG_STAGED), rest @ ..] = bytes else { return Err(bad()) };
    let mut rest = rest;
    let revision = rest.try_get_u64().map_err(|_| bad())?;
    if *flags == 0 {
        return Ok((revision, None, RECORD_HEAD_BYTES));
    }
    let epoch = rest.try_get_u64().map_err(|_| bad())?;
    let attempt = rest.try_get_u64().map_err(|_| bad())?;
    Ok((revision, Some(Tag { epoch, attempt }), RECORD_HEAD_BYTES + TAG_BYTES))
}

/// The same record with another tag, or without one.
pub(super) fn retag(bytes: &[u8], tag: Option<Tag>) -> io::Result<Bytes> {
    let (revision, _, value) = decode_row(bytes)?;
    let mut tagged = encode_record(revision, &[]);
    if let Some(tag) = tag {
        tagged[1] = FLAG_STAGED;
        tagged.put_u64(tag.epoch);
        tagged.put_u64(tag.attempt);
    }
    tagged.put_slice(&bytes[value..]);
    Ok(tagged.into())
}

/// What a record adds to a tally: the same whether it is staged or not.
pub(super) fn record_hash(key: &[u8], bytes: &[u8]) -> io::Result<u64> {
    let (revision, _, value) = decode_row(bytes)?;
    let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
    hash.update(&(key.len() as u64).to_be_bytes());
    hash.update(key);
    hash.update(&revision.to_be_bytes());
    hash.update(&bytes[value..]);
    Ok(hash.digest())
}

// --- Changes of keys that move ---------------------------------------------------------------------

const CHANGE_RECORD: u8 = 1;
const CHANGE_ANSWER: u8 = 2;

/// What changed of a key that moves. It says where to look; what is there now is what counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// Its record, and the answer at this place, if one was recorded (else empty).
    Record { key: Bytes, place: Bytes },
    /// Only the answer at this place.
    Answer { key: Bytes, place: Bytes },
}

/// A change of a key's record, and the place of the answer that was given to it, if one was recorded.
pub(super) fn encode_change(key: &[u8], answer: Option<&[u8]>) -> Bytes {
    put_change(CHANGE_RECORD, key, answer.unwrap_or_default())
}

/// The change that an answer to a write of this key has fallen.
pub(super) fn encode_fall(key: &[u8], place: &[u8]) -> Bytes {
    put_change(CHANGE_ANSWER, key, place)
}

fn put_change(kind: u8, key: &[u8], place: &[u8]) -> Bytes {
    let mut bytes = vec![kind];
    put_block(&mut bytes, key);
    bytes.put_slice(place);
    bytes.into()
}

pub(super) fn decode_change(bytes: &[u8]) -> io::Result<Change> {
    const WHAT: &str = "a change";
    let mut rest = Bytes::copy_from_slice(bytes);
    let kind = rest.try_get_u8().map_err(|e| corrupt(WHAT, e))?;
    let key = take_block(WHAT, &mut rest)?;
    match kind {
        CHANGE_RECORD => Ok(Change::Record { key, place: rest }),
        CHANGE_ANSWER => Ok(Change::Answer { key, place: rest }),
        _ => Err(corrupt(WHAT, "unknown kind")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_half_a_record_does_not() {
        let bytes = encode_record(7, b"value");
        let (revision, tag, value) = decode_row(&bytes).unwrap();
        assert_eq!((revision, tag, &bytes[value..]), (7, None, &b"value"[..]));
        for length in 0..RECORD_HEAD_BYTES {
            assert!(decode_row(&bytes[..length]).is_err(), "{length}");
        }
        let mut newer = bytes.clone();
        newer[0] = 2;
        assert!(decode_row(&newer).is_err());
    }

    /// A tag says who staged a record, and nothing about what it is.
    #[test]
    fn a_tag_comes_and_goes() {
        let plain = encode_record(7, b"value");
        let tag = Tag { epoch: 2, attempt: 3 };
        let staged = retag(&plain, Some(tag)).unwrap();
        assert_eq!(decode_row(&staged).unwrap().1, Some(tag));
        assert_eq!(staged[decode_row(&staged).unwrap().2..], b"value"[..]);
        assert_eq!(record_hash(b"k", &staged).unwrap(), record_hash(b"k", &plain).unwrap());
        assert_eq!(retag(&staged, None).unwrap(), plain);
        for length in RECORD_HEAD_BYTES..RECORD_HEAD_BYTES + TAG_BYTES {
            assert!(decode_row(&staged[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn identity_and_progress_come_back() {
        let cluster: ClusterId = "c1".parse().unwrap();
        let bytes = encode_identity(3, &cluster);
        assert_eq!(decode_identity(&bytes).unwrap(), (3, cluster));
        let none = Progress { revision: 5, last_applied: None };
        assert_eq!(decode_progress(&encode_progress(&none)).unwrap(), none);
    }
}
