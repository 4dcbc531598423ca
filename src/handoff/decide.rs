//! What a step does to a cluster's [`RingState`], or why it does nothing.
//!
//! The only place where that is decided, with [`super::source`] and [`super::destination`] for the two
//! sides of a handoff. It looks at the state, the step and a few [`Facts`] about the data, all of which
//! replicas agree on, and changes the state. What must happen to the data then is the store's to do, in
//! the same round: see [`RingState::decide`].

use std::io;

use crate::ring::{Ring, RingTable};
use crate::types::{ClusterId, Epoch, Revision};

use super::state::{Change, Course, Incoming, Outgoing, Prepared, Receipt, RingState, Sending};
use super::{
    Attempt, Done, FLOORS_BYTES_MAX, Handoff, Pair, Refused, Step, Tally, members_of_both, pairs,
};

/// What a step needs to know about the data of the cluster that takes it.
pub trait Facts {
    /// The cluster.
    fn own(&self) -> &ClusterId;
    /// The index of the step's entry in the log.
    fn index(&self) -> u64;
    /// The revision counter.
    fn revision(&self) -> Revision;
    /// The floors of all clients but for those of [`Self::idle_floors`].
    fn floors(&self) -> Vec<(String, u64)>;
    /// The floors of clients that may be forgotten where there is no room for others.
    fn idle_floors(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
    /// Whether there is neither a record, nor an answer, nor anything staged.
    fn is_empty(&self) -> io::Result<bool>;
    /// The answers to operations on keys that move.
    fn answers(&self, moves: &dyn Fn(&[u8]) -> bool) -> Tally;
    /// The records of keys that move, after `from` and up to `to`, as far as they are from before the
    /// attempt was prepared; `None` when there are so many of those, moving or not, that to count them
    /// would hold others up.
    fn records(
        &self,
        moves: &dyn Fn(&[u8]) -> bool,
        from: &[u8],
        to: Option<&[u8]>,
        prepared: Prepared,
    ) -> io::Result<Option<Tally>>;
}

/// What a step came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The answer.
    pub done: Done,
    /// Whether the step changed the state, and is no repeat. Only then the data follows: see
    /// [`RingState::decide`].
    pub changed: bool,
}

/// What a cluster makes of the beginning of a change that goes with its ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// It takes part, or has finished.
    Begun,
    /// It has not heard of it.
    New,
}

pub(super) type Decided = Result<Decision, Refused>;

pub(super) fn first(done: Done) -> Decided {
    Ok(Decision { done, changed: true })
}

pub(super) fn repeat(done: Done) -> Decided {
    Ok(Decision { done, changed: false })
}

impl RingState {
    /// Takes a step, or refuses it and changes nothing.
    ///
    /// After a step that changed something, in the same round, the caller:
    /// - `Open`, `Refuse`: forgets the answers that earlier attempts of the handoff staged; a refusal
    ///   spares those of an attempt above it that is open;
    /// - `Activate`: makes the staged answers its own, as if they were given now (each cluster's log time is
    ///   its own), raises its revision to the source's if it is lower, and each client's floor;
    /// - `Thaw`: forgets the answers that stayed only because what moved was frozen;
    /// - `Release`: forgets the answers to operations on keys that moved.
    ///
    /// # Errors
    /// The data could not be read. Nothing has changed then.
    pub fn decide(&mut self, step: &Step, facts: &dyn Facts) -> io::Result<Decided> {
        match step {
            Step::Join { ring } => return self.join(ring, facts),
            Step::Prepare { handoff, attempt } => return Ok(self.prepare(handoff, *attempt, facts)),
            Step::Count { handoff, attempt, from, to } => {
                return self.count(handoff, *attempt, from, to.as_deref(), facts);
            }
            Step::Freeze { handoff, attempt, floors_bytes_max } => {
                let bytes_max = floors_bytes_max.unwrap_or(FLOORS_BYTES_MAX).min(FLOORS_BYTES_MAX);
                return Ok(self.freeze(handoff, *attempt, bytes_max, facts));
            }
            _ => {}
        }
        let decided = self.decide_blindly(step, facts.own());
        Ok(decided.expect("a step that needs facts was taken above"))
    }

