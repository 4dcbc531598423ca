//! The courier: carries the operations that many tasks issue at the same moment for the same node in
//! few requests (`POST /v1/batch`).
//!
//! It takes the place of one HTTP attempt and changes nothing else: where an operation goes, what its
//! answer means and whether it may be tried again is decided for each operation by itself, as if it
//! had been sent alone. So the courier gives every caller its own result, or what the whole request
//! came to.
//!
//! For each node and [`Class`] there is a queue ([`queue`]), on each runtime that the client is used on. A
//! caller adds its operation, starts a carrier ([`carrier`]) if fewer than the allowed number are under way,
//! and waits. Carriers are tasks that live as long as there is something to carry: nothing runs while nothing
//! is asked for, and nothing has to be stopped. They run where their callers do: nobody may rely on another
//! runtime being driven. A caller that leaves takes its operation along unless a carrier has it; what is in
//! flight goes on.
//!
//! Bounds: what waits or is in flight has [`Room`]; a few requests are in flight for each queue; queues of nodes
//! that nothing is sent to any more are forgotten when there are [`NODES_MAX`] of them.

mod carrier;
mod queue;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::RandomState;
use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderValue};
use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::alarm::{Lent, Stock};
use crate::batch::{Operation, OperationResult};
use crate::http_client::{HttpClient, HttpResponse, SendError};
use crate::network::call::READ;

use super::room::Room;
use super::sequence::Sequence;
use queue::{Number, Queue, Waiting};

/// Longer keys travel alone. Nodes refuse them unless configured otherwise, and refuse in the same words what an
/// answer has no room for, after which fewer operations travel together.
const KEY_BYTES_MAX: usize = crate::config::KEY_BYTES_MAX_DEFAULT;

/// How long nothing may be heard of a node before callers stop waiting for a turn there, and later
/// ones ask others first: above an election, so that the others know the new leader by then if this
/// node is gone.
pub(super) const SILENT_AFTER: Duration = Duration::from_secs(1);

/// How many nodes have queues, on all runtimes, before those that are not in use are forgotten. More than a
/// large store has.
const NODES_MAX: usize = 512;

/// Operations that may travel together: what says how a batch is to be served is said once for all of
/// it. Writes and reads are apart also because a batch is answered when the slowest of it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Write,
    LinearizableRead,
    FollowerRead,
    StaleRead,
}

const CLASSES: [Class; 4] =
    [Class::Write, Class::LinearizableRead, Class::FollowerRead, Class::StaleRead];

impl Class {
    fn path_and_query(self) -> &'static str {
        match self {
            Self::Write => "/v1/batch",
            Self::LinearizableRead | Self::FollowerRead => "/v1/batch?consistency=linearizable",
            Self::StaleRead => "/v1/batch?consistency=stale",
        }
    }

    fn add_headers(self, headers: &mut HeaderMap) {
        if self == Self::FollowerRead {
            headers.insert(READ, HeaderValue::from_static("follower"));
        }
    }
}

/// What the node said about an operation.
#[derive(Debug, Clone)]
pub(crate) enum Carried {
    /// This one's result.
    Item(OperationResult),
    /// The same to all that travelled together: not results, but an error or something senseless.
    Whole(Arc<HttpResponse>),
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Undelivered {
    /// It was in a request that found no answer.
    Lost(SendError),
    /// It was not sent: those before it took all turns, and its time is over or the node is silent.
    NoTurn,
    /// It was not sent: it is too large to travel with others, or its answer may be.
    Alone,
}

/// Carries operations for one client. Cloning shares queues, connections and bounds.
#[derive(Clone)]
pub(crate) struct Courier {
    shared: Arc<Shared>,
}

struct Shared {
    http: HttpClient,
    sequence: Arc<Sequence>,
    room: Room,
    /// For those who wait.
    alarms: Stock,
    nodes: ArcSwap<HashMap<runtime::Id, Nodes, RandomState>>,
}

/// The queues of each node by its address, on one runtime.
type Nodes = HashMap<String, Lanes, RandomState>;

/// One for each class.
type Lanes = Arc<[Arc<Lane>; CLASSES.len()]>;

/// The queue of one class for one node.
struct Lane {
    address: String,
    /// Whose the numbers of its writes are.
    sequence: Arc<Sequence>,
    class: Class,
    queue: Mutex<Queue>,
}

impl fmt::Debug for Courier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Courier")
            .field("free_bytes", &self.shared.room.free())
            .finish_non_exhaustive()
    }
}

impl Default for Courier {
    fn default() -> Self {
        Self::new(HttpClient::new())
    }
}

impl Courier {
    pub(crate) fn new(http: HttpClient) -> Self {
        let (room, nodes) = (Room::default(), ArcSwap::default());
        let (sequence, alarms) = (Arc::new(Sequence::new()), Stock::default());
        Self { shared: Arc::new(Shared { http, sequence, room, alarms, nodes }) }
    }

    /// Where writes get their numbers from. All who share the courier are one client.
    pub(crate) fn sequence(&self) -> &Sequence {
        &self.shared.sequence
    }

    /// What the operations of all who share the courier have room in.
    pub(super) fn room(&self) -> &Room {
        &self.shared.room
    }

    /// The client that it sends with.
    pub(crate) fn http(&self) -> &HttpClient {
        &self.shared.http
    }

