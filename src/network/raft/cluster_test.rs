//! A cluster of real nodes (openraft, RocksDB, sockets) replicates, survives a lost leader, lets
//! followers serve linearizable reads, and brings a new node up by snapshot. A leader that has ended is
//! succeeded at once, and none that lives is deposed by one node alone.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{Raft, SnapshotPolicy};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::deathwatch::Deathwatch;
use super::handler::RaftHandler;
use super::{PeerIdentity, PeerServer};
use crate::config::Config;
use crate::network::peer::closer::CloseReason;
use crate::network::peer::handler::PeerHandler;
use crate::network::peer::settings::PeerSettings;
use crate::network::peer::wire::{
    AppendRequest, BeginSnapshot, Failure, FinishSnapshot, Installed, SnapshotChunk, SnapshotStep,
    TransferRequest, VoteRequest,
};
use crate::network::raft_network_impl::PeerNetwork;
use crate::proposer::{ProposeError, Proposer};
use crate::read_gate::{ReadGate, Voters};
use crate::store::formation::{BeforeRing, Founding};
use crate::store::snapshot::SnapshotData;
use crate::store::state_machine::StateMachine;
use crate::store::{LEASE_MAX, Store, StoreOptions};
use crate::types::{
    Command, Condition, LeaderId, LogId, NodeAddrs, NodeId, SnapshotMeta, TypeConfig, Vote, Write,
};
use crate::writes::Writes;

struct TestNode {
    id: NodeId,
    addrs: NodeAddrs,
    raft: Raft<TypeConfig, StateMachine>,
    network: PeerNetwork,
    server: PeerServer,
    handler: Arc<RaftHandler<StateMachine>>,
    store: Store,
    gate: JoinHandle<()>,
    shutdown: CancellationToken,
}

/// For how long who was heard is not deposed. Several heartbeats.
const LEASE: Duration = Duration::from_secs(2);

/// For elections to be a matter of time, in milliseconds, and of more than a busy machine may
/// stall.
const SOON: Range<u64> = 2000..4000;

/// For them not to be.
const NEVER: Range<u64> = 600_000..1_200_000;

impl TestNode {
    async fn start(dir: &Path, id: NodeId, election_timeout: Range<u64>) -> Self {
        Self::start_with_lease(dir, id, election_timeout, Duration::ZERO).await
    }

    async fn start_with_lease(
        dir: &Path,
        id: NodeId,
        election_timeout: Range<u64>,
        lease: Duration,
    ) -> Self {
        let config = Config::default();
        let identity = PeerIdentity { cluster: "c1".parse().unwrap(), node_id: id };
        let store = Store::open(&StoreOptions {
            dir: dir.join(id.to_string()),
            node_id: id,
            cluster: identity.cluster.clone(),
            storage: config.storage.clone(),
            raft: config.raft.clone(),
            open_files_max: 64,
        })
        .unwrap();
        let raft_config = openraft::Config {
            heartbeat_interval: 100,
            election_timeout_min: election_timeout.start,
            election_timeout_max: election_timeout.end,
            enable_pre_vote: Some(true),
            max_payload_entries: 1024,
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: 0,
            ..Default::default()
        };
        let raft_config = Arc::new(raft_config.validate().unwrap());
        let network = PeerNetwork::new(identity.clone(), store.formation(), &config);
        let machine = store.state_machine();
        let raft = Raft::new(id, raft_config, network.clone(), store.log(), machine).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let rpc = listener.local_addr().unwrap().to_string();
        let shutdown = CancellationToken::new();
        let voters = Voters { own: store.promise(), peers: network.clone() };
        let (gate, gate_task) = ReadGate::spawn(raft.clone(), store.reader(), voters, lease);
        let timeout = Duration::from_secs(1);
        let handler = RaftHandler::new(&identity, raft.clone(), &store, gate, timeout, LEASE);
        let handler = Arc::new(handler);
        let (formation, settings) = (store.formation(), Arc::new(PeerSettings::new(&config)));
        let (handles, token) = (handler.clone(), shutdown.clone());
        let server =
            PeerServer::serve_handler(listener, identity, formation, handles, settings, token);
        let addrs = NodeAddrs { http: String::new(), rpc };
        Self { id, addrs, raft, network, server, handler, store, gate: gate_task, shutdown }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.server.join().await;
        self.raft.shutdown().await.unwrap();
        self.network.shutdown().await;
        drop((self.raft, self.network, self.handler));
        self.gate.await.unwrap();
        self.store.close().unwrap();
    }
}

