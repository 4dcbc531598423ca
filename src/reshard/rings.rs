//! The next ring: what a change asks for, made out of the ring in force, or refused.
//!
//! Pure. Whatever is wrong with a request is found here, before any cluster hears of it; what only a
//! cluster can know (that it holds data, that a change runs) it refuses at apply.

use std::collections::BTreeSet;

use crate::ring::{Ring, RingCluster, RingError, RingNode, RingTable};
use crate::types::ClusterId;

/// What to make of a ring.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// One more cluster.
    Add(RingCluster),
    /// One less.
    Remove(ClusterId),
    /// Another share for one.
    Weight(ClusterId, f32),
    /// The same share for all.
    Equal,
}

/// Why there is no such ring.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// There is no ring to change.
    #[error("the clusters have no ring yet: `admin ring install` gives them one")]
    NoRing,
    /// The id is taken.
    #[error("cluster {0} is in the ring already")]
    IdTaken(ClusterId),
    /// The id is taken by a cluster that is not quite the one to be added.
    #[error(
        "cluster {0} is in the ring already, with another weight or other nodes; `admin cluster weight` changes a weight"
    )]
    Differs(ClusterId),
    /// No cluster has that id.
    #[error("cluster {0} is not in the ring")]
    Unknown(ClusterId),
    /// Somebody must own the keys.
    #[error("cluster {0} is the last one: somebody has to own the keys")]
    Last(ClusterId),
    /// Not a number above 0.
    #[error("{1} is no weight for cluster {0}: a weight is a finite number above 0")]
    Weight(ClusterId, f32),
    /// All weights are as asked for already.
    #[error("the ring is like that already: nothing would change")]
    NothingToDo,
    /// The cluster lists no node, or one twice.
    #[error("the nodes of cluster {0} have to be one or more, each id and each address once")]
    Nodes(ClusterId),
    /// A node belongs to a cluster of the ring.
    #[error("{address} is an address of cluster {cluster} already")]
    AddressTaken {
        /// The address.
        address: String,
        /// Whose it is.
        cluster: ClusterId,
    },
    /// It breaks another rule of rings.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// The ring after `request`: the next epoch, and the same sequencer while it stays; else the remaining
/// cluster that comes first by its id.
pub fn next_ring(ring: &Ring, request: &Request) -> Result<Ring, RequestError> {
    if ring.epoch == 0 {
        return Err(RequestError::NoRing);
    }
    let mut clusters = ring.clusters.clone();
    match request {
        Request::Add(cluster) => {
            check_new(ring, cluster)?;
            clusters.push(cluster.clone());
        }
        Request::Remove(id) => {
            clusters.retain(|cluster| cluster.id != *id);
            match clusters.len() {
                left if left == ring.clusters.len() => {
                    return Err(RequestError::Unknown(id.clone()));
                }
                0 => return Err(RequestError::Last(id.clone())),
                _ => {}
            }
        }
        Request::Weight(id, weight) => {
            check_weight(id, *weight)?;
            let cluster = clusters.iter_mut().find(|cluster| cluster.id == *id);
            cluster.ok_or_else(|| RequestError::Unknown(id.clone()))?.weight = *weight;
        }
        Request::Equal => clusters.iter_mut().for_each(|cluster| cluster.weight = 1.0),
    }
    if clusters == ring.clusters {
        return Err(RequestError::NothingToDo);
    }
    let stays = ring.sequencer.clone().filter(|id| clusters.iter().any(|c| c.id == *id));
    let first = clusters.iter().map(|cluster| &cluster.id).min().cloned();
    let next = Ring {
        epoch: ring.epoch + 1,
        sequencer: stays.or(first),
        clusters,
        next: None,
        ..ring.clone()
    };
    Ok(RingTable::new(next)?.into())
}

/// The old ring's content as the epoch with which a change that was called off ends.
pub fn reverted(ring: &Ring) -> Ring {
    Ring { epoch: ring.epoch + 2, next: None, ..ring.clone() }
}

fn check_new(ring: &Ring, cluster: &RingCluster) -> Result<(), RequestError> {
    if ring.cluster(&cluster.id).is_some() {
        return Err(RequestError::IdTaken(cluster.id.clone()));
    }
    check_weight(&cluster.id, cluster.weight)?;
    check_nodes(&cluster.id, &cluster.nodes)?;
    for address in cluster.nodes.iter().flat_map(|node| [&node.http, &node.rpc]) {
        let has =
            |c: &&RingCluster| c.nodes.iter().any(|n| n.http == *address || n.rpc == *address);
        if let Some(owner) = ring.clusters.iter().find(has) {
            let (address, cluster) = (address.clone(), owner.id.clone());
            return Err(RequestError::AddressTaken { address, cluster });
        }
    }
    Ok(())
}

