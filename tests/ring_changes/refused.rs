//! Changes that real clusters refuse to begin, or to call off: said why, and nothing is changed.

use distrib_kv_store::handoff::{Receipt, Step, pairs};
use distrib_kv_store::reshard::{
    self, Begun, Change, ChangeError, DriveError, HttpClusters, Request, RequestError, Role, Scene,
    next_ring,
};
use distrib_kv_store::ring::Ring;
use distrib_kv_store::types::ClusterId;
use tokio::time::timeout;

use crate::common::cluster::{FAST, expect_ok};
use crate::common::clusters::{CHANGE_PATIENCE, Clusters, id};
use crate::common::put;
use crate::{ONE_AT_A_TIME, SMALL_PAGES};

/// A cluster that holds keys, an id that is taken, a node of another cluster, a weight that is none, a
/// cluster of the ring out of reach: each is refused with its own error, and the states stay the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_cannot_be_changes_nothing() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut clusters = Clusters::start(&[1, 1, 1], 2, &format!("{FAST}{SMALL_PAGES}"));
    let http = HttpClusters::default();
    let endpoints = clusters.endpoints()[..2].to_vec();
    let state = |clusters: &Clusters, place| clusters.view(place).unwrap().state;
    expect_ok(&put(clusters.at(2).http(1), "/v1/kv/of-another-store", b"v"));
    let before = [0, 1, 2].map(|place| state(&clusters, place));

    let refused = |change: Change| {
        let (http, endpoints) = (&http, &endpoints);
        async move { reshard::begin(http, endpoints, &change).await.expect_err("it cannot be") }
    };
    let add = |as_cluster: ClusterId, weight: f32| {
        let third = clusters.at(2);
        let nodes = vec![(third.http(1).to_owned(), third.rpc(1).to_owned())];
        Change::Add { id: as_cluster, nodes, weight }
    };
    let error = refused(add(id(2), 1.0)).await;
    assert!(matches!(&error, ChangeError::NotEmpty(cluster) if *cluster == id(2)), "{error}");
    let error = refused(add(id(1), 1.0)).await;
    assert!(matches!(error, ChangeError::Request(RequestError::Differs(_))), "{error}");
    let error = refused(add("c9".parse().unwrap(), 1.0)).await;
    assert!(matches!(error, ChangeError::WrongNode { .. }), "{error}");
    for weight in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        for change in [add(id(2), weight), Change::Weight(id(0), weight)] {
            let error = refused(change).await;
            assert!(matches!(error, ChangeError::Request(RequestError::Weight(..))), "{error}");
        }
    }
    assert_eq!([0, 1, 2].map(|place| state(&clusters, place)), before);

    // With a cluster of the ring out of reach the change would come to a halt in its middle.
    clusters.at_mut(1).kill9(1);
    for change in [Change::Weight(id(0), 2.0), Change::Remove(id(1))] {
        let error = refused(change).await;
        assert!(matches!(error, ChangeError::Unreachable { .. }), "{error}");
    }
    let [c1, _, c3] = before;
    assert_eq!([0, 2].map(|place| state(&clusters, place)), [c1, c3]);
}

/// Once a handoff is active it is too late to call the change off. Whoever wishes to is told so, at once,
/// and the change goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decided_change_is_not_called_off() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let clusters = Clusters::gated(2, 2, SMALL_PAGES);
    let old = clusters.ring();
    let next = next_ring(&old, &Request::Weight(id(1), 3.0)).unwrap();
    let clusters = tokio::task::block_in_place(|| {
        let (ring, to) = (Box::new(old.clone()), Box::new(next.clone()));
        let begin = Step::Begin { ring, next: to, plan: pairs(&old, &next) };
        clusters.step(&id(0), &begin).expect("it answers").expect("it begins");
        clusters.drive_until(|views| {
            let changes = views.values().filter_map(|state| state.change.as_ref());
            let mut incoming = changes.flat_map(|change| change.incoming.values());
            incoming.any(|incoming| incoming.receipt == Receipt::Active)
        });
        clusters
    });
    let http = HttpClusters::default();
    let asked = reshard::abort(&http, &clusters.endpoints(), |_, _| {}).await;
    assert!(matches!(asked, Err(ChangeError::Drive(DriveError::TooLate(_)))), "{asked:?}");
    tokio::task::block_in_place(|| {
        assert!(matches!(Scene::of(&clusters.views().unwrap()), Scene::Changing(_)));
        clusters.drive_until(|views| {
            matches!(Scene::of(views), Scene::Quiet { settled: Some(true), .. })
        });
        assert_eq!(clusters.ring(), next);
    });
}

/// A cluster that was to join dies, for longer than anybody waits: the change is called off without it.
/// When it comes back it gets out of the change, and can be added again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_called_off_without_the_cluster_that_was_to_join() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut clusters = Clusters::gated(3, 2, SMALL_PAGES);
    let old = clusters.ring();
    let next = next_ring(&old, &Request::Add(clusters.listed(2, 1.0))).unwrap();
    let nodes: Vec<_> =
        clusters.listed(2, 1.0).nodes.into_iter().map(|node| (node.http, node.rpc)).collect();
    let clusters = tokio::task::block_in_place(move || {
        let boxed = |ring: &Ring| Box::new(ring.clone());
        let begin = Step::Begin { ring: boxed(&old), next: boxed(&next), plan: pairs(&old, &next) };
        let take = |place: usize, step: &Step| {
            clusters.step(&id(place), step).expect("it answers").expect("it is taken");
        };
        take(2, &Step::Join { ring: boxed(&old) });
        [0, 1, 2].iter().for_each(|place| take(*place, &begin));
        clusters.at_mut(2).kill9(1);
        clusters.open_gates();
        clusters
    });
    let http = HttpClusters::default();
    let endpoints = clusters.endpoints()[..2].to_vec();
    let ring = reshard::abort(&http, &endpoints, |_, _| {}).await.unwrap();
    assert_eq!((ring.epoch, ring.clusters.len()), (3, 2));

    let clusters = tokio::task::block_in_place(move || {
        let mut clusters = clusters;
        clusters.at_mut(2).restart(1);
        clusters.at(2).await_ready();
        clusters
    });
    let add = Change::Add { id: id(2), nodes, weight: 1.0 };
    let Begun::Change(begun) = reshard::begin(&http, &endpoints, &add).await.unwrap() else {
        panic!("{add:?} changes nothing");
    };
    let follow = reshard::follow(&http, &endpoints, Role::Helper, Some(&begun), |_, _| {});
    let ring = timeout(CHANGE_PATIENCE, follow).await.expect("it ends").unwrap();
    assert_eq!((ring.epoch, ring.clusters.len()), (4, 3));
    drop(clusters);
}
