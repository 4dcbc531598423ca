//! Every way a request can fail, and the one place that turns it into HTTP.
//!
//! An [`ApiError`] always carries a true [`Outcome`]: whether the request took effect decides what a
//! client may do next, so "I do not know" is an answer of its own and never rounded to "no".

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};

use crate::handoff::Refused;
use crate::ring::{RingCluster, RingNode};
use crate::types::{Epoch, Revision};

/// Whether a failed request may have changed anything. For reads it is always `NotApplied`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing changed and nothing will: safe to retry.
    NotApplied,
    /// It took effect.
    Applied,
    /// It may or may not take effect, now or later: only an idempotency key makes a retry safe.
    Unknown,
}

/// Of a voter that came back without its data, and what to do about it.
pub const LOST_DATA: &str = "the node is a voter of a cluster that runs, and has lost its data: it has to be replaced; \
     leave it out with POST /cluster/change-membership, then add it again like a new one";

/// A failed request. `docs/API.md` lists the statuses and codes.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApiError {
    /// The request makes no sense as it stands.
    #[error("{0}")]
    BadRequest(String),
    /// No such path.
    #[error("no such path")]
    UnknownPath,
    /// The path exists, but not for this method.
    #[error("method not allowed; this path takes {allow}")]
    MethodNotAllowed {
        /// The value of the `Allow` header.
        allow: &'static str,
    },
    /// The key has no record.
    #[error("the key does not exist")]
    KeyAbsent,
    /// A key, value or body over its limit.
    #[error("the {what} is larger than {max} bytes")]
    TooLarge {
        /// Such as `key`, `value` or `body`.
        what: &'static str,
        /// The limit in bytes.
        max: usize,
    },
    /// `If-Match` or `If-None-Match` did not hold.
    #[error("the condition does not hold")]
    ConditionFailed {
        /// The key's revision; `None` when the key is absent.
        current: Option<Revision>,
    },
    /// No leader is known: an election runs, or no majority is reachable.
    #[error("{message}")]
    NoLeader {
        /// What happened.
        message: &'static str,
        /// `Unknown` when leadership was lost while the write was in flight.
        outcome: Outcome,
    },
    /// The cluster has not been formed yet.
    #[error("the cluster is not initialized; POST /cluster/init to one of its nodes")]
    NotInitialized,
    /// As [`Self::NotInitialized`]; but its cluster runs, counts on it, and will not take it back as it is.
    #[error("{LOST_DATA}")]
    LostData,
    /// The cluster was formed for a ring, and has none yet.
    #[error(
        "this cluster was formed to become part of a ring, and serves no key before it has one: \
         `admin cluster add` or `admin ring install` gives it one"
    )]
    NoRing,
    /// Too much is in flight.
    #[error("too many requests are in flight; try again shortly")]
    Overloaded,
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopping {
        /// `Unknown` for a write that was already proposed.
        outcome: Outcome,
    },
    /// Another node of the cluster leads it.
    #[error("node {} leads this cluster", .leader.id)]
    NotLeader {
        /// Where to go.
        leader: RingNode,
        /// The epoch of the ring this node lives by.
        epoch: Epoch,
    },
    /// Another cluster owns the key.
    #[error("cluster {} owns the key", .owner.id)]
    WrongCluster {
        /// Where to go.
        owner: Box<RingCluster>,
        /// The epoch of the ring in force here. In a change, the owner of a key that has moved is that
        /// of the next ring.
        epoch: Epoch,
        /// Who may serve it already, by the ring to come: only the owner knows, and may be down.
        next: Option<Box<RingCluster>>,
    },
    /// The key is on its way to another cluster, and nobody serves it for a moment.
    #[error("the key is being handed over; try again shortly")]
    Frozen,
    /// The deadline passed.
    #[error("{message}")]
    Timeout {
        /// What was waited for.
        message: &'static str,
        /// `Unknown` for a write that may still commit.
        outcome: Outcome,
    },
    /// The node that the request was passed on to did not answer.
    #[error("passing the request on failed: {message}")]
    Forward {
        /// What happened.
        message: String,
        /// `Unknown` for a write that may have arrived.
        outcome: Outcome,
    },
    /// The request was passed on too often: rings or leaders disagree at the moment.
    #[error(
        "the request was passed on {hops} times without finding its place: the ring is changing, or the node that was asked first left it long ago"
    )]
    TooManyHops {
        /// How often.
        hops: u8,
    },
    /// The disk failed. The node has stopped serving.
    #[error("storage has failed: {message}")]
    Storage {
        /// What the store said.
        message: String,
        /// `Unknown` for a write that was in flight.
        outcome: Outcome,
    },
    /// The request contradicts the cluster's state.
    #[error("{0}")]
    Conflict(String),
    /// As [`Self::Conflict`], found out after a first step of the request that may have changed something.
    #[error("{0}")]
    ConflictMidway(String),
    /// The client's sequence stands for another write already.
    #[error("this Idempotency-Key was used for a write of another key, or of another kind")]
    OnceReused,
    /// The client's sequence is too old: nobody knows any more whether its write was carried out.
    #[error(
        "this Idempotency-Key lies below the client's floor, or its answer has been forgotten; the write may have taken effect before, and is not carried out now"
    )]
    OnceForgotten,
    /// No more clients can be remembered.
    #[error("too many clients use an Idempotency-Key; new ones are taken when others fall silent")]
    TooManyClients,
    /// The cluster refused a step of a change of the ring; nothing changed.
    #[error("{0}")]
    StepRefused(Box<Refused>),
}

