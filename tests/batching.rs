//! Operations that are issued at the same moment share requests, and each is answered as if it had been
//! sent alone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use distrib_kv_store::batch::{MEDIA_TYPE, Operation, OperationResult};
use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::network::error::{ApiError, Outcome};
use distrib_kv_store::raft_node::RaftNode;
use distrib_kv_store::types::{Condition, Consistency};
use tokio::task::JoinSet;

mod fake_node;
use fake_node::{FakeNode, Gate, Reply, Seen, absent, bind, error, start, written};

const KV: &str = "/v1/kv/";
/// Three values of this size fill a request, and twelve all that may be in flight.
static LARGE: [u8; 300 << 10] = [7; 300 << 10];

fn client_of(node: &FakeNode) -> RaftNode {
    RaftNode::new(vec![node.address.clone()])
}

async fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What a raw node answers to a batch when `of` says what each operation comes to.
fn results(batch: &Seen, of: impl Fn(usize, &Operation) -> OperationResult) -> Reply {
    Reply::Results(batch.operations().iter().enumerate().map(|(i, o)| of(i, o)).collect())
}

/// Occupies all requests that may be in flight at a node whose answers are kept back.
async fn occupy(client: &RaftNode, node: &FakeNode, tasks: &mut JoinSet<Result<u64, ClientError>>) {
    for _ in 0..12 {
        let client = client.clone();
        tasks.spawn(async move { client.write("occupied", &LARGE).await });
    }
    wait_until("all turns are taken", || node.batches().len() == 4).await;
}

