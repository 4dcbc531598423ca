//! The binary form; the parent module draws it.

use bytes::{BufMut, Bytes};

use super::{Batch, DecodeError, Failure, Limits, Operation, OperationResult};
use crate::codec::{
    self, Reader, get_client_name, put_bytes, put_client_name, put_count, put_option,
};
use crate::network::error::ErrorBody;
use crate::once::{CLIENT_NAME_BYTES_MAX, ClientFloor};
use crate::types::Condition;

/// The version that an answer starts with, and a request without a client.
const VERSION: u8 = 1;
/// The version of a request with a client.
const VERSION_CLIENT: u8 = 2;

const OPERATION_GET: u8 = 0x01;
const OPERATION_PUT: u8 = 0x02;
const OPERATION_DELETE: u8 = 0x03;
const OPERATION_BITS: u8 = 0x0f;

const CONDITION_ALWAYS: u8 = 0x00;
const CONDITION_REVISION: u8 = 0x10;
const CONDITION_ABSENT: u8 = 0x20;
const CONDITION_BITS: u8 = 0x30;

/// The write has a sequence.
const FLAG_ONCE: u8 = 0x40;

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
const SEQ_BYTES: usize = 8;
/// A name with its length, and a floor.
const CLIENT_BYTES_MAX: usize = 1 + CLIENT_NAME_BYTES_MAX + 8;

/// What a failure may take at most, roughly: for reserving memory, not a limit.
const FAILURE_BYTES_USUAL: usize = 256;

/// The body of a request with these operations. Without a client none of them may have a sequence.
///
/// # Panics
/// If an operation or their number is over 4 GiB; the limits lie far below.
pub fn encode_request<'a, I>(client: Option<&ClientFloor>, operations: I) -> Bytes
where
    I: IntoIterator<Item = &'a Operation>,
    I::IntoIter: ExactSizeIterator + Clone,
{
    let operations = operations.into_iter();
    let length: usize = operations.clone().map(operation_len).sum();
    let mut out = Vec::with_capacity(HEAD_BYTES + CLIENT_BYTES_MAX + length);
    match client {
        None => out.put_u8(VERSION),
        Some(ClientFloor { client, floor }) => {
            out.put_u8(VERSION_CLIENT);
            put_client_name(client.as_str(), &mut out);
            out.put_u64(*floor);
        }
    }
    put_count(operations.len(), &mut out);
    for operation in operations {
        debug_assert!(client.is_some() || operation.seq().is_none(), "whose sequence is it?");
        put_operation(operation, &mut out);
    }
    out.into()
}

/// Decodes the body of a request. Keys and values are slices of `body`: each keeps all of it alive.
///
/// # Errors
/// Every deviation from the form, and more than `limits.operations_max` operations. The other limits
/// are checked for each operation by itself: see [`Operation::check`].
pub fn decode_request(body: Bytes, limits: &Limits) -> Result<Batch, DecodeError> {
    let left = body.len();
    let mut reader = Reader::new(body);
    let client = get_client(&mut reader).map_err(DecodeError::Frame)?;
    let count = reader.u32().map_err(DecodeError::Frame)? as usize;
    if count > limits.operations_max {
        return Err(DecodeError::TooMany { max: limits.operations_max });
    }
    let mut operations = Vec::with_capacity(count.min(left / OPERATION_BYTES_MIN));
    for index in 0..count {
        let operation = get_operation(client.is_some(), &mut reader);
        operations.push(operation.map_err(|error| DecodeError::Item { index, error })?);
    }
    reader.end().map_err(DecodeError::Frame)?;
    Ok(Batch { client, operations })
}

fn get_client(reader: &mut Reader) -> Result<Option<ClientFloor>, codec::DecodeError> {
    match reader.u8()? {
        VERSION => Ok(None),
        VERSION_CLIENT => {
            let client = get_client_name(reader)?;
            Ok(Some(ClientFloor { client, floor: reader.u64()? }))
        }
        found => Err(codec::DecodeError::Version { found }),
    }
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
    let seq = operation.seq().map_or(0, |_| SEQ_BYTES);
    1 + seq + revision + LENGTH_BYTES + operation.key().len() + value
}

fn put_operation(operation: &Operation, out: &mut impl BufMut) {
    match operation {
        Operation::Get { key } => {
            out.put_u8(OPERATION_GET);
            put_bytes(key, out);
        }
        Operation::Put { key, value, condition, seq } => {
            put_write_head(OPERATION_PUT, *seq, *condition, out);
            put_bytes(key, out);
            put_bytes(value, out);
        }
        Operation::Delete { key, condition, seq } => {
            put_write_head(OPERATION_DELETE, *seq, *condition, out);
            put_bytes(key, out);
        }
    }
}

fn put_write_head(operation: u8, seq: Option<u64>, condition: Condition, out: &mut impl BufMut) {
    let condition_bits = match condition {
        Condition::Always => CONDITION_ALWAYS,
        Condition::Absent => CONDITION_ABSENT,
        Condition::Revision(_) => CONDITION_REVISION,
    };
    out.put_u8(operation | condition_bits | if seq.is_some() { FLAG_ONCE } else { 0 });
    if let Some(seq) = seq {
        out.put_u64(seq);
    }
    if let Condition::Revision(revision) = condition {
        out.put_u64(revision);
    }
}

fn get_operation(has_client: bool, reader: &mut Reader) -> Result<Operation, codec::DecodeError> {
    let kind = reader.u8()?;
    let unknown = codec::DecodeError::Tag { what: "kind of operation", found: kind };
    let once = kind & FLAG_ONCE != 0;
    if kind & !(OPERATION_BITS | CONDITION_BITS | FLAG_ONCE) != 0 || (once && !has_client) {
        return Err(unknown);
    }
    let write = match kind & OPERATION_BITS {
        OPERATION_GET if kind == OPERATION_GET => {
            return Ok(Operation::Get { key: reader.bytes()? });
        }
        write @ (OPERATION_PUT | OPERATION_DELETE) => write,
        _ => return Err(unknown),
    };
    let seq = if once { Some(reader.u64()?) } else { None };
    let condition = match kind & CONDITION_BITS {
        CONDITION_ALWAYS => Condition::Always,
        CONDITION_ABSENT => Condition::Absent,
        CONDITION_REVISION => Condition::Revision(reader.u64()?),
        _ => return Err(unknown),
    };
    let key = reader.bytes()?;
    if write == OPERATION_DELETE {
        return Ok(Operation::Delete { key, condition, seq });
    }
    Ok(Operation::Put { key, value: reader.bytes()?, condition, seq })
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
