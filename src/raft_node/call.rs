//! One operation as an HTTP request to whichever node turns out to serve it, and its answer decoded.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::client_error::ClientError;
use crate::http_client::{HttpRequest, HttpResponse};
use crate::key_path;
use crate::network::call::{READ, ROUTING};
use crate::network::error::{Outcome, etag};
use crate::types::{Condition, Consistency, Record, Revision};

/// How long one attempt of a read may take before another node is asked: longer than an election and
/// than any read of a healthy node, short enough for several attempts before the deadline.
const READ_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// The shortest attempt of a read, when the deadline is near: a healthy node needs far less.
const READ_ATTEMPT_MIN: Duration = Duration::from_millis(100);

/// What became of a delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Deleted {
    /// The cluster's revision afterwards; unchanged when nothing was deleted.
    pub revision: Revision,
    /// Whether there was something to delete.
    pub deleted: bool,
}

/// Decides who serves a call, and whether it may be sent again once it may have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A change of a key: by the leader, and never twice.
    Write,
    /// A linearizable read of a key: by the leader.
    LeaderRead,
    /// A read of a key that any node can answer: a stale one, or one through a follower.
    AnyRead,
    /// A question about the node or the ring: to any node.
    Inspect,
    /// Membership and ring: by the leader. Saying any of them twice changes nothing more.
    Manage,
}

impl Kind {
    pub(super) fn needs_leader(self) -> bool {
        matches!(self, Self::Write | Self::LeaderRead | Self::Manage)
    }

    pub(super) fn may_repeat(self) -> bool {
        self != Self::Write
    }

    pub(super) fn reads_key(self) -> bool {
        matches!(self, Self::LeaderRead | Self::AnyRead)
    }

    /// What is true of a call whose answer cannot be understood.
    pub(super) fn outcome_when_in_doubt(self) -> Outcome {
        match self {
            Self::Write | Self::Manage => Outcome::Unknown,
            _ => Outcome::NotApplied,
        }
    }

    /// How long the next attempt may take when `left` remains of the whole operation. A write has
    /// one attempt once it is out, and management waits for members to catch up: all of it.
    pub(super) fn attempt_timeout(self, left: Duration) -> Duration {
        match self {
            Self::Write | Self::Manage => left,
            _ => READ_ATTEMPT_TIMEOUT.min(left / 3).max(READ_ATTEMPT_MIN).min(left),
        }
    }
}

/// One operation, ready to be sent to any node, any number of times.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(super) kind: Kind,
    method: Method,
    path_and_query: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Call {
    pub(crate) fn put(key: &[u8], value: &[u8], condition: Condition) -> Self {
        let mut call = Self::new(Kind::Write, Method::PUT, key_path_of(key));
        call.body = Bytes::copy_from_slice(value);
        call.require(condition);
        call
    }

    pub(crate) fn delete(key: &[u8], condition: Condition) -> Self {
        let mut call = Self::new(Kind::Write, Method::DELETE, key_path_of(key));
        call.require(condition);
        call
    }

    pub(crate) fn get(key: &[u8], consistency: Consistency) -> Self {
        let (kind, query) = match consistency {
            Consistency::Linearizable => (Kind::LeaderRead, "linearizable"),
            Consistency::LinearizableOnFollower => (Kind::AnyRead, "linearizable"),
            Consistency::Stale => (Kind::AnyRead, "stale"),
        };
        let path = format!("{}?consistency={query}", key_path_of(key));
        let mut call = Self::new(kind, Method::GET, path);
        if consistency == Consistency::LinearizableOnFollower {
            call.headers.insert(READ, HeaderValue::from_static("follower"));
        }
        call
    }

    pub(super) fn inspect(path: &str) -> Self {
        Self::new(Kind::Inspect, Method::GET, path.to_owned())
    }

    pub(super) fn manage(path: &str, body: Vec<u8>) -> Self {
        let mut call = Self::new(Kind::Manage, Method::POST, path.to_owned());
        call.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        call.body = body.into();
        call
    }

    fn new(kind: Kind, method: Method, path_and_query: String) -> Self {
        // Nodes name the right node instead of passing the request on: this client learns from it.
        let headers = HeaderMap::from_iter([(ROUTING, HeaderValue::from_static("direct"))]);
        Self { kind, method, path_and_query, headers, body: Bytes::new() }
    }

    fn require(&mut self, condition: Condition) {
        let (name, value) = match condition {
            Condition::Always => return,
            Condition::Revision(revision) => (header::IF_MATCH, etag(revision)),
            Condition::Absent => (header::IF_NONE_MATCH, HeaderValue::from_static("*")),
        };
        self.headers.insert(name, value);
    }

    pub(super) fn request_to(&self, address: &str) -> HttpRequest {
        HttpRequest {
            method: self.method.clone(),
            address: address.to_owned(),
            path_and_query: self.path_and_query.clone(),
            headers: self.headers.clone(),
            body: self.body.clone(),
        }
    }
}

