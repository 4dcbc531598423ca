//! What a client asks for, ready to go to whichever node turns out to serve it: an operation on a key,
//! which may travel with others ([`super::courier`]), or an HTTP request of its own.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, header};

use super::courier::Class;
use super::doubt::Doubt;
use super::sequence::{Issued, Sequence};
use crate::batch::Operation;
use crate::http_client::HttpRequest;
use crate::key_path;
use crate::network::call::{CLIENT_FLOOR, IDEMPOTENCY_KEY, READ, ROUTING};
use crate::network::error::{Outcome, etag};
use crate::once::ClientFloor;
use crate::types::{Condition, Consistency};

/// How long one attempt of a read or a step may take before another node is asked: longer than an
/// election and than either takes on a healthy node, short enough for several attempts before the
/// deadline.
const READ_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// The same for a write: longer, because a busy disk may hold writes up, and repeats would add to that.
const WRITE_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);

/// The shortest attempt, when the deadline is near: a healthy node needs far less.
const ATTEMPT_MIN: Duration = Duration::from_millis(100);

/// Decides who serves a call. All of them may be sent again, also when they may have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A change of a key: by the leader. It carries a number, with which it happens at most once.
    Write,
    /// A linearizable read of a key: by the leader.
    LeaderRead,
    /// A read of a key that any node can answer: a stale one, or one through a follower.
    AnyRead,
    /// A question about the node or the ring: to any node.
    Inspect,
    /// Membership and ring: by the leader. Saying any of them twice changes nothing more.
    Manage,
    /// A question that the leader answers best.
    InspectLeader,
    /// A step of a change of the ring: by the leader. Saying it twice gets the first answer again.
    Step,
}

impl Kind {
    pub(super) fn needs_leader(self) -> bool {
        !matches!(self, Self::AnyRead | Self::Inspect)
    }

    pub(super) fn reads_key(self) -> bool {
        matches!(self, Self::LeaderRead | Self::AnyRead)
    }

    /// What is true of a call whose answer cannot be understood.
    pub(super) fn outcome_when_in_doubt(self) -> Outcome {
        match self {
            Self::Write | Self::Manage | Self::Step => Outcome::Unknown,
            _ => Outcome::NotApplied,
        }
    }

    /// How long the next attempt may take when `left` remains of the whole operation. Management waits
    /// for members to catch up: all of it.
    pub(super) fn attempt_timeout(self, left: Duration) -> Duration {
        let max = match self {
            Self::Manage => return left,
            Self::Write => WRITE_ATTEMPT_TIMEOUT,
            _ => READ_ATTEMPT_TIMEOUT,
        };
        max.min(left / 3).max(ATTEMPT_MIN).min(left)
    }
}

/// Something asked for, to be sent to any node, any number of times.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(super) kind: Kind,
    content: Content<'a>,
}

#[derive(Debug)]
enum Content<'a> {
    Operation(Class, Draft<'a>),
    Request { method: Method, path: String, body: Bytes },
}

/// An operation on a key as the caller has it. What is sent is made of it only once there is room for that:
/// callers that wait for room have copied nothing, and hold no number that keeps the client's floor down.
#[derive(Debug)]
struct Draft<'a> {
    key: &'a [u8],
    action: Action<'a>,
    made: Option<Made<'a>>,
}

#[derive(Debug)]
enum Action<'a> {
    Get,
    Put { value: &'a [u8], condition: Condition, numbers: &'a Sequence },
    Delete { condition: Condition, numbers: &'a Sequence },
}

#[derive(Debug)]
struct Made<'a> {
    operation: Arc<Operation>,
    /// A write's number, in use as long as the call may be sent.
    issued: Option<Issued<'a>>,
}

impl Draft<'_> {
    fn bytes(&self) -> usize {
        let value = match self.action {
            Action::Put { value, .. } => value.len(),
            Action::Get | Action::Delete { .. } => 0,
        };
        self.key.len() + value
    }
}

impl<'a> Draft<'a> {
    fn made(&self) -> &Made<'a> {
        self.made.as_ref().expect("an operation is made before it is sent")
    }

    fn make(&self) -> Made<'a> {
        let key = Bytes::copy_from_slice(self.key);
        let (operation, issued) = match self.action {
            Action::Get => (Operation::Get { key }, None),
            Action::Put { value, condition, numbers } => {
                let (value, issued) = (Bytes::copy_from_slice(value), numbers.issue());
                let seq = Some(issued.seq());
                (Operation::Put { key, value, condition, seq }, Some(issued))
            }
            Action::Delete { condition, numbers } => {
                let issued = numbers.issue();
                (Operation::Delete { key, condition, seq: Some(issued.seq()) }, Some(issued))
            }
        };
        Made { operation: Arc::new(operation), issued }
    }
}

