//! What nodes do unasked: a leader whose storage failed makes way, and a membership change that was
//! left half done is finished.

mod common;

use common::cluster::{Cluster, FAST, expect_ok};
use common::{eventually, get, post, put};
use serde_json::json;

/// Storage that fails outside of an append, here because the marker cannot be written, stops the
/// leader: the others go on, and it says why it does not.
#[test]
fn a_leader_whose_storage_failed_makes_way() {
    let cluster = Cluster::formed(3, FAST);
    let failed = cluster.leader();
    std::fs::create_dir(cluster.data_dir(failed).join("marker.tmp")).unwrap();
    let other = cluster.ids().find(|id| *id != failed).unwrap();
    eventually("the leader's storage fails", || {
        put(cluster.http(other), "/v1/kv/k", b"v");
        cluster.metrics(failed)?["failed"].is_string().then_some(())
    });
    eventually("the others take writes", || {
        (put(cluster.http(other), "/v1/kv/after", b"v").status == 200).then_some(())
    });
    assert_ne!(cluster.metrics(failed).unwrap()["state"], "leader");
    put(cluster.http(failed), "/v1/kv/k", b"v").assert_error(500, "STORAGE", "not_applied");
    assert_eq!(get(cluster.http(failed), "/livez").status, 503);
    assert_eq!(get(cluster.http(failed), "/readyz").status, 503);
}

/// A membership change whose caller gave up half way is carried to its end: the cluster then lives
/// without any one of its nodes.
#[test]
fn a_membership_change_is_carried_to_its_end() {
    let config = format!("[limits]\nrequest_timeout_ms = 1500\n{FAST}");
    let mut cluster = Cluster::start(3, &config);
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    for id in [2, 3] {
        cluster.add_learner(1, id);
    }
    for id in [2, 3] {
        cluster.await_node(id, "follows", |m| m["learners"] == json!([2, 3]));
    }
    // The change begins once the leader has heard that they caught up; then it cannot commit.
    eventually("a membership change begins and does not end", || {
        [2, 3].iter().for_each(|id| cluster.pause(*id));
        let changed = post(cluster.http(1), "/cluster/change-membership", "[1,2,3]");
        if changed.json()["error"]["outcome"] == "not_applied" {
            [2, 3].iter().for_each(|id| cluster.resume(*id));
            return None;
        }
        changed.assert_error(504, "TIMEOUT", "unknown");
        Some(())
    });
    for id in [2, 3] {
        cluster.resume(id);
    }
    cluster.await_all("has the whole new membership", |m| {
        m["voters"] == json!([1, 2, 3]) && m["joint"] == false
    });
    cluster.kill9(1);
    eventually("two of three go on", || {
        (put(cluster.http(2), "/v1/kv/after", b"v").status == 200).then_some(())
    });
}
