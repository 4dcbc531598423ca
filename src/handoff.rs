//! Keys change hands: the rules by which clusters go from one ring to the next while they serve.
//!
//! A change takes every cluster from the ring of epoch `e` to that of `e + 1`. For each ordered pair
//! of clusters (S, D) between which keys may move there is one **handoff**. It copies the moving keys
//! into a staging at D while S goes on serving, then stops S for a moment, and then D takes over:
//!
//! ```text
//!   S, the source                                   D, the destination
//!   ─────────────                                   ──────────────────
//!   Idle ── Prepare(a) ──► Sending                  Waiting ── Open(a) ──► Receiving
//!            count what moves                                 ◄── pages ── Import(a, from, to)
//!            log what changes
//!   Sending ── Freeze(a) ──► Frozen                 cursor reaches the final position
//!   (nobody serves the moving keys)                 Receiving ── Activate(a) ──► Active
//!   Frozen ── Release(a) ──► Moved                  (serves them: the only decision)
//!   delete what moved                               delete what dead attempts staged
//! ```
//!
//! Each arrow is a [`Step`], an entry in the Raft log of the cluster that it concerns, and is decided
//! when it is applied, by [`RingState::decide`], from what that cluster knows and nothing else. Whoever
//! proposes steps keeps no state: any number may drive a change at once, be killed and start again.
//!
//! Invariants. The model in `tests/handoff_model.rs` checks them, and that the rules behind them are needed:
//! 1. At any moment at most one cluster serves a key, for writes and for linearizable reads.
//! 2. What D serves from `Activate(a)` on is what S held at `Freeze(a)`: its cursor covers S's final
//!    position, and the digests agree.
//! 3. Only a D that has refused an attempt for good lets its S thaw. No timer does.
//! 4. A step for a handoff that is not held here is refused, never answered "done"; a repeated one gets
//!    the first answer; attempts only grow.
//! 5. A change is finished here only when what moved away is deleted and what was staged in vain, too:
//!    a later change never meets leftovers.
//! 6. A change is reverted only when every cluster of the old ring has cancelled it: then nothing can freeze
//!    any more. A source that freezes first cannot cancel, so once it has moved, the change can only go
//!    forward; those that had cancelled then resume.
//!
//! This module does no I/O and sees no clock. The store carries out what is decided here, and the model
//! runs the same code.

mod decide;
mod destination;
mod page;
mod plan;
mod source;
mod state;
#[cfg(test)]
mod tests;
mod wire;
mod witness;

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::ring::{Ring, RingCluster};
use crate::types::{ClusterId, Epoch, Revision};

pub use decide::{Decision, Facts};
pub use page::{Clean, Import, Page, PageRequest};
pub use plan::pairs;
pub use state::{
    Change, Counted, Course, Incoming, Outgoing, Ownership, Prepared, Receipt, RingState, Sending,
    Tag,
};
pub use witness::Witnesses;

/// An attempt that has logged this many changes is given up, and the next one begins anew: its log would
/// only grow if the destination is slower than the writers. A write of a moving key with an answer to keep
/// is two of them: when it comes, and when the answer falls. On disk this is about 200 MB.
pub(crate) const LOG_CHANGES_MAX: u64 = 1 << 21;

/// The number of a try at a handoff. Grows; a number that was used or refused never comes again.
pub type Attempt = u64;

/// How far an attempt may lie above the highest one before it. Drivers add one, and several who do so at
/// once, or whose attempts one side never hears of, come to a handful. The bound is there for steps that
/// no driver of ours sent: a number near the end of all numbers would leave none for another attempt.
pub(crate) const ATTEMPT_JUMP_MAX: u64 = 1 << 20;

/// How many bytes the floors of a source's clients may take in [`Step::Activate`], as JSON: all that a
/// cluster remembers by itself, with the longest names, and still no more than a request's body and half
/// a peer's frame may have, by default. Where there are more, or limits are lower, clients that have not written
/// for long are not told of: they might be forgotten at any moment. Without those there can still be more,
/// because clients are taken over with every handoff; then nothing freezes, as it could not be activated.
pub(crate) const FLOORS_BYTES_MAX: usize = 6 << 20;

/// The highest revision with which a destination takes over: no cluster gets there by writing, and one
/// that is told more would have none left for its own writes.
pub(crate) const REVISION_MAX: Revision = Revision::MAX >> 1;

/// Whether an attempt may come after `highest`.
pub(crate) fn is_next_attempt(attempt: Attempt, highest: Attempt) -> bool {
    attempt > highest && attempt - highest <= ATTEMPT_JUMP_MAX
}

/// A place in a cluster's change log: how many changes of moving keys it has taken down.
pub type Position = u64;