    /// Sends an operation to a node, together with others, and waits from `now` for what becomes of it
    /// until the deadline. Calls `silent` once when the node leaves the operation waiting for long.
    ///
    /// Dropping the future takes the operation back unless it is already in flight.
    pub(crate) async fn carry(
        &self,
        address: &str,
        class: Class,
        operation: Arc<Operation>,
        now: Instant,
        deadline: Instant,
        silent: impl FnOnce(),
    ) -> Result<Carried, Undelivered> {
        if operation.encoded_len() > queue::BYTES_MAX || operation.key().len() > KEY_BYTES_MAX {
            return Err(Undelivered::Alone);
        }
        let here = Handle::current().id();
        let lane = self.lane(here, address, class);
        let (reply, answer) = oneshot::channel();
        let (number, must_start) = {
            let mut queue = lane.queue();
            let number = queue.push(Waiting { operation, deadline, reply });
            (number, queue.must_start())
        };
        let ticket = Ticket { lane: &lane, number: Some(number) };
        if must_start {
            carrier::start(&self.shared.http, &lane);
        }
        let alarm = self.shared.alarms.lend(here);
        ticket.wait(answer, alarm, now, deadline, silent).await
    }

    /// The queue of callers on the runtime `here`.
    fn lane(&self, here: runtime::Id, address: &str, class: Class) -> Arc<Lane> {
        let lanes_in = |nodes: &HashMap<_, Nodes, _>| Some(nodes.get(&here)?.get(address)?.clone());
        if let Some(lanes) =
            self.shared.nodes.load().get(&here).and_then(|nodes| nodes.get(address))
        {
            return lanes[class as usize].clone();
        }
        let now = Instant::now();
        let new_lane = |class| {
            let (address, queue) = (address.to_owned(), Mutex::new(Queue::new(now)));
            let sequence = self.shared.sequence.clone();
            Arc::new(Lane { address, sequence, class, queue })
        };
        let lanes = Arc::new(CLASSES.map(new_lane));
        self.shared.nodes.rcu(|nodes| {
            let mut nodes = HashMap::clone(nodes);
            if nodes.values().map(HashMap::len).sum::<usize>() >= NODES_MAX {
                forget_unused(&mut nodes);
            }
            let here = nodes.entry(here).or_default();
            here.entry(address.to_owned()).or_insert_with(|| lanes.clone());
            nodes
        });
        // Another caller may have been first; and its entry may be forgotten again already.
        let lanes = lanes_in(&self.shared.nodes.load()).unwrap_or(lanes);
        lanes[class as usize].clone()
    }
}

/// Whoever uses a lane holds it.
fn forget_unused(nodes: &mut HashMap<runtime::Id, Nodes, RandomState>) {
    for nodes in nodes.values_mut() {
        nodes.retain(|_, lanes| lanes.iter().any(|lane| Arc::strong_count(lane) > 1));
    }
    nodes.retain(|_, nodes| !nodes.is_empty());
}

impl Lane {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Nothing inside can be half done: a panic elsewhere is no reason to fail here.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller's claim to its operation: dropping it takes the operation back.
struct Ticket<'a> {
    lane: &'a Lane,
    /// `None` when the operation is done.
    number: Option<Number>,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            // Too late is fine: then a carrier has it.
            let _ = self.lane.queue().withdraw(number);
        }
    }
}

impl Ticket<'_> {
    async fn wait(
        mut self,
        mut answer: oneshot::Receiver<Result<Carried, Undelivered>>,
        mut alarm: Lent<'_>,
        asked: Instant,
        deadline: Instant,
        silent: impl FnOnce(),
    ) -> Result<Carried, Undelivered> {
        let mut silent = Some(silent);
        let mut look_at = deadline.min(asked + SILENT_AFTER);
        loop {
            tokio::select! {
                biased;
                result = &mut answer => {
                    self.number = None;
                    return result.unwrap_or_else(|_| Err(self.abandoned()));
                }
                () = alarm.until(look_at) => {}
            }
            match self.look(asked, deadline) {
                Look::Wait(until) => look_at = until,
                Look::Silent => {
                    if let Some(silent) = silent.take() {
                        silent();
                    }
                    look_at = deadline;
                }
                Look::Over(why) => {
                    // The answer may have come in the meantime, and then it counts.
                    self.number = None;
                    return answer.try_recv().unwrap_or(Err(why));
                }
            }
        }
    }

    /// What to do when the alarm goes off.
    fn look(&self, asked: Instant, deadline: Instant) -> Look {
        let number = self.number.expect("it is looked at while it is not done");
        let now = Instant::now();
        let mut queue = self.lane.queue();
        // A node that answers others is slow and not silent: it is waited for.
        let silent_at = queue.heard().max(asked) + SILENT_AFTER;
        let over = now >= deadline;
        if !over && now < silent_at {
            return Look::Wait(deadline.min(silent_at));
        }
        if queue.withdraw(number) {
            return Look::Over(Undelivered::NoTurn);
        }
        if !over {
            return Look::Silent;
        }
        let (address, waited) = (self.lane.address.clone(), now - asked);
        Look::Over(Undelivered::Lost(SendError::TimedOut { address, waited }))
    }

    /// The carrier was dropped on its way: the runtime that it ran on is shutting down.
    fn abandoned(&self) -> Undelivered {
        let address = self.lane.address.clone();
        let message = "the client is shutting down".to_owned();
        Undelivered::Lost(SendError::MaybeSent { address, message })
    }
}

enum Look {
    /// All is well so far; look again then.
    Wait(Instant),
    /// It is in flight, and nothing has been heard of the node for long.
    Silent,
    Over(Undelivered),
}
