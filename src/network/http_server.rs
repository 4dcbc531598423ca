//! The HTTP listener: accepts, bounds the number of connections, and stops cleanly.
//!
//! [`super::connection`] serves what it accepts. The loop never ends on an error of accept: most are
//! the peer's (it hung up in the queue), and running out of file descriptors passes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::api::{self, ApiState};
use super::connection::{self, Service, Shared};
use crate::app::App;
use crate::config::Limits;

/// How long accepting pauses after the system could not give a socket.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// At most one log line about accept in this time: peers can cause them at will.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A running HTTP server.
#[derive(Debug)]
pub struct HttpServer {
    accepting: JoinHandle<()>,
}

impl HttpServer {
    /// Serves `app` until `shutdown` is cancelled. Then it stops accepting, closes idle connections,
    /// and gives requests in flight [`connection::STOP_GRACE`] to finish.
    pub fn serve(listener: TcpListener, app: App, shutdown: CancellationToken) -> Self {
        let limits = app.limits().clone();
        let state = ApiState::new(app);
        let service = Service { router: api::router(state.clone()), keys: Some(state) };
        Self::serve_with(listener, service, &limits, shutdown)
    }

    fn serve_with(
        listener: TcpListener,
        service: Service,
        limits: &Limits,
        shutdown: CancellationToken,
    ) -> Self {
        let shared = Arc::new(Shared {
            header_timeout: Duration::from_millis(limits.header_timeout_ms),
            shed: tokio::sync::Notify::new(),
            is_full: AtomicBool::new(false),
            shutdown,
        });
        let room = Arc::new(Semaphore::new(limits.http_connections_max));
        Self { accepting: tokio::spawn(accept_all(listener, service, room, shared)) }
    }

    /// Waits until the server has stopped and its last connection is closed.
    ///
    /// Takes at most [`connection::STOP_GRACE`] after the cancellation.
    pub async fn join(self) {
        if let Err(error) = self.accepting.await {
            tracing::error!(%error, "the HTTP accept loop ended badly");
        }
    }
}

