//! `RaftNode` reaches the leader through every fault that leaves one, and whatever it sends twice is one
//! write with one number.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::network::error::Outcome;
use distrib_kv_store::raft_node::{Deleted, RaftNode};
use distrib_kv_store::types::{Condition, Consistency};
use serde_json::json;

mod fake_node;
use fake_node::{FakeNode, Reply, absent, bind, error, not_leader, refusing, start, written};

const KV: &str = "/v1/kv/";

fn client_of(nodes: &[&FakeNode]) -> RaftNode {
    RaftNode::new(nodes.iter().map(|node| node.address.clone()).collect())
}

/// A script that answers the first `times` requests with `first`, then with `then`.
fn at_first(
    times: usize,
    first: Reply,
    then: Reply,
) -> impl Fn(&fake_node::Seen) -> Reply + Send + Sync {
    let count = AtomicUsize::new(0);
    move |_| {
        let early = count.fetch_add(1, Ordering::SeqCst) < times;
        if early { first.clone() } else { then.clone() }
    }
}

#[tokio::test]
async fn a_redirect_is_followed_and_the_leader_remembered() {
    let leader = start(|_| written(7));
    let address = leader.address.clone();
    let follower = start(move |_| not_leader(&address));
    // The leader is not in the list: it is learned.
    let client = client_of(&[&follower]);
    assert_eq!(client.write("k", "v").await.unwrap(), 7);
    assert_eq!(client.write("k", "v").await.unwrap(), 7);
    assert_eq!((follower.seen(KV).len(), leader.seen(KV).len()), (1, 2));
    assert!(client.nodes().contains(&leader.address));
    assert_eq!(leader.seen(KV)[0].headers["kv-routing"], "direct");
}

#[tokio::test]
async fn keys_and_values_arrive_byte_for_byte() {
    let node = start(|_| written(1));
    let client = client_of(&[&node]);
    client.write([0xff, b'/', b'.', b'.', 0, b'%'], [0u8, 0xfe]).await.unwrap();
    client.write("..", "").await.unwrap();
    let seen = node.seen(KV);
    assert_eq!(seen[0].path, "/v1/kv/%FF%2F..%00%25");
    assert_eq!(seen[0].body, Bytes::from_static(&[0, 0xfe]));
    assert_eq!(seen[1].path, "/v1/kv/%2E%2E");
}

#[tokio::test]
async fn a_node_that_is_down_is_passed_by() {
    let node = start(|_| written(3));
    let client = RaftNode::new(vec![refusing(), node.address.clone(), refusing()]);
    for _ in 0..3 {
        assert_eq!(client.write("k", "v").await.unwrap(), 3);
    }
    assert_eq!(node.seen(KV).len(), 3);
}

/// A node that says that it cannot serve is asked last for a while, as one that does not answer is: otherwise
/// every third read that any node can serve would begin there, and pause.
#[tokio::test]
async fn reads_go_past_a_node_that_cannot_serve() {
    for (status, code) in [(500, "STORAGE"), (503, "NOT_INITIALIZED"), (503, "STOPPING")] {
        let sick = start(move |_| error(status, code, "not_applied"));
        let value = || Reply::Value(1, Bytes::from_static(b"v"));
        let (one, two) = (start(move |_| value()), start(move |_| value()));
        let client = client_of(&[&sick, &one, &two]);
        for consistency in [Consistency::Stale, Consistency::LinearizableOnFollower] {
            for _ in 0..15 {
                assert!(client.get("k", consistency).await.unwrap().is_some());
            }
        }
        assert_eq!(sick.seen(KV).len(), 1, "{code}");
        assert_eq!(one.seen(KV).len() + two.seen(KV).len(), 30, "{code}");
    }
}

