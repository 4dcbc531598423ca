//! The loop that looks and proposes, against clusters in memory.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::world::World;
use super::{Chance, kinds};
use crate::client_error::ClientError;
use crate::handoff::{Done, RingState, Step, pairs};
use crate::reshard::{Action, Clusters, Drive, DriveError, Goal, Role, Scene, reverted};
use crate::ring::{Ring, RingCluster};

/// Portions of work that the clusters do between two looks.
const WORK: usize = 10;

struct InMemory {
    inner: Mutex<(World, Chance)>,
    /// The looks that fail before one does not.
    failing: Mutex<usize>,
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
        Self { inner: Mutex::new((world, chance)), failing: Mutex::new(0) }
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
        let (world, chance) = &mut *self.lock();
        (0..WORK).for_each(|_| world.work(chance));
        Ok(world.views()[&cluster.id].clone())
    }

    async fn step(&self, cluster: &RingCluster, step: &Step) -> Result<Done, ClientError> {
        let action = Action { at: cluster.id.clone(), step: step.clone() };
        let taken = self.lock().0.take(&action);
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
    let mut drive = Drive::new(&clusters, old.clusters.clone(), Role::Alone, Goal::Abort);
    let end = drive.run(|_, _| {}).await.unwrap();
    assert_eq!(end, Scene::Quiet { ring: reverted(&old), settled: Some(true) });
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
