//! What a node says about itself: metrics, readiness, why storage failed.

use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::LogIdOptionExt;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::Fatal;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::{Member, NodeDigest, NodeMetrics, NodeState};
use crate::network::error::{ApiError, LOST_DATA, Outcome};
use crate::types::Consistency;

use super::refusal::storage;
use super::{App, Metrics};

/// How long [`App::check_ready`] asks: less than the second after which most probes give up.
const CONFIRM_WAIT: Duration = Duration::from_millis(800);

impl App {
    /// What the node says about itself.
    pub fn metrics(&self) -> NodeMetrics {
        let reader = &self.inner.reader;
        let failed = self.storage_failed();
        // Counted before the metrics are looked at: who looks holds up Raft's next report.
        let keys = reader.key_count().ok();
        let metrics = self.inner.raft_metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let members =
            membership.nodes().map(|(id, addrs)| Member { id: *id, addrs: addrs.clone() });
        let identity = &self.inner.identity;
        NodeMetrics {
            id: identity.node_id,
            cluster: identity.cluster.clone(),
            http: identity.addrs.http.clone(),
            rpc: identity.addrs.rpc.clone(),
            state: state_of(&metrics),
            term: metrics.current_term,
            current_leader: metrics.current_leader,
            last_log: metrics.last_log_index,
            last_applied: metrics.last_applied.index(),
            voters: membership.voter_ids().collect(),
            learners: membership.learner_ids().collect(),
            keys,
            revision: Some(reader.revision()),
            epoch: Some(reader.ring().ring().epoch),
            joint: membership.get_joint_config().len() > 1,
            members: members.collect(),
            awaits_ring: self.awaits_ring(&reader.ring_view()),
            failed,
        }
    }

    /// What this node's applied state comes to. Reads all of it, one request after the other.
    pub async fn digest(&self) -> Result<NodeDigest, ApiError> {
        self.check_serving()?;
        let turn = self.inner.digesting.clone().try_lock_owned();
        let turn = turn.map_err(|_| ApiError::Overloaded)?;
        let reader = self.inner.reader.clone();
        let asked = CancellationToken::new();
        let given_up = asked.clone();
        // Whoever asked may be gone before it is done, or the node stop: then this future is dropped.
        let _asking = asked.drop_guard();
        let digest = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            reader.digest(|| !given_up.is_cancelled())
        });
        let digest = digest.await;
        let digest = digest.map_err(std::io::Error::other).flatten();
        let digest = digest.map_err(|error| storage(error, Outcome::NotApplied))?;
        Ok(NodeDigest {
            cluster: self.inner.identity.cluster.clone(),
            node: self.inner.identity.node_id,
            applied: digest.applied.map(|id| id.index),
            rows: digest.rows,
            digest: format!("{:016x}", digest.hash),
        })
    }

    /// Why the node is not ready; ready means: initialised and a member still, a leader is known that has
    /// committed, everything that is known to be committed is applied, and a ring has come if the cluster waits
    /// for its first one.
    pub fn readiness(&self) -> Result<(), String> {
        if let Some(failure) = self.storage_failed() {
            return Err(failure);
        }
        self.caught_up()?;
        if !self.is_member() {
            return Err("the node is not a member of its cluster".into());
        }
        match self.awaits_ring(&self.inner.reader.ring_view()) {
            true => Err(ApiError::NoRing.to_string()),
            false => Ok(()),
        }
    }

    /// Why the node could not answer a linearizable read at this moment. A node remembers a leader that is gone until
    /// another one is elected, and without a majority that is never; so it asks. Takes up to [`CONFIRM_WAIT`].
    pub async fn check_ready(&self) -> Result<(), String> {
        self.readiness()?;
        let deadline = Instant::now() + CONFIRM_WAIT;
        let asked = self.await_read_index(Consistency::LinearizableOnFollower, deadline);
        // Who is asked may give up later.
        match tokio::time::timeout_at(deadline, asked).await {
            Ok(confirmed) => confirmed.map_err(|error| error.to_string()),
            Err(_) => Err("no majority confirms that there is a leader".into()),
        }
    }

    fn is_member(&self) -> bool {
        let metrics = self.inner.raft_metrics.borrow_watched();
        metrics.membership_config.membership().get_node(&metrics.id).is_some()
    }

    /// Whether everything that is known to be committed is applied, and the leader has told how much that
    /// is; if not, what is missing.
    pub(super) fn caught_up(&self) -> Result<(), String> {
        let metrics = self.inner.raft_metrics.borrow_watched();
        if state_of(&metrics) == NodeState::Uninitialized {
            let is_lost = self.inner.formation.is_lost();
            let why = if is_lost { LOST_DATA } else { "the cluster is not initialized" };
            return Err(why.into());
        }
        if metrics.current_leader.is_none() {
            return Err("no leader is known".into());
        }
        let committed = metrics.cluster_committed.max(metrics.local_committed);
        // Every leader begins with an entry of its own. Until that is committed, nobody knows what
        // else was: a restarted node may have forgotten to apply what it acknowledged.
        if committed.is_none_or(|id| id.leader_id != metrics.vote.leader_id) {
            return Err("the leader has not committed anything of its own".into());
        }
        if metrics.last_applied < committed {
            return Err(format!(
                "applied up to {:?} of {:?}",
                metrics.last_applied.index(),
                committed.index()
            ));
        }
        Ok(())
    }

    /// The text of `GET /metrics`.
    pub fn prometheus(&self) -> String {
        let reader = &self.inner.reader;
        let data_bytes = reader.disk_bytes().unwrap_or(0);
        self.inner.telemetry.text(&self.metrics(), data_bytes, reader.row_cache())
    }

    /// Tells when storage fails. Consensus may fail without it: see [`App::storage_failed`].
    pub fn storage_failure(&self) -> watch::Receiver<Option<String>> {
        self.inner.reader.failure()
    }

    /// Why storage or consensus has failed, if one of them has. Then the node serves nothing.
    pub fn storage_failed(&self) -> Option<String> {
        if let Some(failure) = self.inner.failure.borrow().clone() {
            return Some(failure);
        }
        // In this order: a core that ends in order reports that first.
        let has_ended = self.inner.core_ended.load(Ordering::Acquire);
        match &self.inner.raft_metrics.borrow_watched().running_state {
            Err(Fatal::StorageError(error)) => Some(error.to_string()),
            Err(Fatal::Panicked) => Some(PANICKED.into()),
            Ok(()) if has_ended => Some(PANICKED.into()),
            // The node is being stopped.
            Err(Fatal::Stopped) | Ok(()) => None,
        }
    }
}

/// Why a node serves nothing whose storage has not failed.
pub(super) const PANICKED: &str = "consensus has stopped: its task panicked";

pub(super) fn state_of(metrics: &Metrics) -> NodeState {
    let membership = metrics.membership_config.membership();
    // Not by `voter_ids`, which collects them: every request asks.
    let uninitialized = membership.get_joint_config().iter().all(|voters| voters.is_empty());
    match metrics.state {
        _ if uninitialized => NodeState::Uninitialized,
        openraft::ServerState::Leader => NodeState::Leader,
        openraft::ServerState::Candidate => NodeState::Candidate,
        openraft::ServerState::Learner => NodeState::Learner,
        openraft::ServerState::Follower | openraft::ServerState::Shutdown => NodeState::Follower,
    }
}
