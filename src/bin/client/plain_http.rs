//! This store by plain HTTP, as curl, Python or Go would use it: one request for each operation, each
//! client on a keep-alive connection of its own.
//!
//! It knows the ring, as a client of several clusters would that keeps what `GET /v1/ring` says: each
//! request goes to the leader of the cluster that owns the key, on a connection of the client's own to
//! that cluster. It does not ask for `Kv-Routing: direct`: when the leader or the ring changes, the node
//! passes the request on. A connection that fails is opened again, to the next node of its cluster.
//! With `--ask given` it knows nothing and leaves all routing to the given nodes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use distrib_kv_store::kvclient::{Consistency, KVClient};
use distrib_kv_store::metrics::NodeState;
use distrib_kv_store::network::error::Outcome;
use distrib_kv_store::raft_node::RaftNode;
use distrib_kv_store::ring::RingTable;
use distrib_kv_store::types::Revision;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::Ask;
use super::keep_alive::{Answer, KeepAlive, Request};
use super::library;
use super::store::{Session, Store};
use super::tally::Failure;

/// How long one request may take: more than a node's own deadline of 10 s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a connection may take to be established.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long to look for a leader before the load begins: longer than an election.
const LEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause between two looks.
const LEADER_PAUSE: Duration = Duration::from_millis(100);

/// The statuses that mean something to a load.
const OK: u16 = 200;
const NOT_FOUND: u16 = 404;
const PRECONDITION_FAILED: u16 = 412;

/// The nodes that are asked.
#[derive(Debug, Clone)]
pub struct PlainHttp {
    /// Who is asked for which key. Without a ring, or when the given nodes are to be asked, all keys go to
    /// the one place that there is.
    ring: Arc<RingTable>,
    /// One for each cluster, in the ring's order.
    places: Arc<[Place]>,
    consistency: Consistency,
}

/// Nodes that are asked for the same keys.
#[derive(Debug, Clone)]
struct Place {
    /// `HOST:PORT`: those that clients begin with, by turns.
    first: Vec<String>,
    /// All, for when those fail.
    all: Arc<[String]>,
}

impl PlainHttp {
    /// Finds the nodes through a connected client. `given` are those of the command line, if any.
    pub async fn find(
        client: &KVClient,
        given: Vec<String>,
        ask: Ask,
        consistency: Consistency,
    ) -> Result<Self, Failure> {
        let none = Arc::new(RingTable::none());
        let (ring, places) = match ask {
            Ask::Given => {
                let all = if given.is_empty() { nodes_of(client).await? } else { given };
                (none, vec![Place { first: all.clone(), all: all.into() }])
            }
            Ask::Leader if client.ring().clusters.is_empty() => {
                let all = if given.is_empty() { nodes_of(client).await? } else { given };
                (none, vec![Place::led(all).await?])
            }
            Ask::Leader => {
                let bad_ring = |error| Failure::not_applied("RING", format!("{error}"));
                let ring = RingTable::new(client.ring()).map_err(bad_ring)?;
                let mut places = Vec::new();
                for cluster in &ring.ring().clusters {
                    let nodes = cluster.nodes.iter().map(|node| node.http.clone());
                    places.push(Place::led(nodes.collect()).await?);
                }
                (Arc::new(ring), places)
            }
        };
        Ok(Self { ring, places: places.into(), consistency })
    }
}

impl Place {
    async fn led(all: Vec<String>) -> Result<Self, Failure> {
        Ok(Self { first: leaders_among(&all).await?, all: all.into() })
    }
}

/// All nodes of all clusters.
async fn nodes_of(client: &KVClient) -> Result<Vec<String>, Failure> {
    let ring = client.ring();
    if ring.clusters.is_empty() {
        let (_, nodes) = client.route("any key").await.map_err(library::failure)?;
        return Ok(nodes);
    }
    let nodes = ring.clusters.iter().flat_map(|cluster| &cluster.nodes);
    Ok(nodes.map(|node| node.http.clone()).collect())
}

/// Those that lead their cluster. Waits for an election.
async fn leaders_among(nodes: &[String]) -> Result<Vec<String>, Failure> {
    let asking = RaftNode::new(nodes.to_vec()).with_timeout(CONNECT_TIMEOUT);
    let deadline = Instant::now() + LEADER_TIMEOUT;
    loop {
        let mut leaders = Vec::new();
        for node in nodes {
            // A node that is down leads nobody.
            if let Ok(metrics) = asking.metrics_of(node).await
                && metrics.state == NodeState::Leader
            {
                leaders.push(node.clone());
            }
        }
        if !leaders.is_empty() {
            return Ok(leaders);
        }
        if Instant::now() > deadline {
            let message = "none of the nodes leads; `--ask given` asks any of them".to_owned();
            return Err(Failure::not_applied("NO_LEADER", message));
        }
        tokio::time::sleep(LEADER_PAUSE).await;
    }
}

impl Store for PlainHttp {
    type Session = Client;

