//! Getting the ring: the first one, and newer ones, at most one request at a time however many calls
//! wait for it.
//!
//! Only a higher epoch replaces the ring in hand. An equal one confirms it; a lower one comes from a
//! node that lags and changes nothing. A refresh that fails is no error for the call that wanted it:
//! servers check ownership again and name the owner, so an old ring costs a detour at most.
//!
//! There are six reasons to refresh. A call that was told of a newer ring needs it, and waits. So does
//! one that could not reach its cluster, which may have left the ring, and one that found blank nodes or
//! strangers in its place. One whose cluster was silent until
//! its time was over wants to know for those that come after it. A ring whose time is over only wants
//! confirming, and a ring that turns out to be changing only its successor: these happen in the
//! background, and the call that found it so goes on with what it knows.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::runtime::{self, Handle};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::client_error::ClientError;
use crate::raft_node::pace::Budget;
use crate::raft_node::{Courier, RaftNode, TIMEOUT_DEFAULT};
use crate::ring::Ring;
use crate::types::{ClusterId, Epoch};

use super::endpoints::Endpoints;
use super::routes::{Hearsay, Routes};

/// How long one cluster may take to tell its ring: with one node paused, another is asked in time.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// How many clusters are asked in one refresh. All of them say the same except during a change, when
/// the first few are enough to find one that has it.
const CLUSTERS_ASKED_MAX: usize = 8;

/// How long one refresh may take with all that it asks: as long as an operation, and so as long as any
/// call may want to wait for it.
const REFRESH_TIMEOUT: Duration = TIMEOUT_DEFAULT;

/// The pause between refreshes that calls ask for because a node named a newer ring. It bounds what
/// a cluster is asked when nobody has that ring to give.
const REFRESH_PAUSE: Duration = Duration::from_millis(100);

/// When to try again after the ring could not be confirmed at the end of its time.
const CONFIRM_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How long a ring that is changing is used before it is confirmed: changes take seconds.
const CHANGING_TTL: Duration = Duration::from_secs(5);

/// The shortest time a ring is used before it is confirmed, whatever the ring says.
const TTL_MIN: Duration = Duration::from_secs(1);

/// How long several clusters may know no ring before there is none. Nodes that were all restarted just now have
/// none to tell before they have applied what is in their logs again.
const FIRST_RING_WAIT: Duration = Duration::from_secs(3);

/// The pause between two looks for the first ring.
const FIRST_RING_PAUSE: Duration = Duration::from_millis(100);

type Flight = Shared<BoxFuture<'static, ()>>;

/// The ring in hand and what it takes to get a newer one. Dropping it ends what runs in the
/// background, which for its part holds the [`Core`] only.
pub(super) struct Rings {
    core: Arc<Core>,
    /// The refreshes that no call waits for, at most one for each runtime.
    background: Mutex<Vec<(runtime::Id, AbortOnDropHandle<()>)>>,
}

struct Core {
    courier: Courier,
    seeds: Endpoints,
    routes: ArcSwap<Routes>,
    /// The refreshes under way, one for each runtime: its sockets and timers are those of the runtime that
    /// polled it first, and nobody else may rely on that being driven. Weak: a refresh belongs to
    /// those who wait for it, and ends with the last.
    flights: Mutex<Vec<(runtime::Id, WeakShared<BoxFuture<'static, ()>>)>>,
    clock: Clock,
    /// When the ring's time is over.
    due_ms: AtomicU64,
    /// Before this no refresh starts.
    not_before_ms: AtomicU64,
}

/// Milliseconds since this client was made: instants that fit an atomic.
struct Clock(Instant);

impl Clock {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn in_ms(&self, wait: Duration) -> u64 {
        self.now_ms().saturating_add(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX))
    }
}

impl Rings {
    /// Gets the first ring from whichever node answers.
    pub(super) async fn find(seeds: Endpoints, timeout: Duration) -> Result<Self, ClientError> {
        let courier = Courier::default();
        let routes = first_routes(&seeds, &courier, Budget::new(timeout)).await?;
        Ok(Self::new(courier, seeds, routes))
    }

