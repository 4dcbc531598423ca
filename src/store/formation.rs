//! Which forming of its cluster a node belongs to.
//!
//! Two nodes that are both told to form cluster `c1` become two clusters of that name, with two logs
//! that begin alike: index 0, term 1. Raft takes it for granted that this cannot be. Brought together,
//! such logs match by index and term where their contents differ, and the replicas diverge without a
//! sign. So **who forms a cluster draws a random id**, every greeting between peers carries it, and nodes
//! of two formings refuse each other. A blank node takes over the id of the first peer that it hears.
//!
//! The id lies in the marker ([`super::marker`]), on disk before the first entry of the log is.

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;

use super::marker::Marker;

/// The formation id of a node. Clones are handles to the same one.
#[derive(Clone)]
pub struct Formation {
    marker: Arc<Marker>,
}

/// What became of a formation id that was offered to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joined {
    /// The node had none and has this one now, on disk.
    Adopted,
    /// It is the node's own.
    Same,
    /// The node has another one, and keeps it.
    Other,
}

impl Formation {
    pub(super) fn new(marker: Arc<Marker>) -> Self {
        Self { marker }
    }

    /// One that belongs to `id` and lies nowhere: the directory is gone already.
    #[cfg(test)]
    pub(crate) fn of(id: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let marker = Marker::open(&dir.path().join("marker"), 1, &"c1".parse().unwrap()).unwrap();
        marker.join_formation(NonZeroU64::new(id).unwrap()).unwrap();
        Self { marker: Arc::new(marker) }
    }

    /// The id; `None` in a node that was neither formed nor heard a peer yet.
    pub fn id(&self) -> Option<NonZeroU64> {
        self.marker.formation()
    }

    /// Offers an id. Blocks for an fsync if it is adopted.
    ///
    /// # Errors
    ///
    /// The marker could not be written. Then the node has no id still.
    pub fn join(&self, id: NonZeroU64) -> io::Result<Joined> {
        self.marker.join_formation(id)
    }
}
