//! The verbs of `admin` that change the ring: what they refuse, in one clear line, and without a step
//! being proposed to anybody.

use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;

use distrib_kv_store::handoff::{Change, Course, RingState, pairs};
use distrib_kv_store::metrics::HandoffView;
use distrib_kv_store::ring::{Ring, RingCluster, RingNode, RingTable};
use serde_json::{Value, json};
use tokio::process::Command;

mod fake_node;
use fake_node::{FakeNode, Reply, refusing};

async fn admin(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_admin"));
    command.args(arguments).current_dir(dir).stdin(Stdio::null()).kill_on_drop(true);
    command.output().await.unwrap()
}

/// Fails with `code`, and one line that contains `words`.
fn expect(output: &Output, code: i32, words: &str) {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(text.matches('\n').count(), 1, "{text}");
    assert!(text.starts_with("admin: ") && text.contains(words), "{text}");
}

fn cluster(id: &str, http: &str) -> RingCluster {
    let node = RingNode { id: 1, http: http.to_owned(), rpc: format!("{id}:9") };
    RingCluster { id: id.parse().unwrap(), weight: 1.0, nodes: vec![node] }
}

fn ring_of(clusters: Vec<RingCluster>) -> Ring {
    Ring { epoch: 1, sequencer: Some(clusters[0].id.clone()), clusters, ..Ring::none() }
}

/// The leaders of the clusters `c1`, `c2`, ..., each in the state that `change` makes of it.
fn leaders(count: usize, change: impl Fn(&mut RingState, &Ring)) -> Vec<FakeNode> {
    let bound: Vec<_> = (0..count).map(|_| fake_node::bind()).collect();
    let clusters =
        bound.iter().enumerate().map(|(n, b)| cluster(&format!("c{}", n + 1), &b.address));
    let ring = ring_of(clusters.collect());
    let mut state = RingState::with_ring(RingTable::new(ring.clone()).unwrap());
    change(&mut state, &ring);
    let nodes = bound.into_iter().enumerate().map(|(place, bound)| {
        let view = HandoffView {
            cluster: ring.clusters[place].id.clone(),
            node: 1,
            leader: true,
            state: state.clone(),
            keys: Some(1000),
            disk_bytes: Some(1_000_000),
        };
        let (view, address) = (serde_json::to_value(view).unwrap(), bound.address.clone());
        let cluster = ring.clusters[place].id.clone();
        bound.serve(move |seen| match seen.path.split('?').next() {
            Some("/cluster/metrics") => fake_node::metrics(cluster.as_str(), &address),
            Some("/cluster/handoffs") => Reply::Json(200, view.clone()),
            _ => Reply::Text(404, "no such path"),
        })
    });
    nodes.collect()
}

fn endpoints(nodes: &[FakeNode]) -> String {
    nodes.iter().map(|node| node.address.as_str()).collect::<Vec<_>>().join(",")
}

/// A directory with a nodes file that lists these.
fn directory(nodes: &[FakeNode]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let listed: Vec<[&String; 1]> = nodes.iter().map(|node| [&node.address]).collect();
    std::fs::write(dir.path().join("all_nodes.json"), json!(listed).to_string()).unwrap();
    dir
}

fn nothing_was_proposed(nodes: &[FakeNode]) {
    assert!(nodes.iter().all(|node| node.seen("/cluster/step").is_empty()));
}

#[tokio::test]
async fn a_ring_that_cannot_be_is_refused_by_name() {
    let nodes = leaders(2, |_, _| {});
    let dir = directory(&nodes);
    for (arguments, words) in [
        (&["cluster", "remove", "c9"][..], "cluster c9 is not in the ring"),
        (&["cluster", "weight", "c9", "2"], "cluster c9 is not in the ring"),
        (&["cluster", "add", "c1", "--nodes", "a:1/a:2"], "cluster c1 is in the ring already"),
        (&["rebalance", "--dry-run", "--add", "c2:1"], "cluster c2 is in the ring already"),
        (&["migration", "abort"], "no change of the ring is under way"),
    ] {
        expect(&admin(dir.path(), arguments).await, 1, words);
    }
    nothing_was_proposed(&nodes);
}

