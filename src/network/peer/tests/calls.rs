//! Calls reach the right peer, once, and their replies the right caller.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use openraft::errors::RPCError;
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use tokio::time::{Instant, timeout};

use super::support::*;
use crate::config::Config;
use crate::network::peer::closer::CloseReason;
use crate::network::peer::connection::CallError;
use crate::network::peer::greeting::Refusal;
use crate::network::peer::link::ConnectError;
use crate::network::peer::settings::PeerSettings;
use crate::network::peer::wire::*;
use crate::network::peer::{PeerIdentity, Purpose};
use crate::network::raft_network_impl::{PeerNetwork, ReadIndexError};
use crate::store::formation::Formation;
use crate::types::{LeaderId, NodeAddrs, NodeId, TypeConfig, Vote};

const PATIENCE: Duration = Duration::from_secs(5);

#[tokio::test]
async fn every_control_message_is_answered() {
    let node = FakeNode::start(settings()).await;
    let connection = link(&node.addr, Purpose::Control).connection().await.unwrap();
    let request = VoteRequest::new(vote(4), Some(log_id(7)));
    let voted = connection.call(&request, PATIENCE).await.unwrap();
    assert_eq!(voted, VoteReply::new(vote(4), Some(log_id(7)), true));
    let pre_voted = connection.call(&PreVote(request), PATIENCE).await.unwrap();
    assert!(!pre_voted.vote_granted);
    let beat = connection.call(&Heartbeat(append(3, 0, 0)), PATIENCE).await.unwrap();
    assert_eq!(beat, HeartbeatReply::Success);
    let transfer = TransferRequest::new(vote(4), 1, None);
    let transferred = connection.call(&transfer, PATIENCE).await.unwrap();
    assert!(matches!(transferred, Err(TransferRefusal::VoteChanged { .. })));
    let read = connection.call(&ReadIndex, PATIENCE).await;
    assert_eq!(read, Err(CallError::Failed(Failure::NotLeader(Some(3)))));
    node.stop().await;
}

#[tokio::test]
async fn who_does_not_belong_is_refused_by_name() {
    let node = FakeNode::start(settings()).await;
    let stranger = PeerIdentity { cluster: "c2".parse().unwrap(), node_id: 2 };
    let refused = link_from(stranger, &node.addr, Purpose::Append).connection().await;
    let Err(ConnectError::Refused { refusal: Refusal::Cluster { theirs, ours }, .. }) = refused
    else {
        panic!("another cluster's node was not refused as such");
    };
    assert_eq!((theirs.as_str(), ours.as_str()), ("c1", "c2"));
    let namesake = PeerNetwork::new(identity(2), Formation::of(FORMATION + 1), &Config::default());
    let addrs = NodeAddrs { http: String::new(), rpc: node.addr.clone() };
    let refused = namesake.refusal_of(1, &addrs).await.unwrap();
    assert!(refused.contains("initialized apart"), "{refused}");
    namesake.shutdown().await;
    node.stop().await;
}

#[tokio::test]
async fn a_call_of_another_purpose_ends_the_connection() {
    let node = FakeNode::start(settings()).await;
    let connection = link(&node.addr, Purpose::Append).connection().await.unwrap();
    let called = connection.call(&Heartbeat(append(1, 0, 0)), PATIENCE).await;
    assert!(matches!(called, Err(CallError::Closed(_))), "{called:?}");
    assert_eq!(node.fake.begun(), 0);
    node.stop().await;
}

#[tokio::test]
async fn a_call_that_is_not_answered_closes_its_connection_and_the_next_one_works() {
    let node = FakeNode::start(settings()).await;
    node.fake.heartbeats.forget_permits(usize::MAX);
    let link = link(&node.addr, Purpose::Control);
    let first = link.connection().await.unwrap();
    let patience = Duration::from_millis(50);
    let called = first.call(&Heartbeat(append(1, 0, 0)), patience).await;
    assert_eq!(called, Err(CallError::Timeout(patience)));
    assert_eq!(first.closer().reason(), CloseReason::Timeout);
    node.fake.heartbeats.add_permits(1000);
    let second = within("a new connection", link.connection()).await.unwrap();
    second.call(&Heartbeat(append(1, 0, 0)), PATIENCE).await.unwrap();
    node.stop().await;
}

