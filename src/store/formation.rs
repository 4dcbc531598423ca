//! Which forming of its cluster a node belongs to, and whether that cluster waits for a ring.
//!
//! Two nodes that are both told to form cluster `c1` become two clusters of that name, with two logs
//! that begin alike: index 0, term 1. Raft takes it for granted that this cannot be. Brought together,
//! such logs match by index and term where their contents differ, and the replicas diverge without a
//! sign. So **who forms a cluster draws a random id**, every greeting between peers carries it, and nodes
//! of two formings refuse each other. A blank node takes over the id of the first peer that it hears, unless that
//! says that the node is a voter: then it has lost its data, and is to be replaced.
//!
//! A cluster without a ring owns every key. One that is formed to become part of a ring must not act on
//! that: what it acknowledged before it joined would be known to nobody by the ring. So **who forms a
//! cluster also says what it serves before it has a ring**, which travels and is kept with the id: there
//! is no moment at which a member does not know. Rejected: an entry in the log, which the first writes
//! could overtake.
//!
//! Both lie in the marker ([`super::marker`]), on disk before the first entry of the log is, and never
//! change.

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::marker::Marker;

/// What a cluster serves as long as it has no ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BeforeRing {
    /// Every key: it may stay alone for ever.
    #[default]
    Serves,
    /// No key: its first ring is on its way.
    Waits,
}

impl BeforeRing {
    /// Its number, on disk and between peers.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Serves => 0,
            Self::Waits => 1,
        }
    }

    /// What has this number, if anything has.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Serves, Self::Waits].into_iter().find(|known| known.number() == number)
    }
}

/// What its forming gave a cluster for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Founding {
    /// Tells it from others of its name.
    pub id: NonZeroU64,
    /// What it serves as long as it has no ring.
    pub before_ring: BeforeRing,
}

impl Founding {
    /// A new one, with an id of its own.
    pub fn draw(before_ring: BeforeRing) -> Self {
        Self { id: NonZeroU64::new(rand::random()).unwrap_or(NonZeroU64::MIN), before_ring }
    }
}

/// The forming that a node belongs to. Clones are handles to the same one.
#[derive(Clone)]
pub struct Formation {
    marker: Arc<Marker>,
    lost: Arc<AtomicBool>,
}

/// What became of a founding that was offered to a node.
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
        Self { marker, lost: Arc::default() }
    }

    /// One that belongs to `id` and lies nowhere: the directory is gone already.
    #[cfg(test)]
    pub(crate) fn of(id: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let marker = Marker::open(&dir.path().join("marker"), 1, &"c1".parse().unwrap()).unwrap();
        let id = NonZeroU64::new(id).unwrap();
        marker.join_formation(Founding { id, before_ring: BeforeRing::Serves }).unwrap();
        Self::new(Arc::new(marker))
    }

    /// What the node belongs to; `None` in one that was neither formed nor heard a peer yet.
    pub fn founding(&self) -> Option<Founding> {
        self.marker.founding()
    }

    /// What the cluster serves as long as it has no ring. Never waits, also not for the disk.
    pub fn before_ring(&self) -> BeforeRing {
        self.marker.before_ring()
    }

    /// A peer has called this node, which is blank, as a voter.
    pub(crate) fn note_lost(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Whether the node is a voter of a cluster and has lost its data, as far as it was told since it started.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Offers a founding. Blocks for an fsync if it is adopted.
    ///
    /// # Errors
    ///
    /// The marker could not be written. Then the node belongs to none still.
    pub fn join(&self, founding: Founding) -> io::Result<Joined> {
        let joined = self.marker.join_formation(founding)?;
        if joined == Joined::Adopted {
            self.lost.store(false, Ordering::Relaxed);
        }
        Ok(joined)
    }
}