/// Three nodes.
async fn cluster(dir: &Path, election_timeout: Range<u64>) -> Vec<TestNode> {
    let mut nodes = Vec::new();
    for id in 1..=3 {
        nodes.push(TestNode::start(dir, id, election_timeout.clone()).await);
    }
    form(&nodes).await;
    nodes
}

async fn form(nodes: &[TestNode]) {
    let first = &nodes[0];
    first.store.formation().join(Founding::draw(BeforeRing::Serves)).unwrap();
    first.raft.initialize(BTreeMap::from([(first.id, first.addrs.clone())])).await.unwrap();
    let leads = first.raft.wait(Some(Duration::from_secs(20)));
    leads.current_leader(first.id, "it is alone").await.unwrap();
    // Its membership is committed then, and may be changed.
    write(first, 0).await;
    for node in &nodes[1..] {
        first.raft.add_learner(node.id, node.addrs.clone(), true).await.unwrap();
    }
    let voters: BTreeSet<_> = nodes.iter().map(|node| node.id).collect();
    first.raft.change_membership(voters, false).await.unwrap();
}

fn put(n: u64, bytes: usize) -> Command {
    let value = Bytes::from(vec![n as u8; bytes]);
    let writes = [Write::put(n.to_string().into(), value, Condition::Always)];
    Command::Write(Writes::new(0, &writes))
}

/// All but the leader, once they follow it.
async fn followers(nodes: &[TestNode], leader: usize) -> Vec<&TestNode> {
    let leader = nodes[leader].id;
    let followers: Vec<_> = nodes.iter().filter(|node| node.id != leader).collect();
    for node in &followers {
        let following = node.raft.wait(Some(Duration::from_secs(20)));
        following.current_leader(leader, "the first").await.unwrap();
    }
    followers
}

/// A write by a node that must lead.
async fn write(node: &TestNode, n: u64) {
    let writing = node.raft.client_write(put(n, 10));
    let written = tokio::time::timeout(Duration::from_secs(20), writing).await;
    written.expect("it does not lead").expect("it does not lead");
}

/// What a leader with this vote does that has this image, but with another announcement.
async fn send_snapshot(
    handler: &RaftHandler<StateMachine>,
    vote: Vote,
    image: &SnapshotData,
    meta: SnapshotMeta,
) -> Result<Installed, Failure> {
    let SnapshotData::Image(image) = image else { panic!("a sender has an image") };
    let id = image.id();
    let begin = BeginSnapshot { vote, id, meta: meta.clone() };
    let mut step = handler.begin_snapshot(begin).await?;
    loop {
        let SnapshotStep::Position(position) = step else { panic!("{step:?}") };
        if position.complete {
            break;
        }
        let bytes = image.read_chunk(&position.cursor, 1 << 20).unwrap().bytes;
        let chunk = SnapshotChunk { vote, id, seq: position.next_seq, bytes };
        step = handler.snapshot_chunk(chunk).await?;
    }
    handler.finish_snapshot(FinishSnapshot { vote, id, meta }).await
}

async fn leader(nodes: &[TestNode]) -> usize {
    leader_within(Duration::from_secs(20), nodes).await.expect("there is no leader")
}