/// openraft drops a heartbeat's future after one interval. The connection must survive a peer that is
/// merely slow, and the late reply must not answer a later call.
#[tokio::test]
async fn an_abandoned_call_disturbs_no_other() {
    let node = FakeNode::start(settings()).await;
    node.fake.heartbeats.forget_permits(usize::MAX);
    let link = link(&node.addr, Purpose::Control);
    let connection = link.connection().await.unwrap();
    for _ in 0..10 {
        let beat = Heartbeat(append(1, 0, 0));
        let call = connection.call(&beat, PATIENCE);
        assert!(timeout(Duration::from_millis(5), call).await.is_err());
    }
    let request = VoteRequest::new(vote(4), None);
    assert!(connection.call(&request, PATIENCE).await.unwrap().vote_granted);
    node.fake.heartbeats.add_permits(1000);
    for term in 5..100 {
        let request = VoteRequest::new(vote(term), None);
        assert_eq!(connection.call(&request, PATIENCE).await.unwrap().vote, vote(term));
    }
    assert!(!connection.closer().is_closed());
    node.stop().await;
}

/// A peer that hangs gets no more calls than may be in flight, however many callers give up on it, and
/// then loses the connection.
#[tokio::test]
async fn abandoned_calls_are_bounded() {
    let short = PeerSettings { reply_timeout: Duration::from_millis(300), ..settings() };
    let node = FakeNode::start(short.clone()).await;
    node.fake.heartbeats.forget_permits(usize::MAX);
    let link = link_with(identity(2), &node.addr, Purpose::Control, short.clone());
    let connection = link.connection().await.unwrap();
    let giving_up = async {
        while !connection.closer().is_closed() {
            let beat = Heartbeat(append(1, 0, 0));
            // Zero is enough to send, and to give up.
            let _ = timeout(Duration::ZERO, connection.call(&beat, PATIENCE)).await;
        }
    };
    within("the connection is closed", giving_up).await;
    assert_eq!(connection.closer().reason(), CloseReason::Timeout);
    assert!(node.fake.begun() <= short.calls_max(Purpose::Control));
    node.stop().await;
}

