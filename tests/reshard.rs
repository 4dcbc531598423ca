//! The ring changes while clients write: what was acknowledged is found, where the new ring says.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use distrib_kv_store::cluster_manager::ClusterManager;
use distrib_kv_store::config::Config;
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::node::{Node, NodeOptions};
use distrib_kv_store::raft_node::RaftNode;
use distrib_kv_store::reshard::{self, Begun, Change, HttpClusters, Role};
use distrib_kv_store::ring::Ring;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// How long a change may take. Generous: test machines are busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// Tasks that write and read all the time.
const TASKS: usize = 8;

/// Keys of all tasks together, each written once before the first change.
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

/// What all tasks have to do with each other.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Acknowledged writes, and how many of them were a key's first.
    written: AtomicUsize,
    first: AtomicUsize,
}

impl Shared {
    async fn until_all_are_written(&self) {
        let wait = async {
            while self.first.load(Ordering::SeqCst) < KEYS {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, wait).await.expect("the tasks write all keys");
    }

    fn written(&self) -> usize {
        self.written.load(Ordering::SeqCst)
    }
}

/// Writes keys of its own, all once and then again and again, and reads each back at once, until it is told
/// to stop. Returns how often each was written.
fn load(client: KVClient, task: usize, shared: Arc<Shared>) -> JoinHandle<Vec<u64>> {
    tokio::spawn(async move {
        let mut written = vec![0u64; KEYS / TASKS];
        for n in (0..KEYS / TASKS).cycle() {
            let (key, next) = (key(task, n), written[n] + 1);
            client.write(&key, next.to_string()).await.unwrap();
            written[n] = next;
            shared.written.fetch_add(1, Ordering::SeqCst);
            shared.first.fetch_add(usize::from(next == 1), Ordering::SeqCst);
            let found = client.consistent_read(&key).await.unwrap();
            assert_eq!(found.expect("it was acknowledged"), next.to_string(), "{key}");
            if shared.stop.load(Ordering::SeqCst) {
                break;
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
    let Begun::Change(begun) = reshard::begin(&http, addresses, &change).await.unwrap() else {
        panic!("{change:?} changes nothing");
    };
    let follow = reshard::follow(&http, addresses, Role::Helper, Some(&begun), |_, _| {});
    let ring = timeout(PATIENCE, follow).await.expect("the change ends").unwrap();
    assert_eq!(ring, begun.next);
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
    let shared = Arc::new(Shared::default());
    let tasks: Vec<_> = (0..TASKS).map(|n| load(client.clone(), n, shared.clone())).collect();
    shared.until_all_are_written().await;

    let add = Change::Add {
        id: "c4".parse().unwrap(),
        nodes: vec![(fourth.http_addr().to_string(), fourth.rpc_addr().to_string())],
        weight: 1.0,
    };
    let before = shared.written();
    let four = change(&manager.nodes(), add).await;
    let between = shared.written();
    assert!(between > before, "the tasks write meanwhile");
    assert_eq!((four.epoch, four.clusters.len()), (2, 4));
    let three = change(&manager.nodes(), Change::Remove("c4".parse().unwrap())).await;
    assert_eq!((three.epoch, three.clusters.len()), (3, 3));

    assert!(shared.written() > between, "the tasks write meanwhile");

    shared.stop.store(true, Ordering::SeqCst);
    let fresh = KVClient::new(&config.nodes_file).await.unwrap();
    for (task, running) in tasks.into_iter().enumerate() {
        for (n, count) in running.await.unwrap().into_iter().enumerate() {
            assert!(count > 0, "{}", key(task, n));
            let found = fresh.consistent_read(key(task, n)).await.unwrap();
            assert_eq!(found.expect("it was acknowledged"), count.to_string(), "{}", key(task, n));
        }
    }
    fourth.shutdown().await.unwrap();
    manager.shutdown().await.unwrap();
}

/// Somebody writes to the nodes of a new cluster from the moment they run. Nothing of that is
/// acknowledged before the cluster has joined the ring, so it is empty when it does, and what is
/// acknowledged later is found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_cluster_acknowledges_nothing_before_it_joins() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 1);
    let manager = ClusterManager::start_on_free_ports(config.clone()).await.unwrap();
    let fourth = blank_node(dir.path(), &config).await;
    let address = fourth.http_addr().to_string();
    let shared = Arc::new(Shared::default());
    let eager = {
        // Patient for a moment only: what it is refused, it asks for with another key.
        let node = RaftNode::new(vec![address.clone()]).with_timeout(Duration::from_millis(20));
        let shared = shared.clone();
        tokio::spawn(async move {
            let (mut acknowledged, mut asked) = (Vec::new(), 0);
            while !shared.stop.load(Ordering::SeqCst) {
                asked += 1;
                let key = format!("eager:{asked}");
                if node.write(&key, "v").await.is_ok() {
                    acknowledged.push(key);
                    shared.written.fetch_add(1, Ordering::SeqCst);
                }
            }
            acknowledged
        })
    };
    let nodes = vec![(address, fourth.rpc_addr().to_string())];
    let add = Change::Add { id: "c4".parse().unwrap(), nodes, weight: 1.0 };
    change(&manager.nodes(), add).await;
    let served = async {
        while shared.written() == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, served).await.expect("it serves in the end");
    shared.stop.store(true, Ordering::SeqCst);
    let acknowledged = eager.await.unwrap();
    let client = KVClient::new(&config.nodes_file).await.unwrap();
    for key in acknowledged {
        let found = client.consistent_read(&key).await.unwrap();
        assert_eq!(found.as_deref(), Some(&b"v"[..]), "{key}");
    }
    fourth.shutdown().await.unwrap();
    manager.shutdown().await.unwrap();
}
