//! What both benchmarks need: clusters to measure, keys in them, and the four kinds of operation.
//!
//! The clusters of `all_nodes.json` are used when they answer. Otherwise the benchmark starts the
//! default layout in its own process, on free ports and in a temporary directory, and removes all
//! of it at the end.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use distrib_kv_store::cluster_manager::ClusterManager;
use distrib_kv_store::config::Config;
use distrib_kv_store::kvclient::KVClient;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use tokio::task::JoinSet;

/// Where `admin` leaves the addresses.
const NODES_FILE: &str = "all_nodes.json";

/// How long the clusters of the nodes file may take to answer one read.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// How many keys exist: many enough to spread over all clusters.
const KEYS: u32 = 1_000;

/// The size of every value, in bytes.
const VALUE_BYTES: usize = 100;

/// How many layouts of ports are tried before giving up.
const PORT_ATTEMPTS_MAX: u32 = 100;

/// One kind of operation to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Replaces the value of a random key.
    Write,
    /// Reads a random key from any node.
    StaleRead,
    /// Reads a random key, linearizable.
    LinearizableRead,
    /// One half writes, one half linearizable reads.
    Mixed,
}

impl Operation {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 4] = [Self::Write, Self::StaleRead, Self::LinearizableRead, Self::Mixed];

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::StaleRead => "read",
            Self::LinearizableRead => "linearizable_read",
            Self::Mixed => "mixed",
        }
    }

    /// Does it once. A failure ends the benchmark: numbers of failing clusters mean nothing.
    pub async fn run(self, client: &KVClient) {
        let key = key(rand::random_range(0..KEYS));
        match self {
            Self::Write => write(client, &key).await,
            Self::StaleRead => {
                // A follower may not have the key yet: absent is an answer too.
                client.read(&key).await.expect("a stale read succeeds");
            }
            Self::LinearizableRead => read_linearizable(client, &key).await,
            Self::Mixed if rand::random() => write(client, &key).await,
            Self::Mixed => read_linearizable(client, &key).await,
        }
    }
}

fn key(number: u32) -> String {
    format!("benchmark:{number:08}")
}

async fn write(client: &KVClient, key: &str) {
    client.write(key, [b'v'; VALUE_BYTES]).await.expect("a write succeeds");
}

async fn read_linearizable(client: &KVClient, key: &str) {
    let value = client.consistent_read(key).await.expect("a linearizable read succeeds");
    assert_eq!(value.map(|value| value.len()), Some(VALUE_BYTES), "{key} was written before");
}

/// What is measured.
pub struct Target {
    /// A client of the clusters, with every key written.
    pub client: KVClient,
    own: Option<OwnClusters>,
}

/// The directory goes last: nodes write to it until they are stopped.
struct OwnClusters {
    manager: ClusterManager,
    folder: TempDir,
}

impl Target {
    /// Finds or starts the clusters and writes the keys.
    pub async fn open() -> Self {
        raise_open_files_limit();
        let target = match running_clusters().await {
            Some(client) => Self { client, own: None },
            None => Self::start_own().await,
        };
        let mut writes = JoinSet::new();
        for number in 0..KEYS {
            let client = target.client.clone();
            writes.spawn(async move { write(&client, &key(number)).await });
        }
        writes.join_all().await;
        target
    }

    async fn start_own() -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory can be made");
        let config = config_on_free_ports(&folder);
        let clusters = config.num_clusters;
        let manager = ClusterManager::start(config).await.expect("the clusters start");
        eprintln!("{NODES_FILE} names no running clusters: measuring {clusters} of its own");
        let client = KVClient::from_endpoints(manager.nodes()).await.expect("the clusters answer");
        Self { client, own: Some(OwnClusters { manager, folder }) }
    }

    /// Stops and removes what [`Self::open`] started.
    pub async fn close(self) {
        if let Some(OwnClusters { manager, folder }) = self.own {
            manager.shutdown().await.expect("the clusters stop");
            folder.close().expect("the temporary directory can be removed");
        }
    }
}

/// The clusters of the nodes file, if every one of them serves.
async fn running_clusters() -> Option<KVClient> {
    let client = KVClient::new(NODES_FILE).await.ok()?;
    let probe = client.clone().with_timeout(PROBE_TIMEOUT);
    for number in 0..KEYS.min(50) {
        probe.consistent_read(key(number)).await.ok()?;
    }
    eprintln!("measuring the running clusters of {NODES_FILE}");
    Some(client)
}

fn config_on_free_ports(folder: &TempDir) -> Config {
    let mut config = Config {
        data_dir: folder.path().join("data"),
        nodes_file: folder.path().join(NODES_FILE),
        ..Config::default()
    };
    for _ in 0..PORT_ATTEMPTS_MAX {
        // Below the range that the system hands out by itself to outgoing connections.
        config.http_base_port = rand::random_range(10_000..30_000);
        config.rpc_base_port = config.http_base_port + 1_000;
        if ports_are_free(&config) {
            return config;
        }
    }
    panic!("no free ports for the benchmark's own clusters");
}

fn ports_are_free(config: &Config) -> bool {
    let clusters = 1..=config.num_clusters as u16;
    let offsets =
        clusters.flat_map(|c| (1..=config.nodes_per_cluster as u16).map(move |n| 10 * c + n));
    let mut ports = offsets.flat_map(|o| [config.http_base_port + o, config.rpc_base_port + o]);
    ports.all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok())
}

/// A thousand clients and nine nodes in one process hold more than the usual 1024 files open.
fn raise_open_files_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        eprintln!("cannot raise the limit of open files: {error}");
    }
}
