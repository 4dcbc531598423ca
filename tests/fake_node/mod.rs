//! A node that answers by script, so that clients can be tested against every kind of answer.
//!
//! A script answers requests for single keys. A batch is answered by asking it about each operation as
//! if that had come alone; what cannot be said of one operation only (silence, strangers' words,
//! another leader) is the answer to the whole batch.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use distrib_kv_store::batch::{
    self, Batch, Failure, Limits, MEDIA_TYPE, Operation, OperationResult,
};
use distrib_kv_store::key_path;
use distrib_kv_store::network::error::{ErrorBody, etag};
use distrib_kv_store::once::ClientFloor;
use distrib_kv_store::ring::{Ring, RingCluster, RingNode};
use distrib_kv_store::types::Condition;
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
    /// The answer to a whole batch, as the script of a raw node gives it.
    Results(Vec<OperationResult>),
    /// This answer once the gate is open.
    After(Gate, Box<Reply>),
    /// No answer, and the connection stays.
    Hang,
    /// No answer, and the connection closes.
    Close,
}

/// Keeps answers back until it is opened.
#[derive(Debug, Clone)]
pub struct Gate(tokio::sync::watch::Sender<bool>);

impl Gate {
    pub fn closed() -> Self {
        Self(tokio::sync::watch::Sender::new(false))
    }

    pub fn open(&self) {
        self.0.send_replace(true);
    }

    async fn passed(&self) {
        self.0.subscribe().wait_for(|open| *open).await.unwrap();
    }
}

/// An address taken, not served yet.
pub struct Bound {
    pub address: String,
    listener: std::net::TcpListener,
}

