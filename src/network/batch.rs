//! `POST /v1/batch`: many operations in one request ([`crate::batch`] has the bodies).
//!
//! The operations of each cluster are one part; while the ring changes, those of each handoff. Reads that need
//! no leader are a part of their own, served after the other one: in one part with writes they would force
//! those to be served here, and beside them their values would wait in memory for the writes. A part is served as a
//! single request would be: here, or by the node that can ([`super::forward`]), and what happens to one part
//! says nothing of another.
//! With `Kv-Routing: direct` there is one part, which is answered here or not at all: each key of
//! another cluster fails by itself, and a node that does not lead redirects the whole.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderValue, StatusCode, header};

use super::api::{Answer, ApiState};
use super::body::{ANSWER_FREE_BYTES, BodyBudget, BodyLimit, Charge, HeldCharge};
use super::call::{Call, Routing};
use super::error::{ApiError, ErrorBody, ErrorDetail, Outcome};
use super::forward::{Effect, Refusal, Served};
use crate::app::Consistency;
use crate::batch::{
    self, Batch, Failure, Limits, MEDIA_TYPE, OPERATIONS_MAX, Operation, OperationResult, json,
};
use crate::once::{ClientFloor, InvalidSeq};
use crate::types::ClusterId;

const BINARY: HeaderValue = HeaderValue::from_static(MEDIA_TYPE);
const JSON: HeaderValue = HeaderValue::from_static("application/json");

pub(super) async fn serve(State(state): State<ApiState>, call: Call) -> Answer {
    answer(&state, &call).await
}

pub(super) async fn answer(state: &ApiState, call: &Call) -> Answer {
    let consistency = call.consistency()?;
    call.no_terms()?;
    let limits = limits(state);
    let bytes_max = state.app.limits().http_body_bytes_max;
    let body = call.read_body(state, BodyLimit { what: "body", bytes_max }).await?;
    let binary = call.headers.get(header::CONTENT_TYPE) == Some(&BINARY);
    let decoded = if binary {
        batch::decode_request(body.bytes.clone(), &limits)
    } else {
        json::decode_request(&body.bytes, &limits)
    };
    let batch = decoded.map_err(ApiError::from)?;
    // Before anything is done: what was done has to be told.
    let told_bytes = batch.operations.len() * RESULT_BYTES_MAX;
    let share = state.answers.charge(told_bytes, ANSWER_FREE_BYTES)?;
    let (results, charges) = carry_out(state, call, consistency, &batch).await?;
    let content_type = if binary { BINARY } else { JSON };
    // What the values were counted by goes over to their copies: nothing else is done until the values are
    // gone.
    let mut share = share.into_iter().chain(charges).reduce(Charge::with);
    let body = encode(&state.answers, &mut share, results, binary);
    Ok(([(header::CONTENT_TYPE, content_type)], body).into_response())
}

/// The most that a result takes in an answer, in bytes, apart from values and from what only explains a
/// failure.
const RESULT_BYTES_MAX: usize = 160;

/// The answer's body, counted among those in memory, of which `share` is put by for it. Where there is no memory
/// left for the rest, values are refused one by one, and failures told without what explains them. What was
/// written was written.
fn encode(
    answers: &Arc<BodyBudget>,
    share: &mut Option<Charge>,
    mut results: Vec<OperationResult>,
    binary: bool,
) -> Bytes {
    let encode = |results: &[OperationResult]| match binary {
        true => batch::encode_results(results),
        false => Bytes::from(json::encode_results(results)),
    };
    // Not by the size of the values: JSON needs up to six times as much.
    if let Ok(body) = answers.hold_with(share, encode(&results)) {
        return body;
    }
    refuse_values(&mut results);
    shorten_failures(&mut results);
    let told = encode(&results);
    debug_assert!(told.len() <= ANSWER_FREE_BYTES.max(results.len() * RESULT_BYTES_MAX));
    answers.hold_with(share, told.clone()).unwrap_or(told)
}

