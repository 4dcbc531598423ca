//! The small single values: what the `meta` column family holds under which key, and how.
//!
//! | key | value |
//! | --- | --- |
//! | `identity` | version (u8), node id (u64), cluster id (rest) |
//! | `vote` | the vote, a record of [`crate::codec`] with its own version |
//! | `purged` | log id of the last purged entry, likewise |
//! | `applied` | version (u8), revision (u64), log id of the last applied entry (or nothing) |
//! | `membership` | the membership of the last applied membership entry |
//! | `ring` | version (u8), JSON of the ring |
//! | `data` | version (u8), name of the active data column family |
//!
//! Integers are big-endian. The state machine's keys (`applied`, `membership`, `ring`, `data`) change
//! only in the batch that changes the data.

use std::io;

use bytes::{Buf, BufMut, Bytes};

use crate::codec;
use crate::ring::{Ring, RingTable};
use crate::types::{ClusterId, LogId, NodeId, Record, Revision, StoredMembership, Vote};

pub(super) const KEY_IDENTITY: &[u8] = b"identity";
pub(super) const KEY_VOTE: &[u8] = b"vote";
pub(super) const KEY_PURGED: &[u8] = b"purged";
pub(super) const KEY_APPLIED: &[u8] = b"applied";
pub(super) const KEY_MEMBERSHIP: &[u8] = b"membership";
pub(super) const KEY_RING: &[u8] = b"ring";
pub(super) const KEY_DATA: &[u8] = b"data";

/// The version of all of these formats.
const VERSION: u8 = 1;

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

pub(super) fn encode_ring(ring: &Ring) -> Vec<u8> {
    let mut bytes = start();
    let json = serde_json::to_vec(ring).expect("a ring has only string keys and finite numbers");
    bytes.extend_from_slice(&json);
    bytes
}

pub(super) fn decode_ring(bytes: &[u8]) -> io::Result<RingTable> {
    let json = versioned("ring", bytes)?;
    let ring: Ring = serde_json::from_slice(json).map_err(|e| corrupt("ring", e))?;
    RingTable::new(ring).map_err(|e| corrupt("ring", e))
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

// --- Records of the data column family -------------------------------------------------------------

/// The version of a record: `version u8, flags u8, revision u64, value`.
const RECORD_VERSION: u8 = 1;
/// No flag is known yet; one of them will announce an expiry time between revision and value.
const RECORD_FLAGS: u8 = 0;
const RECORD_HEAD_BYTES: usize = 10;

pub(super) fn encode_record(revision: Revision, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RECORD_HEAD_BYTES + value.len());
    bytes.put_u8(RECORD_VERSION);
    bytes.put_u8(RECORD_FLAGS);
    bytes.put_u64(revision);
    bytes.put_slice(value);
    bytes
}

/// The revision of a stored record, without copying its value.
pub(super) fn decode_record_revision(bytes: &[u8]) -> io::Result<Revision> {
    match bytes {
        [RECORD_VERSION, RECORD_FLAGS, rest @ ..] if rest.len() >= 8 => Ok((&rest[..8]).get_u64()),
        _ => Err(corrupt("a record", "unknown version, flags or length")),
    }
}

pub(super) fn decode_record(bytes: &[u8]) -> io::Result<Record> {
    let revision = decode_record_revision(bytes)?;
    Ok(Record { revision, value: Bytes::copy_from_slice(&bytes[RECORD_HEAD_BYTES..]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_half_a_record_does_not() {
        let bytes = encode_record(7, b"value");
        let record = decode_record(&bytes).unwrap();
        assert_eq!((record.revision, &record.value[..]), (7, &b"value"[..]));
        for length in 0..RECORD_HEAD_BYTES {
            assert!(decode_record(&bytes[..length]).is_err(), "{length}");
        }
        let mut newer = bytes.clone();
        newer[0] = 2;
        assert!(decode_record(&newer).is_err());
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
