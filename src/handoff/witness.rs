//! Whose word a step needs.
//!
//! Many steps rest on what another cluster has done: it has begun the change, frozen, activated, refused.
//! Whoever proposes such a step only claims that, and anybody may propose one. So a cluster that takes the
//! step asks the one that it speaks of, at the address that its own rings name, before it hands the step to
//! its log. A step that was forged, or comes from a driver that was misled, then changes nothing.
//!
//! The answer is older than the step's entry by the time that is applied. That does no harm, because
//! nothing that is asked for is taken back while the step could still count: an attempt that is frozen
//! thaws only after this very cluster has refused it, and what is active, refused for good, decided or
//! settled stays so. All this comes on top of what is decided at apply, and replaces none of it.
//!
//! What needs nobody's word: `Cancel`, `Prepare`, `Count`, `Freeze` and the refusal of single attempts, which
//! anybody may ask for and which rest on the cluster's own state; `Finish`, whose conditions it knows; and
//! the first `Join` of a cluster, which knows no other.

use crate::ring::RingCluster;
use crate::types::{ClusterId, Epoch};

use super::decide::{Beginning, Decided, repeat};
use super::state::{Change, Course, Incoming, Outgoing, RingState, Sending};
use super::{Attempt, Done, Handoff, Step, members_of_both};

/// The clusters that have to confirm a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Witnesses {
    /// None has to.
    None,
    /// Each of them.
    All(Vec<RingCluster>),
    /// One of them is enough.
    Any(Vec<RingCluster>),
}

impl Step {
    /// Whether the step rests on what another cluster has done, and that may have to confirm it.
    pub fn needs_witness(&self) -> bool {
        match self {
            Self::Cancel { .. } | Self::Finish { .. } => false,
            Self::Prepare { .. } | Self::Count { .. } | Self::Freeze { .. } => false,
            Self::Refuse { attempt, .. } => *attempt == Attempt::MAX,
            _ => true,
        }
    }
}

impl RingState {
    /// Whose word the step needs before cluster `own`, which this is the state of, may take it.
    pub fn witnesses(&self, step: &Step, own: &ClusterId) -> Witnesses {
        let others = |mut clusters: Vec<RingCluster>| {
            clusters.retain(|cluster| cluster.id != *own);
            clusters
        };
        let only = |id: &ClusterId| match id == own {
            true => Witnesses::None,
            // Whom nobody knows cannot confirm anything.
            false => match self.known(id) {
                Some(cluster) => Witnesses::All(vec![cluster]),
                None => Witnesses::Any(Vec::new()),
            },
        };
        let members = || match &self.change {
            Some(change) => members_of_both(self.ring.ring(), change.next.ring()),
            None => self.ring.ring().clusters.clone(),
        };
        let sequencer = self.ring.ring().sequencer.as_ref();
        match step {
            Step::Begin { .. } => sequencer.map_or(Witnesses::None, only),
            // The sequencer ends a change for all: everybody that could give keys away must have cancelled.
            // Those that were to join can only take keys, and may never come back.
            Step::Revert { .. } if sequencer == Some(own) => {
                Witnesses::All(others(self.ring.ring().clusters.clone()))
            }
            Step::Revert { .. } => sequencer.map_or(Witnesses::None, only),
            // It may have cancelled, and activated afterwards: then it knows by itself.
            Step::Resume { epoch } if self.is_decided(*epoch) => Witnesses::None,
            Step::Resume { .. } => Witnesses::Any(others(members())),
            // Not those that left: all that they had is served by members when those are through, and they may
            // never come back.
            Step::Settle { .. } => {
                let mut members = self.settling.clone();
                members.retain(|cluster| self.ring.ring().cluster(&cluster.id).is_some());
                Witnesses::All(others(members))
            }
            // Those that it left, or was to join before, know the ring that there is now.
            Step::Join { .. } if self.epoch() > 0 => Witnesses::Any(others(members())),
            // For good, so that nothing is left for a change that goes on: every source must have cancelled.
            Step::Refuse { attempt, .. } if *attempt == Attempt::MAX => {
                Witnesses::All(others(self.ring.ring().clusters.clone()))
            }
            Step::Open { handoff, .. } | Step::Activate { handoff, .. } => only(&handoff.from),
            Step::Thaw { handoff, .. } | Step::Release { handoff, .. } => only(&handoff.to),
            _ => Witnesses::None,
        }
    }

