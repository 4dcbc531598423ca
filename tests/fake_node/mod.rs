//! A node that answers by script, so that clients can be tested against every kind of answer.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use distrib_kv_store::ring::{Ring, RingCluster, RingNode};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A request as the node saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// What the node does about a request.
#[derive(Debug, Clone)]
pub enum Reply {
    Json(u16, Value),
    /// A value with its revision.
    Value(u64, Bytes),
    /// 412 with the current revision.
    Condition(Option<u64>),
    /// Something that is not this store's.
    Text(u16, &'static str),
    /// No answer, and the connection stays.
    Hang,
    /// No answer, and the connection closes.
    Close,
}

/// An address taken, not served yet.
pub struct Bound {
    pub address: String,
    listener: std::net::TcpListener,
}

pub struct FakeNode {
    pub address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn bind() -> Bound {
    let listener = std::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    listener.set_nonblocking(true).unwrap();
    Bound { address: listener.local_addr().unwrap().to_string(), listener }
}

/// An address that refuses connections.
pub fn refusing() -> String {
    bind().address
}

pub fn start(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> FakeNode {
    bind().serve(script)
}

impl Bound {
    pub fn serve(self, script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> FakeNode {
        let listener = TcpListener::from_std(self.listener).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let script = Arc::new(script);
        let connections = Arc::new(AtomicUsize::new(0));
        let task = tokio::spawn(accept(listener, seen.clone(), connections.clone(), script));
        FakeNode { address: self.address, seen, connections, task }
    }
}

impl FakeNode {
    /// The requests whose path begins so.
    pub fn seen(&self, path: &str) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|request| request.path.starts_with(path)).cloned().collect()
    }

    /// How many connections were ever accepted.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

async fn accept(
    listener: TcpListener,
    seen: Arc<Mutex<Vec<Seen>>>,
    accepted: Arc<AtomicUsize>,
    script: Arc<impl Fn(&Seen) -> Reply + Send + Sync + 'static>,
) {
    // Dropped, and so aborted, together with this task.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        accepted.fetch_add(1, Ordering::SeqCst);
        let (seen, script) = (seen.clone(), script.clone());
        connections.spawn(async move {
            let service = service_fn(|request| answer(request, &seen, &*script));
            let connection = hyper::server::conn::http1::Builder::new();
            // A script that closes the connection ends it with an error: that is its purpose.
            let _ = connection.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    seen: &Mutex<Vec<Seen>>,
    script: &(impl Fn(&Seen) -> Reply + Send + Sync),
) -> Result<Response<Full<Bytes>>, std::io::Error> {
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().unwrap().to_string();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let request = Seen { method: head.method, path, headers: head.headers, body };
    seen.lock().unwrap().push(request.clone());
    let (status, tag, body) = match script(&request) {
        Reply::Json(status, body) => (status, None, body.to_string().into()),
        Reply::Value(revision, body) => (200, Some(revision), body),
        Reply::Condition(revision) => {
            (412, revision, error_body("CONDITION_FAILED", "not_applied").to_string().into())
        }
        Reply::Text(status, text) => (status, None, Bytes::from_static(text.as_bytes())),
        Reply::Hang => std::future::pending().await,
        Reply::Close => return Err(std::io::Error::other("the script closes the connection")),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    if let Some(revision) = tag {
        response.headers_mut().insert("etag", format!("\"{revision}\"").parse().unwrap());
    }
    Ok(response)
}

fn error_body(code: &str, outcome: &str) -> Value {
    json!({"error": {"code": code, "message": "scripted", "outcome": outcome}})
}

pub fn error(status: u16, code: &str, outcome: &str) -> Reply {
    Reply::Json(status, error_body(code, outcome))
}

pub fn written(revision: u64) -> Reply {
    Reply::Json(200, json!({"revision": revision}))
}

pub fn absent() -> Reply {
    error(404, "NOT_FOUND", "not_applied")
}

pub fn not_leader(leader: &str) -> Reply {
    let mut body = error_body("NOT_LEADER", "not_applied");
    body["error"]["leader"] = json!({"id": 2, "http": leader, "rpc": "127.0.0.1:1"});
    body["error"]["epoch"] = json!(1);
    Reply::Json(307, body)
}

pub fn wrong_cluster(owner: &RingCluster, epoch: u64) -> Reply {
    let mut body = error_body("WRONG_CLUSTER", "not_applied");
    body["error"]["owner"] = serde_json::to_value(owner).unwrap();
    body["error"]["epoch"] = json!(epoch);
    Reply::Json(421, body)
}

pub fn metrics(cluster: &str, address: &str) -> Reply {
    Reply::Json(
        200,
        json!({"id": 1, "cluster": cluster, "http": address, "rpc": "127.0.0.1:1",
            "state": "leader", "term": 1, "current_leader": 1, "last_log": 1, "last_applied": 1,
            "voters": [1], "learners": []}),
    )
}

pub fn cluster(id: &str, addresses: &[&str]) -> RingCluster {
    let node = |(id, http): (u64, &&str)| RingNode { id, http: (*http).into(), rpc: "r:1".into() };
    let nodes = (1..).zip(addresses).map(node).collect();
    RingCluster { id: id.parse().unwrap(), weight: 1.0, nodes }
}

pub fn ring(epoch: u64, clusters: Vec<RingCluster>) -> Ring {
    let sequencer = clusters.first().map(|cluster| cluster.id.clone());
    Ring { epoch, sequencer, clusters, ..Ring::none() }
}

pub fn ring_reply(ring: &Ring) -> Reply {
    Reply::Json(200, serde_json::to_value(ring).unwrap())
}
