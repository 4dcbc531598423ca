//! What jobs see of the world: their own cluster and the sources of pages. Fakes stand in for both in
//! tests.

use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::task::spawn_blocking;

use crate::handoff::{Done, Handoff, Page, PageRequest, Refused, RingState};
use crate::network::handoff_links::{HandoffLinks, SourceError};
use crate::node::Raft;
use crate::ring::RingCluster;
use crate::store::StateReader;
use crate::types::{Applied, ClusterId, Command};

/// A proposal has no answer: this node does not lead any more, or stops. Whether it takes effect is not
/// known, and need not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no answer from consensus: {0}")]
pub(super) struct Unanswered(pub(super) String);

/// This node's cluster.
#[async_trait]
pub(super) trait Here: Send + Sync + 'static {
    /// The cluster.
    fn own(&self) -> &ClusterId;

    /// Whether this node leads it, as far as it knows.
    fn leads(&self) -> bool;

    /// The ring, the change and this cluster's part in it. What was proposed and answered is in it.
    fn state(&self) -> RingState;

    /// See [`StateReader::stretch`].
    async fn stretch(&self, from: Bytes, keys_max: usize) -> io::Result<Option<Bytes>>;

    /// See [`StateReader::leftovers`].
    async fn leftovers(
        &self,
        handoff: &Handoff,
        after: Bytes,
        keys_max: usize,
    ) -> io::Result<Vec<Bytes>>;

    /// Proposes a step, an import or a clean-up and waits until it is applied. Dropping the future takes
    /// nothing back.
    async fn propose(&self, command: Command) -> Result<Result<Done, Refused>, Unanswered>;
}

/// Where pages come from.
#[async_trait]
pub(super) trait Pages: Send + Sync + 'static {
    /// See [`HandoffLinks::page`].
    async fn page(&self, source: &RingCluster, request: &PageRequest) -> Result<Page, SourceError>;

    /// No change is under way.
    fn close(&self);
}

#[async_trait]
impl Pages for HandoffLinks {
    async fn page(&self, source: &RingCluster, request: &PageRequest) -> Result<Page, SourceError> {
        HandoffLinks::page(self, source, request).await
    }

    fn close(&self) {
        HandoffLinks::close(self);
    }
}

/// The real one.
pub(super) struct ThisCluster {
    own: ClusterId,
    raft: Raft,
    reader: StateReader,
}

impl ThisCluster {
    pub(super) fn new(own: ClusterId, raft: Raft, reader: StateReader) -> Self {
        Self { own, raft, reader }
    }

    /// Runs a read on a thread that may block.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(StateReader) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let reader = self.reader.clone();
        spawn_blocking(move || read(reader)).await.map_err(io::Error::other).flatten()
    }
}

#[async_trait]
impl Here for ThisCluster {
    fn own(&self) -> &ClusterId {
        &self.own
    }

    fn leads(&self) -> bool {
        self.raft.is_leader()
    }

    fn state(&self) -> RingState {
        self.reader.ring_state()
    }

    async fn stretch(&self, from: Bytes, keys_max: usize) -> io::Result<Option<Bytes>> {
        self.read(move |reader| reader.stretch(&from, keys_max)).await
    }

    async fn leftovers(
        &self,
        handoff: &Handoff,
        after: Bytes,
        keys_max: usize,
    ) -> io::Result<Vec<Bytes>> {
        let handoff = handoff.clone();
        self.read(move |reader| reader.leftovers(&handoff, &after, keys_max)).await
    }

    async fn propose(&self, command: Command) -> Result<Result<Done, Refused>, Unanswered> {
        match self.raft.client_write(command).await {
            Ok(response) => match response.data {
                Applied::Step(answer) => Ok(*answer),
                other => unreachable!("a step was answered by {other:?}"),
            },
            Err(error) => Err(Unanswered(error.to_string())),
        }
    }
}
