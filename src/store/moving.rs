//! What steps of a change of the ring do to the data: the state machine's side of handoffs.
//!
//! [`RingState::decide`] says whether a step is taken; here its consequences are carried out, in the same
//! round. Rows of a handoff lie at their keys' own place, at the source and at the destination. What is
//! staged carries the attempt's tag, and counts only once that attempt has been activated: so taking over
//! any number of records is one change of state. Staged answers stand apart, in the machine.
//!
//! While a source sends, each change of a moving key goes into the change log, and into the tally that
//! the destination's must equal. What did not change is counted stretch by stretch ([`Facts::records`]).
//!
//! [`RingState::decide`]: crate::handoff::RingState::decide

use std::io;

use bytes::Bytes;
use rocksdb::{Direction, IteratorMode, ReadOptions};

use crate::handoff::LOG_CHANGES_MAX;
use crate::handoff::{
    Clean, Done, Facts, Handoff, Import, Prepared, Receipt, Refused, Sending, Step, Tag, Tally,
};
use crate::types::{ClusterId, Revision, Written};
use crate::writes::WriteRef;

use super::dedupe::{answer_hash, answered_key, place};
use super::engine::to_io;
use super::machine::Machine;
use super::memtable::Update;
use super::meta;
use super::round::{Round, falls};

/// So many rows are read within one entry at most: ten times what the mover asks for. Everybody else waits
/// meanwhile.
const COUNTED_ROWS_MAX: usize = 20_000;

impl<'a> Round<'a> {
    /// A write to a key that is being copied to another cluster.
    pub(super) fn write_moving(&mut self, write: &WriteRef<'a>) -> io::Result<Written> {
        let key = write.key;
        let before = self.live_row(key)?;
        let (written, recorded) = self.write_once(write)?;
        let after = self.live_row(key)?;
        if before == after && !recorded {
            return Ok(written);
        }
        let counted = |row: &Option<Bytes>| -> io::Result<Option<(Revision, u64)>> {
            let Some(row) = row else { return Ok(None) };
            Ok(Some((meta::decode_row(row)?.0, meta::record_hash(key, row)?)))
        };
        let (old, new) = (counted(&before)?, counted(&after)?);
        let answer = write.once.as_ref().filter(|_| recorded);
        let answer = answer.map(|once| place(once.client(), once.seq()));
        let Machine { dedupe, ring, .. } = &mut *self.machine;
        let Some(outgoing) = ring.sending(&self.shared.cluster, key) else { return Ok(written) };
        if before != after {
            outgoing.count_change(key, old, new.map(|(_, hash)| hash));
        }
        if let Some(place) = &answer {
            match dedupe.at(place) {
                Some(stored) => outgoing.tally.add_answer(answer_hash(place, &stored)),
                None => dedupe.never_was(place),
            }
        }
        self.log_change(key, meta::encode_change(key, answer.as_deref()));
        Ok(written)
    }

    /// Takes down a change of a moving key. The attempt is given up when its log becomes too long.
    fn log_change(&mut self, key: &[u8], change: Bytes) {
        let ring = &mut self.machine.ring;
        let position = ring.log_change(LOG_CHANGES_MAX);
        self.changes.push((position, change));
        if ring.sending(&self.shared.cluster, key).is_none() {
            tracing::warn!(
                changes = LOG_CHANGES_MAX,
                "keys change faster than they are handed over: the attempt begins anew"
            );
            self.ring_changed = true;
        }
    }

    /// Answers to writes of moving keys have fallen: they do not move any more.
    pub(super) fn log_fallen(&mut self) {
        for fallen in self.machine.dedupe.take_fallen() {
            let ring = &mut self.machine.ring;
            // The attempt may have been given up since.
            let Some(outgoing) = ring.sending(&self.shared.cluster, &fallen.key) else { continue };
            outgoing.tally.remove_answer(fallen.hash);
            self.log_change(&fallen.key, meta::encode_fall(&fallen.key, &fallen.place));
        }
    }

