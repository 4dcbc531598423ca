//! What to do about the result of one attempt: a pure function of the call's kind and the result.
//!
//! Every call may be sent again, whatever became of it: reads change nothing, management says what is to
//! be and not what is to be done, writes carry a number, and a repeated step of a change of the ring is
//! answered as the first one was. What an attempt leaves in doubt is remembered on the way
//! ([`super::doubt`]).

use http::{StatusCode, header};

use crate::batch::{Failure, OperationResult};
use crate::client_error::ClientError;
use crate::http_client::{HttpResponse, SendError};
use crate::network::error::{ErrorBody, ErrorDetail};
use crate::types::Revision;

use super::answer::{Reply, parse_etag};
use super::call::Kind;

/// What one attempt came to.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Served.
    Answer(Reply),
    /// The node at this address leads.
    Redirect(String),
    /// Another node may do better.
    Elsewhere(Reason),
    /// No node will do better, or none may be asked any more.
    Fail(ClientError),
}

/// Why another node is asked.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Reason {
    /// There was no connection.
    Refused(SendError),
    /// This client's earlier requests to the node took all turns, and kept them.
    NoTurn(ClientError),
    /// There was no answer, or a senseless one.
    Silent(String),
    /// The node said that it cannot at the moment, or does not know what became of it.
    Declined(ClientError),
}

pub(super) fn judge(kind: Kind, address: &str, result: Result<Reply, SendError>) -> Verdict {
    match result {
        Ok(Reply::Single(response)) if response.status.is_success() => {
            Verdict::Answer(Reply::Single(response))
        }
        Ok(Reply::Single(response)) => judge_error(kind, address, response),
        Ok(Reply::Item(OperationResult::Failed(failure))) => {
            let Failure { status, current, error } = *failure;
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            judge_failure(address, status, current, error)
        }
        Ok(Reply::Item(result)) => Verdict::Answer(Reply::Item(result)),
        Ok(Reply::Whole(response)) => judge_whole(kind, address, &response),
        Err(SendError::Unsendable(why)) => Verdict::Fail(ClientError::Unsendable(why)),
        Err(error) if !error.may_have_arrived() => Verdict::Elsewhere(Reason::Refused(error)),
        Err(error) => Verdict::Elsewhere(Reason::Silent(error.to_string())),
    }
}

fn judge_error(kind: Kind, address: &str, response: HttpResponse) -> Verdict {
    let status = response.status;
    let Ok(ErrorBody { error: detail }) = serde_json::from_slice(&response.body) else {
        return judge_garbled(kind, address, status);
    };
    if status == StatusCode::NOT_FOUND && kind.reads_key() && detail.code == "NOT_FOUND" {
        return Verdict::Answer(Reply::Single(response));
    }
    let current = match response.headers.get(header::ETAG).map(parse_etag) {
        None => None,
        Some(Some(revision)) => Some(revision),
        Some(None) => return judge_garbled(kind, address, status),
    };
    judge_failure(address, status, current, detail)
}

/// An error that speaks of a whole batch. What is said of single keys is not said this way, so that
/// a 404 is never taken for an absent key.
fn judge_whole(kind: Kind, address: &str, response: &HttpResponse) -> Verdict {
    let status = response.status;
    let of_one_key = matches!(status, StatusCode::NOT_FOUND | StatusCode::PRECONDITION_FAILED);
    if status.is_success() || of_one_key {
        return judge_garbled(kind, address, status);
    }
    match serde_json::from_slice(&response.body) {
        Ok(ErrorBody { error }) => judge_failure(address, status, None, error),
        Err(_) => judge_garbled(kind, address, status),
    }
}

fn judge_failure(
    address: &str,
    status: StatusCode,
    current: Option<Revision>,
    detail: ErrorDetail,
) -> Verdict {
    if let Some(refused) = detail.refused {
        return Verdict::Fail(ClientError::StepRefused(Box::new(refused)));
    }
    match status {
        StatusCode::PRECONDITION_FAILED => Verdict::Fail(ClientError::ConditionFailed { current }),
        StatusCode::MISDIRECTED_REQUEST => Verdict::Fail(ClientError::WrongCluster {
            address: address.to_owned(),
            owner: detail.owner.map(Box::new),
            epoch: detail.epoch.unwrap_or(0),
        }),
        StatusCode::TEMPORARY_REDIRECT => match detail.leader {
            Some(leader) => Verdict::Redirect(leader.http),
            None => Verdict::Elsewhere(Reason::Declined(server_error(address, status, detail))),
        },
        _ if may_pass(status) => {
            Verdict::Elsewhere(Reason::Declined(server_error(address, status, detail)))
        }
        _ => Verdict::Fail(server_error(address, status, detail)),
    }
}

/// Whether another node, or the same one later, may answer better.
fn may_pass(status: StatusCode) -> bool {
    status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
}

fn judge_garbled(kind: Kind, address: &str, status: StatusCode) -> Verdict {
    let outcome = kind.outcome_when_in_doubt();
    let message = format!("status {status} with a body that is not this store's");
    let error = ClientError::Garbled { address: address.to_owned(), message, outcome };
    if may_pass(status) {
        return Verdict::Elsewhere(Reason::Silent(error.to_string()));
    }
    Verdict::Fail(error)
}

