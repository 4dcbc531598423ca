//! The destination's side of a handoff: what its steps do.

use crate::types::ClusterId;

use super::decide::{Decided, first, repeat};
use super::state::{Change, Incoming, Receipt, RingState};
use super::{
    Attempt, Cursor, Done, Frozen, Handoff, Position, REVISION_MAX, Refused, Tally, is_next_attempt,
};

impl RingState {
    pub(super) fn open(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        start: Position,
        own: &ClusterId,
    ) -> Decided {
        let incoming = self.incoming_mut(handoff, own)?;
        match &incoming.receipt {
            Receipt::Active => return repeat(active(incoming)),
            Receipt::Receiving { cursor, start: begun }
                if incoming.opened == attempt && *begun == start =>
            {
                return repeat(Done::Receiving { cursor: cursor.clone() });
            }
            _ => {}
        }
        let highest = incoming.opened.max(incoming.refused);
        if !is_next_attempt(attempt, highest) {
            return Err(Refused::WrongAttempt { attempt, present: highest });
        }
        incoming.discard();
        incoming.opened = attempt;
        incoming.receipt = Receipt::Receiving { cursor: Cursor::start(), start };
        first(Done::Receiving { cursor: Cursor::start() })
    }

    /// Whether a page that continues the copy at `from` may be staged.
    ///
    /// # Errors
    /// Why not. A page that is repeated, or that another driver was faster with, is [`Refused::WrongCursor`].
    pub fn check_import(
        &self,
        handoff: &Handoff,
        attempt: Attempt,
        from: &Cursor,
        to: &Cursor,
        own: &ClusterId,
    ) -> Result<(), Refused> {
        let incoming = self.incoming(handoff).ok_or_else(|| self.unknown(handoff, own))?;
        if handoff.to != *own {
            return Err(self.unknown(handoff, own));
        }
        if incoming.opened != attempt {
            return Err(Refused::WrongAttempt { attempt, present: incoming.opened });
        }
        match &incoming.receipt {
            // The order of the variants is the order of copying.
            Receipt::Receiving { cursor, .. } if cursor == from && to >= from => Ok(()),
            Receipt::Receiving { .. } => Err(Refused::WrongCursor),
            _ => Err(Refused::WrongPhase {
                step: "import".into(),
                phase: incoming.receipt.name().into(),
            }),
        }
    }

    /// The page that [`Self::check_import`] admitted is staged: the tally is what is staged now, and
    /// `garbage` says how many rows of dead attempts it replaced.
    pub fn end_import(&mut self, handoff: &Handoff, to: &Cursor, tally: Tally, garbage: u64) {
        let Some(incoming) = self.incoming_slot(handoff) else { return };
        if let Receipt::Receiving { cursor, .. } = &mut incoming.receipt {
            *cursor = to.clone();
            incoming.tally = tally;
            incoming.garbage = incoming.garbage.saturating_sub(garbage);
        }
    }

    pub(super) fn activate(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        frozen: &Frozen,
        own: &ClusterId,
    ) -> Decided {
        let incoming = self.incoming_mut(handoff, own)?;
        if incoming.opened != attempt {
            return Err(Refused::WrongAttempt { attempt, present: incoming.opened });
        }
        match &incoming.receipt {
            Receipt::Active => repeat(active(incoming)),
            _ if frozen.revision > REVISION_MAX => Err(Refused::Implausible(frozen.revision)),
            Receipt::Receiving { cursor, .. } if cursor.covers(frozen.position) => {
                if incoming.tally != frozen.tally {
                    return Err(Refused::Differs {
                        staged: incoming.tally,
                        source_has: frozen.tally,
                    });
                }
                incoming.receipt = Receipt::Active;
                first(active(incoming))
            }
            Receipt::Receiving { .. } => Err(Refused::WrongCursor),
            Receipt::Waiting => Err(Refused::WrongPhase {
                step: "activate".into(),
                phase: incoming.receipt.name().into(),
            }),
        }
    }

    pub(super) fn refuse(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        own: &ClusterId,
    ) -> Decided {
        let cancelled = self.change_to(handoff.epoch).is_some_and(Change::is_cancelled);
        let incoming = self.incoming_mut(handoff, own)?;
        if incoming.is_active() {
            return repeat(active(incoming));
        }
        if attempt <= incoming.refused {
            return repeat(Done::Refused { attempt: incoming.refused });
        }
        // All attempts for ever only where the change is being called off: it could not go on.
        let highest = incoming.opened.max(incoming.refused);
        if attempt > highest
            && !is_next_attempt(attempt, highest)
            && !(cancelled && attempt == Attempt::MAX)
        {
            return Err(Refused::WrongAttempt { attempt, present: highest });
        }
        incoming.refused = attempt;
        if incoming.opened <= attempt {
            incoming.discard();
            incoming.receipt = Receipt::Waiting;
        }
        first(Done::Refused { attempt })
    }
}

impl Incoming {
    /// What the present attempt staged is dead from now on.
    fn discard(&mut self) {
        self.garbage += self.tally.records;
        self.tally = Tally::default();
    }
}

fn active(incoming: &Incoming) -> Done {
    Done::Active { attempt: incoming.opened, tally: incoming.tally }
}
