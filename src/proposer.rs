//! Writes on their way into the log: those that come at the same moment share an entry.
//!
//! An entry costs openraft, the log and the state machine about the same whether it carries one write
//! or a hundred, so the proposer takes all writes that wait and proposes them together. While nothing is
//! on its way it does not wait for more to come: a lone write is never delayed. While an entry is on its
//! way, another follows as soon as it is at least as large, up to [`PROPOSALS_MAX`]; else what waits goes
//! when one of them is answered. So under load entries grow by themselves, and do not fall apart again:
//! writers that were answered together come back one after the other, and an entry for the first few of
//! them would leave the rest to another.
//!
//! A leader that is deposed may hear only much later, or never, what became of the entries that it had on their
//! way. What still waits does not wait for them: it goes to Raft at once, which refuses it for good and says
//! who leads, or takes it if this node leads again.
//!
//! Each write has an answer of its own: what the state machine said of it, or, if the entry failed,
//! what became of the entry. Writes of one [`Proposer::propose`] take effect in their order; what is
//! asked for at the same time is concurrent, and any order is right.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex};

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, Fatal, RaftError};
use openraft::impls::ProgressResponder;
use openraft::metrics::RaftServerMetrics;
use openraft::type_config::alias::WatchReceiverOf;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use crate::config::ENTRY_BYTES_MAX;
use crate::log_clock::LogClock;
use crate::node::Raft;
use crate::store::StateReader;
use crate::types::{Applied, Command, TypeConfig, Write, Written};
use crate::writes::Writes;

/// Entries on their way at once. More would make entries smaller, and each of them costs the same;
/// with one alone, a write that comes while another's fsync runs would wait for all of it.
const PROPOSALS_MAX: usize = 2;

/// An entry holds no more than this many writes, and no more than [`ENTRY_BYTES_MAX`] unless a single one
/// is larger. As many as a client's batch: beyond some hundreds there is little left to share.
const ENTRY_WRITES_MAX: usize = 1024;

/// Requests that wait for a place in an entry: so many in the channel, and so many taken out of it. More wait in
/// their callers, whose number the app bounds.
const QUEUE_MAX: usize = 4096;

/// Why a write has no answer.
#[derive(Debug, Clone)]
pub enum ProposeError {
    /// Raft refused or lost the entry. Shared by all of its writes.
    Raft(Arc<RaftError<TypeConfig, ClientWriteError<TypeConfig>>>),
    /// The deadline passed while the write still waited for a place in an entry: it was not proposed.
    NotProposed,
    /// The deadline passed after it was proposed: it may still take effect.
    Unanswered,
}

type Answer = Result<Vec<Written>, ProposeError>;

/// Writes of one caller that belong into one entry. What is left in the queue of a request that was given up
/// is this, without the writes: while nothing is answered, the queue would keep them for as long.
struct Request {
    count: usize,
    bytes: usize,
    ticket: Arc<Ticket>,
    answer: oneshot::Sender<Answer>,
}

/// The writes of a request: they are taken into an entry, or given up before. Whoever comes first has them.
struct Ticket(Mutex<Option<Vec<Write>>>);

impl Ticket {
    fn take(&self) -> Option<Vec<Write>> {
        self.0.lock().expect("no code panics while it holds this lock").take()
    }
}

/// A request and its caller's side of it.
fn request(writes: Vec<Write>) -> (Request, Waiting) {
    let (count, bytes) = (writes.len(), writes.iter().map(Write::bytes).sum());
    let ticket = Arc::new(Ticket(Mutex::new(Some(writes))));
    let (answer, receiver) = oneshot::channel();
    let waiting = Waiting { ticket: Arc::clone(&ticket), answer: receiver };
    (Request { count, bytes, ticket, answer }, waiting)
}

/// Gives a request up when its caller does.
struct Waiting {
    ticket: Arc<Ticket>,
    answer: oneshot::Receiver<Answer>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.ticket.take();
    }
}

impl Waiting {
    async fn until(mut self, deadline: Instant) -> Answer {
        match timeout_at(deadline, &mut self.answer).await {
            Ok(answered) => answered.unwrap_or_else(|_| Err(stopped())),
            Err(_) if self.ticket.take().is_some() => Err(ProposeError::NotProposed),
            Err(_) => Err(ProposeError::Unanswered),
        }
    }
}

