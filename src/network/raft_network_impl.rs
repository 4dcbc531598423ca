//! The client side of the peer network: how openraft reaches other nodes.
//!
//! [`PeerNetwork`] holds the links to all peers, one for each purpose, and hands openraft a
//! [`PeerClient`] whenever it asks for one. Clients of one peer share its links: openraft makes a new
//! client for every election.
//!
//! Errors are sorted for openraft's backoff: nobody there, or nobody who can work, is `Unreachable`,
//! and it waits longer and longer; a connection that broke is `Network`, and it tries again at once.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, Stream, StreamExt};
use openraft::errors::{
    NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2, stream_append_sequential};
use openraft::type_config::alias::SnapshotOf;
use openraft::{ErrorSubject, ErrorVerb, RPCTypes, StorageError};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use super::peer::PeerIdentity;

use super::handoff_links::HandoffLinks;
use super::peer::Purpose;
use super::peer::aside::Aside;
use super::peer::connection::CallError;
use super::peer::greeting::Refusal;
use super::peer::link::{ConnectError, Link, LinkContext};
use super::peer::pipeline::{PipelineError, append_stream};
use super::peer::quiet::Quiet;
use super::peer::rounds::{self, RoundError};
use super::peer::settings::PeerSettings;
use super::peer::snapshot::{SendError, Transfer};
use super::peer::thrift::Thrift;
use super::peer::votes::{NO_ELECTION, may_answer, may_answer_pre_vote, may_refuse};
use super::peer::wire::{
    AppendReply, AppendRequest, Call, Confirm, Failure, Heartbeat, HeartbeatReply, Installed,
    PreVote, TransferReply, TransferRequest, VoteReply, VoteRequest,
};
use crate::config::Config;
use crate::store::formation::Formation;
use crate::store::snapshot::SnapshotData;
use crate::types::{LeaderId, LogId, NodeAddrs, NodeId, StoredMembership, TypeConfig, Vote};

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;
type ReplyStream<'s> = BoxStream<'s, RpcResult<AppendReply>>;

/// Why a follower could not learn up to where it must have applied. A read was not served; asking
/// again is safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadIndexError {
    /// The asked node does not lead, and says who does if it knows.
    #[error("the asked node does not lead")]
    NotLeader {
        /// The leader that it knows.
        leader: Option<NodeId>,
    },
    /// The leader could not be reached, or could not confirm that it leads.
    #[error("{0}")]
    Unavailable(String),
    /// The deadline passed.
    #[error("the leader did not answer in time")]
    Timeout,
}

/// The links of one node to its peers. Cheap to clone; when the last clone and the last client are
/// dropped, or after [`PeerNetwork::shutdown`], all connections are closed.
#[derive(Clone)]
pub struct PeerNetwork {
    shared: Arc<Shared>,
}

struct Shared {
    context: LinkContext,
    links: Mutex<HashMap<(NodeId, Purpose), Arc<Link>>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.context.shutdown.cancel();
    }
}

impl PeerNetwork {
    /// Connects to nobody yet.
    pub fn new(identity: PeerIdentity, formation: Formation, config: &Config) -> Self {
        let settings = Arc::new(PeerSettings::new(config));
        let thrift = Thrift::new(identity.node_id, settings.spare_append_pause);
        let context = LinkContext {
            identity,
            formation,
            settings,
            shutdown: CancellationToken::new(),
            tracker: TaskTracker::new(),
            quiet: Arc::new(Quiet::default()),
            thrift: Arc::new(thrift),
        };
        Self { shared: Arc::new(Shared { context, links: Mutex::default() }) }
    }

    /// Tells where this node's membership is looked up. Until then, every follower is sent entries at once,
    /// also one that no majority needs, and nobody is called as a voter.
    pub fn know_members(
        &self,
        members: impl Fn() -> Arc<StoredMembership> + Send + Sync + 'static,
    ) {
        self.shared.context.thrift.know_members(Box::new(members));
    }

    /// Sends a follower at once what it has not been sent yet: it waits for it.
    pub fn hurry(&self, follower: NodeId) {
        self.shared.context.thrift.hurry(follower);
    }

    /// Ends the stream of entries to a follower, if there is one: openraft looks anew at what to send it.
    pub fn end_appends(&self, follower: NodeId) -> bool {
        let links = self.shared.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.get(&(follower, Purpose::Append)).is_some_and(|link| link.close())
    }

