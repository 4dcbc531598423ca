//! A follower that no majority needs waits for its entries, a moment, and only while that costs nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::support::*;
use crate::network::peer::Purpose;
use crate::network::peer::link::Link;
use crate::network::peer::pipeline::append_stream;
use crate::network::peer::settings::PeerSettings;
use crate::network::peer::thrift::{Seat, Thrift};
use crate::network::peer::wire::AppendRequest;
use crate::types::{Membership, NodeAddrs, NodeId, StoredMembership};

const PAUSE: Duration = Duration::from_millis(4);
const FOR_EVER: Duration = Duration::from_secs(3600);
const FAST: Duration = Duration::from_micros(100);

/// The followers of node 2, in a membership of `configs` and the learner 9.
fn followers(pause: Duration, configs: &[&[NodeId]]) -> Arc<Thrift> {
    let thrift = Thrift::new(2, pause);
    let sets: Vec<BTreeSet<NodeId>> =
        configs.iter().map(|ids| ids.iter().copied().collect()).collect();
    let nodes = sets.iter().flatten().copied().chain([9]).map(|id| (id, NodeAddrs::default()));
    let membership = Membership::new(sets.clone(), nodes.collect::<BTreeMap<_, _>>()).unwrap();
    let membership = Arc::new(StoredMembership::new(None, membership));
    thrift.know_members(Box::new(move || Arc::clone(&membership)));
    Arc::new(thrift)
}

/// A follower that has answered.
fn seated(thrift: &Arc<Thrift>, id: NodeId) -> Seat {
    let seat = thrift.seat(id);
    seat.appended(Some(log_id(0)), Some(FAST), false);
    seat
}

/// Follower 3, which has more than any other is sent: without it, the others are no spares.
fn far_ahead(thrift: &Arc<Thrift>) -> Seat {
    let seat = seated(thrift, 3);
    seat.appended(Some(log_id(5000)), Some(FAST), false);
    seat
}

fn spares(seats: &[Seat]) -> Vec<bool> {
    seats.iter().map(|seat| seat.pause(Instant::now()).is_some()).collect()
}

#[test]
fn as_many_as_a_majority_needs_are_no_spares() {
    let three = followers(PAUSE, &[&[1, 2, 3]]);
    assert_eq!(spares(&[1, 3].map(|id| seated(&three, id))), [false, true]);
    let five = followers(PAUSE, &[&[1, 2, 3, 4, 5]]);
    assert_eq!(spares(&[5, 4, 3, 1].map(|id| seated(&five, id))), [false, false, true, true]);
    // One that has said nothing yet stands for nobody, and one that is not counted waits for nothing.
    let silent = three.seat(1);
    assert_eq!(
        (silent.pause(Instant::now()), seated(&three, 3).pause(Instant::now())),
        (None, None)
    );
    // A leader that is no voter itself needs one more.
    let others = followers(PAUSE, &[&[1, 3, 4]]);
    assert_eq!(spares(&[1, 3, 4].map(|id| seated(&others, id))), [false, false, true]);
}

#[test]
fn in_doubt_nobody_waits() {
    for thrift in [
        followers(PAUSE, &[&[1, 2, 3], &[1, 2, 4]]),
        followers(Duration::ZERO, &[&[1, 2, 3]]),
        Arc::new(Thrift::new(2, PAUSE)),
    ] {
        assert_eq!(spares(&[1, 3].map(|id| seated(&thrift, id))), [false, false]);
    }
    let thrift = followers(PAUSE, &[&[1, 2, 3]]);
    let seats = [9, 1, 9].map(|id| seated(&thrift, id));
    assert_eq!(spares(&seats), [false, false, false], "a learner does not count");
}

#[tokio::test]
async fn spares_go_before_one_that_owes_an_answer() {
    let thrift = followers(PAUSE, &[&[1, 2, 3, 4, 5]]);
    let seats = [1, 3, 4, 5].map(|id| seated(&thrift, id));
    assert_eq!(spares(&seats), [false, false, true, true]);
    seats[0].overdue(Instant::now());
    within("it is told", seats[2].moved()).await;
    assert_eq!(spares(&seats), [true, false, false, true]);
    seats[2].overdue(Instant::now());
    assert_eq!(spares(&seats), [true, false, true, false], "who was moved last comes last");
    // A learner that is late is nobody's business.
    let learner = seated(&thrift, 9);
    learner.overdue(Instant::now());
    assert!(seats[0].moved().now_or_never().is_none());
    // Where there is no spare, nothing changes.
    let alone = followers(PAUSE, &[&[1, 2, 3]]);
    let seat = seated(&alone, 1);
    seat.overdue(Instant::now());
    assert_eq!(seat.pause(Instant::now()), None);
}

