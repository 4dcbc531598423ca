//! Which followers get entries at once, and which get them a little later, several at a time.
//!
//! An entry is committed when a majority has it on disk: the leader and as few followers as make one.
//! The others, the *spares*, are sent what has come together once a pause. With three nodes and one
//! client that halves what the leader sends, and spares one of the followers most of its messages,
//! fsyncs and turns. (The idea is EPaxos's "thrifty" mode: Moraru, Andersen, Kaminsky, SOSP 2013. There
//! the others get nothing unless a message is lost; here they get everything, soon.)
//!
//! Nothing is promised less. Who counts towards a majority, and when, is Raft's business and is not
//! touched: an append may be late on any network. What it can cost is time, and these rules bound it:
//!
//! - The first entries after a pause go at once: only a follower that was just sent something waits.
//! - A follower makes another one a spare only while it is *in time*: it has answered in this session, as far
//!   as the spare at least, and owes no answer for longer than a moment ([`super::pacer`]). So one that
//!   is gone, silent, slow, new or catching up does not. When one stops being in time, it becomes the last in
//!   the order, and the others get at once what they have not been sent.
//! - When as many followers as make a majority have answered an entry and it is not committed within a
//!   moment, this node's own disk is what is slow, and for a while there are no spares ([`DOUBT_PAUSES`]).
//! - A spare that answers at least twice as fast as another follower takes its place.
//! - A follower that is asked for a linearizable read is sent at once what it needs for it.
//! - While a membership is joint, or not known, there are no spares. Learners are none, and make none.
//!
//! Under more load than followers keep up with, none of them is in time, and all are sent everything at once.
//!
//! After a leader is lost, a spare lacks the entries of its last pause, so it may lose the election that it
//! begins, and the other one's, which begins soon after it, decides.
//!
//! What knows the membership here also tells greetings who is a voter ([`super::greeting`]).
//!
//! The state is an order of followers, the first of which are not spares. It belongs to one node's
//! network; a node that does not lead has an empty one.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::types::{LogId, NodeId, StoredMembership};

/// Answers of which the fastest is taken for how fast a follower is: one in so many is undisturbed.
const WINDOW: u32 = 64;

/// How many times as fast a spare must be to take another one's place. Both share processors and disks
/// with others; what is less does not pay for the change.
const FASTER: u32 = 2;

/// For how many pauses nobody is a spare after this node's own disk was slow: one write in so long a time
/// finds out whether it still is.
const DOUBT_PAUSES: u32 = 10;

type Members = Box<dyn Fn() -> Arc<StoredMembership> + Send + Sync>;

/// The followers of this node in the order in which they are preferred.
pub(in crate::network) struct Thrift {
    own: NodeId,
    pause: Duration,
    members: OnceLock<Members>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    order: Vec<Follower>,
    /// Until when nobody is a spare.
    doubt_until: Option<Instant>,
}

struct Follower {
    id: NodeId,
    signals: Arc<Signals>,
    /// The last entry that it is known to have on disk.
    appended: Option<LogId>,
    /// Whether it owes an answer for too long.
    overdue: bool,
    /// The fastest answer of the window before this one.
    fastest: Option<Duration>,
    window: Window,
}

/// What a follower's sender is told.
#[derive(Default)]
struct Signals {
    /// The order has changed, perhaps in its favour: it need not pause.
    moved: Notify,
    /// It is asked for a read: nothing is to be held back.
    asked: Notify,
}

/// What a follower is to a majority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// There are no spares, or it is no voter.
    Apart,
    Needed,
    Spare,
}

#[derive(Default)]
struct Window {
    answers: u32,
    fastest: Option<Duration>,
}

impl Thrift {
    /// Spares are sent entries every `pause` at most; with none there are no spares.
    pub(in crate::network) fn new(own: NodeId, pause: Duration) -> Self {
        Self { own, pause, members: OnceLock::new(), state: Mutex::default() }
    }

    /// Tells where the membership is looked up. Until then, there are no spares.
    pub(in crate::network) fn know_members(&self, members: Members) {
        // A second one would say the same.
        let _ = self.members.set(members);
    }

    /// Whether a node is a voter. Until the membership is known, nobody is.
    pub(in crate::network) fn has_voter(&self, id: NodeId) -> bool {
        let Some(members) = self.members.get() else { return false };
        members().membership().voter_ids().any(|voter| voter == id)
    }

    /// A place for the session of appends to `id`.
    pub(in crate::network) fn seat(self: &Arc<Self>, id: NodeId) -> Seat {
        Seat { thrift: Arc::clone(self), id, signals: Arc::default() }
    }

