//! What the forwarder remembers of the nodes that it passes requests on to.
//!
//! Two things, so that one node in trouble costs the others nothing. **Suspects**: a node that refused
//! a connection, kept a request waiting or says that it cannot serve is asked last for a while; without
//! that, every request whose turn it is there would find out anew. **Turns**: only so many requests are
//! in flight at one node; without that, requests that wait for a paused one would pile up until no connection
//! is left for those that go elsewhere. And only so many are in flight at all nodes together: each takes an
//! open file, of which the store needs some to go on writing. Suspects have half of these at most.
//!
//! All of it is a guess that costs a detour at most. The map is bounded although its addresses come
//! from the ring and the membership only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::ring::{CLUSTERS_MAX, NODES_PER_CLUSTER_MAX};

/// How many requests are in flight at one node. HTTP/1.1 takes a connection for each; this many keep
/// a node busy.
const IN_FLIGHT_PER_NODE_MAX: usize = 128;

/// The part of all requests in flight that may be at one node, where that is less: a node in trouble
/// leaves most of them to others, and so do two.
const PART_PER_NODE: usize = 4;

/// How long a request waits for its turn. A healthy node answers all that are in flight several times
/// over meanwhile, so that a burst gets through; at any other, those that wait hold little for long.
const TURN_WAIT: Duration = Duration::from_millis(100);

/// How long a suspect is asked last. Long enough that a paused node costs few requests their first
/// attempt, short enough that a returned one is used again soon.
const SUSPECT_FOR: Duration = Duration::from_secs(5);

/// How many nodes are remembered: those of the largest ring, which take some megabytes.
const NODES_MAX: usize = CLUSTERS_MAX * NODES_PER_CLUSTER_MAX;

/// The nodes, by address.
#[derive(Debug)]
pub(super) struct Targets {
    /// For all nodes together.
    turns: Arc<Semaphore>,
    /// For all suspects together, from when they are suspects on: several nodes that keep requests waiting
    /// leave half of all turns to others. Before that it takes sixteen of them to take all there are by default.
    turns_of_suspects: Arc<Semaphore>,
    per_node_max: usize,
    nodes_max: usize,
    nodes: Mutex<HashMap<String, Target>>,
}

#[derive(Debug)]
struct Target {
    /// Held by whoever has a turn or waits for one.
    turns: Arc<Semaphore>,
    suspect_until: Option<Instant>,
}

impl Target {
    fn is_suspect(&self, now: Instant) -> bool {
        self.suspect_until.is_some_and(|until| until > now)
    }

    fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.turns) > 1
    }
}

/// Leave to have a request in flight at a node.
pub(super) struct Turn {
    _at_node: OwnedSemaphorePermit,
    _of_suspects: Option<OwnedSemaphorePermit>,
    _in_all: OwnedSemaphorePermit,
}

impl Targets {
    pub(super) fn new(in_flight_max: usize) -> Self {
        let per_node_max = IN_FLIGHT_PER_NODE_MAX.min(in_flight_max / PART_PER_NODE).max(1);
        Self::with(in_flight_max, per_node_max, NODES_MAX)
    }

    pub(super) fn with(in_flight_max: usize, per_node_max: usize, nodes_max: usize) -> Self {
        let turns = Arc::new(Semaphore::new(in_flight_max));
        let turns_of_suspects = Arc::new(Semaphore::new((in_flight_max / 2).max(1)));
        Self { turns, turns_of_suspects, per_node_max, nodes_max, nodes: Mutex::default() }
    }

    /// Puts the suspects last and leaves the order as it is otherwise.
    pub(super) fn suspects_last(&self, addresses: &mut [String], now: Instant) {
        let nodes = self.lock();
        addresses.sort_by_key(|address| nodes.get(address).is_some_and(|n| n.is_suspect(now)));
    }

    /// A turn at this node, held until it is dropped; `None` when there is none in time.
    pub(super) async fn turn(&self, address: &str, deadline: Instant) -> Option<Turn> {
        let now = Instant::now();
        let (turns, is_suspect) = self.turns_of(address, now)?;
        let suspects = is_suspect.then(|| self.turns_of_suspects.clone());
        // In this order: who waits for a node, or for a suspect's turn, holds nothing that others could use.
        let all = async {
            let at_node = turns.acquire_owned().await.ok()?;
            let of_suspects = match suspects {
                Some(suspects) => Some(suspects.acquire_owned().await.ok()?),
                None => None,
            };
            let in_all = self.turns.clone().acquire_owned().await.ok()?;
            Some(Turn { _at_node: at_node, _of_suspects: of_suspects, _in_all: in_all })
        };
        tokio::time::timeout_at(deadline.min(now + TURN_WAIT), all).await.ok()?
    }

