//! Which cluster a key goes to, by what the client knows at the moment. Immutable: whatever is learned
//! makes new routes, which keep the clients of clusters whose nodes stayed the same.
//!
//! While the ring changes, keys move from one cluster to another in handoffs, each all at once. The ring
//! in hand still names the old owner then, and asking it costs each operation a detour. So routes also
//! hold the ring to come, and which handoffs have moved, as far as an old owner has said so for any of
//! their keys. Like all that a client knows this may be wrong: whoever is asked checks again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::raft_node::{Courier, RaftNode};
use crate::ring::{Ring, RingCluster, RingError, RingTable};
use crate::types::{ClusterId, Epoch};

#[derive(Debug, Clone)]
pub(super) struct Routes {
    table: Arc<RingTable>,
    /// The ring to come, if a change runs and this client has heard of it.
    next: Option<Arc<RingTable>>,
    /// From whom and to whom all keys have moved whose owners by the two rings these are.
    moved: BTreeMap<ClusterId, BTreeSet<ClusterId>>,
    /// A client for each cluster of both rings.
    clusters: Arc<HashMap<ClusterId, Member>>,
    /// Where every key goes while there is no ring.
    sole: Option<RaftNode>,
}

#[derive(Debug, Clone)]
struct Member {
    /// The addresses that the ring lists; the client may have learned more.
    listed: Vec<String>,
    client: RaftNode,
}

/// Where one key goes.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// `None` without a ring.
    pub(super) id: Option<ClusterId>,
    pub(super) client: RaftNode,
    /// Whether the key is being handed over, by this cluster or to it: see [`Routes::other_target`].
    pub(super) has_other: bool,
}

/// What it means that a cluster does not serve a key and names another one.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Hearsay {
    /// The handoff that the key belongs to has moved.
    Moved,
    /// It has not, or not there yet.
    NotMoved,
    /// The ring is changing, and these routes do not know to which.
    Changing,
    /// Nothing that these routes could learn from.
    Nothing,
}

impl Routes {
    /// No ring: everything goes to one cluster.
    pub(super) fn without_ring(sole: RaftNode) -> Self {
        Self {
            table: Arc::new(RingTable::none()),
            next: None,
            moved: BTreeMap::new(),
            clusters: Arc::default(),
            sole: Some(sole),
        }
    }

    /// The routes of a ring that has clusters, and of the ring that it is changing to, if it tells one.
    pub(super) fn of_ring(
        ring: Ring,
        known: Option<&Self>,
        courier: &Courier,
    ) -> Result<Self, RingError> {
        let next = ring.next.as_deref().filter(|next| next.epoch > ring.epoch);
        // Without it there are detours and nothing worse.
        let next = next.and_then(|next| RingTable::new(next.clone()).ok()).map(Arc::new);
        let table = RingTable::new(ring)?;
        let to_come = || next.iter().flat_map(|next| &next.ring().clusters);
        let clusters_max = table.ring().clusters.len().max(to_come().count());
        let member = |cluster: &RingCluster| {
            let listed: Vec<String> = cluster.nodes.iter().map(|node| node.http.clone()).collect();
            let kept = known.and_then(|routes| routes.clusters.get(&cluster.id));
            match kept.filter(|member| member.listed == listed) {
                Some(Member { client, .. }) => {
                    Member { listed, client: client.sharing_with(clusters_max) }
                }
                None => {
                    let client = RaftNode::one_of(clusters_max, listed.clone(), courier.clone());
                    Member { listed, client }
                }
            }
        };
        let mut clusters = HashMap::new();
        for cluster in table.ring().clusters.iter().chain(to_come()) {
            clusters.entry(cluster.id.clone()).or_insert_with(|| member(cluster));
        }
        Ok(Self {
            table: Arc::new(table),
            next,
            moved: BTreeMap::new(),
            clusters: Arc::new(clusters),
            sole: None,
        })
    }

    /// Whether these routes know more than the others: a later ring, or what the same is changing to.
    pub(super) fn is_newer_than(&self, other: &Self) -> bool {
        let age =
            |routes: &Self| (routes.epoch(), routes.next.as_ref().map(|next| next.ring().epoch));
        age(self) > age(other)
    }

    pub(super) fn ring(&self) -> &Ring {
        self.table.ring()
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.table.ring().epoch
    }

    /// Whether the ring is known to be changing.
    pub(super) fn is_changing(&self) -> bool {
        self.next.is_some()
    }

    pub(super) fn owner(&self, key: &[u8]) -> Option<&RingCluster> {
        self.table.owner(key)
    }

