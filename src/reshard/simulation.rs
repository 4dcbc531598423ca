//! Whole changes of the ring in memory: clusters that decide by the real rules, drivers that see old
//! views, steps that are lost, late and repeated, writes all the time.
//!
//! Every run is drawn from a seed. What must hold in all of them: at no moment two clusters serve a key,
//! what is served is what was written last, and once the disorder is over the change comes to its end,
//! with every key where the ring says and nowhere else.

mod driven;
mod world;

use std::collections::BTreeSet;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::driver::{freeze_lag, frozen};
use super::testing::{id, ring};
use super::*;
use crate::handoff::{Refused, RingState, Step, pairs};
use crate::ring::Ring;
use world::World;

/// Runs of each kind: some ten seconds in all.
const SEEDS: u64 = 20;

/// Moves of chance, in which anything may be lost or late, before the world gets orderly.
const DISORDER: usize = 1500;

/// Moves after which a change that is not at its end never gets there.
const MOVES_MAX: usize = 60_000;

/// How often it is looked whether the end is reached.
const END_EVERY: usize = 16;

/// Out of the change that every run begins with.
const CALL_OFF: Goal = Goal::Abort { epoch: 2 };

/// A driver as it is between two moves.
struct Driver {
    views: Views,
    hints: Hints,
}

impl Driver {
    fn new(goal: Goal) -> Self {
        Self { views: Views::new(), hints: Hints::new(goal) }
    }

    /// Looks at one cluster, or proposes one of the steps that it would take.
    fn act(&mut self, world: &mut World, late: &mut Vec<Action>, chance: &mut Chance) {
        if chance.one_in(2) || self.views.is_empty() {
            let (cluster, state) = world.view(chance);
            self.views.insert(cluster, state);
            return;
        }
        self.hints.overdue.clear();
        if chance.orderly || chance.one_in(10) {
            // Frozen for too long, as this driver's clock has it.
            if chance.one_in(20) {
                self.hints.overdue = frozen(&self.views).into_iter().collect();
            }
        }
        let actions = next_actions(&self.views, &self.hints);
        if actions.is_empty() {
            return;
        }
        let action = actions[chance.below(actions.len())].clone();
        if !chance.orderly && chance.one_in(4) {
            // Lost, or late: it may come when nobody expects it any more, and twice.
            if chance.one_in(2) {
                late.push(action);
            }
            return;
        }
        self.propose(world, &action);
    }

    fn propose(&mut self, world: &mut World, action: &Action) {
        let refused = world.take(action).err();
        let too_late = refused == Some(Refused::TooLate);
        if too_late && matches!(action.step, Step::Cancel { .. }) && self.hints.goal == CALL_OFF {
            self.hints.goal = Goal::Forward;
        }
    }
}

struct Chance {
    random: SmallRng,
    orderly: bool,
}

impl Chance {
    fn one_in(&mut self, n: u32) -> bool {
        self.random.random_range(0..n) == 0
    }

    fn below(&mut self, n: usize) -> usize {
        self.random.random_range(0..n)
    }
}

/// Runs a change from `old` to `next` to its end, and returns the ring then.
fn run(seed: u64, old: &Ring, next: &Ring, goals: &[Goal]) -> Ring {
    let mut chance = Chance { random: SmallRng::seed_from_u64(seed), orderly: false };
    let mut world = World::new(old, next, &mut chance);
    let sequencer = old.sequencer.clone().unwrap();
    let begin = Step::Begin {
        ring: Box::new(old.clone()),
        next: Box::new(next.clone()),
        plan: pairs(old, next),
    };
    for cluster in next.clusters.iter().filter(|cluster| old.cluster(&cluster.id).is_none()) {
        let join = Step::Join { ring: Box::new(old.clone()) };
        world.take(&Action { at: cluster.id.clone(), step: join }).unwrap();
    }
    world.take(&Action { at: sequencer, step: begin }).unwrap();
    let mut drivers: Vec<Driver> = goals.iter().map(|goal| Driver::new(*goal)).collect();
    let mut late = Vec::new();
    for moves in 0..MOVES_MAX {
        chance.orderly = moves >= DISORDER;
        let driver = chance.below(drivers.len());
        match chance.below(8) {
            0..=3 => drivers[driver].act(&mut world, &mut late, &mut chance),
            4 | 5 => world.work(&mut chance),
            6 => world.write(&mut chance),
            _ if !late.is_empty() => {
                let action = late[chance.below(late.len())].clone();
                // What comes late may be refused, or taken once more.
                let _ = world.take(&action);
                if chance.one_in(2) {
                    late.retain(|kept| *kept != action);
                }
            }
            _ if !chance.orderly && chance.one_in(20) => {
                // Killed, and started again somewhere.
                drivers[driver] = Driver::new(drivers[driver].hints.goal);
            }
            _ => {}
        }
        world.check();
        if chance.orderly && moves % END_EVERY == 0 {
            let end = Scene::of(&world.views());
            if let Scene::Quiet { ring, settled: Some(true) } = end {
                world.check_end(&ring);
                return ring;
            }
        }
    }
    panic!("seed {seed}: the change never ends: {:#?}", world.views());
}

