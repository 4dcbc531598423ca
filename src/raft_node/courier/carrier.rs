//! A carrier: a task that takes what waits in a queue to its node, again and again until nothing
//! waits any more.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::time::Instant;

use super::queue::{Number, Waiting};
use super::{Carried, Lane, Undelivered};
use crate::batch::{self, MEDIA_TYPE, Operation, OperationResult};
use crate::http_client::{HttpClient, HttpRequest, HttpResponse};
use crate::network::call::{DEADLINE_MS, ROUTING};

/// A value that is less than this part of the answer that it came in is copied out of it: otherwise
/// somebody who keeps one small value would keep a thousand others with it.
const VALUE_PART_MIN: usize = 4;

const BINARY: HeaderValue = HeaderValue::from_static(MEDIA_TYPE);

/// Starts a carrier that the queue already counts.
pub(super) fn start(http: &HttpClient, lane: &Arc<Lane>) {
    let carrier = Carrier { http: http.clone(), lane: lane.clone(), state: State::New };
    tokio::spawn(carrier.run());
}

struct Carrier {
    http: HttpClient,
    lane: Arc<Lane>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing has been taken yet.
    New,
    Working,
    /// There was nothing to take, and the queue knows that this carrier is no more.
    Ended,
}

impl Drop for Carrier {
    /// Only a runtime that shuts down ends a carrier in any other way than its own. A caller may go on on another
    /// one, and would wait in vain.
    fn drop(&mut self) {
        if self.state == State::Ended {
            return;
        }
        let mut queue = self.lane.queue();
        if self.state == State::New {
            queue.started();
        }
        queue.ended();
        queue.refuse_unless_carried();
    }
}

impl Carrier {
    async fn run(mut self) {
        loop {
            // Among many callers, those that are about to issue an operation get to do so first: it
            // would be the next carrier's otherwise. A lone caller is not kept waiting.
            let busy = self.lane.queue().is_busy();
            if busy {
                tokio::task::yield_now().await;
            }
            let Some(load) = self.take() else { return };
            self.carry(load).await;
        }
    }

    /// `None` when nothing waits: then it has ended. Starts another carrier if more waits than this
    /// one takes.
    fn take(&mut self) -> Option<Vec<(Number, Waiting)>> {
        let (load, more) = {
            let mut queue = self.lane.queue();
            if self.state == State::New {
                queue.started();
            }
            let load = queue.take(Instant::now());
            self.state = if load.is_empty() { State::Ended } else { State::Working };
            if load.is_empty() {
                // Under the same lock: whoever comes after this must start another carrier.
                queue.ended();
            }
            (load, queue.must_start())
        };
        if more {
            start(&self.http, &self.lane);
        }
        (!load.is_empty()).then_some(load)
    }

    async fn carry(&self, load: Vec<(Number, Waiting)>) {
        let count = load.len();
        let under_way = UnderWay { lane: &self.lane, count };
        let operations = load.iter().map(|(_, waiting)| &*waiting.operation);
        // The floor is said once for all of them.
        let lowest = operations.clone().filter_map(Operation::seq).min();
        let client = lowest.map(|lowest| self.lane.sequence.client_floor(lowest));
        let body = batch::encode_request(client.as_ref(), operations);
        let sent_bytes = body.len();
        let last = load.iter().map(|(_, waiting)| waiting.deadline).max();
        let deadline = last.expect("nothing is carried for nobody");
        let response = self.http.send(self.request(body, deadline), deadline).await;
        under_way.ended(response.is_ok());
        match response {
            Err(error) => {
                for (_, waiting) in load {
                    waiting.refuse(Undelivered::Lost(error.clone()));
                }
            }
            Ok(response) if response.status == StatusCode::PAYLOAD_TOO_LARGE => {
                self.request_was_too_large(load, sent_bytes);
            }
            Ok(response) => match results_in(&response, count) {
                Some(results) => self.hand_out(load, results),
                None => {
                    let response = Arc::new(response);
                    for (_, waiting) in load {
                        waiting.answer(Carried::Whole(response.clone()));
                    }
                }
            },
        }
    }

