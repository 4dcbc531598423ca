//! Three clusters of three nodes and one ring: every key has one owner, every node finds it, and the
//! ring is as durable as the data.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::cluster::{Cluster, FAST, STEADY, expect_ok};
use common::{Answer, eventually};
use distrib_kv_store::cluster_manager::{ClusterManager, ManagerError};
use distrib_kv_store::config::Config;
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::ring::{Ring, RingTable};
use serde_json::{Value, json};

const DIRECT: [(&str, &str); 1] = [("Kv-Routing", "direct")];

/// Concurrent tasks that share one client.
const TASKS: usize = 200;

/// Keys of each task.
const KEYS_PER_TASK: usize = 5;

fn config(dir: &Path, clusters: u32) -> Config {
    let mut config = Config {
        num_clusters: clusters,
        data_dir: dir.join("data"),
        nodes_file: dir.join("all_nodes.json"),
        ..Config::default()
    };
    config.storage.block_cache_bytes = 8 << 20;
    // As in `STEADY`: nodes are asked one after the other, and an election in between would show.
    config.raft.heartbeat_interval_ms = 75;
    config.raft.election_timeout_min_ms = 3000;
    config.raft.election_timeout_max_ms = 4000;
    config
}

/// A blocking request from an async test.
async fn ask(
    address: &str,
    method: &'static str,
    path: String,
    headers: &'static [(&'static str, &'static str)],
    body: &str,
) -> Answer {
    let (address, body) = (address.to_owned(), body.to_owned());
    tokio::task::spawn_blocking(move || {
        common::request(&address, method, &path, headers, body.as_bytes())
    })
    .await
    .unwrap()
}

/// All of it in one story, because starting nine nodes is most of the work: keys spread by the ring,
/// every node serves every key, and all of it is there after a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_clusters_share_the_keys_by_their_ring() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 3);
    let manager = ClusterManager::start_on_free_ports(config.clone()).await.unwrap();
    let nodes = manager.nodes();
    assert_eq!(nodes.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3]);
    let table = RingTable::new(manager.ring().clone()).unwrap();
    assert_eq!(table.ring().epoch, 1);
    every_node_lives_by(&nodes, table.ring()).await;

    let client = KVClient::new(&config.nodes_file).await.unwrap();
    many_tasks_write_and_read(&client, 0).await;
    keys_are_where_the_ring_says(&nodes, &table).await;
    every_node_finds_the_owner(&nodes, &table).await;
    later_rings_are_refused(&nodes, table.ring()).await;
    manager.shutdown().await.unwrap();

    let other = Config { num_clusters: 2, ..config.clone() };
    let refused = ClusterManager::start_on_free_ports(other).await.map(|_| ());
    assert!(matches!(refused, Err(ManagerError::OtherLayout { .. })), "{refused:?}");
    let other = Config { nodes_per_cluster: 1, ..config.clone() };
    let refused = ClusterManager::start_on_free_ports(other).await.map(|_| ());
    assert!(matches!(refused, Err(ManagerError::OtherLayout { .. })), "{refused:?}");

    let manager = ClusterManager::start_on_free_ports(config.clone()).await.unwrap();
    assert_eq!(manager.nodes(), nodes, "the nodes are where they were");
    assert_eq!(manager.ring(), table.ring(), "and so is the ring");
    every_node_lives_by(&nodes, table.ring()).await;
    // The client from before goes on, although all its connections were cut.
    for task in 0..TASKS {
        let key = key(task, 0);
        let found = client.consistent_read(&key).await.unwrap().expect("it was acknowledged");
        assert_eq!(found, value(task, 0, 0));
    }
    many_tasks_write_and_read(&client, 1).await;
    manager.shutdown().await.unwrap();
}

fn key(task: usize, n: usize) -> String {
    format!("user:{task:05}/{n}")
}

fn value(task: usize, n: usize, round: usize) -> String {
    format!("value {task} {n} {round}")
}

