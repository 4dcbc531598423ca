//! Peer messages into openraft, the snapshot stager and, for pages of handoffs, the store.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::storage::RaftStateMachine;
use openraft::{Raft, Snapshot};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use crate::handoff::PageRequest;
use crate::network::peer::PeerIdentity;
use crate::network::peer::handler::{Followed, PeerHandler};
use crate::network::peer::quiet::Quiet;
use crate::network::peer::votes::{NO_ELECTION, is_plausible};
use crate::network::peer::wire::{
    AppendReply, AppendRequest, BeginSnapshot, Failure, FinishSnapshot, HeartbeatReply, Installed,
    PageReply, SnapshotChunk, SnapshotStep, TransferReply, TransferRequest, VoteReply, VoteRequest,
};
use crate::read_gate::{ReadGate, ReadIndexFailure};
use crate::store::snapshot::{SnapshotData, SnapshotStager};
use crate::store::{Promise, StateReader, Store};
use crate::types::{ClusterId, LeaderId, LogId, NodeId, TypeConfig, Vote};

use super::lapse::Lapse;

/// Pages that are read at once, whoever asks. Each takes a thread and the disk, and what is read must
/// be sent, too: more at a time would hold up clients and bring no page sooner.
const PAGE_READS_MAX: usize = 2;

/// Pages that wait for their turn, whoever asks; the work for a connection outlives it, so what bounds one
/// connection does not bound this. Far more than all destinations of a change ask for at a time.
const PAGES_WAITING_MAX: usize = 64;

/// Steps of snapshot transfers that run or wait for the one that runs, whoever sends them. A leader sends one at
/// a time; another may be left over of a connection that was lost.
const SNAPSHOT_STEPS_MAX: usize = 4;

/// The [`PeerHandler`] of a node.
pub(super) struct RaftHandler<SM>
where
    SM: RaftStateMachine<TypeConfig>,
{
    raft: Raft<TypeConfig, SM>,
    id: NodeId,
    cluster: ClusterId,
    reader: StateReader,
    page_reads: Arc<Semaphore>,
    pages_waiting: Semaphore,
    snapshot_steps: Arc<Semaphore>,
    stager: SnapshotStager,
    promise: Promise,
    gate: ReadGate,
    read_index_timeout: Duration,
    lapse: Arc<Lapse>,
    quiet: Quiet,
}

impl<SM> RaftHandler<SM>
where
    SM: RaftStateMachine<TypeConfig, SnapshotData = SnapshotData>,
{
    pub(super) fn new(
        identity: &PeerIdentity,
        raft: Raft<TypeConfig, SM>,
        store: &Store,
        gate: ReadGate,
        read_index_timeout: Duration,
        lease: Duration,
    ) -> Self {
        Self {
            raft,
            id: identity.node_id,
            cluster: identity.cluster.clone(),
            reader: store.reader(),
            page_reads: Arc::new(Semaphore::new(PAGE_READS_MAX)),
            pages_waiting: Semaphore::new(PAGES_WAITING_MAX),
            snapshot_steps: Arc::new(Semaphore::new(SNAPSHOT_STEPS_MAX)),
            stager: store.stager(),
            promise: store.promise(),
            gate,
            read_index_timeout,
            lapse: Arc::new(Lapse::new(lease)),
            quiet: Quiet::default(),
        }
    }

    /// This node's vote, if it is higher: then the sender does not lead any more, and must not
    /// disturb what its successor stages. Raft itself decides again when a snapshot is installed.
    fn higher_vote(&self, sender: &Vote) -> Option<Vote> {
        let own = self.raft.metrics().borrow_watched().vote;
        (own > *sender).then_some(own)
    }

    /// Refuses to take part in an election before anything was promised ([`Promise`]): what was, may be lost.
    fn check_kept(&self) -> Result<(), Failure> {
        match self.promise.is_none() {
            true => Err(Failure::refused("a node without data votes for nobody")),
            false => Ok(()),
        }
    }

    /// Refuses a vote that no election leads to.
    fn check_vote(&self, vote: &Vote) -> Result<(), Failure> {
        if is_plausible(vote, self.id, self.promise.term()) {
            return Ok(());
        }
        Err(Failure::refused(NO_ELECTION))
    }

    /// Refuses a snapshot at which Raft would panic: what is committed here does not lie on the way to its
    /// end, because another entry has that index, or a later one an earlier leader.
    fn check_committed(&self, last: Option<LogId>) -> Result<(), Failure> {
        let committed = self.raft.metrics().borrow_watched().local_committed;
        let contradicts = |committed: LogId| {
            last.is_some_and(|last| last > committed && last.index <= committed.index)
        };
        if committed.is_some_and(contradicts) {
            return Err(Failure::refused("the snapshot contradicts what is committed here"));
        }
        Ok(())
    }

    /// As [`Self::check_vote`], of who sends a snapshot, which only a leader does.
    fn check_sender(&self, vote: &Vote) -> Result<(), Failure> {
        if !vote.committed {
            return Err(Failure::refused("a snapshot that is not from a leader"));
        }
        self.check_vote(vote)
    }

    /// Runs a blocking step of the stager.
    async fn stage<T: Send + 'static>(
        &self,
        step: impl FnOnce(SnapshotStager) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let Ok(place) = Arc::clone(&self.snapshot_steps).try_acquire_owned() else {
            return Err(Failure::refused("too many steps of snapshot transfers at once"));
        };
        let stager = self.stager.clone();
        // The place goes along: a step whose sender has gone is still a step.
        let step = move || {
            let done = step(stager);
            drop(place);
            done
        };
        let error = match spawn_blocking(step).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => error,
            Err(panicked) => io::Error::other(panicked),
        };
        if let Some(suppressed) = self.quiet.admit() {
            tracing::warn!(suppressed, %error, "receiving a snapshot failed");
        }
        Err(Failure::refused(error))
    }
}

