//! How running clusters are, asked from outside over HTTP: what `admin status` and `ring show` tell.
//!
//! A node that does not answer is an ordinary row here, not a failure: it is the very thing that one
//! looks for.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use serde::Serialize;

use super::forming::{METRICS_TIMEOUT, ask_all, leader_of};
use crate::metrics::NodeMetrics;
use crate::raft_node::RaftNode;
use crate::ring::{Ring, RingCluster};
use crate::types::{ClusterId, NodeId};

/// One cluster and its nodes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClusterStatus {
    /// Its id; `None` when no node answered and no ring names it.
    pub id: Option<ClusterId>,
    /// The node that leads it.
    pub leader: Option<NodeId>,
    /// Its nodes, in the order in which they were listed.
    pub nodes: Vec<NodeStatus>,
}

/// One node, reachable or not.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NodeStatus {
    /// Its id, from itself or from the ring.
    pub id: Option<NodeId>,
    /// The HTTP address at which it was asked.
    pub http: String,
    /// Whether it answered.
    pub reachable: bool,
    /// Why it did not answer.
    pub error: Option<String>,
    /// What it answered.
    pub metrics: Option<NodeMetrics>,
}

/// Asks all nodes of all clusters at once. `clusters` is what a nodes file lists.
pub async fn status_of(clusters: &[Vec<String>]) -> Vec<ClusterStatus> {
    let answers = join_all(clusters.iter().map(|addresses| ask_all(addresses))).await;
    let seen = || answers.iter().flatten().flatten();
    let ring = newest_ring(seen()).await.unwrap_or_else(Ring::none);
    let pairs = clusters.iter().zip(&answers);
    pairs.map(|(addresses, answers)| cluster_status(addresses, answers, &ring)).collect()
}

fn cluster_status(
    addresses: &[String],
    answers: &[Result<NodeMetrics, String>],
    ring: &Ring,
) -> ClusterStatus {
    let in_ring = |address: &String| {
        let members = ring.clusters.iter().flat_map(|c| c.nodes.iter().map(move |n| (c, n)));
        members.into_iter().find(|(_, node)| node.http == *address)
    };
    let node = |(address, answer): (&String, &Result<NodeMetrics, String>)| NodeStatus {
        id: match answer {
            Ok(metrics) => Some(metrics.id),
            Err(_) => in_ring(address).map(|(_, node)| node.id),
        },
        http: address.clone(),
        reachable: answer.is_ok(),
        error: answer.as_ref().err().cloned(),
        metrics: answer.as_ref().ok().cloned(),
    };
    let seen: Vec<_> = answers.iter().map(|answer| answer.as_ref().ok().cloned()).collect();
    let said = seen.iter().flatten().map(|metrics| metrics.cluster.clone()).next();
    let listed = || addresses.iter().find_map(in_ring).map(|(cluster, _)| cluster.id.clone());
    ClusterStatus {
        id: said.or_else(listed),
        leader: leader_of(&seen).map(|leader| leader.id),
        nodes: addresses.iter().zip(answers).map(node).collect(),
    }
}

/// Finds the clusters behind some addresses: by the ring that one of them knows and, for nodes that
/// are in no ring, by the cluster that they say they belong to.
pub async fn discover(endpoints: &[String]) -> Vec<Vec<String>> {
    let answers = ask_all(endpoints).await;
    let ring = newest_ring(answers.iter().flatten()).await.unwrap_or_else(Ring::none);
    group(endpoints, &answers, &ring)
}

fn group(
    endpoints: &[String],
    answers: &[Result<NodeMetrics, String>],
    ring: &Ring,
) -> Vec<Vec<String>> {
    let addresses = |cluster: &RingCluster| {
        cluster.nodes.iter().map(|node| node.http.clone()).collect::<Vec<_>>()
    };
    let mut clusters: Vec<Vec<String>> = ring.clusters.iter().map(addresses).collect();
    let mut others: BTreeMap<Option<ClusterId>, Vec<String>> = BTreeMap::new();
    for (endpoint, answer) in endpoints.iter().zip(answers) {
        // A node may be listed under another name than the ring's: it says itself what it goes by.
        let own = answer.as_ref().map_or(endpoint, |metrics| &metrics.http);
        let mut listed = clusters.iter().flatten();
        if !listed.any(|address| address == endpoint || address == own) {
            let cluster = answer.as_ref().ok().map(|metrics| metrics.cluster.clone());
            others.entry(cluster).or_default().push(endpoint.clone());
        }
    }
    clusters.extend(others.into_values());
    clusters
}

/// The ring of the highest epoch among these nodes; `None` when none of them has one.
pub async fn newest_ring(nodes: impl Iterator<Item = &NodeMetrics>) -> Option<Ring> {
    let newest = nodes.max_by_key(|node| node.epoch).filter(|node| node.epoch > Some(0))?;
    let raft = RaftNode::new(vec![newest.http.clone()]).with_timeout(METRICS_TIMEOUT);
    match raft.hash_ring_of(&newest.http).await {
        Ok(ring) => Some(ring),
        Err(error) => {
            tracing::warn!(node = newest.http, %error, "cannot fetch the ring");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::NodeState;
    use crate::ring::RingNode;

    fn metrics(cluster: &str, id: NodeId, state: NodeState, term: u64) -> NodeMetrics {
        NodeMetrics {
            http: format!("{cluster}-{id}"),
            term,
            ..NodeMetrics::example(cluster, id, state)
        }
    }

    fn ring() -> Ring {
        let node = |id| RingNode { id, http: format!("c1-{id}"), rpc: String::new() };
        let id: ClusterId = "c1".parse().unwrap();
        let cluster = RingCluster { id: id.clone(), weight: 1.0, nodes: vec![node(1), node(2)] };
        Ring { epoch: 1, sequencer: Some(id), clusters: vec![cluster], ..Ring::none() }
    }

    #[test]
    fn a_silent_node_is_a_row_named_by_the_ring() {
        let addresses = ["c1-1".to_owned(), "c1-2".to_owned()];
        let answers = [Ok(metrics("c1", 1, NodeState::Leader, 3)), Err("refused".to_owned())];
        let status = cluster_status(&addresses, &answers, &ring());
        assert_eq!((status.id, status.leader), ("c1".parse().ok(), Some(1)));
        let silent = &status.nodes[1];
        assert_eq!((silent.id, silent.reachable), (Some(2), false));
        assert_eq!(silent.error.as_deref(), Some("refused"));
    }

    #[test]
    fn a_cluster_of_which_nobody_answers_has_no_leader() {
        let answers = [Err("refused".to_owned())];
        let status = cluster_status(&["x:1".to_owned()], &answers, &Ring::none());
        assert_eq!((status.id, status.leader), (None, None));
        assert_eq!(status.nodes[0].id, None);
    }

    #[test]
    fn endpoints_are_grouped_by_the_ring_and_then_by_what_they_say() {
        let endpoints: Vec<String> = ["c1-2", "c2-1", "c2-2", "gone"].map(String::from).into();
        let answers = [
            Ok(metrics("c1", 2, NodeState::Follower, 1)),
            Ok(metrics("c2", 1, NodeState::Leader, 1)),
            Ok(metrics("c2", 2, NodeState::Follower, 1)),
            Err("refused".to_owned()),
        ];
        let expected = vec![vec!["c1-1", "c1-2"], vec!["gone"], vec!["c2-1", "c2-2"]];
        assert_eq!(group(&endpoints, &answers, &ring()), expected);
    }
}