fn key_path_of(key: &[u8]) -> String {
    format!("/v1/kv/{}", key_path::encode(key))
}

/// What a node answered to a [`Call`], other than an error.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(super) kind: Kind,
    /// Who answered.
    pub(crate) address: String,
    pub(super) response: HttpResponse,
}

#[derive(Deserialize)]
struct Written {
    revision: Revision,
}

impl Answer {
    pub(crate) fn written(&self) -> Result<Revision, ClientError> {
        self.json::<Written>().map(|written| written.revision)
    }

    pub(crate) fn deleted(&self) -> Result<Deleted, ClientError> {
        self.json()
    }

    /// The record that was read; `None` when the key is absent.
    pub(crate) fn record(self) -> Result<Option<Record>, ClientError> {
        match self.response.status {
            StatusCode::NOT_FOUND => return Ok(None),
            StatusCode::OK => {}
            other => return Err(self.garbled(format!("status {other} for a read"))),
        }
        let Some(tag) = self.response.headers.get(header::ETAG) else {
            return Err(self.garbled("a value without an ETag".to_owned()));
        };
        match parse_etag(tag) {
            Some(revision) => Ok(Some(Record { revision, value: self.response.body })),
            None => Err(self.garbled(format!("the ETag {tag:?} is not a revision"))),
        }
    }

    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        let decoded = serde_json::from_slice(&self.response.body);
        decoded.map_err(|error| self.garbled(error.to_string()))
    }

    fn garbled(&self, message: String) -> ClientError {
        let outcome = self.kind.outcome_when_in_doubt();
        ClientError::Garbled { address: self.address.clone(), message, outcome }
    }
}

/// The revision in an `ETag` of the form `"N"`.
pub(super) fn parse_etag(tag: &HeaderValue) -> Option<Revision> {
    tag.to_str().ok()?.strip_prefix('"')?.strip_suffix('"')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_answer(status: u16, tag: Option<&'static str>, body: &'static [u8]) -> Answer {
        let mut headers = HeaderMap::new();
        if let Some(tag) = tag {
            headers.insert(header::ETAG, HeaderValue::from_static(tag));
        }
        let status = StatusCode::from_u16(status).unwrap();
        let response = HttpResponse { status, headers, body: Bytes::from_static(body) };
        Answer { kind: Kind::AnyRead, address: "a:1".into(), response }
    }

    #[test]
    fn an_empty_value_is_not_an_absent_key() {
        let empty = read_answer(200, Some("\"7\""), b"").record().unwrap();
        assert_eq!(empty, Some(Record { revision: 7, value: Bytes::new() }));
        assert_eq!(read_answer(404, None, b"{}").record().unwrap(), None);
    }

    #[test]
    fn a_value_without_a_sound_revision_is_an_error() {
        for tag in [None, Some("7"), Some("\"x\""), Some("W/\"7\"")] {
            let error = read_answer(200, tag, b"v").record().unwrap_err();
            assert!(matches!(error, ClientError::Garbled { .. }), "{tag:?}");
            assert_eq!(error.outcome(), Outcome::NotApplied);
        }
    }

    #[test]
    fn reads_leave_time_for_other_nodes_and_writes_take_all() {
        let left = Duration::from_secs(10);
        assert_eq!(Kind::Write.attempt_timeout(left), left);
        assert_eq!(Kind::AnyRead.attempt_timeout(left), READ_ATTEMPT_TIMEOUT);
        let short = Duration::from_millis(900);
        assert_eq!(Kind::LeaderRead.attempt_timeout(short), short / 3);
        let rest = Duration::from_millis(5);
        assert_eq!(Kind::LeaderRead.attempt_timeout(rest), rest);
    }

    #[test]
    fn conditions_become_headers() {
        let call = Call::put(b"k", b"v", Condition::Revision(3));
        assert_eq!(call.headers[header::IF_MATCH], "\"3\"");
        let call = Call::put(b"k", b"v", Condition::Absent);
        assert_eq!(call.headers[header::IF_NONE_MATCH], "*");
        assert_eq!(Call::delete(b"k", Condition::Always).headers.len(), 1);
    }

    #[test]
    fn a_read_through_a_follower_asks_any_node_and_says_so() {
        let call = Call::get(b"k", Consistency::LinearizableOnFollower);
        assert_eq!((call.kind, &call.headers[READ]), (Kind::AnyRead, &"follower".parse().unwrap()));
        assert!(call.path_and_query.ends_with("?consistency=linearizable"));
        for other in [Consistency::Linearizable, Consistency::Stale] {
            assert!(!Call::get(b"k", other).headers.contains_key(READ));
        }
    }
}
