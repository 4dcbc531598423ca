//! One HTTP connection from accept to close, and the clock that keeps it honest.
//!
//! hyper parses and writes; what it lacks is a judgement about time. Its one timeout, for a header,
//! also runs while a connection is idle between requests, so that a short one (good against a client
//! that drips its header) closes the idle connections that clients keep in their pools, just as they
//! send the next request: a write would end as "outcome unknown" for no fault at all. And it has
//! none for a client that does not read its answer. So `Watched` notes every byte that moves and
//! `Watchdog` decides:
//!
//! | state | bound |
//! | --- | --- |
//! | a request is being answered | none here: the request's own deadline, and its body's pace |
//! | the first byte of a header came, the rest did not | `header_timeout`, not extended by more bytes; then 400 |
//! | idle | [`IDLE_TIMEOUT`] since the last byte |
//! | an answer that the client does not take | [`UNREAD_TIMEOUT`] since the last byte |
//! | an answer that the client takes slowly | [`UNREAD_TIMEOUT`], and a second for each [`UNREAD_PACE`] taken |
//! | refused or cut off, and still sending | [`LINGER_TIME`](socket::LINGER_TIME) since the answer |
//! | idle, sending its body or not taking its answer for [`SHED_AFTER`], and others wait | closed |
//!
//! `Watched` also keeps from hyper what hyper would misread or refuse without a word ([`super::head`]),
//! and gives the answer in its place, once all answers before it are written.
//!
//! As long as requests are plain, hyper is not needed at all ([`short`]); the clock is the same.

mod short;
mod socket;

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use self::socket::Watched;
use super::api::ApiState;
use super::body;
use super::head::HEAD_BYTES_MAX;

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

/// How long requests in flight may take to finish once the server stops.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// hyper's read buffer of one connection, in bytes: holds a header; bodies pass through in pieces.
const BUFFER_BYTES_MAX: usize = 128 << 10;

/// What all connections of a server share.
#[derive(Debug)]
pub(super) struct Shared {
    /// How long a started header may take.
    pub header_timeout: Duration,
    /// Woken once for every connection that waits for room. It keeps that when nobody can make room yet.
    pub shed: Notify,
    /// Whether somebody waits still: room may have become free in another way.
    pub is_full: AtomicBool,
    /// Stops the server.
    pub shutdown: CancellationToken,
}

/// What answers requests.
#[derive(Clone)]
pub(super) struct Service {
    /// All of them.
    pub router: axum::Router,
    /// Plain ones on keys, without the router.
    pub keys: Option<ApiState>,
}

/// Serves one connection until it ends, is overdue, has to make room, or the server stops.
pub(super) async fn serve(stream: TcpStream, service: Service, shared: Arc<Shared>) {
    // Without it a small answer may wait 40 ms for the client's delayed ACK. A socket that refuses
    // the option is about to fail on its own.
    let _ = stream.set_nodelay(true);
    let activity = Arc::new(Activity::new());
    let mut socket = Watched::new(stream, activity.clone());
    let mut guard = Guard::new(activity.clone(), shared.clone());
    if let Some(keys) = &service.keys {
        let timeout = shared.header_timeout;
        let at_stop = |_: Pin<&mut _>| if activity.is_idle() { Stop::AtOnce } else { Stop::Soon };
        let ended = {
            let short = short::serve(&mut socket, keys, &service.router, &activity, timeout);
            guard.watch(pin!(short), at_stop).await
        };
        match ended {
            Some(Ok(short::End::Hyper)) => {}
            Some(Ok(short::End::Closed)) => return,
            Some(Err(error)) => return broke_off(&error),
            None => return guard.cut_off(socket).await,
        }
    }
    let router = service.router;
    let serve = service_fn(move |request| {
        let serving = Serving::begin(activity.clone());
        let router = router.clone();
        async move {
            let response = body::answer(router, request).await;
            drop(serving);
            Ok::<_, Infallible>(response)
        }
    });
    let mut connection = protocol().serve_connection(TokioIo::new(socket), serve);
    let at_stop = |connection: Pin<&mut http1::Connection<_, _>>| {
        connection.graceful_shutdown();
        Stop::Soon
    };
    let ended = guard.watch(Pin::new(&mut connection), at_stop).await;
    let socket = connection.into_parts().io.into_inner();
    match ended {
        Some(Ok(())) => {}
        Some(Err(error)) => broke_off(&error),
        None => return guard.cut_off(socket).await,
    }
    // hyper does not close a connection that ended with an error, nor one of whose requests, however long
    // ago, carried `Upgrade` or was a `CONNECT`: whoever offers that might still take it over. Nobody does,
    // and what the gate refused is still to be told.
    guard.close(socket).await;
}