/// A handoff: the keys that go from one cluster to another in the change to the ring of `epoch`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handoff {
    /// The epoch of the ring that is being changed to.
    pub epoch: Epoch,
    /// Who has the keys.
    pub from: ClusterId,
    /// Who gets them.
    pub to: ClusterId,
}

impl fmt::Display for Handoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} (epoch {})", self.from, self.to, self.epoch)
    }
}

/// A pair of clusters between which keys may move.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// Who owns them by the old ring.
    pub from: ClusterId,
    /// Who owns them by the new one.
    pub to: ClusterId,
}

/// Counts records and answers, with a digest that does not depend on their order.
///
/// The digest is the wrapping sum of a 64-bit hash of each, so that one can be added or taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tally {
    /// How many keys have a record.
    pub records: u64,
    /// How many answers to operations with an idempotency key.
    pub answers: u64,
    /// The sum of the hashes of both.
    pub digest: u64,
}

impl Tally {
    /// One record more.
    pub fn add_record(&mut self, hash: u64) {
        self.records += 1;
        self.digest = self.digest.wrapping_add(hash);
    }

    /// One record less, which must have been added.
    pub fn remove_record(&mut self, hash: u64) {
        debug_assert!(self.records > 0, "a record that was never added is taken out");
        self.records = self.records.saturating_sub(1);
        self.digest = self.digest.wrapping_sub(hash);
    }

    /// One answer more.
    pub fn add_answer(&mut self, hash: u64) {
        self.answers += 1;
        self.digest = self.digest.wrapping_add(hash);
    }

    /// One answer less, which must have been added.
    pub fn remove_answer(&mut self, hash: u64) {
        debug_assert!(self.answers > 0, "an answer that was never added is taken out");
        self.answers = self.answers.saturating_sub(1);
        self.digest = self.digest.wrapping_sub(hash);
    }
}

/// How far a destination has come with copying.
///
/// Records first, in the order of their keys; then answers; then what changed meanwhile, in the order
/// in which it did.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Cursor {
    /// Records up to this key are there; keys are not empty, so the empty key means none.
    Records {
        /// The last key.
        #[serde(with = "wire::base64")]
        after: Bytes,
    },
    /// All records are there, and answers up to this one; empty means none.
    Answers {
        /// The last answer's place, as the store orders them.
        #[serde(with = "wire::base64")]
        after: Bytes,
    },
    /// All records and answers are there, and changes before this position.
    Changes {
        /// The next position.
        position: Position,
    },
}

impl Cursor {
    /// Nothing is there yet.
    pub fn start() -> Self {
        Self::Records { after: Bytes::new() }
    }

    /// Whether everything before `position` is there.
    pub fn covers(&self, position: Position) -> bool {
        matches!(self, Self::Changes { position: reached } if *reached >= position)
    }
}

/// What a source was when it froze: all that a destination needs to take over from it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frozen {
    /// The end of its change log.
    pub position: Position,
    /// Its revision counter.
    pub revision: Revision,
    /// What moves.
    pub tally: Tally,
    /// For each of its clients, the sequence below which everything is answered and may be forgotten.
    pub floors: Vec<(String, u64)>,
    /// The same for clients that have not written for so long that they may be forgotten as a whole where
    /// there is no room for others.
    #[serde(default)]
    pub idle_floors: Vec<(String, u64)>,
}

impl Frozen {
    /// All that concerns nothing but clients: a destination has it, and it may be much.
    pub(crate) fn forget_clients(&mut self) {
        self.floors = Vec::new();
        self.idle_floors = Vec::new();
    }
}

