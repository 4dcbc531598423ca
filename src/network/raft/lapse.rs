//! A lease that was given up for good, and the leader that turns out to live.
//!
//! Raft's lease of a leader keeps a node from helping to depose it while it is heard. Who takes the leader
//! for ended gives the lease up ([`super::deathwatch`]), and openraft has no way to take that back: until
//! another leader is elected, this node would vote for whoever asks, however alive the leader is. So what
//! openraft does no more is done here: when the leader is heard again, pre-votes are refused for as long as
//! it is. That is enough: without them nobody stands for election, except whom the leader itself asks to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::types::Vote;

/// Of one node.
pub(super) struct Lapse {
    lease: Duration,
    /// Whether there ever was one: most leaders never lose their lease.
    any: AtomicBool,
    last: Mutex<Option<GivenUp>>,
}

struct GivenUp {
    vote: Vote,
    at: Instant,
    /// When the leader was last heard. What comes within a lease does not count: it may have been on its way
    /// when the lease was given up.
    heard: Option<Instant>,
}

impl Lapse {
    /// `lease`: for how long a leader that was heard is not to be deposed.
    pub(super) fn new(lease: Duration) -> Self {
        Self { lease, any: AtomicBool::new(false), last: Mutex::default() }
    }

    /// The lease of the leader with this vote is given up.
    pub(super) fn begin(&self, vote: Vote, now: Instant) {
        *self.last() = Some(GivenUp { vote, at: now, heard: None });
        self.any.store(true, Ordering::Release);
    }

    /// The leader with this vote was heard. Costs next to nothing while no lease was given up.
    pub(super) fn heard(&self, vote: &Vote) {
        if self.any.load(Ordering::Acquire) {
            self.heard_at(vote, Instant::now());
        }
    }

    fn heard_at(&self, vote: &Vote, now: Instant) {
        if let Some(given_up) = &mut *self.last()
            && given_up.vote == *vote
            && now > given_up.at + self.lease
        {
            given_up.heard = Some(now);
        }
    }

    /// Whether the leader whose lease was given up lives, and is not to be deposed.
    pub(super) fn was_mistaken(&self, now: Instant) -> bool {
        let heard = self.last().as_ref().and_then(|given_up| given_up.heard);
        heard.is_some_and(|heard| now < heard + self.lease)
    }

    fn last(&self) -> MutexGuard<'_, Option<GivenUp>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LeaderId;

    #[test]
    fn a_leader_that_is_heard_after_its_lease_was_given_up_has_it_again() {
        let lease = Duration::from_millis(250);
        let vote = |term| Vote { leader_id: LeaderId { term, node_id: 1 }, committed: true };
        let (lapse, start) = (Lapse::new(lease), Instant::now());
        assert!(!lapse.was_mistaken(start));
        lapse.begin(vote(3), start);
        // What was on its way when it ended says nothing, and nor does what others say.
        lapse.heard_at(&vote(3), start + lease / 2);
        lapse.heard_at(&vote(4), start + 2 * lease);
        assert!(!lapse.was_mistaken(start + 2 * lease));
        lapse.heard_at(&vote(3), start + 3 * lease);
        assert!(lapse.was_mistaken(start + 3 * lease));
        assert!(lapse.was_mistaken(start + 4 * lease - Duration::from_millis(1)));
        assert!(!lapse.was_mistaken(start + 4 * lease), "it is silent");
        // The next one's end, or the same one's, is another matter.
        lapse.heard_at(&vote(3), start + 5 * lease);
        lapse.begin(vote(3), start + 5 * lease);
        assert!(!lapse.was_mistaken(start + 5 * lease));
    }
}
