//! The ring: which clusters there are, and which of them owns a key.
//!
//! [`Ring`] is the document that clusters agree on through their Raft logs and that clients fetch
//! (`GET /v1/ring`). [`RingTable`] is the same with its CARP table built, ready to answer
//! [`RingTable::owner`]. Neither does I/O. A ring is immutable: a change makes a new one with a
//! higher epoch.
//!
//! Invariants of a ring that [`RingTable::new`] accepted: cluster ids are unique, weights are finite
//! and positive, every cluster has at least one node, the sequencer is one of the clusters. Epoch 0
//! is the empty ring and means that the asked cluster owns every key.

use serde::{Deserialize, Serialize};

use crate::carp::{Carp, CarpError, DEFAULT_LIST_TTL_S, HashVersion};
use crate::types::{ClusterId, Epoch, NodeId};

/// How long a client may use a fetched ring before it asks again, in seconds, unless configured.
pub const LIST_TTL_S_DEFAULT: u64 = DEFAULT_LIST_TTL_S as u64;

/// CARP's hash version 2: the well-mixed one.
pub const HASH_VERSION_DEFAULT: u8 = 2;

/// The highest epoch of a ring. Changes get nowhere near; whoever counts on from it may do so without
/// running over.
pub const EPOCH_MAX: Epoch = Epoch::MAX >> 1;

/// The most clusters a ring may have: keeps one ring entry well below the peer frame limit.
pub const CLUSTERS_MAX: usize = 2048;

/// The most nodes one cluster of a ring may list.
pub const NODES_PER_CLUSTER_MAX: usize = 16;

/// The ring as it is agreed on, stored and sent. See the module for its invariants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ring {
    /// 0 for "no ring", then counted up by one for every change.
    pub epoch: Epoch,
    /// Which CARP hash decides, 1 or 2.
    pub hash_version: u8,
    /// How long a client may cache this ring, in seconds.
    pub list_ttl_s: u64,
    /// The cluster whose log alone may start the next change.
    pub sequencer: Option<ClusterId>,
    /// The members.
    pub clusters: Vec<RingCluster>,
    /// The ring that is being changed to, if a change runs.
    #[serde(default)]
    pub next: Option<Box<Ring>>,
}

/// One member of the ring.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingCluster {
    /// Its stable name.
    pub id: ClusterId,
    /// Its share relative to the others.
    #[serde(deserialize_with = "finite")]
    pub weight: f32,
    /// Where its nodes listen.
    pub nodes: Vec<RingNode>,
}

/// A number beyond all weights is read as infinity, which JSON cannot write again: so it is none.
fn finite<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
    let weight = f32::deserialize(deserializer)?;
    let finite = weight.is_finite().then_some(weight);
    finite.ok_or_else(|| serde::de::Error::custom("a weight is a finite number"))
}

impl std::hash::Hash for RingCluster {
    /// A weight is never NaN or -0, so equal ones have equal bits.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.id.hash(state);
        self.weight.to_bits().hash(state);
        self.nodes.hash(state);
    }
}

/// One node of a member.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingNode {
    /// Its id inside the cluster.
    pub id: NodeId,
    /// Its HTTP address.
    pub http: String,
    /// Its peer address.
    pub rpc: String,
}

/// What is wrong with a ring.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RingError {
    /// Neither 1 nor 2.
    #[error("hash_version {0} is unknown: 1 and 2 are allowed")]
    UnknownHashVersion(u8),
    /// Duplicate ids or impossible weights.
    #[error(transparent)]
    Carp(#[from] CarpError),
    /// A member that nobody could reach.
    #[error("cluster {0} lists no node, or more than {NODES_PER_CLUSTER_MAX}")]
    NodeCount(ClusterId),
    /// Too many members.
    #[error("the ring lists {0} clusters; at most {CLUSTERS_MAX} are allowed")]
    TooManyClusters(usize),
    /// No ring has been changed so often.
    #[error("epoch {0} is too high: at most {EPOCH_MAX} is allowed")]
    EpochTooHigh(Epoch),
    /// The sequencer must be a member, and a ring with members must have one.
    #[error("the ring's sequencer must be one of its clusters")]
    Sequencer,
    /// Epoch 0 goes with no clusters, a higher one with at least one.
    #[error("epoch {epoch} does not go with {clusters} clusters: epoch 0 is the empty ring")]
    EpochAndClusters {
        /// The ring's epoch.
        epoch: Epoch,
        /// How many members it lists.
        clusters: usize,
    },
}

