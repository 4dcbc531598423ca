//! What drivers send: steps that make sense to somebody who has read one or more clusters.
//!
//! Two readings of the same rules. [`sendable`] is for safety: any step that some driver could think of
//! on seeing this state of one cluster, however old what it knows of others may be. All of that stays
//! on its way for ever and may arrive at any time, any number of times, in any order: as many drivers
//! as you like, each as slow as you like. [`next_entries`] is for progress: what one driver that has
//! just started and reads every cluster now would do to bring the change to its end. If that were ever
//! nothing, the change would be stuck.

use distrib_kv_store::handoff::{
    Change, Counted, Handoff, Incoming, Outgoing, Receipt, Sending, Step, pairs,
};
use distrib_kv_store::ring::{Ring, RingCluster};
use distrib_kv_store::types::{ClusterId, Epoch};

use super::cluster::{Cluster, Entry, Reply};
use super::mutation::Mutation;
use super::pages::Replica;
use super::scenario::Scenario;
use super::shared::Shared;

/// Something that a driver has sent or has learned, and that is never forgotten.
#[derive(Debug, Clone, PartialEq, Hash)]
pub enum Sent {
    /// A step on its way to a cluster.
    Step { to: usize, entry: Shared<Entry> },
    /// A replica's snapshot, of which pages may be read and imported.
    Replica(Shared<Replica>),
    /// The cluster was seen to have cancelled the change to this epoch.
    Cancelled { cluster: usize, epoch: Epoch },
    /// The cluster was seen to live by the ring of this epoch, with no change under way.
    Rests { cluster: usize, epoch: Epoch },
}

pub type SentSet = Shared<Vec<Shared<Sent>>>;

impl Sent {
    /// The cluster to which it goes; none for what is only known.
    pub fn to(&self, scenario: &Scenario) -> Option<usize> {
        match self {
            Self::Step { to, .. } => Some(*to),
            Self::Replica(replica) => Some(scenario.place(&replica.handoff.to)),
            Self::Cancelled { .. } | Self::Rests { .. } => None,
        }
    }
}

/// Collects steps.
struct Steps<'a> {
    scenario: &'a Scenario,
    sent: Vec<(usize, Step)>,
}

impl Steps<'_> {
    fn send(&mut self, to: &ClusterId, step: Step) {
        self.sent.push((self.scenario.place(to), step));
    }

    fn send_all<'b>(&mut self, to: impl IntoIterator<Item = &'b ClusterId>, step: &Step) {
        to.into_iter().for_each(|id| self.send(id, step.clone()));
    }
}

/// What drivers may send on seeing this state of `cluster`, and this reply of it.
pub fn sendable(scenario: &Scenario, cluster: &Cluster, reply: &Reply) -> Vec<Shared<Sent>> {
    let mut steps = Steps { scenario, sent: Vec::new() };
    match &cluster.ring.change {
        None => start(&mut steps, cluster),
        Some(change) => go_on(&mut steps, cluster, change),
    }
    if let Reply::WillRefuse(handoff, refused) = reply {
        let step = Step::Thaw { handoff: handoff.clone(), refused: *refused };
        steps.send(&handoff.from, step);
    }
    let step = |(to, step)| Sent::Step { to, entry: entry(step) };
    let mut sent: Vec<_> = steps.sent.into_iter().map(step).collect();
    let replicas = cluster.replicas(&scenario.rules).into_iter();
    sent.extend(replicas.map(|replica| Sent::Replica(Shared::new(replica))));
    sent.extend(learned(scenario, cluster));
    sent.into_iter().map(Shared::new).collect()
}

fn entry(step: Step) -> Shared<Entry> {
    Shared::new(Entry::Step(Shared::by_text(step)))
}

fn learned(scenario: &Scenario, cluster: &Cluster) -> Option<Sent> {
    let place = scenario.place(&cluster.id);
    match &cluster.ring.change {
        None => Some(Sent::Rests { cluster: place, epoch: cluster.ring.epoch() }),
        Some(change) if change.is_cancelled() => {
            Some(Sent::Cancelled { cluster: place, epoch: change.next.ring().epoch })
        }
        Some(_) => None,
    }
}

