//! The store against openraft's own suite, against crashes of its files, and against itself.

mod handoff;
mod images;
mod lease;
mod log_end;
mod memory;
mod once;
mod outrun;
mod row_cache;
mod switch;
mod torn_end;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::stream;
use openraft::EntryPayload;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage, RaftSnapshotBuilder};
use openraft::storage::{RaftLogStorageExt, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::vote::leader_id_adv::LeaderId;

use super::snapshot::SnapshotData;
use super::*;
use crate::config::Config;
use crate::ring::{Ring, RingCluster, RingNode};
use crate::types::*;
use crate::writes::{WriteRef, Writes};

pub(super) fn options(dir: &Path) -> StoreOptions {
    let config = Config::default();
    StoreOptions {
        dir: dir.join("node"),
        node_id: 1,
        cluster: "c1".parse().unwrap(),
        storage: config.storage,
        raft: config.raft,
        open_files_max: 64,
    }
}

fn open(dir: &Path) -> Store {
    Store::open(&options(dir)).unwrap()
}

pub(super) fn log_id(term: u64, index: u64) -> LogId {
    LogId { leader_id: LeaderId { term, node_id: 1 }, index }
}

fn put_entry(index: u64, key: &str, value: &str) -> Entry {
    let (key, value) = (Bytes::from(key.to_owned()), Bytes::from(value.to_owned()));
    write_entry(index, Write::put(key, value, Condition::Always))
}

fn write_entry(index: u64, write: Write) -> Entry {
    command_entry(index, Command::Write(Writes::new(index, &[write])))
}

fn command_entry(index: u64, command: Command) -> Entry {
    Entry { log_id: log_id(1, index), payload: EntryPayload::Normal(command) }
}

async fn apply(machine: &mut StateMachine, entries: Vec<Entry>) {
    machine.apply(stream::iter(entries.into_iter().map(|entry| Ok((entry, None))))).await.unwrap();
}

/// How many turns others get while `work` is done, on a runtime with one thread.
async fn turns_of_others(work: impl Future<Output = ()>) -> u64 {
    let turns = Arc::new(AtomicU64::new(0));
    let others = tokio::spawn({
        let turns = turns.clone();
        async move {
            loop {
                turns.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        }
    });
    work.await;
    others.abort();
    turns.load(Ordering::Relaxed)
}

/// A node that catches up on a long log, or looks up all the keys of a large batch, still sends its heartbeats and
/// answers its peers meanwhile.
#[tokio::test]
async fn long_work_lets_others_have_a_turn() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut machine = store.state_machine();
    let keys: Vec<String> = (0..100).map(|n| format!("key-{n}")).collect();
    let entries = (1..=20_000).map(|n| put_entry(n, &keys[n as usize % keys.len()], "v"));
    let entries = entries.collect();
    let turns = turns_of_others(apply(&mut machine, entries)).await;
    assert!(turns >= 30, "{turns} turns while 20,000 entries were applied");

    let reader = store.reader();
    let many: Vec<&[u8]> = (0..10_000).map(|n| keys[n % keys.len()].as_bytes()).collect();
    let turns = turns_of_others(async {
        assert_eq!(reader.get_many(&many, usize::MAX).await.unwrap().len(), many.len());
    });
    let turns = turns.await;
    assert!(turns >= 100, "{turns} turns while 10,000 keys were looked up");
    // A bound on the values holds for all of them together, and cuts off in the middle of a portion.
    assert_eq!(reader.get_many(&many, 150).await.unwrap().len(), 150);
    assert_eq!(reader.get_many(&many, 0).await.unwrap().len(), 1, "the first always has room");
}

fn value(store: &Store, key: &str) -> Option<String> {
    match store.reader().get(key.as_bytes()).unwrap() {
        Lookup::Found(record) => Some(String::from_utf8(record.value.to_vec()).unwrap()),
        Lookup::Absent => None,
        Lookup::NotHere(_) => panic!("there is no ring"),
    }
}

/// Makes the stores that openraft's suite asks for, each in a directory of its own.
struct Builder;

struct SuiteGuard {
    _store: Store,
    _dir: tempfile::TempDir,
}

impl StoreBuilder<TypeConfig, LogStore, StateMachine, SuiteGuard> for Builder {
    async fn build(
        &self,
    ) -> Result<(SuiteGuard, LogStore, StateMachine), openraft::StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let (log, machine) = (store.log(), store.state_machine());
        Ok((SuiteGuard { _store: store, _dir: dir }, log, machine))
    }
}