    /// Takes a step that concerns nothing but the state; `None`, and nothing has changed, if it needs
    /// [`Facts`].
    pub(super) fn decide_blindly(&mut self, step: &Step, own: &ClusterId) -> Option<Decided> {
        Some(match step {
            Step::Begin { ring, next, plan } => self.begin(ring, next, plan, own),
            Step::Cancel { epoch } => self.cancel(*epoch, own),
            Step::Resume { epoch } => self.resume(*epoch, own),
            Step::Revert { ring } => self.revert(ring, own),
            Step::Finish { epoch } => self.finish(*epoch, own),
            Step::Settle { epoch } => self.settle(*epoch, own),
            Step::Thaw { handoff, refused } => self.thaw(handoff, *refused, own),
            Step::Release { handoff, attempt, tally } => {
                self.release(handoff, *attempt, *tally, own)
            }
            Step::Open { handoff, attempt, start } => self.open(handoff, *attempt, *start, own),
            Step::Activate { handoff, attempt, frozen } => {
                self.activate(handoff, *attempt, frozen, own)
            }
            Step::Refuse { handoff, attempt } => self.refuse(handoff, *attempt, own),
            Step::Join { .. } | Step::Prepare { .. } | Step::Count { .. } | Step::Freeze { .. } => {
                return None;
            }
        })
    }

    // --- Rings and changes -------------------------------------------------------------------------

    /// Takes the first ring of a cluster that holds only keys which it goes on owning.
    pub fn install_first(&mut self, ring: RingTable, own: &ClusterId) {
        let clusters = &ring.ring().clusters;
        let is_sequencer = ring.ring().sequencer.as_ref() == Some(own);
        let others = clusters.iter().filter(|cluster| cluster.id != *own);
        self.settling = if is_sequencer { others.cloned().collect() } else { Vec::new() };
        self.ring = std::sync::Arc::new(ring);
    }

    /// The table of a ring by which cluster `own` may live if it is empty; `None` if it does already.
    pub(super) fn joining(
        &self,
        ring: &Ring,
        own: &ClusterId,
    ) -> Result<Option<RingTable>, Refused> {
        let current = self.epoch();
        if *self.ring.ring() == *ring {
            return Ok(None);
        }
        let table = checked(ring)?;
        if let Some(change) = &self.change {
            return Err(Refused::ChangeUnderWay { epoch: change.next.ring().epoch });
        }
        if ring.epoch <= current {
            return Err(Refused::Stale { current });
        }
        if ring.cluster(own).is_some() {
            return Err(Refused::NotConcerned(own.clone()));
        }
        if current > 0 && self.ring.ring().cluster(own).is_some() {
            return Err(Refused::NotEmpty(own.clone()));
        }
        Ok(Some(table))
    }

    fn join(&mut self, ring: &Ring, facts: &dyn Facts) -> io::Result<Decided> {
        let table = match self.joining(ring, facts.own()) {
            Ok(Some(table)) => table,
            Ok(None) => return Ok(repeat(Done::Ok)),
            Err(refused) => return Ok(Err(refused)),
        };
        if !facts.is_empty()? {
            return Ok(Err(Refused::NotEmpty(facts.own().clone())));
        }
        self.ring = std::sync::Arc::new(table);
        self.settling = Vec::new();
        Ok(first(Done::Ok))
    }

    /// Whether a `Begin` of this change would find the cluster in it already, before it, or neither.
    ///
    /// # Errors
    /// The cluster lives by another ring than `ring`, or takes part in another change.
    pub fn beginning(&self, ring: &Ring, next: &Ring, plan: &[Pair]) -> Result<Beginning, Refused> {
        let current = self.epoch();
        if let Some(change) = &self.change {
            let same =
                *self.ring.ring() == *ring && *change.next.ring() == *next && change.plan == plan;
            let epoch = change.next.ring().epoch;
            return if same {
                Ok(Beginning::Begun)
            } else {
                Err(Refused::ChangeUnderWay { epoch })
            };
        }
        if *self.ring.ring() == *next {
            return Ok(Beginning::Begun);
        }
        if *self.ring.ring() != *ring {
            let offered = ring.epoch;
            let stale = offered <= current;
            return Err(match stale {
                true => Refused::Stale { current },
                false => Refused::Gap { current, offered },
            });
        }
        Ok(Beginning::New)
    }

