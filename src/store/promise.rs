//! To whom this node has promised its vote.

use std::sync::{Arc, Mutex, PoisonError};

use crate::types::{LeaderId, Vote};

/// The latest candidate or leader that this node may have promised its vote to. Clones share it.
///
/// It is raised before the promise goes to disk, and a promise is given only after that. So whoever
/// sees here that a node has promised nothing later than a leader knows more than that: until this
/// moment, no later leader was elected with this node's vote. It outlives a restart, because a promise
/// that was given is on disk.
///
/// A node that takes part in Raft has promised something: it follows a leader that it has heard, or has voted,
/// and no entry of the log is there before that. So one without a promise is new, or has lost its data and its
/// promises with it. Nobody who is new is asked: to become a voter, a node follows first.
#[derive(Debug, Clone, Default)]
pub struct Promise(Arc<Mutex<Option<LeaderId>>>);

impl Promise {
    pub(super) fn new(vote: Option<Vote>) -> Self {
        Self(Arc::new(Mutex::new(vote.map(|vote| vote.leader_id))))
    }

    pub(super) fn raise(&self, leader: LeaderId) {
        let mut promised = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *promised = (*promised).max(Some(leader));
    }

    /// The term that this node has reached; 0 before its first.
    pub fn term(&self) -> u64 {
        self.promised().map_or(0, |leader| leader.term)
    }

    /// Whether this node never promised anything.
    pub fn is_none(&self) -> bool {
        self.promised().is_none()
    }

    /// Whether promises are known here, and none was begun to anyone later than `leader`.
    pub fn none_after(&self, leader: LeaderId) -> bool {
        self.promised().is_some_and(|promised| promised <= leader)
    }

    fn promised(&self) -> Option<LeaderId> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_only_grows() {
        let leader = |term, node_id| LeaderId { term, node_id };
        let promise = Promise::new(None);
        assert!(promise.is_none());
        // It may have been lost.
        assert!(!promise.none_after(leader(9, 9)));
        promise.raise(leader(3, 2));
        assert!(!promise.is_none());
        promise.raise(leader(2, 9));
        assert!(promise.none_after(leader(3, 2)) && promise.none_after(leader(4, 1)));
        // Of two candidates of one term, the one with the higher id may follow the other.
        assert!(!promise.none_after(leader(3, 1)) && !promise.none_after(leader(2, 9)));
    }
}
