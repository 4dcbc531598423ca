//! What a cluster must stand for longer, or all at once: killed and paused leaders under a minute of
//! load, ten thousand writes at the same moment, large values, a follower that does not keep up.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::cluster::{Cluster, FAST};
use common::load::{Load, LoadOptions};
use common::watch::Watch;
use common::{PATIENCE_WITH_PROGRESS, put};
use distrib_kv_store::kvclient::KVClient;

/// How long leaders are killed under load, at least: until so many are lost, and so many reads
/// watched, that it tells something.
const ENDURANCE: Duration = Duration::from_secs(60);
const LEADERS_LOST_MIN: u64 = 6;
const READS_MIN: u64 = 1000;

/// How long a call may take that waits for thousands of others, or for megabytes.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Writes at the same moment.
const BURST: usize = 10_000;

/// The largest value that the default limits allow, in bytes.
const VALUE_BYTES_MAX: usize = 1 << 20;

/// A minute of writes and reads in which every leader is killed or paused soon after it was elected:
/// every acknowledged write is there in the end, and no linearizable read was ever too old.
#[test]
fn a_minute_of_lost_leaders_costs_no_acknowledged_write_and_no_read_is_stale() {
    leaders_are_lost_for_a_minute("");
}

/// The same with leaders that do not ask for each read.
#[test]
fn a_minute_of_lost_leaders_with_leases_costs_no_acknowledged_write_and_no_read_is_stale() {
    leaders_are_lost_for_a_minute("read_lease_ms = 100");
}

fn leaders_are_lost_for_a_minute(raft: &str) {
    let config = format!("{FAST}\nsnapshot_log_entries = 3000\nlog_entries_kept = 200\n{raft}\n");
    let mut cluster = Cluster::formed(3, &config);
    let timeout = Duration::from_secs(3);
    let options = LoadOptions { writers: 4, keys: 200, timeout, ..Default::default() };
    let load = Load::start(cluster.addresses(), options);
    let watch = Watch::start(cluster.addresses(), timeout);
    let began = Instant::now();
    let mut lost = 0;
    while began.elapsed() < ENDURANCE || lost < LEADERS_LOST_MIN || watch.reads() < READS_MIN {
        let reads = watch.reads();
        assert!(
            began.elapsed() < PATIENCE_WITH_PROGRESS,
            "{lost} leaders lost, {reads} reads watched: too few to tell"
        );
        load.await_more("before the next leader goes", 200);
        let leader = cluster.leader();
        if lost % 3 == 2 {
            cluster.pause(leader);
            load.await_more("with the leader asleep", 100);
            cluster.resume(leader);
        } else {
            cluster.kill9(leader);
            load.await_more("without the leader", 100);
            cluster.restart(leader);
        }
        cluster.await_ready();
        lost += 1;
    }
    watch.stop();
    let promises = load.stop();
    cluster.await_caught_up();
    promises.check_all(&cluster.addresses());
    for address in cluster.addresses() {
        promises.check(&address, "?consistency=stale", &[]);
    }
}

async fn kv_client(cluster: &Cluster) -> KVClient {
    let file = cluster.path("all_nodes.json");
    std::fs::write(&file, serde_json::to_vec(&[cluster.addresses()]).unwrap()).unwrap();
    KVClient::new(&file).await.unwrap().with_timeout(CALL_TIMEOUT)
}

/// Ten thousand tasks write at the same moment, and then all read: each is answered, exactly.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_writes_at_once_are_all_answered() {
    let cluster = Cluster::formed(3, FAST);
    let client = kv_client(&cluster).await;
    let start = Arc::new(tokio::sync::Barrier::new(BURST));
    let writers = (0..BURST).map(|n| {
        let (client, start) = (client.clone(), Arc::clone(&start));
        tokio::spawn(async move {
            start.wait().await;
            client.write(format!("burst-{n}"), format!("value-{n}")).await
        })
    });
    let writers: Vec<_> = writers.collect();
    let mut revisions = Vec::with_capacity(BURST);
    for writer in writers {
        revisions.push(writer.await.unwrap().expect("every write is acknowledged"));
    }
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!(revisions.len(), BURST, "each write has a revision of its own");
    let readers = (0..BURST).map(|n| {
        let client = client.clone();
        tokio::spawn(async move { client.consistent_read(format!("burst-{n}")).await })
    });
    let readers: Vec<_> = readers.collect();
    for (n, reader) in readers.into_iter().enumerate() {
        assert_eq!(reader.await.unwrap().unwrap(), Some(Bytes::from(format!("value-{n}"))));
    }
}

