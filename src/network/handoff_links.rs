//! The way to clusters that give keys to this node's: fetches the pages of handoffs.
//!
//! Every replica of the source can answer, out of its own state; none has to lead. But a replica may be
//! gone, silent, behind, or cut off from its leader for good and not know it. So nobody is relied on:
//!
//! - Who answers is asked again, over the same connection.
//! - Who is silent or cannot be reached rests for a growing while, who refuses (it has not applied the
//!   attempt yet) for a short one, and the next one is asked at once.
//! - **An answer that brings nothing makes the next replica's turn.** It looks the same from a replica
//!   that is cut off as from one that has nothing new; with turns, what the source's leader has applied
//!   is here after as many questions as there are replicas, and nobody waits for a heartbeat to reach a
//!   follower.
//!
//! Connections are [`Link`]s like those to peers, greeted for [`Purpose::Handoff`]. There are as many as
//! replicas that were asked, usually one, and none when no change of the ring is under way
//! ([`HandoffLinks::close`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::peer::connection::CallError;
use super::peer::greeting::Refusal;
use super::peer::link::{ConnectError, Link, LinkContext};
use super::peer::quiet::Quiet;
use super::peer::{PeerIdentity, Purpose};
use crate::backoff::Backoff;
use crate::handoff::{Page, PageRequest, Refused};
use crate::ring::{RingCluster, RingNode};
use crate::types::ClusterId;

/// How long a replica rests that refused: about as long as a follower's state lags behind at most, when
/// the cluster is well.
const REFUSAL_REST: Duration = Duration::from_millis(100);

/// How long a replica rests that failed, the first time ...
const FAILURE_REST_MIN: Duration = Duration::from_millis(100);

/// ... and at most, after failing many times in a row. Trying a silent one takes as long as a connection
/// may take, and handoffs stand still meanwhile: that must be rare.
const FAILURE_REST_MAX: Duration = Duration::from_secs(10);

/// Why there is no page. Asking again is always safe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The replica that was asked last does not hold the attempt, or not yet, or not any more.
    #[error("cluster {cluster} does not hand over: {refused}")]
    Refused {
        /// The source.
        cluster: ClusterId,
        /// What it said.
        refused: Refused,
    },
    /// No replica could be asked or answered; this is what became of the last one.
    #[error("no node of cluster {cluster} can be asked: {why}")]
    Unreachable {
        /// The source.
        cluster: ClusterId,
        /// Why not.
        why: String,
    },
}

/// The ways of one node to all sources. Cheap to clone; clones share the connections.
#[derive(Clone)]
pub struct HandoffLinks {
    context: LinkContext,
    sources: Arc<Mutex<HashMap<ClusterId, Arc<Source>>>>,
}

/// The replicas of one source.
struct Source {
    nodes: Vec<RingNode>,
    links: Vec<Arc<Link>>,
    turns: Mutex<Turns>,
}

impl HandoffLinks {
    /// Connects to nobody yet. The context's shutdown ends all connections.
    pub(in crate::network) fn new(context: LinkContext) -> Self {
        // Lines of its own, so that other clusters' troubles do not hide those of this one.
        let context = LinkContext { quiet: Arc::new(Quiet::default()), ..context };
        Self { context, sources: Arc::default() }
    }

    /// Asks the replicas of `source`, one after the other, until one has the page. Takes the time of a
    /// connection and of a page for each of them at most. Cancel safe.
    ///
    /// # Errors
    /// None has it, or all have failed just now and rest.
    pub async fn page(
        &self,
        source: &RingCluster,
        request: &PageRequest,
    ) -> Result<Page, SourceError> {
        let cluster = source.id.clone();
        let source = self.source(source);
        let order = source.turns().order(Instant::now());
        let why = "all of them failed a moment ago".to_owned();
        let mut error = SourceError::Unreachable { cluster: cluster.clone(), why };
        for at in order {
            match ask(&source.links[at], request).await {
                Ok(page) => {
                    source.turns().answered(at, page.to != request.cursor);
                    return Ok(page);
                }
                Err(NoPage::Refused(refused)) => {
                    source.turns().refused(at, Instant::now());
                    error = SourceError::Refused { cluster: cluster.clone(), refused };
                }
                Err(NoPage::Failed(why)) => {
                    source.turns().failed(at, Instant::now());
                    error = SourceError::Unreachable { cluster: cluster.clone(), why };
                }
            }
        }
        Err(error)
    }