    fn begin(&mut self, ring: &Ring, next: &Ring, plan: &[Pair], own: &ClusterId) -> Decided {
        if self.beginning(ring, next, plan)? == Beginning::Begun {
            return repeat(Done::Ok);
        }
        let current = self.epoch();
        let table = checked(next)?;
        if current == 0 || current.checked_add(1) != Some(next.epoch) {
            return Err(Refused::Gap { current, offered: next.epoch });
        }
        if ring.cluster(own).is_none() && next.cluster(own).is_none() {
            return Err(Refused::NotConcerned(own.clone()));
        }
        if *plan != pairs(ring, next)[..] {
            return Err(Refused::BadPlan);
        }
        if ring.sequencer.as_ref() == Some(own) && !self.settling.is_empty() {
            return Err(Refused::Unsettled { epoch: current });
        }
        let gives = plan.iter().filter(|pair| pair.from == *own);
        let gets = plan.iter().filter(|pair| pair.to == *own);
        self.change = Some(Change {
            outgoing: gives.map(|pair| (pair.to.clone(), Outgoing::default())).collect(),
            incoming: gets.map(|pair| (pair.from.clone(), Incoming::default())).collect(),
            next: std::sync::Arc::new(table),
            plan: plan.to_vec(),
            course: Course::Open,
        });
        first(Done::Ok)
    }

    fn cancel(&mut self, epoch: Epoch, own: &ClusterId) -> Decided {
        let change = self.change_mut(epoch, own)?;
        if change.is_cancelled() {
            return repeat(Done::Ok);
        }
        let frozen =
            |outgoing: &Outgoing| matches!(outgoing.sending, Sending::Frozen | Sending::Moved);
        let is_busy = change.outgoing.values().any(frozen)
            || change.incoming.values().any(Incoming::is_active);
        if change.course == Course::Decided || is_busy {
            return Err(Refused::TooLate);
        }
        change.course = Course::Cancelled;
        for outgoing in change.outgoing.values_mut() {
            outgoing.sending = Sending::Idle;
        }
        first(Done::Ok)
    }

    fn resume(&mut self, epoch: Epoch, own: &ClusterId) -> Decided {
        let change = self.change_mut(epoch, own)?;
        if change.course == Course::Decided {
            return repeat(Done::Ok);
        }
        // A repeated Cancel that arrives late finds this, and is refused.
        change.course = Course::Decided;
        first(Done::Ok)
    }

    fn revert(&mut self, ring: &Ring, own: &ClusterId) -> Decided {
        let current = self.epoch();
        if self.change.is_none() && *self.ring.ring() == *ring {
            return repeat(Done::Ok);
        }
        let same_content = {
            let ours = self.ring.ring();
            Ring { epoch: ours.epoch, ..ring.clone() } == *ours
        };
        if current.checked_add(2) != Some(ring.epoch) {
            return Err(if ring.epoch <= current {
                Refused::Stale { current }
            } else {
                Refused::Gap { current, offered: ring.epoch }
            });
        }
        let table = checked(ring)?;
        if !same_content {
            return Err(Refused::NotConcerned(own.clone()));
        }
        let is_sequencer = ring.sequencer.as_ref() == Some(own);
        match &self.change {
            Some(change) if !change.is_cancelled() => {
                return Err(Refused::Unfinished("the change is not cancelled here".into()));
            }
            Some(change) => {
                for (from, incoming) in &change.incoming {
                    if incoming.receipt != Receipt::Waiting || incoming.garbage > 0 {
                        let text = format!("what {from} sent is not discarded yet");
                        return Err(Refused::Unfinished(text));
                    }
                }
            }
            // No change begins without it, so none can end.
            None if is_sequencer => {
                return Err(Refused::NoChange { epoch: current + 1, cluster: own.clone() });
            }
            // A cluster that never heard of the cancelled change loses nothing by passing over it: the
            // next ring has the content of the present one.
            None => {}
        }
        // Not those that were to join: they own nothing by either ring, cannot take part in another
        // change before they have left this one, and may have died.
        self.settling = if is_sequencer { ring.clusters.clone() } else { Vec::new() };
        self.ring = std::sync::Arc::new(table);
        self.change = None;
        first(Done::Ok)
    }

    fn finish(&mut self, epoch: Epoch, own: &ClusterId) -> Decided {
        if self.change.is_none() && self.epoch() == epoch {
            return repeat(Done::Ok);
        }
        let change = self.change_mut(epoch, own)?;
        if change.is_cancelled() {
            return Err(Refused::Cancelled);
        }
        if let Some((to, _)) = change.outgoing.iter().find(|(_, outgoing)| !outgoing.is_over()) {
            return Err(Refused::Unfinished(format!("keys for {to} are still here")));
        }
        if let Some((from, _)) = change.incoming.iter().find(|(_, incoming)| !incoming.is_over()) {
            return Err(Refused::Unfinished(format!("keys of {from} are not all taken over")));
        }
        let next = change.next.clone();
        if next.ring().sequencer.as_ref() == Some(own) {
            self.settling = members_of_both(self.ring.ring(), next.ring());
        } else {
            self.settling = Vec::new();
        }
        self.ring = next;
        self.change = None;
        first(Done::Ok)
    }

