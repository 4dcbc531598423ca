//! One keep-alive connection, and the little of HTTP/1.1 that a load needs.
//!
//! The load program shares the machine with what it measures, so it should cost as little as curl or Go
//! would: one write, one read, no task beside the caller's. It understands answers that say how long they
//! are, which is how this store answers.

use std::io::Write;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The most fields of an answer.
const FIELDS_MAX: usize = 32;

/// A request is put together in a buffer that is kept unless it grew beyond this, in bytes.
const BUFFER_BYTES_KEPT_MAX: usize = 256 << 10;

/// An open connection. After an error, or when an exchange was not finished, it must not be used again.
#[derive(Debug)]
pub struct KeepAlive {
    stream: TcpStream,
    out: Vec<u8>,
    received: BytesMut,
}

/// A request.
#[derive(Debug)]
pub struct Request<'a> {
    /// In capital letters.
    pub method: &'a str,
    /// Escaped, with the query.
    pub path: &'a str,
    /// Who is asked.
    pub host: &'a str,
    /// One more field, if any.
    pub field: Option<(&'a str, &'a str)>,
    /// Possibly empty.
    pub body: &'a [u8],
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// What `ETag` says, with its quotes.
    pub etag: Option<String>,
    /// All of it.
    pub body: Bytes,
    /// Whether the other side closes the connection after it.
    pub closes: bool,
}

impl KeepAlive {
    /// Takes over a stream.
    pub fn new(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, out: Vec::new(), received: BytesMut::new() })
    }

    /// Sends a request and reads the answer.
    pub async fn exchange(&mut self, request: &Request<'_>) -> Result<Answer, String> {
        self.write(request).await.map_err(|error| error.to_string())?;
        loop {
            if let Some((answer, body_at, body_bytes)) = head_of(&self.received)? {
                while self.received.len() < body_at + body_bytes {
                    self.receive().await?;
                }
                self.received.advance(body_at);
                let body = Bytes::copy_from_slice(&self.received[..body_bytes]);
                self.received.advance(body_bytes);
                return Ok(Answer { body, ..answer });
            }
            self.receive().await?;
        }
    }

    async fn write(&mut self, request: &Request<'_>) -> std::io::Result<()> {
        let Request { method, path, host, field, body } = request;
        let out = &mut self.out;
        out.clear();
        write!(out, "{method} {path} HTTP/1.1\r\nhost: {host}\r\n")?;
        if let Some((name, value)) = field {
            write!(out, "{name}: {value}\r\n")?;
        }
        if !body.is_empty() || *method == "PUT" {
            write!(out, "content-length: {}\r\n", body.len())?;
        }
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(body);
        let written = self.stream.write_all(out).await;
        if out.capacity() > BUFFER_BYTES_KEPT_MAX {
            *out = Vec::new();
        }
        written
    }

    async fn receive(&mut self) -> Result<(), String> {
        self.received.reserve(4 << 10);
        match self.stream.read_buf(&mut self.received).await {
            Ok(0) => Err("the connection was closed".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// The head at the start of `bytes`, where its body begins and how long that is; `None` while it is not
/// whole.
fn head_of(bytes: &[u8]) -> Result<Option<(Answer, usize, usize)>, String> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    let body_at = match response.parse(bytes) {
        Ok(httparse::Status::Complete(body_at)) => body_at,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(format!("the answer is no HTTP/1.1: {error}")),
    };
    let status = response.code.unwrap_or(0);
    let mut answer = Answer { status, etag: None, body: Bytes::new(), closes: false };
    let mut body_bytes = None;
    for field in response.headers {
        let text = std::str::from_utf8(field.value).unwrap_or_default();
        if field.name.eq_ignore_ascii_case("content-length") {
            body_bytes = text.parse().ok();
        } else if field.name.eq_ignore_ascii_case("etag") {
            answer.etag = Some(text.to_owned());
        } else if field.name.eq_ignore_ascii_case("connection") {
            answer.closes = text.eq_ignore_ascii_case("close");
        }
    }
    let body_bytes = body_bytes.ok_or("the answer does not say how long it is")?;
    Ok(Some((answer, body_at, body_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let text = b"HTTP/1.1 200 OK\r\nETag: \"7\"\r\nContent-Length: 3\r\n\r\nabc";
        for length in 0..text.len() - 3 {
            assert!(head_of(&text[..length]).unwrap().is_none());
        }
        let (answer, body_at, body_bytes) = head_of(text).unwrap().unwrap();
        assert_eq!((answer.status, body_at, body_bytes), (200, text.len() - 3, 3));
        assert_eq!(answer.etag.as_deref(), Some("\"7\""));
        assert!(head_of(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
        assert!(head_of(b"SSH-2.0\r\n\r\n").is_err());
    }
}
