//! `POST /v1/batch`: many operations in one request, each answered as it would be alone, whichever
//! node is asked and whichever clusters own the keys.

mod common;

use common::cluster::{Cluster, FAST, STEADY};
use common::clusters::Clusters;
use common::{Answer, Connection, NodeOptions, NodeProcess, init_alone, post, put, request};
use distrib_kv_store::batch::{
    MEDIA_TYPE, Operation, OperationResult, decode_results, encode_request,
};
use distrib_kv_store::cluster_manager::ClusterManager;
use distrib_kv_store::config::Config;
use distrib_kv_store::network::body::BODIES_BYTES_MAX;
use distrib_kv_store::network::error::Outcome;
use distrib_kv_store::ring::RingTable;
use distrib_kv_store::types::Condition;
use serde_json::{Value, json};

const PATH: &str = "/v1/batch";
const BINARY: (&str, &str) = ("Content-Type", MEDIA_TYPE);

fn put_op(key: &str, value: &str) -> Operation {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    Operation::Put { key, value, condition: Condition::Always, seq: None }
}

fn get_op(key: &str) -> Operation {
    Operation::Get { key: key.to_owned().into() }
}

/// The results of a batch in the binary form.
fn binary(
    address: &str,
    path: &str,
    headers: &[(&str, &str)],
    operations: &[Operation],
) -> Vec<OperationResult> {
    let answer = raw(address, path, headers, operations);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some(MEDIA_TYPE));
    decode_results(answer.body.into(), operations.len()).unwrap()
}

fn raw(address: &str, path: &str, headers: &[(&str, &str)], operations: &[Operation]) -> Answer {
    let headers = [headers, &[BINARY]].concat();
    request(address, "POST", path, &headers, &encode_request(None, operations))
}

fn results(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["results"].as_array().unwrap().clone()
}