    fn new(courier: Courier, seeds: Endpoints, routes: Routes) -> Self {
        let core = Core {
            courier,
            seeds,
            routes: ArcSwap::from_pointee(routes),
            flights: Mutex::default(),
            clock: Clock(Instant::now()),
            due_ms: AtomicU64::new(0),
            not_before_ms: AtomicU64::new(0),
        };
        core.renew();
        Self { core: Arc::new(core), background: Mutex::default() }
    }

    pub(super) fn routes(&self) -> Arc<Routes> {
        self.core.routes()
    }

    pub(super) fn courier(&self) -> &Courier {
        &self.core.courier
    }

    /// Begins to confirm the ring when its time is over. Waits for nothing.
    pub(super) fn refresh_if_due(&self) {
        if self.core.is_due() {
            self.refresh_in_background(self.routes().epoch(), None);
        }
    }

    fn refresh_in_background(&self, epoch: Epoch, address: Option<&str>) {
        if let Some(flight) = self.core.join_flight(epoch, address.map(str::to_owned)) {
            self.keep(flight);
        }
    }

    /// Lets a refresh go on that nobody waits for.
    fn keep(&self, flight: Flight) {
        let task = AbortOnDropHandle::new(tokio::spawn(flight));
        let here = Handle::current().id();
        let mut background = self.background.lock().unwrap_or_else(PoisonError::into_inner);
        // One of this runtime that still runs waits for the same refresh, and need not any more.
        background.retain(|(runtime, task)| *runtime != here && !task.is_finished());
        background.push((here, task));
    }

    /// Takes note that cluster `refused`, by the ring of `epoch`, named `named` as the owner of `key`: a
    /// node of it, at `address`, said so. Waits for nothing.
    pub(super) fn heard(
        &self,
        key: &[u8],
        (refused, address): (&ClusterId, &str),
        named: &ClusterId,
        epoch: Epoch,
    ) {
        let routes = self.routes();
        if routes.epoch() != epoch {
            return;
        }
        match routes.hearsay(key, refused, named) {
            Hearsay::Moved => self.core.set_moved(epoch, refused, named, true),
            Hearsay::NotMoved => self.core.set_moved(epoch, named, refused, false),
            Hearsay::Changing => self.refresh_in_background(epoch, Some(address)),
            Hearsay::Nothing => {}
        }
    }

    /// Tries to get a ring of at least this epoch, which the node at `address` lives by. Waits with `patience`; after
    /// that it goes on in the background.
    pub(super) async fn refresh_to(
        &self,
        epoch: Epoch,
        address: &str,
        budget: Budget,
        patience: Duration,
    ) {
        if self.routes().epoch() >= epoch {
            return;
        }
        if let Some(flight) = self.core.join_flight(epoch, Some(address.to_owned())) {
            let until = budget.deadline().min(Instant::now() + patience.min(REFRESH_TIMEOUT));
            if tokio::time::timeout_at(until, flight.clone()).await.is_err() {
                self.keep(flight);
            }
        }
    }

    /// Tries to get a newer ring than that of this epoch, from anybody.
    pub(super) async fn refresh_beyond(&self, epoch: Epoch, budget: Budget) {
        if self.routes().epoch() <= epoch {
            self.refresh(epoch.saturating_add(1), None, budget).await;
        }
    }

    /// Begins to look for a newer ring than the one in hand; who says the same may be the one that has left it.
    /// Waits for nothing.
    pub(super) fn look_for_newer(&self) {
        self.refresh_in_background(self.routes().epoch().saturating_add(1), None);
    }

    /// Asks whether the ring in hand is still in force.
    pub(super) async fn confirm(&self, budget: Budget) {
        self.refresh(self.routes().epoch(), None, budget).await;
    }

    async fn refresh(&self, epoch: Epoch, address: Option<String>, budget: Budget) {
        if let Some(flight) = self.core.join_flight(epoch, address) {
            // Out of time is the caller's own concern: its next attempt finds that out.
            let _ = tokio::time::timeout_at(budget.deadline(), flight).await;
        }
    }
}

