//! The driver at work: looks at the clusters, decides, proposes, and looks again.
//!
//! One task, no locks: each cluster is asked by itself, so that one that is slow or away holds up
//! nobody else, and every answer is followed by a decision ([`super::driver`]). What is remembered
//! from one decision to the next may be lost at any moment: views, clocks of what is frozen, pauses.
//!
//! **Who acts.** Several drivers see the same and would all propose the same step: each repeat is an
//! entry in a log. So a driver acts at once only on what is its own, and on the rest once it has been left
//! undone for a while ([`Role`]).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep_until};

use crate::backoff::Backoff;
use crate::client_error::ClientError;
use crate::handoff::{Attempt, Done, Handoff, Refused, RingState, Step};
use crate::ring::{Ring, RingCluster};
use crate::types::{ClusterId, Epoch};

use super::clusters::Clusters;
use super::driver::{
    Action, Goal, Hints, frozen, is_called_off, is_hot, left_at_the_end, next_actions,
};
use super::fate::Awaited;
use super::progress::Progress;
use super::scene::{Scene, Views, mentioned};

mod role;
#[cfg(test)]
mod tests;

pub use role::Role;

/// How long an attempt may be frozen before the destination is asked to refuse it: well above the tens of
/// milliseconds that a healthy destination takes, well below the deadline of clients that wait it out.
const FROZEN_MAX: Duration = Duration::from_secs(2);

/// Between two looks at a cluster when something is frozen or nearly: a look takes about as long.
const LOOK_HOT: Duration = Duration::from_millis(3);

/// Between two looks while keys are copied, counted or deleted, which takes seconds.
const LOOK_WARM: Duration = Duration::from_millis(100);

/// After a look or a step that failed, doubled up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(50);

/// The longest pause: a cluster that comes back is noticed within a second.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long nothing may be heard of a cluster before a change is called off without it, if it was to join, or is
/// finished without it, if it leaves and others serve all that it had: far above an election, or one that only
/// stumbles would have to be brought back later.
const GONE_AFTER: Duration = Duration::from_secs(10);

/// Why a driver stopped before the change did.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DriveError {
    /// It was to be called off.
    #[error("the change cannot be called off: {0}")]
    TooLate(Refused),
    /// Nothing happened for too long. The change goes on when what is in the way is gone.
    #[error("nothing has moved for {} s: {trouble}", .after.as_secs())]
    Stalled {
        /// For how long.
        after: Duration,
        /// What is in the way, as far as it is known.
        trouble: String,
    },
}

/// What came of something that was under way.
enum Event {
    Looked(ClusterId, u64, Result<RingState, ClientError>),
    Stepped(Action, Result<Done, ClientError>),
}

type Pending<'a> = FuturesUnordered<Pin<Box<dyn Future<Output = Event> + Send + 'a>>>;

/// What is known of one cluster.
struct Contact {
    cluster: RingCluster,
    look_at: Instant,
    looking: bool,
    /// Whether it has answered, or was found to be away: before that nobody knows what it is in.
    asked: bool,
    /// Counts the steps that it took: a look that began before the last one is out of date.
    steps: u64,
    /// Whether its view is newer than its last step.
    fresh: bool,
    backoff: Backoff,
    trouble: Option<String>,
    /// Since when there has been nothing but trouble.
    troubled_since: Option<Instant>,
}

/// A driver. Dropping it loses nothing.
pub struct Drive<'a, C> {
    clusters: &'a C,
    role: Role,
    hints: Hints,
    /// Give up when nothing has moved for so long.
    stalled_after: Option<Duration>,
    gone_after: Duration,
    /// Goes on until this cluster is out of its change.
    absent: Option<ClusterId>,
    /// Goes on until this change is over.
    awaited: Option<Awaited>,
    contacts: BTreeMap<ClusterId, Contact>,
    views: Views,
    moved_at: Instant,
    /// The last step that was refused since anything moved.
    refusal: Option<String>,
    frozen_since: BTreeMap<(Handoff, Attempt), Instant>,
    /// What this driver itself has asked to freeze, and when: to tell how long it was.
    freezing: BTreeMap<Handoff, Instant>,
    wanted_since: Vec<(Action, Instant)>,
    under_way: Vec<Action>,
    pending: Pending<'a>,
}

