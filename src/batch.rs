//! The bodies of `POST /v1/batch`: many operations in one request, each answered by itself.
//!
//! A batch is an envelope and not a transaction: it spares a request for each operation, and promises
//! nothing beyond what the operations would have been promised alone. So every result holds all that
//! the answer to a single request holds, and what is wrong with one operation (an empty key, a value
//! over its limit) fails that one: a client puts the operations of unrelated tasks into one batch.
//! Only a body that cannot be understood is refused as a whole, and then nothing of it took effect.
//!
//! Two forms say the same: binary ([`MEDIA_TYPE`]) for clients that care about every byte,
//! [`json`] for people. `docs/BATCH.md` is written for their users.
//!
//! ```text
//! request    = version:u8 (1), count:u32, count x operation     nothing follows
//!            | version:u8 (2), client, floor:u64, count:u32, count x operation
//! client     = length:u8, bytes
//! operation  = kind:u8, seq:u64 if it has bit 6, fields
//!   kind 0x01 get                        key
//!   kind 0x02 put                        key, value
//!   kind 0x12 put at a revision          revision:u64, key, value
//!   kind 0x22 put if absent              key, value
//!   kind 0x03 delete                     key
//!   kind 0x13 delete at a revision       revision:u64, key
//!   kind 0x23 delete if absent           key      (every server refuses it, as in a single request)
//! answer     = version:u8 (1), count:u32, count x result        in the order of the operations
//! result     = kind:u8, fields
//!   kind 1 found     revision:u64, value
//!   kind 2 absent    nothing
//!   kind 3 written   revision:u64
//!   kind 4 deleted   revision:u64, deleted:u8 (0|1)
//!   kind 5 failed    status:u16, current:(0 | 1, revision:u64), error's JSON as length:u32, bytes
//! key, value = length:u32, bytes
//! ```
//! Integers are big-endian. In an operation's kind the low four bits say what it does, the next two
//! its condition. Bit 6 makes a write one that happens at most once, and brings its sequence; client and
//! floor are those of the request, so version 1 has no such bit. Bit 7 is 0. A request without a client
//! is of version 1, and one with a client of version 2.
//!
//! Lengths take four bytes and not one to five (LEB128): with the smallest keys and values that saves
//! a few bytes in a hundred, and would cost the rule that there is exactly one encoding of a thing, a
//! second way to write lengths next to [`crate::codec`]'s, and a loop in every client. (A client's name
//! has one, as in a log entry.)
//!
//! Invariants: as in [`crate::codec`], of which this uses the reader. Decoders never panic, check
//! every length against what is left, and allocate no more than a small multiple of their input.

pub(crate) mod base64;
mod binary;
pub mod json;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use http::StatusCode;

pub use binary::{decode_request, decode_results, encode_request, encode_results};

use crate::codec;
use crate::network::error::{ApiError, ErrorDetail};
use crate::once::{ClientFloor, InvalidSeq, Once};
use crate::types::{Condition, Revision};

/// The `Content-Type` of the binary form. Every other one, or none, means JSON.
pub const MEDIA_TYPE: &str = "application/vnd.distrib-kv.batch";

/// How many operations a batch may hold. Far more than brings anything (from some hundreds on, the
/// work for each operation is all that is left), few enough that one batch cannot hold the server up
/// for long: at 100 bytes each it is one megabyte of log entries.
pub const OPERATIONS_MAX: usize = 10_000;

/// What a server accepts of a batch and of its operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many operations: [`OPERATIONS_MAX`].
    pub operations_max: usize,
    /// `limits.key_bytes_max` of the configuration.
    pub key_bytes_max: usize,
    /// `limits.value_bytes_max` of the configuration.
    pub value_bytes_max: usize,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Whose the sequences of its operations are. Without it none has one.
    pub client: Option<ClientFloor>,
    /// What is asked for.
    pub operations: Vec<Operation>,
}

/// One operation of a batch. What is decoded is well-formed but may still break a rule that the
/// server checks for each operation by itself: see [`Operation::check`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Read a key. How fresh the read has to be is said once for the whole batch, by the query.
    Get {
        /// Any bytes.
        key: Bytes,
    },
    /// Store a value if the condition holds.
    Put {
        /// Any bytes.
        key: Bytes,
        /// Any bytes.
        value: Bytes,
        /// Checked when the write is applied.
        condition: Condition,
        /// `Some`: at most once, as this write of the batch's client.
        seq: Option<u64>,
    },
    /// Remove a key if the condition holds.
    Delete {
        /// Any bytes.
        key: Bytes,
        /// Checked when the write is applied.
        condition: Condition,
        /// As in [`Self::Put`].
        seq: Option<u64>,
    },
}

