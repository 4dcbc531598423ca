//! The ring changes while clients write: what was acknowledged is found, where the new ring says.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use distrib_kv_store::cluster_manager::ClusterManager;
use distrib_kv_store::config::Config;
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::node::{Node, NodeOptions};
use distrib_kv_store::reshard::{self, Change, HttpClusters, Role};
use distrib_kv_store::ring::Ring;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long a change may take. Generous: test machines are busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// Tasks that write and read all the time.
const TASKS: usize = 8;

/// Keys that are there before the change.
const KEYS: usize = 2000;

fn config(dir: &Path, clusters: u32) -> Config {
    let mut config = Config {
        num_clusters: clusters,
        nodes_per_cluster: 1,
        data_dir: dir.join("data"),
        nodes_file: dir.join("all_nodes.json"),
        ..Config::default()
    };
    config.storage.block_cache_bytes = 8 << 20;
    config
}

/// A blank node of cluster `c4`.
async fn blank_node(dir: &Path, config: &Config) -> Node {
    let options = NodeOptions {
        id: 1,
        cluster: "c4".parse().unwrap(),
        http_addr: "127.0.0.1:0".into(),
        rpc_addr: "127.0.0.1:0".into(),
        data_dir: dir.join("c4-n1"),
        config: config.clone(),
    };
    Node::start(options).await.unwrap()
}

/// Writes keys of its own, each a few times, and reads each back at once, until it is told to stop.
/// Returns how often each was written.
fn load(client: KVClient, task: usize, stop: Arc<AtomicBool>) -> JoinHandle<Vec<u64>> {
    tokio::spawn(async move {
        let mut written = vec![0u64; KEYS / TASKS];
        while !stop.load(Ordering::Relaxed) {
            for (n, count) in written.iter_mut().enumerate() {
                let (key, next) = (key(task, n), *count + 1);
                client.write(&key, next.to_string()).await.unwrap();
                *count = next;
                let found = client.consistent_read(&key).await.unwrap();
                assert_eq!(found.expect("it was acknowledged"), next.to_string(), "{key}");
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        }
        written
    })
}

fn key(task: usize, n: usize) -> String {
    format!("user:{task}/{n:05}")
}

async fn change(addresses: &[Vec<String>], change: Change) -> Ring {
    let http = HttpClusters::default();
    let next = reshard::begin(&http, addresses, &change).await.unwrap();
    let follow = reshard::follow(&http, addresses, Role::Helper, Some(next.epoch), |_, _| {});
    let ring = timeout(PATIENCE, follow).await.expect("the change ends").unwrap();
    assert_eq!(ring, next);
    ring
}

/// A fourth cluster joins and leaves again while clients write and read: every acknowledged write is
/// found, and no read is stale.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_joins_and_leaves_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 3);
    let manager = ClusterManager::start_on_free_ports(config.clone()).await.unwrap();
    let fourth = blank_node(dir.path(), &config).await;
    let client = KVClient::new(&config.nodes_file).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = (0..TASKS).map(|n| load(client.clone(), n, stop.clone())).collect();

    let add = Change::Add {
        id: "c4".parse().unwrap(),
        nodes: vec![(fourth.http_addr().to_string(), fourth.rpc_addr().to_string())],
        weight: 1.0,
    };
    let four = change(&manager.nodes(), add).await;
    assert_eq!((four.epoch, four.clusters.len()), (2, 4));
    let three = change(&manager.nodes(), Change::Remove("c4".parse().unwrap())).await;
    assert_eq!((three.epoch, three.clusters.len()), (3, 3));

    stop.store(true, Ordering::Relaxed);
    let fresh = KVClient::new(&config.nodes_file).await.unwrap();
    for (task, running) in tasks.into_iter().enumerate() {
        for (n, count) in running.await.unwrap().into_iter().enumerate().filter(|(_, c)| *c > 0) {
            let found = fresh.consistent_read(key(task, n)).await.unwrap();
            assert_eq!(found.expect("it was acknowledged"), count.to_string(), "{}", key(task, n));
        }
    }
    fourth.shutdown().await.unwrap();
    manager.shutdown().await.unwrap();
}