#[tokio::test]
async fn a_peer_that_comes_back_is_found_again() {
    let node = FakeNode::start(settings()).await;
    let (addr, link) = (node.addr.clone(), link(&node.addr, Purpose::Control));
    let before = link.connection().await.unwrap();
    node.stop().await;
    within("the connection is closed", before.closer().closed()).await;
    assert!(matches!(link.connection().await, Err(ConnectError::Failed { .. })));
    let node = FakeNode::start_at(&addr, settings()).await;
    let after = within("a connection", async {
        loop {
            if let Ok(connection) = link.connection().await {
                return connection;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    after.await.call(&VoteRequest::new(vote(1), None), PATIENCE).await.unwrap();
    node.stop().await;
}

/// Reads that are asked for while a call is on its way share the next one.
#[tokio::test]
async fn read_index_calls_share_rounds() {
    let node = FakeNode::start(settings()).await;
    node.fake.heartbeats.forget_permits(usize::MAX);
    let network = PeerNetwork::new(identity(2), Formation::of(FORMATION), &Config::default());
    let addrs = NodeAddrs { http: String::new(), rpc: node.addr.clone() };
    let deadline = Instant::now() + PATIENCE;
    let first = network.read_index(1, &addrs, deadline);
    tokio::pin!(first);
    assert!(timeout(Duration::from_millis(1), &mut first).await.is_err());
    eventually("the first call", || node.fake.begun() == 1).await;
    let later =
        futures_util::future::join_all((0..100).map(|_| network.read_index(1, &addrs, deadline)));
    let release = async { node.fake.heartbeats.add_permits(1000) };
    let (first, later, ()) = tokio::join!(first, later, release);
    assert_eq!(first, Err(ReadIndexError::NotLeader { leader: Some(3) }));
    assert!(later.iter().all(|read| *read == Err(ReadIndexError::NotLeader { leader: Some(3) })));
    assert_eq!(node.fake.begun(), 2);
    within("the client's tasks end", network.shutdown()).await;
    node.stop().await;
}

#[tokio::test]
async fn a_read_index_keeps_to_its_deadline() {
    let node = FakeNode::start(settings()).await;
    node.fake.heartbeats.forget_permits(usize::MAX);
    let network = PeerNetwork::new(identity(2), Formation::of(FORMATION), &Config::default());
    let addrs = NodeAddrs { http: String::new(), rpc: node.addr.clone() };
    let deadline = Instant::now() + Duration::from_millis(50);
    assert_eq!(network.read_index(1, &addrs, deadline).await, Err(ReadIndexError::Timeout));
    network.shutdown().await;
    assert!(matches!(
        network.read_index(1, &addrs, Instant::now() + PATIENCE).await,
        Err(ReadIndexError::Unavailable(_))
    ));
    node.stop().await;
}

/// A vote in an answer is believed only where an election could have led to it: Raft never goes back to an
/// earlier term.
#[tokio::test]
async fn answers_with_senseless_votes_are_errors() {
    let node = FakeNode::start(settings()).await;
    let addrs = NodeAddrs { http: String::new(), rpc: node.addr.clone() };
    let mut network = PeerNetwork::new(identity(2), Formation::of(FORMATION), &Config::default());
    let mut client = network.new_client(1, &addrs).await;
    let own = vote_of(5, 2);
    let option = || RPCOption::new(Duration::from_secs(5));
    let heartbeat =
        || AppendRequest { vote: own, prev_log_id: None, entries: Vec::new(), leader_commit: None };
    let network_error = |error: RPCError<TypeConfig>| matches!(error, RPCError::Network(_));
    let expected = |is_sound: bool| is_sound.then_some(()).ok_or(true);
    // What is answered, and whether an append, a vote and a pre-vote may be answered so.
    let answers = [
        (vote_of(6, 3), [true, true, true]),
        (vote_of(u64::MAX, 3), [false, false, false]),
        (vote_of(6, 2), [false, false, false]),
        // No refusal, and nobody can know of what was only asked about.
        (own, [false, true, false]),
        (vote_of(4, 3), [false, true, true]),
        // What came before it has broken nothing for good.
        (vote_of(6, 3), [true, true, true]),
    ];
    for (answered, [appends, votes, pre_votes]) in answers {
        *node.fake.answers_vote.lock().unwrap() = Some(answered);
        let heard = client.append_entries(heartbeat(), option()).await;
        assert_eq!(heard.map(drop).map_err(network_error), expected(appends), "{answered}");
        let request = || VoteRequest::new(own, None);
        let voted = client.vote(request(), option()).await;
        assert_eq!(voted.map(drop).map_err(network_error), expected(votes), "{answered}");
        let voted = client.pre_vote(request(), option()).await;
        assert_eq!(voted.map(drop).map_err(network_error), expected(pre_votes), "{answered}");
        let mut append = append(1, 1, 10);
        append.vote = own;
        let requests = stream::iter([append]).boxed();
        let mut replies = client.stream_append(requests, option()).await.unwrap();
        let reply = within("a reply", replies.next()).await.unwrap();
        assert_eq!(reply.map(drop).map_err(network_error), expected(appends), "{answered}");
    }
    network.shutdown().await;
    node.stop().await;
}

fn vote_of(term: u64, node_id: NodeId) -> Vote {
    Vote { leader_id: LeaderId { term, node_id }, committed: true }
}
