//! The nodes of this process: started together, all or none, and stopped together.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, timeout_at};

use super::layout::{self, Layout};
use super::{ManagerError, NodeFailure};
use crate::config::Config;
use crate::node::{Node, NodeOptions, StopError};
use crate::ring::RingNode;
use crate::types::{ClusterId, NodeId};

/// How long a start that was called off waits for stores that are being opened, which cannot be
/// interrupted: a store without much to replay is open by then.
const OPENING_PATIENCE: Duration = Duration::from_secs(1);

/// A node and who it is.
pub(super) struct RunningNode {
    cluster: ClusterId,
    id: NodeId,
    node: Node,
}

impl RunningNode {
    /// Resolves when its storage has failed.
    pub(super) async fn failed(&self) -> NodeFailure {
        let message = self.node.failed().await;
        NodeFailure { cluster: self.cluster.clone(), node: self.id, message }
    }
}

/// Starts all nodes, or none: if one cannot start, or `stop` completes first, the others are stopped
/// again.
pub(super) async fn start_nodes(
    config: &Config,
    layout: &Layout,
    stop: Pin<&mut impl Future<Output = ()>>,
) -> Result<Vec<RunningNode>, ManagerError> {
    let mut starts = FuturesUnordered::new();
    for (place, (cluster, node)) in layout.nodes().enumerate() {
        starts.push(async move { (place, start_node(config, &cluster.id, node).await) });
    }
    let mut started = Vec::new();
    let mut failure = None;
    let all_done = async {
        while let Some((place, result)) = starts.next().await {
            match result {
                Ok(node) => started.push((place, node)),
                Err(error) => failure = failure.take().or(Some(error)),
            }
        }
    };
    let called_off = tokio::select! {
        () = all_done => false,
        () = stop => true,
    };
    // In the layout's order, not in that in which they came up.
    started.sort_by_key(|(place, _)| *place);
    let started = started.into_iter().map(|(_, node)| node).collect();
    if called_off {
        return Err(call_off(started, starts).await);
    }
    let Some(error) = failure else { return Ok(started) };
    clear_away(started).await;
    Err(error)
}

/// Stops the nodes that run, and those that are being started as soon as they run.
async fn call_off<S>(started: Vec<RunningNode>, mut starts: FuturesUnordered<S>) -> ManagerError
where
    S: Future<Output = (usize, Result<RunningNode, ManagerError>)>,
{
    let deadline = Instant::now() + OPENING_PATIENCE;
    clear_away(started).await;
    while let Ok(next) = timeout_at(deadline, starts.next()).await {
        match next {
            None => return ManagerError::Interrupted,
            Some((_, Ok(node))) => clear_away(vec![node]).await,
            // There is nothing to stop, and nobody waits for it to come up any more.
            Some((_, Err(error))) => tracing::warn!(%error, "a start that was called off"),
        }
    }
    ManagerError::InterruptedOpening { opening: starts.len() }
}

/// Stops nodes after a failure that is reported instead of what this meets.
pub(super) async fn clear_away(nodes: Vec<RunningNode>) {
    if let Err(error) = stop_nodes(nodes).await {
        tracing::error!(%error, "stopping after a failed start");
    }
}

async fn start_node(
    config: &Config,
    cluster: &ClusterId,
    node: &RingNode,
) -> Result<RunningNode, ManagerError> {
    let options = NodeOptions {
        id: node.id,
        cluster: cluster.clone(),
        http_addr: node.http.clone(),
        rpc_addr: node.rpc.clone(),
        data_dir: layout::node_dir(&config.data_dir, cluster, node),
        config: config.clone(),
    };
    let (cluster, id) = (cluster.clone(), node.id);
    match Node::start(options).await {
        Ok(node) => Ok(RunningNode { cluster, id, node }),
        Err(source) => Err(ManagerError::Start { cluster, node: id, source }),
    }
}

pub(super) async fn stop_nodes(nodes: Vec<RunningNode>) -> Result<(), ManagerError> {
    let stop = |running: RunningNode| async move {
        let RunningNode { cluster, id, node } = running;
        node.shutdown().await.map_err(|error: StopError| format!("node {id} of {cluster}: {error}"))
    };
    let failures: Vec<String> =
        join_all(nodes.into_iter().map(stop)).await.into_iter().filter_map(Result::err).collect();
    if failures.is_empty() { Ok(()) } else { Err(ManagerError::Stop(failures.join("; "))) }
}

/// Where the nodes listen, in their order. Differs from the layout where that says port 0.
pub(super) fn addresses(nodes: &[RunningNode]) -> impl Iterator<Item = (String, String)> {
    nodes.iter().map(|n| (n.node.http_addr().to_string(), n.node.rpc_addr().to_string()))
}