    /// Up to which log id this node must have applied before it serves a linearizable read that was
    /// asked for before this call. Concurrent calls share messages. Cancel safe.
    pub async fn read_index(
        &self,
        leader: NodeId,
        addrs: &NodeAddrs,
        deadline: Instant,
    ) -> Result<LogId, ReadIndexError> {
        let link = self.link(leader, addrs, Purpose::Control);
        match timeout_at(deadline, rounds::read_index(&link)).await {
            Ok(Ok(log_id)) => Ok(log_id),
            Ok(Err(RoundError::Call(CallError::Failed(Failure::NotLeader(leader))))) => {
                Err(ReadIndexError::NotLeader { leader })
            }
            Ok(Err(error)) => Err(ReadIndexError::Unavailable(error.to_string())),
            Err(_) => Err(ReadIndexError::Timeout),
        }
    }

    /// Whether a member, asked now, has promised its vote to nobody later than `leader`, and keeps it for that
    /// one for as long as `lease`, counted from its answer. Not reaching it is a no. Takes a connection's and a
    /// reply's time at most.
    pub async fn confirm(
        &self,
        target: NodeId,
        addrs: &NodeAddrs,
        leader: LeaderId,
        lease: Duration,
    ) -> bool {
        let link = self.link(target, addrs, Purpose::Control);
        let Ok(connection) = link.connection().await else { return false };
        let lease_ms = u32::try_from(lease.as_millis()).unwrap_or(u32::MAX);
        let question = Confirm { leader, lease_ms };
        connection.call(&question, link.settings().reply_timeout).await.unwrap_or(false)
    }

    /// Greets a node that is about to become a member. `Some` says why it and this node do not belong
    /// together; a node that does not answer may do so later. Takes a connection's time at most.
    pub async fn refusal_of(&self, target: NodeId, addrs: &NodeAddrs) -> Option<String> {
        let context = self.shared.context.clone();
        let target = context.colleague(target);
        let link = Arc::new(Link::new(context, target, addrs.rpc.clone(), Purpose::Control));
        match link.connection().await {
            Err(ConnectError::Refused { refusal: Refusal::Full, .. }) => None,
            Err(error @ ConnectError::Refused { .. }) => Some(error.to_string()),
            _ => None,
        }
    }

    /// The ways to clusters that give keys to this node's. They end with this network's
    /// [`Self::shutdown`].
    pub fn handoff_links(&self) -> HandoffLinks {
        HandoffLinks::new(self.shared.context.clone())
    }

    /// Closes all connections, for good, and waits until every task behind them has ended.
    pub async fn shutdown(&self) {
        self.shared.context.shutdown.cancel();
        self.shared.context.tracker.close();
        self.shared.context.tracker.wait().await;
    }

    fn client(&self, target: NodeId, addrs: &NodeAddrs, appends: Appends) -> PeerClient {
        PeerClient {
            own: self.shared.context.identity.node_id,
            target,
            appends,
            append: self.link(target, addrs, Purpose::Append),
            control: self.link(target, addrs, Purpose::Control),
            snapshot: self.link(target, addrs, Purpose::Snapshot),
            _network: self.clone(),
        }
    }

    /// The link of a node and purpose; a new one if the node's address has changed.
    fn link(&self, target: NodeId, addrs: &NodeAddrs, purpose: Purpose) -> Arc<Link> {
        let fresh = || {
            let context = self.shared.context.clone();
            let target = context.colleague(target);
            Arc::new(Link::new(context, target, addrs.rpc.clone(), purpose))
        };
        let mut links = self.shared.links.lock().unwrap_or_else(PoisonError::into_inner);
        let link = links.entry((target, purpose)).or_insert_with(fresh);
        if link.addr() != addrs.rpc {
            *link = fresh();
        }
        Arc::clone(link)
    }
}

impl RaftNetworkFactory<TypeConfig> for PeerNetwork {
    type Network = PeerClient;

    async fn new_client(&mut self, target: NodeId, node: &NodeAddrs) -> PeerClient {
        self.client(target, node, Appends::Pipelined)
    }

    async fn new_heartbeat_client(&mut self, target: NodeId, node: &NodeAddrs) -> PeerClient {
        self.client(target, node, Appends::OneByOne)
    }
}

/// How a client sends appends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Appends {
    /// Many in flight, on a connection of their own: replication.
    Pipelined,
    /// One after the other, beside votes: heartbeats.
    OneByOne,
}

/// openraft's way to one peer.
pub struct PeerClient {
    own: NodeId,
    target: NodeId,
    appends: Appends,
    append: Arc<Link>,
    control: Arc<Link>,
    snapshot: Arc<Link>,
    /// Keeps the connections open for as long as openraft has clients.
    _network: PeerNetwork,
}

impl PeerClient {
    /// Makes one call on the control connection.
    async fn control<T: Call>(&self, message: &T, action: RPCTypes) -> RpcResult<T::Reply> {
        let connection =
            self.control.connection().await.map_err(|error| Unreachable::new(&error))?;
        let patience = self.control.settings().reply_timeout;
        let called = connection.call(message, patience).await;
        called.map_err(|error| call_error(error, action, self.own, self.target))
    }

