//! What a connection is doing, and when it has had its time: see the table of [`super`].

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// How long a connection may lie idle. Above the 30 s for which our own client keeps idle connections,
/// so that it is the client who closes them.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// How long an answer may wait for its reader without a byte of it moving: it holds its value in memory.
/// Longer than a client needs that is stopped for a moment or loses some packets.
pub const UNREAD_TIMEOUT: Duration = Duration::from_secs(15);

/// How fast an answer has to be taken in the long run, in bytes a second: a byte every now and then would
/// keep its share of the memory for answers for ever. A fortieth of what an ADSL line brings.
pub const UNREAD_PACE: usize = 32 << 10;

/// Connections that are idle, wait for the rest of a body or for somebody to take their answer, are
/// closed after this already when others wait for one. Long enough that a client with a steady stream of requests
/// is never hit between two of them, nor one that sends a large value over a usual network.
pub const SHED_AFTER: Duration = Duration::from_secs(1);

/// What the connection is doing, as seen from outside hyper. Shared inside one task only; the lock
/// is never contended.
#[derive(Debug)]
pub(super) struct Activity {
    phase: Mutex<Phase>,
    /// The server stops: what is being answered is the last.
    pub(super) stopping: AtomicBool,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Phase {
    /// A request is being answered.
    Serving {
        /// Since when its body has been coming, if it is not whole yet.
        body_since: Option<Instant>,
    },
    /// Waiting for the client: for its next request, or to take its answer.
    Waiting {
        /// When the last byte moved.
        since: Instant,
        /// When the first byte of the next header came.
        header_since: Option<Instant>,
        /// There is more of the answer than the client takes.
        unread: Option<Unread>,
    },
}

/// An answer that could not be written at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unread {
    since: Instant,
    /// How much of it was written since then, in bytes.
    pub(super) taken: usize,
}

impl Unread {
    /// When its reader has had his time. `last` is when the last byte moved.
    fn overdue(&self, last: Instant) -> Instant {
        let earned = Duration::from_secs((self.taken / UNREAD_PACE) as u64);
        (last + UNREAD_TIMEOUT).min(self.since + UNREAD_TIMEOUT + earned)
    }
}

impl Activity {
    pub(super) fn new() -> Self {
        Self { phase: Mutex::new(Phase::waiting(Instant::now())), stopping: AtomicBool::new(false) }
    }

    pub(super) fn phase(&self) -> MutexGuard<'_, Phase> {
        // A plain value: a panic elsewhere cannot leave it half changed.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Phase)) {
        change(&mut self.phase());
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn is_long_idle(&self) -> bool {
        self.phase().is_long_idle(Instant::now())
    }

    /// Whether the connection waits for a head that has begun, for too long, and for nothing else.
    pub(super) fn is_head_overdue(&self, header_timeout: Duration) -> bool {
        let phase = *self.phase();
        matches!(phase, Phase::Waiting { header_since: Some(first), unread: None, .. }
            if first + header_timeout <= Instant::now())
    }

    /// Whether nothing is being answered and no answer is on its way.
    pub(super) fn is_idle(&self) -> bool {
        matches!(*self.phase(), Phase::Waiting { unread: None, .. })
    }
}

/// The rules; pure, with the time given.
impl Phase {
    /// As after a whole answer, or before the first request.
    pub(super) fn waiting(now: Instant) -> Self {
        Self::Waiting { since: now, header_since: None, unread: None }
    }

    /// The client sent something.
    pub(super) fn note_read(&mut self, now: Instant) {
        if let Self::Waiting { since, header_since, .. } = self {
            *since = now;
            header_since.get_or_insert(now);
        }
    }

    /// The rest of the request that is being answered is still to come, or all of it is here.
    pub(super) fn note_body(&mut self, awaited: bool, now: Instant) {
        if let Self::Serving { body_since } = self {
            *body_since = awaited.then(|| body_since.unwrap_or(now));
        }
    }

    /// The client took less than there is.
    pub(super) fn note_unread(&mut self, now: Instant) {
        if let Self::Waiting { unread, .. } = self {
            unread.get_or_insert(Unread { since: now, taken: 0 });
        }
    }

    /// The client took `count` bytes, or all that there are.
    pub(super) fn note_written(&mut self, count: usize, all: bool, now: Instant) {
        if let Self::Waiting { unread, .. } = *self {
            let rest = unread.filter(|_| !all);
            let unread = rest.map(|rest| Unread { taken: rest.taken + count, ..rest });
            // What was read meanwhile is a pipelined request that cannot be looked at yet.
            *self = Self::Waiting { since: now, header_since: None, unread };
        }
    }

