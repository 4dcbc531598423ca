//! A caller that leaves takes its operation along, and the bounds hold: below what a fake node can see.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tokio::net::TcpListener;

use super::*;

const LONG: Duration = Duration::from_secs(60);

fn get(key: &'static str) -> Arc<Operation> {
    Arc::new(Operation::Get { key: key.into() })
}

/// A node that takes connections and says nothing, and a courier.
async fn silent_node() -> (TcpListener, String, Courier) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address, Courier::default())
}

fn poll_once(future: std::pin::Pin<&mut impl Future>) {
    let poll = future.poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(poll, Poll::Pending));
}

#[tokio::test]
async fn an_operation_leaves_the_queue_together_with_its_caller() {
    let (_listener, address, courier) = silent_node().await;
    let deadline = Instant::now() + LONG;
    let lane = courier.lane(&address, Class::StaleRead);
    {
        let mut carried = pin!(courier.carry(
            &address,
            Class::StaleRead,
            get("k"),
            Instant::now(),
            deadline,
            || ()
        ));
        poll_once(carried.as_mut());
        // The carrier has been started, and has not run yet.
        assert_eq!(lane.queue().waiting(), 1);
    }
    assert_eq!(lane.queue().waiting(), 0);
}

#[tokio::test]
async fn room_is_free_again_when_the_permit_is_dropped() {
    let courier = Courier::default();
    let now = Instant::now();
    let value = Bytes::from(vec![0; ROOM_BYTES]);
    let huge = Operation::Put { key: "k".into(), value, condition: Default::default(), seq: None };
    let all = courier.room_for(&huge, now).await.unwrap();
    assert!(courier.room_for(&get("k"), now).await.is_none(), "{courier:?}");
    drop(all);
    let mut small = Vec::new();
    while let Some(permit) = courier.room_for(&get("k"), now).await {
        small.push(permit);
    }
    assert_eq!(small.len(), 65_536);
}

#[tokio::test]
async fn queues_that_are_not_in_use_are_forgotten_when_there_are_many() {
    let courier = Courier::default();
    let used = courier.lane("used:1", Class::Write);
    for number in 0..2 * NODES_MAX {
        courier.lane(&format!("unused:{number}"), Class::Write);
    }
    let nodes = courier.shared.nodes.load();
    assert!(nodes.len() <= NODES_MAX, "{}", nodes.len());
    assert!(Arc::ptr_eq(&used, &nodes["used:1"][Class::Write as usize]));
}

#[tokio::test]
async fn nothing_runs_while_nothing_is_asked_for() {
    let (listener, address, courier) = silent_node().await;
    drop(listener);
    let deadline = Instant::now() + LONG;
    let lane = courier.lane(&address, Class::Write);
    for _ in 0..2 {
        let result =
            courier.carry(&address, Class::Write, get("k"), Instant::now(), deadline, || ()).await;
        assert!(matches!(result, Err(Undelivered::Lost(SendError::NotSent { .. }))), "{result:?}");
        // The carrier looks once more for something to carry.
        while Arc::strong_count(&lane) > 2 {
            tokio::task::yield_now().await;
        }
    }
    assert!(lane.queue().is_idle());
}

#[tokio::test]
async fn a_node_that_says_nothing_is_reported_once_and_waited_for_until_the_deadline() {
    let (_listener, address, courier) = silent_node().await;
    let begun = Instant::now();
    let silent = std::sync::Mutex::new(Vec::new());
    let note = || silent.lock().unwrap().push(begun.elapsed());
    let result = courier
        .carry(&address, Class::Write, get("k"), begun, begun + SILENT_AFTER * 3 / 2, note)
        .await;
    assert!(matches!(result, Err(Undelivered::Lost(SendError::TimedOut { .. }))), "{result:?}");
    let silent = silent.into_inner().unwrap();
    assert_eq!(silent.len(), 1);
    assert!(silent[0] >= SILENT_AFTER, "{silent:?}");
    assert!(begun.elapsed() >= SILENT_AFTER * 3 / 2);
}

/// Carriers run where they were started. When that runtime ends, callers on another one are told at once.
#[test]
fn what_waits_is_refused_when_the_carriers_end_with_their_runtime() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (ending, other) = (runtime(), runtime());
    let (_listener, address, courier) = ending.block_on(silent_node());
    let lane = courier.lane(&address, Class::Write);
    let carry = || {
        let now = Instant::now();
        courier.carry(&address, Class::Write, get("k"), now, now + LONG, || ())
    };
    let mut carried = Vec::new();
    ending.block_on(async {
        for _ in 0..queue::CARRIERS_MAX {
            carried.push(Box::pin(carry()));
            poll_once(carried.last_mut().unwrap().as_mut());
            while lane.queue().waiting() > 0 {
                tokio::task::yield_now().await;
            }
        }
    });
    let (result, took) = other.block_on(async {
        let mut late = pin!(carry());
        poll_once(late.as_mut());
        assert_eq!(lane.queue().waiting(), 1, "all carriers are under way");
        // A runtime cannot end inside another one, but for this way.
        ending.shutdown_background();
        let begun = std::time::Instant::now();
        (late.await, begun.elapsed())
    });
    assert!(matches!(result, Err(Undelivered::NoTurn)), "{result:?}");
    assert!(took < SILENT_AFTER / 2, "{took:?}");
    drop(carried);
    assert!(lane.queue().is_idle());
}
