//! What somebody who wants the ring changed does: look, check, begin, watch.
//!
//! Everything that can be found wrong is found before the first step, so that a refusal leaves all
//! clusters as they were. The order of a beginning: the new cluster is formed if its nodes are blank,
//! joins the ring in force, which it refuses unless it is empty, and then the sequencer begins. Its word
//! decides; from then on the change goes on by itself ([`super::service`]), and whoever asked for it
//! only watches, and helps out where nobody else drives.

mod survey;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use crate::client_error::ClientError;
use crate::cluster_manager::{self, InstallError, ManagerError};
use crate::handoff::{Refused, Step};
use crate::metrics::{NodeMetrics, NodeState, Sizes};
use crate::network::error::Outcome;
use crate::ring::{Ring, RingCluster, RingError, RingNode};
use crate::types::{ClusterId, Epoch};

use super::clusters::{Clusters, HttpClusters};
use super::driver::{Goal, is_decided};
use super::fate::{Awaited, Fate};
use super::plan::{Holdings, Plan};
use super::progress::Progress;
use super::rings::{Request, RequestError, check_weight, next_ring};
use super::run::{Drive, DriveError, Role};
use super::scene::{Scene, Transition, Views};

use survey::SURVEY_TIMEOUT;
pub use survey::{Survey, survey};

/// How long to wait for the last change, or the first ring, to be recorded as finished: its sequencer
/// does that by itself within a second.
const SETTLE_WAIT: Duration = Duration::from_secs(10);

/// Between two looks while waiting for that.
const SETTLE_LOOK: Duration = Duration::from_millis(100);

/// When nothing has moved for so long, whoever watches is told what is in the way, and let go. Longer
/// than elections, restarts and a failed attempt take.
const STALLED_AFTER: Duration = Duration::from_secs(60);

/// A change of the ring, as it is asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A new cluster, whose nodes run.
    Add {
        /// Its id, which its nodes were started with.
        id: ClusterId,
        /// The HTTP and peer addresses of all its nodes.
        nodes: Vec<(String, String)>,
        /// Its share relative to the others.
        weight: f32,
    },
    /// A cluster leaves.
    Remove(ClusterId),
    /// A cluster gets another share.
    Weight(ClusterId, f32),
}

/// What became of the wish for a change.
#[derive(Debug, Clone, PartialEq)]
pub enum Begun {
    /// It has begun: from which ring to which.
    Change(Transition),
    /// This ring, which is in force everywhere, is what was asked for already. Nothing was proposed.
    AlreadySo(Ring),
}

