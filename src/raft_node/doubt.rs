//! What a call must not forget on its way: that an earlier attempt may have arrived.
//!
//! A call is tried again after an attempt whose outcome nobody knows. The next answer may settle the
//! matter, or only say that *this* attempt did nothing: then the caller still has to be told that it may
//! have taken effect. A write's way can lead through several clusters, and its doubt goes along.

use http::StatusCode;

use crate::client_error::ClientError;
use crate::network::error::Outcome;

use super::call::Kind;

/// The status of what contradicts something that is so already, or is under way.
const CONFLICT: u16 = StatusCode::CONFLICT.as_u16();

#[derive(Debug)]
pub(crate) struct Doubt {
    kind: Kind,
    /// What became of the attempt.
    message: Option<String>,
}

impl Doubt {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, message: None }
    }

    /// An attempt may have arrived, and may take effect.
    pub(crate) fn raise(&mut self, message: &str) {
        if self.kind.outcome_when_in_doubt() == Outcome::Unknown {
            self.message = Some(message.to_owned());
        }
    }

    /// What the caller is told, when the last thing that was met is `error`.
    pub(crate) fn settle(self, error: ClientError) -> ClientError {
        match self.message {
            Some(message) if !is_last_word(self.kind, &error) => {
                // What speaks against the repeat may be the reason.
                let message = match &error {
                    ClientError::Server { .. } => format!("{message}; asked again: {error}"),
                    _ => message,
                };
                ClientError::AnswerLost { message }
            }
            _ => error,
        }
    }
}

/// Whether an error speaks of all attempts and not only of the last.
fn is_last_word(kind: Kind, error: &ClientError) -> bool {
    match error {
        // The answer to whichever attempt was carried out.
        ClientError::ConditionFailed { .. } => true,
        // Saying it twice changes nothing: what a node says about the second is true of the first. But what
        // the second contradicts may be what the first has begun.
        ClientError::Server { status, .. } if kind == Kind::Manage => *status != CONFLICT,
        other => other.outcome() == Outcome::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(status: u16, outcome: Outcome) -> ClientError {
        let (address, code) = ("a:1".to_owned(), "X".to_owned());
        ClientError::Server { address, status, code, message: "m".into(), outcome }
    }

    fn told(kind: Kind, error: ClientError) -> ClientError {
        let mut doubt = Doubt::new(kind);
        doubt.raise("lost");
        doubt.settle(error)
    }

    #[test]
    fn only_an_answer_to_all_attempts_ends_a_doubt() {
        let lost = ClientError::AnswerLost { message: "lost".into() };
        let unreachable = ClientError::Unreachable { tried: Vec::new() };
        let failed = ClientError::ConditionFailed { current: Some(1) };
        let wrong = ClientError::WrongCluster { address: "a:1".into(), owner: None, epoch: 1 };
        let contradicted = server(CONFLICT, Outcome::NotApplied);
        let both = format!("lost; asked again: {contradicted}");
        let lost_and_refused = ClientError::AnswerLost { message: both };
        for error in [unreachable.clone(), wrong] {
            assert_eq!(told(Kind::Write, error), lost);
        }
        assert_eq!(told(Kind::Write, contradicted.clone()), lost_and_refused);
        for error in [failed, server(CONFLICT, Outcome::Unknown)] {
            assert_eq!(told(Kind::Write, error.clone()), error);
        }
        let refused = server(400, Outcome::NotApplied);
        assert_eq!(told(Kind::Manage, refused.clone()), refused);
        assert_eq!(told(Kind::Manage, contradicted.clone()), lost_and_refused);
        assert_eq!(Doubt::new(Kind::Manage).settle(contradicted.clone()), contradicted);
        assert_eq!(told(Kind::Manage, unreachable.clone()), lost);
        assert_eq!(told(Kind::LeaderRead, unreachable.clone()), unreachable);
        assert_eq!(Doubt::new(Kind::Write).settle(unreachable.clone()), unreachable);
    }
}
