//! Use cases of a change of the ring: how far this cluster is, and its next step.
//!
//! What a step does is decided when it is applied, by [`RingState::decide`](crate::handoff::RingState):
//! here it is only handed to Raft. A node that does not lead says who does.

use tokio::time::Instant;

use crate::handoff::{Attempt, Done, Handoff, Outgoing, Refused, Step, floors_bytes};
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
    pub async fn step(&self, step: Step, deadline: Instant) -> Result<Done, ApiError> {
        self.check_serving()?;
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
        if let Step::Freeze { handoff, attempt } = &step {
            self.check_floors(handoff, *attempt)?;
        }
        match self.propose(Command::Step(Box::new(step)), deadline).await? {
            Applied::Step(decided) => {
                (*decided).map_err(|refused| ApiError::StepRefused(Box::new(refused)))
            }
            other => unreachable!("a step was answered by {other:?}"),
        }
    }

    /// What freezes must fit into the step that activates it: the body of a request and a message to the
    /// followers, as large as they may be here. The destination is taken to have the same limits.
    fn check_floors(&self, handoff: &Handoff, attempt: Attempt) -> Result<(), ApiError> {
        let state = self.inner.reader.ring_state();
        let frozen = |outgoing: &Outgoing| outgoing.attempt == attempt && outgoing.frozen.is_some();
        if state.outgoing(handoff).is_some_and(frozen) {
            // A repeat, which gets the first answer.
            return Ok(());
        }
        let step_bytes_max = self.ring_bytes_max().min(self.inner.limits.http_body_bytes_max);
        let floors = self.inner.reader.client_floors();
        if floors_bytes(&floors) + ACTIVATE_BYTES_MAX <= step_bytes_max {
            return Ok(());
        }
        Err(ApiError::StepRefused(Box::new(Refused::TooManyClients)))
    }
}

fn bad_step(why: impl std::fmt::Display) -> ApiError {
    ApiError::BadRequest(format!("the step cannot be written to the log: {why}"))
}
