//! The form for people: the same operations and results in JSON.
//!
//! ```text
//! {"operations":[{"op":"put","key":"k","value":"v","if_match":5},
//!                {"op":"put","key":"k","value":"v","if_absent":true},
//!                {"op":"get","key":"k"},
//!                {"op":"delete","key":"k","if_match":3}]}
//! {"client":"c","floor":7,"operations":[{"op":"put","key":"k","value":"v","seq":9}]}
//! {"results":[{"status":200,"revision":6}, ...]}
//! ```
//! Keys and values are strings, or base64 of any bytes in `key_base64` and `value_base64`. What would
//! change an operation is either understood or refused, `null` included: a condition that is skipped
//! because of its form is a lost update.

use std::fmt;

use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::{Batch, DecodeError, Failure, Limits, Operation, OperationResult, base64};
use crate::network::error::ErrorDetail;
use crate::network::json::Object;
use crate::once::ClientFloor;
use crate::types::{Condition, Revision};

/// Decodes the body of a request.
///
/// # Errors
/// Anything but the form above: the text names the operation, counted from 0. More than
/// `limits.operations_max` operations. The other limits are checked for each operation by itself: see
/// [`Operation::check`].
pub fn decode_request(body: &[u8], limits: &Limits) -> Result<Batch, DecodeError> {
    let json = |error: serde_json::Error| DecodeError::Json(error.to_string());
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let request = Request { operations_max: limits.operations_max };
    let batch = request.deserialize(&mut deserializer).map_err(json)?;
    deserializer.end().map_err(json)?;
    batch.ok_or(DecodeError::TooMany { max: limits.operations_max })
}

/// The body of the answer with these results, in the order of the operations.
pub fn encode_results<'a>(results: impl IntoIterator<Item = &'a OperationResult>) -> Vec<u8> {
    let results = results.into_iter().map(JsonResult::from).collect();
    serde_json::to_vec(&JsonResults { results }).expect("text keys and nothing that fails")
}

/// The fields of the object around the operations.
const FIELDS: [&str; 3] = ["client", "floor", "operations"];

/// The object around the operations. `None` stands for too many of them: serde's own errors are text
/// only, and this one has a name.
#[derive(Clone, Copy)]
struct Request {
    operations_max: usize,
}

impl<'de> DeserializeSeed<'de> for Request {
    type Value = Option<Batch>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Request {
    type Value = Option<Batch>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `operations`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut client, mut floor, mut operations) = (None, None, None);
        while let Some(name) = map.next_key::<String>()? {
            let field = FIELDS.into_iter().find(|field| *field == name);
            let before = match field {
                Some("client") => client.replace(map.next_value::<String>()?).is_some(),
                Some("floor") => floor.replace(map.next_value::<u64>()?).is_some(),
                Some("operations") => {
                    let list = List { operations_max: self.operations_max };
                    operations.replace(map.next_value_seed(list)?).is_some()
                }
                _ => return Err(A::Error::unknown_field(&name, &FIELDS)),
            };
            if let (true, Some(field)) = (before, field) {
                return Err(A::Error::duplicate_field(field));
            }
        }
        let client = client_floor(client, floor).map_err(A::Error::custom)?;
        let operations = operations.ok_or_else(|| A::Error::missing_field("operations"))?;
        let Some(operations) = operations else { return Ok(None) };
        let of_nobody = |operation: &Operation| client.is_none() && operation.seq().is_some();
        if let Some(index) = operations.iter().position(of_nobody) {
            let what =
                format_args!("operation {index}: `seq` needs a `client` beside `operations`");
            return Err(A::Error::custom(what));
        }
        Ok(Some(Batch { client, operations }))
    }
}

fn client_floor(client: Option<String>, floor: Option<u64>) -> Result<Option<ClientFloor>, String> {
    match (client, floor) {
        (Some(client), floor) => {
            let client = client.parse().map_err(|error| format!("`client`: {error}"))?;
            Ok(Some(ClientFloor { client, floor: floor.unwrap_or(0) }))
        }
        (None, Some(_)) => Err("`floor` says nothing without a `client`".to_owned()),
        (None, None) => Ok(None),
    }
}

/// The array of operations. Those beyond the limit are checked, but not kept.
struct List {
    operations_max: usize,
}

