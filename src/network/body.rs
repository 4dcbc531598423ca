//! Request bodies: read with a bound on each, a bound on all together, a deadline and a pace.
//!
//! Large answers are bounded likewise ([`BodyBudget::hold`]): who asks for many and reads none of them could
//! otherwise take up any amount of memory with a few bytes. Another node's count from when they begin to come
//! ([`Arriving`]).
//!
//! A handler takes its body out of the [`BodySlot`] when it wants it. What no handler wanted (a 404, a
//! value that announces itself as too large) is read and thrown away for [`DISCARD_TIME`] before the
//! answer goes out, so that the connection can go on. One whose body is longer, broke off or did not come
//! in time ends with the answer; [`super::connection`] sees to it that the client can read that.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::Instant;
use tower_service::Service;

use super::error::{ApiError, Outcome};

/// All bodies in memory together, in bytes, unless a single one may already be half as large: 32 of
/// the largest with the default limits, and a share of memory that a small machine can spare. A
/// stranger must send what he wants to take up, so that announcing bodies costs the server nothing.
pub const BODIES_BYTES_MAX: usize = 256 << 20;

/// How long a body is read only to be thrown away. Bounded by time and not by bytes: who sends far too
/// much, and quickly, should hear so; who sends for longer is not worth waiting for.
const DISCARD_TIME: Duration = Duration::from_secs(3);

/// The first allocation for a body, in bytes, whatever its length claims to be.
const FIRST_BYTES_MAX: usize = 64 << 10;

/// Answers up to this size are not counted: there is one at a time for each connection, and the number of
/// those is bounded.
pub(super) const ANSWER_FREE_BYTES: usize = 64 << 10;

/// Counts the bytes of all request bodies in memory, or of all answers.
#[derive(Debug)]
pub struct BodyBudget {
    used: AtomicUsize,
    max: usize,
}

impl BodyBudget {
    /// A budget that has room for two bodies of the largest size at least.
    pub fn new(body_bytes_max: usize) -> Arc<Self> {
        let max = BODIES_BYTES_MAX.max(body_bytes_max.saturating_mul(2));
        Arc::new(Self { used: AtomicUsize::new(0), max })
    }

    /// Whether more is in memory than there is room for.
    pub(super) fn is_exceeded(&self) -> bool {
        self.used.load(Ordering::Relaxed) > self.max
    }

    /// A budget of just so many bytes.
    #[cfg(test)]
    pub(super) fn of(max: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), max })
    }

    /// The bytes that are counted.
    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Counts an answer's body until the last of it has been handed to the system; small ones are not counted.
    ///
    /// # Errors
    /// [`ApiError::Overloaded`] when other answers, and what others are going to be made of, have all the memory
    /// there is.
    pub fn hold(self: &Arc<Self>, bytes: Bytes) -> Result<Bytes, ApiError> {
        Ok(match self.charge(bytes.len(), ANSWER_FREE_BYTES)? {
            None => bytes,
            Some(charge) => Held::of(bytes, charge).0,
        })
    }

    /// As [`Self::hold`], for an answer for which `share` was put by: what it does not need is given back, and
    /// all is left as it was when what it needs besides has no room.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub(super) fn hold_with(
        self: &Arc<Self>,
        share: &mut Option<Charge>,
        bytes: Bytes,
    ) -> Result<Bytes, ApiError> {
        if bytes.len() <= ANSWER_FREE_BYTES {
            *share = None;
            return Ok(bytes);
        }
        let Some(counted) = share.as_ref().map(|share| share.bytes) else {
            return self.hold(bytes);
        };
        let more = self.charge(bytes.len().saturating_sub(counted), 0)?;
        let charge = share.take().into_iter().chain(more).reduce(Charge::with);
        let mut charge = charge.expect("the share was there");
        charge.lower_to(bytes.len());
        Ok(Held::of(bytes, charge).0)
    }

    /// Counts what an answer is going to be made of; `None` up to `free` bytes.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub(super) fn charge(
        self: &Arc<Self>,
        bytes: usize,
        free: usize,
    ) -> Result<Option<Charge>, ApiError> {
        if bytes <= free {
            return Ok(None);
        }
        let mut charge = Charge { budget: self.clone(), bytes: 0 };
        charge.add(bytes)?;
        Ok(Some(charge))
    }
}

