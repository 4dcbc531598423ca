//! Steps that nobody should have sent: forged ones, late ones, those of another change. Each is refused
//! for a reason that programs can tell, and leaves both clusters as they were.

use distrib_kv_store::handoff::{
    Done, Frozen, Handoff, Outgoing, Receipt, Refused, Sending, Step, Tally, pairs,
};
use distrib_kv_store::reshard::{Request, next_ring, reverted};
use distrib_kv_store::ring::Ring;
use distrib_kv_store::types::ClusterId;
use serde_json::{Value, json};

use crate::common::cluster::expect_ok;
use crate::common::clusters::{Clusters, id};
use crate::common::put;
use crate::{ONE_AT_A_TIME, SMALL_PAGES};

/// Keys, so that something moves.
const KEYS: u32 = 60;

/// Two clusters and a change of the second's weight, by which keys go from the first to it.
struct Story {
    clusters: Clusters,
    old: Ring,
    next: Ring,
    handoff: Handoff,
}

impl Story {
    fn begin() -> Self {
        let clusters = Clusters::gated(2, 2, SMALL_PAGES);
        for n in 0..KEYS {
            expect_ok(&put(clusters.at(0).http(1), &format!("/v1/kv/k{n}"), b"v"));
        }
        let old = clusters.ring();
        let next = next_ring(&old, &Request::Weight(id(1), 2.0)).unwrap();
        let handoff = Handoff { epoch: 2, from: id(0), to: id(1) };
        Self { clusters, old, next, handoff }
    }

    fn begin_step(&self, ring: &Ring, next: &Ring) -> Step {
        let (ring, next, plan) =
            (Box::new(ring.clone()), Box::new(next.clone()), pairs(ring, next));
        Step::Begin { ring, next, plan }
    }

    fn take(&self, at: usize, step: Step) -> Done {
        self.clusters.step(&id(at), &step).expect("it answers").expect("it is right")
    }

    /// Steps on until the handoff is like that.
    fn until(&self, reached: impl Fn(&Outgoing, &Receipt) -> bool) {
        self.clusters.drive_until(|views| {
            let source = views[&id(0)].outgoing(&self.handoff);
            let destination = views[&id(1)].incoming(&self.handoff);
            source.zip(destination).is_some_and(|(out, into)| reached(out, &into.receipt))
        });
    }

    fn states(&self) -> [Value; 2] {
        [0, 1].map(|place| serde_json::to_value(&self.clusters.view(place).unwrap().state).unwrap())
    }

    /// Each step is refused like that, at that cluster, and nothing changes anywhere.
    #[track_caller]
    fn refuses(&self, forged: Vec<(usize, Step, Refused)>) {
        let before = self.states();
        for (at, step, why) in forged {
            let answer = self.clusters.step(&id(at), &step).expect("it answers");
            assert_eq!(answer, Err(why), "{step:?}");
            assert_eq!(self.states(), before, "{step:?}");
        }
    }

    fn of(&self, from: &ClusterId, to: &ClusterId, epoch: u64) -> Handoff {
        Handoff { epoch, from: from.clone(), to: to.clone() }
    }
}

fn frozen() -> Box<Frozen> {
    let tally = Tally::default();
    Box::new(Frozen {
        position: 0,
        revision: 1,
        tally,
        floors: Vec::new(),
        idle_floors: Vec::new(),
    })
}

