//! One cluster as the model sees it: a handful of records and answers, under the product's own
//! [`RingState`].
//!
//! What a step does to the ring state, who owns a key, which rows count, whether a page may be staged
//! and how the tally follows a write is decided by the product's code. This file does to the data what
//! the store does, on maps instead of a disk. A log entry is applied at once and never seen half done.
//!
//! ```text
//! rows      key       -> record (value, revision), and the tag of the attempt that staged it
//! answers   operation -> key, outcome           (the idempotency records)
//! staged    from      -> answers that the open attempt has staged; staged records lie in `rows`
//! log       position, key, operation            (changes of moving keys, only while they are needed)
//! floors    client    -> sequence below which its answers may be forgotten
//! ```

#[path = "facts.rs"]
mod facts;

use std::collections::BTreeMap;

use bytes::Bytes;
use distrib_kv_store::handoff::{
    Attempt, Cursor, Handoff, Incoming, Outgoing, Ownership, Position, Receipt, Refused, RingState,
    Sending, Step, Tag, Tally,
};
use distrib_kv_store::types::{ClusterId, Revision};

use facts::Data;

use super::mutation::Mutation;
use super::pages::{Page, Replica};
use super::shared::{Shared, hash_of};

pub type Key = Bytes;

/// Names an operation: a client and its sequence number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId {
    pub client: char,
    pub seq: u64,
}

/// What a client asks for. Its request may reach any cluster at any time, any number of times.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Op {
    pub id: OpId,
    /// The client's floor when it sent the request.
    pub floor: u64,
    pub key: Key,
    pub kind: OpKind,
    /// The value that it puts; every operation puts another.
    pub value: u8,
    /// The operation whose answer the client awaits before it sends this one.
    pub after: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OpKind {
    Put,
    /// Fails when the key exists.
    PutIfAbsent,
    Delete,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    Put { revision: Revision },
    Deleted { found: bool },
    ConditionFailed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Record {
    pub value: u8,
    pub revision: Revision,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Row {
    pub record: Record,
    pub tag: Option<Tag>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Answer {
    pub key: Key,
    pub outcome: Outcome,
}

/// A line of the change log.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Logged {
    pub position: Position,
    pub key: Key,
    pub op: OpId,
}

/// An entry of a cluster's Raft log.
#[derive(Debug, Clone, PartialEq, Hash)]
pub enum Entry {
    Step(Shared<Step>),
    /// The page that a driver found in `replica` when it looked for what follows `from`.
    Import {
        replica: Shared<Replica>,
        from: Cursor,
    },
    Operate(Shared<Op>),
    /// Deletes one row of a moved key, or one that an attempt staged in vain.
    Clean(Key),
}

/// What an entry came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    Nothing,
    /// The destination refuses all attempts of the handoff up to this one.
    WillRefuse(Handoff, Attempt),
    /// The operation was carried out now.
    Executed(Outcome),
    /// It was carried out before, with this outcome.
    Repeated(Outcome),
    /// Too old to tell: the client's floor is above it.
    Unknown,
}

/// How entries are applied.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The bound of the change log.
    pub log_max: u64,
    /// What is broken on purpose.
    pub mutations: Vec<Mutation>,
}

impl Rules {
    pub fn breaks(&self, mutation: Mutation) -> bool {
        self.mutations.contains(&mutation)
    }
}

#[derive(Debug, Clone, PartialEq, Hash)]
pub struct Cluster {
    pub id: ClusterId,
    pub ring: RingState,
    pub rows: BTreeMap<Key, Row>,
    pub answers: BTreeMap<OpId, Answer>,
    pub staged: BTreeMap<ClusterId, BTreeMap<OpId, Answer>>,
    log: Vec<Logged>,
    floors: BTreeMap<char, u64>,
    revision: Revision,
}

impl Cluster {
    pub fn new(id: ClusterId, ring: RingState) -> Self {
        Self {
            id,
            ring,
            rows: BTreeMap::new(),
            answers: BTreeMap::new(),
            staged: BTreeMap::new(),
            log: Vec::new(),
            floors: BTreeMap::new(),
            revision: 0,
        }
    }

