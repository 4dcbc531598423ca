//! Many read index calls to one leader, few messages: callers share rounds.
//!
//! A read index is valid for every read that was asked for before the leader was. So callers that come
//! while a call is on its way wait for the next one together, and the leader sees at most one call of
//! this node at a time, however many reads there are.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use super::connection::CallError;
use super::link::{ConnectError, Link};
use super::wire::ReadIndex;
use crate::types::LogId;

/// Why a round has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::network) enum RoundError {
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Call(#[from] CallError),
}

type Outcome = Result<LogId, RoundError>;

/// The callers that wait for the next round. How many there can be is the callers' to bound.
#[derive(Default)]
pub(in crate::network) struct Rounds {
    next: Mutex<Next>,
}

#[derive(Default)]
struct Next {
    waiting: Vec<oneshot::Sender<Outcome>>,
    running: bool,
}

impl Rounds {
    fn join(&self, caller: oneshot::Sender<Outcome>) -> Role {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.waiting.push(caller);
        if std::mem::replace(&mut next.running, true) { Role::Follow } else { Role::Drive }
    }

    /// Everyone who waits; `None` ends the driving, and the next caller drives again.
    fn take(&self) -> Option<Vec<oneshot::Sender<Outcome>>> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.waiting.retain(|caller| !caller.is_closed());
        next.running = !next.waiting.is_empty();
        next.running.then(|| std::mem::take(&mut next.waiting))
    }
}

enum Role {
    Drive,
    Follow,
}

/// The read index of the leader at the other end of `link`, asked for after this call began.
pub(in crate::network) async fn read_index(link: &Arc<Link>) -> Outcome {
    let (caller, outcome) = oneshot::channel();
    if let Role::Drive = link.rounds().join(caller) {
        link.tracker().spawn(drive(Arc::clone(link)));
    }
    // The driver answers everyone, unless the runtime stops.
    outcome.await.unwrap_or(Err(RoundError::Connect(ConnectError::Stopping)))
}

/// Lets the next caller drive if this one's round panicked. Who waits is answered by the end of its
/// channel.
struct Driving<'a>(&'a Rounds);

impl Drop for Driving<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut next = self.0.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next = Next::default();
        }
    }
}

async fn drive(link: Arc<Link>) {
    let _driving = Driving(link.rounds());
    while let Some(callers) = link.rounds().take() {
        let outcome = ask(&link).await;
        for caller in callers {
            // A caller that is gone needs no answer.
            let _ = caller.send(outcome.clone());
        }
    }
}

async fn ask(link: &Arc<Link>) -> Outcome {
    let connection = link.connection().await?;
    Ok(connection.call(&ReadIndex, link.settings().reply_timeout).await?)
}