/// At a cluster where no change is under way.
fn start(steps: &mut Steps<'_>, cluster: &Cluster) {
    let ring = cluster.ring.ring.ring();
    if ring.sequencer.as_ref() != Some(&cluster.id) {
        return;
    }
    let awaited = cluster.ring.settling.iter().map(|member| &member.id);
    // One that was to come, and never joined, must hear that the change is off.
    let outside: Vec<_> = awaited.filter(|id| ring.cluster(id).is_none()).cloned().collect();
    steps.send_all(&outside, &Step::Join { ring: Box::new(ring.clone()) });
    let Some(next) = steps.scenario.next(ring) else { return };
    join(steps, ring, &next);
    steps.send(&cluster.id, begin(ring, &next));
}

/// Clusters that are new in the next ring take the present one.
fn join(steps: &mut Steps<'_>, ring: &Ring, next: &Ring) {
    let new = next.clusters.iter().filter(|member| ring.cluster(&member.id).is_none());
    let new: Vec<_> = new.map(|member| member.id.clone()).collect();
    steps.send_all(&new, &Step::Join { ring: Box::new(ring.clone()) });
}

fn begin(ring: &Ring, next: &Ring) -> Step {
    let plan = pairs(ring, next);
    Step::Begin { ring: Box::new(ring.clone()), next: Box::new(next.clone()), plan }
}

/// At a cluster that takes part in a change.
fn go_on(steps: &mut Steps<'_>, cluster: &Cluster, change: &Change) {
    let (ring, next) = (cluster.ring.ring.ring(), change.next.ring());
    let members = members(ring, next);
    if ring.sequencer.as_ref() == Some(&cluster.id) {
        // Others follow only what the sequencer has begun.
        steps.send_all(&members, &begin(ring, next));
    }
    if steps.scenario.cancels {
        steps.send_all(&members, &Step::Cancel { epoch: next.epoch });
    }
    steps.send(&cluster.id, Step::Finish { epoch: next.epoch });
    for (to, outgoing) in &change.outgoing {
        let handoff = Handoff { epoch: next.epoch, from: cluster.id.clone(), to: to.clone() };
        seen_source(steps, handoff, outgoing);
    }
    for (from, incoming) in &change.incoming {
        let handoff = Handoff { epoch: next.epoch, from: from.clone(), to: cluster.id.clone() };
        seen_destination(steps, &members, handoff, incoming);
    }
}

fn seen_source(steps: &mut Steps<'_>, handoff: Handoff, outgoing: &Outgoing) {
    let attempt = outgoing.attempt;
    let (from, to) = (handoff.from.clone(), handoff.to.clone());
    if attempt < steps.scenario.attempts {
        steps.send(&from, Step::Prepare { handoff: handoff.clone(), attempt: attempt + 1 });
    }
    if attempt > 0 {
        steps.send(&to, Step::Refuse { handoff: handoff.clone(), attempt });
    }
    if outgoing.sending == Sending::Idle {
        return;
    }
    let start = outgoing.start;
    steps.send(&to, Step::Open { handoff: handoff.clone(), attempt, start });
    for step in count(steps.scenario, &handoff, outgoing) {
        steps.send(&from, step);
    }
    let early = steps.scenario.rules.breaks(Mutation::FreezeUncounted);
    if outgoing.counted == Counted::All || early {
        steps.send(
            &from,
            Step::Freeze { handoff: handoff.clone(), attempt, floors_bytes_max: None },
        );
    }
    if let Some(frozen) = &outgoing.frozen {
        let frozen = Box::new(frozen.clone());
        steps.send(&to, Step::Activate { handoff: handoff.clone(), attempt, frozen });
    }
    if outgoing.sending == Sending::Frozen && steps.scenario.rules.breaks(Mutation::ThawByTimer) {
        steps.send(&from, Step::Thaw { handoff, refused: attempt });
    }
}

/// The next stretch of records to count: to the end, or also to the first key only.
fn count(scenario: &Scenario, handoff: &Handoff, outgoing: &Outgoing) -> Vec<Step> {
    let Counted::UpTo(from) = &outgoing.counted else { return Vec::new() };
    let first = (scenario.counts_twice && from.is_empty()).then(|| scenario.keys[0].clone());
    let ends = [None].into_iter().chain(first.map(Some));
    let step = |to| Step::Count {
        handoff: handoff.clone(),
        attempt: outgoing.attempt,
        from: from.clone(),
        to,
    };
    ends.map(step).collect()
}

