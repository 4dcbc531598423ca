//! The socket as hyper sees it: notes every byte that moves, and lets only sound requests through.

use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::super::head::{Gate, Next, Refusal};
use super::clock::Activity;

/// How long what a client goes on sending after its last answer is thrown away: closing at once would
/// reset the connection, and the client might lose the answer that says why. As long as a client needs
/// that sends some tens of megabytes before it looks; who has to make room for others has less.
pub(super) const LINGER_TIME: Duration = Duration::from_secs(5);

/// How long a connection that owes nothing stays half open for what its client still sends: requests behind the
/// last one that is answered, before it hears so (RFC 9112, 9.6). Some round trips; a client that closes in its
/// turn ends it at once.
pub(super) const QUIET_TIME: Duration = Duration::from_secs(1);

/// How much is thrown away at once, in bytes: on the stack, so not more.
const SCRAP_BYTES: usize = 16 << 10;

/// The socket; notes every byte that moves, and lets only sound requests through.
pub(super) struct Watched {
    stream: TcpStream,
    activity: Arc<Activity>,
    gate: Gate,
    parting: Option<Parting>,
    /// Shut down, with nothing left to do.
    closed: bool,
}

/// What is left to do for a client whose connection ends.
#[derive(Default)]
struct Parting {
    /// The rest of its answer, if that is not hyper's to give.
    answer: Bytes,
    /// Begins once that is written.
    linger: Option<Linger>,
}

/// How long what a client still sends is taken.
struct Linger {
    /// At the latest.
    until: Instant,
    /// After the last byte.
    pause: Duration,
    timer: Pin<Box<Sleep>>,
}

impl Watched {
    pub(super) fn new(stream: TcpStream, activity: Arc<Activity>) -> Self {
        Self { stream, activity, gate: Gate::default(), parting: None, closed: false }
    }

    /// What came and is nobody's yet.
    pub(super) fn gate(&mut self) -> &mut Gate {
        &mut self.gate
    }

    /// Reads into the gate; 0 at the end. Cancel safe.
    pub(super) async fn receive(&mut self) -> io::Result<usize> {
        let read = std::future::poll_fn(|cx| self.poll_receive(cx)).await?;
        self.note_read();
        Ok(read)
    }

    /// Notes that the next request has begun, if it has. Empty lines alone start no clock, so that they cost a
    /// client no connection, and stop none, so that they do not keep one.
    fn note_read(&self) {
        if self.gate.has_begun() {
            self.activity.update(|phase| phase.note_read(Instant::now()));
        }
    }

    /// Refuses a request whose head has begun and does not come; whether there is one.
    pub(super) fn break_off(&mut self, why: &str) -> bool {
        let refusal = self.gate.break_off(why);
        self.parting = refusal.as_ref().map(Parting::refusal);
        refusal.is_some()
    }

    /// Notes what became of `offered` bytes: all that there are of the answer.
    fn note_written(&self, written: &Poll<io::Result<usize>>, offered: usize) {
        match *written {
            Poll::Ready(Ok(count @ 1..)) => {
                let all = count == offered;
                self.activity.update(|phase| phase.note_written(count, all, Instant::now()));
            }
            Poll::Pending => self.activity.update(|phase| phase.note_unread(Instant::now())),
            Poll::Ready(_) => {}
        }
    }

    fn note_body(&self) {
        let awaited = self.gate.awaits_body();
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
        // Safe to cancel: what was read is in the gate, or still in the socket.
        pin!(self.stream.read_buf(self.gate.inbox())).poll(cx)
    }

    /// Writes what a refused client is told, then takes what it still sends, for a while: in the middle of a
    /// request that may be much, and who was cut off is not done before; otherwise it is what crossed the last
    /// answer.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(answer) = self.parting.as_mut().map(|parting| &mut parting.answer)
            && answer.has_remaining()
        {
            let offered = answer.remaining();
            let written = Pin::new(&mut self.stream).poll_write(cx, answer);
            if let Poll::Ready(Ok(count)) = written {
                answer.advance(count);
            }
            self.note_written(&written, offered);
            if ready!(written)? == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        let Some(parting) = &mut self.parting else { return Poll::Ready(Ok(())) };
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        let pause = if self.gate.unfinished() { LINGER_TIME } else { QUIET_TIME };
        let linger = parting.linger.get_or_insert_with(|| Linger::begin(pause));
        let mut scrap = [0; SCRAP_BYTES];
        while linger.timer.as_mut().poll(cx).is_pending() {
            let mut scrap = ReadBuf::new(&mut scrap);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut scrap))?;
            if scrap.filled().is_empty() {
                break;
            }
            linger.extend();
        }
        Poll::Ready(Ok(()))
    }
}