    /// Puts a record that was there before all else.
    pub fn preset(&mut self, key: Key) {
        self.revision += 1;
        let record = Record { value: 0, revision: self.revision };
        self.rows.insert(key, Row { record, tag: None });
    }

    pub fn apply(&mut self, entry: &Entry, rules: &Rules) -> Reply {
        let reply = match entry {
            Entry::Step(step) => self.step(step, rules),
            Entry::Import { replica, from } => self.import(replica, from, rules),
            Entry::Operate(op) => self.operate(op, rules),
            Entry::Clean(key) => self.clean(key),
        };
        let log_start = self.ring.log_start();
        self.log.retain(|line| line.position >= log_start);
        reply
    }

    /// The record of `key` that counts.
    pub fn record(&self, key: &[u8], rules: &Rules) -> Option<Record> {
        let row = self.rows.get(key)?;
        let mixed = rules.breaks(Mutation::StagingMixedWithData);
        let counts = row.tag.is_none_or(|tag| mixed || self.ring.is_live(tag, key));
        counts.then_some(row.record)
    }

    /// Whether linearizable reads of `key` are answered here.
    pub fn reads(&self, key: &[u8], rules: &Rules) -> bool {
        let frozen = || matches!(self.ring.ownership(&self.id, key), Ownership::Frozen(_));
        self.serves(key) || rules.breaks(Mutation::ReadsWhileFrozen) && frozen()
    }

    /// Whether writes of `key` are taken here. Nobody is sent to a cluster without a ring.
    pub fn serves(&self, key: &[u8]) -> bool {
        self.ring.epoch() > 0 && self.ring.serves(&self.id, key)
    }

    // --- Steps -------------------------------------------------------------------------------------

    fn step(&mut self, step: &Step, rules: &Rules) -> Reply {
        if rules.breaks(Mutation::NoResume) && matches!(step, Step::Resume { .. }) {
            return Reply::Nothing;
        }
        let mut ring = self.ring.clone();
        let mut step = step.clone();
        for mutation in &rules.mutations {
            mutation.before(&mut step, &mut ring, &self.id);
        }
        let decided = ring.decide(&step, &Data { cluster: self, rules });
        match decided.expect("the model reads no disk") {
            Ok(decision) => {
                if decision.changed {
                    for mutation in &rules.mutations {
                        mutation.after(&step, &self.ring, &mut ring, &self.id);
                    }
                    self.forget_moved_answers(&step);
                    self.ring = ring;
                    self.follow(&step);
                }
                Reply::Nothing
            }
            Err(refused) => self.refused(&step, &refused, rules),
        }
    }

    /// The data follows a step that changed something, as [`RingState::decide`] demands.
    fn follow(&mut self, step: &Step) {
        match step {
            Step::Open { handoff, .. } => {
                self.staged.remove(&handoff.from);
            }
            Step::Refuse { handoff, .. } => {
                let receiving = self.ring.incoming(handoff).map(|incoming| &incoming.receipt);
                if receiving == Some(&Receipt::Waiting) {
                    self.staged.remove(&handoff.from);
                }
            }
            Step::Activate { handoff, frozen, .. } => {
                self.answers.extend(self.staged.remove(&handoff.from).unwrap_or_default());
                self.revision = self.revision.max(frozen.revision);
                for (client, floor) in &frozen.floors {
                    let client = client.chars().next().expect("a client has a name");
                    let own = self.floors.entry(client).or_default();
                    *own = (*own).max(*floor);
                }
            }
            _ => {}
        }
    }

    fn forget_moved_answers(&mut self, step: &Step) {
        if let Step::Release { handoff, .. } = step {
            let (ring, id) = (&self.ring, &self.id);
            self.answers.retain(|_, answer| ring.way_out(id, &answer.key) != Some(&handoff.to));
        }
    }

    fn refused(&self, step: &Step, refused: &Refused, rules: &Rules) -> Reply {
        match (step, refused) {
            (Step::Refuse { handoff, attempt }, Refused::NoChange { .. })
                if rules.breaks(Mutation::RefusalOfAStranger)
                    && self.ring.epoch() < handoff.epoch =>
            {
                Reply::WillRefuse(handoff.clone(), *attempt)
            }
            _ => Reply::Nothing,
        }
    }

