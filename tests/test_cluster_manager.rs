//! `ClusterManager` brings whole clusters up, from nothing and from what an earlier run left, and
//! refuses what would harm their data.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use distrib_kv_store::cluster_manager::{ClusterManager, ManagerError, read_nodes_file, status_of};
use distrib_kv_store::config::Config;
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::raft_node::RaftNode;

/// How long anything may take here that happens. Less than forming a cluster may.
const PATIENCE: Duration = Duration::from_secs(40);

/// Small memory bounds: every node of a test has its own RocksDB.
fn config(dir: &Path, clusters: u32, nodes: u32) -> Config {
    let mut config = Config {
        num_clusters: clusters,
        nodes_per_cluster: nodes,
        data_dir: dir.join("data"),
        nodes_file: dir.join("nodes.json"),
        ..Config::default()
    };
    config.storage.block_cache_bytes = 8 << 20;
    config.storage.memtable_bytes = 4 << 20;
    config
}

/// A second start on the same data comes back on the same addresses, with the same ring and with
/// every key, and every cluster has one leader and all its voters.
#[tokio::test(flavor = "multi_thread")]
async fn clusters_come_back_with_their_data() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 2, 3);
    let manager = ClusterManager::start_on_free_ports(config.clone()).await.unwrap();
    let (nodes, ring) = (manager.nodes(), manager.ring().clone());
    assert_eq!((nodes.len(), ring.epoch), (2, 1));
    assert_eq!(read_nodes_file(&config.nodes_file).unwrap(), nodes);
    let client = KVClient::new(&config.nodes_file).await.unwrap();
    for i in 0..40 {
        client.write(format!("key-{i}"), format!("value-{i}")).await.unwrap();
    }
    manager.shutdown().await.unwrap();

    let manager = ClusterManager::start_on_free_ports(config.clone()).await.unwrap();
    assert_eq!((manager.nodes(), manager.ring()), (nodes.clone(), &ring));
    let client = KVClient::new(&config.nodes_file).await.unwrap();
    for i in 0..40 {
        let value = client.consistent_read(format!("key-{i}")).await.unwrap();
        assert_eq!(value.unwrap(), format!("value-{i}"), "key-{i}");
    }
    let status = status_of(&nodes).await;
    for cluster in &status {
        assert!(cluster.leader.is_some(), "{cluster:?}");
        for node in &cluster.nodes {
            assert_eq!(node.metrics.as_ref().unwrap().voters, [1, 2, 3], "{node:?}");
        }
    }
    let owners: BTreeSet<_> = status.iter().map(|cluster| &cluster.id).collect();
    assert_eq!(owners.len(), 2);
    manager.shutdown().await.unwrap();
}

/// Data that other clusters wrote is refused and left as it is: the right layout still starts.
#[tokio::test(flavor = "multi_thread")]
async fn another_layout_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let two = config(dir.path(), 2, 1);
    ClusterManager::start_on_free_ports(two.clone()).await.unwrap().shutdown().await.unwrap();
    for other in [config(dir.path(), 1, 1), config(dir.path(), 3, 1), config(dir.path(), 2, 3)] {
        let refused = ClusterManager::start_on_free_ports(other).await.err().unwrap();
        assert!(matches!(refused, ManagerError::OtherLayout { .. }), "{refused}");
    }
    assert!(!dir.path().join("data/c3-n1").exists());
    ClusterManager::start_on_free_ports(two).await.unwrap().shutdown().await.unwrap();
}

/// Nodes that say of themselves that they are everywhere find no way to each other: the start ends with what
/// they say about it, and does not repeat the question for a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_will_not_change_ends_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 1, 2);
    (config.host, config.insecure) = ("0.0.0.0".into(), true);
    let start = tokio::time::timeout(PATIENCE, ClusterManager::start_on_free_ports(config));
    let refused = start.await.expect("the start ends").err().unwrap();
    assert!(matches!(refused, ManagerError::Refused { .. }), "{refused}");
}

/// A nodes file that would replace what the data needs is refused before a node is started.
#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_file_among_the_data_is_refused_and_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), 1, 1);
    for bad in ["", "data/layout.json", "data/c1-n1/nodes.json"] {
        config.nodes_file = if bad.is_empty() { bad.into() } else { dir.path().join(bad) };
        let refused = ClusterManager::start_on_free_ports(config.clone()).await.err().unwrap();
        assert!(matches!(refused, ManagerError::BadFile { .. }), "{bad}: {refused}");
    }
    assert!(!dir.path().join("data").exists());
}

/// When one node cannot start, none is left running: all ports and data directories are free again.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_leaves_nothing_running() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 1, 3);
    let manager = ClusterManager::start_on_free_ports(config.clone()).await.unwrap();
    let taken = manager.nodes()[0][2].clone();
    manager.shutdown().await.unwrap();

    let listener = TcpListener::bind(&taken).unwrap();
    let refused = ClusterManager::start_on_free_ports(config.clone()).await.err().unwrap();
    assert!(matches!(refused, ManagerError::Start { node: 3, .. }), "{refused}");
    drop(listener);
    ClusterManager::start_on_free_ports(config).await.unwrap().shutdown().await.unwrap();
}

/// A start that is called off stops its nodes, and the next one completes what it began.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_called_off_is_completed_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 1, 3);
    // Ends as soon as the layout is recorded, which is before the cluster is formed.
    let layout = dir.path().join("data/layout.json");
    let recorded = async {
        while !layout.exists() {
            tokio::task::yield_now().await;
        }
    };
    let stopped = ClusterManager::start_on_free_ports_until(config.clone(), recorded).await;
    assert!(matches!(stopped, Err(ManagerError::Interrupted)));
    let manager = ClusterManager::start_on_free_ports(config).await.unwrap();
    assert_eq!(manager.ring().epoch, 1);
    manager.shutdown().await.unwrap();
}

/// A voter whose directory is empty, as when a volume is not mounted, is named and not waited for; one that was taken
/// out of the membership before is taken in again.
#[tokio::test(flavor = "multi_thread")]
async fn a_voter_that_lost_its_data_ends_the_start_and_one_that_was_removed_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), 1, 3);
    let start = || ClusterManager::start_on_free_ports(config.clone());
    let manager = start().await.unwrap();
    let nodes = manager.nodes()[0].clone();
    KVClient::new(&config.nodes_file).await.unwrap().write("k", "v").await.unwrap();
    manager.shutdown().await.unwrap();

    let (data, kept) = (dir.path().join("data/c1-n3"), dir.path().join("kept"));
    std::fs::rename(&data, &kept).unwrap();
    std::fs::create_dir(&data).unwrap();
    let refused = start().await.err().unwrap();
    assert!(matches!(refused, ManagerError::LostData { node: 3, .. }), "{refused}");

    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(&kept, &data).unwrap();
    let manager = start().await.unwrap();
    RaftNode::new(nodes.clone()).change_membership(&[1, 2]).await.unwrap();
    manager.shutdown().await.unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::create_dir(&data).unwrap();
    let manager = start().await.unwrap();
    let status = status_of(&manager.nodes()).await;
    assert!(status[0].nodes.iter().all(|n| n.metrics.as_ref().unwrap().voters == [1, 2, 3]));
    let third = RaftNode::new(vec![nodes[2].clone()]);
    assert_eq!(third.read("k").await.unwrap().unwrap(), "v");
    manager.shutdown().await.unwrap();
}
