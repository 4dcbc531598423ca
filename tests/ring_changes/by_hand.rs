//! A change taken step by step, with processes killed at each of them.
//!
//! The gates of [`Clusters::gated`] keep the nodes from driving, so the test proposes each step: the one
//! that the nodes' own driver would propose, [`next_actions`], one at a time. Copying, counting and
//! deleting, which the nodes do by themselves, go on meanwhile and are cut in their middle. Clients
//! write and read all the time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use distrib_kv_store::handoff::{Refused, Step, pairs};
use distrib_kv_store::reshard::{
    Action, Goal, Hints, Request, Scene, next_actions, next_ring, reverted,
};
use distrib_kv_store::ring::Ring;

use crate::common::cluster::splitmix;
use crate::common::clusters::{CHANGE_PATIENCE, Clusters, id, post_step};
use crate::common::ring_load::{LoadOptions, RingLoad};
use crate::{CALLER_TIMEOUT, ONE_AT_A_TIME, SMALL_PAGES};

/// When processes are killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kill {
    /// After each step, one process after the other, each restarted before the next is killed.
    EachInTurn,
    /// After each step, all at once.
    AllAtOnce,
    /// While the step is under way, whoever takes it: before it is in the log, before it is applied, or
    /// before the answer.
    WhoeverTakesIt,
}

/// Somebody who takes a change through by hand.
struct Hand {
    clusters: Clusters,
    kill: Kill,
    random: u64,
    /// How often each step was proposed here.
    proposed: BTreeMap<&'static str, u32>,
    kills: u32,
}

impl Hand {
    fn new(clusters: Clusters, kill: Kill, seed: u64) -> Self {
        Self { clusters, kill, random: splitmix(seed), proposed: BTreeMap::new(), kills: 0 }
    }

    fn below(&mut self, end: usize) -> usize {
        self.random = splitmix(self.random);
        (self.random % end as u64) as usize
    }

    /// Begins the change to `next`: again, until the sequencer has said that it did.
    fn begin(&mut self, ring: &Ring, next: &Ring) {
        let begin = Step::Begin {
            ring: Box::new(ring.clone()),
            next: Box::new(next.clone()),
            plan: pairs(ring, next),
        };
        let action = Action { at: ring.sequencer.clone().unwrap(), step: begin };
        let deadline = Instant::now() + CHANGE_PATIENCE;
        while self.take(&action) != Some(Ok(())) {
            assert!(Instant::now() < deadline, "the sequencer does not begin");
        }
    }