    // --- Copying -----------------------------------------------------------------------------------

    /// What a replica in this state offers to the destination of each handoff that sends.
    pub fn replicas(&self, rules: &Rules) -> Vec<Replica> {
        let Some(change) = &self.ring.change else { return Vec::new() };
        let sends = change.outgoing.iter().filter(|(_, outgoing)| outgoing.logs());
        sends.map(|(to, outgoing)| self.replica(to, outgoing, rules)).collect()
    }

    fn replica(&self, to: &ClusterId, outgoing: &Outgoing, rules: &Rules) -> Replica {
        let change = self.ring.change.as_ref().expect("the handoff is part of one");
        let epoch = change.next.ring().epoch;
        let moves = |key: &[u8]| self.ring.way_out(&self.id, key) == Some(to);
        let records = self.rows.keys().filter(|key| moves(key));
        let record = |key: &Key| Some((key.clone(), self.record(key, rules)?));
        let answers = self.answers.iter().filter(|(_, answer)| moves(&answer.key));
        let log = self.log.iter().filter(|line| moves(&line.key));
        Replica {
            handoff: Handoff { epoch, from: self.id.clone(), to: to.clone() },
            attempt: outgoing.attempt,
            start: outgoing.start,
            position: self.ring.position,
            rows: records.filter_map(record).collect(),
            answers: answers.map(|(op, answer)| (*op, answer.clone())).collect(),
            log: log.filter(|line| line.position >= outgoing.start).cloned().collect(),
        }
    }

    fn import(&mut self, replica: &Replica, from: &Cursor, rules: &Rules) -> Reply {
        let handoff = &replica.handoff;
        let Some(page) = replica.page(from, rules) else { return Reply::Nothing };
        let reached = self.cursor(handoff);
        let is_unchecked = rules.breaks(Mutation::CursorUnchecked);
        if is_unchecked {
            self.set_cursor(handoff, from.clone());
        }
        let checked = self.ring.check_import(handoff, replica.attempt, from, &page.to, &self.id);
        if checked.is_err() {
            if let Some(reached) = reached.filter(|_| is_unchecked) {
                self.set_cursor(handoff, reached);
            }
            return Reply::Nothing;
        }
        let to = page.to.clone().max(reached.unwrap_or(Cursor::start()));
        let tag = Tag { epoch: handoff.epoch, attempt: replica.attempt };
        let (tally, garbage) = self.stage(handoff, tag, page);
        self.ring.end_import(handoff, &to, tally, garbage);
        Reply::Nothing
    }

    /// Stages a page; returns the tally of all that is staged, and how many dead rows made way.
    fn stage(&mut self, handoff: &Handoff, tag: Tag, page: Page) -> (Tally, u64) {
        let incoming = self.ring.incoming(handoff).expect("the import was admitted");
        let (mut tally, mut garbage) = (incoming.tally, 0);
        for (key, record) in page.records {
            match self.rows.remove(&key) {
                Some(row) if row.tag == Some(tag) => {
                    tally.remove_record(hash_of(&(&key, row.record)));
                }
                Some(_) => garbage += 1,
                None => {}
            }
            if let Some(record) = record {
                tally.add_record(hash_of(&(&key, record)));
                self.rows.insert(key, Row { record, tag: Some(tag) });
            }
        }
        let staged = self.staged.entry(handoff.from.clone()).or_default();
        for (op, answer) in page.answers {
            if let Some(old) = staged.remove(&op) {
                tally.remove_answer(hash_of(&(op, &old)));
            }
            if let Some(answer) = answer {
                tally.add_answer(hash_of(&(op, &answer)));
                staged.insert(op, answer);
            }
        }
        (tally, garbage)
    }

    /// How far the open attempt is.
    pub fn cursor(&self, handoff: &Handoff) -> Option<Cursor> {
        match &self.ring.incoming(handoff)?.receipt {
            Receipt::Receiving { cursor, .. } => Some(cursor.clone()),
            _ => None,
        }
    }