#[test]
fn who_is_late_or_behind_makes_nobody_a_spare() {
    let thrift = followers(PAUSE, &[&[1, 2, 3]]);
    let seats = [1, 3].map(|id| seated(&thrift, id));
    seats[1].overdue(Instant::now());
    seats[0].overdue(Instant::now());
    assert_eq!(spares(&seats), [false, false], "neither is in time");
    seats[0].appended(Some(log_id(0)), Some(FAST), false);
    assert_eq!(spares(&seats), [false, true], "whatever the order");
    seats[1].appended(Some(log_id(0)), Some(FAST), false);
    assert_eq!(spares(&seats), [true, false]);
    // One that is catching up is quick to answer, but not what is asked for.
    seats[0].appended(Some(log_id(7)), Some(FAST), false);
    assert_eq!(spares(&seats), [false, false]);
    seats[1].appended(Some(log_id(7)), Some(FAST), false);
    assert_eq!(spares(&seats), [true, false]);
}

#[tokio::test]
async fn while_this_node_is_slow_nobody_is_a_spare() {
    let thrift = followers(PAUSE, &[&[1, 2, 3]]);
    let seats = [1, 3].map(|id| seated(&thrift, id));
    let now = Instant::now();
    seats[0].uncommitted(Some(log_id(1)), now);
    assert_eq!(seats[1].pause(now), Some(PAUSE), "no majority has it");
    seats[0].uncommitted(Some(log_id(0)), now);
    within("the spare is told", seats[1].moved()).await;
    assert_eq!(seats[1].pause(now + 5 * PAUSE), None);
    assert_eq!(seats[1].pause(now + 20 * PAUSE), Some(PAUSE), "for a while");
}

#[test]
fn a_spare_that_is_twice_as_fast_takes_the_place() {
    let thrift = followers(PAUSE, &[&[1, 2, 3]]);
    let seats = [1, 3].map(|id| thrift.seat(id));
    let answer = |seat: &Seat, took: Duration| {
        // Of many answers, the fastest tells.
        (0..200).for_each(|n| seat.appended(Some(log_id(0)), Some(took + n % 10 * PAUSE), false));
    };
    answer(&seats[0], 3 * FAST);
    answer(&seats[1], 2 * FAST);
    assert_eq!(spares(&seats), [false, true], "a little faster is not enough");
    // What brings no entries waits for no disk.
    (0..200).for_each(|_| seats[1].appended(Some(log_id(0)), None, false));
    assert_eq!(spares(&seats), [false, true], "it says nothing about entries");
    answer(&seats[1], FAST);
    assert!(seats[1].moved().now_or_never().is_some(), "it is told");
    assert_eq!(spares(&seats), [true, false]);
}

#[tokio::test]
async fn when_a_session_ends_the_others_are_told() {
    let thrift = followers(PAUSE, &[&[1, 2, 3]]);
    let first = seated(&thrift, 1);
    let second = seated(&thrift, 3);
    assert!(second.pause(Instant::now()).is_some() && second.moved().now_or_never().is_none());
    drop(first);
    within("the spare is told", second.moved()).await;
    assert_eq!(second.pause(Instant::now()), None);
}

/// A link from node 2 to node 1.
fn append_link(addr: &str, thrift: &Arc<Thrift>) -> Arc<Link> {
    link_among(identity(2), addr, Purpose::Append, settings(), Arc::clone(thrift))
}

/// Entry `n`, when all before it are committed.
fn entry(n: u64) -> AppendRequest {
    AppendRequest { leader_commit: n.checked_sub(1).map(log_id), ..append(n, 1, 10) }
}

/// Replies to entry 0, which makes it a follower, and then to as many of `entries` as it is sent.
fn append_replies(link: Arc<Link>, entries: u64) -> BoxStream<'static, Option<u64>> {
    let (answered, first) = oneshot::channel();
    let rest = stream::once(first).map(move |_| stream::iter((1..=entries).map(entry)));
    let input = stream::iter([append(0, 1, 10)]).chain(rest.flatten()).boxed();
    let mut answered = Some(answered);
    let replies = append_stream(link, input).map(move |reply| {
        // Tells the input, which is gone with the stream.
        answered.take().map(|answered| answered.send(()));
        reply.unwrap().unwrap().map(|last| last.index)
    });
    replies.boxed()
}