/// Every kind of operation and of refusal, in the form for people.
#[test]
fn each_operation_is_answered_as_it_would_be_alone() {
    let dir = tempfile::tempdir().unwrap();
    let node = NodeProcess::start(&NodeOptions::new(1, dir.path().join("data")));
    let http = node.http();
    let before = post(http, PATH, r#"{"operations":[{"op":"get","key":"k"}]}"#);
    before.assert_error(503, "NOT_INITIALIZED", "not_applied");
    init_alone(http);

    let operations = json!({"operations": [
        {"op": "put", "key": "k", "value": "1"},
        {"op": "put", "key": "k", "value": "2", "if_match": 1},
        {"op": "put", "key": "k", "value": "3", "if_absent": true},
        {"op": "delete", "key": "absent"},
        {"op": "put", "key": "", "value": "v"},
        {"op": "put", "key": "long", "value": "v".repeat((1 << 20) + 1)},
        {"op": "put", "key_base64": "/w==", "value_base64": "AP8="},
        {"op": "get", "key": "never"},
    ]});
    let found = results(&post(http, PATH, &operations.to_string()));
    assert_eq!(found[0], json!({"status": 200, "revision": 1}));
    assert_eq!(found[1], json!({"status": 200, "revision": 2}), "in the order of the batch");
    assert_eq!((&found[2]["status"], &found[2]["revision"]), (&json!(412), &json!(2)));
    assert_eq!(found[2]["error"]["code"], "CONDITION_FAILED");
    assert_eq!(found[3], json!({"status": 200, "revision": 2, "deleted": false}));
    assert_eq!(
        (&found[4]["status"], &found[4]["error"]["code"]),
        (&json!(400), &json!("BAD_REQUEST"))
    );
    assert_eq!(
        (&found[5]["status"], &found[5]["error"]["code"]),
        (&json!(413), &json!("TOO_LARGE"))
    );
    assert_eq!(found[6], json!({"status": 200, "revision": 3}));
    assert_eq!(found[7]["status"], 404);

    let reads = json!({"operations": [
        {"op": "get", "key": "k"}, {"op": "get", "key_base64": "/w=="}, {"op": "get", "key": "absent"},
    ]});
    for path in [PATH, "/v1/batch?consistency=stale", "/v1/batch?consistency=linearizable"] {
        let found = results(&post(http, path, &reads.to_string()));
        assert_eq!(found[0], json!({"status": 200, "revision": 2, "value": "2"}));
        assert_eq!(found[1], json!({"status": 200, "revision": 3, "value_base64": "AP8="}));
        assert_eq!(found[2]["status"], 404);
    }
    assert_eq!(results(&post(http, PATH, r#"{"operations":[]}"#)), Vec::<Value>::new());
}

/// What is no batch is refused as a whole, and nothing of it takes effect.
#[test]
fn a_malformed_batch_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = NodeProcess::start(&NodeOptions::new(1, dir.path().join("data")));
    let http = node.http();
    init_alone(http);
    let good = encode_request(None, &[put_op("k", "v"), put_op("l", "v")]);
    for end in 0..good.len() {
        let answer = request(http, "POST", PATH, &[BINARY], &good[..end]);
        answer.assert_error(400, "BAD_REQUEST", "not_applied");
    }
    let longer = [&good[..], &[0]].concat();
    let answer = request(http, "POST", PATH, &[BINARY], &longer);
    answer.assert_error(400, "BAD_REQUEST", "not_applied");
    for body in [
        "",
        "[]",
        "{}",
        r#"{"operations":[{"op":"put","key":"k","value":"v"},{"op":"erase","key":"k"}]}"#,
        r#"{"operations":[{"op":"put","key":"k","value":"v","ttl":3}]}"#,
        r#"{"operations":[{"op":"put","key":"k","value":7}]}"#,
    ] {
        post(http, PATH, body).assert_error(400, "BAD_REQUEST", "not_applied");
    }
    let keyed = [("Idempotency-Key", "c/1"), BINARY];
    let answer = request(http, "POST", PATH, &keyed, &good);
    answer.assert_error(400, "BAD_REQUEST", "not_applied");
    let answer = post(http, "/v1/batch?x=1", r#"{"operations":[]}"#);
    answer.assert_error(400, "BAD_REQUEST", "not_applied");
    assert_eq!(request(http, "GET", PATH, &[], b"").status, 405);
    let too_long = vec![b' '; (8 << 20) + 1];
    request(http, "POST", PATH, &[], &too_long).assert_error(413, "TOO_LARGE", "not_applied");
    common::get(http, "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
}

/// A batch may be larger than one log entry, and an answer has a bound: what does not fit says so.
#[test]
fn large_batches_are_cut_and_large_answers_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let node = NodeProcess::start(&NodeOptions::new(1, dir.path().join("data")));
    let http = node.http();
    init_alone(http);
    let many: Vec<_> = (0..5000).map(|i| put_op(&format!("key-{i}"), "v")).collect();
    let written = binary(http, PATH, &[], &many);
    for (revision, result) in (1..).zip(&written) {
        assert_eq!(*result, OperationResult::Written { revision }, "in order");
    }
    let large = "v".repeat(1 << 20);
    for name in ["a", "b"] {
        let values: Vec<_> = (0..6).map(|i| put_op(&format!("{name}-{i}"), &large)).collect();
        let written = binary(http, PATH, &[], &values);
        assert!(written.iter().all(|result| result.status() == 200));
    }
    let keys: Vec<_> =
        ["a", "b"].iter().flat_map(|n| (0..6).map(move |i| format!("{n}-{i}"))).collect();
    let reads: Vec<_> = keys.iter().map(|key| get_op(key)).collect();
    let found = binary(http, PATH, &[], &reads);
    let statuses: Vec<_> = found.iter().map(OperationResult::status).collect();
    assert_eq!(statuses, [[200; 8].as_slice(), &[413; 4]].concat());
}

/// Any node takes a batch; with `Kv-Routing: direct` only the leader does, and the others say who.
#[test]
fn every_node_of_a_cluster_takes_batches() {
    let cluster = Cluster::formed(3, STEADY);
    let leader = cluster.leader();
    for id in cluster.ids() {
        let key = format!("by-{id}");
        let written = binary(cluster.http(id), PATH, &[], &[put_op(&key, "v"), put_op(&key, "w")]);
        assert!(written.iter().all(|result| result.status() == 200), "{written:?}");
        let follower = [("Kv-Read", "follower")];
        for headers in [&[][..], &follower] {
            let found = binary(cluster.http(id), PATH, headers, &[get_op(&key), get_op("none")]);
            assert!(
                matches!(&found[0], OperationResult::Found { value, .. } if value == "w"),
                "{found:?}"
            );
            assert_eq!(found[1], OperationResult::Absent);
        }
        // Reads that are served here keep no write here, nor does a write that is refused.
        let stale = format!("{PATH}?consistency=stale");
        let mixed = [put_op(&key, "w"), get_op(&key)];
        for (path, headers) in [(&stale[..], &[][..]), (PATH, &follower)] {
            let results = binary(cluster.http(id), path, headers, &mixed);
            assert!(results.iter().all(|result| result.status() == 200), "{results:?}");
        }
        let numbered = json!({"client": format!("client-{id}"), "floor": 5, "operations": [
            {"op": "put", "key": key, "value": "w", "seq": 4},
            {"op": "put", "key": key, "value": "w", "seq": 5},
        ]});
        let answer = post(cluster.http(id), PATH, &numbered.to_string());
        let statuses: Vec<_> = results(&answer).iter().map(|r| r["status"].clone()).collect();
        assert_eq!(statuses, [400, 200]);
        let direct = [("Kv-Routing", "direct")];
        let answer = raw(cluster.http(id), PATH, &direct, &[put_op(&key, "x"), get_op(&key)]);
        if id == leader {
            assert_eq!(answer.status, 200);
        } else {
            answer.assert_error(307, "NOT_LEADER", "not_applied");
            let location = format!("http://{}{PATH}", cluster.http(leader));
            assert_eq!(answer.header("location"), Some(&location[..]));
        }
    }
}

/// The keys of a batch may belong to different clusters: any node finds the way, and with
/// `Kv-Routing: direct` each key of another cluster says where it belongs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_may_span_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config {
        num_clusters: 2,
        nodes_per_cluster: 1,
        data_dir: dir.path().join("data"),
        nodes_file: dir.path().join("all_nodes.json"),
        ..Config::default()
    };
    config.storage.block_cache_bytes = 8 << 20;
    let manager = ClusterManager::start_on_free_ports(config).await.unwrap();
    let nodes = manager.nodes();
    let table = RingTable::new(manager.ring().clone()).unwrap();
    let keys: Vec<String> = (0..40).map(|i| format!("key-{i}")).collect();
    tokio::task::spawn_blocking(move || {
        let writes: Vec<_> = keys.iter().map(|key| put_op(key, &format!("v-{key}"))).collect();
        let written = binary(&nodes[0][0], PATH, &[], &writes);
        assert!(written.iter().all(|result| result.status() == 200), "{written:?}");
        let reads: Vec<_> = keys.iter().map(|key| get_op(key)).collect();
        for found in nodes.iter().map(|cluster| binary(&cluster[0], PATH, &[], &reads)) {
            for (key, result) in keys.iter().zip(found) {
                let expected = format!("v-{key}");
                assert!(
                    matches!(result, OperationResult::Found { value, .. } if value == expected)
                );
            }
        }
        let found = binary(&nodes[0][0], PATH, &[("Kv-Routing", "direct")], &writes);
        for (key, result) in keys.iter().zip(found) {
            let owner = table.owner(key.as_bytes()).unwrap();
            match result {
                OperationResult::Written { .. } => assert_eq!(owner.id.as_str(), "c1"),
                OperationResult::Failed(failure) => {
                    assert_eq!((failure.status, &failure.error.code[..]), (421, "WRONG_CLUSTER"));
                    assert_eq!(failure.error.outcome, Outcome::NotApplied);
                    assert_eq!(failure.error.owner.as_ref(), Some(owner));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(put(&nodes[0][0], "/v1/kv/after", b"v").status, 200);
    })
    .await
    .unwrap();
    manager.shutdown().await.unwrap();
}

/// A key of the cluster at this place.
fn key_of(clusters: &Clusters, place: usize, name: &str) -> String {
    let table = RingTable::new(clusters.ring()).unwrap();
    let owner = clusters.listed(place, 1.0).id;
    let mut keys = (0..1000).map(|i| format!("{name}-{i}"));
    keys.find(|key| table.owner(key.as_bytes()).unwrap().id == owner).expect("some key is its")
}

/// Reads and writes of a cluster that the asked node does not belong to, when that node does not lead its own,
/// and when all others of that are away.
#[test]
fn a_follower_passes_on_what_another_cluster_owns() {
    let mut clusters = Clusters::start(&[3, 1], 2, FAST);
    let key = key_of(&clusters, 1, "key");
    let mixed = [put_op(&key, "v"), get_op(&key)];
    let follower = clusters.at(0).follower();
    let served = |clusters: &Clusters, operations: &[Operation]| {
        let results = binary(clusters.at(0).http(follower), PATH, &[], operations);
        assert!(results.iter().all(|result| result.status() == 200), "{results:?}");
    };
    served(&clusters, &mixed);
    for id in clusters.at(0).ids().filter(|id| *id != follower) {
        clusters.at_mut(0).pause(id);
    }
    served(&clusters, &mixed);
    served(&clusters, &mixed[1..]);
}

/// So many batches at once ask `node` for seven times the value of a key, and for a write that nobody answers.
/// Meanwhile they take up no more memory than there is for answers.
fn large_values_wait_within_their_bounds(node: &NodeProcess, large: &str, write: &str) {
    const BATCHES: usize = 150;
    const GROWTH_BYTES_MAX: u64 = 96 << 20;
    let operations = [vec![get_op(large); 7], vec![put_op(write, "v")]].concat();
    let body = encode_request(None, &operations);
    let headers = [BINARY, ("Kv-Deadline-Ms", "2500")];
    let path = format!("{PATH}?consistency=stale");
    let before = node.resident_bytes();
    let mut waiting: Vec<Connection> = (0..BATCHES)
        .map(|_| {
            let mut connection = Connection::open(node.http());
            connection.request("POST", &path, &headers, &body);
            connection
        })
        .collect();
    let answers: Vec<Answer> = waiting.iter_mut().map(Connection::receive).collect();
    let grown = node.peak_resident_bytes() - before;
    let share = u64::try_from(BODIES_BYTES_MAX).unwrap();
    assert!(grown < share + GROWTH_BYTES_MAX, "{} KiB more memory", grown >> 10);
    let mut found = 0;
    for answer in answers {
        assert_eq!(answer.status, 200);
        let results = decode_results(answer.body.into(), operations.len()).unwrap();
        let (write, reads) = results.split_last().unwrap();
        assert!(matches!(write.status(), 503 | 504), "{write:?}");
        assert!(reads.iter().all(|read| matches!(read.status(), 200 | 503)), "{:?}", reads[0]);
        found += usize::from(reads[0].status() == 200);
    }
    assert!(found > 0, "some had room");
}

/// Values that a batch has read do not pile up in memory while its writes, or another cluster, are waited for.
#[test]
fn what_waits_for_the_rest_of_its_batch_is_bounded() {
    // Each worker has one batch's values in its hands that are not counted yet.
    let config =
        format!("[storage]\nmemtable_bytes = 4194304\n[runtime]\nworker_threads = 1\n{FAST}");
    let mut clusters = Clusters::start(&[3, 1], 2, &config);
    let large = [0, 1].map(|place| key_of(&clusters, place, "large"));
    let write = key_of(&clusters, 0, "write");
    let value = "v".repeat(1 << 20);
    for (place, large) in large.iter().enumerate() {
        let cluster = clusters.at(place);
        // Then it stands in a file: rows in memory are shared by all who read them.
        for key in std::iter::once(large.clone())
            .chain((0..8).map(|i| key_of(&clusters, place, &format!("f{i}"))))
        {
            cluster.put(1, &key, &value);
        }
    }
    let leader = clusters.at(0).leader();
    let followers: Vec<u64> = clusters.at(0).ids().filter(|id| *id != leader).collect();
    followers.iter().for_each(|id| clusters.at_mut(0).pause(*id));
    large_values_wait_within_their_bounds(clusters.at(0).node(leader), &large[0], &write);
    clusters.at_mut(0).pause(leader);
    large_values_wait_within_their_bounds(clusters.at(1).node(1), &large[1], &write);
}