/// Whoever asks for what is so already has what was asked for: 0, and nothing is proposed to anybody.
#[tokio::test]
async fn what_is_so_already_is_done() {
    let nodes = leaders(2, |_, _| {});
    let dir = directory(&nodes);
    let c2 = format!("{}/c2:9", nodes[1].address);
    let add = ["cluster", "add", "c2", "--nodes", &c2];
    for (arguments, words) in [
        (&["cluster", "weight", "c1", "1"][..], "c1 has weight 1 already; nothing to change\n"),
        (&add, "c2 is in the ring with these nodes and weight 1 already; nothing to change\n"),
    ] {
        let output = admin(dir.path(), arguments).await;
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), words);
        let output = admin(dir.path(), &[arguments, &["--json"]].concat()).await;
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), &told["ring"]["epoch"]), (Some(0), &json!(1)), "{told}");
    }
    let other_weight = [&add[..], &["--weight", "2"]].concat();
    let other_nodes = ["cluster", "add", "c2", "--nodes", "127.0.0.1:9/c2:9"];
    for arguments in [&other_weight[..], &other_nodes] {
        let words = "cluster c2 is in the ring already, with another weight or other nodes";
        expect(&admin(dir.path(), arguments).await, 1, words);
    }
    nothing_was_proposed(&nodes);
}

#[tokio::test]
async fn the_last_cluster_stays() {
    let nodes = leaders(1, |_, _| {});
    let dir = directory(&nodes);
    expect(&admin(dir.path(), &["cluster", "remove", "c1"]).await, 1, "is the last one");
    nothing_was_proposed(&nodes);
}

#[tokio::test]
async fn one_change_at_a_time() {
    let nodes = leaders(2, |state, ring| {
        let next = Ring { epoch: 2, ..ring_of(ring.clusters[..1].to_vec()) };
        state.change = Some(Change {
            plan: pairs(ring, &next),
            next: Arc::new(RingTable::new(next).unwrap()),
            course: Course::Open,
            outgoing: Default::default(),
            incoming: Default::default(),
        });
    });
    let dir = directory(&nodes);
    let output = admin(dir.path(), &["cluster", "weight", "c1", "2"]).await;
    expect(&output, 1, "a change to the ring of epoch 2 is under way; no other was begun");
    let output = admin(dir.path(), &["migration", "status"]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("changing from epoch 1 to 2"), "{text}");
    let output = admin(dir.path(), &["migration", "status", "--json"]).await;
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&told["epoch"], &told["change"]["to_epoch"]), (&json!(1), &json!(2)), "{told}");
    nothing_was_proposed(&nodes);
}

#[tokio::test]
async fn a_cluster_without_a_ring_has_nothing_to_change() {
    let nodes = leaders(1, |state, _| *state = RingState::default());
    let dir = directory(&nodes);
    let file = dir.path().join("all_nodes.json");
    let listed = std::fs::read_to_string(&file).unwrap();
    for verb in [
        &["cluster", "remove", "c1"][..],
        &["rebalance", "--dry-run"],
        &["migration", "resume"],
        &["migration", "status", "--watch"],
    ] {
        expect(&admin(dir.path(), verb).await, 1, "have no ring yet");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), listed, "{verb:?}");
    }
}

