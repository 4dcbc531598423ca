//! The use cases of one node: put, get, delete, ring, membership, health.
//!
//! [`App`] ties the Raft handle to the store's read side. It decides nothing that the log must
//! decide: conditions and ownership of a write are checked at apply, ownership of a read in the same
//! moment as the data. It knows nothing of HTTP: [`crate::network::api`] decodes requests, calls
//! it, and encodes what it says.
//!
//! Every answer that is an error says truly whether the request took effect. The rule for writes:
//! until the command is handed to Raft it is "not applied"; from then on everything but Raft's own
//! answer is "unknown".

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use openraft::LogIdOptionExt;
use openraft::type_config::alias::WatchReceiverOf;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::config::Limits;
use crate::core_end;
use crate::handoff::{Ownership, RingState};
use crate::network::error::{ApiError, Outcome};
use crate::network::raft_network_impl::{PeerNetwork, ReadIndexError};
use crate::node::Raft;
use crate::once::Once;
use crate::proposer::{ProposeError, Proposer};
use crate::read_gate::{ReadGate, ReadIndexFailure};
use crate::ring::{Ring, RingNode, RingTable};
use crate::store::formation::Formation;
use crate::store::{Lookup, StateReader};
use crate::telemetry::{self, Operation, Telemetry};
use crate::types::{
    Applied, ClusterId, Command, Condition, NodeAddrs, NodeId, Record, Revision, TypeConfig, Write,
    Written,
};

pub use crate::types::Consistency;

mod batch;
mod handoffs;
mod health;
mod membership;
mod refusal;

/// What a delete did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deletion {
    /// The state machine's revision afterwards.
    pub revision: Revision,
    /// Whether there was something to delete.
    pub deleted: bool,
}

/// Who a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its id in the cluster.
    pub node_id: NodeId,
    /// Where it listens.
    pub addrs: NodeAddrs,
}

/// Between two looks at something that changes within milliseconds.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// One node's use cases. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct App {
    inner: Arc<Inner>,
}

/// What an app works with.
pub struct Parts {
    /// The node's member of its cluster.
    pub raft: Raft,
    /// The applied state.
    pub reader: StateReader,
    /// Which forming of its cluster the node belongs to.
    pub formation: Formation,
    /// Read indexes for linearizable reads.
    pub gate: ReadGate,
    /// The way of writes into the log.
    pub proposer: Proposer,
    /// The way to the other members.
    pub peers: PeerNetwork,
}

struct Inner {
    identity: Identity,
    limits: Limits,
    parts: Parts,
    in_flight: Arc<Semaphore>,
    /// Kept, because each request looks at both, and a receiver costs more than a look.
    failure: watch::Receiver<Option<String>>,
    raft_metrics: WatchReceiverOf<TypeConfig, Metrics>,
    /// Whether Raft's core task has ended, in order or not.
    core_ended: AtomicBool,
    telemetry: Telemetry,
    /// Held by whoever reads the whole state: it is much, and twice at once would be no faster.
    digesting: Arc<tokio::sync::Mutex<()>>,
    /// Membership changes, which outlive the requests that asked for them, and the watch over Raft's core.
    tasks: TaskTracker,
}

impl std::ops::Deref for Inner {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl App {
    /// Ties the parts together, and watches over Raft until it ends.
    pub fn new(identity: Identity, limits: Limits, parts: Parts) -> Self {
        let in_flight = Arc::new(Semaphore::new(limits.requests_in_flight_max));
        let (telemetry, tasks) = (Telemetry::new(), TaskTracker::new());
        let (failure, raft_metrics) = (parts.reader.failure(), parts.raft.metrics());
        let inner = Inner {
            identity,
            limits,
            parts,
            in_flight,
            failure,
            raft_metrics,
            core_ended: AtomicBool::new(false),
            telemetry,
            digesting: Arc::default(),
            tasks,
        };
        let inner = Arc::new(inner);
        let watched = inner.clone();
        inner.tasks.spawn(async move {
            core_end::ended(&watched.raft).await;
            watched.core_ended.store(true, Ordering::Release);
        });
        Self { inner }
    }

    /// Who this node is.
    pub fn identity(&self) -> &Identity {
        &self.inner.identity
    }