/// openraft's own suite finds nothing wrong with log, vote, state machine and snapshots.
#[tokio::test(flavor = "multi_thread")]
async fn openrafts_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}

/// Vote, log, purge point, membership and data are there again after a reopen.
#[tokio::test(flavor = "multi_thread")]
async fn everything_survives_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (mut log, mut machine) = (store.log(), store.state_machine());
    log.save_vote(&Vote::new_committed(3, 1)).await.unwrap();
    log.blocking_append((0..=9).map(|i| put_entry(i, &format!("k{i}"), "v"))).await.unwrap();
    apply(&mut machine, (1..=6).map(|i| put_entry(i, &format!("k{i}"), "v")).collect()).await;
    log.purge(log_id(1, 4)).await.unwrap();
    log.truncate_after(Some(log_id(1, 8))).await.unwrap();
    drop((log, machine));
    store.close().unwrap();

    let store = open(dir.path());
    let (mut log, mut machine) = (store.log(), store.state_machine());
    assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new_committed(3, 1)));
    let state = log.get_log_state().await.unwrap();
    assert_eq!(state.last_purged_log_id, Some(log_id(1, 4)));
    assert_eq!(state.last_log_id, Some(log_id(1, 8)));
    let entries = log.try_get_log_entries(0..100).await.unwrap();
    assert_eq!(entries.iter().map(|e| e.log_id.index).collect::<Vec<_>>(), vec![5, 6, 7, 8]);
    assert_eq!(machine.applied_state().await.unwrap().0, Some(log_id(1, 6)));
    assert_eq!(store.reader().revision(), 6);
    assert_eq!(value(&store, "k6").as_deref(), Some("v"));
    assert_eq!(value(&store, "k7"), None);
}

/// Conditions and deletes see what earlier entries of the same round did.
#[tokio::test(flavor = "multi_thread")]
async fn entries_of_one_round_see_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut machine = store.state_machine();
    let key = Bytes::from_static(b"k");
    let put = |value: &'static str, condition| Write::put(key.clone(), value.into(), condition);
    let delete = |condition| Write::delete(key.clone(), condition);
    let commands = vec![
        put("first", Condition::Absent),        // revision 1
        put("refused", Condition::Absent),      // there is one
        put("second", Condition::Revision(1)),  // revision 2
        put("refused", Condition::Revision(1)), // too late
        delete(Condition::Revision(1)),         // refused
        delete(Condition::Revision(2)),         // revision 3
        delete(Condition::Always),              // nothing to delete
        put("third", Condition::Absent),        // revision 4
    ];
    let entries = (1..).zip(commands).map(|(i, command)| write_entry(i, command)).collect();
    apply(&mut machine, entries).await;
    assert_eq!(store.reader().revision(), 4);
    assert_eq!(value(&store, "k").as_deref(), Some("third"));
}

fn two_clusters() -> Ring {
    let cluster = |id: &str| RingCluster {
        id: id.parse().unwrap(),
        weight: 1.0,
        nodes: vec![RingNode { id: 1, http: "h:1".into(), rpc: "r:1".into() }],
    };
    Ring {
        epoch: 1,
        sequencer: Some("c1".parse().unwrap()),
        clusters: vec![cluster("c1"), cluster("c2")],
        ..Ring::none()
    }
}

