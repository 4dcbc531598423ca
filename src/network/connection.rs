//! One HTTP connection from accept to close, kept honest by its [`clock`].
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
//! | had its last answer, and does not close | [`QUIET_TIME`](socket::QUIET_TIME) since the last byte, no longer than that |
//! | idle, sending its body or not taking its answer for [`SHED_AFTER`], and others wait | closed |
//!
//! `Watched` also keeps from hyper what hyper would misread or refuse without a word ([`super::head`]),
//! and gives the answer in its place, once all answers before it are written.
//!
//! As long as requests are plain, hyper is not needed at all ([`short`]); the clock is the same.

mod clock;
mod short;
mod socket;

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::clock::{Activity, Event, Serving, Watchdog};
pub use self::clock::{IDLE_TIMEOUT, SHED_AFTER, UNREAD_PACE, UNREAD_TIMEOUT};
use self::socket::Watched;
use super::api::ApiState;
use super::body;
use super::head::HEAD_BYTES_MAX;

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
    let serving = activity.clone();
    let serve = service_fn(move |request| {
        let serving = Serving::begin(serving.clone());
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
        if activity.is_idle() { Stop::AtOnce } else { Stop::Soon }
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
