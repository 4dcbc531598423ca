//! Passing requests on to the node that can answer them.
//!
//! Two rules carry everything here. **A write that may have arrived is never sent again**, unless the
//! node says that it was not applied: else its outcome is unknown, and only the client knows whether a
//! second execution would hurt. And all
//! nodes on a request's way share **one deadline and one count of hops**, so that nodes that disagree
//! about the leader or the ring cannot pass a request around for ever.
//!
//! This is also the one place that waits out an election, see [`Forwarder::serve`]. That one node in
//! trouble does not slow down what goes elsewhere is the business of `targets`.

mod targets;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use tokio::time::Instant;

use super::body::{Arriving, BodyBudget, HeldCharge};
use super::call::{
    CLIENT_FLOOR, Call, DEADLINE_MS, HOPS, HOPS_MAX, IDEMPOTENCY_KEY, READ, Routing,
};
use super::error::{ApiError, ErrorBody, Outcome};
use crate::backoff::Backoff;
use crate::http_client::{HasRoom, HttpClient, HttpRequest, HttpResponse, SendError};
use crate::ring::RingCluster;
use targets::Targets;

/// How long a request waits for a leader: some elections with the default timing. Scripts and people
/// at a terminal then do not notice a leader change; without a majority the answer is 503. Only the
/// pauses count: a leader that stopped in the middle of a read has been replaced once that gave up.
const LEADER_WAIT: Duration = Duration::from_secs(2);

/// The first pause before asking again, doubled up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(10);

/// Asking is cheap, and what this adds to an election's length is the most of it that is seen.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// How long a node may keep a request waiting before it is a suspect and, if the request is a read,
/// another node is asked: above an election, so that a node that only waits for one is rarely taken
/// for dead. A write has only one try and gets all the time there is.
const SLOW_AFTER: Duration = Duration::from_secs(1);

/// The same for a read when there is nobody else to ask: longer than the node may wait for a leader
/// itself. With less time left nobody else is asked for a second opinion on that.
const READ_ATTEMPT_LAST: Duration = Duration::from_secs(3);

/// The headers that say what a request wants, and go on with it.
const PASSED_ON: [HeaderName; 6] = [
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::CONTENT_TYPE,
    READ,
    IDEMPOTENCY_KEY,
    CLIENT_FLOOR,
];

/// The headers that say what an answer means, and come back with it.
const RELAYED: [HeaderName; 5] =
    [header::ETAG, header::RETRY_AFTER, header::CONTENT_TYPE, header::LOCATION, header::ALLOW];

/// Whether a request can change anything, and so must not be sent twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It only looks.
    Read,
    /// It may change something.
    Write,
}

/// Where the answer came from.
#[derive(Debug)]
pub enum Served<T> {
    /// This node had it.
    Here(T),
    /// Another node answered.
    Elsewhere(Response),
}

impl<T> Served<T> {
    /// The response: another node's as it is, our own made by `render`.
    pub fn respond(
        self,
        render: impl FnOnce(T) -> Result<Response, ApiError>,
    ) -> Result<Response, Refusal> {
        match self {
            Self::Here(value) => render(value).map_err(Refusal::from),
            Self::Elsewhere(response) => Ok(response),
        }
    }
}

/// An error on its way out, with the `Location` that only the request's path can tell.
#[derive(Debug)]
pub struct Refusal {
    error: ApiError,
    location: Option<HeaderValue>,
}

impl Refusal {
    fn new(error: ApiError, call: &Call) -> Self {
        let location = match &error {
            ApiError::NotLeader { leader, .. } => {
                let location = format!("http://{}{}", leader.http, call.path_and_query());
                // The JSON names the leader too, should its address not fit a header.
                HeaderValue::from_bytes(location.as_bytes()).ok()
            }
            _ => None,
        };
        Self { error, location }
    }
}

impl Refusal {
    /// The error alone.
    pub fn into_error(self) -> ApiError {
        self.error
    }
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self { error, location: None }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = self.error.into_response();
        if let Some(location) = self.location {
            response.headers_mut().insert(header::LOCATION, location);
        }
        response
    }
}