    fn streaming_error(&self, error: SendError) -> StreamingError<TypeConfig> {
        match error {
            SendError::Connect(error) => Unreachable::new(&error).into(),
            SendError::Call(error) => {
                call_error(error, RPCTypes::InstallSnapshot, self.own, self.target).into()
            }
            SendError::Read(error) => {
                let (subject, verb) = (ErrorSubject::Snapshot(None), ErrorVerb::Read);
                StorageError::from_io_error(subject, verb, error).into()
            }
            // openraft takes the newest one then, at once.
            SendError::Replaced => NetworkError::new(&error).into(),
            // Not the disk's failure, which would end Raft here; but trying again at once may end the same way.
            SendError::BrokenOff(error) => Unreachable::new(&error).into(),
            // Trying again at once would find the same receiver.
            SendError::Senseless(why) => Unreachable::from_string(why).into(),
        }
    }
}

/// Sorts a failed call for openraft.
fn call_error(
    error: CallError,
    action: RPCTypes,
    id: NodeId,
    target: NodeId,
) -> RPCError<TypeConfig> {
    match error {
        CallError::Timeout(timeout) => Timeout { action, id, target, timeout }.into(),
        // Trying again at once would end the same way.
        CallError::Failed(Failure::Stopped | Failure::Refused(_)) | CallError::TooLarge { .. } => {
            Unreachable::new(&error).into()
        }
        CallError::Closed(_) | CallError::Failed(_) => NetworkError::new(&error).into(),
    }
}

/// Refuses an answer if the vote in it is not one to be believed.
fn believed(is_possible: bool) -> RpcResult<()> {
    match is_possible {
        true => Ok(()),
        false => Err(NetworkError::from_string(NO_ELECTION).into()),
    }
}

impl RaftNetworkV2<TypeConfig> for PeerClient {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendRequest,
        _: RPCOption,
    ) -> RpcResult<HeartbeatReply> {
        let (prev, said) = (request.prev_log_id, request.vote);
        let reply = self.control(&Heartbeat(request), RPCTypes::AppendEntries).await?;
        // openraft takes it for granted that only an existing entry can conflict.
        if prev.is_none() && reply == HeartbeatReply::Conflict {
            return Err(NetworkError::from_string("a conflict with no entry").into());
        }
        if let HeartbeatReply::HigherVote(vote) = &reply {
            believed(may_refuse(vote, self.own, &said))?;
        }
        Ok(reply)
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<ReplyStream<'s>>>
    where
        S: Stream<Item = AppendRequest> + Send + Unpin + 'static,
    {
        if self.appends == Appends::OneByOne {
            return stream_append_sequential(self, input, option);
        }
        let (own, target) = (self.own, self.target);
        let replies = append_stream(Arc::clone(&self.append), input).map(move |reply| {
            reply.map_err(|error| match error {
                PipelineError::Connect(error) => Unreachable::new(&error).into(),
                PipelineError::Call(error) => {
                    call_error(error, RPCTypes::AppendEntries, own, target)
                }
                PipelineError::TooLarge(error) => Unreachable::new(&error).into(),
            })
        });
        std::future::ready(Ok(replies.boxed())).boxed()
    }

    async fn vote(&mut self, request: VoteRequest, _: RPCOption) -> RpcResult<VoteReply> {
        let reply = self.control(&request, RPCTypes::Vote).await?;
        believed(may_answer(&reply.vote, self.own, &request.vote))?;
        Ok(reply)
    }

    async fn pre_vote(&mut self, request: VoteRequest, _: RPCOption) -> RpcResult<VoteReply> {
        let said = request.vote;
        let reply = self.control(&PreVote(request), RPCTypes::Vote).await?;
        believed(may_answer_pre_vote(&reply.vote, self.own, &said))?;
        Ok(reply)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _: RPCOption,
    ) -> Result<Installed, StreamingError<TypeConfig>> {
        let SnapshotOf::<TypeConfig, _> { meta, snapshot } = snapshot;
        let SnapshotData::Image(source) = snapshot else {
            let why = "a staged snapshot is for installing, not for sending";
            return Err(NetworkError::from_string(why).into());
        };
        // Where a newer image has taken its place, the last one to hold it closes it and removes its files.
        let transfer = Aside::new(Transfer { source, vote, meta });
        tokio::select! {
            biased;
            closed = cancel => Err(closed.into()),
            sent = transfer.send(&self.snapshot) => sent.map_err(|error| self.streaming_error(error)),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferRequest,
        _: RPCOption,
    ) -> RpcResult<TransferReply> {
        self.control(&request, RPCTypes::TransferLeader).await
    }
}
