//! What became of one change of the ring, as far as the clusters' views tell.
//!
//! Pure. The next change may begin in the moment in which one has ended, and end itself before whoever waits
//! for the first looks again. And an epoch alone says little: from the ring of epoch `e` a change leads to
//! `e + 1`, or is called off, and then the ring that was goes on as `e + 2`; but to `e + 2` leads the change
//! after one that was done, too. So what was seen on the way is remembered ([`Awaited::see`]), and what
//! became of a change that was over unseen is not guessed.

use crate::ring::Ring;
use crate::types::Epoch;

use super::driver::is_decided;
use super::rings::reverted;
use super::scene::{Scene, Transition, Views};

/// How a change ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Its ring came into force.
    Done,
    /// The ring before it went on.
    CalledOff,
}

/// A change of which somebody awaits the end.
#[derive(Debug, Clone, PartialEq)]
pub struct Awaited {
    /// The epoch of its ring.
    epoch: Epoch,
    /// The ring that comes of it if it is called off.
    off: Ring,
    fate: Option<Fate>,
}

impl Awaited {
    /// The change from one ring to the next.
    pub fn change(transition: &Transition) -> Self {
        Self { epoch: transition.epoch(), off: reverted(&transition.old), fate: None }
    }

    /// The change that is under way, if one is.
    pub fn under_way(scene: &Scene) -> Option<Self> {
        match scene {
            Scene::Changing(transition) => Some(Self::change(transition)),
            Scene::Reverting(off) => {
                Some(Self { epoch: off.epoch - 1, off: off.clone(), fate: None })
            }
            Scene::NoRing | Scene::Quiet { .. } => None,
        }
    }

    /// The epoch of its ring.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The ring that comes of it if it is called off.
    pub fn off(&self) -> &Ring {
        &self.off
    }

    /// How it ended, or is sure to; `None` while nothing that was seen tells.
    pub fn fate(&self) -> Option<Fate> {
        self.fate
    }

    /// Learns what some views tell.
    pub fn see(&mut self, views: &Views) {
        let is_sure = match Scene::of(views) {
            Scene::Changing(transition) => {
                transition.epoch() == self.epoch && is_decided(views, &transition)
            }
            _ => false,
        };
        let mut rings = views.values().map(|view| view.ring.ring());
        // Only a change to its ring leads from there to another one of the epoch at which it is called off.
        let is_beyond = |ring: &Ring| {
            ring.epoch == self.epoch || self.is_later(ring) && ring.epoch == self.off.epoch
        };
        if is_sure || rings.clone().any(is_beyond) {
            // Also when the ring that was has been seen again: somebody may have changed back to it.
            self.fate = Some(Fate::Done);
        } else if rings.any(|ring| *ring == self.off) {
            self.fate.get_or_insert(Fate::CalledOff);
        }
    }

    /// Whether it is over because a later change is under way, or over, too: none begins before the one
    /// before it is recorded as finished.
    pub fn is_followed(&self, scene: &Scene) -> bool {
        match scene {
            Scene::NoRing => false,
            Scene::Changing(transition) => transition.epoch() > self.epoch,
            Scene::Reverting(ring) | Scene::Quiet { ring, .. } => self.is_later(ring),
        }
    }

    /// Whether it has not begun where this scene was seen: then that is out of date.
    pub fn is_ahead_of(&self, scene: &Scene) -> bool {
        matches!(scene, Scene::Quiet { ring, .. } if ring.epoch < self.epoch)
    }

    fn is_later(&self, ring: &Ring) -> bool {
        ring.epoch > self.epoch && *ring != self.off
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{id, ring};
    use super::*;
    use crate::handoff::RingState;
    use crate::ring::RingTable;

    /// Clusters that live by these rings.
    fn views(rings: &[&Ring]) -> Views {
        let state = |ring: &&Ring| RingState::with_ring(RingTable::new((*ring).clone()).unwrap());
        let ids = ["a", "b", "c"].map(id);
        ids.into_iter().zip(rings.iter().map(state)).collect()
    }

    fn weighted(epoch: Epoch, weight: f32) -> Ring {
        ring(epoch, &[("a", 1.0), ("b", weight)])
    }

    /// What becomes known of the change from epoch 4, with weight 1, to epoch 5, with weight 2.
    fn fate(seen: &[&[&Ring]]) -> Option<Fate> {
        let (old, next) = (weighted(4, 1.0), weighted(5, 2.0));
        let mut awaited = Awaited::change(&Transition::new(&old, &next, &Views::new()));
        seen.iter().for_each(|rings| awaited.see(&views(rings)));
        awaited.fate()
    }

    #[test]
    fn what_was_seen_tells_and_nothing_else_does() {
        let (old, next, off) = (weighted(4, 1.0), weighted(5, 2.0), weighted(6, 1.0));
        let (other, far) = (weighted(6, 3.0), weighted(7, 2.0));
        assert_eq!(fate(&[&[&old, &old]]), None);
        assert_eq!(fate(&[&[&old, &next]]), Some(Fate::Done));
        assert_eq!(fate(&[&[&old, &off]]), Some(Fate::CalledOff));
        assert_eq!(fate(&[&[&other]]), Some(Fate::Done), "it leads on from epoch 5 alone");
        assert_eq!(fate(&[&[&far]]), None, "it may be of either");
        assert_eq!(fate(&[&[&off], &[&far]]), Some(Fate::CalledOff));
        assert_eq!(fate(&[&[&next], &[&far]]), Some(Fate::Done));
        assert_eq!(fate(&[&[&next], &[&off]]), Some(Fate::Done), "done, and changed back");
        assert_eq!(fate(&[&[&off], &[&next, &off]]), Some(Fate::Done), "done, and changed back");
    }

    #[test]
    fn a_later_change_shows_that_it_is_over() {
        let (old, next, off) = (weighted(4, 1.0), weighted(5, 2.0), weighted(6, 1.0));
        let awaited = Awaited::change(&Transition::new(&old, &next, &Views::new()));
        let changing =
            |old: &Ring, next: &Ring| Scene::Changing(Transition::new(old, next, &Views::new()));
        let quiet = |ring: &Ring| Scene::Quiet { ring: ring.clone(), settled: Some(true) };
        for own in [changing(&old, &next), quiet(&next), quiet(&off), Scene::Reverting(off.clone())]
        {
            assert!(!awaited.is_followed(&own), "{own:?}");
            assert!(!awaited.is_ahead_of(&own), "{own:?}");
        }
        assert!(awaited.is_ahead_of(&quiet(&old)));
        for later in [
            changing(&next, &weighted(6, 3.0)),
            changing(&off, &weighted(7, 3.0)),
            quiet(&weighted(6, 3.0)),
            quiet(&weighted(7, 1.0)),
            Scene::Reverting(weighted(7, 2.0)),
        ] {
            assert!(awaited.is_followed(&later), "{later:?}");
        }
    }

    #[test]
    fn what_is_under_way_may_be_called_off_already() {
        let (old, next, off) = (weighted(4, 1.0), weighted(5, 2.0), weighted(6, 1.0));
        let transition = Transition::new(&old, &next, &Views::new());
        let awaited = Awaited::change(&transition);
        assert_eq!(Awaited::under_way(&Scene::Changing(transition)), Some(awaited.clone()));
        assert_eq!(Awaited::under_way(&Scene::Reverting(off)), Some(awaited));
        let quiet = Scene::Quiet { ring: old, settled: Some(true) };
        assert_eq!(Awaited::under_way(&quiet), None);
    }
}