    fn request(&self, body: Bytes, deadline: Instant) -> HttpRequest {
        let left = deadline.saturating_duration_since(Instant::now());
        let left_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1);
        let mut headers = HeaderMap::with_capacity(4);
        headers.insert(header::CONTENT_TYPE, BINARY);
        headers.insert(ROUTING, HeaderValue::from_static("direct"));
        headers.insert(DEADLINE_MS, HeaderValue::from(left_ms));
        self.lane.class.add_headers(&mut headers);
        HttpRequest {
            method: Method::POST,
            address: self.lane.address.clone(),
            path_and_query: self.lane.class.path_and_query().to_owned(),
            headers,
            body,
        }
    }

    /// The node takes smaller bodies only: nothing of it was done, so all of it may go again.
    fn request_was_too_large(&self, load: Vec<(Number, Waiting)>, bytes: usize) {
        if load.len() == 1 {
            return load.into_iter().for_each(|(_, waiting)| waiting.refuse(Undelivered::Alone));
        }
        let mut queue = self.lane.queue();
        queue.request_overflowed(bytes);
        queue.put_back(load);
    }

    fn hand_out(&self, load: Vec<(Number, Waiting)>, results: Vec<OperationResult>) {
        let count = load.len();
        let mut left_out = Vec::new();
        for (place, ((number, waiting), result)) in load.into_iter().zip(results).enumerate() {
            if !is_left_out(&waiting.operation, &result) {
                waiting.answer(Carried::Item(result));
            } else if place == 0 {
                // An answer always has room for the first value: it is this operation that is too large.
                waiting.refuse(Undelivered::Alone);
            } else {
                left_out.push((number, waiting));
            }
        }
        if left_out.is_empty() {
            return self.lane.queue().all_fitted(count);
        }
        let mut queue = self.lane.queue();
        queue.answer_overflowed(count - left_out.len());
        queue.put_back(left_out);
    }
}

/// Keeps the queue's count of carried operations true, also when the carrier is dropped.
struct UnderWay<'a> {
    lane: &'a Lane,
    count: usize,
}

impl UnderWay<'_> {
    fn ended(mut self, answered: bool) {
        let now = answered.then(Instant::now);
        self.lane.queue().returned(std::mem::take(&mut self.count), now);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if self.count > 0 {
            self.lane.queue().returned(self.count, None);
        }
    }
}

impl Waiting {
    /// The caller may have gone, and then there is nobody to tell.
    fn answer(self, carried: Carried) {
        let _ = self.reply.send(Ok(carried));
    }
}

/// The results, if these are any.
fn results_in(response: &HttpResponse, expected: usize) -> Option<Vec<OperationResult>> {
    let binary = response.headers.get(header::CONTENT_TYPE) == Some(&BINARY);
    if response.status != StatusCode::OK || !binary {
        return None;
    }
    let mut results = batch::decode_results(response.body.clone(), expected).ok()?;
    for result in &mut results {
        if let OperationResult::Found { value, .. } = result
            && value.len() < response.body.len() / VALUE_PART_MIN
        {
            *value = Bytes::copy_from_slice(value);
        }
    }
    Some(results)
}

/// A read that the answer had no room for. (Or its key is too large: where nodes take shorter ones than usual.
/// Then it will be told so once more when it comes first.)
fn is_left_out(operation: &Operation, result: &OperationResult) -> bool {
    !operation.is_write() && result.status() == StatusCode::PAYLOAD_TOO_LARGE.as_u16()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::super::{Class, Courier};
    use super::*;
    use crate::network::error::ApiError;

    /// An answer has room for the first value in any case. What it leaves out first is too large by itself, and
    /// would be left out for ever; what it leaves out behind others goes again.
    #[test]
    fn what_is_too_large_by_itself_goes_alone() {
        let courier = Courier::default();
        let here = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let lane = courier.lane(here.handle().id(), "n:1", Class::LinearizableRead);
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut answers = Vec::new();
        for _ in 0..3 {
            let (reply, answer) = oneshot::channel();
            let operation = Arc::new(Operation::Get { key: "k".into() });
            lane.queue().push(Waiting { operation, deadline, reply });
            answers.push(answer);
        }
        let load = lane.queue().take(Instant::now());
        let carrier =
            Carrier { http: courier.http().clone(), lane: lane.clone(), state: State::Ended };
        let left_out = OperationResult::failed(&ApiError::TooLarge { what: "answer", max: 1 });
        carrier.hand_out(load, vec![left_out.clone(), found(vec![1]), left_out]);
        assert!(matches!(answers[0].try_recv(), Ok(Err(Undelivered::Alone))));
        assert!(matches!(answers[1].try_recv(), Ok(Ok(Carried::Item(_)))));
        assert_eq!(lane.queue().waiting(), 1);
        assert!(answers[2].try_recv().is_err());
    }

    fn found(value: Vec<u8>) -> OperationResult {
        OperationResult::Found { revision: 1, value: value.into() }
    }

    #[test]
    fn a_small_value_does_not_keep_a_large_answer_alive() {
        let body = batch::encode_results(&[found(vec![1; 100]), found(vec![2; 1000])]);
        let range = body.as_ptr_range();
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, BINARY)]);
        let response = HttpResponse { status: StatusCode::OK, headers, body };
        let results = results_in(&response, 2).unwrap();
        let shared = results.iter().map(|result| match result {
            OperationResult::Found { value, .. } => range.contains(&value.as_ptr()),
            other => panic!("{other:?}"),
        });
        assert_eq!(shared.collect::<Vec<_>>(), [false, true]);
        assert!(results_in(&response, 3).is_none());
    }
}
