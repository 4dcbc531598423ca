//! `KVClient` finds the owner of every key, by its ring or by what servers say, and asks for a newer
//! ring no more than once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::kvclient::{Endpoints, KVClient};
use distrib_kv_store::network::error::Outcome;
use distrib_kv_store::ring::{Ring, RingTable};
use distrib_kv_store::types::Condition;
use tokio::task::JoinSet;

mod fake_node;
use fake_node::{
    Bound, FakeNode, Reply, Seen, bind, cluster, error, metrics, refusing, ring, ring_reply, start,
    written, wrong_cluster,
};

const KV: &str = "/v1/kv/";
const RING: &str = "/v1/ring";

/// A ring of the clusters `a` and `b` with one node each.
fn ring_of(epoch: u64, a: &Bound, b: &Bound) -> Ring {
    ring(epoch, vec![cluster("a", &[&a.address]), cluster("b", &[&b.address])])
}

/// A script of a node that tells `ring` and answers everything else by `other`.
fn with_ring(
    ring: Ring,
    other: impl Fn(&Seen) -> Reply + Send + Sync,
) -> impl Fn(&Seen) -> Reply + Send + Sync {
    move |seen| if seen.path == RING { ring_reply(&ring) } else { other(seen) }
}

async fn client_of(nodes: &[&FakeNode]) -> Result<KVClient, ClientError> {
    let clusters: Vec<_> = nodes.iter().map(|node| vec![node.address.clone()]).collect();
    KVClient::from_endpoints(clusters).await
}

async fn wait_until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// `KVClient` is made to be shared by tasks.
#[test]
fn clients_and_their_futures_can_be_sent() {
    fn sendable(_: impl Send) {}
    fn shareable<T: Clone + Send + Sync + 'static>() {}
    shareable::<KVClient>();
    shareable::<distrib_kv_store::raft_node::RaftNode>();
    let _never_run = |client: &KVClient| {
        sendable(client.write("k", "v"));
        sendable(client.read("k"));
        sendable(client.consistent_read("k"));
        sendable(client.delete("k"));
        sendable(client.write_if("k", "v", Condition::Absent));
        sendable(KVClient::new("all_nodes.json"));
    };
}

#[tokio::test]
async fn every_key_goes_to_its_owner_at_once() {
    let (a, b) = (bind(), bind());
    let ring = ring_of(1, &a, &b);
    let table = RingTable::new(ring.clone()).unwrap();
    let a = a.serve(with_ring(ring.clone(), |_| written(1)));
    let b = b.serve(with_ring(ring, |_| written(2)));
    let client = client_of(&[&a, &b]).await.unwrap();
    for key in (0..100).map(|key| format!("key{key}")) {
        let owner = table.owner(key.as_bytes()).unwrap();
        let revision = client.write(&key, "v").await.unwrap();
        assert_eq!(revision, if owner.id.as_str() == "a" { 1 } else { 2 });
        assert_eq!(client.owner(&key).unwrap(), *owner);
        assert_eq!(client.route(&key).await.unwrap().0, owner.id);
    }
    assert!(!a.seen(KV).is_empty() && !b.seen(KV).is_empty());
    assert_eq!(a.seen(RING).len() + b.seen(RING).len(), 1);
}