/// Why a change was not begun, or did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Nobody knows of a ring.
    #[error("no cluster can be asked: {0}")]
    Nobody(String),
    /// There is no such ring.
    #[error("{0}; nothing was changed")]
    Request(#[from] RequestError),
    /// One at a time.
    #[error(
        "a change to the ring of epoch {epoch} is under way; no other was begun. `admin migration status` shows it"
    )]
    UnderWay {
        /// The epoch that is being changed to.
        epoch: Epoch,
    },
    /// There is nothing to resume or to call off.
    #[error("no change of the ring is under way")]
    NothingUnderWay,
    /// The sequencer has not recorded the last one.
    #[error(
        "the ring of epoch {epoch} is not known to be in force everywhere ({trouble}); nothing was changed, try again shortly"
    )]
    Unsettled {
        /// The epoch in force.
        epoch: Epoch,
        /// Who does not answer, as far as it is known.
        trouble: String,
    },
    /// A cluster of the ring does not answer, so the change would come to a halt.
    #[error(
        "cluster {cluster} cannot be asked: {message}; the ring was not changed. Start its nodes again, with their data: \
         what moves has to be copied from them, and they have to learn of it"
    )]
    Unreachable {
        /// The cluster.
        cluster: ClusterId,
        /// What happened.
        message: String,
    },
    /// A node of the new cluster does not answer.
    #[error("{0}; all nodes of a new cluster must answer; the ring was not changed")]
    NodeUnreachable(String),
    /// A node is not what it was said to be.
    #[error("the node at {http} {message}; nothing was changed")]
    WrongNode {
        /// Where it was asked.
        http: String,
        /// What it is.
        message: String,
    },
    /// The new cluster could not be formed.
    #[error("cluster {cluster} could not be formed: {source}; the ring was not changed")]
    Form {
        /// The cluster.
        cluster: ClusterId,
        /// Why.
        source: ManagerError,
    },
    /// The new cluster is not fit.
    #[error(transparent)]
    Members(#[from] InstallError),
    /// The new cluster has data, or a ring of its own.
    #[error(
        "cluster {0} holds keys or lives by a ring: only an empty cluster can be added; the ring was not changed"
    )]
    NotEmpty(ClusterId),
    /// A cluster refused to begin.
    #[error("cluster {cluster} refuses: {refused}; the ring was not changed")]
    Refused {
        /// The cluster.
        cluster: ClusterId,
        /// Why.
        refused: Box<Refused>,
    },
    /// Whether it was begun is not known.
    #[error(
        "cluster {cluster}: {error}; `admin migration status` shows whether the change has begun"
    )]
    Doubt {
        /// The cluster.
        cluster: ClusterId,
        /// What happened.
        error: ClientError,
    },
    /// The change is still under way.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// Somebody called the change off.
    #[error("the change was called off: the old ring goes on as epoch {epoch}")]
    CalledOff {
        /// The epoch in force.
        epoch: Epoch,
    },
    /// The change is over, and others have followed, before anything was seen of how it ended.
    #[error(
        "the change to the ring of epoch {epoch} is over, but not known to be done or called off: by now epoch {now} is in force. `admin ring show` shows it"
    )]
    Unknown {
        /// The epoch that was changed to.
        epoch: Epoch,
        /// The epoch in force.
        now: Epoch,
    },
    /// The ring breaks a rule.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// What a change would move.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// The ring after it.
    pub next: Ring,
    /// Its handoffs; none when nothing would move.
    pub plan: Plan,
    /// What the sources hold now.
    pub holdings: BTreeMap<ClusterId, Holdings>,
}

/// What a change would move; changes nothing.
pub async fn outlook(
    http: &HttpClusters,
    addresses: &[Vec<String>],
    request: &Request,
) -> Result<Outlook, ChangeError> {
    let seen = survey(http, addresses).await?;
    let scene = Scene::of(&seen.views);
    let ring = scene.ring().ok_or(RequestError::NoRing)?;
    let next = match next_ring(ring, request) {
        Err(RequestError::NothingToDo) => Ring { epoch: ring.epoch + 1, ..ring.clone() },
        other => other?,
    };
    let plan = Plan::new(ring, &next)?;
    let gives = |cluster: &&RingCluster| {
        plan.handoffs.iter().any(|handoff| handoff.pair.from == cluster.id)
    };
    let mut holdings = BTreeMap::new();
    for (cluster, answer) in ask_sizes(http, ring.clusters.iter().filter(gives)).await {
        let held = answer.map_err(|error| unreachable(&cluster, &error))?;
        holdings.insert(cluster, held);
    }
    Ok(Outlook { next, plan, holdings })
}

/// What the clusters hold that answer.
pub async fn holdings(http: &HttpClusters, seen: &Survey) -> BTreeMap<ClusterId, Holdings> {
    let answers = ask_sizes(http, seen.clusters.values()).await;
    answers.into_iter().filter_map(|(id, answer)| Some((id, answer.ok()?))).collect()
}

async fn ask_sizes(
    http: &HttpClusters,
    clusters: impl Iterator<Item = &RingCluster>,
) -> Vec<(ClusterId, Result<Holdings, ClientError>)> {
    let ask = |cluster: &RingCluster| {
        let (id, client) = (cluster.id.clone(), http.client(cluster).with_timeout(SURVEY_TIMEOUT));
        async move {
            let view = client.handoffs(Sizes::Counted).await;
            let held = view.map(|view| Holdings {
                keys: view.keys.unwrap_or(0),
                bytes: view.disk_bytes.unwrap_or(0),
            });
            (id, held)
        }
    };
    join_all(clusters.map(ask)).await
}

