//! The state machine: what committed entries do to the data.
//!
//! Apply is deterministic: it sees the entry and the state, and no clock, randomness or map order, so
//! every replica computes the same bytes and the same answers. Time comes from the entries.
//!
//! Entries are applied in rounds. First the entries of a round are taken from the stream; then, in one
//! go and under the machine's lock ([`super::machine`]), their changes are collected ([`super::round`])
//! and made visible in the memtables together with the last applied id and the revision; only then the
//! clients are answered. Nothing of it is written or fsynced here: the entries themselves are on a
//! majority's disks, and a flush ([`super::flush`]) brings the state there later.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use rocksdb::WriteBatch;

use crate::types::{Command, LogId, SnapshotMeta, StoredMembership, TypeConfig};

use super::StoreOptions;
use super::engine::{CF_DATA_PREFIX, CF_META, Db, Engine, to_io};
use super::flush::{self, Flushes};
use super::image::Images;
use super::machine::Machine;
use super::memtable::Memtables;
use super::meta;
use super::reader::{StateReader, StateShared, View};
use super::round::Round;
use super::snapshot::{Head, SnapshotBuilder, SnapshotData, SnapshotStager, StagedSnapshot};

/// A round ends once it holds this many changes or bytes: large enough to share the cost of making it
/// visible, small enough to answer the first client soon.
const ROUND_CHANGES_MAX: usize = 1024;
const ROUND_BYTES_MAX: usize = 4 << 20;

/// How long whoever asks for the current image waits for the first one if making it fails, and between two attempts.
/// For openraft, having none to send is the end of the node, and links that cannot be made for a moment are no
/// reason for that. But nothing is applied meanwhile, and while this node leads, no other takes its place.
const NO_IMAGE_WAIT_MAX: Duration = Duration::from_secs(3);
const NO_IMAGE_PAUSE: Duration = Duration::from_millis(100);

/// The state machine. Clones share the state, but openraft applies through one of them only.
#[derive(Clone)]
pub struct StateMachine {
    shared: Arc<StateShared>,
    pub(super) images: Arc<Images>,
    stager: SnapshotStager,
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
        let machine = Machine::load(engine.db(), &engine.family(&data)?, &head)?;
        let view = View { data, ring: Arc::new(machine.ring.clone()) };
        let machine = Mutex::new(machine);
        let storage = &options.storage;
        let memtables = Memtables::new(head, storage.memtable_bytes, storage.row_cache_bytes);
        let flushes = Flushes::new(options.dir.join(flush::FILE_NAME));
        let cluster = options.cluster.clone();
        let log_bytes_max = options.storage.log_bytes_max as u64;
        let shared =
            StateShared::new(engine, cluster, machine, memtables, flushes, log_bytes_max, view);
        let shared = Arc::new(shared);
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

