//! The store's side of handoffs, for those who move keys: what there is to send, to count and to delete.
//!
//! Everything here reads; what changes the state goes through the log. All functions block on the disk.
//!
//! A **page of records** is read from data files alone, once the state on disk is at least that in which
//! the attempt was prepared: whatever is newer is in the change log, and comes with a later page. Pages of
//! **answers** and of **changes** are read while the machine is held, so no entry is applied meanwhile;
//! a change's page holds what its keys are now, which may be newer than the page's end, and then comes
//! again.

use std::collections::HashSet;
use std::io;

use bytes::Bytes;
use rocksdb::{Direction, IteratorMode, ReadOptions};

use crate::handoff::{
    Cursor, Handoff, Outgoing, Page, PageRequest, Position, Refused, RingState, Sending,
};

use super::engine::to_io;
use super::machine::Machine;
use super::meta::{self, Change};
use super::reader::StateReader;

/// A page looks at no more rows than this, so that it is soon there even if few of them move.
const LOOKS_MAX: usize = 20_000;

/// A stretch is hashed within one entry, while others wait to be applied: a few milliseconds of it.
const STRETCH_BYTES_MAX: usize = 4 << 20;

/// A page holds no more changes than this: the machine stands still while their keys are looked up.
const PAGE_CHANGES_MAX: u64 = 512;

impl StateReader {
    /// The ring, the change under way and this cluster's part in it, as applied here.
    pub fn ring_state(&self) -> RingState {
        self.shared.machine().ring.clone()
    }

    /// The page that follows a destination's cursor, out of one view of this replica's state.
    ///
    /// # Errors
    /// The data cannot be read. The inner error: this replica does not hold the attempt, or not yet.
    pub fn page(&self, request: &PageRequest) -> io::Result<Result<Page, Refused>> {
        self.shared.engine.check()?;
        match &request.cursor {
            Cursor::Records { after } => self.page_of_records(request, after),
            Cursor::Answers { after } => self.page_of_answers(request, after),
            Cursor::Changes { position } => self.page_of_changes(request, *position),
        }
    }

    fn page_of_records(
        &self,
        request: &PageRequest,
        after: &[u8],
    ) -> io::Result<Result<Page, Refused>> {
        let ring = self.ring_state();
        let outgoing = match self.attempt(&ring, request) {
            Ok(outgoing) => outgoing,
            Err(refused) => return Ok(Err(refused)),
        };
        if self.flushed_index()? < Some(outgoing.prepared_index) {
            self.shared.flush()?;
        }
        let end = ring.position;
        let (own, to) = (&self.shared.cluster, &request.handoff.to);
        let mut page = Page { to: Cursor::start(), end, records: Vec::new(), answers: Vec::new() };
        let bytes_max = request.bytes_max as usize;
        let (mut bytes, mut before, mut last) = (0, after.to_vec(), None);
        self.scan(after, |looks, key, row| {
            if ring.way_out(own, key) == Some(to) {
                bytes += key.len() + row.len();
                if bytes > bytes_max && !page.records.is_empty() {
                    // The next page begins with it: a message has room for the largest record and for a
                    // page, but not for both.
                    last = Some(Bytes::copy_from_slice(&before));
                    return Ok(false);
                }
                let record = meta::retag(row, None)?;
                page.records.push((Bytes::copy_from_slice(key), Some(record)));
            }
            let full = bytes >= bytes_max || looks >= LOOKS_MAX;
            last = full.then(|| Bytes::copy_from_slice(key));
            before.clear();
            before.extend_from_slice(key);
            Ok(!full)
        })?;
        page.to = match last {
            Some(after) => Cursor::Records { after },
            None => Cursor::Answers { after: Bytes::new() },
        };
        Ok(Ok(page))
    }

