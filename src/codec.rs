//! The binary encoding of log entries and the ids around them, the same on disk and between peers.
//!
//! Written by hand and not with serde, for three reasons: what is on a disk must stay readable by
//! later versions, so the layout is part of the contract and drawn here; a decoder of foreign bytes
//! must not trust a length; and decoding must not copy a value. What an entry writes is encoded once for all who
//! store or send it ([`crate::writes`]).
//!
//! ```text
//! record     = version:u8 (2), body          each record that stands alone starts with its version
//! log id     = term:u64, node:u64, index:u64
//! vote       = term:u64, node:u64, committed:u8 (0|1)
//! entry      = log id, tag:u8, payload
//!   tag 0 blank        nothing
//!   tag 1 writes       as [`crate::writes`] draws them, to the end
//!   tag 2 ring         the ring's JSON, to the end
//!   tag 3 membership   membership
//!   tag 4 step         the step's JSON, to the end
//!   tag 5 import       see crate::handoff
//!   tag 6 clean        likewise
//! text       = length:u32, bytes
//! membership = count:u32 x config, count:u32 x node
//!   config   = count:u32 x node id:u64        ascending, not empty
//!   node     = node id:u64, http:text, rpc:text   ascending by id; contains every voter
//! stored membership = log id?, membership     `x?` is 0 | 1, x
//! ```
//! Integers are big-endian.
//!
//! Invariants: there is exactly one encoding of a thing, and a decoder accepts only that one (flags
//! are 0 or 1, ids ascend, nothing trails), except that a ring is compared as JSON. Terms and indexes have room
//! above them, and those that peers say below what a record may hold ([`ORDINAL_HEARD_MAX`]): whoever has
//! heard one may count on from it, and what it comes to can be written down and read again. Decoders never
//! panic, check every length against what is left before they use it, and allocate no more than a small
//! multiple of their input. Corrupt is not absent: every deviation is a [`DecodeError`].

mod reader;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes};
use openraft::EntryPayload;

pub(crate) use reader::{Reader, SliceReader};

use crate::handoff::{Clean, Import};
use crate::once::ClientName;
use crate::types::{
    Command, Entry, LeaderId, LogId, Membership, NodeAddrs, NodeId, StoredMembership, Vote,
};
use crate::writes::Writes;

/// The version that every record starts with. In 1, writes had no time and no clients.
const VERSION: u8 = 2;

/// The highest term and the highest index that a record can hold. Raft adds one to them and does not look
/// whether that fits, and after the last of them there would be none. At a million a second, it takes 146
/// thousand years.
const ORDINAL_MAX: u64 = 1 << 62;

/// The highest of those that a peer may say: as many again are left to count on before a record is refused.
pub(crate) const ORDINAL_HEARD_MAX: u64 = ORDINAL_MAX / 2;

const TAG_BLANK: u8 = 0;
const TAG_WRITES: u8 = 1;
const TAG_RING: u8 = 2;
const TAG_MEMBERSHIP: u8 = 3;
const TAG_STEP: u8 = 4;
const TAG_IMPORT: u8 = 5;
const TAG_CLEAN: u8 = 6;

/// Bytes that are not the encoding of what was expected. Never safe to ignore: the bytes are
/// corrupt, hostile, or from a later version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end before the thing does.
    #[error("truncated: {wanted} bytes wanted, {left} left")]
    Truncated {
        /// How many bytes the next field takes.
        wanted: u64,
        /// How many there are.
        left: usize,
    },
    /// Bytes are left over.
    #[error("{0} bytes follow the end")]
    Trailing(usize),
    /// Written by another version of this program.
    #[error("version {found} of this encoding is unknown")]
    Version {
        /// The version byte.
        found: u8,
    },
    /// A tag that means nothing.
    #[error("{found} is not a {what}")]
    Tag {
        /// What the tag selects.
        what: &'static str,
        /// The tag.
        found: u8,
    },
    /// Well-formed bytes with an impossible meaning.
    #[error("invalid {what}")]
    Invalid {
        /// What is wrong.
        what: &'static str,
    },
}

/// Version, log id and tag of an entry.
const HEAD_BYTES: usize = 1 + 24 + 1;

/// Appends an entry's record to `out`.
pub fn encode_entry(entry: &Entry, out: &mut Vec<u8>) {
    if let EntryPayload::Normal(Command::Write(writes)) = &entry.payload {
        // At once, instead of growing to it and copying what is there each time.
        out.reserve(HEAD_BYTES + writes.encoded().len());
    }
    out.put_u8(VERSION);
    put_log_id(&entry.log_id, out);
    match &entry.payload {
        EntryPayload::Blank => out.put_u8(TAG_BLANK),
        EntryPayload::Normal(command) => put_command(command, out),
        EntryPayload::Membership(membership) => {
            out.put_u8(TAG_MEMBERSHIP);
            put_membership(membership, out);
        }
    }
}

