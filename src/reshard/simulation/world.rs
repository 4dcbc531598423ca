//! Clusters in memory, each with one replica: they decide steps by the real rules, and copy, count and
//! delete as a cluster's leader does, in small portions.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;

use super::Chance;
use crate::handoff::{
    Attempt, Counted, Cursor, Done, Facts, Handoff, Incoming, Prepared, Receipt, Refused,
    RingState, Sending, Step, Tally, Witnesses,
};
use crate::reshard::{Action, Scene, Views};
use crate::ring::{Ring, RingCluster, RingTable};
use crate::types::{ClusterId, Revision};

/// How many keys there are.
const KEYS: usize = 40;

/// How many rows one portion of work has.
const PORTION: usize = 4;

/// How long a source's stretch of the change log may become: short, so that attempts are given up.
const LOG_MAX: u64 = 60;

type Rows = BTreeMap<Bytes, (Revision, u64)>;

/// A cluster's data.
struct Data {
    own: ClusterId,
    rows: Rows,
    revision: Revision,
    index: u64,
}

struct Cluster {
    state: RingState,
    data: Data,
    /// What each attempt of each source has staged here.
    staged: BTreeMap<(ClusterId, Attempt), Rows>,
    /// What changed of moving keys, from position 0.
    log: Vec<Bytes>,
}

/// All clusters, and what was written last.
pub(super) struct World {
    clusters: BTreeMap<ClusterId, Cluster>,
    written: BTreeMap<Bytes, u64>,
    keys: Vec<Bytes>,
    counter: u64,
    /// Whether a step has changed something since [`Self::check`].
    unchecked: bool,
}

impl Facts for Data {
    fn own(&self) -> &ClusterId {
        &self.own
    }

    fn index(&self) -> u64 {
        self.index
    }

    fn revision(&self) -> Revision {
        self.revision
    }

    fn floors(&self) -> Vec<(String, u64)> {
        Vec::new()
    }

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.rows.is_empty())
    }

    fn answers(&self, _moves: &dyn Fn(&[u8]) -> bool) -> Tally {
        Tally::default()
    }

    fn records(
        &self,
        moves: &dyn Fn(&[u8]) -> bool,
        from: &[u8],
        to: Option<&[u8]>,
        prepared: Prepared,
    ) -> io::Result<Option<Tally>> {
        let mut tally = Tally::default();
        for (key, (revision, value)) in &self.rows {
            let within = &key[..] > from && to.is_none_or(|to| &key[..] <= to);
            if within && *revision <= prepared.revision && moves(key) {
                tally.add_record(hash(key, *value));
            }
        }
        Ok(Some(tally))
    }
}

fn hash(key: &[u8], value: u64) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(key, value)
}

impl World {
    pub(super) fn new(old: &Ring, next: &Ring, chance: &mut Chance) -> Self {
        let table = RingTable::new(old.clone()).unwrap();
        let cluster = |own: &ClusterId| {
            let state = match old.cluster(own) {
                Some(_) => RingState::with_ring(table.clone()),
                None => RingState::default(),
            };
            let data = Data { own: own.clone(), rows: Rows::new(), revision: 0, index: 0 };
            Cluster { state, data, staged: BTreeMap::new(), log: Vec::new() }
        };
        let ids = old.clusters.iter().chain(&next.clusters).map(|c| c.id.clone());
        let clusters = ids.map(|id| (id.clone(), cluster(&id))).collect();
        let keys = (0..KEYS).map(|n| Bytes::from(format!("key{n:03}"))).collect();
        let written = BTreeMap::new();
        let mut world = Self { clusters, written, keys, counter: 0, unchecked: true };
        (0..2 * KEYS).for_each(|_| world.write(chance));
        world
    }

    pub(super) fn views(&self) -> Views {
        self.clusters.iter().map(|(id, cluster)| (id.clone(), cluster.state.clone())).collect()
    }

    /// One cluster's state.
    pub(super) fn view(&self, chance: &mut Chance) -> (ClusterId, RingState) {
        let place = chance.below(self.clusters.len());
        let (id, cluster) = self.clusters.iter().nth(place).unwrap();
        (id.clone(), cluster.state.clone())
    }

    pub(super) fn is_active(&self, from: &ClusterId, to: &ClusterId) -> bool {
        let state = &self.clusters[to].state;
        let incoming = state.change.as_ref().and_then(|change| change.incoming.get(from));
        incoming.is_some_and(Incoming::is_active)
    }

    /// Whether a cluster leaves, and others serve all that it had.
    pub(super) fn has_given_all(&self, id: &ClusterId) -> bool {
        let views = self.views();
        let Scene::Changing(transition) = Scene::of(&views) else { return false };
        transition.has_given_all(&views, id)
    }

