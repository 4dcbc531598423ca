//! What a node said, and what that is for the caller.

use std::sync::Arc;

use http::{HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::call::Kind;
use super::courier::Carried;
use crate::batch::OperationResult;
use crate::client_error::ClientError;
use crate::http_client::HttpResponse;
use crate::types::{Record, Revision};

/// What became of a delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Deleted {
    /// The cluster's revision afterwards; unchanged when nothing was deleted.
    pub revision: Revision,
    /// Whether there was something to delete.
    pub deleted: bool,
}

/// What one attempt brought.
#[derive(Debug, Clone)]
pub(super) enum Reply {
    /// The answer to a request of its own.
    Single(HttpResponse),
    /// An operation's own result, out of a batch.
    Item(OperationResult),
    /// What a batch came to that has no results.
    Whole(Arc<HttpResponse>),
}

impl From<Carried> for Reply {
    fn from(carried: Carried) -> Self {
        match carried {
            Carried::Item(result) => Self::Item(result),
            Carried::Whole(response) => Self::Whole(response),
        }
    }
}

/// What a node answered to a [`Call`](super::Call), other than an error.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(super) kind: Kind,
    /// Who answered.
    pub(crate) address: String,
    pub(super) reply: Reply,
}

#[derive(Deserialize)]
struct Written {
    revision: Revision,
}

impl Answer {
    pub(crate) fn written(&self) -> Result<Revision, ClientError> {
        if let Reply::Item(OperationResult::Written { revision }) = &self.reply {
            return Ok(*revision);
        }
        self.json::<Written>().map(|written| written.revision)
    }

    pub(crate) fn deleted(&self) -> Result<Deleted, ClientError> {
        if let Reply::Item(OperationResult::Deleted { revision, deleted }) = &self.reply {
            return Ok(Deleted { revision: *revision, deleted: *deleted });
        }
        self.json()
    }

    /// The record that was read; `None` when the key is absent.
    pub(crate) fn record(self) -> Result<Option<Record>, ClientError> {
        let response = match &self.reply {
            Reply::Single(response) => response,
            Reply::Item(OperationResult::Absent) => return Ok(None),
            Reply::Item(OperationResult::Found { revision, value }) => {
                return Ok(Some(Record { revision: *revision, value: value.clone() }));
            }
            Reply::Item(_) | Reply::Whole(_) => return Err(self.of_another_kind()),
        };
        match response.status {
            StatusCode::NOT_FOUND => return Ok(None),
            StatusCode::OK => {}
            other => return Err(self.garbled(format!("status {other} for a read"))),
        }
        let Some(tag) = response.headers.get(header::ETAG) else {
            return Err(self.garbled("a value without an ETag".to_owned()));
        };
        match parse_etag(tag) {
            Some(revision) => Ok(Some(Record { revision, value: response.body.clone() })),
            None => Err(self.garbled(format!("the ETag {tag:?} is not a revision"))),
        }
    }

    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        let Reply::Single(response) = &self.reply else { return Err(self.of_another_kind()) };
        let decoded = serde_json::from_slice(&response.body);
        decoded.map_err(|error| self.garbled(error.to_string()))
    }

    fn of_another_kind(&self) -> ClientError {
        self.garbled("the result is that of another kind of operation".to_owned())
    }

    fn garbled(&self, message: String) -> ClientError {
        let outcome = self.kind.outcome_when_in_doubt();
        ClientError::Garbled { address: self.address.clone(), message, outcome }
    }
}

/// The revision in an `ETag` of the form `"N"`.
pub(super) fn parse_etag(tag: &HeaderValue) -> Option<Revision> {
    tag.to_str().ok()?.strip_prefix('"')?.strip_suffix('"')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::HeaderMap;

    use super::*;
    use crate::network::error::Outcome;

    fn read_answer(status: u16, tag: Option<&'static str>, body: &'static [u8]) -> Answer {
        let mut headers = HeaderMap::new();
        if let Some(tag) = tag {
            headers.insert(header::ETAG, HeaderValue::from_static(tag));
        }
        let status = StatusCode::from_u16(status).unwrap();
        let response = HttpResponse { status, headers, body: Bytes::from_static(body) };
        Answer { kind: Kind::AnyRead, address: "a:1".into(), reply: Reply::Single(response) }
    }

    fn item(kind: Kind, result: OperationResult) -> Answer {
        Answer { kind, address: "a:1".into(), reply: Reply::Item(result) }
    }

    #[test]
    fn an_empty_value_is_not_an_absent_key() {
        let empty = Some(Record { revision: 7, value: Bytes::new() });
        assert_eq!(read_answer(200, Some("\"7\""), b"").record().unwrap(), empty);
        assert_eq!(read_answer(404, None, b"{}").record().unwrap(), None);
        let found = OperationResult::Found { revision: 7, value: Bytes::new() };
        assert_eq!(item(Kind::AnyRead, found).record().unwrap(), empty);
        assert_eq!(item(Kind::AnyRead, OperationResult::Absent).record().unwrap(), None);
    }

    #[test]
    fn a_value_without_a_sound_revision_is_an_error() {
        for tag in [None, Some("7"), Some("\"x\""), Some("W/\"7\"")] {
            let error = read_answer(200, tag, b"v").record().unwrap_err();
            assert!(matches!(error, ClientError::Garbled { .. }), "{tag:?}");
            assert_eq!(error.outcome(), Outcome::NotApplied);
        }
    }

    #[test]
    fn the_result_of_another_kind_of_operation_leaves_a_write_in_doubt() {
        let written = || OperationResult::Written { revision: 1 };
        let read = item(Kind::AnyRead, written()).record().unwrap_err();
        assert_eq!(read.outcome(), Outcome::NotApplied);
        assert_eq!(item(Kind::Write, written()).written(), Ok(1));
        for other in
            [OperationResult::Absent, OperationResult::Deleted { revision: 1, deleted: true }]
        {
            let error = item(Kind::Write, other).written().unwrap_err();
            assert_eq!(error.outcome(), Outcome::Unknown);
        }
        let error = item(Kind::Write, written()).deleted().unwrap_err();
        assert_eq!(error.outcome(), Outcome::Unknown);
    }
}
