//! Puts the appends of one connection back in order and feeds them to Raft, session by session.
//!
//! Toy-RPC runs each call in a task of its own, so calls arrive here in any order. Their sequence
//! numbers restore it: [`Reorder`] holds what came early, never more than may be in flight. In order,
//! each append goes to its session, which is one stream into Raft with its replies in the same order.
//!
//! When Raft refuses an append the session is over: what was sent behind it is answered
//! [`Failure::SessionEnded`], at once, and the leader goes on with a new session once it knows what
//! this node has. A lower session number after a higher one is answered the same: its sender was
//! replaced.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use futures_util::stream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use super::closer::Closer;
use super::handler::PeerHandler;
use super::wire::{Append, AppendReply, AppendRequest, Failure};

/// What an append's call waits for.
pub(in crate::network) type AppendOutcome = Result<AppendReply, Failure>;

/// The appends of one connection. Decides under a lock, never waits.
pub(in crate::network) struct Lane {
    handler: Arc<dyn PeerHandler>,
    closer: Closer,
    tracker: TaskTracker,
    in_flight_max: usize,
    state: Mutex<State>,
}

struct State {
    early: Reorder<Waiting>,
    session: Option<Session>,
}

struct Waiting {
    append: Append,
    outcome: oneshot::Sender<AppendOutcome>,
}

/// A running session: where its appends go.
struct Session {
    number: u64,
    requests: mpsc::Sender<AppendRequest>,
    replies: Replies,
}

/// The calls of a session that wait for their replies, in order. `None` once the session is over.
type Replies = Arc<Mutex<Option<VecDeque<oneshot::Sender<AppendOutcome>>>>>;

/// An append that breaks the protocol; the connection must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::network) enum LaneError {
    /// Its sequence was used before.
    #[error("append {0} came twice")]
    Repeated(u64),
    /// Too many wait for one that is missing, or are in flight.
    #[error("too many appends in flight")]
    Overflow,
}

impl Lane {
    pub(in crate::network) fn new(
        handler: Arc<dyn PeerHandler>,
        closer: Closer,
        tracker: TaskTracker,
        in_flight_max: usize,
    ) -> Self {
        // With as many early ones as may be in flight, the missing one could never come.
        let early = Reorder::new(in_flight_max.saturating_sub(1));
        let state = State { early, session: None };
        Self { handler, closer, tracker, in_flight_max, state: Mutex::new(state) }
    }

    /// Takes an append, in any order, and gives what its reply will come through.
    pub(in crate::network) fn enqueue(
        &self,
        sequence: u64,
        append: Append,
    ) -> Result<oneshot::Receiver<AppendOutcome>, LaneError> {
        let (outcome, reply) = oneshot::channel();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.early.insert(sequence, Waiting { append, outcome })?;
        while let Some(next) = state.early.next() {
            self.dispatch(&mut state.session, next)?;
        }
        Ok(reply)
    }

    fn dispatch(&self, session: &mut Option<Session>, next: Waiting) -> Result<(), LaneError> {
        let number = next.append.session;
        let running = match session {
            Some(running) if running.number >= number => running,
            _ => session.insert(self.start_session(number)),
        };
        let mut replies = running.replies.lock().unwrap_or_else(PoisonError::into_inner);
        match replies.as_mut() {
            Some(waiting) if running.number == number => {
                waiting.push_back(next.outcome);
                // Full, it would hold more than may be in flight; closed, its task is ending.
                match running.requests.try_send(next.append.request) {
                    Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
                    Err(mpsc::error::TrySendError::Full(_)) => Err(LaneError::Overflow),
                }
            }
            _ => {
                // The caller may be gone, then nobody needs the answer.
                let _ = next.outcome.send(Err(Failure::SessionEnded));
                Ok(())
            }
        }
    }

    fn start_session(&self, number: u64) -> Session {
        let (requests, taken) = mpsc::channel(self.in_flight_max);
        let replies: Replies = Arc::new(Mutex::new(Some(VecDeque::new())));
        let taken = stream::unfold(taken, |mut taken| async {
            let request = taken.recv().await?;
            Some((request, taken))
        });
        let outcomes = self.handler.append_session(taken.boxed());
        let (closer, answering) = (self.closer.clone(), Arc::clone(&replies));
        self.tracker.spawn(async move {
            tokio::select! {
                biased;
                () = closer.closed() => {}
                () = answer_in_order(outcomes, &answering) => {}
            }
            let rest = answering.lock().unwrap_or_else(PoisonError::into_inner).take();
            for outcome in rest.into_iter().flatten() {
                // The caller may be gone, then nobody needs the answer.
                let _ = outcome.send(Err(Failure::SessionEnded));
            }
        });
        Session { number, requests, replies }
    }
}

/// Passes each outcome to the call that waits longest, until one is not a plain success.
async fn answer_in_order(
    mut outcomes: stream::BoxStream<'static, AppendOutcome>,
    replies: &Replies,
) {
    while let Some(outcome) = outcomes.next().await {
        let last = !matches!(outcome, Ok(Ok(_)));
        let mut replies = replies.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(caller) = replies.as_mut().and_then(VecDeque::pop_front) else { return };
        // The caller may be gone, then nobody needs the answer.
        let _ = caller.send(outcome);
        if last {
            return;
        }
    }
}

/// Holds what came early, up to a bound, until what precedes it is there.
#[derive(Debug)]
pub(in crate::network) struct Reorder<T> {
    next: u64,
    early: BTreeMap<u64, T>,
    early_max: usize,
}

impl<T> Reorder<T> {
    pub(in crate::network) fn new(early_max: usize) -> Self {
        Self { next: 0, early: BTreeMap::new(), early_max }
    }

    pub(in crate::network) fn insert(&mut self, sequence: u64, item: T) -> Result<(), LaneError> {
        if sequence < self.next || self.early.contains_key(&sequence) {
            return Err(LaneError::Repeated(sequence));
        }
        if sequence != self.next && self.early.len() == self.early_max {
            return Err(LaneError::Overflow);
        }
        self.early.insert(sequence, item);
        Ok(())
    }

    /// The next item in order, if it is there.
    pub(in crate::network) fn next(&mut self) -> Option<T> {
        let item = self.early.remove(&self.next)?;
        self.next += 1;
        Some(item)
    }
}
