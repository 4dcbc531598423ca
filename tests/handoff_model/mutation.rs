//! The protocol, broken in one place: what the model must notice.
//!
//! The product has no switch for any of this. A mutation changes a step or the state just before or
//! after the product decides, or changes what the model does around it.

use distrib_kv_store::handoff::{
    Counted, Course, Cursor, Receipt, RingState, Sending, Step, members_of_both,
};
use distrib_kv_store::types::ClusterId;

/// One rule less. The first eleven were known to be fatal when the protocol was designed; the others came
/// with this model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// A page is staged wherever the copy is.
    CursorUnchecked,
    /// A source thaws by itself.
    ThawByTimer,
    /// A frozen source answers reads.
    ReadsWhileFrozen,
    /// A frozen source begins a new attempt, and with it serves again.
    PrepareWhileFrozen,
    /// A destination that has not begun the change says that it refuses.
    RefusalOfAStranger,
    /// An activation counts whatever change it belongs to.
    OldActivate,
    /// A change is finished before what moved is deleted.
    DeletionApart,
    /// Every staged row counts.
    StagingMixedWithData,
    /// Answers are scanned with the records, so those of absent keys are passed over.
    AbsentAnswersSkipped,
    /// A source trims answers of moving keys without logging it, and those of frozen keys, too.
    TrimWhileMoving,
    /// That all have finished is recorded at the old ring's sequencer: the new one never learns it.
    SettledAtOldSequencer,
    /// The old ring's sequencer waits until all have finished, and the new one does not.
    AwaitedAtOldSequencer,
    /// An operation that changes no record takes no place in the change log.
    UnchangedNotLogged,
    /// A source freezes before all of what moves is counted.
    FreezeUncounted,
    /// A destination does not compare what it has staged with what the source had.
    DigestUnchecked,
    /// The cursor is not compared with the source's final position either.
    EndUnchecked,
    /// A destination keeps its own floors.
    FloorsNotMerged,
    /// A destination goes on with its own revisions.
    RevisionNotRaised,
    /// A cancelled source may still freeze.
    FreezeAfterCancel,
    /// A cancelled cluster never goes on.
    NoResume,
    /// A destination opens an attempt that it has refused.
    OpenRefused,
}

impl Mutation {
    /// What becomes of a step, and of the state that takes it, before it is decided.
    pub fn before(self, step: &mut Step, ring: &mut RingState, own: &ClusterId) {
        match (self, step) {
            (Self::PrepareWhileFrozen, Step::Prepare { handoff, attempt }) => {
                if let Some(outgoing) = ring.outgoing_slot(handoff)
                    && outgoing.sending == Sending::Frozen
                    && *attempt > outgoing.attempt
                {
                    outgoing.sending = Sending::Idle;
                }
            }
            (Self::OldActivate, Step::Activate { handoff, .. }) => {
                let change = ring.change.as_ref().filter(|_| handoff.to == *own);
                if let Some(change) = change {
                    handoff.epoch = change.next.ring().epoch;
                }
            }
            (Self::DeletionApart, Step::Finish { .. }) => {
                if let Some(change) = &mut ring.change {
                    change.outgoing.values_mut().for_each(|outgoing| outgoing.tally.records = 0);
                    change.incoming.values_mut().for_each(|incoming| incoming.garbage = 0);
                }
            }
            (Self::FreezeUncounted, Step::Freeze { handoff, .. }) => {
                if let Some(outgoing) = ring.outgoing_slot(handoff) {
                    outgoing.counted = Counted::All;
                }
            }
            (Self::FreezeAfterCancel, Step::Freeze { .. } | Step::Prepare { .. }) => {
                ring.change.iter_mut().for_each(|change| change.course = Course::Open);
            }
            (Self::DigestUnchecked, Step::Activate { handoff, frozen, .. }) => {
                if let Some(incoming) = ring.incoming_slot(handoff) {
                    incoming.tally = frozen.tally;
                }
            }
            (Self::EndUnchecked, Step::Activate { handoff, frozen, .. }) => {
                if let Some(incoming) = ring.incoming_slot(handoff)
                    && let Receipt::Receiving { cursor, .. } = &mut incoming.receipt
                {
                    *cursor = Cursor::Changes { position: frozen.position };
                    incoming.tally = frozen.tally;
                }
            }
            (Self::FloorsNotMerged, Step::Activate { frozen, .. }) => frozen.floors.clear(),
            (Self::RevisionNotRaised, Step::Activate { frozen, .. }) => frozen.revision = 0,
            (Self::OpenRefused, Step::Open { handoff, .. }) => {
                if let Some(incoming) = ring.incoming_slot(handoff) {
                    incoming.refused = 0;
                }
            }
            _ => {}
        }
    }

    /// What becomes of the state after a step that changed it. `old` is the state before.
    pub fn after(self, step: &Step, old: &RingState, ring: &mut RingState, own: &ClusterId) {
        match (self, step) {
            (Self::AwaitedAtOldSequencer, Step::Finish { .. }) => {
                let was_sequencer = old.ring.ring().sequencer.as_ref() == Some(own);
                let members = members_of_both(old.ring.ring(), ring.ring.ring());
                ring.settling = if was_sequencer { members } else { Vec::new() };
            }
            (Self::FreezeAfterCancel, Step::Freeze { .. } | Step::Prepare { .. }) => {
                if let (Some(change), Some(old)) = (&mut ring.change, &old.change) {
                    change.course = old.course;
                }
            }
            _ => {}
        }
    }
}