impl Ring {
    /// "No ring": epoch 0, no members. A cluster that lives by it owns every key.
    pub fn none() -> Self {
        Self {
            epoch: 0,
            hash_version: HASH_VERSION_DEFAULT,
            list_ttl_s: LIST_TTL_S_DEFAULT,
            sequencer: None,
            clusters: Vec::new(),
            next: None,
        }
    }

    /// The member with this id.
    pub fn cluster(&self, id: &ClusterId) -> Option<&RingCluster> {
        self.clusters.iter().find(|cluster| cluster.id == *id)
    }
}

/// A ring with its CARP table: answers who owns a key. Two are equal when their rings are.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Ring", into = "Ring")]
pub struct RingTable {
    ring: Ring,
    carp: Carp,
    /// For each CARP member, in CARP's (sorted) order, its place in `ring.clusters`.
    places: Vec<usize>,
}

impl PartialEq for RingTable {
    fn eq(&self, other: &Self) -> bool {
        self.ring == other.ring
    }
}

impl std::hash::Hash for RingTable {
    /// By what tells one ring of a system from another.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.ring.epoch.hash(state);
        self.ring.clusters.hash(state);
    }
}

impl TryFrom<Ring> for RingTable {
    type Error = RingError;

    fn try_from(ring: Ring) -> Result<Self, RingError> {
        Self::new(ring)
    }
}

impl From<RingTable> for Ring {
    fn from(table: RingTable) -> Self {
        table.ring
    }
}

impl RingTable {
    /// Checks the ring's invariants and builds its table. An error names the broken rule; the same ring
    /// fails again.
    pub fn new(ring: Ring) -> Result<Self, RingError> {
        check_shape(&ring)?;
        let version = HashVersion::try_from(u32::from(ring.hash_version))
            .map_err(|_| RingError::UnknownHashVersion(ring.hash_version))?;
        let members = ring.clusters.iter().map(|c| (c.id.to_string(), c.weight)).collect();
        // CARP's config id is 32 bits wide; the epoch's low bits are enough to tell tables apart.
        let mut carp = Carp::try_with_hash(members, ring.epoch as u32, version)?;
        carp.set_list_ttl(u32::try_from(ring.list_ttl_s).unwrap_or(u32::MAX));
        let places = carp
            .members()
            .map(|(id, _)| {
                let place = ring.clusters.iter().position(|c| c.id.as_str() == id);
                place.expect("the table was made from these clusters")
            })
            .collect();
        Ok(Self { ring, carp, places })
    }

    /// The table of [`Ring::none`].
    pub fn none() -> Self {
        Self::new(Ring::none()).expect("the empty ring keeps the invariants")
    }

    /// The ring that this table was made from.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The CARP table, for the original's `GET /api/get_hash_ring`.
    pub fn carp(&self) -> &Carp {
        &self.carp
    }

    /// The member that owns `key`; `None` when there is no ring.
    pub fn owner(&self, key: &[u8]) -> Option<&RingCluster> {
        let member = self.carp.owner_index(key)?;
        Some(&self.ring.clusters[self.places[member]])
    }

    /// Whether cluster `id` owns `key`. Without a ring, every cluster owns every key.
    pub fn owns(&self, id: &ClusterId, key: &[u8]) -> bool {
        self.owner(key).is_none_or(|owner| owner.id == *id)
    }
}

