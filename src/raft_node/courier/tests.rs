//! A caller that leaves takes its operation along, and the bounds hold: below what a fake node can see.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use tokio::net::TcpListener;
use tokio::runtime::Runtime;

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
    let lane = courier.lane(Handle::current().id(), &address, Class::StaleRead);
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
async fn queues_that_are_not_in_use_are_forgotten_when_there_are_many() {
    let courier = Courier::default();
    let here = Handle::current().id();
    let used = courier.lane(here, "used:1", Class::Write);
    for number in 0..2 * NODES_MAX {
        courier.lane(here, &format!("unused:{number}"), Class::Write);
    }
    let nodes = courier.shared.nodes.load();
    assert!(nodes[&here].len() <= NODES_MAX, "{}", nodes[&here].len());
    assert!(Arc::ptr_eq(&used, &nodes[&here]["used:1"][Class::Write as usize]));
}

#[tokio::test]
async fn nothing_runs_while_nothing_is_asked_for() {
    let (listener, address, courier) = silent_node().await;
    drop(listener);
    let deadline = Instant::now() + LONG;
    let lane = courier.lane(Handle::current().id(), &address, Class::Write);
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

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Carriers run where their callers do. When that runtime ends, a caller that goes on elsewhere is told at once.
#[test]
fn what_waits_is_refused_when_the_carriers_end_with_their_runtime() {
    let (ending, other) = (runtime(), runtime());
    let (_listener, address, courier) = ending.block_on(silent_node());
    let lane = courier.lane(ending.handle().id(), &address, Class::Write);
    let carry = || {
        let now = Instant::now();
        courier.carry(&address, Class::Write, get("k"), now, now + LONG, || ())
    };
    let mut carried = Vec::new();
    let mut late = pin!(carry());
    ending.block_on(async {
        for _ in 0..queue::CARRIERS_MAX {
            carried.push(Box::pin(carry()));
            poll_once(carried.last_mut().unwrap().as_mut());
            while lane.queue().waiting() > 0 {
                tokio::task::yield_now().await;
            }
        }
        poll_once(late.as_mut());
        assert_eq!(lane.queue().waiting(), 1, "all carriers are under way");
    });
    let (result, took) = other.block_on(async {
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

/// A carrier that was started where nothing runs any more is no reason for others to wait: it was, and each of
/// their attempts took a second and found no turn.
#[test]
fn nobody_waits_for_a_carrier_on_another_runtime() {
    let (idle, other) = (runtime(), runtime());
    let (listener, address, courier) = idle.block_on(silent_node());
    drop(listener);
    let carry = || {
        let now = Instant::now();
        courier.carry(&address, Class::Write, get("k"), now, now + LONG, || ())
    };
    idle.block_on(async { poll_once(pin!(carry())) });
    let result = other.block_on(carry());
    assert!(matches!(result, Err(Undelivered::Lost(SendError::NotSent { .. }))), "{result:?}");
}

#[tokio::test]
async fn a_key_that_nodes_refuse_does_not_travel_with_others() {
    let courier = Courier::default();
    let now = Instant::now();
    let long = Arc::new(Operation::Get { key: vec![b'k'; KEY_BYTES_MAX + 1].into() });
    let result = courier.carry("n:1", Class::LinearizableRead, long, now, now + LONG, || ()).await;
    assert!(matches!(result, Err(Undelivered::Alone)), "{result:?}");
}