    /// A cluster of one of the two rings.
    fn known(&self, id: &ClusterId) -> Option<RingCluster> {
        let next = self.change.as_ref().and_then(|change| change.next.ring().cluster(id));
        self.ring.ring().cluster(id).or(next).cloned()
    }

    /// Whether cluster `own`, which this is the state of, confirms what a step for another cluster says of
    /// it.
    pub fn confirms(&self, step: &Step, own: &ClusterId) -> bool {
        match step {
            Step::Begin { ring, next, plan } => {
                self.beginning(ring, next, plan) == Ok(Beginning::Begun)
            }
            // The sequencer leads the way and is asked by the others; they are asked by it. It does not get
            // beyond a change that it did not revert before all members have finished it, but for those that
            // left, so who is still in one then may revert, too. Who left may not: what it gave is frozen or
            // moved, so it cannot have cancelled, and reverts nothing.
            Step::Revert { ring } if ring.sequencer.as_ref() == Some(own) => {
                *self.ring.ring() == **ring || self.epoch() > ring.epoch
            }
            Step::Revert { ring } => self.has_cancelled(ring.epoch.saturating_sub(1)),
            Step::Resume { epoch } => self.is_through(*epoch) || self.is_decided(*epoch),
            Step::Settle { epoch } => self.is_through(*epoch),
            Step::Join { ring } => *self.ring.ring() == **ring,
            Step::Refuse { handoff, .. } => {
                self.has_cancelled(handoff.epoch) || self.epoch() > handoff.epoch
            }
            Step::Open { handoff, attempt, start } => self
                .sends(handoff, *attempt)
                .is_some_and(|outgoing| outgoing.logs() && outgoing.start == *start),
            Step::Activate { handoff, attempt, frozen } => self
                .sends(handoff, *attempt)
                .is_some_and(|outgoing| outgoing.frozen.as_ref() == Some(&**frozen)),
            Step::Thaw { handoff, refused } => {
                self.incoming(handoff).is_some_and(|incoming| incoming.refused >= *refused)
            }
            Step::Release { handoff, attempt, tally } => {
                // It finishes only what it activated, and it activated only what was equal. Whoever is asked may
                // be far beyond that change, if the source was left behind. It was not called off: the source
                // could not be frozen then, because nobody reverts before all sources have cancelled.
                self.epoch() >= handoff.epoch
                    || self.incoming(handoff).is_some_and(|incoming| {
                        incoming.is_active()
                            && incoming.opened == *attempt
                            && incoming.tally == *tally
                    })
            }
            // Nobody is asked about them.
            _ => false,
        }
    }

    /// What the step would come to; `None` if that depends on the data.
    pub fn foresee(&self, step: &Step, own: &ClusterId) -> Option<Decided> {
        if let Step::Join { ring } = step {
            return match self.joining(ring, own) {
                Ok(Some(_)) => None,
                Ok(None) => Some(repeat(Done::Ok)),
                Err(refused) => Some(Err(refused)),
            };
        }
        self.clone().decide_blindly(step, own)
    }

    fn has_cancelled(&self, epoch: Epoch) -> bool {
        self.change_to(epoch).is_some_and(Change::is_cancelled)
    }

    /// Whether it lives by the ring of this epoch, and no other is to come.
    fn is_through(&self, epoch: Epoch) -> bool {
        self.epoch() == epoch && self.change.is_none()
    }

    /// Whether it knows that the change can only go forward.
    fn is_decided(&self, epoch: Epoch) -> bool {
        let moved = |change: &Change| {
            change.outgoing.values().any(|outgoing| outgoing.sending == Sending::Moved)
                || change.incoming.values().any(Incoming::is_active)
        };
        self.change_to(epoch)
            .is_some_and(|change| change.course == Course::Decided || moved(change))
    }

    fn sends(&self, handoff: &Handoff, attempt: Attempt) -> Option<&Outgoing> {
        self.outgoing(handoff).filter(|outgoing| outgoing.attempt == attempt)
    }
}