    /// Closes all connections until they are needed again.
    pub fn close(&self) {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn source(&self, source: &RingCluster) -> Arc<Source> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = sources.get(&source.id)
            && known.nodes == source.nodes
        {
            return Arc::clone(known);
        }
        let fresh = Arc::new(Source::new(source, &self.context));
        sources.insert(source.id.clone(), Arc::clone(&fresh));
        fresh
    }
}

impl Source {
    fn new(source: &RingCluster, context: &LinkContext) -> Self {
        let link = |node: &RingNode| {
            let target = PeerIdentity { cluster: source.id.clone(), node_id: node.id };
            Arc::new(Link::new(context.clone(), target, node.rpc.clone(), Purpose::Handoff))
        };
        Self {
            nodes: source.nodes.clone(),
            links: source.nodes.iter().map(link).collect(),
            turns: Mutex::new(Turns::of(source.nodes.len())),
        }
    }

    fn turns(&self) -> std::sync::MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why one replica gave no page.
enum NoPage {
    Refused(Refused),
    Failed(String),
}

async fn ask(link: &Arc<Link>, request: &PageRequest) -> Result<Page, NoPage> {
    let connection = link.connection().await.map_err(|error| match error {
        ConnectError::Refused { refusal: Refusal::NoHandoff { from, .. }, .. } => {
            let handoff = request.handoff.clone();
            NoPage::Refused(Refused::UnknownHandoff { cluster: from, handoff })
        }
        error => NoPage::Failed(error.to_string()),
    })?;
    let answered = connection.call(request, link.settings().page_timeout).await;
    match answered {
        Ok(reply) => reply.map_err(NoPage::Refused),
        Err(CallError::Failed(failure)) => Err(NoPage::Failed(failure.to_string())),
        Err(error) => Err(NoPage::Failed(error.to_string())),
    }
}

/// Whose turn it is among the replicas of a source.
#[derive(Debug)]
struct Turns {
    next: usize,
    rests: Vec<Rest>,
}

/// One replica's rest, and how long it rests when it fails once more.
#[derive(Debug, Clone)]
struct Rest {
    until: Option<Instant>,
    backoff: Backoff,
}

impl Rest {
    fn until(until: Option<Instant>) -> Self {
        Self { until, backoff: Backoff::new(FAILURE_REST_MIN, FAILURE_REST_MAX) }
    }
}

impl Turns {
    fn of(replicas: usize) -> Self {
        Self { next: 0, rests: vec![Rest::until(None); replicas] }
    }

    /// Whom to ask, in this order: whoever does not rest, beginning with whose turn it is.
    fn order(&self, now: Instant) -> Vec<usize> {
        let count = self.rests.len();
        let awake = |at: &usize| self.rests[*at].until.is_none_or(|until| until <= now);
        (0..count).map(|step| (self.next + step) % count).filter(awake).collect()
    }

    fn answered(&mut self, at: usize, brought_something: bool) {
        self.rests[at] = Rest::until(None);
        self.next = if brought_something { at } else { at + 1 };
    }

    fn refused(&mut self, at: usize, now: Instant) {
        self.rests[at] = Rest::until(Some(now + REFUSAL_REST));
        self.next = at + 1;
    }

    fn failed(&mut self, at: usize, now: Instant) {
        let rest = &mut self.rests[at];
        rest.until = Some(now + rest.backoff.pause());
        self.next = at + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A replica that brings something keeps its turn; one that does not passes it on, so that one that
    /// is cut off holds nothing up.
    #[test]
    fn turns_pass_on_when_nothing_comes() {
        let (mut turns, now) = (Turns::of(3), Instant::now());
        assert_eq!(turns.order(now), [0, 1, 2]);
        turns.answered(1, true);
        assert_eq!(turns.order(now), [1, 2, 0]);
        turns.answered(1, false);
        assert_eq!(turns.order(now), [2, 0, 1]);
        turns.answered(2, false);
        assert_eq!(turns.order(now), [0, 1, 2]);
    }

    /// Who failed is left alone for longer and longer, up to a bound, and is asked again then.
    #[test]
    fn who_fails_rests() {
        let (mut turns, mut now) = (Turns::of(2), Instant::now());
        turns.failed(0, now);
        assert_eq!(turns.order(now), [1]);
        turns.refused(1, now);
        assert!(turns.order(now).is_empty());
        assert_eq!(turns.order(now + FAILURE_REST_MIN), [0, 1]);
        for _ in 0..40 {
            turns.failed(0, now);
            now += FAILURE_REST_MAX;
            assert!(turns.order(now).contains(&0));
        }
        turns.failed(0, now);
        assert_eq!(turns.order(now + FAILURE_REST_MAX - REFUSAL_REST), [1]);
        turns.answered(0, true);
        assert_eq!(turns.order(now), [0, 1]);
    }
}
