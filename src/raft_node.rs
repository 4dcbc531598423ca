//! `RaftNode`: the client of one cluster.
//!
//! It knows the HTTP addresses of a cluster's nodes, finds the leader among them and follows it, and
//! keeps on trying within a deadline when nodes are down, paused or electing, also when an attempt may
//! have arrived: every write carries the client's name and a number ([`crate::once`]), so that the
//! cluster carries it out at most once and answers a repeat as it answered the first. Only when the
//! deadline passes and some attempt may have arrived, the outcome is `Unknown`.
//!
//! Ownership is not its business: when the cluster says that another one owns the key, that is the
//! error [`ClientError::WrongCluster`], which [`KVClient`](crate::kvclient::KVClient) follows.
//!
//! How it works: a `Call` says what to send, `sequence` numbers writes, `courier` sends operations on
//! keys together with others, `verdict` says what an answer means, `journey` when to pause and when to
//! give up, `doubt` what is uncertain then, `view` whom to ask next. This file holds the loop that joins
//! them, and `operations` the methods that it shares with `KVClient`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::time::Instant;

use crate::client_error::ClientError;
use crate::handoff::{Done, Step};
use crate::http_client::SendError;
use crate::metrics::{HandoffView, NodeMetrics, Sizes};
use crate::network::error::Outcome;
use crate::ring::Ring;
use crate::types::{Condition, NodeId, Record, Revision};

pub use crate::types::Consistency;

mod answer;
mod call;
mod courier;
mod doubt;
mod journey;
mod operations;
pub(crate) mod pace;
mod room;
mod sequence;
mod verdict;
mod view;

pub(crate) use answer::Answer;
pub use answer::Deleted;
use answer::Reply;
pub(crate) use call::Call;
pub(crate) use courier::Courier;
use courier::{SILENT_AFTER, Undelivered};
pub(crate) use doubt::Doubt;
use journey::Journey;
pub(crate) use operations::key_operations;
use pace::Budget;
use room::Share;
use verdict::{Reason, Verdict, judge};
use view::View;

/// How long an operation may take with all its attempts, unless set: as long as a node's own
/// deadline for a request.
pub(crate) const TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// How long a node that did not answer, or cannot serve, is asked last. Long enough that a paused node
/// costs few calls their first attempt, short enough that a returned one is used again soon.
const SUSPECT_FOR: Duration = Duration::from_secs(5);

/// The client of one cluster. Cloning shares connections and what is known about the nodes; it is
/// meant to be shared by thousands of tasks.
///
/// Every method gives up at the deadline. Until then a write is tried again whatever becomes of an
/// attempt, and still happens at most once. Dropping its future leaves its outcome unknown.
#[derive(Debug, Clone)]
pub struct RaftNode {
    shared: Arc<Shared>,
    timeout: Duration,
}

#[derive(Debug)]
struct Shared {
    courier: Courier,
    share: Share,
    view: ArcSwap<View>,
    /// Counts the calls that any node can serve, so that they are spread over all.
    turn: AtomicUsize,
}

key_operations!(RaftNode);

impl RaftNode {
    /// A client of the cluster whose nodes serve HTTP at these addresses (`HOST:PORT`). Some of them
    /// are enough: others are learned when they lead. Connects to nobody yet.
    pub fn new(nodes: Vec<String>) -> Self {
        Self::with_courier(nodes, Courier::default())
    }

    /// Shares the courier's connections and bounds with all who have it.
    pub(crate) fn with_courier(nodes: Vec<String>, courier: Courier) -> Self {
        Self::one_of(1, nodes, courier)
    }

    /// The same for one of so many clusters: its operations leave room for those of the others.
    pub(crate) fn one_of(clusters: usize, nodes: Vec<String>, courier: Courier) -> Self {
        let (view, share) = (ArcSwap::from_pointee(View::new(nodes)), Share::of(clusters));
        let shared = Arc::new(Shared { courier, share, view, turn: AtomicUsize::new(0) });
        Self { shared, timeout: TIMEOUT_DEFAULT }
    }

