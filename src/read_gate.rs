//! ReadIndex rounds, shared by all reads that wait for one.
//!
//! A linearizable read must learn, after it arrived, that this node still led, and must see everything
//! that had been acknowledged by then (Raft dissertation, 6.4). One round does that for every read that
//! arrived before it began; reads that come while a round is under way wait for the next.
//!
//! A round asks the other voters whether they have promised their vote to anyone later than this
//! leader. When a majority, of each half of a joint membership, has not, the state as this node has
//! applied it is what the reads may see:
//!
//! - A later leader needs the votes of a majority, and one of them is a voter that confirmed. It had
//!   promised nothing when it did ([`Promise`]), so the later leader was elected, and acknowledged its
//!   first write, after the reads arrived.
//! - What earlier leaders acknowledged lies in this leader's log before the first entry of its own. A
//!   round waits until an entry of this leader is applied here.
//! - What this leader acknowledged itself, it had applied here before.
//!
//! No more voters are asked than a majority takes, unless they do not answer at once; but all of them now and
//! then, to see who is quickest. Any voters will do, so those are asked that have been quickest of late. A wrong
//! guess costs a millisecond.
//!
//! **Leases** (`raft.read_lease_ms`, off unless set). A round may also ask the voters not to help a later leader for
//! some milliseconds ([`Promise::confirm`]). Counted from before the round, nine tenths of that are this leader's
//! own: reads that arrive meanwhile look at once, and nobody is asked. The tenth is for clocks of different pace; one
//! that stops, with its machine, could make an old leader answer with the past, which a round never does. A lease is
//! asked for only where the membership is uniform and the newest in this node's log, and ends when that changes
//! or this node votes for another. It is given anew by the first round after its end, as long as Raft's core goes on:
//! rounds need none of it, and one that stands still must be succeeded, however many read meanwhile. (Raft
//! dissertation, 6.4.1, but with promises instead of election timeouts, which a restarted follower forgets.)
//!
//! The membership is the one that Raft reported last. It may be one change behind, never two: a change
//! is committed, which takes more than one of the reports, before the next one begins; and a majority
//! of either of two neighbouring memberships meets every majority of the joint one between them.
//!
//! openraft's own read index is not used, for two reasons. Here neither end's Raft task has to take a
//! turn. And openraft judges by the time of sending of the last message that a reply covers: a message
//! without entries, sent while entries are in flight, counts as answered by the reply to the entries,
//! which the follower may have sent before the read arrived.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use openraft::Instant as _;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{Fatal, ForwardToLeader};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::alarm::Alarm;
use crate::core_end;
use crate::network::raft_network_impl::PeerNetwork;
use crate::node::Raft;
use crate::store::{Promise, StateReader};
use crate::types::{LeaderId, LogId, NodeAddrs, NodeId, StoredMembership, TypeConfig};

/// Why there is no read index.
#[derive(Debug, Clone)]
pub enum ReadIndexFailure {
    /// This node does not lead, and says who does if it knows.
    NotLeader(ForwardToLeader<TypeConfig>),
    /// It leads as far as it knows, but no majority has confirmed it, or it has only begun to lead.
    NoQuorum,
    /// Its Raft has stopped.
    Fatal(Fatal<TypeConfig>),
}

/// How long the voters that a majority needs may take before all others are asked, too. Several round trips of
/// a local network: asking them costs little, and waiting for one that is gone would hold up every read.
const PATIENCE: Duration = Duration::from_millis(1);

/// Every so many rounds everyone is asked, and who answers first is asked first from then on. Rare enough to
/// cost next to nothing, and under load a few times a second at least.
const SURVEY_ROUNDS: u64 = 64;

/// How much of a lease a leader takes for its own. The rest is for clocks that differ in pace: far more than they do.
const LEASE_OWN_TENTHS: u32 = 9;

type Waiter = oneshot::Sender<Result<LogId, ReadIndexFailure>>;