    fn page_of_answers(
        &self,
        request: &PageRequest,
        after: &[u8],
    ) -> io::Result<Result<Page, Refused>> {
        let machine = self.shared.machine();
        let outgoing = match self.attempt(&machine.ring, request) {
            Ok(outgoing) => outgoing,
            Err(refused) => return Ok(Err(refused)),
        };
        let (own, to) = (&self.shared.cluster, &request.handoff.to);
        let moves = |key: &[u8]| machine.ring.way_out(own, key) == Some(to);
        let bytes_max = request.bytes_max as usize;
        let (answers, last) = machine.dedupe.page(after, &moves, bytes_max, LOOKS_MAX);
        let to = match last {
            Some(after) => Cursor::Answers { after },
            None => Cursor::Changes { position: outgoing.start },
        };
        Ok(Ok(Page { to, end: machine.ring.position, records: Vec::new(), answers }))
    }

    fn page_of_changes(
        &self,
        request: &PageRequest,
        position: Position,
    ) -> io::Result<Result<Page, Refused>> {
        let machine = self.shared.machine();
        let outgoing = match self.attempt(&machine.ring, request) {
            Ok(outgoing) => outgoing,
            Err(refused) => return Ok(Err(refused)),
        };
        let end = machine.ring.position;
        if position < outgoing.start || position > end {
            return Ok(Err(Refused::WrongCursor));
        }
        let mut page = Page {
            to: Cursor::Changes { position },
            end,
            records: Vec::new(),
            answers: Vec::new(),
        };
        let (mut bytes, mut seen) = (0, HashSet::new());
        for next in position..end.min(position + PAGE_CHANGES_MAX) {
            let change = self.change(next)?;
            let (records, answers) = (page.records.len(), page.answers.len());
            bytes += self.add_change(request, &machine, &change, &mut seen, &mut page)?;
            if bytes > request.bytes_max as usize && records + answers > 0 {
                // The next page begins with it, as with records.
                page.records.truncate(records);
                page.answers.truncate(answers);
                break;
            }
            page.to = Cursor::Changes { position: next + 1 };
            if bytes >= request.bytes_max as usize {
                break;
            }
        }
        Ok(Ok(page))
    }

    /// Adds what a changed key and the answer that came with the change are now; how many bytes that is.
    fn add_change(
        &self,
        request: &PageRequest,
        machine: &Machine,
        change: &Change,
        seen: &mut HashSet<Bytes>,
        page: &mut Page,
    ) -> io::Result<usize> {
        let (Change::Record { key, place } | Change::Answer { key, place }) = change;
        // The log is that of all handoffs of this cluster.
        if machine.ring.way_out(&self.shared.cluster, key) != Some(&request.handoff.to) {
            return Ok(0);
        }
        let mut bytes = key.len() + place.len();
        if !place.is_empty() {
            let answer = machine.dedupe.at(place);
            bytes += answer.as_ref().map_or(0, Bytes::len);
            page.answers.push((place.clone(), answer));
        }
        if matches!(change, Change::Record { .. }) && seen.insert(key.clone()) {
            let row = self.shared.row(&self.shared.view().data, key)?;
            let record = row.map(|row| meta::retag(&row, None)).transpose()?;
            bytes += record.as_ref().map_or(0, Bytes::len);
            page.records.push((key.clone(), record));
        }
        Ok(bytes)
    }

    /// The key that ends the next stretch of about `keys_max` records after `from`, for
    /// [`crate::handoff::Step::Count`]; `None` when there are no more.
    ///
    /// # Errors
    /// The data cannot be read, or not be written to disk before the first stretch.
    pub fn stretch(&self, from: &[u8], keys_max: usize) -> io::Result<Option<Bytes>> {
        // A stretch is cut by what is on disk, so whatever was there when an attempt was prepared must be:
        // also here, if another node led then, or the stretch would hold more than may be counted at once.
        if from.is_empty() || self.flushed_index()? < self.ring_state().prepared_index() {
            self.shared.flush()?;
        }
        let (mut last, mut bytes) = (None, 0);
        self.scan(from, |looks, key, row| {
            bytes += row.len();
            let long = looks >= keys_max || bytes >= STRETCH_BYTES_MAX;
            last = long.then(|| Bytes::copy_from_slice(key));
            Ok(!long)
        })?;
        Ok(last)
    }

