//! The state machine: what committed entries do to the data.
//!
//! Apply is deterministic: it sees the entry and the state, and no clock, randomness or map order, so
//! every replica computes the same bytes and the same answers. Conditions and ownership are decided
//! here and nowhere earlier, because only here all replicas agree on what is true.
//!
//! Entries are applied in rounds. A round collects the changes of many entries in one RocksDB batch
//! together with the last applied id and the revision, writes it, and only then answers the clients.
//! Within a round, later entries see earlier ones through a small overlay. The batch is not fsynced:
//! the entries themselves are on a majority's disks, and the shared write-ahead log keeps the order.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use rocksdb::{IteratorMode, WriteBatch};

use crate::ring::{Ring, RingTable};
use crate::types::{
    Applied, Command, Condition, Entry, LogId, Revision, RingRefusal, SnapshotMeta,
    StoredMembership, TypeConfig, Write, Written,
};

use super::StoreOptions;
use super::engine::{CF_DATA_PREFIX, CF_META, Db, Engine, to_io};
use super::image::Images;
use super::meta::{self, Progress};
use super::reader::{StateReader, StateShared, View};
use super::snapshot::{SnapshotBuilder, SnapshotData, SnapshotStager, StagedSnapshot};

/// A round is written once it holds this many changes or bytes: large enough to share the cost of a
/// batch, small enough to answer the first client soon.
const ROUND_CHANGES_MAX: usize = 1024;
const ROUND_BYTES_MAX: usize = 4 << 20;

/// The state machine. Clones share the state, but openraft applies through one of them only.
#[derive(Clone)]
pub struct StateMachine {
    shared: Arc<StateShared>,
    applied: Arc<Mutex<AppliedState>>,
    images: Arc<Images>,
    stager: SnapshotStager,
}

/// What apply has come to. Locked by apply and by those who report it, for short.
#[derive(Debug, Clone, Default)]
struct AppliedState {
    progress: Progress,
    membership: StoredMembership,
}

type Reply = (openraft::storage::ApplyResponder<TypeConfig>, Applied);