/// The most reads that one round vouches for; the queue is as long. More wait in their callers, whose
/// number the app bounds.
const ROUND_READS_MAX: usize = 4096;

/// Between a failed round and the next one. Far below an election, so that a read which waits for one
/// loses nothing, and enough to keep retries from using up a core.
const FAILED_ROUND_PAUSE: Duration = Duration::from_millis(2);

/// How long a round waits for a new leader's first entry to be applied, and how often it looks.
const FIRST_ENTRY_WAIT_MAX: Duration = Duration::from_millis(500);
const FIRST_ENTRY_LOOK: Duration = Duration::from_millis(1);

/// Hands out read indexes. Cloning shares the rounds; the task ends when the last clone goes.
#[derive(Clone)]
pub struct ReadGate {
    queue: mpsc::Sender<Waiter>,
    lease: Duration,
    own: Promise,
    reader: StateReader,
    peers: PeerNetwork,
}

impl ReadGate {
    /// Starts the task that runs the rounds. It ends once all clones are dropped and the last round is
    /// over; join the handle then.
    /// With a `lease`, a leader asks for one in each round.
    pub fn spawn(
        raft: Raft,
        reader: StateReader,
        voters: Voters,
        lease: Duration,
    ) -> (Self, JoinHandle<()>) {
        let (queue, waiting) = mpsc::channel(ROUND_READS_MAX);
        let (own, peers) = (voters.own.clone(), voters.peers.clone());
        let gate = Self { queue, lease, own: own.clone(), reader: reader.clone(), peers };
        let rounds = Rounds { raft, reader, own, lease, poll: Poll::new(voters) };
        (gate, tokio::spawn(rounds.run(waiting)))
    }

    /// An entry that this node has applied. What it has applied holds everything that was acknowledged
    /// before this call: on this node, a linearizable read may look at once; on another, after that one
    /// has applied the entry.
    ///
    /// Cancel safe. `None` when the node stops or the deadline passes.
    pub async fn read_index(&self, deadline: Instant) -> Option<Result<LogId, ReadIndexFailure>> {
        if let Some(applied) = self.by_lease() {
            return Some(Ok(applied));
        }
        let (sender, receiver) = oneshot::channel();
        let answer = async {
            self.queue.send(sender).await.ok()?;
            receiver.await.ok()
        };
        tokio::time::timeout_at(deadline, answer).await.ok().flatten()
    }

    /// What this leader has applied, if it has a lease and an entry of its own is among it.
    fn by_lease(&self) -> Option<LogId> {
        if self.lease.is_zero() {
            return None;
        }
        let leader = self.own.leads_alone()?;
        self.reader.last_applied().filter(|applied| applied.leader_id == leader)
    }

    /// [`Self::read_index`] for a follower, which is sent at once what it has to apply for it.
    pub async fn read_index_for(
        &self,
        follower: NodeId,
        deadline: Instant,
    ) -> Option<Result<LogId, ReadIndexFailure>> {
        let index = self.read_index(deadline).await?;
        self.peers.hurry(follower);
        Some(index)
    }
}

/// The task of a gate.
struct Rounds {
    raft: Raft,
    reader: StateReader,
    own: Promise,
    lease: Duration,
    poll: Poll<Voters>,
}

/// A leader as its Raft reported it.
struct Lead {
    leader: LeaderId,
    membership: Arc<StoredMembership>,
    /// For how long no majority has answered anything that was sent, as far as the core has reported.
    unanswered: Option<Duration>,
}

impl Rounds {
    async fn run(mut self, mut waiting: mpsc::Receiver<Waiter>) {
        let mut round = Vec::new();
        while waiting.recv_many(&mut round, ROUND_READS_MAX).await > 0 {
            // Whoever gave up meanwhile needs no round.
            round.retain(|waiter| !waiter.is_closed());
            if round.is_empty() {
                continue;
            }
            let answer = self.round().await;
            let failed = answer.is_err();
            for waiter in round.drain(..) {
                // Whoever gave up since needs no answer either.
                let _ = waiter.send(answer.clone());
            }
            if failed {
                // A node that cannot lead fails at once: without a pause its callers' retries would spin.
                tokio::time::sleep(FAILED_ROUND_PAUSE).await;
            }
        }
    }

