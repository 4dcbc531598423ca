//! The client's end of replication: many appends in flight, their replies in order.
//!
//! One run of appends is a session on a connection. The stream of replies ends with the first that is
//! not a plain "all appended": openraft then looks at what the peer has and starts another stream, which
//! is another session. What was in flight behind the refusal is answered "session ended" by the peer
//! and ignored here.
//!
//! An append that only brings a newer commit index is held back for a moment ([`COMMIT_HOLD_MAX`]) and
//! dropped when another append follows, which brings it too: under load it would cost a message, a turn
//! of the follower's Raft and a reply for every entry. A dropped append is not answered, because nobody
//! answered it; openraft settles it with the next answer. That would be unsound if read indexes came of
//! openraft's clock; they do not ([`crate::read_gate`]).
//!
//! A follower that no majority needs is sent entries once a pause ([`super::pacer`]): meanwhile its
//! input is not looked at, so that one request brings all that came.
//!
//! All state is in [`Pipeline`] and moves only when the stream is polled; nothing is spawned.
//!
//! A peer is connected to only once there is a request for it. That does more than save a connection: openraft's
//! pause before it tries an unreachable peer again lies in its stream of requests, so a sender that
//! fails without having asked for one is called again at once, and again, as fast as a core can.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, FuturesOrdered};
use futures_util::{FutureExt, Stream, StreamExt};
use openraft::LogIdOptionExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::closer::CloseReason;
use super::connection::{CallError, Connection};
use super::link::{ConnectError, Link};
use super::pacer::{Hurry, PaceDue, Pacer, Sent};
use super::votes::may_refuse;
use super::wire::{
    AppendRefusal, AppendReply, AppendRequest, EncodedAppend, EntryTooLarge, Method, encode_appends,
};
use crate::alarm::Alarm;
use crate::types::{LogId, NodeId, Vote};

/// How long an append that only brings a commit index waits for another one to take it along. A
/// follower of an idle leader learns of the last commit that much later. Longer than a write takes, so
/// that a client which writes one value after the other does not pay for it either.
const COMMIT_HOLD_MAX: Duration = Duration::from_millis(4);