/// While no change runs, no step of one is taken.
#[test]
fn without_a_change_there_is_nothing_to_step() {
    let _turn = ONE_AT_A_TIME.blocking_lock();
    let story = Story::begin();
    let (old, next, handoff) = (&story.old, &story.next, story.handoff.clone());
    let gone = |epoch, place| Refused::NoChange { epoch, cluster: id(place) };
    let stranger = Ring { list_ttl_s: 1, ..old.clone() };
    let jump = Ring { epoch: 3, ..next.clone() };
    let mut short = pairs(old, next);
    short.pop();
    let boxed = |ring: &Ring| Box::new(ring.clone());
    let short = Step::Begin { ring: boxed(old), next: boxed(next), plan: short };
    story.refuses(vec![
        (0, Step::Prepare { handoff: handoff.clone(), attempt: 1 }, gone(2, 0)),
        (1, Step::Open { handoff: handoff.clone(), attempt: 1, start: 0 }, gone(2, 1)),
        (1, Step::Activate { handoff, attempt: 1, frozen: frozen() }, gone(2, 1)),
        (0, Step::Cancel { epoch: 2 }, gone(2, 0)),
        (0, Step::Finish { epoch: 2 }, gone(2, 0)),
        (0, Step::Settle { epoch: 2 }, Refused::Gap { current: 1, offered: 2 }),
        (1, Step::Settle { epoch: 1 }, Refused::NotSequencer { cluster: id(1), epoch: 1 }),
        (0, story.begin_step(&stranger, next), Refused::Stale { current: 1 }),
        (0, story.begin_step(old, &jump), Refused::Gap { current: 1, offered: 3 }),
        (0, short, Refused::BadPlan),
        (1, Step::Join { ring: boxed(&jump) }, Refused::NotConcerned(id(1))),
        (0, Step::Revert { ring: boxed(next) }, Refused::Gap { current: 1, offered: 2 }),
        (0, Step::Revert { ring: boxed(&reverted(old)) }, gone(2, 0)),
        (1, Step::Revert { ring: boxed(&reverted(old)) }, Refused::NotConfirmed(id(0))),
        (
            0,
            Step::Revert { ring: boxed(&Ring { epoch: 9, ..old.clone() }) },
            Refused::Gap { current: 1, offered: 9 },
        ),
    ]);
    malformed(&story);
}

/// What is no step at all never reaches the log.
fn malformed(story: &Story) {
    let before = story.states();
    let ring = |change: &dyn Fn(&mut Value)| {
        let mut step = serde_json::to_value(story.begin_step(&story.old, &story.next)).unwrap();
        change(&mut step["begin"]["next"]);
        step.to_string()
    };
    for body in [
        "".to_owned(),
        "null".to_owned(),
        "[]".to_owned(),
        json!({"jump": {"epoch": 2}}).to_string(),
        json!({"finish": {}}).to_string(),
        json!({"finish": {"epoch": -1}}).to_string(),
        json!({"finish": {"epoch": 2, "more": 1}}).to_string(),
        ring(&|next| next["clusters"][1]["weight"] = json!(0.0)),
        ring(&|next| next["clusters"][1]["weight"] = json!(-1.0)),
        ring(&|next| next["clusters"][1]["weight"] = json!(null)),
        ring(&|next| next["clusters"][1]["weight"] = json!(1e300)),
        // Infinity as an f32, which no JSON can say again: the entry would decode nowhere.
        ring(&|next| next["clusters"][1]["weight"] = json!(1e39)),
        ring(&|next| {
            let mut after = next.clone();
            after["clusters"][1]["weight"] = json!(1e39);
            next["next"] = after;
        }),
        ring(&|next| next["next"] = next.clone()),
        ring(&|next| next["epoch"] = json!(u64::MAX)),
        ring(&|next| next["clusters"] = json!([])),
        ring(&|next| next["clusters"][1]["id"] = json!("c1")),
        ring(&|next| next["sequencer"] = json!("c9")),
    ] {
        let answer = story.clusters.at(0).post(1, "/cluster/step", &body);
        answer.assert_error(400, "BAD_REQUEST", "not_applied");
        assert_eq!(story.states(), before, "{body}");
    }
}

