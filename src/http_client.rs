//! One HTTP/1.1 client for everything that calls a node: the forwarder, `RaftNode`, `KVClient`.
//!
//! Its point is [`SendError`]: a caller must know whether a request may have reached the other side,
//! because a write that may have arrived must not be sent again. It never repeats what may have arrived and
//! never follows a redirect. Paths go out byte for byte as given; clients that normalise URLs
//! (`/v1/kv/..`) would change keys. Connections are kept alive and pooled for each address.
//!
//! HTTP is hyper's. Its pooled client is not used: it has a task for each connection, which with a lone
//! caller costs more than the request ([`connection`]).

mod connection;
mod pool;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri};
use http_body_util::Full;
use hyper_util::client::legacy::connect::HttpConnector;
use tokio::time::Instant;

use crate::config::VALUE_BYTES_MAX;

use connection::{Connection, Failure};
use pool::Pool;

/// How long a connection may take to be established. Short: a dead node on the same machine refuses
/// at once, and a caller has other nodes to try.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long an idle connection is kept: well below the 75 s after which our own servers close it, so
/// that no request meets a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The largest answer that is read: the largest value that can be configured, or as many bytes of smaller ones,
/// and room for what a batch's other operations are answered. A larger one is an error.
const RESPONSE_BYTES_MAX: usize = VALUE_BYTES_MAX + (4 << 20);

/// Whether there is room for so many more bytes.
pub type HasRoom<'a> = dyn FnMut(usize) -> bool + Send + 'a;

/// A request to one node.
#[derive(Debug, Clone)]
pub struct HttpRequest {
    /// The method.
    pub method: Method,
    /// `HOST:PORT`.
    pub address: String,
    /// The raw path and query, percent-encoded by the caller.
    pub path_and_query: String,
    /// Headers besides `Host` and `Content-Length`.
    pub headers: HeaderMap,
    /// The body, possibly empty.
    pub body: Bytes,
}

/// A complete answer.
#[derive(Debug, Clone)]
pub struct HttpResponse {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// There can be no such request, to this node or any other: its path is too long, for example.
    #[error("this cannot be sent: {0}")]
    Unsendable(String),
    /// The request did not leave: nothing can have happened there.
    #[error("cannot reach {address}: {message}")]
    NotSent {
        /// The node.
        address: String,
        /// What the system said.
        message: String,
    },
    /// The request may have arrived, but no answer came back.
    #[error("no answer from {address}: {message}")]
    MaybeSent {
        /// The node.
        address: String,
        /// What happened.
        message: String,
    },
    /// There was no room for its answer: the request arrived.
    #[error("no room for the answer from {address}")]
    NoRoom {
        /// The node.
        address: String,
    },
    /// The deadline passed; the request may have arrived.
    #[error("no answer from {address} within {} ms", .waited.as_millis())]
    TimedOut {
        /// The node.
        address: String,
        /// How long the answer was waited for.
        waited: Duration,
    },
}

impl SendError {
    /// Whether the other side may have received the request.
    pub fn may_have_arrived(&self) -> bool {
        !matches!(self, Self::NotSent { .. } | Self::Unsendable(_))
    }
}

/// The client. Cloning shares the connection pool.
#[derive(Clone)]
pub struct HttpClient {
    connector: HttpConnector,
    pool: Arc<Pool>,
}

impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpClient").finish_non_exhaustive()
    }
}

impl Default for HttpClient {
    fn default() -> Self {
        Self::new()
    }
}

impl HttpClient {
    /// A client with an empty pool.
    pub fn new() -> Self {
        Self::keeping(usize::MAX)
    }

    /// The same; never keeps more than `idle_max` connections that are not in use.
    pub fn keeping(idle_max: usize) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        Self { connector, pool: Arc::new(Pool::new(IDLE_TIMEOUT, idle_max)) }
    }

    /// Sends one request and reads the whole answer, or gives up at `deadline`. Runs in the caller's task,
    /// which must be one of Tokio's.
    ///
    /// Dropping the future closes the connection; the request may have arrived all the same.
    pub async fn send(
        &self,
        request: HttpRequest,
        deadline: Instant,
    ) -> Result<HttpResponse, SendError> {
        self.send_for(request, deadline, &mut |_| true).await
    }

    /// As [`Self::send`]; `has_room` is asked before more bytes of the answer's body are taken into memory, at once
    /// for all of it where its length is announced. Without room, the answer is given up.
    pub async fn send_for(
        &self,
        request: HttpRequest,
        deadline: Instant,
        has_room: &mut HasRoom<'_>,
    ) -> Result<HttpResponse, SendError> {
        let started = Instant::now();
        let HttpRequest { method, address, path_and_query, headers, body } = request;
        let uri = match path_and_query.parse::<Uri>() {
            Ok(uri) => uri,
            Err(error) => return Err(SendError::Unsendable(error.to_string())),
        };
        let mut outgoing = http::Request::new(Full::new(body));
        *outgoing.method_mut() = method;
        *outgoing.uri_mut() = uri;
        *outgoing.headers_mut() = headers;
        loop {
            let pooled = self.pool.take(&address, started);
            let is_fresh = pooled.is_none();
            let mut connection = match pooled {
                Some(connection) => connection,
                None => match self.connect(&address, deadline).await {
                    Ok(connection) => connection,
                    Err(message) => return Err(SendError::NotSent { address, message }),
                },
            };
            match connection.exchange(outgoing, deadline, has_room).await {
                Ok(response) => {
                    if connection.settle() {
                        self.pool.give_back(address, connection);
                    }
                    return Ok(response);
                }
                // The node had closed it while it was idle. Ends with the pool's connections.
                Err(Failure::NotWritten { request, .. }) if !is_fresh => outgoing = *request,
                Err(Failure::NotWritten { message, .. }) => {
                    return Err(SendError::NotSent { address, message });
                }
                Err(Failure::MaybeSent { message }) => {
                    return Err(SendError::MaybeSent { address, message });
                }
                Err(Failure::NoRoom) => return Err(SendError::NoRoom { address }),
                Err(Failure::TimedOut) => return Err(timed_out(address, started)),
            }
        }
    }

    /// An error says why there is none: nothing was sent.
    async fn connect(&self, address: &str, deadline: Instant) -> Result<Box<Connection>, String> {
        let opening = Connection::open(self.connector.clone(), address);
        let opened = tokio::time::timeout_at(deadline, opening).await;
        opened.map_err(|_| "connecting took too long".to_owned())?.map(Box::new)
    }
}

fn timed_out(address: String, started: Instant) -> SendError {
    SendError::TimedOut { address, waited: started.elapsed() }
}

/// An error with its causes: hyper's own text alone ("client error (Connect)") says too little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