#[tokio::test]
async fn many_calls_that_meet_a_newer_ring_get_it_once() {
    let (a, b) = (bind(), bind());
    let before = ring(1, vec![cluster("a", &[&a.address])]);
    let owner = cluster("b", &[&b.address]);
    let after = ring(2, vec![owner.clone()]);
    let changed = Arc::new(AtomicBool::new(false));
    let a = a.serve({
        let (changed, after) = (changed.clone(), after.clone());
        move |seen| match (seen.path.as_str(), changed.load(Ordering::SeqCst)) {
            (RING, false) => ring_reply(&before),
            (RING, true) => ring_reply(&after),
            (_, false) => written(1),
            (_, true) => wrong_cluster(&owner, 2),
        }
    });
    let b = b.serve(with_ring(after, |_| written(2)));
    let client = client_of(&[&a]).await.unwrap();
    assert_eq!(client.write("k", "v").await.unwrap(), 1);
    changed.store(true, Ordering::SeqCst);
    let mut calls = JoinSet::new();
    for call in 0..100 {
        let client = client.clone();
        calls.spawn(async move { client.write(format!("key{call}"), "v").await });
    }
    while let Some(done) = calls.join_next().await {
        assert_eq!(done.unwrap().unwrap(), 2);
    }
    assert_eq!(a.seen(RING).len() + b.seen(RING).len(), 2, "the first ring, and one refresh");
    assert_eq!(client.ring().epoch, 2);
    let asked_before = a.seen(KV).len();
    client.write("k", "v").await.unwrap();
    assert_eq!(a.seen(KV).len(), asked_before, "the new ring is used");
}

#[tokio::test]
async fn a_cancelled_call_does_not_strand_the_refresh() {
    let (a, b) = (bind(), bind());
    let owner = cluster("b", &[&b.address]);
    let (before, after) =
        (ring(1, vec![cluster("a", &[&a.address])]), ring(2, vec![owner.clone()]));
    // The second question about the ring, which is the cancelled call's, gets no answer.
    let asked = AtomicUsize::new(0);
    let a = a.serve({
        let after = after.clone();
        move |seen| match seen.path.as_str() {
            RING => match asked.fetch_add(1, Ordering::SeqCst) {
                0 => ring_reply(&before),
                1 => Reply::Hang,
                _ => ring_reply(&after),
            },
            _ => wrong_cluster(&owner, 2),
        }
    });
    let b = b.serve(with_ring(after, |_| written(2)));
    let client = client_of(&[&a]).await.unwrap();
    let cancelled = tokio::spawn({
        let client = client.clone();
        async move { client.write("k", "v").await }
    });
    wait_until("the refresh began", async || a.seen(RING).len() == 2).await;
    cancelled.abort();
    assert!(cancelled.await.unwrap_err().is_cancelled());
    assert_eq!(client.write("k", "v").await.unwrap(), 2);
    assert_eq!((client.ring().epoch, b.seen(KV).len()), (2, 1));
}

#[tokio::test]
async fn the_ring_is_confirmed_after_its_time_and_only_a_higher_epoch_replaces_it() {
    let (a, b) = (bind(), bind());
    let told = Arc::new(AtomicU64::new(5));
    let rings = [&a, &b].map(|owner| cluster("x", &[&owner.address]));
    let script = {
        let told = told.clone();
        move |seen: &Seen| match (seen.path.as_str(), told.load(Ordering::SeqCst)) {
            (RING, 5) => ring_reply(&Ring { list_ttl_s: 1, ..ring(5, vec![rings[0].clone()]) }),
            (RING, epoch) => {
                ring_reply(&Ring { list_ttl_s: 1, ..ring(epoch, vec![rings[1].clone()]) })
            }
            _ => written(5),
        }
    };
    let a = a.serve(script);
    let b = b.serve(|_| written(6));
    let client = client_of(&[&a]).await.unwrap();
    assert_eq!(client.write("k", "v").await.unwrap(), 5);
    assert_eq!(a.seen(RING).len(), 1, "not asked again within its time");

    // A lower epoch, from a node that lags: asked for, and ignored.
    told.store(4, Ordering::SeqCst);
    wait_until("the ring's time is over", async || {
        assert_eq!(client.write("k", "v").await.unwrap(), 5);
        a.seen(RING).len() > 1
    })
    .await;
    assert_eq!(client.ring().epoch, 5);

    // A higher one replaces it.
    told.store(6, Ordering::SeqCst);
    wait_until("the newer ring is used", async || client.write("k", "v").await.unwrap() == 6).await;
    assert_eq!(client.ring().epoch, 6);
    assert!(!b.seen(KV).is_empty());
}

