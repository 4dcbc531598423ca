//! `KVClient`: the client of the whole store.
//!
//! It fetches the ring from any node, sends each key to the cluster that CARP says owns it, and
//! leaves the way to that cluster's leader to [`RaftNode`](crate::raft_node::RaftNode). Its ring may
//! be old: servers check ownership again, and one that does not own the key names the owner and its
//! ring's epoch. Then the client gets the newer ring, once for all calls that wait for it, and goes
//! on there; that cluster applied nothing, so this is safe for writes too. One that names an older ring
//! than the client's has been restarted, and is asked again. A key that is being handed
//! over is waited for.
//!
//! Operations that many tasks issue at the same moment share requests, a few in flight at each node
//! (`raft_node::courier`); a lone one is sent at once.
//!
//! Without a ring there must be one cluster, which gets everything.

use std::cmp::Ordering;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::network::error::Outcome;
use crate::raft_node::pace::{Budget, call_backoff};
use crate::raft_node::{Answer, Call, Courier, Doubt, TIMEOUT_DEFAULT, key_operations};
use crate::ring::{Ring, RingCluster};
use crate::types::{ClusterId, Condition, Epoch, Record, Revision};

pub use crate::client_error::ClientError;
pub use crate::raft_node::Deleted;
pub use crate::types::Consistency;

mod endpoints;
mod refresh;
mod routes;

pub use endpoints::Endpoints;
use refresh::Rings;
use routes::Target;

/// How often one operation follows clusters that name another owner. A change of the ring moves a
/// key once, but its two clusters may disagree for as long as a node of the new owner that was
/// restarted, or has just been elected, takes to apply what its log holds: it knows of the old owner
/// until then. With the pauses between them about seven seconds; more means that something is wrong.
const REDIRECTS_MAX: u32 = 24;

/// How many of them are followed at once: an old ring's, and that of a ring changed meanwhile.
const REDIRECTS_AT_ONCE: u32 = 2;

/// How long a call that was told who owns its key waits for the ring that says so. Mostly that takes a
/// millisecond; but somebody may be looking for it at clusters that do not answer.
const RING_PATIENCE: Duration = Duration::from_millis(200);

/// The client of the whole store. Cloning shares connections and the ring; it is meant to be shared
/// by thousands of tasks.
///
/// Every operation gives up at its deadline, 10 s unless set. Until then a write is tried again whatever
/// becomes of an attempt, and still happens at most once. Dropping its future leaves its outcome unknown.
#[derive(Clone)]
pub struct KVClient {
    rings: Arc<Rings>,
    timeout: Duration,
}

impl fmt::Debug for KVClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let epoch = self.rings.routes().epoch();
        f.debug_struct("KVClient").field("epoch", &epoch).finish_non_exhaustive()
    }
}

key_operations!(KVClient);

impl KVClient {
    /// A client of the clusters in a nodes file (`all_nodes.json`), with their ring.
    ///
    /// # Errors
    /// [`ClientError::NodesFile`] when the file cannot be used, else as [`Self::from_endpoints`].
    pub async fn new(nodes_file: impl AsRef<Path>) -> Result<Self, ClientError> {
        Self::from_endpoints(Endpoints::from_file(nodes_file.as_ref()).await?).await
    }

    /// A client of the clusters that these nodes belong to: one list for each cluster, or one list
    /// of nodes of any clusters. Asks them for the ring. Safe to cancel.
    ///
    /// # Errors
    /// [`ClientError::Endpoints`] for an address that is none, [`ClientError::NoRing`] when there are
    /// several clusters without a ring, [`ClientError::Unreachable`] and the like when nobody answers.
    pub async fn from_endpoints(endpoints: impl Into<Endpoints>) -> Result<Self, ClientError> {
        let rings = Rings::find(endpoints.into(), TIMEOUT_DEFAULT).await?;
        Ok(Self { rings: Arc::new(rings), timeout: TIMEOUT_DEFAULT })
    }

    /// The same client with another deadline for each operation.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The cluster that owns `key` by the ring in hand; `None` without a ring. Asks nobody.
    pub fn owner(&self, key: impl AsRef<[u8]>) -> Option<RingCluster> {
        self.rings.routes().owner(key.as_ref()).cloned()
    }

    /// The id of the cluster that `key` is sent to, and the addresses of its nodes. Without a ring
    /// it asks that one cluster for its id.
    pub async fn route(
        &self,
        key: impl AsRef<[u8]>,
    ) -> Result<(ClusterId, Vec<String>), ClientError> {
        let target = self.rings.routes().target(key.as_ref());
        let nodes = target.client.nodes();
        match target.id {
            Some(id) => Ok((id, nodes)),
            None => Ok((target.client.with_timeout(self.timeout).metrics().await?.cluster, nodes)),
        }
    }

    /// The ring in hand; of epoch 0 when there is none.
    pub fn ring(&self) -> Ring {
        self.rings.routes().ring().clone()
    }

    fn courier(&self) -> &Courier {
        self.rings.courier()
    }

    /// Sends the call to the cluster that owns the key, and from there to whom that names.
    async fn run(&self, key: &[u8], mut call: Call<'_>) -> Result<Answer, ClientError> {
        let mut doubt = call.doubt();
        let result = self.follow(key, &mut call, &mut doubt).await;
        result.map_err(|error| doubt.settle(error))
    }

