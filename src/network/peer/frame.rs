//! One Toy-RPC message on the wire, header and body together.
//!
//! ```text
//! frame = magic:u8 (0xd5), kind:u8 (0 request | 1 reply), method:u8, id:u16, length:u32,
//!         crc32:u32 (of all before it and of the body), body
//! ```
//! Integers are big-endian. `length` is that of the body and is compared with the limit before
//! anything is allocated; a buffer then grows only as bytes arrive, so declaring much costs nothing.
//! A frame that has begun must end in time, and the large ones that are being read share a budget
//! ([`FrameBudget`]): half frames hold neither memory without bound nor any for ever.
//! The checksum is there because TCP's has 16 bits and what arrives here goes into a log.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// The first byte of every frame.
const MAGIC: u8 = 0xd5;

/// The bytes before the body.
pub(in crate::network) const FRAME_HEADER_BYTES: usize = 13;

/// The first piece of a body's buffer; it grows with what arrives.
const BODY_BUFFER_BYTES: usize = 16 << 10;

/// The unit in which a budget counts: a semaphore counts to 2^29 at least.
const BUDGET_UNIT_BYTES: usize = 1 << 10;

/// What a reader of frames keeps to.
pub(in crate::network) struct FrameLimits {
    /// The longest body.
    pub(in crate::network) bytes_max: usize,
    /// How long a frame may take from its first byte to its last, the wait for its budget included.
    pub(in crate::network) timeout: Duration,
    /// What connections share; `None` where the other end was chosen by this node.
    pub(in crate::network) budget: Option<FrameBudget>,
}

/// The bytes of frames that are being read, over many connections together. Cheap to clone.
///
/// Only bodies above their first buffer count: heartbeats and votes never wait for a large frame, and
/// the number of connections bounds what they take. A body claims all that it declares before it is
/// read, so that no two can hold half each and wait for the other.
#[derive(Clone)]
pub(in crate::network) struct FrameBudget {
    units: Arc<Semaphore>,
}

impl FrameBudget {
    /// `bytes_max` must be at least the largest frame, or that frame would never be read.
    pub(in crate::network) fn new(bytes_max: usize) -> Self {
        Self { units: Arc::new(Semaphore::new(bytes_max.div_ceil(BUDGET_UNIT_BYTES))) }
    }

    async fn claim(&self, bytes: usize) -> Option<SemaphorePermit<'_>> {
        if bytes <= BODY_BUFFER_BYTES {
            return None;
        }
        // Bounded by the limit of a frame, which was compared before.
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT_BYTES)).unwrap_or(u32::MAX);
        Some(self.units.acquire_many(units).await.expect("the semaphore is never closed"))
    }
}

/// Whether a frame asks or answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) enum FrameKind {
    /// From the connector to the acceptor.
    Request,
    /// From the acceptor to the connector.
    Reply,
}

/// What precedes a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) struct FrameHeader {
    pub(in crate::network) kind: FrameKind,
    /// Which procedure; 0 in a reply.
    pub(in crate::network) method: u8,
    /// Toy-RPC's message id.
    pub(in crate::network) id: u16,
}

/// What is wrong with a frame. Nothing after it can be trusted.
#[derive(Debug, thiserror::Error)]
pub(in crate::network) enum FrameError {
    /// The connection ended before or inside a frame.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The bytes are no frame.
    #[error("bytes that are no frame")]
    Malformed,
    /// The declared length is over the limit.
    #[error("a frame of {declared} bytes, where {allowed} are allowed")]
    TooLarge {
        /// What the frame says.
        declared: usize,
        /// The limit.
        allowed: usize,
    },
    /// It began and did not end.
    #[error("a frame that took longer than {0:?}")]
    Slow(Duration),
    /// The body is not what was sent.
    #[error("a frame with a wrong checksum")]
    Checksum,
}

/// Builds the bytes before `body`.
pub(in crate::network) fn encode_header(
    header: FrameHeader,
    body: &[u8],
) -> [u8; FRAME_HEADER_BYTES] {
    let mut out = [0; FRAME_HEADER_BYTES];
    out[0] = MAGIC;
    out[1] = match header.kind {
        FrameKind::Request => 0,
        FrameKind::Reply => 1,
    };
    out[2] = header.method;
    out[3..5].copy_from_slice(&header.id.to_be_bytes());
    let length = u32::try_from(body.len()).expect("messages are bounded far below 4 GiB");
    out[5..9].copy_from_slice(&length.to_be_bytes());
    let checksum = checksum(&out, body);
    out[9..].copy_from_slice(&checksum.to_be_bytes());
    out
}

/// Reads one frame. `None` when the stream ends cleanly, between two frames. Not cancel safe.
pub(in crate::network) async fn read_frame<R: AsyncRead + Unpin>(
    reader: &mut R,
    limits: &FrameLimits,
) -> Result<Option<(FrameHeader, Vec<u8>)>, FrameError> {
    let mut start = [0; FRAME_HEADER_BYTES];
    if reader.read(&mut start[..1]).await? == 0 {
        return Ok(None);
    }
    let rest = timeout(limits.timeout, read_rest(reader, start, limits));
    rest.await.unwrap_or(Err(FrameError::Slow(limits.timeout))).map(Some)
}

