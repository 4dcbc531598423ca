//! To whom this node has promised its vote, and for how long it keeps it for who leads.
//!
//! A leader that asks whether it is confirmed may ask for a *lease*: not to be deposed with this node's vote
//! for some milliseconds ([`Promise::confirm`]). The node keeps to it by holding every later promise back until
//! they have passed, in the one place through which all of them go, its own candidacy, too
//! ([`Promise::raise`]). A leader that a majority gave a lease has no successor before the lease is over: whose
//! vote made that one a leader, of those who gave the lease? None before it gave the lease, or it would have
//! refused; none after that, or it would have held it back. A lease is given only to whom the vote is promised. One
//! that is replaced by a later leader's has ended: whoever made that one a leader waited for it, or was the earlier
//! leader itself, whose own lease ends with its vote for another.
//!
//! A restart forgets leases that were given, so for the longest time that one lasts no later promise is given
//! after a start, whatever is configured. By default that is less than an election takes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::config::READ_LEASE_MS_MAX;
use crate::types::{LeaderId, LogId, Vote};

/// The longest lease.
pub const LEASE_MAX: Duration = Duration::from_millis(READ_LEASE_MS_MAX);

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
pub struct Promise(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    promised: Option<LeaderId>,
    /// The lease that was given last.
    given: Option<Lease>,
    /// The lease that this node itself has as a leader.
    held: Option<Lease>,
    /// The last change of the membership that came into the log since the start.
    membership: Option<LogId>,
}

impl State {
    fn held_back(&self, candidate: LeaderId) -> Option<Instant> {
        let given = self.given.filter(|lease| lease.leader < candidate)?;
        (Instant::now() < given.until).then_some(given.until)
    }
}

/// No later leader before a time.
#[derive(Debug, Clone, Copy)]
struct Lease {
    leader: LeaderId,
    until: Instant,
}

impl Promise {
    pub(super) fn new(vote: Option<Vote>) -> Self {
        let promised = vote.map(|vote| vote.leader_id);
        // Whoever leads may have a lease that was given before the restart.
        let given = promised.map(|leader| Lease { leader, until: Instant::now() + LEASE_MAX });
        Self(Arc::new(Mutex::new(State { promised, given, ..State::default() })))
    }

    /// Begins a promise, and returns once it may be given: when no lease of an earlier leader is left. Ends this
    /// node's own lease.
    pub(super) async fn raise(&self, leader: LeaderId) {
        let held_back = {
            let mut state = self.lock();
            state.promised = state.promised.max(Some(leader));
            state.held = state.held.filter(|lease| lease.leader >= leader);
            state.held_back(leader)
        };
        if let Some(until) = held_back {
            sleep_until(until).await;
        }
    }

    /// The membership is about to change by this entry. Ends this node's own lease: its majority may not be
    /// one any more.
    pub(super) fn membership_changes(&self, by: LogId) {
        let mut state = self.lock();
        state.membership = Some(by);
        state.held = None;
    }

    /// The log was cut after this entry: a membership behind it is none any more.
    pub(super) fn log_was_cut(&self, last: Option<&LogId>) {
        let mut state = self.lock();
        if state.membership.as_ref() > last {
            state.membership = None;
        }
    }

    /// The term that this node has reached; 0 before its first.
    pub fn term(&self) -> u64 {
        self.lock().promised.map_or(0, |leader| leader.term)
    }

    /// Whether this node never promised anything.
    pub fn is_none(&self) -> bool {
        self.lock().promised.is_none()
    }

    /// Whether promises are known here, and none was begun to anyone later than `leader`.
    pub fn none_after(&self, leader: LeaderId) -> bool {
        self.lock().promised.is_some_and(|promised| promised <= leader)
    }

    /// The same; if so, none is given to anyone later for as long as `lease`, at most [`LEASE_MAX`]. That much it
    /// says only to whom it has promised its vote.
    pub fn confirm(&self, leader: LeaderId, lease: Duration) -> bool {
        let mut state = self.lock();
        if state.promised.is_none_or(|promised| promised > leader) {
            return false;
        }
        if !lease.is_zero() {
            if state.promised != Some(leader) {
                return false;
            }
            let until = Instant::now() + lease.min(LEASE_MAX);
            let until = state.given.map_or(until, |before| before.until.max(until));
            state.given = Some(Lease { leader, until });
        }
        true
    }

    /// Until when a promise to this candidate would be held back, if it would.
    pub fn held_back(&self, candidate: LeaderId) -> Option<Instant> {
        self.lock().held_back(candidate)
    }

    /// Returns once no lease is left that this node gave, so that it may stand for election itself.
    pub async fn await_end_of_leases(&self) {
        let given = self.lock().given;
        if let Some(lease) = given {
            sleep_until(lease.until).await;
        }
    }

    /// Whether this membership is the newest that this node knows of. A newer one may have come by a snapshot, and
    /// not through the log.
    pub fn is_newest_membership(&self, id: Option<&LogId>) -> bool {
        self.lock().membership.as_ref() <= id
    }

    /// This node leads, and a majority of this membership has given it a lease until then.
    pub fn hold(&self, leader: LeaderId, membership: Option<&LogId>, until: Instant) {
        let mut state = self.lock();
        if state.promised == Some(leader) && state.membership.as_ref() <= membership {
            state.held = Some(Lease { leader, until });
        }
    }

