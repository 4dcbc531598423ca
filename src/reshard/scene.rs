//! Where a system of clusters stands, as what its clusters say tells.
//!
//! Pure. A driver keeps no state: whatever it does next it derives from the views of the clusters, which
//! need not be of the same moment, and of which some may be missing. [`Scene::of`] finds the one change
//! that is under way in them, wherever its clusters are: before it, in it, or through it.

use std::collections::{BTreeMap, BTreeSet};

use crate::handoff::{
    Change, Handoff, Incoming, Outgoing, Pair, RingState, Sending, members_of_both, pairs,
};
use crate::ring::{Ring, RingCluster};
use crate::types::{ClusterId, Epoch};

use super::rings::reverted;

/// What clusters said of themselves, by their ids. A cluster that did not answer is not there.
pub type Views = BTreeMap<ClusterId, RingState>;

/// Where the clusters stand. See the module.
#[derive(Debug, Clone, PartialEq)]
pub enum Scene {
    /// None of them has a ring.
    NoRing,
    /// They live by this ring, and no change is under way.
    Quiet {
        /// The newest ring.
        ring: Ring,
        /// Whether the sequencer has recorded that all of them do; `None` when it did not answer.
        settled: Option<bool>,
    },
    /// A change is under way, or not finished everywhere.
    Changing(Transition),
    /// A change was called off, and not all of its clusters have taken the ring that ends it.
    Reverting(Ring),
}

/// From one ring to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// The ring in force before.
    pub old: Ring,
    /// The ring in force after.
    pub next: Ring,
    /// All handoffs.
    pub plan: Vec<Pair>,
    /// Whether a cluster has cancelled it: then it is called off, unless a handoff has been activated.
    pub cancelled: bool,
}

/// How far one cluster is in a transition.
#[derive(Debug, Clone, Copy)]
pub enum Stage<'a> {
    /// It did not answer, or does not live by either ring.
    Unseen,
    /// It has not even joined.
    Outside,
    /// It lives by the old ring and has not begun.
    Unbegun,
    /// It takes part.
    Under(&'a Change),
    /// It lives by the new ring.
    Finished,
}

impl Scene {
    /// Where the clusters stand.
    pub fn of(views: &Views) -> Self {
        let Some(newest) = views.values().max_by_key(|view| view.epoch()) else {
            return Self::NoRing;
        };
        let (epoch, ring) = (newest.epoch(), newest.ring.ring());
        if epoch == 0 {
            return Self::NoRing;
        }
        let at_newest = views.values().filter(|view| view.epoch() == epoch);
        if let Some(change) = at_newest.filter_map(|view| view.change.as_ref()).next() {
            return Self::Changing(Transition::new(ring, change.next.ring(), views));
        }
        for (id, view) in views {
            let behind = epoch - view.epoch();
            if view.epoch() == 0 || behind == 0 || !concerns(views, ring, id, view) {
                continue;
            }
            let old = view.ring.ring();
            match behind {
                1 => return Self::Changing(Transition::new(old, ring, views)),
                2 if Ring { epoch, ..old.clone() } == *ring => {
                    return Self::Reverting(ring.clone());
                }
                // Of no change that is under way: see [`stragglers`].
                _ => {}
            }
        }
        let settled = sequencer_of(views, ring).map(|view| view.settling.is_empty());
        Self::Quiet { ring: ring.clone(), settled }
    }

    /// The newest ring that somebody lives by; in a change, the one before it.
    pub fn ring(&self) -> Option<&Ring> {
        match self {
            Self::NoRing => None,
            Self::Quiet { ring, .. } | Self::Reverting(ring) => Some(ring),
            Self::Changing(transition) => Some(&transition.old),
        }
    }
}

/// Rings that ended a change which a cluster is still in, though later rings are in force. No change is followed by
/// another before all of its members are through with it, but for clusters that were to join when it was
/// called off, and those that left ([`left_behind`]): nobody waits for those when they are gone, and the scene is
/// without them.
pub(super) fn stragglers(views: &Views) -> Vec<Ring> {
    let newest = views.values().map(RingState::epoch).max().unwrap_or_default();
    let is_behind = |(id, view): &(&ClusterId, &RingState)| {
        view.epoch() > 0
            && newest > view.epoch() + 2
            && view.change.as_ref().is_some_and(|change| !has_left(id, change))
    };
    views.iter().filter(is_behind).map(|(_, view)| reverted(view.ring.ring())).collect()
}

/// Clusters that left by the change to the ring of `epoch`, or to one before it, and have not finished that: others
/// are through with it, and nobody waited for them.
pub(super) fn left_behind(
    views: &Views,
    epoch: Epoch,
) -> impl Iterator<Item = (&ClusterId, &Change)> {
    let changes = views.iter().filter_map(|(id, view)| Some((id, view.change.as_ref()?)));
    changes.filter(move |(id, change)| change.next.ring().epoch <= epoch && has_left(id, change))
}

/// Whether a cluster leaves by this change, and all that it gives is out of its hands. If others are beyond that
/// change, they finished it: they could not have called it off, because nobody reverts before every source has
/// cancelled, and to cancel this one would have to thaw.
fn has_left(id: &ClusterId, change: &Change) -> bool {
    let gave = |outgoing: &Outgoing| matches!(outgoing.sending, Sending::Frozen | Sending::Moved);
    change.next.ring().cluster(id).is_none()
        && !change.outgoing.is_empty()
        && change.outgoing.values().all(gave)
}

