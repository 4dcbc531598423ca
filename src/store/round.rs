//! A round: what some consecutive entries do to the state, before anybody sees it.
//!
//! Later entries see earlier ones through the round's own rows; the machine they change at once, under
//! the lock that whoever applies the round holds ([`super::machine`]). At the end all of it becomes
//! visible in one step.
//!
//! Conditions, ownership and repeats are decided here and nowhere earlier, because only here all
//! replicas agree on what is true. For each write in this order: another cluster's key is refused;
//! what was answered before is answered so again; the condition counts, and then the write is done. So
//! a refusal for want of ownership is never remembered as a write's answer.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use openraft::EntryPayload;
use rocksdb::{Direction, IteratorMode};

use crate::ring::{Ring, RingTable};
use crate::types::{
    Action, Applied, Command, Condition, Entry, Revision, RingRefusal, StoredMembership, Write,
    Written,
};

use super::dedupe::Verdict;
use super::engine::to_io;
use super::machine::Machine;
use super::memtable::Row;
use super::meta::{self, Progress};
use super::reader::{StateShared, View};

pub(super) struct Round<'a> {
    shared: &'a StateShared,
    machine: &'a mut Machine,
    /// As of the round's beginning. Nobody changes it while the machine is locked.
    view: View,
    /// What this round wrote or deleted, by key.
    rows: HashMap<Bytes, Row>,
    progress: Progress,
    membership: Option<StoredMembership>,
    /// A ring that this round took.
    ring: Option<Arc<RingTable>>,
}

impl<'a> Round<'a> {
    pub(super) fn new(shared: &'a StateShared, machine: &'a mut Machine) -> Self {
        let progress = shared.memtables.read().head().progress;
        let view = shared.view().clone();
        let rows = HashMap::new();
        Self { shared, machine, view, rows, progress, membership: None, ring: None }
    }

    /// Adds one entry's changes.
    pub(super) fn step(&mut self, entry: Entry) -> io::Result<Applied> {
        let answer = match entry.payload {
            EntryPayload::Blank => Applied::Nothing,
            EntryPayload::Membership(membership) => {
                let stored = StoredMembership::new(Some(entry.log_id), membership);
                self.membership = Some(stored);
                Applied::Nothing
            }
            EntryPayload::Normal(Command::Write { at_ms, writes }) => {
                self.machine.dedupe.advance(at_ms);
                let written = writes.iter().map(|write| self.write(write));
                Applied::Written(written.collect::<io::Result<_>>()?)
            }
            EntryPayload::Normal(Command::InstallRing(ring)) => self.install_ring(*ring)?,
        };
        self.progress.last_applied = Some(entry.log_id);
        Ok(answer)
    }

    fn write(&mut self, write: &Write) -> io::Result<Written> {
        let ring = self.ring();
        if !ring.owns(&self.shared.cluster, &write.key) {
            return Ok(Written::WrongCluster { epoch: ring.ring().epoch });
        }
        let Some(once) = &write.once else { return self.carry_out(write) };
        match self.machine.dedupe.check(once, write) {
            Verdict::Answered(written) => Ok(written),
            Verdict::New => {
                let written = self.carry_out(write)?;
                self.machine.dedupe.record(once, write, &written);
                Ok(written)
            }
        }
    }

    fn carry_out(&mut self, write: &Write) -> io::Result<Written> {
        let Write { key, action, condition, .. } = write;
        if *condition != Condition::Always {
            let current = self.current(key)?;
            let holds = match condition {
                Condition::Always => true,
                Condition::Absent => current.is_none(),
                Condition::Revision(wanted) => current == Some(*wanted),
            };
            if !holds {
                return Ok(Written::ConditionFailed { current });
            }
        }
        match action {
            Action::Put(value) => {
                self.progress.revision += 1;
                let revision = self.progress.revision;
                let record = meta::encode_record(revision, value);
                self.rows.insert(key.clone(), Some(record.into()));
                Ok(Written::Put { revision })
            }
            Action::Delete => {
                let deleted = self.current(key)?.is_some();
                if deleted {
                    self.progress.revision += 1;
                    self.rows.insert(key.clone(), None);
                }
                Ok(Written::Deleted { revision: self.progress.revision, deleted })
            }
        }
    }

