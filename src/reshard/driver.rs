//! What to do next, in a change of the ring: the driver's decisions.
//!
//! Pure: views in, steps out. Any number of drivers may follow it at once, with views of different
//! moments: every step is decided when it is applied ([`crate::handoff`]), so the worst that a driver
//! does with an old view is to propose what is refused. What a step may do is decided there; what this
//! file adds is the order of the steps:
//!
//! 1. The sequencer begins first, then every other cluster.
//! 2. Handoffs prepare and copy side by side, up to a limit. One of them, the **pivot**, which concerns
//!    the sequencer, freezes first; no other freezes before the pivot is active.
//! 3. When nothing is left of any handoff, all clusters finish, and the new sequencer settles.
//!
//! **Who leaves may be lost.** Once every handoff of a cluster that leaves is active, nothing depends on it: it
//! serves nothing any more, and nothing but its own release can undo that. When it does not answer for long
//! ([`Hints::gone`]), or comes back without its data, the others finish and settle without it. If it comes back
//! with it, it releases, deletes and finishes by itself, whatever ring is in force or to come then.
//!
//! **Why a pivot.** Going on and calling off are decided in different logs: a cluster may cancel while
//! elsewhere a handoff is activated, and the change could then neither be finished nor called off. So
//! both ask the same log first. Calling off begins with `Cancel` at the pivot's cluster, which refuses
//! once its handoff is frozen; going on freezes that handoff first, which is refused once it has
//! cancelled. Whoever comes second there learns it before anything else is done.
//!
//! **Frozen is short.** Nobody serves what is frozen. When the destination does not get through in time
//! ([`Hints::overdue`]) it is asked to refuse the attempt, and only its word lets the source thaw.

use std::collections::BTreeSet;

use crate::handoff::{
    ATTEMPT_JUMP_MAX, Attempt, Counted, Cursor, Handoff, Incoming, Outgoing, Pair, Receipt,
    RingState, Sending, Step,
};
use crate::ring::Ring;
use crate::types::{ClusterId, Epoch};

use super::rings::reverted;
use super::scene::{Scene, Stage, Transition, Views, left_behind, stragglers};

/// How many changes may be left to copy when a source freezes, at the first attempt: a page or two, which
/// take some milliseconds to stage ...
const FREEZE_LAG_MAX: u64 = 512;

/// ... and half as many at each further one, but never fewer than this: with values of a megabyte each is a
/// page of its own, and what is frozen for too long is thawed and copied anew.
const FREEZE_LAG_MIN: u64 = 64;

/// A source with fewer changes than this left to copy may freeze any moment.
const HOT_LAG: u64 = 4 * FREEZE_LAG_MAX;

/// How many handoffs send at once, of those that a driver sees, besides the pivot: enough that one that
/// waits for its disk does not hold up the others, few enough that serving clients stays the clusters'
/// main work.
const HANDOFFS_AT_ONCE: usize = 4;

/// Where a driver wants to get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Through the change, or out of it if it is cancelled.
    Forward,
    /// Out of the change to the ring of this epoch; through any other.
    Abort {
        /// The epoch that is being changed to.
        epoch: Epoch,
    },
}

/// What the views do not tell.
#[derive(Debug, Clone)]
pub struct Hints {
    /// Where the driver wants to get.
    pub goal: Goal,
    /// Attempts that have been frozen for too long, or that can never be activated.
    pub overdue: BTreeSet<(Handoff, Attempt)>,
    /// Clusters of which nothing has been heard for long: those that leave are not waited for.
    pub gone: BTreeSet<ClusterId>,
    /// How many handoffs besides the pivot may send at once, of those that the views show.
    pub at_once_max: usize,
}

impl Hints {
    /// Nothing is overdue, nobody gone, and the usual number at once.
    pub fn new(goal: Goal) -> Self {
        let (overdue, gone) = (BTreeSet::new(), BTreeSet::new());
        Self { goal, overdue, gone, at_once_max: HANDOFFS_AT_ONCE }
    }
}

/// A step, and the cluster to propose it to.
#[derive(Debug, Clone, PartialEq)]
pub struct Action {
    /// Where.
    pub at: ClusterId,
    /// What.
    pub step: Step,
}

fn action(at: &ClusterId, step: Step) -> Action {
    Action { at: at.clone(), step }
}

