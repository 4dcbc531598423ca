//! What a client believes about its cluster's nodes: who they are, who leads, whom not to ask first.
//!
//! All of it is a guess that costs at most a detour when wrong. A view is immutable; the owner swaps
//! in a changed copy, so that readers never wait.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::ring::NODES_PER_CLUSTER_MAX;

/// How many requests one client has in flight at one node; further ones wait for their turn. HTTP/1.1
/// takes a connection for each, and this many keep a node's disk and a core busy, while thousands
/// would only be opened and closed again and run into the usual limit of 1024 open files. Below the
/// number of idle connections that [`HttpClient`](crate::http_client::HttpClient) keeps.
const IN_FLIGHT_PER_NODE_MAX: usize = 128;

/// The nodes of one cluster, as far as a client knows.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// All addresses known, the given ones first. Never the same twice.
    nodes: Vec<String>,
    /// The turns of requests: first of those to unlisted nodes, then of each node in order.
    gates: Vec<Arc<Semaphore>>,
    leader: Option<String>,
    /// Nodes that did not answer lately, or cannot serve, and until when they are asked last.
    suspects: Vec<(String, Instant)>,
}

impl View {
    pub(super) fn new(addresses: Vec<String>) -> Self {
        let mut nodes: Vec<String> = Vec::with_capacity(addresses.len());
        for address in addresses {
            if !nodes.contains(&address) {
                nodes.push(address);
            }
        }
        let gates = (0..=nodes.len()).map(|_| new_gate()).collect();
        Self { nodes, gates, leader: None, suspects: Vec::new() }
    }

    /// Whoever sends to `address` holds a permit of this for as long.
    pub(super) fn gate(&self, address: &str) -> Arc<Semaphore> {
        let place = self.nodes.iter().position(|node| node == address);
        self.gates[place.map_or(0, |place| place + 1)].clone()
    }

    pub(super) fn nodes(&self) -> &[String] {
        &self.nodes
    }

    pub(super) fn leader(&self) -> Option<&str> {
        self.leader.as_deref()
    }

    /// The node to ask in the given turn: turns go round, past the suspects while there are others.
    pub(super) fn at_turn(&self, turn: usize, now: Instant) -> Option<&str> {
        self.first_sane((0..self.nodes.len()).map(|step| turn.wrapping_add(step)), now)
    }

    /// The node to ask after `address` failed. Another one, unless there is no other.
    pub(super) fn after(&self, address: &str, now: Instant) -> Option<&str> {
        let start = match self.nodes.iter().position(|node| node == address) {
            Some(place) => place + 1,
            None => 0,
        };
        self.first_sane((0..self.nodes.len()).map(|step| start + step), now)
    }

    fn first_sane(&self, turns: impl Iterator<Item = usize> + Clone, now: Instant) -> Option<&str> {
        let node = |turn: usize| self.nodes[turn % self.nodes.len()].as_str();
        let sane = turns.clone().map(node).find(|address| !self.suspects_at(address, now));
        sane.or_else(|| turns.clone().map(node).next())
    }

    fn suspects_at(&self, address: &str, now: Instant) -> bool {
        self.suspects.iter().any(|(suspect, until)| suspect == address && *until > now)
    }

    /// Whether a success of `address` would change nothing here.
    pub(super) fn trusts(&self, address: &str, leads: bool) -> bool {
        (!leads || self.leader() == Some(address))
            && !self.suspects.iter().any(|(suspect, _)| suspect == address)
    }

    /// The view after `address` answered, as the leader if `leads`.
    pub(super) fn trusting(&self, address: &str, leads: bool) -> Self {
        let mut view = if leads { self.led_by(address) } else { self.clone() };
        view.suspects.retain(|(suspect, _)| suspect != address);
        view
    }

    /// The view after somebody named `address` the leader. A node not yet known is added while there
    /// is room; without room it is still asked as long as it leads.
    pub(super) fn led_by(&self, address: &str) -> Self {
        let mut view = self.clone();
        view.leader = Some(address.to_owned());
        let known = view.nodes.iter().any(|node| node == address);
        if !known && view.nodes.len() < NODES_PER_CLUSTER_MAX {
            view.nodes.push(address.to_owned());
            view.gates.push(new_gate());
        }
        view
    }

    /// The view after `address` said that it cannot: it does not lead, or not now.
    pub(super) fn not_led_by(&self, address: &str) -> Self {
        let mut view = self.clone();
        view.leader = self.leader.clone().filter(|leader| leader != address);
        view
    }

    /// The view after `address` did not answer, or cannot serve: it is asked last until then.
    pub(super) fn suspecting(&self, address: &str, now: Instant, until: Instant) -> Self {
        let mut view = self.not_led_by(address);
        // Also drops those whose time is over, which bounds the list by the number of nodes that
        // fail within that time.
        view.suspects.retain(|(suspect, until)| suspect != address && *until > now);
        view.suspects.push((address.to_owned(), until));
        view
    }
}

fn new_gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(IN_FLIGHT_PER_NODE_MAX))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn abc() -> View {
        View::new(["a", "b", "c", "a"].map(String::from).to_vec())
    }

    #[test]
    fn turns_go_round_past_suspects() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let view = abc();
        let asked: Vec<_> = (0..4).map(|turn| view.at_turn(turn, now).unwrap()).collect();
        assert_eq!(asked, ["a", "b", "c", "a"]);
        let view = view.suspecting("b", now, later);
        assert_eq!(view.at_turn(1, now), Some("c"));
        assert_eq!(view.after("a", now), Some("c"));
        assert_eq!(view.after("a", later), Some("b"), "suspicion ends");
        let view = view.trusting("b", false);
        assert_eq!(view.after("a", now), Some("b"), "an answer clears it");
    }

    #[test]
    fn when_all_are_suspects_they_are_asked_in_turn() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let view =
            ["a", "b", "c"].iter().fold(abc(), |view, node| view.suspecting(node, now, later));
        assert_eq!(view.after("a", now), Some("b"));
        assert_eq!(view.after("c", now), Some("a"));
        assert_eq!(View::new(Vec::new()).at_turn(5, now), None);
    }

    #[test]
    fn a_leader_outside_the_list_is_learned_up_to_a_bound() {
        let view = abc().led_by("d");
        assert_eq!((view.leader(), view.nodes().len()), (Some("d"), 4));
        let full = (0..100).fold(view, |view, n| view.led_by(&n.to_string()));
        assert_eq!(full.nodes().len(), NODES_PER_CLUSTER_MAX);
        assert_eq!(full.leader(), Some("99"));
        assert_eq!(full.not_led_by("99").leader(), None);
        assert_eq!(full.gates.len(), full.nodes().len() + 1);
        assert!(Arc::ptr_eq(&full.gate("99"), &full.gate("98")), "unlisted nodes share one");
        assert!(!Arc::ptr_eq(&full.gate("a"), &full.gate("b")));
    }
}
