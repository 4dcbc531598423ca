//! What there is to do for a cluster, given its state. Pure.

use std::collections::HashMap;

use bytes::Bytes;

use crate::handoff::{Attempt, Counted, Cursor, Handoff, Position, Receipt, RingState, Sending};
use crate::ring::RingCluster;
use crate::types::ClusterId;

/// Handoffs that follow what changes, side by side. They cost little each, and must not wait for each
/// other; but there may be thousands of clusters.
pub(super) const FOLLOWING_MAX: usize = 64;

/// A handoff that is open here, and where it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Receiving {
    pub(super) handoff: Handoff,
    pub(super) attempt: Attempt,
    pub(super) cursor: Cursor,
    /// Where the source's log of changes begins for it.
    pub(super) start: Position,
    pub(super) source: RingCluster,
}

/// The next stretch of records to count: of which handoff, after which key, and how many changes have been
/// logged for its attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) handoff: Handoff,
    pub(super) attempt: Attempt,
    pub(super) from: Bytes,
    pub(super) logged: u64,
}

/// What `own` receives from `from`, if it does. Nothing of a cancelled change: it would be thrown away.
pub(super) fn receiving(state: &RingState, own: &ClusterId, from: &ClusterId) -> Option<Receiving> {
    let change = state.change.as_ref().filter(|change| !change.is_cancelled())?;
    let incoming = change.incoming.get(from)?;
    let Receipt::Receiving { cursor, start } = &incoming.receipt else { return None };
    let (old, next) = (state.ring.ring(), change.next.ring());
    // Where the newer ring says, if it says: the older one may be out of date.
    let source = next.cluster(from).or_else(|| old.cluster(from))?.clone();
    let handoff = Handoff { epoch: next.epoch, from: from.clone(), to: own.clone() };
    let (attempt, cursor, start) = (incoming.opened, cursor.clone(), *start);
    Some(Receiving { handoff, attempt, cursor, start, source })
}

/// The stretch to count next, if one is left.
pub(super) fn next_count(state: &RingState, own: &ClusterId) -> Option<Stretch> {
    let change = state.change.as_ref()?;
    let epoch = change.next.ring().epoch;
    change.outgoing.iter().find_map(|(to, outgoing)| match &outgoing.counted {
        Counted::UpTo(last) if outgoing.sending == Sending::Sending => Some(Stretch {
            handoff: Handoff { epoch, from: own.clone(), to: to.clone() },
            attempt: outgoing.attempt,
            from: last.clone(),
            logged: state.position.saturating_sub(outgoing.start),
        }),
        _ => None,
    })
}

/// The handoffs that have left something here to delete.
pub(super) fn to_clean(state: &RingState, own: &ClusterId) -> Vec<Handoff> {
    let Some(change) = &state.change else { return Vec::new() };
    let epoch = change.next.ring().epoch;
    let moved = change
        .outgoing
        .iter()
        .filter(|(_, outgoing)| outgoing.sending == Sending::Moved && outgoing.tally.records > 0);
    let given = moved.map(|(to, _)| Handoff { epoch, from: own.clone(), to: to.clone() });
    let dead = change.incoming.iter().filter(|(_, incoming)| incoming.garbage > 0);
    let taken = dead.map(|(from, _)| Handoff { epoch, from: from.clone(), to: own.clone() });
    given.chain(taken).collect()
}

/// Whose turn it is to be received from, when more are open than may be at once.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// When each was started last, by a count of starts.
    started: HashMap<ClusterId, u64>,
    starts: u64,
}

impl Turns {
    /// The sources to begin or go on with, out of those that are not received from already.
    ///
    /// Those whose records and answers are here go first and need no place: they may be frozen, and then
    /// nobody serves their keys. The others share `at_once` places. Who has waited longest gets one; a
    /// job gives its place up when its source is out of reach.
    pub(super) fn next_sources(
        &mut self,
        state: &RingState,
        own: &ClusterId,
        runs: impl Fn(&ClusterId) -> bool,
        at_once: usize,
    ) -> Vec<ClusterId> {
        let incoming = state.change.iter().flat_map(|change| change.incoming.keys());
        let open = incoming.filter_map(|from| receiving(state, own, from));
        let (following, copying): (Vec<_>, Vec<_>) =
            open.partition(|open| matches!(open.cursor, Cursor::Changes { .. }));
        let mut chosen = self.choose(following, &runs, FOLLOWING_MAX);
        chosen.extend(self.choose(copying, &runs, at_once));
        for from in &chosen {
            self.starts += 1;
            self.started.insert(from.clone(), self.starts);
        }
        chosen
    }