    fn set_cursor(&mut self, handoff: &Handoff, to: Cursor) {
        let incoming = self.ring.incoming_slot(handoff);
        if let Some(Incoming { receipt: Receipt::Receiving { cursor, .. }, .. }) = incoming {
            *cursor = to;
        }
    }

    // --- Operations --------------------------------------------------------------------------------

    fn operate(&mut self, op: &Op, rules: &Rules) -> Reply {
        if !self.serves(&op.key) {
            return Reply::Nothing;
        }
        self.raise_floor(op.id.client, op.floor, rules);
        if let Some(answer) = self.answers.get(&op.id) {
            return Reply::Repeated(answer.outcome);
        }
        if op.id.seq < self.floors.get(&op.id.client).copied().unwrap_or(0) {
            return Reply::Unknown;
        }
        let old = self.record(&op.key, rules);
        let outcome = self.execute(op, old);
        let new = match op.kind {
            _ if outcome == Outcome::ConditionFailed => old,
            OpKind::Delete => None,
            OpKind::Put | OpKind::PutIfAbsent => {
                Some(Record { value: op.value, revision: self.revision })
            }
        };
        self.write(&op.key, old, new);
        let answer = Answer { key: op.key.clone(), outcome };
        self.log_operation(op, old, new, &answer, rules);
        self.answers.insert(op.id, answer);
        Reply::Executed(outcome)
    }

    /// Decides the outcome, and takes a revision if something is to change.
    fn execute(&mut self, op: &Op, old: Option<Record>) -> Outcome {
        let changes = match op.kind {
            OpKind::Put => true,
            OpKind::PutIfAbsent => old.is_none(),
            OpKind::Delete => old.is_some(),
        };
        self.revision += u64::from(changes);
        match op.kind {
            OpKind::Delete => Outcome::Deleted { found: changes },
            _ if changes => Outcome::Put { revision: self.revision },
            _ => Outcome::ConditionFailed,
        }
    }

    fn write(&mut self, key: &Key, old: Option<Record>, new: Option<Record>) {
        if old == new {
            return;
        }
        let replaced = match new {
            Some(record) => self.rows.insert(key.clone(), Row { record, tag: None }),
            None => self.rows.remove(key),
        };
        let was_dead = old.is_none() && replaced.is_some();
        if was_dead && let Some(incoming) = self.incoming_of(key) {
            // A row that an attempt staged in vain made way for the write.
            incoming.garbage -= 1;
        }
    }

    fn log_operation(
        &mut self,
        op: &Op,
        old: Option<Record>,
        new: Option<Record>,
        answer: &Answer,
        rules: &Rules,
    ) {
        let skipped = rules.breaks(Mutation::UnchangedNotLogged) && old == new;
        if self.ring.sending(&self.id, &op.key).is_none() {
            return;
        }
        if !skipped {
            let position = self.ring.log_change(rules.log_max);
            self.log.push(Logged { position, key: op.key.clone(), op: op.id });
        }
        let Some(outgoing) = self.ring.sending(&self.id, &op.key) else { return };
        if old != new {
            let hash = |record: Record| hash_of(&(&op.key, record));
            let was = old.map(|record| (record.revision, hash(record)));
            outgoing.count_change(&op.key, was, new.map(hash));
        }
        outgoing.tally.add_answer(hash_of(&(op.id, answer)));
    }

    /// Forgets the client's answers below its floor. The destination is told of those that are being
    /// copied, and those of frozen keys stay.
    fn raise_floor(&mut self, client: char, floor: u64, rules: &Rules) {
        let own = self.floors.entry(client).or_default();
        *own = (*own).max(floor);
        let floor = *own;
        let old = |op: &OpId| op.client == client && op.seq < floor;
        let trims = rules.breaks(Mutation::TrimWhileMoving);
        let answers = std::mem::take(&mut self.answers);
        for (op, answer) in answers {
            let frozen = self.ring.leaving(&self.id, &answer.key) == Some(Sending::Frozen);
            if !old(&op) || !trims && frozen {
                self.answers.insert(op, answer);
            } else if let Some(outgoing) = self.ring.sending(&self.id, &answer.key) {
                outgoing.tally.remove_answer(hash_of(&(op, &answer)));
                if !trims {
                    let position = self.ring.log_change(rules.log_max);
                    self.log.push(Logged { position, key: answer.key, op });
                }
            }
        }
    }