pub struct FakeNode {
    pub address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    batches: Arc<Mutex<Vec<Seen>>>,
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

/// An address that refuses connections, now and later: the port stays taken until the process ends,
/// or the next test's node would get it.
pub fn refusing() -> String {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    std::mem::forget(socket);
    address
}

pub fn start(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> FakeNode {
    bind().serve(script)
}

impl Bound {
    pub fn serve(self, script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> FakeNode {
        self.serve_as(script, false)
    }

    /// Its script gets batches as they are.
    pub fn serve_raw(self, script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> FakeNode {
        self.serve_as(script, true)
    }

    fn serve_as(
        self,
        script: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
        raw: bool,
    ) -> FakeNode {
        let listener = TcpListener::from_std(self.listener).unwrap();
        let (seen, batches) = (Arc::default(), Arc::default());
        let node = Node {
            seen: Arc::clone(&seen),
            batches: Arc::clone(&batches),
            script: Box::new(script),
            raw,
        };
        let connections = Arc::new(AtomicUsize::new(0));
        let task = tokio::spawn(accept(listener, connections.clone(), Arc::new(node)));
        FakeNode { address: self.address, seen, batches, connections, task }
    }
}

impl FakeNode {
    /// The requests whose path begins so, each operation of a batch as one of its own.
    pub fn seen(&self, path: &str) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|request| request.path.starts_with(path)).cloned().collect()
    }

    /// The batches.
    pub fn batches(&self) -> Vec<Seen> {
        self.batches.lock().unwrap().clone()
    }

    /// How many connections were ever accepted.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Seen {
    /// What a batch holds.
    pub fn batch(&self) -> Batch {
        let limits = Limits { operations_max: 10_000, key_bytes_max: 0, value_bytes_max: 0 };
        batch::decode_request(self.body.clone(), &limits).unwrap()
    }

    /// The operations of a batch.
    pub fn operations(&self) -> Vec<Operation> {
        self.batch().operations
    }

    /// Client, sequence and floor of a write.
    pub fn once(&self) -> (String, u64, u64) {
        let text = |name| self.headers[name].to_str().unwrap();
        let (client, seq) = text("idempotency-key").split_once('/').unwrap();
        (client.to_owned(), seq.parse().unwrap(), text("kv-client-floor").parse().unwrap())
    }

    /// One operation of this batch as a request of its own.
    fn single(&self, client: Option<&ClientFloor>, operation: Operation) -> Self {
        let (_, query) = self.path.split_once('?').unwrap_or_default();
        let key = key_path::encode(operation.key());
        let mut headers = self.headers.clone();
        headers.remove("content-type");
        if let Some(once) = operation.once(client).unwrap() {
            let key = format!("{}/{}", once.client(), once.seq());
            headers.insert("idempotency-key", key.parse().unwrap());
            headers.insert("kv-client-floor", once.floor().into());
        }
        let (method, path, body, condition) = match operation {
            Operation::Get { .. } => {
                let path = format!("/v1/kv/{key}?{query}");
                (Method::GET, path, Bytes::new(), Condition::Always)
            }
            Operation::Put { value, condition, .. } => {
                (Method::PUT, format!("/v1/kv/{key}"), value, condition)
            }
            Operation::Delete { condition, .. } => {
                (Method::DELETE, format!("/v1/kv/{key}"), Bytes::new(), condition)
            }
        };
        match condition {
            Condition::Always => None,
            Condition::Revision(revision) => headers.insert("if-match", etag(revision)),
            Condition::Absent => headers.insert("if-none-match", "*".parse().unwrap()),
        };
        Self { method, path, headers, body }
    }
}

struct Node {
    seen: Arc<Mutex<Vec<Seen>>>,
    batches: Arc<Mutex<Vec<Seen>>>,
    script: Box<dyn Fn(&Seen) -> Reply + Send + Sync>,
    raw: bool,
}

impl Node {
    fn reply(&self, request: Seen) -> Reply {
        if !request.path.starts_with("/v1/batch") {
            self.seen.lock().unwrap().push(request.clone());
            return (self.script)(&request);
        }
        self.batches.lock().unwrap().push(request.clone());
        if self.raw {
            return (self.script)(&request);
        }
        let Batch { client, operations } = request.batch();
        let single = |operation| request.single(client.as_ref(), operation);
        let singles: Vec<_> = operations.into_iter().map(single).collect();
        self.seen.lock().unwrap().extend(singles.iter().cloned());
        let mut results = Vec::new();
        for single in &singles {
            match result_of(&single.method, (self.script)(single)) {
                Ok(result) => results.push(result),
                Err(whole) => return whole,
            }
        }
        Reply::Results(results)
    }
}

/// The answer to a single request as a result, or what is the answer to the whole batch.
fn result_of(method: &Method, reply: Reply) -> Result<OperationResult, Reply> {
    let failed = |status, current, body: &Value| {
        let ErrorBody { error } = serde_json::from_value(body.clone()).unwrap();
        OperationResult::Failed(Box::new(Failure { status, current, error }))
    };
    Ok(match reply {
        Reply::Value(revision, value) => OperationResult::Found { revision, value },
        Reply::Condition(revision) => {
            failed(412, revision, &error_body("CONDITION_FAILED", "not_applied"))
        }
        Reply::Json(200, body) if *method == Method::DELETE => OperationResult::Deleted {
            revision: body["revision"].as_u64().unwrap(),
            deleted: body["deleted"].as_bool().unwrap(),
        },
        Reply::Json(200, body) => {
            OperationResult::Written { revision: body["revision"].as_u64().unwrap() }
        }
        Reply::Json(404, _) => OperationResult::Absent,
        Reply::Json(status, body) if status != 307 => failed(status, None, &body),
        whole => return Err(whole),
    })
}

async fn accept(listener: TcpListener, accepted: Arc<AtomicUsize>, node: Arc<Node>) {
    // Dropped, and so aborted, together with this task.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        accepted.fetch_add(1, Ordering::SeqCst);
        let node = node.clone();
        connections.spawn(async move {
            let service = service_fn(|request| answer(request, &node));
            let connection = hyper::server::conn::http1::Builder::new();
            // A script that closes the connection ends it with an error: that is its purpose.
            let _ = connection.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    node: &Node,
) -> Result<Response<Full<Bytes>>, std::io::Error> {
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().unwrap().to_string();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let request = Seen { method: head.method, path, headers: head.headers, body };
    let mut response = Response::new(Full::default());
    let mut reply = node.reply(request);
    while let Reply::After(gate, then) = reply {
        gate.passed().await;
        reply = *then;
    }
    let (status, body) = match reply {
        Reply::Json(status, body) => (status, body.to_string().into()),
        Reply::Value(revision, body) => {
            response.headers_mut().insert("etag", etag(revision));
            (200, body)
        }
        Reply::Condition(revision) => {
            if let Some(revision) = revision {
                response.headers_mut().insert("etag", etag(revision));
            }
            (412, error_body("CONDITION_FAILED", "not_applied").to_string().into())
        }
        Reply::Text(status, text) => (status, Bytes::from_static(text.as_bytes())),
        Reply::Results(results) => {
            response.headers_mut().insert("content-type", MEDIA_TYPE.parse().unwrap());
            (200, batch::encode_results(&results))
        }
        Reply::After(..) | Reply::Hang => std::future::pending().await,
        Reply::Close => return Err(std::io::Error::other("the script closes the connection")),
    };
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    *response.body_mut() = Full::new(body);
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
