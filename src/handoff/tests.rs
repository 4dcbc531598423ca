//! What the model does not look at: the plan, the ways out of a change, and the forms on the wire.

use bytes::Bytes;

use crate::ring::{EPOCH_MAX, Ring, RingCluster, RingNode, RingTable};
use crate::types::{ClusterId, Epoch};

use super::*;

fn id(text: &str) -> ClusterId {
    text.parse().unwrap()
}

fn ring(epoch: Epoch, clusters: &[(&str, f32)]) -> Ring {
    let node = RingNode { id: 1, http: "127.0.0.1:1".into(), rpc: "127.0.0.1:2".into() };
    let clusters: Vec<_> = clusters
        .iter()
        .map(|(name, weight)| RingCluster {
            id: id(name),
            weight: *weight,
            nodes: vec![node.clone()],
        })
        .collect();
    Ring { epoch, sequencer: Some(clusters[0].id.clone()), clusters, ..Ring::none() }
}

fn texts(pairs: &[Pair]) -> Vec<String> {
    pairs.iter().map(|pair| format!("{}{}", pair.from, pair.to)).collect()
}

/// A pair is left out only when no key can move between its clusters: tried with many keys.
#[test]
fn the_plan_holds_every_move() {
    let rings = [
        ring(1, &[("a", 1.0), ("b", 1.0), ("c", 1.0)]),
        ring(1, &[("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)]),
        ring(1, &[("b", 2.0), ("c", 1.0)]),
        ring(1, &[("a", 0.5), ("b", 1.5), ("c", 1.0)]),
        Ring { hash_version: 1, ..ring(1, &[("a", 1.0), ("b", 1.0), ("c", 1.5)]) },
    ];
    for old in &rings {
        for new in &rings {
            let plan = pairs(old, new);
            let (old, new) = (RingTable::new(old.clone()), RingTable::new(new.clone()));
            let (old, new) = (old.unwrap(), new.unwrap());
            for key in 0..5000u32 {
                let key = key.to_be_bytes();
                let from = old.owner(&key).unwrap().id.clone();
                let to = new.owner(&key).unwrap().id.clone();
                assert!(from == to || plan.contains(&Pair { from, to }));
            }
        }
    }
}

/// A ring in force by which `a` has left `b` and `c`.
fn without_a() -> (Handoff, RingState) {
    let table = RingTable::new(ring(5, &[("b", 1.0), ("c", 1.0)])).unwrap();
    (Handoff { epoch: 5, from: id("a"), to: id("b") }, RingState::with_ring(table))
}

/// A source that was left behind asks long after the others have finished, and in the middle of their next change.
#[test]
fn a_release_is_confirmed_by_who_is_beyond_the_change() {
    let (handoff, mut state) = without_a();
    let release = |epoch| {
        let handoff = Handoff { epoch, ..handoff.clone() };
        Step::Release { handoff, attempt: 1, tally: Tally::default() }
    };
    let confirmed = |state: &RingState| [4, 5, 6].map(|n| state.confirms(&release(n), &id("b")));
    assert_eq!(confirmed(&state), [true, true, false]);
    let next = RingTable::new(ring(6, &[("b", 2.0), ("c", 1.0)])).unwrap();
    let plan = pairs(state.ring.ring(), next.ring());
    state.change = Some(Change {
        incoming: [(id("c"), Incoming::default())].into(),
        outgoing: Default::default(),
        next: std::sync::Arc::new(next),
        plan,
        course: Course::Open,
    });
    assert_eq!(confirmed(&state), [true, true, false]);
}

/// The sequencer asks members before it settles, and not who left.
#[test]
fn who_left_is_not_asked_before_settling() {
    let (_, mut state) = without_a();
    state.settling = ring(4, &[("a", 1.0), ("b", 1.0), ("c", 1.0)]).clusters;
    let Witnesses::All(asked) = state.witnesses(&Step::Settle { epoch: 5 }, &id("b")) else {
        panic!("all of some")
    };
    assert_eq!(asked.into_iter().map(|cluster| cluster.id).collect::<Vec<_>>(), [id("c")]);
}

#[test]
fn the_plan_leaves_out_what_cannot_move() {
    let three = ring(1, &[("a", 1.0), ("b", 1.0), ("c", 1.0)]);
    let four = ring(2, &[("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)]);
    assert_eq!(texts(&pairs(&three, &four)), ["ad", "bd", "cd"]);
    assert_eq!(texts(&pairs(&four, &three)), ["da", "db", "dc"]);
    let heavier = ring(2, &[("a", 2.0), ("b", 1.0), ("c", 1.0)]);
    assert_eq!(texts(&pairs(&three, &heavier)), ["ba", "ca"]);
    assert!(pairs(&three, &three).is_empty());
}

#[test]
fn steps_and_states_survive_json() {
    let handoff = Handoff { epoch: 2, from: id("a"), to: id("b") };
    let to = Some(Bytes::from_static(&[0, 255]));
    let step = Step::Count { handoff, attempt: 1, from: Bytes::new(), to };
    let json = serde_json::to_string(&step).unwrap();
    assert_eq!(serde_json::from_str::<Step>(&json).unwrap(), step);
    let state = RingState::with_ring(RingTable::new(ring(1, &[("a", 1.0)])).unwrap());
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<RingState>(&json).unwrap(), state);
}

/// A cluster that knows nothing, for steps that ask nothing of the data.
struct Nothing {
    own: ClusterId,
    floors: Vec<(String, u64)>,
    idle_floors: Vec<(String, u64)>,
}

impl Default for Nothing {
    fn default() -> Self {
        Self { own: id("b"), floors: Vec::new(), idle_floors: Vec::new() }
    }
}

impl Facts for Nothing {
    fn own(&self) -> &ClusterId {
        &self.own
    }

    fn index(&self) -> u64 {
        1
    }

    fn revision(&self) -> u64 {
        0
    }

    fn floors(&self) -> Vec<(String, u64)> {
        self.floors.clone()
    }

    fn idle_floors(&self) -> Vec<(String, u64)> {
        self.idle_floors.clone()
    }

    fn is_empty(&self) -> std::io::Result<bool> {
        Ok(true)
    }

    fn answers(&self, _: &dyn Fn(&[u8]) -> bool) -> Tally {
        Tally::default()
    }

    fn records(
        &self,
        _: &dyn Fn(&[u8]) -> bool,
        _: &[u8],
        _: Option<&[u8]>,
        _: Prepared,
    ) -> std::io::Result<Option<Tally>> {
        Ok(Some(Tally::default()))
    }
}

/// A forged ring of the last epoch there is leads nowhere, and takes no replica down.
#[test]
fn nothing_follows_the_last_epoch() {
    let last = ring(EPOCH_MAX, &[("a", 1.0)]);
    let mut state = RingState::default();
    let join = Step::Join { ring: Box::new(last.clone()) };
    let own = Nothing::default();
    state.decide(&join, &own).unwrap().unwrap();
    let next = ring(1, &[("a", 1.0), ("b", 1.0)]);
    let plan = pairs(&last, &next);
    let begin = Step::Begin { ring: Box::new(last), next: Box::new(next.clone()), plan };
    assert!(matches!(state.decide(&begin, &own).unwrap(), Err(Refused::Gap { .. })));
    let beyond = ring(EPOCH_MAX + 1, &[("a", 1.0)]);
    let join = Step::Join { ring: Box::new(beyond) };
    assert!(matches!(state.decide(&join, &own).unwrap(), Err(Refused::InvalidRing(_))));
    let revert = Step::Revert { ring: Box::new(next) };
    assert!(matches!(state.decide(&revert, &own).unwrap(), Err(Refused::Stale { .. })));
}

/// Two clusters, in a change that gives keys of the first to the second.
fn begun(own: &str) -> (RingState, Nothing, Handoff) {
    let (old, next) = (ring(1, &[("a", 1.0), ("b", 1.0)]), ring(2, &[("a", 1.0), ("b", 2.0)]));
    let mut state = RingState::with_ring(RingTable::new(old.clone()).unwrap());
    let plan = pairs(&old, &next);
    let begin = Step::Begin { ring: Box::new(old), next: Box::new(next), plan };
    let facts = Nothing { own: id(own), ..Nothing::default() };
    state.decide(&begin, &facts).unwrap().unwrap();
    (state, facts, Handoff { epoch: 2, from: id("a"), to: id("b") })
}

/// A forged attempt near the end of all numbers would leave none for another, and the change stuck.
#[test]
fn no_attempt_uses_up_the_numbers() {
    let far = [ATTEMPT_JUMP_MAX + 1, Attempt::MAX - 1, Attempt::MAX];
    let wrong = |attempt| Err(Refused::WrongAttempt { attempt, present: 0 });
    let (mut source, at_a, handoff) = begun("a");
    let (mut destination, at_b, _) = begun("b");
    for attempt in far {
        let prepare = Step::Prepare { handoff: handoff.clone(), attempt };
        assert_eq!(source.decide(&prepare, &at_a).unwrap(), wrong(attempt));
        let open = Step::Open { handoff: handoff.clone(), attempt, start: 0 };
        assert_eq!(destination.decide(&open, &at_b).unwrap(), wrong(attempt));
        let refuse = Step::Refuse { handoff: handoff.clone(), attempt };
        assert_eq!(destination.decide(&refuse, &at_b).unwrap(), wrong(attempt));
    }
    // Where the change is being called off, no attempt is to come any more.
    destination.decide(&Step::Cancel { epoch: 2 }, &at_b).unwrap().unwrap();
    let refuse = Step::Refuse { handoff: handoff.clone(), attempt: Attempt::MAX };
    let done = destination.decide(&refuse, &at_b).unwrap().unwrap().done;
    assert_eq!(done, Done::Refused { attempt: Attempt::MAX });
    let prepare = Step::Prepare { handoff, attempt: ATTEMPT_JUMP_MAX };
    assert!(source.decide(&prepare, &at_a).unwrap().is_ok(), "near enough");
}

/// What could not be activated, because no message can tell of so many clients, does not freeze. Clients that
/// have not written for long hold nothing up: they are told of where there is room for all of them.
#[test]
fn too_many_clients_do_not_freeze() {
    let name = "\\".repeat(64);
    let fitting = FLOORS_BYTES_MAX / (26 + 2 * 64);
    for (clients, fits) in [(fitting, true), (fitting + 1, false)] {
        let (mut source, mut facts, handoff) = begun("a");
        facts.floors = vec![(name.clone(), u64::MAX); clients];
        facts.idle_floors = vec![(name.clone(), u64::MAX); 2];
        let count =
            Step::Count { handoff: handoff.clone(), attempt: 1, from: Bytes::new(), to: None };
        for step in [Step::Prepare { handoff: handoff.clone(), attempt: 1 }, count] {
            source.decide(&step, &facts).unwrap().unwrap();
        }
        let freeze = Step::Freeze { handoff, attempt: 1, floors_bytes_max: None };
        match source.decide(&freeze, &facts).unwrap() {
            Ok(Decision { done: Done::Frozen(frozen), .. }) => {
                assert!(
                    fits && serde_json::to_vec(&frozen.floors).unwrap().len()
                        <= FLOORS_BYTES_MAX + 1
                );
                assert!(frozen.idle_floors.is_empty(), "there is no room for them");
            }
            refused => assert!(!fits && refused == Err(Refused::TooManyClients)),
        }
    }
}
