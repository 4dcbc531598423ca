//! The short way: plain requests are answered without hyper and axum.
//!
//! A request on a key is a read from the socket, a parsed head, the work, and one write. hyper and axum
//! do much more for it, and with many clients that was the largest part of a node's own time. So a
//! connection begins here: as long as requests are plain ([`PlainRequest`]) and whole, the handlers of
//! [`super::super::api`] answer them directly, with the same calls and the same answers. The first
//! request that is not, or whose body is slow to come, goes to hyper together with the rest of the
//! connection. Nothing of it was consumed until then.
//!
//! [`PlainRequest`]: super::super::head::PlainRequest

use std::cell::RefCell;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::to_bytes;
use bytes::Buf;
use http::header::CONTENT_LENGTH;
use http::response::Parts;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout_at};

use super::super::api::{self, ApiState, PlainAnswer};
use super::super::head::Whole;
use super::clock::{Activity, Serving};
use super::socket::Watched;
use crate::types::{Record, Revision};

/// How long a body may follow its head: it is often the next packet. Slower ones are hyper's, where the
/// clocks for bodies are.
const BODY_WAIT_MAX: Duration = Duration::from_millis(100);

/// Bodies up to this size are copied behind their head, so that both leave as one piece of memory.
const COPIED_BYTES_MAX: usize = 16 << 10;

/// How the short way ends.
#[derive(Debug)]
pub(super) enum End {
    /// With the connection.
    Closed,
    /// Something came that hyper has to look at.
    Hyper,
}

/// Serves a connection as long as it can. Nothing is lost when it ends for hyper; dropping it loses what
/// is being answered.
pub(super) async fn serve(
    socket: &mut Watched,
    state: &ApiState,
    router: &Router,
    activity: &Arc<Activity>,
    header_timeout: Duration,
) -> io::Result<End> {
    let mut out = Vec::new();
    let mut body_until = None;
    while !activity.is_stopping() {
        let request = match socket.gate().whole() {
            Whole::Request(request) => *request,
            Whole::Other => return Ok(End::Hyper),
            Whole::More => {
                let received = if socket.gate().lacks_body() {
                    let wait = BODY_WAIT_MAX.min(header_timeout / 2);
                    let until = *body_until.get_or_insert_with(|| Instant::now() + wait);
                    match timeout_at(until, socket.receive()).await {
                        Ok(received) => received?,
                        Err(_) => return Ok(End::Hyper),
                    }
                } else {
                    socket.receive().await?
                };
                if received == 0 {
                    let end = if socket.gate().has_begun() { End::Hyper } else { End::Closed };
                    return Ok(end);
                }
                continue;
            }
        };
        body_until = None;
        let serving = Serving::begin(activity.clone());
        let answer = api::answer_plain(state, router, request).await;
        drop(serving);
        write(socket, answer, activity.is_stopping(), &mut out).await?;
    }
    socket.shutdown().await?;
    Ok(End::Closed)
}

async fn write(
    socket: &mut Watched,
    answer: PlainAnswer,
    last: bool,
    out: &mut Vec<u8>,
) -> io::Result<()> {
    out.clear();
    let body = match answer {
        PlainAnswer::Stored(revision) => {
            encode_stored(revision, last, out)?;
            return socket.write_all(out).await;
        }
        PlainAnswer::Found(record) => {
            encode_found(&record, last, out)?;
            record.value
        }
        PlainAnswer::Other(response) => {
            let (head, body) = response.into_parts();
            // It is in memory already: handlers make no other bodies.
            let body = to_bytes(body, usize::MAX).await.map_err(io::Error::other)?;
            encode_head(&head, body.len(), last, out)?;
            body
        }
    };
    if body.len() <= COPIED_BYTES_MAX {
        out.extend_from_slice(&body);
        return socket.write_all(out).await;
    }
    socket.write_all_buf(&mut (&out[..]).chain(body)).await
}