/// Whether what became of the change to `ring` is any of this cluster's business. A cluster that left
/// long ago, and one that has only joined, may live by an older ring for ever.
fn concerns(views: &Views, ring: &Ring, id: &ClusterId, view: &RingState) -> bool {
    let awaited = |at: &RingState| at.settling.iter().any(|cluster| cluster.id == *id);
    view.change.is_some()
        || ring.cluster(id).is_some()
        || view.ring.ring().cluster(id).is_some()
        || sequencer_of(views, ring).is_some_and(awaited)
}

fn sequencer_of<'a>(views: &'a Views, ring: &Ring) -> Option<&'a RingState> {
    let view = views.get(ring.sequencer.as_ref()?)?;
    (view.epoch() == ring.epoch).then_some(view)
}

/// All clusters that these views speak of, with where their nodes are: whom to ask next.
pub(super) fn mentioned(views: &Views) -> BTreeMap<ClusterId, RingCluster> {
    let mut mentioned = BTreeMap::new();
    let mut by_epoch: Vec<&RingState> = views.values().collect();
    // The newest ring knows best where a cluster's nodes are.
    by_epoch.sort_by_key(|view| view.epoch());
    for view in by_epoch {
        let next = view.change.iter().flat_map(|change| &change.next.ring().clusters);
        for cluster in view.settling.iter().chain(&view.ring.ring().clusters).chain(next) {
            mentioned.insert(cluster.id.clone(), cluster.clone());
        }
    }
    mentioned
}

impl Transition {
    pub(super) fn new(old: &Ring, next: &Ring, views: &Views) -> Self {
        let cancelled =
            |view: &RingState| view.change_to(next.epoch).is_some_and(Change::is_cancelled);
        Self {
            old: old.clone(),
            next: next.clone(),
            plan: pairs(old, next),
            cancelled: views.values().any(cancelled),
        }
    }

    /// The clusters of both rings.
    pub fn members(&self) -> BTreeSet<ClusterId> {
        members_of_both(&self.old, &self.next).into_iter().map(|cluster| cluster.id).collect()
    }

    /// The epoch that is being changed to.
    pub fn epoch(&self) -> Epoch {
        self.next.epoch
    }

    /// The handoff of a pair.
    pub fn handoff(&self, pair: &Pair) -> Handoff {
        Handoff { epoch: self.epoch(), from: pair.from.clone(), to: pair.to.clone() }
    }

    /// The handoff that comes before all others, and the cluster whose word decides between going on
    /// and calling off: see [`super::driver`].
    pub fn pivot(&self) -> (ClusterId, Option<&Pair>) {
        let sequencer = self.old.sequencer.as_ref();
        let of_sequencer =
            self.plan.iter().find(|pair| [Some(&pair.from), Some(&pair.to)].contains(&sequencer));
        let pair = of_sequencer.or(self.plan.first());
        let first = || self.old.clusters.first().map(|cluster| &cluster.id);
        let cluster = match (of_sequencer, pair) {
            (None, Some(pair)) => Some(&pair.from),
            _ => sequencer.or_else(first),
        };
        (cluster.expect("a ring that is changed has a cluster").clone(), pair)
    }

    /// How far a cluster is.
    pub fn stage<'a>(&self, views: &'a Views, id: &ClusterId) -> Stage<'a> {
        let Some(view) = views.get(id) else { return Stage::Unseen };
        match &view.change {
            _ if view.epoch() == self.next.epoch => Stage::Finished,
            Some(change) if change.next.ring().epoch == self.next.epoch => Stage::Under(change),
            None if view.epoch() == self.old.epoch => Stage::Unbegun,
            None if view.epoch() < self.old.epoch && self.old.cluster(id).is_none() => {
                Stage::Outside
            }
            _ => Stage::Unseen,
        }
    }

    /// The source's side of a handoff, if it takes part at the moment.
    pub fn outgoing<'a>(&self, views: &'a Views, pair: &Pair) -> Option<&'a Outgoing> {
        match self.stage(views, &pair.from) {
            Stage::Under(change) => change.outgoing.get(&pair.to),
            _ => None,
        }
    }

    /// The destination's side of a handoff, if it takes part at the moment.
    pub fn incoming<'a>(&self, views: &'a Views, pair: &Pair) -> Option<&'a Incoming> {
        match self.stage(views, &pair.to) {
            Stage::Under(change) => change.incoming.get(&pair.from),
            _ => None,
        }
    }

    /// Whether a cluster leaves, and others serve all that it had.
    pub fn has_given_all(&self, views: &Views, id: &ClusterId) -> bool {
        let is_served = |pair: &Pair| {
            self.is_finished(views, &pair.to)
                || self.incoming(views, pair).is_some_and(Incoming::is_active)
        };
        self.next.cluster(id).is_none()
            && self.plan.iter().filter(|pair| pair.from == *id).all(is_served)
    }

    /// Whether a cluster is through with the change.
    pub fn is_finished(&self, views: &Views, id: &ClusterId) -> bool {
        matches!(self.stage(views, id), Stage::Finished)
    }
}