/// Begins a change. Refused, the ring has not changed; a new cluster may have been formed, and have joined,
/// already: that only lets it be added later. Whoever asks again for what has been done is not refused: an
/// answer may have been lost, and a script may say how things are to be without a look at how they are.
///
/// Cancelled in its middle, the change may have begun: it then goes on by itself.
pub async fn begin(
    http: &HttpClusters,
    addresses: &[Vec<String>],
    change: &Change,
) -> Result<Begun, ChangeError> {
    let seen = settled(http, addresses).await?;
    let scene = Scene::of(&seen.views);
    let ring = scene.ring().ok_or(RequestError::NoRing)?;
    if is_so(ring, change)? {
        return Ok(Begun::AlreadySo(ring.clone()));
    }
    let silent = ring.clusters.iter().find(|cluster| !seen.views.contains_key(&cluster.id));
    if let Some(cluster) = silent {
        let (cluster, message) = (cluster.id.clone(), seen.trouble());
        return Err(ChangeError::Unreachable { cluster, message });
    }
    let next = match change {
        Change::Remove(id) => next_ring(ring, &Request::Remove(id.clone()))?,
        Change::Weight(id, weight) => next_ring(ring, &Request::Weight(id.clone(), *weight))?,
        Change::Add { id, nodes, weight } => {
            let added = new_cluster(id, nodes, *weight).await?;
            let next = next_ring(ring, &Request::Add(added.clone()))?;
            form_if_blank(&added).await?;
            join(http, addresses, &added, ring).await?;
            next
        }
    };
    let sequencer = ring.sequencer.as_ref().and_then(|id| ring.cluster(id));
    let sequencer = sequencer.ok_or(RingError::Sequencer)?;
    let begun = Transition::new(ring, &next, &Views::new());
    let (ring, plan) = (Box::new(ring.clone()), begun.plan.clone());
    let begin = Step::Begin { ring, next: Box::new(next), plan };
    propose(http, sequencer, &begin).await?;
    Ok(Begun::Change(begun))
}

/// Whether a ring is what a change asks for. A cluster that is not in it has not been removed: more likely
/// its name is misspelt.
fn is_so(ring: &Ring, change: &Change) -> Result<bool, RequestError> {
    match change {
        Change::Remove(_) => Ok(false),
        Change::Weight(id, weight) => Ok(ring.cluster(id).is_some_and(|c| c.weight == *weight)),
        Change::Add { id, nodes, weight } => {
            let Some(cluster) = ring.cluster(id) else { return Ok(false) };
            let has: BTreeSet<_> = cluster.nodes.iter().map(|n| (&n.http, &n.rpc)).collect();
            let is_same = has == nodes.iter().map(|(http, rpc)| (http, rpc)).collect();
            if is_same && cluster.weight == *weight {
                return Ok(true);
            }
            Err(RequestError::Differs(id.clone()))
        }
    }
}

/// Watches the change under way to its end; as a [`Role::Helper`] it also does what nobody else does.
/// Returns the ring in force then, which may be one of a later change. `begun`: the change that is waited
/// for, if it is a certain one, and must not be called off. Safe to cancel: the change goes on. Without a
/// ring there is nothing to watch: [`RequestError::NoRing`].
pub async fn follow(
    http: &HttpClusters,
    addresses: &[Vec<String>],
    role: Role,
    begun: Option<&Transition>,
    watch: impl FnMut(Option<&Progress>, &Views),
) -> Result<Ring, ChangeError> {
    let awaited = begun.map(Awaited::change);
    let (ring, awaited) = drive(http, addresses, role, Goal::Forward, awaited, watch).await?;
    // Whoever watches whatever is under way wants to know the ring that came of it.
    let awaited = awaited.filter(|_| begun.is_some());
    awaited.map_or(Ok(()), |awaited| followed(&awaited, &ring)).map(|()| ring)
}

/// Whether a change is done that was begun; `now` is in force since it is over.
pub(super) fn followed(awaited: &Awaited, now: &Ring) -> Result<(), ChangeError> {
    match awaited.fate() {
        Some(Fate::Done) => Ok(()),
        Some(Fate::CalledOff) => Err(ChangeError::CalledOff { epoch: awaited.off().epoch }),
        None => Err(unknown(awaited, now)),
    }
}

