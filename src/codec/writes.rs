//! Writes inside an entry.
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

use bytes::BufMut;

use super::reader::Reader;
use super::{DecodeError, put_bytes, put_count};
use crate::once::{ClientFloor, ClientName, Once};
use crate::types::{Action, Command, Condition, Write};

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
/// Kind, condition with its revision, two lengths.
const WRITE_BYTES: usize = 1 + 9 + 8;
const SEQ_BYTES: usize = 8;
/// A name's length, and a floor.
const CLIENT_BYTES: usize = 1 + 8;

pub(super) fn put_writes(at_ms: u64, writes: &[Write], out: &mut impl BufMut) {
    out.put_u64(at_ms);
    put_count(writes.len(), out);
    let mut last = None;
    for write in writes {
        put_write(write, last, out);
        last = write.once.as_ref().or(last);
    }
}

pub(super) fn get_writes(reader: &mut Reader) -> Result<Command, DecodeError> {
    let at_ms = reader.u64()?;
    let count = reader.u32()? as usize;
    // The count is not trusted with an allocation that is larger than the input: each round consumes some.
    let mut writes: Vec<Write> = Vec::with_capacity(count.min(reader.left() / size_of::<Write>()));
    let mut last = None;
    for index in 0..count {
        let before = last.and_then(|last: usize| writes[last].once.as_ref());
        let write = get_write(before, reader)?;
        if write.once.is_some() {
            last = Some(index);
        }
        writes.push(write);
    }
    Ok(Command::Write { at_ms, writes: writes.into() })
}

/// A bound from above on what [`put_writes`] makes of them.
pub(super) fn writes_len(writes: &[Write]) -> usize {
    let mut last: Option<&Once> = None;
    let mut length = HEAD_BYTES;
    for write in writes {
        length += WRITE_BYTES + write.bytes();
        if let Some(once) = &write.once {
            length += SEQ_BYTES;
            if !last.is_some_and(|last| last.same_client_floor(once)) {
                length += CLIENT_BYTES + once.client().as_str().len();
            }
            last = Some(once);
        }
    }
    length
}

fn put_write(write: &Write, last: Option<&Once>, out: &mut impl BufMut) {
    let kind = match write.action {
        Action::Put(_) => KIND_PUT,
        Action::Delete => KIND_DELETE,
    };
    match &write.once {
        None => out.put_u8(kind),
        Some(once) if last.is_some_and(|last| last.same_client_floor(once)) => {
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
    put_bytes(&write.key, out);
    if let Action::Put(value) = &write.action {
        put_bytes(value, out);
    }
}

fn get_write(last: Option<&Once>, reader: &mut Reader) -> Result<Write, DecodeError> {
    let found = reader.u8()?;
    let once = match found & !KIND_BITS {
        0 => None,
        ONCE_SAME => Some(get_once_of_same(last, reader)?),
        ONCE_NAMED => Some(get_once_named(last, reader)?),
        _ => return Err(DecodeError::Tag { what: "write", found }),
    };
    let condition = get_condition(reader)?;
    let key = reader.bytes()?;
    let action = match found & KIND_BITS {
        KIND_PUT => Action::Put(reader.bytes()?),
        KIND_DELETE => Action::Delete,
        _ => return Err(DecodeError::Tag { what: "write", found }),
    };
    Ok(Write { key, action, condition, once })
}

fn get_once_of_same(last: Option<&Once>, reader: &mut Reader) -> Result<Once, DecodeError> {
    let last = last.ok_or(DecodeError::Invalid { what: "write: no client before this one" })?;
    once(last.client().clone(), last.floor(), reader.u64()?)
}

fn get_once_named(last: Option<&Once>, reader: &mut Reader) -> Result<Once, DecodeError> {
    let once = once(get_client_name(reader)?, reader.u64()?, reader.u64()?)?;
    if last.is_some_and(|last| last.same_client_floor(&once)) {
        return Err(DecodeError::Invalid { what: "write: names the client before it again" });
    }
    Ok(once)
}

fn once(client: ClientName, floor: u64, seq: u64) -> Result<Once, DecodeError> {
    Once::new(ClientFloor { client, floor }, seq)
        .map_err(|_| DecodeError::Invalid { what: "write: sequence and floor" })
}

/// Appends a name's length, one byte, and the name.
pub(crate) fn put_client_name(name: &ClientName, out: &mut impl BufMut) {
    let text = name.as_str();
    out.put_u8(u8::try_from(text.len()).expect("a client's name has 64 bytes at most"));
    out.put_slice(text.as_bytes());
}

pub(crate) fn get_client_name(reader: &mut Reader) -> Result<ClientName, DecodeError> {
    let bytes = reader.short_bytes()?;
    let name = std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok());
    name.ok_or(DecodeError::Invalid { what: "name of a client" })
}

fn put_condition(condition: Condition, out: &mut impl BufMut) {
    match condition {
        Condition::Always => out.put_u8(CONDITION_ALWAYS),
        Condition::Revision(revision) => {
            out.put_u8(CONDITION_REVISION);
            out.put_u64(revision);
        }
        Condition::Absent => out.put_u8(CONDITION_ABSENT),
    }
}

fn get_condition(reader: &mut Reader) -> Result<Condition, DecodeError> {
    match reader.u8()? {
        CONDITION_ALWAYS => Ok(Condition::Always),
        CONDITION_REVISION => Ok(Condition::Revision(reader.u64()?)),
        CONDITION_ABSENT => Ok(Condition::Absent),
        found => Err(DecodeError::Tag { what: "condition", found }),
    }
}