/// Decodes an entry's record. Keys and values stay where they are in `bytes`, and keep all of it alive.
pub fn decode_entry(bytes: Bytes) -> Result<Entry, DecodeError> {
    decode_record(bytes, |reader| {
        let log_id = get_log_id(reader)?;
        let payload = match reader.u8()? {
            TAG_BLANK => EntryPayload::Blank,
            TAG_MEMBERSHIP => EntryPayload::Membership(get_membership(reader)?),
            tag => EntryPayload::Normal(get_command(tag, reader)?),
        };
        Ok(Entry { log_id, payload })
    })
}

/// Appends a log id's record to `out`.
pub fn encode_log_id(log_id: &LogId, out: &mut impl BufMut) {
    out.put_u8(VERSION);
    put_log_id(log_id, out);
}

/// Decodes a log id's record.
pub fn decode_log_id(bytes: &[u8]) -> Result<LogId, DecodeError> {
    decode_record(Bytes::copy_from_slice(bytes), get_log_id)
}

/// Appends a vote's record to `out`.
pub fn encode_vote(vote: &Vote, out: &mut impl BufMut) {
    out.put_u8(VERSION);
    put_vote(vote, out);
}

/// Decodes a vote's record.
pub fn decode_vote(bytes: &[u8]) -> Result<Vote, DecodeError> {
    decode_record(Bytes::copy_from_slice(bytes), get_vote)
}

/// Appends a stored membership's record to `out`.
pub fn encode_membership(stored: &StoredMembership, out: &mut impl BufMut) {
    out.put_u8(VERSION);
    put_stored_membership(stored, out);
}

/// Decodes a stored membership's record.
pub fn decode_membership(bytes: &[u8]) -> Result<StoredMembership, DecodeError> {
    decode_record(Bytes::copy_from_slice(bytes), get_stored_membership)
}

fn decode_record<T>(
    bytes: Bytes,
    body: impl FnOnce(&mut Reader) -> Result<T, DecodeError>,
) -> Result<T, DecodeError> {
    let mut reader = Reader::new(bytes);
    reader.version(VERSION)?;
    let decoded = body(&mut reader)?;
    reader.end()?;
    Ok(decoded)
}

/// Appends a length and the bytes.
///
/// # Panics
/// Over 4 GiB: every limit in the configuration lies far below.
pub(crate) fn put_bytes(bytes: &[u8], out: &mut impl BufMut) {
    put_count(bytes.len(), out);
    out.put_slice(bytes);
}

pub(crate) fn put_count(count: usize, out: &mut impl BufMut) {
    out.put_u32(u32::try_from(count).expect("limits keep every length below 4 GiB"));
}

/// Appends 0, or 1 and the thing.
pub(crate) fn put_option<T, B: BufMut>(
    thing: Option<&T>,
    out: &mut B,
    put: impl FnOnce(&T, &mut B),
) {
    out.put_u8(u8::from(thing.is_some()));
    if let Some(thing) = thing {
        put(thing, out);
    }
}

/// Appends a name's length, one byte, and the name.
pub(crate) fn put_client_name(name: &str, out: &mut impl BufMut) {
    out.put_u8(u8::try_from(name.len()).expect("a client's name has 64 bytes at most"));
    out.put_slice(name.as_bytes());
}

pub(crate) fn get_client_name(reader: &mut Reader) -> Result<ClientName, DecodeError> {
    let bytes = reader.short_bytes()?;
    let name = std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok());
    name.ok_or(DecodeError::Invalid { what: "name of a client" })
}

pub(crate) fn put_log_id(log_id: &LogId, out: &mut impl BufMut) {
    out.put_u64(log_id.leader_id.term);
    out.put_u64(log_id.leader_id.node_id);
    out.put_u64(log_id.index);
}

pub(crate) fn get_log_id(reader: &mut Reader) -> Result<LogId, DecodeError> {
    let leader_id = get_leader_id(reader)?;
    Ok(LogId { leader_id, index: get_ordinal("log index: out of reach", reader)? })
}

pub(crate) fn put_vote(vote: &Vote, out: &mut impl BufMut) {
    put_leader_id(&vote.leader_id, out);
    out.put_u8(u8::from(vote.committed));
}

pub(crate) fn get_vote(reader: &mut Reader) -> Result<Vote, DecodeError> {
    let leader_id = get_leader_id(reader)?;
    Ok(Vote { leader_id, committed: reader.flag()? })
}