/// The share of the memory for answers that the values of one of `parts` take up while the others are waited
/// for. Where there is none left, they are refused. Those of another node are counted already, by `arrived`,
/// with the answer that they are slices of, unless that is small.
fn hold_values(
    answers: &Arc<BodyBudget>,
    results: &mut [OperationResult],
    arrived: Option<Charge>,
    parts: usize,
) -> Option<Charge> {
    let value_bytes = |result: &OperationResult| match result {
        OperationResult::Found { value, .. } => value.len(),
        _ => 0,
    };
    let bytes = results.iter().map(value_bytes).sum();
    if arrived.is_some() && bytes > 0 {
        return arrived;
    }
    // What an answer has free, its parts share.
    let charge = answers.charge(bytes, ANSWER_FREE_BYTES / parts);
    charge.unwrap_or_else(|_| {
        refuse_values(results);
        None
    })
}

fn refuse_values(results: &mut [OperationResult]) {
    for result in results {
        if matches!(result, OperationResult::Found { .. }) {
            *result = OperationResult::failed(&ApiError::Overloaded);
        }
    }
}

fn shorten_failures(results: &mut [OperationResult]) {
    for result in results {
        if let OperationResult::Failed(failure) = result {
            let ErrorDetail { code, outcome, epoch, .. } = &failure.error;
            failure.error = ErrorDetail {
                code: code.clone(),
                message: String::new(),
                outcome: *outcome,
                leader: None,
                owner: None,
                epoch: *epoch,
                refused: None,
            };
        }
    }
}

fn limits(state: &ApiState) -> Limits {
    let limits = state.app.limits();
    Limits {
        operations_max: OPERATIONS_MAX,
        key_bytes_max: limits.key_bytes_max,
        value_bytes_max: limits.value_bytes_max,
    }
}

/// One result for each operation, and what their values are counted by.
async fn carry_out(
    state: &ApiState,
    call: &Call,
    consistency: Consistency,
    batch: &Batch,
) -> Result<(Vec<OperationResult>, Vec<Charge>), Refusal> {
    let Batch { client, operations } = batch;
    let limits = limits(state);
    let mut results: Vec<_> = operations
        .iter()
        .map(|operation| {
            // Not where the part is served: one bad operation must not keep the others there.
            let bad_seq = |error: InvalidSeq| ApiError::BadRequest(error.to_string());
            let once = || operation.once(client.as_ref()).map(drop).map_err(bad_seq);
            let error = operation.check(&limits).and_then(|()| once()).err();
            error.map(|error| OperationResult::failed(&error))
        })
        .collect();
    let passed_on = match call.routing {
        Routing::PassOn => Some(call.with_content_type(BINARY)),
        Routing::Direct => None,
    };
    let call = passed_on.as_ref().unwrap_or(call);
    let request = Request { call, consistency, client: client.as_ref() };
    let sound = (0..operations.len()).filter(|index| results[*index].is_none()).collect();
    let mut charges = serve_all(state, &request, operations, sound, &mut results).await?;
    if call.routing == Routing::PassOn {
        // Keys that moved to another cluster while the part was served, and what was left when its leader
        // ceased to lead. Once more: neither happens twice in the life of a request, unless that is long.
        let again = goes_again(operations, &results);
        if !again.is_empty() {
            charges.extend(serve_all(state, &request, operations, again, &mut results).await?);
        }
    }
    let results = results.into_iter().map(|result| result.expect("every part has been answered"));
    Ok((results.collect(), charges))
}

/// The operations that were sent elsewhere and not done, so that they may go there: unless a later write to
/// the same key did take effect, or may have, which the earlier one would overwrite.
fn goes_again(operations: &[Operation], results: &[Option<OperationResult>]) -> Vec<usize> {
    let was_sent_on = |index: &usize| results[*index].as_ref().is_some_and(is_misdirected);
    let mut again: Vec<_> = (0..operations.len()).filter(was_sent_on).collect();
    let Some(first) = again.first() else { return again };
    let may_be_done = |result: &OperationResult| match result {
        OperationResult::Failed(failure) => failure.error.outcome != Outcome::NotApplied,
        _ => true,
    };
    let mut done = HashMap::new();
    for index in *first..operations.len() {
        if operations[index].is_write() && results[index].as_ref().is_some_and(may_be_done) {
            done.insert(operations[index].key(), index);
        }
    }
    again.retain(|index| {
        let later = done.get(operations[*index].key());
        !operations[*index].is_write() || later.is_none_or(|later| later < index)
    });
    again
}

/// Whether it was told that another cluster owns its key, or that another node leads, and not done.
fn is_misdirected(result: &OperationResult) -> bool {
    const ELSEWHERE: [StatusCode; 2] =
        [StatusCode::MISDIRECTED_REQUEST, StatusCode::TEMPORARY_REDIRECT];
    matches!(result, OperationResult::Failed(failure)
        if ELSEWHERE.iter().any(|status| status.as_u16() == failure.status))
}

