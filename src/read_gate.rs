//! ReadIndex rounds, shared by all reads that wait for one.
//!
//! A linearizable read must learn, after it arrived, that this node still leads and how far the log
//! was committed (Raft dissertation, 6.4). That costs a round of heartbeats. One round can vouch for
//! every read that arrived before it started, so the gate runs one after the other: reads that come
//! while a round is under way wait for the next. No read ever uses a round that began before it.

use std::time::Duration;

use openraft::errors::{LinearizableReadError, RaftError};
use openraft::raft::ReadPolicy;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::node::Raft;
use crate::types::{LogId, TypeConfig};

/// Why there is no read index.
pub type ReadIndexFailure = RaftError<TypeConfig, LinearizableReadError<TypeConfig>>;
type Waiter = oneshot::Sender<Result<LogId, ReadIndexFailure>>;

/// The most reads that one round vouches for; the queue is as long. More wait in their callers, whose
/// number the app bounds.
const ROUND_READS_MAX: usize = 4096;

/// Between a failed round and the next one. Far below an election, so that a read which waits for one
/// loses nothing, and enough to keep retries from using up a core.
const FAILED_ROUND_PAUSE: Duration = Duration::from_millis(2);

/// Hands out read indexes. Cloning shares the rounds; the task ends when the last clone goes.
#[derive(Clone)]
pub struct ReadGate {
    queue: mpsc::Sender<Waiter>,
}

impl ReadGate {
    /// Starts the task that runs the rounds. It ends once all clones are dropped and Raft has ended the
    /// last round; join the handle then.
    pub fn spawn(raft: Raft) -> (Self, JoinHandle<()>) {
        let (queue, waiting) = mpsc::channel(ROUND_READS_MAX);
        (Self { queue }, tokio::spawn(run(raft, waiting)))
    }

    /// The log id that must be applied before a read that arrived before this call is linearizable.
    ///
    /// Cancel safe. `None` when the node stops or the deadline passes.
    pub async fn read_index(&self, deadline: Instant) -> Option<Result<LogId, ReadIndexFailure>> {
        let (sender, receiver) = oneshot::channel();
        let answer = async {
            self.queue.send(sender).await.ok()?;
            receiver.await.ok()
        };
        tokio::time::timeout_at(deadline, answer).await.ok().flatten()
    }
}

async fn run(raft: Raft, mut waiting: mpsc::Receiver<Waiter>) {
    let mut round = Vec::new();
    while waiting.recv_many(&mut round, ROUND_READS_MAX).await > 0 {
        // Whoever gave up meanwhile needs no round.
        round.retain(|waiter| !waiter.is_closed());
        if round.is_empty() {
            continue;
        }
        let result = raft.get_read_linearizer(ReadPolicy::ReadIndex).await;
        let failed = result.is_err();
        let answer = result.map(|linearizer| *linearizer.read_log_id().log_id());
        for waiter in round.drain(..) {
            // Whoever gave up since needs no answer either.
            let _ = waiter.send(answer.clone());
        }
        if failed {
            // A node that cannot lead fails at once: without a pause its callers' retries would spin.
            tokio::time::sleep(FAILED_ROUND_PAUSE).await;
        }
    }
}