    fn ring(&self) -> &RingTable {
        self.ring.as_ref().unwrap_or(&self.view.ring)
    }

    /// The revision of a key's record as of this point of the round.
    fn current(&self, key: &Bytes) -> io::Result<Option<Revision>> {
        let revision = |row: &Row| row.as_deref().map(meta::decode_record_revision).transpose();
        if let Some(row) = self.rows.get(key) {
            return revision(row);
        }
        if let Some(row) = self.shared.memtables.read().get(key) {
            return revision(row);
        }
        let engine = &self.shared.engine;
        let family = engine.family(&self.view.data)?;
        let mut stored = Vec::new();
        meta::record_key(key, &mut stored);
        let found = engine.db().get_pinned_cf(&family, &stored).map_err(to_io)?;
        found.map(|bytes| meta::decode_record_revision(&bytes)).transpose()
    }

    /// Takes a first ring, if it takes no key from this cluster.
    fn install_ring(&mut self, ring: Ring) -> io::Result<Applied> {
        let present = self.ring().ring();
        if *present == ring {
            return Ok(Applied::RingInstalled { epoch: ring.epoch });
        }
        let epoch = ring.epoch;
        let refusal = if present.epoch != 0 {
            Some(RingRefusal::AlreadyInstalled { current: present.epoch })
        } else if epoch != 1 {
            Some(RingRefusal::NotFirst(epoch))
        } else if ring.cluster(&self.shared.cluster).is_none() {
            Some(RingRefusal::NotAMember(self.shared.cluster.clone()))
        } else {
            None
        };
        if let Some(refusal) = refusal {
            return Ok(Applied::RingRefused(refusal));
        }
        let Ok(table) = RingTable::new(ring) else {
            return Ok(Applied::RingRefused(RingRefusal::Invalid));
        };
        if self.holds_foreign_key(&table)? {
            return Ok(Applied::RingRefused(RingRefusal::HoldsForeignKeys));
        }
        // Its owner would not know of the write, and carry a repeat out.
        let foreign = |key: &[u8]| !table.owns(&self.shared.cluster, key);
        if self.machine.dedupe.keys().any(foreign) {
            return Ok(Applied::RingRefused(RingRefusal::RemembersForeignWrites));
        }
        self.ring = Some(Arc::new(table));
        Ok(Applied::RingInstalled { epoch })
    }

    /// Whether any record would belong to another cluster. Reads all keys, once in a cluster's life,
    /// and stops at the first foreign one.
    fn holds_foreign_key(&self, table: &RingTable) -> io::Result<bool> {
        if table.ring().clusters.len() == 1 {
            return Ok(false);
        }
        let foreign = |key: &[u8]| !table.owns(&self.shared.cluster, key);
        if self.rows.iter().any(|(key, row)| row.is_some() && foreign(key)) {
            return Ok(true);
        }
        let newer = self.shared.memtables.read();
        let hidden = |key: &[u8]| self.rows.contains_key(key);
        if newer.keys().any(|(key, there)| there && foreign(key) && !hidden(key)) {
            return Ok(true);
        }
        let engine = &self.shared.engine;
        let family = engine.family(&self.view.data)?;
        let records = IteratorMode::From(meta::RECORDS, Direction::Forward);
        for item in engine.db().iterator_cf(&family, records) {
            let (stored, _) = item.map_err(to_io)?;
            let key = meta::key_of(&stored)?;
            if foreign(key) && !hidden(key) && newer.unflushed(key).is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes the round visible. Readers see the rows and the ring that decided them together.
    pub(super) fn finish(self) -> io::Result<()> {
        self.shared.engine.check()?;
        let progress = self.progress;
        let ring = self.ring.as_ref().map(|table| meta::encode_ring(table.ring()));
        {
            let view = self.ring.map(|table| (self.shared.view_mut(), table));
            self.shared.memtables.apply(self.rows, |head| {
                head.progress = progress;
                if let Some(membership) = self.membership {
                    head.membership = membership;
                }
                head.ring = ring.or(head.ring.take());
            });
            if let Some((mut view, table)) = view {
                view.ring = table;
            }
        }
        self.shared.publish(&progress);
        Ok(())
    }
}