/// A first ring is refused while it would take a key away, then decides writes and reads.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_ring_takes_no_key_away_and_decides_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut machine = store.state_machine();
    let table = crate::ring::RingTable::new(two_clusters()).unwrap();
    let owned_by = |id: &str| {
        let id: ClusterId = id.parse().unwrap();
        (0..).map(|i| format!("k{i}")).find(|k| table.owns(&id, k.as_bytes())).unwrap()
    };
    let (mine, foreign) = (owned_by("c1"), owned_by("c2"));
    let install = || Command::InstallRing(Box::new(two_clusters()));

    apply(&mut machine, vec![put_entry(1, &mine, "v"), put_entry(2, &foreign, "v")]).await;
    apply(&mut machine, vec![command_entry(3, install())]).await;
    assert_eq!(store.reader().ring().ring().epoch, 0, "a foreign key is there");

    let delete = Write::delete(foreign.clone().into(), Condition::Always);
    apply(&mut machine, vec![write_entry(4, delete), command_entry(5, install())]).await;
    assert_eq!(store.reader().ring().ring().epoch, 1);
    apply(&mut machine, vec![put_entry(6, &foreign, "v"), put_entry(7, &mine, "w")]).await;
    let wrong = store.reader().get(foreign.as_bytes()).unwrap();
    assert!(matches!(wrong, Lookup::NotHere(_)));
    assert_eq!(value(&store, &mine).as_deref(), Some("w"));
    assert_eq!(store.reader().key_count().unwrap(), 1);
    drop(machine);
    store.close().unwrap();
    assert_eq!(open(dir.path()).reader().ring().ring(), &two_clusters());
}

/// Streams an image chunk by chunk, with each chunk sent twice and the transfer begun again half way.
fn transfer(from: &SnapshotData, stager: &snapshot::SnapshotStager) -> SnapshotData {
    let SnapshotData::Image(image) = from else { panic!("a sender has an image") };
    let mut position = stager.begin(image.id()).unwrap();
    while !position.complete {
        let chunk = image.read_chunk(&position.cursor, 4 << 10).unwrap();
        let seq = position.next_seq;
        let next = stager.write(image.id(), seq, chunk.bytes.clone()).unwrap();
        assert_eq!(stager.write(image.id(), seq, chunk.bytes).unwrap(), next, "a repeat");
        assert_eq!(stager.begin(image.id()).unwrap(), next, "a resumed transfer");
        assert!(stager.write(image.id(), next.next_seq + 1, Bytes::new()).is_err(), "a gap");
        position = next;
    }
    stager.finish(image.id()).unwrap()
}

/// A snapshot moves the state to another store, which keeps it over a reopen; keys that only the
/// receiver had are gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_moves_the_state() {
    let (from_dir, to_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = open(from_dir.path());
    let mut machine = from.state_machine();
    apply(&mut machine, (1..=3000).map(|i| put_entry(i, &format!("k{i}"), "v")).collect()).await;
    let snapshot = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    assert_eq!(snapshot.meta.last_log_id, Some(log_id(1, 3000)));

    let to = open(to_dir.path());
    let mut receiver = to.state_machine();
    apply(&mut receiver, vec![put_entry(1, "only-here", "v")]).await;
    let staged = transfer(&snapshot.snapshot, &to.stager());
    assert_eq!(value(&to, "only-here").as_deref(), Some("v"), "staging must not be served");
    receiver.install_snapshot(&snapshot.meta, staged).await.unwrap();
    assert_eq!(value(&to, "only-here"), None);
    drop(receiver);
    to.close().unwrap();
    let to = open(to_dir.path());
    assert_eq!(value(&to, "only-here"), None);
    assert_eq!(value(&to, "k3000").as_deref(), Some("v"));
    assert_eq!(to.reader().key_count().unwrap(), 3000);
    assert_eq!(to.reader().revision(), 3000);
}

