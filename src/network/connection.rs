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
//! | a request is being answered | none here: the request's own deadline, body included |
//! | the first byte of a header came, the rest did not | `header_timeout`, not extended by more bytes |
//! | idle, or a started answer does not move | [`IDLE_TIMEOUT`] since the last byte |
//! | the same for [`SHED_AFTER`], and others wait for a connection | closed, longest idle first |

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::body;

/// How long a connection may lie idle, or an answer wait for its reader. Above the 30 s for which our
/// own client keeps idle connections, so that it is the client who closes them.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// Idle connections are closed after this already when others wait for one. Long enough that a client
/// with a steady stream of requests is never hit between two of them.
pub const SHED_AFTER: Duration = Duration::from_secs(1);

/// How long requests in flight may take to finish once the server stops.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// The longest header, in bytes: the longest URI that the `http` crate takes (64 KiB), and 16 KiB.
const HEADER_BYTES_MAX: usize = 80 << 10;

/// hyper's read buffer of one connection, in bytes: holds a header; bodies pass through in pieces.
const BUFFER_BYTES_MAX: usize = 128 << 10;

/// What all connections of a server share.
#[derive(Debug)]
pub(super) struct Shared {
    /// How long a started header may take.
    pub header_timeout: Duration,
    /// Woken once for every connection that waits for room.
    pub shed: Notify,
    /// Stops the server.
    pub shutdown: CancellationToken,
}

/// Serves one connection until it ends, is overdue, has to make room, or the server stops.
pub(super) async fn serve(stream: TcpStream, router: axum::Router, shared: Arc<Shared>) {
    // Without it a small answer may wait 40 ms for the client's delayed ACK. A socket that refuses
    // the option is about to fail on its own.
    let _ = stream.set_nodelay(true);
    let activity = Arc::new(Activity::new());
    let service_activity = activity.clone();
    let service = service_fn(move |request| {
        let serving = Serving::begin(service_activity.clone());
        let router = router.clone();
        async move {
            let response = body::answer(router, request).await;
            drop(serving);
            Ok::<_, Infallible>(response)
        }
    });
    let io = TokioIo::new(Watched { stream, activity: activity.clone() });
    let connection = protocol().serve_connection(io, service);
    let mut connection = pin!(connection);
    let mut watchdog = Watchdog::new(activity.clone(), shared.header_timeout);
    // A token of its own: looking at one takes its lock, and this happens with every byte.
    let shutdown = shared.shutdown.child_token();
    let mut may_be_shed = false;
    let mut stop_at: Option<Instant> = None;
    loop {
        tokio::select! {
            // In this order, so that the clock is read after the bytes that are there.
            biased;
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "an HTTP connection broke off");
                }
                return;
            }
            event = watchdog.event() => match event {
                Event::Overdue => return,
                Event::LongIdle { .. } => may_be_shed = true,
            },
            () = shared.shed.notified(), if may_be_shed => {
                if activity.is_long_idle() {
                    return;
                }
                // Busy again since: the next one in line is asked.
                may_be_shed = false;
                shared.shed.notify_one();
            }
            () = shutdown.cancelled(), if stop_at.is_none() => {
                connection.as_mut().graceful_shutdown();
                stop_at = Some(Instant::now() + STOP_GRACE);
            }
            () = sleep_until(stop_at), if stop_at.is_some() => return,
        }
    }
}