/// While a change runs, a second one is refused, and so is every step of another epoch, another cluster
/// or an attempt that is over, in every phase of the handoff.
#[test]
fn late_and_forged_steps_of_a_handoff_change_nothing() {
    let _turn = ONE_AT_A_TIME.blocking_lock();
    let story = Story::begin();
    let (old, next, handoff) = (&story.old, &story.next, story.handoff.clone());
    // What its sequencer has not begun, no cluster begins.
    story.refuses(vec![(1, story.begin_step(old, next), Refused::NotConfirmed(id(0)))]);
    story.take(0, story.begin_step(old, next));
    story.take(1, story.begin_step(old, next));
    assert_eq!(story.take(1, story.begin_step(old, next)), Done::Ok, "a repeat is answered again");
    let other = next_ring(old, &Request::Weight(id(0), 5.0)).unwrap();
    let under_way = || Refused::ChangeUnderWay { epoch: 2 };
    story.refuses(vec![
        (0, story.begin_step(old, &other), under_way()),
        (1, story.begin_step(old, &other), under_way()),
        (0, Step::Settle { epoch: 1 }, under_way()),
        (
            0,
            Step::Revert { ring: Box::new(reverted(old)) },
            Refused::Unfinished("the change is not cancelled here".into()),
        ),
        (0, Step::Finish { epoch: 2 }, Refused::Unfinished("keys for c2 are still here".into())),
    ]);

    // An attempt that the destination refuses when it is frozen, and another.
    story.until(|outgoing, _| outgoing.sending == Sending::Frozen);
    let first = story.clusters.view(0).unwrap().state.outgoing(&handoff).unwrap().frozen.clone();
    let first = Box::new(first.unwrap());
    let not_refused = Refused::WrongAttempt { attempt: 0, present: 1 };
    let unconfirmed = || Refused::NotConfirmed(id(1));
    let thaw = |refused| Step::Thaw { handoff: handoff.clone(), refused };
    let release = Step::Release { handoff: handoff.clone(), attempt: 1, tally: first.tally };
    story.refuses(vec![
        (0, thaw(0), not_refused),
        // Everything in them is right but that the destination has done its part.
        (0, thaw(1), unconfirmed()),
        (0, thaw(u64::MAX), unconfirmed()),
        (0, release, unconfirmed()),
        (0, Step::Resume { epoch: 2 }, Refused::NobodyConfirms),
        (1, Step::Resume { epoch: 2 }, Refused::NobodyConfirms),
    ]);
    frozen_serves_nobody(&story);
    assert!(refused_of_a_batch(&story) > 0, "some keys of the batch are frozen");
    let refuse = Step::Refuse { handoff: handoff.clone(), attempt: 1 };
    assert_eq!(story.take(1, refuse), Done::Refused { attempt: 1 });
    assert_eq!(story.take(0, Step::Thaw { handoff: handoff.clone(), refused: 1 }), Done::Ok);
    story.until(|outgoing, receipt| {
        outgoing.attempt == 2
            && matches!((&outgoing.frozen, receipt), (Some(frozen), Receipt::Receiving { cursor, .. })
                if cursor.covers(frozen.position))
    });
    story.refuses(late_and_forged(&story, &first));

    // Cleaned, too: what the cluster does by itself would look like the step's doing.
    story.until(|outgoing, _| outgoing.sending == Sending::Moved && outgoing.tally.records == 0);
    let over = |step: &str| Refused::WrongPhase { step: step.into(), phase: "moved".into() };
    story.refuses(vec![
        (0, Step::Thaw { handoff: handoff.clone(), refused: 2 }, over("thaw")),
        (0, Step::Thaw { handoff: handoff.clone(), refused: u64::MAX }, over("thaw")),
        (0, Step::Prepare { handoff: handoff.clone(), attempt: 3 }, over("prepare")),
        (0, Step::Cancel { epoch: 2 }, Refused::TooLate),
        (1, Step::Cancel { epoch: 2 }, Refused::TooLate),
    ]);
    assert_eq!(refused_of_a_batch(&story), 0, "what has moved is passed on");
    // What comes too late is told so, and undoes nothing.
    let states = story.states();
    let refuse = Step::Refuse { handoff, attempt: u64::MAX };
    assert!(matches!(story.take(1, refuse), Done::Active { attempt: 2, .. }));
    assert_eq!(story.states(), states);
}