    /// Takes the change to its end, or until it is time for another goal: after `steps_max` steps.
    fn go(&mut self, goal: Goal, steps_max: usize) {
        let deadline = Instant::now() + CHANGE_PATIENCE;
        let mut steps = 0;
        while steps < steps_max {
            assert!(
                Instant::now() < deadline,
                "the change does not end: {:?}",
                self.clusters.views()
            );
            let Some(views) = self.clusters.views() else { continue };
            if matches!(Scene::of(&views), Scene::Quiet { settled: Some(true), .. }) {
                return;
            }
            let mut actions = next_actions(&views, &Hints::new(goal));
            if actions.is_empty() {
                // Keys are being copied, counted or deleted.
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            let action = actions.swap_remove(self.below(actions.len()));
            let calls_off = matches!(goal, Goal::Abort { .. });
            if self.take(&action) == Some(Err(Refused::TooLate)) && calls_off {
                return self.go(Goal::Forward, usize::MAX);
            }
            steps += 1;
        }
    }

    /// Proposes the step, with kills. `None`: what came of it is not known.
    fn take(&mut self, action: &Action) -> Option<Result<(), Refused>> {
        let place = (0..self.clusters.len()).find(|place| id(*place) == action.at).unwrap();
        let result = match self.kill {
            Kill::WhoeverTakesIt => {
                let (http, step) =
                    (self.clusters.at(place).http(1).to_owned(), action.step.clone());
                let taking = std::thread::spawn(move || post_step(&http, &step));
                // A step takes about 2 ms, and as long again for each cluster that has to confirm it.
                let pause = self.below(10_000) as u64;
                std::thread::sleep(Duration::from_micros(pause));
                self.kill9(place);
                self.restart(place);
                taking.join().unwrap()
            }
            _ => self.clusters.step(&action.at, &action.step),
        };
        *self.proposed.entry(action.step.name()).or_default() += 1;
        match self.kill {
            Kill::EachInTurn => (0..self.clusters.len()).for_each(|place| {
                self.kill9(place);
                self.restart(place);
            }),
            Kill::AllAtOnce => {
                (0..self.clusters.len()).for_each(|place| self.kill9(place));
                (0..self.clusters.len()).for_each(|place| self.restart(place));
            }
            Kill::WhoeverTakesIt => {}
        }
        result.map(|answer| answer.map(drop))
    }

    fn kill9(&mut self, place: usize) {
        self.clusters.at_mut(place).kill9(1);
        self.kills += 1;
    }

    fn restart(&mut self, place: usize) {
        self.clusters.at_mut(place).restart(1);
        self.clusters.at(place).await_ready();
    }
}

/// Runs a change under load to its end, and checks everything then.
fn story(
    members: usize,
    standby: usize,
    request: impl Fn(&Clusters) -> Request,
    kill: Kill,
    seed: u64,
) {
    story_with_abort(members, standby, request, kill, seed, None);
}

/// The same, called off after so many steps if that is given. Returns the ring in the end, and the one
/// that was changed to.
fn story_with_abort(
    members: usize,
    standby: usize,
    request: impl Fn(&Clusters) -> Request,
    kill: Kill,
    seed: u64,
    abort_after: Option<usize>,
) -> (Ring, Ring) {
    let _turn = ONE_AT_A_TIME.blocking_lock();
    let clusters = Clusters::gated(members + standby, members, SMALL_PAGES);
    let old = clusters.ring();
    let next = next_ring(&old, &request(&clusters)).unwrap();
    let options = LoadOptions { timeout: CALLER_TIMEOUT, tasks: 4, seed, ..Default::default() };
    let load = RingLoad::start(clusters.endpoints(), options);
    let mut hand = Hand::new(clusters, kill, seed);
    hand.begin(&old, &next);
    if let Some(steps) = abort_after {
        hand.go(Goal::Forward, steps);
        hand.go(Goal::Abort { epoch: next.epoch }, usize::MAX);
    }
    hand.go(Goal::Forward, usize::MAX);
    if !load.has_failed() {
        load.await_more("after the change", 200);
    }
    let outcome = load.stop();
    let ring = hand.clusters.ring();
    println!(
        "{kill:?}, seed {seed}: {} kills, {:?}, {} operations, longest {:?}",
        hand.kills, hand.proposed, outcome.operations, outcome.longest
    );
    if abort_after.is_none() {
        assert_eq!(ring, next, "seed {seed}");
        let steps =
            ["begin", "prepare", "open", "freeze", "activate", "release", "finish", "settle"];
        assert!(steps.iter().all(|step| hand.proposed.contains_key(step)), "{:?}", hand.proposed);
    }
    hand.clusters.check(&outcome.expected);
    (ring, next)
}

fn heavier(_: &Clusters) -> Request {
    Request::Weight(id(1), 3.0)
}

/// The sequencer leaves, so that its role moves, too.
fn without_the_sequencer(_: &Clusters) -> Request {
    Request::Remove(id(0))
}

fn one_more(clusters: &Clusters) -> Request {
    Request::Add(clusters.listed(2, 1.0))
}

/// Each process is killed with -9 after each step of a handoff, in turn: the change comes to the same
/// end, no acknowledged write is lost or done twice, no key is in two places.
#[test]
fn every_process_is_killed_in_turn_after_every_step() {
    story(2, 0, heavier, Kill::EachInTurn, 11);
}

/// The same with all processes at once, while the sequencer's cluster leaves.
#[test]
fn all_processes_are_killed_at_once_after_every_step() {
    story(2, 0, without_the_sequencer, Kill::AllAtOnce, 12);
}

/// A cluster joins, and whoever takes a step is killed while it takes it: the step may be taken or not,
/// and the change comes to its end.
#[test]
fn whoever_takes_a_step_is_killed_meanwhile() {
    story(2, 1, one_more, Kill::WhoeverTakesIt, 13);
}

/// A change is called off after few, some and many steps, with kills: one ring or the other is in force
/// everywhere in the end, the old one if nothing can have been frozen yet, and nothing of the other is left.
#[test]
fn a_change_is_called_off_at_any_step_with_kills() {
    for (seed, steps) in [(21, 2), (22, 10), (23, 25)] {
        let (ring, next) =
            story_with_abort(2, 1, one_more, Kill::WhoeverTakesIt, seed, Some(steps));
        let old = Ring { epoch: 1, clusters: ring.clusters[..2].to_vec(), ..ring.clone() };
        let called_off = ring == reverted(&old);
        assert!(called_off || (ring == next && steps > 2), "seed {seed}: {ring:?}");
    }
}