impl<'a, C: Clusters> Drive<'a, C> {
    /// A driver that knows of these clusters, and learns of others from them.
    pub fn new(
        clusters: &'a C,
        known: impl IntoIterator<Item = RingCluster>,
        role: Role,
        goal: Goal,
    ) -> Self {
        let mut drive = Self {
            clusters,
            role,
            hints: Hints::new(goal),
            stalled_after: None,
            gone_after: GONE_AFTER,
            absent: None,
            awaited: None,
            contacts: BTreeMap::new(),
            views: Views::new(),
            moved_at: Instant::now(),
            refusal: None,
            frozen_since: BTreeMap::new(),
            freezing: BTreeMap::new(),
            wanted_since: Vec::new(),
            under_way: Vec::new(),
            pending: FuturesUnordered::new(),
        };
        known.into_iter().for_each(|cluster| drive.meet(cluster));
        drive
    }

    /// Gives up with [`DriveError::Stalled`] when nothing has moved for so long. Never, unless set.
    #[must_use]
    pub fn stalled_after(mut self, after: Duration) -> Self {
        self.stalled_after = Some(after);
        self
    }

    /// Goes on until this cluster, too, is out of a change that ended while it was away, or that others finished
    /// without it.
    #[must_use]
    pub fn until_back(mut self, cluster: ClusterId) -> Self {
        self.absent = Some(cluster);
        self
    }

    /// Goes on until this change is over, and no longer: what follows it is others' to drive.
    #[must_use]
    pub fn awaiting(mut self, change: Option<Awaited>) -> Self {
        self.awaited = change;
        self
    }

    /// The change that it was told to await, with what it has seen of its end.
    pub fn awaited(&self) -> Option<&Awaited> {
        self.awaited.as_ref()
    }

    /// Does not wait so long for what is gone.
    #[cfg(test)]
    pub(super) fn gone_after(mut self, after: Duration) -> Self {
        self.gone_after = after;
        self
    }

    /// How many handoffs besides the pivot may send at once; as many as [`Hints::new`] has unless set.
    #[must_use]
    pub fn at_once(mut self, handoffs: usize) -> Self {
        self.hints.at_once_max = handoffs;
        self
    }

    /// Drives until no change is under way and the sequencer has recorded that, or the change that it awaits
    /// is followed by another; returns the scene then. Tells `watch` after everything that happened. Safe to
    /// cancel.
    pub async fn run(
        &mut self,
        mut watch: impl FnMut(Option<&Progress>, &Views),
    ) -> Result<Scene, DriveError> {
        loop {
            self.look();
            if !self.is_followed() {
                self.act();
            }
            if let Some(scene) = self.end() {
                return Ok(scene);
            }
            watch(Progress::of(&self.views).as_ref(), &self.views);
            let wake_at = self.wake_at()?;
            tokio::select! {
                Some(event) = self.pending.next() => self.take(event)?,
                () = sleep_until(wake_at) => {}
            }
        }
    }

    fn meet(&mut self, cluster: RingCluster) {
        match self.contacts.get_mut(&cluster.id) {
            Some(contact) => contact.cluster = cluster,
            None => {
                let contact = Contact {
                    cluster: cluster.clone(),
                    look_at: Instant::now(),
                    looking: false,
                    asked: false,
                    steps: 0,
                    fresh: false,
                    backoff: Backoff::new(PAUSE_FIRST, PAUSE_MAX),
                    trouble: None,
                    troubled_since: None,
                };
                self.contacts.insert(cluster.id, contact);
            }
        }
    }

    // --- Looking ---------------------------------------------------------------------------------

    fn look(&mut self) {
        let now = Instant::now();
        for (id, contact) in &mut self.contacts {
            if contact.looking || contact.look_at > now {
                continue;
            }
            contact.looking = true;
            let (clusters, id) = (self.clusters, id.clone());
            let (cluster, steps) = (contact.cluster.clone(), contact.steps);
            self.pending.push(Box::pin(async move {
                let view = clusters.view(&cluster).await;
                Event::Looked(id, steps, view)
            }));
        }
    }

