//! What the integration tests share: nodes as real processes, and HTTP written by hand.
//!
//! Requests go out byte for byte, because libraries normalise paths, and normalised paths are what
//! the server must not rely on. Nothing here retries.

// Each test binary uses a part of this.
#![allow(dead_code)]

pub mod alone;
pub mod cluster;
pub mod clusters;
pub mod line;
pub mod load;
pub mod network;
pub mod proxy;
pub mod ring_load;
pub mod watch;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

/// The program that is a node.
pub const RAFT_KV: &str = env!("CARGO_BIN_EXE_raft-kv");

/// How long anything may take that is expected to happen. Generous: test machines are busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long tests wait in all for something that makes progress.
pub const PATIENCE_WITH_PROGRESS: Duration = Duration::from_secs(300);

/// How to start a node. Port 0 picks a free port.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    pub id: u64,
    pub http_addr: String,
    pub rpc_addr: String,
    pub cluster: Option<String>,
    pub config_file: Option<PathBuf>,
    pub data_dir: PathBuf,
}

impl NodeOptions {
    /// A node on free ports with the default configuration.
    pub fn new(id: u64, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            id,
            http_addr: "127.0.0.1:0".into(),
            rpc_addr: "127.0.0.1:0".into(),
            cluster: None,
            config_file: None,
            data_dir: data_dir.into(),
        }
    }
}

/// A running `raft-kv`. Dropping it kills and reaps it; if the test is failing, its log is shown.
pub struct NodeProcess {
    child: Child,
    options: NodeOptions,
    log: PathBuf,
}

impl NodeProcess {
    /// Starts a node and waits until both of its listeners accept.
    pub fn start(options: &NodeOptions) -> Self {
        Self::start_by(options, Command::new(RAFT_KV))
    }

    /// The same by a command that becomes a node when it gets the node's flags.
    pub fn start_by(options: &NodeOptions, mut command: Command) -> Self {
        let log = options.data_dir.with_extension(format!("node-{}.log", options.id));
        let stderr = File::options().create(true).append(true).open(&log).unwrap();
        command.args(["--id", &options.id.to_string()]);
        command.args(["--http-addr", &options.http_addr, "--rpc-addr", &options.rpc_addr]);
        command.arg("--data-dir").arg(&options.data_dir);
        if let Some(cluster) = &options.cluster {
            command.args(["--cluster", cluster]);
        }
        if let Some(file) = &options.config_file {
            command.arg("--config").arg(file);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let child = command.spawn().expect("raft-kv starts");
        let mut node = Self { child, options: options.clone(), log };
        let (http, rpc) = node.await_ready();
        node.options.http_addr = http;
        node.options.rpc_addr = rpc;
        node
    }

    /// The addresses in the line `ready http=ADDR rpc=ADDR`.
    fn await_ready(&mut self) -> (String, String) {
        let stdout = BufReader::new(self.child.stdout.take().expect("stdout is piped"));
        let (tell, lines) = mpsc::channel();
        // Reads on to the end, so that the node never blocks on a full pipe.
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // Nobody listens any more once the line has come.
                let _ = tell.send(line);
            }
        });
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = lines.recv_timeout(left).expect("the node says that it is ready");
            let Some(rest) = line.strip_prefix("ready http=") else { continue };
            let (http, rpc) = rest.split_once(" rpc=").expect("ready http=ADDR rpc=ADDR");
            return (http.to_owned(), rpc.to_owned());
        }
    }

    /// The address of its HTTP listener.
    pub fn http(&self) -> &str {
        &self.options.http_addr
    }

    /// The address of its peer listener.
    pub fn rpc(&self) -> &str {
        &self.options.rpc_addr
    }

    /// Options that start it again on the same data and the same addresses.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The memory that it takes up, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most memory that it has ever taken up, in bytes.
    pub fn peak_resident_bytes(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("Linux says it");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("KiB");
        kib << 10
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process exists");
    }

    /// SIGKILL; returns once it is gone.
    pub fn kill9(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; returns how it ended.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        eventually("the node ends after SIGTERM", || self.child.try_wait().unwrap())
    }

    /// SIGSTOP. Returns when every thread has stopped: until then the node may still answer.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        eventually("the node is stopped", || {
            let mut stopped = fs::read_dir(&tasks).unwrap().map(|task| {
                // `PID (NAME) STATE ...`; a thread that has just ended has no file.
                fs::read_to_string(task.unwrap().path().join("stat"))
                    .is_ok_and(|stat| stat.rsplit(") ").next().unwrap().starts_with('T'))
            });
            stopped.all(|stopped| stopped).then_some(())
        });
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the end of node {}'s log:", self.options.id);
            lines.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Gives this process as many open files as it may have, for tests that open thousands of
/// connections.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).expect("no more than is allowed");
}

