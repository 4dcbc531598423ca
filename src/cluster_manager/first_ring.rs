//! Gives clusters their first ring, through each cluster's own Raft log.
//!
//! A cluster without a ring owns every key, so the clusters take the ring one by one without a
//! moment at which a key has no owner. What may go wrong in between is decided beforehand as far as
//! the clusters' answers allow ([`plan`]), so that a refusal leaves all of them unchanged:
//!
//! - a cluster that lives by another ring: refused. Later rings come by the handoff protocol;
//! - a single cluster without a ring holds keys: it goes first. Only it can tell, at apply, whether
//!   it would own them all; if it refuses, no other cluster has been asked yet;
//! - several clusters without a ring hold keys: refused. One of them could refuse after another has
//!   taken the ring.
//!
//! An install that was cut off is completed by running it again: a cluster that has the ring already
//! confirms it.

use futures_util::future::join_all;

use super::forming::{METRICS_TIMEOUT, ask_all, leader_of};
use crate::client_error::ClientError;
use crate::config::RingConfig;
use crate::metrics::NodeMetrics;
use crate::network::error::Outcome;
use crate::raft_node::RaftNode;
use crate::ring::{Ring, RingCluster, RingError, RingNode, RingTable};
use crate::types::{ClusterId, Epoch, NodeId};

/// Why the clusters did not get the ring. Nothing was changed, except as [`Self::Refused`] and
/// [`Self::AnswerLost`] say. Running the install again is always safe.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InstallError {
    /// A node did not answer: its cluster's members cannot be told.
    #[error("{0}; all nodes must answer before a ring is installed; nothing was changed")]
    Unreachable(String),
    /// Nodes of two clusters are listed as one.
    #[error(
        "{first} is a node of {cluster}, {second} is one of {other}, but they are listed as one cluster"
    )]
    Mixed {
        /// The address of a node ...
        first: String,
        /// ... and its cluster.
        cluster: ClusterId,
        /// The address of another node ...
        second: String,
        /// ... and its cluster.
        other: ClusterId,
    },
    /// The cluster has not been formed, or an election runs.
    #[error(
        "no node of {0} leads it: form the cluster first, or try again shortly; nothing was changed"
    )]
    NoLeader(ClusterId),
    /// A member of the cluster is not listed, so that its addresses are unknown.
    #[error("node {node} is a member of {cluster}, but is not listed; nothing was changed")]
    MemberNotListed {
        /// The cluster.
        cluster: ClusterId,
        /// The member.
        node: NodeId,
    },
    /// A node is listed that is no member.
    #[error("node {node} at {address} is not a member of {cluster}; nothing was changed")]
    NotAMember {
        /// The cluster.
        cluster: ClusterId,
        /// The node.
        node: NodeId,
        /// Its address.
        address: String,
    },
    /// The ring itself is wrong.
    #[error("{0}; nothing was changed")]
    Ring(#[from] RingError),
    /// A cluster lives by a ring with other content.
    #[error("{cluster} already lives by a ring of epoch {epoch}; nothing was changed")]
    OtherRing {
        /// The cluster.
        cluster: ClusterId,
        /// The epoch of its ring.
        epoch: Epoch,
    },
    /// More than one cluster without a ring holds keys.
    #[error("{} and {} both hold keys; at most one cluster may when the first ring is installed; nothing was changed", .0, .1)]
    SeveralHoldKeys(ClusterId, ClusterId),
    /// A cluster refused. The clusters that took the ring before it keep it.
    #[error("{cluster} refused the ring: {message}; {}", changed(.installed))]
    Refused {
        /// The cluster.
        cluster: ClusterId,
        /// What it said.
        message: String,
        /// The clusters that took the ring in this run.
        installed: Vec<ClusterId>,
    },
    /// A cluster was asked to take the ring, and it is not known whether it did. The clusters that took
    /// it before keep it.
    #[error("{cluster} may have taken the ring: {message}; run this again to complete it")]
    AnswerLost {
        /// The cluster.
        cluster: ClusterId,
        /// What happened.
        message: String,
        /// The clusters that took the ring in this run for certain.
        installed: Vec<ClusterId>,
    },
}

