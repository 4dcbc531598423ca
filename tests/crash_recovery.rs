//! kill -9 at random moments under load: whatever was acknowledged is there after the restart, and
//! nothing that was applied is applied again.

mod common;

use std::time::Duration;

use common::cluster::{Cluster, FAST, splitmix};
use common::load::{Load, LoadOptions, Promises};
use common::{PATIENCE, eventually};

/// The seed of all moments and victims. `KV_TEST_SEED` looks elsewhere.
const SEED: u64 = 20_240_607;

/// Kills of the single node.
const ROUNDS_ALONE: u64 = 15;

/// Faults of the three nodes.
const ROUNDS_OF_THREE: u64 = 8;

/// A number below `end`, chosen by the seed.
fn choose(round: u64, what: u64, end: u64) -> u64 {
    let seed = std::env::var("KV_TEST_SEED").map_or(SEED, |seed| seed.parse().expect("a number"));
    splitmix(seed ^ (round << 8) ^ what) % end
}

/// A single node that is killed again and again, also while it starts, loses nothing and repeats
/// nothing.
#[test]
fn a_killed_node_has_every_acknowledged_write() {
    // Small memtables and snapshots, so that kills hit flushes, compactions and purges as well.
    let config = format!(
        "[storage]\nmemtable_bytes = 1048576\n{FAST}\nsnapshot_log_entries = 300\nlog_entries_kept = 20\n"
    );
    let mut cluster = Cluster::formed(1, &config);
    let start = revision(&cluster);
    let options = LoadOptions { writers: 6, keys: 40, value_bytes: 3000, ..Default::default() };
    let mut promises = Promises::default();
    for round in 0..ROUNDS_ALONE {
        let load = Load::resume(cluster.addresses(), options.clone(), promises);
        load.await_more("before the kill", 1 + choose(round, 0, 400));
        cluster.kill9(1);
        promises = load.stop();
        cluster.restart(1);
        cluster.await_ready();
        promises.check(cluster.http(1), "", &[]);
        // Every write makes one revision. Those that nobody knows about may have made one or not.
        let made = revision(&cluster) - start;
        let allowed = promises.acknowledged..=promises.acknowledged + promises.unknown;
        assert!(allowed.contains(&made), "round {round}: {made} revisions, not in {allowed:?}");
    }
}

/// The same without load: what is there stays as it is, revision and log included, however often the
/// node is killed.
#[test]
fn a_restart_applies_nothing_again() {
    let mut cluster = Cluster::formed(1, FAST);
    let load = Load::start(cluster.addresses(), LoadOptions::default());
    load.await_more("before the kills", 200);
    let promises = load.stop();
    let revision_before = revision(&cluster);
    assert_eq!(revision_before, promises.acknowledged, "one revision for each write");
    for round in 0..3 {
        cluster.kill9(1);
        cluster.restart(1);
        cluster.await_ready();
        assert_eq!(revision(&cluster), revision_before, "round {round}");
        promises.check(cluster.http(1), "?consistency=stale", &[]);
    }
}

/// Three nodes under load, one or two of which are killed or paused at random: nothing acknowledged
/// is lost, and all replicas are equal in the end.
#[test]
fn random_faults_in_three_nodes_cost_no_acknowledged_write() {
    let config = format!("{FAST}\nsnapshot_log_entries = 400\nlog_entries_kept = 50\n");
    let mut cluster = Cluster::formed(3, &config);
    let options = LoadOptions {
        writers: 6,
        keys: 40,
        value_bytes: 500,
        timeout: Duration::from_secs(3),
        ..Default::default()
    };
    let load = Load::start(cluster.addresses(), options);
    for round in 0..ROUNDS_OF_THREE {
        load.await_more("between faults", 1 + choose(round, 1, 300));
        let first = 1 + choose(round, 2, 3);
        let second = 1 + (first + choose(round, 3, 2)) % 3;
        match choose(round, 4, 4) {
            0 => {
                cluster.kill9(first);
                load.await_more("with two of three nodes", 50);
                cluster.restart(first);
            }
            1 => {
                cluster.pause(first);
                load.await_more("with one of three nodes asleep", 50);
                cluster.resume(first);
            }
            2 => {
                cluster.kill9(first);
                cluster.kill9(second);
                cluster.restart(second);
                load.await_more("with one of two nodes back", 50);
                cluster.restart(first);
            }
            _ => {
                cluster.ids().for_each(|id| cluster.kill9(id));
                cluster.ids().for_each(|id| cluster.restart(id));
            }
        }
    }
    load.await_more("after the last fault", 100);
    let promises = load.stop();
    cluster.await_caught_up();
    promises.check_all(&cluster.addresses());
    for address in cluster.addresses() {
        promises.check(&address, "?consistency=stale", &[]);
    }
    replicas_are_equal(&cluster, &promises);
}

/// All replicas hold the same values at the same revisions, writes of unknown outcome included.
fn replicas_are_equal(cluster: &Cluster, promises: &Promises) {
    cluster.await_caught_up();
    for key in promises.keys.keys() {
        let path = format!("/v1/kv/{key}?consistency=stale");
        let seen = cluster.ids().map(|id| {
            let answer = cluster.get(id, &path);
            (answer.status, answer.header("etag").map(str::to_owned), answer.body)
        });
        let seen: Vec<_> = seen.collect();
        assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "replicas differ at {key}");
    }
    let revisions = cluster.ids().map(|id| cluster.metrics(id).unwrap()["revision"].as_u64());
    let revisions: Vec<_> = revisions.collect();
    assert!(revisions.windows(2).all(|pair| pair[0] == pair[1]), "{revisions:?}");
}

/// The revision of node 1's state machine, once that is up to date.
fn revision(cluster: &Cluster) -> u64 {
    eventually(&format!("a revision within {PATIENCE:?}"), || {
        cluster.metrics(1)?["revision"].as_u64()
    })
}