    fn take(&mut self, event: Event) -> Result<(), DriveError> {
        match event {
            Event::Looked(id, steps, Ok(view)) => self.seen(id, steps, view),
            Event::Looked(id, _, Err(error)) => {
                let contact = self.contact(&id);
                contact.looking = false;
                contact.asked = true;
                self.trouble(&id, &error);
            }
            Event::Stepped(action, result) => return self.stepped(action, result),
        }
        Ok(())
    }

    fn seen(&mut self, id: ClusterId, steps: u64, view: RingState) {
        let contact = self.contact(&id);
        contact.looking = false;
        contact.asked = true;
        if contact.steps != steps {
            return;
        }
        contact.fresh = true;
        contact.trouble = None;
        contact.troubled_since = None;
        contact.look_at = Instant::now() + PAUSE_MAX;
        if self.views.get(&id) != Some(&view) {
            self.contact(&id).backoff.reset();
            self.moved_at = Instant::now();
            self.refusal = None;
            self.views.insert(id, view);
            if let Some(awaited) = &mut self.awaited {
                awaited.see(&self.views);
            }
            for cluster in mentioned(&self.views).into_values() {
                if self.concerns(&cluster.id) {
                    self.meet(cluster);
                }
            }
        }
        self.hurry();
    }

    /// Puts the next looks as near as the views ask for now. At all clusters and not only at the one that was
    /// seen: the other side of a handoff may have been seen when nothing was hot yet, and what is frozen
    /// would wait for it.
    fn hurry(&mut self) {
        let due = Instant::now() + self.interval();
        for contact in self.contacts.values_mut().filter(|contact| contact.fresh) {
            contact.look_at = contact.look_at.min(due);
        }
    }

    /// A source's leader looks only at those that its handoffs concern, or with many clusters all
    /// would look at all.
    fn concerns(&self, id: &ClusterId) -> bool {
        let Role::Source(own) = &self.role else { return true };
        let Scene::Changing(transition) = Scene::of(&self.views) else { return true };
        let (pivot, pair) = transition.pivot();
        let ours = transition.plan.iter().filter(|pair| pair.from == *own);
        let mut concerned = ours.chain(pair).flat_map(|pair| [&pair.from, &pair.to]);
        *id == pivot || id == own || concerned.any(|concerned| concerned == id)
    }

    fn interval(&self) -> Duration {
        let leads = !matches!(self.role, Role::Helper | Role::Onlooker);
        let answers = |id: &ClusterId| self.contacts.get(id).is_some_and(|c| c.trouble.is_none());
        if leads && is_hot(&self.views, &self.hints, answers) { LOOK_HOT } else { LOOK_WARM }
    }

    fn contact(&mut self, id: &ClusterId) -> &mut Contact {
        self.contacts.get_mut(id).expect("only known clusters are asked, and none is forgotten")
    }

    fn trouble(&mut self, id: &ClusterId, error: &ClientError) {
        tracing::debug!(cluster = %id, %error, "a cluster could not be asked");
        let contact = self.contact(id);
        contact.fresh = false;
        contact.trouble = Some(format!("cluster {id}: {error}"));
        contact.troubled_since.get_or_insert_with(Instant::now);
        contact.look_at = Instant::now() + contact.backoff.pause();
    }

    // --- Acting ----------------------------------------------------------------------------------

    fn act(&mut self) {
        let now = Instant::now();
        self.time_frozen(now);
        self.look_for_gone();
        let actions = next_actions(&self.views_without_gone(), &self.hints);
        self.wanted_since.retain(|(wanted, _)| actions.contains(wanted));
        for action in actions {
            let Some(patience) = self.patience(&action) else { continue };
            let known = self.wanted_since.iter().find(|(wanted, _)| *wanted == action);
            let since = known.map_or(now, |(_, since)| *since);
            if known.is_none() {
                self.wanted_since.push((action.clone(), now));
            }
            let ready = self.contacts.get(&action.at).is_some_and(|contact| contact.fresh);
            if ready && since + patience <= now && !self.under_way.contains(&action) {
                self.propose(action);
            }
        }
    }