#[tokio::test]
async fn a_cluster_that_is_down_is_reported_soon_with_all_that_was_tried() {
    let nodes = vec![refusing(), refusing()];
    let begun = Instant::now();
    let error = RaftNode::new(nodes.clone()).write("k", "v").await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(error.outcome(), Outcome::NotApplied);
    assert!(error.is_retryable());
    let ClientError::Unreachable { tried } = error else { panic!("{error}") };
    assert!(nodes.iter().all(|node| tried.iter().any(|text| text.contains(node))), "{tried:?}");
}

/// Whatever leaves a write in doubt.
fn doubts() -> [Reply; 6] {
    [
        Reply::Close,
        Reply::Hang,
        Reply::Text(502, "<html>"),
        error(503, "NO_LEADER", "unknown"),
        error(504, "TIMEOUT", "unknown"),
        error(500, "STORAGE", "unknown"),
    ]
}

#[tokio::test]
async fn a_write_in_doubt_is_repeated_with_its_number_until_the_deadline() {
    // All at once, because each takes until its deadline.
    futures_util::future::join_all(doubts().map(|reply| async move {
        let told = format!("{reply:?}");
        let again = reply.clone();
        let (a, b) = (start(move |_| reply.clone()), start(move |_| again.clone()));
        let client = client_of(&[&a, &b]).with_timeout(Duration::from_secs(3));
        let error = client.write("k", "v").await.unwrap_err();
        assert_eq!(error.outcome(), Outcome::Unknown, "{told}: {error}");
        assert!(!error.is_retryable(), "{told}");
        assert!(!a.seen(KV).is_empty() && !b.seen(KV).is_empty(), "{told}");
        let sent: Vec<_> = a.seen(KV).iter().chain(&b.seen(KV)).map(|seen| seen.once()).collect();
        assert!(sent.iter().all(|once| *once == sent[0] && once.1 == 1), "{told}: {sent:?}");
    }))
    .await;
}

#[tokio::test]
async fn a_write_in_doubt_is_answered_by_its_repeat() {
    for reply in doubts() {
        let told = format!("{reply:?}");
        let doubtful = start(at_first(1, reply.clone(), written(7)));
        let client = client_of(&[&doubtful]).with_timeout(Duration::from_secs(4));
        assert_eq!(client.write("k", "v").await.unwrap(), 7, "{told}");
        let doubtful = start(at_first(1, reply, Reply::Condition(Some(7))));
        let client = client_of(&[&doubtful]).with_timeout(Duration::from_secs(4));
        let error = client.write_if("k", "v", Condition::Revision(6)).await.unwrap_err();
        assert_eq!(error, ClientError::ConditionFailed { current: Some(7) }, "{told}");
    }
}