/// What all operations of a batch share.
struct Request<'a> {
    call: &'a Call,
    consistency: Consistency,
    client: Option<&'a ClientFloor>,
}

/// Serves these operations where they belong, and puts down what each came to. Returns what the values among that
/// are counted by.
async fn serve_all(
    state: &ApiState,
    request: &Request<'_>,
    operations: &[Operation],
    sound: Vec<usize>,
    results: &mut [Option<OperationResult>],
) -> Result<Vec<Charge>, Refusal> {
    let routing = request.call.routing;
    let places = into_places(state, routing, request.consistency, operations, sound);
    let count = places.iter().flatten().filter(|part| !part.is_empty()).count();
    let serve = async |part: &[usize]| {
        let operations: Vec<_> = part.iter().map(|index| &operations[*index]).collect();
        let (mut results, arrived) = serve_part(state, request, operations).await?;
        let charge = hold_values(&state.answers, &mut results, arrived, count);
        Ok((results, charge))
    };
    let answers = places.iter().map(async |parts| {
        let mut answers = Vec::with_capacity(parts.len());
        for part in parts.iter().filter(|part| !part.is_empty()) {
            answers.push((part, serve(part).await));
        }
        answers
    });
    let mut charges = Vec::new();
    for (part, answer) in join_all(answers).await.into_iter().flatten() {
        let answer = match answer {
            Ok((results, charge)) => {
                charges.extend(charge);
                results
            }
            // Said of all operations at once, it is the answer to the request.
            Err(refusal) if part.len() == operations.len() => return Err(refusal),
            Err(refusal) if routing == Routing::Direct => return Err(refusal),
            Err(refusal) => fail_all(operations, part, refusal),
        };
        for (index, result) in part.iter().zip(answer) {
            results[*index] = Some(result);
        }
    }
    Ok(charges)
}

/// The indexes of operations that go to the same cluster: those that only its leader serves, and the others.
type Parts = [Vec<usize>; 2];

/// The parts of each cluster, and, while the ring changes, of each handoff: what has moved is redirected as a
/// whole then, and does not fail beside what stays.
fn into_places(
    state: &ApiState,
    routing: Routing,
    consistency: Consistency,
    operations: &[Operation],
    sound: Vec<usize>,
) -> Vec<Parts> {
    if routing == Routing::Direct {
        return vec![[sound, Vec::new()]];
    }
    let ring = state.app.ring_view();
    let mut numbers: HashMap<[Option<&ClusterId>; 2], usize> = HashMap::new();
    let mut places: Vec<Parts> = Vec::new();
    for index in sound {
        let operation = &operations[index];
        let number = *numbers.entry(ring.owners(operation.key())).or_insert(places.len());
        if number == places.len() {
            places.push(Parts::default());
        }
        places[number][usize::from(!by_leader(operation, consistency))].push(index);
    }
    places
}

/// Whether only the leader can serve this.
fn by_leader(operation: &Operation, consistency: Consistency) -> bool {
    operation.is_write() || consistency == Consistency::Linearizable
}

/// The results of a part, and what they are counted by already, which those of another node are.
async fn serve_part(
    state: &ApiState,
    request: &Request<'_>,
    operations: Vec<&Operation>,
) -> Result<(Vec<OperationResult>, Option<Charge>), Refusal> {
    let Request { call, consistency, client } = *request;
    let writes = operations.iter().any(|operation| operation.is_write());
    let effect = if writes { Effect::Write } else { Effect::Read };
    // Not before it is known that the part goes elsewhere: it is all of it once more.
    let body = || batch::encode_request(client, operations.iter().copied());
    let here = || state.app.batch(client, &operations, consistency, call.deadline);
    match state.forwarder.serve(call, body, effect, here).await? {
        Served::Here(results) => Ok((results, None)),
        Served::Elsewhere(response) => {
            let (mut results, arrived) = relayed(&operations, response).await;
            // The answer had to be taken for what the writes came to.
            if effect == Effect::Write && state.answers.is_exceeded() {
                refuse_values(&mut results);
            }
            Ok((results, arrived))
        }
    }
}