impl<'a> Call<'a> {
    /// A write gets its number from `numbers` once it is made.
    pub(crate) fn put(
        key: &'a [u8],
        value: &'a [u8],
        condition: Condition,
        numbers: &'a Sequence,
    ) -> Self {
        Self::on_key(Kind::Write, Class::Write, key, Action::Put { value, condition, numbers })
    }

    pub(crate) fn delete(key: &'a [u8], condition: Condition, numbers: &'a Sequence) -> Self {
        Self::on_key(Kind::Write, Class::Write, key, Action::Delete { condition, numbers })
    }

    pub(crate) fn get(key: &'a [u8], consistency: Consistency) -> Self {
        let (kind, class) = match consistency {
            Consistency::Linearizable => (Kind::LeaderRead, Class::LinearizableRead),
            Consistency::LinearizableOnFollower => (Kind::AnyRead, Class::FollowerRead),
            Consistency::Stale => (Kind::AnyRead, Class::StaleRead),
        };
        Self::on_key(kind, class, key, Action::Get)
    }

    fn on_key(kind: Kind, class: Class, key: &'a [u8], action: Action<'a>) -> Self {
        Self { kind, content: Content::Operation(class, Draft { key, action, made: None }) }
    }

    /// A doubt to carry along on its way.
    pub(crate) fn doubt(&self) -> Doubt {
        Doubt::new(self.kind)
    }

    pub(super) fn inspect(path: &str) -> Self {
        let (method, path) = (Method::GET, path.to_owned());
        let content = Content::Request { method, path, body: Bytes::new() };
        Self { kind: Kind::Inspect, content }
    }

    pub(super) fn inspect_leader(path: &str) -> Self {
        Self { kind: Kind::InspectLeader, ..Self::inspect(path) }
    }

    pub(super) fn step(body: Vec<u8>) -> Self {
        Self { kind: Kind::Step, ..Self::manage("/cluster/step", body) }
    }

    pub(super) fn manage(path: &str, body: Vec<u8>) -> Self {
        let (method, path) = (Method::POST, path.to_owned());
        let content = Content::Request { method, path, body: body.into() };
        Self { kind: Kind::Manage, content }
    }

    /// How many bytes of key and value it takes along, if it is an operation on a key.
    pub(super) fn operation_bytes(&self) -> Option<usize> {
        match &self.content {
            Content::Operation(_, draft) => Some(draft.bytes()),
            Content::Request { .. } => None,
        }
    }

    /// Makes what is sent. Comes before the first attempt and once there is room; again, it changes nothing.
    pub(super) fn make(&mut self) {
        if let Content::Operation(_, draft) = &mut self.content
            && draft.made.is_none()
        {
            draft.made = Some(draft.make());
        }
    }

    /// The operation on a key, if it is one.
    pub(super) fn as_operation(&self) -> Option<(Class, &Arc<Operation>)> {
        match &self.content {
            Content::Operation(class, draft) => Some((*class, &draft.made().operation)),
            Content::Request { .. } => None,
        }
    }

    /// The call as a request of its own.
    pub(super) fn request_to(&self, address: &str) -> HttpRequest {
        // Nodes name the right node instead of passing the request on: this client learns from it.
        let mut headers = HeaderMap::from_iter([(ROUTING, HeaderValue::from_static("direct"))]);
        let (method, path_and_query, body) = match &self.content {
            Content::Request { method, path, body } => {
                if !body.is_empty() {
                    let json = HeaderValue::from_static("application/json");
                    headers.insert(header::CONTENT_TYPE, json);
                }
                (method.clone(), path.clone(), body.clone())
            }
            Content::Operation(class, draft) => {
                let Made { operation, issued } = draft.made();
                if let Some(issued) = issued {
                    only_once(issued, &mut headers);
                }
                single(*class, operation, &mut headers)
            }
        };
        HttpRequest { method, address: address.to_owned(), path_and_query, headers, body }
    }
}

/// An operation as a request of its own: method, path and body. Adds headers.
fn single(class: Class, operation: &Operation, headers: &mut HeaderMap) -> (Method, String, Bytes) {
    match operation {
        Operation::Get { key } => {
            let query = match class {
                Class::StaleRead => "stale",
                _ => "linearizable",
            };
            if class == Class::FollowerRead {
                headers.insert(READ, HeaderValue::from_static("follower"));
            }
            (Method::GET, format!("{}?consistency={query}", key_path_of(key)), Bytes::new())
        }
        Operation::Put { key, value, condition, .. } => {
            require(*condition, headers);
            (Method::PUT, key_path_of(key), value.clone())
        }
        Operation::Delete { key, condition, .. } => {
            require(*condition, headers);
            (Method::DELETE, key_path_of(key), Bytes::new())
        }
    }
}