#[tokio::test]
async fn a_call_does_not_wait_for_the_ring_to_be_confirmed() {
    let (a, b) = (bind(), bind());
    let before = Ring { list_ttl_s: 1, ..ring(5, vec![cluster("x", &[&a.address])]) };
    let after = ring(6, vec![cluster("x", &[&b.address])]);
    // Nobody answers the second question about the ring until it is asked for a third time.
    let asked = AtomicUsize::new(0);
    let a = a.serve(move |seen| match seen.path.as_str() {
        RING => match asked.fetch_add(1, Ordering::SeqCst) {
            0 => ring_reply(&before),
            1 => Reply::Hang,
            _ => ring_reply(&after),
        },
        _ => written(5),
    });
    let b = b.serve(|_| written(6));
    let client = client_of(&[&a]).await.unwrap();
    wait_until("the ring's time is over", async || {
        client.write("k", "v").await.unwrap();
        a.seen(RING).len() > 1
    })
    .await;
    // A call that had waited would have come back with the newer ring.
    assert_eq!((client.ring().epoch, b.seen(KV).len()), (5, 0));
    wait_until("the newer ring is used", async || client.write("k", "v").await.unwrap() == 6).await;
}

/// A cluster that has left the ring and is cut off refuses nothing: one call finds out at its deadline, and those
/// after it need not.
#[tokio::test]
async fn a_silent_owner_makes_the_client_ask_for_the_ring() {
    let (a, b) = (bind(), bind());
    let before = ring(1, vec![cluster("a", &[&a.address])]);
    let after = ring(2, vec![cluster("b", &[&b.address])]);
    let removed = Arc::new(AtomicBool::new(false));
    let (is_silent, is_owner) = (removed.clone(), removed.clone());
    let known = before.clone();
    let a = a.serve(move |seen| match seen.path.as_str() {
        _ if is_silent.load(Ordering::SeqCst) => Reply::Hang,
        RING => ring_reply(&known),
        _ => written(5),
    });
    let b = b.serve(move |seen| match seen.path.as_str() {
        RING if is_owner.load(Ordering::SeqCst) => ring_reply(&after),
        RING => ring_reply(&before),
        _ => written(6),
    });
    let client = client_of(&[&a, &b]).await.unwrap();
    assert_eq!(client.write("k", "v").await.unwrap(), 5);
    removed.store(true, Ordering::SeqCst);
    let client = client.with_timeout(Duration::from_millis(500));
    assert_eq!(client.write("k", "v").await.unwrap_err().outcome(), Outcome::Unknown);
    wait_until("the newer ring is used", async || client.write("k", "v").await == Ok(6)).await;
}

/// A cluster that has left the ring, whose nodes were wiped or whose addresses serve something else by now, is
/// found out by the first call: it ends at the new owner. No call is told what they say.
#[tokio::test]
async fn blank_nodes_and_strangers_make_the_client_ask_for_the_ring() {
    for reply in [error(503, "NOT_INITIALIZED", "not_applied"), Reply::Text(404, "no such page")] {
        let (a, b) = (bind(), bind());
        let before = ring(1, vec![cluster("b", &[&b.address])]);
        let after = ring(2, vec![cluster("a", &[&a.address])]);
        let removed = Arc::new(AtomicBool::new(false));
        let (is_gone, is_owner) = (removed.clone(), removed.clone());
        let known = before.clone();
        let b = b.serve(move |seen| match seen.path.as_str() {
            _ if is_gone.load(Ordering::SeqCst) => reply.clone(),
            RING => ring_reply(&known),
            _ => written(5),
        });
        let a = a.serve(move |seen| match seen.path.as_str() {
            RING if is_owner.load(Ordering::SeqCst) => ring_reply(&after),
            RING => ring_reply(&before),
            _ => written(6),
        });
        let client = client_of(&[&b, &a]).await.unwrap();
        assert_eq!(client.write("k", "v").await, Ok(5));
        removed.store(true, Ordering::SeqCst);
        let mut calls = JoinSet::new();
        for call in 0..20 {
            let client = client.clone();
            calls.spawn(async move { client.write(format!("key{call}"), "v").await });
        }
        while let Some(done) = calls.join_next().await {
            assert_eq!(done.unwrap(), Ok(6));
        }
        assert_eq!(client.ring().epoch, 2);
    }
}

