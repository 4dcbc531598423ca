//! Turns started nodes into one Raft group, from whatever state an earlier run left them in.
//!
//! There is no progress file. [`next_step`] looks at what the nodes say about themselves and names
//! the one thing to do next; [`form`] does it and looks again. So a run that was killed half way is
//! completed by the next, a step that failed because of an election is simply taken again (one that was
//! refused as making no sense is not), and a cluster that is complete is left alone.
//!
//! Rejected: calling `init`, `add_learner` and `change_membership` in a row and treating "already
//! done" as success. It cannot tell a cluster that is complete from one that has members of another
//! layout, and every start would write a membership into the log.

use std::fmt;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::ManagerError;
use super::layout::LayoutCluster;
use crate::client_error::ClientError;
use crate::metrics::{NodeMetrics, NodeState};
use crate::raft_node::RaftNode;
use crate::types::NodeId;

/// How long forming one cluster may take: some elections and, for learners, the copy of the log. A
/// cluster that is not there by then does not come.
pub(super) const FORM_TIMEOUT: Duration = Duration::from_secs(60);

/// How long to wait between two looks while there is nothing to do but wait: well below an election.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How long one node may take to say how it is, or which ring it lives by. It answers from memory.
pub(super) const METRICS_TIMEOUT: Duration = Duration::from_secs(2);

/// The one thing to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Make the first node a cluster of one.
    Init,
    /// Let this node follow.
    AddLearner(NodeId),
    /// Let all nodes vote.
    ChangeMembership,
    /// Nothing but wait for what is named.
    Wait(&'static str),
    /// The cluster is complete and has a leader.
    Done,
    /// The cluster has a member that the layout does not know.
    Stranger(NodeId),
    /// This node has nothing, and the cluster counts on it.
    LostData(NodeId),
}

impl fmt::Display for Step {
    /// Completes "waited too long for ...".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Init => f.write_str("the first node to found the cluster"),
            Self::AddLearner(id) => write!(f, "node {id} to join as a learner"),
            Self::ChangeMembership => f.write_str("all nodes to become voters"),
            Self::Wait(what) => f.write_str(what),
            Self::Done => f.write_str("nothing"),
            Self::Stranger(id) => write!(f, "member {id} to be one of the layout"),
            Self::LostData(id) => write!(f, "node {id} to have what it had"),
        }
    }
}

/// Whether an earlier run, or this one, saw a change to the full membership succeed. Needed because
/// a joint membership (a change that was cut off in its middle) lists the same voters as a finished
/// one, but depends on the old members alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Membership {
    Unconfirmed,
    Confirmed,
}

/// Decides what to do next. `ids` are the layout's nodes, the first of which founds the cluster;
/// `seen` is what they answered, in any order, `None` for a node that did not.
fn next_step(ids: &[NodeId], seen: &[Option<NodeMetrics>], membership: Membership) -> Step {
    let known = || seen.iter().flatten();
    let stranger = known().flat_map(members).find(|id| !ids.contains(id));
    if let Some(id) = stranger {
        return Step::Stranger(id);
    }
    if known().all(|node| node.state == NodeState::Uninitialized) {
        // A silent node may belong to a cluster already; founding a second one would split it.
        let complete = known().count() == ids.len();
        return if complete { Step::Init } else { Step::Wait("all nodes to answer") };
    }
    let Some(leader) = leader_of(seen) else {
        return Step::Wait("a leader");
    };
    // Before the membership was confirmed once, a voter may not have heard of it yet.
    if membership == Membership::Confirmed
        && let Some(lost) = lost_voter(seen, leader)
    {
        return Step::LostData(lost);
    }
    if let Some(id) = ids.iter().find(|id| !members(leader).any(|member| member == **id)) {
        return Step::AddLearner(*id);
    }
    let all_vote = ids.iter().all(|id| leader.voters.contains(id));
    if all_vote && membership == Membership::Confirmed {
        Step::Done
    } else {
        Step::ChangeMembership
    }
}

/// A node that says it is blank, where the leader knows it as a voter.
fn lost_voter(seen: &[Option<NodeMetrics>], leader: &NodeMetrics) -> Option<NodeId> {
    let blank = seen.iter().flatten().filter(|node| node.state == NodeState::Uninitialized);
    blank.map(|node| node.id).find(|id| leader.voters.contains(id))
}