async fn accept_all(
    listener: TcpListener,
    service: Service,
    room: Arc<Semaphore>,
    shared: Arc<Shared>,
) {
    let connections = TaskTracker::new();
    let mut failures = AcceptFailures::default();
    let shutdown = shared.shutdown.clone();
    while let Some((stream, permit)) = shutdown
        .run_until_cancelled(next_connection(&listener, &room, &shared, &mut failures))
        .await
    {
        let (service, shared) = (service.clone(), shared.clone());
        connections.spawn(async move {
            connection::serve(stream, service, shared).await;
            drop(permit);
        });
    }
    // Refuses new connections at once, instead of leaving them in a queue that nobody serves.
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// The next connection and the room for it.
///
/// When the server is full, the one connection accepted last waits here, the others in the kernel's
/// queue, until a connection ends. The longest idle one is asked to: without that, clients that hold
/// connections and say nothing would keep everybody else out.
async fn next_connection(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
    shared: &Shared,
    failures: &mut AcceptFailures,
) -> (TcpStream, OwnedSemaphorePermit) {
    let stream = loop {
        match listener.accept().await {
            Ok((stream, _)) => break stream,
            Err(error) if is_the_peers(&error) => {}
            Err(error) => {
                failures.note(&error);
                make_room(shared, tokio::time::sleep(ACCEPT_PAUSE)).await;
            }
        }
    };
    let permit = match room.clone().try_acquire_owned() {
        Ok(permit) => permit,
        Err(_) => {
            let permit = make_room(shared, room.clone().acquire_owned()).await;
            permit.expect("the semaphore is never closed")
        }
    };
    (stream, permit)
}

/// Asks a connection to make room, until `wait` is over.
async fn make_room<T>(shared: &Shared, wait: impl Future<Output = T>) -> T {
    // Whoever is woken sees this, and so does who becomes idle later.
    shared.is_full.store(true, Ordering::Relaxed);
    shared.shed.notify_one();
    let waited = wait.await;
    shared.is_full.store(false, Ordering::Relaxed);
    waited
}

fn is_the_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// Failures of accept since the last log line.
#[derive(Default)]
struct AcceptFailures {
    count: u64,
    logged: Option<Instant>,
}

impl AcceptFailures {
    fn note(&mut self, error: &io::Error) {
        self.count += 1;
        if self.logged.is_none_or(|at| at.elapsed() >= ACCEPT_LOG_INTERVAL) {
            tracing::warn!(%error, failures = self.count, "cannot accept HTTP connections");
            *self = Self { count: 0, logged: Some(Instant::now()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::routing::{get, post};
    use axum::{Extension, Router};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::Notify;

    use super::super::body::{BodyBudget, BodyLimit, BodySlot};
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// In bytes; Linux gives both ends of a connection 10 MiB together.
    const LARGER_THAN_SOCKETS_HOLD: usize = 64 << 20;

    async fn start(router: Router, limits: Limits) -> (SocketAddr, HttpServer, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let service = Service { router, keys: None };
        let server = HttpServer::serve_with(listener, service, &limits, shutdown.clone());
        (address, server, shutdown)
    }

    fn hello() -> Router {
        Router::new().route("/", get(|| async { "hello" }))
    }

    async fn send(stream: &mut TcpStream, text: &str) {
        stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// Everything until the server closes.
    async fn read_all(stream: &mut TcpStream) -> String {
        let mut bytes = Vec::new();
        let read = stream.read_to_end(&mut bytes);
        tokio::time::timeout(PATIENCE, read).await.expect("the server did not close").unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// Reads until the answer holds `end`, with the connection staying open.
    async fn read_until(stream: &mut TcpStream, end: &str) -> String {
        let mut text = String::new();
        while !text.contains(end) {
            let mut chunk = [0; 1024];
            let read = tokio::time::timeout(PATIENCE, stream.read(&mut chunk));
            let count = read.await.expect("no answer in time").unwrap();
            assert_ne!(count, 0, "closed after {text:?}");
            text.push_str(std::str::from_utf8(&chunk[..count]).unwrap());
        }
        text
    }

    /// Pipelined requests are answered in order on one connection.
    #[tokio::test]
    async fn pipelined_requests_are_all_answered() {
        let (address, server, shutdown) = start(hello(), Limits::default()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let one = "GET / HTTP/1.1\r\n\r\n";
        send(&mut stream, &format!("{one}{one}GET / HTTP/1.1\r\nConnection: close\r\n\r\n")).await;
        assert_eq!(read_all(&mut stream).await.matches("200 OK").count(), 3);
        shutdown.cancel();
        server.join().await;
    }

    /// A route that answers once the gate opens.
    fn gated(gate: &Arc<Notify>) -> Router {
        let gate = gate.clone();
        let wait = move || {
            let gate = gate.clone();
            async move {
                gate.notified().await;
                "done"
            }
        };
        hello().route("/wait", get(wait))
    }

    /// How long a body is, once it is whole.
    async fn take_in(slot: BodySlot) -> String {
        let limit = BodyLimit { what: "body", bytes_max: 1 << 20 };
        let deadline = Instant::now() + 2 * PATIENCE;
        let read = slot.read(limit, &BodyBudget::new(1 << 20), deadline, 2 * PATIENCE).await;
        read.map_or_else(|error| error.to_string(), |body| body.bytes.len().to_string())
    }

    /// A client that closes its sending side before the answer is there still gets it.
    #[tokio::test]
    async fn a_half_closed_connection_is_answered() {
        let gate = Arc::new(Notify::new());
        let (address, _server, _shutdown) = start(gated(&gate), Limits::default()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        send(&mut stream, "GET /wait HTTP/1.1\r\n\r\n").await;
        stream.shutdown().await.unwrap();
        let closed = tokio::time::timeout(Duration::from_millis(200), stream.readable()).await;
        assert!(closed.is_err(), "the server hung up");
        gate.notify_one();
        assert!(read_all(&mut stream).await.ends_with("done"));
    }

    /// A header that never ends is cut off, however steadily it drips.
    #[tokio::test]
    async fn a_slow_header_is_cut_off() {
        let limits = Limits { header_timeout_ms: 200, ..Limits::default() };
        let (address, _server, _shutdown) = start(hello(), limits).await;
        let (mut reader, mut writer) = TcpStream::connect(address).await.unwrap().into_split();
        let start = Instant::now();
        let drip = tokio::spawn(async move {
            while writer.write_all(b"GET / HTTP/1.1\r\nX: y\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, reader.read_to_end(&mut rest)).await;
        ended.expect("the server kept waiting").unwrap();
        assert!(rest.starts_with(b"HTTP/1.1 400 "), "{rest:?}");
        assert!(start.elapsed() >= Duration::from_millis(200));
        drip.abort();
    }

    /// With all connections idle, a new client is served: the longest idle one makes room.
    #[tokio::test]
    async fn idle_connections_do_not_keep_others_out() {
        let limits = Limits { http_connections_max: 2, ..Limits::default() };
        let (address, _server, _shutdown) = start(hello(), limits).await;
        let mut idle = Vec::new();
        for _ in 0..2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            send(&mut stream, "GET / HTTP/1.1\r\n\r\n").await;
            read_until(&mut stream, "hello").await;
            idle.push(stream);
        }
        let mut third = TcpStream::connect(address).await.unwrap();
        send(&mut third, "GET / HTTP/1.1\r\n\r\n").await;
        read_until(&mut third, "hello").await;
        assert_eq!(read_all(&mut idle[0]).await, "", "the longest idle one was closed");
        send(&mut idle[1], "GET / HTTP/1.1\r\n\r\n").await;
        read_until(&mut idle[1], "hello").await;
    }

    /// While all connections are busy, a new one waits its turn; none is closed for it. Nor is one later, when
    /// room became free by itself.
    #[tokio::test]
    async fn connections_are_closed_only_if_idle_and_while_somebody_waits() {
        let gate = Arc::new(Notify::new());
        let limits = Limits { http_connections_max: 1, ..Limits::default() };
        let (address, _server, _shutdown) = start(gated(&gate), limits).await;
        let mut busy = TcpStream::connect(address).await.unwrap();
        send(&mut busy, "GET /wait HTTP/1.1\r\nConnection: close\r\n\r\n").await;
        let mut late = TcpStream::connect(address).await.unwrap();
        send(&mut late, "GET / HTTP/1.1\r\n\r\n").await;
        let early = tokio::time::timeout(connection::SHED_AFTER * 2, late.readable()).await;
        assert!(early.is_err(), "answered although there was no room");
        gate.notify_one();
        assert!(read_all(&mut busy).await.ends_with("done"));
        read_until(&mut late, "hello").await;
        let closed = tokio::time::timeout(connection::SHED_AFTER * 2, late.readable()).await;
        assert!(closed.is_err(), "closed although nobody waits");
        // It still makes room for the next who needs it.
        let mut third = TcpStream::connect(address).await.unwrap();
        send(&mut third, "GET / HTTP/1.1\r\n\r\n").await;
        read_until(&mut third, "hello").await;
        assert_eq!(read_all(&mut late).await, "");
    }

    /// A request whose chunks are all there is busy like any other, however they arrived.
    #[tokio::test]
    async fn a_whole_body_of_chunks_keeps_its_connection() {
        let gate = Arc::new(Notify::new());
        let reached = Arc::new(Notify::new());
        let (opened, told) = (gate.clone(), reached.clone());
        let upload = post(move |Extension(slot): Extension<BodySlot>| async move {
            let length = take_in(slot).await;
            told.notify_one();
            opened.notified().await;
            length
        });
        let router = hello().route("/in", upload);
        let limits = Limits { http_connections_max: 1, ..Limits::default() };
        let (address, _server, _shutdown) = start(router, limits).await;
        let mut busy = TcpStream::connect(address).await.unwrap();
        send(&mut busy, "POST /in HTTP/1.1\r\nTransfer-Encoding: chunked\r\n").await;
        // Larger than what is read at once: some of it goes past the gate.
        let chunk = "x".repeat(0x10000);
        send(&mut busy, &format!("Connection: close\r\n\r\n10000\r\n{chunk}\r\n0\r\n\r\n")).await;
        reached.notified().await;
        let mut late = TcpStream::connect(address).await.unwrap();
        send(&mut late, "GET / HTTP/1.1\r\n\r\n").await;
        let early = tokio::time::timeout(connection::SHED_AFTER * 2, late.readable()).await;
        assert!(early.is_err(), "answered although there was no room");
        gate.notify_one();
        assert!(read_all(&mut busy).await.ends_with("65536"));
        read_until(&mut late, "hello").await;
    }

    /// Who drips or holds back a body, in chunks too, or does not read his answer, makes room for others.
    #[tokio::test]
    async fn slow_clients_make_room() {
        let upload = post(|Extension(slot): Extension<BodySlot>| take_in(slot));
        let large = get(|| async { vec![b'x'; LARGER_THAN_SOCKETS_HOLD] });
        let router = hello().route("/in", upload).route("/large", large);
        let limits = Limits { http_connections_max: 1, ..Limits::default() };
        let (address, _server, _shutdown) = start(router, limits).await;
        let head = "POST /in HTTP/1.1\r\n";
        for (request, drip) in [
            (format!("{head}Content-Length: 9999\r\n\r\n"), "x"),
            (format!("{head}Transfer-Encoding: chunked\r\n\r\n"), "1\r\nx\r\n"),
            (format!("{head}Transfer-Encoding: chunked\r\n\r\n"), ""),
            ("GET /large HTTP/1.1\r\n\r\n".to_owned(), ""),
        ] {
            let mut slow = TcpStream::connect(address).await.unwrap();
            send(&mut slow, &request).await;
            let dripping = tokio::spawn(async move {
                while slow.write_all(drip.as_bytes()).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
            let mut late = TcpStream::connect(address).await.unwrap();
            send(&mut late, "GET / HTTP/1.1\r\nConnection: close\r\n\r\n").await;
            assert!(read_all(&mut late).await.ends_with("hello"), "behind {request:?}");
            dripping.abort();
        }
    }

    /// Stopping lets a request in flight finish, closes idle connections, and ends.
    #[tokio::test]
    async fn stopping_finishes_what_is_in_flight() {
        let gate = Arc::new(Notify::new());
        let (address, server, shutdown) = start(gated(&gate), Limits::default()).await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        send(&mut idle, "GET / HTTP/1.1\r\n\r\n").await;
        read_until(&mut idle, "hello").await;
        let mut busy = TcpStream::connect(address).await.unwrap();
        // The first answer shows that the second request of the pipeline is being looked at.
        send(&mut busy, "GET / HTTP/1.1\r\n\r\nGET /wait HTTP/1.1\r\n\r\n").await;
        read_until(&mut busy, "hello").await;
        shutdown.cancel();
        assert_eq!(read_all(&mut idle).await, "");
        gate.notify_one();
        assert!(read_all(&mut busy).await.ends_with("done"));
        tokio::time::timeout(PATIENCE, server.join()).await.unwrap();
        assert!(TcpStream::connect(address).await.is_err(), "the port is free");
    }

    /// Who goes on sending requests behind the last one that is answered reads that answer, and then an end: a reset
    /// might take it away. Who is idle is not waited for.
    #[tokio::test]
    async fn stopping_resets_nobody() {
        let (gate, reached) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (opened, told) = (gate.clone(), reached.clone());
        let wait = get(move || async move {
            told.notify_one();
            opened.notified().await;
            "done"
        });
        let (address, server, shutdown) =
            start(hello().route("/wait", wait), Limits::default()).await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        send(&mut idle, "GET / HTTP/1.1\r\n\r\n").await;
        read_until(&mut idle, "hello").await;
        let mut busy = TcpStream::connect(address).await.unwrap();
        send(&mut busy, "GET /wait HTTP/1.1\r\n\r\n").await;
        reached.notified().await;
        // Nobody reads these as long as the one before them is being answered.
        send(&mut busy, &"GET / HTTP/1.1\r\n\r\n".repeat(5000)).await;
        shutdown.cancel();
        assert_eq!(read_all(&mut idle).await, "");
        gate.notify_one();
        let text = read_all(&mut busy).await;
        assert!(text.ends_with("done") && text.contains("connection: close"), "{text}");
        send(&mut busy, "GET / HTTP/1.1\r\n\r\n").await;
        drop(busy);
        tokio::time::timeout(PATIENCE, server.join()).await.unwrap();
    }

    /// A body that nobody reads neither hides the answer nor ends the connection.
    #[tokio::test]
    async fn an_unread_body_does_not_hide_the_answer() {
        let (address, _server, _shutdown) = start(hello(), Limits::default()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let length = 4 << 20;
        send(&mut stream, &format!("PUT /no HTTP/1.1\r\nContent-Length: {length}\r\n\r\n")).await;
        stream.write_all(&vec![b'x'; length]).await.unwrap();
        send(&mut stream, "GET / HTTP/1.1\r\n\r\n").await;
        let both = read_until(&mut stream, "hello").await;
        assert!(both.starts_with("HTTP/1.1 404"), "{both}");
    }

    /// Who asks before sending a body is answered without being asked for it.
    #[tokio::test]
    async fn a_refused_expectation_closes_without_a_continue() {
        let (address, _server, _shutdown) = start(hello(), Limits::default()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = "PUT /no HTTP/1.1\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n";
        send(&mut stream, head).await;
        let answer = read_all(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
}
