//! As much of protobuf as etcd's three requests take: fields with a number, in bytes.
//!
//! A message is a row of fields. Each begins with a varint of `number << 3 | wire type`, and then:
//!
//! ```text
//! wire type 0   a varint: seven bits a byte, the lowest first, the top bit set on all but the last
//! wire type 1   8 bytes
//! wire type 2   a varint length and that many bytes: bytes, text or a message
//! wire type 5   4 bytes
//! ```
//!
//! Fields that nobody asks for are skipped, and absent ones are zero or empty.

use bytes::{BufMut, Bytes, BytesMut};

/// A 64-bit varint has at most this many bytes.
const VARINT_BYTES_MAX: u32 = 10;

/// A message that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the message is garbled")]
pub struct Garbled;

/// A message that is being written.
#[derive(Debug, Default)]
pub struct Writer(BytesMut);

impl Writer {
    /// An empty message with room for this many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self(BytesMut::with_capacity(bytes))
    }

    /// Adds a field of bytes.
    #[must_use]
    pub fn bytes(mut self, number: u32, bytes: &[u8]) -> Self {
        self.varint(u64::from(number << 3 | 2));
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds a field that is true; one that is false is not written.
    #[must_use]
    pub fn flag(mut self, number: u32, value: bool) -> Self {
        if value {
            self.varint(u64::from(number << 3));
            self.0.put_u8(1);
        }
        self
    }

    /// The message.
    pub fn finish(self) -> Bytes {
        self.0.freeze()
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.put_u8(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.put_u8(value as u8);
    }
}

/// A field of a message that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field<'a> {
    /// A number.
    Number(u64),
    /// Bytes, text or a message.
    Bytes(&'a [u8]),
    /// 4 or 8 bytes, which nothing here uses.
    Fixed,
}

/// The last field with this number, as protobuf has it; nothing when there is none.
pub fn field(message: &[u8], number: u32) -> Result<Option<Field<'_>>, Garbled> {
    let (mut rest, mut found) = (message, None);
    while !rest.is_empty() {
        let (at, value) = next(&mut rest)?;
        if at == u64::from(number) {
            found = Some(value);
        }
    }
    Ok(found)
}

/// The number in that field, or 0.
pub fn number(message: &[u8], at: u32) -> Result<u64, Garbled> {
    match field(message, at)? {
        None => Ok(0),
        Some(Field::Number(number)) => Ok(number),
        Some(_) => Err(Garbled),
    }
}

/// The bytes in that field, or nothing.
pub fn bytes(message: &[u8], at: u32) -> Result<Option<&[u8]>, Garbled> {
    match field(message, at)? {
        None => Ok(None),
        Some(Field::Bytes(bytes)) => Ok(Some(bytes)),
        Some(_) => Err(Garbled),
    }
}

fn next<'a>(rest: &mut &'a [u8]) -> Result<(u64, Field<'a>), Garbled> {
    let tag = varint(rest)?;
    let field = match tag & 7 {
        0 => Field::Number(varint(rest)?),
        1 => take(rest, 8).map(|_| Field::Fixed)?,
        2 => {
            let length = varint(rest)?;
            Field::Bytes(take(rest, usize::try_from(length).map_err(|_| Garbled)?)?)
        }
        5 => take(rest, 4).map(|_| Field::Fixed)?,
        _ => return Err(Garbled),
    };
    Ok((tag >> 3, field))
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8], Garbled> {
    let (taken, left) = rest.split_at_checked(length).ok_or(Garbled)?;
    *rest = left;
    Ok(taken)
}

fn varint(rest: &mut &[u8]) -> Result<u64, Garbled> {
    let mut value = 0;
    for place in 0..VARINT_BYTES_MAX {
        let byte = take(rest, 1)?[0];
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(Garbled)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written is read again, whatever its size.
    #[test]
    fn fields_come_back() {
        for size in [0, 1, 127, 128, 300, 70_000] {
            let long = vec![7; size];
            let message = Writer::with_capacity(9).bytes(1, &long).flag(7, true).finish();
            assert_eq!(bytes(&message, 1), Ok(Some(long.as_slice())));
            assert_eq!((number(&message, 7), number(&message, 8)), (Ok(1), Ok(0)));
            assert_eq!(bytes(&message, 2), Ok(None));
        }
        assert!(Writer::default().flag(7, false).finish().is_empty());
    }

    /// Known bytes: the example of protobuf's own documentation, 150 in field 1.
    #[test]
    fn numbers_are_varints() {
        assert_eq!(number(&[0x08, 0x96, 0x01], 1), Ok(150));
        let largest = [&[0x08][..], &[0xff; 9], &[0x01]].concat();
        assert_eq!(number(&largest, 1), Ok(u64::MAX));
    }

    /// Fields of every wire type are skipped on the way to another.
    #[test]
    fn other_fields_are_skipped() {
        let message =
            [&[0x09][..], &[1; 8], &[0x15], &[2; 4], &[0x1a, 2, 3, 4], &[0x20, 5], &[0x28, 6]];
        assert_eq!(number(&message.concat(), 5), Ok(6));
    }

    /// No bytes make it panic or believe in a field that is cut off.
    #[test]
    fn garbled_messages_are_errors() {
        for garbled in [&[0x08][..], &[0x0a, 5, 1], &[0x09, 1], &[0x0b], &[0xff; 11]] {
            assert_eq!(field(garbled, 1), Err(Garbled), "{garbled:?}");
        }
        assert_eq!(number(&[0x0a, 0], 1), Err(Garbled));
        assert_eq!(bytes(&[0x08, 0], 1), Err(Garbled));
    }
}