    async fn follow(
        &self,
        key: &[u8],
        call: &mut Call<'_>,
        doubt: &mut Doubt,
    ) -> Result<Answer, ClientError> {
        let budget = Budget::new(self.timeout);
        self.rings.refresh_if_due();
        let routes = self.rings.routes();
        // The newest ring that this call has chosen a target by; others may get newer ones meanwhile.
        let mut used = routes.epoch();
        let mut target = routes.target(key);
        drop(routes);
        let mut backoff = call_backoff();
        let mut redirects = 0;
        loop {
            let its_budget = if target.has_other { budget.half() } else { budget };
            let (address, owner, epoch) = match target.client.execute(call, its_budget, doubt).await
            {
                Err(ClientError::WrongCluster { address, owner, epoch }) => (address, owner, epoch),
                Err(error) if is_out_of_reach(&error) => {
                    let pause = backoff.pause_with_jitter();
                    let is_refused = matches!(error, ClientError::Unreachable { .. });
                    let had_all_its_time = its_budget.deadline() == budget.deadline();
                    if budget.left() <= pause || (had_all_its_time && !is_refused) {
                        // A cluster that has left the ring may be gone: nobody else should have to wait for that.
                        self.rings.look_for_newer();
                        return Err(error);
                    }
                    tokio::time::sleep(pause).await;
                    // What sends it back to a cluster that is not reached does not go round in a circle.
                    redirects = 0;
                    target = self.target_past(target, key, &mut used, budget).await;
                    continue;
                }
                Err(error) if target.id.is_some() && is_no_member(&error) => {
                    if error.outcome() == Outcome::Unknown {
                        doubt.raise(&error.to_string());
                    }
                    // Waiting makes no cluster of them: without a newer ring this is the answer.
                    self.rings.refresh_beyond(used, budget).await;
                    target = self.newer_target(key, &mut used).ok_or(error)?;
                    continue;
                }
                other => return other,
            };
            redirects += 1;
            if redirects > REDIRECTS_MAX {
                let last = owner.map_or(address, |owner| format!("cluster {}", owner.id));
                return Err(ClientError::TooManyRedirects { count: redirects, last });
            }
            if redirects > REDIRECTS_AT_ONCE {
                tokio::time::sleep(backoff.pause_with_jitter().min(budget.left())).await;
            }
            if let (Some(refused), Some(owner)) = (&target.id, owner.as_deref()) {
                self.rings.heard(key, (refused, &address), &owner.id, epoch);
            }
            let patience = if owner.is_some() { RING_PATIENCE } else { budget.left() };
            self.rings.refresh_to(epoch, &address, budget, patience).await;
            target = self.next_target(key, &target, owner.as_deref(), epoch);
        }
    }

    /// Where to go when the cluster at `silent` is not reached: it is being restarted, or has left the ring and is
    /// gone; then others know who owns the key. Or the key is being handed over, and the other cluster of the two
    /// serves it already: only the silent one could have said so.
    async fn target_past(
        &self,
        silent: Target,
        key: &[u8],
        used: &mut Epoch,
        budget: Budget,
    ) -> Target {
        let by_now = |used: &mut Epoch| {
            let other = |id| self.rings.routes().other_target(key, id);
            self.newer_target(key, used).or_else(|| silent.id.as_ref().and_then(other))
        };
        if let Some(target) = by_now(used) {
            self.rings.look_for_newer();
            return target;
        }
        self.rings.confirm(budget).await;
        by_now(used).unwrap_or(silent)
    }

    /// Where to go by a ring newer than the one of epoch `used`, if there is one by now.
    fn newer_target(&self, key: &[u8], used: &mut Epoch) -> Option<Target> {
        let routes = self.rings.routes();
        let is_newer = routes.epoch() > *used;
        *used = routes.epoch();
        is_newer.then(|| routes.target(key))
    }

    /// Where to go after `refused` said, by its ring of `epoch`, that `named` owns the key. Who speaks by an
    /// older ring than the one in hand lags behind: whom it names may be gone.
    fn next_target(
        &self,
        key: &[u8],
        refused: &Target,
        named: Option<&RingCluster>,
        epoch: Epoch,
    ) -> Target {
        let routes = self.rings.routes();
        let by_ring = routes.target(key);
        let ring_knows_better = match routes.epoch().cmp(&epoch) {
            Ordering::Greater => true,
            Ordering::Equal => by_ring.id != refused.id,
            Ordering::Less => false,
        };
        match named {
            Some(owner) if !ring_knows_better => routes.target_named(owner, self.rings.courier()),
            _ => by_ring,
        }
    }
}

/// Whether the cluster did nothing and gave no answer, and waiting for it longer need not be all that can be done.
fn is_out_of_reach(error: &ClientError) -> bool {
    use ClientError::{Timeout, TooManyInFlight, TooManyWaiting, Unreachable};
    matches!(
        error,
        Unreachable { .. } | Timeout { .. } | TooManyInFlight { .. } | TooManyWaiting { .. }
    )
}

/// Whether nodes that the ring lists said that they belong to no cluster, or what none would say.
fn is_no_member(error: &ClientError) -> bool {
    match error {
        ClientError::Server { code, .. } => code == "NOT_INITIALIZED",
        ClientError::Garbled { .. } => true,
        _ => false,
    }
}
