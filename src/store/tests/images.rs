//! Images: what they may cost, and when they are made.

use std::time::{Duration, Instant};

use super::*;
use crate::store::staging::ABANDONED_AFTER;

/// What RocksDB has written down of its own options.
fn options_file(dir: &Path) -> String {
    let files = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let is_options =
        |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("OPTIONS-");
    let newest = files.filter(is_options).max().expect("RocksDB writes its options down");
    std::fs::read_to_string(newest).unwrap()
}

/// Of each column family, its name and its line of this option.
fn family_options(dir: &Path, option: &str) -> Vec<(String, String)> {
    let text = options_file(dir);
    let (mut family, mut found) = (String::new(), Vec::new());
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("[CFOptions \"") {
            family = name.trim_end_matches("\"]").to_owned();
        } else if let Some((name, value)) = line.split_once('=')
            && name == option
        {
            found.push((family.clone(), value.to_owned()));
        }
    }
    assert!(found.len() > 1, "{option} is an option of each family: {found:?}");
    found
}

/// An image is made of links and stays so: RocksDB is told of each of its families not to compact it.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_not_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let store = Store::open(&options).unwrap();
    let mut machine = store.state_machine();
    apply(&mut machine, vec![put_entry(1, "k", "v")]).await;
    let snapshot = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    let image = std::fs::read_dir(options.dir.join(SNAPSHOTS_DIR)).unwrap().next().unwrap();
    for (family, value) in family_options(&image.unwrap().path(), "disable_auto_compactions") {
        assert_eq!(value, "true", "{family}");
    }
    drop(snapshot);
}

/// No brake of RocksDB's on one family holds up the writers of the Raft log, who share it with all.
#[test]
fn no_files_ever_hold_up_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let _store = Store::open(&options).unwrap();
    let db = options.dir.join(DB_DIR);
    let never = i32::MAX.to_string();
    for (option, off) in [
        ("level0_slowdown_writes_trigger", &*never),
        ("level0_stop_writes_trigger", &*never),
        ("soft_pending_compaction_bytes_limit", "0"),
        ("hard_pending_compaction_bytes_limit", "0"),
    ] {
        let families = family_options(&db, option);
        assert!(families.iter().any(|(family, _)| family.starts_with("data-")));
        for (family, value) in families {
            assert!(value == off || family == "default", "{option} of {family} is {value}");
        }
    }
}

/// Each image has a copy of the list of files, so that does not grow without end.
#[test]
fn the_list_of_files_stays_small() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let _store = Store::open(&options).unwrap();
    let text = options_file(&options.dir.join(DB_DIR));
    assert!(text.lines().any(|line| line.trim() == "max_manifest_file_size=4194304"), "{text}");
}

/// While an image is on its way to a follower, no other is made unless it has to be, or the log has become too
/// long for that.
#[tokio::test]
async fn a_newer_image_waits_for_the_one_under_way() {
    for (log_bytes_max, waits) in [(1 << 30, true), (1, false)] {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path());
        options.storage.log_bytes_max = log_bytes_max;
        let store = Store::open(&options).unwrap();
        store.log().blocking_append([put_entry(1, "k", &"v".repeat(1 << 20))]).await.unwrap();
        let mut machine = store.state_machine();
        apply(&mut machine, vec![put_entry(1, "k", "v")]).await;
        let mut builder = machine.try_create_snapshot_builder(false).await.unwrap();
        drop(builder.build_snapshot().await.unwrap());
        let current = machine.get_current_snapshot().await.unwrap().unwrap();
        let is_put_off = async |machine: &mut StateMachine| {
            machine.try_create_snapshot_builder(false).await.is_none()
        };
        assert!(!is_put_off(&mut machine).await, "nobody has any of it");
        let SnapshotData::Image(sending) = current.snapshot else { panic!("an image is sent") };
        sending.read_chunk(&[], 1).unwrap();
        assert_eq!(is_put_off(&mut machine).await, waits);
        assert!(machine.try_create_snapshot_builder(true).await.is_some(), "when it has to be");
        drop(sending);
        assert_eq!(is_put_off(&mut machine).await, waits, "it will be tried again");

        let current = machine.get_current_snapshot().await.unwrap().unwrap();
        let staged = transfer(&current.snapshot, &store.stager());
        assert_eq!(is_put_off(&mut machine).await, waits, "it is being installed");
        drop((current, staged));
        assert!(!is_put_off(&mut machine).await, "it has arrived");
    }
}

