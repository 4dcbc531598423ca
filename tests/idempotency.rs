//! A write with an `Idempotency-Key` happens at most once, and a repeat gets the first answer: on every
//! way into the store, and through lost answers, dead leaders and restarts.

mod common;

use std::time::Duration;

use common::alone::Node;
use common::cluster::{Cluster, FAST, expect_ok};
use common::proxy::Proxy;
use common::{Answer, get, post, put, request};
use distrib_kv_store::batch::{self, MEDIA_TYPE, Operation, OperationResult};
use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::once::ClientFloor;
use distrib_kv_store::raft_node::RaftNode;
use distrib_kv_store::types::Condition;
use serde_json::json;

fn put_once(http: &str, key: &str, value: &str, once: &str) -> Answer {
    let path = format!("/v1/kv/{key}");
    request(http, "PUT", &path, &[("Idempotency-Key", once)], value.as_bytes())
}

fn delete_once(http: &str, key: &str, once: &str) -> Answer {
    request(http, "DELETE", &format!("/v1/kv/{key}"), &[("Idempotency-Key", once)], b"")
}

/// A repeat gets the answer to the first, whatever happened to the key since, and changes nothing.
#[test]
fn a_repeat_gets_the_first_answer() {
    let node = Node::ready("");
    let http = node.http();
    let first = put_once(http, "k", "one", "me/1");
    expect_ok(&first);
    put(http, "/v1/kv/k", b"of another");
    assert_eq!(put_once(http, "k", "two", "me/1").json(), first.json());
    assert_eq!(get(http, "/v1/kv/k").body, b"of another");
    assert_ne!(put_once(http, "k", "three", "you/1").json(), first.json(), "another client");

    let deleted = delete_once(http, "k", "me/2").json();
    assert_eq!(deleted["deleted"], true);
    expect_ok(&put(http, "/v1/kv/k", b"again"));
    assert_eq!(delete_once(http, "k", "me/2").json(), deleted);
    assert_eq!(get(http, "/v1/kv/k").status, 200);
    let nothing = delete_once(http, "absent", "me/3").json();
    expect_ok(&put(http, "/v1/kv/absent", b"there now"));
    assert_eq!(delete_once(http, "absent", "me/3").json(), nothing);
}