fn seen_destination(
    steps: &mut Steps<'_>,
    members: &[ClusterId],
    handoff: Handoff,
    incoming: &Incoming,
) {
    let from = handoff.from.clone();
    let highest = incoming.opened.max(incoming.refused);
    if incoming.receipt == Receipt::Active {
        let (attempt, tally) = (incoming.opened, incoming.tally);
        if steps.scenario.cancels {
            steps.send_all(members, &Step::Resume { epoch: handoff.epoch });
        }
        return steps.send(&from, Step::Release { handoff, attempt, tally });
    }
    if highest > 0 && highest < steps.scenario.attempts {
        steps.send(&from, Step::Prepare { handoff: handoff.clone(), attempt: highest + 1 });
    }
    if incoming.refused > 0 {
        steps.send(&from, Step::Thaw { handoff, refused: incoming.refused });
    }
}

/// All clusters that a change concerns.
pub fn members(ring: &Ring, next: &Ring) -> Vec<ClusterId> {
    let members = distrib_kv_store::handoff::members_of_both(ring, next);
    members.into_iter().map(|member| member.id).collect()
}

/// What follows only from having seen several clusters: a change is reverted when every source has
/// cancelled it, goes on when one cluster has finished it, and is settled when everybody rests.
pub fn concluded(
    scenario: &Scenario,
    clusters: &[Shared<Cluster>],
    known: &SentSet,
) -> Vec<Shared<Sent>> {
    let knows = |fact: Sent| known.contains(&Shared::new(fact));
    let rests = |id: &ClusterId, epoch| knows(Sent::Rests { cluster: scenario.place(id), epoch });
    let cancelled =
        |id: &ClusterId, epoch| knows(Sent::Cancelled { cluster: scenario.place(id), epoch });
    let mut steps = Steps { scenario, sent: Vec::new() };
    for cluster in clusters {
        let ring = &cluster.ring;
        let Some(change) = &ring.change else {
            let is_awaiting = !ring.settling.is_empty();
            if is_awaiting
                && awaited(scenario, cluster).all(|member| rests(&member.id, ring.epoch()))
            {
                settle(&mut steps, cluster);
            }
            continue;
        };
        if !change.is_cancelled() {
            continue;
        }
        let (old, next) = (ring.ring.ring(), change.next.ring());
        if who_must_cancel(change, old).iter().all(|id| cancelled(id, next.epoch)) {
            revert(&mut steps, old, next);
        }
        if members(old, next).iter().any(|id| rests(id, next.epoch)) {
            steps.send(&cluster.id, Step::Resume { epoch: next.epoch });
        }
    }
    let step = |(to, step)| Shared::new(Sent::Step { to, entry: entry(step) });
    steps.sent.into_iter().map(step).collect()
}

/// Who must have finished before this sequencer may begin another change.
fn awaited<'a>(
    scenario: &Scenario,
    sequencer: &'a Cluster,
) -> impl Iterator<Item = &'a RingCluster> {
    let ring = &sequencer.ring;
    let leaves_behind = scenario.leaves_behind;
    let is_awaited = move |member: &&RingCluster| {
        !leaves_behind || ring.ring.ring().cluster(&member.id).is_some()
    };
    ring.settling.iter().filter(is_awaited)
}

/// All sources; in a change without handoffs all members, because each may finish it by itself.
fn who_must_cancel(change: &Change, ring: &Ring) -> Vec<ClusterId> {
    if change.plan.is_empty() {
        return members(ring, change.next.ring());
    }
    change.plan.iter().map(|pair| pair.from.clone()).collect()
}

fn revert(steps: &mut Steps<'_>, ring: &Ring, next: &Ring) {
    let members = members(ring, next);
    let ring = Ring { epoch: ring.epoch + 2, ..ring.clone() };
    steps.send_all(&members, &Step::Revert { ring: Box::new(ring) });
}