fn stopped() -> ProposeError {
    ProposeError::Raft(Arc::new(RaftError::Fatal(Fatal::Stopped)))
}

/// Proposes writes. Cloning shares the queue; its task ends when the last clone is gone and what it
/// proposed is answered.
#[derive(Clone)]
pub struct Proposer {
    queue: mpsc::Sender<Request>,
}

impl Proposer {
    /// Starts the task that proposes. Join the handle after Raft has stopped and all clones are gone.
    pub fn spawn(raft: Raft, reader: StateReader) -> (Self, JoinHandle<()>) {
        let (queue, requests) = mpsc::channel(QUEUE_MAX);
        (Self { queue }, tokio::spawn(run(raft, reader, requests)))
    }

    /// Proposes writes and waits until they are applied: one answer for each, in their order.
    ///
    /// Dropping the future takes back what still waits for its place in an entry, and nothing else.
    pub async fn propose(
        &self,
        writes: Vec<Write>,
        deadline: Instant,
    ) -> Vec<Result<Written, ProposeError>> {
        let total = writes.len();
        let mut parts = Vec::new();
        for writes in into_parts(writes) {
            let (request, waiting) = request(writes);
            let count = request.count;
            let sent = timeout_at(deadline, self.queue.send(request)).await;
            parts.push((count, sent.map_err(|_| ProposeError::NotProposed), waiting));
        }
        let mut answers = Vec::with_capacity(total);
        for (count, sent, waiting) in parts {
            let answer = match sent {
                Ok(Ok(())) => waiting.until(deadline).await,
                Ok(Err(_)) => Err(stopped()),
                Err(error) => Err(error),
            };
            match answer {
                Ok(written) => answers.extend(written.into_iter().map(Ok)),
                Err(error) => answers.extend(std::iter::repeat_n(Err(error), count)),
            }
        }
        answers
    }
}