    pub(super) fn target(&self, key: &[u8]) -> Target {
        let Some(owner) = self.present_owner(key) else {
            let client = self.sole.clone().expect("routes without a ring have their one cluster");
            return Target { id: None, client, has_other: false };
        };
        self.target_of(key, owner)
    }

    fn target_of(&self, key: &[u8], cluster: &RingCluster) -> Target {
        let client = self.clusters[&cluster.id].client.clone();
        let has_other = self.next.is_some() && self.other_owner(key, &cluster.id).is_some();
        Target { id: Some(cluster.id.clone()), client, has_other }
    }

    /// The owner by the ring in hand, unless the key is known to have moved on.
    fn present_owner(&self, key: &[u8]) -> Option<&RingCluster> {
        let owner = self.table.owner(key)?;
        if let Some(moved) = self.moved.get(&owner.id)
            && let Some(next) = self.next.as_ref().and_then(|next| next.owner(key))
            && moved.contains(&next.id)
        {
            return Some(next);
        }
        Some(owner)
    }

    /// Where else a key may be served that the cluster `id` does not answer for: by the other one of those that
    /// hand it over, if the ring is known to be changing. Whoever does not serve it says so.
    pub(super) fn other_target(&self, key: &[u8], id: &ClusterId) -> Option<Target> {
        Some(self.target_of(key, self.other_owner(key, id)?))
    }

    fn other_owner(&self, key: &[u8], id: &ClusterId) -> Option<&RingCluster> {
        let (old, new) = (self.owner(key)?, self.next.as_ref()?.owner(key)?);
        let other = if old.id == *id { new } else { old };
        (old.id != new.id).then_some(other)
    }

    /// What to make of it that `refused`, living by the ring in hand, names `named` as the key's owner.
    pub(super) fn hearsay(&self, key: &[u8], refused: &ClusterId, named: &ClusterId) -> Hearsay {
        let Some(owner) = self.owner(key).filter(|_| refused != named) else {
            return Hearsay::Nothing;
        };
        let Some(next) = self.next.as_ref().and_then(|next| next.owner(key)) else {
            return if owner.id == *refused { Hearsay::Changing } else { Hearsay::Nothing };
        };
        let known = self.moved.get(&owner.id).is_some_and(|moved| moved.contains(&next.id));
        match () {
            () if owner.id == *refused && next.id == *named && !known => Hearsay::Moved,
            () if owner.id == *named && next.id == *refused && known => Hearsay::NotMoved,
            () => Hearsay::Nothing,
        }
    }

    /// The same, with the handoff `from` -> `to` moved, or not.
    pub(super) fn with_moved(&self, from: &ClusterId, to: &ClusterId, is_moved: bool) -> Self {
        let mut routes = self.clone();
        let pairs = routes.moved.entry(from.clone()).or_default();
        if is_moved {
            pairs.insert(to.clone());
        } else {
            pairs.remove(to);
        }
        routes
    }

    /// The cluster that a node named as the owner; it may be one that this ring does not have yet.
    pub(super) fn target_named(&self, owner: &RingCluster, courier: &Courier) -> Target {
        let id = Some(owner.id.clone());
        if let Some(member) = self.clusters.get(&owner.id) {
            return Target { id, client: member.client.clone(), has_other: false };
        }
        let nodes = owner.nodes.iter().map(|node| node.http.clone()).collect();
        let client = RaftNode::one_of(self.clusters.len() + 1, nodes, courier.clone());
        Target { id, client, has_other: false }
    }

