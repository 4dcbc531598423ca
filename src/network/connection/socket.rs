//! The socket as hyper sees it: notes every byte that moves, and lets only sound requests through.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::super::error::ApiError;
use super::super::head::{Gate, HEAD_BUFFER_BYTES, Next};
use super::{Activity, Phase};

/// How long what a refused client goes on sending is thrown away: closing at once would reset the
/// connection, and the client might lose the answer that says why.
const REFUSED_GRACE: Duration = Duration::from_secs(1);

/// The socket; notes every byte that moves, and lets only sound requests through.
pub(super) struct Watched {
    stream: TcpStream,
    activity: Arc<Activity>,
    gate: Gate,
    refused: Option<Refused>,
}

/// What is left to do for a client that was refused at the gate.
struct Refused {
    /// The rest of its answer.
    answer: Bytes,
    /// Runs once that is written.
    grace: Pin<Box<Sleep>>,
}

impl Watched {
    pub(super) fn new(stream: TcpStream, activity: Arc<Activity>) -> Self {
        Self { stream, activity, gate: Gate::default(), refused: None }
    }

    fn note_written(&self, written: &Poll<io::Result<usize>>) {
        match written {
            Poll::Ready(Ok(1..)) => {
                self.activity.update(|phase| phase.note_written(Instant::now()));
            }
            Poll::Pending => self.activity.update(Phase::note_unread),
            Poll::Ready(_) => {}
        }
    }

    fn note_body(&self, awaited: bool) {
        self.activity.update(|phase| phase.note_body(awaited, Instant::now()));
    }

    /// Reads past the gate, no more than `max`.
    fn poll_direct(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
        max: u64,
    ) -> Poll<io::Result<usize>> {
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(buffer.remaining());
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(max));
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut part))?;
        let count = part.filled().len();
        buffer.advance(count);
        self.gate.passed(count);
        Poll::Ready(Ok(count))
    }

    /// Reads into the gate.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut piece = [0; HEAD_BUFFER_BYTES];
        let mut piece = ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut piece))?;
        self.gate.receive(piece.filled());
        Poll::Ready(Ok(piece.filled().len()))
    }

    /// Writes the refused client's answer, then takes what it still sends, for a moment.
    fn poll_refuse(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(refused) = &mut self.refused else { return Poll::Ready(Ok(())) };
        while refused.answer.has_remaining() {
            let mut stream = Pin::new(&mut self.stream);
            let written = ready!(stream.as_mut().poll_write(cx, &refused.answer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            refused.answer.advance(written);
            if refused.answer.is_empty() {
                refused.grace.as_mut().reset(Instant::now() + REFUSED_GRACE);
            }
        }
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        let mut scrap = [0; 4096];
        loop {
            if refused.grace.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut scrap = ReadBuf::new(&mut scrap);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut scrap))?;
            if scrap.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl Refused {
    fn new(error: &ApiError) -> Self {
        let (status, _) = error.status_and_code();
        let body = serde_json::to_string(&error.body()).unwrap_or_default();
        let reason = status.canonical_reason().unwrap_or_default();
        let answer = format!(
            "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n{body}",
            status.as_u16(),
            body.len()
        );
        Self { answer: answer.into(), grace: Box::pin(tokio::time::sleep(REFUSED_GRACE)) }
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        loop {
            let read = match this.gate.next() {
                Err(error) => {
                    this.refused = Some(Refused::new(&error));
                    return Poll::Ready(Ok(()));
                }
                Ok(Next::End) => return Poll::Ready(Ok(())),
                Ok(Next::Received(count)) => {
                    let out = buffer.initialize_unfilled_to(count.min(buffer.remaining()));
                    this.gate.take(out);
                    let count = out.len();
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Next::Direct(max)) => {
                    this.note_body(this.gate.awaits_body());
                    let count = ready!(this.poll_direct(cx, buffer, max))?;
                    this.note_body(this.gate.awaits_body());
                    count
                }
                Ok(Next::More) => ready!(this.poll_receive(cx))?,
            };
            if read > 0 {
                this.activity.update(|phase| phase.note_read(Instant::now()));
            }
            if read == 0 || buffer.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
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
        ready!(self.poll_refuse(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
