//! The loop that looks and proposes, against clusters in memory.

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard};
use std::task::Poll;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::world::World;
use super::{CALL_OFF, Chance, MOVES_MAX, id, kinds};
use crate::client_error::ClientError;
use crate::handoff::{Done, RingState, Step, pairs};
use crate::reshard::request::{called_off, followed};
use crate::reshard::{
    Action, Awaited, ChangeError, Clusters, Drive, DriveError, Fate, Goal, Hints, Role, Scene,
    Transition, Views, next_actions, reverted,
};
use crate::ring::{Ring, RingCluster};
use crate::types::ClusterId;

/// Portions of work that the clusters do between two looks.
const WORK: usize = 10;

/// Whether it is time for a cluster to die.
type Moment = fn(&World, &ClusterId) -> bool;

struct InMemory {
    inner: Mutex<(World, Chance)>,
    /// The looks that fail before one does not.
    failing: Mutex<usize>,
    /// A cluster that answers so many looks, and then nothing any more.
    dying: Mutex<Option<(ClusterId, usize)>>,
    /// A cluster whose last looks are counted from when this is so.
    giving: Mutex<Option<(ClusterId, usize, Moment)>>,
    /// What follows in the very step that records a change as finished, before anybody looks again.
    sequel: Mutex<Option<Sequel>>,
}

/// How far another change is when somebody looks again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sequel {
    /// It has begun.
    Begun,
    /// It is over, too.
    Over,
}

impl InMemory {
    /// The change has begun at the sequencer, and nowhere else.
    fn new(old: &Ring, next: &Ring) -> Self {
        let mut chance = Chance { random: SmallRng::seed_from_u64(1), orderly: true };
        let mut world = World::new(old, next, &mut chance);
        for cluster in next.clusters.iter().filter(|cluster| old.cluster(&cluster.id).is_none()) {
            let step = Step::Join { ring: Box::new(old.clone()) };
            world.take(&Action { at: cluster.id.clone(), step }).unwrap();
        }
        let (ring, to) = (Box::new(old.clone()), Box::new(next.clone()));
        let step = Step::Begin { ring, next: to, plan: pairs(old, next) };
        world.take(&Action { at: old.sequencer.clone().unwrap(), step }).unwrap();
        Self {
            inner: Mutex::new((world, chance)),
            failing: Mutex::new(0),
            dying: Mutex::new(None),
            giving: Mutex::new(None),
            sequel: Mutex::new(None),
        }
    }

    /// Begins a change of this ring's weights at its sequencer.
    fn begin_another(&self, ring: &Ring) -> Ring {
        let mut later = ring.clone();
        later.epoch += 1;
        later.clusters[0].weight *= 2.0;
        let (old, next) = (Box::new(ring.clone()), Box::new(later.clone()));
        let step = Step::Begin { ring: old, next, plan: pairs(ring, &later) };
        self.lock().0.take(&Action { at: ring.sequencer.clone().unwrap(), step }).unwrap();
        later
    }

    /// Goes on between two looks until something holds.
    fn advance(&self, goal: Goal, holds: impl Fn(&World) -> bool) {
        let (world, chance) = &mut *self.lock();
        for _ in 0..MOVES_MAX {
            world.work(chance);
            for action in next_actions(&world.views(), &Hints::new(goal)) {
                if holds(world) {
                    return;
                }
                world.take(&action).unwrap();
            }
            if holds(world) {
                return;
            }
        }
        panic!("it never holds: {:#?}", world.views());
    }

    /// Takes the change under way to its end between two looks.
    fn complete(&self, goal: Goal) -> Ring {
        let is_settled = |scene| matches!(scene, Scene::Quiet { settled: Some(true), .. });
        self.advance(goal, |world| is_settled(Scene::of(&world.views())));
        Scene::of(&self.lock().0.views()).ring().unwrap().clone()
    }

