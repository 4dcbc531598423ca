//! Receives, at a destination, what one source gives: page after page, from the cursor to the end of the
//! source's change log, and then whatever else changes.
//!
//! One page is on its way at a time: asked for, checked, proposed, applied, and only then the next. A
//! page says where it begins, and is staged only there.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use crate::backoff::Backoff;
use crate::handoff::{Cursor, Import, Page, PageRequest};
use crate::network::handoff_links::SourceError;
use crate::types::{ClusterId, Command};

use super::Tools;
use super::due::{self, Receiving};
use super::here::Unanswered;
use super::pace::Breaks;

/// A source whose change log ends so few changes ahead is nearly caught up with. It may freeze any
/// moment, so nothing waits for the budget any more.
const NEAR_CHANGES: u64 = 2000;

/// Between two pages of changes. With every write that moves the source has something new; this lets a few
/// come together, and takes no noticeable part of the time for which keys may be frozen. Longer pauses
/// would let writers get away.
const CHANGES_PAUSE: Duration = Duration::from_millis(5);

/// After a failure, the first time, ...
const FAILURE_PAUSE_MIN: Duration = Duration::from_millis(20);

/// ... and after several in a row.
const FAILURE_PAUSE_MAX: Duration = Duration::from_millis(500);

/// After failing for so long, a job ends: others that wait for its place are served first.
const FAILING_MAX: Duration = Duration::from_secs(5);

/// Why nothing was staged.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Source(#[from] SourceError),
    /// The page does not follow the cursor, or is larger than an entry may be.
    #[error("the source's page makes no sense: {0}")]
    Senseless(&'static str),
    #[error("{0}")]
    Refused(crate::handoff::Refused),
}

/// What one step came to.
enum Stepped {
    /// A page was staged.
    Staged,
    /// There is nothing new.
    Nothing,
    Failed(Failure),
    /// This node does not lead any more.
    Stopped(Unanswered),
}

/// Receives until the handoff's attempt is not open any more.
pub(super) async fn run(tools: Tools, from: ClusterId) {
    let here = &tools.here;
    let mut progress = Progress::default();
    let mut first: Option<Receiving> = None;
    while here.leads()
        && let Some(open) = due::receiving(&here.state(), here.own(), &from)
    {
        // Another attempt, or another change, is another job.
        let begun = first.get_or_insert_with(|| open.clone());
        if (&begun.handoff, begun.attempt) != (&open.handoff, open.attempt) {
            break;
        }
        if !progress.near {
            tools.budget.turn().await;
        }
        let began = Instant::now();
        match step(&tools, open, &mut progress).await {
            Stepped::Staged | Stepped::Nothing => {
                progress.failing = None;
                sleep(progress.pause(&tools.breaks, began.elapsed())).await;
            }
            Stepped::Failed(failure) => {
                tracing::debug!(%from, %failure, "no page was staged");
                match progress.pause_after_failure() {
                    Some(pause) => sleep(pause).await,
                    None => break,
                }
            }
            Stepped::Stopped(error) => {
                tracing::debug!(%from, %error, "receiving stops");
                break;
            }
        }
    }
    progress.end(first.as_ref());
}

/// Fetches the page at the cursor and stages it.
async fn step(tools: &Tools, open: Receiving, progress: &mut Progress) -> Stepped {
    let Receiving { handoff, attempt, cursor, source, .. } = &open;
    let request = PageRequest {
        handoff: handoff.clone(),
        attempt: *attempt,
        cursor: cursor.clone(),
        bytes_max: u32::try_from(tools.config.page_bytes).unwrap_or(u32::MAX),
    };
    let page = match tools.pages.page(source, &request).await {
        Ok(page) => page,
        Err(error) => return Stepped::Failed(error.into()),
    };
    if page.to == *cursor && page.records.is_empty() && page.answers.is_empty() {
        progress.look_at(&page, &open);
        return Stepped::Nothing;
    }
    if let Err(failure) = check(&page, &request, tools.import_bytes_max) {
        return Stepped::Failed(failure);
    }
    tools.budget.spend(page.bytes());
    let Receiving { handoff, attempt, cursor, .. } = open.clone();
    let import = Import { handoff, attempt, from: cursor, page: page.clone() };
    match tools.here.propose(Command::Import(Box::new(import))).await {
        Ok(Ok(_)) => {
            progress.staged(&page, &open);
            Stepped::Staged
        }
        Ok(Err(refused)) => Stepped::Failed(Failure::Refused(refused)),
        Err(error) => Stepped::Stopped(error),
    }
}