fn server_error(address: &str, status: StatusCode, detail: ErrorDetail) -> ClientError {
    let ErrorDetail { code, message, outcome, .. } = detail;
    let (address, status) = (address.to_owned(), status.as_u16());
    ClientError::Server { address, status, code, message, outcome }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;
    use http::HeaderMap;

    use super::*;
    use crate::network::error::Outcome;

    fn response(status: u16, body: &str) -> HttpResponse {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let status = StatusCode::from_u16(status).unwrap();
        HttpResponse { status, headers: HeaderMap::new(), body }
    }

    fn answer(status: u16, body: &str) -> Result<Reply, SendError> {
        Ok(Reply::Single(response(status, body)))
    }

    /// The same error in its three forms: of a single request, of one operation in a batch, and of a
    /// whole batch.
    fn all_forms(status: u16, body: &str) -> [Reply; 3] {
        let ErrorBody { error } = serde_json::from_str(body).unwrap();
        let failure = Failure { status, current: None, error };
        let single = response(status, body);
        [
            Reply::Whole(Arc::new(single.clone())),
            Reply::Single(single),
            Reply::Item(OperationResult::Failed(Box::new(failure))),
        ]
    }

    fn error(code: &str, outcome: &str) -> String {
        format!(r#"{{"error":{{"code":"{code}","message":"m","outcome":"{outcome}"}}}}"#)
    }

    fn word(verdict: Verdict) -> &'static str {
        match verdict {
            Verdict::Answer(_) => "answer",
            Verdict::Redirect(_) => "redirect",
            Verdict::Elsewhere(_) => "elsewhere",
            Verdict::Fail(error) if error.outcome() == Outcome::Unknown => "unknown",
            Verdict::Fail(_) => "fail",
        }
    }

    #[test]
    fn whatever_may_pass_is_tried_elsewhere() {
        let not_sent = SendError::NotSent { address: "a".into(), message: "m".into() };
        let maybe_sent = SendError::MaybeSent { address: "a".into(), message: "m".into() };
        let timed_out = SendError::TimedOut { address: "a".into(), waited: Duration::ZERO };
        for (result, write, read) in [
            (Err(not_sent), "elsewhere", "elsewhere"),
            (Err(maybe_sent), "elsewhere", "elsewhere"),
            (Err(timed_out), "elsewhere", "elsewhere"),
            (answer(200, "{}"), "answer", "answer"),
            (answer(503, &error("NO_LEADER", "not_applied")), "elsewhere", "elsewhere"),
            (answer(503, &error("NO_LEADER", "unknown")), "elsewhere", "elsewhere"),
            (answer(504, &error("TIMEOUT", "unknown")), "elsewhere", "elsewhere"),
            (answer(504, &error("TIMEOUT", "not_applied")), "elsewhere", "elsewhere"),
            (answer(500, &error("STORAGE", "unknown")), "elsewhere", "elsewhere"),
            (answer(502, "<html>"), "elsewhere", "elsewhere"),
            (answer(400, "<html>"), "unknown", "fail"),
            (answer(400, &error("BAD_REQUEST", "not_applied")), "fail", "fail"),
            (answer(404, &error("NOT_FOUND", "not_applied")), "fail", "answer"),
            (answer(404, "no such page"), "unknown", "fail"),
            (answer(412, &error("CONDITION_FAILED", "not_applied")), "fail", "fail"),
            (answer(421, &error("WRONG_CLUSTER", "not_applied")), "fail", "fail"),
            (answer(501, &error("NOT_IMPLEMENTED", "not_applied")), "fail", "fail"),
            (answer(307, &error("NOT_LEADER", "not_applied")), "elsewhere", "elsewhere"),
        ] {
            let told = format!("{result:?}");
            assert_eq!(word(judge(Kind::Write, "a", result.clone())), write, "write: {told}");
            assert_eq!(word(judge(Kind::LeaderRead, "a", result)), read, "read: {told}");
        }
    }

    #[test]
    fn an_error_means_the_same_to_one_of_many() {
        for (status, body, write, read) in [
            (503, error("NO_LEADER", "not_applied"), "elsewhere", "elsewhere"),
            (503, error("NO_LEADER", "unknown"), "elsewhere", "elsewhere"),
            (504, error("TIMEOUT", "unknown"), "elsewhere", "elsewhere"),
            (500, error("STORAGE", "unknown"), "elsewhere", "elsewhere"),
            (400, error("BAD_REQUEST", "not_applied"), "fail", "fail"),
            (413, error("TOO_LARGE", "not_applied"), "fail", "fail"),
            (421, error("WRONG_CLUSTER", "not_applied"), "fail", "fail"),
            (501, error("NOT_IMPLEMENTED", "not_applied"), "fail", "fail"),
        ] {
            for reply in all_forms(status, &body) {
                let told = format!("{reply:?}");
                assert_eq!(word(judge(Kind::Write, "a", Ok(reply.clone()))), write, "{told}");
                assert_eq!(word(judge(Kind::LeaderRead, "a", Ok(reply))), read, "{told}");
            }
        }
    }

    #[test]
    fn a_batch_says_nothing_of_single_keys_but_by_its_results() {
        let absent = error("NOT_FOUND", "not_applied");
        let condition = error("CONDITION_FAILED", "not_applied");
        for (status, body) in
            [(404, &absent[..]), (412, &condition), (200, "{\"revision\":7}"), (204, "")]
        {
            let whole = || Ok(Reply::Whole(Arc::new(response(status, body))));
            assert_eq!(word(judge(Kind::Write, "a", whole())), "unknown", "{status}");
            assert_eq!(word(judge(Kind::AnyRead, "a", whole())), "fail", "{status}");
        }
        let failed = Failure {
            status: 412,
            current: Some(7),
            error: serde_json::from_str::<ErrorBody>(&condition).unwrap().error,
        };
        let reply = Reply::Item(OperationResult::Failed(Box::new(failed)));
        let verdict = judge(Kind::Write, "a", Ok(reply));
        assert!(
            matches!(verdict, Verdict::Fail(ClientError::ConditionFailed { current: Some(7) })),
            "{verdict:?}"
        );
    }
}