    fn is_long_idle(&self, now: Instant) -> bool {
        self.idle_since().is_some_and(|since| since + SHED_AFTER <= now)
    }

    /// Since when the connection has been open for the client's sake alone.
    fn idle_since(&self) -> Option<Instant> {
        match *self {
            Self::Serving { body_since } => body_since,
            Self::Waiting { since, header_since: None, .. } => Some(since),
            Self::Waiting { .. } => None,
        }
    }

    /// What happens next if no byte moves, and when. `reported` is the start of the idle period that
    /// is already known to be long.
    fn due(&self, header_timeout: Duration, reported: Option<Instant>) -> Option<(Instant, Event)> {
        let long_idle = |since| Some((since + SHED_AFTER, Event::LongIdle { since }));
        match *self {
            Self::Serving { body_since: Some(since) } if reported != Some(since) => {
                long_idle(since)
            }
            Self::Serving { .. } => None,
            Self::Waiting { header_since: Some(first), .. } => {
                Some((first + header_timeout, Event::Overdue))
            }
            Self::Waiting { since, unread, .. } => {
                let overdue = unread.map_or(since + IDLE_TIMEOUT, |rest| rest.overdue(since));
                // Who takes a little all the time is never idle for long.
                if reported == Some(since) || overdue <= since + SHED_AFTER {
                    return Some((overdue, Event::Overdue));
                }
                long_idle(since)
            }
        }
    }
}

/// While this lives, the connection is answering a request.
pub(super) struct Serving {
    activity: Arc<Activity>,
}

impl Serving {
    pub(super) fn begin(activity: Arc<Activity>) -> Self {
        activity.update(|phase| *phase = Phase::Serving { body_since: None });
        Self { activity }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.activity.update(|phase| *phase = Phase::waiting(Instant::now()));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The client had its time.
    Overdue,
    /// Idle long enough to be closed for the sake of others.
    LongIdle {
        /// When the last byte moved.
        since: Instant,
    },
}

/// Tells when a connection has to end. Must be polled after the connection itself.
pub(super) struct Watchdog {
    activity: Arc<Activity>,
    header_timeout: Duration,
    timer: Pin<Box<Sleep>>,
    /// The idle period that was already reported as long.
    reported: Option<Instant>,
}

impl Watchdog {
    pub(super) fn new(activity: Arc<Activity>, header_timeout: Duration) -> Self {
        let timer = Box::pin(tokio::time::sleep(header_timeout));
        Self { activity, header_timeout, timer, reported: None }
    }

    pub(super) async fn event(&mut self) -> Event {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }

    /// While a request is served there is no timer: the connection itself wakes the task. A timer that
    /// would ring too early is left alone until it does: on a busy connection, what is due moves with
    /// every request, and setting a timer costs more than looking at the clock once a second.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        loop {
            let due = self.activity.phase().due(self.header_timeout, self.reported);
            let Some((when, event)) = due else { return Poll::Pending };
            if self.timer.deadline() > when || self.timer.is_elapsed() {
                self.timer.as_mut().reset(when);
            }
            ready!(self.timer.as_mut().poll(cx));
            if Instant::now() < when {
                continue;
            }
            if let Event::LongIdle { since } = event {
                self.reported = Some(since);
            }
            return Poll::Ready(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
    const MOMENT: Duration = Duration::from_millis(700);

    /// An idle connection first becomes one that may make room, then is closed.
    #[test]
    fn idle_connections_have_two_bounds() {
        let start = Instant::now();
        let phase = Phase::waiting(start);
        let long_idle = Event::LongIdle { since: start };
        assert_eq!(phase.due(HEADER_TIMEOUT, None), Some((start + SHED_AFTER, long_idle)));
        let overdue = Some((start + IDLE_TIMEOUT, Event::Overdue));
        assert_eq!(phase.due(HEADER_TIMEOUT, Some(start)), overdue);
        assert!(phase.is_long_idle(start + SHED_AFTER) && !phase.is_long_idle(start + MOMENT));
    }

    /// More bytes of a header do not buy more time, and who sends one is not idle.
    #[test]
    fn a_dripped_header_is_cut_off_at_its_timeout() {
        let start = Instant::now();
        let mut phase = Phase::waiting(start);
        phase.note_read(start + MOMENT);
        phase.note_read(start + 2 * MOMENT);
        let overdue = Some((start + MOMENT + HEADER_TIMEOUT, Event::Overdue));
        assert_eq!(phase.due(HEADER_TIMEOUT, None), overdue);
        assert!(!phase.is_long_idle(start + IDLE_TIMEOUT));
    }

    /// While a request is answered nothing is due, whatever moves.
    #[test]
    fn a_request_being_answered_is_left_alone() {
        let mut phase = Phase::Serving { body_since: None };
        phase.note_read(Instant::now());
        phase.note_written(1, false, Instant::now());
        assert_eq!(phase.due(HEADER_TIMEOUT, None), None);
        assert!(!phase.is_long_idle(Instant::now() + IDLE_TIMEOUT));
    }

    /// Who does not take his answer may have to make room like who is idle, and has less time.
    #[test]
    fn an_unread_answer_is_given_up_soon() {
        let start = Instant::now();
        let mut phase = Phase::waiting(start);
        phase.note_unread(start);
        let long_idle = Event::LongIdle { since: start };
        assert_eq!(phase.due(HEADER_TIMEOUT, None), Some((start + SHED_AFTER, long_idle)));
        let overdue = Some((start + UNREAD_TIMEOUT, Event::Overdue));
        assert_eq!(phase.due(HEADER_TIMEOUT, Some(start)), overdue);
        phase.note_written(1, true, start + MOMENT);
        let long_idle = Event::LongIdle { since: start + MOMENT };
        let due = Some((start + MOMENT + SHED_AFTER, long_idle));
        assert_eq!(phase.due(HEADER_TIMEOUT, Some(start)), due);
        let overdue = Some((start + MOMENT + IDLE_TIMEOUT, Event::Overdue));
        assert_eq!(phase.due(HEADER_TIMEOUT, Some(start + MOMENT)), overdue, "all of it was taken");
    }

    /// A byte now and then buys no more time; an answer that is taken at a pace has all the time it needs.
    #[test]
    fn a_trickled_answer_is_given_up() {
        let start = Instant::now();
        let mut phase = Phase::waiting(start);
        phase.note_unread(start);
        let end = start + UNREAD_TIMEOUT;
        let mut now = start;
        while now + MOMENT < end {
            now += MOMENT;
            phase.note_written(1, false, now);
            phase.note_unread(now);
        }
        assert_eq!(phase.due(HEADER_TIMEOUT, None), Some((end, Event::Overdue)));

        let mut phase = Phase::waiting(start);
        phase.note_unread(start);
        for second in 1..=100 {
            let now = start + Duration::from_secs(second);
            phase.note_written(UNREAD_PACE, false, now);
            phase.note_unread(now);
            let overdue = Some((now + UNREAD_TIMEOUT, Event::Overdue));
            assert_eq!(phase.due(HEADER_TIMEOUT, Some(now)), overdue);
        }
    }

    /// While its body is missing, a request may have to make room; once that is whole, it may not.
    #[test]
    fn an_unfinished_request_may_make_room() {
        let start = Instant::now();
        let mut phase = Phase::Serving { body_since: None };
        phase.note_body(true, start);
        phase.note_body(true, start + MOMENT);
        let long_idle = Event::LongIdle { since: start };
        assert_eq!(phase.due(HEADER_TIMEOUT, None), Some((start + SHED_AFTER, long_idle)));
        assert_eq!(phase.due(HEADER_TIMEOUT, Some(start)), None);
        assert!(phase.is_long_idle(start + SHED_AFTER));
        phase.note_body(false, start + MOMENT);
        assert!(!phase.is_long_idle(start + IDLE_TIMEOUT));
    }

    /// A request that was pipelined behind an answer that is still on its way does not count as a slow header.
    #[test]
    fn a_moving_answer_is_not_overdue() {
        let start = Instant::now();
        let mut phase = Phase::waiting(start);
        phase.note_unread(start);
        phase.note_read(start + MOMENT);
        let written = start + HEADER_TIMEOUT * 2;
        phase.note_written(UNREAD_PACE * 100, false, written);
        let overdue = Some((written + UNREAD_TIMEOUT, Event::Overdue));
        assert_eq!(phase.due(HEADER_TIMEOUT, Some(written)), overdue);
        phase.note_written(1, true, written);
        let overdue = Some((written + IDLE_TIMEOUT, Event::Overdue));
        assert_eq!(phase.due(HEADER_TIMEOUT, Some(written)), overdue);
    }
}
