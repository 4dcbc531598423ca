//! Use cases of membership: form the cluster, add learners, change the voters.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, RaftError};
use openraft::raft::ClientWriteResponse;
use openraft::{ChangeMembers, LogIdOptionExt};
use tokio::time::Instant;

use crate::network::error::{ApiError, LOST_DATA, Outcome};
use crate::store::formation::{BeforeRing, Founding, Joined};
use crate::types::{LogId, Membership, NodeAddrs, NodeId, TypeConfig};

use super::{App, Consistency, Metrics, POLL_INTERVAL};

/// A learner may become a voter once it lags behind the leader by no more than this many entries:
/// they are sent within one round trip or two, so the new quorum works at once.
const VOTER_LAG_ENTRIES_MAX: u64 = 1000;

/// How long forming a cluster waits for its first leader.
const INIT_WAIT_MAX: Duration = Duration::from_secs(5);

type ChangeResult =
    Result<ClientWriteResponse<TypeConfig>, RaftError<TypeConfig, ClientWriteError<TypeConfig>>>;

impl App {
    /// Forms the cluster with this node as its only voter. Cancel safe: what has begun is done.
    pub async fn init(&self, before_ring: BeforeRing) -> Result<(), ApiError> {
        self.check_serving()?;
        let app = self.clone();
        let forming = self.inner.tasks.spawn(async move { app.form(before_ring).await });
        forming.await.unwrap_or(Err(ApiError::Stopping { outcome: Outcome::Unknown }))
    }

    async fn form(&self, before_ring: BeforeRing) -> Result<(), ApiError> {
        if self.inner.formation.is_lost() {
            // Formed, it would be a second cluster of that name.
            return Err(ApiError::Conflict(LOST_DATA.into()));
        }
        self.begin_formation(Founding::draw(before_ring)).await?;
        let identity = &self.inner.identity;
        let members = BTreeMap::from([(identity.node_id, identity.addrs.clone())]);
        match self.inner.raft.initialize(members).await {
            Ok(()) => {
                // A single voter elects itself within an fsync or two; who forms a cluster goes on
                // at once and should find it working. If it takes longer, the cluster is formed all
                // the same: that is why the result does not matter.
                // Leading is not enough: until the first membership is committed and applied, adding a
                // learner would meet a membership change under way.
                let formed = |metrics: &Metrics| {
                    metrics.current_leader == Some(metrics.id)
                        && metrics.last_applied.is_some()
                        && metrics.last_applied.index() >= metrics.last_log_index
                };
                // It is initialised also if that takes longer; then the next request waits for it, or is told.
                let _ = self.inner.raft.wait(Some(INIT_WAIT_MAX)).metrics(formed, "formed").await;
                Ok(())
            }
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Err(already_initialized()),
            Err(RaftError::APIError(error)) => Err(ApiError::Conflict(error.to_string())),
            Err(RaftError::Fatal(error)) => Err(self.fatal(&error, Outcome::Unknown)),
        }
    }

    /// Puts on disk what tells this cluster from others of its name, before its log begins.
    async fn begin_formation(&self, founding: Founding) -> Result<(), ApiError> {
        let formation = self.inner.formation.clone();
        let joined = tokio::task::spawn_blocking(move || formation.join(founding)).await;
        match joined.map_err(io::Error::other).flatten() {
            Ok(Joined::Adopted) => Ok(()),
            Ok(Joined::Same | Joined::Other) => Err(already_initialized()),
            Err(error) => {
                Err(ApiError::Storage { message: error.to_string(), outcome: Outcome::NotApplied })
            }
        }
    }

    /// Adds a member without a vote; a repeat changes nothing. One that has none may be given another address: if the
    /// first was a mistake, nobody else could mend that.
    pub async fn add_learner(
        &self,
        id: NodeId,
        addrs: NodeAddrs,
        deadline: Instant,
    ) -> Result<(), ApiError> {
        self.check_serving()?;
        refuse_wildcard(&addrs)?;
        self.check_leader()?;
        // A node alone may listen everywhere; with others it has to say where they find it.
        refuse_wildcard(&self.inner.identity.addrs)?;
        let (known, is_voter) = {
            let metrics = self.inner.raft_metrics.borrow_watched();
            let membership = metrics.membership_config.membership();
            let is_voter = membership.voter_ids().any(|voter| voter == id);
            (membership.get_node(&id).cloned(), is_voter)
        };
        match &known {
            Some(known) if *known == addrs => return self.await_settled(deadline).await,
            Some(known) if is_voter => {
                return Err(ApiError::Conflict(already_a("voter", id, known)));
            }
            Some(_) | None => {}
        }
        if let Some(why) = self.inner.peers.refusal_of(id, &addrs).await {
            return Err(ApiError::Conflict(format!("node {id} cannot join: {why}")));
        }
        let raft = self.inner.raft.clone();
        let (wanted, removes) = (addrs.clone(), known.is_some());
        let added = async move {
            if removes {
                // Removed first, because what is sent to it goes on to where it began. Should it end here, the
                // learner is missing, and a repeat adds it.
                let removed = ChangeMembers::RemoveNodes(BTreeSet::from([id]));
                raft.change_membership(removed, true).await?;
            }
            raft.add_learner(id, wanted, false).await
        };
        let membership = self.await_membership(added, deadline).await?;
        let there = membership.as_ref().and_then(|membership| membership.get_node(&id));
        there.map_or(Ok(()), |there| check_added(id, &addrs, there, removes))
    }

