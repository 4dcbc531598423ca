//! Checks before a request is served, and how Raft's errors become ours.
//!
//! The point is the outcome: what Raft refused before it took the command is "not applied", whatever
//! happens afterwards is "unknown".

use openraft::async_runtime::WatchReceiver;
use openraft::errors::{
    ChangeMembershipError, ClientWriteError, Fatal, ForwardToLeader, RaftError,
};
use tokio::sync::OwnedSemaphorePermit;

use crate::handoff::RingState;
use crate::metrics::NodeState;
use crate::network::error::{ApiError, Outcome};
use crate::ring::RingNode;
use crate::store::formation::BeforeRing;
use crate::types::{LeaderId, NodeId, TypeConfig};

use super::App;
use super::health::{PANICKED, state_of};

impl App {
    pub(super) fn check_serving(&self) -> Result<(), ApiError> {
        match self.storage_failed() {
            None => Ok(()),
            Some(message) => Err(ApiError::Storage { message, outcome: Outcome::NotApplied }),
        }
    }

    pub(super) fn check_initialized(&self) -> Result<(), ApiError> {
        match state_of(&self.inner.raft_metrics.borrow_watched()) {
            NodeState::Uninitialized if self.inner.formation.is_lost() => Err(ApiError::LostData),
            NodeState::Uninitialized => Err(ApiError::NotInitialized),
            _ => Ok(()),
        }
    }

    /// Whether the cluster was formed for a ring and this node has applied none yet.
    pub(super) fn awaits_ring(&self, ring: &RingState) -> bool {
        ring.epoch() == 0 && self.inner.formation.before_ring() == BeforeRing::Waits
    }

    /// A cluster that was formed for a ring serves nothing before it has one. This is not checked at
    /// apply: a node that is initialized, and passes here, has applied a ring or needs none, and a ring
    /// never goes away again. Call [`Self::check_initialized`] first: a blank node does not know yet.
    ///
    /// Only a leader that has applied all there is knows that there is no ring. Others lag behind,
    /// perhaps, or were killed and have their log to apply: they say who leads, or that nobody does.
    pub(super) fn check_ring(&self, ring: &RingState) -> Result<(), ApiError> {
        if !self.awaits_ring(ring) {
            return Ok(());
        }
        let caught_up = self.caught_up();
        // It may have come in between.
        if !self.awaits_ring(&self.inner.reader.ring_view()) {
            return Ok(());
        }
        self.check_leader()?;
        Err(match caught_up {
            Ok(()) => ApiError::NoRing,
            Err(_) => ApiError::NoLeader {
                message: "the leader has yet to apply what the cluster has agreed on",
                outcome: Outcome::NotApplied,
            },
        })
    }

    pub(super) fn check_leader(&self) -> Result<(), ApiError> {
        let to = {
            let metrics = self.inner.raft_metrics.borrow_watched();
            if metrics.state == openraft::ServerState::Leader {
                return Ok(());
            }
            let leader = metrics.current_leader.and_then(|id| {
                let node = metrics.membership_config.membership().get_node(&id)?;
                Some(ForwardToLeader::new(id, node.clone()))
            });
            leader.unwrap_or(ForwardToLeader::empty())
        };
        Err(self.not_leader(to, Outcome::NotApplied))
    }

    pub(super) fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.inner.in_flight.clone().try_acquire_owned().map_err(|_| ApiError::Overloaded)
    }

    pub(super) fn not_leader(&self, to: ForwardToLeader<TypeConfig>, outcome: Outcome) -> ApiError {
        let own_id = self.inner.identity.node_id;
        match (to.leader_id, to.leader_node) {
            (Some(id), Some(node)) if id != own_id && outcome == Outcome::NotApplied => {
                ApiError::NotLeader {
                    leader: RingNode { id, http: node.http, rpc: node.rpc },
                    epoch: self.ring().ring().epoch,
                }
            }
            _ if self.check_initialized().is_err() => ApiError::NotInitialized,
            _ if outcome == Outcome::NotApplied => {
                ApiError::NoLeader { message: "no leader is known at the moment", outcome }
            }
            _ => ApiError::NoLeader {
                message: "leadership was lost while the write was in flight; it may have taken effect",
                outcome,
            },
        }
    }

    pub(super) fn write_error(
        &self,
        error: &RaftError<TypeConfig, ClientWriteError<TypeConfig>>,
    ) -> ApiError {
        match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => {
                self.not_leader(to.clone(), Outcome::NotApplied)
            }
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(to)) => {
                self.not_leader(to.clone(), Outcome::Unknown)
            }
            RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => {
                ApiError::Conflict(membership_text(error))
            }
            RaftError::APIError(ClientWriteError::PreconditionFailed(error)) => {
                ApiError::Conflict(error.to_string())
            }
            RaftError::Fatal(error) => self.fatal(error, Outcome::Unknown),
        }
    }

    pub(super) fn fatal(&self, error: &Fatal<TypeConfig>, outcome: Outcome) -> ApiError {
        match (self.storage_failed(), error) {
            (Some(message), _) => ApiError::Storage { message, outcome },
            (None, Fatal::StorageError(error)) => {
                ApiError::Storage { message: error.to_string(), outcome }
            }
            (None, Fatal::Panicked) => ApiError::Storage { message: PANICKED.into(), outcome },
            (None, Fatal::Stopped) => ApiError::Stopping { outcome },
        }
    }
}

pub(super) fn storage(error: std::io::Error, outcome: Outcome) -> ApiError {
    ApiError::Storage { message: error.to_string(), outcome }
}

fn membership_text(error: &ChangeMembershipError<LeaderId, NodeId>) -> String {
    match error {
        ChangeMembershipError::InProgress(_) => {
            "another membership change is under way; wait for it".into()
        }
        ChangeMembershipError::LearnerNotFound(unknown) => {
            format!("node {} is not a member; add it as a learner first", unknown.node_id)
        }
        other => other.to_string(),
    }
}
