//! Which cluster a key goes to, by the ring that the client has at the moment. Immutable: a newer
//! ring makes new routes, which keep the clients of clusters whose nodes stayed the same.

use std::collections::HashMap;

use crate::raft_node::{Courier, RaftNode};
use crate::ring::{Ring, RingCluster, RingError, RingTable};
use crate::types::{ClusterId, Epoch};

#[derive(Debug)]
pub(super) struct Routes {
    table: RingTable,
    /// A client for each cluster of the ring.
    clusters: HashMap<ClusterId, Member>,
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
}

impl Routes {
    /// No ring: everything goes to one cluster.
    pub(super) fn without_ring(sole: RaftNode) -> Self {
        Self { table: RingTable::none(), clusters: HashMap::new(), sole: Some(sole) }
    }

    /// The routes of a ring that has clusters.
    pub(super) fn of_ring(
        ring: Ring,
        known: Option<&Self>,
        courier: &Courier,
    ) -> Result<Self, RingError> {
        let table = RingTable::new(ring)?;
        let member = |cluster: &RingCluster| {
            let listed: Vec<String> = cluster.nodes.iter().map(|node| node.http.clone()).collect();
            let kept = known.and_then(|routes| routes.clusters.get(&cluster.id));
            match kept.filter(|member| member.listed == listed) {
                Some(member) => member.clone(),
                None => {
                    let client = RaftNode::with_courier(listed.clone(), courier.clone());
                    Member { listed, client }
                }
            }
        };
        let clusters = &table.ring().clusters;
        let clusters = clusters.iter().map(|c| (c.id.clone(), member(c))).collect();
        Ok(Self { table, clusters, sole: None })
    }

    pub(super) fn ring(&self) -> &Ring {
        self.table.ring()
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.table.ring().epoch
    }

    pub(super) fn owner(&self, key: &[u8]) -> Option<&RingCluster> {
        self.table.owner(key)
    }

    pub(super) fn target(&self, key: &[u8]) -> Target {
        if let Some(owner) = self.table.owner(key) {
            let client = self.clusters[&owner.id].client.clone();
            return Target { id: Some(owner.id.clone()), client };
        }
        let client = self.sole.clone().expect("routes without a ring have their one cluster");
        Target { id: None, client }
    }

    /// The cluster that a node named as the owner; it may be one that this ring does not have yet.
    pub(super) fn target_named(&self, owner: &RingCluster, courier: &Courier) -> Target {
        let id = Some(owner.id.clone());
        if let Some(member) = self.clusters.get(&owner.id) {
            return Target { id, client: member.client.clone() };
        }
        let nodes = owner.nodes.iter().map(|node| node.http.clone()).collect();
        Target { id, client: RaftNode::with_courier(nodes, courier.clone()) }
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
}
