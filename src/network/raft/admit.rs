//! The places of peer connections: a few for strangers, one for each peer and purpose.
//!
//! A greeting proves nothing: whoever reaches the port can greet with invented ids. So who is not in
//! this node's membership is a stranger, greeted or not, and strangers share a few places and make room
//! for each other. They are not refused, because a node that this one has not heard of yet may well
//! belong: this one is new itself, or lags behind. **Members get their places whatever strangers hold.**

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::network::peer::Purpose;
use crate::network::peer::closer::{CloseReason, Closer};
use crate::types::NodeId;

use super::visitors::Visit;

/// Greeted connections of nodes that are not in the membership. A new node is reached by one leader with
/// three connections; the rest is room for leaders that follow one another and for strangers.
const STRANGERS_MAX: usize = 16;

/// Connections that have not greeted yet, oldest first.
pub(super) struct Greetings {
    max: usize,
    waiting: Mutex<VecDeque<(u64, CancellationToken)>>,
    ids: Ids,
}

/// One of them. Gives its place back when dropped.
pub(super) struct Greeting<'a> {
    all: &'a Greetings,
    id: u64,
    evicted: CancellationToken,
}

impl Greetings {
    pub(super) fn new(max: usize) -> Self {
        Self { max, waiting: Mutex::default(), ids: Ids::default() }
    }

    /// Takes a place, the oldest one's if there is no other.
    pub(super) fn enter(&self) -> Greeting<'_> {
        let (id, evicted) = (self.ids.next(), CancellationToken::new());
        let mut waiting = lock(&self.waiting);
        if waiting.len() == self.max
            && let Some((_, oldest)) = waiting.pop_front()
        {
            oldest.cancel();
        }
        waiting.push_back((id, evicted.clone()));
        Greeting { all: self, id, evicted }
    }
}

impl Greeting<'_> {
    /// Returns when the place was given to another. Cancel safe.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for Greeting<'_> {
    fn drop(&mut self) {
        lock(&self.all.waiting).retain(|(id, _)| *id != self.id);
    }
}

/// Connections that have greeted, at most one for each node and purpose.
pub(super) struct Greeted {
    members_max: usize,
    places: Mutex<Places>,
    ids: Ids,
}

type Places = HashMap<(NodeId, Purpose), (u64, Closer)>;

/// The place of a connection that has greeted. Given back when dropped.
pub(super) enum Place<'a> {
    /// Of a node that says it is of this node's cluster.
    Peer(PeerPlace<'a>),
    /// Of another cluster's.
    Visitor(Visit<'a>),
}

impl Place<'_> {
    /// Closes this connection.
    pub(super) fn closer(&self) -> &Closer {
        match self {
            Self::Peer(place) => &place.closer,
            Self::Visitor(visit) => visit.closer(),
        }
    }

    /// Whether it was a member's when it was taken.
    pub(super) fn is_member(&self) -> bool {
        matches!(self, Self::Peer(PeerPlace { member: true, .. }))
    }
}

/// The place of one of them. Given back when dropped.
pub(super) struct PeerPlace<'a> {
    all: &'a Greeted,
    key: (NodeId, Purpose),
    id: u64,
    closer: Closer,
    member: bool,
}

impl Greeted {
    /// `members_max` bounds the members' places; those of strangers come on top.
    pub(super) fn new(members_max: usize) -> Self {
        Self { members_max, places: Mutex::default(), ids: Ids::default() }
    }

    /// Takes a place, and closes the connection that held it. A stranger takes the oldest stranger's
    /// if there is no other; `None` when it is a member and other members hold all of theirs.
    ///
    /// Who is a member is asked anew for all: who came as a stranger may be one by now.
    pub(super) fn enter(
        &self,
        key: (NodeId, Purpose),
        closer: Closer,
        members: &HashSet<NodeId>,
    ) -> Option<PeerPlace<'_>> {
        let id = self.ids.next();
        let member = members.contains(&key.0);
        let mut places = lock(&self.places);
        if let Some((_, older)) = places.remove(&key) {
            older.close(CloseReason::Superseded);
        }
        if !member {
            evict_strangers(&mut places, members);
        } else if places.keys().filter(|(node, _)| members.contains(node)).count()
            >= self.members_max
        {
            return None;
        }
        places.insert(key, (id, closer.clone()));
        Some(PeerPlace { all: self, key, id, closer, member })
    }
}