    /// Makes exactly these members the voters, after they caught up.
    pub async fn change_membership(
        &self,
        voters: BTreeSet<NodeId>,
        deadline: Instant,
    ) -> Result<(), ApiError> {
        self.check_serving()?;
        self.check_leader()?;
        self.await_caught_up(&voters, deadline).await?;
        let raft = self.inner.raft.clone();
        let changed = async move { raft.change_membership(voters, false).await };
        self.await_membership(changed, deadline).await.map(drop)
    }

    /// Runs a change to its end in a task of its own, and waits for it until the deadline: openraft
    /// takes the second step of a change from the future that asked for the first one, so dropping it
    /// would leave the cluster between two memberships. Returns what the last step led to.
    async fn await_membership(
        &self,
        change: impl Future<Output = ChangeResult> + Send + 'static,
        deadline: Instant,
    ) -> Result<Option<Membership>, ApiError> {
        let before = self.membership_id();
        let change = self.inner.tasks.spawn(change);
        match tokio::time::timeout_at(deadline, change).await {
            Ok(Ok(Ok(response))) => Ok(response.membership),
            // What openraft says of the second step is not true of the whole.
            Ok(Ok(Err(_))) if self.membership_id() != before => Err(ApiError::NoLeader {
                message: "leadership was lost between the steps of the membership change; it may still \
                          take effect",
                outcome: Outcome::Unknown,
            }),
            Ok(Ok(Err(error))) => Err(self.write_error(&error)),
            Ok(Err(_)) => Err(ApiError::Stopping { outcome: Outcome::Unknown }),
            Err(_) => Err(ApiError::Timeout {
                message: "the membership change was not confirmed in time; it may still take effect",
                outcome: Outcome::Unknown,
            }),
        }
    }

    /// Which entry this node's effective membership is from.
    fn membership_id(&self) -> Option<LogId> {
        let metrics = self.inner.raft_metrics.borrow_watched();
        *metrics.membership_config.log_id()
    }

    /// Returns once the membership that this node sees is committed, and it still leads.
    async fn await_settled(&self, deadline: Instant) -> Result<(), ApiError> {
        loop {
            self.await_read_index(Consistency::Linearizable, deadline).await?;
            let settled = {
                let metrics = self.inner.raft_metrics.borrow_watched();
                *metrics.membership_config.log_id() <= metrics.last_applied
            };
            if settled {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Waits until the future voters are close behind the leader. Unknown ones are Raft's to refuse.
    async fn await_caught_up(
        &self,
        voters: &BTreeSet<NodeId>,
        deadline: Instant,
    ) -> Result<(), ApiError> {
        let own_id = self.inner.identity.node_id;
        loop {
            {
                let metrics = self.inner.raft_metrics.borrow_watched();
                let known = metrics.membership_config.membership();
                let last = metrics.last_log_index.unwrap_or(0);
                let close = |id: &NodeId| {
                    let matched = metrics.replication.as_ref().and_then(|of| of.get(id));
                    matched.is_some_and(|matched| {
                        matched.index().is_some_and(|at| at + VOTER_LAG_ENTRIES_MAX >= last)
                    })
                };
                let lags =
                    |id: &&NodeId| **id != own_id && known.get_node(id).is_some() && !close(id);
                if metrics.state != openraft::ServerState::Leader
                    || voters.iter().find(lags).is_none()
                {
                    return Ok(());
                }
            }
            if Instant::now() >= deadline {
                return Err(ApiError::Timeout {
                    message: "a new member did not catch up in time; nothing was changed",
                    outcome: Outcome::NotApplied,
                });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// Whether the member that is `there` is the one that was wanted: Raft leaves one as it is, which somebody
/// else may have added meanwhile. Who had it removed first has taken the earlier address away, unless
/// somebody else had.
fn check_added(
    id: NodeId,
    wanted: &NodeAddrs,
    there: &NodeAddrs,
    removed_first: bool,
) -> Result<(), ApiError> {
    if there == wanted {
        return Ok(());
    }
    let why = already_a("member", id, there);
    Err(if removed_first { ApiError::ConflictMidway(why) } else { ApiError::Conflict(why) })
}

fn already_a(what: &str, id: NodeId, at: &NodeAddrs) -> String {
    format!("node {id} is already a {what} at {} / {}", at.http, at.rpc)
}

/// Formed by itself, or claimed by the cluster that it was told to follow.
fn already_initialized() -> ApiError {
    ApiError::Conflict("this node is already initialized".into())
}

/// The membership tells the other nodes where to connect; a wildcard would send them to themselves.
fn refuse_wildcard(addrs: &NodeAddrs) -> Result<(), ApiError> {
    if !addrs.has_wildcard() {
        return Ok(());
    }
    let NodeAddrs { http, rpc } = addrs;
    Err(ApiError::BadRequest(format!(
        "{http} / {rpc}: other nodes cannot connect to a wildcard; start the node with its own address"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of two who mend a learner's address at the same moment, one hears of the other's; but its own request
    /// may have taken the earlier address away.
    #[test]
    fn a_conflict_after_a_removal_does_not_say_that_nothing_changed() {
        let at = |http: &str| NodeAddrs { http: http.into(), rpc: "r:1".into() };
        let outcome = |wanted, there, removed_first| {
            let added = check_added(4, &at(wanted), &at(there), removed_first);
            added.map_err(|error| (error.status_and_code().1, error.outcome()))
        };
        for removed_first in [false, true] {
            assert_eq!(outcome("y:1", "y:1", removed_first), Ok(()));
        }
        assert_eq!(outcome("y:1", "z:1", false), Err(("CONFLICT", Outcome::NotApplied)));
        assert_eq!(outcome("y:1", "z:1", true), Err(("CONFLICT", Outcome::Unknown)));
    }
}