    fn settle(&mut self, epoch: Epoch, own: &ClusterId) -> Decided {
        let current = self.epoch();
        if let Some(change) = &self.change {
            return Err(Refused::ChangeUnderWay { epoch: change.next.ring().epoch });
        }
        if epoch < current {
            return Err(Refused::Stale { current });
        }
        if epoch > current {
            return Err(Refused::Gap { current, offered: epoch });
        }
        if self.ring.ring().sequencer.as_ref() != Some(own) {
            return Err(Refused::NotSequencer { cluster: own.clone(), epoch });
        }
        if self.settling.is_empty() {
            return repeat(Done::Ok);
        }
        self.settling = Vec::new();
        first(Done::Ok)
    }

    // --- Finding things ----------------------------------------------------------------------------

    /// Whether a key moves by this handoff. Owns its rings: the state can change while it is used.
    pub(super) fn moves(&self, handoff: &Handoff) -> impl Fn(&[u8]) -> bool + use<> {
        let old = self.ring.clone();
        let new = self.change_to(handoff.epoch).map(|change| change.next.clone());
        let (from, to) = (handoff.from.clone(), handoff.to.clone());
        move |key: &[u8]| {
            let new = new.as_ref().and_then(|new| new.owner(key));
            old.owner(key).is_some_and(|o| o.id == from) && new.is_some_and(|n| n.id == to)
        }
    }

    pub(super) fn change_mut(
        &mut self,
        epoch: Epoch,
        own: &ClusterId,
    ) -> Result<&mut Change, Refused> {
        match &mut self.change {
            Some(change) if change.next.ring().epoch == epoch => Ok(change),
            _ => Err(Refused::NoChange { epoch, cluster: own.clone() }),
        }
    }

    pub(super) fn unknown(&self, handoff: &Handoff, own: &ClusterId) -> Refused {
        if self.change_to(handoff.epoch).is_none() {
            return Refused::NoChange { epoch: handoff.epoch, cluster: own.clone() };
        }
        Refused::UnknownHandoff { cluster: own.clone(), handoff: handoff.clone() }
    }

    pub(super) fn outgoing_mut(
        &mut self,
        handoff: &Handoff,
        own: &ClusterId,
    ) -> Result<&mut Outgoing, Refused> {
        let unknown = self.unknown(handoff, own);
        if handoff.from != *own {
            return Err(unknown);
        }
        self.outgoing_slot(handoff).ok_or(unknown)
    }

    /// The source's side, if this is its present attempt.
    pub(super) fn outgoing_in(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        own: &ClusterId,
    ) -> Result<&mut Outgoing, Refused> {
        let outgoing = self.outgoing_mut(handoff, own)?;
        if outgoing.attempt != attempt {
            return Err(Refused::WrongAttempt { attempt, present: outgoing.attempt });
        }
        Ok(outgoing)
    }

    pub(super) fn incoming_mut(
        &mut self,
        handoff: &Handoff,
        own: &ClusterId,
    ) -> Result<&mut Incoming, Refused> {
        let unknown = self.unknown(handoff, own);
        if handoff.to != *own {
            return Err(unknown);
        }
        self.incoming_slot(handoff).ok_or(unknown)
    }

    /// For what the store counts: the source's side.
    pub fn outgoing_slot(&mut self, handoff: &Handoff) -> Option<&mut Outgoing> {
        let change = self.change.as_mut().filter(|c| c.next.ring().epoch == handoff.epoch)?;
        change.outgoing.get_mut(&handoff.to)
    }

    /// For what the store counts: the destination's side.
    pub fn incoming_slot(&mut self, handoff: &Handoff) -> Option<&mut Incoming> {
        let change = self.change.as_mut().filter(|c| c.next.ring().epoch == handoff.epoch)?;
        change.incoming.get_mut(&handoff.from)
    }
}

fn checked(ring: &Ring) -> Result<RingTable, Refused> {
    if ring.next.is_some() {
        return Err(Refused::InvalidRing("a ring that is changed to has no `next`".into()));
    }
    RingTable::new(ring.clone()).map_err(|error| Refused::InvalidRing(error.to_string()))
}