    /// The node did not answer, or not soon, or cannot serve.
    pub(super) fn suspect(&self, address: &str) {
        self.mark(address, Some(Instant::now() + SUSPECT_FOR));
    }

    /// The node answered.
    pub(super) fn trust(&self, address: &str) {
        self.mark(address, None);
    }

    fn mark(&self, address: &str, suspect_until: Option<Instant>) {
        if let Some(node) = self.lock().get_mut(address) {
            node.suspect_until = suspect_until;
        }
    }

    /// The turns at a node, and whether that is a suspect; `None` when too many other nodes are in use.
    fn turns_of(&self, address: &str, now: Instant) -> Option<(Arc<Semaphore>, bool)> {
        let mut nodes = self.lock();
        if let Some(node) = nodes.get(address) {
            return Some((node.turns.clone(), node.is_suspect(now)));
        }
        if nodes.len() >= self.nodes_max {
            nodes.retain(|_, node| node.is_in_use() || node.is_suspect(now));
            if nodes.len() >= self.nodes_max {
                return None;
            }
        }
        let turns = Arc::new(Semaphore::new(self.per_node_max));
        nodes.insert(address.to_owned(), Target { turns: turns.clone(), suspect_until: None });
        Some((turns, false))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Target>> {
        // Every change is a single step: what a panic left behind is whole.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn sorted(targets: &Targets, now: Instant) -> Vec<String> {
        let mut addresses = ["a", "b", "c"].map(String::from);
        targets.suspects_last(&mut addresses, now);
        addresses.into()
    }

    #[tokio::test]
    async fn a_suspect_is_asked_last_until_it_answers_or_its_time_is_over() {
        let targets = Targets::new(8);
        drop(targets.turn("a", soon()).await);
        let begun = Instant::now();
        targets.suspect("a");
        assert_eq!(sorted(&targets, begun), ["b", "c", "a"]);
        assert_eq!(sorted(&targets, Instant::now() + SUSPECT_FOR), ["a", "b", "c"]);
        targets.trust("a");
        assert_eq!(sorted(&targets, begun), ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn a_turn_is_waited_for_a_moment_and_goes_on_to_the_next() {
        let targets = Targets::with(9, 1, 9);
        let first = targets.turn("a", soon()).await.unwrap();
        assert!(targets.turn("a", soon()).await.is_none());
        assert!(targets.turn("b", soon()).await.is_some(), "each node has its own");
        let second = async {
            let turn = targets.turn("a", soon());
            tokio::pin!(turn);
            assert!(futures_util::poll!(&mut turn).is_pending());
            drop(first);
            turn.await
        };
        assert!(second.await.is_some());
    }

    #[tokio::test]
    async fn all_nodes_together_have_so_many_turns() {
        let targets = Targets::with(2, 2, 9);
        let held = (targets.turn("a", soon()).await, targets.turn("b", soon()).await);
        assert!(held.0.is_some() && held.1.is_some());
        assert!(targets.turn("c", soon()).await.is_none());
        drop(held.0);
        assert!(targets.turn("c", soon()).await.is_some());
        assert!(
            targets.turn("c", soon()).await.is_some(),
            "who got none has given back its node's"
        );
    }

    /// Several nodes in trouble are as bad as one that is asked for everything.
    #[tokio::test]
    async fn suspects_get_half_of_all_turns_at_most() {
        let targets = Targets::with(4, 2, 9);
        let mut held = Vec::new();
        for address in ["a", "b"] {
            drop(targets.turn(address, soon()).await);
            targets.suspect(address);
            held.push(targets.turn(address, soon()).await.unwrap());
        }
        assert!(targets.turn("b", soon()).await.is_none());
        let healthy = (targets.turn("c", soon()).await, targets.turn("d", soon()).await);
        assert!(healthy.0.is_some() && healthy.1.is_some());
        drop(held);
        assert!(targets.turn("b", soon()).await.is_some());
    }

    #[test]
    fn one_node_never_has_all_turns_but_always_one() {
        for (in_flight_max, per_node_max) in [(1, 1), (7, 1), (48, 12), (2048, 128), (100_000, 128)]
        {
            assert_eq!(Targets::new(in_flight_max).per_node_max, per_node_max, "{in_flight_max}");
        }
    }

    #[tokio::test]
    async fn only_so_many_nodes_are_remembered_and_those_that_matter_stay() {
        let targets = Targets::with(9, 1, 2);
        let held = targets.turn("held", soon()).await;
        drop(targets.turn("suspect", soon()).await);
        targets.suspect("suspect");
        assert!(targets.turn("third", soon()).await.is_none());
        drop(held);
        assert!(targets.turn("third", soon()).await.is_some());
        assert!(targets.lock().contains_key("suspect") && !targets.lock().contains_key("held"));
    }
}