    /// This client, and what it knows, as that of one of so many clusters.
    pub(crate) fn sharing_with(&self, clusters: usize) -> Self {
        let share = Share::of(clusters);
        if share.is_as_large_as(&self.shared.share) {
            return self.clone();
        }
        let view = ArcSwap::new(self.shared.view.load_full());
        let (courier, turn) = (self.shared.courier.clone(), AtomicUsize::new(0));
        Self { shared: Arc::new(Shared { courier, share, view, turn }), timeout: self.timeout }
    }

    /// The same client with another deadline for each operation (10 s unless set).
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The addresses known at the moment: the given ones, then learned ones.
    pub fn nodes(&self) -> Vec<String> {
        self.shared.view.load().nodes().to_vec()
    }

    /// Forms a cluster of one out of the first address given to [`Self::new`], and of that one only:
    /// trying the next node after a failure could form a second cluster.
    pub async fn init(&self) -> Result<(), ClientError> {
        self.found(b"{}").await
    }

    /// As [`Self::init`], for a cluster that is to become part of a ring: it serves no key before it
    /// has one.
    pub async fn init_awaiting_ring(&self) -> Result<(), ClientError> {
        self.found(br#"{"awaits_ring":true}"#).await
    }

    async fn found(&self, body: &[u8]) -> Result<(), ClientError> {
        let Some(first) = self.shared.view.load().nodes().first().cloned() else {
            return Err(no_nodes());
        };
        self.ask_one(&Call::manage("/cluster/init", body.to_vec()), first).await?;
        Ok(())
    }

    /// Adds a node that follows without a vote; returns once that is committed. Again changes
    /// nothing.
    pub async fn add_learner(&self, id: NodeId, http: &str, rpc: &str) -> Result<(), ClientError> {
        self.manage("/cluster/add-learner", &(id, http, rpc)).await
    }

    /// Makes exactly these nodes the voters; returns when they have caught up and it is committed.
    pub async fn change_membership(&self, voters: &[NodeId]) -> Result<(), ClientError> {
        let voters: BTreeSet<_> = voters.iter().collect();
        self.manage("/cluster/change-membership", &voters).await
    }

    /// What any reachable node says about itself.
    pub async fn metrics(&self) -> Result<NodeMetrics, ClientError> {
        self.ask(Call::inspect("/cluster/metrics")).await?.json()
    }

    /// What the node at this address says about itself. Asks nobody else.
    pub async fn metrics_of(&self, address: &str) -> Result<NodeMetrics, ClientError> {
        self.ask_one(&Call::inspect("/cluster/metrics"), address.to_owned()).await?.json()
    }

    /// The ring that any reachable node lives by; of epoch 0 when it has none.
    pub async fn get_hash_ring(&self) -> Result<Ring, ClientError> {
        self.ask(Call::inspect("/v1/ring")).await?.json()
    }

    /// The ring that the node at this address lives by. Asks nobody else.
    pub async fn hash_ring_of(&self, address: &str) -> Result<Ring, ClientError> {
        self.ask_one(&Call::inspect("/v1/ring"), address.to_owned()).await?.json()
    }

    /// Gives a cluster that has no ring its first one. The same ring again changes nothing; any
    /// other is refused with the code `CONFLICT`.
    pub async fn update_hash_ring(&self, ring: &Ring) -> Result<(), ClientError> {
        self.manage("/cluster/update-hash-ring", ring).await
    }

    /// What the cluster's leader knows of the ring, of a change of it and of the cluster's part in that;
    /// everything that was acknowledged before. Counts keys and bytes only with [`Sizes::Counted`].
    pub async fn handoffs(&self, sizes: Sizes) -> Result<HandoffView, ClientError> {
        let path = match sizes {
            Sizes::Omitted => "/cluster/handoffs",
            Sizes::Counted => "/cluster/handoffs?sizes=true",
        };
        self.ask(Call::inspect_leader(path)).await?.json()
    }

    /// Takes a step of a change of the ring; a refusal is [`ClientError::StepRefused`]. Asked again
    /// when an answer is lost: a repeat gets the first answer.
    pub async fn step(&self, step: &Step) -> Result<Done, ClientError> {
        let body = serde_json::to_vec(step).expect("steps are always JSON");
        self.ask(Call::step(body)).await?.json()
    }

    async fn manage(&self, path: &str, body: &impl serde::Serialize) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).expect("ids, addresses and rings are always JSON");
        self.ask(Call::manage(path, body)).await?;
        Ok(())
    }

    /// Which key a call is about is of no concern here: all of them are this cluster's.
    async fn run(&self, _key: &[u8], call: Call<'_>) -> Result<Answer, ClientError> {
        self.ask(call).await
    }

    async fn ask(&self, mut call: Call<'_>) -> Result<Answer, ClientError> {
        let mut doubt = call.doubt();
        let result = self.execute(&mut call, Budget::new(self.timeout), &mut doubt).await;
        result.map_err(|error| doubt.settle(error))
    }

    fn courier(&self) -> &Courier {
        &self.shared.courier
    }

    /// One attempt at one node, which has all the time there is.
    async fn ask_one(&self, call: &Call<'_>, address: String) -> Result<Answer, ClientError> {
        let (budget, now) = (Budget::new(self.timeout), Instant::now());
        match self.attempt(call, &address, budget, now, budget.left_at(now)).await {
            Verdict::Answer(reply) => Ok(Answer { kind: call.kind, address, reply }),
            Verdict::Fail(error)
            | Verdict::Elsewhere(Reason::Declined(error) | Reason::NoTurn(error)) => Err(error),
            Verdict::Redirect(last) => Err(ClientError::TooManyRedirects { count: 1, last }),
            Verdict::Elsewhere(Reason::Refused(error)) => {
                Err(ClientError::Unreachable { tried: vec![error.to_string()] })
            }
            Verdict::Elsewhere(Reason::Silent(message)) => {
                if call.kind.outcome_when_in_doubt() == Outcome::Unknown {
                    return Err(ClientError::AnswerLost { message });
                }
                Err(ClientError::Timeout { waited: budget.elapsed(), last: message })
            }
        }
    }

    /// Carries a call to the node that serves it, through redirects, elections and dead nodes. An error
    /// speaks of what was met last; `doubt` knows whether there is more to say.
    pub(crate) async fn execute(
        &self,
        call: &mut Call<'_>,
        budget: Budget,
        doubt: &mut Doubt,
    ) -> Result<Answer, ClientError> {
        let _room = match call.operation_bytes() {
            None => None,
            Some(bytes) => {
                let (room, share) = (self.shared.courier.room(), &self.shared.share);
                let room = room.take(share, bytes, budget.deadline()).await;
                Some(room.ok_or_else(|| ClientError::TooManyWaiting { waited: budget.elapsed() })?)
            }
        };
        call.make();
        let call = &*call;
        let mut journey = Journey::new(budget, doubt);
        let mut address = self.first_for(call).ok_or_else(no_nodes)?;
        loop {
            // Asked for once an attempt: the clock is among the dearest things on this way.
            let now = Instant::now();
            journey.check_time(now)?;
            let patience = call.kind.attempt_timeout(budget.left_at(now));
            let (pause, next) = match self.attempt(call, &address, budget, now, patience).await {
                Verdict::Answer(reply) => {
                    self.trust(&address, call.kind.needs_leader());
                    return Ok(Answer { kind: call.kind, address, reply });
                }
                Verdict::Fail(error) => return Err(error),
                Verdict::Redirect(leader) => {
                    self.change_view(|view| view.led_by(&leader));
                    (journey.redirected(&address, &leader)?, leader)
                }
                Verdict::Elsewhere(reason) => {
                    let next = self.move_on(&address, &reason).ok_or_else(no_nodes)?;
                    let nodes = self.shared.view.load().nodes().len();
                    (journey.failed(&address, reason, nodes)?, next)
                }
            };
            tokio::time::sleep(pause).await;
            address = next;
        }
    }

    /// Sends once and waits, from `now`, for the answer with `patience`: an operation together with
    /// others, unless it cannot share a request, anything else by itself.
    async fn attempt(
        &self,
        call: &Call<'_>,
        address: &str,
        budget: Budget,
        now: Instant,
        patience: Duration,
    ) -> Verdict {
        let deadline = budget.deadline().min(now + patience);
        if let Some((class, operation)) = call.as_operation() {
            let silent = || self.suspect(address);
            let courier = &self.shared.courier;
            match courier.carry(address, class, operation.clone(), now, deadline, silent).await {
                Ok(carried) => return judge(call.kind, address, Ok(carried.into())),
                Err(Undelivered::Lost(error)) => return judge(call.kind, address, Err(error)),
                Err(Undelivered::NoTurn) => return no_turn(address, now),
                Err(Undelivered::Alone) => {}
            }
        }
        // On the heap, because it is rare and large: thousands of operations in flight would leave room for it.
        Box::pin(self.attempt_alone(call, address, budget, patience)).await
    }

    /// Sends a request of its own, when it is this call's turn.
    async fn attempt_alone(
        &self,
        call: &Call<'_>,
        address: &str,
        budget: Budget,
        patience: Duration,
    ) -> Verdict {
        let gate = self.shared.view.load().gate(address);
        let asked = Instant::now();
        let turn =
            tokio::time::timeout(SILENT_AFTER.min(budget.left()), gate.acquire_owned()).await;
        let Ok(Ok(_permit)) = turn else { return no_turn(address, asked) };
        let deadline = budget.deadline().min(Instant::now() + patience);
        judge(call.kind, address, self.send(call, address, deadline).await)
    }

    /// While a node keeps a request waiting, later calls are already told to ask others first:
    /// otherwise a paused leader would swallow every write until the first one's deadline.
    async fn send(
        &self,
        call: &Call<'_>,
        address: &str,
        deadline: Instant,
    ) -> Result<Reply, SendError> {
        let sending = self.shared.courier.http().send(call.request_to(address), deadline);
        tokio::pin!(sending);
        let response = match tokio::time::timeout(SILENT_AFTER, &mut sending).await {
            Ok(result) => result,
            Err(_) => {
                self.suspect(address);
                sending.await
            }
        };
        response.map(Reply::Single)
    }

    fn first_for(&self, call: &Call<'_>) -> Option<String> {
        let view = self.shared.view.load();
        if let Some(leader) = view.leader().filter(|_| call.kind.needs_leader()) {
            return Some(leader.to_owned());
        }
        let turn = self.shared.turn.fetch_add(1, Ordering::Relaxed);
        view.at_turn(turn, Instant::now()).map(str::to_owned)
    }

    /// Remembers why `address` did not serve the call, and returns whom to ask instead.
    fn move_on(&self, address: &str, reason: &Reason) -> Option<String> {
        match reason {
            Reason::Refused(_) | Reason::NoTurn(_) | Reason::Silent(_) => self.suspect(address),
            Reason::Declined(error) if cannot_serve(error) => self.suspect(address),
            Reason::Declined(error) if may_lead(error) => {}
            Reason::Declined(_) => self.change_view(|view| view.not_led_by(address)),
        }
        self.shared.view.load().after(address, Instant::now()).map(str::to_owned)
    }

    fn trust(&self, address: &str, leads: bool) {
        if !self.shared.view.load().trusts(address, leads) {
            self.change_view(|view| view.trusting(address, leads));
        }
    }

    fn suspect(&self, address: &str) {
        let now = Instant::now();
        self.change_view(|view| view.suspecting(address, now, now + SUSPECT_FOR));
    }

    fn change_view(&self, change: impl Fn(&View) -> View) {
        self.shared.view.rcu(|view| change(view));
    }
}

/// Whether a node speaks of itself, and not of its cluster: it will not do better in a moment.
fn cannot_serve(error: &ClientError) -> bool {
    matches!(error, ClientError::Server { code, .. }
        if matches!(code.as_str(), "STORAGE" | "NOT_INITIALIZED" | "STOPPING"))
}

/// Whether a node that leads would say this, too: then it is for other calls to find out who does. This one goes
/// on to another node all the same, which knows if this one was deposed and has not heard of it.
fn may_lead(error: &ClientError) -> bool {
    matches!(error, ClientError::Server { code, .. }
        if matches!(code.as_str(), "FROZEN" | "OVERLOADED"))
}

/// Earlier requests to the node took all turns since then.
fn no_turn(address: &str, asked: Instant) -> Verdict {
    let (address, waited) = (address.to_owned(), asked.elapsed());
    Verdict::Elsewhere(Reason::NoTurn(ClientError::TooManyInFlight { address, waited }))
}

fn no_nodes() -> ClientError {
    ClientError::Endpoints("the list of nodes is empty".to_owned())
}