/// Makes room for one more stranger.
fn evict_strangers(places: &mut Places, members: &HashSet<NodeId>) {
    let mut strangers: Vec<_> = places
        .iter()
        .filter(|((node, _), _)| !members.contains(node))
        .map(|(key, (id, _))| (*id, *key))
        .collect();
    strangers.sort_unstable_by_key(|(id, _)| *id);
    let over = (strangers.len() + 1).saturating_sub(STRANGERS_MAX);
    for (_, key) in &strangers[..over] {
        if let Some((_, oldest)) = places.remove(key) {
            oldest.close(CloseReason::Evicted);
        }
    }
}

impl Drop for PeerPlace<'_> {
    fn drop(&mut self) {
        self.closer.close(CloseReason::Local);
        let mut places = lock(&self.all.places);
        if places.get(&self.key).is_some_and(|(id, _)| *id == self.id) {
            places.remove(&self.key);
        }
    }
}

#[derive(Default)]
pub(super) struct Ids(std::sync::atomic::AtomicU64);

impl Ids {
    pub(super) fn next(&self) -> u64 {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closer() -> Closer {
        Closer::under(&CancellationToken::new())
    }

    #[test]
    fn the_oldest_stranger_makes_room() {
        let greetings = Greetings::new(2);
        let (first, second) = (greetings.enter(), greetings.enter());
        let third = greetings.enter();
        assert!(first.evicted.is_cancelled());
        assert!(!second.evicted.is_cancelled() && !third.evicted.is_cancelled());
        drop(second);
        let _fourth = greetings.enter();
        assert!(!third.evicted.is_cancelled(), "a place that was given back was not used");
    }

    #[test]
    fn a_newer_connection_replaces_the_older_and_only_that() {
        let (greeted, members) = (Greeted::new(2), HashSet::from([1, 2]));
        let enter = |key| greeted.enter(key, closer(), &members);
        let old = enter((1, Purpose::Append)).unwrap();
        let other = enter((1, Purpose::Control)).unwrap();
        assert!(enter((2, Purpose::Append)).is_none());
        let new = enter((1, Purpose::Append)).unwrap();
        assert_eq!(old.closer.reason(), CloseReason::Superseded);
        assert!(!other.closer.is_closed());
        // The older one leaves late, and must not take the newer one's place with it.
        drop(old);
        assert!(enter((2, Purpose::Append)).is_none());
        drop(new);
        assert!(enter((2, Purpose::Append)).is_some());
    }

    #[test]
    fn greeted_strangers_make_room_for_each_other_and_never_for_lack_of_it_a_member() {
        let (greeted, nobody) = (Greeted::new(3), HashSet::new());
        let members = HashSet::from([1, 2]);
        let member = greeted.enter((1, Purpose::Append), closer(), &members).unwrap();
        let strangers: Vec<_> = (100..400)
            .map(|id| greeted.enter((id, Purpose::Append), closer(), &members).unwrap())
            .collect();
        assert!(member.member && !strangers[0].member);
        assert!(greeted.enter((2, Purpose::Control), closer(), &members).is_some());
        let open = |place: &&PeerPlace<'_>| !place.closer.is_closed();
        assert_eq!(strangers.iter().filter(open).count(), STRANGERS_MAX);
        assert!(open(&&member) && open(&&strangers[299]), "the oldest strangers go");
        assert_eq!(strangers[0].closer.reason(), CloseReason::Evicted);
        // Who has become a member since does not have to go any more.
        let grown = HashSet::from([1, 2, 399]);
        let late: Vec<_> = (500..600)
            .map(|id| greeted.enter((id, Purpose::Append), closer(), &grown).unwrap())
            .collect();
        assert!(open(&&strangers[299]) && !open(&&strangers[298]));
        drop(late);
        // Without a membership everyone is a stranger.
        assert!(!greeted.enter((2, Purpose::Append), closer(), &nobody).unwrap().member);
    }
}