/// The JSON body of an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The only member.
    pub error: ErrorDetail,
}

/// What [`ErrorBody`] wraps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// A stable name such as `NOT_LEADER`.
    pub code: String,
    /// For people.
    pub message: String,
    /// Whether the request took effect.
    pub outcome: Outcome,
    /// With `NOT_LEADER`: the leader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<RingNode>,
    /// With `WRONG_CLUSTER`: the owning cluster and its nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<RingCluster>,
    /// With `NOT_LEADER` and `WRONG_CLUSTER`: the epoch of the answering node's ring.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// With `CONFLICT`, when a step was refused: why, for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
}

impl ApiError {
    /// The HTTP status and the stable code.
    ///
    /// Whatever leaves the outcome open is a `504 TIMEOUT`, whichever way it came about: a 503 with
    /// its `Retry-After` tells stock HTTP clients to send the request again. Except for what no wait
    /// will decide, [`Self::OnceForgotten`].
    pub fn status_and_code(&self) -> (StatusCode, &'static str) {
        match self {
            Self::NoLeader { outcome: Outcome::Unknown, .. }
            | Self::Stopping { outcome: Outcome::Unknown }
            | Self::Forward { outcome: Outcome::Unknown, .. } => {
                (StatusCode::GATEWAY_TIMEOUT, "TIMEOUT")
            }
            Self::BadRequest(_) => (StatusCode::BAD_REQUEST, "BAD_REQUEST"),
            Self::UnknownPath | Self::KeyAbsent => (StatusCode::NOT_FOUND, "NOT_FOUND"),
            Self::MethodNotAllowed { .. } => (StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED"),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "TOO_LARGE"),
            Self::ConditionFailed { .. } => (StatusCode::PRECONDITION_FAILED, "CONDITION_FAILED"),
            Self::NoLeader { .. } => (StatusCode::SERVICE_UNAVAILABLE, "NO_LEADER"),
            Self::NotInitialized | Self::LostData => {
                (StatusCode::SERVICE_UNAVAILABLE, "NOT_INITIALIZED")
            }
            Self::NoRing => (StatusCode::SERVICE_UNAVAILABLE, "NO_RING"),
            Self::Overloaded | Self::TooManyClients => {
                (StatusCode::SERVICE_UNAVAILABLE, "OVERLOADED")
            }
            Self::Stopping { .. } => (StatusCode::SERVICE_UNAVAILABLE, "STOPPING"),
            Self::Frozen => (StatusCode::SERVICE_UNAVAILABLE, "FROZEN"),
            // Leaders or rings disagree at the moment, or the node that should know has just died.
            Self::TooManyHops { .. } | Self::Forward { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "NO_LEADER")
            }
            Self::NotLeader { .. } => (StatusCode::TEMPORARY_REDIRECT, "NOT_LEADER"),
            Self::WrongCluster { .. } => (StatusCode::MISDIRECTED_REQUEST, "WRONG_CLUSTER"),
            Self::Timeout { .. } => (StatusCode::GATEWAY_TIMEOUT, "TIMEOUT"),
            Self::Storage { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "STORAGE"),
            Self::Conflict(_)
            | Self::ConflictMidway(_)
            | Self::OnceReused
            | Self::StepRefused(_) => (StatusCode::CONFLICT, "CONFLICT"),
            Self::OnceForgotten => (StatusCode::CONFLICT, "IDEMPOTENCY_EXPIRED"),
        }
    }

