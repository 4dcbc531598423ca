//! Rows that left the memtables: what is kept of them in memory is what is on disk.

use std::collections::HashMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

/// A store whose tables leave memory after a few rows.
fn small(dir: &Path, row_cache_bytes: usize) -> Store {
    let mut options = options(dir);
    options.storage.memtable_bytes = 1 << 10;
    options.storage.row_cache_bytes = row_cache_bytes;
    Store::open(&options).unwrap()
}

/// Writes whose outcome depends on what is there come out alike with rows in memory and without, also when others
/// read meanwhile; and what readers find is what was written.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn replicas_agree_with_and_without_rows_in_memory() {
    const KEYS: u64 = 300;
    let (with_dir, without_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (with, without) = (small(with_dir.path(), 1 << 20), small(without_dir.path(), 0));
    let stop = Arc::new(AtomicBool::new(false));
    let (reader, stopped) = (with.reader(), stop.clone());
    let reading = tokio::task::spawn_blocking(move || {
        let mut newest = HashMap::new();
        while !stopped.load(Ordering::Relaxed) {
            for key in 0..KEYS {
                if let Lookup::Found(record) = reader.get(format!("k{key}").as_bytes()).unwrap() {
                    let before = newest.insert(key, record.revision);
                    assert!(before <= Some(record.revision), "k{key} went back");
                }
            }
        }
    });
    let mut random = StdRng::seed_from_u64(11);
    let mut model = HashMap::new();
    let mut revision = 0;
    for index in 1..6000 {
        let number = random.random_range(0..KEYS);
        let key = Bytes::from(format!("k{number}"));
        let present = model.get(&number).map(|(revision, _)| *revision);
        let condition = match (random.random_range(0..4), present) {
            (0, _) => Condition::Absent,
            (1, _) => Condition::Revision(random.random_range(0..=revision)),
            (2, Some(present)) => Condition::Revision(present),
            _ => Condition::Always,
        };
        let holds = match condition {
            Condition::Always => true,
            Condition::Absent => present.is_none(),
            Condition::Revision(wanted) => present == Some(wanted),
        };
        let value = format!("{index}").repeat(random.random_range(1..40));
        let write = if random.random_ratio(1, 4) {
            revision += u64::from(holds && model.remove(&number).is_some());
            Write::delete(key, condition)
        } else {
            if holds {
                revision += 1;
                model.insert(number, (revision, value.clone()));
            }
            Write::put(key, value.into(), condition)
        };
        for store in [&with, &without] {
            apply(&mut store.state_machine(), vec![write_entry(index, write.clone())]).await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    reading.await.unwrap();
    for key in 0..KEYS {
        let expected = model.get(&key).map(|(_, value)| value.clone());
        assert_eq!(super::value(&with, &format!("k{key}")), expected, "k{key}");
    }
    let digests = [&with, &without].map(|store| store.reader().digest(|| true).unwrap());
    assert_eq!(digests[0], digests[1]);
    assert_eq!(with.reader().revision(), revision);
    let (with, without) = (with.reader().row_cache(), without.reader().row_cache());
    assert!(with.hits > 1000 && with.misses > 0, "{with:?}");
    assert_eq!((without.hits, without.bytes), (0, 0));
}

/// A row of the state that a snapshot replaces is not read any more, however often it was read before.
#[tokio::test]
async fn an_install_forgets_rows() {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let leader = open(from.path());
    let mut machine = leader.state_machine();
    apply(&mut machine, vec![put_entry(1000, "k", "new")]).await;
    let image = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    let store = small(dir.path(), 1 << 20);
    let mut machine = store.state_machine();
    apply(&mut machine, vec![put_entry(1, "k", "old"), put_entry(2, "gone", "old")]).await;
    machine.flush().unwrap();
    for index in 3..100 {
        apply(&mut machine, vec![put_entry(index, &format!("other{index}"), &"o".repeat(500))])
            .await;
        machine.flush().unwrap();
    }
    let hits = |store: &Store| store.reader().row_cache().hits;
    let before = hits(&store);
    for _ in 0..3 {
        assert_eq!(value(&store, "k").as_deref(), Some("old"));
        assert_eq!(value(&store, "gone").as_deref(), Some("old"));
    }
    assert!(hits(&store) >= before + 4, "they are in the cache");
    machine.install_snapshot(&image.meta, image.snapshot).await.unwrap();
    assert_eq!(value(&store, "k").as_deref(), Some("new"));
    assert_eq!(value(&store, "gone"), None);
}