/// Without a newer ring, what the nodes say is the answer, and comes soon; what a stranger did to a write is
/// in doubt.
#[tokio::test]
async fn blank_nodes_and_strangers_are_reported_when_the_ring_is_the_newest() {
    let a = bind();
    let ring = ring(1, vec![cluster("a", &[&a.address])]);
    let blank = error(503, "NOT_INITIALIZED", "not_applied");
    let a = a.serve(with_ring(ring, move |seen| match seen.path.ends_with("blank") {
        true => blank.clone(),
        false => Reply::Text(404, "no such page"),
    }));
    let client = client_of(&[&a]).await.unwrap().with_timeout(Duration::from_secs(60));
    let begun = Instant::now();
    let refused = client.write("blank", "v").await.unwrap_err();
    assert!(
        matches!(&refused, ClientError::Server { code, .. } if code == "NOT_INITIALIZED"),
        "{refused}"
    );
    assert_eq!(refused.outcome(), Outcome::NotApplied);
    let garbled = client.write("other", "v").await.unwrap_err();
    assert!(matches!(garbled, ClientError::Garbled { .. }), "{garbled}");
    assert_eq!(garbled.outcome(), Outcome::Unknown);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

/// Nodes that were all restarted just now have applied nothing yet, and so know no ring.
#[tokio::test]
async fn a_ring_that_is_not_applied_again_yet_is_waited_for() {
    let (a, b) = (bind(), bind());
    let told = ring_of(1, &a, &b);
    let asked = Arc::new(AtomicUsize::new(0));
    let serve = |fake: Bound| {
        let (asked, told) = (asked.clone(), told.clone());
        fake.serve(move |seen| match seen.path.as_str() {
            RING if asked.fetch_add(1, Ordering::SeqCst) < 6 => ring_reply(&Ring::none()),
            RING => ring_reply(&told),
            _ => written(6),
        })
    };
    let (a, b) = (serve(a), serve(b));
    assert_eq!(client_of(&[&a, &b]).await.unwrap().ring(), told);
}

/// A call that is still trying to reach a cluster when another call learns that it has left the ring goes
/// by the newer ring then. It waited for one newer still, and failed at its deadline.
#[tokio::test]
async fn a_call_goes_by_the_ring_that_another_one_got() {
    let (a, b) = (bind(), bind());
    let gone = refusing();
    let before = ring(1, vec![cluster("a", &[&a.address]), cluster("gone", &[&gone])]);
    let owner = cluster("b", &[&b.address]);
    let after = ring(2, vec![owner.clone()]);
    let table = RingTable::new(before.clone()).unwrap();
    let key_of = |id: &str| {
        let mut keys = (0..1000).map(|number| format!("key{number}"));
        keys.find(|key| table.owner(key.as_bytes()).unwrap().id.as_str() == id).unwrap()
    };
    let (lost, moved) = (key_of("gone"), key_of("a"));
    let told = AtomicUsize::new(0);
    let a = a.serve(move |seen| match seen.path.as_str() {
        RING if told.fetch_add(1, Ordering::SeqCst) == 0 => ring_reply(&before),
        RING => ring_reply(&after),
        _ => wrong_cluster(&owner, 2),
    });
    let _b = b.serve(|_| written(6));
    let client = KVClient::from_endpoints(vec![vec![a.address.clone()]]).await.unwrap();
    let begun = Instant::now();
    // A connection is refused several times, with pauses, before a call gives a cluster up.
    let calls = tokio::join!(client.write(&lost, "v"), client.write(&moved, "v"));
    assert_eq!(calls, (Ok(6), Ok(6)));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_named_owner_is_followed_even_when_nobody_has_its_ring_yet() {
    let (a, b) = (bind(), bind());
    let before = ring(1, vec![cluster("a", &[&a.address])]);
    let owner = cluster("b", &[&b.address]);
    let a = a.serve(with_ring(before, move |_| wrong_cluster(&owner, 2)));
    let b = b.serve(|_| Reply::Value(7, Bytes::from_static(b"v")));
    let client = client_of(&[&a]).await.unwrap();
    for _ in 0..20 {
        assert_eq!(client.consistent_read("k").await.unwrap(), Some(Bytes::from_static(b"v")));
    }
    assert_eq!((client.ring().epoch, b.seen(KV).len()), (1, 20));
    assert!(a.seen(RING).len() < 20, "refreshes are paced: {}", a.seen(RING).len());
}

/// A node of the new owner that was just restarted has not applied yet that the key is its own, and names
/// the old owner, which has let go of the key: a caller saw an error after a second of this.
#[tokio::test]
async fn a_new_owner_that_lags_behind_is_waited_for() {
    let (a, b) = (bind(), bind());
    let ring = ring_of(1, &a, &b);
    let owners = ring.clusters.clone();
    let (to_a, to_b) = (owners[0].clone(), owners[1].clone());
    let asked = AtomicUsize::new(0);
    let a = a.serve(with_ring(ring.clone(), move |_| wrong_cluster(&to_b, 1)));
    let b = b.serve(with_ring(ring, move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0..7 => wrong_cluster(&to_a, 1),
        _ => Reply::Value(7, Bytes::from_static(b"v")),
    }));
    let client = client_of(&[&a, &b]).await.unwrap();
    assert_eq!(client.consistent_read("k").await.unwrap(), Some(Bytes::from_static(b"v")));
}

/// A node that was killed speaks by an old ring until it has applied its log. Whom it names then may have
/// left the store long ago.
#[tokio::test]
async fn a_cluster_that_is_gone_is_not_asked_because_a_lagging_node_names_it() {
    let a = bind();
    let ring = ring(3, vec![cluster("a", &[&a.address])]);
    let gone = cluster("b", &[&refusing()]);
    let asked = AtomicUsize::new(0);
    let a = a.serve(with_ring(ring, move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0..5 => wrong_cluster(&gone, 2),
        _ => written(7),
    }));
    assert_eq!(client_of(&[&a]).await.unwrap().write("k", "v").await.unwrap(), 7);
    assert_eq!(a.seen(KV).len(), 6);
}