/// An image is a view of one moment, also while entries are applied all the time: as many keys as its
/// revision says.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_one_moment() {
    let (dir, to_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = open(dir.path());
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (mut machine, stop) = (store.state_machine(), stop.clone());
        async move {
            for index in 1..200_000 {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                apply(&mut machine, vec![put_entry(index, &format!("k{index}"), "v")]).await;
            }
        }
    });
    let to = open(to_dir.path());
    let mut receiver = to.state_machine();
    let mut revisions = Vec::new();
    // The writer gets on between the first image and the last.
    while revisions.len() < 10 || revisions.first() == revisions.last() {
        assert!(revisions.len() < 1000, "images keep the writer from writing");
        let mut builder = store.state_machine().get_snapshot_builder().await;
        let snapshot = builder.build_snapshot().await.unwrap();
        let staged = transfer(&snapshot.snapshot, &to.stager());
        receiver.install_snapshot(&snapshot.meta, staged).await.unwrap();
        let (last, _) = receiver.applied_state().await.unwrap();
        let revision = to.reader().revision();
        assert_eq!(last.map_or(0, |id| id.index), revision);
        let count = count_keys(&to);
        assert_eq!(count, revision, "keys in an image of revision {revision}");
        revisions.push(revision);
    }
    stop.store(true, Ordering::Relaxed);
    writer.await.unwrap();
}

fn count_keys(store: &Store) -> u64 {
    let engine = &store.engine;
    let data = store.reader().shared.view().data.clone();
    let family = engine.family(&data).unwrap();
    let records = rocksdb::IteratorMode::From(meta::RECORDS, rocksdb::Direction::Forward);
    engine.db().iterator_cf(&family, records).count() as u64
}

/// After the first failure nothing is acknowledged any more, not even what would succeed.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_failure_is_final() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut log = store.log();
    log.blocking_append([put_entry(0, "k", "v")]).await.unwrap();
    let mut failure = store.reader().failure();
    store.engine.fail("fsync", &"injected");
    assert!(log.blocking_append([put_entry(1, "k", "v")]).await.is_err());
    assert!(log.save_vote(&Vote::new(9, 1)).await.is_err());
    assert!(store.reader().get(b"k").is_err());
    failure.changed().await.unwrap();
    assert!(failure.borrow().as_ref().unwrap().contains("injected"));
}

/// A directory is refused, by name, to a second opener, another node and another cluster.
#[test]
fn a_directory_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mine = options(dir.path());
    assert!(matches!(Store::open(&mine), Err(OpenError::InUse { .. })));
    store.close().unwrap();
    let other_id = StoreOptions { node_id: 2, ..mine.clone() };
    assert!(matches!(Store::open(&other_id), Err(OpenError::OtherNode { found_id: 1, .. })));
    let other_cluster = StoreOptions { cluster: "c2".parse().unwrap(), ..mine.clone() };
    assert!(matches!(Store::open(&other_cluster), Err(OpenError::OtherNode { .. })));
    Store::open(&mine).unwrap().close().unwrap();
}

/// A directory that is not a node's is refused and not touched.
#[test]
fn a_foreign_directory_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mine = options(dir.path());
    std::fs::create_dir(&mine.dir).unwrap();
    std::fs::write(mine.dir.join("thesis.tex"), "precious").unwrap();
    assert!(matches!(Store::open(&mine), Err(OpenError::NotOurs { .. })));
    assert_eq!(std::fs::read_dir(&mine.dir).unwrap().count(), 1);
    let in_a_file = StoreOptions { dir: mine.dir.join("thesis.tex"), ..mine };
    assert!(matches!(Store::open(&in_a_file), Err(OpenError::Io { .. })));
}

async fn filled(dir: &Path) -> Vec<std::path::PathBuf> {
    let store = open(dir);
    let (mut log, mut machine) = (store.log(), store.state_machine());
    log.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    let entries = || (0..=500).map(|i| put_entry(i, &format!("k{i}"), "some value"));
    log.blocking_append(entries()).await.unwrap();
    apply(&mut machine, entries().collect()).await;
    drop((log, machine));
    store.close().unwrap();
    let db = dir.join("node").join("db");
    let files = std::fs::read_dir(db).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.metadata().unwrap().len() > 0).collect()
}