    async fn round(&mut self) -> Result<LogId, ReadIndexFailure> {
        let lead = self.lead()?;
        let (begun, lease) = (Instant::now(), self.lease_for(&lead));
        if !self.poll.confirmed(lead.leader, &lead.membership, lease).await {
            return Err(ReadIndexFailure::NoQuorum);
        }
        if !lease.is_zero() {
            let membership = lead.membership.log_id().as_ref();
            self.own.hold(lead.leader, membership, begun + own_part(lease));
        }
        let give_up = Instant::now() + FIRST_ENTRY_WAIT_MAX;
        loop {
            if let Some(applied) = self.reader.last_applied()
                && applied.leader_id == lead.leader
            {
                return Ok(applied);
            }
            if Instant::now() >= give_up {
                return Err(ReadIndexFailure::NoQuorum);
            }
            tokio::time::sleep(FIRST_ENTRY_LOOK).await;
        }
    }

    /// What to ask of the voters. None while the membership changes: its majorities do. None of a leader that has
    /// only begun to lead: those who have not heard of it would refuse to confirm it at all. And none of one whose
    /// core stands still: nobody could take its place as long as somebody reads.
    fn lease_for(&self, lead: &Lead) -> Duration {
        let applied = self.reader.last_applied();
        let is_followed = applied.is_some_and(|applied| applied.leader_id == lead.leader);
        let configs = lead.membership.membership().get_joint_config();
        let is_uniform = configs.len() == 1;
        let is_newest = self.own.is_newest_membership(lead.membership.log_id().as_ref());
        // Followers wait for longer than that before one of them stands: by then the last lease is over.
        let silence_max = Duration::from_millis(self.raft.config().election_timeout_min);
        let is_heard = lead.unanswered.is_some_and(|unanswered| unanswered < silence_max);
        let is_alone = configs.iter().all(|voters| voters.len() == 1);
        let may_have_one = is_followed && is_uniform && is_newest && (is_heard || is_alone);
        if may_have_one { self.lease } else { Duration::ZERO }
    }

    fn lead(&self) -> Result<Lead, ReadIndexFailure> {
        if let Some(fatal) = core_end::failure(&self.raft) {
            return Err(ReadIndexFailure::Fatal(fatal));
        }
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.vote.leader_id;
        let leads = metrics.state == openraft::ServerState::Leader && leader.node_id == metrics.id;
        if leads {
            let unanswered = metrics.last_quorum_acked.map(|sent| sent.elapsed());
            return Ok(Lead { leader, membership: metrics.membership_config.clone(), unanswered });
        }
        let forward = metrics.current_leader.and_then(|id| {
            let node = metrics.membership_config.membership().get_node(&id)?;
            Some(ForwardToLeader::new(id, node.clone()))
        });
        Err(ReadIndexFailure::NotLeader(forward.unwrap_or(ForwardToLeader::empty())))
    }
}

/// Whom a [`Poll`] asks.
trait Ask {
    /// Whether this node, now, has promised its vote to nobody later than `leader`.
    fn own(&self, leader: LeaderId) -> bool;

    /// The same of another voter, and that it keeps to it for as long as `lease`. Asks after the call.
    fn other(
        &self,
        voter: NodeId,
        addrs: &NodeAddrs,
        leader: LeaderId,
        lease: Duration,
    ) -> BoxFuture<'static, bool>;
}

/// The voters of a node's cluster: itself and its peers.
pub struct Voters {
    /// The node's own promise.
    pub own: Promise,
    /// The way to the others.
    pub peers: PeerNetwork,
}

impl Ask for Voters {
    fn own(&self, leader: LeaderId) -> bool {
        self.own.none_after(leader)
    }