async fn leader_within(time: Duration, nodes: &[TestNode]) -> Option<usize> {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        for (at, node) in nodes.iter().enumerate() {
            // A fresh leader refuses writes until a majority has answered it.
            if node.raft.is_leader() && node.raft.client_write(put(0, 10)).await.is_ok() {
                return Some(at);
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cluster_replicates_fails_over_and_brings_a_node_up_by_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = cluster(dir.path(), SOON).await;
    let first = leader(&nodes).await;

    let writes = (0..5000).map(|n| {
        let raft = nodes[first].raft.clone();
        async move { raft.client_write(put(n, 1000)).await.unwrap().log_id }
    });
    let written = futures_util::future::join_all(writes).await;
    let last = *written.iter().max().unwrap();
    for node in &nodes {
        let applied = node.raft.wait(Some(Duration::from_secs(20)));
        applied.applied_index_at_least(Some(last.index), "all").await.unwrap();
    }

    // A follower learns up to where it must apply.
    let follower = &nodes[(first + 1) % 3];
    let deadline = Instant::now() + Duration::from_secs(5);
    let (id, addrs) = (nodes[first].id, &nodes[first].addrs);
    let index = follower.network.read_index(id, addrs, deadline).await.unwrap();
    assert!(index >= last);

    // The leader goes; the others elect one and go on.
    nodes.remove(first).stop().await;
    let second = leader(&nodes).await;
    for n in 0..100 {
        nodes[second].raft.client_write(put(n, 10)).await.unwrap();
    }

    // A new node gets what the log no longer has.
    let raft = nodes[second].raft.clone();
    raft.trigger().snapshot().await.unwrap();
    let built = raft.wait(Some(Duration::from_secs(20)));
    let built = built.metrics(|metrics| metrics.snapshot.is_some(), "built").await.unwrap();
    let at = built.snapshot.unwrap();
    raft.trigger().purge_log(at.index).await.unwrap();
    raft.wait(Some(Duration::from_secs(20))).purged(Some(at), "purged").await.unwrap();
    let newcomer = TestNode::start(dir.path(), 4, SOON).await;
    raft.add_learner(4, newcomer.addrs.clone(), true).await.unwrap();
    let members: BTreeSet<_> = nodes.iter().map(|n| n.id).chain([4]).collect();
    raft.change_membership(members, false).await.unwrap();
    nodes.push(newcomer);
    let last = raft.client_write(put(1, 10)).await.unwrap().log_id;
    for node in &nodes {
        let applied = node.raft.wait(Some(Duration::from_secs(20)));
        applied.applied_index_at_least(Some(last.index), "all").await.unwrap();
        assert_eq!(node.store.reader().key_count().unwrap(), 5000);
    }
    drop(raft);
    for node in nodes {
        node.stop().await;
    }
}

/// On a machine that is busy enough the followers do not find the same in time, and the timeout decides: not always,
/// as it would without them.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_that_has_ended_is_succeeded_without_waiting_for_a_timeout() {
    for _ in 0..8 {
        if is_succeeded_at_once().await {
            return;
        }
    }
    panic!("nobody ever leads");
}

async fn is_succeeded_at_once() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = cluster(dir.path(), NEVER).await;
    let first = leader(&nodes).await;
    for n in 0..50 {
        nodes[first].raft.client_write(put(n, 10)).await.unwrap();
    }
    // Everyone follows, so everyone has a connection of the leader's.
    followers(&nodes, first).await;
    nodes.remove(first).stop().await;
    let next = leader_within(Duration::from_secs(4), &nodes).await;
    for node in nodes {
        node.stop().await;
    }
    next.is_some()
}