/// The changes of some consecutive entries, on their way into one batch.
#[derive(Default)]
struct Round {
    batch: WriteBatch,
    /// Keys that this round wrote (their new revision) or deleted (`None`).
    overlay: HashMap<Bytes, Option<Revision>>,
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
        let stored = Stored::read(engine.db())?;
        let ring = stored.ring.unwrap_or_else(RingTable::none);
        let view = View { data, ring: Arc::new(ring) };
        let shared =
            StateShared::new(engine, options.cluster.clone(), view, &stored.applied.progress);
        let shared = Arc::new(shared);
        Ok(Self {
            stager: SnapshotStager::new(shared.clone()),
            images: Arc::new(Images::new(shared.clone(), snapshots)),
            shared,
            applied: Arc::new(Mutex::new(stored.applied)),
        })
    }

    pub(super) fn reader(&self) -> StateReader {
        StateReader { shared: self.shared.clone() }
    }

    pub(super) fn stager(&self) -> SnapshotStager {
        self.stager.clone()
    }

    pub(super) fn last_applied(&self) -> Option<LogId> {
        self.lock().progress.last_applied
    }

    fn lock(&self) -> MutexGuard<'_, AppliedState> {
        self.applied.lock().expect("no code panics while it holds this lock")
    }

    fn new_round(&self) -> Round {
        Round { progress: self.lock().progress, ..Round::default() }
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
        let view = self.shared.view();
        round.batch.put_cf(&self.shared.engine.family(&view.data)?, &key, record);
        round.overlay.insert(key, Some(revision));
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
        let view = self.shared.view();
        round.batch.delete_cf(&self.shared.engine.family(&view.data)?, &key);
        round.overlay.insert(key, None);
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
        if let Some(changed) = round.overlay.get(key) {
            return Ok(*changed);
        }
        let view = self.shared.view();
        let engine = &self.shared.engine;
        let family = engine.family(&view.data)?;
        let found = engine.db().get_pinned_cf(&family, key).map_err(to_io)?;
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
        let family = self.shared.engine.family(CF_META)?;
        round.batch.put_cf(&family, meta::KEY_RING, meta::encode_ring(table.ring()));
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
        if round.overlay.iter().any(|(key, there)| there.is_some() && foreign(key)) {
            return Ok(true);
        }
        let view = self.shared.view();
        let engine = &self.shared.engine;
        let family = engine.family(&view.data)?;
        for item in engine.db().iterator_cf(&family, IteratorMode::Start) {
            let (key, _) = item.map_err(to_io)?;
            if foreign(&key) && !round.overlay.contains_key(&key[..]) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes the round's batch, makes it visible, then answers its clients.
    fn finish(&self, mut round: Round) -> io::Result<()> {
        if round.changes == 0 {
            return Ok(());
        }
        let family = self.shared.engine.family(CF_META)?;
        round.batch.put_cf(&family, meta::KEY_APPLIED, meta::encode_progress(&round.progress));
        if let Some(membership) = &round.membership {
            let bytes = meta::encode_membership(membership);
            round.batch.put_cf(&family, meta::KEY_MEMBERSHIP, bytes);
        }
        match round.ring {
            None => self.shared.engine.write(round.batch)?,
            Some(ring) => {
                let mut view = self.shared.view_mut();
                self.shared.engine.write(round.batch)?;
                view.ring = ring;
            }
        }
        {
            let mut applied = self.lock();
            applied.progress = round.progress;
            if let Some(membership) = round.membership {
                applied.membership = membership;
            }
        }
        self.shared.publish(&round.progress);
        for (responder, answer) in round.replies {
            responder.send(answer);
        }
        Ok(())
    }

    /// Puts a staged snapshot in the place of the state: one fsynced batch names the staged family as
    /// the active one and sets everything that belongs to it.
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
        batch.put_cf(&family, meta::KEY_APPLIED, meta::encode_progress(&head.progress));
        let membership = meta::encode_membership(&head.membership);
        batch.put_cf(&family, meta::KEY_MEMBERSHIP, membership);
        match &head.ring {
            Some(bytes) => batch.put_cf(&family, meta::KEY_RING, bytes),
            None => batch.delete_cf(&family, meta::KEY_RING),
        }
        let old = {
            let mut view = self.shared.view_mut();
            engine.write(batch)?;
            engine.sync()?;
            let new = View { data: staged.family().to_owned(), ring };
            std::mem::replace(&mut *view, new).data
        };
        *self.lock() =
            AppliedState { progress: head.progress, membership: head.membership.clone() };
        self.shared.publish(&head.progress);
        staged.keep();
        engine.drop_family(&old)
    }
}

/// The state machine's part of the meta column family.
pub(super) struct Stored {
    applied: AppliedState,
    ring: Option<RingTable>,
}

impl Stored {
    fn read(db: &Db) -> io::Result<Self> {
        let family = super::engine::family(db, CF_META)?;
        let get = |key| db.get_cf(&family, key).map_err(to_io);
        let progress = get(meta::KEY_APPLIED)?;
        let membership = get(meta::KEY_MEMBERSHIP)?;
        let ring = get(meta::KEY_RING)?;
        let applied = AppliedState {
            progress: progress.map_or(Ok(Progress::default()), |b| meta::decode_progress(&b))?,
            membership: membership
                .map_or(Ok(StoredMembership::default()), |b| meta::decode_membership(&b))?,
        };
        Ok(Self { applied, ring: ring.map(|bytes| meta::decode_ring(&bytes)).transpose()? })
    }
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
        let applied = self.lock();
        Ok((applied.progress.last_applied, applied.membership.clone()))
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
                round = self.new_round();
            }
        }
        self.finish(round)
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