/// Passes requests on over pooled connections. Cloning shares the pool, and what is known about the
/// nodes.
#[derive(Debug, Clone)]
pub struct Forwarder {
    client: HttpClient,
    answers: Arc<BodyBudget>,
    targets: Arc<Targets>,
}

impl Forwarder {
    /// Has at most `in_flight_max` requests on their way, and keeps as many idle connections. What it is answered
    /// counts among `answers`, from when it begins to come until it has been sent on.
    pub fn new(in_flight_max: usize, answers: Arc<BodyBudget>) -> Self {
        let targets = Arc::new(Targets::new(in_flight_max));
        Self { client: HttpClient::keeping(in_flight_max), answers, targets }
    }

    /// Answers with `local`, or with the answer of the node that `local` points to.
    ///
    /// While there is no leader, or the known one cannot be reached, `local` is asked again for up to
    /// `LEADER_WAIT`, as long as it is certain that nothing was applied. With `Kv-Routing: direct`
    /// the first answer stands: such a client does its own waiting. `body` is asked for what goes to another node,
    /// once one is to be asked.
    pub async fn serve<T, Fut>(
        &self,
        call: &Call,
        body: impl Fn() -> Bytes,
        effect: Effect,
        local: impl Fn() -> Fut,
    ) -> Result<Served<T>, Refusal>
    where
        Fut: Future<Output = Result<T, ApiError>>,
    {
        let mut backoff = Backoff::new(PAUSE_FIRST, PAUSE_MAX);
        let mut paused = Duration::ZERO;
        loop {
            let result = match local().await {
                Ok(value) => return Ok(Served::Here(value)),
                Err(error) if call.routing == Routing::Direct => Err(error),
                Err(error) => self.pass_on(call, &body, effect, error).await,
            };
            let error = match result {
                Ok(response) => return Ok(Served::Elsewhere(response)),
                Err(error) => error,
            };
            let patient = call.routing == Routing::PassOn && may_pass(&error);
            let pause = backoff.pause();
            let in_time = paused < LEADER_WAIT && Instant::now() + pause < call.deadline;
            if !(patient && in_time) {
                return Err(Refusal::new(error, call));
            }
            tokio::time::sleep(pause).await;
            paused += pause;
        }
    }

    /// Sends the request where `error` points to; gives `error` back when it points nowhere.
    async fn pass_on(
        &self,
        call: &Call,
        body: impl Fn() -> Bytes,
        effect: Effect,
        error: ApiError,
    ) -> Result<Response, ApiError> {
        let Some(mut addresses) = addresses_in(&error) else { return Err(error) };
        if call.hops >= HOPS_MAX {
            return Err(ApiError::TooManyHops { hops: call.hops });
        }
        self.targets.suspects_last(&mut addresses, Instant::now());
        self.send_to_one(call, &body(), effect, &addresses, error).await
    }

    /// Asks a cluster what it says under `path`: any of its nodes, which passes the question on to its
    /// leader if it needs to. The answer, whatever its status, as that node gave it.
    ///
    /// # Errors
    /// None of its nodes answered before `deadline`.
    pub(super) async fn ask(
        &self,
        cluster: &RingCluster,
        path: &str,
        deadline: Instant,
    ) -> Result<Response, ApiError> {
        let mut addresses = addresses_of(cluster);
        self.targets.suspects_last(&mut addresses, Instant::now());
        let nobody = ApiError::Forward {
            message: format!("cluster {} has no nodes", cluster.id),
            outcome: Outcome::NotApplied,
        };
        let call = Call::question(path, deadline);
        self.send_to_one(&call, &Bytes::new(), Effect::Read, &addresses, nobody).await
    }

