//! Followers that are slower than the writers: they cost neither the leader's disk nor themselves the chance to
//! catch up.

mod common;

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use common::cluster::{Cluster, FAST, expect_ok};
use common::load::{Load, LoadOptions};
use common::proxy::Proxy;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Each of these tests takes what the machine has.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn directory_bytes(path: &Path) -> u64 {
    // Files come and go meanwhile.
    let files = std::fs::read_dir(path).unwrap().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// A follower that answers, but takes less than is written, does not keep the leader's log from being cut: it gets
/// a snapshot, and catches up when it is faster.
#[test]
fn a_follower_slower_than_the_writers_does_not_fill_the_leaders_disk() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
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
    cluster.change_membership(&[1, 2, 3]);
    cluster.await_ready();
    way.slow_down(1 << 20);
    let options =
        LoadOptions { writers: 4, keys: 20, value_bytes: VALUE_BYTES, ..Default::default() };
    let load = Load::start(vec![cluster.http(1).to_owned()], options);
    let database = cluster.data_dir(1).join("db");
    let mut largest = 0;
    let acknowledged = || load.acknowledged();
    common::eventually_by_progress("enough is written", acknowledged, || {
        largest = largest.max(directory_bytes(&database));
        (load.acknowledged() * (VALUE_BYTES as u64) >= WRITTEN_BYTES).then_some(())
    });
    let promises = load.stop();
    assert!(largest < 8 * LOG_BYTES_MAX, "the leader had {largest} bytes on disk");
    way.slow_down(0);
    cluster.await_caught_up();
    assert!(cluster.log(3).contains("installed a snapshot"), "the follower was never behind");
    promises.check(cluster.http(3), "?consistency=stale", &[]);
}

/// A node that needs the whole state gets it once, also when more is written while it is on its way than the log
/// may hold otherwise: what was written is still there then.
#[test]
fn a_snapshot_that_takes_long_is_sent_once() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    const VALUE_BYTES: usize = 64 << 10;
    const LOG_BYTES_MAX: u64 = 64 << 20;
    /// More than the log, at twice its size, may hold if the state is small.
    const WRITTEN_BYTES: u64 = 2 * LOG_BYTES_MAX + (24 << 20);
    /// More than that and what RocksDB has not removed yet of older entries, so that keeping the log costs less than
    /// sending the state again.
    const STATE_BYTES: usize = WRITTEN_BYTES as usize + (128 << 20);
    let config = format!(
        "[storage]\nmemtable_bytes = 4194304\nlog_bytes_max = {LOG_BYTES_MAX}\n\
         {FAST}\nsnapshot_log_entries = 200\nlog_entries_kept = 20\nsnapshot_chunk_bytes = 524288\n\
         append_bytes_max = 524288\n"
    );
    let cluster = Cluster::start(2, &config);
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    cluster.await_node(1, "leads", |m| m["state"] == "leader");
    write_noise(cluster.http(1), STATE_BYTES / VALUE_BYTES, VALUE_BYTES);
    let way = Proxy::start(cluster.rpc(2));
    way.slow_down(1 << 20);
    let options =
        LoadOptions { writers: 4, keys: 20, value_bytes: VALUE_BYTES, ..Default::default() };
    let load = Load::start(vec![cluster.http(1).to_owned()], options);
    let learner = format!("[2,\"{}\",\"{}\"]", cluster.http(2), way.address());
    expect_ok(&cluster.post(1, "/cluster/add-learner", &learner));
    load.await_more("while the state is on its way", WRITTEN_BYTES / VALUE_BYTES as u64);
    load.stop();
    let installed = || cluster.log(2).matches("installed a snapshot").count();
    assert_eq!(installed(), 0, "the state was there before enough was written");
    // There are newer snapshots soon, while what was written is on its way.
    let options = LoadOptions { writers: 4, keys: 20, ..Default::default() };
    let load = Load::start(vec![cluster.http(1).to_owned()], options);
    way.slow_down(0);
    let carried = || way.carried();
    let there = || (installed() > 0).then_some(());
    common::eventually_by_progress("the state is there", carried, there);
    way.slow_down(16 << 20);
    let applied = |id| cluster.metrics(id).and_then(|m| m["last_applied"].as_u64());
    let goal = applied(1).unwrap();
    let behind = || applied(2);
    let caught_up = || (applied(2)? >= goal).then_some(());
    common::eventually_by_progress("what was written meanwhile is there", behind, caught_up);
    assert_eq!(installed(), 1, "the state was sent again");
    load.stop();
}

/// Writes values that no compression makes smaller.
fn write_noise(http: &str, count: usize, value_bytes: usize) {
    std::thread::scope(|scope| {
        for writer in 0..4_u64 {
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(writer);
                let mut value = vec![0; value_bytes];
                for n in 0..count / 4 {
                    random.fill(&mut value[..]);
                    let written = common::put(http, &format!("/v1/kv/noise-{writer}-{n}"), &value);
                    assert_eq!(written.status, 200, "{written:?}");
                }
            });
        }
    });
}