fn changed(installed: &[ClusterId]) -> String {
    if installed.is_empty() {
        return "nothing was changed".into();
    }
    let names: Vec<&str> = installed.iter().map(ClusterId::as_str).collect();
    format!("{} have it; run this again to complete it", names.join(", "))
}

/// What one cluster says about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Survey {
    /// Its id.
    pub cluster: ClusterId,
    /// Its members and where they listen, by id.
    pub nodes: Vec<RingNode>,
    /// The ring that it lives by; epoch 0 for none.
    pub ring: Ring,
    /// The largest number of keys that one of its nodes reports.
    pub keys: u64,
}

/// Asks all nodes of one cluster, which are listed by their HTTP addresses. Changes nothing; safe to
/// cancel.
///
/// # Panics
/// If `addresses` is empty.
pub async fn survey(addresses: &[String]) -> Result<Survey, InstallError> {
    let answers: Result<Vec<NodeMetrics>, String> = ask_all(addresses).await.into_iter().collect();
    let seen = answers.map_err(InstallError::Unreachable)?;
    let nodes = members(addresses, &seen)?;
    // Followers apply a little later than the leader; the node with the newest ring knows best.
    let newest = (0..seen.len()).max_by_key(|i| seen[*i].epoch.unwrap_or(0));
    let newest = newest.expect("a listed cluster has at least one node");
    let raft = RaftNode::new(addresses.to_vec()).with_timeout(METRICS_TIMEOUT);
    let ring = raft.hash_ring_of(&addresses[newest]).await;
    let ring = ring.map_err(|error| InstallError::Unreachable(error.to_string()))?;
    let keys = seen.iter().filter_map(|node| node.keys).max().unwrap_or(0);
    Ok(Survey { cluster: seen[0].cluster.clone(), nodes, ring, keys })
}

/// The members of a cluster; exactly the nodes that are listed must be members.
fn members(addresses: &[String], seen: &[NodeMetrics]) -> Result<Vec<RingNode>, InstallError> {
    let cluster = seen[0].cluster.clone();
    if let Some(other) = seen.iter().position(|node| node.cluster != cluster) {
        return Err(InstallError::Mixed {
            first: addresses[0].clone(),
            cluster,
            second: addresses[other].clone(),
            other: seen[other].cluster.clone(),
        });
    }
    let views: Vec<_> = seen.iter().cloned().map(Some).collect();
    let leader = leader_of(&views).ok_or(InstallError::NoLeader(cluster.clone()))?;
    let mut ids = leader.voters.iter().chain(&leader.learners);
    if let Some(&node) = ids.clone().find(|id| !seen.iter().any(|node| node.id == **id)) {
        return Err(InstallError::MemberNotListed { cluster, node });
    }
    if let Some(node) = seen.iter().find(|node| !ids.clone().any(|id| *id == node.id)) {
        let address = node.http.clone();
        return Err(InstallError::NotAMember { cluster, node: node.id, address });
    }
    debug_assert!(ids.next().is_some(), "a leader is a member");
    let mut nodes: Vec<RingNode> = seen.iter().map(ring_node).collect();
    nodes.sort_by_key(|node| node.id);
    Ok(nodes)
}

fn ring_node(node: &NodeMetrics) -> RingNode {
    RingNode { id: node.id, http: node.http.clone(), rpc: node.rpc.clone() }
}

/// The first ring of these clusters. The first of them becomes the sequencer; `weights` has one for
/// each of them, or is empty for equal ones.
pub fn first_ring<'a>(
    clusters: impl IntoIterator<Item = (&'a ClusterId, &'a [RingNode])>,
    weights: &[f32],
    config: &RingConfig,
) -> Result<Ring, RingError> {
    let member = |(place, (id, nodes)): (usize, (&ClusterId, &[RingNode]))| RingCluster {
        id: id.clone(),
        weight: weights.get(place).copied().unwrap_or(1.0),
        nodes: nodes.to_vec(),
    };
    let clusters: Vec<RingCluster> = clusters.into_iter().enumerate().map(member).collect();
    let ring = Ring {
        epoch: 1,
        hash_version: config.hash_version,
        list_ttl_s: config.list_ttl_s,
        sequencer: clusters.first().map(|cluster| cluster.id.clone()),
        clusters,
        next: None,
    };
    Ok(RingTable::new(ring)?.ring().clone())
}