/// Whatever byte of whatever file is flipped: the store either refuses to open or has everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_is_refused_or_harmless() {
    for round in 0..2 {
        let dir = tempfile::tempdir().unwrap();
        let mut files = filled(dir.path()).await;
        if round == 1 {
            // A second start turns the write-ahead log into data files: those are flipped, too.
            open(dir.path()).close().unwrap();
            let db = dir.path().join("node").join("db");
            files = std::fs::read_dir(db).unwrap().map(|e| e.unwrap().path()).collect();
            assert!(files.iter().any(|f| f.extension().is_some_and(|e| e == "sst")));
        }
        let mut refused = 0;
        for file in files {
            let good = std::fs::read(&file).unwrap();
            let step = (good.len() / 7).max(1);
            for at in (0..good.len()).step_by(step).chain(good.len().checked_sub(1)) {
                let copy = tempfile::tempdir().unwrap();
                copy_dir(dir.path(), copy.path());
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                let name = file.strip_prefix(dir.path()).unwrap();
                std::fs::write(copy.path().join(name), bad).unwrap();
                refused += u32::from(check_all_or_refused(copy.path(), &format!("{name:?} {at}")));
            }
        }
        assert!(refused > 10, "only {refused} flips were noticed");
    }
}

/// A file that lost its end, or was lost whole, is refused unless nothing is missing without it.
#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_or_missing_file_is_refused_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let files = filled(dir.path()).await;
    for file in files {
        let name = file.strip_prefix(dir.path()).unwrap();
        let length = file.metadata().unwrap().len();
        for keep in [None, Some(0), Some(length / 2), Some(length - 1)] {
            let copy = tempfile::tempdir().unwrap();
            copy_dir(dir.path(), copy.path());
            let path = copy.path().join(name);
            match keep {
                None => std::fs::remove_file(path).unwrap(),
                Some(keep) => {
                    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
                    file.set_len(keep).unwrap();
                }
            }
            check_all_or_refused(copy.path(), &format!("{name:?} {keep:?}"));
        }
    }
}

/// Opens a store of [`filled`]; true if it is refused, and panics if it opens with less.
fn check_all_or_refused(dir: &Path, what: &str) -> bool {
    let store = match Store::open(&options(dir)) {
        Ok(store) => store,
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("node"), "{what}: the path is not named in: {text}");
            return true;
        }
    };
    // One of the two has everything: the state may lag behind the log, which brings it forward again,
    // and an entry that the state contains may go from the log. The state is never wrong.
    let applied = store.state.last_applied();
    assert_eq!(store.log().last_log_id().max(applied), Some(log_id(1, 500)), "{what}");
    assert_eq!(store.log().vote(), Some(Vote::new_committed(1, 1)), "{what}");
    let applied = applied.map_or(0, |id| id.index);
    for i in 1..=applied {
        assert_eq!(value(&store, &format!("k{i}")).as_deref(), Some("some value"), "{what}");
    }
    store.close().unwrap();
    false
}

fn copy_dir(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A reader gets every entry, whatever part of the log is still in memory.
#[tokio::test(flavor = "multi_thread")]
async fn entries_come_from_memory_and_disk_alike() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = options(dir.path());
    small.storage.log_tail_bytes = 2000;
    small.raft.append_bytes_max = 1000;
    let store = Store::open(&small).unwrap();
    let mut log = store.log();
    log.append((0..=100).map(|i| put_entry(i, "k", &"v".repeat(50))), IOFlushed::noop())
        .await
        .unwrap();
    for start in [1, 50, 90, 100] {
        let all = log.try_get_log_entries(start..=100).await.unwrap();
        let found: Vec<_> = all.iter().map(|e| e.log_id.index).collect();
        assert_eq!(found, (start..=100).collect::<Vec<_>>());
        let some = log.limited_get_log_entries(start, 101).await.unwrap();
        assert!(!some.is_empty() && some.len() < 20, "{}", some.len());
    }
}