/// A follower that begins to get an image while a newer one is made gets it once: the newer one does not take its
/// place, or the log would be cut to where that ends. If it was there first, nobody begins with the older one.
#[tokio::test]
async fn an_image_that_is_begun_while_another_is_made_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&options(dir.path())).unwrap();
    let mut machine = store.state_machine();
    apply(&mut machine, vec![put_entry(1, "k", "v")]).await;
    let first = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    apply(&mut machine, vec![put_entry(2, "k", "v")]).await;
    let mut under_way = machine.try_create_snapshot_builder(false).await.unwrap();
    let SnapshotData::Image(image) = &first.snapshot else { panic!("an image is sent") };
    assert!(image.begin_sending());
    let built = under_way.build_snapshot().await.unwrap();
    assert_eq!(built.meta, first.meta);
    let current = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(current.meta, first.meta);
    drop((built, current));

    let _staged = transfer(&first.snapshot, &store.stager());
    drop(first);
    let second = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    assert_eq!(second.meta.last_log_id, Some(log_id(1, 2)));
    let SnapshotData::Image(older) = &second.snapshot else { panic!("an image is sent") };
    apply(&mut machine, vec![put_entry(3, "k", "v")]).await;
    let third = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    assert_eq!(third.meta.last_log_id, Some(log_id(1, 3)));
    assert!(!older.begin_sending(), "there is a newer one");
    let SnapshotData::Image(newer) = &third.snapshot else { panic!("an image is sent") };
    assert!(newer.begin_sending());
}

/// A snapshot that cannot be made for a moment does not end the node: it is made later.
#[tokio::test]
async fn an_image_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let store = Store::open(&options).unwrap();
    let mut machine = store.state_machine();
    apply(&mut machine, vec![put_entry(1, "k", "v")]).await;
    // A file where the directory of images should be.
    let images = options.dir.join(SNAPSHOTS_DIR);
    std::fs::write(&images, "").unwrap();
    let mut builder = machine.get_snapshot_builder().await;
    let building = tokio::spawn(async move { builder.build_snapshot().await });
    let a_moment = Duration::from_millis(300);
    tokio::time::sleep(a_moment).await;
    assert!(!building.is_finished(), "it cannot be made yet");
    std::fs::remove_file(&images).unwrap();
    let built = tokio::time::timeout(Duration::from_secs(30), building).await;
    let snapshot = built.expect("it is made in time").unwrap().unwrap();
    assert_eq!(snapshot.meta.last_log_id, Some(log_id(1, 1)));
    drop(snapshot);

    // Trying again keeps no store open.
    std::fs::rename(&images, options.dir.join("away")).unwrap();
    std::fs::write(&images, "").unwrap();
    let mut builder = machine.get_snapshot_builder().await;
    let building = tokio::spawn(async move { builder.build_snapshot().await });
    tokio::time::sleep(a_moment).await;
    drop(machine);
    store.close().unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(30), building).await;
    assert!(ended.expect("it ends").unwrap().is_err());
    std::fs::remove_file(&images).unwrap();
    Store::open(&options).unwrap().close().unwrap();
}