impl Core {
    fn routes(&self) -> Arc<Routes> {
        self.routes.load_full()
    }

    /// Whether the ring's time is over; says so to one caller only, until it is time to try again.
    fn is_due(&self) -> bool {
        let due = self.due_ms.load(Ordering::Relaxed);
        if self.clock.now_ms() < due {
            return false;
        }
        let later = self.clock.in_ms(CONFIRM_AGAIN_AFTER);
        self.due_ms.compare_exchange(due, later, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// The refresh under way, or a new one; `None` when the last one ended just now.
    fn join_flight(self: &Arc<Self>, epoch: Epoch, address: Option<String>) -> Option<Flight> {
        let here = Handle::current().id();
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let mut under_way = None;
        flights.retain(|(runtime, flight)| {
            let flight = flight.upgrade().filter(|flight| flight.peek().is_none());
            let stays = flight.is_some();
            under_way = under_way.take().or(flight.filter(|_| *runtime == here));
            stays
        });
        if under_way.is_some() {
            return under_way;
        }
        if self.clock.now_ms() < self.not_before_ms.load(Ordering::Relaxed) {
            return None;
        }
        let core = self.clone();
        let flight = async move { core.refresh(epoch, address).await }.boxed().shared();
        flights.extend(flight.downgrade().map(|flight| (here, flight)));
        Some(flight)
    }

    async fn refresh(&self, epoch: Epoch, address: Option<String>) {
        let search = self.search(epoch, address);
        let found = tokio::time::timeout(REFRESH_TIMEOUT, search).await.unwrap_or(false);
        self.not_before_ms.store(self.clock.in_ms(REFRESH_PAUSE), Ordering::Relaxed);
        if found {
            self.renew();
        } else {
            tracing::debug!(epoch, "no node told a ring of this epoch");
        }
    }

    /// Asks for a ring of this epoch, first the node at `address`; whether there was one.
    async fn search(&self, epoch: Epoch, address: Option<String>) -> bool {
        let mut clients = self.routes().clients();
        let start = rand::random_range(0..clients.len().max(1));
        clients.rotate_left(start);
        clients.truncate(CLUSTERS_ASKED_MAX);
        // The seeds last: all nodes of the ring in hand may have been replaced meanwhile.
        let seeds = self.seeds.groups().into_iter().take(CLUSTERS_ASKED_MAX);
        clients.extend(seeds.map(|nodes| RaftNode::with_courier(nodes, self.courier.clone())));
        if let Some((address, client)) = address.zip(clients.first().cloned()) {
            let ring = client.with_timeout(ASK_TIMEOUT).hash_ring_of(&address).await;
            if self.take(ring, epoch) {
                return true;
            }
        }
        for client in clients {
            let ring = client.with_timeout(ASK_TIMEOUT).get_hash_ring().await;
            if self.take(ring, epoch) {
                return true;
            }
        }
        false
    }

    /// Takes a ring if it is newer. Says whether the ring in hand is of the wanted epoch then, and
    /// this answer is not from before it.
    fn take(&self, answer: Result<Ring, ClientError>, wanted: Epoch) -> bool {
        let ring = match answer {
            Ok(ring) => ring,
            Err(error) => {
                tracing::debug!(%error, "could not get the ring");
                return false;
            }
        };
        let epoch = ring.epoch;
        let current = self.routes();
        // Nothing changes into a first ring; but who says this need not be one of ours.
        let to_come =
            epoch > 0 && epoch == current.epoch() && ring.next.is_some() && !current.is_changing();
        if epoch > current.epoch() || to_come {
            match Routes::of_ring(ring, Some(&current), &self.courier) {
                Ok(routes) => self.replace(Arc::new(routes)),
                Err(error) => {
                    tracing::warn!(epoch, %error, "a node told a ring that cannot be used");
                    return false;
                }
            }
        }
        epoch >= wanted.max(current.epoch())
    }

    fn replace(&self, routes: Arc<Routes>) {
        self.routes.rcu(|current| {
            let newer = routes.is_newer_than(current);
            if newer { routes.clone() } else { current.clone() }
        });
    }

    fn set_moved(&self, epoch: Epoch, from: &ClusterId, to: &ClusterId, is_moved: bool) {
        tracing::debug!(epoch, %from, %to, is_moved, "heard of a handoff");
        self.routes.rcu(|current| match current.epoch() == epoch {
            true => Arc::new(current.with_moved(from, to, is_moved)),
            false => current.clone(),
        });
    }

    fn renew(&self) {
        let routes = self.routes.load();
        let told = Duration::from_secs(routes.ring().list_ttl_s);
        let ttl = if routes.is_changing() { told.min(CHANGING_TTL) } else { told }.max(TTL_MIN);
        self.due_ms.store(self.clock.in_ms(ttl), Ordering::Relaxed);
    }
}

/// The routes to begin with. Several clusters without a ring are asked again for a while.
async fn first_routes(
    seeds: &Endpoints,
    courier: &Courier,
    budget: Budget,
) -> Result<Routes, ClientError> {
    let give_up = Instant::now() + FIRST_RING_WAIT.min(budget.left());
    loop {
        let found = routes_told(seeds, courier, budget).await;
        let again = matches!(found, Err(ClientError::NoRing { .. }))
            && Instant::now() + FIRST_RING_PAUSE < give_up;
        if !again {
            return found;
        }
        tokio::time::sleep(FIRST_RING_PAUSE).await;
    }
}

/// The routes of the first ring that any node has.
async fn routes_told(
    seeds: &Endpoints,
    courier: &Courier,
    budget: Budget,
) -> Result<Routes, ClientError> {
    seeds.check().map_err(ClientError::Endpoints)?;
    let groups = seeds.groups();
    let mut errors = Vec::new();
    let mut answered = false;
    for nodes in &groups {
        let client = RaftNode::with_courier(nodes.clone(), courier.clone());
        match client.with_timeout(ASK_TIMEOUT.min(budget.left())).get_hash_ring().await {
            Ok(ring) if ring.epoch > 0 => return checked_routes(ring, courier),
            Ok(_) => answered = true,
            Err(error) => errors.push(error),
        }
    }
    if !answered {
        return Err(none_answered(errors));
    }
    match seeds {
        Endpoints::Clusters(clusters) => match clusters.as_slice() {
            [nodes] => Ok(sole(nodes, courier)),
            _ => Err(ClientError::NoRing { clusters: clusters.len() }),
        },
        Endpoints::Flat(nodes) => routes_of_flat(nodes, courier, budget).await,
    }
}

/// The routes of a list of addresses, one of which has no ring: if all belong to the same cluster,
/// that one is all there is; if not, another of them may have a ring.
async fn routes_of_flat(
    nodes: &[String],
    courier: &Courier,
    budget: Budget,
) -> Result<Routes, ClientError> {
    let client = RaftNode::with_courier(nodes.to_vec(), courier.clone());
    let mut clusters = BTreeSet::new();
    for address in nodes {
        let client = client.clone().with_timeout(ASK_TIMEOUT.min(budget.left()));
        // Who does not answer cannot contradict; the others decide.
        if let Ok(metrics) = client.metrics_of(address).await
            && clusters.insert(metrics.cluster)
            && let Ok(ring) = client.hash_ring_of(address).await
            && ring.epoch > 0
        {
            return checked_routes(ring, courier);
        }
    }
    match clusters.len() {
        0 | 1 => Ok(sole(nodes, courier)),
        clusters => Err(ClientError::NoRing { clusters }),
    }
}

fn sole(nodes: &[String], courier: &Courier) -> Routes {
    Routes::without_ring(RaftNode::with_courier(nodes.to_vec(), courier.clone()))
}

fn checked_routes(ring: Ring, courier: &Courier) -> Result<Routes, ClientError> {
    Routes::of_ring(ring, None, courier).map_err(ClientError::Ring)
}

/// One error for all: the list of who was tried when nobody could be reached, else the first that
/// says more.
fn none_answered(errors: Vec<ClientError>) -> ClientError {
    let mut all_tried = Vec::new();
    for error in errors {
        match error {
            ClientError::Unreachable { tried } => all_tried.extend(tried),
            other => return other,
        }
    }
    ClientError::Unreachable { tried: all_tried }
}

#[cfg(test)]
mod tests {
    use crate::ring::{RingCluster, RingNode};

    use super::*;

    /// Rings whose time is over, of a cluster whose one node accepts connections and says nothing.
    async fn overdue() -> (Rings, tokio::net::TcpListener) {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nodes = vec![silent.local_addr().unwrap().to_string()];
        let courier = Courier::default();
        let routes = sole(&nodes, &courier);
        let rings = Rings::new(courier, Endpoints::Flat(nodes), routes);
        rings.core.due_ms.store(0, Ordering::Relaxed);
        (rings, silent)
    }

    fn under_way(rings: &Rings) -> Flight {
        rings.core.flights.lock().unwrap().iter().find_map(|(_, flight)| flight.upgrade()).unwrap()
    }

    #[tokio::test]
    async fn one_refresh_at_a_time_runs_in_the_background_and_calls_join_it() {
        let (rings, silent) = overdue().await;
        rings.refresh_if_due();
        let first = under_way(&rings);
        // Connected, so it is being driven, and nobody answers.
        let _connection = silent.accept().await.unwrap();
        rings.core.due_ms.store(0, Ordering::Relaxed);
        rings.refresh_if_due();
        assert!(first.ptr_eq(&under_way(&rings)));
        assert!(first.ptr_eq(&rings.core.join_flight(9, None).unwrap()));
    }

    /// What calls itself a node may tell anything: no ring, that is changing. Every later call panicked.
    #[tokio::test]
    async fn no_ring_does_not_change() {
        let (rings, _silent) = overdue().await;
        let nodes = rings.routes().target(b"k").client.nodes();
        let node = RingNode { id: 1, http: "a:1".into(), rpc: "a:2".into() };
        let a = RingCluster { id: "a".parse().unwrap(), weight: 1.0, nodes: vec![node] };
        let first =
            Ring { epoch: 1, sequencer: Some(a.id.clone()), clusters: vec![a], ..Ring::none() };
        let strange = Ring { next: Some(Box::new(first)), ..Ring::none() };
        rings.core.take(Ok(strange), 0);
        assert!(!rings.routes().is_changing());
        assert_eq!(rings.routes().target(b"k").client.nodes(), nodes);
    }

    /// A client may be shared by runtimes, and one that nobody drives any more, or that has ended, must not keep
    /// the others from the ring.
    #[test]
    fn each_runtime_has_its_own_refresh() {
        let runtime = || runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (one, other) = (runtime(), runtime());
        let (rings, silent) = one.block_on(overdue());
        one.block_on(async {
            rings.refresh_if_due();
            let _connection = silent.accept().await.unwrap();
        });
        let stuck = under_way(&rings);
        let joined = |runtime: &runtime::Runtime| {
            runtime.block_on(async { rings.core.join_flight(9, None) }).unwrap()
        };
        assert!(joined(&one).ptr_eq(&stuck));
        let fresh = joined(&other);
        assert!(!fresh.ptr_eq(&stuck) && fresh.ptr_eq(&joined(&other)));
        // Nor does it end that of the others.
        other.block_on(async { rings.refresh_in_background(9, None) });
        one.block_on(async { tokio::task::yield_now().await });
        assert_eq!(rings.background.lock().unwrap().len(), 2);
        assert!(rings.background.lock().unwrap().iter().all(|(_, task)| !task.is_finished()));
        rings.background.lock().unwrap().clear();
        drop((stuck, fresh));
        drop(one);
        drop(joined(&other));
        assert_eq!(rings.core.flights.lock().unwrap().len(), 1, "what has ended is forgotten");
    }

    #[tokio::test]
    async fn the_refresh_in_the_background_ends_with_the_client() {
        let (rings, silent) = overdue().await;
        rings.refresh_if_due();
        let _connection = silent.accept().await.unwrap();
        let core = Arc::downgrade(&rings.core);
        drop(rings);
        // A few turns of this one thread, in which an aborted task is dropped.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(core.strong_count(), 0);
    }
}