/// A request to change the state of a handoff, a change or a ring. See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// A cluster that holds nothing takes the ring in force, of which it is no member yet.
    Join {
        /// The ring in force.
        ring: Box<Ring>,
    },
    /// A change begins: at the sequencer first, which decides, then everywhere.
    Begin {
        /// The ring in force.
        ring: Box<Ring>,
        /// The ring to change to.
        next: Box<Ring>,
        /// The handoffs.
        plan: Vec<Pair>,
    },
    /// From now on no handoff of this change can freeze here.
    Cancel {
        /// The epoch that was to come.
        epoch: Epoch,
    },
    /// The change goes on here although it was cancelled, because somewhere a handoff of it has been
    /// activated or a cluster has finished it: it can only go forward. See [`Course::Decided`].
    Resume {
        /// The epoch that comes.
        epoch: Epoch,
    },
    /// A cancelled change ends: the old ring's content goes on as a new epoch.
    Revert {
        /// The old ring, two epochs on.
        ring: Box<Ring>,
    },
    /// All that this cluster had to do for the change is done: it drops the old ring.
    Finish {
        /// The epoch that has come.
        epoch: Epoch,
    },
    /// All clusters have finished, but for those that left and are lost: the sequencer may begin the next change.
    Settle {
        /// The epoch in force.
        epoch: Epoch,
    },
    /// At the source: begin to count what moves and to log what changes of it.
    Prepare {
        /// Which handoff.
        handoff: Handoff,
        /// Higher than any before.
        attempt: Attempt,
    },
    /// At the source: count the records of the next stretch of keys.
    Count {
        /// Which handoff.
        handoff: Handoff,
        /// Its present attempt.
        attempt: Attempt,
        /// Where the last stretch ended.
        #[serde(with = "wire::base64")]
        from: Bytes,
        /// Where this one ends; `None`: with the last key.
        #[serde(with = "wire::base64_option")]
        to: Option<Bytes>,
    },
    /// At the source: stop serving what moves.
    Freeze {
        /// Which handoff.
        handoff: Handoff,
        /// Its present attempt.
        attempt: Attempt,
        /// How many bytes the floors of clients may take in [`Self::Activate`], if that is less than usual:
        /// the leader says so that takes the step, by its limits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        floors_bytes_max: Option<usize>,
    },
    /// At the source: serve on, because the destination has refused the attempt.
    Thaw {
        /// Which handoff.
        handoff: Handoff,
        /// The highest attempt that the destination has refused.
        refused: Attempt,
    },
    /// At the source: the destination serves what moved.
    Release {
        /// Which handoff.
        handoff: Handoff,
        /// The attempt that was activated.
        attempt: Attempt,
        /// What the destination has taken over.
        tally: Tally,
    },
    /// At the destination: begin to stage.
    Open {
        /// Which handoff.
        handoff: Handoff,
        /// Higher than any that was opened or refused.
        attempt: Attempt,
        /// Where the source's change log began when it prepared this attempt.
        start: Position,
    },
    /// At the destination: take over, with what was staged.
    Activate {
        /// Which handoff.
        handoff: Handoff,
        /// Its present attempt.
        attempt: Attempt,
        /// What the source froze with.
        frozen: Box<Frozen>,
    },
    /// At the destination: never activate this attempt or an earlier one.
    Refuse {
        /// Which handoff.
        handoff: Handoff,
        /// The highest attempt to refuse.
        attempt: Attempt,
    },
}

impl Step {
    /// The handoff that it speaks of, unless it speaks of a change as a whole.
    pub fn handoff(&self) -> Option<&Handoff> {
        match self {
            Self::Join { .. }
            | Self::Begin { .. }
            | Self::Cancel { .. }
            | Self::Resume { .. }
            | Self::Revert { .. }
            | Self::Finish { .. }
            | Self::Settle { .. } => None,
            Self::Prepare { handoff, .. }
            | Self::Count { handoff, .. }
            | Self::Freeze { handoff, .. }
            | Self::Thaw { handoff, .. }
            | Self::Release { handoff, .. }
            | Self::Open { handoff, .. }
            | Self::Activate { handoff, .. }
            | Self::Refuse { handoff, .. } => Some(handoff),
        }
    }

    /// Its name, for logs and messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Join { .. } => "join",
            Self::Begin { .. } => "begin",
            Self::Cancel { .. } => "cancel",
            Self::Resume { .. } => "resume",
            Self::Revert { .. } => "revert",
            Self::Finish { .. } => "finish",
            Self::Settle { .. } => "settle",
            Self::Prepare { .. } => "prepare",
            Self::Count { .. } => "count",
            Self::Freeze { .. } => "freeze",
            Self::Thaw { .. } => "thaw",
            Self::Release { .. } => "release",
            Self::Open { .. } => "open",
            Self::Activate { .. } => "activate",
            Self::Refuse { .. } => "refuse",
        }
    }
}

/// What a step came to. A repeat of the step gets the same again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Done {
    /// It is so, now or since an earlier step.
    Ok,
    /// The source sends, and its change log began here.
    Prepared {
        /// For [`Step::Open`].
        start: Position,
    },
    /// The source is frozen.
    Frozen(Box<Frozen>),
    /// The destination receives, and is here.
    Receiving {
        /// Where copying goes on.
        cursor: Cursor,
    },
    /// The destination serves what moved; it did so with this attempt. Also the answer to a refusal that
    /// came too late.
    Active {
        /// The attempt that was activated.
        attempt: Attempt,
        /// What it took over.
        tally: Tally,
    },
    /// The destination will never activate this attempt or an earlier one.
    Refused {
        /// The highest one.
        attempt: Attempt,
    },
}

