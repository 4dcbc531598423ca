//! What is remembered of writes that happen at most once: the answers, for clients that ask again.
//!
//! A pure table, part of the state machine's state: it sees the writes in log order and a *log time*,
//! and nothing else, so it is the same on every replica, to the byte ([`encoding`]). Log time is the
//! highest clock that any entry has brought. It never goes back, and means nothing between replicas
//! but what the log says.
//!
//! Its rows are not those of the memtables: a second row for each write would cost as much as the
//! write. The table stands here in memory, whole, and goes to disk with every flush, encoded
//! ([`super::flush`]). With clients that tell their floor it holds little more than what is in flight.
//!
//! **Forgetting.** A client's floor only rises, and what lies below it is gone: such a write is never
//! carried out, because nobody knows any more whether it was. The floor rises
//! 1. as the client tells with each write;
//! 2. above an answer that is [`ANSWER_AGE_MAX_MS`] old;
//! 3. above the oldest answer, in log order, while there are more than [`ANSWERS_MAX`] of them or their
//!    keys take more than [`KEY_BYTES_MAX`].
//!
//! A client is forgotten, floor and all, only when there is no room for a new one and it has not
//! written for [`CLIENT_IDLE_MIN_MS`]; if there is no such client, the new one is refused. One of which
//! answers are pinned (see below) is passed over, and the next one goes.
//!
//! While keys are handed over to another cluster, whoever counts and logs what moves is told which of
//! their answers fall ([`Dedupe::take_fallen`]): the other cluster drops them, too, and gets to know the
//! floor. Only from the moment when what moves is frozen, and its number with it, answers are *pinned*:
//! where one would fall it stays, and its write is not carried out again ([`moving`]). Nothing is added
//! to them then, so there are no more than there were.
//!
//! All bounds are part of the format and not of the configuration: replicas that forgot differently
//! would carry out different writes.
//!
//! Invariants:
//! - an answer's sequence is not below its client's floor, unless it is pinned, and then it is;
//! - `order` lists the answers that are not pinned, by their position. That ascends in log order, and log
//!   time with it, so the first one is the oldest in both meanings. It may also list answers that have
//!   fallen, which are passed over: about as many as the others at most;
//! - `idle` lists every client once, under a time not later than that of its last write, but for those in
//!   `held`. Who is in there has pinned answers, and is listed again when it has none: so which client goes
//!   next is a matter of the last writes, and of what is pinned, and of nothing else that a replica that was
//!   restarted would not know.
//!
//! No step takes longer with more clients or answers, but for the depth of the trees: what falls is
//! taken from the front of `order`, each answer falls once, and is passed over once.

mod answers;
mod encoding;
mod moving;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use crate::once::{ClientName, OnceRef};
use crate::types::Written;
use crate::writes::{ActionRef, WriteRef};

use answers::Answers;
pub(super) use encoding::Decoder;
pub(super) use moving::{Fallen, Travelling, hash as answer_hash, key_of as answered_key, place};

/// How long an answer is kept at least, if there is room: far longer than any client of this store
/// tries (10 s unless set), and long enough for a person or a job that is started again.
pub(super) const ANSWER_AGE_MAX_MS: u64 = 15 * 60 * 1000;

/// How many answers there are at most. Of clients that tell their floor, this is ten seconds and more
/// of a fast cluster's writes, all unanswered; of others, the last minutes. About 60 MB of memory.
const ANSWERS_MAX: usize = 262_144;

/// How many bytes the keys of all answers take at most. Keys of up to 256 bytes reach
/// [`ANSWERS_MAX`] first; without this, keys of 4 KiB would take 1 GiB.
const KEY_BYTES_MAX: usize = 64 << 20;

/// How many clients are remembered. Each costs up to some hundred bytes, and there are as many as
/// processes that write within an hour, not as many as requests.
const CLIENTS_MAX: usize = 65_536;

/// How long a client must not have written before its floor may be forgotten. A write that it repeats
/// after that happens again: nobody waits an hour for an answer.
const CLIENT_IDLE_MIN_MS: u64 = 60 * 60 * 1000;

/// So many answers that have fallen may stand in `order`, above those that have not.
const FALLEN_MAX: usize = 1024;

/// The table's bounds, so that tests reach them with less.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    answers_max: usize,
    key_bytes_max: usize,
    clients_max: usize,
}

const BOUNDS: Bounds =
    Bounds { answers_max: ANSWERS_MAX, key_bytes_max: KEY_BYTES_MAX, clients_max: CLIENTS_MAX };

/// What the table says about a write before it is carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Carry it out, and [`Dedupe::record`] the answer.
    New,
    /// Do not: this is its answer.
    Answered(Written),
}

/// A write's kind, as far as a repeat must have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Put,
    Delete,
}

impl Kind {
    fn of(write: &WriteRef<'_>) -> Self {
        match write.action {
            ActionRef::Put(_) => Self::Put,
            ActionRef::Delete => Self::Delete,
        }
    }
}

/// Which keys are meant.
pub(super) type Moves<'a> = &'a dyn Fn(&[u8]) -> bool;

