//! The messages between peers and their encoding, in the manner of [`crate::codec`].
//!
//! ```text
//! append     = session:u64, append request
//! append request = vote, prev:log id?, leader commit:log id?, count:u32 x (length:u32, entry record)
//! append reply   = 0, matched:log id? | 1, conflict:log id | 2, higher:vote
//! heartbeat reply= 0 | 1, matched:log id? | 2 | 3, higher:vote    success, partial, conflict, higher
//! vote request   = vote, last:log id?, leadership transfer:u8 (0|1)
//! vote reply     = vote, granted:u8 (0|1), last:log id?
//! transfer       = from:vote, to:u64, last:log id?
//! transfer reply = 0 | 1, expected:vote, actual:vote | 2, expected:log id?, actual:log id?
//! confirm        = term:u64, node:u64, lease_ms:u32      0: no lease
//! confirm reply  = u8 (0|1)
//! begin, finish  = vote, id:u64, last:log id?, stored membership
//! chunk          = vote, id:u64, seq:u64, length:u32, bytes
//! step           = 0, next seq:u64, complete:u8 (0|1), length:u32, cursor | 1, higher:vote
//! installed      = vote
//! page           = page request, see crate::handoff
//! page reply     = 0, page, see crate::handoff | 1, refusal:text, JSON
//! failure        = 0 | 1 | 2, leader:u64? | 3 | 4, text
//! ```
//! The version of all of them is in the envelope around each ([`super::envelope`]).
//!
//! Decoding checks more than the layout where Raft would panic or corrupt its log: entries follow
//! each other and `prev` without a gap.

mod handoff;
mod methods;
mod raft;
mod snapshot;
#[cfg(test)]
mod tests;

use bytes::BufMut;

pub(in crate::network) use handoff::PageReply;
pub(in crate::network) use methods::{Call, Method};
pub(in crate::network) use raft::{
    Append, Confirm, EncodedAppend, EntryTooLarge, Heartbeat, PreVote, ReadIndex, encode_appends,
};
pub(in crate::network) use snapshot::{BeginSnapshot, FinishSnapshot, SnapshotChunk, SnapshotStep};

use crate::codec::{DecodeError, Reader, get_log_id, put_bytes, put_log_id, put_option};
use crate::types::{LogId, NodeId, TypeConfig};

pub(in crate::network) type AppendRequest = openraft::raft::AppendEntriesRequest<TypeConfig>;
pub(in crate::network) type HeartbeatReply = openraft::raft::AppendEntriesResponse<TypeConfig>;
pub(in crate::network) type AppendReply = Result<Option<LogId>, AppendRefusal>;
pub(in crate::network) type AppendRefusal = openraft::raft::StreamAppendError<TypeConfig>;
pub(in crate::network) type VoteRequest = openraft::raft::VoteRequest<TypeConfig>;
pub(in crate::network) type VoteReply = openraft::raft::VoteResponse<TypeConfig>;
pub(in crate::network) type TransferRequest = openraft::raft::TransferLeaderRequest<TypeConfig>;
pub(in crate::network) type TransferReply = openraft::raft::TransferLeaderResponse<TypeConfig>;
pub(in crate::network) type TransferRefusal = openraft::raft::TransferLeaderError<TypeConfig>;
pub(in crate::network) type Installed = openraft::raft::SnapshotResponse<TypeConfig>;

/// What can be sent. Decoding never panics and never allocates more than a small multiple of its
/// input.
pub(in crate::network) trait Wire: Sized {
    fn encode(&self, out: &mut Vec<u8>);
    fn decode(reader: &mut Reader) -> Result<Self, DecodeError>;
}

/// Why a peer could not do what a message asks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::network) enum Failure {
    /// Its Raft has stopped, on purpose or after a storage error.
    #[error("the peer's Raft has stopped")]
    Stopped,
    /// The append came after one of its session that failed; start a new session.
    #[error("an earlier append of the session was refused")]
    SessionEnded,
    /// It does not lead, and may know who does.
    #[error("the peer does not lead")]
    NotLeader(Option<NodeId>),
    /// It leads, but could not confirm that with a majority.
    #[error("the peer cannot reach a majority")]
    NoQuorum,
    /// Its disk, or the data sent to it, is bad.
    #[error("the peer could not do it: {0}")]
    Refused(String),
}

/// The longest text in a failure.
const FAILURE_TEXT_BYTES_MAX: usize = 512;

impl Failure {
    /// A failure with a text for people, cut to a bounded length.
    pub(in crate::network) fn refused(why: impl ToString) -> Self {
        let mut text = why.to_string();
        text.truncate(text.floor_char_boundary(FAILURE_TEXT_BYTES_MAX));
        Self::Refused(text)
    }
}

impl Wire for Failure {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Stopped => out.put_u8(0),
            Self::SessionEnded => out.put_u8(1),
            Self::NotLeader(leader) => {
                out.put_u8(2);
                put_option(leader.as_ref(), out, |id, out| out.put_u64(*id));
            }
            Self::NoQuorum => out.put_u8(3),
            Self::Refused(why) => {
                out.put_u8(4);
                put_bytes(why.as_bytes(), out);
            }
        }
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        match reader.u8()? {
            0 => Ok(Self::Stopped),
            1 => Ok(Self::SessionEnded),
            2 => Ok(Self::NotLeader(reader.option(Reader::u64)?)),
            3 => Ok(Self::NoQuorum),
            4 => Ok(Self::refused(reader.text()?)),
            found => Err(DecodeError::Tag { what: "failure", found }),
        }
    }
}

impl Wire for () {
    fn encode(&self, _: &mut Vec<u8>) {}

    fn decode(_: &mut Reader) -> Result<Self, DecodeError> {
        Ok(())
    }
}

impl Wire for bool {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(u8::from(*self));
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        reader.flag()
    }
}

impl Wire for LogId {
    fn encode(&self, out: &mut Vec<u8>) {
        put_log_id(self, out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        get_log_id(reader)
    }
}

fn put_maybe(log_id: &Option<LogId>, out: &mut Vec<u8>) {
    put_option(log_id.as_ref(), out, put_log_id);
}

fn get_maybe(reader: &mut Reader) -> Result<Option<LogId>, DecodeError> {
    reader.option(get_log_id)
}