fn broke_off(error: &dyn std::error::Error) {
    tracing::debug!(%error, "an HTTP connection broke off");
}

/// When a connection ends whose server stops.
enum Stop {
    AtOnce,
    /// By itself, within [`STOP_GRACE`].
    Soon,
}

/// Ends a connection that does not end by itself.
struct Guard {
    watchdog: Watchdog,
    activity: Arc<Activity>,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
    may_be_shed: bool,
    stop_at: Option<Instant>,
}

impl Guard {
    fn new(activity: Arc<Activity>, shared: Arc<Shared>) -> Self {
        let watchdog = Watchdog::new(activity.clone(), shared.header_timeout);
        // A token of its own: looking at one takes its lock, and this happens with every byte.
        let shutdown = shared.shutdown.child_token();
        Self { watchdog, activity, shared, shutdown, may_be_shed: false, stop_at: None }
    }

    /// Lets `connection` run to its end. `None` when it has to end now.
    async fn watch<C: Future>(
        &mut self,
        mut connection: Pin<&mut C>,
        at_stop: impl Fn(Pin<&mut C>) -> Stop,
    ) -> Option<C::Output> {
        if self.stop_at.is_some()
            && let Stop::AtOnce = at_stop(connection.as_mut())
        {
            return None;
        }
        loop {
            tokio::select! {
                // In this order, so that the clock is read after the bytes that are there.
                biased;
                ended = connection.as_mut() => return Some(ended),
                event = self.watchdog.event() => match event {
                    Event::Overdue => return None,
                    Event::LongIdle { .. } => self.may_be_shed = true,
                },
                () = self.shared.shed.notified(), if self.may_be_shed => {
                    if !self.shared.is_full.load(Ordering::Relaxed) {
                        continue;
                    }
                    if self.activity.is_long_idle() {
                        return None;
                    }
                    // Busy again since: the next one in line is asked.
                    self.may_be_shed = false;
                    self.shared.shed.notify_one();
                }
                () = self.shutdown.cancelled(), if self.stop_at.is_none() => {
                    self.stop_at = Some(Instant::now() + STOP_GRACE);
                    self.activity.stopping.store(true, Ordering::Relaxed);
                    if let Stop::AtOnce = at_stop(connection.as_mut()) {
                        return None;
                    }
                }
                () = sleep_until(self.stop_at), if self.stop_at.is_some() => return None,
            }
        }
    }

    /// Ends a connection that has had its time, or has to make room. Who was slow to send a head is told.
    async fn cut_off(&mut self, mut socket: Watched) {
        if self.activity.is_head_overdue(self.shared.header_timeout)
            && socket.break_off("the request's head did not come in time")
        {
            self.close(socket).await;
        }
    }

