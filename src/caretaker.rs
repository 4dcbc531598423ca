//! What a node does unasked, in one task: fall silent, finish, tidy.
//!
//! - **Fall silent.** When storage fails outside of an append (the marker, a staged snapshot), Raft does
//!   not notice: the node would go on leading a cluster whose requests it refuses. So the first failure
//!   stops Raft, and the others elect someone who can serve. The HTTP port goes on telling why.
//! - **Finish.** openraft takes a membership change in two steps, and whoever asked for it takes the
//!   second. If the asking node dies in between, the cluster stays in the joint membership, needs
//!   majorities of both, and nothing shows it. A leader that finds itself there takes the second step.
//! - **Tidy.** Snapshots are taken every so many entries; if the entries are large, the log would fill
//!   the disk first. Above `storage.log_bytes_max` a snapshot is taken and the log purged up to it at once.
//!   openraft purges nothing that a stream of entries to a follower still has to bring, and a follower that
//!   is slower than the writers never comes to the end of its stream. So when the log is twice as large as that,
//!   and as the state, the leader ends the streams of those that are behind the snapshot, and they get the
//!   snapshot instead. And half of a snapshot that its sender does not go on with is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::network::raft_network_impl::PeerNetwork;
use crate::node::Raft;
use crate::store::StateReader;
use crate::store::snapshot::SnapshotStager;
use crate::types::{LogId, NodeId};

/// Between two looks around.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long a joint membership may stand before it is taken for abandoned: its second step usually
/// follows within milliseconds, and taking it twice is harmless.
const JOINT_GRACE: Duration = Duration::from_secs(3);

/// Starts the task. It ends with `shutdown`.
pub fn spawn(
    raft: Raft,
    reader: StateReader,
    stager: SnapshotStager,
    peers: PeerNetwork,
    shutdown: CancellationToken,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut caretaker =
            Caretaker { raft, reader, stager, peers, joint_since: None, ended: BTreeMap::new() };
        shutdown.run_until_cancelled(caretaker.run()).await;
    })
}

struct Caretaker {
    raft: Raft,
    reader: StateReader,
    stager: SnapshotStager,
    peers: PeerNetwork,
    joint_since: Option<Instant>,
    /// Up to where the snapshot went for which a follower's stream was ended last.
    ended: BTreeMap<NodeId, Option<LogId>>,
}

impl Caretaker {
    async fn run(&mut self) {
        let mut failure = self.reader.failure();
        loop {
            if failure.borrow_and_update().is_some() {
                if let Err(error) = self.raft.shutdown().await {
                    tracing::error!(%error, "consensus did not stop cleanly after storage failed");
                }
                return;
            }
            // The store's sender lives as long as this reader; a timeout is the usual case.
            if tokio::time::timeout(INTERVAL, failure.changed()).await.is_err() {
                self.finish_membership_change().await;
                self.cut_long_log().await;
                self.remove_abandoned_staging().await;
            }
        }
    }

    async fn finish_membership_change(&mut self) {
        let joint = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            let membership = &metrics.membership_config;
            metrics.state == openraft::ServerState::Leader
                && membership.membership().get_joint_config().len() > 1
                && *membership.log_id() <= metrics.local_committed
        };
        if !joint {
            self.joint_since = None;
            return;
        }
        if self.joint_since.get_or_insert_with(Instant::now).elapsed() < JOINT_GRACE {
            return;
        }
        tracing::info!("finishing a membership change that was left half done");
        // Adding nobody makes the newer half of the joint membership the whole of it.
        let nobody = ChangeMembers::AddVoterIds(BTreeSet::new());
        let step = self.raft.change_membership(nobody, false);
        if let Ok(Err(error)) = tokio::time::timeout(JOINT_GRACE, step).await {
            tracing::warn!(%error, "cannot finish the membership change yet");
        }
    }

    async fn remove_abandoned_staging(&self) {
        let now = std::time::Instant::now();
        if self.stager.is_abandoned(now) {
            let stager = self.stager.clone();
            // It removes files. If it died, it is tried again in a second.
            let _ = tokio::task::spawn_blocking(move || stager.give_up_abandoned(now)).await;
        }
    }

    /// Lets those go who keep the log from being purged, once for each snapshot that they could have instead.
    ///
    /// Not before the log is twice as large as the state, even if nobody is being sent that now: who has just
    /// got it still has to be sent what was written meanwhile, or it would begin again, for ever.
    fn end_long_streams(&mut self, bytes: u64) {
        let Ok(state_bytes) = self.reader.disk_bytes() else { return };
        if bytes <= 2 * self.reader.log_bytes_max().max(state_bytes) {
            return;
        }
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        // Empty where this node does not lead.
        for (follower, matching) in metrics.replication.iter().flatten() {
            // Of whom nothing is known, a leader has to find out first.
            let is_behind = matching.is_some() && *matching < metrics.snapshot;
            let is_new = self.ended.get(follower) != Some(&metrics.snapshot);
            if is_behind && is_new && self.peers.end_appends(*follower) {
                self.ended.insert(*follower, metrics.snapshot);
                tracing::warn!(
                    follower,
                    bytes,
                    "it keeps the log from being cut, and gets a snapshot"
                );
            }
        }
    }

    async fn cut_long_log(&mut self) {
        let bytes = match self.reader.log_size() {
            Ok(log) if log.bytes > log.bytes_max => log.bytes,
            _ => return,
        };
        let (snapshot, purged) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            (metrics.snapshot, metrics.purged)
        };
        tracing::debug!(bytes, ?snapshot, "the log is large; cutting it");
        // What stays behind the snapshot is for followers that lag a little: they get the snapshot.
        let cut = match snapshot {
            Some(snapshot) if Some(snapshot) > purged => {
                // Asked for first, so that it is on Raft's mind when the streams end.
                let cut = self.raft.trigger().purge_log(snapshot.index).await;
                self.end_long_streams(bytes);
                cut
            }
            _ => self.raft.trigger().snapshot().await,
        };
        if let Err(error) = cut {
            tracing::debug!(%error, "the log was not cut: consensus has stopped");
        }
    }
}
