//! A node whose Raft is a fake, and what tests need around it.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use openraft::EntryPayload;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::handoff::{Cursor, Page, PageRequest};
use crate::network::peer::greeting::Hello;
use crate::network::peer::handler::{Followed, PeerHandler};
use crate::network::peer::link::{Link, LinkContext};
use crate::network::peer::settings::PeerSettings;
use crate::network::peer::thrift::Thrift;
use crate::network::peer::wire::*;
use crate::network::peer::{PeerIdentity, Purpose};
use crate::network::raft::PeerServer;
use crate::store::formation::Formation;
use crate::store::snapshot::StagingPosition;
use crate::types::{ClusterId, Command, Condition, Entry, LeaderId, LogId, NodeId, Vote, Write};
use crate::writes::Writes;

/// What all nodes of these tests belong to.
pub(super) const FORMATION: u64 = 5;

pub(super) fn hello(purpose: Purpose, sender: NodeId) -> Hello {
    let formation = Formation::of(FORMATION).founding();
    let (sender, target) = (identity(sender), identity(1));
    Hello { purpose, sender, target, formation, is_voter: true }
}

/// A node of a cluster that the fakes' cluster, c1, may give keys to: c2 is one.
pub(super) fn foreign(cluster: &str, node_id: NodeId) -> PeerIdentity {
    PeerIdentity { cluster: cluster.parse().unwrap(), node_id }
}

pub(super) fn identity(node_id: NodeId) -> PeerIdentity {
    PeerIdentity { cluster: "c1".parse().unwrap(), node_id }
}

pub(super) fn log_id(index: u64) -> LogId {
    LogId { leader_id: LeaderId { term: 1, node_id: 1 }, index }
}

pub(super) fn vote(term: u64) -> Vote {
    Vote { leader_id: LeaderId { term, node_id: 1 }, committed: true }
}

/// An append of the entries `first..first + count`, each with a value of `value_bytes`.
pub(super) fn append(first: u64, count: u64, value_bytes: usize) -> AppendRequest {
    let entry = |index| {
        let value = Bytes::from(vec![7; value_bytes]);
        let put = Write::put("k".into(), value, Condition::Always);
        let command = Command::Write(Writes::new(0, &[put]));
        Entry { log_id: log_id(index), payload: EntryPayload::Normal(command) }
    };
    AppendRequest {
        vote: vote(1),
        prev_log_id: first.checked_sub(1).map(log_id),
        entries: (first..first + count).map(entry).collect(),
        leader_commit: None,
    }
}

pub(super) fn settings() -> PeerSettings {
    PeerSettings {
        frame_bytes_max: 1 << 20,
        frame_timeout: Duration::from_secs(1),
        greeting_timeout: Duration::from_millis(500),
        connect_timeout: Duration::from_secs(5),
        reply_timeout: Duration::from_secs(5),
        ..PeerSettings::new(&Config::default())
    }
}

/// Waits until `condition` holds, for at most ten seconds.
pub(super) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within(what, waiting).await;
}

pub(super) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(10), future).await {
        Ok(done) => done,
        Err(_) => panic!("took too long: {what}"),
    }
}

/// An append that reached the fake: the index before it and its number of entries.
type Appended = (Option<u64>, usize);

type OnPage = Box<dyn FnMut(&PageRequest) -> Result<PageReply, Failure> + Send>;

type OnChunk = Box<dyn FnMut(u64) + Send>;

/// A stand-in for Raft.
pub(super) struct Fake {
    /// Calls of any kind that have begun.
    pub(super) begun: AtomicUsize,
    /// A heartbeat takes one of these, and hangs while there are none.
    pub(super) heartbeats: Semaphore,
    /// An append's reply takes one of these.
    pub(super) append_replies: Arc<Semaphore>,
    /// Every append, in the order in which it came.
    pub(super) appended: Arc<Mutex<Vec<Appended>>>,
    /// Appends after this index conflict.
    pub(super) conflict_after: Arc<AtomicU64>,
    /// The vote that is answered instead of what was asked for, if any.
    pub(super) answers_vote: Arc<Mutex<Option<Vote>>>,
    /// Up to where an append is said to match instead of all of it, if anything.
    pub(super) answers_match: Arc<Mutex<Option<LogId>>>,
    pub(super) staging: Mutex<Staging>,
    /// A page takes one of these.
    pub(super) pages: Semaphore,
    /// Every request for a page, as it came.
    pub(super) page_requests: Mutex<Vec<PageRequest>>,
    /// What is answered.
    pub(super) on_page: Mutex<OnPage>,
    /// Called before a chunk is answered, with its sequence.
    pub(super) on_chunk: Mutex<Option<OnChunk>>,
}