fn protocol() -> http1::Builder {
    let mut protocol = http1::Builder::new();
    protocol
        // The watchdog does it, see above.
        .header_read_timeout(None)
        // A client that has closed its sending side, such as `nc -N`, still gets its answer.
        .half_close(true)
        .max_header_size(HEADER_BYTES_MAX)
        .max_buf_size(BUFFER_BYTES_MAX);
    protocol
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// What the connection is doing, as seen from outside hyper. Shared inside one task only; the lock
/// is never contended.
#[derive(Debug)]
struct Activity {
    phase: Mutex<Phase>,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// A request is being answered.
    Serving,
    /// Waiting for the client: for its next request, or to take its answer.
    Waiting {
        /// When the last byte moved.
        since: Instant,
        /// When the first byte of the next header came.
        header_since: Option<Instant>,
    },
}

impl Activity {
    fn new() -> Self {
        Self { phase: Mutex::new(Phase::waiting(Instant::now())) }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        // A plain value: a panic elsewhere cannot leave it half changed.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut Phase)) {
        change(&mut self.phase());
    }

    fn is_long_idle(&self) -> bool {
        self.phase().is_long_idle(Instant::now())
    }
}

/// The rules; pure, with the time given.
impl Phase {
    /// As after a whole answer, or before the first request.
    fn waiting(now: Instant) -> Self {
        Self::Waiting { since: now, header_since: None }
    }

    /// The client sent something.
    fn note_read(&mut self, now: Instant) {
        if let Self::Waiting { since, header_since } = self {
            *since = now;
            header_since.get_or_insert(now);
        }
    }

    /// The client took something.
    fn note_written(&mut self, now: Instant) {
        if let Self::Waiting { .. } = self {
            // What was read meanwhile is a pipelined request that cannot be looked at yet.
            *self = Self::waiting(now);
        }
    }

    fn is_long_idle(&self, now: Instant) -> bool {
        matches!(*self, Self::Waiting { since, header_since: None } if since + SHED_AFTER <= now)
    }

    /// What happens next if no byte moves, and when. `reported` is the start of the idle period that
    /// is already known to be long.
    fn due(&self, header_timeout: Duration, reported: Option<Instant>) -> Option<(Instant, Event)> {
        match *self {
            Self::Serving => None,
            Self::Waiting { header_since: Some(first), .. } => {
                Some((first + header_timeout, Event::Overdue))
            }
            Self::Waiting { since, .. } if reported == Some(since) => {
                Some((since + IDLE_TIMEOUT, Event::Overdue))
            }
            Self::Waiting { since, .. } => Some((since + SHED_AFTER, Event::LongIdle { since })),
        }
    }
}

/// While this lives, the connection is answering a request.
struct Serving {
    activity: Arc<Activity>,
}

impl Serving {
    fn begin(activity: Arc<Activity>) -> Self {
        activity.update(|phase| *phase = Phase::Serving);
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

    /// While a request is served there is no timer: the connection itself wakes the task.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let due = self.activity.phase().due(self.header_timeout, self.reported);
        let Some((when, event)) = due else { return Poll::Pending };
        if self.timer.deadline() != when {
            self.timer.as_mut().reset(when);
        }
        ready!(self.timer.as_mut().poll(cx));
        if let Event::LongIdle { since } = event {
            self.reported = Some(since);
        }
        Poll::Ready(event)
    }
}

/// The socket; notes every byte that moves.
struct Watched {
    stream: TcpStream,
    activity: Arc<Activity>,
}

impl Watched {
    fn note_written(&self, written: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(1..)) = written {
            self.activity.update(|phase| phase.note_written(Instant::now()));
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.activity.update(|phase| phase.note_read(Instant::now()));
        }
        result
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note_written(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.note_written(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
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
        let mut phase = Phase::Serving;
        phase.note_read(Instant::now());
        phase.note_written(Instant::now());
        assert_eq!(phase.due(HEADER_TIMEOUT, None), None);
        assert!(!phase.is_long_idle(Instant::now() + IDLE_TIMEOUT));
    }

    /// An answer that its reader takes slowly lives as long as it moves, and a request that was
    /// pipelined behind it does not count as a slow header.
    #[test]
    fn a_moving_answer_is_not_overdue() {
        let start = Instant::now();
        let mut phase = Phase::waiting(start);
        phase.note_read(start + MOMENT);
        let written = start + HEADER_TIMEOUT * 2;
        phase.note_written(written);
        let overdue = Some((written + IDLE_TIMEOUT, Event::Overdue));
        assert_eq!(phase.due(HEADER_TIMEOUT, Some(written)), overdue);
    }
}