pub(crate) fn put_leader_id(id: &LeaderId, out: &mut impl BufMut) {
    out.put_u64(id.term);
    out.put_u64(id.node_id);
}

pub(crate) fn get_leader_id(reader: &mut Reader) -> Result<LeaderId, DecodeError> {
    let term = get_ordinal("term: out of reach", reader)?;
    Ok(LeaderId { term, node_id: reader.u64()? })
}

fn get_ordinal(what: &'static str, reader: &mut Reader) -> Result<u64, DecodeError> {
    let ordinal = reader.u64()?;
    if ordinal > reader.ordinal_max() {
        return Err(DecodeError::Invalid { what });
    }
    Ok(ordinal)
}

pub(crate) fn put_stored_membership<B: BufMut>(stored: &StoredMembership, out: &mut B) {
    put_option(stored.log_id().as_ref(), out, put_log_id);
    put_membership(stored.membership(), out);
}

pub(crate) fn get_stored_membership(reader: &mut Reader) -> Result<StoredMembership, DecodeError> {
    let log_id = reader.option(get_log_id)?;
    Ok(StoredMembership::new(log_id, get_membership(reader)?))
}

fn put_membership(membership: &Membership, out: &mut impl BufMut) {
    let configs = membership.get_joint_config();
    put_count(configs.len(), out);
    for config in configs {
        put_count(config.len(), out);
        config.iter().for_each(|id| out.put_u64(*id));
    }
    put_count(membership.nodes().count(), out);
    for (id, addrs) in membership.nodes() {
        out.put_u64(*id);
        put_bytes(addrs.http.as_bytes(), out);
        put_bytes(addrs.rpc.as_bytes(), out);
    }
}

fn get_membership(reader: &mut Reader) -> Result<Membership, DecodeError> {
    // Counts are not trusted with an allocation: each round consumes input or ends with an error.
    let mut configs = Vec::new();
    for _ in 0..reader.u32()? {
        let mut config = BTreeSet::new();
        for _ in 0..reader.u32()? {
            let id = reader.u64()?;
            check_ascending(config.last(), id)?;
            config.insert(id);
        }
        configs.push(config);
    }
    let mut nodes = BTreeMap::new();
    for _ in 0..reader.u32()? {
        let id = reader.u64()?;
        check_ascending(nodes.last_key_value().map(|(last, _)| last), id)?;
        nodes.insert(id, NodeAddrs { http: reader.text()?, rpc: reader.text()? });
    }
    Membership::new(configs, nodes).map_err(|_| DecodeError::Invalid {
        what: "membership: an empty config, or a voter without an address",
    })
}

fn check_ascending(last: Option<&NodeId>, next: NodeId) -> Result<(), DecodeError> {
    if last.is_some_and(|last| *last >= next) {
        return Err(DecodeError::Invalid { what: "membership: node ids do not ascend" });
    }
    Ok(())
}

fn put_command(command: &Command, out: &mut impl BufMut) {
    match command {
        Command::Write(writes) => {
            out.put_u8(TAG_WRITES);
            out.put_slice(writes.encoded());
        }
        Command::InstallRing(ring) => {
            out.put_u8(TAG_RING);
            let json =
                serde_json::to_vec(ring).expect("a ring has text keys and nothing that fails");
            out.put_slice(&json);
        }
        Command::Step(step) => {
            out.put_u8(TAG_STEP);
            let json = serde_json::to_vec(step).expect("a step has text keys and finite numbers");
            out.put_slice(&json);
        }
        Command::Import(import) => {
            out.put_u8(TAG_IMPORT);
            import.encode(out);
        }
        Command::Clean(clean) => {
            out.put_u8(TAG_CLEAN);
            clean.encode(out);
        }
    }
}

fn get_command(tag: u8, reader: &mut Reader) -> Result<Command, DecodeError> {
    match tag {
        TAG_WRITES => Ok(Command::Write(Writes::decode(reader.rest())?)),
        TAG_RING => match serde_json::from_slice(&reader.rest()) {
            Ok(ring) => Ok(Command::InstallRing(Box::new(ring))),
            Err(_) => Err(DecodeError::Invalid { what: "ring" }),
        },
        TAG_STEP => match serde_json::from_slice(&reader.rest()) {
            Ok(step) => Ok(Command::Step(Box::new(step))),
            Err(_) => Err(DecodeError::Invalid { what: "step" }),
        },
        TAG_IMPORT => Ok(Command::Import(Box::new(Import::decode(reader)?))),
        TAG_CLEAN => Ok(Command::Clean(Box::new(Clean::decode(reader)?))),
        found => Err(DecodeError::Tag { what: "payload", found }),
    }
}