    /// Takes a step, with all that follows from it.
    pub(super) fn take_step(
        &mut self,
        step: &Step,
        index: u64,
    ) -> io::Result<Result<Done, Refused>> {
        let mut ring = std::mem::take(&mut self.machine.ring);
        let decided = ring.decide(step, &RoundFacts { round: self, index });
        self.machine.ring = ring;
        let decision = match decided? {
            Ok(decision) => decision,
            Err(refused) => return Ok(Err(refused)),
        };
        if decision.changed {
            self.follow(step);
            self.ring_changed = true;
        }
        Ok(Ok(decision.done))
    }

    fn follow(&mut self, step: &Step) {
        let own = &self.shared.cluster;
        let Machine { dedupe, ring, staged } = &mut *self.machine;
        match step {
            Step::Open { handoff, .. } | Step::Refuse { handoff, .. } => {
                let receiving = ring
                    .incoming(handoff)
                    .is_some_and(|incoming| matches!(incoming.receipt, Receipt::Receiving { .. }));
                // A refusal of attempts before the open one discards nothing.
                if matches!(step, Step::Open { .. }) || !receiving {
                    staged.remove(handoff);
                }
            }
            Step::Activate { handoff, frozen, .. } => {
                self.progress.revision = self.progress.revision.max(frozen.revision);
                let answers = staged.remove(handoff).unwrap_or_default();
                dedupe.take_over(frozen, answers, &falls(ring, own));
            }
            Step::Release { handoff, .. } => {
                let ring = &*ring;
                dedupe.forget_moved(&|key| ring.way_out(own, key) == Some(&handoff.to));
            }
            Step::Thaw { handoff, .. } => {
                let ring = &*ring;
                dedupe.unpin(&|key| ring.way_out(own, key) == Some(&handoff.to));
            }
            _ => {}
        }
    }

    /// Stages a page.
    pub(super) fn import(&mut self, import: &'a Import) -> io::Result<Result<Done, Refused>> {
        let Import { handoff, attempt, from, page } = import;
        let own = self.shared.cluster.clone();
        let ring = &self.machine.ring;
        if let Err(refused) = ring.check_import(handoff, *attempt, from, &page.to, &own) {
            return Ok(Err(refused));
        }
        let moves = |key: &[u8]| ring.way_in(&own, key) == Some(&handoff.from);
        let answered = |(_, stored): &(Bytes, Option<Bytes>)| {
            stored.as_ref().is_none_or(|stored| answered_key(stored).is_some_and(|key| moves(&key)))
        };
        let sound = |record: &(Bytes, Option<Bytes>)| {
            moves(&record.0) && record.1.as_deref().is_none_or(|r| meta::decode_row(r).is_ok())
        };
        let is_sound = page.has_sound_keys() && page.records.iter().all(sound);
        if !is_sound || !page.answers.iter().all(answered) {
            return Ok(Err(Refused::ForeignRecord));
        }
        let mut tally = ring.incoming(handoff).map_or(Tally::default(), |i| i.tally);
        let tag = Tag { epoch: handoff.epoch, attempt: *attempt };
        let Some(garbage) = self.stage_records(&page.records, tag, &mut tally)? else {
            return Ok(Err(Refused::ForeignRecord));
        };
        let staged = self.machine.staged.entry(handoff.clone()).or_default();
        for (place, stored) in &page.answers {
            if let Some(old) = staged.remove(place) {
                tally.remove_answer(answer_hash(place, &old));
            }
            if let Some(stored) = stored {
                tally.add_answer(answer_hash(place, stored));
                // Copied: a slice would keep the whole entry alive.
                let copy = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
                staged.insert(copy(place), copy(stored));
            }
        }
        self.machine.ring.end_import(handoff, &page.to, tally, garbage);
        Ok(Ok(Done::Receiving { cursor: page.to.clone() }))
    }