fn check_shape(ring: &Ring) -> Result<(), RingError> {
    let clusters = ring.clusters.len();
    if clusters > CLUSTERS_MAX {
        return Err(RingError::TooManyClusters(clusters));
    }
    if ring.epoch > EPOCH_MAX {
        return Err(RingError::EpochTooHigh(ring.epoch));
    }
    if (ring.epoch == 0) != (clusters == 0) {
        return Err(RingError::EpochAndClusters { epoch: ring.epoch, clusters });
    }
    let sane = |c: &&RingCluster| (1..=NODES_PER_CLUSTER_MAX).contains(&c.nodes.len());
    if let Some(bad) = ring.clusters.iter().find(|c| !sane(c)) {
        return Err(RingError::NodeCount(bad.id.clone()));
    }
    let sequencer_is_member = match &ring.sequencer {
        Some(id) => ring.cluster(id).is_some(),
        None => clusters == 0,
    };
    if !sequencer_is_member {
        return Err(RingError::Sequencer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(id: &str, weight: f32) -> RingCluster {
        RingCluster {
            id: id.parse().unwrap(),
            weight,
            nodes: vec![RingNode { id: 1, http: "127.0.0.1:1".into(), rpc: "127.0.0.1:2".into() }],
        }
    }

    fn ring(clusters: Vec<RingCluster>) -> Ring {
        let sequencer = clusters.first().map(|c| c.id.clone());
        Ring { epoch: 1, sequencer, clusters, ..Ring::none() }
    }

    #[test]
    fn the_order_of_clusters_does_not_matter() {
        let there = RingTable::new(ring(vec![cluster("a", 1.0), cluster("b", 2.0)])).unwrap();
        let back = RingTable::new(ring(vec![cluster("b", 2.0), cluster("a", 1.0)])).unwrap();
        for key in 0..1000u32 {
            let key = key.to_be_bytes();
            assert_eq!(there.owner(&key).unwrap().id, back.owner(&key).unwrap().id);
        }
    }

    #[test]
    fn without_a_ring_every_cluster_owns_every_key() {
        let none = RingTable::none();
        assert!(none.owner(b"k").is_none());
        assert!(none.owns(&"c1".parse().unwrap(), b"k"));
    }

    #[test]
    fn broken_rings_are_refused() {
        let two_alike = ring(vec![cluster("a", 1.0), cluster("a", 1.0)]);
        assert!(matches!(RingTable::new(two_alike), Err(RingError::Carp(_))));
        let weightless = ring(vec![cluster("a", 0.0)]);
        assert!(matches!(RingTable::new(weightless), Err(RingError::Carp(_))));
        let mut unknown_hash = ring(vec![cluster("a", 1.0)]);
        unknown_hash.hash_version = 3;
        assert_eq!(RingTable::new(unknown_hash).unwrap_err(), RingError::UnknownHashVersion(3));
        let mut nodeless = ring(vec![cluster("a", 1.0)]);
        nodeless.clusters[0].nodes.clear();
        assert!(matches!(RingTable::new(nodeless), Err(RingError::NodeCount(_))));
        let mut without_sequencer = ring(vec![cluster("a", 1.0)]);
        without_sequencer.sequencer = None;
        assert_eq!(RingTable::new(without_sequencer).unwrap_err(), RingError::Sequencer);
        let mut ageless = ring(vec![cluster("a", 1.0)]);
        ageless.epoch = EPOCH_MAX + 1;
        assert_eq!(RingTable::new(ageless).unwrap_err(), RingError::EpochTooHigh(EPOCH_MAX + 1));
        let mut epochless = ring(vec![cluster("a", 1.0)]);
        epochless.epoch = 0;
        assert!(matches!(RingTable::new(epochless), Err(RingError::EpochAndClusters { .. })));
    }

    #[test]
    fn json_has_the_contracts_shape() {
        let json = serde_json::to_value(ring(vec![cluster("c1", 1.0)])).unwrap();
        let expected = serde_json::json!({
            "epoch": 1, "hash_version": 2, "list_ttl_s": 600, "sequencer": "c1",
            "clusters": [{"id": "c1", "weight": 1.0,
                "nodes": [{"id": 1, "http": "127.0.0.1:1", "rpc": "127.0.0.1:2"}]}],
            "next": null,
        });
        assert_eq!(json, expected);
    }
}