    fn other(
        &self,
        voter: NodeId,
        addrs: &NodeAddrs,
        leader: LeaderId,
        lease: Duration,
    ) -> BoxFuture<'static, bool> {
        let (peers, addrs) = (self.peers.clone(), addrs.clone());
        Box::pin(async move { peers.confirm(voter, &addrs, leader, lease).await })
    }
}

/// Asks voters: as few as make a majority, and the others when those do not answer at once.
///
/// Each is asked one thing at a time: one that does not answer is asked nothing more until it does or its
/// connection is given up, so it costs one call, however many rounds pass.
struct Poll<A> {
    ask: A,
    round: u64,
    calls: FuturesUnordered<BoxFuture<'static, Reply>>,
    /// Who is being asked, since which round.
    asked: HashMap<NodeId, u64>,
    /// The other voters, in the order in which they are asked.
    order: Vec<NodeId>,
    alarm: Alarm,
}

struct Reply {
    voter: NodeId,
    confirms: bool,
}

impl<A: Ask> Poll<A> {
    fn new(ask: A) -> Self {
        let (calls, asked) = (FuturesUnordered::new(), HashMap::new());
        Self { ask, round: 0, calls, asked, order: Vec::new(), alarm: Alarm::new() }
    }

    /// Whether a majority of each configuration confirms, after this call, that it has promised its vote
    /// to nobody later than `leader`, and does not for as long as `lease`. Ends with the majority, or when no voter
    /// is left to hear from.
    async fn confirmed(
        &mut self,
        leader: LeaderId,
        membership: &StoredMembership,
        lease: Duration,
    ) -> bool {
        self.round += 1;
        if !self.ask.own(leader) {
            return false;
        }
        let configs = membership.membership().get_joint_config();
        self.keep_order_of(configs, leader.node_id);
        let mut confirmed = BTreeSet::from([leader.node_id]);
        let mut heard = BTreeSet::new();
        let survey = self.round.is_multiple_of(SURVEY_ROUNDS);
        // Of a joint membership everyone is asked: it does not last.
        let mut everyone = survey || configs.len() > 1;
        let patience = Instant::now() + PATIENCE;
        while let Some(missing) = missing(configs, &confirmed) {
            let at_once = if everyone { usize::MAX } else { missing };
            self.call(at_once, &heard, (leader, lease), membership);
            let reply = tokio::select! {
                biased;
                reply = self.calls.next() => reply,
                () = self.alarm.until(patience), if !everyone => {
                    everyone = true;
                    self.put_silent_last();
                    continue;
                }
            };
            let Some(Reply { voter, confirms }) = reply else { return false };
            // A reply to an earlier round says nothing about this one: ask again.
            if self.asked.remove(&voter) == Some(self.round) {
                heard.insert(voter);
                confirmed.extend(confirms.then_some(voter));
                if !confirms {
                    self.order.sort_by_key(|other| *other == voter);
                } else if survey && confirmed.len() == 2 {
                    self.order.sort_by_key(|other| *other != voter);
                }
            }
        }
        true
    }

    fn keep_order_of(&mut self, configs: &[BTreeSet<NodeId>], own: NodeId) {
        self.order.retain(|voter| configs.iter().any(|voters| voters.contains(voter)));
        for voter in configs.iter().flatten() {
            if *voter != own && !self.order.contains(voter) {
                self.order.push(*voter);
            }
        }
    }

    /// Asks voters that were not heard, until so many are being asked in this round.
    fn call(
        &mut self,
        at_once: usize,
        heard: &BTreeSet<NodeId>,
        (leader, lease): (LeaderId, Duration),
        membership: &StoredMembership,
    ) {
        let asked = self.asked.values().filter(|round| **round == self.round).count();
        let free = self.order.iter().filter(|voter| !heard.contains(voter));
        let free = free.filter(|voter| !self.asked.contains_key(voter)).copied();
        let next: Vec<NodeId> = free.take(at_once.saturating_sub(asked)).collect();
        for voter in next {
            let addrs = membership.membership().get_node(&voter).cloned().unwrap_or_default();
            let asking = self.ask.other(voter, &addrs, leader, lease);
            self.asked.insert(voter, self.round);
            self.calls.push(Box::pin(async move { Reply { voter, confirms: asking.await } }));
        }
    }

