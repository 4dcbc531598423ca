//! How running clusters are, asked from outside over HTTP: what `admin status` and `ring show` tell.
//!
//! A node that does not answer is an ordinary row here, not a failure: it is the very thing that one
//! looks for.

use std::collections::BTreeSet;

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

impl NodeStatus {
    fn silent(http: &str, id: Option<NodeId>, error: &str) -> Self {
        let error = Some(error.to_owned());
        Self { id, http: http.to_owned(), reachable: false, error, metrics: None }
    }

    fn answering(http: &str, metrics: &NodeMetrics) -> Self {
        let (id, metrics) = (Some(metrics.id), Some(metrics.clone()));
        Self { id, http: http.to_owned(), reachable: true, error: None, metrics }
    }
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
    let members = || answers.iter().flatten().flat_map(|metrics| &metrics.members);
    let id_of = |address: &String| {
        let told = || members().find(|member| member.addrs.http == *address).map(|m| m.id);
        in_ring(address).map(|(_, node)| node.id).or_else(told)
    };
    let node = |(address, answer): (&String, &Result<NodeMetrics, String>)| match answer {
        Ok(metrics) => NodeStatus::answering(address, metrics),
        Err(error) => NodeStatus::silent(address, id_of(address), error),
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

/// What some addresses belong to.
#[derive(Debug, Clone, PartialEq)]
pub struct Discovered {
    /// The clusters, each with the addresses of its nodes: those of the ring first, in its order, then
    /// the others, in the order in which the endpoints name them, each with its further members.
    pub clusters: Vec<Vec<String>>,
    /// Nodes that did not answer, and of which nobody says which cluster they belong to.
    pub unplaced: Vec<NodeStatus>,
}

/// Finds the clusters behind some addresses: by the ring that one of them knows and, for nodes that
/// are in no ring, by the cluster that they say they belong to, whose other members they name. A node that
/// does not answer is placed where the ring or its cluster has it, else beside those that `listed`, a nodes
/// file, lists it with; a file that is out of date can put such a node in a wrong row, and nothing more.
pub async fn discover(endpoints: &[String], listed: &[Vec<String>]) -> Discovered {
    let answers = ask_all(endpoints).await;
    let ring = newest_ring(answers.iter().flatten()).await.unwrap_or_else(Ring::none);
    group(endpoints, &answers, &ring, listed)
}

fn group(
    endpoints: &[String],
    answers: &[Result<NodeMetrics, String>],
    ring: &Ring,
    listed: &[Vec<String>],
) -> Discovered {
    let addresses = |cluster: &RingCluster| {
        cluster.nodes.iter().map(|node| node.http.clone()).collect::<Vec<_>>()
    };
    let mut clusters: Vec<Vec<String>> = ring.clusters.iter().map(addresses).collect();
    add_speakers(&mut clusters, endpoints, answers);
    let mut unplaced = Vec::new();
    for (endpoint, answer) in endpoints.iter().zip(answers) {
        let Err(error) = answer else { continue };
        if !clusters.iter().flatten().any(|address| address == endpoint)
            && !add_by_list(&mut clusters, endpoint, listed)
            && !unplaced.iter().any(|node: &NodeStatus| node.http == *endpoint)
        {
            unplaced.push(NodeStatus::silent(endpoint, None, error));
        }
    }
    Discovered { clusters, unplaced }
}

/// Adds the nodes that answered and are not there yet, each to the others of its cluster.
fn add_speakers(
    clusters: &mut Vec<Vec<String>>,
    endpoints: &[String],
    answers: &[Result<NodeMetrics, String>],
) {
    let mut others: Vec<(&ClusterId, Vec<String>)> = Vec::new();
    let mut seen: BTreeSet<&String> = BTreeSet::new();
    for (endpoint, answer) in endpoints.iter().zip(answers) {
        let Ok(metrics) = answer else { continue };
        // A node may be named otherwise than in the ring, or twice: it says itself what it goes by.
        let known = clusters.iter().flatten().any(|a| a == endpoint || *a == metrics.http);
        if known || !seen.insert(&metrics.http) {
            continue;
        }
        match others.iter_mut().find(|(id, _)| *id == &metrics.cluster) {
            Some((_, nodes)) => nodes.push(endpoint.clone()),
            None => others.push((&metrics.cluster, vec![endpoint.clone()])),
        }
    }
    for (cluster, nodes) in &mut others {
        let pairs = endpoints.iter().zip(answers);
        let speakers =
            pairs.filter_map(|(endpoint, answer)| Some((endpoint, answer.as_ref().ok()?)));
        add_members(nodes, speakers.filter(|(_, metrics)| metrics.cluster == **cluster));
    }
    clusters.extend(others.into_iter().map(|(_, nodes)| nodes));
}

/// Adds the members of a cluster that nobody named, as that node tells of them which has heard the latest:
/// in the order of their ids, and then those that are no members.
fn add_members<'a>(
    nodes: &mut Vec<String>,
    speakers: impl Iterator<Item = (&'a String, &'a NodeMetrics)> + Clone,
) {
    let newest = speakers.clone().max_by_key(|(_, metrics)| (metrics.term, metrics.last_log));
    let members = newest.iter().flat_map(|(_, metrics)| &metrics.members);
    let mut all: Vec<String> = Vec::new();
    for member in members {
        // One that answered may have been named otherwise than its cluster knows it.
        let named = speakers.clone().find(|(_, metrics)| metrics.id == member.id);
        all.push(named.map_or(&member.addrs.http, |(endpoint, _)| endpoint).clone());
    }
    let others: Vec<String> = nodes.drain(..).filter(|node| !all.contains(node)).collect();
    all.extend(others);
    *nodes = all;
}

/// Adds a node that did not answer to those that it is listed with; whether it is listed at all.
fn add_by_list(clusters: &mut Vec<Vec<String>>, silent: &String, listed: &[Vec<String>]) -> bool {
    let Some(listed) = listed.iter().find(|nodes| nodes.contains(silent)) else { return false };
    match clusters.iter_mut().find(|nodes| nodes.iter().any(|node| listed.contains(node))) {
        Some(nodes) => nodes.push(silent.clone()),
        None => clusters.push(listed.clone()),
    }
    true
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
    use crate::metrics::{Member, NodeState};
    use crate::ring::RingNode;
    use crate::types::NodeAddrs;

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

    fn member(cluster: &str, id: NodeId) -> Member {
        let addrs = NodeAddrs { http: format!("{cluster}-{id}"), rpc: String::new() };
        Member { id, addrs }
    }

    #[test]
    fn a_silent_member_is_named_by_its_cluster() {
        let mut leader = metrics("c1", 1, NodeState::Leader, 3);
        leader.members = vec![member("c1", 1), member("c1", 2)];
        let answers = [Ok(leader), Err("refused".to_owned())];
        let status = cluster_status(&strings(["c1-1", "c1-2"]), &answers, &Ring::none());
        assert_eq!(status.nodes[1].id, Some(2));
    }

    const NOBODY: &[Vec<String>] = &[];

    fn refused() -> Result<NodeMetrics, String> {
        Err("refused".to_owned())
    }

    fn strings<const N: usize>(texts: [&str; N]) -> Vec<String> {
        texts.map(String::from).into()
    }

    #[test]
    fn endpoints_are_grouped_by_the_ring_and_then_by_what_they_say() {
        let endpoints = strings(["c1-2", "c9-1", "c2-1", "alias", "c9-2"]);
        let answers = [
            Ok(metrics("c1", 2, NodeState::Follower, 1)),
            Ok(metrics("c9", 1, NodeState::Leader, 1)),
            Ok(metrics("c2", 1, NodeState::Leader, 1)),
            // Another name for a node that is there already.
            Ok(metrics("c9", 1, NodeState::Leader, 1)),
            Ok(metrics("c9", 2, NodeState::Follower, 1)),
        ];
        let found = group(&endpoints, &answers, &ring(), NOBODY);
        // In the order of the endpoints: weights are given in it.
        let clusters = [strings(["c1-1", "c1-2"]), strings(["c9-1", "c9-2"]), strings(["c2-1"])];
        assert_eq!(found, Discovered { clusters: clusters.into(), unplaced: Vec::new() });
    }

    #[test]
    fn a_cluster_that_is_in_no_ring_is_told_by_any_of_its_nodes() {
        let mut behind = metrics("c9", 2, NodeState::Follower, 3);
        behind.members = vec![member("c9", 1), member("c9", 2), member("c9", 7)];
        let mut newer = metrics("c9", 3, NodeState::Follower, 4);
        newer.members = (1..=4).map(|id| member("c9", id)).collect();
        // The second is known by its cluster under another name; the fourth does not answer.
        let endpoints = strings(["alias", "c9-3", "c9-4"]);
        let answers = [Ok(behind), Ok(newer), refused()];
        let found = group(&endpoints, &answers, &Ring::none(), NOBODY);
        let clusters = vec![strings(["c9-1", "alias", "c9-3", "c9-4"])];
        assert_eq!(found, Discovered { clusters, unplaced: Vec::new() });
    }

    #[test]
    fn a_silent_endpoint_is_no_cluster_of_its_own() {
        let endpoints = strings(["c2-1", "gone", "c1-1", "c2-3", "gone"]);
        let leader = Ok(metrics("c2", 1, NodeState::Leader, 1));
        let answers = [leader, refused(), refused(), refused(), refused()];
        // The ring has c1-1; the list has c2-3 beside c2-1; nobody knows the last one.
        let listed = [strings(["c2-1", "c2-2", "c2-3"])];
        let found = group(&endpoints, &answers, &ring(), &listed);
        assert_eq!(found.clusters, [strings(["c1-1", "c1-2"]), strings(["c2-1", "c2-3"])]);
        assert_eq!(found.unplaced, [NodeStatus::silent("gone", None, "refused")]);
    }

    #[test]
    fn of_a_cluster_that_is_only_listed_all_nodes_are_asked() {
        let listed = [strings(["x-1", "x-2"]), strings(["y-1", "y-2"])];
        let endpoints = strings(["y-2", "y-1"]);
        let found = group(&endpoints, &[refused(), refused()], &Ring::none(), &listed);
        let clusters = vec![strings(["y-1", "y-2"])];
        assert_eq!(found, Discovered { clusters, unplaced: Vec::new() });
    }
}