/// Values of the largest size go in and come out through every way, several at once, and one byte more
/// is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_values_pass_through_every_way() {
    let cluster = Cluster::formed(3, FAST);
    let client = kv_client(&cluster).await;
    let value = |seed: u8| -> Vec<u8> {
        (0..VALUE_BYTES_MAX as u32).map(|n| (n.wrapping_mul(31) >> 3) as u8 ^ seed).collect()
    };
    let writers = (0..8).map(|n| {
        let client = client.clone();
        let value = value(n);
        tokio::spawn(async move { client.write(format!("large-{n}"), value).await })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap().unwrap();
    }
    for n in 0..8 {
        assert!(client.consistent_read(format!("large-{n}")).await.unwrap().unwrap() == value(n));
    }
    tokio::task::spawn_blocking(move || {
        for id in cluster.ids() {
            let path = format!("/v1/kv/plain-{id}");
            assert_eq!(put(cluster.http(id), &path, &value(id as u8)).status, 200);
            for by in cluster.ids() {
                assert!(cluster.get(by, &path).body == value(id as u8), "node {by}");
            }
        }
        let too_large = put(cluster.http(1), "/v1/kv/k", &vec![0; VALUE_BYTES_MAX + 1]);
        too_large.assert_error(413, "TOO_LARGE", "not_applied");
    })
    .await
    .unwrap();
}

/// A follower that sleeps, and one that gets a tenth of the time: the others write on, the leader's
/// memory does not grow with what the follower misses, and the follower catches up.
#[test]
fn a_slow_follower_costs_the_leader_no_memory() {
    const VALUE_BYTES: usize = 64 << 10;
    const BEHIND: u64 = 3000;
    let config = format!(
        "[storage]\nblock_cache_bytes = 8388608\nmemtable_bytes = 4194304\nlog_tail_bytes = 4194304\n\
         {FAST}\nsnapshot_log_entries = 500\nlog_entries_kept = 50\n"
    );
    let mut cluster = Cluster::formed(3, &config);
    let options =
        LoadOptions { writers: 4, keys: 20, value_bytes: VALUE_BYTES, ..Default::default() };
    let load = Load::start(cluster.addresses(), options);
    // What is bounded by configuration, and what the allocator keeps, is there after a while.
    load.await_more("until memory is in use", BEHIND / 2);
    let follower = cluster.follower();
    // Either of the others may lead by the end.
    let awake: Vec<u64> = cluster.ids().filter(|id| *id != follower).collect();
    let memory = |cluster: &Cluster| -> Vec<u64> {
        awake.iter().map(|id| cluster.node(*id).resident_bytes()).collect()
    };
    let before = memory(&cluster);

    cluster.pause(follower);
    load.await_more("with a follower asleep", BEHIND);
    let asleep = memory(&cluster);
    cluster.resume(follower);
    for _ in 0..40 {
        cluster.pause(follower);
        std::thread::sleep(Duration::from_millis(90));
        cluster.resume(follower);
        std::thread::sleep(Duration::from_millis(10));
    }
    let slow = memory(&cluster);
    let promises = load.stop();

    let missed = BEHIND * VALUE_BYTES as u64;
    for (when, now) in [("asleep", asleep), ("slow", slow)] {
        for (before, now) in before.iter().zip(now) {
            let grown = now.saturating_sub(*before);
            assert!(grown < missed / 2, "{when}: {grown} bytes more, of {missed} that it missed");
        }
    }
    cluster.await_caught_up();
    promises.check(cluster.http(follower), "?consistency=stale", &[]);
}
