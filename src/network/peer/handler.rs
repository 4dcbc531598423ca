//! What the server side of the peer network asks of the node: Raft, the snapshot stager and the store in
//! a node, a fake in tests.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use super::wire::{
    AppendReply, AppendRequest, BeginSnapshot, Failure, FinishSnapshot, HeartbeatReply, Installed,
    PageReply, SnapshotChunk, SnapshotStep, TransferReply, TransferRequest, VoteReply, VoteRequest,
};
use crate::handoff::PageRequest;
use crate::types::{ClusterId, LeaderId, LogId, NodeId, Vote};

/// The leader that a node follows, and the node's part in electing the next one.
#[derive(Debug, Clone)]
pub(in crate::network) struct Followed {
    pub(in crate::network) node_id: NodeId,
    /// Where it accepts peers.
    pub(in crate::network) rpc: String,
    pub(in crate::network) vote: Vote,
    /// How many voters there are besides the leader...
    pub(in crate::network) turns: u32,
    /// ...and which one of them this node is; `None` when it has no vote.
    pub(in crate::network) turn: Option<u32>,
}

/// The work behind a message, and what the end of a connection asks of Raft. Unless it says otherwise, a
/// method may take as long as a disk does; its future may be dropped when the node stops.
#[async_trait]
pub(in crate::network) trait PeerHandler: Send + Sync + 'static {
    /// The nodes of this node's latest membership. Empty before it has one.
    fn members(&self) -> HashSet<NodeId>;

    /// Appends a session's requests in order; replies come in the same order. Ends after a refusal.
    fn append_session(
        &self,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxStream<'static, Result<AppendReply, Failure>>;

    async fn heartbeat(&self, request: AppendRequest) -> Result<HeartbeatReply, Failure>;

    async fn vote(&self, request: VoteRequest) -> Result<VoteReply, Failure>;

    async fn pre_vote(&self, request: VoteRequest) -> Result<VoteReply, Failure>;

    async fn transfer_leader(&self, request: TransferRequest) -> Result<TransferReply, Failure>;

    /// The leader that this node follows; `None` when it knows none or leads. Answers at once.
    fn followed(&self) -> Option<Followed>;

    /// Lets other leaders be elected from now on although the leader with this vote may have been heard of
    /// lately.
    async fn give_up_lease(&self, vote: Vote);

    /// Asks the other voters whether they would elect this node, and stands for election if so.
    async fn ask_for_votes(&self);

    async fn read_index(&self, follower: NodeId) -> Result<LogId, Failure>;

    /// Whether this node has promised its vote to nobody later than `leader`, and does not for as long as
    /// `lease`. Answers at once.
    fn confirm(&self, leader: LeaderId, lease: Duration) -> bool;

    async fn begin_snapshot(&self, begin: BeginSnapshot) -> Result<SnapshotStep, Failure>;

    async fn snapshot_chunk(&self, chunk: SnapshotChunk) -> Result<SnapshotStep, Failure>;

    async fn finish_snapshot(&self, finish: FinishSnapshot) -> Result<Installed, Failure>;

    /// Whether the change of the ring that this node's cluster takes part in, as far as this node has
    /// applied it, gives keys to another cluster. Answers at once.
    fn gives_to(&self, cluster: &ClusterId) -> bool;

    /// What follows a destination's cursor. That the handoff is between this node's cluster and the
    /// sender's is checked, and `bytes_max` is bounded.
    async fn page(&self, request: PageRequest) -> Result<PageReply, Failure>;
}
