//! Changes that real clusters refuse to begin: said why, and nothing is changed.

use distrib_kv_store::reshard::{self, Change, ChangeError, HttpClusters, RequestError};
use distrib_kv_store::types::ClusterId;

use crate::common::cluster::{FAST, expect_ok};
use crate::common::clusters::{Clusters, id};
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
    let states = |clusters: &Clusters| [0, 2].map(|place| clusters.view(place).unwrap().state);
    expect_ok(&put(clusters.at(2).http(1), "/v1/kv/of-another-store", b"v"));
    let before = states(&clusters);

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
    assert!(matches!(error, ChangeError::Request(RequestError::IdTaken(_))), "{error}");
    let error = refused(add("c9".parse().unwrap(), 1.0)).await;
    assert!(matches!(error, ChangeError::WrongNode { .. }), "{error}");
    for weight in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        for change in [add(id(2), weight), Change::Weight(id(0), weight)] {
            let error = refused(change).await;
            assert!(matches!(error, ChangeError::Request(RequestError::Weight(..))), "{error}");
        }
    }
    assert_eq!(states(&clusters), before);

    // With a cluster of the ring out of reach the change would come to a halt in its middle.
    clusters.at_mut(1).kill9(1);
    for change in [Change::Weight(id(0), 2.0), Change::Remove(id(1))] {
        let error = refused(change).await;
        assert!(matches!(error, ChangeError::Unreachable { .. }), "{error}");
    }
    assert_eq!(states(&clusters), before);
}
