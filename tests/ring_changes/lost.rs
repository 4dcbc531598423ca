//! A cluster that leaves dies once others serve all that it had, and comes back when nobody expects it.

use std::collections::BTreeMap;

use distrib_kv_store::handoff::{Sending, Step, pairs};
use distrib_kv_store::reshard::{
    self, Begun, Change, HttpClusters, Request, Role, Scene, next_ring,
};
use distrib_kv_store::ring::Ring;
use tokio::time::timeout;

use crate::common::cluster::{FAST, expect_ok};
use crate::common::clusters::{CHANGE_PATIENCE, Clusters, id};
use crate::common::{eventually, put};
use crate::{ONE_AT_A_TIME, SMALL_PAGES};

const KEYS: u32 = 120;

/// The sequencer's cluster leaves, and is killed when others serve all that it had, but it has released nothing
/// yet. The change ends without it, so does the next, and when it comes back it deletes its keys, is out, and can
/// be added again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_leaves_may_die_once_others_serve_its_keys() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut clusters = Clusters::gated(3, 3, &format!("{FAST}{SMALL_PAGES}"));
    for n in 0..KEYS {
        expect_ok(&put(clusters.at(1).http(1), &format!("/v1/kv/k{n}"), b"before"));
    }
    let old = clusters.ring();
    let next = next_ring(&old, &Request::Remove(id(0))).unwrap();
    let held = clusters.at(0).metrics(1).unwrap()["keys"].clone();
    tokio::task::block_in_place(|| give_everything_away(&clusters, &old, &next));
    clusters.at_mut(0).kill9(1);
    clusters.open_gates();
    assert_eq!(through(&clusters, Change::Weight(id(1), 2.0), &next).await.epoch, 3);
    for n in 0..KEYS / 2 {
        expect_ok(&put(clusters.at(1).http(1), &format!("/v1/kv/k{n}"), b"after"));
    }

    clusters.close_gate(0);
    clusters.at_mut(0).restart(1);
    clusters.at(0).await_node(1, "it has released nothing", |m| m["keys"] == held);
    assert!(clusters.view(0).unwrap().state.change.is_some());
    clusters.open_gates();
    eventually("it is out of the change", || {
        clusters.view(0)?.state.change.is_none().then_some(())
    });
    let added = clusters.listed(0, 1.0);
    let nodes = added.nodes.iter().map(|node| (node.http.clone(), node.rpc.clone())).collect();
    let three = clusters.ring();
    let change = Change::Add { id: id(0), nodes, weight: 1.0 };
    assert_eq!(through(&clusters, change, &three).await.epoch, 4);
    let value = |n| if n < KEYS / 2 { "after" } else { "before" };
    let expected: BTreeMap<_, _> =
        (0..KEYS).map(|n| (format!("k{n}"), Some(value(n).to_owned()))).collect();
    tokio::task::block_in_place(|| clusters.check(&expected));
}

/// Begins the change to `next` and takes it to where all keys of the first cluster are served by others, and it
/// has released none.
fn give_everything_away(clusters: &Clusters, old: &Ring, next: &Ring) {
    let plan = pairs(old, next);
    let (ring, next) = (Box::new(old.clone()), Box::new(next.clone()));
    let begin = Step::Begin { ring, next, plan: plan.clone() };
    clusters.step(&id(0), &begin).expect("it answers").expect("it is right");
    let is_release = |step: &Step| matches!(step, Step::Release { .. });
    clusters.drive_until_but_for(is_release, |views| {
        let Scene::Changing(transition) = Scene::of(views) else { return false };
        let outgoing = |pair| transition.outgoing(views, pair);
        let is_frozen = |pair| outgoing(pair).is_some_and(|o| o.sending == Sending::Frozen);
        transition.has_given_all(views, &id(0)) && plan.iter().all(is_frozen)
    });
}

/// Waits until the ring is `before`, then asks for a change of it, and waits for that.
async fn through(clusters: &Clusters, change: Change, before: &Ring) -> Ring {
    let (http, endpoints) = (HttpClusters::default(), clusters.endpoints());
    let follow = |begun| reshard::follow(&http, &endpoints, Role::Onlooker, begun, |_, _| {});
    let ended = timeout(CHANGE_PATIENCE, follow(None)).await.expect("the change ends");
    assert_eq!(ended.unwrap(), *before);
    let Begun::Change(begun) = reshard::begin(&http, &endpoints, &change).await.unwrap() else {
        panic!("{change:?} changes nothing");
    };
    let ended = timeout(CHANGE_PATIENCE, follow(Some(&begun))).await.expect("the change ends");
    assert_eq!(ended.unwrap(), begun.next);
    begun.next
}
