//! The binary form; the parent module draws it.

use bytes::{BufMut, Bytes};

use super::{DecodeError, Failure, Limits, Operation, OperationResult};
use crate::codec::{self, Reader, put_bytes, put_count, put_option};
use crate::network::error::ErrorBody;
use crate::types::Condition;

/// The version that both bodies start with.
const VERSION: u8 = 1;

const OPERATION_GET: u8 = 0x01;
const OPERATION_PUT: u8 = 0x02;
const OPERATION_DELETE: u8 = 0x03;
const OPERATION_BITS: u8 = 0x0f;

const CONDITION_ALWAYS: u8 = 0x00;
const CONDITION_REVISION: u8 = 0x10;
const CONDITION_ABSENT: u8 = 0x20;
const CONDITION_BITS: u8 = 0x30;

/// Kept for operations that carry a client id and a sequence number.
const FLAG_IDEMPOTENT: u8 = 0x40;

const RESULT_FOUND: u8 = 1;
const RESULT_ABSENT: u8 = 2;
const RESULT_WRITTEN: u8 = 3;
const RESULT_DELETED: u8 = 4;
const RESULT_FAILED: u8 = 5;

/// Version and count.
const HEAD_BYTES: usize = 1 + 4;
/// The smallest operation: a kind and the length of an empty key.
const OPERATION_BYTES_MIN: usize = 1 + 4;
/// The smallest result: a kind.
const RESULT_BYTES_MIN: usize = 1;
const LENGTH_BYTES: usize = 4;
const REVISION_BYTES: usize = 8;

/// What a failure may take at most, roughly: for reserving memory, not a limit.
const FAILURE_BYTES_USUAL: usize = 256;

/// The body of a request with these operations.
///
/// # Panics
/// If an operation or their number is over 4 GiB; the limits lie far below.
pub fn encode_operations<'a, I>(operations: I) -> Bytes
where
    I: IntoIterator<Item = &'a Operation>,
    I::IntoIter: ExactSizeIterator + Clone,
{
    let operations = operations.into_iter();
    let length: usize = operations.clone().map(operation_len).sum();
    let mut out = Vec::with_capacity(HEAD_BYTES + length);
    out.put_u8(VERSION);
    put_count(operations.len(), &mut out);
    for operation in operations {
        put_operation(operation, &mut out);
    }
    out.into()
}

/// Decodes the body of a request. Keys and values are slices of `body`: each keeps all of it alive.
///
/// # Errors
/// Every deviation from the form, and more than `limits.operations_max` operations. The other limits
/// are checked for each operation by itself: see [`Operation::check`].
pub fn decode_operations(body: Bytes, limits: &Limits) -> Result<Vec<Operation>, DecodeError> {
    let left = body.len();
    let mut reader = Reader::new(body);
    let count = get_head(&mut reader).map_err(DecodeError::Frame)? as usize;
    if count > limits.operations_max {
        return Err(DecodeError::TooMany { max: limits.operations_max });
    }
    let mut operations = Vec::with_capacity(count.min(left / OPERATION_BYTES_MIN));
    for index in 0..count {
        let item = |error| DecodeError::Item { index, error };
        let kind = reader.u8().map_err(item)?;
        if kind & FLAG_IDEMPOTENT != 0 {
            return Err(DecodeError::Idempotency { index });
        }
        operations.push(get_operation(kind, &mut reader).map_err(item)?);
    }
    reader.end().map_err(DecodeError::Frame)?;
    Ok(operations)
}

/// The body of the answer with these results, in the order of the operations.
pub fn encode_results<'a, I>(results: I) -> Bytes
where
    I: IntoIterator<Item = &'a OperationResult>,
    I::IntoIter: ExactSizeIterator + Clone,
{
    let results = results.into_iter();
    let length: usize = results.clone().map(usual_result_len).sum();
    let mut out = Vec::with_capacity(HEAD_BYTES + length);
    out.put_u8(VERSION);
    put_count(results.len(), &mut out);
    for result in results {
        put_result(result, &mut out);
    }
    out.into()
}

/// Decodes the answer to `expected` operations. Values are slices of `body`.
///
/// # Errors
/// Every deviation from the form, and another number of results.
pub fn decode_results(body: Bytes, expected: usize) -> Result<Vec<OperationResult>, DecodeError> {
    let left = body.len();
    let mut reader = Reader::new(body);
    let found = get_head(&mut reader).map_err(DecodeError::Frame)?;
    if found as usize != expected {
        return Err(DecodeError::Count { expected, found });
    }
    let mut results = Vec::with_capacity(expected.min(left / RESULT_BYTES_MIN));
    for index in 0..expected {
        let result = get_result(&mut reader);
        results.push(result.map_err(|error| DecodeError::Item { index, error })?);
    }
    reader.end().map_err(DecodeError::Frame)?;
    Ok(results)
}

fn get_head(reader: &mut Reader) -> Result<u32, codec::DecodeError> {
    reader.version(VERSION)?;
    reader.u32()
}

pub(super) fn operation_len(operation: &Operation) -> usize {
    let (condition, value) = match operation {
        Operation::Get { .. } => (Condition::Always, None),
        Operation::Put { value, condition, .. } => (*condition, Some(value)),
        Operation::Delete { condition, .. } => (*condition, None),
    };
    let revision = if matches!(condition, Condition::Revision(_)) { REVISION_BYTES } else { 0 };
    let value = value.map_or(0, |value| LENGTH_BYTES + value.len());
    1 + revision + LENGTH_BYTES + operation.key().len() + value
}