/// What becomes of an answer that falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fall {
    /// It is gone.
    Gone,
    /// It is gone, and somebody is to be told ([`Dedupe::take_fallen`]).
    Told,
    /// It stays.
    Pinned,
}

/// The same by the key that an answer is about.
pub(super) type Falls<'a> = &'a dyn Fn(&[u8]) -> Fall;

/// The table. See the module.
#[derive(Debug)]
pub(super) struct Dedupe {
    log_time_ms: u64,
    clients: BTreeMap<ClientName, Client>,
    /// Whose answers came in which order.
    order: VecDeque<Placed>,
    /// How many answers in `order` have not fallen.
    live: usize,
    /// The position of the next answer.
    next_position: u64,
    /// Bytes of the keys of the live answers in `order`.
    key_bytes: usize,
    /// Answers that would have fallen.
    pinned: BTreeSet<(ClientName, u64)>,
    /// Answers that fell and of which somebody is still to be told. Empty between two entries.
    fallen: Vec<Fallen>,
    /// Clients by the log time of a write of theirs, at or before the last one's: so that those that
    /// have been idle for long are at the front, without a change for each write.
    idle: BTreeSet<(u64, ClientName)>,
    /// Clients that it was the turn of, and that have pinned answers.
    held: BTreeSet<ClientName>,
    bounds: Bounds,
}

#[derive(Debug, Default)]
struct Client {
    floor: u64,
    /// The log time of its last write.
    last_ms: u64,
    answers: Answers,
}

/// A client with its name as it is shared by all who keep it.
fn known_client<'a>(
    clients: &'a mut BTreeMap<ClientName, Client>,
    name: &str,
) -> Option<(&'a ClientName, &'a mut Client)> {
    clients.range_mut::<str, _>((Bound::Included(name), Bound::Included(name))).next()
}

/// Where an answer stands in log order.
#[derive(Debug)]
struct Placed {
    position: u64,
    at_ms: u64,
    client: ClientName,
    seq: u64,
}

#[derive(Debug)]
struct Answer {
    key: Box<[u8]>,
    kind: Kind,
    /// A put, a delete or a failed condition: what says that the write was looked at.
    written: Written,
    /// The log time when it was given.
    at_ms: u64,
    position: u64,
}

impl Default for Dedupe {
    fn default() -> Self {
        Self::with_bounds(BOUNDS)
    }
}

impl Dedupe {
    fn with_bounds(bounds: Bounds) -> Self {
        Self {
            log_time_ms: 0,
            clients: BTreeMap::new(),
            order: VecDeque::new(),
            live: 0,
            next_position: 0,
            key_bytes: 0,
            pinned: BTreeSet::new(),
            fallen: Vec::new(),
            idle: BTreeSet::new(),
            held: BTreeSet::new(),
            bounds,
        }
    }

    /// An entry brought this clock: forgets what is too old by now.
    pub(super) fn advance(&mut self, at_ms: u64, falls: Falls<'_>) {
        self.log_time_ms = self.log_time_ms.max(at_ms);
        let now = self.log_time_ms;
        let is_old = |oldest: &mut Placed| now - oldest.at_ms >= ANSWER_AGE_MAX_MS;
        while let Some(oldest) = self.order.pop_front_if(is_old) {
            self.forget(&oldest, falls);
        }
    }

    /// What to do with a write that its key's owner is about to carry out. Takes over the floor that
    /// it tells.
    pub(super) fn check(
        &mut self,
        once: &OnceRef<'_>,
        write: &WriteRef<'_>,
        falls: Falls<'_>,
    ) -> Verdict {
        let floor = self.clients.get(once.client()).map(|client| client.floor);
        if floor.is_none() && !self.admit(once.client()) {
            return Verdict::Answered(Written::TooManyClients);
        }
        if floor < Some(once.floor()) {
            self.raise_floor(once.client(), once.floor(), falls);
        }
        let now = self.log_time_ms;
        let client = self.clients.get_mut(once.client()).expect("it was admitted");
        client.last_ms = now;
        if once.seq() < client.floor {
            return Verdict::Answered(Written::OnceForgotten);
        }
        match client.answers.get(once.seq()) {
            None => Verdict::New,
            Some(answer) if *answer.key != *write.key || answer.kind != Kind::of(write) => {
                Verdict::Answered(Written::OnceReused)
            }
            Some(answer) => Verdict::Answered(answer.written.clone()),
        }
    }

    /// Remembers the answer to a write that was [`Verdict::New`]: what it wrote or deleted, or that
    /// its condition failed.
    pub(super) fn record(
        &mut self,
        once: &OnceRef<'_>,
        write: &WriteRef<'_>,
        written: &Written,
        falls: Falls<'_>,
    ) {
        let position = self.next_position;
        self.next_position += 1;
        let (key, kind, at_ms) = (write.key.into(), Kind::of(write), self.log_time_ms);
        let answer = Answer { key, kind, written: written.clone(), at_ms, position };
        self.insert(once.client(), once.seq(), answer);
        self.forget_surplus(falls);
        self.tidy();
    }

