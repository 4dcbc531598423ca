//! One Toy-RPC message on the wire, header and body together.
//!
//! ```text
//! frame = magic:u8 (0xd5), kind:u8 (0 request | 1 reply), method:u8, id:u16, length:u32,
//!         crc32:u32 (of all before it and of the body), body
//! ```
//! Integers are big-endian. `length` is that of the body and is compared with the limit before
//! anything is allocated; a buffer then grows only as bytes arrive, so declaring much costs nothing.
//! The checksum is there because TCP's has 16 bits and what arrives here goes into a log.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// The first byte of every frame.
const MAGIC: u8 = 0xd5;

/// The bytes before the body.
pub(in crate::network) const FRAME_HEADER_BYTES: usize = 13;

/// The first piece of a body's buffer; it grows with what arrives.
const BODY_BUFFER_BYTES: usize = 16 << 10;

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
    bytes_max: usize,
) -> Result<Option<(FrameHeader, Vec<u8>)>, FrameError> {
    let mut start = [0; FRAME_HEADER_BYTES];
    if reader.read(&mut start[..1]).await? == 0 {
        return Ok(None);
    }
    // Checked at once: garbage shorter than a header is not waited for.
    if start[0] != MAGIC {
        return Err(FrameError::Malformed);
    }
    reader.read_exact(&mut start[1..]).await?;
    let header = decode_header(&start)?;
    let declared = u32::from_be_bytes([start[5], start[6], start[7], start[8]]) as usize;
    if declared > bytes_max {
        return Err(FrameError::TooLarge { declared, allowed: bytes_max });
    }
    let body = read_body(reader, declared).await?;
    let expected = u32::from_be_bytes([start[9], start[10], start[11], start[12]]);
    if checksum(&start, &body) != expected {
        return Err(FrameError::Checksum);
    }
    Ok(Some((header, body)))
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

    use super::*;

    const HEADER: FrameHeader = FrameHeader { kind: FrameKind::Request, method: 3, id: 0x1234 };

    fn framed(body: &[u8]) -> Vec<u8> {
        let mut bytes = encode_header(HEADER, body).to_vec();
        bytes.extend(body);
        bytes
    }

    fn read(mut bytes: &[u8], max: usize) -> Result<Option<(FrameHeader, Vec<u8>)>, FrameError> {
        futures_util::FutureExt::now_or_never(read_frame(&mut bytes, max)).unwrap()
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