    fn choose(
        &self,
        open: Vec<Receiving>,
        runs: &impl Fn(&ClusterId) -> bool,
        at_once: usize,
    ) -> Vec<ClusterId> {
        let sources = open.into_iter().map(|open| open.handoff.from);
        let (running, mut waiting): (Vec<_>, Vec<_>) = sources.partition(runs);
        waiting.sort_by_key(|from| self.started.get(from).copied());
        waiting.truncate(at_once.saturating_sub(running.len()));
        waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::{Change, Course, Incoming, Outgoing};
    use crate::ring::{Ring, RingNode, RingTable};

    fn id(text: &str) -> ClusterId {
        text.parse().unwrap()
    }

    fn ring(epoch: u64, clusters: &[&str], rpc: &str) -> Ring {
        let node = RingNode { id: 1, http: String::new(), rpc: rpc.into() };
        let nodes = vec![node];
        let cluster = |name: &&str| RingCluster { id: id(name), weight: 1.0, nodes: nodes.clone() };
        let clusters: Vec<_> = clusters.iter().map(cluster).collect();
        Ring { epoch, sequencer: Some(clusters[0].id.clone()), clusters, ..Ring::none() }
    }

    /// At x: a to d give keys, y gets some; `a` is being removed.
    fn changing() -> RingState {
        let table = |ring| RingTable::new(ring).unwrap();
        let mut state = RingState::with_ring(table(ring(1, &["a", "b", "c", "d", "x"], "old:1")));
        let next = ring(2, &["b", "c", "d", "x", "y"], "new:1");
        state.change = Some(Change {
            next: std::sync::Arc::new(table(next)),
            plan: Vec::new(),
            course: Course::Open,
            outgoing: [(id("y"), Outgoing::default())].into(),
            incoming: ["a", "b", "c", "d"].map(|from| (id(from), Incoming::default())).into(),
        });
        state
    }

    fn change(state: &mut RingState) -> &mut Change {
        state.change.as_mut().unwrap()
    }

    fn receive(state: &mut RingState, from: &str, cursor: Cursor) {
        let incoming = change(state).incoming.get_mut(&id(from)).unwrap();
        incoming.opened = 3;
        incoming.receipt = Receipt::Receiving { cursor, start: 0 };
    }

    #[test]
    fn what_is_open_is_received_from_where_the_newer_ring_says() {
        let (mut state, x) = (changing(), id("x"));
        assert_eq!(receiving(&state, &x, &id("b")), None);
        receive(&mut state, "a", Cursor::start());
        receive(&mut state, "b", Cursor::start());
        let open = receiving(&state, &x, &id("b")).unwrap();
        let handoff = Handoff { epoch: 2, from: id("b"), to: id("x") };
        assert_eq!((open.handoff, open.attempt, open.cursor), (handoff, 3, Cursor::start()));
        assert_eq!(open.source.nodes[0].rpc, "new:1");
        assert_eq!(receiving(&state, &x, &id("a")).unwrap().source.nodes[0].rpc, "old:1");
        change(&mut state).incoming.get_mut(&id("b")).unwrap().receipt = Receipt::Active;
        assert_eq!(receiving(&state, &x, &id("b")), None);
        change(&mut state).course = Course::Cancelled;
        assert_eq!(receiving(&state, &x, &id("a")), None);
    }

    #[test]
    fn only_what_is_sent_and_not_counted_is_counted() {
        let (mut state, x) = (changing(), id("x"));
        state.position = 10;
        assert_eq!(next_count(&state, &x), None);
        let outgoing = change(&mut state).outgoing.get_mut(&id("y")).unwrap();
        outgoing.attempt = 2;
        outgoing.start = 3;
        outgoing.sending = Sending::Sending;
        outgoing.counted = Counted::UpTo("k".into());
        let handoff = Handoff { epoch: 2, from: id("x"), to: id("y") };
        let stretch = Stretch { handoff, attempt: 2, from: "k".into(), logged: 7 };
        assert_eq!(next_count(&state, &x), Some(stretch));
        change(&mut state).outgoing.get_mut(&id("y")).unwrap().counted = Counted::All;
        assert_eq!(next_count(&state, &x), None);
    }

    #[test]
    fn only_what_moved_and_what_is_dead_is_cleaned() {
        let (mut state, x) = (changing(), id("x"));
        let outgoing = change(&mut state).outgoing.get_mut(&id("y")).unwrap();
        outgoing.tally.records = 5;
        outgoing.sending = Sending::Frozen;
        assert_eq!(to_clean(&state, &x), []);
        change(&mut state).outgoing.get_mut(&id("y")).unwrap().sending = Sending::Moved;
        // Also of an attempt before the one that is open.
        receive(&mut state, "b", Cursor::start());
        change(&mut state).incoming.get_mut(&id("b")).unwrap().garbage = 1;
        let handoff = |from, to| Handoff { epoch: 2, from: id(from), to: id(to) };
        assert_eq!(to_clean(&state, &x), [handoff("x", "y"), handoff("b", "x")]);
    }

    /// Who follows changes never waits for who copies, and who waits longest comes first.
    #[test]
    fn places_go_round() {
        let (mut state, x, mut turns) = (changing(), id("x"), Turns::default());
        for from in ["a", "b", "c", "d"] {
            receive(&mut state, from, Cursor::start());
        }
        let nobody = |_: &ClusterId| false;
        assert_eq!(turns.next_sources(&state, &x, nobody, 2), [id("a"), id("b")]);
        let only =
            |wanted: &'static [&str]| move |from: &ClusterId| wanted.contains(&from.as_str());
        assert_eq!(turns.next_sources(&state, &x, only(&["a", "b"]), 2), []);
        assert_eq!(turns.next_sources(&state, &x, only(&["a"]), 2), [id("c")]);
        assert_eq!(turns.next_sources(&state, &x, only(&["c"]), 2), [id("d")]);
        assert_eq!(turns.next_sources(&state, &x, only(&["c", "d"]), 3), [id("a")]);
        receive(&mut state, "b", Cursor::Changes { position: 1 });
        assert_eq!(turns.next_sources(&state, &x, only(&["c", "d"]), 2), [id("b")]);
    }
}
