//! Takes a step of a change of the ring, once those whose word it needs have given it.
//!
//! Which clusters that are, and what they must confirm, is decided in [`crate::handoff`]. Here they are
//! asked, over HTTP and at the addresses of this cluster's own rings, what their logs have decided
//! (`GET /cluster/handoffs`, a linearizable read).
//!
//! What the step would come to is looked at first, in a linearizable view of this cluster's own state. So a
//! step that is refused anyway is refused for the true reason, and a repeat is answered, without asking
//! anybody, even if the other cluster has forgotten the change meanwhile.

use axum::body::to_bytes;
use axum::response::Response;
use futures_util::{StreamExt, stream};
use http::StatusCode;
use tokio::time::Instant;

use super::api::ApiState;
use super::error::{ApiError, Outcome};
use crate::handoff::{Done, Refused, Step, Witnesses};
use crate::metrics::{HandoffView, Sizes};
use crate::ring::RingCluster;

/// What a cluster says of itself.
const PATH: &str = "/cluster/handoffs";

/// How many clusters are asked at once: of hundreds, some will be slow to answer.
const AT_ONCE_MAX: usize = 16;

/// The longest answer. The floors of a source's clients are most of it: once for each handoff that is frozen,
/// and each fits into a step.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Takes the step, or says why not. A repeat gets the first answer.
pub(super) async fn take(
    state: &ApiState,
    step: &Step,
    deadline: Instant,
) -> Result<Done, ApiError> {
    let app = &state.app;
    let own = &app.identity().cluster;
    if !step.needs_witness() {
        return app.step(step.clone(), deadline).await;
    }
    let view = app.handoffs(Sizes::Omitted, deadline).await?;
    match view.state.foresee(step, own) {
        Some(Err(why)) => return Err(refused(why)),
        Some(Ok(decision)) if !decision.changed => return Ok(decision.done),
        _ => {}
    }
    hear(state, step, view.state.witnesses(step, own), deadline).await?;
    app.step(step.clone(), deadline).await
}

/// Returns once the witnesses have confirmed the step.
async fn hear(
    state: &ApiState,
    step: &Step,
    witnesses: Witnesses,
    deadline: Instant,
) -> Result<(), ApiError> {
    let (clusters, one_is_enough) = match witnesses {
        Witnesses::None => return Ok(()),
        Witnesses::All(clusters) => (clusters, false),
        Witnesses::Any(clusters) => (clusters, true),
    };
    let ask = |cluster: RingCluster| async move {
        let confirmed = confirms(state, &cluster, step, deadline).await;
        (cluster.id, confirmed)
    };
    let mut failure = None;
    let mut answers = std::pin::pin!(stream::iter(clusters).map(ask).buffer_unordered(AT_ONCE_MAX));
    while let Some((cluster, confirmed)) = answers.next().await {
        match confirmed {
            Ok(true) if one_is_enough => return Ok(()),
            Ok(true) => {}
            Ok(false) if one_is_enough => {}
            Ok(false) => return Err(refused(Refused::NotConfirmed(cluster))),
            Err(error) => failure = Some(error),
        }
    }
    // Whoever did not answer might have confirmed it, or denied it.
    match failure {
        Some(failure) => Err(failure),
        None if one_is_enough => Err(refused(Refused::NobodyConfirms)),
        None => Ok(()),
    }
}

fn refused(why: Refused) -> ApiError {
    ApiError::StepRefused(Box::new(why))
}

async fn confirms(
    state: &ApiState,
    cluster: &RingCluster,
    step: &Step,
    deadline: Instant,
) -> Result<bool, ApiError> {
    let unusable = |why: String| ApiError::Forward {
        message: format!("cluster {} was asked about the step: {why}", cluster.id),
        outcome: Outcome::NotApplied,
    };
    let answer = state.forwarder.ask(cluster, PATH, deadline).await;
    let view =
        read(answer.map_err(|error| unusable(error.to_string()))?).await.map_err(unusable)?;
    if view.cluster != cluster.id {
        return Err(unusable(format!("a node of cluster {} answered", view.cluster)));
    }
    Ok(view.state.confirms(step, &cluster.id))
}

async fn read(answer: Response) -> Result<HandoffView, String> {
    let status = answer.status();
    let body = to_bytes(answer.into_body(), ANSWER_BYTES_MAX).await.map_err(|e| e.to_string())?;
    if status != StatusCode::OK {
        return Err(format!("it answered {status}"));
    }
    serde_json::from_slice(&body).map_err(|error| format!("its answer is not understood: {error}"))
}