/// When a change is finished the nodes file lists who is in the ring, also where the nodes were found by
/// `--endpoints`. But then it is left alone unless it lists some of them, and none is made.
#[tokio::test]
async fn the_nodes_file_follows_however_the_nodes_were_found() {
    let nodes = leaders(2, |_, _| {});
    let dir = directory(&nodes);
    let (file, list) = (dir.path().join("all_nodes.json"), endpoints(&nodes));
    let now = std::fs::read_to_string(&file).unwrap();
    let with_another = now.replace("]]", r#"],["127.0.0.1:9"]]"#);
    let (others, damaged) = (r#"[["127.0.0.1:9"]]"#, "[[");
    let by_endpoints = ["migration", "resume", "--endpoints", &list];
    for (arguments, before, after, is_told) in [
        (&by_endpoints[..2], &with_another[..], &now[..], false),
        (&by_endpoints, &with_another, &now, false),
        (&by_endpoints, others, others, true),
        (&by_endpoints, damaged, damaged, true),
    ] {
        std::fs::write(&file, before).unwrap();
        let output = admin(dir.path(), arguments).await;
        assert_eq!(output.status.code(), Some(0), "{arguments:?}, {before}: {output:?}");
        assert_eq!(
            std::fs::read_to_string(&file).unwrap().trim(),
            after,
            "{arguments:?}, {before}"
        );
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(told.contains("all_nodes.json is left as it is"), is_told, "{before}: {told}");
    }
    std::fs::remove_file(&file).unwrap();
    let output = admin(dir.path(), &by_endpoints).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!file.exists());
}

/// Nothing is wrong with the command when the nodes file is not there, or is none: it failed.
#[tokio::test]
async fn a_nodes_file_that_cannot_be_used_is_1() {
    let dir = tempfile::tempdir().unwrap();
    for listed in [None, Some("[["), Some("[]")] {
        if let Some(listed) = listed {
            std::fs::write(dir.path().join("all_nodes.json"), listed).unwrap();
        }
        for verb in [
            &["cluster", "remove", "c4"][..],
            &["cluster", "weight", "c4", "2"],
            &["cluster", "add", "c4", "--nodes", "a:1/a:2"],
            &["rebalance", "--dry-run"],
            &["migration", "status"],
            &["migration", "resume"],
            &["migration", "abort"],
        ] {
            expect(&admin(dir.path(), verb).await, 1, "all_nodes.json");
        }
    }
}

#[tokio::test]
async fn nobody_there_is_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let dead = refusing();
    std::fs::write(dir.path().join("all_nodes.json"), json!([[dead]]).to_string()).unwrap();
    for verb in
        [&["migration", "status"][..], &["cluster", "remove", "c1"], &["migration", "resume"]]
    {
        expect(&admin(dir.path(), verb).await, 1, &dead);
    }
}

/// Nodes of a new cluster: each is asked who it is before anything else happens.
#[tokio::test]
async fn a_new_clusters_nodes_must_be_what_they_are_said_to_be() {
    let nodes = leaders(1, |_, _| {});
    let dir = directory(&nodes);
    let bound = fake_node::bind();
    let address = bound.address.clone();
    let stranger = bound.serve(move |_| fake_node::metrics("c7", &address));
    let add = |id: &str, http: &str, rpc: &str| {
        let node = format!("{http}/{rpc}");
        ["cluster", "add", id, "--nodes", &node].map(str::to_owned)
    };
    let dead = refusing();
    for (arguments, words) in [
        (add("c4", &stranger.address, "a:2"), "belongs to cluster c7, not to c4"),
        (add("c7", &stranger.address, "a:2"), "serves its peers at"),
        (add("c4", &dead, "a:2"), "all nodes of a new cluster must answer"),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        expect(&admin(dir.path(), &arguments).await, 1, words);
    }
    nothing_was_proposed(&nodes);
    assert!(stranger.seen("/cluster/init").is_empty());
}

#[tokio::test]
async fn a_dry_run_tells_what_would_move() {
    let nodes = leaders(3, |_, _| {});
    let dir = directory(&nodes);
    let arguments = ["rebalance", "--dry-run", "--add", "c4:1", "--json"];
    let output = admin(dir.path(), &arguments).await;
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["basis"], "exact", "{told}");
    assert!((told["share"].as_f64().unwrap() - 0.25).abs() < 1e-9, "{told}");
    assert_eq!((&told["keys"], &told["bytes"]), (&json!(750), &json!(750_000)), "{told}");
    assert_eq!(told["handoffs"].as_array().unwrap().len(), 3, "{told}");
    let output = admin(dir.path(), &["rebalance", "--dry-run"]).await;
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "nothing would move\n");
    nothing_was_proposed(&nodes);
}

/// Wrong usage is told as such, before anybody is asked.
#[tokio::test]
async fn wrong_usage_is_2() {
    let nodes = leaders(1, |_, _| {});
    let dir = directory(&nodes);
    let list = endpoints(&nodes);
    for bad in [
        &["cluster", "weight", "c1", "0"][..],
        &["cluster", "weight", "c1", "-2"],
        &["cluster", "weight", "c1", "NaN"],
        &["cluster", "add", "c 4", "--nodes", "a:1/a:2"],
        &["cluster", "add", "c4", "--nodes", "a:1"],
        &["rebalance"],
        &["rebalance", "--dry-run", "--add", "c4"],
        &["cluster", "remove", "c1", "--endpoints", &list, "--nodes-file", "all_nodes.json"],
    ] {
        let output = admin(dir.path(), bad).await;
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {output:?}");
    }
    assert!(nodes[0].seen("/").is_empty());
}
