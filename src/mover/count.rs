//! Counts, at a source, the records that move: their number and digest, which the destination must match.
//!
//! Counting a stretch is part of applying its entry, because only there all replicas read the same
//! records. So stretches are short, come one after the other, and leave the log to others most of the
//! time.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::handoff::Step;
use crate::types::Command;

use super::{Tools, due};

/// The records that one stretch takes in, whether they move or not. Reading so many small ones takes a
/// few milliseconds, and that long every write waits.
pub(super) const STRETCH_KEYS_MAX: usize = 2000;

/// After a refusal. Somebody else counts, or the attempt is over: the next look at the state tells.
const REFUSED_PAUSE: Duration = Duration::from_millis(20);

/// Counts until nothing is left to count.
pub(super) async fn run(tools: Tools) {
    let here = &tools.here;
    while here.leads()
        && let Some(next) = due::next_count(&here.state(), here.own())
    {
        let began = Instant::now();
        let due::Stretch { handoff, attempt, from, logged } = next;
        let to = match here.stretch(from.clone(), STRETCH_KEYS_MAX).await {
            Ok(to) => to,
            Err(error) => return tracing::debug!(%handoff, %error, "cannot read what to count"),
        };
        let is_last = to.is_none();
        let step = Step::Count { handoff: handoff.clone(), attempt, from, to };
        match here.propose(Command::Step(Box::new(step))).await {
            Ok(Ok(_)) if is_last => tracing::info!(%handoff, attempt, "all that moves is counted"),
            Ok(Ok(_)) => {}
            Ok(Err(refused)) => {
                tracing::debug!(%handoff, %refused, "a stretch was not counted");
                sleep(REFUSED_PAUSE).await;
            }
            Err(error) => return tracing::debug!(%handoff, %error, "counting stops"),
        }
        sleep(tools.breaks.after(began.elapsed(), logged)).await;
    }
}