/// Raft's only error of these calls is that it has stopped.
fn stopped<E>(_: E) -> Failure {
    Failure::Stopped
}

#[async_trait]
impl<SM> PeerHandler for RaftHandler<SM>
where
    SM: RaftStateMachine<TypeConfig, SnapshotData = SnapshotData>,
{
    fn members(&self) -> HashSet<NodeId> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().nodes().map(|(id, _)| *id).collect()
    }

    fn append_session(
        &self,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxStream<'static, Result<AppendReply, Failure>> {
        let (lapse, own, promise) = (Arc::clone(&self.lapse), self.id, self.promise.clone());
        // The session ends with a request whose vote is out of the question.
        let sound = move |request: &AppendRequest| {
            let sound = is_plausible(&request.vote, own, promise.term());
            if sound {
                lapse.heard(&request.vote);
            }
            std::future::ready(sound)
        };
        let requests = requests.take_while(sound).boxed();
        self.raft.stream_append(requests).map(|reply| reply.map_err(stopped)).boxed()
    }

    async fn heartbeat(&self, request: AppendRequest) -> Result<HeartbeatReply, Failure> {
        self.check_vote(&request.vote)?;
        self.lapse.heard(&request.vote);
        self.raft.append_entries(request).await.map_err(stopped)
    }

    async fn vote(&self, request: VoteRequest) -> Result<VoteReply, Failure> {
        self.check_kept()?;
        self.check_vote(&request.vote)?;
        self.raft.vote(request).await.map_err(stopped)
    }

    async fn pre_vote(&self, request: VoteRequest) -> Result<VoteReply, Failure> {
        self.check_kept()?;
        self.check_vote(&request.vote)?;
        let candidate = request.vote.leader_id;
        let mut reply = self.raft.pre_vote(request).await.map_err(stopped)?;
        reply.vote_granted &= !self.lapse.was_mistaken(Instant::now());
        // It would be waited for, and with it all that this node does for its cluster.
        reply.vote_granted &= self.promise.held_back(candidate).is_none();
        Ok(reply)
    }

    async fn transfer_leader(&self, request: TransferRequest) -> Result<TransferReply, Failure> {
        self.check_vote(request.from_leader())?;
        self.raft.handle_transfer_leader(request).await.map_err(stopped)
    }

    fn followed(&self) -> Option<Followed> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader.filter(|leader| *leader != metrics.id)?;
        let membership = metrics.membership_config.membership();
        let rpc = membership.get_node(&leader)?.rpc.clone();
        // The highest first: of two candidates of one term, the one with the higher id wins.
        let mut voters: Vec<_> = membership.voter_ids().filter(|id| *id != leader).collect();
        voters.sort_unstable_by_key(|id| std::cmp::Reverse(*id));
        let turn = voters.iter().position(|id| *id == metrics.id);
        Some(Followed {
            node_id: leader,
            rpc,
            vote: metrics.vote,
            turns: voters.len() as u32,
            turn: turn.map(|turn| turn as u32),
        })
    }

    async fn give_up_lease(&self, vote: Vote) {
        self.lapse.begin(vote, Instant::now());
        // What a leader says who makes room for another: to all but that other one it means just this.
        let (leader, last_log_id) = (vote.leader_id.node_id, None);
        let request = TransferRequest::new(vote, leader, last_log_id);
        // An error says that Raft has stopped, and then there is nothing to be done.
        let _ = self.raft.handle_transfer_leader(request).await;
    }

    async fn ask_for_votes(&self) {
        self.promise.await_end_of_leases().await;
        // As above.
        let _ = self.raft.trigger().elect(true).await;
    }

    async fn read_index(&self, follower: NodeId) -> Result<LogId, Failure> {
        let deadline = Instant::now() + self.read_index_timeout;
        match self.gate.read_index_for(follower, deadline).await {
            Some(Ok(log_id)) => Ok(log_id),
            Some(Err(ReadIndexFailure::NotLeader(forward))) => {
                Err(Failure::NotLeader(forward.leader_id))
            }
            Some(Err(ReadIndexFailure::NoQuorum)) | None => Err(Failure::NoQuorum),
            Some(Err(ReadIndexFailure::Fatal(_))) => Err(Failure::Stopped),
        }
    }

    fn confirm(&self, leader: LeaderId, lease: Duration) -> bool {
        self.promise.confirm(leader, lease)
    }

    async fn begin_snapshot(&self, begin: BeginSnapshot) -> Result<SnapshotStep, Failure> {
        self.check_sender(&begin.vote)?;
        if let Some(higher) = self.higher_vote(&begin.vote) {
            return Ok(SnapshotStep::HigherVote(higher));
        }
        let position = self.stage(move |stager| stager.begin(begin.id)).await?;
        Ok(SnapshotStep::Position(position))
    }

    async fn snapshot_chunk(&self, chunk: SnapshotChunk) -> Result<SnapshotStep, Failure> {
        self.check_sender(&chunk.vote)?;
        if let Some(higher) = self.higher_vote(&chunk.vote) {
            return Ok(SnapshotStep::HigherVote(higher));
        }
        let write = move |stager: SnapshotStager| stager.write(chunk.id, chunk.seq, chunk.bytes);
        Ok(SnapshotStep::Position(self.stage(write).await?))
    }

    async fn finish_snapshot(&self, finish: FinishSnapshot) -> Result<Installed, Failure> {
        let FinishSnapshot { vote, id, meta } = finish;
        self.check_sender(&vote)?;
        if let Some(higher) = self.higher_vote(&vote) {
            return Ok(Installed::new(higher));
        }
        // Raft panics on a snapshot that its leader cannot have; a message must not make it.
        if meta.last_log_id.is_some_and(|last| last.leader_id > vote.leader_id) {
            return Err(Failure::refused("the snapshot contradicts its sender's vote"));
        }
        self.check_committed(meta.last_log_id)?;
        let snapshot = self.stage(move |stager| stager.finish(id)).await?;
        if !matches!(&snapshot, SnapshotData::Staged(staged) if staged.meta() == meta) {
            return Err(Failure::refused("the snapshot is not the one that was announced"));
        }
        // Staging took its time.
        self.check_committed(meta.last_log_id)?;
        let installed = self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot });
        installed.await.map_err(stopped)
    }

    fn gives_to(&self, cluster: &ClusterId) -> bool {
        let state = self.reader.ring_view();
        let change = state.change.as_ref();
        *cluster != self.cluster && change.is_some_and(|c| c.outgoing.contains_key(cluster))
    }

    async fn page(&self, request: PageRequest) -> Result<PageReply, Failure> {
        let waiting = self.pages_waiting.try_acquire();
        let _waiting = waiting.map_err(|_| Failure::refused("too many pages are asked for"))?;
        let turn = Arc::clone(&self.page_reads).acquire_owned().await;
        let turn = turn.expect("the semaphore is never closed");
        let reader = self.reader.clone();
        // The turn goes along: a read whose asker has gone is still a read.
        let read = spawn_blocking(move || {
            let page = reader.page(&request);
            drop(turn);
            page
        });
        let error = match read.await {
            Ok(Ok(reply)) => return Ok(reply),
            Ok(Err(error)) => error,
            Err(panicked) => io::Error::other(panicked),
        };
        if let Some(suppressed) = self.quiet.admit() {
            tracing::warn!(suppressed, %error, "reading a page of a handoff failed");
        }
        Err(Failure::refused(error))
    }
}