/// Why a step or a request for a page was not taken; nothing changed. A step is decided at apply, where all
/// replicas agree; the leader may refuse it before, by what it knows then and by its own limits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Refused {
    /// The ring is not one.
    #[error("the ring is not valid: {0}")]
    InvalidRing(String),
    /// The cluster lives by a later ring, or by another one of the same epoch.
    #[error("the cluster lives by the ring of epoch {current} already")]
    Stale {
        /// The epoch in force.
        current: Epoch,
    },
    /// Epochs follow one another.
    #[error(
        "the cluster lives by the ring of epoch {current}: the step does not lead from there to epoch {offered}"
    )]
    Gap {
        /// The epoch in force.
        current: Epoch,
        /// The epoch that was offered.
        offered: Epoch,
    },
    /// Only one change at a time.
    #[error("a change to the ring of epoch {epoch} is under way")]
    ChangeUnderWay {
        /// The epoch that it changes to.
        epoch: Epoch,
    },
    /// The last change is not finished everywhere.
    #[error("the change to the ring of epoch {epoch} is not finished in every cluster yet")]
    Unsettled {
        /// The epoch in force.
        epoch: Epoch,
    },
    /// There is no such change here.
    #[error("no change to a ring of epoch {epoch} is under way in cluster {cluster}")]
    NoChange {
        /// The epoch that the step names.
        epoch: Epoch,
        /// The cluster that was asked.
        cluster: ClusterId,
    },
    /// Somebody else decides that.
    #[error("cluster {cluster} is not the sequencer of the ring of epoch {epoch}")]
    NotSequencer {
        /// The cluster that was asked.
        cluster: ClusterId,
        /// The epoch in force.
        epoch: Epoch,
    },
    /// The step rests on what another cluster has done, and that cluster knows nothing of it.
    #[error("cluster {0} does not confirm what the step says of it")]
    NotConfirmed(ClusterId),
    /// The step needs another cluster's word, and none is known, or none of those that are gives it.
    #[error("no cluster confirms what the step says of others")]
    NobodyConfirms,
    /// A cluster that joins must be empty, and own nothing by the ring that it lives by.
    #[error(
        "cluster {0} holds records or lives by a ring that it owns keys of: only an empty cluster can join"
    )]
    NotEmpty(ClusterId),
    /// The cluster is a member already, or has no part in it.
    #[error(
        "cluster {0} cannot take that ring: it is a member already, has no part in it, or lives by another"
    )]
    NotConcerned(ClusterId),
    /// The plan leaves out a pair of clusters, or names one of no change.
    #[error("the plan of handoffs does not fit the two rings")]
    BadPlan,
    /// Not one of this change's handoffs, or not this cluster's.
    #[error("cluster {cluster} has no part in a handoff {handoff}")]
    UnknownHandoff {
        /// The cluster that was asked.
        cluster: ClusterId,
        /// What was asked for.
        handoff: Handoff,
    },
    /// The attempt is over, or was never begun.
    #[error("attempt {attempt} is not the present one, {present}")]
    WrongAttempt {
        /// The attempt that the step names.
        attempt: Attempt,
        /// The present or last one.
        present: Attempt,
    },
    /// Not in this phase.
    #[error("the handoff is {phase}: it cannot {step}")]
    WrongPhase {
        /// The step's name.
        step: String,
        /// The phase's name.
        phase: String,
    },
    /// Nothing of a cancelled change may begin, freeze or finish.
    #[error("the change is cancelled")]
    Cancelled,
    /// It can no longer be cancelled: a handoff is frozen, or has been activated.
    #[error("a handoff is frozen or done: from here the change can only go forward")]
    TooLate,
    /// The floors of all clients do not fit into the step that the destination would need.
    #[error(
        "the cluster remembers too many clients to tell of them in one message: nothing can be handed \
         over until it has forgotten some"
    )]
    TooManyClients,
    /// What moves has not been counted to its end.
    #[error("not all of what moves has been counted yet")]
    Uncounted,
    /// Copying is not where the step thinks.
    #[error("the copy is not at that place")]
    WrongCursor,
    /// No source has come so far.
    #[error("no cluster has written so often: revision {0}")]
    Implausible(Revision),
    /// The stretch to count is longer than one entry may take.
    #[error("the stretch holds too many records to be counted at once")]
    TooMuch,
    /// What was staged is not what the source has.
    #[error("what was staged differs from what the source holds: {staged:?}, not {source_has:?}")]
    Differs {
        /// What was staged.
        staged: Tally,
        /// What the source froze with.
        source_has: Tally,
    },
    /// There is work left.
    #[error("the cluster has not finished its part: {0}")]
    Unfinished(String),
    /// A message holds a record that does not belong into its handoff.
    #[error("a record does not belong into the handoff")]
    ForeignRecord,
}

/// The clusters of two rings, each once: those of the new one as it has them, and those that it leaves out.
pub fn members_of_both(old: &Ring, new: &Ring) -> Vec<RingCluster> {
    let mut members: Vec<RingCluster> = new.clusters.clone();
    let gone = old.clusters.iter().filter(|cluster| new.cluster(&cluster.id).is_none());
    members.extend(gone.cloned());
    members
}
