//! What a power cut leaves of the last write: any of its pages may be missing.

use std::fs;
use std::path::PathBuf;

use super::*;

const PAGE: usize = 4096;
const SECTOR: usize = 512;

/// Entries that were on disk when the last write began.
const DURABLE: u64 = 10;

/// Entries of the last write.
const LAST: u64 = 6;

/// The entry at the end of what is on disk already is longer by `extra` bytes.
fn large(index: u64, extra: usize) -> Entry {
    let extra = if index == DURABLE { extra } else { 0 };
    let text = format!("{index}:{}", "v".repeat(20_000 + index as usize + extra));
    Entry { log_id: log_id(1, index), ..put_entry(index, "k", &text) }
}

/// The newest file of RocksDB's write-ahead log.
fn wal(dir: &Path) -> PathBuf {
    let files = fs::read_dir(dir.join("node").join(DB_DIR)).unwrap();
    let logs = files.map(|file| file.unwrap().path());
    logs.filter(|path| path.extension().is_some_and(|name| name == "log")).max().unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let (path, name) = file.map(|file| (file.path(), file.file_name())).unwrap();
        match path.is_dir() {
            true => copy(&path, &to.join(name)),
            false => drop(fs::copy(&path, to.join(name)).unwrap()),
        }
    }
}

/// A directory as it was before the last write, with the write-ahead log after it.
struct PowerCut {
    before: tempfile::TempDir,
    /// Where the last write begins.
    begin: usize,
    bytes: Vec<u8>,
    extra: usize,
}

impl PowerCut {
    async fn new(extra: usize) -> Self {
        let large = |index| large(index, extra);
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.log().blocking_append((0..DURABLE).map(large)).await.unwrap();
        // So that the marker tells of them.
        store.close().unwrap();
        let store = open(dir.path());
        store.log().blocking_append([large(DURABLE)]).await.unwrap();
        let before = tempfile::tempdir().unwrap();
        copy(dir.path(), before.path());
        let begin = fs::metadata(wal(dir.path())).unwrap().len() as usize;
        // As of appends that come while an fsync runs: the flusher writes them together.
        let mut log = store.log();
        for index in DURABLE + 1..DURABLE + LAST {
            log.append([large(index)], IOFlushed::noop()).await.unwrap();
        }
        log.blocking_append([large(DURABLE + LAST)]).await.unwrap();
        let bytes = fs::read(wal(dir.path())).unwrap();
        assert!(bytes.len() > begin + LAST as usize * 20_000, "one file has it all");
        Self { before, begin, bytes, extra }
    }

    /// Starts on what is left; the last entry of the log then.
    async fn opened(&self, bytes: &[u8]) -> Result<u64, String> {
        let large = |index| large(index, self.extra);
        let dir = tempfile::tempdir().unwrap();
        copy(self.before.path(), dir.path());
        fs::write(wal(dir.path()), bytes).unwrap();
        let store = Store::open(&options(dir.path())).map_err(|error| error.to_string())?;
        let mut log = store.log();
        let last = log.get_log_state().await.unwrap().last_log_id.unwrap().index;
        let entries = log.try_get_log_entries(0..=last).await.unwrap();
        assert_eq!(entries, (0..=last).map(large).collect::<Vec<_>>());
        drop(log);
        // It goes on where it ends, and that is there after the next start.
        store.log().blocking_append([large(last + 1)]).await.unwrap();
        store.close().unwrap();
        let store = Store::open(&options(dir.path())).map_err(|error| error.to_string())?;
        let state = store.log().get_log_state().await.unwrap();
        assert_eq!(state.last_log_id, Some(log_id(1, last + 1)));
        store.close().unwrap();
        Ok(last)
    }
}

/// Whichever pages of it are missing, the node starts with all that was on disk before, and perhaps with entries
/// of the last write that are whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_not_finished_is_cut_off() {
    let cut = PowerCut::new(0).await;
    let (mut partly, pages) = (0, cut.bytes.len().div_ceil(PAGE));
    // Of the first one as much as was there before stays; or the rest of a sector is missing, and nothing more.
    assert!(!cut.begin.is_multiple_of(SECTOR));
    let mut missing = Vec::new();
    missing.push(cut.begin..cut.begin.next_multiple_of(SECTOR));
    for first in cut.begin / PAGE..pages {
        let page = |n: usize| (n * PAGE).clamp(cut.begin, cut.bytes.len());
        missing.extend([1, 2, 9, pages].map(|count| page(first)..page(first + count)));
    }
    for missing in missing {
        for longer in [false, true] {
            let mut bytes = cut.bytes.clone();
            bytes[missing.clone()].fill(0);
            if longer {
                bytes.resize(bytes.len() + PAGE, 0);
            }
            let last = cut.opened(&bytes).await.unwrap();
            assert!((DURABLE..DURABLE + LAST).contains(&last), "{missing:?}: {last}");
            partly += u32::from(last > DURABLE);
        }
    }
    assert!(partly > 0, "whole entries of it stay");
    // Zeros behind it, and a file that ends early, are no hole.
    let mut longer = cut.bytes.clone();
    longer.resize(longer.len() + 3 * PAGE, 0);
    assert_eq!(cut.opened(&longer).await, Ok(DURABLE + LAST));
    assert_eq!(cut.opened(&cut.bytes[..cut.begin + 100]).await, Ok(DURABLE));
}

/// The first header of the write lies in two sectors, and either of them is missing.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_header_is_a_hole() {
    let begin = PowerCut::new(0).await.begin;
    for before in 1..=6 {
        let extra = (2 * SECTOR - before - begin % SECTOR) % SECTOR;
        let cut = PowerCut::new(extra).await;
        let sector = cut.begin.next_multiple_of(SECTOR);
        assert_eq!(sector - cut.begin, before);
        for missing in [cut.begin..sector, sector..sector + SECTOR, cut.begin..sector + PAGE] {
            let mut bytes = cut.bytes.clone();
            bytes[missing.clone()].fill(0);
            assert_eq!(cut.opened(&bytes).await, Ok(DURABLE), "{missing:?}");
        }
    }
}

/// What the marker tells of is missed where a hole takes it away, and a bit that flipped is no hole.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_on_disk_is_not_cut_off() {
    let cut = PowerCut::new(0).await;
    for bit in (8 * cut.begin..8 * cut.bytes.len()).step_by(99_991) {
        let mut bytes = cut.bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let error = cut.opened(&bytes).await.unwrap_err();
        assert!(error.contains("Corruption"), "bit {bit}: {error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.log().blocking_append((0..DURABLE).map(|index| large(index, 0))).await.unwrap();
    store.close().unwrap();
    let file = wal(dir.path());
    let mut bytes = fs::read(&file).unwrap();
    bytes[5 * PAGE..6 * PAGE].fill(0);
    fs::write(&file, &bytes).unwrap();
    let error = Store::open(&options(dir.path())).err().expect("it is refused");
    assert!(matches!(error, OpenError::LostData { .. }), "{error}");
    // It was taken for an unfinished write until the marker had its say; what was cut off is there still.
    let torn = fs::read(file.with_extension("torn")).unwrap();
    assert_eq!(torn, bytes[bytes.len() - torn.len()..]);
}
