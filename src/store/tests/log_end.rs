//! What the end of the log may look like after a power cut, and is not to be taken for a log.

use super::*;
use crate::store::engine::CF_LOG;
use rocksdb::WriteBatch;

fn entry(term: u64, index: u64) -> Entry {
    Entry { log_id: log_id(term, index), ..put_entry(index, "k", &"v".repeat(100)) }
}

async fn append(store: &Store, entries: Vec<Entry>) {
    store.log().append(entries, IOFlushed::noop()).await.unwrap();
}

/// Opens the store again; what is wrong with it if it is refused.
fn reopened(store: Store, dir: &Path) -> Option<String> {
    store.close().unwrap();
    Store::open(&options(dir)).err().map(|error| error.to_string())
}

/// A hole is found however long the log is, as long as it lies where a replay can have made it.
#[tokio::test(flavor = "multi_thread")]
async fn a_hole_near_the_end_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    append(&store, (0..=100).map(|index| entry(1, index)).collect()).await;
    store.log.check_end(u64::MAX).unwrap();
    let mut batch = WriteBatch::default();
    batch.delete_cf(&store.engine.family(CF_LOG).unwrap(), 90u64.to_be_bytes());
    store.engine.write(batch).unwrap();
    store.log.check_end(500).unwrap();
    for bytes_max in [5_000, u64::MAX] {
        let found = store.log.check_end(bytes_max).unwrap_err().to_string();
        assert!(found.contains("follows"), "{found}");
    }
    let refused = reopened(store, dir.path()).expect("it is refused");
    assert!(refused.contains("follows"), "{refused}");
}

/// Where a cut was lost, entries of the leader before stand behind those of the next one. Its log ends as the
/// leader's before, which would believe that all of it is its own.
#[tokio::test(flavor = "multi_thread")]
async fn entries_of_an_older_leader_behind_newer_ones_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let terms = [1, 1, 1, 1, 1, 1, 2, 2, 1, 1, 1];
    let entries = terms.iter().enumerate().map(|(index, term)| entry(*term, index as u64));
    append(&store, entries.collect()).await;
    let refused = reopened(store, dir.path()).expect("it is refused");
    assert!(refused.contains("follows"), "{refused}");
}

/// What was purged is the neighbour of the first entry: its index and its leader have to fit.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_is_missing_at_the_beginning_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    append(&store, (0..=9).map(|index| entry(2, index)).collect()).await;
    let mut log = store.log();
    log.purge(log_id(2, 3)).await.unwrap();
    store.log.check_end(u64::MAX).unwrap();
    append(&store, vec![entry(1, 4)]).await;
    let found = store.log.check_end(u64::MAX).unwrap_err().to_string();
    assert!(found.contains("follows"), "{found}");
    let mut batch = WriteBatch::default();
    batch.delete_cf(&store.engine.family(CF_LOG).unwrap(), 4u64.to_be_bytes());
    store.engine.write(batch).unwrap();
    let found = store.log.check_end(u64::MAX).unwrap_err().to_string();
    assert!(found.contains("entry 4 is missing"), "{found}");
}
