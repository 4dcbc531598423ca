//! How far a change is, for people and for programs that watch it.
//!
//! Pure: out of the same views that the driver decides by. Keys are counted by the clusters themselves;
//! bytes nobody counts, so who wants them multiplies by what a key of the source takes on average.

use serde::Serialize;

use crate::handoff::{Counted, Cursor, Pair, Receipt, Sending};
use crate::types::{ClusterId, Epoch};

use super::scene::{Scene, Stage, Transition, Views};

/// How far a change is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Progress {
    /// The epoch of the ring in force before.
    pub from_epoch: Epoch,
    /// The epoch of the ring in force after.
    pub to_epoch: Epoch,
    /// Whether it is being called off.
    pub cancelled: bool,
    /// The handoffs, in the order of the plan.
    pub handoffs: Vec<HandoffProgress>,
    /// Clusters that have not begun, or did not answer.
    pub waiting_for: Vec<ClusterId>,
    /// Clusters that are through with it.
    pub finished: Vec<ClusterId>,
}

/// How far one handoff is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HandoffProgress {
    /// Between whom.
    #[serde(flatten)]
    pub pair: Pair,
    /// What goes on.
    pub phase: Phase,
    /// The attempt; 0 before the first.
    pub attempt: u64,
    /// How many keys move; `None` while the source is still counting.
    pub keys: Option<u64>,
    /// How many of them are at the destination, staged or served.
    pub keys_copied: u64,
    /// How many keys of it are still to be deleted, at the source or of dead attempts.
    pub keys_to_delete: u64,
}

/// What goes on in a handoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// One of both did not answer.
    Unknown,
    /// It has not begun, or begins again.
    Waiting,
    /// The destination copies; the source serves.
    Copying,
    /// All is copied but what changed lately; the source serves.
    CatchingUp,
    /// Nobody serves what moves, for a moment.
    Frozen,
    /// The destination serves.
    Moved,
    /// The destination serves, and nothing is left to delete.
    Done,
}

impl Phase {
    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Waiting => "waiting",
            Self::Copying => "copying",
            Self::CatchingUp => "catching up",
            Self::Frozen => "frozen",
            Self::Moved => "moved",
            Self::Done => "done",
        }
    }
}

impl Progress {
    /// How far the change under way is; `None` when there is none.
    pub fn of(views: &Views) -> Option<Self> {
        let Scene::Changing(transition) = Scene::of(views) else { return None };
        let stage = |id: &ClusterId| transition.stage(views, id);
        let members = transition.members();
        let behind =
            |id: &&ClusterId| matches!(stage(id), Stage::Unseen | Stage::Outside | Stage::Unbegun);
        let handoffs = transition.plan.iter().map(|pair| handoff(views, &transition, pair));
        Some(Self {
            from_epoch: transition.old.epoch,
            to_epoch: transition.epoch(),
            cancelled: transition.cancelled,
            handoffs: handoffs.collect(),
            waiting_for: members.iter().filter(behind).cloned().collect(),
            finished: members
                .iter()
                .filter(|id| transition.is_finished(views, id))
                .cloned()
                .collect(),
        })
    }

    /// Keys that are where they belong, and all that move as far as that is known.
    pub fn keys(&self) -> (u64, u64) {
        let copied = self.handoffs.iter().map(|handoff| handoff.keys_copied).sum();
        let all = self.handoffs.iter().map(|h| h.keys.unwrap_or(0).max(h.keys_copied)).sum();
        (copied, all)
    }

    /// Whether every source has counted what moves.
    pub fn is_counted(&self) -> bool {
        self.handoffs.iter().all(|handoff| handoff.keys.is_some())
    }
}

fn handoff(views: &Views, transition: &Transition, pair: &Pair) -> HandoffProgress {
    let mut progress = HandoffProgress {
        pair: pair.clone(),
        phase: Phase::Unknown,
        attempt: 0,
        keys: None,
        keys_copied: 0,
        keys_to_delete: 0,
    };
    if let Some(incoming) = transition.incoming(views, pair) {
        progress.keys_copied = incoming.tally.records;
        progress.keys_to_delete += incoming.garbage;
        progress.attempt = incoming.opened;
        progress.phase = match &incoming.receipt {
            Receipt::Waiting => Phase::Waiting,
            Receipt::Receiving { cursor: Cursor::Changes { .. }, .. } => Phase::CatchingUp,
            Receipt::Receiving { .. } => Phase::Copying,
            Receipt::Active => Phase::Moved,
        };
    }
    if let Some(outgoing) = transition.outgoing(views, pair) {
        progress.attempt = progress.attempt.max(outgoing.attempt);
        match outgoing.sending {
            Sending::Moved => progress.keys_to_delete += outgoing.tally.records,
            Sending::Sending | Sending::Frozen if outgoing.counted == Counted::All => {
                progress.keys = Some(outgoing.tally.records);
            }
            Sending::Idle | Sending::Sending | Sending::Frozen => {}
        }
        if outgoing.sending == Sending::Frozen && progress.phase < Phase::Moved {
            progress.phase = Phase::Frozen;
        }
    }
    let source_through = transition.is_finished(views, &pair.from)
        || transition.outgoing(views, pair).is_some_and(|outgoing| outgoing.is_over());
    let destination_through = transition.is_finished(views, &pair.to)
        || transition.incoming(views, pair).is_some_and(|incoming| incoming.is_over());
    if progress.phase == Phase::Moved || destination_through {
        progress.phase = Phase::Moved;
        progress.keys = Some(progress.keys_copied);
    }
    if source_through && destination_through {
        progress.phase = Phase::Done;
    }
    progress
}