    /// How many of the handoffs of a cluster in a change are active, and how many there are.
    pub(super) fn given(&self, id: &ClusterId) -> Option<(usize, usize)> {
        let change = self.clusters[id].state.change.as_ref()?;
        let active = change.outgoing.keys().filter(|to| self.is_active(id, to)).count();
        Some((active, change.outgoing.len()))
    }

    /// A step is proposed, and applied if those whose word it needs give it.
    pub(super) fn take(&mut self, action: &Action) -> Result<Done, Refused> {
        if let Some(Ok(decision)) =
            self.clusters[&action.at].state.foresee(&action.step, &action.at)
            && decision.changed
        {
            self.hear_witnesses(action)?;
        }
        let cluster = self.clusters.get_mut(&action.at).unwrap();
        cluster.data.index += 1;
        let decided = cluster.state.decide(&action.step, &cluster.data).unwrap();
        let decision = decided.inspect_err(|refused| {
            let differs = matches!(refused, Refused::Differs { .. });
            assert!(!differs, "a copy is not the original: {refused}");
        })?;
        self.unchecked |= decision.changed;
        if decision.changed
            && let Step::Activate { handoff, attempt, frozen } = &action.step
        {
            let staged = cluster.staged.remove(&(handoff.from.clone(), *attempt));
            cluster.data.rows.extend(staged.unwrap_or_default());
            cluster.data.revision = cluster.data.revision.max(frozen.revision);
        }
        Ok(decision.done)
    }

    fn hear_witnesses(&self, action: &Action) -> Result<(), Refused> {
        let confirms = |c: &RingCluster| self.clusters[&c.id].state.confirms(&action.step, &c.id);
        match self.clusters[&action.at].state.witnesses(&action.step, &action.at) {
            Witnesses::None => Ok(()),
            Witnesses::All(all) => match all.into_iter().find(|cluster| !confirms(cluster)) {
                Some(cluster) => Err(Refused::NotConfirmed(cluster.id)),
                None => Ok(()),
            },
            Witnesses::Any(any) if any.iter().any(confirms) => Ok(()),
            Witnesses::Any(_) => Err(Refused::NobodyConfirms),
        }
    }

    /// A client writes a key, wherever it is served; nowhere while it is frozen.
    pub(super) fn write(&mut self, chance: &mut Chance) {
        let key = self.keys[chance.below(self.keys.len())].clone();
        let serving = self.clusters.iter_mut().find(|(id, c)| c.state.serves(id, &key));
        let Some((id, cluster)) = serving else { return };
        self.counter += 1;
        let value = self.counter;
        let old = cluster.data.rows.get(&key).map(|(rev, value)| (*rev, hash(&key, *value)));
        // One in five is a delete.
        let new = (!chance.one_in(5)).then_some(value);
        cluster.data.revision += 1;
        if let Some(outgoing) = cluster.state.sending(id, &key) {
            outgoing.count_change(&key, old, new.map(|value| hash(&key, value)));
            let position = cluster.state.log_change(LOG_MAX);
            assert_eq!(position, cluster.log.len() as u64);
            cluster.log.push(key.clone());
        }
        let revision = cluster.data.revision;
        match new {
            Some(value) => {
                cluster.data.rows.insert(key.clone(), (revision, value));
                self.written.insert(key, value);
            }
            None => {
                cluster.data.rows.remove(&key);
                self.written.remove(&key);
            }
        }
    }

    // --- What a cluster's leader does by itself ----------------------------------------------------

    /// A portion of counting, copying or deleting, somewhere.
    pub(super) fn work(&mut self, chance: &mut Chance) {
        let (own, state) = self.view(chance);
        let Some(change) = state.change else { return };
        let epoch = change.next.ring().epoch;
        for (to, outgoing) in &change.outgoing {
            let handoff = Handoff { epoch, from: own.clone(), to: to.clone() };
            match (&outgoing.sending, &outgoing.counted) {
                (Sending::Sending, Counted::UpTo(last)) => {
                    self.count(handoff, outgoing.attempt, last.clone());
                }
                (Sending::Moved, _) => self.delete_moved(&handoff),
                _ => {}
            }
        }
        for (from, incoming) in &change.incoming {
            let handoff = Handoff { epoch, from: from.clone(), to: own.clone() };
            if let Receipt::Receiving { cursor, .. } = &incoming.receipt {
                self.copy(&handoff, incoming.opened, cursor);
            }
            if incoming.garbage > 0 {
                let cluster = self.clusters.get_mut(&own).unwrap();
                let slot = cluster.state.incoming_slot(&handoff).unwrap();
                slot.garbage = slot.garbage.saturating_sub(PORTION as u64);
            }
        }
    }