fn settle(steps: &mut Steps<'_>, cluster: &Cluster) {
    let epoch = cluster.ring.epoch();
    if !steps.scenario.rules.breaks(Mutation::SettledAtOldSequencer) {
        return steps.send(&cluster.id, Step::Settle { epoch });
    }
    let others: Vec<_> =
        steps.scenario.clusters.iter().filter(|id| **id != cluster.id).cloned().collect();
    steps.send_all(&others, &Step::Settle { epoch });
}

// --- Progress --------------------------------------------------------------------------------------

/// What one driver that reads all clusters at this moment would do next, and what clusters do by
/// themselves. It never gives up an attempt that may still come to something.
pub fn next_entries(scenario: &Scenario, clusters: &[Shared<Cluster>]) -> Vec<(usize, Entry)> {
    let mut steps = Steps { scenario, sent: Vec::new() };
    let mut entries = Vec::new();
    for (place, cluster) in clusters.iter().enumerate() {
        entries.extend(cluster.dirt().into_iter().map(|key| (place, Entry::Clean(key))));
        match &cluster.ring.change {
            None => start(&mut steps, cluster),
            Some(change) => {
                entries.extend(advance(&mut steps, clusters, cluster, change));
            }
        }
        catch_up(&mut steps, clusters, cluster);
    }
    let step = |(to, step)| (to, Entry::Step(Shared::unhashed(step)));
    entries.extend(steps.sent.into_iter().map(step));
    entries
}

/// A cluster that others have left behind: their ring tells what it has missed.
fn catch_up(steps: &mut Steps<'_>, clusters: &[Shared<Cluster>], cluster: &Cluster) {
    let ring = cluster.ring.ring.ring();
    if all_rest(steps.scenario, clusters, cluster) {
        settle(steps, cluster);
    }
    for other in clusters.iter().filter(|other| other.ring.epoch() > ring.epoch) {
        let theirs = other.ring.ring.ring();
        let concerns = ring.cluster(&cluster.id).is_some() || theirs.cluster(&cluster.id).is_some();
        if theirs.epoch == ring.epoch + 1 && cluster.ring.change.is_none() && concerns {
            steps.send(&cluster.id, begin(ring, theirs));
        }
        if theirs.epoch == ring.epoch + 2 && (Ring { epoch: ring.epoch, ..theirs.clone() }) == *ring
        {
            steps.send(&cluster.id, Step::Revert { ring: Box::new(theirs.clone()) });
        }
    }
}

/// Whether all that a sequencer waits for live by its ring, and no change is under way at them.
fn all_rest(scenario: &Scenario, clusters: &[Shared<Cluster>], cluster: &Cluster) -> bool {
    let ring = &cluster.ring;
    let rests = |id: &ClusterId| {
        let other = &clusters[scenario.place(id)].ring;
        other.change.is_none() && other.epoch() == ring.epoch()
    };
    let waits = ring.change.is_none() && !ring.settling.is_empty();
    waits && awaited(scenario, cluster).all(|member| rests(&member.id))
}

