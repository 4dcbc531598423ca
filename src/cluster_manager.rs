//! Several clusters in one process: start them, form them, give them their ring, stop them.
//!
//! This is what `admin` runs and what tests and benches start. The nodes are the same as those of
//! `raft-kv`; only the process is shared. A start goes through these steps, and each of them is safe
//! to repeat, so that a start that was killed at any point is completed by the next one:
//!
//! ```text
//! compare   the layout of Config with the one that the data was written with     layout.rs
//! check     that the nodes file can be written where it is wanted                 files.rs
//! start     all nodes at once, each in its directory; all or none
//! record    the layout, now that every node has a directory and an address
//! form      each cluster: init, learners, membership; clusters in parallel        forming.rs
//! ring      through each cluster's log, unless it lives by one already            first_ring.rs
//! wait      until every node is ready and lives by the ring
//! announce  the nodes file, last: who finds it finds clusters that serve
//! ```
//!
//! Nothing here waits a fixed time: every wait polls a condition and has a deadline. Whatever fails,
//! all nodes that were started are stopped before the error is returned.

mod files;
mod first_ring;
mod forming;
mod layout;
mod running;
mod status;

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::{select_all, try_join_all};
use futures_util::stream::{FuturesUnordered, Stream};
use http::{HeaderMap, Method};
use tokio::time::{Instant, sleep};

pub use files::{read_nodes_file, write_nodes_file};
pub use first_ring::{InstallError, Survey, first_ring, install, survey, survey_all};
pub use forming::{ask_all, leader_of};
pub use layout::{Layout, LayoutCluster, LayoutDifference};
pub use status::{ClusterStatus, Discovered, NodeStatus, discover, newest_ring, status_of};

use crate::config::{Config, ConfigError};
use crate::http_client::{HttpClient, HttpRequest};
use crate::node::StartError;
use crate::ring::{Ring, RingCluster, RingNode};
use crate::types::{ClusterId, Epoch, NodeId};
use forming::{FORM_TIMEOUT, METRICS_TIMEOUT, POLL_INTERVAL};
use layout::Ports;
use running::{RunningNode, addresses, clear_away, start_nodes, stop_nodes};

/// How long the nodes of a formed cluster may take to be ready: an election and a short catch-up.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Why clusters could not be started or stopped, or a file of theirs not be used.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The configuration was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or directory could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {message}")]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The data belongs to other clusters than the configuration asks for.
    #[error(
        "{path}: the data has another layout: {difference}; nothing was changed. Use the layout of the data, or another `data_dir`"
    )]
    OtherLayout {
        /// The file that says how the data was written.
        path: PathBuf,
        /// The first difference.
        difference: LayoutDifference,
    },
    /// A member of a formed cluster has no data any more.
    #[error(
        "{path} is missing, but its node is a member of a cluster that was formed: a node that lost its data must not vote again. Put the directory back, or start over with another `data_dir`; nothing was changed"
    )]
    NodeDirMissing {
        /// The directory.
        path: PathBuf,
    },
    /// A node did not start.
    #[error("node {node} of {cluster}: {source}")]
    Start {
        /// The cluster.
        cluster: ClusterId,
        /// The node.
        node: NodeId,
        /// Why.
        source: StartError,
    },
    /// A cluster has a member that the layout does not list.
    #[error(
        "{cluster} has the member {node}, which is not one of the nodes to start; start its nodes one by one with `raft-kv` instead"
    )]
    Stranger {
        /// The cluster.
        cluster: ClusterId,
        /// The member.
        node: NodeId,
    },
    /// A voter has no data any more.
    #[error(
        "node {node} of {cluster} votes there, and has lost its data: it must not vote again. Put its directory back (is its volume mounted?). Or replace it: start the cluster's nodes by `raft-kv`, remove this one with POST /cluster/change-membership, stop them, and start all again"
    )]
    LostData {
        /// The cluster.
        cluster: ClusterId,
        /// The node.
        node: NodeId,
    },
    /// A node refused what forming its cluster takes, and would refuse it again.
    #[error("{cluster} cannot be formed: {refusal}")]
    Refused {
        /// The cluster.
        cluster: ClusterId,
        /// What was asked of whom, and the answer.
        refusal: String,
    },
    /// Something did not happen in time.
    #[error("waited too long for {what}")]
    Deadline {
        /// What was waited for, and what stood in the way.
        what: String,
    },
    /// The ring could not be installed.
    #[error("cannot install the ring: {0}")]
    Ring(#[from] InstallError),
    /// The start was called off.
    #[error("interrupted; all nodes are stopped, and the next start goes on from here")]
    Interrupted,
    /// The start was called off while stores were being opened, which goes on until the process ends.
    /// Ending it loses nothing. All other nodes are stopped.
    #[error(
        "interrupted; {opening} stores are still being opened, the other nodes are stopped, and the next start goes on from here"
    )]
    InterruptedOpening {
        /// How many stores.
        opening: usize,
    },
    /// A node did not stop cleanly. The others did, or are listed as well.
    #[error("{0}")]
    Stop(String),
}