fn require(condition: Condition, headers: &mut HeaderMap) {
    let (name, value) = match condition {
        Condition::Always => return,
        Condition::Revision(revision) => (header::IF_MATCH, etag(revision)),
        Condition::Absent => (header::IF_NONE_MATCH, HeaderValue::from_static("*")),
    };
    headers.insert(name, value);
}

fn only_once(issued: &Issued<'_>, headers: &mut HeaderMap) {
    let ClientFloor { client, floor } = issued.client_floor();
    let key = HeaderValue::from_str(&format!("{client}/{}", issued.seq()));
    headers.insert(IDEMPOTENCY_KEY, key.expect("a client's name is visible ASCII"));
    headers.insert(CLIENT_FLOOR, HeaderValue::from(floor));
}

fn key_path_of(key: &[u8]) -> String {
    format!("/v1/kv/{}", key_path::encode(key))
}

#[cfg(test)]
mod tests {
    use super::super::sequence::Sequence;
    use super::*;

    #[test]
    fn an_attempt_leaves_time_for_others_unless_it_manages() {
        let left = Duration::from_secs(10);
        assert_eq!(Kind::Manage.attempt_timeout(left), left);
        assert_eq!(Kind::Write.attempt_timeout(left), WRITE_ATTEMPT_TIMEOUT);
        assert_eq!(Kind::AnyRead.attempt_timeout(left), READ_ATTEMPT_TIMEOUT);
        let short = Duration::from_millis(900);
        assert_eq!(Kind::LeaderRead.attempt_timeout(short), short / 3);
        let rest = Duration::from_millis(5);
        assert_eq!(Kind::LeaderRead.attempt_timeout(rest), rest);
    }

    /// The request that a call which has room is sent as.
    fn made(mut call: Call<'_>) -> HttpRequest {
        call.make();
        call.request_to("a:1")
    }

    #[test]
    fn an_operation_is_a_request_of_its_own_too() {
        let key = [0xff, b'/', b'.', b'.', 0, b'%'];
        let numbers = Sequence::new();
        let put = made(Call::put(&key, &[0, 0xfe], Condition::Revision(3), &numbers));
        assert_eq!((put.method, put.path_and_query), (Method::PUT, "/v1/kv/%FF%2F..%00%25".into()));
        assert_eq!((&put.headers[header::IF_MATCH], &put.body[..]), (&etag(3), &[0, 0xfe][..]));
        assert_eq!(put.headers[ROUTING], "direct");
        let put = made(Call::put(b"..", b"v", Condition::Absent, &numbers));
        assert_eq!(put.path_and_query, "/v1/kv/%2E%2E");
        assert_eq!(put.headers[header::IF_NONE_MATCH], "*");
        let once = put.headers[IDEMPOTENCY_KEY].to_str().unwrap();
        assert!(once.ends_with("/2") && once.len() == 18, "{once}");
    }

    /// Who waits for room neither copies nor keeps others' floor down.
    #[test]
    fn a_write_gets_its_number_once_it_is_made_and_keeps_it() {
        let numbers = Sequence::new();
        let mut waits = Call::delete(b"k", Condition::Always, &numbers);
        assert_eq!(waits.operation_bytes(), Some(1));
        let first = made(Call::put(b"k", b"v", Condition::Always, &numbers));
        assert_eq!(first.headers[CLIENT_FLOOR], "1");
        waits.make();
        waits.make();
        let delete = waits.request_to("a:1");
        assert_eq!((&delete.method, delete.headers.len()), (&Method::DELETE, 3));
        let once = delete.headers[IDEMPOTENCY_KEY].to_str().unwrap();
        assert!(once.ends_with("/2"), "{once}");
        assert_eq!(delete.headers[CLIENT_FLOOR], "2", "the first call is not sent any more");
    }

    #[test]
    fn a_read_through_a_follower_asks_any_node_and_says_so() {
        let call = Call::get(b"k", Consistency::LinearizableOnFollower);
        assert_eq!(call.kind, Kind::AnyRead);
        let request = made(call);
        assert_eq!(request.headers[READ], "follower");
        assert!(request.path_and_query.ends_with("?consistency=linearizable"));
        for (other, query) in
            [(Consistency::Linearizable, "linearizable"), (Consistency::Stale, "stale")]
        {
            let request = made(Call::get(b"k", other));
            assert_eq!(request.path_and_query, format!("/v1/kv/k?consistency={query}"));
            assert!(!request.headers.contains_key(READ));
        }
    }
}