/// A share of the budget, given back on drop.
#[derive(Debug)]
pub(super) struct Charge {
    budget: Arc<BodyBudget>,
    bytes: usize,
}

impl Charge {
    /// Both of them in one.
    pub(super) fn with(mut self, mut other: Self) -> Self {
        self.bytes += std::mem::take(&mut other.bytes);
        self
    }

    fn lower_to(&mut self, bytes: usize) {
        let surplus = self.bytes.saturating_sub(bytes);
        self.budget.used.fetch_sub(surplus, Ordering::Relaxed);
        self.bytes -= surplus;
    }

    fn add(&mut self, bytes: usize) -> Result<(), ApiError> {
        let before = self.budget.used.fetch_add(bytes, Ordering::Relaxed);
        self.bytes += bytes;
        if before + bytes > self.budget.max {
            return Err(ApiError::Overloaded);
        }
        Ok(())
    }
}

/// Counts an answer while it comes from another node, and until it has been sent on; small ones are not counted.
#[derive(Debug)]
pub(super) struct Arriving {
    charge: Charge,
    bytes: usize,
}

impl Arriving {
    /// Nothing of it is there yet.
    pub(super) fn new(budget: &Arc<BodyBudget>) -> Self {
        Self { charge: Charge { budget: budget.clone(), bytes: 0 }, bytes: 0 }
    }

    /// Counts so many more bytes of it. False when there is no room for them; they are counted all the same.
    pub(super) fn add(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        let is_small = self.bytes <= ANSWER_FREE_BYTES;
        is_small || self.charge.add(self.bytes - self.charge.bytes).is_ok()
    }

    /// The answer, now that it is whole, and what it is counted by, unless it is small.
    pub(super) fn hold(mut self, bytes: Bytes) -> (Bytes, Option<HeldCharge>) {
        if self.charge.bytes == 0 {
            return (bytes, None);
        }
        self.charge.lower_to(bytes.len());
        let (bytes, charge) = Held::of(bytes, self.charge);
        (bytes, Some(charge))
    }
}

/// An answer and its share.
struct Held {
    bytes: Bytes,
    charge: HeldCharge,
}

/// What a held answer is counted by, until its bytes are gone, unless it is taken first: then by whoever
/// makes another answer of it.
#[derive(Debug, Clone)]
pub(super) struct HeldCharge(Arc<Mutex<Option<Charge>>>);