/// Reads what follows the first byte.
async fn read_rest<R: AsyncRead + Unpin>(
    reader: &mut R,
    mut start: [u8; FRAME_HEADER_BYTES],
    limits: &FrameLimits,
) -> Result<(FrameHeader, Vec<u8>), FrameError> {
    // Checked at once: garbage shorter than a header is not waited for.
    if start[0] != MAGIC {
        return Err(FrameError::Malformed);
    }
    reader.read_exact(&mut start[1..]).await?;
    let header = decode_header(&start)?;
    let declared = u32::from_be_bytes([start[5], start[6], start[7], start[8]]) as usize;
    if declared > limits.bytes_max {
        return Err(FrameError::TooLarge { declared, allowed: limits.bytes_max });
    }
    let _claim = match &limits.budget {
        Some(budget) => budget.claim(declared).await,
        None => None,
    };
    let body = read_body(reader, declared).await?;
    let expected = u32::from_be_bytes([start[9], start[10], start[11], start[12]]);
    if checksum(&start, &body) != expected {
        return Err(FrameError::Checksum);
    }
    Ok((header, body))
}

async fn read_body<R: AsyncRead + Unpin>(reader: &mut R, length: usize) -> io::Result<Vec<u8>> {
    let mut body = Vec::with_capacity(length.min(BODY_BUFFER_BYTES));
    while body.len() < length {
        // Doubling up to exactly the length: as much again as has arrived, and no spare at the end.
        if body.len() == body.capacity() {
            body.reserve_exact(body.len().min(length - body.len()));
        }
        let room = (body.capacity() - body.len()).min(length - body.len());
        if (&mut *reader).take(room as u64).read_buf(&mut body).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(body)
}

fn decode_header(start: &[u8; FRAME_HEADER_BYTES]) -> Result<FrameHeader, FrameError> {
    let kind = match start[1] {
        0 => FrameKind::Request,
        1 => FrameKind::Reply,
        _ => return Err(FrameError::Malformed),
    };
    Ok(FrameHeader { kind, method: start[2], id: u16::from_be_bytes([start[3], start[4]]) })
}

fn checksum(start: &[u8; FRAME_HEADER_BYTES], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&start[..9]);
    hasher.update(body);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::*;

    const HEADER: FrameHeader = FrameHeader { kind: FrameKind::Request, method: 3, id: 0x1234 };

    fn framed(body: &[u8]) -> Vec<u8> {
        let mut bytes = encode_header(HEADER, body).to_vec();
        bytes.extend(body);
        bytes
    }

    fn read(mut bytes: &[u8], max: usize) -> Result<Option<(FrameHeader, Vec<u8>)>, FrameError> {
        let limits = limits(max, None);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(read_frame(&mut bytes, &limits))
    }

    fn limits(bytes_max: usize, budget: Option<FrameBudget>) -> FrameLimits {
        FrameLimits { bytes_max, timeout: Duration::from_millis(100), budget }
    }

    /// Idle between two frames a connection may be as long as it likes, inside one it may not.
    #[tokio::test]
    async fn a_frame_that_began_must_end_in_time() {
        let (mut near, mut far) = tokio::io::duplex(1 << 20);
        let limits = limits(1 << 20, None);
        let idle = timeout(3 * limits.timeout, read_frame(&mut far, &limits)).await;
        assert!(idle.is_err(), "{idle:?}");
        let frame = framed(&[7; 100]);
        near.write_all(&frame).await.unwrap();
        assert!(read_frame(&mut far, &limits).await.unwrap().is_some());
        near.write_all(&frame[..frame.len() - 1]).await.unwrap();
        let slow = read_frame(&mut far, &limits).await;
        assert!(matches!(slow, Err(FrameError::Slow(_))), "{slow:?}");
    }

    /// A large frame waits until others are read or given up, a small one does not.
    #[tokio::test]
    async fn large_frames_share_a_budget_and_small_ones_pass() {
        let budget = FrameBudget::new(100 << 10);
        let limits = limits(100 << 10, Some(budget.clone()));
        let (large, small) = (framed(&vec![7; 90 << 10]), framed(&[7; 100]));
        let held = budget.claim(20 << 10).await;
        let waited = read_frame(&mut &large[..], &limits).await;
        assert!(matches!(waited, Err(FrameError::Slow(_))), "{waited:?}");
        assert!(read_frame(&mut &small[..], &limits).await.unwrap().is_some());
        drop(held);
        for _ in 0..3 {
            assert!(read_frame(&mut &large[..], &limits).await.unwrap().is_some());
        }
    }

    #[test]
    fn frames_come_back_whatever_their_length() {
        for length in
            [0, 1, BODY_BUFFER_BYTES - 1, BODY_BUFFER_BYTES + 1, 5 * BODY_BUFFER_BYTES + 3]
        {
            let body = vec![7; length];
            assert_eq!(read(&framed(&body), length).unwrap(), Some((HEADER, body)));
        }
        assert_eq!(read(&[], 10).unwrap(), None);
    }

    #[test]
    fn a_declared_length_over_the_limit_is_refused_before_its_body() {
        let mut bytes = framed(b"");
        bytes[5..9].fill(0xff);
        let error = read(&bytes, 1 << 24).unwrap_err();
        assert!(matches!(error, FrameError::TooLarge { declared: 0xffff_ffff, .. }), "{error}");
    }

    proptest! {
        #[test]
        fn a_cut_or_flipped_frame_is_an_error(
            body in proptest::collection::vec(any::<u8>(), 0..64), at in any::<usize>(), flip in 1u8..,
        ) {
            let bytes = framed(&body);
            for end in 1..bytes.len() {
                prop_assert!(read(&bytes[..end], 64).is_err(), "cut at {}", end);
            }
            let mut flipped = bytes.clone();
            let at = at % bytes.len();
            flipped[at] ^= flip;
            prop_assert!(read(&flipped, 64).is_err(), "flipped at {}", at);
        }
    }
}