/// Another node with a lower limit says of the repeat that it did nothing, and knows nothing of the
/// first attempt.
#[tokio::test]
async fn a_refused_repeat_does_not_end_the_doubt() {
    let doubtful = start(at_first(1, Reply::Close, error(413, "TOO_LARGE", "not_applied")));
    let error = client_of(&[&doubtful]).write("k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::AnswerLost { .. }), "{error}");
}

/// The floor follows the answers, and numbers are never used again.
#[tokio::test]
async fn each_write_has_a_number_and_tells_which_are_done() {
    let node = start(|seen| match seen.path.as_str() {
        "/v1/kv/stuck" => Reply::Hang,
        _ => written(1),
    });
    let client = client_of(&[&node]);
    client.write("k", "v").await.unwrap();
    let stuck = tokio::spawn({
        let client = client.clone();
        async move { client.write("stuck", "v").await }
    });
    wait_until("the stuck write is out", || node.seen("/v1/kv/stuck").len() == 1).await;
    client.clone().write("k", "v").await.unwrap();
    stuck.abort();
    assert!(stuck.await.unwrap_err().is_cancelled());
    client.delete("k").await.unwrap_err();
    let numbers: Vec<_> = node.seen("/v1/kv/k").iter().map(|seen| seen.once()).collect();
    let (names, numbers): (Vec<_>, Vec<_>) =
        numbers.into_iter().map(|(name, seq, floor)| (name, (seq, floor))).unzip();
    assert_eq!(numbers[..3], [(1, 1), (3, 2), (4, 4)]);
    assert!(names.iter().all(|name| *name == names[0]));
    let other = client_of(&[&node]);
    other.write("other", "v").await.unwrap();
    assert_ne!(node.seen("/v1/kv/other")[0].once().0, names[0]);
}

#[tokio::test]
async fn a_read_is_repeated_at_another_node() {
    for reply in [Reply::Close, Reply::Hang, error(500, "STORAGE", "not_applied")] {
        let told = format!("{reply:?}");
        let bad = start(move |_| reply.clone());
        let good = start(|_| Reply::Value(5, Bytes::from_static(b"v")));
        for _ in 0..2 {
            // A fresh client each time, and the bad node first.
            let client = client_of(&[&bad, &good]).with_timeout(Duration::from_secs(4));
            let value = client.consistent_read("k").await.unwrap();
            assert_eq!(value, Some(Bytes::from_static(b"v")), "{told}");
            assert_eq!(client.read("k").await.unwrap(), value, "{told}");
        }
        assert!(!bad.seen(KV).is_empty(), "{told}: the bad node was asked");
    }
}

#[tokio::test]
async fn pauses_of_the_cluster_are_waited_out_with_growing_pauses() {
    for code in ["NO_LEADER", "FROZEN", "OVERLOADED"] {
        let node = start(at_first(5, error(503, code, "not_applied"), written(9)));
        let begun = Instant::now();
        assert_eq!(client_of(&[&node]).write("k", "v").await.unwrap(), 9, "{code}");
        assert_eq!(node.seen(KV).len(), 6, "{code}");
        // Halves of 20, 40, 80, 160 and 320 ms.
        assert!(begun.elapsed() >= Duration::from_millis(310), "{code}: {:?}", begun.elapsed());
    }
}

/// A key that is frozen, or a place that is not free, says nothing about who leads: other calls go on to the
/// leader, while this one asks another node, too.
#[tokio::test]
async fn a_refusal_for_a_moment_does_not_cost_others_the_leader() {
    for code in ["FROZEN", "OVERLOADED"] {
        let (leader, follower) = (bind(), bind());
        let leads = leader.address.clone();
        let follower = follower.serve(move |_| not_leader(&leads));
        let busy = AtomicUsize::new(0);
        let leader = leader.serve(move |seen| match seen.path.ends_with("busy") {
            true if busy.fetch_add(1, Ordering::SeqCst) < 3 => error(503, code, "not_applied"),
            _ => written(9),
        });
        let client = client_of(&[&leader, &follower]);
        assert_eq!(client.write("k", "v").await.unwrap(), 9);
        let asked = follower.seen(KV).len();
        let refused = tokio::spawn({
            let client = client.clone();
            async move { client.write("busy", "v").await }
        });
        for refusals in 1..=3 {
            while leader.seen("/v1/kv/busy").len() < refusals {
                assert!(!refused.is_finished(), "{code}: it gave up");
                tokio::task::yield_now().await;
            }
            // The refusal arrives meanwhile, and the call pauses for longer. As many as there are nodes, because
            // without a leader they are asked by turns.
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                assert_eq!(client.write("k", "v").await.unwrap(), 9);
            }
        }
        assert_eq!(refused.await.unwrap().unwrap(), 9, "{code}");
        let seen = follower.seen(KV);
        assert_eq!(seen.len(), asked + 3, "{code}: once after each refusal");
        assert!(seen[asked..].iter().all(|seen| seen.path.ends_with("busy")), "{code}");
    }
}

#[tokio::test]
async fn a_pause_beyond_the_deadline_ends_with_nothing_done() {
    let node = start(|_| error(503, "FROZEN", "not_applied"));
    let client = client_of(&[&node]).with_timeout(Duration::from_secs(1));
    let error = client.write("k", "v").await.unwrap_err();
    assert!(
        matches!(&error, ClientError::Timeout { last, .. } if last.contains("FROZEN")),
        "{error}"
    );
    assert_eq!(error.outcome(), Outcome::NotApplied);
}