/// What to do next; nothing when all that is left is to wait, or there is nothing to do.
pub fn next_actions(views: &Views, hints: &Hints) -> Vec<Action> {
    match Scene::of(views) {
        Scene::NoRing => Vec::new(),
        Scene::Quiet { ring, .. } => {
            let back =
                stragglers(views).into_iter().flat_map(|ring| revert_stragglers(views, &ring));
            let leave = leave(views, ring.epoch);
            settle(views, &ring, hints).into_iter().chain(back).chain(leave).collect()
        }
        Scene::Reverting(ring) => {
            let mut actions = revert_stragglers(views, &ring);
            actions.extend(leave(views, ring.epoch - 2));
            actions
        }
        Scene::Changing(transition) => {
            let mut actions = change(views, &transition, hints);
            actions.extend(leave(views, transition.old.epoch));
            actions
        }
    }
}

/// The attempts that are frozen and not activated, as far as the views tell: a driver measures how long.
pub(super) fn frozen(views: &Views) -> Vec<(Handoff, Attempt)> {
    let Scene::Changing(transition) = Scene::of(views) else { return Vec::new() };
    let frozen = |pair: &Pair| {
        let outgoing = transition.outgoing(views, pair)?;
        let active = transition.is_finished(views, &pair.to)
            || transition.incoming(views, pair).is_some_and(Incoming::is_active);
        (outgoing.sending == Sending::Frozen && !active)
            .then(|| (transition.handoff(pair), outgoing.attempt))
    };
    transition.plan.iter().filter_map(frozen).collect()
}

/// Whether something is frozen, or nearly, and both sides answer: then milliseconds count.
pub(super) fn is_hot(views: &Views, hints: &Hints, answers: impl Fn(&ClusterId) -> bool) -> bool {
    let Scene::Changing(transition) = Scene::of(views) else { return false };
    let (_, pivot) = transition.pivot();
    let committed = is_committed(views, &transition, hints);
    // Who waits for the pivot to come first may wait for long.
    let may_freeze = |pair: &&Pair| committed || Some(*pair) == pivot;
    transition.plan.iter().filter(may_freeze).any(|pair| {
        let Some(outgoing) = transition.outgoing(views, pair) else { return false };
        let is_near = || left_to_copy(views, &transition, pair).is_some_and(|n| n <= HOT_LAG);
        let hot = match outgoing.sending {
            Sending::Frozen => true,
            Sending::Sending => outgoing.counted == Counted::All && is_near(),
            Sending::Idle | Sending::Moved => false,
        };
        hot && answers(&pair.from) && answers(&pair.to)
    })
}

/// How many changes the destination is behind its source, when all else is copied.
fn left_to_copy(views: &Views, transition: &Transition, pair: &Pair) -> Option<u64> {
    let end = views.get(&pair.from)?.position;
    match cursor(transition.incoming(views, pair)?)? {
        Cursor::Changes { position } => Some(end.saturating_sub(*position)),
        Cursor::Records { .. } | Cursor::Answers { .. } => None,
    }
}

// --- A change as a whole -----------------------------------------------------------------------------

fn settle(views: &Views, ring: &Ring, hints: &Hints) -> Option<Action> {
    let sequencer = ring.sequencer.as_ref()?;
    let view = views.get(sequencer).filter(|view| view.epoch() == ring.epoch)?;
    let lives_by_it = |id: &ClusterId| {
        views.get(id).is_some_and(|v| v.epoch() == ring.epoch && v.change.is_none())
    };
    // Its sequencer finished, so all that those had who left is served by members of the ring.
    let may_be_missing = |id: &ClusterId| {
        ring.cluster(id).is_none() && is_lost(views, hints, id, ring.epoch.saturating_sub(1))
    };
    let all_there = view.settling.iter().all(|c| lives_by_it(&c.id) || may_be_missing(&c.id));
    (!view.settling.is_empty() && all_there)
        .then(|| action(sequencer, Step::Settle { epoch: ring.epoch }))
}

