//! What a cluster knows of its ring, of a change of it, and of its own part in that.
//!
//! [`RingState`] is part of the state machine: replicas compute the same one. It answers who serves a
//! key, which stored rows count, and what a write to a moving key means for the handoff that moves it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::ring::{RingCluster, RingTable};
use crate::types::{ClusterId, Epoch, Revision};

use super::{Attempt, Cursor, Frozen, Handoff, Pair, Position, Tally};

/// The ring that a cluster lives by, and the change that it takes part in. See the module.
#[derive(Debug, Clone, PartialEq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingState {
    /// The ring in force here; of epoch 0 before the first one.
    #[serde(with = "super::wire::table")]
    pub ring: Arc<RingTable>,
    /// The change under way, if one is.
    pub change: Option<Change>,
    /// At the ring's sequencer: the clusters that must all have finished the change to this ring before
    /// another may begin, but for those that left by it and are lost. Empty once they have.
    pub settling: Vec<RingCluster>,
    /// The next place in the log of changes to moving keys. Never goes back.
    pub position: Position,
}

/// A change of the ring, as one cluster sees it.
#[derive(Debug, Clone, PartialEq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// The ring to come.
    #[serde(with = "super::wire::table")]
    pub next: Arc<RingTable>,
    /// All handoffs, also those of others.
    pub plan: Vec<Pair>,
    /// Where it is going, as far as this cluster was told.
    pub course: Course,
    /// What this cluster gives, by who gets it.
    pub outgoing: BTreeMap<ClusterId, Outgoing>,
    /// What this cluster gets, by who gives it.
    pub incoming: BTreeMap<ClusterId, Incoming>,
}

/// Where a change is going.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Course {
    /// Forward, unless it is cancelled.
    #[default]
    Open,
    /// Back: nothing may freeze here any more.
    Cancelled,
    /// Forward for good. Clusters cancel one by one while others freeze, so one may find itself cancelled
    /// in a change of which another has activated a handoff. Such a change is sure to come: the source of
    /// that handoff can never cancel, and nobody reverts before all sources have.
    Decided,
}

/// The source's side of a handoff.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outgoing {
    /// The highest attempt so far; 0 before the first.
    pub attempt: Attempt,
    /// What it does.
    pub sending: Sending,
    /// Where the change log began for the present attempt.
    pub start: Position,
    /// The revision counter when the present attempt was prepared: records above it changed since.
    pub prepared_revision: Revision,
    /// The index of the log entry that prepared it: a replica that has this on disk has all the rest.
    pub prepared_index: u64,
    /// How far the records were counted.
    pub counted: Counted,
    /// What moves, as far as it was counted. After [`Sending::Moved`]: what is still to be deleted.
    pub tally: Tally,
    /// What the source was when it froze in the present attempt; without the floors once all has moved.
    pub frozen: Option<Frozen>,
}

/// When an attempt was prepared, by the cluster's log: what has a higher revision is newer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// The epoch that the change leads to: what has been staged for it does not count.
    pub epoch: Epoch,
    /// The revision counter.
    pub revision: Revision,
    /// The index of the entry.
    pub index: u64,
}

/// The phases of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sending {
    /// Nothing goes on.
    #[default]
    Idle,
    /// Serves the keys, and logs what changes of them.
    Sending,
    /// Nobody serves the keys.
    Frozen,
    /// The destination serves them.
    Moved,
}

/// How far a source has counted the records that move.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counted {
    /// Up to this key, and all that changed since the attempt was prepared.
    UpTo(#[serde(with = "super::wire::base64")] Bytes),
    /// All of them.
    All,
}

impl Sending {
    /// Its name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Sending => "sending",
            Self::Frozen => "frozen",
            Self::Moved => "moved",
        }
    }
}

impl Default for Counted {
    fn default() -> Self {
        Self::UpTo(Bytes::new())
    }
}

impl Counted {
    /// Whether a record of this key that did not change since the attempt was prepared is in the tally.
    pub fn covers(&self, key: &[u8]) -> bool {
        match self {
            Self::UpTo(last) => key <= &last[..],
            Self::All => true,
        }
    }
}

/// The destination's side of a handoff.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Incoming {
    /// The highest attempt that was opened; 0 before the first.
    pub opened: Attempt,
    /// The highest attempt that was refused for good; 0 for none.
    pub refused: Attempt,
    /// What it does.
    pub receipt: Receipt,
    /// What is staged, or was taken over.
    pub tally: Tally,
    /// Rows that attempts have staged which are dead, and that are not deleted yet.
    pub garbage: u64,
}

/// The phases of a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Receipt {
    /// No attempt is open.
    #[default]
    Waiting,
    /// The opened attempt stages.
    Receiving {
        /// How far it is.
        cursor: Cursor,
        /// Where the source's change log begins for this attempt.
        start: Position,
    },
    /// The opened attempt has been activated: this cluster serves the keys.
    Active,
}