fn members(node: &NodeMetrics) -> impl Iterator<Item = NodeId> {
    node.voters.iter().chain(&node.learners).copied()
}

/// The node that leads, as far as these answers tell: an old leader that was cut off says that it
/// leads as well, so one of an older term than any node has seen does not count.
pub fn leader_of(seen: &[Option<NodeMetrics>]) -> Option<&NodeMetrics> {
    let newest = seen.iter().flatten().map(|node| node.term).max()?;
    seen.iter().flatten().find(|node| node.state == NodeState::Leader && node.term == newest)
}

/// Brings one cluster to the layout's membership. Returns once all its nodes vote and one leads.
/// Safe to cancel and to call again.
pub(super) async fn form(
    cluster: &LayoutCluster,
    mut membership: Membership,
) -> Result<(), ManagerError> {
    let ids: Vec<NodeId> = cluster.nodes.iter().map(|node| node.id).collect();
    let addresses: Vec<String> = cluster.nodes.iter().map(|node| node.http.clone()).collect();
    let deadline = Instant::now() + FORM_TIMEOUT;
    loop {
        let answers = ask_all(&addresses).await;
        let silent = answers.iter().find_map(|answer| answer.as_ref().err().cloned());
        let seen: Vec<_> = answers.into_iter().map(Result::ok).collect();
        let step = next_step(&ids, &seen, membership);
        let trouble = match step {
            Step::Done => return Ok(()),
            Step::Stranger(node) => {
                return Err(ManagerError::Stranger { cluster: cluster.id.clone(), node });
            }
            Step::LostData(node) => {
                return Err(ManagerError::LostData { cluster: cluster.id.clone(), node });
            }
            Step::Wait(_) => silent,
            _ => match perform(&step, cluster, &ids).await {
                Ok(()) => None,
                // Everything else may pass: an election, a node that is still starting, a change under way.
                Err(ClientError::Server { status: 400, message, .. }) => {
                    let (cluster, refusal) = (cluster.id.clone(), format!("{step}: {message}"));
                    return Err(ManagerError::Refused { cluster, refusal });
                }
                Err(error) => Some(error.to_string()),
            },
        };
        if step == Step::ChangeMembership && trouble.is_none() {
            membership = Membership::Confirmed;
        }
        if Instant::now() >= deadline {
            let what = trouble.map_or(step.to_string(), |trouble| format!("{step} ({trouble})"));
            return Err(ManagerError::Deadline { what: format!("{}: {what}", cluster.id) });
        }
        sleep(POLL_INTERVAL).await;
    }
}

async fn perform(step: &Step, cluster: &LayoutCluster, ids: &[NodeId]) -> Result<(), ClientError> {
    let raft = RaftNode::new(cluster.nodes.iter().map(|node| node.http.clone()).collect());
    match step {
        Step::Init => {
            // Asked of the first node alone: it is the one that founds the cluster. Whoever forms a
            // cluster here gives it a ring next, and nothing may be written past that.
            RaftNode::new(vec![cluster.nodes[0].http.clone()]).init_awaiting_ring().await
        }
        Step::AddLearner(id) => {
            let node = cluster.nodes.iter().find(|node| node.id == *id);
            let node = node.expect("only nodes of the layout are added");
            raft.add_learner(node.id, &node.http, &node.rpc).await
        }
        Step::ChangeMembership => raft.change_membership(ids).await,
        Step::Wait(_) | Step::Done | Step::Stranger(_) | Step::LostData(_) => Ok(()),
    }
}

/// What every node says about itself, in the order of `addresses`; all are asked at once.
pub async fn ask_all(addresses: &[String]) -> Vec<Result<NodeMetrics, String>> {
    join_all(addresses.iter().map(|address| ask(address))).await
}