    /// Whoever is being asked comes after all others from now on.
    fn put_silent_last(&mut self) {
        self.order.sort_by_key(|voter| self.asked.contains_key(voter));
    }
}

/// How much of a lease that others give a leader takes for its own.
fn own_part(lease: Duration) -> Duration {
    lease * LEASE_OWN_TENTHS / 10
}

/// How many voters must confirm yet, at least; `None` when a majority of each configuration has.
fn missing(configs: &[BTreeSet<NodeId>], confirmed: &BTreeSet<NodeId>) -> Option<usize> {
    let missing = |voters: &BTreeSet<NodeId>| {
        (voters.len() / 2 + 1).saturating_sub(voters.intersection(confirmed).count())
    };
    configs.iter().map(missing).max().filter(|missing| *missing > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Membership;
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use tokio::time::timeout;

    /// Who was asked and has not answered yet, with the way to answer.
    type OpenCalls = Arc<Mutex<Vec<(NodeId, oneshot::Sender<bool>)>>>;

    /// Voters that answer as they are told; one without an order never answers.
    #[derive(Default)]
    struct Fake {
        own: bool,
        calls: OpenCalls,
        answers: HashMap<NodeId, bool>,
    }

    impl Ask for Fake {
        fn own(&self, _: LeaderId) -> bool {
            self.own
        }

        fn other(
            &self,
            voter: NodeId,
            _: &NodeAddrs,
            _: LeaderId,
            _: Duration,
        ) -> BoxFuture<'static, bool> {
            let (answer, answered) = oneshot::channel();
            match self.answers.get(&voter) {
                Some(confirms) => answer.send(*confirms).unwrap(),
                None => self.calls.lock().unwrap().push((voter, answer)),
            }
            Box::pin(async { answered.await.unwrap_or(false) })
        }
    }

    const LEADER: LeaderId = LeaderId { term: 5, node_id: 1 };
    const NO_LEASE: Duration = Duration::ZERO;

    /// The voters' clocks may run a tenth faster than the leader's.
    #[test]
    fn a_leader_takes_less_of_a_lease_than_it_was_given() {
        for ms in [1, 10, 100] {
            let given = Duration::from_millis(ms);
            assert!(own_part(given) * 11 / 10 < given && own_part(given) * 2 > given);
        }
    }

    const A_WHILE: Duration = Duration::from_millis(20);

    fn members(configs: &[&[NodeId]]) -> StoredMembership {
        let sets: Vec<BTreeSet<NodeId>> =
            configs.iter().map(|ids| ids.iter().copied().collect()).collect();
        let nodes: BTreeMap<_, _> =
            sets.iter().flatten().map(|id| (*id, NodeAddrs::default())).collect();
        StoredMembership::new(None, Membership::new(sets, nodes).unwrap())
    }

    fn poll(own: bool, answers: &[(NodeId, bool)]) -> Poll<Fake> {
        Poll::new(Fake { own, answers: answers.iter().copied().collect(), ..Fake::default() })
    }

    #[tokio::test]
    async fn a_majority_confirms_and_less_does_not() {
        let three = members(&[&[1, 2, 3]]);
        assert!(poll(true, &[]).confirmed(LEADER, &members(&[&[1]]), NO_LEASE).await);
        assert!(poll(true, &[(2, true)]).confirmed(LEADER, &three, NO_LEASE).await);
        assert!(poll(true, &[(2, false), (3, true)]).confirmed(LEADER, &three, NO_LEASE).await);
        assert!(!poll(true, &[(2, false), (3, false)]).confirmed(LEADER, &three, NO_LEASE).await);
        // A leader that has promised its own vote to another does not lead.
        assert!(!poll(false, &[(2, true), (3, true)]).confirmed(LEADER, &three, NO_LEASE).await);
    }

    #[tokio::test]
    async fn both_halves_of_a_joint_membership_must_confirm() {
        let joint = members(&[&[1, 2, 3], &[1, 4, 5]]);
        let old_only = [(2, true), (3, true), (4, false), (5, false)];
        assert!(!poll(true, &old_only).confirmed(LEADER, &joint, NO_LEASE).await);
        let both = [(2, true), (3, false), (4, false), (5, true)];
        assert!(poll(true, &both).confirmed(LEADER, &joint, NO_LEASE).await);
        // A leader that is no voter does not count.
        let without = members(&[&[2, 3, 4]]);
        let one = [(2, true), (3, false), (4, false)];
        assert!(!poll(true, &one).confirmed(LEADER, &without, NO_LEASE).await);
    }

    /// A silent one must not have been asked: nobody is, beyond those that a majority takes.
    #[tokio::test]
    async fn no_more_are_asked_than_a_majority_takes() {
        let five = members(&[&[1, 2, 3, 4, 5]]);
        let mut poll = poll(true, &[(2, true), (3, false), (4, true)]);
        assert!(poll.confirmed(LEADER, &five, NO_LEASE).await);
        assert!(poll.ask.calls.lock().unwrap().is_empty(), "5 was asked");
    }

    #[tokio::test]
    async fn one_that_does_not_answer_is_asked_last() {
        let three = members(&[&[1, 2, 3]]);
        let mut poll = poll(true, &[(3, true)]);
        assert!(
            poll.confirmed(LEADER, &three, NO_LEASE).await,
            "3 was asked when 2 had not answered"
        );
        let (voter, late) = poll.ask.calls.lock().unwrap().pop().unwrap();
        assert_eq!(voter, 2);
        late.send(true).unwrap();
        for _ in 0..SURVEY_ROUNDS / 2 {
            assert!(poll.confirmed(LEADER, &three, NO_LEASE).await);
        }
        assert!(poll.ask.calls.lock().unwrap().is_empty(), "2 was asked again");
    }

    #[tokio::test]
    async fn the_quickest_is_asked_first_after_a_survey() {
        let three = members(&[&[1, 2, 3]]);
        let mut poll = poll(true, &[(2, true)]);
        for _ in 1..SURVEY_ROUNDS {
            assert!(poll.confirmed(LEADER, &three, NO_LEASE).await);
        }
        assert!(poll.ask.calls.lock().unwrap().is_empty());
        poll.ask.answers = HashMap::from([(3, true)]);
        // Both are asked, and 3 answers.
        assert!(poll.confirmed(LEADER, &three, NO_LEASE).await);
        assert_eq!(poll.ask.calls.lock().unwrap().pop().unwrap().0, 2);
        assert!(poll.confirmed(LEADER, &three, NO_LEASE).await);
        assert!(poll.ask.calls.lock().unwrap().is_empty(), "2 was asked");
    }

    /// The heart of it: a reply that was on its way when a read arrived proves nothing to that read.
    #[tokio::test]
    async fn a_late_reply_does_not_count_for_the_next_round() {
        let three = members(&[&[1, 2, 3]]);
        let mut poll = poll(true, &[(3, false)]);
        let calls = poll.ask.calls.clone();
        assert!(timeout(A_WHILE, poll.confirmed(LEADER, &three, NO_LEASE)).await.is_err());
        // One that is silent is asked once, however many rounds pass.
        assert!(timeout(A_WHILE, poll.confirmed(LEADER, &three, NO_LEASE)).await.is_err());
        let (voter, late) = calls.lock().unwrap().pop().unwrap();
        assert!(voter == 2 && calls.lock().unwrap().is_empty());
        late.send(true).unwrap();
        assert!(
            timeout(A_WHILE, poll.confirmed(LEADER, &three, NO_LEASE)).await.is_err(),
            "a late reply"
        );
        let (voter, fresh) = calls.lock().unwrap().pop().expect("it is asked again");
        assert_eq!(voter, 2);
        fresh.send(true).unwrap();
    }
}