/// Whether a page may become an entry. That its records belong here is checked when it is applied, and so
/// are keys once more: whoever applies it may have it from elsewhere.
fn check(page: &Page, request: &PageRequest, import_bytes_max: usize) -> Result<(), Failure> {
    // The order of cursors is the order of copying.
    if page.to <= request.cursor {
        return Err(Failure::Senseless("it does not lead on"));
    }
    if !page.has_sound_keys() {
        return Err(Failure::Senseless("a key is empty, or longer than any"));
    }
    if import_bytes(page, request) > import_bytes_max {
        return Err(Failure::Senseless("it is larger than an entry may be"));
    }
    Ok(())
}

/// A bound from above on what an import takes in the log.
fn import_bytes(page: &Page, request: &PageRequest) -> usize {
    /// Counts, positions, tags, lengths, the attempt and two ids of clusters.
    const FIXED: usize = 256;
    /// Two lengths and a flag.
    const ROW: usize = 9;
    let cursor = |cursor: &Cursor| match cursor {
        Cursor::Records { after } | Cursor::Answers { after } => Bytes::len(after),
        Cursor::Changes { .. } => 0,
    };
    let rows = page.records.len() + page.answers.len();
    FIXED + cursor(&request.cursor) + cursor(&page.to) + rows * ROW + page.bytes()
}

/// How one job gets on.
#[derive(Default)]
struct Progress {
    began: Option<Instant>,
    pages: u64,
    bytes: u64,
    /// How many changes the source has logged for this attempt, as of the last page.
    logged: u64,
    /// Whether that page led to the log of changes ...
    in_changes: bool,
    /// ... and its end was in sight.
    near: bool,
    /// Whether the job has said that it got there.
    caught_up: bool,
    /// Since when nothing works, and how long to pause then.
    failing: Option<(Instant, Backoff)>,
}

impl Progress {
    fn staged(&mut self, page: &Page, open: &Receiving) {
        if self.began.is_none() {
            self.began = Some(Instant::now());
            let Receiving { handoff, attempt, .. } = open;
            tracing::info!(%handoff, attempt, "keys are coming");
        }
        self.pages += 1;
        self.bytes += page.bytes() as u64;
        self.look_at(page, open);
    }

    /// How far the source is ahead of a page's end.
    fn look_at(&mut self, page: &Page, open: &Receiving) {
        self.logged = page.end.saturating_sub(open.start);
        self.in_changes = matches!(page.to, Cursor::Changes { .. });
        self.near = page.to.covers(page.end.saturating_sub(NEAR_CHANGES));
        if page.to.covers(page.end) && !std::mem::replace(&mut self.caught_up, true) {
            let (handoff, Self { pages, bytes, .. }) = (&open.handoff, self);
            tracing::info!(%handoff, pages, bytes, "all keys are here; following what changes");
        }
    }

    /// How long to pause after a page that took so long.
    fn pause(&self, breaks: &Breaks, took: Duration) -> Duration {
        if self.in_changes { CHANGES_PAUSE } else { breaks.after(took, self.logged) }
    }

    /// `None` when it is time to make room for others.
    fn pause_after_failure(&mut self) -> Option<Duration> {
        let begun = || (Instant::now(), Backoff::new(FAILURE_PAUSE_MIN, FAILURE_PAUSE_MAX));
        let (since, backoff) = self.failing.get_or_insert_with(begun);
        let pause = backoff.pause();
        (since.elapsed() < FAILING_MAX).then_some(pause)
    }

    /// Says what came, if something did.
    fn end(&self, open: Option<&Receiving>) {
        let (Some(began), Some(open)) = (self.began, open) else { return };
        let (handoff, Self { pages, bytes, .. }) = (&open.handoff, self);
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(%handoff, pages, bytes, seconds, "no more keys are coming");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KEY_BYTES_MAX;
    use crate::handoff::Handoff;

    /// A key that nobody can write is not staged: it would be in the way of every follower that is sent
    /// the whole state.
    #[test]
    fn a_key_that_is_none_never_becomes_an_entry() {
        let (from, to) = ("a".parse().unwrap(), "b".parse().unwrap());
        let handoff = Handoff { epoch: 2, from, to };
        let request = PageRequest { handoff, attempt: 1, cursor: Cursor::start(), bytes_max: 1 };
        let checked = |length: usize| {
            let after = Bytes::from_static(b"k");
            let records = vec![(after.clone(), None), (vec![b'k'; length].into(), None)];
            let page = Page { to: Cursor::Records { after }, end: 0, records, answers: Vec::new() };
            check(&page, &request, 1 << 20)
        };
        for length in [0, KEY_BYTES_MAX + 1] {
            assert!(matches!(checked(length), Err(Failure::Senseless(_))), "{length}");
        }
        for length in [2, KEY_BYTES_MAX] {
            assert!(checked(length).is_ok(), "{length}");
        }
    }
}