impl Receipt {
    /// Its name, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Receiving { .. } => "receiving",
            Self::Active => "active",
        }
    }
}

impl Change {
    /// Whether nothing may freeze at this cluster any more.
    pub fn is_cancelled(&self) -> bool {
        self.course == Course::Cancelled
    }
}

/// Who serves a key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ownership<'a> {
    /// This cluster.
    Here,
    /// Nobody at the moment: it is about to be served by the other cluster, or by this one again.
    Frozen(&'a RingCluster),
    /// Another cluster, as far as this one knows.
    Elsewhere(&'a RingCluster),
}

/// Which attempt staged a row. Rows that were written here have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Of the change.
    pub epoch: Epoch,
    /// Of the handoff, which key and epoch tell.
    pub attempt: Attempt,
}

impl Default for RingState {
    fn default() -> Self {
        Self::with_ring(RingTable::none())
    }
}

impl RingState {
    /// Lives by this ring, with no change under way.
    pub fn with_ring(ring: RingTable) -> Self {
        Self { ring: Arc::new(ring), change: None, settling: Vec::new(), position: 0 }
    }

    /// The epoch of the ring in force.
    pub fn epoch(&self) -> Epoch {
        self.ring.ring().epoch
    }

    /// Who serves `key`, as cluster `own` sees it.
    pub fn ownership(&self, own: &ClusterId, key: &[u8]) -> Ownership<'_> {
        let Some(old) = self.ring.owner(key) else { return Ownership::Here };
        let Some(change) = &self.change else { return here_or_elsewhere(own, old) };
        let Some(new) = change.next.owner(key) else { return here_or_elsewhere(own, old) };
        if old.id == new.id {
            return here_or_elsewhere(own, old);
        }
        if old.id == *own {
            return match change.outgoing.get(&new.id).map(|outgoing| outgoing.sending) {
                Some(Sending::Frozen) => Ownership::Frozen(new),
                Some(Sending::Moved) => Ownership::Elsewhere(new),
                _ => Ownership::Here,
            };
        }
        if new.id == *own && change.incoming.get(&old.id).is_some_and(Incoming::is_active) {
            return Ownership::Here;
        }
        // Whether it has moved is not known here; the old owner knows, and says so.
        Ownership::Elsewhere(old)
    }

    /// The other cluster that `key` is being handed over to by the one that owns it, if neither is `own`: it
    /// serves the key once that is done, which is not known here.
    pub fn successor(&self, own: &ClusterId, key: &[u8]) -> Option<&RingCluster> {
        let old = self.ring.owner(key)?;
        let new = self.change.as_ref()?.next.owner(key)?;
        (old.id != new.id && old.id != *own && new.id != *own).then_some(new)
    }

    /// Who owns `key` by the ring, and by the next one if a change is under way.
    pub fn owners(&self, key: &[u8]) -> [Option<&ClusterId>; 2] {
        let next = self.change.as_ref().and_then(|change| change.next.owner(key));
        [self.ring.owner(key), next].map(|owner| owner.map(|cluster| &cluster.id))
    }

    /// Whether `own` serves `key` at the moment.
    pub fn serves(&self, own: &ClusterId, key: &[u8]) -> bool {
        self.ownership(own, key) == Ownership::Here
    }

    /// Whether a staged row of `key` has become part of the data.
    pub fn is_live(&self, tag: Tag, key: &[u8]) -> bool {
        if tag.epoch <= self.epoch() {
            // The change is over, and with it everything that was staged in vain.
            return true;
        }
        let Some(change) = self.change.as_ref().filter(|c| c.next.ring().epoch == tag.epoch) else {
            return false;
        };
        let from = self.ring.owner(key).and_then(|old| change.incoming.get(&old.id));
        from.is_some_and(|incoming| incoming.is_active() && incoming.opened == tag.attempt)
    }

    /// Whether a row that a handoff to this cluster staged can never count.
    pub fn is_dead(&self, handoff: &Handoff, tag: Tag) -> bool {
        let Some(incoming) = self.incoming(handoff).filter(|_| tag.epoch == handoff.epoch) else {
            return false;
        };
        tag.attempt != incoming.opened || incoming.receipt == Receipt::Waiting
    }

    /// The cluster to which `key` goes from `own` in the change under way, if it does.
    pub fn way_out(&self, own: &ClusterId, key: &[u8]) -> Option<&ClusterId> {
        let change = self.change.as_ref()?;
        if change.outgoing.is_empty() || self.ring.owner(key)?.id != *own {
            return None;
        }
        let to = &change.next.owner(key)?.id;
        (to != own).then_some(to)
    }

    /// The cluster from which `key` comes to `own` in the change under way, if it does.
    pub fn way_in(&self, own: &ClusterId, key: &[u8]) -> Option<&ClusterId> {
        let change = self.change.as_ref()?;
        if change.incoming.is_empty() || change.next.owner(key)?.id != *own {
            return None;
        }
        let from = &self.ring.owner(key)?.id;
        (from != own).then_some(from)
    }

    /// The source's side of a handoff, if `key` moves by it and changes of it are to be logged.
    pub fn sending(&mut self, own: &ClusterId, key: &[u8]) -> Option<&mut Outgoing> {
        let to = self.way_out(own, key)?.clone();
        let outgoing = self.change.as_mut()?.outgoing.get_mut(&to)?;
        (outgoing.sending == Sending::Sending).then_some(outgoing)
    }

    /// Whether any handoff needs the change log.
    pub fn is_logging(&self) -> bool {
        self.change.as_ref().is_some_and(|change| change.outgoing.values().any(Outgoing::logs))
    }

    /// The phase of the handoff by which this key leaves `own`, if it does.
    pub fn leaving(&self, own: &ClusterId, key: &[u8]) -> Option<Sending> {
        let to = self.way_out(own, key)?;
        Some(self.change.as_ref()?.outgoing.get(to)?.sending)
    }

    /// Where the change log begins: nobody needs what lies before.
    pub fn log_start(&self) -> Position {
        let outgoing = self.change.iter().flat_map(|change| change.outgoing.values());
        let starts = outgoing.filter(|outgoing| outgoing.logs()).map(|outgoing| outgoing.start);
        starts.min().unwrap_or(self.position)
    }

    /// Takes down a change of a moving key; returns its place in the change log. Gives up attempts
    /// whose stretch of the log has become longer than `log_max`: they can no longer freeze.
    pub fn log_change(&mut self, log_max: u64) -> Position {
        let position = self.position;
        self.position += 1;
        let end = self.position;
        for outgoing in self.change.iter_mut().flat_map(|change| change.outgoing.values_mut()) {
            if outgoing.sending == Sending::Sending && end - outgoing.start > log_max {
                outgoing.sending = Sending::Idle;
            }
        }
        position
    }

    /// The index of the entry that prepared the newest of the attempts that send.
    pub fn prepared_index(&self) -> Option<u64> {
        let outgoing = self.change.iter().flat_map(|change| change.outgoing.values());
        outgoing.filter(|outgoing| outgoing.logs()).map(|outgoing| outgoing.prepared_index).max()
    }

    /// The source's side of a handoff that this cluster holds.
    pub fn outgoing(&self, handoff: &Handoff) -> Option<&Outgoing> {
        let change = self.change_to(handoff.epoch)?;
        change.outgoing.get(&handoff.to)
    }

    /// The destination's side of a handoff that this cluster holds.
    pub fn incoming(&self, handoff: &Handoff) -> Option<&Incoming> {
        let change = self.change_to(handoff.epoch)?;
        change.incoming.get(&handoff.from)
    }

    /// The change under way, if it is the one to this epoch.
    pub fn change_to(&self, epoch: Epoch) -> Option<&Change> {
        self.change.as_ref().filter(|change| change.next.ring().epoch == epoch)
    }
}

