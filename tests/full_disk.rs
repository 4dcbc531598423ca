//! A disk that takes no more: the node says so, acknowledges nothing that is not on disk, stays up to
//! tell why, and comes back with everything that it acknowledged.
//!
//! The full disk is a limit on file sizes (`RLIMIT_FSIZE`), set on the running process at a chosen
//! moment: writes beyond it fail with an error, as they do without space. No privileges are needed.

mod common;

use std::process::Command;
use std::time::Duration;

use common::cluster::{Cluster, FAST, expect_ok};
use common::line::{Line, try_request};
use common::load::{Load, LoadOptions};
use common::{PATIENCE, eventually};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;

/// Starts the nodes so that a write beyond the limit fails instead of killing them.
fn formed(count: u64, config: &str) -> Cluster {
    let mut cluster = Cluster::formed(count, config);
    for id in cluster.ids() {
        cluster.kill9(id);
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_raft-kv")]);
        cluster.restart_by(id, command);
    }
    cluster.await_ready();
    cluster
}

/// From now on no file of the node grows beyond so many bytes.
fn fill_disk(cluster: &Cluster, id: u64, file_bytes_max: u64) {
    let pid = Pid::from_raw(cluster.node(id).pid().cast_signed()).expect("a process id");
    // Only the soft limit: raising the hard one again would need privileges.
    let limit =
        Rlimit { current: Some(file_bytes_max), maximum: getrlimit(Resource::Fsize).maximum };
    prlimit(Some(pid), Resource::Fsize, limit).expect("the node is ours");
}

/// A single node whose disk fills up under load.
#[test]
fn a_node_with_a_full_disk_acknowledges_nothing_more() {
    let mut cluster = formed(1, FAST);
    let options = LoadOptions { writers: 4, value_bytes: 10_000, ..Default::default() };
    let load = Load::start(cluster.addresses(), options.clone());
    load.await_more("before the disk is full", 100);
    // Less than the log has already: the next write fails.
    fill_disk(&cluster, 1, 1 << 16);
    let address = cluster.http(1).to_owned();
    let refused = eventually("the node says that its storage has failed", || {
        let answer = try_request(&address, "PUT", "/v1/kv/late", &[], b"v", PATIENCE).ok()?;
        (answer.status != 200).then_some(answer)
    });
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (500, &json!("STORAGE")));
    let acknowledged = load.acknowledged();
    // From here on nothing is acknowledged, and it knows before it tries.
    let mut line = Line::new(&address, PATIENCE);
    for n in 0..50 {
        let path = format!("/v1/kv/late{n}");
        let answer = line.request("PUT", &path, &[], b"v").expect("it stays up");
        answer.assert_error(500, "STORAGE", "not_applied");
    }
    let read = line.request("GET", "/v1/kv/k-0-0", &[], b"").expect("it stays up");
    read.assert_error(500, "STORAGE", "not_applied");
    assert_eq!(line.request("GET", "/readyz", &[], b"").unwrap().status, 503);
    assert!(cluster.node_mut(1).is_running());
    let promises = load.stop();
    // What was on disk before the failure may still be answered after it: one write of each writer.
    let last_answers = promises.acknowledged - acknowledged;
    assert!(last_answers <= options.writers as u64, "{last_answers} writes were acknowledged");
    // Space that comes back does not make it trust its disk again.
    fill_disk(&cluster, 1, 1 << 40);
    let answer = line.request("PUT", "/v1/kv/late", &[], b"v").expect("it stays up");
    answer.assert_error(500, "STORAGE", "not_applied");
    let reasons = cluster.log(1).lines().filter(|l| l.contains("storage has failed")).count();
    assert!((1..=5).contains(&reasons), "its log says why, and not too often: {reasons}");

    // It can still be stopped in an orderly way.
    let status = cluster.node_mut(1).terminate();
    assert!(status.code().is_some(), "it ended by itself: {status:?}");
    cluster.restart(1);
    cluster.await_ready();
    promises.check(&address, "", &[]);
    for n in 0..50 {
        assert_eq!(cluster.read(1, &format!("late{n}"), "", &[]), None, "it was not applied");
    }
    let load = Load::resume(cluster.addresses(), options, promises);
    load.await_more("with space again", 100);
    load.stop().check(&address, "", &[]);
}

/// The leader's disk fills up: the others go on without it, and nothing acknowledged is lost.
#[test]
fn a_cluster_goes_on_when_its_leaders_disk_is_full() {
    let mut cluster = formed(3, FAST);
    let options =
        LoadOptions { value_bytes: 5000, timeout: Duration::from_secs(4), ..Default::default() };
    let load = Load::start(cluster.addresses(), options);
    load.await_more("before the disk is full", 100);
    let full = cluster.leader();
    fill_disk(&cluster, full, 1 << 16);
    load.await_more("with two disks", 200);
    assert!(cluster.node_mut(full).is_running());
    let promises = load.stop();
    let healthy: Vec<String> =
        cluster.ids().filter(|id| *id != full).map(|id| cluster.http(id).to_owned()).collect();
    promises.check_all(&healthy);

    cluster.kill9(full);
    cluster.restart(full);
    cluster.await_ready();
    cluster.await_caught_up();
    promises.check(cluster.http(full), "", &[("Kv-Read", "follower")]);
    promises.check(cluster.http(full), "?consistency=stale", &[]);
    expect_ok(&common::put(cluster.http(full), "/v1/kv/again", b"v"));
}