/// Calls the change under way off: the old ring goes on as a new epoch. Returns the ring in force then,
/// which may be one of a later change. Refused with [`DriveError::TooLate`] once keys are frozen or have
/// moved; the change then goes on. Safe to cancel: what has begun goes on.
pub async fn abort(
    http: &HttpClusters,
    addresses: &[Vec<String>],
    watch: impl FnMut(Option<&Progress>, &Views),
) -> Result<Ring, ChangeError> {
    let seen = survey(http, addresses).await?;
    let scene = Scene::of(&seen.views);
    if let Scene::Changing(transition) = &scene
        && is_decided(&seen.views, transition)
    {
        return Err(too_late());
    }
    let awaited = Awaited::under_way(&scene).ok_or(ChangeError::NothingUnderWay)?;
    let goal = Goal::Abort { epoch: awaited.epoch() };
    let (ring, awaited) = drive(http, addresses, Role::Helper, goal, Some(awaited), watch).await?;
    awaited.map_or(Ok(()), |awaited| called_off(&awaited, &ring)).map(|()| ring)
}

/// Whether a change is called off that was to be; `now` is in force since it is over.
pub(super) fn called_off(awaited: &Awaited, now: &Ring) -> Result<(), ChangeError> {
    match awaited.fate() {
        Some(Fate::CalledOff) => Ok(()),
        // Whoever called off after it was decided has helped it to its end.
        Some(Fate::Done) => Err(too_late()),
        None => Err(unknown(awaited, now)),
    }
}

fn too_late() -> ChangeError {
    DriveError::TooLate(Refused::TooLate).into()
}

fn unknown(awaited: &Awaited, now: &Ring) -> ChangeError {
    ChangeError::Unknown { epoch: awaited.epoch(), now: now.epoch }
}

/// Drives until what is awaited is over, or else what is under way. Returns the ring in force then, and what
/// was awaited.
async fn drive(
    http: &HttpClusters,
    addresses: &[Vec<String>],
    role: Role,
    goal: Goal,
    awaited: Option<Awaited>,
    watch: impl FnMut(Option<&Progress>, &Views),
) -> Result<(Ring, Option<Awaited>), ChangeError> {
    let seen = survey(http, addresses).await?;
    let scene = Scene::of(&seen.views);
    if scene == Scene::NoRing {
        // They speak of no cluster, so there is nobody to look at either.
        return Err(RequestError::NoRing.into());
    }
    let mut awaited = awaited.or_else(|| Awaited::under_way(&scene));
    if let Some(awaited) = &mut awaited {
        awaited.see(&seen.views);
    }
    let drive = Drive::new(http, seen.clusters.into_values(), role, goal);
    let mut drive = drive.awaiting(awaited).stalled_after(STALLED_AFTER);
    let scene = drive.run(watch).await?;
    let ring = scene.ring().ok_or(RequestError::NoRing)?.clone();
    Ok((ring, drive.awaited().cloned()))
}

/// The clusters, once the last change is recorded as finished.
async fn settled(http: &HttpClusters, addresses: &[Vec<String>]) -> Result<Survey, ChangeError> {
    let deadline = Instant::now() + SETTLE_WAIT;
    loop {
        let seen = survey(http, addresses).await?;
        match Scene::of(&seen.views) {
            Scene::NoRing => return Err(RequestError::NoRing.into()),
            Scene::Quiet { settled: Some(true), .. } => return Ok(seen),
            Scene::Changing(transition) => {
                return Err(ChangeError::UnderWay { epoch: transition.epoch() });
            }
            Scene::Reverting(ring) => return Err(ChangeError::UnderWay { epoch: ring.epoch }),
            Scene::Quiet { ring, settled } if settled.is_none() || Instant::now() >= deadline => {
                let (epoch, trouble) = (ring.epoch, seen.trouble());
                return Err(ChangeError::Unsettled { epoch, trouble });
            }
            Scene::Quiet { .. } => sleep(SETTLE_LOOK).await,
        }
    }
}

async fn propose(
    http: &HttpClusters,
    cluster: &RingCluster,
    step: &Step,
) -> Result<(), ChangeError> {
    let error = match http.step(cluster, step).await {
        Ok(_) => return Ok(()),
        Err(error) => error,
    };
    let cluster = cluster.id.clone();
    Err(match error {
        ClientError::StepRefused(refused) => match *refused {
            Refused::ChangeUnderWay { epoch } => ChangeError::UnderWay { epoch },
            _ => ChangeError::Refused { cluster, refused },
        },
        error if error.outcome() == Outcome::NotApplied => unreachable(&cluster, &error),
        error => ChangeError::Doubt { cluster, error },
    })
}

fn unreachable(cluster: &ClusterId, error: &ClientError) -> ChangeError {
    ChangeError::Unreachable { cluster: cluster.clone(), message: error.to_string() }
}

