//! Finds the clusters behind some addresses, and asks each where it stands.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;

use crate::metrics::Sizes;
use crate::raft_node::RaftNode;
use crate::reshard::clusters::{Clusters, HttpClusters};
use crate::reshard::scene::{Views, mentioned};
use crate::ring::RingCluster;
use crate::types::ClusterId;

use super::ChangeError;

/// How long a cluster may take to say where it stands, with an election.
pub(super) const SURVEY_TIMEOUT: Duration = Duration::from_secs(4);

/// What the clusters behind some addresses say.
#[derive(Debug)]
pub struct Survey {
    /// Where they stand.
    pub views: Views,
    /// Where their nodes are, and those of clusters that they speak of.
    pub clusters: BTreeMap<ClusterId, RingCluster>,
    /// Why some did not answer.
    pub troubles: Vec<String>,
}

impl Survey {
    pub(super) fn trouble(&self) -> String {
        match self.troubles.as_slice() {
            [] => "its sequencer has not recorded that".into(),
            troubles => troubles.join("; "),
        }
    }
}

/// Asks the clusters whose nodes serve HTTP at these addresses, and those that they speak of. Changes
/// nothing.
pub async fn survey(http: &HttpClusters, addresses: &[Vec<String>]) -> Result<Survey, ChangeError> {
    let ask = |nodes: &Vec<String>| {
        let client = RaftNode::new(nodes.clone()).with_timeout(SURVEY_TIMEOUT);
        async move { client.handoffs(Sizes::Omitted).await }
    };
    let (mut views, mut silent) = (Views::new(), Vec::new());
    for answer in join_all(addresses.iter().map(ask)).await {
        match answer {
            Ok(view) => drop(views.insert(view.cluster, view.state)),
            Err(error) => silent.push(error.to_string()),
        }
    }
    if views.is_empty() {
        return Err(ChangeError::Nobody(silent.join("; ")));
    }
    // Who is asked may speak of others in turn; it ends because there are only so many clusters.
    let mut troubles: BTreeMap<ClusterId, String> = BTreeMap::new();
    loop {
        let clusters = mentioned(&views);
        let unknown = |cluster: &&RingCluster| {
            !views.contains_key(&cluster.id) && !troubles.contains_key(&cluster.id)
        };
        let missing: Vec<&RingCluster> = clusters.values().filter(unknown).collect();
        if missing.is_empty() {
            let troubles = troubles.into_iter().map(|(id, text)| format!("cluster {id}: {text}"));
            return Ok(Survey { views, troubles: troubles.collect(), clusters });
        }
        let answers = join_all(missing.iter().map(|cluster| http.view(cluster))).await;
        let answers: Vec<_> = missing.iter().map(|c| c.id.clone()).zip(answers).collect();
        for (cluster, answer) in answers {
            match answer {
                Ok(state) => drop(views.insert(cluster, state)),
                Err(error) => drop(troubles.insert(cluster, error.to_string())),
            }
        }
    }
}
