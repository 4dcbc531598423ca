//! The state machine: what committed entries do to the data.
//!
//! Apply is deterministic: it sees the entry and the state, and no clock, randomness or map order, so
//! every replica computes the same bytes and the same answers. Conditions and ownership are decided
//! here and nowhere earlier, because only here all replicas agree on what is true.
//!
//! Entries are applied in rounds. A round collects the changes of many entries, makes them visible in
//! the memtables together with the last applied id and the revision, and only then answers the
//! clients. Within a round, later entries see earlier ones through the round's own rows. Nothing of it
//! is written or fsynced here: the entries themselves are on a majority's disks, and a flush
//! ([`super::flush`]) brings the state there later.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use rocksdb::{Direction, IteratorMode, WriteBatch};

use crate::handoff::Refused;
use crate::ring::{Ring, RingTable};
use crate::types::{
    Applied, Command, Condition, Entry, LogId, Revision, RingRefusal, SnapshotMeta,
    StoredMembership, TypeConfig, Write, Written,
};

use super::StoreOptions;
use super::engine::{CF_DATA_PREFIX, CF_META, Db, Engine, to_io};
use super::flush::{self, Flushes};
use super::image::Images;
use super::memtable::{Memtables, Row};
use super::meta::{self, Progress};
use super::reader::{StateReader, StateShared, View};
use super::snapshot::{Head, SnapshotBuilder, SnapshotData, SnapshotStager, StagedSnapshot};

/// A round ends once it holds this many changes or bytes: large enough to share the cost of making it
/// visible, small enough to answer the first client soon.
const ROUND_CHANGES_MAX: usize = 1024;
const ROUND_BYTES_MAX: usize = 4 << 20;

/// The state machine. Clones share the state, but openraft applies through one of them only.
#[derive(Clone)]
pub struct StateMachine {
    shared: Arc<StateShared>,
    images: Arc<Images>,
    stager: SnapshotStager,
}

type Reply = (openraft::storage::ApplyResponder<TypeConfig>, Applied);

/// The changes of some consecutive entries, on their way into the memtables.
#[derive(Default)]
struct Round {
    /// What this round wrote or deleted, by key.
    rows: HashMap<Bytes, Row>,
    bytes: usize,
    progress: Progress,
    membership: Option<StoredMembership>,
    ring: Option<Arc<RingTable>>,
    replies: Vec<Reply>,
    /// Writes, and entries of other kinds.
    changes: usize,
}

impl StateMachine {
    pub(super) fn open(
        engine: Arc<Engine>,
        snapshots: PathBuf,
        options: &StoreOptions,
    ) -> io::Result<Self> {
        let data = active_data_family(&engine)?;
        drop_stale_families(&engine, &data)?;
        let head = read_head(&engine, &data)?;
        let ring = head.ring.as_ref().map(|bytes| meta::decode_ring(bytes)).transpose()?;
        let view = View { data, ring: Arc::new(ring.unwrap_or_else(RingTable::none)) };
        let memtables = Memtables::new(head, options.storage.memtable_bytes);
        let flushes = Flushes::new(options.dir.join(flush::FILE_NAME));
        let cluster = options.cluster.clone();
        let shared = Arc::new(StateShared::new(engine, cluster, memtables, flushes, view));
        Ok(Self {
            stager: SnapshotStager::new(shared.clone()),
            images: Arc::new(Images::new(shared.clone(), snapshots)),
            shared,
        })
    }

    pub(super) fn reader(&self) -> StateReader {
        StateReader { shared: self.shared.clone() }
    }

    pub(super) fn stager(&self) -> SnapshotStager {
        self.stager.clone()
    }

    pub(super) fn last_applied(&self) -> Option<LogId> {
        self.shared.memtables.read().head().progress.last_applied
    }