async fn ask(address: &str) -> Result<NodeMetrics, String> {
    let raft = RaftNode::new(vec![address.to_owned()]).with_timeout(METRICS_TIMEOUT);
    raft.metrics_of(address).await.map_err(|error| match error {
        // "No node can be reached" says nothing more of one.
        ClientError::Unreachable { mut tried } if tried.len() == 1 => tried.remove(0),
        error => error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::Membership::{Confirmed, Unconfirmed};
    use super::*;

    const IDS: [NodeId; 3] = [1, 2, 3];

    fn node(
        id: NodeId,
        state: NodeState,
        voters: &[NodeId],
        learners: &[NodeId],
    ) -> Option<NodeMetrics> {
        Some(NodeMetrics {
            voters: voters.into(),
            learners: learners.into(),
            ..NodeMetrics::example("c1", id, state)
        })
    }

    fn fresh(id: NodeId) -> Option<NodeMetrics> {
        node(id, NodeState::Uninitialized, &[], &[])
    }

    fn led_by_1(voters: &[NodeId], learners: &[NodeId]) -> Vec<Option<NodeMetrics>> {
        vec![node(1, NodeState::Leader, voters, learners), fresh(2), fresh(3)]
    }

    #[test]
    fn fresh_nodes_are_taken_step_by_step_to_the_full_membership() {
        let story = [
            (vec![fresh(1), fresh(2), fresh(3)], Step::Init),
            (led_by_1(&[1], &[]), Step::AddLearner(2)),
            (led_by_1(&[1], &[2]), Step::AddLearner(3)),
            (led_by_1(&[1], &[2, 3]), Step::ChangeMembership),
        ];
        for (seen, expected) in story {
            assert_eq!(next_step(&IDS, &seen, Unconfirmed), expected, "{seen:?}");
        }
        let follower = |id| node(id, NodeState::Follower, &IDS, &[]);
        let seen = [node(1, NodeState::Leader, &IDS, &[]), follower(2), follower(3)];
        assert_eq!(next_step(&IDS, &seen, Confirmed), Step::Done);
    }

    #[test]
    fn a_change_that_may_be_half_done_is_made_again() {
        assert_eq!(
            next_step(&IDS, &led_by_1(&[1, 2, 3], &[]), Unconfirmed),
            Step::ChangeMembership
        );
    }

    #[test]
    fn nothing_is_founded_while_a_node_is_silent() {
        let seen = [fresh(1), None, fresh(3)];
        assert!(matches!(next_step(&IDS, &seen, Unconfirmed), Step::Wait(_)));
    }

    #[test]
    fn a_formed_cluster_waits_for_its_election_and_is_not_changed() {
        let followers = |id| node(id, NodeState::Follower, &IDS, &[]);
        let electing = [followers(1), followers(2), followers(3)];
        assert_eq!(next_step(&IDS, &electing, Confirmed), Step::Wait("a leader"));
        let led = [followers(1), node(2, NodeState::Leader, &IDS, &[]), None];
        assert_eq!(next_step(&IDS, &led, Confirmed), Step::Done);
    }

    /// One that was removed, and comes back with nothing, is taken in again.
    #[test]
    fn a_voter_that_is_blank_has_lost_its_data() {
        let seen = [node(1, NodeState::Leader, &IDS, &[]), None, fresh(3)];
        assert_eq!(next_step(&IDS, &seen, Confirmed), Step::LostData(3));
        assert_eq!(next_step(&IDS, &seen, Unconfirmed), Step::ChangeMembership);
        assert_eq!(next_step(&IDS, &led_by_1(&[1, 2], &[]), Confirmed), Step::LostData(2));
        let seen = [node(1, NodeState::Leader, &[1, 2], &[]), None, fresh(3)];
        assert_eq!(next_step(&IDS, &seen, Confirmed), Step::AddLearner(3));
    }

    #[test]
    fn an_old_leader_does_not_count() {
        let mut follower = node(2, NodeState::Follower, &IDS, &[]).unwrap();
        follower.term = 2;
        let seen = [node(1, NodeState::Leader, &IDS, &[]), Some(follower), None];
        assert_eq!(next_step(&IDS, &seen, Confirmed), Step::Wait("a leader"));
    }

    #[test]
    fn a_member_outside_the_layout_is_never_overruled() {
        let seen = led_by_1(&[1, 2, 3, 4], &[]);
        assert_eq!(next_step(&IDS, &seen, Unconfirmed), Step::Stranger(4));
        assert_eq!(next_step(&IDS, &led_by_1(&[1], &[7]), Confirmed), Step::Stranger(7));
    }

    #[test]
    fn a_cluster_of_one_is_complete_by_itself() {
        assert_eq!(next_step(&[1], &[fresh(1)], Unconfirmed), Step::Init);
        let led = [node(1, NodeState::Leader, &[1], &[])];
        assert_eq!(next_step(&[1], &led, Confirmed), Step::Done);
    }
}
