//! Followers that are slower than the writers: they cost neither the leader's disk nor themselves the chance to
//! catch up.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::cluster::{Cluster, FAST, expect_ok};
use common::load::{Load, LoadOptions};
use common::proxy::Proxy;

/// Of each turn, a slow follower is awake for the first time and asleep for the second.
const AWAKE: Duration = Duration::from_millis(10);
const ASLEEP: Duration = Duration::from_millis(90);

/// Lets a follower work a tenth of the time until `done`. The pauses are not waits for something: they are what
/// makes it slow.
fn slow_until(cluster: &mut Cluster, follower: u64, mut done: impl FnMut(&Cluster) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done(cluster) {
        assert!(Instant::now() < deadline, "not in time with follower {follower} slow");
        cluster.pause(follower);
        std::thread::sleep(ASLEEP);
        cluster.resume(follower);
        std::thread::sleep(AWAKE);
    }
}

fn directory_bytes(path: &Path) -> u64 {
    // Files come and go meanwhile.
    let files = std::fs::read_dir(path).unwrap().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// A follower that answers, but takes less than is written, does not keep the leader's log from being cut: it gets
/// a snapshot, and catches up when it is faster.
#[test]
fn a_follower_slower_than_the_writers_does_not_fill_the_leaders_disk() {
    const VALUE_BYTES: usize = 64 << 10;
    const LOG_BYTES_MAX: u64 = 64 << 20;
    const WRITTEN_BYTES: u64 = 10 * LOG_BYTES_MAX;
    let config = format!(
        "[storage]\nmemtable_bytes = 4194304\nlog_tail_bytes = 4194304\nlog_bytes_max = {LOG_BYTES_MAX}\n\
         {FAST}\nsnapshot_log_entries = 500\nlog_entries_kept = 50\nappend_bytes_max = 131072\n"
    );
    let cluster = Cluster::start(3, &config);
    let way = Proxy::start(cluster.rpc(3));
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    cluster.add_learner(1, 2);
    let slow = format!("[3,\"{}\",\"{}\"]", cluster.http(3), way.address());
    expect_ok(&cluster.post(1, "/cluster/add-learner", &slow));
    expect_ok(&cluster.post(1, "/cluster/change-membership", "[1,2,3]"));
    cluster.await_ready();
    way.slow_down(1 << 20);
    let options =
        LoadOptions { writers: 4, keys: 20, value_bytes: VALUE_BYTES, ..Default::default() };
    let load = Load::start(vec![cluster.http(1).to_owned()], options);
    let database = cluster.data_dir(1).join("db");
    let (mut largest, deadline) = (0, Instant::now() + 3 * PATIENCE);
    while load.acknowledged() * (VALUE_BYTES as u64) < WRITTEN_BYTES {
        assert!(Instant::now() < deadline, "not in time: enough is written");
        largest = largest.max(directory_bytes(&database));
        std::thread::sleep(Duration::from_millis(20));
    }
    let promises = load.stop();
    assert!(largest < 6 * LOG_BYTES_MAX, "the leader had {largest} bytes on disk");
    way.slow_down(0);
    cluster.await_caught_up();
    promises.check(cluster.http(3), "?consistency=stale", &[]);
}

/// A node that needs the whole state gets it once, however many entries are written while it is on its way: the
/// log after it is still there then.
#[test]
fn a_snapshot_that_takes_long_is_sent_once() {
    const KEYS: u64 = 400;
    const VALUE_BYTES: usize = 64 << 10;
    let config = format!(
        "[storage]\nmemtable_bytes = 4194304\n{FAST}\nsnapshot_log_entries = 200\nlog_entries_kept = 20\n\
         snapshot_chunk_bytes = 65536\n"
    );
    let mut cluster = Cluster::start(4, &config);
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    let big = LoadOptions {
        writers: 4,
        keys: KEYS / 4,
        value_bytes: VALUE_BYTES,
        prefix: "big".into(),
        ..Default::default()
    };
    let load = Load::start(vec![cluster.http(1).to_owned()], big);
    load.await_more("until there is much to send", KEYS);
    load.stop();
    // Small writes go on while the state is on its way to the new node, for many times the entries between
    // two snapshots.
    let options = LoadOptions { writers: 4, keys: 20, ..Default::default() };
    let load = Load::start(vec![cluster.http(1).to_owned()], options);
    let before = load.acknowledged();
    cluster.pause(4);
    let add = {
        let (leader, body) = (
            cluster.http(1).to_owned(),
            format!("[4,\"{}\",\"{}\"]", cluster.http(4), cluster.rpc(4)),
        );
        std::thread::spawn(move || common::post(&leader, "/cluster/add-learner", &body).status)
    };
    let installed = |cluster: &Cluster| cluster.log(4).matches("installed a snapshot").count();
    slow_until(&mut cluster, 4, |cluster| installed(cluster) > 0);
    let meanwhile = load.acknowledged() - before;
    assert!(meanwhile > 3 * 200, "only {meanwhile} entries were written while the state was sent");
    // Up to what there was when it had the state: from the log.
    let goal = cluster.metrics(1).unwrap()["last_applied"].as_u64();
    cluster.await_node(4, "has what was written meanwhile", |m| m["last_applied"].as_u64() >= goal);
    assert_eq!(installed(&cluster), 1, "the state was sent again");
    load.stop();
    assert_eq!(add.join().unwrap(), 200);
}
