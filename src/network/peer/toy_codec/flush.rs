//! Writes a connection's messages: all that wait, then one flush.

use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::mpsc;

use crate::network::peer::closer::{CloseReason, Closer};
use crate::network::peer::frame::{FRAME_HEADER_BYTES, FrameHeader, encode_header};

/// Small messages are gathered up to this many bytes before a write; larger ones go directly.
const WRITE_BUFFER_BYTES: usize = 64 << 10;

/// How long one message may take to leave. A peer that takes nothing for so long has hung or is
/// hostile, and its buffers are wanted back. The largest frame needs 1 MiB/s to pass.
const WRITE_STALL_TIMEOUT: Duration = Duration::from_secs(20);

/// One message ready to be written.
pub(super) struct Outbound {
    header: [u8; FRAME_HEADER_BYTES],
    body: Vec<u8>,
}

impl Outbound {
    pub(super) fn new(header: FrameHeader, body: Vec<u8>) -> Self {
        Self { header: encode_header(header, &body), body }
    }
}

/// Writes messages until the connection is closed; closes it when that fails.
pub(super) async fn run<W>(write: W, mut waiting: mpsc::Receiver<Outbound>, closer: Closer)
where
    W: AsyncWrite + Send + Unpin,
{
    let mut out = BufWriter::with_capacity(WRITE_BUFFER_BYTES, write);
    let reason = tokio::select! {
        biased;
        () = closer.closed() => CloseReason::Local,
        reason = write_all(&mut out, &mut waiting) => reason,
    };
    closer.close(reason);
    // The other end finds out by itself if this does not reach it.
    let _ = tokio::time::timeout(Duration::from_millis(100), out.get_mut().shutdown()).await;
}

async fn write_all<W>(out: &mut BufWriter<W>, waiting: &mut mpsc::Receiver<Outbound>) -> CloseReason
where
    W: AsyncWrite + Send + Unpin,
{
    while let Some(message) = waiting.recv().await {
        let mut next = Some(message);
        while let Some(message) = next {
            match tokio::time::timeout(WRITE_STALL_TIMEOUT, write_one(out, &message)).await {
                Ok(Ok(())) => next = waiting.try_recv().ok(),
                Ok(Err(error)) => return CloseReason::Io(error.to_string()),
                Err(_) => return CloseReason::Stalled,
            }
        }
        match tokio::time::timeout(WRITE_STALL_TIMEOUT, out.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return CloseReason::Io(error.to_string()),
            Err(_) => return CloseReason::Stalled,
        }
    }
    CloseReason::Local
}

async fn write_one<W>(out: &mut BufWriter<W>, message: &Outbound) -> std::io::Result<()>
where
    W: AsyncWrite + Send + Unpin,
{
    out.write_all(&message.header).await?;
    out.write_all(&message.body).await
}
