//! Writes that share an entry, encoded once.
//!
//! ```text
//! writes    = at_ms:u64, count:u32 x write
//! write     = kind:u8, once, condition, key, value       the value only of a put
//!   kind      1 put, 2 delete; plus 0x10 or 0x20 if it happens at most once
//! once      = nothing                                    neither
//!           | seq:u64                                    0x10: client and floor of the last write with one
//!           | client:(length:u8, bytes), floor:u64, seq:u64       0x20
//! condition = 0 | 1, revision:u64 | 2                    always, at this revision, absent
//! key, value = length:u32, bytes
//! ```
//! A client puts many writes into one request, and the proposer requests into one entry, so client and
//! floor are said once for a run of writes and not with each. 0x10 is used wherever it can be: there is
//! one encoding of a thing.
//!
//! The leader encodes the writes when it proposes them, and these bytes are what its log stores, what is sent
//! to every follower, what a follower's log stores, and what each of them applies from: [`Writes::iter`] reads
//! keys and values where they are. So a write costs no allocation of its own in an entry, on no node, and
//! a request's body need not stay in memory until its writes have left the log's tail.

use bytes::{BufMut, Bytes};

use crate::codec::{DecodeError, SliceReader, put_bytes, put_client_name, put_count};
use crate::once::{InvalidClientName, InvalidOnce, OnceRef};
use crate::types::{Action, Condition, Write};

const KIND_PUT: u8 = 0x01;
const KIND_DELETE: u8 = 0x02;
const KIND_BITS: u8 = 0x0f;
const ONCE_SAME: u8 = 0x10;
const ONCE_NAMED: u8 = 0x20;

const CONDITION_ALWAYS: u8 = 0;
const CONDITION_REVISION: u8 = 1;
const CONDITION_ABSENT: u8 = 2;

/// Time and count.
const HEAD_BYTES: usize = 8 + 4;

/// Changes of keys, in this order and each for itself, and when their entry was made. Cloning shares the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Writes {
    /// As the module draws them; valid, or there would be no `Writes`.
    encoded: Bytes,
    /// The bytes of their keys and values.
    bytes: usize,
}

/// A write as it stands in an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteRef<'a> {
    /// Any bytes, not empty.
    pub key: &'a [u8],
    /// What happens to it.
    pub action: ActionRef<'a>,
    /// Checked at apply, against the state that every replica agrees on.
    pub condition: Condition,
    /// `Some`: it happens at most once, however often the client asks for it.
    pub once: Option<OnceRef<'a>>,
}

/// What a write does to its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActionRef<'a> {
    /// Stores this value.
    Put(&'a [u8]),
    /// Removes the key.
    Delete,
}

impl Writes {
    /// Encodes an entry's writes. `at_ms` is when it was made, by its maker's clock: milliseconds since the
    /// Unix epoch. The only clock that applying sees.
    ///
    /// # Panics
    /// With keys or values over 4 GiB, or more than 2^32 writes: every limit lies far below.
    pub fn new(at_ms: u64, writes: &[Write]) -> Self {
        // Not a byte more: it stays in memory for as long as the entry is among the newest.
        let length = encoded_bytes(writes);
        let mut out = Vec::with_capacity(length);
        out.put_u64(at_ms);
        put_count(writes.len(), &mut out);
        let mut last = None;
        for write in writes.iter().map(WriteRef::from) {
            put_write(&write, last, &mut out);
            last = write.once.or(last);
        }
        debug_assert_eq!(out.len(), length);
        let bytes = writes.iter().map(Write::bytes).sum();
        Self { encoded: out.into(), bytes }
    }

    /// Takes what [`Self::encoded`] gave, and checks every byte of it.
    pub(crate) fn decode(encoded: Bytes) -> Result<Self, DecodeError> {
        let mut rest = Rest::of(&encoded)?;
        let mut bytes = 0;
        while let Some(write) = rest.next_write()? {
            bytes += write.bytes();
        }
        rest.reader.end()?;
        Ok(Self { encoded, bytes })
    }

    /// The bytes that the module draws.
    pub(crate) fn encoded(&self) -> &[u8] {
        &self.encoded
    }

    /// When the entry was made: milliseconds since the Unix epoch.
    pub fn at_ms(&self) -> u64 {
        self.rest().at_ms
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rest().left
    }

    /// Whether there is none: such an entry brings nothing but the time.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of their keys and values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The writes, in their order.
    pub fn iter(&self) -> impl Iterator<Item = WriteRef<'_>> {
        let mut rest = self.rest();
        std::iter::from_fn(move || rest.next_write().expect(VALID))
    }

    fn rest(&self) -> Rest<'_> {
        Rest::of(&self.encoded).expect(VALID)
    }
}

const VALID: &str = "whatever became `Writes` was encoded here, or checked";

impl std::fmt::Debug for Writes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} writes at {} ms: ", self.len(), self.at_ms())?;
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<'a> From<&'a Write> for WriteRef<'a> {
    fn from(write: &'a Write) -> Self {
        let Write { key, action, condition, once } = write;
        let action = match action {
            Action::Put(value) => ActionRef::Put(value),
            Action::Delete => ActionRef::Delete,
        };
        Self { key, action, condition: *condition, once: once.as_ref().map(OnceRef::from) }
    }
}

