//! Use cases of a change of the ring: how far this cluster is, and its next step.
//!
//! What a step does is decided when it is applied, by [`RingState::decide`](crate::handoff::RingState):
//! here it is only handed to Raft. A node that does not lead says who does.

use tokio::time::Instant;

use crate::handoff::{Done, FLOORS_BYTES_MAX, Step};
use crate::metrics::{HandoffView, Sizes};
use crate::network::error::{ApiError, Outcome};
use crate::ring::Ring;
use crate::types::{Applied, Command};

use super::refusal::storage;
use super::{App, Consistency};

/// What [`Step::Activate`] has besides the floors: two ids of clusters and seven numbers.
const ACTIVATE_BYTES_MAX: usize = 1 << 10;

impl App {
    /// The ring that this node's cluster lives by, with the one that it is changing to, if it is, as far
    /// as this node knows. A change that was cancelled leads nowhere, so nothing is told of it.
    pub fn ring_with_next(&self) -> Ring {
        let state = self.inner.reader.ring_view();
        let change = state.change.as_ref().filter(|change| !change.is_cancelled());
        let next = change.map(|change| Box::new(change.next.ring().clone()));
        Ring { next, ..state.ring.ring().clone() }
    }

    /// What the cluster knows of the ring and of handoffs; sees every step that was acknowledged before.
    pub async fn handoffs(&self, sizes: Sizes, deadline: Instant) -> Result<HandoffView, ApiError> {
        self.check_serving()?;
        self.check_initialized()?;
        self.await_read_index(Consistency::Linearizable, deadline).await?;
        let reader = &self.inner.reader;
        let identity = &self.inner.identity;
        let (keys, disk_bytes) = match sizes {
            Sizes::Omitted => (None, None),
            Sizes::Counted => self.sizes()?,
        };
        Ok(HandoffView {
            cluster: identity.cluster.clone(),
            node: identity.node_id,
            leader: self.check_leader().is_ok(),
            state: reader.ring_state(),
            keys,
            disk_bytes,
        })
    }

    fn sizes(&self) -> Result<(Option<u64>, Option<u64>), ApiError> {
        let failed = |error| storage(error, Outcome::NotApplied);
        let keys = self.inner.reader.key_count().map_err(failed)?;
        let bytes = self.inner.reader.disk_bytes().map_err(failed)?;
        Ok((Some(keys), Some(bytes)))
    }

    /// Takes a step of a change of the ring. A repeat gets the first answer.
    pub async fn step(&self, mut step: Step, deadline: Instant) -> Result<Done, ApiError> {
        self.check_serving()?;
        if let Step::Freeze { floors_bytes_max, .. } = &mut step {
            *floors_bytes_max = Some(self.floors_bytes_max()).filter(|max| *max < FLOORS_BYTES_MAX);
        }
        // A step travels to the followers in one message.
        let bytes_max = self.ring_bytes_max();
        let json = serde_json::to_vec(&step).map_err(|error| bad_step(&error))?;
        if json.len() > bytes_max {
            return Err(ApiError::TooLarge { what: "step", max: bytes_max });
        }
        // An entry that does not decode would be the last of the log, on every replica.
        match serde_json::from_slice::<Step>(&json) {
            Ok(again) if again == step => {}
            Ok(_) => return Err(bad_step("it is not itself after a journey")),
            Err(error) => return Err(bad_step(&error)),
        }
        match self.propose(Command::Step(Box::new(step)), deadline).await? {
            Applied::Step(decided) => {
                (*decided).map_err(|refused| ApiError::StepRefused(Box::new(refused)))
            }
            other => unreachable!("a step was answered by {other:?}"),
        }
    }

    /// What the floors of clients may take: the step that activates what was frozen must fit into the body of a
    /// request, and into a message to the followers. The destination is taken to have the same limits.
    fn floors_bytes_max(&self) -> usize {
        let step_bytes_max = self.ring_bytes_max().min(self.inner.limits.http_body_bytes_max);
        step_bytes_max.saturating_sub(ACTIVATE_BYTES_MAX)
    }
}

fn bad_step(why: impl std::fmt::Display) -> ApiError {
    ApiError::BadRequest(format!("the step cannot be written to the log: {why}"))
}