    fn forget_surplus(&mut self, falls: Falls<'_>) {
        while self.live > self.bounds.answers_max || self.key_bytes > self.bounds.key_bytes_max {
            let oldest = self.order.pop_front().expect("live answers stand in order");
            self.forget(&oldest, falls);
        }
    }

    /// The keys of all answers.
    pub(super) fn keys(&self) -> impl Iterator<Item = &[u8]> {
        self.clients.values().flat_map(|client| client.answers.iter().map(|(_, a)| &*a.key))
    }

    fn insert(&mut self, name: &str, seq: u64, answer: Answer) {
        let (name, client) = known_client(&mut self.clients, name)
            .expect("answers are for clients that were checked");
        self.key_bytes += answer.key.len();
        self.live += 1;
        let Answer { position, at_ms, .. } = answer;
        self.order.push_back(Placed { position, at_ms, client: name.clone(), seq });
        let replaced = client.answers.insert(seq, answer);
        assert!(replaced.is_none(), "the write {name}/{seq} was carried out twice");
    }

    /// Makes room for a new client and takes it in; false when there is none.
    fn admit(&mut self, name: &str) -> bool {
        // Handovers bring clients beyond the bound: two go for each that comes, until they are gone.
        if self.is_full() {
            if !self.forget_idle_client() {
                return false;
            }
            if self.is_full() {
                self.forget_idle_client();
            }
        }
        let name: ClientName = name.parse().expect("a write names its client by a name");
        self.add(name, self.log_time_ms);
        true
    }

    fn is_full(&self) -> bool {
        self.clients.len() >= self.bounds.clients_max
    }

    /// A new client that wrote last then.
    fn add(&mut self, name: ClientName, last_ms: u64) {
        self.clients.insert(name.clone(), Client { last_ms, ..Client::default() });
        self.idle.insert((last_ms, name));
    }

    /// Forgets the client that has not written for the longest time, of those that have no pinned answers, if
    /// it is long enough.
    fn forget_idle_client(&mut self) -> bool {
        loop {
            let Some((listed_ms, _)) = self.idle.first() else { return false };
            // Whoever is listed later wrote later.
            if self.log_time_ms - listed_ms < CLIENT_IDLE_MIN_MS {
                return false;
            }
            let (listed_ms, name) = self.idle.pop_first().expect("it was just looked at");
            let client = self.clients.get(&name).expect("only clients are listed");
            if client.last_ms == listed_ms {
                // Its answers are gone already, being older still, unless they are pinned. That lasts for as
                // long as another cluster is away, and is not to keep out those who come meanwhile.
                if !client.answers.is_empty() {
                    self.held.insert(name);
                    continue;
                }
                self.clients.remove(&name);
                return true;
            }
            // It wrote since it was listed: that write pays for this.
            self.idle.insert((client.last_ms, name));
        }
    }

    /// Lists the clients again that were passed over and have no pinned answers any more.
    fn list_released(&mut self) {
        let Self { clients, pinned, held, idle, .. } = self;
        held.retain(|name| {
            let mut own = pinned.range((name.clone(), 0)..=(name.clone(), u64::MAX));
            let is_held = own.next().is_some();
            if !is_held {
                idle.insert((clients[name].last_ms, name.clone()));
            }
            is_held
        });
    }

    /// Forgets an answer that was taken out of `order`, so that its write is not carried out again;
    /// nothing, if it has fallen.
    fn forget(&mut self, placed: &Placed, falls: Falls<'_>) {
        if self.is_live(placed) {
            self.raise_floor(placed.client.as_str(), placed.seq + 1, falls);
        }
    }

    fn is_live(&self, placed: &Placed) -> bool {
        self.clients.get(&placed.client).is_some_and(|client| {
            placed.seq >= client.floor
                && client.answers.get(placed.seq).is_some_and(|a| a.position == placed.position)
        })
    }

    /// Takes what has fallen out of `order`, when it has become too much.
    fn tidy(&mut self) {
        if self.order.len() > 2 * self.live + FALLEN_MAX {
            let mut order = std::mem::take(&mut self.order);
            order.retain(|placed| self.is_live(placed));
            self.order = order;
        }
    }

    fn raise_floor(&mut self, name: &str, floor: u64, falls: Falls<'_>) {
        let (name, client) =
            known_client(&mut self.clients, name).expect("floors are those of known clients");
        if floor <= client.floor {
            return;
        }
        let before = std::mem::replace(&mut client.floor, floor);
        // What lies below the floor that was is pinned already.
        let mut from = before;
        while let Some((seq, answer)) = client.answers.next(from).filter(|(seq, _)| *seq < floor) {
            from = seq + 1;
            self.live -= 1;
            self.key_bytes -= answer.key.len();
            match falls(&answer.key) {
                Fall::Gone => drop(client.answers.remove(seq)),
                Fall::Told => {
                    self.fallen.push(Fallen::of(name, seq, answer));
                    client.answers.remove(seq);
                }
                Fall::Pinned => drop(self.pinned.insert((name.clone(), seq))),
            }
        }
    }
}
