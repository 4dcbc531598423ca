//! A write whose answer is lost, and whose key has moved before the client hears anything.

use std::time::Duration;

use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::handoff::{Step, pairs};
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::reshard::{Request, Scene, next_ring};
use distrib_kv_store::ring::RingTable;
use distrib_kv_store::types::{Condition, Consistency, Revision};

use crate::common::clusters::{Clusters, id};
use crate::common::{eventually, get, request};
use crate::{ONE_AT_A_TIME, SMALL_PAGES};

/// Keys of each kind of write.
const KEYS: usize = 4;

/// As long as answers are lost the client tries again and again.
const CALLER_TIMEOUT: Duration = Duration::from_secs(60);

/// Asks for a write of this kind, to a key at this revision.
async fn write_of(
    kind: usize,
    client: &KVClient,
    key: &str,
    revision: Revision,
) -> Result<(), ClientError> {
    match kind {
        0 => client.write_if(key, "after", Condition::Revision(revision)).await.map(drop),
        1 => client.write_if(key, "after", Condition::Absent).await.map(drop),
        2 => client.delete(key).await.map(|done| assert!(done.deleted, "{key}")),
        _ => {
            let failed = client.write_if(key, "no", Condition::Absent).await;
            assert!(matches!(failed, Err(ClientError::ConditionFailed { .. })), "{failed:?}");
            Ok(())
        }
    }
}

/// A conditional write, a creation, a deletion and one whose condition fails are done at the source, and
/// every answer is lost. Then the keys move, somebody deletes what the last kind would have overwritten,
/// and the clients' repeats reach the destination: each gets the first answer there, which it could not if
/// it were done again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_key_moves_before_its_answer_comes_is_done_once() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let clusters = Clusters::gated(2, 2, SMALL_PAGES);
    let old = clusters.ring();
    let next = next_ring(&old, &Request::Weight(id(1), 3.0)).unwrap();
    let tables = [&old, &next].map(|ring| RingTable::new(ring.clone()).unwrap());
    let owner = |n: usize, key: &String| tables[n].owner(key.as_bytes()).unwrap().id.clone();
    let moves = |key: &String| owner(0, key) == id(0) && owner(1, key) == id(1);
    let keys: Vec<String> = (0..).map(|n| format!("k{n}")).filter(moves).take(4 * KEYS).collect();
    let client = KVClient::from_endpoints(clusters.endpoints()).await.unwrap();
    let client = client.with_timeout(CALLER_TIMEOUT);

    let mut revisions = Vec::new();
    for (n, key) in keys.iter().enumerate() {
        // Those of the second kind are to be created.
        let written = client.write(key, "before").await.unwrap();
        if n % 4 == 1 {
            client.delete(key).await.unwrap();
        }
        revisions.push(written);
    }
    clusters.gate(0).lose_every(1);
    let write = |(n, key): (usize, &String)| {
        let (client, revision, key) = (client.clone(), revisions[n], key.clone());
        tokio::spawn(async move { write_of(n % 4, &client, &key, revision).await })
    };
    let (failing, others): (Vec<_>, Vec<_>) =
        keys.iter().enumerate().partition(|(n, _)| n % 4 == 3);
    let mut writes: Vec<_> = failing.iter().copied().map(write).collect();
    let clusters = tokio::task::block_in_place(|| {
        // Nothing shows that a condition has failed. But the client asks again and again, for all of them.
        eventually("the failing writes are refused, unheard", || {
            (clusters.gate(0).lost() >= 3 * KEYS as u64).then_some(())
        });
        writes.extend(others.iter().copied().map(write));
        for (n, key) in &others {
            eventually("each write is done, unheard", || {
                let answer = get(clusters.at(0).http(1), &format!("/v1/kv/{key}"));
                let done = if n % 4 == 2 { answer.status == 404 } else { answer.body == b"after" };
                done.then_some(())
            });
        }
        let (ring, to) = (Box::new(old.clone()), Box::new(next.clone()));
        let begin = Step::Begin { ring, next: to, plan: pairs(&old, &next) };
        clusters.step(&id(0), &begin).expect("it answers").expect("it begins");
        clusters.drive_until(|views| {
            matches!(Scene::of(views), Scene::Quiet { settled: Some(true), .. })
        });
        for (_, key) in &failing {
            let deleted =
                request(clusters.at(1).http(1), "DELETE", &format!("/v1/kv/{key}"), &[], b"");
            assert_eq!(deleted.status, 200, "{}", deleted.text());
        }
        clusters
    });
    assert!(writes.iter().all(|write| !write.is_finished()), "nobody has heard anything");
    clusters.gate(0).lose_every(0);
    for (write, (n, key)) in writes.into_iter().zip(failing.into_iter().chain(others)) {
        let done = write.await.unwrap();
        assert!(done.is_ok(), "{key} of kind {}: {done:?}", n % 4);
    }
    for (n, key) in keys.iter().enumerate() {
        let found = client.get(key, Consistency::Linearizable).await.unwrap();
        let expected = [Some("after"), Some("after"), None, None][n % 4];
        assert_eq!(found.as_ref().map(|record| &record.value[..]), expected.map(str::as_bytes));
    }
}
