//! What waits for one node: a pure state machine, driven by the callers and carriers around it.
//!
//! A *carrier* is a task with one request in flight. As long as fewer than [`CARRIERS_MAX`] of them
//! are under way, whatever waits is taken at once; then operations gather until a carrier comes back,
//! and the busier the node, the fuller the requests. Nobody ever waits for company.
//!
//! Invariants: an operation is either waiting here, under its number, or a carrier has it; numbers
//! ascend in the order of arrival, also when a carrier puts back what did not fit; as long as
//! something waits there is a carrier, or the caller has been told to start one.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Carried, Undelivered};
use crate::batch::Operation;

/// How many requests of a queue are in flight at once. With one, node and client would wait for each
/// other; with many, the operations would be spread over small requests.
pub(super) const CARRIERS_MAX: usize = 4;

/// The most operations in a request: beyond some hundreds, the cost of a request is divided by
/// enough of them, while what one lost answer leaves in doubt keeps growing.
pub(super) const OPERATIONS_MAX: usize = 1024;

/// The most bytes of operations in a request. A larger operation travels alone, as a request of its
/// own: there is nothing to be won by sharing. Well below the body that a server takes unless
/// configured otherwise (8 MiB).
pub(super) const BYTES_MAX: usize = 1 << 20;

/// An operation and who waits for what becomes of it.
pub(super) struct Waiting {
    pub(super) operation: Arc<Operation>,
    pub(super) deadline: Instant,
    pub(super) reply: oneshot::Sender<Result<Carried, Undelivered>>,
}

/// An operation's place in the order of arrival.
pub(super) type Number = u64;

pub(super) struct Queue {
    waiting: BTreeMap<Number, Waiting>,
    next: Number,
    carriers: usize,
    /// A carrier has been started and has not taken anything yet.
    starting: bool,
    /// How many operations the carriers have.
    carried: usize,
    /// What fits into one request, as far as the node's answers have told.
    operations_max: usize,
    bytes_max: usize,
    /// When the node answered last, whatever it said.
    heard: Instant,
}

impl Queue {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            waiting: BTreeMap::new(),
            next: 0,
            carriers: 0,
            starting: false,
            carried: 0,
            operations_max: OPERATIONS_MAX,
            bytes_max: BYTES_MAX,
            heard: now,
        }
    }

    pub(super) fn push(&mut self, waiting: Waiting) -> Number {
        let number = self.next;
        self.next += 1;
        self.waiting.insert(number, waiting);
        number
    }

    /// Whether the caller has to start a carrier now. It counts as under way from here on.
    pub(super) fn must_start(&mut self) -> bool {
        // One that has not taken anything yet will take whatever is there by then.
        let must = !self.waiting.is_empty() && !self.starting && self.carriers < CARRIERS_MAX;
        if must {
            self.carriers += 1;
            self.starting = true;
        }
        must
    }

    /// A carrier that was started has begun to work, or will never do so.
    pub(super) fn started(&mut self) {
        self.starting = false;
    }

    /// A carrier is no more.
    pub(super) fn ended(&mut self) {
        self.carriers -= 1;
    }

    /// Refuses what waits when no carrier is left that would take it.
    pub(super) fn refuse_unless_carried(&mut self) {
        if self.carriers == 0 {
            let waiting = std::mem::take(&mut self.waiting);
            waiting.into_values().for_each(|waiting| waiting.refuse(Undelivered::NoTurn));
        }
    }

    /// Whether more than one caller is about: then a carrier that lets the others go first finds
    /// more to take.
    pub(super) fn is_busy(&self) -> bool {
        self.carried + self.waiting.len() > 1
    }

    /// Takes what the next request carries. Nothing when nothing waits whose time is not over.
    pub(super) fn take(&mut self, now: Instant) -> Vec<(Number, Waiting)> {
        let mut taken = Vec::with_capacity(self.waiting.len().min(self.operations_max));
        let mut bytes = 0;
        while let Some(first) = self.waiting.first_entry() {
            if first.get().deadline <= now || first.get().reply.is_closed() {
                // Its caller is about to see the same and to leave, or has left.
                first.remove().refuse(Undelivered::NoTurn);
                continue;
            }
            bytes += first.get().operation.encoded_len();
            if !taken.is_empty() && (bytes > self.bytes_max || taken.len() >= self.operations_max) {
                break;
            }
            taken.push(first.remove_entry());
        }
        self.carried += taken.len();
        taken
    }

    /// The node answered a request, or will not any more, that carried so many operations.
    pub(super) fn returned(&mut self, operations: usize, answered: Option<Instant>) {
        self.carried -= operations;
        if let Some(now) = answered {
            self.heard = now;
        }
    }

    /// A request with so many operations was answered for all of them.
    pub(super) fn all_fitted(&mut self, operations: usize) {
        if operations >= self.operations_max {
            self.operations_max = (operations * 2).min(OPERATIONS_MAX);
        }
    }

    /// The answer to a request had room for so many of its operations only. Smaller requests from
    /// now on, until all of their answers fit again.
    pub(super) fn answer_overflowed(&mut self, fitted: usize) {
        self.operations_max = fitted.clamp(1, OPERATIONS_MAX);
    }

    /// The node refused a request with so many bytes as too large. For good: its limit does not come
    /// back, and each try would cost a request.
    pub(super) fn request_overflowed(&mut self, bytes: usize) {
        self.bytes_max = self.bytes_max.min(bytes / 2);
    }

    /// Returns operations that the node did not look at to their old places.
    pub(super) fn put_back(&mut self, operations: impl IntoIterator<Item = (Number, Waiting)>) {
        self.waiting.extend(operations);
    }

    /// Takes an operation away for good. False when a carrier already has it.
    pub(super) fn withdraw(&mut self, number: Number) -> bool {
        self.waiting.remove(&number).is_some()
    }

    /// How many operations wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nothing waits and no carrier is under way.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.carriers == 0 && self.carried == 0 && !self.starting
    }

    /// When the node was last heard of.
    pub(super) fn heard(&self) -> Instant {
        self.heard
    }
}