#[tokio::test]
async fn a_spare_is_sent_entries_when_its_pause_is_over() {
    let node = FakeNode::start(settings()).await;
    let thrift = followers(PAUSE, &[&[1, 2, 3]]);
    let preferred = far_ahead(&thrift);
    let start = Instant::now();
    let replies = append_replies(append_link(&node.addr, &thrift), 20).count();
    assert_eq!(within("all replies", replies).await, 21);
    // Each but the last holds up the next.
    assert!(start.elapsed() >= 19 * PAUSE, "{:?}", start.elapsed());
    drop(preferred);
    node.stop().await;
}

#[tokio::test]
async fn what_a_spare_was_not_sent_goes_out_when_it_is_needed() {
    let node = FakeNode::start(settings()).await;
    let thrift = followers(FOR_EVER, &[&[1, 2, 3]]);
    let preferred = far_ahead(&thrift);
    let mut replies = append_replies(append_link(&node.addr, &thrift), 1000);
    assert_eq!(within("a reply", replies.next()).await, Some(Some(0)));
    assert_eq!(within("a reply", replies.next()).await, Some(Some(1)));
    let sent = || node.fake.appended.lock().unwrap().len();
    assert!(timeout(20 * PAUSE, replies.next()).await.is_err(), "it waits");
    assert_eq!(sent(), 2);
    // A read on it needs what there is, once, but nothing of it is held back.
    thrift.hurry(1);
    assert_eq!(within("a reply", replies.next()).await, Some(Some(2)));
    assert!(timeout(20 * PAUSE, replies.next()).await.is_err(), "it waits again");
    assert_eq!(sent(), 3);
    // The other is gone: this one makes the majority now.
    drop(preferred);
    assert_eq!(within("all replies", replies.count()).await, 998);
    node.stop().await;
}

#[tokio::test]
async fn one_that_owes_an_answer_is_overtaken() {
    let node = FakeNode::start(settings()).await;
    node.fake.append_replies.forget_permits(usize::MAX);
    node.fake.append_replies.add_permits(1);
    let thrift = followers(FOR_EVER, &[&[1, 2, 3]]);
    let mut replies = append_replies(append_link(&node.addr, &thrift), 1);
    assert_eq!(within("a reply", replies.next()).await, Some(Some(0)));
    let other = seated(&thrift, 3);
    assert_eq!(other.pause(Instant::now()), Some(FOR_EVER));
    tokio::select! {
        _ = replies.next() => panic!("a reply that was not given"),
        () = within("the other is told", other.moved()) => {}
    }
    assert_eq!(other.pause(Instant::now()), None);
    node.fake.append_replies.add_permits(1);
    assert_eq!(within("a late reply", replies.next()).await, Some(Some(1)));
    node.stop().await;
}

/// Two followers answer, and the leader's own disk does not: they must both have every entry at once.
#[tokio::test]
async fn entries_that_are_answered_and_not_committed_go_to_everyone() {
    let node = FakeNode::start(settings()).await;
    let thrift = followers(Duration::from_secs(60), &[&[1, 2, 3]]);
    let uncommitted = stream::iter([append(0, 1, 10)]).chain(stream::pending()).boxed();
    let mut replies = append_stream(append_link(&node.addr, &thrift), uncommitted);
    within("a reply", replies.next()).await.unwrap().unwrap().unwrap();
    let other = seated(&thrift, 3);
    assert!(other.pause(Instant::now()).is_some());
    tokio::select! {
        _ = replies.next() => panic!("a reply to nothing"),
        () = within("the other is told", other.moved()) => {}
    }
    assert_eq!(other.pause(Instant::now()), None);
    node.stop().await;
}

#[tokio::test]
async fn a_spare_that_lags_by_more_than_a_request_does_not_wait() {
    let node = FakeNode::start(settings()).await;
    let thrift = followers(FOR_EVER, &[&[1, 2, 3]]);
    let preferred = far_ahead(&thrift);
    let settings = PeerSettings { append_entries_max: 1, ..settings() };
    let link = link_among(identity(2), &node.addr, Purpose::Append, settings, thrift);
    assert_eq!(within("all replies", append_replies(link, 20).count()).await, 21);
    drop(preferred);
    node.stop().await;
}