/// A stand-in for the stager: the cursor is the next sequence in decimal.
#[derive(Default)]
pub(super) struct Staging {
    pub(super) id: Option<u64>,
    pub(super) chunks: VecDeque<Bytes>,
    pub(super) chunks_wanted: u64,
    pub(super) writes: u64,
    pub(super) higher_vote: Option<Vote>,
    /// Answered instead of the right one: to the beginning, and to any chunk.
    pub(super) cursors: Option<[Bytes; 2]>,
}

impl Staging {
    fn step(&self) -> SnapshotStep {
        if let Some(higher) = self.higher_vote {
            return SnapshotStep::HigherVote(higher);
        }
        let next_seq = self.chunks.len() as u64;
        let cursor = match &self.cursors {
            Some(cursors) => cursors[usize::from(next_seq > 0)].clone(),
            None => Bytes::from(next_seq.to_string()),
        };
        let complete = next_seq == self.chunks_wanted;
        SnapshotStep::Position(StagingPosition { next_seq, cursor, complete })
    }
}

impl Fake {
    fn new() -> Self {
        Self {
            begun: AtomicUsize::new(0),
            heartbeats: Semaphore::new(Semaphore::MAX_PERMITS),
            append_replies: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
            appended: Arc::default(),
            conflict_after: Arc::new(AtomicU64::new(u64::MAX)),
            answers_vote: Arc::default(),
            answers_match: Arc::default(),
            staging: Mutex::default(),
            pages: Semaphore::new(Semaphore::MAX_PERMITS),
            page_requests: Mutex::default(),
            on_page: Mutex::new(Box::new(|request| Ok(Ok(page_after(request))))),
            on_chunk: Mutex::default(),
        }
    }

    pub(super) fn begun(&self) -> usize {
        self.begun.load(Ordering::SeqCst)
    }

    fn answered_vote(&self) -> Option<Vote> {
        *self.answers_vote.lock().unwrap()
    }