impl WriteRef<'_> {
    fn bytes(&self) -> usize {
        match self.action {
            ActionRef::Put(value) => self.key.len() + value.len(),
            ActionRef::Delete => self.key.len(),
        }
    }
}

/// What is left to read of some writes.
struct Rest<'a> {
    at_ms: u64,
    /// How many writes.
    left: usize,
    reader: SliceReader<'a>,
    /// The last write's client and floor, of those that have one.
    last: Option<OnceRef<'a>>,
}

impl<'a> Rest<'a> {
    fn of(encoded: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = SliceReader::new(encoded);
        let at_ms = reader.u64()?;
        let left = reader.u32()? as usize;
        Ok(Self { at_ms, left, reader, last: None })
    }

    fn next_write(&mut self) -> Result<Option<WriteRef<'a>>, DecodeError> {
        let Some(left) = self.left.checked_sub(1) else { return Ok(None) };
        let found = self.reader.u8()?;
        let once = match found & !KIND_BITS {
            0 => None,
            ONCE_SAME => Some(self.once_of_same()?),
            ONCE_NAMED => Some(self.once_named()?),
            _ => return Err(DecodeError::Tag { what: "write", found }),
        };
        let condition = self.condition()?;
        let key = self.reader.bytes()?;
        let action = match found & KIND_BITS {
            KIND_PUT => ActionRef::Put(self.reader.bytes()?),
            KIND_DELETE => ActionRef::Delete,
            _ => return Err(DecodeError::Tag { what: "write", found }),
        };
        self.left = left;
        self.last = once.or(self.last);
        Ok(Some(WriteRef { key, action, condition, once }))
    }

    fn once_of_same(&mut self) -> Result<OnceRef<'a>, DecodeError> {
        let last =
            self.last.ok_or(DecodeError::Invalid { what: "write: no client before this one" })?;
        last.with_seq(self.reader.u64()?).map_err(|error| invalid(error.into()))
    }

    fn once_named(&mut self) -> Result<OnceRef<'a>, DecodeError> {
        let client = std::str::from_utf8(self.reader.short_bytes()?);
        let client = client.map_err(|_| invalid(InvalidClientName.into()))?;
        let (floor, seq) = (self.reader.u64()?, self.reader.u64()?);
        let once = OnceRef::new(client, floor, seq).map_err(invalid)?;
        if self.last.is_some_and(|last| last.same_client_floor(&once)) {
            return Err(DecodeError::Invalid { what: "write: names the client before it again" });
        }
        Ok(once)
    }

    fn condition(&mut self) -> Result<Condition, DecodeError> {
        match self.reader.u8()? {
            CONDITION_ALWAYS => Ok(Condition::Always),
            CONDITION_REVISION => Ok(Condition::Revision(self.reader.u64()?)),
            CONDITION_ABSENT => Ok(Condition::Absent),
            found => Err(DecodeError::Tag { what: "condition", found }),
        }
    }
}

fn invalid(error: InvalidOnce) -> DecodeError {
    DecodeError::Invalid {
        what: match error {
            InvalidOnce::Client(_) => "name of a client",
            InvalidOnce::Seq(_) => "write: sequence and floor",
        },
    }
}

/// How long [`Writes::new`] makes them.
pub(crate) fn encoded_bytes(writes: &[Write]) -> usize {
    let mut last: Option<OnceRef<'_>> = None;
    let mut total = HEAD_BYTES;
    for write in writes.iter().map(WriteRef::from) {
        let once = match write.once {
            None => 0,
            Some(once) if last.is_some_and(|last| last.same_client_floor(&once)) => 8,
            Some(once) => 1 + once.client().len() + 8 + 8,
        };
        let condition = match write.condition {
            Condition::Always | Condition::Absent => 1,
            Condition::Revision(_) => 1 + 8,
        };
        let lengths = match write.action {
            ActionRef::Put(_) => 4 + 4,
            ActionRef::Delete => 4,
        };
        total += 1 + once + condition + lengths + write.bytes();
        last = write.once.or(last);
    }
    total
}

fn put_write(write: &WriteRef<'_>, last: Option<OnceRef<'_>>, out: &mut Vec<u8>) {
    let kind = match write.action {
        ActionRef::Put(_) => KIND_PUT,
        ActionRef::Delete => KIND_DELETE,
    };
    match write.once {
        None => out.put_u8(kind),
        Some(once) if last.is_some_and(|last| last.same_client_floor(&once)) => {
            out.put_u8(kind | ONCE_SAME);
            out.put_u64(once.seq());
        }
        Some(once) => {
            out.put_u8(kind | ONCE_NAMED);
            put_client_name(once.client(), out);
            out.put_u64(once.floor());
            out.put_u64(once.seq());
        }
    }
    put_condition(write.condition, out);
    put_bytes(write.key, out);
    if let ActionRef::Put(value) = write.action {
        put_bytes(value, out);
    }
}

fn put_condition(condition: Condition, out: &mut Vec<u8>) {
    match condition {
        Condition::Always => out.put_u8(CONDITION_ALWAYS),
        Condition::Revision(revision) => {
            out.put_u8(CONDITION_REVISION);
            out.put_u64(revision);
        }
        Condition::Absent => out.put_u8(CONDITION_ABSENT),
    }
}