    /// Writes the rows of a page; how many rows of dead attempts they replaced. `None`, with nothing
    /// written, when a row of another origin is in the way.
    fn stage_records(
        &mut self,
        records: &'a [(Bytes, Option<Bytes>)],
        tag: Tag,
        tally: &mut Tally,
    ) -> io::Result<Option<u64>> {
        let (mut updates, mut garbage) = (Vec::new(), 0);
        let mut counted = *tally;
        let mut seen = std::collections::HashSet::new();
        for (key, record) in records {
            // A source names a key once in a page; what does not is none.
            if !seen.insert(key) {
                return Ok(None);
            }
            let old = self.row(key)?;
            if let Some(old) = &old {
                match meta::decode_row(old)?.1 {
                    Some(found) if found == tag => {
                        counted.remove_record(meta::record_hash(key, old)?);
                    }
                    Some(found) if found.epoch == tag.epoch => garbage += 1,
                    _ => return Ok(None),
                }
            }
            if let Some(record) = record {
                counted.add_record(meta::record_hash(key, record)?);
                let record = meta::retag(record, Some(tag))?;
                updates.push((&key[..], Update::Record(record)));
            } else if old.is_some() {
                updates.push((&key[..], Update::Delete));
            }
        }
        *tally = counted;
        self.updates.extend(updates);
        Ok(Some(garbage))
    }

    /// Deletes rows that a handoff has made useless; leaves all others alone.
    pub(super) fn clean(&mut self, clean: &'a Clean) -> io::Result<Result<Done, Refused>> {
        let Clean { handoff, keys } = clean;
        let own = self.shared.cluster.clone();
        let ring = &self.machine.ring;
        let moved = ring.outgoing(handoff).filter(|_| handoff.from == own);
        if moved.is_some_and(|outgoing| outgoing.sending == Sending::Moved) {
            for key in keys {
                if self.machine.ring.way_out(&own, key) == Some(&handoff.to)
                    && let Some(row) = self.row(key)?
                {
                    let hash = meta::record_hash(key, &row)?;
                    if let Some(outgoing) = self.machine.ring.outgoing_slot(handoff) {
                        outgoing.tally.remove_record(hash);
                    }
                    self.updates.insert(key, Update::Delete);
                }
            }
        } else if ring.incoming(handoff).is_some() && handoff.to == own {
            for key in keys {
                if self.is_dead(handoff, key)? {
                    if let Some(incoming) = self.machine.ring.incoming_slot(handoff) {
                        incoming.garbage = incoming.garbage.saturating_sub(1);
                    }
                    self.updates.insert(key, Update::Delete);
                }
            }
        } else {
            let cluster = own;
            return Ok(Err(Refused::UnknownHandoff { cluster, handoff: handoff.clone() }));
        }
        Ok(Ok(Done::Ok))
    }

    /// A write is about to take a key's place. If a row is there that an attempt staged in vain, it need
    /// not be deleted any more.
    pub(super) fn replaces_dead_row(&mut self, key: &[u8]) -> io::Result<()> {
        let own = &self.shared.cluster;
        let Some(change) = &self.machine.ring.change else { return Ok(()) };
        let Some(from) = self.machine.ring.way_in(own, key).cloned() else { return Ok(()) };
        let handoff = Handoff { epoch: change.next.ring().epoch, from, to: own.clone() };
        let garbage = self.machine.ring.incoming(&handoff).map_or(0, |incoming| incoming.garbage);
        if garbage > 0
            && self.is_dead(&handoff, key)?
            && let Some(incoming) = self.machine.ring.incoming_slot(&handoff)
        {
            incoming.garbage -= 1;
        }
        Ok(())
    }

