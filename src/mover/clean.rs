//! Deletes what a handoff has made useless: at a source what moved, at a destination what dead attempts
//! staged. A change is finished only when nothing of it is left.
//!
//! The state says how many rows are left and not which, so they are looked for. Which of the found ones
//! may go is decided when the entry is applied: a row that is in use again by then stays.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use crate::handoff::{Clean, Handoff};
use crate::types::Command;

use super::here::Unanswered;
use super::{Tools, due};

/// The most keys in one entry ...
pub(super) const BATCH_KEYS_MAX: usize = 1000;

/// ... and about how many bytes of them: a few milliseconds' work for each replica.
pub(super) const BATCH_BYTES_MAX: usize = 256 << 10;

/// After a round in which nothing was found although the state says that something is left: others
/// delete it too, or it comes to light once what runs now is applied.
const NOTHING_FOUND_PAUSE: Duration = Duration::from_millis(200);

/// Deletes until nothing is left.
pub(super) async fn run(tools: Tools) {
    let here = &tools.here;
    // Where each handoff's last batch ended: the rows before are gone.
    let mut places: HashMap<Handoff, Bytes> = HashMap::new();
    while here.leads() {
        let left = due::to_clean(&here.state(), here.own());
        if left.is_empty() {
            return;
        }
        places.retain(|handoff, _| left.contains(handoff));
        let mut found = false;
        for handoff in left {
            match clean_some(&tools, &handoff, places.get(&handoff)).await {
                Ok(Some(last)) => {
                    found = true;
                    places.insert(handoff, last);
                }
                // The end. What came to lie before it is found from the beginning.
                Ok(None) => found |= places.remove(&handoff).is_some(),
                Err(error) => return tracing::debug!(%handoff, %error, "cleaning stops"),
            }
        }
        if !found {
            sleep(NOTHING_FOUND_PAUSE).await;
        }
    }
}

/// Why a job ends before its work is done.
#[derive(Debug, thiserror::Error)]
enum Stopped {
    #[error("{0}")]
    Read(#[from] std::io::Error),
    #[error("{0}")]
    Unanswered(#[from] Unanswered),
}

/// Deletes a batch of rows after `place`, and pauses. The last of them, or `None` if there was none.
async fn clean_some(
    tools: &Tools,
    handoff: &Handoff,
    place: Option<&Bytes>,
) -> Result<Option<Bytes>, Stopped> {
    let began = Instant::now();
    let after = place.cloned().unwrap_or_default();
    let mut keys = tools.here.leftovers(handoff, after, BATCH_KEYS_MAX).await?;
    keys.truncate(fitting(&keys));
    let Some(last) = keys.last().cloned() else { return Ok(None) };
    let count = keys.len();
    let clean = Clean { handoff: handoff.clone(), keys };
    match tools.here.propose(Command::Clean(Box::new(clean))).await? {
        Ok(_) => tracing::debug!(%handoff, keys = count, "deleted what is of no use"),
        Err(refused) => tracing::debug!(%handoff, %refused, "nothing was deleted"),
    }
    // Nobody's log grows until it is done.
    sleep(tools.breaks.after(began.elapsed(), 0)).await;
    Ok(Some(last))
}

/// How many of the keys fit into an entry: one at least.
fn fitting(keys: &[Bytes]) -> usize {
    let mut bytes = 0;
    let fits = keys.iter().take(BATCH_KEYS_MAX).take_while(|key| {
        bytes += key.len();
        bytes <= BATCH_BYTES_MAX
    });
    fits.count().max(1)
}
