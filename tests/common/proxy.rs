//! A TCP proxy that can be slow, stop in the middle of what it carries, lose what comes back, or cut off who
//! sends something that is not let through.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How what clusters ask each other in the middle of a change begins.
const BETWEEN_CLUSTERS: &[u8] = b"GET /cluster/";

/// How far a connection that is slowed down may have fallen behind its pace and still make up for
/// it: a busy machine wakes who sleeps late, after each piece.
const LAG_MAX: Duration = Duration::from_millis(200);

/// How much of the stream towards the target may pass before the proxy holds everything.
const NO_LIMIT: u64 = u64::MAX;

/// Carries bytes between whoever connects and a target. Ends with its drop.
pub struct Proxy {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    target: Mutex<String>,
    /// Bytes that went to the target.
    carried: AtomicU64,
    limit: AtomicU64,
    /// So many bytes a second of each connection go to the target; 0: as many as come.
    pace: AtomicU64,
    /// Every so many pieces from the target are lost, together with their connection; 0: none.
    loses_every: AtomicU64,
    came_back: AtomicU64,
    lost: AtomicU64,
    /// What a piece must not begin with.
    barred: Mutex<Option<&'static [u8]>>,
    stop: AtomicBool,
}

impl Proxy {
    /// Listens on a free port.
    pub fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            target: Mutex::new(target.to_owned()),
            carried: AtomicU64::new(0),
            limit: AtomicU64::new(NO_LIMIT),
            pace: AtomicU64::new(0),
            loses_every: AtomicU64::new(0),
            came_back: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            barred: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || accept(&listener, &accepting));
        Self { address, shared }
    }

    /// Where to connect instead of to the target.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How many bytes went to the target so far.
    pub fn carried(&self) -> u64 {
        self.shared.carried.load(Ordering::SeqCst)
    }

    /// Carries so many bytes more to the target and then holds, connections open.
    pub fn hold_after(&self, bytes: u64) {
        self.shared.limit.store(self.carried() + bytes, Ordering::SeqCst);
    }

    /// Carries no more than so many bytes a second of each connection to the target; 0: as many as come.
    pub fn slow_down(&self, bytes_per_s: u64) {
        self.shared.pace.store(bytes_per_s, Ordering::SeqCst);
    }

    /// Whether it holds.
    pub fn holds(&self) -> bool {
        self.carried() >= self.shared.limit.load(Ordering::SeqCst)
    }

    /// From now on the first of every `count` pieces that the target sends, such as an answer, is lost,
    /// and its connection ends, unless it answers what another cluster asked. 0: none.
    pub fn lose_every(&self, count: u64) {
        self.shared.came_back.store(0, Ordering::SeqCst);
        self.shared.loses_every.store(count, Ordering::SeqCst);
    }

    /// How many pieces were lost.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::SeqCst)
    }

    /// From now on a connection ends on which a piece comes that begins so, such as a request for this
    /// path; the piece is not carried.
    pub fn bar(&self, beginning: &'static [u8]) {
        *self.shared.barred.lock().unwrap() = Some(beginning);
    }

    /// Carries what was barred, too.
    pub fn unbar(&self) {
        *self.shared.barred.lock().unwrap() = None;
    }

    /// Carries everything again.
    pub fn release(&self) {
        self.shared.limit.store(NO_LIMIT, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread; when that is gone there is nobody to wake.
        let _ = TcpStream::connect(&self.address);
    }
}

impl Shared {
    fn bars(&self, piece: &[u8]) -> bool {
        self.barred.lock().unwrap().is_some_and(|beginning| piece.starts_with(beginning))
    }

    fn loses(&self) -> bool {
        let every = self.loses_every.load(Ordering::SeqCst);
        let loses =
            every > 0 && self.came_back.fetch_add(1, Ordering::SeqCst).is_multiple_of(every);
        self.lost.fetch_add(u64::from(loses), Ordering::SeqCst);
        loses
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let target = shared.target.lock().unwrap().clone();
        let (Ok(stream), Ok(onward)) = (stream, TcpStream::connect(target)) else { continue };
        let (Ok(stream_back), Ok(onward_back)) = (stream.try_clone(), onward.try_clone()) else {
            continue;
        };
        let (there, back) = (Arc::clone(shared), Arc::clone(shared));
        let asked = Arc::new(AtomicBool::new(false));
        let asks = Arc::clone(&asked);
        std::thread::spawn(move || carry(stream, onward, &there, Way::There(&asks)));
        std::thread::spawn(move || carry(onward_back, stream_back, &back, Way::Back(&asked)));
    }
}

/// Which way pieces of a connection go, and whether another cluster asked last.
#[derive(Clone, Copy)]
enum Way<'a> {
    There(&'a AtomicBool),
    Back(&'a AtomicBool),
}

impl Way<'_> {
    /// Whether the piece may go on.
    fn lets(self, piece: &[u8], shared: &Shared) -> bool {
        match self {
            Self::There(asks) => {
                asks.store(piece.starts_with(BETWEEN_CLUSTERS), Ordering::SeqCst);
                !shared.bars(piece)
            }
            Self::Back(asked) => asked.load(Ordering::SeqCst) || !shared.loses(),
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, shared: &Shared, way: Way<'_>) {
    // Failures of these cost speed only.
    let _ = to.set_nodelay(true);
    let _ = from.set_read_timeout(Some(Duration::from_millis(100)));
    let mut chunk = [0; 8 << 10];
    // When the next piece is due at the connection's pace.
    let mut due = Instant::now();
    while !shared.stop.load(Ordering::SeqCst) {
        let counted = matches!(way, Way::There(_));
        if counted && shared.carried.load(Ordering::SeqCst) >= shared.limit.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) if !way.lets(&chunk[..count], shared) => break,
            Ok(count) => {
                if to.write_all(&chunk[..count]).is_err() {
                    break;
                }
                if counted {
                    shared.carried.fetch_add(count as u64, Ordering::SeqCst);
                    let pace = shared.pace.load(Ordering::SeqCst);
                    if pace > 0 {
                        let takes = Duration::from_secs(1) * count as u32 / pace as u32;
                        let now = Instant::now();
                        due = (due + takes).max(now - LAG_MAX);
                        std::thread::sleep(due.saturating_duration_since(now));
                    }
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    // Either may be closed already.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
