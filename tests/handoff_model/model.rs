//! The clusters, the network and the clients together, and what must hold of them.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::hash::Hash;
use std::sync::Arc;

use distrib_kv_store::handoff::{Cursor, Handoff, Sending};
use stateright::{Model, Property};

use super::cluster::{Cluster, Entry, Key, Op, OpKind, Outcome, Record, Reply};
use super::driver::{Sent, SentSet, concluded, next_entries, sendable};
use super::pages::Replica;
use super::scenario::Scenario;
use super::shared::{Memo, Shared, mix};

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Hash)]
pub struct State {
    pub clusters: Vec<Shared<Cluster>>,
    /// What is on its way to each cluster, for ever.
    sent: Vec<SentSet>,
    /// What drivers have learned.
    known: SentSet,
    clients: Shared<Clients>,
    /// Follows from the rest.
    verdict: Verdict,
}

/// What clients have seen, and what they must see.
#[derive(Debug, Clone, PartialEq, Hash)]
struct Clients {
    /// The first answer to each operation: what its client was told.
    told: Vec<Option<Outcome>>,
    /// What each of the scenario's keys must be, by the operations that were carried out, in order.
    truth: Vec<Truth>,
    fault: Option<Fault>,
}

#[derive(Debug, Clone, Copy, PartialEq, Hash, Default)]
struct Truth {
    record: Option<Record>,
    revision_max: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    Twice,
    AnotherAnswer,
    UnknownThoughUnanswered,
    OldRevision,
    WrongOutcome,
}

/// One entry more in the log of one cluster.
#[derive(Clone)]
pub struct Action {
    cluster: usize,
    entry: Shared<Entry>,
    applied: Arc<Applied>,
}

impl PartialEq for Action {
    fn eq(&self, other: &Self) -> bool {
        self.cluster == other.cluster && self.entry == other.entry
    }
}

impl Debug for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}: ", self.cluster + 1)?;
        match &*self.entry {
            Entry::Step(step) => match step.handoff() {
                Some(handoff) => write!(f, "{}, {handoff}: {step:?}", step.name()),
                None => write!(f, "{}", step.name()),
            },
            Entry::Import { replica, from } => write!(
                f,
                "import, {}: attempt {}, after {from:?}, from a replica at position {}",
                replica.handoff, replica.attempt, replica.position
            ),
            Entry::Operate(op) => write!(f, "{:?} of {:?} as {:?}", op.kind, op.key, op.id),
            Entry::Clean(key) => write!(f, "delete the leftover of {key:?}"),
        }
    }
}

/// What an entry does to a cluster. Worked out once for each pair of a cluster's state and an entry.
struct Applied {
    cluster: Shared<Cluster>,
    reply: Reply,
    sent: Vec<Shared<Sent>>,
}

pub struct Protocol {
    pub scenario: Scenario,
    /// The clients' requests.
    requests: Vec<Shared<Entry>>,
    applied: Memo<Arc<Applied>>,
    effective: Memo<Arc<Vec<Action>>>,
    judged: Memo<Verdict>,
}

/// Which properties hold.
#[derive(Debug, Clone, Copy, PartialEq, Hash, Default)]
struct Verdict {
    one_server: bool,
    last_write_is_read: bool,
    copy_is_exact: bool,
    nothing_foreign: bool,
    one_change: bool,
    goes_on: bool,
}

impl Protocol {
    pub fn new(scenario: Scenario) -> Self {
        let request = |op: &Shared<Op>| Shared::new(Entry::Operate(op.clone()));
        let requests = scenario.ops.iter().map(request).collect();
        let (applied, effective, judged) = Default::default();
        Self { scenario, requests, applied, effective, judged }
    }

    fn apply(&self, cluster: &Shared<Cluster>, entry: &Shared<Entry>) -> Arc<Applied> {
        self.applied.get(mix(cluster.hash_value(), entry.hash_value()), || {
            let mut after = Cluster::clone(cluster);
            let reply = after.apply(entry, &self.scenario.rules);
            let after = Shared::new(after);
            let is_news = after != *cluster || matches!(reply, Reply::WillRefuse(..));
            let sendable = || sendable(&self.scenario, &after, &reply);
            let sent = if is_news { sendable() } else { Vec::new() };
            Arc::new(Applied { cluster: after, reply, sent })
        })
    }

