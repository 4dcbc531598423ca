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

use crate::handoff::{Ownership, Position, RingState, Sending};
use crate::ring::{Ring, RingTable};
use crate::types::{
    Applied, ClusterId, Command, Condition, Entry, Revision, RingRefusal, StoredMembership, Written,
};
use crate::writes::{ActionRef, WriteRef};

use super::dedupe::{Fall, Verdict};
use super::engine::to_io;
use super::machine::Machine;
use super::memtable::Update;
use super::meta::{self, Progress};
use super::reader::{StateShared, View};

pub(super) struct Round<'a> {
    pub(super) shared: &'a StateShared,
    pub(super) machine: &'a mut Machine,
    /// As of the round's beginning. Nobody changes it while the machine is locked.
    pub(super) view: View,
    /// What this round wrote or deleted, by key, newest only.
    pub(super) updates: HashMap<&'a [u8], Update<'a>, ahash::RandomState>,
    /// What this round adds to the log of changes to moving keys.
    pub(super) changes: Vec<(Position, Bytes)>,
    pub(super) progress: Progress,
    membership: Option<StoredMembership>,
    /// Whether readers must see another ring state than before.
    pub(super) ring_changed: bool,
}

impl<'a> Round<'a> {
    pub(super) fn new(shared: &'a StateShared, machine: &'a mut Machine) -> Self {
        let progress = shared.memtables.read().head().progress;
        let view = shared.view().clone();
        Self {
            shared,
            machine,
            view,
            updates: HashMap::default(),
            changes: Vec::new(),
            progress,
            membership: None,
            ring_changed: false,
        }
    }

    /// Adds one entry's changes.
    pub(super) fn step(&mut self, entry: &'a Entry) -> io::Result<Applied> {
        let answer = match &entry.payload {
            EntryPayload::Blank => Applied::Nothing,
            EntryPayload::Membership(membership) => {
                let stored = StoredMembership::new(Some(entry.log_id), membership.clone());
                self.membership = Some(stored);
                Applied::Nothing
            }
            EntryPayload::Normal(Command::Write(writes)) => {
                let Machine { dedupe, ring, .. } = &mut *self.machine;
                self.updates.reserve(writes.len());
                dedupe.advance(writes.at_ms(), &falls(ring, &self.shared.cluster));
                let written = writes.iter().map(|write| self.write(&write));
                Applied::Written(written.collect::<io::Result<_>>()?)
            }
            EntryPayload::Normal(Command::InstallRing(ring)) => {
                self.install_ring((**ring).clone())?
            }
            EntryPayload::Normal(Command::Step(step)) => {
                Applied::Step(Box::new(self.take_step(step, entry.log_id.index)?))
            }
            EntryPayload::Normal(Command::Import(import)) => {
                Applied::Step(Box::new(self.import(import)?))
            }
            EntryPayload::Normal(Command::Clean(clean)) => {
                Applied::Step(Box::new(self.clean(clean)?))
            }
        };
        self.log_fallen();
        self.progress.last_applied = Some(entry.log_id);
        Ok(answer)
    }

    fn write(&mut self, write: &WriteRef<'a>) -> io::Result<Written> {
        let ring = &mut self.machine.ring;
        match ring.ownership(&self.shared.cluster, write.key) {
            Ownership::Here => {}
            Ownership::Frozen(_) => return Ok(Written::Frozen),
            Ownership::Elsewhere(_) => return Ok(Written::WrongCluster { epoch: ring.epoch() }),
        }
        if ring.is_logging() && ring.sending(&self.shared.cluster, write.key).is_some() {
            return self.write_moving(write);
        }
        Ok(self.write_once(write)?.0)
    }

    /// Carries a write out, unless it was before. Also says whether its answer was recorded now.
    pub(super) fn write_once(&mut self, write: &WriteRef<'a>) -> io::Result<(Written, bool)> {
        let Some(once) = &write.once else { return Ok((self.carry_out(write)?, false)) };
        let Machine { dedupe, ring, .. } = &mut *self.machine;
        let verdict = dedupe.check(once, write, &falls(ring, &self.shared.cluster));
        match verdict {
            Verdict::Answered(written) => Ok((written, false)),
            Verdict::New => {
                let written = self.carry_out(write)?;
                let Machine { dedupe, ring, .. } = &mut *self.machine;
                dedupe.record(once, write, &written, &falls(ring, &self.shared.cluster));
                Ok((written, true))
            }
        }
    }