/// A node that stopped serving because its storage failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFailure {
    /// Its cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// What happened.
    pub message: String,
}

/// Running clusters. Stop them with [`ClusterManager::shutdown`]: only that flushes and joins.
pub struct ClusterManager {
    layout: Layout,
    ring: Ring,
    nodes: Vec<RunningNode>,
}

impl ClusterManager {
    /// Starts what the configuration file describes and returns once all of it serves.
    pub async fn new(config_path: impl AsRef<Path>) -> Result<Self, ManagerError> {
        Self::start(Config::load(config_path)?).await
    }

    /// Starts what `config` describes and returns once all of it serves. Dropping the future leaves
    /// nodes unjoined; use [`ClusterManager::start_until`] to call a start off.
    pub async fn start(config: Config) -> Result<Self, ManagerError> {
        Self::start_until(config, std::future::pending()).await
    }

    /// Like [`ClusterManager::start`], but stops everything again and returns
    /// [`ManagerError::Interrupted`] when `stop` completes first. With a store that takes long to open
    /// it is [`ManagerError::InterruptedOpening`]: then only the end of the process frees everything.
    pub async fn start_until(
        config: Config,
        stop: impl Future<Output = ()>,
    ) -> Result<Self, ManagerError> {
        Self::start_on(config, Ports::Configured, stop).await
    }

    /// Like [`ClusterManager::start`], on free ports instead of the configured ones, so that any
    /// number of clusters can run on one machine. A later start on the same data takes the same
    /// ports again, because the members of a cluster know each other by their addresses.
    pub async fn start_on_free_ports(config: Config) -> Result<Self, ManagerError> {
        Self::start_on_free_ports_until(config, std::future::pending()).await
    }

    /// [`ClusterManager::start_on_free_ports`] that can be called off like
    /// [`ClusterManager::start_until`].
    pub async fn start_on_free_ports_until(
        config: Config,
        stop: impl Future<Output = ()>,
    ) -> Result<Self, ManagerError> {
        Self::start_on(config, Ports::Free, stop).await
    }

    async fn start_on(
        config: Config,
        ports: Ports,
        stop: impl Future<Output = ()>,
    ) -> Result<Self, ManagerError> {
        let layout = Layout::wanted(&config, ports).settle(&config.data_dir, ports)?;
        files::check_nodes_file(&config.nodes_file, &layout.paths(&config.data_dir))?;
        tokio::pin!(stop);
        let nodes = start_nodes(&config, &layout, stop.as_mut()).await?;
        let mut manager =
            Self { layout: layout.with_addresses(addresses(&nodes)), ring: Ring::none(), nodes };
        let outcome = tokio::select! {
            outcome = manager.make_ready(&config) => outcome,
            () = stop => Err(ManagerError::Interrupted),
        };
        match outcome {
            Ok(ring) => {
                manager.ring = ring;
                Ok(manager)
            }
            Err(error) => {
                clear_away(manager.nodes).await;
                Err(error)
            }
        }
    }

    async fn make_ready(&self, config: &Config) -> Result<Ring, ManagerError> {
        let membership = self.layout.membership();
        self.layout.record(&config.data_dir)?;
        try_join_all(self.layout.clusters.iter().map(|c| forming::form(c, membership))).await?;
        self.layout.clone().formed().record(&config.data_dir)?;
        let ring = self.settle_ring(config).await?;
        // A cluster that has left the ring does not hear of later ones.
        let epoch = |id: &ClusterId| if ring.cluster(id).is_some() { ring.epoch } else { 0 };
        let ready = self.layout.nodes().map(|(c, node)| wait_ready(&c.id, node, epoch(&c.id)));
        try_join_all(ready).await?;
        write_nodes_file(&config.nodes_file, &self.announced(&ring))?;
        Ok(ring)
    }

    /// Installs the first ring where there is none, and returns the ring in force. One that was
    /// installed before stands, whatever weights the configuration has by now: they are the first
    /// ring's, and a change of weights moves keys.
    async fn settle_ring(&self, config: &Config) -> Result<Ring, ManagerError> {
        let clusters = self.nodes();
        let deadline = Instant::now() + FORM_TIMEOUT;
        let surveys = loop {
            match survey_all(&clusters).await {
                Ok(surveys) => break surveys,
                // An election may run: the clusters are formed, so it ends.
                Err(InstallError::NoLeader(_) | InstallError::Unreachable(_))
                    if Instant::now() < deadline =>
                {
                    sleep(POLL_INTERVAL).await
                }
                Err(error) => return Err(error.into()),
            }
        };
        let ring = self.choose_ring(&surveys, config)?;
        if ring.epoch == 1 {
            install(&clusters, &surveys, &ring).await?;
        }
        Ok(ring)
    }