/// Who left and was not waited for gets out of the change that it left by, also while the ring of `epoch`, which
/// came of that or is a later one, is being changed.
fn leave(views: &Views, epoch: Epoch) -> Vec<Action> {
    let mut actions = Vec::new();
    for (id, change) in left_behind(views, epoch) {
        let epoch = change.next.ring().epoch;
        if change.outgoing.values().all(Outgoing::is_over) {
            actions.push(action(id, Step::Finish { epoch }));
        }
        for (to, outgoing) in &change.outgoing {
            if let (Sending::Frozen, Some(frozen)) = (outgoing.sending, &outgoing.frozen) {
                let handoff = Handoff { epoch, from: id.clone(), to: to.clone() };
                let (attempt, tally) = (outgoing.attempt, frozen.tally);
                actions.push(action(id, Step::Release { handoff, attempt, tally }));
            }
        }
    }
    actions
}

fn change(views: &Views, transition: &Transition, hints: &Hints) -> Vec<Action> {
    let begin = begin(views, transition);
    if transition.cancelled && is_decided(views, transition) {
        return resume(views, transition);
    }
    if is_called_off(views, transition, hints) {
        let off = call_off(views, transition, hints);
        return begin.into_iter().chain(off).collect();
    }
    if !begin.is_empty() {
        return begin;
    }
    go_on(views, transition, hints)
}

/// Whether all that is left is to call the change off. Once a handoff has been activated it is too late for that:
/// who wished to has nothing left to do but to help it to its end.
pub(super) fn is_called_off(views: &Views, transition: &Transition, hints: &Hints) -> bool {
    let is_wished = hints.goal == Goal::Abort { epoch: transition.epoch() };
    (transition.cancelled || is_wished) && !is_decided(views, transition)
}

/// Whether some handoff has been activated: from there the change can only go forward.
pub(super) fn is_decided(views: &Views, transition: &Transition) -> bool {
    let moved = |pair: &Pair| {
        transition.outgoing(views, pair).is_some_and(|o| o.sending == Sending::Moved)
            || transition.incoming(views, pair).is_some_and(Incoming::is_active)
    };
    transition.plan.iter().any(moved)
        || transition.members().iter().any(|id| transition.is_finished(views, id))
}

/// Steps that were sent by hand, or by a driver that looked long ago, have cancelled the change at some
/// clusters while another activated a handoff. They go on.
fn resume(views: &Views, transition: &Transition) -> Vec<Action> {
    let epoch = transition.next.epoch;
    let cancelled = |id: &&ClusterId| {
        let stage = transition.stage(views, id);
        matches!(stage, Stage::Under(change) if change.is_cancelled())
    };
    let members = transition.members();
    members.iter().filter(cancelled).map(|id| action(id, Step::Resume { epoch })).collect()
}

/// The sequencer first: it decides. A cluster that has not even joined joins.
fn begin(views: &Views, transition: &Transition) -> Vec<Action> {
    let Transition { old, next, plan, .. } = transition;
    let begin = |id: &ClusterId| {
        let (ring, next) = (Box::new(old.clone()), Box::new(next.clone()));
        action(id, Step::Begin { ring, next, plan: plan.clone() })
    };
    let sequencer =
        old.sequencer.iter().find(|id| matches!(transition.stage(views, id), Stage::Unbegun));
    if let Some(sequencer) = sequencer {
        return vec![begin(sequencer)];
    }
    let of_cluster = |id: &ClusterId| match transition.stage(views, id) {
        Stage::Outside => Some(action(id, Step::Join { ring: Box::new(old.clone()) })),
        Stage::Unbegun => Some(begin(id)),
        Stage::Unseen | Stage::Under(_) | Stage::Finished => None,
    };
    transition.members().iter().filter_map(of_cluster).collect()
}

