//! Writes that happen at most once do so through restarts, crashes and snapshots.

use super::super::dedupe::{Fall, Verdict};
use super::super::machine::SideRows;
use super::*;
use crate::once::{ClientFloor, Once};

fn once(client: &str, seq: u64, floor: u64) -> Option<Once> {
    let client = ClientFloor { client: client.parse().unwrap(), floor };
    Some(Once::new(client, seq).unwrap())
}

fn put_once(key: &str, seq: u64) -> Write {
    let write = Write::put(key.to_owned().into(), format!("v{seq}").into(), Condition::Always);
    write.once(once("me", seq, 0))
}

/// What the store would answer to a repeat; `None` when it would carry it out.
fn remembered(store: &Store, write: &Write) -> Option<Written> {
    let reader = store.reader();
    let mut machine = reader.shared.machine();
    let write = WriteRef::from(write);
    match machine.dedupe.check(&write.once.unwrap(), &write, &|_| Fall::Gone) {
        Verdict::New => None,
        Verdict::Answered(written) => Some(written),
    }
}

fn wrote(revision: u64) -> Option<Written> {
    Some(Written::Put { revision })
}

/// Everything that replicas must agree on, to the byte.
fn state_of(store: &Store) -> (Revision, Option<LogId>, SideRows) {
    let reader = store.reader();
    let rows = reader.shared.machine().side().rows;
    (reader.revision(), store.state.last_applied(), rows)
}

/// A repeat changes nothing, within the same round and after a restart, and neither does what another
/// write left in its place.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_changes_nothing_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let first = put_once("k", 1);
    let entries = vec![
        write_entry(1, first.clone()),
        write_entry(2, first.clone()),
        put_entry(3, "k", "of another"),
        write_entry(4, first.clone()),
        write_entry(5, Write::delete("k".into(), Condition::Always).once(once("me", 1, 0))),
        write_entry(6, put_once("other", 1)),
    ];
    apply(&mut store.state_machine(), entries).await;
    assert_eq!(store.reader().revision(), 2);
    assert_eq!(value(&store, "k").as_deref(), Some("of another"));
    assert_eq!(value(&store, "other"), None);
    store.close().unwrap();
    let store = open(dir.path());
    assert_eq!(remembered(&store, &first), wrote(1));
    apply(&mut store.state_machine(), vec![write_entry(7, first)]).await;
    assert_eq!(store.reader().revision(), 2);
    assert_eq!(value(&store, "k").as_deref(), Some("of another"));
}

/// Writes of two clients, each asked for twice, some of them conditional: entry `i` of a log.
fn mixed_entry(i: u64) -> Entry {
    let seq = i / 2;
    let key = format!("k{}", seq % 3);
    let condition = if seq.is_multiple_of(4) { Condition::Absent } else { Condition::Always };
    let write = match seq % 5 {
        4 => Write::delete(key.into(), Condition::Always),
        _ => Write::put(key.into(), format!("v{i}").into(), condition),
    };
    let client = ["one", "two"][usize::from(seq.is_multiple_of(3))];
    write_entry(i, write.once(once(client, seq, seq.saturating_sub(6))))
}

/// Wherever it is killed and wherever it flushed before, a node ends where one does that never was.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_point_executes_nothing_twice() {
    const LAST: u64 = 40;
    let straight_dir = tempfile::tempdir().unwrap();
    let straight = open(straight_dir.path());
    apply(&mut straight.state_machine(), (0..=LAST).map(mixed_entry).collect()).await;
    for flushed in [0, 1, 6, 7, 19, 20, LAST] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let (mut log, mut machine) = (store.log(), store.state_machine());
        log.blocking_append((0..=LAST).map(mixed_entry)).await.unwrap();
        apply(&mut machine, (0..=flushed).map(mixed_entry).collect()).await;
        machine.flush().unwrap();
        apply(&mut machine, (flushed + 1..=LAST).map(mixed_entry).collect()).await;

        let copy = killed(dir.path());
        let after = open(copy.path());
        let applied = after.state.last_applied().unwrap().index;
        assert_eq!(applied, flushed);
        for i in applied + 1..=LAST {
            apply(&mut after.state_machine(), vec![mixed_entry(i)]).await;
        }
        assert_eq!(state_of(&after), state_of(&straight), "flushed at {flushed}");
        for key in ["k0", "k1", "k2"] {
            assert_eq!(value(&after, key), value(&straight, key), "flushed at {flushed}");
        }
    }
}

fn many(first: u64, floor: u64) -> Entry {
    let write = |seq| {
        let write = Write::put(format!("key-{seq}").into(), "v".into(), Condition::Always);
        write.once(once("many", seq, floor))
    };
    let writes: Vec<_> = (first..first + 1000).map(write).collect();
    command_entry(first, Command::Write(Writes::new(first, &writes)))
}

