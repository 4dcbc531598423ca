//! Who acts on what: a driver's own steps at once, those of others when they have left them undone.

use std::time::Duration;

use crate::handoff::Step;
use crate::reshard::driver::Action;
use crate::types::ClusterId;

/// How long a step that is somebody else's may be left undone: well above what its owner takes, well
/// below what a client waits.
const PATIENCE: Duration = Duration::from_millis(700);

/// Which steps are a driver's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The leader of a cluster: the handoffs of which its cluster is the source, and its own finish, when nobody
    /// else does that.
    Source(ClusterId),
    /// The same for the sequencer's cluster: also all that is not a handoff's, and, when nobody else
    /// does it, the handoffs of others.
    Sequencer(ClusterId),
    /// Somebody who started or resumed a change: everything, when nobody else does it.
    Helper,
    /// Everything, at once: where there is nobody else.
    Alone,
    /// Nothing: somebody who only watches.
    Onlooker,
}

impl Role {
    /// How long the action may be left to others; `None`: for ever.
    pub(super) fn patience(&self, action: &Action) -> Option<Duration> {
        let from = action.step.handoff().map(|handoff| &handoff.from);
        let finishes = matches!(action.step, Step::Finish { .. });
        match (self, from) {
            (Self::Source(own), None) if finishes && action.at == *own => Some(PATIENCE),
            (Self::Alone, _) | (Self::Sequencer(_), None) => Some(Duration::ZERO),
            (Self::Source(own) | Self::Sequencer(own), Some(from)) if own == from => {
                Some(Duration::ZERO)
            }
            (Self::Source(_) | Self::Onlooker, _) => None,
            (Self::Sequencer(_) | Self::Helper, _) => Some(PATIENCE),
        }
    }
}