/// What a process leaves behind that is killed: the files as they are, without a clean stop.
fn killed(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_dir(dir, copy.path());
    copy
}

/// After a crash the state is as of the last flush, whole, and the log has everything after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_takes_the_state_back_to_a_flush_and_the_log_has_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (mut log, mut machine) = (store.log(), store.state_machine());
    let entry = |i| put_entry(i, &format!("k{}", i % 10), &format!("v{i}"));
    log.blocking_append((0..=30).map(entry)).await.unwrap();
    apply(&mut machine, (0..=20).map(entry).collect()).await;
    machine.flush().unwrap();
    apply(&mut machine, (21..=30).map(entry).collect()).await;
    assert_eq!(value(&store, "k0").as_deref(), Some("v30"));

    let copy = killed(dir.path());
    let after = open(copy.path());
    assert_eq!(after.state.last_applied(), Some(log_id(1, 20)));
    assert_eq!(after.reader().revision(), 21);
    assert_eq!(value(&after, "k0").as_deref(), Some("v20"));
    assert_eq!(value(&after, "k1").as_deref(), Some("v11"));
    let rest = after.log().try_get_log_entries(21..=30).await.unwrap();
    apply(&mut after.state_machine(), rest).await;
    for i in 21..=30 {
        assert_eq!(value(&after, &format!("k{}", i % 10)), Some(format!("v{i}")));
    }
    assert_eq!((after.reader().revision(), after.reader().key_count().unwrap()), (31, 10));
}

/// A log that was purged beyond the state on disk has lost writes: the store does not open.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_behind_the_purged_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (mut log, mut machine) = (store.log(), store.state_machine());
    log.blocking_append((0..=9).map(|i| put_entry(i, "k", "v"))).await.unwrap();
    apply(&mut machine, (0..=9).map(|i| put_entry(i, "k", "v")).collect()).await;
    let snapshot = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    assert_eq!(snapshot.meta.last_log_id, Some(log_id(1, 9)));
    log.purge(log_id(1, 9)).await.unwrap();
    open(killed(dir.path()).path()).close().unwrap();

    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut log = store.log();
    log.blocking_append((0..=9).map(|i| put_entry(i, "k", "v"))).await.unwrap();
    log.purge(log_id(1, 5)).await.unwrap();
    // Brings the purge to disk.
    log.blocking_append([put_entry(10, "k", "v")]).await.unwrap();
    let copy = killed(dir.path());
    let error = Store::open(&options(copy.path())).err().unwrap();
    assert!(error.to_string().contains("purged"), "{error}");
    // It leaves nothing behind that would be in the way of whoever looks again.
    let again = Store::open(&options(copy.path())).err().unwrap();
    assert_eq!(again.to_string(), error.to_string());
}

/// Replicas that applied the same have one digest, whatever they have flushed; any other state has another.
#[tokio::test]
async fn a_digest_tells_states_apart() {
    let entries = |value: &str| vec![put_entry(1, "a", "1"), put_entry(2, "b", value)];
    let (first, second, other) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stores = [open(first.path()), open(second.path()), open(other.path())];
    for (store, value) in stores.iter().zip(["2", "2", "3"]) {
        let mut machine = store.state_machine();
        for entry in entries(value) {
            apply(&mut machine, vec![entry]).await;
        }
    }
    let [first, second, other] =
        stores.each_ref().map(|store| store.reader().digest(|| true).unwrap());
    assert_eq!((first.applied, first.rows), (Some(log_id(1, 2)), 2));
    assert_eq!(first, second);
    assert_ne!(first.hash, other.hash);
    assert!(stores[2].reader().digest(|| false).is_err(), "nobody waits for it");
    assert_eq!(stores[0].reader().digest(|| true).unwrap(), first, "nothing has changed");
    let mut machine = stores[0].state_machine();
    apply(&mut machine, vec![write_entry(3, Write::delete("b".into(), Condition::Always))]).await;
    assert_ne!(stores[0].reader().digest(|| true).unwrap().hash, first.hash);
}
