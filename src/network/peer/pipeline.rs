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
//! All state is in [`Pipeline`] and moves only when the stream is polled; nothing is spawned.
//!
//! A peer is connected to only once there is a request for it. That is more than thrift: openraft's
//! pause before it tries an unreachable peer again lies in its stream of requests, so a sender that
//! fails without having asked for one is called again at once, and again, as fast as a core can.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, FuturesOrdered};
use futures_util::{FutureExt, Stream, StreamExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until};

use super::closer::CloseReason;
use super::connection::{CallError, Connection};
use super::link::{ConnectError, Link};
use super::settings::PeerSettings;
use super::wire::{
    AppendRefusal, AppendReply, AppendRequest, EncodedAppend, EntryTooLarge, Method, encode_appends,
};
use crate::types::LogId;

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
        match link.connection().await {
            Ok(connection) => {
                let input = stream::iter([first]).chain(input);
                pipelined(connection, input, link.settings())
            }
            Err(error) => stream::iter([Err(error.into())]).boxed(),
        }
    };
    stream::once(start).flatten().boxed()
}

fn pipelined<'s, S>(connection: Arc<Connection>, input: S, settings: &PeerSettings) -> Replies<'s>
where
    S: Stream<Item = AppendRequest> + Send + Unpin + 's,
{
    let pipeline = Pipeline {
        session: connection.next_session(),
        connection,
        input: Some(input),
        parts: VecDeque::new(),
        last_sent: None,
        held: None,
        permit: None,
        in_flight: FuturesOrdered::new(),
        bytes_in_flight: 0,
        last_progress: Instant::now(),
        calls_max: settings.append_pipeline_max,
        bytes_max: settings.bytes_in_flight_max(),
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
    /// Permission to send one message.
    permit: Option<OwnedSemaphorePermit>,
    in_flight: FuturesOrdered<BoxFuture<'static, Answered>>,
    bytes_in_flight: usize,
    /// When the last reply came, or the first message was sent that waits for one.
    last_progress: Instant,
    calls_max: usize,
    bytes_max: usize,
    message_bytes_max: usize,
    reply_timeout: Duration,
}

struct Answered {
    answer: Result<AppendReply, CallError>,
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
                    self.held = self.held.take().map(|(request, _)| (request, Instant::now()));
                }
                Event::Requested(Some(request)) => {
                    // The newer one brings what a held one would have brought.
                    self.held = None;
                    if request.entries.is_empty() && self.last_sent == Some(request.prev_log_id) {
                        self.held = Some((request, Instant::now() + COMMIT_HOLD_MAX));
                    } else if let Err(error) = self.prepare(&request) {
                        return Some(Err(error.into()));
                    }
                }
                Event::HeldLongEnough => {
                    if let Some((request, _)) = self.held.take()
                        && let Err(error) = self.prepare(&request)
                    {
                        return Some(Err(error.into()));
                    }
                }
                Event::Idle => return Some(Err(self.time_out().into())),
                Event::Closed => {
                    let reason = self.connection.closer().reason();
                    return Some(Err(CallError::Closed(reason).into()));
                }
            }
        }
    }

    fn prepare(&mut self, request: &AppendRequest) -> Result<(), EntryTooLarge> {
        self.parts = encode_appends(self.session, request, self.message_bytes_max)?.into();
        Ok(())
    }

    /// What happens first. Replies go before all else, so that a slow consumer of this stream never
    /// mistakes its own pause for the peer's.
    async fn next_event(&mut self) -> Event {
        let room = self.in_flight.len() < self.calls_max && self.bytes_in_flight < self.bytes_max;
        let something_to_send =
            self.input.is_some() || !self.parts.is_empty() || self.held.is_some();
        let want_permit = self.permit.is_none() && room && something_to_send;
        let want_request = self.permit.is_some() && self.parts.is_empty() && self.input.is_some();
        let waiting = !self.in_flight.is_empty();
        let held_until = self.held.as_ref().map(|(_, until)| *until);
        let may_send_held = held_until.is_some() && self.permit.is_some() && self.parts.is_empty();
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
            () = sleep_until(held_until.unwrap_or(self.last_progress)), if may_send_held => {
                Event::HeldLongEnough
            }
            () = sleep_until(self.last_progress + self.reply_timeout), if waiting => Event::Idle,
            () = connection.closer().closed(), if !waiting => Event::Closed,
        }
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
        if self.in_flight.is_empty() {
            self.last_progress = Instant::now();
        }
        self.bytes_in_flight += bytes;
        self.last_sent = Some(last);
        let call = self.connection.start(Method::Append, message, permit);
        let answered =
            call.reply().map(move |answer| Answered { answer, prev, last, bytes, split });
        self.in_flight.push_back(answered.boxed());
    }

    /// Decides what a reply means; `None` when there is nothing to pass on.
    fn judge(&mut self, answered: Answered) -> Option<Result<Reply, PipelineError>> {
        let Answered { answer, prev, last, bytes, split } = answered;
        self.bytes_in_flight -= bytes;
        self.last_progress = Instant::now();
        let outcome = match answer {
            Ok(outcome) => outcome,
            Err(error) => return Some(Err(error.into())),
        };
        let possible = match &outcome {
            Ok(matched) => *matched <= last,
            Err(AppendRefusal::Conflict(at)) => Some(*at) == prev,
            Err(AppendRefusal::HigherVote(_)) => true,
        };
        if !possible {
            let reason = CloseReason::Protocol("a reply about entries that were not sent".into());
            self.connection.closer().close(reason.clone());
            return Some(Err(CallError::Closed(reason).into()));
        }
        let all_appended = outcome == Ok(last);
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

enum Event {
    Answered(Box<Answered>),
    Permitted(Result<OwnedSemaphorePermit, CallError>),
    /// `None` when the input has ended.
    Requested(Option<AppendRequest>),
    /// The held append has waited long enough.
    HeldLongEnough,
    /// No reply for too long.
    Idle,
    /// The connection ended while nothing was in flight.
    Closed,
}