    /// The clients of all clusters, in the ring's order.
    pub(super) fn clients(&self) -> Vec<RaftNode> {
        let members = self.ring().clusters.iter().map(|c| self.clusters[&c.id].client.clone());
        self.sole.iter().cloned().chain(members).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::ring::RingNode;

    use super::*;

    fn ring(epoch: Epoch, clusters: &[(&str, &str)]) -> Ring {
        let clusters: Vec<_> = clusters
            .iter()
            .map(|(id, http)| RingCluster {
                id: id.parse().unwrap(),
                weight: 1.0,
                nodes: vec![RingNode { id: 1, http: (*http).into(), rpc: "r:1".into() }],
            })
            .collect();
        Ring { epoch, sequencer: Some(clusters[0].id.clone()), clusters, ..Ring::none() }
    }

    #[test]
    fn every_key_goes_to_its_owners_nodes_and_clients_live_on_while_nodes_stay() {
        let courier = Courier::default();
        let first =
            Routes::of_ring(ring(1, &[("a", "a:1"), ("b", "b:1")]), None, &courier).unwrap();
        for key in 0..100u32 {
            let target = first.target(&key.to_be_bytes());
            let id = first.owner(&key.to_be_bytes()).unwrap().id.clone();
            assert_eq!(target.client.nodes(), [format!("{id}:1")]);
        }
        let changed = ring(2, &[("a", "a:1"), ("b", "b:2")]);
        let second = Routes::of_ring(changed, Some(&first), &courier).unwrap();
        let nodes: Vec<_> = second.clients().iter().flat_map(RaftNode::nodes).collect();
        assert_eq!(nodes, ["a:1", "b:2"]);
    }

    fn id(text: &str) -> ClusterId {
        text.parse().unwrap()
    }

    /// From `a` and `b` to `a`, `b` and `c`.
    fn growing() -> Ring {
        let old = ring(1, &[("a", "a:1"), ("b", "b:1")]);
        let next = ring(2, &[("a", "a:1"), ("b", "b:1"), ("c", "c:1")]);
        Ring { next: Some(Box::new(next)), ..old }
    }

    /// Keys by their owners before and after.
    fn keys_of(routes: &Routes, from: &str, to: &str) -> Vec<Vec<u8>> {
        let next = routes.next.as_ref().unwrap();
        let belongs = |key: &Vec<u8>| {
            routes.owner(key).unwrap().id == id(from) && next.owner(key).unwrap().id == id(to)
        };
        let keys: Vec<_> =
            (0..300u32).map(|key| key.to_be_bytes().to_vec()).filter(belongs).collect();
        assert!(!keys.is_empty());
        keys
    }

    /// One key of a handoff is enough to know of all, and only of that handoff's.
    #[test]
    fn what_has_moved_goes_to_its_new_owner_at_once() {
        let routes = Routes::of_ring(growing(), None, &Courier::default()).unwrap();
        let (a_to_c, b_to_c) = (keys_of(&routes, "a", "c"), keys_of(&routes, "b", "c"));
        let stays = keys_of(&routes, "a", "a");
        assert_eq!(routes.target(&a_to_c[0]).id, Some(id("a")));
        assert_eq!(routes.hearsay(&a_to_c[0], &id("a"), &id("c")), Hearsay::Moved);
        let routes = routes.with_moved(&id("a"), &id("c"), true);
        assert!(a_to_c.iter().all(|key| routes.target(key).client.nodes() == ["c:1"]));
        assert!(b_to_c.iter().all(|key| routes.target(key).id == Some(id("b"))));
        assert!(stays.iter().all(|key| routes.target(key).id == Some(id("a"))));
        assert_eq!(routes.hearsay(&a_to_c[0], &id("a"), &id("c")), Hearsay::Nothing);
        // A new owner that says otherwise is believed, until the old one says it again.
        assert_eq!(routes.hearsay(&a_to_c[0], &id("c"), &id("a")), Hearsay::NotMoved);
        let routes = routes.with_moved(&id("a"), &id("c"), false);
        assert!(a_to_c.iter().all(|key| routes.target(key).id == Some(id("a"))));
    }

    /// Words that fit neither ring change nothing.
    #[test]
    fn hearsay_that_does_not_fit_is_not_believed() {
        let routes = Routes::of_ring(growing(), None, &Courier::default()).unwrap();
        let key = &keys_of(&routes, "a", "a")[0];
        for (refused, named) in [("a", "c"), ("a", "a"), ("c", "a"), ("b", "c"), ("x", "y")] {
            assert_eq!(routes.hearsay(key, &id(refused), &id(named)), Hearsay::Nothing);
        }
        let unaware = ring(1, &[("a", "a:1"), ("b", "b:1")]);
        let unaware = Routes::of_ring(unaware, None, &Courier::default()).unwrap();
        assert_eq!(unaware.hearsay(key, &id("a"), &id("c")), Hearsay::Changing);
        assert_eq!(unaware.hearsay(key, &id("c"), &id("a")), Hearsay::Nothing);
        assert!(routes.is_newer_than(&unaware) && !unaware.is_newer_than(&routes));
    }

    /// A ring to come that cannot be used is as good as none, and the next epoch forgets what moved.
    #[test]
    fn what_moved_is_known_of_one_change_only() {
        let courier = Courier::default();
        let mut broken = growing();
        broken.next.as_mut().unwrap().hash_version = 9;
        assert!(!Routes::of_ring(broken, None, &courier).unwrap().is_changing());
        let routes = Routes::of_ring(growing(), None, &courier).unwrap();
        let routes = routes.with_moved(&id("a"), &id("c"), true);
        let key = &keys_of(&routes, "a", "c")[0];
        // Called off: the old ring goes on as a later epoch.
        let reverted = ring(3, &[("a", "a:1"), ("b", "b:1")]);
        let reverted = Routes::of_ring(reverted, Some(&routes), &courier).unwrap();
        assert!(reverted.is_newer_than(&routes));
        assert_eq!(reverted.target(key).id, Some(id("a")));
    }
}