    /// Up to `keys_max` keys after `after` whose rows a handoff has made useless: at its source what
    /// moved, at its destination what dead attempts staged. Empty: there are no more after it, but for
    /// such as came since this was asked from the beginning, with an empty `after`.
    ///
    /// # Errors
    /// The data cannot be read.
    pub fn leftovers(
        &self,
        handoff: &Handoff,
        after: &[u8],
        keys_max: usize,
    ) -> io::Result<Vec<Bytes>> {
        // Rows in memory are in no order; on disk all of them are. Once for each time through: a file for
        // every batch of keys would cost more than deleting them, and what comes to lie in memory
        // meanwhile is found the next time.
        if after.is_empty() {
            self.shared.flush()?;
        }
        let ring = self.ring_state();
        let own = &self.shared.cluster;
        let moved = handoff.from == *own
            && ring.outgoing(handoff).is_some_and(|outgoing| outgoing.sending == Sending::Moved);
        let mut keys = Vec::new();
        self.scan(after, |_, key, row| {
            let useless = if handoff.from == *own {
                moved && ring.way_out(own, key) == Some(&handoff.to)
            } else {
                let tag = meta::decode_row(row)?.1;
                ring.way_in(own, key) == Some(&handoff.from)
                    && tag.is_some_and(|tag| ring.is_dead(handoff, tag))
            };
            if useless {
                keys.push(Bytes::copy_from_slice(key));
            }
            Ok(keys.len() < keys_max)
        })?;
        Ok(keys)
    }

    /// The source's side of the handoff that is asked for, if it is at this attempt.
    fn attempt<'a>(
        &self,
        ring: &'a RingState,
        request: &PageRequest,
    ) -> Result<&'a Outgoing, Refused> {
        let PageRequest { handoff, attempt, .. } = request;
        let cluster = self.shared.cluster.clone();
        let outgoing = ring
            .outgoing(handoff)
            .filter(|_| handoff.from == cluster)
            .ok_or_else(|| Refused::UnknownHandoff { cluster, handoff: handoff.clone() })?;
        if outgoing.attempt != *attempt || !outgoing.logs() {
            return Err(Refused::WrongAttempt { attempt: *attempt, present: outgoing.attempt });
        }
        Ok(outgoing)
    }

    /// The index of the last entry whose effects are on disk.
    fn flushed_index(&self) -> io::Result<Option<u64>> {
        let data = self.shared.view().data.clone();
        let engine = &self.shared.engine;
        let head = engine.db().get_cf(&engine.family(&data)?, meta::KEY_HEAD).map_err(to_io)?;
        let head = head.map(|bytes| meta::decode_head(&bytes)).transpose()?;
        Ok(head.and_then(|head| head.applied()).map(|applied| applied.index))
    }

    fn change(&self, position: Position) -> io::Result<Change> {
        if let Some(change) = self.shared.memtables.read().change(position) {
            return meta::decode_change(change);
        }
        let data = self.shared.view().data.clone();
        let engine = &self.shared.engine;
        let key = meta::change_key(position);
        let stored = engine.db().get_cf(&engine.family(&data)?, &key).map_err(to_io)?;
        let stored =
            stored.ok_or_else(|| meta::corrupt("the change log", "a change is missing"))?;
        meta::decode_change(&stored)
    }

    /// Goes through the rows on disk after a key, in order, until told to stop. Counts them from 1.
    fn scan(
        &self,
        after: &[u8],
        mut visit: impl FnMut(usize, &[u8], &[u8]) -> io::Result<bool>,
    ) -> io::Result<()> {
        let data = self.shared.view().data.clone();
        let engine = &self.shared.engine;
        let family = engine.family(&data)?;
        let mut start = Vec::new();
        meta::record_key(after, &mut start);
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        let mode = IteratorMode::From(&start, Direction::Forward);
        let mut looks = 0;
        for item in engine.db().iterator_cf_opt(&family, options, mode) {
            let (stored, row) = item.map_err(to_io)?;
            let key = meta::key_of(&stored)?;
            if key == after {
                continue;
            }
            looks += 1;
            if !visit(looks, key, &row)? {
                break;
            }
        }
        Ok(())
    }
}
