//! Snapshots, from begin to install.

use bytes::{BufMut, Bytes};

use super::{Installed, Wire, get_maybe, put_maybe};
use crate::codec::{
    DecodeError, Reader, get_stored_membership, get_vote, put_bytes, put_stored_membership,
    put_vote,
};
use crate::store::snapshot::StagingPosition;
use crate::types::{SnapshotMeta, Vote};

/// Start sending snapshot `id`, or go on where an interrupted transfer of it stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::network) struct BeginSnapshot {
    pub(in crate::network) vote: Vote,
    pub(in crate::network) id: u64,
    pub(in crate::network) meta: SnapshotMeta,
}

/// The next piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::network) struct SnapshotChunk {
    pub(in crate::network) vote: Vote,
    pub(in crate::network) id: u64,
    /// Counts from 0; repeats are recognised by it.
    pub(in crate::network) seq: u64,
    /// Opaque and self-checksummed.
    pub(in crate::network) bytes: Bytes,
}

/// All pieces are there: verify and install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::network) struct FinishSnapshot {
    pub(in crate::network) vote: Vote,
    pub(in crate::network) id: u64,
    pub(in crate::network) meta: SnapshotMeta,
}

/// The receiver's answer to begin and to every piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::network) enum SnapshotStep {
    /// Where to go on.
    Position(StagingPosition),
    /// The sender does not lead any more.
    HigherVote(Vote),
}

fn put_meta(meta: &SnapshotMeta, out: &mut Vec<u8>) {
    put_maybe(&meta.last_log_id, out);
    put_stored_membership(&meta.last_membership, out);
}

fn get_meta(reader: &mut Reader) -> Result<SnapshotMeta, DecodeError> {
    let last_log_id = get_maybe(reader)?;
    Ok(SnapshotMeta { last_log_id, last_membership: get_stored_membership(reader)? })
}

impl Wire for BeginSnapshot {
    fn encode(&self, out: &mut Vec<u8>) {
        put_vote(&self.vote, out);
        out.put_u64(self.id);
        put_meta(&self.meta, out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self { vote: get_vote(reader)?, id: reader.u64()?, meta: get_meta(reader)? })
    }
}

impl Wire for SnapshotChunk {
    fn encode(&self, out: &mut Vec<u8>) {
        put_vote(&self.vote, out);
        out.put_u64(self.id);
        out.put_u64(self.seq);
        put_bytes(&self.bytes, out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let vote = get_vote(reader)?;
        Ok(Self { vote, id: reader.u64()?, seq: reader.u64()?, bytes: reader.bytes()? })
    }
}

impl Wire for FinishSnapshot {
    fn encode(&self, out: &mut Vec<u8>) {
        put_vote(&self.vote, out);
        out.put_u64(self.id);
        put_meta(&self.meta, out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self { vote: get_vote(reader)?, id: reader.u64()?, meta: get_meta(reader)? })
    }
}

impl Wire for SnapshotStep {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Position(position) => {
                out.put_u8(0);
                out.put_u64(position.next_seq);
                out.put_u8(u8::from(position.complete));
                put_bytes(&position.cursor, out);
            }
            Self::HigherVote(vote) => {
                out.put_u8(1);
                put_vote(vote, out);
            }
        }
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        match reader.u8()? {
            0 => {
                let next_seq = reader.u64()?;
                let complete = reader.flag()?;
                let cursor = reader.bytes()?;
                Ok(Self::Position(StagingPosition { next_seq, cursor, complete }))
            }
            1 => Ok(Self::HigherVote(get_vote(reader)?)),
            found => Err(DecodeError::Tag { what: "snapshot step", found }),
        }
    }
}

impl Wire for Installed {
    fn encode(&self, out: &mut Vec<u8>) {
        put_vote(&self.vote, out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        get_vote(reader).map(Self::new)
    }
}