    /// Another change of this ring; returns the one that it leads to.
    fn follow_up(&self, ring: &Ring, sequel: Sequel) -> Ring {
        let later = self.begin_another(ring);
        if sequel == Sequel::Over {
            assert_eq!(self.complete(Goal::Forward), later);
        }
        later
    }

    fn check_alive(&self, cluster: &RingCluster) -> Result<(), ClientError> {
        match &mut *self.dying.lock().unwrap() {
            Some((id, 0)) if *id == cluster.id => {
                Err(ClientError::Unreachable { tried: Vec::new() })
            }
            Some((id, looks)) if *id == cluster.id => {
                *looks -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn count_down(&self) {
        let mut giving = self.giving.lock().unwrap();
        if let Some((id, looks, has_come)) = &*giving
            && has_come(&self.lock().0, id)
        {
            *self.dying.lock().unwrap() = Some((id.clone(), *looks));
            *giving = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, (World, Chance)> {
        self.inner.lock().unwrap()
    }
}

impl Clusters for InMemory {
    async fn view(&self, cluster: &RingCluster) -> Result<RingState, ClientError> {
        {
            let mut failing = self.failing.lock().unwrap();
            if *failing > 0 {
                *failing -= 1;
                return Err(ClientError::Unreachable { tried: vec!["nobody is there".into()] });
            }
        }
        self.check_alive(cluster)?;
        let (world, chance) = &mut *self.lock();
        (0..WORK).for_each(|_| world.work(chance));
        Ok(world.views()[&cluster.id].clone())
    }

    async fn step(&self, cluster: &RingCluster, step: &Step) -> Result<Done, ClientError> {
        self.check_alive(cluster)?;
        let action = Action { at: cluster.id.clone(), step: step.clone() };
        let taken = self.lock().0.take(&action);
        self.count_down();
        if taken.is_ok()
            && let Step::Settle { .. } = step
            && let Some(sequel) = self.sequel.lock().unwrap().take()
        {
            let ring = self.lock().0.views()[&cluster.id].ring.ring().clone();
            self.follow_up(&ring, sequel);
        }
        taken.map_err(|refused| ClientError::StepRefused(Box::new(refused)))
    }
}

/// It learns of the other clusters from the one that it is told of, and gets over looks that fail.
#[tokio::test]
async fn a_driver_alone_brings_a_change_to_its_end() {
    for (old, next) in kinds() {
        let clusters = InMemory::new(&old, &next);
        *clusters.failing.lock().unwrap() = 3;
        let known = [old.clusters[0].clone()];
        let mut drive = Drive::new(&clusters, known, Role::Alone, Goal::Forward);
        let mut seen = 0;
        let end = drive.run(|progress, _| seen += usize::from(progress.is_some())).await.unwrap();
        assert_eq!(end, Scene::Quiet { ring: next.clone(), settled: Some(true) });
        assert!(seen > 0, "progress is told");
        clusters.lock().0.check_end(&next);
    }
}

#[tokio::test]
async fn a_driver_alone_calls_a_change_off() {
    let (old, next) = kinds().remove(0);
    let clusters = InMemory::new(&old, &next);
    let mut drive = Drive::new(&clusters, old.clusters.clone(), Role::Alone, CALL_OFF);
    let end = drive.run(|_, _| {}).await.unwrap();
    assert_eq!(end, Scene::Quiet { ring: reverted(&old), settled: Some(true) });
}

fn awaited(old: &Ring, next: &Ring) -> Awaited {
    Awaited::change(&Transition::new(old, next, &Views::new()))
}

/// Another change begins in the very step that ends one: whoever wished to call that one off, in time or too
/// late, leaves the other alone, and whoever waited for it is told what became of it.
#[tokio::test]
async fn who_drives_a_change_leaves_the_next_one_alone() {
    let (old, next) = kinds().remove(0);
    for sequel in [Sequel::Begun, Sequel::Over] {
        for (decided, goal, fate) in [
            (false, CALL_OFF, Fate::CalledOff),
            (true, CALL_OFF, Fate::Done),
            (false, Goal::Forward, Fate::Done),
        ] {
            let at = format!("{sequel:?}, {goal:?}, decided: {decided}");
            let clusters = InMemory::new(&old, &next);
            let drive = |goal| Drive::new(&clusters, old.clusters.clone(), Role::Alone, goal);
            if decided {
                // The pivot's cluster refuses nothing any more: it is through with the change.
                clusters.advance(Goal::Forward, |world| world.views()[&id("a")].epoch() == 2);
            }
            *clusters.sequel.lock().unwrap() = Some(sequel);
            let mut drive = drive(goal)
                .awaiting(Some(awaited(&old, &next)))
                .stalled_after(Duration::from_secs(20));
            let end = drive.run(|_, _| {}).await.unwrap();
            let awaited = drive.awaited().unwrap();
            assert_eq!(awaited.fate(), Some(fate), "{at}");

            let before = if fate == Fate::Done { &next } else { awaited.off() };
            let Scene::Changing(later) = &end else { panic!("{at}: {end:?}") };
            assert_eq!(later.old, *before, "{at}: it was not the next change that was seen");
            let ring = clusters.complete(Goal::Forward);
            assert_eq!(ring.epoch, before.epoch + 1, "{at}: the next change was called off");
            clusters.lock().0.check_end(&ring);
        }
    }
}

/// A change ends and another begins, or is over, too, between two looks of somebody who only watches: what
/// became of the first is what was seen of it, and not guessed.
#[tokio::test]
async fn who_watches_tells_only_what_was_seen_of_the_end() {
    let (old, next) = kinds().remove(0);
    for (goal, sequel, fate) in [
        (Goal::Forward, Sequel::Begun, Some(Fate::Done)),
        (Goal::Forward, Sequel::Over, Some(Fate::Done)),
        (CALL_OFF, Sequel::Begun, Some(Fate::CalledOff)),
        (CALL_OFF, Sequel::Over, None),
    ] {
        let at = format!("{goal:?}, {sequel:?}");
        let clusters = InMemory::new(&old, &next);
        let known = old.clusters.clone();
        let mut watcher = Drive::new(&clusters, known, Role::Onlooker, Goal::Forward)
            .awaiting(Some(awaited(&old, &next)))
            .stalled_after(Duration::from_secs(20));
        let is_seen = Cell::new(false);
        tokio::select! {
            biased;
            () = once(|| is_seen.get()) => {}
            ended = watcher.run(|_, views| is_seen.set(views.len() == 4)) => panic!("{at}: {ended:?}"),
        }
        let ring = clusters.complete(goal);
        let later = clusters.follow_up(&ring, sequel);
        let end = watcher.run(|_, _| {}).await.unwrap();
        let now = if sequel == Sequel::Over { &later } else { &ring };
        assert_eq!(end.ring(), Some(now), "{at}");

        let awaited = watcher.awaited().unwrap();
        assert_eq!(awaited.fate(), fate, "{at}");
        let (followed, called_off) = (followed(awaited, now), called_off(awaited, now));
        match fate {
            Some(Fate::Done) => {
                followed.unwrap();
                let error = called_off.unwrap_err();
                assert!(
                    matches!(error, ChangeError::Drive(DriveError::TooLate(_))),
                    "{at}: {error}"
                );
            }
            Some(Fate::CalledOff) => {
                called_off.unwrap();
                let error = followed.unwrap_err();
                assert!(matches!(error, ChangeError::CalledOff { epoch: 3 }), "{at}: {error}");
            }
            None => {
                for error in [followed.unwrap_err(), called_off.unwrap_err()] {
                    let is_unknown = matches!(error, ChangeError::Unknown { epoch: 2, now: 4 });
                    assert!(is_unknown, "{at}: {error}");
                }
            }
        }
    }
}

/// A cluster that was to join, has been seen under way and is lost does not hold up calling the change off, nor
/// the next change. It may come back after that, and then it is brought where it can join anew.
#[tokio::test]
async fn a_joiner_that_is_lost_is_not_waited_for_and_can_come_back() {
    let (old, next) = kinds().remove(0);
    let joiner = next.clusters.iter().find(|c| old.cluster(&c.id).is_none()).unwrap().clone();
    for looks in [2, 3, 4, 6] {
        let clusters = InMemory::new(&old, &next);
        *clusters.dying.lock().unwrap() = Some((joiner.id.clone(), looks));
        let mut drive = Drive::new(&clusters, next.clusters.clone(), Role::Alone, CALL_OFF)
            .gone_after(Duration::from_millis(100))
            .stalled_after(Duration::from_secs(20));
        let end = drive.run(|_, _| {}).await.unwrap();
        let off = reverted(&old);
        assert_eq!(end, Scene::Quiet { ring: off.clone(), settled: Some(true) }, "{looks} looks");

        let later = clusters.begin_another(&off);
        let mut drive = Drive::new(&clusters, old.clusters.clone(), Role::Alone, Goal::Forward)
            .gone_after(Duration::from_millis(100))
            .stalled_after(Duration::from_secs(20));
        let end = drive.run(|_, _| {}).await.unwrap();
        assert_eq!(end, Scene::Quiet { ring: later.clone(), settled: Some(true) }, "{looks} looks");

        *clusters.dying.lock().unwrap() = None;
        let mut known = later.clusters.clone();
        known.push(joiner.clone());
        let mut drive = Drive::new(&clusters, known, Role::Alone, Goal::Forward)
            .until_back(joiner.id.clone())
            .gone_after(Duration::from_millis(100))
            .stalled_after(Duration::from_secs(20));
        let end = drive.run(|_, _| {}).await.unwrap();
        assert_eq!(end, Scene::Quiet { ring: later.clone(), settled: Some(true) }, "{looks} looks");
        let views = clusters.lock().0.views();
        assert!(views[&joiner.id].change.is_none(), "{looks} looks: it is still in the old change");
        let step = Step::Join { ring: Box::new(later) };
        clusters.lock().0.take(&Action { at: joiner.id.clone(), step }).unwrap();
    }
}

/// When a cluster comes back that left and was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Back {
    /// When the change by which it left has ended without it.
    AfterItsChange,
    /// In the middle of the next one.
    DuringTheNext,
    /// After that.
    AfterTheNext,
}

/// A cluster that leaves and is lost once others serve all that it had holds up neither this change nor the next.
/// It may come back at any time after that: then it gets out by itself, empty, and can be added again.
#[tokio::test]
async fn a_leaver_that_is_lost_is_not_waited_for_and_can_come_back() {
    // c leaves, and a, the sequencer; by the older hash others give each other keys, too, for which nothing is
    // frozen yet when the pivot is lost.
    for (kind, left, hash_version) in [(1, id("c"), 2), (2, id("a"), 2), (2, id("a"), 1)] {
        let (mut old, mut next) = kinds().remove(kind);
        (old.hash_version, next.hash_version) = (hash_version, hash_version);
        for looks in [0, 1, 2, 5] {
            for back in [Back::AfterItsChange, Back::DuringTheNext, Back::AfterTheNext] {
                lost_and_back(&old, &next, &left, looks, back).await;
            }
        }
    }
}

/// Is over when `holds` does, each time that whoever it is selected with has had a turn.
fn once(holds: impl Fn() -> bool) -> impl Future<Output = ()> {
    std::future::poll_fn(move |_| if holds() { Poll::Ready(()) } else { Poll::Pending })
}

async fn lost_and_back(old: &Ring, next: &Ring, left: &ClusterId, looks: usize, back: Back) {
    let at = format!("{left}, {looks} looks, {back:?}");
    let clusters = InMemory::new(old, next);
    *clusters.giving.lock().unwrap() = Some((left.clone(), looks, |world, id| {
        world.given(id).is_some_and(|(active, all)| active == all)
    }));
    let drive = |known: Vec<RingCluster>, role| {
        Drive::new(&clusters, known, role, Goal::Forward)
            .gone_after(Duration::from_millis(100))
            .stalled_after(Duration::from_secs(20))
    };
    // Whoever drives until then has seen more than who comes later.
    let mut first = drive(old.clusters.clone(), Role::Alone);
    tokio::select! {
        biased;
        () = once(|| clusters.giving.lock().unwrap().is_none()) => {}
        ended = first.run(|_, _| {}) => assert!(looks > 0, "{at}: {ended:?}"),
    }
    let end = drive(old.clusters.clone(), Role::Alone).run(|_, _| {}).await.unwrap();
    assert_eq!(end, Scene::Quiet { ring: next.clone(), settled: Some(true) }, "{at}");
    let is_in_change = || clusters.lock().0.views()[left].change.is_some();
    assert!(is_in_change() || looks > 0, "{at}: it had finished");

    // As its own leader would drive it.
    let role = match old.sequencer.as_ref() == Some(left) {
        true => Role::Sequencer(left.clone()),
        false => Role::Source(left.clone()),
    };
    let known = old.clusters.iter().filter(|cluster| cluster.id == *left).cloned().collect();
    let mut own = drive(known, role).until_back(left.clone());
    let revive = || *clusters.dying.lock().unwrap() = None;
    if back == Back::AfterItsChange {
        revive();
        own.run(|_, _| {}).await.unwrap();
        assert!(!is_in_change(), "{at}");
    }
    let later = clusters.begin_another(next);
    if back == Back::DuringTheNext {
        revive();
        tokio::select! {
            biased;
            () = once(|| !is_in_change()) => {}
            ended = own.run(|_, _| {}) => panic!("{at}: the next change waits: {ended:?}"),
        }
    }
    let end = drive(next.clusters.clone(), Role::Alone).run(|_, _| {}).await.unwrap();
    let quiet = Scene::Quiet { ring: later.clone(), settled: Some(true) };
    assert_eq!(end, quiet, "{at}");
    if back == Back::AfterTheNext {
        revive();
        assert_eq!(own.run(|_, _| {}).await.unwrap(), quiet, "{at}");
    }
    assert!(!is_in_change(), "{at}");
    let mut inner = clusters.lock();
    inner.0.check_end(&later);
    let step = Step::Join { ring: Box::new(later) };
    inner.0.take(&Action { at: left.clone(), step }).unwrap();
}

/// A cluster that leaves and is lost before others serve all that it had is waited for: some keys are with it
/// alone.
#[tokio::test]
async fn a_leaver_that_is_lost_with_some_of_its_keys_is_waited_for() {
    let (old, next) = kinds().remove(1);
    let clusters = InMemory::new(&old, &next);
    *clusters.giving.lock().unwrap() =
        Some((id("c"), 0, |world, id| world.given(id) == Some((1, 2))));
    let mut drive = Drive::new(&clusters, old.clusters.clone(), Role::Alone, Goal::Forward)
        .gone_after(Duration::from_millis(100))
        .stalled_after(Duration::from_secs(2));
    let ended = drive.run(|_, _| {}).await;
    let Err(DriveError::Stalled { trouble, .. }) = ended else { panic!("{ended:?}") };
    assert!(trouble.contains("cluster c: "), "{trouble}");
    assert_eq!(clusters.lock().0.given(&id("c")), Some((1, 2)));
}

/// Who gives up says what was in the way.
#[tokio::test]
async fn a_driver_that_gets_nowhere_says_why() {
    let (old, next) = kinds().remove(0);
    let clusters = InMemory::new(&old, &next);
    *clusters.failing.lock().unwrap() = usize::MAX;
    let drive = Drive::new(&clusters, old.clusters.clone(), Role::Alone, Goal::Forward);
    let ended = drive.stalled_after(Duration::from_millis(300)).run(|_, _| {}).await;
    let Err(DriveError::Stalled { trouble, .. }) = ended else { panic!("{ended:?}") };
    assert!(trouble.contains("cluster a: no node can be reached: nobody is there"), "{trouble}");
}
