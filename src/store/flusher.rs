//! Group commit: one thread turns everything that waits for the disk into one fsync.
//!
//! Writers have already put their batch into RocksDB (readable, ordered) when they come here. The
//! thread takes all of them at once, fsyncs, and only then tells them; whoever comes meanwhile is in
//! the next group. So the cost of an fsync is shared by as many entries as arrive during one.
//!
//! openraft takes an append's completion as a watermark, so of several waiting appends only the newest
//! is told. After each fsync the marker follows, at most once a [`MARKER_INTERVAL`] and once more when
//! writes pause, so that it is exact for an idle node.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use openraft::storage::IOFlushed;
use tokio::sync::oneshot;

use crate::types::{LogId, TypeConfig};

use super::engine::Engine;
use super::marker::Marker;

/// How far the marker may lag behind a busy log: it costs an fsync of its own.
const MARKER_INTERVAL: Duration = Duration::from_secs(1);

/// Who waits for the next fsync. The queue needs no bound of its own: openraft bounds the appends that
/// it has in flight, and its core task waits for each of the other two.
enum Waiter {
    Append {
        last: LogId,
        done: IOFlushed<TypeConfig>,
    },
    Barrier(oneshot::Sender<io::Result<()>>),
    /// The log is about to be cut after this entry.
    Cut {
        last: Option<LogId>,
        done: oneshot::Sender<io::Result<()>>,
    },
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiter>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// The thread's owner: [`Flusher::stop`] ends and joins it, and so does dropping it, as when a store does not open.
pub(super) struct Flusher {
    handle: FlushHandle,
    /// Until it was joined.
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Drop for Flusher {
    fn drop(&mut self) {
        // Nobody is left to be told; the engine remembers a failure.
        let _ = self.end();
    }
}

/// For those who wait for the disk.
#[derive(Clone)]
pub(super) struct FlushHandle {
    shared: Arc<Shared>,
}

impl Flusher {
    pub(super) fn spawn(engine: Arc<Engine>, marker: Arc<Marker>) -> Self {
        let shared = Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new() });
        let handle = FlushHandle { shared: shared.clone() };
        let thread = std::thread::Builder::new()
            .name("flusher".into())
            .spawn(move || Worker { engine, marker, shared, unmarked: None }.run())
            .expect("the system can start one more thread");
        Self { handle, thread: Some(thread) }
    }

    pub(super) fn handle(&self) -> FlushHandle {
        self.handle.clone()
    }

    /// Flushes what waits, writes the marker and ends the thread.
    pub(super) fn stop(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.handle.lock().closed = true;
        self.handle.shared.wake.notify_one();
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the flusher panicked")))
    }
}

impl FlushHandle {
    /// Calls `done` once everything written so far is on disk; `last` is the append's last entry.
    pub(super) fn append(&self, last: LogId, done: IOFlushed<TypeConfig>) {
        self.push(Waiter::Append { last, done });
    }

    /// Returns once everything written so far is on disk.
    pub(super) async fn barrier(&self) -> io::Result<()> {
        let (done, receiver) = oneshot::channel();
        self.push(Waiter::Barrier(done));
        receiver.await.unwrap_or_else(|_| Err(io::Error::other("the store is closed")))
    }

    /// Returns once the marker claims nothing after `last`, and no append before this call can make
    /// it do so again. Then the log may be cut there.
    pub(super) async fn cut(&self, last: Option<LogId>) -> io::Result<()> {
        let (done, receiver) = oneshot::channel();
        self.push(Waiter::Cut { last, done });
        receiver.await.unwrap_or_else(|_| Err(io::Error::other("the store is closed")))
    }

    fn push(&self, waiter: Waiter) {
        {
            let mut queue = self.lock();
            if !queue.closed {
                queue.waiting.push(waiter);
                self.shared.wake.notify_one();
                return;
            }
        }
        // The thread may have ended. Whoever waits for one of the others finds that it was dropped.
        if let Waiter::Append { done, .. } = waiter {
            done.io_completed(Err(io::Error::other("the store is closed")));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.shared.queue.lock().expect("no code panics while it holds this lock")
    }
}

struct Worker {
    engine: Arc<Engine>,
    marker: Arc<Marker>,
    shared: Arc<Shared>,
    /// The newest durable entry that the marker does not claim yet, and since when.
    unmarked: Option<(LogId, Instant)>,
}

impl Worker {
    fn run(mut self) -> io::Result<()> {
        loop {
            let (group, closed) = self.next_group();
            if !group.is_empty() {
                let result = self.engine.sync();
                self.tell(group, result);
            }
            self.mark(closed);
            if closed {
                // Nobody waits for a purge to be on disk; a clean stop leaves it there all the same.
                return self.engine.sync();
            }
        }
    }

    /// Waits for work; with an unmarked entry, not longer than until the marker is due.
    fn next_group(&self) -> (Vec<Waiter>, bool) {
        let mut queue = self.shared.queue.lock().expect("no code panics while it holds this lock");
        loop {
            if !queue.waiting.is_empty() || queue.closed {
                return (std::mem::take(&mut queue.waiting), queue.closed);
            }
            let Some((_, since)) = self.unmarked else {
                queue = self.shared.wake.wait(queue).expect("as above");
                continue;
            };
            let left = MARKER_INTERVAL.saturating_sub(since.elapsed());
            if left.is_zero() {
                return (Vec::new(), false);
            }
            queue = self.shared.wake.wait_timeout(queue, left).expect("as above").0;
        }
    }

    fn tell(&mut self, group: Vec<Waiter>, result: io::Result<()>) {
        let answer = || match &result {
            Ok(()) => Ok(()),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        let mut newest = None;
        for waiter in group {
            match waiter {
                Waiter::Barrier(sender) => {
                    // The waiter may have gone; then nobody needs to know.
                    let _ = sender.send(answer());
                }
                Waiter::Cut { last, done } => {
                    // As above.
                    let _ = done.send(answer().and_then(|()| self.cut(last)));
                }
                Waiter::Append { last, done } => {
                    if result.is_ok() {
                        let since = self.unmarked.map_or_else(Instant::now, |(_, since)| since);
                        self.unmarked = Some((last, since));
                    }
                    // A later watermark covers an earlier one; the other kinds must each be told.
                    if matches!(done, IOFlushed::Notify(_)) {
                        newest = Some(done);
                    } else {
                        done.io_completed(answer());
                    }
                }
            }
        }
        if let Some(done) = newest {
            done.io_completed(answer());
        }
    }

    fn cut(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.unmarked = None;
        let lowered = self.marker.lower_durable(last);
        lowered.map_err(|error| self.engine.fail("writing the marker", &error))
    }

    fn mark(&mut self, now: bool) {
        let Some((last, since)) = self.unmarked else { return };
        if !now && since.elapsed() < MARKER_INTERVAL {
            return;
        }
        if let Err(error) = self.marker.raise_durable(last) {
            self.engine.fail("writing the marker", &error);
        }
        self.unmarked = None;
    }
}
