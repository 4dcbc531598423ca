//! Small rings for the tests of this module.

use crate::ring::{Ring, RingCluster, RingNode};
use crate::types::{ClusterId, Epoch};

pub(super) fn id(text: &str) -> ClusterId {
    text.parse().unwrap()
}

pub(super) fn cluster(name: &str, weight: f32) -> RingCluster {
    let node = RingNode { id: 1, http: format!("{name}:1"), rpc: format!("{name}:2") };
    RingCluster { id: id(name), weight, nodes: vec![node] }
}

/// The first of the clusters is the sequencer.
pub(super) fn ring(epoch: Epoch, clusters: &[(&str, f32)]) -> Ring {
    let clusters: Vec<_> = clusters.iter().map(|(name, weight)| cluster(name, *weight)).collect();
    Ring { epoch, sequencer: Some(clusters[0].id.clone()), clusters, ..Ring::none() }
}