/// Cuts writes into parts that fit into an entry each.
fn into_parts(writes: Vec<Write>) -> Vec<Vec<Write>> {
    let total: usize = writes.iter().map(Write::bytes).sum();
    if writes.len() <= ENTRY_WRITES_MAX && total <= ENTRY_BYTES_MAX {
        return vec![writes];
    }
    let mut parts = vec![Vec::new()];
    let mut bytes = 0;
    for write in writes {
        let part = parts.last().map_or(0, Vec::len);
        if part > 0 && (part == ENTRY_WRITES_MAX || bytes + write.bytes() > ENTRY_BYTES_MAX) {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += write.bytes();
        parts.last_mut().expect("there is a first part").push(write);
    }
    parts
}

async fn run(raft: Raft, reader: StateReader, mut requests: mpsc::Receiver<Request>) {
    let mut clock = LogClock::default();
    let mut waiting = VecDeque::new();
    let mut received = Vec::new();
    let mut under_way = FuturesUnordered::new();
    let mut leadership = Leadership::of(&raft);
    let mut turns = Turns::default();
    let mut open = true;
    while open || !under_way.is_empty() {
        tokio::select! {
            biased;
            Some(losses) = under_way.next() => turns.answered(losses),
            () = leadership.lost() => turns.leadership_lost(),
            count = requests.recv_many(&mut received, QUEUE_MAX - waiting.len()),
                if open && waiting.len() < QUEUE_MAX =>
            {
                open = count > 0;
            }
        }
        // Whatever came meanwhile goes along.
        while waiting.len() + received.len() < QUEUE_MAX
            && let Ok(request) = requests.try_recv()
        {
            received.push(request);
        }
        waiting.extend(received.drain(..));
        while turns.allow(&waiting)
            && let Some(entry) = next_entry(&mut waiting)
        {
            let losses = turns.proposed(entry.writes.len());
            let at_ms = clock.stamp(reader.log_time_ms(), Instant::now());
            under_way.push(propose(&raft, at_ms, entry).await.map(move |()| losses));
        }
    }
}

/// When another entry may follow. Entries of a leadership that was lost do not count: each loss leaves
/// [`PROPOSALS_MAX`] of them at most.
#[derive(Default)]
struct Turns {
    /// How often this node has lost its leadership.
    losses: u64,
    /// Entries on their way that were proposed since.
    under_way: usize,
    /// How many writes the newest of them has.
    newest: usize,
}

impl Turns {
    fn allow(&self, waiting: &VecDeque<Request>) -> bool {
        self.under_way == 0
            || self.under_way < PROPOSALS_MAX && count(waiting, self.newest) >= self.newest
    }

    /// The next entry, with so many writes, is on its way; its answer tells what this returns.
    fn proposed(&mut self, writes: usize) -> u64 {
        self.under_way += 1;
        self.newest = writes;
        self.losses
    }

    fn answered(&mut self, losses: u64) {
        if losses == self.losses {
            self.under_way -= 1;
        }
    }

    fn leadership_lost(&mut self) {
        *self = Self { losses: self.losses + 1, ..Self::default() };
    }
}

/// Whether this node leads, as Raft reported it last.
struct Leadership {
    metrics: WatchReceiverOf<TypeConfig, RaftServerMetrics<TypeConfig>>,
    leads: bool,
}

impl Leadership {
    fn of(raft: &Raft) -> Self {
        Self { metrics: raft.server_metrics(), leads: false }
    }

    /// Returns when this node has ceased to lead. Cancel safe.
    async fn lost(&mut self) {
        loop {
            let leads = self.metrics.borrow_watched().state == ServerState::Leader;
            if std::mem::replace(&mut self.leads, leads) && !leads {
                return;
            }
            if self.metrics.changed().await.is_err() {
                // Raft has ended, and answers what is on its way by that.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// How many writes the requests have; counts no further than `enough`.
fn count<'a>(requests: impl IntoIterator<Item = &'a Request>, enough: usize) -> usize {
    let mut writes = 0;
    for request in requests {
        writes += request.count;
        if writes >= enough {
            break;
        }
    }
    writes
}

/// The writes of an entry, and whom to answer for how many of them each.
#[derive(Default)]
struct Proposal {
    writes: Vec<Write>,
    callers: Callers,
}

/// Takes what waits into the next entry; `None` when nothing waits.
fn next_entry(waiting: &mut VecDeque<Request>) -> Option<Proposal> {
    let mut entry = Proposal::default();
    let mut bytes = 0;
    while let Some(next) = waiting.front() {
        let fits = entry.writes.len() + next.count <= ENTRY_WRITES_MAX
            && bytes + next.bytes <= ENTRY_BYTES_MAX;
        if !fits && !entry.writes.is_empty() {
            break;
        }
        let Some(next) = waiting.pop_front() else { break };
        // Who gave up before has been told that nothing happened, so nothing must.
        let Some(writes) = next.ticket.take() else { continue };
        bytes += next.bytes;
        entry.callers.push((next.count, next.answer));
        if entry.writes.is_empty() {
            entry.writes = writes;
        } else {
            entry.writes.extend(writes);
        }
    }
    (!entry.writes.is_empty()).then_some(entry)
}

/// Hands an entry to Raft. The future that it leaves waits for Raft's answer and tells the callers.
async fn propose(raft: &Raft, at_ms: u64, entry: Proposal) -> impl Future<Output = ()> + use<> {
    let Proposal { writes, callers } = entry;
    let (responder, outcome) = ProgressResponder::complete_only();
    let command = Command::Write(Writes::new(at_ms, &writes));
    let handed_over = raft.client_write_ff(command, Some(responder)).await;
    async move {
        let outcome = match handed_over {
            Ok(()) => match outcome.await {
                Ok(outcome) => outcome.map_err(RaftError::APIError),
                Err(_) => Err(RaftError::Fatal(Fatal::Stopped)),
            },
            Err(fatal) => Err(RaftError::Fatal(fatal)),
        };
        answer(outcome.map(|response| response.data), callers);
    }
}

type Callers = Vec<(usize, oneshot::Sender<Answer>)>;

/// Gives every caller its part.
fn answer(
    outcome: Result<Applied, RaftError<TypeConfig, ClientWriteError<TypeConfig>>>,
    callers: Callers,
) {
    match outcome {
        Ok(Applied::Written(written)) => {
            let mut written = written.into_iter();
            for (count, caller) in callers {
                // Who gave up meanwhile needs none.
                let _ = caller.send(Ok(written.by_ref().take(count).collect()));
            }
        }
        Ok(other) => unreachable!("writes were answered by {other:?}"),
        Err(error) => {
            let error = Arc::new(error);
            for (_, caller) in callers {
                // As above.
                let _ = caller.send(Err(ProposeError::Raft(Arc::clone(&error))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Condition;
    use std::time::Duration;

    fn put(bytes: usize) -> Write {
        let value = bytes::Bytes::from(vec![0; bytes - 1]);
        Write::put("k".into(), value, Condition::Always)
    }

    fn sizes(parts: Vec<Vec<Write>>) -> Vec<usize> {
        parts.iter().map(Vec::len).collect()
    }

    /// Nothing is lost or reordered, and only a single write may be larger than an entry.
    #[test]
    fn many_writes_are_cut_into_entries() {
        assert_eq!(sizes(into_parts(vec![put(10); 3])), [3]);
        assert_eq!(sizes(into_parts(vec![put(10); ENTRY_WRITES_MAX + 1])), [ENTRY_WRITES_MAX, 1]);
        let large = put(ENTRY_BYTES_MAX / 2 + 1);
        assert_eq!(sizes(into_parts(vec![large; 3])), [1, 1, 1]);
        let huge = vec![put(10), put(2 * ENTRY_BYTES_MAX), put(10)];
        assert_eq!(sizes(into_parts(huge.clone())), [1, 1, 1]);
        assert_eq!(into_parts(huge.clone()).concat(), huge);
    }

    /// An entry takes what waits, in order, up to its bounds, and the rest goes into the next.
    #[test]
    fn what_waits_shares_an_entry() {
        let sizes = [10, 10, ENTRY_BYTES_MAX - 20, 10, 2 * ENTRY_BYTES_MAX, 10];
        let (requests, _waiting): (Vec<_>, Vec<_>) =
            sizes.iter().map(|bytes| request(vec![put(*bytes)])).unzip();
        let mut queue = VecDeque::from(requests);
        let mut entries = Vec::new();
        while let Some(entry) = next_entry(&mut queue) {
            entries.push(entry.writes.iter().map(Write::bytes).collect::<Vec<_>>());
        }
        let expected = [vec![10, 10, ENTRY_BYTES_MAX - 20], vec![10], vec![sizes[4]], vec![10]];
        assert_eq!(entries, expected);
    }

    /// Counting stops when there are enough.
    #[test]
    fn writes_are_counted_as_far_as_needed() {
        let (requests, _waiting): (Vec<_>, Vec<_>) =
            [2, 3, 4].map(|writes| request(vec![put(10); writes])).into_iter().unzip();
        assert_eq!([0, 2, 3, 6, 99].map(|enough| count(&requests, enough)), [2, 2, 5, 9, 9]);
        assert_eq!(count(&[], 1), 0);
    }

    /// A write that was told "not proposed" is never proposed, and one that was taken is never told so.
    #[tokio::test]
    async fn giving_up_and_being_proposed_exclude_each_other() {
        let (early, gives_up) = request(vec![put(10)]);
        let (taken, waits) = request(vec![put(10)]);
        let past = Instant::now() - Duration::from_millis(1);
        assert!(matches!(gives_up.until(past).await, Err(ProposeError::NotProposed)));
        let mut queue = VecDeque::from([early, taken]);
        let entry = next_entry(&mut queue).unwrap();
        assert_eq!((entry.writes.len(), entry.callers.len()), (1, 1));
        assert!(matches!(waits.until(past).await, Err(ProposeError::Unanswered)));
        assert!(next_entry(&mut queue).is_none());
    }

    /// A node that is cut off answers nothing, and must not keep the writes of all who ask it meanwhile.
    #[tokio::test]
    async fn what_was_given_up_takes_no_memory() {
        let value = bytes::Bytes::from(vec![0; 1 << 20]);
        let (queued, gives_up) =
            request(vec![Write::put("k".into(), value.clone(), Condition::Always)]);
        assert!(!value.is_unique());
        drop(gives_up);
        assert!(value.is_unique());
        assert!(next_entry(&mut VecDeque::from([queued])).is_none());
    }

    /// Each caller gets the answers to its own writes.
    #[tokio::test]
    async fn answers_find_their_callers() {
        let (first, to_first) = oneshot::channel();
        let (second, to_second) = oneshot::channel();
        let written = (1..=3).map(|revision| Written::Put { revision }).collect();
        answer(Ok(Applied::Written(written)), vec![(2, first), (1, second)]);
        let first = to_first.await.unwrap().unwrap();
        assert_eq!(first, [Written::Put { revision: 1 }, Written::Put { revision: 2 }]);
        assert_eq!(to_second.await.unwrap().unwrap(), [Written::Put { revision: 3 }]);
    }
}