impl Waiting {
    /// The caller may have gone, and then there is nobody to tell.
    pub(super) fn refuse(self, why: Undelivered) {
        let _ = self.reply.send(Err(why));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;

    type Answer = oneshot::Receiver<Result<Carried, Undelivered>>;

    fn waiting(value_bytes: usize, deadline: Instant) -> (Waiting, Answer) {
        let (reply, answer) = oneshot::channel();
        let (key, value) = (Bytes::from_static(b"k"), Bytes::from(vec![0; value_bytes]));
        let operation =
            Arc::new(Operation::Put { key, value, condition: Default::default(), seq: None });
        (Waiting { operation, deadline, reply }, answer)
    }

    /// A queue with so many operations, and their answers.
    fn queue_of(count: usize, value_bytes: usize) -> (Queue, Vec<Answer>) {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let push = |_| {
            let (waiting, answer) = waiting(value_bytes, now + Duration::from_secs(60));
            queue.push(waiting);
            answer
        };
        let answers = (0..count).map(push).collect();
        (queue, answers)
    }

    fn numbers(taken: &[(Number, Waiting)]) -> Vec<Number> {
        taken.iter().map(|(number, _)| *number).collect()
    }

    #[test]
    fn a_request_is_bounded_in_operations_and_bytes_and_keeps_the_order() {
        let (mut queue, _answers) = queue_of(OPERATIONS_MAX + 2, 0);
        assert_eq!(queue.take(Instant::now()).len(), OPERATIONS_MAX);
        let left = [OPERATIONS_MAX as u64, OPERATIONS_MAX as u64 + 1];
        assert_eq!(numbers(&queue.take(Instant::now())), left);
        assert!(queue.take(Instant::now()).is_empty());

        let (mut queue, _answers) = queue_of(5, BYTES_MAX / 2 - 20);
        let taken: Vec<_> = (0..3).map(|_| queue.take(Instant::now()).len()).collect();
        assert_eq!(taken, [2, 2, 1]);
    }

    #[test]
    fn one_carrier_is_started_at_a_time_and_no_more_than_the_bound() {
        let (mut queue, mut answers) = queue_of(1, 0);
        let deadline = Instant::now() + Duration::from_secs(60);
        for _ in 0..CARRIERS_MAX {
            assert!(queue.must_start());
            assert!(!queue.must_start(), "one is on its way");
            queue.started();
            assert_eq!(queue.take(Instant::now()).len(), 1);
            assert!(!queue.must_start(), "nothing waits");
            let (waiting, answer) = waiting(0, deadline);
            queue.push(waiting);
            answers.push(answer);
        }
        assert!(!queue.must_start(), "all are under way");
        queue.ended();
        assert!(queue.must_start());
    }

    #[test]
    fn what_is_withdrawn_or_over_is_not_sent() {
        let (mut queue, mut answers) = queue_of(4, 0);
        assert!(queue.withdraw(1));
        assert!(!queue.withdraw(1));
        answers.remove(2);
        let (late, mut too_late) = waiting(0, Instant::now());
        queue.push(late);
        assert_eq!(numbers(&queue.take(Instant::now())), [0, 3]);
        assert!(matches!(too_late.try_recv(), Ok(Err(Undelivered::NoTurn))));
        assert!(!queue.withdraw(3) && !queue.withdraw(4), "sent, or answered");
    }

    #[test]
    fn what_did_not_fit_goes_first_in_smaller_requests() {
        let (mut queue, _answers) = queue_of(10, 0);
        let mut taken = queue.take(Instant::now());
        queue.answer_overflowed(3);
        queue.returned(10, None);
        queue.put_back(taken.drain(3..));
        assert_eq!(numbers(&queue.take(Instant::now())), [3, 4, 5]);
        queue.all_fitted(3);
        assert_eq!(numbers(&queue.take(Instant::now())), [6, 7, 8, 9]);

        let (mut queue, _answers) = queue_of(8, 1000);
        let taken = queue.take(Instant::now());
        queue.request_overflowed(taken.iter().map(|(_, w)| w.operation.encoded_len()).sum());
        queue.put_back(taken);
        assert_eq!(numbers(&queue.take(Instant::now())), [0, 1, 2, 3]);
    }

    #[test]
    fn a_lone_operation_is_not_busy() {
        let (mut queue, _answers) = queue_of(1, 0);
        assert!(!queue.is_busy());
        queue.take(Instant::now());
        assert!(!queue.is_busy());
        let (second, _answer) = waiting(0, Instant::now());
        queue.push(second);
        assert!(queue.is_busy());
    }
}
