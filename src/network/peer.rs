//! Messages between nodes, of one cluster but for handoffs: what [`super::raft`] (the server side) and
//! [`super::raft_network_impl`] (the client side) share.
//!
//! The way of a message, outermost layer first:
//!
//! 1. [`greeting`]: both ends say who they are. Only then does Toy-RPC see the stream.
//! 2. [`frame`] and [`toy_codec`]: one Toy-RPC message, header and body together, is one frame with
//!    a bounded length and a checksum. This replaces Toy-RPC's own codec, which trusts lengths and
//!    sends every message in two flushed pieces.
//! 3. [`envelope`]: inside the body, a sequence number and the sender. Toy-RPC's own ids have 16 bits
//!    and come round again; the sequence tells a late reply from the right one.
//! 4. [`wire`]: the Raft message itself, encoded by hand, or the page of a handoff.
//!
//! A purpose has a connection of its own ([`Purpose`]), so that a large append or a snapshot never
//! delays a heartbeat. On the client side a [`link`] keeps one [`connection`] for a peer and a
//! purpose; [`pipeline`] and [`snapshot`] are the two callers that keep state; [`thrift`] says whom a
//! pipeline lets wait. On the server side
//! [`service`] takes the calls, [`lane`] puts appends back in order, and a [`handler::PeerHandler`]
//! does the work, which is Raft in a node and a fake in tests.
//!
//! Two rules hold everywhere. **What is suspicious ends the connection**: a frame, a sequence or a
//! message that makes no sense is never skipped. **Closing goes through one token**
//! ([`closer::Closer`]): whoever finds a reason cancels it, and all tasks of the connection, Toy-RPC's
//! included, end because their next read or write does.

pub(super) mod aside;
pub(super) mod closer;
pub(super) mod connection;
pub(super) mod envelope;
pub(super) mod frame;
pub(super) mod greeting;
pub(super) mod handler;
pub(super) mod lane;
pub(super) mod link;
mod pacer;
pub(super) mod pipeline;
pub(super) mod quiet;
pub(super) mod rounds;
pub(super) mod service;
pub(super) mod settings;
pub(super) mod snapshot;
pub(super) mod thrift;
pub(super) mod toy_codec;
pub(super) mod votes;
pub(super) mod wire;

#[cfg(test)]
mod tests;

use std::fmt;

use crate::codec::DecodeError;
use crate::types::{ClusterId, NodeId};

/// Who this node is: part of every greeting and every message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// The cluster that the node belongs to; nodes of others are refused, but for handoffs.
    pub cluster: ClusterId,
    /// The node's id inside its cluster.
    pub node_id: NodeId,
}

impl fmt::Display for PeerIdentity {
    /// As in `c1/2`: node 2 of cluster c1.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.node_id)
    }
}

impl PeerIdentity {
    /// The cluster's id as a number, cheap enough to put in every message.
    fn cluster_hash(&self) -> u64 {
        xxhash_rust::xxh3::xxh3_64(self.cluster.as_str().as_bytes())
    }
}

/// What a connection is for. One connection for each, to each peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    /// Log entries, pipelined.
    Append,
    /// Heartbeats, votes, leader transfer and read index: small and urgent.
    Control,
    /// Snapshots, chunk by chunk.
    Snapshot,
    /// Keys that the acceptor's cluster gives to the sender's in a change of the ring, page by page.
    Handoff,
}

impl Purpose {
    fn number(self) -> u8 {
        match self {
            Self::Append => 1,
            Self::Control => 2,
            Self::Snapshot => 3,
            Self::Handoff => 4,
        }
    }

    fn from_number(found: u8) -> Result<Self, DecodeError> {
        match found {
            1 => Ok(Self::Append),
            2 => Ok(Self::Control),
            3 => Ok(Self::Snapshot),
            4 => Ok(Self::Handoff),
            _ => Err(DecodeError::Tag { what: "purpose", found }),
        }
    }
}
