//! Appends, heartbeats, votes, leader transfer.

use bytes::BufMut;

use super::{
    AppendRefusal, AppendReply, AppendRequest, HeartbeatReply, TransferRefusal, TransferReply,
    TransferRequest, VoteReply, VoteRequest, Wire, get_maybe, put_maybe,
};
use crate::codec::{
    DecodeError, Reader, decode_entry, encode_entry, get_leader_id, get_log_id, get_vote,
    put_leader_id, put_log_id, put_vote,
};
use crate::network::peer::envelope::message_buffer;
use crate::types::{Entry, LeaderId, LogId};

/// One append of a pipelined session.
#[derive(Debug)]
pub(in crate::network) struct Append {
    /// Which run of appends it belongs to. When one is refused, those behind it are too, and the
    /// sender goes on with a new session.
    pub(in crate::network) session: u64,
    pub(in crate::network) request: AppendRequest,
}

/// An append on its own, with its own reply.
#[derive(Debug)]
pub(in crate::network) struct Heartbeat(pub(in crate::network) AppendRequest);

/// Whether a vote would be granted.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::network) struct PreVote(pub(in crate::network) VoteRequest);

/// Up to which log id a linearizable read must wait.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::network) struct ReadIndex;

/// Whether this node has promised its vote to nobody later than the leader that asks, and keeps it for that one
/// for so long.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::network) struct Confirm {
    pub(in crate::network) leader: LeaderId,
    pub(in crate::network) lease_ms: u32,
}

/// One message of an append that may have been split.
#[derive(Debug)]
pub(in crate::network) struct EncodedAppend {
    /// The message, with room in front for its envelope.
    pub(in crate::network) message: Vec<u8>,
    /// The entry before the first.
    pub(in crate::network) prev: Option<LogId>,
    /// The last entry, or `prev` if there is none.
    pub(in crate::network) last: Option<LogId>,
}

/// An entry too large for any message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("entry {log_id} takes {bytes} bytes, more than a message may have")]
pub(in crate::network) struct EntryTooLarge {
    log_id: LogId,
    bytes: usize,
}

/// Encodes an append as one message, or as several that follow each other when its entries do not
/// fit into one of `bytes_max`.
pub(in crate::network) fn encode_appends(
    session: u64,
    request: &AppendRequest,
    bytes_max: usize,
) -> Result<Vec<EncodedAppend>, EntryTooLarge> {
    let mut parts = Vec::new();
    let mut part = AppendPart::new(session, request, request.prev_log_id);
    for entry in &request.entries {
        if let Err(bytes) = part.push(entry, bytes_max) {
            let too_large = EntryTooLarge { log_id: entry.log_id, bytes };
            let last = part.last;
            if part.count == 0 {
                return Err(too_large);
            }
            parts.push(part.finish());
            part = AppendPart::new(session, request, last);
            part.push(entry, bytes_max).map_err(|_| too_large)?;
        }
    }
    parts.push(part.finish());
    Ok(parts)
}

struct AppendPart {
    message: Vec<u8>,
    count_at: usize,
    count: u32,
    prev: Option<LogId>,
    last: Option<LogId>,
}

impl AppendPart {
    fn new(session: u64, request: &AppendRequest, prev: Option<LogId>) -> Self {
        let mut message = message_buffer();
        message.put_u64(session);
        put_vote(&request.vote, &mut message);
        put_maybe(&prev, &mut message);
        put_maybe(&request.leader_commit, &mut message);
        let count_at = message.len();
        message.put_u32(0);
        Self { message, count_at, count: 0, prev, last: prev }
    }

    /// Adds an entry, or gives its size if it does not fit.
    fn push(&mut self, entry: &Entry, bytes_max: usize) -> Result<(), usize> {
        let before = self.message.len();
        put_entry(entry, &mut self.message);
        if self.message.len() > bytes_max {
            let bytes = self.message.len() - before;
            self.message.truncate(before);
            return Err(bytes);
        }
        self.count += 1;
        self.last = Some(entry.log_id);
        Ok(())
    }

    fn finish(mut self) -> EncodedAppend {
        self.message[self.count_at..][..4].copy_from_slice(&self.count.to_be_bytes());
        EncodedAppend { message: self.message, prev: self.prev, last: self.last }
    }
}

fn put_entry(entry: &Entry, out: &mut Vec<u8>) {
    let length_at = out.len();
    out.put_u32(0);
    encode_entry(entry, out);
    let length = u32::try_from(out.len() - length_at - 4).expect("limits keep entries below 4 GiB");
    out[length_at..][..4].copy_from_slice(&length.to_be_bytes());
}

impl Wire for AppendRequest {
    fn encode(&self, out: &mut Vec<u8>) {
        put_vote(&self.vote, out);
        put_maybe(&self.prev_log_id, out);
        put_maybe(&self.leader_commit, out);
        out.put_u32(u32::try_from(self.entries.len()).expect("limits keep batches small"));
        self.entries.iter().for_each(|entry| put_entry(entry, out));
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let vote = get_vote(reader)?;
        if !vote.committed {
            return Err(DecodeError::Invalid { what: "append: not from a leader" });
        }
        let prev_log_id = get_maybe(reader)?;
        let leader_commit = get_maybe(reader)?;
        let count = reader.u32()?;
        // Not trusted with an allocation: each entry consumes input or ends with an error.
        let mut entries: Vec<Entry> = Vec::new();
        let mut last = prev_log_id;
        for _ in 0..count {
            let entry = decode_entry(reader.bytes()?)?;
            check_follows(last, entry.log_id)?;
            last = Some(entry.log_id);
            entries.push(entry);
        }
        if last.is_some_and(|last| last.leader_id > vote.leader_id) {
            return Err(DecodeError::Invalid { what: "append: entries of a later leader" });
        }
        Ok(Self { vote, prev_log_id, entries, leader_commit })
    }
}