// --- A new cluster -----------------------------------------------------------------------------------

/// The new cluster as its nodes describe themselves. Changes nothing.
async fn new_cluster(
    id: &ClusterId,
    nodes: &[(String, String)],
    weight: f32,
) -> Result<RingCluster, ChangeError> {
    // What needs no answer from anybody comes first.
    check_weight(id, weight)?;
    let addresses: Vec<String> = nodes.iter().map(|(http, _)| http.clone()).collect();
    let mut seen = Vec::new();
    for ((http, rpc), answer) in nodes.iter().zip(cluster_manager::ask_all(&addresses).await) {
        let metrics = answer.map_err(ChangeError::NodeUnreachable)?;
        if let Some(message) = mismatch(id, rpc, &metrics) {
            return Err(ChangeError::WrongNode { http: http.clone(), message });
        }
        seen.push(metrics);
    }
    let member = |node: NodeMetrics| RingNode { id: node.id, http: node.http, rpc: node.rpc };
    let mut members: Vec<RingNode> = seen.into_iter().map(member).collect();
    members.sort_by_key(|node| node.id);
    Ok(RingCluster { id: id.clone(), weight, nodes: members })
}

/// What is wrong with a node, if something is.
fn mismatch(id: &ClusterId, rpc: &str, metrics: &NodeMetrics) -> Option<String> {
    if metrics.cluster != *id {
        return Some(format!("belongs to cluster {}, not to {id}", metrics.cluster));
    }
    if metrics.rpc != rpc {
        return Some(format!("serves its peers at {}, not at {rpc}", metrics.rpc));
    }
    metrics.failed.as_ref().map(|failure| format!("has failed: {failure}"))
}

/// Blank nodes become a cluster; a cluster that exists must consist of exactly these nodes.
async fn form_if_blank(cluster: &RingCluster) -> Result<(), ChangeError> {
    let addresses: Vec<String> = cluster.nodes.iter().map(|node| node.http.clone()).collect();
    let seen = cluster_manager::ask_all(&addresses).await;
    let is_whole = |node: &NodeMetrics| {
        node.state != NodeState::Uninitialized
            && !node.joint
            && cluster.nodes.iter().all(|member| node.voters.contains(&member.id))
    };
    if !seen.iter().flatten().all(is_whole) {
        let formed = cluster_manager::form(&cluster.id, &cluster.nodes).await;
        formed.map_err(|source| ChangeError::Form { cluster: cluster.id.clone(), source })?;
    }
    match cluster_manager::survey(&addresses).await {
        Ok(_) => Ok(()),
        Err(InstallError::Unreachable(message)) => Err(ChangeError::NodeUnreachable(message)),
        Err(error) => Err(error.into()),
    }
}

/// Whether the cluster holds anything is decided here and nowhere before: a node that was started a moment
/// ago, or follows from afar, still tells of keys and of a ring that its cluster has given up.
async fn join(
    http: &HttpClusters,
    addresses: &[Vec<String>],
    added: &RingCluster,
    ring: &Ring,
) -> Result<(), ChangeError> {
    let join = Step::Join { ring: Box::new(ring.clone()) };
    let mut joined = propose(http, added, &join).await;
    if matches!(joined, Err(ChangeError::UnderWay { .. })) {
        // It was to join in a change that was called off while it was away, or left by one that ended without it:
        // it gets out of that first.
        let nodes = added.nodes.iter().map(|node| node.http.clone()).collect();
        let mut addresses = addresses.to_vec();
        addresses.push(nodes);
        let known = survey(http, &addresses).await?.clusters.into_values();
        let drive = Drive::new(http, known, Role::Helper, Goal::Forward);
        let mut drive = drive.until_back(added.id.clone()).stalled_after(STALLED_AFTER);
        drive.run(|_, _| {}).await.map_err(|error| {
            let message = format!("it is still in a change that ended without it: {error}");
            ChangeError::Unreachable { cluster: added.id.clone(), message }
        })?;
        joined = propose(http, added, &join).await;
    }
    match joined {
        Err(ChangeError::Refused { refused, .. })
            if matches!(*refused, Refused::NotEmpty(_) | Refused::Stale { .. }) =>
        {
            Err(ChangeError::NotEmpty(added.id.clone()))
        }
        done => done,
    }
}