impl<'de> DeserializeSeed<'de> for List {
    type Value = Option<Vec<Operation>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List {
    type Value = Option<Vec<Operation>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of operations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut operations = Vec::new();
        let mut count = 0;
        loop {
            let named = |what: &dyn fmt::Display| {
                A::Error::custom(format_args!("operation {count}: {what}"))
            };
            let next = seq.next_element::<Object<JsonOperation>>();
            let Some(Object(written)) = next.map_err(|error| named(&error))? else { break };
            let operation = written.understood().map_err(|what| named(&what))?;
            if count < self.operations_max {
                operations.push(operation);
            }
            count += 1;
        }
        Ok((count <= self.operations_max).then_some(operations))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Op {
    Get,
    Put,
    Delete,
}

/// An operation as it was written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonOperation {
    op: Op,
    #[serde(default, deserialize_with = "present")]
    key: Option<String>,
    #[serde(default, deserialize_with = "present")]
    key_base64: Option<String>,
    #[serde(default, deserialize_with = "present")]
    value: Option<String>,
    #[serde(default, deserialize_with = "present")]
    value_base64: Option<String>,
    #[serde(default, deserialize_with = "present")]
    if_match: Option<Revision>,
    #[serde(default, deserialize_with = "present")]
    if_absent: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    seq: Option<u64>,
}

/// A field that is there has a value: `null` is none.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

impl JsonOperation {
    fn understood(self) -> Result<Operation, &'static str> {
        let key = bytes_of(self.key, self.key_base64, "`key_base64` is not base64")?
            .ok_or("exactly one of `key` and `key_base64` has to be given")?;
        let value = bytes_of(self.value, self.value_base64, "`value_base64` is not base64")?;
        let condition = match (self.if_match, self.if_absent) {
            (None, None) => Condition::Always,
            (Some(revision), None) => Condition::Revision(revision),
            (None, Some(true)) => Condition::Absent,
            (None, Some(false)) => return Err("`if_absent` can only be true"),
            (Some(_), Some(_)) => return Err("`if_match` and `if_absent` exclude each other"),
        };
        let seq = self.seq;
        match (self.op, value, condition) {
            (Op::Get, ..) if seq.is_some() => Err("a get takes no `seq`"),
            (Op::Get, None, Condition::Always) => Ok(Operation::Get { key }),
            (Op::Get, None, _) => Err("a get takes no condition"),
            (Op::Put, Some(value), condition) => Ok(Operation::Put { key, value, condition, seq }),
            (Op::Put, None, _) => Err("a put takes exactly one of `value` and `value_base64`"),
            (Op::Delete, None, Condition::Absent) => Err("`if_absent` is for puts only"),
            (Op::Delete, None, condition) => Ok(Operation::Delete { key, condition, seq }),
            (Op::Get | Op::Delete, Some(_), _) => Err("only a put takes a value"),
        }
    }
}

/// The bytes that one of two fields gives; `None` when neither does.
fn bytes_of(
    text: Option<String>,
    base64: Option<String>,
    not_base64: &'static str,
) -> Result<Option<Bytes>, &'static str> {
    match (text, base64) {
        (None, None) => Ok(None),
        (Some(text), None) => Ok(Some(text.into())),
        (None, Some(text)) => match base64::decode(&text) {
            Some(bytes) => Ok(Some(bytes.into())),
            None => Err(not_base64),
        },
        (Some(_), Some(_)) => Err("a text and its base64 form exclude each other"),
    }
}

#[derive(Serialize)]
struct JsonResults<'a> {
    results: Vec<JsonResult<'a>>,
}

/// What became of one operation, as it is written.
#[derive(Serialize, Default)]
struct JsonResult<'a> {
    status: u16,
    /// Of the record read or written; with `CONDITION_FAILED` of the one that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<Revision>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deleted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a ErrorDetail>,
}

impl<'a> From<&'a OperationResult> for JsonResult<'a> {
    fn from(result: &'a OperationResult) -> Self {
        let mut json = Self { status: result.status(), ..Self::default() };
        match result {
            OperationResult::Absent => {}
            OperationResult::Written { revision } => json.revision = Some(*revision),
            OperationResult::Deleted { revision, deleted } => {
                (json.revision, json.deleted) = (Some(*revision), Some(*deleted));
            }
            OperationResult::Found { revision, value } => {
                json.revision = Some(*revision);
                match std::str::from_utf8(value) {
                    Ok(text) => json.value = Some(text),
                    Err(_) => json.value_base64 = Some(base64::encode(value)),
                }
            }
            OperationResult::Failed(failure) => {
                let Failure { current, error, .. } = &**failure;
                (json.revision, json.error) = (*current, Some(error));
            }
        }
        json
    }
}