/// A log begins at 0, has no gaps, and its leaders only grow. Raft assumes it; a message must prove it.
fn check_follows(prev: Option<LogId>, next: LogId) -> Result<(), DecodeError> {
    let index = prev.map_or(Some(0), |prev| prev.index.checked_add(1));
    if index != Some(next.index) || prev.is_some_and(|prev| prev.leader_id > next.leader_id) {
        return Err(DecodeError::Invalid { what: "append: entries do not follow each other" });
    }
    Ok(())
}

impl Wire for Append {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.session);
        self.request.encode(out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self { session: reader.u64()?, request: AppendRequest::decode(reader)? })
    }
}

impl Wire for Heartbeat {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        AppendRequest::decode(reader).map(Self)
    }
}

impl Wire for AppendReply {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Ok(matched) => {
                out.put_u8(0);
                put_maybe(matched, out);
            }
            Err(AppendRefusal::Conflict(log_id)) => {
                out.put_u8(1);
                put_log_id(log_id, out);
            }
            Err(AppendRefusal::HigherVote(vote)) => {
                out.put_u8(2);
                put_vote(vote, out);
            }
        }
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        match reader.u8()? {
            0 => Ok(Ok(get_maybe(reader)?)),
            1 => Ok(Err(AppendRefusal::Conflict(get_log_id(reader)?))),
            2 => Ok(Err(AppendRefusal::HigherVote(get_vote(reader)?))),
            found => Err(DecodeError::Tag { what: "append reply", found }),
        }
    }
}

impl Wire for HeartbeatReply {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Success => out.put_u8(0),
            Self::PartialSuccess(matched) => {
                out.put_u8(1);
                put_maybe(matched, out);
            }
            Self::Conflict => out.put_u8(2),
            Self::HigherVote(vote) => {
                out.put_u8(3);
                put_vote(vote, out);
            }
        }
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        match reader.u8()? {
            0 => Ok(Self::Success),
            1 => Ok(Self::PartialSuccess(get_maybe(reader)?)),
            2 => Ok(Self::Conflict),
            3 => Ok(Self::HigherVote(get_vote(reader)?)),
            found => Err(DecodeError::Tag { what: "heartbeat reply", found }),
        }
    }
}

impl Wire for VoteRequest {
    fn encode(&self, out: &mut Vec<u8>) {
        put_vote(&self.vote, out);
        put_maybe(&self.last_log_id, out);
        out.put_u8(u8::from(self.leadership_transfer));
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let mut request = Self::new(get_vote(reader)?, get_maybe(reader)?);
        request.leadership_transfer = reader.flag()?;
        Ok(request)
    }
}

impl Wire for PreVote {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        VoteRequest::decode(reader).map(Self)
    }
}

impl Wire for VoteReply {
    fn encode(&self, out: &mut Vec<u8>) {
        put_vote(&self.vote, out);
        out.put_u8(u8::from(self.vote_granted));
        put_maybe(&self.last_log_id, out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let vote = get_vote(reader)?;
        let granted = reader.flag()?;
        Ok(Self::new(vote, get_maybe(reader)?, granted))
    }
}

impl Wire for TransferRequest {
    fn encode(&self, out: &mut Vec<u8>) {
        put_vote(self.from_leader(), out);
        out.put_u64(*self.to_node_id());
        put_maybe(&self.last_log_id().copied(), out);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self::new(get_vote(reader)?, reader.u64()?, get_maybe(reader)?))
    }
}

impl Wire for TransferReply {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Ok(()) => out.put_u8(0),
            Err(TransferRefusal::VoteChanged { expected, actual }) => {
                out.put_u8(1);
                put_vote(expected, out);
                put_vote(actual, out);
            }
            Err(TransferRefusal::LogNotFlushed { expected, actual }) => {
                out.put_u8(2);
                put_maybe(expected, out);
                put_maybe(actual, out);
            }
        }
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(match reader.u8()? {
            0 => Ok(()),
            1 => Err(TransferRefusal::VoteChanged {
                expected: get_vote(reader)?,
                actual: get_vote(reader)?,
            }),
            2 => Err(TransferRefusal::LogNotFlushed {
                expected: get_maybe(reader)?,
                actual: get_maybe(reader)?,
            }),
            found => return Err(DecodeError::Tag { what: "transfer reply", found }),
        })
    }
}

impl Wire for ReadIndex {
    fn encode(&self, _: &mut Vec<u8>) {}

    fn decode(_: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self)
    }
}

impl Wire for Confirm {
    fn encode(&self, out: &mut Vec<u8>) {
        put_leader_id(&self.leader, out);
        out.put_u32(self.lease_ms);
    }

    fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self { leader: get_leader_id(reader)?, lease_ms: reader.u32()? })
    }
}
