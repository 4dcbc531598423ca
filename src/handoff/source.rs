//! The source's side of a handoff: what its steps do.

use std::io;

use crate::types::ClusterId;

use super::decide::{Decided, Facts, first, repeat};
use super::state::{Counted, Outgoing, RingState, Sending};
use super::{Attempt, Done, Frozen, Handoff, Refused, Tally, is_next_attempt};

impl RingState {
    pub(super) fn prepare(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        facts: &dyn Facts,
    ) -> Decided {
        let start = self.position;
        let cancelled = self.change_mut(handoff.epoch, facts.own())?.is_cancelled();
        let moves = self.moves(handoff);
        let outgoing = self.outgoing_mut(handoff, facts.own())?;
        if outgoing.attempt == attempt && outgoing.logs() {
            return repeat(Done::Prepared { start: outgoing.start });
        }
        if cancelled {
            return Err(Refused::Cancelled);
        }
        if matches!(outgoing.sending, Sending::Frozen | Sending::Moved) {
            return Err(wrong_phase("prepare", outgoing.sending));
        }
        if !is_next_attempt(attempt, outgoing.attempt) {
            return Err(Refused::WrongAttempt { attempt, present: outgoing.attempt });
        }
        *outgoing = Outgoing {
            attempt,
            sending: Sending::Sending,
            start,
            prepared_revision: facts.revision(),
            prepared_index: facts.index(),
            counted: Counted::default(),
            tally: facts.answers(&moves),
            frozen: None,
        };
        first(Done::Prepared { start })
    }

    pub(super) fn count(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        from: &[u8],
        to: Option<&[u8]>,
        facts: &dyn Facts,
    ) -> io::Result<Decided> {
        let moves = self.moves(handoff);
        let outgoing = match self.outgoing_in(handoff, attempt, facts.own()) {
            Ok(outgoing) => outgoing,
            Err(refused) => return Ok(Err(refused)),
        };
        if outgoing.sending != Sending::Sending {
            return Ok(Err(wrong_phase("count", outgoing.sending)));
        }
        match &outgoing.counted {
            Counted::UpTo(last) if &last[..] == from && to.is_none_or(|to| to > from) => {}
            // A repeat, or somebody else's stretch came first.
            _ => return Ok(Err(Refused::WrongCursor)),
        }
        let Some(records) = facts.records(&moves, from, to, outgoing.prepared(handoff.epoch))?
        else {
            return Ok(Err(Refused::TooMuch));
        };
        outgoing.tally.records += records.records;
        outgoing.tally.digest = outgoing.tally.digest.wrapping_add(records.digest);
        outgoing.counted = match to {
            Some(to) => Counted::UpTo(bytes::Bytes::copy_from_slice(to)),
            None => Counted::All,
        };
        Ok(first(Done::Ok))
    }

    pub(super) fn freeze(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        floors_bytes_max: usize,
        facts: &dyn Facts,
    ) -> Decided {
        let position = self.position;
        let cancelled = self.change_mut(handoff.epoch, facts.own())?.is_cancelled();
        let outgoing = self.outgoing_in(handoff, attempt, facts.own())?;
        if let (Sending::Frozen | Sending::Moved, Some(frozen)) =
            (outgoing.sending, &outgoing.frozen)
        {
            return repeat(Done::Frozen(Box::new(frozen.clone())));
        }
        if cancelled {
            return Err(Refused::Cancelled);
        }
        if outgoing.sending != Sending::Sending {
            return Err(wrong_phase("freeze", outgoing.sending));
        }
        if outgoing.counted != Counted::All {
            return Err(Refused::Uncounted);
        }
        let (floors, mut idle_floors) = (facts.floors(), facts.idle_floors());
        let bytes = floors_bytes(&floors);
        if bytes > floors_bytes_max {
            return Err(Refused::TooManyClients);
        }
        if bytes + floors_bytes(&idle_floors) > floors_bytes_max {
            idle_floors = Vec::new();
        }
        let (revision, tally) = (facts.revision(), outgoing.tally);
        let frozen = Frozen { position, revision, tally, floors, idle_floors };
        outgoing.sending = Sending::Frozen;
        outgoing.frozen = Some(frozen.clone());
        first(Done::Frozen(Box::new(frozen)))
    }

    pub(super) fn thaw(&mut self, handoff: &Handoff, refused: Attempt, own: &ClusterId) -> Decided {
        let outgoing = self.outgoing_mut(handoff, own)?;
        if outgoing.attempt > refused {
            return Err(Refused::WrongAttempt { attempt: refused, present: outgoing.attempt });
        }
        match outgoing.sending {
            Sending::Idle => repeat(Done::Ok),
            Sending::Sending | Sending::Frozen => {
                outgoing.sending = Sending::Idle;
                outgoing.frozen = None;
                first(Done::Ok)
            }
            Sending::Moved => Err(wrong_phase("thaw", outgoing.sending)),
        }
    }

    pub(super) fn release(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        taken: Tally,
        own: &ClusterId,
    ) -> Decided {
        let outgoing = self.outgoing_in(handoff, attempt, own)?;
        match outgoing.sending {
            Sending::Moved => repeat(Done::Ok),
            Sending::Frozen => {
                let held = outgoing.frozen.as_ref().map_or(outgoing.tally, |frozen| frozen.tally);
                if held != taken {
                    return Err(Refused::Differs { staged: taken, source_has: held });
                }
                outgoing.sending = Sending::Moved;
                outgoing.tally.answers = 0;
                if let Some(frozen) = &mut outgoing.frozen {
                    // Else they would be here once for each handoff.
                    frozen.forget_clients();
                }
                first(Done::Ok)
            }
            phase => Err(wrong_phase("release", phase)),
        }
    }
}

/// What floors take in a step, at most.
fn floors_bytes(floors: &[(String, u64)]) -> usize {
    /// Brackets, quotes, commas and a number of 20 digits.
    const EACH: usize = 26;
    // Of what names are made of, these two are escaped.
    let escaped = |name: &str| name.bytes().filter(|byte| matches!(byte, b'"' | b'\\')).count();
    floors.iter().map(|(name, _)| EACH + name.len() + escaped(name)).sum()
}

fn wrong_phase(step: &str, phase: Sending) -> Refused {
    Refused::WrongPhase { step: step.to_owned(), phase: phase.name().to_owned() }
}