/// The answer to a `PUT`, whole.
fn encode_stored(revision: Revision, last: bool, out: &mut Vec<u8>) -> io::Result<()> {
    let body_bytes = br#"{"revision":}"#.len() + decimal_digits(revision);
    write!(
        out,
        "HTTP/1.1 200 OK\r\ncontent-length: {body_bytes}\r\ncontent-type: application/json\r\n"
    )?;
    end_head(last, out);
    write!(out, r#"{{"revision":{revision}}}"#)
}

/// The head of the answer to a `GET` of a key.
fn encode_found(record: &Record, last: bool, out: &mut Vec<u8>) -> io::Result<()> {
    let (body_bytes, revision) = (record.value.len(), record.revision);
    write!(
        out,
        "HTTP/1.1 200 OK\r\ncontent-length: {body_bytes}\r\ncontent-type: application/octet-stream\r\n\
         etag: \"{revision}\"\r\n"
    )?;
    end_head(last, out);
    Ok(())
}

fn decimal_digits(number: u64) -> usize {
    number.checked_ilog10().map_or(1, |digits| digits as usize + 1)
}

/// The fields that handlers set, and those that are the server's: how long the body is, when it was sent,
/// and whether the connection ends.
fn encode_head(head: &Parts, body_bytes: usize, last: bool, out: &mut Vec<u8>) -> io::Result<()> {
    let reason = head.status.canonical_reason().unwrap_or_default();
    write!(out, "HTTP/1.1 {} {reason}\r\ncontent-length: {body_bytes}\r\n", head.status.as_u16())?;
    // Some handlers have said it already, and twice is forbidden (RFC 9110, 8.6).
    let others = head.headers.iter().filter(|(name, _)| *name != CONTENT_LENGTH);
    for (name, value) in others {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            out.extend_from_slice(part);
        }
    }
    end_head(last, out);
    Ok(())
}

fn end_head(last: bool, out: &mut Vec<u8>) {
    if last {
        out.extend_from_slice(b"connection: close\r\n");
    }
    out.extend_from_slice(b"date: ");
    write_date(out);
    out.extend_from_slice(b"\r\n\r\n");
}

thread_local! {
    /// A second since the epoch, and how it is written.
    static DATE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
}

/// The date, which is made once a second.
fn write_date(out: &mut Vec<u8>) {
    let now = SystemTime::now();
    // Before the epoch, a clock is so wrong that any date will do.
    let second = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    DATE.with_borrow_mut(|(at, text)| {
        if *at != second || text.is_empty() {
            *at = second;
            *text = httpdate::fmt_http_date(now);
        }
        out.extend_from_slice(text.as_bytes());
    });
}

#[cfg(test)]
mod tests {
    use axum::response::Response;
    use http::HeaderValue;

    use super::*;

    /// What is written straight away is what the long way would write.
    #[tokio::test]
    async fn short_answers_are_the_same_answers() {
        for (revision, value) in [(0, ""), (7, "v"), (10, "0123456789"), (u64::MAX, "long value")] {
            let record = Record { revision, value: value.into() };
            for last in [false, true] {
                let (mut short, mut long) = (Vec::new(), Vec::new());
                encode_stored(revision, last, &mut short).unwrap();
                encode_found(&record, last, &mut short).unwrap();
                for response in [api::stored(revision), api::found(record.clone())] {
                    let (head, body) = response.into_parts();
                    let body = to_bytes(body, usize::MAX).await.unwrap();
                    encode_head(&head, body.len(), last, &mut long).unwrap();
                    if head.headers["content-type"] == "application/json" {
                        long.extend_from_slice(&body);
                    }
                }
                let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
                assert_eq!(text(short), text(long));
            }
        }
    }

    #[test]
    fn a_head_says_what_the_handler_and_the_server_say() {
        let mut response = Response::new(axum::body::Body::empty());
        *response.status_mut() = http::StatusCode::PRECONDITION_FAILED;
        response.headers_mut().insert("etag", HeaderValue::from_static("\"7\""));
        let (head, _) = response.into_parts();
        for (last, close) in [(false, ""), (true, "connection: close\r\n")] {
            let mut out = Vec::new();
            encode_head(&head, 12, last, &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            let (fields, date) = text.split_once("date: ").unwrap();
            let expected = format!(
                "HTTP/1.1 412 Precondition Failed\r\ncontent-length: 12\r\netag: \"7\"\r\n{close}"
            );
            assert_eq!(fields, expected);
            let date = httpdate::parse_http_date(date.trim_end()).unwrap();
            assert!(date.elapsed().unwrap() < Duration::from_secs(10));
        }
    }
}