/// Half a snapshot that nobody goes on with does not stay on the disk for ever.
#[tokio::test]
async fn an_abandoned_staging_is_removed() {
    let (from_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = open(from_dir.path());
    let mut sender = from.state_machine();
    apply(&mut sender, vec![put_entry(1, "k", "v")]).await;
    let snapshot = sender.get_snapshot_builder().await.build_snapshot().await.unwrap();
    let SnapshotData::Image(image) = snapshot.snapshot else { panic!("a sender has an image") };

    let store = open(dir.path());
    let stager = store.stager();
    let begun = Instant::now();
    let position = stager.begin(image.id()).unwrap();
    let chunk = image.read_chunk(&position.cursor, 1).unwrap();
    let next = stager.write(image.id(), 0, chunk.bytes).unwrap();
    stager.give_up_abandoned(begun + ABANDONED_AFTER - Duration::from_secs(1));
    assert_eq!(stager.begin(image.id()).unwrap(), next, "it goes on");
    let later = Instant::now() + ABANDONED_AFTER;
    assert!(stager.is_abandoned(later) && !stager.is_abandoned(begun));
    stager.give_up_abandoned(later);
    assert!(!stager.is_abandoned(later));
    assert_eq!(stager.begin(image.id()).unwrap(), position, "it begins again");
    stager.give_up_abandoned(Instant::now() + ABANDONED_AFTER);
    let families = options_file(&options(dir.path()).dir.join(DB_DIR));
    let staged = families.lines().filter(|line| line.starts_with("[CFOptions \"data-"));
    assert_eq!(staged.count(), 1, "what was staged is gone");
}

/// An image that could not be made after an install is made when it is asked for. Until then there is the older
/// one, which is better than none: without any, openraft gives up.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_failed_is_made_later() {
    let (from_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = open(from_dir.path());
    let mut sender = from.state_machine();
    apply(&mut sender, vec![put_entry(1, "k", "v"), put_entry(2, "k", "w")]).await;
    let snapshot = sender.get_snapshot_builder().await.build_snapshot().await.unwrap();

    let options = options(dir.path());
    let store = Store::open(&options).unwrap();
    let mut machine = store.state_machine();
    apply(&mut machine, vec![put_entry(1, "k", "v")]).await;
    machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    let staged = transfer(&snapshot.snapshot, &store.stager());
    // A file where the directory of images should be.
    let images = options.dir.join(SNAPSHOTS_DIR);
    let away = options.dir.join("away");
    std::fs::rename(&images, &away).unwrap();
    std::fs::write(&images, "").unwrap();
    machine.install_snapshot(&snapshot.meta, staged).await.unwrap();
    let older = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(older.meta.last_log_id, Some(log_id(1, 1)));
    drop(older);
    std::fs::remove_file(&images).unwrap();
    std::fs::rename(&away, &images).unwrap();
    let current = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(current.meta.last_log_id, snapshot.meta.last_log_id);
}

/// Without any image there is no older one to make do with: who asks waits for a moment.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_image_after_an_install_is_waited_for() {
    let (from_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = open(from_dir.path());
    let mut sender = from.state_machine();
    apply(&mut sender, vec![put_entry(1, "k", "v")]).await;
    let snapshot = sender.get_snapshot_builder().await.build_snapshot().await.unwrap();

    let options = options(dir.path());
    let store = Store::open(&options).unwrap();
    let mut machine = store.state_machine();
    assert!(machine.get_current_snapshot().await.unwrap().is_none(), "and none is needed");
    // A file where the directory of images should be.
    let images = options.dir.join(SNAPSHOTS_DIR);
    std::fs::write(&images, "").unwrap();
    machine.install_snapshot(&snapshot.meta, snapshot.snapshot).await.unwrap();
    let mut asking = Box::pin(machine.get_current_snapshot());
    let a_moment = Duration::from_millis(300);
    assert!(tokio::time::timeout(a_moment, &mut asking).await.is_err(), "it cannot be made yet");
    std::fs::remove_file(&images).unwrap();
    let current = asking.await.unwrap().expect("it was waited for");
    assert_eq!(current.meta, snapshot.meta);
}

/// A snapshot, and an empty store that can install it.
async fn sender_and_receiver(dir: &Path) -> (Store, SnapshotMeta, SnapshotData, Store) {
    let sender = Store::open(&options(&dir.join("sender"))).unwrap();
    let mut builder = sender.state_machine().get_snapshot_builder().await;
    let snapshot = builder.build_snapshot().await.unwrap();
    let receiver = Store::open(&options(&dir.join("receiver"))).unwrap();
    (sender, snapshot.meta, snapshot.snapshot, receiver)
}

/// As if an image was made that takes long: until the sender is dropped.
pub(super) async fn image_being_made(
    machine: &StateMachine,
) -> (std::sync::mpsc::Sender<()>, std::thread::JoinHandle<()>) {
    let (images, (go_on, goes_on)) = (machine.images.clone(), std::sync::mpsc::channel::<()>());
    let (begin, begun) = tokio::sync::oneshot::channel();
    let building = std::thread::spawn(move || {
        let _one_at_a_time = images.one_at_a_time();
        begin.send(()).unwrap();
        goes_on.recv().unwrap_err();
    });
    begun.await.unwrap();
    (go_on, building)
}

/// The images after installs have an owner: once it is closed, nothing goes on in a store that is to be
/// closed. One that has its turn only then is not made.
#[tokio::test(flavor = "multi_thread")]
async fn who_closes_a_store_waits_for_no_image_that_is_not_begun() {
    let dir = tempfile::tempdir().unwrap();
    let (_sender, meta, snapshot, receiver) = sender_and_receiver(dir.path()).await;
    let mut machine = receiver.state_machine();
    let (go_on, building) = image_being_made(&machine).await;
    for _ in 0..2 {
        machine.install_snapshot(&meta, snapshot.clone()).await.unwrap();
    }
    let images = machine.images.clone();
    let closing = std::thread::spawn(move || images.close());
    let deadline = Instant::now() + Duration::from_secs(20);
    while machine.images.check().is_ok() {
        assert!(Instant::now() < deadline, "it is never closed");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop(go_on);
    building.join().unwrap();
    closing.join().unwrap();
    assert!(machine.images.current().is_none(), "it is of no use to anybody");
    assert_eq!(Arc::strong_count(&machine.images), 2, "a thread has them");
}

/// An install that goes on longer than Raft begins no image in a store that is being closed.
#[tokio::test]
async fn an_install_that_ends_late_begins_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let (_sender, meta, snapshot, receiver) = sender_and_receiver(dir.path()).await;
    let mut machine = receiver.state_machine();
    machine.images.close();
    machine.install_snapshot(&meta, snapshot).await.unwrap();
    assert_eq!(Arc::strong_count(&machine.images), 2, "a thread has them");
    assert!(machine.images.is_outdated(), "there is no newer one");
    let mut builder = machine.get_snapshot_builder().await;
    assert!(builder.build_snapshot().await.is_err(), "nor is one made for Raft");
    drop(builder);
    drop(machine);
    receiver.close().unwrap();
}