/// Who would be elected at once is not as long as the leader may answer reads without asking.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_else_leads_during_a_lease() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = Vec::new();
    for id in 1..=3 {
        nodes.push(TestNode::start_with_lease(dir.path(), id, NEVER, LEASE_MAX).await);
    }
    form(&nodes).await;
    let lead = &nodes[leader(&nodes).await];
    let vote = lead.raft.metrics().borrow_watched().vote;
    let others: Vec<_> = nodes.iter().filter(|node| node.id != lead.id).collect();
    // By the newest membership, which all have to know first.
    let index = lead.raft.metrics().borrow_watched().last_log_index;
    for node in &others {
        node.handler.followed().expect("they follow");
        let applied = node.raft.wait(Some(Duration::from_secs(20)));
        applied.applied_index_at_least(index, "all").await.unwrap();
    }
    let promise = lead.store.promise();
    let deadline = Instant::now() + Duration::from_secs(20);
    // A round's lease may be there only after its answer: then the next one finds it, and it is older than that.
    let mut asked = Instant::now();
    loop {
        let now = Instant::now();
        lead.handler.read_index(others[0].id).await.unwrap();
        if promise.leads_alone() == Some(vote.leader_id) {
            break;
        }
        assert!(now < deadline, "there is no lease");
        asked = now;
    }
    for node in &others {
        node.handler.give_up_lease(vote).await;
    }
    while !others.iter().any(|node| node.raft.is_leader()) {
        assert!(Instant::now() < deadline, "nobody else leads after it");
        // Whoever gave the lease refuses until it is over.
        others[0].handler.ask_for_votes().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(asked.elapsed() >= LEASE_MAX * 9 / 10, "{:?}", asked.elapsed());
    assert_eq!(promise.leads_alone(), None);
    for node in nodes {
        node.stop().await;
    }
}

/// Reads need nothing of the core, and would keep a leader in office for ever that sends no heartbeat and takes no
/// write, if each of them could get it a lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_whose_core_stands_still_is_succeeded_while_it_is_read_from() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = Vec::new();
    for id in 1..=3 {
        nodes.push(TestNode::start_with_lease(dir.path(), id, SOON, LEASE_MAX).await);
    }
    form(&nodes).await;
    let first = leader(&nodes).await;
    let lead = &nodes[first];
    let others = followers(&nodes, first).await;
    let vote = lead.raft.metrics().borrow_watched().vote;
    let promise = lead.store.promise();
    let deadline = Instant::now() + Duration::from_secs(30);
    while promise.leads_alone().is_none() {
        // May fail: whoever has just been heard of for the first time confirms nobody.
        let _ = lead.handler.read_index(others[0].id).await;
        assert!(Instant::now() < deadline, "a core that goes on gets a lease");
    }

    let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
    let stands_still = move |_: &_| tokio::task::block_in_place(|| goes_on.recv().unwrap_err());
    let raft = lead.raft.clone();
    let standing = tokio::spawn(async move { raft.with_raft_state(stands_still).await });
    while !others.iter().any(|node| node.raft.is_leader()) {
        assert!(Instant::now() < deadline, "nobody else leads");
        let read = lead.handler.read_index(others[0].id).await;
        if read.is_ok() && promise.leads_alone().is_some() {
            // As when the first of them does not answer within a millisecond, and all are asked.
            for node in &others {
                node.handler.confirm(vote.leader_id, LEASE_MAX);
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(go_on);
    standing.await.unwrap().unwrap();
    for node in nodes {
        node.stop().await;
    }
}

/// Nothing ends a core that panicked in what it reported last: it leads there for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_read_is_vouched_for_by_a_core_that_panicked() {
    let dir = tempfile::tempdir().unwrap();
    let node = TestNode::start(dir.path(), 1, NEVER).await;
    form(std::slice::from_ref(&node)).await;
    node.handler.read_index(2).await.unwrap();
    node.raft.with_raft_state(|_| -> () { panic!("as if by a defect") }).await.unwrap_err();
    assert!(node.raft.is_leader(), "as far as it has reported");
    assert_eq!(node.handler.read_index(2).await, Err(Failure::Stopped));
    node.stop().await;
}

/// Nobody asks a node for its vote that never followed anyone, unless it did and has lost that.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_without_data_votes_for_nobody_and_confirms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let blank = TestNode::start(dir.path(), 2, NEVER).await;
    let candidate = LeaderId { term: 3, node_id: 1 };
    let vote = Vote { leader_id: candidate, committed: false };
    let last = LogId { leader_id: LeaderId { term: 2, node_id: 1 }, index: 9 };
    let request = VoteRequest::new(vote, Some(last));
    assert!(blank.handler.pre_vote(request.clone()).await.is_err());
    assert!(blank.handler.vote(request.clone()).await.is_err());
    assert!(!blank.handler.confirm(candidate, LEASE_MAX));
    assert!(blank.store.promise().is_none());

    // It follows a leader: from then on it knows what it promised.
    let leader = Vote { leader_id: LeaderId { term: 2, node_id: 1 }, committed: true };
    let heartbeat =
        AppendRequest { vote: leader, prev_log_id: None, entries: Vec::new(), leader_commit: None };
    blank.handler.heartbeat(heartbeat).await.unwrap();
    assert!(blank.handler.confirm(leader.leader_id, Duration::ZERO));
    assert!(blank.handler.vote(request).await.is_ok());
    blank.stop().await;
}