fn kinds() -> Vec<(Ring, Ring)> {
    let three = ring(1, &[("a", 1.0), ("b", 1.0), ("c", 1.0)]);
    let next = |request| next_ring(&three, &request).unwrap();
    let added = next(Request::Add(testing::cluster("d", 1.0)));
    let removed = next(Request::Remove(id("c")));
    let handed_over = next(Request::Remove(id("a")));
    let heavier = next(Request::Weight(id("b"), 3.0));
    let lighter = next(Request::Weight(id("c"), 0.2));
    [added, removed, handed_over, heavier, lighter].map(|next| (three.clone(), next)).into()
}

#[test]
fn a_change_comes_to_its_end_whatever_is_lost_late_or_repeated() {
    for (old, next) in kinds() {
        for seed in 0..SEEDS {
            let end = run(seed, &old, &next, &[Goal::Forward, Goal::Forward]);
            assert_eq!(end, next, "seed {seed}");
        }
    }
}

/// Going on and calling off at the same time: one of them wins everywhere, and nothing hangs between.
#[test]
fn a_change_that_is_called_off_meanwhile_ends_with_one_ring_or_the_other() {
    let mut ends = BTreeSet::new();
    for (old, next) in kinds() {
        for seed in 0..SEEDS {
            let goals = [Goal::Forward, Goal::Forward, CALL_OFF];
            let end = run(seed, &old, &next, &goals);
            assert!(end == next || end == reverted(&old), "seed {seed}: {end:?}");
            ends.insert(end.epoch);
        }
    }
    assert_eq!(ends, BTreeSet::from([2, 3]), "both happen");
}

#[test]
fn a_change_that_is_called_off_by_all_ends_with_the_old_ring() {
    for (old, next) in kinds() {
        for seed in 0..SEEDS / 4 {
            assert_eq!(run(seed, &old, &next, &[CALL_OFF]), reverted(&old), "seed {seed}");
        }
    }
}

/// Who wishes to call a change off wishes nothing of the one that comes after it, or comes instead.
#[test]
fn a_change_is_called_off_only_by_those_who_mean_it() {
    for (old, next) in kinds() {
        let others = [Goal::Abort { epoch: 1 }, Goal::Abort { epoch: 3 }];
        assert_eq!(run(0, &old, &next, &others), next);
    }
}

/// A destination cancels while its source is frozen already, and then takes over: it knows by itself that
/// the change can only go forward, and goes on, though nobody else can know.
#[test]
fn who_cancelled_and_then_took_over_goes_on() {
    let (old, next) = kinds().remove(1);
    let mut chance = Chance { random: SmallRng::seed_from_u64(3), orderly: true };
    let mut world = World::new(&old, &next, &mut chance);
    let (ring, to) = (Box::new(old.clone()), Box::new(next.clone()));
    let begin = Step::Begin { ring, next: to, plan: pairs(&old, &next) };
    world.take(&Action { at: id("a"), step: begin }).unwrap();
    let mut cancelled = false;
    for _ in 0..MOVES_MAX {
        world.work(&mut chance);
        for action in next_actions(&world.views(), &Hints::new(Goal::Forward)) {
            if matches!(action.step, Step::Activate { .. }) && !cancelled {
                let cancel = Step::Cancel { epoch: 2 };
                world.take(&Action { at: action.at.clone(), step: cancel }).unwrap();
                cancelled = true;
            }
            world.take(&action).unwrap();
        }
        if let Scene::Quiet { ring, settled: Some(true) } = Scene::of(&world.views()) {
            assert!(cancelled && ring == next);
            return world.check_end(&next);
        }
    }
    panic!("the change never ends: {:#?}", world.views());
}

/// A world in which `d` has joined and `a`, the sequencer, has begun the change.
fn joined_and_begun(old: &Ring, next: &Ring, chance: &mut Chance) -> World {
    let mut world = World::new(old, next, chance);
    let join = Step::Join { ring: Box::new(old.clone()) };
    world.take(&Action { at: id("d"), step: join }).unwrap();
    let (ring, to) = (Box::new(old.clone()), Box::new(next.clone()));
    let begin = Step::Begin { ring, next: to, plan: pairs(old, next) };
    world.take(&Action { at: id("a"), step: begin }).unwrap();
    world
}