fn put_operation(operation: &Operation, out: &mut impl BufMut) {
    match operation {
        Operation::Get { key } => {
            out.put_u8(OPERATION_GET);
            put_bytes(key, out);
        }
        Operation::Put { key, value, condition } => {
            put_write_head(OPERATION_PUT, *condition, out);
            put_bytes(key, out);
            put_bytes(value, out);
        }
        Operation::Delete { key, condition } => {
            put_write_head(OPERATION_DELETE, *condition, out);
            put_bytes(key, out);
        }
    }
}

fn put_write_head(operation: u8, condition: Condition, out: &mut impl BufMut) {
    match condition {
        Condition::Always => out.put_u8(operation | CONDITION_ALWAYS),
        Condition::Absent => out.put_u8(operation | CONDITION_ABSENT),
        Condition::Revision(revision) => {
            out.put_u8(operation | CONDITION_REVISION);
            out.put_u64(revision);
        }
    }
}

fn get_operation(kind: u8, reader: &mut Reader) -> Result<Operation, codec::DecodeError> {
    let unknown = codec::DecodeError::Tag { what: "kind of operation", found: kind };
    if kind & !(OPERATION_BITS | CONDITION_BITS) != 0 {
        return Err(unknown);
    }
    let condition = match (kind & OPERATION_BITS, kind & CONDITION_BITS) {
        (OPERATION_GET, CONDITION_ALWAYS) => return Ok(Operation::Get { key: reader.bytes()? }),
        (OPERATION_PUT | OPERATION_DELETE, CONDITION_ALWAYS) => Condition::Always,
        (OPERATION_PUT | OPERATION_DELETE, CONDITION_ABSENT) => Condition::Absent,
        (OPERATION_PUT | OPERATION_DELETE, CONDITION_REVISION) => {
            Condition::Revision(reader.u64()?)
        }
        _ => return Err(unknown),
    };
    let key = reader.bytes()?;
    if kind & OPERATION_BITS == OPERATION_DELETE {
        return Ok(Operation::Delete { key, condition });
    }
    Ok(Operation::Put { key, value: reader.bytes()?, condition })
}

fn usual_result_len(result: &OperationResult) -> usize {
    let fields = match result {
        OperationResult::Found { value, .. } => REVISION_BYTES + LENGTH_BYTES + value.len(),
        OperationResult::Absent => 0,
        OperationResult::Written { .. } => REVISION_BYTES,
        OperationResult::Deleted { .. } => REVISION_BYTES + 1,
        OperationResult::Failed(_) => FAILURE_BYTES_USUAL,
    };
    1 + fields
}

fn put_result(result: &OperationResult, out: &mut Vec<u8>) {
    match result {
        OperationResult::Found { revision, value } => {
            out.put_u8(RESULT_FOUND);
            out.put_u64(*revision);
            put_bytes(value, out);
        }
        OperationResult::Absent => out.put_u8(RESULT_ABSENT),
        OperationResult::Written { revision } => {
            out.put_u8(RESULT_WRITTEN);
            out.put_u64(*revision);
        }
        OperationResult::Deleted { revision, deleted } => {
            out.put_u8(RESULT_DELETED);
            out.put_u64(*revision);
            out.put_u8(u8::from(*deleted));
        }
        OperationResult::Failed(failure) => {
            out.put_u8(RESULT_FAILED);
            put_failure(failure, out);
        }
    }
}

fn put_failure(failure: &Failure, out: &mut Vec<u8>) {
    out.put_u16(failure.status);
    put_option(failure.current.as_ref(), out, |revision, out| out.put_u64(*revision));
    let body = ErrorBody { error: failure.error.clone() };
    let json = serde_json::to_vec(&body).expect("an error has text keys and nothing that fails");
    put_bytes(&json, out);
}

fn get_result(reader: &mut Reader) -> Result<OperationResult, codec::DecodeError> {
    Ok(match reader.u8()? {
        RESULT_FOUND => OperationResult::Found { revision: reader.u64()?, value: reader.bytes()? },
        RESULT_ABSENT => OperationResult::Absent,
        RESULT_WRITTEN => OperationResult::Written { revision: reader.u64()? },
        RESULT_DELETED => {
            OperationResult::Deleted { revision: reader.u64()?, deleted: reader.flag()? }
        }
        RESULT_FAILED => OperationResult::Failed(Box::new(get_failure(reader)?)),
        found => return Err(codec::DecodeError::Tag { what: "kind of result", found }),
    })
}

fn get_failure(reader: &mut Reader) -> Result<Failure, codec::DecodeError> {
    let status = u16::from_be_bytes([reader.u8()?, reader.u8()?]);
    if !(300..600).contains(&status) {
        return Err(codec::DecodeError::Invalid { what: "status of a failed operation" });
    }
    let current = reader.option(Reader::u64)?;
    match serde_json::from_slice(&reader.bytes()?) {
        Ok(ErrorBody { error }) => Ok(Failure { status, current, error }),
        Err(_) => Err(codec::DecodeError::Invalid { what: "error of a failed operation" }),
    }
}
