//! The work that a cluster has with its own part of a change of the ring, done by its leader.
//!
//! Whoever drives a change takes the decisions ([`crate::handoff`]); they are few and small. What they
//! wait for takes long and touches every key, and no driver does it: the cluster concerned does, in the
//! background, and goes on when the driver has gone:
//!
//! | side | while | work |
//! | --- | --- | --- |
//! | destination | `Receiving` | [`receive`]: fetch pages from the source and stage them |
//! | source | `Sending`, not all counted | [`count`]: count what moves, stretch by stretch |
//! | both | `Moved`, or garbage is left | [`clean`]: delete what is of no use any more |
//!
//! **Nothing is kept here.** Where a job goes on is in the cluster's state, which every job looks at
//! anew before each step; what it proposes says from where to where it goes, and is refused at apply if
//! the cluster is elsewhere. So a lost reply, a repeat, another leader that works at the same time and a
//! restart in the middle cost a step at most, and correctness rests on the state machine alone.
//!
//! [`due`] decides what there is to do, without I/O. One task ([`spawn`]) looks around and starts jobs: on
//! the leader, while a change is under way, and else it costs a look every [`IDLE_LOOK`]. A job ends when
//! its work is done, when this node does not lead any more, or when something fails, quietly; the next
//! look starts it again if need be, and that is all the retrying there is. The owner joins the one task,
//! which has joined all jobs by then; any of them can be cancelled at any moment.
//!
//! Bounds: handoffs that copy records side by side and the bytes they copy in a second are configured
//! (`[reshard]`); those that only follow what changes do not wait for either, because their keys are, or
//! are about to be, served by nobody. A job holds one page, or one batch of keys. Copying, counting and
//! cleaning take turns with everything else: each pauses [`crate::config::ReshardConfig::pause_times`] times as long
//! as it works ([`pace`]).

mod clean;
mod count;
mod due;
mod here;
mod pace;
mod receive;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, ReshardConfig};
use crate::network::handoff_links::HandoffLinks;
use crate::node::Raft;
use crate::store::StateReader;
use crate::types::ClusterId;

use here::{Here, Pages, ThisCluster};
use pace::{Breaks, Budget};

/// Between two looks while a change is under way. What a driver has begun starts this late at most, but for
/// a change's first step, which is seen within [`IDLE_LOOK`].
const LOOK: Duration = Duration::from_millis(50);

/// Between two looks otherwise.
const IDLE_LOOK: Duration = Duration::from_millis(200);

/// What an append message and its entry have around the page, in bytes, with plenty of room.
const APPEND_OVERHEAD_BYTES: usize = 1 << 10;

/// Starts the task. It ends, and with it everything that it started, soon after `shutdown`.
pub fn spawn(
    cluster: ClusterId,
    raft: Raft,
    reader: StateReader,
    links: HandoffLinks,
    config: &Config,
    shutdown: CancellationToken,
) -> JoinHandle<()> {
    let here = Arc::new(ThisCluster::new(cluster, raft, reader));
    tokio::spawn(Mover::new(here, Arc::new(links), config).run(shutdown))
}

/// What jobs work with.
#[derive(Clone)]
struct Tools {
    here: Arc<dyn Here>,
    pages: Arc<dyn Pages>,
    budget: Arc<Budget>,
    breaks: Breaks,
    config: ReshardConfig,
    /// The largest import that followers can be sent.
    import_bytes_max: usize,
}

/// One job; never twice at once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Job {
    /// Receive what the cluster of this id gives.
    Receive(ClusterId),
    /// Count what moves away, of one handoff after the other: each stretch is read within the log's turn.
    Count,
    /// Delete what is of no use, of one handoff after the other.
    Clean,
}

/// The task that looks around.
struct Mover {
    tools: Tools,
    tasks: JoinSet<()>,
    running: HashMap<Job, AbortHandle>,
    turns: due::Turns,
}

impl Mover {
    fn new(here: Arc<dyn Here>, pages: Arc<dyn Pages>, config: &Config) -> Self {
        let reshard = config.reshard.clone();
        let tools = Tools {
            here,
            pages,
            budget: Arc::new(Budget::new(reshard.handoff_bytes_per_s)),
            breaks: Breaks::new(reshard.pause_times),
            config: reshard,
            import_bytes_max: config.limits.peer_frame_bytes_max - APPEND_OVERHEAD_BYTES,
        };
        Self { tools, tasks: JoinSet::new(), running: HashMap::new(), turns: due::Turns::default() }
    }

    async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let pause = self.look();
            if shutdown.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                break;
            }
        }
        self.tasks.shutdown().await;
    }

    /// Starts what is due and does not run; says when to look again.
    fn look(&mut self) -> Duration {
        self.reap();
        let here = &self.tools.here;
        let state = here.leads().then(|| here.state());
        let Some(state) = state.filter(|state| state.change.is_some()) else {
            if self.running.is_empty() {
                self.tools.pages.close();
                self.turns = due::Turns::default();
            }
            return IDLE_LOOK;
        };
        let own = here.own().clone();
        let receives = |from: &ClusterId| self.running.contains_key(&Job::Receive(from.clone()));
        let from =
            self.turns.next_sources(&state, &own, receives, self.tools.config.handoffs_at_once);
        from.into_iter().for_each(|from| self.start(Job::Receive(from)));
        if due::next_count(&state, &own).is_some() {
            self.start(Job::Count);
        }
        if !due::to_clean(&state, &own).is_empty() {
            self.start(Job::Clean);
        }
        LOOK
    }

    fn start(&mut self, job: Job) {
        if self.running.contains_key(&job) {
            return;
        }
        let tools = self.tools.clone();
        let task = match job.clone() {
            Job::Receive(from) => self.tasks.spawn(receive::run(tools, from)),
            Job::Count => self.tasks.spawn(count::run(tools)),
            Job::Clean => self.tasks.spawn(clean::run(tools)),
        };
        self.running.insert(job, task);
    }

    /// Forgets the jobs that have ended.
    fn reap(&mut self) {
        // A panic has been reported by the panic hook, and the job is started again.
        while self.tasks.try_join_next().is_some() {}
        self.running.retain(|_, task| !task.is_finished());
    }
}