    /// What is known, but for what clusters said of themselves that are gone and that nobody waits for: those that
    /// were to join a change which is called off, and those that left by one which all others have finished. Their
    /// last word would be waited for. Somebody who begins to look now sees no more, so it is as safe.
    fn views_without_gone(&self) -> Cow<'_, Views> {
        let gone = match Scene::of(&self.views) {
            Scene::Changing(transition) if is_called_off(&self.views, &transition, &self.hints) => {
                self.gone_joiners(&transition.old)
            }
            Scene::Changing(transition) => left_at_the_end(&self.views, &transition, &self.hints),
            Scene::Reverting(ring) => self.gone_joiners(&ring),
            Scene::NoRing | Scene::Quiet { .. } => BTreeSet::new(),
        };
        if !self.views.keys().any(|id| gone.contains(id)) {
            return Cow::Borrowed(&self.views);
        }
        let there = self.views.iter().filter(|(id, _)| !gone.contains(*id));
        Cow::Owned(there.map(|(id, view)| (id.clone(), view.clone())).collect())
    }

    fn gone_joiners(&self, stays: &Ring) -> BTreeSet<ClusterId> {
        let gone = self.hints.gone.iter();
        gone.filter(|id| stays.cluster(id).is_none()).cloned().collect()
    }

    fn look_for_gone(&mut self) {
        let is_silent = |contact: &Contact| {
            contact.troubled_since.is_some_and(|since| since.elapsed() >= self.gone_after)
        };
        let silent = self.contacts.iter().filter(|(_, contact)| is_silent(contact));
        self.hints.gone = silent.map(|(id, _)| id.clone()).collect();
    }

    /// Who calls a change off begins with that at once; the rest is anybody's.
    fn patience(&self, action: &Action) -> Option<Duration> {
        match action.step {
            Step::Cancel { epoch } if self.hints.goal == (Goal::Abort { epoch }) => {
                Some(Duration::ZERO)
            }
            _ => self.role.patience(action),
        }
    }

    fn time_frozen(&mut self, now: Instant) {
        let frozen: BTreeSet<_> = frozen(&self.views).into_iter().collect();
        self.frozen_since.retain(|key, _| frozen.contains(key));
        self.hints.overdue.retain(|key| frozen.contains(key));
        for key in frozen {
            let since = *self.frozen_since.entry(key.clone()).or_insert(now);
            if now - since > FROZEN_MAX && self.hints.overdue.insert(key.clone()) {
                let (handoff, attempt) = key;
                tracing::warn!(%handoff, attempt, "frozen for too long; taking the attempt back");
            }
        }
    }

    fn propose(&mut self, action: Action) {
        tracing::debug!(cluster = %action.at, step = action.step.name(), "proposing");
        self.under_way.push(action.clone());
        match &action.step {
            Step::Freeze { handoff, .. } => {
                self.freezing.insert(handoff.clone(), Instant::now());
            }
            Step::Settle { epoch } => self.tell_left(&action.at, *epoch),
            _ => {}
        }
        let clusters = self.clusters;
        let cluster = self.contact(&action.at).cluster.clone();
        self.pending.push(Box::pin(async move {
            let result = clusters.step(&cluster, &action.step).await;
            Event::Stepped(action, result)
        }));
    }

    /// Says who is left behind when the sequencer settles.
    fn tell_left(&self, sequencer: &ClusterId, epoch: Epoch) {
        let settling = self.views.get(sequencer).map_or(&[][..], |view| &view.settling[..]);
        for cluster in settling.iter().filter(|cluster| self.hints.gone.contains(&cluster.id)) {
            let cluster = &cluster.id;
            tracing::warn!(%cluster, epoch, "it left and is lost; others serve all that it had");
        }
    }

    fn stepped(
        &mut self,
        action: Action,
        result: Result<Done, ClientError>,
    ) -> Result<(), DriveError> {
        self.under_way.retain(|under_way| *under_way != action);
        self.wanted_since.retain(|(wanted, _)| *wanted != action);
        let contact = self.contact(&action.at);
        contact.steps += 1;
        contact.fresh = false;
        // At once, also where looks have failed: it has just answered. If not, this is put off below.
        contact.look_at = Instant::now();
        match result {
            Ok(done) => {
                self.moved_at = Instant::now();
                self.tell_moved(&action.step, &done);
            }
            Err(ClientError::StepRefused(refused)) => return self.refused(&action, *refused),
            Err(error) => {
                // If it answers looks, the trouble is forgotten with the next one.
                let (at, name) = (&action.at, action.step.name());
                self.refusal = Some(format!("cluster {at} cannot {name}: {error}"));
                self.trouble(&action.at, &error);
            }
        }
        Ok(())
    }

    /// Says how long nobody served what has moved now, a little more than it was in truth: from asking
    /// the source to the destination's answer.
    fn tell_moved(&mut self, step: &Step, done: &Done) {
        let (Step::Activate { handoff, .. }, Done::Active { tally, .. }) = (step, done) else {
            return;
        };
        if let Some(since) = self.freezing.remove(handoff) {
            let (keys, frozen_ms) = (tally.records, since.elapsed().as_secs_f64() * 1e3);
            tracing::info!(%handoff, keys, frozen_ms, "the keys have moved");
        }
    }

    /// Usually somebody else was faster, and the next look shows it.
    fn refused(&mut self, action: &Action, refused: Refused) -> Result<(), DriveError> {
        let at = &action.at;
        tracing::debug!(cluster = %at, step = action.step.name(), %refused, "refused");
        match (&action.step, &refused) {
            (Step::Activate { handoff, attempt, .. }, Refused::Differs { .. }) => {
                tracing::error!(%handoff, attempt, %refused, "the copy is not the original; copying again");
                self.hints.overdue.insert((handoff.clone(), *attempt));
            }
            (Step::Cancel { epoch }, Refused::TooLate)
                if self.hints.goal == (Goal::Abort { epoch: *epoch }) =>
            {
                return Err(DriveError::TooLate(refused));
            }
            _ => {}
        }
        self.refusal = Some(format!("cluster {at} refuses to {}: {refused}", action.step.name()));
        let contact = self.contact(at);
        contact.look_at = Instant::now() + contact.backoff.pause();
        Ok(())
    }

    // --- Ending ----------------------------------------------------------------------------------

    /// Whether a later change is under way, or over, than the one that is awaited.
    fn is_followed(&self) -> bool {
        let scene = || Scene::of(&self.views_without_gone());
        self.awaited.as_ref().is_some_and(|awaited| awaited.is_followed(&scene()))
    }

    fn end(&self) -> Option<Scene> {
        if !self.under_way.is_empty() {
            return None;
        }
        let scene = Scene::of(&self.views_without_gone());
        if let Some(awaited) = &self.awaited {
            if awaited.is_followed(&scene) {
                return Some(scene);
            }
            if awaited.is_ahead_of(&scene) {
                return None;
            }
        }
        if !self.contacts.values().all(|contact| contact.asked) {
            return None;
        }
        let is_out = |id| self.views.get(id).is_some_and(|view| view.change.is_none());
        if !self.absent.as_ref().is_none_or(is_out) {
            return None;
        }
        let settled = matches!(scene, Scene::Quiet { settled: Some(true), .. });
        // Who knows of nobody has not seen that there is no ring.
        let seen = || !self.views.is_empty() && self.contacts.values().all(|contact| contact.fresh);
        (settled || (scene == Scene::NoRing && seen())).then_some(scene)
    }

    fn wake_at(&self) -> Result<Instant, DriveError> {
        let now = Instant::now();
        // With nothing due, at the next look of a cluster that is being looked at.
        let mut wake_at = now + PAUSE_MAX;
        let waiting = self.contacts.values().filter(|contact| !contact.looking);
        for contact in waiting {
            wake_at = wake_at.min(contact.look_at.max(now));
        }
        for (action, since) in &self.wanted_since {
            if let Some(patience) = self.patience(action)
                && *since + patience > now
            {
                wake_at = wake_at.min(*since + patience);
            }
        }
        if let Some(after) = self.stalled_after
            && self.moved_at + after <= now
        {
            return Err(DriveError::Stalled { after, trouble: self.trouble_text() });
        }
        Ok(wake_at)
    }

    fn trouble_text(&self) -> String {
        let troubles = self.contacts.values().filter_map(|contact| contact.trouble.as_deref());
        let known: Vec<&str> = troubles.chain(self.refusal.as_deref()).collect();
        if known.is_empty() {
            return "the clusters neither copy nor delete keys".to_owned();
        }
        known.join("; ")
    }
}