/// Who comes to call a change off after the first cluster has finished it takes it to its end.
#[test]
fn calling_off_too_late_goes_on() {
    let (old, next) = kinds().remove(0);
    let mut chance = Chance { random: SmallRng::seed_from_u64(5), orderly: true };
    let mut world = joined_and_begun(&old, &next, &mut chance);
    let mut hints = Hints::new(Goal::Forward);
    for _ in 0..MOVES_MAX {
        world.work(&mut chance);
        let mut actions = next_actions(&world.views(), &hints);
        // The pivot's cluster is the first to finish, and nobody else does before it is too late.
        let finish = actions.iter().position(|action| matches!(action.step, Step::Finish { .. }));
        if let Some(finish) = finish.filter(|_| hints.goal == Goal::Forward) {
            hints.goal = CALL_OFF;
            actions = vec![actions.swap_remove(finish)];
        }
        for action in actions {
            world.take(&action).unwrap();
        }
        if let Scene::Quiet { ring, settled: Some(true) } = Scene::of(&world.views()) {
            assert!(hints.goal == CALL_OFF && ring == next);
            return world.check_end(&next);
        }
    }
    panic!("the change never ends: {:#?}", world.views());
}

/// The sequencer leaves, gives away all that it has before others have frozen anything, and is lost: they go on,
/// also with a driver that has never seen it. So they do when its nodes were formed anew.
#[test]
fn others_go_on_without_a_pivot_that_gave_everything_away() {
    others_go_on(None);
    others_go_on(Some(RingState::default()));
}

/// `answer`: what the lost cluster says of itself.
fn others_go_on(answer: Option<RingState>) {
    // By the older hash those who stay give each other keys, too.
    let (mut old, mut next) = kinds().remove(2);
    (old.hash_version, next.hash_version) = (1, 1);
    let mut chance = Chance { random: SmallRng::seed_from_u64(9), orderly: true };
    let mut world = World::new(&old, &next, &mut chance);
    let (ring, to) = (Box::new(old.clone()), Box::new(next.clone()));
    let begin = Step::Begin { ring, next: to, plan: pairs(&old, &next) };
    world.take(&Action { at: id("a"), step: begin }).unwrap();
    let (mut hints, mut gave) = (Hints::new(Goal::Forward), false);
    for _ in 0..MOVES_MAX {
        world.work(&mut chance);
        let mut views = world.views();
        gave |= world.has_given_all(&id("a"));
        if gave {
            match &answer {
                Some(answer) => drop(views.insert(id("a"), answer.clone())),
                None => {
                    hints.gone.insert(id("a"));
                    views.remove(&id("a"));
                }
            }
        }
        for action in next_actions(&views, &hints) {
            let freezes = matches!(action.step, Step::Freeze { .. });
            let from = action.step.handoff().map(|handoff| handoff.from.clone());
            if !freezes || gave || from == Some(id("a")) {
                world.take(&action).unwrap();
            }
        }
        if let Scene::Quiet { ring, settled: Some(true) } = Scene::of(&views) {
            assert_eq!(ring, next);
            assert!(gave && world.views()[&id("a")].change.is_some(), "it was never left behind");
            return;
        }
    }
    panic!("the change never ends: {:#?}", world.views());
}

/// An attempt that took too long while it was frozen is followed by one that freezes later.
#[test]
fn later_attempts_freeze_with_less_left() {
    assert_eq!([0, 1, 2, 3, 4, 99, u64::MAX].map(freeze_lag), [512, 512, 256, 128, 64, 64, 64]);
}

#[test]
fn nothing_but_the_pivot_freezes_before_it_is_active() {
    let (old, next) = kinds().remove(0);
    let mut chance = Chance { random: SmallRng::seed_from_u64(7), orderly: true };
    let mut world = joined_and_begun(&old, &next, &mut chance);
    let mut hints = Hints::new(Goal::Forward);
    let mut frozen_first = None;
    for _ in 0..MOVES_MAX {
        world.work(&mut chance);
        hints.overdue.clear();
        for action in next_actions(&world.views(), &hints) {
            if let Step::Freeze { handoff, .. } = &action.step {
                frozen_first.get_or_insert(handoff.from.clone());
                let active = world.is_active(&id("a"), &id("d"));
                assert!(handoff.from == id("a") || active, "{handoff} freezes before the pivot");
            }
            world.take(&action).unwrap();
        }
        if matches!(Scene::of(&world.views()), Scene::Quiet { settled: Some(true), .. }) {
            assert_eq!(frozen_first, Some(id("a")));
            return;
        }
    }
    panic!("the change never ends");
}