/// What no peer sends must neither end Raft, nor spoil its terms for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn votes_and_snapshots_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = cluster(dir.path(), NEVER).await;
    let lead = leader(&nodes).await;
    write(&nodes[lead], 1).await;
    let follower = followers(&nodes, lead).await[0];
    let handler = &follower.handler;
    let before = follower.raft.metrics().borrow_watched().vote;
    let vote_of =
        |term, node_id, committed| Vote { leader_id: LeaderId { term, node_id }, committed };
    let last = LogId { leader_id: LeaderId { term: u64::MAX, node_id: 9 }, index: u64::MAX };
    for vote in [vote_of(u64::MAX, 9, false), vote_of(5, follower.id, false)] {
        let mut request = VoteRequest::new(vote, Some(last));
        request.leadership_transfer = true;
        assert!(handler.vote(request.clone()).await.is_err());
        assert!(handler.pre_vote(request).await.is_err());
        let transfer = TransferRequest::new(vote, follower.id, None);
        assert!(handler.transfer_leader(transfer).await.is_err());
    }

    // The leader's own vote, which every follower knows.
    let own = nodes[lead].raft.metrics().borrow_watched().vote;
    let heartbeat =
        AppendRequest { vote: own, prev_log_id: None, entries: Vec::new(), leader_commit: None };
    assert!(nodes[lead].handler.heartbeat(heartbeat).await.is_err());

    // A snapshot of a later leader that ends before what is committed, and one that ends elsewhere than it says.
    let vote = vote_of(before.leader_id.term + 1, 9, true);
    let raft = &nodes[lead].raft;
    raft.trigger().snapshot().await.unwrap();
    let built = raft.wait(Some(Duration::from_secs(20)));
    built.metrics(|metrics| metrics.snapshot.is_some(), "built").await.unwrap();
    let image = raft.get_snapshot().await.unwrap().unwrap().snapshot;
    for index in [0, u64::MAX] {
        let meta = SnapshotMeta {
            last_log_id: Some(LogId { leader_id: vote.leader_id, index }),
            ..SnapshotMeta::default()
        };
        assert!(send_snapshot(handler, vote, &image, meta).await.is_err());
    }
    assert_eq!(follower.raft.metrics().borrow_watched().vote, before);
    write(&nodes[lead], 2).await;
    for node in nodes {
        node.stop().await;
    }
}