    /// Writes what was applied to disk, so that a start after this has nothing to apply again. Blocks.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.shared.flush()
    }

    fn new_round(&self) -> Round {
        let progress = self.shared.memtables.read().head().progress;
        Round { progress, ..Round::default() }
    }

    /// Adds one entry's changes to the round.
    fn step(&self, round: &mut Round, entry: Entry) -> io::Result<Applied> {
        let answer = match entry.payload {
            EntryPayload::Blank => Applied::Nothing,
            EntryPayload::Membership(membership) => {
                let stored = StoredMembership::new(Some(entry.log_id), membership);
                round.membership = Some(stored);
                Applied::Nothing
            }
            EntryPayload::Normal(Command::Write(writes)) => {
                round.changes += writes.len();
                let written = writes.into_iter().map(|write| self.write(round, write));
                Applied::Written(written.collect::<io::Result<_>>()?)
            }
            EntryPayload::Normal(Command::InstallRing(ring)) => self.install_ring(round, *ring)?,
            EntryPayload::Normal(Command::Step(_) | Command::Import(_) | Command::Clean(_)) => {
                let cluster = self.shared.cluster.clone();
                Applied::Step(Box::new(Err(Refused::NoChange { epoch: 0, cluster })))
            }
        };
        round.progress.last_applied = Some(entry.log_id);
        round.changes += 1;
        Ok(answer)
    }

    fn write(&self, round: &mut Round, write: Write) -> io::Result<Written> {
        match write {
            Write::Put { key, value, condition } => self.put(round, key, &value, condition),
            Write::Delete { key, condition } => self.delete(round, key, condition),
        }
    }

    fn put(
        &self,
        round: &mut Round,
        key: Bytes,
        value: &[u8],
        condition: Condition,
    ) -> io::Result<Written> {
        if let Some(refusal) = self.refusal(round, &key, condition)? {
            return Ok(refusal);
        }
        round.progress.revision += 1;
        let revision = round.progress.revision;
        let record = meta::encode_record(revision, value);
        round.bytes += key.len() + record.len();
        round.rows.insert(key, Some(record.into()));
        Ok(Written::Put { revision })
    }

    fn delete(&self, round: &mut Round, key: Bytes, condition: Condition) -> io::Result<Written> {
        if let Some(refusal) = self.refusal(round, &key, condition)? {
            return Ok(refusal);
        }
        if self.current(round, &key)?.is_none() {
            return Ok(Written::Deleted { revision: round.progress.revision, deleted: false });
        }
        round.progress.revision += 1;
        round.bytes += key.len();
        round.rows.insert(key, None);
        Ok(Written::Deleted { revision: round.progress.revision, deleted: true })
    }

    /// Why a write does not take place: another cluster owns the key, or its condition does not hold.
    fn refusal(
        &self,
        round: &Round,
        key: &Bytes,
        condition: Condition,
    ) -> io::Result<Option<Written>> {
        let epoch_if_foreign = {
            let view = self.shared.view();
            let ring = round.ring.as_ref().unwrap_or(&view.ring);
            (!ring.owns(&self.shared.cluster, key)).then(|| ring.ring().epoch)
        };
        if let Some(epoch) = epoch_if_foreign {
            return Ok(Some(Written::WrongCluster { epoch }));
        }
        if condition == Condition::Always {
            return Ok(None);
        }
        let current = self.current(round, key)?;
        let holds = match condition {
            Condition::Always => true,
            Condition::Absent => current.is_none(),
            Condition::Revision(wanted) => current == Some(wanted),
        };
        Ok((!holds).then_some(Written::ConditionFailed { current }))
    }

    /// The revision of a key's record as of this point of the round.
    fn current(&self, round: &Round, key: &Bytes) -> io::Result<Option<Revision>> {
        let revision = |row: &Row| row.as_deref().map(meta::decode_record_revision).transpose();
        if let Some(row) = round.rows.get(key) {
            return revision(row);
        }
        if let Some(row) = self.shared.memtables.read().get(key) {
            return revision(row);
        }
        let view = self.shared.view();
        let engine = &self.shared.engine;
        let family = engine.family(&view.data)?;
        let mut stored = Vec::new();
        meta::record_key(key, &mut stored);
        let found = engine.db().get_pinned_cf(&family, &stored).map_err(to_io)?;
        found.map(|bytes| meta::decode_record_revision(&bytes)).transpose()
    }

    /// Takes a first ring, if it takes no key from this cluster.
    fn install_ring(&self, round: &mut Round, ring: Ring) -> io::Result<Applied> {
        let present = round.ring.clone().unwrap_or_else(|| self.shared.view().ring.clone());
        if *present.ring() == ring {
            return Ok(Applied::RingInstalled { epoch: ring.epoch });
        }
        let epoch = ring.epoch;
        let refusal = if present.ring().epoch != 0 {
            Some(RingRefusal::AlreadyInstalled { current: present.ring().epoch })
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
        if self.holds_foreign_key(round, &table)? {
            return Ok(Applied::RingRefused(RingRefusal::HoldsForeignKeys));
        }
        round.ring = Some(Arc::new(table));
        Ok(Applied::RingInstalled { epoch })
    }

    /// Whether any record would belong to another cluster. Reads all keys, once in a cluster's life,
    /// and stops at the first foreign one.
    fn holds_foreign_key(&self, round: &Round, table: &RingTable) -> io::Result<bool> {
        if table.ring().clusters.len() == 1 {
            return Ok(false);
        }
        let foreign = |key: &[u8]| !table.owns(&self.shared.cluster, key);
        if round.rows.iter().any(|(key, row)| row.is_some() && foreign(key)) {
            return Ok(true);
        }
        let newer = self.shared.memtables.read();
        let hidden = |key: &[u8]| round.rows.contains_key(key);
        if newer.keys().any(|(key, there)| there && foreign(key) && !hidden(key)) {
            return Ok(true);
        }
        let view = self.shared.view();
        let engine = &self.shared.engine;
        let family = engine.family(&view.data)?;
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

    /// Makes the round visible, then answers its clients.
    fn finish(&self, round: Round) -> io::Result<()> {
        if round.changes == 0 {
            return Ok(());
        }
        self.shared.engine.check()?;
        let progress = round.progress;
        let ring = round.ring.as_ref().map(|table| meta::encode_ring(table.ring()));
        {
            // Readers see the rows and the ring that decided them together.
            let view = round.ring.map(|table| (self.shared.view_mut(), table));
            self.shared.memtables.apply(round.rows, |head| {
                head.progress = progress;
                if let Some(membership) = round.membership {
                    head.membership = membership;
                }
                head.ring = ring.or(head.ring.take());
            });
            if let Some((mut view, table)) = view {
                view.ring = table;
            }
        }
        self.shared.publish(&progress);
        for (responder, answer) in round.replies {
            responder.send(answer);
        }
        Ok(())
    }

    /// Sees to it that there is memory for another round: starts a flush, waits for one.
    async fn make_room(&self) -> io::Result<()> {
        let shared = &self.shared;
        if shared.memtables.freeze_if_full() {
            let flushing = shared.clone();
            // Its error is the engine's failure, which everybody sees.
            drop(tokio::task::spawn_blocking(move || flushing.flush_frozen()));
        }
        shared.memtables.await_room(|| shared.engine.check()).await
    }

    /// Puts a staged snapshot in the place of the state: one fsynced write names the staged family, with
    /// the head in it, as the active one.
    fn switch_to(&self, meta: &SnapshotMeta, staged: StagedSnapshot) -> io::Result<()> {
        let engine = &self.shared.engine;
        let head = staged.head();
        if head.applied() != meta.last_log_id {
            let text = format!(
                "the snapshot covers up to {:?}, but was announced up to {:?}",
                head.applied(),
                meta.last_log_id
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let ring = match &head.ring {
            Some(bytes) => Arc::new(meta::decode_ring(bytes)?),
            None => Arc::new(RingTable::none()),
        };
        let mut batch = WriteBatch::default();
        let family = engine.family(CF_META)?;
        batch.put_cf(&family, meta::KEY_DATA, meta::encode_data_family(staged.family()));
        // No flush may put rows of the old state into the new family.
        let _no_flush = self.shared.flushes.exclude();
        let old = {
            let mut view = self.shared.view_mut();
            engine.write(batch)?;
            engine.sync()?;
            self.shared.memtables.replace(head.clone());
            let new = View { data: staged.family().to_owned(), ring };
            std::mem::replace(&mut *view, new).data
        };
        self.shared.publish(&head.progress);
        staged.keep();
        engine.drop_family(&old)
    }
}

fn read_head(engine: &Engine, data: &str) -> io::Result<Head> {
    let family = engine.family(data)?;
    let head = engine.db().get_cf(&family, meta::KEY_HEAD).map_err(to_io)?;
    head.map_or(Ok(Head::default()), |bytes| meta::decode_head(&bytes))
}

/// The name of the active data family; the first one is made for a new store.
fn active_data_family(engine: &Engine) -> io::Result<String> {
    let found = engine.db().get_cf(&engine.family(CF_META)?, meta::KEY_DATA).map_err(to_io)?;
    if let Some(bytes) = found {
        let name = meta::decode_data_family(&bytes)?;
        engine.family(&name)?;
        return Ok(name);
    }
    let name = format!("{CF_DATA_PREFIX}0");
    if engine.family(&name).is_err() {
        engine.create_family(&name)?;
    }
    let mut batch = WriteBatch::default();
    batch.put_cf(&engine.family(CF_META)?, meta::KEY_DATA, meta::encode_data_family(&name));
    engine.write(batch)?;
    engine.sync()?;
    Ok(name)
}

/// Drops what an interrupted snapshot transfer or switch left behind.
fn drop_stale_families(engine: &Engine, active: &str) -> io::Result<()> {
    let names = Db::list_cf(&rocksdb::Options::default(), engine.path()).map_err(to_io)?;
    for name in names {
        if name.starts_with(CF_DATA_PREFIX) && name != active {
            engine.drop_family(&name)?;
        }
    }
    Ok(())
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let layers = self.shared.memtables.read();
        let head = layers.head();
        Ok((head.applied(), head.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let mut round = self.new_round();
        while let Some((entry, responder)) = entries.try_next().await? {
            let answer = self.step(&mut round, entry)?;
            round.replies.extend(responder.map(|responder| (responder, answer)));
            if round.changes >= ROUND_CHANGES_MAX || round.bytes >= ROUND_BYTES_MAX {
                self.finish(round)?;
                self.make_room().await?;
                round = self.new_round();
            }
        }
        self.finish(round)?;
        self.make_room().await
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        SnapshotBuilder::new(self.images.clone())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> io::Result<()> {
        let (machine, meta) = (self.clone(), meta.clone());
        blocking(move || {
            let staged = snapshot.into_staged(&machine.stager)?;
            machine.switch_to(&meta, staged)?;
            tracing::info!(up_to = ?meta.last_log_id.map(|id| id.index), "installed a snapshot");
            // An older image would now lack what the snapshot brought; openraft wants the current one.
            // Without it, it makes one when it needs one: no reason to fail an install that succeeded.
            if let Err(error) = machine.images.build() {
                tracing::warn!(%error, "cannot make an image of the installed snapshot");
            }
            Ok(())
        })
        .await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotData>>>
    {
        Ok(self.images.current())
    }
}

/// Runs blocking work off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(format!("a storage task died: {error}"))))
}
