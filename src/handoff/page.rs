//! Pages: the pieces in which what moves travels from a source to a destination.
//!
//! A destination asks a replica of the source for the page at its cursor, and stages what it gets with
//! an [`Import`], an entry of its own log. Neither side holds more than a page of it in memory, but for
//! the answers that are staged: these are bounded ([`crate::store`], `dedupe`).
//!
//! ```text
//! cursor  = 1, after:bytes | 2, after:bytes | 3, position:u64
//! request = epoch:u64, from:text, to:text, attempt:u64, cursor, bytes_max:u32
//! page    = to:cursor, end:u64, count:u32 x record, count:u32 x answer
//! record  = key:bytes, 0 | 1, stored record:bytes       0: the key has none
//! answer  = place:bytes, 0 | 1, stored answer:bytes
//! import  = epoch:u64, from:text, to:text, attempt:u64, from:cursor, page
//! clean   = epoch:u64, from:text, to:text, count:u32 x key:bytes
//! bytes, text = length:u32, bytes
//! ```
//! Integers are big-endian. The same on the wire and in the log.

use bytes::{BufMut, Bytes};

use crate::codec::{DecodeError, Reader, put_bytes, put_count};
use crate::config::KEY_BYTES_MAX;
use crate::types::ClusterId;

use super::{Attempt, Cursor, Handoff, Position};

const CURSOR_RECORDS: u8 = 1;
const CURSOR_ANSWERS: u8 = 2;
const CURSOR_CHANGES: u8 = 3;

/// A destination asks for what follows its cursor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// Which handoff.
    pub handoff: Handoff,
    /// The attempt that is open at the destination.
    pub attempt: Attempt,
    /// Where it is.
    pub cursor: Cursor,
    /// About how many bytes of records and answers it wants; it gets one at least.
    pub bytes_max: u32,
}

/// What follows a cursor, as one replica of the source had it at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The cursor after it.
    pub to: Cursor,
    /// Where the source's change log ended then.
    pub end: Position,
    /// Records of moving keys as the source stores them; `None` for a key that has none.
    pub records: Vec<(Bytes, Option<Bytes>)>,
    /// Answers to operations on moving keys, by their place; `None` for one that is forgotten.
    pub answers: Vec<(Bytes, Option<Bytes>)>,
}

/// A destination stages a page: an entry of its log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// Which handoff.
    pub handoff: Handoff,
    /// The attempt that is open.
    pub attempt: Attempt,
    /// Where the page begins: it is staged only if the destination is there.
    pub from: Cursor,
    /// The page.
    pub page: Page,
}

/// Rows that have become useless are deleted: moved ones at a source, those of dead attempts at a
/// destination. An entry of the log. Rows that are in use are left alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clean {
    /// Which handoff.
    pub handoff: Handoff,
    /// Their keys.
    pub keys: Vec<Bytes>,
}

impl Page {
    /// The bytes of its records and answers.
    pub fn bytes(&self) -> usize {
        let size = |(key, value): &(Bytes, Option<Bytes>)| {
            key.len() + value.as_ref().map_or(0, Bytes::len)
        };
        self.records.iter().chain(&self.answers).map(size).sum()
    }

    /// Whether each of its records has a key that a write can have. A record with another one could be read
    /// by nobody, and a follower that is sent the whole state refuses an empty one.
    pub fn has_sound_keys(&self) -> bool {
        self.records.iter().all(|(key, _)| (1..=KEY_BYTES_MAX).contains(&key.len()))
    }

    /// Appends the page.
    pub fn encode(&self, out: &mut impl BufMut) {
        put_cursor(&self.to, out);
        out.put_u64(self.end);
        for rows in [&self.records, &self.answers] {
            put_count(rows.len(), out);
            for (key, value) in rows {
                put_bytes(key, out);
                out.put_u8(u8::from(value.is_some()));
                if let Some(value) = value {
                    put_bytes(value, out);
                }
            }
        }
    }