/// Why a stream of appends ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::network) enum PipelineError {
    /// There is no connection.
    #[error("{0}")]
    Connect(#[from] ConnectError),
    /// The connection or the peer failed.
    #[error("{0}")]
    Call(#[from] CallError),
    /// An entry fits into no message: the limits of the nodes contradict each other.
    #[error("{0}")]
    TooLarge(#[from] EntryTooLarge),
}

/// The replies to appends, in the order of the requests.
type Replies<'s> = BoxStream<'s, Result<AppendReply, PipelineError>>;

/// Sends `input` to the peer of `link` and yields the replies in the order of the requests. Ends after
/// the first error, after a reply other than "all appended", or with `input`.
pub(in crate::network) fn append_stream<'s, S>(link: Arc<Link>, mut input: S) -> Replies<'s>
where
    S: Stream<Item = AppendRequest> + Send + Unpin + 's,
{
    let start = async move {
        let Some(first) = input.next().await else { return stream::empty().boxed() };
        let first_vote = first.vote;
        match link.connection().await {
            Ok(connection) => {
                let input = stream::iter([first]).chain(input);
                pipelined(connection, input, &link, first_vote)
            }
            Err(error) => stream::iter([Err(error.into())]).boxed(),
        }
    };
    stream::once(start).flatten().boxed()
}

fn pipelined<'s, S>(connection: Arc<Connection>, input: S, link: &Link, vote: Vote) -> Replies<'s>
where
    S: Stream<Item = AppendRequest> + Send + Unpin + 's,
{
    let settings = link.settings();
    let pipeline = Pipeline {
        own: link.own(),
        vote,
        session: connection.next_session(),
        connection,
        input: Some(input),
        parts: VecDeque::new(),
        last_sent: None,
        held: None,
        pacer: Pacer::new(link.seat()),
        permit: None,
        in_flight: FuturesOrdered::new(),
        bytes_in_flight: 0,
        last_progress: Instant::now(),
        alarm: Alarm::new(),
        calls_max: settings.append_pipeline_max,
        entries_max: settings.append_entries_max,
        // A full request is smaller than the bound by the entry that did not fit any more. Half of it is
        // full for certain, unless entries are larger than that.
        full_bytes: settings.append_bytes_max / 2,
        may_pause: true,
        bytes_max: settings.appends_in_flight_bytes_max(),
        message_bytes_max: settings.frame_bytes_max,
        reply_timeout: settings.reply_timeout,
    };
    let replies = stream::unfold(Some(pipeline), |pipeline| async {
        let mut pipeline = pipeline?;
        let reply = pipeline.next_reply().await?;
        let more = matches!(reply, Ok(Reply { ends: false, .. }));
        Some((reply.map(|reply| reply.outcome), more.then_some(pipeline)))
    });
    replies.boxed()
}

struct Pipeline<S> {
    own: NodeId,
    /// Of the newest request.
    vote: Vote,
    connection: Arc<Connection>,
    session: u64,
    /// `None` once it has ended.
    input: Option<S>,
    /// The messages of one request, if it had to be split, that are still to be sent.
    parts: VecDeque<EncodedAppend>,
    /// Where the log ended, for the peer, after the last message; `None` before the first.
    last_sent: Option<Option<LogId>>,
    /// An append that only brings a commit index, and until when it is held back.
    held: Option<(AppendRequest, Instant)>,
    pacer: Pacer,
    /// Permission to send one message.
    permit: Option<OwnedSemaphorePermit>,
    in_flight: FuturesOrdered<BoxFuture<'static, Answered>>,
    bytes_in_flight: usize,
    /// When the last reply came, or the first message was sent that waits for one.
    last_progress: Instant,
    alarm: Alarm,
    calls_max: usize,
    entries_max: u64,
    full_bytes: usize,
    /// Whether the request that is being sent is not a full one.
    may_pause: bool,
    bytes_max: usize,
    message_bytes_max: usize,
    reply_timeout: Duration,
}

struct Answered {
    answer: Result<AppendReply, CallError>,
    /// When it was sent, if it brought entries.
    entries_sent_at: Option<Instant>,
    prev: Option<LogId>,
    last: Option<LogId>,
    bytes: usize,
    /// Whether more messages of the same request follow; then a plain success is not passed on.
    split: bool,
}

struct Reply {
    outcome: AppendReply,
    /// Whether the stream ends with it.
    ends: bool,
}

impl<S: Stream<Item = AppendRequest> + Send + Unpin> Pipeline<S> {
    /// The next reply to pass on; `None` when all input is answered.
    async fn next_reply(&mut self) -> Option<Result<Reply, PipelineError>> {
        loop {
            self.send_part();
            let nothing_to_send = self.input.is_none() && self.parts.is_empty();
            if nothing_to_send && self.held.is_none() && self.in_flight.is_empty() {
                return None;
            }
            match self.next_event().await {
                Event::Answered(answered) => match self.judge(*answered) {
                    Some(reply) => return Some(reply),
                    None => continue,
                },
                Event::Permitted(Ok(permit)) => self.permit = Some(permit),
                Event::Permitted(Err(error)) => return Some(Err(error.into())),
                Event::Requested(None) => {
                    self.input = None;
                    self.release_held();
                }
                Event::Requested(Some(request)) => {
                    self.pacer.requested(request.leader_commit);
                    // The newer one brings what a held one would have brought.
                    self.held = None;
                    let only_commit =
                        request.entries.is_empty() && self.last_sent == Some(request.prev_log_id);
                    if only_commit && !self.pacer.has_waited() {
                        self.held = Some((request, Instant::now() + COMMIT_HOLD_MAX));
                    } else if let Err(error) = self.prepare(&request) {
                        return Some(Err(error.into()));
                    }
                }
                Event::Due(Due::HeldLongEnough) => {
                    if let Some((request, _)) = self.held.take()
                        && let Err(error) = self.prepare(&request)
                    {
                        return Some(Err(error.into()));
                    }
                }
                Event::Due(Due::Pace(due)) => self.pacer.passed(due, Instant::now()),
                Event::Hurried(hurry) => {
                    self.pacer.hurried(hurry);
                    if hurry == Hurry::Asked {
                        self.release_held();
                    }
                }
                Event::Due(Due::Idle) => return Some(Err(self.time_out().into())),
                Event::Closed => {
                    let reason = self.connection.closer().reason();
                    return Some(Err(CallError::Closed(reason).into()));
                }
            }
        }
    }

    /// What is held back goes now.
    fn release_held(&mut self) {
        self.held = self.held.take().map(|(request, _)| (request, Instant::now()));
    }

    fn prepare(&mut self, request: &AppendRequest) -> Result<(), EntryTooLarge> {
        self.vote = request.vote;
        self.parts = encode_appends(self.session, request, self.message_bytes_max)?.into();
        // Where more is to come than one request takes, there is nothing to wait for.
        let bytes: usize = self.parts.iter().map(|part| part.message.len()).sum();
        let full = request.entries.len() as u64 >= self.entries_max || bytes >= self.full_bytes;
        self.may_pause = !full;
        Ok(())
    }

    /// What happens first. Replies go before all else, so that a slow consumer of this stream never
    /// mistakes its own pause for the peer's.
    async fn next_event(&mut self) -> Event {
        let room = self.in_flight.len() < self.calls_max && self.bytes_in_flight < self.bytes_max;
        let something_to_send =
            self.input.is_some() || !self.parts.is_empty() || self.held.is_some();
        let want_permit = self.permit.is_none() && room && something_to_send;
        let may_send = self.permit.is_some() && self.parts.is_empty();
        let want_request = may_send && self.input.is_some() && !self.pacer.is_paused();
        let waiting = !self.in_flight.is_empty();
        let holds_back = self.pacer.is_paused() || (may_send && self.held.is_some());
        let due = self.next_due(may_send);
        let connection = Arc::clone(&self.connection);
        let next_request = async {
            match &mut self.input {
                Some(input) => input.next().await,
                None => None,
            }
        };
        tokio::select! {
            biased;
            Some(answered) = self.in_flight.next(), if waiting => Event::Answered(Box::new(answered)),
            permit = connection.permit(), if want_permit => Event::Permitted(permit),
            request = next_request, if want_request => Event::Requested(request),
            event = pass(&mut self.alarm, due) => event,
            hurry = self.pacer.hurry(), if holds_back => Event::Hurried(hurry),
            () = connection.closer().closed(), if !waiting => Event::Closed,
        }
    }

    /// What time brings next, and when.
    fn next_due(&self, may_send: bool) -> Option<(Instant, Due)> {
        let held = self.held.as_ref().filter(|_| may_send).map(|(_, until)| *until);
        let idle = (!self.in_flight.is_empty()).then(|| self.last_progress + self.reply_timeout);
        let due = [
            held.map(|at| (at, Due::HeldLongEnough)),
            self.pacer.next_due().map(|(at, due)| (at, Due::Pace(due))),
            idle.map(|at| (at, Due::Idle)),
        ];
        due.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Sends the next message if there is one and it may be sent.
    fn send_part(&mut self) {
        if self.parts.is_empty() {
            return;
        }
        let Some(permit) = self.permit.take() else { return };
        let Some(part) = self.parts.pop_front() else { return };
        let EncodedAppend { message, prev, last } = part;
        let (bytes, split) = (message.len(), !self.parts.is_empty());
        let now = Instant::now();
        if self.in_flight.is_empty() {
            self.last_progress = now;
        }
        self.bytes_in_flight += bytes;
        self.last_sent = Some(last);
        let entries_sent_at = (last > prev).then_some(now);
        let sent = match entries_sent_at {
            None => Sent::Commit,
            Some(_) if self.may_pause => Sent::Entries,
            Some(_) => Sent::EntriesOfFullRequest,
        };
        self.pacer.sent(sent, now);
        let call = self.connection.start(Method::Append, message, permit);
        let answered = call.reply().map(move |answer| Answered {
            answer,
            entries_sent_at,
            prev,
            last,
            bytes,
            split,
        });
        self.in_flight.push_back(answered.boxed());
    }

    /// Decides what a reply means; `None` when there is nothing to pass on.
    fn judge(&mut self, answered: Answered) -> Option<Result<Reply, PipelineError>> {
        let Answered { answer, entries_sent_at, prev, last, bytes, split } = answered;
        self.bytes_in_flight -= bytes;
        let now = Instant::now();
        self.last_progress = now;
        let outcome = match answer {
            Ok(outcome) => outcome,
            Err(error) => return Some(Err(error.into())),
        };
        let possible = match &outcome {
            Ok(matched) => may_match(*matched, prev, last),
            Err(AppendRefusal::Conflict(at)) => Some(*at) == prev,
            Err(AppendRefusal::HigherVote(vote)) => may_refuse(vote, self.own, &self.vote),
        };
        if !possible {
            let what =
                "a reply about entries that were not sent, or a vote that no election leads to";
            let reason = CloseReason::Protocol(what.into());
            self.connection.closer().close(reason.clone());
            return Some(Err(CallError::Closed(reason).into()));
        }
        let all_appended = outcome == Ok(last);
        if all_appended {
            let listens = self.parts.is_empty() && self.input.is_some();
            self.pacer.appended(last, entries_sent_at, listens, now);
        }
        if all_appended && split {
            return None;
        }
        Some(Ok(Reply { outcome, ends: !all_appended }))
    }

    fn time_out(&self) -> CallError {
        self.connection.closer().close(CloseReason::Timeout);
        CallError::Timeout(self.reply_timeout)
    }
}

/// Whether a follower's log can agree with the leader's up to there, after a message with the entries behind `prev` up
/// to `last`. By id and by index: one of an older leader may have any index and still be the lesser id.
fn may_match(matched: Option<LogId>, prev: Option<LogId>, last: Option<LogId>) -> bool {
    let indexes = prev.index()..=last.index();
    (prev..=last).contains(&matched) && indexes.contains(&matched.index())
}

enum Event {
    Answered(Box<Answered>),
    Permitted(Result<OwnedSemaphorePermit, CallError>),
    /// `None` when the input has ended.
    Requested(Option<AppendRequest>),
    /// Its time has come.
    Due(Due),
    /// There is nothing to be paused for any longer, or to be held back.
    Hurried(Hurry),
    /// The connection ended while nothing was in flight.
    Closed,
}

#[derive(Debug, Clone, Copy)]
enum Due {
    /// The held append has waited long enough.
    HeldLongEnough,
    /// The follower's pace is to change, or others'.
    Pace(PaceDue),
    /// No reply for too long.
    Idle,
}

/// Waits for what is due next, if anything is.
async fn pass(alarm: &mut Alarm, due: Option<(Instant, Due)>) -> Event {
    let Some((at, due)) = due else { return std::future::pending().await };
    alarm.until(at).await;
    Event::Due(due)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LeaderId;

    #[test]
    fn a_follower_matches_what_was_sent_or_a_part_of_it() {
        let id = |term, index| Some(LogId { leader_id: LeaderId { term, node_id: 1 }, index });
        let (prev, last) = (id(3, 5), id(5, 9));
        for possible in [prev, id(3, 6), id(5, 7), last] {
            assert!(may_match(possible, prev, last), "{possible:?}");
        }
        let impossible =
            [None, id(3, 4), id(2, 7), id(3, u64::MAX), id(4, 10), id(5, 10), id(6, 9)];
        for impossible in impossible {
            assert!(!may_match(impossible, prev, last), "{impossible:?}");
        }
        assert!(may_match(None, None, last) && may_match(prev, prev, prev));
        assert!(may_match(None, None, None) && !may_match(id(1, 0), None, None));
    }
}
