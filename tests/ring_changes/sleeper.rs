//! A client that sleeps through many changes of the ring.

use std::time::Duration;

use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::reshard::{self, Begun, Change, HttpClusters, Role};
use tokio::time::timeout;

use crate::common::cluster::Cluster;
use crate::common::cluster::FAST;
use crate::common::clusters::{CHANGE_PATIENCE, Clusters, id};
use crate::{ONE_AT_A_TIME, SMALL_PAGES};

const KEYS: u32 = 200;

/// How long a cluster is away: longer than the client's pauses between two tries, well within its patience.
const AWAY: Duration = Duration::from_secs(2);

/// Changes of a ring of two, which the third cluster joins and the first one leaves.
fn ten_changes(third: &Cluster) -> [Change; 10] {
    let add = Change::Add {
        id: id(2),
        nodes: vec![(third.http(1).into(), third.rpc(1).into())],
        weight: 1.0,
    };
    let weight = |place, weight| Change::Weight(id(place), weight);
    [
        weight(0, 2.0),
        weight(1, 3.0),
        weight(0, 0.5),
        add,
        weight(2, 2.0),
        weight(1, 0.7),
        weight(0, 4.0),
        weight(2, 0.5),
        Change::Remove(id(0)),
        weight(1, 1.0),
    ]
}

/// Two clients sleep through ten changes, after which one of the clusters they know is out of the ring:
/// one wakes while it still runs and redirects, the other when it is dead. Both find what was written
/// before and meanwhile, and what they write is found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_slept_through_ten_changes_writes_and_reads() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut clusters = Clusters::start(&[1, 1, 1], 2, &format!("{FAST}{SMALL_PAGES}"));
    let awake = KVClient::from_endpoints(clusters.endpoints()[..2].to_vec()).await.unwrap();
    let mut sleepers = Vec::new();
    for _ in 0..2 {
        sleepers.push(KVClient::from_endpoints(clusters.endpoints()[..2].to_vec()).await.unwrap());
    }
    for n in 0..KEYS {
        sleepers[n as usize % 2].write(format!("k{n}"), "before").await.unwrap();
    }
    for (n, change) in ten_changes(clusters.at(2)).iter().enumerate() {
        let http = HttpClusters::default();
        let begun = reshard::begin(&http, &clusters.endpoints(), change).await.unwrap();
        let Begun::Change(begun) = begun else { panic!("{change:?} changes nothing") };
        let endpoints = clusters.endpoints();
        let follow = reshard::follow(&http, &endpoints, Role::Onlooker, Some(&begun), |_, _| {});
        let ring = timeout(CHANGE_PATIENCE, follow).await.expect("the change ends").unwrap();
        assert_eq!((&ring, ring.epoch), (&begun.next, n as u64 + 2));
        awake.write(format!("k{n}"), "meanwhile").await.unwrap();
    }
    for (turn, sleeper) in sleepers.iter().enumerate() {
        assert_eq!(sleeper.ring().epoch, 1, "it has slept");
        if turn == 1 {
            clusters.at_mut(0).kill9(1);
        }
        // By what it knows the first keys belong to the cluster that has left.
        let ring = sleeper.clone();
        let has_left = |n: &u32| ring.owner(format!("k{n}")).is_some_and(|owner| owner.id == id(0));
        let (first, others): (Vec<u32>, Vec<u32>) = (0..KEYS).partition(has_left);
        assert!(!first.is_empty());
        for n in first.into_iter().chain(others) {
            let expected = match n {
                _ if turn == 1 && n >= 10 => "after 0",
                0..10 => "meanwhile",
                _ => "before",
            };
            let found = sleeper.consistent_read(format!("k{n}")).await.unwrap();
            assert_eq!(found.expect("it was acknowledged"), expected, "k{n}");
        }
        for n in 10..KEYS {
            sleeper.write(format!("k{n}"), format!("after {turn}")).await.unwrap();
            let found = awake.consistent_read(format!("k{n}")).await.unwrap();
            assert_eq!(found.expect("it was acknowledged"), format!("after {turn}"));
        }
        assert_eq!(sleeper.ring().epoch, 11);
    }
    clusters.at_mut(0).restart(1);
    let value = |n| Some(if n < 10 { "meanwhile" } else { "after 1" }.to_owned());
    let expected = (0..KEYS).map(|n| (format!("k{n}"), value(n))).collect();
    tokio::task::block_in_place(|| clusters.check(&expected));
}

/// A cluster whose only node is restarted, for longer than connections are refused in a row: its callers
/// wait, and see no error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_away_for_two_seconds_costs_no_caller_an_error() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut clusters = Clusters::start(&[1, 1], 2, &format!("{FAST}{SMALL_PAGES}"));
    let client = KVClient::from_endpoints(clusters.endpoints()).await.unwrap();
    client.write("k", "1").await.unwrap();
    let owner = if client.owner("k").unwrap().id == id(0) { 0 } else { 1 };
    clusters.at_mut(owner).kill9(1);
    let writing = tokio::spawn({
        let client = client.clone();
        async move { client.write("k", "2").await }
    });
    let reading = tokio::spawn({
        let client = client.clone();
        async move { client.consistent_read("k").await }
    });
    tokio::time::sleep(AWAY).await;
    assert!(!writing.is_finished() && !reading.is_finished(), "they wait");
    clusters.at_mut(owner).restart(1);
    writing.await.unwrap().unwrap();
    assert!(reading.await.unwrap().unwrap().is_some());
    assert_eq!(client.consistent_read("k").await.unwrap().unwrap(), "2");
}