    fn begin(&self) {
        self.begun.fetch_add(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl PeerHandler for Fake {
    /// All nodes of these tests except those that are strangers on purpose.
    fn members(&self) -> HashSet<NodeId> {
        (1..100).collect()
    }

    fn append_session(
        &self,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxStream<'static, Result<AppendReply, Failure>> {
        let (appended, replies) = (Arc::clone(&self.appended), Arc::clone(&self.append_replies));
        let conflict_after = Arc::clone(&self.conflict_after);
        let answers_vote = Arc::clone(&self.answers_vote);
        let answers_match = Arc::clone(&self.answers_match);
        // Takes requests ahead of replies, as Raft does.
        let taken = requests.map(move |request| {
            let prev = request.prev_log_id.map(|id| id.index);
            appended.lock().unwrap().push((prev, request.entries.len()));
            request
        });
        let answers = taken.map(move |request| {
            let (replies, conflict_after) = (Arc::clone(&replies), Arc::clone(&conflict_after));
            let answered_vote = *answers_vote.lock().unwrap();
            let answered_match = *answers_match.lock().unwrap();
            async move {
                replies.acquire().await.unwrap().forget();
                if let Some(vote) = answered_vote {
                    return Ok(Err(AppendRefusal::HigherVote(vote)));
                }
                if answered_match.is_some() {
                    return Ok(Ok(answered_match));
                }
                let prev = request.prev_log_id;
                let limit = conflict_after.load(Ordering::SeqCst);
                if let Some(prev) = prev.filter(|prev| prev.index > limit) {
                    return Ok(Err(AppendRefusal::Conflict(prev)));
                }
                Ok(Ok(request.entries.last().map(|entry| entry.log_id).or(prev)))
            }
        });
        answers.buffered(1000).boxed()
    }

    async fn heartbeat(&self, _: AppendRequest) -> Result<HeartbeatReply, Failure> {
        self.begin();
        self.heartbeats.acquire().await.unwrap().forget();
        Ok(self.answered_vote().map_or(HeartbeatReply::Success, HeartbeatReply::HigherVote))
    }

    async fn vote(&self, request: VoteRequest) -> Result<VoteReply, Failure> {
        self.begin();
        let vote = self.answered_vote().unwrap_or(request.vote);
        Ok(VoteReply::new(vote, request.last_log_id, true))
    }

    async fn pre_vote(&self, request: VoteRequest) -> Result<VoteReply, Failure> {
        self.begin();
        Ok(VoteReply::new(self.answered_vote().unwrap_or(request.vote), None, false))
    }

    async fn transfer_leader(&self, request: TransferRequest) -> Result<TransferReply, Failure> {
        self.begin();
        let expected = *request.from_leader();
        Ok(Err(TransferRefusal::VoteChanged { expected, actual: vote(9) }))
    }

    fn followed(&self) -> Option<Followed> {
        None
    }

    async fn give_up_lease(&self, _: Vote) {}

    async fn ask_for_votes(&self) {}

    async fn read_index(&self, _: NodeId) -> Result<LogId, Failure> {
        self.begin();
        self.heartbeats.acquire().await.unwrap().forget();
        Err(Failure::NotLeader(Some(3)))
    }

    fn confirm(&self, leader: LeaderId, _: Duration) -> bool {
        self.begin();
        leader.term < 10
    }

    async fn begin_snapshot(&self, begin: BeginSnapshot) -> Result<SnapshotStep, Failure> {
        let mut staging = self.staging.lock().unwrap();
        if staging.id != Some(begin.id) {
            staging.id = Some(begin.id);
            staging.chunks.clear();
        }
        Ok(staging.step())
    }

    async fn snapshot_chunk(&self, chunk: SnapshotChunk) -> Result<SnapshotStep, Failure> {
        let step = {
            let mut staging = self.staging.lock().unwrap();
            staging.writes += 1;
            if chunk.seq != staging.chunks.len() as u64 || staging.id != Some(chunk.id) {
                return Err(Failure::refused("not the next chunk"));
            }
            staging.chunks.push_back(chunk.bytes);
            staging.step()
        };
        if let Some(on_chunk) = self.on_chunk.lock().unwrap().as_mut() {
            on_chunk(chunk.seq);
        }
        Ok(step)
    }

    async fn finish_snapshot(&self, finish: FinishSnapshot) -> Result<Installed, Failure> {
        Ok(Installed::new(finish.vote))
    }

    fn gives_to(&self, cluster: &ClusterId) -> bool {
        cluster.as_str() == "c2"
    }

    async fn page(&self, request: PageRequest) -> Result<PageReply, Failure> {
        self.begin();
        self.page_requests.lock().unwrap().push(request.clone());
        self.pages.acquire().await.unwrap().forget();
        (self.on_page.lock().unwrap())(&request)
    }
}

/// A page with one record, which ends behind the request's cursor.
pub(super) fn page_after(request: &PageRequest) -> Page {
    let position = match request.cursor {
        Cursor::Changes { position } => position + 1,
        _ => 1,
    };
    let record = (Bytes::from_static(b"k"), Some(Bytes::from_static(b"v")));
    Page {
        to: Cursor::Changes { position },
        end: position,
        records: vec![record],
        answers: Vec::new(),
    }
}

/// A listening node.
pub(super) struct FakeNode {
    pub(super) addr: String,
    pub(super) fake: Arc<Fake>,
    server: PeerServer,
    shutdown: CancellationToken,
}

impl FakeNode {
    pub(super) async fn start(settings: PeerSettings) -> Self {
        Self::start_at("127.0.0.1:0", settings).await
    }

    pub(super) async fn start_at(addr: &str, settings: PeerSettings) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let (fake, shutdown) = (Arc::new(Fake::new()), CancellationToken::new());
        let handler: Arc<dyn PeerHandler> = fake.clone();
        let (formation, token) = (Formation::of(FORMATION), shutdown.clone());
        let server = PeerServer::serve_handler(
            listener,
            identity(1),
            formation,
            handler,
            settings.into(),
            token,
        );
        Self { addr, fake, server, shutdown }
    }

    pub(super) async fn stop(self) {
        self.shutdown.cancel();
        within("the server's tasks end", self.server.join()).await;
    }
}

/// A link from `own` to node 1.
pub(super) fn link_from(own: PeerIdentity, addr: &str, purpose: Purpose) -> Arc<Link> {
    link_with(own, addr, purpose, settings())
}

pub(super) fn link_with(
    own: PeerIdentity,
    addr: &str,
    purpose: Purpose,
    settings: PeerSettings,
) -> Arc<Link> {
    let thrift = Thrift::new(own.node_id, Duration::ZERO);
    link_among(own, addr, purpose, settings, thrift.into())
}

pub(super) fn link_among(
    own: PeerIdentity,
    addr: &str,
    purpose: Purpose,
    settings: PeerSettings,
    thrift: Arc<Thrift>,
) -> Arc<Link> {
    let context = LinkContext {
        identity: own,
        formation: Formation::of(FORMATION),
        settings: Arc::new(settings),
        shutdown: CancellationToken::new(),
        tracker: TaskTracker::new(),
        quiet: Arc::default(),
        thrift,
    };
    Arc::new(Link::new(context, identity(1), addr.to_owned(), purpose))
}

pub(super) fn link(addr: &str, purpose: Purpose) -> Arc<Link> {
    link_from(identity(2), addr, purpose)
}