#[tokio::test]
async fn clusters_that_name_each_other_end_with_an_error() {
    let (a, b) = (bind(), bind());
    let ring = ring_of(1, &a, &b);
    let owners = ring.clusters.clone();
    let (to_a, to_b) = (owners[0].clone(), owners[1].clone());
    let a = a.serve(with_ring(ring.clone(), move |_| wrong_cluster(&to_b, 1)));
    let b = b.serve(with_ring(ring, move |_| wrong_cluster(&to_a, 1)));
    let error = client_of(&[&a, &b]).await.unwrap().write("k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::TooManyRedirects { .. }), "{error}");
    assert_eq!(error.outcome(), Outcome::NotApplied);
    assert!(a.seen(KV).len() + b.seen(KV).len() < 28);
}

#[tokio::test]
async fn a_key_that_is_handed_over_is_waited_for_and_followed() {
    let (a, b) = (bind(), bind());
    let ring = ring(1, vec![cluster("a", &[&a.address])]);
    let owner = cluster("b", &[&b.address]);
    let asked = AtomicUsize::new(0);
    let a = a.serve(with_ring(ring, move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0..3 => error(503, "FROZEN", "not_applied"),
        _ => wrong_cluster(&owner, 2),
    }));
    let b = b.serve(|_| written(8));
    assert_eq!(client_of(&[&a]).await.unwrap().write("k", "v").await.unwrap(), 8);
    assert_eq!((a.seen(KV).len(), b.seen(KV).len()), (4, 1));
}