fn go_on(views: &Views, transition: &Transition, hints: &Hints) -> Vec<Action> {
    let (_, pivot) = transition.pivot();
    let committed = is_committed(views, transition, hints);
    let sends = |pair: &&Pair| {
        let outgoing = transition.outgoing(views, pair);
        outgoing.is_some_and(|o| matches!(o.sending, Sending::Sending | Sending::Frozen))
    };
    // What is left to do there is for its source, if that comes back.
    let is_awaited = |pair: &&Pair| !may_be_left_behind(views, transition, hints, &pair.from);
    let besides = || transition.plan.iter().filter(|p| Some(*p) != pivot).filter(is_awaited);
    let mut room = hints.at_once_max.saturating_sub(besides().filter(sends).count());
    let mut actions = Vec::new();
    for pair in pivot.into_iter().filter(is_awaited).chain(besides()) {
        let is_pivot = Some(pair) == pivot;
        let Some(next) = next_of_handoff(views, transition, pair, hints) else { continue };
        match &next.step {
            // The pivot must not wait for others that wait for it.
            Step::Prepare { .. } if !sends(&pair) && !is_pivot => {
                if room == 0 {
                    continue;
                }
                room -= 1;
            }
            Step::Freeze { .. } if !committed && !is_pivot => continue,
            _ => {}
        }
        actions.push(next);
    }
    if actions.is_empty() {
        return finish(views, transition, hints);
    }
    actions
}

/// Whether the pivot's cluster can no longer cancel, for good.
fn is_committed(views: &Views, transition: &Transition, hints: &Hints) -> bool {
    let (cluster, _) = transition.pivot();
    let mut of_cluster =
        transition.plan.iter().filter(|pair| pair.from == cluster || pair.to == cluster);
    let anybody_finished = transition.members().iter().any(|id| transition.is_finished(views, id));
    anybody_finished
        || of_cluster.any(|pair| {
            let moved = |o: &Outgoing| o.sending == Sending::Moved;
            let frozen = |o: &Outgoing| o.sending == Sending::Frozen;
            let (from, to) = (transition.outgoing(views, pair), transition.incoming(views, pair));
            let active = to.is_some_and(Incoming::is_active);
            // As a source it stays frozen from the destination's activation to its own release.
            let stays_frozen = || {
                from.is_some_and(frozen) || is_lost(views, hints, &pair.from, transition.old.epoch)
            };
            from.is_some_and(moved) || (active && (pair.to == cluster || stays_frozen()))
        })
}

/// Every cluster at once, when nothing is left anywhere but with those that leave and are gone.
fn finish(views: &Views, transition: &Transition, hints: &Hints) -> Vec<Action> {
    let is_over = |id: &ClusterId| match transition.stage(views, id) {
        Stage::Finished => true,
        Stage::Under(change) => {
            change.outgoing.values().all(Outgoing::is_over)
                && change.incoming.values().all(Incoming::is_over)
        }
        _ => false,
    };
    let is_awaited = |id: &&ClusterId| !may_be_left_behind(views, transition, hints, id);
    let members = transition.members();
    let members: Vec<&ClusterId> = members.iter().filter(is_awaited).collect();
    if !members.iter().all(|id| is_over(id)) {
        return Vec::new();
    }
    let unfinished = members.iter().filter(|id| !transition.is_finished(views, id));
    unfinished.map(|id| action(id, Step::Finish { epoch: transition.epoch() })).collect()
}

/// Whether a cluster leaves, has nothing left that another does not serve, and is gone.
fn may_be_left_behind(
    views: &Views,
    transition: &Transition,
    hints: &Hints,
    id: &ClusterId,
) -> bool {
    is_lost(views, hints, id, transition.old.epoch) && transition.has_given_all(views, id)
}

/// Whether a cluster of the ring of `epoch` is gone, or has come back without its data: it does not know that ring.
fn is_lost(views: &Views, hints: &Hints, id: &ClusterId, epoch: Epoch) -> bool {
    let is_new = |view: &RingState| view.change.is_none() && view.epoch() < epoch;
    hints.gone.contains(id) || views.get(id).is_some_and(is_new)
}

/// Clusters without which a change is as good as finished: nobody waits for them any more.
pub(super) fn left_at_the_end(
    views: &Views,
    transition: &Transition,
    hints: &Hints,
) -> BTreeSet<ClusterId> {
    let mut members = transition.members();
    members.retain(|id| !transition.is_finished(views, id));
    let left = |id: &ClusterId| may_be_left_behind(views, transition, hints, id);
    if members.iter().all(left) { members } else { BTreeSet::new() }
}

// --- One handoff -------------------------------------------------------------------------------------