    /// Sends the request to one address after the other until one has an answer that another would not
    /// better; `failure` if there are none. When nobody had one, the last refusal is the answer.
    async fn send_to_one(
        &self,
        call: &Call,
        body: &Bytes,
        effect: Effect,
        addresses: &[String],
        mut failure: ApiError,
    ) -> Result<Response, ApiError> {
        let mut rest = addresses.iter();
        let mut refused = None;
        let mut is_leaderless = false;
        while let Some(address) = rest.next() {
            let attempt_max = attempt_max(effect, rest.len());
            match self.send(call, body, effect, address, attempt_max).await {
                Ok(Answered { answer, charge, trouble }) => {
                    let goes_on = match trouble {
                        Some(Trouble::OfNode(outcome)) => outcome == Outcome::NotApplied,
                        // One more: it waited for a leader, and so may the next.
                        Some(Trouble::NoLeader) => {
                            !std::mem::replace(&mut is_leaderless, true)
                                && Instant::now() + READ_ATTEMPT_LAST < call.deadline
                        }
                        None => false,
                    };
                    if !goes_on {
                        return Ok(relay(answer, charge));
                    }
                    refused = Some((answer, charge));
                }
                Err(Failed { error, last_word: true }) => return Err(error),
                Err(Failed { error, last_word: false }) => failure = error,
            }
        }
        refused.map(|(answer, charge)| relay(answer, charge)).ok_or(failure)
    }

    /// Sends the request to one node, when there is a turn, and waits for its answer for at most
    /// `attempt_max`.
    async fn send(
        &self,
        call: &Call,
        body: &Bytes,
        effect: Effect,
        address: &str,
        attempt_max: Duration,
    ) -> Result<Answered, Failed> {
        let Some(_turn) = self.targets.turn(address, call.deadline).await else {
            return Err(Failed { error: ApiError::Overloaded, last_word: false });
        };
        let now = Instant::now();
        if call.deadline <= now {
            return Err(Failed { error: out_of_time(Outcome::NotApplied), last_word: true });
        }
        // The node may use all the time that is left: an answer that comes too late is dropped here.
        let request = request_for(call, body, address, call.deadline - now);
        let attempt_ends = now + attempt_max.min(call.deadline - now);
        let mut arriving = Arriving::new(&self.answers);
        // What a write came to must be told.
        let mut has_room = |bytes| arriving.add(bytes) || effect == Effect::Write;
        let error = match self.send_watched(request, attempt_ends, &mut has_room).await {
            Ok(mut answered) => {
                let body = std::mem::take(&mut answered.answer.body);
                (answered.answer.body, answered.charge) = arriving.hold(body);
                return Ok(answered);
            }
            // Another node would answer as much.
            Err(SendError::NoRoom { .. }) => {
                return Err(Failed { error: ApiError::Overloaded, last_word: true });
            }
            Err(error) => error,
        };
        tracing::debug!(%error, "a request could not be passed on");
        let may_be_applied = effect == Effect::Write && error.may_have_arrived();
        let outcome = if may_be_applied { Outcome::Unknown } else { Outcome::NotApplied };
        let too_late = call.deadline <= Instant::now();
        let error = match error {
            _ if too_late => out_of_time(outcome),
            error => ApiError::Forward { message: error.to_string(), outcome },
        };
        Err(Failed { error, last_word: may_be_applied || too_late })
    }

    /// Sends a request and remembers how the node dealt with it. While it keeps one waiting, later
    /// requests already ask others first.
    async fn send_watched(
        &self,
        request: HttpRequest,
        deadline: Instant,
        has_room: &mut HasRoom<'_>,
    ) -> Result<Answered, SendError> {
        let address = request.address.clone();
        let sending = self.client.send_for(request, deadline, has_room);
        tokio::pin!(sending);
        let result = match tokio::time::timeout(SLOW_AFTER, &mut sending).await {
            Ok(result) => result,
            Err(_) => {
                self.targets.suspect(&address);
                sending.await
            }
        };
        let result =
            result.map(|answer| Answered { trouble: trouble_in(&answer), charge: None, answer });
        match &result {
            Ok(Answered { trouble: None, .. }) | Err(SendError::NoRoom { .. }) => {
                self.targets.trust(&address)
            }
            _ => self.targets.suspect(&address),
        }
        result
    }
}

/// What one node answered.
struct Answered {
    answer: HttpResponse,
    /// Of a large one that has been counted.
    charge: Option<HeldCharge>,
    trouble: Option<Trouble>,
}

/// What keeps a node from serving and may be its own concern: another one is healthy, perhaps.
enum Trouble {
    /// Its disk has failed, it is stopping, or it belongs to no cluster. Says whether the request took
    /// effect.
    OfNode(Outcome),
    /// It knows of no leader, and has waited for one; nothing was applied. It may be cut off.
    NoLeader,
}