    // --- Deleting ----------------------------------------------------------------------------------

    /// The keys whose rows are to be deleted before the change can be finished or reverted.
    pub fn dirt(&self) -> Vec<Key> {
        self.rows.keys().filter(|key| self.has_moved(key) || self.is_dead(key)).cloned().collect()
    }

    fn clean(&mut self, key: &Key) -> Reply {
        if self.has_moved(key) {
            let row = self.rows.remove(key).expect("the row was found");
            let outgoing = self.outgoing_of(key).expect("the key has moved by it");
            outgoing.tally.remove_record(hash_of(&(key, row.record)));
        } else if self.is_dead(key) {
            self.rows.remove(key);
            self.incoming_of(key).expect("the row was staged by it").garbage -= 1;
        }
        Reply::Nothing
    }

    fn has_moved(&self, key: &Key) -> bool {
        let outgoing = || {
            let to = self.ring.way_out(&self.id, key)?;
            self.ring.change.as_ref()?.outgoing.get(to)
        };
        self.rows.contains_key(key) && outgoing().is_some_and(|o| o.sending == Sending::Moved)
    }

    /// Whether the row of `key` was staged by an attempt that came to nothing.
    fn is_dead(&self, key: &Key) -> bool {
        let Some(tag) = self.rows.get(key).and_then(|row| row.tag) else { return false };
        let Some(from) = self.ring.way_in(&self.id, key) else { return false };
        let change = self.ring.change.as_ref().expect("the key moves by it");
        let Some(incoming) = change.incoming.get(from) else { return false };
        let is_open = matches!(incoming.receipt, Receipt::Receiving { .. })
            && incoming.opened == tag.attempt
            && change.next.ring().epoch == tag.epoch;
        !is_open && !self.ring.is_live(tag, key)
    }

    fn outgoing_of(&mut self, key: &[u8]) -> Option<&mut Outgoing> {
        let to = self.ring.way_out(&self.id, key)?.clone();
        self.ring.change.as_mut()?.outgoing.get_mut(&to)
    }

    fn incoming_of(&mut self, key: &[u8]) -> Option<&mut Incoming> {
        let from = self.ring.way_in(&self.id, key)?.clone();
        self.ring.change.as_mut()?.incoming.get_mut(&from)
    }

    // --- For the properties ------------------------------------------------------------------------

    /// What the source of a handoff holds of it, told record by record.
    pub fn held(&self, to: &ClusterId, rules: &Rules) -> Copied {
        let moves = |key: &Key| self.ring.way_out(&self.id, key) == Some(to);
        let keys = self.rows.keys().filter(|key| moves(key));
        let records = keys.filter_map(|key| Some((key.clone(), self.record(key, rules)?)));
        let answers = self.answers.iter().filter(|(_, answer)| moves(&answer.key));
        Copied {
            records: records.collect(),
            answers: answers.map(|(op, answer)| (*op, answer.clone())).collect(),
        }
    }

    /// What the open attempt of a handoff has staged.
    pub fn staged(&self, handoff: &Handoff) -> Copied {
        let opened = self.ring.incoming(handoff).map_or(0, |incoming| incoming.opened);
        let tag = Some(Tag { epoch: handoff.epoch, attempt: opened });
        let comes = |key: &Key| self.ring.way_in(&self.id, key) == Some(&handoff.from);
        let rows = self.rows.iter().filter(|(key, row)| comes(key) && row.tag == tag);
        Copied {
            records: rows.map(|(key, row)| (key.clone(), row.record)).collect(),
            answers: self.staged.get(&handoff.from).cloned().unwrap_or_default(),
        }
    }
}

/// The records and answers that a handoff moves.
#[derive(Debug, PartialEq)]
pub struct Copied {
    records: BTreeMap<Key, Record>,
    answers: BTreeMap<OpId, Answer>,
}
