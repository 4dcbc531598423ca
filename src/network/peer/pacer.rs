//! When one follower's next entries go: its part in being thrifty ([`super::thrift`]), for as long as one
//! session of appends lasts.
//!
//! It knows what the follower was sent and when, what it owes an answer to, and whether what it answered
//! is committed; it tells its [`Seat`] what others have to know, and says until when the input is not to
//! be looked at. The [`pipeline`](super::pipeline) sends, waits and keeps the clock.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::thrift::Seat;
use crate::types::LogId;

/// How long a follower may owe an answer to entries, or a majority that has them leave them uncommitted,
/// before others are sent what they were not. More than an fsync and the way there and back usually take;
/// where it is not, far away or under much load, everyone is sent everything at once.
const OVERDUE_AFTER: Duration = Duration::from_millis(1);

/// Of one session.
pub(super) struct Pacer {
    /// Its place among the followers.
    seat: Seat,
    /// Until when the input is not looked at.
    paused_until: Option<Instant>,
    /// Whether what is sent next has waited already: then a commit index is not held back.
    has_waited: bool,
    /// When each message with entries was sent that is not answered.
    owed_since: VecDeque<Instant>,
    /// Whether the first of them has waited for too long, and the others know.
    overdue: bool,
    /// The commit index as of the last request.
    commit: Option<LogId>,
    /// The newest entry that the follower has answered, if it was not committed then, and when.
    answered: Option<(Option<LogId>, Instant)>,
    /// The oldest such entry that is not committed now.
    uncommitted: Option<(Option<LogId>, Instant)>,
}

/// What time brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PaceDue {
    /// The follower may be sent entries again.
    PauseOver,
    /// Another follower should be sent what this one does not answer.
    Overdue,
    /// All should be sent what this one has answered in vain.
    Uncommitted,
}

/// Why nothing is to wait any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hurry {
    /// The follower is asked for a read: nothing is to be held back from it.
    Asked,
    /// It may have become one that a majority needs.
    Moved,
}

/// What a message brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// Only a newer commit index.
    Commit,
    Entries,
    /// As many entries as a request may have: more are there already.
    EntriesOfFullRequest,
}

impl Pacer {
    pub(super) fn new(seat: Seat) -> Self {
        Self {
            seat,
            paused_until: None,
            has_waited: false,
            owed_since: VecDeque::new(),
            overdue: false,
            commit: None,
            answered: None,
            uncommitted: None,
        }
    }

    /// Whether the input is not to be looked at.
    pub(super) fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }

    /// Whether what is sent next waited for longer than a commit index is held back.
    pub(super) fn has_waited(&self) -> bool {
        self.has_waited
    }

    /// A request came out of the input, with this commit index.
    pub(super) fn requested(&mut self, commit: Option<LogId>) {
        self.commit = commit;
        let still = |(entry, _): &(Option<LogId>, Instant)| *entry > commit;
        self.uncommitted = self.uncommitted.filter(still).or(self.answered.filter(still));
    }

    /// A message was sent.
    pub(super) fn sent(&mut self, sent: Sent, now: Instant) {
        self.has_waited = false;
        if sent == Sent::Commit {
            return;
        }
        self.owed_since.push_back(now);
        let pause = self.seat.pause(now).filter(|_| sent == Sent::Entries);
        self.paused_until = pause.map(|pause| now + pause);
        if pause.is_some() {
            // While the input is not looked at, nothing is heard of the commit index either.
            (self.answered, self.uncommitted) = (None, None);
        }
    }

    /// The follower has everything up to `last`. `entries_sent_at`: when that was sent, if it brought
    /// entries; `listens`: the next request is looked at when it comes, unless there is a pause.
    pub(super) fn appended(
        &mut self,
        last: Option<LogId>,
        entries_sent_at: Option<Instant>,
        listens: bool,
        now: Instant,
    ) {
        if entries_sent_at.is_some() {
            self.owed_since.pop_front();
            let in_time = |since: &Instant| *since + OVERDUE_AFTER > now;
            self.overdue &= self.owed_since.front().is_some_and(|since| !in_time(since));
            let listens = listens && !self.is_paused();
            self.answered = Some((last, now)).filter(|_| listens && last > self.commit);
            self.uncommitted = self.uncommitted.or(self.answered);
        }
        self.seat.appended(last, entries_sent_at.map(|at| now - at), self.overdue);
    }

    /// What time brings next, and when.
    pub(super) fn next_due(&self) -> Option<(Instant, PaceDue)> {
        let owed = self.owed_since.front().filter(|_| !self.overdue);
        let due = [
            self.paused_until.map(|at| (at, PaceDue::PauseOver)),
            owed.map(|since| (*since + OVERDUE_AFTER, PaceDue::Overdue)),
            self.uncommitted.map(|(_, since)| (since + OVERDUE_AFTER, PaceDue::Uncommitted)),
        ];
        due.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// What was due at this time has come; see [`Self::next_due`].
    pub(super) fn passed(&mut self, due: PaceDue, now: Instant) {
        match due {
            PaceDue::PauseOver => {
                self.paused_until = None;
                self.has_waited = true;
            }
            PaceDue::Overdue => {
                self.overdue = true;
                self.seat.overdue(now);
            }
            PaceDue::Uncommitted => {
                if let Some((entry, _)) = self.uncommitted.take() {
                    self.seat.uncommitted(entry, now);
                }
            }
        }
    }

    /// Resolves when a pause is to end before its time, or a read wants what is held back. Cancel safe.
    pub(super) async fn hurry(&self) -> Hurry {
        tokio::select! {
            biased;
            () = self.seat.asked() => Hurry::Asked,
            () = self.seat.moved(), if self.is_paused() => Hurry::Moved,
        }
    }

    /// Ends the pause for this reason.
    pub(super) fn hurried(&mut self, hurry: Hurry) {
        self.paused_until = None;
        self.has_waited |= hurry == Hurry::Asked;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::thrift::Thrift;
    use super::*;
    use crate::types::LeaderId;

    #[test]
    fn what_is_owed_or_left_uncommitted_for_too_long_is_due_once() {
        let entry = |index| Some(LogId { leader_id: LeaderId { term: 1, node_id: 1 }, index });
        let ms = Duration::from_millis;
        let mut pacer = Pacer::new(Arc::new(Thrift::new(1, ms(4))).seat(2));
        let start = Instant::now();
        assert_eq!(pacer.next_due(), None);
        pacer.sent(Sent::Commit, start);
        assert_eq!(pacer.next_due(), None, "nothing is owed for a message without entries");
        pacer.sent(Sent::Entries, start);
        assert_eq!(pacer.next_due(), Some((start + OVERDUE_AFTER, PaceDue::Overdue)));
        pacer.passed(PaceDue::Overdue, start + ms(1));
        assert_eq!(pacer.next_due(), None);
        pacer.appended(entry(1), Some(start), true, start + ms(2));
        let uncommitted = Some((start + ms(2) + OVERDUE_AFTER, PaceDue::Uncommitted));
        assert_eq!(pacer.next_due(), uncommitted);
        pacer.passed(PaceDue::Uncommitted, start + ms(3));
        assert_eq!(pacer.next_due(), None);
        // What is committed soon enough is not due.
        pacer.sent(Sent::Entries, start + ms(4));
        pacer.appended(entry(2), Some(start + ms(4)), true, start + ms(4));
        pacer.requested(entry(2));
        assert_eq!(pacer.next_due(), None);
    }
}
