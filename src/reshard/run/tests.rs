//! When the driver looks again.

use std::sync::Arc;

use bytes::Bytes;

use super::super::testing::{id, ring};
use super::*;
use crate::handoff::{
    Change, Counted, Course, Cursor, Incoming, Outgoing, Receipt, Sending, pairs,
};
use crate::ring::RingTable;

/// Clusters that nobody asks.
struct Nobody;

impl Clusters for Nobody {
    async fn view(&self, cluster: &RingCluster) -> Result<RingState, ClientError> {
        panic!("{cluster:?} is looked at")
    }

    async fn step(&self, cluster: &RingCluster, _: &Step) -> Result<Done, ClientError> {
        panic!("{cluster:?} is asked for a step")
    }
}

/// A part of the change in which `b` joins `a`, and gets some of its keys.
fn part(outgoing: Option<Outgoing>, incoming: Option<Incoming>) -> RingState {
    let (old, next) = (ring(1, &[("a", 1.0)]), ring(2, &[("a", 1.0), ("b", 1.0)]));
    let mut state = RingState::with_ring(RingTable::new(old.clone()).unwrap());
    state.change = Some(Change {
        plan: pairs(&old, &next),
        next: Arc::new(RingTable::new(next).unwrap()),
        course: Course::Open,
        outgoing: outgoing.map(|outgoing| (id("b"), outgoing)).into_iter().collect(),
        incoming: incoming.map(|incoming| (id("a"), incoming)).into_iter().collect(),
    });
    state
}

fn source(counted: Counted) -> RingState {
    let sending = Sending::Sending;
    part(Some(Outgoing { attempt: 1, sending, counted, ..Outgoing::default() }), None)
}

/// The copy is there, and counting takes longer: when it ends, the source may freeze any moment, and then
/// the next look at the destination must not be one that was planned while there was time.
#[tokio::test]
async fn all_looks_come_forward_when_milliseconds_count() {
    let known = ring(2, &[("a", 1.0), ("b", 1.0)]).clusters;
    let role = Role::Sequencer(id("a"));
    let mut drive = Drive::new(&Nobody, known, role, Goal::Forward);
    let receipt = Receipt::Receiving { cursor: Cursor::Changes { position: 0 }, start: 0 };
    let destination = part(None, Some(Incoming { opened: 1, receipt, ..Incoming::default() }));

    let began = Instant::now();
    drive.seen(id("a"), 0, source(Counted::UpTo(Bytes::new())));
    drive.seen(id("b"), 0, destination);
    assert!(drive.contacts[&id("b")].look_at >= began + LOOK_WARM, "nothing is hot yet");

    drive.seen(id("a"), 0, source(Counted::All));
    let due = Instant::now() + LOOK_HOT;
    assert!(drive.contacts.values().all(|contact| contact.look_at <= due));
}

/// Where the copy is far behind, or a side does not answer, nothing is gained by haste; and others should not
/// be asked hundreds of times a second for as long as that lasts.
#[tokio::test]
async fn nobody_hurries_for_what_cannot_happen_soon() {
    let known = ring(2, &[("a", 1.0), ("b", 1.0)]).clusters;
    let mut drive = Drive::new(&Nobody, known, Role::Alone, Goal::Forward);
    let receipt = Receipt::Receiving { cursor: Cursor::Changes { position: 7 }, start: 0 };
    let destination = part(None, Some(Incoming { opened: 1, receipt, ..Incoming::default() }));
    drive.seen(id("b"), 0, destination);

    let mut busy = source(Counted::All);
    busy.position = 1_000_000;
    drive.seen(id("a"), 0, busy);
    assert_eq!(drive.interval(), LOOK_WARM);
    drive.seen(id("a"), 0, source(Counted::All));
    assert_eq!(drive.interval(), LOOK_HOT);
    drive.trouble(&id("b"), &ClientError::Unreachable { tried: Vec::new() });
    assert_eq!(drive.interval(), LOOK_WARM);
}

/// A cluster that does not answer is not asked any more often for that.
#[tokio::test]
async fn who_is_in_trouble_is_left_alone() {
    let known = ring(2, &[("a", 1.0), ("b", 1.0)]).clusters;
    let mut drive = Drive::new(&Nobody, known, Role::Alone, Goal::Forward);
    drive.trouble(&id("b"), &ClientError::Unreachable { tried: Vec::new() });
    let planned = drive.contacts[&id("b")].look_at;
    drive.seen(id("a"), 0, source(Counted::All));
    assert_eq!(drive.contacts[&id("b")].look_at, planned);
}

/// A driver that knows of no cluster has not seen that there is no ring.
#[tokio::test]
async fn who_knows_of_nobody_sees_no_end() {
    let mut drive = Drive::new(&Nobody, Vec::new(), Role::Alone, Goal::Forward)
        .stalled_after(Duration::from_millis(10));
    let ended = drive.run(|_, _| {}).await;
    assert!(matches!(ended, Err(DriveError::Stalled { .. })), "{ended:?}");
}
