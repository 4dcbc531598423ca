//! A snapshot takes the state's place soon, whatever else the store is about: until it has, Raft neither votes nor
//! appends.

use std::time::{Duration, Instant};

use super::*;
use crate::store::engine::CF_DATA_PREFIX;

/// For conditions that come within milliseconds on an idle machine, and far below what a flush waits for compaction.
const SOON: Duration = Duration::from_secs(5);

/// Of a leader whose state ends with entry 1000.
async fn snapshot(dir: &Path) -> (Store, SnapshotMeta, SnapshotData) {
    let store = open(dir);
    let mut machine = store.state_machine();
    apply(&mut machine, vec![put_entry(1000, "k", "new")]).await;
    let image = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    (store, image.meta, image.snapshot)
}

/// Lets RocksDB merge files, or not.
fn set_compaction(store: &Store, is_on: bool) {
    let data = store.engine.family(&format!("{CF_DATA_PREFIX}0")).unwrap();
    let is_off = if is_on { "false" } else { "true" };
    store.engine.db().set_options_cf(&data, &[("disable_auto_compactions", is_off)]).unwrap();
}

/// A state with so many files that the next flush waits for compaction, which does not come, and a row to flush.
async fn crowded(dir: &Path) -> Store {
    let store = open(dir);
    set_compaction(&store, false);
    let mut machine = store.state_machine();
    let files = || store.engine.number("data-0", "rocksdb.num-files-at-level0").unwrap();
    let mut index = 0;
    while files() < 20 {
        index += 1;
        apply(&mut machine, vec![put_entry(index, "k", "old")]).await;
        machine.flush().unwrap();
    }
    apply(&mut machine, vec![put_entry(index + 1, "k", "newest")]).await;
    store
}

/// A flush under way, which has taken its turn when this returns.
async fn flushing(store: &Store) -> tokio::task::JoinHandle<std::io::Result<()>> {
    let machine = store.state_machine();
    let flushing = tokio::task::spawn_blocking(move || machine.flush());
    let frozen = || store.reader().shared.memtables.frozen().is_some();
    eventually("the flush has begun", frozen).await;
    flushing
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_that_waits_for_compaction_gives_way_to_an_install() {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_leader, meta, image) = snapshot(from.path()).await;
    let store = crowded(dir.path()).await;
    let flushing = flushing(&store).await;
    let begun = Instant::now();
    store.state_machine().install_snapshot(&meta, image).await.unwrap();
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    tokio::time::timeout(SOON, flushing).await.expect("it ends").unwrap().unwrap();
    assert_eq!(value(&store, "k").as_deref(), Some("new"));
    assert_eq!(store.state.last_applied(), meta.last_log_id);
    store.close().unwrap();
    assert_eq!(value(&open(dir.path()), "k").as_deref(), Some("new"));
}

/// Whoever was in the way is written all the same if nothing takes the state's place.
#[tokio::test(flavor = "multi_thread")]
async fn a_flush_that_gave_way_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = crowded(dir.path()).await;
    let flushing = flushing(&store).await;
    let reader = store.reader();
    let excluded = tokio::task::spawn_blocking(move || drop(reader.shared.flushes.exclude()));
    tokio::time::timeout(SOON, excluded).await.expect("it gives way").unwrap();
    assert_eq!(value(&store, "k").as_deref(), Some("newest"));
    set_compaction(&store, true);
    tokio::time::timeout(Duration::from_secs(30), flushing).await.unwrap().unwrap().unwrap();
    let mut stored = Vec::new();
    meta::record_key(b"k", &mut stored);
    let on_disk = store.engine.db().get_cf(&store.engine.family("data-0").unwrap(), stored);
    assert!(on_disk.unwrap().unwrap().ends_with(b"newest"));
}

/// The image of it is made afterwards, and there for whoever asks.
#[tokio::test(flavor = "multi_thread")]
async fn an_install_does_not_wait_for_its_image() {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_leader, meta, image) = snapshot(from.path()).await;
    let store = open(dir.path());
    let mut machine = store.state_machine();
    apply(&mut machine, vec![put_entry(1, "k", "old")]).await;
    drop(machine.get_snapshot_builder().await.build_snapshot().await.unwrap());

    let (go_on, building) = images::image_being_made(&machine).await;
    let installing = machine.install_snapshot(&meta, image);
    tokio::time::timeout(SOON, installing).await.expect("it is installed").unwrap();
    assert_eq!(value(&store, "k").as_deref(), Some("new"));
    let current = || machine.images.current().unwrap().meta.last_log_id;
    assert_eq!(current(), Some(log_id(1, 1)));
    drop(go_on);
    building.join().unwrap();
    eventually("nobody asked, and it is made", || current() == meta.last_log_id).await;
}

/// Who asks before it is made gets no image from before the install.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_the_image_of_an_install_waits_for_it() {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_leader, meta, image) = snapshot(from.path()).await;
    let store = open(dir.path());
    let mut machine = store.state_machine();
    machine.install_snapshot(&meta, image).await.unwrap();
    let current = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(current.meta, meta);
    drop((current, machine));
    store.close().unwrap();
}