/// Whether a weight is one: checked where it is given, too.
pub(super) fn check_weight(id: &ClusterId, weight: f32) -> Result<(), RequestError> {
    if weight.is_finite() && weight > 0.0 {
        return Ok(());
    }
    Err(RequestError::Weight(id.clone(), weight))
}

fn check_nodes(id: &ClusterId, nodes: &[RingNode]) -> Result<(), RequestError> {
    let ids: BTreeSet<_> = nodes.iter().map(|node| node.id).collect();
    let addresses: BTreeSet<_> = nodes.iter().flat_map(|node| [&node.http, &node.rpc]).collect();
    if nodes.is_empty() || ids.len() < nodes.len() || addresses.len() < 2 * nodes.len() {
        return Err(RequestError::Nodes(id.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{cluster, id, ring};
    use super::*;

    #[test]
    fn a_change_counts_the_epoch_up_and_keeps_the_sequencer_while_it_stays() {
        let three = ring(4, &[("b", 1.0), ("a", 1.0), ("c", 2.0)]);
        let added = next_ring(&three, &Request::Add(cluster("d", 0.5))).unwrap();
        assert_eq!((added.epoch, added.sequencer), (5, Some(id("b"))));
        assert_eq!(added.clusters.len(), 4);
        let removed = next_ring(&three, &Request::Remove(id("c"))).unwrap();
        assert_eq!((removed.clusters.len(), removed.sequencer), (2, Some(id("b"))));
        let handed_over = next_ring(&three, &Request::Remove(id("b"))).unwrap();
        assert_eq!(handed_over.sequencer, Some(id("a")));
        let lighter = next_ring(&three, &Request::Weight(id("c"), 1.5)).unwrap();
        assert_eq!(lighter.cluster(&id("c")).unwrap().weight, 1.5);
        let equal = next_ring(&three, &Request::Equal).unwrap();
        assert!(equal.clusters.iter().all(|cluster| cluster.weight == 1.0));
    }

    #[test]
    fn every_bad_request_is_refused_by_name() {
        let two = ring(1, &[("a", 1.0), ("b", 1.0)]);
        let refused = |request| next_ring(&two, &request).unwrap_err();
        assert_eq!(refused(Request::Add(cluster("a", 1.0))), RequestError::IdTaken(id("a")));
        assert_eq!(refused(Request::Remove(id("x"))), RequestError::Unknown(id("x")));
        assert_eq!(refused(Request::Weight(id("x"), 1.0)), RequestError::Unknown(id("x")));
        assert_eq!(refused(Request::Weight(id("a"), 1.0)), RequestError::NothingToDo);
        assert_eq!(refused(Request::Equal), RequestError::NothingToDo);
        for bad in [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = refused(Request::Weight(id("a"), bad));
            assert!(matches!(error, RequestError::Weight(..)), "{error}");
            let error = refused(Request::Add(cluster("c", bad)));
            assert!(matches!(error, RequestError::Weight(..)), "{error}");
        }
        let one = ring(1, &[("a", 1.0)]);
        let error = next_ring(&one, &Request::Remove(id("a"))).unwrap_err();
        assert_eq!(error, RequestError::Last(id("a")));
        assert_eq!(next_ring(&Ring::none(), &Request::Equal), Err(RequestError::NoRing));
    }

    #[test]
    fn a_new_cluster_needs_nodes_of_its_own() {
        let one = ring(1, &[("a", 1.0)]);
        let refused = |cluster| next_ring(&one, &Request::Add(cluster)).unwrap_err();
        let mut nobody = cluster("c", 1.0);
        nobody.nodes.clear();
        assert_eq!(refused(nobody), RequestError::Nodes(id("c")));
        let mut twice = cluster("c", 1.0);
        twice.nodes.push(twice.nodes[0].clone());
        assert_eq!(refused(twice), RequestError::Nodes(id("c")));
        let mut stolen = cluster("c", 1.0);
        stolen.nodes[0].http = one.clusters[0].nodes[0].http.clone();
        assert!(matches!(refused(stolen), RequestError::AddressTaken { .. }));
    }
}