/// Brings a change forward, or back if somebody has begun to cancel it.
fn advance(
    steps: &mut Steps<'_>,
    clusters: &[Shared<Cluster>],
    cluster: &Cluster,
    change: &Change,
) -> Vec<(usize, Entry)> {
    let (ring, next) = (cluster.ring.ring.ring(), change.next.ring());
    let members = members(ring, next);
    // The sequencer may have begun before they were asked to join.
    join(steps, ring, next);
    steps.send_all(&members, &begin(ring, next));
    steps.send(&cluster.id, Step::Finish { epoch: next.epoch });
    let view = |id: &ClusterId| &clusters[steps.scenario.place(id)];
    let changes = || members.iter().filter_map(|id| view(id).ring.change_to(next.epoch));
    let active = |change: &Change| change.incoming.values().any(|i| i.receipt == Receipt::Active);
    let has_finished = |id: &ClusterId| view(id).ring.epoch() == next.epoch;
    let is_decided = changes().any(active) || members.iter().any(has_finished);
    // Between the two rings' epochs nobody can be but by having reverted this change.
    let has_reverted = |id: &ClusterId| view(id).ring.epoch() == next.epoch + 1;
    let is_cancelled = changes().any(Change::is_cancelled) || members.iter().any(has_reverted);
    let goes_back = is_cancelled && !is_decided;
    let cancelled =
        |id: &ClusterId| view(id).ring.change_to(next.epoch).is_some_and(Change::is_cancelled);
    if goes_back {
        steps.send_all(&members, &Step::Cancel { epoch: next.epoch });
        // Also when its source has reverted, and no longer tells its attempt.
        for (from, incoming) in &change.incoming {
            let handoff = Handoff { epoch: next.epoch, from: from.clone(), to: cluster.id.clone() };
            steps.send(&cluster.id, Step::Refuse { handoff, attempt: incoming.opened });
        }
        if who_must_cancel(change, ring).iter().all(cancelled) {
            revert(steps, ring, next);
        }
    } else if is_cancelled {
        steps.send_all(&members, &Step::Resume { epoch: next.epoch });
    }
    let mut entries = Vec::new();
    for to in change.outgoing.keys() {
        let handoff = Handoff { epoch: next.epoch, from: cluster.id.clone(), to: to.clone() };
        let other = &clusters[steps.scenario.place(to)];
        entries.extend(advance_handoff(steps, cluster, other, handoff, goes_back));
    }
    entries
}

fn advance_handoff(
    steps: &mut Steps<'_>,
    source: &Cluster,
    destination: &Shared<Cluster>,
    handoff: Handoff,
    goes_back: bool,
) -> Vec<(usize, Entry)> {
    let outgoing = source.ring.outgoing(&handoff).expect("the source has begun");
    let Some(incoming) = destination.ring.incoming(&handoff) else {
        if destination.ring.epoch() >= handoff.epoch
            && let Some(frozen) = &outgoing.frozen
        {
            // It has finished, so it has taken over what this source froze with.
            let (attempt, tally) = (outgoing.attempt, frozen.tally);
            steps.send(&source.id, Step::Release { handoff, attempt, tally });
        }
        return Vec::new();
    };
    if incoming.receipt == Receipt::Active {
        let (attempt, tally) = (incoming.opened, incoming.tally);
        steps.send(&source.id, Step::Release { handoff, attempt, tally });
        return Vec::new();
    }
    let highest = outgoing.attempt.max(incoming.opened).max(incoming.refused);
    if goes_back {
        steps.send(&destination.id, Step::Refuse { handoff: handoff.clone(), attempt: highest });
    }
    if incoming.refused > 0 && outgoing.attempt <= incoming.refused && outgoing.logs() {
        steps.send(&source.id, Step::Thaw { handoff, refused: incoming.refused });
        return Vec::new();
    }
    if outgoing.sending == Sending::Idle {
        steps.send(&source.id, Step::Prepare { handoff, attempt: highest + 1 });
        return Vec::new();
    }
    copy(steps, source, destination, handoff, outgoing)
}

/// Copies, and freezes and activates when everything is copied.
fn copy(
    steps: &mut Steps<'_>,
    source: &Cluster,
    destination: &Cluster,
    handoff: Handoff,
    outgoing: &Outgoing,
) -> Vec<(usize, Entry)> {
    let attempt = outgoing.attempt;
    steps.send(
        &destination.id,
        Step::Open { handoff: handoff.clone(), attempt, start: outgoing.start },
    );
    for step in count(steps.scenario, &handoff, outgoing) {
        steps.send(&source.id, step);
    }
    let mut entries = Vec::new();
    if let Some(cursor) = destination.cursor(&handoff) {
        if cursor.covers(source.ring.position) {
            steps.send(
                &source.id,
                Step::Freeze { handoff: handoff.clone(), attempt, floors_bytes_max: None },
            );
        }
        let replicas = source.replicas(&steps.scenario.rules).into_iter();
        for replica in replicas.filter(|replica| replica.handoff == handoff) {
            let import = Entry::Import { replica: Shared::unhashed(replica), from: cursor.clone() };
            entries.push((steps.scenario.place(&destination.id), import));
        }
    }
    if let Some(frozen) = &outgoing.frozen {
        let frozen = Box::new(frozen.clone());
        steps.send(&destination.id, Step::Activate { handoff, attempt, frozen });
    }
    entries
}
