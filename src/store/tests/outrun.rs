//! A snapshot that ends behind the log, and with an earlier leader's entry: the log's are nobody's any more.
//!
//! Leader 5 wrote entries to this node alone. Leader 6, who never saw them, sends what leader 4 wrote.

use super::*;

fn entry(term: u64, index: u64) -> Entry {
    Entry { log_id: log_id(term, index), ..put_entry(index, "k", "v") }
}

/// Of a leader whose state ends with leader 4's entry 10.
async fn snapshot(dir: &Path) -> (Store, SnapshotMeta, SnapshotData) {
    let store = open(dir);
    let mut machine = store.state_machine();
    apply(&mut machine, (1..=10).map(|index| entry(4, index)).collect()).await;
    let image = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    (store, image.meta, image.snapshot)
}

/// A node whose log leader 5 wrote, all of which its marker vouches for, and which has installed that snapshot.
async fn outrun(dir: &Path) -> Store {
    let store = open(dir);
    let mut log = store.log();
    log.save_vote(&Vote::new_committed(5, 1)).await.unwrap();
    log.blocking_append((0..=3).map(|index| entry(5, index))).await.unwrap();
    drop(log);
    store.close().unwrap();
    let store = open(dir);
    store.log().save_vote(&Vote::new_committed(6, 1)).await.unwrap();
    let other = tempfile::tempdir().unwrap();
    let (_leader, meta, image) = snapshot(other.path()).await;
    let mut machine = store.state_machine();
    machine.install_snapshot(&meta, image).await.unwrap();
    // Waits for what goes on afterwards: the files are about to be copied.
    drop(machine.get_current_snapshot().await.unwrap());
    store
}

/// It goes on where the snapshot ends, and is found whole at the next start.
async fn goes_on(dir: &Path) {
    let store = open(dir);
    let mut log = store.log();
    let state = log.get_log_state().await.unwrap();
    assert_eq!(state.last_log_id, Some(log_id(4, 10)));
    assert_eq!(state.last_purged_log_id, Some(log_id(4, 10)));
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), Vec::new());
    log.blocking_append([entry(4, 11), entry(6, 12)]).await.unwrap();
    open(killed(dir).path()).close().unwrap();
    let before = killed(dir);
    log.blocking_append([entry(6, 13)]).await.unwrap();
    drop(log);
    store.close().unwrap();

    // What is lost from then on is noticed as ever.
    std::fs::copy(dir.join("node/marker"), before.path().join("node/marker")).unwrap();
    let lost = Store::open(&options(before.path())).err();
    assert!(matches!(lost, Some(OpenError::LostData { .. })), "{lost:?}");
    let store = open(dir);
    assert_eq!(store.log.last_log_id(), Some(log_id(6, 13)));
    store.close().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_before_its_log_is_purged_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let _store = outrun(dir.path()).await;
    let copy = killed(dir.path());
    goes_on(copy.path()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_after_its_log_was_purged_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = outrun(dir.path()).await;
    let mut log = store.log();
    log.purge(log_id(4, 10)).await.unwrap();
    assert_eq!(store.log.last_log_id(), Some(log_id(4, 10)));
    // Brings the purge to disk.
    log.save_vote(&Vote::new_committed(6, 1)).await.unwrap();
    let copy = killed(dir.path());
    goes_on(copy.path()).await;
    drop(log);
    store.close().unwrap();
    goes_on(dir.path()).await;
}

/// A change of the membership among what went is none any more: a leader may take leases again.
#[tokio::test(flavor = "multi_thread")]
async fn a_membership_that_nobody_committed_goes_with_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let store = outrun(dir.path()).await;
    store.promise().membership_changes(log_id(5, 3));
    assert!(!store.promise().is_newest_membership(Some(&log_id(4, 10))));
    store.log().purge(log_id(4, 10)).await.unwrap();
    assert!(store.promise().is_newest_membership(Some(&log_id(4, 10))));
}
