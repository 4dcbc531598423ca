//! Every way an operation of [`RaftNode`](crate::raft_node::RaftNode) or
//! [`KVClient`](crate::kvclient::KVClient) can fail.
//!
//! As on the server, the question that matters is [`ClientError::outcome`]: may the operation have
//! taken effect? A write whose answer was lost has been tried again until its deadline, and is `Unknown`
//! if nobody could tell by then; everything that is `NotApplied` left no trace. A read changes nothing, so
//! it never fails with anything else.

use std::path::PathBuf;
use std::time::Duration;

use crate::handoff::Refused;
use crate::network::error::Outcome;
use crate::ring::{RingCluster, RingError};
use crate::types::{Epoch, Revision};

/// A failed operation. Displays as one line that names the node, where one is concerned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClientError {
    /// The list of nodes cannot be used.
    #[error("cannot use the nodes file {path}: {message}")]
    NodesFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The given endpoints cannot be used.
    #[error("cannot use the endpoints: {0}")]
    Endpoints(String),
    /// There are several clusters, and none of them says which key belongs where.
    #[error(
        "the {clusters} clusters have no ring, so no key has an owner; install one with `admin ring install`"
    )]
    NoRing {
        /// How many clusters there are.
        clusters: usize,
    },
    /// A node told a ring that breaks the rules for rings.
    #[error("the ring cannot be used: {0}")]
    Ring(RingError),
    /// Not one node could be connected to.
    #[error("no node can be reached: {}", .tried.join("; "))]
    Unreachable {
        /// One text for each address, with what the system said.
        tried: Vec<String>,
    },
    /// The deadline passed while no node was able to do it. Nothing that changes anything is in flight
    /// any more.
    #[error("nothing was done within {} ms; last: {last}", .waited.as_millis())]
    Timeout {
        /// How long the operation was tried.
        waited: Duration,
        /// What stood in the way last.
        last: String,
    },
    /// This client's earlier requests to a node took all turns, and kept them for too long. Nothing
    /// was sent that may still be in flight.
    #[error(
        "too many requests are in flight at {address}: this one got no turn within {} ms and was not sent",
        .waited.as_millis()
    )]
    TooManyInFlight {
        /// The node.
        address: String,
        /// How long a turn was waited for.
        waited: Duration,
    },
    /// This client has as many operations waiting or in flight as it allows itself, and did not get
    /// rid of enough of them in time. The operation was not sent.
    #[error("the client has too many operations waiting: this one was not sent within {} ms", .waited.as_millis())]
    TooManyWaiting {
        /// How long room was waited for.
        waited: Duration,
    },
    /// There is no request that asks for this: the key is too long for a path, for example.
    #[error("this cannot be sent to any node: {0}")]
    Unsendable(String),
    /// The request went out, and until the deadline no answer came back that tells what became of it.
    #[error("{message}; it may or may not take effect")]
    AnswerLost {
        /// The node and what happened.
        message: String,
    },
    /// The condition of a conditional write does not hold; nothing changed.
    #[error("the condition does not hold: {}", describe_current(.current))]
    ConditionFailed {
        /// The key's revision; `None` when the key is absent.
        current: Option<Revision>,
    },
    /// Another cluster owns the key. [`KVClient`](crate::kvclient::KVClient) follows this by itself.
    #[error("{address} says that {} owns the key (ring epoch {epoch})", describe_owner(.owner))]
    WrongCluster {
        /// The node that said so.
        address: String,
        /// The owner, by that node's ring.
        owner: Option<Box<RingCluster>>,
        /// The epoch of that node's ring.
        epoch: Epoch,
    },
    /// Nodes kept on sending the request elsewhere: they disagree at the moment.
    #[error("the request was redirected {count} times, last to {last}")]
    TooManyRedirects {
        /// How often.
        count: u32,
        /// Where to at last.
        last: String,
    },
    /// The node answered with an error that no other node would answer differently.
    #[error("{address} answered {status} {code}: {message}{}", describe_outcome(*.outcome))]
    Server {
        /// The node.
        address: String,
        /// The HTTP status.
        status: u16,
        /// The stable code, such as `TOO_LARGE`.
        code: String,
        /// The node's words.
        message: String,
        /// Whether the request took effect.
        outcome: Outcome,
    },
    /// The cluster refused a step of a change of the ring; nothing changed.
    #[error("{0}")]
    StepRefused(Box<Refused>),
    /// The answer is not one that a node gives. Probably something else listens on that address.
    #[error("{address} gave an answer that makes no sense: {message}{}", describe_outcome(*.outcome))]
    Garbled {
        /// Where it came from.
        address: String,
        /// What is wrong with it.
        message: String,
        /// `Unknown` for a write.
        outcome: Outcome,
    },
}

impl ClientError {
    /// Whether the operation may have changed anything.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::AnswerLost { .. } => Outcome::Unknown,
            Self::Server { outcome, .. } | Self::Garbled { outcome, .. } => *outcome,
            _ => Outcome::NotApplied,
        }
    }

    /// Whether the same operation, done again, is safe and may succeed.
    pub fn is_retryable(&self) -> bool {
        let may_pass = match self {
            Self::Unreachable { .. }
            | Self::Timeout { .. }
            | Self::TooManyInFlight { .. }
            | Self::TooManyWaiting { .. }
            | Self::WrongCluster { .. }
            | Self::TooManyRedirects { .. } => true,
            Self::Server { status, .. } => *status >= 500 && *status != 501,
            _ => false,
        };
        may_pass && self.outcome() == Outcome::NotApplied
    }
}

fn describe_current(current: &Option<Revision>) -> String {
    match current {
        Some(revision) => format!("the key is at revision {revision}"),
        None => "the key is absent".to_owned(),
    }
}

fn describe_owner(owner: &Option<Box<RingCluster>>) -> String {
    owner.as_ref().map_or("another cluster".to_owned(), |owner| format!("cluster {}", owner.id))
}

fn describe_outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::NotApplied => "",
        Outcome::Applied => "; it took effect",
        Outcome::Unknown => "; it may or may not take effect",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(status: u16, outcome: Outcome) -> ClientError {
        let (address, code) = ("127.0.0.1:1".to_owned(), "X".to_owned());
        ClientError::Server { address, status, code, message: String::new(), outcome }
    }

    #[test]
    fn only_what_left_no_trace_and_may_pass_is_retryable() {
        assert!(server(503, Outcome::NotApplied).is_retryable());
        assert!(!server(503, Outcome::Unknown).is_retryable());
        assert!(!server(400, Outcome::NotApplied).is_retryable());
        assert!(!server(501, Outcome::NotApplied).is_retryable());
        assert!(!ClientError::AnswerLost { message: String::new() }.is_retryable());
        assert!(ClientError::Unreachable { tried: Vec::new() }.is_retryable());
        let waited = Duration::from_secs(1);
        assert!(ClientError::TooManyInFlight { address: "a:1".into(), waited }.is_retryable());
        assert!(ClientError::TooManyWaiting { waited }.is_retryable());
        assert!(!ClientError::ConditionFailed { current: None }.is_retryable());
    }
}