/// As when a firewall refuses connections between one of them and the leader, and then another.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nodes_that_take_the_leader_for_ended_one_at_a_time_depose_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = cluster(dir.path(), NEVER).await;
    let first = leader(&nodes).await;
    let lead = &nodes[first];
    let before = lead.raft.metrics().borrow_watched().vote;
    for node in followers(&nodes, first).await {
        let followed = node.handler.followed().unwrap();
        assert_eq!((followed.node_id, followed.vote), (lead.id, before));
        assert!(followed.turns == 2 && followed.turn.is_some_and(|turn| turn < 2));
        for n in 0..5 {
            node.handler.give_up_lease(followed.vote).await;
            node.handler.ask_for_votes().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            write(lead, n).await;
        }
        // Until what was given up has been mended by a leader that is heard.
        tokio::time::sleep(LEASE + Duration::from_millis(200)).await;
        write(lead, 9).await;
        lead.raft.trigger().heartbeat().await.unwrap();
        tokio::time::sleep(LEASE / 4).await;
    }
    assert_eq!(lead.raft.metrics().borrow_watched().vote, before);
    for node in nodes {
        node.stop().await;
    }
}

/// Connections break for many reasons; only a refusal tells of the process's end.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_that_lost_its_connections_and_listens_is_not_deposed() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = cluster(dir.path(), NEVER).await;
    let first = leader(&nodes).await;
    let lead = &nodes[first];
    let before = lead.raft.metrics().borrow_watched().vote;
    let followers = followers(&nodes, first).await;
    for node in &followers {
        let deathwatch = Deathwatch::new(node.handler.clone());
        deathwatch.connection_ended(lead.id, &CloseReason::PeerClosed).await;
    }
    for node in &followers {
        node.handler.ask_for_votes().await;
    }
    write(lead, 1).await;
    assert_eq!(lead.raft.metrics().borrow_watched().vote, before);
    for node in nodes {
        node.stop().await;
    }
}

/// What a deposed leader had on its way may never be answered. What waits behind it, or comes now, must not wait
/// for that: it was told only at its deadline that it was not proposed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_waits_at_a_deposed_leader_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = cluster(dir.path(), NEVER).await;
    let first = leader(&nodes).await;
    let lead = nodes.remove(first);
    let successor = nodes[0].id;
    for node in nodes {
        node.stop().await;
    }
    let (proposer, task) = Proposer::spawn(lead.raft.clone(), lead.store.reader());
    let far = Instant::now() + Duration::from_secs(600);
    let propose = |n: u64| {
        let write = Write::put(n.to_string().into(), Bytes::new(), Condition::Always);
        let proposer = proposer.clone();
        tokio::spawn(async move { proposer.propose(vec![write], far).await.remove(0) })
    };
    // Two entries are on their way at once, and the third write waits.
    let before = lead.raft.metrics().borrow_watched().last_log_index.unwrap();
    let log_grows = async |entries: u64| {
        let wait = lead.raft.wait(Some(Duration::from_secs(20)));
        wait.log_index_at_least(Some(before + entries), "proposed").await.unwrap();
    };
    let stuck = [propose(1), {
        log_grows(1).await;
        propose(2)
    }];
    log_grows(2).await;
    let waits = propose(3);

    let vote = lead.raft.metrics().borrow_watched().vote;
    let term = vote.leader_id.term + 1;
    let vote = Vote { leader_id: LeaderId { term, node_id: successor }, committed: true };
    let heartbeat = AppendRequest { vote, prev_log_id: None, entries: vec![], leader_commit: None };
    lead.raft.append_entries(heartbeat).await.unwrap();
    for refused in [waits, propose(4)] {
        let refused = tokio::time::timeout(Duration::from_secs(20), refused).await;
        let Err(ProposeError::Raft(error)) = refused.expect("at once").unwrap() else {
            panic!("it was not proposed")
        };
        let leader = error.forward_to_leader().expect("another one leads").leader_id;
        assert_eq!(leader, Some(successor));
    }
    assert!(stuck.iter().all(|stuck| !stuck.is_finished()), "nobody knows of those yet");
    drop(proposer);
    lead.stop().await;
    for stuck in stuck {
        assert!(stuck.await.unwrap().is_err());
    }
    task.await.unwrap();
}