/// A condition that failed is an answer, too.
#[test]
fn a_failed_condition_is_remembered() {
    let node = Node::ready("");
    let http = node.http();
    let create = |once: &str, value: &str| {
        let headers = [("Idempotency-Key", once), ("If-None-Match", "*")];
        request(http, "PUT", "/v1/kv/k", &headers, value.as_bytes())
    };
    expect_ok(&create("me/1", "v"));
    expect_ok(&create("me/1", "v"));
    let failed = create("me/2", "v");
    failed.assert_error(412, "CONDITION_FAILED", "not_applied");
    common::delete(http, "/v1/kv/k");
    let again = create("me/2", "v");
    again.assert_error(412, "CONDITION_FAILED", "not_applied");
    assert_eq!(again.header("etag"), failed.header("etag"));
    get(http, "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
}

/// A sequence is one write for ever; what is below the floor is not carried out.
#[test]
fn another_write_and_an_old_one_are_refused() {
    let node = Node::ready("");
    let http = node.http();
    expect_ok(&put_once(http, "k", "v", "me/5"));
    put_once(http, "other", "v", "me/5").assert_error(409, "CONFLICT", "not_applied");
    delete_once(http, "k", "me/5").assert_error(409, "CONFLICT", "not_applied");
    let floor = [("Idempotency-Key", "me/9"), ("Kv-Client-Floor", "8")];
    expect_ok(&request(http, "PUT", "/v1/kv/k", &floor, b"v"));
    for old in ["me/5", "me/7"] {
        let refused = put_once(http, "new", "v", old);
        refused.assert_error(409, "IDEMPOTENCY_EXPIRED", "unknown");
        assert_eq!(refused.header("retry-after"), None);
    }
    expect_ok(&put_once(http, "k", "v", "me/8"));
    get(http, "/v1/kv/other").assert_error(404, "NOT_FOUND", "not_applied");
    get(http, "/v1/kv/new").assert_error(404, "NOT_FOUND", "not_applied");
}

/// Anything but the one form is 400 and changes nothing, also where it would not be understood.
#[test]
fn malformed_keys_are_refused() {
    let node = Node::ready("");
    let http = node.http();
    let long = format!("{}/1", "x".repeat(65));
    for key in ["", "me", "me/", "/1", "me/x", "me/1/2", "me/01", "m e/1", &long] {
        let refused = put_once(http, "k", "v", key);
        refused.assert_error(400, "BAD_REQUEST", "not_applied");
        delete_once(http, "k", key).assert_error(400, "BAD_REQUEST", "not_applied");
    }
    for (key, floor) in [(None, "1"), (Some("me/1"), "2"), (Some("me/1"), "x"), (Some("me/1"), "")]
    {
        let key = key.map(|key| ("Idempotency-Key", key));
        let headers: Vec<_> = key.into_iter().chain([("Kv-Client-Floor", floor)]).collect();
        let refused = request(http, "PUT", "/v1/kv/k", &headers, b"v");
        refused.assert_error(400, "BAD_REQUEST", "not_applied");
    }
    let headers = [("Idempotency-Key", "me/1")];
    let original = br#"{"Set":{"key":"k","value":"v"}}"#;
    for (path, body) in
        [("/api/write", &original[..]), ("/v1/batch", br#"{"operations":[]}"#.as_slice())]
    {
        let refused = request(http, "POST", path, &headers, body);
        refused.assert_error(400, "BAD_REQUEST", "not_applied");
    }
    get(http, "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
}

/// In a batch each operation has its sequence, and one that is refused fails alone. Batches and single
/// requests of a client share their sequences.
#[test]
fn a_batch_repeats_what_it_did() {
    let node = Node::ready("");
    let http = node.http();
    let body = |value: &str| {
        let put = |key: &str, seq: u64| json!({"op":"put","key":key,"value":value,"seq":seq});
        let plain = json!({"op":"put","key":"plain","value":value});
        let operations = json!([put("a", 7), put("b", 8), put("c", 3), plain]);
        json!({"client":"me","floor":5,"operations":operations}).to_string()
    };
    let first = post(http, "/v1/batch", &body("one")).json();
    let again = post(http, "/v1/batch", &body("two")).json();
    assert_eq!(first["results"][0], again["results"][0]);
    assert_eq!(first["results"][1], again["results"][1]);
    assert_eq!(first["results"][2]["error"]["code"], "BAD_REQUEST", "below its own floor");
    assert_ne!(first["results"][3], again["results"][3]);
    assert_eq!(get(http, "/v1/kv/a").body, b"one");
    assert_eq!(put_once(http, "a", "three", "me/7").json()["revision"], 1);

    let floor = |floor| Some(ClientFloor { client: "me".parse().unwrap(), floor });
    let delete =
        |seq| Operation::Delete { key: "a".into(), condition: Condition::Always, seq: Some(seq) };
    let binary = |client: Option<ClientFloor>, operations: &[Operation]| {
        let body = batch::encode_request(client.as_ref(), operations);
        let answer = request(http, "POST", "/v1/batch", &[("Content-Type", MEDIA_TYPE)], &body);
        batch::decode_results(answer.body.into(), operations.len()).unwrap()
    };
    let first = binary(floor(9), &[delete(9)]);
    assert!(matches!(first[0], OperationResult::Deleted { deleted: true, .. }));
    assert_eq!(binary(floor(9), &[delete(9)]), first);
    assert_eq!(binary(floor(0), &[delete(9), delete(7)])[1].status(), 409);
}

/// It is the same write whichever node is asked, and after all of them were killed.
#[test]
fn any_node_and_a_restart_remember() {
    let mut cluster = Cluster::formed(3, FAST);
    let first = put_once(cluster.http(1), "k", "v", "me/1").json();
    for id in cluster.ids() {
        assert_eq!(put_once(cluster.http(id), "k", "v", "me/1").json(), first);
    }
    for id in cluster.ids() {
        cluster.kill9(id);
    }
    for id in cluster.ids() {
        cluster.restart(id);
    }
    cluster.await_ready();
    let again = put_once(cluster.http(2), "k", "w", "me/1");
    expect_ok(&again);
    assert_eq!(again.json(), first);
}

/// Every write of this client is sent twice, because its first answer is lost: a second execution
/// would fail its condition, or leave a revision too many.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_answers_are_lost_writes_once() {
    let node = Node::ready("");
    let proxy = Proxy::start(node.http());
    let client = RaftNode::new(vec![proxy.address().to_owned()]);
    let mut revision = client.write_if("k", "0", Condition::Absent).await.unwrap();
    proxy.lose_every(2);
    for count in 1..=60 {
        let condition = Condition::Revision(revision);
        let written = client.write_if("k", count.to_string(), condition).await.unwrap();
        assert_eq!(written, revision + 1, "write {count}");
        revision = written;
    }
    for _ in 0..20 {
        revision += 1;
        assert_eq!(client.write("k", "v").await.unwrap(), revision);
    }
    assert!(client.delete_if("k", Condition::Revision(revision)).await.unwrap().deleted);
    assert!(proxy.lost() >= 81, "{}", proxy.lost());
    // A large value is a request of its own.
    let large = vec![7; 1 << 20];
    assert_eq!(client.write("k", &large).await.unwrap(), revision + 2);
    assert!(proxy.lost() >= 82);
}

/// How many tasks write at once, each to a key of its own.
const TASKS: usize = 12;

/// Leaders are killed with -9 under load. Half of the tasks write under the condition that nobody wrote
/// since, so that a second execution of one's own write would be reported as a conflict; the other half
/// write whatever there is. In the end there were exactly as many changes as answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_leaders_execute_nothing_twice() {
    let mut cluster = tokio::task::spawn_blocking(|| Cluster::formed(3, FAST)).await.unwrap();
    let client = KVClient::from_endpoints(cluster.addresses()).await.unwrap();
    let client = client.with_timeout(Duration::from_secs(60));
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped =
        move |stop: &std::sync::atomic::AtomicBool| stop.load(std::sync::atomic::Ordering::SeqCst);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let (client, stop) = (client.clone(), stop.clone());
        tasks.spawn(async move {
            let key = format!("task-{task}");
            let mut condition = Condition::Absent;
            let mut count = 0u64;
            while !stopped(&stop) {
                let value = count.to_string();
                let revision = client.write_if(&key, value, condition).await?;
                count += 1;
                let chained = task % 2 == 0;
                condition = if chained { Condition::Revision(revision) } else { Condition::Always };
            }
            Ok::<u64, ClientError>(count)
        });
    }
    let cluster = tokio::task::spawn_blocking(move || {
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(700));
            let leader = cluster.leader();
            cluster.kill9(leader);
            cluster.leader();
            std::thread::sleep(Duration::from_millis(300));
            cluster.restart(leader);
            cluster.await_ready();
        }
        cluster
    });
    let cluster = cluster.await.unwrap();
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let mut answered = 0;
    while let Some(count) = tasks.join_next().await {
        answered += count.unwrap().unwrap();
    }
    assert!(answered > 100, "{answered}");
    tokio::task::spawn_blocking(move || {
        cluster.await_caught_up();
        cluster.await_all("has as many changes as were answered", |m| m["revision"] == answered);
    })
    .await
    .unwrap();
}
