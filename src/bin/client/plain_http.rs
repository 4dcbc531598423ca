//! This store by plain HTTP, as curl, Python or Go would use it: one request for each operation, each
//! client on a keep-alive connection of its own.
//!
//! It sends to a cluster's leader and does not ask for `Kv-Routing: direct`: when the leader changes,
//! or another cluster owns the key, the node passes the request on. A connection that fails is opened
//! again, to the next node.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use distrib_kv_store::kvclient::{Consistency, KVClient};
use distrib_kv_store::metrics::NodeState;
use distrib_kv_store::network::error::{Outcome, etag};
use distrib_kv_store::raft_node::RaftNode;
use distrib_kv_store::types::Revision;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::Ask;
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

/// The nodes that are asked.
#[derive(Debug, Clone)]
pub struct PlainHttp {
    /// `HOST:PORT`: those that clients begin with, by turns.
    first: Arc<[String]>,
    /// All, for when those fail.
    all: Arc<[String]>,
    consistency: Consistency,
}

impl PlainHttp {
    /// Finds the nodes through a connected client. `given` are those of the command line, if any.
    pub async fn find(
        client: &KVClient,
        given: Vec<String>,
        ask: Ask,
        consistency: Consistency,
    ) -> Result<Self, Failure> {
        let all = if given.is_empty() { nodes_of(client).await? } else { given };
        let first = match ask {
            Ask::Given => all.clone(),
            Ask::Leader => leaders_among(&all).await?,
        };
        Ok(Self { first: first.into(), all: all.into(), consistency })
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
    type Session = Connection;

    async fn session(&self, client: usize) -> Result<Connection, Failure> {
        let address = self.first[client % self.first.len()].clone();
        let at = self.all.iter().position(|node| *node == address).unwrap_or(0);
        let consistency = match self.consistency {
            Consistency::Linearizable | Consistency::LinearizableOnFollower => "linearizable",
            Consistency::Stale => "stale",
        };
        Ok(Connection { nodes: self.all.clone(), at, consistency, sender: None })
    }
}

/// One client's connection. Opened when it is needed.
#[derive(Debug)]
pub struct Connection {
    nodes: Arc<[String]>,
    /// The place of the node that it is connected to.
    at: usize,
    consistency: &'static str,
    sender: Option<SendRequest<Full<Bytes>>>,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
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
        method: Method,
        path: String,
        condition: Option<(header::HeaderName, HeaderValue)>,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let in_doubt = if method == Method::PUT { Outcome::Unknown } else { Outcome::NotApplied };
        let request = self.request(method, path, condition, body)?;
        let node = self.nodes[self.at].clone();
        let failed =
            |code, message, outcome| Failure::new(code, format!("{node}: {message}"), outcome);
        // Taken out: whatever fails from here on also ends the connection.
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => connect(&node).await.map_err(|message| {
                self.at = (self.at + 1) % self.nodes.len();
                failed("UNREACHABLE", message, Outcome::NotApplied)
            })?,
        };
        let exchange = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok::<_, hyper::Error>(Answer { status: head.status, headers: head.headers, body })
        };
        match timeout(REQUEST_TIMEOUT, exchange).await {
            Ok(Ok(answer)) => {
                self.sender = Some(sender);
                Ok(answer)
            }
            // Not a byte of it was written.
            Ok(Err(error)) if error.is_canceled() => {
                Err(failed("UNREACHABLE", error.to_string(), Outcome::NotApplied))
            }
            Ok(Err(error)) => Err(failed("ANSWER_LOST", error.to_string(), in_doubt)),
            Err(_) => Err(failed("CLIENT_TIMEOUT", "no answer in time".into(), in_doubt)),
        }
    }

    fn request(
        &self,
        method: Method,
        path: String,
        condition: Option<(header::HeaderName, HeaderValue)>,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let mut builder =
            Request::builder().method(method).uri(path).header(header::HOST, &self.nodes[self.at]);
        if let Some((name, value)) = condition {
            builder = builder.header(name, value);
        }
        let built = builder.body(Full::new(body));
        built.map_err(|error| Failure::not_applied("CLIENT", error.to_string()))
    }
}

async fn connect(node: &str) -> Result<SendRequest<Full<Bytes>>, String> {
    let connecting = async {
        let stream = TcpStream::connect(node).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())
    };
    let connected = timeout(CONNECT_TIMEOUT, connecting).await;
    let (sender, connection) = connected.map_err(|_| "no connection in time".to_owned())??;
    // Ends when the sender is dropped. What goes wrong with it the sender is told too.
    tokio::spawn(connection);
    Ok(sender)
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

impl Session for Connection {
    async fn put(&mut self, key: &str, value: Bytes) -> Result<(), Failure> {
        let answer = self.send(Method::PUT, path_of(key), None, value).await?;
        if answer.status == StatusCode::OK { Ok(()) } else { Err(refused(&answer)) }
    }

    async fn get(&mut self, key: &str) -> Result<Option<Revision>, Failure> {
        let path = format!("{}?consistency={}", path_of(key), self.consistency);
        let answer = self.send(Method::GET, path, None, Bytes::new()).await?;
        let tag = answer.headers.get(header::ETAG).and_then(|tag| tag.to_str().ok());
        let revision = tag.and_then(|tag| tag.trim_matches('"').parse().ok());
        match (answer.status, revision) {
            (StatusCode::OK, Some(revision)) => Ok(Some(revision)),
            (StatusCode::NOT_FOUND, _) => Ok(None),
            _ => Err(refused(&answer)),
        }
    }

    async fn put_if(
        &mut self,
        key: &str,
        value: Bytes,
        seen: Option<Revision>,
    ) -> Result<bool, Failure> {
        let condition = match seen {
            Some(revision) => (header::IF_MATCH, etag(revision)),
            None => (header::IF_NONE_MATCH, HeaderValue::from_static("*")),
        };
        let answer = self.send(Method::PUT, path_of(key), Some(condition), value).await?;
        match answer.status {
            StatusCode::OK => Ok(true),
            StatusCode::PRECONDITION_FAILED => Ok(false),
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
