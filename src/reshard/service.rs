//! In every node: a change of the ring goes on by itself.
//!
//! The leader of a cluster that gives keys away, or is the sequencer of the ring or of the next one, runs
//! the driver ([`super::run`]): for the handoffs of which its cluster is the source, and as a sequencer for
//! the whole change; a source that leaves also finishes when others have gone on without it. So whoever began the change may be killed at any moment. When nothing runs it
//! costs a look at this node's own state, four times a second.
//!
//! A leader that loses its office stops driving within a look; until then two drive, which is allowed.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::config::ReshardConfig;
use crate::handoff::RingState;
use crate::node::Raft;
use crate::ring::RingCluster;
use crate::store::StateReader;
use crate::types::ClusterId;

use super::clusters::HttpClusters;
use super::driver::Goal;
use super::run::{Drive, Role};
use super::scene::{Views, mentioned};

/// Between two looks at this node's own state: what a killed driver adds to the length of a change.
const INTERVAL: Duration = Duration::from_millis(250);

/// Starts the service. It ends with `shutdown`.
pub fn spawn(
    cluster: ClusterId,
    raft: Raft,
    reader: StateReader,
    config: &ReshardConfig,
    shutdown: CancellationToken,
) -> JoinHandle<()> {
    let at_once_max = config.handoffs_at_once;
    tokio::spawn(async move {
        let service = Service { cluster, raft, reader, at_once_max, clusters: Arc::default() };
        shutdown.run_until_cancelled(service.run()).await;
    })
}

struct Service {
    cluster: ClusterId,
    raft: Raft,
    reader: StateReader,
    at_once_max: usize,
    clusters: Arc<HttpClusters>,
}

impl Service {
    async fn run(&self) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            if let Some(role) = self.office() {
                self.drive(role).await;
            }
        }
    }

    /// Drives until nothing is left to do, or it is somebody else's to do.
    async fn drive(&self, role: Role) {
        tracing::info!(?role, "a change of the ring goes on");
        let views = Views::from([(self.cluster.clone(), self.reader.ring_state())]);
        // A source's leader learns from there whom its handoffs concern.
        let is_asked = |cluster: &RingCluster| match &role {
            Role::Source(own) => cluster.id == *own,
            _ => true,
        };
        let known = mentioned(&views).into_values().filter(is_asked);
        let drive = Drive::new(&*self.clusters, known, role.clone(), Goal::Forward);
        // Others may have finished without it.
        let mut drive = drive.at_once(self.at_once_max).until_back(self.cluster.clone());
        tokio::select! {
            ended = drive.run(|_, _| {}) => match ended {
                Ok(_) => tracing::info!("the change of the ring is finished"),
                Err(error) => tracing::warn!(%error, "the change of the ring does not go on"),
            },
            () = self.dismissed(&role) => {}
        }
    }

    async fn dismissed(&self, role: &Role) {
        while self.office().as_ref() == Some(role) {
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// What there is to drive for this node, if anything.
    fn office(&self) -> Option<Role> {
        let leads = {
            let metrics = self.raft.metrics();
            metrics.borrow_watched().state == openraft::ServerState::Leader
        };
        leads.then(|| role_of(&self.cluster, &self.reader.ring_state())).flatten()
    }
}

/// What the leader of a cluster in this state has to drive.
fn role_of(own: &ClusterId, state: &RingState) -> Option<Role> {
    let of_ring = state.ring.ring().sequencer.as_ref() == Some(own);
    let Some(change) = &state.change else {
        let unsettled = of_ring && !state.settling.is_empty();
        return unsettled.then(|| Role::Sequencer(own.clone()));
    };
    if of_ring || change.next.ring().sequencer.as_ref() == Some(own) {
        return Some(Role::Sequencer(own.clone()));
    }
    (!change.outgoing.is_empty()).then(|| Role::Source(own.clone()))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{id, ring};
    use super::*;
    use crate::handoff::{Change, Course, Outgoing, pairs};
    use crate::ring::RingTable;

    fn state(own: &str) -> RingState {
        let old = ring(1, &[("a", 1.0), ("b", 1.0)]);
        let next = ring(2, &[("b", 1.0), ("c", 1.0)]);
        let plan = pairs(&old, &next);
        let gives = plan.iter().filter(|pair| pair.from == id(own));
        let mut state = RingState::with_ring(RingTable::new(old).unwrap());
        state.change = Some(Change {
            outgoing: gives.map(|pair| (pair.to.clone(), Outgoing::default())).collect(),
            incoming: Default::default(),
            next: Arc::new(RingTable::new(next).unwrap()),
            plan,
            course: Course::Open,
        });
        state
    }

    #[test]
    fn both_sequencers_drive_the_whole_and_sources_their_own() {
        assert_eq!(role_of(&id("a"), &state("a")), Some(Role::Sequencer(id("a"))));
        assert_eq!(role_of(&id("b"), &state("b")), Some(Role::Sequencer(id("b"))));
        assert_eq!(role_of(&id("c"), &state("c")), None);
        let mut other = state("b");
        let next = Arc::make_mut(&mut other.change.as_mut().unwrap().next);
        *next = RingTable::new(ring(2, &[("c", 1.0), ("b", 1.0)])).unwrap();
        assert_eq!(role_of(&id("b"), &other), Some(Role::Source(id("b"))));
    }

    #[test]
    fn without_a_change_only_an_unsettled_sequencer_has_work() {
        let two = ring(1, &[("a", 1.0), ("b", 1.0)]);
        let mut state = RingState::with_ring(RingTable::new(two.clone()).unwrap());
        assert_eq!(role_of(&id("a"), &state), None);
        state.settling = two.clusters;
        assert_eq!(role_of(&id("a"), &state), Some(Role::Sequencer(id("a"))));
        assert_eq!(role_of(&id("b"), &state), None);
    }
}