/// The end of a change that is called off is taken by each cluster only once the others are as far as the
/// step says.
#[test]
fn nobody_ends_a_change_before_its_time() {
    let _turn = ONE_AT_A_TIME.blocking_lock();
    let story = Story::begin();
    let revert = || Step::Revert { ring: Box::new(reverted(&story.old)) };
    let unconfirmed = |place| Refused::NotConfirmed(id(place));
    for place in [0, 1] {
        story.take(place, story.begin_step(&story.old, &story.next));
    }
    let for_good = || Step::Refuse { handoff: story.handoff.clone(), attempt: u64::MAX };
    story.take(1, Step::Cancel { epoch: 2 });
    story.refuses(vec![(1, for_good(), unconfirmed(0))]);
    story.take(0, Step::Cancel { epoch: 2 });
    assert_eq!(story.take(1, for_good()), Done::Refused { attempt: u64::MAX });
    story.refuses(vec![
        (1, revert(), unconfirmed(0)),
        (0, Step::Resume { epoch: 2 }, Refused::NobodyConfirms),
        (1, Step::Resume { epoch: 2 }, Refused::NobodyConfirms),
    ]);
    assert_eq!(story.take(0, revert()), Done::Ok);
    story.refuses(vec![(0, Step::Settle { epoch: 3 }, unconfirmed(1))]);
    story.take(1, revert());
    assert_eq!(story.take(0, Step::Settle { epoch: 3 }), Done::Ok);
    assert_eq!(story.take(0, Step::Settle { epoch: 3 }), Done::Ok, "a repeat is answered again");
}

/// A cluster that cannot be asked confirms nothing: the step may be proposed again later.
#[test]
fn a_step_is_not_taken_while_its_witness_is_away() {
    let _turn = ONE_AT_A_TIME.blocking_lock();
    let mut story = Story::begin();
    let begin = story.begin_step(&story.old, &story.next);
    story.take(0, begin.clone());
    story.clusters.at_mut(0).kill9(1);
    let body = serde_json::to_string(&begin).unwrap();
    let answer = story.clusters.at(1).post(1, "/cluster/step", &body);
    answer.assert_error(503, "NO_LEADER", "not_applied");
    assert_eq!(story.clusters.view(1).unwrap().state.change, None);
    story.clusters.at_mut(0).restart(1);
    story.clusters.at(0).await_ready();
    assert_eq!(story.take(1, begin), Done::Ok);
}

/// With attempt 2 frozen at the source and open at the destination.
fn late_and_forged(story: &Story, first: &Frozen) -> Vec<(usize, Step, Refused)> {
    let handoff = story.handoff.clone();
    let (h, a, b) = (|| handoff.clone(), id(0), id(1));
    let first = || Box::new(first.clone());
    let wrong = |attempt, present| Refused::WrongAttempt { attempt, present };
    let gone = |place| Refused::NoChange { epoch: 3, cluster: id(place) };
    let unknown = |place, handoff| Refused::UnknownHandoff { cluster: id(place), handoff };
    let (later, back, c9) = (story.of(&a, &b, 3), story.of(&b, &a, 2), "c9".parse().unwrap());
    let away = story.of(&a, &c9, 2);
    let frozen_now = Refused::WrongPhase { step: "prepare".into(), phase: "frozen".into() };
    let false_tally = Tally { records: 1, answers: 0, digest: 7 };
    let held = story.clusters.view(0).unwrap().state.outgoing(&handoff).unwrap().frozen.clone();
    let held = held.unwrap();
    let false_release = Refused::Differs { staged: false_tally, source_has: held.tally };
    let endless = Box::new(Frozen { revision: u64::MAX, ..held.clone() });
    // The copy is whole, but the source froze at another revision, or with other floors.
    let backward = Box::new(Frozen { revision: 0, ..held.clone() });
    let floors = vec![("victim".to_owned(), u64::MAX)];
    let forgetful = Box::new(Frozen { floors, ..held.clone() });
    let unconfirmed = || Refused::NotConfirmed(id(0));
    vec![
        // The first attempt is over.
        (1, Step::Activate { handoff: h(), attempt: 1, frozen: first() }, wrong(1, 2)),
        (1, Step::Open { handoff: h(), attempt: 1, start: 0 }, wrong(1, 2)),
        (0, Step::Release { handoff: h(), attempt: 1, tally: first().tally }, wrong(1, 2)),
        (0, Step::Freeze { handoff: h(), attempt: 1, floors_bytes_max: None }, wrong(1, 2)),
        (0, Step::Thaw { handoff: h(), refused: 1 }, wrong(1, 2)),
        (0, Step::Prepare { handoff: h(), attempt: 1 }, frozen_now.clone()),
        // Not yet, or not so.
        (0, Step::Prepare { handoff: h(), attempt: 3 }, frozen_now),
        (0, Step::Release { handoff: h(), attempt: 2, tally: false_tally }, false_release),
        (0, Step::Finish { epoch: 2 }, Refused::Unfinished("keys for c2 are still here".into())),
        (0, Step::Cancel { epoch: 2 }, Refused::TooLate),
        // Numbers that would leave none for what comes after.
        (1, Step::Open { handoff: h(), attempt: u64::MAX, start: 0 }, wrong(u64::MAX, 2)),
        (1, Step::Refuse { handoff: h(), attempt: u64::MAX }, wrong(u64::MAX, 2)),
        (
            1,
            Step::Activate { handoff: h(), attempt: 2, frozen: endless },
            Refused::Implausible(u64::MAX),
        ),
        (1, Step::Open { handoff: h(), attempt: 3, start: 0 }, unconfirmed()),
        (1, Step::Activate { handoff: h(), attempt: 2, frozen: backward }, unconfirmed()),
        (1, Step::Activate { handoff: h(), attempt: 2, frozen: forgetful }, unconfirmed()),
        // Another epoch.
        (0, Step::Release { handoff: later.clone(), attempt: 2, tally: held.tally }, gone(0)),
        (1, Step::Activate { handoff: later.clone(), attempt: 2, frozen: first() }, gone(1)),
        (1, Step::Refuse { handoff: later, attempt: 2 }, gone(1)),
        // Another cluster, or the wrong one of the two.
        (1, Step::Refuse { handoff: back.clone(), attempt: 2 }, unknown(1, back)),
        (
            0,
            Step::Release { handoff: away.clone(), attempt: 2, tally: held.tally },
            unknown(0, away.clone()),
        ),
        (
            1,
            Step::Activate { handoff: away.clone(), attempt: 2, frozen: first() },
            unknown(1, away),
        ),
        (0, Step::Activate { handoff: h(), attempt: 2, frozen: first() }, unknown(0, h())),
        (1, Step::Release { handoff: h(), attempt: 2, tally: held.tally }, unknown(1, h())),
    ]
}

