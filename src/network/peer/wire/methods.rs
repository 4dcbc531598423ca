//! The procedures: their numbers in frames, their names for Toy-RPC, what goes in and what comes out.

use super::{
    Append, AppendReply, BeginSnapshot, Confirm, FinishSnapshot, Heartbeat, HeartbeatReply,
    Installed, PageReply, PreVote, ReadIndex, SnapshotChunk, SnapshotStep, TransferReply,
    TransferRequest, VoteReply, VoteRequest, Wire,
};
use crate::handoff::PageRequest;
use crate::network::peer::Purpose;
use crate::types::LogId;

/// One remote procedure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) enum Method {
    Append,
    Heartbeat,
    Vote,
    PreVote,
    TransferLeader,
    ReadIndex,
    BeginSnapshot,
    SnapshotChunk,
    FinishSnapshot,
    Confirm,
    Page,
}

impl Method {
    const ALL: [Self; 11] = [
        Self::Append,
        Self::Heartbeat,
        Self::Vote,
        Self::PreVote,
        Self::TransferLeader,
        Self::ReadIndex,
        Self::BeginSnapshot,
        Self::SnapshotChunk,
        Self::FinishSnapshot,
        Self::Confirm,
        Self::Page,
    ];

    /// Its number in a frame; 0 is not one.
    pub(in crate::network) fn number(self) -> u8 {
        self as u8 + 1
    }

    pub(in crate::network) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.number() == number)
    }

    /// Its name as Toy-RPC has it, `Service.method`.
    pub(in crate::network) fn full_name(self) -> &'static str {
        match self {
            Self::Append => "peer.append",
            Self::Heartbeat => "peer.heartbeat",
            Self::Vote => "peer.vote",
            Self::PreVote => "peer.pre_vote",
            Self::TransferLeader => "peer.transfer_leader",
            Self::ReadIndex => "peer.read_index",
            Self::BeginSnapshot => "peer.begin_snapshot",
            Self::SnapshotChunk => "peer.snapshot_chunk",
            Self::FinishSnapshot => "peer.finish_snapshot",
            Self::Confirm => "peer.confirm",
            Self::Page => "peer.page",
        }
    }

    pub(in crate::network) fn from_full_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.full_name() == name)
    }

    /// The only kind of connection that may carry it.
    pub(in crate::network) fn purpose(self) -> Purpose {
        match self {
            Self::Append => Purpose::Append,
            Self::Heartbeat
            | Self::Vote
            | Self::PreVote
            | Self::TransferLeader
            | Self::ReadIndex
            | Self::Confirm => Purpose::Control,
            Self::BeginSnapshot | Self::SnapshotChunk | Self::FinishSnapshot => Purpose::Snapshot,
            Self::Page => Purpose::Handoff,
        }
    }
}

/// A message that asks, and the one that answers it.
pub(in crate::network) trait Call: Wire {
    const METHOD: Method;
    type Reply: Wire;
}

macro_rules! calls {
    ($($request:ty => $method:ident -> $reply:ty;)*) => {
        $(impl Call for $request {
            const METHOD: Method = Method::$method;
            type Reply = $reply;
        })*
    };
}

calls! {
    Append => Append -> AppendReply;
    Heartbeat => Heartbeat -> HeartbeatReply;
    VoteRequest => Vote -> VoteReply;
    PreVote => PreVote -> VoteReply;
    TransferRequest => TransferLeader -> TransferReply;
    ReadIndex => ReadIndex -> LogId;
    Confirm => Confirm -> bool;
    BeginSnapshot => BeginSnapshot -> SnapshotStep;
    SnapshotChunk => SnapshotChunk -> SnapshotStep;
    FinishSnapshot => FinishSnapshot -> Installed;
    PageRequest => Page -> PageReply;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_lead_back() {
        for method in Method::ALL {
            assert_eq!(Method::from_number(method.number()), Some(method));
            assert_eq!(Method::from_full_name(method.full_name()), Some(method));
        }
        assert_eq!(Method::from_number(0), None);
    }
}