    /// As what this node leads without a successor at this moment, by the lease that it has.
    pub fn leads_alone(&self) -> Option<LeaderId> {
        let held = self.lock().held?;
        (Instant::now() < held.until).then_some(held.leader)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use tokio::time::{sleep, timeout};

    const MOMENT: Duration = Duration::from_millis(1);
    const NO_LEASE: Duration = Duration::ZERO;

    fn leader(term: u64, node_id: u64) -> LeaderId {
        LeaderId { term, node_id }
    }

    fn promised_now(term: u64, node_id: u64) -> Promise {
        Promise::new(Some(Vote { leader_id: leader(term, node_id), committed: true }))
    }

    /// One that promised this, and was started long ago.
    async fn promised(term: u64, node_id: u64) -> Promise {
        let promise = promised_now(term, node_id);
        sleep(LEASE_MAX).await;
        promise
    }

    /// Whether a promise may be given at once. Begins it.
    fn is_free(promise: &Promise, to: LeaderId) -> bool {
        promise.raise(to).now_or_never().is_some()
    }

    #[tokio::test]
    async fn a_promise_only_grows() {
        let promise = Promise::new(None);
        assert!(promise.is_none());
        // It may have been lost.
        assert!(!promise.none_after(leader(9, 9)) && !promise.confirm(leader(9, 9), LEASE_MAX));
        promise.raise(leader(3, 2)).await;
        assert!(!promise.is_none());
        promise.raise(leader(2, 9)).await;
        assert!(promise.none_after(leader(3, 2)) && promise.none_after(leader(4, 1)));
        // Of two candidates of one term, the one with the higher id may follow the other.
        assert!(!promise.none_after(leader(3, 1)) && !promise.none_after(leader(2, 9)));
    }

    /// The heart of it: who gave a lease votes for nobody else, itself included, before that is over.
    #[tokio::test]
    async fn a_lease_holds_later_promises_back() {
        let promise = promised(3, 1).await;
        assert!(promise.confirm(leader(3, 1), NO_LEASE));
        assert!(is_free(&promise, leader(4, 2)));

        let promise = promised(3, 1).await;
        let begun = Instant::now();
        assert!(promise.confirm(leader(3, 1), 80 * MOMENT));
        assert!(promise.confirm(leader(3, 1), MOMENT), "takes nothing back");
        assert!(is_free(&promise, leader(3, 1)), "its own leader");
        assert!(!is_free(&promise, leader(3, 2)));
        promise.raise(leader(4, 2)).await;
        assert!(begun.elapsed() >= 80 * MOMENT);
        assert!(is_free(&promise, leader(5, 2)), "it is over");

        // Nobody can ask for more than is waited for after a start.
        let promise = promised(3, 1).await;
        assert!(promise.confirm(leader(3, 1), Duration::from_secs(3600)));
        timeout(Duration::from_secs(60), promise.raise(leader(4, 2))).await.expect("the bound");
    }

    /// One that is about to vote for another gives none: else it would never get to it.
    #[tokio::test]
    async fn a_promise_that_is_held_back_has_begun() {
        let promise = promised(3, 1).await;
        assert!(promise.confirm(leader(3, 1), LEASE_MAX));
        assert!(!is_free(&promise, leader(4, 2)));
        assert!(!promise.confirm(leader(3, 1), LEASE_MAX) && !promise.none_after(leader(3, 1)));
        assert!(promise.confirm(leader(4, 2), NO_LEASE));
    }

    /// Else whoever calls itself a leader could take the place of the lease of the one that is.
    #[tokio::test]
    async fn only_the_leader_of_the_last_promise_gets_a_lease() {
        let promise = promised(3, 1).await;
        assert!(promise.confirm(leader(3, 1), LEASE_MAX));
        assert!(promise.confirm(leader(9, 9), NO_LEASE));
        assert!(!promise.confirm(leader(9, 9), MOMENT));
        assert!(promise.held_back(leader(4, 3)).is_some());
        assert!(promise.held_back(leader(3, 1)).is_none(), "its own");
        promise.await_end_of_leases().await;
        assert!(promise.held_back(leader(4, 3)).is_none());
    }

    #[tokio::test]
    async fn a_start_holds_promises_back_as_if_a_lease_had_been_given() {
        let begun = Instant::now();
        let promise = promised_now(3, 1);
        assert!(is_free(&promise, leader(3, 1)));
        assert!(!is_free(&promise, leader(4, 2)));
        promise.raise(leader(4, 2)).await;
        assert!(begun.elapsed() >= LEASE_MAX);
        assert!(is_free(&Promise::new(None), leader(4, 2)), "there was nobody to give one to");
    }

    #[tokio::test]
    async fn a_held_lease_ends_with_its_time_its_term_and_its_membership() {
        let own = leader(3, 1);
        let long = Instant::now() + Duration::from_secs(3600);
        let [first, second] = [5, 9].map(|index| LogId { leader_id: own, index });
        let promise = promised_now(3, 1);
        assert_eq!(promise.leads_alone(), None);
        promise.hold(leader(2, 1), None, long);
        assert_eq!(promise.leads_alone(), None, "not any more");
        promise.hold(own, Some(&first), long);
        assert_eq!(promise.leads_alone(), Some(own));
        assert!(!is_free(&promise, leader(4, 2)));
        assert_eq!(promise.leads_alone(), None, "it votes for another");

        let promise = promised_now(3, 1);
        promise.hold(own, Some(&first), long);
        promise.membership_changes(second);
        assert_eq!(promise.leads_alone(), None);
        promise.hold(own, Some(&first), long);
        assert_eq!(promise.leads_alone(), None, "its voters were asked before the change");
        assert!(!promise.is_newest_membership(Some(&first)));
        assert!(promise.is_newest_membership(Some(&second)));
        promise.hold(own, Some(&second), long);
        assert_eq!(promise.leads_alone(), Some(own));
        promise.hold(own, Some(&second), Instant::now());
        assert_eq!(promise.leads_alone(), None, "its time is over");
    }
}