    /// The entries that one cluster may take next and that come to something.
    fn effective(&self, state: &State, cluster: usize) -> Arc<Vec<Action>> {
        let (held, sent) = (&state.clusters[cluster], &state.sent[cluster]);
        let asked = self.asked(&state.clients).fold(0, |set, op| set | 1 << op);
        let at = mix(mix(held.hash_value(), sent.hash_value()), asked);
        self.effective.get(at, || {
            let mut entries = Vec::new();
            for sent in sent.iter() {
                match &**sent {
                    Sent::Step { entry, .. } => entries.push(entry.clone()),
                    Sent::Replica(replica) => entries.extend(imports(replica, held)),
                    Sent::Cancelled { .. } | Sent::Rests { .. } => {}
                }
            }
            if held.ring.epoch() > 0 {
                entries.extend(self.asked(&state.clients).map(|op| self.requests[op].clone()));
            }
            entries.extend(held.dirt().into_iter().map(|key| Shared::new(Entry::Clean(key))));
            let action = |entry| {
                let applied = self.apply(held, &entry);
                let nothing = applied.cluster == *held && applied.reply == Reply::Nothing;
                (!nothing).then_some(Action { cluster, entry, applied })
            };
            Arc::new(entries.into_iter().filter_map(action).collect())
        })
    }

    /// The operations whose requests are on their way, for ever.
    fn asked<'a>(&'a self, clients: &'a Clients) -> impl Iterator<Item = usize> + 'a {
        let sent = |op: &usize| {
            self.scenario.ops[*op].after.is_none_or(|before| clients.told[before].is_some())
        };
        (0..self.scenario.ops.len()).filter(sent)
    }

    fn reachable(state: &State) -> impl Iterator<Item = (usize, &Shared<Cluster>)> {
        state.clusters.iter().enumerate().filter(|(_, cluster)| cluster.ring.epoch() > 0)
    }

    /// Whether the operator's wishes are fulfilled, as far as the scenario goes, and every client has
    /// its answer.
    pub fn is_final(&self, state: &State) -> bool {
        let newest = state.clusters.iter().map(|cluster| cluster.ring.epoch()).max();
        let newest = newest.expect("there are clusters");
        let rests = |cluster: &Shared<Cluster>| {
            let ring = cluster.ring.ring.ring();
            let is_over = ring.epoch == newest && cluster.ring.settling.is_empty();
            let is_outside = ring.cluster(&cluster.id).is_none();
            cluster.ring.change.is_none()
                && (is_outside || is_over && self.scenario.next(ring).is_none())
        };
        state.clients.told.iter().all(Option::is_some) && state.clusters.iter().all(rests)
    }

    /// Judges a state. Many states differ in what is on its way alone, which the verdict does not see.
    fn judge(&self, state: &State) -> Verdict {
        let clusters = state.clusters.iter().map(Shared::hash_value);
        let at = clusters.fold(state.clients.hash_value(), mix);
        self.judged.get(at, || Verdict {
            one_server: one_server(self, state),
            last_write_is_read: last_write_is_read(self, state),
            copy_is_exact: copy_is_exact(self, state),
            nothing_foreign: nothing_foreign(state),
            one_change: one_change(&self.scenario, state),
            goes_on: self.goes_on(state),
        })
    }

    /// What was sent finds its way.
    fn send(&self, state: &mut State, sent: &[Shared<Sent>]) {
        for (cluster, set) in state.sent.iter_mut().enumerate() {
            let here = sent.iter().filter(|one| one.to(&self.scenario) == Some(cluster));
            *set = set.with(here);
        }
        let learned = sent.iter().filter(|one| one.to(&self.scenario).is_none());
        state.known = state.known.with(learned);
    }

    /// Whether a driver that starts now, a client, or a cluster by itself brings things forward.
    fn goes_on(&self, state: &State) -> bool {
        let changes = |cluster: usize, entry: &Entry| {
            let before = &state.clusters[cluster];
            let mut after = Cluster::clone(before);
            after.apply(entry, &self.scenario.rules);
            after != **before
        };
        let mut unanswered =
            self.asked(&state.clients).filter(|op| state.clients.told[*op].is_none());
        let is_answered = |op: usize| {
            Self::reachable(state).any(|(cluster, _)| changes(cluster, &self.requests[op]))
        };
        self.is_final(state)
            || unanswered.any(is_answered)
            || next_entries(&self.scenario, &state.clusters)
                .iter()
                .any(|(cluster, entry)| changes(*cluster, entry))
    }