/// The next step of a handoff, were it alone.
fn next_of_handoff(
    views: &Views,
    transition: &Transition,
    pair: &Pair,
    hints: &Hints,
) -> Option<Action> {
    let outgoing = transition.outgoing(views, pair)?;
    let handoff = transition.handoff(pair);
    let at_source = |step| Some(action(&pair.from, step));
    if outgoing.sending == Sending::Frozen {
        return next_of_frozen(views, transition, pair, hints);
    }
    let incoming = transition.incoming(views, pair)?;
    // The view of the source is older than that of the destination: wait for a newer one.
    if incoming.is_active() || outgoing.sending == Sending::Moved {
        return None;
    }
    let attempt = outgoing.attempt;
    let dead = incoming.refused >= attempt || incoming.opened > attempt;
    if outgoing.sending == Sending::Idle || dead {
        let highest = attempt.max(incoming.opened).max(incoming.refused);
        // Without a next number all attempts are refused for good: the change is being called off.
        let attempt = highest.checked_add(1)?.min(attempt.saturating_add(ATTEMPT_JUMP_MAX));
        return at_source(Step::Prepare { handoff, attempt });
    }
    if incoming.opened < attempt {
        if let Some(attempt) = nearer(attempt, incoming) {
            return Some(action(&pair.to, Step::Refuse { handoff, attempt }));
        }
        let start = outgoing.start;
        return Some(action(&pair.to, Step::Open { handoff, attempt, start }));
    }
    let is_close =
        || left_to_copy(views, transition, pair).is_some_and(|left| left <= freeze_lag(attempt));
    if outgoing.counted == Counted::All && is_close() {
        return at_source(Step::Freeze { handoff, attempt, floors_bytes_max: None });
    }
    None
}

/// How many changes may be left when this attempt freezes.
pub(super) fn freeze_lag(attempt: Attempt) -> u64 {
    (FREEZE_LAG_MAX >> attempt.saturating_sub(1).min(63)).max(FREEZE_LAG_MIN)
}

fn next_of_frozen(
    views: &Views,
    transition: &Transition,
    pair: &Pair,
    hints: &Hints,
) -> Option<Action> {
    let outgoing = transition.outgoing(views, pair)?;
    let (handoff, attempt) = (transition.handoff(pair), outgoing.attempt);
    let frozen = outgoing.frozen.as_ref()?;
    let release = |tally| {
        Some(action(&pair.from, Step::Release { handoff: handoff.clone(), attempt, tally }))
    };
    if transition.is_finished(views, &pair.to) {
        // It finishes only what it activated, and it activated only what was equal.
        return release(frozen.tally);
    }
    let incoming = transition.incoming(views, pair)?;
    if incoming.is_active() {
        return release(incoming.tally);
    }
    if incoming.refused >= attempt {
        let refused = incoming.refused;
        return Some(action(&pair.from, Step::Thaw { handoff, refused }));
    }
    let key = (handoff.clone(), attempt);
    let lost = incoming.opened != attempt || hints.overdue.contains(&key);
    if lost || transition.cancelled {
        let attempt = nearer(attempt, incoming).unwrap_or(attempt);
        return Some(action(&pair.to, Step::Refuse { handoff, attempt }));
    }
    let there = cursor(incoming).is_some_and(|cursor| cursor.covers(frozen.position));
    there.then(|| {
        let frozen = Box::new(frozen.clone());
        action(&pair.to, Step::Activate { handoff, attempt, frozen })
    })
}

/// The attempt to refuse first, when the source's lies too far above what the destination has seen
/// ([`ATTEMPT_JUMP_MAX`]).
fn nearer(attempt: Attempt, incoming: &Incoming) -> Option<Attempt> {
    let reach = incoming.opened.max(incoming.refused).saturating_add(ATTEMPT_JUMP_MAX);
    (attempt > reach).then_some(reach)
}

fn cursor(incoming: &Incoming) -> Option<&Cursor> {
    match &incoming.receipt {
        Receipt::Receiving { cursor, .. } => Some(cursor),
        Receipt::Waiting | Receipt::Active => None,
    }
}

// --- Calling off -------------------------------------------------------------------------------------