    /// Flushes for the last time: no rows are kept for readers any more.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub(super) fn end(&self) -> io::Result<()> {
        self.shared.memtables.cache().end();
        self.flush()
    }

    /// Applies the entries of a round and answers their clients.
    fn apply_round(&self, entries: Vec<EntryResponder<TypeConfig>>) -> io::Result<()> {
        let mut replies = Vec::with_capacity(entries.len());
        // The round's rows are those of the entries: nothing is copied before it becomes visible.
        let (entries, responders): (Vec<_>, Vec<_>) = entries.into_iter().unzip();
        {
            let mut machine = self.shared.machine();
            let mut round = Round::new(&self.shared, &mut machine);
            for (entry, responder) in entries.iter().zip(responders) {
                // The machine may know of what the rows do not show: no flush may write that.
                let answer =
                    round.step(entry).map_err(|error| self.shared.engine.fail("apply", &error))?;
                replies.extend(responder.map(|responder| (responder, answer)));
            }
            round.finish()?;
        }
        for (responder, answer) in replies {
            responder.send(answer);
        }
        Ok(())
    }

    /// Sees to it that there is memory for another round: starts a flush, waits for one.
    async fn make_room(&self) -> io::Result<()> {
        let shared = &self.shared;
        if shared.freeze_if_full() {
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
        let mut batch = WriteBatch::default();
        let family = engine.family(CF_META)?;
        batch.put_cf(&family, meta::KEY_DATA, meta::encode_data_family(staged.family()));
        let staged_family = engine.family(staged.family())?;
        let loaded = Machine::load(engine.db(), &staged_family, head)?;
        let ring = Arc::new(loaded.ring.clone());
        // No flush may put rows of the old state into the new family. Raft votes and appends nothing meanwhile.
        let mut no_flush = self.shared.flushes.exclude();
        let mut machine = self.shared.machine();
        // From here on the disk may name the staged family as the active one, also if this fails: then
        // that is final, and the next start keeps the family that is named and drops the other.
        staged.keep();
        // Readers do not wait for the disk: until the view changes, they see the old state, whole.
        engine.write(batch)?;
        engine.sync()?;
        let (old, replaced) = {
            let mut view = self.shared.view_mut();
            let replaced = self.shared.memtables.replace(head.clone());
            *machine = loaded;
            no_flush.forget();
            let new = View { data: staged.family().to_owned(), ring };
            (std::mem::replace(&mut *view, new).data, replaced)
        };
        self.shared.publish(&head.progress, machine.dedupe.log_time_ms());
        drop((machine, no_flush));
        drop(replaced);
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

/// Takes the entries of the next round; none at the end of the stream.
async fn gather(
    entries: &mut (impl Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin),
) -> io::Result<Vec<EntryResponder<TypeConfig>>> {
    let (mut round, mut changes, mut bytes) = (Vec::new(), 0, 0);
    while changes < ROUND_CHANGES_MAX
        && bytes < ROUND_BYTES_MAX
        && let Some((entry, responder)) = entries.try_next().await?
    {
        changes += 1;
        match &entry.payload {
            EntryPayload::Normal(Command::Write(writes)) => {
                changes += writes.len();
                bytes += writes.bytes();
            }
            EntryPayload::Normal(Command::Import(import)) => {
                changes += import.page.records.len();
                bytes += import.page.bytes();
            }
            EntryPayload::Normal(Command::Clean(clean)) => changes += clean.keys.len(),
            _ => {}
        }
        round.push((entry, responder));
    }
    Ok(round)
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
        let mut rounds = 0;
        loop {
            let round = gather(&mut entries).await?;
            if round.is_empty() {
                return Ok(());
            }
            if rounds > 0 {
                // A node that catches up has thousands of rounds, none of which waits for anything: heartbeats,
                // votes and requests take their turns between them.
                tokio::task::yield_now().await;
            }
            rounds += 1;
            self.apply_round(round)?;
            self.make_room().await?;
        }
    }

    /// Puts an image off while the last one is on its way to a follower, and the log after it is not too long.
    /// The log is kept from a little before the newest image on: with a newer one, the follower would find
    /// when it has the older one that the log does not reach it, and begin again, for ever if sending
    /// takes longer than the time between two images.
    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Self::SnapshotBuilder> {
        let is_put_off = !force && self.shared.puts_off_images();
        (!is_put_off).then(|| SnapshotBuilder::new(&self.images, force))
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        SnapshotBuilder::new(&self.images, true)
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
            // An older image lacks what the snapshot brought, and keeps the files of the old state. A newer one
            // takes longer than Raft may be silent: until this returns, it neither votes nor appends. Whoever
            // asks for the current one before it is there waits for it.
            machine.images.outdate();
            machine.images.renew_aside();
            Ok(())
        })
        .await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotData>>>
    {
        let give_up = Instant::now() + NO_IMAGE_WAIT_MAX;
        loop {
            let images = self.images.clone();
            let renewed = move || {
                images.renew();
                images.check()?;
                Ok((images.current(), images.is_outdated()))
            };
            let (current, is_outdated) = blocking(renewed).await?;
            // An older one is better than none; and where none is needed, there is none to wait for.
            if current.is_some() || !is_outdated || Instant::now() >= give_up {
                return Ok(current);
            }
            tokio::time::sleep(NO_IMAGE_PAUSE).await;
        }
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