/// The order in which the clusters take `ring`, as places in `surveys`; those that have it already
/// are left out. See the module for what is refused.
fn plan(surveys: &[Survey], ring: &Ring) -> Result<Vec<usize>, InstallError> {
    if let Some(other) = surveys.iter().find(|s| s.ring.epoch > 0 && s.ring != *ring) {
        let (cluster, epoch) = (other.cluster.clone(), other.ring.epoch);
        return Err(InstallError::OtherRing { cluster, epoch });
    }
    let mut order: Vec<usize> =
        (0..surveys.len()).filter(|i| surveys[*i].ring.epoch == 0).collect();
    let mut holders = order.iter().map(|i| &surveys[*i]).filter(|s| s.keys > 0);
    if let (Some(first), Some(second)) = (holders.next(), holders.next()) {
        let (first, second) = (first.cluster.clone(), second.cluster.clone());
        return Err(InstallError::SeveralHoldKeys(first, second));
    }
    order.sort_by_key(|i| std::cmp::Reverse(surveys[*i].keys));
    Ok(order)
}

/// Asks all clusters at once, each as [`survey`] does; none of the lists may be empty.
pub async fn survey_all(clusters: &[Vec<String>]) -> Result<Vec<Survey>, InstallError> {
    join_all(clusters.iter().map(|addresses| survey(addresses))).await.into_iter().collect()
}

/// Installs `ring` in the clusters that have none, in a safe order, or refuses beforehand.
/// `surveys` is what `clusters` just answered, in the same order. Returns who took the ring now.
///
/// Safe to cancel and to run again: clusters that took the ring meanwhile confirm it.
pub async fn install(
    clusters: &[Vec<String>],
    surveys: &[Survey],
    ring: &Ring,
) -> Result<Vec<ClusterId>, InstallError> {
    let mut installed = Vec::new();
    for place in plan(surveys, ring)? {
        let cluster = surveys[place].cluster.clone();
        let raft = RaftNode::new(clusters[place].clone());
        if let Err(error) = raft.update_hash_ring(ring).await {
            return Err(not_installed(cluster, &error, installed));
        }
        installed.push(cluster);
    }
    Ok(installed)
}