    fn carry_out(&mut self, write: &WriteRef<'a>) -> io::Result<Written> {
        let WriteRef { key, action, condition, .. } = *write;
        if condition != Condition::Always {
            let current = self.current(key)?;
            let holds = match condition {
                Condition::Always => true,
                Condition::Absent => current.is_none(),
                Condition::Revision(wanted) => current == Some(wanted),
            };
            if !holds {
                return Ok(Written::ConditionFailed { current });
            }
        }
        match action {
            ActionRef::Put(value) => {
                self.progress.revision += 1;
                let revision = self.progress.revision;
                self.replaces_dead_row(key)?;
                self.updates.insert(key, Update::put(revision, value));
                Ok(Written::Put { revision })
            }
            ActionRef::Delete => {
                let deleted = self.current(key)?.is_some();
                if deleted {
                    self.progress.revision += 1;
                    self.updates.insert(key, Update::Delete);
                }
                Ok(Written::Deleted { revision: self.progress.revision, deleted })
            }
        }
    }

    /// The revision of a key's record as of this point of the round.
    fn current(&self, key: &[u8]) -> io::Result<Option<Revision>> {
        if let Some(Update::Put { revision, .. }) = self.updates.get(key) {
            return Ok(Some(*revision));
        }
        let row = self.live_row(key)?;
        row.map(|row| Ok(meta::decode_row(&row)?.0)).transpose()
    }

    /// A key's row as of this point of the round, if it counts.
    pub(super) fn live_row(&self, key: &[u8]) -> io::Result<Option<Bytes>> {
        let Some(row) = self.row(key)? else { return Ok(None) };
        let tag = meta::decode_row(&row)?.1;
        Ok(tag.is_none_or(|tag| self.machine.ring.is_live(tag, key)).then_some(row))
    }

    /// A key's row as of this point of the round, whether it counts or is only staged.
    pub(super) fn row(&self, key: &[u8]) -> io::Result<Option<Bytes>> {
        if let Some(update) = self.updates.get(key) {
            return Ok(update.to_bytes());
        }
        self.shared.row(&self.view.data, key)
    }

    /// Takes a first ring, if it takes no key from this cluster.
    fn install_ring(&mut self, ring: Ring) -> io::Result<Applied> {
        let present = self.machine.ring.ring.ring();
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
        let owned = |key: &[u8]| table.owns(&self.shared.cluster, key);
        if table.ring().clusters.len() > 1 && self.holds_key(&|key| !owned(key))? {
            return Ok(Applied::RingRefused(RingRefusal::HoldsForeignKeys));
        }
        // Its owner would not know of the write, and carry a repeat out.
        if self.machine.dedupe.keys().any(|key| !owned(key)) {
            return Ok(Applied::RingRefused(RingRefusal::RemembersForeignWrites));
        }
        self.machine.ring.install_first(table, &self.shared.cluster);
        self.ring_changed = true;
        Ok(Applied::RingInstalled { epoch })
    }

    /// Whether there is any row with such a key, counting or staged. Reads all keys until it finds one:
    /// for what happens once in a cluster's life.
    pub(super) fn holds_key(&self, wanted: &dyn Fn(&[u8]) -> bool) -> io::Result<bool> {
        if self.updates.iter().any(|(key, update)| !update.is_delete() && wanted(key)) {
            return Ok(true);
        }
        let newer = self.shared.memtables.read();
        let hidden = |key: &[u8]| self.updates.contains_key(key);
        if newer.keys().any(|(key, there)| there && wanted(key) && !hidden(key)) {
            return Ok(true);
        }
        let engine = &self.shared.engine;
        let family = engine.family(&self.view.data)?;
        let records = IteratorMode::From(meta::RECORDS, Direction::Forward);
        for item in engine.db().iterator_cf(&family, records) {
            let (stored, _) = item.map_err(to_io)?;
            let key = meta::key_of(&stored)?;
            if wanted(key) && !hidden(key) && !newer.is_unflushed(key) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes the round visible. Readers see the rows and the ring that decided them together.
    pub(super) fn finish(self) -> io::Result<()> {
        self.shared.engine.check()?;
        let progress = self.progress;
        {
            let ring = self.ring_changed.then(|| Arc::new(self.machine.ring.clone()));
            let view = ring.map(|ring| (self.shared.view_mut(), ring));
            self.shared.memtables.apply(self.updates, self.changes, |head| {
                head.progress = progress;
                if let Some(membership) = self.membership {
                    head.membership = membership;
                }
            });
            if let Some((mut view, ring)) = view {
                view.ring = ring;
            }
        }
        self.shared.publish(&progress, self.machine.dedupe.log_time_ms());
        Ok(())
    }
}

/// What becomes of answers that fall, by this ring state, in this cluster.
pub(super) fn falls<'a>(ring: &'a RingState, own: &'a ClusterId) -> impl Fn(&[u8]) -> Fall + 'a {
    let logging = ring.is_logging();
    move |key| match if logging { ring.leaving(own, key) } else { None } {
        Some(Sending::Sending) => Fall::Told,
        Some(Sending::Frozen) => Fall::Pinned,
        Some(Sending::Idle | Sending::Moved) | None => Fall::Gone,
    }
}