    /// The client learns what came of its operation.
    fn tell(&self, clients: &Clients, entry: &Entry, reply: &Reply) -> Option<Clients> {
        let Entry::Operate(op) = entry else { return None };
        let place = self.scenario.ops.iter().position(|other| other == op);
        let place = place.expect("an operation of the scenario");
        let key = self.scenario.keys.iter().position(|key| *key == op.key);
        let key = key.expect("a key of the scenario");
        let first = clients.told[place];
        let mut clients = clients.clone();
        match (reply, first) {
            (Reply::Executed(outcome), None) => {
                clients.told[place] = Some(*outcome);
                clients.fault = clients.truth[key].take(op, *outcome);
            }
            (Reply::Executed(_), Some(_)) => clients.fault = Some(Fault::Twice),
            (Reply::Repeated(outcome), first) if first != Some(*outcome) => {
                clients.fault = Some(Fault::AnotherAnswer);
            }
            (Reply::Unknown, None) => clients.fault = Some(Fault::UnknownThoughUnanswered),
            _ => return None,
        }
        Some(clients)
    }

    /// All handoffs that both sides hold.
    fn handoffs<'a>(
        &'a self,
        state: &'a State,
    ) -> impl Iterator<Item = (Handoff, &'a Cluster, &'a Cluster)> {
        state.clusters.iter().flat_map(move |source| {
            let change = source.ring.change.iter();
            change.flat_map(move |change| {
                let epoch = change.next.ring().epoch;
                change.outgoing.keys().map(move |to| {
                    let handoff = Handoff { epoch, from: source.id.clone(), to: to.clone() };
                    (handoff, &**source, &*state.clusters[self.scenario.place(to)])
                })
            })
        })
    }
}

impl Truth {
    /// An operation is carried out. Checks that the outcome follows from those before it.
    fn take(&mut self, op: &Op, outcome: Outcome) -> Option<Fault> {
        let exists = self.record.is_some();
        match (op.kind, outcome) {
            (OpKind::Put, Outcome::Put { revision }) => self.put(op, revision),
            (OpKind::PutIfAbsent, Outcome::Put { revision }) if !exists => self.put(op, revision),
            (OpKind::PutIfAbsent, Outcome::ConditionFailed) if exists => None,
            (OpKind::Delete, Outcome::Deleted { found }) if found == exists => {
                self.record = None;
                None
            }
            _ => Some(Fault::WrongOutcome),
        }
    }

    fn put(&mut self, op: &Op, revision: u64) -> Option<Fault> {
        self.record = Some(Record { value: op.value, revision });
        let grows = revision > self.revision_max;
        self.revision_max = revision;
        (!grows).then_some(Fault::OldRevision)
    }
}

/// The pages that may arrive from one replica.
fn imports(replica: &Shared<Replica>, destination: &Cluster) -> Vec<Shared<Entry>> {
    let reached = destination.cursor(&replica.handoff).unwrap_or(Cursor::start());
    let cursors = replica.cursors(&reached).into_iter();
    let import = |from| Shared::new(Entry::Import { replica: replica.clone(), from });
    cursors.map(import).collect()
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let clusters: Vec<_> = self.scenario.start().into_iter().map(Shared::new).collect();
        let mut truth = vec![Truth::default(); self.scenario.keys.len()];
        for (key, truth) in self.scenario.keys.iter().zip(&mut truth) {
            if let Some(row) = clusters.iter().find_map(|cluster| cluster.rows.get(key)) {
                let (record, revision_max) = (Some(row.record), row.record.revision);
                *truth = Truth { record, revision_max };
            }
        }
        let told = vec![None; self.scenario.ops.len()];
        let mut state = State {
            sent: vec![Shared::set(); clusters.len()],
            known: Shared::set(),
            clients: Shared::new(Clients { told, truth, fault: None }),
            verdict: Verdict::default(),
            clusters,
        };
        for cluster in state.clusters.clone() {
            self.send(&mut state, &sendable(&self.scenario, &cluster, &Reply::Nothing));
        }
        state.verdict = self.judge(&state);
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for cluster in 0..state.clusters.len() {
            actions.extend(self.effective(state, cluster).iter().cloned());
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let Action { cluster, entry, applied } = action;
        let mut next = state.clone();
        next.clusters[cluster] = applied.cluster.clone();
        self.send(&mut next, &applied.sent);
        let concluded = concluded(&self.scenario, &next.clusters, &next.known);
        self.send(&mut next, &concluded);
        if let Some(clients) = self.tell(&state.clients, &entry, &applied.reply) {
            next.clients = Shared::new(clients);
        }
        next.verdict = self.judge(&next);
        (next != *state).then_some(next)
    }

    fn format_action(&self, action: &Action) -> String {
        format!("{action:?}")
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("one cluster serves a key", |_, s: &State| s.verdict.one_server),
            Property::always("the last write is read", |_, s: &State| s.verdict.last_write_is_read),
            Property::always("nothing is done twice", |_, s: &State| s.clients.fault.is_none()),
            Property::always("a copy is exact", |_, s: &State| s.verdict.copy_is_exact),
            Property::always("nothing foreign is left", |_, s: &State| s.verdict.nothing_foreign),
            Property::always("one change at a time", |_, s: &State| s.verdict.one_change),
            Property::always("nothing is stuck", |_, s: &State| s.verdict.goes_on),
        ];
        if self.scenario.rules.mutations.is_empty() {
            properties.extend(reached(&self.scenario));
        }
        properties
    }
}

