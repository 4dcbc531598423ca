//! The places of peer connections: a few for strangers, one for each peer and purpose.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::network::peer::Purpose;
use crate::network::peer::closer::{CloseReason, Closer};
use crate::types::NodeId;

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
    max: usize,
    places: Mutex<HashMap<(NodeId, Purpose), (u64, Closer)>>,
    ids: Ids,
}

/// The place of one of them. Given back when dropped.
pub(super) struct Place<'a> {
    all: &'a Greeted,
    key: (NodeId, Purpose),
    id: u64,
    closer: Closer,
}

impl Greeted {
    pub(super) fn new(max: usize) -> Self {
        Self { max, places: Mutex::default(), ids: Ids::default() }
    }

    /// Takes a place, and closes the connection that held it. `None` when all are taken by others.
    pub(super) fn enter(&self, key: (NodeId, Purpose), closer: Closer) -> Option<Place<'_>> {
        let id = self.ids.next();
        let mut places = lock(&self.places);
        if places.len() >= self.max && !places.contains_key(&key) {
            return None;
        }
        if let Some((_, older)) = places.insert(key, (id, closer.clone())) {
            older.close(CloseReason::Superseded);
        }
        Some(Place { all: self, key, id, closer })
    }
}

impl Place<'_> {
    /// Closes this connection.
    pub(super) fn closer(&self) -> &Closer {
        &self.closer
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.closer.close(CloseReason::Local);
        let mut places = lock(&self.all.places);
        if places.get(&self.key).is_some_and(|(id, _)| *id == self.id) {
            places.remove(&self.key);
        }
    }
}

#[derive(Default)]
struct Ids(std::sync::atomic::AtomicU64);

impl Ids {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
        let greeted = Greeted::new(2);
        let old = greeted.enter((1, Purpose::Append), closer()).unwrap();
        let other = greeted.enter((1, Purpose::Control), closer()).unwrap();
        assert!(greeted.enter((2, Purpose::Append), closer()).is_none());
        let new = greeted.enter((1, Purpose::Append), closer()).unwrap();
        assert_eq!(old.closer().reason(), CloseReason::Superseded);
        assert!(!other.closer().is_closed());
        // The older one leaves late, and must not take the newer one's place with it.
        drop(old);
        assert!(greeted.enter((2, Purpose::Append), closer()).is_none());
        drop(new);
        assert!(greeted.enter((2, Purpose::Append), closer()).is_some());
    }
}