/// The trouble that an answer speaks of. `OVERLOADED` is none: it is mostly the leader's, and asking
/// for it through the other nodes, too, would only add to it.
fn trouble_in(answer: &HttpResponse) -> Option<Trouble> {
    if !matches!(answer.status, StatusCode::INTERNAL_SERVER_ERROR | StatusCode::SERVICE_UNAVAILABLE)
    {
        return None;
    }
    let ErrorBody { error } = serde_json::from_slice(&answer.body).ok()?;
    match error.code.as_str() {
        "STORAGE" | "STOPPING" | "NOT_INITIALIZED" => Some(Trouble::OfNode(error.outcome)),
        "NO_LEADER" if error.outcome == Outcome::NotApplied => Some(Trouble::NoLeader),
        _ => None,
    }
}

/// How long one node may take when `others` could be asked after it.
fn attempt_max(effect: Effect, others: usize) -> Duration {
    match (effect, others) {
        (Effect::Write, _) => Duration::MAX,
        (Effect::Read, 0) => READ_ATTEMPT_LAST,
        (Effect::Read, _) => SLOW_AFTER,
    }
}

/// Where an error points to; `None` when it points nowhere.
fn addresses_in(error: &ApiError) -> Option<Vec<String>> {
    match error {
        ApiError::NotLeader { leader, .. } => Some(vec![leader.http.clone()]),
        // The successor may be all that is left of the two. One that does not serve the key yet passes the
        // request on, or says so.
        ApiError::WrongCluster { owner, next, .. } => {
            let next = next.iter().flat_map(|next| addresses_of(next));
            Some(addresses_of(owner).into_iter().chain(next).collect())
        }
        _ => None,
    }
}

/// Any of a cluster's nodes will do; a random one first spreads the load.
fn addresses_of(cluster: &RingCluster) -> Vec<String> {
    let mut nodes: Vec<String> = cluster.nodes.iter().map(|node| node.http.clone()).collect();
    let first = rand::random_range(0..nodes.len().max(1));
    nodes.rotate_left(first);
    nodes
}

/// One node did not answer.
struct Failed {
    error: ApiError,
    /// No other node may be tried.
    last_word: bool,
}

fn out_of_time(outcome: Outcome) -> ApiError {
    ApiError::Timeout { message: "the node asked did not answer within the deadline", outcome }
}

/// Whether the same request may fare better in a moment, and nothing was applied by this one.
fn may_pass(error: &ApiError) -> bool {
    use ApiError::{Forward, NoLeader, TooManyHops};
    matches!(
        error,
        NoLeader { outcome: Outcome::NotApplied, .. }
            | Forward { outcome: Outcome::NotApplied, .. }
            | TooManyHops { .. }
    )
}

fn request_for(call: &Call, body: &Bytes, address: &str, left: Duration) -> HttpRequest {
    let mut headers = HeaderMap::new();
    for name in &PASSED_ON {
        if let Some(value) = call.headers.get(name) {
            headers.insert(name, value.clone());
        }
    }
    headers.insert(&HOPS, HeaderValue::from(u16::from(call.hops) + 1));
    let left_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
    headers.insert(&DEADLINE_MS, HeaderValue::from(left_ms));
    // The answer to HEAD is cut off where it leaves, here.
    let method = if call.method == Method::HEAD { Method::GET } else { call.method.clone() };
    HttpRequest {
        method,
        address: address.to_owned(),
        path_and_query: call.path_and_query(),
        headers,
        body: body.clone(),
    }
}

/// The answer as this node's own; who makes another one of it finds among its extensions what it is counted
/// by.
fn relay(answer: HttpResponse, charge: Option<HeldCharge>) -> Response {
    let mut response = Response::new(Body::from(answer.body));
    *response.status_mut() = answer.status;
    for name in &RELAYED {
        if let Some(value) = answer.headers.get(name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    if let Some(charge) = charge {
        response.extensions_mut().insert(charge);
    }
    response
}

#[cfg(test)]
mod tests;
