//! A cluster that is down, silent or strange keeps `KVClient` from nothing that others can serve.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::ring::{Ring, RingTable};
use tokio::task::JoinSet;

mod fake_node;
use fake_node::{
    Bound, FakeNode, Reply, bind, cluster, refusing, ring, ring_reply, start, written,
    wrong_cluster,
};

const KV: &str = "/v1/kv/";
const RING: &str = "/v1/ring";
const RING_AND_NODES: &str = "/v1/";

/// From `a` and `b` to `a`, `b` and `c`.
fn growing(a: &str, b: &str, c: &str) -> Ring {
    let old = ring(1, vec![cluster("a", &[a]), cluster("b", &[b])]);
    let clusters = [("a", a), ("b", b), ("c", c)].map(|(id, node)| cluster(id, &[node]));
    Ring { next: Some(Box::new(ring(2, clusters.to_vec()))), ..old }
}

/// A key that goes from `from` to `c`.
fn key_to_c(ring: &Ring, from: &str) -> String {
    let next = RingTable::new((**ring.next.as_ref().unwrap()).clone()).unwrap();
    let now = RingTable::new(Ring { next: None, ..ring.clone() }).unwrap();
    let owner = |table: &RingTable, key: &str| table.owner(key.as_bytes()).unwrap().id.to_string();
    let goes = |key: &String| owner(&now, key) == from && owner(&next, key) == "c";
    (0..1000).map(|n| format!("key{n}")).find(goes).unwrap()
}

/// A client that asked `node` for its ring.
async fn client_of(node: &FakeNode) -> KVClient {
    let client = KVClient::from_endpoints(vec![vec![node.address.clone()]]).await.unwrap();
    client.with_timeout(Duration::from_secs(8))
}

/// A node that tells `ring` and stores everything at revision 7.
fn serving(node: Bound, ring: &Ring) -> FakeNode {
    let ring = ring.clone();
    node.serve(move |seen| match (seen.path.as_str(), seen.method.as_str()) {
        (RING, _) => ring_reply(&ring),
        (_, "GET") => Reply::Value(7, Bytes::from_static(b"v")),
        _ => written(7),
    })
}

/// Only the old owner says that a key has moved. One that is down cannot, and until the change ended, however
/// long that took, clients that had not heard it before got nothing but errors for the key.
#[tokio::test]
async fn a_key_that_has_moved_is_served_while_its_old_owner_is_down() {
    let (b, c) = (bind(), bind());
    let ring = growing(&refusing(), &b.address, &c.address);
    let key = key_to_c(&ring, "a");
    let (b, c) = (serving(b, &ring), serving(c, &ring));
    assert_eq!(
        client_of(&b).await.consistent_read(&key).await.unwrap().as_deref(),
        Some(&b"v"[..])
    );
    assert_eq!(client_of(&b).await.write(&key, "v").await, Ok(7));
    assert_eq!((b.seen(KV).len(), c.seen(KV).len()), (0, 2));
}

#[tokio::test]
async fn a_key_that_has_moved_is_served_while_its_old_owner_is_silent() {
    let (a, b, c) = (start(|_| Reply::Hang), bind(), bind());
    let ring = growing(&a.address, &b.address, &c.address);
    let key = key_to_c(&ring, "a");
    let (b, c) = (serving(b, &ring), serving(c, &ring));
    assert_eq!(client_of(&b).await.write(&key, "v").await, Ok(7));
    let [first, last] = [a.seen(RING_AND_NODES), c.seen(KV)].map(|seen| seen[0].once());
    assert_eq!(first, last, "it is the same write at both");
}

/// One that has not moved is not served by whoever is to get it, and that is said truly and in time.
#[tokio::test]
async fn a_key_that_has_not_moved_is_waited_for() {
    let (b, c) = (bind(), bind());
    let ring = growing(&refusing(), &b.address, &c.address);
    let key = key_to_c(&ring, "a");
    let (b, owner) = (serving(b, &ring), ring.clusters[0].clone());
    let c = c.serve(move |_| wrong_cluster(&owner, 1));
    let client = client_of(&b).await.with_timeout(Duration::from_secs(3));
    let begun = Instant::now();
    let error = client.write(&key, "v").await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert!((1..30).contains(&c.seen(KV).len()), "{}", c.seen(KV).len());
}

/// What waits for a silent cluster stays as long as its deadline. It took all of the client's room.
#[tokio::test]
async fn a_silent_cluster_leaves_the_others_their_room() {
    let (a, b) = (bind(), bind());
    let ring = ring(1, vec![cluster("a", &[&a.address]), cluster("b", &[&b.address])]);
    let table = RingTable::new(ring.clone()).unwrap();
    let owned_by = |id: &str| {
        let mut keys = (0..).map(|n| format!("key{n}"));
        keys.find(|key| table.owner(key.as_bytes()).unwrap().id.as_str() == id).unwrap()
    };
    let (of_a, of_b) = (owned_by("a"), owned_by("b"));
    let (a, b) = (a.serve(|_| Reply::Hang), serving(b, &ring));
    let client = client_of(&b).await;
    let mut lost = JoinSet::new();
    for _ in 0..128 {
        let (client, key) = (client.clone(), of_a.clone());
        lost.spawn(async move { client.write(key, vec![0; 1 << 20]).await });
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while a.seen(KV).is_empty() {
        assert!(Instant::now() < deadline, "nothing reaches the silent cluster");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let reader = client.with_timeout(Duration::from_secs(3));
    assert!(reader.consistent_read(&of_b).await.is_ok(), "{:?}", reader.read(&of_b).await);
    assert!(lost.try_join_next().is_none(), "they all wait still");
}

/// Whoever is told the owner goes there, also while somebody looks for the ring where nobody answers.
#[tokio::test]
async fn a_call_that_was_told_the_owner_does_not_wait_for_anothers_search() {
    let (a, b, c) = (bind(), bind(), bind());
    let before = ring(1, vec![cluster("a", &[&a.address]), cluster("b", &[&b.address])]);
    let owner = cluster("c", &[&c.address]);
    let silent = Arc::new(AtomicBool::new(false));
    let script = |ring: Ring| {
        let (silent, owner) = (silent.clone(), owner.clone());
        move |seen: &fake_node::Seen| match (seen.path.as_str(), silent.load(Ordering::SeqCst)) {
            (RING, false) => ring_reply(&ring),
            (RING, true) => Reply::Hang,
            _ => wrong_cluster(&owner, 2),
        }
    };
    let (a, _b) = (a.serve(script(before.clone())), b.serve(script(before.clone())));
    let _c = serving(c, &before);
    let client = client_of(&a).await;
    silent.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    assert_eq!(client.write("k", "v").await, Ok(7));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

/// A key that fits no path cannot be sent at all. It was taken for a connection that every node refused: they
/// were suspected one after the other, and so were they by everybody else who shared the client.
#[tokio::test]
async fn what_cannot_be_sent_is_refused_at_once() {
    let node = bind();
    let ring = ring(1, vec![cluster("a", &[&node.address])]);
    let node = serving(node, &ring);
    let client = client_of(&node).await;
    assert_eq!(client.write("k", "v").await, Ok(7));
    let begun = Instant::now();
    let error = client.consistent_read(vec![b'k'; 70_000]).await.unwrap_err();
    assert!(matches!(error, ClientError::Unsendable(_)) && !error.is_retryable(), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}