    /// Whether the request took effect.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::NoLeader { outcome, .. }
            | Self::Stopping { outcome }
            | Self::Timeout { outcome, .. }
            | Self::Forward { outcome, .. }
            | Self::Storage { outcome, .. } => *outcome,
            Self::ConflictMidway(_) | Self::OnceForgotten => Outcome::Unknown,
            _ => Outcome::NotApplied,
        }
    }

    /// The JSON body.
    pub fn body(&self) -> ErrorBody {
        let (leader, owner, epoch) = match self {
            Self::NotLeader { leader, epoch } => (Some(leader.clone()), None, Some(*epoch)),
            Self::WrongCluster { owner, epoch, .. } => {
                (None, Some((**owner).clone()), Some(*epoch))
            }
            _ => (None, None, None),
        };
        let refused = match self {
            Self::StepRefused(refused) => Some((**refused).clone()),
            _ => None,
        };
        ErrorBody {
            error: ErrorDetail {
                code: self.status_and_code().1.to_owned(),
                message: self.to_string(),
                outcome: self.outcome(),
                leader,
                owner,
                epoch,
                refused,
            },
        }
    }
}

/// What `Retry-After` says with every 503, in seconds: elections and overload pass within one.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

impl IntoResponse for ApiError {
    /// `Location` of a redirect is the caller's to add: only it knows the path.
    fn into_response(self) -> Response {
        let (status, _) = self.status_and_code();
        let mut response = (status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER_S);
        }
        if let Self::MethodNotAllowed { allow } = self {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        if let Self::ConditionFailed { current: Some(revision) } = self {
            headers.insert(header::ETAG, etag(revision));
        }
        response
    }
}

/// The `ETag` of a record: its revision in double quotes.
pub fn etag(revision: Revision) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{revision}\"")).expect("digits and quotes are header-safe")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_503_says_when_to_come_back() {
        let response = ApiError::NotInitialized.into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }

    #[test]
    fn an_unknown_outcome_never_invites_a_retry() {
        for error in [
            ApiError::NoLeader { message: "lost", outcome: Outcome::Unknown },
            ApiError::Stopping { outcome: Outcome::Unknown },
            ApiError::Forward { message: "lost".into(), outcome: Outcome::Unknown },
        ] {
            let response = error.into_response();
            assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
            assert!(!response.headers().contains_key(header::RETRY_AFTER));
        }
    }

    /// It is no 503: sending the same once more never helps.
    #[test]
    fn what_is_forgotten_is_unknown_and_not_tried_again() {
        let response = ApiError::OnceForgotten.into_response();
        assert_eq!(response.status(), StatusCode::CONFLICT);
        assert!(!response.headers().contains_key(header::RETRY_AFTER));
        assert_eq!(ApiError::OnceForgotten.outcome(), Outcome::Unknown);
        assert_eq!(ApiError::OnceReused.outcome(), Outcome::NotApplied);
        assert_eq!(ApiError::TooManyClients.outcome(), Outcome::NotApplied);
    }

    #[test]
    fn a_failed_condition_shows_the_current_revision() {
        let response = ApiError::ConditionFailed { current: Some(7) }.into_response();
        assert_eq!(response.headers()[header::ETAG], "\"7\"");
        let absent = ApiError::ConditionFailed { current: None }.into_response();
        assert!(!absent.headers().contains_key(header::ETAG));
    }

    #[test]
    fn a_refused_step_says_why_to_people_and_to_programs() {
        let refused = Refused::Unsettled { epoch: 3 };
        let error = ApiError::StepRefused(Box::new(refused.clone()));
        let body = serde_json::to_string(&error.body()).unwrap();
        let ErrorBody { error: detail } = serde_json::from_str(&body).unwrap();
        assert_eq!((detail.code.as_str(), detail.outcome), ("CONFLICT", Outcome::NotApplied));
        assert_eq!((detail.message, detail.refused), (refused.to_string(), Some(refused)));
    }

    #[test]
    fn the_body_has_the_contracts_shape() {
        let error =
            ApiError::NoLeader { message: "no leader is known", outcome: Outcome::NotApplied };
        let json = serde_json::to_value(error.body()).unwrap();
        let expected = serde_json::json!({"error": {
            "code": "NO_LEADER", "message": "no leader is known", "outcome": "not_applied"}});
        assert_eq!(json, expected);
    }
}