    /// What a request may cost here.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// Waits for what goes on in the background. Call after Raft stopped, or it may take long.
    pub async fn join(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    // --- Keys ------------------------------------------------------------------------------------

    /// Stores a value; returns its revision. With `once` it does so at most once, and a repeat returns
    /// what the first one did.
    ///
    /// Dropping the future does not take the write back once it was proposed.
    pub async fn put(
        &self,
        key: Bytes,
        value: Bytes,
        condition: Condition,
        once: Option<Once>,
        deadline: Instant,
    ) -> Result<Revision, ApiError> {
        let started = Instant::now();
        let write = Write::put(key, value, condition).once(once);
        let result = self.write(write, deadline).await.map(|written| match written {
            Written::Put { revision } => revision,
            other => unreachable!("a put was answered by {other:?}"),
        });
        self.record(Operation::Put, started.elapsed(), &result);
        result
    }

    /// Removes a key. `once` as with [`Self::put`].
    pub async fn delete(
        &self,
        key: Bytes,
        condition: Condition,
        once: Option<Once>,
        deadline: Instant,
    ) -> Result<Deletion, ApiError> {
        let started = Instant::now();
        let write = Write::delete(key, condition).once(once);
        let result = self.write(write, deadline).await.map(|written| match written {
            Written::Deleted { revision, deleted } => Deletion { revision, deleted },
            other => unreachable!("a delete was answered by {other:?}"),
        });
        self.record(Operation::Delete, started.elapsed(), &result);
        result
    }

    /// Reads a key; `None` when it has no record.
    pub async fn get(
        &self,
        key: &[u8],
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<Option<Record>, ApiError> {
        let started = Instant::now();
        let result = self.read(key, consistency, deadline).await;
        let stale = consistency == Consistency::Stale;
        let operation = if stale { Operation::GetStale } else { Operation::Get };
        self.record(operation, started.elapsed(), &result);
        result
    }

    fn record<T>(&self, operation: Operation, took: Duration, result: &Result<T, ApiError>) {
        let failure = result.as_ref().err().map(|error| error.status_and_code().1);
        self.inner.telemetry.record(operation, took, failure);
    }

    async fn write(&self, write: Write, deadline: Instant) -> Result<Written, ApiError> {
        self.check_serving()?;
        self.check_initialized()?;
        // Whoever asked has given up already: better a true "no" than a write that nobody awaits.
        if Instant::now() >= deadline {
            return Err(not_proposed());
        }
        let _permit = self.admit()?;
        let key = write.key.clone();
        // Only to save a log entry: what counts is the same check at apply.
        self.check_owner(&key)?;
        let answers = self.inner.proposer.propose(vec![write], deadline).await;
        let answer = answers.into_iter().next().expect("one answer for one write");
        self.judge(&key, answer)
    }

    /// What became of one write, in the words of the API.
    fn judge(
        &self,
        key: &[u8],
        answer: Result<Written, ProposeError>,
    ) -> Result<Written, ApiError> {
        match answer {
            Ok(Written::ConditionFailed { current }) => Err(ApiError::ConditionFailed { current }),
            Ok(Written::WrongCluster { .. }) => Err(self.wrong_cluster(key)),
            Ok(Written::Frozen) => Err(ApiError::Frozen),
            Ok(Written::OnceReused) => Err(ApiError::OnceReused),
            Ok(Written::OnceForgotten) => Err(ApiError::OnceForgotten),
            Ok(Written::TooManyClients) => Err(ApiError::TooManyClients),
            Ok(done) => Ok(done),
            Err(ProposeError::Raft(error)) => Err(self.write_error(&error)),
            Err(ProposeError::NotProposed) => Err(not_proposed()),
            Err(ProposeError::Unanswered) => Err(unanswered()),
        }
    }

    /// Hands a command to Raft and waits until it is applied.
    async fn propose(&self, command: Command, deadline: Instant) -> Result<Applied, ApiError> {
        let written = self.inner.raft.client_write(command);
        match tokio::time::timeout_at(deadline, written).await {
            Ok(Ok(response)) => Ok(response.data),
            Ok(Err(error)) => Err(self.write_error(&error)),
            Err(_) => Err(unanswered()),
        }
    }

    async fn read(
        &self,
        key: &[u8],
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<Option<Record>, ApiError> {
        self.check_serving()?;
        self.check_initialized()?;
        if consistency == Consistency::Stale {
            self.check_ring(&self.inner.reader.ring_view())?;
        } else {
            let _permit = self.admit()?;
            self.check_owner(key)?;
            self.await_read_index(consistency, deadline).await?;
        }
        match self.inner.reader.get(key).map_err(|e| refusal::storage(e, Outcome::NotApplied))? {
            Lookup::Found(record) => Ok(Some(record)),
            Lookup::Absent => Ok(None),
            Lookup::NotHere(ring) => Err(self.not_here(&ring, key)),
        }
    }

    /// Returns once this node has applied everything that was acknowledged before the call.
    async fn await_read_index(
        &self,
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<(), ApiError> {
        let timeout = || ApiError::Timeout {
            message: "no majority confirmed in time that the leader still leads",
            outcome: Outcome::NotApplied,
        };
        let index = loop {
            if Instant::now() >= deadline {
                return Err(timeout());
            }
            let answer = self.inner.gate.read_index(deadline).await;
            match answer {
                // What it has applied is what it may answer from.
                Some(Ok(_)) => return Ok(()),
                // An old leader that is cut off: until it hears of the new one it can only wait.
                Some(Err(ReadIndexFailure::NoQuorum)) => {
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
                Some(Err(ReadIndexFailure::NotLeader(to))) => {
                    let error = self.not_leader(to, Outcome::NotApplied);
                    let ApiError::NotLeader { leader, .. } = &error else { return Err(error) };
                    if consistency == Consistency::Linearizable {
                        return Err(error);
                    }
                    break self.ask_leader(leader, deadline).await?;
                }
                Some(Err(ReadIndexFailure::Fatal(error))) => {
                    return Err(self.fatal(&error, Outcome::NotApplied));
                }
                None if Instant::now() >= deadline => return Err(timeout()),
                None => return Err(ApiError::Stopping { outcome: Outcome::NotApplied }),
            }
        };
        self.await_applied(index, deadline).await
    }

    async fn ask_leader(&self, leader: &RingNode, deadline: Instant) -> Result<u64, ApiError> {
        let addrs = NodeAddrs { http: leader.http.clone(), rpc: leader.rpc.clone() };
        let answer = self.inner.peers.read_index(leader.id, &addrs, deadline).await;
        answer.map(|log_id| log_id.index).map_err(|error| match error {
            ReadIndexError::Timeout => ApiError::Timeout {
                message: "the leader did not answer in time",
                outcome: Outcome::NotApplied,
            },
            _ => ApiError::NoLeader {
                message: "the leader could not be asked for its read index",
                outcome: Outcome::NotApplied,
            },
        })
    }

    async fn await_applied(&self, index: u64, deadline: Instant) -> Result<(), ApiError> {
        if self.inner.reader.last_applied().index() >= Some(index) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = self.inner.raft.wait(Some(left));
        wait.applied_index_at_least(Some(index), "linearizable read").await.map(|_| ()).map_err(
            |_| ApiError::Timeout {
                message: "this node did not catch up with the leader in time",
                outcome: Outcome::NotApplied,
            },
        )
    }

    // --- Ring ------------------------------------------------------------------------------------

    /// The ring that this node's cluster lives by, as far as this node knows.
    pub fn ring(&self) -> Arc<RingTable> {
        self.inner.reader.ring()
    }

    /// The ring, with the change that is under way.
    pub fn ring_view(&self) -> Arc<RingState> {
        self.inner.reader.ring_view()
    }

    /// Gives the cluster its first ring; the same ring again is fine. What is to come after it is no part of the
    /// comparison, as a ring that a node tells in the middle of a change has it, and is never installed.
    pub async fn install_ring(&self, mut ring: Ring, deadline: Instant) -> Result<(), ApiError> {
        self.check_serving()?;
        // A cluster that has a ring once has one ever after, so that this one can only be compared below.
        if ring.next.take().is_some() && self.ring().ring().epoch == 0 {
            self.check_leader()?;
            return Err(ApiError::Conflict("a first ring has no `next`".into()));
        }
        if serde_json::to_vec(&ring).map_or(usize::MAX, |json| json.len()) > self.ring_bytes_max() {
            return Err(ApiError::TooLarge { what: "ring", max: self.ring_bytes_max() });
        }
        RingTable::new(ring.clone()).map_err(|error| ApiError::BadRequest(error.to_string()))?;
        match self.propose(Command::InstallRing(Box::new(ring)), deadline).await? {
            Applied::RingInstalled { .. } => Ok(()),
            Applied::RingRefused(refusal) => Err(ApiError::Conflict(refusal.to_string())),
            other => unreachable!("a ring was answered by {other:?}"),
        }
    }

    /// A ring travels to the followers in one message.
    fn ring_bytes_max(&self) -> usize {
        self.inner.limits.peer_frame_bytes_max / 2
    }

    fn check_owner(&self, key: &[u8]) -> Result<(), ApiError> {
        let ring = self.inner.reader.ring_view();
        self.check_ring(&ring)?;
        if ring.serves(&self.inner.identity.cluster, key) {
            return Ok(());
        }
        Err(self.not_here(&ring, key))
    }

    fn wrong_cluster(&self, key: &[u8]) -> ApiError {
        self.not_here(&self.inner.reader.ring_view(), key)
    }

    /// Why this cluster does not serve a key, by this ring state.
    fn not_here(&self, ring: &RingState, key: &[u8]) -> ApiError {
        match ring.ownership(&self.inner.identity.cluster, key) {
            Ownership::Elsewhere(owner) => ApiError::WrongCluster {
                owner: Box::new(owner.clone()),
                epoch: ring.epoch(),
                next: ring.successor(&self.inner.identity.cluster, key).cloned().map(Box::new),
            },
            Ownership::Frozen(_) => ApiError::Frozen,
            // It does now: it was refused by an older state.
            Ownership::Here => {
                ApiError::NoLeader { message: "the ring is changing", outcome: Outcome::NotApplied }
            }
        }
    }
}

type Metrics = openraft::RaftMetrics<TypeConfig>;

fn not_proposed() -> ApiError {
    ApiError::Timeout {
        message: "the deadline passed before the write was proposed",
        outcome: Outcome::NotApplied,
    }
}

fn unanswered() -> ApiError {
    ApiError::Timeout {
        message: "no majority confirmed the write in time; it may still take effect",
        outcome: Outcome::Unknown,
    }
}