/// What a scenario must show to be worth anything.
fn reached(scenario: &Scenario) -> Vec<Property<Protocol>> {
    let mut properties =
        vec![Property::sometimes("the end is reached", |model: &Protocol, state| {
            let last = |cluster: &Shared<Cluster>| cluster.ring.epoch() == model.scenario.epoch_max;
            model.is_final(state) && state.clusters.iter().any(last)
        })];
    if scenario.cancels {
        properties.push(Property::sometimes("a change is reverted", |_, state: &State| {
            let first = state.clusters.first();
            first.is_some_and(|c| c.ring.epoch() == 3 && c.ring.change.is_none())
        }));
    }
    if scenario.ops.iter().any(|op| op.kind == OpKind::Put) {
        properties.push(Property::sometimes("the last owner is written to", |_, state: &State| {
            let last = state.clusters.last();
            last.is_some_and(|cluster| cluster.rows.values().any(|row| row.tag.is_none()))
        }));
    }
    properties
}

fn servers<'a>(
    model: &'a Protocol,
    state: &'a State,
    key: &'a Key,
) -> impl Iterator<Item = &'a Shared<Cluster>> {
    let rules = &model.scenario.rules;
    state.clusters.iter().filter(move |cluster| cluster.reads(key, rules))
}

fn one_server(model: &Protocol, state: &State) -> bool {
    model.scenario.keys.iter().all(|key| servers(model, state, key).count() <= 1)
}

fn last_write_is_read(model: &Protocol, state: &State) -> bool {
    model.scenario.keys.iter().zip(&state.clients.truth).all(|(key, truth)| {
        let truth = truth.record;
        let rules = &model.scenario.rules;
        servers(model, state, key).all(|cluster| cluster.record(key, rules) == truth)
    })
}

/// Whenever a destination has all up to where its source froze, it has just that.
fn copy_is_exact(model: &Protocol, state: &State) -> bool {
    model.handoffs(state).all(|(handoff, source, destination)| {
        let outgoing = source.ring.outgoing(&handoff).expect("the source holds it");
        let (Some(frozen), Some(cursor)) = (&outgoing.frozen, destination.cursor(&handoff)) else {
            return true;
        };
        let incoming = destination.ring.incoming(&handoff).expect("it has a cursor");
        let is_same_attempt = incoming.opened == outgoing.attempt;
        if outgoing.sending != Sending::Frozen
            || !is_same_attempt
            || !cursor.covers(frozen.position)
        {
            return true;
        }
        incoming.tally == frozen.tally
            && destination.staged(&handoff) == source.held(&handoff.to, &model.scenario.rules)
    })
}

/// Where no change is under way, a cluster holds what it owns and nothing else.
fn nothing_foreign(state: &State) -> bool {
    let mut resting = state.clusters.iter().filter(|cluster| cluster.ring.change.is_none());
    resting.all(|cluster| {
        let owns = |key: &[u8]| cluster.ring.ring.owns(&cluster.id, key);
        let answers = cluster.answers.values();
        let staged = cluster.staged.values().all(BTreeMap::is_empty);
        staged
            && cluster.rows.keys().all(|key| owns(key))
            && answers.map(|a| &a.key).all(|k| owns(k))
    })
}

/// While a change is under way somewhere, nobody is busy with an older one; but who has left, and gave away all
/// that it had, may be.
fn one_change(scenario: &Scenario, state: &State) -> bool {
    let is_left_behind = |cluster: &&Shared<Cluster>| {
        scenario.leaves_behind
            && cluster.ring.change.as_ref().is_some_and(|change| {
                let mut outgoing = change.outgoing.values();
                change.next.ring().cluster(&cluster.id).is_none()
                    && outgoing.all(|o| matches!(o.sending, Sending::Frozen | Sending::Moved))
            })
    };
    let others = state.clusters.iter().filter(|cluster| !is_left_behind(cluster));
    let changes = others.filter_map(|cluster| cluster.ring.change.as_ref());
    let mut epochs = changes.map(|change| change.next.ring().epoch);
    let Some(first) = epochs.next() else { return true };
    epochs.all(|epoch| epoch == first)
}