/// Asks again and again until there is an answer; panics with `what` when there is none in time.
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "did not happen in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asks until there is an answer, for as long as there is progress: fails when what `progress` says
/// has stayed the same for [`PATIENCE`], and in any case after [`PATIENCE_WITH_PROGRESS`]. For what
/// has an amount, so that its time depends on the machine.
#[track_caller]
pub fn eventually_by_progress<P: PartialEq + std::fmt::Debug, T>(
    what: &str,
    mut progress: impl FnMut() -> P,
    mut ask: impl FnMut() -> Option<T>,
) -> T {
    let end = Instant::now() + PATIENCE_WITH_PROGRESS;
    let (mut seen, mut deadline) = (progress(), Instant::now() + PATIENCE);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        let now = progress();
        if now != seen {
            (seen, deadline) = (now, Instant::now() + PATIENCE);
        }
        assert!(Instant::now() < deadline.min(end), "did not happen in time: {what}; at {seen:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An HTTP answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    /// A header's value, whatever the case of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Asserts that this is an error in the contract's shape, with this status, code and outcome.
    #[track_caller]
    pub fn assert_error(&self, status: u16, code: &str, outcome: &str) {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("application/json"));
        let error = &self.json()["error"];
        assert_eq!(error["code"], code, "{error}");
        assert_eq!(error["outcome"], outcome, "{error}");
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
        assert_eq!(self.header("retry-after").is_some(), status == 503, "{:?}", self.headers);
    }
}

/// One TCP connection that speaks HTTP/1.1 by hand.
pub struct Connection {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Connection {
    pub fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("the node accepts");
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, unread: Vec::new() }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the node reads");
    }

    /// Sends bytes to a node that may have closed already.
    pub fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Sends a request with a `Content-Length`.
    pub fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: node\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        self.send(&bytes);
    }

    /// Reads one answer.
    pub fn receive(&mut self) -> Answer {
        let mut answer = self.receive_head();
        let length = answer.header("content-length").expect("every answer tells its length");
        let length: usize = length.parse().unwrap();
        while self.unread.len() < length {
            assert!(self.read_more(), "closed in the middle of an answer");
        }
        answer.body = self.unread.drain(..length).collect();
        answer
    }

    /// Reads the head of an answer, such as the whole answer to `HEAD`.
    pub fn receive_head(&mut self) -> Answer {
        let end = loop {
            if let Some(at) = self.unread.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            assert!(self.read_more(), "closed before an answer: {:?}", self.unread);
        };
        let head: Vec<u8> = self.unread.drain(..end + 4).collect();
        let head = String::from_utf8(head).expect("heads are ASCII");
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status line");
        let headers = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let answer = Answer { status: status.parse().unwrap(), headers, body: Vec::new() };
        let is_length = |(name, _): &&(String, String)| name.eq_ignore_ascii_case("content-length");
        assert!(answer.headers.iter().filter(is_length).count() < 2, "{:?}", answer.headers);
        answer
    }

    /// Waits for the node to close; whether it sent something before.
    pub fn closes_after(&mut self) -> Vec<u8> {
        while self.read_more() {}
        std::mem::take(&mut self.unread)
    }

    /// Whether the node neither sends nor closes for so long.
    pub fn stays_open_for(&mut self, time: Duration) -> bool {
        self.stream.set_read_timeout(Some(time)).unwrap();
        let result = self.stream.peek(&mut [0]);
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        matches!(result, Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    }

    /// Closes the sending side.
    pub fn finish(&mut self) {
        // The node may have closed already.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn read_more(&mut self) -> bool {
        let mut chunk = [0; 16 << 10];
        match self.stream.read(&mut chunk) {
            Ok(count) => {
                self.unread.extend_from_slice(&chunk[..count]);
                count > 0
            }
            // A close with our bytes unread is a reset.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("no answer from the node: {error}"),
        }
    }
}

/// One request on a connection of its own.
pub fn request(
    address: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let mut connection = Connection::open(address);
    connection.request(method, path, headers, body);
    if method == "HEAD" { connection.receive_head() } else { connection.receive() }
}

/// `GET path`.
pub fn get(address: &str, path: &str) -> Answer {
    request(address, "GET", path, &[], b"")
}

/// `PUT path`.
pub fn put(address: &str, path: &str, body: &[u8]) -> Answer {
    request(address, "PUT", path, &[], body)
}

/// `DELETE path`.
pub fn delete(address: &str, path: &str) -> Answer {
    request(address, "DELETE", path, &[], b"")
}

/// `POST path`, without a `Content-Type`.
pub fn post(address: &str, path: &str, body: &str) -> Answer {
    request(address, "POST", path, &[], body.as_bytes())
}

/// Makes the node a cluster of its own and waits until it is ready.
pub fn init_alone(address: &str) {
    let answer = post(address, "/cluster/init", "{}");
    assert_eq!(answer.status, 200, "{}", answer.text());
    eventually("a cluster of one node is ready", || {
        (get(address, "/readyz").status == 200).then_some(())
    });
}