/// Another node's answer to a part, and what it is counted by, unless it is small.
async fn relayed(
    operations: &[&Operation],
    response: Response,
) -> (Vec<OperationResult>, Option<Charge>) {
    let (head, body) = response.into_parts();
    let charge = head.extensions.get().and_then(HeldCharge::take);
    (told_by(operations, head.status, body).await, charge)
}

async fn told_by(
    operations: &[&Operation],
    status: StatusCode,
    body: Body,
) -> Vec<OperationResult> {
    // It is in memory already.
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    if status == StatusCode::OK {
        match batch::decode_results(body, operations.len()) {
            Ok(results) => return results,
            Err(error) => {
                return operations.iter().map(|o| garbled(o, &error.to_string())).collect();
            }
        }
    }
    let Ok(ErrorBody { error }) = serde_json::from_slice(&body) else {
        let what = format!("status {status} without a reason");
        return operations.iter().map(|operation| garbled(operation, &what)).collect();
    };
    let failure = Failure { status: status.as_u16(), current: None, error };
    operations.iter().map(|operation| failed_as(operation, failure.clone())).collect()
}

/// The node that the operation was passed on to answered something else than a batch's results.
fn garbled(operation: &Operation, what: &str) -> OperationResult {
    let outcome = if operation.is_write() { Outcome::Unknown } else { Outcome::NotApplied };
    let message = format!("the node asked gave a senseless answer: {what}");
    OperationResult::failed(&ApiError::Forward { message, outcome })
}

fn fail_all(operations: &[Operation], part: &[usize], refusal: Refusal) -> Vec<OperationResult> {
    let error = refusal.into_error();
    let failure = |index: &usize| match OperationResult::failed(&error) {
        OperationResult::Failed(failure) => failed_as(&operations[*index], *failure),
        other => other,
    };
    part.iter().map(failure).collect()
}