    /// Takes a page off the front.
    ///
    /// # Errors
    /// It is none. Allocates no more than a small multiple of what is there.
    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let (to, end) = (get_cursor(reader)?, reader.u64()?);
        let (records, answers) = (get_rows(reader)?, get_rows(reader)?);
        Ok(Self { to, end, records, answers })
    }
}

fn get_rows(reader: &mut Reader) -> Result<Vec<(Bytes, Option<Bytes>)>, DecodeError> {
    // The count is not trusted with an allocation: each round consumes input.
    let mut rows = Vec::new();
    for _ in 0..reader.u32()? {
        let key = reader.bytes()?;
        let value = if reader.flag()? { Some(reader.bytes()?) } else { None };
        rows.push((key, value));
    }
    Ok(rows)
}

impl PageRequest {
    /// Appends the request.
    pub fn encode(&self, out: &mut impl BufMut) {
        put_handoff(&self.handoff, out);
        out.put_u64(self.attempt);
        put_cursor(&self.cursor, out);
        out.put_u32(self.bytes_max);
    }

    /// Takes a request off the front.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self {
            handoff: get_handoff(reader)?,
            attempt: reader.u64()?,
            cursor: get_cursor(reader)?,
            bytes_max: reader.u32()?,
        })
    }
}

impl Import {
    /// Appends the entry's body.
    pub fn encode(&self, out: &mut impl BufMut) {
        put_handoff(&self.handoff, out);
        out.put_u64(self.attempt);
        put_cursor(&self.from, out);
        self.page.encode(out);
    }

    /// Takes the body of an entry off the front.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self {
            handoff: get_handoff(reader)?,
            attempt: reader.u64()?,
            from: get_cursor(reader)?,
            page: Page::decode(reader)?,
        })
    }
}

impl Clean {
    /// Appends the entry's body.
    pub fn encode(&self, out: &mut impl BufMut) {
        put_handoff(&self.handoff, out);
        put_count(self.keys.len(), out);
        for key in &self.keys {
            put_bytes(key, out);
        }
    }

    /// Takes the body of an entry off the front.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        let handoff = get_handoff(reader)?;
        let mut keys = Vec::new();
        for _ in 0..reader.u32()? {
            keys.push(reader.bytes()?);
        }
        Ok(Self { handoff, keys })
    }
}

fn put_handoff(handoff: &Handoff, out: &mut impl BufMut) {
    out.put_u64(handoff.epoch);
    put_bytes(handoff.from.as_str().as_bytes(), out);
    put_bytes(handoff.to.as_str().as_bytes(), out);
}

fn get_handoff(reader: &mut Reader) -> Result<Handoff, DecodeError> {
    let epoch = reader.u64()?;
    let mut cluster = || -> Result<ClusterId, DecodeError> {
        reader.text()?.parse().map_err(|_| DecodeError::Invalid { what: "cluster id" })
    };
    Ok(Handoff { epoch, from: cluster()?, to: cluster()? })
}

fn put_cursor(cursor: &Cursor, out: &mut impl BufMut) {
    match cursor {
        Cursor::Records { after } => {
            out.put_u8(CURSOR_RECORDS);
            put_bytes(after, out);
        }
        Cursor::Answers { after } => {
            out.put_u8(CURSOR_ANSWERS);
            put_bytes(after, out);
        }
        Cursor::Changes { position } => {
            out.put_u8(CURSOR_CHANGES);
            out.put_u64(*position);
        }
    }
}

fn get_cursor(reader: &mut Reader) -> Result<Cursor, DecodeError> {
    match reader.u8()? {
        CURSOR_RECORDS => Ok(Cursor::Records { after: reader.bytes()? }),
        CURSOR_ANSWERS => Ok(Cursor::Answers { after: reader.bytes()? }),
        CURSOR_CHANGES => Ok(Cursor::Changes { position: reader.u64()? }),
        found => Err(DecodeError::Tag { what: "cursor", found }),
    }
}