/// A leader that serves one write and is paused then, a node that leads after it, and their client.
async fn paused_leader(timeout: Duration) -> (FakeNode, FakeNode, RaftNode) {
    let paused = start(at_first(1, written(3), Reply::Hang));
    let next = start(|_| written(4));
    let client = client_of(&[&paused, &next]).with_timeout(timeout);
    assert_eq!(client.write("k", "v").await.unwrap(), 3);
    (paused, next, client)
}

#[tokio::test]
async fn a_paused_leader_costs_one_attempt_and_no_more() {
    let (paused, next, client) = paused_leader(Duration::from_secs(3)).await;
    assert_eq!(client.write("k", "v").await.unwrap(), 4);
    assert_eq!(next.seen(KV)[0].once(), paused.seen(KV)[1].once());
    for _ in 0..10 {
        assert_eq!(client.write("k", "v").await.unwrap(), 4);
        assert!(client.read("k").await.is_err(), "the script has no values");
    }
    assert_eq!((paused.seen(KV).len(), next.seen(KV).len()), (2, 21));
}

#[tokio::test]
async fn writes_go_elsewhere_while_the_leader_keeps_one_waiting() {
    let (paused, _next, client) = paused_leader(Duration::from_secs(60)).await;
    let stuck = tokio::spawn({
        let client = client.clone();
        async move { client.write("stuck", "v").await }
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    // A call that is dropped teaches the client nothing: only the stuck one can.
    let impatient = Duration::from_millis(50);
    while !matches!(tokio::time::timeout(impatient, client.write("k", "v")).await, Ok(Ok(4))) {
        assert!(Instant::now() < deadline, "no write came through");
    }
    assert_eq!(paused.seen("/v1/kv/stuck").len(), 1);
    assert!(!stuck.is_finished());
    stuck.abort();
}

#[tokio::test]
async fn a_thousand_calls_share_a_bounded_number_of_connections() {
    let node = start(|seen| match seen.path.as_str() {
        "/cluster/metrics" => fake_node::metrics("c", "h:1"),
        _ => written(1),
    });
    let client = client_of(&[&node]);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..1000 {
        let client = client.clone();
        calls.spawn(async move { client.write("k", "v").await });
    }
    while let Some(done) = calls.join_next().await {
        assert_eq!(done.unwrap().unwrap(), 1);
    }
    // Four in flight, and the pool may open one while another becomes free.
    assert!(node.connections() <= 8, "{}", node.connections());
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..1000 {
        let client = client.clone();
        calls.spawn(async move { client.metrics().await });
    }
    while let Some(done) = calls.join_next().await {
        done.unwrap().unwrap();
    }
    // Requests of their own: 128 in flight, and as above.
    assert!(node.connections() <= 264, "{}", node.connections());
}

/// Three values of this size fill a request.
static LARGE: [u8; 300 << 10] = [7; 300 << 10];

#[tokio::test]
async fn calls_that_get_no_turn_at_a_paused_leader_go_elsewhere() {
    let (paused, next) = (start(|_| Reply::Hang), start(|_| written(4)));
    let client = client_of(&[&paused, &next]).with_timeout(Duration::from_secs(60));
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..150 {
        let client = client.clone();
        calls.spawn(async move { client.write("k", &LARGE).await });
    }
    while let Some(result) = calls.join_next().await {
        assert_eq!(result.unwrap().unwrap(), 4);
    }
    // What had a turn at the paused leader was repeated; what had none went to the other at once.
    assert!(paused.seen(KV).len() <= 12, "{}", paused.seen(KV).len());
}

async fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn assert_no_turn(error: &ClientError, node: &FakeNode) {
    assert!(
        matches!(error, ClientError::TooManyInFlight { address, .. } if *address == node.address),
        "{error}"
    );
    assert_eq!((error.outcome(), error.is_retryable()), (Outcome::NotApplied, true));
}

#[tokio::test]
async fn a_call_without_a_turn_says_so_and_not_that_the_node_is_gone() {
    let node = start(|_| Reply::Hang);
    let client = client_of(&[&node]).with_timeout(Duration::from_secs(60));
    let hasty = client.clone().with_timeout(Duration::from_millis(200));
    let mut stuck = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let client = client.clone();
        stuck.spawn(async move { client.write("k", &LARGE).await.map(drop) });
    }
    wait_until("four full batches have arrived", || node.seen(KV).len() >= 12).await;
    assert_no_turn(&hasty.write("hasty", "v").await.unwrap_err(), &node);
    assert!(node.seen("/v1/kv/hasty").is_empty());
    for _ in 0..128 {
        let (client, address) = (client.clone(), node.address.clone());
        stuck.spawn(async move { client.metrics_of(&address).await.map(drop) });
    }
    let asked = || node.seen("/cluster/metrics").len();
    wait_until("the questions have arrived", || asked() >= 128).await;
    let before = asked();
    assert_no_turn(&hasty.metrics_of(&node.address).await.unwrap_err(), &node);
    assert_eq!(asked(), before);
}

#[tokio::test]
async fn a_silent_node_is_reported_with_the_time_that_it_was_waited_for() {
    let node = start(|_| Reply::Hang);
    let client = client_of(&[&node]).with_timeout(Duration::from_millis(300));
    let begun = Instant::now();
    let error = client.metrics_of(&node.address).await.unwrap_err();
    let ClientError::Timeout { waited, .. } = error else { panic!("{error}") };
    assert!(waited <= begun.elapsed(), "{waited:?} of {:?}", begun.elapsed());
}

#[tokio::test]
async fn nodes_that_name_each_other_end_with_an_error() {
    let (a, b) = (fake_node::bind(), fake_node::bind());
    let (to_a, to_b) = (a.address.clone(), b.address.clone());
    let (a, b) = (a.serve(move |_| not_leader(&to_b)), b.serve(move |_| not_leader(&to_a)));
    let error = client_of(&[&a, &b]).write("k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::TooManyRedirects { .. }), "{error}");
    assert_eq!(error.outcome(), Outcome::NotApplied);
    assert!(a.seen(KV).len() + b.seen(KV).len() < 20);
}

#[tokio::test]
async fn a_dead_leader_is_not_hammered_until_its_followers_notice() {
    let dead = refusing();
    let new = start(|_| written(2));
    let (stale, address) = (dead.clone(), new.address.clone());
    let follower = start(at_first(4, not_leader(&stale), not_leader(&address)));
    let client = RaftNode::new(vec![follower.address.clone(), dead]);
    let begun = Instant::now();
    assert_eq!(client.write("k", "v").await.unwrap(), 2);
    assert!(begun.elapsed() >= Duration::from_millis(70), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_cluster_that_was_never_formed_is_reported_at_once() {
    let script = |_: &fake_node::Seen| error(503, "NOT_INITIALIZED", "not_applied");
    let (a, b) = (start(script), start(script));
    let error = client_of(&[&a, &b]).read("k").await.unwrap_err();
    let told = error.to_string();
    assert!(
        matches!(error, ClientError::Server { code, .. } if code == "NOT_INITIALIZED"),
        "{told}"
    );
    assert_eq!(a.seen(KV).len() + b.seen(KV).len(), 2);
}

#[tokio::test]
async fn an_empty_value_an_absent_key_and_a_failed_condition_are_three_things() {
    let empty = start(|_| Reply::Value(1, Bytes::new()));
    assert_eq!(client_of(&[&empty]).read("k").await.unwrap(), Some(Bytes::new()));
    let none = start(|_| absent());
    assert_eq!(client_of(&[&none]).consistent_read("k").await.unwrap(), None);
    let changed = start(|_| Reply::Condition(Some(8)));
    let error =
        client_of(&[&changed]).write_if("k", "v", Condition::Revision(7)).await.unwrap_err();
    assert_eq!(error, ClientError::ConditionFailed { current: Some(8) });
    assert_eq!(changed.seen(KV)[0].headers["if-match"], "\"7\"");
    let gone = start(|_| Reply::Condition(None));
    let error = client_of(&[&gone]).delete_if("k", Condition::Revision(7)).await.unwrap_err();
    assert_eq!(error, ClientError::ConditionFailed { current: None });
}

#[tokio::test]
async fn what_is_not_a_node_is_told_apart_from_an_absent_key() {
    let stranger = start(|_| Reply::Text(404, "no such page"));
    let error = client_of(&[&stranger]).read("k").await.unwrap_err();
    assert!(matches!(error, ClientError::Garbled { .. }), "{error}");
    let greeter = start(|_| Reply::Text(200, "hello"));
    let error = client_of(&[&greeter]).write("k", "v").await.unwrap_err();
    assert_eq!(error.outcome(), Outcome::Unknown, "{error}");
}

#[tokio::test]
async fn deletes_say_whether_there_was_something() {
    let node = start(|_| Reply::Json(200, json!({"revision": 6, "deleted": false})));
    let done = client_of(&[&node]).delete("k").await.unwrap();
    assert_eq!(done, Deleted { revision: 6, deleted: false });
    assert_eq!(node.seen(KV)[0].method, "DELETE");
}

#[tokio::test]
async fn init_asks_the_first_node_and_no_other() {
    let second = start(|_| Reply::Json(200, json!({})));
    let client = RaftNode::new(vec![refusing(), second.address.clone()]);
    let error = client.init().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    assert!(second.seen("/").is_empty());
    client_of(&[&second]).init().await.unwrap();
    assert_eq!(second.seen("/cluster/init")[0].body, "{}");
    client_of(&[&second]).init_awaiting_ring().await.unwrap();
    assert_eq!(second.seen("/cluster/init")[1].body, r#"{"awaits_ring":true}"#);
}

#[tokio::test]
async fn management_goes_to_the_leader_in_the_contracts_shapes() {
    let leader = start(|_| Reply::Json(200, json!({})));
    let address = leader.address.clone();
    let follower = start(move |_| not_leader(&address));
    let client = client_of(&[&follower]);
    client.add_learner(2, "h:1", "r:1").await.unwrap();
    client.change_membership(&[3, 1, 2]).await.unwrap();
    client.update_hash_ring(&fake_node::ring(1, vec![])).await.unwrap();
    assert_eq!(leader.seen("/cluster/add-learner")[0].body, r#"[2,"h:1","r:1"]"#);
    assert_eq!(leader.seen("/cluster/change-membership")[0].body, "[1,2,3]");
    assert_eq!(leader.seen("/cluster/update-hash-ring").len(), 1);
}

#[tokio::test]
async fn management_that_may_have_arrived_never_claims_that_nothing_was_done() {
    // The second is what a leader says that is still busy with the first attempt.
    for (status, code) in [(503, "NO_LEADER"), (409, "CONFLICT")] {
        let node = start(at_first(1, Reply::Close, error(status, code, "not_applied")));
        let client = client_of(&[&node]).with_timeout(Duration::from_secs(2));
        let error = client.change_membership(&[1]).await.unwrap_err();
        assert_eq!(error.outcome(), Outcome::Unknown, "{error}");
    }
}

#[tokio::test]
async fn metrics_come_from_any_node_that_answers() {
    let node = start(|seen| fake_node::metrics("c7", &seen.path));
    let client = RaftNode::new(vec![refusing(), node.address.clone()]);
    assert_eq!(client.metrics().await.unwrap().cluster.as_str(), "c7");
    assert_eq!(client.metrics_of(&node.address).await.unwrap().id, 1);
    assert!(client.metrics_of(&refusing()).await.is_err());
}