/// A failure of the whole part, as this operation's: a read never leaves a doubt behind.
fn failed_as(operation: &Operation, mut failure: Failure) -> OperationResult {
    if !operation.is_write() {
        failure.error.outcome = Outcome::NotApplied;
    }
    OperationResult::Failed(Box::new(failure))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::body::{Arriving, BODIES_BYTES_MAX};
    use crate::ring::{RingCluster, RingNode};
    use crate::types::Condition;

    fn put(key: &'static str) -> Operation {
        let condition = Condition::Always;
        Operation::Put { key: key.into(), value: "v".into(), condition, seq: None }
    }

    fn get(key: &'static str) -> Operation {
        Operation::Get { key: key.into() }
    }

    /// However many slow readers there are: what an answer takes is counted, and with no memory left it still
    /// says of each operation what became of it.
    #[test]
    fn an_answer_without_room_tells_what_became_of_each() {
        let nodes = (1..=16).map(|id| RingNode {
            id,
            http: format!("a-host-with-a-long-name-{id}:31000"),
            rpc: format!("a-host-with-a-long-name-{id}:32000"),
        });
        let owner = RingCluster { id: "b".parse().unwrap(), weight: 1.0, nodes: nodes.collect() };
        let elsewhere =
            ApiError::WrongCluster { owner: Box::new(owner), epoch: u64::MAX, next: None };
        let condition = ApiError::ConditionFailed { current: Some(u64::MAX) };
        let results = |count: usize| -> Vec<OperationResult> {
            let value = Bytes::from(vec![b'v'; 4096]);
            let of = |place: usize| match place % 6 {
                0 => OperationResult::Written { revision: u64::MAX },
                1 => OperationResult::Deleted { revision: u64::MAX, deleted: false },
                2 => OperationResult::failed(&elsewhere),
                3 => OperationResult::failed(&condition),
                4 => OperationResult::failed(&ApiError::OnceForgotten),
                _ => OperationResult::Found { revision: u64::MAX, value: value.clone() },
            };
            (0..count).map(of).collect()
        };
        for binary in [true, false] {
            let answers = BodyBudget::new(0);
            let put_by = |count: usize| answers.charge(count * RESULT_BYTES_MAX, ANSWER_FREE_BYTES);
            let mut kept = Vec::new();
            // Until there is no room for a whole one, and then until none may begin.
            loop {
                let Ok(mut share) = put_by(3000) else { break };
                let body = encode(&answers, &mut share, results(3000), binary);
                assert!(share.is_none(), "it went into the answer");
                kept.push(body);
            }
            let bytes: usize = kept.iter().map(Bytes::len).sum();
            assert_eq!(bytes, answers.used());
            assert!(bytes <= BODIES_BYTES_MAX, "{bytes}");
            if binary {
                let told = batch::decode_results(kept.last().unwrap().clone(), 3000).unwrap();
                let statuses = |results: &[OperationResult]| {
                    results.iter().map(OperationResult::status).collect::<Vec<_>>()
                };
                let mut expected = statuses(&results(3000));
                expected.iter_mut().skip(5).step_by(6).for_each(|status| *status = 503);
                assert_eq!(statuses(&told), expected);
            }
            drop(kept);
            assert_eq!(answers.used(), 0);
            // A small answer takes nothing, whatever was put by for it.
            let mut share = put_by(3000).unwrap();
            let _body = encode(&answers, &mut share, results(3), binary);
            assert_eq!(answers.used(), 0);
        }
    }

    /// What other clusters sent is counted once, also while one answer is made of it: a batch of values of
    /// all of them that fill more than half of the memory is answered on an idle node.
    #[tokio::test]
    async fn values_that_came_from_elsewhere_are_counted_once() {
        const VALUES: usize = 4;
        let bytes_max = 1 << 20;
        let answers = BodyBudget::of(bytes_max);
        let value = Bytes::from(vec![b'v'; bytes_max / 16]);
        let operations = ["k"; VALUES].map(get);
        let operations: Vec<_> = operations.iter().collect();
        let (mut results, mut charges) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let found = OperationResult::Found { revision: 1, value: value.clone() };
            let body = batch::encode_results(&vec![found; VALUES]);
            let mut arriving = Arriving::new(&answers);
            assert!(arriving.add(body.len()));
            let (body, charge) = arriving.hold(body);
            let mut response = Response::new(Body::from(body));
            response.extensions_mut().insert(charge.expect("it is not small"));
            let (mut part, arrived) = relayed(&operations, response).await;
            charges.extend(hold_values(&answers, &mut part, arrived, 3));
            results.extend(part);
        }
        assert!(answers.used() > bytes_max / 2, "{}", answers.used());
        let mut share = charges.into_iter().reduce(Charge::with);
        let body = encode(&answers, &mut share, results, true);
        let told = batch::decode_results(body.clone(), 3 * VALUES).unwrap();
        assert!(told.iter().all(|result| result.status() == 200), "{:?}", told[0].status());
        drop(told);
        assert_eq!(answers.used(), body.len());
        drop(body);
        assert_eq!(answers.used(), 0);
    }

    /// What is left of a batch when its leader ceases to lead, or its keys move, goes where it belongs; but no
    /// write behind a later one of its key.
    #[test]
    fn what_was_sent_on_goes_again_in_its_order() {
        let leader = RingNode { id: 2, http: "h:1".into(), rpc: "r:1".into() };
        let owner = RingCluster { id: "b".parse().unwrap(), weight: 1.0, nodes: Vec::new() };
        let elsewhere = OperationResult::failed(&ApiError::NotLeader { leader, epoch: 1 });
        let moved = OperationResult::failed(&ApiError::WrongCluster {
            owner: Box::new(owner),
            epoch: 1,
            next: None,
        });
        let refused = OperationResult::failed(&ApiError::Frozen);
        let message = "m".to_owned();
        let lost =
            OperationResult::failed(&ApiError::Forward { message, outcome: Outcome::Unknown });
        let written = OperationResult::Written { revision: 1 };
        for (batch, again) in [
            (
                vec![(put("a"), &written), (put("a"), &elsewhere), (get("a"), &elsewhere)],
                vec![1, 2],
            ),
            (vec![(put("a"), &moved), (put("b"), &written), (put("a"), &elsewhere)], vec![0, 2]),
            (vec![(put("a"), &elsewhere), (put("a"), &written), (put("a"), &moved)], vec![2]),
            (vec![(put("a"), &moved), (put("a"), &lost)], vec![]),
            (vec![(put("a"), &elsewhere), (put("a"), &refused)], vec![0]),
            (vec![(get("a"), &elsewhere), (put("a"), &written)], vec![0]),
            (vec![(put("a"), &refused), (get("a"), &OperationResult::Absent)], vec![]),
        ] {
            let (operations, results): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .map(|(operation, result)| (operation, Some(result.clone())))
                .unzip();
            assert_eq!(goes_again(&operations, &results), again, "{operations:?}: {results:?}");
        }
    }
}
