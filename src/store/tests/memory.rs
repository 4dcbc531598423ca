//! Rows in memory: what writes and readers see of them while they come and go.

use super::*;

/// Readers never see a key go back or away, whatever is frozen, flushed or compacted meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn reads_never_go_back_while_memtables_are_flushed() {
    const KEYS: u64 = 50;
    let dir = tempfile::tempdir().unwrap();
    let mut small = options(dir.path());
    small.storage.memtable_bytes = 1 << 10;
    let store = Store::open(&small).unwrap();
    let mut machine = store.state_machine();
    let put = |i: u64| put_entry(i, &format!("k{}", i % KEYS), "some value");
    apply(&mut machine, (0..KEYS).map(put).collect()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let (reader, stopped) = (store.reader(), stop.clone());
    let reading = tokio::task::spawn_blocking(move || {
        let mut newest = [0; KEYS as usize];
        let mut reads = 0;
        while !stopped.load(Ordering::Relaxed) {
            for (i, newest) in newest.iter_mut().enumerate() {
                let Lookup::Found(record) = reader.get(format!("k{i}").as_bytes()).unwrap() else {
                    panic!("k{i} is gone after revision {newest}");
                };
                assert!(record.revision >= *newest, "k{i} went back");
                *newest = record.revision;
                reads += 1;
            }
        }
        reads
    });
    for i in KEYS..20_000 {
        apply(&mut machine, vec![put(i)]).await;
    }
    stop.store(true, Ordering::Relaxed);
    assert!(reading.await.unwrap() > KEYS);
    assert!(store.reader().disk_bytes().unwrap() > 0, "nothing was flushed");
    assert_eq!(store.reader().key_count().unwrap(), KEYS);
}

/// Writes of one entry see those before them, however large values are, and so do readers afterwards.
#[tokio::test]
async fn later_writes_of_an_entry_see_earlier_ones() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut machine = store.state_machine();
    for (index, bytes) in [(1, 10), (2, 100_000)] {
        let (key, before) = (Bytes::from(format!("k{index}")), store.reader().revision());
        let put = |text: &str, condition| {
            Write::put(key.clone(), Bytes::from(text.repeat(bytes)), condition)
        };
        let writes = vec![
            put("a", Condition::Absent),
            put("b", Condition::Absent),
            put("c", Condition::Revision(before + 1)),
            put("d", Condition::Revision(before + 1)),
        ];
        let entry = command_entry(index, Command::Write(Writes::new(index, &writes)));
        apply(&mut machine, vec![entry]).await;
        assert_eq!(store.reader().revision(), before + 2, "two of four took place");
        assert_eq!(value(&store, &format!("k{index}")), Some("c".repeat(bytes)));
    }
}

/// Apply ends with an error, and does not wait for ever, when its rows cannot be written.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_flush_is_final() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = options(dir.path());
    small.storage.memtable_bytes = 1 << 10;
    let store = Store::open(&small).unwrap();
    let mut machine = store.state_machine();
    // The flush cannot write its file where a directory is.
    std::fs::create_dir(small.dir.join(flush::FILE_NAME)).unwrap();
    let applying = async {
        for i in 0..10_000 {
            let entry = Ok((put_entry(i, &format!("k{i}"), "some value"), None));
            if machine.apply(stream::iter([entry])).await.is_err() {
                return i;
            }
        }
        panic!("nothing was noticed")
    };
    tokio::time::timeout(Duration::from_secs(20), applying).await.unwrap();
    assert!(store.reader().failure().borrow().as_ref().unwrap().contains("flush"));
    assert!(store.reader().get(b"k0").is_err());
    assert!(store.close().is_err());
}