impl Linger {
    fn begin(pause: Duration) -> Self {
        let until = Instant::now() + LINGER_TIME;
        Self { until, pause, timer: Box::pin(tokio::time::sleep(pause)) }
    }

    /// Something came.
    fn extend(&mut self) {
        let when = self.until.min(Instant::now() + self.pause);
        self.timer.as_mut().reset(when);
    }
}

impl Parting {
    fn refusal(refusal: &Refusal) -> Self {
        let Refusal { error, of_head } = refusal;
        let (status, _) = error.status_and_code();
        let body = serde_json::to_string(&error.body()).unwrap_or_default();
        let reason = status.canonical_reason().unwrap_or_default();
        let answer = format!(
            "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n{}",
            status.as_u16(),
            body.len(),
            if *of_head { "" } else { &body }
        );
        Self { answer: answer.into(), linger: None }
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
                Err(refusal) => {
                    this.parting = Some(Parting::refusal(&refusal));
                    return Poll::Ready(Ok(()));
                }
                Ok(Next::End) => return Poll::Ready(Ok(())),
                Ok(Next::Received(count)) => {
                    let out = buffer.initialize_unfilled_to(count.min(buffer.remaining()));
                    this.gate.take(out);
                    let count = out.len();
                    buffer.advance(count);
                    this.note_body();
                    return Poll::Ready(Ok(()));
                }
                Ok(Next::Direct(max)) => {
                    this.note_body();
                    let count = ready!(this.poll_direct(cx, buffer, max))?;
                    this.note_body();
                    count
                }
                Ok(Next::More) => {
                    this.note_body();
                    let count = ready!(this.poll_receive(cx))?;
                    if count == 0 {
                        this.break_off("the connection ended in the middle of a request's head");
                    }
                    count
                }
            };
            this.note_read();
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
        self.note_written(&written, bytes.len());
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.note_written(&written, slices.iter().map(|slice| slice.len()).sum());
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// May be called again when it is done.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.closed {
            return Poll::Ready(Ok(()));
        }
        self.parting.get_or_insert_default();
        let parted = ready!(self.poll_part(cx));
        self.closed = true;
        parted?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::super::clock::{Phase, Unread};
    use super::*;

    /// As soon as a client takes less than there is, its answer counts as unread, until all of it is taken.
    #[tokio::test]
    async fn an_answer_that_is_not_taken_is_noted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let activity = Arc::new(Activity::new());
        let mut watched = Watched::new(stream, activity.clone());
        let unread = || match *activity.phase() {
            Phase::Waiting { unread, .. } => unread.map(|Unread { taken, .. }| taken),
            Phase::Serving { .. } => None,
        };
        // More than both sockets hold, so that it is taken in parts.
        let answer = vec![0; 32 << 20];
        let read = tokio::spawn(async move {
            let mut bytes = vec![0; 32 << 20];
            client.read_exact(&mut bytes).await.unwrap();
            client
        });
        let (mut written, mut before) = (0, None);
        while written < answer.len() {
            let rest = &answer[written..];
            let count = watched.write(rest).await.unwrap();
            written += count;
            match unread() {
                Some(taken) => {
                    assert!(count < rest.len());
                    before = Some(before.map_or(count, |before| before + count));
                    assert_eq!(Some(taken), before);
                }
                None => assert!(written == answer.len() || before.is_none()),
            }
        }
        assert!(before.is_some(), "it was too much at some time");
        assert_eq!(unread(), None, "all of it was taken");
        read.await.unwrap();
    }

    /// Empty lines between two requests are neither the next one nor a sign of life, whoever reads them.
    #[tokio::test]
    async fn empty_lines_move_no_clock() {
        for by_hyper in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let activity = Arc::new(Activity::new());
            let times = || match *activity.phase() {
                Phase::Waiting { since, header_since, .. } => (since, header_since),
                Phase::Serving { .. } => panic!("nothing is served"),
            };
            let (since, _) = times();
            let mut watched = Watched::new(stream, activity.clone());
            let mut buffer = [0; 64];
            for (bytes, begun) in [("\r\n\n", false), ("\r\n", false), ("G", true)] {
                client.write_all(bytes.as_bytes()).await.unwrap();
                let mut received = 0;
                while received < bytes.len() {
                    let before = watched.gate.inbox().len();
                    if by_hyper {
                        let read = std::future::poll_fn(|cx| {
                            let polled = pin!(watched.read(&mut buffer)).poll(cx);
                            assert!(polled.is_pending(), "no head is complete");
                            let more = watched.gate.inbox().len() - before;
                            if more > 0 { Poll::Ready(more) } else { Poll::Pending }
                        });
                        received += read.await;
                    } else {
                        received += watched.receive().await.unwrap();
                    }
                }
                let (at, header_since) = times();
                assert_eq!((at > since, header_since.is_some()), (begun, begun), "{bytes:?}");
            }
        }
    }
}