fn keys(batches: &[Seen]) -> Vec<Bytes> {
    batches.iter().flat_map(Seen::operations).map(|operation| operation.key().clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_operations_share_few_requests_and_each_gets_its_own_result() {
    let node = start(|seen| match seen.path.as_bytes().last().unwrap() {
        b'0' => Reply::Condition(Some(3)),
        b'1' => error(400, "BAD_REQUEST", "not_applied"),
        _ => written(String::from_utf8_lossy(&seen.body).parse().unwrap()),
    });
    let client = client_of(&node);
    let mut tasks = JoinSet::new();
    for number in 0..2000u64 {
        let client = client.clone();
        tasks.spawn(async move {
            let (key, value) = (format!("key-{number}"), number.to_string());
            let result = client.write_if(&key, &value, Condition::Revision(1)).await;
            match number % 10 {
                0 => assert_eq!(result, Err(ClientError::ConditionFailed { current: Some(3) })),
                1 => assert!(matches!(result, Err(ClientError::Server { status: 400, .. }))),
                _ => assert_eq!(result, Ok(number)),
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(node.seen(KV).len(), 2000);
    assert!(node.seen(KV).iter().all(|seen| seen.headers["if-match"] == "\"1\""));
    let batches = node.batches();
    assert!(batches.len() < 400, "{} requests", batches.len());
    assert!(batches.iter().all(|batch| batch.operations().len() <= 1024));
}

#[tokio::test]
async fn a_lone_operation_is_sent_at_once_and_says_how_it_is_to_be_served() {
    let node = start(|seen| if seen.method == "GET" { absent() } else { written(1) });
    let client = client_of(&node).with_timeout(Duration::from_secs(9));
    client.write("k", "v").await.unwrap();
    for consistency in
        [Consistency::Linearizable, Consistency::LinearizableOnFollower, Consistency::Stale]
    {
        assert_eq!(client.get("k", consistency).await.unwrap(), None);
    }
    let batches = node.batches();
    let heads: Vec<_> = batches
        .iter()
        .map(|batch| (batch.path.as_str(), batch.headers.get("kv-read").is_some()))
        .collect();
    assert_eq!(
        heads,
        [
            ("/v1/batch", false),
            ("/v1/batch?consistency=linearizable", false),
            ("/v1/batch?consistency=linearizable", true),
            ("/v1/batch?consistency=stale", false),
        ]
    );
    for batch in &batches {
        assert_eq!(batch.operations().len(), 1);
        assert_eq!(
            (&batch.headers["content-type"], batch.method.as_str()),
            (&MEDIA_TYPE.parse().unwrap(), "POST")
        );
        assert_eq!(batch.headers["kv-routing"], "direct");
        let left_ms: u64 = batch.headers["kv-deadline-ms"].to_str().unwrap().parse().unwrap();
        assert!((1..=9000).contains(&left_ms), "{left_ms}");
    }
}

#[tokio::test]
async fn a_caller_that_leaves_takes_its_operation_along_unless_it_is_in_flight() {
    let gate = Gate::closed();
    let closed = gate.clone();
    let node = bind().serve_raw(move |batch| {
        let written = |_: usize, _: &Operation| OperationResult::Written { revision: 1 };
        Reply::After(closed.clone(), Box::new(results(batch, written)))
    });
    let client = client_of(&node);
    let mut tasks = JoinSet::new();
    occupy(&client, &node, &mut tasks).await;
    let [left, stays] = ["left", "stays"].map(|key| {
        let client = client.clone();
        tokio::spawn(async move { client.write(key, "v").await })
    });
    tokio::task::yield_now().await;
    left.abort();
    assert!(left.await.unwrap_err().is_cancelled());
    // These are in flight: they go on without their callers.
    tasks.shutdown().await;
    gate.open();
    assert_eq!(stays.await.unwrap(), Ok(1));
    assert_eq!(keys(&node.batches()[4..]), ["stays"]);
    assert_eq!(client.write("after", "v").await, Ok(1));
}

#[tokio::test]
async fn every_operation_keeps_its_own_deadline() {
    let gate = Gate::closed();
    let closed = gate.clone();
    let node = bind().serve_raw(move |batch| {
        let written = |_: usize, _: &Operation| OperationResult::Written { revision: 1 };
        Reply::After(closed.clone(), Box::new(results(batch, written)))
    });
    let client = client_of(&node).with_timeout(Duration::from_secs(60));
    let hasty = client.clone().with_timeout(Duration::from_millis(300));
    let mut tasks = JoinSet::new();
    // Both in one request: it is sent after those that are about to be issued have been.
    let long = client.clone();
    tasks.spawn(async move { long.write("long", "v").await });
    let error = hasty.write("short", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::AnswerLost { .. }), "{error}");
    let batch = &node.batches()[0];
    assert_eq!(batch.operations().len(), 2);
    let left_ms: u64 = batch.headers["kv-deadline-ms"].to_str().unwrap().parse().unwrap();
    assert!(left_ms > 2_000, "the longest of all: {left_ms}");
    occupy_rest(&client, &node, &mut tasks).await;
    // This one gets no turn before its time is over, and is never sent.
    let begun = Instant::now();
    let error = hasty.write("waits", "v").await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(error.outcome(), Outcome::NotApplied, "{error}");
    gate.open();
    while let Some(done) = tasks.join_next().await {
        assert_eq!(done.unwrap(), Ok(1));
    }
    assert!(!keys(&node.batches()).contains(&Bytes::from("waits")));
}

/// As [`occupy`], with some turns taken already.
async fn occupy_rest(
    client: &RaftNode,
    node: &FakeNode,
    tasks: &mut JoinSet<Result<u64, ClientError>>,
) {
    // The hasty one's attempts were soon over, and gave their turns back.
    let kept = || {
        let all_hasty =
            |batch: &fake_node::Seen| batch.operations().iter().all(|o| o.key() == "short");
        node.batches().iter().filter(|batch| !all_hasty(batch)).count()
    };
    while kept() < 4 {
        let (client, before) = (client.clone(), kept());
        tasks.spawn(async move { client.write("occupied", "v").await });
        wait_until("one more turn is taken", || kept() > before).await;
    }
}

#[tokio::test]
async fn a_request_that_is_too_large_for_the_node_is_sent_in_parts() {
    const BODY_MAX: usize = 4000;
    let largest = AtomicUsize::new(0);
    let node = bind().serve_raw(move |request| match request.path.as_str() {
        "/v1/batch" if request.body.len() > BODY_MAX => error(413, "TOO_LARGE", "not_applied"),
        "/v1/batch" => {
            largest.fetch_max(request.operations().len(), Ordering::SeqCst);
            results(request, |_, _| OperationResult::Written { revision: 1 })
        }
        _ => written(2),
    });
    let client = client_of(&node);
    let mut tasks = JoinSet::new();
    for _ in 0..100 {
        let client = client.clone();
        tasks.spawn(async move { client.write("k", [0; 500]).await });
    }
    while let Some(done) = tasks.join_next().await {
        assert_eq!(done.unwrap(), Ok(1));
    }
    let fitting = node.batches().into_iter().filter(|batch| batch.body.len() <= BODY_MAX);
    assert_eq!(fitting.map(|batch| batch.operations().len()).sum::<usize>(), 100);
    // With a batch's few bytes around it, this one does not fit; alone it does.
    assert_eq!(client.write("k", [0; BODY_MAX]).await, Ok(2));
    assert_eq!(node.seen(KV).len(), 1);
}

#[tokio::test]
async fn reads_that_an_answer_has_no_room_for_are_asked_again() {
    let node = bind().serve_raw(|request| {
        if request.path.starts_with(KV) {
            return Reply::Value(9, Bytes::from("alone"));
        }
        let left_out = ApiError::TooLarge { what: "answer", max: 3 };
        results(request, |index, operation| match operation.key() {
            key if key == "huge" => OperationResult::failed(&left_out),
            _ if index >= 3 => OperationResult::failed(&left_out),
            key => OperationResult::Found { revision: 1, value: key.clone() },
        })
    });
    let client = client_of(&node);
    let mut tasks = JoinSet::new();
    for number in 0..30 {
        let client = client.clone();
        tasks.spawn(async move {
            let key = format!("key-{number}");
            let found = client.read(&key).await;
            assert_eq!(found, Ok(Some(key.into())));
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert!(node.batches().len() >= 10);
    assert_eq!(client.read("huge").await, Ok(Some(Bytes::from("alone"))));
}

#[tokio::test]
async fn an_operation_larger_than_a_request_travels_alone() {
    let node = start(|_| written(1));
    assert_eq!(client_of(&node).write("k", vec![0; 1 << 20]).await, Ok(1));
    assert_eq!((node.batches().len(), node.seen(KV).len()), (0, 1));
}

#[tokio::test]
async fn what_is_no_result_leaves_writes_in_doubt_and_is_no_absent_key() {
    for reply in [
        Reply::Json(200, serde_json::json!({"revision": 7})),
        Reply::Text(200, "hello"),
        Reply::Results(Vec::new()),
        error(404, "NOT_FOUND", "not_applied"),
        Reply::Results(vec![OperationResult::Absent; 2]),
    ] {
        let told = format!("{reply:?}");
        let node = bind().serve_raw(move |_| reply.clone());
        let client = client_of(&node).with_timeout(Duration::from_secs(5));
        let write = client.write("k", "v").await.unwrap_err();
        assert_eq!(write.outcome(), Outcome::Unknown, "{told}: {write}");
        assert_eq!(node.batches().len(), 1, "{told}");
        let read = client.consistent_read("k").await.unwrap_err();
        assert!(matches!(read, ClientError::Garbled { .. }), "{told}: {read}");
    }
}

#[tokio::test]
async fn a_client_that_is_full_makes_callers_wait_and_then_says_so() {
    let gate = Gate::closed();
    let closed = gate.clone();
    let node = bind().serve_raw(move |batch| {
        let written = |_: usize, _: &Operation| OperationResult::Written { revision: 1 };
        Reply::After(closed.clone(), Box::new(results(batch, written)))
    });
    let client = client_of(&node).with_timeout(Duration::from_secs(60));
    let mut tasks = JoinSet::new();
    // 68 MiB want to wait, 64 may.
    for _ in 0..68 {
        let client = client.clone();
        tasks.spawn(async move { client.write("k", vec![0; (1 << 20) - 100]).await });
    }
    wait_until("all turns are taken", || node.batches().len() == 4).await;
    let hasty = client.clone().with_timeout(Duration::from_millis(100));
    for error in [hasty.write("k", "v").await.unwrap_err(), hasty.read("k").await.unwrap_err()] {
        assert!(matches!(error, ClientError::TooManyWaiting { .. }), "{error}");
        assert_eq!((error.outcome(), error.is_retryable()), (Outcome::NotApplied, true));
    }
    gate.open();
    while let Some(done) = tasks.join_next().await {
        assert_eq!(done.unwrap(), Ok(1));
    }
    assert_eq!(hasty.write("k", "v").await, Ok(1));
}