    fn count(&mut self, handoff: Handoff, attempt: Attempt, from: Bytes) {
        let rows = &self.clusters[&handoff.from].data.rows;
        let to = rows.keys().filter(|key| **key > from).nth(PORTION).cloned();
        let at = handoff.from.clone();
        let step = Step::Count { handoff, attempt, from, to };
        // Refused when the attempt has just ended.
        let _ = self.take(&Action { at, step });
    }

    fn moves(&self, handoff: &Handoff) -> impl Fn(&Bytes) -> bool + use<> {
        let state = self.clusters[&handoff.from].state.clone();
        let handoff = handoff.clone();
        move |key| state.way_out(&handoff.from, key) == Some(&handoff.to)
    }

    fn copy(&mut self, handoff: &Handoff, attempt: Attempt, cursor: &Cursor) {
        let source = &self.clusters[&handoff.from];
        let Some(outgoing) = source.state.outgoing(handoff) else { return };
        if outgoing.attempt != attempt || !outgoing.logs() {
            return;
        }
        let moves = self.moves(handoff);
        let (keys, to): (Vec<Bytes>, Cursor) = match cursor {
            Cursor::Records { after } => {
                let rows = source.data.rows.keys().filter(|key| *key > after && moves(key));
                let keys: Vec<Bytes> = rows.take(PORTION).cloned().collect();
                let to = match keys.last() {
                    Some(last) => Cursor::Records { after: last.clone() },
                    None => Cursor::Changes { position: outgoing.start },
                };
                (keys, to)
            }
            Cursor::Answers { .. } => (Vec::new(), Cursor::Changes { position: outgoing.start }),
            Cursor::Changes { position } => {
                let (begin, end) = (*position as usize, source.log.len());
                let end = end.min(begin + PORTION);
                let keys = source.log[begin..end].iter().filter(|key| moves(key)).cloned();
                (keys.collect(), Cursor::Changes { position: end as u64 })
            }
        };
        let rows: Vec<_> =
            keys.into_iter().map(|k| (k.clone(), source.data.rows.get(&k).copied())).collect();
        self.import(handoff, attempt, cursor, &to, rows);
    }

    fn import(
        &mut self,
        handoff: &Handoff,
        attempt: Attempt,
        from: &Cursor,
        to: &Cursor,
        rows: Vec<(Bytes, Option<(Revision, u64)>)>,
    ) {
        let cluster = self.clusters.get_mut(&handoff.to).unwrap();
        cluster.state.check_import(handoff, attempt, from, to, &handoff.to).unwrap();
        let staged = cluster.staged.entry((handoff.from.clone(), attempt)).or_default();
        for (key, row) in rows {
            match row {
                Some(row) => drop(staged.insert(key, row)),
                None => drop(staged.remove(&key)),
            }
        }
        let mut tally = Tally::default();
        staged.iter().for_each(|(key, (_, value))| tally.add_record(hash(key, *value)));
        cluster.state.end_import(handoff, to, tally, 0);
    }

    fn delete_moved(&mut self, handoff: &Handoff) {
        let moves = self.moves(handoff);
        let cluster = self.clusters.get_mut(&handoff.from).unwrap();
        let moved: Vec<Bytes> =
            cluster.data.rows.keys().filter(|key| moves(key)).take(PORTION).cloned().collect();
        for key in moved {
            let (_, value) = cluster.data.rows.remove(&key).unwrap();
            let slot = cluster.state.outgoing_slot(handoff).unwrap();
            slot.tally.remove_record(hash(&key, value));
        }
    }

    // --- What must hold ----------------------------------------------------------------------------

    /// No key is served twice, and what is served is what was written last. Only steps can break that.
    pub(super) fn check(&mut self) {
        if !std::mem::take(&mut self.unchecked) {
            return;
        }
        for key in &self.keys {
            let serving = self.clusters.iter().filter(|(id, c)| c.state.serves(id, key));
            let found: Vec<_> = serving.collect();
            assert!(found.len() <= 1, "{key:?} is served twice");
            for (id, cluster) in found {
                let value = cluster.data.rows.get(key).map(|(_, value)| *value);
                assert_eq!(value, self.written.get(key).copied(), "{key:?} at {id}");
            }
        }
    }

    /// Every key is where the ring says, and nowhere else.
    pub(super) fn check_end(&self, ring: &Ring) {
        let table = RingTable::new(ring.clone()).unwrap();
        for (id, cluster) in &self.clusters {
            for key in cluster.data.rows.keys() {
                assert_eq!(table.owner(key).unwrap().id, *id, "{key:?} was left behind");
            }
        }
        for (key, value) in &self.written {
            let owner = &self.clusters[&table.owner(key).unwrap().id];
            assert_eq!(owner.data.rows.get(key).map(|(_, v)| *v), Some(*value), "{key:?}");
        }
    }
}