/// A follower that the log no longer reaches gets what is remembered with the data, and forgets what
/// it remembered itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_carries_what_is_remembered() {
    let (from_dir, to_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = open(from_dir.path());
    let mut machine = from.state_machine();
    apply(&mut machine, (1..=12).map(|n| many(n * 1000, 0)).collect()).await;
    assert!(state_of(&from).2.len() > 1, "more than one chunk");
    let snapshot = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();

    let to = open(to_dir.path());
    let mut receiver = to.state_machine();
    let own = put_once("own", 1);
    apply(&mut receiver, vec![write_entry(1, own.clone())]).await;
    let staged = transfer(&snapshot.snapshot, &to.stager());
    assert_eq!(remembered(&to, &own), wrote(1), "staging must not count");
    receiver.install_snapshot(&snapshot.meta, staged).await.unwrap();
    assert_eq!(state_of(&to), state_of(&from));
    assert_eq!(to.reader().key_count().unwrap(), 12_000);
    drop(receiver);
    to.close().unwrap();
    let to = open(to_dir.path());
    assert_eq!(state_of(&to), state_of(&from));
    assert_eq!(remembered(&to, &own), None);
}

/// A table that shrinks leaves nothing of its larger self behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_smaller_table_takes_the_larger_ones_place() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut machine = store.state_machine();
    apply(&mut machine, (1..=12).map(|n| many(n * 1000, 0)).collect()).await;
    machine.flush().unwrap();
    assert!(state_of(&store).2.len() > 2);
    apply(&mut machine, vec![many(13_000, 13_000)]).await;
    let expected = state_of(&store);
    assert_eq!(expected.2.len(), 2, "one chunk, and the ring");
    drop(machine);
    store.close().unwrap();
    let store = open(dir.path());
    assert_eq!(state_of(&store), expected);
    let image = store.state_machine().get_snapshot_builder().await.build_snapshot().await.unwrap();
    let to_dir = tempfile::tempdir().unwrap();
    let to = open(to_dir.path());
    let staged = transfer(&image.snapshot, &to.stager());
    to.state_machine().install_snapshot(&image.meta, staged).await.unwrap();
    assert_eq!(state_of(&to), expected);
}

/// A state without what it remembers is not a state.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_chunk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    apply(&mut store.state_machine(), vec![write_entry(1, put_once("k", 1))]).await;
    store.state.flush().unwrap();
    let mut batch = rocksdb::WriteBatch::default();
    let data = store.reader().shared.view().data.clone();
    batch.delete_cf(&store.engine.family(&data).unwrap(), meta::chunk_key(meta::DEDUPE, 0));
    store.engine.write(batch).unwrap();
    store.close().unwrap();
    let error = Store::open(&options(dir.path())).err().unwrap();
    assert!(error.to_string().contains("table of answers"), "{error}");
}

/// An entry that cannot be applied to its end leaves no answer behind without the write.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_round_never_reaches_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut machine = store.state_machine();
    apply(&mut machine, vec![put_entry(0, "sound", "v")]).await;
    machine.flush().unwrap();
    let mut stored = Vec::new();
    meta::record_key(b"bad", &mut stored);
    let mut batch = rocksdb::WriteBatch::default();
    let data = store.reader().shared.view().data.clone();
    batch.put_cf(&store.engine.family(&data).unwrap(), &stored, b"nonsense");
    store.engine.write(batch).unwrap();
    let lost = put_once("k", 1);
    let writes = [lost.clone(), Write::put("bad".into(), "v".into(), Condition::Revision(1))];
    let entry = command_entry(1, Command::Write(Writes::new(1, &writes)));
    assert!(machine.apply(stream::iter([Ok((entry, None))])).await.is_err());
    drop(machine);
    assert!(store.close().is_err());
    let store = open(dir.path());
    assert_eq!(store.state.last_applied(), Some(log_id(1, 0)));
    assert_eq!(remembered(&store, &lost), None);
}

/// Another cluster's key is refused and not remembered, and no first ring gives away a key whose
/// writes are remembered.
#[tokio::test(flavor = "multi_thread")]
async fn ownership_comes_before_what_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut machine = store.state_machine();
    let table = crate::ring::RingTable::new(two_clusters()).unwrap();
    let foreign = (0..).map(|i| format!("k{i}")).find(|key| {
        let c2 = "c2".parse().unwrap();
        table.owns(&c2, key.as_bytes())
    });
    let foreign = foreign.unwrap();
    let delete = Write::delete(foreign.clone().into(), Condition::Always);
    let delete = delete.once(once("me", 1, 0));
    apply(&mut machine, vec![write_entry(1, delete)]).await;
    let install = || Command::InstallRing(Box::new(two_clusters()));
    apply(&mut machine, vec![command_entry(2, install())]).await;
    assert_eq!(store.reader().ring().ring().epoch, 0, "a repeat would be carried out elsewhere");
    let later = Command::Write(Writes::new(60 * 60 * 1000, &[]));
    apply(&mut machine, vec![command_entry(3, later), command_entry(4, install())]).await;
    assert_eq!(store.reader().ring().ring().epoch, 1);
    let refused = put_once(&foreign, 2);
    apply(&mut machine, vec![write_entry(5, refused.clone())]).await;
    assert_eq!(remembered(&store, &refused), None);
}
