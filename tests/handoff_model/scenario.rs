//! What the model is run with: rings, keys, operations, bounds.

use bytes::Bytes;
use distrib_kv_store::handoff::RingState;
use distrib_kv_store::ring::{Ring, RingCluster, RingNode, RingTable};
use distrib_kv_store::types::{ClusterId, Epoch};

use super::cluster::{Cluster, Key, Op, OpId, OpKind, Rules};
use super::mutation::Mutation;
use super::shared::Shared;

/// The members of a ring with their weights; the first is the sequencer.
pub type Content = &'static [(&'static str, f32)];

/// An operation: client, sequence, which key, what, and after which other operation.
pub type OpSpec = (char, u64, usize, OpKind, Option<usize>);

pub struct Scenario {
    /// All clusters, in or outside the ring at first.
    pub clusters: Vec<ClusterId>,
    /// The rings that the operator wants, one after the other.
    pub contents: Vec<Content>,
    /// The last epoch of which a change may begin is the one before.
    pub epoch_max: Epoch,
    /// The highest attempt that a driver prepares.
    pub attempts: u64,
    /// The keys, all of which have a record at first.
    pub keys: Vec<Key>,
    pub ops: Vec<Shared<Op>>,
    /// Whether an operator may cancel.
    pub cancels: bool,
    /// Whether the records are counted in two stretches.
    pub counts_twice: bool,
    /// Whether the next change may begin before a cluster that left has finished.
    pub leaves_behind: bool,
    pub rules: Rules,
}

impl Scenario {
    /// `keys`: for each key, its owners by these rings, one after the other. One attempt, no operations.
    pub fn of(clusters: &[&str], contents: &[Content], keys: &[&[&str]]) -> Self {
        let key = |(place, owners): (usize, &&[&str])| key_with(contents, owners, place);
        let mut keys: Vec<Key> = keys.iter().enumerate().map(key).collect();
        keys.sort();
        Self {
            clusters: clusters.iter().map(|id| id.parse().unwrap()).collect(),
            contents: contents.to_vec(),
            epoch_max: contents.len() as Epoch,
            attempts: 1,
            keys,
            ops: Vec::new(),
            cancels: false,
            counts_twice: false,
            leaves_behind: false,
            rules: Rules { log_max: 100, mutations: Vec::new() },
        }
    }

    pub fn attempts(mut self, attempts: u64) -> Self {
        self.attempts = attempts;
        self
    }

    pub fn ops(mut self, ops: &[OpSpec]) -> Self {
        let op = |(place, &(client, seq, key, kind, after)): (usize, &OpSpec)| {
            // A client that has had one answer forgets everything before.
            let floor = if after.is_some() { seq } else { 1 };
            let (key, value) = (self.keys[key].clone(), place as u8 + 1);
            Shared::new(Op { id: OpId { client, seq }, floor, key, kind, value, after })
        };
        self.ops = ops.iter().enumerate().map(op).collect();
        self
    }

    pub fn cancels(mut self, epoch_max: Epoch) -> Self {
        self.cancels = true;
        self.epoch_max = epoch_max;
        self
    }

    pub fn counts_twice(mut self) -> Self {
        self.counts_twice = true;
        self
    }

    pub fn leaves_behind(mut self) -> Self {
        self.leaves_behind = true;
        self
    }

    pub fn log_max(mut self, log_max: u64) -> Self {
        self.rules.log_max = log_max;
        self
    }

    pub fn breaks(mut self, mutations: &[Mutation]) -> Self {
        self.rules.mutations = mutations.to_vec();
        self
    }

    /// The clusters at the start: members of the first ring live by it, others by none.
    pub fn start(&self) -> Vec<Cluster> {
        let first = RingTable::new(ring(self.contents[0], 1)).unwrap();
        let cluster = |id: &ClusterId| {
            let is_member = first.ring().cluster(id).is_some();
            let table = if is_member { first.clone() } else { RingTable::none() };
            let mut cluster = Cluster::new(id.clone(), RingState::with_ring(table));
            for key in self.keys.iter().filter(|key| is_member && first.owns(id, key)) {
                cluster.preset(key.clone());
            }
            cluster
        };
        self.clusters.iter().map(cluster).collect()
    }

    /// The ring that the operator wants after this one.
    pub fn next(&self, current: &Ring) -> Option<Ring> {
        if current.epoch >= self.epoch_max {
            return None;
        }
        // The same content may be wanted twice: then the epoch tells which time it is.
        let same = |place: &usize| ring(self.contents[*place], current.epoch) == *current;
        let places: Vec<usize> = (0..self.contents.len()).filter(same).collect();
        let by_epoch = current.epoch as usize - 1;
        let place = if places.contains(&by_epoch) { by_epoch } else { *places.first()? };
        Some(ring(self.contents.get(place + 1)?, current.epoch + 1))
    }

    pub fn place(&self, id: &ClusterId) -> usize {
        self.clusters.iter().position(|cluster| cluster == id).expect("a cluster of the scenario")
    }
}

/// A ring of this content.
fn ring(content: Content, epoch: Epoch) -> Ring {
    let node = RingNode { id: 1, http: "127.0.0.1:1".into(), rpc: "127.0.0.1:2".into() };
    let cluster = |(id, weight): &(&str, f32)| RingCluster {
        id: id.parse().unwrap(),
        weight: *weight,
        nodes: vec![node.clone()],
    };
    let clusters: Vec<_> = content.iter().map(cluster).collect();
    Ring { epoch, sequencer: Some(clusters[0].id.clone()), clusters, ..Ring::none() }
}

/// The `place`-th of the keys that these clusters own, one after the other.
fn key_with(contents: &[Content], owners: &[&str], place: usize) -> Key {
    let tables: Vec<_> = contents.iter().map(|c| RingTable::new(ring(c, 1)).unwrap()).collect();
    let fits = |key: &Key| {
        tables
            .iter()
            .zip(owners)
            .all(|(table, owner)| table.owner(key).unwrap().id.as_str() == *owner)
    };
    let keys = (0..100_000u32).map(|number| Bytes::from(format!("k{number}")));
    keys.filter(fits).nth(place).expect("the rings part the keys so")
}