/// The pivot's cluster cancels first, then all others; then every destination refuses for good and
/// discards what was staged; then the old ring goes on as a new epoch, at the sequencer first.
fn call_off(views: &Views, transition: &Transition, hints: &Hints) -> Vec<Action> {
    let epoch = transition.epoch();
    let (pivot, _) = transition.pivot();
    let stage = |id: &ClusterId| transition.stage(views, id);
    let cancel = |id: &ClusterId| action(id, Step::Cancel { epoch });
    match stage(&pivot) {
        Stage::Under(change) if !change.is_cancelled() => {
            let frozen = transition.plan.iter().filter(|pair| pair.from == pivot);
            let undo = frozen.filter_map(|pair| unfreeze(views, transition, pair, hints));
            let undo: Vec<Action> = undo.collect();
            return if undo.is_empty() { vec![cancel(&pivot)] } else { undo };
        }
        Stage::Under(_) => {}
        _ => return Vec::new(),
    }
    let members = transition.members();
    let open =
        members.iter().filter(|id| matches!(stage(id), Stage::Under(c) if !c.is_cancelled()));
    let mut actions: Vec<Action> = Vec::new();
    for id in open {
        let of_cluster = transition.plan.iter().filter(|pair| pair.from == *id);
        let undo: Vec<Action> =
            of_cluster.filter_map(|pair| unfreeze(views, transition, pair, hints)).collect();
        actions.extend(if undo.is_empty() { vec![cancel(id)] } else { undo });
    }
    // Who was to join and does not answer is not waited for: it may be gone for good, and cannot freeze.
    let is_awaited = |id: &&ClusterId| {
        transition.old.cluster(id).is_some() || !matches!(stage(id), Stage::Unseen)
    };
    let mut awaited = members.iter().filter(is_awaited);
    if !awaited.all(|id| matches!(stage(id), Stage::Under(change) if change.is_cancelled())) {
        return actions;
    }
    let changes = members.iter().filter_map(|id| match stage(id) {
        Stage::Under(change) => Some((id, &change.incoming)),
        _ => None,
    });
    let mut clean = true;
    for (to, from, incoming) in
        changes.flat_map(|(to, all)| all.iter().map(move |(from, incoming)| (to, from, incoming)))
    {
        clean &= is_clean(incoming);
        actions.extend(refuse_for_good(epoch, from, to, incoming));
    }
    if clean && let Some(sequencer) = &transition.old.sequencer {
        let ring = Box::new(reverted(&transition.old));
        actions.push(action(sequencer, Step::Revert { ring }));
    }
    actions
}

/// Takes a frozen handoff of a cancelled change back. As long as nobody has cancelled, it is not touched:
/// its cluster refuses to cancel, and whoever wished to call off is told.
fn unfreeze(views: &Views, transition: &Transition, pair: &Pair, hints: &Hints) -> Option<Action> {
    let outgoing = transition.outgoing(views, pair)?;
    let is_frozen = transition.cancelled && outgoing.sending == Sending::Frozen;
    is_frozen.then(|| next_of_frozen(views, transition, pair, hints)).flatten()
}

fn is_clean(incoming: &Incoming) -> bool {
    incoming.receipt == Receipt::Waiting
        && incoming.garbage == 0
        && incoming.refused == Attempt::MAX
}

fn refuse_for_good(
    epoch: Epoch,
    from: &ClusterId,
    to: &ClusterId,
    incoming: &Incoming,
) -> Option<Action> {
    let handoff = Handoff { epoch, from: from.clone(), to: to.clone() };
    (incoming.refused < Attempt::MAX)
        .then(|| action(to, Step::Refuse { handoff, attempt: Attempt::MAX }))
}

/// The sequencer has reverted, so every source has cancelled: the others follow.
fn revert_stragglers(views: &Views, ring: &Ring) -> Vec<Action> {
    let mut actions = Vec::new();
    let follows =
        |view: &RingState| view.epoch() + 2 == ring.epoch && reverted(view.ring.ring()) == *ring;
    for (id, view) in views.iter().filter(|(_, view)| follows(view)) {
        let revert = || action(id, Step::Revert { ring: Box::new(ring.clone()) });
        let Some(change) = &view.change else {
            actions.push(revert());
            continue;
        };
        let epoch = change.next.ring().epoch;
        if !change.is_cancelled() {
            actions.push(action(id, Step::Cancel { epoch }));
        } else if change.incoming.values().all(is_clean) {
            actions.push(revert());
        } else {
            let incoming = change.incoming.iter();
            actions.extend(incoming.filter_map(|(from, i)| refuse_for_good(epoch, from, id, i)));
        }
    }
    actions
}