fn here_or_elsewhere<'a>(own: &ClusterId, owner: &'a RingCluster) -> Ownership<'a> {
    if owner.id == *own { Ownership::Here } else { Ownership::Elsewhere(owner) }
}

impl Outgoing {
    /// Whether its stretch of the change log is still needed.
    pub fn logs(&self) -> bool {
        matches!(self.sending, Sending::Sending | Sending::Frozen)
    }

    /// When the present attempt was prepared.
    pub(super) fn prepared(&self, epoch: Epoch) -> Prepared {
        Prepared { epoch, revision: self.prepared_revision, index: self.prepared_index }
    }

    /// A record of a moving key changes while this attempt sends: from what it was (its revision and
    /// hash) to what it will be.
    pub fn count_change(&mut self, key: &[u8], old: Option<(Revision, u64)>, new: Option<u64>) {
        if let Some((revision, hash)) = old
            && (revision > self.prepared_revision || self.counted.covers(key))
        {
            self.tally.remove_record(hash);
        }
        if let Some(hash) = new {
            self.tally.add_record(hash);
        }
    }

    /// Whether nothing of what moved is left here.
    pub fn is_over(&self) -> bool {
        self.sending == Sending::Moved && self.tally.records == 0
    }
}

impl Incoming {
    /// Whether the keys are served here.
    pub fn is_active(&self) -> bool {
        self.receipt == Receipt::Active
    }

    /// Whether the keys are served here, and nothing is left of attempts that came to nothing.
    pub fn is_over(&self) -> bool {
        self.is_active() && self.garbage == 0
    }
}
