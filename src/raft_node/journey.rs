//! One call's way from node to node: what was met so far, and what that means for the next step.
//!
//! Pure but for the clock: it decides how long to pause and when to give up; the loop in
//! [`RaftNode`](super::RaftNode) sends and sleeps.

use std::borrow::Cow;
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::client_error::ClientError;
use crate::network::error::Outcome;

use super::doubt::Doubt;
use super::pace::{Budget, call_backoff};
use super::verdict::Reason;

/// How often in a row one node may name another the leader. Nodes agree within an election, and
/// redirects are made with pauses from the second on, so that this many take longer than one.
const REDIRECTS_MAX: u32 = 12;

/// How often in a row a redirect is followed at once: a follower's word, and that of one whose
/// leader has just changed.
const REDIRECTS_AT_ONCE: u32 = 2;

/// How many rounds of refused connections to all nodes mean that the cluster is not there. With the
/// pauses between them about half a second: short for who has a wrong address. A node that is being
/// restarted may take longer; who knows that there must be one, as `KVClient` does, asks again.
const ROUNDS_REFUSED_MAX: u32 = 6;

#[derive(Debug)]
pub(super) struct Journey<'a> {
    budget: Budget,
    /// Whoever hears that the call failed asks it whether that is the whole truth.
    doubt: &'a mut Doubt,
    backoff: Backoff,
    redirects_in_row: u32,
    /// Since the last answer of any node: who refused a connection, and how.
    refused: Vec<(String, String)>,
    refused_in_round: usize,
    rounds_refused: u32,
    /// The last attempt that came to nothing did so for want of a turn.
    no_turn: Option<ClientError>,
    /// Who said last that it is not initialised, without another answer in between.
    uninitialized: Vec<String>,
    last: Cow<'static, str>,
}

impl<'a> Journey<'a> {
    pub(super) fn new(budget: Budget, doubt: &'a mut Doubt) -> Self {
        Self {
            budget,
            doubt,
            backoff: call_backoff(),
            redirects_in_row: 0,
            refused: Vec::new(),
            refused_in_round: 0,
            rounds_refused: 0,
            no_turn: None,
            uninitialized: Vec::new(),
            last: "there was no time for an attempt".into(),
        }
    }

    /// Whether there is time for one more attempt.
    pub(super) fn check_time(&self, now: Instant) -> Result<(), ClientError> {
        self.in_time(now, Duration::ZERO).map(drop)
    }

    /// `from` named `leader`. Says how long to pause before asking it.
    pub(super) fn redirected(&mut self, from: &str, leader: &str) -> Result<Duration, ClientError> {
        let was_refused = self.refused.iter().any(|(address, _)| address == leader);
        self.refused_in_round = 0;
        self.rounds_refused = 0;
        self.uninitialized.clear();
        self.last = format!("{from} says that {leader} leads").into();
        self.redirects_in_row += 1;
        if self.redirects_in_row > REDIRECTS_MAX {
            let (count, last) = (self.redirects_in_row, leader.to_owned());
            return Err(ClientError::TooManyRedirects { count, last });
        }
        // One that names itself, or a node that is down, has not noticed the change yet.
        if self.redirects_in_row > REDIRECTS_AT_ONCE || from == leader || was_refused {
            return self.pause();
        }
        Ok(Duration::ZERO)
    }

    /// `address` did not serve the call, one of `nodes`. Says how long to pause before the next.
    pub(super) fn failed(
        &mut self,
        address: &str,
        reason: Reason,
        nodes: usize,
    ) -> Result<Duration, ClientError> {
        self.redirects_in_row = 0;
        self.no_turn = None;
        match reason {
            Reason::Refused(error) => self.refused(address, error.to_string(), nodes),
            Reason::NoTurn(error) => {
                // Says nothing about the node, and was a pause in itself.
                self.last = error.to_string().into();
                self.no_turn = Some(error);
                self.in_time(Instant::now(), Duration::ZERO)
            }
            Reason::Silent(message) => {
                self.answered();
                self.doubt.raise(&message);
                self.last = message.into();
                self.pause()
            }
            Reason::Declined(error) => self.declined(address, error, nodes),
        }
    }

    fn refused(
        &mut self,
        address: &str,
        message: String,
        nodes: usize,
    ) -> Result<Duration, ClientError> {
        self.refused.retain(|(known, _)| known != address);
        self.refused.push((address.to_owned(), message.clone()));
        self.last = message.into();
        self.refused_in_round += 1;
        if self.refused_in_round < nodes {
            return self.in_time(Instant::now(), Duration::ZERO);
        }
        self.refused_in_round = 0;
        self.rounds_refused += 1;
        if self.rounds_refused >= ROUNDS_REFUSED_MAX {
            return Err(self.unreachable());
        }
        self.pause()
    }

    fn declined(
        &mut self,
        address: &str,
        error: ClientError,
        nodes: usize,
    ) -> Result<Duration, ClientError> {
        let fresh = matches!(&error, ClientError::Server { code, .. } if code == "NOT_INITIALIZED");
        let mut uninitialized = std::mem::take(&mut self.uninitialized);
        self.answered();
        self.last = error.to_string().into();
        if error.outcome() == Outcome::Unknown {
            self.doubt.raise(&error.to_string());
        }
        if fresh {
            if !uninitialized.iter().any(|known| known == address) {
                uninitialized.push(address.to_owned());
            }
            self.uninitialized = uninitialized;
            // A cluster none of whose nodes belongs to one does not form itself by waiting.
            if self.uninitialized.len() >= nodes {
                return Err(error);
            }
        }
        self.pause()
    }

    fn answered(&mut self) {
        self.refused.clear();
        self.refused_in_round = 0;
        self.rounds_refused = 0;
        self.uninitialized.clear();
    }

    fn pause(&mut self) -> Result<Duration, ClientError> {
        let pause = self.backoff.pause_with_jitter();
        self.in_time(Instant::now(), pause)
    }

    /// `pause`, unless there would be no time left after it.
    fn in_time(&self, now: Instant, pause: Duration) -> Result<Duration, ClientError> {
        if now + pause < self.budget.deadline() {
            return Ok(pause);
        }
        let unreachable = self.rounds_refused > 0 && self.no_turn.is_none();
        Err(if unreachable { self.unreachable() } else { self.timed_out() })
    }

    fn unreachable(&self) -> ClientError {
        ClientError::Unreachable {
            tried: self.refused.iter().map(|(_, text)| text.clone()).collect(),
        }
    }

    fn timed_out(&self) -> ClientError {
        self.no_turn.clone().unwrap_or_else(|| ClientError::Timeout {
            waited: self.budget.elapsed(),
            last: self.last.clone().into_owned(),
        })
    }
}