    /// A follower needs what it has not been sent yet: it is asked for a read.
    pub(in crate::network) fn hurry(&self, id: NodeId) {
        let state = self.state();
        let asked = state.order.iter().filter(|follower| follower.id == id);
        asked.for_each(|follower| follower.signals.asked.notify_one());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The voters, where there may be spares among them, and how many followers a majority needs.
    fn with_voters<T>(&self, judge: impl FnOnce(&BTreeSet<NodeId>, usize) -> T) -> Option<T> {
        let members = self.members.get().filter(|_| !self.pause.is_zero())?;
        let membership = members();
        let [voters] = membership.membership().get_joint_config().as_slice() else { return None };
        let needed = voters.len() / 2 + 1 - usize::from(voters.contains(&self.own));
        Some(judge(voters, needed))
    }

    fn standing(&self, seat: &Seat, now: Instant) -> Standing {
        let judged = self.with_voters(|voters, needed| {
            if !voters.contains(&seat.id) {
                return Standing::Apart;
            }
            self.state().standing(seat, voters, needed, now)
        });
        judged.unwrap_or(Standing::Apart)
    }
}

impl State {
    /// A voter is a spare when a majority is made by followers that come before it.
    fn standing(
        &self,
        seat: &Seat,
        voters: &BTreeSet<NodeId>,
        needed: usize,
        now: Instant,
    ) -> Standing {
        let Some(place) = self.place_of(seat) else { return Standing::Needed };
        if self.doubt_until.is_some_and(|until| now < until) {
            return Standing::Needed;
        }
        let own = &self.order[place];
        let before = if own.overdue { self.order.len() } else { place };
        let in_time = |other: &&Follower| !other.overdue && other.appended >= own.appended;
        let before = self.order[..before].iter().filter(in_time);
        let voters_before = before.filter(|other| voters.contains(&other.id)).count();
        if voters_before >= needed { Standing::Spare } else { Standing::Needed }
    }

    fn place_of(&self, seat: &Seat) -> Option<usize> {
        self.order.iter().position(|follower| follower.is(seat))
    }

    /// Tells all followers but one that the order has changed.
    fn tell_all_but(&self, seat: &Seat) {
        let others = self.order.iter().filter(|follower| !follower.is(seat));
        others.for_each(|follower| follower.signals.moved.notify_one());
    }
}

/// The place of one session in the order, given up when it is dropped.
pub(in crate::network) struct Seat {
    thrift: Arc<Thrift>,
    id: NodeId,
    signals: Arc<Signals>,
}

impl Seat {
    /// The follower has everything up to `last`. `took`: how long it took to answer what brought entries.
    /// `overdue`: it still owes an answer for too long.
    pub(in crate::network) fn appended(
        &self,
        last: Option<LogId>,
        took: Option<Duration>,
        overdue: bool,
    ) {
        let mut state = self.thrift.state();
        let place = state.place_of(self).unwrap_or_else(|| {
            state.order.push(Follower::new(self));
            state.order.len() - 1
        });
        let order = &mut state.order;
        order[place].appended = last;
        order[place].overdue = overdue;
        let Some(fastest) = took.and_then(|took| order[place].fastest_of_window(took)) else {
            return;
        };
        let slower = |other: &Follower| other.fastest >= Some(FASTER * fastest);
        if let Some(other) = order[..place].iter().position(slower) {
            order.swap(other, place);
            // What was measured before counts no more: the next change takes a window at least.
            order[other].forget();
            order[place].forget();
            order[other].signals.moved.notify_one();
        }
    }

    /// How long the next entries wait for more to come, now that some were sent; `None` if they do not.
    pub(in crate::network) fn pause(&self, now: Instant) -> Option<Duration> {
        // What was said before this pause does not end it.
        self.signals.moved.notified().now_or_never();
        (self.thrift.standing(self, now) == Standing::Spare).then_some(self.thrift.pause)
    }

    /// The follower has not answered for too long: it comes last, and if a majority needed it the others
    /// are sent now what they have not been sent.
    pub(in crate::network) fn overdue(&self, now: Instant) {
        let standing = self.thrift.standing(self, now);
        let mut state = self.thrift.state();
        let Some(place) = state.place_of(self) else { return };
        state.order[place].overdue = true;
        state.order[place..].rotate_left(1);
        if standing == Standing::Needed {
            state.tell_all_but(self);
        }
    }

    /// An entry that the follower has answered is not committed. If it is the leader that a majority lacks,
    /// nobody is a spare for a while.
    pub(in crate::network) fn uncommitted(&self, entry: Option<LogId>, now: Instant) {
        self.thrift.with_voters(|voters, needed| {
            let mut state = self.thrift.state();
            let has_it = |other: &&Follower| other.appended >= entry && voters.contains(&other.id);
            if state.order.iter().filter(has_it).count() >= needed {
                state.doubt_until = Some(now + DOUBT_PAUSES * self.thrift.pause);
                state.tell_all_but(self);
            }
        });
    }

    /// Resolves when this follower need perhaps not pause any more. Cancel safe.
    pub(in crate::network) async fn moved(&self) {
        self.signals.moved.notified().await;
    }

    /// Resolves when nothing is to be held back from this follower. Cancel safe.
    pub(in crate::network) async fn asked(&self) {
        self.signals.asked.notified().await;
    }
}

impl Follower {
    fn new(seat: &Seat) -> Self {
        Self {
            id: seat.id,
            signals: Arc::clone(&seat.signals),
            appended: None,
            overdue: false,
            fastest: None,
            window: Window::default(),
        }
    }

    fn is(&self, seat: &Seat) -> bool {
        Arc::ptr_eq(&self.signals, &seat.signals)
    }

    /// Counts an answer; the fastest one when a window ends with it.
    fn fastest_of_window(&mut self, took: Duration) -> Option<Duration> {
        let window = &mut self.window;
        window.answers += 1;
        window.fastest = Some(window.fastest.map_or(took, |fastest| fastest.min(took)));
        if window.answers < WINDOW {
            return None;
        }
        self.fastest = std::mem::take(window).fastest;
        self.fastest
    }

    fn forget(&mut self) {
        self.fastest = None;
        self.window = Window::default();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.thrift.state();
        state.order.retain(|follower| !follower.is(self));
        state.tell_all_but(self);
    }
}