impl HeldCharge {
    pub(super) fn take(&self) -> Option<Charge> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Held {
    fn of(bytes: Bytes, charge: Charge) -> (Bytes, HeldCharge) {
        let charge = HeldCharge(Arc::new(Mutex::new(Some(charge))));
        (Bytes::from_owner(Self { bytes, charge: charge.clone() }), charge)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Who else has it is to take it while the bytes are there.
        drop(self.charge.take());
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A whole body. Keep it until the request is answered: it counts against the budget as long.
#[derive(Debug)]
pub struct ReadBody {
    /// The bytes, in an allocation of just their size: hyper's pieces are slices of its much larger
    /// buffer, which a body of ten bytes would keep alive, uncounted, until the request is answered.
    pub bytes: Bytes,
    _charge: Charge,
}

/// How large a body may be, and what to call it when it is larger.
#[derive(Debug, Clone, Copy)]
pub struct BodyLimit {
    /// `value` or `body`.
    pub what: &'static str,
    /// In bytes.
    pub bytes_max: usize,
}

/// Where a request's body waits for a reader.
#[derive(Debug, Clone, Default)]
pub struct BodySlot {
    rest: Arc<Mutex<Rest>>,
}

/// What there is of a body that nobody has read.
#[derive(Debug, Default)]
enum Rest {
    /// Nothing.
    #[default]
    Nothing,
    /// All of it, or the part behind what made the reader stop.
    Body(Body),
    /// All of it, in memory, in an allocation of its own.
    Whole(Bytes),
    /// It broke off or did not come in time: nothing can come after it on its connection.
    Lost,
}

impl BodySlot {
    /// A slot that holds this body.
    pub fn new(body: Body) -> Self {
        Self { rest: Arc::new(Mutex::new(Rest::Body(body))) }
    }

    /// A slot that holds a body that is here already, in an allocation of its own.
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self { rest: Arc::new(Mutex::new(Rest::Whole(bytes))) }
    }

    fn replace(&self, rest: Rest) -> Rest {
        std::mem::replace(&mut self.rest.lock().unwrap_or_else(PoisonError::into_inner), rest)
    }

    /// Reads the body to its end, until the deadline, and as long as some of it comes within `pace`. A
    /// second call finds an empty one.
    pub async fn read(
        &self,
        limit: BodyLimit,
        budget: &Arc<BodyBudget>,
        deadline: Instant,
        pace: Duration,
    ) -> Result<ReadBody, ApiError> {
        let mut charge = Charge { budget: budget.clone(), bytes: 0 };
        // Until it is whole: who reads may be stopped at any moment.
        let mut body = match self.replace(Rest::Lost) {
            Rest::Body(body) => body,
            Rest::Nothing => Body::empty(),
            Rest::Whole(bytes) => {
                self.replace(Rest::Nothing);
                if bytes.len() > limit.bytes_max {
                    return Err(ApiError::TooLarge { what: limit.what, max: limit.bytes_max });
                }
                charge.add(bytes.len())?;
                return Ok(ReadBody { bytes, _charge: charge });
            }
            Rest::Lost => {
                return Err(ApiError::BadRequest("the request's body is incomplete".into()));
            }
        };
        let collected = collect(&mut body, limit, &mut charge, pace);
        let result = tokio::time::timeout_at(deadline, collected).await.unwrap_or_else(|_| {
            Err(too_slow("the request's body did not arrive within the deadline"))
        });
        match &result {
            Ok(_) => drop(self.replace(Rest::Nothing)),
            Err(ApiError::TooLarge { .. } | ApiError::Overloaded) => {
                drop(self.replace(Rest::Body(body)));
            }
            Err(_) => {}
        }
        Ok(ReadBody { bytes: result?, _charge: charge })
    }
}

fn too_slow(message: &'static str) -> ApiError {
    ApiError::Timeout { message, outcome: Outcome::NotApplied }
}

/// Throws the unread rest away; `false` when that takes too long, so that the connection has to close.
async fn discard(mut body: Body) -> bool {
    let rest = async {
        while let Some(frame) = body.frame().await {
            if frame.is_err() {
                return false;
            }
        }
        true
    };
    tokio::time::timeout(DISCARD_TIME, rest).await.unwrap_or(false)
}

async fn collect(
    body: &mut Body,
    limit: BodyLimit,
    charge: &mut Charge,
    pace: Duration,
) -> Result<Bytes, ApiError> {
    let BodyLimit { what, bytes_max } = limit;
    let too_large = ApiError::TooLarge { what, max: bytes_max };
    let announced = body.size_hint().lower();
    if announced > bytes_max as u64 {
        return Err(too_large);
    }
    let mut bytes = Vec::with_capacity(FIRST_BYTES_MAX.min(announced as usize));
    let stalled = |_| too_slow("no more of the request's body arrived for too long");
    while let Some(frame) = tokio::time::timeout(pace, body.frame()).await.map_err(stalled)? {
        let frame = frame.map_err(|error| {
            ApiError::BadRequest(format!("the request's body ended early or is malformed: {error}"))
        })?;
        // Trailers have no meaning here.
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > bytes_max {
            return Err(too_large);
        }
        charge.add(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok(Bytes::from(bytes.into_boxed_slice()))
}

/// Lets the router answer one request as it comes from hyper, with its body in a [`BodySlot`].
pub(super) async fn answer(mut router: axum::Router, request: Request<Incoming>) -> Response {
    let (mut head, incoming) = request.into_parts();
    let expects_continue = expects_continue(&head.headers);
    let slot = BodySlot::new(Body::new(incoming));
    head.extensions.insert(slot.clone());
    let Ok(mut response) = router.call(Request::from_parts(head, Body::empty())).await;
    // Who asked first whether to send a body sees the answer and does not send it. Reading would
    // make hyper ask for it.
    let whole = match slot.replace(Rest::Nothing) {
        Rest::Nothing | Rest::Whole(_) => true,
        Rest::Lost => false,
        Rest::Body(body) if body.is_end_stream() => true,
        Rest::Body(_) if expects_continue => false,
        Rest::Body(body) => discard(body).await,
    };
    if !whole {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn expects_continue(headers: &HeaderMap) -> bool {
    headers
        .get(header::EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    const LIMIT: BodyLimit = BodyLimit { what: "value", bytes_max: 10 };

    fn pieces(sizes: &[usize]) -> BodySlot {
        let pieces: Vec<Result<Bytes, std::io::Error>> =
            sizes.iter().map(|size| Ok(Bytes::from(vec![7; *size]))).collect();
        BodySlot::new(Body::from_stream(stream::iter(pieces)))
    }

    const PACE: Duration = Duration::from_secs(5);

    async fn read(slot: &BodySlot, budget: &Arc<BodyBudget>) -> Result<Bytes, ApiError> {
        let deadline = Instant::now() + Duration::from_secs(5);
        slot.read(LIMIT, budget, deadline, PACE).await.map(|body| body.bytes)
    }

    /// The limit is exact, whether the length is announced or not.
    #[tokio::test]
    async fn a_body_may_fill_its_limit_but_not_exceed_it() {
        let budget = BodyBudget::new(10);
        assert_eq!(read(&pieces(&[4, 6]), &budget).await.unwrap().len(), 10);
        let too_large = Err(ApiError::TooLarge { what: "value", max: 10 });
        assert_eq!(read(&pieces(&[4, 7]), &budget).await, too_large);
        let announced = BodySlot::new(Body::from(vec![7; 11]));
        assert_eq!(read(&announced, &budget).await, too_large);
        assert_eq!(budget.used.load(Ordering::Relaxed), 0, "refused bodies hold no budget");
    }

    /// The budget is taken by bytes that arrived, is refused beyond its bound, and comes back.
    #[tokio::test]
    async fn the_budget_bounds_all_bodies_together() {
        let budget = Arc::new(BodyBudget { used: AtomicUsize::new(0), max: 15 });
        let deadline = Instant::now() + Duration::from_secs(5);
        let held = pieces(&[10]).read(LIMIT, &budget, deadline, PACE).await.unwrap();
        assert_eq!(read(&pieces(&[6]), &budget).await, Err(ApiError::Overloaded));
        drop(held);
        assert_eq!(read(&pieces(&[6]), &budget).await.unwrap().len(), 6);
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
    }

    /// A body that does not come, or stops coming, ends as "not applied": at the deadline, or sooner.
    #[tokio::test]
    async fn a_silent_sender_runs_out_of_time() {
        let (moment, long) = (Duration::from_millis(20), Duration::from_secs(60));
        for (deadline, pace) in [(moment, long), (long, moment)] {
            let begun = Instant::now();
            let never = stream::pending::<Result<Bytes, std::io::Error>>();
            let slot = BodySlot::new(Body::from_stream(never));
            let budget = BodyBudget::new(10);
            let error = slot.read(LIMIT, &budget, begun + deadline, pace).await.unwrap_err();
            assert!(matches!(error, ApiError::Timeout { outcome: Outcome::NotApplied, .. }));
            assert!(begun.elapsed() < long / 2, "{:?}", begun.elapsed());
            assert!(
                matches!(slot.replace(Rest::Nothing), Rest::Lost),
                "there is nothing to wait for any more"
            );
        }
    }

    /// What was refused can still be read to its end, so that the connection can go on.
    #[tokio::test]
    async fn a_refused_body_is_discarded() {
        let slot = pieces(&[8, 8, 8]);
        assert!(read(&slot, &BodyBudget::new(10)).await.is_err());
        let Rest::Body(rest) = slot.replace(Rest::Nothing) else { panic!("the rest is gone") };
        assert!(discard(rest).await);
    }
}