#[tokio::test]
async fn one_deadline_covers_all_clusters() {
    let (a, b) = (bind(), bind());
    let ring = ring(1, vec![cluster("a", &[&a.address])]);
    let owner = cluster("b", &[&b.address]);
    let a = a.serve(with_ring(ring, move |_| wrong_cluster(&owner, 1)));
    let b = b.serve(|_| error(503, "NO_LEADER", "not_applied"));
    let client = client_of(&[&a]).await.unwrap().with_timeout(Duration::from_secs(1));
    let begun = Instant::now();
    let error = client.write("k", "v").await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(!b.seen(KV).is_empty());
}

#[tokio::test]
async fn without_a_ring_one_cluster_gets_everything() {
    let node = start(|seen| match seen.path.as_str() {
        RING => ring_reply(&Ring::none()),
        "/cluster/metrics" => metrics("c9", "h:1"),
        _ => written(1),
    });
    let second = node.address.clone();
    for endpoints in [
        Endpoints::Clusters(vec![vec![refusing(), second.clone()]]),
        Endpoints::Flat(vec![second.clone(), refusing()]),
    ] {
        let client = KVClient::from_endpoints(endpoints).await.unwrap();
        assert_eq!(client.write("k", "v").await.unwrap(), 1);
        assert_eq!(client.owner("k"), None);
        assert_eq!(client.route("k").await.unwrap().0.as_str(), "c9");
    }
}

#[tokio::test]
async fn several_clusters_without_a_ring_are_an_error() {
    let ringless = |id: &'static str| {
        start(move |seen| match seen.path.as_str() {
            RING => ring_reply(&Ring::none()),
            _ => metrics(id, "h:1"),
        })
    };
    let (a, b) = (ringless("a"), ringless("b"));
    assert_eq!(client_of(&[&a, &b]).await.unwrap_err(), ClientError::NoRing { clusters: 2 });
    let flat = vec![a.address.clone(), b.address.clone()];
    let error = KVClient::from_endpoints(flat).await.unwrap_err();
    assert_eq!(error, ClientError::NoRing { clusters: 2 });
}

#[tokio::test]
async fn a_list_that_names_a_cluster_without_a_ring_first_still_finds_the_ring() {
    let (old, joining) = (bind(), bind());
    let ring = ring(3, vec![cluster("a", &[&old.address])]);
    let joining = joining.serve(|seen| match seen.path.as_str() {
        RING => ring_reply(&Ring::none()),
        _ => metrics("b", "h:1"),
    });
    let old = old.serve(with_ring(ring, |_| metrics("a", "h:1")));
    let flat = vec![joining.address.clone(), old.address.clone()];
    assert_eq!(KVClient::from_endpoints(flat).await.unwrap().ring().epoch, 3);
    assert_eq!(client_of(&[&joining, &old]).await.unwrap().ring().epoch, 3);
}

#[tokio::test]
async fn clusters_that_are_down_are_reported_with_all_their_nodes() {
    let nodes = [refusing(), refusing()];
    let clusters: Vec<_> = nodes.iter().map(|node| vec![node.clone()]).collect();
    let error = KVClient::from_endpoints(clusters).await.unwrap_err();
    let ClientError::Unreachable { tried } = error else { panic!("{error}") };
    assert!(nodes.iter().all(|node| tried.iter().any(|text| text.contains(node))), "{tried:?}");
}

#[tokio::test]
async fn a_ring_that_breaks_the_rules_is_an_error() {
    let broken = Ring { hash_version: 9, ..ring(1, vec![cluster("a", &["h:1"])]) };
    let node = start(with_ring(broken, |_| written(1)));
    let error = client_of(&[&node]).await.unwrap_err();
    assert!(matches!(error, ClientError::Ring(_)), "{error}");
}
