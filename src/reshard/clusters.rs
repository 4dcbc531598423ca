//! The way to the clusters: what a driver asks of them, and how it reaches them.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::client_error::ClientError;
use crate::handoff::{Done, RingState, Step};
use crate::metrics::Sizes;
use crate::raft_node::{Courier, RaftNode};
use crate::ring::RingCluster;
use crate::types::ClusterId;

/// How long one look may take: longer than an election, because the client waits one out.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);

/// How long one step may take, with elections and repeats.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// The way to the clusters.
pub trait Clusters: Sync {
    /// What a cluster knows, and all that it answered before.
    fn view(
        &self,
        cluster: &RingCluster,
    ) -> impl Future<Output = Result<RingState, ClientError>> + Send;
    /// Proposes a step to a cluster.
    fn step(
        &self,
        cluster: &RingCluster,
        step: &Step,
    ) -> impl Future<Output = Result<Done, ClientError>> + Send;
}

/// The clusters as they are reached over HTTP. Remembers who leads them.
#[derive(Debug, Default)]
pub struct HttpClusters {
    courier: Courier,
    known: Mutex<BTreeMap<ClusterId, RaftNode>>,
}

impl HttpClusters {
    /// The client of a cluster.
    pub fn client(&self, cluster: &RingCluster) -> RaftNode {
        let addresses: Vec<String> = cluster.nodes.iter().map(|node| node.http.clone()).collect();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(&cluster.id) {
            // It may have learned of more nodes than were given.
            Some(client) if addresses.iter().all(|address| client.nodes().contains(address)) => {
                client.clone()
            }
            _ => {
                let client = RaftNode::with_courier(addresses, self.courier.clone());
                known.insert(cluster.id.clone(), client.clone());
                client
            }
        }
    }
}

impl Clusters for HttpClusters {
    async fn view(&self, cluster: &RingCluster) -> Result<RingState, ClientError> {
        let client = self.client(cluster).with_timeout(LOOK_TIMEOUT);
        let view = client.handoffs(Sizes::Omitted).await?;
        if view.cluster != cluster.id {
            let message = format!("it belongs to cluster {}, not to {}", view.cluster, cluster.id);
            return Err(ClientError::Endpoints(message));
        }
        Ok(view.state)
    }

    async fn step(&self, cluster: &RingCluster, step: &Step) -> Result<Done, ClientError> {
        self.client(cluster).with_timeout(STEP_TIMEOUT).step(step).await
    }
}