/// A key that moves is refused by both while it is frozen, for reads and writes, as something that
/// passes.
fn frozen_serves_nobody(story: &Story) {
    let direct = [("Kv-Routing", "direct")];
    let mut frozen = 0;
    for n in 0..KEYS {
        for query in ["", "?consistency=stale"] {
            let path = format!("/v1/kv/k{n}{query}");
            let ask = |place: usize| {
                let http = story.clusters.at(place).http(1);
                crate::common::request(http, "GET", &path, &direct, b"")
            };
            let (source, destination) = (ask(0), ask(1));
            let served = [&source, &destination].iter().filter(|a| a.status == 200).count();
            if source.status == 503 {
                source.assert_error(503, "FROZEN", "not_applied");
                frozen += 1;
                let put = |place: usize| {
                    let http = story.clusters.at(place).http(1);
                    crate::common::request(http, "PUT", &format!("/v1/kv/k{n}"), &direct, b"x")
                };
                put(0).assert_error(503, "FROZEN", "not_applied");
                put(1).assert_error(421, "WRONG_CLUSTER", "not_applied");
            }
            assert_eq!(served, usize::from(source.status != 503), "{path}");
        }
    }
    assert!(frozen > 0, "some keys move");
}

/// A batch over all keys, at either cluster: each is answered as it would be alone. How many are refused.
fn refused_of_a_batch(story: &Story) -> usize {
    let operations: Vec<Value> =
        (0..KEYS).map(|n| json!({"op": "get", "key": format!("k{n}")})).collect();
    let body = json!({ "operations": operations }).to_string();
    let mut refused = 0;
    for place in [0, 1] {
        let answer = story.clusters.at(place).post(1, "/v1/batch", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let results = answer.json()["results"].as_array().expect("one for each").clone();
        for (n, result) in results.iter().enumerate() {
            let http = story.clusters.at(place).http(1);
            let alone = crate::common::get(http, &format!("/v1/kv/k{n}"));
            assert_eq!(result["status"], alone.status, "k{n}: {result}");
            refused += usize::from(alone.status != 200);
        }
    }
    refused
}