    /// Whether a key's row was staged by an attempt of this handoff that came to nothing.
    fn is_dead(&self, handoff: &Handoff, key: &[u8]) -> io::Result<bool> {
        let ring = &self.machine.ring;
        if ring.way_in(&self.shared.cluster, key) != Some(&handoff.from) {
            return Ok(false);
        }
        let Some(row) = self.row(key)? else { return Ok(false) };
        let tag = meta::decode_row(&row)?.1;
        Ok(tag.is_some_and(|tag| ring.is_dead(handoff, tag)))
    }
}

/// What a round knows, for [`crate::handoff::RingState::decide`], which holds the ring state itself.
struct RoundFacts<'a, 'b> {
    round: &'a Round<'b>,
    index: u64,
}

impl Facts for RoundFacts<'_, '_> {
    fn own(&self) -> &ClusterId {
        &self.round.shared.cluster
    }

    fn index(&self) -> u64 {
        self.index
    }

    fn revision(&self) -> Revision {
        self.round.progress.revision
    }

    fn floors(&self) -> Vec<(String, u64)> {
        self.round.machine.dedupe.floors()
    }

    fn idle_floors(&self) -> Vec<(String, u64)> {
        self.round.machine.dedupe.idle_floors()
    }

    fn is_empty(&self) -> io::Result<bool> {
        let machine = &*self.round.machine;
        let remembers = machine.dedupe.keys().next().is_some() || !machine.staged.is_empty();
        Ok(!remembers && !self.round.holds_key(&|_| true)?)
    }

    fn answers(&self, moves: &dyn Fn(&[u8]) -> bool) -> Tally {
        self.round.machine.dedupe.tally(moves)
    }

    /// Rows in memory are in no order, so all of a table are looked at, unless it was begun after the
    /// attempt was prepared: whatever it holds of moving keys is newer. Rows on disk, only those in the
    /// stretch. Rows that were staged in this change keep the revisions of where they come from, and each
    /// replica has them in other tables, so they are not even looked at: they do not move away.
    fn records(
        &self,
        moves: &dyn Fn(&[u8]) -> bool,
        from: &[u8],
        to: Option<&[u8]>,
        prepared: Prepared,
    ) -> io::Result<Option<Tally>> {
        let (mut tally, mut looks) = (Tally::default(), 0);
        let inside = |key: &[u8]| key > from && to.is_none_or(|to| key <= to);
        let mut count = |key: &[u8], row: &[u8]| -> io::Result<bool> {
            if !inside(key) {
                return Ok(true);
            }
            let (revision, tag, _) = meta::decode_row(row)?;
            let is_staged = tag.is_some_and(|tag| tag.epoch == prepared.epoch);
            if revision <= prepared.revision && !is_staged {
                looks += 1;
                if moves(key) {
                    tally.add_record(meta::record_hash(key, row)?);
                }
            }
            Ok(looks <= COUNTED_ROWS_MAX)
        };
        let round = self.round;
        for (key, update) in &round.updates {
            if let Some(row) = update.to_bytes()
                && !count(key, &row)?
            {
                return Ok(None);
            }
        }
        let newer = round.shared.memtables.read();
        for (key, row) in newer.unflushed_rows_before(prepared.index) {
            if let Some(row) = row
                && !round.updates.contains_key(key)
                && !count(key, row)?
            {
                return Ok(None);
            }
        }
        let engine = &round.shared.engine;
        let family = engine.family(&round.view.data)?;
        let mut start = Vec::new();
        meta::record_key(from, &mut start);
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        let mode = IteratorMode::From(&start, Direction::Forward);
        for item in engine.db().iterator_cf_opt(&family, options, mode) {
            let (stored, row) = item.map_err(to_io)?;
            let key = meta::key_of(&stored)?;
            if to.is_some_and(|to| key > to) {
                break;
            }
            let hidden = round.updates.contains_key(key) || newer.is_unflushed(key);
            if !hidden && !count(key, &row)? {
                return Ok(None);
            }
        }
        Ok(Some(tally))
    }
}