    async fn session(&self, client: usize) -> Result<Client, Failure> {
        let connections = self.places.iter().map(|place| {
            let first = &place.first[client % place.first.len()];
            let at = place.all.iter().position(|node| node == first).unwrap_or(0);
            Connection { nodes: place.all.clone(), at, open: None }
        });
        let consistency = match self.consistency {
            Consistency::Linearizable | Consistency::LinearizableOnFollower => "linearizable",
            Consistency::Stale => "stale",
        };
        Ok(Client { ring: self.ring.clone(), connections: connections.collect(), consistency })
    }
}

/// One client.
#[derive(Debug)]
pub struct Client {
    ring: Arc<RingTable>,
    /// One for each place.
    connections: Vec<Connection>,
    consistency: &'static str,
}

/// One client's connection to one of a cluster's nodes. Opened when it is needed.
#[derive(Debug)]
struct Connection {
    nodes: Arc<[String]>,
    /// The place of the node that it is connected to.
    at: usize,
    open: Option<KeepAlive>,
}

/// What an error's body says.
#[derive(Deserialize)]
struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Deserialize)]
struct ErrorDetail {
    code: String,
    message: String,
    outcome: Outcome,
}

impl Connection {
    async fn send(
        &mut self,
        method: &str,
        path: &str,
        condition: Option<(&str, &str)>,
        body: &[u8],
    ) -> Result<Answer, Failure> {
        let in_doubt = if method == "PUT" { Outcome::Unknown } else { Outcome::NotApplied };
        let node = self.nodes[self.at].clone();
        let failed =
            |code, message, outcome| Failure::new(code, format!("{node}: {message}"), outcome);
        // Taken out: whatever fails from here on also ends the connection.
        let mut open = match self.open.take() {
            Some(open) => open,
            None => connect(&node).await.map_err(|message| {
                self.at = (self.at + 1) % self.nodes.len();
                failed("UNREACHABLE", message, Outcome::NotApplied)
            })?,
        };
        let request = Request { method, path, host: &node, field: condition, body };
        match timeout(REQUEST_TIMEOUT, open.exchange(&request)).await {
            Ok(Ok(answer)) => {
                self.open = (!answer.closes).then_some(open);
                Ok(answer)
            }
            Ok(Err(message)) => Err(failed("ANSWER_LOST", message, in_doubt)),
            Err(_) => Err(failed("CLIENT_TIMEOUT", "no answer in time".into(), in_doubt)),
        }
    }
}

async fn connect(node: &str) -> Result<KeepAlive, String> {
    let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(node)).await;
    let stream = connected.map_err(|_| "no connection in time".to_owned())?;
    stream.and_then(KeepAlive::new).map_err(|error| error.to_string())
}

/// `key` is one of the load's own, which need no escapes.
fn path_of(key: &str) -> String {
    format!("/v1/kv/{key}")
}

/// An answer that is not the expected one.
fn refused(answer: &Answer) -> Failure {
    match serde_json::from_slice::<ErrorBody>(&answer.body) {
        Ok(ErrorBody { error }) => Failure::new(error.code, error.message, error.outcome),
        Err(error) => {
            let message = format!("status {}: {error}", answer.status);
            Failure::new("GARBLED", message, Outcome::Unknown)
        }
    }
}

impl Client {
    fn connection_for(&mut self, key: &str) -> &mut Connection {
        let owner = self.ring.owner(key.as_bytes()).and_then(|owner| {
            self.ring.ring().clusters.iter().position(|cluster| cluster.id == owner.id)
        });
        &mut self.connections[owner.unwrap_or(0)]
    }
}

impl Session for Client {
    async fn put(&mut self, key: &str, value: Bytes) -> Result<(), Failure> {
        let connection = self.connection_for(key);
        let answer = connection.send("PUT", &path_of(key), None, &value).await?;
        if answer.status == OK { Ok(()) } else { Err(refused(&answer)) }
    }

    async fn get(&mut self, key: &str) -> Result<Option<Revision>, Failure> {
        let path = format!("{}?consistency={}", path_of(key), self.consistency);
        let answer = self.connection_for(key).send("GET", &path, None, &[]).await?;
        let revision = answer.etag.as_ref().and_then(|tag| tag.trim_matches('"').parse().ok());
        match (answer.status, revision) {
            (OK, Some(revision)) => Ok(Some(revision)),
            (NOT_FOUND, _) => Ok(None),
            _ => Err(refused(&answer)),
        }
    }

    async fn put_if(
        &mut self,
        key: &str,
        value: Bytes,
        seen: Option<Revision>,
    ) -> Result<bool, Failure> {
        let tag = seen.map(|revision| format!("\"{revision}\""));
        let condition = tag.as_deref().map_or(("If-None-Match", "*"), |tag| ("If-Match", tag));
        let connection = self.connection_for(key);
        let answer = connection.send("PUT", &path_of(key), Some(condition), &value).await?;
        match answer.status {
            OK => Ok(true),
            PRECONDITION_FAILED => Ok(false),
            _ => Err(refused(&answer)),
        }
    }

    /// One request after the other: plain HTTP has one answer for each key.
    async fn multi_get(&mut self, keys: &[String]) -> Result<usize, Failure> {
        let mut found = 0;
        for key in keys {
            found += usize::from(self.get(key).await?.is_some());
        }
        Ok(found)
    }
}
