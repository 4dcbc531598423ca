//! What a node says about itself: the JSON of `GET /cluster/metrics` and `GET /cluster/handoffs`.
//!
//! One struct of each for both ends, so that server and client cannot drift apart. It may gain members, and
//! a reader ignores those that it does not know; the ones marked as defaulted may be missing in the
//! answer of an older node.

use serde::{Deserialize, Serialize};

use crate::handoff::RingState;
use crate::types::{ClusterId, Epoch, NodeAddrs, NodeId, Revision};

/// Whether keys and bytes are counted: that may take some milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// They are left out.
    Omitted,
    /// They are told.
    Counted,
}

/// What a cluster's leader says of the ring and of handoffs: the JSON of `GET /cluster/handoffs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HandoffView {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node that answered.
    pub node: NodeId,
    /// Whether it leads the cluster. Others pass the question on, so an answer is usually a leader's.
    pub leader: bool,
    /// The ring, the change under way and the cluster's part in it.
    pub state: RingState,
    /// How many keys the cluster holds, about; with what is staged. Only if it was asked for.
    #[serde(default)]
    pub keys: Option<u64>,
    /// The bytes of its data on one node's disk, without what is still in memory. Only if asked for.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
}

/// What a node's applied state comes to: the JSON of `GET /cluster/digest`. Replicas of a cluster that tell
/// of the same entry tell the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDigest {
    /// Its cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// The index of the last entry that the state contains; `null` before the first.
    pub applied: Option<u64>,
    /// How many keys have a row.
    pub rows: u64,
    /// A hash of records, revisions, ring and remembered writes, in hexadecimal.
    pub digest: String,
}

/// How many keys are counted; a larger number of them is an estimate, in which keys that were overwritten or
/// deleted not long ago may count several times.
pub const COUNTED_KEYS_MAX: u64 = 10_000;

/// The state of one node, as it sees itself. Also answered before the node is initialised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeMetrics {
    /// The node's id inside its cluster.
    pub id: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Where it serves clients.
    pub http: String,
    /// Where it serves its peers.
    pub rpc: String,
    /// Its part in the Raft group.
    pub state: NodeState,
    /// Its current term; 0 before it was initialised.
    pub term: u64,
    /// The leader that it knows of.
    pub current_leader: Option<NodeId>,
    /// The index of its last log entry.
    pub last_log: Option<u64>,
    /// The index of the last entry that its state machine has applied.
    pub last_applied: Option<u64>,
    /// The members that vote, of both halves of a joint membership; sorted.
    #[serde(default)]
    pub voters: Vec<NodeId>,
    /// The members that only follow; sorted.
    #[serde(default)]
    pub learners: Vec<NodeId>,
    /// How many keys its state machine holds, if it counts them.
    #[serde(default)]
    pub keys: Option<u64>,
    /// The revision of its state machine.
    #[serde(default)]
    pub revision: Option<Revision>,
    /// The epoch of the ring that its state machine lives by; 0 for none.
    #[serde(default)]
    pub epoch: Option<Epoch>,
    /// Whether the membership is between two: majorities of both are needed until the change is done.
    #[serde(default)]
    pub joint: bool,
    /// All members, sorted by their ids, with the addresses under which its cluster knows them.
    #[serde(default)]
    pub members: Vec<Member>,
    /// Whether its cluster serves no key before it has a ring, and this node has applied none yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits_ring: bool,
    /// Why the node has stopped serving, if its storage or consensus failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// A member of a cluster, as a node of it knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// Where it serves clients, and its peers.
    #[serde(flatten)]
    pub addrs: NodeAddrs,
}

/// A node's part in its Raft group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// It proposes what others append. At most one of a term, but an old one may not know yet.
    Leader,
    /// It appends what the leader sends.
    Follower,
    /// It asks for votes.
    Candidate,
    /// It follows without a vote.
    Learner,
    /// It has neither formed nor joined a cluster.
    Uninitialized,
}

#[cfg(test)]
impl NodeMetrics {
    /// What tests change the interesting members of: a node of term 1 without members or entries.
    pub(crate) fn example(cluster: &str, id: NodeId, state: NodeState) -> Self {
        Self {
            id,
            cluster: cluster.parse().unwrap(),
            http: "h".into(),
            rpc: "r".into(),
            state,
            term: 1,
            current_leader: None,
            last_log: None,
            last_applied: None,
            voters: Vec::new(),
            learners: Vec::new(),
            keys: None,
            revision: None,
            epoch: None,
            joint: false,
            members: Vec::new(),
            awaits_ring: false,
            failed: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_contracts_shape() {
        let text = r#"{"id":1,"cluster":"c1","http":"h","rpc":"r","state":"leader","term":3,
            "current_leader":1,"last_log":9,"last_applied":9,"voters":[1],"learners":[]}"#;
        let metrics: NodeMetrics = serde_json::from_str(text).unwrap();
        assert_eq!((metrics.state, metrics.current_leader), (NodeState::Leader, Some(1)));
        let mut json = serde_json::to_value(&metrics).unwrap();
        for added in ["keys", "revision", "epoch"] {
            assert!(json.as_object_mut().unwrap().remove(added).unwrap().is_null());
        }
        assert_eq!(json.as_object_mut().unwrap().remove("joint").unwrap(), false);
        let members = json.as_object_mut().unwrap().remove("members").unwrap();
        assert_eq!(members, serde_json::json!([]));
        assert_eq!(json, serde_json::from_str::<serde_json::Value>(text).unwrap());
        let addrs = NodeAddrs { http: "h".into(), rpc: "r".into() };
        let member = serde_json::to_value(Member { id: 1, addrs }).unwrap();
        assert_eq!(member, serde_json::json!({"id": 1, "http": "h", "rpc": "r"}));
    }

    #[test]
    fn an_uninitialised_node_says_null_where_it_knows_nothing() {
        let text = r#"{"id":1,"cluster":"c1","http":"h","rpc":"r","state":"uninitialized","term":0,
            "current_leader":null,"last_log":null,"last_applied":null,"later_member":true}"#;
        let metrics: NodeMetrics = serde_json::from_str(text).unwrap();
        assert_eq!(metrics.state, NodeState::Uninitialized);
        assert_eq!(metrics.last_applied, None);
    }
}