fn not_installed(
    cluster: ClusterId,
    error: &ClientError,
    installed: Vec<ClusterId>,
) -> InstallError {
    let message = error.to_string();
    match error.outcome() {
        Outcome::NotApplied => InstallError::Refused { cluster, message, installed },
        Outcome::Applied | Outcome::Unknown => {
            InstallError::AnswerLost { cluster, message, installed }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::NodeState;

    fn id(text: &str) -> ClusterId {
        text.parse().unwrap()
    }

    fn nodes(count: u64) -> Vec<RingNode> {
        let node = |id| RingNode { id, http: format!("h{id}"), rpc: format!("r{id}") };
        (1..=count).map(node).collect()
    }

    fn surveys(keys: &[u64]) -> Vec<Survey> {
        let of = |(place, keys): (usize, &u64)| Survey {
            cluster: id(&format!("c{}", place + 1)),
            nodes: nodes(3),
            ring: Ring::none(),
            keys: *keys,
        };
        keys.iter().enumerate().map(of).collect()
    }

    fn ring_of(surveys: &[Survey], weights: &[f32]) -> Ring {
        let clusters = surveys.iter().map(|s| (&s.cluster, s.nodes.as_slice()));
        first_ring(clusters, weights, &RingConfig::default()).unwrap()
    }

    #[test]
    fn the_first_ring_has_epoch_1_and_the_first_cluster_as_sequencer() {
        let ring = ring_of(&surveys(&[0, 0]), &[2.0, 0.5]);
        assert_eq!((ring.epoch, ring.sequencer), (1, Some(id("c1"))));
        assert_eq!(ring.clusters.iter().map(|c| c.weight).collect::<Vec<_>>(), [2.0, 0.5]);
        assert_eq!(ring_of(&surveys(&[0]), &[]).clusters[0].weight, 1.0);
    }

    #[test]
    fn a_cluster_listed_twice_is_refused() {
        let two = [surveys(&[0]), surveys(&[0])].concat();
        let clusters = two.iter().map(|s| (&s.cluster, s.nodes.as_slice()));
        assert!(matches!(
            first_ring(clusters, &[], &RingConfig::default()),
            Err(RingError::Carp(_))
        ));
    }

    #[test]
    fn the_cluster_that_holds_keys_goes_first() {
        let surveys = surveys(&[0, 0, 7]);
        assert_eq!(plan(&surveys, &ring_of(&surveys, &[])).unwrap(), [2, 0, 1]);
    }

    #[test]
    fn an_install_that_was_cut_off_is_completed() {
        let mut surveys = surveys(&[5, 0, 0]);
        let ring = ring_of(&surveys, &[]);
        surveys[0].ring = ring.clone();
        assert_eq!(plan(&surveys, &ring).unwrap(), [1, 2]);
        surveys.iter_mut().for_each(|s| s.ring = ring.clone());
        assert!(plan(&surveys, &ring).unwrap().is_empty());
    }

    #[test]
    fn another_ring_anywhere_is_refused_before_anything_is_installed() {
        let mut surveys = surveys(&[0, 0]);
        surveys[1].ring = ring_of(&surveys, &[1.0, 2.0]);
        let refused = plan(&surveys, &ring_of(&surveys, &[]));
        assert_eq!(refused, Err(InstallError::OtherRing { cluster: id("c2"), epoch: 1 }));
    }

    #[test]
    fn keys_in_two_ringless_clusters_are_refused_beforehand() {
        let mut surveys = surveys(&[3, 0, 4]);
        let ring = ring_of(&surveys, &[]);
        let refused = plan(&surveys, &ring);
        assert_eq!(refused, Err(InstallError::SeveralHoldKeys(id("c1"), id("c3"))));
        // Keys of a cluster that has the ring already are where they belong.
        surveys[0].ring = ring.clone();
        assert_eq!(plan(&surveys, &ring).unwrap(), [2, 1]);
    }

    /// A lost answer never claims that nothing was changed, not even for the first cluster.
    #[test]
    fn a_lost_answer_is_not_told_as_a_refusal() {
        let lost = ClientError::AnswerLost { message: "no answer from h1".into() };
        let error = not_installed(id("c1"), &lost, Vec::new());
        assert!(matches!(error, InstallError::AnswerLost { .. }), "{error}");
        let unreachable = ClientError::Unreachable { tried: Vec::new() };
        let error = not_installed(id("c2"), &unreachable, vec![id("c1")]);
        assert!(matches!(error, InstallError::Refused { .. }), "{error}");
    }

    fn metrics(node: NodeId, state: NodeState, voters: &[NodeId]) -> NodeMetrics {
        NodeMetrics {
            http: format!("h{node}"),
            rpc: format!("r{node}"),
            voters: voters.into(),
            ..NodeMetrics::example("c1", node, state)
        }
    }

    #[test]
    fn exactly_the_members_must_be_listed() {
        let addresses = ["h1".to_owned(), "h2".to_owned()];
        let seen = |voters: &[NodeId]| {
            vec![metrics(1, NodeState::Leader, voters), metrics(2, NodeState::Follower, voters)]
        };
        assert_eq!(members(&addresses, &seen(&[1, 2])).unwrap(), nodes(2));
        let missing = members(&addresses, &seen(&[1, 2, 3]));
        assert_eq!(missing, Err(InstallError::MemberNotListed { cluster: id("c1"), node: 3 }));
        let stranger = members(&addresses, &seen(&[1]));
        assert!(matches!(stranger, Err(InstallError::NotAMember { node: 2, .. })));
        let mut mixed = seen(&[1, 2]);
        mixed[1].cluster = id("c2");
        assert!(matches!(members(&addresses, &mixed), Err(InstallError::Mixed { .. })));
        let mut leaderless = seen(&[1, 2]);
        leaderless[0].state = NodeState::Follower;
        assert_eq!(members(&addresses, &leaderless), Err(InstallError::NoLeader(id("c1"))));
    }
}
