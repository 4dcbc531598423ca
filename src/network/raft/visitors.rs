//! The places of nodes of other clusters, which come for the keys of handoffs.
//!
//! Who greets for one says of which cluster it is, and proves it as little as anybody. So these places
//! are few and apart: whatever names strangers invent, they take no place from this node's peers. Among
//! themselves they make room for each other, the oldest first; a destination that has to go connects
//! again.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::network::peer::PeerIdentity;
use crate::network::peer::closer::{CloseReason, Closer};

use super::admit::{Ids, lock};

/// Connections for handoffs at once. A destination has one, its leader's, and one more after a new
/// leader was elected there.
const VISITORS_MAX: usize = 32;

/// Connections of nodes of other clusters, at most one for each node.
#[derive(Default)]
pub(super) struct Visitors {
    places: Mutex<HashMap<PeerIdentity, (u64, Closer)>>,
    ids: Ids,
}

/// The place of one of them. Given back when dropped.
pub(super) struct Visit<'a> {
    all: &'a Visitors,
    visitor: PeerIdentity,
    id: u64,
    closer: Closer,
}

impl Visitors {
    /// Takes a place: that of the same node's older connection, or the oldest one's if there is no
    /// other. Who held it is closed.
    pub(super) fn enter(&self, visitor: PeerIdentity, closer: Closer) -> Visit<'_> {
        let id = self.ids.next();
        let mut places = lock(&self.places);
        if let Some((_, older)) = places.insert(visitor.clone(), (id, closer.clone())) {
            older.close(CloseReason::Superseded);
        }
        let oldest = places.iter().min_by_key(|(_, (id, _))| *id).map(|(oldest, _)| oldest.clone());
        if places.len() > VISITORS_MAX
            && let Some((_, evicted)) = oldest.and_then(|oldest| places.remove(&oldest))
        {
            evicted.close(CloseReason::Evicted);
        }
        Visit { all: self, visitor, id, closer }
    }
}

impl Visit<'_> {
    /// Closes this connection.
    pub(super) fn closer(&self) -> &Closer {
        &self.closer
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.closer.close(CloseReason::Local);
        let mut places = lock(&self.all.places);
        if places.get(&self.visitor).is_some_and(|(id, _)| *id == self.id) {
            places.remove(&self.visitor);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn enter<'a>(visitors: &'a Visitors, cluster: &str, node_id: u64) -> Visit<'a> {
        let visitor = PeerIdentity { cluster: cluster.parse().unwrap(), node_id };
        visitors.enter(visitor, Closer::under(&CancellationToken::new()))
    }

    /// However many come, the places are bounded, the newest has one, and a place that was given back
    /// costs nobody another.
    #[test]
    fn the_oldest_visitor_makes_room() {
        let visitors = Visitors::default();
        let all: Vec<_> = (0..100).map(|id| enter(&visitors, "c2", id)).collect();
        let open = |visit: &&Visit<'_>| !visit.closer().is_closed();
        assert_eq!(all.iter().filter(open).count(), VISITORS_MAX);
        assert!(open(&&all[99]) && !open(&&all[0]));
        assert_eq!(all[0].closer().reason(), CloseReason::Evicted);
        let mut all = all;
        drop(all.pop());
        let _late = enter(&visitors, "c3", 1);
        assert_eq!(all.iter().filter(open).count(), VISITORS_MAX - 1);
    }

    /// Nodes of different clusters may have the same number.
    #[test]
    fn a_newer_visit_of_the_same_node_replaces_the_older_and_only_that() {
        let visitors = Visitors::default();
        let (old, other) = (enter(&visitors, "c2", 1), enter(&visitors, "c3", 1));
        let new = enter(&visitors, "c2", 1);
        assert_eq!(old.closer().reason(), CloseReason::Superseded);
        assert!(!other.closer().is_closed());
        drop(old);
        assert!(!new.closer().is_closed());
        let _newest = enter(&visitors, "c2", 1);
        assert_eq!(
            new.closer().reason(),
            CloseReason::Superseded,
            "the older took its place along"
        );
    }
}