    /// Shuts a connection down, as long as it may take.
    async fn close(&mut self, mut socket: Watched) {
        let closing = pin!(socket.shutdown());
        if let Some(Err(error)) = self.watch(closing, |_| Stop::Soon).await {
            broke_off(&error);
        }
    }
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

fn protocol() -> http1::Builder {
    let mut protocol = http1::Builder::new();
    protocol
        // The watchdog does it, see above.
        .header_read_timeout(None)
        // A client that has closed its sending side, such as `nc -N`, still gets its answer.
        .half_close(true)
        .max_header_size(HEAD_BYTES_MAX)
        .max_buf_size(BUFFER_BYTES_MAX);
    protocol
}

/// What the connection is doing, as seen from outside hyper. Shared inside one task only; the lock
/// is never contended.
#[derive(Debug)]
struct Activity {
    phase: Mutex<Phase>,
    /// The server stops: what is being answered is the last.
    stopping: AtomicBool,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
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
struct Unread {
    since: Instant,
    /// How much of it was written since then, in bytes.
    taken: usize,
}

impl Unread {
    /// When its reader has had his time. `last` is when the last byte moved.
    fn overdue(&self, last: Instant) -> Instant {
        let earned = Duration::from_secs((self.taken / UNREAD_PACE) as u64);
        (last + UNREAD_TIMEOUT).min(self.since + UNREAD_TIMEOUT + earned)
    }
}

impl Activity {
    fn new() -> Self {
        Self { phase: Mutex::new(Phase::waiting(Instant::now())), stopping: AtomicBool::new(false) }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        // A plain value: a panic elsewhere cannot leave it half changed.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut Phase)) {
        change(&mut self.phase());
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn is_long_idle(&self) -> bool {
        self.phase().is_long_idle(Instant::now())
    }

    /// Whether the connection waits for a head that has begun, for too long, and for nothing else.
    fn is_head_overdue(&self, header_timeout: Duration) -> bool {
        let phase = *self.phase();
        matches!(phase, Phase::Waiting { header_since: Some(first), unread: None, .. }
            if first + header_timeout <= Instant::now())
    }

    /// Whether nothing is being answered and no answer is on its way.
    fn is_idle(&self) -> bool {
        matches!(*self.phase(), Phase::Waiting { unread: None, .. })
    }
}

/// The rules; pure, with the time given.
impl Phase {
    /// As after a whole answer, or before the first request.
    fn waiting(now: Instant) -> Self {
        Self::Waiting { since: now, header_since: None, unread: None }
    }

    /// The client sent something.
    fn note_read(&mut self, now: Instant) {
        if let Self::Waiting { since, header_since, .. } = self {
            *since = now;
            header_since.get_or_insert(now);
        }
    }

    /// The rest of the request that is being answered is still to come, or all of it is here.
    fn note_body(&mut self, awaited: bool, now: Instant) {
        if let Self::Serving { body_since } = self {
            *body_since = awaited.then(|| body_since.unwrap_or(now));
        }
    }

    /// The client took less than there is.
    fn note_unread(&mut self, now: Instant) {
        if let Self::Waiting { unread, .. } = self {
            unread.get_or_insert(Unread { since: now, taken: 0 });
        }
    }

    /// The client took `count` bytes, or all that there are.
    fn note_written(&mut self, count: usize, all: bool, now: Instant) {
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
struct Serving {
    activity: Arc<Activity>,
}

impl Serving {
    fn begin(activity: Arc<Activity>) -> Self {
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
enum Event {
    /// The client had its time.
    Overdue,
    /// Idle long enough to be closed for the sake of others.
    LongIdle {
        /// When the last byte moved.
        since: Instant,
    },
}

/// Tells when a connection has to end. Must be polled after the connection itself.
struct Watchdog {
    activity: Arc<Activity>,
    header_timeout: Duration,
    timer: Pin<Box<Sleep>>,
    /// The idle period that was already reported as long.
    reported: Option<Instant>,
}

impl Watchdog {
    fn new(activity: Arc<Activity>, header_timeout: Duration) -> Self {
        let timer = Box::pin(tokio::time::sleep(header_timeout));
        Self { activity, header_timeout, timer, reported: None }
    }

    async fn event(&mut self) -> Event {
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