async fn every_node_lives_by(nodes: &[Vec<String>], ring: &Ring) {
    for address in nodes.iter().flatten() {
        let told = ask(address, "GET", "/v1/ring".into(), &[], "").await;
        assert_eq!(serde_json::from_value::<Ring>(told.json()).unwrap(), *ring);
        let told = ask(address, "GET", "/api/get_hash_ring".into(), &[], "").await.json();
        assert_eq!((&told["config_id"], &told["hash_version"]), (&json!(1), &json!(2)));
        let members: Vec<&Value> =
            told["nodes"].as_array().unwrap().iter().map(|n| &n["addr"]).collect();
        assert_eq!(members, ["c1", "c2", "c3"]);
    }
}

/// Two hundred tasks share the client; each reads what it wrote.
async fn many_tasks_write_and_read(client: &KVClient, round: usize) {
    let tasks = (0..TASKS).map(|task| {
        let client = client.clone();
        tokio::spawn(async move {
            for n in 0..KEYS_PER_TASK {
                client.write(key(task, n), value(task, n, round)).await.unwrap();
                let found = client.consistent_read(key(task, n)).await.unwrap();
                assert_eq!(found.expect("it was acknowledged"), value(task, n, round));
            }
            assert_eq!(client.consistent_read(format!("absent{task}")).await.unwrap(), None);
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

/// Each cluster holds exactly the keys that it owns, and none holds more than its share by far.
async fn keys_are_where_the_ring_says(nodes: &[Vec<String>], table: &RingTable) {
    let mut expected = BTreeMap::new();
    for (task, n) in (0..TASKS).flat_map(|task| (0..KEYS_PER_TASK).map(move |n| (task, n))) {
        let owner = table.owner(key(task, n).as_bytes()).unwrap();
        *expected.entry(owner.id.to_string()).or_insert(0u64) += 1;
    }
    for cluster in nodes {
        for address in cluster {
            let (address, expected) = (address.clone(), expected.clone());
            let holds_its_keys = move || {
                // Followers apply a moment later.
                let metrics = common::get(&address, "/cluster/metrics").json();
                let keys = expected[metrics["cluster"].as_str().unwrap()];
                (metrics["keys"] == keys).then_some(())
            };
            tokio::task::spawn_blocking(|| eventually("a node holds its keys", holds_its_keys))
                .await
                .unwrap();
        }
    }
    let mean = (TASKS * KEYS_PER_TASK) as f64 / nodes.len() as f64;
    for (cluster, count) in expected {
        let share = count as f64 / mean;
        assert!((0.8..1.2).contains(&share), "{cluster} has {share} of the mean");
    }
}

/// Any node serves any key; asked to be direct, one of another cluster names the owner instead.
async fn every_node_finds_the_owner(nodes: &[Vec<String>], table: &RingTable) {
    for (index, address) in nodes.iter().flatten().enumerate() {
        let cluster = ask(address, "GET", "/cluster/metrics".into(), &[], "").await.json();
        for task in 0..6 {
            let name = key(task, 1);
            let path = format!("/v1/kv/{}", name.replace('/', "%2F"));
            let stale = format!("{path}?consistency=stale");
            let written = format!("by {index}");
            let answer = ask(address, "PUT", path.clone(), &[], &written).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let answer = ask(address, "GET", path.clone(), &[], "").await;
            assert_eq!((answer.status, answer.text()), (200, written));
            // A stale read goes to the owner, too: here the key would read as absent.
            let answer = ask(address, "GET", stale.clone(), &[], "").await;
            assert_eq!(answer.status, 200, "{}", answer.text());

            let owner = table.owner(name.as_bytes()).unwrap();
            if cluster["cluster"] == owner.id.as_str() {
                continue;
            }
            for (method, path) in [("GET", path.clone()), ("GET", stale), ("PUT", path.clone())] {
                let answer = ask(address, method, path, &DIRECT, "no").await;
                answer.assert_error(421, "WRONG_CLUSTER", "not_applied");
                let error = &answer.json()["error"];
                assert_eq!(error["epoch"], 1, "{error}");
                assert_eq!(error["owner"]["id"], owner.id.as_str(), "{error}");
                let listed = error["owner"]["nodes"].as_array().unwrap().len();
                assert_eq!(listed, owner.nodes.len(), "{error}");
            }
        }
    }
}

/// The same ring again is fine, any other is a conflict.
async fn later_rings_are_refused(nodes: &[Vec<String>], ring: &Ring) {
    let path = || "/cluster/update-hash-ring".to_owned();
    for address in nodes.iter().flatten() {
        let same = serde_json::to_string(ring).unwrap();
        expect_ok(&ask(address, "POST", path(), &[], &same).await);
        for change in [
            |ring: &mut Ring| ring.epoch = 2,
            |ring: &mut Ring| ring.clusters[0].weight = 2.0,
            |ring: &mut Ring| ring.list_ttl_s += 1,
            |ring: &mut Ring| drop(ring.clusters.pop()),
        ] {
            let mut other = ring.clone();
            change(&mut other);
            let other = serde_json::to_string(&other).unwrap();
            let answer = ask(address, "POST", path(), &[], &other).await;
            answer.assert_error(409, "CONFLICT", "not_applied");
        }
    }
    every_node_lives_by(nodes, ring).await;
}

/// A first ring that would take keys from a cluster is refused, and the keys stay.
#[test]
fn a_first_ring_takes_no_keys_away() {
    let cluster = Cluster::formed(1, FAST);
    let ring = |other_weight: f64| {
        let node = json!({"id": 1, "http": cluster.http(1), "rpc": cluster.rpc(1)});
        let stranger = json!({"id": 1, "http": "127.0.0.1:1", "rpc": "127.0.0.1:2"});
        json!({
            "epoch": 1, "hash_version": 2, "list_ttl_s": 600, "sequencer": "c1", "next": null,
            "clusters": [
                {"id": "c1", "weight": 1.0, "nodes": [node]},
                {"id": "c2", "weight": other_weight, "nodes": [stranger]},
            ],
        })
        .to_string()
    };
    for n in 0..50 {
        cluster.put(1, &format!("k{n}"), "v");
    }
    let refused = cluster.post(1, "/cluster/update-hash-ring", &ring(1.0));
    refused.assert_error(409, "CONFLICT", "not_applied");
    assert_eq!(cluster.get(1, "/v1/ring").json()["epoch"], 0);
    for n in 0..50 {
        assert_eq!(cluster.read(1, &format!("k{n}"), "", &DIRECT), Some("v".into()));
        expect_ok(&common::delete(cluster.http(1), &format!("/v1/kv/k{n}")));
    }
    // Nor one without itself, nor one that is not the first.
    let without = ring(1.0).replace("\"c1\"", "\"c9\"");
    let refused = cluster.post(1, "/cluster/update-hash-ring", &without);
    refused.assert_error(409, "CONFLICT", "not_applied");
    let second = ring(1.0).replace("\"epoch\":1", "\"epoch\":2");
    let refused = cluster.post(1, "/cluster/update-hash-ring", &second);
    refused.assert_error(409, "CONFLICT", "not_applied");
    // Without keys there is nothing to take.
    expect_ok(&cluster.post(1, "/cluster/update-hash-ring", &ring(1.0)));
    let moved = (0..50).map(|n| {
        common::request(cluster.http(1), "PUT", &format!("/v1/kv/k{n}"), &DIRECT, b"v").status
    });
    let moved: Vec<u16> = moved.collect();
    assert!(moved.contains(&200) && moved.contains(&421), "{moved:?}");
}

/// A cluster that was formed for a ring acknowledges nothing before it has one, through no node and by
/// no route, also after a restart of all; the first ring opens it.
#[test]
fn a_cluster_that_awaits_its_ring_serves_no_key() {
    let mut cluster = Cluster::start(3, STEADY);
    cluster.form_awaiting_ring();
    serves_nothing(&cluster);
    for id in 1..=3 {
        cluster.kill9(id);
    }
    for id in 1..=3 {
        cluster.restart(id);
    }
    cluster.leader();
    serves_nothing(&cluster);

    let node = |id| json!({"id": id, "http": cluster.http(id), "rpc": cluster.rpc(id)});
    let nodes: Vec<Value> = cluster.ids().map(node).collect();
    let ring = json!({
        "epoch": 1, "hash_version": 2, "list_ttl_s": 600, "sequencer": "c1", "next": null,
        "clusters": [{"id": "c1", "weight": 1.0, "nodes": nodes}],
    });
    expect_ok(&cluster.post(1, "/cluster/update-hash-ring", &ring.to_string()));
    cluster.await_ready();
    cluster.await_all("waits no more", |m| m.get("awaits_ring").is_none());
    for id in cluster.ids() {
        cluster.put(id, &format!("k{id}"), "v");
        assert_eq!(cluster.read(id, &format!("k{id}"), "", &[]), Some("v".into()));
    }
    assert_eq!(cluster.metrics(cluster.leader()).unwrap()["keys"], 3, "of before there is none");
    has_its_ring_after_all_are_killed(&mut cluster);
}

/// The ring is in the log, and on disk not among the data yet. Until it is applied again the nodes are
/// waited for, as for a leader: nobody is told that there is no ring.
fn has_its_ring_after_all_are_killed(cluster: &mut Cluster) {
    for id in 1..=3 {
        cluster.kill9(id);
    }
    for id in 1..=3 {
        cluster.restart(id);
    }
    eventually("a write is taken again", || {
        let answer = common::request(cluster.http(1), "PUT", "/v1/kv/k", &DIRECT, b"again");
        match answer.status {
            200 | 307 => Some(()),
            _ => {
                answer.assert_error(503, "NO_LEADER", "not_applied");
                None
            }
        }
    });
    cluster.await_ready();
    cluster.put(2, "k", "again");
}

fn serves_nothing(cluster: &Cluster) {
    let leader = cluster.leader();
    for id in cluster.ids() {
        let metrics = cluster.await_node(id, "waits for a ring", |m| m["awaits_ring"] == true);
        assert_eq!(metrics["keys"], 0);
        for (method, path, body) in [
            ("PUT", "/v1/kv/k", "v"),
            ("DELETE", "/v1/kv/k", ""),
            ("GET", "/v1/kv/k", ""),
            ("GET", "/v1/kv/k?consistency=stale", ""),
            ("POST", "/api/write", r#"{"Set":{"key":"k","value":"v"}}"#),
            ("POST", "/api/read", r#""k""#),
            ("POST", "/api/consistent_read", r#""k""#),
            ("POST", "/v1/batch", r#"{"operations":[{"op":"put","key":"k","value":"v"}]}"#),
            ("POST", "/v1/batch", r#"{"operations":[{"op":"get","key":"k"}]}"#),
        ] {
            for headers in [&[][..], &DIRECT, &[("Kv-Read", "follower")]] {
                if headers.contains(&("Kv-Read", "follower"))
                    && (method, path) != ("GET", "/v1/kv/k")
                {
                    continue;
                }
                let answer =
                    common::request(cluster.http(id), method, path, headers, body.as_bytes());
                if headers == DIRECT && id != leader {
                    answer.assert_error(307, "NOT_LEADER", "not_applied");
                    continue;
                }
                if path == "/v1/batch" && id != leader {
                    // Passed on, a batch's operations fail one by one.
                    let result = &answer.json()["results"][0];
                    assert_eq!(
                        (&result["status"], &result["error"]["code"]),
                        (&json!(503), &json!("NO_RING"))
                    );
                    continue;
                }
                answer.assert_error(503, "NO_RING", "not_applied");
                assert_eq!(answer.header("retry-after"), Some("1"));
            }
        }
        assert_eq!(common::get(cluster.http(id), "/readyz").status, 503);
        assert_eq!(common::get(cluster.http(id), "/livez").status, 200);
    }
    assert_eq!(cluster.leader(), leader, "nothing of this shakes it");
}
