//! An HTTP client for nodes that may die, pause or lie: it never panics, and says whether a request
//! that got no answer may have arrived.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::Answer;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lost {
    /// Nothing was sent: nobody accepts there.
    NotSent,
    /// Something was sent; it may or may not have an effect, now or later.
    Maybe(String),
}

/// A keep-alive connection to one address, opened when needed and dropped after any trouble.
#[derive(Debug)]
pub struct Line {
    address: String,
    timeout: Duration,
    stream: Option<TcpStream>,
}

impl Line {
    pub fn new(address: &str, timeout: Duration) -> Self {
        Self { address: address.to_owned(), timeout, stream: None }
    }

    /// One request, one answer, within the line's timeout. Never sends anything twice.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer, Lost> {
        let deadline = Instant::now() + self.timeout;
        let mut stream = match self.stream.take().filter(is_open) {
            Some(stream) => stream,
            None => connect(&self.address, self.timeout).ok_or(Lost::NotSent)?,
        };
        let maybe = |error: std::io::Error| Lost::Maybe(error.to_string());
        let bytes = encode(method, path, headers, body);
        stream.set_write_timeout(Some(self.timeout)).map_err(maybe)?;
        stream.write_all(&bytes).map_err(maybe)?;
        let answer = receive(&mut stream, deadline).map_err(maybe)?;
        if answer.header("connection") != Some("close") {
            self.stream = Some(stream);
        }
        Ok(answer)
    }

    /// Sends a request without waiting for its answer. For a process that does not run just now.
    pub fn send_only(address: &str, method: &str, path: &str, headers: &[(&str, &str)]) -> Pending {
        let mut stream = TcpStream::connect(address).expect("the kernel accepts for it");
        stream.write_all(&encode(method, path, headers, b"")).expect("the kernel buffers it");
        Pending { stream }
    }
}

/// A request that was sent.
#[derive(Debug)]
pub struct Pending {
    stream: TcpStream,
}

impl Pending {
    /// Its answer; `None` when there is none within `timeout`.
    pub fn answer(mut self, timeout: Duration) -> Option<Answer> {
        receive(&mut self.stream, Instant::now() + timeout).ok()
    }
}

/// One request on a connection of its own.
pub fn try_request(
    address: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    timeout: Duration,
) -> Result<Answer, Lost> {
    Line::new(address, timeout).request(method, path, headers, body)
}

/// Whether a kept connection was not closed meanwhile. A close that is still under way is not seen,
/// and the request then counts as one that may have arrived.
fn is_open(stream: &TcpStream) -> bool {
    if stream.set_nonblocking(true).is_err() {
        return false;
    }
    let idle = matches!(stream.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock);
    idle && stream.set_nonblocking(false).is_ok()
}

fn connect(address: &str, timeout: Duration) -> Option<TcpStream> {
    let stream = TcpStream::connect_timeout(&address.parse().ok()?, timeout).ok()?;
    // A connection to a free port on this machine can meet itself: both ends are the same socket.
    if stream.local_addr().ok()? == stream.peer_addr().ok()? {
        return None;
    }
    stream.set_nodelay(true).ok()?;
    Some(stream)
}

fn encode(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: node\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

fn receive(stream: &mut TcpStream, deadline: Instant) -> std::io::Result<Answer> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        if let Some(answer) = parse(&bytes)? {
            return Ok(answer);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

/// The answer, when all of it is there.
fn parse(bytes: &[u8]) -> std::io::Result<Option<Answer>> {
    let bad = || std::io::Error::from(ErrorKind::InvalidData);
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| bad())?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).ok_or_else(bad)?;
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let status = status.parse().map_err(|_| bad())?;
    let mut answer = Answer { status, headers, body: Vec::new() };
    let length = answer.header("content-length").and_then(|text| text.parse().ok());
    let length: usize = length.ok_or_else(bad)?;
    let body = &bytes[end + 4..];
    if body.len() < length {
        return Ok(None);
    }
    answer.body = body[..length].to_vec();
    Ok(Some(answer))
}