impl Operation {
    /// The key.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Get { key } | Self::Put { key, .. } | Self::Delete { key, .. } => key,
        }
    }

    /// Whether it changes anything.
    pub fn is_write(&self) -> bool {
        !matches!(self, Self::Get { .. })
    }

    /// Which of its client's writes it is.
    pub fn seq(&self) -> Option<u64> {
        match self {
            Self::Get { .. } => None,
            Self::Put { seq, .. } | Self::Delete { seq, .. } => *seq,
        }
    }

    /// What makes it happen at most once, in a batch of this client.
    ///
    /// # Errors
    /// Its sequence lies below the client's floor, or is none.
    pub fn once(&self, client: Option<&ClientFloor>) -> Result<Option<Once>, InvalidSeq> {
        match (self.seq(), client) {
            (Some(seq), Some(client)) => Once::new(client.clone(), seq).map(Some),
            // A sequence without a client does not decode.
            _ => Ok(None),
        }
    }

    /// How many bytes it takes in the binary form.
    pub fn encoded_len(&self) -> usize {
        binary::operation_len(self)
    }

    /// Whether a single request with this key, value and condition would be let in. The server asks
    /// this of every operation before it does anything with it, and answers the error in that
    /// operation's place.
    ///
    /// # Errors
    /// [`ApiError::BadRequest`] for an empty key and for a delete under [`Condition::Absent`],
    /// [`ApiError::TooLarge`] for a key or value over its limit.
    pub fn check(&self, limits: &Limits) -> Result<(), ApiError> {
        let too_large = |what, max| Err(ApiError::TooLarge { what, max });
        if self.key().is_empty() {
            return Err(ApiError::BadRequest("the key is empty".into()));
        }
        if self.key().len() > limits.key_bytes_max {
            return too_large("key", limits.key_bytes_max);
        }
        match self {
            Self::Put { value, .. } if value.len() > limits.value_bytes_max => {
                too_large("value", limits.value_bytes_max)
            }
            Self::Delete { condition: Condition::Absent, .. } => {
                Err(ApiError::BadRequest("a delete cannot require that the key is absent".into()))
            }
            _ => Ok(()),
        }
    }
}

/// What became of one operation.
#[derive(Debug, Clone, PartialEq)]
pub enum OperationResult {
    /// A get found this.
    Found {
        /// The revision of the write that stored it.
        revision: Revision,
        /// The value.
        value: Bytes,
    },
    /// A get found that the key has no record.
    Absent,
    /// A put was carried out.
    Written {
        /// The revision of the key's new record.
        revision: Revision,
    },
    /// A delete was carried out.
    Deleted {
        /// The cluster's revision afterwards; unchanged when nothing was deleted.
        revision: Revision,
        /// Whether there was something to delete.
        deleted: bool,
    },
    /// It failed.
    Failed(Box<Failure>),
}

/// What a single request's error answer says: status, `ETag`, body.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// The HTTP status, 300 to 599.
    pub status: u16,
    /// With `CONDITION_FAILED`: the revision of the key's record, `None` when the key is absent. A
    /// single answer's `ETag`.
    pub current: Option<Revision>,
    /// Code, message, outcome, and where to go instead.
    pub error: ErrorDetail,
}

impl OperationResult {
    /// The result of an operation that came to this error.
    pub fn failed(error: &ApiError) -> Self {
        if *error == ApiError::KeyAbsent {
            return Self::Absent;
        }
        let current = match error {
            ApiError::ConditionFailed { current } => *current,
            _ => None,
        };
        let status = error.status_and_code().0.as_u16();
        Self::Failed(Box::new(Failure { status, current, error: error.body().error }))
    }

    /// The status that the answer to a single request would have.
    pub fn status(&self) -> u16 {
        match self {
            Self::Found { .. } | Self::Written { .. } | Self::Deleted { .. } => {
                StatusCode::OK.as_u16()
            }
            Self::Absent => StatusCode::NOT_FOUND.as_u16(),
            Self::Failed(failure) => failure.status,
        }
    }
}

/// A body that is not a batch, or an answer that is not one. Nothing of such a batch takes effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// More operations than the server accepts.
    #[error("more than {max} operations")]
    TooMany {
        /// The limit.
        max: usize,
    },
    /// The answer has another number of results than there were operations.
    #[error("{found} results for {expected} operations")]
    Count {
        /// How many operations were sent.
        expected: usize,
        /// How many results the answer announces.
        found: u32,
    },
    /// The frame around the operations or results is wrong.
    #[error("{0}")]
    Frame(codec::DecodeError),
    /// One operation or result is wrong, and with it all that follows.
    #[error("item {index}: {error}")]
    Item {
        /// Which one, counted from 0.
        index: usize,
        /// What is wrong with it.
        error: codec::DecodeError,
    },
    /// Not the JSON of a batch. The text names the operation by its index.
    #[error("{0}")]
    Json(String),
}

impl From<DecodeError> for ApiError {
    fn from(error: DecodeError) -> Self {
        Self::BadRequest(format!("the body is not a batch: {error}"))
    }
}
