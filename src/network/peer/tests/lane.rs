//! Appends reach Raft in the order they were sent in, whatever order they arrive in.

use std::sync::Arc;

use proptest::prelude::*;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::support::*;
use crate::network::peer::closer::Closer;
use crate::network::peer::lane::{Lane, LaneError, Reorder};
use crate::network::peer::wire::{Append, AppendRefusal, Failure};

proptest! {
    #[test]
    fn any_arrival_comes_out_in_order(arrival in Just((0..20u64).collect::<Vec<_>>()).prop_shuffle()) {
        let mut reorder = Reorder::new(20);
        let mut out = Vec::new();
        for sequence in arrival {
            reorder.insert(sequence, sequence).unwrap();
            while let Some(next) = reorder.next() {
                out.push(next);
            }
        }
        prop_assert_eq!(out, (0..20).collect::<Vec<_>>());
    }
}

#[test]
fn a_gap_holds_a_bounded_number_back() {
    let mut reorder = Reorder::new(3);
    for sequence in 1..4 {
        reorder.insert(sequence, ()).unwrap();
        assert_eq!(reorder.next(), None);
    }
    assert_eq!(reorder.insert(4, ()), Err(LaneError::Overflow));
    reorder.insert(0, ()).unwrap();
    assert_eq!(std::iter::from_fn(|| reorder.next()).count(), 4);
}

#[test]
fn a_repeat_is_noticed_before_and_after_its_turn() {
    let mut reorder = Reorder::new(3);
    reorder.insert(1, ()).unwrap();
    assert_eq!(reorder.insert(1, ()), Err(LaneError::Repeated(1)));
    reorder.insert(0, ()).unwrap();
    assert_eq!(reorder.next(), Some(()));
    assert_eq!(reorder.insert(0, ()), Err(LaneError::Repeated(0)));
}

fn lane(node: &FakeNode) -> Lane {
    let closer = Closer::under(&CancellationToken::new());
    let handler: Arc<Fake> = Arc::clone(&node.fake);
    Lane::new(handler, closer, TaskTracker::new(), 32)
}

fn in_session(session: u64, first: u64) -> Append {
    Append { session, request: append(first, 1, 8) }
}

#[tokio::test]
async fn what_follows_a_refusal_is_refused_until_a_new_session() {
    let node = FakeNode::start(settings()).await;
    node.fake.conflict_after.store(1, std::sync::atomic::Ordering::SeqCst);
    let lane = lane(&node);
    // They arrive backwards.
    let later: Vec<_> =
        [4, 3, 2, 1].map(|at| lane.enqueue(at, in_session(7, at + 1)).unwrap()).into();
    let first = lane.enqueue(0, in_session(7, 1)).unwrap();
    assert_eq!(first.await.unwrap(), Ok(Ok(Some(log_id(1)))));
    let mut outcomes = Vec::new();
    for reply in later.into_iter().rev() {
        outcomes.push(reply.await.unwrap());
    }
    assert_eq!(outcomes[0], Ok(Ok(Some(log_id(2)))));
    assert_eq!(outcomes[1], Ok(Err(AppendRefusal::Conflict(log_id(2)))));
    assert_eq!(outcomes[2..], [Err(Failure::SessionEnded), Err(Failure::SessionEnded)]);
    let still_old = lane.enqueue(5, in_session(7, 2)).unwrap();
    assert_eq!(still_old.await.unwrap(), Err(Failure::SessionEnded));
    let new = lane.enqueue(6, in_session(8, 2)).unwrap();
    assert_eq!(new.await.unwrap(), Ok(Ok(Some(log_id(2)))));
    let replaced = lane.enqueue(7, in_session(7, 3)).unwrap();
    assert_eq!(replaced.await.unwrap(), Err(Failure::SessionEnded));
    node.stop().await;
}