    fn choose_ring(&self, surveys: &[Survey], config: &Config) -> Result<Ring, InstallError> {
        let members = self.layout.clusters.iter().map(|c| (&c.id, c.nodes.as_slice()));
        let first = first_ring(members, &config.weights, &config.ring)?;
        let newest = surveys.iter().map(|s| &s.ring).max_by_key(|ring| ring.epoch);
        let Some(stored) = newest.filter(|ring| ring.epoch > 0) else {
            return Ok(first);
        };
        let is_other = |cluster: &RingCluster| {
            first.cluster(&cluster.id).is_some_and(|wanted| wanted.weight != cluster.weight)
        };
        let are_weights_other = !config.weights.is_empty() && stored.clusters.iter().any(is_other);
        if are_weights_other || (stored.epoch == 1 && *stored != first) {
            tracing::warn!(
                epoch = stored.epoch,
                "the clusters keep the ring that they have; [ring] and `weights` are for the first one: \
                 `admin cluster weight` changes a weight, and moves keys"
            );
        }
        match surveys.iter().find(|s| s.ring.epoch == 0) {
            Some(left_out) if stored.epoch > 1 => Err(InstallError::Refused {
                cluster: left_out.cluster.clone(),
                message: format!(
                    "it has no ring, but the ring has moved on to epoch {}",
                    stored.epoch
                ),
                installed: Vec::new(),
            }),
            _ => Ok(stored.clone()),
        }
    }

    /// What the nodes file lists: the nodes that were started, or, once the ring has changed, those of
    /// the ring, of which some may run elsewhere.
    fn announced(&self, ring: &Ring) -> Vec<Vec<String>> {
        if ring.epoch <= 1 {
            return self.nodes();
        }
        let addresses =
            |cluster: &RingCluster| cluster.nodes.iter().map(|node| node.http.clone()).collect();
        ring.clusters.iter().map(addresses).collect()
    }

    /// The nodes' HTTP addresses, cluster by cluster.
    pub fn nodes(&self) -> Vec<Vec<String>> {
        self.layout.http_addresses()
    }

    /// What runs, and where it listens.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The newest ring that the clusters lived by when the start was complete.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Returns when the storage of a node has failed, and says which and why. The other nodes go on.
    /// Safe to cancel.
    pub async fn failed(&self) -> NodeFailure {
        let watched = self.nodes.iter().map(|running| Box::pin(running.failed()));
        select_all(watched).await.0
    }

    /// The failures of all nodes, each as it happens; ends when all have failed.
    pub fn failures(&self) -> impl Stream<Item = NodeFailure> + Unpin {
        let watched = self.nodes.iter().map(|running| Box::pin(running.failed()));
        watched.collect::<FuturesUnordered<_>>()
    }

    /// Stops all nodes at once and returns when all have stopped, whatever one of them reports.
    pub async fn shutdown(self) -> Result<(), ManagerError> {
        stop_nodes(self.nodes).await
    }
}

/// Makes nodes that run one cluster, whatever an earlier run left them in; returns once all of them vote
/// and one leads. Safe to cancel and to call again.
///
/// # Errors
/// A node is a member of something else, or it takes too long.
pub async fn form(id: &ClusterId, nodes: &[RingNode]) -> Result<(), ManagerError> {
    let cluster = LayoutCluster { id: id.clone(), nodes: nodes.to_vec() };
    forming::form(&cluster, forming::Membership::Unconfirmed).await
}

/// Waits until a node says that it is ready and lives by the ring of this epoch, or a newer one.
async fn wait_ready(
    cluster: &ClusterId,
    node: &RingNode,
    epoch: Epoch,
) -> Result<(), ManagerError> {
    let deadline = Instant::now() + READY_TIMEOUT;
    let client = HttpClient::new();
    let address = std::slice::from_ref(&node.http);
    while !is_ready(&client, &node.http).await
        || !ask_all(address).await.iter().flatten().any(|m| m.epoch >= Some(epoch))
    {
        if Instant::now() >= deadline {
            let what = format!("{cluster}: node {} at {} to be ready", node.id, node.http);
            return Err(ManagerError::Deadline { what });
        }
        sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

async fn is_ready(client: &HttpClient, address: &str) -> bool {
    let request = HttpRequest {
        method: Method::GET,
        address: address.to_owned(),
        path_and_query: "/readyz".into(),
        headers: HeaderMap::new(),
        body: bytes::Bytes::new(),
    };
    let answer = client.send(request, Instant::now() + METRICS_TIMEOUT).await;
    answer.is_ok_and(|answer| answer.status.is_success())
}
